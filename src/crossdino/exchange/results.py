"""Reading and writing result files by the name of their format."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path, PurePosixPath
from typing import Any

from crossdino.documents import load_document
from crossdino.errors import InputError
from crossdino.exchange.category_numbers import visdrone_numbers
from crossdino.exchange.frame import Frame, read_frame
from crossdino.exchange.lines import PEDESTRIAN, VISDRONE, WIDERPERSON, Line, TextFormat
from crossdino.exchange.text_files import check_place, read_text_files, write_text_files
from crossdino.writing import written_whole

FORMATS: dict[str, str] = {
    "coco": "COCO results: a JSON list of {image_id, category_id, bbox, score}",
    "aitod": "the same: AI-TOD's toolkit reads COCO results",
    "sodad": "the same: SODA-D's toolkit reads COCO results",
    "visdrone": "VisDrone-DET: a folder or .zip with one text file for each image",
    "widerperson": "a folder or .zip with one text file for each image, as WiderPerson's annotations with scores",
}
"""Name of a format -> what it is."""

VISDRONE_LIMIT = 500
_TEXT: dict[str, TextFormat] = {"visdrone": VISDRONE, "widerperson": WIDERPERSON}

GroundTruth = Mapping[str, Any] | Path | str
OnNote = Callable[[str], None]


def detect_format(path: Path | str) -> str:
    """Tell the format of a result file or folder by what it holds.

    Args:
        path: a JSON file, or a folder or .zip of text files.

    Returns:
        `coco`, `visdrone` or `widerperson`. Text files that are all empty are VisDrone's.

    Raises:
        InputError: there is nothing, or nothing that is of a known format.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} does not exist: check the path of the results")
    if not path.is_dir() and path.suffix.lower() != ".zip":
        if path.suffix.lower() == ".txt":
            raise InputError(f"{path} is one text file: give the folder or .zip with one for each image")
        return "coco"
    for lines in read_text_files(path).values():
        first = next((line for line in lines if line.strip()), None)
        if first is not None:
            return "widerperson" if "," not in first and len(first.split()) == 1 else "visdrone"
    return "visdrone"


def read_results(
    path: Path | str,
    format: str | None,
    ground_truth: GroundTruth,
    *,
    on_note: OnNote | None = None,
    truth_name: str | None = None,
) -> list[dict[str, Any]]:
    """Read a result file of one of `FORMATS`.

    Args:
        path: the file, folder or archive.
        format: its name; None: `detect_format` tells.
        ground_truth: COCO JSON, as a file or as the dictionary. Text files are matched to its images by name,
            categories by VisDrone's names.
        on_note: called with a line that the user should read, such as how many images have no file; None: a warning.
        truth_name: what messages call the ground truth; None: its path, if it is one.

    Returns:
        COCO results with the ground truth's ids, in the order of the file (of the images, for text files).

    Raises:
        InputError: the format or the results are not understood; the message names the file and the line.
    """
    path = Path(path)
    format = detect_format(path) if format is None else _known(format)
    frame = read_frame(ground_truth, truth_name)
    if format not in _TEXT:
        if path.is_dir() or path.suffix.lower() == ".zip":
            raise InputError(f"{path} is no COCO results file: give a JSON file, or the format visdrone or widerperson")
        return _checked(load_document(path, "the results"), str(path), frame)
    if path.is_file() and path.suffix.lower() != ".zip":
        raise InputError(
            f"{path} is one file: results as {format} are a folder or .zip with one text file for each image"
        )
    return _read_text(path, format, frame, _warn if on_note is None else on_note)


def write_results(
    results: Sequence[Mapping[str, Any]],
    path: Path | str,
    format: str,
    ground_truth: GroundTruth,
    *,
    on_note: OnNote | None = None,
) -> None:
    """Write detections as one of `FORMATS`, whole or not at all.

    Text files are written for every image of the ground truth, empty ones too, with the detections by descending
    score. Numbers keep their full precision.

    Args:
        results: COCO results with the ground truth's ids.
        path: for COCO a JSON file, which is replaced; for text files a new or empty folder, or a .zip, which is
            replaced and holds them in its root, as submission servers want it.
        format: the name.
        ground_truth: as in `read_results`.
        on_note: as there.

    Raises:
        InputError: the format, the results or the place will not do.
    """
    path, format = Path(path), _known(format)
    check_format_place(path, format)
    frame = read_frame(ground_truth)
    rows = _checked(results, "the results", frame)
    on_note = _warn if on_note is None else on_note
    beyond = [row["score"] for row in rows if not 0 <= row["score"] <= 1]
    if beyond:
        on_note(
            f"scores outside of 0 to 1: {len(beyond)}, such as {beyond[0]:g}; they are written as they are, and a "
            "server may want fractions of 1"
        )
    if format in _TEXT:
        write_text_files(path, _texts(rows, format, frame, on_note))
        return
    try:
        with written_whole(path) as partial:
            partial.write_text(json.dumps(rows, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): name another place") from error


def check_format_place(path: Path, format: str) -> None:
    """Whether results of a format can be written there; for asking before a long work.

    Raises:
        InputError: they cannot.
    """
    suffix = path.suffix.lower()
    if _known(format) in _TEXT and suffix == ".json":
        raise InputError(f"cannot write {path}: results as {format} are text files; name a folder or a .zip")
    if format not in _TEXT and suffix != ".json":
        raise InputError(
            f"cannot write {path}: results as {format} are one JSON file; name a file that ends with .json"
        )
    check_place(path)


def _known(format: str) -> str:
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r} of results: choose one of {', '.join(FORMATS)}")
    return format


