"""SODA-D's patches by the rules, one number and one pixel at a time; slow, and written apart from the package's."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

Pixels = list[list[tuple[int, int, int]]]
REGION = 10


def split_plain(
    document: dict[str, Any], get_pixel: Callable[[int, int, int], tuple[int, int, int]] | None, training: bool, *,
    size: int = 800, overlap: int = 150, share: Fraction = Fraction(2, 5), margin: int = 5,
) -> list[dict[str, Any]]:  # fmt: skip
    """All patches of a raw document.

    Args:
        document: the raw COCO file.
        get_pixel: (image id, row, column) -> colour; None: no pixels are made.
        training: whether it is the training split.
        size: of patches.
        overlap: of patches.
        share: pieces of at most this share are flagged.
        margin: beyond the last annotation.

    Returns:
        One entry a patch: `name` without suffix, `ori_id`, `start`, `pieces` (box in the patch, category, flagged) and
        `pixels` (rows of colours).
    """
    order: list[int] = []
    for annotation in document["annotations"]:
        if annotation["image_id"] not in order:
            order.append(annotation["image_id"])
    patches = []
    for image_id in order:
        (image,) = (one for one in document["images"] if one["id"] == image_id)
        annotations = [one for one in document["annotations"] if one["image_id"] == image_id]
        end_x, end_y = image["width"], image["height"]
        if training:
            rights = [int(one["bbox"][0]) + int(one["bbox"][2]) for one in annotations]
            bottoms = [int(one["bbox"][1]) + int(one["bbox"][3]) for one in annotations]
            end_x = min(end_x, max([0, *rights]) + margin)
            end_y = min(end_y, max([0, *bottoms]) + margin)
        number = 0
        for left in _starts(max(end_x, size), size, overlap):
            for top in _starts(max(end_y, size), size, overlap):
                pieces, objects, regions = [], [], []
                for one in annotations:
                    shown = _meet(one["bbox"], left, top, size)
                    if shown is None:
                        continue
                    x1, y1, x2, y2, part = shown
                    inside = (int(x1 - left), int(y1 - top), int(x2 - left), int(y2 - top))
                    if one["category_id"] == REGION:
                        regions.append(inside)
                        continue
                    objects.append(inside)
                    pieces.append(([x1 - left, y1 - top, x2 - x1, y2 - y1], one["category_id"], part <= share))
                if training and not pieces:
                    continue
                patch: dict[str, Any] = {
                    "name": f"{image['file_name'].split('/')[-1].split('.')[0]}_{number}",
                    "ori_id": image_id,
                    "start": [left, top],
                    "pieces": pieces,
                }
                if get_pixel is not None:
                    patch["pixels"] = _paint(image, get_pixel, left, top, size, objects, regions)
                patches.append(patch)
                number += 1
    return patches


def _starts(length: int, size: int, overlap: int) -> list[int]:
    starts = [0]
    while starts[-1] + size < length:
        following = starts[-1] + size - overlap
        starts.append(length - size if following + size > length else following)
    return starts


def _meet(box: list[float], left: int, top: int, size: int) -> tuple[float, float, float, float, Fraction] | None:
    """What a patch shows of a box, and which part of the box that is."""
    x, y, width, height = box
    x1, y1, x2, y2 = max(x, left), max(y, top), min(x + width, left + size), min(y + height, top + size)
    if x1 >= x2 or y1 >= y2:
        return None
    exact = [Fraction(value) for value in (x1, y1, x2, y2, x, y, x + width, y + height)]
    shown = (exact[2] - exact[0]) * (exact[3] - exact[1])
    return x1, y1, x2, y2, shown / ((exact[6] - exact[4]) * (exact[7] - exact[5]))


def _paint(
    image: dict[str, Any], get_pixel: Callable[[int, int, int], tuple[int, int, int]], left: int, top: int, size: int,
    objects: list[tuple[int, int, int, int]], regions: list[tuple[int, int, int, int]],
) -> Pixels:  # fmt: skip
    def lies_in(row: int, column: int, boxes: list[tuple[int, int, int, int]]) -> bool:
        return any(x1 <= column < x2 and y1 <= row < y2 for x1, y1, x2, y2 in boxes)

    rows = []
    for row in range(size):
        colours = []
        for column in range(size):
            y, x = row + top, column + left
            colour = get_pixel(image["id"], y, x) if y < image["height"] and x < image["width"] else (0, 0, 0)
            if lies_in(row, column, regions) and not lies_in(row, column, objects):
                colour = (0, 0, 0)
            colours.append(colour)
        rows.append(colours)
    return rows
