"""Finding a `Calibration`: temperatures and biases by penalised likelihood, thresholds by search.

Little data must not decide much. The curve of a size is held near the curve of all sizes, the bias of a class near
none, and all near "as the detector says" (Gaussian priors, so that one class, no objects of a size, or detections that
are all right need no rule of their own). The threshold of a size or a class is the best one for its own objects
together with `SHARED_OBJECTS` objects' worth of all others: with hundreds of objects it is its own, with none
it is that of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special
from numpy.typing import NDArray
from scipy import sparse

from crossdino.errors import InputError
from crossdino.evaluation.calibration import Calibration, score_logits, size_shares
from crossdino.evaluation.matching import IN_CROWD, FoundBoxes, TrueBoxes, box_sizes

SHARED_OBJECTS = 20.0
"""How many objects' worth of the others enter the threshold of a size or of a class."""

# Standard deviations of the priors: of the common slope (1/T) about 1 and the common bias about 0, of a size's slope
# and bias about the common ones, and of a class's bias about 0.
_SLOPE, _BIAS, _SIZE_SLOPE, _SIZE_BIAS, _CLASS_BIAS = 1.0, 3.0, 0.5, 1.0, 1.0
_SLOPE_LIMITS = (0.05, 20.0)
# Two sizes nearer than this ratio are one.
_NEAREST_RATIO = 1.1
# Of the fit: the slope that may be left, relative to the square root of the number of detections, and its patience.
_CONVERGED, _MOST_STEPS, _MOST_HALVINGS = 1e-8, 200, 40


