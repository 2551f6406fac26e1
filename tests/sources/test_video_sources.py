from __future__ import annotations

import struct
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from crossdino.data.images import ImageError
from crossdino.errors import InputError
from crossdino.sources import Picture, ReadOptions, Source, VideoInfo, open_pictures, read_video_info
from crossdino.sources import video as video_module
from crossdino.tiling import Tile

# Lossy video moves colours a little; the frames' own colours are 8 levels apart and these are means of whole areas.
CLOSE = 3


def write_video(path: Path, num_frames: int = 30, codec: str = "libx264", times: list[int] | None = None) -> Path:
    """Frame n is grey (8 n), with its upper left quarter red."""
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10, options={"g": "5"})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 2_000_000
        for number in range(num_frames):
            pixels = np.full((48, 64, 3), 8 * number, dtype=np.uint8)
            pixels[:24, :32] = (255, 0, 0)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts = times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def as_source(path: Path) -> Source:
    return Source(path.name, str(path), "video")


def grey_of(picture: Picture) -> float:
    """Of the lower right quarter."""
    height, width = picture.hw
    return float(picture.read(Tile(height // 2 + 4, width // 2 + 4, height // 2 - 8, width // 2 - 8)).mean())


def test_frames_come_in_order_with_number_and_time(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film 1 ü.mp4")
    frames = list(open_pictures(as_source(path)))
    assert [picture.frame for picture in frames] == list(range(30))
    assert [picture.seconds for picture in frames] == pytest.approx([n / 10 for n in range(30)])
    assert all(picture.hw == (48, 64) and picture.georeference is None for picture in frames)
    assert [grey_of(picture) for picture in frames] == pytest.approx([8 * n for n in range(30)], abs=CLOSE)
    tile = frames[20].read(Tile(40, 50, 20, 30))
    assert tile.shape == (20, 30, 3) and tile[:8, :14].mean() == pytest.approx(160, abs=CLOSE)
    assert not tile[8:].any() and not tile[:, 14:].any()
    assert frames[3].read_reduced((24, 32)).shape == (24, 32, 3)
    assert read_video_info(as_source(path)) == VideoInfo(10.0, (48, 64), 30)


@pytest.mark.parametrize("suffix", [".mkv", ".avi", ".ts", ".mov"])
def test_every_nth_frame_and_a_later_start(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"film{suffix}", codec="mpeg4" if suffix == ".avi" else "libx264")
    every = [
        (one.frame, one.seconds, grey_of(one)) for one in open_pictures(as_source(path), ReadOptions(every_frame=4))
    ]
    assert [number for number, *_ in every] == list(range(0, 30, 4))
    assert [grey for *_, grey in every] == pytest.approx([32 * n for n in range(8)], abs=CLOSE)
    later = [
        (one.frame, one.seconds, grey_of(one))
        for one in open_pictures(as_source(path), ReadOptions(every_frame=4), first_frame=13)
    ]
    assert later == every[4:]
    assert every[0][1] == 0 and every[2][1] == pytest.approx(0.8)  # also of .ts, whose own clock begins later


def test_times_of_frames_are_those_of_the_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mkv", 4, times=[3, 4, 9, 10])
    assert [one.seconds for one in open_pictures(as_source(path))] == pytest.approx([0, 0.1, 0.6, 0.7])


TURNED = {  # what MP4 calls the matrix, and what shows the stored frame as it is meant
    "quarter": ((0, 1, -1, 0), lambda pixels: np.rot90(pixels, -1)),
    "half": ((-1, 0, 0, -1), lambda pixels: np.rot90(pixels, 2)),
    "three quarters": ((0, -1, 1, 0), lambda pixels: np.rot90(pixels, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda pixels: pixels[:, ::-1]),
}


@pytest.mark.parametrize("name", TURNED)
def test_the_rotation_of_phones_is_applied(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / "film.mp4", 3)
    plain = [one.read(Tile(0, 0, *one.hw)) for one in open_pictures(as_source(path))]
    (a, b, c, d), turn = TURNED[name]
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    assert struct.unpack(">9i", data[matrix : matrix + 36])[::4] == (65536, 65536, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    frames = list(open_pictures(as_source(path)))
    for before, picture in zip(plain, frames, strict=True):
        wanted = turn(before)
        assert picture.hw == wanted.shape[:2]
        np.testing.assert_array_equal(picture.read(Tile(0, 0, *picture.hw)), wanted)
    assert read_video_info(as_source(path)).hw == frames[0].hw


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_truncated_video_gives_its_frames_and_then_the_error(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"film{suffix}", codec="mpeg4" if suffix == ".avi" else "libx264")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * 0.8)])
    given = []
    with pytest.raises(ImageError, match="is damaged after frame") as caught:
        given.extend(one for one in open_pictures(as_source(path)))
    pictures = []
    with pytest.raises(ImageError):
        for one in open_pictures(as_source(path)):
            pictures.append(one)
    assert 3 <= len(pictures) < 30
    assert [grey_of(one) for one in pictures] == pytest.approx([8 * n for n in range(len(pictures))], abs=CLOSE)
    assert str(path) in str(caught.value) and f"after frame {len(pictures) - 1} " in str(caught.value)


def test_damage_in_the_middle(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4")
    data = bytearray(path.read_bytes())
    start = data.rindex(b"mdat") + 4
    middle = start + (len(data) - start) // 2
    data[middle:] = b"\xff" * (len(data) - middle)
    path.write_bytes(data)
    pictures = []
    with pytest.raises(ImageError, match=r"film\.mp4 is damaged after frame \d+"):
        for one in open_pictures(as_source(path)):
            pictures.append(one)
    assert pictures[0].frame == 0 and len(pictures) < 30


def test_what_is_no_video(tmp_path: Path) -> None:
    text, empty, sound = (tmp_path / name for name in ("text.mp4", "empty.mp4", "sound.mp4"))
    text.write_text("hello " * 100)
    empty.write_bytes(b"")
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), dtype=np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    for path, message in (
        (text, "is not a video that can be read"),
        (empty, "is not a video that can be read"),
        (sound, "holds no video"),
        (tmp_path / "no.mp4", "does not exist"),
    ):
        for use in (lambda source: next(open_pictures(source)), read_video_info):
            with pytest.raises(ImageError, match=message) as caught:
                use(as_source(path))
            assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="not a video file"):
        read_video_info(Source("camera-0", "0", "camera"))


def test_frames_outlive_their_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", 5)
    stream = open_pictures(as_source(path))
    first = next(stream)
    before = first.read(Tile(0, 0, 48, 64))
    for _ in stream:
        pass
    path.unlink()
    np.testing.assert_array_equal(first.read(Tile(0, 0, 48, 64)), before)


def test_a_video_can_be_left_early(tmp_path: Path) -> None:
    path = write_video(tmp_path / "film.mp4", 5)
    stream = open_pictures(as_source(path))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert next(open_pictures(as_source(path))).frame == 0


def test_an_animation_is_its_first_frame(tmp_path: Path) -> None:
    path = tmp_path / "moving.gif"
    Image.new("RGB", (6, 4), "red").save(path, save_all=True, append_images=[Image.new("RGB", (6, 4), "blue")])
    pictures = list(open_pictures(Source("moving.gif", str(path), "image")))
    assert len(pictures) == 1 and pictures[0].frame is None
    assert pictures[0].read(Tile(0, 0, 4, 6)).tolist() == [[[255, 0, 0]] * 6] * 4


# --- cameras: ffmpeg's test picture stands for the device ---


def test_a_camera_gives_frames_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def open_camera(number: int) -> object:
        opened.append(number)
        return av.open("testsrc=size=64x48:rate=30", format="lavfi")

    monkeypatch.setattr(video_module, "open_camera", open_camera)
    stream = open_pictures(Source("camera-3", "3", "camera"), ReadOptions(every_frame=2), first_frame=10)
    frames = [next(stream) for _ in range(40)]
    stream.close()  # type: ignore[attr-defined]
    assert opened == [3]
    assert [one.frame for one in frames] == list(range(10, 90, 2))
    assert frames[0].seconds == 0 and frames[-1].seconds >= frames[0].seconds
    assert frames[0].hw == (48, 64) and frames[0].read(Tile(0, 0, 48, 64)).any()


def test_a_camera_that_needs_a_moment_and_one_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        """Says `not yet` twice, then gives the frames of a short film."""

        def __init__(self) -> None:
            self.calls = 0
            self.film = av.open("testsrc=size=64x48:rate=30:duration=0.1", format="lavfi")

        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *_: object) -> None:
            self.film.close()

        def decode(self, video: int) -> object:
            self.calls += 1
            if self.calls < 3:
                raise av.error.BlockingIOError(11, "Resource temporarily unavailable")
            return self.film.decode(video=video)

    monkeypatch.setattr(video_module, "open_camera", lambda number: Slow())
    given = []
    with pytest.raises(InputError, match="camera 0 stopped after frame 2"):
        for one in open_pictures(Source("camera-0", "0", "camera")):
            given.append(one)
    assert len(given) == 3


def test_a_camera_that_is_not_there() -> None:
    with pytest.raises(InputError, match="camera 97 cannot be read .*check that it is connected"):
        next(open_pictures(Source("camera-97", "97", "camera")))


@pytest.mark.parametrize(("platform", "wanted"), [("linux", "v4l2"), ("darwin", "avfoundation"), ("win32", "dshow")])
def test_each_system_is_asked_in_its_own_way(monkeypatch: pytest.MonkeyPatch, platform: str, wanted: str) -> None:
    class Device:
        name = "Integrated Camera"
        media_types = ("video",)

    asked = []
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(video_module.os.path, "exists", lambda path: True)
    monkeypatch.setattr(av, "enumerate_input_devices", lambda kind: [Device()], raising=False)
    monkeypatch.setattr(av, "open", lambda file, format, **_: asked.append((file, format)))
    video_module.open_camera(0)
    assert asked == [({"v4l2": "/dev/video0", "avfoundation": "0", "dshow": "video=Integrated Camera"}[wanted], wanted)]
