"""What another number format does to boxes: the shift of the detections in pixels, and average precision by size.

    python -m benchmarks.bf16_accuracy [--weights weights/trees] [--dtype bfloat16] [--csv FILE]
        [--ground-truth sample/val_strip.json sample/val_sites.json sample/train.json]

The same model looks at the same images in float32 and in the other format. A detection of float32 with a score of 0.3
or more is paired with the one of the other run that overlaps it most (same class, IoU 0.5 or more, one to one); its
shift is the mean distance of the four edges in pixels of the original image. What finds no partner is counted as lost.
Average precision is COCO's, of all objects, of those under 32 px, and in bands of 0-16, 16-32, 32-96 px and above.

Wanted: under 0.1 px on average for objects under 32 px, and average precision within 0.002. It is judged on all files
pooled into one evaluation, and only in bands of 100 objects or more: where there are fewer, a single detection that
changes its place in the order moves the figure by more than that, in either direction. The other rows, and those of
each file, are shown and not judged. The exit status is 1 where the wanted is not reached, or nothing could be judged.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import supervision as sv
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment

from crossdino import CrossDINO, Predictor
from crossdino.evaluation import evaluate_detections
from crossdino.postprocessing import detections_to_coco

SMALL = "under 32 px"
BANDS = {
    SMALL: (0.0, 32.0),
    "0-16 px": (0.0, 16.0),
    "16-32 px": (16.0, 32.0),
    "32-96 px": (32.0, 96.0),
    "from 96 px": (96.0, 1e5),
}
SCORE, SAME_IOU = 0.3, 0.5
MOST_SHIFT_PX, MOST_AP = 0.1, 0.002
LEAST_OBJECTS = 100
POOLED = "all files"
COLUMNS = (
    *("data", "objects", "number", "pairs", "lost", "edge (px)", "95 % (px)", "largest (px)", "score"),
    *("AP", "AP there", "judged"),
)


@dataclass
class Runs:
    """Two runs over the images of a COCO file.

    Attributes:
        truth: the file's content; categories are numbered as the model's classes, from 1.
        found: the results of float32 and of the other format.
        pairs: (n, 4), a row for each pair: side of the object, mean and largest distance of an edge in pixels,
            difference of the scores.
        lost_sides: (m,) sides in pixels of the detections without a partner.
    """

    truth: dict[str, Any]
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]]
    pairs: np.ndarray
    lost_sides: np.ndarray


def pair(exact: sv.Detections, other: sv.Detections) -> tuple[np.ndarray, np.ndarray]:
    """Which detections of two runs are the same: positions in both."""
    assert exact.class_id is not None and other.class_id is not None, "a Predictor sets both"
    overlap = sv.box_iou_batch(exact.xyxy, other.xyxy)
    overlap = np.where(exact.class_id[:, None] == other.class_id[None], overlap, 0.0)
    first, second = linear_sum_assignment(-overlap)
    same = overlap[first, second] >= SAME_IOU
    return first[same], second[same]


def read_truth(path: Path, class_names: list[str]) -> dict[str, Any]:
    """A COCO file, its categories numbered as the model's classes, from 1, and its images with their folder."""
    truth = json.loads(path.read_text(encoding="utf-8"))
    own = {category["id"]: category["name"] for category in truth["categories"]}
    unknown = sorted(set(own.values()) - set(class_names))
    if unknown:
        sys.exit(f"{path}: the model does not know the class {unknown[0]}; it knows {', '.join(class_names)}")
    number = {identity: class_names.index(name) + 1 for identity, name in own.items()}
    return {
        "images": [{**image, "file_name": str(path.parent / image["file_name"])} for image in truth["images"]],
        "annotations": [{**one, "category_id": number[one["category_id"]]} for one in truth["annotations"]],
        "categories": [{"id": place, "name": name} for place, name in enumerate(class_names, 1)],
    }


def run_both(predictors: list[Predictor], truth: dict[str, Any]) -> Runs:
    """Look at the images of a COCO file twice."""
    category_ids = [category["id"] for category in truth["categories"]]
    rows, lost, found = [np.zeros((0, 4))], [np.zeros(0)], ([], [])
    for image in truth["images"]:
        exact, other = (predictor(image["file_name"]) for predictor in predictors)
        for results, detections in zip(found, (exact, other), strict=True):
            results += detections_to_coco(detections, image["id"], category_ids)
        assert exact.confidence is not None and other.confidence is not None, "a Predictor sets both"
        exact = exact[exact.confidence >= SCORE]
        first, second = pair(exact, other)
        edges = np.abs(exact.xyxy[first].astype(np.float64) - other.xyxy[second])
        sides = np.sqrt((exact.xyxy[:, 2:] - exact.xyxy[:, :2]).prod(1))
        scores = np.abs(exact.confidence[first] - other.confidence[second])
        rows.append(np.stack((sides[first], edges.mean(1), edges.max(1, initial=0), scores), axis=1))
        lost.append(np.delete(sides, first))
    return Runs(truth, found, np.concatenate(rows), np.concatenate(lost))


