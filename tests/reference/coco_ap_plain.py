"""COCO's average precision as plain loops: matching, accumulation, any ranges of area and caps, both rules of ignoring.

Written from the rules (docs/protocols.md), as slow and as direct as they are said. `rule` says what makes an annotation
one that is not asked for:

- "crowd" (COCO, AI-TOD, VisDrone): `iscrowd`. The overlap with it is relative to the detection, and it takes many.
- "flag" (SODA-D): `ignore`. It overlaps and is used up like any object; `iscrowd` means nothing.
"""

from __future__ import annotations

import numpy as np

THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
RECALLS = np.linspace(0.0, 1.0, 101).tolist()


def overlap_of(detection: list[float], other: list[float], relative_to_detection: bool) -> float:
    """IoU of two boxes (x, y, width, height), or the part of the detection that lies in the other."""
    x, y, width, height = detection
    x2, y2, width2, height2 = other
    shared_width = min(x + width, x2 + width2) - max(x, x2)
    shared_height = min(y + height, y2 + height2) - max(y, y2)
    if shared_width <= 0 or shared_height <= 0:
        return 0.0
    shared = shared_width * shared_height
    whole = width * height if relative_to_detection else width * height + width2 * height2 - shared
    return shared / whole


def area_of(annotation: dict) -> float:
    area = annotation.get("area")
    return annotation["bbox"][2] * annotation["bbox"][3] if area is None else area


def is_crowd(annotation: dict, rule: str) -> bool:
    return rule == "crowd" and bool(annotation.get("iscrowd"))


def is_ignored(annotation: dict, area_range: tuple[float, float], rule: str) -> bool:
    flag = annotation.get("iscrowd") if rule == "crowd" else annotation.get("ignore")
    return bool(flag) or not area_range[0] <= area_of(annotation) <= area_range[1]


def match_image(
    annotations: list[dict], detections: list[dict], area_range: tuple[float, float], threshold: float, rule: str
) -> list[tuple[float, str, float]]:
    """Score, verdict ("right", "wrong" or "neutral") and overlap of the detections of one image and class."""
    used: set[int] = set()
    verdicts = []
    for detection in detections:
        best, best_overlap = None, 0.0
        for wants_ignored in (False, True):
            if best is not None:
                break
            for place, annotation in enumerate(annotations):
                if is_ignored(annotation, area_range, rule) != wants_ignored:
                    continue
                crowd = is_crowd(annotation, rule)
                if place in used and not crowd:
                    continue
                overlap = overlap_of(detection["bbox"], annotation["bbox"], crowd)
                if overlap >= min(threshold, 1 - 1e-10) and overlap >= best_overlap:
                    best, best_overlap = place, overlap
        if best is not None:
            used.add(best)
            neutral = is_ignored(annotations[best], area_range, rule)
            verdicts.append((detection["score"], "neutral" if neutral else "right", best_overlap))
        else:
            area = detection["bbox"][2] * detection["bbox"][3]
            inside = area_range[0] <= area <= area_range[1]
            verdicts.append((detection["score"], "wrong" if inside else "neutral", 0.0))
    return verdicts


def verdicts_of_class(
    truth: dict,
    detections: list[dict],
    category_id: int,
    area_range: tuple[float, float],
    cap: int,
    threshold: float,
    rule: str,
) -> tuple[list[tuple[float, str, float]], int]:
    """Verdicts of a class, best score first, over all images by ascending id; and how many objects are asked for."""
    verdicts, num_objects = [], 0
    for image_id in sorted(image["id"] for image in truth["images"]):
        own = [
            item for item in truth["annotations"] if (item["image_id"], item["category_id"]) == (image_id, category_id)
        ]
        found = [item for item in detections if (item["image_id"], item["category_id"]) == (image_id, category_id)]
        found = sorted(found, key=lambda item: -item["score"])[:cap]  # sorted() keeps the order of equal scores
        num_objects += sum(not is_ignored(item, area_range, rule) for item in own)
        verdicts += match_image(own, found, area_range, threshold, rule)
    return sorted(verdicts, key=lambda verdict: -verdict[0]), num_objects


def precision_and_recall(verdicts: list[tuple[float, str, float]], num_objects: int) -> tuple[list[float], float]:
    """Interpolated precision at the 101 recalls, and the last recall."""
    right = wrong = 0
    precisions, recalls = [], []
    for _, verdict, _ in verdicts:
        right += verdict == "right"
        wrong += verdict == "wrong"
        precisions.append(right / (right + wrong) if right + wrong else 0.0)
        recalls.append(right / num_objects)
    # From each place on, the best precision that is still to come.
    for place in range(len(precisions) - 2, -1, -1):
        precisions[place] = max(precisions[place], precisions[place + 1])
    sampled = []
    for wanted in RECALLS:
        reached = [place for place, recall in enumerate(recalls) if recall >= wanted]
        sampled.append(precisions[reached[0]] if reached else 0.0)
    return sampled, recalls[-1] if recalls else 0.0


def ap_and_ar(
    truth: dict,
    detections: list[dict],
    area_range: tuple[float, float],
    cap: int,
    rule: str = "crowd",
    thresholds: list[float] = THRESHOLDS,
    category_ids: list[int] | None = None,
) -> tuple[float, float]:
    """Mean precision and mean recall over thresholds and the classes that have objects; NaN if none has."""
    all_precisions: list[float] = []
    all_recalls: list[float] = []
    for category_id in category_ids or [category["id"] for category in truth["categories"]]:
        for threshold in thresholds:
            verdicts, num_objects = verdicts_of_class(truth, detections, category_id, area_range, cap, threshold, rule)
            if num_objects:
                precisions, recall = precision_and_recall(verdicts, num_objects)
                all_precisions += precisions
                all_recalls.append(recall)
    if not all_recalls:
        return float("nan"), float("nan")
    return sum(all_precisions) / len(all_precisions), sum(all_recalls) / len(all_recalls)
