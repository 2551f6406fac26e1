"""What can be looked at: the thing the user named, and one picture of it.

A picture hands out its tiles one by one, so that an image of any size can be searched in a fixed amount of memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crossdino.errors import InputError
from crossdino.tiling import Tile


@dataclass(frozen=True)
class Georeference:
    """Where a raster lies on the earth.

    Attributes:
        crs: the coordinate system, as `EPSG:32633` or, where it has no such number, as WKT.
        transform: (a, b, c, d, e, f) with x = a * column + b * row + c and y = d * column + e * row + f; the upper left
            corner of the upper left pixel is column 0, row 0.
    """

    crs: str
    transform: tuple[float, float, float, float, float, float]

    def to_world(self, points_xy: NDArray[np.generic]) -> NDArray[np.float64]:
        """Coordinates in the raster's system.

        Args:
            points_xy: (n, 2) pixels of the picture, column first.

        Returns:
            (n, 2) float64, x first.
        """
        a, b, c, d, e, f = self.transform
        columns, rows = np.asarray(points_xy, dtype=np.float64).reshape(-1, 2).T
        return np.stack([a * columns + b * rows + c, d * columns + e * rows + f], axis=1)


@dataclass(frozen=True)
class Source:
    """One thing that the user named, not opened yet; it can be sent to other processes.

    Attributes:
        name: how results call it: the path as the user wrote it, with `/` between its parts; `camera-0` for a camera.
        path: what is opened; the number of a camera.
        kind: what it is.
    """

    name: str
    path: str
    kind: Literal["image", "video", "camera", "memory"]


@dataclass(frozen=True)
class ReadOptions:
    """How pictures are read.

    Attributes:
        bands: the bands of a raster to look at, counted from 1: three as red, green and blue, or one as grey; None
            takes red, green and blue where the file says which they are, else the first three (or the first alone).
        value_range: the values that become black and white; `auto`: from the 2nd to the 98th percentile of every band;
            None: 8 bits stay as they are, 16 bits are scaled as in training.
        every_frame: of a video, every n-th frame is looked at, beginning with the first.
        windowed_px: an image of more pixels than this is read tile by tile instead of whole.
    """

    bands: tuple[int, ...] | None = None
    value_range: tuple[float, float] | Literal["auto"] | None = None
    every_frame: int = 1
    windowed_px: int = 50_000_000

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if self.bands is not None:
            bands = tuple(self.bands)
            object.__setattr__(self, "bands", bands)
            whole = all(isinstance(band, (int, np.integer)) and band >= 1 for band in bands)
            if len(bands) not in (1, 3) or not whole:
                raise InputError(f"bands {bands}: give one band (grey) or three (red, green, blue), counted from 1")
        if isinstance(self.value_range, str):
            if self.value_range != "auto":
                raise InputError(f"value_range {self.value_range!r}: give two numbers, or auto")
        elif self.value_range is not None:
            ends = tuple(float(value) for value in self.value_range)
            if len(ends) != 2 or not np.isfinite(ends).all() or not ends[0] < ends[1]:
                raise InputError(f"value_range {ends}: give the value of black and a larger one of white")
            object.__setattr__(self, "value_range", ends)
        if self.every_frame < 1:
            raise InputError(f"every_frame is {self.every_frame}: give at least 1")
        if self.windowed_px < 0:
            raise InputError(f"windowed_px is {self.windowed_px}: give a number of pixels, 0 to read all by windows")


@dataclass(frozen=True)
class VideoInfo:
    """What a video says of itself, for progress and for writing another one like it.

    Attributes:
        fps: frames a second, on average.
        hw: height and width in pixels of its frames, upright.
        num_frames: about how many frames it has (headers err); None: it does not say.
    """

    fps: float
    hw: tuple[int, int]
    num_frames: int | None


class Picture(ABC):
    """One image, or one frame of a video: opened lazily, readable from several threads at once.

    Attributes:
        source: what it belongs to.
        frame: number of the frame in its video, from 0; None for an image.
        seconds: when the frame is shown, from the beginning of the video; None for an image.
        hw: height and width in pixels, upright (EXIF orientation and the rotation of videos applied).
        georeference: where it lies on the earth, if the file says so.
        windowed: it is so large that it is never in memory as a whole.
    """

    source: Source
    frame: int | None = None
    seconds: float | None = None
    hw: tuple[int, int]
    georeference: Georeference | None = None
    windowed: bool = False

    @abstractmethod
    def read(self, tile: Tile) -> NDArray[np.uint8]:
        """The pixels of a tile.

        Args:
            tile: in pixels of the upright picture; what lies beyond the picture is black.

        Returns:
            (tile.height, tile.width, 3) RGB, the caller's own.

        Raises:
            ImageError: the file is broken there; the message names it.
        """

    @abstractmethod
    def read_reduced(self, hw: tuple[int, int]) -> NDArray[np.uint8]:
        """The whole picture, made smaller with averaging.

        Args:
            hw: the wanted height and width in pixels; a side longer than the picture's gives the picture's own.

        Returns:
            (height, width, 3) RGB.

        Raises:
            ImageError: the file is broken; the message names it.
        """

    def close(self) -> None:  # noqa: B027 - a picture that holds nothing has nothing to do
        """Let go of files and pixels; reading again opens it again."""

    def __enter__(self) -> Picture:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
