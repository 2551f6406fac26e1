"""The layouts of a report: for the terminal, Markdown, LaTeX (as the paper's tables), and tidy CSV for programs."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crossdino.benchmarks import BENCHMARKS
from crossdino.evaluation.measures import LOWER_IS_BETTER
from crossdino.report import Run

if TYPE_CHECKING:
    from rich.table import Table

# Characters that names and other texts may be folded to.
_NARROW = 20

Costs = Mapping[Path, tuple[float, float]]

_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what stands in it.
        bold: whether it is the best of its kind.
        marks: numbers of footnotes.
        number: whether it is set to the right.
    """

    text: str = ""
    bold: bool = False
    marks: tuple[int, ...] = ()
    number: bool = False


@dataclass(frozen=True)
class Layout:
    """A report without its form.

    Attributes:
        headers: of the columns.
        groups: for each run its rows: ours, and where there is one the paper's and the difference.
        footnotes: number 1 first.
    """

    headers: tuple[str, ...]
    groups: tuple[tuple[tuple[Cell, ...], ...], ...]
    footnotes: tuple[str, ...]


def lay_out(runs: Sequence[Run], metrics: Sequence[str], costs: Costs) -> Layout:
    """Arrange runs as the paper's tables do.

    Args:
        runs: the rows.
        metrics: the columns of numbers.
        costs: parameters in millions and multiply-adds in billions by the run's source.
    """
    footnotes: list[str] = []
    best = _best(runs, metrics)
    headers = ("Model", "Backbone", "Epochs", *metrics, "Params (M)", "GFLOPs")
    headers += ("Protocol", "Split", "Input", "Select / caps", "Revision")
    groups = []
    names = _names(runs)
    for position, run in enumerate(runs):
        marks = []
        for note in run.notes:
            if note not in footnotes:
                footnotes.append(note)
            marks.append(footnotes.index(note) + 1)
        cost = costs.get(run.source)
        rows: list[tuple[Cell, ...]] = [
            (
                Cell(names[position], marks=tuple(marks)),
                Cell(run.backbone or "-"),
                _number(run.epochs, "g"),
                *(
                    Cell(_percent(run, run.metrics.get(metric)), (position, metric) in best, number=True)
                    for metric in metrics
                ),
                _number(cost and cost[0], ".1f"),
                _number(cost and cost[1], ".0f"),
                Cell(run.protocol or "-"),
                Cell(_split(run)),
                Cell(_input(run)),
                Cell(_caps(run)),
                Cell(_revision(run)),
            )
        ]
        paper = run.paper
        if paper is not None:
            benchmark = BENCHMARKS[paper.benchmark]
            differences = [run.difference(metric) for metric in metrics]
            rows.append(
                (
                    Cell(f"  paper, Table {paper.table}: {paper.model}"),
                    Cell(paper.backbone),
                    _number(paper.epochs, "g"),
                    *(Cell(_percent_of_paper(run, paper.metrics.get(metric)), number=True) for metric in metrics),
                    _number(paper.parameters_millions, "g"),
                    _number(paper.gflops, "g"),
                    Cell(benchmark.protocol),
                    Cell(f"{paper.benchmark} {benchmark.paper_split}"),
                    *(Cell("-") for _ in range(3)),
                )
            )
            rows.append(
                (
                    Cell("  difference"),
                    Cell(),
                    Cell(),
                    *(Cell("-" if one is None else f"{one:+.{_digits(run)}f}", number=True) for one in differences),
                    *(Cell() for _ in range(7)),
                )
            )
        groups.append(tuple(rows))
    used = [
        column
        for column, header in enumerate(headers)
        if header not in ("Backbone", "Params (M)", "GFLOPs")
        or any(row[column].text not in ("", "-") for rows in groups for row in rows)
    ]
    return Layout(
        tuple(headers[column] for column in used),
        tuple(tuple(tuple(row[column] for column in used) for row in rows) for rows in groups),
        tuple(footnotes),
    )


def terminal_tables(layout: Layout, width: int) -> list[Table]:
    """The report for the terminal: the numbers, then how they were measured; footnotes are to go below.

    Where the terminal is narrow, the numbers lose what is not measured to the second part, and then are divided.

    Args:
        layout: of the report.
        width: characters in a line.
    """
    begin = layout.headers.index("Protocol")
    numbers, conditions = list(range(begin)), [0, *range(begin, len(layout.headers))]
    for header in ("GFLOPs", "Params (M)", "Backbone", "Epochs"):
        if header in layout.headers and _width(layout, numbers) > width:
            column = layout.headers.index(header)
            numbers.remove(column)
            conditions.insert(1, column)
    return [
        _table(layout, part, of_numbers=columns is numbers)
        for columns in (numbers, conditions)
        for part in _divided(layout, columns, width)
    ]


