"""The picture of a comparison: each number with its interval, and the differences about zero."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crossdino.evaluation.comparison import Comparison, Estimate, clear_side, p_text

_COLOURS = ("#b3632c", "#1f5fa8")
_BETTER, _WORSE, _OPEN = "#2e7d4f", "#b03030", "0.55"


def draw_comparison(comparison: Comparison, output_png: str | Path) -> None:
    """Draw the numbers of each file with their intervals, and beside them the differences.

    A difference whose interval does not hold zero is green where the second file is the better one and red where it is
    the worse one; the others are grey.

    Args:
        comparison: of one or two files.
        output_png: the picture's file.
    """
    names = [name for name, files in comparison.estimates.items() if not all(math.isnan(one.value) for one in files)]
    both = bool(comparison.differences)
    figure = Figure(figsize=(10.5 if both else 6.0, 1.7 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots(1, 2 if both else 1, squeeze=False, sharey=True)[0]
    for file, (label, colour) in enumerate(zip(comparison.names, _COLOURS, strict=False)):
        shift = (file - 0.5) * 0.26 if both else 0.0
        for row, name in enumerate(names):
            _bar(axes[0], comparison.estimates[name][file], row + shift, colour, label if row == 0 else None)
    confidence = f"{100 * comparison.settings['confidence']:g} %"
    axes[0].set(xlabel="per cent", title=f"values with {confidence} intervals")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    if both:
        axes[1].axvline(0, color="0.3", linewidth=1)
        for row, name in enumerate(names):
            side = clear_side(name, comparison.differences[name])
            colour = {1: _BETTER, -1: _WORSE, 0: _OPEN}[side]
            _bar(axes[1], comparison.differences[name], row, colour)
            p_value = comparison.differences[name].p_value
            if not math.isnan(p_value):
                axes[1].annotate(
                    f"p {p_text(p_value)}",
                    (1.01, row),
                    xycoords=("axes fraction", "data"),
                    va="center",
                    fontsize=8,
                    color=colour if side else "0.35",
                )
        axes[1].set(
            xlabel="percentage points", title=f"{comparison.names[1]} less {comparison.names[0]} (green: better)"
        )
        figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    for axis in axes:
        axis.title.set_fontsize(10)
        axis.grid(axis="x", color="0.92")
        axis.set_axisbelow(True)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
    what = comparison.protocol or f"COCO AP, {comparison.settings['max_detections']} detections"
    figure.suptitle(
        f"{what}: {comparison.num_images:,} images, {comparison.num_objects:,} objects, "
        f"{comparison.settings['resamples']:,} resamples of the images",
        fontsize=11,
    )
    figure.savefig(output_png, dpi=110, format="png")


def _bar(axes: Axes, estimate: Estimate, row: float, colour: str, label: str | None = None) -> None:
    if math.isnan(estimate.value):
        return
    if not math.isnan(estimate.low):
        axes.plot(
            (100 * estimate.low, 100 * estimate.high), (row, row), color=colour, linewidth=2, solid_capstyle="butt"
        )
    axes.plot(100 * estimate.value, row, color=colour, marker="o", markersize=5, linestyle="none", label=label)
