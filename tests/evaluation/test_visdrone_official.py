"""The VisDrone challenge's metric: every oddity of the toolkit by hand, and a plain version on random cases."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from crossdino.benchmarks import VISDRONE_CLASSES
from crossdino.errors import InputError
from crossdino.evaluation.protocol_result import ProtocolResult
from crossdino.evaluation.visdrone_official import IOU_THRESHOLDS, evaluate_visdrone_official
from tests.reference.visdrone_official_plain import evaluate_plain

# The same sums of the same double precision numbers, in another order.
TOLERANCE = 1e-12
METRICS = ("AP", "AP50", "AP75", "AR@1", "AR@10", "AR@100", "AR@500")
CAR, VAN = 4, 5


def image(gt: list, det: list, width: int = 100, height: int = 80) -> dict:
    """Rows x, y, width, height, score, category as in the two text files."""
    return {"width": width, "height": height, "gt": gt, "det": det}


def as_coco(images: list[dict], *, crowd: bool = False) -> tuple[dict, list[dict]]:
    """What `crossdino prepare visdrone` makes of the rows (mode `drop` or `crowd`), and COCO results."""
    listed, annotations, raw, results = [], [], [], []
    for number, one in enumerate(images, start=1):
        listed.append({"id": number, "file_name": f"{number:04d}.jpg", "width": one["width"], "height": one["height"]})
        for row in one["gt"]:
            box, score, category = list(row[:4]), row[4], row[5]
            common = {"image_id": number, "bbox": box, "score": score, "truncation": 0, "occlusion": 0}
            real = score == 1 and 1 <= category <= 10
            if not real:
                raw.append({**common, "category": category})
            for one_class in [category] if real else range(1, 11) if crowd else []:
                flags = {"id": len(annotations) + 1, "area": box[2] * box[3], "iscrowd": int(not real)}
                annotations.append({**common, **flags, "category_id": one_class})
        for row in one["det"]:
            results.append({"image_id": number, "category_id": row[5], "bbox": list(row[:4]), "score": row[4]})
    categories = [{"id": number, "name": name} for number, name in enumerate(VISDRONE_CLASSES, start=1)]
    return {
        "images": listed,
        "annotations": annotations,
        "categories": categories,
        "visdrone_ignored": raw,
    }, results


def measure(*images: dict) -> ProtocolResult:
    return evaluate_visdrone_official(*as_coco(list(images)))


def random_images(seed: int, num_images: int, detections: int, *, whole: bool, in_order: bool) -> list[dict]:
    """Objects of some classes, a few ignored, of class 11, or regions partly beyond the image; jittered detections."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(num_images):
        gt, det = [], []
        for _ in range(int(rng.integers(1, 12))):
            box = [int(rng.integers(0, 80)), int(rng.integers(0, 60)), *rng.integers(1, 30, 2).tolist()]
            gt.append([*box, int(rng.random() > 0.2), int(rng.choice([1, 2, 3, 4, 11]))])
        objects = list(gt)
        for _ in range(int(rng.integers(0, 3))):
            box = [int(rng.integers(-2, 84)), int(rng.integers(-2, 64)), *rng.integers(0, 40, 2).tolist()]
            gt.insert(int(rng.integers(0, len(gt) + 1)), [*box, 0, 0])
        for _ in range(int(rng.integers(0, detections))):
            base = objects[int(rng.integers(len(objects)))]
            shift = rng.integers(-3, 4, 4) if whole else rng.normal(0, 1.5, 4)
            box = (np.array(base[:4]) + shift).tolist()
            category = min(base[5], 10) if rng.random() < 0.85 else int(rng.integers(1, 11))
            score = round(float(rng.random()), 1 if whole else 9)
            det.append([box[0], box[1], max(box[2], 0), max(box[3], 0), score, category])
        if in_order:
            det.sort(key=lambda row: -row[4])
        images.append(image(gt, det, 80, 60))
    return images


