"""The curves of a training run: losses and metrics against the epoch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from crossdino.errors import InputError

# Everything in a training record that is not a loss.
_NOT_A_LOSS = frozenset({"kind", "step", "epoch", "lr", "seconds"})


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


def _records(log: str | Path | Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """The records of one kind."""
    name = str(log) if isinstance(log, (str, Path)) else "the log"
    records: list[Mapping[str, Any]] = []
    if isinstance(log, (str, Path)):
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
    else:
        records = list(log)
    chosen = [record for record in records if record.get("kind") == kind]
    if not chosen:
        raise InputError(f"{name} has no record of kind {kind!r}: let the run get that far, or give another log")
    return chosen


def _epochs(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Epochs done at every training record: the finished ones and the share of the present one, by the steps."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for record in records:
        first.setdefault(record["epoch"], last.get(record["epoch"] - 1, 0))
        last[record["epoch"]] = record["step"]
    # The last epoch may be unfinished: the longest tells how many steps an epoch has.
    length = max(max(last[epoch] - first[epoch] for epoch in last), 1)
    return [record["epoch"] + (record["step"] - first[record["epoch"]]) / length for record in records]


def _plot_losses(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    epochs = _epochs(records)
    names = dict.fromkeys(
        name
        for record in records
        for name, value in record.items()
        if name not in _NOT_A_LOSS and isinstance(value, (int, float))
    )
    for name in names:
        points = [(epoch, record[name]) for epoch, record in zip(epochs, records, strict=True) if name in record]
        is_total = name == "loss"
        axes.plot(
            *zip(*points, strict=True),
            label="total" if is_total else name,
            color="black" if is_total else None,
            linewidth=2 if is_total else 1.2,
            marker="o" if len(points) == 1 else None,
        )
    axes.set(xlabel="epochs", ylabel="loss", ylim=(0, None))
    _finish(axes)


def _plot_metrics(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        bands = record.get("by_size") or {}
        values = {name.upper(): record.get(name) for name in ("ap", "ap50", "ap75")}
        values |= {f"AP {name}": value for name, value in bands.items()}
        for name, value in values.items():
            if value is not None:
                curves.setdefault(name, []).append((record["epoch"], 100 * value))
    for name, points in curves.items():
        is_band = name.startswith("AP ")
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            color="black" if name == "AP" else None,
            linewidth=2 if name == "AP" else 1.2,
            linestyle="--" if is_band else "-",
            marker="o",
            markersize=3,
        )
    axes.set(xlabel="epochs", ylabel="AP on the validation set (%)", ylim=(0, None))
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
