"""`data.tile_size: auto`: what the chosen tiles do for the objects, and when there are none to choose."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from crossdino.config import Config, with_changes
from crossdino.data.dataset import DetectionDataset
from crossdino.data.index import DatasetIndex, ImageRecord, Problems
from crossdino.data.inspection import SplitObjects, network_sizes
from crossdino.data.tile_choice import auto_tiles, choose_overlap, with_tiles
from crossdino.errors import InputError

AUTO = with_changes(Config(), {"data.tile_size": "auto"})  # whole images become 800 x 1333 at most


def make_index(hw: tuple[int, int], sides: np.ndarray, num_images: int = 3) -> DatasetIndex:
    """Objects of these sides (n, 2) in every image, in its middle."""
    centre = np.array([hw[1], hw[0]]) / 2
    boxes = np.concatenate([centre - sides / 2, sides], 1)
    labels, crowd = np.zeros(len(sides), np.int64), np.zeros(len(sides), bool)
    records = [
        ImageRecord(number, Path(f"{number}.png"), hw[1], hw[0], boxes, labels, sides.prod(1), crowd)
        for number in range(num_images)
    ]
    return DatasetIndex(Path("x.json"), ("a",), (1,), tuple(records), Problems())


def squares(low: float, high: float, count: int = 200) -> np.ndarray:
    return np.repeat(np.geomspace(low, high, count)[:, None], 2, 1)


def test_small_objects_in_large_images_become_large_enough() -> None:
    index = make_index((3000, 4000), squares(8, 40))
    config, line = with_tiles(AUTO, index)
    data = config.data
    sizes = network_sizes(SplitObjects.of(index), data)
    # One token and two tokens of 8 px; whole images would give 8 * 0.27 = 2 px.
    assert np.percentile(sizes, 10) >= 8 and np.median(sizes) >= 16
    assert isinstance(data.tile_size, int) and 0 < data.tile_size < 1000
    assert np.percentile(squares(8, 40)[:, 0], 99) <= data.tile_overlap <= data.tile_size / 3
    assert f"{data.tile_size} px, overlapping by {data.tile_overlap} px" in line and "8 px" in line
    assert with_tiles(config, index) == (config, ""), "decided once"
    # Nothing but the tiles is changed.
    assert dataclasses.replace(data, tile_size="auto", tile_overlap=64) == AUTO.data


def test_images_of_very_different_sizes_are_judged_by_those_that_lack_something() -> None:
    """Half of the objects, in the one large image, have 0.5 px; enlarging the small ones does not help them."""
    large, small = make_index((8000, 8000), squares(5, 5, 10), 1), make_index((100, 100), squares(5, 5, 1), 10)
    config, line = with_tiles(AUTO, dataclasses.replace(large, records=(*large.records, *small.records)))
    assert 0 < config.data.tile_px < 1000, line
    assert 800 / config.data.tile_px * 5 >= 8, "a token for each"


@pytest.mark.parametrize(
    ("hw", "sides", "words"),
    [
        ((800, 1200), squares(30, 200), "whole images"),  # large enough
        ((480, 640), squares(4, 12), "whole images"),  # twice the file adds nothing
        ((800, 1333), squares(7, 26), "an input of .* px instead of 800 px is enough"),  # a little more would do
        ((3000, 4000), np.zeros((0, 2)), "no object"),
    ],
)
def test_whole_images_where_they_are_good_enough(hw: tuple[int, int], sides: np.ndarray, words: str) -> None:
    config, line = with_tiles(AUTO, make_index(hw, sides))
    assert config.data.tile_size == 0 and config.data.tile_overlap == AUTO.data.tile_overlap
    assert re.search(words, line), line


def test_tiles_hold_the_usual_object() -> None:
    sides = np.concatenate([squares(8, 20), squares(390, 400, 30)])  # 13 % are large
    data = with_tiles(AUTO, make_index((3000, 4000), sides))[0].data
    assert isinstance(data.tile_size, int) and data.tile_size >= 2 * np.percentile(sides, 95)


def test_a_fixed_size_stays() -> None:
    config = with_changes(AUTO, {"data.tile_size": 0})
    assert with_tiles(config, make_index((3000, 4000), squares(8, 40))) == (config, "")


def test_overlap_is_nearly_the_longest_object_and_at_most_a_third() -> None:
    longest = np.r_[np.full(995, 50.0), np.full(5, 900.0)]
    assert choose_overlap(longest, 600)[0] == 64  # 50 rounded up to sixteens, the few largest left out
    assert choose_overlap(np.full(10, 500.0), 600)[0] == 200
    assert choose_overlap(np.full(10, 3.0), 600)[0] == 32
    assert choose_overlap(np.zeros(0), 90)[0] == 30
    for size in range(1, 70):
        assert 0 <= choose_overlap(longest, size)[0] < size


def test_tiles_for_prediction_show_objects_as_large_as_in_training() -> None:
    # Whole images of 3000 x 4000 are shown at 800 x 1066, which is 0.267 times; a tile is shown at 800 px.
    index = make_index((3000, 4000), squares(60, 400))
    data = with_changes(Config(), {}).data
    size, overlap = auto_tiles(index, data)
    assert 800 / size == pytest.approx(np.sqrt(800 * 1066 / 12e6), rel=1e-3)
    assert np.percentile(squares(60, 400)[:, 0], 99) <= overlap <= size / 3
    # With a limit of the long side the scale follows that.
    wide = auto_tiles(make_index((1000, 4000), squares(60, 400)), data)[0]
    assert 800 / wide == pytest.approx(1333 / 4000, rel=1e-2)
    # A training on tiles: its own.
    tiled = dataclasses.replace(data, tile_size=512, tile_overlap=100)
    assert auto_tiles(index, tiled) == (512, 100)
    assert auto_tiles(make_index((50, 60), np.zeros((0, 2))), data)[0] == 50


def test_auto_is_no_size() -> None:
    with pytest.raises(InputError, match=r"data.tile_size = auto must be decided"):
        DetectionDataset(make_index((50, 60), squares(3, 4)), AUTO.data)
    with pytest.raises(InputError, match="tile_size"):
        with_changes(Config(), {"data.tile_size": "automatic"})
    assert with_changes(Config(), {"data.tile_size": "384"}).data.tile_size == 384
