"""The optimiser's half of a step: the average of the weights, and moments that come from another memory layout."""

from __future__ import annotations

import copy
import dataclasses

import torch
from accelerate import Accelerator

from crossdino.config import Config
from crossdino.models.detector import CrossDINO
from crossdino.run_folder import TrainingState
from crossdino.training.schedule import WeightAverage
from crossdino.training.setup import prepare_state
from crossdino.training.step import apply_gradients, clip_gradients


def test_the_average_by_hand() -> None:
    torch.manual_seed(0)
    model = torch.nn.BatchNorm1d(3)
    average = WeightAverage(model, 0.3)
    assert not any(parameter.requires_grad for parameter in average.parameters())
    expected = None
    for count in range(6):
        with torch.no_grad():
            model.weight.copy_(torch.randn(3))
            model.running_mean.copy_(torch.randn(3))
        average.update_parameters(model)
        decay = min(0.3, (1 + count) / (10 + count))
        present = model.weight.detach().clone()
        expected = present if expected is None else decay * expected + (1 - decay) * present
        torch.testing.assert_close(average.module.weight, expected)
        assert torch.equal(average.module.running_mean, model.running_mean)
    assert set(average.state_dict()) == {"n_averaged", *(f"module.{name}" for name in model.state_dict())}


def make_state(config: Config, precision: str = "fp32") -> TrainingState:
    torch.manual_seed(0)
    rates = {"learning_rate": 1e-2, "backbone_learning_rate": 1e-2}
    settings = dataclasses.replace(config.training, ema_decay=0.0, precision=precision, **rates)  # type: ignore[arg-type]
    return prepare_state(CrossDINO(config.model), settings, Accelerator(cpu=True))


def make_step(state: TrainingState, config: Config, seed: int) -> None:
    torch.manual_seed(seed)
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = state.scaler.scale(torch.randn_like(parameter))
    clip_gradients(state, config.training)
    apply_gradients(state)


def test_a_training_from_a_gpu_goes_on_without_one(tiny_config: Config) -> None:
    """There the moments lie in memory as they are written; here, those of convolutions lie with channels last."""
    whole, resumed = make_state(tiny_config), make_state(tiny_config)
    make_step(whole, tiny_config, 1)
    stored = copy.deepcopy(whole.optimizer.state_dict())
    moved = 0
    for moments in stored["state"].values():
        for name, value in moments.items():
            moved += not value.is_contiguous()
            moments[name] = value.contiguous()
    assert moved  # else nothing is tested
    resumed.detector.load_state_dict(whole.detector.state_dict())
    resumed.optimizer.load_state_dict(stored)
    for seed in (2, 3):
        make_step(whole, tiny_config, seed)
        make_step(resumed, tiny_config, seed)
    for one, other in zip(whole.detector.parameters(), resumed.detector.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_training_that_began_with_the_plain_update_goes_on_in_fp16(tiny_config: Config) -> None:
    """A stored state says how it was updated, which says nothing about how it will be."""
    plain, resumed = make_state(tiny_config, "fp16"), make_state(tiny_config, "fp16")
    parameters = [group["params"] for group in plain.optimizer.param_groups]
    plain.optimizer = torch.optim.AdamW([{"params": group, "initial_lr": 1e-2} for group in parameters], lr=1e-2)
    make_step(plain, tiny_config, 1)
    resumed.detector.load_state_dict(plain.detector.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(plain.optimizer.state_dict()))
    resumed.scaler.load_state_dict(plain.scaler.state_dict())
    before = [parameter.detach().clone() for parameter in resumed.detector.parameters()]
    assert all(group["fused"] for group in resumed.optimizer.param_groups)
    for seed in (2, 3):
        make_step(plain, tiny_config, seed)
        make_step(resumed, tiny_config, seed)
    moved = 0
    for one, other, start in zip(plain.detector.parameters(), resumed.detector.parameters(), before, strict=True):
        torch.testing.assert_close(one, other)  # the same formula, rounded in another order
        moved += not torch.equal(other, start)
    assert moved
