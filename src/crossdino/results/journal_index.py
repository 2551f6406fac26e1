"""Reading journals: what is done, and the pictures in any order, one after the other.

Only where each picture's line begins is kept in memory. Several journals (of runs on several machines) are read as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from crossdino.errors import InputError
from crossdino.results.journal import JOURNAL_FILE, FileStamp, JournalHeader, end_of_whole_lines
from crossdino.results.picture_result import PictureResult, read_head

# The key of an image among the frames of its source.
_NO_FRAME = -1


@dataclass(slots=True)
class _Entry:
    """What the journals say about one source, as its file was when it was read last.

    Attributes:
        stamp: of the file.
        time: of the last line that counts.
        frames: frame -> (journal, offset of the line, objects); an image is the frame -1.
        stem: what its files are called.
        ended: all frames are there.
        failure: why it could not be read, with the line's time.
    """

    stamp: FileStamp | None
    time: float
    frames: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    stem: str = ""
    ended: bool = False
    failure: tuple[float, str] | None = None


class JournalIndex:
    """One journal, or several of the same settings (of runs on several machines), for reading.

    They may be growing: what comes later is not seen.
    """

    def __init__(self, paths: Sequence[str | Path], header: JournalHeader | None = None) -> None:
        """Look through the journals.

        Args:
            paths: of the journals, at least one.
            header: how the run is meant to be continued; None: no matter.

        Raises:
            InputError: a file is no journal or is damaged, or was made with other settings than `header` or than the
                first.
        """
        assert paths, "there is at least one journal"
        self.paths = [Path(path) for path in paths]
        self._entries: dict[str, _Entry] = {}
        expected = header
        for number, path in enumerate(self.paths):
            try:
                with open(path, "rb") as file:
                    found = JournalHeader.read(file, path)
                    if found is None:
                        continue
                    if expected is not None:
                        expected.require_same(found, path)
                    expected = expected or found
                    self._scan(number, file, end_of_whole_lines(path))
            except OSError as error:
                raise InputError(f"cannot read {path}: {error.strerror}; choose another --output") from None
        if expected is None:
            raise InputError(f"{self.paths[0]} was only just begun; run crossdino predict again")
        self.header = expected

    # --- what is done ---

    def is_done(self, file_name: str, stamp: FileStamp | None) -> bool:
        """Whether nothing is left to do for a source: its image, or all frames of its video, have been looked at.

        Args:
            file_name: the source's name.
            stamp: its file as it is now; one that has changed is not done, and neither is a camera (None).
        """
        entry = self._current(file_name, stamp)
        return entry is not None and entry.failure is None and (entry.ended or _NO_FRAME in entry.frames)

    def frames_done(self, file_name: str, stamp: FileStamp | None) -> int:
        """How many frames of a video have been looked at; 0 if its file has changed since."""
        entry = self._current(file_name, stamp)
        return len(entry.frames) if entry is not None else 0

    def last_frame(self, file_name: str, stamp: FileStamp | None) -> int | None:
        """The last frame of a video that has been looked at; None without one."""
        entry = self._current(file_name, stamp)
        return max(entry.frames) if entry is not None and entry.frames else None

    @property
    def failures(self) -> dict[str, str]:
        """Name and message of the sources that could not be read."""
        return {name: entry.failure[1] for name, entry in self._entries.items() if entry.failure is not None}

    @property
    def file_names(self) -> list[str]:
        """The sources of which there is at least one picture, as they were met first."""
        return [name for name, entry in self._entries.items() if entry.frames]

    @property
    def stems(self) -> dict[str, str]:
        """What the files of a source are called, as far as known; for `output_stems`."""
        return {name: entry.stem for name, entry in self._entries.items() if entry.stem}

    def keys(self, file_names: Iterable[str] | None = None) -> Iterator[str]:
        """The keys of the pictures, in the order of `read`."""
        for name in self.file_names if file_names is None else file_names:
            for frame in sorted(self._frames(name)):
                yield name if frame == _NO_FRAME else f"{name}#{frame}"

    def count(self, file_names: Iterable[str] | None = None) -> tuple[int, int]:
        """The number of pictures and of objects of the given sources (None: of all)."""
        frames = [self._frames(name) for name in (self.file_names if file_names is None else file_names)]
        return sum(map(len, frames)), sum(num for found in frames for _, _, num in found.values())

    # --- the pictures ---

    def read(self, file_names: Iterable[str] | None = None) -> Iterator[PictureResult]:
        """The pictures, one in memory at a time.

        Args:
            file_names: the sources in the order that is wanted, the frames of each follow their number; names without
                a picture are passed over. None: all sources as they were met first.

        Raises:
            InputError: a journal is damaged.
        """
        with ExitStack() as stack:
            files: list[BinaryIO] = [stack.enter_context(open(path, "rb")) for path in self.paths]
            for name in self.file_names if file_names is None else file_names:
                for _, (number, offset, _) in sorted(self._frames(name).items()):
                    files[number].seek(offset)
                    try:
                        result = PictureResult.from_line(files[number].readline())
                    except (ValueError, KeyError, TypeError):
                        raise _damaged(self.paths[number], offset) from None
                    yield result

    def _frames(self, name: str) -> dict[int, tuple[int, int, int]]:
        return self._entries[name].frames if name in self._entries else {}

    def _current(self, name: str, stamp: FileStamp | None) -> _Entry | None:
        entry = self._entries.get(name)
        return entry if entry is not None and stamp is not None and entry.stamp == stamp else None

    def _scan(self, number: int, file: BinaryIO, end: int) -> None:
        offset, last_time = file.tell(), 0.0
        while offset < end:
            line = file.readline()
            try:
                head = read_head(line)
                # Within a journal the order of the lines counts, whatever the clock did.
                last_time = max(last_time, head["time"])
                self._take(head, number, offset, last_time)
            except (ValueError, KeyError, TypeError):
                raise _damaged(self.paths[number], offset) from None
            offset += len(line)

    def _take(self, head: dict[str, Any], number: int, offset: int, when: float) -> None:
        name: str = head.get("failed") or head.get("ended") or head["file_name"]
        stamp = None if head["stamp"] is None else FileStamp(*head["stamp"])
        entry = self._entries.get(name)
        if entry is None or entry.stamp != stamp:
            if entry is not None and when < entry.time:
                return  # of the file as it was before, in the journal of another process
            # What was found in the file before it changed no longer counts.
            entry = _Entry(stamp, when, stem=entry.stem if entry is not None else "")
            self._entries[name] = entry
        entry.time = max(entry.time, when)
        if "failed" in head:
            if not entry.ended and _NO_FRAME not in entry.frames:
                entry.failure = (when, str(head["message"]))
            return
        if entry.failure is not None and when >= entry.failure[0]:
            entry.failure = None
        if "ended" in head:
            entry.ended = True
            return
        frame = head.get("frame")
        entry.frames[_NO_FRAME if frame is None else frame] = (number, offset, head["num_objects"])
        entry.stem = head.get("stem", "") or entry.stem


def journal_path(folder: str | Path) -> Path:
    """Where a run keeps its journal."""
    return Path(folder) / JOURNAL_FILE


def _damaged(path: Path, offset: int) -> InputError:
    return InputError(
        f"{path} is damaged at byte {offset}; delete it or choose another --output, or begin anew by --overwrite"
    )
