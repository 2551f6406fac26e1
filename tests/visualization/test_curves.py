"""The curves of a training run say what its log says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from crossdino.errors import InputError
from crossdino.visualization import curves, loss_curves, metric_curves, training_curves

RECORDS = [
    {"kind": "train", "step": 5, "epoch": 0, "lr": 1e-4, "loss": 9.0, "giou": 2.0, "seconds": 1.0},
    {"kind": "train", "step": 10, "epoch": 0, "lr": 1e-4, "loss": 8.0, "giou": 1.5, "seconds": 2.0},
    {
        "kind": "eval",
        "step": 10,
        "epoch": 1,
        "ap": 0.1,
        "ap50": 0.3,
        "ap75": None,
        "by_size": {"small": 0.05, "x": None},
    },
    {"kind": "train", "step": 15, "epoch": 1, "lr": 1e-4, "loss": 7.0, "giou": 1.0, "denoising": 4.0, "seconds": 3.0},
    {
        "kind": "eval",
        "step": 20,
        "epoch": 2,
        "ap": 0.2,
        "ap50": 0.4,
        "ap75": 0.1,
        "by_size": {"small": 0.07, "x": None},
    },
]


def lines_of(plot, kind: str) -> dict[str, list[list[float]]]:
    axes = Figure().subplots()
    plot(axes, curves._records(RECORDS, kind))
    return {
        line.get_label(): [list(map(float, line.get_xdata())), list(map(float, line.get_ydata()))]
        for line in axes.lines
    }


def test_curves_say_what_the_log_says():
    losses = lines_of(curves._plot_losses, "train")
    assert losses["total"] == [[0.5, 1.0, 1.5], [9.0, 8.0, 7.0]]
    assert losses["denoising"] == [[1.5], [4.0]]
    assert set(losses) == {"total", "giou", "denoising"}
    metrics = lines_of(curves._plot_metrics, "eval")
    assert set(metrics) == {"AP", "AP50", "AP75", "AP small"}
    assert metrics["AP"] == [[1, 2], pytest.approx([10, 20])]
    assert metrics["AP75"] == [[2], pytest.approx([10])]


def test_curves_from_a_file_that_is_still_being_written(tmp_path):
    log = tmp_path / "log.jsonl"
    text = "".join(json.dumps(record) + "\n" for record in RECORDS)
    log.write_text(text + '{"kind": "tra')
    for draw in (loss_curves, metric_curves):
        draw(log, tmp_path / "curve.png")
        with Image.open(tmp_path / "curve.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5, "an empty picture"
    log.write_text("{broken\n" + text)
    with pytest.raises(InputError, match=r"log\.jsonl: line 1 "):
        loss_curves(log, tmp_path / "curve.png")
    with pytest.raises(InputError, match="'eval'"):
        metric_curves(RECORDS[:1], tmp_path / "curve.png")
    with pytest.raises(InputError, match="cannot be read"):
        loss_curves(tmp_path / "missing.jsonl", tmp_path / "curve.png")


def timed(step: int, epoch: int, scale: float = 1.0) -> dict:
    ms = {"data": 10 * scale, "forward": 20 * scale, "backward": 30 * scale}
    memory = {"process": 2000.0, "device": 5000.0}
    train = {"kind": "train", "step": step, "epoch": epoch, "lr": 1e-4 * step, "loss": 9.0 - epoch, "giou": 2.0}
    return {**train, "ms": ms, "images_per_second": 3.0, "memory_mb": memory, "seconds": 1.0}


def chosen(epoch: int, value: float, best: bool) -> dict:
    record = {"kind": "eval", "step": 10 * epoch, "epoch": epoch, "ap": 0.2 + value, "ap50": 0.5, "ap75": None}
    by_size = {"small": value, "large": None}
    return {**record, "by_size": by_size, "metric": "ap small", "selected": value, "best": best}


def panels(records: list[dict], monkeypatch, tmp_path) -> dict[str, Axes]:
    """The panels of the whole picture by what stands at their upright axis."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    training_curves(records, tmp_path / "curves.png")
    return {axes.get_ylabel(): axes for axes in figures[0].axes}


