"""Annotated pictures: of an image as it is, of a gigapixel image made smaller, so that memory stays flat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import supervision as sv
from numpy.typing import NDArray
from PIL import Image

from crossdino.results.picture_result import PictureResult
from crossdino.sources import DRAWN_MARK, Picture
from crossdino.tiling import Tile
from crossdino.visualization import draw_detections
from crossdino.writing import written_whole

# Larger pictures are made smaller. JPEG itself ends at 65,535 pixels a side.
_MOST_PIXELS = 50_000_000
_LONGEST_SIDE = 16_384
_REDUCED_SIDE = 4096


def draw_picture(
    picture: Picture,
    result: PictureResult,
    class_names: Sequence[str],
    *,
    most_pixels: int = _MOST_PIXELS,
    reduced_side: int = _REDUCED_SIDE,
) -> Image.Image:
    """A picture with its detections.

    Args:
        picture: what was looked at.
        result: what was found in it.
        class_names: the name of every class index.
        most_pixels: a picture with more pixels is made smaller.
        reduced_side: the long side in pixels of a picture that is made smaller.

    Returns:
        A picture with a legend below it; see `draw_detections`.

    Raises:
        ImageError: the picture cannot be read.
    """
    height, width = picture.hw
    if height * width <= most_pixels and max(height, width) <= _LONGEST_SIDE:
        pixels = picture.read(Tile(0, 0, height, width))
    else:
        scale = min(1.0, reduced_side / max(height, width))
        pixels = picture.read_reduced((max(1, round(height * scale)), max(1, round(width * scale))))
    return draw_detections(pixels, scaled_detections(result, (pixels.shape[0], pixels.shape[1])), class_names)


def scaled_detections(result: PictureResult, hw: tuple[int, int]) -> sv.Detections:
    """The detections in a picture that has been made smaller, to `hw` pixels."""
    scale = np.array([hw[1] / result.width, hw[0] / result.height] * 2)
    boxes: NDArray[np.float32] = (result.boxes_xyxy * scale).astype(np.float32)
    return sv.Detections(xyxy=boxes, confidence=result.scores, class_id=result.labels)


def write_picture(path: Path, drawn: Image.Image) -> None:
    """Write an annotated picture as JPEG, whole or not at all; its comment tells it from the images of the user.

    Args:
        path: its folder exists.
        drawn: of `draw_picture`.
    """
    with written_whole(path) as partial:
        drawn.save(partial, format="JPEG", quality=92, comment=DRAWN_MARK)
