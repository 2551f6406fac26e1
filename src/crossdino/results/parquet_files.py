"""Parquet: `predictions.parquet` with one row an object, `predictions_images.parquet` with one row a picture.

Needs pyarrow (the extra `parquet`). The columns are those of the CSV files, typed; `class_name` is a dictionary. Each
file's metadata hold the run's settings as JSON under the key `crossdino`. Row groups end with a picture, so that a
reader can take them one by one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crossdino.errors import InputError
from crossdino.results.journal import JournalHeader
from crossdino.results.picture_result import PictureResult
from crossdino.results.rows import PICTURE_COLUMNS, object_columns, picture_row
from crossdino.writing import written_whole

if TYPE_CHECKING:
    import pyarrow

# Rows that are collected before they are written as a group.
_GROUP_ROWS = 1 << 16
# A picture with more rows than this is several groups.
_MOST_ROWS = 1 << 20


def require_pyarrow() -> None:
    """Refuse Parquet where it cannot be written.

    Raises:
        InputError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise InputError("Parquet needs pyarrow: pip install 'crossdino[parquet]', or choose another format") from None


def object_schema(header: JournalHeader) -> pyarrow.Schema:
    """The columns of the table of objects."""
    import pyarrow as pa

    fields = {
        "file_name": pa.string(),
        "frame": pa.int64(),
        "seconds": pa.float64(),
        **dict.fromkeys(("x1", "y1", "x2", "y2", "width", "height"), pa.float32()),
        "class_id": pa.int64(),
        "class_name": pa.dictionary(pa.int32(), pa.string()),
        "score": pa.float32(),
        "world_x": pa.float64(),
        "world_y": pa.float64(),
        "polygon_wkt": pa.string(),
        "crs": pa.string(),
    }
    return pa.schema(list(fields.items()), metadata=_metadata(header))


def object_table(result: PictureResult, header: JournalHeader, schema: pyarrow.Schema | None = None) -> pyarrow.Table:
    """The objects of a picture as a table.

    Args:
        result: the picture.
        header: of the run.
        schema: `object_schema(header)`, where it has been made already.
    """
    import pyarrow as pa

    columns, arrays = object_columns(result, header), []
    chosen = object_schema(header) if schema is None else schema
    for field in chosen:
        values: Any = columns[field.name]
        if field.name == "class_name":
            names = pa.array(list(map(_text, header.class_names)), pa.string())
            array = pa.DictionaryArray.from_arrays(pa.array(values, pa.int32()), names)
        elif isinstance(values, (np.ndarray, list)):
            array = pa.array(values, field.type)
        else:
            array = pa.repeat(pa.scalar(_text(values), field.type), len(result))
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=chosen)


def picture_schema(header: JournalHeader) -> pyarrow.Schema:
    """The columns of the table of pictures."""
    import pyarrow as pa

    types = (pa.string(), pa.int64(), pa.float64(), pa.int64(), pa.int64(), pa.int64(), pa.bool_(), pa.string())
    fields = list(zip(PICTURE_COLUMNS, (*types, pa.string()), strict=True))
    return pa.schema(fields, metadata=_metadata(header))


@contextmanager
def parquet_files(folder: Path, header: JournalHeader, stem: str) -> Iterator[Callable[[PictureResult], None]]:
    """Write both tables, whole or not at all; yields what takes the pictures.

    Raises:
        InputError: pyarrow is not installed.
    """
    require_pyarrow()
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    schema, columns = object_schema(header), picture_schema(header)
    num_rows = 0
    objects: list[pyarrow.Table] = []
    pictures: list[Sequence[Any]] = []

    with (
        written_whole(folder / f"{stem}.parquet") as objects_path,
        written_whole(folder / f"{stem}_images.parquet") as pictures_path,
        ParquetWriter(objects_path, schema) as object_writer,
        ParquetWriter(pictures_path, columns) as picture_writer,
    ):

        def write_objects() -> None:
            nonlocal num_rows
            num_rows = 0
            if objects:
                object_writer.write_table(pa.concat_tables(objects), row_group_size=_MOST_ROWS)
                objects.clear()

        def write_pictures() -> None:
            if pictures:
                values = [list(map(_text, column)) for column in zip(*pictures, strict=True)]
                arrays = [pa.array(column, field.type) for column, field in zip(values, columns, strict=True)]
                picture_writer.write_table(pa.Table.from_arrays(arrays, schema=columns))
                pictures.clear()

        def add(result: PictureResult) -> None:
            nonlocal num_rows
            pictures.append(picture_row(result))
            if len(pictures) >= _GROUP_ROWS:
                write_pictures()
            if len(result):
                objects.append(object_table(result, header, schema))
                num_rows += len(result)
            if num_rows >= _GROUP_ROWS:
                write_objects()

        yield add
        write_objects()
        write_pictures()


def _metadata(header: JournalHeader) -> dict[str, str]:
    stored = {
        "crossdino_version": header.crossdino_version,
        "settings": header.settings,
        "class_names": header.class_names,
        "category_ids": header.category_ids,
    }
    return {"crossdino": json.dumps(stored)}


def _text(value: Any) -> Any:
    # Parquet's strings are Unicode; bytes of a file name that are none become question marks.
    return value.encode("utf-8", "replace").decode("utf-8") if isinstance(value, str) else value