def pool(runs: list[Runs]) -> Runs:
    """All files as one: images and objects get new numbers, so that equal ones of two files stay apart."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for one in runs:
        number = {image["id"]: len(images) + place for place, image in enumerate(one.truth["images"], 1)}
        images += [{**image, "id": number[image["id"]]} for image in one.truth["images"]]
        for annotation in one.truth["annotations"]:
            annotations.append({**annotation, "id": len(annotations) + 1, "image_id": number[annotation["image_id"]]})
        for all_results, results in zip(found, one.found, strict=True):
            all_results += [{**result, "image_id": number[result["image_id"]]} for result in results]
    truth = {"images": images, "annotations": annotations, "categories": runs[0].truth["categories"]}
    pairs, lost = (np.concatenate([getattr(one, name) for one in runs]) for name in ("pairs", "lost_sides"))
    return Runs(truth, found, pairs, lost)


def make_rows(name: str, runs: Runs, judge: bool) -> list[dict[str, Any]]:
    """The table's rows of one file, or of all.

    Args:
        name: of the file.
        runs: what was found.
        judge: hold the rows that have enough objects against what is wanted.
    """
    exact, other = (evaluate_detections(runs.truth, results, size_bands=BANDS) for results in runs.found)
    rows: list[dict[str, Any]] = []
    for band, (low, high) in {"all": (0.0, np.inf), **BANDS}.items():
        number = (exact if band == "all" else exact.by_size[band]).num_objects
        some = runs.pairs[(runs.pairs[:, 0] >= low) & (runs.pairs[:, 0] < high)]
        lost = int(((runs.lost_sides >= low) & (runs.lost_sides < high)).sum())
        if not number and not len(some) and not lost:
            continue
        ap, ap_there = (result.ap if band == "all" else result.by_size[band].ap for result in (exact, other))
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row |= {"data": name, "objects": band, "number": number, "pairs": len(some), "lost": lost}
        if len(some):
            row |= {"edge (px)": some[:, 1].mean(), "95 % (px)": np.quantile(some[:, 1], 0.95)}
            row |= {"largest (px)": some[:, 2].max(), "score": some[:, 3].mean()}
        if number:
            row |= {"AP": ap, "AP there": ap_there}
        if judge and number >= LEAST_OBJECTS:
            good = abs(ap - ap_there) <= MOST_AP
            if band == SMALL:
                good = good and len(some) > 0 and row["edge (px)"] < MOST_SHIFT_PX
            row["judged"] = "good" if good else "too much"
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).parents[1]
    files = [root / "sample" / f"{name}.json" for name in ("val_strip", "val_sites", "train")]
    parser.add_argument("--weights", default=str(root / "weights" / "trees"))
    parser.add_argument("--ground-truth", type=Path, nargs="+", default=files)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of torch (as it is)")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = CrossDINO.from_pretrained(options.weights, device=options.device)
    predictors = [Predictor(model, dtype=dtype) for dtype in ("float32", options.dtype)]
    class_names = list(model.config.class_names)
    runs = [run_both(predictors, read_truth(path, class_names)) for path in options.ground_truth]
    rows = make_rows(POOLED, pool(runs), judge=True)
    for path, one in zip(options.ground_truth, runs, strict=True):
        rows += make_rows(path.stem, one, judge=False)
    verdicts = {row["judged"] for row in rows} - {None}

    console, table = Console(width=150), Table(title=f"{options.dtype} against float32, {options.weights}")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in (*COLUMNS[:2], COLUMNS[-1]) else "right")
    for row in rows:
        table.add_row(*("" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)
    told = "reached" if verdicts == {"good"} else "not reached" if verdicts else "nothing to judge"
    console.print(
        f"Wanted: under {MOST_SHIFT_PX} px for objects {SMALL}, average precision within {MOST_AP}, of all files "
        f"pooled, in bands of {LEAST_OBJECTS} objects or more (the others are shown and not judged): {told}"
    )
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return 0 if verdicts == {"good"} else 1


if __name__ == "__main__":
    sys.exit(main())
