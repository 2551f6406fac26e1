"""Commands about models: `convert-weights`, `info`, `recipes`."""

from __future__ import annotations

import argparse
from pathlib import Path

from crossdino.cli.output import make_console
from crossdino.config import to_dict
from crossdino.errors import InputError


def run_convert_weights(options: argparse.Namespace) -> int:
    """Write a model folder from an official file, and tell what became of its weights."""
    output = Path(options.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output} exists already and is not an empty folder; name another")
    names = options.class_names.split(",") if options.class_names else None
    mapped = dict(pair.partition("=")[::2] for pair in options.class_map.split(",")) if options.class_map else None
    from crossdino.official_weights import convert_weights

    report = convert_weights(
        options.source,
        output,
        fusion=options.fusion,
        class_names=names,
        class_map=mapped,
        num_queries=options.num_queries,
    )
    console = make_console()
    for line in report.lines():
        console.print(line, soft_wrap=True)
    console.print(f"written: {output}; use it with --weights {output}", soft_wrap=True)
    return 0


def run_info(options: argparse.Namespace) -> int:
    """Print what recipes cost."""
    from crossdino.recipes import RECIPES, recipe

    configs = [recipe(name) for name in options.recipes or RECIPES]
    height, width = options.size
    if min(height, width) < 32:
        raise InputError(f"--size {height} {width}: both must be at least 32 pixels")
    from rich.table import Table

    from crossdino.complexity import measure

    table = Table(title=f"one image of {height} x {width} px (height x width)")
    for header in ("recipe", "backbone", "classes", "trainable", "parameters", "GMACs", "feature maps"):
        table.add_column(header, justify="left" if header in ("recipe", "backbone", "feature maps") else "right")
    for config in configs:
        cost = measure(config.model, (height, width))
        table.add_row(
            config.name,
            config.model.backbone,
            str(config.model.num_classes),
            f"{cost.num_trainable / 1e6:.2f}M",
            f"{cost.num_parameters / 1e6:.2f}M",
            f"{cost.num_multiply_adds / 1e9:.1f}",
            " ".join(f"{h}x{w}" for h, w in cost.feature_hw),
        )
    make_console().print(table)
    return 0


def run_recipes(options: argparse.Namespace) -> int:
    """List the recipes, or print one as a file for `--config`."""
    from crossdino.recipes import RECIPES, recipe

    if options.show is not None:
        import yaml

        print(yaml.safe_dump(to_dict(recipe(options.show)), sort_keys=False), end="")
        return 0
    from rich.table import Table

    table = Table()
    for header in ("recipe", "what it is"):
        table.add_column(header)
    for name, make in RECIPES.items():
        table.add_row(name, (make.__doc__ or "").strip().splitlines()[0])
    make_console().print(table)
    return 0
