"""Checkpoints of the official DINO (IDEA-Research/DINO) in: the same numbers out, or a Cross-DINO that starts there.

The architecture is read from the tensors, and every key of the file is accounted for: it is used, it repeats a used
one (the heads that the decoder's layers share), it is a buffer that can be computed, or the file is refused. Where the
file has the training's arguments, what tensors cannot show (activation, temperatures, order of sublayers) is compared
with what our model does.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossdino.adaptation import change_classes, change_num_queries
from crossdino.benchmarks import COCO_91_SLOTS
from crossdino.checkpoints import save_model, unfitting_keys
from crossdino.config import Fusion, FusionInit, InferenceConfig, ModelConfig, Padding
from crossdino.errors import InputError
from crossdino.model_card import model_card
from crossdino.models.cctm import CrossCodingTwice
from crossdino.models.detector import CrossDINO


@dataclass
class ConversionReport:
    """What became of a checkpoint.

    Attributes:
        used: the file's keys that went into the model.
        new: the model's keys that the file has nothing for (the fusion between encoder and decoder).
        reinitialised: lines saying which learnt parts were changed on request or begin anew.
        left: the file's entries that were not needed, each with the reason.
    """

    used: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for the reader, a few lines."""
        lines = [f"used: {len(self.used)} tensors of the checkpoint"]
        if self.new:
            lines.append(f"new: {len(self.new)} tensors ({self.new[0]} ... {self.new[-1]})")
        lines += [f"changed: {line}" for line in self.reinitialised]
        lines += [f"left: {line}" for line in self.left]
        return lines


def load_dino(
    path: str | Path,
    *,
    fusion: Fusion = "none",
    fusion_init: FusionInit = "identity",
    fusion_hidden_dim: int = 512,
    padding: Padding = "shared",
    class_names: Sequence[str] | None = None,
    class_map: Mapping[str, str] | None = None,
    num_queries: int | None = None,
    ema: bool = False,
) -> tuple[CrossDINO, ConversionReport]:
    """Build the detector that an official DINO checkpoint holds.

    With `fusion="none"` and `padding="shared"` it computes what the official model computes. With another fusion and
    `fusion_init="identity"` it begins close to that and can become a Cross-DINO. The twice gating of Eq. 3 can hand on
    the encoder's output only doubled, `E_cf = 2 E`; the layers that read E_cf (`enc_output` and the decoder's
    `value_proj`) are halved to make up for it, which loses no digit.

    Args:
        path: a published file, or one of the official training code: a dict with the weights under `model`, or the
            weights alone; 4 or 5 scales, on ResNet-50, ResNet-101 or a Swin Transformer.
        fusion: what to put between encoder and decoder; see `ModelConfig`.
        fusion_init: see `ModelConfig`.
        fusion_hidden_dim: see `ModelConfig`.
        padding: see `ModelConfig`; `isolated` differs from the official numbers on padded batches.
        class_names: the classes that are wanted. None keeps those of the file: COCO's 91 slots, or `class 0`, ... for
            another number, since the file holds no names. As many names as the file has classes, where that are
            not 91, are taken as the names of the file's classes; other names are handled by `change_classes`.
        class_map: see `change_classes`.
        num_queries: see `change_num_queries`; None keeps the file's.
        ema: take the averaged weights under `ema_model`.

    Returns:
        The model in eval mode, float32 on the CPU, and the report.

    Raises:
        InputError: if the file cannot be read, holds code, is no official DINO, or holds anything that we do not know.
    """
    if class_map and class_names is None:
        raise InputError("class_map says where new classes begin: give class_names too")
    state, arguments, left = _read(Path(path), ema)
    _refuse_relatives(path, state)
    _refuse_other_arguments(path, arguments)
    num_classes = len(state["class_embed.0.bias"])
    if num_classes == len(COCO_91_SLOTS):
        file_names = COCO_91_SLOTS
    elif class_names is not None and len(class_names) == num_classes:
        file_names = tuple(class_names)
    else:
        file_names = tuple(f"class {i}" for i in range(num_classes))
    config = _architecture(path, state, arguments, file_names, fusion, fusion_init, fusion_hidden_dim, padding)
    report = ConversionReport(left=left)
    tensors = _renamed(path, state, config, report)

    model = CrossDINO(config, InferenceConfig(num_select=arguments.get("num_select", InferenceConfig.num_select)))
    own = model.state_dict()
    report.new = [key for key in own if key.startswith("fusion.")]
    misfits = unfitting_keys({key: own[key] for key in own if key not in report.new}, tensors)
    if misfits:
        raise _unusable(path, f"its tensors fit no DINO that we know: {_few(misfits)}")
    model.load_state_dict(tensors, strict=False)
    if isinstance(model.fusion, CrossCodingTwice) and model.fusion.twice and fusion_init == "identity":
        _halve_readers(model)
        report.reinitialised.append("enc_output and the decoder's value_proj halved, because Eq. 3 doubles E")
    if class_names is not None and tuple(class_names) != file_names:
        report.reinitialised += change_classes(model, class_names, class_map)
    if num_queries is not None:
        report.reinitialised += change_num_queries(model, num_queries)
    return model.eval(), report


