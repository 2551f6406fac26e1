"""What is done before the first step: settings, data, model, optimiser."""

from __future__ import annotations

import dataclasses
import math
import random
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console

from crossdino.checkpoints import start_from
from crossdino.config import Config, InferenceConfig, TrainingConfig, from_dict, read_yaml
from crossdino.data import DatasetIndex, Problems, find_splits, load_coco, load_dataset
from crossdino.data.dataset import DetectionDataset, build_loader
from crossdino.data.tile_choice import auto_tiles, with_tiles
from crossdino.errors import InputError
from crossdino.evaluation.average_precision import evaluate_detections
from crossdino.models.detector import CrossDINO
from crossdino.run_folder import CONFIG_FILE, TrainingState
from crossdino.tracking import check_trackers
from crossdino.training.schedule import WeightAverage, epoch_order, parameter_groups
from crossdino.visualization import draw_batch
from crossdino.writing import written_whole


def check_settings(config: Config) -> None:
    """Refuse settings with which no training can be made."""
    settings = config.training
    if config.data.train_annotations is None and config.data.source is None:
        raise InputError(
            "no training data: give data.source (--data), a folder or YAML file, or data.train_annotations, a COCO file"
        )
    for name in ("epochs", "batch_size", "gradient_accumulation", "evaluate_every"):
        if getattr(settings, name) < 1:
            raise InputError(f"training.{name} is {getattr(settings, name)}, it must be at least 1")
    names = ("learning_rate", "backbone_learning_rate", "weight_decay", "clip_norm", "max_minutes", "warmup_steps")
    for name in (*names, "save_minutes", "patience"):
        if not (math.isfinite(getattr(settings, name)) and getattr(settings, name) >= 0):
            raise InputError(f"training.{name} is {getattr(settings, name)}, it must be 0 or more")
    if not 0 <= settings.final_factor <= 1:
        raise InputError(f"training.final_factor is {settings.final_factor}, it must lie between 0 and 1")
    if not 0 <= settings.ema_decay < 1:
        raise InputError(f"training.ema_decay is {settings.ema_decay}, it must be at least 0 and below 1")
    check_trackers(settings.trackers)
    known = ("auto", "ap", "ap50", "ap75", *(f"ap {band}" for band in config.evaluation.size_bands))
    if settings.best_metric not in known:
        raise InputError(f"training.best_metric is {settings.best_metric!r}: choose one of {', '.join(known)}")
    loss = config.loss
    if not (math.isfinite(loss.beta) and loss.beta > 0):
        raise InputError(f"loss.beta is {loss.beta}, it must be above 0 (the paper uses 0.05 to 1)")
    for part in ("class", "l1", "giou"):
        for name in (f"{part}_weight", f"{part}_cost"):
            if not (math.isfinite(getattr(loss, name)) and getattr(loss, name) >= 0):
                raise InputError(f"loss.{name} is {getattr(loss, name)}, it must be 0 or more")
    for name in ("alpha", "ignore_overlap"):
        if not 0 < getattr(loss, name) <= 1:
            raise InputError(f"loss.{name} is {getattr(loss, name)}, it must be above 0 and at most 1")
    if not loss.gamma >= 0:
        raise InputError(f"loss.gamma is {loss.gamma}, it must be 0 or more")
    for name in ("num_select", "max_detections"):
        if getattr(config.evaluation, name) < 1:
            raise InputError(f"evaluation.{name} is {getattr(config.evaluation, name)}, it must be at least 1")
    data, model = config.data, config.model
    if data.test_long_side < data.test_short_side:
        raise InputError(
            f"data.test_long_side {data.test_long_side} is below data.test_short_side {data.test_short_side}: it is "
            "the limit of the longer side, give at least as much"
        )
    coarsest = model.first_stride * 2 ** (model.num_feature_levels - 1)
    smallest = min((*data.train_short_sides, data.test_short_side), default=coarsest)
    if smallest < coarsest:
        raise InputError(
            f"an input of {smallest} px has no token at the coarsest of model.num_feature_levels "
            f"{model.num_feature_levels} levels, whose stride is {coarsest} px: take fewer levels or larger inputs"
        )
    if not 0 < config.evaluation.merge_iou <= 1:
        raise InputError(f"evaluation.merge_iou is {config.evaluation.merge_iou}, it must be above 0 and at most 1")
    if config.evaluation.merge not in (modes := ("seam", "nms", "soft")):
        raise InputError(f"evaluation.merge is {config.evaluation.merge!r}: choose one of {', '.join(modes)}")


