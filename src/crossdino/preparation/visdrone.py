"""VisDrone2019-DET: `annotations/*.txt` and `images/*.jpg` of every split, into COCO.

A line is `bbox_left,bbox_top,bbox_width,bbox_height,score,object_category,truncation,occlusion`, in pixels; some files
have a comma more (README of VisDrone2018-DET-toolkit). Score 1 is what counts, 0 what is not considered; categories 1
to 10 are the classes, 0 marks regions in which nothing is annotated, 11 is "others".

RFLA and SR-TOD, whose protocol the paper follows, publish no conversion. What their loaders leave of categories 0, 11
and of score 0 is nothing, so `drop` is the default: detections there count as false. `crowd` makes them regions to
ignore, for every class. Both keep these lines in `visdrone_ignored`, which the official metric needs, and so do lines
that are dropped for their boxes: objects that nobody can find are still objects to it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossdino.errors import InputError
from crossdino.preparation.boxes import (
    MIN_SIDE,
    OUTSIDE,
    Box,
    check_outside,
    read_lines,
    read_number,
    settle_box,
    size_of,
)
from crossdino.preparation.contract import Option, SplitResult
from crossdino.preparation.folders import entries
from crossdino.preparation.work import Work

OPTIONS = (
    Option(
        "ignored",
        "drop",
        "lines of category 0 (ignored regions), 11 (others) or score 0: drop them, as the loaders of RFLA and SR-TOD "
        "do, or make each a crowd of every class (iscrowd), in which nothing counts as false",
        ("drop", "crowd"),
    ),
    MIN_SIDE,
    OUTSIDE,
)

SPLITS = ("train", "val", "test-dev")
_FOLDER = re.compile(r"(visdrone20\d\d-det-)?(train|val|test[-_]dev|test[-_]challenge)(.*)", re.IGNORECASE)
_FIELDS = ("bbox_left", "bbox_top", "bbox_width", "bbox_height", "score", "object_category", "truncation", "occlusion")
# Of these the published numbers of objects count a line once that is there twice (see `crossdino.benchmarks`).
_COUNTED_ONCE = ("val", "test-dev")
# Truncation is 0 or 1 and occlusion 0 to 2; they are handed on as they stand.
_RANGES = {"score": range(2), "object_category": range(12)}
_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Row:
    """One line of an annotation file."""

    bbox: Box
    score: int
    category: int
    truncation: int
    occlusion: int

    @property
    def ignored(self) -> str:
        """Why it is no object; empty: it is one."""
        if self.category in (0, 11):
            return f"category {self.category}"
        return "score 0" if self.score == 0 else ""


def prepare(source: Path, work: Work, options: Mapping[str, Any]) -> list[SplitResult]:
    """Prepare the splits that are found in the source."""
    check_outside(options["outside"], work.without_images)
    folders = find_folders(source, work)
    looked_for = {split: f"VisDrone2019-DET-{split}/annotations" for split in SPLITS}
    results: list[SplitResult] = []
    for split, folder in work.choose(folders, looked_for, "; ".join([*work.notes, entries(source)])):
        pairs = _pair_files(folder, work)
        fingerprint = work.fingerprint(
            [annotations for annotations, _ in pairs], [image for _, image in pairs if image is not None]
        )
        result = work.finished_before(split, fingerprint)
        if result is None:
            read = work.map_images(read_pair, pairs, f"reading {split}", chunk=64)
            names = [image.name if image is not None else f"{text.stem}.jpg" for text, image in pairs]
            document, result = convert(split, names, read, options, work.benchmark.categories)
            work.write_annotations(split, document)
            work.place_images(split, folder / "images", names)
            work.mark_done(fingerprint, result)
        results.append(result)
    return results


def convert(
    split: str,
    names: list[str],
    read: list[tuple[tuple[int, int], list[Row]]],
    options: Mapping[str, Any],
    categories: Mapping[int, str],
) -> tuple[dict[str, Any], SplitResult]:
    """The COCO document of one split, and its numbers.

    Args:
        split: its official name.
        names: of the image files, in the order of their ids from 1.
        read: width and height of each image, and its rows.
        options: `ignored`, `min_side` and `outside`.
        categories: id -> name of the ten classes.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    raw_ignored: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    num_objects = num_ignored = num_rows = num_doubles = 0
    for image_id, (name, (size_wh, rows)) in enumerate(zip(names, read, strict=True), start=1):
        images.append({"id": image_id, "file_name": name, "width": size_wh[0], "height": size_wh[1]})
        labels = [(row.category, *row.bbox) for row in rows if not row.ignored]
        num_rows += len(labels)
        num_doubles += len(labels) - len(set(labels))
        for row in rows:
            reason = row.ignored
            marks = {"truncation": row.truncation, "occlusion": row.occlusion}
            box = settle_box(row.bbox, size_wh, options["min_side"], options["outside"])
            if reason or isinstance(box, str):  # the official metric counts an object without a width, too
                raw = {"image_id": image_id, "bbox": row.bbox, "score": row.score, "category": row.category}
                raw_ignored.append(raw | marks)
            if reason and options["ignored"] == "drop":
                dropped[reason] += 1
                continue
            if isinstance(box, str):
                dropped[box] += 1
                continue
            num_ignored += bool(reason)
            num_objects += not reason
            for category_id in categories if reason else (row.category,):
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(bool(reason)),
                    "score": row.score,
                }
                annotations.append(annotation | marks)
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": category_id, "name": name} for category_id, name in categories.items()],
        "visdrone_ignored": raw_ignored,
    }
    counted = {"objects": num_rows - (num_doubles if split in _COUNTED_ONCE else 0)}
    notes = (f"objects that are there twice, with the same class and box: {num_doubles} (kept)",) if num_doubles else ()
    dropped_in_order = dict(sorted(dropped.items()))
    return document, SplitResult(split, len(images), num_objects, num_ignored, dropped_in_order, counted, notes)


