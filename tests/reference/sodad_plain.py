"""SODA-D's merging of patch detections as plain loops in single precision."""

from __future__ import annotations

import numpy as np

ONE = np.float32


def area(box: list[np.float32]) -> np.float32:
    return (box[2] - box[0]) * (box[3] - box[1])


def overlap(first: list[np.float32], second: list[np.float32]) -> np.float32:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, ONE(0)) * max(height, ONE(0))
    whole = area(first) + area(second) - shared
    return shared / whole if whole > 0 else ONE(0)


def merge(predictions: list[dict], patches: dict, iou: float = 0.5) -> list[dict]:
    """Results on the original images: in the order of the patches' file, by class, best first."""
    original_ids = []
    for patch in patches["images"]:
        if patch["ori_id"] not in original_ids:
            original_ids.append(patch["ori_id"])
    merged = []
    for original_id in original_ids:
        for category_id in sorted({item["category_id"] for item in predictions}):
            candidates = []
            for patch in patches["images"]:
                if patch["ori_id"] != original_id:
                    continue
                left, top = (ONE(value) for value in patch["start_coord"])
                for item in predictions:
                    if (item["image_id"], item["category_id"]) == (patch["id"], category_id):
                        x, y, width, height = item["bbox"]
                        box = [ONE(x) + left, ONE(y) + top, ONE(x + width) + left, ONE(y + height) + top]
                        candidates.append((ONE(item["score"]), box))
            candidates.sort(key=lambda candidate: -candidate[0])
            kept: list[tuple[np.float32, list[np.float32]]] = []
            for score, box in candidates:
                if all(overlap(other, box) <= iou for _, other in kept):
                    kept.append((score, box))
            for score, box in kept:
                left, top, right, bottom = (float(value) for value in box)
                merged.append(
                    {
                        "image_id": original_id,
                        "category_id": category_id,
                        "bbox": [left, top, right - left, bottom - top],
                        "score": float(score),
                    }
                )
    return merged
