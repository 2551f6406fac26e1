"""Which way of merging is best on crowded scenes, and how long 200,000 boxes take.

    python -m benchmarks.merging [--ground-truth COCO.json ...] [--csv results.csv] [--images 6]
    python -m benchmarks.merging --weights MODEL --ground-truth COCO.json ... [--tile-size 256 300]
    python -m benchmarks.merging --speed [--boxes 200000] [--torchvision 20000]

A simulated detector looks at every tile. It sees the visible part of each object, misses some, the more the less of
an object is visible, is off by a share of the object's size and a pixel, doubles some with a lower score, and finds
things that are not there. Scenes: objects of several sizes and densities, in rows of neighbours that touch or overlap,
some larger than the tiles' overlap; or the real objects of `--ground-truth`. With `--weights` a real model looks at
their images. Seeds are fixed. AP is that of `crossdino.evaluation`; the other counts are at a score of 0.3: `doubles`,
detections beyond the first that lie on an object (IoU 0.3); `lost`, objects that no detection of their own is left for
although some tile detected them.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torchvision.ops import batched_nms, box_iou

from crossdino import CrossDINO, Predictor
from crossdino.evaluation.average_precision import evaluate_detections
from crossdino.merging import merge_detections
from crossdino.sources import as_picture
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
    double = np.ones(len(found), bool)
    double[np.unique(found, return_index=True)[1]] = False
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


def simulate(
    images: list[tuple[np.ndarray, np.ndarray, tuple[int, int]]], size: int, overlap: int
) -> Iterator[tuple[list[Tile], list[Any]]]:
    """Tiles of each image, and what the simulated detector finds there."""
    rng = np.random.default_rng(0)
    for truth, labels, hw in images:
        tiles = tile_grid(hw, size, overlap)
        yield tiles, [detect(rng, truth, labels, tile) for tile in tiles]


def look(
    predictor: Predictor, paths: list[Path], hws: list[tuple[int, int]], size: int, overlap: int
) -> Iterator[tuple[list[Tile], list[Any]]]:
    """Tiles of each image, and what a real model finds there."""
    for path, hw in zip(paths, hws, strict=True):
        tiles = tile_grid(hw, size, overlap)
        with as_picture(path) as picture:
            found = list(predictor.predict_many(picture.read(tile) for tile in tiles))
        yield tiles, [tuple(map(torch.from_numpy, (d.xyxy, d.confidence, d.class_id))) for d in found]


def measure(
    name: str,
    images: list[tuple[np.ndarray, np.ndarray, tuple[int, int]]],
    size: int,
    overlap: int,
    looks: Iterable[tuple[list[Tile], list[Any]]] | None = None,
    full_share: float | None = None,
) -> list[dict[str, Any]]:
    """A row for each mode. With `full_share` a look at the whole image, reduced by so much, is joined in."""
    rng = np.random.default_rng(2)
    results: dict[str, list[Any]] = {mode: [] for mode in MODES}
    totals = {mode: [0, 0] for mode in MODES}
    objects: list[dict[str, Any]] = []
    looks = simulate(images, size, overlap) if looks is None else looks
    for number, ((truth, labels, hw), (tiles, parts)) in enumerate(zip(images, looks, strict=True), start=1):
        full = None
        if full_share is not None:
            boxes, scores, classes = detect(
                rng, truth * full_share, labels, Tile(0, 0, *(int(x * full_share) for x in hw))
            )
            full = boxes / full_share, scores, classes
        seen = np.zeros(len(truth), bool)
        for (boxes, scores, classes), tile in zip(parts, tiles, strict=True):
            moved = boxes[scores >= 0.3] + torch.tensor([tile.left, tile.top] * 2)
            near = box_iou(moved, torch.from_numpy(truth)).numpy() * (classes[scores >= 0.3].numpy()[:, None] == labels)
            seen |= (near > 0.5).any(0)
        for box, label in zip(truth.astype(float), labels, strict=True):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            objects.append({"image_id": number, "category_id": int(label) + 1, "bbox": bbox, "id": len(objects) + 1})
        for mode in MODES:
            found = merge_detections(parts, tiles, hw, 0.5, mode, full)
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


def read_truth(path: Path, limit: int) -> tuple[list[tuple[np.ndarray, np.ndarray, tuple[int, int]]], list[Path]]:
    """The most crowded images of a COCO file, and their files."""
    data = json.loads(path.read_text(encoding="utf-8"))
    order = {category["id"]: number for number, category in enumerate(data["categories"])}
    by_image: dict[int, list[Any]] = {}
    for item in data["annotations"]:
        if not item.get("iscrowd") and min(item["bbox"][2:]) > 0:
            by_image.setdefault(item["image_id"], []).append(item)
    chosen = sorted(
        (image for image in data["images"] if image["id"] in by_image), key=lambda image: -len(by_image[image["id"]])
    )[:limit]
    images = []
    for image in chosen:
        boxes = np.array([item["bbox"] for item in by_image[image["id"]]], dtype=np.float32)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([order[item["category_id"]] for item in by_image[image["id"]]])
        images.append((boxes, labels, (image["height"], image["width"])))
    return images, [path.parent / image["file_name"] for image in chosen]


def quality(options: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    if options.weights:
        model = CrossDINO.from_pretrained(options.weights)
        truths = [read_truth(path, options.images) for path in options.ground_truth]
        images = [image for some, _ in truths for image in some]
        paths = [path for _, some in truths for path in some]
        # Every tile is resized as the model resizes images.
        predictor = Predictor(model, tile_size=0, batch_size=4, num_threads=1)
        for size in options.tile_size:
            for overlap in (0, size // 8, size // 4):
                looks = look(predictor, paths, [hw for _, _, hw in images], size, overlap)
                rows += measure(options.weights.name, images, size, overlap, looks)
    elif options.ground_truth:
        for path in options.ground_truth:
            images, _ = read_truth(path, options.images)
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
            if object_px == 150:
                rows += measure(f"{name}, full", scenes, 320, overlap, full_share=0.25)
    table = Table(title="merging; doubles and lost at score 0.3")
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


def processor() -> str:
    """The name of the machine's processor, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def heap_of_boxes(
    rng: np.random.Generator, count: int, side: int, tiles: list[Tile], low: float, high: float, spot: float | None
) -> list[Any]:
    """Boxes all over the image, or all at one place (`spot`, a share of its side), as its tiles report them."""
    extent = np.exp(rng.uniform(np.log(low), np.log(high), (count, 2)))
    middle = rng.uniform(0, side, (count, 2)) if spot is None else rng.normal(spot * side, 3, (count, 2))
    corners = np.array([[tile.left, tile.top] for tile in tiles])
    size = tiles[0].width
    # Of the tiles that see a box's middle any one.
    options = [np.flatnonzero(((corners <= m) & (m <= corners + size)).all(1)) for m in middle[: 1 if spot else 0]]
    if spot is None:
        columns = np.unique(corners[:, 0])
        place = [np.searchsorted(columns, middle[:, k], "right") - 1 for k in (0, 1)]
        tile_of = place[1] * len(columns) + place[0]
    else:
        tile_of = rng.choice(options[0], count)
    order = np.argsort(tile_of, kind="stable")
    shift = np.tile(corners[tile_of], 2)
    boxes = np.clip(np.concatenate((middle - extent / 2, middle + extent / 2), 1) - shift, 0, size)
    boxes, scores = torch.from_numpy(boxes[order].astype(np.float32)), torch.from_numpy(rng.random(count, np.float32))
    labels = torch.zeros(count, dtype=torch.int64)
    edges = np.searchsorted(tile_of[order], np.arange(len(tiles) + 1))
    return [(boxes[a:b], scores[a:b], labels[a:b]) for a, b in itertools.pairwise(edges)]