def read_pair(pair: tuple[Path, Path | None]) -> tuple[tuple[int, int], list[Row]]:
    """Size and rows of an image, from its annotation file and the image's header."""
    annotations, image = pair
    rows = read_rows(annotations)
    return size_of(image, [row.bbox for row in rows]), rows


def read_rows(path: Path) -> list[Row]:
    """The rows of an annotation file.

    Raises:
        InputError: naming file and line of what is no such row.
    """
    rows: list[Row] = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        texts = line.split(",")
        if len(texts) < len(_FIELDS):
            raise InputError(
                f"{path}, line {number}: {line.strip()!r:.80} has {len(texts)} of the {len(_FIELDS)} values "
                f"{','.join(_FIELDS)}; correct it, or download the file again"
            )
        values: list[Any] = []
        for name, text in zip(_FIELDS, texts, strict=False):
            value = read_number(text)
            allowed = _RANGES.get(name)
            if value is None or (allowed is not None and value not in allowed):
                what = "a number" if allowed is None else f"{allowed[0]} to {allowed[-1]}"
                remedy = "correct it, or download the file again"
                if name == "score" and value is not None:
                    remedy = "this looks like a file of detections: give the annotations"
                raise InputError(f"{path}, line {number}: {name} is {text.strip()!r:.40}, not {what}; {remedy}")
            values.append(value)
        rows.append(Row(values[:4], *values[4:]))
    return rows


def find_folders(source: Path, work: Work) -> dict[str, Path]:
    """The folder of each split that has annotations: in the source, one level deeper, or the source itself."""
    found: dict[str, Path] = {}
    for folder in (source, *_folders(source), *(inner for outer in _folders(source) for inner in _folders(outer))):
        # A link may have the name, or what it points to; `.` has none of its own.
        match = _FOLDER.fullmatch(folder.name) or _FOLDER.fullmatch(folder.resolve().name)
        if match is None or not (match[1] or match[3] == ""):
            continue
        split = match[2].lower().replace("_", "-")
        # Whoever renames a folder to `val` may have others of that name: only with what belongs in it.
        places = (folder, *_folders(folder)) if match[1] else (folder,)
        inner = next((place for place in places if (place / "annotations").is_dir()), None)
        if split == "test-challenge":
            work.notes.append(f"{folder} was left out: the annotations of test-challenge are not public")
        elif inner is not None and found.setdefault(split, inner) != inner:
            raise InputError(f"{split} is in {found[split]} and in {inner}; keep one of them in {source}")
    if not found and (source / "annotations").is_dir():
        if len(work.wanted) != 1:
            raise InputError(
                f"{source} holds annotations, but its name does not tell of which split; name it, e.g. --splits val"
            )
        found[work.wanted[0]] = source
    return found


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _pair_files(folder: Path, work: Work) -> list[tuple[Path, Path | None]]:
    """Annotation file and image of each image, by name; without images those of the annotation files alone."""
    texts = {path.stem: path for path in (folder / "annotations").glob("*.txt") if not path.name.startswith(".")}
    if not texts:
        raise InputError(f"{folder / 'annotations'} holds no *.txt files. {entries(folder / 'annotations')}")
    if work.without_images:
        return [(texts[stem], None) for stem in sorted(texts)]
    place = folder / "images"
    if not place.is_dir():
        raise InputError(f"{place} does not exist; put the images there, or add --without-images to go without them")
    found = (path for path in place.iterdir() if path.suffix.lower() in _SUFFIXES and not path.name.startswith("."))
    images = {path.stem: path for path in found}
    for these, others, what, remedy in (
        (texts, images, "image", f"restore it in {place}, or add --without-images to go without any"),
        (images, texts, "annotation file", f"restore it in {folder / 'annotations'}, or take the image out"),
    ):
        missing = sorted(these.keys() - others.keys())
        if missing:
            more = f", and {len(missing) - 1} more have none" if len(missing) > 1 else ""
            raise InputError(f"{these[missing[0]]} has no {what}{more}; {remedy}")
    return [(texts[stem], images[stem]) for stem in sorted(images)]
