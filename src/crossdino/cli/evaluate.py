"""`crossdino evaluate`: average precision of a model, or of a file of detections."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdino.cli.output import check_destinations, choose_device, make_console, num_cores, write_json, write_text
from crossdino.cli.values import TILE_OPTIONS
from crossdino.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from crossdino.config import InferenceConfig
    from crossdino.evaluation.caps import Look


def run_evaluate(options: argparse.Namespace) -> int:
    """Measure, print the table and write what is asked for."""
    if (options.weights is None) == (options.predictions is None):
        raise InputError("give either --predictions (a COCO results file) or --weights (a model to run)")
    check_destinations(options.json, options.predictions_out)
    of_model = ("images", "predictions_out", "num_select", *TILE_OPTIONS)
    given = next((name for name in of_model if getattr(options, name) is not None), None)
    if options.predictions is not None and given is not None:
        word = given.replace("_", "-")
        raise InputError(f"--{word} goes with --weights only: the detections are in --predictions already")
    from crossdino.evaluation import COCO_SIZE_BANDS, evaluate_detections, parse_size_bands
    from crossdino.evaluation.caps import cap_warnings

    bands = parse_size_bands(options.size_bands) if options.size_bands else COCO_SIZE_BANDS
    truth: Any = options.ground_truth
    detections: Any = options.predictions
    console = make_console()
    if options.images is not None and not _is_one_file(truth):
        raise InputError(f"--images goes with a COCO file only; {truth} says itself where its images are")
    look, capped = None, []
    if options.weights is not None:
        truth, detections, look, capped = _detect(options, console)
    elif not _is_one_file(truth):
        from crossdino.data.formats import load_dataset

        truth = load_dataset(truth, options.split, require_images=False).to_coco()
    if options.predictions_out is not None:
        write_json(Path(options.predictions_out), detections)
    result = evaluate_detections(truth, detections, max_detections=options.max_detections, size_bands=bands)
    table, numbers = result.table(), result.to_dict()
    if look is not None:
        table.caption = f"{table.caption}\n{look}"
        numbers["settings"] |= look.to_dict()
    console.print(table)
    lines = cap_warnings(options.max_detections, look, capped, _content(truth), _content(detections))
    for line in lines:
        console.print(line, soft_wrap=True)
    if options.json is not None:
        write_text(Path(options.json), json.dumps({**numbers, "warnings": lines}, indent=2, allow_nan=False) + "\n")
    return 0


def _content(source: Any) -> Any:
    """What a JSON file holds that was read and found good before, or the object itself."""
    return json.loads(Path(source).read_text(encoding="utf-8-sig")) if isinstance(source, (str, Path)) else source


def _is_one_file(ground_truth: str) -> bool:
    """Whether the ground truth is a COCO file; a folder or a YAML file is a data set with splits."""
    path = Path(ground_truth)
    return not path.is_dir() and path.suffix.lower() not in (".yaml", ".yml")


def how_to_look(options: argparse.Namespace, inference: InferenceConfig) -> Look:
    """How images are looked at: as the options say, and else as the model wants it.

    Raises:
        InputError: the model does not know which tiles suit it.
    """
    from crossdino.evaluation.caps import Look
    from crossdino.tiling import choose_tiles

    def chosen(name: str) -> Any:
        value = getattr(options, name)
        return getattr(inference, name) if value is None else value

    size, overlap = choose_tiles(inference, options.tile_size, options.tile_overlap)
    rest = {name: chosen(name) for name in ("merge", "merge_iou", "full_image", "num_select")}
    return Look(tile_size=size, tile_overlap=overlap, max_detections=options.max_detections, **rest)


def _detect(
    options: argparse.Namespace, console: Console
) -> tuple[dict[str, Any], list[dict[str, Any]], Look, list[int]]:
    """Run a model over the images of the ground truth.

    Returns:
        The truth as it was understood, the detections, how the images were looked at, and the ids of those of which
        `num_select` left something out.
    """
    from rich.progress import track

    from crossdino.checkpoints import load_model
    from crossdino.config import DataConfig
    from crossdino.data.coco import load_coco
    from crossdino.data.dataset import DetectionDataset
    from crossdino.data.formats import load_dataset
    from crossdino.training import detect_dataset

    model = load_model(options.weights, device=choose_device(options.device))
    names, inference = model.config.class_names, model.inference
    look = how_to_look(options, inference)
    if _is_one_file(options.ground_truth):
        index = load_coco(options.ground_truth, options.images, class_names=names)
    else:
        index = load_dataset(options.ground_truth, options.split, class_names=names)
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

    detections = detect_dataset(
        model,
        dataset,
        num_select=look.num_select,
        merge=look.merge,
        merge_iou=look.merge_iou,
        full_image=look.full_image,
        batch_size=options.batch_size,
        num_workers=min(2, num_cores()),
        on_image=advance,
        on_capped=capped.append,
    )
    return index.to_coco(), detections, look, capped
