"""Merging: how the detections of an image's tiles become those of the image.

Three ways, of which `seam` is our own. Overlapping boxes are found by `crossdino.suppression`, exactly and fast.

- `nms`: class-wise greedy non-maximum suppression of all boxes, as torchvision does it.
- `soft`: class-wise Gaussian soft-NMS (Bodla et al. 2017) between boxes of different tiles.
- `seam`: knows where the seams are. What a tile has cut off gives way to what another tile saw whole, or is joined
  to its other parts; then greedy suppression between boxes of different tiles.

In `soft` and `seam` boxes of one tile do not harm each other unless they are nearly the same: a DETR gives a set, and
two boxes of one set that overlap are two objects by the model's own opinion. Near doubles go first, which also bounds
the heaps that the rest has to look through.

Without an overlap of the tiles, two objects of a class that touch at a seam and agree along it look like one object
that was cut, and `seam` joins them; an overlap of 8 px or more keeps them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from crossdino.errors import InputError
from crossdino.suppression import (
    BoxIndex,
    Crowd,
    Floats,
    Ints,
    any_overlap,
    greedy_suppression,
    pairwise_iou,
    soft_suppression,
    spread,
)
from crossdino.tiling import Tile

MergeMode = Literal["seam", "nms", "soft"]

_NONE = np.zeros(0, dtype=np.int64)

# A box that ends this close to an inner border of its tile counts as cut by it: pixels, or a share of its side there,
# whichever is more, but not more than the last.
_SEAM_PX, _SEAM_RATIO, _SEAM_MAX_PX = 2.0, 0.06, 12.0
# What a whole box needs of a part's score to replace it.
_WORTH = 0.5
# A part is replaced as well if this share of it is covered, from this overlap on.
_COVERED, _SLIVER_IOU = 0.6, 0.1
# Soft-NMS leaves alone what overlaps by less (a factor of 0.98), and drops what has this share left of its score.
_SOFT_IOU, _SOFT_FLOOR = 0.1, 0.01
# Two boxes of one tile are two by the model's own opinion, unless they overlap by more than this.
_OWN_IOU = 0.7
# Overlap of what two tiles saw of an object along their seam from which its parts are joined.
_JOIN_IOU = 0.5


@dataclass(frozen=True)
class _Boxes:
    """Detections in pixels of the image, the best first.

    Attributes:
        boxes: (n, 4) float32 xyxy.
        scores: (n,).
        labels: (n,) contiguous from 0.
        views: (n,) the tile that a box is from; the number of tiles for the look at the whole image, one more for
            boxes that were joined.
        cut: (n, 4) bool, whether the tile's left, upper, right, lower border has cut the box.
    """

    boxes: Floats
    scores: Floats
    labels: Ints
    views: Ints
    cut: NDArray[np.bool_]

    def take(self, chosen: NDArray[np.bool_] | Ints) -> _Boxes:
        return _Boxes(*(value[chosen] for value in vars(self).values()))

    def sorted(self) -> _Boxes:
        return self.take(np.argsort(-self.scores, kind="stable"))

    def joined_with(self, other: _Boxes) -> _Boxes:
        return _Boxes(*(np.concatenate(pair) for pair in zip(vars(self).values(), vars(other).values(), strict=True)))


def merge_detections(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]],
    tiles: Sequence[Tile],
    image_hw: tuple[int, int],
    iou: float = 0.5,
    mode: MergeMode = "seam",
    full: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The detections of an image from those of its tiles.

    Args:
        parts: for every tile boxes (n, 4) xyxy in pixels of the tile, scores (n,), labels (n,) int64; on the CPU.
        tiles: where the tiles lie; of any sizes and overlaps.
        image_hw: the image's height and width.
        iou: overlap of two boxes of a class from which they are taken for one object, above 0 and up to 1. `soft` has
            no such border: there a score is multiplied by exp(-1/2) at this overlap (sigma = 2 iou^2, which is the
            paper's 0.5 at 0.5).
        mode: `seam`, `nms` or `soft`.
        full: the same triple from a look at the whole (reduced) image, in pixels of the image: its boxes that no tile
            holds are joined in.

    Returns:
        Boxes (m, 4) float32 in pixels of the image and inside it, scores (m,), labels (m,), the best first. Of equal
        scores the one given first comes first. Boxes outside the image, and such with a coordinate or score that is
        no finite number, are left out.

    Raises:
        InputError: the mode or the overlap is not one of those.
    """
    if mode not in ("seam", "nms", "soft"):
        raise InputError(f"merge is {mode!r}: give seam, nms or soft")
    if not 0 < iou <= 1:
        raise InputError(f"merge_iou is {iou}: give a number above 0, up to 1")
    corners = np.array([[t.left, t.top, t.left + t.width, t.top + t.height] for t in tiles], dtype=np.float64)
    corners = corners.reshape(-1, 4)
    found, names = _collect(parts, tiles, corners, image_hw, full)
    if mode == "nms":
        kept = found.take(_suppressed(found, found.labels, iou))
    else:
        views = _Views(corners, image_hw, len(names))
        # From then on only boxes of different tiles harm each other.
        found = found.take(_suppressed(found, views.groups(found), max(iou, _OWN_IOU)))
        if mode == "seam":
            found = _merge_parts(found, views, iou)
            kept = found.take(_suppressed(found, found.labels, iou, found.views))
        else:
            seen_twice = np.unique(views.others(found.boxes, found.views)[0])
            crowd = Crowd(found.boxes, found.labels, seen_twice, found.labels[seen_twice], found.views)
            scores = soft_suppression(crowd, found.scores, 2 * iou**2, _SOFT_IOU, _SOFT_FLOOR)
            kept = replace(found, scores=scores.astype(found.scores.dtype)).take(scores >= 0).sorted()
    return torch.from_numpy(kept.boxes), torch.from_numpy(kept.scores), torch.from_numpy(names[kept.labels])


