"""Reading COCO annotation files into a `DatasetIndex`.

This is the only place that knows a dataset's own category ids: inside the package labels are contiguous 0..K-1.
Mistakes that spoil single boxes are mended or left out and counted (`Problems`); mistakes that make the file useless
raise `InputError`. All images are checked by their headers, so that a missing or swapped file is found before the
training begins and not hours later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdino.data.images import read_headers
from crossdino.errors import InputError

# Files round coordinates; a box that leaves the image by less than this is clipped without being counted.
ROUNDING_PX = 0.5

# Kinds of problems that make an annotation useless, or its id.
UNKNOWN_IMAGE = "annotations of unknown images left out"
UNKNOWN_CATEGORY = "annotations of unknown or unwanted categories left out"
NO_BOX = "annotations without a box of four numbers left out"
REPEATED_ID = "annotation ids used again"
SIZELESS = "boxes of no size left out"
OUTSIDE = "boxes outside their image left out"
CLIPPED = "boxes clipped to their image"


@dataclass
class Problems:
    """What was mended or left out while reading, by kind.

    Attributes:
        counts: kind of problem -> how often.
        examples: kind of problem -> the first few places.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, places: Sequence[str]) -> None:
        """Count a kind of problem once for each place."""
        if places:
            self.counts[kind] = self.counts.get(kind, 0) + len(places)
            kept = self.examples.setdefault(kind, [])
            kept.extend(places[: 3 - len(kept)])

    def __bool__(self) -> bool:
        """Whether there is anything to tell."""
        return bool(self.counts)

    def lines(self) -> list[str]:
        """One line a kind of problem, with its count and its first places; empty without problems."""
        return [
            f"{count} {kind}: {', '.join(self.examples[kind])}{', ...' if count > len(self.examples[kind]) else ''}"
            for kind, count in self.counts.items()
        ]


@dataclass(frozen=True)
class ImageRecord:
    """One image and its n annotated objects.

    Attributes:
        image_id: the dataset's own id.
        path: the image file.
        width: of the image in pixels, the way the boxes see it.
        height: likewise.
        boxes_xywh: (n, 4) float64, pixels, within the image, of positive width and height.
        labels: (n,) int64 in [0, K).
        areas: (n,) float64, the file's `area` (of the object, for size bands), or width x height where it has none.
        iscrowd: (n,) bool, true for regions that are ignored (no training targets).
        apply_exif: whether the file's EXIF orientation belongs to these boxes (see `load_coco`).
    """

    image_id: int
    path: Path
    width: int
    height: int
    boxes_xywh: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    iscrowd: NDArray[np.bool_]
    apply_exif: bool = True


@dataclass(frozen=True)
class DatasetIndex:
    """A dataset's images and objects, without the pixels.

    Attributes:
        annotations: the file it was read from.
        class_names: the K names, in the order of the labels.
        category_ids: the K category ids of the file, in the order of the labels (for output).
        records: the images in the file's order, those without objects included.
        problems: what was mended or left out.
    """

    annotations: Path
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: tuple[ImageRecord, ...]
    problems: Problems

    @property
    def num_objects(self) -> int:
        """Number of boxes that are training targets (crowds not counted)."""
        return sum(int((~record.iscrowd).sum()) for record in self.records)

    def refuse_bad_boxes(self) -> None:
        """Insist on boxes that need no mending.

        Raises:
            InputError: naming the file and the first annotations with a box outside the image, of no size, or without
                four numbers.
        """
        bad = (NO_BOX, SIZELESS, OUTSIDE, CLIPPED)
        lines = [
            line for kind, line in zip(self.problems.counts, self.problems.lines(), strict=True) if kind.startswith(bad)
        ]
        if lines:
            raise InputError(
                f"{self.annotations} has boxes that had to be mended: {'; '.join(lines)}. Correct the file, or accept "
                "this with --data.bad_boxes mend"
            )

    @property
    def label_of(self) -> dict[int, int]:
        """Category id of the file -> label; the other way is `category_ids[label]`."""
        return {category_id: label for label, category_id in enumerate(self.category_ids)}

    def to_coco(self) -> dict[str, Any]:
        """The dataset as it was understood (mended boxes, joined categories) in COCO's layout: the ground truth."""
        images = [
            {"id": record.image_id, "file_name": str(record.path), "width": record.width, "height": record.height}
            for record in self.records
        ]
        rows = [
            (
                record.image_id,
                record.labels[place],
                record.boxes_xywh[place],
                record.areas[place],
                record.iscrowd[place],
            )
            for record in self.records
            for place in range(len(record.labels))
        ]
        annotations = [
            {
                "id": number,
                "image_id": image_id,
                "category_id": self.category_ids[label],
                "bbox": box.tolist(),
                "area": float(area),
                "iscrowd": int(crowd),
            }
            for number, (image_id, label, box, area, crowd) in enumerate(rows, start=1)
        ]
        pairs = zip(self.category_ids, self.class_names, strict=True)
        categories = [{"id": category_id, "name": name} for category_id, name in pairs]
        return {"images": images, "annotations": annotations, "categories": categories}


