"""WiderPerson's numbers: hand-made cases of every rule, a plain version, and what brambox 3.0.0 itself gave."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from crossdino.errors import InputError
from crossdino.evaluation.miss_rate import (
    FPPI_POINTS,
    average_precision,
    evaluate_widerperson,
    log_average_miss_rate,
    sample_miss_rate,
    widerperson_curve,
)
from tests.reference.miss_rate_plain import evaluate_plain

# The same sums of the same double precision numbers, in another order.
TOLERANCE = 1e-12


def truth(*images: Sequence[tuple[float, ...]], **extra: object) -> dict:
    """Images of boxes (x, y, width, height) or (x, y, width, height, ignored), with the ids 1, 2, ..."""
    annotations = []
    for image_id, boxes in enumerate(images, start=1):
        for box in boxes:
            ignored = int(len(box) == 5 and bool(box[4]))
            fields = {"image_id": image_id, "category_id": 1, "bbox": list(box[:4]), "iscrowd": ignored}
            annotations.append({"id": len(annotations) + 1, "area": box[2] * box[3], **fields})
    return {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in range(1, len(images) + 1)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "pedestrian"}],
        **extra,
    }


def found(*rows: tuple[float, ...]) -> list[dict]:
    """Detections (image, score, x, y, width, height)."""
    return [{"image_id": row[0], "category_id": 1, "bbox": list(row[2:]), "score": row[1]} for row in rows]


def random_case(seed: int, num_images: int, objects: int, detections: int, ignored: float, score_step: float) -> tuple:
    """Whole-numbered objects as in WiderPerson, some ignored, and jittered or random detections; some images empty."""
    rng = np.random.default_rng(seed)
    images, rows = [], []
    for image_id in range(1, num_images + 1):
        boxes = []
        for _ in range(int(rng.integers(0, objects)) if image_id % 5 else 0):
            box = np.round([rng.uniform(0, 450), rng.uniform(0, 350), rng.uniform(4, 60), rng.uniform(8, 90)]).tolist()
            boxes.append((*box, rng.random() < ignored))
        images.append(boxes)
        for _ in range(int(rng.integers(0, detections))):
            box = np.array([rng.uniform(0, 450), rng.uniform(0, 350), rng.uniform(4, 60), rng.uniform(8, 90)])
            if boxes and rng.random() < 0.8:
                box = np.array(boxes[int(rng.integers(len(boxes)))][:4])
                box += rng.normal(0, 0.08, 4) * np.tile(box[2:], 2)
            score = rng.random()
            rows.append((image_id, round(score / score_step) * score_step if score_step else score, *box.tolist()))
    return truth(*images), found(*rows)


CASES = [
    (0, 20, 12, 30, 0.3, 0.0),
    (1, 20, 12, 30, 0.0, 0.0),
    (2, 20, 40, 300, 0.3, 0.0),
    (3, 20, 12, 3, 0.3, 0.0),  # ends before one false positive per image
    (4, 20, 12, 10, 0.3, 0.05),  # equal scores
    (5, 200, 8, 20, 0.2, 0.0),
]
# AP, Recall and mMR of brambox 3.0.0 (Python 3.8, numpy 1.19, scipy 1.10), called as IterDet calls it.
BRAMBOX = [
    [0.32947368189416437, 0.7258064516129032, 0.9246604600316416],
    [0.5444572629659462, 0.8235294117647058, 0.8444694940390093],
    [0.3271843258821079, 0.8679245283018868, 0.9622645735444805],
    [0.10110930735930734, 0.10714285714285714, 0.0],
    [0.18799465515310956, 0.3880597014925373, 0.9396093003688213],
    [0.36708388881397697, 0.7109207708779444, 0.875387629559061],
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_equal_to_brambox(case: int) -> None:
    metrics = evaluate_widerperson(*random_case(*CASES[case])).metrics
    assert list(metrics.values()) == pytest.approx(BRAMBOX[case], abs=TOLERANCE)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_equal_to_the_plain_version(case: int) -> None:
    ground_truth, predictions = random_case(*CASES[case])
    objects, detections = {}, {}
    for item in ground_truth["annotations"]:
        objects.setdefault(item["image_id"], []).append((*item["bbox"], item["iscrowd"]))
    for item in predictions:
        detections.setdefault(item["image_id"], []).append((*item["bbox"], item["score"]))
    expected = evaluate_plain(objects, detections)
    assert evaluate_widerperson(ground_truth, predictions).metrics == pytest.approx(expected, abs=TOLERANCE)


def test_the_whole_by_hand() -> None:
    # Two images, three objects. By score: right (FPPI 0), wrong (0.5), right, wrong (1.0); the third is never found.
    ground_truth = truth([(0, 0, 10, 10), (100, 0, 10, 10)], [(0, 0, 10, 10)])
    predictions = found((1, 0.9, 0, 0, 10, 10), (1, 0.8, 50, 50, 5, 5), (2, 0.7, 0, 0, 10, 10), (2, 0.6, 50, 50, 5, 5))
    result = evaluate_widerperson(ground_truth, predictions)
    assert result.metrics["AP"] == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3, abs=TOLERANCE)
    assert result.metrics["Recall"] == pytest.approx(2 / 3, abs=TOLERANCE)
    # Points of the curve (FPPI, miss rate): (0, 2/3) (0.5, 2/3) (0.5, 1/3) (1, 1/3). Of the nine samples seven lie
    # below FPPI 0.5, two (0.56 and 1) from there on.
    assert result.metrics["mMR"] == pytest.approx(((2 / 3) ** 7 * (1 / 3) ** 2) ** (1 / 9), abs=TOLERANCE)
    assert result.by_class == {"pedestrian": result.metrics}
    assert (result.num_images, result.num_objects, result.num_predictions) == (2, 3, 4)
    assert (result.counts["true_positives"], result.counts["false_positives"]) == (2, 2)
    assert result.notes == ()
    assert json.loads(result.to_json())["metrics"]["Recall"] == result.metrics["Recall"]


def test_the_curve() -> None:
    ground_truth = truth([(0, 0, 10, 10), (100, 0, 10, 10)], [(0, 0, 10, 10)])
    predictions = found((1, 0.9, 0, 0, 10, 10), (1, 0.8, 50, 50, 5, 5), (2, 0.8, 0, 0, 10, 10), (2, 0.5, 9, 9, 1, 1))
    curve = widerperson_curve(ground_truth, predictions)
    assert curve.thresholds.tolist() == [0.9, 0.8, 0.5]  # one point for a score
    assert curve.fppi.tolist() == [0.0, 0.5, 1.0]
    assert curve.recall.tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3])
    assert curve.miss_rate.tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert curve.precision.tolist() == pytest.approx([1, 2 / 3, 1 / 2])


def counts(ground_truth: dict, predictions: list[dict], **options: object) -> tuple[int, int, int]:
    """Right, wrong, and in regions to ignore."""
    told = evaluate_widerperson(ground_truth, predictions, **options).counts  # pyright: ignore[reportArgumentType]
    return told["true_positives"], told["false_positives"], told["detections_in_ignored"]


@pytest.mark.parametrize(("width", "right"), [(20, 1), (20.001, 0), (19.999, 1)])
def test_an_iou_of_one_half_is_enough(width: float, right: int) -> None:
    # A box within one of twice its size: the IoU is 10 / width.
    assert counts(truth([(0, 0, 10, 10)]), found((1, 0.9, 0, 0, width, 10))) == (right, 1 - right, 0)


@pytest.mark.parametrize(("x", "inside"), [(95, 1), (95.001, 0), (94.999, 1)])
def test_half_of_a_detection_in_a_region_is_enough(x: float, inside: int) -> None:
    # The region ends at x = 100 and is far larger, so that its IoU with the detection is next to nothing.
    ground_truth = truth([(0, 0, 100, 100, True), (300, 300, 5, 5)])
    assert counts(ground_truth, found((1, 0.9, x, 10, 10, 10))) == (0, 1 - inside, inside)


def test_a_region_holds_any_number_of_detections() -> None:
    ground_truth = truth([(0, 0, 100, 100, True), (300, 300, 5, 5)])
    assert counts(ground_truth, found(*((1, 0.5 + step / 10, 10 * step, 0, 10, 10) for step in range(5)))) == (0, 0, 5)


def test_a_real_object_goes_before_a_region_that_covers_more() -> None:
    # IoU 0.6 with the object, wholly inside the region.
    ground_truth = truth([(0, 0, 100, 100, True), (0, 0, 10, 6)])
    assert counts(ground_truth, found((1, 0.9, 0, 0, 10, 10))) == (1, 0, 0)
    # The object is taken: the second one falls into the region.
    assert counts(ground_truth, found((1, 0.9, 0, 0, 10, 6), (1, 0.8, 0, 0, 10, 10))) == (1, 0, 1)


def test_the_best_free_object_is_taken() -> None:
    # The first detection overlaps both by half or more and takes the second object, which it fits exactly; the next
    # one would like that too, and takes what is left.
    ground_truth = truth([(0, 0, 10, 10), (2, 0, 10, 10)])
    assert counts(ground_truth, found((1, 0.9, 2, 0, 10, 10), (1, 0.8, 2, 0, 10, 10))) == (2, 0, 0)
    # By score, not by order: the last in the file comes first, and the other one finds nothing.
    ground_truth = truth([(0, 0, 10, 10)])
    curve = widerperson_curve(ground_truth, found((1, 0.3, 0, 0, 10, 10), (1, 0.9, 0, 0, 10, 9)))
    assert curve.precision.tolist() == [1.0, 0.5]


def test_no_detection_is_cut() -> None:
    # 1,200 wrong ones of higher score, then the right one.
    rows = [(1, 0.9, 500 + step, 500, 1, 1) for step in range(1200)]
    result = evaluate_widerperson(truth([(0, 0, 10, 10)]), found(*rows, (1, 0.1, 0, 0, 10, 10)))
    assert result.metrics["Recall"] == 1.0
    assert result.metrics["AP"] == pytest.approx(1 / 1201, abs=TOLERANCE)


def test_equal_scores_are_one_point() -> None:
    # Whatever their order: half of the detections of this score are right.
    rows = [(1, 0.5, 0, 0, 10, 10), (1, 0.5, 50, 0, 10, 10)]
    for order in (rows, rows[::-1]):
        assert evaluate_widerperson(truth([(0, 0, 10, 10)]), found(*order)).metrics["AP"] == 0.5


def test_precision_has_no_envelope() -> None:
    # Precision 0, 1/2, 2/3: the rising part is not filled up.
    ground_truth = truth([(0, 0, 10, 10), (100, 0, 10, 10)])
    predictions = found((1, 0.9, 50, 50, 5, 5), (1, 0.8, 0, 0, 10, 10), (1, 0.7, 100, 0, 10, 10))
    expected = 1 / 2 * 1 / 2 + 1 / 2 * 2 / 3
    assert evaluate_widerperson(ground_truth, predictions).metrics["AP"] == pytest.approx(expected, abs=TOLERANCE)


def test_a_curve_that_ends_early_is_zero_and_says_so() -> None:
    ground_truth = truth([(0, 0, 10, 10), (100, 0, 10, 10)], [(0, 0, 10, 10)])
    predictions = found((1, 0.9, 0, 0, 10, 10), (1, 0.8, 50, 50, 5, 5))
    result = evaluate_widerperson(ground_truth, predictions)
    assert result.metrics["mMR"] == 0.0
    (note,) = result.notes
    # The miss rate is 2/3 all along, so that carrying it on would leave that.
    assert "ends at 0.5 false positives" in note and "0.666667" in note
    assert result.settings["miss_rate_at_points"] == pytest.approx([2 / 3] * 7 + [0, 0])


def test_a_curve_that_begins_late_is_one_before() -> None:
    # The best score is that of a right and a wrong detection: the curve begins at FPPI 1/4 with a miss rate of 3/4.
    ground_truth = truth(*([[(0, 0, 10, 10)]] * 4))
    rows = [(1, 0.9, 50, 0, 9, 9), (1, 0.9, 0, 0, 10, 10), *((2, 0.1 + k / 10, 50, 50, 9, 9) for k in range(4))]
    sampled = evaluate_widerperson(ground_truth, found(*rows)).settings["miss_rate_at_points"]
    assert sampled == pytest.approx([1.0] * 6 + [0.75] * 3)


def test_everything_found_is_zero_and_says_why() -> None:
    ground_truth = truth([(0, 0, 10, 10)])
    result = evaluate_widerperson(ground_truth, found((1, 0.9, 0, 0, 10, 10), (1, 0.8, 50, 0, 9, 9)))
    assert result.metrics["mMR"] == 0.0
    assert "every object is found" in result.notes[0]


def test_nine_points() -> None:
    assert pytest.approx([10 ** (-2 + step / 4) for step in range(9)]) == FPPI_POINTS
    fppi, miss_rate = np.array([0.0, 2.0]), np.array([1.0, 0.0])
    assert sample_miss_rate(fppi, miss_rate).tolist() == pytest.approx([1 - point / 2 for point in FPPI_POINTS])
    expected = math.exp(sum(math.log(1 - point / 2) for point in FPPI_POINTS) / 9)
    assert log_average_miss_rate(fppi, miss_rate) == pytest.approx(expected, abs=TOLERANCE)


def test_undefined_and_empty() -> None:
    ground_truth = truth([(0, 0, 10, 10)])
    nothing = evaluate_widerperson(ground_truth, [])
    assert (nothing.metrics["AP"], nothing.metrics["Recall"]) == (0.0, 0.0)
    assert math.isnan(nothing.metrics["mMR"]) and "no detection" in nothing.notes[0]
    one = evaluate_widerperson(ground_truth, found((1, 0.9, 0, 0, 10, 10)))
    assert (one.metrics["AP"], one.metrics["Recall"]) == (1.0, 1.0)
    assert math.isnan(one.metrics["mMR"]) and "one score" in one.notes[0]
    no_objects = evaluate_widerperson(truth([(0, 0, 10, 10, True)]), found((1, 0.9, 50, 0, 10, 10)))
    assert all(math.isnan(value) for value in no_objects.metrics.values())
    assert json.loads(no_objects.to_json())["metrics"] == {"AP": None, "Recall": None, "mMR": None}
    assert math.isnan(average_precision(np.zeros(0), np.zeros(0)))


def test_images_without_annotation_do_not_count() -> None:
    empty_images = [[], [], []]
    ground_truth = truth([(0, 0, 10, 10)], *empty_images)
    rows = [(1, 0.9, 0, 0, 10, 10), (1, 0.8, 50, 0, 9, 9), (2, 0.7, 50, 0, 9, 9)]
    left_out = evaluate_widerperson(ground_truth, found(*rows))
    assert left_out.num_images == 1
    assert left_out.counts["detections_left_out_with_their_image"] == 1
    assert left_out.settings["fppi_reached"] == 1.0
    assert "3 images without any annotation: left out" in left_out.notes[-1]
    counted = evaluate_widerperson(ground_truth, found(*rows), count_unannotated=True)
    assert counted.num_images == 4
    assert (counted.counts["false_positives"], counted.settings["fppi_reached"]) == (2, 0.5)


def test_the_file_says_which_images_are_without_annotation() -> None:
    # Image 2 has lines of which none became an annotation: it counts; only image 3 has no line.
    ground_truth = truth([(0, 0, 10, 10)], [], [], unannotated=[3])
    result = evaluate_widerperson(ground_truth, found((2, 0.7, 50, 0, 9, 9), (3, 0.6, 50, 0, 9, 9)))
    assert result.num_images == 2
    assert result.counts["false_positives"] == 1
    with pytest.raises(InputError, match="'unannotated' must list ids"):
        evaluate_widerperson({**ground_truth, "unannotated": [7]}, [])


def test_min_height_makes_small_objects_regions() -> None:
    ground_truth = truth([(0, 0, 30, 19.9), (100, 0, 10, 20), (200, 0, 10, 50)])
    predictions = found((1, 0.9, 0, 0, 30, 19.9), (1, 0.8, 100, 0, 10, 20))
    assert counts(ground_truth, predictions) == (2, 0, 0)
    assert counts(ground_truth, predictions, min_height=20) == (1, 0, 1)
    result = evaluate_widerperson(ground_truth, predictions, min_height=20)
    assert (result.num_objects, result.counts["ignored"], result.settings["min_height"]) == (2, 1, 20)
    with pytest.raises(InputError, match="min_height is -1"):
        evaluate_widerperson(ground_truth, predictions, min_height=-1)


def test_one_class_of_several() -> None:
    ground_truth = truth([(0, 0, 10, 10)])
    ground_truth["categories"].append({"id": 2, "name": "rider"})
    other = {"image_id": 1, "category_id": 2, "bbox": [0, 0, 10, 10], "score": 0.99}
    result = evaluate_widerperson(ground_truth, [*found((1, 0.9, 0, 0, 10, 10)), other])
    assert result.metrics["AP"] == 1.0
    assert (result.num_predictions, result.counts["detections_of_other_classes"]) == (2, 1)
    ground_truth["annotations"].append({"id": 9, "image_id": 1, "category_id": 2, "bbox": [0, 0, 1, 1], "iscrowd": 0})
    with pytest.raises(InputError, match=r"objects of pedestrian, rider.*crossdino prepare widerperson"):
        evaluate_widerperson(ground_truth, [])


def test_files_are_named_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "val.json"
    path.write_text(json.dumps(truth([(0, 0, 10, 10)])))
    results = tmp_path / "found.json"
    results.write_text(json.dumps(found((1, 0.9, 0, 0, 10, 10))))
    assert evaluate_widerperson(path, results).metrics["AP"] == 1.0
    results.write_text(json.dumps(found((5, 0.9, 0, 0, 10, 10))))
    with pytest.raises(InputError, match=r"found\.json: detection number 0 .* image_id 5.*val\.json"):
        evaluate_widerperson(path, results)
    broken = truth([(0, 0, 10, 10)])
    broken["annotations"][0]["bbox"] = [1, 2, 3]
    path.write_text(json.dumps(broken))
    with pytest.raises(InputError, match=r"val\.json: annotation number 0 .* has bbox \[1, 2, 3\]"):
        evaluate_widerperson(path, results)
