"""Reading data sets in the layout of YOLO (Darknet, ultralytics, Roboflow): one text file of labels beside each image.

Source: the description of the format in ultralytics' documentation (datasets/detect, segment, obb, pose). A line is
`class cx cy width height`, or a class and a polygon, as shares of the image's width and height. Where we differ:
boxes that leave the image are clipped and listed instead of discarding the whole image; a label file may also lie
beside its image; folders are looked for near the YAML file, never in a place that is set on the machine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossdino.data.check import Check, Progress, check_images
from crossdino.data.images import IMAGE_SUFFIXES
from crossdino.data.index import BAD_CLASS, NO_BOX, DatasetIndex, ImageRecord, Problems, empty_record, refuse_fatal
from crossdino.data.objects import (
    Classes,
    RawObject,
    attach_objects,
    choose_classes,
    note_unused_classes,
    settle_sizes,
)
from crossdino.errors import InputError

UNWANTED = "object of an unwanted class"
CONFIDENCE = "sixth value, taken for a confidence"
UNLABELLED = "image without a label file, taken as one without objects"
ORPHAN = "label file without an image"
LISTED_TWICE = "image listed twice"
UNREADABLE = "label file cannot be read"


@dataclass(frozen=True)
class YoloSplit:
    """One split of a data set in YOLO's layout.

    Attributes:
        source: the YAML file, or the folder where there is none.
        images: folders of images (searched to any depth) and text files that list images.
        names: class index -> name; empty where nobody tells them.
        num_keypoint_values: numbers that follow the box in lines with key points; 0: the data set has none.
        root: the folder that the YAML file gives as `path`; None: that of `source`.
    """

    source: Path
    images: tuple[Path, ...]
    names: Mapping[int, str]
    num_keypoint_values: int = 0
    root: Path | None = None

    @property
    def place(self) -> str:
        """Where it lies, for messages."""
        return ", ".join(map(str, self.images))


def read_yolo_file(
    source: Path, values: Mapping[str, Any], aliases: Mapping[str, Sequence[str]]
) -> dict[str, YoloSplit]:
    """The splits that a YAML data file names.

    Args:
        source: the YAML file.
        values: its content, all scalars as text.
        aliases: split -> the names that it may have.

    Raises:
        InputError: names are missing or do not fit `nc`, `kpt_shape` is no list of numbers, or a folder of `train` or
            `val` does not exist.
    """
    names = read_names(source, values)
    shape = values.get("kpt_shape")
    try:
        num_values = math.prod(int(number) for number in shape) if isinstance(shape, list) else 0
    except (TypeError, ValueError):
        raise InputError(
            f"{source}: 'kpt_shape' is {shape}; give the numbers of key points and of their values"
        ) from None
    root = find_root(source, values.get("path"))
    splits: dict[str, YoloSplit] = {}
    for split, keys in aliases.items():
        entry = next((values[key] for key in keys if values.get(key)), None)
        if entry is None:
            continue
        places = [_find_place(root, text) for text in (entry if isinstance(entry, list) else [entry])]
        if all(place.exists() for place in places):
            splits[split] = YoloSplit(source, tuple(places), names, num_values, root)
        elif split != "test":  # the test images are often left out of what is handed on
            absent = next(place for place in places if not place.exists())
            raise InputError(
                f"{source} names {absent} for {split}, which does not exist; correct 'path' or '{split}' there "
                "(relative to the YAML file), or take the line out"
            )
    return splits


def read_names(source: Path, values: Mapping[str, Any]) -> dict[int, str]:
    """Class index -> name, as `names` of a YAML data file tells them.

    Raises:
        InputError: they are missing, or do not fit `nc`.
    """
    names, count = values.get("names"), values.get("nc")
    pairs: dict[Any, Any] = (
        names if isinstance(names, dict) else dict(enumerate(names if isinstance(names, list) else []))
    )
    try:
        name_of = {int(index): str(name).strip() for index, name in pairs.items()}
        declared = int(count) if count else len(name_of)
    except (TypeError, ValueError):
        raise InputError(
            f"{source}: 'names' must be a list, or a mapping of class index to name, and 'nc' a number"
        ) from None
    if not name_of:
        raise InputError(f"{source} has no 'names'; list the class names there, in the order of their indices")
    if not all(name_of.values()):
        raise InputError(f"{source}: a name in 'names' is empty; give every class one")
    if min(name_of) < 0 or declared != len(name_of):
        raise InputError(f"{source}: nc is {declared}, but 'names' has {len(name_of)}; correct one of them")
    return name_of


def find_root(source: Path, path: object) -> Path:
    """The folder that a YAML data file calls `path`; where there is none of that name, the YAML file's own.

    A `path` that does not exist was written for another machine: what lies beside the YAML file is meant.
    """
    root = source.parent / str(path or ".").replace("\\", "/")
    return root if root.is_dir() else source.parent


def _find_place(root: Path, text: object) -> Path:
    """A folder or list as a YAML file names it; where it does not exist, the most likely meaning."""
    name = str(text).replace("\\", "/")
    candidates = [root / name]
    if name.startswith("../"):  # Roboflow writes its folders so, although they lie beside the YAML file
        candidates.append(root / name.removeprefix("../"))
    return next((place for place in candidates if place.exists()), candidates[0])


def find_yolo(folder: Path, split: str, aliases: Sequence[str], names: Mapping[int, str]) -> YoloSplit | None:
    """The images of a split in a folder whose splits no YAML file tells, or None.

    Known are `images/SPLIT` with `labels/SPLIT`, `SPLIT/images` with `SPLIT/labels`, images and labels together in
    `SPLIT`, and `images` with `labels` alone, which are for training.

    Args:
        folder: of the data set.
        split: `train`, `val` or `test`.
        aliases: the names that the split may have.
        names: class index -> name; where it is empty, the names stand in `classes.txt`.
    """
    pairs = [(folder / "images" / name, folder / "labels" / name) for name in aliases]
    pairs += [(folder / name / "images", folder / name / "labels") for name in aliases]
    images = next((images for images, labels in pairs if images.is_dir() and labels.is_dir()), None)
    if images is None:
        together = [folder / name for name in aliases]
        images = next((place for place in together if place.is_dir() and _has_labels_beside(place)), None)
    if (
        images is None
        and split == "train"
        and not any((folder / "images" / name).is_dir() for name in ("train", "val"))
    ):
        flat = folder / "images", folder / "labels"
        has_labels = flat[1].is_dir() and any(flat[1].glob("*.txt"))
        images = flat[0] if flat[0].is_dir() and has_labels else None
    if images is None:
        return None
    places = (folder, folder / "labels", images, images.parent, _label_path(images / "x").parent)
    files = [place / "classes.txt" for place in places]
    file = next((file for file in files if file.is_file()), None)
    lines = [] if file is None else _read_lines(file)
    return YoloSplit(folder, (images,), names or dict(enumerate(line.strip() for line in lines if line.strip())))


def _has_labels_beside(folder: Path) -> bool:
    """Whether images of a folder have label files beside them."""
    return any(path.with_suffix(".txt").is_file() for path in _list_folder(folder)[:20])


def _list_folder(folder: Path) -> list[Path]:
    """The images in a folder and the folders below it."""
    found: list[Path] = []
    seen: set[str] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:  # a link to a folder that was searched already, perhaps to one above it
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        # A leading point: what operating systems leave behind, such as ._a.jpg.
        found += [
            Path(root, name)
            for name in names
            if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    return sorted(found)


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); write it again as UTF-8 text") from None


def _label_path(image: Path) -> Path:
    """Where an image's labels belong: the last folder `images` of its path becomes `labels`."""
    parts = list(image.parent.parts)
    for place in reversed(range(len(parts))):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts) / f"{image.stem}.txt"


