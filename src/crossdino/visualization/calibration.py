"""The picture of a calibration: reliability diagrams by object size, before and after."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from crossdino.evaluation.calibration_report import ALL, NUM_BINS, CalibrationReport, GroupResult

_BEFORE, _AFTER = "#b3632c", "#1f5fa8"
_COLUMNS = 4


def draw_calibration(report: CalibrationReport, output_png: str | Path) -> None:
    """Draw confidence against precision, all objects first and then band by band, under the detections they stand for.

    A bin's dot is the larger the more detections it holds; on the diagonal confidence is precision. Below each diagram
    stands how the detections of the band are spread over the confidences.

    Args:
        report: the numbers; what it has after the calibration is cross-fitted.
        output_png: the picture's file.
    """
    groups = {ALL: report.everything, **report.by_size}
    columns = min(_COLUMNS, len(groups))
    rows = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(3.7 * columns, 4.9 * rows), layout="constrained")
    grid = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[3, 1] * rows)
    for place, (name, group) in enumerate(groups.items()):
        row, column = divmod(place, columns)
        bounds = report.size_bands.get(name)
        size = (
            ""
            if bounds is None
            else f", {bounds[0]:g} px and more"
            if bounds[1] >= 1e5
            else ", {:g}-{:g} px".format(*bounds)
        )
        _diagram(grid[2 * row, column], group, f"{name}{size}: {group.num_objects:,} objects")
        _counts(grid[2 * row + 1, column], group)
    for place in range(len(groups), rows * columns):
        row, column = divmod(place, columns)
        grid[2 * row, column].set_axis_off()
        grid[2 * row + 1, column].set_axis_off()
    how = "cross-fitted" if report.num_folds else "too little data for anything after"
    figure.suptitle(f"confidence against precision (IoU {report.calibration.iou:g}), {how}", fontsize=11)
    dots = [Line2D([], [], color=colour, marker="o", linewidth=1.2) for colour in (_BEFORE, _AFTER)]
    figure.legend(dots, ("before", "after"), loc="outside upper left", ncols=2, frameon=False, fontsize=9)
    figure.savefig(output_png, dpi=100, format="png")


def _diagram(axes: Axes, group: GroupResult, title: str) -> None:
    axes.plot((0, 1), (0, 1), color="0.6", linewidth=1, linestyle="--")
    most = max((count for _, _, count in (*group.bins_before, *group.bins_after)), default=1)
    for bins, colour in ((group.bins_before, _BEFORE), (group.bins_after, _AFTER)):
        if not bins:
            continue
        confidence, precision, counts = np.array(bins).T
        axes.plot(confidence, precision, color=colour, linewidth=1.2, alpha=0.8)
        axes.scatter(
            confidence,
            precision,
            s=12 + 90 * counts / most,
            color=colour,
            alpha=0.75,
            edgecolors="white",
            linewidths=0.6,
            zorder=3,
        )
    if not group.bins_before:
        axes.text(0.5, 0.5, "no detections", ha="center", va="center", transform=axes.transAxes)
    else:
        title += f"\nECE {100 * group.ece_before:.1f} % before"
        title += "" if math.isnan(group.ece_after) else f", {100 * group.ece_after:.1f} % after"
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), aspect="equal", title=title, ylabel="precision")
    axes.title.set_fontsize(10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)


def _counts(axes: Axes, group: GroupResult) -> None:
    edges = np.linspace(0, 1, NUM_BINS + 1)
    for bins, colour in ((group.bins_before, _BEFORE), (group.bins_after, _AFTER)):
        if bins:
            confidence, _, counts = np.array(bins).T
            places = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
            axes.stairs(np.bincount(places, counts, NUM_BINS), edges, color=colour, fill=True, alpha=0.2)
            axes.stairs(np.bincount(places, counts, NUM_BINS), edges, color=colour, linewidth=1.2)
    axes.set(xlim=(0, 1), xlabel="confidence", ylabel="detections")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if group.bins_before:
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(bottom=0)
    else:
        axes.set_yticks([])
    axes.spines[["top", "right"]].set_visible(False)
