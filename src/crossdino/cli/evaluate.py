"""`crossdino evaluate`: average precision of a model, or of a file of detections."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdino.cli.detecting import chosen_inference, detect_images
from crossdino.cli.output import check_destinations, choose_device, make_console, write_json, write_text
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

    return Look.of(chosen_inference(options, inference), options.max_detections)


def _detect(
    options: argparse.Namespace, console: Console
) -> tuple[dict[str, Any], list[dict[str, Any]], Look, list[int]]:
    """Run a model over the images of the ground truth.

    Returns:
        The truth as it was understood, the detections, how the images were looked at, and the ids of those of which
        `num_select` left something out.
    """
    from crossdino.checkpoints import load_model
    from crossdino.data.coco import load_coco
    from crossdino.data.formats import load_dataset

    model = load_model(options.weights, device=choose_device(options.device))
    look = how_to_look(options, model.inference)
    if _is_one_file(options.ground_truth):
        index = load_coco(options.ground_truth, options.images, class_names=model.config.class_names)
    else:
        index = load_dataset(options.ground_truth, options.split, class_names=model.config.class_names)
    detections, capped = detect_images(model, index, model.inference, look, options.batch_size, console)
    return index.to_coco(), detections, look, capped
