"""Average precision of many resamples of the images (the bootstrap), exactly and fast.

A resample draws as many images as there are, with replacement; it is told by how often each image was drawn. Matching
is done once (`match_table`); the number of right and wrong detections above every place of a precision-recall curve is
then a sum over images, for all resamples together: a sparse matrix (places x images) times the counts (images x
resamples). Only the places where right detections are followed by a wrong one are needed, because precision rises up to
there and the interpolated precision of COCO is the best one at any higher recall.

The numbers equal those of the duplicated data set, in which the copies of an image follow each other. That includes
detections of equal score, which are taken image by image: where right and wrong ones of one image have the same score,
its copies are told apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from crossdino.evaluation.accumulation import hits_for_recalls
from crossdino.evaluation.match_table import RIGHT, WRONG
from crossdino.parallel import in_processes, nobody_waits

_RESAMPLES_AT_ONCE = 64


@dataclass(frozen=True)
class Curve:
    """The precision-recall curves of one class and band, those of all IoU thresholds one after the other.

    Attributes:
        right, wrong: (places, columns) detections between the place before and this one; a column is an image, or a
            certain copy of it.
        bounds: (T + 1,) where each threshold's places begin.
        num_columns: the number of images, or a multiple of it where copies are told apart.
    """

    right: csr_array
    wrong: csr_array
    bounds: NDArray[np.int64]
    num_columns: int


@dataclass(frozen=True)
class ClassInBand:
    """What is known of one class in one size band; small enough to be sent to another process.

    Attributes:
        images, scores, ranks: of its n detections, sorted by descending score, image and place in the file.
        outcomes: (n, T) int8, see `match_table`.
        object_images: the image of each object that is asked for.
        cap: best detections of an image that count for precision.
        recall_caps: the same for recall, one after the other.
    """

    images: NDArray[np.int64]
    scores: NDArray[np.float64]
    ranks: NDArray[np.int64]
    outcomes: NDArray[np.int8]
    object_images: NDArray[np.int64]
    cap: int
    recall_caps: tuple[int, ...]


@lru_cache(maxsize=1)
def draw_images(num_images: int, num_resamples: int, seed: int) -> NDArray[np.uint16]:
    """(N, 1 + B) how often each image is drawn.

    The first column is the data set itself, every image once. Each resample depends on the seed and on its number only.
    """
    drawn = np.ones((num_images, 1 + num_resamples), dtype=np.uint16)
    for number in range(num_resamples):
        images = np.random.default_rng([seed, number]).integers(0, num_images, num_images)
        drawn[:, 1 + number] = np.bincount(images, minlength=num_images)
    return drawn


def resampled(
    item: ClassInBand, drawn: NDArray[np.uint16], copies: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Average precision and recall of a class in B resamples.

    Args:
        item: the class.
        drawn: (N, B) how often each image is drawn.
        copies: how often an image is drawn at most.

    Returns:
        (T, B) precision and (caps, T, B) recall; NaN where the class has no object.
    """
    num_images = len(drawn)
    curve = build_curve(item, num_images, copies)
    in_images = np.bincount(item.object_images, minlength=num_images)
    hits = [_hits(item, cap, num_images) for cap in item.recall_caps]
    num_thresholds = item.outcomes.shape[1]
    precision = np.full((num_thresholds, drawn.shape[1]), np.nan)
    recall = np.full((len(hits), num_thresholds, drawn.shape[1]), np.nan)
    for begin in range(0, drawn.shape[1], _RESAMPLES_AT_ONCE):
        if nobody_waits():
            break
        part = slice(begin, begin + _RESAMPLES_AT_ONCE)
        counts = drawn[:, part].astype(np.int32)
        num_objects = in_images @ counts.astype(np.int64)
        columns = counts
        if curve.num_columns > num_images:
            columns = np.concatenate([counts, *((counts > copy).astype(np.int32) for copy in range(copies))])
        precision[:, part] = curve_precision(curve, columns, num_objects)
        for place, found in enumerate(hits):
            recall[place, :, part] = np.where(num_objects > 0, (found @ counts) / np.maximum(num_objects, 1), np.nan)
    return precision, recall