def _warn(line: str) -> None:
    warnings.warn(line, UserWarning, stacklevel=3)


def _read_text(path: Path, format: str, frame: Frame, on_note: OnNote) -> list[dict[str, Any]]:
    by_stem = frame.by_stem()
    by_name = {name: identity for identity, name in frame.file_names.items()}
    category_of = {number: category for category, number in _numbers(format, frame).items()}
    rows_of: dict[int, list[dict[str, Any]]] = {}
    for file_name, lines in read_text_files(path).items():
        where = str(path / file_name)
        stem = file_name[: -len(".txt")]
        image_id = by_stem.get(stem, by_name.get(stem))
        if image_id is None:
            raise InputError(
                f"{where} is of no image of {frame.name}: give the ground truth of the split that the results are of"
            )
        if image_id in rows_of:
            raise InputError(f"{where} is the second file of image {image_id}: keep one")
        rows_of[image_id] = rows = []
        for line in _TEXT[format].parse(lines, where):
            if line.number not in category_of:
                known = ", ".join(map(str, sorted(category_of)))
                raw = "; 0 and 11 stand in VisDrone's annotations only" if line.number in (0, 11) else ""
                raise InputError(
                    f"{where}, line {line.place} has class {line.number}, and {frame.name} has {known} of {format}'s "
                    f"classes: write detections of these only{raw}"
                )
            category = category_of[line.number]
            box = list(line.box_xywh)
            rows.append({"image_id": image_id, "category_id": category, "bbox": box, "score": line.score})
    missing = [name for identity, name in frame.file_names.items() if identity not in rows_of]
    if missing:
        on_note(
            f"{path}: images without a file: {len(missing)} of {len(by_stem)}, the first {missing[0]}; they count as "
            "images without detections"
        )
    return [row for identity in frame.file_names for row in rows_of.get(identity, [])]


def _texts(rows: list[dict[str, Any]], format: str, frame: Frame, on_note: OnNote) -> dict[str, str]:
    """Name of the file -> its text, for every image."""
    frame.by_stem()  # names must be there, and differ
    numbers = _numbers(format, frame)
    found: dict[int, list[Line]] = {identity: [] for identity in frame.file_names}
    for row in rows:
        x, y, width, height = row["bbox"]
        found[row["image_id"]].append(Line((x, y, width, height), row["score"], numbers[row["category_id"]]))
    texts = {}
    for identity, lines in found.items():
        name = PurePosixPath(frame.file_names[identity] or "")
        lines.sort(key=lambda line: -line.score)
        text = _TEXT[format]
        texts[f"{name if text.keeps_extension else name.stem}.txt"] = text.dump(lines)
    beyond = sum(len(lines) > VISDRONE_LIMIT for lines in found.values())
    if format == "visdrone" and beyond:
        on_note(
            f"images with more than {VISDRONE_LIMIT} detections: {beyond}; all are written, and VisDrone's toolkit "
            f"measures the best {VISDRONE_LIMIT} of an image"
        )
    return texts


def _numbers(format: str, frame: Frame) -> dict[int, int]:
    """Category id -> the toolkit's number."""
    if format == "visdrone":
        return visdrone_numbers(frame.categories, frame.name)
    if len(frame.categories) != 1:
        raise InputError(
            f"{frame.name} has {len(frame.categories)} categories, and results as widerperson have one: give the "
            "ground truth that `crossdino prepare widerperson` writes"
        )
    return {frame.categories[0]["id"]: PEDESTRIAN}


def _checked(results: Any, name: str, frame: Frame) -> list[dict[str, Any]]:
    """COCO results as plain values; every entry is looked at."""
    if not isinstance(results, Sequence) or isinstance(results, (str, bytes)):
        raise InputError(f"{name} is not a list of detections: give [{{image_id, category_id, bbox, score}}, ...]")
    category_ids = frame.category_ids
    rows = []
    for place, entry in enumerate(results):
        where = f"{name}: detection number {place} (counted from 0)"
        if not isinstance(entry, Mapping):
            raise InputError(f"{where} is not an object: give image_id, category_id, bbox and score")
        for key, known in (("image_id", frame.file_names), ("category_id", category_ids)):
            identity = entry.get(key)
            if not isinstance(identity, Integral) or isinstance(identity, bool) or identity not in known:
                raise InputError(f"{where} has {key} {identity!r}, which is not in {frame.name}: use its ids")
        box, score = entry.get("bbox"), entry.get("score")
        if not isinstance(box, Sequence) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
            raise InputError(f"{where} has bbox {box!r}: give 4 finite numbers, x, y, width >= 0, height >= 0")
        if not _is_number(score):
            raise InputError(f"{where} has score {score!r}: give a finite number")
        rows.append(
            {
                "image_id": int(entry["image_id"]),
                "category_id": int(entry["category_id"]),
                "bbox": [_plain(side) for side in box],
                "score": _plain(score),
            }
        )
    return rows


def _is_number(value: Any) -> bool:
    # The first test is for speed: nearly every value is a plain float.
    return (type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))) and math.isfinite(value)


def _plain(value: Any) -> float | int:
    """Numbers of numpy as Python's, which `repr` writes with all their digits."""
    return value if type(value) in (float, int) else float(value)
