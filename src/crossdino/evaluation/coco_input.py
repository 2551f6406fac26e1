"""Ground truth and detections in COCO's formats as checked columns: the one way in of every evaluation.

Millions of entries come through here. They are read column by column; only if a column holds anything unusual are the
entries looked at one by one, which names the entry that is wrong and what to do about it (or accepts it, as numpy's
numbers). Image and category ids are replaced by their positions in ascending order, so that any integers will do;
annotations are known by their place in the file, for the evaluators take an annotation id of 0 for "not matched".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crossdino.documents import load_document, name_of
from crossdino.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Truth:
    """A ground truth: m annotations in the order of the file.

    Attributes:
        name: what messages call it.
        image_ids: id -> position, by ascending id.
        category_ids: id -> position (the label), by ascending id.
        class_names: by label; the id is added where a name comes twice.
        images: (m,) positions of images.
        labels: (m,) positions of categories.
        boxes_xywh: (m, 4) pixels of the image.
        areas: (m,) square pixels, as the file states them, else width x height.
        is_crowd: (m,) the file's `iscrowd`.
        is_ignored: (m,) the file's `ignore`, which only SODA-D's protocol reads.
        has_id_zero: whether an annotation has the id 0.
        info: the file's `info`, empty where there is none.
        image_entries: the file's `images`.
    """

    name: str
    image_ids: dict[int, int]
    category_ids: dict[int, int]
    class_names: tuple[str, ...]
    images: Ints
    labels: Ints
    boxes_xywh: Floats
    areas: Floats
    is_crowd: Bools
    is_ignored: Bools
    has_id_zero: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)
    image_entries: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: Ints | Bools) -> Truth:
        """Some of the annotations, of the same images and categories."""
        columns = ("images", "labels", "boxes_xywh", "areas", "is_crowd", "is_ignored")
        return replace(self, **{name: getattr(self, name)[chosen] for name in columns})

    def reading_only(self, flag: Literal["iscrowd", "ignore"]) -> Truth:
        """The same for a protocol that reads one of the two flags and not the other."""
        unread = {"iscrowd": "is_ignored", "ignore": "is_crowd"}[flag]
        return replace(self, **{unread: np.zeros(len(self), dtype=np.bool_)})

    def without_category(self, category_id: int) -> Truth:
        """The same without one of its categories and the annotations of that."""
        label = self.category_ids[category_id]
        left = self[self.labels != label]
        return replace(
            left,
            category_ids={key: at - (at > label) for key, at in self.category_ids.items() if at != label},
            class_names=self.class_names[:label] + self.class_names[label + 1 :],
            labels=left.labels - (left.labels > label),
        )


@dataclass(frozen=True)
class Found:
    """n detections in the order of the file.

    Attributes:
        images: (n,) positions of images.
        labels: (n,) positions of categories.
        boxes_xywh: (n, 4) pixels of the image.
        scores: (n,) finite.
    """

    images: Ints
    labels: Ints
    boxes_xywh: Floats
    scores: Floats

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: Ints | Bools) -> Found:
        return Found(self.images[chosen], self.labels[chosen], self.boxes_xywh[chosen], self.scores[chosen])


def boxes_xyxy(boxes_xywh: Floats) -> Floats:
    """(n, 4) corners."""
    return np.concatenate((boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]), axis=1)


def read_truth(source: Mapping[str, Any] | Path | str, name: str | None = None) -> Truth:
    """Read and check a COCO ground truth.

    Args:
        source: COCO JSON, as a file or as the dictionary.
        name: what messages call it; None: the path, or "the ground truth".

    Returns:
        Its columns.

    Raises:
        InputError: it cannot be read, is not of the format, an entry is broken or refers to an image or a category
            that is not there, or there is nothing in it.
    """
    truth, name = load_document(source, "the ground truth"), name or name_of(source, "the ground truth")
    if not isinstance(truth, Mapping):
        raise InputError(f"{name} is not a COCO ground truth: a JSON object with images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        if not isinstance(truth.get(key), list):
            raise InputError(f"{name} has no list {key!r}: give a COCO ground truth (instances) file")
        if not truth[key]:
            raise InputError(f"{name} has an empty list {key!r}: nothing can be measured, give an annotated file")
    annotations = truth["annotations"]
    image_ids = id_positions(truth["images"], "images", name)
    category_ids = id_positions(truth["categories"], "categories", name)
    columns = _quick_truth(annotations, image_ids, category_ids)
    if columns is None:
        rows = [
            _truth_row(entry, f"{name}: annotation number {index} (counted from 0)", image_ids, category_ids, name)
            for index, entry in enumerate(annotations)
        ]
        columns = tuple(np.array(column) for column in zip(*rows, strict=True))
    images, labels, boxes, areas, is_crowd, is_ignored = columns
    names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in truth["categories"]}
    plain_names = list(names.values())
    info = truth.get("info")
    return Truth(
        name=name,
        image_ids=image_ids,
        category_ids=category_ids,
        class_names=tuple(
            names[key] if plain_names.count(names[key]) == 1 else f"{names[key]} ({key})" for key in category_ids
        ),
        images=images,
        labels=labels,
        boxes_xywh=boxes,
        areas=areas,
        is_crowd=is_crowd,
        is_ignored=is_ignored,
        has_id_zero=0 in [entry.get("id") for entry in annotations],
        info=info if isinstance(info, Mapping) else {},
        image_entries=truth["images"],
    )


def read_found(
    source: Sequence[Mapping[str, Any]] | Path | str,
    image_ids: Mapping[int, int],
    category_ids: Mapping[int, int],
    reference: str,
    hint: str = "",
    category_reference: str | None = None,
) -> tuple[Found, str]:
    """Read and check COCO results.

    Args:
        source: a file, or the list.
        image_ids: known ids -> position.
        category_ids: known ids -> position.
        reference: the name of the file that the ids are of, for messages.
        hint: a further remedy for an unknown image id.
        category_reference: the name of the file that the category ids are of; None: the same.

    Returns:
        The columns, and the name of the source.

    Raises:
        InputError: it cannot be read, is not of the format, or an entry is broken or refers to unknown ids.
    """
    results, name = load_document(source, "the predictions"), name_of(source, "the predictions")
    if isinstance(results, Mapping) and "annotations" in results:
        raise InputError(
            f"{name} is a whole COCO data set, not a list of detections: give COCO results (of `crossdino predict` "
            "those of --format coco-results --image-ids GROUND_TRUTH)"
        )
    if not isinstance(results, Sequence) or isinstance(results, (str, bytes)):
        raise InputError(
            f"{name} is not a list of detections: give COCO results, [{{image_id, category_id, bbox, score}}, ...]"
        )
    columns = _quick_found(results, image_ids, category_ids)
    if columns is None:
        rows: list[tuple[Any, ...]] = []
        for index, entry in enumerate(results):
            where = f"{name}: detection number {index} (counted from 0)"
            box = _box(entry, where)
            score = entry.get("score")
            if not is_number(score):
                raise InputError(f"{where} has score {score!r}: give a finite number")
            image = _place(image_ids, entry.get("image_id"), where, "image_id", reference, hint)
            label = _place(
                category_ids, entry.get("category_id"), where, "category_id", category_reference or reference
            )
            rows.append((image, label, box, float(score)))
        columns = tuple(np.array(column) for column in zip(*rows, strict=True))
    return Found(*columns), name


def id_positions(entries: Sequence[Any], key: str, name: str) -> dict[int, int]:
    """Id -> 0, 1, 2, ... by ascending id, of the list `key` of the file `name`."""
    ids: set[int] = set()
    for index, entry in enumerate(entries):
        identity = entry.get("id") if isinstance(entry, Mapping) else None
        if isinstance(identity, bool) or not isinstance(identity, int):
            raise InputError(f"{name}: entry number {index} of {key!r} has id {identity!r}: give an integer")
        if identity in ids:
            raise InputError(f"{name}: id {identity} comes twice in {key!r} (entry number {index}): ids must be unique")
        ids.add(identity)
    return {identity: position for position, identity in enumerate(sorted(ids))}


def is_number(value: Any) -> bool:
    """Whether it is one finite number; true and false are none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


