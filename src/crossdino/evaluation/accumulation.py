"""COCO's matching and accumulation, for any ranges of area and any caps at once: the engine below every AP of ours.

faster-coco-eval does the work and gives the numbers of pycocotools. Places where the usual wrappers go wrong are closed
here: numbers are read from its arrays at the caps asked for (`summarize()` reports 100 detections whatever was set),
and annotations are numbered from 1 (an annotation id of 0 stands for "not matched" there). Classes do not know of each
other, so they are taken a few at a time: the memory for millions of detections stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

from crossdino.evaluation.coco_input import Floats, Found, Ints, Truth, no_garbage_collection

COCO_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
LARGEST_AREA = 1e10
"""COCO's upper bound of all areas, in square pixels."""

# Boxes that are handed to the evaluator at once; a class is never divided.
_BOXES_AT_ONCE = 400_000


@dataclass(frozen=True)
class Part:
    """The result of some classes, K in number.

    Attributes:
        classes: their labels, consecutive.
        truth: their annotations.
        found: their detections.
        precision: (IoU thresholds, 101 recalls, K, ranges, caps); -1 where there is no object.
        recall: (IoU thresholds, K, ranges, caps); -1 where there is no object.
        overlaps: (position of the image, label) -> overlap of its detections, the best first and up to the largest cap,
            with its annotations, in the order of the file; with a crowd relative to the detection. Empty or missing
            where there are no detections or no annotations.
    """

    classes: range
    truth: Truth
    found: Found
    precision: Floats
    recall: Floats
    overlaps: Mapping[tuple[int, int], Any]


def accumulate(
    truth: Truth,
    found: Found,
    ranges: Sequence[tuple[float, float]],
    caps: Sequence[int],
    thresholds: Floats = COCO_IOU_THRESHOLDS,
) -> tuple[Floats, Floats]:
    """Precision and recall of all classes.

    Args:
        truth: the annotations; one whose area lies outside a range is ignored there: a detection may take it, once, and
            is then neither right nor wrong. Crowds are ignored everywhere and may be taken by many.
        found: the detections.
        ranges: lower and upper bound of the area in square pixels, both inclusive.
        caps: ascending; so many of the best detections of an image and class count.
        thresholds: (T,) ascending.

    Returns:
        (T, 101, classes, ranges, caps) precision and (T, classes, ranges, caps) recall; -1 marks what has no objects.
    """
    parts = accumulate_parts(truth, found, ranges, caps, thresholds)
    precisions, recalls = zip(*((part.precision, part.recall) for part in parts), strict=True)
    return np.concatenate(precisions, axis=2), np.concatenate(recalls, axis=1)


def accumulate_parts(
    truth: Truth,
    found: Found,
    ranges: Sequence[tuple[float, float]],
    caps: Sequence[int],
    thresholds: Floats = COCO_IOU_THRESHOLDS,
) -> Iterator[Part]:
    """The same as `accumulate`, a few classes at a time and with the overlaps that it found, by ascending label."""
    num_classes = len(truth.category_ids)
    sizes = np.bincount(truth.labels, minlength=num_classes) + np.bincount(found.labels, minlength=num_classes)
    start = 0
    while start < num_classes:
        stop = start + 1
        while stop < num_classes and sizes[start : stop + 1].sum() <= _BOXES_AT_ONCE:
            stop += 1
        classes = range(start, stop)
        own_truth = truth[_of_classes(truth.labels, classes)]
        own_found = found[_of_classes(found.labels, classes)]
        yield _evaluate(classes, own_truth, own_found, ranges, caps, thresholds)
        start = stop


def _of_classes(labels: Ints, classes: range) -> Ints:
    return np.flatnonzero((labels >= classes.start) & (labels < classes.stop))


def _evaluate(
    classes: range,
    truth: Truth,
    found: Found,
    ranges: Sequence[tuple[float, float]],
    caps: Sequence[int],
    thresholds: NDArray[np.float64],
) -> Part:
    frame = {
        "images": [{"id": place} for place in range(len(truth.image_ids))],
        "categories": [{"id": label} for label in classes],
    }
    columns = _columns_of_caps(found, caps)
    with no_garbage_collection():
        objects = [
            {"id": place, "image_id": image, "category_id": label, "bbox": box, "area": area, "iscrowd": crowd}
            for place, (image, label, box, area, crowd) in enumerate(
                zip(
                    truth.images.tolist(),
                    truth.labels.tolist(),
                    truth.boxes_xywh.tolist(),
                    truth.areas.tolist(),
                    truth.is_crowd.astype(int).tolist(),
                    strict=True,
                ),
                start=1,
            )
        ]
        detections = [
            {"id": place, "image_id": image, "category_id": label, "bbox": box, "area": box[2] * box[3], "score": score}
            for place, (image, label, box, score) in enumerate(
                zip(
                    found.images.tolist(),
                    found.labels.tolist(),
                    found.boxes_xywh.tolist(),
                    found.scores.tolist(),
                    strict=True,
                ),
                start=1,
            )
        ]
        evaluator = COCOeval_faster(
            COCO({**frame, "annotations": objects}), COCO({**frame, "annotations": detections}), iouType="bbox"
        )
        # Set here and not through the constructor, which logs a warning about ranges that leave out some sizes.
        evaluator.params.areaRng = [list(bounds) for bounds in ranges]
        evaluator.params.areaRngLbl = [str(index) for index in range(len(ranges))]
        evaluator.params.maxDets = [caps[place] for place in sorted(set(columns))]
        evaluator.params.iouThrs = thresholds
        evaluator.evaluate()
        evaluator.accumulate()
    return Part(
        classes=classes,
        truth=truth,
        found=found,
        precision=np.asarray(evaluator.eval["precision"])[..., columns],
        recall=np.asarray(evaluator.eval["recall"])[..., columns],
        overlaps=evaluator.ious,
    )


def _columns_of_caps(found: Found, caps: Sequence[int]) -> list[int]:
    """For each cap the first one that gives the same: what cuts nothing off need not be accumulated again."""
    counts = np.unique(found.images * (found.labels.max(initial=0) + 1) + found.labels, return_counts=True)[1]
    enough = int(np.searchsorted(np.asarray(caps), counts.max(initial=0)))
    return [min(place, enough) for place in range(len(caps))]


def mean_defined(values: Floats) -> float:
    """Mean over the entries that are defined (neither -1 nor NaN), all of equal weight as COCO has it; NaN if none."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else float("nan")


def at_threshold(thresholds: Floats, value: float) -> Ints:
    """Indices of the IoU threshold `value`; empty if it is not among them."""
    return np.flatnonzero(np.isclose(thresholds, value))
