"""How well scores are calibrated, by size and by class, before and after; measured on images that the fit did not see.

The expected calibration error is that of Guo et al. (2017, Eq. 3) with the precision at the given IoU for the accuracy,
as the literature on detectors has it: detections are put into bins of equal width by their confidence, and the mean
distance between a bin's confidence and its precision is taken over all detections. Detections of a very low raw score
are left out, the same ones before and after, because the background of a detector without suppression is
endless and easy.

All numbers are cross-fitted: the images are divided into folds, and what is measured on a fold comes from a calibration
that was fitted to the others. The calibration that is handed out is fitted to all images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table

from crossdino.errors import InputError
from crossdino.evaluation.average_precision import COCO_SIZE_BANDS
from crossdino.evaluation.calibration import Calibration, size_shares
from crossdino.evaluation.calibration_fit import SHARED_OBJECTS, Objective, band_sizes, fit_calibration
from crossdino.evaluation.coco_input import boxes_xyxy, read_found, read_truth
from crossdino.evaluation.matching import IN_CROWD, FoundBoxes, TrueBoxes, match_detections

NUM_BINS = 15
NUM_FOLDS = 5
FIXED_THRESHOLD = 0.3
ALL = "all"

_NAN = float("nan")


@dataclass(frozen=True)
class OperatingPoint:
    """What is found with one choice of thresholds; NaN where there is nothing to divide by."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class GroupResult:
    """The numbers of all objects, of a size band, or of a class.

    Attributes:
        num_objects: objects of the group (by the area that the ground truth states), crowds left out.
        num_detections: detections of the group (by the area of the box) that enter the calibration errors.
        temperature, bias: of the final calibration at the middle of the group's detections; NaN without any.
        ece_before, ece_after: expected calibration error in [0, 1]; NaN without detections or without cross-fitting.
        thresholds: lowest and highest one of the final calibration among the group's detections.
        fixed: with raw scores from `FIXED_THRESHOLD`.
        auto: with calibrated scores from their own thresholds.
        bins_before, bins_after: (confidence, precision, detections) of every bin that holds any.
    """

    num_objects: int
    num_detections: int
    temperature: float
    bias: float
    ece_before: float
    ece_after: float
    thresholds: tuple[float, float]
    fixed: OperatingPoint
    auto: OperatingPoint
    bins_before: list[tuple[float, float, int]]
    bins_after: list[tuple[float, float, int]]


