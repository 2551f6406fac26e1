"""The command line: `crossdino inspect | train | evaluate | predict | convert-weights | info | recipes`.

argparse knows the verbs and their few options; every setting of the configuration is an option by its dotted name
(`--training.epochs 3`), checked by `config.with_changes`. The rooms that import torch are opened inside the commands,
so that `--help` and mistakes answer at once. A mistake of the user is one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from crossdino.config import (
    Config,
    close_matches,
    flattened,
    from_dict,
    option_names,
    read_yaml,
    to_dict,
    with_changes,
)
from crossdino.errors import InputError

if TYPE_CHECKING:
    from PIL import Image
    from rich.console import Console

COMMANDS = ("inspect", "train", "evaluate", "predict", "convert-weights", "info", "recipes")
_DATA_HELP = "a folder, a YAML data file or a COCO JSON file, in COCO, YOLO or Pascal VOC form"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}
# The commands that take every setting as an option.
_WITH_SETTINGS = ("inspect", "train")
_SETTING = re.compile(r"--([a-z_]+\.[\w.-]+)(?:=(.*))?", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after `crossdino`; None takes those of the process.

    Returns:
        The exit status: 0, 2 after a mistake of the user, 130 after Ctrl-C.
    """
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        settings: dict[str, str] = {}
        if words[:1] and words[0] in _WITH_SETTINGS:
            words, settings = split_settings(words)
        parser = _parser()
        options, unknown = parser.parse_known_args(words)
        if unknown:
            known = [
                *options.known_options,
                *(f"--{name}" for name in option_names() if options.command in _WITH_SETTINGS),
            ]
            word = next((word for word in unknown if word.startswith("-")), unknown[0])
            raise InputError(f"unknown argument '{word}'{close_matches(word.partition('=')[0], known)}")
        return options.run(options, settings) if options.command in _WITH_SETTINGS else options.run(options)
    except InputError as error:
        return _fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"cannot use {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("crossdino: interrupted", file=sys.stderr)
        return 130


def entry_point() -> None:
    """The console script `crossdino`."""
    # supervision tells at its import that it works without OpenCV, which is no news for the user of a command line.
    warnings.filterwarnings("ignore", message="OpenCV .*is not installed")
    sys.exit(main())


