"""WiderPerson's numbers (AP, Recall, mMR) of many resamples of the images.

The judgement of a detection depends on its image alone, and all detections of one score are one point of the curve, so
that the curve of a resample is a sum over the points with the number of times that each image was drawn. Points at
which a resample has no detection are dropped, as they would be of its duplicated data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdino.evaluation.bootstrap import draw_images
from crossdino.evaluation.miss_rate import average_precision, log_average_miss_rate
from crossdino.evaluation.person_judgement import JudgedPersons, judge_persons, read_persons

METRICS = ("AP", "Recall", "mMR")


def resample_persons(
    ground_truth: Mapping[str, Any] | Path | str,
    predictions: Sequence[Sequence[Mapping[str, Any]] | Path | str],
    num_resamples: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, NDArray[np.float64]], list[JudgedPersons], int]:
    """The numbers of the data set itself and of B resamples of its annotated images.

    Args:
        ground_truth: COCO JSON of one class.
        predictions: files of COCO results, or lists.
        num_resamples: B.
        seed: of the resamples.
        on_progress: called with the finished and all resamples of all files.

    Returns:
        Metric -> (files, 1 + B), the judgement of each file, and how many images have no annotation and do not count.

    Raises:
        InputError: as `evaluate_widerperson`.
    """
    samples = np.full((len(METRICS), len(predictions), 1 + num_resamples), math.nan)
    persons = read_persons(ground_truth)
    judged = [judge_persons(persons, source) for source in predictions]
    for file, found in enumerate(judged):
        drawn = draw_images(found.num_images, num_resamples, seed)
        order = np.argsort(-found.scores, kind="stable")
        scores, right, images = found.scores[order], found.right[order], found.images[order]
        points = np.flatnonzero(np.append(scores[1:] != scores[:-1], [True] * (len(scores) > 0)))
        in_images = np.bincount(found.object_images, minlength=found.num_images)
        for column in range(1 + num_resamples):
            counts = drawn[:, column].astype(np.int64)
            weights = counts[images]
            samples[:, file, column] = _numbers(
                np.cumsum(weights * right)[points],
                np.cumsum(weights)[points],
                int(in_images @ counts),
                found.num_images,
            )
            if on_progress is not None and column % 50 == 0:
                on_progress(file * (1 + num_resamples) + column, len(judged) * (1 + num_resamples))
    num_left_out = int(np.count_nonzero(persons.left_out))
    return dict(zip(METRICS, samples, strict=True)), judged, num_left_out


def _numbers(
    right: NDArray[np.int64], total: NDArray[np.int64], num_objects: int, num_images: int
) -> tuple[float, float, float]:
    """AP, Recall and mMR of the right and of all detections up to each point."""
    if not num_objects:
        return math.nan, math.nan, math.nan
    present = np.flatnonzero(np.diff(total, prepend=0))
    if not len(present):
        return 0.0, 0.0, math.nan
    right, total = right[present], total[present]
    recall = right / num_objects
    mean = log_average_miss_rate((total - right) / num_images, 1.0 - recall)
    return average_precision(recall, right / total), float(recall[-1]), mean