def load_coco(
    annotations: str | Path,
    images: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    require_images: bool = True,
) -> DatasetIndex:
    """Read a COCO detection file and find its images.

    Categories may have any integer ids; without `class_names` labels follow the ids' order. Categories of one name
    become one label. Boxes are clipped to the image; those without finite numbers or without any size left are dropped
    and counted, as are annotations of unknown images or categories.

    The size that the file declares for an image must be the real one, because the boxes are in its pixels. Where an
    EXIF orientation turns the image, the declared size says whether the boxes were drawn on the turned image or on the
    stored pixels, and the image is read that way (orientations that keep the size, as 180 degrees, are applied).

    Args:
        annotations: the JSON file.
        images: folder of the images; None looks in the JSON file's folder, in a folder of the JSON file's stem, and in
            `images` beside it, and takes the one which holds the files.
        class_names: names in the wanted order of the labels (those of a trained model); the file's other categories
            are dropped and counted.
        require_images: False reads the annotations only, and never looks for the images (evaluation of a predictions
            file); records then have the paths that the images would have.

    Returns:
        The index.

    Raises:
        InputError: the file cannot be used, an image is missing or has another size than declared.
    """
    source = Path(annotations)
    document = _read_document(source)
    problems = Problems()
    names, category_ids, label_of = _read_categories(source, document["categories"], class_names, problems)
    entries = _read_images(source, document["images"], require_images)
    folder = _find_folder(source, None if images is None else Path(images), entries, require_images)
    blank = np.zeros((0, 4))
    records = [
        ImageRecord(image_id, folder / name, *size, blank, blank[:, 0].astype(np.int64), blank[:, 0], blank[:, 0] > 0)
        for image_id, name, size in entries
    ]
    if require_images:
        headers = read_headers([record.path for record in records])
        records = [_check_size(source, record, *header) for record, header in zip(records, headers, strict=True)]
    records = _attach_objects(source, document["annotations"], records, label_of, names, problems)
    return DatasetIndex(source, names, category_ids, tuple(records), problems)


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
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _read_categories(
    source: Path, categories: list[dict[str, Any]], wanted: Sequence[str] | None, problems: Problems
) -> tuple[tuple[str, ...], tuple[int, ...], dict[int, int]]:
    """Class names and category ids in the order of the labels, and the label of every usable category id."""
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
    ids_of: dict[str, list[int]] = {}
    for category_id in sorted(name_of):
        ids_of.setdefault(name_of[category_id], []).append(category_id)
    problems.add("categories of one name joined", [repr(name) for name, ids in ids_of.items() if len(ids) > 1])
    names = tuple(ids_of) if wanted is None else tuple(wanted)
    absent = [name for name in names if name not in ids_of]
    if absent:
        raise InputError(
            f"{source} has no category {absent[0]!r}, which the model's classes ask for; its categories are "
            f"{', '.join(map(repr, list(ids_of)[:10]))}: rename them, or add the missing one"
        )
    label_of = {category_id: label for label, name in enumerate(names) for category_id in ids_of[name]}
    return names, tuple(ids_of[name][0] for name in names), label_of


