"""Pictures that are in memory already, in any of the usual forms."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crossdino.data.images import read_image
from crossdino.errors import InputError
from crossdino.sources.contract import Picture, Source
from crossdino.sources.images import cut, reduce_pixels
from crossdino.sources.opening import open_pictures
from crossdino.tiling import Tile

ImageInput = str | Path | Image.Image | np.ndarray | Tensor


class MemoryPicture(Picture):
    """An image that the caller holds."""

    def __init__(self, pixels: NDArray[np.uint8]) -> None:
        """Take (H, W, 3) pixels in RGB."""
        self.source = Source("image in memory", "", "memory")
        self.hw = pixels.shape[0], pixels.shape[1]
        self._pixels = pixels

    def read(self, tile: Tile) -> NDArray[np.uint8]:
        """See `Picture.read`."""
        return cut(self._pixels, tile)

    def read_reduced(self, hw: tuple[int, int]) -> NDArray[np.uint8]:
        """See `Picture.read_reduced`."""
        return reduce_pixels(self._pixels, hw)


def as_picture(image: ImageInput, channel_order: Literal["rgb", "bgr"] = "rgb") -> Picture:
    """An image in any of the usual forms as a picture.

    Args:
        image: as for `to_pil_image`; the path must be that of an image.
        channel_order: likewise.

    Raises:
        InputError: as `to_pil_image`.
    """
    if isinstance(image, (str, Path)):
        path = str(image)
        return next(open_pictures(Source(Path(path).as_posix(), path, "image")))
    return MemoryPicture(np.asarray(to_pil_image(image, channel_order)))


def to_pil_image(image: ImageInput, channel_order: Literal["rgb", "bgr"] = "rgb") -> Image.Image:
    """The image as PIL RGB, whatever form it came in.

    Args:
        image: a path, a PIL image of any mode, a uint8 array (H, W, 3 or 4) or (H, W), a uint8 tensor (3, H, W).
        channel_order: of the colours of arrays; OpenCV's are `bgr`.

    Returns:
        The image in RGB, 8 bits a channel.

    Raises:
        InputError: a file cannot be read, or an array has another type or shape.
    """
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        if image.mode == "F" or image.mode.startswith("I"):
            raise InputError(f"a PIL image of mode {image.mode} has no known range of values: convert it to 8 bits")
        return image.convert("RGB")
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise InputError(
                f"an image tensor of type {image.dtype} and shape {tuple(image.shape)} is not understood: give uint8 "
                "(3, H, W) in RGB; for values from 0 to 1 use (image * 255).round().to(torch.uint8)"
            )
        return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    if isinstance(image, np.ndarray):
        grey = image.ndim == 2
        colour = image.ndim == 3 and image.shape[2] in (3, 4)
        if image.dtype != np.uint8 or not (grey or colour) or image.size == 0:
            raise InputError(
                f"an image array of type {image.dtype} and shape {image.shape} is not understood: give uint8 (H, W, 3) "
                "in RGB; for values from 0 to 1 use (image * 255).round().astype(numpy.uint8)"
            )
        if colour:
            image = image[..., :3] if channel_order == "rgb" else image[..., 2::-1]
        return Image.fromarray(np.ascontiguousarray(image)).convert("RGB")
    raise InputError(
        f"an image of type {type(image).__name__} is not understood: give a path, a PIL image, a uint8 array or tensor"
    )
