"""Reading image files: any mode and orientation in, upright 8-bit RGB out, one clear line for what cannot be read.

Images of 16 bits a channel become 8 bits by one rule for a whole file: a file whose largest value is at most 4095 is
taken to come from a 12-bit camera and scaled from 0..4095, every other one from 0..65535. (Read as 0..65535, 12-bit
images would be nearly black, and no one would be told.)
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError

from crossdino.errors import InputError

ORIENTATION_TAG = 0x0112
# What shows an image upright, by its EXIF orientation; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Suffixes of the files that are taken for images where a folder is searched for them.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif"),
    *(".jp2", ".pbm", ".pgm", ".pnm", ".ppm"),
)

# Pillow's names of 16-bit colours in a file, and of the same with the other byte order (N: this machine's).
OTHER_BYTE = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA", "RGBX")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))
}

# Kinds of `ImageError`, as they stand in lists of problems.
MISSING = "image is missing"
NO_IMAGE = "not an image"
TOO_LARGE = "image is too large"
BROKEN = "broken image"
UNKNOWN_RANGE = "pixels without a known range"


class ImageError(InputError):
    """An image file that cannot be used.

    A `DataLoader` re-creates an exception of a worker process from the text of its traceback; this class keeps only the
    message at the end of such a text, so that the user sees the same single line with and without workers.

    Attributes:
        what: the kind, for lists of problems.
        detail: what the decoder said.
    """

    def __init__(self, message: str, what: str = BROKEN, detail: str = "") -> None:
        """Keep the message, without a worker's traceback before it."""
        super().__init__(message.rsplit("ImageError: ", 1)[-1].rstrip())
        self.what = what
        self.detail = detail


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """The opened image; every failure while it is open becomes an `ImageError` that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"image {path} does not exist; check the path", MISSING) from None
    except UnidentifiedImageError:
        message = f"{path} is not an image that can be read; give a PNG, JPEG, TIFF, WebP or BMP file"
        raise ImageError(message, NO_IMAGE) from None
    except Image.DecompressionBombError:
        message = f"image {path} has too many pixels to be read whole; cut it into smaller images first"
        raise ImageError(message, TOO_LARGE) from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        message = f"image {path} is broken ({reason}); replace the file or take it out"
        raise ImageError(message, BROKEN, reason) from None


def allow_large_images() -> None:
    """Keep Pillow from warning of large images: below its hard limit (179 million pixels) they are legitimate.

    The filter of warnings belongs to the whole process and cannot be set for a while in one of several threads
    (`warnings.catch_warnings` would take away what another thread has set), so it is set for good.
    """
    if ("ignore", None, Image.DecompressionBombWarning, None, 0) not in warnings.filters:
        warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_sizes(path: Path, decode: bool = False) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size of an image.

    Args:
        path: image file.
        decode: also decode and convert it, as `read_image` will; False reads only the header.

    Returns:
        (width, height) with the EXIF orientation applied, and (width, height) as stored.

    Raises:
        ImageError: as `read_image`; what only decoding can find is found only then.
    """
    allow_large_images()
    with _opened(path) as image:
        width, height = image.size
        _check_mode(image, path)
        if decode:
            _to_rgb(image, path)
        turned = _orientation(image, path, decoded=decode) in (5, 6, 7, 8)
    return ((height, width) if turned else (width, height)), (width, height)


def read_image(path: str | Path, apply_exif: bool = True) -> Image.Image:
    """Read an image as 8-bit RGB.

    Grey, palette and other colour modes are converted; transparency is dropped (the colours beneath it are taken, as
    OpenCV and torchvision do); 16 bits a channel are scaled to 8 (see the head of this file). The first frame of an
    animation is taken.

    Args:
        path: image file.
        apply_exif: turn the image as its EXIF orientation says.

    Returns:
        The image, mode `RGB`, fully loaded.

    Raises:
        ImageError: the file is missing, broken, truncated, too large, or of a mode without a known value range.
    """
    path = Path(path)
    allow_large_images()
    with _opened(path) as image:
        _check_mode(image, path)
        rgb = _to_rgb(image, path)
        orientation = _orientation(image, path, decoded=True) if apply_exif else 1
        return rgb.transpose(TURNS[orientation]) if orientation in TURNS else rgb


