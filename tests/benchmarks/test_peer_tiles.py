"""The comparison with SAHI: the image, the agreement, and the command itself."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import tiled_prediction
from crossdino.tiling import tile_grid


def test_the_image_is_the_same_in_every_run(tmp_path: Path) -> None:
    for name in ("one.jpg", "two.jpg"):
        tiled_prediction.write_image(tmp_path / name, (500, 300), patch_px=200)
    assert (tmp_path / "one.jpg").read_bytes() == (tmp_path / "two.jpg").read_bytes()
    with Image.open(tmp_path / "one.jpg") as image:
        assert image.size == (500, 300)
        assert np.ptp(np.asarray(image)) > 100  # a picture, not an empty canvas


def test_agreement_needs_class_and_overlap() -> None:
    found = {"boxes": [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]], "labels": [0, 0, 0, 1]}
    # The same; another class; an IoU of 1/3; an IoU of 9/11.
    others = {"boxes": [[0, 0, 10, 10], [20, 0, 30, 10], [45, 0, 55, 10], [61, 0, 71, 10]], "labels": [0, 1, 0, 1]}
    assert tiled_prediction.agreement(found, others) == 0.5
    nothing = {"boxes": [], "labels": []}
    assert tiled_prediction.agreement(found, nothing) == 0
    assert tiled_prediction.agreement(nothing, found) == 1


def test_the_command_runs_both_on_as_many_tiles(tmp_path: Path) -> None:
    path = tmp_path / "tiles.csv"
    tiled_prediction.main(["--quick", "--csv", str(path)])
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    times, objects = (
        [row for row in rows if row["table"].startswith(name)] for name in ("Tiled prediction", "Objects")
    )
    assert [row["way"] for row in times] == [row["way"] for row in objects]
    assert len(times) == 2 and times[0]["way"] == tiled_prediction.FIRST
    num_tiles = len(tile_grid((700, 900), tiled_prediction.TILE_PX, tiled_prediction.OVERLAP_PX))
    assert [int(row["tiles"]) for row in objects] == [num_tiles] * 2
    assert all(int(row["objects"]) > 10 for row in objects)
    # Their tiles lie at other places and they merge by other rules; most objects are found by both all the same.
    assert float(objects[1]["share of SAHI's"]) > 0.6
    assert float(times[1]["times SAHI"]) == pytest.approx(float(times[0]["s"]) / float(times[1]["s"]), rel=1e-3)
