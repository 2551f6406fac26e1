"""The one training loop: losses, updates, evaluation, checkpoints, resume (training details in Section IV-B).

The loop is written out in `_train_epoch`; accelerate moves it to one or many devices (`accelerate launch` or
`torchrun`) and nothing else. Where we differ from DINO's own loop: everything random in an epoch follows from (seed,
epoch, process), so that a resumed training is the uninterrupted one; the losses are normalised by the objects of all
processes, once; a loss or gradient that is not finite ends the training with the names of the images.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import supervision as sv
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from crossdino.checkpoints import start_from
from crossdino.config import Config, InferenceConfig, TrainingConfig
from crossdino.data.dataset import DetectionDataset, build_loader
from crossdino.data.formats import DatasetIndex, load_coco
from crossdino.errors import InputError
from crossdino.evaluation.average_precision import AveragePrecisionResult, evaluate_detections
from crossdino.losses.criterion import Criterion
from crossdino.models.detector import CrossDINO
from crossdino.predictor import detections_to_coco, select_detections
from crossdino.progress import EpochDisplay, TrainingLog, drop_records_after, duration, evaluations_table
from crossdino.run_folder import (
    CURVES_FILES,
    LOG_FILE,
    TrainingState,
    check_output,
    has_checkpoint,
    load_last,
    prepare_output,
    save_best,
    save_last,
)
from crossdino.visualization import loss_curves, metric_curves

_LOG_EVERY = 10

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingResult:
    """What a training left behind.

    Attributes:
        output: the output folder.
        weights: the model folder to use, that of the best AP (of the last epoch without a validation set).
        epochs, steps: epochs begun and updates made, those before a resume included.
        best_ap: AP of `weights` on the validation set, in [0, 1]; None without one.
        evaluations: the log's records of all evaluations.
    """

    output: Path
    weights: Path
    epochs: int
    steps: int
    best_ap: float | None
    evaluations: list[dict[str, Any]]


def train(
    config: Config, *, resume: bool = False, overwrite: bool = False, init_weights: str | Path | None = None
) -> TrainingResult:
    """Train a detector.

    Args:
        config: the complete configuration; the data's class names replace those of `config.model`.
        resume: continue the training in `config.training.output` after its last saved epoch.
        overwrite: delete the training that is in the output folder first.
        init_weights: a model folder or hub id to start from; classes of the same name and all queries that can be
            kept are kept, and it is printed what begins anew.

    Returns:
        Where the weights are and how good they became.

    Raises:
        InputError: for settings, data, weights or an output folder that cannot be used, and when the loss or the
            gradient is not finite.
    """
    settings = config.training
    _check_settings(config)
    accelerator = Accelerator()
    console = Console(quiet=not accelerator.is_main_process, highlight=False)
    if accelerator.device.type == "cuda":
        # TensorFloat-32. On a CPU the same switch would compute in bfloat16, so it is left alone there.
        torch.set_float32_matmul_precision("high")

    train_index, val_index = _load_data(config)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, class_names=tuple(train_index.class_names))
    )
    for index in filter(None, (train_index, val_index)):
        for line in index.problems.lines():
            console.print(f"{index.annotations}: {line}", soft_wrap=True)
    output = Path(settings.output)
    check_output(output, config, resume, overwrite)

    continues = resume and has_checkpoint(output)
    _seed_everything(settings.seed)
    model = _build_model(config, init_weights, continues, console)
    train_set = DetectionDataset(train_index, config.data, model.mean, model.std, train=True, seed=settings.seed)
    val_set = None
    if val_index is not None:
        val_set = DetectionDataset(val_index, config.data, model.mean, model.std, train=False, seed=settings.seed)
    criterion = Criterion(config.loss)
    state = _prepare_state(model, settings, accelerator)
    if accelerator.is_main_process:
        prepare_output(output, config, overwrite)
    accelerator.wait_for_everyone()
    if continues:
        load_last(output, state)
        console.print(f"Resuming {output} after epoch {state.epoch} of {settings.epochs}.")
    elif resume:
        console.print(f"{output} has no finished epoch yet: starting from the beginning.")
    if accelerator.is_main_process:
        drop_records_after(output / LOG_FILE, state.epoch)

    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    console.print(
        f"{config.name}: {trainable / 1e6:.1f}M trainable parameters, {len(train_set)} training images, "
        f"{len(val_set) if val_set is not None else 0} validation images, {len(train_index.class_names)} classes, "
        f"{accelerator.num_processes} x {accelerator.device.type}, {settings.precision}"
    )

    started = time.monotonic() - state.seconds
    deadline = time.monotonic() + 60 * settings.max_minutes if settings.max_minutes else math.inf
    log = TrainingLog(
        output / LOG_FILE if accelerator.is_main_process else None,
        started,
        lambda losses: cast(Tensor, accelerator.reduce(losses, "mean")),
    )
    out_of_time = False
    while state.epoch < settings.epochs and not out_of_time:
        out_of_time = _train_epoch(state, train_set, criterion, config, accelerator, console, log, deadline)
        state.epoch += 1
        evaluated = None
        best_before = state.best_ap
        last_one = out_of_time or state.epoch == settings.epochs
        if val_set is not None and (last_one or state.epoch % settings.evaluate_every == 0):
            evaluated = _evaluate(state, val_set, config, accelerator, console, log)
        state.seconds = time.monotonic() - started
        if accelerator.is_main_process:
            if val_set is None or state.best_ap != best_before:
                metrics = {"epoch": state.epoch, **(_summary(evaluated) if evaluated else {})}
                save_best(output, state, config, train_index, metrics, evaluated)
            save_last(output, state, config, train_index)
        accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        loss_curves(output / LOG_FILE, output / CURVES_FILES[0])
        if state.evaluations:
            metric_curves(output / LOG_FILE, output / CURVES_FILES[1])
        if state.evaluations:
            console.print(evaluations_table(state.evaluations, state.best_ap))
        reason = f" (stopped by training.max_minutes {settings.max_minutes:g})" if out_of_time else ""
        console.print(
            f"{state.epoch} epochs, {state.step} updates in {duration(state.seconds)}{reason}\n"
            f"weights: {output / 'best'}\ncurves:  {output / 'curves_*.png'}\n"
            f"to use them: crossdino predict --weights {output / 'best'} IMAGE --output DIR",
            soft_wrap=True,
        )
    accelerator.wait_for_everyone()
    return TrainingResult(output, output / "best", state.epoch, state.step, state.best_ap, state.evaluations)


def _train_epoch(
    state: TrainingState,
    train_set: DetectionDataset,
    criterion: Criterion,
    config: Config,
    accelerator: Accelerator,
    console: Console,
    log: TrainingLog,
    deadline: float,
) -> bool:
    """One pass over the training data; true when the time ran out."""
    settings = config.training
    rank, world = accelerator.process_index, accelerator.num_processes
    _seed_everything(settings.seed, state.epoch, rank)
    train_set.set_epoch(state.epoch)
    order = epoch_order(len(train_set), settings.seed, state.epoch, rank, world)
    loader = build_loader(train_set, settings.batch_size, order=order)
    num_steps = math.ceil(len(loader) / settings.gradient_accumulation)
    rate = 0.0
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    state.model.train()
    with EpochDisplay(console, state.epoch, settings.epochs, num_steps) as display:
        for micro_batches in _grouped(loader, settings.gradient_accumulation):
            factor = learning_rate_factor(settings, state.epoch, state.step)
            rate = factor * settings.learning_rate
            for group in state.optimizer.param_groups:
                group["lr"] = factor * group["initial_lr"]
            image_ids: list[int] = []
            for number, batch in enumerate(micro_batches, start=1):
                batch = batch.to(accelerator.device)
                image_ids += [target.image_id for target in batch.targets]
                # Gradients of several processes are averaged once, with the last micro-batch.
                waits = number < len(micro_batches)
                with accelerator.no_sync(state.model) if waits else nullcontext():
                    with _autocast(settings, accelerator.device):
                        predicted = state.model(batch.images, batch.padding_mask, batch.targets)
                    losses = criterion(predicted, batch.targets, _normaliser(batch.targets, accelerator))
                    _check_finite("loss", losses["loss"], state, image_ids, settings)
                    accelerator.backward(losses["loss"] / len(micro_batches))
                log.add(losses, len(batch.targets) * world)
            norm = accelerator.clip_grad_norm_(parameters, settings.clip_norm or math.inf)
            _check_finite("gradient", norm, state, image_ids, settings)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            if state.ema is not None:
                state.ema.update_parameters(state.detector)
            state.step += 1
            display.advance(log, rate)
            if state.step % _LOG_EVERY == 0:
                log.write_training(state.step, state.epoch, rate)
            # The processes must agree, or one would wait for ever for the others' next step.
            if deadline < math.inf and _any_process(accelerator, time.monotonic() > deadline):
                log.write_training(state.step, state.epoch, rate)
                return True
        log.write_training(state.step, state.epoch, rate)
    return False


def detect_dataset(
    model: CrossDINO,
    dataset: DetectionDataset,
    *,
    num_select: int,
    batch_size: int = 1,
    num_workers: int = 0,
    indices: Iterable[int] | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Detections of a data set as COCO results, with the data set's own image and category ids.

    Always in float32, as `Predictor` computes: bfloat16 cost the compact model 1.5 AP.

    Args:
        model: the detector, on the device to compute on; it is put into eval mode.
        dataset: made with `train=False`.
        num_select: detections kept per image.
        batch_size: images per forward pass.
        num_workers: loader processes.
        indices: which images; None means all.
        on_batch: called with the number of images after each batch.

    Returns:
        One dict per detection: image_id, category_id, bbox (xywh in pixels of the original image), score.
    """
    model.eval()
    device = next(model.parameters()).device
    order = None if indices is None else list(indices)
    loader = build_loader(dataset, batch_size, order=order, num_workers=num_workers)
    results: list[dict[str, Any]] = []
    for batch in loader:
        batch = batch.to(device)
        with torch.no_grad():
            output = model(batch.images, batch.padding_mask)
        sizes = [target.original_hw for target in batch.targets]
        selected = select_detections(output, sizes, num_select)
        for target, (boxes, scores, labels) in zip(batch.targets, selected, strict=True):
            detections = sv.Detections(boxes.numpy(), confidence=scores.numpy(), class_id=labels.numpy())
            results += detections_to_coco(detections, target.image_id, dataset.index.category_ids)
        if on_batch is not None:
            on_batch(len(batch.targets))
    return results


