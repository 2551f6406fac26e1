"""Calibration: known miscalibrations are recovered, and every number equals one that was found in another way."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.special import expit, logit

from crossdino.errors import InputError
from crossdino.evaluation import calibration_report
from crossdino.evaluation.calibration import Calibration, size_shares
from crossdino.evaluation.calibration_fit import (
    SHARED_OBJECTS,
    Objective,
    band_sizes,
    best_threshold,
    fit_calibration,
)
from crossdino.evaluation.calibration_report import (
    CalibrationReport,
    calibrate_detections,
    expected_calibration_error,
)
from crossdino.evaluation.matching import IN_CROWD, UNMATCHED, FoundBoxes, TrueBoxes, match_detections
from crossdino.visualization.calibration import draw_calibration

SMALL, LARGE = 16.0, 64.0
BANDS = {"small": (0.0, 32.0), "large": (32.0, 1e5)}


def draw_scene(
    rng: np.random.Generator, num_images: int, per_image: int, distort: Any, num_classes: int = 1
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Detections that are right with a probability p known to us, and whose score is `distort(p, size, label)`.

    One grid cell a detection; a right one lies on an object, a wrong one on nothing. Every ninth cell holds an object
    that nothing found.
    """
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image, place in itertools.product(range(1, num_images + 1), range(per_image)):
        size = (SMALL, LARGE)[place % 2]
        label = int(rng.integers(num_classes))
        box = [100.0 * (place % 10), 100.0 * (place // 10), size, size]
        p = float(expit(rng.normal(-0.5, 1.5)))
        is_right = rng.random() < p
        entry = {"image_id": image, "category_id": label + 1, "bbox": box}
        detections.append({**entry, "score": distort(p, size, label)})
        if is_right:
            annotations.append({**entry, "id": len(annotations) + 1, "area": size**2, "iscrowd": 0})
        if place % 9 == 0:
            lost = {**entry, "bbox": [box[0], box[1] + 5000, size, size]}
            annotations.append({**lost, "id": len(annotations) + 1, "area": size**2, "iscrowd": 0})
    images = [
        {"id": image, "width": 6000, "height": 9000, "file_name": f"{image}.png"} for image in range(1, num_images + 1)
    ]
    categories = [{"id": label + 1, "name": f"c{label}"} for label in range(num_classes)]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def squares(rng: np.random.Generator, count: int, extent: float = 60.0) -> NDArray[np.float64]:
    corners = rng.uniform(0, extent, (count, 2))
    return np.concatenate([corners, corners + rng.uniform(6, 20, (count, 2))], axis=1)


def boxes_of(sizes: list[float]) -> torch.Tensor:
    return torch.tensor([[10.0, 20.0, 10.0 + size, 20.0 + size] for size in sizes])


# --- matching ---


@pytest.mark.parametrize("iou", [0.3, 0.5, 0.75])
def test_matches_are_those_of_pycocotools(iou: float) -> None:
    rng = np.random.default_rng(0)
    num_images, num_classes = 4, 2
    true = TrueBoxes(
        rng.integers(0, num_images, 90),
        squares(rng, 90),
        rng.integers(0, num_classes, 90),
        rng.uniform(20, 400, 90),
        rng.random(90) < 0.15,
    )
    # Detections near the objects, more than 100 an image, with many equal scores.
    near = rng.integers(0, 90, 700)
    jitter = true.boxes_xyxy[near] + rng.normal(0, 1.5, (700, 4))
    found = FoundBoxes(true.images[near], jitter, true.labels[near], rng.integers(0, 30, 700) / 30)
    matched = match_detections(found, true, iou)

    def entries(boxes: FoundBoxes | TrueBoxes) -> list[dict[str, Any]]:
        sizes = boxes.boxes_xyxy[:, 2:] - boxes.boxes_xyxy[:, :2]
        return [
            {
                "id": place + 1,
                "image_id": int(boxes.images[place]),
                "category_id": int(boxes.labels[place]),
                "bbox": [*boxes.boxes_xyxy[place, :2].tolist(), *sizes[place].tolist()],
                "area": float(np.prod(sizes[place])),
                "iscrowd": int(isinstance(boxes, TrueBoxes) and boxes.is_crowd[place]),
                **({"score": float(boxes.scores[place])} if isinstance(boxes, FoundBoxes) else {}),
            }
            for place in range(len(boxes))
        ]

    def as_coco(annotations: list[dict[str, Any]]) -> COCO:
        made = COCO()
        made.dataset = {
            "images": [{"id": image} for image in range(num_images)],
            "categories": [{"id": label} for label in range(num_classes)],
            "annotations": annotations,
        }
        made.createIndex()
        return made

    evaluator = COCOeval(as_coco(entries(true)), as_coco(entries(found)), "bbox")
    evaluator.params.iouThrs = np.array([iou])
    evaluator.params.maxDets = [10**6]
    evaluator.params.areaRng = [[0, 1e10]]
    evaluator.params.areaRngLbl = ["all"]
    evaluator.evaluate()
    expected = np.full(len(found), UNMATCHED)
    for result in filter(None, evaluator.evalImgs):
        for identity, target, ignored in zip(
            result["dtIds"], result["dtMatches"][0], result["dtIgnore"][0], strict=True
        ):
            if target > 0:
                expected[identity - 1] = IN_CROWD if ignored else int(target) - 1
    np.testing.assert_array_equal(matched, expected)
    assert {UNMATCHED, IN_CROWD} < set(matched.tolist()) and (matched >= 0).sum() > 20


def test_far_apart_boxes_are_found_in_any_chunk() -> None:
    rng = np.random.default_rng(1)
    boxes = squares(rng, 3000, extent=20_000.0)
    zeros = np.zeros(3000, dtype=np.int64)
    true = TrueBoxes(zeros, boxes, zeros, np.ones(3000), zeros.astype(bool))
    order = rng.permutation(3000)
    # All a little to the right, so that an object begins before the first detection of a chunk.
    found = FoundBoxes(zeros, boxes[order] + (1, 0, 1, 0), zeros, rng.random(3000))
    np.testing.assert_array_equal(match_detections(found, true), order)


def test_empty_and_sizeless_boxes_match_nothing() -> None:
    none = np.zeros(0, dtype=np.int64)
    nobody = TrueBoxes(none, np.zeros((0, 4)), none, np.zeros(0), none.astype(bool))
    one = FoundBoxes(np.array([1]), np.array([[5.0, 5, 5, 5]]), np.array([0]), np.array([0.5]))
    assert match_detections(one, nobody).tolist() == [UNMATCHED]
    point = TrueBoxes(one.images, one.boxes_xyxy, one.labels, np.zeros(1), np.zeros(1, bool))
    assert match_detections(one, point).tolist() == [UNMATCHED]
    assert len(match_detections(one[none], point)) == 0


# --- the curve ---


def test_known_miscalibration_is_recovered_by_size() -> None:
    """Scores that are too flat for small objects and too steep and too low for large ones."""
    truth = {SMALL: (0.5, 0.4), LARGE: (2.0, 1.5)}  # temperature and bias that mend them

    def distort(p: float, size: float, label: int) -> float:
        temperature, bias = truth[size]
        return float(expit((logit(p) - bias) * temperature))

    ground_truth, detections = draw_scene(np.random.default_rng(0), 40, 100, distort)
    report = calibrate_detections(ground_truth, detections, size_bands=BANDS, min_score=0)
    made = report.calibration
    assert made.sizes_px == (SMALL, LARGE)
    # 2000 detections a size: the standard error of the slope 1/T is about 0.05 of it, that of the bias 0.07.
    np.testing.assert_allclose(made.temperatures, [0.5, 2.0], rtol=0.15)
    np.testing.assert_allclose(made.biases, [0.4, 1.5], atol=0.25)
    for group in (report.everything, *report.by_size.values()):
        assert group.ece_before > 0.06 and group.ece_after < 0.03
    assert report.num_folds == 5 and report.folds_of == "images"
    assert report.by_size["small"].temperature == pytest.approx(made.temperatures[0])
    again = calibrate_detections(ground_truth, detections, size_bands=BANDS, min_score=0)
    assert again.to_json() == report.to_json()


def test_what_is_calibrated_already_stays() -> None:
    ground_truth, detections = draw_scene(np.random.default_rng(3), 40, 60, lambda p, size, label: p)
    made = calibrate_detections(ground_truth, detections, size_bands=BANDS).calibration
    np.testing.assert_allclose(made.temperatures, 1, rtol=0.15)
    np.testing.assert_allclose(made.biases, 0, atol=0.2)


def test_a_class_has_its_own_bias_and_rare_ones_lean_on_the_others() -> None:
    shift = (0.0, -1.0, -1.0)

    def distort(p: float, size: float, label: int) -> float:
        return float(expit(logit(p) + shift[label]))

    ground_truth, detections = draw_scene(np.random.default_rng(5), 30, 100, distort, num_classes=3)
    ground_truth["categories"].append({"id": 4, "name": "never seen"})
    made = calibrate_detections(ground_truth, detections, size_bands=BANDS).calibration
    gaps = np.array(made.class_biases) - made.class_biases[0]
    np.testing.assert_allclose(gaps[1:3], 1, atol=0.35)
    assert made.class_biases[3] == pytest.approx(0, abs=1e-4)  # no data: what holds for all
    rows = np.array(made.class_thresholds)
    assert np.all((rows[:, 3] > rows[:, :3].min(1) - 0.1) & (rows[:, 3] < rows[:, :3].max(1) + 0.1))


def test_curve_between_the_sizes_is_interpolated_over_the_logarithm() -> None:
    made = Calibration(("a", "b"), (16.0, 64.0), (1.0, 0.5), (0.0, 1.0), (0.0, -0.5), ((0.2, 0.3), (0.4, 0.5)))
    scores, labels = torch.full((5,), 0.3), torch.tensor([0, 0, 0, 0, 1])
    boxes = boxes_of([4, 16, 32, 640, 32])
    low = float(logit(0.3))
    slopes, biases = [1, 1, 1.5, 2, 1.5], [0, 0, 0.5, 1, 0.0]
    expected = [expit(slope * low + bias) for slope, bias in zip(slopes, biases, strict=True)]
    # The scores come in float32.
    np.testing.assert_allclose(made.calibrate(boxes, scores, labels), expected, rtol=1e-6)
    np.testing.assert_allclose(made.thresholds(boxes, labels), [0.2, 0.2, 0.3, 0.4, 0.4], rtol=1e-6)
    near = made.calibrate(boxes_of([31.9, 32.1]), scores[:2], labels[:2])
    assert abs(float(near[0] - near[1])) < 0.002
    for values in (made.calibrate(boxes, scores, labels), made.thresholds(boxes, labels)):
        assert values.dtype == torch.float32 and values.shape == (5,)
    nothing = torch.zeros(0)
    assert made.calibrate(torch.zeros(0, 4), nothing, nothing.long()).shape == (0,)
    assert made.thresholds(torch.zeros(0, 4), nothing.long()).shape == (0,)


def test_order_within_a_size_is_kept_and_extremes_stay_probabilities() -> None:
    made = Calibration(("a",), (16.0, 64.0), (0.05, 20.0), (-3.0, 3.0), (0.0,), ((0.5,), (0.5,)))
    scores = torch.tensor([0.0, 1e-9, 1e-4, 0.1, 0.5, 0.9, 0.9999, 1.0])
    for size in (0.0, 3.0, 16.0, 31.0, 64.0, 5000.0):
        values = made.calibrate(boxes_of([size] * len(scores)), scores, torch.zeros(len(scores), dtype=torch.int64))
        assert bool(torch.all(values[1:] >= values[:-1])) and bool(values.isfinite().all())
        assert float(values.min()) >= 0 and float(values.max()) <= 1
    assert float(values[-2]) > float(values[1])


@pytest.mark.parametrize("scores", ["certain", "separable", "equal"])
def test_data_without_a_best_fit_still_gives_one(scores: str) -> None:
    """Everything right, right and wrong apart, all scores the same: a plain fit would run off to infinity."""
    ground_truth, detections = draw_scene(np.random.default_rng(7), 4, 40, lambda p, size, label: 0.5)
    hit = {(item["image_id"], tuple(item["bbox"])) for item in ground_truth["annotations"]}
    for item in detections:
        is_right = (item["image_id"], tuple(item["bbox"])) in hit
        item["score"] = {"certain": 1.0, "separable": float(is_right), "equal": 0.5}[scores]
    if scores == "certain":
        detections = [item for item in detections if (item["image_id"], tuple(item["bbox"])) in hit]
    report = calibrate_detections(ground_truth, detections, size_bands=BANDS)
    made = report.calibration
    assert all(0.05 <= value <= 20 for value in made.temperatures)
    assert np.all(np.abs(made.biases) < 12)
    if scores != "equal":
        assert report.everything.ece_after < 0.05 and report.everything.auto.precision == 1
    json.dumps(report.to_dict(), allow_nan=False)


def test_what_lies_in_a_crowd_does_not_count() -> None:
    ground_truth, detections = draw_scene(np.random.default_rng(8), 10, 40, lambda p, size, label: p)
    plain = calibrate_detections(ground_truth, detections, size_bands=BANDS)
    rng = np.random.default_rng(9)
    crowd = {"image_id": 1, "category_id": 1, "bbox": [0, 7000, 500, 500], "area": 250_000, "iscrowd": 1, "id": 10**6}
    inside = [
        {"image_id": 1, "category_id": 1, "bbox": [*rng.uniform(0, 200, 2) + (0, 7000), 30, 30], "score": 0.95}
        for _ in range(200)
    ]
    inside = [{**item, "bbox": [float(value) for value in item["bbox"]]} for item in inside]
    ground_truth["annotations"].append(crowd)
    same = calibrate_detections(ground_truth, detections + inside, size_bands={"small": (0, 32), "large": (32, 1e5)})
    # The sizes at which the curve is known may move with the new boxes, the numbers of the measurement not.
    assert same.everything.num_detections == plain.everything.num_detections
    assert same.everything.num_objects == plain.everything.num_objects
    assert same.everything.fixed == plain.everything.fixed
    assert same.everything.ece_before == plain.everything.ece_before

    zeros = np.zeros(60, dtype=np.int64)
    boxes = np.tile([0.0, 0, 16, 16], (60, 1)) + np.arange(60)[:, None] * 20
    found = FoundBoxes(zeros, boxes, zeros, np.linspace(0.1, 0.9, 60))
    true = TrueBoxes(zeros, boxes, zeros, np.full(60, 256.0), zeros.astype(bool))
    matched = np.where(np.arange(60) % 3 == 0, np.arange(60), np.where(np.arange(60) % 3 == 1, UNMATCHED, IN_CROWD))
    known = matched != IN_CROWD
    with_crowd = fit_calibration(found, true, matched, ("a",), (16.0,), Objective())
    assert with_crowd == fit_calibration(found[known], true, matched[known], ("a",), (16.0,), Objective())


# --- thresholds ---


@pytest.mark.parametrize("objective", ["f1", "precision=0.7", "recall=0.6", "precision=1", "recall=1"])
def test_threshold_is_that_of_an_exhaustive_search(objective: str) -> None:
    goal = Objective.parse(objective)
    rng = np.random.default_rng(11)
    for _ in range(20):
        scores = np.sort(rng.integers(1, 25, 60) / 25)[::-1].copy()
        weights = rng.uniform(0.1, 1, 60)
        right = weights * (rng.random(60) < scores)
        num_objects = float(right.sum() * rng.uniform(1, 2)) + 0.1
        found = best_threshold(scores, right, weights, num_objects, goal)
        results = []
        for candidate in (*np.unique(scores), 0.0):
            kept = scores >= candidate
            hits, taken = right[kept].sum(), weights[kept].sum()
            results.append((candidate, 2 * hits / (taken + num_objects), hits / taken, hits / num_objects, taken))
        kept = scores >= found
        values = (2 * right[kept].sum() / (weights[kept].sum() + num_objects), right[kept].sum() / weights[kept].sum())
        if goal.name == "f1":
            assert values[0] == pytest.approx(max(result[1] for result in results))
        elif goal.name == "precision":
            good = [result for result in results if result[2] >= goal.target - 1e-9]
            expected = max(good, key=lambda result: result[4]) if good else max(results, key=lambda result: result[2])
            assert weights[kept].sum() == pytest.approx(expected[4])
        else:
            good = [result for result in results if result[3] >= goal.target - 1e-9]
            expected_taken = min(result[4] for result in good) if good else weights.sum()
            assert weights[kept].sum() == pytest.approx(expected_taken)
        assert found not in scores  # between two scores, so that rounding decides nothing


@pytest.mark.parametrize("num_classes", [1, 2])
def test_thresholds_are_the_best_for_their_own_objects_and_a_few_others(num_classes: int) -> None:
    """Against plain loops: F1 of the detections of a size and class together with 20 objects' worth of the others."""
    rng = np.random.default_rng(13)
    ground_truth, detections = draw_scene(rng, 6, 50, lambda p, size, label: p * size / LARGE, num_classes)
    made = calibrate_detections(ground_truth, detections, size_bands=BANDS).calibration
    labels = torch.tensor([item["category_id"] - 1 for item in detections])
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (item["bbox"] for item in detections)])
    scores = made.calibrate(boxes, torch.tensor([item["score"] for item in detections]), labels).tolist()
    objects = ground_truth["annotations"]
    hit = {(item["image_id"], tuple(item["bbox"])) for item in objects}

    def weight(item: dict[str, Any], size: float | None, label: int | None) -> float:
        """Of a detection or an object in the group of a size, of a class, or of both."""
        if size is None and label is None:
            return 1.0
        own = float(size in (None, item["bbox"][2]) and label in (None, item["category_id"] - 1))
        if size is None or label is None:
            return own + SHARED_OBJECTS * weight(item, None, None) / len(objects)
        return own + sum(
            SHARED_OBJECTS / 2 * weight(item, *wider) / totals[wider] for wider in ((size, None), (None, label))
        )

    totals = {
        wider: sum(weight(item, *wider) for item in objects)
        for wider in (*((size, None) for size in made.sizes_px), *((None, label) for label in range(num_classes)))
    }
    for (row, size), label in itertools.product(enumerate(made.sizes_px), range(num_classes)):
        group = (size, label if num_classes > 1 else None)
        weights = [weight(item, *group) for item in detections]
        wanted = sum(weight(item, *group) for item in objects)

        def f1(threshold: float, weights: list[float] = weights, wanted: float = wanted) -> float:
            hits = taken = 0.0
            for item, score, value in zip(detections, scores, weights, strict=True):
                if score >= threshold:
                    taken += value
                    hits += value * ((item["image_id"], tuple(item["bbox"])) in hit)
            return 2 * hits / (taken + wanted)

        best = max(f1(score) for score in sorted(set(scores)))
        assert f1(made.class_thresholds[row][label]) == pytest.approx(best)


