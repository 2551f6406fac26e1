"""COCO 2017: Tables I, VI and VIII. Batch 8 in total, DINO's augmentation and schedule (Section IV-A b).

The 91 class names are the slots of the official heads, whose parameters and weights Table I counts; in a training the
80 names of the data replace them.
"""

from __future__ import annotations

from crossdino.benchmarks import COCO_91_SLOTS
from crossdino.config import Config, DataConfig, LossConfig, ModelConfig, TrainingConfig
from crossdino.recipes.variation import vary


def dino_r50() -> Config:
    """DINO-4scale, ResNet-50, COCO, 12 epochs. Tables I, VI, VIII: AP 49.0, AP_S 32.0; 47M parameters, 279 GFLOPs."""
    return Config(
        name="dino_r50",
        model=ModelConfig(backbone="resnet50", class_names=COCO_91_SLOTS, fusion="none"),
        loss=LossConfig(classification="focal"),
        # COCO's own training file has boxes of no size.
        data=DataConfig(bad_boxes="mend"),
        # The tables' first number chooses the best epoch, as in DINO.
        training=TrainingConfig(batch_size=8, epochs=12, drop_epochs=(11,), best_metric="ap"),
    )


def dino_r50_24ep() -> Config:
    """DINO-4scale, ResNet-50, COCO, 24 epochs. Table I: AP 50.4, AP_S 33.3."""
    return vary(dino_r50(), "dino_r50_24ep", training={"epochs": 24, "drop_epochs": (20,)})


def dino_r50_36ep() -> Config:
    """DINO-4scale, ResNet-50, COCO, 36 epochs. Table I: AP 50.9, AP_S 34.6."""
    return vary(dino_r50(), "dino_r50_36ep", training={"epochs": 36, "drop_epochs": (30,)})


def dino_swin_t() -> Config:
    """DINO-4scale, Swin-T, COCO, 12 epochs. Tables I, VI: AP 51.3, AP_S 34.5; 48M parameters, 280 GFLOPs."""
    return vary(dino_r50(), "dino_swin_t", model={"backbone": "swin_t"})


def dino_clap_strip_t() -> Config:
    """DINO with CLAP-Strip-T, COCO, 12 epochs. Tables I, VI: AP 51.7, AP_S 35.0; 44M parameters, 263 GFLOPs."""
    return vary(dino_r50(), "dino_clap_strip_t", model={"backbone": "strip_mlp_t"})


def cross_dino_r50() -> Config:
    """Cross-DINO, ResNet-50, COCO, 12 epochs. Table I: AP 50.1, AP_S 33.1; 48M parameters, 288 GFLOPs.

    Table VI prints AP 50.0, AP_S 32.6 for the same model.
    """
    return vary(dino_r50(), "cross_dino_r50", model={"fusion": "cctm"}, loss={"classification": "boost"})


def cross_dino_r50_24ep() -> Config:
    """Cross-DINO, ResNet-50, COCO, 24 epochs. Table I: AP 51.4, AP_S 34.1; 48M parameters, 288 GFLOPs."""
    return vary(cross_dino_r50(), "cross_dino_r50_24ep", training={"epochs": 24, "drop_epochs": (20,)})


def cross_dino_swin_t() -> Config:
    """Cross-DINO, Swin-T, beta 0.1, COCO, 12 epochs. Tables I, VI: AP 52.1, AP_S 36.9; 49M parameters, 302 GFLOPs."""
    return vary(cross_dino_r50(), "cross_dino_swin_t", model={"backbone": "swin_t"}, loss={"beta": 0.1})


def cross_dino_swin_t_36ep() -> Config:
    """Cross-DINO, Swin-T, beta 0.1, COCO, 36 epochs. Table I: AP 54.6, AP_S 37.5; 49M parameters, 302 GFLOPs."""
    return vary(cross_dino_swin_t(), "cross_dino_swin_t_36ep", training={"epochs": 36, "drop_epochs": (30,)})


def cross_dino_clap_strip_t() -> Config:
    """Cross-DINO, CLAP-Strip-T, COCO, 12 epochs. Tables I, VI: AP 52.6, AP_S 36.4; 45M parameters, 277 GFLOPs."""
    return vary(cross_dino_r50(), "cross_dino_clap_strip_t", model={"backbone": "strip_mlp_t"})


def cross_dino_clap_strip_t_36ep() -> Config:
    """Cross-DINO, CLAP-Strip-T, COCO, 36 epochs. Table I: AP 54.6, AP_S 37.5; 45M parameters, 277 GFLOPs."""
    return vary(
        cross_dino_clap_strip_t(), "cross_dino_clap_strip_t_36ep", training={"epochs": 36, "drop_epochs": (30,)}
    )


# --- Table VI: CCTM and Boost loss on three backbones, 12 epochs (with both: the cross_dino_* recipes) ---


def table6_r50_cctm() -> Config:
    """ResNet-50 with CCTM only, COCO, 12 epochs. Tables VI, VIII: AP 49.8, AP_S 32.4."""
    return vary(cross_dino_r50(), "table6_r50_cctm", loss={"classification": "focal"})


def table6_r50_boost() -> Config:
    """ResNet-50 with Boost loss only, COCO, 12 epochs. Table VI: AP 49.6, AP_S 32.2."""
    return vary(cross_dino_r50(), "table6_r50_boost", model={"fusion": "none"})


def table6_swin_t_cctm() -> Config:
    """Swin-T with CCTM only, COCO, 12 epochs. Table VI: AP 52.0, AP_S 35.4."""
    return vary(cross_dino_swin_t(), "table6_swin_t_cctm", loss={"classification": "focal"})


def table6_swin_t_boost() -> Config:
    """Swin-T with Boost loss only, beta 0.1, COCO, 12 epochs. Table VI: AP 52.0, AP_S 35.4."""
    return vary(cross_dino_swin_t(), "table6_swin_t_boost", model={"fusion": "none"})


def table6_clap_strip_t_cctm() -> Config:
    """CLAP-Strip-T with CCTM only, COCO, 12 epochs. Table VI: AP 52.4, AP_S 35.7."""
    return vary(cross_dino_clap_strip_t(), "table6_clap_strip_t_cctm", loss={"classification": "focal"})


def table6_clap_strip_t_boost() -> Config:
    """CLAP-Strip-T with Boost loss only, COCO, 12 epochs. Table VI: AP 52.6, AP_S 36.2."""
    return vary(cross_dino_clap_strip_t(), "table6_clap_strip_t_boost", model={"fusion": "none"})


# --- Table VIII: the parts of CCTM, ResNet-50, focal loss (its first row is dino_r50, its last table6_r50_cctm) ---


def table8_mlp() -> Config:
    """ResNet-50, MLP only in place of CCTM (no gates), COCO, 12 epochs. Table VIII: AP 49.1, AP_S 32.3."""
    return vary(table6_r50_cctm(), "table8_mlp", model={"fusion": "mlp"})


def table8_once() -> Config:
    """ResNet-50, once-gating only, COCO, 12 epochs. Table VIII: AP 49.4, AP_S 32.1."""
    return vary(table6_r50_cctm(), "table8_once", model={"fusion": "once"})