def epoch_order(num_images: int, seed: int, epoch: int, rank: int = 0, world: int = 1) -> list[int]:
    """The images of one process in one epoch: a permutation drawn from (seed, epoch), dealt out to the processes.

    Every process gets equally many, so some images come twice where the number is no multiple of `world`.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_images)
    return np.resize(order, math.ceil(num_images / world) * world)[rank::world].tolist()


def learning_rate_factor(settings: TrainingConfig, epoch: int, step: int) -> float:
    """What the learning rates are multiplied by: linear warm-up over updates, then steps down after epochs.

    Args:
        settings: for `warmup_steps`, `drop_epochs` and `drop_factor`.
        epoch: finished epochs.
        step: finished updates.
    """
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    return warmup * settings.drop_factor ** sum(epoch >= drop for drop in settings.drop_epochs)


def parameter_groups(model: CrossDINO, settings: TrainingConfig) -> list[dict[str, Any]]:
    """AdamW's two groups: the backbone with its own learning rate, and everything else (DINO decays all of them)."""
    backbone = list(model.backbone_parameters())
    in_backbone = {id(parameter) for parameter in backbone}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in in_backbone]
    rates = ((rest, settings.learning_rate), (backbone, settings.backbone_learning_rate))
    return [{"params": list(group), "lr": rate, "initial_lr": rate} for group, rate in rates if group]


def averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """The update of the exponential moving average, for `AveragedModel`.

    The decay rises as (1 + n) / (10 + n) to its value, so that a short training is not dominated by its first weights.
    """

    @torch.no_grad()
    def update(averaged: Iterable[Tensor], current: Iterable[Tensor], num_averaged: Tensor | int) -> None:
        count = int(num_averaged)
        weight = 1.0 - min(decay, (1.0 + count) / (10.0 + count))
        for mean, value in zip(averaged, current, strict=True):
            mean.lerp_(value.to(mean.dtype), weight)

    return update


# --- set-up ---


def _check_settings(config: Config) -> None:
    settings = config.training
    if config.data.train_annotations is None:
        raise InputError("no training data: give data.train_annotations, a COCO JSON file")
    for name in ("epochs", "batch_size", "gradient_accumulation", "evaluate_every"):
        if getattr(settings, name) < 1:
            raise InputError(f"training.{name} is {getattr(settings, name)}, it must be at least 1")
    names = ("learning_rate", "backbone_learning_rate", "weight_decay", "clip_norm", "max_minutes", "warmup_steps")
    for name in names:
        if not (math.isfinite(getattr(settings, name)) and getattr(settings, name) >= 0):
            raise InputError(f"training.{name} is {getattr(settings, name)}, it must be 0 or more")
    if not 0 <= settings.ema_decay < 1:
        raise InputError(f"training.ema_decay is {settings.ema_decay}, it must be at least 0 and below 1")


def _load_data(config: Config) -> tuple[DatasetIndex, DatasetIndex | None]:
    data = config.data
    assert data.train_annotations is not None
    train_index = load_coco(data.train_annotations, data.train_images)
    if data.bad_boxes == "error":
        train_index.refuse_bad_boxes()
    if data.val_annotations is None:
        return train_index, None
    # The labels follow the training data's names, whatever ids the other file gives them.
    val_index = load_coco(data.val_annotations, data.val_images, class_names=train_index.class_names)
    if data.bad_boxes == "error":
        val_index.refuse_bad_boxes()
    # A file or bands that cannot be evaluated shall be found now, not after the first epoch.
    _average_precision(config, val_index, [])
    return train_index, val_index


