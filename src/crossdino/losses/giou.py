"""Generalised intersection over union, exact for small boxes.

torchvision's loss adds 1e-7 to the union; of a 2-pixel box in a 1024-pixel image that is 3 % of its (normalised) area.
"""

from __future__ import annotations

import torch
from torch import Tensor


def generalized_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """GIoU of cxcywh boxes, broadcast over the leading dimensions.

    Args:
        boxes_a: (..., 4).
        boxes_b: (..., 4); (Q, 1, 4) against (1, n, 4) gives all pairs.

    Returns:
        (...) in (-1, 1]; two boxes of no size at all give 0 instead of NaN.
    """
    boxes_a, boxes_b = boxes_a.float(), boxes_b.float()
    low_a, high_a = boxes_a[..., :2] - boxes_a[..., 2:] / 2, boxes_a[..., :2] + boxes_a[..., 2:] / 2
    low_b, high_b = boxes_b[..., :2] - boxes_b[..., 2:] / 2, boxes_b[..., :2] + boxes_b[..., 2:] / 2
    intersection = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    union = boxes_a[..., 2:].prod(-1) + boxes_b[..., 2:].prod(-1) - intersection
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(-1)
    smallest = torch.finfo(torch.float32).tiny
    return intersection / union.clamp(min=smallest) - (hull - union) / hull.clamp(min=smallest)