def _hits(item: ClassInBand, cap: int, num_images: int) -> csr_array:
    """(T, N) right detections."""
    place, threshold = np.nonzero((item.outcomes == RIGHT) & (item.ranks < cap)[:, None])
    order = np.argsort(threshold, kind="stable")
    return _counts(threshold[order], item.images[place[order]], (item.outcomes.shape[1], num_images))


def build_curve(item: ClassInBand, num_images: int, copies: int) -> Curve:
    """The curves of one class in one band.

    Args:
        item: its detections.
        num_images: N.
        copies: how often an image is drawn at most; its copy c > 0 is column c x N + image.
    """
    used = np.flatnonzero(item.ranks < item.cap)
    images, scores, outcomes = item.images[used], item.scores[used], item.outcomes[used]
    block = np.cumsum(np.r_[True, (images[1:] != images[:-1]) | (scores[1:] != scores[:-1])][: len(images)]) - 1
    has_ties = bool(len(block)) and block[-1] + 1 < len(block)
    parts: list[tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]] = []
    bounds, num_columns = [0], num_images
    for outcome in outcomes.T:
        counted = np.flatnonzero(outcome >= WRONG)
        right = outcome[counted] == RIGHT
        # Wrong detections after the last right one (and after what has its score) change nothing.
        last = block[counted[np.flatnonzero(right)[-1]]] if right.any() else -1
        counted = counted[: np.searchsorted(block[counted], last, side="right")]
        right, columns = right[: len(counted)], images[counted]
        if has_ties:
            right, columns = _copies_apart(right, columns, block[counted], num_images, copies)
            num_columns = num_images * (1 + copies) if columns.max(initial=0) >= num_images else num_columns
        place = np.cumsum(np.r_[False, right[:-1] & ~right[1:]][: len(right)])
        parts.append((bounds[-1] + place, right, columns))
        bounds.append(bounds[-1] + (int(place[-1]) + 1 if len(place) else 0))
    places, rights, columns = (np.concatenate(values) for values in zip(*parts, strict=True))
    shape = (bounds[-1], num_columns)
    return Curve(
        _counts(places[rights], columns[rights], shape),
        _counts(places[~rights], columns[~rights], shape),
        np.array(bounds),
        num_columns,
    )


