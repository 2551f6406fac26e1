"""Data for the tests of the COCO-type protocols: random scenes of small objects, and scenes made by hand."""

from __future__ import annotations

import contextlib
import copy
import io
import math

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def random_scenes(
    seed: int,
    num_images: int = 8,
    num_objects: int = 14,
    num_detections: int = 40,
    category_ids: tuple[int, ...] = (3, 7, 90),
    largest_px: float = 60.0,
    decimals: int = 3,
) -> tuple[dict, list[dict]]:
    """Objects with crowds and `ignore`, detections with ties; ids with gaps, the last class without an object."""
    rng = np.random.default_rng(seed)
    image_ids = (rng.permutation(50 * num_images)[:num_images] - 20).tolist()
    annotations, detections = [], []
    for image_id in image_ids[:-1]:  # the last image has no object
        boxes = []
        for _ in range(int(rng.integers(1, 2 * num_objects))):
            box = np.array([*rng.uniform(0, 300, 2), *np.exp(rng.uniform(np.log(3), np.log(largest_px), 2))])
            box = box.round(decimals)
            category = int(rng.choice(category_ids[:-1]))
            boxes.append((box, category))
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box.tolist(),
                    "area": float(box[2] * box[3] * rng.choice([1.0, 0.8])),
                    "iscrowd": int(rng.random() < 0.12),
                    "ignore": int(rng.random() < 0.12),
                }
            )
        for _ in range(num_detections):
            box, category = boxes[int(rng.integers(len(boxes)))]
            box = box + rng.normal(0, 0.1, 4) * np.tile(box[2:], 2)
            if rng.random() < 0.15:
                box, category = rng.uniform(1, 100, 4), int(rng.choice(category_ids))
            box = np.array([*box[:2], *abs(box[2:])]).round(decimals)
            score = round(float(rng.random()), 1 if seed % 2 else 4)  # odd seeds: many ties
            detections.append({"image_id": image_id, "category_id": category, "bbox": box.tolist(), "score": score})
    detections += [
        {"image_id": image_ids[-1], "category_id": category_ids[0], "bbox": [1.0, 1.0, 9.0, 9.0], "score": 0.6}
    ] * 2
    rng.shuffle(detections)  # type: ignore[arg-type]
    truth = {
        "images": [{"id": image_id, "width": 400, "height": 400} for image_id in image_ids],
        "annotations": annotations,
        "categories": [{"id": category_id, "name": f"class{category_id}"} for category_id in category_ids],
    }
    return truth, detections


def pycocotools_arrays(
    truth: dict,
    detections: list[dict],
    ranges: list[tuple[float, float]],
    caps: list[int],
    thresholds: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of pycocotools itself, with annotation ids from 1."""
    truth = copy.deepcopy(truth)
    for number, annotation in enumerate(truth["annotations"], start=1):
        annotation["id"] = number
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = truth
        ground_truth.createIndex()
        # It cannot load an empty list.
        found = ground_truth.loadRes(copy.deepcopy(detections)) if detections else COCO()
        evaluator = COCOeval(ground_truth, found, "bbox")
        evaluator.params.maxDets = caps
        if thresholds is not None:
            evaluator.params.iouThrs = thresholds
        evaluator.params.areaRng = [list(bounds) for bounds in ranges]
        evaluator.params.areaRngLbl = [str(place) for place in range(len(ranges))]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


def mean_of(values: np.ndarray) -> float:
    return float(np.mean(values[values > -1])) if (values > -1).any() else math.nan


def scene(*objects: dict, num_images: int = 1, num_classes: int = 1) -> dict:
    """A truth of images 1, 2, ... and classes 1, 2, ...; an object is {bbox, ...}, of image and class 1 by default."""
    return {
        "images": [{"id": number} for number in range(1, num_images + 1)],
        "annotations": [
            {"id": place, "image_id": 1, "category_id": 1, **item} for place, item in enumerate(objects, start=1)
        ],
        "categories": [{"id": number, "name": f"class{number}"} for number in range(1, num_classes + 1)],
    }


def hit(box: list[float], score: float = 0.5, image_id: int = 1, category_id: int = 1) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def grid(count: int, side: float = 5.0) -> list[list[float]]:
    """Boxes that do not touch."""
    return [[20.0 * (place % 50), 20.0 * (place // 50), side, side] for place in range(count)]
