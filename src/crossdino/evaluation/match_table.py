"""Which detection is right at which IoU and in which size band, for a whole data set at once.

The rules are those of COCO (`COCOeval.evaluateImg` of pycocotools), to which the tests hold this. The matching of an
image does not depend on the others, so that it is done once and serves every resample of the images
(`bootstrap`) as well as the numbers themselves (`accumulation`). Two kinds of objects are not asked for: *crowds*,
which may hold any number of detections and are compared by the share of the detection that they cover, and objects
that are *ignored* (outside the size band, or flagged as SODA-D does), which are matched like others, after all real
ones and once.

All IoU thresholds and size bands are matched together: step s takes the s-th detection that overlaps anything, of
every image and class, and lets it choose for all thresholds and bands.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from crossdino.evaluation.coco_input import Found, Truth

# What a detection is at one threshold and in one band. `OUTSIDE`: it does not count, neither for nor against.
OUTSIDE, WRONG, RIGHT = 0, 1, 2

_PAIRS_AT_ONCE = 2_000_000
_CHOICES_AT_ONCE = 100_000
_FARTHEST_PX = 1e7
_NEVER = np.int32(2**30)
_AFTER_REAL = np.int32(2**29)


@dataclass(frozen=True)
class MatchTable:
    """What every detection is, sorted by class, descending score, image and place in the file.

    Only detections that overlap an object enough for the lowest threshold are told one by one (`outcomes`); all others
    are wrong in the bands that hold their area, and outside of the rest.

    Attributes:
        images, labels, scores: (n,), of the sorted detections.
        ranks: (n,) int64, place by score among the detections of the same image and class, from 0.
        in_band: (n, R) bool, whether the detection's area lies in the band.
        row: (n,) int64, the detection's row in `outcomes`, -1 without.
        outcomes: (c, T, R) int8, `RIGHT`, `WRONG` or `OUTSIDE`.
        overlaps: (c,) overlap with what it takes at the first threshold in the first band, 0 where it takes nothing.
    """

    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]
    ranks: NDArray[np.int64]
    in_band: NDArray[np.bool_]
    row: NDArray[np.int64]
    outcomes: NDArray[np.int8]
    overlaps: NDArray[np.float64]

    def of_class(self, label: int) -> slice:
        """Where the detections of a class are."""
        return slice(*np.searchsorted(self.labels, (label, label + 1)).tolist())

    def outcomes_of(self, chosen: slice, band: int) -> NDArray[np.int8]:
        """(n, T) what the chosen detections are in one band."""
        alone = np.where(self.in_band[chosen, band], np.int8(WRONG), np.int8(OUTSIDE))
        result = np.repeat(alone[:, None], self.outcomes.shape[1], axis=1)
        row = self.row[chosen]
        result[row >= 0] = self.outcomes[row[row >= 0], :, band]
        return result


def outside_band(objects: Truth, bands: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(m, R) whether an object is not asked for in a band: its area lies outside, or it is a crowd or ignored.

    Args:
        objects: m objects, crowds among them.
        bands: (R, 2) lower and upper area in square pixels, both inclusive.
    """
    outside = (objects.areas[:, None] < bands[:, 0]) | (objects.areas[:, None] > bands[:, 1])
    return outside | (objects.is_crowd | objects.is_ignored)[:, None]


def match_table(
    found: Found, objects: Truth, thresholds: NDArray[np.float64], bands: NDArray[np.float64], most: int
) -> MatchTable:
    """Match detections and objects at all thresholds and in all bands.

    Args:
        found: detections; of equal scores in an image the earlier one chooses first.
        objects: the truth; an object that comes later wins where the overlap is equal.
        thresholds: (T,) IoU in (0, 1].
        bands: (R, 2) lower and upper area in square pixels, both inclusive.
        most: best detections of an image and class that count.
    """
    found, ranks, group = _best_of_each_group(found, most)
    with np.errstate(over="ignore", under="ignore"):
        areas = found.boxes_xywh[:, 2] * found.boxes_xywh[:, 3]
    in_band = (areas[:, None] >= bands[:, 0]) & (areas[:, None] <= bands[:, 1])
    least = np.minimum(thresholds, 1 - 1e-10)
    detection, target, overlap = _overlapping_pairs(found, objects, float(least.min()))
    row = np.full(len(ranks), -1, dtype=np.int64)
    having = detection[_starts(detection)]
    row[having] = np.arange(len(having))
    # The detections of a group follow each other, best first: the s-th of those that overlap anything goes in step s.
    first_of_group = _starts(group[having])
    lengths = np.diff(np.r_[first_of_group, len(having)])
    step = np.arange(len(having)) - np.repeat(first_of_group, lengths)
    outcomes, overlaps = _choose(
        (row[detection], target, overlap), step, outside_band(objects, bands), objects.is_crowd, least, in_band[having]
    )
    order = np.lexsort((np.arange(len(ranks)), found.images, -found.scores, found.labels))
    return MatchTable(
        found.images[order],
        found.labels[order],
        found.scores[order],
        ranks[order],
        in_band[order],
        row[order],
        outcomes,
        overlaps,
    )