def _suppressed(found: _Boxes, groups: Ints, iou: float, views: Ints | None = None) -> Ints:
    """What greedy suppression leaves of each group; boxes of one view do not harm each other."""
    return greedy_suppression(Crowd(found.boxes, groups, np.arange(len(groups)), groups, views), iou)


def _collect(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]],
    tiles: Sequence[Tile],
    corners: Floats,
    image_hw: tuple[int, int],
    full: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[_Boxes, Ints]:
    """All detections, the best first, and the labels that their numbers stand for."""
    height, width = image_hw
    triples = [
        (boxes.numpy().reshape(-1, 4) + np.array([tile.left, tile.top] * 2, dtype=np.float32), scores, labels)
        for (boxes, scores, labels), tile in zip(parts, tiles, strict=True)
    ]
    views = np.repeat(np.arange(len(tiles)), [len(boxes) for boxes, _, _ in triples])
    if full is not None:
        boxes = full[0].numpy().reshape(-1, 4)
        free = ~_held(boxes, corners)
        triples.append((boxes[free], full[1][torch.from_numpy(free)], full[2][torch.from_numpy(free)]))
        views = np.concatenate((views, np.full(free.sum(), len(tiles))))
    if not triples:
        triples = [(np.zeros((0, 4), dtype=np.float32), torch.zeros(0), torch.zeros(0, dtype=torch.int64))]
    boxes = np.concatenate([triple[0] for triple in triples]).astype(np.float32)
    scores = torch.cat([triple[1] for triple in triples]).numpy()
    names, labels = np.unique(torch.cat([triple[2] for triple in triples]).numpy(), return_inverse=True)
    cut = _at_seam(boxes, views, corners, image_hw)
    usable = np.isfinite(boxes).all(1) & np.isfinite(scores)
    usable &= (boxes[:, 0] < width) & (boxes[:, 1] < height) & (boxes[:, 2] > 0) & (boxes[:, 3] > 0)
    # A tile may reach beyond a small image.
    boxes = np.clip(boxes, 0, np.array([width, height] * 2, dtype=np.float32))
    return _Boxes(boxes, scores, labels, views, cut).take(usable).sorted(), names


