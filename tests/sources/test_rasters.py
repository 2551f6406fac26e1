from __future__ import annotations

import importlib.util
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine

from crossdino.data.images import ImageError, read_image
from crossdino.errors import InputError
from crossdino.sources import Georeference, Picture, ReadOptions, Source, open_pictures
from crossdino.sources import raster as raster_module
from crossdino.sources.images import WholeImage
from crossdino.sources.raster import RasterPicture
from crossdino.tiling import Tile, tile_grid

PLACE = {"crs": "EPSG:32633", "transform": Affine(0.5, 0, 500_000, 0, -0.25, 5_000_000)}
BY_WINDOWS = ReadOptions(windowed_px=0)


def texture(height: int = 100, width: int = 130, bands: int = 3, dtype: str = "uint8", top: int = 256) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, top, (bands, height, width)).astype(dtype)


def write(path: Path, values: NDArray[Any], place: bool = True, interpretation: tuple = (), **how: Any) -> Path:
    bands, height, width = values.shape
    settings = {"driver": "GTiff", "count": bands, "height": height, "width": width, "dtype": values.dtype, **how}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", **settings, **(PLACE if place else {})) as raster:
            raster.write(values)
            if interpretation:
                raster.colorinterp = interpretation
    return path


def opened(path: Path, options: ReadOptions = ReadOptions()) -> Picture:
    (picture,) = open_pictures(Source(path.name, str(path), "image"), options)
    return picture


def whole(picture: Picture) -> NDArray[np.uint8]:
    return picture.read(Tile(0, 0, *picture.hw))


def by_tiles(picture: Picture, size: int = 48, overlap: int = 10) -> NDArray[np.uint8]:
    """Put together again; every tile, also where they overlap and reach beyond, must fit."""
    result = np.zeros((*picture.hw, 3), dtype=np.uint8)
    seen = np.zeros(picture.hw, dtype=bool)
    for tile in tile_grid(picture.hw, size, overlap):
        pixels = picture.read(tile)
        assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
        place = np.s_[tile.top : tile.top + size, tile.left : tile.left + size]
        height, width = result[place].shape[:2]
        assert not pixels[height:].any() and not pixels[:, width:].any()
        known = seen[place]
        np.testing.assert_array_equal(result[place][known], pixels[:height, :width][known])
        result[place], seen[place] = pixels[:height, :width], True
    return result


