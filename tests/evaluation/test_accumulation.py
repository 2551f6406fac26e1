"""The engine below every AP: bit for bit the arrays of pycocotools, on data made to find where they could differ."""

from __future__ import annotations

import numpy as np
import pytest

from crossdino.evaluation import match_table
from crossdino.evaluation.accumulation import COCO_IOU_THRESHOLDS, accumulate
from crossdino.evaluation.coco_input import read_found, read_truth
from tests.evaluation.coco_cases import hit, pycocotools_arrays, random_scenes, scene

BANDS = [(0.0, 1e10), (0.0, 64.0), (64.0, 256.0), (256.0, 1024.0), (33.3, 400.5)]
CAPS = [1, 5, 20, 500]


def assert_same(truth: dict, detections: list[dict], thresholds: np.ndarray = COCO_IOU_THRESHOLDS) -> np.ndarray:
    """Both arrays, at every cap; returns pycocotools' recall."""
    precision, recall = pycocotools_arrays(truth, detections, BANDS, CAPS, thresholds)
    read = read_truth(truth).reading_only("iscrowd")
    found, _ = read_found(detections, read.image_ids, read.category_ids, read.name)
    for place, cap in enumerate(CAPS):
        ours = accumulate(read, found, BANDS, CAPS, thresholds, precision_cap=cap)
        np.testing.assert_array_equal(ours.precision, precision[..., place])
        np.testing.assert_array_equal(ours.recall, recall)
    return recall


