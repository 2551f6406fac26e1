"""The VisDrone-DET challenge metric by plain loops over the rows of the text files, counted from 1 as MATLAB does.

Written from the rules of the toolkit (`utils/*.m` of VisDrone/VisDrone2018-DET-toolkit), not from our evaluation: no
integral image but a look at every pixel, no caps at once but one after the other.

An image is a dictionary: `width`, `height`, `gt` (rows x, y, w, h, score, category) and `det` (the same), both in the
order of their files.
"""

from __future__ import annotations

import math

CAPS = (1, 10, 100, 500)


def evaluate_plain(images: list[dict]) -> dict[str, float]:
    """AP, AP50, AP75 and AR at the four caps; fractions of 1."""
    images = [remove_ignored(image) for image in images]
    ap = {}
    ar = {}
    class_list = []
    for category in range(1, 11):
        for image in images:
            if any(row[5] == category for row in image["gt"]):
                class_list.append(category)
        for step in range(10):
            threshold = 0.5 + step * 0.05
            for cap in CAPS:
                rows = []
                num_objects = 0
                for image in images:
                    objects = [row for row in image["gt"] if row[5] == category]
                    num_objects += len(objects)
                    first = image["det"][:cap]
                    found = [row for row in first if row[5] == category]
                    rows += match(objects, found, threshold)
                rows.sort(key=lambda row: -row[0])  # Python's sort keeps the order of equals
                recalls = []
                precisions = []
                right = wrong = 0
                for _, outcome in rows:
                    right += outcome == 1
                    wrong += outcome == 0
                    recalls.append(right / max(1, num_objects))
                    precisions.append(right / max(1, right + wrong))
                ar[category, step, cap] = max(recalls, default=0.0)
                if cap == CAPS[-1]:
                    ap[category, step] = area(recalls, precisions)
    if not class_list:
        return dict.fromkeys(("AP", "AP50", "AP75", *(f"AR@{cap}" for cap in CAPS)), math.nan)
    result = {
        "AP": mean([ap[category, step] for category in class_list for step in range(10)]),
        "AP50": mean([ap[category, 0] for category in class_list]),
        "AP75": mean([ap[category, 5] for category in class_list]),
    }
    for cap in CAPS:
        result[f"AR@{cap}"] = mean([ar[category, step, cap] for category in class_list for step in range(10)])
    return result


def remove_ignored(image: dict) -> dict:
    """The image without the objects and detections that lie in regions of category 0 by half or more."""
    regions = [[max(1, value) for value in row[:4]] for row in image["gt"] if row[5] == 0]
    objects = [row for row in image["gt"] if row[5] != 0]
    if not regions:
        return {**image, "gt": objects}
    ignored = set()
    for x, y, w, h in regions:
        for column in range(int(x), min(image["width"], int(x + w)) + 1):
            for line in range(int(y), min(image["height"], int(y + h)) + 1):
                ignored.add((column, line))

    def stays(row: list) -> bool:
        x, y, w, h = (max(1, round_as_matlab(value)) for value in row[:4])
        left = min(image["width"], x)
        top = min(image["height"], y)
        right = min(image["width"], left + w)
        bottom = min(image["height"], top + h)
        count = sum(
            (column, line) in ignored for column in range(left + 1, right + 1) for line in range(top + 1, bottom + 1)
        )
        return count / (h * w) < 0.5

    return {
        **image,
        "gt": [row for row in objects if stays(row)],
        "det": [row for row in image["det"] if stays(row)],
    }


def round_as_matlab(value: float) -> int:
    return int(math.floor(value + 0.5)) if value >= 0 else -int(math.floor(-value + 0.5))


def match(objects: list, found: list, threshold: float) -> list[tuple[float, int]]:
    """Score and outcome (1 right, 0 wrong, -1 neither) of the detections, best first."""
    real = [row for row in objects if row[4] != 0]
    ignored = [row for row in objects if row[4] == 0]
    taken = [False] * len(real)
    rows = []
    for detection in sorted(found, key=lambda row: -row[4]):
        best = threshold
        choice = None
        for place, row in enumerate(real):
            if not taken[place] and iou(detection, row) >= best:  # of equals the later one
                best = iou(detection, row)
                choice = place
        outcome = 0
        if choice is not None:
            taken[choice] = True
            outcome = 1
        elif any(share_inside(detection, row) >= threshold for row in ignored):
            outcome = -1
        rows.append((detection[4], outcome))
    return rows


def overlap(first: list, second: list) -> float:
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    return width * height if width > 0 and height > 0 else 0.0


def iou(detection: list, row: list) -> float:
    common = overlap(detection, row)
    return common / (detection[2] * detection[3] + row[2] * row[3] - common) if common else 0.0


def share_inside(detection: list, region: list) -> float:
    common = overlap(detection, region)
    return common / (detection[2] * detection[3]) if common else 0.0


def area(recalls: list[float], precisions: list[float]) -> float:
    """Area under the curve: between two recalls, the best precision at the later one or beyond."""
    total = 0.0
    before = 0.0
    for place, recall in enumerate(recalls):
        total += (recall - before) * max(precisions[place:])
        before = recall
    return total


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
