"""coco, visdrone and aitod: against pycocotools, against plain loops, and every edge and cap by hand."""

from __future__ import annotations

import math

import pytest

from crossdino.evaluation import evaluate_protocol
from tests.evaluation.coco_cases import grid, hit, mean_of, pycocotools_arrays, random_scenes, scene
from tests.reference.coco_ap_plain import ap_and_ar

# The same numbers added in double precision, in another order.
TOLERANCE = 1e-12

# The toolkits' tables, written out: name of the band -> area in px^2, and the caps.
TABLES = {
    "coco": ({"S": (0, 1024), "M": (1024, 9216), "L": (9216, 1e10)}, [1, 10, 100]),
    "aitod": ({"vt": (0, 64), "t": (64, 256), "s": (256, 1024), "m": (1024, 1e10)}, [100, 300, 1500]),
    "visdrone": ({"vt": (0, 64), "t": (64, 256), "s": (256, 1024), "m": (1024, 1e10)}, [100, 300, 1500]),
}

ORDER = {
    "coco": "AP AP50 AP75 AP_S AP_M AP_L AR@1 AR@10 AR@100 AR_S AR_M AR_L",
    "aitod": "AP AP50 AP75 AP_vt AP_t AP_s AP_m AR@100 AR@300 AR@1500 AR_vt AR_t AR_s AR_m "
    "oLRP oLRP_loc oLRP_FP oLRP_FN",
}
ORDER["visdrone"] = ORDER["aitod"]


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize(
    "case",
    [
        random_scenes(0),
        random_scenes(1, largest_px=250.0),
        # sides of whole pixels: many areas on a bound, many equal overlaps
        random_scenes(2, decimals=0, largest_px=40.0),
        random_scenes(3, num_images=3, num_objects=80, num_detections=350, category_ids=(1, 2)),
    ],
)
def test_equals_pycocotools(name, case):
    truth, detections = case
    bands, caps = TABLES[name]
    precision, recall = pycocotools_arrays(truth, detections, [(0, 1e10), *bands.values()], caps)
    expected = {
        "AP": mean_of(precision[..., 0, -1]),
        "AP50": mean_of(precision[0, ..., 0, -1]),
        "AP75": mean_of(precision[5, ..., 0, -1]),
    }
    for place, band in enumerate(bands, start=1):
        expected |= {f"AP_{band}": mean_of(precision[..., place, -1]), f"AR_{band}": mean_of(recall[..., place, -1])}
    expected |= {f"AR@{cap}": mean_of(recall[..., 0, place]) for place, cap in enumerate(caps)}
    assert 0.02 < expected["AP"] < 0.98  # no empty comparison

    result = evaluate_protocol(name, truth, detections)
    assert list(result.metrics) == ORDER[name].split()
    measured = {metric: value for metric, value in result.metrics.items() if not metric.startswith("oLRP")}
    assert measured == pytest.approx(expected, abs=TOLERANCE, nan_ok=True)
    for label, numbers in enumerate(result.by_class.values()):
        assert list(numbers) == ORDER[name].split()
        wanted = {
            "AP": mean_of(precision[:, :, label, 0, -1]),
            "AP50": mean_of(precision[0, :, label, 0, -1]),
            "AP75": mean_of(precision[5, :, label, 0, -1]),
        }
        for place, band in enumerate(bands, start=1):
            wanted[f"AP_{band}"] = mean_of(precision[:, :, label, place, -1])
            wanted[f"AR_{band}"] = mean_of(recall[:, label, place, -1])
        wanted |= {f"AR@{cap}": mean_of(recall[:, label, 0, place]) for place, cap in enumerate(caps)}
        measured = {metric: value for metric, value in numbers.items() if not metric.startswith("oLRP")}
        assert measured == pytest.approx(wanted, abs=TOLERANCE, nan_ok=True)


@pytest.mark.parametrize("seed", [4, 5])
def test_equals_plain_loops(seed):
    truth, detections = random_scenes(seed, num_images=5, num_objects=8, num_detections=20)
    for name, (bands, caps) in TABLES.items():
        metrics = evaluate_protocol(name, truth, detections).metrics
        assert (metrics["AP"], metrics[f"AR@{caps[-1]}"]) == pytest.approx(
            ap_and_ar(truth, detections, (0, 1e10), caps[-1]), abs=1e-9
        )
        assert metrics["AP50"] == pytest.approx(
            ap_and_ar(truth, detections, (0, 1e10), caps[-1], thresholds=[0.5])[0], abs=1e-9
        )
        for band, bounds in bands.items():
            assert (metrics[f"AP_{band}"], metrics[f"AR_{band}"]) == pytest.approx(
                ap_and_ar(truth, detections, bounds, caps[-1]), abs=1e-9, nan_ok=True
            )
        assert metrics[f"AR@{caps[0]}"] == pytest.approx(ap_and_ar(truth, detections, (0, 1e10), caps[0])[1], abs=1e-9)


