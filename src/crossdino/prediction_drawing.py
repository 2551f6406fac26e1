"""The annotated pictures and videos of a run, drawn beside the network, in the order in which it looks at them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from crossdino.errors import InputError
from crossdino.predictor import Prediction
from crossdino.results import (
    JournalIndex,
    PictureResult,
    annotated_video,
    draw_picture,
    journal_path,
    write_picture,
)
from crossdino.results.video import AddFrame
from crossdino.sources import ReadOptions, Source, open_pictures, read_video_info
from crossdino.tiling import Tile

# What a camera's video is played at; a camera does not say how fast it will be looked at.
_CAMERA_FPS = 25.0


def drawn_name(source: Source, stem: str) -> str:
    """The file name of a source's annotated picture or video."""
    return f"{stem}.jpg" if source.kind == "image" else f"{stem}.mp4"


class Drawer:
    """Turns predictions into results, and draws them. To be used by one thread."""

    def __init__(self, output: Path, class_names: Sequence[str], reading: ReadOptions, draw: bool) -> None:
        """Remember where to.

        Args:
            output: folder of the run; made with the first picture.
            class_names: the name of every class index.
            reading: how the sources are read.
            draw: False to make results only.
        """
        self._output = output
        self._class_names = class_names
        self._reading = reading
        self._draw = draw
        self._video: Source | None = None
        self._add_frame: AddFrame | None = None
        self._closing = ExitStack()

    def finish(self, prediction: Prediction, stem: str, first_frame: int = 0) -> PictureResult:
        """The result of a picture, which is drawn and written.

        Args:
            prediction: of a picture that could be read.
            stem: what the source's files are called.
            first_frame: frames of its video before this one are in the journal and are drawn again.

        Raises:
            InputError: the picture cannot be read again, or not written.
        """
        picture = prediction.picture
        name = drawn_name(picture.source, stem) if self._draw else None
        result = PictureResult.from_detections(
            picture, prediction.detections, drawn_as=name, stem=stem, capped=prediction.capped
        )
        if name is None:
            return result
        path = self._output / name
        if picture.source.kind == "image":
            drawn = draw_picture(picture, result, self._class_names)
            try:
                self._output.mkdir(parents=True, exist_ok=True)
                write_picture(path, drawn)
            except OSError as error:
                raise InputError(
                    f"cannot write {path}: {error.strerror or error}; make room and run the same command again: it "
                    "continues where it was"
                ) from None
            return result
        if self._video != picture.source:
            self._begin(picture.source, path, first_frame)
        assert self._add_frame is not None
        self._add_frame(picture.read(Tile(0, 0, *picture.hw)), result)
        return result

    def end(self, source: Source, stem: str, first_frame: int = 0) -> None:
        """Finish what is drawn of a source that has no more pictures.

        Args:
            source: a video is drawn here if all of its frames had been found before.
            stem: see `finish`.
            first_frame: likewise.
        """
        if self._draw and source.kind == "video" and first_frame > 0 and self._video != source:
            self._begin(source, self._output / drawn_name(source, stem), first_frame)
        self.close()

    def close(self) -> None:
        """Finish the video that is being drawn, if there is one, as far as it goes."""
        self._closing.close()
        self._video = self._add_frame = None

    def _begin(self, source: Source, path: Path, first_frame: int) -> None:
        """Begin a video with the frames that an earlier part of the run has found."""
        self.close()
        self._output.mkdir(parents=True, exist_ok=True)
        fps = _CAMERA_FPS if source.kind == "camera" else read_video_info(source).fps
        self._video = source
        self._add_frame = self._closing.enter_context(
            annotated_video(path, fps / self._reading.every_frame, self._class_names)
        )
        if first_frame == 0 or source.kind == "camera":
            return
        known = JournalIndex([journal_path(self._output)]).read([source.name])
        for result, picture in zip(known, open_pictures(source, self._reading), strict=False):
            if picture.frame is None or picture.frame >= first_frame:
                break
            self._add_frame(picture.read(Tile(0, 0, *picture.hw)), result)
