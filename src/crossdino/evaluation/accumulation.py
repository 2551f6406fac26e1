"""COCO's precision and recall, for any ranges of area and any caps at once: the engine below every AP of ours.

The numbers are those of `pycocotools`, to the last bit. Its `accumulate` walks through every detection for each class,
range, cap and threshold; here a curve is looked at only where a detection is right, since in between precision falls.
What a detection is comes from `match_table`, which matches all thresholds and ranges together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crossdino.evaluation.coco_input import Floats, Found, Ints, Truth
from crossdino.evaluation.match_table import RIGHT, WRONG, MatchTable, match_table, outside_band

COCO_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
LARGEST_AREA = 1e10
"""COCO's upper bound of all areas, in square pixels."""

# COCO's recalls, as its code makes them: recall and these are compared as they are rounded.
_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True)
class Accumulation:
    """What was found of K classes.

    Attributes:
        precision: (T, 101, K, ranges) at COCO's recalls; -1 where there is no object.
        recall: (T, K, ranges, caps); -1 where there is no object.
        num_objects: (K, ranges) objects that are asked for.
        table: what every detection is.
    """

    precision: Floats
    recall: Floats
    num_objects: Ints
    table: MatchTable


def accumulate(
    truth: Truth,
    found: Found,
    ranges: Sequence[tuple[float, float]],
    caps: Sequence[int],
    thresholds: Floats = COCO_IOU_THRESHOLDS,
    precision_cap: int | None = None,
) -> Accumulation:
    """Precision and recall of all classes.

    Args:
        truth: the annotations. One whose area lies outside a range, and one that is ignored, is not asked for: a
            detection may take it, once, and is then neither right nor wrong. Neither are crowds, which many may take.
        found: the detections.
        ranges: lower and upper bound of the area in square pixels, both inclusive.
        caps: so many of the best detections of an image and class count, for recall.
        thresholds: (T,) ascending.
        precision_cap: the one of the caps that counts for precision; None: the largest.
    """
    bands = np.array(ranges, dtype=np.float64)
    table = match_table(found, truth, thresholds, bands, max(caps))
    asked = ~outside_band(truth, bands)
    num_classes = len(truth.category_ids)
    num_objects = np.stack([np.bincount(truth.labels[own], minlength=num_classes) for own in asked.T], axis=1)
    precision = np.full((len(thresholds), len(_RECALLS), num_classes, len(bands)), -1.0)
    recall = np.full((len(thresholds), num_classes, len(bands), len(caps)), -1.0)
    for label in range(num_classes):
        members = table.of_class(label)
        row, ranks, in_band = table.row[members], table.ranks[members], table.in_band[members]
        counts = ranks < (max(caps) if precision_cap is None else precision_cap)
        told = np.flatnonzero(row >= 0)
        # Those that meet no object are wrong at every threshold: how many there are above each of the others.
        alone = np.cumsum((counts & (row < 0))[:, None] & in_band, axis=0, dtype=np.int32)[told]
        outcomes, ranks, counts = table.outcomes[row[told]], ranks[told], counts[told]
        needed = hits_for_recalls(num_objects[label])
        for band in np.flatnonzero(num_objects[label]):
            of_band = np.ascontiguousarray(outcomes[:, :, band].T)
            threshold, place = np.nonzero(of_band == RIGHT)
            for column, cap in enumerate(caps):
                hits = np.bincount(threshold[ranks[place] < cap], minlength=len(thresholds))
                recall[:, label, band, column] = hits / num_objects[label, band]
            wrong = np.cumsum((of_band == WRONG) & counts, axis=1, dtype=np.int32)
            kept = counts[place]
            threshold, place = threshold[kept], place[kept]
            num_wrong = wrong[threshold, place] + alone[place, band]
            precision[:, :, label, band] = _at_recalls(threshold, num_wrong, needed[band], len(thresholds))
    return Accumulation(precision, recall, num_objects, table)


def hits_for_recalls(num_objects: Ints) -> Ints:
    """(B, 101) how many right detections reach each of COCO's recalls, where there are so many objects."""
    many = np.maximum(num_objects, 1)[:, None]
    needed = np.ceil(_RECALLS * many).astype(np.int64)
    needed -= (needed - 1) / many >= _RECALLS
    needed += needed / many < _RECALLS
    return needed


def _at_recalls(threshold: Ints, num_wrong: Ints, needed: Ints, num_thresholds: int) -> Floats:
    """(T, 101) the best precision at each recall or beyond, 0 at recalls that are not reached.

    Args:
        threshold: (h,) of each right detection, ascending; those of one threshold from the best to the worst.
        num_wrong: (h,) wrong detections above each.
        needed: (101,) see `hits_for_recalls`.
        num_thresholds: T.
    """
    bounds = np.searchsorted(threshold, np.arange(num_thresholds + 1))
    begins, ends = bounds[:-1, None], bounds[1:, None]
    num_right = np.arange(len(threshold)) - bounds[threshold] + 1
    # The smallest addend, as COCO has it, makes a first hit worth a little less than 1.
    precision = np.append(num_right / (num_wrong + num_right + np.spacing(1)), 0.0)
    # The best from one recall to the next (the end after the last), then from there on.
    places = np.minimum(begins + np.maximum(needed - 1, 0), ends)
    steps = np.concatenate((places, ends), axis=1)
    best = np.maximum.reduceat(precision, steps.ravel()).reshape(steps.shape)[:, :-1]
    best = np.where(places < ends, best, 0.0)
    return np.maximum.accumulate(best[:, ::-1], axis=1)[:, ::-1]


def mean_defined(values: Floats) -> float:
    """Mean over the entries that are defined (neither -1 nor NaN), all of equal weight as COCO has it; NaN if none."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else float("nan")


def at_threshold(thresholds: Floats, value: float) -> Ints:
    """Indices of the IoU threshold `value`; empty if it is not among them."""
    return np.flatnonzero(np.isclose(thresholds, value))
