"""Annotated videos: H.264 in MP4 through PyAV, which brings its own FFmpeg; MPEG-4 where that cannot write H.264.

All frames have one size, although the legend below them does not: room is kept for as many lines as naming all classes
takes, up to a third of the frame's height.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import supervision as sv
from av.container import OutputContainer
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

from crossdino.errors import InputError
from crossdino.results.picture_result import PictureResult
from crossdino.sources import DRAWN_MARK
from crossdino.visualization import draw_detections

AddFrame = Callable[[NDArray[np.uint8], PictureResult], None]
# No encoder takes less.
_LEAST_SIDE = 32


@contextmanager
def annotated_video(path: str | Path, fps: float, class_names: Sequence[str]) -> Iterator[AddFrame]:
    """Write a video of frames with their detections.

    The file takes its name when the block ends well and has had a frame; otherwise an older one stays as it is.

    Args:
        path: ends with `.mp4`; its folder exists.
        fps: frames a second: those of the source, divided by `every_frame`.
        class_names: the name of every class index.

    Yields:
        What takes the frames in their order: pixels (H, W, 3) RGB and what was found in them.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    writer: _Writer | None = None

    def add(pixels: NDArray[np.uint8], result: PictureResult) -> None:
        nonlocal writer
        with _told(path):
            if writer is None:
                writer = _Writer(partial, (pixels.shape[0], pixels.shape[1]), fps, class_names)
            writer.add(pixels, result)

    try:
        yield add
        if writer is not None:
            with _told(path):
                writer.finish()
                os.replace(partial, path)
            writer = None
    finally:
        if writer is not None:
            writer.abandon()
        partial.unlink(missing_ok=True)


class _Writer:
    """An MP4 file that is being written."""

    def __init__(self, path: Path, hw: tuple[int, int], fps: float, class_names: Sequence[str]) -> None:
        self._class_names = class_names
        self._hw = hw
        self._strip = _strip_height(hw, class_names)
        height, width = (max(_LEAST_SIDE, side + side % 2) for side in (hw[0] + self._strip, hw[1]))
        self._container: OutputContainer = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        self._container.metadata["comment"] = DRAWN_MARK  # which tells it from the videos of the user
        stream: VideoStream
        if "libx264" in av.codecs_available:
            stream = self._container.add_stream("libx264", rate=_rate(fps))
            stream.options = {"crf": "20", "preset": "veryfast"}
        else:
            stream = self._container.add_stream("mpeg4", rate=_rate(fps))
            stream.bit_rate = max(1_000_000, round(0.2 * height * width * min(fps, 60)))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Told in the file, so that players do not have to guess by the size how colours were coded.
        context = stream.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        self._stream = stream

    def add(self, pixels: NDArray[np.uint8], result: PictureResult) -> None:
        if pixels.shape[:2] != self._hw:  # a stream may change its size on the way
            image = Image.fromarray(pixels).resize((self._hw[1], self._hw[0]))
            scale = np.array([self._hw[1] / pixels.shape[1], self._hw[0] / pixels.shape[0]] * 2)
        else:
            image, scale = Image.fromarray(pixels), np.ones(4)
        boxes = (result.boxes_xyxy * scale).astype(np.float32)
        found = sv.Detections(xyxy=boxes, confidence=result.scores, class_id=result.labels)
        drawn = draw_detections(image, found, self._class_names)
        # The colour of the strip fills what a shorter legend leaves free; a longer one is cut.
        framed = Image.new("RGB", (self._stream.width, self._stream.height), drawn.getpixel((0, drawn.height - 1)))
        framed.paste(drawn.crop((0, 0, drawn.width, min(drawn.height, self._hw[0] + self._strip))), (0, 0))
        frame = av.VideoFrame.from_image(framed).reformat(
            format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abandon(self) -> None:
        with suppress(OSError):  # a full disk, perhaps; the file is thrown away
            self._container.close()


def _strip_height(hw: tuple[int, int], class_names: Sequence[str]) -> int:
    """The height of the legend, if all classes are in a frame, each with up to three digits."""
    blank = np.zeros((*hw, 3), dtype=np.uint8)
    count = len(class_names)
    all_classes = sv.Detections(
        xyxy=np.zeros((count, 4), dtype=np.float32),
        confidence=np.ones(count, dtype=np.float32),
        class_id=np.arange(count),
    )
    longest = draw_detections(blank, all_classes, [f"{name} 00" for name in class_names]).height - hw[0]
    least = draw_detections(blank, sv.Detections.empty()).height - hw[0]
    return max(least, min(longest, hw[0] // 3))


def _rate(fps: float) -> Fraction:
    """Frames a second as the small fraction that is meant (30000/1001); MPEG-4 takes 16 bits for each part."""
    for denominator in (1001, 100, 1):
        rate = Fraction(fps).limit_denominator(denominator)
        if 0 < rate.numerator < 1 << 16:
            return rate
    return Fraction(1, 1001) if fps < 1 else Fraction(25)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # FFmpeg's errors are of that kind too
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; make room or choose another --output"
        ) from None
