"""What a training tells: `log.jsonl`, `metrics.csv`, the progress of an epoch, and the summary at the end."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from crossdino.step_timer import StepTimer, peak_memory_mb
from crossdino.tracking import Trackers
from crossdino.writing import written_whole

LOSS_PARTS = ("class", "l1", "giou", "encoder", "denoising")
_LINE_SECONDS = 10.0
_METRICS = ("ap", "ap50", "ap75")
# Numbers are read from the device so often at most while a bar is shown: reading them waits for the device.
_BAR_SECONDS = 0.5
# Waiting for data for more than this share of a step, averaged over at least so many steps, is worth a word.
_MOST_DATA_SHARE = 0.2
_LEAST_STEPS = 3


class TrainingLog:
    """Averages losses and times between two records and appends records to `log.jsonl` and to the trackers.

    A record of kind `train` holds `step` (updates made), `epoch` (epochs finished before), `lr`, the averaged losses,
    `ms` (milliseconds per step of each part; `data` is waiting for the loader), `images_per_second` and `memory_mb`
    (see `peak_memory_mb`, of the main process); one of kind `eval` holds `step`, `epoch` (epochs finished) and the
    numbers of the evaluation. All hold `seconds` since the training's start. The timer is reset with every training
    record.

    Args:
        path: the file; None on the processes that write none.
        started: the start of the training on the clock of `time.monotonic`.
        mean_of_processes: averages a tensor over the processes; called for the records on all of them alike.
        timer: told of every step.
        trackers: get the same numbers; without any on the processes that write none.

    Attributes:
        num_images: images seen by all processes.
        told_of_data: whether the user was told that the training waits for data.
    """

    def __init__(
        self,
        path: Path | None,
        started: float,
        mean_of_processes: Callable[[Tensor], Tensor],
        timer: StepTimer,
        trackers: Trackers,
    ) -> None:
        self._path = path
        self._started = started
        self._mean_of_processes = mean_of_processes
        self._timer = timer
        self._trackers = trackers
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self.num_images = 0
        self.told_of_data = False
        # Of all steps that are in a record: images of all processes, seconds, seconds of waiting for data.
        self._totals = [0.0, 0.0, 0.0]

    def add(self, losses: Mapping[str, Tensor], num_images: int) -> None:
        """Add the losses of one step; they stay on their device."""
        for name in ("loss", *LOSS_PARTS):
            if name in losses:
                value = losses[name].detach().float()
                self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1
        self.num_images += num_images

    def averages(self) -> dict[str, float]:
        """The mean of each loss since the last record, on this process; empty right after a record."""
        if not self._count:
            return {}
        return self._rounded(torch.stack(list(self._sums.values())).tolist())

    def _rounded(self, sums: Sequence[float]) -> dict[str, float]:
        return {name: round(value / self._count, 6) for name, value in zip(self._sums, sums, strict=True)}

    def write_training(self, step: int, epoch: int, learning_rate: float) -> None:
        """Append the losses since the last record, if there were any."""
        if not self._count:
            return
        milliseconds = self._timer.averages()
        # One exchange for losses and times.
        sums = torch.stack(list(self._sums.values()))
        means = self._mean_of_processes(torch.cat([sums, sums.new_tensor(list(milliseconds.values()))])).tolist()
        losses = self._rounded(means[: len(sums)])
        milliseconds = {name: round(value, 2) for name, value in zip(milliseconds, means[len(sums) :], strict=True)}
        speed = round(self._timer.images_per_second(), 3)
        waiting = round(milliseconds.get("data", 0.0) / (sum(milliseconds.values()) or 1.0), 4)
        seconds = self._timer.seconds()
        for place, value in enumerate((self._timer.images_per_second() * seconds, seconds, waiting * seconds)):
            self._totals[place] += value
        memory = {name: round(value, 1) for name, value in peak_memory_mb(sums.device).items()}
        self._write(
            {
                "kind": "train",
                "step": step,
                "epoch": epoch,
                "lr": learning_rate,
                **losses,
                "ms": milliseconds,
                "images_per_second": speed,
                "memory_mb": memory,
            }
        )
        self._trackers.log(
            {
                **{f"train/{name}": value for name, value in losses.items()},
                "train/lr": learning_rate,
                "train/epoch": epoch,
                **{f"time/{name}_ms": value for name, value in milliseconds.items()},
                "time/images_per_second": speed,
                "time/data_share": waiting,
                **{f"memory/{name}_mb": value for name, value in memory.items()},
            },
            step,
        )
        self._sums, self._count = {}, 0
        self._timer.reset()

    def speed(self) -> str:
        """The speed of all steps in the records of this run in words, for its end; empty before the first record."""
        images, seconds, waited = self._totals
        if not seconds:
            return ""
        return f"{images / seconds:.1f} images/s while training, {100 * waited / seconds:.0f} % of it waiting for data"

    def write_evaluation(self, step: int, epoch: int | float, numbers: Mapping[str, Any]) -> dict[str, Any]:
        """Append the numbers of an evaluation; returns the record."""
        record = {"kind": "eval", "step": step, "epoch": epoch, **numbers}
        self._write(record)
        values = {f"val/{name}": numbers.get(name) for name in (*_METRICS, "selected")}
        values |= {f"val/ap_{name}": value for name, value in (numbers.get("by_size") or {}).items()}
        self._trackers.log({**values, "val/epoch": epoch}, step)
        return record

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._path is not None:
            seconds = round(time.monotonic() - self._started, 1)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**record, "seconds": seconds}) + "\n")


def drop_records_after(path: Path, step: int) -> None:
    """Drop the records of steps that an interrupted training will repeat, and half-written lines.

    Args:
        path: the log; made empty where there is none.
        step: updates that the training continues after.
    """
    kept = [json.dumps(record) + "\n" for record in _records(path) if record["step"] <= step]
    with written_whole(path) as partial:
        partial.write_text("".join(kept), encoding="utf-8")


def write_metrics_csv(log_path: Path, csv_path: Path) -> None:
    """Write the course of a training as a table: one row per evaluation, or per epoch where there is none yet.

    The columns: epoch (finished ones, with the share of an unfinished one), step, seconds, lr, the losses averaged over
    that epoch, its images_per_second and data_share (of its time, spent waiting for data), ap, ap50, ap75, `ap_` and
    the name of each size band, `selected` (the number that the best checkpoint is chosen by) and `is_best` (true in one
    row at most). What a row does not have is left empty.

    Args:
        log_path: the run's `log.jsonl`.
        csv_path: the file to replace.
    """
    records = _records(log_path)
    epochs: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        if record["kind"] == "train":
            epochs.setdefault(record["epoch"] + 1, []).append(record)
    rows = [record for record in records if record["kind"] == "eval"]
    best = _best(rows)
    if not rows:
        rows = [
            {**{name: last[name] for name in ("step", "seconds")}, "epoch": epoch}
            for epoch, (*_, last) in epochs.items()
        ]
    losses = [name for name in ("loss", *LOSS_PARTS) if any(name in record for record in records)]
    bands = _bands(rows)
    header = ["epoch", "step", "seconds", "lr", *(name if name == "loss" else f"loss_{name}" for name in losses)]
    timed = ["images_per_second", "data_share"] if any(map(_is_timed, records)) else []
    header += [*timed, *_METRICS, *(f"ap_{name}" for name in bands), "selected", "is_best"]
    with written_whole(csv_path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for record in rows:
            trained = epochs.get(math.ceil(record["epoch"]), [])
            by_size = record.get("by_size") or {}
            writer.writerow(
                [
                    record["epoch"],
                    record["step"],
                    record.get("seconds"),
                    trained[-1]["lr"] if trained else None,
                    *(_epoch_mean(trained, name, epochs) for name in losses),
                    *(_epoch_speed(trained, epochs) if timed else ()),
                    *(record.get(name) for name in _METRICS),
                    *(by_size.get(name) for name in bands),
                    record.get("selected"),
                    "true" if record is best else "false",
                ]
            )


def _epoch_mean(
    records: Sequence[Mapping[str, Any]], name: str, epochs: Mapping[int, Sequence[Mapping[str, Any]]]
) -> float | None:
    """The mean of a loss over an epoch's steps; a record stands for the steps since the one before."""
    total, steps = 0.0, 0
    for record, count in _with_steps(records, epochs):
        if name in record:
            total += record[name] * count
            steps += count
    return round(total / steps, 6) if steps else None


