"""AP against pycocotools, against cases worked out on paper, and on broken input."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import time

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from crossdino.errors import InputError
from crossdino.evaluation import COCO_SIZE_BANDS, evaluate_detections, parse_size_bands

# Both sides add the same numbers in double precision, in another order.
TOLERANCE = 1e-12

AITOD_BANDS = {"verytiny": (0.0, 8.0), "tiny": (8.0, 16.0), "small": (16.0, 32.0), "medium": (32.0, 1e5)}


def random_case(
    seed: int,
    num_images: int = 12,
    objects_per_image: int = 15,
    detections_per_image: int = 40,
    category_ids: tuple[int, ...] = (3, 7, 90),
    largest_px: float = 150.0,
    side_step: float = 0.0,
) -> tuple[dict, list[dict]]:
    """Objects of all sizes (some crowds) and detections that are jittered objects or noise, scores with ties."""
    rng = np.random.default_rng(seed)
    image_ids = (rng.permutation(100 * num_images)[:num_images] - 20).tolist()
    annotations, detections = [], []
    for image_id in image_ids:
        boxes = []
        for _ in range(int(rng.integers(0, 2 * objects_per_image))):
            width, height = np.exp(rng.uniform(np.log(3), np.log(largest_px), 2))
            if side_step:
                width, height = (max(side_step, side_step * round(side / side_step)) for side in (width, height))
            box = [float(rng.uniform(0, 500)), float(rng.uniform(0, 400)), float(width), float(height)]
            category = int(rng.choice(category_ids[:-1]))  # the last class has no object at all
            boxes.append((box, category))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box,
                    # like COCO's mask areas: not width x height
                    "area": box[2] * box[3] * (1.0 if side_step else float(rng.uniform(0.5, 1.0))),
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
        for _ in range(detections_per_image):
            if boxes and rng.random() < 0.8:
                box, category = boxes[int(rng.integers(len(boxes)))]
                box = (np.array(box) + rng.normal(0, 0.08, 4) * np.array([box[2], box[3], box[2], box[3]])).tolist()
            else:
                box = rng.uniform(1, 200, 4).tolist()
                category = int(rng.choice(category_ids))
            if rng.random() < 0.1:
                category = int(rng.choice(category_ids))
            score = round(float(rng.random()), 1)  # many ties
            detections.append(
                {
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [box[0], box[1], abs(box[2]), abs(box[3])],
                    "score": score,
                }
            )
    rng.shuffle(detections)
    truth = {
        "images": [
            {"id": image_id, "width": 700, "height": 600, "file_name": f"{image_id}.jpg"} for image_id in image_ids
        ],
        "annotations": annotations,
        "categories": [{"id": category_id, "name": f"class{category_id}"} for category_id in category_ids],
    }
    return truth, detections


def oracle(truth: dict, detections: list[dict], max_detections: int, bands: dict[str, tuple[float, float]]) -> dict:
    """pycocotools' own arrays, averaged as its `summarize` does, at the wanted number of detections."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = copy.deepcopy(truth)
        ground_truth.createIndex()
        evaluator = COCOeval(ground_truth, ground_truth.loadRes(copy.deepcopy(detections)), "bbox")
        evaluator.params.maxDets = [1, 10, max_detections]
        evaluator.params.areaRng = [[0, 1e10]] + [[lower**2, upper**2] for lower, upper in bands.values()]
        evaluator.params.areaRngLbl = ["all", *bands]
        evaluator.evaluate()
        evaluator.accumulate()
    place = evaluator.params.maxDets.index(max_detections)
    precision, recall = evaluator.eval["precision"][..., place], evaluator.eval["recall"][..., place]

    def mean(values: np.ndarray) -> float:
        return float(np.mean(values[values > -1])) if (values > -1).any() else math.nan

    numbers = {
        "ap": mean(precision[:, :, :, 0]),
        "ap50": mean(precision[0, :, :, 0]),
        "ap75": mean(precision[5, :, :, 0]),
        "ar": mean(recall[:, :, 0]),
    }
    for index, name in enumerate(bands, start=1):
        numbers[f"{name} ap"] = mean(precision[:, :, :, index])
        numbers[f"{name} ap50"] = mean(precision[0, :, :, index])
        numbers[f"{name} ar"] = mean(recall[:, :, index])
    for rank, category_id in enumerate(sorted(category["id"] for category in truth["categories"])):
        numbers[f"class {category_id} ap"] = mean(precision[:, :, rank, 0])
    return numbers