# What the quick readers below raise on anything out of the ordinary, right or wrong.
_UNUSUAL = (KeyError, TypeError, ValueError, OverflowError, AttributeError)


def _quick_truth(
    entries: Sequence[Any], image_ids: Mapping[int, int], category_ids: Mapping[int, int]
) -> tuple[NDArray[Any], ...] | None:
    """The columns of annotations; None if anything about them is unusual."""
    try:
        boxes = _boxes(entries)
        return (
            _places(entries, "image_id", image_ids),
            _places(entries, "category_id", category_ids),
            boxes,
            _areas(entries, boxes),
            _flags(entries, "iscrowd"),
            _flags(entries, "ignore"),
        )
    except _UNUSUAL:
        return None


def _quick_found(
    entries: Sequence[Any], image_ids: Mapping[int, int], category_ids: Mapping[int, int]
) -> tuple[NDArray[Any], ...] | None:
    """The columns of detections; None if anything about them is unusual."""
    try:
        return (
            _places(entries, "image_id", image_ids),
            _places(entries, "category_id", category_ids),
            _boxes(entries),
            _numbers([entry["score"] for entry in entries]),
        )
    except _UNUSUAL:
        return None


def _places(entries: Sequence[Any], key: str, known: Mapping[int, int]) -> Ints:
    values = [entry[key] for entry in entries]
    if not set(map(type, values)) <= {int}:
        raise TypeError
    # An unknown id is None, which fromiter refuses.
    return np.fromiter(map(known.get, values), dtype=np.int64, count=len(values))


