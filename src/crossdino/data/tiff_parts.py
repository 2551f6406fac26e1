"""Parts of a TIFF: the smallest valid TIFF that holds a window of a larger one.

A TIFF is stored in tiles or in strips of rows, each of which is packed on its own. Those that a window touches are
copied, still packed, into a TIFF in memory with the same tags; whoever decodes that one gets the pixels that decoding
the whole file would give there, bit by bit, whatever their kind (16 bits, palettes, inks, JPEG in TIFF). Of unpacked
strips single rows and columns are taken. TIFF 6.0 (Adobe, 1992), sections 2, 8 and 15; BigTIFF as libtiff defines it.

Others read windows through GDAL. Its JPEG decoder rounds otherwise than Pillow's and its `no data` are no colours of
the file, so that training would see one image or another depending on what is installed.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Byte order, and whether it is a BigTIFF; of big-endian BigTIFF Pillow knows nothing.
HEADS = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True)}
# Code of each type of values in numpy, by its number in the file; fractions are two numbers.
TYPES = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 5: "u8", 6: "u1", 7: "u1", 8: "u2", 9: "u4", 10: "u8", 11: "u4"}
TYPES |= {12: "u8", 13: "u4", 16: "u8", 17: "u8", 18: "u8"}
SHORT, LONG = 3, 4

WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES, PLANAR = 273, 274, 277, 278, 279, 284
TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_BYTES, XMP = 322, 323, 324, 325, 700
# What tells how pixels are packed and what their values mean, besides what is written anew. Of orientation nothing:
# the part is decoded as it is stored.
KEPT = (BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, SAMPLES, PLANAR, 280, 281, 292, 293, 317, 318, 319, 320, 332)
KEPT += (334, 336, 338, 339, 340, 341, 347, 529, 530, 531, 532)
# Packed tile by tile or strip by strip: none, fax (3), LZW, JPEG, deflate, bits, deflate, LZMA, ZSTD.
COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946, 34925, 50000)
RAW, YCBCR, SEPARATE = 1, 6, 2

SPARSE = "parts of it were never written: copy it with gdal_translate -co SPARSE_OK=FALSE"


@dataclass(frozen=True)
class TiffParts:
    """How the first image of a TIFF is laid out in its file.

    Attributes:
        path: the file.
        hw: height and width in pixels as stored.
        orientation: what must be done to show it upright, as in EXIF.
        part_hw: height and width of a tile or strip in pixels.
        cuttable: whether single pixels can be copied out of the strips.
    """

    path: Path
    hw: tuple[int, int]
    orientation: int
    part_hw: tuple[int, int]
    cuttable: bool
    _order: str
    _tags: dict[int, tuple[int, bytes]]
    _tiled: bool
    _num_planes: int
    _pixel_bytes: int
    _offsets: NDArray[np.int64]
    _sizes: NDArray[np.int64]

    @classmethod
    def of(cls, path: Path) -> TiffParts | None:
        """The layout of a file; None where it is no TIFF, or none of which parts can be decoded by themselves.

        Raises:
            OSError: the file cannot be opened.
        """
        try:
            return _parse(path)
        except (struct.error, ValueError, KeyError, IndexError, OverflowError):
            return None  # whoever decodes the whole file says what is wrong with it

    @property
    def is_sparse(self) -> bool:
        """Whether tiles or strips were never written (GDAL's `SPARSE_OK`)."""
        return bool((self._offsets == 0).any())

    def bounds(self, rows: range, columns: range) -> tuple[range, range]:
        """The rows and columns, as stored, of the part that holds a window of the image."""
        if self.cuttable:
            return rows, columns
        return tuple(  # type: ignore[return-value]
            range(wanted.start // side * side, min(math.ceil(wanted.stop / side) * side, length))
            for wanted, side, length in zip((rows, columns), self.part_hw, self.hw, strict=True)
        )

    def extract(self, rows: range, columns: range) -> bytes:
        """A TIFF of some rows and columns, which must be those of `bounds`.

        Raises:
            OSError: the file is cut off there, or cannot be read.
        """
        with open(self.path, "rb", buffering=0) as file:
            data = (
                self._cut(file.fileno(), rows, columns) if self.cuttable else self._copy(file.fileno(), rows, columns)
            )
        return self._document((len(rows), len(columns)), data)

    def header(self) -> bytes:
        """A TIFF of this kind without pixels, to be asked for what it is."""
        return self._document((1, 1), [b""] * self._num_planes)

    def _copy(self, file: int, rows: range, columns: range) -> list[bytes]:
        """Tiles or strips as they are."""
        down, across = (math.ceil(length / side) for length, side in zip(self.hw, self.part_hw, strict=True))
        wanted = [
            (plane * down + row) * across + column
            for plane in range(self._num_planes)
            for row in range(rows.start // self.part_hw[0], math.ceil(rows.stop / self.part_hw[0]))
            for column in range(columns.start // self.part_hw[1], math.ceil(columns.stop / self.part_hw[1]))
        ]
        if not self._offsets[wanted].all():
            raise OSError(SPARSE)
        return [_read(file, int(self._sizes[number]), int(self._offsets[number])) for number in wanted]

    def _cut(self, file: int, rows: range, columns: range) -> list[bytes]:
        """The pixels of unpacked strips, one strip a plane."""
        height, stride = self.part_hw[0], self.hw[1] * self._pixel_bytes
        num_bytes, start = len(columns) * self._pixel_bytes, columns.start * self._pixel_bytes
        down = math.ceil(self.hw[0] / height)
        planes = []
        for plane in range(self._num_planes):
            pieces = []
            first = rows.start
            while first < rows.stop:
                strip = first // height
                # Rows in full width lie one behind the other.
                last = min(rows.stop, (strip + 1) * height) if num_bytes == stride else first + 1
                if not self._offsets[plane * down + strip]:
                    raise OSError(SPARSE)
                offset = int(self._offsets[plane * down + strip]) + (first - strip * height) * stride + start
                pieces.append(_read(file, (last - first - 1) * stride + num_bytes, offset))
                first = last
            planes.append(b"".join(pieces))
        return planes

    def _document(self, hw: tuple[int, int], data: list[bytes]) -> bytes:
        """A TIFF around packed pixels."""
        part_hw = hw if self.cuttable else self.part_hw
        tags = dict(self._tags)
        offsets, sizes = (TILE_OFFSETS, TILE_BYTES) if self._tiled else (STRIP_OFFSETS, STRIP_BYTES)
        numbers = {WIDTH: [hw[1]], LENGTH: [hw[0]], offsets: [0] * len(data), sizes: [len(piece) for piece in data]}
        numbers |= (
            {TILE_LENGTH: [part_hw[0]], TILE_WIDTH: [part_hw[1]]} if self._tiled else {ROWS_PER_STRIP: [part_hw[0]]}
        )
        for tag, values in numbers.items():
            tags[tag] = LONG, np.array(values, self._order + "u4").tobytes()
        # Header, directory, values that do not fit into it, pixels.
        place = 8 + 2 + 12 * len(tags) + 4
        begin = place + sum(len(values) + len(values) % 2 for _, values in tags.values() if len(values) > 4)
        places = begin + np.concatenate([[0], np.cumsum([len(piece) for piece in data])[:-1]])
        tags[offsets] = LONG, places.astype(self._order + "u4").tobytes()
        directory, outside = [], []
        for tag, (kind, values) in sorted(tags.items()):
            count = len(values) // (1 if kind in (1, 2, 6, 7) else np.dtype(TYPES[kind]).itemsize)
            entry = struct.pack(f"{self._order}HHI", tag, kind, count)
            if len(values) <= 4:
                directory.append(entry + values.ljust(4, b"\0"))
            else:
                directory.append(entry + struct.pack(f"{self._order}I", place))
                outside.append(values + bytes(len(values) % 2))
                place += len(outside[-1])
        head = (b"II" if self._order == "<" else b"MM") + struct.pack(f"{self._order}HIH", 42, 8, len(tags))
        return b"".join([head, *directory, bytes(4), *outside, *data])


def _read(file: int, num_bytes: int, offset: int) -> bytes:
    data = b""
    while len(data) < num_bytes:  # Linux gives at most 2 GB at once, and a network drive less
        more = os.pread(file, num_bytes - len(data), offset + len(data)) if hasattr(os, "pread") else b""
        if not more and not hasattr(os, "pread"):  # Windows
            os.lseek(file, offset + len(data), os.SEEK_SET)
            more = os.read(file, num_bytes - len(data))
        if not more:
            raise OSError("the file is cut off")
        data = data + more if data else more
    return data


def _parse(path: Path) -> TiffParts | None:
    """See `TiffParts.of`."""
    with open(path, "rb") as file:
        head = file.read(16)
        if head[:4] not in HEADS:
            return None
        order, big = HEADS[head[:4]]
        file.seek(struct.unpack(order + "Q", head[8:16])[0] if big else struct.unpack(order + "I", head[4:8])[0])
        (num_entries,) = struct.unpack(order + ("Q" if big else "H"), file.read(8 if big else 2))
        if num_entries > 65535:
            return None
        raw = file.read(num_entries * (20 if big else 12))
        size = file.seek(0, os.SEEK_END)
        tags: dict[int, tuple[int, bytes]] = {}
        for tag, kind, count, inline in struct.iter_unpack(order + ("HHQ8s" if big else "HHI4s"), raw):
            needed = tag in KEPT or tag in (WIDTH, LENGTH, ORIENTATION, XMP, ROWS_PER_STRIP, STRIP_OFFSETS, STRIP_BYTES)
            if kind not in TYPES or not (needed or tag in (TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS, TILE_BYTES)):
                continue
            num_bytes = count * np.dtype(TYPES[kind]).itemsize
            if num_bytes > size:
                return None
            if num_bytes > len(inline):
                file.seek(struct.unpack(order + ("Q" if big else "I"), inline)[0])
                inline = file.read(num_bytes)
            tags[tag] = kind, inline[:num_bytes]

    def numbers(tag: int, default: int | None = None) -> NDArray[np.int64]:
        if tag not in tags and default is not None:
            return np.array([default])
        kind, values = tags[tag]
        return np.frombuffer(values, order + TYPES[kind]).astype(np.int64)

    height, width = int(numbers(LENGTH)[0]), int(numbers(WIDTH)[0])
    compression, samples = int(numbers(COMPRESSION, 1)[0]), int(numbers(SAMPLES, 1)[0])
    planes = samples if int(numbers(PLANAR, 1)[0]) == SEPARATE else 1
    tiled = TILE_OFFSETS in tags
    if tiled:
        part_hw = int(numbers(TILE_LENGTH)[0]), int(numbers(TILE_WIDTH)[0])
        offsets, sizes = numbers(TILE_OFFSETS), numbers(TILE_BYTES)
    else:
        part_hw = min(int(numbers(ROWS_PER_STRIP, height)[0]), height), width
        offsets, sizes = numbers(STRIP_OFFSETS), numbers(STRIP_BYTES)
    if min(height, width, *part_hw) < 1 or compression not in COMPRESSIONS:
        return None
    num_parts = planes * math.ceil(height / part_hw[0]) * math.ceil(width / part_hw[1])
    if len(offsets) != num_parts or len(sizes) != num_parts:
        return None
    if ORIENTATION not in tags and b"tiff:Orientation" in tags.get(XMP, (0, b""))[1]:
        return None  # which Pillow finds there only after decoding
    bits = set(numbers(BITS, 1).tolist())
    in_bytes = bits in ({8}, {16}) and int(numbers(FILL_ORDER, 1)[0]) == 1
    cuttable = compression == RAW and not tiled and in_bytes and int(numbers(PHOTOMETRIC, 0)[0]) != YCBCR
    kept = {tag: tags[tag] for tag in KEPT if tag in tags}
    for tag, (kind, _) in kept.items():
        if kind >= 16:  # 8-byte numbers, which only BigTIFF knows
            kept[tag] = LONG, numbers(tag).astype(order + "u4").tobytes()
    pixel_bytes = max(bits) // 8 * (1 if planes > 1 else samples)
    orientation = int(numbers(ORIENTATION, 1)[0])
    return TiffParts(
        path, (height, width), orientation, part_hw, cuttable, order, kept, tiled, planes, pixel_bytes, offsets, sizes
    )
