"""Tiles cover an image, and what they find is put together again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crossdino.errors import InputError
from crossdino.merging import at_seam, merge_detections, merge_tiles
from crossdino.tiling import Tile, tile_grid, tile_starts


@pytest.mark.parametrize("size", [1, 7, 32, 100])
def test_tiles_cover_the_side_evenly(size: int) -> None:
    for overlap in {0, size // 4, size - 1}:
        for length in (1, size - 1, size, size + 1, 2 * size - overlap, 2 * size - overlap + 1, 5 * size + 3):
            if length < 1:
                continue
            starts = tile_starts(length, size, overlap)
            covered = np.zeros(max(length, size), dtype=int)
            for start in starts:
                covered[start : start + size] += 1
            assert covered.min() >= 1 and starts[0] == 0
            assert starts[-1] == max(length - size, 0), "the last tile ends with the image"
            steps = np.diff(starts)
            assert (steps <= size - overlap).all() and (steps >= 1).all()
            assert len(steps) == 0 or steps.max() - steps.min() <= 1, "a thin leftover"
            # One tile fewer could not cover the side with that overlap.
            assert len(starts) == 1 or (len(starts) - 1) * (size - overlap) + overlap < length


def test_grid_is_row_by_row_and_impossible_overlaps_are_refused() -> None:
    assert tile_grid((50, 90), 50, 10) == [Tile(0, 0, 50, 50), Tile(0, 40, 50, 50)]
    assert tile_grid((20, 30), 50, 10) == [Tile(0, 0, 50, 50)]  # reaches beyond the small image
    for size, overlap in ((50, 50), (50, -1), (0, 0)):
        with pytest.raises(InputError, match=f"tiles of {size} px cannot overlap by {overlap} px"):
            tile_starts(100, size, overlap)


def test_only_inner_borders_are_seams() -> None:
    boxes = torch.tensor([[0.0, 10, 5, 20], [10, 10, 20, 20], [94, 10, 99.5, 20], [10, 95, 20, 100]])
    first, last = Tile(0, 0, 100, 100), Tile(0, 100, 100, 100)
    assert at_seam(boxes, first, (100, 200)).tolist() == [False, False, True, False]
    assert at_seam(boxes + torch.tensor([100.0, 0, 100, 0]), last, (100, 200)).tolist() == [True, False, False, False]
    assert at_seam(boxes, first, (300, 200)).tolist() == [False, False, True, True]


def naive_merge(boxes: list, scores: list, labels: list, cut: list, iou: float) -> list[int]:
    """The rule, spelled out."""

    def inter(a: list, b: list) -> float:
        return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))

    def area(a: list) -> float:
        return (a[2] - a[0]) * (a[3] - a[1])

    left = []
    for i, box in enumerate(boxes):
        covered = any(
            not cut[j]
            and labels[j] == labels[i]
            and scores[j] >= 0.5 * scores[i]
            and inter(box, boxes[j]) / area(box) > iou
            for j in range(len(boxes))
        )
        if not (cut[i] and covered):
            left.append(i)
    kept: list[int] = []
    for i in sorted(left, key=lambda i: -scores[i]):
        if all(
            labels[i] != labels[j]
            or inter(boxes[i], boxes[j]) / (area(boxes[i]) + area(boxes[j]) - inter(boxes[i], boxes[j])) <= iou
            for j in kept
        ):
            kept.append(i)
    return kept


def test_merging_follows_the_rule_spelled_out() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        corners = rng.uniform(0, 60, (60, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(2, 25, (60, 2))], 1).astype(np.float32)
        scores = rng.permutation(np.linspace(0.01, 0.99, 60)).astype(np.float32)
        labels, cut = rng.integers(0, 3, 60), rng.random(60) < 0.3
        found = merge_tiles(*(torch.from_numpy(x) for x in (boxes, scores, labels, cut)), iou=0.5)
        assert found.tolist() == naive_merge(boxes.tolist(), scores.tolist(), labels.tolist(), cut.tolist(), 0.5)


def test_objects_on_seams_come_out_once_and_neighbours_stay_two() -> None:
    """Every tile reports the visible part of each object, as a perfect detector would."""
    hw, size, overlap = (300, 500), 128, 40
    tiles = tile_grid(hw, size, overlap)
    truth = []
    for y in range(6, 290, 24):
        for x in range(5, 470, 24):
            truth += [[x, y, x + 10, y + 10], [x + 10.5, y, x + 20.5, y + 10]]  # two neighbours, half a pixel apart
    parts = []
    for tile in tiles:
        boxes = torch.tensor(truth) - torch.tensor([tile.left, tile.top] * 2)
        visible = boxes.clamp(0, size)
        seen = (visible[:, 2:] - visible[:, :2]).min(1).values > 2
        whole = (visible == boxes).all(1)
        scores = torch.where(whole, 0.9, 0.7)[seen]
        parts.append((visible[seen], scores, torch.zeros(len(scores), dtype=torch.int64)))
    boxes, scores, labels = merge_detections(parts, tiles, hw, 0.5)
    assert sorted(boxes.tolist()) == sorted(torch.tensor(truth).tolist())
    assert (scores == scores.sort(descending=True).values).all() and len(labels) == len(boxes)


def test_nothing_found_and_tiles_beyond_the_image() -> None:
    empty = (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    tiles = tile_grid((50, 90), 50, 10)
    assert [len(x) for x in merge_detections([empty, empty], tiles, (50, 90), 0.5)] == [0, 0, 0]
    beyond = (torch.tensor([[30.0, 10, 60, 20]]), torch.tensor([0.5]), torch.tensor([1]))
    boxes, _, _ = merge_detections([beyond], [Tile(0, 0, 64, 64)], (50, 40), 0.5)
    assert boxes.tolist() == [[30.0, 10.0, 40.0, 20.0]]