EDGES = [
    (name, edge, lower, upper)
    for name, (bands, _) in TABLES.items()
    for (lower, (_, edge)), upper in zip(list(bands.items())[:-1], list(bands)[1:], strict=True)
]


@pytest.mark.parametrize(("name", "edge", "lower", "upper"), EDGES)
def test_an_object_on_an_edge_is_in_both_bands(name, edge, lower, upper):
    box = [10.0, 10.0, 20.0, 20.0]
    for area, inside in ((edge, {lower, upper}), (edge - 0.001, {lower}), (edge + 0.001, {upper})):
        result = evaluate_protocol(name, scene({"bbox": box, "area": area}), [hit(box)])
        for band in TABLES[name][0]:
            assert result.counts[f"objects_{band}"] == (band in inside)
            if band in inside:
                assert [result.metrics[f"{kind}_{band}"] for kind in ("AP", "AR")] == pytest.approx([1.0, 1.0])
            else:
                assert math.isnan(result.metrics[f"AP_{band}"])


@pytest.mark.parametrize(("name", "edge", "lower", "upper"), EDGES)
def test_a_false_detection_on_an_edge_harms_both_bands(name, edge, lower, upper):
    # The sides are powers of two, so that width x height is the edge exactly.
    sides = [edge / 8.0, 8.0]
    false = hit([500.0, 500.0, *sides], 0.9)
    objects = [
        {"bbox": [100.0 * place, 0.0, 20.0, 20.0], "area": (low + min(high, 2 * low + 9)) / 2}
        for place, (low, high) in enumerate(TABLES[name][0].values())
    ]
    found = [hit(item["bbox"], 0.5) for item in objects]
    metrics = evaluate_protocol(name, scene(*objects), [false, *found]).metrics
    for band in TABLES[name][0]:
        # Behind one false detection the only hit has precision 1/2.
        assert metrics[f"AP_{band}"] == pytest.approx(0.5 if band in (lower, upper) else 1.0)


def test_objects_outside_of_a_band_are_taken_after_those_inside():
    # The detection overlaps the tiny object (area 200) by 0.6 and the one that the file calls larger by 0.9.
    truth = scene({"bbox": [0.0, 0.0, 10.0, 6.0], "area": 200}, {"bbox": [0.0, 0.0, 10.0, 9.0], "area": 500})
    metrics = evaluate_protocol("aitod", truth, [hit([0.0, 0.0, 10.0, 10.0])]).metrics
    # At 0.50, 0.55 and 0.60 it finds the tiny one; above, it lies on the other one and is neither right nor wrong.
    assert (metrics["AP_t"], metrics["AR_t"]) == pytest.approx((0.3, 0.3), abs=TOLERANCE)
    # Of the larger ones: only up to 0.60 there is a choice, and it is for the one inside the band: 0.50 to 0.90.
    assert (metrics["AP_s"], metrics["AR_s"]) == pytest.approx((0.9, 0.9), abs=TOLERANCE)
    # Over all areas the highest overlap is taken: one of two objects up to 0.90; of the 101 recalls, 0 to 0.50.
    assert metrics["AR@100"] == pytest.approx(0.9 * 1 / 2, abs=TOLERANCE)
    assert metrics["AP"] == pytest.approx(0.9 * 51 / 101, abs=TOLERANCE)


@pytest.mark.parametrize("name", TABLES)
def test_every_cap(name):
    caps = TABLES[name][1]
    boxes = grid(caps[-1] + 1)
    # By descending score, all right: of N objects a cap leaves cap / N.
    found = [hit(box, 1 - place / 10_000) for place, box in enumerate(boxes)]
    result = evaluate_protocol(name, scene(*({"bbox": box} for box in boxes)), found)
    for cap in caps:
        assert result.metrics[f"AR@{cap}"] == pytest.approx(cap / len(boxes), abs=TOLERANCE)
    # The recall 1.0 of the 101 is not reached.
    assert result.metrics["AP"] == pytest.approx((100 / 101), abs=TOLERANCE)
    assert result.num_predictions == len(boxes)
    assert any(f"more than {caps[-1]} objects" in note for note in result.notes)
    assert result.settings["max_detections"] == caps


def test_the_cap_is_per_image_and_class():
    boxes = grid(101)
    objects = [{"bbox": box, "category_id": kind} for box in boxes for kind in (1, 2)]
    objects += [{"bbox": box, "image_id": 2} for box in boxes[:100]]
    found = [hit(item["bbox"], 0.5, item.get("image_id", 1), item.get("category_id", 1)) for item in objects]
    result = evaluate_protocol("coco", scene(*objects, num_images=2, num_classes=2), found)
    assert result.metrics["AR@100"] == pytest.approx((200 / 201 + 100 / 101) / 2, abs=TOLERANCE)


