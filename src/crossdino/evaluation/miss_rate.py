"""WiderPerson as IterDet measures it: average precision, recall and log-average miss rate (mMR).

Source: SamsungLabs/iterdet, `mmdet/datasets/crowd_human.py`, and brambox 3.0.0, which it calls (`stat.pr`, `stat.ap`,
`stat.mr_fppi`, `stat.lamr`). One class; IoU 0.5 and nothing else; no cap on detections and no score threshold, for the
miss rate is read off up to one false positive an image. We differ in two places: an IoU of exactly 0.5 is a match (as
the literature defines it; brambox adds 1e-10 to every denominator, which makes it miss), and no detection at all is an
AP and a recall of 0 (where IterDet stops with an error).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdino.evaluation.person_judgement import MATCH_IOU, JudgedPersons, Persons, judge_persons, read_persons
from crossdino.evaluation.protocol_result import ProtocolResult, counted

FPPI_POINTS: tuple[float, ...] = tuple(np.logspace(-2.0, 0.0, 9).tolist())
"""The false positives per image at which the miss rate is read off."""

Floats = NDArray[np.float64]
GroundTruth = Mapping[str, Any] | Path | str
Predictions = Sequence[Mapping[str, Any]] | Path | str


@dataclass(frozen=True)
class MissRateCurve:
    """What a detector does at every score that it gave, from the highest to the lowest; p points.

    Detections that lie in regions to ignore are no points. Without objects miss rate and recall are NaN.

    Attributes:
        thresholds: (p,) scores: at point i the detections of this score and above are kept.
        fppi: (p,) false positives per image.
        miss_rate: (p,) share of the objects that are not found.
        recall: (p,) share of the objects that are found.
        precision: (p,) share of the detections that are right.
    """

    thresholds: Floats
    fppi: Floats
    miss_rate: Floats
    recall: Floats
    precision: Floats


def evaluate_widerperson(
    ground_truth: GroundTruth, predictions: Predictions, *, min_height: float = 0, count_unannotated: bool = False
) -> ProtocolResult:
    """Measure pedestrian detections as IterDet does on WiderPerson.

    Detections are taken by descending score within an image. Each takes the free object that it overlaps most, with an
    IoU of 0.5 or more; one without may lie in a region to ignore (`iscrowd`) with half its area or more, and is then
    neither right nor wrong, however many do so. All others are false positives.

    Args:
        ground_truth: COCO JSON of one class, as `crossdino prepare widerperson` writes it: a file, or the dictionary.
        predictions: COCO results, as a file or as the list. Do not cut them by score: the miss rate is read off up to
            one false positive per image.
        min_height: objects that are lower than this, in pixels, are ignored. 0 is what IterDet does; the "hard" subset
            named in the papers (height > 20 px) is 21 with WiderPerson's whole numbers.
        count_unannotated: whether images without any annotation count, with their false positives. IterDet leaves
            them out.

    Returns:
        `AP` (the sum over the scores of recall gained x precision; no envelope), `Recall` of all detections, and `mMR`
        as brambox computes it: the geometric mean of the miss rate at `FPPI_POINTS`, 1 below the first point of the
        curve and 0 beyond its last one.

    Raises:
        InputError: a file cannot be read or is not of the format, or there are objects of several classes.
    """
    persons, judged = _judged(ground_truth, predictions, min_height, count_unannotated)
    curve, num_objects = _curve(judged), len(judged.object_images)
    notes: list[str] = []
    if len(curve.thresholds) == 0:
        ap = recall = math.nan if num_objects == 0 else 0.0
        notes.append("no detection counts: AP and Recall are 0, mMR is not defined")
    else:
        ap, recall = average_precision(curve.recall, curve.precision), float(curve.recall[-1])
    sampled = sample_miss_rate(curve.fppi, curve.miss_rate)
    mean = log_average_miss_rate(curve.fppi, curve.miss_rate)
    if len(curve.thresholds) == 1:
        notes.append("all detections have one score: mMR is not defined, as brambox wants two points of the curve")
    elif len(curve.thresholds) and num_objects:
        notes.extend(_notes_on_zero(curve, mean))
    num_unannotated = int(np.count_nonzero(persons.is_unannotated))
    if num_unannotated:
        rule = "counted as without objects" if count_unannotated else "left out, as IterDet does"
        notes.append(f"{counted(num_unannotated, 'image')} without any annotation: {rule}")
    num_right = int(np.count_nonzero(judged.right))
    metrics = {"AP": ap, "Recall": recall, "mMR": mean}
    return ProtocolResult(
        protocol="widerperson",
        metrics=metrics,
        by_class={persons.truth.class_names[persons.label]: dict(metrics)},
        num_images=judged.num_images,
        num_objects=num_objects,
        num_predictions=judged.num_predictions,
        settings={
            "iou_threshold": MATCH_IOU,
            "max_detections": None,
            "min_height": min_height,
            "count_unannotated": count_unannotated,
            "fppi_points": list(FPPI_POINTS),
            "miss_rate_at_points": [None if math.isnan(value) else value for value in sampled.tolist()],
            "fppi_reached": float(curve.fppi[-1]) if len(curve.fppi) else 0.0,
        },
        counts={
            "ignored": int(np.count_nonzero(persons.is_ignored)),
            "true_positives": num_right,
            "false_positives": len(judged.right) - num_right,
            "detections_in_ignored": judged.num_in_ignored,
            "unannotated_images": num_unannotated,
            "detections_left_out_with_their_image": judged.num_left_out,
            "detections_of_other_classes": judged.num_of_other_classes,
        },
        notes=tuple(notes),
    )


def widerperson_curve(
    ground_truth: GroundTruth, predictions: Predictions, *, min_height: float = 0, count_unannotated: bool = False
) -> MissRateCurve:
    """The whole curve behind `evaluate_widerperson`, one point for each distinct score; arguments as there.

    Raises:
        InputError: as there.
    """
    return _curve(_judged(ground_truth, predictions, min_height, count_unannotated)[1])


def average_precision(recall: Floats, precision: Floats) -> float:
    """Sum over the points of (recall gained) x precision, without an envelope; NaN without points.

    Args:
        recall: (p,) not falling.
        precision: (p,).
    """
    if len(recall) == 0:
        return math.nan
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def sample_miss_rate(fppi: Floats, miss_rate: Floats) -> Floats:
    """The miss rate at `FPPI_POINTS`: linear in between, 1 below the first point of the curve, 0 beyond the last one.

    Args:
        fppi: (p,) not falling; of points with the same FPPI the last one counts.
        miss_rate: (p,).

    Returns:
        (9,); NaN if the curve has fewer than two points.
    """
    if len(fppi) < 2:
        return np.full(len(FPPI_POINTS), math.nan)
    return np.interp(FPPI_POINTS, fppi, miss_rate, left=1.0, right=0.0)


def log_average_miss_rate(fppi: Floats, miss_rate: Floats) -> float:
    """The geometric mean of the nine samples of `sample_miss_rate`; 0 if one of them is 0.

    Args:
        fppi: (p,) not falling.
        miss_rate: (p,).

    Returns:
        A fraction of 1; NaN if the curve has fewer than two points.
    """
    with np.errstate(divide="ignore"):
        return float(np.exp(np.mean(np.log(sample_miss_rate(fppi, miss_rate)))))


def _notes_on_zero(curve: MissRateCurve, mean: float) -> list[str]:
    """Why mMR is 0 where the detector did not find everything."""
    reached, missed = float(curve.fppi[-1]), float(curve.miss_rate[-1])
    if mean > 0 or missed == 0:
        return ["mMR is 0 because every object is found within one false positive per image"] if mean == 0 else []
    with np.errstate(divide="ignore"):
        carried_on = np.interp(FPPI_POINTS, curve.fppi, curve.miss_rate, left=1.0)
        usual = float(np.exp(np.mean(np.log(carried_on))))
    return [
        f"the curve ends at {reached:.4g} false positives per image, before 1, and brambox takes the miss rate for 0 "
        f"beyond: mMR is 0. With the last miss rate ({missed:.4f}) carried on it would be {usual:.6f}. Give the "
        "detections without a score threshold"
    ]


def _judged(
    ground_truth: GroundTruth, predictions: Predictions, min_height: float, count_unannotated: bool
) -> tuple[Persons, JudgedPersons]:
    persons = read_persons(ground_truth, min_height=min_height, count_unannotated=count_unannotated)
    return persons, judge_persons(persons, predictions)


def _curve(judged: JudgedPersons) -> MissRateCurve:
    """The curve of the detections that count, one point for each distinct score."""
    order = np.argsort(-judged.scores, kind="stable")
    scores, right = judged.scores[order], judged.right[order]
    last_of_score = np.flatnonzero(np.append(scores[1:] != scores[:-1], [True] * (len(scores) > 0)))
    true, false = np.cumsum(right)[last_of_score], np.cumsum(~right)[last_of_score]
    num_objects = len(judged.object_images)
    recall = true / num_objects if num_objects else np.full(len(true), math.nan)
    return MissRateCurve(
        thresholds=scores[last_of_score],
        fppi=false / max(judged.num_images, 1),
        miss_rate=1.0 - recall,
        recall=recall,
        precision=true / (true + false),
    )
