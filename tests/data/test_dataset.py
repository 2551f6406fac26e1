"""Dataset, loader and batches on small painted images."""

from __future__ import annotations

import dataclasses
import json
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossdino.config import DataConfig
from crossdino.data.coco import load_coco
from crossdino.data.dataset import DetectionDataset, build_loader, collate
from crossdino.data.images import ImageError
from crossdino.errors import InputError
from crossdino.structures import Batch, Target

CONFIG = DataConfig(
    train_short_sides=(32, 40, 48),
    train_long_side=80,
    crop_short_sides=(40, 48),
    crop_range=(16, 32),
    test_short_side=24,
    test_long_side=64,
    vertical_flip=0.5,
    quarter_turns=True,
    color_jitter=0.2,
    num_workers=0,
)
MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    """Seven noise images of various sizes with two boxes and one crowd each, the last one without anything."""
    generator = np.random.default_rng(0)
    images, boxes = [], []
    for number in range(1, 8):
        width, height = (int(side) for side in generator.integers(30, 60, 2))
        pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        images.append({"id": 10 * number, "file_name": f"{number}.png", "width": width, "height": height})
        for crowd in (0, 0, 1) if number < 7 else ():
            x, y = generator.uniform(0, 10, 2).tolist()
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": 10 * number,
                    "category_id": 4 + crowd,
                    "bbox": [x, y, 10.5, 12.25],
                    "iscrowd": crowd,
                }
            )
    categories = [{"id": 5, "name": "b"}, {"id": 4, "name": "a"}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return path


def build(path: Path, train: bool, **changes: object) -> DetectionDataset:
    return DetectionDataset(load_coco(path), dataclasses.replace(CONFIG, **changes), MEAN, STD, train=train, seed=3)


def equal(first: Batch, second: Batch) -> bool:
    return (
        torch.equal(first.images, second.images)
        and torch.equal(first.padding_mask, second.padding_mask)
        and all(
            torch.equal(a.boxes_cxcywh, b.boxes_cxcywh) and torch.equal(a.labels, b.labels) and a.image_id == b.image_id
            for a, b in zip(first.targets, second.targets, strict=True)
        )
    )


def test_test_item_by_hand(tmp_path: Path) -> None:
    """An image of twice the test size in one colour; values and boxes worked out by hand."""
    Image.new("RGB", (128, 48), (255, 0, 51)).save(tmp_path / "a.png")
    document = {
        "images": [{"id": 42, "file_name": "a.png", "width": 128, "height": 48}],
        "categories": [{"id": 1, "name": "c"}],
        "annotations": [
            {"id": 1, "image_id": 42, "category_id": 1, "bbox": [32, 12, 16, 24]},
            {"id": 2, "image_id": 42, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        ],
    }
    (tmp_path / "x.json").write_text(json.dumps(document))
    image, target = build(tmp_path / "x.json", train=False)[0]
    assert image.shape == (3, 24, 64) and image.dtype == torch.float32
    expected = [(1 - 0.1) / 0.5, -0.2 / 0.6, (0.2 - 0.3) / 0.7]
    for channel, value in enumerate(expected):
        torch.testing.assert_close(image[channel], torch.full((24, 64), value), rtol=0, atol=1e-6)  # float32
    assert target.boxes_cxcywh.tolist() == [[40 / 128, 24 / 48, 16 / 128, 24 / 48]]  # the crowd is no target
    assert target.boxes_cxcywh.dtype == torch.float32 and target.labels.dtype == torch.int64
    assert target.labels.tolist() == [0] and target.image_id == 42 and target.original_hw == (48, 128)


def test_image_without_objects(annotations: Path) -> None:
    for train in (False, True):
        target = build(annotations, train)[6][1]
        assert target.boxes_cxcywh.shape == (0, 4) and target.labels.shape == (0,)
        assert target.boxes_cxcywh.dtype == torch.float32 and target.labels.dtype == torch.int64


def test_training_targets_are_valid(annotations: Path) -> None:
    dataset = build(annotations, train=True)
    for epoch in range(6):
        dataset.set_epoch(epoch)
        for image, target in (dataset[place] for place in range(7)):
            assert image.is_contiguous() and image.isfinite().all()
            center, size = target.boxes_cxcywh[:, :2], target.boxes_cxcywh[:, 2:]
            assert (size > 0).all()
            assert (center - size / 2 > -1e-6).all() and (center + size / 2 < 1 + 1e-6).all()  # float32 rounding
            assert (target.labels == 0).all()  # label 1 has crowds only


def test_epochs_differ_and_repeat(annotations: Path) -> None:
    dataset = build(annotations, train=True)
    dataset.set_epoch(1)
    first = [dataset[place][0] for place in range(7)]
    dataset.set_epoch(2)
    second = [dataset[place][0] for place in range(7)]
    dataset.set_epoch(1)
    again = [dataset[place][0] for place in reversed(range(7))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_workers_do_not_change_anything(annotations: Path) -> None:
    plain, parallel = build(annotations, train=True), build(annotations, train=True, num_workers=2)
    order = [3, 0, 6, 5, 1, 2, 4]
    for epoch in (0, 1):
        plain.set_epoch(epoch)
        parallel.set_epoch(epoch)
        batches = [list(build_loader(dataset, 3, order=order)) for dataset in (plain, parallel)]
        assert [len(batch.targets) for batch in batches[0]] == [3, 3, 1]
        assert all(equal(a, b) for a, b in zip(*batches, strict=True))
        loaded = [target.image_id for batch in batches[0] for target in batch.targets]
        assert loaded == [10 * (place + 1) for place in order]


def test_evaluation_keeps_the_order(annotations: Path) -> None:
    loader = build_loader(build(annotations, train=False), 4)
    assert [target.image_id for batch in loader for target in batch.targets] == [10, 20, 30, 40, 50, 60, 70]


def test_collate() -> None:
    items = []
    for place, hw in enumerate([(5, 9), (7, 4), (7, 9)]):
        items.append((torch.full((3, *hw), place + 1.0), Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))))
    batch = collate(items)
    assert batch.images.shape == (3, 3, 7, 9) and batch.padding_mask.shape == (3, 7, 9)
    for place, (height, width) in enumerate([(5, 9), (7, 4), (7, 9)]):
        for row in range(7):
            for column in range(9):
                inside = row < height and column < width
                assert bool(batch.padding_mask[place, row, column]) is not inside
                assert batch.images[place, :, row, column].tolist() == [(place + 1.0) * inside] * 3
    assert not collate(items[:1]).padding_mask.any()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_image_is_one_line(annotations: Path, num_workers: int) -> None:
    dataset = build(annotations, train=True, num_workers=num_workers)
    broken = annotations.parent / "4.png"
    data = broken.read_bytes()
    broken.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError) as caught:
        list(build_loader(dataset, 2))
    traceback.clear_frames(caught.tb)  # ends the workers now; left to the garbage collector that takes 10 s
    message = str(caught.value)
    assert message.startswith(f"image {broken} is broken") and "\n" not in message


