"""Windows of image files: what of an image is wanted is read, and not all of it where the file allows that.

The pixels are those of `crossdino.data.images.read_image`, cut: always, for every format. How they are come by:

- A TIFF of which parts can be decoded by themselves is read in parts (`crossdino.data.tiff_parts`), however large.
- Every other file is decoded whole. What was decoded last is kept, up to `CACHE_BYTES` a process.
- Where the variable `CROSSDINO_UNPACKED` names a folder, an image that is decoded for a window is put there, as an
  `.npy` file of its pixels, and from then on read from there. That is for training on tiles of large JPEG and PNG
  files, of which every tile in random order costs the whole image; it takes 3 bytes a pixel on disk.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from crossdino.data.images import (
    EXCHANGING,
    TURNS,
    TWELVE_BITS,
    ImageError,
    bands,
    decode_image,
    decode_part,
    fits_whole,
    read_image,
    read_sizes,
)
from crossdino.data.index import ImageRecord
from crossdino.data.tiff_parts import TiffParts
from crossdino.errors import InputError
from crossdino.tiling import Tile

# Of decoded images, for each process that reads.
CACHE_BYTES = 256 * 2**20
# Layouts of files are small, but those of gigapixel images have a number for each of many thousand tiles.
KEPT_LAYOUTS = 64
UNPACKED_VARIABLE = "CROSSDINO_UNPACKED"
# What mirrors rows and columns of the upright image, where it is made from the stored one (5 to 8 exchange them first).
_MIRRORED_ROWS, _MIRRORED_COLUMNS = (3, 4, 7, 8), (2, 3, 6, 7)


class UnpackedError(InputError):
    """The folder for unpacked images cannot be written to; one line also from a worker process, as `ImageError`."""

    def __init__(self, message: str) -> None:
        """Keep the message, without a worker's traceback before it."""
        super().__init__(message.rsplit("UnpackedError: ", 1)[-1].rstrip())