def test_annotation_id_zero_and_ids_with_gaps():
    box = [5.0, 5.0, 20.0, 20.0]
    truth = {
        "images": [{"id": 900}, {"id": -7}],
        "annotations": [
            {"id": 0, "image_id": 900, "category_id": 41, "bbox": box},
            {"id": 17, "image_id": -7, "category_id": 41, "bbox": box},
        ],
        "categories": [{"id": 41, "name": "ship"}],
    }
    result = evaluate_protocol("aitod", truth, [hit(box, 0.5, 900, 41), hit(box, 0.4, -7, 41)])
    assert (result.metrics["AP"], result.metrics["oLRP"]) == pytest.approx((1.0, 0.0))
    assert any("id 0" in note for note in result.notes)


def test_of_equal_scores_the_first_in_the_file_and_the_lower_image_id_come_first():
    right, wrong = hit([0.0, 0.0, 10.0, 10.0]), hit([300.0, 0.0, 10.0, 10.0])
    truth = scene({"bbox": right["bbox"]})
    assert evaluate_protocol("coco", truth, [right, wrong]).metrics["AP"] == pytest.approx(1.0)
    assert evaluate_protocol("coco", truth, [wrong, right]).metrics["AP"] == pytest.approx(0.5)
    truth["images"].insert(0, {"id": 2})
    assert evaluate_protocol("coco", truth, [wrong | {"image_id": 2}, right]).metrics["AP"] == pytest.approx(1.0)
    truth["images"].insert(0, {"id": -1})
    assert evaluate_protocol("coco", truth, [right, wrong | {"image_id": -1}]).metrics["AP"] == pytest.approx(0.5)


def test_detections_in_an_image_without_truth_are_wrong():
    box = [0.0, 0.0, 10.0, 10.0]
    truth = scene({"bbox": box}, num_images=2)
    metrics = evaluate_protocol("visdrone", truth, [hit(box, 0.5), hit(box, 0.9, image_id=2)]).metrics
    assert metrics["AP"] == pytest.approx(0.5)


def test_a_class_without_truth_is_left_out_and_one_without_detections_is_zero():
    box = [0.0, 0.0, 10.0, 10.0]
    truth = scene({"bbox": box}, {"bbox": box, "category_id": 2}, num_classes=3)
    result = evaluate_protocol("coco", truth, [hit(box), hit(box, category_id=3)])
    assert [result.by_class[name]["AP"] for name in result.by_class] == pytest.approx([1.0, 0.0, math.nan], nan_ok=True)
    assert result.metrics["AP"] == pytest.approx(0.5)
    assert any("class3" in note for note in result.notes)


@pytest.mark.parametrize("name", TABLES)
def test_no_detection_at_all(name):
    result = evaluate_protocol(name, scene({"bbox": [0.0, 0.0, 5.0, 5.0]}), [])
    small, large = list(TABLES[name][0])[0], list(TABLES[name][0])[-1]
    assert [result.metrics[key] for key in ("AP", "AP50", f"AP_{small}", f"AR_{small}")] == [0, 0, 0, 0]
    assert math.isnan(result.metrics[f"AP_{large}"])
    assert result.num_predictions == 0


@pytest.mark.parametrize("crowd", [1, True])
def test_a_crowd_takes_many_by_the_part_that_lies_inside(crowd):
    real, region = [0.0, 0.0, 10.0, 10.0], [100.0, 100.0, 60.0, 60.0]
    truth = scene({"bbox": real, "iscrowd": 0 if crowd == 1 else False}, {"bbox": region, "iscrowd": crowd})
    inside = [hit([100.0 + 12 * place, 100.0, 10.0, 10.0], 0.9) for place in range(4)]
    half_out = hit([95.0, 120.0, 10.0, 10.0], 0.9)
    result = evaluate_protocol("aitod", truth, [hit(real, 0.5), *inside, half_out])
    assert result.metrics["AP50"] == pytest.approx(1.0)
    assert result.metrics["AP75"] == pytest.approx(0.5)  # there the one half outside is wrong
    assert (result.num_objects, result.counts["crowds"], result.metrics["oLRP"]) == (1, 1, pytest.approx(0.0))


def test_area_that_is_missing_is_width_times_height():
    objects = [{"bbox": [0.0, 0.0, 8.0, 8.0]}, {"bbox": [50.0, 0.0, 8.0, 8.0], "area": None}]
    result = evaluate_protocol("aitod", scene(*objects), [])
    assert (result.counts["objects_vt"], result.counts["objects_t"], result.counts["objects_s"]) == (2, 2, 0)


def test_ignore_is_not_read_and_said_so():
    box = [0.0, 0.0, 10.0, 10.0]
    result = evaluate_protocol("coco", scene({"bbox": box, "ignore": 1}), [hit(box)])
    assert (result.num_objects, result.metrics["AP"]) == (1, pytest.approx(1.0))
    assert any("`ignore`" in note for note in result.notes)
