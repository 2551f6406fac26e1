"""What becomes of detections: the journal of a run, the files made of it, annotated pictures and videos."""

from __future__ import annotations

from crossdino.results.coco_files import read_image_ids
from crossdino.results.drawing import draw_picture, write_picture
from crossdino.results.journal import FileStamp, Journal, JournalHeader, file_stamp, is_bare
from crossdino.results.journal_index import JournalIndex, journal_path
from crossdino.results.output_names import output_stems, refuse_overwriting
from crossdino.results.outputs import FORMATS, check_formats, growing_outputs, open_outputs, write_outputs
from crossdino.results.parquet_files import object_schema, object_table, picture_schema
from crossdino.results.picture_result import PictureResult
from crossdino.results.tile_store import TileStore
from crossdino.results.video import annotated_video

__all__ = [
    "FORMATS",
    "FileStamp",
    "Journal",
    "JournalHeader",
    "JournalIndex",
    "PictureResult",
    "TileStore",
    "annotated_video",
    "check_formats",
    "draw_picture",
    "file_stamp",
    "growing_outputs",
    "is_bare",
    "journal_path",
    "object_schema",
    "object_table",
    "open_outputs",
    "output_stems",
    "picture_schema",
    "read_image_ids",
    "refuse_overwriting",
    "write_outputs",
    "write_picture",
]
