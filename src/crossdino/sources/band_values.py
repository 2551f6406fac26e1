"""From the values of a raster's bands to 8-bit RGB, by one rule for the whole file.

8 bits stay as they are. 16 bits are scaled as `data.images` does it: a file whose largest value is at most 4095 from
0..4095, every other one from 0 to the type's largest value. All other types need a given range. What the file declares
as `no data` becomes black, and transparency is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crossdino.data.images import UNKNOWN_RANGE, ImageError
from crossdino.sources.contract import ReadOptions

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

RANGE_REMEDY = "say which values are black and white (value_range), or let them be found (value_range auto)"
# The formats whose `no data` only means a transparent colour; as everywhere, the colour beneath is taken.
TRANSPARENCY_ONLY = ("PNG", "GIF")
# Enough pixels for a percentile.
LOOK_PX = 1024


@dataclass(frozen=True)
class BandValues:
    """How values become colours.

    Attributes:
        bands: the bands that are read, from 1: one (grey or palette), three (red, green, blue) or four (CMYK).
        dtype: the type they are read in.
        nodata: of each band, in that type; None: it has none.
        palette: (n, 3) the colours of the indices, if the values are such.
        low: what becomes black, a band; None: not known yet (see `with_range`).
        high: what becomes white, a band.
        inverted: whether small values are bright.
    """

    bands: tuple[int, ...]
    dtype: np.dtype
    nodata: tuple[np.generic | None, ...]
    palette: NDArray[np.uint8] | None
    low: tuple[float, ...] | None
    high: tuple[float, ...] | None
    inverted: bool

    @property
    def pixel_bytes(self) -> int:
        """What a pixel takes as it is read."""
        return len(self.bands) * self.dtype.itemsize

    def to_rgb(self, values: NDArray[np.generic]) -> NDArray[np.uint8]:
        """Colours.

        Args:
            values: (bands, H, W), as read.

        Returns:
            (H, W, 3) RGB.
        """
        absent = self._absent(values)
        if self.palette is not None:
            colours = self.palette[np.minimum(values[0], len(self.palette) - 1)]
            if absent is not None:
                colours[absent[0]] = 0
            return colours
        assert self.low is not None and self.high is not None, "the range is found before anything is read"
        levels = np.empty(values.shape, dtype=np.uint8)
        for band, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            levels[band] = _to_levels(values[band], low, high)
        if self.inverted:
            levels = 255 - levels
        if absent is not None:
            levels[np.broadcast_to(absent, levels.shape)] = 0
        if len(levels) == 4:
            levels = _from_cmyk(levels)
        return np.ascontiguousarray(np.broadcast_to(levels, (3, *levels.shape[1:])).transpose(1, 2, 0))

    def _absent(self, values: NDArray[np.generic]) -> NDArray[np.bool_] | None:
        """Where there are no data; of 8 bits only where no band has any, for 255 may be a colour's value as well."""
        if all(value is None for value in self.nodata):
            return None
        absent = np.stack(
            [
                np.zeros(band.shape, dtype=bool) if value is None else band == value
                for band, value in zip(values, self.nodata, strict=True)
            ]
        )
        return np.asarray(absent.all(axis=0, keepdims=True)) if self.dtype == np.uint8 else absent

    def present(self, values: NDArray[np.generic], band: int) -> NDArray[np.generic]:
        """The values of one band that are data, in a row; `values` is (H, W)."""
        nodata = self.nodata[band]
        kept = values.ravel() if nodata is None else values[values != nodata]
        return kept[np.isfinite(kept)] if kept.dtype.kind == "f" else kept

    def with_scale(self, largest: float) -> BandValues:
        """With the range of 16 bits, by the largest value of the file."""
        full = 4095.0 if largest <= 4095 else float(np.iinfo(self.dtype).max)
        return replace(self, low=(0.0,) * len(self.bands), high=(full,) * len(self.bands))

    def with_percentiles(self, look: NDArray[np.generic]) -> BandValues:
        """With the range from the 2nd to the 98th percentile of every band of `look`, (bands, H, W)."""
        ends = []
        for band, values in enumerate(look):
            kept = self.present(values, band)
            low, high = np.percentile(kept.astype(np.float64), (2, 98)).tolist() if kept.size else (0.0, 1.0)
            ends.append((low, high if high > low else low + 1.0))
        return replace(self, low=tuple(low for low, _ in ends), high=tuple(high for _, high in ends))


