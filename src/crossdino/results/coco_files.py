"""COCO JSON: the whole file (images, categories, annotations with scores), and the plain list of results.

Both are written picture by picture, so that memory does not grow with the run. Ids count from 1 in the order of the
pictures, unless those of a file of annotations are taken; boxes are (x, y, width, height), rounded to 0.0001 px, scores
to 1e-8.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from crossdino.errors import InputError
from crossdino.postprocessing import detections_to_coco
from crossdino.results.journal import JournalHeader
from crossdino.results.picture_result import PictureResult
from crossdino.sources import Source
from crossdino.writing import written_whole


@contextmanager
def coco_file(
    path: Path, header: JournalHeader, image_ids: Mapping[str, int] | None = None
) -> Iterator[Callable[[PictureResult], None]]:
    """Write a COCO file, whole or not at all; yields what takes the pictures.

    Args:
        path: the file.
        header: of the run.
        image_ids: of each source's name, see `read_image_ids`; None: they are counted.
    """
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
                image_id = num_images if image_ids is None else image_ids[result.file_name]
                images.write(_joined([_image(result, image_id)], num_images == 1))
                found = []
                for number, one in enumerate(_results(result, image_id, header), num_annotations + 1):
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
def coco_results_file(
    path: Path, header: JournalHeader, image_ids: Mapping[str, int] | None = None
) -> Iterator[Callable[[PictureResult], None]]:
    """Write the list that COCO's evaluation takes; image ids as in `coco_file`."""
    num_images = num_results = 0
    with written_whole(path) as partial, open(partial, "wb") as file:
        file.write(b"[")

        def add(result: PictureResult) -> None:
            nonlocal num_images, num_results
            num_images += 1
            image_id = num_images if image_ids is None else image_ids[result.file_name]
            file.write(_joined(_results(result, image_id, header), num_results == 0))
            num_results += len(result)

        yield add
        file.write(b"]\n")


def read_image_ids(path: Path, sources: Sequence[Source]) -> dict[str, int]:
    """The ids that a COCO file of annotations gives to images, so that detections can be measured against it.

    Args:
        path: the file; its `file_name`s are compared with the ends of the images' paths, folder by folder.
        sources: images.

    Returns:
        Name of the source -> id.

    Raises:
        InputError: the file is none of that kind, or does not know one of the sources, or two are one to it.
    """
    try:
        images = json.loads(path.read_text(encoding="utf-8-sig"))["images"]
        known: dict[PurePosixPath, list[int]] = {}
        for image in images:
            known.setdefault(PurePosixPath(str(image["file_name"]).replace("\\", "/")), []).append(int(image["id"]))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); name a COCO file of annotations") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} lists no images; name a COCO file of annotations") from None
    ids: dict[str, int] = {}
    owners: dict[int, str] = {}
    for source in sources:
        if source.kind != "image":
            raise InputError(f"{source.name} is no image, and {path} gives ids to images only; leave it out")
        parts = PurePosixPath(Path(source.path).absolute().as_posix()).parts
        ends = (PurePosixPath(*parts[start:]) for start in range(len(parts)))
        found = next((known[end] for end in ends if end in known), [])
        if len(found) != 1:
            what = "does not know" if not found else "has several ids for"
            raise InputError(f"{path} {what} image {source.name}; name its images only, in their folders")
        if found[0] in owners:
            raise InputError(f"{source.name} and {owners[found[0]]} are one image to {path}; leave one out")
        ids[source.name] = found[0]
        owners[found[0]] = source.name
    return ids


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