def _copies_apart(
    right: NDArray[np.bool_], images: NDArray[np.int64], block: NDArray[np.int64], num_images: int, copies: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Where right and wrong detections of an image have one score: those of its first copy, of its second, ..."""
    num_right, num_all = np.bincount(block, right), np.bincount(block)
    mixed = ((num_right > 0) & (num_right < num_all))[block]
    if not mixed.any():
        return right, images
    many = np.where(mixed, copies, 1)
    place = np.repeat(np.arange(len(right)), many)
    copy = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
    order = np.lexsort((place, copy, block[place]))
    place, copy = place[order], copy[order]
    return right[place], np.where(mixed[place], (1 + copy) * num_images, 0) + images[place]


def _counts(rows: NDArray[np.int64], columns: NDArray[np.int64], shape: tuple[int, int]) -> csr_array:
    """Ones at the given places; `rows` ascends."""
    starts = np.searchsorted(rows, np.arange(shape[0] + 1)).astype(np.int32)
    return csr_array((np.ones(len(rows), dtype=np.int32), columns.astype(np.int32), starts), shape=shape)


def curve_precision(curve: Curve, drawn: NDArray[np.int32], num_objects: NDArray[np.int64]) -> NDArray[np.float64]:
    """(T, B) average precision of a class in B resamples; NaN where it has no object.

    Args:
        curve: of the class.
        drawn: (columns, B) how often a column counts.
        num_objects: (B,) objects of the class.
    """
    num_resamples = drawn.shape[1]
    result = np.zeros((len(curve.bounds) - 1, num_resamples))
    needed = hits_for_recalls(num_objects)
    rights, wrongs = curve.right @ drawn, curve.wrong @ drawn
    line = np.arange(num_resamples)[:, None]
    for threshold, (begin, end) in enumerate(pairwise(curve.bounds.tolist())):
        size = end - begin
        if not size:
            continue
        # A row is a resample from here on: sums along rows are many times faster than along columns.
        right = np.cumsum(np.ascontiguousarray(rights[begin:end].T), axis=1, dtype=np.int32)
        total = np.cumsum(np.ascontiguousarray(wrongs[begin:end].T), axis=1, dtype=np.int32) + right
        precision = np.zeros(num_resamples * size + 1)
        np.divide(right.ravel(), np.maximum(total, 1).ravel(), out=precision[:-1])
        # One search for all resamples: each on its own stretch of the number line.
        stretch = max(int(right[:, -1].max()), int(needed.max())) + 1
        place = np.searchsorted((right + line * stretch).ravel(), (needed + line * stretch).ravel())
        place = np.minimum(place.reshape(needed.shape), (line + 1) * size)
        # The best precision from one recall to the next (the end of the row after the last), then from there on.
        steps = np.concatenate((place, (line + 1) * size), axis=1)
        best = np.maximum.reduceat(precision, steps.ravel()).reshape(steps.shape)[:, :-1]
        best = np.where(place < (line + 1) * size, best, 0.0)
        result[threshold] = np.maximum.accumulate(best[:, ::-1], axis=1).mean(axis=1)
    result[:, num_objects == 0] = np.nan
    return result


@dataclass(frozen=True)
class _Task:
    """A class whose turn it is, with some of the resamples: the data set itself and those of the given numbers."""

    item: ClassInBand
    num_images: int
    num_resamples: int
    seed: int
    begin: int
    end: int


def _do(task: _Task) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    drawn = draw_images(task.num_images, task.num_resamples, task.seed)
    return resampled(task.item, drawn[:, task.begin : task.end], int(drawn.max()))


def resample_classes(
    items: Sequence[ClassInBand],
    num_images: int,
    num_resamples: int,
    seed: int,
    *,
    num_processes: int = 1,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """`resampled` for many classes, in several processes.

    Args:
        items: the classes, those of several data sets over the same images too.
        num_images: N.
        num_resamples: B.
        seed: of the resamples.
        num_processes: at the same time; 1 computes here.
        on_progress: called with the number of finished classes.

    Returns:
        For each item (T, 1 + B) precision and (caps, T, 1 + B) recall; they do not depend on `num_processes`.
    """
    # Enough pieces for everybody, of whole chunks each; a curve is built once for each piece.
    pieces = min(max(1, math.ceil(3 * num_processes / max(len(items), 1))), 1 + num_resamples // _RESAMPLES_AT_ONCE)
    size = math.ceil((1 + num_resamples) / pieces / _RESAMPLES_AT_ONCE) * _RESAMPLES_AT_ONCE
    begins = range(0, 1 + num_resamples, size)
    tasks = [
        (place, _Task(item, num_images, num_resamples, seed, begin, min(begin + size, 1 + num_resamples)))
        for place, item in enumerate(items)
        for begin in begins
    ]
    # The largest ones first, so that nobody is left with one of them at the end.
    tasks.sort(key=lambda entry: -len(entry[1].item.images))
    parts: dict[tuple[int, int], tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for position, part in in_processes(_do, [task for _, task in tasks], num_processes):
        place, task = tasks[position]
        parts[place, task.begin] = part
        on_progress(len(parts) // len(begins))
    joined = []
    for place in range(len(items)):
        mine = [parts[place, begin] for begin in begins]
        joined.append((np.concatenate([part[0] for part in mine], 1), np.concatenate([part[1] for part in mine], 2)))
    return joined