def test_objectives_are_reached_on_images_that_the_fit_did_not_see() -> None:
    ground_truth, detections = draw_scene(np.random.default_rng(17), 40, 100, lambda p, size, label: p * size / LARGE)
    at = {
        goal: calibrate_detections(ground_truth, detections, size_bands=BANDS, objective=goal)
        for goal in ("f1", "precision=0.8", "recall=0.7")
    }
    for name in BANDS:
        # 2000 detections a size; 0.05 is about two standard errors of what is kept of them.
        assert at["precision=0.8"].by_size[name].auto.precision == pytest.approx(0.8, abs=0.05)
        assert at["recall=0.7"].by_size[name].auto.recall == pytest.approx(0.7, abs=0.05)
        assert at["f1"].by_size[name].auto.f1 >= at["f1"].by_size[name].fixed.f1 - 0.01
    # The scores of small objects are a quarter of what they should be: a common threshold loses nearly all of them.
    small = at["f1"].by_size["small"]
    assert small.fixed.recall < 0.1 and small.auto.f1 > 0.5


@pytest.mark.parametrize(
    "text", ["f2", "precision", "precision=", "precision=0", "recall=1.5", "recall=x", "f1=0.5", ""]
)
def test_unknown_objectives_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="is not understood: give f1, precision=P or recall=R"):
        Objective.parse(text)