@pytest.mark.parametrize(
    ("seed", "num_images", "detections", "whole", "in_order"),
    [
        (0, 8, 40, False, True),
        (1, 8, 40, True, True),  # many equal scores and equal IoU
        (2, 8, 40, True, False),
        (3, 4, 250, False, False),
        (4, 2, 1100, False, True),  # more than 500 in an image
        (5, 2, 1100, True, False),
    ],
)
def test_equal_to_the_plain_version(seed: int, num_images: int, detections: int, whole: bool, in_order: bool) -> None:
    images = random_images(seed, num_images, detections, whole=whole, in_order=in_order)
    expected = evaluate_plain(images)
    assert 0 < expected["AP"] < expected["AR@500"]
    for crowd in (False, True):  # the mode of `crossdino prepare` makes no difference
        assert evaluate_visdrone_official(*as_coco(images, crowd=crowd)).metrics == pytest.approx(
            expected, abs=TOLERANCE
        )


def test_by_hand() -> None:
    # Two cars. The third detection has an IoU of 0.8 with the second one: right at 0.50 to 0.80, seven thresholds.
    gt = [[0, 0, 10, 10, 1, CAR], [50, 0, 10, 10, 1, CAR]]
    det = [[0, 0, 10, 10, 0.9, CAR], [30, 30, 10, 10, 0.8, CAR], [50, 0, 10, 8, 0.7, CAR]]
    result = measure(image(gt, det))
    both, one = 1 / 2 * 1 + 1 / 2 * 2 / 3, 1 / 2
    assert result.metrics == pytest.approx(
        {
            "AP": (7 * both + 3 * one) / 10,
            "AP50": both,
            "AP75": both,
            "AR@1": 1 / 2,
            "AR@10": (7 * 1 + 3 / 2) / 10,
            "AR@100": (7 * 1 + 3 / 2) / 10,
            "AR@500": (7 * 1 + 3 / 2) / 10,
        },
        abs=TOLERANCE,
    )
    assert tuple(result.metrics) == METRICS
    assert result.by_class["car"] == result.metrics
    assert math.isnan(result.by_class["van"]["AP"])
    assert (result.num_images, result.num_objects, result.num_predictions) == (1, 2, 3)
    assert json.loads(result.to_json())["by_class"]["van"]["AR@500"] is None


def test_the_area_has_all_points_and_an_envelope() -> None:
    # Wrong, right, right: precision 0, 1/2, 2/3, which is filled up to 2/3 from the start.
    gt = [[0, 0, 10, 10, 1, CAR], [50, 0, 10, 10, 1, CAR], [70, 0, 10, 10, 1, CAR]]
    det = [[30, 30, 10, 10, 0.9, CAR], [0, 0, 10, 10, 0.8, CAR], [50, 0, 10, 10, 0.7, CAR]]
    assert measure(image(gt, det)).metrics["AP50"] == pytest.approx(2 / 3 * 2 / 3, abs=TOLERANCE)


def test_thresholds_are_those_of_the_loop() -> None:
    assert IOU_THRESHOLDS[7] == 0.5 + 7 * 0.05 != 0.85
    assert len(IOU_THRESHOLDS) == 10


def turned(rows: list[list], axis: str) -> list[list]:
    """The rows as they are, or with rows and columns exchanged."""
    return [[y, x, h, w, *rest] for x, y, w, h, *rest in rows] if axis == "y" else rows


@pytest.mark.parametrize("axis", ["x", "y"])
@pytest.mark.parametrize(("x", "num_objects"), [(7, 2), (8, 2), (9, 1), (10, 1)])
def test_half_is_removed(axis: str, x: int, num_objects: int) -> None:
    # Counted from 1, a box at x with width 20 is looked at in columns x + 1 to x + 20, of which x + 1 are 20 or more.
    gt = turned([[20, 1, 60, 79, 0, 0], [x, 10, 20, 10, 1, CAR], [90, 70, 5, 5, 1, CAR]], axis)
    result = measure(image(gt, turned([[x, 10, 20, 10, 0.9, CAR]], axis), 100, 100))
    assert result.num_objects == num_objects
    assert result.counts["removed_detections"] == 2 - num_objects
    assert result.counts["ignored_regions"] == 1


