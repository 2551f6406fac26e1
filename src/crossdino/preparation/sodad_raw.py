"""SODA-D's raw JSON files: finding, reading and checking them.

Layout of the data as downloaded, at the top of the source or below `rawData`:

    Annotations/train.json, val.json, test.json    COCO files; categories 1 to 9, and 10 for ignore regions
    Images/*.jpg                                    all splits in one folder, or one folder for each
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crossdino.errors import InputError

# The category of ignore regions.
REGION = 10
Require = Literal["none", "annotated", "all"]
# Where `Annotations` and `Images` may lie below the source.
_PLACES = ("", "rawData", "SODA-D", "SODA-D/rawData")
_AGAIN = "download it again, or mend it"


@dataclass(frozen=True)
class RawImage:
    """An image of the raw data.

    Attributes:
        image_id: of the raw file.
        path: the image file.
        width, height: in pixels, as the raw file says.
        annotations: (N,) positions of its annotations in the raw file.
    """

    image_id: int
    path: Path
    width: int
    height: int
    annotations: NDArray[np.intp]

    @property
    def stem(self) -> str:
        """The name of its patches: the file's name up to the first dot, as the original has it."""
        return self.path.name.split(".")[0] or "image"


@dataclass(frozen=True)
class RawSplit:
    """A raw JSON file.

    Attributes:
        path: the file.
        document: all it holds.
        images: in the original splitter's order: by their first annotations; those without any come last.
        boxes_xywh: (N, 4) of its annotations, in their order, in pixels.
        categories: (N,) 1 to 10.
    """

    path: Path
    document: dict[str, Any]
    images: tuple[RawImage, ...]
    boxes_xywh: NDArray[np.float64]
    categories: NDArray[np.int64]


def find_annotations(source: Path, splits: Sequence[str]) -> dict[str, Path]:
    """Name of a split -> its raw JSON file, of those that are there.

    Args:
        source: the raw data.
        splits: names of all splits.
    """
    for place in _PLACES:
        for folder in ("Annotations", "annotations"):
            found = {split: source / place / folder / f"{split}.json" for split in splits}
            found = {split: path for split, path in found.items() if path.is_file()}
            if found:
                return found
    return {}


def read_split(path: Path, split: str, *, require_images: Require = "annotated") -> RawSplit:
    """Read a raw JSON file and find its images.

    Args:
        path: the file.
        split: its name.
        require_images: which images must be there; `none`: they are not looked for.

    Returns:
        What it holds.

    Raises:
        InputError: it is malformed, or images are missing; the file and the entry are named.
    """
    document = _read_document(path)
    images = document["images"]
    position_of: dict[Any, int] = {}
    for position, image in enumerate(images):
        if not _is_image(image):
            raise InputError(
                f"{path}: entry {position} of 'images' is {image!r:.90}; it needs 'id', 'file_name', and 'width' and "
                f"'height' in pixels: {_AGAIN}"
            )
        if "start_coord" in image:
            raise InputError(f"{path} lists patches (start_coord), not images: give the raw data, as downloaded")
        if position_of.setdefault(image["id"], position) != position:
            raise InputError(f"{path}: two images have the id {image['id']}: {_AGAIN}")
    boxes_xywh, categories, owners = _read_annotations(path, document["annotations"], position_of)
    by_owner = np.argsort(owners, kind="stable")
    ends = np.searchsorted(owners[by_owner], np.arange(len(images) + 1))
    positions = [by_owner[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]
    order = sorted(range(len(images)), key=lambda one: positions[one][0] if len(positions[one]) else len(owners))
    needed = [require_images == "all" or (require_images == "annotated" and len(one) > 0) for one in positions]
    files = _find_images(path, split, [image["file_name"] for image in images], needed)
    return RawSplit(
        path,
        document,
        tuple(
            RawImage(
                images[one]["id"], files[one], int(images[one]["width"]), int(images[one]["height"]), positions[one]
            )
            for one in order
        ),
        boxes_xywh,
        categories,
    )


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; restore it") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}): {_AGAIN}") from None
    for key in ("images", "annotations"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise InputError(f"{path} has no list {key!r}, so it is no COCO file: {_AGAIN}")
    if not all(isinstance(one, dict) for one in document.get("categories") or []):
        raise InputError(f"{path}: 'categories' must be a list of objects with 'id' and 'name': {_AGAIN}")
    if not document["images"]:
        raise InputError(f"{path} lists no images: {_AGAIN}")
    return document


def _is_image(image: Any) -> bool:
    """Whether an entry of 'images' has what is needed."""
    if not isinstance(image, dict) or type(image.get("id")) is not int:
        return False
    name, sides = image.get("file_name"), (image.get("width"), image.get("height"))
    return isinstance(name, str) and bool(name) and all(_is_side(side) for side in sides)


def _is_side(side: Any) -> bool:
    return type(side) in (int, float) and side >= 1 and side == side // 1


def _read_annotations(
    path: Path, annotations: list[Any], position_of: dict[Any, int]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Boxes, categories, and the position of its image, of each annotation."""
    boxes, categories, owners = [], [], []
    for position, one in enumerate(annotations):
        box = one.get("bbox") if isinstance(one, dict) else None
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_coordinate, box))):
            raise _bad(path, position, one, "it needs 'bbox' with four numbers")
        if type(one.get("category_id")) is not int or not 1 <= one["category_id"] <= REGION:
            raise _bad(path, position, one, f"its 'category_id' must be 1 to {REGION}")
        owner = position_of.get(one.get("image_id")) if type(one.get("image_id")) is int else None
        if owner is None:
            raise _bad(path, position, one, "no image has its 'image_id'")
        boxes.append(box)
        categories.append(one["category_id"])
        owners.append(owner)
    return (
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(categories, dtype=np.int64),
        np.array(owners, dtype=np.int64),
    )


def _is_coordinate(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # false for NaN


def _bad(path: Path, position: int, one: Any, what: str) -> InputError:
    return InputError(f"{path}: entry {position} of 'annotations' is {one!r:.120}; {what}: {_AGAIN}")


def _find_images(path: Path, split: str, names: list[str], needed: list[bool]) -> list[Path]:
    """The file of each image; where one would lie that is not needed."""
    root = path.parent.parent
    folders = [root / top / inner for top in ("Images", "images") for inner in ("", split)]
    folders = [folder for folder in folders if folder.is_dir()]
    if any(needed) and not folders:
        raise InputError(f"{root} has no folder Images beside {path.parent.name}: unpack the images there")
    files, missing = [], []
    for name, is_needed in zip(names, needed, strict=True):
        places = [folder / name for folder in folders]
        found = next((place for place in places if place.is_file()), None) if is_needed else None
        if is_needed and found is None:
            missing.append(name)
        files.append(found or root / "Images" / name)
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} images of {path} are missing, the first {missing[0]}; looked in "
            f"{' and '.join(map(str, folders))}: unpack all images there"
        )
    return files
