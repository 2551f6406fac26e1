"""`crossdino convert-results`: result files of one toolkit as those of another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from crossdino.cli.measured import is_one_file, prepared_split, refuse_replacing
from crossdino.cli.output import make_console
from crossdino.errors import InputError


def add_convert_results_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    from crossdino.exchange import FORMATS

    parser.add_argument("source", metavar="SOURCE", help="a JSON file, or a folder or .zip of text files")
    parser.add_argument(
        "--ground-truth",
        metavar="DATA",
        required=True,
        help="the COCO annotations that the results are of, or a data set; its names and ids are used",
    )
    parser.add_argument("--split", metavar="NAME", help="which split of a data set (val)")
    parser.add_argument("--from", dest="source_format", choices=tuple(FORMATS), help="format of SOURCE (is recognised)")
    parser.add_argument("--to", dest="target_format", choices=tuple(FORMATS), required=True, help="format to write")
    parser.add_argument(
        "--output", metavar="PATH", required=True, help="a .json file for coco; a new folder or a .zip for text files"
    )


def run_convert_results(options: argparse.Namespace) -> int:
    """Read, write, and tell how much."""
    from crossdino.evaluation.protocol_result import counted
    from crossdino.exchange import read_results, write_results
    from crossdino.exchange.results import check_format_place

    source, output = Path(options.source), Path(options.output)
    check_format_place(output, options.target_format)
    truth = _ground_truth(options)
    refuse_replacing([output], [source, truth if isinstance(truth, Path) else None])
    console = make_console()

    def say(line: str) -> None:
        console.print(f"note: {line}", soft_wrap=True, markup=False)

    results = read_results(source, options.source_format, truth, on_note=say)
    write_results(results, output, options.target_format, truth, on_note=say)
    num_images = len({result["image_id"] for result in results})
    found, of_images = counted(len(results), "detection"), counted(num_images, "image")
    console.print(f"{output}: {found} of {of_images}, as {options.target_format}", soft_wrap=True, markup=False)
    return 0


def _ground_truth(options: argparse.Namespace) -> Any:
    """The COCO file, or what a data set says."""
    path = Path(options.ground_truth)
    if not path.exists():
        raise InputError(f"{path} does not exist: check the path of --ground-truth")
    if is_one_file(options.ground_truth):
        if options.split is not None:
            raise InputError(f"--split goes with a data set that has splits; {path} is one COCO file")
        return path
    prepared = prepared_split(path, options.split or "val")
    if prepared is not None:
        return prepared[0]
    from crossdino.data.formats import load_dataset

    return load_dataset(path, options.split or "val", require_images=False).to_coco()
