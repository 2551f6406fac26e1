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
    # Coordinate by coordinate: for all pairs, anything of shape (Q, n, 2) takes twice the time. Nor is `prod` as good
    # as a product, its gradient asks the device for zeros.
    ax, ay, aw, ah = _planes(boxes_a)
    bx, by, bw, bh = _planes(boxes_b)
    a_left, a_top, a_right, a_bottom = ax - aw / 2, ay - ah / 2, ax + aw / 2, ay + ah / 2
    b_left, b_top, b_right, b_bottom = bx - bw / 2, by - bh / 2, bx + bw / 2, by + bh / 2
    width = (torch.minimum(a_right, b_right) - torch.maximum(a_left, b_left)).clamp(min=0)
    height = (torch.minimum(a_bottom, b_bottom) - torch.maximum(a_top, b_top)).clamp(min=0)
    intersection = width * height
    union = aw * ah + bw * bh - intersection
    hull_width = torch.maximum(a_right, b_right) - torch.minimum(a_left, b_left)
    hull = hull_width * (torch.maximum(a_bottom, b_bottom) - torch.minimum(a_top, b_top))
    smallest = torch.finfo(torch.float32).tiny
    return intersection / union.clamp(min=smallest) - (hull - union) / hull.clamp(min=smallest)


def _planes(boxes: Tensor) -> tuple[Tensor, ...]:
    return boxes.float().movedim(-1, 0).contiguous().unbind(0)