def _at_seam(boxes: Floats, views: Ints, corners: Floats, image_hw: tuple[int, int]) -> NDArray[np.bool_]:
    """(n, 4) bool: which sides of the boxes end at a border of their tile that is not one of the image."""
    height, width = image_hw
    # The look at the whole image has no seams.
    borders = np.concatenate((corners, [[0, 0, width, height]]))[views]
    with np.errstate(invalid="ignore"):
        sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        reach = np.clip(_SEAM_RATIO * sides, _SEAM_PX, _SEAM_MAX_PX)
        near = (boxes - borders) * np.array([1, 1, -1, -1]) < reach
    inner = np.concatenate((borders[:, :2] > 0, borders[:, 2:] < [width, height]), axis=1)
    return near & inner


def _held(boxes: Floats, corners: Floats) -> NDArray[np.bool_]:
    """Which boxes lie in a tile as a whole (on the border counts as cut)."""
    held = np.zeros(len(boxes), dtype=np.bool_)
    for start in range(0, len(boxes), 256):
        some = boxes[start : start + 256, None].astype(np.float64)
        inside = (some[..., :2] >= corners[None, :, :2]) & (some[..., 2:] <= corners[None, :, 2:])
        held[start : start + 256] = inside.all(-1).any(-1)
    return held


class _Views:
    """The tiles of an image and which of them see the same places; after them the whole image, and joined boxes."""

    def __init__(self, corners: Floats, image_hw: tuple[int, int], num_labels: int) -> None:
        self.num_tiles, self.num_labels = len(corners), max(num_labels, 1)
        whole = np.array([[0, 0, image_hw[1], image_hw[0]]] * 2, dtype=np.float64)
        self.corners = np.concatenate((corners, whole))
        self.side = float((corners[:, 2:] - corners[:, :2]).max(initial=0))
        # Tiles that touch have an overlap too, of a pixel.
        grown = corners + np.array([-0.5, -0.5, 0.5, 0.5])
        index = BoxIndex(grown, np.zeros(self.num_tiles, dtype=np.int64))
        ranges = index.ranges(grown, np.zeros(self.num_tiles, dtype=np.int64), 1e-12)
        pairs = [(one, other) for one, other, _ in index.pairs(grown, ranges, 1e-12)]
        first, second = (np.concatenate(part) for part in zip(*pairs, strict=True)) if pairs else (_NONE,) * 2
        tile = np.arange(self.num_tiles)
        extra = np.repeat([self.num_tiles, self.num_tiles + 1], self.num_tiles)
        first, second = np.concatenate((first, tile, tile)), np.concatenate((second, extra))
        different = first != second
        order = np.lexsort((second[different], first[different]))
        # Neighbours of tile i: second[starts[i] : starts[i + 1]]; with the two views that see everything.
        self.second = second[different][order]
        self.starts = np.searchsorted(first[different][order], np.arange(self.num_tiles + 1))

    def groups(self, found: _Boxes) -> Ints:
        """(n,) tile and class as one number."""
        return found.views * self.num_labels + found.labels

    def others(self, boxes: Floats, views: Ints) -> tuple[Ints, Ints]:
        """Positions of boxes, ascending, with the other views that see a bit of them."""
        tiled = np.flatnonzero(views < self.num_tiles)
        counts = np.diff(self.starts)[views[tiled]]
        near, step = spread(counts)
        who, other = tiled[near], self.second[self.starts[views[tiled]][near] + step]
        wide = np.flatnonzero(views >= self.num_tiles)
        if len(wide):
            # Boxes of the whole image: any tile may see them; through an index of the tiles, for there may be many.
            index = BoxIndex(self.corners[: self.num_tiles], np.zeros(self.num_tiles, dtype=np.int64))
            ranges = index.ranges(boxes[wide], np.zeros(len(wide), dtype=np.int64), 1e-12)
            pairs = [(one, two) for one, two, _ in index.pairs(boxes[wide].astype(np.float64), ranges, 1e-12)]
            who = np.concatenate((who, *(wide[one] for one, _ in pairs), wide))
            other = np.concatenate((other, *(two for _, two in pairs), 2 * self.num_tiles + 1 - views[wide]))
            order = np.lexsort((other, who))
            who, other = who[order], other[order]
        sees = (boxes[who, :2] < self.corners[other, 2:]) & (boxes[who, 2:] > self.corners[other, :2])
        sees = sees.all(1)
        return who[sees], other[sees]