@dataclass(frozen=True)
class Objective:
    """What thresholds shall be best for.

    Attributes:
        name: `f1`, `precision` or `recall`.
        target: the precision or recall to reach; of no meaning for `f1`.
    """

    name: str = "f1"
    target: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read `f1`, `precision=0.9` or `recall=0.9`.

        Raises:
            InputError: it is none of these.
        """
        name, equals, value = text.strip().partition("=")
        if name == "f1" and not equals:
            return cls()
        try:
            target = float(value)
        except ValueError:
            target = 0.0
        if name not in ("precision", "recall") or not 0 < target <= 1:
            raise InputError(
                f"objective {text!r} is not understood: give f1, precision=P or recall=R with a number above 0 and up "
                "to 1, e.g. precision=0.9"
            )
        return cls(name, target)

    def __str__(self) -> str:
        return self.name if self.name == "f1" else f"{self.name}={self.target:g}"


def band_sizes(found: FoundBoxes, bands_px: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    """One size for each band at which its curve and its thresholds are known.

    It is the median size of the band's detections, weighted by score so that the many detections of background do not
    place it. Bands without detections have none, and of two that are nearly the same the smaller one is left.

    Args:
        found: the detections, at least one.
        bands_px: bounds of the bands, both inclusive.

    Returns:
        The sizes in pixels, ascending, at least one.
    """
    sizes = found.sizes_px
    medians = []
    for lower, upper in bands_px:
        inside = (sizes >= lower) & (sizes <= upper) & (sizes > 0)
        if np.any(inside):
            medians.append(_weighted_median(sizes[inside], found.scores[inside]))
    kept: list[float] = []
    for median in sorted(medians or [_weighted_median(sizes.clip(min=1e-3), found.scores)]):
        if not kept or median > kept[-1] * _NEAREST_RATIO:
            kept.append(median)
    return tuple(kept)


def fit_calibration(
    found: FoundBoxes,
    true: TrueBoxes,
    matched: NDArray[np.int64],
    class_names: Sequence[str],
    sizes_px: Sequence[float],
    objective: Objective,
    iou: float = 0.5,
) -> Calibration:
    """Fit temperatures, biases and thresholds.

    Args:
        found: n detections with the detector's scores.
        true: the objects.
        matched: (n,) as `match_detections` gives it; what lies in a crowd is left out.
        class_names: the K classes.
        sizes_px: S sizes at which curve and thresholds are to be known, ascending.
        objective: what the thresholds are to be best for.
        iou: of the matching, kept for the reader.

    Returns:
        The calibration, without digest, settings and measurements.

    Raises:
        InputError: no detection meets an object, or the fit does not converge.
    """
    known = matched != IN_CROWD
    right = matched[known] >= 0
    if not np.any(right):
        raise InputError(
            f"none of the {len(found)} detections meets an object (IoU {iou:g}, same class): there is nothing to "
            "calibrate; check that these are the model's images and classes, or train further"
        )
    shares = size_shares(found.sizes_px[known], sizes_px)
    labels = found.labels[known]
    slopes, biases, class_biases = _fit_curves(
        score_logits(found.scores[known]), right, shares, labels, len(class_names)
    )
    made = Calibration(
        class_names=tuple(class_names),
        sizes_px=tuple(map(float, sizes_px)),
        temperatures=tuple((1 / slopes).tolist()),
        biases=tuple(biases.tolist()),
        class_biases=tuple(class_biases.tolist()),
        class_thresholds=(),
        objective=str(objective),
        iou=iou,
    )
    scores = scipy.special.expit(
        (shares @ slopes) * score_logits(found.scores[known]) + shares @ biases + class_biases[labels]
    )
    # An object counts for the sizes of the detection that met it, or else for its own.
    object_sizes = box_sizes(true.boxes_xyxy)
    object_sizes[matched[known][right]] = found.sizes_px[known][right]
    wanted = ~true.is_crowd
    object_shares, object_labels = size_shares(object_sizes[wanted], sizes_px), true.labels[wanted]
    table = _threshold_table(scores, right, shares, labels, object_shares, object_labels, len(class_names), objective)
    return Calibration(**{**vars(made), "class_thresholds": tuple(map(tuple, table.tolist()))})


def best_threshold(
    scores: NDArray[np.float64],
    right_weights: NDArray[np.float64],
    weights: NDArray[np.float64],
    num_objects: float,
    objective: Objective,
) -> float:
    """The score from which detections are best taken; of equally good ones the highest.

    `f1` is at its highest value; `precision=P` takes as many detections as it can with a precision of P or more, or,
    where none reaches it, has the highest precision; `recall=R` takes as few as it must, or all.

    Args:
        scores: (n,) in descending order.
        right_weights: (n,) the weight of each detection that is right, 0 for the others.
        weights: (n,) the weight of each detection.
        num_objects: the objects' weight.
        objective: what is best.

    Returns:
        A score halfway between that of the last detection taken and that of the next one, 0 being below the last.
    """
    last = np.append(scores[1:] < scores[:-1], True)  # where detections of equal score end
    hits, taken = np.cumsum(right_weights)[last], np.cumsum(weights)[last]
    levels = scores[last]
    precision = hits / np.maximum(taken, 1e-12)
    if objective.name == "f1":
        chosen = int(np.argmax(2 * hits / (taken + num_objects)))
    elif objective.name == "precision":
        reached = np.flatnonzero(precision >= objective.target - 1e-9)
        chosen = int(reached[-1]) if len(reached) else int(np.argmax(precision))
    else:
        reached = np.flatnonzero(hits >= (objective.target - 1e-9) * num_objects)
        if not len(reached):
            return 0.0
        chosen = int(reached[0])
    below = levels[chosen + 1] if chosen + 1 < len(levels) else 0.0
    return float((levels[chosen] + below) / 2)


def _fit_curves(
    logits: NDArray[np.float64],
    right: NDArray[np.bool_],
    shares: NDArray[np.float64],
    labels: NDArray[np.int64],
    num_classes: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Slopes (S,), biases (S,) and class biases (K,) of the highest posterior; the problem is convex."""
    num_sizes, num_detections = shares.shape[1], len(logits)
    # Platt's targets: an outcome that was always seen is not taken for certain.
    num_right, num_wrong = int(right.sum()), int((~right).sum())
    targets = np.where(right, (num_right + 1) / (num_right + 2), 1 / (num_wrong + 2))
    # Unknowns: the common slope and bias (which only the priors know), slopes, biases, class biases.
    own_class = sparse.csr_array(
        (np.ones(num_detections), (np.arange(num_detections), labels)), (num_detections, num_classes)
    )
    parts = [sparse.csr_array((num_detections, 2)), shares * logits[:, None], shares, own_class]
    design = sparse.hstack([sparse.csr_array(part) for part in parts], format="csr")
    centre = np.concatenate([[1.0, 0.0], np.ones(num_sizes), np.zeros(num_sizes + num_classes)])
    prior = np.diag(
        np.concatenate(
            [
                [_SLOPE**-2 + num_sizes * _SIZE_SLOPE**-2, _BIAS**-2 + num_sizes * _SIZE_BIAS**-2],
                np.full(num_sizes, _SIZE_SLOPE**-2),
                np.full(num_sizes, _SIZE_BIAS**-2),
                np.full(num_classes, _CLASS_BIAS**-2),
            ]
        )
    )
    slopes_at, biases_at = slice(2, 2 + num_sizes), slice(2 + num_sizes, 2 + 2 * num_sizes)
    prior[0, slopes_at] = prior[slopes_at, 0] = -(_SIZE_SLOPE**-2)
    prior[1, biases_at] = prior[biases_at, 1] = -(_SIZE_BIAS**-2)
    lowest, highest = np.full(len(centre), -np.inf), np.full(len(centre), np.inf)
    lowest[0], highest[0] = lowest[slopes_at], highest[slopes_at] = _SLOPE_LIMITS
    if num_classes == 1:
        lowest[-1] = highest[-1] = 0.0  # a single class has the common bias and none of its own

    def loss(values: NDArray[np.float64]) -> float:
        curve, away = design @ values, values - centre
        return float(np.sum(np.logaddexp(0, curve) - targets * curve) + away @ prior @ away / 2)

    values, value, left = centre, loss(centre), np.inf
    # Newton's method; what lies at a limit and wants to go beyond rests.
    for _ in range(_MOST_STEPS):
        chances = scipy.special.expit(design @ values)
        gradient = design.T @ (chances - targets) + prior @ (values - centre)
        left = float(np.abs((values - gradient).clip(lowest, highest) - values).max())
        if left < _CONVERGED * num_detections**0.5:
            return values[slopes_at], values[biases_at], values[biases_at.stop :]
        curvature = (design.T @ (design * (chances * (1 - chances))[:, None])).toarray() + prior
        free = ~(((values <= lowest) & (gradient > 0)) | ((values >= highest) & (gradient < 0)))
        step = np.zeros_like(values)
        step[free] = np.linalg.solve(curvature[np.ix_(free, free)], -gradient[free])
        tried = (values + step).clip(lowest, highest)
        halvings = 0
        while loss(tried) > value * (1 + 1e-12) and halvings < _MOST_HALVINGS:
            halvings += 1
            tried = (values + step / 2**halvings).clip(lowest, highest)
        values, value = tried, loss(tried)
    raise InputError(
        f"the calibration did not converge in {_MOST_STEPS} steps (gradient {left:.1e}): look at the scores of the "
        "detections"
    )


