"""Reading image files: any mode and orientation in, upright 8-bit RGB out, one clear line for what cannot be read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from crossdino.errors import InputError

ORIENTATION_TAG = 0x0112


class ImageError(InputError):
    """An image file that cannot be used.

    A `DataLoader` re-creates an exception of a worker process from the text of its traceback; this class keeps only the
    message at the end of such a text, so that the user sees the same single line with and without workers.
    """

    def __init__(self, message: str) -> None:
        """Keep the message, without a worker's traceback before it."""
        super().__init__(message.rsplit("ImageError: ", 1)[-1].rstrip())


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The opened image; every failure while it is open becomes an `ImageError` that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"image {path} does not exist; check the path") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not an image that can be read; give a PNG, JPEG, TIFF, WebP or BMP file") from None
    except Image.DecompressionBombError:
        raise ImageError(f"image {path} has too many pixels to be read whole; cut it into tiles first") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"image {path} is broken ({reason}); replace the file or take it out") from None


@contextmanager
def _large_images_allowed() -> Iterator[None]:
    """Without Pillow's warning about large images: below its hard limit (179 million pixels) they are legitimate."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def read_headers(paths: Sequence[Path]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The sizes of images, without decoding them.

    Args:
        paths: image files.

    Returns:
        For each (width, height) with the EXIF orientation applied, and (width, height) as stored.

    Raises:
        ImageError: a file is missing or no image.
    """
    # Threads for the sake of network drives; the warning filter is not thread-safe and therefore set outside.
    with _large_images_allowed(), ThreadPoolExecutor(16) as pool:
        return list(pool.map(_read_header, paths))


def _read_header(path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """One image's sizes, see `read_headers`."""
    with _opened(path) as image:
        width, height = image.size
        # Pillow turns TIFF files itself, and reports the size after that.
        turned = image.format != "TIFF" and image.getexif().get(ORIENTATION_TAG, 1) in (5, 6, 7, 8)
    return ((height, width) if turned else (width, height)), (width, height)


def read_image(path: str | Path, apply_exif: bool = True) -> Image.Image:
    """Read an image as 8-bit RGB.

    Grey, palette and other colour modes are converted; transparency is dropped (the colours beneath it are taken, as
    OpenCV and torchvision do); 16-bit grey is scaled from 0..65535 to 0..255. The first frame of an animation is taken.

    Args:
        path: image file.
        apply_exif: turn the image as its EXIF orientation says.

    Returns:
        The image, mode `RGB`, fully loaded.

    Raises:
        ImageError: the file is missing, broken, truncated, too large, or of a mode without a known value range.
    """
    path = Path(path)
    with _large_images_allowed(), _opened(path) as image:
        image.load()
        upright = ImageOps.exif_transpose(image) if apply_exif else image
        return _to_rgb(upright, path)


def _to_rgb(image: Image.Image, path: Path) -> Image.Image:
    """The image in mode RGB (a copy in any case: the file is closed afterwards)."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float32) / 257.0
        return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(
            f"image {path} has 32-bit pixels without a known range; convert it to 8 or 16 bits per channel"
        )
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
