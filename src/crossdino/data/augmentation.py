"""The training recipe: what the network sees of an image, drawn at random.

It is that of DETR and DINO: a random flip, then either a resize to a random short side, or a resize, a random crop and
that resize again, each with probability one half. We flip *after* resizing: every step treats both directions alike, so
the distribution is the same, and fewer pixels move. Vertical flips, quarter turns, colour jitter, mosaic and copy-paste
are additions for small objects and off by default.

Where we differ from others. Mosaic (YOLOv4, arXiv 2004.10934) is known as four images squeezed into the area of one or
of two: a 10-pixel object comes out with 5. Here every part keeps the scale that the plain recipe would give its image,
and a window of it is cut out *before* it is resized; the size of the canvas is the plain recipe's too, so a mosaic
costs no more than an image and shows as many objects as one on average. Copy-paste (Kisantal et al., arXiv 1902.07296)
is known with masks; our data sets have boxes alone, so an object takes a margin of its surroundings along, which fades
into the new place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as color

from crossdino.config import DataConfig
from crossdino.data.transforms import Sample, crop, flip_horizontally, flip_vertically, resize, resize_hw, turn

DrawOther = Callable[[np.random.Generator], Sample]

# Mosaic: where the four parts meet, as a share of the canvas from its upper left corner.
_MEETING_RANGE = (0.25, 0.75)
# A part whose image is smaller than its place is enlarged up to this factor to fill it; what is left stays grey.
_LARGEST_FILL = 2.0
# The grey: ImageNet's mean colour, which is zero for the network, as padding is.
_GREY = (124, 116, 104)

# Copy-paste: range of the change of an object's size; objects below _TINY_PX are not made smaller.
_RESCALE_RANGE = (0.8, 1.25)
_TINY_PX = 8.0
# Surroundings that are taken along on each side: a share of the object's size, and limits in pixels.
_MARGIN_SHARE, _MARGIN_PX = 0.3, (2, 8)
# Places that are tried for each object; of the first free ones the one is taken whose colour suits the margin best.
_TRIES, _CHOICES = 20, 4


def augment(
    sample: Sample, config: DataConfig, generator: np.random.Generator, draw_other: DrawOther | None = None
) -> Sample:
    """The training recipe (see the top of this file).

    Args:
        sample: image (or tile) and boxes as in the file.
        config: sizes and probabilities.
        generator: the only source of randomness.
        draw_other: gives another random training image (or tile), as it is in the file, for mosaic and copy-paste;
            None: they use the image itself.

    Returns:
        The sample at its training size; it may have lost all its objects to the crop.
    """
    original = sample
    draw = draw_other or (lambda _: original)
    if config.mosaic > 0 and generator.random() < config.mosaic:
        sample = mosaic([sample, draw(generator), draw(generator), draw(generator)], config, generator)
    else:
        sample = _resize(sample, config, generator)
    sample = _turn(sample, config, generator)
    if config.copy_paste > 0 and generator.random() < config.copy_paste:
        sample = copy_paste(sample, [original, draw(generator)], config, generator)
    if config.color_jitter > 0:
        sample = replace(sample, image=jitter(sample.image, config.color_jitter, generator))
    return sample


def _resize(sample: Sample, config: DataConfig, generator: np.random.Generator) -> Sample:
    """DINO's resize, or crop between two resizes."""
    if config.crop_short_sides and generator.random() < 0.5:
        sample = resize(sample, resize_hw(sample.hw, int(generator.choice(config.crop_short_sides))))
        sample = random_crop(sample, config.crop_range, generator, config.tile_keep if config.tile_px else 0.0)
    return resize(sample, _train_hw(sample.hw, config, generator))


def _turn(sample: Sample, config: DataConfig, generator: np.random.Generator) -> Sample:
    """The flips and quarter turns."""
    if generator.random() < config.horizontal_flip:
        sample = flip_horizontally(sample)
    if generator.random() < config.vertical_flip:
        sample = flip_vertically(sample)
    if config.quarter_turns:
        sample = turn(sample, int(generator.integers(4)))
    return sample


