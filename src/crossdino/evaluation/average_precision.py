"""COCO average precision with any size bands and any number of detections per image.

The protocol is the COCO one (Section IV-A of the Cross-DINO paper uses it for COCO, AI-TOD, VisDrone and SODA-D); the
matching and the accumulation are done by faster-coco-eval, which gives the numbers of pycocotools. Three places where
the usual wrappers go wrong are closed here:

- the numbers are read from the precision and recall arrays at *our* number of detections; `summarize()` of pycocotools
  reports 100 detections whatever was asked for;
- annotations are renumbered from 1: the evaluators take annotation id 0 for "not matched";
- image and category ids are replaced by their rank, so that any integer will do. The rank keeps the order of the ids,
  hence the order in which detections of equal score are taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from rich.table import Table

from crossdino.errors import InputError

COCO_SIZE_BANDS: dict[str, tuple[float, float]] = {"small": (0.0, 32.0), "medium": (32.0, 96.0), "large": (96.0, 1e5)}
"""COCO's bands: name -> lower and upper bound of sqrt(area) in pixels, both inclusive."""

_LARGEST_SIDE_PX = 1e5
_UNDEFINED = float("nan")


@dataclass(frozen=True)
class BandResult:
    """The numbers of the objects of one size band.

    Attributes:
        ap: average precision, the mean over the IoU thresholds and the classes; NaN without objects.
        ap50: the same at IoU 0.50; NaN without objects or if 0.50 is not among the thresholds.
        ar: average recall at the evaluation's number of detections; NaN without objects.
        num_objects: objects whose size lies in the band; crowds do not count.
    """

    ap: float
    ap50: float
    ar: float
    num_objects: int


@dataclass(frozen=True)
class ClassResult:
    """The numbers of one class, all sizes together.

    Attributes:
        category_id: the ground truth file's own id of the class.
        ap: average precision; NaN without objects.
        ap50: the same at IoU 0.50.
        ar: average recall.
        num_objects: objects of the class; crowds do not count.
    """

    category_id: int
    ap: float
    ap50: float
    ar: float
    num_objects: int


