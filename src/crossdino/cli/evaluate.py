"""`crossdino evaluate`: average precision of a model, or of a file of detections."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from crossdino.cli.output import choose_device, make_console, write_json, write_text
from crossdino.errors import InputError


def run_evaluate(options: argparse.Namespace) -> int:
    """Measure, print the table and write what is asked for."""
    if (options.weights is None) == (options.predictions is None):
        raise InputError("give either --predictions (a COCO results file) or --weights (a model to run)")
    for path in filter(None, (options.json, options.predictions_out)):
        if not Path(path).absolute().parent.is_dir():
            raise InputError(f"cannot write {path}: no folder {Path(path).absolute().parent}")
    if options.predictions is not None and options.predictions_out is not None:
        raise InputError("--predictions-out goes with --weights only: the detections are in --predictions already")
    from crossdino.evaluation import COCO_SIZE_BANDS, evaluate_detections, parse_size_bands

    bands = parse_size_bands(options.size_bands) if options.size_bands else COCO_SIZE_BANDS
    truth: Any = options.ground_truth
    detections: Any = options.predictions
    if options.images is not None and not _is_one_file(truth):
        raise InputError(f"--images goes with a COCO file only; {truth} says itself where its images are")
    if options.weights is not None:
        truth, detections = _detect(options)
    elif not _is_one_file(truth):
        from crossdino.data.formats import load_dataset

        truth = load_dataset(truth, options.split, require_images=False).to_coco()
    if options.predictions_out is not None:
        write_json(Path(options.predictions_out), detections)
    result = evaluate_detections(truth, detections, max_detections=options.max_detections, size_bands=bands)
    if options.json is not None:
        write_text(Path(options.json), result.to_json() + "\n")
    make_console().print(result.table())
    return 0


def _is_one_file(ground_truth: str) -> bool:
    """Whether the ground truth is a COCO file; a folder or a YAML file is a data set with splits."""
    path = Path(ground_truth)
    return not path.is_dir() and path.suffix.lower() not in (".yaml", ".yml")


def _detect(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a model over the images of the ground truth; returns the truth as it was understood, and detections."""
    from rich.progress import track

    from crossdino.checkpoints import load_model
    from crossdino.config import DataConfig
    from crossdino.data.coco import load_coco
    from crossdino.data.dataset import DetectionDataset
    from crossdino.data.formats import load_dataset
    from crossdino.training import detect_dataset

    model = load_model(options.weights, device=choose_device(options.device))
    names, inference = model.config.class_names, model.inference
    if _is_one_file(options.ground_truth):
        index = load_coco(options.ground_truth, options.images, class_names=names)
    else:
        index = load_dataset(options.ground_truth, options.split, class_names=names)
    data = DataConfig(
        test_short_side=inference.short_side,
        test_long_side=inference.long_side,
        tile_size=inference.tile_size if options.tile_size is None else options.tile_size,
        tile_overlap=inference.tile_overlap if options.tile_overlap is None else options.tile_overlap,
    )
    dataset = DetectionDataset(index, data, model.mean, model.std, train=False, seed=0)
    num_select = options.num_select or inference.num_select
    console = make_console()
    for line in index.problems.lines():
        console.print(f"{index.annotations}: {line}", soft_wrap=True)
    what = "tile" if data.tile_size else "image"
    console.print(
        f"{len(index.records)} images{f' in {len(dataset)} tiles of {data.tile_size} px' if data.tile_size else ''}, "
        f"short side {inference.short_side} px (long side at most {inference.long_side} px), {num_select} detections "
        f"kept per {what}"
    )
    progress = iter(track(range(len(index.records)), "detecting", console=console, disable=not console.is_terminal))

    def advance(_: int) -> None:
        next(progress, None)

    detections = detect_dataset(
        model,
        dataset,
        num_select=num_select,
        merge_iou=inference.merge_iou,
        batch_size=options.batch_size,
        num_workers=min(2, _num_cores()),
        on_image=advance,
    )
    return index.to_coco(), detections


def _num_cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
