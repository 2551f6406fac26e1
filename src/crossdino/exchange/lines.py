"""The lines of the toolkits' text files: one detection as text, and text as one detection.

VisDrone (README of VisDrone/VisDrone2018-DET-toolkit, and the results format at aiskyeye.com): `x,y,width,height,score,
category,truncation,occlusion`, the last two -1 in results; an empty file where nothing was found.

WiderPerson: no description of a results file could be found. Ours is the one of the data set's annotations with the
score added: the number of detections, then `class x1 y1 x2 y2 score` in each line, both corners inside the box.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from crossdino.errors import InputError

PEDESTRIAN = 1


@dataclass(frozen=True)
class Line:
    """One detection of a text file.

    Attributes:
        box_xywh: pixels.
        score: as the file has it.
        number: the toolkit's number of the class.
        place: where it was read, counted from 1; 0 if it was not.
    """

    box_xywh: tuple[float, float, float, float]
    score: float
    number: int
    place: int = 0


@dataclass(frozen=True)
class TextFormat:
    """How a toolkit writes the detections of an image.

    Attributes:
        keeps_extension: whether the file of `a.jpg` is `a.jpg.txt`, and not `a.txt`.
        parse: lines of a file and its name -> detections; raises InputError that names the line.
        dump: detections, best first -> text of the file.
    """

    keeps_extension: bool
    parse: Callable[[Sequence[str], str], list[Line]]
    dump: Callable[[Sequence[Line]], str]


def parse_visdrone(lines: Sequence[str], name: str) -> list[Line]:
    """Read a VisDrone result file; commas or blanks between the fields, commas at the end are let pass.

    Raises:
        InputError: a line is not of the format.
    """
    found: list[Line] = []
    for place, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        where = f"{name}, line {place}"
        fields = _fields(text)
        if len(fields) > 8:
            raise InputError(
                f"{where} has {len(fields)} fields, and detections in images have 8: x, y, width, height, score, "
                "category, -1, -1 (10 fields are VisDrone's format for videos)"
            )
        if len(fields) < 6:
            raise InputError(
                f"{where} has {len(fields)} fields ({text.strip()!r:.60}): give x, y, width, height, score, category, "
                "-1, -1"
            )
        x, y, width, height, score, number = _numbers(fields[:6], where)
        if width < 0 or height < 0:
            raise InputError(f"{where} has width {width:g} and height {height:g}: boxes are x, y, width, height")
        found.append(Line((x, y, width, height), score, _whole(number, where), place))
    return found


def dump_visdrone(found: Sequence[Line]) -> str:
    """The text of a VisDrone result file; numbers in full precision."""
    rows = (",".join(map(repr, (*line.box_xywh, line.score, line.number, -1, -1))) for line in found)
    return "".join(f"{row}\n" for row in rows)


def parse_widerperson(lines: Sequence[str], name: str) -> list[Line]:
    """Read a WiderPerson file of detections, with or without the count in its first line.

    Raises:
        InputError: a line is not of the format, or the count is wrong.
    """
    found: list[Line] = []
    count: int | None = None
    for place, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        where = f"{name}, line {place}"
        fields = _fields(text)
        if len(fields) == 1 and not found and count is None:
            count = _whole(_numbers(fields, where)[0], where)
            continue
        if len(fields) != 6:
            what = " (5 are an annotation)" if len(fields) == 5 else ""
            raise InputError(f"{where} has {len(fields)} fields{what}: give class x1 y1 x2 y2 score")
        number, left, top, right, bottom, score = _numbers(fields, where)
        width, height = right - left + 1, bottom - top + 1
        if width < 0 or height < 0:
            raise InputError(f"{where} ends before it begins ({text.strip()!r:.60}): give class x1 y1 x2 y2 score")
        found.append(Line((left, top, width, height), score, _whole(number, where), place))
    if count is not None and count != len(found):
        raise InputError(f"{name}, line 1 says {count} detections, but there are {len(found)}: write the file again")
    return found


def dump_widerperson(found: Sequence[Line]) -> str:
    """The text of a WiderPerson file of detections; numbers in full precision."""
    rows = [f"{len(found)}\n"]
    for line in found:
        x, y, width, height = line.box_xywh
        rows.append(f"{line.number} {x!r} {y!r} {x + width - 1!r} {y + height - 1!r} {line.score!r}\n")
    return "".join(rows)


def _fields(text: str) -> list[str]:
    """The fields of a line, which commas or else blanks part."""
    if "," not in text:
        return text.split()
    fields = [field.strip() for field in text.split(",")]
    while fields and not fields[-1]:
        fields.pop()
    return fields


def _numbers(fields: Sequence[str], where: str) -> list[float]:
    numbers = []
    for field in fields:
        try:
            number = float(field)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"{where} has {field!r} where a number should be")
        numbers.append(number)
    return numbers


def _whole(number: float, where: str) -> int:
    if not number.is_integer():
        raise InputError(f"{where} has {number:g} where a whole number should be (the class, or the count)")
    return int(number)


VISDRONE = TextFormat(False, parse_visdrone, dump_visdrone)
WIDERPERSON = TextFormat(True, parse_widerperson, dump_widerperson)
