"""How `evaluate` and `calibrate` run a model over annotated images."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from crossdino.cli.output import log_lines, num_cores

if TYPE_CHECKING:
    from rich.console import Console

    from crossdino.config import InferenceConfig
    from crossdino.data.index import DatasetIndex
    from crossdino.evaluation.caps import Look
    from crossdino.models.detector import CrossDINO

_NAMES = ("num_select", "short_side", "long_side", "merge", "merge_iou", "full_image")


def chosen_inference(options: argparse.Namespace, own: InferenceConfig) -> InferenceConfig:
    """The model's settings with those of the command line in their places.

    Raises:
        InputError: such tiles are impossible, or the model does not know which suit it.
    """
    from crossdino.tiling import choose_tiles

    tile_size, tile_overlap = choose_tiles(own, options.tile_size, options.tile_overlap)
    given = {name: value for name in _NAMES if (value := getattr(options, name, None)) is not None}
    return dataclasses.replace(own, tile_size=tile_size, tile_overlap=tile_overlap, **given)


def detect_images(
    model: CrossDINO,
    index: DatasetIndex,
    inference: InferenceConfig,
    look: Look,
    batch_size: int,
    console: Console,
    dtype: str = "float32",
) -> tuple[list[dict[str, Any]], list[int]]:
    """Run a model over all images of a data set, with a bar on a terminal.

    Args:
        model: the detector.
        index: the images.
        inference: how they are resized.
        look: how they are cut and put together.
        batch_size: images or tiles per forward pass.
        console: is told what is done.
        dtype: in what the network computes, see `crossdino.prediction_network.choose_dtype`.

    Returns:
        The detections as COCO results, and the ids of the images of which `num_select` left something out.
    """
    from rich.progress import track

    from crossdino.config import DataConfig
    from crossdino.data.dataset import DetectionDataset
    from crossdino.prediction_network import autocast, choose_dtype
    from crossdino.training import detect_dataset

    data = DataConfig(
        test_short_side=inference.short_side,
        test_long_side=inference.long_side,
        tile_size=look.tile_size,
        tile_overlap=look.tile_overlap,
    )
    dataset = DetectionDataset(index, data, model.mean, model.std, train=False, seed=0)
    for line in index.problems.lines():
        console.print(f"{index.annotations}: {line}", soft_wrap=True, markup=False)
    console.print(
        f"{len(index.records)} images{f' in {len(dataset)} tiles' if look.tile_size else ''}: {look}; short side "
        f"{inference.short_side} px (long side at most {inference.long_side} px)",
        soft_wrap=True,
    )
    progress = iter(track(range(len(index.records)), "detecting", console=console, disable=not console.is_terminal))
    capped: list[int] = []

    def advance(_: int) -> None:
        next(progress, None)

    device = next(model.parameters()).device
    with log_lines(console), autocast(choose_dtype(dtype, device), device):
        detections = detect_dataset(
            model,
            dataset,
            num_select=look.num_select,
            merge=look.merge,
            merge_iou=look.merge_iou,
            full_image=look.full_image,
            batch_size=batch_size,
            num_workers=min(2, num_cores()),
            on_image=advance,
            on_capped=capped.append,
        )
    return detections, capped
