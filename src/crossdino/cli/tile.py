"""`crossdino tile`: cut a data set into tiles on disk."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdino.cli.output import make_console, num_cores
from crossdino.cli.values import not_negative, number, positive, tile_size
from crossdino.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from crossdino.data.index import DatasetIndex


def add_options(parser: argparse.ArgumentParser) -> None:
    """All options of `crossdino tile`."""
    parser.add_argument(
        "data", metavar="DATA", help="a folder, a YAML data file or a COCO JSON file, in COCO, YOLO or Pascal VOC form"
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="where SPLIT.json and the tiles in SPLIT/ go")
    parser.add_argument(
        "--tile-size",
        type=tile_size,
        required=True,
        metavar="PX",
        help="side of the tiles in pixels of the file, or auto: by the objects of the training data",
    )
    parser.add_argument(
        "--tile-overlap",
        type=not_negative,
        metavar="PX",
        help="of neighbouring tiles, at least (64, a quarter of small tiles)",
    )
    parser.add_argument("--split", metavar="NAME,...", help="which splits to cut (all)")
    parser.add_argument("--images", metavar="DIR", help="the images of a COCO JSON file")
    parser.add_argument(
        "--keep", type=number, default=0.4, metavar="SHARE", help="objects shown less than this are ignored (0.4)"
    )
    parser.add_argument(
        "--empty",
        type=_share,
        metavar="SHARE",
        help="training tiles without objects, as a share of those with (0.25), or all; other splits keep all",
    )
    parser.add_argument("--format", choices=("png", "jpg"), default="png", help="png keeps every pixel (png)")
    parser.add_argument("--quality", type=positive, default=95, metavar="N", help="of jpg, 1 to 100 (95)")
    parser.add_argument("--workers", type=positive, metavar="N", help="images cut at the same time (the cores)")


def run_tile(options: argparse.Namespace) -> int:
    """Cut the splits one after the other; 1 where images could not be read."""
    from crossdino.config import InferenceConfig
    from crossdino.data.cutting import CutSettings, cut_dataset
    from crossdino.tiling import choose_tiles

    if options.tile_size == 0:
        raise InputError("--tile-size is 0, which means whole images: give the tiles' side in pixels, or auto")
    output, console = Path(options.output), make_console()
    splits = _load(options, console)
    _refuse_source(output, Path(options.data), splits)
    if options.tile_size == "auto":
        size, overlap = _auto(next(iter(splits.values())), console)
    else:
        size, overlap = choose_tiles(InferenceConfig(), options.tile_size)
    overlap = overlap if options.tile_overlap is None else options.tile_overlap
    status = 0
    for name, index in splits.items():
        settings = CutSettings(
            size, overlap, options.keep, _empty_share(options, name), options.format, options.quality
        )
        with _Bar(console, name) as bar:
            result = cut_dataset(
                index, output, name, settings, num_processes=options.workers or num_cores(), on_image=bar.show
            )
        before = f" ({result.num_cut_before} of them before)" if result.num_cut_before else ""
        left_out = f", {result.num_left_out} without objects left out" if result.num_left_out else ""
        console.print(
            f"{result.annotations}: {result.num_images} images{before} in {result.num_tiles} tiles of {size} px "
            f"overlapping by {overlap} px or more{left_out}; {result.num_empty} tiles without objects; "
            f"{result.num_objects} annotations, {result.num_ignored} of them regions to ignore (iscrowd)",
            soft_wrap=True,
            markup=False,
        )
        for line in result.broken:
            console.print(f"warning: left out: {line}", soft_wrap=True, markup=False)
        status = status or int(bool(result.broken))
    return status


def _load(options: argparse.Namespace, console: Console) -> dict[str, DatasetIndex]:
    """Name of the result -> split, the one for training first."""
    from crossdino.data.coco import load_coco
    from crossdino.data.formats import ALIASES, find_splits, load_dataset

    path = Path(options.data)
    if path.suffix.lower() == ".json" and path.is_file():
        if options.split is not None:
            raise InputError(f"--split goes with a data set that has splits; {path} is one COCO file")
        found = {path.stem: load_coco(path, options.images)}
    else:
        if options.images is not None:
            raise InputError(f"--images goes with a COCO JSON file only; {path} says itself where its images are")
        canonical = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
        present = find_splits(path)
        wanted = [canonical.get(name, name) for name in options.split.split(",")] if options.split else list(present)
        for name in wanted:
            if name not in present:
                raise InputError(f"{path} has no split {name!r}, only {', '.join(present)} (--split)")
        found = {name: load_dataset(path, name) for name in present if name in wanted}
    for index in found.values():
        for line in index.problems.lines():
            console.print(f"{index.annotations}: {line}", soft_wrap=True, markup=False)
    return found


def _auto(index: DatasetIndex, console: Console) -> tuple[int, int]:
    """Size and overlap by the objects, for the input that recipes have unless told otherwise."""
    from crossdino.config import Config, with_changes
    from crossdino.data.tile_choice import with_tiles

    config, line = with_tiles(with_changes(Config(), {"data.tile_size": "auto"}), index)
    console.print(line.replace("data.tile_size", "--tile-size"), soft_wrap=True, markup=False)
    if not config.data.tile_px:
        raise InputError(
            f"--tile-size auto: whole images show the objects of {index.annotations} well enough, there is nothing to "
            "cut; give a number of pixels to cut all the same"
        )
    return config.data.tile_px, config.data.tile_overlap


def _refuse_source(output: Path, source: Path, splits: dict[str, DatasetIndex]) -> None:
    """Keep the tiles apart from what they are cut from."""
    place = output.resolve()
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; name a folder")
    folders = {record.path.parent.resolve() for index in splits.values() for record in index.records}
    if source.is_dir():
        folders.add(source.resolve())
    files = {source.resolve(), *(index.annotations.resolve() for index in splits.values())}
    for folder in folders:
        targets = {place / name for name in splits}
        if place.is_relative_to(folder) or any(
            target.is_relative_to(folder) or folder.is_relative_to(target) for target in targets
        ):
            raise InputError(f"--output {output} would put tiles among the images of {source}: name a folder elsewhere")
    for name in splits:
        if place / f"{name}.json" in files:
            raise InputError(f"--output {output} would replace {source}: name another folder")


def _empty_share(options: argparse.Namespace, name: str) -> float | None:
    """Which share of empty tiles a split keeps; None: all. What is measured on shall keep all of them."""
    if Path(options.data).suffix.lower() == ".json" and options.empty is not None:
        return None if options.empty == "all" else options.empty
    if "train" not in name.lower() or options.empty == "all":
        return None
    return 0.25 if options.empty is None else options.empty


class _Bar:
    """A progress bar on a terminal, nothing in a file."""

    def __init__(self, console: Console, name: str) -> None:
        from rich.progress import Progress

        self._progress = Progress(console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task(f"cutting {name}", total=None)

    def show(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()


def _share(text: str) -> float | str:
    if text == "all":
        return text
    try:
        return number(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text} must be a share, e.g. 0.25, or all") from None
