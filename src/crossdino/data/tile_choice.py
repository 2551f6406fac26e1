"""How large images should be for the network, and which tiles give that: the one rule of planner and `tile_size: auto`.

- A token of the finest level covers `first_stride` pixels of the network's input (8, or 4). An object with sides of one
  stride always contains the centre of a token; one with sides of two strides always contains one token's cell as a
  whole, wherever it lies. So the smallest tenth of the objects shall have at least one stride and the median object at
  least two. Enlarging an image to more than twice its size adds no detail and is not asked for.
- Tiles, where whole images of that scale would have clearly more pixels than the network's input was made for. Tiles
  overlap by the longest side of all but the largest hundredth of the objects, so that nearly every object lies in some
  tile as a whole.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crossdino.config import Config, DataConfig
from crossdino.data.index import DatasetIndex
from crossdino.data.inspection import SplitObjects, network_scales, network_sizes
from crossdino.data.transforms import resize_hw

# More than this many times the pixels of the recipe's own input are better cut into tiles.
WHOLE_IMAGE_LIMIT = 1.5
LARGEST_ENLARGEMENT = 2.0
# Sizes that fall short of what is wanted by less than this are left alone.
TOLERANCE = 1.1
# The overlap of tiles is the largest of these quantiles (%) of the objects' longer sides that is not too long.
_OVERLAP_QUANTILES = (99.0, 97.5, 95.0, 90.0)
# What tiles overlap by where no object tells better, and at least.
_USUAL_OVERLAP_PX, _LEAST_OVERLAP_PX = 64, 32
_SMALLEST_TILE_PX = 64


@dataclass(frozen=True)
class SizeChoice:
    """What is to be done with the images of a data set.

    Attributes:
        action: `keep` whole images as they are, `resize` whole images to another input, or cut `tiles`.
        reason: why, with the numbers.
        growth: by how much the input of whole images is to be larger (`resize`).
        tile_size: side of the tiles in pixels of the file; 0: whole images.
        tile_overlap: of neighbours, in pixels of the file.
        overlap_reason: why this overlap.
        side: of the network's input that the tiles are shown at.
    """

    action: Literal["keep", "resize", "tiles"]
    reason: str
    growth: float = 1.0
    tile_size: int = 0
    tile_overlap: int = 0
    overlap_reason: str = ""
    side: int = 0


def choose_size(split: SplitObjects, data: DataConfig, first_stride: int, *, fixed_input: bool = False) -> SizeChoice:
    """Decide between whole images, a larger input and tiles, from the sizes of the objects.

    Args:
        split: the training data.
        data: the input that the images are resized to; its tiles do not matter.
        first_stride: of the network's finest level in pixels.
        fixed_input: the size of the network's input stays, only tiles may be chosen.

    Returns:
        The choice.
    """
    data = dataclasses.replace(data, tile_size=0)
    if not len(split):
        return SizeChoice("keep", "no object tells which size is needed")
    sizes, scales = network_sizes(split, data), network_scales(split.image_hw, data)[split.image_of]
    tenth, median = np.percentile(sizes, (10, 50)).tolist()
    scale = float(np.median(scales))
    growth = max(first_stride / tenth, 2 * first_stride / median)
    goal = (
        f"a token of the finest level covers {first_stride} px: at the network's input the smallest tenth of the "
        f"objects should have {first_stride} px and the median {2 * first_stride} px"
    )
    found = f"they have {tenth:.1f} and {median:.1f} px at the recipe's size"
    if growth <= 1 and scale > LARGEST_ENLARGEMENT * TOLERANCE:
        reason = f"the recipe would enlarge these images {scale:.1f} times, more than 2 adds no detail; objects keep "
        reason += f"what they need: {goal}"
        return SizeChoice("resize", reason, max(scale * growth, LARGEST_ENLARGEMENT) / scale)
    if growth <= 1:
        return SizeChoice("keep", f"{goal}: {found}")
    # Where images differ in size, those count whose objects are too small.
    short = sizes < 2 * first_stride
    scale, image_hw = float(np.median(scales[short])), split.image_hw[np.unique(split.image_of[short])]
    target = min(scale * growth, max(LARGEST_ENLARGEMENT, scale))
    if target <= scale * TOLERANCE:
        return SizeChoice("keep", f"{goal}: {found}; more pixels would add little")
    pixels = float(np.median(image_hw.prod(1))) * target**2
    if pixels <= WHOLE_IMAGE_LIMIT * data.test_short_side * data.test_long_side:
        return SizeChoice("resize", f"{goal}; {found}", target / scale)
    median_wh = np.median(image_hw, axis=0)[::-1].tolist()
    reason = (
        f"{goal}; {found}, and whole images that would give them that are too large "
        f"({' x '.join(f'{side * target:.0f}' for side in median_wh)} px)"
    )
    longest = split.boxes_xywh[:, 2:].max(1)
    usual = float(np.percentile(longest, 95))
    side = data.test_short_side
    size = max(_SMALLEST_TILE_PX, int(side / target) // 32 * 32)
    if size < 2 * usual:
        size = round_up(2 * usual, 32)
        if not fixed_input:
            side = min(round_up(size * target, 32), round_up(side * math.sqrt(WHOLE_IMAGE_LIMIT), 32))
        reason += f"; a tile is at least twice as long as 95 % of the objects ({usual:.0f} px)"
    if size >= max(median_wh):
        return SizeChoice("keep", f"{reason}, which the images themselves ({max(median_wh):.0f} px) are not")
    overlap, overlap_reason = choose_overlap(longest, size)
    reason += f": tiles of {size} px, shown to the network at {side} px"
    return SizeChoice("tiles", reason, 1.0, size, overlap, overlap_reason, side)


def choose_overlap(longest_px: NDArray[np.float64], size: int) -> tuple[int, str]:
    """By how much tiles overlap: as nearly the longest object, but by no more than a third.

    Args:
        longest_px: (n,) the longer side of every object in pixels of the file.
        size: the tiles' side in pixels of the file.

    Returns:
        The overlap in pixels, and why.
    """
    limit = size // 3
    if not len(longest_px):
        return min(_USUAL_OVERLAP_PX, limit), "no object tells its length"
    quantiles = zip(_OVERLAP_QUANTILES, np.percentile(longest_px, _OVERLAP_QUANTILES).tolist(), strict=True)
    share, length = next(
        ((quantile, value) for quantile, value in quantiles if value <= limit),
        (100 * float((longest_px <= limit).mean()), limit),
    )
    return min(max(round_up(length, 16), _LEAST_OVERLAP_PX), limit), (
        f"{share:g} % of the objects are at most {length:.0f} px long, so nearly each of these lies in some tile as a "
        "whole; more than a third of a tile would multiply the tiles"
    )


def with_tiles(config: Config, index: DatasetIndex) -> tuple[Config, str]:
    """The configuration with numbers in the place of `data.tile_size: auto`.

    Args:
        config: of a training; the size of its input stays.
        index: the training data.

    Returns:
        The configuration (the same one where nothing is `auto`), and a line that tells what was chosen and why, empty
        where nothing was.
    """
    if config.data.tile_size != "auto":
        return config, ""
    choice = choose_size(SplitObjects.of(index), config.data, config.model.first_stride, fixed_input=True)
    changes = {"tile_size": choice.tile_size}
    if choice.action == "tiles":
        line = (
            f"data.tile_size auto: {choice.tile_size} px, overlapping by {choice.tile_overlap} px: {choice.reason}; "
            f"{choice.overlap_reason}"
        )
        changes["tile_overlap"] = choice.tile_overlap
    else:
        line = f"data.tile_size auto: whole images: {choice.reason}"
    if choice.action == "resize" and choice.growth > 1:
        side = config.data.test_short_side
        line += f"; an input of {round_up(choice.growth * side, 32)} px instead of {side} px is enough for that"
        line += " (`crossdino inspect` proposes all sizes)"
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes)), line


def auto_tiles(index: DatasetIndex, data: DataConfig) -> tuple[int, int]:
    """Tiles in which objects are as large for the network as in these training data.

    Args:
        index: the training data.
        data: how they are prepared, `tile_size` decided.

    Returns:
        Size and overlap in pixels of the file: the tiles of the training, or, for whole images, tiles that are scaled
        as the median image is, and overlap by `choose_overlap`.
    """
    if data.tile_px:
        return data.tile_px, data.tile_overlap
    split = SplitObjects.of(index)
    scale = float(np.median(network_scales(split.image_hw, data)))
    side = resize_hw((1, 1), data.test_short_side, data.test_long_side)[0]  # of a square
    size = max(1, round(side / scale))
    return size, choose_overlap(split.boxes_xywh[:, 2:].max(1, initial=0), size)[0]


def round_up(value: float, step: int) -> int:
    """The next multiple of a step, at least one."""
    return max(1, math.ceil(value / step)) * step
