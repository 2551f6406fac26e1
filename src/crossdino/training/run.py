"""What the parts of a running training share."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor

from crossdino.config import Config
from crossdino.data.dataset import DetectionDataset
from crossdino.data.index import DatasetIndex
from crossdino.losses.criterion import Criterion
from crossdino.progress import StepTimer, TrainingLog
from crossdino.run_folder import TrainingState, save_last


@dataclass
class Run:
    """A training that is going on.

    Attributes:
        config: the resolved configuration.
        accelerator: device and processes.
        console: of the main process, quiet on the others.
        stop: set when the training is asked to stop (Ctrl-C, SIGTERM).
        train_set, val_set: the data; no validation set is None.
        criterion: the loss.
        state: everything that changes and is saved.
        timer: of the parts of a step.
        train_index: the training data without the pixels.
        metric: name of the number that the best checkpoint is chosen by.
        log: the log file and the trackers.
        started, deadline, saved, drawn: on the clock of `time.monotonic`, the (virtual) start of the whole training,
            when its time is over, when it was last saved, and when its curves were last drawn.
    """

    config: Config
    accelerator: Accelerator
    console: Console
    stop: threading.Event
    train_set: DetectionDataset
    val_set: DetectionDataset | None
    criterion: Criterion
    state: TrainingState
    timer: StepTimer
    train_index: DatasetIndex
    metric: str | None
    log: TrainingLog = dataclasses.field(init=False)
    started: float = 0.0
    deadline: float = math.inf
    saved: float = dataclasses.field(default_factory=time.monotonic)
    drawn: float = -math.inf

    @property
    def epochs_done(self) -> int | float:
        """Finished epochs, with the share of one that was broken off (`training.max_minutes`)."""
        state = self.state
        return (
            state.epoch + round(state.images_in_epoch / len(self.train_set), 2)
            if state.images_in_epoch
            else state.epoch
        )

    def save(self) -> None:
        """Write `last/`."""
        self.state.seconds = time.monotonic() - self.started
        if self.accelerator.is_main_process:
            save_last(Path(self.config.training.output), self.state, self.config, self.train_index)
        self.saved = time.monotonic()


def sum_over_processes(values: list[float], accelerator: Accelerator) -> list[float]:
    """Sums over all processes, in one exchange."""
    if accelerator.num_processes == 1:
        return values
    numbers = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
    return cast(Tensor, accelerator.reduce(numbers, "sum")).tolist()
