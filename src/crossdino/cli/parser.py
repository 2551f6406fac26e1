"""The options of all commands.

argparse knows the verbs and their few options; every setting of the configuration is an option by its dotted name
(`--training.epochs 3`), checked by `config.with_changes`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from crossdino.cli.calibrate import add_calibrate_options, run_calibrate
from crossdino.cli.compare import add_compare_options, run_compare
from crossdino.cli.convert_results import add_convert_results_options, run_convert_results
from crossdino.cli.evaluate import add_evaluate_options, run_evaluate
from crossdino.cli.inspect import run_inspect
from crossdino.cli.models import run_convert_weights, run_info, run_recipes
from crossdino.cli.predict import add_predict_options, run_predict
from crossdino.cli.prepare import add_prepare_options, run_prepare
from crossdino.cli.report import add_report_options, run_report
from crossdino.cli.tile import add_options as add_cut_options
from crossdino.cli.tile import run_tile
from crossdino.cli.train import run_train
from crossdino.cli.values import above_zero, add_tile_options, positive
from crossdino.config import close_matches, option_names
from crossdino.errors import InputError

COMMANDS = (
    *("inspect", "prepare", "tile", "train", "evaluate", "compare", "report", "calibrate"),
    *("predict", "convert-results", "convert-weights", "info", "recipes"),
)
_DATA_HELP = "a folder, a YAML data file or a COCO JSON file, in COCO, YOLO or Pascal VOC form"
# The commands that take every setting as an option.
WITH_SETTINGS = ("inspect", "train")
_SETTING = re.compile(r"--([a-z_]+\.[\w.-]+)(?:=(.*))?", re.DOTALL)


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
        if not value or (match[2] is None and value.startswith("--")):
            raise InputError(f"--{match[1]} needs a value")
        settings[match[1].replace("-", "_")] = value
    return others, settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        choice = re.search(r"argument command: invalid choice: '([^']*)'", message)
        if choice is not None:
            raise InputError(f"unknown command '{choice[1]}'{close_matches(choice[1], COMMANDS)}")
        raise InputError(f"{message} (see `{self.prog} --help`)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` of its result is the function that does it."""
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
    inspect = command("inspect", run_inspect, "Look at a data set and propose settings for it.", epilog=epilog)
    inspect.add_argument("data", metavar="DATA", nargs="?", help=_DATA_HELP)
    inspect.add_argument("--recipe", help="what is proposed is relative to it (compact)")
    inspect.add_argument("--config", metavar="YAML", help="file with settings that are kept")
    inspect.add_argument("--split", metavar="NAME,...", help="which splits to look at (train and val)")
    inspect.add_argument("--memory", metavar="GB", type=above_zero, help="what a training may take (what is free)")
    inspect.add_argument("--no-trial", action="store_true", help="estimate the memory, make no step")
    inspect.add_argument("--no-duplicates", action="store_true", help="do not compare the images with each other")
    inspect.add_argument("--output", metavar="DIR", help="write inspect.png, inspect.json and proposal.yaml")
    inspect.add_argument("--json", metavar="JSON", help="write all numbers")

    prepare = command("prepare", run_prepare, "Turn a benchmark's raw data into COCO files.")
    add_prepare_options(prepare)

    train = command("train", run_train, "Train a detector.", epilog=epilog)
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
        type=positive,
        help="draw the first N batches (1) into --output as the network gets them, and stop",
    )

    evaluate = command("evaluate", run_evaluate, "Measure average precision, of a model or of a file of detections.")
    add_evaluate_options(evaluate, _DATA_HELP)

    predict = command("predict", run_predict, "Detect objects in images and videos; writes pictures and tables.")
    add_predict_options(predict)
    predict.add_argument("--num-select", type=positive, help="detections kept per image or tile (the model's own)")
    predict.add_argument("--short-side", type=positive, help="resize to this short side in pixels (the model's own)")
    predict.add_argument("--long-side", type=positive, help="limit of the long side in pixels (the model's own)")
    add_tile_options(predict)

    calibrate = command("calibrate", run_calibrate, "Fit confidences and thresholds by size and class.")
    add_calibrate_options(calibrate)
    compare = command("compare", run_compare, "Confidence intervals of detections, and of the difference of two files.")
    add_compare_options(compare)
    report = command("report", run_report, "Trainings and evaluations in a table, beside the paper's numbers.")
    add_report_options(report)
    cut = command("tile", run_tile, "Cut a data set into tiles on disk, for tools that want them.")
    add_cut_options(cut)

    exchange = command("convert-results", run_convert_results, "Turn result files of one toolkit into another's.")
    add_convert_results_options(exchange)
    convert = command("convert-weights", run_convert_weights, "Turn an official DINO checkpoint into a model folder.")
    convert.add_argument("source", metavar="SOURCE", help="the official file (.pth)")
    convert.add_argument("--output", metavar="DIR", required=True, help="the model folder to write")
    convert.add_argument(
        "--fusion", choices=("none", "cctm", "once", "mlp"), default="none", help="none is DINO (none)"
    )
    convert.add_argument("--class-names", metavar="A,B,...", help="other classes; those of the same name are kept")
    convert.add_argument("--class-map", metavar="NEW=OLD,...", help="begin as another: pedestrian=person")
    convert.add_argument("--num-queries", type=positive, help="another number of queries")

    info = command("info", run_info, "Parameters, multiply-adds and feature map sizes of the recipes.")
    info.add_argument("recipes", nargs="*", metavar="RECIPE", help="which ones (all)")
    info.add_argument("--size", nargs=2, type=positive, default=(800, 1333), metavar=("HEIGHT", "WIDTH"))

    recipes = command("recipes", run_recipes, "List the recipes, with the numbers of the paper.")
    recipes.add_argument("--show", metavar="RECIPE", help="print all settings of one instead, as YAML")
    recipes.add_argument("--benchmark", metavar="NAME", help="only those for this data set: coco, visdrone, ...")
    recipes.add_argument("--json", metavar="JSON", nargs="?", const="-", help="print, or write, all numbers as JSON")
    recipes.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    for made in commands.choices.values():
        made.set_defaults(known_options=list(made._option_string_actions))
    return parser


class _Version(argparse.Action):
    """`--version` without importing the package metadata reader at every start."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"crossdino {version('crossdino')}")
        except PackageNotFoundError:
            print("crossdino (not installed)")
        parser.exit()
