"""Image files of every kind, good and damaged."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crossdino.data.check import check_images
from crossdino.data.images import ORIENTATION_TAG, ImageError, read_image, read_sizes


def picture(height: int = 24, width: int = 40) -> np.ndarray:
    """Coarse coloured blocks, which JPEG keeps within a few grey levels."""
    blocks = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, 0).repeat(8, 1)


def load(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_plain_modes(tmp_path: Path) -> None:
    pixels = picture()
    grey = pixels[..., 0]
    cases = {
        "rgb.png": (Image.fromarray(pixels), pixels),
        "grey.png": (Image.fromarray(grey), np.stack([grey] * 3, -1)),
        "alpha.png": (Image.fromarray(np.dstack([pixels, grey])), pixels),
        "grey_alpha.png": (Image.fromarray(np.dstack([grey, grey]), mode=None), np.stack([grey] * 3, -1)),
        "bits.png": (Image.fromarray(grey > 99), np.stack([(grey > 99) * np.uint8(255)] * 3, -1)),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        np.testing.assert_array_equal(load(tmp_path / name), expected, err_msg=name)


def test_palette_with_transparency(tmp_path: Path) -> None:
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    image = Image.fromarray(indices).convert("L")
    palette = Image.new("P", (4, 3))
    palette.putdata(list(image.get_flattened_data()))
    colors = np.array([[200, 10, 30], [0, 250, 5], [9, 8, 7]], dtype=np.uint8)
    palette.putpalette(colors.reshape(-1).tolist())
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 128, 255]))
    np.testing.assert_array_equal(load(tmp_path / "palette.png"), colors[indices])


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_deep_png(path: Path, values: np.ndarray, late: bytes = b"") -> None:
    """A PNG of 16 bits a channel from (H, W, C) values, which Pillow cannot write; `late` follows the pixels."""
    height, width, channels = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + late + png_chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def write_deep_tiff(path: Path, values: np.ndarray, deflate: bool = False) -> None:
    """A TIFF of 16-bit RGB from (H, W, 3) values, which Pillow cannot write."""
    data = values.astype("<u2").tobytes()
    data = zlib.compress(data) if deflate else data
    height, width, _ = values.shape
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 3, 134),  # bits per sample: after the tags
        (259, 3, 1, 8 if deflate else 1),
        (262, 3, 1, 2),
        (273, 4, 1, 140),  # the pixels
        (277, 3, 1, 3),
        (278, 4, 1, height),
        (279, 4, 1, len(data)),
        (284, 3, 1, 1),
    ]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    path.write_bytes(head + bytes(4) + struct.pack("<3H", 16, 16, 16) + data)


DEEP = np.array([[0, 128, 129, 257], [32768, 65407, 65408, 65535]], dtype=np.uint16)
# Full range to full range; half a step is 128.5.
SHALLOW = np.array([[0, 0, 1, 1], [128, 255, 255, 255]], dtype=np.uint8)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bit_grey(tmp_path: Path, name: str) -> None:
    Image.fromarray(DEEP).save(tmp_path / name)
    np.testing.assert_array_equal(load(tmp_path / name)[..., 1], SHALLOW)


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colors(tmp_path: Path, channels: int) -> None:
    """Pillow alone would drop the lower byte; here the channels differ, and alpha is not a colour."""
    values = np.stack([DEEP, DEEP[::-1], DEEP // 2, np.full_like(DEEP, 9)], -1)[..., :channels]
    expected = np.round(values[..., :3] / 257)
    write_deep_png(tmp_path / "deep.png", values)
    np.testing.assert_array_equal(load(tmp_path / "deep.png"), expected)
    for deflate in (False, True):
        write_deep_tiff(tmp_path / "deep.tif", values[..., :3], deflate)
        np.testing.assert_array_equal(load(tmp_path / "deep.tif"), expected)


def test_16_bit_grey_with_transparency(tmp_path: Path) -> None:
    """Of which Pillow keeps the upper bytes: at most one step below the rounded value."""
    values = np.stack([DEEP, np.full_like(DEEP, 9)], -1)
    path = tmp_path / "deep.png"
    write_deep_png(path, values)
    assert np.abs(load(path) - values[..., :1] / 257).max() <= 1
    write_deep_png(path, values // 16)
    with pytest.raises(ImageError, match=r"deep\.png uses 12 of its 16 bits only.*convert"):
        read_image(path)
    write_deep_png(path, values * 0)  # all black is all black
    assert load(path).max() == 0


def test_12_bit_values_in_16_bits(tmp_path: Path) -> None:
    values = np.array([[0, 8, 9, 2048, 4095]], dtype=np.uint16)  # half a step is 4095 / 510 = 8.03
    Image.fromarray(values).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(load(tmp_path / "grey.png")[..., 0], [[0, 0, 1, 128, 255]])
    write_deep_png(tmp_path / "color.png", values[..., None].repeat(3, -1))
    write_deep_tiff(tmp_path / "color.tif", values[..., None].repeat(3, -1))
    for name in ("color.png", "color.tif"):
        np.testing.assert_array_equal(load(tmp_path / name)[..., 2], [[0, 0, 1, 128, 255]])


def test_16_bit_pgm(tmp_path: Path) -> None:
    (tmp_path / "deep.pgm").write_bytes(b"P5 4 2 65535\n" + DEEP.astype(">u2").tobytes())
    np.testing.assert_array_equal(load(tmp_path / "deep.pgm")[..., 0], SHALLOW)


@pytest.mark.parametrize("late", [False, True])
def test_orientation_of_a_deep_png(tmp_path: Path, late: bool) -> None:
    """Before the pixels or behind them, where only decoding finds it in Pillow."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = 6
    chunk = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    path = tmp_path / "turned.png"
    write_deep_png(path, DEEP[..., None].repeat(3, -1), chunk)
    if not late:  # from behind the pixels to the place after the header
        data = path.read_bytes()
        path.write_bytes(data[:33] + chunk + data[33:].replace(chunk, b""))
    np.testing.assert_array_equal(load(path)[..., 0], np.rot90(SHALLOW, -1))
    assert read_sizes(path) == ((2, 4), (4, 2)) == read_sizes(path, decode=True)


