"""Optimal LRP, the localisation-recall-precision error at the best score threshold of each class.

Oksuz et al., "Localization Recall Precision (LRP)", ECCV 2018, in the form in which AI-TOD's toolkit measures it: at
IoU 0.5, over all areas, with the largest cap. Lower is better. At a threshold s, with what lies above it,

    LRP(s) = (sum over TP of (1 - IoU) / (1 - 0.5) + FP + FN) / (TP + FP + FN),

oLRP is the smallest over s, and its three components are those at the first s that attains it: `loc`, the mean of
1 - IoU of the true positives; `FP`, 1 - precision; `FN`, 1 - recall.
"""

from __future__ import annotations

import numpy as np

from crossdino.evaluation.accumulation import LARGEST_AREA, Part
from crossdino.evaluation.coco_input import Bools, Floats, Ints

OLRP_IOU = 0.5
OLRP_METRICS = ("oLRP", "oLRP_loc", "oLRP_FP", "oLRP_FN")

_UNMATCHED = -1


def optimal_lrp(part: Part, cap: int) -> Floats:
    """The errors of every class of a part of an accumulation.

    Args:
        part: objects, detections and their overlaps.
        cap: the one the part was accumulated with, the largest if there were several.

    Returns:
        (K, 4) oLRP and its components loc, FP, FN. A class without objects is -1 throughout; one without any true
        positive has oLRP 1 and FN 1, and NaN for the components that say nothing then, which a mean leaves out.
    """
    truth, found = part.truth, part.found
    ignored = truth.is_crowd | (truth.areas < 0) | (truth.areas > LARGEST_AREA)
    # Detections of one image and class lie together, the best first; likewise objects, in the order of the file.
    order = np.lexsort((-found.scores, found.images, found.labels))
    objects = np.lexsort((truth.images, truth.labels))
    used = found[order]
    rank = _rank_in_group(used.images, used.labels)
    matched, overlap = _match(part, used.images, used.labels, objects, ignored)
    is_free = matched == _UNMATCHED
    neutral = np.where(
        is_free, np.prod(used.boxes_xywh[:, 2:], axis=1) > LARGEST_AREA, np.append(ignored, False)[matched]
    )
    errors = np.full((len(part.classes), len(OLRP_METRICS)), -1.0)
    for row, label in enumerate(part.classes):
        num_objects = int(np.count_nonzero(~ignored & (truth.labels == label)))
        if num_objects:
            own = np.flatnonzero((used.labels == label) & (rank < cap))
            own = own[np.argsort(-used.scores[own], kind="stable")]
            is_right, is_wrong = ~is_free & ~neutral, is_free & ~neutral
            errors[row] = _errors(is_right[own], is_wrong[own], overlap[own], num_objects)
    return errors


def _errors(is_right: Bools, is_wrong: Bools, overlap: Floats, num_objects: int) -> tuple[float, float, float, float]:
    """oLRP, loc, FP, FN of one class; its detections from the highest score to the lowest."""
    if not is_right.any():
        return 1.0, float("nan"), float("nan"), 1.0
    right, wrong = np.cumsum(is_right), np.cumsum(is_wrong)
    missed = num_objects - right
    distance = right - np.cumsum(np.where(is_right, overlap, 0.0))
    lrp = (distance / (1 - OLRP_IOU) + wrong + missed) / (right + wrong + missed)
    best = int(np.argmin(lrp))
    # Where nothing is found at the best threshold, 0 / 0 is NaN: the components do not exist.
    with np.errstate(invalid="ignore"):
        return (
            float(lrp[best]),
            float(distance[best] / right[best]),
            float(wrong[best] / (right[best] + wrong[best])),
            float(missed[best] / num_objects),
        )


def _match(part: Part, images: Ints, labels: Ints, objects: Ints, ignored: Bools) -> tuple[Ints, Floats]:
    """The object of every detection at IoU 0.5 and the overlap with it, by the overlaps that AP was measured with.

    COCO's rules: a detection takes the free object of the highest overlap, of equal ones the last; only if there is
    none, one that is ignored, and a crowd is never used up.
    """
    first_row = _group_starts(images, labels)
    first_object = _group_starts(part.truth.images[objects], part.truth.labels[objects])
    rows, columns, overlaps = [], [], []
    for pair, matrix in part.overlaps.items():
        if len(matrix):
            values = np.asarray(matrix)
            row, column = np.nonzero(values >= OLRP_IOU)
            rows.append(row + first_row[pair])
            columns.append(objects[column + first_object[pair]])
            overlaps.append(values[row, column])
    matched, overlap = np.full(len(images), _UNMATCHED), np.zeros(len(images))
    if not rows:
        return matched, overlap
    row, column, value = np.concatenate(rows), np.concatenate(columns), np.concatenate(overlaps)
    order = np.lexsort((-column, -value, ignored[column], row))
    taken = np.zeros(len(objects), dtype=np.bool_).tolist()
    is_crowd = part.truth.is_crowd.tolist()
    done = _UNMATCHED
    for place, target, share in zip(row[order].tolist(), column[order].tolist(), value[order].tolist(), strict=True):
        if place == done or taken[target]:
            continue
        done = place
        matched[place], overlap[place] = target, share
        taken[target] = not is_crowd[target]
    return matched, overlap


def _group_starts(images: Ints, labels: Ints) -> dict[tuple[int, int], int]:
    """(image, label) -> where its entries begin; those of one pair lie together."""
    changes = np.flatnonzero((np.diff(images, prepend=-1) != 0) | (np.diff(labels, prepend=-1) != 0))
    return {(int(images[start]), int(labels[start])): int(start) for start in changes}


def _rank_in_group(images: Ints, labels: Ints) -> Ints:
    """0, 1, 2, ... within each image and class, whose entries lie together."""
    is_new = (np.diff(images, prepend=-1) != 0) | (np.diff(labels, prepend=-1) != 0)
    places = np.arange(len(images))
    return places - np.maximum.accumulate(np.where(is_new, places, 0))
