"""The picture of a data set: it is drawn for any data, and shows what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from crossdino.config import Config, with_changes
from crossdino.data.index import DatasetIndex, ImageRecord, Problems
from crossdino.data.inspection import Inspection, inspect_dataset
from crossdino.visualization.inspection import draw_inspection


def make_data(sizes_px: list[list[float]], num_classes: int = 2) -> DatasetIndex:
    """Squares of these sizes in images of 480 x 640 pixels, in their upper left quarter."""
    rng = np.random.default_rng(0)
    records = []
    for number, sizes in enumerate(sizes_px):
        side = np.array(sizes, dtype=np.float64)
        corners = rng.uniform(0, 1, (len(side), 2)) * (320, 240)
        boxes = np.concatenate([corners, side[:, None], side[:, None]], axis=1).reshape(-1, 4)
        labels = np.arange(len(side)) % num_classes
        crowd = np.zeros(len(side), bool)
        records.append(ImageRecord(number, Path(f"{number}.jpg"), 640, 480, boxes, labels, side**2, crowd))
    names = tuple(f"class {number} with a name that is long" for number in range(num_classes))
    return DatasetIndex(Path("x.json"), names, tuple(range(num_classes)), tuple(records), Problems())


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    original = Figure.savefig

    def save(self: Figure, *arguments: object, **keywords: object) -> None:
        saved.append(self)
        original(self, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def test_the_panels_show_the_data(figures: list[Figure], tmp_path: Path) -> None:
    train, val = make_data([[4, 4, 12], [40], []]), make_data([[100, 120]])
    inspection = inspect_dataset({"train": train, "val": val}, duplicates=False)
    config = with_changes(Config(), {"data.test_short_side": 960, "data.test_long_side": 2000})
    draw_inspection(inspection, config, tmp_path / "picture.png")
    (figure,) = figures
    panels = figure.axes
    # Twice the file's pixels: 8, 8, 24, 80 and 200, 240; shares of each split.
    outlines = [patch for patch in panels[0].patches if patch.get_label() in ("train (4)", "val (2)")]
    assert len(outlines) == 2
    for patch, sizes in zip(outlines, ([8, 8, 24, 80], [200, 240]), strict=True):
        values, edges, _ = patch.get_data()  # type: ignore[attr-defined]
        expected = np.histogram(sizes, edges)[0] / len(sizes)
        np.testing.assert_allclose(values, expected)
    assert sorted(float(line.get_xdata()[0]) for line in panels[0].lines) == [8.0, 16.0]  # type: ignore[index]
    assert "at most 3; the model has 900 queries" in panels[2].get_title()
    names = [text.get_text() for text in panels[1].texts]
    assert {"small", "medium", "large"} >= set(names) and "small" in names
    assert [bar.get_width() for bar in panels[3].patches] == [3, 1, 1, 1]  # train, then val
    assert "train: 3 of 640 x 480" in "\n".join(text.get_text() for text in panels[5].texts)
    with Image.open(tmp_path / "picture.png") as picture:
        picture.load()
        assert picture.size == (1500, 850)


@pytest.mark.parametrize("sizes", [[], [[]], [[5.0]], [[5.0, 5.0]] * 3])
@pytest.mark.parametrize("tile_size", [0, 256])
def test_little_or_nothing_to_show(sizes: list[list[float]], tile_size: int, tmp_path: Path) -> None:
    inspection = Inspection(inspect_dataset({"val": make_data(sizes, 1)}, duplicates=False).splits)
    config = with_changes(Config(), {"data.tile_size": tile_size})
    draw_inspection(inspection, config, tmp_path / "picture")  # a temporary name has no suffix
    with Image.open(tmp_path / "picture") as picture:
        assert picture.format == "PNG"


def test_many_classes_and_sizes(figures: list[Figure], tmp_path: Path) -> None:
    data = make_data([list(np.arange(5.0, 95.0))], num_classes=30)
    draw_inspection(inspect_dataset({"train": data}, duplicates=False), Config(), tmp_path / "picture.png")
    assert "the 20 most frequent of 30" in figures[0].axes[3].get_title()
    assert len(figures[0].axes[3].get_yticklabels()) == 20
