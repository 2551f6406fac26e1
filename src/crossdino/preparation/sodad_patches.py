"""The patches of SODA-D: where they lie, which pieces of which objects they hold, and their pixels.

The rules are those of the splitter that CFINet and SODA-mmdetection share; every number of theirs is a field of
`PatchRules`. The grid is not that of `crossdino.tiling`: there neighbours are spread evenly, here only the last patch
is shifted back to the border.

Nothing here reads or writes a file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float64]


@dataclass(frozen=True)
class PatchRules:
    """How images are cut.

    Attributes:
        patch_px: side of the square patches in pixels.
        overlap_px: overlap of neighbours in pixels; the last patch may overlap more.
        ignore_ratio: a piece of at most this share of its object's area is flagged.
        train_margin_px: how far beyond their right-most and bottom-most annotation training images are cut into
            patches; None: to the end of the image.
        drop_empty: leave out training patches in which no piece of an object lies.
        fill_regions: paint ignore regions black.
    """

    patch_px: int = 800
    overlap_px: int = 150
    ignore_ratio: float = 0.4
    train_margin_px: int | None = 5
    drop_empty: bool = True
    fill_regions: bool = True


@dataclass(frozen=True)
class Patch:
    """One patch and what lies in it.

    Attributes:
        left, top: its first column and row in the image.
        pieces_xyxy: (N, 4) what it shows of each object, in pixels of the image.
        sources: (N,) which of the image's annotations each piece is of.
        flagged: (N,) pieces of at most `ignore_ratio` of their object.
        regions_xyxy: (M, 4) what it shows of each ignore region, in pixels of the image.
    """

    left: int
    top: int
    pieces_xyxy: Boxes
    sources: NDArray[np.intp]
    flagged: NDArray[np.bool_]
    regions_xyxy: Boxes

    @property
    def pieces_xywh(self) -> Boxes:
        """(N, 4) the pieces in pixels of the patch."""
        return self._in_patch(self.pieces_xyxy)

    @property
    def regions_xywh(self) -> Boxes:
        """(M, 4) the ignore regions in pixels of the patch."""
        return self._in_patch(self.regions_xyxy)

    def _in_patch(self, boxes_xyxy: Boxes) -> Boxes:
        starts, ends = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
        return np.concatenate([starts - (self.left, self.top), ends - starts], axis=1)


def patch_starts(length: int, size: int, overlap: int) -> list[int]:
    """Where patches begin along one side: every `size - overlap` pixels, and the last so that it ends at the border.

    Args:
        length: of the side, in pixels.
        size: side of a patch in pixels.
        overlap: in pixels, below `size`.

    Returns:
        The starts, ascending; [0] where one patch covers the side.
    """
    last = max(length - size, 0)
    return [*range(0, last, size - overlap), last]


def annotated_extent(width: int, height: int, boxes_xywh: Boxes, margin_px: int) -> tuple[int, int]:
    """The part of a training image that is cut into patches: up to its last annotation and a margin.

    Args:
        width: of the image in pixels.
        height: of the image in pixels.
        boxes_xywh: (N, 4) all annotations, ignore regions among them; fractions are cut off each number.
        margin_px: what is added.

    Returns:
        Width and height in pixels, at most the image's.
    """
    corners = boxes_xywh.astype(np.int64)
    right, bottom = (corners[:, :2] + corners[:, 2:]).max(axis=0, initial=0).tolist()
    return min(width, right + margin_px), min(height, bottom + margin_px)


def plan_patches(
    width: int, height: int, boxes_xywh: Boxes, is_region: NDArray[np.bool_], rules: PatchRules, *, training: bool
) -> list[Patch]:
    """The patches of one image, column by column from the left, in each from the top.

    Args:
        width: of the image in pixels.
        height: of the image in pixels.
        boxes_xywh: (N, 4) all annotations, in pixels of the image; they may leave it.
        is_region: (N,) which of them are ignore regions.
        rules: how to cut.
        training: whether the rules for training images hold.

    Returns:
        The patches that are kept.
    """
    if training and rules.train_margin_px is not None and len(boxes_xywh):
        width, height = annotated_extent(width, height, boxes_xywh, rules.train_margin_px)
    size, overlap = rules.patch_px, rules.overlap_px
    grid = [(x, y) for x in patch_starts(width, size, overlap) for y in patch_starts(height, size, overlap)]
    first = np.array(grid, dtype=np.float64)[:, None]  # (patches, 1, 2), against (annotations, 2)
    ends = boxes_xywh[:, :2] + boxes_xywh[:, 2:]
    starts, ends = np.minimum(boxes_xywh[:, :2], ends), np.maximum(boxes_xywh[:, :2], ends)
    shown_start, shown_end = np.maximum(starts, first), np.minimum(ends, first + size)
    sides = shown_end - shown_start
    # Clipped at 0, else two negative sides would make a positive area.
    areas, whole = sides.clip(0).prod(axis=2), (ends - starts).prod(axis=1)
    present = areas > 0
    flagged = np.divide(areas, whole, where=present, out=np.zeros_like(areas)) <= rules.ignore_ratio
    shown = np.concatenate([shown_start, shown_end], axis=2)
    patches = []
    for number, (left, top) in enumerate(grid):
        objects = np.flatnonzero(present[number] & ~is_region)
        regions = np.flatnonzero(present[number] & is_region)
        if len(objects) or not (training and rules.drop_empty):
            mine = shown[number]
            patches.append(Patch(left, top, mine[objects], objects, flagged[number, objects], mine[regions]))
    return patches


def cut_patch(image: NDArray[np.uint8], patch: Patch, rules: PatchRules) -> NDArray[np.uint8]:
    """The pixels of a patch.

    Where the image ends, black begins. Ignore regions are painted black, but not where a piece of an object lies;
    the corners of both lose their fractions first.

    Args:
        image: (height, width, 3) the whole image; also of a training image that is not cut to its end.
        patch: which one.
        rules: how to cut.

    Returns:
        (patch_px, patch_px, 3) pixels.
    """
    size = rules.patch_px
    shown = image[patch.top : patch.top + size, patch.left : patch.left + size]
    pixels = np.zeros((size, size, 3), np.uint8)
    pixels[: shown.shape[0], : shown.shape[1]] = shown
    if rules.fill_regions and len(patch.regions_xyxy):
        hidden = np.zeros((size, size), np.bool_)
        for boxes_xyxy, value in ((patch.regions_xyxy, True), (patch.pieces_xyxy, False)):
            corners = (boxes_xyxy - (patch.left, patch.top, patch.left, patch.top)).astype(np.int64)
            for left, top, right, bottom in corners.tolist():
                hidden[top:bottom, left:right] = value
        pixels[hidden] = 0
    return pixels