LAYOUTS: dict[str, dict[str, Any]] = {
    "striped": {"blockysize": 7},
    "tiled": {"tiled": True, "blockxsize": 32, "blockysize": 16},
    "band after band": {"interleave": "band", "compress": "deflate"},
    "tiled band after band": {"tiled": True, "blockxsize": 32, "blockysize": 48, "interleave": "band"},
    "BigTIFF": {"BIGTIFF": "YES", "compress": "lzw", "predictor": 2},
    "ZSTD": {"compress": "zstd"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", [True, False])
def test_geotiffs_of_any_layout_are_read_as_they_are(
    tmp_path: Path, layout: str, place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raster_module, "CHUNK_BYTES", 9000)  # some rows
    values = texture()
    path = write(tmp_path / "map ü 1.tif", values, place, photometric="rgb", **LAYOUTS[layout])
    picture = opened(path, BY_WINDOWS)
    assert isinstance(picture, RasterPicture) and picture.hw == (100, 130)
    np.testing.assert_array_equal(by_tiles(picture), values.transpose(1, 2, 0))
    np.testing.assert_array_equal(picture.read(Tile(90, 120, 5, 5)), values.transpose(1, 2, 0)[90:95, 120:125])
    assert not picture.read(Tile(200, 0, 4, 4)).any()
    reduced = picture.read_reduced((20, 26))
    # The same two steps as for an image in memory; rounding is all that may differ.
    small = Image.fromarray(values.transpose(1, 2, 0)).resize((26, 20), Image.Resampling.BILINEAR, reducing_gap=2.0)
    assert np.abs(reduced.astype(int) - np.asarray(small)).max() <= 1
    assert (picture.georeference is not None) == place


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp", ".bmp", ".gif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_ordinary_files_by_windows_are_what_training_sees(tmp_path: Path, suffix: str, orientation: int) -> None:
    if suffix in (".bmp", ".gif") and orientation > 1:
        return  # they have no EXIF
    path = tmp_path / f"photo{suffix}"
    image = Image.fromarray(texture(60, 90).transpose(1, 2, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    how: dict[str, Any] = {".jpg": {"subsampling": 0}, ".webp": {"lossless": True}}.get(suffix, {})
    if suffix == ".tif":
        image.save(path, tiffinfo={0x0112: orientation})
    else:
        image.save(path, **how, **({} if suffix in (".bmp", ".gif") else {"exif": exif}))
    wanted = np.asarray(read_image(path)).astype(int)
    picture = opened(path, BY_WINDOWS)
    assert isinstance(picture, RasterPicture) and picture.hw == wanted.shape[:2]
    slack = 1 if suffix == ".jpg" else 0  # Pillow's JPEG library rounds here and there another way
    assert np.abs(by_tiles(picture, 40, 7) - wanted).max() <= slack
    assert np.abs(picture.read_reduced((15, 12)) - opened(path).read_reduced((15, 12)).astype(int)).max() <= slack + 1
    assert isinstance(opened(path), WholeImage)
    np.testing.assert_array_equal(whole(opened(path)), wanted)


def test_the_orientation_behind_the_pixels_of_a_png(tmp_path: Path) -> None:
    path = tmp_path / "late.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(texture(20, 30).transpose(1, 2, 0)).save(path, exif=exif)
    data = path.read_bytes()
    start, end = data.index(b"eXIf") - 4, data.index(b"IEND") - 4
    size = 12 + int.from_bytes(data[start : start + 4], "big")
    path.write_bytes(data[:start] + data[start + size : end] + data[start : start + size] + data[end:])
    picture = opened(path, BY_WINDOWS)
    assert picture.hw == (30, 20)
    np.testing.assert_array_equal(whole(picture), np.asarray(read_image(path)))


def test_grey_alpha_and_many_bands(tmp_path: Path) -> None:
    values = texture(bands=6)
    red, green, blue, grey, alpha, other = (
        *(ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.gray, ColorInterp.alpha),
        ColorInterp.undefined,
    )
    for number, (kinds, bands) in enumerate(
        [
            ((grey,), [0, 0, 0]),
            ((grey, alpha), [0, 0, 0]),
            ((grey, other), [0, 0, 0]),
            ((red, green, blue), [0, 1, 2]),
            ((red, green, blue, alpha), [0, 1, 2]),
            ((red, green, blue, other), [0, 1, 2]),
            ((other, blue, green, red, other), [3, 2, 1]),
            ((grey, other, other, other, other, other), [0, 1, 2]),
            ((alpha, other, other, other), [1, 2, 3]),
        ]
    ):
        path = write(tmp_path / f"{number}.tif", values[: len(kinds)], interpretation=kinds)
        np.testing.assert_array_equal(by_tiles(opened(path)), values[bands].transpose(1, 2, 0), str(kinds))
    np.testing.assert_array_equal(
        whole(opened(tmp_path / "7.tif", ReadOptions(bands=(6, 4, 1)))), values[[5, 3, 0]].transpose(1, 2, 0)
    )
    np.testing.assert_array_equal(
        whole(opened(tmp_path / "7.tif", ReadOptions(bands=(5,)))), values[[4, 4, 4]].transpose(1, 2, 0)
    )
    with pytest.raises(ImageError, match="has 6 bands and no band 7"):
        opened(tmp_path / "7.tif", ReadOptions(bands=(7, 1, 2)))


def test_palettes_bits_and_inks(tmp_path: Path) -> None:
    indices = texture(bands=1, top=4)
    colours = {0: (0, 0, 0, 255), 1: (255, 0, 0, 255), 2: (10, 20, 30, 255), 3: (1, 2, 3, 0)}
    path = tmp_path / "palette.tif"
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=100, width=130, dtype="uint8", nodata=2, **PLACE
    ) as raster:
        raster.write(indices)
        raster.write_colormap(1, colours)
    table = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 0), (1, 2, 3)], dtype=np.uint8)  # 2 is no data
    np.testing.assert_array_equal(by_tiles(opened(path)), table[indices[0]])

    wide = tmp_path / "wide.tif"
    with rasterio.open(wide, "w", driver="GTiff", count=1, height=100, width=130, dtype="uint16", **PLACE) as raster:
        raster.write(indices.astype(np.uint16))
        raster.write_colormap(1, colours)
    table[2] = (10, 20, 30)
    np.testing.assert_array_equal(by_tiles(opened(wide)), table[indices[0]])

    bits = write(tmp_path / "bits.tif", texture(bands=1, top=2), NBITS=1)
    np.testing.assert_array_equal(by_tiles(opened(bits))[..., 1], texture(bands=1, top=2)[0] * 255)

    inverted = write(tmp_path / "inverted.tif", texture(bands=1), photometric="MINISWHITE")
    np.testing.assert_array_equal(by_tiles(opened(inverted))[..., 1], 255 - texture(bands=1)[0])

    inks = write(tmp_path / "inks.tif", texture(bands=4), photometric="CMYK")
    wanted = Image.frombytes("CMYK", (130, 100), texture(bands=4).transpose(1, 2, 0).tobytes()).convert("RGB")
    assert np.abs(by_tiles(opened(inks)).astype(int) - np.asarray(wanted)).max() <= 1  # rounding


