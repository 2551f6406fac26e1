"""Images of any size through GDAL (rasterio): only the window that is wanted is read.

Files that are stored in whole rows (PNG, JPEG, striped TIFF) can only be decoded from the top downwards. Their rows are
therefore read in strips of full width, each as high as the tile that is asked for; the last strips are kept, so that
tiles row by row cost one pass over the file. Where such a file is to be turned (EXIF), it is first unpacked into a
temporary file on disk. Files that are stored in tiles are read window by window, also by several threads at once.
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from rasterio._err import CPLE_BaseError
from rasterio.env import get_gdal_config, set_gdal_config
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from crossdino.data.images import BROKEN, MISSING, NO_IMAGE, ORIENTATION_TAG, ImageError
from crossdino.errors import InputError
from crossdino.sources.band_values import LOOK_PX, BandValues, plan_values
from crossdino.sources.contract import Georeference, Picture, ReadOptions, Source
from crossdino.sources.images import inside, reducing_gap
from crossdino.tiling import Tile

# Files of other formats are refused: GDAL also opens databases, documents and descriptions of servers.
DRIVERS = (
    *("GTiff", "JP2OpenJPEG", "JP2KAK", "JP2ECW", "PNG", "JPEG", "WEBP", "BMP", "GIF", "PNM", "HFA", "ENVI", "NITF"),
    "VRT",
)
# That damaged JPEGs are told, which libjpeg only warns about; and that folders of many files are not listed.
SETTINGS = {"GDAL_ERROR_ON_LIBJPEG_WARNING": True, "GDAL_DISABLE_READDIR_ON_OPEN": "TRUE"}
# Of decoded blocks, for the whole process; GDAL's own limit is a twentieth of the machine's memory.
CACHE_BYTES = 128 * 2**20
# Read and converted at once.
CHUNK_BYTES = 16 * 2**20
# Enough for threads that read tiles of two neighbouring rows.
KEPT_STRIPS = 2

# What shows an image upright, by its EXIF orientation: exchange rows and columns, then mirror the rows, the columns.
TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
UPRIGHT = (False, False, False)


class RasterPicture(Picture):
    """An image that is read by windows."""

    def __init__(self, source: Source, options: ReadOptions) -> None:
        """Open the file and look at its header.

        Args:
            source: the file.
            options: `bands` and `value_range` are used.

        Raises:
            ImageError: GDAL cannot open it, it lacks a wanted band, or its values have no known range.
        """
        self.source = source
        self._options = options
        self._free: list[DatasetReader] = []
        self._lock = threading.RLock()
        self._strips: deque[tuple[int, NDArray[np.uint8]]] = deque(maxlen=KEPT_STRIPS)
        self._unpacked: NDArray[np.uint8] | None = None
        self._generation = 0
        with self._dataset() as dataset:
            if dataset.driver not in DRIVERS:
                raise _image_error(source.path, RasterioError("not a supported format"))
            self._stored_hw = (dataset.height, dataset.width)
            self._values = plan_values(dataset, options, source.path)
            self._turn = TURNS.get(_orientation(dataset.driver, source.path), UPRIGHT)
            self._by_rows = dataset.block_shapes[0][1] >= dataset.width
            self.georeference = _georeference(dataset, self._turn)
        height, width = self._stored_hw
        self.hw = (width, height) if self._turn[0] else (height, width)
        self.windowed = height * width > options.windowed_px

    def read(self, tile: Tile) -> NDArray[np.uint8]:
        """See `Picture.read`."""
        result = np.zeros((tile.height, tile.width, 3), dtype=np.uint8)
        rows, columns = inside(tile, self.hw)
        if rows and columns:
            pixels = _turned(self._read_stored(*self._stored_window(rows, columns)), self._turn)
            top, left = rows.start - tile.top, columns.start - tile.left
            result[top : top + len(rows), left : left + len(columns)] = pixels
        return result

    def read_reduced(self, hw: tuple[int, int]) -> NDArray[np.uint8]:
        """See `Picture.read_reduced`; an overview in the file that is large enough is used."""
        height, width = min(hw[0], self.hw[0]), min(hw[1], self.hw[1])
        wanted = (width, height) if self._turn[0] else (height, width)
        level = None
        with self._dataset() as dataset:
            for index, factor in enumerate(dataset.overviews(1)):
                if min(dataset.height / wanted[0], dataset.width / wanted[1]) >= reducing_gap(wanted) * factor:
                    level = index
        values = self._ranged_values()
        with self._dataset(level) as dataset:
            small = _reduce(dataset, values, wanted, self._by_rows)
        return np.array(_turned(small, self._turn), order="C")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._generation += 1
            for dataset in self._free:
                dataset.close()
            self._free.clear()
            self._strips.clear()
            self._unpacked = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the file again."""
        return RasterPicture, (self.source, self._options)

    @contextmanager
    def _dataset(self, overview: int | None = None) -> Iterator[DatasetReader]:
        """A handle that is this thread's alone meanwhile; everything that fails becomes an `ImageError`."""
        path = self.source.path
        _prepare()
        try:
            with rasterio.Env(**SETTINGS):
                if overview is not None:
                    with rasterio.open(os.path.abspath(path), overview_level=overview) as dataset:
                        yield dataset
                    return
                with self._lock:
                    dataset = self._free.pop() if self._free else None
                    generation = self._generation
                dataset = dataset or rasterio.open(os.path.abspath(path))
                try:
                    yield dataset
                finally:
                    with self._lock:
                        if generation == self._generation:
                            self._free.append(dataset)
                        else:  # closed meanwhile
                            dataset.close()
        except (RasterioError, CPLE_BaseError) as error:
            raise _image_error(path, error) from None

    def _ranged_values(self) -> BandValues:
        """How values become colours, after a look at the whole file where that is needed."""
        with self._lock:
            if self._values.low is None and self._values.palette is None:
                with self._dataset() as dataset:
                    if self._options.value_range == "auto":
                        scale = min(1.0, LOOK_PX / max(self._stored_hw))
                        shape = [max(1, round(side * scale)) for side in self._stored_hw]
                        look = dataset.read(self._values.bands, out_shape=(len(self._values.bands), *shape))
                        self._values = self._values.with_percentiles(look)
                    else:
                        self._values = self._values.with_scale(_largest(dataset, self._values))
            return self._values

    def _stored_window(self, rows: range, columns: range) -> tuple[int, int, int, int]:
        """Top, left, height and width in the file of rows and columns of the upright picture."""
        exchanged, mirror_rows, mirror_columns = self._turn
        top = self.hw[0] - rows.stop if mirror_rows else rows.start
        left = self.hw[1] - columns.stop if mirror_columns else columns.start
        return (left, top, len(columns), len(rows)) if exchanged else (top, left, len(rows), len(columns))

    def _read_stored(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """Pixels as they lie in the file."""
        values = self._ranged_values()
        if not self._by_rows:
            with self._dataset() as dataset:
                return _read_rgb(dataset, values, top, left, height, width)
        with self._lock:
            if self._turn != UPRIGHT:
                return self._unpack(values)[top : top + height, left : left + width]
            strip_top, strip = self._strip(values, top, height)
            return strip[top - strip_top : top - strip_top + height, left : left + width]

    def _strip(self, values: BandValues, top: int, height: int) -> tuple[int, NDArray[np.uint8]]:
        """Rows in full width, with the number of their first; what the last strips hold is not decoded again."""
        bottom = top + height
        for strip_top, strip in self._strips:
            if strip_top <= top and bottom <= strip_top + len(strip):
                return strip_top, strip
        new = np.empty((height, self._stored_hw[1], 3), dtype=np.uint8)
        start = top
        for strip_top, strip in self._strips:
            end = strip_top + len(strip)
            if strip_top <= start < end:
                new[start - top : end - top] = strip[start - strip_top :]
                start = end
        with self._dataset() as dataset:
            new[start - top :] = _read_rgb(dataset, values, start, 0, bottom - start, self._stored_hw[1])
        self._strips.append((top, new))
        return top, new

    def _unpack(self, values: BandValues) -> NDArray[np.uint8]:
        """All pixels, as they lie in the file, in a temporary file that vanishes with them."""
        if self._unpacked is None:
            height, width = self._stored_hw
            with tempfile.TemporaryFile() as file, self._dataset() as dataset:
                _make_room(file.fileno(), height * width * 3, self.source.path)
                pixels = np.memmap(file, dtype=np.uint8, mode="w+", shape=(height, width, 3))
                step = max(1, CHUNK_BYTES // (3 * width))
                for top in range(0, height, step):
                    pixels[top : top + step] = _read_rgb(dataset, values, top, 0, min(step, height - top), width)
            self._unpacked = pixels
        return self._unpacked


def _make_room(file: int, num_bytes: int, path: str) -> None:
    """Take the room on disk beforehand: where it runs out later, the whole process would be ended."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        place, wanted = tempfile.gettempdir(), f"{num_bytes / 1e9:.1f} GB"
        raise InputError(
            f"{place} has no room for {wanted} to turn image {path} ({error.strerror}); make room, or set TMPDIR to "
            "another folder"
        ) from None


def _prepare() -> None:
    """Set what belongs to the whole process: GDAL's memory, and no warning about images without coordinates.

    The filter is put in where it is missing and never taken out, because with threads it cannot be (others, such as
    pytest, do).
    """
    if "GDAL_CACHEMAX" not in os.environ and get_gdal_config("GDAL_CACHEMAX") != CACHE_BYTES:
        set_gdal_config("GDAL_CACHEMAX", CACHE_BYTES)
    if ("ignore", None, NotGeoreferencedWarning, None, 0) not in warnings.filters:
        warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)


def _read_rgb(
    dataset: DatasetReader, values: BandValues, top: int, left: int, height: int, width: int
) -> NDArray[np.uint8]:
    """A window in RGB, read in chunks of whole rows of blocks."""
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    block = dataset.block_shapes[0][0]
    step = max(1, CHUNK_BYTES // (values.pixel_bytes * width))
    step = step // block * block or step
    start = top
    while start < top + height:
        end = min(top + height, (start // step + 1) * step)
        window = Window(left, start, width, end - start)  # pyright: ignore[reportCallIssue]
        read = dataset.read(values.bands, window=window, out_dtype=values.dtype)
        pixels[start - top : end - top] = values.to_rgb(read)
        start = end
    return pixels


def _reduce(dataset: DatasetReader, values: BandValues, hw: tuple[int, int], by_rows: bool) -> NDArray[np.uint8]:
    """The whole raster at a smaller size, in the two steps of `reduce_pixels`, the first of them window by window."""
    rows, columns = (
        max(1, int(length / side / reducing_gap(hw)))
        for length, side in ((dataset.height, hw[0]), (dataset.width, hw[1]))
    )
    width = dataset.width if by_rows else min(dataset.width, max(1, 4096 // columns) * columns)
    height = max(1, CHUNK_BYTES // (3 * width * rows)) * rows
    coarse = np.empty((math.ceil(dataset.height / rows), math.ceil(dataset.width / columns), 3), dtype=np.uint8)
    for top in range(0, dataset.height, height):
        for left in range(0, dataset.width, width):
            part_hw = (min(height, dataset.height - top), min(width, dataset.width - left))
            part = np.asarray(Image.fromarray(_read_rgb(dataset, values, top, left, *part_hw)).reduce((columns, rows)))
            y, x = top // rows, left // columns
            coarse[y : y + part.shape[0], x : x + part.shape[1]] = part
    whole = (0.0, 0.0, dataset.width / columns, dataset.height / rows)  # the last averages may be of fewer pixels
    return np.asarray(Image.fromarray(coarse).resize((hw[1], hw[0]), Image.Resampling.BILINEAR, box=whole))


def _largest(dataset: DatasetReader, values: BandValues) -> float:
    """The largest value of the bands; the search ends where it is clear that it needs more than 12 bits."""
    largest = 0
    block_height, block_width = dataset.block_shapes[0]
    width = min(dataset.width, max(block_width, 4096))
    height = max(1, CHUNK_BYTES // (values.pixel_bytes * width)) // block_height * block_height or block_height
    for top in range(0, dataset.height, height):
        for left in range(0, dataset.width, width):
            size = (min(width, dataset.width - left), min(height, dataset.height - top))
            window = Window(left, top, *size)  # pyright: ignore[reportCallIssue]
            for band, read in enumerate(dataset.read(values.bands, window=window, out_dtype=values.dtype)):
                largest = max(largest, int(values.present(read, band).max(initial=0)))
            if largest > 4095:
                return largest
    return largest


def _turned(pixels: NDArray[np.uint8], turn: tuple[bool, bool, bool]) -> NDArray[np.uint8]:
    exchanged, mirror_rows, mirror_columns = turn
    if exchanged:
        pixels = pixels.swapaxes(0, 1)
    return pixels[:: -1 if mirror_rows else 1, :: -1 if mirror_columns else 1]


def _georeference(dataset: DatasetReader, turn: tuple[bool, bool, bool]) -> Georeference | None:
    """Where the upright picture lies; None without a system of coordinates or an affine transform."""
    if dataset.crs is None or dataset.transform.is_identity:
        return None
    a, b, c, d, e, f = tuple(dataset.transform)[:6]
    exchanged, mirror_rows, mirror_columns = turn
    height, width = (dataset.width, dataset.height) if exchanged else (dataset.height, dataset.width)
    if exchanged:
        a, b, d, e = b, a, e, d
    if mirror_columns:
        a, c, d, f = -a, c + a * width, -d, f + d * width
    if mirror_rows:
        b, c, e, f = -b, c + b * height, -e, f + e * height
    number = dataset.crs.to_epsg(confidence_threshold=100)
    return Georeference(f"EPSG:{number}" if number else dataset.crs.to_wkt(), (a, b, c, d, e, f))


def _orientation(driver: str, path: str) -> int:
    """The EXIF orientation in a file's header, of which GDAL takes no notice.

    Pillow's readers are called directly: `Image.open` refuses images that are too large for it.
    """
    if driver == "PNG":
        return _png_orientation(path)
    readers: dict[str, Any] = {
        "JPEG": JpegImagePlugin.JpegImageFile,
        "WEBP": WebPImagePlugin.WebPImageFile,
        "GTiff": TiffImagePlugin.TiffImageFile,
    }
    if driver not in readers:
        return 1
    try:
        with readers[driver](path) as image:
            tags = image.tag_v2 if driver == "GTiff" else image.getexif()
            return tags.get(ORIENTATION_TAG, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError):
        return 1  # a kind that Pillow does not know; GDAL can read it


def _png_orientation(path: str) -> int:
    """Of a PNG, whose EXIF may also follow the pixels; that the file is complete is seen on the way."""
    exif = Image.Exif()
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            if kind == b"IEND":
                break
            if kind == b"eXIf":
                exif.load(file.read(length))
                file.seek(-length, os.SEEK_CUR)
            if file.seek(length + 4, os.SEEK_CUR) > size:
                raise _image_error(path, RasterioError("the file is cut off"))
        else:
            raise _image_error(path, RasterioError("the file is cut off"))
    if ORIENTATION_TAG not in exif:
        with PngImagePlugin.PngImageFile(path) as image:  # an XMP text before the pixels
            exif = Image.Image.getexif(image)
    return exif.get(ORIENTATION_TAG, 1)


def _image_error(path: str, error: Exception) -> ImageError:
    """GDAL's complaint in one line."""
    cause = error.__cause__ or error
    reason = " ".join(str(getattr(cause, "errmsg", None) or cause).split())
    reason = reason.replace(os.path.abspath(path), Path(path).name)
    if not os.path.exists(path):
        return ImageError(f"image {path} does not exist; check the path", MISSING)
    if "not recognized" in reason or "not a supported" in reason:
        message = f"{path} is not an image that can be read; give a PNG, JPEG, TIFF, WebP or BMP file"
        return ImageError(message, NO_IMAGE, reason)
    if "GDAL_ALLOW_LARGE_LIBJPEG_MEM_ALLOC" in reason:
        reason = "a progressive JPEG of this size has to be held in memory; convert it to a TIFF with tiles"
    return ImageError(f"image {path} is broken ({reason}); replace the file or take it out", BROKEN, reason)
