"""Optimal LRP, the localisation-recall-precision error at the best score threshold of each class.

Oksuz et al., "Localization Recall Precision (LRP)", ECCV 2018, in the form in which AI-TOD's toolkit measures it: at
IoU 0.5, over all areas, with the largest cap. Lower is better. At a threshold s, with what lies above it,

    LRP(s) = (sum over TP of (1 - IoU) / (1 - 0.5) + FP + FN) / (TP + FP + FN),

oLRP is the smallest over s, and its three components are those at the first s that attains it: `loc`, the mean of
1 - IoU of the true positives; `FP`, 1 - precision; `FN`, 1 - recall.
"""

from __future__ import annotations

import numpy as np

from crossdino.evaluation.accumulation import Accumulation
from crossdino.evaluation.coco_input import Bools, Floats
from crossdino.evaluation.match_table import RIGHT, WRONG

OLRP_IOU = 0.5
OLRP_METRICS = ("oLRP", "oLRP_loc", "oLRP_FP", "oLRP_FN")


def optimal_lrp(measured: Accumulation) -> Floats:
    """The errors of every class.

    Args:
        measured: an accumulation whose first threshold is `OLRP_IOU` and whose first range is that of all areas; its
            largest cap counts.

    Returns:
        (K, 4) oLRP and its components loc, FP, FN. A class without objects is -1 throughout; one without any true
        positive has oLRP 1 and FN 1, and NaN for the components that say nothing then, which a mean leaves out.
    """
    table = measured.table
    errors = np.full((len(measured.num_objects), len(OLRP_METRICS)), -1.0)
    for label, num_objects in enumerate(measured.num_objects[:, 0].tolist()):
        if num_objects:
            members = table.of_class(label)
            outcomes = table.outcomes_of(members, 0)[:, 0]
            overlap = np.append(table.overlaps, 0.0)[table.row[members]]
            errors[label] = _errors(outcomes == RIGHT, outcomes == WRONG, overlap, num_objects)
    return errors


def _errors(is_right: Bools, is_wrong: Bools, overlap: Floats, num_objects: int) -> tuple[float, float, float, float]:
    """oLRP, loc, FP, FN of one class; its detections from the highest score to the lowest."""
    if not is_right.any():
        return 1.0, float("nan"), float("nan"), 1.0
    right, wrong = np.cumsum(is_right), np.cumsum(is_wrong)
    missed = num_objects - right
    distance = right - np.cumsum(np.where(is_right, overlap, 0.0))
    lrp = (distance / (1 - OLRP_IOU) + wrong + missed) / (right + wrong + missed)
    best = int(np.argmin(lrp))
    # Where nothing is found at the best threshold, 0 / 0 is NaN: the components do not exist.
    with np.errstate(invalid="ignore"):
        return (
            float(lrp[best]),
            float(distance[best] / right[best]),
            float(wrong[best] / (right[best] + wrong[best])),
            float(missed[best] / num_objects),
        )