def _epoch_speed(
    records: Sequence[Mapping[str, Any]], epochs: Mapping[int, Sequence[Mapping[str, Any]]]
) -> tuple[float | None, float | None]:
    """Images per second, and the share of waiting for data, over an epoch's steps."""
    images = seconds = waited = 0.0
    for record, count in _with_steps(records, epochs):
        if _is_timed(record):
            time_taken = count * sum(record["ms"].values()) / 1000
            images += time_taken * record["images_per_second"]
            seconds += time_taken
            waited += count * record["ms"].get("data", 0.0) / 1000
    return (round(images / seconds, 3), round(waited / seconds, 4)) if seconds else (None, None)


def _is_timed(record: Mapping[str, Any]) -> bool:
    return "ms" in record and "images_per_second" in record


def _with_steps(
    records: Sequence[Mapping[str, Any]], epochs: Mapping[int, Sequence[Mapping[str, Any]]]
) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Each record of an epoch, and the number of steps that it stands for: those since the one before."""
    for index, record in enumerate(records):
        before = records[index - 1] if index else (epochs.get(record["epoch"]) or [{"step": 0}])[-1]
        yield record, record["step"] - before["step"]


def _records(path: Path) -> list[dict[str, Any]]:
    """A log's records; empty where there is no log."""
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:  # the machine died while writing it
            continue
    return records