def load_yolo(
    split: YoloSplit,
    class_names: Sequence[str] | None = None,
    *,
    ignore_categories: Sequence[str] = (),
    check: Check = "headers",
    on_progress: Progress | None = None,
) -> DatasetIndex:
    """Read a split in YOLO's layout.

    A line of 5 numbers is a box, of 6 a box and a confidence (which is not used, and noted), of 7, 9, 11 ... a class
    and a polygon (or the corners of an oriented box), which becomes its bounding box; in data sets with `kpt_shape` it
    is a box and key points, which are not used. Labels follow the class indices of the file.

    Args:
        split: what to read, see `find_splits`.
        class_names: names in the wanted order of the labels; other classes are dropped and listed, and names that this
            data set does not have are classes without objects.
        ignore_categories: names of classes whose boxes are regions to ignore for every class.
        check: `full` decodes every image, `headers` reads their headers (see `check_images`).
        on_progress: called as `on_progress(done, total)` while images are checked.

    Returns:
        The index; `category_ids` are the file's own class indices, image ids count from 1.

    Raises:
        InputError: the data cannot be used; where single files are at fault it is a `DataError` that holds all
            problems.
    """
    if not split.names:
        raise InputError(f"{split.source} tells no class names; write data.yaml with 'names', or classes.txt, into it")
    problems = Problems()
    classes = choose_classes(split.source, split.names, class_names, ignore_categories, problems, absent_allowed=True)
    records = [empty_record(number, path) for number, path in enumerate(_list_images(split, problems), start=1)]
    facts = check_images([record.path for record in records], check, on_progress)
    records = settle_sizes(records, facts, lambda position: str(split.source), problems)
    objects, place_of = _read_labels(split, records, classes, problems)
    records = attach_objects(records, objects, place_of, problems)
    note_unused_classes(split.source, classes.names, records, problems)
    refuse_fatal(split.source, problems, len(records))
    return DatasetIndex(split.source, classes.names, classes.category_ids, tuple(records), problems)


