"""CSV: `predictions.csv` with one row an object, `predictions_images.csv` with one row a picture.

UTF-8, comma, quotes only where they are needed (RFC 4180); what does not apply is empty. Numbers have as many digits as
a float32 needs.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from crossdino.results.journal import JournalHeader
from crossdino.results.picture_result import PictureResult, shortest_decimals
from crossdino.results.rows import OBJECT_COLUMNS, PICTURE_COLUMNS, object_columns, picture_row, repeated
from crossdino.writing import written_whole


@contextmanager
def csv_files(folder: Path, header: JournalHeader, stem: str) -> Iterator[Callable[[PictureResult], None]]:
    """Write both tables, whole or not at all; yields what takes the pictures."""
    with (
        written_whole(folder / f"{stem}.csv") as objects,
        written_whole(folder / f"{stem}_images.csv") as pictures,
        _opened(objects, "w") as objects_file,
        _opened(pictures, "w") as pictures_file,
    ):
        yield _begin(objects_file, pictures_file, header)


@contextmanager
def growing_csv_files(
    folder: Path, header: JournalHeader, stem: str, done: Iterable[PictureResult]
) -> Iterator[Callable[[PictureResult], None]]:
    """Write both tables as the run goes: they hold every picture as soon as it has been taken.

    Args:
        folder: where.
        header: of the run.
        stem: of the files.
        done: the pictures of an earlier part of the run.
    """
    with csv_files(folder, header, stem) as add:
        for result in done:
            add(result)
    with (
        _opened(folder / f"{stem}.csv", "a") as objects_file,
        _opened(folder / f"{stem}_images.csv", "a") as pictures_file,
    ):
        add = _adder(objects_file, pictures_file, header)

        def add_at_once(result: PictureResult) -> None:
            add(result)
            objects_file.flush()
            pictures_file.flush()

        yield add_at_once


def _opened(path: Path, mode: str) -> IO[str]:
    # File names that are no valid Unicode are written as the bytes that they are.
    return open(path, mode, encoding="utf-8", errors="surrogateescape", newline="")


def _begin(objects_file: IO[str], pictures_file: IO[str], header: JournalHeader) -> Callable[[PictureResult], None]:
    csv.writer(objects_file, lineterminator="\n").writerow(OBJECT_COLUMNS)
    csv.writer(pictures_file, lineterminator="\n").writerow(PICTURE_COLUMNS)
    return _adder(objects_file, pictures_file, header)


def _adder(objects_file: IO[str], pictures_file: IO[str], header: JournalHeader) -> Callable[[PictureResult], None]:
    objects = csv.writer(objects_file, lineterminator="\n")
    pictures = csv.writer(pictures_file, lineterminator="\n")
    names = np.array(header.class_names, dtype=object)

    def add(result: PictureResult) -> None:
        columns = object_columns(result, header)
        columns["class_name"] = names[columns["class_name"]]
        values = [
            shortest_decimals(value) if isinstance(value, np.ndarray) and value.dtype == np.float32 else value
            for value in columns.values()
        ]
        objects.writerows(zip(*(repeated(value, len(result)) for value in values), strict=True))
        pictures.writerow(picture_row(result))

    return add