@pytest.mark.parametrize("axis", ["x", "y"])
def test_a_region_is_one_pixel_larger_than_its_size(axis: str) -> None:
    # Width 0 counts as 1 and covers two columns, 20 and 21. A box of width 1 is looked at in the column after its x.
    region = [20, 1, 0, 79, 0, 0]
    gt = turned([region, *([x, 30, 1, 10, 1, CAR] for x in (18, 19, 20, 21))], axis)
    result = measure(image(gt, turned([[x, 30, 1, 10, 0.9, CAR] for x in (18, 21)], axis), 100, 100))
    assert result.counts["removed_objects"] == 2
    assert result.metrics["AR@500"] == 1.0  # those at 18 and 21 are left


def test_halves_are_rounded_away_from_zero() -> None:
    # Columns 19 to 80 are ignored. A box of width 10 has 5 of them at x = 13 and is removed, 4 at x = 12.
    gt = [[19, 1, 61, 79, 0, 0], [90, 70, 5, 5, 1, CAR]]
    removed = {x: measure(image(gt, [[x, 10, 10, 10, 0.9, CAR]])).counts["removed_detections"] for x in (12.49, 12.5)}
    assert removed == {12.49: 0, 12.5: 1}  # to the even number it would be 12
    # The width too: 5 of 11 columns are less than half.
    assert measure(image(gt, [[13, 10, 10.5, 10, 0.9, CAR]])).counts["removed_detections"] == 1  # 14 to 24: 6 of 11
    assert measure(image(gt, [[12, 10, 10.5, 10, 0.9, CAR]])).counts["removed_detections"] == 0  # 13 to 23: 5 of 11
    assert measure(image(gt, [[12, 10, 10.4, 10, 0.9, CAR]])).counts["removed_detections"] == 0  # 13 to 22: 4 of 10


def test_boxes_beyond_the_image_keep_their_size_in_the_share() -> None:
    # All that can be seen of it is ignored, but that is less than half of the whole box.
    gt = [[80, 1, 20, 79, 0, 0], [90, 10, 60, 10, 1, CAR]]
    assert measure(image(gt, [])).counts["removed_objects"] == 0
    # Beyond the left border it counts from column 1 with all its width.
    gt = [[1, 1, 20, 79, 0, 0], [-10, 10, 22, 10, 1, CAR], [90, 70, 5, 5, 1, CAR]]
    assert measure(image(gt, [])).counts["removed_objects"] == 1


def test_nothing_is_removed_where_there_is_no_region() -> None:
    det = [[5000, 5000, 10, 10, 0.9, CAR]]
    result = measure(image([[0, 0, 10, 10, 1, CAR]], det), image([[1, 1, 50, 50, 0, 0], [60, 60, 9, 9, 1, CAR]], det))
    assert result.counts["removed_detections"] == 0


def test_the_best_are_the_first_of_the_file_over_all_classes() -> None:
    gt = [[0, 0, 10, 10, 1, CAR]]
    car, van = [0, 0, 10, 10, 0.5, CAR], [50, 50, 10, 10, 0.9, VAN]
    assert measure(image(gt, [car, van])).metrics["AR@1"] == 1.0
    assert measure(image(gt, [van, car])).metrics["AR@1"] == 0.0
    unsorted = measure(image(gt, [car, van]))
    assert any("not sorted by score" in note for note in unsorted.notes)
    # The 501st does not count at all.
    result = measure(image(gt, [van] * 500 + [car]))
    assert result.metrics == dict.fromkeys(METRICS, 0.0)
    assert any("more than 500" in note for note in result.notes)
    assert measure(image(gt, [van] * 499 + [car])).metrics["AR@500"] == 1.0
    assert measure(image(gt, [van] * 99 + [car])).metrics["AR@100"] == 1.0
    assert measure(image(gt, [van] * 100 + [car])).metrics["AR@100"] == 0.0


def test_what_is_removed_takes_no_place_among_the_first() -> None:
    gt = [[1, 1, 30, 78, 0, 0], [60, 20, 10, 10, 1, CAR]]
    det = [[5, 5, 10, 10, 0.9, CAR], [60, 20, 10, 10, 0.5, CAR]]
    assert measure(image(gt, det)).metrics["AR@1"] == 1.0