WHOLE = [
    timed(5, 0, scale=100),
    timed(10, 0),
    chosen(1, 0.1, True),
    timed(20, 1),
    chosen(2, 0.3, True),
    timed(30, 2),
    chosen(3, 0.2, False),
]


def drawn(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_one_picture_of_everything(monkeypatch, tmp_path):
    shown = panels(WHOLE, monkeypatch, tmp_path)
    assert list(shown) == [
        "loss",
        "AP on the validation set (%)",
        "AP by size (%)",
        "learning rate",
        "milliseconds per step",
        "peak memory (GB)",
    ]
    losses = drawn(shown["loss"])
    # Times, speed and memory are no losses.
    assert {name for name in losses if not name.startswith("_")} == {"total", "giou"}
    assert losses["total"] == ([0.5, 1.0, 2.0, 3.0], [9.0, 9.0, 8.0, 7.0])
    ap = drawn(shown["AP on the validation set (%)"])
    assert ap["AP"] == ([1, 2, 3], pytest.approx([30, 50, 40])) and "AP75" not in ap
    bands = drawn(shown["AP by size (%)"])
    assert bands["small"] == ([1, 2, 3], pytest.approx([10, 30, 20])) and "large" not in bands
    assert drawn(shown["peak memory (GB)"])["GPU, tensors"][1] == [5.0] * 4
    # The last one that was the best when it was made, marked in every panel by an upright line.
    for axes in shown.values():
        assert [2, 2] in [list(line.get_xdata()) for line in axes.lines]
        assert axes.get_xlim() == pytest.approx((0, 3.06))
    assert shown["AP by size (%)"].get_title() == "best: epoch 2, ap small 30.0"


def test_time_of_the_parts_is_stacked(monkeypatch, tmp_path):
    axes = panels([timed(10 * n, n - 1, scale=100 if n == 1 else 1) for n in range(1, 41)], monkeypatch, tmp_path)[
        "milliseconds per step"
    ]
    tops = [max(y for x, y in area.get_paths()[0].vertices if x > 1.5) for area in axes.collections]
    assert tops == [10, 30, 60]
    assert 60 < axes.get_ylim()[1] < 100, "the first steps flatten the rest"
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["backward", "forward", "data"], "the legend has not the order of the stack"


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        (RECORDS, 4),  # a log from before times and memory were written: losses, AP, AP by size, learning rate
        (WHOLE[:1], 4),
        ([record for record in WHOLE if record["kind"] == "train"], 4),
        ([WHOLE[2]], 2),
        ([{**WHOLE[0], "lr": None, "giou": None, "ms": {}, "memory_mb": {}}], 1),
        ([WHOLE[0], {**WHOLE[2], "ap": None, "ap50": None, "by_size": {"small": None}, "selected": None}], 4),
        ([WHOLE[0], {"kind": "eval", "step": 10, "epoch": 1, "ap": 0.1, "ap50": 0.3, "ap75": 0.0}], 5),
    ],
    ids=["old", "one record", "no evaluation", "one evaluation", "no numbers", "no values", "no bands"],
)
def test_panels_of_what_the_log_knows(records, expected, monkeypatch, tmp_path):
    assert len(panels(records, monkeypatch, tmp_path)) == expected


def test_picture_from_a_file_and_from_nothing(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in WHOLE) + '{"kind": "tra')
    training_curves(log, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1600, 1080)
        # Every panel has something in it.
        for row in np.array_split(np.asarray(picture.convert("L")), 3):
            assert all(half.std() > 5 for half in np.array_split(row, 2, axis=1))
    log.write_text("")
    with pytest.raises(InputError, match="no record of a training"):
        training_curves(log, tmp_path / "curves.png")


def test_a_long_training_is_averaged_not_cut(monkeypatch, tmp_path):
    # 9200 records whose loss alternates between 1 and 3 around 2, but for a steady rise.
    records = [
        {"kind": "train", "step": n + 1, "epoch": n // 920, "lr": 1e-4, "loss": 2.0 + (-1) ** n + n / 1000}
        for n in range(9200)
    ]
    epochs, losses = drawn(panels(records, monkeypatch, tmp_path)["loss"])["total"]
    assert 200 <= len(epochs) <= 400
    assert np.allclose(losses, 2.0 + np.interp(epochs, [0, 10], [0, 9.2]), atol=0.06)  # 1/23 of the alternation is left
