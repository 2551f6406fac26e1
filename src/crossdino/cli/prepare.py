"""`crossdino prepare`: a benchmark's raw data into COCO files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from crossdino.benchmarks import BENCHMARKS
from crossdino.cli.output import make_console, num_cores
from crossdino.cli.values import positive

if TYPE_CHECKING:
    from rich.console import Console

    from crossdino.preparation import Prepared

_SOURCES = {
    "coco": "the folder with annotations/, train2017/ and val2017/",
    "visdrone": "the folder with VisDrone2019-DET-train, -val and -test-dev, or one of these",
    "aitod": "the folder with annotations/aitod_*_v1.json (or small_*_v1_1.0.json) and the images",
    "sodad": "the folder with SODA-D's Annotations and Images",
    "widerperson": "the folder with Annotations/, Images/, train.txt and val.txt",
}


def add_prepare_options(parser: argparse.ArgumentParser) -> None:
    """A sub-command for each benchmark, with its own options."""
    # Their rules are known to modules that import torch, so they are asked for when a benchmark is chosen.
    kind: Any = type(parser)

    class _Filled(kind):
        def parse_known_args(self, args: Any = None, namespace: Any = None, **keywords: Any) -> Any:
            if "--output" not in self._option_string_actions:
                _add_options(self, self.get_default("benchmark"))
            return super().parse_known_args(args, namespace, **keywords)

    names = parser.add_subparsers(dest="benchmark", required=True, metavar="NAME", parser_class=_Filled)
    for name, benchmark in BENCHMARKS.items():
        text = f"Turn {benchmark.title} as it is downloaded into COCO files; the defaults are the literature's rules."
        made = names.add_parser(name, help=benchmark.title, description=text, allow_abbrev=False)
        made.set_defaults(benchmark=name)


def run_prepare(options: argparse.Namespace) -> int:
    """Prepare one benchmark and show what was found beside what is published."""
    from crossdino.preparation import options_of, prepare_benchmark

    console = make_console()
    with _going_on(), _Bars(console) as bars:
        prepared = prepare_benchmark(
            options.benchmark,
            options.source,
            options.output,
            options={rule.name: getattr(options, f"rule_{rule.name}") for rule in options_of(options.benchmark)},
            splits=[name.strip() for name in options.splits.split(",")] if options.splits else (),
            images="none" if options.without_images else options.images,
            num_processes=options.processes or num_cores(),
            on_progress=bars.show,
        )
    _print(prepared, console)
    return 0


@contextmanager
def _going_on() -> Iterator[None]:
    """Ctrl-C is no loss here, and says so."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on from here") from None


def _add_options(parser: argparse.ArgumentParser, name: str) -> None:
    from crossdino.preparation import options_of

    parser.add_argument("source", metavar="SOURCE", help=_SOURCES[name])
    parser.add_argument("--output", metavar="DIR", required=True, help="a new folder for annotations and images")
    known = ", ".join(BENCHMARKS[name].splits)
    parser.add_argument("--splits", metavar="NAME,...", help=f"of {known} (all that are found)")
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--images", choices=("link", "copy"), default="link", help="link to the source's images, or copy them (link)"
    )
    place.add_argument(
        "--without-images", action="store_true", help="annotations only, enough to evaluate files of predictions"
    )
    parser.add_argument("--processes", type=positive, metavar="N", help="that work at the same time (the cores)")
    known_rules = options_of(name)
    what = "What the literature does is the default." if known_rules else "There is nothing to choose."
    rules = parser.add_argument_group("rules", what)
    for rule in known_rules:
        default = ",".join(map(str, rule.default)) if isinstance(rule.default, tuple) else rule.default
        value: dict[str, Any] = {"type": rule.parse, "metavar": rule.metavar}
        value = {"choices": rule.choices} if rule.choices else value
        rules.add_argument(
            rule.flag,
            dest=f"rule_{rule.name}",
            default=rule.default,
            help=f"{rule.help} ({default})".replace("%", "%%"),
            **value,
        )
    parser.set_defaults(known_options=list(parser._option_string_actions))


def _print(prepared: Prepared, console: Console) -> None:
    """The table, and below it what the reader has to know."""
    from rich.table import Table

    from crossdino.preparation.folders import typed

    description, output = prepared.description, prepared.output
    benchmark = BENCHMARKS[description["benchmark"]]
    roles: dict[str, list[str]] = {}
    for role, split in description["roles"].items():
        roles.setdefault(split, []).append(role)
    table = Table(title=f"{benchmark.title} in {output}")
    for column in ("split", "role", "images", "objects", "ignored", "dropped", "published"):
        table.add_column(column, justify="right" if column in ("images", "objects", "ignored") else "left")
    notes = list(prepared.notes)
    for split, entry in description["splits"].items():
        dropped = "\n".join(f"{number} {reason}" for reason, number in entry["dropped"].items())
        numbers = [f"{entry[key]}" for key in ("num_images", "num_objects", "num_ignored")]
        published = "\n".join(_compare(check, console) for check in entry["checks"])
        table.add_row(split, ", ".join(roles.get(split, [])), *numbers, dropped, published)
        notes += [f"{split}: {note}" for note in entry["notes"]]
    if description["total_checks"]:
        table.add_section()
        published = "\n".join(_compare(check, console) for check in description["total_checks"])
        table.add_row("together", "", "", "", "", "", published)
    console.print(table)
    notes += _differing(description)
    rules = ", ".join(f"{name} {typed(value)}" for name, value in description["options"].items())
    for line in (
        *notes,
        f"rules: {rules}" if rules else "",
        f"{output} is there already: nothing was done" if prepared.was_there else f"{output} is finished",
        f"recipes: crossdino recipes --benchmark {benchmark.name}; input in the literature: {benchmark.input}",
    ):
        if line:
            console.print(line, soft_wrap=True, markup=False)


def _compare(check: dict[str, Any], console: Console) -> str:
    """`343205 objects` with a tick, or with what there is more or less."""
    what, found, published = check["what"], check["found"], check["published"]
    if published is None:
        return f"{what}: no number known ({found} found)"
    if found == published:
        return f"{published} {what} {'✓' if console.encoding.startswith('utf') else 'ok'}"
    return f"{published} {what}, found {found} ({found - published:+d})"


def _differing(description: dict[str, Any]) -> Iterator[str]:
    """Notes where numbers differ: no mistake in a part of the data set, but nothing to compare with the literature."""
    parts = {split: entry["checks"] for split, entry in description["splits"].items()}
    of_source: dict[str, list[str]] = {}
    for split, checks in {**parts, "together": description["total_checks"]}.items():
        differing = [check for check in checks if check["published"] not in (None, check["found"])]
        numbers = ", ".join(f"{check['found']} instead of {check['published']} {check['what']}" for check in differing)
        if differing:
            of_source.setdefault(differing[0]["source"], []).append(f"{split} has {numbers}")
    for source, lines in of_source.items():
        yield f"not the published numbers: {'; '.join(lines)} ({source})"
    if of_source:
        yield "what is measured on data with other numbers than these is not comparable with the literature"


class _Bars:
    """A progress bar for each piece of work on a terminal, nothing in a file."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, Any] = {}

    def show(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()