def test_jpeg_in_tiff_and_jpeg_2000(tmp_path: Path) -> None:
    smooth = np.asarray(
        Image.fromarray(texture(10, 13).transpose(1, 2, 0)).resize((130, 100), Image.Resampling.BICUBIC)
    )
    values = smooth.transpose(2, 0, 1)
    for name, how in (
        ("a.tif", {"compress": "jpeg", "photometric": "ycbcr", "tiled": True, "blockxsize": 64, "blockysize": 64}),
        ("b.jp2", {"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES"}),
    ):
        picture = opened(write(tmp_path / name, values, **how))
        assert picture.georeference is not None and isinstance(picture, RasterPicture)
        found = by_tiles(picture)
        # JPEG stores the colours at half the resolution.
        assert np.abs(found.astype(int) - smooth).mean() < (5 if name == "a.tif" else 0.01)
        with rasterio.open(tmp_path / name) as direct:
            np.testing.assert_array_equal(found, direct.read().transpose(1, 2, 0))
    plain = write(tmp_path / "c.jp2", values, False, driver="JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES")
    assert isinstance(opened(plain), WholeImage)


def test_sixteen_bits_by_the_rule_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raster_module, "CHUNK_BYTES", 2000)  # two rows
    deep = texture(dtype="uint16", top=4096)
    for name, largest, full in (("a", 4095, 4095), ("b", 4096, 65535), ("c", 60_000, 65535)):
        deep[1, 99, 129] = largest  # in the last tile: it counts for the first as well
        for layout in ("striped", "tiled"):
            path = write(tmp_path / f"{name} {layout}.tif", deep, photometric="rgb", **LAYOUTS[layout])
            wanted = (deep.astype(np.float32) * np.float32(255 / full)).round().astype(np.uint8).transpose(1, 2, 0)
            np.testing.assert_array_equal(by_tiles(opened(path)), wanted)
        grey = tmp_path / f"{name}.png"
        Image.fromarray(deep[1]).save(grey)
        np.testing.assert_array_equal(by_tiles(opened(grey, BY_WINDOWS)), np.asarray(read_image(grey)))
    deep[1, 99, 129] = 65535
    ignored = write(tmp_path / "nodata.tif", deep, nodata=65535)  # which does not count
    assert opened(ignored).read(Tile(99, 129, 1, 1)).ravel()[1] == 0
    assert whole(opened(ignored)).max() == 255

    signed = texture(bands=1, dtype="int16", top=30_000)
    signed[0, :10] = -5
    wanted = (signed[0].clip(0) * np.float32(255 / 32767)).round()
    np.testing.assert_array_equal(by_tiles(opened(write(tmp_path / "signed.tif", signed)))[..., 0], wanted)


