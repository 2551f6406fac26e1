"""Which of very many boxes overlap, and what follows from it: exact suppression, hard and soft, in bounded memory.

torchvision's `nms` compares every box that stays with all that follow, hours' worth of pairs where 200,000 objects of a
gigapixel image stay. Here boxes are found by place and size: two boxes overlap by an IoU of t only where their sides
differ by less than a factor of 1/t and their centres by less than (1-t)/(1+t) of their mean side, so that each is
compared with few. Where boxes lie in one heap they are taken in pieces, the best first, and what a piece
suppresses is gone before the next one is looked at. Neither changes a result: they are those of the plain loops.

Who may suppress whom is a matter of groups: a box belongs to one, and looks for others in the groups that it is told.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

# The shortest side (px) that boxes are told apart by; shorter ones are looked for together.
_SMALLEST_PX = 4.0
# Pairs that are held in memory at once.
_MAX_PAIRS = 1_000_000


@dataclass(frozen=True)
class Crowd:
    """Boxes, the best first, and which of them may harm each other.

    Attributes:
        boxes_xyxy: (n, 4) float32.
        groups: (n,) from 0, below 1e6.
        who: (k,), positions of boxes, ascending. A box that is not named harms nobody and is not harmed.
        sought: (k,), the group in which this box looks for others; mutual, so that of two boxes both see each other
            or neither.
        views: (n,), boxes of one view do not harm each other; None: there are no views.
    """

    boxes_xyxy: Floats
    groups: Ints
    who: Ints
    sought: Ints
    views: Ints | None = None

    def take(self, chosen: Ints) -> Crowd:
        """The boxes of these positions, in this order."""
        place = np.full(len(self.boxes_xyxy), -1, dtype=np.int64)
        place[chosen] = np.arange(len(chosen))
        who = place[self.who]
        asking = np.flatnonzero(who >= 0)
        asking = asking[np.argsort(who[asking], kind="stable")]
        views = None if self.views is None else self.views[chosen]
        return Crowd(self.boxes_xyxy[chosen], self.groups[chosen], who[asking], self.sought[asking], views)

    def index(self) -> BoxIndex:
        """Of all the boxes."""
        return BoxIndex(self.boxes_xyxy, self.groups, self.views)

    def num_candidates(self, iou: float) -> int:
        """How many pairs have to be looked at, each from both sides."""
        index, total = self.index(), 0
        for piece in _pieces(np.full(len(self.who), 8)):
            _, start, stop = index.ranges(self.boxes_xyxy[self.who[piece]], self.sought[piece], iou)
            total += int((stop - start).sum())
        return total


def pairwise_iou(first: Floats, second: Floats) -> Floats:
    """IoU of the boxes of two lists, one by one, rounded as torchvision rounds.

    Args:
        first: (n, 4) xyxy.
        second: (n, 4) xyxy.

    Returns:
        (n,) in [0, 1]; NaN for two boxes without area.
    """
    width = np.minimum(first[:, 2], second[:, 2]) - np.maximum(first[:, 0], second[:, 0])
    height = np.minimum(first[:, 3], second[:, 3]) - np.maximum(first[:, 1], second[:, 1])
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    areas = [(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) for boxes in (first, second)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return shared / (areas[0] + areas[1] - shared)


class BoxIndex:
    """Boxes in the order of group, size and place, so that those near another box are found without looking at all.

    A box lies in the level of its longer side (a factor of 2 each), and there in the cell of its centre, whose side is
    half the level's longest.
    """

    def __init__(self, boxes_xyxy: Floats, groups: Ints, views: Ints | None = None) -> None:
        """Sort.

        Args:
            boxes_xyxy: (n, 4), coordinates finite and of a range below 2e6 px.
            groups: (n,) from 0, below 1e6; only boxes of a group that is asked for are found.
            views: (n,), boxes of one view are no pairs; None: there are no views.
        """
        self.boxes = boxes_xyxy
        self._views = views
        boxes = boxes_xyxy.astype(np.float64)
        self._origin = boxes[:, :2].min(0) if len(boxes) else np.zeros(2)
        extent = (boxes[:, 2:].max(0) - self._origin) if len(boxes) else np.zeros(2)
        sides = np.maximum((boxes[:, 2:] - boxes[:, :2]).max(1, initial=0), _SMALLEST_PX)
        levels = np.ceil(np.log2(sides / _SMALLEST_PX)).astype(np.int64)
        self._levels = np.unique(levels)
        self._num_levels = int(levels.max(initial=0)) + 1
        self._num_columns, self._num_rows = (int(side / (_SMALLEST_PX / 2)) + 2 for side in extent.clip(min=0))
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - self._origin
        cells = np.floor(centres / (_SMALLEST_PX / 2 * 2.0**levels)[:, None]).astype(np.int64)
        # Boxes that are turned inside out may have their centre outside; they overlap nothing.
        cells = np.clip(cells, 0, [self._num_columns - 1, self._num_rows - 1])
        keys = self._key(groups, levels, cells[:, 1], cells[:, 0])
        self.order = np.argsort(keys, kind="stable")
        self._keys = keys[self.order]

    def _key(self, groups: Ints, level: Any, rows: Ints, columns: Ints) -> Ints:
        return ((groups * self._num_levels + level) * self._num_rows + rows) * self._num_columns + columns

    def ranges(self, boxes_xyxy: Floats, groups: Ints, iou: float) -> tuple[Ints, Ints, Ints]:
        """Where in `order` those lie that may overlap the given boxes by more than `iou`.

        Args:
            boxes_xyxy: (m, 4), which need not be in the index.
            groups: (m,), the group that is looked for.
            iou: above 0.

        Returns:
            For each stretch the position among the boxes that asked, its start and its end in `order`.
        """
        boxes = boxes_xyxy.astype(np.float64)
        sides = boxes[:, 2:] - boxes[:, :2]
        longer = sides.max(1, initial=0)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2 - self._origin
        # In the order of place the keys that are looked up follow each other, which is several times faster.
        turn = np.lexsort((centres[:, 0], np.floor(centres[:, 1] / 64), groups))
        boxes, sides, longer, centres, groups = boxes[turn], sides[turn], longer[turn], centres[turn], groups[turn]
        found: list[tuple[Ints, Ints, Ints]] = []
        for level in self._levels.tolist():
            longest, cell = _SMALLEST_PX * 2.0**level, _SMALLEST_PX / 2 * 2.0**level
            # The margins cover rounding.
            shortest = 0.0 if level == 0 else longest / 2
            asking = np.flatnonzero((longer * iou <= longest * 1.0001) & (longer * 1.0001 >= shortest * iou))
            reach = sides[asking] + np.minimum(sides[asking] / iou, longest)
            reach = reach * ((1 - iou) / (1 + iou) / 2 * 1.0001) + 0.02
            first = np.floor((centres[asking] - reach) / cell).astype(np.int64).clip(min=0)
            last = np.floor((centres[asking] + reach) / cell).astype(np.int64)
            last = np.minimum(last, [self._num_columns - 1, self._num_rows - 1])
            num_rows = (last[:, 1] - first[:, 1] + 1).clip(min=0)
            num_rows[last[:, 0] < first[:, 0]] = 0
            who, row = spread(num_rows)
            rows = first[who, 1] + row
            start = np.searchsorted(self._keys, self._key(groups[asking[who]], level, rows, first[who, 0]), "left")
            stop = np.searchsorted(self._keys, self._key(groups[asking[who]], level, rows, last[who, 0]), "right")
            some = stop > start
            found.append((asking[who[some]], start[some], stop[some]))
        if not found:
            nothing = np.zeros(0, dtype=np.int64)
            return nothing, nothing, nothing
        who, start, stop = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return turn[who], start, stop

    def pairs(
        self, boxes_xyxy: Floats, ranges: tuple[Ints, Ints, Ints], iou: float, views: Ints | None = None
    ) -> Iterator[tuple[Ints, Ints, Floats]]:
        """The pairs that overlap by more than `iou`, some at a time.

        Args:
            boxes_xyxy: (m, 4), the boxes that asked.
            ranges: what `ranges` found for them, or a part of it.
            iou: above 0.
            views: (m,), those of the boxes that asked.

        Yields:
            Positions among the boxes that asked, positions among those of the index, and their IoU.
        """
        who, start, stop = ranges
        for piece in _pieces(stop - start):
            near, step = spread((stop - start)[piece])
            asking, other = who[piece][near], self.order[start[piece][near] + step]
            if views is not None and self._views is not None:
                apart = views[asking] != self._views[other]
                asking, other = asking[apart], other[apart]
            overlap = pairwise_iou(boxes_xyxy[asking], self.boxes[other])
            over = overlap > np.float64(iou)
            yield asking[over], other[over], overlap[over]


def any_overlap(
    index: BoxIndex,
    asking: Crowd,
    iou: float,
    accept: Callable[[Ints, Ints, Floats], NDArray[np.bool_]] | None = None,
) -> NDArray[np.bool_]:
    """Which boxes overlap one of the index by more than `iou`.

    Args:
        index: what is looked through.
        asking: the boxes and the groups that they look into.
        iou: above 0.
        accept: which of the pairs count, from positions among the asking boxes, positions in the index, and their IoU.

    Returns:
        (m,) bool.
    """
    boxes, views = asking.boxes_xyxy, asking.views
    hit = np.zeros(len(boxes), dtype=np.bool_)
    for piece in _pieces(np.full(len(asking.who), 8)):
        who = asking.who[piece]
        near, start, stop = index.ranges(boxes[who], asking.sought[piece], iou)
        near, length = who[near], 4
        while len(near):
            # A few of each stretch first: in a heap the first one usually settles it.
            ranges = near, start, np.minimum(stop, start + length)
            for found, other, overlap in index.pairs(boxes, ranges, iou, views):
                hit[found if accept is None else found[accept(found, other, overlap)]] = True
            start = start + length
            left = (start < stop) & ~hit[near]
            near, start, stop, length = near[left], start[left], stop[left], length * 4
    return hit


def greedy_suppression(crowd: Crowd, iou: float) -> Ints:
    """Greedy non-maximum suppression, as exact as the plain loop.

    From the first box to the last: one that no box which stays suppresses, stays. A box is suppressed by an earlier one
    that it overlaps by more than `iou` and that may harm it.

    Args:
        crowd: the boxes, the best first.
        iou: above 0.

    Returns:
        (m,), positions of what stays, ascending.
    """
    stays = np.ones(len(crowd.boxes_xyxy), dtype=np.bool_)
    rest = np.unique(crowd.who)
    while len(rest):
        crowd_left = crowd.take(rest)
        size = _piece_size(crowd_left, iou)
        block = crowd_left.take(np.arange(size))
        first, second, _ = _pairs_of_block(block, iou)
        block_stays = _greedy_block(size, first, second)
        stays[rest[:size]] = block_stays
        if size < len(rest):
            kept = block.take(np.flatnonzero(block_stays))
            later = crowd_left.take(np.arange(size, len(rest)))
            hit = any_overlap(kept.index(), later, iou)
            stays[rest[size:]] = ~hit
            rest = rest[size:][~hit]
        else:
            break
    return np.flatnonzero(stays)


def soft_suppression(crowd: Crowd, scores: Floats, sigma: float, iou: float, floor: float) -> Floats:
    """Soft-NMS with the Gaussian penalty (Bodla et al. 2017, Equation 3), as exact as the plain loop.

    The box of the highest score is taken, and those that overlap it and are not taken yet have their scores multiplied
    by exp(-IoU^2 / sigma); then the next one. A box whose score has fallen below `floor` of what it was is out.

    Args:
        crowd: the boxes, the best first; of equal scores the earlier is taken first.
        scores: (n,).
        sigma: above 0.
        iou: overlaps up to this do no harm; above 0.
        floor: a share of the score, above 0.

    Returns:
        (n,) float64, the scores; -1 for what is out.
    """
    now = scores.astype(np.float64)
    least = now * floor
    final = now.copy()
    rest = np.unique(crowd.who)
    while len(rest):
        rest = rest[np.lexsort((rest, -now[rest]))]
        left = crowd.take(rest)
        size = _piece_size(left, iou)
        # What lies outside the piece may be worth this much: below it a box of the piece must wait.
        limit = (-float(now[rest[size]]), int(rest[size])) if size < len(rest) else (np.inf, 0)
        block = left.take(np.arange(size))
        taken = _soft_block(block, now, least, rest[:size], sigma, iou, limit)
        final[rest[taken]] = now[rest[taken]]
        if size < len(rest):
            later = left.take(np.arange(size, len(rest)))
            score, lowest = now[rest[size:]], least[rest[size:]]
            index = block.take(taken).index()
            for piece in _pieces(np.full(len(later.who), 8)):
                who = later.who[piece]
                near, start, stop = index.ranges(later.boxes_xyxy[who], later.sought[piece], iou)
                near = who[near]
                while len(near):
                    # Some of each stretch at a time: in a heap few are enough to put a box out.
                    ranges = near, start, np.minimum(stop, start + 64)
                    for found, _, overlap in index.pairs(later.boxes_xyxy, ranges, iou, later.views):
                        np.multiply.at(score, found, np.exp(-(overlap.astype(np.float64) ** 2) / sigma))
                    start = start + 64
                    more = (start < stop) & (score[near] >= lowest[near])
                    near, start, stop = near[more], start[more], stop[more]
            now[rest[size:]] = score
        open_ = np.ones(len(rest), dtype=np.bool_)
        open_[taken] = False
        out = open_ & (now[rest] < least[rest])
        final[rest[out]] = -1
        rest = rest[open_ & ~out]
    return final


def _piece_size(crowd: Crowd, iou: float) -> int:
    """How many of the boxes, the best first, have about as many pairs as may be held in memory."""
    total, size = crowd.num_candidates(iou), len(crowd.boxes_xyxy)
    return size if total <= 4 * _MAX_PAIRS else max(1, min(size, int(size * (4 * _MAX_PAIRS / total) ** 0.5)))


def _pairs_of_block(crowd: Crowd, iou: float) -> tuple[Ints, Ints, Floats]:
    """All pairs of a piece, each once: the earlier, the later, their IoU, in the order of the earlier."""
    index = crowd.index()
    nothing = np.zeros(0, dtype=np.int64)
    parts: list[tuple[Ints, Ints, Floats]] = [(nothing, nothing, np.zeros(0))]
    for piece in _pieces(np.full(len(crowd.who), 8)):
        who = crowd.who[piece]
        near, start, stop = index.ranges(crowd.boxes_xyxy[who], crowd.sought[piece], iou)
        for found, other, overlap in index.pairs(crowd.boxes_xyxy, (who[near], start, stop), iou, crowd.views):
            later = found > other
            parts.append((other[later], found[later], overlap[later]))
    first, second, overlap = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.lexsort((second, first))
    return first[order], second[order], overlap[order]


def _greedy_block(size: int, first: Ints, second: Ints) -> NDArray[np.bool_]:
    starts = np.searchsorted(first, np.arange(size + 1)).tolist()
    stays, others = bytearray(b"\1" * size), second.tolist()
    for box in np.unique(first).tolist():
        if stays[box]:
            for other in others[starts[box] : starts[box + 1]]:
                stays[other] = 0
    return np.frombuffer(stays, dtype=np.bool_)


def _soft_block(
    crowd: Crowd, now: Floats, least: Floats, names: Ints, sigma: float, iou: float, limit: tuple[float, int]
) -> Ints:
    """Positions in the piece of what is taken before anything outside it can be; changes `now` there."""
    size = len(names)
    first, second, overlap = _pairs_of_block(crowd, iou)
    penalty = np.exp(-(overlap.astype(np.float64) ** 2) / sigma)
    # Each must know the later ones and the earlier ones: once a score has fallen a later box may go first.
    ahead, behind = np.concatenate((first, second)), np.concatenate((second, first))
    order = np.argsort(ahead, kind="stable")
    starts = np.searchsorted(ahead[order], np.arange(size + 1)).tolist()
    others, penalties = behind[order].tolist(), np.concatenate((penalty, penalty))[order].tolist()
    score, lowest, name = now[names].tolist(), least[names].tolist(), names.tolist()
    waiting = list(zip((-now[names]).tolist(), name, range(size), strict=True))  # in order, which is a heap
    open_ = bytearray(b"\1" * size)
    taken: list[int] = []
    while waiting:
        value, _, box = waiting[0]
        if score[box] < lowest[box]:
            heapq.heappop(waiting)
        elif -score[box] != value:
            heapq.heapreplace(waiting, (-score[box], name[box], box))
        elif (value, name[box]) > limit:
            break
        else:
            heapq.heappop(waiting)
            open_[box] = 0
            taken.append(box)
            for position in range(starts[box], starts[box + 1]):
                other = others[position]
                if open_[other]:
                    score[other] *= penalties[position]
    now[names] = score
    return np.array(taken, dtype=np.int64)


def spread(counts: Ints) -> tuple[Ints, Ints]:
    """For counts of 2, 0, 3: whose turn it is (0, 0, 2, 2, 2), and the step (0, 1, 0, 1, 2)."""
    who = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    return who, np.arange(len(who)) - np.repeat(ends - counts, counts)


def _pieces(counts: Ints) -> Iterator[slice]:
    """Slices of a list whose counts sum up to not much more than what may be held in memory."""
    ends = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + _MAX_PAIRS, "right")))
        yield slice(start, stop)
        start = stop
