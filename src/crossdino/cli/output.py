"""What the commands share: where they print, how they write files, on which device they compute."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdino.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console


def make_console(*, stderr: bool = False) -> Console:
    """The terminal, or the file that the output (or the error output) goes to."""
    from rich.console import Console

    console = Console(highlight=False, stderr=stderr)
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a file has no edge at which tables would have to be broken
    return console


def report_mistake(message: str) -> int:
    """Print a mistake of the user as one line on stderr; returns the exit status."""
    print(f"crossdino: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


@contextmanager
def log_lines(console: Console) -> Iterator[None]:
    """What the library logs meanwhile becomes lines of ours: information as it is, warnings on stderr."""
    logger = logging.getLogger("crossdino")
    handler = _Lines(console)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Lines(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record as one line."""
        line = " ".join(record.getMessage().split())
        if record.levelno >= logging.WARNING:
            print(f"crossdino: warning: {line}", file=sys.stderr)
        else:
            self._console.print(line, soft_wrap=True, markup=False)


def check_destinations(*paths: str | None) -> None:
    """Whether these files can be written, before anything takes time; None: not asked for."""
    for path in filter(None, paths):
        if not Path(path).absolute().parent.is_dir():
            raise InputError(f"cannot write {path}: no folder {Path(path).absolute().parent}")
        if Path(path).is_dir():
            raise InputError(f"cannot write {path}: it is a folder; name a file")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    from crossdino.writing import written_whole

    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content) + "\n")


def choose_device(name: str | None) -> str:
    """The device of `--device`, or the GPU where there is one."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError where it was built without the device
        raise InputError(f"cannot use --device {name}: {str(error).splitlines()[0]}") from None
    return name


def num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
