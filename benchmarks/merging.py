"""Which way of merging is best on crowded scenes, and how long 200,000 boxes take.

    python benchmarks/merging.py [--ground-truth COCO.json ...] [--csv results.csv] [--images 6]
    python benchmarks/merging.py --speed [--boxes 200000]

A simulated detector looks at every tile. It sees the visible part of each object, misses some, the more the less of
an object is visible, is off by a share of the object's size and a pixel, doubles some with a lower score, and finds
things that are not there. Scenes: objects of several sizes and densities, in rows of neighbours that touch or overlap,
some larger than the tiles' overlap; or the real objects of `--ground-truth`. Seeds are fixed. AP is that of
`crossdino.evaluation`; the other counts are at a score of 0.3: `doubles`, detections beyond the first that lie on an
object (IoU 0.3); `lost`, objects that no detection of their own is left for although some tile detected them.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torchvision.ops import batched_nms, box_iou

from crossdino.evaluation.average_precision import evaluate_detections
from crossdino.merging import merge_detections
from crossdino.tiling import Tile, tile_grid

MODES = ("seam", "nms", "soft")


def crowd(rng: np.random.Generator, side: int, size: float, count: int, near: float) -> np.ndarray:
    """Objects, most of them in rows whose neighbours are `near` of a width apart (below 1 they overlap)."""
    boxes: list[list[float]] = []
    while len(boxes) < count:
        width, height = size * np.exp(rng.normal(0, 0.35, 2))
        x, y = rng.uniform(0, side - width), rng.uniform(0, side - height)
        for place in range(int(rng.integers(1, 6))):
            shift = place * near * width
            jitter = rng.normal(0, 0.05 * size, 2)
            box = [x + shift + jitter[0], y + jitter[1], x + shift + jitter[0] + width, y + jitter[1] + height]
            if box[0] >= 0 and box[1] >= 0 and box[2] <= side and box[3] <= side:
                boxes.append(box)
    return np.array(boxes[:count], dtype=np.float32)


def detect(rng: np.random.Generator, truth: np.ndarray, labels: np.ndarray, tile: Tile) -> tuple[Any, Any, Any]:
    """What a detector would find in a tile."""
    corner = np.array([tile.left, tile.top] * 2)
    limit = np.array([tile.width, tile.height] * 2)
    visible = np.clip(truth - corner, 0, limit)
    sides = visible[:, 2:] - visible[:, :2]
    share = sides.prod(1) / (truth[:, 2:] - truth[:, :2]).prod(1)
    found = np.flatnonzero((sides.min(1) > 3) & (rng.random(len(truth)) < 0.95 * np.clip(share * 2, 0, 1) ** 0.5))
    found = np.concatenate((found, found[rng.random(len(found)) < 0.15]))
    double = np.concatenate((np.zeros(len(found), bool), np.ones(0, bool)))
    double[np.unique(found, return_index=True)[1]] = True
    double = ~double
    boxes, size = visible[found], np.tile(sides[found], 2)
    boxes = boxes + rng.normal(0, 1, boxes.shape) * (0.5 + 0.04 * size)
    logits = rng.normal(1.2, 0.8, len(found)) + 0.8 * np.log(np.maximum(share[found], 0.05)) - 2 * double
    false = max(1, len(found) // 4)
    middle, extent = (
        rng.uniform(0, 1, (false, 2)) * limit[:2],
        np.full((false, 2), np.median(truth[:, 2:] - truth[:, :2])),
    )
    boxes = np.clip(np.concatenate((boxes, np.concatenate((middle - extent / 2, middle + extent / 2), 1))), 0, limit)
    scores = 1 / (1 + np.exp(-np.concatenate((logits, rng.normal(-2, 1, false)))))
    classes = np.concatenate((labels[found], rng.choice(labels, false)))
    good = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return (
        torch.from_numpy(boxes[good].astype(np.float32)),
        torch.from_numpy(scores[good].astype(np.float32)),
        torch.from_numpy(classes[good].astype(np.int64)),
    )


def counts(found: tuple[Any, Any, Any], truth: np.ndarray, labels: np.ndarray, seen: np.ndarray) -> tuple[int, int]:
    """Doubles, and objects that were seen and lost."""
    sure = found[1] >= 0.3
    overlap = box_iou(found[0][sure], torch.from_numpy(truth)).numpy()
    overlap = overlap * (found[2][sure].numpy()[:, None] == labels[None])
    on_object = (overlap > 0.3).any(1)
    rows, columns = linear_sum_assignment(-np.where(overlap > 0.3, overlap, 0))
    matched = overlap[rows, columns] > 0.3
    own = np.zeros(len(truth), bool)
    own[columns[matched]] = True
    return int(on_object.sum() - matched.sum()), int((seen & ~own).sum())


def measure(
    name: str, images: list[tuple[np.ndarray, np.ndarray, tuple[int, int]]], size: int, overlap: int
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    results: dict[str, list[Any]] = {mode: [] for mode in MODES}
    totals = {mode: [0, 0] for mode in MODES}
    objects: list[dict[str, Any]] = []
    for number, (truth, labels, hw) in enumerate(images, start=1):
        tiles = tile_grid(hw, size, overlap)
        parts = [detect(rng, truth, labels, tile) for tile in tiles]
        seen = np.zeros(len(truth), bool)
        for (boxes, scores, classes), tile in zip(parts, tiles, strict=True):
            moved = boxes[scores >= 0.3] + torch.tensor([tile.left, tile.top] * 2)
            near = box_iou(moved, torch.from_numpy(truth)).numpy() * (classes[scores >= 0.3].numpy()[:, None] == labels)
            seen |= (near > 0.5).any(0)
        for box, label in zip(truth.astype(float), labels, strict=True):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            objects.append({"image_id": number, "category_id": int(label) + 1, "bbox": bbox, "id": len(objects) + 1})
        for mode in MODES:
            found = merge_detections(parts, tiles, hw, 0.5, mode)
            doubles, lost = counts(found, truth, labels, seen)
            totals[mode][0] += doubles
            totals[mode][1] += lost
            for box, score, label in zip(*(value.double().tolist() for value in found), strict=True):
                bbox = [box[0], box[1], max(box[2] - box[0], 0), max(box[3] - box[1], 0)]
                results[mode].append({"image_id": number, "category_id": int(label) + 1, "bbox": bbox, "score": score})
    classes = sorted({item["category_id"] for item in objects})
    frame = {
        "images": [{"id": n + 1} for n in range(len(images))],
        "categories": [{"id": k, "name": str(k)} for k in range(1, max(classes) + 1)],
    }
    rows = []
    for mode in MODES:
        result = evaluate_detections({**frame, "annotations": objects}, results[mode], max_detections=5000)
        rows.append(
            {
                "scene": name, "tile": size, "overlap": overlap, "objects": len(objects), "mode": mode,
                "ap": round(100 * result.ap, 2), "ap50": round(100 * result.ap50, 2), "ar": round(100 * result.ar, 2),
                "doubles": totals[mode][0], "lost": totals[mode][1],
            }
        )  # fmt: skip
    return rows


def read_truth(path: Path, limit: int) -> list[tuple[np.ndarray, np.ndarray, tuple[int, int]]]:
    """The most crowded images of a COCO file."""
    data = json.loads(path.read_text(encoding="utf-8"))
    order = {category["id"]: number for number, category in enumerate(data["categories"])}
    by_image: dict[int, list[Any]] = {}
    for item in data["annotations"]:
        if not item.get("iscrowd") and min(item["bbox"][2:]) > 0:
            by_image.setdefault(item["image_id"], []).append(item)
    chosen = sorted(
        (image for image in data["images"] if image["id"] in by_image), key=lambda image: -len(by_image[image["id"]])
    )
    images = []
    for image in chosen[:limit]:
        boxes = np.array([item["bbox"] for item in by_image[image["id"]]], dtype=np.float32)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([order[item["category_id"]] for item in by_image[image["id"]]])
        images.append((boxes, labels, (image["height"], image["width"])))
    return images


def quality(options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    if options.ground_truth:
        for path in options.ground_truth:
            images = read_truth(path, options.images)
            size = max(64, min(min(hw) for _, _, hw in images) // 2)
            for overlap in (0, size // 8, size // 4):
                rows += measure(path.stem, images, size, overlap)
    else:
        for name, object_px, count, near, overlap in (
            ("small, sparse", 12, 300, 1.3, 32),
            ("small, touching", 12, 800, 1.0, 32),
            ("small, overlapping", 12, 800, 0.4, 32),
            ("mid, touching", 40, 200, 1.0, 64),
            ("mid, overlapping", 40, 200, 0.35, 64),
            ("mid, overlap below size", 40, 200, 0.7, 16),
            ("mid, no overlap", 40, 200, 1.05, 0), ("large, overlap below size", 150, 25, 0.9, 64),
        ):  # fmt: skip
            rng = np.random.default_rng(1)
            scenes = [
                (crowd(rng, 1200, object_px, count, near), np.zeros(count, dtype=np.int64), (1200, 1200))
                for _ in range(options.images)
            ]
            rows += measure(name, scenes, 320, overlap)
    table = Table(title="merging, by a simulated detector; doubles and lost at score 0.3")
    for header in rows[0]:
        table.add_column(header, justify="left" if header in ("scene", "mode") else "right")
    for number, row in enumerate(rows, start=1):
        table.add_row(*map(str, row.values()), end_section=number % len(MODES) == 0)
    Console(width=120).print(table)
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def speed(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rng, count = np.random.default_rng(0), options.boxes
    print("|", " | ".join(("scene", "tiles", *MODES, "torchvision batched_nms")), "|\n|", "---|" * 6, sep="")
    for name, side, size, overlap, spread, low, high in (
        ("spread", 20000, 640, 64, 1.0, 10, 40),
            ("4 to 600 px", 20000, 640, 64, 1.0, 4, 600),
            ("half overlap", 20000, 640, 320, 1.0, 10, 40),
        ("many tiles", 20000, 128, 32, 1.0, 4, 60),
            ("dense", 4000, 640, 64, 1.0, 10, 40), ("4 to 3000 px", 20000, 4000, 400, 1.0, 4, 3000),
        ("one spot", 1216, 640, 64, 0.005, 20, 40),
    ):  # fmt: skip
        tiles = tile_grid((side, side), size, overlap)
        tile_of = np.sort(rng.integers(0, len(tiles), count))
        extent = np.exp(rng.uniform(np.log(low), np.log(high), (count, 2)))
        middle = rng.uniform(0.5 - spread / 2, 0.5 + spread / 2, (count, 2)) * size
        boxes = torch.from_numpy(
            np.clip(np.concatenate((middle - extent / 2, middle + extent / 2), 1), 0, size).astype(np.float32)
        )
        scores, labels = torch.from_numpy(rng.random(count).astype(np.float32)), torch.zeros(count, dtype=torch.int64)
        edges = np.searchsorted(tile_of, np.arange(len(tiles) + 1))
        parts = [(boxes[a:b], scores[a:b], labels[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        cells = []
        for mode in MODES:
            start = time.perf_counter()
            left = len(merge_detections(parts, tiles, (side, side), 0.5, mode)[0])
            cells.append(f"{time.perf_counter() - start:.1f} ({left})")
        corners = torch.tensor([[tiles[k].left, tiles[k].top] * 2 for k in tile_of], dtype=torch.float32)
        start = time.perf_counter()
        left = len(batched_nms(boxes + corners, scores, labels, 0.5))
        cells.append(f"{time.perf_counter() - start:.1f} ({left})")
        print("|", " | ".join((name, str(len(tiles)), *cells)), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ways of merging, on crowded scenes.")
    parser.add_argument("--ground-truth", type=Path, nargs="+", help="COCO files whose objects are taken")
    parser.add_argument("--images", type=int, default=6, help="images a scene; of a file the most crowded")
    parser.add_argument("--csv", type=Path, help="also write the numbers there")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--boxes", type=int, default=200_000, help="of --speed")
    options = parser.parse_args()
    (speed if options.speed else quality)(options)


if __name__ == "__main__":
    main()