def test_changed_image_is_noticed(annotations: Path) -> None:
    dataset = build(annotations, train=False)
    Image.new("RGB", (9, 9)).save(annotations.parent / "1.png")
    with pytest.raises(ImageError, match="was changed after the start"):
        dataset[0]


def test_boxes_on_stored_pixels(tmp_path: Path) -> None:
    """An EXIF-turned photograph whose boxes were drawn on the stored pixels is read unturned."""
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    for size, expected in (((32, 16), (24, 48)), ((16, 32), (48, 24))):
        image = {"id": 1, "file_name": "a.png", "width": size[0], "height": size[1]}
        document = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "c"}]}
        (tmp_path / "x.json").write_text(json.dumps(document))
        tensor, target = build(tmp_path / "x.json", train=False)[0]
        assert tuple(tensor.shape[1:]) == expected
        assert target.original_hw == (size[1], size[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"train_short_sides": ()},
        {"crop_range": (30, 20)},
        {"horizontal_flip": 1.5},
        {"vertical_flip": -0.1},
        {"color_jitter": 2.0},
        {"num_workers": -1},
        {"train_short_sides": (0,)},
        {"test_short_side": 0},
    ],
)
def test_senseless_settings(annotations: Path, changes: dict[str, object]) -> None:
    with pytest.raises(InputError, match="setting data"):
        build(annotations, train=True, **changes)