def load_data(config: Config, console: Console) -> tuple[DatasetIndex, DatasetIndex | None]:
    """The training and the validation set, checked; what was found is printed in a few lines."""
    data = config.data
    options: dict[str, Any] = {"ignore_categories": data.ignore_categories, "check": data.check}

    def load(split: str, annotations: str | None, images: str | None, class_names: Any) -> DatasetIndex:
        with console.status(f"checking the {split} data") as status:

            def show(done: int, total: int) -> None:
                status.update(f"checking the {split} data: image {done} of {total}")

            if annotations is not None:
                index = load_coco(annotations, images, class_names, on_progress=show, **options)
            else:
                assert data.source is not None
                index = load_dataset(data.source, split, class_names=class_names, on_progress=show, **options)
        for line in index.problems.lines():
            console.print(f"{index.annotations}: {line}", soft_wrap=True, markup=False)
        if data.bad_boxes == "error":
            index.refuse_bad_boxes()
        return index

    train_index = load("train", data.train_annotations, data.train_images, None)
    if data.val_annotations is None and (data.source is None or "val" not in find_splits(data.source)):
        return train_index, None
    # The labels follow the training data's names, whatever ids the other file gives them.
    val_index = load("val", data.val_annotations, data.val_images, train_index.class_names)
    # A file or bands that cannot be evaluated shall be found now, not after the first epoch.
    settings = config.evaluation
    evaluate_detections(val_index.to_coco(), [], max_detections=settings.max_detections, size_bands=settings.size_bands)
    return train_index, val_index


def with_classes(config: Config, train_index: DatasetIndex) -> Config:
    """The configuration with the class names of the data."""
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, class_names=tuple(train_index.class_names))
    )


def decide_tiles(config: Config, train_index: DatasetIndex, stored: Path | None = None) -> tuple[Config, str]:
    """The configuration with numbers for `data.tile_size: auto`, before anything else looks at them.

    Args:
        config: of the training.
        train_index: its training data.
        stored: the output folder of a training that is resumed: what was decided there stays.

    Returns:
        The configuration, and a line that tells the choice, empty where there was none to make.
    """
    if config.data.tile_size == "auto" and stored is not None and (stored / CONFIG_FILE).is_file():
        before = from_dict(read_yaml(stored / CONFIG_FILE)).data
        data = dataclasses.replace(config.data, tile_size=before.tile_size, tile_overlap=before.tile_overlap)
        size = f"tiles of {before.tile_size} px" if before.tile_size else "whole images"
        config, line = dataclasses.replace(config, data=data), f"data.tile_size auto: {size}, as before"
        if before.tile_size != "auto":
            return config, line
    return with_tiles(config, train_index)


def write_problems(path: Path, *indices: DatasetIndex | None) -> None:
    """Everything that was found in the data, with what was done about it."""
    found = Problems(problem for index in indices if index is not None for problem in index.problems)
    path.unlink(missing_ok=True)
    if found:
        found.write_csv(path)


def best_metric(config: Config, val_index: DatasetIndex) -> str:
    """The number that the best checkpoint is chosen by: AP of the smallest band with enough objects, unless named.

    Enough are 20 objects and 5 % of the validation set: with fewer the choice would follow chance.
    """
    if config.training.best_metric != "auto":
        return config.training.best_metric
    areas = np.concatenate([record.areas[~record.iscrowd] for record in val_index.records])
    enough = max(20.0, 0.05 * len(areas))
    for name, (lower, upper) in sorted(config.evaluation.size_bands.items(), key=lambda band: band[1][1]):
        if np.count_nonzero((areas >= lower**2) & (areas <= upper**2)) >= enough:
            return f"ap {name}"
    return "ap"


