"""The bootstrap against data sets whose images really are duplicated, against enumeration, and in simulation."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import threading

import numpy as np
import pytest

from crossdino.errors import InputError
from crossdino.evaluation.accumulation import hits_for_recalls
from crossdino.evaluation.average_precision import evaluate_detections
from crossdino.evaluation.bootstrap import draw_images
from crossdino.evaluation.comparison import clear_side, compare_detections, p_text
from crossdino.evaluation.protocols import evaluate_protocol

# Both sides add the same numbers in double precision, in another order.
TOLERANCE = 1e-12
BANDS = {"small": (0.0, 20.0), "rest": (20.0, 1e5)}


def made_up(
    seed: int,
    num_images: int = 12,
    category_ids: tuple[int, ...] = (3, 7, 90),
    score_digits: int = 9,
    largest_px: float = 60.0,
    flag: str = "iscrowd",
    shift: float = 0.08,
) -> tuple[dict, list[dict]]:
    """Objects of all sizes, some flagged, some images empty; jittered objects and noise; ties with few score digits."""
    rng = np.random.default_rng(seed)
    image_ids = (rng.permutation(100 * num_images)[:num_images] - 20).tolist()
    annotations, detections = [], []
    for image_id in image_ids:
        boxes = []
        for _ in range(int(rng.integers(0, 12))):
            width, height = np.exp(rng.uniform(np.log(3), np.log(largest_px), 2))
            boxes.append(([*rng.uniform(0, 120, 2).tolist(), width, height], int(rng.choice(category_ids[:2]))))
            box, category = boxes[-1]
            flags = {"iscrowd": 0, "ignore": 0} | {flag: int(rng.random() < 0.15)}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    **flags,
                }
            )
        for _ in range(int(rng.integers(0, 40))):
            if boxes and rng.random() < 0.8:
                box, category = boxes[int(rng.integers(len(boxes)))]
                box = (np.array(box) + rng.normal(0, shift, 4) * np.tile(box[2:], 2)).tolist()
            else:
                box, category = rng.uniform(1, 100, 4).tolist(), int(rng.choice(category_ids))
            box = [box[0], box[1], abs(box[2]), abs(box[3])]
            score = round(float(rng.random()), score_digits)
            detections.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})
    rng.shuffle(detections)
    truth = {
        "images": [{"id": identity, "width": 300, "height": 300} for identity in image_ids],
        "annotations": annotations,
        "categories": [{"id": identity, "name": f"class{identity}"} for identity in category_ids],
    }
    return truth, detections


def duplicated(truth: dict, detections: list[dict], counts: np.ndarray) -> tuple[dict, list[dict]]:
    """The data with each image as often as `counts` (by ascending id) says; copies follow each other."""
    ids = sorted(image["id"] for image in truth["images"])
    many = dict(zip(ids, counts.tolist(), strict=True))

    def copies(entries: list[dict]) -> list[dict]:
        return [
            {**entry, "image_id": 1000 * entry["image_id"] + copy}
            for entry in entries
            for copy in range(many[entry["image_id"]])
        ]

    annotations = [{**entry, "id": place} for place, entry in enumerate(copies(truth["annotations"]), start=1)]
    images = [{"id": 1000 * identity + copy} for identity in ids for copy in range(many[identity])]
    return {**truth, "images": images, "annotations": annotations}, copies(detections)


def expected_numbers(protocol: str | None, truth: dict, detections: list[dict], cap: int) -> dict[str, float]:
    if protocol is not None:
        return evaluate_protocol(protocol, truth, detections).metrics
    result = evaluate_detections(truth, detections, max_detections=cap, size_bands=BANDS)
    numbers = {"AP": result.ap, "AP50": result.ap50, "AP75": result.ap75, f"AR@{cap}": result.ar}
    for name, band in result.by_size.items():
        numbers |= {f"AP_{name}": band.ap, f"AR_{name}": band.ar}
    return numbers


@pytest.mark.parametrize(
    ("protocol", "score_digits", "cap"),
    [
        (None, 9, 100),
        (None, 1, 100),  # many ties, right and wrong ones within an image
        (None, 1, 4),  # the cap bites
        ("coco", 2, 0),
        ("aitod", 1, 0),
        ("visdrone", 9, 0),
        ("sodad", 1, 0),
        ("widerperson", 9, 0),
        ("widerperson", 1, 0),
    ],
)
def test_equals_the_duplicated_data_set(protocol, score_digits, cap):
    persons = protocol == "widerperson"
    truth, detections = made_up(
        5,
        category_ids=(1, 1) if persons else (3, 7, 90),
        score_digits=score_digits,
        flag="ignore" if protocol == "sodad" else "iscrowd",
        shift=0.05,
    )
    if persons:
        annotated = {entry["image_id"] for entry in truth["annotations"]}
        truth["categories"] = truth["categories"][:1]
        # What has no annotation is left out by the protocol: it is no image of the bootstrap either.
        counted = {**truth, "images": [image for image in truth["images"] if image["id"] in annotated]}
    else:
        counted = truth
    settings = {} if protocol else {"max_detections": cap, "size_bands": BANDS}
    result = compare_detections(truth, [detections], protocol=protocol, num_resamples=100, seed=3, **settings)
    drawn = draw_images(len(counted["images"]), 100, 3)
    of_counted = [entry for entry in detections if entry["image_id"] in {image["id"] for image in counted["images"]}]

    whole = expected_numbers(protocol, truth, detections, cap)
    assert 0.02 < whole["AP"] < 0.98  # no empty comparison
    got = {name: estimates[0].value for name, estimates in result.estimates.items()}
    assert got == pytest.approx({name: whole[name] for name in got}, abs=TOLERANCE, nan_ok=True)
    for number in (0, 1, 2, 3, 42):
        expected = expected_numbers(protocol, *duplicated(counted, of_counted, drawn[:, 1 + number]), cap)
        got = {name: values[0, number] for name, values in result.samples.items()}
        assert got == pytest.approx({name: expected[name] for name in got}, abs=TOLERANCE, nan_ok=True)


def test_recalls_are_compared_as_they_are_rounded():
    many = np.arange(1, 1500)
    for count, needed in zip(many, hits_for_recalls(many), strict=True):
        recalls = np.arange(count + 1) / count
        np.testing.assert_array_equal(needed, np.searchsorted(recalls, np.linspace(0, 1, 101)))


def test_of_two_objects_of_one_overlap_the_later_is_taken():
    """The first detection lies between two objects; the second one fits the later object only."""
    objects = ([10.0, 10.0, 10.0, 10.0], [14.0, 10.0, 10.0, 10.0])
    truth, _ = two_images()
    truth["annotations"] = [
        {"id": place, "image_id": 1, "category_id": 1, "bbox": box, "iscrowd": 0}
        for place, box in enumerate(objects, start=1)
    ]
    detections = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": score}
        for box, score in (([12.0, 10.0, 10.0, 10.0], 0.9), ([15.0, 10.0, 10.0, 10.0], 0.8))
    ]
    expected = evaluate_detections(truth, detections)
    result = compare_detections(truth, [detections], num_resamples=100)
    assert expected.ap50 == pytest.approx(51 / 101)  # the second detection finds its object taken
    assert result.estimates["AP50"][0].value == pytest.approx(expected.ap50, abs=TOLERANCE)
    assert result.estimates["AR@100"][0].value == pytest.approx(expected.ar, abs=TOLERANCE)


def two_images() -> tuple[dict, list[dict]]:
    """Image 1: its object is found. Image 2: its object is missed, and a wrong detection has the highest score."""
    box, elsewhere = [10.0, 10.0, 10.0, 10.0], [60.0, 60.0, 10.0, 10.0]
    truth = {
        "images": [{"id": 1}, {"id": 2}],
        "annotations": [
            {"id": image, "image_id": image, "category_id": 1, "bbox": box, "area": 100.0, "iscrowd": 0}
            for image in (1, 2)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    return truth, [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9},
        {"image_id": 2, "category_id": 1, "bbox": elsewhere, "score": 0.95},
    ]


def test_two_images_by_hand():
    truth, detections = two_images()
    perfect = [{**detections[0], "image_id": image, "score": 1.0} for image in (1, 2)]
    result = compare_detections(truth, [detections, perfect], num_resamples=2000, confidence=0.5, names=("old", "new"))
    # Both: the wrong one, then the right one: precision 1/2 up to recall 1/2, the first 51 of 101 recalls.
    by_counts = {(2, 0): 1.0, (1, 1): 51 / 101 / 2, (0, 2): 0.0}
    drawn = draw_images(2, 2000, 0)[:, 1:]
    expected = np.array([by_counts[tuple(column)] for column in drawn.T.tolist()])
    np.testing.assert_allclose(result.samples["AP"][0], expected, atol=TOLERANCE)
    assert result.estimates["AP"][0].value == pytest.approx(51 / 202)
    # 1/4, 1/2, 1/4 of the resamples; 5 standard deviations are 0.056.
    for value, share in ((1.0, 0.25), (51 / 202, 0.5), (0.0, 0.25)):
        assert np.mean(np.isclose(expected, value)) == pytest.approx(share, abs=0.056)
    np.testing.assert_array_equal(result.samples["AP"][1], 1.0)
    difference = result.differences["AP"]
    assert difference.value == pytest.approx(151 / 202)
    # Never below zero, zero where image 1 is drawn twice.
    none = int(np.count_nonzero(drawn[0] == 2))
    assert difference.p_value == pytest.approx(2 * (1 + none) / 2001)
    assert difference.share_better == pytest.approx(1 - none / 2000)
    low, high = np.quantile(1 - expected, [0.25, 0.75])
    assert (difference.low, difference.high) == (pytest.approx(low), pytest.approx(high))


def test_three_images_enumerated():
    """All 27 ways to draw three images, each evaluated as a duplicated data set, give the distribution."""
    truth, detections = made_up(8, num_images=3, score_digits=2)
    result = compare_detections(truth, [detections], num_resamples=3000)
    values: dict[tuple[int, ...], float] = {}
    for drawing in itertools.product(range(3), repeat=3):
        counts = np.bincount(drawing, minlength=3)
        values.setdefault(tuple(counts), evaluate_detections(*duplicated(truth, detections, counts)).ap)
    every = [values[tuple(np.bincount(one, minlength=3))] for one in itertools.product(range(3), repeat=3)]
    drawn = draw_images(3, 3000, 0)[:, 1:]
    expected = np.array([values[tuple(column)] for column in drawn.T.tolist()])
    np.testing.assert_allclose(result.samples["AP"][0], expected, atol=TOLERANCE)
    # 5 standard errors of the mean
    assert result.samples["AP"][0].mean() == pytest.approx(np.mean(every), abs=5 * np.std(every) / math.sqrt(3000))


def test_does_not_depend_on_processes_and_on_the_number_of_resamples():
    truth, detections = made_up(2)
    one = compare_detections(truth, [detections, detections[::2]], num_resamples=150, seed=4)
    more = compare_detections(truth, [detections, detections[::2]], num_resamples=260, seed=4)
    other = compare_detections(truth, [detections, detections[::2]], num_resamples=150, seed=5)
    for name, values in one.samples.items():
        np.testing.assert_array_equal(more.samples[name][:, :150], values)
    assert not np.array_equal(other.samples["AP"], one.samples["AP"])


def test_processes_compute_the_same(monkeypatch):
    truth, detections = made_up(2)
    here = compare_detections(truth, [detections], num_resamples=150)
    monkeypatch.setattr("crossdino.evaluation.comparison._WORTH_PROCESSES", 0)
    there = compare_detections(truth, [detections], num_resamples=150, num_processes=2)
    for name, values in here.samples.items():
        np.testing.assert_array_equal(there.samples[name], values)


def test_ctrl_c_leaves_nobody_computing(monkeypatch):
    truth, detections = made_up(2)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("crossdino.evaluation.comparison._WORTH_PROCESSES", 0)
        with pytest.raises(KeyboardInterrupt):
            compare_detections(truth, [detections], num_resamples=150, num_processes=2, on_progress=interrupt)
    assert multiprocessing.active_children() == []
    # What such a process does once the parent has said so: at most the resamples that it has begun with.
    stop = threading.Event()
    stop.set()
    monkeypatch.setattr("crossdino.parallel._given_up", stop)
    samples = compare_detections(truth, [detections], num_resamples=100).samples
    assert all(np.isnan(values).all() for values in samples.values())


def test_p_values_are_never_printed_as_zero():
    assert [p_text(value) for value in (2 / 5001, 2 / 1001, 0.04, 1.0)] == ["<0.001", "0.002", "0.040", "1.000"]


def simulated(rng: np.random.Generator, num_images: int, shifts: tuple[float, ...]) -> tuple[dict, list[list[dict]]]:
    """Images of different difficulty, the same for detectors that differ in how exact their boxes are."""
    annotations: list[dict] = []
    found: list[list[dict]] = [[] for _ in shifts]
    for image in range(1, num_images + 1):
        hard = rng.uniform(0.5, 1.5)
        for place in range(int(rng.integers(2, 8))):
            box = np.array([40.0 * place, 0.0, 20.0, 20.0])
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": 1, "bbox": box.tolist(), "iscrowd": 0}
            )
            for detections, shift in zip(found, shifts, strict=True):
                moved = box + np.append(rng.normal(0, 20 * shift * hard, 2), (0, 0))
                detections.append(
                    {"image_id": image, "category_id": 1, "bbox": moved.tolist(), "score": float(rng.random())}
                )
    images = [{"id": image} for image in range(1, num_images + 1)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}, found


def test_the_interval_of_no_difference_holds_zero_as_often_as_it_says():
    rng = np.random.default_rng(0)
    num_runs, held, values, widths = 40, 0, [], []
    for _ in range(num_runs):
        truth, found = simulated(rng, 40, (0.15, 0.15))
        result = compare_detections(truth, found, num_resamples=150, size_bands={"any": (0, 1e5)})
        difference = result.differences["AP"]
        held += difference.low <= 0 <= difference.high
        assert (clear_side("AP", difference) == 0) == (difference.low <= 0 <= difference.high)
        values.append(difference.value)
        widths.append(difference.high - difference.low)
    # 38 of 40 are expected, with a standard deviation of 1.4.
    assert held >= 33
    # Intervals that are much too wide would hold zero as well: 2 x 1.96 standard deviations is their width. That of 40
    # values is known to 11 %.
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(values), rel=0.35)


def test_a_real_difference_is_found():
    truth, found = simulated(np.random.default_rng(1), 60, (0.2, 0.12))
    result = compare_detections(truth, found, num_resamples=200, size_bands={"any": (0, 1e5)})
    difference = result.differences["AP"]
    assert difference.low > 0
    assert difference.p_value < 0.05
    assert difference.share_better > 0.97
    assert clear_side("AP", difference) == 1
    back = compare_detections(truth, found[::-1], num_resamples=200, size_bands={"any": (0, 1e5)}).differences["AP"]
    assert (back.low, back.high) == (pytest.approx(-difference.high), pytest.approx(-difference.low))
    assert clear_side("AP", back) == -1


def test_a_lower_miss_rate_is_better():
    truth, found = simulated(np.random.default_rng(1), 60, (0.25, 0.05))
    noise = [
        {"image_id": image, "category_id": 1, "bbox": [0.0, 200.0, 9.0, 9.0], "score": 0.001 * image}
        for image in range(1, 61)
    ]
    result = compare_detections(truth, [detections + noise for detections in found], protocol="widerperson",
                                num_resamples=100)  # fmt: skip
    assert result.differences["mMR"].value < 0
    assert result.differences["mMR"].share_better > 0.97
    assert clear_side("mMR", result.differences["mMR"]) == 1


def test_a_band_that_some_resamples_lack_is_told():
    truth, detections = two_images()
    truth["annotations"][1] |= {"bbox": [10.0, 10.0, 30.0, 30.0], "area": 900.0}
    result = compare_detections(truth, [detections], num_resamples=200, size_bands=BANDS)
    lacking = int(np.count_nonzero(draw_images(2, 200, 0)[1, 1:] == 0))
    assert 0 < lacking < 200
    assert result.estimates["AP_rest"][0].num_defined == 200 - lacking
    assert any(note.startswith(f"AP_rest is not defined in {lacking} of 200") for note in result.notes)


def test_no_detection_at_all():
    truth, detections = made_up(1)
    result = compare_detections(truth, [[], detections], num_resamples=100)
    assert result.estimates["AP"][0].value == 0
    assert result.differences["AP"].low > 0


def test_few_images_and_equal_files_are_told():
    truth, detections = made_up(1, num_images=8)
    notes = compare_detections(truth, [detections, list(detections)], num_resamples=100).notes
    assert any("the same detections" in note for note in notes)
    assert any("8 images are few" in note for note in notes)
    alone = {**truth, "images": truth["images"][:1], "annotations": []}
    identity = truth["images"][0]["id"]
    alone["annotations"] = [entry for entry in truth["annotations"] if entry["image_id"] == identity] or [
        {"id": 1, "image_id": identity, "category_id": 3, "bbox": [1, 1, 5, 5], "iscrowd": 0}
    ]
    mine = [entry for entry in detections if entry["image_id"] == identity]
    assert any("one image only" in note for note in compare_detections(alone, [mine], num_resamples=100).notes)
    p_value = compare_detections(truth, [detections, list(detections)], num_resamples=100).differences["AP"].p_value
    assert p_value == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_resamples": 10}, "at least 100"),
        ({"confidence": 95}, "between 0 and 1"),
        ({"seed": -1}, "seed"),
        ({"protocol": "visdrone-official"}, "choose one of coco, aitod, visdrone, sodad, widerperson"),
        ({"patches": {}}, "protocol sodad"),
        ({"names": ["a"]}, "1 names for 2 files"),
        ({"names": ["a", "a"]}, "different names"),
        ({"size_bands": {"small": (5, 1)}}, "small"),
        ({"max_detections": 0}, "max_detections"),
    ],
)
def test_settings_that_make_no_sense(change, message):
    truth, detections = two_images()
    with pytest.raises(InputError, match=message):
        compare_detections(truth, [detections, detections[:1]], **change)


def test_an_image_that_the_truth_lacks():
    truth, detections = two_images()
    with pytest.raises(InputError, match="image_id 7"):
        compare_detections(truth, [detections, [{**detections[0], "image_id": 7}]], num_resamples=100)


def test_patches_are_merged_before_the_images_are_drawn():
    truth, detections = made_up(3, flag="ignore")
    ids = [image["id"] for image in truth["images"]]
    # Two patches an image; the second begins 150 px to the right.
    patches = {
        "images": [
            {"id": 2 * place + side, "ori_id": identity, "start_coord": [150 * side, 0], "width": 150, "height": 300}
            for place, identity in enumerate(ids)
            for side in (0, 1)
        ],
        "categories": truth["categories"],
    }
    of_patches = []
    for entry in detections:
        side = int(entry["bbox"][0] > 150)
        x, *rest = entry["bbox"]
        place = 2 * ids.index(entry["image_id"]) + side
        of_patches.append({**entry, "image_id": place, "bbox": [x - 150 * side, *rest]})
    expected = evaluate_protocol("sodad", truth, of_patches, patches=patches).metrics
    result = compare_detections(truth, [of_patches], protocol="sodad", patches=patches, num_resamples=100)
    assert 0.02 < expected["AP"] < 0.98
    assert result.num_images == len(ids)
    got = {name: estimates[0].value for name, estimates in result.estimates.items()}
    assert got == pytest.approx({name: expected[name] for name in got}, abs=TOLERANCE, nan_ok=True)
