"""The work of a prediction run: sources in, events out, in this process or in several.

One process reads, detects and draws; each of these runs beside the others. Several processes have a model each, on a
device of their own, and get the sources in small shares, so that a large image holds nobody up. They send what they
find to the process that started them, which alone writes the journal. When one of them dies, what it had not done is
given to a new one, each source alone, so that it becomes clear if one of them ends every process.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import signal
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from crossdino.checkpoints import load_model
from crossdino.data.images import ImageError
from crossdino.errors import InputError
from crossdino.prediction_drawing import Drawer
from crossdino.predictor import Prediction, Predictor
from crossdino.results import FileStamp, PictureResult, TileStore, file_stamp
from crossdino.sources import Picture, ReadOptions, Source, open_all

Triple = tuple[Tensor, Tensor, Tensor]

# Folder in the output for what is found in pictures that are not finished.
UNFINISHED = "unfinished"
# Pictures that may wait to be drawn; each holds its pixels.
_DRAW_AHEAD = 4
# A source that has ended so many processes, being the only one that they had, is left out.
_MOST_DEATHS = 2
# Of many sources a process gets so many batches at once: between two shares it neither reads ahead nor draws.
_MOST_BATCHES = 16


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

    def make_predictor(self, device: str) -> Predictor:
        """The predictor of a process."""
        return Predictor(load_model(self.weights, device=device), **self.predictor)


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
            begun[task.source.name] = task, _stamp(task.source)
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


def _stamp(source: Source) -> FileStamp | None:
    """What tells one state of a source from another; what a camera shows today is not what it showed yesterday."""
    return FileStamp(0, time.time_ns()) if source.kind == "camera" else file_stamp(source.path)


@dataclass
class _Worker:
    """A process, and what it has been given and not done."""

    device: str
    process: BaseProcess
    connection: Connection
    tasks: dict[str, Task] = field(default_factory=dict)
    ready: bool = False
    idle: bool = False


def work_in_processes(
    tasks: Iterable[Task], settings: WorkSettings, stop: StopEvent, on_progress: OnProgress | None = None
) -> Iterator[Event]:
    """Do tasks in several processes, one for each of `settings.devices`.

    Args:
        tasks: what to do.
        settings: the rest.
        stop: ends the run early.
        on_progress: is called from time to time for large pictures.

    Yields:
        What happened, in no order but that of the frames of a video. A picture counts as done once the next event is
        asked for.

    Raises:
        Stopped: `stop` was set; everything that was done has been yielded.
        InputError: the model cannot be loaded, or a process does not even start.
    """
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads or a GPU does not work
    stop_there = context.Event()
    pending = deque(tasks)
    suspects: set[str] = set()  # which a process had when it died
    deaths: Counter[str] = Counter()
    workers: list[_Worker] = []

    def start(device: str) -> None:
        here, there = context.Pipe()
        process = context.Process(target=_process, args=(there, settings, device, stop_there), daemon=True)
        with _signals_held_back():
            process.start()
        there.close()  # so that the pipe breaks when the process dies
        workers.append(_Worker(device, process, here))

    most = _MOST_BATCHES * settings.predictor.get("batch_size", 1)
    try:
        for device in settings.devices[: max(1, len(pending))]:
            start(device)
        while workers:
            if stop.is_set():
                stop_there.set()
                pending.clear()
            busy = bool(pending) or any(worker.tasks for worker in workers)
            for worker in workers:
                if worker.idle and (pending or not busy):
                    _send(worker, _share(pending, suspects, most, len(settings.devices)))
            # The handler of a signal runs between two waits.
            for connection in wait([worker.connection for worker in workers], timeout=0.5):
                worker = next(worker for worker in workers if worker.connection is connection)
                try:
                    message = worker.connection.recv()
                except (EOFError, OSError):
                    workers.remove(worker)
                    worker.process.join()
                    yield from _mourn(worker, pending, suspects, deaths)
                    if pending and not stop.is_set():
                        start(worker.device)
                    continue
                if isinstance(message, _LastWord):
                    workers.remove(worker)
                    worker.process.join()
                    if message.error is not None:
                        raise message.error
                elif isinstance(message, _Sign):
                    worker.ready = True
                    worker.idle = worker.idle or message.idle
                    if message.progress is not None and on_progress is not None:
                        on_progress(*message.progress)
                else:
                    yield message
                    _tick_off(worker, message)
        if stop.is_set():
            raise Stopped
    finally:
        for worker in workers:
            worker.process.kill()
            worker.connection.close()
        for worker in workers:
            worker.process.join()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process that is started meanwhile never gets Ctrl-C or SIGTERM, which go to a whole group of processes.

    The one that the user started decides what becomes of the others; here the signals come after the block.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _share(pending: deque[Task], suspects: set[str], most: int, num_workers: int) -> list[Task]:
    """What a process gets next: the less, the less there is, and a suspect alone. Nothing: the end."""
    share: list[Task] = []
    wanted = min(most, len(pending) // (2 * num_workers))
    while pending and len(share) < max(1, wanted):
        if pending[0].source.name in suspects:
            return share or [pending.popleft()]
        share.append(pending.popleft())
    return share


def _send(worker: _Worker, share: list[Task]) -> None:
    worker.idle = False
    worker.tasks = {task.source.name: task for task in share}
    with suppress(OSError):  # it is dead, which its pipe will tell next
        worker.connection.send(share)


def _tick_off(worker: _Worker, event: Event) -> None:
    """Note what a process has done."""
    name = event.result.file_name if isinstance(event, Found) else event.source.name
    frame = event.result.frame if isinstance(event, Found) else None
    if frame is None:
        worker.tasks.pop(name, None)
    else:
        worker.tasks[name] = dataclasses.replace(worker.tasks[name], first_frame=frame + 1)


def _mourn(worker: _Worker, pending: deque[Task], suspects: set[str], deaths: Counter[str]) -> Iterator[Failed]:
    """Put back what a dead process had, but for a source that has ended several."""
    code = worker.process.exitcode or 0
    how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
    if not worker.ready:
        raise InputError(f"the process on {worker.device} {how} before it had loaded the model; is the memory full?")
    left = list(worker.tasks.values())
    if len(left) == 1:  # of several nobody knows which it was: a later one may have been read ahead
        source = left[0].source
        deaths[source.name] += 1
        if deaths[source.name] >= _MOST_DEATHS:
            left = []
            num = deaths[source.name]
            message = f"{source.name}: {num} processes that looked at it died, the last one {how}; is the memory full?"
            yield Failed(source, message, _stamp(source))
    suspects.update(task.source.name for task in left)
    pending.extendleft(reversed(left))


@dataclass(frozen=True)
class _Sign:
    """A process lives: it has loaded its model, or is so far within a picture. `idle`: it wants something to do."""

    progress: tuple[str, int, int] | None = None
    idle: bool = False


@dataclass(frozen=True)
class _LastWord:
    """A process has done all that it was given, or has to give up."""

    error: Exception | None = None


def _process(connection: Connection, settings: WorkSettings, device: str, stop: Any) -> None:
    """What a process does: tasks come and events go by its pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it could not be held back
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    try:
        predictor = settings.make_predictor(device)
        last_sign = time.monotonic()

        def tell(name: str, done: int, total: int) -> None:
            nonlocal last_sign
            if time.monotonic() - last_sign > 0.5:
                last_sign = time.monotonic()
                connection.send(_Sign((name, done, total)))

        connection.send(_Sign(idle=True))
        while share := connection.recv():
            work_here(share, predictor, settings, stop, connection.send, tell)
            connection.send(_Sign(idle=True))
        connection.send(_LastWord())
    except Stopped:
        connection.send(_LastWord())
    except (BrokenPipeError, ConnectionResetError, EOFError):
        pass  # the first process is gone: nobody wants the rest
    except InputError as error:
        connection.send(_LastWord(InputError(str(error))))
    except Exception:
        connection.send(_LastWord(RuntimeError(f"in the process on {device}:\n{traceback.format_exc()}")))