def speed(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    print(processor(), "- one thread; seconds (boxes left), median of", options.repeat)
    print("|", " | ".join(("scene", "tiles", "boxes", *MODES, "torchvision")), "|\n|", "---|" * 7, sep="")
    for name, side, size, overlap, low, high, spot in (
        ("10 to 40 px", 20000, 640, 64, 10, 40, None),
        ("4 to 3000 px", 20000, 640, 64, 4, 3000, None),
        ("4 to 3000 px, large tiles", 20000, 4000, 400, 4, 3000, None),
        ("many tiles", 51200, 512, 0, 10, 60, None),
        ("all at one spot, 4 to 3000 px", 8000, 640, 64, 4, 3000, 0.5),
    ):
        tiles = tile_grid((side, side), size, overlap)
        for count in sorted({*options.torchvision, options.boxes}):
            parts = heap_of_boxes(np.random.default_rng(0), count, side, tiles, low, high, spot)
            times: dict[str, list[float]] = {}
            left: dict[str, int] = {}
            for _ in range(options.repeat):
                for mode in MODES:
                    start = time.process_time()
                    left[mode] = len(merge_detections(parts, tiles, (side, side), 0.5, mode)[0])
                    times.setdefault(mode, []).append(time.process_time() - start)
                if count in options.torchvision:
                    moved = [p[0] + torch.tensor([t.left, t.top] * 2) for p, t in zip(parts, tiles, strict=True)]
                    boxes, scores, labels = torch.cat(moved), *(torch.cat([p[k] for p in parts]) for k in (1, 2))
                    start = time.process_time()
                    left["torchvision"] = len(batched_nms(boxes, scores, labels, 0.5))
                    times.setdefault("torchvision", []).append(time.process_time() - start)
            cells = [
                f"{statistics.median(times[mode]):.2f} ({left[mode]})" if mode in times else ""
                for mode in (*MODES, "torchvision")
            ]
            print("|", " | ".join((name, str(len(tiles)), str(count), *cells)), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ways of merging, on crowded scenes.")
    parser.add_argument("--ground-truth", type=Path, nargs="+", help="COCO files whose objects are taken")
    parser.add_argument("--images", type=int, default=6, help="images a scene; of a file the most crowded")
    parser.add_argument("--csv", type=Path, help="also write the numbers there")
    parser.add_argument(
        "--weights", type=Path, help="a model folder that looks at the tiles of --ground-truth's images"
    )
    parser.add_argument("--tile-size", type=int, nargs="+", default=[256, 300], help="of --weights")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--boxes", type=int, default=200_000, help="of --speed")
    parser.add_argument(
        "--torchvision", type=int, nargs="*", default=[20_000], help="of --speed: boxes for torchvision"
    )
    parser.add_argument("--repeat", type=int, default=1, help="of --speed")
    options = parser.parse_args()
    if options.weights and not options.ground_truth:
        parser.error("--weights looks at the images of --ground-truth: name COCO files")
    (speed if options.speed else quality)(options)


if __name__ == "__main__":
    main()
