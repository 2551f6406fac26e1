"""The metric of the VisDrone-DET challenge, as its MATLAB toolkit computes it.

Source: VisDrone/VisDrone2018-DET-toolkit, files `utils/*.m`. It is not what the paper reports (that is the protocol
`visdrone`), and differs from COCO's in every step:

- Objects and detections of which half or more lies in the ignored regions of category 0 are removed first. The area is
  counted in whole pixels: boxes are rounded, and a region covers one pixel more than its width and height.
- The best N detections of an image are the first N rows of its file, over all classes.
- An object with score 0 is ignored: a detection may lie in it with half its area. Yet it counts among the objects that
  recall is a share of.
- Average precision is the area under the curve with all its points.
- The mean over the classes takes a class once for each image that shows it.

The toolkit reads images by file name, and so do we; equal scores keep that order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdino.benchmarks import VISDRONE_CLASSES
from crossdino.documents import load_document, name_of
from crossdino.errors import InputError
from crossdino.evaluation.coco_input import Found, Truth, is_number, read_found, read_truth
from crossdino.evaluation.greedy_matching import find_overlaps, match_greedily
from crossdino.evaluation.protocol_result import ProtocolResult, counted
from crossdino.exchange.category_numbers import visdrone_numbers

NUM_CLASSES = len(VISDRONE_CLASSES)
MAX_DETECTIONS: tuple[int, ...] = (1, 10, 100, 500)
"""Detections of an image, over all classes."""
IOU_THRESHOLDS: tuple[float, ...] = tuple(0.5 + step * 0.05 for step in range(10))
"""MATLAB's 0.5:0.05:0.95 in a loop; 0.85 is one rounding above the decimal."""
IGNORED_SHARE = 0.5
_RAW_CATEGORIES = NUM_CLASSES + 2

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class _Image:
    """One image as its two text files tell it, after the removal.

    Attributes:
        objects_xywh: (m, 4).
        classes: (m,) 1 ... 10 (11 is not measured).
        ignored: (m,) True for score 0.
        found_xywh: (n, 4) in the order of the file.
        found_classes: (n,).
        scores: (n,).
    """

    objects_xywh: Floats
    classes: Ints
    ignored: Bools
    found_xywh: Floats
    found_classes: Ints
    scores: Floats


@dataclass(frozen=True)
class _Raw:
    """The rows that VisDrone's text files have and a COCO file has not: m rows of all images.

    Attributes:
        images: (m,) positions of images.
        boxes_xywh: (m, 4).
        categories: (m,) 0 ... 11.
        ignored: (m,) True for score 0.
    """

    images: Ints
    boxes_xywh: Floats
    categories: Ints
    ignored: Bools


