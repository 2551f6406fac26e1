"""What the two benchmarks that come as COCO files have in common: reading, checking and writing them anew.

Of an annotation its box, area, `iscrowd` and ids are kept; polygons and the like are not, since detection needs none of
them (COCO's training file becomes a quarter of its size).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossdino.errors import InputError
from crossdino.preparation.contract import SplitResult

Document = dict[str, Any]


def read_coco(path: Path) -> Document:
    """A COCO file's `images`, `annotations` and `categories`.

    Raises:
        InputError: it is no such file.
    """
    try:
        # Polygons are left out as they are read: COCO's training file takes 1 GB of memory this way, else 2.5.
        document = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=_without_polygons)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}); download it again") from None
    for key in ("images", "annotations", "categories"):
        values = document.get(key) if isinstance(document, dict) else None
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise InputError(
                f"{path} is not a COCO detection file: it has no list {key!r} of objects; download it again"
            )
    return document


def check_categories(path: Path, document: Document, expected: Mapping[int, str], title: str) -> None:
    """Whether a file has the categories of the benchmark, by id and name.

    Raises:
        InputError: naming the first that differs.
    """
    found = {category.get("id"): category.get("name") for category in document["categories"]}
    for category_id in sorted({*expected, *(key for key in found if isinstance(key, int))}):
        if found.get(category_id) != expected.get(category_id):
            raise InputError(
                f"{path}: category {category_id} is {found.get(category_id)!r}, but {expected.get(category_id)!r} in "
                f"{title}; give {title}'s own file"
            )


def renew(path: Path, document: Document, split: str, *, renumber: bool) -> tuple[Document, SplitResult]:
    """The document as it is written, and its numbers.

    Args:
        path: where it was read, for messages.
        document: of `read_coco`, with checked categories.
        split: its official name.
        renumber: whether annotations get the ids 1, 2, ...; otherwise only an id of 0 becomes a free one.

    Raises:
        InputError: an image or an annotation lacks something, or an image id is used twice.
    """
    images = [_image(path, image) for image in document["images"]]
    sizes = {image["id"]: image for image in images}
    if len(sizes) != len(images):
        raise InputError(f"{path}: an image id is used twice; download the file again")
    names: set[str] = set()
    for image in images:
        if image["file_name"] in names:
            raise InputError(f"{path} lists the image {image['file_name']} twice; download the file again")
        names.add(image["file_name"])
    categories = frozenset(category["id"] for category in document["categories"])
    annotations: list[Document] = []
    unlisted = zeros = 0
    for number, entry in enumerate(document["annotations"]):
        annotation = _annotation(path, entry, number, categories)
        if annotation["image_id"] not in sizes:
            unlisted += 1
            continue
        zeros += annotation["id"] == 0
        annotations.append(annotation)
    notes: list[str] = []
    if renumber:
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
    elif zeros:
        free = max(annotation["id"] for annotation in annotations) + 1
        for annotation in annotations:
            if annotation["id"] == 0:
                annotation["id"] = free
                notes.append(f"the annotation with the id 0 has the id {free} now: 0 counts as never matched")
                free += 1
    num_crowds = sum(annotation["iscrowd"] for annotation in annotations)
    renewed = {"images": images, "annotations": annotations, "categories": _categories(document)}
    dropped = {"image not listed": unlisted} if unlisted else {}
    counted = {"objects": len(annotations)}
    return renewed, SplitResult(
        split, len(images), len(annotations) - num_crowds, num_crowds, dropped, counted, tuple(notes)
    )


def find_images(names: Sequence[str], folders: Sequence[Path], source: Path) -> Path | dict[str, Path]:
    """Where images lie.

    Args:
        names: of the files.
        folders: that may hold them, in the order of preference; those that do not exist are passed over.
        source: for messages.

    Returns:
        The first folder that holds all of them, or name -> file where they are spread over several.

    Raises:
        InputError: naming the first that is missing, and where it was looked for.
    """
    existing = [folder for folder in folders if folder.is_dir()]
    listed = {folder: set(os.listdir(folder)) for folder in existing}
    plain = not any("/" in name for name in names)

    def holds(folder: Path, name: str) -> bool:
        return name in listed[folder] if plain else (folder / name).is_file()

    places: dict[str, Path] = {}
    for folder in existing:
        missing = next((name for name in names if not holds(folder, name)), None)
        if missing is None:
            return folder
    for name in names:
        folder = next((folder for folder in existing if holds(folder, name)), None)
        if folder is not None:
            places[name] = folder / name
    if len(places) == len(names):
        return places
    first = next(name for name in names if name not in places)
    looked = ", ".join(str(folder.relative_to(source)) for folder in existing) or ", ".join(
        str(folder.relative_to(source)) for folder in folders
    )
    raise InputError(
        f"image {first} is missing, as are {len(names) - len(places) - 1} more of {len(names)}; looked in {looked} of "
        f"{source}: put the images there, or add --without-images to go without them"
    )


def _without_polygons(entry: Document) -> Document:
    entry.pop("segmentation", None)
    return entry


def _image(path: Path, entry: Document) -> Document:
    image = {key: entry.get(key) for key in ("id", "file_name", "width", "height")}
    numbers = [image["id"], image["width"], image["height"]]
    if not all(type(number) is int for number in numbers) or not isinstance(image["file_name"], str):
        raise InputError(f"{path}: image {entry!r:.100} lacks an id, a file_name, a width or a height; mend that")
    return image


def _annotation(path: Path, entry: Document, number: int, categories: frozenset[int]) -> Document:
    box = entry.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        what = f"has the bbox {box!r:.60}"
    elif entry.get("category_id") not in categories:
        what = f"has the category {entry.get('category_id')!r}"
    elif type(entry.get("id", 0)) is not int:
        what = "has no whole number as its id"
    else:
        area = entry.get("area")
        return {
            "id": entry.get("id", 0),
            "image_id": entry.get("image_id"),
            "category_id": entry["category_id"],
            "bbox": box,
            "area": area if _is_number(area) else box[2] * box[3],
            "iscrowd": int(bool(entry.get("iscrowd", 0))),
        }
    raise InputError(f"{path}: annotation {entry.get('id', f'number {number + 1}')} {what}; download the file again")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _categories(document: Document) -> list[Document]:
    keys = ("id", "name", "supercategory")
    return [{key: category[key] for key in keys if key in category} for category in document["categories"]]
