"""A training's output folder and the state that is saved in it.

It holds `config.yaml` (resolved), `provenance.json` (which code trains), `log.jsonl`, `metrics.csv`, `curves.png`,
`problems.csv` (of the data), the trackers' files, `best/` (the best model folder) and `last/` (the latest model folder,
and what is needed to resume), and `failure.pt` after a loss that was not finite. Each of the two model folders is
replaced as a whole, so that a machine that dies leaves the older one.
"""

from __future__ import annotations

import pickle
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from crossdino.checkpoints import recover_folder, replaced_folder, save_model
from crossdino.config import Config, from_dict, read_yaml, to_dict, write_yaml
from crossdino.data.index import DatasetIndex
from crossdino.errors import InputError
from crossdino.evaluation.average_precision import AveragePrecisionResult
from crossdino.model_card import model_card, size_histogram
from crossdino.models.detector import CrossDINO
from crossdino.provenance import PROVENANCE_FILE
from crossdino.tracking import RUNS_FILE
from crossdino.writing import written_whole

CONFIG_FILE = "config.yaml"
LOG_FILE = "log.jsonl"
CSV_FILE = "metrics.csv"
CURVES_FILE = "curves.png"
PROBLEMS_FILE = "problems.csv"
FAILURE_FILE = "failure.pt"
TRAINER_FILE = "trainer.pt"
# What a training puts into its output folder, and so what --overwrite may delete.
_FILES = (CONFIG_FILE, LOG_FILE, CSV_FILE, CURVES_FILE, FAILURE_FILE, RUNS_FILE, PROVENANCE_FILE)
_FOLDERS = ("last", "best", ".last.old", ".best.old", ".last.partial", ".best.partial", "tensorboard", "wandb")


# The fields of the state that are plain values.
_COUNTERS = (
    "epoch",
    "step",
    "images_in_epoch",
    "seconds",
    "best_value",
    "evaluations_without_gain",
    "skipped_updates",
    "evaluations",
)


@dataclass
class TrainingState:
    """Everything that changes while training.

    Attributes:
        detector: the model that learns.
        model: the same as accelerate wraps it for several processes.
        ema: the average of its weights, or None.
        optimizer: AdamW.
        scaler: scales the loss of a training in fp16; does nothing otherwise.
        epoch, step: finished epochs and updates.
        images_in_epoch: images of the present epoch that all processes together have seen.
        seconds: spent in training and evaluation.
        best_value: the best value so far of the number that the best checkpoint is chosen by; None before the first.
        evaluations_without_gain: evaluations since then.
        skipped_updates: updates in a row that were left out because a gradient of fp16 was not finite.
        evaluations: the log's records of all evaluations.
    """

    detector: CrossDINO
    model: nn.Module
    ema: AveragedModel | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0
    step: int = 0
    images_in_epoch: int = 0
    seconds: float = 0.0
    best_value: float | None = None
    evaluations_without_gain: int = 0
    skipped_updates: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    @property
    def evaluated(self) -> CrossDINO:
        """The model that is evaluated and saved: the averaged one where there is an average."""
        return cast(CrossDINO, self.ema.module) if self.ema is not None else self.detector


def check_output(output: Path, config: Config, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that cannot be used; nothing is written.

    Raises:
        InputError: if it holds another training and neither `resume` nor `overwrite` is set, holds none to resume, or
            holds one of another model.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"training.output {output} is a file; name a folder")
    holds_run = any((output / name).exists() for name in (*_FILES, *_FOLDERS))
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other: continue the old training or delete it")
    if resume and not holds_run:
        raise InputError(f"{output} holds no training to resume; leave --resume out to start one")
    if holds_run and not resume and not overwrite:
        raise InputError(
            f"{output} already holds a training; choose another --output, continue it (--resume) or delete it "
            "(--overwrite)"
        )
    if resume and (output / CONFIG_FILE).is_file():
        before = to_dict(from_dict(read_yaml(output / CONFIG_FILE)).model)
        for name, value in to_dict(config.model).items():
            if before[name] != value:
                raise InputError(
                    f"cannot resume {output}: its model.{name} is {before[name]!r}, not {value!r}; give it the same "
                    "or start another training"
                )


def has_checkpoint(output: Path) -> bool:
    """Whether there is a state to continue from (perhaps one that a dying machine had moved aside)."""
    return any((output / name / TRAINER_FILE).is_file() for name in ("last", ".last.old"))


