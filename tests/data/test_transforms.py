"""Geometry against painted pixels, sizes against DETR's rule, resizing against Pillow."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from PIL import Image

from crossdino.config import DataConfig
from crossdino.data.transforms import (
    Sample,
    augment,
    crop,
    flip_horizontally,
    flip_vertically,
    normalize,
    random_crop,
    resize,
    resize_hw,
    resize_image,
    to_tensor,
    turn,
)


def painted(hw: tuple[int, int], boxes: list[tuple[int, int, int, int]]) -> tuple[Sample, np.ndarray]:
    """A sample whose boxes (x1, y1, x2, y2) are painted: object j has the value j + 1 in an image of its own."""
    masks = np.zeros((len(boxes), *hw), dtype=np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 255
    image = torch.zeros(3, *hw, dtype=torch.uint8)
    box_tensor = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)
    return Sample(image, box_tensor, torch.arange(len(boxes))), masks


def extent(mask: np.ndarray) -> list[int]:
    """The painted extent as x1, y1, x2, y2."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def apply_to_mask(mask: np.ndarray, sample: Sample, function) -> np.ndarray:
    """The mask moved by the same function, as the image of a sample without boxes."""
    empty = Sample(torch.from_numpy(mask.copy()).expand(3, -1, -1), sample.boxes_xyxy[:0], sample.labels[:0])
    return function(empty).image[0].numpy()


BOXES = [(0, 0, 3, 5), (4, 6, 11, 9), (12, 1, 20, 16), (7, 15, 8, 16)]
MOVES = {
    "horizontal": flip_horizontally,
    "vertical": flip_vertically,
    **{f"turn{k}": lambda sample, k=k: turn(sample, k) for k in range(-1, 5)},
    "crop": lambda sample: crop(sample, 3, 2, (9, 14)),
    "crop_corner": lambda sample: crop(sample, 0, 13, (16, 7)),
    "double": lambda sample: resize(sample, (32, 40)),
    "stretched": lambda sample: resize(sample, (16, 60)),
}


@pytest.mark.parametrize("name", list(MOVES))
def test_boxes_follow_the_pixels(name: str) -> None:
    move = MOVES[name]
    sample, masks = painted((16, 20), BOXES)
    moved = move(sample)
    expected_boxes, expected_labels = [], []
    for label, mask in enumerate(masks):
        image = apply_to_mask(mask, sample, move)
        image = image > 127  # a resized edge is a ramp; at whole factors its middle is the edge
        if image.any():
            expected_boxes.append(extent(image))
            expected_labels.append(label)
    assert moved.labels.tolist() == expected_labels
    np.testing.assert_allclose(moved.boxes_xyxy.numpy(), np.array(expected_boxes), atol=1e-9)  # float64 arithmetic


def test_directions_by_hand() -> None:
    """Fixes which way is which (images and boxes could be wrong alike in the test above)."""
    image = torch.zeros(3, 2, 3, dtype=torch.uint8)
    image[:, 0, 2] = 9  # top right
    sample = Sample(image, torch.tensor([[2.0, 0, 3, 1]], dtype=torch.float64), torch.tensor([0]))
    assert flip_horizontally(sample).image[0].tolist() == [[9, 0, 0], [0, 0, 0]]
    assert flip_vertically(sample).image[0].tolist() == [[0, 0, 0], [0, 0, 9]]
    assert turn(sample, 1).image[0].tolist() == [[9, 0], [0, 0], [0, 0]]  # counter-clockwise: to the top left
    assert turn(sample, 1).boxes_xyxy.tolist() == [[0, 0, 1, 1]]


def test_crop_keeps_fractions_and_drops_touching() -> None:
    boxes = torch.tensor([[1.25, 1.5, 4.75, 4.5], [0, 0, 2, 2], [6, 6, 9, 9], [1.9, 1.9, 2.1, 2.1]])
    sample = Sample(torch.zeros(3, 10, 10, dtype=torch.uint8), boxes.double(), torch.arange(4))
    cut = crop(sample, 2, 2, (4, 4))  # boxes 1 and 2 touch the rectangle only
    assert cut.labels.tolist() == [0, 3]
    np.testing.assert_allclose(
        cut.boxes_xyxy.numpy(), [[0, 0, 2.75, 2.5], [0, 0, 0.1, 0.1]], atol=1e-6
    )  # float32 input


def test_no_boxes_stay_no_boxes() -> None:
    sample, _ = painted((16, 20), [])
    for move in MOVES.values():
        assert move(sample).boxes_xyxy.shape == (0, 4)


def plain_rule(height: int, width: int, size: int, limit: int | None) -> tuple[int, int]:
    """The documented rule, in floating point and case by case."""
    if limit is not None and max(height, width) / min(height, width) * size > limit:
        size = max(1, round(limit * min(height, width) / max(height, width)))
    if width < height:
        return math.floor(size * height / width), size
    return size, math.floor(size * width / height)


