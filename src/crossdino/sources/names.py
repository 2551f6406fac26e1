"""From the words of a command line to the files that are meant.

Folders are listed without asking after every single file, so that a hundred thousand images take a second or two.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from crossdino.data.images import IMAGE_SUFFIXES, NO_IMAGE, ImageError, read_sizes
from crossdino.errors import InputError
from crossdino.sources.contract import Source

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv"),
    *(".3gp", ".ogv", ".mxf", ".mjpeg", ".mjpg", ".h264", ".h265", ".hevc"),
)
# Rasters that are taken when they are named, but not searched for in folders.
RASTER_SUFFIXES = (".img", ".vrt", ".ntf", ".nitf", ".j2k", ".jpx", ".gtiff")
SEARCHED_SUFFIXES = frozenset((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))

# What annotated pictures and videos say in their comment, and the file that lies beside them.
DRAWN_MARK = "drawn by crossdino"
RUN_FILE = "predictions.jsonl"
# Of a JPEG, where a comment is looked for.
_HEAD_BYTES = 512

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
CAMERA = re.compile(r"[0-9]{1,2}")


def find_sources(words: Sequence[str], *, recursive: bool = False) -> tuple[list[Source], list[str]]:
    """The images, videos and cameras that words stand for, each once, in their order.

    Args:
        words: files, folders, patterns (`*`, `?`, `[...]`, and `**` for folders in folders) and numbers of cameras. A
            file of that very name comes first: `[1].jpg` may be a file, and so may `0`.
        recursive: also look into the folders of folders.

    Returns:
        The sources, and one message for each word that stands for nothing. Hidden files (whose names begin with a
        dot) are left out unless they are named, and so are the pictures and videos that an earlier run has drawn. A
        file that is named twice, be it by another path or through a link, is taken once.

    Raises:
        InputError: nothing is found at all.
    """
    if isinstance(words, (str, os.PathLike)):
        words = [os.fspath(words)]
    if not words:
        raise InputError("nothing to look at: name images, folders, patterns, videos or the number of a camera")
    sources: dict[str, Source] = {}
    messages: list[str] = []
    places = _Places()
    for word in words:
        found, problem = _find(os.fspath(word), recursive, places)
        if not found:
            messages.append(problem)
        for key, source in found:
            sources.setdefault(key, source)
    if not sources:
        raise InputError("; ".join(messages))
    return list(sources.values()), messages


class _Places:
    """Where files really are; a folder is asked once for all of its files."""

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}
        self._of_runs: dict[str, bool] = {}

    def of(self, path: str, link: bool) -> str:
        """The real path of a file, of which it is known whether it is a link itself."""
        if link:
            return os.path.realpath(path)
        folder, name = os.path.split(path)
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        return os.path.join(self._folders[folder], name)

    def is_drawn(self, path: str) -> bool:
        """Whether a file is what a run of ours has drawn; only those in a run's folder are opened to know it."""
        folder, suffix = os.path.dirname(path), _suffix(path)
        if suffix not in (".jpg", ".mp4"):
            return False
        if folder not in self._of_runs:
            self._of_runs[folder] = os.path.isfile(os.path.join(folder, RUN_FILE))
        return self._of_runs[folder] and (_drawn_video(path) if suffix == ".mp4" else _drawn_image(path))


Found = list[tuple[str, Source]]


def _find(word: str, recursive: bool, places: _Places) -> tuple[Found, str]:
    """The sources of a word with what tells them apart, and the message for when there are none."""
    if not word.strip():
        return [], "an empty name stands for no image; leave it out"
    if os.path.isdir(word):
        return _in_folder(word, recursive, places)
    if os.path.isfile(word):
        kind = _kind_of(word)
        if kind is None:
            known = ", ".join(sorted(IMAGE_SUFFIXES))
            return [], f"{word} is neither an image nor a video ({known}); name images, folders or patterns"
        return [_file(word, os.path.islink(word), places, kind)], ""
    if os.path.lexists(word):
        what = "a link to nothing" if os.path.islink(word) and not os.path.exists(word) else "not a regular file"
        return [], f"{word} is {what}; name an image, a video or a folder"
    if url := URL.match(word):
        return [], _refuse_url(word, url[1].lower())
    if word == "-":
        return [], "images cannot be read from the standard input (-); name a file or a folder"
    if CAMERA.fullmatch(word):
        number = str(int(word))
        return [(f"camera {number}", Source(f"camera-{number}", number, "camera"))], ""
    return _by_pattern(word, places), f"no image {word}; check the name"