def _merge_parts(found: _Boxes, views: _Views, iou: float) -> _Boxes:
    """What is left when parts have given way to whole boxes and have been joined."""
    whole = ~found.cut.any(1)
    longer = (found.boxes[:, 2:] - found.boxes[:, :2]).max(1, initial=0)
    reduced = (found.views == views.num_tiles) & (longer < views.side / 2)
    found = found.take(~_replaced(found, whole & ~reduced, views, iou))
    joined, used = _join(found, views)
    kept = found.take(~used).joined_with(joined).sorted()
    # What was joined, and what only seems to be cut because it ends near a border, replaces smaller parts too.
    return kept.take(~_replaced(kept, np.ones(len(kept.boxes), dtype=np.bool_), views, iou))


def _replaced(found: _Boxes, whole: NDArray[np.bool_], views: _Views, iou: float) -> NDArray[np.bool_]:
    """Which cut boxes are what their tile sees of one of the whole boxes.

    That is so where the whole box, cut off at the part's tile as the part was, overlaps the part by more than `iou`.
    """
    part = np.flatnonzero(found.cut.any(1))
    chosen = np.flatnonzero(whole)
    who, tile = views.others(found.boxes[chosen], found.views[chosen])
    of_tile = tile < views.num_tiles
    who, tile = chosen[who[of_tile]], tile[of_tile]
    corners = views.corners[tile].astype(np.float32)
    seen = found.boxes[who]
    seen = np.concatenate((np.maximum(seen[:, :2], corners[:, :2]), np.minimum(seen[:, 2:], corners[:, 2:])), axis=1)
    groups = tile * views.num_labels + found.labels[who]
    boxes, own = _snapped(found, views)[part], views.groups(found)[part]
    hit = np.zeros(len(found.boxes), dtype=np.bool_)
    # Joined boxes that still are parts lie in no one tile.
    seen, groups = (
        np.concatenate((seen, found.boxes[chosen])),
        np.concatenate((groups, _joined_group(found, views)[chosen])),
    )
    who = np.concatenate((who, chosen))
    areas = [(some[:, 2:] - some[:, :2]).prod(1) for some in (boxes, seen, found.boxes)]

    def accept(near: Ints, other: Ints, overlap: Floats) -> NDArray[np.bool_]:
        # A sliver is never placed well enough to agree; that nearly all of it is covered will do.
        shared = overlap * (areas[0][near] + areas[1][other]) / (1 + overlap)
        same = (overlap > iou) | (shared > _COVERED * areas[0][near])
        # A joined box may be a part itself, of a larger one.
        same &= areas[2][part[near]] < areas[2][who[other]]
        return same & (found.scores[who[other]] >= _WORTH * found.scores[part[near]])

    hit[part] = any_overlap(BoxIndex(seen, groups), Crowd(boxes, own, np.arange(len(part)), own), _SLIVER_IOU, accept)
    return hit


def _joined_group(found: _Boxes, views: _Views) -> Ints:
    return (views.num_tiles + 1) * views.num_labels + found.labels


def _snapped(found: _Boxes, views: _Views) -> Floats:
    """The boxes with their cut sides moved to the border that has cut them."""
    snap = found.cut & (found.views < views.num_tiles)[:, None]
    return np.where(snap, views.corners[found.views], found.boxes).astype(np.float32)


