"""The named recipes: functions without arguments that return a complete `Config`.

A variant is a `dataclasses.replace` of another. The numbers in the docstrings are the paper's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from crossdino.benchmarks import COCO_91_SLOTS
from crossdino.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    TrainingConfig,
    close_matches,
)
from crossdino.errors import InputError


def _vary(config: Config, name: str, **sections: dict[str, Any]) -> Config:
    """A copy of `config` under another name, with fields of its sections replaced."""
    changed = {section: dataclasses.replace(getattr(config, section), **fields) for section, fields in sections.items()}
    return dataclasses.replace(config, name=name, **changed)


def dino_r50() -> Config:
    """DINO-4scale, ResNet-50, COCO, 12 epochs. Table I: AP 49.0, AP_S 32.0; 47M parameters, 279 GFLOPs."""
    return Config(
        name="dino_r50",
        model=ModelConfig(backbone="resnet50", class_names=COCO_91_SLOTS, fusion="none"),
        loss=LossConfig(classification="focal"),
        training=TrainingConfig(batch_size=8, epochs=12, drop_epochs=(11,)),
    )


def dino_swin_t() -> Config:
    """DINO-4scale, Swin-T, COCO, 12 epochs. Table I: AP 51.3, AP_S 34.5; 48M parameters, 280 GFLOPs."""
    return _vary(dino_r50(), "dino_swin_t", model={"backbone": "swin_t"})


def dino_clap_strip_t() -> Config:
    """DINO with CLAP-Strip-T, COCO, 12 epochs. Table I: AP 51.7, AP_S 35.0; 44M parameters, 263 GFLOPs."""
    return _vary(dino_r50(), "dino_clap_strip_t", model={"backbone": "strip_mlp_t"})


def cross_dino_r50() -> Config:
    """Cross-DINO, ResNet-50, COCO, 12 epochs. Table I: AP 50.1, AP_S 33.1; 48M parameters, 288 GFLOPs."""
    return _vary(dino_r50(), "cross_dino_r50", model={"fusion": "cctm"}, loss={"classification": "boost"})


def cross_dino_r50_24ep() -> Config:
    """Cross-DINO, ResNet-50, COCO, 24 epochs. Table I: AP 51.4, AP_S 34.1."""
    return _vary(cross_dino_r50(), "cross_dino_r50_24ep", training={"epochs": 24, "drop_epochs": (20,)})


def cross_dino_swin_t() -> Config:
    """Cross-DINO, Swin-T (beta 0.1), COCO, 12 epochs. Table I: AP 52.1, AP_S 36.9; 49M parameters, 302 GFLOPs."""
    return _vary(cross_dino_r50(), "cross_dino_swin_t", model={"backbone": "swin_t"}, loss={"beta": 0.1})


def cross_dino_swin_t_36ep() -> Config:
    """Cross-DINO, Swin-T (beta 0.1), COCO, 36 epochs. Table I: AP 54.6, AP_S 37.5."""
    return _vary(cross_dino_swin_t(), "cross_dino_swin_t_36ep", training={"epochs": 36, "drop_epochs": (30,)})


def cross_dino_clap_strip_t() -> Config:
    """Cross-DINO, CLAP-Strip-T, COCO, 12 epochs. Table I: AP 52.6, AP_S 36.4; 45M parameters, 277 GFLOPs."""
    return _vary(cross_dino_r50(), "cross_dino_clap_strip_t", model={"backbone": "strip_mlp_t"})


def cross_dino_clap_strip_t_36ep() -> Config:
    """Cross-DINO, CLAP-Strip-T, COCO, 36 epochs. Table I: AP 54.6, AP_S 37.5."""
    return _vary(
        cross_dino_clap_strip_t(), "cross_dino_clap_strip_t_36ep", training={"epochs": 36, "drop_epochs": (30,)}
    )


def compact() -> Config:
    """Cross-DINO for small machines: EfficientNet-Lite0, fewer layers and queries; not from the paper.

    Made for tiles of about 450 pixels without an upright direction (aerial, microscopy): flips and quarter turns.
    """
    return Config(
        name="compact",
        model=ModelConfig(
            backbone="tf_efficientnet_lite0",
            backbone_weights="efficientnet-lite0",
            backbone_frozen_stride=4,
            hidden_dim=128,
            num_encoder_layers=2,
            num_decoder_layers=3,
            feedforward_dim=512,
            num_queries=200,
            fusion="cctm",
            fusion_hidden_dim=256,
        ),
        loss=LossConfig(classification="boost", beta=0.1),
        data=DataConfig(
            train_short_sides=(448,),
            train_long_side=640,
            crop_short_sides=(384, 448, 512, 576, 640),
            crop_range=(448, 448),
            test_short_side=448,
            test_long_side=640,
            vertical_flip=0.5,
            quarter_turns=True,
            color_jitter=0.2,
        ),
        evaluation=EvaluationConfig(num_select=200),
        training=TrainingConfig(
            epochs=200,
            batch_size=2,
            learning_rate=4e-4,
            backbone_learning_rate=2e-4,
            drop_epochs=(170,),
            warmup_steps=100,
            precision="bf16",
            ema_decay=0.998,
            evaluate_every=10,
        ),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    function.__name__: function
    for function in (
        dino_r50,
        dino_swin_t,
        dino_clap_strip_t,
        cross_dino_r50,
        cross_dino_r50_24ep,
        cross_dino_swin_t,
        cross_dino_swin_t_36ep,
        cross_dino_clap_strip_t,
        cross_dino_clap_strip_t_36ep,
        compact,
    )
}


def recipe(name: str) -> Config:
    """The recipe of that name.

    Raises:
        InputError: for an unknown name, with the closest known ones.
    """
    if name not in RECIPES:
        hint = close_matches(name, RECIPES) or f"; choose one of {', '.join(RECIPES)}"
        raise InputError(f"unknown recipe '{name}'{hint}")
    return RECIPES[name]()
