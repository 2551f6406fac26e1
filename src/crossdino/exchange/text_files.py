"""One text file for each image, in a folder or in a .zip archive: read, and written whole or not at all."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from crossdino.errors import InputError
from crossdino.writing import partial_path, written_whole

_ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the same results are the same archive


def read_text_files(path: Path) -> dict[str, list[str]]:
    """The lines of all `.txt` files of a folder, or of an archive.

    Byte order marks and Windows line ends are taken off. In an archive the files may lie in folders; what macOS and
    Windows leave there (`__MACOSX`, hidden files) is passed over.

    Args:
        path: the folder, or the `.zip`.

    Returns:
        Name of the file without folders -> its lines, by name.

    Raises:
        InputError: it cannot be read, there are no text files in it, or one is not UTF-8.
    """
    try:
        contents = _read_archive(path) if path.suffix.lower() == ".zip" and not path.is_dir() else _read_folder(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path of the results") from None
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{path} cannot be unpacked ({error}): give a plain .zip archive, or its folder") from None
    if not contents:
        raise InputError(f"{path} holds no .txt files: give the folder or .zip with one text file for each image")
    lines = {}
    for name in sorted(contents):
        try:
            text = contents[name].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{path / name} is not UTF-8 text ({error.reason}): save it as plain text") from None
        lines[name] = text.split("\n")
    return lines


def _read_folder(path: Path) -> dict[str, bytes]:
    files = [entry for entry in path.iterdir() if entry.suffix.lower() == ".txt" and not entry.name.startswith(".")]
    return {entry.name: entry.read_bytes() for entry in files if entry.is_file()}


def _read_archive(path: Path) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            inside = PurePosixPath(entry.filename.replace("\\", "/"))
            hidden = any(part.startswith((".", "__MACOSX")) for part in inside.parts)
            if entry.is_dir() or hidden or inside.suffix.lower() != ".txt":
                continue
            if inside.name in contents:
                raise InputError(f"{path} holds several files {inside.name}: pack the results of one split only")
            contents[inside.name] = archive.read(entry)
    return contents


def write_text_files(path: Path, texts: Mapping[str, str]) -> None:
    """Write text files into a folder, or into the root of an archive if `path` ends with .zip.

    They appear under their name when all are written. An archive is replaced; a folder must not hold anything yet.

    Args:
        path: the folder or archive, in a folder that exists.
        texts: name of the file -> its text.

    Raises:
        InputError: the place cannot be written to, or holds something.
    """
    check_place(path)
    try:
        if path.suffix.lower() == ".zip":
            with written_whole(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, text in texts.items():
                    entry = zipfile.ZipInfo(name, _ZIP_DATE)
                    entry.external_attr = 0o644 << 16
                    archive.writestr(entry, text, zipfile.ZIP_DEFLATED)
        else:
            _write_folder(path, texts)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): name another place") from error


def _write_folder(path: Path, texts: Mapping[str, str]) -> None:
    """A folder that takes its name, or the place of an empty one, when all its files are written."""
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        for name, text in texts.items():
            (partial / name).write_bytes(text.encode("utf-8"))
        if path.exists():
            path.rmdir()
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_place(path: Path) -> None:
    """Whether results can be put there without losing what is there.

    Raises:
        InputError: there is no folder to put them in, a folder that holds something, or a folder where a file is
            meant or the other way round.
    """
    if not path.absolute().parent.is_dir():
        raise InputError(f"cannot write {path}: no folder {path.absolute().parent}")
    if path.suffix.lower() in (".zip", ".json"):
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder; name a file, or a folder without that ending")
    elif path.is_file():
        raise InputError(f"cannot write {path}: it is a file; name a folder for the text files, or a .zip")
    elif path.is_dir() and any(path.iterdir()):
        raise InputError(f"cannot write into {path}: it is not empty; name a new folder, or delete this one first")
