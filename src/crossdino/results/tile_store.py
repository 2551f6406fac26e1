"""What was found in the tiles of a picture that is not finished, so that a stopped run goes on within it.

A gigapixel image takes hours; the journal knows finished pictures only. For pictures of many tiles the detections of
each tile are added to a file of the picture as they come, and the file is deleted once the picture is in the journal.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from crossdino.errors import InputError
from crossdino.results.journal import file_stamp
from crossdino.sources import Picture

# Fewer tiles than this are done again: the file would cost more than it saves.
LEAST_TILES = 32

# Tile (-1: the whole picture), number of detections, checksum. The checksum covers these two as well: a loss of power
# may leave zeros, which must not be taken for tiles without objects.
_HEAD = struct.Struct("<iiI")


class TileStore:
    """The detections of tiles, in a folder with a file for each unfinished picture."""

    def __init__(self, folder: str | Path, least_tiles: int = LEAST_TILES) -> None:
        """Remember where.

        Args:
            folder: is made with the first file. What it holds must have been made with the same settings.
            least_tiles: pictures of fewer tiles are not kept.
        """
        self.folder = Path(folder)
        self.least_tiles = least_tiles
        self._files: dict[Path, BinaryIO] = {}

    def load(self, picture: Picture, num_tiles: int) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        """What was found in the picture's tiles by a run that was stopped.

        Args:
            picture: is recognised by its name, size and the stamp of its file.
            num_tiles: that the picture has.

        Returns:
            Number of the tile (-1: the whole picture) -> boxes (n, 4), scores (n,), labels (n,), as they were saved.
        """
        if num_tiles < self.least_tiles:
            return {}
        path, found = self._path(picture), {}
        head = self._head(picture, num_tiles)
        if path.is_file():
            with open(path, "r+b") as file:
                if file.readline() == head:
                    end = file.tell()
                    while (record := _read_record(file)) is not None:
                        found[record[0]] = record[1]
                        end = file.tell()
                    file.truncate(end)  # what a killed process left of its last record
                    return found
        with self._written():
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(head)
        return found

    def save(self, picture: Picture, num_tiles: int, number: int, found: tuple[Tensor, Tensor, Tensor]) -> None:
        """Keep what was found in a tile; `load` comes before.

        Args:
            picture: that the tile belongs to.
            num_tiles: that the picture has.
            number: of the tile; -1: the whole picture.
            found: boxes (n, 4), scores (n,), labels (n,) on the CPU.

        Raises:
            InputError: the disk is full.
        """
        if num_tiles < self.least_tiles:
            return
        path = self._path(picture)
        boxes, scores, labels = found
        numbers = boxes.float().numpy().astype("<f4").tobytes() + scores.float().numpy().astype("<f4").tobytes()
        numbers += labels.numpy().astype("<i8").tobytes()
        with self._written():
            if path not in self._files:
                self._files[path] = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by `forget` or `close`
            rest = memoryview(_HEAD.pack(number, len(scores), _checksum(number, numbers)) + numbers)
            while rest:
                rest = rest[self._files[path].write(rest) :]

    def forget(self, picture: Picture) -> None:
        """Delete the picture's file: the picture is in the journal, or cannot be read."""
        path = self._path(picture)
        file = self._files.pop(path, None)
        if file is not None:
            file.close()
        path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files of unfinished pictures."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"cannot write into {self.folder}: {error.strerror}; make room and run the same command again: it "
                "continues where it was"
            ) from None

    def _path(self, picture: Picture) -> Path:
        key = f"{picture.source.name}#{picture.frame}"
        return self.folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:24]}.tiles"

    def _head(self, picture: Picture, num_tiles: int) -> bytes:
        stamp = file_stamp(picture.source.path)
        known = {"file_name": picture.source.name, "hw": list(picture.hw), "num_tiles": num_tiles, "stamp": stamp}
        return json.dumps(known).encode("ascii") + b"\n"


def _checksum(number: int, numbers: bytes) -> int:
    return zlib.crc32(numbers, zlib.crc32(struct.pack("<iq", number, len(numbers))))


def _read_record(file: BinaryIO) -> tuple[int, tuple[Tensor, Tensor, Tensor]] | None:
    """The next record; None at the end, or where it is not whole."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    number, count, checksum = _HEAD.unpack(head)
    numbers = file.read(count * 28) if count >= 0 else b""
    if len(numbers) != count * 28 or _checksum(number, numbers) != checksum:
        return None
    floats = np.frombuffer(numbers, dtype="<f4", count=5 * count).astype(np.float32)
    labels = np.frombuffer(numbers, dtype="<i8", count=count, offset=20 * count).astype(np.int64)
    boxes, scores = torch.from_numpy(floats[: 4 * count].reshape(count, 4)), torch.from_numpy(floats[4 * count :])
    return number, (boxes, scores, torch.from_numpy(labels))
