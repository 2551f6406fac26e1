"""Merging: how the detections of an image's tiles become those of the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_area

from crossdino.tiling import Tile

# A box that ends this close (px) to an inner border of its tile is taken for a part of an object.
_SEAM_PX = 2.0


def at_seam(boxes_xyxy: Tensor, tile: Tile, image_hw: tuple[int, int]) -> Tensor:
    """Which boxes end at a border of their tile that is not a border of the image.

    Args:
        boxes_xyxy: (n, 4), pixels of the image.
        tile: the tile that they were found in.
        image_hw: the image's height and width.

    Returns:
        (n,) bool.
    """
    height, width = image_hw
    x1, y1, x2, y2 = boxes_xyxy.unbind(1)
    left = (x1 < tile.left + _SEAM_PX) & (tile.left > 0)
    top = (y1 < tile.top + _SEAM_PX) & (tile.top > 0)
    right = (x2 > tile.left + tile.width - _SEAM_PX) & (tile.left + tile.width < width)
    bottom = (y2 > tile.top + tile.height - _SEAM_PX) & (tile.top + tile.height < height)
    return left | top | right | bottom


def merge_tiles(boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, cut: Tensor, iou: float) -> Tensor:
    """Which detections stay when those of all tiles of an image are put together.

    Class by class, of boxes that overlap by more than `iou` the best one stays (greedy non-maximum suppression). Before
    that, a box that its tile has cut off gives way to a whole box of its class that covers more than `iou` of it:
    the part of an object that one tile sees does not overlap the whole object enough to be suppressed otherwise.

    Args:
        boxes_xyxy: (n, 4), pixels of the image.
        scores: (n,).
        labels: (n,) int64.
        cut: (n,) bool, true where the tile's border cuts the box (`at_seam`).
        iou: in [0, 1].

    Returns:
        (m,) int64, positions of what stays, the best first.
    """
    whole = (~cut).nonzero()[:, 0]
    parts = cut.nonzero()[:, 0]
    stays = torch.ones_like(cut)
    for label in labels[parts].unique().tolist():
        mine, others = parts[labels[parts] == label], whole[labels[whole] == label]
        for chunk in mine.split(1024):
            corners = boxes_xyxy[chunk, None], boxes_xyxy[None, others]
            sides = torch.minimum(corners[0][..., 2:], corners[1][..., 2:])
            sides = (sides - torch.maximum(corners[0][..., :2], corners[1][..., :2])).clamp(min=0)
            share = sides.prod(-1) / box_area(boxes_xyxy[chunk]).clamp(min=1e-9)[:, None]
            # A whole box of a much lower score is no reason to give up a good part.
            better = scores[others][None] >= 0.5 * scores[chunk][:, None]
            stays[chunk] = ~((share > iou) & better).any(1)
    kept = stays.nonzero()[:, 0]
    return kept[batched_nms(boxes_xyxy[kept].float(), scores[kept].float(), labels[kept], iou)]


def merge_detections(
    parts: Sequence[tuple[Tensor, Tensor, Tensor]], tiles: Sequence[Tile], image_hw: tuple[int, int], iou: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The detections of an image from those of its tiles; see `merge_tiles` for the rule.

    Args:
        parts: for every tile boxes (n, 4) in pixels of the tile, scores (n,), labels (n,).
        tiles: where the tiles lie.
        image_hw: the image's height and width.
        iou: overlap from which two detections of a class are one, in [0, 1].

    Returns:
        Boxes (m, 4) in pixels of the image and inside it, scores (m,), labels (m,), the best first.
    """
    boxes, cut = [], []
    for (found, _, _), tile in zip(parts, tiles, strict=True):
        moved = found + torch.tensor([tile.left, tile.top] * 2, dtype=found.dtype)
        cut.append(at_seam(moved, tile, image_hw))
        # A tile may reach beyond a small image.
        boxes.append(moved.clamp(min=0).minimum(torch.tensor([image_hw[1], image_hw[0]] * 2, dtype=found.dtype)))
    all_boxes = torch.cat(boxes)
    scores, labels = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
    kept = merge_tiles(all_boxes, scores, labels, torch.cat(cut), iou)
    return all_boxes[kept], scores[kept], labels[kept]
