"""Videos and cameras through PyAV: frame after frame, each with its number and its time.

The number of frames in a file's header is an estimate and only used as one. A damaged file gives its frames up to the
damage; that a file was cut off is also told where the decoder just comes to an end.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from crossdino.data.images import BROKEN, MISSING, NO_IMAGE, ImageError
from crossdino.errors import InputError
from crossdino.sources.contract import Picture, ReadOptions, Source, VideoInfo
from crossdino.sources.images import cut, reduce_pixels
from crossdino.tiling import Tile

# What a video is taken for that does not say how fast it is.
USUAL_FPS = 25.0


class FramePicture(Picture):
    """A frame of a video; it holds its own pixels, whatever becomes of the video."""

    def __init__(self, source: Source, frame: int, seconds: float, pixels: NDArray[np.uint8]) -> None:
        """Take over the pixels.

        Args:
            source: the video.
            frame: number of the frame, from 0.
            seconds: since the first frame.
            pixels: (H, W, 3) RGB, upright.
        """
        self.source = source
        self.frame = frame
        self.seconds = seconds
        self.hw = (pixels.shape[0], pixels.shape[1])
        self._pixels = pixels

    def read(self, tile: Tile) -> NDArray[np.uint8]:
        """See `Picture.read`."""
        return cut(self._pixels, tile)

    def read_reduced(self, hw: tuple[int, int]) -> NDArray[np.uint8]:
        """See `Picture.read_reduced`."""
        return reduce_pixels(self._pixels, hw)


def read_frames(source: Source, options: ReadOptions, first_frame: int = 0) -> Iterator[Picture]:
    """The frames of a video, in the order in which they are shown.

    Args:
        source: the video file.
        options: `every_frame` is used.
        first_frame: frames with a lower number are left out. They are decoded nevertheless, because only counting
            tells for sure which frame is which.

    Yields:
        A picture a frame.

    Raises:
        ImageError: the file is no video, or is damaged from some frame on.
    """
    number = -1
    with _opened(source) as (container, stream):
        start = None
        fps = _fps(stream)
        try:
            for frame in _decoded(container, stream):
                number += 1
                shown = number / fps if frame.time is None else frame.time
                start = shown if start is None else start
                if number >= first_frame and number % options.every_frame == 0:
                    yield FramePicture(source, number, shown - start, _upright(frame))
        except av.error.FFmpegError as error:
            raise _damaged(source, number, _reason(error)) from None
        if number < 0:
            raise ImageError(f"video {source.path} holds no frame; replace the file or take it out", BROKEN)
        expected = _num_frames(container, stream)
        if _is_cut_off(source.path) and (expected is None or number + 1 < expected):
            raise _damaged(source, number, "the file is cut off")


def read_video_info(source: Source) -> VideoInfo:
    """What a video says of itself; its first frame is decoded for it.

    Raises:
        ImageError: the file is no video, or its first frame is damaged.
        InputError: the source is not a video file.
    """
    if source.kind != "video":
        raise InputError(f"{source.name} is not a video file; its rate and length are not known")
    with _opened(source) as (container, stream):
        try:
            first = next(iter(_decoded(container, stream)), None)
        except av.error.FFmpegError as error:
            raise _damaged(source, -1, _reason(error)) from None
        if first is None:
            raise ImageError(f"video {source.path} holds no frame; replace the file or take it out", BROKEN)
        height, width = _upright(first).shape[:2]
        return VideoInfo(_fps(stream), (height, width), _num_frames(container, stream))


def read_camera(source: Source, options: ReadOptions, first_frame: int = 0) -> Iterator[Picture]:
    """The frames of a camera, without an end.

    Args:
        source: the camera; its path is its number.
        options: `every_frame` is used.
        first_frame: the number of the first frame (a run that goes on does not use numbers twice).

    Yields:
        A picture a frame.

    Raises:
        InputError: there is no such camera, it is in use, or it stops.
    """
    number = first_frame - 1
    start = None
    try:
        with open_camera(int(source.path)) as container:
            for frame in _live(container):
                number += 1
                now = time.monotonic()
                start = now if start is None else start
                if number % options.every_frame == 0:
                    yield FramePicture(source, number, now - start, _upright(frame))
    except (av.error.FFmpegError, OSError) as error:
        raise InputError(
            f"camera {source.path} cannot be read ({_reason(error)}); check that it is connected, that no other "
            "program uses it, and that this program may use cameras"
        ) from None
    raise InputError(f"camera {source.path} stopped after frame {number}; connect it again")


def open_camera(number: int) -> InputContainer:
    """Open a camera by its number, as this system calls it."""
    if sys.platform == "darwin":
        return av.open(str(number), format="avfoundation", container_options={"framerate": "30"})
    if sys.platform == "win32":  # where cameras have names only
        names = [device.name for device in av.enumerate_input_devices("dshow") if "video" in str(device.media_types)]
        if number >= len(names):
            raise FileNotFoundError(2, f"there are {len(names)} cameras")
        return av.open(f"video={names[number]}", format="dshow")
    device = f"/dev/video{number}"
    if not os.path.exists(device):
        raise FileNotFoundError(2, f"there is no {device}")
    return av.open(device, format="v4l2")


def _live(container: InputContainer) -> Iterator[VideoFrame]:
    """The frames of a camera; some systems say `not yet` instead of waiting."""
    while True:
        try:
            yield from container.decode(video=0)
            return
        except av.error.BlockingIOError:
            time.sleep(0.005)


@contextmanager
def _opened(source: Source) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The opened video and its stream of pictures."""
    path = source.path
    try:
        container = av.open(os.path.abspath(path))
    except FileNotFoundError:
        raise ImageError(f"video {path} does not exist; check the path", MISSING) from None
    except (av.error.FFmpegError, OSError) as error:
        reason = _reason(error)
        message = f"{path} is not a video that can be read ({reason}); replace the file or convert it to MP4 (H.264)"
        raise ImageError(message, BROKEN, reason) from None
    with container:
        # A cover picture of a song is a stream of its own.
        streams = [one for one in container.streams.video if "attached_pic" not in str(one.disposition)]
        if not streams:
            raise ImageError(f"{path} holds no video; name another file", NO_IMAGE)
        stream = streams[0]
        if stream.codec_context is None:
            raise ImageError(f"the kind of video in {path} is not known; convert it to MP4 (H.264)", NO_IMAGE)
        stream.thread_type = "AUTO"
        yield container, stream


