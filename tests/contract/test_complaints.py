"""What users of detection transformers complain about, where no other test shows what happens here.

The table at the end of `docs/training.md` lists all of these complaints with their tests.
"""

from __future__ import annotations

import ast
import dataclasses
import gc
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from crossdino.checkpoints import load_model, save_model
from crossdino.config import Config, with_changes
from crossdino.data import load_coco, load_dataset
from crossdino.data.dataset import DetectionDataset
from crossdino.evaluation import evaluate_protocol
from crossdino.models.detector import CrossDINO
from crossdino.preparation import prepare_benchmark
from crossdino.training import detect_dataset, train
from crossdino.training import loop as training_loop
from tests.conftest import draw_data
from tests.raw_datasets import make_visdrone

ROOT = Path(__file__).parents[2]


def test_every_complaint_of_the_table_has_its_test() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = text.partition("What users of detection transformers complain about")[2]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| complaint")]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row)
        assert named, f"no test: {row}"
        for file, test in named:
            tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
            assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{test}"


# --- memory that grows (DEIMv2#131, transformers#34675) ---


@pytest.fixture
def frozen() -> Iterator[None]:
    """The collector leaves alone what was there before, which in a long test run takes it seconds."""
    gc.freeze()
    yield
    gc.unfreeze()


def tensors_alive() -> int:
    """Number of all tensors made since `frozen` that are alive."""
    gc.collect()
    # `isinstance` asks lazy modules, which warn.
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.usefixtures("frozen")
def test_no_tensor_outlives_its_step(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the third epoch, after two evaluations, there are as many as in the first."""
    seen: list[int] = []
    update = training_loop._update

    def counted(*arguments: Any) -> None:
        update(*arguments)
        seen.append(tensors_alive())

    monkeypatch.setattr(training_loop, "_update", counted)
    train(with_changes(tiny_config, {"training.epochs": 3, "training.batch_size": 1, "training.ema_decay": 0.9}))
    assert len(seen) == 12
    # Sums for the log come and go; the outputs of one step are eight tensors.
    assert max(seen[4:]) - max(seen[:4]) < 8


@pytest.mark.usefixtures("frozen")
def test_evaluation_keeps_detections_and_nothing_else(tiny_config: Config, tmp_path: Path) -> None:
    path = draw_data(tmp_path, "many", 12, [2, 0, 5], seed=3)
    torch.manual_seed(0)
    model = CrossDINO(dataclasses.replace(tiny_config.model, class_names=("red", "blue")))
    dataset = DetectionDataset(load_coco(path), tiny_config.data, model.mean, model.std, train=False, seed=0)
    seen: list[int] = []
    found = detect_dataset(model, dataset, num_select=7, on_image=lambda _: seen.append(tensors_alive()))
    assert len(found) == 12 * 7 and len(seen) == 12
    assert max(seen) - seen[0] < 8  # an image of the second kind has two more; outputs kept would be four an image


# --- more queries than the weights have (rf-detr#1031, transformers#28865) ---


def test_weights_of_fewer_queries_train_with_more(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    donor = CrossDINO(dataclasses.replace(tiny_config.model, class_names=("red", "blue")))
    save_model(donor, tmp_path / "donor")
    config = with_changes(tiny_config, {"model.num_queries": 45, "training.epochs": 1})
    result = train(config, init_weights=tmp_path / "donor")
    assert "queries raised from 20 to 45" in capsys.readouterr().out
    model = load_model(result.weights)
    assert model.config.num_queries == 45
    with torch.no_grad():
        output = model(torch.randn(1, 3, 64, 64))
    assert output.pred_logits.shape == (1, 45, 2) and output.pred_logits.isfinite().all()
    records = [json.loads(line) for line in (result.output / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert losses and all(math.isfinite(loss) for loss in losses)


# --- category ids that are not 1 to K (detr#108, D-FINE#99, DEIMv2#64, rf-detr#509) ---


def test_category_ids_are_only_names(tiny_config: Config, tiny_data: Path, tmp_path: Path) -> None:
    """From 0, or with gaps and beyond any table: the same weights, and detections in the data's own ids."""
    content = json.loads((tiny_data / "train.json").read_text())
    weights = []
    for number, ids in enumerate(({3: 0, 7: 1}, {3: 90, 7: 10**9})):
        annotations = [{**item, "category_id": ids[item["category_id"]]} for item in content["annotations"]]
        categories = [{**item, "id": ids[item["id"]]} for item in content["categories"]]
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({**content, "annotations": annotations, "categories": categories}))
        changes = {"data.train_annotations": str(path), "data.train_images": str(tiny_data / "train")}
        changes |= {"data.val_annotations": None, "training.output": str(tmp_path / f"run{number}")}
        result = train(with_changes(tiny_config, {**changes, "training.epochs": 1}))
        assert json.loads((result.weights / "config.json").read_text())["category_ids"] == list(ids.values())
        model = load_model(result.weights)
        weights.append(model.state_dict())
        index = load_coco(path, tiny_data / "train")
        dataset = DetectionDataset(index, tiny_config.data, model.mean, model.std, train=False, seed=0)
        assert {item["category_id"] for item in detect_dataset(model, dataset, num_select=40)} == set(ids.values())
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


