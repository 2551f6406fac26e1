"""Folded batch normalisation against the same network with its normalisations left alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import nn

from crossdino.config import ModelConfig
from crossdino.models.backbones import build_backbone
from crossdino.models.backbones.folding import fold_batch_norms, fold_norm, norm_as_affine


def with_random_statistics(body, seed=0):
    """Fresh networks normalise by mean 0 and variance 1 and start some scales at 0: nothing would be seen."""
    generator = torch.Generator().manual_seed(seed)
    for module in body.modules():
        if hasattr(module, "running_var"):
            for name, low in (("running_var", 0.5), ("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5)):
                tensor = getattr(module, name).data
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)
    return body


# Frozen; scale and bias that learn, padding as in TensorFlow, depthwise; norms in front of their convolutions.
@pytest.mark.parametrize(
    ("name", "freeze", "num_pairs", "num_norms"),
    [
        ("resnet18", True, 20, 20),
        ("tf_efficientnet_lite0", False, 48, 48),
        ("resnetv2_50", False, 32, 48),
        ("convnext_atto", False, 0, 0),
    ],
)
def test_maps_and_gradients_are_those_of_the_network_left_alone(name, freeze, num_pairs, num_norms):
    torch.manual_seed(0)
    plain = timm.create_model(name, features_only=True, drop_path_rate=0.0).double()
    plain = with_random_statistics(freeze_batch_norm_2d(plain) if freeze else plain).eval()
    folded = copy.deepcopy(plain)
    assert fold_batch_norms(folded) == num_pairs
    assert sum(hasattr(module, "running_var") for module in folded.modules()) == num_norms
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in folded.modules())

    images = torch.randn(2, 3, 39, 33, dtype=torch.float64)
    results = []
    for body in (plain, folded):
        own = images.clone().requires_grad_()
        maps = body(own)
        sum(feature.square().mean() for feature in maps).backward()
        results.append((maps, own.grad, {key: p.grad for key, p in body.named_parameters()}))
    # float64: the order of products only.
    torch.testing.assert_close(results[1], results[0], rtol=1e-7, atol=1e-9)


class Forks(nn.Module):
    """Convolutions whose output is needed beside the normalisation, and one pair that may be folded."""

    def __init__(self):
        super().__init__()
        self.read_twice, self.returned, self.shared, self.alone = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(5))

    def forward(self, x):
        read_twice = self.read_twice(x)
        x = self.norms[0](read_twice) * read_twice.sigmoid()
        returned = self.returned(x)
        x = self.norms[1](returned)
        x = self.norms[2](self.shared(x)) + self.norms[3](self.shared(x + 1))
        return [returned, self.norms[4](self.alone(x))]


def test_only_what_nothing_else_reads_is_folded():
    torch.manual_seed(0)
    plain = with_random_statistics(Forks()).eval()
    folded = copy.deepcopy(plain).train()
    assert fold_batch_norms(folded) == 1
    assert folded.training and folded.alone.pair == (folded, "alone", folded.norms, "4")
    images = torch.randn(1, 3, 9, 8)
    # float32: one sum of 27 products in another order.
    torch.testing.assert_close(folded.eval()(images), plain(images), rtol=1e-5, atol=1e-5)


def test_a_norm_in_training_normalises_by_its_batch():
    torch.manual_seed(0)
    plain = Forks().train()
    folded = copy.deepcopy(plain)
    fold_batch_norms(folded)
    images = torch.randn(4, 3, 9, 8)
    torch.testing.assert_close(folded(images), plain(images), rtol=0, atol=0)
    torch.testing.assert_close(folded.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_new_values_count_at_once_and_copies_are_independent():
    plain = with_random_statistics(timm.create_model("resnet18", features_only=True)).eval()
    folded = copy.deepcopy(plain)
    fold_batch_norms(folded)
    twin = copy.deepcopy(folded)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = folded(images)
        twin.load_state_dict(with_random_statistics(plain, seed=1).state_dict())
        for own, expected in zip(twin(images), plain(images), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)  # float32 through 20 layers
        assert all(torch.equal(a, b) for a, b in zip(folded(images), before, strict=True))


def test_where_one_half_of_a_pair_is_replaced_both_do_their_own_part():
    torch.manual_seed(0)
    plain = with_random_statistics(Forks()).eval()
    folded = copy.deepcopy(plain)
    fold_batch_norms(folded)
    images = torch.randn(1, 3, 9, 8)

    def replace(body, what):
        if what == "norms":  # as for training on several devices
            body = nn.SyncBatchNorm.convert_sync_batchnorm(body)
        elif what == "conv":
            body.alone = nn.Conv2d(3, 3, 1)
            nn.init.eye_(body.alone.weight[:, :, 0, 0])
        elif what == "wrapped":
            body.alone = nn.Sequential(body.alone)
        elif what == "pickled":
            body = pickle.loads(pickle.dumps(body))
        return body.eval()

    with torch.no_grad():
        for what in ("norms", "conv", "wrapped", "pickled"):
            torch.manual_seed(1)
            expected = replace(copy.deepcopy(plain), what)(images)
            torch.manual_seed(1)
            found = replace(copy.deepcopy(folded), what)(images)
            # float32: one sum of 27 products in another order.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=lambda text, what=what: what + text)


def test_half_precision_weights_are_folded_in_float32():
    conv, norm = nn.Conv2d(4, 64, 1), nn.BatchNorm2d(64).eval()
    generator = torch.Generator().manual_seed(0)
    norm.running_var.copy_(torch.rand(64, generator=generator) + 0.01)
    for module in (conv, norm):
        module.bfloat16()
    weight, bias = fold_norm(conv.weight, conv.bias, norm)
    assert weight.dtype == bias.dtype == torch.bfloat16
    exact, _ = fold_norm(conv.weight.double(), None, norm.double())
    # One rounding to 8 bits.
    torch.testing.assert_close(weight.double(), exact, rtol=2**-8, atol=0)


def test_a_norm_without_scale_and_bias():
    norm = nn.BatchNorm2d(2, affine=False).eval()
    norm.running_mean.copy_(torch.tensor([1.0, -2.0]))
    norm.running_var.copy_(torch.tensor([4.0, 0.25]))
    norm.eps = 0.0
    scale, shift = norm_as_affine(norm)
    assert (scale.tolist(), shift.tolist()) == ([0.5, 2.0], [-0.5, 4.0])


def test_autocast_keeps_the_maps_of_a_frozen_resnet_in_bfloat16():
    backbone = build_backbone(ModelConfig(backbone="resnet18")).eval()
    with_random_statistics(backbone)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = backbone(images)
        with torch.autocast("cpu", torch.bfloat16):
            maps = backbone(images)
    for feature, expected in zip(maps, exact, strict=True):
        assert feature.dtype == torch.bfloat16
        assert feature.is_contiguous(memory_format=torch.channels_last)
        # 8 bits of mantissa through 20 layers.
        assert (feature - expected).norm() < 0.02 * expected.norm()


def test_folded_pairs_export_and_compile():
    torch.manual_seed(0)
    body = with_random_statistics(Forks()).eval()
    images = torch.randn(1, 3, 9, 8)
    with torch.no_grad():
        expected = body(images)
        assert fold_batch_norms(body) == 1
        exported = torch.export.export(body, (images,)).module()(images)
        compiled = torch.compile(body, backend="eager", fullgraph=True)(images)
    # float32: one sum of 27 products in another order.
    torch.testing.assert_close(exported, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
