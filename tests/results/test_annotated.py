"""Annotated pictures and videos: right size, right place, right colours, and without OpenCV."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from crossdino.results import PictureResult, annotated_video, draw_picture, write_picture
from crossdino.sources import Picture, Source

CLASSES = ("car", "ship")


class Plain(Picture):
    """A grey picture of any size."""

    def __init__(self, hw: tuple[int, int]) -> None:
        self.source, self.hw, self.most = Source("a.png", "a.png", "image"), hw, 0

    def read(self, tile):
        self.most = max(self.most, tile.height * tile.width)
        return np.full((tile.height, tile.width, 3), 90, np.uint8)

    def read_reduced(self, hw):
        self.most = max(self.most, hw[0] * hw[1])
        return np.full((*hw, 3), 90, np.uint8)


def result_of(hw: tuple[int, int], *boxes: list[float], frame: int | None = None, label: int = 0) -> PictureResult:
    count = len(boxes)
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    return PictureResult(
        *("a.png", hw[1], hw[0], corners, np.full(count, 0.5, np.float32), np.full(count, label)), frame
    )


def extent(drawn: Image.Image, hw: tuple[int, int]) -> list[int]:
    """The box around what was drawn on the grey picture."""
    rows, columns = np.nonzero((np.asarray(drawn)[: hw[0], : hw[1]] != 90).any(axis=2))
    return [columns.min(), rows.min(), columns.max(), rows.max()]


def boxes_in_a_corner(size: float, count: int = 20) -> list[list[float]]:
    """So many that labels, which would be wider than the boxes, are left out."""
    return [[3 * size, 2 * size, 4 * size, 3 * size]] * count


def test_an_ordinary_image_keeps_its_pixels(tmp_path: Path) -> None:
    picture = Plain((300, 500))
    drawn = draw_picture(picture, result_of((300, 500), *boxes_in_a_corner(20)), CLASSES)
    assert drawn.width == 500 and drawn.height > 300
    assert extent(drawn, (300, 500)) == [60, 40, 80, 60]
    write_picture(tmp_path / "a.jpg", drawn)
    with Image.open(tmp_path / "a.jpg") as stored:
        assert stored.format == "JPEG" and stored.size == drawn.size
    assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]


def test_a_gigapixel_image_is_made_smaller() -> None:
    hw = (60_000, 100_000)
    picture = Plain(hw)
    drawn = draw_picture(picture, result_of(hw, *boxes_in_a_corner(2000)), CLASSES, reduced_side=1000)
    assert drawn.width == 1000 and picture.most == 1000 * 600
    assert extent(drawn, (600, 1000)) == [60, 40, 80, 60]
    # JPEG knows no side of 65,536 pixels, however few pixels there are in all.
    thin = Plain((20, 70_000))
    assert draw_picture(thin, result_of((20, 70_000)), CLASSES).width == 4096


def read_video(path: Path) -> tuple[list[np.ndarray], av.VideoStream]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)], stream


def test_a_video_of_odd_size(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    hw = (121, 163)
    with annotated_video(path, 30000 / 1001, CLASSES) as add:
        for frame in range(6):
            assert not path.exists()
            # Without objects, with one class, with a size that changes on the way.
            shape = (242, 326) if frame == 4 else hw
            found = result_of(shape, *([[40, 30, 80, 60]] * (frame if frame != 4 else 0)), frame=frame)
            add(np.full((*shape, 3), (200, 40, 30), np.uint8), found)
    assert [item.name for item in tmp_path.iterdir()] == ["v.mp4"]
    frames, stream = read_video(path)
    assert len(frames) == 6 and len({frame.shape for frame in frames}) == 1
    height, width = frames[0].shape[:2]
    assert width == 164 and height % 2 == 0 and height > 121
    assert stream.codec_context.name == "h264" and abs(float(stream.average_rate) - 29.97) < 0.001
    # Compressed colours: a few levels off.
    assert abs(frames[0][20:100, 10:30].astype(int) - (200, 40, 30)).max() < 12
    outline = frames[3][45, 36:45].astype(int)
    assert (abs(outline - (200, 40, 30)).sum(axis=1) > 60).any(), "the box's left side"


def test_many_classes_leave_most_of_the_video_to_the_picture(tmp_path: Path) -> None:
    names = [f"a class with a long name, number {number}" for number in range(100)]
    with annotated_video(tmp_path / "v.mp4", 10, names) as add:
        add(np.zeros((240, 320, 3), np.uint8), result_of((240, 320), [5, 5, 20, 20], label=99))
    frames, _ = read_video(tmp_path / "v.mp4")
    assert frames[0].shape == (320, 320, 3)


@pytest.mark.parametrize("hw", [(2, 2), (7, 300)])
def test_tiny_videos(tmp_path: Path, hw: tuple[int, int]) -> None:
    with annotated_video(tmp_path / "v.mp4", 0.4, CLASSES) as add:
        add(np.zeros((*hw, 3), np.uint8), result_of(hw))
    assert len(read_video(tmp_path / "v.mp4")[0]) == 1


def test_a_video_that_breaks_off_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), annotated_video(path, 25, CLASSES) as add:
        add(np.zeros((64, 64, 3), np.uint8), result_of((64, 64)))
        raise KeyboardInterrupt
    with annotated_video(path, 25, CLASSES):
        pass  # no frame
    assert path.read_bytes() == b"old" and [item.name for item in tmp_path.iterdir()] == ["v.mp4"]


def test_mpeg4_where_h264_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with annotated_video(tmp_path / "v.mp4", 59.94005994, CLASSES) as add:
        for _ in range(3):
            add(np.full((64, 64, 3), 90, np.uint8), result_of((64, 64)))
    frames, stream = read_video(tmp_path / "v.mp4")
    assert len(frames) == 3 and stream.codec_context.name == "mpeg4"
