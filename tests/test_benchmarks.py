"""The benchmarks' pure data: their parts agree with each other and with the published totals."""

from __future__ import annotations

import pytest

from crossdino.benchmarks import (
    AITOD_SIZE_BANDS,
    BENCHMARKS,
    COCO_91_SLOTS,
    SODAD_SIZE_BANDS,
)


def test_names_and_classes() -> None:
    assert list(BENCHMARKS) == ["coco", "visdrone", "aitod", "sodad", "widerperson"]
    assert {name: len(benchmark.categories) for name, benchmark in BENCHMARKS.items()} == {
        "coco": 80,
        "visdrone": 10,
        "aitod": 8,
        "sodad": 9,
        "widerperson": 1,
    }
    assert all(COCO_91_SLOTS[key] == name for key, name in BENCHMARKS["coco"].categories.items())
    # The ids that the raw files use (VisDrone2018-DET-toolkit README, wwtool, SODA-D's own JSON).
    assert BENCHMARKS["visdrone"].categories[10] == "motor"
    assert BENCHMARKS["aitod"].categories[8] == "wind-mill"
    assert BENCHMARKS["sodad"].categories[9] == "warning-cone"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_parts_agree(name: str) -> None:
    benchmark = BENCHMARKS[name]
    assert benchmark.name == name
    assert {"train", "val"} <= set(benchmark.roles) <= {"train", "val", "test"}
    assert {*benchmark.roles.values(), benchmark.paper_split} <= set(benchmark.splits)
    assert len(set(benchmark.categories.values())) == len(benchmark.categories)
    bounds = list(benchmark.size_bands.values())
    assert all(upper == lower for (_, upper), (lower, _) in zip(bounds, bounds[1:], strict=False))  # no gap
    for published in (*benchmark.splits.values(), *filter(None, [benchmark.total])):
        assert published.source


def test_published_splits_add_up_to_the_published_total() -> None:
    splits = BENCHMARKS["aitod"].splits
    assert splits["train"].images + splits["val"].images == splits["trainval"].images  # type: ignore[operator]
    assert splits["trainval"].images + splits["test"].images == BENCHMARKS["aitod"].total.images  # type: ignore
    splits = BENCHMARKS["widerperson"].splits
    assert sum(split.images or 0 for split in splits.values()) == BENCHMARKS["widerperson"].total.images  # type: ignore
    # VisDrone-DET has 10,209 images, 1,580 of them in test-challenge, which is not published.
    assert sum(split.images or 0 for split in BENCHMARKS["visdrone"].splits.values()) == 10_209 - 1_580
    # The class counts of the training split of VisDrone.
    by_class = (79_337, 27_059, 10_480, 144_867, 24_956, 12_875, 4_812, 3_246, 5_926, 29_647)
    assert BENCHMARKS["visdrone"].splits["train"].objects == sum(by_class)


def test_bands_in_pixels_are_the_roots_of_the_areas() -> None:
    for bands, name in ((AITOD_SIZE_BANDS, "aitod"), (AITOD_SIZE_BANDS, "visdrone"), (SODAD_SIZE_BANDS, "sodad")):
        areas = BENCHMARKS[name].size_bands.values()
        # The last AI-TOD band has no upper end that matters; the square of sqrt(2000) is rounded.
        for (lower, upper), area in zip(bands.values(), areas, strict=True):
            assert (lower**2, upper**2) == pytest.approx(area, rel=1e-15)
    assert SODAD_SIZE_BANDS["normal"][1] ** 2 >= 2000  # an object of exactly 2000 square pixels is inside