def _orientation(image: ImageFile.ImageFile, path: Path, decoded: bool) -> int:
    """The EXIF orientation that is still to be applied; 1: none."""
    if image.format == "TIFF":  # which Pillow turns itself, and whose size it reports after that
        return 1
    # For a PNG Pillow decodes the image first, because these data may follow it; they rarely do.
    early = image.format == "PNG" and not decoded and not _has_late_data(path)
    exif = Image.Image.getexif(image) if early else image.getexif()
    return exif.get(ORIENTATION_TAG, 1)


def _has_late_data(path: Path) -> bool:
    """Whether a PNG has data behind its pixels that may tell an orientation (EXIF, or XMP in a text)."""
    pixels = False
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            kind = head[4:]
            if pixels and kind in (b"eXIf", b"iTXt"):
                return True
            pixels |= kind == b"IDAT"
            file.seek(int.from_bytes(head[:4], "big") + 4, 1)  # the data and their checksum
    return False


def _check_mode(image: ImageFile.ImageFile, path: Path) -> None:
    """Refuse pixels of which nobody says what is black and what is white."""
    if image.mode == "F" or (image.mode == "I" and not _has_16_bits(image)):
        message = f"image {path} has 32-bit pixels without a known range; convert it to 8 or 16 bits per channel"
        raise ImageError(message, UNKNOWN_RANGE, "32 bits")


def _has_16_bits(image: ImageFile.ImageFile) -> bool:
    """Whether the file has 16 bits a channel; only before it is decoded."""
    layouts = [str(tile[3]) for tile in image.tile]
    deep_grey = image.format == "PPM" and image.mode == "I"  # which Pillow scales to 0..65535
    return deep_grey or any(";16" in layout and ";16S" not in layout for layout in layouts)


def _to_rgb(image: ImageFile.ImageFile, path: Path) -> Image.Image:
    """The image decoded, in mode RGB, as stored (a copy in any case: the file is closed afterwards)."""
    has_16_bits = _has_16_bits(image)
    layouts = {_layout(tile[3]) for tile in image.tile}
    image.load()
    if image.mode.startswith("I"):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if has_16_bits and layouts <= OTHER_BYTE.keys():
        return _join_bytes(image, path)
    see_through = image.mode == "P" and "transparency" in image.info
    rgb = (image.convert("RGBA") if see_through else image).convert("RGB")
    # Of other 16-bit images Pillow gives only the upper byte.
    if has_16_bits and 0 < max(high for _, high in rgb.getextrema()) <= 4095 // 256:  # type: ignore[misc]
        message = (
            f"image {path} uses 12 of its 16 bits only, which cannot be read from this kind of file; convert it to 8 "
            "bits per channel"
        )
        raise ImageError(message, UNKNOWN_RANGE, "12 bits in 16")
    return rgb


def _layout(arguments: object) -> str:
    """How the pixels lie in the file, in Pillow's words, e.g. `RGB;16B`."""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _join_bytes(image: ImageFile.ImageFile, path: Path) -> Image.Image:
    """Colours of 16 bits a channel in full.

    Pillow keeps the upper byte of each. The lower ones are what it keeps when it takes the file for one of the other
    byte order, so the file is decoded a second time in that way.
    """
    with Image.open(path) as other:
        tiles = []
        for tile in other.tile:  # type: ignore[attr-defined]
            swapped = OTHER_BYTE[_layout(tile.args)]
            tiles.append(tile._replace(args=(swapped, *tile.args[1:]) if isinstance(tile.args, tuple) else swapped))
        other.tile = tiles  # type: ignore[attr-defined]
        other.load()
        upper, lower = (np.asarray(half)[..., :3].astype(np.uint16) for half in (image, other))
    return Image.fromarray(_to_8_bits(upper * 256 + lower))


def _to_8_bits(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Values of 16 bits, or of 12 bits in 16, as 0..255 (see the head of this file)."""
    numbers = values.astype(np.float32)
    full = 4095.0 if numbers.max(initial=0) <= 4095 else 65535.0
    return (numbers * np.float32(255.0 / full)).round().astype(np.uint8)
