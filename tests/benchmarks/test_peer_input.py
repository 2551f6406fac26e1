"""The measurement of the training input: its data, its plain pipelines, and the command itself."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import input_pipeline
from benchmarks.interleaved import Case, Measurement
from crossdino.config import DataConfig
from crossdino.data import load_dataset


@pytest.mark.parametrize("decoder", ["pillow", "torchvision"])
def test_a_plain_pipeline_shows_each_tile_with_its_objects(tmp_path: Path, decoder: str) -> None:
    index = load_dataset(input_pipeline.write_large_images(tmp_path, ".jpg", (900, 600), 1), "train")
    data = DataConfig(tile_size=300, tile_overlap=0, train_short_sides=(150,), horizontal_flip=0.0)
    dataset = input_pipeline.PlainDataset(index, data, decoder)
    assert len(dataset) == 6
    items = [dataset[item] for item in range(6)]
    # Without overlap an object's centre lies in one tile.
    assert sum(len(target.labels) for _, target in items) == index.num_objects == 900 * 600 // 10_000
    for image, _ in items:
        assert image.shape == (3, 150, 150) and image.dtype == torch.float32
    x, y, width, height = index.records[0].boxes_xywh[0]
    column, row = int((x + width / 2) // 300), int((y + height / 2) // 300)
    boxes = items[3 * row + column][1].boxes_cxcywh
    # In the tile and at half the size; where the object is cut by the tile's border its near corner still is.
    expected = torch.tensor([max(x - 300 * column, 0) / 2, max(y - 300 * row, 0) / 2]).float()
    assert (boxes[:, :2] - expected).abs().amax(dim=1).min() < 0.01


def in_this_process(cases: Sequence[Case], repetitions: int, *, warmup: int) -> dict[str, Measurement]:
    """As `interleave`, which has tests of its own, without processes that all import torch."""
    assert (repetitions, warmup) == (1, 0)
    measured = {}
    for case in cases:
        assert case.target == "benchmarks.input_pipeline:loading"
        numbers = input_pipeline.loading(**case.arguments)()
        measured[case.name] = Measurement([numbers.pop("seconds")], None, None, numbers)
    return measured


def test_the_command_counts_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_pipeline, "interleave", in_this_process)
    path = tmp_path / "input.csv"
    input_pipeline.main(["--quick", "--csv", str(path)])
    rows = list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))
    assert [row["way"] for row in rows] == ["ours", "pillow"]
    for row in rows:
        # Two batches of two; the first of three is waited for.
        assert float(row["images/s"]) * float(row["s"]) == pytest.approx(4, rel=1e-3)