# --- images without any object (detr#82, detectron2#4082) ---


def test_batches_without_objects_train(tiny_config: Config, tmp_path: Path) -> None:
    """One image of four has objects, so one batch of the two has none."""
    path = draw_data(tmp_path, "train", 4, [3, 0, 0, 0], seed=4)
    changes = {"data.train_annotations": str(path), "data.val_annotations": None, "training.epochs": 1}
    result = train(with_changes(tiny_config, changes))
    assert result.steps == 2
    assert all(value.isfinite().all() for value in load_model(result.weights).parameters())


# --- evaluation stops at 100 detections, so that perfect boxes score less than 1 (cocoapi#222, detectron2#3359) ---


@pytest.mark.parametrize(("protocol", "recall"), [("coco", 100 / 250), ("aitod", 1.0), ("visdrone", 1.0)])
def test_perfect_boxes_of_a_crowded_image(protocol: str, recall: float) -> None:
    boxes = [[12.0 * (number % 25), 12.0 * (number // 25), 10.0, 10.0] for number in range(250)]
    truth = {
        "images": [{"id": 1, "width": 300, "height": 120}],
        "annotations": [{"id": n, "image_id": 1, "category_id": 1, "bbox": box} for n, box in enumerate(boxes, 1)],
        "categories": [{"id": 1, "name": "car"}],
    }
    found = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.5} for box in boxes]
    result = evaluate_protocol(protocol, truth, found)
    largest = max(result.settings["max_detections"])
    assert result.metrics[f"AR@{largest}"] == pytest.approx(recall)
    assert (result.metrics["AP"] == pytest.approx(1)) == (recall == 1)
    # COCO's number is COCO's, but nobody has to guess why.
    assert any("more than 100 objects" in note for note in result.notes) == (recall < 1)


# --- regions to ignore, from the raw data to the numbers (detectron2#1909, #2639, SpotNet#8) ---


def test_ignored_regions_of_visdrone_are_neither_background_nor_false(tmp_path: Path, tiny_config: Config) -> None:
    source = make_visdrone(tmp_path / "raw", images={"val": 2})
    scores, regions = {}, {}
    for ignored in ("crowd", "drop"):
        folder = tmp_path / ignored
        prepare_benchmark("visdrone", source, folder, options={"ignored": ignored})
        path = folder / "annotations" / "val.json"
        truth = json.loads(path.read_text())
        found = [
            {"image_id": item["image_id"], "category_id": item["category_id"], "bbox": item["bbox"], "score": 0.5}
            for item in truth["annotations"]
            if not item["iscrowd"]
        ]
        # The boxes of ignored regions, others and score 0, more certain than anything else.
        found += [
            {"image_id": item["image_id"], "category_id": 4, "bbox": item["bbox"], "score": 0.9}
            for item in truth["visdrone_ignored"]
        ]
        scores[ignored] = evaluate_protocol("visdrone", path, found).by_class["car"]["AP"]
        index = load_dataset(folder, "val")
        dataset = DetectionDataset(index, tiny_config.data, (0, 0, 0), (1, 1, 1), train=False, seed=0)
        regions[ignored] = sum(len(dataset[place][1].ignored_labels) for place in range(len(dataset)))
    assert scores["crowd"] == pytest.approx(1) and scores["drop"] < 0.5
    assert regions["crowd"] > 0 and regions["drop"] == 0
