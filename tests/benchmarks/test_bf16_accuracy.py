"""What the benchmark of number formats judges: files pooled, and only what has enough objects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import supervision as sv

from benchmarks import bf16_accuracy
from benchmarks.bf16_accuracy import Runs


def file_of(sides: list[float], shift: float = 0.0, lost: int = 0) -> Runs:
    """An image for each object, of that side; the second run's boxes are shifted, or missing in the first images."""
    truth: dict[str, Any] = {"categories": [{"id": 1, "name": "tree"}], "images": [], "annotations": []}
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for number, side in enumerate(sides, 1):
        box = [50.0, 50.0, side, side]
        truth["images"].append({"id": number, "file_name": "x.jpg", "width": 300, "height": 300})
        truth["annotations"].append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": box, "area": side**2, "iscrowd": 0}
        )
        common = {"image_id": number, "category_id": 1, "score": 0.9}
        found[0].append({**common, "bbox": box})
        if number > lost:
            found[1].append({**common, "bbox": [box[0] + shift, box[1] + shift, *box[2:]]})
    pairs = np.array([[side, shift, shift, 0.0] for side in sides[lost:]]).reshape(-1, 4)
    return Runs(truth, found, pairs, np.array(sides[:lost]))


def rows_of(files: list[Runs], judge: bool = True) -> dict[str, dict[str, Any]]:
    rows = bf16_accuracy.make_rows("x", bf16_accuracy.pool(files), judge)
    return {row["objects"]: row for row in rows}


def test_files_with_the_same_ids_are_one_evaluation() -> None:
    # The ids of the images and of the objects are the same in both files; taken for one, half would be lost.
    rows = rows_of([file_of([20.0] * 60), file_of([20.0] * 60, lost=60)])
    assert rows["all"]["number"] == rows["16-32 px"]["number"] == 120
    assert rows["all"]["AP"] == pytest.approx(1.0)
    # Recalls of up to 0.5 are reached: 51 of the 101 points.
    assert rows["all"]["AP there"] == pytest.approx(51 / 101)
    assert rows["all"]["pairs"] == rows["all"]["lost"] == 60
    assert rows["all"]["judged"] == "too much"


def test_only_bands_with_enough_objects_are_judged() -> None:
    many, few = [20.0] * bf16_accuracy.LEAST_OBJECTS, [50.0] * (bf16_accuracy.LEAST_OBJECTS - 1)
    rows = rows_of([file_of(many), file_of(few, lost=9)])
    assert rows["16-32 px"]["judged"] == rows["under 32 px"]["judged"] == "good"
    # 9 of 99 are gone there, which says something of the whole, but not of so few.
    assert rows["32-96 px"]["AP there"] < 0.95 and rows["32-96 px"]["judged"] is None
    assert rows["all"]["judged"] == "too much"
    assert all(row["judged"] is None for row in rows_of([file_of(many)], judge=False).values())


def test_the_shift_of_small_objects_is_judged() -> None:
    sides = [20.0] * bf16_accuracy.LEAST_OBJECTS
    for shift, judged in ((0.09, "good"), (0.11, "too much")):
        row = rows_of([file_of(sides, shift)])["under 32 px"]
        assert row["AP"] == pytest.approx(row["AP there"]) and row["edge (px)"] == pytest.approx(shift)
        assert row["judged"] == judged


def test_a_pair_is_of_one_class_and_of_one_place() -> None:
    def found(boxes: list[list[float]], labels: list[int]) -> sv.Detections:
        return sv.Detections(np.array(boxes, np.float32), class_id=np.array(labels))

    exact = found([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]], [0, 0, 0])
    # Another order; another class; moved by 4 of 10 px (IoU 0.43).
    other = found([[20, 0, 30, 10], [0, 0, 10, 10], [44, 0, 54, 10]], [1, 0, 0])
    assert [places.tolist() for places in bf16_accuracy.pair(exact, other)] == [[0], [1]]
