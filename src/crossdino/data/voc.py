"""Reading data sets in the layout of Pascal VOC: one XML file for each image.

Source: the VOC2012 development kit. Its corners are pixels counted from 1, and the pixel of the second corner belongs
to the object, so that the box begins at `xmin - 1` and ends at `xmax`. (Boxes taken as they stand would be a pixel too
narrow and too low: for an object of 8 px nearly a quarter of its area.) Other programs count from 0: a data set in
which a corner lies at 0 is taken as it stands, unlike by supervision, which subtracts 1 there too.
"""

from __future__ import annotations

import os
import posixpath
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crossdino.data.check import Check, Progress, check_images
from crossdino.data.images import IMAGE_SUFFIXES
from crossdino.data.index import (
    BAD_CLASS,
    NO_BOX,
    SIZELESS,
    DatasetIndex,
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

UNKNOWN_CLASS = "object of an unknown or unwanted class"
UNLABELLED = "image without an XML file, taken as one without objects"
UNREADABLE = "XML file cannot be read"
NO_XML = "XML file is missing"
FROM_ZERO = "corner at 0: all corners are counted from 0"

CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VocSplit:
    """One split of a data set in Pascal VOC's layout.

    Attributes:
        annotations: folder of the XML files.
        images: folder of the images.
        list_file: text file that lists the images of the split; None: all in the folders.
        deep: whether the files lie in folders of these folders.
    """

    annotations: Path
    images: Path
    list_file: Path | None = None
    deep: bool = False

    @property
    def place(self) -> str:
        """Where it lies, for messages."""
        return str(self.list_file or self.annotations)


def find_voc(folder: Path, aliases: Mapping[str, Sequence[str]]) -> dict[str, VocSplit]:
    """The splits of a folder in Pascal VOC's layout; empty where it is none.

    Known are `Annotations` with `JPEGImages` (or `images`) and the lists `ImageSets/Main/SPLIT.txt` (`trainval` is for
    training where there is no `train`; without lists all images are), and XML files beside the images, or in such
    folders, in a folder of each split. `Annotations` and the folder of the images may have folders of the same names
    in them, as CVAT writes them.

    Args:
        folder: of the data set.
        aliases: split -> the names that it may have.
    """
    splits: dict[str, VocSplit] = {}
    whole = _find_pair(folder)
    divided = any(_find_pair(folder, name) for names in aliases.values() for name in names)
    deep = whole is None and not divided
    whole = _find_pair(folder, deep=True) if deep else whole
    if whole is not None:
        for split, names in aliases.items():
            names = (*names, "trainval") if split == "train" else names
            lists = [folder / "ImageSets" / "Main" / f"{name}.txt" for name in names]
            found = next((path for path in lists if path.is_file()), None)
            if found is not None:
                splits[split] = VocSplit(*whole, found, deep)
        return splits or {"train": VocSplit(*whole, deep=deep)}
    for split, names in aliases.items():
        pairs = [_find_pair(folder, name) or _find_pair(folder / name) or _find_beside(folder / name) for name in names]
        pair = next(filter(None, pairs), None)
        if pair is not None:
            splits[split] = VocSplit(*pair)
    if not splits and (pair := _find_beside(folder)) is not None:
        return {"train": VocSplit(*pair)}
    return splits


def _find_sheets(folder: Path, deep: bool) -> list[Path]:
    """The XML files of a folder (and of the folders below it), in order."""
    names = folder.rglob("*") if deep else folder.glob("*")
    return sorted(path for path in names if path.suffix.lower() == ".xml" and not path.name.startswith("."))


def _stem(path: Path, folder: Path) -> str:
    """The name of a file below a folder, without suffix: `a`, `sub/a`."""
    return path.relative_to(folder).with_suffix("").as_posix()


def _find_pair(folder: Path, inner: str = ".", deep: bool = False) -> tuple[Path, Path] | None:
    """The folder of the XML files and that of the images, or the folders `inner` in them."""
    for sheets in (folder / "Annotations" / inner, folder / "annotations" / inner):
        if _find_sheets(sheets, deep):
            places = [folder / name / inner for name in ("JPEGImages", "images", "Images")]
            return sheets, next((place for place in places if place.is_dir()), sheets)
    return None


def _find_beside(folder: Path) -> tuple[Path, Path] | None:
    """The folder itself, where it holds images and XML files of the same names."""
    stems = {path.stem for path in _find_sheets(folder, False)}
    return (folder, folder) if stems and not stems.isdisjoint(_images_by_stem(folder, False)) else None


def _images_by_stem(folder: Path, deep: bool) -> dict[str, Path]:
    """The images in a folder (and below it), by their name in it without suffix; none where there is no such folder."""
    paths = sorted(folder.rglob("*") if deep else folder.glob("*"))
    paths = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
    return {_stem(path, folder): path for path in paths}


@dataclass(frozen=True)
class _Object:
    """One `object` of an XML file: its name, its four corners as they stand (None: unusable), and `difficult`."""

    name: str
    corners: tuple[float, float, float, float] | None
    text: str
    difficult: bool


@dataclass(frozen=True)
class _Sheet:
    """What an XML file tells: the image's file name, its size ((0, 0): not told) and its objects."""

    file_name: str
    size_wh: tuple[int, int]
    objects: tuple[_Object, ...]


def load_voc(
    source: Path,
    splits: Mapping[str, VocSplit],
    split: str = "train",
    class_names: Sequence[str] | None = None,
    require_images: bool = True,
    *,
    ignore_categories: Sequence[str] = (),
    check: Check = "headers",
    on_progress: Progress | None = None,
) -> DatasetIndex:
    """Read a split in Pascal VOC's layout.

    An image belongs to the XML file of its name, or else to the one that names it. Objects marked `difficult` are
    regions to ignore for their class, as VOC's own evaluation does.

    Args:
        source: the data set's folder, for messages.
        splits: all its splits (see `find_splits`): where corners begin is decided by all of them together.
        split: which one to read.
        class_names: names in the wanted order of the labels; other classes are dropped and listed. None: the names in
            the training split (or in this one, where there is none), in alphabetical order.
        require_images: False trusts the sizes in the XML files and never opens an image.
        ignore_categories: names of classes whose boxes are regions to ignore for every class.
        check: `full` decodes every image, `headers` reads their headers (see `check_images`).
        on_progress: called as `on_progress(done, total)` while images are checked.

    Returns:
        The index; category ids are 1..K and image ids count from 1.

    Raises:
        InputError: the data cannot be used; where single files are at fault it is a `DataError` that holds all
            problems.
    """
    problems = Problems()
    part = splits[split]
    own = _list_sheets(part)
    sheets = {path: _read_sheet(path) for other in (part, *splits.values()) for path in _list_sheets(other)}
    first_zero = _find_zero(sheets)
    if first_zero is not None:
        problems.add(*first_zero, FROM_ZERO, "noted")
    for path in own:
        sheet = sheets[path]
        if isinstance(sheet, str):
            problems.add(path, "", UNREADABLE if path.is_file() else NO_XML, "fatal", sheet)

    if not _names(sheets, own):
        refuse_fatal(source, problems, len(own))
    classes, label_of = _choose_classes(
        source,
        _names(sheets, own),
        _names(sheets, _list_sheets(splits.get("train", part))),
        class_names,
        ignore_categories,
        problems,
    )
    entries = _pair_images(part, own, sheets, problems)
    if not entries:
        raise InputError(f"{part.place} lists no image; write the images' names there")
    records = []
    for number, (path, image) in enumerate(entries, start=1):
        sheet = sheets.get(path)
        size_wh = sheet.size_wh if isinstance(sheet, _Sheet) else (0, 0)
        if not require_images and size_wh == (0, 0):
            problems.add(path, "", "XML file without the image's size", "fatal")
        records.append(empty_record(number, image, size_wh))
    if require_images:
        facts = check_images([record.path for record in records], check, on_progress)
        looked_in = f"looked in the folder {part.images}"
        records = settle_sizes(records, facts, lambda position: str(entries[position][0]), problems, looked_in)

    objects: list[RawObject] = []
    places: list[tuple[str, str]] = []
    for position, (path, _) in enumerate(entries):
        sheet = sheets.get(path)
        for number, item in enumerate(sheet.objects if isinstance(sheet, _Sheet) else (), start=1):
            place = (str(path), f"object {number}")
            box = _fit_box(item, label_of, 1.0 if first_zero is None else 0.0, place, problems)
            if box is not None:
                objects.append(RawObject(position, label_of[item.name], box, ignored=item.difficult))
                places.append(place)
    records = attach_objects(records, objects, lambda row: places[row], problems)
    note_unused_classes(source, classes.names, records, problems)
    refuse_fatal(source, problems, len(records))
    return DatasetIndex(source, classes.names, classes.category_ids, tuple(records), problems)


def _list_sheets(split: VocSplit) -> list[Path]:
    """The XML files of a split, each once; those that a list names need not exist."""
    if split.list_file is None:
        return _find_sheets(split.annotations, split.deep)
    try:
        lines = split.list_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{split.list_file} cannot be read ({error}); write it again as UTF-8 text") from None
    known = {_stem(path, split.annotations): path for path in _find_sheets(split.annotations, split.deep)}
    paths: list[Path] = []
    for line in filter(None, (line.strip().replace("\\", "/") for line in lines)):
        line = posixpath.basename(line) if line.startswith("/") else line
        name, _, flag = line.rpartition(" ")
        # VOC's lists of one class tell whether the image has it; others name the image or the XML file itself.
        names = (line, name.strip() if flag in ("1", "-1", "0") else line, os.path.splitext(line)[0])
        found = next((known[name] for name in names if name in known), None)
        paths.append(found or split.annotations / f"{names[1]}.xml")
    return list(dict.fromkeys(paths))


def _read_sheet(path: Path) -> _Sheet | str:
    """The content of an XML file, or why it cannot be read."""
    try:
        root = ElementTree.parse(path).getroot()
    except FileNotFoundError:
        return "it is listed, but does not exist"
    except (OSError, ElementTree.ParseError, UnicodeDecodeError, LookupError) as error:
        return " ".join(str(error).split())
    objects: list[_Object] = []
    for item in root.findall("object"):
        texts = [item.findtext(f"bndbox/{corner}", "").strip() for corner in CORNERS]
        numbers = [_as_number(text) for text in texts]
        corners = None if None in numbers else (numbers[0], numbers[1], numbers[2], numbers[3])
        shown = "no 'bndbox'" if item.find("bndbox") is None else " ".join(text or "-" for text in texts)
        difficult = (_as_number(item.findtext("difficult", "0")) or 0) != 0
        objects.append(_Object(item.findtext("name", "").strip(), corners, shown, difficult))  # type: ignore[arg-type]
    sides = [_as_number(root.findtext(f"size/{side}", "")) or 0 for side in ("width", "height")]
    size_wh = (int(sides[0]), int(sides[1])) if min(sides) >= 1 else (0, 0)
    name = root.findtext("filename", "").strip().replace("\\", "/").rpartition("/")[2]
    return _Sheet(name, size_wh, tuple(objects))


def _as_number(text: str) -> float | None:
    """The text as a finite number; None where it is none."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < 1e9 else None  # NaN is not below anything


def _names(sheets: Mapping[Path, _Sheet | str], paths: Sequence[Path]) -> set[str]:
    """The names of all objects in these files."""
    found = (sheets[path] for path in paths)
    return {item.name for sheet in found if isinstance(sheet, _Sheet) for item in sheet.objects if item.name}


def _find_zero(sheets: Mapping[Path, _Sheet | str]) -> tuple[str, str] | None:
    """The first object that begins at 0 (one without any size proves nothing)."""
    for path, sheet in sheets.items():
        for number, item in enumerate(sheet.objects if isinstance(sheet, _Sheet) else (), start=1):
            if item.corners is not None:
                left, top, right, bottom = item.corners
                if 0 <= min(left, top) < 1 and right > left and bottom > top:
                    return str(path), f"object {number}"
    return None


def _choose_classes(
    source: Path,
    own: set[str],
    training: set[str],
    wanted: Sequence[str] | None,
    ignored: Sequence[str],
    problems: Problems,
) -> tuple[Classes, dict[str, int]]:
    """The classes, and name -> label (-1: to be ignored)."""
    if wanted is None:
        if not training:
            raise InputError(f"{source}: the XML files of the training images have no object; label some")
        names = [*sorted(training - set(ignored)), *sorted((training | own) & set(ignored))]
    else:
        if own and own.isdisjoint((*wanted, *ignored)):
            raise InputError(
                f"{source} has none of the wanted classes ({', '.join(wanted[:5])}); its names are "
                f"{', '.join(sorted(own)[:10])}: rename them"
            )
        names = [*wanted, *(name for name in ignored if name not in wanted)]  # not every split has every class
    name_of = dict(enumerate(names, start=1))
    classes = choose_classes(source, name_of, wanted, ignored, problems, absent_allowed=True)
    return classes, {name: classes.label_of[number] for number, name in name_of.items()}


def _pair_images(
    split: VocSplit, own: Sequence[Path], sheets: Mapping[Path, _Sheet | str], problems: Problems
) -> list[tuple[Path, Path]]:
    """The XML file and the image of every entry; images without an XML file come with the one that they would have."""
    images_of = _images_by_stem(split.images, split.deep)
    with_sheet = {_stem(path, split.annotations) for path in _find_sheets(split.annotations, split.deep)}
    entries: list[tuple[Path, Path]] = []
    for path in own:
        sheet, stem = sheets[path], _stem(path, split.annotations)
        image = images_of.get(stem)
        if image is None:
            named = posixpath.join(posixpath.dirname(stem), sheet.file_name) if isinstance(sheet, _Sheet) else ""
            other = os.path.splitext(named)[0]
            # An image that has an XML file of its own name is not meant by another one.
            usable = isinstance(sheet, _Sheet) and sheet.file_name and other not in with_sheet
            image = (images_of.get(other) if usable else None) or split.images / (named if usable else f"{stem}.jpg")
        entries.append((path, image))
    if split.list_file is None:
        taken = {image for _, image in entries}
        for stem, image in images_of.items():
            if image not in taken:
                problems.add(image, "", UNLABELLED, "noted")
                entries.append((split.annotations / f"{stem}.xml", image))
        entries.sort(key=lambda entry: entry[1])
    return entries


def _fit_box(
    item: _Object, label_of: Mapping[str, int], first: float, place: tuple[str, str], problems: Problems
) -> tuple[float, float, float, float] | None:
    """The box (x, y, width, height) of an object, where corners are counted from `first`; None where it has none."""
    if not item.name:
        problems.add(*place, BAD_CLASS, "dropped", "no 'name'")
    elif item.name not in label_of:
        problems.add(*place, UNKNOWN_CLASS, "dropped", item.name)
    elif item.corners is None:
        problems.add(*place, NO_BOX, "dropped", item.text)
    else:
        left, top, right, bottom = item.corners
        if right >= left and bottom >= top:
            return left - first, top - first, right - left + first, bottom - top + first
        problems.add(*place, SIZELESS, "dropped", f"xmin ymin xmax ymax = {item.text}")
    return None