@pytest.mark.parametrize("seed", range(12))
def test_random_scenes(seed):
    decimals, num_objects = [3, 0, 1][seed % 3], [14, 3, 60][seed // 3 % 3]
    truth, detections = random_scenes(
        seed, num_images=6, num_objects=num_objects, decimals=decimals, largest_px=[25.0, 60.0][seed % 2]
    )
    truth["images"] += [{"id": 5000 + number} for number in range(50)]  # nothing in them, and nothing found
    recall = assert_same(truth, detections)
    assert 0.02 < recall[recall > -1].mean() < 0.98  # no empty comparison
    assert_same(truth, detections, np.array([0.05, 1 / 3, 0.5, 0.75, 1.0]))


def test_many_detections_of_one_image():
    rng = np.random.default_rng(0)
    boxes = np.concatenate((rng.integers(0, 200, (120, 2)), rng.integers(2, 40, (120, 2))), axis=1)
    truth = scene(*({"bbox": box, "iscrowd": int(rng.random() < 0.1)} for box in boxes.tolist()), num_images=2)
    for annotation in truth["annotations"]:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    moved = abs(boxes[rng.integers(0, 120, 700)] + rng.integers(-2, 3, (700, 4)))
    assert_same(truth, [hit(box, round(score, 2)) for box, score in zip(moved.tolist(), rng.random(700), strict=True)])


def test_overlaps_of_exactly_a_threshold():
    """Each pair of boxes in an image of its own: 1/2, 3/4, 3/5 ... as the C code rounds them, with crowds too."""
    pairs = [
        ([shift, 2.0, width, height], [0.0, 2.0, width, height + more], crowd)
        for width in (2, 3, 4, 7, 10)
        for height in (1, 3, 8)
        for shift in (0, 1, 0.1)
        for more in (0, 1, 2)
        for crowd in (0, 1)
    ]
    # With tenths of pixels the order of the sum decides, and 1 is reached by a little less.
    pairs += [
        ([1.1, 3.2, 2.0, 1.8], [1.5, 3.2, 2.8, 1.8], 0),
        ([0.3, 1.7, 1.4, 2.7], [-0.3, 1.7, 1.7, 2.7], 0),
        ([5.7, 3.0, 2.0, 3.5], [5.9, 3.0, 2.8, 3.5], 0),
        ([2.1, 2.7, 1.4, 5.7], [2.2, 2.7, 1.9, 5.7], 0),
        ([0.0, 0.0, 10.0, 10.0], [4e-10, 0.0, 10.0, 10.0], 0),
    ]
    objects = [
        {"bbox": box, "area": box[2] * box[3], "iscrowd": crowd, "image_id": place}
        for place, (box, _, crowd) in enumerate(pairs, start=1)
    ]
    found = [hit(box, place % 7 / 7, image_id=place) for place, (_, box, _) in enumerate(pairs, start=1)]
    truth = scene(*objects, num_images=len(pairs))
    assert_same(truth, found)
    assert_same(truth, found, np.unique([part / whole for whole in range(2, 12) for part in range(1, whole + 1)]))


@pytest.mark.parametrize("side", [0.0, 1e-200, 1e-13, 2.0**-34, 2e-10])
@pytest.mark.parametrize("corner", [3.0, 1e6, 1e6 + 2.0**-33])
def test_boxes_of_next_to_no_size(side, corner):
    """A million pixels from the origin, rounding makes them share as much as they have together, or more."""
    boxes = [[corner, corner, side, side], [corner, corner, side, 4.0], [corner, corner, 2.0, 4.0]]
    objects = [{"bbox": box, "area": box[2] * box[3], "iscrowd": 0} for box in boxes]
    truth = scene(*objects, objects[0] | {"iscrowd": 1})
    assert_same(truth, [hit(box, score) for score in (0.9, 0.5) for box in boxes])


def test_nothing_found_and_nothing_to_find():
    crowd = {"bbox": [0.0, 0.0, 9.0, 9.0], "area": 81.0, "iscrowd": 1}
    for truth in (scene(crowd, num_classes=2), scene(crowd | {"iscrowd": 0}, num_classes=2, num_images=3)):
        assert_same(truth, [])
        assert_same(truth, [hit([0.0, 0.0, 9.0, 8.0], category_id=2), hit([50.0, 50.0, 5.0, 5.0])])


def test_work_in_pieces_is_the_same(monkeypatch):
    monkeypatch.setattr(match_table, "_PAIRS_AT_ONCE", 7)
    monkeypatch.setattr(match_table, "_CHOICES_AT_ONCE", 3)
    assert_same(*random_scenes(2, decimals=0, largest_px=40.0))


def test_ignored_objects_are_matched_once_and_by_plain_overlap():
    box = [0.0, 0.0, 10.0, 10.0]
    truth = read_truth(scene({"bbox": box, "ignore": 1}, {"bbox": [50.0, 0.0, 10.0, 10.0]}))
    found, _ = read_found([hit(box, 0.9), hit(box, 0.8), hit([50.0, 0.0, 10.0, 10.0], 0.7)], {1: 0}, {1: 0}, "")
    (precision,) = accumulate(truth, found, BANDS[:1], [100], np.array([0.5])).precision[0, [100], 0, 0]
    assert precision == pytest.approx(1 / 2)  # the first lies in the ignored one, the second finds it taken
    (precision,) = accumulate(truth.reading_only("iscrowd"), found, BANDS[:1], [100]).precision[0, [100], 0, 0]
    assert precision == pytest.approx(2 / 3)  # now it is an object


@pytest.mark.parametrize("far", [3e7, 1e15, 1e200, 1.7e308])
def test_one_absurd_box_leaves_the_others_alone(far):
    truth, detections = random_scenes(4, num_images=3)
    for box in ([far, 5.0, 9.0, 9.0], [5.0, 5.0, far, 9.0], [-far, -far, 9.0, 9.0], [-far, 0.0, far, far]):
        detections.append({**detections[0], "bbox": box, "score": 0.7})
    assert_same(truth, detections)
    truth["annotations"] += [
        {"id": 0, "image_id": truth["images"][0]["id"], "category_id": 3, "bbox": box, "area": area, "iscrowd": 0}
        for box, area in (([far, 5.0, 9.0, 8.0], 72.0), ([5.0, 5.0, far, 8.0], 1e12))
    ]
    recall = assert_same(truth, detections)
    assert recall[recall > -1].mean() > 0.1