def test_values_without_a_range_need_one(tmp_path: Path) -> None:
    heights = texture(dtype="float32", top=1000) / 4 - 20
    heights[0, 0, 0], heights[1, 0, 0], heights[2, 0, 0], heights[0, 1, 1] = np.nan, np.inf, -np.inf, -9999
    path = write(tmp_path / "heights.tif", heights, nodata=-9999)
    with pytest.raises(ImageError, match=r"heights\.tif has float32 pixels without a known range; .*value_range auto"):
        opened(path)
    got = by_tiles(opened(path, ReadOptions(value_range=(0, 200))))
    with np.errstate(invalid="ignore"):
        wanted = np.nan_to_num(heights.astype(float) * 255 / 200, nan=0).clip(0, 255).round().transpose(1, 2, 0)
    assert np.abs(got - wanted).max() <= 1  # halves
    assert got[0, 0].tolist() == [0, 255, 0]

    usual = np.where((heights == -9999) | ~np.isfinite(heights), np.nan, heights)
    low, high = np.nanpercentile(usual, (2, 98), axis=(1, 2))[..., None, None]
    wanted = np.nan_to_num((usual - low) * 255 / (high - low)).clip(0, 255)
    auto = by_tiles(opened(path, ReadOptions(value_range="auto"))).transpose(2, 0, 1)
    # The picture is smaller than the look that is taken at it, so the percentiles are exact; 1 level is rounding.
    assert np.abs(np.where(np.isfinite(usual), auto - wanted, 0)).max() <= 1
    flat = write(tmp_path / "flat.tif", np.full((1, 20, 20), 7.0, dtype="float32"))
    assert not whole(opened(flat, ReadOptions(value_range="auto"))).any()

    for dtype in ("int32", "float64", "int8"):
        other = write(tmp_path / f"{dtype}.tif", texture(dtype=dtype, top=100))
        with pytest.raises(ImageError, match=f"{dtype} pixels without a known range"):
            opened(other)
        wanted = (texture(top=100) * 2.55).round().transpose(1, 2, 0)
        difference = np.abs(whole(opened(other, ReadOptions(value_range=(0, 100)))) - wanted)
        assert difference.max() <= 1  # halves
    with pytest.raises(ImageError, match="not colours"):
        opened(write(tmp_path / "complex.tif", texture(dtype="complex64")))
    stretched = opened(write(tmp_path / "bytes.tif", texture(top=51)), ReadOptions(value_range=(0, 51)))
    np.testing.assert_array_equal(whole(stretched), texture(top=51).transpose(1, 2, 0) * 5)


def test_no_data_is_black(tmp_path: Path) -> None:
    values = texture(top=100)
    values[:, :5] = 255  # no data
    values[0, 50] = 255  # a red that is merely full
    picture = opened(write(tmp_path / "white.tif", values, nodata=255, photometric="rgb"))
    wanted = values.copy()
    wanted[:, :5] = 0
    np.testing.assert_array_equal(by_tiles(picture), wanted.transpose(1, 2, 0))


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_where_it_lies(tmp_path: Path, orientation: int) -> None:
    rotated = Affine(0.4, 0.3, 1000.0, 0.3, -0.4, 2000.0)
    for transform in (PLACE["transform"], rotated):
        with rasterio.open(
            tmp_path / "a.tif", "w", driver="GTiff", count=1, height=30, width=40, dtype="uint8",
            crs="EPSG:32633", transform=transform,
        ) as raster:  # fmt: skip
            raster.write(texture(30, 40, 1))
        a, b, c, d, e, f = tuple(transform)[:6]
        middles = [(row + 0.5, column + 0.5) for row in range(30) for column in range(40)]
        stored = np.array([(a * column + b * row + c, d * column + e * row + f) for row, column in middles])
        if orientation > 1:
            _set_orientation(tmp_path / "a.tif", orientation)
        picture = opened(tmp_path / "a.tif")
        assert picture.georeference is not None and picture.georeference.crs == "EPSG:32633"
        turn = {1: lambda one: one, 3: lambda one: np.rot90(one, 2), 6: lambda one: np.rot90(one, -1)}[orientation]
        np.testing.assert_array_equal(whole(picture)[..., 0], turn(texture(30, 40, 1)[0]))
        rows, columns = np.mgrid[: picture.hw[0], : picture.hw[1]]
        centres = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], axis=1)
        world = picture.georeference.to_world(centres)
        wanted = turn(stored.reshape(30, 40, 2)).reshape(-1, 2)
        np.testing.assert_allclose(world, wanted, rtol=1e-12)


def _set_orientation(path: Path, orientation: int) -> None:
    """Add the tag to a TIFF that has none: its first directory is written anew at the end of the file."""
    data = bytearray(path.read_bytes())
    start = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[start : start + 2], "little")
    entries = [bytes(data[start + 2 + 12 * n : start + 14 + 12 * n]) for n in range(count)]
    entries.append(b"\x12\x01\x03\x00\x01\x00\x00\x00" + orientation.to_bytes(4, "little"))
    entries.sort(key=lambda entry: int.from_bytes(entry[:2], "little"))
    data += b"\0" * (len(data) % 2)
    data[4:8] = len(data).to_bytes(4, "little")
    path.write_bytes(data + (count + 1).to_bytes(2, "little") + b"".join(entries) + b"\0\0\0\0")