def prepare_output(output: Path, config: Config, overwrite: bool) -> None:
    """Make the folder, delete an older training if asked to, and write the resolved configuration."""
    if overwrite:
        for name in _FILES:
            (output / name).unlink(missing_ok=True)
        for name in _FOLDERS:
            shutil.rmtree(output / name, ignore_errors=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the output folder {output}: {error.strerror}") from None
    recover_folder(output / "last")
    recover_folder(output / "best")
    with written_whole(output / CONFIG_FILE) as partial:
        write_yaml(config, partial)


def save_best(
    output: Path,
    state: TrainingState,
    config: Config,
    train_index: DatasetIndex,
    metrics: dict[str, Any],
    evaluated: AveragePrecisionResult | None,
) -> None:
    """Replace `best/` by the present model.

    Args:
        output: the training's folder.
        state: for the model.
        config: the training's settings.
        train_index: the training data, for its category ids and for the sizes on the model card.
        metrics: a summary of the evaluation, for `config.json`.
        evaluated: the evaluation itself, for the model card; None without a validation set.
    """
    card = _card(state, config, train_index, evaluated)
    with replaced_folder(output / "best") as partial:
        save_model(state.evaluated, partial, metrics=metrics, category_ids=train_index.category_ids, card=card)
        write_yaml(config, partial / CONFIG_FILE)


def save_last(output: Path, state: TrainingState, config: Config, train_index: DatasetIndex) -> None:
    """Replace `last/` by the present model and everything that `load_last` needs.

    The state of the random number generators is not part of it: each step draws from (seed, step, process).
    """
    trainer = {
        **{name: getattr(state, name) for name in _COUNTERS},
        "model": state.detector.state_dict(),
        "ema": state.ema.state_dict() if state.ema is not None else None,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
    }
    card = _card(state, config, train_index, None)
    with replaced_folder(output / "last") as partial:
        save_model(state.evaluated, partial, category_ids=train_index.category_ids, card=card)
        write_yaml(config, partial / CONFIG_FILE)
        torch.save(trainer, partial / TRAINER_FILE)


def load_last(output: Path, state: TrainingState) -> None:
    """Bring `state` to where `save_last` found it.

    Raises:
        InputError: if the file is missing, broken or of another model.
    """
    path = output / "last" / TRAINER_FILE
    try:
        trainer = torch.load(path, map_location="cpu", weights_only=True)
        state.detector.load_state_dict(trainer["model"])
        state.optimizer.load_state_dict(trainer["optimizer"])
        state.scaler.load_state_dict(trainer["scaler"])
        if state.ema is not None:
            # Without an average so far, it starts with the weights that were just loaded.
            averaged = trainer["ema"] or {f"module.{name}": value for name, value in trainer["model"].items()}
            state.ema.load_state_dict(averaged, strict=trainer["ema"] is not None)
        for name in _COUNTERS:
            setattr(state, name, trainer[name])
    except (OSError, EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()
        raise InputError(f"cannot resume from {path} ({reason[0] if reason else error!r}); start anew") from None


def _card(
    state: TrainingState, config: Config, train_index: DatasetIndex, evaluated: AveragePrecisionResult | None
) -> str:
    settings = config.training
    facts = {
        "training images": len(train_index.records),
        "training objects": train_index.num_objects,
        "epochs": state.epoch,
        "updates": state.step,
        "images per update and process": settings.batch_size * settings.gradient_accumulation,
        "learning rate": f"{settings.learning_rate:g} (backbone {settings.backbone_learning_rate:g})",
        "classification loss": f"{config.loss.classification}, beta {config.loss.beta:g}"
        if config.loss.classification == "boost"
        else config.loss.classification,
        "training short sides (px)": ", ".join(map(str, config.data.train_short_sides)),
        "precision": settings.precision,
        "averaged weights": f"decay {settings.ema_decay:g}" if settings.ema_decay else "no",
        "seed": settings.seed,
    }
    if config.data.tile_px:
        facts["tiles (px)"] = f"{config.data.tile_size}, overlapping by {config.data.tile_overlap}"
    # File names only: where the files lie on this machine is nobody's business.
    data = f"Trained on {train_index.annotations.name}"
    if evaluated is not None and config.data.val_annotations is not None:
        data += f", measured on {Path(config.data.val_annotations).name}, by which the best epoch was chosen"
    return model_card(
        state.evaluated,
        name=config.name,
        metrics=evaluated.to_dict() if evaluated is not None else None,
        sizes=size_histogram(train_index, state.evaluated.inference),
        data=f"{data}.",
        training=facts,
    )