# --- measuring ---


def test_calibration_error_equals_plain_loops() -> None:
    rng = np.random.default_rng(19)
    confidence = np.concatenate([rng.random(200), [0.0, 1.0, 1 / 15, 0.6]])
    right = rng.random(204) < confidence**2
    error, bins = expected_calibration_error(confidence, right)
    expected = 0.0
    for number in range(15):
        inside = [
            place
            for place, value in enumerate(confidence)
            if number / 15 <= value < (number + 1) / 15 or (number == 14 and value == 1)
        ]
        if inside:
            mean = sum(confidence[place] for place in inside) / len(inside)
            hits = sum(bool(right[place]) for place in inside) / len(inside)
            expected += abs(mean - hits) * len(inside) / 204
    assert error == pytest.approx(expected)
    assert sum(count for _, _, count in bins) == 204
    assert np.isnan(expected_calibration_error(np.zeros(0), np.zeros(0, bool))[0])
    assert expected_calibration_error(np.array([0.25, 0.25]), np.array([True, False]))[0] == pytest.approx(0.25)


def test_numbers_are_not_measured_on_what_was_fitted() -> None:
    """Fifty classes of a few detections: what their own biases gain on the data of the fit is not reported."""
    rng = np.random.default_rng(23)
    ground_truth, detections = draw_scene(rng, 6, 50, lambda p, size, label: p, num_classes=50)
    report = calibrate_detections(ground_truth, detections, size_bands=BANDS)
    boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (item["bbox"] for item in detections)])
    labels = torch.tensor([item["category_id"] - 1 for item in detections])
    raw = torch.tensor([item["score"] for item in detections], dtype=torch.float64)
    scores = report.calibration.calibrate(boxes, raw, labels).double().numpy()
    hit = {(item["image_id"], tuple(item["bbox"])) for item in ground_truth["annotations"]}
    right = np.array([(item["image_id"], tuple(item["bbox"])) in hit for item in detections])
    used = raw.numpy() >= 0.05

    def loss(bins: list[tuple[float, float, int]]) -> float:
        return sum(count * (confidence - precision) ** 2 for confidence, precision, count in bins)

    fitted = expected_calibration_error(scores[used], right[used])[1]
    assert loss(report.everything.bins_after) > loss(fitted)