def _read_images(
    source: Path, images: list[dict[str, Any]], require_images: bool
) -> list[tuple[int, str, tuple[int, int]]]:
    """(id, file name, (width, height)) of every image; (0, 0) where the file gives no size."""
    entries: list[tuple[int, str, tuple[int, int]]] = []
    seen: set[int] = set()
    for position, image in enumerate(images):
        image_id, name = _as_id(image.get("id")), image.get("file_name")
        if image_id is None:
            raise InputError(
                f"{source}: entry {position} of 'images' has the id {image.get('id')!r:.40}; it must be an integer"
            )
        if image_id in seen:
            raise InputError(f"{source}: two images have the id {image_id}; give each its own")
        if not isinstance(name, str) or not name:
            raise InputError(f"{source}: image {image_id} has no 'file_name'; add it")
        seen.add(image_id)
        width, height = _as_id(image.get("width")) or 0, _as_id(image.get("height")) or 0
        size = (width, height) if width > 0 and height > 0 else (0, 0)
        if size == (0, 0) and not require_images:
            raise InputError(f"{source}: image {image_id} ({name}) has no 'width' and 'height'; add them")
        entries.append((image_id, name.replace("\\", "/"), size))
    if not entries:
        raise InputError(f"{source}: 'images' is empty; list the images there")
    return entries


def _find_folder(
    source: Path, images: Path | None, entries: list[tuple[int, str, tuple[int, int]]], require_images: bool
) -> Path:
    """The folder which holds the image files, all of them."""
    if images is not None and require_images and not images.is_dir():
        raise InputError(f"image folder {images} does not exist; give the folder of the images listed in {source}")
    near = [source.parent, source.parent / source.stem, source.parent / "images"]
    folders = near if images is None else [images]
    names = [name for _, name, _ in entries]
    folder = max(folders, key=lambda candidate: sum((candidate / name).is_file() for name in names[:20]))
    if require_images:
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            where = (
                f"folder {folder}"
                if len(folders) == 1 or len(missing) < len(names)
                else "folders " + ", ".join(str(candidate) for candidate in folders)
            )
            raise InputError(
                f"{len(missing)} of the {len(names)} images listed in {source} are missing, first {missing[0]} (looked "
                f"in {where}); restore them, or give the folder that holds them"
            )
    return folder


def _check_size(source: Path, record: ImageRecord, shown: tuple[int, int], stored: tuple[int, int]) -> ImageRecord:
    """The record with the image's real size, after comparing it with the declared one (all are width, height)."""
    declared = (record.width, record.height)
    if declared in ((0, 0), shown):
        return replace(record, width=shown[0], height=shown[1])
    if declared == stored:
        return replace(record, apply_exif=False)
    raise InputError(
        f"image {record.path} has {shown[0]} x {shown[1]} pixels, but {source} declares {declared[0]} x {declared[1]}: "
        "the boxes belong to another version of it; restore that one, or correct 'width', 'height' and the boxes"
    )


