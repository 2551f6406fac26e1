"""The work of a prediction run in several processes, with a model each, on a device of their own.

They get the sources in small shares, so that a large image holds nobody up, and send what they find to the process that
started them, which alone writes the journal. When one of them dies, what it had not done is given to a new one, each
source alone, so that it becomes clear if one of them ends every process.
"""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import signal
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import torch

from crossdino.allocator import tune_allocator
from crossdino.errors import InputError
from crossdino.prediction_work import (
    Event,
    Failed,
    Found,
    OnProgress,
    StopEvent,
    Stopped,
    Task,
    WorkSettings,
    stamp_of,
    work_here,
)

_logger = logging.getLogger(__name__)

# A source that has ended so many processes, being the only one that they had, is left out.
_MOST_DEATHS = 2
# Of many sources a process gets so many batches at once: between two shares it neither reads ahead nor draws.
_MOST_BATCHES = 16


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
        # (For type checkers: on Windows it is a class of the same methods.)
        here, there = cast("tuple[Connection, Connection]", context.Pipe())
        process = context.Process(target=_process, args=(there, settings, device, stop_there), daemon=True)
        with _signals_held_back():
            process.start()
        there.close()  # so that the pipe breaks when the process dies
        workers.append(_Worker(device, process, here))

    batch_size = settings.predictor.get("batch_size", 1)
    most = _MOST_BATCHES * (1 if batch_size == "auto" else batch_size)
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
                    worker.ready = worker.ready or message.notice is None
                    worker.idle = worker.idle or message.idle
                    if message.notice is not None:
                        _logger.log(*message.notice)
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
            yield Failed(source, message, stamp_of(source))
    suspects.update(task.source.name for task in left)
    pending.extendleft(reversed(left))


@dataclass(frozen=True)
class _Sign:
    """A process lives: it has loaded its model, or is so far within a picture.

    `idle`: it wants something to do; `notice`: level and text of a line of its log.
    """

    progress: tuple[str, int, int] | None = None
    idle: bool = False
    notice: tuple[int, str] | None = None


class _Told(logging.Handler):
    """Sends the lines of the log to the process that the user sees."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(logging.INFO)
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        """Send a line."""
        with suppress(OSError):  # the first process is gone
            self._connection.send(_Sign(notice=(record.levelno, record.getMessage())))


@dataclass(frozen=True)
class _LastWord:
    """A process has done all that it was given, or has to give up."""

    error: Exception | None = None


def _process(connection: Connection, settings: WorkSettings, device: str, stop: Any) -> None:
    """What a process does: tasks come and events go by its pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it could not be held back
    tune_allocator()
    logger = logging.getLogger("crossdino")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Told(connection))
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