def _build_model(config: Config, init_weights: str | Path | None, continues: bool, console: Console) -> CrossDINO:
    model_config = config.model
    if continues or init_weights is not None:  # the backbone's own weights would be replaced at once
        model_config = dataclasses.replace(model_config, backbone_weights=None)
    model = CrossDINO(model_config)
    model.config = config.model
    model.inference = InferenceConfig(
        config.data.test_short_side, config.data.test_long_side, config.evaluation.num_select
    )
    if init_weights is not None and not continues:
        for line in start_from(model, init_weights):
            console.print(f"{init_weights}: {line}", soft_wrap=True, markup=False)
    return model


def _prepare_state(model: CrossDINO, settings: TrainingConfig, accelerator: Accelerator) -> TrainingState:
    model.to(accelerator.device)
    if accelerator.device.type == "cpu":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # what CPU convolutions want
    ema = None
    if settings.ema_decay > 0:
        ema = AveragedModel(model, multi_avg_fn=averaging(settings.ema_decay))
        ema.requires_grad_(False)
    # The fused update is the fast one on a GPU, and several times slower than the plain one on a CPU.
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings),
        weight_decay=settings.weight_decay,
        fused=accelerator.device.type == "cuda",
    )
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    return TrainingState(model, wrapped, ema, optimizer)


def _seed_everything(*numbers: int) -> None:
    seed = int(np.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# --- parts of a step ---


def _grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _autocast(settings: TrainingConfig, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")


def _normaliser(targets: list[Any], accelerator: Accelerator) -> float:
    """Objects per process: the sum over all processes divided by their number, at least 1."""
    count = torch.tensor(float(sum(len(target.labels) for target in targets)), device=accelerator.device)
    total = float(accelerator.reduce(count, "sum"))  # type: ignore[arg-type]
    return max(total / accelerator.num_processes, 1.0)


def _check_finite(
    what: str, value: Tensor | float | None, state: TrainingState, image_ids: list[int], settings: TrainingConfig
) -> None:
    number = 0.0 if value is None else float(value.detach() if isinstance(value, Tensor) else value)
    if math.isfinite(number):
        return
    raise InputError(
        f"the {what} is {number} at step {state.step + 1} (epoch {state.epoch + 1}), images with ids "
        f"{', '.join(map(str, image_ids))}; nothing of this epoch was saved: check these images' boxes, lower "
        "training.learning_rate" + (" or set training.precision fp32" if settings.precision == "bf16" else "")
    )


def _any_process(accelerator: Accelerator, flag: bool) -> bool:
    if accelerator.num_processes == 1:
        return flag
    count = torch.tensor(float(flag), device=accelerator.device)
    return float(accelerator.reduce(count, "sum")) > 0  # type: ignore[arg-type]


# --- evaluation ---


def _evaluate(
    state: TrainingState,
    val_set: DetectionDataset,
    config: Config,
    accelerator: Accelerator,
    console: Console,
    log: TrainingLog,
) -> AveragePrecisionResult | None:
    """AP on the validation set; the result on the main process, `state.best_ap` raised where it is the best."""
    rank, world = accelerator.process_index, accelerator.num_processes
    with console.status(f"evaluating {len(val_set)} images"):
        detections = detect_dataset(
            state.evaluated,
            val_set,
            num_select=config.evaluation.num_select,
            batch_size=config.training.batch_size,
            num_workers=config.data.num_workers,
            indices=range(rank, len(val_set), world),  # every image on exactly one process
        )
    if world > 1:
        detections = gather_object(detections)
    if not accelerator.is_main_process:
        return None
    result = _average_precision(config, val_set.index, detections)
    console.print(result.table())
    ap = 0.0 if math.isnan(result.ap) else result.ap
    if state.best_ap is None or ap > state.best_ap:
        state.best_ap = ap
    state.evaluations.append(log.write_evaluation(state.step, state.epoch, _summary(result)))
    return result


def _average_precision(config: Config, index: DatasetIndex, detections: list[dict[str, Any]]) -> AveragePrecisionResult:
    # Not the file itself: what was mended in it at loading shall stay mended.
    return evaluate_detections(
        index.to_coco(),
        detections,
        max_detections=config.evaluation.max_detections,
        size_bands=config.evaluation.size_bands,
    )


def _summary(result: AveragePrecisionResult) -> dict[str, Any]:
    values = result.to_dict()
    return {
        **{name: values[name] for name in ("ap", "ap50", "ap75")},
        "by_size": {name: band["ap"] for name, band in values["by_size"].items()},
    }