def evaluate_visdrone_official(
    ground_truth: Mapping[str, Any] | Path | str, predictions: Sequence[Mapping[str, Any]] | Path | str
) -> ProtocolResult:
    """Measure detections as the VisDrone-DET challenge does.

    Args:
        ground_truth: COCO JSON made by `crossdino prepare visdrone`, as a file or as the dictionary: its annotations
            with `iscrowd` 0 are the objects, and its `visdrone_ignored` holds the raw rows of category 0 and 11 and
            of score 0, so that both modes of that command give the same numbers.
        predictions: COCO results, as a file or as the list. Their order within an image is that of the toolkit's
            text file, and decides which are the first 1, 10, 100 and 500: sort them by score.

    Returns:
        `AP`, `AP50`, `AP75` with 500 detections an image, and `AR@1` ... `AR@500`. By class too, NaN where no image
        shows it.

    Raises:
        InputError: a file cannot be read or is not of the format, or `visdrone_ignored` or the size of an image is
            missing.
    """
    document = load_document(ground_truth, "the ground truth")
    truth = read_truth(document, name_of(ground_truth, "the ground truth"))
    number_of = visdrone_numbers(document["categories"], truth.name)
    found, _ = read_found(predictions, truth.image_ids, truth.category_ids, truth.name)
    entries = {entry["id"]: entry for entry in document["images"]}
    raw = _read_raw(document, truth)
    number_of_label = np.array([number_of[identity] for identity in truth.category_ids])
    images, removed = _images_in_toolkit_order(truth, raw, found, number_of_label, entries)

    ap, ar, num_showing = _measure(images)
    # The toolkit's mean: a class stands in its list once for each image that shows it.
    weights = num_showing / num_showing.sum() if num_showing.any() else np.full(NUM_CLASSES, math.nan)
    metrics = _metrics(weights @ ap, np.einsum("k,ktc->tc", weights, ar))
    label_of = {number_of[identity]: label for identity, label in truth.category_ids.items()}
    by_class = {}
    for number in sorted(label_of):
        shown = 1.0 if num_showing[number - 1] else math.nan
        by_class[truth.class_names[label_of[number]]] = _metrics(ap[number - 1] * shown, ar[number - 1] * shown)
    notes = ["classes are weighted by the number of images that show them, as the toolkit does"]
    options = truth.info.get("options")
    if isinstance(options, Mapping) and options.get("outside") == "clip":
        notes.append(
            "the data were prepared with --outside clip: the toolkit takes the boxes as the raw files have them"
        )
    unsorted = sum(bool((np.diff(image.scores[: MAX_DETECTIONS[-1]]) > 0).any()) for image in images)
    if unsorted:
        notes.append(
            f"in {counted(unsorted, 'image')} the detections are not sorted by score: the first N of the file count, "
            "as in the toolkit"
        )
    beyond = sum(len(image.scores) > MAX_DETECTIONS[-1] for image in images)
    if beyond:
        limit = MAX_DETECTIONS[-1]
        notes.append(f"in {counted(beyond, 'image')} there are more than {limit} detections; the rest does not count")
    measured = [image.classes <= NUM_CLASSES for image in images]
    return ProtocolResult(
        protocol="visdrone-official",
        metrics=metrics,
        by_class=by_class,
        num_images=len(images),
        num_objects=sum(int((rows & ~image.ignored).sum()) for rows, image in zip(measured, images, strict=True)),
        num_predictions=len(found),
        settings={
            "max_detections": list(MAX_DETECTIONS),
            "max_detections_of": "an image, all classes together, in the order of the file",
            "iou_thresholds": list(IOU_THRESHOLDS),
            "ignored_share": IGNORED_SHARE,
        },
        counts={
            "ignored_objects": sum(
                int((rows & image.ignored).sum()) for rows, image in zip(measured, images, strict=True)
            ),
            "ignored_regions": int(np.count_nonzero(raw.categories == 0)),
            **removed,
        },
        notes=tuple(notes),
    )


def _metrics(ap: Floats, ar: Floats) -> dict[str, float]:
    """The toolkit's numbers of AP (thresholds,) and AR (thresholds, caps)."""
    recalls = {f"AR@{cap}": float(ar[:, place].mean()) for place, cap in enumerate(MAX_DETECTIONS)}
    return {"AP": float(ap.mean()), "AP50": float(ap[0]), "AP75": float(ap[5]), **recalls}


def _read_raw(document: Mapping[str, Any], truth: Truth) -> _Raw:
    rows = document.get("visdrone_ignored")
    if not isinstance(rows, list):
        raise InputError(
            f"{truth.name} has no list 'visdrone_ignored', which the official metric needs: prepare the raw data with "
            "`crossdino prepare visdrone`, or measure with --protocol visdrone"
        )
    boxes, images, categories, ignored = np.zeros((len(rows), 4)), [], [], []
    for place, row in enumerate(rows):
        where = f"{truth.name}: row {place} (counted from 0) of 'visdrone_ignored'"
        if (
            not isinstance(row, Mapping)
            or type(row.get("image_id")) is not int
            or row["image_id"] not in truth.image_ids
        ):
            raise InputError(f"{where} is of no image of the file: prepare the data again")
        box, category, score = row.get("bbox"), row.get("category"), row.get("score")
        if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(is_number, box)):
            raise InputError(f"{where} has bbox {box!r}: give 4 numbers, x, y, width, height")
        if type(category) is not int or not 0 <= category < _RAW_CATEGORIES or not is_number(score):
            raise InputError(f"{where} has category {category!r} and score {score!r}: give 0 to 11, and 0 or 1")
        if category == 0 and any(side != math.floor(side) for side in box):
            raise InputError(f"{where} is an ignored region with bbox {box!r}: give whole pixels, as the raw files do")
        boxes[place] = box
        images.append(truth.image_ids[row["image_id"]])
        categories.append(category)
        ignored.append(score == 0)
    return _Raw(np.array(images, np.int64), boxes, np.array(categories, np.int64), np.array(ignored, bool))


