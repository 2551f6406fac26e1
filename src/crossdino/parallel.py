"""One function over many tasks in several processes, for work that Python's lock would make wait."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import wait as wait_for_any
from multiprocessing.synchronize import Event
from types import FrameType
from typing import TypeVar

from crossdino.errors import InputError

_MOST_PROCESSES = 16

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")


def in_processes(
    function: Callable[[_Task], _Result],
    tasks: Sequence[_Task],
    num_processes: int,
    *,
    chunk: int = 1,
    option: str = "--workers",
) -> Iterator[tuple[int, _Result]]:
    """Do every task; Ctrl-C ends it as soon as what has been begun is finished (or has asked `nobody_waits`).

    Args:
        function: of a module, so that other processes find it.
        tasks: its arguments, each of which other processes must be able to receive.
        num_processes: of tasks that are done at the same time; 1 does them here.
        chunk: tasks that a process gets at once: many small ones cost less that way.
        option: with which the user sets the number of processes, for the message.

    Yields:
        Position and result of each task, in the order in which they are finished.

    Raises:
        InputError: a process has ended, mostly for want of memory. What the function raises is raised here.
    """
    chunk = max(chunk, 1)
    chunks = [(start, tasks[start : start + chunk]) for start in range(0, len(tasks), chunk)]
    num_processes = min(num_processes, len(chunks), _MOST_PROCESSES)
    if num_processes < 2:
        yield from ((position, function(task)) for position, task in enumerate(tasks))
        return
    # Not by fork, which copies locks that threads of this process may hold.
    context = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
    context.set_forkserver_preload([function.__module__])  # imported once instead of by each process
    given_up = context.Event()
    with ProcessPoolExecutor(num_processes, context, _follow_the_parent, (given_up,)) as pool:
        remaining = iter(chunks)
        running: dict[Future[list[_Result]], int] = {}
        try:
            with _interrupts_held_back():
                if context.get_start_method() == "forkserver":
                    _start_forkserver()
                for start, part in islice(remaining, num_processes):
                    running[pool.submit(_do, function, part)] = start
            while True:
                for start, part in islice(remaining, 2 * num_processes - len(running)):
                    running[pool.submit(_do, function, part)] = start
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield from enumerate(future.result(), start=running.pop(future))
        except BrokenProcessPool:
            raise InputError(
                "one of several processes has ended (often for want of memory, or since a script calls this outside of "
                f"`if __name__ == '__main__':`): run the same again with {option} 1"
            ) from None
        finally:
            given_up.set()
            pool.shutdown(wait=True, cancel_futures=True)


def nobody_waits() -> bool:
    """In the middle of a long task: whether its result is not wanted any more, so that it may end at once."""
    return _given_up is not None and _given_up.is_set()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let Ctrl-C wait while processes are started: half started ones would be forgotten, and complain."""
    # Python allows handlers in the main thread, and cannot put back one that is not of Python.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held and callable(before):
        before(*held[0])


def _start_forkserver() -> None:
    """Start it with Ctrl-C blocked, which it and its children inherit: it reaches them too, also as they import."""
    from multiprocessing import forkserver, resource_tracker  # not on Windows

    resource_tracker.ensure_running()  # it unblocks the signal after its own start
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _do(function: Callable[[_Task], _Result], tasks: Sequence[_Task]) -> list[_Result]:
    return [function(task) for task in tasks]


_given_up: Event | None = None
"""Of a process that works for another one: set when that one has been interrupted."""


def _follow_the_parent(given_up: Event) -> None:
    """Leave Ctrl-C, which reaches all processes of a terminal, to the parent; end when the parent was killed."""
    global _given_up
    _given_up = given_up
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent.sentinel,), daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait_for_any([sentinel])
    os._exit(1)
