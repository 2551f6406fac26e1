"""`crossdino convert-results`: result files of one toolkit as those of another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

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
    from crossdino.exchange import read_results, write_results
    from crossdino.exchange.results import check_format_place

    source, output = Path(options.source), Path(options.output)
    check_format_place(output, options.target_format)
    for path in (source, Path(options.ground_truth)):
        if output.exists() and path.exists() and output.samefile(path):
            raise InputError(f"--output {output} would replace {path}: name another place")
    console = make_console()
    truth = _ground_truth(options)

    def say(line: str) -> None:
        console.print(f"note: {line}", soft_wrap=True, markup=False)

    results = read_results(source, options.source_format, truth, on_note=say)
    write_results(results, output, options.target_format, truth, on_note=say)
    num_images = len({result["image_id"] for result in results})
    line = f"{output}: {len(results)} detections of {num_images} images, as {options.target_format}"
    console.print(line, soft_wrap=True, markup=False)
    return 0


def _ground_truth(options: argparse.Namespace) -> Any:
    """The COCO file, or what a data set says."""
    path = Path(options.ground_truth)
    if path.is_dir() or path.suffix.lower() in (".yaml", ".yml"):
        from crossdino.data.formats import load_dataset

        return load_dataset(path, options.split or "val", require_images=False).to_coco()
    if options.split is not None:
        raise InputError(f"--split goes with a data set that has splits; {path} is one COCO file")
    return path