def test_what_does_not_lie_anywhere(tmp_path: Path) -> None:
    values = texture(20, 20)
    points = [GroundControlPoint(0, 0, 1, 2), GroundControlPoint(9, 9, 5, 6)]
    points.append(GroundControlPoint(0, 9, 1, 6))
    write(tmp_path / "gcps.tif", values, False, gcps=points, crs="EPSG:4326")
    picture = opened(tmp_path / "gcps.tif")
    assert picture.georeference is None
    np.testing.assert_array_equal(whole(picture), values.transpose(1, 2, 0))
    no_system = write(tmp_path / "b.tif", values, False, transform=PLACE["transform"])
    assert opened(no_system).georeference is None and opened(no_system, BY_WINDOWS).georeference is None
    own = write(tmp_path / "c.tif", values, False, transform=PLACE["transform"],
                crs="+proj=tmerc +lat_0=1 +lon_0=2 +k=0.9 +x_0=3 +y_0=4 +ellps=bessel")  # fmt: skip
    found = opened(own).georeference
    assert found is not None and CRS.from_wkt(found.crs).to_dict()["proj"] == "tmerc"
    assert Georeference("EPSG:4326", (2, 0, 10, 0, -2, 20)).to_world(np.array([[1, 2]])).tolist() == [[12, 16]]


def test_overviews_are_used_for_the_reduced_picture(tmp_path: Path) -> None:
    values = np.full((3, 512, 512), 100, dtype=np.uint8)
    path = write(tmp_path / "cog.tif", values, photometric="rgb", **LAYOUTS["tiled"])
    with rasterio.open(path, "r+") as raster:
        raster.build_overviews([2, 4, 8])
    with rasterio.open(path, "r+", overview_level=1) as overview, rasterio.open(path, "r+") as raster:
        assert overview.shape == (128, 128)
        raster.write(np.full((3, 512, 512), 200, dtype=np.uint8))  # the overviews keep 100, so one can tell
    assert whole(opened(path)).min() == 200
    assert opened(path).read_reduced((60, 60)).max() == 100
    assert opened(path).read_reduced((400, 500)).shape == (400, 500, 3)
    assert opened(path).read_reduced((400, 500)).min() == 200
    assert opened(path).read_reduced((9999, 9999)).shape == (512, 512, 3)


def test_no_room_to_turn_a_large_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(texture(600, 30).transpose(1, 2, 0)).save(tmp_path / "a.jpg", exif=exif)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(raster_module.os, "posix_fallocate", refuse)
    with pytest.raises(InputError, match=r"no room for .* to turn image .*a\.jpg .*TMPDIR"):
        whole(opened(tmp_path / "a.jpg", BY_WINDOWS))


@pytest.mark.parametrize("layout", ["striped", "tiled"])
def test_many_threads_read_one_picture(tmp_path: Path, layout: str) -> None:
    values = texture(300, 300)
    path = write(tmp_path / "a.tif", values, photometric="rgb", **LAYOUTS[layout])
    png = tmp_path / "a.png"
    Image.fromarray(values.transpose(1, 2, 0)).save(png)
    for picture in (opened(path), opened(png), opened(png, BY_WINDOWS)):
        tiles = tile_grid((300, 300), 64, 20) * 3
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(picture.read, tiles))
        for tile, pixels in zip(tiles, found, strict=True):
            np.testing.assert_array_equal(
                pixels, values[:, tile.top : tile.top + 64, tile.left : tile.left + 64].transpose(1, 2, 0)
            )
        picture.close()
        assert picture.read(Tile(0, 0, 3, 3)).shape == (3, 3, 3)  # opened again
        picture.close()


def test_rows_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(texture(500, 200).transpose(1, 2, 0)).save(path)
    decoded = []
    read = raster_module._read_rgb
    monkeypatch.setattr(raster_module, "_read_rgb", lambda *a: (decoded.append(a[2:]), read(*a))[1])
    with opened(path, BY_WINDOWS) as picture:
        monkeypatch.setattr(picture, "_by_rows", True)  # so small a PNG is one block
        by_tiles(picture, 64, 20)
    tops = [top for top, *_ in decoded]
    assert tops == sorted(tops) and sum(height for _, _, height, _ in decoded) == 500


