"""WiderPerson: `Images/`, `Annotations/*.jpg.txt` and the lists `train.txt` and `val.txt`, into COCO.

An annotation file begins with the count of its boxes; each further line is `label x1 y1 x2 y2`, where both corners
belong to the box. Labels: 1 pedestrians, 2 riders, 3 partially visible persons, 4 ignore regions, 5 crowds. The
defaults are those of IterDet's conversion, whose numbers the paper's Table II stands beside: one class of label 1, all
other labels are regions to ignore, training images without label 1 are left out. The "Hard" subset that papers name
(heights above 20 px) is in no code of IterDet; `--min-height 21` makes it.

IterDet's evaluation knows only images that have a line; the others of val stay in the file and are listed as
`unannotated`. The annotations of test are not public.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
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
    whole_number,
)
from crossdino.preparation.contract import Option, SplitResult
from crossdino.preparation.folders import entries
from crossdino.preparation.work import Work


def read_labels(text: str) -> tuple[int, ...]:
    """Labels as `2,3,4,5`; `none` for no label."""
    labels = [] if text.strip().lower() == "none" else [part.strip() for part in text.split(",")]
    if not set(labels) <= {str(label) for label in LABELS}:
        raise argparse.ArgumentTypeError(f"{text} must be labels from 1 to 5 as 2,3,4,5, or none")
    return tuple(sorted({int(label) for label in labels}))


LABELS = range(1, 6)
OPTIONS = (
    Option(
        "objects",
        (1,),
        "labels that are objects of the one class; IterDet takes 1, pedestrians",
        parse=read_labels,
        metavar="LABELS",
    ),
    Option(
        "ignored",
        (2, 3, 4, 5),
        "labels that are regions to ignore (iscrowd), as in IterDet; those in neither list are dropped; none: no label",
        parse=read_labels,
        metavar="LABELS",
    ),
    Option(
        "min_height",
        0,
        "objects less high than this become regions to ignore; 0 as in IterDet, 21 for the 'Hard' subset of the papers",
        parse=whole_number,
        metavar="PX",
    ),
    Option(
        "corners",
        "inclusive",
        "whether the second corner belongs to the box (one pixel wider and higher, as in IterDet) or not",
        ("inclusive", "exclusive"),
    ),
    Option(
        "empty_train",
        "drop",
        "training images without any object: drop them, as IterDet does, or keep them",
        ("drop", "keep"),
    ),
    MIN_SIDE,
    OUTSIDE,
)

SPLITS = ("train", "val")
_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class RawImage:
    """One image: its size, its labelled corners, and what its first line says."""

    size_wh: tuple[int, int]
    rows: list[tuple[int, Box]]
    count: int | None


def prepare(source: Path, work: Work, options: Mapping[str, Any]) -> list[SplitResult]:
    """Prepare the splits that are found in the source."""
    check_outside(options["outside"], work.without_images)
    both = sorted(set(options["objects"]) & set(options["ignored"]))
    if both or not options["objects"]:
        problem = f"label {both[0]} is in --objects and in --ignored" if both else "--objects names no label"
        raise InputError(f"{problem}: give each label once, and at least one as an object")
    root = _find_root(source)
    looked_for = {split: f"{split}.txt, Annotations/ and Images/" for split in SPLITS}
    found = {split: root / f"{split}.txt" for split in SPLITS if (root / f"{split}.txt").is_file()}
    hint = f"{entries(root)}" if root.is_dir() else ""
    results: list[SplitResult] = []
    for split, listing in work.choose(found, looked_for, hint):
        pairs, notes = _pair_files(root, listing, work)
        fingerprint = work.fingerprint(
            [listing, *(text for text, _ in pairs)], [image for _, image in pairs if image is not None]
        )
        result = work.finished_before(split, fingerprint)
        if result is None:
            tasks = [(text, image, options["corners"] == "inclusive") for text, image in pairs]
            read = work.map_images(read_pair, tasks, f"reading {split}", chunk=64)
            notes += _compare_counts(pairs, read)
            names = [image.name if image is not None else text.name.removesuffix(".txt") for text, image in pairs]
            document, result = convert(split, names, read, options, notes)
            document["categories"] = [{"id": key, "name": name} for key, name in work.benchmark.categories.items()]
            work.write_annotations(split, document)
            work.place_images(split, root / "Images", [image["file_name"] for image in document["images"]])
            work.mark_done(fingerprint, result)
        results.append(result)
    return results


def convert(
    split: str, names: Sequence[str], read: Sequence[RawImage], options: Mapping[str, Any], notes: Sequence[str] = ()
) -> tuple[dict[str, Any], SplitResult]:
    """The COCO document of one split, without its categories, and its numbers.

    Args:
        split: `train` or `val`.
        names: of the image files, in the list's order.
        read: what was read of each.
        options: of `OPTIONS`.
        notes: for the result.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    unannotated: list[int] = []
    dropped: Counter[str] = Counter()
    num_objects = num_ignored = 0
    for name, raw in zip(names, read, strict=True):
        has_object = any(label in options["objects"] for label, _ in raw.rows)
        if split == "train" and options["empty_train"] == "drop" and not has_object:
            dropped["image without an object"] += 1
            continue
        image_id = len(images) + 1
        images.append({"id": image_id, "file_name": name, "width": raw.size_wh[0], "height": raw.size_wh[1]})
        if not raw.rows:
            unannotated.append(image_id)
        for label, corners_box in raw.rows:
            if label not in (*options["objects"], *options["ignored"]):
                dropped[f"label {label}"] += 1
                continue
            box = settle_box(corners_box, raw.size_wh, options["min_side"], options["outside"])
            if isinstance(box, str):
                dropped[box] += 1
                continue
            ignored = label in options["ignored"] or corners_box[3] < options["min_height"]
            num_ignored += ignored
            num_objects += not ignored
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(ignored),
                }
            )
    document = {"images": images, "annotations": annotations, "unannotated": unannotated}
    result = SplitResult(
        split,
        len(images),
        num_objects,
        num_ignored,
        dict(sorted(dropped.items())),
        {"images": len(names)},
        tuple(notes),
    )
    return document, result