def _divided(layout: Layout, columns: Sequence[int], width: int) -> list[list[int]]:
    """The columns in as many parts as fit into a line; each begins with the names."""
    parts = [[0]]
    for column in columns[1:]:
        if len(parts[-1]) > 1 and _width(layout, [*parts[-1], column]) > width:
            parts.append([0])
        parts[-1].append(column)
    return parts


def _width(layout: Layout, columns: Sequence[int]) -> int:
    """Characters that a table of these columns needs in a line."""
    return 1 + sum(3 + _least_width(layout, column) for column in columns)


def _least_width(layout: Layout, column: int) -> int:
    """Characters of a column; texts can be folded."""
    width = max(len(text) for text in (layout.headers[column], *(row[column].text for row in _rows(layout))))
    return width if _is_number_column(layout, column) else min(width, _NARROW)


def _table(layout: Layout, columns: Sequence[int], *, of_numbers: bool) -> Table:
    """Some columns of all rows; the differences and the footnotes' marks belong to the numbers."""
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in columns:
        right = _is_number_column(layout, column)
        table.add_column(
            layout.headers[column],
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=right,
            min_width=_least_width(layout, column),
        )
    for rows in layout.groups:
        shown = rows if of_numbers else rows[:2]
        for place, row in enumerate(shown):
            cells = []
            for cell in (row[column] for column in columns):
                text = escape(cell.text + "".join(f" [{mark}]" for mark in cell.marks if of_numbers))
                cells.append(f"[bold]{text}[/]" if cell.bold else text)
            table.add_row(*cells, style="dim" if place == 1 else None, end_section=place == len(shown) - 1)
    return table


def markdown(layout: Layout) -> str:
    """The report as a GitHub table, with its footnotes below."""

    def text_of(cell: Cell) -> str:
        text = _escaped_markdown(cell.text.strip())
        text = f"**{text}**" if cell.bold else text
        return text + (f" <sup>{', '.join(map(str, cell.marks))}</sup>" if cell.marks else "")

    lines = [
        f"| {' | '.join(map(_escaped_markdown, layout.headers))} |",
        "|" + "|".join("---:" if _is_number_column(layout, at) else "---" for at in range(len(layout.headers))) + "|",
    ]
    lines += [f"| {' | '.join(map(text_of, row))} |" for rows in layout.groups for row in rows]
    lines += ["", *(f"{number}. {_escaped_markdown(note)}" for number, note in enumerate(layout.footnotes, start=1))]
    return "\n".join(lines).rstrip() + "\n"


def latex(layout: Layout) -> str:
    """The report as a plain `tabular`, which needs no package, with its footnotes below."""

    def text_of(cell: Cell) -> str:
        text = _escaped_latex(cell.text.strip())
        # A hyphen would be too short for a minus.
        text = f"$-${text[1:]}" if cell.number and len(text) > 1 and text.startswith("-") else text
        text = rf"\textbf{{{text}}}" if cell.bold else text
        return text + (f"$^{{{','.join(map(str, cell.marks))}}}$" if cell.marks else "")

    kinds = "".join("r" if _is_number_column(layout, at) else "l" for at in range(len(layout.headers)))
    lines = [rf"\begin{{tabular}}{{{kinds}}}", r"\hline", " & ".join(map(_escaped_latex, layout.headers)) + r" \\"]
    for rows in layout.groups:
        lines += [r"\hline", *(" & ".join(map(text_of, row)) + r" \\" for row in rows)]
    lines += [r"\hline", r"\end{tabular}"]
    if layout.footnotes:
        notes = [f"$^{{{number}}}$ {_escaped_latex(note)}" for number, note in enumerate(layout.footnotes, start=1)]
        lines += ["", r"\smallskip\noindent", *(f"{note} \\\\" for note in notes[:-1]), notes[-1]]
    return "\n".join(lines) + "\n"


