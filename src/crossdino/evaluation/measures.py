"""Which numbers a bootstrap resamples: those of the protocols whose detections can be matched image by image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from crossdino.benchmarks import BENCHMARKS
from crossdino.errors import InputError

ALL_AREAS = (0.0, 1e10)

# Protocol -> band -> area range in square pixels, beside the benchmark's own bands; the first is the headline's.
_HEADLINE: dict[str, tuple[float, float]] = {
    "coco": ALL_AREAS,
    "aitod": ALL_AREAS,
    "visdrone": ALL_AREAS,
    "sodad": (0.0, 1024.0),
}
PERSON_PROTOCOL = "widerperson"
COMPARABLE = (*_HEADLINE, PERSON_PROTOCOL)
"""Protocols whose numbers can be resampled by images."""

LOWER_IS_BETTER = ("mMR",)


@dataclass(frozen=True)
class Measure:
    """One number.

    Attributes:
        name: as the protocol calls it.
        kind: average precision or average recall.
        band: name of the size band in `Plan.bands`.
        cap: best detections of an image and class that count.
        iou: the only IoU threshold that counts; None: the mean over 0.50:0.95.
    """

    name: str
    kind: Literal["precision", "recall"]
    band: str
    cap: int
    iou: float | None = None


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        bands: name -> area range in square pixels, both inclusive.
        measures: in the order of the literature's tables.
    """

    bands: dict[str, tuple[float, float]]
    measures: tuple[Measure, ...]

    @property
    def most(self) -> int:
        """The largest cap."""
        return max(measure.cap for measure in self.measures)


def plan_of_protocol(name: str) -> Plan:
    """The numbers of `coco`, `aitod`, `visdrone` or `sodad`, oLRP aside."""
    benchmark = BENCHMARKS[name]
    caps = benchmark.max_detections
    # SODA-D's average precision is that of the smallest cap, the others' that of the largest.
    cap = caps[0] if name == "sodad" else caps[-1]
    headline = "all" if _HEADLINE[name] == ALL_AREAS else "small"
    return _plan(headline, _HEADLINE[name], benchmark.size_bands, cap, caps)


def plan_of_bands(size_bands: Mapping[str, tuple[float, float]], max_detections: int) -> Plan:
    """COCO's numbers with bands of sqrt(area) in pixels and a cap of one's own.

    Raises:
        InputError: for bands or a cap that make no sense.
    """
    if isinstance(max_detections, bool) or not isinstance(max_detections, int) or max_detections < 1:
        raise InputError(f"max_detections is {max_detections!r}: give a whole number of at least 1")
    for name, bounds in size_bands.items():
        if not name or len(bounds) != 2 or not 0 <= bounds[0] < bounds[1] < math.inf:
            raise InputError(
                f"size band {name!r} is {bounds!r}: give two numbers of pixels (sqrt of the area), 0 <= lower < upper"
            )
    areas = {name: (lower**2, upper**2) for name, (lower, upper) in size_bands.items()}
    return _plan("", ALL_AREAS, areas, max_detections, (max_detections,))


def _plan(
    headline: str,
    range_of_headline: tuple[float, float],
    bands: Mapping[str, tuple[float, float]],
    cap: int,
    caps: tuple[int, ...],
) -> Plan:
    measures = [
        Measure("AP", "precision", headline, cap),
        Measure("AP50", "precision", headline, cap, 0.5),
        Measure("AP75", "precision", headline, cap, 0.75),
        *(Measure(f"AP_{name}", "precision", name, cap) for name in bands),
        *(Measure(f"AR@{most}", "recall", headline, most) for most in caps),
        *(Measure(f"AR_{name}", "recall", name, caps[-1]) for name in bands),
    ]
    return Plan({headline: range_of_headline, **bands}, tuple(measures))
