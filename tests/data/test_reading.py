"""Windows of image files against the whole image, decoded by Pillow and cut: the same to the bit, for every format."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning

from crossdino.config import DataConfig
from crossdino.data import DetectionDataset, images, reading
from crossdino.data.check import check_images
from crossdino.data.dataset import build_loader
from crossdino.data.images import ImageError, read_image, read_sizes
from crossdino.data.index import DatasetIndex, ImageRecord, Problems
from crossdino.data.reading import ImageReader
from crossdino.data.tiff_parts import TiffParts
from crossdino.errors import InputError
from crossdino.tiling import Tile

HEIGHT, WIDTH = 150, 170
# Within one part, over several, at each border, over everything in one direction, and beyond the image.
TILES = [Tile(70, 70, 9, 11), Tile(1, 3, 60, 61), Tile(100, 110, 50, 60), Tile(0, 0, 20, 170), Tile(0, 75, 150, 16)]
TILES += [Tile(140, 160, 32, 32)]


def texture(channels: int = 3, dtype: str = "uint8", most: int = 255) -> NDArray[Any]:
    """(C, H, W): smooth enough for JPEG, and nowhere the same."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = np.stack([np.sin(x / (5 + c) + c) + np.cos(y / (7 - c)) for c in range(channels)])
    noise = np.random.default_rng(0).normal(0, 0.2, waves.shape)
    values = (waves + noise - (waves + noise).min()) / np.ptp(waves + noise)
    return (values * most).round().astype(dtype)


def write(path: Path, values: NDArray[Any], **settings: Any) -> Path:
    interpretation, palette = settings.pop("colorinterp", None), settings.pop("palette", None)
    settings = {"driver": "GTiff", "count": len(values), "dtype": values.dtype.name} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", height=values.shape[1], width=values.shape[2], **settings) as raster:
            raster.write(values)
            if palette is not None:
                raster.write_colormap(1, palette)
            if interpretation is not None:
                raster.colorinterp = interpretation
    return path


def record(path: Path, hw: tuple[int, int], apply_exif: bool = True) -> ImageRecord:
    nothing = np.zeros(0, np.int64)
    return ImageRecord(
        1, path, hw[1], hw[0], np.zeros((0, 4)), nothing, np.zeros(0), nothing.astype(bool), apply_exif=apply_exif
    )


