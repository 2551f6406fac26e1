"""Matching as pedestrian detection does it: the best detection first, each takes the free object it overlaps most.

Source: P. Dollar's toolbox, from which brambox (WiderPerson) and the VisDrone toolkit (`evalRes.m`) have their rules.
COCO's matching is another one (`crossdino.evaluation.matching`): there, regions to ignore are chosen like objects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Overlaps:
    """How the detections of an image, best first, overlap its objects.

    Attributes:
        rows: (p,) detection of a pair that overlaps by the least threshold or more; ascending.
        columns: (p,) object of the pair.
        values: (p,) IoU of the pair; descending within a row.
        in_ignored: (n,) of each detection, the largest share of its area that lies in one region to ignore.
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[np.float64]
    in_ignored: NDArray[np.float64]


def find_overlaps(
    detections_xywh: NDArray[np.float64],
    objects_xywh: NDArray[np.float64],
    ignored_xywh: NDArray[np.float64],
    least_iou: float,
    *,
    last_of_equals: bool,
) -> Overlaps:
    """Compare the detections of an image with its objects and its regions to ignore.

    Args:
        detections_xywh: (n, 4), best first.
        objects_xywh: (m, 4).
        ignored_xywh: (k, 4).
        least_iou: pairs below it can never match.
        last_of_equals: which of two objects comes first that a detection overlaps equally.
    """
    intersections, areas = _intersections(detections_xywh, objects_xywh), _areas(detections_xywh)
    iou = _ratio(intersections, areas[:, None] + _areas(objects_xywh)[None] - intersections)
    rows, columns = np.nonzero(iou >= least_iou)
    values = iou[rows, columns]
    order = np.lexsort((-columns if last_of_equals else columns, -values, rows))
    shares = _ratio(_intersections(detections_xywh, ignored_xywh), areas[:, None])
    return Overlaps(rows[order], columns[order], values[order], shares.max(axis=1, initial=0.0))


def match_greedily(overlaps: Overlaps, iou: float, chosen: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Which detections find an object.

    Args:
        overlaps: of an image.
        iou: the least IoU of a match.
        chosen: (n,) the detections that take part; None: all.

    Returns:
        (n,) True for those with an object of their own.
    """
    matched = np.zeros(len(overlaps.in_ignored), dtype=bool)
    taking_part = overlaps.values >= iou
    if chosen is not None:
        taking_part &= chosen[overlaps.rows]
    taken: set[int] = set()
    last = -1  # the last detection that got an object; its further pairs follow directly
    for row, column in zip(overlaps.rows[taking_part].tolist(), overlaps.columns[taking_part].tolist(), strict=True):
        if row != last and column not in taken:
            taken.add(column)
            matched[row] = True
            last = row
    return matched


def _intersections(first_xywh: NDArray[np.float64], second_xywh: NDArray[np.float64]) -> NDArray[np.float64]:
    first, second = first_xywh[:, None], second_xywh[None]
    ends = np.minimum(first[..., :2] + first[..., 2:], second[..., :2] + second[..., 2:])
    sides = np.maximum(ends - np.maximum(first[..., :2], second[..., :2]), 0.0)
    return sides[..., 0] * sides[..., 1]


def _areas(boxes_xywh: NDArray[np.float64]) -> NDArray[np.float64]:
    return boxes_xywh[:, 2] * boxes_xywh[:, 3]


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quotient; 0 for boxes without area."""
    return np.divide(part, whole, out=np.zeros_like(part), where=np.broadcast_to(whole, part.shape) > 0)
