"""SODA-D: Table V. 12 epochs, batch 4 in total, patches of 800 x 800 enlarged to 1200 x 1200 (CFINet's), beta 0.1.

Patches without objects are left out of the training split only, so val has very many: the model is measured on them
once, at the end. The paper's numbers are those of the merged detections of the original images of test
(`crossdino evaluate --protocol sodad`).
"""

from __future__ import annotations

from crossdino.benchmarks import SODAD_CLASSES, SODAD_SIZE_BANDS
from crossdino.config import Config
from crossdino.recipes.coco import dino_r50
from crossdino.recipes.variation import vary


def sodad_dino_r50() -> Config:
    """DINO, ResNet-50, SODA-D, 12 epochs. Table V: AP 27.7, AP_eS 11.7, AP_rS 23.7, AP_gS 33.9, AP_N 42.9."""
    return vary(
        dino_r50(),
        "sodad_dino_r50",
        model={"class_names": SODAD_CLASSES},
        data={
            "train_short_sides": (1200,),
            "train_long_side": 1200,
            "crop_short_sides": (),
            "test_short_side": 1200,
            "test_long_side": 1200,
        },
        evaluation={"num_select": 300, "max_detections": 100, "size_bands": dict(SODAD_SIZE_BANDS)},
        training={"batch_size": 4, "evaluate_every": 12},
    )


def sodad_cross_dino_clap_strip_t() -> Config:
    """Cross-DINO, CLAP-Strip-T, SODA-D, 12 epochs.

    Table V: AP 32.0, AP_eS 15.0, AP_rS 28.4, AP_gS 38.3, AP_N 47.9. The table names no backbone: Section IV-B d
    gives its gain over DINO, 4.3 AP, to CLAP-Strip-T.
    """
    return vary(
        sodad_dino_r50(),
        "sodad_cross_dino_clap_strip_t",
        model={"backbone": "strip_mlp_t", "fusion": "cctm"},
        loss={"classification": "boost", "beta": 0.1},
    )
