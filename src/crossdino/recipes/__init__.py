"""The named recipes: functions without arguments that return a complete `Config`, one file per data set.

There is one for every row of the paper's Tables I to XI that is Cross-DINO's or DINO's; a model that stands in several
tables is one recipe. The numbers in the docstrings are the paper's (all of them: `crossdino.paper`).
"""

from __future__ import annotations

from collections.abc import Callable

from crossdino.config import Config, close_matches
from crossdino.errors import InputError
from crossdino.recipes.aitod import (
    aitod_cross_dino_clap_strip_t,
    aitod_cross_dino_clap_strip_t_1200,
    aitod_cross_dino_r50,
    aitod_dino_r50,
)
from crossdino.recipes.coco import (
    cross_dino_clap_strip_t,
    cross_dino_clap_strip_t_36ep,
    cross_dino_r50,
    cross_dino_r50_24ep,
    cross_dino_swin_t,
    cross_dino_swin_t_36ep,
    dino_clap_strip_t,
    dino_r50,
    dino_r50_24ep,
    dino_r50_36ep,
    dino_swin_t,
    table6_clap_strip_t_boost,
    table6_clap_strip_t_cctm,
    table6_r50_boost,
    table6_r50_cctm,
    table6_swin_t_boost,
    table6_swin_t_cctm,
    table8_mlp,
    table8_once,
)
from crossdino.recipes.ours import compact
from crossdino.recipes.sodad import sodad_cross_dino_clap_strip_t, sodad_dino_r50
from crossdino.recipes.visdrone import (
    table10_beta_005,
    table10_beta_025,
    visdrone_cross_dino_clap_strip_t,
    visdrone_cross_dino_clap_strip_t_focal,
    visdrone_cross_dino_r50,
    visdrone_cross_dino_r50_focal,
    visdrone_dino_clap_strip_t,
    visdrone_dino_r50,
    visdrone_dino_r50_boost,
)
from crossdino.recipes.widerperson import (
    widerperson_cross_dino_clap_strip_t,
    widerperson_cross_dino_r50,
    widerperson_cross_dino_swin_t,
    widerperson_dino_clap_strip_t,
    widerperson_dino_r50,
    widerperson_dino_swin_t,
)

RECIPES: dict[str, Callable[[], Config]] = {
    function.__name__: function
    for function in (
        dino_r50,
        dino_r50_24ep,
        dino_r50_36ep,
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
        widerperson_dino_r50,
        widerperson_dino_swin_t,
        widerperson_dino_clap_strip_t,
        widerperson_cross_dino_r50,
        widerperson_cross_dino_swin_t,
        widerperson_cross_dino_clap_strip_t,
        visdrone_dino_r50,
        visdrone_dino_r50_boost,
        visdrone_cross_dino_r50,
        visdrone_cross_dino_r50_focal,
        visdrone_dino_clap_strip_t,
        visdrone_cross_dino_clap_strip_t_focal,
        visdrone_cross_dino_clap_strip_t,
        table10_beta_005,
        table10_beta_025,
        aitod_dino_r50,
        aitod_cross_dino_r50,
        aitod_cross_dino_clap_strip_t,
        aitod_cross_dino_clap_strip_t_1200,
        sodad_dino_r50,
        sodad_cross_dino_clap_strip_t,
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
