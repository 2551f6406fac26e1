"""AI-TOD: Table IV. 12 epochs, batch 2 in total, images of 800 x 800 as they are, beta 0.05.

Trained on trainval and measured on test, as RFLA and SR-TOD do. There is no third part, so the model is measured once,
at the end: choosing the best epoch on the test split would be a choice by the test. AP counts up to 1500 detections per
image and class; 900 queries are the model's own limit, so 900 are kept.
"""

from __future__ import annotations

from crossdino.benchmarks import AITOD_CLASSES, AITOD_SIZE_BANDS
from crossdino.config import Config
from crossdino.recipes.coco import dino_r50
from crossdino.recipes.variation import vary


def aitod_dino_r50() -> Config:
    """DINO, ResNet-50, AI-TOD, 12 epochs. Table IV: AP 23.1, AP_vt 10.5, AP_t 23.5, AP_s 29.1."""
    return vary(
        dino_r50(),
        "aitod_dino_r50",
        model={"class_names": AITOD_CLASSES},
        data={
            "train_short_sides": (800,),
            "train_long_side": 800,
            "crop_short_sides": (),
            "test_short_side": 800,
            "test_long_side": 800,
        },
        evaluation={"num_select": 900, "max_detections": 1500, "size_bands": dict(AITOD_SIZE_BANDS)},
        training={"batch_size": 2, "evaluate_every": 12},
    )


def aitod_cross_dino_r50() -> Config:
    """Cross-DINO, ResNet-50, AI-TOD, 12 epochs. Table IV: AP 23.9, AP_vt 10.3, AP_t 24.5, AP_s 30.5."""
    return vary(
        aitod_dino_r50(),
        "aitod_cross_dino_r50",
        model={"fusion": "cctm"},
        loss={"classification": "boost", "beta": 0.05},
    )


def aitod_cross_dino_clap_strip_t() -> Config:
    """Cross-DINO, CLAP-Strip-T, AI-TOD, 12 epochs. Table IV: AP 22.6, AP_vt 9.5, AP_t 23.5, AP_s 27.7."""
    return vary(aitod_cross_dino_r50(), "aitod_cross_dino_clap_strip_t", model={"backbone": "strip_mlp_t"})


def aitod_cross_dino_clap_strip_t_1200() -> Config:
    """Cross-DINO, CLAP-Strip-T, AI-TOD enlarged to 1200 x 1200, 12 epochs.

    Table IV: AP 25.1, AP_vt 13.2, AP_t 25.4, AP_s 31.2.
    """
    return vary(
        aitod_cross_dino_clap_strip_t(),
        "aitod_cross_dino_clap_strip_t_1200",
        data={
            "train_short_sides": (1200,),
            "train_long_side": 1200,
            "test_short_side": 1200,
            "test_long_side": 1200,
        },
    )