@dataclass(frozen=True)
class AveragePrecisionResult:
    """What a set of detections is worth; every number is a fraction of 1, NaN where it is not defined.

    Attributes:
        ap: average precision, the mean over the IoU thresholds and the classes that have objects.
        ap50: the same at IoU 0.50.
        ap75: the same at IoU 0.75.
        ar: average recall at `max_detections`.
        by_size: band name -> the band's numbers, in the order asked for.
        by_class: class name -> the class's numbers, in the order of the category ids.
        num_images: images of the ground truth.
        num_objects: objects of the ground truth; crowds do not count.
        num_predictions: detections given, before `max_detections` is applied.
        max_detections: best detections per image and class that were used.
        size_bands: name -> lower and upper bound of sqrt(area) in pixels, both inclusive.
        iou_thresholds: the IoU thresholds that `ap` is the mean over.
    """

    ap: float
    ap50: float
    ap75: float
    ar: float
    by_size: dict[str, BandResult]
    by_class: dict[str, ClassResult]
    num_images: int
    num_objects: int
    num_predictions: int
    max_detections: int
    size_bands: dict[str, tuple[float, float]]
    iou_thresholds: tuple[float, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON values: full precision, None where a number is not defined."""
        return {
            "ap": _null_if_undefined(self.ap),
            "ap50": _null_if_undefined(self.ap50),
            "ap75": _null_if_undefined(self.ap75),
            "ar": _null_if_undefined(self.ar),
            "by_size": {name: _plain(vars(band)) for name, band in self.by_size.items()},
            "by_class": {name: _plain(vars(result)) for name, result in self.by_class.items()},
            "num_images": self.num_images,
            "num_objects": self.num_objects,
            "num_predictions": self.num_predictions,
            "settings": {
                "max_detections": self.max_detections,
                "size_bands": {name: list(bounds) for name, bounds in self.size_bands.items()},
                "iou_thresholds": list(self.iou_thresholds),
            },
        }

    def to_json(self) -> str:
        """The result as JSON text: full precision, null where a number is not defined."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def table(self) -> Table:
        """The result as a table for the terminal: all objects, by size, and by class where there are several."""
        table = Table(
            caption=f"{self.num_images} images, {self.num_predictions} detections, "
            f"the best {self.max_detections} per image and class"
        )
        table.add_column("objects")
        table.add_column("size (px)", justify="right")
        for header in ("number", "AP", "AP50", "AP75", f"AR@{self.max_detections}"):
            table.add_column(header, justify="right")
        numbers = [_percent(value) for value in (self.ap, self.ap50, self.ap75, self.ar)]
        table.add_row("all", "", str(self.num_objects), *numbers, end_section=True)
        for name, band in self.by_size.items():
            lower, upper = self.size_bands[name]
            size = f"{lower:g}-{upper:g}" if upper < _LARGEST_SIDE_PX else f"{lower:g} and more"
            table.add_row(
                name, size, str(band.num_objects), _percent(band.ap), _percent(band.ap50), "", _percent(band.ar)
            )
        table.add_section()
        if len(self.by_class) > 1:
            for name, result in self.by_class.items():
                numbers = [_percent(result.ap), _percent(result.ap50), "", _percent(result.ar)]
                table.add_row(name, "", str(result.num_objects), *numbers)
        return table


def parse_size_bands(text: str) -> dict[str, tuple[float, float]]:
    """Read size bands as they are written on the command line.

    Args:
        text: `tiny=0-8,small=8-32,large=32-inf`; the bounds are sqrt(area) in pixels, both inclusive.

    Returns:
        Name -> (lower, upper) in the order written; `inf` becomes COCO's 100000 px.

    Raises:
        InputError: a band is not of the form `name=lower-upper`, a name comes twice, or a bound makes no sense.
    """
    bands: dict[str, tuple[float, float]] = {}
    for part in text.split(","):
        name, equals, bounds = part.partition("=")
        lower, dash, upper = bounds.partition("-")
        name = name.strip()
        try:
            band = (float(lower), min(float(upper), _LARGEST_SIDE_PX))
        except ValueError:
            band = None
        if not (name and equals and dash) or band is None:
            raise InputError(f"size band {part.strip()!r} is not understood: write name=lower-upper, e.g. small=8-32")
        if name in bands:
            raise InputError(f"size band {name!r} is given twice: give every band its own name")
        bands[name] = band
    _check_size_bands(bands)
    return bands


def evaluate_detections(
    ground_truth: Mapping[str, Any] | Path | str,
    predictions: Sequence[Mapping[str, Any]] | Path | str,
    *,
    max_detections: int = 100,
    size_bands: Mapping[str, tuple[float, float]] | None = None,
    iou_thresholds: Sequence[float] | None = None,
) -> AveragePrecisionResult:
    """Measure detections against a COCO ground truth.

    An object belongs to a band by the `area` that the file states (width x height where it states none), a detection by
    its width x height; an object that lies exactly on a bound counts in both bands. Objects with `iscrowd` are
    neither asked for nor held against a detection, as in COCO.

    Args:
        ground_truth: COCO JSON, as a file or as the dictionary; ids may be any integers.
        predictions: COCO results, as a file or as the list: `image_id`, `category_id`, `bbox` (x, y, width, height in
            pixels of the original image), `score`. An empty list is an AP of 0.
        max_detections: the best so many detections per image and class are used, at least 1.
        size_bands: name -> lower and upper bound of sqrt(area) in pixels; None: COCO's three bands.
        iou_thresholds: in (0, 1]; None: 0.50, 0.55 ... 0.95.

    Returns:
        The numbers, as fractions of 1.

    Raises:
        InputError: a file cannot be read or is not of the format, an entry is broken or refers to an image or a
            category that the ground truth lacks, there is nothing to measure, or a setting makes no sense.
    """
    bands = dict(COCO_SIZE_BANDS if size_bands is None else size_bands)
    _check_size_bands(bands)
    if isinstance(max_detections, bool) or not isinstance(max_detections, int) or max_detections < 1:
        raise InputError(f"max_detections is {max_detections!r}: give a whole number of at least 1")
    thresholds = np.linspace(0.5, 0.95, 10) if iou_thresholds is None else np.array(sorted(iou_thresholds), dtype=float)
    if thresholds.size == 0 or not bool(np.all((thresholds > 0) & (thresholds <= 1))):
        raise InputError(f"iou_thresholds is {iou_thresholds!r}: give one or more numbers above 0 and up to 1")

    truth, truth_name = _load(ground_truth, "the ground truth")
    objects, image_ranks, category_ranks, class_names = _read_ground_truth(truth, truth_name)
    results, results_name = _load(predictions, "the predictions")
    detections = _read_predictions(results, results_name, image_ranks, category_ranks, truth_name)

    precision, recall = _accumulate(
        objects, detections, len(image_ranks), len(category_ranks), max_detections, list(bands.values()), thresholds
    )
    sizes = [(item["area"], item["category_id"]) for item in objects if not item["iscrowd"]]
    areas = np.array([area for area, _ in sizes])
    classes = np.array([category for _, category in sizes])

    by_size = {
        name: BandResult(
            ap=_mean(precision[:, :, :, 1 + index]),
            ap50=_mean(precision[_at(thresholds, 0.5), :, :, 1 + index]),
            ar=_mean(recall[:, :, 1 + index]),
            num_objects=int(np.count_nonzero((areas >= lower**2) & (areas <= upper**2))),
        )
        for index, (name, (lower, upper)) in enumerate(bands.items())
    }
    by_class = {
        name: ClassResult(
            category_id=category_id,
            ap=_mean(precision[:, :, rank - 1, 0]),
            ap50=_mean(precision[_at(thresholds, 0.5), :, rank - 1, 0]),
            ar=_mean(recall[:, rank - 1, 0]),
            num_objects=int(np.count_nonzero(classes == rank)),
        )
        for name, (category_id, rank) in zip(class_names, category_ranks.items(), strict=True)
    }
    return AveragePrecisionResult(
        ap=_mean(precision[:, :, :, 0]),
        ap50=_mean(precision[_at(thresholds, 0.5), :, :, 0]),
        ap75=_mean(precision[_at(thresholds, 0.75), :, :, 0]),
        ar=_mean(recall[:, :, 0]),
        by_size=by_size,
        by_class=by_class,
        num_images=len(image_ranks),
        num_objects=len(sizes),
        num_predictions=len(detections),
        max_detections=max_detections,
        size_bands=bands,
        iou_thresholds=tuple(thresholds.tolist()),
    )


def _accumulate(
    objects: list[dict[str, Any]],
    detections: list[dict[str, Any]],
    num_images: int,
    num_classes: int,
    max_detections: int,
    bands_px: list[tuple[float, float]],
    thresholds: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Precision (IoU thresholds, 101 recalls, classes, 1 + bands) and recall (IoU thresholds, classes, 1 + bands).

    Entry 0 of the last axis is all sizes; -1 marks what has no objects.
    """
    frame = {
        "images": [{"id": rank} for rank in range(1, num_images + 1)],
        "categories": [{"id": rank} for rank in range(1, num_classes + 1)],
    }
    evaluator = COCOeval_faster(
        COCO({**frame, "annotations": objects}), COCO({**frame, "annotations": detections}), iouType="bbox"
    )
    # Set here and not through the constructor, which logs a warning about bands that leave out some sizes.
    evaluator.params.areaRng = [[0.0, _LARGEST_SIDE_PX**2], *([lower**2, upper**2] for lower, upper in bands_px)]
    evaluator.params.areaRngLbl = [str(index) for index in range(1 + len(bands_px))]
    evaluator.params.maxDets = [max_detections]
    evaluator.params.iouThrs = thresholds
    evaluator.evaluate()
    evaluator.accumulate()
    return np.asarray(evaluator.eval["precision"])[..., 0], np.asarray(evaluator.eval["recall"])[..., 0]


def _load(source: object, role: str) -> tuple[Any, str]:
    """The content of a JSON file, or the object itself, with the name that messages use for it."""
    if not isinstance(source, (str, Path)):
        return source, role
    try:
        with open(source, encoding="utf-8-sig") as file:
            return json.load(file), str(source)
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror}): check the path of {role}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{source} is not JSON ({error}): write {role} again as COCO JSON") from error


def _read_ground_truth(truth: Any, name: str) -> tuple[list[dict[str, Any]], dict[int, int], dict[int, int], list[str]]:
    """Objects with new ids, image id -> rank, category id -> rank (both from 1, by ascending id), and class names."""
    if not isinstance(truth, Mapping):
        raise InputError(f"{name} is not a COCO ground truth: a JSON object with images, annotations and categories")
    for key in ("images", "annotations", "categories"):
        if not isinstance(truth.get(key), list):
            raise InputError(f"{name} has no list {key!r}: give a COCO ground truth (instances) file")
        if not truth[key]:
            raise InputError(f"{name} has an empty list {key!r}: nothing can be measured, give an annotated file")
    image_ranks = _ranks(truth["images"], "images", name)
    category_ranks = _ranks(truth["categories"], "categories", name)

    objects: list[dict[str, Any]] = []
    for index, entry in enumerate(truth["annotations"]):
        where = f"{name}: annotation number {index} (counted from 0)"
        box = _box(entry, where)
        area = entry.get("area")
        if area is None:
            area = box[2] * box[3]
        if not _is_number(area):
            raise InputError(f"{where} has area {area!r}: give a number, or leave it out for width x height")
        objects.append(
            {
                "id": index + 1,
                "image_id": _rank(image_ranks, entry.get("image_id"), where, "image_id", name),
                "category_id": _rank(category_ranks, entry.get("category_id"), where, "category_id", name),
                "bbox": box,
                "area": float(area),
                "iscrowd": int(bool(entry.get("iscrowd", 0))),
            }
        )

    names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in truth["categories"]}
    plain_names = list(names.values())
    class_names = [
        names[key] if plain_names.count(names[key]) == 1 else f"{names[key]} ({key})" for key in category_ranks
    ]
    return objects, image_ranks, category_ranks, class_names


def _read_predictions(
    results: Any, name: str, image_ranks: dict[int, int], category_ranks: dict[int, int], truth_name: str
) -> list[dict[str, Any]]:
    """The detections as the evaluator wants them, with ranks for ids."""
    if isinstance(results, Mapping) and "annotations" in results:
        raise InputError(
            f"{name} is a whole COCO data set, not a list of detections: give COCO results (of `crossdino predict` "
            "those of --format coco-results --image-ids GROUND_TRUTH)"
        )
    if not isinstance(results, Sequence) or isinstance(results, (str, bytes)):
        raise InputError(
            f"{name} is not a list of detections: give COCO results, [{{image_id, category_id, bbox, score}}, ...]"
        )
    detections: list[dict[str, Any]] = []
    for index, entry in enumerate(results):
        where = f"{name}: detection number {index} (counted from 0)"
        box = _box(entry, where)
        score = entry.get("score")
        if not _is_number(score):
            raise InputError(f"{where} has score {score!r}: give a finite number")
        detections.append(
            {
                "id": index + 1,
                "image_id": _rank(image_ranks, entry.get("image_id"), where, "image_id", truth_name),
                "category_id": _rank(category_ranks, entry.get("category_id"), where, "category_id", truth_name),
                "bbox": box,
                "area": box[2] * box[3],
                "score": float(score),
            }
        )
    return detections


def _ranks(entries: list[Any], key: str, name: str) -> dict[int, int]:
    """Id -> 1, 2, ... by ascending id."""
    ids: set[int] = set()
    for index, entry in enumerate(entries):
        identity = entry.get("id") if isinstance(entry, Mapping) else None
        if isinstance(identity, bool) or not isinstance(identity, int):
            raise InputError(f"{name}: entry number {index} of {key!r} has id {identity!r}: give an integer")
        if identity in ids:
            raise InputError(f"{name}: id {identity} comes twice in {key!r} (entry number {index}): ids must be unique")
        ids.add(identity)
    return {identity: rank for rank, identity in enumerate(sorted(ids), start=1)}


def _rank(ranks: dict[int, int], identity: Any, where: str, key: str, truth_name: str) -> int:
    if isinstance(identity, Integral) and identity in ranks:
        return ranks[int(identity)]
    some = ", ".join(str(known) for known in list(ranks)[:5]) + (", ..." if len(ranks) > 5 else "")
    raise InputError(
        f"{where} has {key} {identity!r}, which is not in {truth_name}: use the ids of that file ({some}), as integers"
    )


def _box(entry: Any, where: str) -> list[float]:
    """The entry's box as four floats."""
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} is not an object: give image_id, category_id, bbox and, for detections, score")
    box = entry.get("bbox")
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(_is_number, box)) or box[2] < 0 or box[3] < 0:
        raise InputError(f"{where} has bbox {box!r}: give 4 finite numbers, x, y, width >= 0, height >= 0")
    return [float(value) for value in box]


def _is_number(value: Any) -> bool:
    # The first test is for speed: nearly every value is a plain float.
    return (type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))) and math.isfinite(value)


def _check_size_bands(bands: Mapping[str, tuple[float, float]]) -> None:
    for name, bounds in bands.items():
        if len(bounds) != 2 or not all(_is_number(bound) for bound in bounds) or not 0 <= bounds[0] < bounds[1]:
            raise InputError(
                f"size band {name!r} is {bounds!r}: give two numbers of pixels (sqrt of the area), 0 <= lower < upper"
            )


def _at(thresholds: np.ndarray, value: float) -> np.ndarray:
    """Indices of the IoU threshold `value`; empty if it is not among them."""
    return np.flatnonzero(np.isclose(thresholds, value))


def _mean(values: np.ndarray) -> float:
    """Mean over the entries that are defined (not -1), in COCO's way: all of them with equal weight."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else _UNDEFINED


def _null_if_undefined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _null_if_undefined(value) if isinstance(value, float) else value for key, value in values.items()}


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"
