"""What the network really sees: a batch as it enters the model, after all augmentation, with its targets.

Nothing is read from the files again and nothing is made prettier: the tensors are brought back to colours, and boxes
are drawn where the losses will look for them. Pixels are only ever multiplied, never resampled, and lines lie *outside*
of their boxes, so that an object of 3 pixels is seen as the 3 pixels that it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import supervision as sv
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from crossdino.errors import InputError
from crossdino.structures import Target
from crossdino.visualization.detections import (
    _CLASS_COLOURS,
    _STRIP_COLOUR,
    _draw_dashed_box,
    _font_size,
    _line_thickness,
    _with_strip,
)

# Images are enlarged by the largest whole factor that keeps their longer side within this, ...
_CELL_PX = 960
_LARGEST_FACTOR = 12
# ... and so many are drawn that the picture stays within this (at least one).
_PICTURE_PX = 48e6
_GAP_PX = 6
# Regions to ignore for every class; those of one class have its colour.
_IGNORED_COLOUR = "#e6e6e6"
_PADDING_COLOURS = ("#202028", "#4a4a58")


def draw_batch(
    images: Tensor | Sequence[Tensor],
    padding_mask: Tensor | Sequence[Tensor],
    targets: Sequence[Target],
    class_names: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    max_images: int = 16,
) -> Image.Image:
    """Draw the images of a batch side by side, with objects, regions to ignore and padding.

    Objects are boxes in the colour of their class; regions to ignore are hatched and dashed; padding is dark and
    hatched. Below each image: its id, its size without padding, the number of objects, and the size of the smallest
    one, sqrt(width x height) in the network's pixels.

    Args:
        images: (N, 3, H, W) normalised, as in a `Batch`; or N images of different sizes.
        padding_mask: (N, H, W) bool, true on padding (at the bottom and the right); or N masks.
        targets: N targets.
        class_names: name of every class index.
        mean: what the images were normalised with, per channel, of values in 0..1.
        std: likewise.
        max_images: at most so many of the batch are drawn, the first ones; fewer where they are very large.

    Returns:
        An RGB picture.

    Raises:
        InputError: there is nothing to draw.
    """
    if len(images) == 0 or max_images < 1:
        raise InputError(f"nothing to draw: {len(images)} images of which at most {max_images} are wanted")
    height, width = max(image.shape[-2] for image in images), max(image.shape[-1] for image in images)
    count = min(len(images), max_images, max(1, int(_PICTURE_PX / (height * width))))
    factor = min(max(1, _CELL_PX // max(height, width)), _LARGEST_FACTOR)
    palette = sv.ColorPalette.from_hex(list(_CLASS_COLOURS))
    cells = [
        _cell(images[index], padding_mask[index], targets[index], palette, mean, std, factor) for index in range(count)
    ]
    shown = targets[:count]
    labels = torch.cat([target.labels for target in shown]).tolist()
    legend = [
        (palette.by_idx(label).as_hex(), f"{class_names[label]} {labels.count(label)}") for label in sorted(set(labels))
    ]
    if num_ignored := sum(len(target.ignored_labels) for target in shown):
        legend.append((_IGNORED_COLOUR, f"ignored {num_ignored} (hatched, dashed; of one class: in its colour)"))
    if any(bool(mask.any()) for mask in padding_mask[:count]):
        legend.append((_PADDING_COLOURS[1], "padding"))
    text = f"{count} of {len(images)} images" + (f", enlarged {factor} times" if factor > 1 else "")
    return _with_strip(_grid(cells), text, legend)


def _cell(
    image: Tensor,
    padding_mask: Tensor,
    target: Target,
    palette: sv.ColorPalette,
    mean: Sequence[float],
    std: Sequence[float],
    factor: int,
) -> Image.Image:
    """One image with its boxes and its caption."""
    padding = padding_mask.detach().cpu().numpy()
    hw = (int((~padding).any(1).sum()), int((~padding).any(0).sum()))
    pixels = _colours(image, mean, std).repeat(factor, 0).repeat(factor, 1)
    padding = padding.repeat(factor, 0).repeat(factor, 1)
    pixels[padding] = _rgb(_PADDING_COLOURS[0])
    pixels[padding & _stripes(padding.shape, 12)] = _rgb(_PADDING_COLOURS[1])

    ignored_xyxy = _network_xyxy(target.ignored_boxes_cxcywh, hw)
    ignored_colours = [
        palette.by_idx(label).as_hex() if label >= 0 else _IGNORED_COLOUR for label in target.ignored_labels.tolist()
    ]
    for box, colour in zip(ignored_xyxy * factor, ignored_colours, strict=True):
        left, top, right, bottom = np.round(box).astype(int).tolist()
        region = pixels[top:bottom, left:right]
        stripes = _stripes(region.shape[:2], 6)
        region[stripes] = (region[stripes] // 2 + np.array(_rgb(colour)) // 2).astype(np.uint8)

    picture = Image.fromarray(pixels)
    boxes_xyxy = _network_xyxy(target.boxes_cxcywh, hw)
    thickness = _line_thickness(picture, boxes_xyxy * factor)
    draw = ImageDraw.Draw(picture)
    for box, colour in zip(ignored_xyxy * factor, ignored_colours, strict=True):
        _draw_dashed_box(draw, [box[0], box[1], box[2] - 1, box[3] - 1], colour, 1)
    for box, label in zip(boxes_xyxy * factor, target.labels.tolist(), strict=True):
        draw.rectangle(_around(box, picture.size, thickness), outline=palette.by_idx(label).as_hex(), width=thickness)

    sizes = np.sqrt(np.prod(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], axis=1))
    objects = f"{len(sizes)} objects, smallest {sizes.min():.1f} px" if len(sizes) else "no objects"
    ignored = f", {len(ignored_xyxy)} ignored" if len(ignored_xyxy) else ""
    place = f" at ({target.origin_xy[0]}, {target.origin_xy[1]})" if target.origin_xy != (0, 0) else ""
    return _with_caption(picture, [f"image {target.image_id}{place}, {hw[1]} x {hw[0]} px", objects + ignored])


def _colours(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """A normalised (3, H, W) tensor as uint8 (H, W, 3); what is no number is black."""
    values = image.detach().to("cpu", torch.float32).permute(1, 2, 0).numpy()
    values = np.nan_to_num(values * np.array(std, np.float32) + np.array(mean, np.float32), nan=0.0)
    return np.round(values.clip(0, 1) * 255).astype(np.uint8)


def _network_xyxy(boxes_cxcywh: Tensor, hw: tuple[int, int]) -> np.ndarray:
    """Normalised boxes as (n, 4) xyxy in the network's pixels."""
    boxes = boxes_cxcywh.detach().to("cpu", torch.float64).numpy().reshape(-1, 4)
    half = boxes[:, 2:] / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1) * (hw[1], hw[0], hw[1], hw[0])


