"""Ordinary images, read whole, and what pictures held in memory have in common."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossdino.data.images import read_image
from crossdino.sources.contract import Picture, Source
from crossdino.tiling import Tile

# Reduced pictures with a longer side are for people to look at: there half the memory is worth more than the last
# bit of sharpness.
_SHARP_SIDE = 2048


class WholeImage(Picture):
    """An image file that is decoded once, by `data.images.read_image`: the very pixels that training sees."""

    def __init__(self, source: Source, hw: tuple[int, int]) -> None:
        """Remember the file.

        Args:
            source: the file.
            hw: its upright size, as its header says.
        """
        self.source = source
        self.hw = hw
        self._pixels: NDArray[np.uint8] | None = None
        self._lock = threading.Lock()

    def read(self, tile: Tile) -> NDArray[np.uint8]:
        """See `Picture.read`."""
        return cut(self._whole(), tile)

    def read_reduced(self, hw: tuple[int, int]) -> NDArray[np.uint8]:
        """See `Picture.read_reduced`."""
        return reduce_pixels(self._whole(), hw)

    def close(self) -> None:
        """Forget the pixels."""
        with self._lock:
            self._pixels = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process decodes the file again."""
        return WholeImage, (self.source, self.hw)

    def _whole(self) -> NDArray[np.uint8]:
        with self._lock:
            if self._pixels is None:
                self._pixels = np.asarray(read_image(self.source.path))
            return self._pixels


def cut(pixels: NDArray[np.uint8], tile: Tile) -> NDArray[np.uint8]:
    """The pixels of a tile out of (H, W, 3), a copy; what lies beyond them is black."""
    result = np.zeros((tile.height, tile.width, 3), dtype=np.uint8)
    rows, columns = inside(tile, (pixels.shape[0], pixels.shape[1]))
    result[rows.start - tile.top : rows.stop - tile.top, columns.start - tile.left : columns.stop - tile.left] = pixels[
        rows.start : rows.stop, columns.start : columns.stop
    ]
    return result


def inside(tile: Tile, hw: tuple[int, int]) -> tuple[range, range]:
    """The rows and columns of a tile that lie in a picture; empty ranges where it lies beyond it."""
    top, left = min(max(tile.top, 0), hw[0]), min(max(tile.left, 0), hw[1])
    bottom, right = min(tile.top + tile.height, hw[0]), min(tile.left + tile.width, hw[1])
    return range(top, max(top, bottom)), range(left, max(left, right))


def reduce_pixels(pixels: NDArray[np.uint8], hw: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3) made smaller with averaging; see `Picture.read_reduced`."""
    height, width = min(hw[0], pixels.shape[0]), min(hw[1], pixels.shape[1])
    if (height, width) == pixels.shape[:2]:
        return pixels.copy()
    small = Image.fromarray(pixels).resize(
        (width, height), Image.Resampling.BILINEAR, reducing_gap=reducing_gap((height, width))
    )
    return np.array(small)


def reducing_gap(hw: tuple[int, int]) -> float:
    """How much larger than wanted the plain averages of blocks are that a picture is first reduced to.

    From there Pillow's bilinear filter, which averages as well, makes the rest. (A training image is filtered in one
    step.)

    Args:
        hw: the wanted size.
    """
    return 2.0 if max(hw) <= _SHARP_SIDE else 1.0
