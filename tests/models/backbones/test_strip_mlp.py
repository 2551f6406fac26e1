"""Strip-MLP against a plain-loop reference on official names, the published sizes, and official files."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crossdino.errors import InputError
from crossdino.models.backbones import StripMLPBackbone, StripMLPClassifier
from tests.reference.strip_mlp_plain import official_state, strip_mlp_maps

# Width 40 gives stages of 40, 80, 160, 320 channels: both rules for the number of groups.
EMBED_DIM, DEPTHS, NUM_CLASSES = 40, (1, 1, 2, 1), 5


@pytest.fixture(scope="module")
def state():
    double = official_state(EMBED_DIM, DEPTHS, NUM_CLASSES, seed=0)
    return {key: value.float() if value.is_floating_point() else value for key, value in double.items()}


@pytest.fixture
def file(state, tmp_path):
    path = tmp_path / "strip_mlp.pth"
    torch.save({"model": state, "epoch": 3}, path)
    return path


# 224: the published network. 256 x 96: more and less than the windows in each stage. Both in one batch of two.
@pytest.mark.parametrize("size_hw", [(224, 224), (256, 96)])
def test_maps_equal_the_plain_reference(file, state, size_hw):
    images = torch.randn(2, 3, *size_hw, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = StripMLPBackbone.from_official(file).double().eval()
    with torch.no_grad():
        maps = model(images)
    expected = strip_mlp_maps(images, {key: value.double() for key, value in state.items()})
    for stride, channels, own, plain in zip(model.strides, model.channels, maps, expected, strict=True):
        assert own.shape == (2, channels, size_hw[0] // stride, size_hw[1] // stride)
        # float64 through five blocks: rounding only.
        torch.testing.assert_close(own, plain, rtol=1e-9, atol=1e-9)


def test_classifier_is_the_linear_head_on_the_mean_of_the_last_map(file, state):
    model = StripMLPClassifier.from_official(file).eval()
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        last = model.backbone(images)[-1]
        logits = model(images)
    mean = torch.stack([last[:, :, i, j] for i in range(2) for j in range(3)]).mean(0)
    expected = mean @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)  # float32 sums over 320 channels


def test_pixels_beyond_a_multiple_of_32_are_lost(file):
    model = StripMLPBackbone.from_official(file).eval()
    images = torch.randn(1, 3, 95, 70, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        shapes = [tuple(feature.shape[2:]) for feature in model(images)]
    assert shapes == [(11, 8), (5, 4), (2, 2)]


@pytest.mark.parametrize(
    ("variant", "millions", "gmacs"), [("t_light", 18, 2.5), ("t", 24.90, 3.65), ("s", 43, 6.8), ("b", 57, 9.2)]
)
def test_published_parameters_and_operations(variant, millions, gmacs):
    with torch.device("meta"):
        model = StripMLPClassifier.from_variant(variant).eval()
        images = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(images)
    # The publication rounds to two digits; of variant t the measured numbers are known to three.
    exact = variant == "t"
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005 if exact else 0.5)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=0.005 if exact else 0.05)


def test_detection_features_of_variant_t():
    with torch.device("meta"):
        model = StripMLPBackbone.from_variant("t").eval()
        images = torch.empty(1, 3, 800, 1333)
    with FlopCounterMode(display=False) as counter:
        model(images)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(24.26, abs=0.005)
    assert counter.get_total_flops() / 2e9 == pytest.approx(78.0, abs=0.05)


def test_new_networks_start_with_grn_as_identity_and_learn_everywhere():
    torch.manual_seed(0)
    model = StripMLPBackbone(16, (1, 1, 1, 1))
    for name, parameter in model.named_parameters():
        if "response_norm" in name:
            assert not parameter.any()
    sum(feature.square().mean() for feature in model(torch.randn(2, 3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_unknown_variant():
    with pytest.raises(InputError, match="t_light, t, s, b"):
        StripMLPBackbone.from_variant("xl")


# ---- official files ----


def test_the_other_spelling_gives_the_same_network(file, state, tmp_path):
    other = tmp_path / "proh.pth"
    torch.save({"model": {key.replace("proj_w", "proh_w"): value for key, value in state.items()}}, other)
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        first = StripMLPClassifier.from_official(file).eval()(images)
        second = StripMLPClassifier.from_official(other).eval()(images)
    assert torch.equal(first, second)


def test_every_official_value_arrives(file, state):
    model = StripMLPClassifier.from_official(file)
    own = sorted(float(value.double().sum()) for value in model.state_dict().values())
    assert own == sorted(float(value.double().sum()) for value in state.values())
    assert model.backbone.depths == DEPTHS
    assert model.head.out_features == NUM_CLASSES


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


def with_entry(key, value):
    return lambda state: {**state, key: value}


PROJ = "blocks1.0.token_mixing.smlp_block.proj_w.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("blocks3.1.channel_mixing.grn.gamma"),
            "missing: backbone.stages.2.1.channel_mixing.response_norm.gamma",
        ),
        (without("head.weight"), "head is missing"),
        (with_entry("layer4.0.conv1.weight", torch.zeros(1)), "unexpected: layer4.0.conv1.weight"),
        (with_entry("blocks1.0.token_mixing.gate.weight", torch.zeros(1)), "unexpected: blocks1.0.token_mixing.gate"),
        (with_entry(PROJ.replace("proj", "proh"), torch.zeros(1)), "unexpected: .*proh_w"),
        (with_entry("norm.weight", torch.zeros(7)), r"norm.weight has shape \(7,\), not \(320,\)"),
        (with_entry("patch_embed.weight", torch.zeros(20, 3, 4, 4)), "20 channels"),
        (with_entry("norm.weight", "a string"), "no weights under the key 'model'"),
        (lambda state: {"conv1.weight": torch.zeros(64, 3, 7, 7)}, "patch embedding or the head is missing"),
    ],
)
def test_files_of_other_networks_are_refused(state, tmp_path, change, message):
    path = tmp_path / "other.pth"
    torch.save({"model": change(state)}, path)
    with pytest.raises(InputError, match=message) as caught:
        StripMLPClassifier.from_official(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_code_in_a_file_is_not_run(tmp_path):
    path, marker = tmp_path / "code.pth", tmp_path / "ran"
    torch.save({"model": Malicious(str(marker))}, path)
    with pytest.raises(InputError, match="not run"):
        StripMLPBackbone.from_official(path)
    with open(path, "wb") as plain:
        pickle.dump({"model": Malicious(str(marker))}, plain)
    with pytest.raises(InputError, match="not run"):
        StripMLPBackbone.from_official(path)
    assert not marker.exists()


def test_damaged_and_missing_files(file, tmp_path):
    content = file.read_bytes()
    for kept in (0, 10, len(content) // 2, len(content) - 100):
        path = tmp_path / "cut.pth"
        path.write_bytes(content[:kept])
        with pytest.raises(InputError, match="cut.pth"):
            StripMLPBackbone.from_official(path)
    with pytest.raises(InputError, match="does not exist"):
        StripMLPBackbone.from_official(tmp_path / "nowhere.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="no weights under the key 'model'"):
        StripMLPBackbone.from_official(tmp_path / "list.pth")
