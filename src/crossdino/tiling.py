"""Tiles: where an image is cut.

Small objects live in large images. Training, validation and prediction share this one geometry, so that what is
measured is what will be used; `crossdino.merging` puts together what was found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from crossdino.config import InferenceConfig
from crossdino.errors import InputError

# A tile is held in memory as a whole, also where the image is smaller, and as a file it must be one that Pillow opens.
LARGEST_TILE_PX = 12288


@dataclass(frozen=True)
class Tile:
    """A rectangle of an image, in pixels of the file; it may reach beyond an image that is smaller than a tile.

    Attributes:
        top: first row.
        left: first column.
        height: in pixels.
        width: in pixels.
    """

    top: int
    left: int
    height: int
    width: int


def tile_starts(length: int, size: int, overlap: int) -> list[int]:
    """Where the tiles begin along one side of an image.

    As few tiles as possible, spread evenly, so that there is no thin leftover: the first starts at 0, the last ends
    with the image, neighbours overlap by `overlap` or more.

    Args:
        length: the image's side in pixels.
        size: the tile's side in pixels.
        overlap: the least overlap in pixels, below `size`.

    Returns:
        The starts, ascending; [0] where one tile is enough.

    Raises:
        InputError: the overlap is not smaller than the tile, or the tile is larger than `LARGEST_TILE_PX`.
    """
    if size > LARGEST_TILE_PX:
        raise InputError(f"tiles of {size} px are too large: give at most {LARGEST_TILE_PX} px, or 0 for whole images")
    if size < 1 or not 0 <= overlap < size:
        raise InputError(f"tiles of {size} px cannot overlap by {overlap} px: give an overlap of 0 to {size - 1} px")
    if length <= size:
        return [0]
    count = math.ceil((length - overlap) / (size - overlap))
    return [index * (length - size) // (count - 1) for index in range(count)]


def tile_grid(hw: tuple[int, int], size: int, overlap: int) -> list[Tile]:
    """The tiles of an image, row by row; see `tile_starts`.

    Args:
        hw: the image's height and width in pixels.
        size: the side of the square tiles in pixels.
        overlap: the least overlap of neighbours in pixels.
    """
    rows, columns = (tile_starts(length, size, overlap) for length in hw)
    return [Tile(top, left, size, size) for top in rows for left in columns]


def choose_tiles(
    inference: InferenceConfig, tile_size: int | Literal["auto"] | None = None, tile_overlap: int | None = None
) -> tuple[int, int]:
    """The tiles to use, from what is asked for and what the model was made for.

    Args:
        inference: the model's own settings.
        tile_size: side in pixels, 0 for whole images, `auto` for the size at which objects are as large as they were
            in training, None for the model's own.
        tile_overlap: least overlap of neighbours in pixels; None: what goes with the size.

    Returns:
        Side and overlap in pixels; side 0 for whole images.

    Raises:
        InputError: no such tiles, or the model does not know what `auto` is.
    """
    size, overlap = inference.tile_size, inference.tile_overlap
    if tile_size == "auto":
        size, overlap = inference.auto_tile_size, inference.auto_tile_overlap
        if not size:
            raise InputError(
                "tile_size is auto, but the model does not know how large its objects were in training (it was made "
                "by an older crossdino, or elsewhere): give the tiles' side in pixels"
            )
    elif tile_size is not None:
        if not isinstance(tile_size, int) or tile_size < 0:
            raise InputError(f"tile_size is {tile_size!r}: give the tiles' side in pixels, 0 for whole images, or auto")
        size, overlap = tile_size, overlap if tile_size == size else min(overlap, tile_size // 4)
    if tile_overlap is not None:
        if not size:
            raise InputError(f"tile_overlap is {tile_overlap}, but images are not cut into tiles: give a tile_size")
        overlap = tile_overlap
    if size:
        tile_starts(1, size, overlap)  # refuses an impossible overlap
    return size, overlap
