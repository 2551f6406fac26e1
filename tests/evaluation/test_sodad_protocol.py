"""SODA-D: its rule of ignoring, its ranges and caps, and the merging of patches."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from torchvision.ops import nms

from crossdino.errors import InputError
from crossdino.evaluation import evaluate_protocol, merge_patches
from tests.evaluation.coco_cases import grid, hit, random_scenes, scene
from tests.reference import sodad_plain
from tests.reference.coco_ap_plain import ap_and_ar

BANDS = {"eS": (0, 144), "rS": (144, 400), "gS": (400, 1024), "N": (1024, 2000)}
SMALL = (0, 1024)


@pytest.mark.parametrize("seed", [20, 21, 22])
def test_equals_plain_loops(seed):
    truth, detections = random_scenes(
        seed, num_images=5, num_objects=12, num_detections=30, decimals=0 if seed == 22 else 3
    )
    assert any(item["ignore"] and not item["iscrowd"] for item in truth["annotations"])
    assert any(item["iscrowd"] and not item["ignore"] for item in truth["annotations"])
    result = evaluate_protocol("sodad", truth, detections)
    order = "AP AP50 AP75 AP_eS AP_rS AP_gS AP_N AR@100 AR@300 AR@1000 AR_eS AR_rS AR_gS AR_N"
    assert " ".join(result.metrics) == order
    expected = {"AP": ap_and_ar(truth, detections, SMALL, 100, "flag")[0]}
    for threshold in (0.5, 0.75):
        name = f"AP{100 * threshold:.0f}"
        expected[name] = ap_and_ar(truth, detections, SMALL, 100, "flag", thresholds=[threshold])[0]
    expected |= {f"AR@{cap}": ap_and_ar(truth, detections, SMALL, cap, "flag")[1] for cap in (100, 300, 1000)}
    for band, bounds in BANDS.items():
        expected[f"AP_{band}"] = ap_and_ar(truth, detections, bounds, 100, "flag")[0]
        expected[f"AR_{band}"] = ap_and_ar(truth, detections, bounds, 1000, "flag")[1]
    assert 0.02 < expected["AP"] < 0.98
    assert result.metrics == pytest.approx(expected, abs=1e-9, nan_ok=True)
    for category in truth["categories"]:
        plain = ap_and_ar(truth, detections, SMALL, 100, "flag", category_ids=[category["id"]])[0]
        assert result.by_class[category["name"]]["AP"] == pytest.approx(plain, abs=1e-9, nan_ok=True)


def test_an_ignored_object_has_plain_iou_and_is_taken_once():
    real, region = [200.0, 0.0, 10.0, 10.0], [0.0, 0.0, 20.0, 20.0]
    truth = scene({"bbox": real}, {"bbox": region, "ignore": True})
    found = [hit(region, 0.9), hit(real, 0.3)]
    # The first detection of the ignored object is neutral; a second one, or a small one inside it, is wrong.
    assert evaluate_protocol("sodad", truth, found).metrics["AP"] == pytest.approx(1.0)
    assert evaluate_protocol("sodad", truth, [*found, hit(region, 0.8)]).metrics["AP"] == pytest.approx(0.5)
    inside = hit([5.0, 5.0, 6.0, 6.0], 0.8)
    assert evaluate_protocol("sodad", truth, [*found, inside]).metrics["AP"] == pytest.approx(0.5)
    result = evaluate_protocol("sodad", truth, found)
    assert (result.num_objects, result.counts["ignored"], result.counts["objects_gS"]) == (1, 1, 0)


def test_iscrowd_is_not_read_and_said_so():
    box = [0.0, 0.0, 10.0, 10.0]
    result = evaluate_protocol("sodad", scene({"bbox": box, "iscrowd": 1}), [])
    assert (result.metrics["AP"], result.num_objects) == (0.0, 1)
    assert any("`iscrowd`" in note for note in result.notes)


@pytest.mark.parametrize(
    ("edge", "lower", "upper"), [(144, "eS", "rS"), (400, "rS", "gS"), (1024, "gS", "N"), (2000, "N", None)]
)
def test_an_object_on_an_edge_is_in_both_bands(edge, lower, upper):
    box = [10.0, 10.0, 20.0, 20.0]
    for area, inside in ((edge, {lower, upper}), (edge - 0.001, {lower}), (edge + 0.001, {upper})):
        result = evaluate_protocol("sodad", scene({"bbox": box, "area": area}), [hit(box)])
        for band in BANDS:
            assert result.counts[f"objects_{band}"] == (band in inside)
            assert math.isnan(result.metrics[f"AP_{band}"]) == (band not in inside)
        assert result.counts["objects_Small"] == (area <= 1024)
        assert math.isnan(result.metrics["AP"]) == (area > 1024)


def test_every_cap():
    boxes = grid(1001)
    found = [hit(box, 1 - place / 10_000) for place, box in enumerate(boxes)]
    metrics = evaluate_protocol("sodad", scene(*({"bbox": box} for box in boxes)), found).metrics
    for cap in (100, 300, 1000):
        assert metrics[f"AR@{cap}"] == pytest.approx(cap / 1001, abs=1e-12)
    # AP and its bands take 100 detections, so that of the 101 recalls 0 ... 0.09 are reached; AR by size takes 1000.
    assert metrics["AP"] == metrics["AP_eS"] == pytest.approx(10 / 101, abs=1e-12)
    assert metrics["AR_eS"] == pytest.approx(1000 / 1001, abs=1e-12)


def test_category_ten_is_left_out():
    box = [0.0, 0.0, 10.0, 10.0]
    truth = scene({"bbox": box}, {"bbox": [50.0, 0.0, 300.0, 300.0], "category_id": 10}, {"bbox": box}, num_classes=1)
    truth["categories"] = [{"id": 10, "name": "ignore"}, {"id": 1, "name": "people"}, {"id": 11, "name": "other"}]
    truth["annotations"].append({"id": 9, "image_id": 1, "category_id": 11, "bbox": [70.0, 0.0, 10.0, 10.0]})
    result = evaluate_protocol("sodad", truth, [hit([70.0, 0.0, 10.0, 10.0], category_id=11)])
    assert {name: numbers["AP"] for name, numbers in result.by_class.items()} == {
        "people": 0,
        "other": pytest.approx(1),
    }
    assert any("category 10" in note and "left out with 1 annotation" in note for note in result.notes)
    with pytest.raises(InputError, match="category_id 10"):
        evaluate_protocol("sodad", truth, [hit(box, category_id=10)])


def test_a_detection_in_a_region_of_category_ten_is_wrong():
    truth = scene({"bbox": [0.0, 0.0, 10.0, 10.0]}, {"bbox": [100.0, 0.0, 300.0, 300.0], "category_id": 10})
    truth["categories"].append({"id": 10, "name": "ignore"})
    # Behind the one in the region, the only hit has precision 1/2.
    found = [hit([150.0, 50.0, 10.0, 10.0], 0.9), hit([0.0, 0.0, 10.0, 10.0], 0.5)]
    assert evaluate_protocol("sodad", truth, found).metrics["AP"] == pytest.approx(0.5)


@pytest.mark.parametrize(("height", "ap"), [(32.0, 0.5), (32.001, 1.0)])
def test_false_detections_above_1024_do_not_harm_ap(height, ap):
    objects = [{"bbox": [0.0, 0.0, 10.0, 10.0]}, {"bbox": [0.0, 100.0, 40.0, 40.0]}]
    found = [hit([0.0, 0.0, 10.0, 10.0], 0.5), hit([0.0, 100.0, 40.0, 40.0], 0.4), hit([300.0, 0.0, 32.0, height], 0.9)]
    metrics = evaluate_protocol("sodad", scene(*objects), found).metrics
    # 32 x 32 is small and Normal at once; what is larger is Normal only, where it stands before the only hit.
    assert (metrics["AP"], metrics["AP_eS"], metrics["AP_N"]) == pytest.approx((ap, 1.0, 0.5))


def test_objects_above_1024_take_detections_without_effect_on_ap():
    # The second object is found by a detection of 900 px^2, IoU 900 / 1600: neutral at 0.50 and 0.55, wrong above.
    objects = [{"bbox": [0.0, 0.0, 10.0, 10.0]}, {"bbox": [0.0, 100.0, 40.0, 40.0]}]
    found = [hit([0.0, 0.0, 10.0, 10.0], 0.5), hit([0.0, 100.0, 30.0, 30.0], 0.9)]
    metrics = evaluate_protocol("sodad", scene(*objects), found).metrics
    assert metrics["AP"] == pytest.approx((2 * 1 + 8 * 1 / 2) / 10)
    assert metrics["AR@100"] == pytest.approx(1.0)
    # Above 2000 px^2 an object is in no band, and nobody asks for it.
    large = evaluate_protocol("sodad", scene(objects[0], {"bbox": [0.0, 100.0, 50.0, 50.0]}), found[:1])
    assert large.metrics["AP"] == pytest.approx(1.0) and math.isnan(large.metrics["AP_N"])


def test_an_original_without_detections_counts_with_its_objects():
    box = [0.0, 0.0, 10.0, 10.0]
    truth = scene({"bbox": [650.0, 0.0, 10.0, 10.0]}, {"bbox": box, "image_id": 2}, num_images=2)
    patches = {
        # The second original has no patch at all: the original code leaves out images without annotations there.
        "images": [{"id": 7, "ori_id": 1, "start_coord": [650, 0]}, {"id": 8, "ori_id": 1, "start_coord": [0, 0]}],
        "categories": [{"id": 1, "name": "class1"}],
    }
    found = [hit(box, 0.9, 7), hit([651.0, 0.0, 10.0, 10.0], 0.8, 8)]  # twice the same object
    result = evaluate_protocol("sodad", truth, found, patches=patches)
    # One of two objects, no false detection: of the 101 recalls 0 to 0.50.
    assert result.metrics["AP"] == pytest.approx(51 / 101)
    assert (result.metrics["AR@100"], result.num_images, result.num_objects) == (pytest.approx(0.5), 2, 2)
    assert result.settings["merging"]["num_detections"] == 1


def make_patches(seed: int, num_originals: int = 3, per_patch: int = 25) -> tuple[dict, list[dict]]:
    """Patches in a shuffled file with odd ids; detections that double each other across the overlap, with ties."""
    rng = np.random.default_rng(seed)
    images, detections = [], []
    for original in range(num_originals):
        objects = np.concatenate((rng.uniform(0, 1400, (60, 2)), rng.uniform(5, 40, (60, 2))), axis=1)
        for left in (0, 650):
            for top in (0, 650):
                patch = {
                    "id": 1000 - len(images) * 3,
                    "ori_id": 70 - 10 * original,
                    "start_coord": [left, top],
                    "width": 800,
                    "height": 800,
                }
                images.append(patch)
                near = objects - [left, top, 0, 0]
                near = near[((near[:, :2] >= 0) & (near[:, :2] < 780)).all(axis=1)]
                for place in rng.integers(0, len(near), per_patch):
                    box = near[place] + rng.normal(0, 1.5, 4)
                    box = [*box[:2].clip(0), *abs(box[2:])]
                    kind = int(rng.integers(1, 3))
                    detections.append(hit([float(v) for v in box], round(float(rng.random()), 2), patch["id"], kind))
    rng.shuffle(images)  # type: ignore[arg-type]
    rng.shuffle(detections)  # type: ignore[arg-type]
    return {"images": images, "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]}, detections


def originals_of(patches: dict, detections: list[dict]) -> dict:
    """A truth in which a third of what was detected is there, about; one image was not cut."""
    ids = sorted({patch["ori_id"] for patch in patches["images"]})
    real = sodad_plain.merge(detections, patches)[::3]
    return {
        "images": [{"id": one, "width": 1450, "height": 1450} for one in [*ids, 999]],
        "annotations": [
            {
                "id": number,
                "image_id": item["image_id"],
                "category_id": item["category_id"],
                "bbox": [round(value) for value in item["bbox"]],
            }
            for number, item in enumerate(real)
        ],
        "categories": patches["categories"],
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_merging_equals_plain_loops(seed):
    patches, detections = make_patches(seed)
    merged = merge_patches(detections, patches)
    assert len(merged) < len(detections) - 10
    assert merged == sodad_plain.merge(detections, patches)


def test_merging_suppresses_as_torchvision():
    patches, detections = make_patches(5, num_originals=1, per_patch=200)
    merged = merge_patches(detections, patches)
    corner = {patch["id"]: patch["start_coord"] for patch in patches["images"]}
    place = {patch["id"]: number for number, patch in enumerate(patches["images"])}
    for kind in (1, 2):
        own = sorted(
            (item for item in detections if item["category_id"] == kind), key=lambda item: place[item["image_id"]]
        )
        boxes = np.array([item["bbox"] for item in own])
        boxes = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1).astype(np.float32)
        boxes += np.array([corner[item["image_id"]] * 2 for item in own], dtype=np.float32)
        kept = nms(torch.from_numpy(boxes), torch.tensor([item["score"] for item in own]), 0.5)
        expected = [[own[one]["score"], *boxes[one].tolist()] for one in kept.tolist()]
        got = [
            [item["score"], *item["bbox"][:2], item["bbox"][0] + item["bbox"][2], item["bbox"][1] + item["bbox"][3]]
            for item in merged
            if item["category_id"] == kind
        ]
        # Scores are singles by now, corners are given back as width and height.
        assert np.array(got) == pytest.approx(np.array(expected), abs=1e-4)


def test_scores_are_compared_in_single_precision():
    patches = {
        "images": [{"id": 1, "ori_id": 5, "start_coord": [0, 0]}, {"id": 2, "ori_id": 5, "start_coord": [650, 0]}],
        "categories": [{"id": 1}],
    }
    # As doubles the second is better, as singles they are equal, and the patch listed first wins.
    detections = [hit([2.0, 0.0, 10.0, 10.0], 0.5 + 1e-12, 2), hit([651.0, 0.0, 10.0, 10.0], 0.5, 1)]
    assert [item["bbox"] for item in merge_patches(detections, patches)] == [[651.0, 0.0, 10.0, 10.0]]


def test_iou_of_exactly_one_half_stays():
    patches = {"images": [{"id": 1, "ori_id": 5, "start_coord": [650, 1300]}], "categories": [{"id": 1}]}
    detections = [hit([0.0, 0.0, 10.0, 10.0], 0.9), hit([0.0, 0.0, 5.0, 10.0], 0.8), hit([0.0, 0.0, 5.1, 10.0], 0.7)]
    merged = merge_patches(detections, patches)
    assert [item["bbox"][:3] for item in merged] == [[650.0, 1300.0, 10.0], [650.0, 1300.0, 5.0]]
    assert merge_patches(detections, patches, iou=0.45)[1:] == []


def test_the_protocol_merges_patches(tmp_path):
    patches, detections = make_patches(6)
    order = list(dict.fromkeys(patch["ori_id"] for patch in patches["images"]))
    assert order != sorted(order)
    truth = originals_of(patches, detections)
    paths = {}
    for name, content in (("truth", truth), ("patches", patches), ("found", detections)):
        paths[name] = tmp_path / f"{name}.json"
        paths[name].write_text(json.dumps(content))
    before = copy.deepcopy((truth, patches, detections))
    result = evaluate_protocol("sodad", paths["truth"], paths["found"], patches=paths["patches"])
    merged = merge_patches(detections, patches)
    direct = evaluate_protocol("sodad", truth, merged)
    assert 0.1 < result.metrics["AP"] < 0.9
    assert result.metrics == direct.metrics
    assert (result.num_images, result.num_predictions) == (4, len(detections))
    assert result.settings["merging"] == {"num_patches": 12, "iou": 0.5, "num_detections": len(merged)}
    assert direct.settings["merging"] is None
    again = evaluate_protocol("sodad", truth, detections, patches=patches)
    assert again.metrics == result.metrics
    assert (truth, patches, detections) == before, "the caller's data was changed"


def test_no_detection_in_any_patch():
    patches, detections = make_patches(8)
    assert merge_patches([], patches) == []
    assert evaluate_protocol("sodad", originals_of(patches, detections), [], patches=patches).metrics["AP"] == 0


PATCHES = {
    "images": [{"id": 4, "ori_id": 1, "start_coord": [0, 650], "width": 800, "height": 800}],
    "categories": [{"id": 1}],
}
TRUTH = scene({"bbox": [0.0, 0.0, 10.0, 10.0]})


def changed(**values: object) -> dict:
    return {"images": [PATCHES["images"][0] | values], "categories": PATCHES["categories"]}


@pytest.mark.parametrize(
    ("truth", "found", "patches", "pieces"),
    [
        (TRUTH, [hit([0, 0, 5, 5], image_id=4)], None, ["image_id 4", "patches' annotation file"]),
        (TRUTH, [hit([0, 0, 5, 5], image_id=1)], PATCHES, ["image_id 1", "leave the patches out"]),
        (TRUTH, [hit([0, 900, 5, 5], image_id=4)], PATCHES, ["number 0", "outside of its patch of 800 x 800"]),
        (TRUTH, [], changed(ori_id=9), ["image 9", "same split"]),
        (TRUTH, [], changed(ori_id=None), ["image number 0", "ori_id"]),
        (TRUTH, [], changed(start_coord=[0]), ["image number 0", "start_coord [0]"]),
        (TRUTH, [], changed(start_coord=None), ["start_coord None"]),
        (TRUTH, [], {"images": []}, ["no list 'images'"]),
        (TRUTH, [hit([0, 0, 5, 5], image_id=4, category_id=3)], PATCHES, ["category_id 3", "the ground truth"]),
        (TRUTH | {"images": [{"id": 1, "ori_id": 3}]}, [], None, ["annotation file of patches", "original"]),
    ],
)
def test_mistakes_are_named(truth, found, patches, pieces):
    with pytest.raises(InputError) as error:
        evaluate_protocol("sodad", truth, found, patches=patches)
    assert "\n" not in str(error.value)
    for piece in pieces:
        assert piece in str(error.value)


def test_senseless_settings_of_the_merging():
    with pytest.raises(InputError, match="iou is 0"):
        merge_patches([], PATCHES, iou=0)
    with pytest.raises(InputError, match="no list 'categories'"):
        merge_patches([], {"images": PATCHES["images"]})
