"""The optimiser's half of a training step, the same for a training and for the trial steps of the planner."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from crossdino.config import TrainingConfig
from crossdino.run_folder import TrainingState


def clip_gradients(state: TrainingState, settings: TrainingConfig) -> Tensor:
    """Undo the scale of the loss and clip the gradients; returns their norm before, a scalar."""
    state.scaler.unscale_(state.optimizer)
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    return torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm or math.inf)


def apply_gradients(state: TrainingState, finite: bool = True) -> None:
    """One step of the optimiser and of the average.

    Args:
        state: with gradients from `clip_gradients`; they are gone afterwards.
        finite: false where their norm was not finite, as happens in fp16 while the scale of the loss is found: then
            the scale becomes smaller and nothing else changes.
    """
    state.scaler.step(state.optimizer)  # which leaves out an update that is not finite
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None and finite:
        state.ema.update_parameters(state.detector)
