"""A ground truth as the protocol of COCO, VisDrone, AI-TOD or SODA-D takes it: which flags count, what is no class."""

from __future__ import annotations

import numpy as np

from crossdino.errors import InputError
from crossdino.evaluation.coco_input import Truth
from crossdino.evaluation.protocol_result import counted

# SODA-D: the category that is no class.
_IGNORE_CATEGORY = 10


def truth_of_protocol(name: str, truth: Truth) -> tuple[Truth, list[str]]:
    """The annotations as a protocol takes them.

    COCO, AI-TOD and VisDrone read `iscrowd`, whatever `ignore` says; SODA-D reads `ignore`, whatever `iscrowd` says,
    and its category 10 is no class.

    Args:
        name: `coco`, `visdrone`, `aitod` or `sodad`.
        truth: what a file says.

    Returns:
        The truth, and one line for each thing about it that a reader must know.

    Raises:
        InputError: SODA-D's truth is that of patches, or has no class.
    """
    notes = []
    if truth.has_id_zero:
        notes.append(
            f"an annotation of {truth.name} has the id 0: it counts like any other here, while the original toolkit "
            "takes its detection for a false one"
        )
    if name == "sodad":
        if any("ori_id" in image for image in truth.image_entries):
            raise InputError(
                f"{truth.name} is the annotation file of patches (its images carry ori_id), but SODA-D is measured on "
                "the original images: give their file as the ground truth, and this one as the patches"
            )
        if _IGNORE_CATEGORY in truth.category_ids:
            truth, line = _without_regions(truth)
            notes.append(line)
    read, unread, left = ("ignore", "iscrowd", truth.is_crowd)
    if name != "sodad":
        read, unread, left = ("iscrowd", "ignore", truth.is_ignored & ~truth.is_crowd)
    if left.any():
        number = int(np.count_nonzero(left))
        notes.append(f"annotations with `{unread}`, which this protocol does not read: {number}; they count as objects")
    return truth.reading_only(read), notes


def _without_regions(truth: Truth) -> tuple[Truth, str]:
    number = int(np.count_nonzero(truth.labels == truth.category_ids[_IGNORE_CATEGORY]))
    rest = truth.without_category(_IGNORE_CATEGORY)
    if not rest.category_ids:
        raise InputError(f"{truth.name} has no class but category {_IGNORE_CATEGORY}: nothing can be measured")
    return (
        rest,
        f"category {_IGNORE_CATEGORY} of {truth.name} is no class: left out with {counted(number, 'annotation')}",
    )