def _best(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The last evaluation that was the best one when it was made."""
    return next((record for record in reversed(evaluations) if record.get("best")), None)


def _bands(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The size bands of all evaluations."""
    return list(dict.fromkeys(name for record in evaluations for name in record.get("by_size") or {}))


class EpochDisplay:
    """The progress of one epoch: a bar in a terminal, otherwise a plain line every ten seconds.

    Says once in a training if much of the time is spent waiting for data.

    Args:
        console: where to print; a quiet one prints nothing.
        epoch: epochs finished before.
        num_epochs: of the training.
        num_steps: updates of the epoch that are to be made.
        timer: told of every step.

    Attributes:
        num_done: updates made.
    """

    def __init__(self, console: Console, epoch: int, num_epochs: int, num_steps: int, timer: StepTimer) -> None:
        self._console = console
        self._title = f"epoch {epoch + 1}/{num_epochs}"
        self._num_steps = num_steps
        self._epochs_left = num_epochs - epoch - 1
        self._timer = timer
        self.num_done = 0
        self._first_step_at = self._told_at = time.monotonic()
        self._images_before = 0
        self._text = ""
        self._live: Live | None = None
        if console.is_terminal and not console.quiet:
            self._bar = Progress(
                TextColumn(self._title),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task("", total=num_steps)
            self._live = Live(get_renderable=self._picture, console=console, transient=True)

    def __enter__(self) -> EpochDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, log: TrainingLog, learning_rate: float) -> None:
        """Tell that one more update was made and timed, before the log writes its record."""
        self.num_done += 1
        now = time.monotonic()
        if self.num_done == 1:  # the first step warms up and does not count for the speed
            self._images_before, self._first_step_at = log.num_images, now
        if self._live is not None:
            self._bar.update(self._task, completed=self.num_done)
        pause = _LINE_SECONDS if self._live is None else _BAR_SECONDS
        due = self.num_done == self._num_steps or now - self._told_at >= pause
        if self._console.quiet or not due:
            return
        self._told_at = now
        lines = [self._losses(log, learning_rate), self._costs()]
        if self.num_done > 1:
            elapsed = max(now - self._first_step_at, 1e-9)
            lines[0] += f" {(log.num_images - self._images_before) / elapsed:.1f} images/s"
            steps_left = self._num_steps - self.num_done + self._epochs_left * self._num_steps
            lines[1] += f" ETA {duration(elapsed / (self.num_done - 1) * steps_left)}"
        if self._live is not None:
            self._text = "\n".join(lines)
        else:
            title = f"{self._title} step {self.num_done}/{self._num_steps}"
            self._console.print(title, *lines, soft_wrap=True)
        self._tell_of_data(log)

    def _picture(self) -> Group:
        return Group(self._bar, Text(self._text))

    @staticmethod
    def _losses(log: TrainingLog, learning_rate: float) -> str:
        losses = log.averages()
        parts = " ".join(f"{name} {losses[name]:.3f}" for name in LOSS_PARTS if name in losses)
        return f"loss {losses['loss']:.3f} ({parts}) lr {learning_rate:.1e}"

    def _costs(self) -> str:
        parts = self._timer.averages()
        total = sum(parts.values())
        shares = " ".join(f"{name} {value / (total or 1):.0%}".replace("%", " %") for name, value in parts.items())
        memory = peak_memory_mb(self._timer.device)
        used = ", ".join(
            f"{value / 1000:.1f} GB" + (" on the GPU" if name == "device" else "") for name, value in memory.items()
        )
        return f"{total:.0f} ms: {shares}" + (f" memory {used}" if used else "")

    def _tell_of_data(self, log: TrainingLog) -> None:
        # An epoch's first step waits for the loader to start.
        skip = max(0, self._timer.num_steps - self.num_done + 1)
        if log.told_of_data or self._timer.num_steps - skip < _LEAST_STEPS:
            return
        share = self._timer.share("data", skip)
        if share > _MOST_DATA_SHARE:
            log.told_of_data = True
            self._console.print(
                f"Waiting for data takes {100 * share:.0f} % of a step: set data.num_workers higher (up to the CPU "
                "cores that are free); tiles of large JPEG or PNG files are read fastest after `crossdino tile`, or "
                "with CROSSDINO_UNPACKED set to a folder on a fast disk.",
                soft_wrap=True,
            )


def evaluations_table(evaluations: Sequence[dict[str, Any]]) -> Table:
    """All evaluations of a training, the best one in bold.

    Args:
        evaluations: the log's records: `epoch`, `ap`, `ap50`, `ap75`, `by_size`; `selected`, the number that the best
            checkpoint is chosen by, with its name in `metric`; `best`, whether it was the best when it was made.
    """
    bands, best = _bands(evaluations), _best(evaluations)
    chosen = any("selected" in record for record in evaluations)
    metric = next((f": {record['metric']}" for record in reversed(evaluations) if "metric" in record), "")
    table = Table(title="validation")
    for header in ("epoch", "AP", "AP50", "AP75", *(f"AP {name}" for name in bands)):
        table.add_column(header, justify="right")
    if chosen:
        table.add_column(f"chosen by{metric}", justify="right")
    for record in evaluations:
        by_size = record.get("by_size") or {}
        values = [*(record.get(name) for name in _METRICS), *(by_size.get(name) for name in bands)]
        values += [record.get("selected")] if chosen else []
        cells = ["-" if value is None else f"{100 * value:.1f}" for value in values]
        table.add_row(str(record["epoch"]), *cells, style="bold" if record is best else None)
    return table


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