@dataclass(frozen=True)
class CalibrationReport:
    """A calibration and what it is worth.

    Attributes:
        calibration: fitted to all images.
        everything: all objects together.
        by_size: band -> its numbers.
        by_class: class -> its numbers.
        size_bands: band -> bounds of sqrt(area) in pixels.
        num_images: images of the ground truth.
        num_folds: folds of the cross-fitting; 0: there was too little data for any.
        folds_of: `images`, or `strips` of the only image that holds matched objects.
        min_score: raw score from which detections enter the calibration errors.
    """

    calibration: Calibration
    everything: GroupResult
    by_size: dict[str, GroupResult]
    by_class: dict[str, GroupResult]
    size_bands: dict[str, tuple[float, float]]
    num_images: int
    num_folds: int
    folds_of: str
    min_score: float

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON knows them; what cannot be measured is None."""
        return _plain({**asdict(self), "calibration": self.calibration.to_dict(), "num_bins": NUM_BINS})

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2)

    def table(self) -> Table:
        """The numbers for the terminal, percentages but for temperature, bias and threshold."""
        table = Table(caption="\n".join(self.notes()), caption_justify="left")
        for header in ("objects", "size (px)"):
            table.add_column(header)
        for header in ("number", "detections", "T", "bias", "ECE before", "after", "threshold"):
            table.add_column(header, justify="right")
        table.add_column(f"P / R / F1 at {FIXED_THRESHOLD:g}", justify="right")
        table.add_column("P / R / F1 at auto", justify="right")
        table.add_row(*_cells(ALL, "", self.everything), end_section=True)
        for name, group in self.by_size.items():
            lower, upper = self.size_bands[name]
            table.add_row(*_cells(name, f"{lower:g}-{upper:g}" if upper < 1e5 else f"{lower:g} and more", group))
        table.add_section()
        if len(self.by_class) > 1:
            for name, group in self.by_class.items():
                table.add_row(*_cells(name, "", group))
        return table

    def notes(self) -> list[str]:
        """What a reader of the numbers must know, one line each."""
        made = self.calibration
        if self.num_folds:
            where = "groups of images" if self.folds_of == "images" else "strips of the one image with matches"
            lines = [
                f"Cross-fitted: each of {self.num_folds} {where} is measured with a fit to the others; T, bias and "
                "threshold are those of the fit to all."
            ]
        else:
            lines = ["Fewer than two objects were found: nothing could be measured apart from the fit."]
        lines.append(
            f"ECE over detections with a raw score of {self.min_score:g} or more, {NUM_BINS} bins; right is IoU "
            f"{made.iou:g} with an object of the class. Thresholds: {made.objective}, on calibrated scores."
        )
        groups = {**self.by_size, **(self.by_class if len(self.by_class) > 1 else {})}
        few = [f"{name} ({group.num_objects})" for name, group in groups.items() if group.num_objects < SHARED_OBJECTS]
        if few:
            shown = ", ".join(few[:6]) + (f" and {len(few) - 6} more" if len(few) > 6 else "")
            lines.append(f"Fewer than {SHARED_OBJECTS:g} objects, so it leans on the others: {shown}.")
        return lines


def calibrate_detections(
    ground_truth: Mapping[str, Any] | Path | str,
    predictions: Sequence[Mapping[str, Any]] | Path | str,
    *,
    class_names: Sequence[str] | None = None,
    size_bands: Mapping[str, tuple[float, float]] | None = None,
    iou: float = 0.5,
    objective: str = "f1",
    min_score: float = 0.05,
) -> CalibrationReport:
    """Fit a calibration to detections, and measure it.

    Args:
        ground_truth: COCO JSON, as a file or as the dictionary. Crowds are regions in which detections do not count.
        predictions: COCO results with raw scores in [0, 1], as a file or as the list; every detection is used.
        class_names: the classes in the order of the labels; None: the ground truth's, by category id.
        size_bands: name -> lower and upper bound of sqrt(area) in pixels; None: COCO's three bands.
        iou: from which overlap a detection is right.
        objective: what thresholds are best for: `f1`, `precision=P`, `recall=R`.
        min_score: detections of a lower raw score do not enter the calibration errors (they do enter the fit).

    Returns:
        The calibration and its numbers.

    Raises:
        InputError: something is wrong with the data (see `evaluate_detections`) or with a setting, there is no object,
            or no detection meets one.
    """
    goal = Objective.parse(objective)
    if not 0 < iou <= 1:
        raise InputError(f"iou is {iou:g}: give a number above 0 and up to 1")
    if not 0 <= min_score < 1:
        raise InputError(f"min_score is {min_score:g}: give a score from 0 to below 1")
    bands = dict(COCO_SIZE_BANDS if size_bands is None else size_bands)
    found, true, names, num_images = _read(ground_truth, predictions, class_names)
    if not np.any(~true.is_crowd):
        raise InputError("the ground truth has no objects: a calibration needs annotated validation data")
    matched = match_detections(found, true, iou)
    sizes_px = band_sizes(found, list(bands.values())) if len(found) else (1.0,)
    made = fit_calibration(found, true, matched, names, sizes_px, goal, iou)

    folds, object_folds, num_folds, folds_of = _folds(found, true, matched)
    scores, is_kept = np.full(len(found), _NAN), np.zeros(len(found), dtype=bool)
    for fold in range(num_folds):
        theirs, objects = folds != fold, object_folds != fold
        positions = np.cumsum(objects) - 1
        theirs_matched = np.where(matched[theirs] >= 0, positions[matched[theirs]], matched[theirs])
        fitted = fit_calibration(found[theirs], true[objects], theirs_matched, names, sizes_px, goal, iou)
        scores[~theirs], is_kept[~theirs] = _apply(fitted, found[~theirs])
    fixed = _Choice(found, true, found.scores, found.scores >= FIXED_THRESHOLD, iou)
    auto = _Choice(found, true, scores, is_kept, iou) if num_folds else None
    measure = _Measure(found, true, matched, made, scores if num_folds else None, fixed, auto, min_score)

    sizes, object_sizes = found.sizes_px, np.sqrt(true.areas)
    by_size = {
        name: measure.group((sizes >= low) & (sizes <= high), (object_sizes >= low) & (object_sizes <= high))
        for name, (low, high) in bands.items()
    }
    by_class = {name: measure.group(found.labels == label, true.labels == label) for label, name in enumerate(names)}
    report = CalibrationReport(
        calibration=made,
        everything=measure.group(np.ones(len(found), dtype=bool), np.ones(len(true), dtype=bool)),
        by_size=by_size,
        by_class=by_class,
        size_bands=bands,
        num_images=num_images,
        num_folds=num_folds,
        folds_of=folds_of,
        min_score=min_score,
    )
    measured = {
        "num_images": num_images,
        "num_folds": num_folds,
        "min_score": min_score,
        **{
            name: {"num_objects": group.num_objects, "ece_before": group.ece_before, "ece_after": group.ece_after}
            for name, group in {ALL: report.everything, **by_size}.items()
        },
    }
    return replace(report, calibration=replace(made, measured=_plain(measured)))


def expected_calibration_error(
    confidence: NDArray[np.float64], right: NDArray[np.bool_], num_bins: int = NUM_BINS
) -> tuple[float, list[tuple[float, float, int]]]:
    """Mean distance between confidence and precision over bins of equal width.

    Args:
        confidence: (n,) in [0, 1].
        right: (n,).
        num_bins: bin i of B holds the confidences in [i / B, (i + 1) / B), the last one also 1.

    Returns:
        The error, NaN without detections; and (mean confidence, precision, detections) of each bin that holds any.
    """
    bins = np.minimum((confidence * num_bins).astype(np.int64), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    filled = counts > 0
    sums = np.bincount(bins, confidence, num_bins)[filled] / counts[filled]
    hits = np.bincount(bins, right, num_bins)[filled] / counts[filled]
    rows = list(zip(sums.tolist(), hits.tolist(), counts[filled].tolist(), strict=True))
    error = float(np.abs(sums - hits) @ counts[filled] / len(confidence)) if len(confidence) else _NAN
    return error, rows


class _Choice:
    """Detections that are kept, and what they meet."""

    def __init__(
        self, found: FoundBoxes, true: TrueBoxes, scores: NDArray[np.float64], kept: NDArray[np.bool_], iou: float
    ) -> None:
        # Matched anew: where a better detection of the same object is not kept, the next one takes its place.
        self.places = np.flatnonzero(kept)
        self.matched = match_detections(replace(found[self.places], scores=scores[self.places]), true, iou)
        self.is_wanted = ~true.is_crowd
        self.is_found = np.zeros(len(true), dtype=bool)
        self.is_found[self.matched[self.matched >= 0]] = True

    def point(self, mine: NDArray[np.bool_], objects: NDArray[np.bool_]) -> OperatingPoint:
        """Precision of the group's detections that are kept, recall of its objects, and their harmonic mean."""
        known = mine[self.places] & (self.matched != IN_CROWD)
        wanted = objects & self.is_wanted
        precision = float(np.mean(self.matched[known] >= 0)) if np.any(known) else _NAN
        recall = float(np.mean(self.is_found[wanted])) if np.any(wanted) else _NAN
        if math.isnan(recall):
            return OperatingPoint(precision, recall, _NAN)
        total = (0.0 if math.isnan(precision) else precision) + recall
        return OperatingPoint(precision, recall, 2 * precision * recall / total if total else 0.0)


