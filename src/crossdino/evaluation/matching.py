"""Which detection meets which object: the greedy matching of COCO, for all detections and at one IoU.

The rules are those of pycocotools (`COCOeval.evaluateImg`), to which the tests hold this: within an image and a class
detections choose in the order of their scores; each takes the free object of the highest IoU, and only one that meets
no object may lie in a crowd, of which there is never too little. Unlike there, no detection is cut off (pycocotools
keeps the best `maxDets` of an image), and only pairs that overlap enough are ever looked at, so that 100,000 boxes of
one image take seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNMATCHED = -1
IN_CROWD = -2

_CHUNK = 512


@dataclass(frozen=True)
class FoundBoxes:
    """The detections of a data set.

    Attributes:
        images: (n,) int64, which image each is in (any numbers).
        boxes_xyxy: (n, 4) float64, pixels of the original image.
        labels: (n,) int64 in [0, K).
        scores: (n,) float64.
    """

    images: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> FoundBoxes:
        return FoundBoxes(self.images[chosen], self.boxes_xyxy[chosen], self.labels[chosen], self.scores[chosen])

    @property
    def sizes_px(self) -> NDArray[np.float64]:
        """(n,) sqrt(width x height) in pixels."""
        return box_sizes(self.boxes_xyxy)


@dataclass(frozen=True)
class TrueBoxes:
    """The objects of a data set.

    Attributes:
        images: (m,) int64.
        boxes_xyxy: (m, 4) float64, pixels of the original image.
        labels: (m,) int64 in [0, K).
        areas: (m,) float64, square pixels as the annotations state them (for size bands).
        is_crowd: (m,) bool, true for regions in which detections are neither right nor wrong.
    """

    images: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    is_crowd: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> TrueBoxes:
        return TrueBoxes(
            self.images[chosen],
            self.boxes_xyxy[chosen],
            self.labels[chosen],
            self.areas[chosen],
            self.is_crowd[chosen],
        )


def box_sizes(boxes_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) sqrt(width x height) of (n, 4) boxes."""
    widths, heights = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).clip(min=0).T
    return np.sqrt(widths * heights)


def match_detections(found: FoundBoxes, true: TrueBoxes, iou: float = 0.5) -> NDArray[np.int64]:
    """Match detections and objects, image by image and class by class.

    Args:
        found: n detections; of equal scores the earlier one chooses first.
        true: m objects and crowds.
        iou: what a detection and its object must overlap by at least, in (0, 1]; with a crowd the intersection counts
            relative to the detection.

    Returns:
        (n,) the position of the object in `true`, `IN_CROWD`, or `UNMATCHED`.
    """
    matched = np.full(len(found), UNMATCHED, dtype=np.int64)
    objects_of = _groups(true.images, true.labels)
    for key, members in _groups(found.images, found.labels).items():
        objects = objects_of.get(key)
        if objects is None:
            continue
        members = members[np.argsort(-found.scores[members], kind="stable")]
        _match_group(matched, members, found.boxes_xyxy[members], objects, true, min(iou, 1 - 1e-10))
    return matched


def _match_group(
    matched: NDArray[np.int64],
    members: NDArray[np.int64],
    boxes: NDArray[np.float64],
    objects: NDArray[np.int64],
    true: TrueBoxes,
    iou: float,
) -> None:
    """Match the detections of one image and class, best first."""
    rows, columns, overlaps = _overlapping_pairs(boxes, true.boxes_xyxy[objects], true.is_crowd[objects], iou)
    # Row by row the highest overlap first; of equal ones the object that comes last, as pycocotools has it.
    order = np.lexsort((-columns, -overlaps, true.is_crowd[objects][columns], rows))
    taken: set[int] = set()
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        member, target = members[row], int(objects[column])
        if matched[member] != UNMATCHED or target in taken:
            continue
        if true.is_crowd[target]:
            matched[member] = IN_CROWD
        else:
            matched[member] = target
            taken.add(target)


def _overlapping_pairs(
    boxes: NDArray[np.float64], objects: NDArray[np.float64], is_crowd: NDArray[np.bool_], iou: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Row, column and overlap of every pair that overlaps by `iou` or more."""
    by_left = np.argsort(objects[:, 0], kind="stable")
    lefts = objects[by_left, 0]
    widest = float((objects[:, 2] - objects[:, 0]).max())
    areas = np.prod(objects[:, 2:] - objects[:, :2], axis=1)
    from_left = np.argsort(boxes[:, 0], kind="stable")
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
    for start in range(0, len(boxes), _CHUNK):
        rows = from_left[start : start + _CHUNK]
        chunk = boxes[rows]
        first = int(np.searchsorted(lefts, chunk[:, 0].min() - widest, side="left"))
        last = int(np.searchsorted(lefts, chunk[:, 2].max(), side="right"))
        near = by_left[first:last]
        corners = np.minimum(chunk[:, None, 2:], objects[near, 2:]) - np.maximum(chunk[:, None, :2], objects[near, :2])
        shared = np.prod(corners.clip(min=0), axis=2)
        own = np.prod(chunk[:, 2:] - chunk[:, :2], axis=1)[:, None]
        total = np.where(is_crowd[near], own, own + areas[near] - shared)
        with np.errstate(divide="ignore", invalid="ignore"):
            overlap = shared / total
        row, column = np.nonzero(overlap >= iou)  # false where a box without any size makes it NaN
        parts.append((rows[row], near[column], overlap[row, column]))
    rows, columns, overlaps = (np.concatenate(values) for values in zip(*parts, strict=True))
    return rows, columns, overlaps


def _groups(images: NDArray[np.int64], labels: NDArray[np.int64]) -> dict[tuple[int, int], NDArray[np.int64]]:
    """(image, label) -> positions, ascending."""
    if not len(images):
        return {}
    order = np.lexsort((labels, images))
    keys = np.stack((images[order], labels[order]), axis=1)
    starts = np.flatnonzero(np.any(keys[1:] != keys[:-1], axis=1)) + 1
    parts = np.split(order, starts)
    return {(int(images[part[0]]), int(labels[part[0]])): part for part in parts}
