"""The journal of a prediction run: what was found, line by line, as it was found.

`predictions.jsonl` begins with a line about the run (settings, classes), followed by one line a picture, a failure or
the end of a video. Lines are only ever added; the last one about a picture counts. Every other file that a run writes
is made of the journal and can be made again. A process that is killed loses at most the line that it was writing: the
rest of such a line is cut off when the run is continued.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from crossdino.checkpoints import package_version
from crossdino.errors import InputError
from crossdino.results.picture_result import PictureResult
from crossdino.sources import RUN_FILE

try:
    import fcntl
except ImportError:  # Windows: two runs into one folder are not told apart there
    fcntl = None

JOURNAL_FILE = RUN_FILE
FORMAT = "crossdino-predictions"
FORMAT_VERSION = 1
# How every journal begins, whatever its version.
_BEGINNING = b'{"format":"crossdino-predictions",'

# Every line reaches the operating system at once (and so survives the death of the process); the disk, which survives
# the loss of power, so often.
_SYNC_SECONDS = 5.0


class FileStamp(NamedTuple):
    """What tells that a file has changed: its size in bytes and its time of modification."""

    size: int
    mtime_ns: int


def file_stamp(path: str | Path) -> FileStamp | None:
    """The stamp of a file as it is now; None where there is none (a camera, a file that is gone)."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return FileStamp(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class JournalHeader:
    """What holds for all pictures of a run.

    Attributes:
        settings: everything that changes the detections, as plain values; a run is continued only with the same.
        class_names: the name of every class index.
        category_ids: the data set's own id of every class index.
        crossdino_version: that began the run.
    """

    settings: Mapping[str, Any]
    class_names: Sequence[str]
    category_ids: Sequence[int]
    crossdino_version: str = ""

    def __post_init__(self) -> None:
        # As they come back from a file: lists for tuples, strings for keys.
        object.__setattr__(self, "settings", json.loads(json.dumps(dict(self.settings))))
        object.__setattr__(self, "class_names", tuple(str(name) for name in self.class_names))
        object.__setattr__(self, "category_ids", tuple(int(category_id) for category_id in self.category_ids))
        object.__setattr__(self, "crossdino_version", self.crossdino_version or package_version())
        assert len(self.class_names) == len(self.category_ids)

    def to_line(self) -> bytes:
        """The journal's first line."""
        stored = {"format": FORMAT, "format_version": FORMAT_VERSION, **vars(self)}
        return json.dumps(stored, separators=(",", ":")).encode("ascii") + b"\n"

    @classmethod
    def read(cls, file: IO[bytes], path: Path) -> JournalHeader | None:
        """The header of a journal.

        Args:
            file: the journal; read up to the end of the header.
            path: for messages.

        Returns:
            None if the journal was only just begun: its process died before the first line was whole.

        Raises:
            InputError: the file is no journal, or one of a newer crossdino.
        """
        line = file.readline()
        if not line.endswith(b"\n") and line.startswith(_BEGINNING[: len(line)]):
            return None
        try:
            stored = json.loads(line)
            if stored["format"] != FORMAT:
                raise ValueError("another format")
            made_by = stored["crossdino_version"]
            if stored["format_version"] <= FORMAT_VERSION:
                return cls(stored["settings"], stored["class_names"], stored["category_ids"], made_by)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is no journal of crossdino predict; choose another --output") from None
        raise InputError(
            f"{path} was made by a newer crossdino ({made_by}): upgrade crossdino, or choose another --output"
        )

    def require_same(self, before: JournalHeader, path: Path) -> None:
        """Refuse to continue a run that was begun differently.

        Args:
            before: what the journal says.
            path: the journal.

        Raises:
            InputError: naming what differs.
        """
        old, new = _flat(before.settings), _flat(self.settings)
        changes = [
            f"{name} {_shown(old, name)} -> {_shown(new, name)}"
            for name in [*old, *(name for name in new if name not in old)]
            if name not in old or name not in new or old[name] != new[name]
        ]
        for what in ("class_names", "category_ids"):
            if getattr(before, what) != getattr(self, what):
                changes.append(f"{what} {list(getattr(before, what))} -> {list(getattr(self, what))}")
        if changes:
            raise InputError(
                f"cannot continue {path}, it was made with other settings ({', '.join(changes)}); give the old ones, "
                "choose another --output, or begin anew by --overwrite"
            )


