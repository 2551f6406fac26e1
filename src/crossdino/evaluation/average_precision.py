"""COCO average precision with any size bands and any number of detections per image.

The protocol is the COCO one (Section IV-A of the Cross-DINO paper uses it for COCO, AI-TOD, VisDrone and SODA-D).
What a benchmark fixes is in `protocols`; here the user chooses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from crossdino.errors import InputError
from crossdino.evaluation.accumulation import LARGEST_AREA, accumulate, at_threshold, mean_defined
from crossdino.evaluation.coco_input import is_number, read_found, read_truth

COCO_SIZE_BANDS: dict[str, tuple[float, float]] = {"small": (0.0, 32.0), "medium": (32.0, 96.0), "large": (96.0, 1e5)}
"""COCO's bands: name -> lower and upper bound of sqrt(area) in pixels, both inclusive."""

_LARGEST_SIDE_PX = 1e5


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

    truth = read_truth(ground_truth).reading_only("iscrowd")
    found, _ = read_found(predictions, truth.image_ids, truth.category_ids, truth.name)
    ranges = [(0.0, LARGEST_AREA), *((lower**2, upper**2) for lower, upper in bands.values())]
    measured = accumulate(truth, found, ranges, [max_detections], thresholds)
    precision, recall = measured.precision, measured.recall[..., 0]
    areas, labels = truth.areas[~truth.is_crowd], truth.labels[~truth.is_crowd]

    by_size = {
        name: BandResult(
            ap=mean_defined(precision[:, :, :, 1 + index]),
            ap50=mean_defined(precision[at_threshold(thresholds, 0.5), :, :, 1 + index]),
            ar=mean_defined(recall[:, :, 1 + index]),
            num_objects=int(np.count_nonzero((areas >= lower**2) & (areas <= upper**2))),
        )
        for index, (name, (lower, upper)) in enumerate(bands.items())
    }
    by_class = {
        name: ClassResult(
            category_id=category_id,
            ap=mean_defined(precision[:, :, label, 0]),
            ap50=mean_defined(precision[at_threshold(thresholds, 0.5), :, label, 0]),
            ar=mean_defined(recall[:, label, 0]),
            num_objects=int(np.count_nonzero(labels == label)),
        )
        for name, (category_id, label) in zip(truth.class_names, truth.category_ids.items(), strict=True)
    }
    return AveragePrecisionResult(
        ap=mean_defined(precision[:, :, :, 0]),
        ap50=mean_defined(precision[at_threshold(thresholds, 0.5), :, :, 0]),
        ap75=mean_defined(precision[at_threshold(thresholds, 0.75), :, :, 0]),
        ar=mean_defined(recall[:, :, 0]),
        by_size=by_size,
        by_class=by_class,
        num_images=len(truth.image_ids),
        num_objects=len(areas),
        num_predictions=len(found),
        max_detections=max_detections,
        size_bands=bands,
        iou_thresholds=tuple(thresholds.tolist()),
    )


def _check_size_bands(bands: Mapping[str, tuple[float, float]]) -> None:
    for name, bounds in bands.items():
        if len(bounds) != 2 or not all(is_number(bound) for bound in bounds) or not 0 <= bounds[0] < bounds[1]:
            raise InputError(
                f"size band {name!r} is {bounds!r}: give two numbers of pixels (sqrt of the area), 0 <= lower < upper"
            )


def _null_if_undefined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _null_if_undefined(value) if isinstance(value, float) else value for key, value in values.items()}


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"