@pytest.mark.parametrize("kind", ["tiled.tif", "striped.tif", "a.png", "a.jpg", "a.jp2"])
def test_truncated_files_name_themselves(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / kind
    values = texture(300, 300)
    if path.suffix == ".tif":
        write(path, values, **LAYOUTS[path.stem])
    elif path.suffix == ".jp2":
        write(path, values, driver="JP2OpenJPEG")
    else:
        Image.fromarray(values.transpose(1, 2, 0)).save(path)
    data = path.read_bytes()
    directory = int.from_bytes(data[4:8], "little") if path.suffix == ".tif" else 0
    assert directory < len(data) // 2  # of a TIFF, the pixels are what is cut off
    path.write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(ImageError) as caught:
        by_tiles(opened(path, BY_WINDOWS), 64)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("text.jpg", b"hello", "is not an image that can be read"),
        ("text.tif", b"hello", "is not an image that can be read"),
        ("empty.png", b"", "is not an image that can be read"),
        ("stub.tif", b"II*\0\x08\0\0\0\xff\xff", "broken|not an image"),
        ("table.csv", b"x,y\n1,2\n", "is not an image that can be read"),
        ("data.geojson", b'{"type":"FeatureCollection","features":[]}', "is not an image that can be read"),
    ],
)
def test_what_is_no_image(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    for options in (ReadOptions(), BY_WINDOWS, ReadOptions(bands=(1,))):
        with pytest.raises(ImageError, match=message) as caught:
            whole(opened(tmp_path / name, options))
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(ImageError, match="does not exist"):
        opened(tmp_path / "no.tif")


def test_without_rasterio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "rasterio" else find(name, *a))
    values = texture()
    path = write(tmp_path / "a.tif", values, photometric="rgb")
    np.testing.assert_array_equal(whole(opened(path, BY_WINDOWS)), values.transpose(1, 2, 0))  # as far as Pillow can
    remedy = r'pip install "crossdino\[raster\]"'
    with pytest.raises(InputError, match=remedy):
        opened(path, ReadOptions(bands=(3, 2, 1)))
    with pytest.raises(InputError, match=remedy):
        opened(path, ReadOptions(value_range="auto"))
    with pytest.raises(ImageError, match=remedy):
        opened(write(tmp_path / "float.tif", texture(dtype="float32")))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=f"too many pixels to be read whole; .*{remedy}"):
        opened(path)


def test_larger_than_pillow_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in (".png", ".jpg", ".tif"):
        path = tmp_path / f"a{suffix}"
        image = Image.fromarray(np.full((60, 90, 3), 77, dtype=np.uint8))
        image.save(path, **({"tiffinfo": {0x0112: 6}} if suffix == ".tif" else {"exif": exif}))
        with monkeypatch.context() as patch:
            patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
            picture = opened(path)
            assert isinstance(picture, RasterPicture) and picture.hw == (90, 60)
            assert (by_tiles(picture) == 77).all()
    # TIFFs of which training reads parts have a size, but are not to be read whole either.
    path = write(tmp_path / "tiled.tif", texture(), tiled=True, blockxsize=16, blockysize=16, compress="deflate")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert isinstance(opened(path, ReadOptions(windowed_px=10**9)), RasterPicture)


def test_the_libraries_for_rasters_and_videos_are_loaded_where_they_are_used() -> None:
    folder = Path(str(raster_module.__file__)).parent
    heavy = re.compile(r"^(import|from) (rasterio|av|crossdino\.sources\.(raster|video))\b", re.MULTILINE)
    loading = {path.stem for path in folder.glob("*.py") if heavy.search(path.read_text())}
    assert loading == {"raster", "video"}


def test_the_tile_is_the_callers_own(tmp_path: Path) -> None:
    Image.new("RGB", (9, 7), "red").save(tmp_path / "a.png")
    for options in (ReadOptions(), BY_WINDOWS):
        picture = opened(tmp_path / "a.png", options)
        whole(picture)[:] = 0
        picture.read_reduced((7, 9))[:] = 0
        assert (whole(picture) == (255, 0, 0)).all()