@dataclass(frozen=True)
class _Measure:
    """Everything that the numbers of a group are taken from."""

    found: FoundBoxes
    true: TrueBoxes
    matched: NDArray[np.int64]
    calibration: Calibration
    scores: NDArray[np.float64] | None  # cross-fitted
    fixed: _Choice
    auto: _Choice | None  # cross-fitted
    min_score: float

    def group(self, mine: NDArray[np.bool_], objects: NDArray[np.bool_]) -> GroupResult:
        """The numbers of some detections and some objects."""
        found, made = self.found, self.calibration
        counted = mine & (found.scores >= self.min_score) & (self.matched != IN_CROWD)
        right = self.matched[counted] >= 0
        before, bins_before = expected_calibration_error(found.scores[counted], right)
        after, bins_after = _NAN, []
        if self.scores is not None:
            after, bins_after = expected_calibration_error(self.scores[counted], right)
        sizes, labels = found.sizes_px[counted], found.labels[counted]
        temperature = bias = low = high = _NAN
        if len(sizes):
            shares = size_shares(sizes, made.sizes_px)
            table = np.array(made.class_thresholds).T[labels]
            thresholds = (shares * table).sum(1)
            low, high = float(thresholds.min()), float(thresholds.max())
            middle = size_shares(np.array([np.median(sizes)]), made.sizes_px)[0]
            temperature = float(1 / (middle @ (1 / np.array(made.temperatures))))
            bias = float(middle @ np.array(made.biases) + np.mean(np.array(made.class_biases)[labels]))
        nothing = OperatingPoint(_NAN, _NAN, _NAN)
        return GroupResult(
            num_objects=int((objects & ~self.true.is_crowd).sum()),
            num_detections=int(counted.sum()),
            temperature=temperature,
            bias=bias,
            ece_before=before,
            ece_after=after,
            thresholds=(low, high),
            fixed=self.fixed.point(mine, objects),
            auto=nothing if self.auto is None else self.auto.point(mine, objects),
            bins_before=bins_before,
            bins_after=bins_after,
        )