def jitter(image: Tensor, strength: float, generator: np.random.Generator) -> Tensor:
    """Change brightness, contrast and saturation, in this order, by factors within 1 - strength and 1 + strength."""
    brightness, contrast, saturation = generator.uniform(1 - strength, 1 + strength, 3).tolist()
    image = color.adjust_brightness_image(image, brightness)
    image = color.adjust_contrast_image(image, contrast)
    return color.adjust_saturation_image(image, saturation)


def random_crop(
    sample: Sample, side_range: tuple[int, int], generator: np.random.Generator, keep: float = 0.0
) -> Sample:
    """Cut out a rectangle of random place, and of sides within `side_range` (both ends) as far as the image allows."""
    height, width = _crop_hw(sample.hw, side_range, generator)
    top = int(generator.integers(sample.hw[0] - height + 1))
    left = int(generator.integers(sample.hw[1] - width + 1))
    return crop(sample, top, left, (height, width), keep)


def _crop_hw(hw: tuple[int, int], side_range: tuple[int, int], generator: np.random.Generator) -> tuple[int, int]:
    low, high = side_range
    height, width = (int(generator.integers(min(low, side), min(high, side) + 1)) for side in hw)
    return height, width


def _train_hw(hw: tuple[int, int], config: DataConfig, generator: np.random.Generator) -> tuple[int, int]:
    """A size that the recipe's last resize gives to an image of size `hw`."""
    return resize_hw(hw, int(generator.choice(config.train_short_sides)), config.train_long_side)


# --- mosaic ---


def mosaic(parts: Sequence[Sample], config: DataConfig, generator: np.random.Generator) -> Sample:
    """Put a window of each of four images around a random point.

    Each part has a scale that the plain recipe, its crop included, could give its image, unless the image would not
    fill its place: then it is enlarged just enough, by at most 2; only what is left even then is grey. Windows lie at
    random in their images. An object of which less than `tile_keep` is left is ignored.

    Args:
        parts: four images as in their files; the first one decides the form of the canvas.
        config: sizes.
        generator: source of randomness.

    Returns:
        The canvas, of a size that the plain recipe could give the first image.
    """
    height, width = _train_hw(parts[0].hw, config, generator)
    meeting = [round(float(generator.uniform(*_MEETING_RANGE)) * side) for side in (height, width)]
    canvas = torch.tensor(_GREY, dtype=torch.uint8).repeat(height, width, 1).permute(2, 0, 1)
    pieces: list[Sample] = []
    for index, part in enumerate(parts):
        lower, right = index >= 2, index % 2 == 1
        place_hw = (height - meeting[0] if lower else meeting[0], width - meeting[1] if right else meeting[1])
        piece = _window(part, place_hw, config, generator)
        if piece is None:
            continue
        # A piece that does not fill its place touches the point where the parts meet.
        top = meeting[0] if lower else meeting[0] - piece.hw[0]
        left = meeting[1] if right else meeting[1] - piece.hw[1]
        canvas[:, top : top + piece.hw[0], left : left + piece.hw[1]] = piece.image
        pieces.append(_moved(piece, top, left))
    return _with_boxes(canvas, pieces)


def _window(
    part: Sample, place_hw: tuple[int, int], config: DataConfig, generator: np.random.Generator
) -> Sample | None:
    """A random window of an image at its training scale, of the size `place_hw` as far as the image allows."""
    trained_hw = _scaled_hw(part, config, generator)
    at = generator.random(2)
    if min(place_hw) < 1:
        return None
    scales = [trained / side for trained, side in zip(trained_hw, part.hw, strict=True)]
    missing = max(place / trained for place, trained in zip(place_hw, trained_hw, strict=True))
    enlarged = min(max(1.0, missing), _LARGEST_FILL)
    window_hw, piece_hw, start = [], [], []
    for place, side, scale, share in zip(place_hw, part.hw, scales, at.tolist(), strict=True):
        # The window in whole pixels of the file, so that nothing outside of it need be resized.
        window = min(max(1, round(place / (scale * enlarged))), side)
        window_hw.append(window)
        start.append(int(share * (side - window + 1)))
        full = window == side and side * scale * enlarged < place
        piece_hw.append(max(1, round(side * scale * enlarged)) if full else place)
    piece = crop(part, start[0], start[1], (window_hw[0], window_hw[1]), config.tile_keep)
    return resize(piece, (piece_hw[0], piece_hw[1]))


