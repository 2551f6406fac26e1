"""Files that appear whole or not at all, so that a run which is stopped leaves nothing half done."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crossdino.errors import InputError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def partial_path(path: Path) -> Path:
    """Where a file is written before it gets its name; the same each time, so that no run leaves several behind."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well and vanishes when it does not."""
    partial = partial_path(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, in a work that goes on where it was.

    Raises:
        InputError: it cannot be written, or the disk is full.
    """
    try:
        with written_whole(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise cannot_write(path, error) from None


def is_full(error: OSError) -> bool:
    """Whether there is no room where a file is written."""
    return error.errno in _NO_SPACE


def cannot_write(path: Path, error: OSError) -> InputError:
    """The mistake to raise where a file of a work that goes on by itself cannot be written."""
    remedy = "free some space" if is_full(error) else "mend that"
    if isinstance(error, FileNotFoundError):  # the temporary file, which has the same name in each run
        remedy = "if another run writes there, let it end"
    return InputError(
        f"cannot write {path}: {error.strerror or error}; {remedy} and run the same command again: it goes on from here"
    )