class ImageReader:
    """Reads images, and windows of them, of one list of records.

    It can be sent to other processes, which then share what was found out about the range of 16-bit files.
    """

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        """Remember the records; nothing is read yet."""
        self._records = records
        self._unpacked = os.environ.get(UNPACKED_VARIABLE) or None
        # The largest value of a TIFF of 16 bits that is read in parts (-1: not known), and the state of the file that
        # had it. In shared memory.
        self._largest = torch.full((len(records), 2), -1, dtype=torch.int64).share_memory_()
        self._states: dict[int, int] = {}
        self._decoded: OrderedDict[Any, tuple[Image.Image, int]] = OrderedDict()
        self._layouts: OrderedDict[int, TiffParts | None] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """What another process gets: no pixels."""
        return {**vars(self), "_states": {}, "_decoded": OrderedDict(), "_layouts": OrderedDict()}

    def whole(self, number: int, shrink: int = 1) -> NDArray[np.uint8]:
        """A whole image, upright.

        Args:
            number: of the record.
            shrink: 2, 4 or 8: a JPEG whose sides it divides comes at that fraction of its size, see `decode_image`.

        Returns:
            (H, W, 3) RGB, the caller's own.

        Raises:
            ImageError: the file cannot be read, or is not the one that was indexed.
        """
        record = self._records[number]
        image, orientation = decode_image(record.path, record.apply_exif, shrink)
        shrunk = image.size != _stored_wh(record, orientation)
        self._check_size(number, image, orientation, shrink if shrunk else 1)
        return np.array(image.transpose(TURNS[orientation]) if orientation in TURNS else image)

    def window(self, number: int, tile: Tile, neighbours: bool = False) -> NDArray[np.uint8]:
        """A rectangle of an upright image.

        Args:
            number: of the record.
            tile: where; what lies beyond the image is black.
            neighbours: whether the other tiles of the image will be asked for next: then an image that the cache has
                room for is decoded once.

        Returns:
            (tile.height, tile.width, 3) RGB, the caller's own.

        Raises:
            ImageError: the file cannot be read, or is not the one that was indexed.
            UnpackedError: the folder for unpacked images cannot be written to.
        """
        record = self._records[number]
        height, width = min(tile.height, record.height - tile.top), min(tile.width, record.width - tile.left)
        inside = Tile(tile.top, tile.left, height, width)
        pixels = self._window_inside(number, inside, neighbours)
        if (height, width) == (tile.height, tile.width):
            return pixels
        result = np.zeros((tile.height, tile.width, 3), np.uint8)
        result[:height, :width] = pixels
        return result

    def _window_inside(self, number: int, tile: Tile, neighbours: bool) -> NDArray[np.uint8]:
        record = self._records[number]
        self._forget_what_was_replaced(number)
        cached = self._decoded.get(number)
        if cached is not None:
            self._decoded.move_to_end(number)
        parts = None if cached is not None else self._layout(number)
        if parts is not None:
            orientation = parts.orientation if parts.orientation in TURNS else 1  # Pillow always turns a TIFF
            height, width = parts.hw if orientation not in EXCHANGING else (parts.hw[1], parts.hw[0])
            if (height, width) != (record.height, record.width):
                raise _changed(record, (width, height))
            rows, columns = stored_window(orientation, (height, width), tile)
            if self._pays(parts, rows, columns, neighbours):
                image = self._read_parts(number, parts, rows, columns, neighbours)
                return np.array(image.transpose(TURNS[orientation]) if orientation in TURNS else image)
        if cached is None and self._unpacked is not None and fits_whole((record.height, record.width)):
            pixels = self._read_unpacked(number)
            return np.array(pixels[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width])
        image, orientation = cached if cached is not None else self._decode(number)
        rows, columns = stored_window(orientation, (record.height, record.width), tile)
        cut = image.crop((columns.start, rows.start, columns.stop, rows.stop))
        return np.array(cut.transpose(TURNS[orientation]) if orientation in TURNS else cut)

    def _forget_what_was_replaced(self, number: int) -> None:
        """Look whether a file is the one of which something is known: other pixels may lie elsewhere in it."""
        try:
            found = self._records[number].path.stat()
        except OSError:
            return  # whoever reads it says so
        state = hash((found.st_size, found.st_mtime_ns, found.st_ino))  # of whole numbers: in all processes the same
        if self._states.get(number) != state:
            for key in [key for key in self._decoded if key == number or (isinstance(key, tuple) and key[0] == number)]:
                del self._decoded[key]
            self._layouts.pop(number, None)
            self._states[number] = state

    # --- whole images ---

    def _decode(self, number: int) -> tuple[Image.Image, int]:
        """An image as stored, with its orientation; kept."""
        record = self._records[number]
        image, orientation = decode_image(record.path, record.apply_exif)
        self._check_size(number, image, orientation)
        self._keep(number, (image, orientation))
        return image, orientation

    def _keep(self, key: Any, image: tuple[Image.Image, int]) -> None:
        """Put pixels into the cache: those that were used last, as many as there is room for, and one in any case."""
        self._decoded[key] = image
        self._decoded.move_to_end(key)
        while len(self._decoded) > 1 and sum(map(_num_bytes, self._decoded.values())) > CACHE_BYTES:
            self._decoded.popitem(last=False)

    def _check_size(self, number: int, image: Image.Image, orientation: int, shrink: int = 1) -> None:
        record = self._records[number]
        width, height = image.size[::-1] if orientation in EXCHANGING else image.size
        if (width * shrink, height * shrink) != (record.width, record.height):
            raise _changed(record, read_sizes(record.path)[0])

    def _read_unpacked(self, number: int) -> NDArray[np.uint8]:
        """The pixels of an upright image in the folder for unpacked ones, put there first where they are missing."""
        record = self._records[number]
        assert self._unpacked is not None
        folder = Path(self._unpacked)
        try:
            state = record.path.stat()
        except OSError:
            read_image(record.path)  # which says what is wrong
            raise
        name = f"{record.path.resolve()} {state.st_size} {state.st_mtime_ns} {record.apply_exif}"
        path = folder / f"{hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()}.npy"
        wanted = (record.height, record.width, 3)
        try:
            pixels = np.load(path, mmap_mode="r")
            if pixels.shape == wanted and pixels.dtype == np.uint8:
                return pixels
        except (OSError, ValueError, EOFError):  # missing, or written by a machine that died
            pass
        image = read_image(record.path, record.apply_exif)
        self._check_size(number, image, 1)
        pixels = np.asarray(image)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Several processes may do the same at the same time: each has a file of its own until it is whole.
            handle, partial = tempfile.mkstemp(dir=folder, suffix=".part")
            try:
                with open(handle, "wb") as file:
                    np.save(file, pixels)
                os.chmod(partial, 0o644)  # mkstemp's files are for their owner alone
                os.replace(partial, path)
            except BaseException:
                os.unlink(partial)
                raise
        except OSError as error:
            raise UnpackedError(
                f"cannot write to {folder}, the folder for unpacked images ({error.strerror or error}): make room, or "
                f"set {UNPACKED_VARIABLE} to another folder, or to none"
            ) from None
        return pixels

    # --- parts ---

    def _layout(self, number: int) -> TiffParts | None:
        """The layout of a file of which parts can be read."""
        if number not in self._layouts:
            try:
                self._layouts[number] = TiffParts.of(self._records[number].path)
            except OSError:
                self._layouts[number] = None  # decoding says what is wrong
            while len(self._layouts) > KEPT_LAYOUTS:
                self._layouts.popitem(last=False)
        self._layouts.move_to_end(number)
        return self._layouts[number]

    def _pays(self, parts: TiffParts, rows: range, columns: range, neighbours: bool) -> bool:
        """Whether it is better to read a part than the whole."""
        if not fits_whole(parts.hw):
            return True
        if neighbours and 4 * parts.hw[0] * parts.hw[1] <= CACHE_BYTES:
            return False
        part_rows, part_columns = parts.bounds(rows, columns)
        return 2 * len(part_rows) * len(part_columns) <= parts.hw[0] * parts.hw[1]

    def _read_parts(self, number: int, parts: TiffParts, rows: range, columns: range, neighbours: bool) -> Image.Image:
        """A window of a TIFF as stored."""
        path, largest = self._records[number].path, 0
        part_rows, part_columns = parts.bounds(rows, columns)
        # Strips hold whole rows, so that the window's neighbours come with it.
        in_strips = neighbours and not parts.cuttable and len(part_columns) == parts.hw[1]
        key = (number, part_rows.start, part_rows.stop)
        if in_strips and key in self._decoded:
            image = self._decoded[key][0]
        else:
            if not fits_whole((len(part_rows), len(part_columns))):
                raise ImageError(
                    f"image {path} is packed in parts of {parts.part_hw[1]} x {parts.part_hw[0]} pixels, which are too "
                    "large; make it a TIFF with tiles (gdal_translate -co TILED=YES)"
                )
            stored = decode_part(parts, part_rows, part_columns)
            if stored.largest > TWELVE_BITS:
                largest = stored.largest
                self._largest[number] = torch.tensor([largest, self._states[number]])
            elif stored.largest:
                largest = self._largest_value(number, parts)
            image = stored.to_rgb(largest, path)
            if in_strips:
                self._keep(key, (image, 1))
        left, top = columns.start - part_columns.start, rows.start - part_rows.start
        return image.crop((left, top, left + len(columns), top + len(rows)))

    def _largest_value(self, number: int, parts: TiffParts) -> int:
        """The largest value of a file of 16 bits; the search ends where it is clear that it needs more than 12."""
        known, state = self._largest[number].tolist()
        if known >= 0 and state == self._states[number]:
            return known
        largest = 0
        for rows, columns in bands(parts):
            largest = max(largest, decode_part(parts, rows, columns).largest)
            if largest > TWELVE_BITS:
                break
        self._largest[number] = torch.tensor([largest, self._states[number]])
        return largest


