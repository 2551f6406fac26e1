"""Looking at every image file of a data set before the first step, in parallel, and remembering what was found.

By their headers alone, missing and swapped files are found; broken and truncated ones only by decoding them. What was
decoded is remembered by the files' content (a hash of all their bytes), in a folder of the user, so that the next start
reads the files but decodes nothing, wherever they lie by then. Only images that could be decoded are remembered: the
reason for a failure may be gone the next time. The memory is a convenience: without a folder that can be written, or
with one that is damaged, everything is simply decoded again.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import PIL

from crossdino.data.images import BROKEN, MISSING, ImageError, read_sizes

Check = Literal["full", "headers"]
Progress = Callable[[int, int], None]

# The first line of every file of the memory. Another Pillow may refuse what this one decodes, so its version is in it.
HEADER = f"crossdino images 1, pillow {PIL.__version__}".encode()
# About 30 MB of text; beyond that the oldest entries are forgotten.
MAX_ENTRIES = 500_000
MAX_FILES = 16

Sizes = tuple[int, int, int, int]


@dataclass(frozen=True)
class ImageFacts:
    """What an image file is.

    Attributes:
        shown_wh: width and height in pixels with the EXIF orientation applied.
        stored_wh: as stored.
        what: the kind of problem that makes the file unusable; empty: none, it can be used.
        detail: more about that.
        digest: hash of the file's bytes (full check only): equal for copies of a file.
    """

    shown_wh: tuple[int, int] = (0, 0)
    stored_wh: tuple[int, int] = (0, 0)
    what: str = ""
    detail: str = ""
    digest: str = ""


def check_images(
    paths: Sequence[Path], check: Check = "headers", on_progress: Progress | None = None
) -> list[ImageFacts]:
    """Look at image files; those that cannot be used are told, not raised.

    Args:
        paths: image files.
        check: `headers` reads only the headers, `full` decodes what has not been decoded before.
        on_progress: called as `on_progress(done, total)` after each file, in the calling thread.

    Returns:
        The facts of each file, in the same order.
    """
    memory = _Memory(_cache_folder()) if check == "full" else None
    facts: list[ImageFacts] = []
    # Threads: Pillow decodes, and hashlib hashes, without Python's lock. Few of them when images are decoded, because
    # each holds one in memory; more for headers, for the sake of network drives.
    pool = ThreadPoolExecutor(16 if memory is None else min(16, max(4, os.cpu_count() or 1)))
    try:
        for done, fact in enumerate(pool.map(lambda path: _examine(path, memory), paths), start=1):
            facts.append(fact)
            if on_progress is not None:
                on_progress(done, len(paths))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        if memory is not None:  # also when the user stops a long check: it goes on from there
            memory.add(facts)
    return facts


def hash_file(path: Path) -> str:
    """A hash of all bytes of a file, as 32 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _examine(path: Path, memory: _Memory | None) -> ImageFacts:
    """The facts of one file; with a memory it is decoded unless remembered."""
    digest = ""
    try:
        if memory is not None:
            digest = hash_file(path)
            known = memory.sizes_of.get(digest)
            if known is not None:
                return ImageFacts(known[:2], known[2:], digest=digest)
        shown_wh, stored_wh = read_sizes(path, decode=memory is not None)
    except ImageError as error:
        return ImageFacts(what=error.what, detail=error.detail, digest=digest)
    except FileNotFoundError:
        return ImageFacts(what=MISSING)
    except OSError as error:
        return ImageFacts(what=BROKEN, detail=error.strerror or str(error))
    return ImageFacts(shown_wh, stored_wh, digest=digest)


def _cache_folder() -> Path | None:
    """The user's folder for what can be made again; None where there is none."""
    own, general = os.environ.get("CROSSDINO_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(own) if own else (Path(general) if general else Path.home() / ".cache") / "crossdino"
    except RuntimeError:  # a user without a home
        return None
    return folder / "images"


class _Memory:
    """Sizes of the images that could be decoded, by content, in a folder that several processes may use at once.

    Every run writes a file of its own, under a temporary name and then renamed, and never changes an existing one. When
    there are many, one run puts them together and removes those that it has put together; what another run wrote in
    the meantime stays.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.sizes_of: dict[str, Sizes] = {}
        self._files: list[Path] = []
        if folder is not None:
            try:
                files = [(path.stat().st_mtime_ns, path) for path in folder.glob("*.txt")]
            except OSError:
                files = []
            self._files = [path for _, path in sorted(files)]
        for path in self._files:
            try:
                self.sizes_of.update(_parse(path.read_bytes()))
            except OSError:  # removed by another run that put files together, or unreadable
                continue

    def add(self, facts: Iterable[ImageFacts]) -> None:
        """Remember images that were not known before."""
        new = {
            fact.digest: (*fact.shown_wh, *fact.stored_wh)
            for fact in facts
            if fact.digest and not fact.what and fact.digest not in self.sizes_of
        }
        if not new or self.folder is None:
            return
        together = len(self._files) >= MAX_FILES or len(self.sizes_of) + len(new) > MAX_ENTRIES
        entries = list(({**self.sizes_of, **new} if together else new).items())[-MAX_ENTRIES:]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
            try:
                with open(handle, "wb") as file:
                    file.write(HEADER + b"\n" + b"".join(_line(digest, sizes) for digest, sizes in entries))
                os.replace(name, Path(name).with_suffix(".txt"))
            except BaseException:
                os.unlink(name)
                raise
            for path in self._files if together else []:
                path.unlink(missing_ok=True)
        except OSError:  # no space, no permission: no memory
            return


def _line(digest: str, sizes: Sizes) -> bytes:
    """One entry as text, with a checksum at its end."""
    text = f"{digest} {' '.join(map(str, sizes))}".encode()
    return b"%s %08x\n" % (text, zlib.crc32(text))


def _parse(content: bytes) -> dict[str, Sizes]:
    """The entries of one file; damaged lines, and files of another version, count as not there."""
    header, _, rest = content.partition(b"\n")
    entries: dict[str, Sizes] = {}
    if header == HEADER:
        for line in rest.split(b"\n"):
            text, _, checksum = line.rpartition(b" ")
            if checksum == b"%08x" % zlib.crc32(text) and text.count(b" ") == 4:
                digest, *sizes = text.decode("ascii").split(" ")
                entries[digest] = (int(sizes[0]), int(sizes[1]), int(sizes[2]), int(sizes[3]))
    return entries
