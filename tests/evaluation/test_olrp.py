"""Optimal LRP: worked out by hand, and against plain loops."""

from __future__ import annotations

import math

import pytest

from crossdino.evaluation import evaluate_protocol
from tests.evaluation.coco_cases import grid, hit, random_scenes, scene
from tests.reference.olrp_plain import class_errors, mean_errors

NAMES = ("oLRP", "oLRP_loc", "oLRP_FP", "oLRP_FN")


def errors(truth: dict, detections: list[dict], name: str = "aitod") -> tuple[float, ...]:
    metrics = evaluate_protocol(name, truth, detections).metrics
    return tuple(metrics[name] for name in NAMES)


@pytest.mark.parametrize("name", ["aitod", "visdrone"])
@pytest.mark.parametrize(
    "case",
    [
        random_scenes(10),
        random_scenes(11),  # ties of scores
        random_scenes(12, decimals=0, largest_px=20.0),  # equal overlaps, and some of exactly 1/2
        random_scenes(13, num_images=3, num_objects=50, num_detections=120, category_ids=(1, 2, 3)),
    ],
)
def test_equals_plain_loops(case, name):
    truth, detections = case
    assert any(item["iscrowd"] for item in truth["annotations"])
    # Sums in another order.
    assert errors(truth, detections, name) == pytest.approx(mean_errors(truth, detections, 1500), abs=1e-9)


def test_case_worked_out_on_paper():
    # Three objects. By score: a hit of IoU 0.8, a hit of IoU 0.6, a miss; the third object is not found.
    truth = scene(*({"bbox": [100.0 * place, 0.0, 10.0, 10.0]} for place in range(3)))
    found = [
        hit([0.0, 0.0, 8.0, 10.0], 0.9),
        hit([100.0, 0.0, 6.0, 10.0], 0.8),
        hit([500.0, 0.0, 10.0, 10.0], 0.7),
    ]
    # After 1: (0.2 / 0.5 + 0 + 2) / 3 = 0.8. After 2: ((0.2 + 0.4) / 0.5 + 0 + 1) / 3 = 11/15. After 3: 3.2 / 4 = 0.8.
    assert errors(truth, found) == pytest.approx((11 / 15, 0.3, 0.0, 1 / 3), abs=1e-12)
    # With the miss first: (0+1+3)/4 = 1, then (0.4+1+2)/4, then (1.2+1+1)/4 = 0.8.
    found[2]["score"] = 0.95
    assert errors(truth, found) == pytest.approx((0.8, 0.3, 1 / 3, 1 / 3), abs=1e-12)


def test_of_equal_minima_the_first_gives_the_components():
    # A hit of IoU 1/2 changes nothing: its localisation error counts as much as the object that was missed.
    truth = scene({"bbox": [0.0, 0.0, 10.0, 10.0]}, {"bbox": [100.0, 0.0, 10.0, 10.0]})
    found = [hit([0.0, 0.0, 10.0, 10.0], 0.9), hit([100.0, 0.0, 5.0, 10.0], 0.8)]
    assert errors(truth, found) == pytest.approx((0.5, 0.0, 0.0, 0.5), abs=1e-12)


def test_a_class_without_a_hit_is_one_and_leaves_the_components_to_others():
    boxes = grid(2, side=10.0)
    truth = scene({"bbox": boxes[0]}, {"bbox": boxes[1], "category_id": 2}, num_classes=3)
    right, wrong = hit(boxes[0]), hit([500.0, 500.0, 10.0, 10.0], category_id=2)
    # Class 2 has a wrong detection, or none; class 3 has no object at all, and a detection that nobody counts.
    for found in ([right, wrong], [right], [right, hit(boxes[0], category_id=3)]):
        assert errors(truth, found) == pytest.approx((0.5, 0.0, 0.0, 0.5), abs=1e-12)
    assert errors(truth, []) == pytest.approx((1.0, math.nan, math.nan, 1.0), nan_ok=True)
    assert class_errors(truth, [], 3, 1500) is None


def test_crowds_take_what_no_object_takes():
    truth = scene({"bbox": [0.0, 0.0, 10.0, 10.0]}, {"bbox": [0.0, 0.0, 50.0, 50.0], "iscrowd": 1})
    # Both lie wholly in the crowd; the object takes the first, the crowd the other two.
    found = [hit([0.0, 0.0, 8.0, 10.0], 0.5), hit([0.0, 0.0, 10.0, 10.0], 0.4), hit([30.0, 30.0, 5.0, 5.0], 0.9)]
    assert errors(truth, found) == pytest.approx((0.4, 0.2, 0.0, 0.0), abs=1e-12)
    # Only neutral detections: nothing is right, nothing is wrong.
    assert errors(truth, found[2:]) == pytest.approx((1.0, math.nan, math.nan, 1.0), nan_ok=True)


def test_of_equal_overlaps_the_last_object_is_taken():
    # The first detection overlaps both objects by 2/3 and takes the second, for which the other one then comes late.
    truth = scene({"bbox": [0.0, 0.0, 10.0, 10.0]}, {"bbox": [4.0, 0.0, 10.0, 10.0]})
    found = [hit([2.0, 0.0, 10.0, 10.0], 0.9), hit([4.0, 0.0, 10.0, 10.0], 0.8)]
    # After 1: (2/3 + 0 + 1) / 2; after 2: (2/3 + 1 + 1) / 3.
    assert errors(truth, found) == pytest.approx((5 / 6, 1 / 3, 0.0, 0.5), abs=1e-12)
    # Of the objects in the other order, the first detection leaves it its own: ((1/3 + 0) / 0.5 + 0 + 0) / 2.
    truth["annotations"].reverse()
    assert errors(truth, found) == pytest.approx((1 / 3, 1 / 6, 0.0, 0.0), abs=1e-12)


def test_the_highest_overlap_is_taken():
    objects = [{"bbox": [0.0, 0.0, 10.0, 10.0]}, {"bbox": [3.0, 0.0, 10.0, 10.0]}]
    # The first detection overlaps them by 9/11 and 8/12, the second is the second object.
    found = [hit([1.0, 0.0, 10.0, 10.0], 0.9), hit([3.0, 0.0, 10.0, 10.0], 0.8)]
    for ordered in (objects, objects[::-1]):
        assert errors(scene(*ordered), found) == pytest.approx((2 / 11, 1 / 11, 0.0, 0.0), abs=1e-12)


def test_the_1501st_detection_does_not_count():
    boxes = grid(1501)
    truth = scene(*({"bbox": box} for box in boxes))
    found = [hit(box, 1 - place / 10_000) for place, box in enumerate(boxes)]
    assert errors(truth, found) == pytest.approx((1 / 1501, 0.0, 0.0, 1 / 1501), abs=1e-12)


def test_the_cap_is_per_image():
    # 1501 false ones in the first image, before the only hit in the second: one of them does not count.
    truth = scene({"bbox": [0.0, 0.0, 5.0, 5.0]}, {"bbox": [0.0, 0.0, 5.0, 5.0], "image_id": 2}, num_images=2)
    found = [hit(box, 0.9) for box in grid(1502)[1:]] + [hit([0.0, 0.0, 5.0, 5.0], 0.1, image_id=2)]
    assert errors(truth, found) == pytest.approx((1501 / 1502, 0.0, 1500 / 1501, 0.5), abs=1e-12)


def test_other_protocols_do_not_have_it():
    truth, detections = random_scenes(14)
    assert not any(name.startswith("oLRP") for name in evaluate_protocol("coco", truth, detections).metrics)
    assert not any(name.startswith("oLRP") for name in evaluate_protocol("sodad", truth, detections).metrics)
