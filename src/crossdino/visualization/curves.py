"""The curves of a training run: losses, metrics, learning rate, time and memory against the epoch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from crossdino.errors import InputError

# Everything in a training record that is not a loss.
_NOT_A_LOSS = frozenset({"kind", "step", "epoch", "lr", "seconds", "ms", "images_per_second", "memory_mb"})
_AP = ("ap", "ap50", "ap75")
# More points than this are no longer told apart: neighbours are averaged.
_MOST_POINTS = 400


def loss_curves(log: str | Path | Sequence[Mapping[str, Any]], output_png: str | Path) -> None:
    """Draw the loss and its parts against the epoch.

    Args:
        log: a training run's `log.jsonl` or its records; those of kind `train` are used: `epoch` (finished epochs),
            `step`, and one number for every loss.
        output_png: the picture's file.

    Raises:
        InputError: the log cannot be read or has no record of a training step.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    _plot_losses(figure.subplots(), _records(log, "train"))
    figure.savefig(output_png, dpi=120)


def metric_curves(log: str | Path | Sequence[Mapping[str, Any]], output_png: str | Path) -> None:
    """Draw AP, AP50, AP75 and the AP of every size band against the epoch.

    Args:
        log: a training run's `log.jsonl` or its records; those of kind `eval` are used: `epoch`, `ap`, `ap50` ... and
            `by_size`, a dictionary of AP by band; null is left out.
        output_png: the picture's file.

    Raises:
        InputError: the log cannot be read or has no record of an evaluation.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    _plot_metrics(figure.subplots(), _records(log, "eval"))
    figure.savefig(output_png, dpi=120)


def training_curves(log: str | Path | Sequence[Mapping[str, Any]], output_png: str | Path) -> None:
    """Draw a whole training as one picture.

    A panel each for the losses, AP, AP by size band, the learning rate, the milliseconds of a step by its parts, and
    memory; one of which the log knows nothing is left out. The epoch of the best checkpoint is marked.

    Args:
        log: a training run's `log.jsonl` or its records. Of those of kind `train` `epoch`, `step`, the losses, `lr`,
            `ms` and `memory_mb` are used; of those of kind `eval` what `metric_curves` uses, and `best` (whether it was
            the best so far), `metric`, `selected` (what that was judged by) and `num_objects_by_size`.
        output_png: the picture's file.

    Raises:
        InputError: the log cannot be read or has no record.
    """
    records = _read(log)
    training = _thinned([record for record in records if record.get("kind") == "train"])
    evaluations = [record for record in records if record.get("kind") == "eval"]
    if not training and not evaluations:
        name = str(log) if isinstance(log, (str, Path)) else "the log"
        raise InputError(f"{name} has no record of a training: let the run get that far, or give another log")
    panels: list[tuple[Callable[[Axes, Sequence[Mapping[str, Any]]], None], Sequence[Mapping[str, Any]]]] = [
        (_plot_losses, training),
        (_plot_ap, [record for record in evaluations if any(_is_number(record.get(name)) for name in _AP)]),
        (_plot_bands, [r for r in evaluations if any(map(_is_number, (r.get("by_size") or {}).values()))]),
        (_plot_rate, [record for record in training if _is_number(record.get("lr"))]),
        (_plot_time, [record for record in training if record.get("ms")]),
        (_plot_memory, [record for record in training if record.get("memory_mb")]),
    ]
    panels = [(plot, chosen) for plot, chosen in panels if chosen]
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(8 * columns, 3.6 * rows), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    best = next((record for record in reversed(evaluations) if record.get("best")), None)
    end = max([record["done"] for record in training] + [record["epoch"] for record in evaluations])
    for axes, (plot, chosen) in zip(places, panels, strict=False):
        plot(axes, chosen)
        axes.set_xlim(0, 1.02 * end)
        if best is not None:
            _mark_best(axes, best, plot in (_plot_ap, _plot_bands))
    for axes in places[len(panels) :]:
        axes.remove()
    figure.savefig(output_png, dpi=100)


def _read(log: str | Path | Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All records."""
    if not isinstance(log, (str, Path)):
        return list(log)
    records: list[Mapping[str, Any]] = []
    try:
        lines = Path(log).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{log} cannot be read ({error.strerror}): give a run's log.jsonl") from error
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            # A run that is being written, or was killed, ends in half a line.
            if number < len(lines):
                raise InputError(f"{log}: line {number} is not JSON: give a run's log.jsonl") from error
    return records


