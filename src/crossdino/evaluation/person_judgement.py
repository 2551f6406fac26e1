"""Which detections of pedestrians are right, which wrong, and which lie in regions to ignore: IterDet's rules.

The judgement of a detection depends on its image alone. What is made of it (the curve, AP, mMR) is in
`crossdino.evaluation.miss_rate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdino.documents import load_document, name_of
from crossdino.errors import InputError
from crossdino.evaluation.coco_input import Found, Truth, is_number, read_found, read_truth
from crossdino.evaluation.greedy_matching import find_overlaps, match_greedily

MATCH_IOU = 0.5

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Persons:
    """The ground truth of the one class that is measured.

    Attributes:
        truth: as read, with the annotations of that class only.
        label: of the class.
        is_ignored: (m,) the annotations that are regions to ignore.
        is_unannotated: (images,) the images without any annotation.
        left_out: (images,) those that do not count.
    """

    truth: Truth
    label: int
    is_ignored: Bools
    is_unannotated: Bools
    left_out: Bools


@dataclass(frozen=True)
class JudgedPersons:
    """The detections of a file that count, and the objects; images are numbered without those left out.

    Attributes:
        images: (n,) of the detections; those in regions to ignore are not among them.
        scores: (n,).
        right: (n,) whether they found an object.
        object_images: (m,) of the objects; regions to ignore are not among them.
        num_images: images that count.
        num_predictions: detections in the file.
        num_in_ignored: those in regions to ignore.
        num_left_out: those in images that do not count.
        num_of_other_classes: those of other classes.
    """

    images: NDArray[np.int64]
    scores: NDArray[np.float64]
    right: Bools
    object_images: NDArray[np.int64]
    num_images: int
    num_predictions: int
    num_in_ignored: int
    num_left_out: int
    num_of_other_classes: int


def read_persons(
    ground_truth: Mapping[str, Any] | Path | str, *, min_height: float = 0, count_unannotated: bool = False
) -> Persons:
    """Read a ground truth of one class; see `evaluate_widerperson` for the arguments.

    Raises:
        InputError: it cannot be read or is not of the format, or there are objects of several classes.
    """
    if not is_number(min_height) or min_height < 0:
        raise InputError(f"min_height is {min_height!r}: give a number of pixels, 0 for all objects")
    document = load_document(ground_truth, "the ground truth")
    truth = read_truth(document, name_of(ground_truth, "the ground truth"))
    label, unannotated = _the_class(truth), _unannotated(document, truth)
    mine = truth[truth.labels == label]
    return Persons(
        truth=mine,
        label=label,
        is_ignored=mine.is_crowd | (mine.boxes_xywh[:, 3] < min_height),
        is_unannotated=unannotated,
        left_out=np.zeros_like(unannotated) if count_unannotated else unannotated,
    )


def judge_persons(persons: Persons, predictions: Sequence[Mapping[str, Any]] | Path | str) -> JudgedPersons:
    """Read detections and judge them.

    Args:
        persons: the ground truth.
        predictions: COCO results, as a file or as the list.

    Raises:
        InputError: they cannot be read or are not of the format, or an entry refers to something unknown.
    """
    truth = persons.truth
    everything, _ = read_found(predictions, truth.image_ids, truth.category_ids, truth.name)
    of_class = everything[everything.labels == persons.label]
    found = of_class[~persons.left_out[of_class.images]]
    right, in_ignored = _judge(persons, found)
    place = np.cumsum(~persons.left_out) - 1
    return JudgedPersons(
        images=place[found.images[~in_ignored]],
        scores=found.scores[~in_ignored],
        right=right[~in_ignored],
        object_images=place[truth.images[~persons.is_ignored]],
        num_images=int(np.count_nonzero(~persons.left_out)),
        num_predictions=len(everything),
        num_in_ignored=int(np.count_nonzero(in_ignored)),
        num_left_out=len(of_class) - len(found),
        num_of_other_classes=len(everything) - len(of_class),
    )


def _the_class(truth: Truth) -> int:
    """The label that is measured: the only one, or the only one that has objects."""
    if len(truth.class_names) == 1:
        return 0
    present = np.unique(truth.labels[~truth.is_crowd])
    if len(present) == 1:
        return int(present[0])
    names = ", ".join(truth.class_names[label] for label in present) or "none of its classes"
    raise InputError(
        f"{truth.name} has objects of {names}, and the protocol widerperson measures one class: prepare the data with "
        "`crossdino prepare widerperson`, or keep one category and mark the others' objects with iscrowd 1"
    )


def _unannotated(document: Mapping[str, Any], truth: Truth) -> Bools:
    """(images,) True for images without any annotation: those that the file lists, or else those that have none."""
    empty = np.ones(len(truth.image_ids), dtype=bool)
    empty[truth.images] = False
    listed = document.get("unannotated")
    if listed is None:
        return empty
    if not isinstance(listed, list) or not all(type(image) is int and image in truth.image_ids for image in listed):
        raise InputError(
            f"{truth.name}: 'unannotated' must list ids of images; leave it out, or prepare the data again"
        )
    empty[:] = False
    empty[[truth.image_ids[image] for image in listed]] = True
    return empty


def _judge(persons: Persons, found: Found) -> tuple[Bools, Bools]:
    """(n,) whether a detection found an object, and whether it lies in a region to ignore instead."""
    truth = persons.truth
    right, in_ignored = np.zeros(len(found), dtype=bool), np.zeros(len(found), dtype=bool)
    by_image = np.lexsort((-found.scores, found.images))  # stable: equal scores in the order of the file
    objects = np.argsort(truth.images, kind="stable")
    images = np.unique(found.images)
    first, last = (np.searchsorted(found.images[by_image], images, side) for side in ("left", "right"))
    first_object, last_object = (np.searchsorted(truth.images[objects], images, side) for side in ("left", "right"))
    for place in range(len(images)):
        mine = by_image[first[place] : last[place]]
        there = objects[first_object[place] : last_object[place]]
        real, regions = there[~persons.is_ignored[there]], there[persons.is_ignored[there]]
        overlaps = find_overlaps(
            found.boxes_xywh[mine],
            truth.boxes_xywh[real],
            truth.boxes_xywh[regions],
            MATCH_IOU,
            last_of_equals=False,
        )
        right[mine] = match_greedily(overlaps, MATCH_IOU)
        in_ignored[mine] = ~right[mine] & (overlaps.in_ignored >= MATCH_IOU)
    return right, in_ignored
