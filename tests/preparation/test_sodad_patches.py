"""SODA-D's patches against hand-made cases and against the plain version of the rules."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from crossdino.preparation.sodad_patches import PatchRules, annotated_extent, cut_patch, patch_starts, plan_patches
from crossdino.tiling import tile_starts
from tests.reference.sodad_split_plain import split_plain

RULES = PatchRules()


def plan(width: int, height: int, *boxes: tuple[int, list[float]], training: bool = False, rules: PatchRules = RULES):
    """The patches of an image; of each box the category and its numbers."""
    numbers = np.array([box for _, box in boxes], dtype=np.float64).reshape(-1, 4)
    regions = np.array([category == 10 for category, _ in boxes], dtype=np.bool_)
    return plan_patches(width, height, numbers, regions, rules, training=training)


@pytest.mark.parametrize(
    ("length", "starts"),
    [
        (1, [0]),
        (799, [0]),
        (800, [0]),
        (801, [0, 1]),
        (1449, [0, 649]),
        (1450, [0, 650]),
        (1451, [0, 650, 651]),
        (2000, [0, 650, 1200]),
        (4000, [0, 650, 1300, 1950, 2600, 3200]),
    ],
)
def test_only_the_last_patch_is_shifted_back(length: int, starts: list[int]) -> None:
    assert patch_starts(length, 800, 150) == starts


def test_the_grid_is_not_the_even_one_of_prediction() -> None:
    assert tile_starts(2000, 800, 150) == [0, 600, 1200] != patch_starts(2000, 800, 150)


def test_columns_come_before_rows() -> None:
    assert [(one.left, one.top) for one in plan(801, 900)] == [(0, 0), (0, 100), (1, 0), (1, 100)]


@pytest.mark.parametrize(
    ("box", "shown", "flagged"),
    [
        ([646, 10, 10, 10], [0, 10, 6, 10], False),
        ([644, 10, 10, 10], [0, 10, 4, 10], True),  # exactly 0.4
        ([635, 10, 25, 8], [0, 10, 10, 8], True),  # exactly 0.4, of which 10 / 25 is not the rounded number only
        ([645, 10, 10, 7], [0, 10, 5, 7], False),
        ([643, 10, 12, 10], [0, 10, 5, 10], False),  # 0.4167
        ([600, 10, 51, 10], [0, 10, 1, 10], True),
    ],
)
def test_pieces_of_at_most_forty_percent_are_flagged(box: list[float], shown: list[float], flagged: bool) -> None:
    (first, second) = plan(1450, 800, (1, box))
    assert (second.left, second.top) == (650, 0)
    assert second.pieces_xywh.tolist() == [shown] and second.flagged.tolist() == [flagged]
    assert first.pieces_xywh.tolist() == [box] and not first.flagged.any()


def test_a_box_that_only_touches_a_patch_is_not_in_it() -> None:
    first, second = plan(1450, 800, (1, [640, 0, 10, 10]), (2, [800, 0, 10, 10]))
    assert first.sources.tolist() == [0] and second.sources.tolist() == [1]


def test_the_share_is_of_the_whole_box_also_beyond_the_image() -> None:
    (patch,) = plan(800, 800, (1, [-6, 0, 10, 10]), (1, [-5, 0, 10, 10]))
    assert patch.flagged.tolist() == [True, False]


def test_in_an_image_that_is_padded_a_box_may_lie_beyond_its_border() -> None:
    (patch,) = plan(500, 400, (1, [490, 390, 30, 30]))
    assert patch.pieces_xywh.tolist() == [[490, 390, 30, 30]] and not patch.flagged.any()


def test_training_images_end_after_their_last_annotation() -> None:
    boxes = np.array([[10.9, 20.9, 5.9, 6.9], [3, 4, 2, 2]])
    assert annotated_extent(900, 800, boxes, 5) == (10 + 5 + 5, 20 + 6 + 5)  # fractions are cut off each number
    assert annotated_extent(18, 800, boxes, 5) == (18, 31)
    assert annotated_extent(900, 800, np.array([[-50.0, -50, 20, 20]]), 5) == (5, 5)
    # An ignore region counts as well, and so the object is in two patches.
    patches = plan(3000, 800, (1, [700, 0, 20, 20]), (10, [880, 0, 15, 15]), training=True)
    assert [one.left for one in patches] == [0, 100]
    whole = dataclasses.replace(RULES, train_margin_px=None)
    kept = plan(3000, 800, (1, [700, 0, 20, 20]), (10, [880, 0, 15, 15]), training=True, rules=whole)
    assert [one.left for one in kept] == [0, 650]
    assert [one.left for one in plan(3000, 800, (1, [700, 0, 20, 20]))] == [0, 650, 1300, 1950, 2200]


def test_training_patches_without_an_object_are_dropped() -> None:
    boxes = (1, [644, 0, 10, 10]), (10, [1700, 0, 10, 10])
    assert [one.left for one in plan(2000, 800, *boxes, training=True)] == [0, 650], "a flagged piece keeps its patch"
    assert [one.left for one in plan(2000, 800, *boxes)] == [0, 650, 1200]
    keep = dataclasses.replace(RULES, drop_empty=False)
    assert [one.left for one in plan(2000, 800, *boxes, training=True, rules=keep)] == [0, 650, 915]
    assert plan(2000, 800, (10, [0, 0, 10, 10]), training=True) == []


def image_of(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Every pixel with its own colour, none black."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows % 251 + 1, columns % 241 + 1, (rows + columns) % 239 + 1], axis=-1).astype(np.uint8)


def test_regions_are_black_but_not_where_objects_are() -> None:
    image = image_of(800, 1450)
    region, beside, inside = (10, [690.9, 100.9, 50.2, 40.2]), (10, [720, 130, 40, 40]), (5, [700.5, 110.5, 10.7, 8.7])
    second = plan(1450, 800, region, beside, inside)[1]
    pixels = cut_patch(image, second, RULES)
    expected = image[:, 650:].copy()
    expected[100:141, 40:91] = 0  # 40.9 to 91.1 and 100.9 to 141.1 without their fractions
    expected[130:170, 70:110] = 0
    expected[110:119, 50:61] = image[110:119, 700:711]
    assert np.array_equal(pixels, expected)
    assert np.array_equal(cut_patch(image, second, dataclasses.replace(RULES, fill_regions=False)), image[:, 650:])


def test_an_object_shows_through_two_regions_whatever_the_order() -> None:
    image = image_of(800, 800)
    (patch,) = plan(800, 800, (3, [10, 10, 5, 5]), (10, [0, 0, 20, 20]), (10, [5, 5, 30, 30]))
    pixels = cut_patch(image, patch, RULES)
    assert np.array_equal(pixels[10:15, 10:15], image[10:15, 10:15])
    assert not pixels[:20, :10].any() and not pixels[15:35, 5:35].any()


def test_black_begins_where_the_image_ends_and_not_where_the_annotations_do() -> None:
    image = image_of(400, 1000)
    (patch,) = plan(1000, 400, (1, [100, 100, 10, 10]), training=True)
    assert (patch.left, patch.top) == (0, 0)
    pixels = cut_patch(image, patch, RULES)
    assert np.array_equal(pixels[:400], image[:, :800]) and not pixels[400:].any()


@pytest.mark.parametrize("kind", ["whole numbers", "fractions", "borders"])
def test_random_images_against_the_plain_version(kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    exactly = pieces = 0
    for _ in range(25):
        width, height = (int(rng.choice([30, 799, 800, 801, 1450, 1451, rng.integers(100, 2300)])) for _ in range(2))
        boxes: list[tuple[int, list[float]]] = []
        for _ in range(int(rng.integers(0, 20))):
            category = int(rng.choice([1, 9, 10]))
            if kind == "borders":
                lines = [int(rng.choice([0, 650, 800, 1300, 1450, side - 800, side])) for side in (width, height)]
                box = [*(line - int(rng.integers(0, 11)) for line in lines), 10, 10]
            else:
                box = [*rng.uniform(-60, (width, height)).tolist(), *rng.uniform(1, 130, 2).tolist()]
                box = box if kind == "fractions" else [int(value) for value in box]
            boxes.append((category, box))
        document = {
            "images": [{"id": 3, "file_name": "x.jpg", "width": width, "height": height}],
            "annotations": [{"image_id": 3, "category_id": category, "bbox": box} for category, box in boxes],
        }
        for training in (False, True):
            patches = plan(width, height, *boxes, training=training) if boxes else []
            found = [
                ([one.left, one.top], list(zip(one.pieces_xywh.tolist(), one.flagged.tolist(), strict=True)))
                for one in patches
            ]
            plain = split_plain(document, None, training)
            assert found == [(one["start"], [(box, flagged) for box, _, flagged in one["pieces"]]) for one in plain]
            assert [[boxes[i][0] for i in one.sources] for one in patches] == [
                [category for _, category, _ in one["pieces"]] for one in plain
            ]
            pieces += sum(len(one["pieces"]) for one in plain)
            shares = [Fraction(box[2] * box[3]) / 100 for one in plain for box, _, _ in one["pieces"]]
            exactly += kind == "borders" and shares.count(Fraction(2, 5))
    assert pieces > 200 and (exactly > 10 or kind != "borders")
