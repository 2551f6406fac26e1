"""Reading image files: any mode and orientation in, upright 8-bit RGB out, one clear line for what cannot be read.

Images of 16 bits a channel become 8 bits by one rule for a whole file: a file whose largest value is at most 4095 is
taken to come from a 12-bit camera and scaled from 0..4095, every other one from 0..65535. (Read as 0..65535, 12-bit
images would be nearly black, and no one would be told.)
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from crossdino.data.tiff_parts import (
    BITS,
    COMPRESSION,
    PLANAR,
    RAW,
    SEPARATE,
    SPARSE,
    STRIP_OFFSETS,
    TILE_OFFSETS,
    TiffParts,
)
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

# Those that exchange rows and columns.
EXCHANGING = (5, 6, 7, 8)

TWELVE_BITS = 4095
# Of a TIFF that is read in parts, about so many pixels are decoded at once.
BAND_PX = 2**24

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
        raise too_large(path) from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise _broken(path, error) from None


def too_large(path: Path) -> ImageError:
    """What to say of an image that is too large to be read whole, by someone who has to."""
    message = (
        f"image {path} has too many pixels to be read whole; cut it into smaller images first, or make it a TIFF with "
        "tiles (gdal_translate -co TILED=YES) and set data.tile_size"
    )
    return ImageError(message, TOO_LARGE)


def _broken(path: Path, error: Exception) -> ImageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ImageError(f"image {path} is broken ({reason}); replace the file or take it out", BROKEN, reason)


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
        path: image file; one that is too large to be read whole may be a TIFF of which parts can be read.
        decode: also decode and convert it, as `read_image` will; False reads only the header.

    Returns:
        (width, height) with the EXIF orientation applied, and (width, height) as stored.

    Raises:
        ImageError: as `read_image`; what only decoding can find is found only then.
    """
    allow_large_images()
    try:
        with _opened(path) as image:
            width, height = image.size
            _check_mode(image, path)
            if decode:
                _decode(image, path)
            turned = _orientation(image, path, decoded=decode) in EXCHANGING
    except ImageError as error:
        parts = TiffParts.of(path) if error.what == TOO_LARGE else None
        if parts is None or not (parts.cuttable or fits_whole(parts.part_hw)):
            raise
        height, width = parts.hw
        turned = parts.orientation in EXCHANGING
        _check_parts(parts, decode)
        return ((height, width) if turned else (width, height)), (width, height)
    return ((height, width) if turned else (width, height)), (width, height)


def fits_whole(hw: tuple[int, int]) -> bool:
    """Whether an image of this height and width may be read whole; above that Pillow refuses it."""
    return Image.MAX_IMAGE_PIXELS is None or hw[0] * hw[1] <= 2 * Image.MAX_IMAGE_PIXELS


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
    rgb, orientation = decode_image(Path(path), apply_exif)
    return rgb.transpose(TURNS[orientation]) if orientation in TURNS else rgb