def test_resize_rule() -> None:
    # By hand: 480/640 to 800 -> 1066.67, cut; 427/1280: 1333 binds, round(444.68) = 445, 445 * 1280 / 427 = 1333.96.
    assert resize_hw((480, 640), 800, 1333) == (800, 1066)
    assert resize_hw((640, 480), 800, 1333) == (1066, 800)
    assert resize_hw((427, 1280), 800, 1333) == (445, 1333)
    assert resize_hw((500, 500), 800, 1333) == (800, 800)
    assert resize_hw((400, 600), 400) == (400, 600)
    assert resize_hw((1, 5000), 800, 1333) == (1, 5000)  # cannot become thinner than one pixel
    generator = np.random.default_rng(0)
    for _ in range(3000):
        height, width = generator.integers(1, 5000, 2).tolist()
        size, limit = int(generator.integers(1, 1200)), int(generator.integers(1, 2000))
        assert resize_hw((height, width), size, limit) == plain_rule(height, width, size, limit)
        assert resize_hw((height, width), size) == plain_rule(height, width, size, None)


@pytest.mark.parametrize("hw", [(37, 61), (150, 90), (75, 120)])
def test_resize_equals_pillow(hw: tuple[int, int]) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (75, 120, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    ours = resize_image(to_tensor(image), hw).permute(1, 2, 0).numpy().astype(int)
    theirs = np.asarray(image.resize((hw[1], hw[0]), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(ours - theirs).max() <= 1  # both round in fixed point, the two passes in different places


def test_normalize() -> None:
    image = torch.tensor([0, 255, 51], dtype=torch.uint8).view(3, 1, 1)
    out = normalize(image, (0.5, 0.25, 0.2), (0.1, 0.5, 2.0))
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.view(-1).numpy(), [-5.0, 1.5, 0.0], atol=1e-6)  # float32 rounding


def test_random_crop_covers_its_range() -> None:
    sample, _ = painted((50, 40), [])
    generator = np.random.default_rng(0)
    sizes = {random_crop(sample, (20, 22), generator).hw for _ in range(200)}
    assert sizes == {(height, width) for height in (20, 21, 22) for width in (20, 21, 22)}
    assert {random_crop(sample, (60, 70), generator).hw for _ in range(5)} == {(50, 40)}  # image smaller than the crop
    assert {random_crop(sample, (40, 45), generator).hw[1] for _ in range(50)} == {40}


FIXED = DataConfig(
    train_short_sides=(32,),
    train_long_side=64,
    crop_short_sides=(),
    horizontal_flip=0.0,
    vertical_flip=0.0,
    quarter_turns=False,
)


def outcomes(config: DataConfig, count: int = 300) -> list[Sample]:
    sample, _ = painted((16, 20), [(0, 0, 3, 5)])
    return [augment(sample, config, np.random.default_rng(seed)) for seed in range(count)]


def test_augment_without_options_only_resizes() -> None:
    for sample in outcomes(FIXED, 5):
        assert sample.hw == (32, 40) and sample.boxes_xyxy.tolist() == [[0, 0, 6, 10]]


def test_augment_probabilities() -> None:
    """Each option changes what it should, as often as it should; 300 draws at p = 0.3 have a deviation of 8."""
    corner = [0, 0, 6, 10]
    flips = outcomes(dataclasses.replace(FIXED, horizontal_flip=0.3))
    assert {tuple(sample.boxes_xyxy[0].tolist()) for sample in flips} == {(0, 0, 6, 10), (34, 0, 40, 10)}
    assert 60 < sum(sample.boxes_xyxy[0].tolist() != corner for sample in flips) < 120
    flips = outcomes(dataclasses.replace(FIXED, vertical_flip=0.3))
    assert {tuple(sample.boxes_xyxy[0].tolist()) for sample in flips} == {(0, 0, 6, 10), (0, 22, 6, 32)}
    assert 60 < sum(sample.boxes_xyxy[0].tolist() != corner for sample in flips) < 120
    turns = outcomes(dataclasses.replace(FIXED, quarter_turns=True))
    corners = [tuple(sample.boxes_xyxy[0].tolist()) for sample in turns]
    assert set(corners) == {(0, 0, 6, 10), (0, 34, 10, 40), (34, 22, 40, 32), (22, 0, 32, 6)}
    assert all(45 < corners.count(value) < 105 for value in set(corners))  # 75 expected, deviation 7.5
    sides = outcomes(dataclasses.replace(FIXED, train_short_sides=(16, 24, 32)))
    assert {sample.hw for sample in sides} == {(16, 20), (24, 30), (32, 40)}


def test_augment_crop_branch() -> None:
    config = dataclasses.replace(FIXED, crop_short_sides=(16, 32), crop_range=(8, 12))
    samples = outcomes(config)
    uncropped = sum(sample.boxes_xyxy.tolist() == [[0, 0, 6, 10]] for sample in samples)
    assert 115 < uncropped < 185  # half of 300, deviation 8.7; a crop that keeps the box looks different
    lost = [sample for sample in samples if len(sample.labels) == 0]
    assert lost and all(sample.boxes_xyxy.shape == (0, 4) for sample in lost)
    for sample in samples:
        assert min(sample.hw) == 32 and max(sample.hw) <= 64
        assert sample.boxes_xyxy.min() >= 0 if len(sample.labels) else True


def test_jitter_changes_colour_only() -> None:
    pixels = torch.randint(0, 256, (3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sample = Sample(pixels, torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64), torch.tensor([0]))
    out = augment(sample, dataclasses.replace(FIXED, color_jitter=0.4), np.random.default_rng(1))
    assert out.image.dtype == torch.uint8 and not torch.equal(out.image, pixels)
    assert out.boxes_xyxy.tolist() == [[1, 2, 3, 4]]
    assert torch.equal(augment(sample, FIXED, np.random.default_rng(1)).image, pixels)
