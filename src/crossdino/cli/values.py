"""How the values of options are read, and the options that several commands share."""

from __future__ import annotations

import argparse
import math
from typing import Literal


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    return _whole_number(text, at_least=1)


def not_negative(text: str) -> int:
    """A whole number of 0 or more."""
    return _whole_number(text, at_least=0)


def number(text: str) -> float:
    """Any finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} must be a number")
    return value


def above_zero(text: str) -> float:
    """A number above 0."""
    try:
        value = number(text)
    except argparse.ArgumentTypeError:
        value = 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    try:
        value = number(text)
    except argparse.ArgumentTypeError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0 and at most 1")
    return value


def tile_size(text: str) -> int | Literal["auto"]:
    """A number of pixels, or `auto`."""
    if text == "auto":
        return "auto"
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} must be a number of pixels or auto")
    return int(text)


def batch_size(text: str) -> int | Literal["auto"]:
    """A whole number of 1 or more, or `auto`."""
    if text == "auto":
        return "auto"
    try:
        return positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or auto") from None


DTYPES = ("auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16")
"""Number formats as `crossdino.prediction_network.choose_dtype` knows them."""

TILE_OPTIONS = ("tile_size", "tile_overlap", "merge", "merge_iou", "full_image")
"""What `add_tile_options` adds."""


def add_tile_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how images are cut and put together; None: the model's own settings."""
    parser.add_argument(
        "--tile-size",
        type=tile_size,
        metavar="PX",
        help="cut images into tiles of this side; 0: whole images; auto: objects as large as in training (the model's)",
    )
    parser.add_argument(
        "--tile-overlap",
        type=not_negative,
        metavar="PX",
        help="of neighbouring tiles in pixels, at least (the model's own, a quarter of small tiles)",
    )
    parser.add_argument(
        "--merge", choices=("seam", "nms", "soft"), help="how the tiles' detections are put together (the model's own)"
    )
    parser.add_argument(
        "--merge-iou", type=share, metavar="IOU", help="overlap from which two detections are one (the model's own)"
    )
    parser.add_argument(
        "--full-image",
        action=argparse.BooleanOptionalAction,
        help="besides its tiles look at the whole image, for objects that no tile holds (the model's own)",
    )


def _whole_number(text: str, at_least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number") from None
    if value < at_least:
        raise argparse.ArgumentTypeError(f"{text} must be at least {at_least}")
    return value