def ours(truth: dict, detections: list[dict], max_detections: int, bands: dict[str, tuple[float, float]]) -> dict:
    result = evaluate_detections(truth, detections, max_detections=max_detections, size_bands=bands)
    numbers = {"ap": result.ap, "ap50": result.ap50, "ap75": result.ap75, "ar": result.ar}
    for name, band in result.by_size.items():
        numbers |= {f"{name} ap": band.ap, f"{name} ap50": band.ap50, f"{name} ar": band.ar}
    for part in result.by_class.values():
        numbers[f"class {part.category_id} ap"] = part.ap
    return numbers


@pytest.mark.parametrize(
    ("case", "max_detections", "bands"),
    [
        (random_case(0), 100, COCO_SIZE_BANDS),
        (random_case(1, largest_px=400.0), 100, COCO_SIZE_BANDS),
        (random_case(2), 5, COCO_SIZE_BANDS),
        (random_case(3, num_images=3, objects_per_image=90, detections_per_image=400), 100, COCO_SIZE_BANDS),
        (random_case(3, num_images=3, objects_per_image=90, detections_per_image=400), 300, COCO_SIZE_BANDS),
        (random_case(4, largest_px=50.0), 1500, AITOD_BANDS),
        # sides in steps of 8 px put many objects exactly on the bounds 8, 16 and 32 px
        (random_case(5, largest_px=60.0, side_step=8.0), 100, AITOD_BANDS),
    ],
)
def test_equals_pycocotools(case, max_detections, bands):
    truth, detections = case
    expected = oracle(truth, detections, max_detections, bands)
    # no empty comparison
    assert 0.02 < expected["ap"] < 0.98
    assert ours(truth, detections, max_detections, bands) == pytest.approx(expected, abs=TOLERANCE, nan_ok=True)


