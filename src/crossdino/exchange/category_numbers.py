"""Which number a benchmark's own text files give to the categories of a COCO file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from crossdino.benchmarks import VISDRONE_CLASSES
from crossdino.errors import InputError


def visdrone_numbers(categories: Sequence[Mapping[str, Any]], name: str) -> dict[int, int]:
    """VisDrone's numbers (1 pedestrian ... 10 motor) of the categories of a COCO file.

    Names decide, whatever the ids are and however they are written (`Awning_Tricycle`). A file whose names are all
    unknown, such as numbers or another language, is taken to have VisDrone's ids.

    Args:
        categories: COCO's list, entries with `id` and `name`.
        name: of the file, for messages.

    Returns:
        Category id -> 1 ... 10, each number once.

    Raises:
        InputError: a category is none of VisDrone's, or two are the same.
    """
    number_of = {_plain(known): number for number, known in enumerate(VISDRONE_CLASSES, start=1)}
    numbers = {entry["id"]: number_of.get(_plain(str(entry.get("name", "")))) for entry in categories}
    if all(number is None for number in numbers.values()):
        numbers = {identity: identity if 1 <= identity <= len(VISDRONE_CLASSES) else None for identity in numbers}
    found: dict[int, int] = {}
    for entry in categories:
        number = numbers[entry["id"]]
        if number is None or number in found.values():
            what = "is none of VisDrone's classes" if number is None else "is a VisDrone class for the second time"
            raise InputError(
                f"{name}: category {entry['id']} ({entry.get('name')}) {what}: name the categories "
                f"{', '.join(VISDRONE_CLASSES)}"
            )
        found[entry["id"]] = number
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
