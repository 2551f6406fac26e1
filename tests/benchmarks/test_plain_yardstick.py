"""The yardstick computes what the package computes: otherwise its time would say nothing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from benchmarks.plain_dino import Noise, PlainDINO, sample
from benchmarks.plain_strip_mlp import PlainStripMLP
from benchmarks.plain_training import PlainCriterion, draw_noise, hidden_pairs
from crossdino.config import LossConfig, ModelConfig
from crossdino.losses.criterion import Criterion
from crossdino.models.backbones import build_backbone
from crossdino.models.decoder import block_visibility
from crossdino.models.deformable_attention import deformable_attention
from crossdino.models.denoising import make_denoising_queries
from crossdino.models.detector import CrossDINO
from crossdino.structures import LayerOutput, Target

TINY = ModelConfig(
    backbone="resnet18",
    class_names=("a", "b", "c"),
    hidden_dim=32,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    feedforward_dim=48,
    num_queries=15,
    fusion_hidden_dim=40,
    padding="shared",
    num_denoising=10,
)
# Sums of different order in float32, through a few layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def _pair(config: ModelConfig) -> tuple[CrossDINO, PlainDINO]:
    torch.manual_seed(0)
    ours = CrossDINO(config)
    with torch.no_grad():
        # Zero at the start, which would hide mistakes: GRN, the boxes' corrections, the points' weights.
        for parameter in ours.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    plain = PlainDINO(config)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def _padded_image() -> tuple[Tensor, Tensor]:
    images = torch.randn(1, 3, 96, 128)
    padding = torch.zeros(1, 96, 128, dtype=torch.bool)
    padding[:, 80:] = True
    padding[:, :, 104:] = True
    return images.masked_fill(padding[:, None], 0.0), padding


def _targets(num_images: int, num_objects: int) -> list[Target]:
    return [
        Target(
            torch.rand(num_objects, 4) * 0.3 + torch.tensor([0.3, 0.3, 0.05, 0.05]),
            torch.randint(3, (num_objects,)),
            noise_seed=i,
        )
        for i in range(num_images)
    ]


@pytest.mark.parametrize("fusion", ["none", "cctm"])
def test_detections_are_ours(fusion: str) -> None:
    ours, plain = _pair(dataclasses.replace(TINY, fusion=fusion))  # type: ignore[arg-type]
    images, padding = _padded_image()
    for mask in (None, padding):
        with torch.no_grad():
            expected, found = ours.eval()(images, mask), plain.eval()(images, mask)
        torch.testing.assert_close(found.layers[-1].pred_logits, expected.pred_logits, **CLOSE)
        torch.testing.assert_close(found.layers[-1].pred_boxes, expected.pred_boxes, **CLOSE)


def test_training_step_is_ours() -> None:
    for classification in ("focal", "boost"):
        ours, plain = _pair(TINY)
        loss = LossConfig(classification=classification, beta=0.5)  # type: ignore[arg-type]
        images = torch.randn(2, 3, 64, 96)
        targets = _targets(2, 3)
        expected_output = ours.train()(images, None, targets)
        expected = Criterion(loss)(expected_output, targets)
        noisy = make_denoising_queries(targets, 3, TINY.num_denoising, TINY.label_noise_ratio, TINY.box_noise_scale)
        assert noisy is not None and expected_output.denoising is not None
        hidden = hidden_pairs(3, 6, TINY.num_queries)
        # Ours says who may look, the mask of all pairs who may not.
        visible = block_visibility(noisy.islands, TINY.num_queries)
        assert torch.equal(~visible[0, 0], hidden[:18]) and hidden[18:, :18].all() and not hidden[18:, 18:].any()
        noise = Noise(noisy.labels, noisy.anchors, hidden, num_groups=3)
        output = plain.train()(images, None, noise)
        for found, other in zip(output.layers, [*expected_output.aux_outputs, expected_output], strict=True):
            torch.testing.assert_close(found.pred_boxes, other.pred_boxes, **CLOSE)
        for found, other in zip(output.noisy_layers, expected_output.denoising.layers, strict=True):
            torch.testing.assert_close(found.pred_logits, other.pred_logits, **CLOSE)
            torch.testing.assert_close(found.pred_boxes, other.pred_boxes, **CLOSE)
        found = PlainCriterion(loss)(output, targets, noise)
        torch.testing.assert_close(found, expected["loss"], rtol=1e-4, atol=0.0)
        found.backward()
        expected["loss"].backward()
        own = dict(ours.named_parameters())
        for name, parameter in plain.named_parameters():
            assert parameter.requires_grad == own[name].requires_grad, name
            if parameter.grad is None:
                assert own[name].grad is None, name
                continue
            # A share of the parameter's largest gradient: the keys' bias has none but rounding.
            other = own[name].grad
            assert other is not None
            torch.testing.assert_close(parameter.grad, other, rtol=2e-3, atol=2e-3 * float(other.abs().max()) + 1e-6)


def test_strip_mlp_is_ours() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, backbone="strip_mlp_t_light")
    ours, plain = build_backbone(config).eval(), PlainStripMLP("strip_mlp_t_light").eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith(("gamma", "beta")):
                parameter.normal_()
        plain.load_state_dict(ours.state_dict())
        images = torch.randn(1, 3, 96, 256)  # 64 columns at stride 4 lie in two windows
        for found, expected in zip(plain(images), ours(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_deformable_attention_is_ours() -> None:
    torch.manual_seed(0)
    shapes = [(5, 7), (3, 4)]
    value = torch.randn(2, 47, 4, 8, requires_grad=True)
    locations = torch.rand(2, 6, 4, 2, 3, 2) * 1.4 - 0.2
    weights = torch.rand(2, 6, 4, 2, 3)
    found, expected = sample(value, shapes, locations, weights), deformable_attention(value, shapes, locations, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_noise_is_drawn_as_published() -> None:
    torch.manual_seed(0)
    targets = [*_targets(1, 4), *_targets(1, 1)]
    noise = draw_noise(targets, dataclasses.replace(TINY, num_denoising=2000, label_noise_ratio=0.5))
    assert noise.num_groups == 500 and noise.labels.shape == (2, 4000)
    boxes = noise.boxes[0].view(500, 2, 4, 4)
    truth = targets[0].boxes_cxcywh
    # A corner of a positive moves by less than half the side, one of a negative by more.
    shift = ((boxes[..., :2] - boxes[..., 2:] / 2) - (truth[:, :2] - truth[:, 2:] / 2)).abs() / (truth[:, 2:] / 2)
    assert shift[:, 0].max() <= 1.001
    changed = noise.labels[0].view(1000, 4) != targets[0].labels
    assert 0.14 < changed.float().mean() < 0.2  # a quarter is drawn anew, a third of which stays what it was


def test_matcher_finds_the_best_pairs() -> None:
    torch.manual_seed(0)
    targets = _targets(2, 4)
    layer = LayerOutput(torch.randn(2, 9, 3), torch.rand(2, 9, 4) * 0.5 + 0.1)
    from crossdino.losses.matcher import match_layers

    expected = match_layers([layer], targets, LossConfig())[0]
    pairs = PlainCriterion(LossConfig()).match(layer, targets)  # type: ignore[arg-type]
    assert torch.equal(torch.cat([rows for rows, _ in pairs]), expected.query)
