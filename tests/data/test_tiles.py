"""Tiles of a data set: every pixel is seen, boxes stay on their objects, cut ones are ignored."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crossdino.config import DataConfig
from crossdino.data import load_coco
from crossdino.data.dataset import DetectionDataset, WholeImage
from crossdino.errors import InputError
from crossdino.structures import Target
from crossdino.training.schedule import epoch_order

# Tiles at the size of the file: nothing is resized, so boxes and pixels are exact.
TILES = DataConfig(
    tile_size=40,
    tile_overlap=8,
    tile_keep=0.5,
    empty_tiles=0.5,
    train_short_sides=(40,),
    train_long_side=40,
    crop_short_sides=(),
    test_short_side=40,
    test_long_side=40,
    horizontal_flip=0.0,
    num_workers=0,
)


def write(folder: Path, images: list[np.ndarray], boxes: list[list[dict[str, Any]]]) -> Path:
    entries, annotations = [], []
    for number, (pixels, objects) in enumerate(zip(images, boxes, strict=True), start=1):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        entries.append(
            {"id": number, "file_name": f"{number}.png", "width": pixels.shape[1], "height": pixels.shape[0]}
        )
        annotations += [{"id": len(annotations) + i, "image_id": number, **one} for i, one in enumerate(objects, 1)]
    path = folder / "tiles.json"
    categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
    path.write_text(json.dumps({"images": entries, "annotations": annotations, "categories": categories}))
    return path


def coloured(shape: tuple[int, int], boxes: list[list[int]]) -> np.ndarray:
    """Black, with box number i in the grey i + 1."""
    pixels = np.zeros((*shape, 3), dtype=np.uint8)
    for grey, (x, y, width, height) in enumerate(boxes, start=1):
        pixels[y : y + height, x : x + width] = grey
    return pixels


@pytest.fixture
def index(tmp_path: Path):
    rng = np.random.default_rng(1)
    images, objects = [], []
    for shape in ((90, 130), (30, 50), (64, 40), (100, 100)):
        boxes: list[list[int]] = []
        while len(boxes) < 9 and shape != (100, 100):  # the last image has no object
            width, height = rng.integers(3, 9, 2).tolist()
            x, y = int(rng.integers(0, shape[1] - width)), int(rng.integers(0, shape[0] - height))
            apart = all(x + width <= b[0] or b[0] + b[2] <= x or y + height <= b[1] or b[1] + b[3] <= y for b in boxes)
            if apart:
                boxes.append([x, y, width, height])
        images.append(coloured(shape, boxes))
        objects.append([{"bbox": box, "category_id": 1 + number % 2} for number, box in enumerate(boxes)])
    return load_coco(write(tmp_path, images, objects))


def pixels_of(image: torch.Tensor, dataset: DetectionDataset) -> np.ndarray:
    values = image * torch.tensor(dataset.std)[:, None, None] + torch.tensor(dataset.mean)[:, None, None]
    return (values[0] * 255).round().numpy().astype(int)


def corners(target: Target, boxes: torch.Tensor) -> np.ndarray:
    xy, wh = boxes[:, :2] * 40, boxes[:, 2:] * 40
    return torch.cat([xy - wh / 2, xy + wh / 2], 1).numpy()


def check_tile(image: torch.Tensor, target: Target, dataset: DetectionDataset) -> set[int]:
    """Boxes against the grey values of the tile; returns the objects that are targets."""
    record = dataset.index.records[target.image_id - 1]
    pixels = pixels_of(image, dataset)
    assert pixels.shape == (40, 40)
    x0, y0 = target.origin_xy
    seen: dict[int, np.ndarray] = {}
    for grey in set(np.unique(pixels).tolist()) - {0}:
        rows, columns = np.nonzero(pixels == grey)
        seen[grey] = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    found = np.concatenate([corners(target, target.boxes_cxcywh), corners(target, target.ignored_boxes_cxcywh)])
    labels = torch.cat([target.labels, target.ignored_labels]).tolist()
    ignored = [False] * len(target.labels) + [True] * len(target.ignored_labels)
    assert len(found) == len(seen)
    targets = set()
    for box, label, is_ignored in zip(found, labels, ignored, strict=True):
        grey = pixels[round(float(box[1])), round(float(box[0]))]
        np.testing.assert_allclose(box, seen[grey], atol=1e-4)  # float32 of numbers up to 40
        assert label == record.labels[grey - 1]
        _, _, width, height = record.boxes_xywh[grey - 1]
        share = (seen[grey][2] - seen[grey][0]) * (seen[grey][3] - seen[grey][1]) / (width * height)
        assert is_ignored == (share < 0.5)
        if not is_ignored:
            targets.add(grey)
    # The tile shows the image at its place, and black beyond a small image.
    with Image.open(record.path) as file:
        whole = np.zeros((max(record.height, y0 + 40), max(record.width, x0 + 40)), dtype=int)
        whole[: record.height, : record.width] = np.asarray(file.convert("L"))
    np.testing.assert_array_equal(pixels, whole[y0 : y0 + 40, x0 : x0 + 40])
    return targets


def test_evaluation_sees_every_object_of_every_image(index) -> None:
    dataset = DetectionDataset(index, TILES, train=False)
    assert len(dataset) == sum(len(dataset.items_of(image)) for image in range(4)) == 3 * 4 + 2 + 2 + 9
    for image, record in enumerate(index.records):
        objects: set[int] = set()
        for item in dataset.items_of(image):
            pixels, target = dataset[item]
            assert target.image_id == record.image_id and target.original_hw == (40, 40)
            objects |= check_tile(pixels, target, dataset)
        assert objects == set(range(1, len(record.labels) + 1)), "an object that is whole in no tile"


def test_an_epoch_takes_full_tiles_and_a_share_of_empty_ones(index) -> None:
    dataset = DetectionDataset(index, TILES, train=True)
    reference = DetectionDataset(index, dataclasses.replace(TILES, tile_overlap=8), train=False)
    holding = 0
    for item in range(len(reference)):
        tile = reference[item][1]
        record = index.records[tile.image_id - 1]
        centres = record.boxes_xywh[:, :2] + record.boxes_xywh[:, 2:] / 2 - np.array(tile.origin_xy)
        holding += bool(((centres >= 0) & (centres < 40)).all(1).any())
    assert len(dataset) == holding + round(0.5 * holding)
    origins = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        items = [dataset[item] for item in range(len(dataset))]
        for pixels, target in items:
            check_tile(pixels, target, dataset)
        origins.append([(target.image_id, target.origin_xy) for _, target in items])
        again = [dataset[item] for item in range(len(dataset))]
        assert all(torch.equal(a[0], b[0]) for a, b in zip(items, again, strict=True))
    assert origins[0] != origins[1] != origins[2], "the seams must move"
    assert {image_id for image_id, _ in origins[0]} >= {1, 2, 3}
    assert len({target.noise_seed for _, target in items}) == len(items)
    assert len(DetectionDataset(index, dataclasses.replace(TILES, empty_tiles=0.0), train=True)) == holding


def test_no_more_empty_tiles_than_there_are(index) -> None:
    dataset = DetectionDataset(index, dataclasses.replace(TILES, empty_tiles=100.0), train=True)
    assert len(dataset) == len(DetectionDataset(index, TILES, train=False))


def test_without_any_object_an_epoch_takes_all_tiles(tmp_path: Path) -> None:
    """A crowd is no object. An epoch of nothing would end as a training that has learnt nothing, or in a crash."""
    objects = [[{"bbox": [2, 2, 10, 10], "category_id": 2, "iscrowd": 1}], []]
    index = load_coco(write(tmp_path, [np.zeros((40, 60, 3), dtype=np.uint8)] * 2, objects))
    for share in (0.0, 0.25):
        dataset = DetectionDataset(index, dataclasses.replace(TILES, empty_tiles=share, balance=0.5), train=True)
        assert len(dataset) == 4
        assert sorted(dataset[item][1].image_id for item in range(4)) == [1, 1, 2, 2]


def test_crowds_become_ignored_regions_of_their_class(tmp_path: Path) -> None:
    objects = [
        {"bbox": [2, 2, 10, 10], "category_id": 2, "iscrowd": 1},
        {"bbox": [20, 20, 8, 8], "category_id": 1, "iscrowd": 0},
        {"bbox": [35, 20, 10, 8], "category_id": 1, "iscrowd": 0},  # half of it lies in the first tile
    ]
    source = load_coco(write(tmp_path, [np.zeros((40, 60, 3), dtype=np.uint8)], [objects]))
    for keep, num_targets in ((0.5, 2), (0.51, 1)):
        target = DetectionDataset(source, dataclasses.replace(TILES, tile_keep=keep), train=False)[0][1]
        assert len(target.labels) == num_targets
        assert target.ignored_labels.tolist() == [1] + [0] * (2 - num_targets)
        np.testing.assert_allclose(corners(target, target.ignored_boxes_cxcywh)[0], [2, 2, 12, 12], atol=1e-4)


def test_most_objects_of_a_tile(index) -> None:
    assert DetectionDataset(index, dataclasses.replace(TILES, tile_size=0)).most_objects() == 9
    assert DetectionDataset(index, dataclasses.replace(TILES, tile_size=500)).most_objects() == 9
    assert DetectionDataset(index, TILES).most_objects() < 9


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tile_size": -1}, "tile_size"), ({"tile_overlap": 40}, "overlap"), ({"tile_keep": 1.5}, "tile_keep")],
)
def test_impossible_tiles_are_refused(index, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DetectionDataset(index, dataclasses.replace(TILES, **change))


# --- borders, small images, whole images ---


@pytest.mark.parametrize("shape", [(1, 1), (20, 100), (100, 20), (39, 41), (41, 39), (40, 40), (40, 81)])
@pytest.mark.parametrize("overlap", [0, 8, 20, 39])
def test_every_pixel_of_an_odd_image_is_seen_in_its_place(tmp_path: Path, shape: tuple[int, int], overlap: int) -> None:
    """Narrower than a tile in one direction, one pixel more or less than a tile, overlaps of a half and nearly all."""
    pixels = np.random.default_rng(2).integers(1, 255, shape).astype(np.uint8)
    index = load_coco(write(tmp_path, [np.repeat(pixels[..., None], 3, 2)], [[]]))
    dataset = DetectionDataset(index, dataclasses.replace(TILES, tile_overlap=overlap), train=False)
    seen = np.zeros(shape, dtype=int)
    for item in dataset.items_of(0):
        image, target = dataset[item]
        x, y = target.origin_xy
        shown = pixels_of(image, dataset)
        height, width = min(40, shape[0] - y), min(40, shape[1] - x)
        np.testing.assert_array_equal(shown[:height, :width], pixels[y : y + height, x : x + width])
        assert shown[height:].sum() == shown[:, width:].sum() == 0, "black beyond the image"
        seen[y : y + height, x : x + width] += 1
    assert seen.min() >= 1
    # Training moves tiles, but never beyond the image.
    moving = DetectionDataset(index, dataclasses.replace(TILES, tile_overlap=overlap, empty_tiles=99), train=True)
    for item in range(min(len(moving), 20)):
        x, y = moving[item][1].origin_xy
        assert 0 <= y <= max(shape[0] - 40, 0) and 0 <= x <= max(shape[1] - 40, 0)


def test_the_share_that_is_kept_is_that_of_the_whole_box(tmp_path: Path) -> None:
    """A box larger than a tile is never an object where too little of it can be seen; crowds are cut like objects."""
    objects = [
        {"bbox": [0, 0, 80, 50], "category_id": 1},  # a tile shows 1600 of 4000 at most: 0.4
        {"bbox": [30, 60, 20, 20], "category_id": 2, "iscrowd": 1},
    ]
    index = load_coco(write(tmp_path, [np.zeros((80, 80, 3), dtype=np.uint8)], [objects]))
    for keep, num_targets in ((0.4, 2), (0.41, 0)):
        data = dataclasses.replace(TILES, tile_overlap=0, tile_keep=keep)
        targets = [target for _, target in DetectionDataset(index, data, train=False)]
        assert sum(len(target.labels) for target in targets) == num_targets
        # The crowd has a part in both lower tiles.
        crowds = [target.ignored_boxes_cxcywh[target.ignored_labels == 1] for target in targets]
        assert [len(boxes) for boxes in crowds] == [0, 0, 1, 1]
        np.testing.assert_allclose(corners(targets[2], crowds[2])[0], [30, 20, 40, 40], atol=1e-4)
        assert sum(len(target.ignored_labels) for target in targets) == 2 + 4 - num_targets


def test_whole_images_are_there_besides_the_tiles(index) -> None:
    dataset = DetectionDataset(index, TILES, train=False)
    plain = DetectionDataset(index, dataclasses.replace(TILES, tile_size=0), train=False)
    for image, record in enumerate(index.records):
        item = WholeImage(image)
        (pixels, target), (expected, wanted) = dataset[item], plain[image]
        assert torch.equal(pixels, expected) and torch.equal(target.boxes_cxcywh, wanted.boxes_cxcywh)
        assert target.original_hw == (record.height, record.width) and target.origin_xy == (0, 0)
        assert dataset.objects_of(item) == plain.objects_of(image) == len(record.labels)
    assert len(list(dataset)) == len(dataset), "no item of their own"
    # Centres within [left, left + 40) count; none is counted nowhere.
    first = sum(dataset.objects_of(item) for item in dataset.items_of(0))
    assert first >= len(index.records[0].labels)


# --- balance ---


def long_tail(folder: Path) -> Any:
    """16 images of 40 x 40 with class a; the first shows class b too; the last image is empty."""
    boxes = [[[2, 2, 6, 6]] + ([[20, 20, 8, 8]] if number == 0 else []) for number in range(16)] + [[]]
    objects = [[{"bbox": box, "category_id": 1 + place} for place, box in enumerate(one)] for one in boxes]
    return load_coco(write(folder, [coloured((40, 40), one) for one in boxes], objects))


@pytest.mark.parametrize("tile_size", [0, 40])
def test_rare_classes_come_more_often(tmp_path: Path, tile_size: int) -> None:
    index = long_tail(tmp_path)
    changes = {"tile_size": tile_size, "horizontal_flip": 0.5, "color_jitter": 0.5, "empty_tiles": 0.05}
    plain = DetectionDataset(index, dataclasses.replace(TILES, **changes), train=True, seed=3)
    dataset = DetectionDataset(index, dataclasses.replace(TILES, balance=1.0, **changes), train=True, seed=3)
    # f(b) is 1 of 17 images, or 1 of 16 tiles with objects; a is shown by 16 of 17 images.
    items = 17 if tile_size == 0 else 16
    assert len(plain) == 17
    assert dataset.repeats is not None and plain.repeats is None
    np.testing.assert_allclose(dataset.repeats.classes, [np.sqrt(items / 16), np.sqrt(items)])
    shares, varied = [], False
    for epoch in range(4):
        dataset.set_epoch(epoch)
        shown = [dataset[item] for item in range(len(dataset))]
        first = [pixels for pixels, target in shown if target.image_id == 1]
        assert len(first) in (4, 5)
        varied |= not all(torch.equal(first[0], other) for other in first[1:])
        assert {target.image_id for _, target in shown} >= set(range(1, 17)), "nobody is left out for it"
        seeds = [target.noise_seed for _, target in shown]
        assert len(set(seeds)) == len(seeds)
        labels = torch.cat([target.labels for _, target in shown])
        shares.append(float((labels == 1).double().mean()))
    assert varied, "each repetition is augmented by itself"
    # Without balance 1 of 17 objects is of class b; with it 4 of about 20.
    assert np.mean(shares) == pytest.approx(4 / 20, abs=0.03)
    # A training that goes on within the last epoch sees what is left of it.
    again = DetectionDataset(index, dataset.data, train=True, seed=3)
    again.set_epoch(3)
    order = epoch_order(len(dataset), 3, 3)
    rest = [epoch_order(len(again), 3, 3, rank, 2, num_done=6) for rank in (0, 1)]
    for place, item in enumerate(order[6:]):
        other = again[rest[place % 2][place // 2]]
        assert torch.equal(shown[item][0], other[0]) and shown[item][1].noise_seed == other[1].noise_seed
    assert DetectionDataset(index, dataset.data, train=False).repeats is None, "for training only"


@pytest.mark.parametrize("tile_size", [0, 40])
def test_without_balance_and_with_nothing_rare_an_epoch_is_the_same(index, tile_size: int) -> None:
    changes = {"tile_size": tile_size, "color_jitter": 0.5}
    one = DetectionDataset(index, dataclasses.replace(TILES, balance=0.0, **changes), train=True, seed=1)
    other = DetectionDataset(index, dataclasses.replace(TILES, balance=1e-6, **changes), train=True, seed=1)
    assert len(one) == len(other)
    for item in range(len(one)):
        if one[item][1].labels.numel():  # which tiles without objects come is drawn after the repetitions
            assert torch.equal(one[item][0], other[item][0])


def test_evaluation_ignores_balance_and_impossible_values_are_refused(index) -> None:
    for value in (-0.1, 1.5):
        with pytest.raises(InputError, match=r"data.balance = .* must lie between 0"):
            DetectionDataset(index, dataclasses.replace(TILES, balance=value))