def test_ignored_objects_count_in_recall() -> None:
    gt = [[0, 0, 10, 10, 1, CAR], [50, 0, 10, 10, 0, CAR]]
    det = [[0, 0, 10, 10, 0.9, CAR], [51, 1, 8, 8, 0.8, CAR], [51, 1, 8, 8, 0.7, CAR]]
    result = measure(image(gt, det))
    # The other two lie in the ignored object, are neither right nor wrong, and precision stays 1; recall ends at 1/2.
    assert result.metrics["AP50"] == result.metrics["AR@500"] == 0.5
    assert (result.num_objects, result.counts["ignored_objects"]) == (1, 1)


def test_ignored_objects_take_part_by_share_and_threshold() -> None:
    # 6 of 10 columns of the detection lie in the ignored object: it is passed over at 0.50 to 0.60, wrong above.
    gt = [[0, 0, 10, 10, 1, CAR], [50, 0, 40, 40, 0, CAR]]
    det = [[46, 0, 10, 10, 0.9, CAR], [0, 0, 10, 10, 0.8, CAR]]
    assert measure(image(gt, det)).metrics["AP"] == pytest.approx((3 * 1 / 2 + 7 * 1 / 4) / 10, abs=TOLERANCE)


def test_real_objects_go_before_ignored_ones() -> None:
    # IoU 0.8 with the real one, wholly in the ignored one, whatever their order.
    rows = [[0, 0, 40, 40, 0, CAR], [0, 0, 10, 8, 1, CAR]]
    for gt in (rows, rows[::-1]):
        result = measure(image(gt, [[0, 0, 10, 10, 0.9, CAR]]))
        assert result.metrics["AP50"] == 0.5
        assert result.metrics["AR@500"] == pytest.approx(7 / 10 / 2, abs=TOLERANCE)


def test_of_equal_overlaps_the_later_object_is_taken() -> None:
    # The first detection overlaps both objects by 9 / 11 and takes the later one; the other detection fits only that
    # later one (the first one by 7 / 13, 0.54) and goes without from 0.55 on.
    gt = [[0, 0, 10, 10, 1, CAR], [2, 0, 10, 10, 1, CAR]]
    det = [[1, 0, 10, 10, 0.9, CAR], [3, 0, 10, 10, 0.8, CAR]]
    assert measure(image(gt, det)).metrics["AR@500"] == pytest.approx((1 * 1 + 6 * 0.5 + 3 * 0) / 10, abs=TOLERANCE)


def test_a_class_counts_once_for_each_image_that_shows_it() -> None:
    # Car: found in one of two images (recall 1/2); van: found (1). Car stands twice in the mean.
    first = image(
        [[0, 0, 10, 10, 1, CAR], [30, 0, 10, 10, 1, VAN]], [[0, 0, 10, 10, 0.9, CAR], [30, 0, 10, 10, 0.8, VAN]]
    )
    second = image([[0, 0, 10, 10, 1, CAR]], [])
    assert measure(first, second).metrics["AR@500"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3, abs=TOLERANCE)
    # An image shows it with an ignored object too, but not with one that is removed.
    third = image([[0, 0, 10, 10, 0, VAN]], [])
    assert measure(first, third).metrics["AR@500"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3, abs=TOLERANCE)
    fourth = image([[1, 1, 90, 70, 0, 0], [10, 10, 10, 10, 1, VAN]], [])
    assert measure(first, fourth).metrics["AR@500"] == 1.0


def test_class_11_is_not_measured() -> None:
    result = measure(image([[0, 0, 10, 10, 1, CAR], [30, 0, 10, 10, 1, 11]], [[0, 0, 10, 10, 0.9, CAR]]))
    assert result.metrics["AR@1"] == 1.0
    assert result.num_objects == 1


