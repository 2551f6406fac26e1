"""The demo: detect with the shipped weights on held-out images, measure, draw, then train for about two minutes.

Run by `make demo`. Every step is a command of the command line, printed before it runs, so that it can be repeated by
hand. Results go to `runs/demo`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="OpenCV .*is not installed")

import numpy as np  # noqa: E402
import supervision as sv  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.rule import Rule  # noqa: E402

from crossdino.cli import main as crossdino  # noqa: E402
from crossdino.visualization import draw_comparison  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SAMPLE, WEIGHTS, OUTPUT = Path("sample"), Path("weights/trees"), Path("runs/demo")
HELD_OUT = {
    "strip": "the held-out strip of the site that the weights were trained on",
    "sites": "two other sites, which they have never seen (transfer)",
}
THRESHOLD = 0.3


def run(console: Console, *words: str | Path) -> None:
    """Print a command of the command line, run it, and stop if it fails."""
    arguments = [str(word) for word in words]
    console.print(f"\n[bold cyan]$ crossdino {' '.join(arguments)}[/]", soft_wrap=True, highlight=False)
    status = crossdino(arguments)
    if status:
        sys.exit(status)


def draw_comparisons(ground_truth: Path, predictions: Path, folder: Path) -> list[Path]:
    """Draw the detections of every image of a data set against its objects; returns the pictures."""
    truth = json.loads(ground_truth.read_text())
    detected = json.loads(predictions.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for record in truth["images"]:
        objects = [a["bbox"] for a in truth["annotations"] if a["image_id"] == record["id"]]
        found = [d for d in detected if d["image_id"] == record["id"]]
        boxes = np.array([d["bbox"] for d in found], dtype=np.float32).reshape(-1, 4)
        scores = np.array([d["score"] for d in found], dtype=np.float32)
        detections = sv.Detections(sv.xywh_to_xyxy(boxes), confidence=scores, class_id=np.zeros(len(found), dtype=int))
        objects_xyxy = sv.xywh_to_xyxy(np.array(objects, dtype=np.float32).reshape(-1, 4))
        with Image.open(ground_truth.parent / record["file_name"]) as image:
            picture = draw_comparison(image.convert("RGB"), detections, objects_xyxy, threshold=THRESHOLD)
        pictures.append(folder / f"{Path(record['file_name']).stem}.png")
        picture.save(pictures[-1])
    return pictures


def main() -> None:
    """Run all steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=2.0, help="how long to train (2)")
    minutes = parser.parse_args().minutes
    console = Console()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)

    console.print(Rule("1. Detect with the shipped weights and measure"))
    for name, what in HELD_OUT.items():
        console.print(f"\n{what[0].upper()}{what[1:]}:")
        truth, predictions = SAMPLE / f"val_{name}.json", OUTPUT / f"{name}_predictions.json"
        run(
            console, "evaluate", "--weights", WEIGHTS, "--ground-truth", truth, "--predictions-out", predictions,
            "--size-bands", "small=0-32,medium=32-96", "--json", OUTPUT / f"{name}.json",
        )  # fmt: skip
        draw_comparisons(truth, predictions, OUTPUT / "comparisons")

    console.print(Rule("2. Annotated pictures"))
    run(
        console, "predict", "--weights", WEIGHTS, SAMPLE / "val", "--output", OUTPUT / "pictures",
        "--threshold", str(THRESHOLD),
    )  # fmt: skip
    console.print(
        f"\nDetections against the ground truth: {OUTPUT / 'comparisons'} "
        "(blue: found, orange: false, dashed with a triangle: missed)",
        soft_wrap=True,
    )

    console.print(Rule(f"3. Train for {minutes:g} minutes from the backbone's ImageNet weights"))
    run(
        console, "train", "--recipe", "compact", "--output", OUTPUT / "training", "--overwrite",
        "--data.train_annotations", SAMPLE / "train.json", "--data.val_annotations", SAMPLE / "val_strip.json",
        "--data.num_workers", "0", "--training.warmup_steps", "20", "--training.ema_decay", "0.9",
        "--training.evaluate_every", "3", "--training.max_minutes", str(minutes),
    )  # fmt: skip

    console.print(Rule("Your own data"))
    console.print(
        "A folder in COCO, YOLO or Pascal VOC layout:\n\n"
        "  .venv/bin/crossdino inspect FOLDER --recipe compact --output plan\n"
        "  .venv/bin/crossdino train --recipe compact --config plan/proposal.yaml --data FOLDER --output runs/mine\n"
        "  .venv/bin/crossdino predict --weights runs/mine/best IMAGES --output results\n",
        soft_wrap=True,
        highlight=False,
    )


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
