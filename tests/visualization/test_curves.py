"""The curves of a training run say what its log says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from crossdino.errors import InputError
from crossdino.visualization import curves, loss_curves, metric_curves

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
