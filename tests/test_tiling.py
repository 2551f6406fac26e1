"""Tiles cover an image, and what they find is put together again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crossdino.errors import InputError
from crossdino.merging import merge_detections
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


def test_small_and_narrow_images_and_large_overlaps() -> None:
    assert tile_grid((1, 1), 50, 10) == [Tile(0, 0, 50, 50)]
    assert tile_grid((30, 90), 50, 10) == [Tile(0, 0, 50, 50), Tile(0, 40, 50, 50)]  # narrower in one direction
    assert tile_grid((90, 30), 50, 10) == [Tile(0, 0, 50, 50), Tile(40, 0, 50, 50)]
    assert [tile_starts(length, 50, 10) for length in (49, 50, 51, 90, 91)] == [[0], [0], [0, 1], [0, 40], [0, 20, 41]]
    # An overlap of more than a half: every pixel but those near the border is in two tiles or more.
    starts = tile_starts(200, 50, 30)
    seen = np.zeros(200, dtype=int)
    for start in starts:
        seen[start : start + 50] += 1
    assert seen[20:180].min() >= 2


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