def make_datasets(
    config: Config, train_index: DatasetIndex, val_index: DatasetIndex | None, model: CrossDINO
) -> tuple[DetectionDataset, DetectionDataset | None]:
    """The training and the validation data, prepared for this model."""
    seed = config.training.seed
    train_set = DetectionDataset(train_index, config.data, model.mean, model.std, train=True, seed=seed)
    if val_index is None:
        return train_set, None
    return train_set, DetectionDataset(val_index, config.data, model.mean, model.std, train=False, seed=seed)


def announce(
    config: Config,
    accelerator: Accelerator,
    console: Console,
    model: CrossDINO,
    train_set: DetectionDataset,
    val_set: DetectionDataset | None,
    metric: str | None,
) -> None:
    """Tell what will be trained, and what cannot go well."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    tiles = f" ({len(train_set)} tiles an epoch)" if config.data.tile_px else ""
    console.print(
        f"{config.name}: {trainable / 1e6:.1f}M trainable parameters, {len(train_set.index.records)} training "
        f"images{tiles}, {len(val_set.index.records) if val_set is not None else 0} validation images, "
        f"{len(config.model.class_names)} classes, {accelerator.num_processes} x {accelerator.device.type}, "
        f"{config.training.precision}",
        soft_wrap=True,
    )
    if train_set.repeats is not None:
        console.print(_balance_line(config, train_set), soft_wrap=True, markup=False)
    if metric is not None:
        console.print(f"best checkpoint by: {metric.replace('ap', 'AP', 1)}")
    if val_set is None:
        console.print("warning: no validation data: nothing will be measured, and the last weights count as the best")
    if train_set.index.num_objects == 0:
        console.print(f"warning: {train_set.index.annotations} has no object: the detector can only learn background")
    most, queries = train_set.most_objects(), config.model.num_queries
    if most > queries:
        console.print(
            f"warning: up to {most} objects in {'a tile' if tiles else 'an image'}, but model.num_queries is "
            f"{queries}: the rest can never be found there; set --model.num_queries {math.ceil(1.2 * most / 100) * 100}"
            + ("" if tiles else " or cut tiles (--data.tile_size)"),
            soft_wrap=True,
        )
    too_large = _larger_than_tiles(config, train_set.index)
    if too_large:
        console.print(
            f"warning: {too_large} of {train_set.index.num_objects} objects are too large for tiles of "
            f"{config.data.tile_size} px: no tile shows data.tile_keep {config.data.tile_keep:g} of them, so they are "
            "ignored; larger tiles (--data.tile_size) would show them",
            soft_wrap=True,
        )


def _balance_line(config: Config, train_set: DetectionDataset) -> str:
    """How much `data.balance` adds, and to which class most."""
    repeats, what = train_set.repeats, "tiles with objects" if config.data.tile_px else "images"
    assert repeats is not None
    most = int(repeats.classes.argmax())
    if repeats.classes[most] == 1:
        return f"data.balance {config.data.balance:g}: every class is shown by enough {what}, none is taken twice"
    repeated = int((repeats.classes > 1).sum())
    return (
        f"data.balance {config.data.balance:g}: an epoch takes {repeats.length} {what} instead of "
        f"{len(repeats.factors)}; {repeated} of {len(repeats.classes)} classes come more than once, "
        f"{config.model.class_names[most]!r} most often ({repeats.classes[most]:.1f} times)"
    )


def _larger_than_tiles(config: Config, index: DatasetIndex) -> int:
    """Number of objects of which no tile can show enough."""
    size = config.data.tile_px
    if not size:
        return 0
    sides = [record.boxes_xywh[~record.iscrowd, 2:] for record in index.records]
    shares = [np.minimum(1, size / wh).prod(1) for wh in sides]
    return sum(int((share < config.data.tile_keep * (1 - 1e-6)).sum()) for share in shares)


def build_model(
    config: Config,
    init_weights: str | Path | None,
    continues: bool,
    console: Console,
    train_index: DatasetIndex | None = None,
) -> CrossDINO:
    """The model at its start, or at the given weights; it takes along how its images are to be looked at."""
    model_config = config.model
    if continues or init_weights is not None:  # the backbone's own weights would be replaced at once
        model_config = dataclasses.replace(model_config, backbone_weights=None)
    model = CrossDINO(model_config)
    model.config = config.model
    auto_tile_size, auto_tile_overlap = (0, 0) if train_index is None else auto_tiles(train_index, config.data)
    model.inference = InferenceConfig(
        short_side=config.data.test_short_side,
        long_side=config.data.test_long_side,
        num_select=config.evaluation.num_select,
        tile_size=config.data.tile_px,
        tile_overlap=config.data.tile_overlap,
        merge=config.evaluation.merge,
        merge_iou=config.evaluation.merge_iou,
        full_image=config.evaluation.full_image,
        auto_tile_size=auto_tile_size,
        auto_tile_overlap=auto_tile_overlap,
    )
    model.checkpoint_activations = config.training.activation_checkpointing
    if init_weights is not None and not continues:
        for line in start_from(model, init_weights):
            console.print(f"{init_weights}: {line}", soft_wrap=True, markup=False)
    return model


def prepare_state(model: CrossDINO, settings: TrainingConfig, accelerator: Accelerator) -> TrainingState:
    """Model, average, optimiser and scaler, on their device."""
    model.to(accelerator.device)
    if accelerator.device.type == "cpu":
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # what CPU convolutions want
    ema = WeightAverage(model, settings.ema_decay) if settings.ema_decay > 0 else None
    # One pass over the weights: on two cores 0.4 of the plain update's time for 47M parameters, 0.2 for 0.6M.
    fused = accelerator.device.type in ("cpu", "cuda")
    optimizer = torch.optim.AdamW(parameter_groups(model, settings), weight_decay=settings.weight_decay, fused=fused)
    optimizer.register_load_state_dict_post_hook(_adopt)
    if settings.compile:
        model.compile(dynamic=True)
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=settings.precision == "fp16")
    return TrainingState(model, accelerator.prepare(model), ema, optimizer, scaler)


def _adopt(optimizer: torch.optim.Optimizer) -> None:
    """Make loaded moments fit for the update of this optimiser, wherever the training began.

    What is loaded says whether the update is fused, too; but this optimiser has told the scaler of fp16 what it can do,
    and another update would stop there. And the fused update goes through memory, not through indices: on a CPU nothing
    says when moments and weights lie differently, as they do when a training that began on a GPU goes on without one.
    """
    fused = optimizer.defaults["fused"]
    for group in optimizer.param_groups:
        group["fused"] = fused
    for weight, moments in optimizer.state.items():
        for name, value in moments.items():
            if name == "step":
                moments[name] = value.to(weight.device if fused else "cpu")
            elif value.shape == weight.shape:
                moments[name] = torch.empty_like(weight).copy_(value)


def seed_everything(*numbers: int) -> None:
    """Seed every global generator from some whole numbers."""
    seed = int(np.random.SeedSequence([number % 2**32 for number in numbers]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def autocast(settings: TrainingConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The precision of the forward pass."""
    dtype = torch.float16 if settings.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=settings.precision != "fp32")