def _boxes(entries: Sequence[Any]) -> Floats:
    boxes = [entry["bbox"] for entry in entries]
    if not (set(map(type, boxes)) <= {list, tuple} and set(map(len, boxes)) <= {4}):
        raise TypeError
    array = _numbers(list(chain.from_iterable(boxes))).reshape(-1, 4)
    if (array[:, 2:] < 0).any():
        raise ValueError
    return array


def _areas(entries: Sequence[Any], boxes: Floats) -> Floats:
    areas = [entry.get("area") for entry in entries]
    missing = np.fromiter((area is None for area in areas), dtype=np.bool_, count=len(areas))
    if missing.any():
        areas = [0.0 if area is None else area for area in areas]
    with np.errstate(over="ignore"):
        return np.where(missing, boxes[:, 2] * boxes[:, 3], _numbers(areas))


def _flags(entries: Sequence[Any], key: str) -> Bools:
    values = [entry.get(key, 0) for entry in entries]
    if not set(map(type, values)) <= {int, bool}:
        raise TypeError
    return np.array(values, dtype=np.int64) != 0


def _numbers(values: list[Any]) -> Floats:
    if not set(map(type, values)) <= {float, int}:
        raise TypeError
    array = np.array(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError
    return array


def _truth_row(
    entry: Any, where: str, image_ids: Mapping[int, int], category_ids: Mapping[int, int], name: str
) -> tuple[Any, ...]:
    """Image, label, box, area, crowd and ignored of one annotation."""
    box = _box(entry, where)
    area = entry.get("area")
    if area is None:
        area = box[2] * box[3]
    if not is_number(area):
        raise InputError(f"{where} has area {area!r}: give a number, or leave it out for width x height")
    flags = []
    for key in ("iscrowd", "ignore"):
        flag = entry.get(key)
        if not (flag is None or isinstance(flag, (Real, np.bool_))):
            raise InputError(f"{where} has {key} {flag!r}: give 0 or 1, true or false")
        flags.append(bool(flag))
    return (
        _place(image_ids, entry.get("image_id"), where, "image_id", name),
        _place(category_ids, entry.get("category_id"), where, "category_id", name),
        box,
        float(area),
        *flags,
    )


def _place(known: Mapping[int, int], identity: Any, where: str, key: str, reference: str, hint: str = "") -> int:
    if isinstance(identity, Integral) and not isinstance(identity, bool) and identity in known:
        return known[int(identity)]
    some = ", ".join(str(one) for one in list(known)[:5]) + (", ..." if len(known) > 5 else "")
    raise InputError(
        f"{where} has {key} {identity!r}, which is not in {reference}: use the ids of that file ({some}), as integers"
        f"{hint}"
    )


def _box(entry: Any, where: str) -> list[float]:
    """The entry's box as four floats."""
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} is not an object: give image_id, category_id, bbox and, for detections, score")
    box = entry.get("bbox")
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(is_number, box)) or box[2] < 0 or box[3] < 0:
        raise InputError(f"{where} has bbox {box!r}: give 4 finite numbers, x, y, width >= 0, height >= 0")
    return [float(value) for value in box]