def tidy_csv(runs: Sequence[Run], metrics: Sequence[str], costs: Costs) -> str:
    """A row for each run and metric, in per cent with full precision; what is not known is empty."""
    headers = ["run", "model", "recipe", "backbone", "epochs", "metric", "ours", "paper", "difference", "paper_table"]
    headers += [
        "protocol",
        "benchmark",
        "split",
        "short_side",
        "long_side",
        "tile_size",
        "num_select",
        "max_detections",
    ]
    headers += ["revision", "training_revision", "parameters_millions", "gflops", "notes"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(headers)
    for run in runs:
        paper, cost = run.paper, costs.get(run.source)
        for metric in metrics:
            of_paper = paper.metrics.get(metric) if paper is not None else None
            if metric not in run.metrics and of_paper is None:
                continue
            writer.writerow(
                [
                    *(run.source, run.name, run.recipe, run.backbone, run.epochs, metric),
                    100 * run.metrics[metric] if metric in run.metrics else None,
                    of_paper,
                    run.difference(metric),
                    paper.table if paper is not None else None,
                    *(run.protocol, run.benchmark, run.split, *(run.input_px or (None, None)), run.tile_size),
                    *(run.num_select, " ".join(map(str, run.max_detections)), run.revision, run.training_revision),
                    *(cost or (None, None)),
                    "; ".join(run.notes),
                ]
            )
    return text.getvalue()


def _best(runs: Sequence[Run], metrics: Sequence[str]) -> set[tuple[int, str]]:
    """(position, metric) of the best numbers, as printed, among those that can be compared with each other."""
    best: set[tuple[int, str]] = set()
    for metric in metrics:
        kinds: dict[tuple[str | None, ...], list[int]] = {}
        for position, run in enumerate(runs):
            if metric in run.metrics:
                # Where it is not known on what a run was measured, it is compared with none.
                alone = (str(position),) if run.split is None else ()
                kinds.setdefault((run.protocol, run.benchmark, run.split, *alone), []).append(position)
        for positions in kinds.values():
            if len(positions) > 1:
                values = [round(100 * runs[at].metrics[metric], _digits(runs[at])) for at in positions]
                lower = metric in LOWER_IS_BETTER or metric.startswith("oLRP")
                top = min(values) if lower else max(values)
                best |= {(at, metric) for at, value in zip(positions, values, strict=True) if value == top}
    return best


def _names(runs: Sequence[Run]) -> list[str]:
    """What the runs are called: those of one name are told apart by their files."""
    ways = (lambda path: path.stem, lambda path: f"{path.parent.name}/{path.stem}", str)
    names = [run.name for run in runs]
    for position, run in enumerate(runs):
        alike = [other.source for other in runs if other.name == run.name]
        if len(alike) > 1:
            shown = next((way for way in ways if len({way(path) for path in alike}) == len(alike)), str)
            names[position] = f"{run.name} ({shown(run.source)})"
    return names


def _digits(run: Run) -> int:
    """The paper prints WiderPerson with two digits and all else with one."""
    return 2 if run.protocol == "widerperson" else 1


def _percent(run: Run, value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.{_digits(run)}f}"


def _percent_of_paper(run: Run, value: float | None) -> str:
    return "-" if value is None else f"{value:.{2 if run.paper and run.paper.benchmark == 'widerperson' else 1}f}"


def _number(value: float | None, form: str) -> Cell:
    return Cell("-" if value is None else f"{value:{form}}", number=True)


def _split(run: Run) -> str:
    return " ".join(filter(None, (run.benchmark, run.split))) or "-"


def _input(run: Run) -> str:
    tiles = f"tiles of {run.tile_size} px" if run.tile_size else ""
    size = f"{run.input_px[0]} x {run.input_px[1]}" if run.input_px else ""
    return ", ".join(filter(None, (size, tiles))) or "-"


def _caps(run: Run) -> str:
    caps = ", ".join(map(str, run.max_detections))
    return f"{run.num_select or '-'} / {caps or '-'}"


def _revision(run: Run) -> str:
    if run.training_revision and run.training_revision != (run.revision or "").rstrip("+"):
        return f"{run.revision or '-'} (trained {run.training_revision})"
    return run.revision or "-"


def _rows(layout: Layout) -> list[tuple[Cell, ...]]:
    return [row for rows in layout.groups for row in rows]


def _is_number_column(layout: Layout, column: int) -> bool:
    return any(row[column].number for row in _rows(layout))


def _escaped_markdown(text: str) -> str:
    for character in ("\\", "|", "*", "_", "`", "<", ">", "[", "]"):
        text = text.replace(character, f"\\{character}")
    return text


def _escaped_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