def decode_image(path: Path, apply_exif: bool = True, shrink: int = 1) -> tuple[Image.Image, int]:
    """Read an image as 8-bit RGB, not turned yet.

    Args:
        path: image file.
        apply_exif: whether the image is to be turned as its EXIF orientation says.
        shrink: 2, 4 or 8 decodes a JPEG at that fraction of its size, each pixel the mean of as many as its square
            (computed in the DCT domain: it costs less than half); other formats, and sides that it does not divide,
            come in full size.

    Returns:
        The image, mode `RGB`, fully loaded, and the EXIF orientation that remains to be applied; 1: none.

    Raises:
        ImageError: as `read_image`.
    """
    allow_large_images()
    with _opened(path) as image:
        _check_mode(image, path)
        if shrink > 1 and not (image.width % shrink or image.height % shrink):
            image.draft(None, (image.width // shrink, image.height // shrink))  # type: ignore[arg-type]
        stored = _decode(image, path)
        orientation = _orientation(image, path, decoded=True) if apply_exif else 1
        return stored.to_rgb(stored.largest, path), orientation


def decode_part(parts: TiffParts, rows: range, columns: range) -> StoredPixels:
    """Decode the part of a TIFF that holds a window.

    Args:
        parts: the file's layout.
        rows: of the image as stored; `parts.bounds` of the window.
        columns: likewise.

    Returns:
        The pixels as stored, not turned. Images of 16 bits become 8 bits by the largest value of the whole file.

    Raises:
        ImageError: the file is broken there, or its pixels have no known range.
    """
    allow_large_images()
    try:
        document = parts.extract(rows, columns)
        return _decode(_opened_part(document, parts.path), parts.path, lambda: TiffImageFile(io.BytesIO(document)))
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise _broken(parts.path, error) from None


def bands(parts: TiffParts) -> Iterator[tuple[range, range]]:
    """The rows and columns of all of an image, in windows of whole tiles or strips that are decoded at once."""
    (height, width), (down, across) = parts.hw, (1, parts.hw[1]) if parts.cuttable else parts.part_hw
    across *= max(1, BAND_PX // (down * across))
    down *= max(1, BAND_PX // (down * min(across, width)))
    for top in range(0, height, down):
        for left in range(0, width, across):
            yield range(top, min(top + down, height)), range(left, min(left + across, width))


def _check_parts(parts: TiffParts, decode: bool) -> None:
    """Refuse a file that cannot be decoded part by part; its pixels are looked at only where `decode` says so."""
    try:
        if parts.is_sparse:
            raise OSError(SPARSE)
        _opened_part(parts.header(), parts.path)
    except ImageError:
        raise
    except Exception as error:
        raise _broken(parts.path, error) from None
    if decode:
        largest, last = 0, None
        for rows, columns in bands(parts):
            last = decode_part(parts, rows, columns)
            largest = max(largest, last.largest)
        if last is not None:
            last.to_rgb(largest, parts.path)  # refuses a range that is not known


def _opened_part(document: bytes, path: Path) -> ImageFile.ImageFile:
    image = TiffImageFile(io.BytesIO(document))
    _check_mode(image, path)
    return image


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
    """Refuse pixels of which nobody says what is black and what is white, and those that Pillow takes for others."""
    if isinstance(image, TiffImageFile):
        tags = image.tag_v2
        if 0 in tags.get(TILE_OFFSETS, ()) or 0 in tags.get(STRIP_OFFSETS, ()):
            raise _broken(path, OSError(SPARSE))  # unpacked ones would show the file's head as pixels
        planes = tags.get(PLANAR, 1) == SEPARATE and len(tags.get(BITS, ())) > 1
        if planes and tags.get(COMPRESSION, RAW) == RAW and max(tags[BITS]) > 8:
            # Pillow reads every byte as a pixel, says nothing, and shows noise.
            message = (
                f"image {path} holds its 16-bit bands unpacked one behind the other, which cannot be read; write it "
                "with gdal_translate -co INTERLEAVE=PIXEL"
            )
            raise ImageError(message, UNKNOWN_RANGE, "16-bit bands one behind the other")
    if image.mode == "F" or (image.mode == "I" and not _has_16_bits(image)):
        message = f"image {path} has 32-bit pixels without a known range; convert it to 8 or 16 bits per channel"
        raise ImageError(message, UNKNOWN_RANGE, "32 bits")


def _has_16_bits(image: ImageFile.ImageFile) -> bool:
    """Whether the file has 16 bits a channel; only before it is decoded."""
    layouts = [str(tile[3]) for tile in image.tile]
    deep_grey = image.format == "PPM" and image.mode == "I"  # which Pillow scales to 0..65535
    return deep_grey or any(";16" in layout and ";16S" not in layout for layout in layouts)


@dataclass(frozen=True)
class StoredPixels:
    """What a decoder gave, before the rule for the whole file makes 8 bits of 16.

    Attributes:
        pixels: the image in RGB, or its values where they have 16 bits: (H, W) or (H, W, 3).
        largest: the largest value of 16 bits; 0 for 8 bits. A file of several parts has the largest of all.
    """

    pixels: Image.Image | NDArray[np.generic]
    largest: int

    def to_rgb(self, largest: int, path: Path) -> Image.Image:
        """The pixels in mode RGB.

        Args:
            largest: the largest value of the whole file; 0 for 8 bits.
            path: how messages call the file.

        Raises:
            ImageError: only the upper bytes are known, and do not tell the values.
        """
        if not isinstance(self.pixels, Image.Image):
            return Image.fromarray(_to_8_bits(self.pixels, largest)).convert("RGB")
        if 0 < largest <= TWELVE_BITS:
            message = (
                f"image {path} uses 12 of its 16 bits only, which cannot be read from this kind of file; convert it to "
                "8 bits per channel"
            )
            raise ImageError(message, UNKNOWN_RANGE, "12 bits in 16")
        return self.pixels


def _decode(image: ImageFile.ImageFile, path: Path, again: Callable[[], Image.Image] | None = None) -> StoredPixels:
    """The image decoded, as stored; `again` opens it once more, for a second look."""
    has_16_bits = _has_16_bits(image)
    layouts = {_layout(tile[3]) for tile in image.tile}
    image.load()
    if image.mode.startswith("I"):
        values = np.asarray(image)
        return StoredPixels(values, int(values.max(initial=0)))
    if has_16_bits and layouts <= OTHER_BYTE.keys():
        values = _join_bytes(image, again() if again is not None else Image.open(path))
        return StoredPixels(values, int(values.max(initial=0)))
    rgb: Image.Image = image  # not copied: its pixels stay when the file is closed
    if image.mode != "RGB":
        see_through = image.mode == "P" and "transparency" in image.info
        rgb = (image.convert("RGBA") if see_through else image).convert("RGB")
    if not has_16_bits:
        return StoredPixels(rgb, 0)
    # Of other 16-bit images Pillow gives only the upper byte.
    upper = max(high for _, high in rgb.getextrema())  # type: ignore[misc]
    return StoredPixels(rgb, int(upper) * 256 + 255 if upper else 0)


def _layout(arguments: object) -> str:
    """How the pixels lie in the file, in Pillow's words, e.g. `RGB;16B`."""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _join_bytes(image: Image.Image, second: Image.Image) -> NDArray[np.uint16]:
    """Colours of 16 bits a channel in full, (H, W, 3).

    Pillow keeps the upper byte of each. The lower ones are what it keeps when it takes the file for one of the other
    byte order, so the file is decoded a second time in that way.
    """
    with second as other:
        tiles = []
        for tile in other.tile:  # type: ignore[attr-defined]
            swapped = OTHER_BYTE[_layout(tile.args)]
            tiles.append(tile._replace(args=(swapped, *tile.args[1:]) if isinstance(tile.args, tuple) else swapped))
        other.tile = tiles  # type: ignore[attr-defined]
        other.load()
        upper, lower = (np.asarray(half)[..., :3].astype(np.uint16) for half in (image, other))
    return upper * 256 + lower


def _to_8_bits(values: NDArray[np.generic], largest: int) -> NDArray[np.uint8]:
    """Values of 16 bits, or of 12 bits in 16, as 0..255 (see the head of this file)."""
    full = float(TWELVE_BITS) if largest <= TWELVE_BITS else 65535.0
    return (values.astype(np.float32) * np.float32(255.0 / full)).round().astype(np.uint8)