def _threshold_table(
    scores: NDArray[np.float64],
    right: NDArray[np.bool_],
    shares: NDArray[np.float64],
    labels: NDArray[np.int64],
    object_shares: NDArray[np.float64],
    object_labels: NDArray[np.int64],
    num_classes: int,
    objective: Objective,
) -> NDArray[np.float64]:
    """(S, K) thresholds, each for the detections of about that size and of that class."""
    order = np.argsort(-scores, kind="stable")
    scores, right, shares, labels = scores[order], right[order], shares[order], labels[order]
    num_sizes, total = shares.shape[1], float(len(object_labels))
    # Every group is a weight for each detection and a number of objects; the wider group enters the narrower one.
    common = SHARED_OBJECTS / total
    size_groups = [
        (shares[:, size] + common, float(object_shares[:, size].sum()) + SHARED_OBJECTS) for size in range(num_sizes)
    ]
    table = np.empty((num_sizes, num_classes))
    for label in range(num_classes):
        mine, my_objects = labels == label, object_labels == label
        weights_c, objects_c = mine + common, float(my_objects.sum()) + SHARED_OBJECTS
        for size, (weights_s, objects_s) in enumerate(size_groups):
            if num_classes == 1:
                weights, objects = weights_s, objects_s
            else:
                half = SHARED_OBJECTS / 2
                weights = mine * shares[:, size] + half / objects_s * weights_s + half / objects_c * weights_c
                objects = float(object_shares[my_objects, size].sum()) + SHARED_OBJECTS
            table[size, label] = best_threshold(scores, right * weights, weights, objects, objective)
    return table


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    order = np.argsort(values, kind="stable")
    sums = np.cumsum(weights[order] + 1e-9)
    return float(values[order][np.searchsorted(sums, sums[-1] / 2)])