def show_batch(config: Config, count: int = 1) -> Path:
    """Draw the first batches of a training as the network gets them, after all augmentation.

    Args:
        config: as for `train`.
        count: number of batches.

    Returns:
        The picture, `batch.jpg` in the output folder.

    Raises:
        InputError: as `train`.
    """
    if count < 1:
        raise InputError(f"the number of batches to show is {count}: give 1 or more")
    check_settings(config)
    train_index, _ = load_data(config, Console(quiet=True))
    config, _ = decide_tiles(with_classes(config, train_index), train_index)
    model = CrossDINO(dataclasses.replace(config.model, backbone_weights=None))
    train_set, _ = make_datasets(config, train_index, None, model)
    size = config.training.batch_size
    order = epoch_order(len(train_set), config.training.seed, 0)[: count * size]
    batches = list(build_loader(train_set, size, order=order))
    path = Path(config.training.output) / "batch.jpg"
    if path.parent.exists() and not path.parent.is_dir():
        raise InputError(f"training.output {path.parent} is a file; name a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [image for batch in batches for image in batch.images]
    masks = [mask for batch in batches for mask in batch.padding_mask]
    targets = [target for batch in batches for target in batch.targets]
    picture = draw_batch(
        images, masks, targets, config.model.class_names, model.mean, model.std, max_images=len(images)
    )
    with written_whole(path) as partial:
        picture.save(partial, format="JPEG", quality=92)
    return path