def _join(found: _Boxes, views: _Views) -> tuple[_Boxes, NDArray[np.bool_]]:
    """Joined boxes, and which boxes they were made of."""
    snapped = _snapped(found, views)
    links = [_facing_parts(found, snapped, views, axis) for axis in (0, 1)]
    first, second = (np.concatenate(part) for part in zip(*links, strict=True))
    size = len(found.boxes)
    graph = coo_matrix((np.ones(len(first), dtype=np.bool_), (first, second)), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    used = np.zeros(size, dtype=np.bool_)
    used[first] = used[second] = True
    members = np.flatnonzero(used)
    _, group = np.unique(component[members], return_inverse=True)
    count = int(group.max(initial=-1)) + 1
    boxes = np.tile(np.array([np.inf, np.inf, -np.inf, -np.inf], dtype=np.float32), (count, 1))
    np.minimum.at(boxes[:, :2], group, found.boxes[members, :2])
    np.maximum.at(boxes[:, 2:], group, found.boxes[members, 2:])
    scores = np.zeros(count, dtype=found.scores.dtype)
    np.maximum.at(scores, group, found.scores[members])
    labels = np.zeros(count, dtype=np.int64)
    labels[group] = found.labels[members]
    # An end that no other part continues is still one.
    cut = np.zeros((count, 4), dtype=np.bool_)
    np.logical_or.at(cut, group, found.cut[members] & (found.boxes[members] == boxes[group]))
    joined = _Boxes(boxes, scores, labels, np.full(count, views.num_tiles + 1), cut)
    return joined, used


def _facing_parts(found: _Boxes, snapped: Floats, views: _Views, axis: int) -> tuple[Ints, Ints]:
    """Pairs of parts of one object that two neighbouring tiles have cut, along x (axis 0) or y (axis 1).

    The first ends at the far border of its tile, the second begins at the near border of its own; each reaches beyond
    what the other's tile sees; and they agree along the seam. Each has one partner, the one that agrees best.
    """
    across, corners = 1 - axis, views.corners
    ends, begins = (np.flatnonzero(found.cut[:, side]) for side in (axis + 2, axis))
    if not (len(ends) and len(begins)):
        return _NONE, _NONE
    # Every end with every tile that begins where its own sees, or where its own ends, and ends later.
    who, tile = views.others(snapped[ends] + np.array([-0.5, -0.5, 0.5, 0.5], dtype=np.float32), found.views[ends])
    one, two = corners[found.views[ends[who]]], corners[tile]
    facing = (tile < views.num_tiles) & (two[:, axis] > one[:, axis]) & (two[:, axis + 2] > one[:, axis + 2])
    facing &= found.boxes[ends[who], axis] < two[:, axis]
    # Parts as intervals along the seam, cut off at what both tiles see of it. Tiles that meet at a corner count: of an
    # object there one tile may see a part that no direct neighbour has cut.
    low = np.maximum(one[:, across], two[:, across])
    high = np.minimum(one[:, across + 2], two[:, across + 2])
    facing &= high > low
    who, tile, low, high = who[facing], tile[facing], low[facing], high[facing]
    intervals = _intervals(snapped[ends[who]], across, low, high)
    index = BoxIndex(_intervals(snapped[begins], across, -np.inf, np.inf), views.groups(found)[begins])
    groups = tile * views.num_labels + found.labels[ends[who]]
    first, second, agreement = [_NONE], [_NONE], [np.zeros(0)]
    # An interval that the other tile sees more of is found by what both see of it, so by less agreement.
    for near, other, _ in index.pairs(intervals, index.ranges(intervals, groups, _JOIN_IOU / 5), _JOIN_IOU / 5):
        seen = _intervals(snapped[begins[other]], across, low[near], high[near])
        value = pairwise_iou(intervals[near], seen)
        beyond = found.boxes[begins[other], axis + 2] > corners[found.views[ends[who[near]]], axis + 2]
        good = (value > _JOIN_IOU) & beyond
        first.append(ends[who[near[good]]])
        second.append(begins[other[good]])
        agreement.append(value[good].astype(np.float64))
    return _mutual_best(np.concatenate(first), np.concatenate(second), np.concatenate(agreement), found.views)


def _intervals(boxes: Floats, across: int, low: Floats | float, high: Floats | float) -> Floats:
    """Intervals as boxes of width 1."""
    result = np.zeros((len(boxes), 4), dtype=np.float32)
    result[:, 2] = 1
    result[:, 1], result[:, 3] = np.maximum(boxes[:, across], low), np.minimum(boxes[:, across + 2], high)
    return result


def _mutual_best(first: Ints, second: Ints, value: Floats, views: Ints) -> tuple[Ints, Ints]:
    """Of the pairs those in which each is the other's best in its tile."""
    best = np.ones(len(first), dtype=np.bool_)
    for one, other in ((first, second), (second, first)):
        order = np.lexsort((other, -value, views[other], one))
        ahead = np.ones(len(order), dtype=np.bool_)
        ahead[1:] = (np.diff(one[order]) != 0) | (np.diff(views[other[order]]) != 0)
        best[order[~ahead]] = False
    return first[best], second[best]