def test_cmyk_and_other_modes(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 3), (0, 255, 255, 0)).save(tmp_path / "c.tif")
    np.testing.assert_array_equal(load(tmp_path / "c.tif"), np.broadcast_to([255, 0, 0], (3, 4, 3)).astype(np.uint8))
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "c.jpg")
    assert np.abs(load(tmp_path / "c.jpg").astype(int) - [255, 0, 0]).max() <= 4  # JPEG
    Image.new("1", (4, 3), 1).save(tmp_path / "bits.tif")
    assert load(tmp_path / "bits.tif").min() == 255


def test_headers_of_png_files_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert read_sizes(tmp_path / "a.png") == ((40, 24), (40, 24))


def test_float_image_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ImageError, match=r"f\.tif has 32-bit pixels"):
        read_image(tmp_path / "f.tif")


# EXIF orientation -> what must be done to the stored pixels to show the image upright (from the EXIF standard's table).
ORIENTATIONS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


OPTIONS: dict[str, dict[str, Any]] = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", list(ORIENTATIONS))
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    pixels = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif, **OPTIONS.get(suffix, {}))
    expected = ORIENTATIONS[orientation](pixels)
    shown = load(path)
    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected).max() <= 4  # JPEG of quality 100
    for decode in (False, True):
        shown_wh, stored_wh = read_sizes(path, decode)
        assert shown_wh[::-1] == expected.shape[:2]
        assert stored_wh == (shown_wh if suffix == "tif" else (40, 24))
    if suffix != "tif":  # Pillow turns TIFF files by itself
        assert np.abs(np.asarray(read_image(path, apply_exif=False)).astype(int) - pixels).max() <= 4


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "bmp"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(1).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_not_an_image(tmp_path: Path) -> None:
    path = tmp_path / "text.jpg"
    for content in (b"", b"hello", bytes(5000)):
        path.write_bytes(content)
        with pytest.raises(ImageError, match=r"text\.jpg is not an image"):
            read_image(path)
    with pytest.raises(ImageError, match="does not exist"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(ImageError, match="broken"):
        read_image(tmp_path)  # a folder


def test_flipped_bytes_never_escape(tmp_path: Path) -> None:
    """Damaged files either decode or raise ImageError, nothing else."""
    generator = np.random.default_rng(2)
    path = tmp_path / "damaged"
    for suffix in ("png", "jpg", "tif", "gif"):
        Image.fromarray(picture()).save(tmp_path / f"whole.{suffix}")
        whole = np.frombuffer((tmp_path / f"whole.{suffix}").read_bytes(), np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[generator.integers(0, len(damaged), 6)] = generator.integers(0, 255, 6)
            path.write_bytes(damaged.tobytes())
            try:
                image = read_image(path)
            except ImageError as error:
                assert "damaged" in str(error)
            else:
                assert image.mode == "RGB"


def test_decompression_bomb(tmp_path: Path) -> None:
    """A PNG that claims 60000 x 60000 pixels: refused by its header."""

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    )
    for read in (read_image, read_sizes):
        with pytest.raises(ImageError, match=r"bomb\.png has too many pixels"):
            read(path)


def test_large_image_is_no_warning(tmp_path: Path) -> None:
    """Between Pillow's warning (89 million pixels) and its error an image is simply large."""
    Image.new("1", (10000, 9001)).save(tmp_path / "large.png")
    (facts,) = check_images([tmp_path / "large.png"])
    assert facts.shown_wh == (10000, 9001)


def test_error_keeps_one_line_through_a_worker() -> None:
    text = "Caught ImageError in worker process 0.\nTraceback:\n  x\ncrossdino.data.images.ImageError: a is bad\n"
    assert str(ImageError(text)) == "a is bad"