def _images_in_toolkit_order(
    truth: Truth, raw: _Raw, found: Found, number_of_label: Ints, entries: Mapping[int, Mapping[str, Any]]
) -> tuple[list[_Image], dict[str, int]]:
    """The images by file name, and how much was removed from them."""
    real = ~truth.is_crowd
    none = np.zeros(np.count_nonzero(real), dtype=bool)
    object_images = np.concatenate((truth.images[real], raw.images))
    boxes = np.concatenate((truth.boxes_xywh[real], raw.boxes_xywh))
    classes = np.concatenate((number_of_label[truth.labels[real]], raw.categories))
    ignored = np.concatenate((none, raw.ignored))

    object_rows = _rows_by_image(object_images, len(truth.image_ids))
    found_rows = _rows_by_image(found.images, len(truth.image_ids))
    found_classes = number_of_label[found.labels]
    removed = {"removed_objects": 0, "removed_detections": 0}
    images: list[_Image] = []
    for identity in _by_file_name(entries):
        position = truth.image_ids[identity]
        rows, mine = object_rows[position], found_rows[position]
        regions = boxes[rows[classes[rows] == 0]]
        rows = rows[classes[rows] != 0]
        if len(regions):
            area = _ignored_pixels(regions, _size_hw(entries[identity], truth.name))
            kept, kept_found = (_share_below(area, them) for them in (boxes[rows], found.boxes_xywh[mine]))
            removed["removed_objects"] += int(np.count_nonzero(~kept & (classes[rows] <= NUM_CLASSES)))
            removed["removed_detections"] += int(np.count_nonzero(~kept_found))
            rows, mine = rows[kept], mine[kept_found]
        images.append(
            _Image(
                boxes[rows],
                classes[rows],
                ignored[rows],
                found.boxes_xywh[mine],
                found_classes[mine],
                found.scores[mine],
            )
        )
    return images, removed


def _rows_by_image(images: Ints, num_images: int) -> list[Ints]:
    """The rows of each image, in the order of the file."""
    order = np.argsort(images, kind="stable")
    return np.split(order, np.searchsorted(images[order], np.arange(1, num_images)))


def _by_file_name(entries: Mapping[int, Mapping[str, Any]]) -> list[int]:
    """The ids in the order of the names of the text files; as they are listed where an image has no name."""
    names = [entry.get("file_name") for entry in entries.values()]
    if not all(isinstance(name, str) for name in names):
        return list(entries)
    return sorted(entries, key=lambda identity: f"{PurePosixPath(entries[identity]['file_name']).stem}.txt")


def _size_hw(entry: Mapping[str, Any], name: str) -> tuple[int, int]:
    sizes = [entry.get("height"), entry.get("width")]
    whole = [size for size in sizes if type(size) is int and size > 0]
    if len(whole) < 2:
        raise InputError(
            f"{name}: image {entry.get('id')} has height {sizes[0]!r} and width {sizes[1]!r}, and the official metric "
            "needs both where there are ignored regions: give whole pixels"
        )
    return whole[0], whole[1]


def _ignored_pixels(regions_xywh: Floats, size_hw: tuple[int, int]) -> Ints:
    """Ignored pixels from the upper left corner to each pixel, both included."""
    ignored = np.zeros(size_hw, dtype=np.int64)
    for left, top, width, height in np.maximum(regions_xywh, 1).astype(np.int64).tolist():
        # Counted from 1 both ends belong to the region: it is one pixel larger than its width and height say.
        ignored[top - 1 : top + height, left - 1 : left + width] = 1
    return ignored.cumsum(axis=0).cumsum(axis=1)