def _starts(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where runs of one value begin."""
    return np.flatnonzero(np.r_[True, values[1:] != values[:-1]]) if len(values) else np.empty(0, dtype=np.int64)


def _best_of_each_group(found: Found, most: int) -> tuple[Found, NDArray[np.int64], NDArray[np.int64]]:
    """The best `most` detections of each image and class, group by group; their ranks; the number of their group."""
    order = np.lexsort((np.arange(len(found.scores)), -found.scores, found.labels, found.images))
    found = found[order]
    if not len(order):
        return found, order, order
    starts = np.r_[True, (found.images[1:] != found.images[:-1]) | (found.labels[1:] != found.labels[:-1])]
    group = np.cumsum(starts) - 1
    ranks = np.arange(len(order)) - np.flatnonzero(starts)[group]
    kept = np.flatnonzero(ranks < most)
    return found[kept], ranks[kept], group[kept]


def _overlapping_pairs(
    found: Found, objects: Truth, least: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Detection, object and overlap of every pair of one image and class that overlaps by `least` or more.

    Sorted by detection, the highest overlap first and of equal ones the object that comes last.
    """
    none = np.empty(0, dtype=np.int64)
    if not len(found.images) or not len(objects.images):
        return none, none, np.empty(0)
    # Objects sorted by group and left edge; a detection can only meet those whose left edge lies between its own left
    # edge less the widest object of the group, and its right edge.
    num_labels = int(max(found.labels.max(), objects.labels.max())) + 1
    keys = objects.images * num_labels + objects.labels
    by_left = np.lexsort((objects.boxes_xywh[:, 0], keys))
    groups, starts, index = np.unique(keys[by_left], return_index=True, return_inverse=True)
    ends = np.r_[starts[1:], len(by_left)]
    widest = np.maximum.reduceat(objects.boxes_xywh[by_left, 2], starts)
    own = np.searchsorted(groups, keys_of := found.images * num_labels + found.labels)
    own = np.minimum(own, len(groups) - 1)
    candidates = np.flatnonzero(groups[own] == keys_of)
    own = own[candidates]
    lefts, widths = found.boxes_xywh[candidates, 0], found.boxes_xywh[candidates, 2]
    object_lefts = _within(objects.boxes_xywh[by_left, 0])
    with np.errstate(over="ignore"):
        begins, ends_at = _within(lefts - widest[own]), _within(lefts + widths)
    lowest = min(float(object_lefts.min()), float(begins.min(initial=0)))
    span = max(float(object_lefts.max()), float(ends_at.max(initial=0))) - lowest + 1
    line = index * span + (object_lefts - lowest)
    # The sums above are rounded; a little more room on both sides, the overlap itself decides.
    room = 1e-13 * (span * (len(groups) + 1) + abs(lowest))
    first = np.searchsorted(line, own * span + (begins - lowest) - room, side="left")
    last = np.searchsorted(line, own * span + (ends_at - lowest) + room, side="right")
    first, last = np.maximum(first, starts[own]), np.minimum(last, ends[own])
    counts = np.maximum(last - first, 0)

    parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
    cuts = np.searchsorted(np.cumsum(counts), np.arange(_PAIRS_AT_ONCE, counts.sum(), _PAIRS_AT_ONCE))
    for chunk in np.split(np.arange(len(candidates)), np.unique(cuts)):
        many = counts[chunk]
        detection = np.repeat(candidates[chunk], many)
        offset = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
        target = by_left[np.repeat(first[chunk], many) + offset]
        overlap = _overlaps(found.boxes_xywh[detection], objects.boxes_xywh[target], objects.is_crowd[target])
        kept = overlap >= least
        parts.append((detection[kept], target[kept], overlap[kept]))
    detection, target, overlap = (np.concatenate(values) for values in zip(*parts, strict=True))
    order = np.lexsort((-target, -overlap, detection))
    return detection[order], target[order], overlap[order]


def _within(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coordinates in the same order, none of them so large that others drown in its rounding."""
    return np.clip(places, -_FARTHEST_PX, _FARTHEST_PX)


def _overlaps(
    found: NDArray[np.float64], objects: NDArray[np.float64], is_crowd: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """IoU of pairs of boxes, or the share of the detection that a crowd covers; 0 for boxes without any size."""
    # In the order of operations of COCO, so that pairs that lie exactly on a threshold fall on the same side.
    # Far from the origin, boxes of next to no size share more than they have, by rounding; COCO divides all the same.
    with np.errstate(all="ignore"):
        corner = np.minimum(found[:, :2] + found[:, 2:], objects[:, :2] + objects[:, 2:])
        sides = corner - np.maximum(found[:, :2], objects[:, :2])
        shared = np.where((sides[:, 0] > 0) & (sides[:, 1] > 0), sides[:, 0] * sides[:, 1], 0.0)
        own = found[:, 2] * found[:, 3]
        union = np.where(is_crowd, own, own + objects[:, 2] * objects[:, 3] - shared)
        return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def _choose(
    pairs: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]],
    step: NDArray[np.int64],
    unasked: NDArray[np.bool_],
    is_crowd: NDArray[np.bool_],
    least: NDArray[np.float64],
    in_band: NDArray[np.bool_],
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """What the c detections that overlap anything are, and the overlaps of the first threshold and band.

    Args:
        pairs: row in c, object and overlap, sorted by row, then best first.
        step: (c,) when a detection chooses; those of one step have no object in common.
        unasked: (m, R) see `outside_band`.
        is_crowd: (m,).
        least: (T,) thresholds.
        in_band: (c, R) whether the detection's area lies in the band.

    Returns:
        See `MatchTable.outcomes` and `MatchTable.overlaps`.
    """
    row, target, overlap = pairs
    num_thresholds, num_bands = len(least), unasked.shape[1]
    outcomes = np.empty((len(step), num_thresholds, num_bands), dtype=np.int8)
    overlaps = np.zeros(len(step))
    taken = np.zeros((len(is_crowd), num_thresholds, num_bands), dtype=bool)
    by_step = np.argsort(step[row], kind="stable")
    row, target, overlap = row[by_step], target[by_step], overlap[by_step]
    firsts = _starts(row)
    # A step may be cut anywhere, but two steps are never done together.
    of_steps = np.searchsorted(step[row[firsts]], np.arange(int(step.max(initial=-1)) + 2))
    cuts = np.unique(np.r_[of_steps, np.arange(0, len(firsts), _CHOICES_AT_ONCE)])
    for first, last in pairwise(cuts.tolist()):
        begin, end = int(firsts[first]), int(firsts[last]) if last < len(firsts) else len(row)
        targets, starts = target[begin:end], firsts[first:last] - begin
        place = np.arange(end - begin, dtype=np.int32)
        # The best free object, all real ones before all others.
        cost = place[:, None] + _AFTER_REAL * unasked[targets]
        able = (overlap[begin:end, None] >= least)[:, :, None] & ~taken[targets]
        best = np.minimum.reduceat(np.where(able, cost[:, None, :], _NEVER), starts, axis=0)
        matched, real = best < _NEVER, best < _AFTER_REAL
        owners = row[begin:end][starts]
        outcomes[owners] = np.where(
            matched, np.where(real, np.int8(RIGHT), np.int8(OUTSIDE)), in_band[owners, None, :].astype(np.int8) * WRONG
        )
        overlaps[owners] = np.where(matched[:, 0, 0], overlap[begin + best[:, 0, 0] % _AFTER_REAL], 0.0)
        _, threshold, band = which = np.nonzero(matched)
        chosen = targets[best[which] % _AFTER_REAL]
        once = ~is_crowd[chosen]
        taken[chosen[once], threshold[once], band[once]] = True
    return outcomes, overlaps
