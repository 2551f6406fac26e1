"""Commands about models: `convert-weights`, `info`, `recipes`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from itertools import groupby
from pathlib import Path
from typing import Any

from crossdino.cli.output import check_destinations, make_console, write_json
from crossdino.config import close_matches, to_dict
from crossdino.errors import InputError

# Columns of `crossdino recipes` that go first where the terminal is narrow.
_LESS_NEEDED = ("input", "backbone", "fusion", "loss", "beta", "epochs", "table")


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
    """List the recipes with the paper's numbers, or print one as a file for `--config`."""
    from crossdino.benchmarks import BENCHMARKS
    from crossdino.recipes import RECIPES, recipe

    if options.show is not None:
        import yaml

        if options.benchmark is not None or options.json is not None or options.markdown:
            raise InputError("--show prints one recipe: leave out --benchmark, --json and --markdown")
        print(yaml.safe_dump(to_dict(recipe(options.show)), sort_keys=False), end="")
        return 0
    if options.benchmark is not None and options.benchmark not in BENCHMARKS:
        hint = close_matches(options.benchmark, BENCHMARKS) or f"; choose one of {', '.join(BENCHMARKS)}"
        raise InputError(f"unknown benchmark '{options.benchmark}'{hint}")
    if options.json is not None and options.markdown:
        raise InputError("give either --json or --markdown")
    check_destinations(options.json if options.json != "-" else None)
    chosen = [
        described
        for described in map(_describe, RECIPES)
        if options.benchmark is None or described["benchmark"] == options.benchmark
    ]
    if options.json == "-":
        print(json.dumps(chosen, indent=2))
    elif options.json is not None:
        write_json(Path(options.json), chosen)
    if options.json is not None:
        return 0
    for _, group in groupby(chosen, key=lambda described: described["benchmark"]):
        title, rows = _recipe_table(list(group))
        if options.markdown:
            marked = [rows[0], ["---"] * len(rows[0]), *([f"`{cells[0]}`", *cells[1:]] for cells in rows[1:])]
            print(f"### {title}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in marked))
        else:
            _print_recipes(title, rows)
    return 0


def _print_recipes(title: str, rows: list[list[str]]) -> None:
    """One data set's recipes for the terminal; where that is narrow, without the columns that a name tells anyway."""
    from rich import box
    from rich.table import Table

    console = make_console()
    widths = {header: max(len(cells[at]) for cells in rows) for at, header in enumerate(rows[0])}
    left_out: list[str] = []
    for header in _LESS_NEEDED:
        if sum(widths.values()) + 2 * len(widths) + 1 > console.width:  # two spaces between columns, and the edges
            left_out.append(header)
            del widths[header]
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in widths:
        number = header not in ("recipe", "backbone", "fusion", "loss", "table")
        table.add_column(header, justify="right" if number else "left", no_wrap=header == "recipe")
    for cells in rows[1:]:
        table.add_row(*(cell for cell, header in zip(cells, rows[0], strict=True) if header in widths))
    console.print(table)
    if left_out:
        console.print(f"not shown in {console.width} columns: {', '.join(left_out)}\n", soft_wrap=True)


def _describe(name: str) -> dict[str, Any]:
    """A recipe as JSON values: what it trains, and every row that the paper has of it."""
    from crossdino.benchmarks import BENCHMARKS
    from crossdino.paper import paper_rows
    from crossdino.recipes import RECIPES, recipe

    config, rows = recipe(name), paper_rows(name)
    benchmark = BENCHMARKS[rows[0].benchmark] if rows else None
    boost = config.loss.classification == "boost"
    return {
        "recipe": name,
        "summary": (RECIPES[name].__doc__ or "").strip().splitlines()[0],
        "benchmark": benchmark.name if benchmark else None,
        "data_set": benchmark.title if benchmark else None,
        "split": benchmark.paper_split if benchmark else None,
        "protocol": benchmark.protocol if benchmark else None,
        "backbone": config.model.backbone,
        "fusion": config.model.fusion,
        "loss": config.loss.classification,
        "beta": config.loss.beta if boost else None,
        "epochs": config.training.epochs,
        "batch_size": config.training.batch_size,
        "test_short_side": config.data.test_short_side,
        "test_long_side": config.data.test_long_side,
        "num_select": config.evaluation.num_select,
        "max_detections": config.evaluation.max_detections,
        "paper": [dataclasses.asdict(row) for row in rows],
    }


def _recipe_table(group: list[dict[str, Any]]) -> tuple[str, list[list[str]]]:
    """The recipes of one data set as a title and rows of cells, the header first.

    The metrics are AP and that of the smallest objects (of WiderPerson the miss rate), as the paper prints them; in
    brackets stands what another of its tables prints for the same model.
    """
    first = group[0]
    printed = first["paper"][0]["metrics"] if first["paper"] else {}
    metrics = [name for name in printed if name in ("AP", "mMR", "AP_S", "AP_vt", "AP_eS")]
    digits = 2 if "mMR" in metrics else 1
    rows = [["recipe", "backbone", "fusion", "loss", "beta", "epochs", "input", "table", *metrics]]
    for described in group:
        found = [list(dict.fromkeys(row["metrics"][metric] for row in described["paper"])) for metric in metrics]
        texts = [[f"{value:.{digits}f}" for value in values] for values in found]
        rows.append(
            [
                described["recipe"],
                described["backbone"],
                described["fusion"],
                described["loss"],
                "" if described["beta"] is None else f"{described['beta']:g}",
                str(described["epochs"]),
                f"{described['test_short_side']} x {described['test_long_side']}",
                ", ".join(row["table"] for row in described["paper"]) or "-",
                *(" ".join([one, *(f"({other})" for other in others)]) for one, *others in texts),
            ]
        )
    if first["benchmark"] is None:
        return "Ours, not from the paper", rows
    return f"{first['data_set']}, measured on {first['split']}; the paper's numbers, in per cent", rows
