"""The fast form of Strip-MLP's blocks against the blocks' own definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from crossdino.models.backbones import StripMLPBackbone, StripMLPClassifier, strip_mlp_inference
from crossdino.models.backbones.clap import WindowGrid

# Windows of 56, 28, 14, 7 positions at strides 4, 8, 16, 32: one map per batch below them all; several windows, the
# last one moved further back, in both directions; whole windows without overlap; one side below the strips' seven.
SIZES = [(1, 32, 64), (2, 256, 96), (1, 352, 480), (2, 224, 448), (1, 96, 736)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = StripMLPBackbone(40, (1, 1, 2, 1)).double().eval()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            if "running_var" in name:
                value.uniform_(0.5, 1.5)
            elif value.dim() == 1:  # norms, GRN and biases start where nothing would be seen
                value.add_(torch.randn_like(value) * 0.3)
    return model


@pytest.fixture
def both(monkeypatch):
    """Maps by the fast form, and by the plain one."""

    def run(model, images):
        with torch.no_grad():
            fast = model(images)
            with monkeypatch.context() as patch:
                patch.setattr(strip_mlp_inference, "suits", lambda *_: False)
                return fast, model(images)

    return run


def images_of(size, dtype=torch.float64):
    batch, height, width = size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("size", SIZES)
def test_maps_equal_the_plain_form(model, both, size):
    fast, plain = both(model, images_of(size))
    # float64 through five blocks: rounding only.
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("onednn", [True, False])
def test_float32_with_and_without_onednn(model, both, monkeypatch, onednn):
    if not onednn:
        monkeypatch.setattr(strip_mlp_inference, "_ONEDNN", None)
    size = (2, 160, 288)
    _, exact = both(model, images_of(size))
    fast, _ = both(model.float(), images_of(size, torch.float32))
    model.double()
    for own, expected in zip(fast, exact, strict=True):
        torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_bfloat16_is_as_precise_as_the_plain_form(model, both):
    size = (2, 288, 160)
    _, exact = both(model, images_of(size))
    with torch.autocast("cpu", torch.bfloat16):
        fast, plain = both(model.float(), images_of(size, torch.float32))
    model.double()
    for own, other, expected in zip(fast, plain, exact, strict=True):
        error, plain_error = ((maps.double() - expected).norm() / expected.norm() for maps in (own, other))
        # Each layer rounds to 8 bits, here as there; which way is chance.
        assert error < 1.2 * plain_error < 0.02


def test_new_weights_count_at_once(model, both):
    both(model, images_of(SIZES[0]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    fast, plain = both(model, images_of(SIZES[0]))
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(1.1)


def test_it_is_used_where_it_may_be_and_nowhere_else(model, monkeypatch):
    calls = []
    process = strip_mlp_inference.process
    monkeypatch.setattr(strip_mlp_inference, "process", lambda *given: calls.append(1) or process(*given))
    images = images_of((1, 64, 64), torch.float32)

    def blocks_processed(network, given=images):
        calls.clear()
        network(given)
        return len(calls)

    classifier = StripMLPClassifier(16, (1, 1, 1, 1), 3).eval()
    assert blocks_processed(classifier) == 0  # gradients are recorded
    with torch.no_grad():
        assert blocks_processed(classifier) == 4
        with torch.inference_mode():
            assert blocks_processed(classifier) == 4
        with torch.autocast("cpu", torch.bfloat16):
            assert blocks_processed(classifier) == 4
        with torch.autocast("cpu", torch.float16):
            assert blocks_processed(classifier) == 0
        with FlopCounterMode(display=False):
            assert blocks_processed(classifier) == 0
        first = classifier.backbone.stages[0][0]
        seen = []
        handle = first.channel_mixing.expand.register_forward_hook(lambda *_: seen.append(1))
        assert (blocks_processed(classifier), len(seen)) == (3, 1)  # a hook sees the call
        handle.remove()
        own = first.channel_mixing.expand
        first.channel_mixing.expand = nn.Sequential(own)  # what adapters and quantisation do
        assert blocks_processed(classifier) == 3
        first.channel_mixing.expand = own
        first.token_mixing.project_norm.train()
        assert blocks_processed(classifier) == 3
        assert blocks_processed(classifier.train()) == 0  # batch statistics, random paths
        assert blocks_processed(classifier.eval().to("meta"), images.to("meta")) == 0


def test_it_compiles_and_exports_as_the_plain_form(model, both):
    torch.manual_seed(0)
    small = StripMLPBackbone(16, (1, 1, 1, 1)).eval()
    images = images_of((1, 64, 96), torch.float32)
    fast, plain = both(small, images)
    with torch.no_grad():
        exported = torch.export.export(small, (images,)).module()(images)
    torch.testing.assert_close(exported, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size_hw", [(3, 20), (7, 8), (18, 21), (22, 5), (29, 13), (1, 1)])
def test_crop_into_and_blend_equal_crop_and_merge(size_hw):
    generator = torch.Generator().manual_seed(0)
    grid = WindowGrid(*size_hw, 7)
    x = torch.randn(2, *size_hw, 3, 2, generator=generator)  # two dimensions of channels
    added = torch.randn(7, 7, 3, 2, generator=generator)
    maps = x.flatten(3).permute(0, 3, 1, 2)
    out = torch.empty(2, *grid.layout, 3, 2, 7, 7).permute(0, 1, 2, 5, 6, 3, 4)
    cropped = grid.crop(maps).permute(0, 2, 3, 1).reshape(out.shape)
    assert torch.equal(grid.crop_into(out, x), cropped)
    assert torch.equal(grid.crop_into(out, x, added), cropped + added)
    windows = torch.randn(out.shape, generator=generator)
    merged = grid.merge(windows.flatten(0, 2).flatten(3).permute(0, 3, 1, 2))
    assert torch.equal(grid.blend(windows).flatten(3).permute(0, 3, 1, 2), merged)
