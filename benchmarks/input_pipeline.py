"""How many training images a second are read, cut, augmented and put into batches, without any network.

    python -m benchmarks.input_pipeline [--data FOLDER] [--workers 0 1 2] [--items 48] [--quick] [--csv FILE]

Three kinds of data: the sample data set (or `--data`) in whole images; large JPEG files in tiles; large TIFF files in
tiles. Ours is the loader of `crossdino train` with the recipe's augmentation. The plain pipelines are what one writes
first: every item decodes its whole file, with Pillow or with torchvision (which has no TIFF), cuts the tile out, draws
the same sizes, flips, normalises and pads. They leave out the recipe's random crop, which makes them do less, not more.

A repetition waits for its first batch, so that starting processes does not count, and times the others.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from benchmarks.interleaved import ROOT, Case, Measurement, Report, interleave
from benchmarks.machine import describe
from benchmarks.tiled_prediction import write_image
from crossdino.config import DataConfig, with_changes
from crossdino.data import DatasetIndex, load_dataset
from crossdino.data.dataset import IMAGENET_MEAN, IMAGENET_STD, DetectionDataset, build_loader, collate
from crossdino.recipes import recipe
from crossdino.structures import Target
from crossdino.tiling import tile_grid
from crossdino.training.schedule import epoch_order

LARGE_WH = (6000, 4000)
TILE_PX = 512
BATCH_SIZE = 2
_HERE = "benchmarks.input_pipeline"


def write_large_images(folder: Path, suffix: str, size_wh: tuple[int, int], count: int = 2) -> Path:
    """Large images with small objects all over them, and a COCO file.

    Args:
        folder: where to.
        suffix: `.jpg` or `.tif`.
        size_wh: width and height in pixels.
        count: so many images.

    Returns:
        The COCO file.
    """
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(1, count + 1):
        path = folder / f"large{number}{suffix}"
        write_image(folder / "large.jpg", size_wh)
        if suffix == ".tif":
            with Image.open(folder / "large.jpg") as image:
                image.save(path, compression="tiff_deflate")
        else:
            (folder / "large.jpg").rename(path)
        images.append({"id": number, "file_name": path.name, "width": size_wh[0], "height": size_wh[1]})
        num_objects = size_wh[0] * size_wh[1] // 10_000
        corners = rng.uniform(0, np.array(size_wh) - 40, (num_objects, 2)).round(1)
        sides = rng.uniform(8, 40, (num_objects, 2)).round(1)
        for (x, y), (width, height) in zip(corners.tolist(), sides.tolist(), strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": 0}
                | {"bbox": [x, y, width, height], "area": width * height}
            )
    categories = [{"id": 1, "name": "object"}]
    path = folder / "train.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


# ---- in the workers ----


class PlainDataset(Dataset[tuple[Tensor, Target]]):
    """The tiles, or the whole images, of an index: one decoding of the whole file for each item.

    Args:
        index: the images.
        data: tiles and sizes.
        decoder: `pillow` or `torchvision`.
    """

    def __init__(self, index: DatasetIndex, data: DataConfig, decoder: str) -> None:
        self._index, self._decoder = index, decoder
        self._items = [
            (number, tile)
            for number, record in enumerate(index.records)
            for tile in (
                tile_grid((record.height, record.width), data.tile_px, data.tile_overlap) if data.tile_px else [None]
            )
        ]
        self._transform = v2.Compose(
            [
                v2.RandomHorizontalFlip(data.horizontal_flip),
                v2.RandomShortestSize(list(data.train_short_sides), data.train_long_side),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(IMAGENET_MEAN), list(IMAGENET_STD)),
            ]
        )

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, item: int) -> tuple[Tensor, Target]:
        number, tile = self._items[item]
        record = self._index.records[number]
        boxes = torch.from_numpy(record.boxes_xywh).float()
        pixels: Any
        if self._decoder == "pillow":
            with Image.open(record.path) as file:
                pixels = file.convert("RGB")
        else:
            pixels = _decode_with_torchvision(record.path)
        if tile is not None:
            pixels = v2.functional.crop(pixels, tile.top, tile.left, tile.height, tile.width)
            boxes = boxes - torch.tensor([tile.left, tile.top, 0, 0])
        hw = (record.height, record.width) if tile is None else (tile.height, tile.width)
        centres = boxes[:, :2] + boxes[:, 2:] / 2
        inside = ((centres >= 0) & (centres < torch.tensor([hw[1], hw[0]]))).all(dim=1)
        given = tv_tensors.BoundingBoxes(boxes[inside], format="XYWH", canvas_size=hw)  # type: ignore[call-overload]
        image, changed = self._transform(pixels, given)
        target = Target(changed.as_subclass(Tensor), torch.from_numpy(record.labels)[inside])
        return image.as_subclass(Tensor), target


def _decode_with_torchvision(path: Path) -> Tensor:
    # On its way out of torchvision, and still what most pipelines use; without it this row is left out.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torchvision.io import decode_image

        return decode_image(str(path), mode="RGB")  # type: ignore[arg-type]


def loading(
    annotations: str, tile_px: int, way: str, num_workers: int, num_items: int
) -> Callable[[], dict[str, float]]:
    """Batches of a training epoch, from its beginning.

    Args:
        annotations: a COCO file, or a folder with a data set.
        tile_px: side of the tiles in pixels; 0: whole images.
        way: `ours`, `pillow` or `torchvision`.
        num_workers: processes that load.
        num_items: images or tiles of a repetition.
    """
    data = with_changes(recipe("cross_dino_r50"), {"data.tile_size": tile_px}).data
    index = load_dataset(annotations, "train")
    if way == "ours":
        dataset: Any = DetectionDataset(index, data, train=True)
    else:
        dataset = PlainDataset(index, data, way)
    order = epoch_order(len(dataset), 0, 0)
    order = (list(order) * -(-num_items // len(order)))[:num_items]

    def repetition() -> dict[str, float]:
        if way == "ours":
            batches: Any = build_loader(dataset, BATCH_SIZE, order=order, num_workers=num_workers)
        else:
            batches = DataLoader(dataset, BATCH_SIZE, sampler=order, num_workers=num_workers, collate_fn=collate)
        batches = iter(batches)
        next(batches)
        start = time.perf_counter()
        num_images = sum(len(batch.images) for batch in batches)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "images": num_images}

    return repetition


# ---- the comparison ----


def make_cases(annotations: Path, tile_px: int, workers: Sequence[int], num_items: int, jpeg: bool) -> list[Case]:
    """Every way with every number of processes."""
    cases = []
    for way in ("ours", "pillow", *(["torchvision"] if jpeg else [])):
        for num_workers in workers:
            arguments = {"annotations": str(annotations), "tile_px": tile_px, "way": way}
            arguments |= {"num_workers": num_workers, "num_items": num_items}
            cases.append(Case(f"{way}, {num_workers} workers", f"{_HERE}:loading", arguments))
    return cases


def rows(cases: Sequence[Case], measured: dict[str, Measurement]) -> list[dict[str, Any]]:
    """A row a case."""
    rates = {name: one.extra["images"] / one.median for name, one in measured.items()}
    shown = []
    for case in (case for case in cases if case.name in measured):
        way, num_workers = case.arguments["way"], case.arguments["num_workers"]
        plain = rates.get(f"pillow, {num_workers} workers")
        shown.append(
            {
                "way": way,
                "workers": num_workers,
                "images/s": rates[case.name],
                "s": measured[case.name].median,
                "quartiles": "{:.3g} - {:.3g}".format(*measured[case.name].spread),
                "times Pillow": None if plain is None else rates[case.name] / plain,
            }
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.input_pipeline", description="Training input alone.")
    parser.add_argument("--data", type=Path, default=ROOT / "sample" / "train.json", help="a data set, taken whole")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of loading processes")
    parser.add_argument("--items", type=int, default=48, help="images or tiles of a repetition")
    parser.add_argument("--size", type=int, nargs=2, default=LARGE_WH, metavar=("W", "H"), help="of the large images")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one small JPEG file: the numbers mean nothing")
    parser.add_argument("--csv", type=Path, help="write the tables there, too")
    options = parser.parse_args(arguments)
    report = Report(describe(), options.csv)

    def measure(title: str, annotations: Path, tile_px: int, jpeg: bool) -> None:
        workers, num_items = ([0], 3 * BATCH_SIZE) if options.quick else (options.workers, options.items)
        cases = make_cases(annotations, tile_px, workers, num_items, jpeg and not options.quick)
        repetitions, warmup = (1, 0) if options.quick else (options.repetitions, 1)
        measured = interleave(cases, repetitions, warmup=warmup)
        report.table(f"training input, {title}", rows(cases, measured), f"batches of {BATCH_SIZE}")

    if not options.quick:
        jpeg = not any(options.data.parent.rglob("*.tif*"))
        measure(f"whole images of {options.data.name}", options.data, 0, jpeg)
    width, height = (1200, 900) if options.quick else options.size
    for suffix in (".jpg",) if options.quick else (".jpg", ".tif"):
        with tempfile.TemporaryDirectory() as folder:
            annotations = write_large_images(Path(folder), suffix, (width, height), 1 if options.quick else 2)
            measure(f"{width}x{height} {suffix} in tiles of {TILE_PX} px", annotations, TILE_PX, suffix == ".jpg")


if __name__ == "__main__":
    main()