def assert_windows(path: Path, *, parts: bool, apply_exif: bool = True) -> None:
    """All windows are those of the image as a whole; `parts`: and it is not read whole for a small one."""
    whole = np.asarray(read_image(path, apply_exif))
    reader = ImageReader([record(path, whole.shape[:2], apply_exif)])
    padded = np.zeros((whole.shape[0] + 64, whole.shape[1] + 64, 3), np.uint8)
    padded[: whole.shape[0], : whole.shape[1]] = whole
    reader.window(0, Tile(70, 70, 9, 11))
    assert (0 in reader._decoded) != parts
    for neighbours in (False, True):
        for tile in TILES:
            tile = Tile(min(tile.top, whole.shape[0] - 1), min(tile.left, whole.shape[1] - 1), tile.height, tile.width)
            pixels = reader.window(0, tile, neighbours=neighbours)
            expected = padded[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
            np.testing.assert_array_equal(pixels, expected[: tile.height], err_msg=f"{path.name} {tile}")
            pixels[:] = 0  # the caller's own
    np.testing.assert_array_equal(reader.whole(0), whole)


SMALL = {"tiled": True, "blockxsize": 32, "blockysize": 16}
LAYOUTS: dict[str, dict[str, Any]] = {
    "strips": {"blockysize": 7},
    "one strip": {"blockysize": HEIGHT},
    "strips, band after band": {"blockysize": 7, "interleave": "band"},
    "strips, deflate": {"blockysize": 7, "compress": "deflate", "predictor": 2},
    "strips, jpeg": {"blockysize": 16, "compress": "jpeg", "photometric": "ycbcr"},
    "tiles": SMALL,
    "tiles, band after band": SMALL | {"interleave": "band", "compress": "lzw"},
    "tiles, unpacked, band after band": SMALL | {"interleave": "band"},
    "tiles, big endian": SMALL | {"ENDIANNESS": "BIG", "compress": "deflate"},
    "BigTIFF": SMALL | {"BIGTIFF": "YES", "compress": "lzw", "predictor": 2},
    "BigTIFF, strips": {"BIGTIFF": "YES", "blockysize": 7},
    "ZSTD": SMALL | {"compress": "zstd"},
    "LZMA": SMALL | {"compress": "lzma"},
    "packbits": SMALL | {"compress": "packbits"},
    "jpeg, coarse colours": SMALL | {"compress": "jpeg", "photometric": "ycbcr"},
    "jpeg, rgb": SMALL | {"compress": "jpeg", "photometric": "rgb"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_a_tiff_are_what_the_whole_is(tmp_path: Path, layout: str) -> None:
    path = write(tmp_path / "a ü.tif", texture(), **{"photometric": "rgb"} | LAYOUTS[layout])
    with Image.open(path) as image:  # Pillow alone says the same
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), np.asarray(read_image(path)))
    assert_windows(path, parts=True)


def test_parts_of_other_colours(tmp_path: Path) -> None:
    inks = [ColorInterp.cyan, ColorInterp.magenta, ColorInterp.yellow, ColorInterp.black]
    light = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    palette = {index: (index, 255 - index, 7, 255) for index in range(256)}
    cases: dict[str, tuple[NDArray[Any], dict[str, Any]]] = {
        "grey": (texture(1), {}),
        "white is 0": (texture(1), {"photometric": "miniswhite"}),
        "palette": (texture(1), {"palette": palette, "photometric": "palette"}),
        "inks": (texture(4), {"photometric": "cmyk", "colorinterp": inks}),
        "alpha": (texture(4), {"photometric": "rgb", "colorinterp": light, "alpha": "unspecified"}),
        "premultiplied": (texture(4), {"photometric": "rgb", "colorinterp": light, "alpha": "premultiplied"}),
        "no data": (texture(), {"photometric": "rgb", "nodata": 100}),
    }
    for name, (values, settings) in cases.items():
        for layout, how in {"tiles": SMALL | {"compress": "deflate"}, "strips": {"blockysize": 11}}.items():
            path = write(tmp_path / f"{name} {layout}.tif", values, **settings | how)
            assert_windows(path, parts=True)


def test_one_bit_a_pixel(tmp_path: Path) -> None:
    pixels = texture(1)[0] > 120
    for compression in ("raw", "group3", "group4", "tiff_lzw"):
        path = tmp_path / f"{compression}.tif"
        Image.fromarray(pixels).save(path, compression=compression, tiffinfo={278: 10})
        np.testing.assert_array_equal(np.asarray(read_image(path))[..., 0], pixels * np.uint8(255))
        parts = TiffParts.of(path)
        assert parts is not None
        assert_windows(path, parts=True)


@pytest.mark.parametrize("layout", ["tiles", "strips"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_are_scaled_by_the_largest_value_of_the_file(tmp_path: Path, channels: int, layout: str) -> None:
    how = (SMALL | {"compress": "deflate"}) if layout == "tiles" else {"blockysize": 7}
    how |= {"photometric": "rgb"} if channels == 3 else {}
    deep, twelve = texture(channels, "uint16", 65535), texture(channels, "uint16", 4095)
    dark = deep // 20  # of which no window is above 4095, but for one pixel
    dark[:, 149, 169] = 65000
    for name, values, full in (("deep", deep, 65535), ("twelve", twelve, 4095), ("dark", dark, 65535)):
        path = write(tmp_path / f"{name}.tif", values, **how)
        wanted = np.round(values.astype(np.float32) * np.float32(255 / full)).transpose(1, 2, 0)
        np.testing.assert_array_equal(np.asarray(read_image(path)), np.broadcast_to(wanted, (HEIGHT, WIDTH, 3)))
        assert_windows(path, parts=True)
        reader = ImageReader([record(path, (HEIGHT, WIDTH))])
        reader.window(0, TILES[0])
        other = pickle.loads(pickle.dumps(reader))  # as a process that is started: what is known is known there
        assert int(other._largest[0, 0]) == int(reader._largest[0, 0]) >= min(int(values.max()), 4096)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_images(tmp_path: Path, orientation: int) -> None:
    pixels = np.ascontiguousarray(texture().transpose(1, 2, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in ("jpg", "png", "webp"):
        path = tmp_path / f"turned.{suffix}"
        Image.fromarray(pixels).save(path, exif=exif)
        with Image.open(path) as image:
            upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        np.testing.assert_array_equal(np.asarray(read_image(path)), upright)
        assert_windows(path, parts=False)
        assert_windows(path, parts=False, apply_exif=False)
    for compression in ("raw", "tiff_lzw"):
        path = tmp_path / f"{compression}.tif"
        Image.fromarray(pixels).save(path, compression=compression, tiffinfo={0x0112: orientation, 278: 8})
        assert_windows(path, parts=True)


def test_other_formats_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.ascontiguousarray(texture().transpose(1, 2, 0))
    for name in ("a.jpg", "a.png", "a.bmp", "a.gif", "a.ppm", "lossy.webp"):
        Image.fromarray(pixels).save(tmp_path / name)
        assert_windows(tmp_path / name, parts=False)
    decoded: list[Path] = []
    original = reading.decode_image
    monkeypatch.setattr(reading, "decode_image", lambda path, *rest: (decoded.append(path), original(path, *rest))[1])
    names = ("a.png", "a.bmp", "a.jpg")
    reader = ImageReader([record(tmp_path / name, (HEIGHT, WIDTH)) for name in names])
    monkeypatch.setattr(reading, "CACHE_BYTES", 2 * 4 * HEIGHT * WIDTH)
    for number in (0, 1, 0, 1, 2, 1, 0):  # with 2, room is made by forgetting 0
        reader.window(number, TILES[0])
    assert [path.name for path in decoded] == ["a.png", "a.bmp", "a.jpg", "a.png"]
    monkeypatch.setattr(reading, "CACHE_BYTES", 1)  # one is kept in any case
    decoded.clear()
    for number in (2, 1, 1, 1, 2, 2):
        reader.window(number, TILES[0])
    assert [path.name for path in decoded] == ["a.jpg", "a.bmp", "a.jpg"]


def test_strips_are_unpacked_once_for_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tif", texture(), photometric="rgb", compress="deflate", blockysize=10)
    taken: list[range] = []
    original = reading.decode_part
    monkeypatch.setattr(reading, "CACHE_BYTES", 4 * WIDTH * 80)  # not enough for the whole
    monkeypatch.setattr(
        reading, "decode_part", lambda parts, rows, columns: (taken.append(rows), original(parts, rows, columns))[1]
    )
    reader = ImageReader([record(path, (HEIGHT, WIDTH))])
    for top in (0, 55, 110):
        for left in (0, 50, 100):
            reader.window(0, Tile(top, left, 40, 60), neighbours=True)
    assert taken == [range(0, 40), range(50, 100), range(110, 150)]


def test_images_that_are_too_large_to_be_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = texture()
    tiled = write(tmp_path / "tiled.tif", values, photometric="rgb", compress="deflate", **SMALL)
    one_strip = write(tmp_path / "strip.tif", values, photometric="rgb", compress="deflate", blockysize=HEIGHT)
    raw = write(tmp_path / "raw.tif", values, photometric="rgb", blockysize=HEIGHT)
    turned = tmp_path / "turned.tif"
    Image.fromarray(values.transpose(1, 2, 0)).save(turned, tiffinfo={0x0112: 6, 278: 8})
    Image.fromarray(values.transpose(1, 2, 0)).save(tmp_path / "a.png")
    upright = np.asarray(read_image(turned))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    monkeypatch.setattr(images, "BAND_PX", 5000)
    for path in (tmp_path / "a.png", one_strip, tiled):
        with pytest.raises(ImageError, match=r"too many pixels to be read whole.*TILED=YES"):
            read_image(path)
    for path in (tmp_path / "a.png", one_strip):
        with pytest.raises(ImageError, match="too many pixels"):
            read_sizes(path)
        with pytest.raises(ImageError, match="too"):
            ImageReader([record(path, (HEIGHT, WIDTH))]).window(0, TILES[0])
    for decode in (False, True):
        assert read_sizes(tiled, decode) == ((WIDTH, HEIGHT), (WIDTH, HEIGHT))
        assert read_sizes(turned, decode) == ((HEIGHT, WIDTH), (WIDTH, HEIGHT))
    for path, hw, whole in (
        (tiled, (HEIGHT, WIDTH), values.transpose(1, 2, 0)),
        (raw, (HEIGHT, WIDTH), values.transpose(1, 2, 0)),
        (turned, (WIDTH, HEIGHT), upright),
    ):
        pixels = ImageReader([record(path, hw)]).window(0, Tile(60, 70, 30, 31), neighbours=True)
        np.testing.assert_array_equal(pixels, whole[60:90, 70:101])
    # The check before a training decodes all of them, and finds what is broken.
    data = tiled.read_bytes()
    offset = int(TiffParts.of(tiled)._offsets[40])  # type: ignore[union-attr]
    tiled.write_bytes(data[:offset] + bytes(20) + data[offset + 20 :])
    (fact,) = check_images([tiled], "full")
    assert fact.what == "broken image"
    assert check_images([tiled], "headers")[0].what == ""


def test_damaged_and_foreign_files_name_themselves(tmp_path: Path) -> None:
    path = write(tmp_path / "cut.tif", texture(), photometric="rgb", **SMALL)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    for tile in TILES:
        try:
            ImageReader([record(path, (HEIGHT, WIDTH))]).window(0, tile)
        except ImageError as error:
            assert "cut.tif is broken" in str(error) and "\n" not in str(error)
    with pytest.raises(ImageError, match=r"cut\.tif is broken"):
        ImageReader([record(path, (HEIGHT, WIDTH))]).window(0, Tile(100, 100, 16, 16))
    # Bytes changed anywhere in the directory never give anything but an ImageError, or pixels.
    rng = np.random.default_rng(0)
    path = write(tmp_path / "odd.tif", texture(), photometric="rgb", compress="lzw", blockysize=25)
    data = path.read_bytes()
    (first,) = struct.unpack("<I", data[4:8])
    for _ in range(150):
        changed = bytearray(data)
        for place in rng.integers(first, first + 200, 2):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of Pillow, about odd tags
                ImageReader([record(path, (HEIGHT, WIDTH))]).window(0, TILES[0])
        except ImageError as error:
            assert "odd.tif" in str(error)
    (tmp_path / "none.tif").write_bytes(b"II*\0")
    with pytest.raises(ImageError, match=r"none\.tif"):
        ImageReader([record(tmp_path / "none.tif", (9, 9))]).window(0, TILES[0])
    with pytest.raises(ImageError, match="does not exist"):
        ImageReader([record(tmp_path / "missing.tif", (9, 9))]).window(0, TILES[0])


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_a_file_that_was_changed_is_noticed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(texture().transpose(1, 2, 0)).save(path)
    reader = ImageReader([record(path, (HEIGHT, WIDTH + 1))])
    for read in (lambda: reader.window(0, TILES[0]), lambda: reader.whole(0), lambda: reader.whole(0, 2)):
        with pytest.raises(ImageError, match=f"has {WIDTH} x {HEIGHT} pixels instead of {WIDTH + 1} x {HEIGHT}"):
            read()


def test_orientation_that_only_xmp_tells_is_left_to_pillow(tmp_path: Path) -> None:
    path = tmp_path / "xmp.tif"
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[700] = b'<x tiff:Orientation="6"/>'
    info.tagtype[700] = 1
    Image.fromarray(texture().transpose(1, 2, 0)).save(path, tiffinfo=info)
    assert TiffParts.of(path) is None


def test_unpacked_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "unpacked"
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    Image.fromarray(texture().transpose(1, 2, 0)).save(path, exif=exif)
    monkeypatch.setenv("CROSSDINO_UNPACKED", str(folder))
    for _ in range(2):
        assert_windows(path, parts=True)
    (file,) = folder.iterdir()
    np.testing.assert_array_equal(np.load(file), np.asarray(read_image(path)))
    # It is used: nothing is decoded any more.
    with monkeypatch.context() as patch:
        patch.setattr(reading, "decode_image", lambda *_: pytest.fail("decoded"))
        patch.setattr(reading, "read_image", lambda *_: pytest.fail("decoded"))
        ImageReader([record(path, (WIDTH, HEIGHT))]).window(0, TILES[0])
    # Neither a file that was cut off, nor one of an image that was replaced since.
    file.write_bytes(file.read_bytes()[:1000])
    assert_windows(path, parts=True)
    Image.fromarray(texture().transpose(1, 2, 0)[::-1]).save(path)
    os.utime(path, (1, 1))
    assert_windows(path, parts=True)
    assert len(list(folder.iterdir())) == 2
    # The same number of bytes, written later.
    path = tmp_path / "b.bmp"
    for number, pixels in enumerate((texture(), 255 - texture())):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
        os.utime(path, (number, number))
        assert_windows(path, parts=True)
    # TIFF parts need no copy; a folder that cannot be is told.
    tiled = write(tmp_path / "t.tif", texture(), photometric="rgb", **SMALL)
    assert_windows(tiled, parts=True)
    monkeypatch.setenv("CROSSDINO_UNPACKED", str(path / "folder"))
    with pytest.raises(InputError, match=r"cannot write to .*CROSSDINO_UNPACKED"):
        ImageReader([record(path, (HEIGHT, WIDTH))]).window(0, TILES[0])


# --- what training makes of it ---


def index_of(path: Path, hw: tuple[int, int], count: int = 40) -> DatasetIndex:
    """An image with objects of odd sizes at odd places."""
    rng = np.random.default_rng(1)
    sides = rng.uniform(3, 20, (count, 2))
    boxes = np.concatenate([rng.uniform(0, 1, (count, 2)) * (np.array(hw[::-1]) - sides), sides], 1)
    objects = boxes, rng.integers(0, 2, count), boxes[:, 2:].prod(1), rng.random(count) < 0.1
    return DatasetIndex(path, ("a", "b"), (1, 2), (ImageRecord(7, path, hw[1], hw[0], *objects),), Problems())


def large(path: Path, wh: tuple[int, int], orientation: int = 1) -> Path:
    small = Image.fromarray(texture().transpose(1, 2, 0)).resize(wh, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).normal(0, 6, (wh[1], wh[0], 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = (np.asarray(small) + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    return path


SMALLER = DataConfig(
    train_short_sides=(80, 96), train_long_side=150, crop_short_sides=(70,), crop_range=(40, 60), num_workers=0
)
# Mean and deviation that leave the pixels as they are.
PLAIN = (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)


@pytest.mark.parametrize(("orientation", "shrink"), [(1, 4), (6, 4), (1, 2)])
def test_training_decodes_large_jpegs_at_a_smaller_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int, shrink: int
) -> None:
    stored = (1080, 800) if shrink == 4 else (632, 400)
    path = large(tmp_path / "a.jpg", stored, orientation)
    hw = stored if orientation == 6 else (stored[1], stored[0])
    made = DetectionDataset(index_of(path, hw), SMALLER, *PLAIN, train=True)
    exact = DetectionDataset(index_of(path, hw), SMALLER, *PLAIN, train=True)
    monkeypatch.setattr(exact, "_shrink", lambda _: 1)
    seen: list[tuple[int, int]] = []
    original = reading.decode_image

    def decode(*arguments: Any) -> tuple[Image.Image, int]:
        image, turn = original(*arguments)
        seen.append(image.size)
        return image, turn

    monkeypatch.setattr(reading, "decode_image", decode)
    for epoch in range(12):
        made.set_epoch(epoch)
        exact.set_epoch(epoch)
        (pixels, target), (wanted, truth) = made[0], exact[0]
        assert seen[-2:] == [(stored[0] // shrink, stored[1] // shrink), stored]
        assert pixels.shape == wanted.shape and target.original_hw == truth.original_hw == hw
        assert torch.equal(target.boxes_cxcywh, truth.boxes_cxcywh)
        assert torch.equal(target.ignored_boxes_cxcywh, truth.ignored_boxes_cxcywh)
        assert torch.equal(target.labels, truth.labels)
        # At least as much of the averaging is left to the resize: measured 0.5, with a largest difference of 6.
        assert (pixels - wanted).abs().mean() < 1 and (pixels - wanted).abs().max() <= 12


def test_where_every_pixel_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation, recipes that enlarge parts, sides that do not divide evenly, too small images, other formats."""
    even, odd = large(tmp_path / "even.jpg", (1080, 800)), large(tmp_path / "odd.jpg", (1081, 800))
    small, png = large(tmp_path / "small.jpg", (500, 380)), large(tmp_path / "a.png", (1080, 800))
    seen: list[tuple[int, int]] = []
    original = reading.decode_image
    monkeypatch.setattr(
        reading, "decode_image", lambda *given: (lambda made: (seen.append(made[0].size), made)[1])(original(*given))
    )
    cases: list[tuple[Path, dict[str, Any], bool]] = [
        (even, {}, False),
        (even, {"mosaic": 0.5}, True),
        (even, {"copy_paste": 0.5}, True),
        (odd, {}, True),
        (small, {}, True),
        (png, {}, True),
    ]
    for path, changes, train in cases:
        seen.clear()
        with Image.open(path) as image:
            size = (image.width, image.height)
        data = DataConfig(**{**vars(SMALLER), **changes})
        dataset = DetectionDataset(index_of(path, (size[1], size[0])), data, train=train)
        dataset[0]
        assert set(seen) == {size}, (path.name, changes, train)


def test_tiles_of_an_image_too_large_to_be_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = texture()
    path = write(tmp_path / "a.tif", values, photometric="rgb", compress="deflate", **SMALL)
    index = index_of(path, (HEIGHT, WIDTH))
    data = DataConfig(
        tile_size=64, tile_overlap=8, test_short_side=64, test_long_side=64, train_short_sides=(64,), num_workers=0
    )
    train_set = DetectionDataset(index, data, train=True, seed=3)
    batches = list(build_loader(train_set, 2))
    assert not train_set._reader._decoded, "in random order only windows are read, also of what could be kept"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    with pytest.raises(ImageError, match=r"a\.tif has too many pixels.*data\.tile_size"):
        DetectionDataset(index, DataConfig(tile_size=0), train=True)
    tiled = DetectionDataset(index, data, *PLAIN)
    for pixels, target in (tiled[item] for item in range(len(tiled))):
        left, top = target.origin_xy
        assert torch.equal(pixels, torch.from_numpy(values[:, top : top + 64, left : left + 64]).float())
    again = DetectionDataset(index, data, train=True, seed=3)
    for num_workers in (0, 2):
        for batch, wanted in zip(build_loader(again, 2, num_workers=num_workers), batches, strict=True):
            assert torch.equal(batch.images, wanted.images)
            for target, truth in zip(batch.targets, wanted.targets, strict=True):
                assert torch.equal(target.boxes_cxcywh, truth.boxes_cxcywh)


# --- files that deceive ---


def test_a_file_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    """Other pixels of the same size, elsewhere in the file: known places and ranges are of the old one."""
    path, other = tmp_path / "a.tif", tmp_path / "b.tif"
    deep, twelve = texture(3, "uint16", 65535), texture(3, "uint16", 4095)
    layouts: list[dict[str, Any]] = [{"blockysize": 7}, SMALL, SMALL | {"compress": "lzw"}, {"blockysize": HEIGHT}]
    reader = None
    for number, values in enumerate((deep, twelve, 255 - texture(), twelve)):
        write(other, values, photometric="rgb", **layouts[number])
        os.utime(other, (number, number))
        os.replace(other, path)
        reader = reader or ImageReader([record(path, (HEIGHT, WIDTH))])
        whole = np.asarray(read_image(path))
        for neighbours in (False, True):
            pixels = reader.window(0, TILES[1], neighbours)
            np.testing.assert_array_equal(pixels, whole[1:61, 3:64], err_msg=f"{number} {neighbours}")
        # Another process, which got what was found out before.
        pixels = pickle.loads(pickle.dumps(reader)).window(0, TILES[0])
        np.testing.assert_array_equal(pixels, whole[70:79, 70:81])


@pytest.mark.parametrize("how", [SMALL, {"blockysize": 16}])
def test_bands_of_16_bits_that_pillow_takes_for_noise(tmp_path: Path, how: dict[str, Any]) -> None:
    values = texture(3, "uint16", 65535)
    path = write(tmp_path / "a.tif", values, photometric="rgb", interleave="band", **how)
    for read in (
        lambda: read_image(path),
        lambda: read_sizes(path),
        lambda: ImageReader([record(path, (HEIGHT, WIDTH))]).window(0, TILES[0]),
    ):
        with pytest.raises(ImageError, match=r"a\.tif holds its 16-bit bands unpacked.*INTERLEAVE=PIXEL"):
            read()
    assert_windows(write(path, values, photometric="rgb", interleave="band", compress="lzw", **how), parts=True)


@pytest.mark.parametrize("compress", ["none", "deflate"])
@pytest.mark.parametrize("how", [SMALL, {"blockysize": 16}])
def test_parts_that_were_never_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], compress: str
) -> None:
    values = texture()
    values[:, :80] = 0
    path = write(tmp_path / "a.tif", values, photometric="rgb", SPARSE_OK="YES", compress=compress, **how)
    message = r"a\.tif is broken \(parts of it were never written.*SPARSE_OK=FALSE"
    for limit in (None, 5000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ImageError, match=message):
            read_sizes(path)
        with pytest.raises(ImageError, match=message):
            ImageReader([record(path, (HEIGHT, WIDTH))]).window(0, TILES[0])


def test_unpacked_strips_of_any_height_and_wide_images_in_small_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = texture(1, "uint16", 4095)
    raw = write(tmp_path / "raw.tif", values, blockysize=HEIGHT)
    tiled = write(tmp_path / "tiled.tif", values, compress="deflate", **SMALL)
    expected = np.asarray(read_image(raw))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    monkeypatch.setattr(images, "BAND_PX", 1100)
    for path, most in ((raw, 1100), (tiled, 1100)):
        assert read_sizes(path, decode=True) == ((WIDTH, HEIGHT), (WIDTH, HEIGHT))
        parts = TiffParts.of(path)
        assert parts is not None
        seen = np.zeros((HEIGHT, WIDTH), int)
        for rows, columns in images.bands(parts):
            assert len(rows) * len(columns) <= most and parts.bounds(rows, columns) == (rows, columns)
            seen[rows.start : rows.stop, columns.start : columns.stop] += 1
        assert (seen == 1).all()
        pixels = ImageReader([record(path, (HEIGHT, WIDTH))]).window(0, TILES[0])
        np.testing.assert_array_equal(pixels, expected[70:79, 70:81])


def test_an_unpacked_folder_that_is_none_or_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(texture().transpose(1, 2, 0)).save(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CROSSDINO_UNPACKED", "")
    assert_windows(path, parts=False)
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setenv("CROSSDINO_UNPACKED", str(path / "folder"))
    data = DataConfig(tile_size=64, tile_overlap=8, num_workers=1)
    loader = build_loader(DetectionDataset(index_of(path, (HEIGHT, WIDTH)), data), 2)
    with pytest.raises(InputError) as caught:
        next(iter(loader))
    assert str(caught.value).startswith("cannot write to") and "\n" not in str(caught.value)