def test_equal_scores_are_taken_by_file_name() -> None:
    gt = [[0, 0, 10, 10, 1, CAR]]
    ground_truth, results = as_coco([image(gt, [[0, 0, 10, 10, 0.5, CAR]]), image(gt, [[50, 0, 10, 10, 0.5, CAR]])])
    assert evaluate_visdrone_official(ground_truth, results).metrics["AP50"] == 0.5  # right, then wrong
    ground_truth["images"][0]["file_name"] = "z.jpg"
    assert evaluate_visdrone_official(ground_truth, results).metrics["AP50"] == 0.25  # wrong, then right


def test_real_rows_that_make_no_box_still_count() -> None:
    # The preparation puts a row without width there; the toolkit can never find it.
    ground_truth, results = as_coco([image([[0, 0, 10, 10, 1, CAR]], [[0, 0, 10, 10, 0.5, CAR]])])
    ground_truth["visdrone_ignored"].append({"image_id": 1, "bbox": [5, 5, 0, 9], "score": 1, "category": CAR})
    assert evaluate_visdrone_official(ground_truth, results).metrics["AR@500"] == 0.5


def test_changed_boxes_are_told() -> None:
    ground_truth, results = as_coco([image([[0, 0, 10, 10, 1, CAR]], [])])
    for outside, told in (("keep", 0), ("clip", 1)):
        ground_truth["info"] = {"benchmark": "visdrone", "options": {"outside": outside}}
        notes = evaluate_visdrone_official(ground_truth, results).notes
        assert sum("--outside clip" in note for note in notes) == told


def test_no_detection_and_no_object() -> None:
    assert measure(image([[0, 0, 10, 10, 1, CAR]], [])).metrics == dict.fromkeys(METRICS, 0.0)
    removed = image([[1, 1, 90, 70, 0, 0], [10, 10, 10, 10, 1, VAN]], [[50, 50, 10, 10, 0.5, CAR]])
    assert all(math.isnan(value) for value in measure(removed).metrics.values())


def test_categories_are_known_by_their_names() -> None:
    images = random_images(0, 4, 40, whole=False, in_order=True)
    ground_truth, results = as_coco(images)
    new_id = {number: 200 - number for number in range(1, 11)}
    ground_truth["categories"] = [
        {"id": new_id[entry["id"]], "name": entry["name"].title().replace("-", "_")}
        for entry in ground_truth["categories"]
    ]
    for entry in [*ground_truth["annotations"], *results]:
        entry["category_id"] = new_id[entry["category_id"]]
    renamed = evaluate_visdrone_official(ground_truth, results)
    assert renamed.metrics == pytest.approx(evaluate_plain(images), abs=TOLERANCE)
    assert list(renamed.by_class)[:2] == ["Pedestrian", "People"]  # in the order of the benchmark


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visdrone_ignored": None}, r"no list 'visdrone_ignored'.*crossdino prepare visdrone"),
        ({"visdrone_ignored": [{"image_id": 9}]}, r"row 0 .* is of no image"),
        ({"visdrone_ignored": [{"image_id": 1, "bbox": [1, 2, 3]}]}, r"row 0 .* has bbox \[1, 2, 3\]"),
        (
            {"visdrone_ignored": [{"image_id": 1, "bbox": [1, 2, 3, 4], "category": 12, "score": 0}]},
            r"category 12 and score 0",
        ),
        (
            {"visdrone_ignored": [{"image_id": 1, "bbox": [1.5, 2, 3, 4], "category": 0, "score": 0}]},
            r"ignored region .* whole pixels",
        ),
        (
            {
                "images": [{"id": 1, "file_name": "a.jpg"}],
                "visdrone_ignored": [{"image_id": 1, "bbox": [1, 2, 3, 4], "category": 0, "score": 0}],
            },
            r"image 1 has height None and width None",
        ),
        ({"categories": [{"id": CAR, "name": "car"}, {"id": 9, "name": "boat"}]}, r"category 9 \(boat\) is none"),
    ],
)
def test_broken_truth(tmp_path: Path, change: dict, message: str) -> None:
    ground_truth, results = as_coco([image([[0, 0, 10, 10, 1, CAR]], [])])
    path = tmp_path / "val.json"
    path.write_text(json.dumps({**ground_truth, **change}))
    with pytest.raises(InputError, match=rf"val\.json.*{message}"):
        evaluate_visdrone_official(path, results)
