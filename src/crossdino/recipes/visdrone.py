"""VisDrone2019-DET: Tables III, VII, X and XI. 12 epochs, batch 4 in total, input 1280 x 1280 (SR-TOD's), beta 0.1.

AP counts up to 1500 detections per image and class; 900 queries are the model's own limit, so 900 are kept.
"""

from __future__ import annotations

from crossdino.benchmarks import AITOD_SIZE_BANDS, VISDRONE_CLASSES
from crossdino.config import Config
from crossdino.recipes.coco import dino_r50
from crossdino.recipes.variation import vary


def visdrone_dino_r50() -> Config:
    """DINO, ResNet-50, VisDrone2019, 12 epochs. Tables III, VII, XI: AP 31.7, AP_vt 5.9, AP_t 14.0, AP_s 27.4."""
    return vary(
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
    """DINO, ResNet-50, Boost loss, VisDrone2019, 12 epochs. Table XI: AP 32.8, AP_vt 5.6, AP_t 14.4, AP_s 28.4."""
    return vary(visdrone_dino_r50(), "visdrone_dino_r50_boost", loss={"classification": "boost", "beta": 0.1})


def visdrone_cross_dino_r50() -> Config:
    """Cross-DINO, ResNet-50, VisDrone2019, 12 epochs. Tables III, XI: AP 33.1, AP_vt 5.7, AP_t 14.5, AP_s 28.5."""
    return vary(visdrone_dino_r50_boost(), "visdrone_cross_dino_r50", model={"fusion": "cctm"})


def visdrone_cross_dino_r50_focal() -> Config:
    """Cross-DINO, ResNet-50, focal loss, VisDrone2019, 12 epochs.

    Table XI: AP 32.1, AP_vt 5.1, AP_t 13.6, AP_s 27.7.
    """
    return vary(visdrone_cross_dino_r50(), "visdrone_cross_dino_r50_focal", loss={"classification": "focal"})


def visdrone_dino_clap_strip_t() -> Config:
    """DINO, CLAP-Strip-T, VisDrone2019, 12 epochs. Tables III, VII: AP 33.6, AP_vt 6.5, AP_t 16.1, AP_s 29.8."""
    return vary(visdrone_dino_r50(), "visdrone_dino_clap_strip_t", model={"backbone": "strip_mlp_t"})


def visdrone_cross_dino_clap_strip_t_focal() -> Config:
    """Cross-DINO, CLAP-Strip-T, focal loss, VisDrone2019, 12 epochs.

    Tables VII, X, XI: AP 33.8, AP_vt 8.4, AP_t 15.9, AP_s 29.5.
    """
    return vary(visdrone_dino_clap_strip_t(), "visdrone_cross_dino_clap_strip_t_focal", model={"fusion": "cctm"})


def visdrone_cross_dino_clap_strip_t() -> Config:
    """Cross-DINO, CLAP-Strip-T, beta 0.1, VisDrone2019, 12 epochs.

    Tables III, VII, X: AP 35.4, AP_vt 8.2, AP_t 16.2, AP_s 31.5.
    """
    return vary(
        visdrone_cross_dino_clap_strip_t_focal(),
        "visdrone_cross_dino_clap_strip_t",
        loss={"classification": "boost", "beta": 0.1},
    )


def table10_beta_005() -> Config:
    """Cross-DINO, CLAP-Strip-T, beta 0.05, VisDrone2019, 12 epochs.

    Table X, and last row of Table XI: AP 35.2, AP_vt 8.3, AP_t 16.1, AP_s 30.6.
    """
    return vary(visdrone_cross_dino_clap_strip_t(), "table10_beta_005", loss={"beta": 0.05})


def table10_beta_025() -> Config:
    """Cross-DINO, CLAP-Strip-T, beta 0.25, VisDrone2019, 12 epochs.

    Table X: AP 35.8, AP_vt 7.6, AP_t 16.5, AP_s 31.1.
    """
    return vary(visdrone_cross_dino_clap_strip_t(), "table10_beta_025", loss={"beta": 0.25})