def stored_window(orientation: int, hw: tuple[int, int], tile: Tile) -> tuple[range, range]:
    """The rows and columns, as stored, of a rectangle of an upright image.

    Args:
        orientation: the EXIF orientation that makes the stored image upright.
        hw: height and width of the upright image.
        tile: the rectangle, within the upright image.
    """
    rows, columns = range(tile.top, tile.top + tile.height), range(tile.left, tile.left + tile.width)
    if orientation in _MIRRORED_ROWS:
        rows = range(hw[0] - rows.stop, hw[0] - rows.start)
    if orientation in _MIRRORED_COLUMNS:
        columns = range(hw[1] - columns.stop, hw[1] - columns.start)
    return (columns, rows) if orientation in EXCHANGING else (rows, columns)


def _num_bytes(image: tuple[Image.Image, int]) -> int:
    """What an image takes: Pillow gives a pixel of three colours four bytes."""
    return 4 * image[0].width * image[0].height


def _stored_wh(record: ImageRecord, orientation: int) -> tuple[int, int]:
    return (record.height, record.width) if orientation in EXCHANGING else (record.width, record.height)


def _changed(record: ImageRecord, wh: tuple[int, int]) -> ImageError:
    return ImageError(
        f"image {record.path} has {wh[0]} x {wh[1]} pixels instead of {record.width} x {record.height}; it was changed "
        "after the start: restore it"
    )