def _apply(calibration: Calibration, found: FoundBoxes) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Calibrated scores, and which detections count, by the very functions that prediction uses."""
    boxes, labels = torch.from_numpy(found.boxes_xyxy), torch.from_numpy(found.labels)
    scores = calibration.calibrate(boxes, torch.from_numpy(found.scores), labels)
    return scores.double().numpy(), (scores >= calibration.thresholds(boxes, labels)).numpy()


def _folds(
    found: FoundBoxes, true: TrueBoxes, matched: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], int, str]:
    """The fold of every detection and of every object, how many folds there are, and what they consist of.

    Folds hold about the same number of matched detections, each at least one, so that every fit has some. A data set
    with a single image that holds any is divided into upright strips instead.
    """
    right = matched >= 0
    units, object_units, folds_of = found.images, true.images, "images"
    if len(np.unique(units[right])) < 2:
        centres = found.boxes_xyxy[:, ::2].mean(1)
        edges = np.quantile(centres[right], np.arange(1, NUM_FOLDS) / NUM_FOLDS)
        units = np.searchsorted(edges, centres)
        object_units = np.searchsorted(edges, true.boxes_xyxy[:, ::2].mean(1))
        object_units[matched[right]] = units[right]
        folds_of = "strips"
    names = np.unique(np.concatenate([units, object_units]))
    hits = np.bincount(np.searchsorted(names, units[right]), minlength=len(names))
    others = np.bincount(np.searchsorted(names, units), minlength=len(names))
    num_folds = min(NUM_FOLDS, int((hits > 0).sum()))
    if num_folds < 2:
        return np.zeros(len(found), np.int64), np.zeros(len(true), np.int64), 0, folds_of
    fold_of = np.zeros(len(names), dtype=np.int64)
    loads = [(0, 0)] * num_folds
    for unit in np.lexsort((-others, -hits)).tolist():
        fold = loads.index(min(loads))
        fold_of[unit] = fold
        loads[fold] = (loads[fold][0] + int(hits[unit]), loads[fold][1] + int(others[unit]))
    return (
        fold_of[np.searchsorted(names, units)],
        fold_of[np.searchsorted(names, object_units)],
        num_folds,
        folds_of,
    )


def _read(
    ground_truth: Any, predictions: Any, class_names: Sequence[str] | None
) -> tuple[FoundBoxes, TrueBoxes, tuple[str, ...], int]:
    """Detections and objects as arrays, the classes and the number of images; checked as for average precision."""
    truth = read_truth(ground_truth)
    detections, results_name = read_found(predictions, truth.image_ids, truth.category_ids, truth.name)
    wrong = np.flatnonzero((detections.scores < 0) | (detections.scores > 1))
    if wrong.size:
        raise InputError(
            f"{results_name}: detection number {wrong[0]} (counted from 0) has score "
            f"{detections.scores[wrong[0]]:g}: calibration needs scores from 0 to 1"
        )
    found_names = truth.class_names
    names = tuple(found_names) if class_names is None else tuple(class_names)
    unknown = next((name for name in found_names if name not in names), None)
    if unknown is not None:
        raise InputError(f"{truth.name} has the class {unknown!r}, which is none of the model's: {', '.join(names)}")
    label_of = np.array([names.index(name) for name in found_names], dtype=np.int64)
    found = FoundBoxes(
        images=detections.images,
        boxes_xyxy=boxes_xyxy(detections.boxes_xywh),
        labels=label_of[detections.labels],
        scores=detections.scores,
    )
    true = TrueBoxes(
        images=truth.images,
        boxes_xyxy=boxes_xyxy(truth.boxes_xywh),
        labels=label_of[truth.labels],
        areas=truth.areas,
        is_crowd=truth.is_crowd,
    )
    return found, true, names, len(truth.image_ids)


def _cells(name: str, size: str, group: GroupResult) -> list[str]:
    low, high = group.thresholds
    threshold = "-" if math.isnan(low) else f"{low:.2f}" if high - low < 0.005 else f"{low:.2f}-{high:.2f}"
    points = [
        " / ".join(_percent(value) for value in (point.precision, point.recall, point.f1))
        for point in (group.fixed, group.auto)
    ]
    return [
        name,
        size,
        str(group.num_objects),
        str(group.num_detections),
        "-" if math.isnan(group.temperature) else f"{group.temperature:.2f}",
        "-" if math.isnan(group.bias) else f"{group.bias:+.2f}",
        _percent(group.ece_before),
        _percent(group.ece_after),
        threshold,
        *points,
    ]


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _plain(value: Any) -> Any:
    """The same with None for NaN and lists for tuples, as JSON has it."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
