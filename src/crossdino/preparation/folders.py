"""The raw data's folder and the prepared one: what is refused, and how far an earlier run got."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crossdino.errors import InputError
from crossdino.writing import partial_path

FINISHED = "benchmark.json"
UNFINISHED = ".prepare.json"
FORMAT = 1
_NO_IMAGES = ("--images none", "--without-images")


def check_source(source: Path) -> None:
    """Refuse what is no folder.

    Raises:
        InputError: with the remedy.
    """
    if source.is_file():
        what = "an archive: unpack it and give the folder" if is_archive(source.name) else "a file: give the folder"
        raise InputError(f"{source} is {what}")
    if not source.is_dir():
        raise InputError(f"{source} does not exist; give the folder with the downloaded data")


def is_archive(name: str) -> bool:
    """Whether a file has to be unpacked first."""
    return name.lower().endswith((".zip", ".tar", ".gz", ".tgz", ".rar", ".7z"))


def entries(folder: Path) -> str:
    """What lies in a folder, in words, for messages."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    archives = [name for name in names if is_archive(name)]
    return f"It holds {listed or 'nothing'}" + (f"; unpack {archives[0]} first" if archives else "")


def check_output(output: Path, source: Path) -> None:
    """Keep what is written apart from the raw data.

    Raises:
        InputError: with the remedy.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; name a folder")
    if output.resolve().is_relative_to(source.resolve()):
        raise InputError(
            f"--output {output} lies in the raw data {source}, which stay as they are: name a folder elsewhere"
        )


def finished_splits(output: Path, mine: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What an earlier run noted of the splits that it finished in a folder.

    Args:
        output: the folder.
        mine: benchmark, source, and options as they are typed, that this run goes by.

    Raises:
        InputError: the folder holds other things, or the earlier run went by other options.
    """
    finished, unfinished = output / FINISHED, output / UNFINISHED
    note = finished if finished.is_file() else unfinished
    if not note.is_file():
        ours = (UNFINISHED, partial_path(unfinished).name)
        others = [path.name for path in output.iterdir() if path.name not in ours] if output.is_dir() else []
        if others:
            names = ", ".join(sorted(others)[:3])
            raise InputError(f"--output {output} holds other files ({names}): name a new or an empty folder")
        return {}
    try:
        before: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        if before["format"] != FORMAT:
            raise ValueError(f"format {before['format']}, this version writes {FORMAT}")
        was = {"benchmark": before["benchmark"], "source": before["source"], "--images": before["images"]}
        was |= {f"--{key.replace('_', '-')}": value for key, value in before["options"].items()}
        splits = dict(before["splits"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read {note} ({error}): delete {output} or name another --output") from None
    for key, value in mine.items():
        if was.get(key) != value:
            was_typed, now = f"{key} {typed(was.get(key))}", typed(value)
            if key == "--images":  # `none` is typed otherwise
                was_typed, now = was_typed.replace(*_NO_IMAGES), f"{key} {now}".replace(*_NO_IMAGES)
            raise InputError(
                f"{output} was prepared with {was_typed}, not {now}: name another --output, or delete {output}"
            )
    return splits


def make_folder(folder: Path) -> None:
    """Make a folder where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; name another --output") from None


def typed(value: object) -> str:
    """A value as it is typed."""
    return (",".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
