"""`crossdino train`, and where its configuration comes from."""

from __future__ import annotations

import argparse
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
    from crossdino.training import train

    train(config, resume=options.resume, overwrite=options.overwrite, init_weights=options.weights)
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
    return with_changes(config, changes)


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