def test_default_bands_are_those_of_pycocotools_summarize():
    truth, detections = random_case(6, largest_px=300.0)
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = copy.deepcopy(truth)
        ground_truth.createIndex()
        evaluator = COCOeval(ground_truth, ground_truth.loadRes(copy.deepcopy(detections)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    stats = evaluator.stats
    result = evaluate_detections(truth, detections)
    bands = result.by_size
    assert [result.ap, result.ap50, result.ap75] == pytest.approx(stats[:3].tolist(), abs=TOLERANCE)
    assert [bands[name].ap for name in ("small", "medium", "large")] == pytest.approx(
        stats[3:6].tolist(), abs=TOLERANCE
    )
    assert result.ar == pytest.approx(stats[8], abs=TOLERANCE)
    assert [bands[name].ar for name in ("small", "medium", "large")] == pytest.approx(stats[9:].tolist(), abs=TOLERANCE)


def simple_truth(*boxes: list[float], image_id: int = 1) -> dict:
    return {
        "images": [{"id": image_id}],
        "annotations": [
            {"id": index, "image_id": image_id, "category_id": 1, "bbox": box} for index, box in enumerate(boxes)
        ],
        "categories": [{"id": 1, "name": "ship"}],
    }


def detection(box: list[float], score: float, image_id: int = 1, category_id: int = 1) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


def test_case_worked_out_on_paper():
    # Two objects. By score: a hit (IoU 1), a miss, a hit with IoU 0.7 (7 of 10 columns).
    truth = simple_truth([0, 0, 10, 10], [100, 0, 10, 10])
    detections = [
        detection([0, 0, 10, 10], 0.9),
        detection([300, 300, 10, 10], 0.8),
        detection([100, 0, 7, 10], 0.7),
    ]
    result = evaluate_detections(truth, detections)
    # Up to IoU 0.70: precision 1 for the recalls 0 ... 0.50 (51 of 101), 2/3 for the other 50.
    both = (51 + 50 * 2 / 3) / 101
    # Above: only the first hit counts, recall ends at 0.5.
    one = 51 / 101
    # Whether 7/10 reaches the threshold 0.70 is a matter of rounding: leave that threshold out.
    at = evaluate_detections(truth, detections, iou_thresholds=[0.5, 0.65, 0.75])
    assert result.ap50 == pytest.approx(both, abs=1e-9)
    assert result.ap75 == pytest.approx(one, abs=1e-9)
    assert at.ap == pytest.approx((2 * both + one) / 3, abs=1e-9)
    assert at.ar == pytest.approx((1 + 1 + 0.5) / 3, abs=1e-9)
    assert result.by_class["ship"].ap50 == pytest.approx(both, abs=1e-9)


def test_annotation_id_zero_counts():
    # The plain evaluators take the match with annotation 0 for no match: AP 0 instead of 1.
    result = evaluate_detections(simple_truth([5, 5, 20, 20]), [detection([5, 5, 20, 20], 0.5)])
    assert result.ap == pytest.approx(1.0)
    assert result.num_objects == 1


def test_object_on_a_bound_is_in_both_bands():
    truth = simple_truth([0, 0, 32, 32], [100, 0, 8, 8])
    result = evaluate_detections(
        truth, [detection([0, 0, 32, 32], 0.9)], size_bands={"tiny": (0, 8), "small": (8, 32), "rest": (32, 64)}
    )
    assert [band.num_objects for band in result.by_size.values()] == [1, 2, 1]
    assert result.by_size["tiny"].ap == 0
    assert result.by_size["rest"].ap == pytest.approx(1.0)
    assert result.by_size["small"].ar == pytest.approx(0.5)


def test_crowd_absorbs_detections_and_is_not_asked_for():
    truth = simple_truth([0, 0, 10, 10], [100, 100, 50, 50])
    truth["annotations"][1]["iscrowd"] = 1
    inside = [detection([110 + 10 * index, 110, 8, 8], 0.95) for index in range(3)]
    result = evaluate_detections(truth, [detection([0, 0, 10, 10], 0.5), *inside])
    assert result.ap == pytest.approx(1.0)
    assert (result.num_objects, result.num_predictions) == (1, 4)


def test_area_of_the_file_decides_and_width_times_height_replaces_it():
    truth = simple_truth([0, 0, 40, 40])
    hit = [detection([0, 0, 40, 40], 0.5)]
    assert evaluate_detections(truth, hit).by_size["medium"].num_objects == 1
    truth["annotations"][0]["area"] = 500.0
    by_size = evaluate_detections(truth, hit).by_size
    assert (by_size["small"].num_objects, by_size["medium"].num_objects) == (1, 0)


def test_more_than_one_hundred_detections():
    boxes = [[20.0 * (index % 20), 20.0 * (index // 20), 10.0, 10.0] for index in range(150)]
    truth = simple_truth(*boxes)
    detections = [detection(box, 0.5) for box in boxes]
    assert evaluate_detections(truth, detections).ar == pytest.approx(100 / 150)
    assert evaluate_detections(truth, detections, max_detections=150).ap == pytest.approx(1.0)


def test_no_detections_is_zero_not_an_error():
    result = evaluate_detections(simple_truth([0, 0, 10, 10]), [])
    assert (result.ap, result.ap50, result.ar, result.by_size["small"].ap) == (0, 0, 0, 0)
    assert math.isnan(result.by_size["large"].ap)


def test_files_json_and_table(tmp_path, capsys):
    truth, detections = random_case(7)
    truth_file, detections_file = tmp_path / "truth.json", tmp_path / "detections.json"
    truth_file.write_text(json.dumps(truth))
    detections_file.write_text(json.dumps(detections))
    before = copy.deepcopy((truth, detections))
    result = evaluate_detections(truth_file, detections_file)
    assert result.to_dict() == evaluate_detections(truth, detections).to_dict()
    assert (truth, detections) == before, "the caller's data was changed"
    assert capsys.readouterr().out == ""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    values = json.loads(result.to_json(), parse_constant=refuse)
    assert values["ap"] == result.ap
    assert values["by_size"]["small"]["ap50"] == result.by_size["small"].ap50
    assert values["by_class"]["class90"]["ap"] is None
    assert values["settings"]["size_bands"]["large"] == [96.0, 1e5]

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(result.table())
    text = console.export_text()
    for piece in ("small", "0-32", "96 and more", f"{100 * result.ap:.1f}", "class90", "AR@100"):
        assert piece in text


def test_classes_of_the_same_name_stay_apart():
    truth = simple_truth([0, 0, 10, 10])
    truth["categories"].append({"id": 5, "name": "ship"})
    assert set(evaluate_detections(truth, []).by_class) == {"ship (1)", "ship (5)"}


TRUTH = simple_truth([0, 0, 10, 10])
GOOD = detection([0, 0, 10, 10], 0.5)


@pytest.mark.parametrize(
    ("truth", "detections", "pieces"),
    [
        (TRUTH, [GOOD, GOOD | {"image_id": 77}], ["detection number 1", "77", "image_id"]),
        (TRUTH, [GOOD | {"image_id": "1"}], ["detection number 0", "'1'", "integers"]),
        (TRUTH, [GOOD | {"category_id": 9}], ["detection number 0", "category_id 9"]),
        (TRUTH, [GOOD | {"score": math.nan}], ["detection number 0", "nan"]),
        (TRUTH, [GOOD | {"score": None}], ["detection number 0", "score"]),
        (TRUTH, [GOOD | {"bbox": [0, 0, 10]}], ["detection number 0", "bbox", "4 finite numbers"]),
        (TRUTH, [GOOD | {"bbox": [0, 0, -1, 10]}], ["detection number 0", "bbox"]),
        (TRUTH, [GOOD | {"bbox": [0, 0, math.inf, 10]}], ["detection number 0", "bbox"]),
        (TRUTH, [[1, 2, 3]], ["detection number 0", "not an object"]),
        (TRUTH, {"annotations": []}, ["not a list of detections"]),
        ([GOOD], [GOOD], ["not a COCO ground truth"]),
        ({"images": [], "annotations": []}, [GOOD], ["empty list 'images'"]),
        ({"images": [{"id": 1}]}, [GOOD], ["no list 'annotations'"]),
        (TRUTH | {"annotations": []}, [GOOD], ["empty list 'annotations'"]),
        (TRUTH | {"images": [{"id": 1}, {"id": 1}]}, [GOOD], ["id 1 comes twice"]),
        (TRUTH | {"images": [{"id": "a"}]}, [GOOD], ["'a'", "integer"]),
        (simple_truth([0, 0, 10]), [GOOD], ["annotation number 0", "bbox"]),
        (TRUTH | {"categories": [{"id": 2, "name": "x"}]}, [GOOD], ["annotation number 0", "category_id 1"]),
    ],
)
def test_broken_input_is_named(truth, detections, pieces):
    with pytest.raises(InputError) as error:
        evaluate_detections(truth, detections)
    message = str(error.value)
    assert "\n" not in message
    for piece in pieces:
        assert piece in message


def test_broken_files_are_named(tmp_path):
    truth_file, broken = tmp_path / "truth.json", tmp_path / "broken.json"
    truth_file.write_text(json.dumps(TRUTH))
    broken.write_text('[{"image_id": 1,')
    with pytest.raises(InputError, match=r"broken\.json is not JSON"):
        evaluate_detections(truth_file, broken)
    with pytest.raises(InputError, match=r"missing\.json cannot be read"):
        evaluate_detections(tmp_path / "missing.json", broken)
    broken.write_text(json.dumps([GOOD | {"image_id": 5}]))
    with pytest.raises(InputError, match=r"broken\.json: detection number 0 .* image_id 5, .*truth\.json"):
        evaluate_detections(truth_file, broken)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_detections": 0},
        {"iou_thresholds": []},
        {"iou_thresholds": [1.5]},
        {"size_bands": {"a": (5, 5)}},
        {"size_bands": {"a": (-1, 5)}},
        {"size_bands": {"a": (1, 2, 3)}},
    ],
)
def test_senseless_settings(settings):
    with pytest.raises(InputError, match="give"):
        evaluate_detections(TRUTH, [GOOD], **settings)


def test_parse_size_bands():
    assert parse_size_bands("tiny=0-8, small=8-32.5,large=32.5-inf") == {
        "tiny": (0.0, 8.0),
        "small": (8.0, 32.5),
        "large": (32.5, 1e5),
    }


@pytest.mark.parametrize(
    "text", ["", "tiny", "tiny=8", "tiny=a-b", "=0-8", "a=0-8,", "a=9-8", "a=0-8,a=8-9", "a=nan-3"]
)
def test_parse_size_bands_names_what_is_wrong(text):
    with pytest.raises(InputError, match="size band"):
        parse_size_bands(text)


def test_numpy_numbers_are_numbers():
    truth = simple_truth([0, 0, 10, 10])
    given = {
        "image_id": np.int64(1),
        "category_id": np.int32(1),
        "bbox": tuple(np.array([0, 0, 10, 10], dtype=np.float32)),
        "score": np.float32(0.5),
    }
    assert evaluate_detections(truth, [given]).ap == pytest.approx(1.0)


def test_fast_on_many_detections():
    truth, detections = random_case(8, num_images=100, objects_per_image=40, detections_per_image=300)
    start = time.process_time()
    result = evaluate_detections(truth, detections, max_detections=300)
    # 0.5 s on an idle core, where pycocotools needs 10; the limit leaves room for a busy machine
    assert time.process_time() - start < 4
    assert result.num_predictions == 30_000