def _around(box: np.ndarray, size: tuple[int, int], thickness: int) -> tuple[int, int, int, int]:
    """Corners of a rectangle whose line lies just outside of the box, but within the picture."""
    left, top, right, bottom = np.round(box).astype(int).tolist()
    left, top = max(left - thickness, 0), max(top - thickness, 0)
    right, bottom = min(right + thickness - 1, size[0] - 1), min(bottom + thickness - 1, size[1] - 1)
    return left, top, max(right, left), max(bottom, top)


def _stripes(hw: tuple[int, ...], step: int) -> np.ndarray:
    """True on diagonal lines, one pixel wide, every `step` pixels."""
    return np.add.outer(np.arange(hw[0]), np.arange(hw[1])) % step == 0


def _rgb(colour: str) -> tuple[int, int, int]:
    return sv.Color.from_hex(colour).as_rgb()


def _with_caption(picture: Image.Image, lines: Sequence[str]) -> Image.Image:
    """The picture with lines of text below it; wider where they need it."""
    size = _font_size(picture, 1 / 45, 13, 20)
    font = ImageFont.load_default(size)
    line_height = round(1.35 * size)
    width = max(picture.width, *(math.ceil(font.getlength(line)) for line in lines))
    framed = Image.new("RGB", (width, picture.height + line_height * len(lines)), _STRIP_COLOUR)
    framed.paste(picture, (0, 0))
    draw = ImageDraw.Draw(framed)
    for number, line in enumerate(lines):
        draw.text((0, picture.height + number * line_height + line_height // 2), line, "white", font, anchor="lm")
    return framed


def _grid(cells: Sequence[Image.Image]) -> Image.Image:
    """The cells in rows, so that the whole is somewhat wider than high, as screens are."""
    width, height = max(cell.width for cell in cells) + _GAP_PX, max(cell.height for cell in cells) + _GAP_PX
    columns = min(
        range(1, len(cells) + 1), key=lambda number: max(number * width, 1.3 * math.ceil(len(cells) / number) * height)
    )
    rows = math.ceil(len(cells) / columns)
    grid = Image.new("RGB", (columns * width + _GAP_PX, rows * height + _GAP_PX), _STRIP_COLOUR)
    for index, cell in enumerate(cells):
        grid.paste(cell, (_GAP_PX + index % columns * width, _GAP_PX + index // columns * height))
    return grid