def _decoded(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """All frames; at damage, first those that the decoder still holds, then the error."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            frames = packet.decode() if packet is not None else None
        except av.error.FFmpegError as error:
            with suppress(av.error.FFmpegError):
                yield from stream.codec_context.decode(None)
            raise error
        if frames is None:
            return
        yield from frames


def _upright(frame: VideoFrame) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of a frame, turned and mirrored as its display matrix says (by quarters of a turn)."""
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")  # pyright: ignore[reportAssignmentType]
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), dtype=np.int32).tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):  # x' = c * y, y' = b * x
            pixels, a, d = pixels.swapaxes(0, 1), c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(pixels)


def _fps(stream: VideoStream) -> float:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else USUAL_FPS


def _num_frames(container: InputContainer, stream: VideoStream) -> int | None:
    """About how many frames a video has."""
    if stream.frames:
        return stream.frames
    if stream.duration and stream.time_base:
        return round(float(stream.duration * stream.time_base) * _fps(stream))
    if container.duration:
        return round(float(Fraction(container.duration, av.time_base)) * _fps(stream))
    return None


def _is_cut_off(path: str) -> bool:
    """Whether a file is shorter than its outermost parts say (MP4 and MOV, Matroska and WebM, AVI)."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(64)
        if head[:4] == b"RIFF":
            return 8 + int.from_bytes(head[4:8], "little") > size
        if head[:4] == b"\x1aE\xdf\xa3":
            header, at = _ebml_number(head, 4)
            at += header
            length, begin = _ebml_number(head, at + 4)
            unknown = length == (1 << 7 * (begin - at - 4)) - 1
            return head[at : at + 4] == b"\x18S\x80g" and not unknown and begin + length > size
        if head[4:8] != b"ftyp":
            return False
        at = 0
        while at + 8 <= size:
            file.seek(at)
            box = file.read(16)
            length = int.from_bytes(box[:4], "big")
            if length == 1:
                length = int.from_bytes(box[8:16], "big")
            if length == 0:  # to the end of the file
                return False
            if length < 8:
                return True
            at += length
        return at != size


def _ebml_number(data: bytes, at: int) -> tuple[int, int]:
    """A number of Matroska's, whose first bits tell how many bytes it has, and where it ends."""
    length = 9 - data[at].bit_length()
    value = int.from_bytes(data[at : at + length], "big")
    return value & ((1 << 7 * length) - 1), at + length


def _damaged(source: Source, number: int, reason: str) -> ImageError:
    place = f"after frame {number}" if number >= 0 else "from its first frame on"
    message = f"video {source.path} is damaged {place} ({reason}); replace the file or convert it again"
    return ImageError(message, BROKEN, reason)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
