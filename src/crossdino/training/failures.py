"""What can go wrong in a training: requests to stop, lost processes, numbers that are not finite."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from crossdino.config import from_dict, to_dict
from crossdino.errors import InputError
from crossdino.losses.criterion import Criterion
from crossdino.models.detector import CrossDINO
from crossdino.run_folder import FAILURE_FILE
from crossdino.structures import Batch, Target
from crossdino.training.run import Run
from crossdino.training.setup import autocast, seed_everything
from crossdino.writing import written_whole


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after the state of the training was saved."""


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Deterministic algorithms only; an operation that has none raises an error with its name."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def lost_process(error: RuntimeError, accelerator: Accelerator, output: str) -> str:
    """A clear line for the errors by which torch tells that a process has gone; any other error is raised again."""
    text = " ".join(str(error).split())
    if "DataLoader worker" in text:
        return (
            f"a process that loads images has ended ({text[:200]}); often the memory was full: lower data.num_workers. "
            f"Continue with --resume and --output {output}"
        )
    signs = ("closed by peer", "reset by peer", "Broken pipe", "gloo", "NCCL", "Socket", "TCPStore", "timed out")
    if accelerator.num_processes > 1 and any(sign in text for sign in signs):
        return (
            f"process {accelerator.process_index} of {accelerator.num_processes}: another process of this training has "
            f"ended ({text[:200]}); its own output says why. Continue with --resume and --output {output}"
        )
    raise error


def failure(what: str, value: float, run: Run, batches: list[Batch]) -> InputError:
    """The error for a loss or gradient that is not finite; a file that reproduces it is written."""
    state, settings = run.state, run.config.training
    names = {record.image_id: record.path for record in run.train_index.records}
    ids = dict.fromkeys(target.image_id for batch in batches for target in batch.targets)
    rank = run.accelerator.process_index
    path = Path(settings.output) / (FAILURE_FILE if rank == 0 else f"{rank}-{FAILURE_FILE}")
    content = {
        "what": what,
        "config": to_dict(run.config),
        "step": state.step,
        "epoch": state.epoch,
        "rank": rank,
        "scale": state.scaler.get_scale(),
        "images": {image_id: str(names[image_id]) for image_id in ids},
        "model": state.detector.state_dict(),
        "batches": [
            {**vars(batch), "targets": [vars(target) for target in batch.targets]}
            for batch in (batch.to("cpu") for batch in batches)
        ],
    }
    with written_whole(path) as partial:
        torch.save(content, partial)
    slower = "" if settings.precision == "fp32" else " or set training.precision fp32"
    return InputError(
        f"the {what} is {value} at step {state.step + 1} (epoch {state.epoch + 1}); its images: "
        + ", ".join(f"{names[image_id].name} (id {image_id})" for image_id in ids)
        + f"; {path} holds the batch and the weights (crossdino.training.replay_failure computes it again), last/ the "
        f"state before: check these images' boxes, lower training.learning_rate{slower}"
    )


def replay_failure(path: str | Path) -> dict[str, float]:
    """Compute the losses of a step that failed again, from the file that the training left.

    Args:
        path: `failure.pt` of an output folder.

    Returns:
        The losses by name, and `gradient`, the norm of the gradient (of the unscaled loss).

    Raises:
        InputError: the file cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"cannot read {path} ({str(error).splitlines()[0]}): give a training's failure.pt") from None
    config = from_dict(content["config"])
    model = CrossDINO(dataclasses.replace(config.model, backbone_weights=None))
    model.load_state_dict(content["model"])
    model.train()
    criterion = Criterion(config.loss)
    batches = [
        Batch(**{**stored, "targets": [Target(**target) for target in stored["targets"]]})
        for stored in content["batches"]
    ]
    num_boxes = sum(len(target.labels) for batch in batches for target in batch.targets)
    seed_everything(config.training.seed, content["step"], content["rank"])
    totals: dict[str, float] = {}
    for batch in batches:
        with autocast(config.training, torch.device("cpu")):
            predicted = model(batch.images, batch.padding_mask, batch.targets)
        losses = criterion(predicted, batch.targets, max(num_boxes, 1.0))
        losses["loss"].backward()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + float(value.detach())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {**totals, "gradient": float(torch.nn.utils.get_total_norm(gradients))}