def test_a_single_image_is_divided_into_strips_and_little_data_is_said() -> None:
    ground_truth, detections = draw_scene(np.random.default_rng(29), 1, 200, lambda p, size, label: p / 2)
    report = calibrate_detections(ground_truth, detections, size_bands=BANDS)
    assert (report.num_folds, report.folds_of) == (5, "strips")
    assert report.everything.ece_after < report.everything.ece_before
    assert "strips of the one image" in report.notes()[0]

    object_ = ground_truth["annotations"][0]
    lone = {**ground_truth, "annotations": [object_]}
    one = [{"image_id": 1, "category_id": 1, "bbox": object_["bbox"], "score": 0.4}]
    report = calibrate_detections(lone, one, size_bands=BANDS)
    assert report.num_folds == 0 and np.isnan(report.everything.ece_after)
    assert "nothing could be measured" in report.notes()[0]
    assert report.to_dict()["everything"]["ece_after"] is None


def test_no_image_is_in_two_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []
    original = calibration_report.fit_calibration

    def fit(found: FoundBoxes, true: TrueBoxes, *rest: Any) -> Calibration:
        seen.append(set(found.images.tolist()) | set(true.images.tolist()))
        return original(found, true, *rest)

    monkeypatch.setattr(calibration_report, "fit_calibration", fit)
    ground_truth, detections = draw_scene(np.random.default_rng(31), 11, 20, lambda p, size, label: p)
    calibrate_detections(ground_truth, detections, size_bands=BANDS)
    everything, *folds = seen
    left_out = [everything - fold for fold in folds]
    assert len(folds) == 5 and sorted(itertools.chain(*left_out)) == sorted(everything)
    assert all(2 <= len(part) <= 3 for part in left_out)


