"""The columns that the tables (CSV, Parquet) share: one row an object, and one row a picture.

Pictures without objects have no row in the table of objects; the table of pictures has them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crossdino.results.journal import JournalHeader
from crossdino.results.picture_result import PictureResult

if TYPE_CHECKING:
    from crossdino.sources import Georeference

OBJECT_COLUMNS = (
    *("file_name", "frame", "seconds", "x1", "y1", "x2", "y2", "width", "height", "class_id", "class_name", "score"),
    *("world_x", "world_y", "polygon_wkt", "crs"),
)
PICTURE_COLUMNS = ("file_name", "frame", "seconds", "width", "height", "num_objects", "capped", "picture", "crs")


def object_columns(result: PictureResult, header: JournalHeader) -> dict[str, Any]:
    """The columns of a picture's objects.

    Args:
        result: the picture.
        header: for names and category ids.

    Returns:
        Column -> an array or list of n values, or one value that all objects share. `class_name` holds class indices.
    """
    boxes = result.boxes_xyxy
    columns: dict[str, Any] = {
        "file_name": result.file_name,
        "frame": result.frame,
        "seconds": result.seconds,
        **{name: boxes[:, column] for column, name in enumerate(("x1", "y1", "x2", "y2"))},
        "width": boxes[:, 2] - boxes[:, 0],
        "height": boxes[:, 3] - boxes[:, 1],
        "class_id": np.array(header.category_ids, dtype=np.int64)[result.labels],
        "class_name": result.labels,
        "score": result.scores,
        "world_x": None,
        "world_y": None,
        "polygon_wkt": None,
        "crs": None,
    }
    if result.georeference is not None:
        centres = world_centres(boxes, result.georeference).tolist()
        columns["world_x"] = [centre[0] for centre in centres]
        columns["world_y"] = [centre[1] for centre in centres]
        columns["polygon_wkt"] = [
            f"POLYGON (({', '.join(f'{x} {y}' for x, y in ring)}))"
            for ring in rings(boxes, result.georeference).tolist()
        ]
        columns["crs"] = result.georeference.crs
    return columns


def picture_row(result: PictureResult) -> tuple[Any, ...]:
    """The values of `PICTURE_COLUMNS` of a picture."""
    return (
        *(result.file_name, result.frame, result.seconds, result.width, result.height, len(result), result.capped),
        *(result.picture, result.georeference.crs if result.georeference is not None else None),
    )


def world_centres(boxes_xyxy: NDArray[np.float32], georeference: Georeference) -> NDArray[np.float64]:
    """The boxes' centres in the raster's coordinates, (n, 2), to a thousandth of a pixel."""
    boxes = boxes_xyxy.astype(np.float64)
    return _rounded(georeference.to_world((boxes[:, :2] + boxes[:, 2:]) / 2), georeference)


def rings(boxes_xyxy: NDArray[np.float32], georeference: Georeference | None) -> NDArray[np.float64]:
    """The boxes as closed rings, counter-clockwise where the second coordinate grows upwards.

    Args:
        boxes_xyxy: (n, 4) in pixels.
        georeference: of the picture; the rings are in its coordinates, to a thousandth of a pixel. None: in pixels.

    Returns:
        (n, 5, 2), the last corner is the first. A rotated raster gives rotated rectangles.
    """
    boxes = boxes_xyxy.astype(np.float64)
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3, 0, 1]].reshape(-1, 2)
    if georeference is None:
        return corners.reshape(-1, 5, 2)
    world = _rounded(georeference.to_world(corners), georeference).reshape(-1, 5, 2)
    a, b, _, d, e, _ = georeference.transform
    # Rows count downwards: where the raster is not mirrored (the usual case) the turn of the ring is the other one.
    return world if a * e - b * d > 0 else world[:, ::-1]


def _rounded(points: NDArray[np.float64], georeference: Georeference) -> NDArray[np.float64]:
    a, b, _, d, e, _ = georeference.transform
    pixel = min(math.hypot(a, d), math.hypot(b, e))
    decimals = min(15, max(0, 3 - math.floor(math.log10(pixel)))) if pixel > 0 else 15
    return np.round(np.asarray(points, dtype=np.float64), decimals)


def repeated(value: Any, count: int) -> Sequence[Any]:
    """A column's values, one an object."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value if isinstance(value, list) else [value] * count
