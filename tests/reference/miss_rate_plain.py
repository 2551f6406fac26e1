"""IterDet's WiderPerson numbers by plain loops: the matching of brambox, its curves, AP and log-average miss rate.

Written from the rules (facts of SamsungLabs/iterdet and brambox 3.0.0), not from our evaluation.

`objects` and `detections` are dictionaries: image -> list of (x, y, width, height, ignored) or (x, y, width, height,
score). The images of `objects` are those that count.
"""

from __future__ import annotations

import math


def evaluate_plain(objects: dict, detections: dict) -> dict[str, float]:
    """AP, Recall and mMR; fractions of 1."""
    rows = []
    num_objects = 0
    for image, boxes in objects.items():
        num_objects += sum(not box[4] for box in boxes)
        rows += match(boxes, detections.get(image, []))
    points = []  # score, right and wrong so far
    right = wrong = 0
    for score, outcome in sorted(rows, key=lambda row: -row[0]):
        if outcome == "ignored":
            continue
        right += outcome == "right"
        wrong += outcome == "wrong"
        if points and points[-1][0] == score:
            points.pop()
        points.append((score, right, wrong))

    ap = before = 0.0
    for _, right, wrong in points:
        recall = right / num_objects
        ap += (recall - before) * right / (right + wrong)
        before = recall
    curve = [(wrong / len(objects), 1 - right / num_objects) for _, right, wrong in points]
    return {"AP": ap, "Recall": before, "mMR": log_average(curve)}


def match(boxes: list, detections: list) -> list[tuple[float, str]]:
    """Score and outcome of the detections of one image."""
    taken = set()
    rows = []
    for detection in sorted(detections, key=lambda row: -row[4]):
        best = 0.0
        choice = None
        for place, box in enumerate(boxes):
            if box[4] or place in taken:
                continue
            value = iou(detection, box)
            if value >= 0.5 and value > best:  # of equals the earlier one
                best = value
                choice = place
        if choice is not None:
            taken.add(choice)
            rows.append((detection[4], "right"))
        elif any(box[4] and share_inside(detection, box) >= 0.5 for box in boxes):
            rows.append((detection[4], "ignored"))
        else:
            rows.append((detection[4], "wrong"))
    return rows


def overlap(first: tuple, second: tuple) -> float:
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    return max(width, 0.0) * max(height, 0.0)


def iou(first: tuple, second: tuple) -> float:
    common = overlap(first, second)
    return common / (first[2] * first[3] + second[2] * second[3] - common) if common else 0.0


def share_inside(detection: tuple, region: tuple) -> float:
    common = overlap(detection, region)
    return common / (detection[2] * detection[3]) if common else 0.0


def log_average(curve: list[tuple[float, float]]) -> float:
    """Geometric mean of the miss rate at nine FPPI from 0.01 to 1, evenly spaced in their logarithm."""
    if len(curve) < 2:
        return math.nan
    total = 0.0
    for step in range(9):
        rate = miss_rate_at(curve, 10 ** (-2 + step / 4))
        if rate == 0:
            return 0.0
        total += math.log(rate)
    return math.exp(total / 9)


def miss_rate_at(curve: list[tuple[float, float]], fppi: float) -> float:
    if fppi < curve[0][0]:
        return 1.0
    if fppi > curve[-1][0]:
        return 0.0
    before = max(place for place, point in enumerate(curve) if point[0] <= fppi)
    if before == len(curve) - 1:
        return curve[-1][1]
    (left, low), (right, high) = curve[before], curve[before + 1]
    return low + (high - low) * (fppi - left) / (right - left)
