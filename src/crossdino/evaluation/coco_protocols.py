"""The protocols of COCO, VisDrone, AI-TOD and SODA-D: one accumulation each, read at the places the toolkits read it.

The rules, each with its source, are in docs/protocols.md. We differ from a toolkit in its errors only: an annotation of
id 0 can be found here (AI-TOD's own files number from 0, and its toolkit never counts that one), and a number that is
not defined is NaN, not -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from crossdino.benchmarks import BENCHMARKS
from crossdino.errors import InputError
from crossdino.evaluation.accumulation import (
    COCO_IOU_THRESHOLDS,
    LARGEST_AREA,
    accumulate_parts,
    at_threshold,
    mean_defined,
)
from crossdino.evaluation.coco_input import Bools, Floats, Found, Truth, read_found, read_truth
from crossdino.evaluation.olrp import OLRP_IOU, OLRP_METRICS, optimal_lrp
from crossdino.evaluation.protocol_result import ProtocolResult
from crossdino.evaluation.sodad import MERGE_IOU, merge_found, read_patch_detections, read_patches

COCO_PROTOCOLS = ("coco", "visdrone", "aitod", "sodad")

# SODA-D: the range of AP, and the category that is no class.
_SMALL = (0.0, 1024.0)
_IGNORE_CATEGORY = 10


def evaluate_coco_protocol(
    name: str,
    ground_truth: Mapping[str, Any] | Path | str,
    predictions: Sequence[Mapping[str, Any]] | Path | str,
    patches: Mapping[str, Any] | Path | str | None = None,
) -> ProtocolResult:
    """Measure detections as the toolkit of one of `COCO_PROTOCOLS` does; see `protocols.evaluate_protocol`."""
    is_sodad, with_olrp = name == "sodad", name in ("visdrone", "aitod")
    bands, caps = BENCHMARKS[name].size_bands, list(BENCHMARKS[name].max_detections)
    headline = _SMALL if is_sodad else (0.0, LARGEST_AREA)
    # The cap of AP: COCO and AI-TOD take their largest, SODA-D its smallest. AR by size is at the largest in all.
    cap = 0 if is_sodad else len(caps) - 1

    truth = read_truth(ground_truth)
    truth, counts, notes = _sodad_truth(truth) if is_sodad else _coco_truth(truth)
    if is_sodad:
        found, num_given, merging = _sodad_found(truth, predictions, patches)
    else:
        found, _ = read_found(predictions, truth.image_ids, truth.category_ids, truth.name)
        num_given, merging = len(found), None

    precisions, recalls, errors = [], [], []
    for part in accumulate_parts(truth, found, [headline, *bands.values()], caps):
        precisions.append(part.precision)
        recalls.append(part.recall)
        if with_olrp:
            errors.append(optimal_lrp(part, caps[-1]))
    precision, recall = np.concatenate(precisions, axis=2), np.concatenate(recalls, axis=1)

    metrics = _three_precisions(precision[..., 0, cap])
    for place, band in enumerate(bands, start=1):
        metrics[f"AP_{band}"] = mean_defined(precision[..., place, cap])
    for place, limit in enumerate(caps):
        metrics[f"AR@{limit}"] = mean_defined(recall[..., 0, place])
    for place, band in enumerate(bands, start=1):
        metrics[f"AR_{band}"] = mean_defined(recall[..., place, -1])
    if with_olrp:
        metrics |= dict(zip(OLRP_METRICS, map(mean_defined, np.concatenate(errors).T), strict=True))
    by_class = {
        class_name: _three_precisions(precision[:, :, [label], 0, cap])
        for label, class_name in enumerate(truth.class_names)
    }

    is_object = _is_object(truth)
    areas = truth.areas[is_object]
    all_bands = {"Small": _SMALL, **bands} if is_sodad else bands
    sizes = {
        f"objects_{band}": int(np.count_nonzero((areas >= low) & (areas <= high)))
        for band, (low, high) in all_bands.items()
    }
    notes += _crowded(truth, is_object, caps[cap])
    notes += _absent([class_name for class_name, numbers in by_class.items() if np.isnan(numbers["AP"])], headline)
    settings = {
        "max_detections": caps,
        "max_detections_of_AP": caps[cap],
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


def _coco_truth(truth: Truth) -> tuple[Truth, dict[str, int], list[str]]:
    """The truth as COCO, AI-TOD and VisDrone take it: `iscrowd` decides, whatever `ignore` says."""
    notes = _id_zero(truth)
    unread = int(np.count_nonzero(truth.is_ignored & ~truth.is_crowd))
    if unread:
        notes.append(f"{unread} annotations carry `ignore`, which this protocol does not read: they count as objects")
    return truth, {"crowds": int(truth.is_crowd.sum()), "ignored": 0}, notes


def _sodad_truth(truth: Truth) -> tuple[Truth, dict[str, int], list[str]]:
    """The truth as SODA-D takes it: `ignore` decides, whatever `iscrowd` says; category 10 is no class."""
    if any("ori_id" in image for image in truth.image_entries):
        raise InputError(
            f"{truth.name} is the annotation file of patches (its images carry ori_id), but SODA-D is measured on the "
            "original images: give their file as the ground truth, and this one as the patches"
        )
    notes = _id_zero(truth)
    if _IGNORE_CATEGORY in truth.category_ids:
        dropped = int(np.count_nonzero(truth.labels == truth.category_ids[_IGNORE_CATEGORY]))
        truth = truth.without_category(_IGNORE_CATEGORY)
        if not truth.category_ids:
            raise InputError(f"{truth.name} has no class but category {_IGNORE_CATEGORY}: nothing can be measured")
        notes.append(f"category {_IGNORE_CATEGORY} of {truth.name} is no class: its {dropped} annotations are left out")
    unread = int(np.count_nonzero(truth.is_crowd))
    if unread:
        notes.append(f"{unread} annotations carry `iscrowd`, which this protocol does not read: they count as objects")
    notes.append(
        "AP, AP50, AP75 and those of the classes are over objects of up to 1024 px^2 with 100 detections; the class "
        "table of the original code takes 1000, so that it does not average to AP"
    )
    # Ignored in every range, with the plain IoU, and matched once: an object whose area lies in no range.
    areas = np.where(truth.is_ignored, -1.0, truth.areas)
    counts = {"crowds": 0, "ignored": int(truth.is_ignored.sum())}
    return replace(truth, areas=areas, is_crowd=np.zeros_like(truth.is_crowd)), counts, notes


def _is_object(truth: Truth) -> Bools:
    return ~truth.is_crowd & (truth.areas >= 0)


def _sodad_found(
    truth: Truth, predictions: Sequence[Mapping[str, Any]] | Path | str, patches: Mapping[str, Any] | Path | str | None
) -> tuple[Found, int, dict[str, Any] | None]:
    """Detections of the truth's images, how many were given, and how those of patches were merged."""
    if patches is None:
        hint = "; detections of patches need the patches' annotation file too"
        found, _ = read_found(predictions, truth.image_ids, truth.category_ids, truth.name, hint)
        return found, len(found), None
    read = read_patches(patches)
    unknown = next((one for one in read.original_ids if one not in truth.image_ids), None)
    if unknown is not None:
        raise InputError(
            f"{read.name} has patches of the image {unknown}, which is not in {truth.name}: give the patches and the "
            "original images of the same split"
        )
    given = read_patch_detections(predictions, read, truth.category_ids, truth.name)
    merged = merge_found(given, read)
    places = np.array([truth.image_ids[one] for one in read.original_ids], dtype=np.int64)
    merging = {"num_patches": len(read.ids), "iou": MERGE_IOU, "num_detections": len(merged)}
    return replace(merged, images=places[merged.images]), len(given), merging