def test_a_kept_detection_takes_the_place_of_a_better_one_that_is_not_kept() -> None:
    """Two detections of one object, and the better one falls below the threshold of its size."""
    zeros = np.zeros(2, dtype=np.int64)
    found = FoundBoxes(zeros, np.array([[0.0, 0, 31, 31], [0, 0, 33, 33]]), zeros, np.array([0.5, 0.4]))
    true = TrueBoxes(zeros[:1], np.array([[0.0, 0, 32, 32]]), zeros[:1], np.array([1024.0]), np.zeros(1, bool))
    made = Calibration(("a",), (16.0,), (1.0,), (0.0,), (0.0,), ((0.5,),))
    matched = match_detections(found, true)
    assert matched.tolist() == [0, UNMATCHED]
    both, second = np.array([True, True]), np.array([False, True])
    fixed, auto = (calibration_report._Choice(found, true, found.scores, kept, 0.5) for kept in (both, second))
    measure = calibration_report._Measure(found, true, matched, made, found.scores, fixed, auto, 0.05)
    group = measure.group(both, np.array([True]))
    assert (group.fixed.precision, group.fixed.recall, group.fixed.f1) == (0.5, 1, pytest.approx(2 / 3))
    assert (group.auto.precision, group.auto.recall, group.auto.f1) == (1, 1, 1)


