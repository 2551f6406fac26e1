"""The named recipes: functions without arguments that return a complete `Config`.

A variant is a `dataclasses.replace` of another. The numbers in the docstrings are the paper's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from crossdino.benchmarks import AITOD_SIZE_BANDS, COCO_91_SLOTS, VISDRONE_CLASSES
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
        # COCO's own training file has boxes of no size.
        data=DataConfig(bad_boxes="mend"),
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


# --- Table VI: CCTM and Boost loss on three backbones, COCO, 12 epochs (with both: the cross_dino_* recipes) ---


def table6_r50_cctm() -> Config:
    """Table VI, ResNet-50 with CCTM only: AP 49.8, AP_S 32.4."""
    return _vary(cross_dino_r50(), "table6_r50_cctm", loss={"classification": "focal"})


def table6_r50_boost() -> Config:
    """Table VI, ResNet-50 with Boost loss only: AP 49.6, AP_S 32.2."""
    return _vary(cross_dino_r50(), "table6_r50_boost", model={"fusion": "none"})


def table6_swin_t_cctm() -> Config:
    """Table VI, Swin-T with CCTM only: AP 52.0, AP_S 35.4."""
    return _vary(cross_dino_swin_t(), "table6_swin_t_cctm", loss={"classification": "focal"})


def table6_swin_t_boost() -> Config:
    """Table VI, Swin-T with Boost loss only (beta 0.1): AP 52.0, AP_S 35.4."""
    return _vary(cross_dino_swin_t(), "table6_swin_t_boost", model={"fusion": "none"})


def table6_clap_strip_t_cctm() -> Config:
    """Table VI, CLAP-Strip-T with CCTM only: AP 52.4, AP_S 35.7."""
    return _vary(cross_dino_clap_strip_t(), "table6_clap_strip_t_cctm", loss={"classification": "focal"})


def table6_clap_strip_t_boost() -> Config:
    """Table VI, CLAP-Strip-T with Boost loss only: AP 52.6, AP_S 36.2."""
    return _vary(cross_dino_clap_strip_t(), "table6_clap_strip_t_boost", model={"fusion": "none"})


# --- Table VIII: the parts of CCTM, COCO, ResNet-50, focal loss (its last row is table6_r50_cctm) ---


def table8_mlp() -> Config:
    """Table VIII, MLP only (no gates): AP 49.1, AP_S 32.3."""
    return _vary(table6_r50_cctm(), "table8_mlp", model={"fusion": "mlp"})


def table8_once() -> Config:
    """Table VIII, once-gating only: AP 49.4, AP_S 32.1."""
    return _vary(table6_r50_cctm(), "table8_once", model={"fusion": "once"})


# --- Tables III, VII, X, XI: VisDrone2019, 12 epochs, batch 4, input 1280 px, AP at 1500 detections (SR-TOD) ---


def visdrone_dino_r50() -> Config:
    """DINO, ResNet-50, VisDrone2019. Tables III, VII, XI: AP 31.7, AP_vt 5.9, AP_t 14.0, AP_s 27.4."""
    return _vary(
        dino_r50(),
        "visdrone_dino_r50",
        model={"class_names": VISDRONE_CLASSES},
        data={
            "train_short_sides": (1280,),
            "train_long_side": 1280,
            "crop_short_sides": (),
            "test_short_side": 1280,
            "test_long_side": 1280,
        },
        evaluation={"num_select": 900, "max_detections": 1500, "size_bands": dict(AITOD_SIZE_BANDS)},
        training={"batch_size": 4},
    )


def visdrone_dino_r50_boost() -> Config:
    """DINO, ResNet-50, Boost loss, VisDrone2019. Table XI: AP 32.8, AP_vt 5.6."""
    return _vary(visdrone_dino_r50(), "visdrone_dino_r50_boost", loss={"classification": "boost", "beta": 0.1})


def visdrone_cross_dino_r50() -> Config:
    """Cross-DINO, ResNet-50 (beta 0.1), VisDrone2019. Tables III, XI: AP 33.1, AP_vt 5.7, AP_t 14.5, AP_s 28.5."""
    return _vary(visdrone_dino_r50_boost(), "visdrone_cross_dino_r50", model={"fusion": "cctm"})


def visdrone_cross_dino_r50_focal() -> Config:
    """Cross-DINO, ResNet-50, focal loss, VisDrone2019. Table XI: AP 32.1, AP_vt 5.1."""
    return _vary(visdrone_cross_dino_r50(), "visdrone_cross_dino_r50_focal", loss={"classification": "focal"})


def visdrone_dino_clap_strip_t() -> Config:
    """DINO, CLAP-Strip-T, VisDrone2019. Tables III, VII: AP 33.6, AP_vt 6.5, AP_t 16.1, AP_s 29.8."""
    return _vary(visdrone_dino_r50(), "visdrone_dino_clap_strip_t", model={"backbone": "strip_mlp_t"})


def visdrone_cross_dino_clap_strip_t_focal() -> Config:
    """Cross-DINO, CLAP-Strip-T, focal loss, VisDrone2019. Tables VII, X, XI: AP 33.8, AP_vt 8.4."""
    return _vary(visdrone_dino_clap_strip_t(), "visdrone_cross_dino_clap_strip_t_focal", model={"fusion": "cctm"})


def visdrone_cross_dino_clap_strip_t() -> Config:
    """Cross-DINO, CLAP-Strip-T (beta 0.1), VisDrone2019. Tables III, VII, X: AP 35.4, AP_vt 8.2, AP_s 31.5."""
    return _vary(
        visdrone_cross_dino_clap_strip_t_focal(),
        "visdrone_cross_dino_clap_strip_t",
        loss={"classification": "boost", "beta": 0.1},
    )


def table10_beta_005() -> Config:
    """Table X, beta 0.05 (also Table XI's last row): AP 35.2, AP_vt 8.3, AP_s 30.6."""
    return _vary(visdrone_cross_dino_clap_strip_t(), "table10_beta_005", loss={"beta": 0.05})


def table10_beta_025() -> Config:
    """Table X, beta 0.25: AP 35.8, AP_vt 7.6, AP_s 31.1."""
    return _vary(visdrone_cross_dino_clap_strip_t(), "table10_beta_025", loss={"beta": 0.25})


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
        # Boost weighs a 45-pixel object of a 448-pixel image about a tenth of what the focal loss does; from a few
        # hundred objects its positives then learn too slowly. At alpha 0.6 and weight 2 the balance is the focal one's.
        loss=LossConfig(classification="boost", beta=0.1, alpha=0.6, class_weight=2.0),
        data=DataConfig(
            train_short_sides=(448,),
            train_long_side=640,
            crop_short_sides=(384, 448, 512, 576, 640, 704),
            crop_range=(448, 448),
            test_short_side=448,
            test_long_side=640,
            vertical_flip=0.5,
            quarter_turns=True,
            color_jitter=0.3,
        ),
        evaluation=EvaluationConfig(num_select=200),
        training=TrainingConfig(
            epochs=72,
            batch_size=2,
            learning_rate=4e-4,
            backbone_learning_rate=2e-4,
            drop_epochs=(58,),
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
        table6_r50_cctm,
        table6_r50_boost,
        table6_swin_t_cctm,
        table6_swin_t_boost,
        table6_clap_strip_t_cctm,
        table6_clap_strip_t_boost,
        table8_mlp,
        table8_once,
        visdrone_dino_r50,
        visdrone_dino_r50_boost,
        visdrone_cross_dino_r50,
        visdrone_cross_dino_r50_focal,
        visdrone_dino_clap_strip_t,
        visdrone_cross_dino_clap_strip_t_focal,
        visdrone_cross_dino_clap_strip_t,
        table10_beta_005,
        table10_beta_025,
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
