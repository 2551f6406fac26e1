"""Reading COCO detection files, and finding them in a folder.

Source: the data format section of cocodataset.org, and the folders that COCO itself, Roboflow and FiftyOne write.
Mistakes that spoil single boxes are mended or left out and listed (`Problems`); mistakes that make the file useless
raise `InputError`. Unlike pycocotools, categories of one name are one class, and an image that is listed twice is one
image.
"""

from __future__ import annotations

import json
import math
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossdino.data.check import Check, Progress, check_images
from crossdino.data.index import (
    CLIPPED,
    CORNERS,
    NO_BOX,
    OUTSIDE,
    DatasetIndex,
    ImageRecord,
    Problems,
    empty_record,
    refuse_fatal,
)
from crossdino.data.objects import (
    Classes,
    RawObject,
    attach_objects,
    choose_classes,
    note_unused_classes,
    settle_sizes,
)
from crossdino.errors import InputError

UNKNOWN_IMAGE = "annotation of an unknown image"
UNKNOWN_CATEGORY = "annotation of an unknown or unwanted category"
REPEATED_ID = "annotation id used again"
REPEATED_IMAGE = "image listed twice"
NO_BBOX = "annotation without 'bbox': the box of its polygons is taken"

# The annotation files that lie in the folder of a split: Roboflow's, FiftyOne's, and plain ones.
NAMES_IN_SPLIT = ("_annotations.coco.json", "annotations.json", "labels.json")
# The one file of a data set that has no splits: the same ones, Label Studio's and CVAT's.
NAMES_ALONE = (*NAMES_IN_SPLIT, "result.json", "annotations/instances_default.json")


@dataclass(frozen=True)
class CocoSplit:
    """One split of a data set in COCO's format.

    Attributes:
        annotations: the JSON file.
        images: the folder of its images; None: `load_coco` looks for it.
    """

    annotations: Path
    images: Path | None = None

    @property
    def place(self) -> str:
        """Where it lies, for messages."""
        return str(self.annotations)


def find_coco(folder: Path, split: str, aliases: Sequence[str]) -> CocoSplit | None:
    """The COCO file of a split in a folder, or None.

    Known are `SPLIT.json`; `annotations/instances_SPLIT*.json` (or the one other file of the split there) with the
    images in the folder of the same name; and a folder of the split that holds `_annotations.coco.json` or the like.

    Args:
        folder: of the data set.
        split: `train`, `val` or `test`.
        aliases: the names that the split may have.

    Raises:
        InputError: several files could be meant.
    """
    beside = [folder / f"{name}.json" for name in aliases]
    inside = [folder / name / file for name in aliases for file in (*NAMES_IN_SPLIT, f"{name}.json")]
    found = [path for path in beside if path.is_file()] or [path for path in inside if path.is_file()]
    if not found:
        names = sorted(path for path in (folder / "annotations").glob("*.json") if not path.name.startswith("."))
        found = [path for path in names if _tells_split(path.stem, split, aliases)]
        found = [path for path in found if path.name.startswith("instances_")] or found
        if split == "train":  # `trainval` is for training where nothing else is
            found = [path for path in found if "trainval" not in path.stem.lower()] or found
        if split == "test":  # COCO's lists of test images come without annotations
            found = [path for path in found if not path.name.startswith("image_info_")]
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found)
        raise InputError(
            f"{folder} has several files for {split} ({names}); choose by --data.{split}_annotations, or write the "
            "one into a YAML file"
        )
    if not found:
        return None
    images = None
    if found[0].parent == folder / "annotations":
        name = found[0].stem.removeprefix("instances_")
        places = [folder / top / inner for inner in (name, *aliases) for top in (".", "images")]
        images = next((place for place in (*places, folder / "images") if place.is_dir()), folder)
    return CocoSplit(found[0], images)


def find_coco_alone(folder: Path) -> CocoSplit | None:
    """The COCO file of a data set without splits, where nothing else was found; its images are for training."""
    found = [path for path in (folder / name for name in NAMES_ALONE) if path.is_file()]
    return CocoSplit(found[0]) if len(found) == 1 else None


