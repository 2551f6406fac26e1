"""What a benchmark's protocol measured: the toolkit's own numbers under the toolkit's own names.

`AveragePrecisionResult` holds what the user asked for (any bands, any cap); this holds what a protocol fixes, so that a
number here may stand beside a published one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class ProtocolResult:
    """The numbers of one protocol; every metric is a fraction of 1, NaN where it is not defined.

    Attributes:
        protocol: its name, one of `crossdino.evaluation.protocols.PROTOCOLS`.
        metrics: the toolkit's name of a number (`AP`, `AP_vt`, `AR@1500`, `oLRP`, `mMR`) -> the number, in the order
            of the literature's tables.
        by_class: class name -> the numbers of that class, where the protocol has them.
        num_images: images that were evaluated.
        num_objects: objects that count (no crowds, nothing that is ignored).
        num_predictions: detections given, before any cap.
        settings: what the numbers were measured under: caps, bands, thresholds, merging.
        counts: further numbers that a reader wants beside the metrics, such as objects by size band.
        notes: one line each: what a reader must know, such as a rule of the protocol that changed a number.
    """

    protocol: str
    metrics: dict[str, float]
    by_class: dict[str, dict[str, float]]
    num_images: int
    num_objects: int
    num_predictions: int
    settings: dict[str, Any]
    counts: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The result as plain JSON values: full precision, None where a number is not defined."""
        return {
            "protocol": self.protocol,
            "metrics": _plain(self.metrics),
            "by_class": {name: _plain(numbers) for name, numbers in self.by_class.items()},
            "num_images": self.num_images,
            "num_objects": self.num_objects,
            "num_predictions": self.num_predictions,
            "counts": dict(self.counts),
            "settings": dict(self.settings),
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """The result as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @property
    def summary(self) -> str:
        """One line: what was measured on how much."""
        parts = ((self.num_images, "image"), (self.num_objects, "object"), (self.num_predictions, "detection"))
        return ", ".join(counted(number, noun) for number, noun in parts)

    def table(self) -> Table:
        """The metrics in per cent for the terminal."""
        table = Table(title=self.protocol, min_width=len(self.protocol))  # the title keeps its line
        table.add_column("metric")
        table.add_column("%", justify="right")
        previous = ""
        for metric, value in self.metrics.items():
            kind = metric.partition("@")[0][:2]
            if previous and kind != previous:
                table.add_section()
            previous = kind
            table.add_row(metric, percent(value))
        return table

    def class_table(self) -> Table | None:
        """The metrics of the classes in per cent; None where there is one class, or nothing is known of them.

        Average precision only, as far as there is any, and without classes of which nothing is defined: a terminal has
        no room for all of `by_class`.
        """
        if len(self.by_class) < 2:
            return None
        table = Table()
        metrics = dict.fromkeys(metric for numbers in self.by_class.values() for metric in numbers)
        metrics = [metric for metric in metrics if metric.startswith("AP")] or list(metrics)
        table.add_column("class")
        for metric in metrics:
            table.add_column(metric, justify="right")
        for name, numbers in self.by_class.items():
            if all(math.isnan(value) for value in numbers.values()):
                continue
            table.add_row(name, *(percent(numbers[metric]) if metric in numbers else "" for metric in metrics))
        return table


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`, `3 classes`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def percent(value: float) -> str:
    """A fraction as per cent with one digit, `-` where it is not defined."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in values.items()}
