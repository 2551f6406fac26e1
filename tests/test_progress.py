"""What a training tells while it runs and afterwards: times, log, table, display."""

from __future__ import annotations

import csv
import io
import json
import types
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from crossdino import progress, step_timer
from crossdino.progress import (
    EpochDisplay,
    TrainingLog,
    drop_records_after,
    evaluations_table,
    write_metrics_csv,
)
from crossdino.step_timer import StepTimer, peak_memory_mb
from crossdino.tracking import Trackers

CPU = torch.device("cpu")


class Clock:
    """A clock that is set by hand, in seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(step_timer, "time", types.SimpleNamespace(perf_counter=made))
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=made))
    return made


class Recorder(Trackers):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__([])
        self.told: list[tuple[dict[str, Any], int]] = []

    def log(self, values, step) -> None:
        self.told.append((dict(values), step))


def make_step(timer: StepTimer, clock: Clock, num_images: int = 2, **milliseconds: float) -> None:
    timer.start()
    for name, value in milliseconds.items():
        clock.now += value / 1000
        timer.lap(name)
    timer.finish_step(num_images)


# --- the timer ---


def test_timer_adds_up_laps_and_averages_steps(clock):
    timer = StepTimer(CPU)
    assert timer.averages() == {} and timer.images_per_second() == 0
    timer.start()
    for milliseconds, name in ((10, "data"), (20, "forward"), (30, "backward"), (40, "forward"), (50, "backward")):
        clock.now += milliseconds / 1000
        timer.lap(name)
    clock.now += 0.1  # belongs to no part, but to the step
    timer.finish_step(3)
    assert timer.averages() == pytest.approx({"data": 10, "forward": 60, "backward": 80})
    assert timer.images_per_second() == pytest.approx(3 / 0.25)
    clock.now += 60  # between the steps: an evaluation
    timer.start()  # the data ended: no step
    clock.now += 5
    make_step(timer, clock, num_images=5, data=30, optimizer=120)
    # A part that a step does not have took no time there.
    assert timer.averages() == pytest.approx({"data": 20, "forward": 30, "backward": 40, "optimizer": 60})
    assert timer.images_per_second() == pytest.approx(8 / 0.4)
    assert timer.averages(skip=1) == pytest.approx({"data": 30, "optimizer": 120})
    assert timer.averages(skip=2) == {} and timer.num_steps == 2
    timer.reset()
    assert timer.averages() == {} and timer.images_per_second() == 0 and timer.num_steps == 0


def test_timer_on_a_gpu_waits_only_when_it_is_read(monkeypatch):
    # A stand-in for the GPU's queue: it has its own clock, in milliseconds, and must be waited for before it is read.
    queue = {"now": 0.0, "waits": 0}

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            assert stream == "stream of cuda:0"
            self.at, self.waits = queue["now"], queue["waits"]

        def synchronize(self) -> None:
            queue["waits"] += 1

        def elapsed_time(self, end: Event) -> float:
            assert queue["waits"] > end.waits, "read without waiting"
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    timer = StepTimer(torch.device("cuda:0"))
    for forward in (10.0, 30.0):
        timer.start()
        queue["now"] += forward
        timer.lap("forward")
        queue["now"] += 5.0
        timer.lap("loss")
        timer.finish_step(4)
    assert queue["waits"] == 0
    assert timer.averages() == {"forward": 20.0, "loss": 5.0}
    assert timer.images_per_second() == pytest.approx(8 / 0.05)
    assert queue["waits"] == 1


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_mb(CPU)
    assert set(before) == {"process"}
    held = torch.ones(60_000_000, dtype=torch.uint8)
    assert held.sum() == 60_000_000
    after = peak_memory_mb(CPU)
    # The peak cannot lie below what is resident now; 5 MB for what comes and goes between the two readings.
    assert after["process"] >= psutil.Process().memory_info().rss / 1e6 - 5
    assert before["process"] <= after["process"] < psutil.virtual_memory().total / 1e6


# --- the log ---


def losses(value: float) -> dict[str, torch.Tensor]:
    return {"loss": torch.tensor(value), "l1": torch.tensor(value / 2), "something else": torch.tensor(1.0)}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_log_has_the_times_and_tells_the_trackers(tmp_path, clock):
    timer, trackers = StepTimer(CPU), Recorder()
    log = TrainingLog(tmp_path / "log.jsonl", clock.now, lambda tensor: tensor, timer, trackers)
    assert log.averages() == {}
    for value in (1.0, 2.0):
        log.add(losses(value), 2)
        make_step(timer, clock, data=10 * value, forward=30, backward=60)
    assert log.averages() == {"loss": 1.5, "l1": 0.75}
    log.write_training(10, 0, 1e-4)
    log.write_training(10, 0, 1e-4)  # nothing since the last record
    numbers = {"ap": 0.25, "ap50": None, "by_size": {"small": 0.125}, "metric": "ap small", "selected": 0.125}
    log.write_evaluation(10, 1, {**numbers, "best": True})
    train, evaluation = read(tmp_path / "log.jsonl")
    assert train.pop("memory_mb")["process"] > 0
    assert train == {
        "kind": "train",
        "step": 10,
        "epoch": 0,
        "lr": 1e-4,
        "loss": 1.5,
        "l1": 0.75,
        "ms": {"data": 15.0, "forward": 30.0, "backward": 60.0},
        "images_per_second": round(4 / 0.21, 3),
        "seconds": 0.2,
    }
    assert evaluation == {"kind": "eval", "step": 10, "epoch": 1, **numbers, "best": True, "seconds": 0.2}
    (told, step), (told_evaluation, _) = trackers.told
    assert step == 10
    assert (told["train/loss"], told["train/lr"], told["time/data_ms"]) == (1.5, 1e-4, 15.0)
    assert {"memory/process_mb", "time/images_per_second", "train/l1", "train/epoch"} <= set(told)
    assert told_evaluation["val/ap"] == 0.25 and told_evaluation["val/ap_small"] == 0.125
    assert told_evaluation["val/selected"] == 0.125 and told_evaluation["val/ap75"] is None
    # The next record begins anew.
    log.add(losses(5.0), 2)
    make_step(timer, clock, data=1)
    log.write_training(20, 0, 1e-4)
    assert read(tmp_path / "log.jsonl")[-1]["loss"] == 5.0
    assert read(tmp_path / "log.jsonl")[-1]["ms"] == {"data": 1.0}


def test_log_averages_over_processes_and_keeps_half_precision_sums_exact(tmp_path, clock):
    timer = StepTimer(CPU)
    # The other process has three times the losses and the times of this one.
    log = TrainingLog(tmp_path / "log.jsonl", clock.now, lambda tensor: 2 * tensor, timer, Trackers([]))
    for _ in range(600):
        log.add({"loss": torch.tensor(1.0, dtype=torch.bfloat16)}, 1)
        make_step(timer, clock, data=5)
    log.write_training(600, 0, 1e-4)
    (record,) = read(tmp_path / "log.jsonl")
    assert record["loss"] == 2.0  # a sum in bfloat16 would stop at 256
    assert record["ms"] == {"data": pytest.approx(10)}
    silent = TrainingLog(None, clock.now, lambda tensor: tensor, timer, Trackers([]))
    silent.add(losses(1.0), 1)
    silent.write_training(1, 0, 1e-4)


TRAIN = {"kind": "train", "lr": 1e-4, "loss": 1.0}


def test_records_of_steps_to_be_repeated_are_dropped(tmp_path):
    log = tmp_path / "log.jsonl"
    drop_records_after(log, 0)
    assert log.read_text() == ""
    steps = [{**TRAIN, "step": 10, "epoch": 0}, {"kind": "eval", "step": 10, "epoch": 1, "ap": None}]
    steps += [{**TRAIN, "step": 15, "epoch": 1}, {**TRAIN, "step": 20, "epoch": 1}]
    log.write_text("".join(json.dumps(record) + "\n" for record in steps) + '{"kind": "tr')
    drop_records_after(log, 15)
    assert read(log) == steps[:3]
    assert log.read_text().endswith("\n")


# --- metrics.csv ---


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_table_of_the_evaluations(tmp_path):
    records: list[dict[str, Any]] = [
        {**TRAIN, "step": 10, "epoch": 0, "loss": 4.0, "l1": 2.0, "seconds": 1.0},
        {**TRAIN, "step": 14, "epoch": 0, "loss": 2.0, "l1": 1.0, "seconds": 2.0},
        {**TRAIN, "step": 20, "epoch": 1, "loss": 3.0, "lr": 5e-5, "seconds": 3.0, "ms": {"data": 1.0}},
        {**TRAIN, "step": 28, "epoch": 1, "loss": 1.0, "lr": 1e-5, "seconds": 4.0, "images_per_second": 2.0},
    ]
    log, path = tmp_path / "log.jsonl", tmp_path / "metrics.csv"

    def write() -> list[dict[str, str]]:
        log.write_text("".join(json.dumps(record) + "\n" for record in records) + "half a li")
        write_metrics_csv(log, path)
        return table(path)

    # Without evaluations: one row per epoch; the loss of epoch 1 is (10 * 4 + 4 * 2) / 14.
    header = ["epoch", "step", "seconds", "lr", "loss", "loss_l1", "ap", "ap50", "ap75", "selected", "is_best"]
    rows = write()
    assert list(rows[0]) == header
    assert list(rows[0].values()) == ["1", "14", "2.0", "0.0001", "3.428571", "1.714286", "", "", "", "", "false"]
    # (6 * 3 + 8 * 1) / 14
    assert list(rows[1].values()) == ["2", "28", "4.0", "1e-05", "1.857143", "", "", "", "", "", "false"]

    def evaluation(epoch: int, value: float | None, best: bool, **by_size: float | None) -> dict[str, Any]:
        record = {"kind": "eval", "step": 14 * epoch, "epoch": epoch, "ap": value, "ap50": 0.5, "ap75": None}
        return {**record, "by_size": by_size, "selected": value, "best": best, "seconds": 2.5 * epoch}

    records.insert(2, evaluation(1, 0.25, True, small=0.125))
    records.append(evaluation(2, 0.5, True, small=0.25, **{"very tiny, 8": None}))
    records.append(evaluation(3, None, False))
    rows = write()
    assert list(rows[0]) == [*header[:9], "ap_small", "ap_very tiny, 8", *header[9:]]
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["loss"] for row in rows] == ["3.428571", "1.857143", ""]
    assert [row["lr"] for row in rows] == ["0.0001", "1e-05", ""]
    assert [row["seconds"] for row in rows] == ["2.5", "5.0", "7.5"]
    assert [row["ap"] for row in rows] == ["0.25", "0.5", ""]
    assert [row["ap_small"] for row in rows] == ["0.125", "0.25", ""]
    assert [row["selected"] for row in rows] == ["0.25", "0.5", ""]
    # The best so far is the best only until a better one comes.
    assert [row["is_best"] for row in rows] == ["false", "true", "false"]
    assert not [file.name for file in tmp_path.iterdir() if file.name not in ("log.jsonl", "metrics.csv")]


def test_table_has_the_speed_of_each_epoch(tmp_path, clock):
    timer = StepTimer(CPU)
    log = TrainingLog(tmp_path / "log.jsonl", clock.now, lambda tensor: tensor, timer, Trackers([]))
    assert log.speed() == ""
    step = 0
    for epoch, data in enumerate((100.0, 900.0)):
        for count in (3, 1):  # records of three steps and of one
            for _ in range(count):
                step += 1
                log.add(losses(1.0), 2)
                make_step(timer, clock, 2, data=data * count, forward=100)
            log.write_training(step, epoch, 1e-4)
    write_metrics_csv(tmp_path / "log.jsonl", tmp_path / "metrics.csv")
    rows = table(tmp_path / "metrics.csv")
    # Epoch 0: three steps of 300 + 100 ms and one of 100 + 100 ms, 8 images.
    assert [row["images_per_second"] for row in rows] == [str(round(8 / 1.4, 3)), str(round(8 / 9.4, 3))]
    assert [row["data_share"] for row in rows] == [str(round(1.0 / 1.4, 4)), str(round(9.0 / 9.4, 4))]
    assert log.speed() == f"{16 / 10.8:.1f} images/s while training, 93 % of it waiting for data"
    timer.start()
    clock.now += 1
    timer.lap("data")
    clock.now += 3
    timer.lap("forward")
    timer.finish_step(1)
    assert timer.share("data") == pytest.approx(0.25) and timer.share("loss") == 0 == timer.share("data", skip=1)


# --- the display ---


def console(terminal: bool = False, width: int = 200) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False, color_system=None)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def display_epoch(
    console: Console, log: TrainingLog, timer: StepTimer, clock: Clock, steps: list[dict[str, float]], epoch: int = 0
) -> EpochDisplay:
    with EpochDisplay(console, epoch, 3, len(steps), timer) as display:
        for parts in steps:
            make_step(timer, clock, **parts)
            log.add(losses(2.0), 2)
            display.advance(log, 1e-4)
    return display


def new_log(timer: StepTimer, clock: Clock) -> TrainingLog:
    return TrainingLog(None, clock.now, lambda tensor: tensor, timer, Trackers([]))


STEADY = {"data": 20.0, "forward": 340.0, "loss": 40.0, "backward": 560.0, "optimizer": 40.0}


def test_display_says_where_the_time_goes(clock):
    timer, out = StepTimer(CPU), console()
    display = display_epoch(out, new_log(timer, clock), timer, clock, [STEADY] * 12)
    first, last = shown(out).splitlines()
    assert first.startswith("epoch 1/3 step 10/12 loss 2.000 (l1 1.000) lr 1.0e-04 2.0 images/s 1000 ms: ")
    assert "1000 ms: data 2 % forward 34 % loss 4 % backward 56 % optimizer 4 % memory " in first
    assert first.endswith("ETA 0:00:26")  # 2 steps and 2 epochs of 12 steps, a second each
    assert "memory " in last and " GB" in last
    assert last.startswith("epoch 1/3 step 12/12") and last.endswith("ETA 0:00:24")
    assert display.num_done == 12


def test_display_in_a_narrow_terminal_shows_everything(clock):
    timer, out = StepTimer(CPU), console(terminal=True, width=60)
    display_epoch(out, new_log(timer, clock), timer, clock, [STEADY] * 3)
    text = " ".join(shown(out).split())
    for part in ("epoch 1/3", "3/3", "loss 2.000", "1000 ms: data 2 %", "optimizer 4 %", "images/s", "memory", "ETA"):
        assert part in text, part
    quiet = Console(file=io.StringIO(), quiet=True)
    assert display_epoch(quiet, new_log(timer, clock), timer, clock, [STEADY] * 3).num_done == 3


def test_display_says_once_that_the_training_waits_for_data(clock):
    def told(steps: list[dict[str, float]], epochs: int = 1) -> int:
        timer, out = StepTimer(CPU), console()
        log = new_log(timer, clock)
        for epoch in range(epochs):
            display_epoch(out, log, timer, clock, steps, epoch)
            log.write_training(1, epoch, 1e-4)
        return shown(out).count("data.num_workers")

    starved = {"data": 600.0, "forward": 400.0, "backward": 600.0}
    assert told([starved] * 30, epochs=3) == 1
    assert told([starved] * 4, epochs=3) == 1
    # The loader starts with an epoch's first step: that is no reason.
    assert told([{**STEADY, "data": 9000.0}, *[STEADY] * 11]) == 0
    assert told([STEADY] * 30) == 0
    # Batches that come in bursts, one wait for four of them, are as bad as steady waiting.
    assert told([STEADY, *[{**STEADY, "data": 4000.0}, *[STEADY] * 3] * 4]) == 1
    # A fifth of the time is the limit.
    assert told([{"data": 240.0, "forward": 1000.0}] * 12) == 0
    assert told([{"data": 260.0, "forward": 1000.0}] * 12) == 1
    # Two steps prove nothing.
    assert told([starved] * 3) == 0


def test_table_marks_the_best_and_says_what_it_was_chosen_by():
    def record(epoch: int, ap: float | None, best: bool, selected: float, **by_size: float | None) -> dict[str, Any]:
        numbers = {"ap": ap, "ap50": 0.5, "ap75": None, "by_size": by_size}
        return {"epoch": epoch, **numbers, "metric": "ap small", "selected": selected, "best": best}

    evaluations = [
        record(1, 0.9, True, 0.1, small=0.1),
        record(2, 0.3, True, 0.2, small=0.2, large=None),
        record(3, 0.4, False, 0.15, small=0.15),
    ]
    made = evaluations_table(evaluations)
    assert [row.style for row in made.rows] == [None, "bold", None]
    headers = [str(column.header) for column in made.columns]
    assert headers == ["epoch", "AP", "AP50", "AP75", "AP small", "AP large", "chosen by: ap small"]
    assert [list(column.cells) for column in made.columns][1] == ["90.0", "30.0", "40.0"]
    assert [list(column.cells) for column in made.columns][3] == ["-", "-", "-"]
    assert [list(column.cells) for column in made.columns][6] == ["10.0", "20.0", "15.0"]
    old = evaluations_table([{"epoch": 1, "ap": 0.5, "ap50": 0.6, "ap75": 0.4, "by_size": {"small": None}}])
    assert [str(column.header) for column in old.columns] == ["epoch", "AP", "AP50", "AP75", "AP small"]
    assert evaluations_table([]).row_count == 0
