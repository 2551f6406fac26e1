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
from crossdino.data.dataset import DetectionDataset
from crossdino.errors import InputError
from crossdino.structures import Target

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
