"""From an image and its boxes to the network's input: resizing, cropping, flipping, colour, normalisation.

The training recipe is that of DETR and DINO: a random flip, then either a resize to a random short side, or a resize, a
random crop and that resize again, each with probability one half. Vertical flips, quarter turns and colour jitter are
additions for aerial images and off by default. We flip *after* resizing: every step treats both directions alike, so
the distribution is the same, and fewer pixels move.

Images are uint8 tensors until the last step; all boxes here are absolute xyxy, continuous (a pixel is 1 wide), and
stay floating point: a rounded 8-pixel box loses a fifth of its overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as color

from crossdino.config import DataConfig


@dataclass(frozen=True)
class Sample:
    """An image on its way to the network.

    Attributes:
        image: (3, H, W) uint8.
        boxes_xyxy: (n, 4) float64, pixels of `image`.
        labels: (n,) int64.
    """

    image: Tensor
    boxes_xyxy: Tensor
    labels: Tensor

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


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as a (3, H, W) uint8 tensor (a view on channels-last memory, which resizes fastest)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


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
    return Sample(resize_image(sample.image, hw), sample.boxes_xyxy * ratios, sample.labels)


def crop(sample: Sample, top: int, left: int, hw: tuple[int, int]) -> Sample:
    """Cut out a rectangle; boxes are clipped to it, and dropped when no area is left (as in DETR)."""
    height, width = hw
    boxes = sample.boxes_xyxy - torch.tensor([left, top, left, top])
    limit = torch.tensor([width, height, width, height], dtype=boxes.dtype)
    boxes = boxes.clamp(min=0).minimum(limit)
    keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return Sample(sample.image[:, top : top + height, left : left + width], boxes[keep], sample.labels[keep])


def flip_horizontally(sample: Sample) -> Sample:
    """Mirror left and right."""
    x1, y1, x2, y2 = sample.boxes_xyxy.unbind(1)
    width = sample.hw[1]
    return Sample(sample.image.flip(2), torch.stack([width - x2, y1, width - x1, y2], dim=1), sample.labels)


def flip_vertically(sample: Sample) -> Sample:
    """Mirror top and bottom."""
    x1, y1, x2, y2 = sample.boxes_xyxy.unbind(1)
    height = sample.hw[0]
    return Sample(sample.image.flip(1), torch.stack([x1, height - y2, x2, height - y1], dim=1), sample.labels)


def turn(sample: Sample, quarters: int) -> Sample:
    """Turn counter-clockwise by `quarters` times 90 degrees."""
    boxes, width = sample.boxes_xyxy, sample.hw[1]
    height = sample.hw[0]
    for _ in range(quarters % 4):
        x1, y1, x2, y2 = boxes.unbind(1)
        boxes = torch.stack([y1, width - x2, y2, width - x1], dim=1)
        height, width = width, height
    return Sample(sample.image.rot90(quarters, (1, 2)), boxes, sample.labels)


def jitter(image: Tensor, strength: float, generator: np.random.Generator) -> Tensor:
    """Change brightness, contrast and saturation, in this order, by factors within 1 - strength and 1 + strength."""
    brightness, contrast, saturation = generator.uniform(1 - strength, 1 + strength, 3).tolist()
    image = color.adjust_brightness_image(image, brightness)
    image = color.adjust_contrast_image(image, contrast)
    return color.adjust_saturation_image(image, saturation)


def random_crop(sample: Sample, side_range: tuple[int, int], generator: np.random.Generator) -> Sample:
    """Cut out a rectangle of random place, and of sides within `side_range` (both ends) as far as the image allows."""
    low, high = side_range
    height, width = (int(generator.integers(min(low, side), min(high, side) + 1)) for side in sample.hw)
    top = int(generator.integers(sample.hw[0] - height + 1))
    left = int(generator.integers(sample.hw[1] - width + 1))
    return crop(sample, top, left, (height, width))


def augment(sample: Sample, config: DataConfig, generator: np.random.Generator) -> Sample:
    """The training recipe (see the top of this file).

    Args:
        sample: image and boxes as in the file.
        config: sizes and probabilities.
        generator: the only source of randomness.

    Returns:
        The sample at its training size; it may have lost all its objects to the crop.
    """
    if config.crop_short_sides and generator.random() < 0.5:
        sample = resize(sample, resize_hw(sample.hw, int(generator.choice(config.crop_short_sides))))
        sample = random_crop(sample, config.crop_range, generator)
    short_side = int(generator.choice(config.train_short_sides))
    sample = resize(sample, resize_hw(sample.hw, short_side, config.train_long_side))
    if generator.random() < config.horizontal_flip:
        sample = flip_horizontally(sample)
    if generator.random() < config.vertical_flip:
        sample = flip_vertically(sample)
    if config.quarter_turns:
        sample = turn(sample, int(generator.integers(4)))
    if config.color_jitter > 0:
        sample = Sample(jitter(sample.image, config.color_jitter, generator), sample.boxes_xyxy, sample.labels)
    return sample
