"""The statistics of a data set, against plain loops, other libraries and values made by hand."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torchvision.ops import box_iou

from crossdino.config import DataConfig
from crossdino.data.duplicates import NEAR_DISTANCE, difference_hash, find_duplicates
from crossdino.data.index import DatasetIndex, ImageRecord, Problems
from crossdino.data.inspection import (
    Inspection,
    SplitObjects,
    heat_map,
    inspect_dataset,
    network_scales,
    network_sizes,
    objects_per_tile,
    split_summary,
    training_scales,
)
from crossdino.data.transforms import resize_hw
from crossdino.tiling import tile_grid


def make_index(
    images: list[tuple[tuple[int, int], list[tuple[Any, ...]]]],
    class_names: tuple[str, ...] = ("a", "b"),
    paths: list[Path] | None = None,
) -> DatasetIndex:
    """An index of images given as ((height, width), [(x, y, w, h, label, crowd?), ...])."""
    records = []
    for number, ((height, width), objects) in enumerate(images):
        rows = np.array([row[:4] for row in objects], dtype=np.float64).reshape(-1, 4)
        labels = np.array([row[4] for row in objects], dtype=np.int64)
        crowd = np.array([len(row) > 5 and row[5] for row in objects], dtype=bool)
        path = paths[number] if paths else Path(f"{number}.jpg")
        records.append(ImageRecord(number + 1, path, width, height, rows, labels, rows[:, 2] * rows[:, 3], crowd))
    return DatasetIndex(Path("x.json"), class_names, tuple(range(1, len(class_names) + 1)), tuple(records), Problems())


def random_index(num_images: int, num_objects: int, seed: int, hw: tuple[int, int] = (300, 500)) -> DatasetIndex:
    rng = np.random.default_rng(seed)
    images = []
    for number in range(num_images):
        height, width = hw if number % 2 else (hw[1], hw[0])
        sizes = rng.uniform(4, 90, (num_objects, 2))
        corners = rng.uniform(0, 1, (num_objects, 2)) * ((width, height) - sizes)
        images.append(
            ((height, width), [(*xy, *wh, int(rng.integers(2))) for xy, wh in zip(corners, sizes, strict=True)])
        )
    return make_index(images)


# --- sizes, counts, classes ---


def test_numbers_made_by_hand() -> None:
    index = make_index(
        [
            ((100, 200), [(0, 0, 4, 9, 0), (10, 10, 40, 40, 1), (50, 50, 30, 30, 0, True)]),
            ((100, 200), []),
            ((400, 400), [(10, 10, 16, 4, 1), (100, 100, 8, 8, 1), (200, 200, 8, 8, -1, True)]),
        ]
    )
    data = DataConfig(test_short_side=200, test_long_side=300)
    split = SplitObjects.of(index)
    assert (len(split), split.num_images, split.num_ignored, split.most_of_a_class) == (4, 3, 2, 2)
    np.testing.assert_allclose(split.sizes_px, [6, 40, 8, 8])
    # 100 x 200 becomes 150 x 300 (the long side is the limit), 400 x 400 becomes 200 x 200.
    np.testing.assert_allclose(network_sizes(split, data), [9, 60, 4, 4])
    summary = split_summary(split, data)
    assert (summary["images"], summary["images_without_objects"], summary["ignored_regions"]) == (3, 1, 2)
    assert summary["objects_per_image"] == {"mean": pytest.approx(4 / 3), "median": 2.0, "95": 2.0, "most": 2}
    assert summary["network_size_px_share_below"] == {"4": 0, "8": 0.5, "16": 0.75, "32": 0.75, "64": 1, "96": 1}
    assert summary["size_px_share_below"]["8"] == 0.25
    assert summary["image_sizes"] == {"distinct": 2, "common_hw": [[100, 200, 2], [400, 400, 1]]}
    assert summary["size_px"]["50"] == 8.0
    assert summary["aspect_ratio"]["99"] == pytest.approx(np.percentile([4 / 9, 1, 4, 1], 99))


def test_scales_are_those_of_the_resize() -> None:
    data = DataConfig(
        test_short_side=333,
        test_long_side=500,
        train_short_sides=(200, 320),
        train_long_side=480,
        crop_short_sides=(),
    )
    shapes = np.array([(100, 200), (640, 480), (97, 1001), (100, 200)])
    expected = []
    for shape in shapes.tolist():
        new = resize_hw((shape[0], shape[1]), 333, 500)
        expected.append(((new[0] / shape[0]) * (new[1] / shape[1])) ** 0.5)
    np.testing.assert_allclose(network_scales(shapes, data), expected)
    low, high = training_scales(shapes, data)
    np.testing.assert_allclose(low[1], 200 / 480, rtol=1e-2)  # whole pixels
    np.testing.assert_allclose(high[1], 320 / 480, rtol=1e-2)
    # A crop of 100 px out of an image of 200 px, shown at 200 to 320 px.
    low, high = training_scales(
        np.array([(400, 400)]), dataclasses.replace(data, crop_short_sides=(200,), crop_range=(100, 200))
    )
    assert (low[0], high[0]) == (pytest.approx(200 / 200 * 200 / 400), pytest.approx(320 / 100 * 200 / 400))
    tiled = dataclasses.replace(data, tile_size=256)
    assert network_scales(shapes, tiled).tolist() == [333 / 256] * 4


def test_classes_are_joined_by_name_across_splits() -> None:
    train = make_index([((50, 50), [(1, 1, 5, 5, 0)] * 3), ((50, 50), [(1, 1, 5, 5, 0)])], ("car", "bus"))
    val = make_index([((50, 50), [(1, 1, 5, 5, 0), (1, 1, 5, 5, 1)])], ("bike", "car"))
    inspection = inspect_dataset({"train": train, "val": val}, duplicates=False)
    found = {item.name: (item.objects, item.images) for item in inspection.classes}
    assert found == {
        "car": ({"train": 4, "val": 1}, {"train": 2, "val": 1}),
        "bus": ({"train": 0}, {"train": 0}),
        "bike": ({"val": 1}, {"val": 1}),
    }
    text = "\n".join(inspection.warnings())
    assert "fewer than 10 objects in train: car (4)" in text
    assert "none in train: bike" in text


@pytest.mark.parametrize("overlap", [0, 40])
def test_objects_per_tile_against_a_plain_loop(overlap: int) -> None:
    split = SplitObjects.of(random_index(3, 25, seed=0))
    expected = []
    by_shape = sorted(range(split.num_images), key=lambda i: tuple(split.image_hw[i]))
    for image in by_shape:
        height, width = split.image_hw[image].tolist()
        for tile in tile_grid((height, width), 128, overlap):
            count = 0
            for box in split.boxes_xywh[split.image_of == image]:
                x, y, w, h = box.tolist()
                seen_x = max(0.0, min(x + w, tile.left + 128) - max(x, tile.left))
                seen_y = max(0.0, min(y + h, tile.top + 128) - max(y, tile.top))
                count += seen_x * seen_y >= 0.4 * w * h
            expected.append(count)
    assert objects_per_tile(split, 128, overlap, 0.4).tolist() == expected
    # An image smaller than a tile is one tile.
    assert objects_per_tile(split, 800, 0, 0.4).tolist() == [25, 25, 25]


def test_overlaps_against_torchvision() -> None:
    rng = np.random.default_rng(1)
    index = random_index(4, 40, seed=2)
    records = []
    for record in index.records:  # near copies and exact copies, of the same and of another class
        boxes, labels = record.boxes_xywh.copy(), record.labels.copy()
        boxes[:5, :2] = boxes[5:10, :2] + rng.uniform(-8, 8, (5, 2))
        boxes[:5, 2:] = boxes[5:10, 2:]
        boxes[10:13] = boxes[13:16]
        labels[10] = 1 - labels[13]
        boxes[:, :2] = boxes[:, :2].clip(0)
        records.append(dataclasses.replace(record, boxes_xywh=boxes, labels=labels))
    split = SplitObjects.of(dataclasses.replace(index, records=tuple(records)))
    near = twice = 0
    for record in records:
        corners = record.boxes_xywh.copy()
        corners[:, 2:] += corners[:, :2]
        iou = box_iou(torch.from_numpy(corners), torch.from_numpy(corners)).fill_diagonal_(0).numpy()
        same = record.labels[:, None] == record.labels[None]
        near += int((iou > 0.5).any(1).sum())
        twice += int(((iou > 0.9) & same).any(1).sum())
    assert near > twice > 0
    assert split.overlaps == (near, twice)


def test_many_objects_in_one_image() -> None:
    """A hundred thousand in all, forty thousand of them in one image: neither the memory nor the time of all pairs."""
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.uniform(0, 9000, (40_000, 2)), rng.uniform(4, 20, (40_000, 2))], axis=1)
    crowded = ((10_000, 10_000), [(*row, 0) for row in rows.tolist()])
    small = ((500, 500), [(*row, 1) for row in (rng.uniform(4, 20, (600, 4)) * (20, 20, 1, 1)).tolist()])
    inspection = inspect_dataset({"train": make_index([crowded] + [small] * 100)}, duplicates=False)
    summary = inspection.to_dict(DataConfig(tile_size=256))["splits"]["train"]
    assert summary["objects"] == 100_000
    assert summary["objects_per_image"]["most"] == 40_000
    assert 0 < summary["overlapping_objects"] < 100_000


@pytest.mark.parametrize("images", [[], [((64, 64), [])], [((64, 64), [(3, 3, 9, 9, 0)])]])
@pytest.mark.parametrize("tile_size", [0, 32])
def test_little_or_nothing_in_it(images: list[Any], tile_size: int) -> None:
    inspection = inspect_dataset({"train": make_index(images, ("a",))}, duplicates=False)
    report = inspection.to_dict(DataConfig(tile_size=tile_size, tile_overlap=0))
    summary = report["splits"]["train"]
    assert (summary["images"], summary["objects"]) == (len(images), len(inspection.main))
    assert (summary["size_px"] is None) == (len(inspection.main) == 0)
    assert ("train holds no object" in report["warnings"]) == (len(inspection.main) == 0)
    assert heat_map(inspection.main).sum() == len(inspection.main)


def test_heat_map_has_its_rows_from_the_top() -> None:
    split = SplitObjects.of(make_index([((100, 200), [(190, 0, 8, 8, 0)] * 300)]))
    grid = heat_map(split)
    assert grid[0, -1] == 300 and grid.sum() == 300


# --- duplicates ---


def picture(seed: int, side: int = 160) -> Image.Image:
    """Coarse random blobs."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (10, 12, 3)).astype(np.uint8))
    return coarse.resize((side * 3 // 2, side), Image.Resampling.BICUBIC)


def test_exact_and_near_duplicates(tmp_path: Path) -> None:
    train = [tmp_path / f"t{number}.png" for number in range(6)]
    for number, path in enumerate(train[:4]):
        picture(number).save(path)
    train[4].write_bytes(train[0].read_bytes())  # exact, within
    picture(1).resize((120, 80)).save(train[5], quality=60)  # near, within
    val = [tmp_path / name for name in ("v0.png", "v1.jpg", "v2.png", "v3.jpg", "broken.jpg")]
    val[0].write_bytes(train[2].read_bytes())  # exact, across
    ImageEnhance.Brightness(picture(3)).enhance(0.9).save(val[1], quality=40)  # near, across
    picture(100).save(val[2])
    picture(101).save(val[3])
    val[4].write_bytes(b"no image")
    seen: list[None] = []
    found = find_duplicates({"train": train, "val": val}, on_image=lambda: seen.append(None))
    assert len(seen) == 11
    assert found.num_images == {"train": 6, "val": 5}
    assert found.exact_within == {"train": 2, "val": 0}
    assert found.exact_across == {"train": 1, "val": 1}
    assert found.near_within == {"train": 2, "val": 0}
    assert found.near_across == {"train": 1, "val": 1}
    assert found.unreadable == (val[4],)
    assert [kind for kind, _, _ in found.examples] == ["exact", "near", "exact", "near"]  # across splits first
    assert set(found.examples[0][1:]) == {train[2], val[0]}
    assert set(found.examples[1][1:]) == {train[3], val[1]}
    warnings = "\n".join(Inspection({}, found)._duplicate_warnings())
    assert "2 of 5 images of val have a twin in another split (1 the same file, 1 nearly the same picture)" in warnings


def test_near_duplicates_against_all_pairs(tmp_path: Path) -> None:
    """Pictures that change little by little, so that distances of all kinds occur."""
    paths, hashes = [], []
    for number in range(24):
        blend = Image.blend(picture(0), picture(1), number / 60)
        paths.append(tmp_path / f"{number}.png")
        blend.save(paths[-1])
        hashes.append(difference_hash(paths[-1].read_bytes()))
    near = [set(), set()]
    for i, j in itertools.permutations(range(24), 2):
        if int((hashes[i] != hashes[j]).sum()) <= NEAR_DISTANCE:
            near[(i < 12) == (j < 12)].add(i)
    found = find_duplicates({"train": paths[:12], "val": paths[12:]})
    assert found.near_within == {"train": len(near[1] & set(range(12))), "val": len(near[1] & set(range(12, 24)))}
    assert found.near_across == {"train": len(near[0] & set(range(12))), "val": len(near[0] & set(range(12, 24)))}
    assert 0 < len(near[0]) < 24


def test_flat_images_are_no_twins(tmp_path: Path) -> None:
    paths = []
    for value in (0, 5, 200):
        paths.append(tmp_path / f"{value}.png")
        pixels = np.full((60, 80), value, np.uint8)
        pixels[value % 7, 3] = 90
        Image.fromarray(pixels).save(paths[-1])
    Image.fromarray(np.full((60, 80), 40_000, np.uint16)).save(tmp_path / "deep.png")
    found = find_duplicates({"train": [*paths, tmp_path / "deep.png", tmp_path / "missing.png"]})
    assert found.near_within == found.exact_within == {"train": 0}
    assert found.unreadable == (tmp_path / "missing.png",)
