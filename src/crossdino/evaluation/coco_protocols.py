"""The protocols of COCO, VisDrone, AI-TOD and SODA-D: one accumulation each, read at the places the toolkits read it.

The rules, each with its source, are in docs/protocols.md. We differ from a toolkit in its errors only: an annotation of
id 0 can be found here (AI-TOD's own files number from 0, and its toolkit never counts that one), and a number that is
not defined is NaN, not -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crossdino.benchmarks import BENCHMARKS
from crossdino.evaluation.accumulation import (
    COCO_IOU_THRESHOLDS,
    LARGEST_AREA,
    accumulate,
    at_threshold,
    mean_defined,
)
from crossdino.evaluation.coco_input import Bools, Floats, Truth, read_truth
from crossdino.evaluation.measures import plan_of_protocol
from crossdino.evaluation.olrp import OLRP_IOU, OLRP_METRICS, optimal_lrp
from crossdino.evaluation.protocol_result import ProtocolResult, counted
from crossdino.evaluation.protocol_truth import truth_of_protocol
from crossdino.evaluation.sodad import read_detections

COCO_PROTOCOLS = ("coco", "visdrone", "aitod", "sodad")


def evaluate_coco_protocol(
    name: str,
    ground_truth: Mapping[str, Any] | Path | str,
    predictions: Sequence[Mapping[str, Any]] | Path | str,
    patches: Mapping[str, Any] | Path | str | None = None,
) -> ProtocolResult:
    """Measure detections as the toolkit of one of `COCO_PROTOCOLS` does; see `protocols.evaluate_protocol`."""
    is_sodad, with_olrp = name == "sodad", name in ("visdrone", "aitod")
    plan = plan_of_protocol(name)
    bands, caps = BENCHMARKS[name].size_bands, list(BENCHMARKS[name].max_detections)
    headline, *_ = plan.bands.values()
    cap = next(measure.cap for measure in plan.measures if measure.kind == "precision")

    truth, notes = truth_of_protocol(name, read_truth(ground_truth))
    counts = {"crowds": int(truth.is_crowd.sum()), "ignored": int(truth.is_ignored.sum())}
    hint = "; detections of patches need the patches' annotation file too" if is_sodad else ""
    found, num_given, merging = read_detections(predictions, truth, patches, hint)
    measured = accumulate(truth, found, list(plan.bands.values()), caps, precision_cap=cap)

    # (..., K) what each number is the mean of, the classes last.
    values: dict[str, Floats] = {}
    for measure in plan.measures:
        band = list(plan.bands).index(measure.band)
        chosen = slice(None) if measure.iou is None else at_threshold(COCO_IOU_THRESHOLDS, measure.iou)
        recall = measured.recall[..., band, caps.index(measure.cap)]
        values[measure.name] = measured.precision[chosen, ..., band] if measure.kind == "precision" else recall[chosen]
    if with_olrp:
        values |= dict(zip(OLRP_METRICS, optimal_lrp(measured).T, strict=True))
    metrics = {metric: mean_defined(of_classes) for metric, of_classes in values.items()}
    by_class = {
        class_name: {metric: mean_defined(of_classes[..., label]) for metric, of_classes in values.items()}
        for label, class_name in enumerate(truth.class_names)
    }

    is_object = _is_object(truth)
    areas = truth.areas[is_object]
    all_bands = {"Small": headline, **bands} if is_sodad else bands
    sizes = {
        f"objects_{band}": int(np.count_nonzero((areas >= low) & (areas <= high)))
        for band, (low, high) in all_bands.items()
    }
    if is_sodad:
        notes.append(
            "AP, AP50, AP75 and those of the classes are over objects of up to 1024 px^2 with 100 detections; the "
            "class table of the original code takes 1000, so that it does not average to AP"
        )
    notes += _crowded(truth, is_object, cap)
    notes += _absent([class_name for class_name, numbers in by_class.items() if np.isnan(numbers["AP"])], headline)
    settings = {
        "max_detections": caps,
        "max_detections_of_AP": cap,
        "area_of_AP": list(headline),
        "area_bands": {band: list(bounds) for band, bounds in bands.items()},
        "iou_thresholds": COCO_IOU_THRESHOLDS.tolist(),
        **({"oLRP_iou": OLRP_IOU} if with_olrp else {}),
        **({"merging": merging} if is_sodad else {}),
        **{key: truth.info[key] for key in ("benchmark", "split", "options") if key in truth.info},
    }
    return ProtocolResult(
        protocol=name,
        metrics=metrics,
        by_class=by_class,
        num_images=len(truth.image_ids),
        num_objects=len(areas),
        num_predictions=num_given,
        settings=settings,
        counts=sizes | counts,
        notes=tuple(notes),
    )


def _is_object(truth: Truth) -> Bools:
    return ~(truth.is_crowd | truth.is_ignored) & (truth.areas >= 0)


def _crowded(truth: Truth, is_object: Bools, cap: int) -> list[str]:
    """A word on images in which not every object can be found."""
    pairs = np.stack((truth.images[is_object], truth.labels[is_object]), axis=1)
    groups, counts = np.unique(pairs, axis=0, return_counts=True)
    images = len(np.unique(groups[counts > cap, 0]))
    if not images:
        return []
    return [f"images with more than {cap} objects of a class, the detections that AP takes of each: {images}"]


def _absent(names: Sequence[str], headline: tuple[float, float]) -> list[str]:
    """A word on classes that AP leaves out."""
    if not names:
        return []
    size = "" if headline[1] == LARGEST_AREA else f" of up to {headline[1]:g} px^2"
    some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return [f"{counted(len(names), 'class')} without objects{size}, left out of the means: {some}"]