def _attach_objects(
    source: Path,
    annotations: list[dict[str, Any]],
    records: list[ImageRecord],
    label_of: dict[int, int],
    names: tuple[str, ...],
    problems: Problems,
) -> list[ImageRecord]:
    """The records with their boxes; what cannot be used is counted in `problems`."""
    position_of = {record.image_id: position for position, record in enumerate(records)}
    spoilt: dict[str, list[int]] = {kind: [] for kind in (UNKNOWN_IMAGE, UNKNOWN_CATEGORY, NO_BOX, REPEATED_ID)}
    seen: set[int] = set()
    used: list[int] = []
    rows: list[tuple[float, ...]] = []
    for index, annotation in enumerate(annotations):
        image_id, category_id = _as_id(annotation.get("image_id")), _as_id(annotation.get("category_id"))
        position = None if image_id is None else position_of.get(image_id)
        label = None if category_id is None else label_of.get(category_id)
        box = _as_box(annotation.get("bbox"))
        own_id = _as_id(annotation.get("id"))
        if own_id in seen:
            spoilt[REPEATED_ID].append(index)
        elif own_id is not None:
            seen.add(own_id)
        if position is None:
            spoilt[UNKNOWN_IMAGE].append(index)
        elif label is None:
            spoilt[UNKNOWN_CATEGORY].append(index)
        elif box is None:
            spoilt[NO_BOX].append(index)
        else:
            area = annotation.get("area")
            area = area if isinstance(area, int | float) and 0 < area < 1e18 else math.nan
            used.append(index)
            rows.append((position, label, *box, area, bool(annotation.get("iscrowd"))))

    def places(indices: Sequence[int]) -> list[str]:
        """Where the annotations stand, for the user."""
        return [
            f"annotation {annotations[index].get('id')!r:.20} of image {annotations[index].get('image_id')!r:.20}"
            for index in indices
        ]

    for kind, indices in spoilt.items():
        if kind in (UNKNOWN_IMAGE, UNKNOWN_CATEGORY) and indices and len(indices) == len(annotations):
            raise InputError(
                f"{source}: all {kind}, first {places(indices[:1])[0]}; its lists come from different datasets, or "
                f"the wanted classes ({', '.join(names[:5])}) are not those of its boxes"
            )
        problems.add(kind, places(indices))

    table = np.array(rows, dtype=np.float64).reshape(-1, 8)
    boxes = table[:, 2:6]
    owner = table[:, 0].astype(np.int64)
    if (boxes > 0).all(1).any() and (boxes <= 1.0).all():
        raise InputError(f"{source}: all boxes lie between 0 and 1; COCO boxes are pixels: multiply by the image size")
    sizes = np.array([(record.width, record.height) for record in records], dtype=np.float64)[owner]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    clipped = corners.clip(0, np.tile(sizes, 2))
    sizeless = ~(boxes[:, 2:] > 0).all(1)
    outside = ~sizeless & ~(clipped[:, 2:] > clipped[:, :2]).all(1)
    keep = ~sizeless & ~outside
    moved = keep & (np.abs(clipped - corners) > ROUNDING_PX).any(1)
    problems.add(SIZELESS, places([used[row] for row in np.flatnonzero(sizeless)]))
    problems.add(OUTSIDE, places([used[row] for row in np.flatnonzero(outside)]))
    kind = CLIPPED
    if moved.sum() + outside.sum() > 0.3 * len(boxes):
        kind += " (so many that they may be x1 y1 x2 y2 instead of COCO's x y width height)"
    problems.add(kind, places([used[row] for row in np.flatnonzero(moved)]))

    table, clipped = table[keep], clipped[keep]
    order = np.argsort(table[:, 0], kind="stable")
    table, clipped = table[order], clipped[order]
    boxes = np.concatenate([clipped[:, :2], clipped[:, 2:] - clipped[:, :2]], axis=1)
    areas = np.where(np.isnan(table[:, 6]), boxes[:, 2] * boxes[:, 3], table[:, 6])
    starts = np.searchsorted(table[:, 0], np.arange(len(records) + 1))
    unused = sorted(set(range(len(names))) - set(table[:, 1].astype(int).tolist()))
    problems.add("classes without any box", [repr(names[label]) for label in unused])
    return [
        replace(
            record,
            boxes_xywh=boxes[start:stop],
            labels=table[start:stop, 1].astype(np.int64),
            areas=areas[start:stop],
            iscrowd=table[start:stop, 7] > 0,
        )
        for record, start, stop in zip(records, starts[:-1], starts[1:], strict=True)
    ]


def _as_box(value: object) -> tuple[float, float, float, float] | None:
    """A JSON value as four finite numbers; None when it is not that."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    for number in value:
        if not isinstance(number, int | float) or not abs(number) < 1e9:  # NaN is not below anything
            return None
    return value[0], value[1], value[2], value[3]
