"""`crossdino evaluate`: average precision, or a benchmark's own numbers, of a model or of a file of detections."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdino.cli.detecting import chosen_inference, detect_images
from crossdino.cli.measured import (
    Measured,
    chosen_protocol,
    find_measured,
    is_one_file,
    read_detections,
    refuse_replacing,
)
from crossdino.cli.output import check_destinations, choose_device, make_console, write_json, write_text
from crossdino.cli.values import DTYPES, TILE_OPTIONS, add_tile_options, positive
from crossdino.config import close_matches
from crossdino.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from crossdino.config import InferenceConfig
    from crossdino.evaluation.average_precision import AveragePrecisionResult
    from crossdino.evaluation.caps import Look
    from crossdino.evaluation.protocol_result import ProtocolResult
    from crossdino.models.detector import CrossDINO

_COCO_CAP = 100
# Detections per image and class that enter AP; the two others cap in other ways, of which their results tell.
_NO_CAP = sys.maxsize
_PROTOCOL_CAPS = {"coco": 100, "visdrone": 1500, "aitod": 1500, "sodad": 100}


def add_evaluate_options(parser: argparse.ArgumentParser, data_help: str) -> None:
    """Give the command its options.

    Args:
        parser: of the command.
        data_help: what a data set may be.
    """
    from crossdino.benchmarks import BENCHMARKS

    add = parser.add_argument
    add("--ground-truth", metavar="DATA", required=True, help=f"COCO annotations, or a data set: {data_help}")
    add("--split", metavar="NAME", help="which split of a data set (val)")
    add(
        "--predictions",
        metavar="FILE",
        help="detections: COCO results, or VisDrone's or WiderPerson's text files (folder or zip)",
    )
    add("--weights", metavar="MODEL", help="model folder or hub id to measure")
    add("--images", metavar="DIR", help="the images of COCO annotations (with --weights)")
    add(
        "--protocol",
        metavar="NAME",
        help=f"measure as a benchmark's toolkit does: {', '.join(BENCHMARKS)}, or visdrone-official (that of the data, "
        "where `crossdino prepare` made them; else COCO's with the bands and the cap below)",
    )
    add("--patches", metavar="JSON", help="SODA-D: the patches that the detections are of; they are merged")
    add("--predictions-out", metavar="JSON", help="write the model's detections")
    add("--json", metavar="JSON", help="write all numbers; - for the standard output, and the tables to the other one")
    add(
        "--max-detections",
        metavar="N",
        type=positive,
        help=f"per image and class ({_COCO_CAP}); a protocol has its own",
    )
    add("--size-bands", metavar="NAME=LOW-HIGH,...", help="bands of sqrt(area) in pixels; a protocol has its own")
    add("--num-select", metavar="N", type=positive, help="detections kept per image or tile (the model's own setting)")
    add("--batch-size", metavar="N", type=positive, default=1, help="images or tiles per forward pass (1)")
    add(
        "--dtype",
        metavar="NAME",
        choices=DTYPES,
        help="float32, bfloat16 (bf16) or float16 (fp16); auto is float32 (auto)",
    )
    add_tile_options(parser)
    add("--device", help="cpu, cuda, ... (a GPU where there is one)")


def run_evaluate(options: argparse.Namespace) -> int:
    """Measure, print the table and write what is asked for."""
    _check_options(options)
    from crossdino.documents import Document, load_document
    from crossdino.evaluation import COCO_SIZE_BANDS, evaluate_detections, evaluate_protocol, parse_size_bands
    from crossdino.evaluation.caps import cap_warnings
    from crossdino.provenance import provenance

    bands = parse_size_bands(options.size_bands) if options.size_bands else COCO_SIZE_BANDS
    measured = find_measured(options)
    inputs = (options.ground_truth, options.predictions, options.patches, measured.path, measured.annotations)
    to_stdout = options.json == "-"
    refuse_replacing([None if to_stdout else options.json, options.predictions_out], inputs)
    protocol = chosen_protocol(options, measured)
    if protocol != "sodad" and options.patches is None:
        measured = measured.as_listed  # only SODA-D's protocol puts patches together
    console = make_console(stderr=to_stdout)
    cap = options.max_detections or _COCO_CAP if protocol is None else _PROTOCOL_CAPS.get(protocol, _NO_CAP)
    # Read once; with its name, so that messages tell which file is wrong.
    truth: Any = measured.truth if measured.path is None else Document(measured.truth, str(measured.path))
    patches: Any = None if measured.patches is None else Document(measured.patches, str(measured.annotations))
    look, capped, model = None, [], None
    if options.weights is not None:
        model, mended, detections, look, capped = _detect(options, measured, cap, console)
        truth = mended if protocol is None else truth
    else:
        detections = read_detections(options.predictions, measured, console)
        if protocol is None and not is_one_file(options.ground_truth) and measured.official_split is None:
            from crossdino.data.formats import load_dataset

            truth = load_dataset(options.ground_truth, options.split, require_images=False).to_coco()
    if options.predictions_out is not None:
        write_json(Path(options.predictions_out), detections)
    if protocol is None:
        result = evaluate_detections(truth, detections, max_detections=cap, size_bands=bands)
    else:
        result = evaluate_protocol(protocol, truth, detections, patches=patches)
    numbers = result.to_dict()
    about = [] if look is None else [str(look)]
    if look is not None and model is not None:
        from crossdino.prediction_network import choose_dtype

        dtype = choose_dtype(options.dtype or "auto", next(model.parameters()).device)
        # (A protocol's own caps go before.)
        numbers["settings"] = look.to_dict() | {"dtype": dtype} | numbers["settings"]
        about += [] if dtype == "float32" else [f"computed in {dtype}"]
    if measured.official_split is not None:
        about.append(f"{measured.benchmark}, split {measured.official_split}")
    if model is not None and protocol is not None:
        about.extend(_classes_not_known(measured.truth, model.config.class_names))
    _print(console, result, about)
    # SODA-D's cap counts merged detections of the large images, these are those of patches.
    looked_at, cap = (truth, cap) if measured.patches is None else (measured.patches, _NO_CAP)
    of_truth, given = load_document(looked_at, "the ground truth"), load_document(detections, "the predictions")
    lines = cap_warnings(cap, look, capped, of_truth, given)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    if options.json is not None:
        origin = provenance(
            ground_truth=options.ground_truth,
            split=measured.official_split or (None if is_one_file(options.ground_truth) else options.split),
            benchmark=measured.benchmark,
            predictions=options.predictions,
            weights=options.weights,
            model=model,
            look=look,
        )
        text = json.dumps({**numbers, "warnings": lines, "provenance": origin}, indent=2, allow_nan=False)
        if to_stdout:
            print(text)
        else:
            write_text(Path(options.json), f"{text}\n")
    return 0


def _print(console: Console, result: AveragePrecisionResult | ProtocolResult, about: list[str]) -> None:
    """The tables, and what a reader must know about them."""
    from crossdino.evaluation.protocol_result import ProtocolResult

    table = result.table()
    if isinstance(result, ProtocolResult):
        classes = result.class_table()
        console.print(table, *([] if classes is None else [classes]))
        for line in (result.summary, *about, *result.notes):
            console.print(line, soft_wrap=True, markup=False)
    else:
        table.caption = "\n".join([str(table.caption), *about])
        console.print(table)


def _classes_not_known(truth: dict[str, Any], class_names: Sequence[str]) -> list[str]:
    """A word on the classes of the truth that the model cannot find, and that a protocol asks for all the same."""
    names = [str(entry.get("name")) for entry in truth["categories"]]
    missing = [name for name in names if name not in class_names]
    if not missing:
        return []
    some, known = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else ""), len(names) - len(missing)
    return [f"the model knows {known} of the {len(names)} classes: objects of {some} count as missed"]


def _check_options(options: argparse.Namespace) -> None:
    """Refuse what contradicts itself, before anything takes time."""
    if (options.weights is None) == (options.predictions is None):
        raise InputError("give either --predictions (a file of detections) or --weights (a model to run)")
    if options.split is not None and Path(options.ground_truth).is_file() and is_one_file(options.ground_truth):
        raise InputError(f"--split goes with a data set that has splits; {options.ground_truth} is one COCO file")
    options.split = options.split or "val"
    check_destinations(None if options.json == "-" else options.json, options.predictions_out)
    of_model = ("images", "predictions_out", "num_select", "dtype", *TILE_OPTIONS)
    given = next((name for name in of_model if getattr(options, name) is not None), None)
    if options.predictions is not None and given is not None:
        word = given.replace("_", "-")
        raise InputError(f"--{word} goes with --weights only: the detections are in --predictions already")
    from crossdino.evaluation.protocols import PROTOCOLS

    if options.protocol is not None and options.protocol not in PROTOCOLS:
        hint = close_matches(options.protocol, PROTOCOLS) or f"; choose one of {', '.join(PROTOCOLS)}"
        raise InputError(f"there is no protocol {options.protocol!r}{hint}")
    own = next((name for name in ("max_detections", "size_bands") if getattr(options, name) is not None), None)
    if options.protocol is not None and own is not None:
        word = own.replace("_", "-")
        raise InputError(f"--{word} and --protocol {options.protocol} exclude each other: a protocol has its own")


def how_to_look(options: argparse.Namespace, inference: InferenceConfig, cap: int) -> Look:
    """How images are looked at: as the options say, and else as the model wants it.

    Args:
        options: of the command.
        inference: the model's own settings.
        cap: detections per image and class that count.

    Raises:
        InputError: the model does not know which tiles suit it.
    """
    from crossdino.evaluation.caps import Look

    return Look.of(chosen_inference(options, inference), cap)


def _detect(
    options: argparse.Namespace, measured: Measured, cap: int, console: Console
) -> tuple[CrossDINO, dict[str, Any], list[dict[str, Any]], Look, list[int]]:
    """Run a model over the images of the ground truth.

    Returns:
        The model, the truth as it was understood, the detections, how the images were looked at, and the ids of those
        of which `num_select` left something out.
    """
    from crossdino.checkpoints import load_model
    from crossdino.data.coco import load_coco
    from crossdino.data.formats import load_dataset

    model = load_model(options.weights, device=choose_device(options.device))
    look = how_to_look(options, model.inference, cap)
    if measured.path is None:
        index = load_dataset(measured.annotations, measured.split, class_names=model.config.class_names)
    else:
        index = load_coco(measured.annotations, measured.images, class_names=model.config.class_names)
    detections, capped = detect_images(
        model, index, model.inference, look, options.batch_size, console, options.dtype or "auto"
    )
    return model, index.to_coco(), detections, look, capped
