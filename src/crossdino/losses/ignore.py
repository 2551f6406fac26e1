"""Regions in which nothing is known: crowds, ignore categories, objects cut off by a tile's edge.

A prediction there may well be right, so it must not be pushed down. The measure is COCO's for crowds, intersection over
the area of the *prediction*, with one difference: it is the union of the regions that counts. A prediction half in one
region and half in the next lies in regions as a whole, and where regions overlap nothing is counted twice (COCO's
evaluation looks at one crowd at a time, VisDrone's at the union).
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossdino.structures import Target


def covered_area(boxes_xyxy: Tensor, regions_xyxy: Tensor) -> Tensor:
    """The area of each box that the union of the regions covers, exactly.

    The regions' edges cut the plane into cells that are covered as a whole or not at all.

    Args:
        boxes_xyxy: (P, 4) float32.
        regions_xyxy: (m, 4) float32, m > 0.

    Returns:
        (P,) float32.
    """
    parts, inside = [], []
    # Boxes run along the last dimension, the long one: there are few regions.
    box_sides, region_sides = boxes_xyxy.T.contiguous(), regions_xyxy.T
    for axis in (0, 1):
        low, high = region_sides[axis], region_sides[axis + 2]
        edges = torch.cat((low, high)).sort().values
        begin, end = edges[:-1, None], edges[1:, None]
        inside.append(((low <= begin) & (end <= high)).float())  # (cells of this axis, m)
        parts.append((torch.minimum(box_sides[axis + 2], end) - torch.maximum(box_sides[axis], begin)).clamp(min=0))
    cells = (inside[1] @ inside[0].T > 0).float()
    return (cells @ parts[0] * parts[1]).sum(0)


@torch.no_grad()
def ignored_classes(boxes_cxcywh: Tensor, targets: list[Target], num_classes: int, overlap: float) -> Tensor | None:
    """At which classes each prediction is no negative.

    A region of class c counts at class c; a region of label -1 at all classes.

    Args:
        boxes_cxcywh: (N, P, 4) predicted boxes, normalised.
        targets: N targets with their ignored regions.
        num_classes: K.
        overlap: share of the prediction's own area that regions must cover at least, in (0, 1].

    Returns:
        (N, P, K) bool; None when no image has a region.
    """
    counts = [len(target.ignored_labels) for target in targets]
    if sum(counts) == 0:
        return None
    # The only copy from the device.
    labels = torch.cat([target.ignored_labels for target in targets]).tolist()
    ignored = torch.zeros((*boxes_cxcywh.shape[:2], num_classes), dtype=torch.bool, device=boxes_cxcywh.device)
    # Products of coordinates need all digits also under autocast.
    with torch.autocast(boxes_cxcywh.device.type, enabled=False):
        for image, target in enumerate(targets):
            own, labels = labels[: counts[image]], labels[counts[image] :]
            boxes = _corners(boxes_cxcywh[image])
            area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
            regions = _corners(target.ignored_boxes_cxcywh)
            # All classes first: the regions of label -1 count for each class as well.
            for label in sorted(set(own)):
                chosen = [i for i, other in enumerate(own) if other in (label, -1)]
                covered = covered_area(boxes, regions[torch.tensor(chosen, device=regions.device)])
                columns = slice(None) if label == -1 else slice(label, label + 1)
                # The factor: of a small box inside a region, rounding leaves a little less than all.
                ignored[image, :, columns] |= ((covered >= overlap * 0.999 * area) & (covered > 0))[:, None]
    return ignored


def _corners(boxes_cxcywh: Tensor) -> Tensor:
    boxes = boxes_cxcywh.float()
    half = boxes[:, 2:] / 2
    return torch.cat((boxes[:, :2] - half, boxes[:, :2] + half), dim=-1)