def plan_values(dataset: DatasetReader, options: ReadOptions, path: str) -> BandValues:
    """How the values of an opened raster become colours; the range may still be missing.

    Args:
        dataset: the raster.
        options: `bands` and `value_range` are used.
        path: how messages call the file.

    Raises:
        ImageError: it lacks a wanted band, or its values have no known range.
    """
    bands = _choose_bands(dataset, options, path)
    dtype = np.result_type(*(np.dtype(dataset.dtypes[band - 1]) for band in bands))
    if dtype.kind not in "uif":
        message = f"image {path} has {dtype} pixels, which are not colours; convert it to 8 bits"
        raise ImageError(message, UNKNOWN_RANGE, str(dtype))
    palette = None
    if len(bands) == 1 and options.value_range is None and dtype in (np.uint8, np.uint16):
        palette = _palette(dataset, bands[0])
    low = high = None
    if isinstance(options.value_range, tuple):
        low, high = ((end,) * len(bands) for end in options.value_range)
    elif options.value_range is None:
        if dtype == np.uint8:
            depth = int(dataset.tags(bands[0], ns="IMAGE_STRUCTURE").get("NBITS", 8))
            low, high = (0.0,) * len(bands), (float(2**depth - 1),) * len(bands)
        elif dtype not in (np.uint16, np.int16):
            message = f"image {path} has {dtype} pixels without a known range; {RANGE_REMEDY}, or convert it to 8 bits"
            raise ImageError(message, UNKNOWN_RANGE, str(dtype))
    whole = dataset.tags(ns="IMAGE_STRUCTURE")
    inverted = whole.get("MINISWHITE") == "YES" and palette is None
    nodata = tuple(None if dataset.driver in TRANSPARENCY_ONLY else _nodata(dataset, band, dtype) for band in bands)
    return BandValues(bands, dtype, nodata, palette, low, high, inverted)


def _choose_bands(dataset: DatasetReader, options: ReadOptions, path: str) -> tuple[int, ...]:
    if options.bands is not None:
        if max(options.bands) > dataset.count:
            raise ImageError(
                f"image {path} has {dataset.count} bands and no band {max(options.bands)}; choose other bands",
                UNKNOWN_RANGE,
            )
        return options.bands
    kinds = [kind.name for kind in dataset.colorinterp]
    if {"red", "green", "blue"} <= set(kinds):
        return tuple(kinds.index(name) + 1 for name in ("red", "green", "blue"))
    if {"cyan", "magenta", "yellow", "black"} <= set(kinds):
        return tuple(kinds.index(name) + 1 for name in ("cyan", "magenta", "yellow", "black"))
    coloured = [band for band, kind in enumerate(kinds, start=1) if kind != "alpha"] or [1]
    return tuple(coloured[:3]) if len(coloured) >= 3 else (coloured[0],)


def _palette(dataset: DatasetReader, band: int) -> NDArray[np.uint8] | None:
    if dataset.colorinterp[band - 1].name != "palette":
        return None
    entries = dataset.colormap(band)
    palette = np.zeros((max(entries) + 1, 3), dtype=np.uint8)
    for index, colour in entries.items():
        palette[index] = colour[:3]
    return palette


def _nodata(dataset: DatasetReader, band: int, dtype: np.dtype) -> np.generic | None:
    """A band's `no data` in the type of the values; None: it has none, or one that no value can have."""
    value = dataset.nodatavals[band - 1]
    if value is None or np.isnan(value):  # what is not a number becomes black anyway
        return None
    if dtype.kind in "ui":
        limits = np.iinfo(dtype)
        if not limits.min <= value <= limits.max or value != int(value):
            return None
    return dtype.type(value)


def _to_levels(values: NDArray[np.generic], low: float, high: float) -> NDArray[np.uint8]:
    """Values of one band as 0..255; what is not a number becomes 0."""
    if values.dtype == np.uint8 and (low, high) == (0.0, 255.0):
        return values.view(np.uint8)
    kind = np.float32 if values.dtype.itemsize <= 2 else np.float64
    numbers = values.astype(kind)
    if low:
        numbers -= kind(low)
    numbers *= kind(255.0 / (high - low))
    np.nan_to_num(numbers, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
    return numbers.clip(0, 255).round().astype(np.uint8)


def _from_cmyk(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(4, H, W) inks as (3, H, W) light."""
    light = 255 - levels.astype(np.uint16)
    return ((light[:3] * light[3] + 127) // 255).astype(np.uint8)