def _list_images(split: YoloSplit, problems: Problems) -> list[Path]:
    """All images of a split, each once."""
    paths: dict[Path, None] = {}
    for source in split.images:
        if source.is_dir():
            paths |= dict.fromkeys(_list_folder(source))
            continue
        for number, line in enumerate(_read_lines(source), start=1):
            name = line.strip().replace("\\", "/")
            if not name:
                continue
            # Relative to the list, as ultralytics reads it, or to the data set, as others write it.
            roots = (source.parent, split.root or split.source.parent, split.source.parent)
            places = [Path(os.path.normpath(root / name)) for root in roots]
            path = next((place for place in places if place.is_file()), places[0])
            if path in paths:
                problems.add(source, f"line {number}", LISTED_TWICE, "joined", name)
            paths[path] = None
    if not paths:
        raise InputError(
            f"{split.source}: no image in {split.place}; its files must end in {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return list(paths)


def _read_labels(
    split: YoloSplit, records: Sequence[ImageRecord], classes: Classes, problems: Problems
) -> tuple[list[RawObject], Callable[[int], tuple[str, str]]]:
    """The label lines that can be understood, and where each of them stands."""
    objects: list[RawObject] = []
    places: list[tuple[Path, int]] = []
    files: set[Path] = set()
    unlabelled: list[Path] = []
    num_pixels = 0
    for position, record in enumerate(records):
        candidates = (_label_path(record.path), record.path.with_suffix(".txt"))
        candidates += tuple(path.with_suffix(".TXT") for path in candidates)
        file = next((path for path in candidates if path.is_file()), None)
        if file is None:
            unlabelled.append(record.path)
            continue
        files.add(file)
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            problems.add(file, "", UNREADABLE, "fatal", " ".join(str(error).split()))
            continue
        for number, line in enumerate(lines, start=1):
            found = _read_line(line, split, (str(file), f"line {number}"), problems) if line.strip() else None
            if found is None:
                continue
            index, (x, y, width, height) = found
            num_pixels += max(x, y, width, height) > 2
            label = classes.label_of.get(index)
            if label is None:
                problems.add(file, f"line {number}", UNWANTED, "dropped", split.names[index])
                continue
            box = (x * record.width, y * record.height, width * record.width, height * record.height)
            places.append((file, number))
            objects.append(RawObject(position, label, box))
    if not files:
        refuse_fatal(split.source, problems, len(records))  # images that are missing explain it better
        looked = " and ".join(dict.fromkeys(map(str, (_label_path(unlabelled[0]), unlabelled[0].with_suffix(".txt")))))
        raise InputError(
            f"{split.source}: none of the {len(records)} images in {split.place} has a label file (looked for "
            f"{looked}); put the labels there"
        )
    if num_pixels > 0.5 * max(len(objects), 1):
        raise InputError(
            f"{split.source}: most labels are far above 1, first {places[0][0]}; YOLO boxes are shares of the image's "
            "size: divide by its width and height"
        )
    for path in unlabelled:
        problems.add(path, "", UNLABELLED, "noted")
    _note_orphans(split, files, problems)

    def place(row: int) -> tuple[str, str]:
        return str(places[row][0]), f"line {places[row][1]}"

    return objects, place


def _read_line(
    line: str, split: YoloSplit, place: tuple[str, str], problems: Problems
) -> tuple[int, tuple[float, float, float, float]] | None:
    """The class index and the normalised box (x, y, width, height) of a label line."""
    shown = line.strip()[:80]
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        problems.add(*place, NO_BOX, "dropped", f"not numbers: {shown}")
        return None
    if not all(abs(value) < 1e6 for value in values):  # NaN is not below anything
        problems.add(*place, NO_BOX, "dropped", f"not finite: {shown}")
        return None
    count, points = len(values), split.num_keypoint_values
    has_box = count in ((5, 5 + points) if points else (5, 6))
    if not has_box and (points or count < 7 or count % 2 == 0):
        problems.add(*place, NO_BOX, "dropped", f"{count} values: {shown}")
        return None
    if values[0] not in split.names:
        problems.add(*place, BAD_CLASS, "dropped", f"class {values[0]:g}, known are {_span(split.names)}")
        return None
    if has_box:
        if count == 6 and not points:
            problems.add(*place, CONFIDENCE, "noted", f"{values[5]:g}")
        center_x, center_y, width, height = values[1:5]
        return int(values[0]), (center_x - width / 2, center_y - height / 2, width, height)
    xs, ys = values[1::2], values[2::2]
    return int(values[0]), (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))


def _span(names: Mapping[int, str]) -> str:
    """The class indices in few words."""
    low, high = min(names), max(names)
    return f"{low} to {high}" if len(names) == high - low + 1 else ", ".join(map(str, sorted(names)))


def _note_orphans(split: YoloSplit, files: set[Path], problems: Problems) -> None:
    """List label files that belong to no image, where a folder holds the labels of this split alone."""
    if not all(source.is_dir() for source in split.images):
        return
    folders = {file.parent for file in files} | {_label_path(source / "x").parent for source in split.images}
    paths = {path for folder in folders for path in folder.rglob("*") if path.suffix.lower() == ".txt"}
    for path in sorted(paths - files):
        if path.name != "classes.txt" and not path.name.startswith((".", "README")):
            problems.add(path, "", ORPHAN, "dropped")
