"""What the readers of all formats have in common: names become labels, image sizes are settled, boxes are made fit.

A box is fit when it lies within its image and has a width and a height. Everything that is changed or left out on the
way there is listed in the data set's `Problems`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crossdino.data.check import ImageFacts
from crossdino.data.images import MISSING
from crossdino.data.index import CLIPPED, IGNORED_LABEL, OUTSIDE, SIZELESS, Done, ImageRecord, Problems
from crossdino.errors import InputError

# Files round coordinates; a box that leaves the image by less than this is clipped without being listed.
ROUNDING_PX = 0.5

REPEATED = "box given twice"


@dataclass(frozen=True)
class Classes:
    """The classes of a data set and what its own category ids mean.

    Attributes:
        names: the K names in the order of the labels.
        category_ids: the data set's id of each, for output.
        label_of: category id -> label, -1 for categories to ignore; ids of unwanted categories are absent.
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    label_of: Mapping[int, int]


def choose_classes(
    source: Path,
    name_of: Mapping[int, str],
    wanted: Sequence[str] | None,
    ignored: Collection[str],
    problems: Problems,
    absent_allowed: bool,
    uses: Mapping[Any, int] | None = None,
) -> Classes:
    """Give the wanted categories their labels; categories of one name become one class.

    Args:
        source: the file or folder, for messages.
        name_of: the data set's category ids and their names.
        wanted: names in the order of the labels; None: all that are not ignored, by their ids.
        ignored: names of categories that mark regions to ignore for every class. With `wanted`, a data set without
            one of them has no such region; without, the name is a mistake.
        problems: takes a note of joined categories.
        absent_allowed: whether `wanted` may hold names that the data set does not have (but not only such); they get
            unused ids.
        uses: category id -> number of boxes: of categories of one name, the id with the most is the one for output.

    Raises:
        InputError: a wanted or ignored name is unknown, or nothing is left.
    """
    ids_of: dict[str, list[int]] = {}
    for category_id in sorted(name_of):
        ids_of.setdefault(name_of[category_id], []).append(category_id)
    for name, ids in ids_of.items():
        if len(ids) > 1:
            problems.add(source, f"categories {', '.join(map(str, ids))}", "categories of one name", "joined", name)
    listed = ", ".join(map(repr, list(ids_of)[:10])) + (", ..." if len(ids_of) > 10 else "")
    for name in ignored:
        if name not in ids_of and wanted is None:
            close = difflib.get_close_matches(name, ids_of, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(
                f"{source} has no category {name!r} to ignore (ignore_categories); its categories are {listed}{hint}"
            )
    names = tuple(name for name in ids_of if name not in ignored) if wanted is None else tuple(wanted)
    for name in names:
        if name in ignored:
            raise InputError(f"{name!r} cannot be a class and be ignored: take it out of ignore_categories")
        if name not in ids_of and (not absent_allowed or ids_of.keys().isdisjoint(names)):
            raise InputError(
                f"{source} has no category {name!r}, which the model's classes ask for; its categories are {listed}: "
                "rename them, or add the missing one"
            )
    if not names:
        raise InputError(f"{source}: ignore_categories leaves no class; keep at least one of {listed}")
    free = max(name_of, default=0)
    category_ids: list[int] = []
    for name in names:
        if name in ids_of:
            category_ids.append(max(ids_of[name], key=lambda number: (uses or {}).get(number, 0)))
        else:
            free += 1
            category_ids.append(free)
    label_of = {category_id: label for label, name in enumerate(names) for category_id in ids_of.get(name, [])}
    label_of |= {category_id: IGNORED_LABEL for name in ignored for category_id in ids_of.get(name, [])}
    return Classes(names, tuple(category_ids), label_of)


def settle_sizes(
    records: Sequence[ImageRecord],
    facts: Sequence[ImageFacts],
    source_of: Callable[[int], str],
    problems: Problems,
    looked_in: str = "",
) -> list[ImageRecord]:
    """The records with the real sizes of their images, after comparing these with the declared ones.

    Where an EXIF orientation turns the image, the declared size says whether the boxes were drawn on the turned image
    or on the stored pixels; where it does not tell (none is declared, or the turn keeps the size), the image is turned.

    Args:
        records: with the declared (width, height), (0, 0) where there is none.
        facts: what was found in the image files, in the same order.
        source_of: position of a record -> where its size is declared, for messages.
        problems: takes unusable images and those of another size, as fatal.
        looked_in: where missing images were looked for, for messages.

    Returns:
        The records; an image that cannot be used has the size (0, 0).
    """
    settled: list[ImageRecord] = []
    for position, (record, fact) in enumerate(zip(records, facts, strict=True)):
        declared = (record.width, record.height)
        if fact.what:
            detail = looked_in if fact.what == MISSING else fact.detail
            problems.add(record.path, "", fact.what, "fatal", detail)
            settled.append(replace(record, width=0, height=0))
        elif declared in ((0, 0), fact.shown_wh):
            settled.append(replace(record, width=fact.shown_wh[0], height=fact.shown_wh[1]))
        elif declared == fact.stored_wh:
            settled.append(replace(record, apply_exif=False))
        else:
            detail = (
                f"{fact.shown_wh[0]} x {fact.shown_wh[1]} pixels, but {source_of(position)} declares {declared[0]} x "
                f"{declared[1]}: restore the version that the boxes belong to, or correct the size and the boxes"
            )
            problems.add(record.path, "", "image of another size than declared", "fatal", detail)
            settled.append(replace(record, width=0, height=0))
    return settled


class RawObject(NamedTuple):
    """One annotated box as it stands in the files.

    Attributes:
        position: of its image among the records.
        label: its class, or -1: ignored for every class.
        box_xywh: pixels, finite numbers.
        area: of the object in square pixels; NaN: width x height of the box.
        ignored: a region that is ignored for its class.
    """

    position: int
    label: int
    box_xywh: tuple[float, float, float, float]
    area: float = math.nan
    ignored: bool = False


def attach_objects(
    records: Sequence[ImageRecord],
    objects: Sequence[RawObject],
    place_of: Callable[[int], tuple[str, str]],
    problems: Problems,
) -> list[ImageRecord]:
    """Clip boxes to their images, leave out those without any size left and those given twice, and sort them by image.

    Args:
        records: without objects; the boxes of those of size (0, 0) are left out in silence.
        objects: in any order.
        place_of: position of an object -> file and annotation, for problems.
        problems: takes what was changed or left out.

    Returns:
        The records with their objects, in the order of the files.
    """
    position = np.array([item.position for item in objects], dtype=np.int64)
    labels = np.array([item.label for item in objects], dtype=np.int64)
    boxes = np.array([item.box_xywh for item in objects], dtype=np.float64).reshape(-1, 4)
    areas = np.array([item.area for item in objects], dtype=np.float64)
    ignored = np.array([item.ignored or item.label == IGNORED_LABEL for item in objects], dtype=np.bool_)
    sizes = np.array([(record.width, record.height) for record in records], dtype=np.float64).reshape(-1, 2)[position]

    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    clipped = corners.clip(0, np.tile(sizes, 2))
    known = (sizes > 0).all(1)
    sizeless = known & ~(boxes[:, 2:] > 0).all(1)
    outside = known & ~sizeless & ~(clipped[:, 2:] > clipped[:, :2]).all(1)
    fit = known & ~sizeless & ~outside
    repeated = np.zeros(len(objects), np.bool_)
    if fit.any():
        rows = np.flatnonzero(fit)
        keys = np.column_stack([position, labels, ignored, boxes])[rows]
        first = np.unique(keys, axis=0, return_index=True)[1]
        repeated[rows] = True
        repeated[rows[first]] = False
    moved = fit & ~repeated & (np.abs(clipped - corners) > ROUNDING_PX).any(1)
    kinds: list[tuple[str, Done, Any]] = [
        (SIZELESS, "dropped", sizeless),
        (OUTSIDE, "dropped", outside),
        (REPEATED, "dropped", repeated),
        (CLIPPED, "clipped", moved),
    ]
    for what, done, rows_of_kind in kinds:
        for row in np.flatnonzero(rows_of_kind):
            numbers = " ".join(f"{number:.6g}" for number in boxes[row])
            size = f" in {sizes[row, 0]:.0f} x {sizes[row, 1]:.0f} pixels" if what in (OUTSIDE, CLIPPED) else ""
            problems.add(*place_of(int(row)), what, done, f"x y width height = {numbers}{size}")

    keep = np.flatnonzero(fit & ~repeated)
    keep = keep[np.argsort(position[keep], kind="stable")]
    boxes = np.concatenate([clipped[:, :2], clipped[:, 2:] - clipped[:, :2]], axis=1)
    areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
    starts = np.searchsorted(position[keep], np.arange(len(records) + 1))
    return [
        replace(record, boxes_xywh=boxes[rows], labels=labels[rows], areas=areas[rows], iscrowd=ignored[rows])
        for record, rows in zip(records, np.split(keep, starts[1:-1]), strict=True)
    ]


def note_unused_classes(source: Path, names: Sequence[str], records: Sequence[ImageRecord], problems: Problems) -> None:
    """List the classes of which no image has an object: often a sign of swapped ids."""
    used = {int(label) for record in records for label in np.unique(record.labels)}
    for label, name in enumerate(names):
        if label not in used:
            problems.add(source, "", "class without any box", "noted", repr(name))
