"""From an image and its boxes to the network's input: resizing, cropping, flipping, normalisation.

The geometry alone; what is drawn at random, and in which order, is the recipe in `augmentation.py`. Images are uint8
tensors until the last step; all boxes here are absolute xyxy, continuous (a pixel is 1 wide), and stay floating point:
a rounded 8-pixel box loses a fifth of its overlap. Every step carries the regions to ignore along with the objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Sample:
    """An image on its way to the network.

    Attributes:
        image: (3, H, W) uint8.
        boxes_xyxy: (n, 4) float64, pixels of `image`: objects and regions to ignore.
        labels: (n,) int64; -1 for a region that is ignored for every class.
        ignored: (n,) bool, true for regions to ignore; left out, nothing is ignored.
    """

    image: Tensor
    boxes_xyxy: Tensor
    labels: Tensor
    ignored: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def __post_init__(self) -> None:
        if len(self.ignored) == 0:
            object.__setattr__(self, "ignored", torch.zeros(len(self.labels), dtype=torch.bool))
        assert len(self.boxes_xyxy) == len(self.labels) == len(self.ignored)

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[-2], self.image.shape[-1]


def resize_hw(hw: tuple[int, int], short_side: int, long_side: int | None = None) -> tuple[int, int]:
    """The size after DETR's resize, to the pixel.

    With `short`, `long` the image's sides: the new short side is `s = short_side`, or, where `long / short * s` would
    exceed `long_side`, `s = round(long_side * short / long)` (Python's rounding). The new long side is
    `floor(s * long / short)`. As `s` is rounded, the long side may exceed its limit by up to `long / (2 * short)`.

    Args:
        hw: height and width in pixels.
        short_side: wanted length of the short side in pixels.
        long_side: limit of the long side in pixels, or None.

    Returns:
        New height and width, at least 1.
    """
    short, long = min(hw), max(hw)
    if long_side is not None and long / short * short_side > long_side:
        short_side = max(1, round(long_side * short / long))
    new_long = short_side * long // short
    return (short_side, new_long) if hw[0] <= hw[1] else (new_long, short_side)


def to_tensor(image: Image.Image | NDArray[np.uint8]) -> Tensor:
    """An RGB image as a (3, H, W) uint8 tensor (a view on channels-last memory, which resizes fastest).

    Args:
        image: a PIL image, or (H, W, 3) pixels, whose memory the tensor shares.
    """
    pixels = image if isinstance(image, np.ndarray) else np.array(image)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def resize_image(image: Tensor, hw: tuple[int, int]) -> Tensor:
    """Resize a (3, H, W) uint8 image to `hw`: bilinear, antialiased, as Pillow does (to one grey level)."""
    if image.shape[-2:] == hw:
        return image
    return functional.interpolate(image[None], hw, mode="bilinear", antialias=True)[0]


def normalize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Scale a (3, H, W) uint8 image to 0..1, subtract the mean and divide by std (per channel): float32."""
    shift = torch.tensor(mean, dtype=torch.float32).view(3, 1, 1) * 255.0
    scale = torch.tensor(std, dtype=torch.float32).view(3, 1, 1) * 255.0
    return image.contiguous().to(torch.float32).sub_(shift).div_(scale)


def resize(sample: Sample, hw: tuple[int, int]) -> Sample:
    """Resize image and boxes to `hw`."""
    ratio_y, ratio_x = hw[0] / sample.hw[0], hw[1] / sample.hw[1]
    ratios = torch.tensor([ratio_x, ratio_y, ratio_x, ratio_y], dtype=sample.boxes_xyxy.dtype)
    return replace(sample, image=resize_image(sample.image, hw), boxes_xyxy=sample.boxes_xyxy * ratios)


def crop(sample: Sample, top: int, left: int, hw: tuple[int, int], keep: float = 0.0) -> Sample:
    """Cut out a rectangle; boxes are clipped to it, and dropped when no area is left (as in DETR).

    Args:
        sample: image and boxes.
        top: first row of the rectangle, in pixels; the rectangle must lie in the image.
        left: first column.
        hw: height and width of the rectangle.
        keep: an object of which less than this share of its area is left (0..1) becomes a region to ignore: too little
            of it is seen to be asked for, and too much to be denied.

    Returns:
        The rectangle (a view on the image's memory) and what lies in it.
    """
    height, width = hw
    offset = torch.tensor([left, top, left, top])
    limit = torch.tensor([width, height, width, height], dtype=sample.boxes_xyxy.dtype)
    boxes = (sample.boxes_xyxy - offset).clamp(min=0).minimum(limit)
    # The last factor: a share of exactly `keep` is enough, also where the product is rounded up (0.55 * 100 > 55).
    cut = box_area(boxes) < keep * box_area(sample.boxes_xyxy) * (1 - 1e-6)
    left_over = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return Sample(
        sample.image[:, top : top + height, left : left + width],
        boxes[left_over],
        sample.labels[left_over],
        (sample.ignored | cut)[left_over],
    )


def flip_horizontally(sample: Sample) -> Sample:
    """Mirror left and right."""
    x1, y1, x2, y2 = sample.boxes_xyxy.unbind(1)
    width = sample.hw[1]
    boxes = torch.stack([width - x2, y1, width - x1, y2], dim=1)
    return replace(sample, image=sample.image.flip(2), boxes_xyxy=boxes)


def flip_vertically(sample: Sample) -> Sample:
    """Mirror top and bottom."""
    x1, y1, x2, y2 = sample.boxes_xyxy.unbind(1)
    height = sample.hw[0]
    boxes = torch.stack([x1, height - y2, x2, height - y1], dim=1)
    return replace(sample, image=sample.image.flip(1), boxes_xyxy=boxes)


def turn(sample: Sample, quarters: int) -> Sample:
    """Turn counter-clockwise by `quarters` times 90 degrees."""
    boxes, width = sample.boxes_xyxy, sample.hw[1]
    height = sample.hw[0]
    for _ in range(quarters % 4):
        x1, y1, x2, y2 = boxes.unbind(1)
        boxes = torch.stack([y1, width - x2, y2, width - x1], dim=1)
        height, width = width, height
    return replace(sample, image=sample.image.rot90(quarters, (1, 2)), boxes_xyxy=boxes)


def box_area(boxes_xyxy: Tensor) -> Tensor:
    """Areas of (n, 4) boxes."""
    return (boxes_xyxy[:, 2] - boxes_xyxy[:, 0]) * (boxes_xyxy[:, 3] - boxes_xyxy[:, 1])
