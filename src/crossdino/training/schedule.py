"""Order of the images, learning rates, parameter groups and the average of the weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from crossdino.config import TrainingConfig
from crossdino.models.detector import CrossDINO


def epoch_order(num_images: int, seed: int, epoch: int, rank: int = 0, world: int = 1, num_done: int = 0) -> list[int]:
    """The images of one process in one epoch: a permutation drawn from (seed, epoch), dealt out to the processes.

    Every process gets equally many, so some images come twice where the number is no multiple of `world`. The first
    `num_done` images of the epoch, of all processes together, are left out.
    """
    order = np.random.default_rng((seed, epoch)).permutation(num_images)
    return np.resize(order, math.ceil(num_images / world) * world)[num_done:][rank::world].tolist()


def learning_rate_factor(settings: TrainingConfig, epoch: int, step: int, steps_per_epoch: int) -> float:
    """What the learning rates are multiplied by: linear warm-up over updates, then the schedule.

    Args:
        settings: for the warm-up and the schedule.
        epoch: finished epochs.
        step: finished updates.
        steps_per_epoch: updates of an epoch, what the length of the cosine is computed from.
    """
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.schedule == "step":
        return warmup * settings.drop_factor ** sum(epoch >= drop for drop in settings.drop_epochs)
    done = min(step / max(settings.epochs * steps_per_epoch - 1, 1), 1.0)
    return warmup * (settings.final_factor + (1 - settings.final_factor) * (1 + math.cos(math.pi * done)) / 2)


def parameter_groups(model: CrossDINO, settings: TrainingConfig) -> list[dict[str, Any]]:
    """AdamW's two groups: the backbone with its own learning rate, and everything else (DINO decays all of them)."""
    backbone = list(model.backbone_parameters())
    in_backbone = {id(parameter) for parameter in backbone}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in in_backbone]
    rates = ((rest, settings.learning_rate), (backbone, settings.backbone_learning_rate))
    return [{"params": list(group), "lr": rate, "initial_lr": rate} for group, rate in rates if group]


class WeightAverage(AveragedModel):
    """The exponential moving average of a model's weights; its buffers are the model's own.

    The decay rises as (1 + n) / (10 + n) to its value, so that a short training is not dominated by its first weights.

    Args:
        model: what is averaged; the average begins as its copy.
        decay: weight of the average against the present weights, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self.decay = decay
        self.requires_grad_(False)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the present weights in; all at once, and without asking the device how many updates there were."""
        count = int(self.n_averaged)  # counted on the host
        decay = min(self.decay, (1.0 + count) / (10.0 + count)) if count else 0.0
        get_ema_multi_avg_fn(decay)(list(self.module.parameters()), list(model.parameters()), count)
        for own, present in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(present)
        self.n_averaged += 1