def _refuse_url(word: str, scheme: str) -> str:
    if scheme == "file":
        return f"{word} is a URL; give the path of the file instead"
    if scheme in ("rtsp", "rtmp", "rtp", "udp", "srt", "mms"):
        return f"{word} is a stream, which is not read over the network; record it to a file first, e.g. with ffmpeg"
    return f"{word} is a URL, and nothing is fetched over the network; download it first and give the file"


def _in_folder(word: str, recursive: bool, places: _Places) -> tuple[Found, str]:
    found = []
    drawn = False
    try:
        for path, link in sorted(_walk(word, recursive, set())):
            if places.is_drawn(path):
                drawn = True
            else:
                found.append(_file(path, link, places))
    except OSError as error:
        return [], f"folder {word} cannot be read ({error.strerror}); check its permissions"
    if found:
        return found, ""
    if drawn:
        return [], f"folder {word} holds only pictures that an earlier run has drawn; name the files if they are meant"
    deeper = "" if recursive else "; folders within it are searched with --recursive"
    return [], f"folder {word} holds no image or video ({', '.join(sorted(IMAGE_SUFFIXES))}){deeper}"


def _walk(folder: str, recursive: bool, visited: set[str]) -> Iterator[tuple[str, bool]]:
    """The files of a folder that are searched for, and whether each is a link."""
    real = os.path.realpath(folder)
    if real in visited:  # a link that leads back
        return
    visited.add(real)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _suffix(entry.name) in SEARCHED_SUFFIXES and entry.is_file():
                yield entry.path, entry.is_symlink()
            elif recursive and entry.is_dir():
                yield from _walk(entry.path, recursive, visited)


def _by_pattern(word: str, places: _Places) -> Found:
    """The files that match; of several kinds those that look like pictures, and folders only where no file matches."""
    files: list[tuple[str, bool]] = []
    folders: list[str] = []
    try:
        matches = sorted(glob.glob(word, recursive=True))
    except (OSError, ValueError, re.error):  # a word that is no pattern
        return []
    for path in matches:
        mode = os.lstat(path).st_mode
        link = stat.S_ISLNK(mode)
        if stat.S_ISDIR(mode) or (link and os.path.isdir(path)):
            folders.append(path)
        elif stat.S_ISREG(mode) or (link and os.path.isfile(path)):
            files.append((path, link))
    files = [(path, link) for path, link in files if not places.is_drawn(path)]
    searched = [(path, link) for path, link in files if _suffix(path) in SEARCHED_SUFFIXES]
    if files:
        return [_file(path, link, places) for path, link in searched or files]
    return [found for folder in folders for found in _in_folder(folder, False, places)[0]]


def _file(path: str, link: bool, places: _Places, kind: Literal["image", "video"] | None = None) -> tuple[str, Source]:
    guessed = "video" if _suffix(path) in VIDEO_SUFFIXES else "image"
    return places.of(path, link), Source(Path(path).as_posix(), path, kind or guessed)


def _kind_of(path: str) -> Literal["image", "video"] | None:
    """What a file that was named is: by its suffix or, if that says nothing, by its first bytes; None: neither."""
    suffix = _suffix(path)
    if suffix in VIDEO_SUFFIXES:
        return "video"
    if suffix in IMAGE_SUFFIXES or suffix in RASTER_SUFFIXES:
        return "image"
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return "image"  # whoever opens it will tell why it cannot be
    if head[4:8] == b"ftyp" and head[8:12] not in (b"avif", b"heic", b"mif1") or head[:4] == b"\x1aE\xdf\xa3":
        return "video"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "video"
    if head[:4] in (b"II+\0", b"MM\0+"):  # BigTIFF
        return "image"
    try:
        read_sizes(Path(path))
    except ImageError as error:
        return None if error.what == NO_IMAGE else "image"
    return "image"


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _drawn_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return DRAWN_MARK.encode() in file.read(_HEAD_BYTES)
    except OSError:
        return False  # whoever opens it will tell why it cannot be


def _drawn_video(path: str) -> bool:
    import av
    import av.error

    try:
        with av.open(os.path.abspath(path)) as container:
            return container.metadata.get("comment") == DRAWN_MARK
    except (av.error.FFmpegError, OSError):
        return False
