"""Model cards: the facts that were given, "not stated" for the others, and a head that the hub's own reader reads."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml

from crossdino.config import Config, InferenceConfig
from crossdino.data.index import DatasetIndex, ImageRecord, Problems
from crossdino.evaluation.average_precision import evaluate_detections
from crossdino.model_card import SIZE_EDGES_PX, SizeHistogram, model_card, size_histogram
from crossdino.models.detector import CrossDINO


@pytest.fixture
def model(tiny_config: Config) -> CrossDINO:
    torch.manual_seed(0)
    config = dataclasses.replace(tiny_config.model, class_names=("red", "a|b `c` <i>", "traffic\nlight"))
    return CrossDINO(config, InferenceConfig(short_side=640, long_side=1000, num_select=77))


def head_of(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def table_after(card: str, heading: str) -> list[list[str]]:
    """The rows of the first table after a heading, the line of dashes left out."""
    lines = card.split(f"## {heading}\n")[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    assert len({len(row) for row in rows}) == 1
    return [rows[0], *rows[2:]]


def test_the_evaluation_is_told_with_its_settings(model: CrossDINO) -> None:
    boxes = [(1, [0, 0, 10, 10]), (2, [50, 50, 100, 80])]
    truth = {
        "images": [{"id": 1, "width": 200, "height": 200}],
        "categories": [{"id": 1, "name": "red"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for i, box in boxes
        ],
    }
    found = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.9}]
    bands = {"tiny": (0.0, 16.0), "rest": (16.0, 1e5), "none|such": (0.0, 1.0)}
    metrics = evaluate_detections(truth, found, max_detections=50, size_bands=bands).to_dict()
    card = model_card(model, name="me/red", metrics=metrics, data="Two boxes: one small.", license="CC BY 4.0 & mine")

    # One of two objects, perfectly: by the 101 recall levels of COCO, 51 are reached.
    assert table_after(card, "Evaluation") == [
        ["measure", "%", "objects"],
        ["AP", "50.5", "2"],
        ["AP50", "50.5", "2"],
        ["AP75", "50.5", "2"],
        ["AP tiny (0 to 16 px)", "100.0", "1"],
        ["AP rest (16 to 100000 px)", "0.0", "1"],
        ["AP none\\|such (0 to 1 px)", "-", "0"],
    ]
    for text in (
        "over IoU 0.5 to 0.95;",
        "Images: 1.",
        "class: at most 50.",
        "Kept per image: 77.",
        "640 px",
        "1000 px",
    ):
        assert text in card
    assert "Of these weights: CC BY 4.0 \\& mine." in card and "Two boxes: one small." in card

    # The hub's own reader.
    read: Any = huggingface_hub.ModelCard(card).data
    assert (read.license, read.license_name, read.library_name) == ("other", "cc-by-4.0-mine", "crossdino")
    assert read.pipeline_tag == "object-detection" and read.model_name == "me/red"
    results = {result.metric_name: result.metric_value for result in read.eval_results}
    assert results == pytest.approx({"AP": 51 / 101, "AP50": 51 / 101, "AP75": 51 / 101, "AP tiny": 1, "AP rest": 0})
    assert {result.dataset_name for result in read.eval_results} == {"Two boxes: one small."}


def test_what_is_not_known_is_not_claimed(model: CrossDINO) -> None:
    card = model_card(model, name="plain")
    assert head_of(card) == {
        "library_name": "crossdino",
        "pipeline_tag": "object-detection",
        "license": "unknown",
        "tags": ["object-detection", "small-object-detection", "cross-dino", "detr"],
    }
    for text in (
        "Nothing was measured",
        "Of these weights: not stated.",
        "Training and evaluation data: not stated.",
        "Sizes of the training objects: not stated.",
        "Settings: not stated.",
        "measure it on your pictures",
        'from_pretrained("MODEL")',
        "not calibrated",
        "arXiv:2505.21868",
    ):
        assert text in card
    # The short summary that a config.json keeps has no numbers of objects.
    summary = {"epoch": 3, "ap": 0.25, "ap50": None, "by_size": {"small": 0.5, "large": None}}
    card = model_card(model, name="plain", metrics=summary)
    assert table_after(card, "Evaluation")[1:] == [
        ["AP", "25.0", "not stated"],
        ["AP50", "-", "not stated"],
        ["AP75", "-", "not stated"],
        ["AP small", "50.0", "not stated"],
        ["AP large", "-", "not stated"],
    ]
    read: Any = huggingface_hub.ModelCard(card).data
    assert [result.metric_name for result in read.eval_results] == ["AP", "AP small"]
    assert head_of(model_card(model, name="x", license="Apache-2.0"))["license"] == "apache-2.0"


def test_names_cannot_break_the_text(model: CrossDINO) -> None:
    name = "a: b # c\n---\nlicense: mit"
    card = model_card(model, name=name, metrics={"ap": 0.5}, training={"a|b": "c\n\n# d"})
    head = head_of(card)
    assert head["license"] == "unknown" and head["model-index"][0]["name"] == "a: b # c --- license: mit"  # type: ignore[index]
    assert "3 classes: red, a\\|b \\`c\\` \\<i\\>, traffic light." in card
    assert "\n# a: b \\# c --- license: mit\n" in card
    assert table_after(card, "Training") == [["setting", "value"], ["a\\|b", "c \\# d"]]


def test_the_architecture_is_the_models_own(model: CrossDINO) -> None:
    model.config = dataclasses.replace(model.config, backbone_weights="/home/someone/weights/strip_mlp.pth")
    card = model_card(model, name="plain")
    rows = dict(table_after(card, "Architecture"))
    assert rows["backbone"] == "test\\_efficientnet, started from strip\\_mlp.pth" and "someone" not in card
    assert rows["queries"] == "20"
    count = 0
    for parameter in model.parameters():
        count += np.prod(parameter.shape, dtype=int)
    assert rows["parameters"].replace(",", "") == str(count)


def record(hw: tuple[int, int], sides: list[float], crowd: int | None = None) -> ImageRecord:
    areas = np.array(sides) ** 2
    iscrowd = np.arange(len(sides)) == (-1 if crowd is None else crowd)
    boxes = np.tile([0.0, 0.0, 1.0, 1.0], (len(sides), 1))
    labels = np.zeros(len(sides), np.int64)
    return ImageRecord(1, Path("x.png"), hw[1], hw[0], boxes, labels, areas, iscrowd)


def test_sizes_are_counted_in_the_image_and_at_the_networks_input(model: CrossDINO) -> None:
    records = (
        record((500, 1000), [0.5, 3.9, 4, 15.9, 600], crowd=4),  # twice as large at the input: 1000 x 2000
        record((4000, 2000), [8, 16, 40], crowd=None),  # half as large: 2000 x 1000
        record((10, 10), []),
    )
    index = DatasetIndex(Path("t.json"), ("red",), (1,), records, Problems())
    found = size_histogram(index, InferenceConfig(short_side=1000, long_side=2000))
    #                  0- 4- 8- 16- 32- 64- 96- 128- 256- 512-
    assert found == SizeHistogram((2, 1, 2, 1, 1, 0, 0, 0, 0, 0), (1, 2, 2, 2, 0, 0, 0, 0, 0, 0))
    assert size_histogram(index) == SizeHistogram(found.counts)
    assert size_histogram(dataclasses.replace(index, records=())).counts == (0,) * len(SIZE_EDGES_PX)

    card = model_card(model, name="plain", sizes=found)
    assert "Sizes of the 7 training objects" in card and "(short side 640, long side at most 1000)" in card
    rows = table_after(card, "Data")
    assert rows[0] == ["sqrt(area), px", "objects", "share", "at the network's input", "share"]
    assert rows[1] == ["0-4", "2", "28.6 %", "1", "14.3 %"] and rows[-1] == ["512-", "0", "0.0 %", "0", "0.0 %"]
    assert len(rows) == 11
    card = model_card(model, name="plain", sizes=size_histogram(index))
    assert table_after(card, "Data")[1] == ["0-4", "2", "28.6 %"]


def test_the_same_facts_give_the_same_text(model: CrossDINO) -> None:
    facts = {"name": "x", "metrics": {"ap": 1 / 3}, "sizes": SizeHistogram((1,) * 10), "training": {"epochs": 3}}
    assert model_card(model, **facts) == model_card(model, **facts)  # type: ignore[arg-type]