def read_pair(task: tuple[Path, Path | None, bool]) -> RawImage:
    """An image's annotation file, and its size by its header."""
    text, image, inclusive = task
    count, rows = read_rows(text, inclusive)
    return RawImage(size_of(image, [box for _, box in rows]), rows, count)


def read_rows(path: Path, inclusive: bool) -> tuple[int | None, list[tuple[int, Box]]]:
    """The count in the first line, None in an empty file, and label and box of each further line.

    Raises:
        InputError: naming file and line of what is no such line.
    """
    lines = [(number, line.split()) for number, line in enumerate(read_lines(path), start=1) if line.strip()]
    if not lines:
        return None, []
    if len(lines[0][1]) != 1 or not lines[0][1][0].isdecimal():
        raise InputError(
            f"{path}, line {lines[0][0]}: {' '.join(lines[0][1])!r:.60} is not the count of the boxes, with which the "
            "file must begin; download it again"
        )
    rows: list[tuple[int, Box]] = []
    for number, texts in lines[1:]:
        values = [read_number(text) for text in texts]
        if len(values) != 5 or None in values or values[0] not in LABELS:
            raise InputError(
                f"{path}, line {number}: {' '.join(texts)!r:.60} is not 'label x1 y1 x2 y2' with a label from 1 to 5; "
                "correct it, or download the file again"
            )
        label, left, top, right, bottom = (value for value in values if value is not None)
        rows.append((int(label), [left, top, right - left + inclusive, bottom - top + inclusive]))
    return int(lines[0][1][0]), rows


def _find_root(source: Path) -> Path:
    """The folder with the annotations: the source, or the one folder in it that has them."""
    if (source / "Annotations").is_dir():
        return source
    inner = sorted(path for path in source.iterdir() if (path / "Annotations").is_dir())
    if len(inner) == 1:
        return inner[0]
    raise InputError(f"{source} is not WiderPerson: it lacks the folder Annotations. {entries(source)}")


def _pair_files(root: Path, listing: Path, work: Work) -> tuple[list[tuple[Path, Path | None]], list[str]]:
    """Annotation file and image of each name in a list, and notes on the list."""
    names = [line.strip().replace("\\", "/").rpartition("/")[2] for line in read_lines(listing) if line.strip()]
    stems = [name[: -len(suffix)] if (suffix := _suffix(name)) else name for name in names]
    unique = list(dict.fromkeys(stems))
    notes = (
        [f"names that are in {listing.name} more than once count once: {len(stems) - len(unique)}"]
        if len(unique) < len(stems)
        else []
    )
    if not unique:
        raise InputError(f"{listing} lists no images; download it again")
    texts = {path.name.lower(): path for path in (root / "Annotations").iterdir()}
    folder = root / "Images"
    if not work.without_images and not folder.is_dir():
        raise InputError(f"{folder} does not exist; put the images there, or add --without-images to go without them")
    images = {} if work.without_images else {path.name: path for path in folder.iterdir()}
    pairs: list[tuple[Path, Path | None]] = []
    for stem in unique:
        text = next((texts[n] for s in (*_SUFFIXES, "") if (n := f"{stem}{s}.txt".lower()) in texts), None)
        if text is None:
            raise InputError(
                f"{root / 'Annotations' / stem}.jpg.txt does not exist, but {listing} lists it; restore it"
            )
        image = None
        if not work.without_images:
            image = next((images[n] for s in _SUFFIXES for n in (stem + s, stem + s.upper()) if n in images), None)
            if image is None:
                raise InputError(
                    f"image {folder / stem}.jpg does not exist, but {listing} lists it; restore it, or add "
                    "--without-images to go without any"
                )
        pairs.append((text, image))
    return pairs, notes


def _suffix(name: str) -> str:
    return next((suffix for suffix in _SUFFIXES if name.lower().endswith(suffix)), "")


def _compare_counts(pairs: Sequence[tuple[Path, Path | None]], read: Sequence[RawImage]) -> list[str]:
    """Notes on files whose first line does not say how many boxes follow."""
    wrong = [
        f"{text.name} {'is empty' if raw.count is None else f'says {raw.count} and has {len(raw.rows)}'}"
        for (text, _), raw in zip(pairs, read, strict=True)
        if raw.count != len(raw.rows)
    ]
    if not wrong:
        return []
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return [f"the count in the first line is wrong, all lines were taken: {'; '.join(wrong[:3])}{more}"]