def _records(log: str | Path | Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """The records of one kind."""
    chosen = [record for record in _read(log) if record.get("kind") == kind]
    if not chosen:
        name = str(log) if isinstance(log, (str, Path)) else "the log"
        raise InputError(f"{name} has no record of kind {kind!r}: let the run get that far, or give another log")
    return chosen


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _epochs(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Epochs done at every training record: the finished ones and the share of the present one, by the steps."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for record in records:
        first.setdefault(record["epoch"], last.get(record["epoch"] - 1, 0))
        last[record["epoch"]] = record["step"]
    # The last epoch may be unfinished: the longest tells how many steps an epoch has.
    length = max(max((last[epoch] - first[epoch] for epoch in last), default=1), 1)
    return [record["epoch"] + (record["step"] - first[record["epoch"]]) / length for record in records]


def _thinned(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """At most `_MOST_POINTS` training records, each the mean of neighbours, with their epochs done as `done`."""
    done = _epochs(records)
    every = [{**record, "done": epoch} for record, epoch in zip(records, done, strict=True)]
    size = math.ceil(len(every) / _MOST_POINTS)
    return [_mean(every[start : start + size]) for start in range(0, len(every), size)] if size > 1 else every


def _mean(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of every number, also of those in dictionaries; of anything else the last one."""
    mean: dict[str, Any] = {}
    for name in dict.fromkeys(name for record in records for name in record):
        values = [record[name] for record in records if record.get(name) is not None]
        if values and all(map(_is_number, values)):
            mean[name] = sum(values) / len(values)
        elif values and all(isinstance(value, Mapping) for value in values):
            mean[name] = _mean(values)
        elif values:
            mean[name] = values[-1]
    return mean


def _done(records: Sequence[Mapping[str, Any]]) -> list[float]:
    return [record["done"] for record in records] if "done" in records[0] else _epochs(records)


def _line(axes: Axes, points: Iterable[tuple[float, Any]], **style: Any) -> None:
    """A line through the points that have a number; a point where there is only one."""
    kept = [(x, y) for x, y in points if _is_number(y)]
    if kept:
        style = {"linewidth": 1.2, **style}
        axes.plot(*zip(*kept, strict=True), **{"marker": "o" if len(kept) == 1 else None, **style})


def _plot_losses(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    epochs = _done(records)
    ignored = _NOT_A_LOSS | {"done"}
    names = dict.fromkeys(
        name for record in records for name, value in record.items() if name not in ignored and _is_number(value)
    )
    for name in names:
        total = {"label": "total", "color": "black", "linewidth": 2} if name == "loss" else {"label": name}
        _line(axes, [(epoch, record.get(name)) for epoch, record in zip(epochs, records, strict=True)], **total)
    axes.set(xlabel="epochs", ylabel="loss", ylim=(0, None))
    _finish(axes)


def _plot_metrics(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    _draw_ap(axes, records)
    for name in _band_names(records):
        _line(axes, _band(records, name), label=f"AP {name}", linestyle="--", marker="o", markersize=3)
    axes.set(xlabel="epochs", ylabel="AP on the validation set (%)", ylim=(0, None))
    _finish(axes)


def _plot_ap(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    _draw_ap(axes, records)
    axes.set(xlabel="epochs", ylabel="AP on the validation set (%)", ylim=(0, None))
    _finish(axes)


def _plot_bands(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    names = _band_names(records)
    counts = next((r["num_objects_by_size"] for r in reversed(records) if r.get("num_objects_by_size")), {})
    # From the first band to the last one, usually from small to large, as dark to bright.
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(names)))
    for name, color in zip(names, colors, strict=True):
        label = f"{name} ({counts[name]} objects)" if counts.get(name) is not None else name
        _line(axes, _band(records, name), label=label, color=color, marker="o", markersize=3)
    axes.set(xlabel="epochs", ylabel="AP by size (%)", ylim=(0, None))
    _finish(axes)


def _draw_ap(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    for name in _AP:
        main = {"color": "black", "linewidth": 2} if name == "ap" else {}
        points = _percent((record["epoch"], record.get(name)) for record in records)
        _line(axes, points, label=name.upper(), marker="o", markersize=3, **main)


def _band_names(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The size bands that have a number anywhere."""
    found = ((name, value) for record in records for name, value in (record.get("by_size") or {}).items())
    return list(dict.fromkeys(name for name, value in found if _is_number(value)))


def _band(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, Any]]:
    return _percent((record["epoch"], (record.get("by_size") or {}).get(name)) for record in records)


def _percent(points: Iterable[tuple[float, Any]]) -> list[tuple[float, Any]]:
    return [(x, 100 * y) for x, y in points if _is_number(y)]


def _plot_rate(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    points = zip(_done(records), (record["lr"] for record in records), strict=True)
    _line(axes, points, color="black", drawstyle="steps-mid")
    axes.set(xlabel="epochs", ylabel="learning rate", ylim=(0, None))
    _finish(axes)


def _plot_time(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    epochs = _done(records)
    names = list(dict.fromkeys(name for record in records for name in record["ms"]))
    parts = np.array([[record["ms"].get(name, 0.0) for record in records] for name in names])
    if len(epochs) > 1:
        axes.stackplot(epochs, parts, labels=names, alpha=0.85)
    else:  # one point has no area
        bottoms = np.cumsum(parts[:, 0]) - parts[:, 0]
        for name, height, bottom in zip(names, parts[:, 0], bottoms, strict=True):
            axes.bar(epochs, height, bottom=bottom, width=0.1 * epochs[0], label=name, alpha=0.85)
    # The first steps warm up: they may take many times the usual and would flatten the rest.
    top = 1.3 * float(np.quantile(parts.sum(axis=0), 0.95))
    axes.set(xlabel="epochs", ylabel="milliseconds per step", ylim=(0, top if top > 0 else None))
    _finish(axes, reverse=True)


def _plot_memory(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    epochs = _done(records)
    for name, label in (("device", "GPU, tensors"), ("process", "process")):
        values = (record["memory_mb"].get(name) for record in records)
        points = [(x, y / 1000 if _is_number(y) else None) for x, y in zip(epochs, values, strict=True)]
        _line(axes, points, label=label)
    axes.set(xlabel="epochs", ylabel="peak memory (GB)", ylim=(0, None))
    _finish(axes)


def _mark_best(axes: Axes, best: Mapping[str, Any], named: bool) -> None:
    axes.axvline(best["epoch"], color="tab:red", linestyle=":", linewidth=1)
    if named:
        value = f", {best.get('metric', 'selected')} {100 * best['selected']:.1f}" if best.get("selected") else ""
        axes.set_title(f"best: epoch {best['epoch']}{value}", fontsize="medium", color="tab:red")


def _finish(axes: Axes, reverse: bool = False) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        order = slice(None, None, -1 if reverse else 1)  # a stack is read from the top
        axes.legend(handles[order], labels[order], frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
