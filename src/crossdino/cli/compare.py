"""`crossdino compare`: is one file of detections better than another, or was it the choice of test images?"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdino.cli.measured import chosen_protocol, find_measured, is_one_file, read_detections
from crossdino.cli.output import check_destinations, make_console, num_cores, write_text
from crossdino.cli.values import not_negative, positive, share
from crossdino.config import close_matches
from crossdino.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from crossdino.evaluation.comparison import Comparison, Estimate


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """All options of `crossdino compare`."""
    add = parser.add_argument
    add("--ground-truth", metavar="DATA", required=True, help="COCO annotations, or a data set")
    add("--split", help="which split of a data set (val)")
    add(
        "--predictions",
        metavar="FILE",
        nargs="+",
        required=True,
        help="detections: two files A B to compare, or one for its intervals; COCO results, or VisDrone's text files "
        "(folder or zip)",
    )
    add("--names", metavar="NAME", nargs="+", help="what to call the files (their names)")
    add("--protocol", help="coco, aitod, visdrone, sodad or widerperson (that of the data, if `prepare` made it)")
    add("--patches", metavar="JSON", help="the detections are of SODA-D's patches: their annotation file")
    add("--max-detections", type=positive, help="per image and class, without a protocol (100)")
    add("--size-bands", metavar="NAME=LOW-HIGH,...", help="bands of sqrt(area) in pixels, without a protocol")
    add("--resamples", type=positive, default=1000, help="of the images (1000)")
    add("--confidence", type=share, default=0.95, help="of the intervals (0.95)")
    add("--seed", type=not_negative, default=0, help="of the resamples (0)")
    add("--workers", type=positive, metavar="N", help="processes (the cores)")
    add("--json", metavar="JSON", help="write all numbers")
    add("--figure", metavar="PNG", help="draw the numbers and differences with their intervals")


def run_compare(options: argparse.Namespace) -> int:
    """Resample, print the table and write what is asked for."""
    check_destinations(options.json, options.figure)
    _check_files(options)
    from crossdino.evaluation.average_precision import parse_size_bands
    from crossdino.evaluation.comparison import compare_detections, names_of_files
    from crossdino.provenance import provenance

    options.images = None
    measured = find_measured(options)
    own = options.max_detections is not None or options.size_bands is not None
    protocol = chosen_protocol(options, measured)
    if protocol != "sodad" and options.patches is None:
        measured = measured.as_listed  # only SODA-D's protocol puts patches together
    if options.protocol is not None and own:
        raise InputError("--max-detections and --size-bands are fixed by --protocol: leave them or it out")
    console = make_console()
    predictions = [read_detections(path, measured, console) for path in options.predictions]
    with _Bar(console) as bar:
        result = compare_detections(
            measured.truth if measured.path is None else measured.path,
            predictions,
            names=options.names or names_of_files([Path(path) for path in options.predictions]),
            protocol=protocol,
            patches=measured.patches,
            max_detections=options.max_detections or 100,
            size_bands=parse_size_bands(options.size_bands) if options.size_bands else None,
            num_resamples=options.resamples,
            confidence=options.confidence,
            seed=options.seed,
            num_processes=options.workers or num_cores(),
            on_progress=bar.show,
        )
    if options.json is not None:
        origin = provenance(
            ground_truth=options.ground_truth, split=measured.official_split, benchmark=measured.benchmark
        )
        content = {**result.to_dict(), "provenance": {**origin, "predictions": list(options.predictions)}}
        write_text(Path(options.json), json.dumps(content, indent=2, allow_nan=False) + "\n")
    if options.figure is not None:
        from crossdino.visualization.comparison import draw_comparison
        from crossdino.writing import written_whole

        with written_whole(Path(options.figure)) as partial:
            draw_comparison(result, partial)
    console.print(comparison_table(result))
    settings = result.settings
    console.print(
        f"{result.num_images} images, {result.num_objects} objects; {settings['resamples']} resamples of the images "
        f"(seed {settings['seed']}), {100 * settings['confidence']:g} % intervals; all numbers in per cent.\n"
        "The intervals tell what other test images would change, not what another training would.",
        soft_wrap=True,
        markup=False,
    )
    for line in result.notes:
        console.print(f"note: {line}", soft_wrap=True, markup=False)
    return 0


def _check_files(options: argparse.Namespace) -> None:
    """Find mistakes before anything takes time."""
    from crossdino.evaluation.measures import COMPARABLE

    if options.protocol is not None and options.protocol not in COMPARABLE:
        hint = close_matches(options.protocol, COMPARABLE) or f"; choose one of {', '.join(COMPARABLE)}"
        raise InputError(f"protocol {options.protocol!r} cannot be resampled by images{hint}")
    if len(options.predictions) > 2:
        raise InputError(f"--predictions has {len(options.predictions)} files: give one, or two to compare")
    if options.names is not None and len(options.names) != len(options.predictions):
        raise InputError(
            f"--names has {len(options.names)} names for {len(options.predictions)} files: give one name for each"
        )
    if options.resamples < 100:
        raise InputError(f"--resamples {options.resamples} is too few for an interval: give at least 100, better 1000")
    if options.confidence >= 1:
        raise InputError("--confidence is 1: give a share below 1, such as 0.95")
    if options.split is not None and Path(options.ground_truth).is_file() and is_one_file(options.ground_truth):
        raise InputError(f"--split goes with a data set that has splits; {options.ground_truth} is one COCO file")
    options.split = options.split or "val"
    for path in options.predictions:
        if not Path(path).exists():
            raise InputError(f"--predictions {path} is not there: give a COCO results file, or a folder of text files")
    paths = [Path(path).resolve() for path in options.predictions]
    if len(set(paths)) < len(paths):
        raise InputError(f"--predictions names {options.predictions[0]} twice: give two different files")
    # As `--names` goes with the order of the files: the name of one file for the other is most likely a mistake.
    if options.names is not None and len(paths) == 2 and options.names == [path.stem for path in reversed(paths)]:
        raise InputError(
            f"--names {' '.join(options.names)} are the files' own names in the other order: "
            f"write --names {' '.join(reversed(options.names))}, or leave --names out"
        )
    for path in filter(None, (options.json, options.figure)):
        if Path(path).resolve() in (*paths, Path(options.ground_truth).resolve()):
            raise InputError(f"cannot write {path}: it is one of the files that are read; name another")


def comparison_table(result: Comparison) -> Table:
    """The numbers in per cent with their intervals; a difference that is clear of zero stands out."""
    from rich.markup import escape
    from rich.table import Table

    from crossdino.evaluation.comparison import clear_side, p_text
    from crossdino.evaluation.measures import LOWER_IS_BETTER

    table = Table(title=f"protocol {result.protocol}" if result.protocol else None)
    table.add_column("metric")
    names = [escape(name) for name in result.names]
    for name in names:
        table.add_column(name, justify="right")
        table.add_column("interval", justify="right", style="dim")
    if result.differences:
        table.add_column(f"{names[1]} - {names[0]}", justify="right")
        for header in ("interval", "p", f"{names[1]} better"):
            table.add_column(header, justify="right")
    for metric, estimates in result.estimates.items():
        cells = [cell for estimate in estimates for cell in (_percent(estimate.value), _range(estimate))]
        difference = result.differences.get(metric)
        if difference is not None:
            style = {1: "bold green", -1: "bold red", 0: ""}[clear_side(metric, difference)]
            of_difference = [
                _percent(difference.value, signed=True),
                _range(difference, signed=True),
                "-" if math.isnan(difference.p_value) else p_text(difference.p_value),
                "-" if math.isnan(difference.share_better) else f"{100 * difference.share_better:.0f} %",
            ]
            cells += [f"[{style}]{cell}[/]" if style else cell for cell in of_difference]
        table.add_row(escape(f"{metric} (lower is better)" if metric in LOWER_IS_BETTER else metric), *cells)
    return table


def _percent(value: float, *, signed: bool = False) -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:{'+' if signed else ''}.2f}"


def _range(estimate: Estimate, *, signed: bool = False) -> str:
    if math.isnan(estimate.low):
        return "-"
    return f"{_percent(estimate.low, signed=signed)} to {_percent(estimate.high, signed=signed)}"


class _Bar:
    """A progress bar on a terminal, nothing in a file."""

    def __init__(self, console: Console) -> None:
        from rich.progress import Progress

        self._progress = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("reading and matching", total=None)

    def show(self, done: int, total: int) -> None:
        self._progress.update(self._task, description="resampling", completed=done, total=total)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()
