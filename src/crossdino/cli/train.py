"""`crossdino train`, and where its configuration comes from."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from crossdino.config import Config, flattened, read_yaml, with_changes
from crossdino.errors import InputError


def run_train(options: argparse.Namespace, settings: dict[str, str]) -> int:
    """Train, or draw what a training would see."""
    config = resolve_config(options, settings)
    if options.show_batch is not None:
        from crossdino.training import show_batch

        print(show_batch(config, options.show_batch))
        return 0
    if options.recipe is not None and options.weights is None and not options.resume:
        _tell_of_random_backbone(options.recipe, config)
    from crossdino.training import train

    train(
        config,
        resume=options.resume,
        overwrite=options.overwrite,
        init_weights=options.weights,
        recipe=options.recipe,
    )
    return 0


def resolve_config(options: argparse.Namespace, settings: dict[str, str]) -> Config:
    """The configuration of `crossdino train`: recipe, then file, then `--data`, then single settings.

    A training that is resumed starts from the configuration in its own folder.

    Args:
        options: the parsed options `recipe`, `config`, `data`, `output`, `name`, `resume`.
        settings: dotted name -> value as text.
    """
    output = options.output or settings.get("training.output")
    stored = Path(output) / "config.yaml" if output and options.resume else None
    if options.recipe is not None:
        from crossdino.recipes import recipe

        config = recipe(options.recipe)
    elif stored is not None and stored.is_file():
        config = with_file(Config(), stored)
    elif options.config is not None:
        config = Config()
    elif options.resume:
        raise InputError(f"no training to resume in {output}" if output else "--resume needs the folder (--output)")
    else:
        raise InputError("name a recipe (--recipe; `crossdino recipes` lists them) or a configuration file (--config)")
    if options.config is not None:
        config = with_file(config, options.config)
    changes: dict[str, Any] = {"data.source": options.data} if options.data is not None else {}
    changes |= settings
    if options.output is not None:
        changes["training.output"] = options.output
    if options.name is not None:
        changes["name"] = options.name
    config = with_changes(config, changes)
    if options.recipe is not None and config.data.train_annotations is None and config.data.source is not None:
        _refuse_other_benchmark(options.recipe, Path(config.data.source))
    return config


def _refuse_other_benchmark(name: str, source: Path) -> None:
    """A recipe of the paper, and a data set that `crossdino prepare` made for another one, is a slip of the pen."""
    from crossdino.benchmarks import BENCHMARKS
    from crossdino.paper import recipe_benchmark

    wanted = recipe_benchmark(name)
    try:
        found = json.loads(((source if source.is_dir() else source.parent) / "benchmark.json").read_text("utf-8"))
    except (OSError, ValueError):
        return  # people's own data: any recipe will do
    made_for = found.get("benchmark") if isinstance(found, dict) else None
    if wanted is not None and isinstance(made_for, str) and made_for in BENCHMARKS and made_for != wanted:
        raise InputError(
            f"recipe {name} is for {BENCHMARKS[wanted].title}, but {source} was prepared as "
            f"{BENCHMARKS[made_for].title}: choose another (crossdino recipes --benchmark {made_for}), or, to have its "
            f"settings all the same, write them to a file (crossdino recipes --show {name}) and give that as --config"
        )


def _tell_of_random_backbone(name: str, config: Config) -> None:
    """Say that a recipe of the paper will not get near its number without weights for its backbone."""
    from crossdino.paper import recipe_benchmark

    if recipe_benchmark(name) is None or config.model.backbone_weights is not None:
        return
    which = "FILE, an official Strip-MLP checkpoint" if config.model.backbone.startswith("strip_mlp") else "timm"
    print(
        f"crossdino: warning: the backbone starts from random weights, the paper's from ImageNet-1K: give "
        f"--model.backbone_weights {which}",
        file=sys.stderr,
    )


def with_file(config: Config, path: str | Path) -> Config:
    """The configuration with the settings of a YAML file; what is wrong with one of them is told with the file's name.

    Args:
        config: where the settings that the file leaves out come from.
        path: the file.
    """
    settings = flattened(read_yaml(path))
    try:
        return with_changes(config, settings)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