def _tells_split(stem: str, split: str, aliases: Sequence[str]) -> bool:
    """Whether a file's name tells that it is of the split; `trainval` is of `train`."""
    stem = stem.lower()
    return any(alias in stem for alias in aliases) and (split == "train" or "train" not in stem)


def load_coco(
    annotations: str | Path,
    images: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    require_images: bool = True,
    *,
    ignore_categories: Sequence[str] = (),
    check: Check = "headers",
    on_progress: Progress | None = None,
) -> DatasetIndex:
    """Read a COCO detection file and find its images.

    Categories may have any integer ids; without `class_names` labels follow the ids' order. Ids that are written as
    text ("0017") count as these numbers. Categories of one name become one label, and the id with the most boxes stands
    for them. Boxes are clipped to the image; those without finite numbers, without any size left, or given
    twice are dropped, as are annotations of unknown images or categories. An image that is listed twice becomes one,
    with the objects of both. All of that is listed in the index's `problems`.

    The size that the file declares for an image must be the real one, because the boxes are in its pixels. Where an
    EXIF orientation turns the image, the declared size says whether the boxes were drawn on the turned image or on the
    stored pixels, and the image is read that way (orientations that keep the size, as 180 degrees, are applied).

    Args:
        annotations: the JSON file.
        images: folder of the images; None looks in the JSON file's folder, in a folder of the JSON file's stem, and in
            `images` and `data` beside it (for a file in a folder `annotations`, also beside that folder), and takes the
            one which holds the files.
        class_names: names in the wanted order of the labels (those of a trained model); the file's other categories
            are dropped and listed.
        require_images: False reads the annotations only, and never looks for the images (evaluation of a predictions
            file); records then have the paths that the images would have.
        ignore_categories: names of categories whose boxes are regions to ignore for every class.
        check: `full` decodes every image, `headers` reads their headers (see `check_images`).
        on_progress: called as `on_progress(done, total)` while images are checked.

    Returns:
        The index.

    Raises:
        InputError: the file cannot be used; where single images are at fault it is a `DataError` that holds all
            problems: missing or unreadable ones, and those of another size than declared.
    """
    source = Path(annotations)
    document = _read_document(source)
    problems = Problems()
    name_of = _read_categories(source, document["categories"])
    uses = Counter(_as_id(annotation.get("category_id")) for annotation in document["annotations"])
    classes = choose_classes(source, name_of, class_names, ignore_categories, problems, absent_allowed=False, uses=uses)
    records, position_of = _read_images(source, document["images"], require_images, problems)
    folder, looked_in = _find_folder(source, None if images is None else Path(images), records, require_images)
    records = [empty_record(record.image_id, folder / record.path, (record.width, record.height)) for record in records]
    if require_images:
        facts = check_images([record.path for record in records], check, on_progress)
        records = settle_sizes(records, facts, lambda position: str(source), problems, looked_in)
    objects, place_of = _read_objects(source, document["annotations"], position_of, classes, problems)
    records = attach_objects(records, objects, place_of, problems)
    counts = problems.counts
    could_be_corners = all(0 <= item.box_xywh[side] <= item.box_xywh[side + 2] for item in objects for side in (0, 1))
    if could_be_corners and counts.get(CLIPPED, 0) + counts.get(OUTSIDE, 0) > 0.3 * len(objects):
        problems.add(source, "", CORNERS, "noted", "so many of them leave their image")
    note_unused_classes(source, classes.names, records, problems)
    refuse_fatal(source, problems, len(document["images"]))
    return DatasetIndex(source, classes.names, classes.category_ids, tuple(records), problems)


def _read_document(source: Path) -> dict[str, Any]:
    """The JSON file's object with its three lists."""
    try:
        text = source.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"annotation file {source} does not exist; give the path of a COCO JSON file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"annotation file {source} cannot be read ({error}); give a COCO JSON file") from None
    if not text.strip():
        raise InputError(f"annotation file {source} is empty; write or download it again")
    try:
        document = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{source} is not valid JSON ({error}); write or download it again") from None
    if isinstance(document, list):
        raise InputError(
            f"{source} is a JSON list, as predictions are; give the COCO file with 'images', 'annotations' and "
            "'categories'"
        )
    keys = ("images", "annotations", "categories")
    missing = [key for key in keys if not isinstance(document, dict) or not isinstance(document.get(key), list)]
    if missing:
        raise InputError(
            f"{source} is not a COCO detection file: no list {' and no list '.join(map(repr, missing))}; convert the "
            "dataset to COCO JSON first"
        )
    for key in keys:
        for position, entry in enumerate(document[key]):
            if not isinstance(entry, dict):
                raise InputError(f"{source}: entry {position} of '{key}' is {entry!r:.60}; it must be a JSON object")
    return document


