"""`crossdino calibrate`: fit confidences and thresholds to validation data, and store them with the weights."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdino.cli.detecting import chosen_inference, detect_images
from crossdino.cli.output import check_destinations, choose_device, make_console, write_json, write_text
from crossdino.cli.values import TILE_OPTIONS, add_tile_options, number, positive
from crossdino.errors import InputError

if TYPE_CHECKING:
    from crossdino.config import InferenceConfig
    from crossdino.data.index import DatasetIndex
    from crossdino.evaluation.calibration import Calibration

PICTURE_FILE = "calibration.png"


def add_calibrate_options(parser: argparse.ArgumentParser) -> None:
    """Give the command its options."""
    add = parser.add_argument
    add("--weights", metavar="MODEL", help="model folder (gets calibration.json) or hub id (with --output)")
    add(
        "--ground-truth",
        metavar="DATA",
        required=True,
        help="annotated validation data: COCO annotations, or a folder or YAML file in COCO, YOLO or Pascal VOC form",
    )
    add("--split", default="val", help="which split of a data set (val)")
    add("--images", metavar="DIR", help="the images of COCO annotations")
    add("--ignore-categories", metavar="NAME,...", help="categories that mark regions to ignore, which are no classes")
    add("--predictions", metavar="JSON", help="COCO results of this model with all their scores, instead of running it")
    add("--predictions-out", metavar="JSON", help="write the model's detections, with raw scores")
    add("--objective", default="f1", help="what thresholds are best for: f1, precision=P or recall=R (f1)")
    add("--iou", type=number, default=0.5, help="from which overlap with an object a detection is right (0.5)")
    add("--size-bands", metavar="NAME=LOW-HIGH,...", help="bands of sqrt(area) in pixels (those of COCO)")
    add("--min-score", type=number, default=0.05, help="raw score from which the calibration error is taken (0.05)")
    add("--output", metavar="DIR", help=f"folder for {PICTURE_FILE} and a copy of calibration.json")
    add("--json", metavar="JSON", help="write all numbers")
    add("--num-select", type=positive, help="detections kept per image or tile (the model's own setting)")
    add("--short-side", type=positive, help="resize to this short side in pixels (the model's own)")
    add("--long-side", type=positive, help="limit of the long side in pixels (the model's own)")
    add_tile_options(parser)
    add("--batch-size", type=positive, default=1, help="images or tiles per forward pass (1)")
    add("--device", help="cpu, cuda, ... (a GPU where there is one)")


def run_calibrate(options: argparse.Namespace) -> int:
    """Fit, print the table, and write what belongs to the weights and what is asked for."""
    _check_options(options)
    from crossdino.evaluation import COCO_SIZE_BANDS, parse_size_bands
    from crossdino.evaluation.calibration_fit import Objective

    Objective.parse(options.objective)
    bands = parse_size_bands(options.size_bands) if options.size_bands else COCO_SIZE_BANDS
    console = make_console()
    model, inference = None, None
    if options.weights is not None:
        from crossdino.checkpoints import CalibrationWarning, load_model

        _check_destination(options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationWarning)  # a new one is on its way
            model = load_model(options.weights, device=choose_device(options.device))
        inference = chosen_inference(options, model.inference)
    index = _read_data(options, None if model is None else model.config.class_names)
    detections: Any = options.predictions
    if detections is not None:
        for line in index.problems.lines():
            console.print(f"{index.annotations}: {line}", soft_wrap=True, markup=False)
    else:
        from crossdino.evaluation.caps import Look

        assert model is not None and inference is not None, "`_check_options` asks for one of both"
        # A fit takes all detections, however many.
        look = Look.of(inference, max_detections=sys.maxsize)
        detections, _ = detect_images(model, index, inference, look, options.batch_size, console)
        if options.predictions_out is not None:
            write_json(Path(options.predictions_out), detections)
    from crossdino.evaluation.calibration_report import calibrate_detections

    with console.status("fitting"):
        report = calibrate_detections(
            index.to_coco(),
            detections,
            class_names=index.class_names,
            size_bands=bands,
            iou=options.iou,
            objective=options.objective,
            min_score=options.min_score,
        )
    if model is not None and inference is not None:
        from crossdino.checkpoints import weights_digest
        from crossdino.evaluation.calibration import INFERENCE_SETTINGS

        settings = {name: getattr(inference, name) for name in INFERENCE_SETTINGS}
        made = dataclasses.replace(report.calibration, weights=weights_digest(model), settings=settings)
        report = dataclasses.replace(report, calibration=made)
    if options.json is not None:
        write_text(Path(options.json), report.to_json() + "\n")
    console.print(report.table())
    if options.output is not None:
        from crossdino.visualization.calibration import draw_calibration
        from crossdino.writing import written_whole

        Path(options.output).mkdir(parents=True, exist_ok=True)
        with written_whole(Path(options.output) / PICTURE_FILE) as partial:
            draw_calibration(report, partial)
    if model is None:
        console.print("nothing is stored: name the model with --weights")
        return 0
    place, used = _store(options, report.calibration)
    assert inference is not None, "comes with the model"
    words = ["crossdino predict --weights", used, "--threshold auto", *_as_options(inference, model.inference)]
    console.print(
        f"written: {place}; use it with `{' '.join(words)}`",
        soft_wrap=True,
        markup=False,
    )
    for line in report.calibration.differences(vars(model.inference)):
        console.print(f"predict with the settings of this fit: by itself the model's {line}", soft_wrap=True)
    return 0


def _as_options(inference: InferenceConfig, own: InferenceConfig) -> list[str]:
    """The options with which a prediction looks at images as this fit did."""
    from crossdino.evaluation.calibration import INFERENCE_SETTINGS

    words: list[str] = []
    for name in INFERENCE_SETTINGS:
        value, option = getattr(inference, name), name.replace("_", "-")
        # The overlap that goes with a size need not be the one of the fit.
        of_size = name == "tile_overlap" and inference.tile_size not in (0, own.tile_size)
        if value == getattr(own, name) and not of_size:
            continue
        words.append(f"--{'' if value else 'no-'}{option}" if isinstance(value, bool) else f"--{option} {value}")
    return words


def _store(options: argparse.Namespace, calibration: Calibration) -> tuple[Path, str]:
    """Write the calibration with its weights; returns its file, and how to name the model from now on."""
    from crossdino.checkpoints import CALIBRATION_FILE, write_calibration

    folder = _model_folder(options.weights)
    if options.output is not None:
        if folder is None:
            _copy_model(options.weights, Path(options.output))
        write_calibration(options.output, calibration)
    if folder is None:
        assert options.output is not None, "`_check_destination` asks for it"
        return Path(options.output) / CALIBRATION_FILE, options.output
    write_calibration(folder, calibration)
    return folder / CALIBRATION_FILE, options.weights


def _check_options(options: argparse.Namespace) -> None:
    """Whether the options go together; before anything takes time."""
    if options.weights is None and options.predictions is None:
        raise InputError("give --weights (the model to calibrate), or --predictions (to look at a file of detections)")
    of_model = ("num_select", "short_side", "long_side", *TILE_OPTIONS)
    given = next((name for name in of_model if getattr(options, name) is not None), None)
    if options.weights is None and given is not None:
        raise InputError(f"--{given.replace('_', '-')} says how a model looks at images: give --weights too")
    if options.predictions is not None and options.predictions_out is not None:
        raise InputError("--predictions-out goes without --predictions: the detections are there already")
    check_destinations(options.json, options.predictions_out)
    if options.output is not None and Path(options.output).exists() and not Path(options.output).is_dir():
        raise InputError(f"--output {options.output} is a file; name a folder")
    if not 0 < options.iou <= 1:
        raise InputError(f"--iou {options.iou:g}: give an overlap above 0 and up to 1")
    if not 0 <= options.min_score < 1:
        raise InputError(f"--min-score {options.min_score:g}: give a score from 0 to below 1")
    if options.images is not None and not _is_one_file(options.ground_truth):
        raise InputError(
            f"--images goes with a COCO file only; {options.ground_truth} says itself where its images are"
        )


def _check_destination(options: argparse.Namespace) -> None:
    """Whether there is a folder for the calibration."""
    from crossdino.checkpoints import WEIGHTS_FILE

    if _model_folder(options.weights) is None and options.output is None:
        why = "cannot be written to" if Path(options.weights).exists() else "is no folder of this machine"
        raise InputError(f"{options.weights} {why}: name a folder with --output for the model with its calibration")
    output = options.output and Path(options.output)
    if output and _model_folder(options.weights) is None and (output / WEIGHTS_FILE).exists():
        raise InputError(f"--output {output} holds a model already; name another folder for {options.weights}")


def _model_folder(weights: str) -> Path | None:
    """The model folder on this machine that can be written to."""
    from crossdino.checkpoints import find_model

    if not Path(weights).exists():
        return None
    place = find_model(weights)
    folder = place if place.is_dir() else place.parent
    return folder if os.access(folder, os.W_OK) else None


def _copy_model(weights: str, output: Path) -> None:
    from crossdino.checkpoints import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, find_model
    from crossdino.writing import written_whole

    place = find_model(weights)
    folder = place if place.is_dir() else place.parent
    for name in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE):
        source = place if name == WEIGHTS_FILE and place.is_file() else folder / name
        if source.exists():
            with written_whole(output / name) as partial:
                shutil.copyfile(source, partial)


def _is_one_file(ground_truth: str) -> bool:
    """Whether the ground truth is a COCO file; a folder or a YAML file is a data set with splits."""
    path = Path(ground_truth)
    return not path.is_dir() and path.suffix.lower() not in (".yaml", ".yml")


def _read_data(options: argparse.Namespace, class_names: tuple[str, ...] | None) -> DatasetIndex:
    from crossdino.data.coco import load_coco
    from crossdino.data.formats import load_dataset

    ignored = options.ignore_categories.split(",") if options.ignore_categories else ()
    needed = options.predictions is None
    if _is_one_file(options.ground_truth):
        return load_coco(options.ground_truth, options.images, class_names, needed, ignore_categories=ignored)
    return load_dataset(
        options.ground_truth, options.split, class_names=class_names, ignore_categories=ignored, require_images=needed
    )
