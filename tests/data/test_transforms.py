"""Geometry against painted pixels, sizes against DETR's rule, resizing against Pillow."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from crossdino.data.transforms import (
    Sample,
    crop,
    flip_horizontally,
    flip_vertically,
    normalize,
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
    labels = torch.arange(len(boxes))
    return Sample(image, box_tensor, labels, labels % 3 == 1), masks


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
    assert moved.ignored.tolist() == [label % 3 == 1 for label in expected_labels]
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
        moved = move(sample)
        assert moved.boxes_xyxy.shape == (0, 4) and moved.labels.shape == (0,)
        assert moved.ignored.shape == (0,) and moved.ignored.dtype == torch.bool


def test_nothing_is_ignored_unless_said() -> None:
    sample = Sample(torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4), torch.arange(3))
    assert sample.ignored.dtype == torch.bool and sample.ignored.tolist() == [False] * 3
    with pytest.raises(AssertionError):
        Sample(sample.image, sample.boxes_xyxy, sample.labels, torch.ones(2, dtype=torch.bool))


def test_cut_objects_become_ignored() -> None:
    """By hand, at keep = 0.4: of 10 x 10 objects are left 30, 40, 50 and 100 pixels; a region to ignore stays one."""
    boxes = [(10, 0, 20, 10), (9, 20, 19, 30), (8, 40, 18, 50), (0, 60, 10, 70), (12, 80, 22, 90), (13, 90, 23, 100)]
    box_tensor = torch.tensor(boxes, dtype=torch.float64)
    ignored = torch.tensor([False, False, False, False, True, False])
    sample = Sample(torch.zeros(3, 100, 40, dtype=torch.uint8), box_tensor, torch.tensor([5, 6, 7, 8, -1, 9]), ignored)
    cut = crop(sample, 0, 0, (100, 13), keep=0.4)  # the last object touches the cut only
    assert cut.labels.tolist() == [5, 6, 7, 8, -1]
    assert cut.ignored.tolist() == [True, False, False, False, True]
    assert cut.boxes_xyxy[0].tolist() == [10, 0, 13, 10]
    assert crop(sample, 0, 0, (100, 13)).ignored.tolist() == [False, False, False, False, True]
    assert not crop(sample, 0, 0, (100, 40), keep=1.0).ignored[:4].any()
    row = Sample(torch.zeros(3, 5, 20, dtype=torch.uint8), torch.tensor([[0.0, 0, 20, 5]]).double(), torch.tensor([0]))
    assert not crop(row, 0, 0, (5, 11), keep=0.55).ignored.any()  # 55 of 100; 0.55 * 100 is 55.00000000000001


def test_share_that_is_left_against_pixels() -> None:
    """Random cuts of random objects, at a random keep: exactly those become ignored that have too few pixels left."""
    generator = np.random.default_rng(4)
    for _ in range(200):
        top, left = generator.integers(0, 12, (2, 6))
        height, width = generator.integers(1, 12, (2, 6))
        boxes = np.stack([left, top, left + width, top + height], axis=1)
        sample, masks = painted((24, 24), boxes.tolist())
        y, x, side = (int(value) for value in generator.integers(1, 12, 3))
        keep = float(generator.uniform())
        cut = crop(sample, y, x, (side, side), keep)
        left_over = masks[:, y : y + side, x : x + side].astype(bool).sum((1, 2))
        seen = left_over > 0
        expected = (sample.ignored.numpy() | (left_over < keep * masks.astype(bool).sum((1, 2))))[seen]
        assert cut.labels.tolist() == np.flatnonzero(seen).tolist()
        assert cut.ignored.tolist() == expected.tolist()


def test_uncut_objects_survive_any_keep() -> None:
    """Boxes of fractions of a pixel, in both precisions."""
    generator = np.random.default_rng(0)
    corners = generator.uniform(20, 40, (500, 2))
    boxes = torch.from_numpy(np.concatenate([corners, corners + generator.uniform(0.01, 3, (500, 2))], axis=1))
    sample = Sample(torch.zeros(3, 60, 60, dtype=torch.uint8), boxes, torch.zeros(500, dtype=torch.int64))
    for kind, keep in ((torch.float64, 1.0), (torch.float32, 0.99)):
        kept = crop(Sample(sample.image, boxes.to(kind), sample.labels), 7, 9, (50, 50), keep)
        assert len(kept.labels) == 500 and not kept.ignored.any()


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