def _as_id(value: object) -> int | None:
    """A JSON value as an integer id; None when it is none."""
    if type(value) is int:
        return value if abs(value) < 1 << 63 else None  # tables of ids hold 64 bits
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e18 else None


def _read_categories(source: Path, categories: list[dict[str, Any]]) -> dict[int, str]:
    """Category id -> name."""
    name_of: dict[int, str] = {}
    for position, category in enumerate(categories):
        category_id, name = _as_id(category.get("id")), category.get("name")
        if category_id is None or not isinstance(name, str) or not name.strip():
            raise InputError(
                f"{source}: entry {position} of 'categories' is {category!r:.80}; it needs an integer 'id' and a 'name'"
            )
        if category_id in name_of:
            raise InputError(f"{source}: two categories have the id {category_id}; give each its own")
        name_of[category_id] = name
    if not name_of:
        raise InputError(f"{source}: 'categories' is empty; list the classes there, each with 'id' and 'name'")
    return name_of


def _read_images(
    source: Path, images: list[dict[str, Any]], require_images: bool, problems: Problems
) -> tuple[list[ImageRecord], dict[int, int]]:
    """A record of each image file (path relative, size as declared), and image id -> position of its record."""
    if not images:
        raise InputError(f"{source}: 'images' is empty; list the images there")
    records: list[ImageRecord] = []
    position_of: dict[int, int] = {}
    position_of_file: dict[str, int] = {}
    for number, image in enumerate(images):
        image_id, name = _as_id(image.get("id")), image.get("file_name")
        if image_id is None:
            what, detail = "image without an integer id", repr(image.get("id"))[:40]
            problems.add(source, f"entry {number} of 'images'", what, "fatal", detail)
            continue
        place = f"image {image_id}"
        if not isinstance(name, str) or not name:
            problems.add(source, place, "image without a 'file_name'", "fatal")
            continue
        name = posixpath.normpath(name.replace("\\", "/"))
        known = position_of_file.setdefault(name, len(records))
        if position_of.get(image_id, known) != known:
            what = "id of several images"
            problems.add(source, place, what, "fatal", f"{records[position_of[image_id]].path} and {name}")
            continue
        position_of[image_id] = known
        if known < len(records):
            detail = f"{name}, first as image {records[known].image_id}"
            problems.add(source, place, REPEATED_IMAGE, "joined", detail)
            continue
        width, height = _as_id(image.get("width")) or 0, _as_id(image.get("height")) or 0
        size_wh = (width, height) if width > 0 and height > 0 else (0, 0)
        if size_wh == (0, 0) and not require_images:
            problems.add(source, place, "image without 'width' and 'height'", "fatal", name)
        records.append(empty_record(image_id, Path(name), size_wh))
    if not records:
        refuse_fatal(source, problems, len(images))
    return records, position_of


def _find_folder(
    source: Path, images: Path | None, records: list[ImageRecord], require_images: bool
) -> tuple[Path, str]:
    """The folder which holds most of the image files, and the words that tell where they were looked for."""
    if images is not None and require_images and not images.is_dir():
        raise InputError(f"image folder {images} does not exist; give the folder of the images listed in {source}")
    names = [".", source.stem, "images", "data", f"images/{source.stem}"]
    if source.parent.name.lower() == "annotations":  # as in COCO itself: beside that folder
        name = source.stem.removeprefix("instances_")
        names += ["..", f"../{name}", "../images", f"../images/{name}"]
    folders = [Path(os.path.normpath(source.parent / name)) for name in names] if images is None else [images]
    sample = [record.path for record in records[:20]]
    found = [sum((folder / name).is_file() for name in sample) for folder in folders]
    best = folders[found.index(max(found))]
    if max(found) or len(folders) == 1:
        return best, f"looked in the folder {best}"
    return best, "looked in the folders " + ", ".join(str(folder) for folder in folders)