def _three_precisions(precision: Floats) -> dict[str, float]:
    """AP, AP50 and AP75 of (IoU thresholds, recalls, classes)."""
    half, three_quarters = (at_threshold(COCO_IOU_THRESHOLDS, value) for value in (0.5, 0.75))
    return {
        "AP": mean_defined(precision),
        "AP50": mean_defined(precision[half]),
        "AP75": mean_defined(precision[three_quarters]),
    }


def _id_zero(truth: Truth) -> list[str]:
    if not truth.has_id_zero:
        return []
    return [
        f"an annotation of {truth.name} has the id 0: it counts like any other here, while the original toolkit takes "
        "its detection for a false one"
    ]


def _crowded(truth: Truth, is_object: Bools, cap: int) -> list[str]:
    """A word on images in which not every object can be found."""
    pairs = np.stack((truth.images[is_object], truth.labels[is_object]), axis=1)
    groups, counts = np.unique(pairs, axis=0, return_counts=True)
    images = len(np.unique(groups[counts > cap, 0]))
    if not images:
        return []
    return [f"{images} images have more than {cap} objects of a class, the detections that AP takes of each"]


def _absent(names: Sequence[str], headline: tuple[float, float]) -> list[str]:
    """A word on classes that AP leaves out."""
    if not names:
        return []
    size = "" if headline[1] == LARGEST_AREA else f" of up to {headline[1]:g} px^2"
    some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return [f"{len(names)} classes have no objects{size} and are left out of the means: {some}"]