def _share_below(area: Ints, boxes_xywh: Floats) -> Bools:
    """(n,) whether less than half of a box is ignored.

    The difference of the four corners covers the pixels from one after the corner to the opposite side.
    """
    height, width = area.shape
    x, y, w, h = np.maximum(_rounded(boxes_xywh), 1).T
    left, top = np.minimum(x, width), np.minimum(y, height)
    right, bottom = np.minimum(left + w, width), np.minimum(top + h, height)
    left, top, right, bottom = (side.astype(np.int64) - 1 for side in (left, top, right, bottom))
    inside = area[top, left] + area[bottom, right] - area[top, right] - area[bottom, left]
    return inside / (h * w) < IGNORED_SHARE


def _rounded(values: Floats) -> Floats:
    """MATLAB's round: halves away from 0."""
    return np.copysign(np.floor(np.abs(values) + 0.5), values)


def _measure(images: Sequence[_Image]) -> tuple[Floats, Floats, Ints]:
    """AP (classes, thresholds), AR (classes, thresholds, caps), and the images that show a class (classes,)."""
    ap = np.zeros((NUM_CLASSES, len(IOU_THRESHOLDS)))
    ar = np.zeros((NUM_CLASSES, len(IOU_THRESHOLDS), len(MAX_DETECTIONS)))
    num_showing = np.zeros(NUM_CLASSES, dtype=np.int64)
    for number in range(1, NUM_CLASSES + 1):
        num_objects = sum(int(np.count_nonzero(image.classes == number)) for image in images)
        num_showing[number - 1] = sum(bool((image.classes == number).any()) for image in images)
        if not num_objects:
            continue
        scores, outcomes, taking_part = _match_class(images, number)
        order = np.argsort(-scores, kind="stable")
        for cap in range(len(MAX_DETECTIONS)):
            mine = order[taking_part[order, cap]]
            true = np.cumsum(outcomes[mine, :, cap] == 1, axis=0)
            false = np.cumsum(outcomes[mine, :, cap] == 0, axis=0)
            if len(mine):
                ar[number - 1, :, cap] = true[-1] / num_objects
            if cap == len(MAX_DETECTIONS) - 1:
                for place in range(len(IOU_THRESHOLDS)):
                    found, all_found = true[:, place], np.maximum(true[:, place] + false[:, place], 1)
                    ap[number - 1, place] = _area_under(found / num_objects, found / all_found)
    return ap, ar, num_showing


def _match_class(images: Sequence[_Image], number: int) -> tuple[Floats, NDArray[np.int8], Bools]:
    """The detections of a class, image by image.

    Returns:
        Scores (n,); outcomes (n, thresholds, caps), which are 1 right, 0 wrong, -1 in an ignored object; and (n, caps)
        whether a detection is among the first N of its image.
    """
    scores, outcomes, taking_part = [np.zeros(0)], [], []
    for image in images:
        mine = np.flatnonzero(image.found_classes[: MAX_DETECTIONS[-1]] == number)
        if not len(mine):
            continue
        mine = mine[np.argsort(-image.scores[mine], kind="stable")]
        there = image.classes == number
        overlaps = find_overlaps(
            image.found_xywh[mine],
            image.objects_xywh[there & ~image.ignored],
            image.objects_xywh[there & image.ignored],
            IOU_THRESHOLDS[0],
            last_of_equals=True,
        )
        first = mine[:, None] < np.array(MAX_DETECTIONS)
        outcome = np.zeros((len(mine), len(IOU_THRESHOLDS), len(MAX_DETECTIONS)), dtype=np.int8)
        for place, threshold in enumerate(IOU_THRESHOLDS):
            for cap in range(len(MAX_DETECTIONS)):
                matched = match_greedily(overlaps, threshold, first[:, cap])
                outcome[:, place, cap] = np.where(matched, 1, -1 * (overlaps.in_ignored >= threshold))
        scores.append(image.scores[mine])
        outcomes.append(outcome)
        taking_part.append(first)
    if not outcomes:
        caps = len(MAX_DETECTIONS)
        return scores[0], np.zeros((0, len(IOU_THRESHOLDS), caps), np.int8), np.zeros((0, caps), bool)
    return np.concatenate(scores), np.concatenate(outcomes), np.concatenate(taking_part)


def _area_under(recall: Floats, precision: Floats) -> float:
    """Area under the curve, whose precision is first made to fall: at each point the best one from there on."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * envelope))
