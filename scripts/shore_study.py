"""Train the compact recipe on tiles of the shore_livecams images, and keep its curves.

The images may not be redistributed, so this needs a copy of the data set (`train.json` and the images in `train/`).
Where its `val.json` is there too, that is what is measured on. Where it is missing, the second day of three of the
cameras is held out of the training images instead: other days of known scenes, as in the source's own split.

    python scripts/shore_study.py --data DIR --output runs/shore [--minutes 85] [--resume]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from crossdino.config import with_changes
from crossdino.recipes import compact
from crossdino.training import train

HELD_OUT_CAMERAS = ("519srew5", "dlwkigk3", "proylddb")
HELD_OUT_DAY = "2022-07-19"

SETTINGS: dict[str, Any] = {
    "name": "shore_livecams",
    # Tiles at native resolution, sometimes 0.85 to 1.6 times as large: half of the objects have less than 16 px.
    "data.tile_size": 448,
    "data.tile_overlap": 64,
    "data.empty_tiles": 0.25,
    # Webcams have an upright direction.
    "data.vertical_flip": 0.0,
    "data.quarter_turns": False,
    "data.copy_paste": 0.3,
    "evaluation.size_bands": {
        "0-8": [0, 8],
        "8-16": [8, 16],
        "16-32": [16, 32],
        "small": [0, 32],
        "medium": [32, 96],
        "large": [96, 1e5],
    },
    "training.best_metric": "ap small",
    "training.epochs": 4,
    "training.schedule": "cosine",
    "training.evaluate_every": 1,
}


def is_held_out(file_name: str) -> bool:
    """Whether an image belongs to the day and the cameras that are held out."""
    return file_name.startswith(HELD_OUT_CAMERAS) and f"_{HELD_OUT_DAY}_" in file_name


def split(source: Path, folder: Path) -> tuple[Path, Path]:
    """Write the two parts of a COCO file into `folder`; returns the training and the validation file."""
    document = json.loads(source.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for part in ("train", "held_out"):
        images = [image for image in document["images"] if is_held_out(image["file_name"]) == (part == "held_out")]
        ids = {image["id"] for image in images}
        annotations = [item for item in document["annotations"] if item["image_id"] in ids]
        paths.append(folder / f"{part}.json")
        paths[-1].write_text(json.dumps({**document, "images": images, "annotations": annotations}), encoding="utf-8")
        print(f"{paths[-1]}: {len(images)} images, {len(annotations)} objects")
    return paths[0], paths[1]


def main() -> None:
    """Split if need be, and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.json and train/")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=85.0, help="stop after so long")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    changes = {**SETTINGS, "training.output": str(options.output), "training.max_minutes": options.minutes}
    if (options.data / "val.json").is_file():
        changes["data.source"] = str(options.data)
    else:
        train_file, val_file = split(options.data / "train.json", options.output / "split")
        changes |= {"data.train_annotations": str(train_file), "data.val_annotations": str(val_file)}
        changes |= dict.fromkeys(("data.train_images", "data.val_images"), str(options.data / "train"))
    train(with_changes(compact(), changes), resume=options.resume)


if __name__ == "__main__":
    main()
