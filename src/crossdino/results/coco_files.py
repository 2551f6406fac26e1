"""COCO JSON: the whole file (images, categories, annotations with scores), and the plain list of results.

Both are written picture by picture, so that memory does not grow with the run. Ids count from 1 in the order of the
pictures; boxes are (x, y, width, height), rounded to 0.0001 px, scores to 1e-8.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crossdino.checkpoints import written_whole
from crossdino.postprocessing import detections_to_coco
from crossdino.results.journal import JournalHeader
from crossdino.results.picture_result import PictureResult


@contextmanager
def coco_file(path: Path, header: JournalHeader) -> Iterator[Callable[[PictureResult], None]]:
    """Write a COCO file, whole or not at all; yields what takes the pictures."""
    categories = [
        {"id": category_id, "name": name}
        for category_id, name in zip(header.category_ids, header.class_names, strict=True)
    ]
    # The list of images comes first and grows as long as that of the annotations: they wait in a file beside it.
    waiting = path.with_name(f".{path.name}.annotations.partial")
    num_images = num_annotations = 0
    try:
        with written_whole(path) as partial, open(partial, "wb") as images, open(waiting, "w+b") as annotations:
            images.write(b'{"images": [')

            def add(result: PictureResult) -> None:
                nonlocal num_images, num_annotations
                num_images += 1
                images.write(_joined([_image(result, num_images)], num_images == 1))
                found = []
                for number, one in enumerate(_results(result, num_images, header), num_annotations + 1):
                    found.append({"id": number, **one, "area": one["bbox"][2] * one["bbox"][3], "iscrowd": 0})
                annotations.write(_joined(found, num_annotations == 0))
                num_annotations += len(found)

            yield add
            images.write(b'], "categories": ' + json.dumps(categories).encode("ascii") + b', "annotations": [')
            annotations.seek(0)
            shutil.copyfileobj(annotations, images, 1 << 20)
            images.write(b"]}\n")
    finally:
        waiting.unlink(missing_ok=True)


@contextmanager
def coco_results_file(path: Path, header: JournalHeader) -> Iterator[Callable[[PictureResult], None]]:
    """Write the list that COCO's evaluation takes; an image's id is its place among the pictures, from 1."""
    num_images = num_results = 0
    with written_whole(path) as partial, open(partial, "wb") as file:
        file.write(b"[")

        def add(result: PictureResult) -> None:
            nonlocal num_images, num_results
            num_images += 1
            file.write(_joined(_results(result, num_images, header), num_results == 0))
            num_results += len(result)

        yield add
        file.write(b"]\n")


def _image(result: PictureResult, image_id: int) -> dict[str, Any]:
    image: dict[str, Any] = {
        "id": image_id,
        "file_name": result.file_name,
        "width": result.width,
        "height": result.height,
    }
    if result.frame is not None:
        image |= {"frame": result.frame, "seconds": result.seconds}
    if result.picture is not None:
        image["picture"] = result.picture
    if result.capped:
        image["capped"] = True
    return image


def _results(result: PictureResult, image_id: int, header: JournalHeader) -> list[dict[str, Any]]:
    return detections_to_coco(result.to_detections(header.class_names), image_id, header.category_ids)


def _joined(items: list[dict[str, Any]], first: bool) -> bytes:
    if not items:
        return b""
    return (b"" if first else b", ") + json.dumps(items)[1:-1].encode("ascii")
