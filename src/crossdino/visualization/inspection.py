"""The picture of a data set: sizes, crowding, classes, places and image sizes, beside the settings that they meet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from crossdino.config import Config
from crossdino.data.inspection import Inspection, heat_map, network_sizes, objects_per_tile

_COLOURS = ("#1f5fa8", "#e07b1a", "#3b8f4c", "#8a4fa3")
_MOST_CLASSES, _LEAST_ROWS = 20, 5
_MOST_SIZES = 5
_SIZE_BINS = _COUNT_BINS = 40
_WHITE_ROOM = 1.15


def draw_inspection(inspection: Inspection, config: Config, output_png: str | Path) -> None:
    """Draw six panels: sizes at the network's input and in the files, objects per image, classes, places, image sizes.

    Args:
        inspection: the statistics.
        config: what the sizes are shown against: input size, tiles, stride, queries and size bands.
        output_png: the picture's file.
    """
    figure = Figure(figsize=(15, 8.5), layout="constrained")
    axes: list[Axes] = figure.subplots(2, 3).ravel().tolist()
    _network_sizes(axes[0], inspection, config)
    _file_sizes(axes[1], inspection, config)
    _crowding(axes[2], inspection, config)
    _classes(axes[3], inspection)
    _places(figure, axes[4], inspection)
    _image_sizes(axes[5], inspection, config)
    for panel in (*axes[:4], axes[5]):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(output_png, dpi=100, format="png")


def _network_sizes(axes: Axes, inspection: Inspection, config: Config) -> None:
    sizes = {key: network_sizes(split, config.data) for key, split in inspection.splits.items()}
    stride = config.model.first_stride
    _size_histogram(axes, sizes, shown_px=(0.9 * stride, 2.2 * stride))
    axes.axvline(stride, color="black", linewidth=1)
    axes.axvline(2 * stride, color="black", linewidth=1, linestyle="--")
    top = axes.get_xaxis_transform()
    axes.text(stride, 1.0, f" 1 token ({stride} px)", transform=top, va="top", ha="right", rotation=90, fontsize=8)
    axes.text(2 * stride, 1.0, " 2 tokens", transform=top, va="top", ha="right", rotation=90, fontsize=8)
    data = config.data
    shown = (
        f"tiles of {data.tile_px} px shown at {data.test_short_side} px"
        if data.tile_px
        else f"short side {data.test_short_side} px, long side at most {data.test_long_side} px"
    )
    axes.set_title(f"object sizes at the network's input\n({shown})", fontsize=10)
    axes.set_xlabel("sqrt(width x height), network pixels")


def _file_sizes(axes: Axes, inspection: Inspection, config: Config) -> None:
    _size_histogram(axes, {key: np.sqrt(split.areas) for key, split in inspection.splits.items()})
    low, high = axes.get_xlim()
    for number, (name, (lower, upper)) in enumerate(config.evaluation.size_bands.items()):
        start, end = max(lower, low), min(upper, high)
        if start >= end:
            continue
        axes.axvspan(start, end, color="0.5", alpha=0.16 if number % 2 else 0.06, linewidth=0)
        axes.text(
            float(np.sqrt(start * end)),
            0.99,
            name,
            transform=axes.get_xaxis_transform(),
            va="top",
            ha="center",
            fontsize=8,
        )
    axes.set_title("object sizes in the files\nand the size bands of the evaluation", fontsize=10)
    axes.set_xlabel("sqrt(area), pixels of the file")


def _size_histogram(
    axes: Axes, sizes: dict[str, NDArray[np.float64]], shown_px: tuple[float, float] = (np.inf, 0.0)
) -> None:
    """One line a split, each as a share of its objects, on a logarithmic axis that covers `shown_px` at least."""
    filled = [values for values in sizes.values() if len(values)]
    if not filled:
        _say(axes, "no objects")
        return
    low = max(min(float(values.min()) for values in filled), 0.5)
    high = max(max(float(values.max()) for values in filled), 2 * low)
    edges = np.geomspace(low * 0.9, high * 1.1, _SIZE_BINS + 1)
    for (name, values), colour in zip(sizes.items(), _COLOURS, strict=False):
        if len(values):
            counts = np.histogram(values.clip(edges[0], edges[-1]), edges)[0] / len(values)
            axes.stairs(counts, edges, fill=True, color=colour, alpha=0.35)
            axes.stairs(counts, edges, color=colour, linewidth=1.3, label=f"{name} ({len(values):,})")
    axes.set_xscale("log")
    axes.set_xlim(min(edges[0], shown_px[0]), max(edges[-1], shown_px[1]))
    low, high = axes.get_xlim()
    ticks = [step for step in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048) if low <= step <= high]
    axes.set_xticks(ticks, [str(step) for step in ticks])
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_ylim(0, axes.get_ylim()[1] * _WHITE_ROOM)
    axes.set_ylabel("share of the objects")
    axes.legend(framealpha=0.8, edgecolor="none", fontsize=8)


def _crowding(axes: Axes, inspection: Inspection, config: Config) -> None:
    data = config.data
    what = "tile" if data.tile_px else "image"
    counts = {
        key: objects_per_tile(split, data.tile_px, data.tile_overlap, data.tile_keep)
        if data.tile_px
        else split.per_image
        for key, split in inspection.splits.items()
    }
    most = max((int(values.max(initial=0)) for values in counts.values()), default=0)
    width = math.ceil((most + 1) / _COUNT_BINS)
    edges = np.arange(0, most + width + 1, width) - 0.5
    for (name, values), colour in zip(counts.items(), _COLOURS, strict=False):
        if len(values):
            axes.hist(values, bins=_list(edges), color=colour, alpha=0.4, label=f"{name} ({len(values):,} {what}s)")
    if axes.get_ylim()[1] > 30:
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    queries = config.model.num_queries
    axes.set_title(f"objects per {what}\n(at most {most}; the model has {queries} queries)", fontsize=10)
    if queries < 2 * most:
        axes.axvline(queries, color="black", linewidth=1)
        axes.text(
            queries,
            1.0,
            " queries",
            transform=axes.get_xaxis_transform(),
            va="top",
            ha="right",
            rotation=90,
            fontsize=8,
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"objects per {what}")
    axes.set_ylabel(f"{what}s")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _classes(axes: Axes, inspection: Inspection) -> None:
    ranked = sorted(inspection.classes, key=lambda item: -sum(item.objects.values()))
    shown = ranked[:_MOST_CLASSES]
    rows = np.arange(len(shown))
    height = 0.8 / max(len(inspection.splits), 1)
    for number, (key, colour) in enumerate(zip(inspection.splits, _COLOURS, strict=False)):
        counts = [item.objects.get(key, 0) for item in shown]
        axes.barh(rows + number * height, counts, height=height, color=colour, label=key)
        for row, count in zip(rows, counts, strict=True):
            axes.text(count, row + number * height, f" {count:,}", va="center", fontsize=7)
    axes.set_xlim(0, max([1, *(count for item in shown for count in item.objects.values())]) * _WHITE_ROOM)
    names = [item.name if len(item.name) <= 22 else f"{item.name[:20]}..." for item in shown]
    axes.set_yticks(_list(rows + (len(inspection.splits) - 1) * height / 2), names, fontsize=8)
    axes.set_ylim(max(len(shown), _LEAST_ROWS) - 0.4, -0.6)
    more = f" (the {_MOST_CLASSES} most frequent of {len(ranked)})" if len(ranked) > _MOST_CLASSES else ""
    axes.set_title(f"objects by class{more}", fontsize=10)
    axes.set_xlabel("objects")


def _places(figure: Figure, axes: Axes, inspection: Inspection) -> None:
    grid = heat_map(inspection.main)
    first = next(iter(inspection.splits))
    axes.set_title(f"where objects lie in their image ({first})", fontsize=10)
    axes.set_xticks([0, 0.5, 1], ["left", "middle", "right"], fontsize=8)
    axes.set_yticks([0, 0.5, 1], ["top", "middle", "bottom"], fontsize=8)
    if not grid.any():
        _say(axes, "no objects")
        return
    hw = inspection.main.image_hw
    ratio = float(np.median(hw[:, 0] / hw[:, 1]))
    picture = axes.imshow(grid, extent=(0, 1, 1, 0), cmap="viridis", aspect=min(max(ratio, 0.4), 2.0))
    figure.colorbar(picture, ax=axes, label="objects", shrink=0.8)


def _image_sizes(axes: Axes, inspection: Inspection, config: Config) -> None:
    largest = 1
    lines: list[str] = []
    for (key, split), colour in zip(inspection.splits.items(), _COLOURS, strict=False):
        if not split.num_images:
            continue
        sizes, counts = np.unique(split.image_hw, axis=0, return_counts=True)
        area = 20 + 400 * counts / counts.max() if len(sizes) <= 50 else 8
        axes.scatter(sizes[:, 1], sizes[:, 0], s=area, color=colour, alpha=0.4, linewidths=0, label=key)
        common = np.argsort(-counts, kind="stable")[:_MOST_SIZES]
        lines += [f"{key}: {counts[place]:,} of {sizes[place, 1]} x {sizes[place, 0]}" for place in common]
        lines += [f"{key}: {len(sizes) - _MOST_SIZES} more sizes"] if len(sizes) > _MOST_SIZES else []
        largest = max(largest, int(sizes.max()))
    if config.data.tile_px:
        side = config.data.tile_px
        axes.add_patch(Rectangle((0, 0), side, side, fill=False, linestyle="--", color="black"))
        axes.text(side, side, f" tile {side} px", fontsize=8, va="bottom")
        largest = max(largest, side)
    axes.set_xlim(0, largest * _WHITE_ROOM)
    axes.set_ylim(0, largest * _WHITE_ROOM)
    axes.set_aspect("equal")
    axes.text(0.02, 0.98, "\n".join(lines), transform=axes.transAxes, va="top", fontsize=7)
    axes.set_title("image sizes", fontsize=10)
    axes.set_xlabel("width, pixels")
    axes.set_ylabel("height, pixels")


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="0.4")


def _list(values: NDArray[Any]) -> Sequence[float]:
    return values.tolist()