def _read_objects(
    source: Path,
    annotations: list[dict[str, Any]],
    position_of: dict[int, int],
    classes: Classes,
    problems: Problems,
) -> tuple[list[RawObject], Callable[[int], tuple[str, str]]]:
    """The annotations that can be understood, and where each of them stands."""

    def place(number: int) -> tuple[str, str]:
        entry = annotations[number]
        own = f"annotation {entry['id']!r:.20}" if "id" in entry else f"entry {number} of 'annotations'"
        return str(source), f"{own} of image {entry.get('image_id')!r:.20}"

    spoilt: dict[str, int] = {}

    def drop(number: int, what: str, detail: str = "") -> None:
        problems.add(*place(number), what, "dropped", detail)
        spoilt[what] = spoilt.get(what, 0) + 1

    seen: set[int] = set()
    used: list[int] = []
    objects: list[RawObject] = []
    for number, annotation in enumerate(annotations):
        image_id, category_id = _as_id(annotation.get("image_id")), _as_id(annotation.get("category_id"))
        position = None if image_id is None else position_of.get(image_id)
        label = None if category_id is None else classes.label_of.get(category_id)
        box = _as_box(annotation.get("bbox"))
        if box is None and not annotation.get("bbox"):
            box = _box_of_polygons(annotation.get("segmentation"))
            if box is not None:
                problems.add(*place(number), NO_BBOX, "noted")
        own_id = _as_id(annotation.get("id"))
        if own_id is not None and own_id in seen:
            problems.add(*place(number), REPEATED_ID, "noted")
        elif own_id is not None:
            seen.add(own_id)
        if position is None:
            drop(number, UNKNOWN_IMAGE)
        elif label is None:
            drop(number, UNKNOWN_CATEGORY, f"category {annotation.get('category_id')!r:.20}")
        elif box is None:
            drop(number, NO_BOX, f"{annotation.get('bbox')!r:.60}" if "bbox" in annotation else "no 'bbox'")
        else:
            area = annotation.get("area")
            area = float(area) if isinstance(area, int | float) and 0 < area < 1e18 else math.nan
            used.append(number)
            # TinyPerson and others mark with `ignore` what is unclear.
            ignored = _is_set(annotation.get("iscrowd")) or _is_set(annotation.get("ignore"))
            objects.append(RawObject(position, label, box, area, ignored))
    for what in (UNKNOWN_IMAGE, UNKNOWN_CATEGORY):
        if annotations and spoilt.get(what) == len(annotations) and not problems.fatal:
            raise InputError(
                f"{source}: every {what}, first {place(0)[1]}; its lists come from different datasets, or the wanted "
                f"classes ({', '.join(classes.names[:5])}) are not those of its boxes"
            )
    boxes = [item.box_xywh for item in objects]
    if any(min(box) > 0 for box in boxes) and all(max(box) <= 1.0 for box in boxes):
        raise InputError(f"{source}: all boxes lie between 0 and 1; COCO boxes are pixels: multiply by the image size")
    return objects, lambda row: place(used[row])


def _is_set(value: object) -> bool:
    """Whether a JSON value says yes; some programs write all values as text."""
    return bool(value) and str(value).lower() not in ("0", "0.0", "false")


def _as_box(value: object) -> tuple[float, float, float, float] | None:
    """A JSON value as four finite numbers; None when it is not that."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    for number in value:
        if not isinstance(number, int | float) or not abs(number) < 1e9:  # NaN is not below anything
            return None
    return value[0], value[1], value[2], value[3]


def _box_of_polygons(value: object) -> tuple[float, float, float, float] | None:
    """The bounding box of COCO's polygons (lists of x y x y ...); None when they are none."""
    parts = value if isinstance(value, list) else []
    if not parts or not all(isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 for part in parts):
        return None
    numbers = [number for part in parts for number in part]
    if not all(isinstance(number, int | float) and abs(number) < 1e9 for number in numbers):
        return None
    xs, ys = numbers[::2], numbers[1::2]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
