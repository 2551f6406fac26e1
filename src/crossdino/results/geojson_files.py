"""Files of a single image: GeoJSON polygons for maps and microscopes, YOLO labels.

GeoJSON is defined for degrees only (RFC 7946). Rasters lie in metres of some grid, and rounding degrees would move
small boxes: as GDAL and QGIS do, we write the raster's own coordinates and name their system in the `crs` member of the
older standard (GeoJSON 2008). An image without a place on the earth gives pixels, x to the right and y downwards, with
the properties by which QuPath tells class and score.
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from crossdino.results.journal import JournalHeader
from crossdino.results.picture_result import PictureResult, shortest_decimals
from crossdino.results.rows import rings
from crossdino.writing import written_whole

LABEL_FOLDER = "labels"
# Features that are turned into text at once.
_CHUNK = 10_000


def write_geojson(folder: Path, result: PictureResult, header: JournalHeader) -> Path | None:
    """Write the objects of an image as one FeatureCollection, whole or not at all.

    Args:
        folder: the file is `<stem>.geojson` in it.
        result: the image.
        header: of the run.

    Returns:
        The file; None for the frame of a video, which has none.
    """
    if result.frame is not None:
        return None
    path = folder / f"{own_stem(result)}.geojson"
    begin: dict[str, Any] = {"type": "FeatureCollection", "name": result.file_name}
    if result.georeference is not None:
        begin["crs"] = {"type": "name", "properties": {"name": crs_name(result.georeference.crs)}}
    with written_whole(path) as partial, open(partial, "w", encoding="ascii") as file:
        file.write(json.dumps(begin)[:-1] + ', "features": [')
        for start in range(0, len(result), _CHUNK):
            features = _features(result, header, slice(start, start + _CHUNK))
            file.write((",\n" if start else "\n") + ",\n".join(json.dumps(feature) for feature in features))
        file.write("\n]}\n")
    return path


def write_labels(folder: Path, result: PictureResult) -> Path:
    """Write a picture's objects as YOLO labels with confidence, whole or not at all.

    Args:
        folder: the file is `labels/<stem>.txt` in it, `labels/<stem>_000012.txt` for a frame.
        result: the picture.

    Returns:
        The file; a line an object: class index, centre, width and height as shares of the picture's, score.
    """
    stem = own_stem(result) + ("" if result.frame is None else f"_{result.frame:06d}")
    path = folder / LABEL_FOLDER / f"{stem}.txt"
    path.parent.mkdir(exist_ok=True)
    left, top, right, bottom = result.boxes_xyxy.astype(float).T
    columns = (
        result.labels.tolist(),
        ((left + right) / 2 / result.width).tolist(),
        ((top + bottom) / 2 / result.height).tolist(),
        ((right - left) / result.width).tolist(),
        ((bottom - top) / result.height).tolist(),
        shortest_decimals(result.scores).tolist(),
    )
    lines = [
        f"{label} {x:.8f} {y:.8f} {width:.8f} {height:.8f} {score}\n"
        for label, x, y, width, height, score in zip(*columns, strict=True)
    ]
    with written_whole(path) as partial:
        partial.write_text("".join(lines), encoding="ascii")
    return path


def own_stem(result: PictureResult) -> str:
    """What the picture's own files are called."""
    return result.stem or PurePosixPath(result.file_name).stem


def crs_name(crs: str) -> str:
    """How a coordinate system is named in GeoJSON.

    Args:
        crs: `EPSG:32633`, or WKT (of a system that has no number), which GDAL understands there as well.
    """
    match = re.fullmatch(r"EPSG:(\d+)", crs.strip(), re.IGNORECASE)
    if match is None:
        return crs
    # EPSG's own order for degrees is latitude first; GeoJSON's is longitude first, which has another name.
    return "urn:ogc:def:crs:OGC:1.3:CRS84" if match[1] == "4326" else f"urn:ogc:def:crs:EPSG::{match[1]}"


def _features(result: PictureResult, header: JournalHeader, part: slice) -> list[dict[str, Any]]:
    boxes = result.boxes_xyxy[part]
    columns = (
        rings(boxes, result.georeference).tolist(),
        shortest_decimals(boxes).tolist(),
        result.labels[part].tolist(),
        shortest_decimals(result.scores[part]).tolist(),
    )
    features = []
    for ring, box, label, score in zip(*columns, strict=True):
        name = header.class_names[label]
        properties: dict[str, Any] = {
            "class_id": header.category_ids[label],
            "class_name": name,
            "score": score,
            **dict(zip(("x1", "y1", "x2", "y2"), box, strict=True)),
        }
        if result.georeference is None:
            properties |= {
                "objectType": "detection",
                "classification": {"name": name},
                "measurements": {"score": score},
            }
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    return features
