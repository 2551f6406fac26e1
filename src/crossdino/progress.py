"""What a training tells: `log.jsonl`, the progress of an epoch, and the summary at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from crossdino.checkpoints import written_whole

LOSS_PARTS = ("class", "l1", "giou", "encoder", "denoising")
_LINE_SECONDS = 10.0


class TrainingLog:
    """Averages the losses between two records and appends records to `log.jsonl`.

    A record of kind `train` holds `step` (updates made), `epoch` (epochs finished before), `lr`, the averaged losses
    and `seconds` (since the training's start); one of kind `eval` holds `step`, `epoch` (epochs finished) and the AP.

    Args:
        path: the file; None on the processes that write none.
        started: the start of the training on the clock of `time.monotonic`.
        mean_of_processes: averages a tensor over the processes; called for the records on all of them alike.

    Attributes:
        num_images: images seen by all processes.
    """

    def __init__(self, path: Path | None, started: float, mean_of_processes: Callable[[Tensor], Tensor]) -> None:
        self._path = path
        self._started = started
        self._mean_of_processes = mean_of_processes
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self.num_images = 0

    def add(self, losses: Mapping[str, Tensor], num_images: int) -> None:
        """Add the losses of one batch; they stay on their device."""
        for name in ("loss", *LOSS_PARTS):
            if name in losses:
                value = losses[name].detach()
                self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1
        self.num_images += num_images

    def averages(self) -> dict[str, float]:
        """The mean of each loss since the last record, on this process."""
        return self._rounded(torch.stack(list(self._sums.values())))

    def _rounded(self, sums: Tensor) -> dict[str, float]:
        return {name: round(value / self._count, 6) for name, value in zip(self._sums, sums.tolist(), strict=True)}

    def write_training(self, step: int, epoch: int, learning_rate: float) -> None:
        """Append the losses since the last record, if there were any."""
        if self._count:
            losses = self._rounded(self._mean_of_processes(torch.stack(list(self._sums.values()))))
            self._write({"kind": "train", "step": step, "epoch": epoch, "lr": learning_rate, **losses})
            self._sums, self._count = {}, 0

    def write_evaluation(self, step: int, epoch: int, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Append the numbers of an evaluation; returns the record."""
        record = {"kind": "eval", "step": step, "epoch": epoch, **numbers}
        self._write(record)
        return record

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._path is not None:
            seconds = round(time.monotonic() - self._started, 1)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**record, "seconds": seconds}) + "\n")


def drop_records_after(path: Path, epochs: int) -> None:
    """Drop the records of an epoch that was interrupted and will be repeated, and half-written lines.

    Args:
        path: the log; made empty where there is none.
        epochs: finished epochs.
    """
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:  # the machine died while writing it
            continue
        if record["epoch"] < epochs + (record["kind"] == "eval"):
            kept.append(line + "\n")
    with written_whole(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")


class EpochDisplay:
    """The progress of one epoch: a bar in a terminal, otherwise a plain line every ten seconds.

    Args:
        console: where to print; a quiet one prints nothing.
        epoch: epochs finished before.
        num_epochs: of the training.
        num_steps: updates of the epoch.
    """

    def __init__(self, console: Console, epoch: int, num_epochs: int, num_steps: int) -> None:
        self._console = console
        self._title = f"epoch {epoch + 1}/{num_epochs}"
        self._num_steps = num_steps
        self._epochs_left = num_epochs - epoch - 1
        self._done = 0
        self._first_step_at = self._last_line_at = time.monotonic()
        self._images_before = 0
        self._bar: Progress | None = None
        if console.is_terminal and not console.quiet:
            self._bar = Progress(
                TextColumn(self._title),
                BarColumn(bar_width=20),
                TextColumn("{task.completed}/{task.total} {task.fields[text]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=num_steps, text="")

    def __enter__(self) -> EpochDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, log: TrainingLog, learning_rate: float) -> None:
        """Tell that one more update was made."""
        self._done += 1
        now = time.monotonic()
        if self._done == 1:  # the first step warms up and does not count for the speed
            self._images_before, self._first_step_at = log.num_images, now
        due = self._done == self._num_steps or now - self._last_line_at >= _LINE_SECONDS
        if self._console.quiet or (self._bar is None and not due):
            return
        losses = log.averages()
        parts = " ".join(f"{name} {losses[name]:.3f}" for name in LOSS_PARTS if name in losses)
        text = f"loss {losses['loss']:.3f} ({parts}) lr {learning_rate:.1e}"
        left = ""
        if self._done > 1:
            elapsed = max(now - self._first_step_at, 1e-9)
            text += f" {(log.num_images - self._images_before) / elapsed:.1f} images/s"
            steps_left = self._num_steps - self._done + self._epochs_left * self._num_steps
            left = f" ETA {duration(elapsed / (self._done - 1) * steps_left)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, text=text)
        else:
            self._last_line_at = now
            self._console.print(f"{self._title} step {self._done}/{self._num_steps} {text}{left}", soft_wrap=True)


def evaluations_table(evaluations: list[dict[str, Any]], best_ap: float | None) -> Table:
    """All evaluations of a training, the best one in bold."""
    table = Table(title="validation")
    for header in ("epoch", "AP", "AP50", "AP75", *(f"AP {name}" for name in evaluations[-1]["by_size"])):
        table.add_column(header, justify="right")
    for record in evaluations:
        values = [record["ap"], record["ap50"], record["ap75"], *record["by_size"].values()]
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in values]
        table.add_row(str(record["epoch"]), *cells, style="bold" if record["ap"] == best_ap else None)
    return table


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
