"""The work of a prediction run in one process: sources in, events out; it reads, detects and draws at the same time."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from crossdino.checkpoints import load_model
from crossdino.data.images import ImageError
from crossdino.prediction_drawing import Drawer
from crossdino.predictor import Prediction, Predictor
from crossdino.results import FileStamp, PictureResult, TileStore, file_stamp
from crossdino.sources import Picture, ReadOptions, Source, open_all

Triple = tuple[Tensor, Tensor, Tensor]

# Folder in the output for what is found in pictures that are not finished.
UNFINISHED = "unfinished"
# Pictures that may wait to be drawn; each holds its pixels.
_DRAW_AHEAD = 4


@dataclass(frozen=True)
class Task:
    """A source that is to be looked at.

    Attributes:
        source: what to open.
        stem: what its pictures are called.
        first_frame: frames of a video before this one are done.
    """

    source: Source
    stem: str
    first_frame: int = 0


@dataclass(frozen=True)
class Found:
    """A picture is done, drawn and all."""

    result: PictureResult
    stamp: FileStamp | None


@dataclass(frozen=True)
class Failed:
    """A source cannot be read (any further)."""

    source: Source
    message: str
    stamp: FileStamp | None
    frame: int | None = None


@dataclass(frozen=True)
class Ended:
    """All frames of a video are done."""

    source: Source
    stamp: FileStamp | None


Event = Found | Failed | Ended


class Stopped(Exception):
    """The user wants the run to end here."""


@dataclass(frozen=True)
class WorkSettings:
    """All that a process needs to know to do its share; can be sent to another process.

    Attributes:
        weights: model folder.
        predictor: arguments of `Predictor`.
        reading: how sources are read.
        output: folder for pictures and for what is found in unfinished ones.
        draw: make annotated pictures and videos.
        most_frames: of a video or a camera, only frames with a lower number are looked at; None: all.
        devices: one for each process.
        num_threads: of torch, in each of several processes; 0: as they are.
    """

    weights: str
    predictor: Mapping[str, Any]
    reading: ReadOptions
    output: Path
    draw: bool = True
    most_frames: int | None = None
    devices: Sequence[str] = ("cpu",)
    num_threads: int = 0

    @property
    def dtype(self) -> str:
        """In what the network shall compute."""
        return str(self.predictor.get("dtype") or self.predictor.get("precision") or "float32")

    def make_predictor(self, device: str) -> Predictor:
        """The predictor of a process."""
        return Predictor(load_model(self.weights, device=device), **self.predictor)

    def make_planner(self) -> Predictor:
        """A predictor that names, cuts and merges where others compute: on the CPU, whatever they compute in."""
        plain = {"dtype": None, "precision": None, "compile": False}
        return dataclasses.replace(self, predictor={**self.predictor, **plain}).make_predictor("cpu")


# Is called with the name of a picture, how many of its tiles are done, and how many it has.
OnProgress = Callable[[str, int, int], None]


class StopEvent(Protocol):
    """What tells that the run shall end: a `threading.Event`, or one that processes share."""

    def is_set(self) -> bool:
        """Whether it shall."""
        ...


class _WatchedStore(TileStore):
    """Tells between two tiles how far a picture is and what else is done, and lets a run end there."""

    def __init__(self, folder: Path, stop: StopEvent, tell: Callable[[], None], on_progress: OnProgress | None) -> None:
        super().__init__(folder)
        self._stop = stop
        self._tell = tell
        self._on_progress = on_progress
        self._done: Counter[str] = Counter()

    def load(self, picture: Picture, num_tiles: int) -> dict[int, Triple]:
        found = super().load(picture, num_tiles)
        self._done[picture.source.name] = len(found)
        return found

    def save(self, picture: Picture, num_tiles: int, number: int, found: Triple) -> None:
        super().save(picture, num_tiles, number, found)
        self._done[picture.source.name] += 1
        if self._on_progress is not None and num_tiles >= self.least_tiles:
            self._on_progress(picture.source.name, self._done[picture.source.name], num_tiles)
        self._tell()
        if self._stop.is_set():
            raise Stopped

    def forget(self, picture: Picture) -> None:
        super().forget(picture)
        self._done.pop(picture.source.name, None)


def work_here(
    tasks: Iterable[Task],
    predictor: Predictor,
    settings: WorkSettings,
    stop: StopEvent,
    on_event: Callable[[Event], None],
    on_progress: OnProgress | None = None,
) -> None:
    """Do tasks in this process; pictures are drawn in a thread beside the network.

    Args:
        tasks: what to do; the next ones are asked for ahead of their turn.
        predictor: the model.
        settings: the rest.
        stop: is looked at after every tile and picture.
        on_event: is told what happened, in the order of the tasks, as soon as it has; between the tiles of a picture
            as well. A picture counts as done once this returns.
        on_progress: is called after every tile of large pictures.

    Raises:
        Stopped: `stop` was set; everything that was done has been told.
    """
    begun: dict[str, tuple[Task, FileStamp | None]] = {}  # and not ended, in their order
    waiting: deque[tuple[Picture | None, Future[Event]]] = deque()
    drawer = Drawer(settings.output, predictor.class_names.tolist(), settings.reading, settings.draw)

    def started() -> Iterator[tuple[Source, int]]:
        for task in tasks:
            # Before anything is read: a file that changes meanwhile shall be seen to have changed.
            begun[task.source.name] = task, stamp_of(task.source)
            yield task.source, task.first_frame

    def finish(prediction: Prediction, task: Task, stamp: FileStamp | None) -> Event:
        try:
            if prediction.error is None:
                return Found(drawer.finish(prediction, task.stem, task.first_frame), stamp)
            error = prediction.error
        except ImageError as broken:  # it could be read before
            error = broken
        drawer.end(task.source, task.stem, task.first_frame)
        return Failed(task.source, str(error), stamp, prediction.picture.frame)

    def end(task: Task, stamp: FileStamp | None) -> Event:
        drawer.end(task.source, task.stem, task.first_frame)
        return Ended(task.source, stamp)

    def end_before(name: str | None) -> None:
        """The videos that were begun before that source have no more frames."""
        for earlier in list(begun):
            if earlier == name:
                return
            waiting.append((None, pool.submit(end, *begun.pop(earlier))))

    def tell(most: int) -> None:
        """Tell what is done; wait where more than `most` are not."""
        while waiting and (len(waiting) > most or waiting[0][1].done()):
            picture, event = waiting.popleft()
            on_event(event.result())
            if picture is not None:
                store.forget(picture)
                picture.close()

    store = _WatchedStore(settings.output / UNFINISHED, stop, lambda: tell(_DRAW_AHEAD), on_progress)
    if stop.is_set():
        raise Stopped
    with ThreadPoolExecutor(1, thread_name_prefix="drawing") as pool, ExitStack() as stack:
        stack.callback(store.close)
        stack.callback(lambda: pool.submit(drawer.close).result())
        stack.callback(lambda: [event.cancel() for _, event in waiting])
        pictures = open_all(started(), settings.reading, settings.most_frames)
        stream = predictor.stream(pictures, on_error="yield", memory=store)
        stack.callback(stream.close)
        try:
            for prediction in stream:
                source = prediction.picture.source
                end_before(source.name)
                waiting.append((prediction.picture, pool.submit(finish, prediction, *begun[source.name])))
                if source.kind == "image" or prediction.error is not None:
                    del begun[source.name]
                tell(_DRAW_AHEAD)
                if stop.is_set():
                    raise Stopped
        except Stopped:
            tell(0)
            raise
        end_before(None)
        tell(0)


def stamp_of(source: Source) -> FileStamp | None:
    """What tells one state of a source from another; what a camera shows today is not what it showed yesterday."""
    return FileStamp(0, time.time_ns()) if source.kind == "camera" else file_stamp(source.path)