class Journal:
    """A journal that is written; begun where there is none, continued where there is one."""

    def __init__(self, path: str | Path, header: JournalHeader, *, overwrite: bool = False) -> None:
        """Open the journal for adding lines.

        Args:
            path: usually `predictions.jsonl` in the output folder, which is made.
            header: what holds for the run.
            overwrite: begin anew.

        Raises:
            InputError: another process is writing it, it was made with other settings, is no journal, or cannot be
                written.
        """
        self.path = Path(path)
        self.header = header
        self._end = 0
        self._synced = time.monotonic()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
            self._file = os.fdopen(os.open(self.path, flags, 0o666), "r+b", 0)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}; choose another --output") from None
        try:
            self._lock()
            before = None if overwrite else JournalHeader.read(self._file, self.path)
            if before is None:
                self._begin()
            else:
                header.require_same(before, self.path)
                self._cut(end_of_whole_lines(self.path))
        except BaseException:
            self._file.close()
            raise

    def add(self, result: PictureResult, stamp: FileStamp | None = None) -> None:
        """Keep the detections of a picture.

        Args:
            result: what was found.
            stamp: of the source's file, taken *before* it was read; None for a camera.

        Raises:
            InputError: the disk is full or gone.
        """
        self._append(result.to_line(_stamped(stamp)))

    def add_failure(
        self, file_name: str, message: str, stamp: FileStamp | None = None, *, frame: int | None = None
    ) -> None:
        """Keep that a source could not be read; the next run tries it again.

        Args:
            file_name: the source's name.
            message: what to tell the user.
            stamp: of the file.
            frame: the frame of a video that it broke off at.
        """
        self._append_record({"failed": file_name, "frame": frame, "message": message, **_stamped(stamp)})

    def add_end(self, file_name: str, stamp: FileStamp | None = None) -> None:
        """Keep that all frames of a video are done."""
        self._append_record({"ended": file_name, **_stamped(stamp)})

    def sync(self) -> None:
        """Make sure that all lines are on the disk."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Put everything onto the disk and close the file."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self) -> None:
        self._cut(0)
        self._append(self.header.to_line())
        self.sync()

    def _cut(self, end: int) -> None:
        """Drop what lies behind `end`, as what a killed process left of its last line."""
        self._end = end
        self._file.truncate(end)
        self._file.seek(end)

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.path} is being written by another process; wait for it, or choose another --output"
            ) from None
        except OSError:
            pass  # some network file systems know no locks; without them all works as well

    def _append_record(self, record: Mapping[str, Any]) -> None:
        self._append(json.dumps(record, separators=(",", ":")).encode("ascii") + b"\n")

    def _append(self, line: bytes) -> None:
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self.sync()
        except OSError as error:
            # Half a line in the middle would spoil the journal for what follows.
            self._cut(self._end)
            raise InputError(
                f"cannot write {self.path}: {error.strerror}; make room and run the same command again: it continues "
                "where it was"
            ) from None
        self._end += len(line)


def is_bare(path: Path) -> bool:
    """Whether a file is a journal of ours that says nothing yet: a run that was begun and found nothing."""
    with open(path, "rb") as file:
        return file.readline().startswith(_BEGINNING) and not file.read(1)


def end_of_whole_lines(path: Path) -> int:
    """The number of bytes of a journal up to the end of its last line that is whole.

    A line is whole that ends with a line break and is a JSON object; after a loss of power a file may hold zeros.
    """
    with open(path, "rb") as file:
        end = _last_break(file, file.seek(0, os.SEEK_END))
        while end:
            start = _last_break(file, end - 1)
            file.seek(start)
            try:
                if isinstance(json.loads(file.read(end - start)), dict):
                    break
            except ValueError:
                pass
            end = start
    return end


def _last_break(file: IO[bytes], end: int) -> int:
    """Where the last line break before `end` ends; 0 without one."""
    while end > 0:
        start = max(0, end - (1 << 16))
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _stamped(stamp: FileStamp | None) -> dict[str, Any]:
    # The time orders the lines of several journals.
    return {"stamp": None if stamp is None else list(stamp), "time": round(time.time(), 3)}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return str(settings[name]) if name in settings else "(none)"