# --- copy-paste ---


def copy_paste(sample: Sample, sources: Sequence[Sample], config: DataConfig, generator: np.random.Generator) -> Sample:
    """Paste small objects of some images at random free places of one.

    What is pasted: objects of sqrt(width x height) <= `copy_paste_max_px` at the network's scale that touch neither the
    border of their image nor another box, and so are whole and alone. Each takes a margin of its surroundings along,
    which fades out to the patch's edge, while everything within the box is kept; it is flipped and turned as images
    are, and changes its size by a factor of 0.8 to 1.25. A place is free if the patch, margin included, touches no box:
    neither object, nor pasted object, nor region to ignore. Of four such places the one is taken whose mean colour is
    nearest to the margin's: a frame of another colour would tell the network what was pasted.

    Args:
        sample: an image at its training size.
        sources: images as in their files; their objects are scaled as the plain recipe would scale the image.
        config: sizes, flips, the number of objects.
        generator: source of randomness.

    Returns:
        The image with up to `copy_paste_count` more objects, behind its own ones; unchanged where nothing can be
        pasted.
    """
    donors: list[tuple[Sample, tuple[float, float], int, int]] = []
    for source in sources:
        hw = _scaled_hw(source, config, generator)
        scale_yx = (hw[0] / source.hw[0], hw[1] / source.hw[1])
        donors += [(source, scale_yx, *donor) for donor in _donors(source, scale_yx, config.copy_paste_max_px)]
    if not donors or config.copy_paste_count < 1:
        return sample
    pasted = [sample]
    image, taken = sample.image.clone(), sample.boxes_xyxy.numpy()
    for _ in range(int(generator.integers(1, config.copy_paste_count + 1))):
        patch = _patch(*donors[int(generator.integers(len(donors)))], config, generator)
        corners = _free_corners(patch.hw, sample.hw, taken, generator.random((_TRIES, 2)))
        if corners:
            corner = _blend(image, patch, corners)
            pasted.append(_moved(patch, *corner))
            taken = np.concatenate([taken, pasted[-1].boxes_xyxy.numpy()])
    return _with_boxes(image, pasted)


def _donors(source: Sample, scale_yx: tuple[float, float], max_px: float) -> list[tuple[int, int]]:
    """The objects that can be copied: their indices, and their margins in pixels of the file."""
    boxes = source.boxes_xyxy.numpy()
    scale = float(np.sqrt(scale_yx[0] * scale_yx[1]))
    size_px = scale * np.sqrt(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1))
    small = np.flatnonzero(~source.ignored.numpy() & (size_px <= max_px))
    x1, y1, x2, y2 = boxes.T
    # How far everything else is away, as the larger one of the gaps in x and y; below zero where boxes overlap.
    gaps = [np.maximum(low - high[small, None], low[small, None] - high) for low, high in ((x1, x2), (y1, y2))]
    gap = np.maximum(*gaps)
    gap[np.arange(len(small)), small] = np.inf
    border = np.minimum.reduce([x1, y1, source.hw[1] - x2, source.hw[0] - y2])[small]
    # The patch is widened to whole pixels, hence the one that is taken off.
    room = np.floor(np.minimum(gap.min(axis=1, initial=np.inf), border) - 1)
    margin = np.minimum(np.ceil(np.clip(_MARGIN_SHARE * size_px[small], *_MARGIN_PX) / scale), room)
    enough = margin * scale >= _MARGIN_PX[0]
    return list(zip(small[enough].tolist(), margin[enough].astype(int).tolist(), strict=True))