def test_band_sizes_are_where_the_detections_are() -> None:
    sizes = np.array([8.0, 10, 12, 30, 40, 50, 60, 33])
    boxes = np.stack([0 * sizes, 0 * sizes, sizes, sizes], axis=1)
    zeros = np.zeros(8, dtype=np.int64)
    found = FoundBoxes(zeros, boxes, zeros, np.array([0.1, 0.9, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1]))
    assert band_sizes(found, [(0, 32), (32, 96), (96, 1e5)]) == (10.0, 50.0)
    # The same again, and a band within another: nearly the same size counts once.
    assert band_sizes(found, [(0, 32), (9, 11), (32, 96), (200, 300)]) == (10.0, 50.0)
    assert band_sizes(found, [(500, 600)]) == (30.0,)  # no band holds any: half of all scores lie up to here
    assert size_shares(np.array([1.0, 10, 500]), (10.0, 50.0)).tolist() == [[1, 0], [1, 0], [0, 1]]


# --- what the user gives and gets ---


def test_mistakes_are_named() -> None:
    ground_truth, detections = draw_scene(np.random.default_rng(41), 2, 20, lambda p, size, label: p)
    with pytest.raises(InputError, match="has score 3.5: calibration needs scores from 0 to 1"):
        calibrate_detections(ground_truth, [{**detections[0], "score": 3.5}])
    away = [{**item, "bbox": [5000.0, 0, 8, 8]} for item in detections]
    with pytest.raises(InputError, match=r"none of the 40 detections meets an object .*check that"):
        calibrate_detections(ground_truth, away)
    with pytest.raises(InputError, match="none of the 0 detections"):
        calibrate_detections(ground_truth, [])
    crowd = [{**item, "iscrowd": 1} for item in ground_truth["annotations"]]
    with pytest.raises(InputError, match="the ground truth has no objects"):
        calibrate_detections({**ground_truth, "annotations": crowd}, detections)
    with pytest.raises(InputError, match="has the class 'c0', which is none of the model's: tree"):
        calibrate_detections(ground_truth, detections, class_names=("tree",))
    with pytest.raises(InputError, match="iou is 0"):
        calibrate_detections(ground_truth, detections, iou=0)
    with pytest.raises(InputError, match="min_score is 1"):
        calibrate_detections(ground_truth, detections, min_score=1)