def convert_weights(source: str | Path, output: str | Path, **options: Any) -> ConversionReport:
    """Write an official DINO checkpoint as a model folder of our own.

    Args:
        source: the checkpoint.
        output: the folder, made where it does not exist.
        options: those of `load_dino`.

    Returns:
        What became of the checkpoint.

    Raises:
        InputError: as `load_dino`.
    """
    model, report = load_dino(source, **options)
    # The official heads of 91 classes use COCO's category ids as they are.
    is_coco = model.config.class_names == COCO_91_SLOTS
    card = model_card(
        model,
        name=Path(source).stem,
        data=f"Converted from the official DINO checkpoint {Path(source).name}; not measured after the conversion.",
    )
    save_model(model, output, category_ids=range(len(COCO_91_SLOTS)) if is_coco else None, card=card)
    return report


@torch.no_grad()
def _halve_readers(model: CrossDINO) -> None:
    model.enc_output.weight.mul_(0.5)
    for layer in model.decoder.layers:
        layer.cross_attn.value_proj.weight.mul_(0.5)  # type: ignore[union-attr]


# ---- reading ----


def _read(path: Path, ema: bool) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """The weights without `module.`, the training's arguments, and what else the file holds."""
    if not path.is_file():
        raise InputError(f"{path} is no file: give the path of an official DINO checkpoint")
    try:
        # The published files keep their training's arguments in a Namespace, which is a dict with another face.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(
                f"{path} holds code besides weights ({found[1]}), which is not run: load it where you trust it and "
                "store the weights alone, torch.save({'model': checkpoint['model']}, 'weights.pth')"
            ) from None
        raise _unreadable(path) from None
    except Exception:  # a damaged file raises almost anything
        raise _unreadable(path) from None
    if not isinstance(content, Mapping):
        raise _unusable(path, f"it holds a {type(content).__name__} instead of a dict of weights")
    content = dict(content)
    arguments = content.pop("args", None)
    wanted = "ema_model" if ema else "model"
    if wanted in content:
        weights = content.pop(wanted)
    elif ema:
        raise _unusable(path, "it has no averaged weights under 'ema_model': load it without ema")
    elif content and all(isinstance(value, Tensor) for value in content.values()):
        weights, content = content, {}
    else:
        raise _unusable(path, f"it has no weights under 'model', only {_few(sorted(map(str, content)))}")
    if not isinstance(weights, Mapping) or not weights:
        raise _unusable(path, f"what it has under '{wanted}' is no dict of weights")
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()):
        raise _unusable(path, f"not everything under '{wanted}' is a named tensor")
    if all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    left = [f"{key} (of the training)" for key in content if key not in ("model", "ema_model")]
    if "model" in content:
        left.append("model (the averaged weights were asked for)")
    if "ema_model" in content:
        left.append("ema_model (averaged weights; ema takes them instead)")
    state = {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    return state, dict(vars(arguments)) if isinstance(arguments, argparse.Namespace) else {}, left


def _refuse_relatives(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Tell apart what people have lying about, before anything is made of it."""

    def has(*prefixes: str) -> bool:
        return all(any(key.startswith(prefix) for key in state) for prefix in prefixes)

    reason = None
    if has("bbox_head."):
        reason = "it is a model of mmdetection, whose keys are others"
    elif has("backbone.res2.") or has("transformer.decoder.layers.0.attentions."):
        reason = "it is a model of detrex, whose keys are others"
    elif has("transformer.encoder.layers.0.self_attn.in_proj_weight"):
        reason = "it is a DETR, whose attention is not deformable"
    elif has("transformer.encoder.layers.0.self_attn.sampling_offsets") and not has("transformer.enc_output."):
        reason = "it is a Deformable DETR without two stages"
    elif has("transformer.enc_output.") and not has("transformer.enc_out_class_embed."):
        reason = "it is a two-stage Deformable DETR, without DINO's own heads for the encoder"
    elif not has("transformer.decoder.layers.0.cross_attn.sampling_offsets", "transformer.enc_out_class_embed."):
        reason = f"it has no deformable decoder; its keys begin with {_few(sorted(state))}"
    elif not has("transformer.tgt_embed."):
        reason = "its queries have no learnt contents (embed_init_tgt was off)"
    elif not has("input_proj.", "transformer.level_embed", "class_embed.0.bias", "label_enc.weight"):
        reason = "it is incomplete: it lacks input_proj, level_embed, class_embed or label_enc"
    if reason:
        raise _unusable(path, reason)


# What no tensor shows: the value with which our model computes the same.
_EXPECTED_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "transformer_activation": ("relu",),
    "pre_norm": (False,),
    "position_embedding": ("sine", "v2"),
    "pe_temperatureH": (20,),
    "pe_temperatureW": (20,),
    "dilation": (False,),
    "decoder_sa_type": ("sa",),
    "decoder_module_seq": (["sa", "ca", "ffn"],),
    "num_patterns": (0,),
    "dec_layer_number": (None,),
    "two_stage_type": ("standard",),
    "use_deformable_box_attn": (False,),
}


def _refuse_other_arguments(path: str | Path, arguments: Mapping[str, Any]) -> None:
    for name, allowed in _EXPECTED_ARGUMENTS.items():
        if name in arguments and arguments[name] not in allowed:
            raise _unusable(path, f"it was trained with {name} = {arguments[name]!r}, and we have only {allowed[0]!r}")


# ---- architecture ----

# (embedding width, blocks of the stages, window) of the Swin Transformers that the official code can make.
_SWINS: dict[tuple[int, tuple[int, ...], int], str] = {
    (96, (2, 2, 6, 2), 7): "swin_t",
    (128, (2, 2, 18, 2), 7): "swin_base_patch4_window7_224",
    (128, (2, 2, 18, 2), 12): "swin_base_patch4_window12_384",
    (192, (2, 2, 18, 2), 7): "swin_large_patch4_window7_224",
    (192, (2, 2, 18, 2), 12): "swin_l",
}
_RESNETS: dict[tuple[int, ...], str] = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101"}


def _architecture(
    path: str | Path,
    state: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    class_names: tuple[str, ...],
    fusion: Fusion,
    fusion_init: FusionInit,
    fusion_hidden_dim: int,
    padding: Padding,
) -> ModelConfig:
    num_levels, hidden_dim = state["transformer.level_embed"].shape
    num_heads = arguments.get("nheads", 8)
    rows = {
        len(value)
        for key, value in state.items()
        if re.fullmatch(r"transformer\.\w+\.layers\.\d+\.\w+_attn\.attention_weights\.bias", key)
    }
    num_points, rest = divmod(max(rows), num_heads * num_levels)
    if len(rows) > 1 or rest:
        raise _unusable(
            path, f"its attentions have {_few(sorted(map(str, rows)))} weights instead of one number for all"
        )
    # The backbone's maps are projected by 1 x 1 convolutions, what lies above them by 3 x 3.
    kernels = [state[key].shape[-1] for key in state if re.fullmatch(r"input_proj\.\d+\.0\.weight", key)]
    if len(kernels) != num_levels or kernels.count(1) not in (3, 4):
        raise _unusable(
            path, f"it takes {kernels.count(1)} maps of its backbone into {num_levels} levels; we have 3 or 4"
        )
    defaults = ModelConfig()
    return ModelConfig(
        backbone=_backbone_name(path, state),
        class_names=class_names,
        num_feature_levels=num_levels,
        first_stride=8 if kernels.count(1) == 3 else 4,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        num_points=num_points,
        num_encoder_layers=_count(state, r"transformer\.encoder\.layers\.(\d+)\."),
        num_decoder_layers=_count(state, r"transformer\.decoder\.layers\.(\d+)\."),
        feedforward_dim=len(state["transformer.decoder.layers.0.linear1.bias"]),
        num_queries=len(state["transformer.tgt_embed.weight"]),
        fusion=fusion,
        fusion_hidden_dim=fusion_hidden_dim,
        fusion_init="default" if fusion == "none" else fusion_init,
        padding=padding,
        num_denoising=arguments.get("dn_number", defaults.num_denoising),
        label_noise_ratio=arguments.get("dn_label_noise_ratio", defaults.label_noise_ratio),
        box_noise_scale=arguments.get("dn_box_noise_scale", defaults.box_noise_scale),
    )


def _backbone_name(path: str | Path, state: Mapping[str, Tensor]) -> str:
    if "backbone.0.body.conv1.weight" in state:
        blocks = tuple(_count(state, rf"backbone\.0\.body\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
        if blocks in _RESNETS and "backbone.0.body.layer1.0.conv3.weight" in state:
            return _RESNETS[blocks]
        found = f"a ResNet with {'-'.join(map(str, blocks))} blocks"
    elif "backbone.0.patch_embed.proj.weight" in state:
        depths = tuple(_count(state, rf"backbone\.0\.layers\.{stage}\.blocks\.(\d+)\.") for stage in range(4))
        table = state.get("backbone.0.layers.0.blocks.0.attn.relative_position_bias_table", torch.empty(0))
        window = (round(len(table) ** 0.5) + 1) // 2
        width = len(state["backbone.0.patch_embed.proj.weight"])
        if (width, depths, window) in _SWINS:
            return _SWINS[width, depths, window]
        found = f"a Swin of width {width}, depths {'-'.join(map(str, depths))} and window {window}"
    elif any(key.startswith("backbone.0.downsample_layers.") for key in state):
        found = "a ConvNeXt"
    else:
        found = "unknown"
    raise _unusable(path, f"its backbone is {found}; we have ResNet-50, ResNet-101 and Swin-T, -B and -L")


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return max((int(match[1]) + 1 for key in state if (match := re.match(pattern, key))), default=0)


# ---- names ----

# Buffers that are computed from the sizes, and a counter that frozen normalisation has no use for.
_COMPUTED = re.compile(r"backbone\.0\..*(\.relative_position_index|\.attn_mask|\.num_batches_tracked)")

_SHARED_HEAD = re.compile(r"(?:transformer\.decoder\.)?((?:class|bbox)_embed)\.\d+\.(.+)")

_RENAMED_PREFIXES = {
    "transformer.enc_out_class_embed.": "enc_class_embed.",
    "transformer.enc_out_bbox_embed.": "enc_bbox_embed.",
    "backbone.0.body.": "backbone.body.",
    "backbone.0.patch_embed.": "backbone.body.patch_embed.",
    "input_proj.": "input_proj.",
    "transformer.": "",
}


def _renamed(
    path: str | Path, state: Mapping[str, Tensor], config: ModelConfig, report: ConversionReport
) -> dict[str, Tensor]:
    """The weights under our names; the report learns which were used and which left.

    Raises:
        InputError: for a key that means nothing to us, or heads that the decoder's layers do not share.
    """
    tensors: dict[str, Tensor] = {}
    repeated, computed = 0, 0
    unknown: list[str] = []
    for key, value in state.items():
        if head := _SHARED_HEAD.fullmatch(key):
            first = f"{head[1]}.0.{head[2]}"
            if key == first:
                tensors[f"{head[1]}.{head[2]}"] = value
                report.used.append(key)
            elif first in state and torch.equal(state[first], value):
                repeated += 1
            elif first in state:
                raise _unusable(path, f"{key} differs from {first}: each decoder layer has a head of its own")
            else:
                unknown.append(key)
        elif _COMPUTED.fullmatch(key):
            computed += 1
        elif key == "label_enc.weight":
            tensors[key] = _label_embedding(path, value, config.num_classes, report)
            report.used.append(key)
        elif (name := _own_name(key, config.first_stride)) is not None:
            tensors[name] = value
            report.used.append(key)
        else:
            unknown.append(key)
    if unknown:
        raise _unusable(path, f"it holds what no DINO that we know has: {_few(unknown)}")
    if repeated:
        report.left.append(f"{repeated} tensors that repeat the heads which all decoder layers share")
    if computed:
        report.left.append(f"{computed} buffers that are computed")
    return tensors


def _own_name(key: str, first_stride: int) -> str | None:
    """Our name of an official parameter, None if it is none."""
    # The official code halves a map at the end of a stage, timm at the beginning of the next.
    if match := re.fullmatch(r"backbone\.0\.layers\.(\d)\.downsample\.(.+)", key):
        return f"backbone.body.layers_{int(match[1]) + 1}.downsample.{match[2]}"
    if match := re.fullmatch(r"backbone\.0\.layers\.(\d)\.(.+)", key):
        return f"backbone.body.layers_{match[1]}.{match[2]}"
    if match := re.fullmatch(r"backbone\.0\.norm(\d)\.(.+)", key):
        index = int(match[1]) - (1 if first_stride == 8 else 0)
        return f"backbone.map_norms.{index}.{match[2]}" if index >= 0 else None
    for official, own in _RENAMED_PREFIXES.items():
        if key.startswith(official):
            return own + key.removeprefix(official)
    return None


def _label_embedding(path: str | Path, rows: Tensor, num_classes: int, report: ConversionReport) -> Tensor:
    """The K rows of the classes and the last one, which stands for "no label"."""
    if len(rows) < num_classes:
        raise _unusable(path, f"label_enc has {len(rows)} rows for {num_classes} classes")
    if len(rows) == num_classes:
        report.reinitialised.append('label_enc has no row for "no label": it begins as zeros')
        return torch.cat((rows, torch.zeros_like(rows[:1])))
    if len(rows) > num_classes + 1:
        report.left.append(f"{len(rows) - num_classes - 1} rows of label_enc beyond the {num_classes} classes")
    return torch.cat((rows[:num_classes], rows[-1:]))


# ---- errors ----


def _unusable(path: str | Path, reason: str) -> InputError:
    return InputError(f"{path} is no official DINO checkpoint that can be used: {reason}")


def _unreadable(path: str | Path) -> InputError:
    return InputError(
        f"{path} is not a readable PyTorch checkpoint (it may be incomplete or something else): download it again"
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"
