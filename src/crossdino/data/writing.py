"""Files that appear whole or not at all, so that a run which is stopped leaves nothing half done."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from crossdino.errors import InputError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def partial_path(path: Path) -> Path:
    """Where a file is written before it gets its name; the same each time, so that no run leaves several behind."""
    return path.with_name(f".{path.name}.partial")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        InputError: it cannot be written, or the disk is full.
    """
    partial = partial_path(path)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        partial.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> InputError:
    """The mistake to raise where a file of a work that goes on by itself cannot be written."""
    remedy = "free some space" if error.errno in _NO_SPACE else "mend that"
    return InputError(
        f"cannot write {path}: {error.strerror or error}; {remedy} and run the same command again: it goes on from here"
    )