def split_settings(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Take the dotted settings (`--section.name value` or `--section.name=value`) out of a command line.

    Returns:
        The other words, and dotted name -> value as text.

    Raises:
        InputError: if a setting has no value.
    """
    others: list[str] = []
    settings: dict[str, str] = {}
    iterator = iter(words)
    for word in iterator:
        match = _SETTING.fullmatch(word)
        if match is None:
            others.append(word)
            continue
        value = match[2] if match[2] is not None else next(iterator, None)
        if value is None or (match[2] is None and value.startswith("--")):
            raise InputError(f"--{match[1]} needs a value")
        settings[match[1].replace("-", "_")] = value
    return others, settings


def resolve_config(options: argparse.Namespace, settings: dict[str, str]) -> Config:
    """The configuration of `crossdino train`: recipe, then file, then `--data`, then single settings.

    A training that is resumed starts from the configuration in its own folder.

    Args:
        options: the parsed options `recipe`, `config`, `data`, `output`, `name`, `resume`.
        settings: dotted name -> value as text.
    """
    output = options.output or settings.get("training.output")
    stored = Path(output) / "config.yaml" if output and options.resume else None
    if options.recipe is not None:
        from crossdino.recipes import recipe

        config = recipe(options.recipe)
    elif stored is not None and stored.is_file():
        config = from_dict(read_yaml(stored))
    elif options.config is not None:
        config = Config()
    else:
        raise InputError("name a recipe (--recipe; `crossdino recipes` lists them) or a configuration file (--config)")
    if options.config is not None:
        config = with_changes(config, flattened(read_yaml(options.config)))
    changes: dict[str, Any] = {"data.source": options.data} if options.data is not None else {}
    changes |= settings
    if options.output is not None:
        changes["training.output"] = options.output
    if options.name is not None:
        changes["name"] = options.name
    return with_changes(config, changes)


# --- the commands ---


def _train(options: argparse.Namespace, settings: dict[str, str]) -> int:
    config = resolve_config(options, settings)
    if options.show_batch is not None:
        from crossdino.training import show_batch

        print(show_batch(config, options.show_batch))
        return 0
    from crossdino.training import train

    train(config, resume=options.resume, overwrite=options.overwrite, init_weights=options.weights)
    return 0


def _inspect(options: argparse.Namespace, settings: dict[str, str]) -> int:
    output = Path(options.output) if options.output is not None else None
    if output is not None and output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; name a folder")
    numbers = Path(options.json) if options.json is not None else None
    if numbers is not None and not numbers.absolute().parent.is_dir():
        raise InputError(f"cannot write {numbers}: no folder {numbers.absolute().parent}")
    name = options.recipe or ("compact" if options.config is None else None)
    base = Config()
    if name is not None:
        from crossdino.recipes import recipe

        base = recipe(name)
    file_settings = flattened(read_yaml(options.config)) if options.config is not None else {}
    source = {"data.source": options.data} if options.data is not None else {}
    config = with_changes(base, {**file_settings, **source, **settings})
    # A whole configuration as a run writes it repeats most of the recipe: only what differs is the user's choice.
    before, after = (flattened(to_dict(one)) for one in (base, config))
    given = [name for name in after if name in settings or (name in file_settings and before[name] != after[name])]
    from crossdino.inspect_report import PROPOSAL_FILE, inspect_and_propose

    words = ["crossdino train", f"--recipe {name}" if name is not None else ""]
    words += [f"--config {output / PROPOSAL_FILE}" if output is not None else ""]
    words += [f"--data {options.data}" if options.data is not None else ""]
    inspect_and_propose(
        config,
        base,
        given,
        _console(),
        splits=options.split.split(",") if options.split else (),
        memory_bytes=None if options.memory is None else options.memory * 1e9,
        trial=not options.no_trial,
        duplicates=not options.no_duplicates,
        output=output,
        numbers=numbers,
        how_to=" ".join(filter(None, words)),
    )
    return 0


def _evaluate(options: argparse.Namespace) -> int:
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
        _write_json(Path(options.predictions_out), detections)
    result = evaluate_detections(truth, detections, max_detections=options.max_detections, size_bands=bands)
    if options.json is not None:
        _write_text(Path(options.json), result.to_json() + "\n")
    _console().print(result.table())
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

    model = load_model(options.weights, device=_device(options.device))
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
    console = _console()
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
        num_workers=2,
        on_image=advance,
    )
    return index.to_coco(), detections


def _predict(options: argparse.Namespace) -> int:
    paths, missing = expand_images(options.images)
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; name a folder")
    if Path(options.json).name != options.json:
        raise InputError(f"--json {options.json} must be a plain file name: it is written into --output")
    names = picture_names(paths)
    sources = {path.resolve() for path in paths}
    for name in (*names, options.json):
        if (output / name).resolve() in sources:
            raise InputError(f"{output / name} is one of the images and would be overwritten; choose another --output")

    from crossdino.checkpoints import find_model, load_model, read_model_config
    from crossdino.predictor import Predictor, detections_to_coco, to_pil_image
    from crossdino.visualization import draw_detections

    folder = find_model(options.weights)
    model = load_model(folder, device=_device(options.device))
    class_names = model.config.class_names
    category_ids = read_model_config(folder).get("category_ids") or list(range(1, len(class_names) + 1))
    predictor = Predictor(
        model,
        threshold=options.threshold,
        num_select=options.num_select,
        short_side=options.short_side,
        long_side=options.long_side,
        tile_size=options.tile_size,
        tile_overlap=options.tile_overlap,
    )
    console = _console()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    failures = list(missing)
    for path, name in zip(paths, names, strict=True):
        try:
            image = to_pil_image(path)
        except InputError as error:
            failures.append(str(error))
            continue
        detections = predictor(image)
        image_id = len(images) + 1
        images.append(
            {"id": image_id, "file_name": str(path), "width": image.width, "height": image.height, "picture": name}
        )
        for found in detections_to_coco(detections, image_id, category_ids):
            area = found["bbox"][2] * found["bbox"][3]  # type: ignore[index]
            annotations.append({"id": len(annotations) + 1, **found, "area": area, "iscrowd": 0})
        output.mkdir(parents=True, exist_ok=True)
        _write_picture(output / name, draw_detections(image, detections))
        console.print(f"{path}: {len(detections)} objects", soft_wrap=True, markup=False)
    if images:
        categories = [
            {"id": category_id, "name": name} for category_id, name in zip(category_ids, class_names, strict=True)
        ]
        _write_json(output / options.json, {"images": images, "categories": categories, "annotations": annotations})
        console.print(
            f"{len(annotations)} objects with a score of at least {options.threshold:g} in {len(images)} images: "
            f"{output / options.json}, pictures beside it",
            soft_wrap=True,
            markup=False,
        )
    for failure in failures:
        _fail(failure)
    return 2 if failures else 0


def _convert_weights(options: argparse.Namespace) -> int:
    output = Path(options.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output {output} exists already and is not an empty folder; name another")
    names = options.class_names.split(",") if options.class_names else None
    mapped = dict(pair.partition("=")[::2] for pair in options.class_map.split(",")) if options.class_map else None
    from crossdino.official_weights import convert_weights

    report = convert_weights(
        options.source,
        output,
        fusion=options.fusion,
        class_names=names,
        class_map=mapped,
        num_queries=options.num_queries,
    )
    console = _console()
    for line in report.lines():
        console.print(line, soft_wrap=True)
    console.print(f"written: {output}; use it with --weights {output}", soft_wrap=True)
    return 0


def _info(options: argparse.Namespace) -> int:
    from crossdino.recipes import RECIPES, recipe

    configs = [recipe(name) for name in options.recipes or RECIPES]
    height, width = options.size
    if min(height, width) < 32:
        raise InputError(f"--size {height} {width}: both must be at least 32 pixels")
    from rich.table import Table

    from crossdino.complexity import measure

    table = Table(title=f"one image of {height} x {width} px (height x width)")
    for header in ("recipe", "backbone", "classes", "trainable", "parameters", "GMACs", "feature maps"):
        table.add_column(header, justify="left" if header in ("recipe", "backbone", "feature maps") else "right")
    for config in configs:
        cost = measure(config.model, (height, width))
        table.add_row(
            config.name,
            config.model.backbone,
            str(config.model.num_classes),
            f"{cost.num_trainable / 1e6:.2f}M",
            f"{cost.num_parameters / 1e6:.2f}M",
            f"{cost.num_multiply_adds / 1e9:.1f}",
            " ".join(f"{h}x{w}" for h, w in cost.feature_hw),
        )
    _console().print(table)
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from rich.table import Table

    from crossdino.recipes import RECIPES

    table = Table()
    for header in ("recipe", "what it is"):
        table.add_column(header)
    for name, make in RECIPES.items():
        table.add_row(name, (make.__doc__ or "").strip().splitlines()[0])
    _console().print(table)
    if options.show is not None:
        import yaml

        from crossdino.recipes import recipe

        print(yaml.safe_dump(to_dict(recipe(options.show)), sort_keys=False), end="")
    return 0


# --- files ---


def expand_images(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The image files that files, folders and glob patterns stand for, each once, in their order.

    Returns:
        The files, and one message for each word that stands for nothing.

    Raises:
        InputError: if nothing is found at all.
    """
    paths: dict[Path, None] = {}
    missing: list[str] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            found = sorted(item for item in path.iterdir() if item.suffix.lower() in IMAGE_SUFFIXES and item.is_file())
            problem = f"folder {word} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})"
        elif path.is_file():
            found, problem = [path], ""
        else:
            found = [Path(name) for name in sorted(glob.glob(word, recursive=True)) if Path(name).is_file()]
            problem = f"no image {word}; check the name"
        if not found:
            missing.append(problem)
        paths |= dict.fromkeys(found)
    if not paths:
        raise InputError("; ".join(missing))
    return list(paths), missing


def picture_names(paths: Sequence[Path]) -> list[str]:
    """A file name for the picture of each image; images of the same name get a number, so that none is lost."""
    taken: set[str] = set()
    names = []
    for path in paths:
        name, number = f"{path.stem}.jpg", 1
        while name.lower() in taken:  # some file systems do not tell A.jpg from a.jpg
            number += 1
            name = f"{path.stem}_{number}.jpg"
        taken.add(name.lower())
        names.append(name)
    return names


def _write_text(path: Path, text: str) -> None:
    from crossdino.checkpoints import written_whole

    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _write_json(path: Path, content: Any) -> None:
    _write_text(path, json.dumps(content) + "\n")


def _write_picture(path: Path, picture: Image.Image) -> None:
    from crossdino.checkpoints import written_whole

    with written_whole(path) as partial:
        picture.save(partial, format="JPEG", quality=92)


# --- the options ---


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '([^']*)'", message)
        if choice is not None:
            raise InputError(f"unknown command '{choice[1]}'{close_matches(choice[1], COMMANDS)}")
        raise InputError(f"{message} (see `{self.prog} --help`)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="crossdino", description="Detect small objects with Cross-DINO.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)

    def command(name: str, run: Callable[..., int], text: str, **keywords: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False, **keywords)
        made.set_defaults(run=run)
        return made

    epilog = (
        "Every setting is an option by its dotted name, with the recipe's value as default: "
        + ", ".join(f"--{name}" for name in option_names() if "." in name)
        + ". Lists are written as [1, 2]. `crossdino recipes --show NAME` prints a recipe's values."
    )
    inspect = command("inspect", _inspect, "Look at a data set and propose settings for it.", epilog=epilog)
    inspect.add_argument("data", metavar="DATA", nargs="?", help=_DATA_HELP)
    inspect.add_argument("--recipe", help="what is proposed is relative to it (compact)")
    inspect.add_argument("--config", metavar="YAML", help="file with settings that are kept")
    inspect.add_argument("--split", metavar="NAME,...", help="which splits to look at (train and val)")
    inspect.add_argument("--memory", metavar="GB", type=_above_zero, help="what a training may take (what is free)")
    inspect.add_argument("--no-trial", action="store_true", help="estimate the memory, make no step")
    inspect.add_argument("--no-duplicates", action="store_true", help="do not compare the images with each other")
    inspect.add_argument("--output", metavar="DIR", help="write inspect.png, inspect.json and proposal.yaml")
    inspect.add_argument("--json", metavar="JSON", help="write all numbers")

    train = command("train", _train, "Train a detector.", epilog=epilog)
    train.add_argument("--recipe", help="where the settings start from; `crossdino recipes` lists them")
    train.add_argument("--config", metavar="YAML", help="file with settings, which go before those of the recipe")
    train.add_argument("--data", metavar="DATA", help=_DATA_HELP)
    train.add_argument("--output", metavar="DIR", help="where checkpoints, log and curves go")
    train.add_argument("--name", help="of the experiment")
    train.add_argument("--weights", metavar="MODEL", help="model folder or hub id to start from")
    train.add_argument("--resume", action="store_true", help="continue the training in --output")
    train.add_argument("--overwrite", action="store_true", help="delete the training in --output first")
    train.add_argument(
        "--show-batch",
        metavar="N",
        nargs="?",
        const=1,
        type=_positive,
        help="draw the first N batches (1) into --output as the network gets them, and stop",
    )

    evaluate = command("evaluate", _evaluate, "Measure average precision, of a model or of a file of detections.")
    evaluate.add_argument(
        "--ground-truth", metavar="DATA", required=True, help=f"COCO annotations, or a data set: {_DATA_HELP}"
    )
    evaluate.add_argument("--split", default="val", help="which split of a data set (val)")
    evaluate.add_argument("--predictions", metavar="JSON", help="COCO results to measure")
    evaluate.add_argument("--weights", metavar="MODEL", help="model folder or hub id to measure")
    evaluate.add_argument("--images", metavar="DIR", help="the images of COCO annotations (with --weights)")
    evaluate.add_argument("--predictions-out", metavar="JSON", help="write the model's detections")
    evaluate.add_argument("--json", metavar="JSON", help="write all numbers")
    evaluate.add_argument("--max-detections", type=_positive, default=100, help="per image and class (100)")
    evaluate.add_argument("--size-bands", metavar="NAME=LOW-HIGH,...", help="bands of sqrt(area) in pixels")
    evaluate.add_argument("--num-select", type=_positive, help="detections kept per image (the model's own setting)")
    evaluate.add_argument("--batch-size", type=_positive, default=1, help="images or tiles per forward pass (1)")
    _add_tile_options(evaluate)
    evaluate.add_argument("--device", help="cpu, cuda, ... (a GPU where there is one)")

    predict = command("predict", _predict, "Detect objects in images; writes pictures and COCO-style JSON.")
    predict.add_argument("images", nargs="+", help="image files, folders or glob patterns")
    predict.add_argument("--weights", metavar="MODEL", required=True, help="model folder or hub id")
    predict.add_argument("--output", metavar="DIR", required=True, help="folder for the results")
    predict.add_argument("--threshold", type=float, default=0.3, help="lowest score (0.3)")
    predict.add_argument("--json", metavar="NAME", default="predictions.json", help="file name (predictions.json)")
    predict.add_argument("--num-select", type=_positive, help="detections kept per image (the model's own setting)")
    predict.add_argument("--short-side", type=_positive, help="resize to this short side in pixels (the model's own)")
    predict.add_argument("--long-side", type=_positive, help="limit of the long side in pixels (the model's own)")
    _add_tile_options(predict)
    predict.add_argument("--device", help="cpu, cuda, ... (a GPU where there is one)")

    convert = command("convert-weights", _convert_weights, "Turn an official DINO checkpoint into a model folder.")
    convert.add_argument("source", metavar="SOURCE", help="the official file (.pth)")
    convert.add_argument("--output", metavar="DIR", required=True, help="the model folder to write")
    convert.add_argument(
        "--fusion", choices=("none", "cctm", "once", "mlp"), default="none", help="none is DINO (none)"
    )
    convert.add_argument("--class-names", metavar="A,B,...", help="other classes; those of the same name are kept")
    convert.add_argument("--class-map", metavar="NEW=OLD,...", help="begin as another: pedestrian=person")
    convert.add_argument("--num-queries", type=_positive, help="another number of queries")

    info = command("info", _info, "Parameters, multiply-adds and feature map sizes of the recipes.")
    info.add_argument("recipes", nargs="*", metavar="RECIPE", help="which ones (all)")
    info.add_argument("--size", nargs=2, type=_positive, default=(800, 1333), metavar=("HEIGHT", "WIDTH"))

    recipes = command("recipes", _recipes, "List the recipes.")
    recipes.add_argument("--show", metavar="RECIPE", help="print all settings of one as YAML")
    for made in (inspect, train, evaluate, predict, convert, info, recipes):
        made.set_defaults(known_options=list(made._option_string_actions))
    return parser


def _add_tile_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tile-size", type=_not_negative, help="cut images into tiles of this side; 0: whole images (the model's own)"
    )
    parser.add_argument("--tile-overlap", type=_not_negative, help="of neighbouring tiles in pixels (the model's own)")


class _Version(argparse.Action):
    """`--version` without importing the package metadata reader at every start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"crossdino {version('crossdino')}")
        except PackageNotFoundError:
            print("crossdino (not installed)")
        parser.exit()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0")
    return value


def _above_zero(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError where it was built without the device
        raise InputError(f"cannot use --device {name}: {str(error).splitlines()[0]}") from None
    return name


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 140)  # a file has no edge at which tables would have to be broken
    return console


def _fail(message: str) -> int:
    print(f"crossdino: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    entry_point()
