"""Detections of patches put together to detections of the images that the patches were cut from, as SODA-D has it.

The rules are those of the data set's own code (CFINet and SODA-mmdetection, `sodad.py`): every box moves by the corner
of its patch, then class-wise greedy suppression at IoU 0.5 over all patches of an image, in single precision and
without any score threshold. The merging of our own tiles (`crossdino.merging`) is another one; this is what the
published numbers were measured with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdino.errors import InputError
from crossdino.evaluation.coco_input import (
    Floats,
    Found,
    Ints,
    Truth,
    boxes_xyxy,
    id_positions,
    is_number,
    load_document,
    name_of,
    read_found,
)
from crossdino.suppression import Crowd, greedy_suppression

MERGE_IOU = 0.5


@dataclass(frozen=True)
class Patches:
    """P patches, by ascending id.

    Attributes:
        name: what messages call their file.
        ids: id of a patch -> position.
        places: (P,) where the file lists them.
        originals: (P,) which of `original_ids` each was cut from.
        original_ids: ids of the images that were cut, in the order in which the file first names them.
        corners: (P, 2) float32, left and top in pixels of the original image.
        sizes: (P, 2) width and height in pixels, infinite where the file does not state them.
        category_ids: id -> position; empty where the file has no categories.
    """

    name: str
    ids: dict[int, int]
    places: Ints
    originals: Ints
    original_ids: tuple[int, ...]
    corners: NDArray[np.float32]
    sizes: Floats
    category_ids: dict[int, int]


def merge_patches(
    predictions: Sequence[Mapping[str, Any]] | Path | str,
    patches: Mapping[str, Any] | Path | str,
    iou: float = MERGE_IOU,
) -> list[dict[str, Any]]:
    """Detections of the original images from detections of their patches.

    Args:
        predictions: COCO results whose `image_id` are those of patches, boxes in pixels of the patch; file or list.
        patches: the annotation file of the patches or its content; its images carry `ori_id` and `start_coord`, left
            and top in pixels.
        iou: of two boxes of a class that overlap by more, the one of the lower score goes.

    Returns:
        COCO results with the ids of the original images and boxes in their pixels: image by image as the patches name
        them, class by class, the best first; numbers in single precision.

    Raises:
        InputError: something cannot be read, a detection is of no patch or lies outside of its own, or `iou` makes no
            sense.
    """
    if not (is_number(iou) and 0 < iou <= 1):
        raise InputError(f"iou is {iou!r}: give a number above 0 and up to 1 (SODA-D: 0.5)")
    read = read_patches(patches)
    if not read.category_ids:
        raise InputError(f"{read.name} has no list 'categories': give the annotation file of the patches")
    found = read_patch_detections(predictions, read, read.category_ids)
    merged = merge_found(found, read, iou)
    categories = list(read.category_ids)
    return [
        {"image_id": read.original_ids[image], "category_id": categories[label], "bbox": box, "score": score}
        for image, label, box, score in zip(
            merged.images.tolist(),
            merged.labels.tolist(),
            merged.boxes_xywh.tolist(),
            merged.scores.tolist(),
            strict=True,
        )
    ]


def read_patches(source: Mapping[str, Any] | Path | str) -> Patches:
    """Read which patches there are and where they were cut.

    Raises:
        InputError: the file cannot be read, or an image says neither or nonsense about where it was cut.
    """
    document, name = load_document(source, "the patches"), name_of(source, "the file of the patches")
    if not isinstance(document, Mapping) or not isinstance(document.get("images"), list) or not document["images"]:
        raise InputError(f"{name} has no list 'images': give the COCO annotation file of the patches")
    images = document["images"]
    ids = id_positions(images, "images", name)
    places, owners = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    corners, sizes = np.zeros((len(ids), 2), np.float32), np.full((len(ids), 2), np.inf)
    known: dict[int, int] = {}
    for index, image in enumerate(images):
        original, corner = image.get("ori_id"), image.get("start_coord")
        if isinstance(original, bool) or not isinstance(original, int):
            raise InputError(
                f"{name}: image number {index} (counted from 0) has ori_id {original!r}: give the annotation file of "
                "the patches (of `crossdino prepare sodad`), whose images say what they were cut from"
            )
        if not isinstance(corner, (list, tuple)) or len(corner) != 2 or not all(map(is_number, corner)):
            raise InputError(
                f"{name}: image number {index} (counted from 0) has start_coord {corner!r}: give left and top in pixels"
            )
        at = ids[image["id"]]
        places[at], owners[at], corners[at] = index, known.setdefault(original, len(known)), corner
        for axis, key in enumerate(("width", "height")):
            if is_number(image.get(key)):
                sizes[at, axis] = image[key]
    categories = document.get("categories")
    category_ids = id_positions(categories, "categories", name) if isinstance(categories, list) else {}
    return Patches(name, ids, places, owners, tuple(known), corners, sizes, category_ids)


def read_patch_detections(
    predictions: Sequence[Mapping[str, Any]] | Path | str,
    patches: Patches,
    category_ids: Mapping[int, int],
    reference: str | None = None,
) -> Found:
    """Read detections of patches.

    Args:
        predictions: COCO results, as a file or as the list.
        patches: the patches that they are of.
        category_ids: id -> position.
        reference: the name of the file that the categories are of; None: that of the patches.

    Returns:
        The detections; `images` are positions of patches.

    Raises:
        InputError: they cannot be read, are not of these patches, or start outside of them.
    """
    hint = (
        "; if the detections are of the original images already, leave the patches out: give the originals' annotation "
        "file alone as the ground truth"
    )
    found, name = read_found(predictions, patches.ids, category_ids, patches.name, hint, reference)
    # A pixel's tolerance: some write the boxes of a scaled patch, rounded.
    outside = (found.boxes_xywh[:, :2] > patches.sizes[found.images] + 1).any(axis=1)
    if outside.any():
        index = int(np.argmax(outside))
        width, height = patches.sizes[found.images[index]]
        raise InputError(
            f"{name}: detection number {index} (counted from 0) starts at {found.boxes_xywh[index, :2].tolist()}, "
            f"outside of its patch of {width:g} x {height:g} px: give boxes in pixels of the patch{hint}"
        )
    return found


def read_detections(
    predictions: Sequence[Mapping[str, Any]] | Path | str,
    truth: Truth,
    patches: Mapping[str, Any] | Path | str | None,
    hint: str = "",
) -> tuple[Found, int, dict[str, Any] | None]:
    """Read detections of the images of a truth, or of patches of these, which are merged.

    Args:
        predictions: COCO results, as a file or as the list.
        truth: whose images and categories they are of.
        patches: the annotation file of the patches or its content; None: the detections are of the images.
        hint: a further remedy for an unknown image id, without patches.

    Returns:
        The detections, how many were given, and how those of patches were merged (None without patches).

    Raises:
        InputError: something cannot be read, or does not belong to the others.
    """
    if patches is None:
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


def merge_found(found: Found, patches: Patches, iou: float = MERGE_IOU) -> Found:
    """The same as `merge_patches`, for checked columns.

    Args:
        found: detections; `images` are positions of patches.
        patches: the patches.
        iou: above which the lower score goes.

    Returns:
        The detections that stay; `images` are positions in `patches.original_ids`. Image by image, class by class, the
        best first; of equal scores the one whose patch is listed first.
    """
    boxes = boxes_xyxy(found.boxes_xywh).astype(np.float32) + np.tile(patches.corners[found.images], 2)
    scores = found.scores.astype(np.float32)
    originals = patches.originals[found.images]
    order = np.lexsort((patches.places[found.images], -scores, found.labels, originals))
    boxes, scores, originals, labels = boxes[order], scores[order], originals[order], found.labels[order]
    stays = np.zeros(len(order), dtype=np.bool_)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        crowd = Crowd(boxes[own], originals[own], np.arange(len(own)), originals[own])
        stays[own[greedy_suppression(crowd, iou)]] = True
    corners = boxes[stays].astype(np.float64)
    return Found(
        images=originals[stays],
        labels=labels[stays],
        boxes_xywh=np.concatenate((corners[:, :2], corners[:, 2:] - corners[:, :2]), axis=1),
        scores=scores[stays].astype(np.float64),
    )