def _patch(
    source: Sample,
    scale_yx: tuple[float, float],
    index: int,
    margin_px: int,
    config: DataConfig,
    generator: np.random.Generator,
) -> Sample:
    """One object with its margin, at the network's scale changed a little, flipped and turned."""
    x1, y1, x2, y2 = source.boxes_xyxy[index].tolist()
    size_px = max(float(np.sqrt((x2 - x1) * (y2 - y1) * scale_yx[0] * scale_yx[1])), 1e-6)
    low = min(1.0, max(_RESCALE_RANGE[0], _TINY_PX / size_px))
    high = max(1.0, min(_RESCALE_RANGE[1], config.copy_paste_max_px / size_px))
    factor = float(generator.uniform(low, high))
    left, top = int(np.floor(x1)) - margin_px, int(np.floor(y1)) - margin_px
    right, bottom = int(np.ceil(x2)) + margin_px, int(np.ceil(y2)) + margin_px
    alone = Sample(source.image, source.boxes_xyxy[index : index + 1], source.labels[index : index + 1])
    patch = crop(alone, top, left, (bottom - top, right - left))
    hw = (max(1, round(patch.hw[0] * scale_yx[0] * factor)), max(1, round(patch.hw[1] * scale_yx[1] * factor)))
    return _turn(resize(patch, hw), config, generator)


def _free_corners(
    patch_hw: tuple[int, int], image_hw: tuple[int, int], taken: np.ndarray, places: np.ndarray
) -> list[tuple[int, int]]:
    """The first places (top, left) at which the patch touches no box of `taken`; `places` are shares of the room."""
    room = np.array(image_hw) - patch_hw
    if (room < 0).any():
        return []
    corners = np.floor(places * (room + 1)).astype(int)
    top, left = corners[:, 0, None], corners[:, 1, None]
    x1, y1, x2, y2 = taken.T
    touches = (x1 < left + patch_hw[1]) & (x2 > left) & (y1 < top + patch_hw[0]) & (y2 > top)
    free = corners[~touches.any(axis=1)][:_CHOICES]
    return [(int(top), int(left)) for top, left in free]


def _blend(image: Tensor, patch: Sample, corners: list[tuple[int, int]]) -> tuple[int, int]:
    """Put the patch where it suits best, whole within its box, fading out to its edges; the image is changed."""
    height, width = patch.hw
    x1, y1, x2, y2 = patch.boxes_xyxy[0].tolist()
    alpha = _fade(height, y1, y2)[:, None] * _fade(width, x1, x2)[None, :]
    areas = [image[:, top : top + height, left : left + width] for top, left in corners]
    pixels, margin = patch.image.to(torch.float32), (alpha < 1).to(torch.float32)
    wanted = (pixels * margin).sum((1, 2))
    distances = [float(((area * margin).sum((1, 2)) - wanted).square().sum()) for area in areas]
    best = int(np.argmin(distances))
    areas[best].copy_(areas[best].to(torch.float32).lerp(pixels, alpha).round_())
    return corners[best]


def _fade(side: int, start: float, end: float) -> Tensor:
    """The opacity of a row of pixels: 1 wherever the pixel has a part in start..end, falling to the row's ends."""
    before, behind = int(np.floor(start)), side - int(np.ceil(end))
    rising, falling = torch.arange(before) + 0.5, torch.arange(behind).flip(0) + 0.5
    return torch.cat([rising / max(before, 1), torch.ones(side - before - behind), falling / max(behind, 1)])


# --- parts of both ---


def _scaled_hw(sample: Sample, config: DataConfig, generator: np.random.Generator) -> tuple[int, int]:
    """The size that the whole image has at a scale of the plain recipe, in which a crop enlarges what it leaves."""
    if not (config.crop_short_sides and generator.random() < 0.5):
        return _train_hw(sample.hw, config, generator)
    height, width = resize_hw(sample.hw, int(generator.choice(config.crop_short_sides)))
    cut_hw = _crop_hw((height, width), config.crop_range, generator)
    zoom = min(_train_hw(cut_hw, config, generator)) / min(cut_hw)
    return max(1, round(height * zoom)), max(1, round(width * zoom))


def _moved(sample: Sample, top: int, left: int) -> Sample:
    """The boxes as they are once the image lies at (top, left) of a larger one."""
    return replace(sample, boxes_xyxy=sample.boxes_xyxy + torch.tensor([left, top, left, top]))


def _with_boxes(image: Tensor, parts: list[Sample]) -> Sample:
    """An image with the boxes of all parts."""
    return Sample(
        image,
        torch.cat([part.boxes_xyxy for part in parts]),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.ignored for part in parts]),
    )
