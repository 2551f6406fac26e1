"""The one training loop: losses, updates, evaluation, checkpoints, resume (training details in Section IV-B).

The loop is written out in `_train_epoch`; accelerate moves it to one or many devices (`accelerate launch` or
`torchrun`) and nothing else. Where we differ from DINO's own loop: everything random in a step follows from (seed,
epoch, image) or (seed, step, process), so that a resumed training is the uninterrupted one, also in the middle of an
epoch; the losses of an update are divided by the objects of all its images on all processes, once; a loss or gradient
that is not finite ends the training with the names of the images and a file that reproduces it.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from rich.console import Console
from torch import Tensor

from crossdino.config import Config, to_dict
from crossdino.data import DataError, DatasetIndex
from crossdino.data.dataset import build_loader
from crossdino.errors import InputError
from crossdino.interrupts import stop_requests
from crossdino.losses.criterion import Criterion
from crossdino.progress import (
    EpochDisplay,
    StepTimer,
    TrainingLog,
    drop_records_after,
    duration,
    evaluations_table,
    write_metrics_csv,
)
from crossdino.provenance import record_training
from crossdino.run_folder import (
    CSV_FILE,
    CURVES_FILE,
    LOG_FILE,
    PROBLEMS_FILE,
    check_output,
    has_checkpoint,
    load_last,
    prepare_output,
    save_best,
)
from crossdino.structures import Batch
from crossdino.tracking import Trackers, start_trackers
from crossdino.training.evaluation import evaluate, summary
from crossdino.training.failures import (
    TrainingInterrupted,
    deterministic,
    failure,
    lost_process,
)
from crossdino.training.run import Run, sum_over_processes
from crossdino.training.schedule import epoch_order, learning_rate_factor
from crossdino.training.setup import (
    announce,
    autocast,
    best_metric,
    build_model,
    check_settings,
    decide_tiles,
    load_data,
    make_datasets,
    prepare_state,
    seed_everything,
    with_classes,
    write_problems,
)
from crossdino.training.step import apply_gradients, clip_gradients
from crossdino.visualization import training_curves

_LOG_EVERY = 10
_DRAW_SECONDS = 60.0
# In fp16 an infinite gradient now and then is how the scale of the loss is found; so many in a row are a failure.
_MAX_SKIPPED_UPDATES = 25

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingResult:
    """What a training left behind.

    Attributes:
        output: the output folder.
        weights: the model folder to use, the best by `best_metric` (of the last epoch without a validation set).
        epochs, steps: epochs finished and updates made, those before a resume included.
        best_metric: name of the number that the best checkpoint is chosen by, None without a validation set.
        best_value: that number for `weights`, in [0, 1].
        best_ap: AP of `weights` on the validation set, in [0, 1].
        evaluations: the log's records of all evaluations.
    """

    output: Path
    weights: Path
    epochs: int
    steps: int
    best_metric: str | None
    best_value: float | None
    best_ap: float | None
    evaluations: list[dict[str, Any]]


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    init_weights: str | Path | None = None,
    recipe: str | None = None,
) -> TrainingResult:
    """Train a detector.

    Args:
        config: the complete configuration; the data's class names replace those of `config.model`.
        resume: continue the training in `config.training.output` after its last saved step.
        overwrite: delete the training that is in the output folder first.
        init_weights: a model folder or hub id to start from; classes of the same name and all queries that can be
            kept are kept, and it is printed what begins anew.
        recipe: name of the recipe that `config` was made from, for `provenance.json`; None: `config.name` may be one.

    Returns:
        Where the weights are and how good they became.

    Raises:
        InputError: for settings, data, weights or an output folder that cannot be used, when the loss or the gradient
            is not finite, and when another process of the training has ended.
        TrainingInterrupted: after Ctrl-C or SIGTERM; the state is saved, and `resume` continues with the next step.
    """
    accelerator = _accelerator()
    with deterministic(config.training.deterministic), stop_requests() as stop:
        try:
            return _train(config, accelerator, stop, resume, overwrite, init_weights, recipe)
        except RuntimeError as error:
            raise InputError(lost_process(error, accelerator, config.training.output)) from error


def _accelerator() -> Accelerator:
    """The device and the processes that the launcher made."""
    # accelerate must be told of a machine without an accelerator, or each process would take itself for the only one.
    # The others wait while the main process checks the images of a large data set.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=1))
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patience])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != world:
        raise InputError(
            f"the launcher made {world} processes (WORLD_SIZE), but accelerate knows {accelerator.num_processes}: "
            "start them by torchrun or accelerate launch"
        )
    return accelerator


def _train(
    config: Config,
    accelerator: Accelerator,
    stop: threading.Event,
    resume: bool,
    overwrite: bool,
    init_weights: str | Path | None,
    recipe: str | None,
) -> TrainingResult:
    settings = config.training
    output = Path(settings.output)
    check_settings(config)
    console = Console(quiet=not accelerator.is_main_process, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a file has no edge at which tables would have to be broken
    if accelerator.device.type == "cuda":
        # TensorFloat-32. On a CPU the same switch would compute in bfloat16, so it is left alone there.
        torch.set_float32_matmul_precision("high")

    # The main process checks the images; the others then find them checked.
    with accelerator.main_process_first():
        train_index, val_index = _load_data(config, console, accelerator.is_main_process)
    config = with_classes(config, train_index)
    check_output(output, config, resume, overwrite)
    config, line = decide_tiles(config, train_index, output if resume else None)
    if line:
        console.print(line, soft_wrap=True, markup=False)
    metric = None if val_index is None else best_metric(config, val_index)

    continues = resume and has_checkpoint(output)
    seed_everything(settings.seed)
    model = build_model(config, init_weights, continues, console, train_index)
    train_set, val_set = make_datasets(config, train_index, val_index, model)
    criterion = Criterion(config.loss)
    state = prepare_state(model, settings, accelerator)
    if accelerator.is_main_process:
        prepare_output(output, config, overwrite)
        record_training(output, recipe=recipe, resumed=continues)
    accelerator.wait_for_everyone()
    if continues:
        load_last(output, state)
        step = f", step {state.step}" if state.images_in_epoch else ""
        console.print(f"Resuming {output} after epoch {state.epoch} of {settings.epochs}{step}.", soft_wrap=True)
    elif resume:
        console.print(f"{output} has no checkpoint yet: starting from the beginning.", soft_wrap=True)
    if accelerator.is_main_process:
        drop_records_after(output / LOG_FILE, state.step)
        write_problems(output / PROBLEMS_FILE, train_index, val_index)
    announce(config, accelerator, console, model, train_set, val_set, metric)

    timer = StepTimer(accelerator.device)
    trackers = Trackers([])
    if accelerator.is_main_process:
        trackers = start_trackers(settings.trackers, output, config.name, to_dict(config), state.step)
    run = Run(config, accelerator, console, stop, train_set, val_set, criterion, state, timer, train_index, metric)
    run.started = time.monotonic() - state.seconds
    run.deadline = time.monotonic() + 60 * settings.max_minutes if settings.max_minutes else math.inf
    run.log = TrainingLog(
        output / LOG_FILE if accelerator.is_main_process else None,
        run.started,
        lambda losses: cast(Tensor, accelerator.reduce(losses, "mean")),
        timer,
        trackers,
    )
    try:
        reason = _train_all_epochs(run)
    finally:
        trackers.finish()

    if accelerator.is_main_process:
        if state.evaluations:
            console.print(evaluations_table(state.evaluations))
        console.print(
            f"{run.epochs_done:g} epochs, {state.step} updates in {duration(state.seconds)}{reason}\n"
            + (f"speed:   {run.log.speed()}\n" if run.log.speed() else "")
            + f"weights: {output / 'best'}\ncurves:  {output / CURVES_FILE}\n"
            f"to use them: crossdino predict --weights {output / 'best'} IMAGE --output DIR",
            soft_wrap=True,
        )
    accelerator.wait_for_everyone()
    best = next((record for record in reversed(state.evaluations) if record["best"]), None)
    return TrainingResult(
        output,
        output / "best",
        state.epoch,
        state.step,
        metric,
        state.best_value,
        None if best is None else best["ap"] or 0.0,
        state.evaluations,
    )


def _load_data(config: Config, console: Console, is_main: bool) -> tuple[DatasetIndex, DatasetIndex | None]:
    """The data; where files of it are at fault, all of them are listed in the output folder."""
    try:
        return load_data(config, console)
    except DataError as error:
        if not is_main:
            raise
        path = Path(config.training.output) / PROBLEMS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        error.problems.write_csv(path)
        raise InputError(f"{error} (all of them: {path})") from None


def _train_all_epochs(run: Run) -> str:
    """The loop over the epochs; returns why it ended early, or nothing."""
    settings, state = run.config.training, run.state
    output = Path(settings.output)
    while state.epoch < settings.epochs:
        out_of_time = _train_epoch(run)
        if time.monotonic() - run.saved > min(60.0, 60 * settings.save_minutes):
            run.save()  # an evaluation may take long
        if state.images_in_epoch >= len(run.train_set):
            state.epoch += 1
            state.images_in_epoch = 0
        evaluated = None
        impatient = False
        last_one = out_of_time or state.epoch == settings.epochs
        if run.val_set is not None and (last_one or state.epoch % settings.evaluate_every == 0):
            evaluated = evaluate(run)
            impatient = bool(settings.patience) and state.evaluations_without_gain >= settings.patience
        if run.accelerator.is_main_process:
            if run.val_set is None or (evaluated is not None and state.evaluations[-1]["best"]):
                metrics = {"epoch": run.epochs_done, **(summary(evaluated) if evaluated else {})}
                save_best(output, state, run.config, run.train_index, metrics, evaluated)
            # Drawing takes a second, which an epoch may not.
            if evaluated is not None or last_one or time.monotonic() - run.drawn > _DRAW_SECONDS:
                training_curves(output / LOG_FILE, output / CURVES_FILE)
                write_metrics_csv(output / LOG_FILE, output / CSV_FILE)
                run.drawn = time.monotonic()
        run.save()
        # Only the main process evaluates; the others must stop with it.
        if settings.patience and sum_over_processes([float(impatient)], run.accelerator)[0] > 0:
            return f" (stopped: {settings.patience} evaluations without a better {run.metric})"
        if out_of_time:
            return f" (stopped by training.max_minutes {settings.max_minutes:g})"
    return ""


def _train_epoch(run: Run) -> bool:
    """The rest of one pass over the training data; true when the time ran out."""
    settings, state, accelerator = run.config.training, run.state, run.accelerator
    log, timer, train_set = run.log, run.timer, run.train_set
    rank, world = accelerator.process_index, accelerator.num_processes
    train_set.set_epoch(state.epoch)
    order = epoch_order(len(train_set), settings.seed, state.epoch, rank, world, state.images_in_epoch)
    loader = build_loader(train_set, settings.batch_size, order=order)
    num_steps = math.ceil(len(loader) / settings.gradient_accumulation)
    # Of a whole epoch: the schedule must not depend on where the training was resumed.
    images_per_step = settings.batch_size * settings.gradient_accumulation
    steps_per_epoch = math.ceil(math.ceil(len(train_set) / world) / images_per_step)
    rate = 0.0
    state.model.train()
    with EpochDisplay(run.console, state.epoch, settings.epochs, num_steps, timer) as display:
        timer.start()
        for loaded in _grouped(loader, settings.gradient_accumulation):
            timer.lap("data")
            batches = [batch.to(accelerator.device) for batch in loaded]
            rate = learning_rate_factor(settings, state.epoch, state.step, steps_per_epoch) * settings.learning_rate
            for group in state.optimizer.param_groups:
                group["lr"] = rate / settings.learning_rate * group["initial_lr"] if settings.learning_rate else 0.0
            targets = [target for batch in batches for target in batch.targets]
            # One exchange a step for everything that the processes must agree on.
            num_boxes, num_images, stops, late = sum_over_processes(
                [
                    float(sum(len(target.labels) for target in targets)),
                    float(len(targets)),
                    float(run.stop.is_set()),
                    float(time.monotonic() > run.deadline),
                ],
                accelerator,
            )
            normaliser = max(num_boxes, 1.0) / world
            seed_everything(settings.seed, state.step, rank)
            totals: dict[str, Tensor] = {}
            summed: list[Tensor] = []
            for number, batch in enumerate(batches, start=1):
                # Gradients of several processes are averaged once, with the last micro-batch.
                waits = number < len(batches)
                with accelerator.no_sync(state.model) if waits else nullcontext():
                    with autocast(settings, accelerator.device):
                        predicted = state.model(batch.images, batch.padding_mask, batch.targets)
                    timer.lap("forward")
                    losses = run.criterion(predicted, batch.targets, normaliser)
                    timer.lap("loss")
                    state.scaler.scale(losses["loss"]).backward()
                    timer.lap("backward")
                summed.append(losses["loss"].detach())
                for name, value in losses.items():
                    totals[name] = totals[name] + value.detach() if name in totals else value.detach()
            log.add(totals, int(num_images))
            _update(run, batches, summed)
            state.step += 1
            state.images_in_epoch += images_per_step * world
            timer.lap("optimizer")
            timer.finish_step(int(num_images))
            display.advance(log, rate)
            finished = display.num_done == num_steps
            if state.step % _LOG_EVERY == 0 or late or stops or finished:
                log.write_training(state.step, state.epoch, rate)
            if late:
                return True
            if stops:
                run.save()
                raise TrainingInterrupted(f"saved after step {state.step}; --resume continues")
            if not finished and time.monotonic() - run.saved > 60 * settings.save_minutes:
                run.save()
            timer.start()
    return False


def _update(run: Run, batches: list[Batch], losses: list[Tensor]) -> None:
    """One step of the optimiser and of the average, unless the losses or gradients are not finite."""
    settings, state, accelerator = run.config.training, run.state, run.accelerator
    # All that must be known of the numbers on the device is read here, so that a step waits for it once.
    norm, *values = torch.stack([clip_gradients(state, settings), *losses]).tolist()
    bad_losses = [value for value in values if not math.isfinite(value)]
    finite = math.isfinite(norm)
    # The gradients are those of all processes by now, so all of them come here.
    elsewhere = not finite and sum_over_processes([float(len(bad_losses))], accelerator)[0] > 0
    if bad_losses:
        raise failure("loss", bad_losses[0], run, batches)
    if elsewhere:
        raise InputError(
            f"process {accelerator.process_index} of {accelerator.num_processes}: the loss of another process is not "
            f"finite at step {state.step + 1}; its own output says why"
        )
    state.skipped_updates = 0 if finite else state.skipped_updates + 1
    if not finite and (settings.precision != "fp16" or state.skipped_updates > _MAX_SKIPPED_UPDATES):
        raise failure("gradient", norm, run, batches)
    apply_gradients(state, finite)


def _grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
