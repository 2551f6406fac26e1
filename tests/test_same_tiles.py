"""One geometry: training's validation, `evaluate`, `predict` and `crossdino tile` look at the very same tiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crossdino.checkpoints import load_model
from crossdino.cli import main
from crossdino.config import Config, InferenceConfig, with_changes
from crossdino.data import load_coco
from crossdino.postprocessing import detections_to_coco
from crossdino.predictor import Predictor
from crossdino.tiling import LARGEST_TILE_PX, choose_tiles
from crossdino.training import train

# One tile, narrower than a tile in one direction, smaller than a tile, one pixel more than a tile, several.
SIZES = ((40, 40), (30, 90), (21, 17), (41, 81), (100, 130))

Walk = list[tuple[tuple[int, int], list[tuple[int, int, int, int]]]]


@pytest.fixture
def odd_data(tmp_path: Path) -> Path:
    """Images of all kinds of sizes, each with some objects."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "odd"
    folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (height, width) in enumerate(SIZES, start=1):
        Image.fromarray(rng.integers(0, 255, (height, width, 3)).astype(np.uint8)).save(folder / f"{number}.png")
        images.append({"id": 10 * number, "file_name": f"{number}.png", "width": width, "height": height})
        for _ in range(3):
            box = [int(rng.integers(0, width - 8)), int(rng.integers(0, height - 8)), 8, 8]
            category = int(rng.choice([3, 7]))
            entry = {"id": len(annotations) + 1, "image_id": 10 * number, "category_id": category, "bbox": box}
            annotations.append({**entry, "area": 64, "iscrowd": 0})
    categories = [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}]
    path = folder / "odd.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def test_all_four_walk_over_the_same_tiles(
    tiny_config: Config, odd_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: dict[str, Walk] = {"training": [], "evaluate": [], "predict": []}
    now = "training"

    def spy(module: str) -> None:
        from crossdino.merging import merge_detections

        def merge(parts: Any, tiles: Any, hw: Any, *rest: Any) -> Any:
            walks[now].append((tuple(hw), [(tile.top, tile.left, tile.height, tile.width) for tile in tiles]))
            return merge_detections(parts, tiles, hw, *rest)

        monkeypatch.setattr(f"crossdino.{module}.merge_detections", merge)

    spy("training.evaluation")
    spy("predictor")
    changes = {
        "data.val_annotations": str(odd_data),
        "data.tile_size": 40,
        "data.tile_overlap": 13,
        "data.train_short_sides": [40],
        "data.test_short_side": 40,
        "evaluation.num_select": 15,
        "evaluation.full_image": True,
        "training.epochs": 1,
    }
    result = train(with_changes(tiny_config, changes))
    now, numbers, found = "evaluate", tmp_path / "numbers.json", tmp_path / "found.json"
    words = ["evaluate", "--ground-truth", odd_data, "--weights", result.weights, "--device", "cpu"]
    assert main([*map(str, words), "--json", str(numbers), "--predictions-out", str(found)]) == 0
    now, index = "predict", load_coco(odd_data)
    predictor = Predictor(load_model(result.weights))
    detections = predictor([str(record.path) for record in index.records])
    words = ["tile", odd_data, "--output", tmp_path / "cut", "--tile-size", 40, "--tile-overlap", 13, "--workers", 1]
    assert main([*map(str, words)]) == 0
    images = json.loads((tmp_path / "cut" / "odd.json").read_text())["images"]
    cut: Walk = []
    for record in index.records:
        mine = [image for image in images if image["source_id"] == record.image_id]
        tiles = [(*reversed(image["origin_xy"]), image["height"], image["width"]) for image in mine]
        cut.append(((record.height, record.width), tiles))
    assert walks["training"] == walks["evaluate"] == walks["predict"] == cut
    assert [len(tiles) for _, tiles in cut] == [1, 3, 1, 6, 20]
    # And what they find there is the same to the last digit.
    predicted = [
        item
        for record, one in zip(index.records, detections, strict=True)
        for item in detections_to_coco(one, record.image_id, index.category_ids)
    ]
    assert predicted == json.loads(found.read_text()) and len(predicted) > 100
    logged = json.loads((result.weights / "config.json").read_text())["metrics"]
    assert logged["ap"] == json.loads(numbers.read_text())["ap"]


def test_sizes_without_an_overlap_have_the_same_one_everywhere(odd_data: Path, tmp_path: Path) -> None:
    """The default of `crossdino tile` is what a prediction with that size would take."""
    for size in (20, 100, 300):
        words = ["tile", odd_data, "--output", tmp_path / str(size), "--tile-size", size, "--workers", 1]
        assert main([*map(str, words)]) == 0
        note = json.loads((tmp_path / str(size) / ".odd.cutting.json").read_text())
        assert (size, note["tile_overlap"]) == choose_tiles(InferenceConfig(), size)


def test_gigantic_tiles_are_one_line(odd_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a size in the wrong unit: no memory for it, and Pillow calls the file a bomb."""
    words = ["tile", str(odd_data), "--output", str(tmp_path / "out"), "--tile-size", str(LARGEST_TILE_PX + 1)]
    assert main(words) == 2
    assert "are too large: give at most" in capsys.readouterr().err and not (tmp_path / "out").exists()