def test_labels_follow_the_models_classes_and_not_the_ids() -> None:
    shift = (0.0, -2.0)
    ground_truth, detections = draw_scene(
        np.random.default_rng(43), 20, 60, lambda p, size, label: float(expit(logit(p) + shift[label])), num_classes=2
    )
    names = ("another", "c1", "c0")
    report = calibrate_detections(ground_truth, detections, class_names=names, size_bands=BANDS)
    made = report.calibration
    assert made.class_names == names and made.class_biases[1] > made.class_biases[2] + 1
    assert list(report.by_class) == list(names) and report.by_class["another"].num_objects == 0


@pytest.fixture(scope="module")
def report() -> CalibrationReport:
    ground_truth, detections = draw_scene(np.random.default_rng(47), 6, 60, lambda p, size, label: p / 2, num_classes=2)
    bands = {**BANDS, "huge": (500.0, 1e5)}
    return calibrate_detections(ground_truth, detections, size_bands=bands, objective="precision=0.8")


def test_calibration_survives_json(report: CalibrationReport) -> None:
    made = dataclasses.replace(report.calibration, weights="abc", settings={"tile_size": 640, "short_side": 800})
    stored = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert Calibration.from_dict(stored) == dataclasses.replace(made, measured=stored["measured"])
    assert stored["objective"] == "precision=0.8" and stored["measured"]["huge"]["ece_after"] is None
    for changes, message in (
        ({"format_version": 2}, "newer crossdino"),
        ({"format_version": None}, "is no calibration"),
        ({"temperatures": [1.0, -1.0]}, "do not fit together"),
        ({"temperatures": [1.0]}, "do not fit together"),
        ({"sizes_px": [64.0, 16.0]}, "do not fit together"),
        ({"class_thresholds": [[0.5], [0.5]]}, "do not fit together"),
        ({"biases": [float("nan"), 0.0]}, "no whole calibration .*not finite"),
        ({"biases": "much"}, "no whole calibration"),
    ):
        with pytest.raises(InputError, match=message):
            Calibration.from_dict({**stored, **changes})
    with pytest.raises(InputError, match="no whole calibration .KeyError: 'biases'"):
        Calibration.from_dict({key: value for key, value in stored.items() if key != "biases"})
    with pytest.raises(InputError, match="is no calibration"):
        Calibration.from_dict([])


