"""Write the tables of a Markdown page from the CSV files of the benchmarks, so that nobody types a number.

    python -m benchmarks.tables docs/performance.md network.csv peers.csv ...

In the page, what stands between `<!-- table: NAME -->` and `<!-- end -->` is replaced. NAME is the file's name without
`.csv`; that is the whole file where it is one plain table. In a file of several tables (those of
`interleaved.Report`) it is followed by a colon and a table's title, or a pattern with `*` and `?` for several, each of
which then gets its title; `NAME: machine` is what the tables were measured on. Blocks that no file has anything for
stay as they are: one part of the page can be made anew without the others.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

_BLOCK = re.compile(r"^(<!-- table: (.+?) -->\n)(.*?)^(<!-- end -->)$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"^\s*<!--\s*(?:table\b.*|end\s*)-->", re.MULTILINE)
_FIRST_COLUMN, NOTE_COLUMN = "table", "note"
_MACHINE = "machine"
Row = dict[str, str]


@dataclass(frozen=True)
class Results:
    """A CSV file.

    Attributes:
        machine: what it was measured on, by key; empty where the file does not say.
        tables: rows by title, in order; of a file of one plain table the title is empty.
    """

    machine: dict[str, str]
    tables: dict[str, list[Row]]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `interleaved.Report` wrote, or any CSV file with a row of headers."""
        with path.open(newline="", encoding="utf-8") as file:
            lines = file.readlines()
        head = [line[2:].rstrip("\n") for line in lines if line.startswith("# ")]
        machine = dict(line.split(": ", 1) for line in head if ": " in line)
        tables: dict[str, list[Row]] = {}
        for row in csv.DictReader(line for line in lines if not line.startswith("# ")):
            tables.setdefault(row.pop(_FIRST_COLUMN, ""), []).append(row)
        return cls(machine, tables)

    def markdown(self, pattern: str) -> str | None:
        """The tables whose titles match, with their titles where there can be several; None where none does."""
        if pattern == _MACHINE:
            return "".join(f"- {key}: {value}\n" for key, value in self.machine.items())
        found = {title: rows for title, rows in self.tables.items() if _matches(title, pattern)}
        if not found:
            return None
        several = any(letter in pattern for letter in "*?[")
        parts = [
            f"**{title}**\n\n{to_markdown(rows)}" if several else to_markdown(rows) for title, rows in found.items()
        ]
        return "\n".join(parts)


def _matches(title: str, pattern: str) -> bool:
    return title == pattern or fnmatchcase(title, pattern)


def to_markdown(rows: Sequence[Row]) -> str:
    """A table of rows of the same columns; empty columns are left out, a note goes below.

    Columns `... target` and `... reached` are taken into the one before them: `0.41 (target 0.4, missed)`.
    """
    columns = [c for c in rows[0] if c != NOTE_COLUMN and any(row[c] for row in rows)]
    shown = [c for c in columns if not c.endswith(("target", "reached"))]
    numeric = {c for c in shown if any(_is_number(row[c]) for row in rows)}
    lines = [_line(shown), "|" + "|".join("---:" if c in numeric else "---" for c in shown) + "|"]
    for row in rows:
        cells: list[list[str]] = []
        for column in columns:
            if column in shown:
                cells.append([_rounded(row[column], 4 if column.startswith("AP") else 3).strip()])
            elif row[column]:
                cells[-1].append(_judgement(column, row[column]))
        lines.append(_line([f"{cell} ({', '.join(said)})" if said else cell for cell, *said in cells]))
    notes = dict.fromkeys(row[NOTE_COLUMN] for row in rows if row.get(NOTE_COLUMN))
    return "\n".join([*lines, *(f"\n{note}" for note in notes)]) + "\n"


def _judgement(column: str, value: str) -> str:
    """What a column `... target` or `... reached` says of the number before it."""
    if column.endswith("target"):
        return f"target {_rounded(value)}"
    return "reached" if value == "yes" else "missed"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _rounded(text: str, digits: int = 3) -> str:
    """So many digits, or all of a whole number."""
    if not _is_number(text) or re.fullmatch(r"-?\d+", text):
        return text
    number = float(text)
    return f"{number:.0f}" if abs(number) >= 10**digits else f"{number:.{digits}g}"


def fill(page: str, results: dict[str, Results]) -> tuple[str, list[str], list[str]]:
    """Replace the blocks of a page.

    Args:
        page: Markdown.
        results: by name, see the file's header.

    Returns:
        The new page; names of blocks that nothing was given for, which are as they were; tables (`NAME: title`) that no
        block shows.

    Raises:
        ValueError: a marker is alone.
    """
    if len(_MARKER.findall(page)) != 2 * len(_BLOCK.findall(page)):
        raise ValueError("a `<!-- table: NAME -->` has no `<!-- end -->` on a line of its own, or the other way round")
    missing: list[str] = []
    patterns: list[str] = []

    def block(match: re.Match[str]) -> str:
        name, _, pattern = match[2].partition(": ")
        text = results[name].markdown(pattern) if name in results else None
        if text is None:
            missing.append(match[2])
            return match[0]
        patterns.append(f"{name}: {pattern}")
        return f"{match[1]}\n{text}\n{match[4]}"

    page = _BLOCK.sub(block, page)
    every = [f"{name}: {title}" for name, one in results.items() for title in one.tables]
    unused = [one for one in every if not any(_matches(one, pattern) for pattern in patterns)]
    return page, missing, unused


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("page", type=Path, help="a Markdown file with the markers; written anew")
    parser.add_argument("csv", type=Path, nargs="+", help="what the commands wrote with --csv")
    options = parser.parse_args(arguments)
    twice = {path.stem for path in options.csv if [one.stem for one in options.csv].count(path.stem) > 1}
    if twice:
        parser.error(f"two files are called {sorted(twice)[0]}.csv: the page could not tell them apart")
    try:
        results = {path.stem: Results.read(path) for path in options.csv}
        page, missing, unused = fill(options.page.read_text(encoding="utf-8"), results)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    options.page.write_text(page, encoding="utf-8")
    for text, names in (("not given, left as it is", missing), ("in no block of the page", unused)):
        for name in names:
            print(f"{text}: {name}", file=sys.stderr)


if __name__ == "__main__":
    main()
