"""What was found in tiles survives the death of the process, and is used for the very same picture only."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crossdino.errors import InputError
from crossdino.results import TileStore
from crossdino.sources import Picture, Source, open_pictures
from tests.stand_in import save_image

Triple = tuple[Tensor, Tensor, Tensor]


def triple(count: int, seed: int) -> Triple:
    rng = np.random.default_rng(seed)
    boxes, scores = rng.uniform(0, 4000, (count, 4)), rng.uniform(0, 1, count)
    labels = torch.from_numpy(rng.integers(0, 2**40, count))
    return torch.tensor(boxes, dtype=torch.float32), torch.tensor(scores, dtype=torch.float32), labels


def same(one: Triple, other: Triple) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def picture(tmp_path: Path) -> Picture:
    path = save_image(tmp_path / "a.png", 0)
    return next(open_pictures(Source("a.png", str(path), "image")))


def test_tiles_come_back_bit_for_bit_and_a_torn_end_is_cut_off(picture: Picture, tmp_path: Path) -> None:
    folder = tmp_path / "unfinished"
    found = {0: triple(3, 0), 7: triple(0, 1), -1: triple(200, 2), 3: triple(1, 3)}
    store = TileStore(folder, least_tiles=2)
    assert store.load(picture, 9) == {}
    for number, detections in found.items():
        store.save(picture, 9, number, detections)
    (path,) = folder.iterdir()  # not closed: as after a kill
    whole = path.read_bytes()
    for keep in range(len(whole) - 40, len(whole) + 1):
        path.write_bytes(whole[:keep])
        left = TileStore(folder, least_tiles=2).load(picture, 9)
        expected = found if keep == len(whole) else {number: found[number] for number in (0, 7, -1)}
        assert left.keys() == expected.keys() and all(same(left[number], found[number]) for number in left)
    path.write_bytes(whole + bytes(100))
    assert list(TileStore(folder, least_tiles=2).load(picture, 9)) == list(found)
    path.write_bytes(whole[:-3])
    again = TileStore(folder, least_tiles=2)
    again.load(picture, 9)
    again.save(picture, 9, 5, triple(4, 4))  # behind the cut, not behind the torn record
    again.close()
    left = TileStore(folder, least_tiles=2).load(picture, 9)
    assert list(left) == [0, 7, -1, 5] and same(left[5], triple(4, 4))
    path.write_bytes(whole[:-8] + bytes(8) + bytes(100))  # as a file system may leave it after a loss of power
    assert list(TileStore(folder, least_tiles=2).load(picture, 9)) == [0, 7, -1]
    again.forget(picture)
    assert list(folder.iterdir()) == []
    again.forget(picture)  # of a picture that was never kept
    store.close()


def test_another_picture_is_not_taken_for_it(picture: Picture, tmp_path: Path) -> None:
    def fill() -> None:
        store = TileStore(tmp_path / "unfinished", least_tiles=2)
        store.load(picture, 9)
        store.save(picture, 9, 1, triple(2, 0))
        store.close()

    def left(num_tiles: int = 9, name: str = "a.png") -> list[int]:
        source = Source(name, picture.source.path, "image")
        return list(TileStore(tmp_path / "unfinished", least_tiles=2).load(next(open_pictures(source)), num_tiles))

    fill()
    assert left() == [1]
    assert left(name="b.png") == []
    assert left(num_tiles=10) == [] and left() == []  # and what was there is gone
    fill()
    os.utime(picture.source.path, ns=(1, 1))  # the file was changed
    assert left() == []


def test_few_tiles_are_not_kept_and_a_full_disk_is_told(picture: Picture, tmp_path: Path) -> None:
    store = TileStore(tmp_path / "unfinished")
    assert store.load(picture, 31) == {}
    store.save(picture, 31, 0, triple(1, 0))
    store.close()
    assert not (tmp_path / "unfinished").exists()
    store.load(picture, 32)
    (path,) = (tmp_path / "unfinished").iterdir()
    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(InputError, match="No space left.*same command"):
        store.save(picture, 32, 0, triple(1, 0))
    store.close()
