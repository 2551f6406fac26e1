"""The rules for boxes that are no boxes: without a side, or beyond their image; the same for all raw formats."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossdino.data.images import read_sizes
from crossdino.errors import InputError
from crossdino.preparation.contract import Option

Number = int | float
Box = list[Number]


def whole_number(text: str) -> int:
    """A whole number of 0 or more, as an option's value."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of 0 or more")
    return int(text)


MIN_SIDE = Option(
    "min_side",
    1,
    "drop boxes less wide or high than this; mmdetection's loaders, which RFLA, SR-TOD and IterDet train with, skip "
    "those below 1, and the raw data have a few lines without a width or a height",
    parse=whole_number,
    metavar="PX",
)
OUTSIDE = Option(
    "outside",
    "keep",
    "boxes beyond the image's border: keep the numbers as they are, as the usual conversions do; clip them to the "
    "image; or drop those of which nothing is in it",
    ("keep", "clip", "drop"),
)


def check_outside(outside: str, without_images: bool) -> None:
    """Refuse rules about the images' borders where the images are not there."""
    if without_images and outside != "keep":
        raise InputError(f"--outside {outside} needs the sizes of the images: leave out --without-images")


def settle_box(box_xywh: Box, size_wh: tuple[int, int], min_side: int, outside: str) -> Box | str:
    """A box by the two rules.

    Args:
        box_xywh: in pixels.
        size_wh: of its image.
        min_side: sides below it are none, and so are negative ones.
        outside: `keep`, `clip` or `drop`.

    Returns:
        The box, clipped where that was asked for, or the reason why it is dropped.
    """
    x, y, width, height = box_xywh
    if min(width, height) < min_side:
        return f"side below {min_side} px"
    if outside == "keep":
        return box_xywh
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, size_wh[0]), min(y + height, size_wh[1])
    if right <= left or bottom <= top:
        return "outside the image"
    return [left, top, right - left, bottom - top] if outside == "clip" else box_xywh


def size_of(image: Path | None, boxes_xywh: Sequence[Box]) -> tuple[int, int]:
    """Width and height of an image, or where there is none those of the smallest one that holds the boxes."""
    if image is not None:
        return read_sizes(image)[0]
    corners = ([x + max(width, 0), y + max(height, 0)] for x, y, width, height in boxes_xywh)
    right, bottom = (
        max([1, *(int(-(-value // 1)) for value in values)]) for values in zip(*[[1, 1], *corners], strict=True)
    )
    return right, bottom


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, whatever their endings, without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} ({error}); download it again") from None


def read_number(text: str) -> Number | None:
    """A finite number, whole where it is one; None: it is none."""
    if text.isascii() and text.isdecimal():  # nearly all of them are plain
        return int(text)
    try:
        value: Any = float(text)
        return int(value) if value == int(value) else value
    except (ValueError, OverflowError):  # int() of infinity, of NaN
        return None
