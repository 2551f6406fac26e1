"""Optimal LRP as plain loops, from its definition (Oksuz et al., 2018) and the conventions of AI-TOD's toolkit."""

from __future__ import annotations

import math

from tests.reference.coco_ap_plain import verdicts_of_class

ALL_AREAS = (0.0, 1e10)


def class_errors(truth: dict, detections: list[dict], category_id: int, cap: int) -> tuple[float, ...] | None:
    """oLRP and its components loc, FP, FN of a class; None without objects, NaN for what says nothing."""
    verdicts, num_objects = verdicts_of_class(truth, detections, category_id, ALL_AREAS, cap, 0.5, "crowd")
    if num_objects == 0:
        return None
    if not any(verdict == "right" for _, verdict, _ in verdicts):
        return 1.0, math.nan, math.nan, 1.0
    best = None
    for last in range(1, len(verdicts) + 1):
        overlaps = [overlap for _, verdict, overlap in verdicts[:last] if verdict == "right"]
        right, wrong = len(overlaps), sum(verdict == "wrong" for _, verdict, _ in verdicts[:last])
        missed = num_objects - right
        distance = sum(1 - overlap for overlap in overlaps)
        error = (distance / (1 - 0.5) + wrong + missed) / (right + wrong + missed)
        # Rounding apart: the first of equal minima.
        if best is None or error < best[0] - 1e-12:
            loc = distance / right if right else math.nan
            precision_error = wrong / (right + wrong) if right + wrong else math.nan
            best = (error, loc, precision_error, missed / num_objects)
    return best


def mean_errors(truth: dict, detections: list[dict], cap: int) -> tuple[float, ...]:
    """The four means over the classes that have objects, each over the values that exist."""
    errors = [class_errors(truth, detections, category["id"], cap) for category in truth["categories"]]
    known = [values for values in errors if values is not None]
    means = []
    for place in range(4):
        column = [values[place] for values in known if not math.isnan(values[place])]
        means.append(sum(column) / len(column) if column else math.nan)
    return tuple(means)
