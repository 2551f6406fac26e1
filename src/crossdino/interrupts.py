"""Ctrl-C and SIGTERM as a request, so that what is at work can be finished and saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requests(notice: str = "") -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that what is at work can be saved; a second one ends at once.

    Args:
        notice: is written to stderr when the first one comes.

    Yields:
        The event.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, _: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        if notice:
            # Not through sys.stderr, which may be at work just now; on a terminal below ^C or a progress bar.
            os.write(2, f"{os.linesep if os.isatty(2) else ''}{notice}{os.linesep}".encode())

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