def test_other_settings_are_told() -> None:
    made = Calibration(("a",), (16.0,), (1.0,), (0.0,), (0.0,), ((0.5,),))
    tiled = dataclasses.replace(made, settings={"tile_size": 640, "tile_overlap": 64, "short_side": 800})
    assert tiled.differences({"tile_size": 640, "tile_overlap": 64, "short_side": 800, "threshold": 0.3}) == []
    assert tiled.differences({"tile_size": 320, "short_side": 800}) == ["tile_size is 320 instead of 640"]
    assert len(tiled.differences({"tile_size": 0, "tile_overlap": 0})) == 2
    whole = dataclasses.replace(made, settings={"tile_size": 0, "tile_overlap": 64})
    assert whole.differences({"tile_size": 0, "tile_overlap": 32}) == []
    assert made.differences({"tile_size": 320}) == []


def test_table_and_picture(report: CalibrationReport, tmp_path: Path) -> None:
    table = report.table()
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == ["all", "small", "large", "huge", "c0", "c1"]
    small = report.by_size["small"]
    assert cells[6][1] == f"{100 * small.ece_before:.1f}" and cells[7][1] == f"{100 * small.ece_after:.1f}"
    assert cells[7][3] == "-" and cells[8][3] == "-"  # nothing is that large
    assert cells[2][0] == str(report.everything.num_objects)
    assert any("huge (0)" in line for line in report.notes())
    draw_calibration(report, tmp_path / "calibration.png")
    pixels = imread(tmp_path / "calibration.png")
    assert pixels.shape[1] > 1000 and pixels[..., :3].std() > 0.05
