"""`crossdino report`: trainings and evaluations as a table in the paper's layout, beside the paper's numbers."""

from __future__ import annotations

import argparse
from pathlib import Path

from crossdino.cli.output import check_destinations, make_console, write_text
from crossdino.errors import InputError

_FORMATS = {".md": "markdown", ".csv": "csv", ".tex": "latex"}


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """All options of `crossdino report`."""
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a training folder, or a JSON file of `crossdino evaluate --json`"
    )
    parser.add_argument(
        "--format", choices=("table", *_FORMATS.values()), help="(that of --output's name, else a table)"
    )
    parser.add_argument("--output", metavar="FILE", help="write it there instead of printing it")
    parser.add_argument("--metrics", metavar="NAME,...", help="which columns (average precisions)")
    parser.add_argument(
        "--costs",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="count parameters and multiply-adds of the models (yes; takes a second each)",
    )


def run_report(options: argparse.Namespace) -> int:
    """Read the runs and write the table."""
    check_destinations(options.output)
    suffix = Path(options.output).suffix.lower() if options.output is not None else ""
    form = options.format or _FORMATS.get(suffix, "table")
    from crossdino.report import chosen_metrics, costs, read_run
    from crossdino.report_tables import latex, lay_out, markdown, terminal_tables, tidy_csv

    if options.output is not None and any(
        Path(options.output).resolve() == Path(run).resolve() for run in options.runs
    ):
        raise InputError(f"cannot write {options.output}: it is one of the runs; name another file")
    # A file that is named twice, or lies in a folder that is named too, is one run.
    runs = list({run.source.resolve(): run for path in options.runs for run in read_run(path)}.values())
    wanted = [name.strip() for name in options.metrics.split(",")] if options.metrics is not None else None
    metrics = chosen_metrics(runs, wanted)
    counted = {run.source: costs(run) for run in runs} if options.costs else {}
    known = {source: cost for source, cost in counted.items() if cost is not None}
    layout = lay_out(runs, metrics, known)
    if form == "table":
        console = make_console()
        if options.output is not None:
            from io import StringIO

            from rich.console import Console

            console = Console(file=StringIO(), width=240, highlight=False)
        console.print(*terminal_tables(layout, console.width), sep="\n")
        for number, note in enumerate(layout.footnotes, start=1):
            console.print(f"[{number}] {note}", soft_wrap=True, markup=False)
        if options.output is None:
            return 0
        text = console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO above
    else:
        text = tidy_csv(runs, metrics, known) if form == "csv" else {"markdown": markdown, "latex": latex}[form](layout)
    if options.output is not None:
        write_text(Path(options.output), text)
    else:
        print(text, end="")
    return 0
