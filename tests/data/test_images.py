"""Image files of every kind, good and damaged."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossdino.data.images import ImageError, read_headers, read_image


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


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_16_bit_grey(tmp_path: Path, name: str) -> None:
    values = np.array([[0, 128, 129, 257], [32768, 65407, 65408, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    # Full range to full range; half a step is 128.5.
    np.testing.assert_array_equal(load(tmp_path / name)[..., 1], [[0, 0, 1, 1], [128, 255, 255, 255]])


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


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", list(ORIENTATIONS))
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    pixels = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif, **({"quality": 100, "subsampling": 0} if suffix == "jpg" else {}))
    expected = ORIENTATIONS[orientation](pixels)
    shown = load(path)
    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected).max() <= 4  # JPEG of quality 100
    ((width, height), _) = read_headers([path])[0]
    assert (height, width) == expected.shape[:2]
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

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    for read in (read_image, lambda name: read_headers([name])):
        with pytest.raises(ImageError, match=r"bomb\.png has too many pixels"):
            read(path)


def test_large_image_is_no_warning(tmp_path: Path) -> None:
    """Between Pillow's warning (89 million pixels) and its error an image is simply large."""
    Image.new("1", (10000, 9001)).save(tmp_path / "large.png")
    assert read_headers([tmp_path / "large.png"])[0][0] == (10000, 9001)


def test_error_keeps_one_line_through_a_worker() -> None:
    text = "Caught ImageError in worker process 0.\nTraceback:\n  x\ncrossdino.data.images.ImageError: a is bad\n"
    assert str(ImageError(text)) == "a is bad"
