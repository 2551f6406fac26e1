"""Size-aware confidence: from a detector's scores to probabilities, and the scores from which a detection counts.

A score s becomes sigmoid(logit(s) / T + b): temperature scaling (Guo et al., "On Calibration of Modern Neural
Networks", ICML 2017, Section 4.2) with the bias of Platt's method. A temperature alone turns the curve about 0.5 and
cannot lift scores that are too low throughout, as the focal and Boost losses leave them. T and b depend on the size of
the box, sqrt(width x height) in pixels of the original image, b also on the class. Both are known at one size a band
and run straight over log(size) in between, so that objects of 31.9 and of 32.1 px are treated alike; beyond the
outermost sizes they stay as they are. Within a size and a class the order of the scores never changes.

`crossdino.evaluation.calibration_fit` finds the numbers, `crossdino.evaluation.calibration_report` measures them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crossdino.errors import InputError
from crossdino.evaluation.matching import box_sizes

FORMAT_VERSION = 1
INFERENCE_SETTINGS = (
    "short_side",
    "long_side",
    "num_select",
    "tile_size",
    "tile_overlap",
    "merge",
    "merge_iou",
    "full_image",
)
"""The settings of `InferenceConfig` on which scores depend."""
_TILE_SETTINGS = ("tile_overlap", "merge", "merge_iou", "full_image")

_SMALLEST_SCORE = 1e-6
_SMALLEST_SIZE_PX = 1e-3


@dataclass(frozen=True)
class Calibration:
    """What makes the scores of one model probabilities, and decides which detections count.

    Attributes:
        class_names: the K classes, in the order of the labels.
        sizes_px: S sizes, sqrt(width x height) in pixels of the original image, ascending.
        temperatures: S temperatures, above 0; between the sizes 1/T runs straight over log(size).
        biases: S numbers, added to the tempered logit.
        class_biases: K numbers, added likewise.
        class_thresholds: S rows of K calibrated scores in [0, 1] from which a detection counts.
        objective: what the thresholds are best for: `f1`, `precision=P` or `recall=R`.
        iou: from which overlap a detection was right.
        weights: digest of the weights that it was made with (`crossdino.checkpoints.weights_digest`); None: unknown.
        settings: the inference settings that it was made with, see `INFERENCE_SETTINGS`.
        measured: numbers for the reader: how much data, and the errors before and after.
    """

    class_names: tuple[str, ...]
    sizes_px: tuple[float, ...]
    temperatures: tuple[float, ...]
    biases: tuple[float, ...]
    class_biases: tuple[float, ...]
    class_thresholds: tuple[tuple[float, ...], ...]
    objective: str = "f1"
    iou: float = 0.5
    weights: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def calibrate(self, boxes_xyxy: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """The probability that each detection is right.

        Args:
            boxes_xyxy: (n, 4), pixels of the original image.
            scores: (n,) in [0, 1], as the detector gives them.
            labels: (n,) int64 in [0, K).

        Returns:
            (n,) float32 in [0, 1], on the CPU.
        """
        shares = self._shares(boxes_xyxy)
        logits = score_logits(scores.detach().cpu().double().numpy())
        slopes = shares @ (1 / np.array(self.temperatures))
        biases = shares @ np.array(self.biases) + np.array(self.class_biases)[labels.cpu().numpy()]
        return torch.from_numpy(slopes * logits + biases).sigmoid().float()

    def thresholds(self, boxes_xyxy: Tensor, labels: Tensor) -> Tensor:
        """The calibrated score from which each detection counts.

        Args:
            boxes_xyxy: (n, 4), pixels of the original image.
            labels: (n,) int64 in [0, K).

        Returns:
            (n,) float32 in [0, 1], on the CPU.
        """
        columns = np.array(self.class_thresholds).T[labels.cpu().numpy()]
        return torch.from_numpy((self._shares(boxes_xyxy) * columns).sum(1)).float()

    def differences(self, settings: Mapping[str, Any]) -> list[str]:
        """How other inference settings differ from those that it was made with, in words; none if they do not.

        Args:
            settings: name -> value, with any of `INFERENCE_SETTINGS`; other names do not count.
        """
        whole = not self.settings.get("tile_size") and not settings.get("tile_size")
        return [
            f"{name} is {settings[name]} instead of {self.settings[name]}"
            for name in INFERENCE_SETTINGS
            if name in settings
            and name in self.settings
            and settings[name] != self.settings[name]
            and not (whole and name in _TILE_SETTINGS)
        ]

    def to_dict(self) -> dict[str, Any]:
        """What `calibration.json` holds."""
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Any) -> Calibration:
        """Read back what `to_dict` gave.

        Raises:
            InputError: it is no calibration, or that of a newer crossdino.
        """
        remedy = "run `crossdino calibrate` again"
        if not isinstance(values, Mapping) or not isinstance(values.get("format_version"), int):
            raise InputError(f"this is no calibration (it lacks format_version): {remedy}")
        if values["format_version"] > FORMAT_VERSION:
            raise InputError(
                f"it was made by a newer crossdino (format_version {values['format_version']}, this one reads up to "
                f"{FORMAT_VERSION}): upgrade crossdino, or {remedy}"
            )
        try:
            rows = tuple(_numbers(row) for row in values["class_thresholds"])
            weights = values["weights"]
            made = cls(
                class_names=tuple(map(str, values["class_names"])),
                sizes_px=_numbers(values["sizes_px"]),
                temperatures=_numbers(values["temperatures"]),
                biases=_numbers(values["biases"]),
                class_biases=_numbers(values["class_biases"]),
                class_thresholds=rows,
                objective=str(values["objective"]),
                iou=float(values["iou"]),
                weights=None if weights is None else str(weights),
                settings=dict(values["settings"]),
                measured=dict(values["measured"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"this is no whole calibration ({type(error).__name__}: {error}): {remedy}") from None
        num_sizes, num_classes = len(made.sizes_px), len(made.class_names)
        if (
            not num_sizes
            or not num_sizes == len(made.temperatures) == len(made.biases) == len(rows)
            or any(len(row) != num_classes for row in (made.class_biases, *rows))
            or min(*made.sizes_px, *made.temperatures) <= 0
            or list(made.sizes_px) != sorted(set(made.sizes_px))
        ):
            raise InputError(f"the numbers of this calibration do not fit together: {remedy}")
        return made

    def _shares(self, boxes_xyxy: Tensor) -> NDArray[np.float64]:
        return size_shares(box_sizes(boxes_xyxy.detach().cpu().double().numpy().reshape(-1, 4)), self.sizes_px)


def size_shares(sizes_px: NDArray[np.float64], known_px: Sequence[float]) -> NDArray[np.float64]:
    """How much each known size says about each box: linear interpolation over log(size), constant beyond the ends.

    Args:
        sizes_px: (n,) sizes of the boxes in pixels.
        known_px: S sizes, ascending.

    Returns:
        (n, S), at most two entries of a row above 0; every row sums to 1.
    """
    known = np.log(np.asarray(known_px, dtype=np.float64))
    wanted = np.log(np.maximum(sizes_px, _SMALLEST_SIZE_PX))
    return np.stack([np.interp(wanted, known, row) for row in np.eye(len(known))], axis=1)


def score_logits(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """logit(score), of scores that are kept off 0 and 1 by 1e-6."""
    clipped = scores.clip(_SMALLEST_SCORE, 1 - _SMALLEST_SCORE)
    return np.log(clipped) - np.log1p(-clipped)


def _numbers(values: Any) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if not all(map(math.isfinite, numbers)):
        raise ValueError("a number is not finite")
    return numbers
