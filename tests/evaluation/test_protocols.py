"""The one door to the protocols: names, files, what a result says, and mistakes."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from crossdino.benchmarks import BENCHMARKS
from crossdino.errors import InputError
from crossdino.evaluation import PROTOCOLS, evaluate_protocol
from crossdino.evaluation.protocol_result import ProtocolResult
from tests.evaluation.coco_cases import hit, random_scenes, scene

BOX = [0.0, 0.0, 10.0, 10.0]


def test_names():
    assert PROTOCOLS == ("coco", "visdrone", "aitod", "sodad", "widerperson", "visdrone-official")
    assert {benchmark.protocol for benchmark in BENCHMARKS.values()} <= set(PROTOCOLS)
    with pytest.raises(InputError, match="no protocol 'cocoo': choose one of coco, visdrone"):
        evaluate_protocol("cocoo", scene({"bbox": BOX}), [])
    with pytest.raises(InputError, match="patches belong to the protocol sodad, not to aitod"):
        evaluate_protocol("aitod", scene({"bbox": BOX}), [], patches={})


@pytest.mark.parametrize("name", ["coco", "visdrone", "aitod", "sodad"])
def test_files_and_json(tmp_path, name):
    truth, detections = random_scenes(30)
    truth["info"] = {"benchmark": "visdrone", "split": "test-dev", "options": {"mode": "drop"}, "year": 2019}
    truth_file, found_file = tmp_path / "truth.json", tmp_path / "found.json"
    truth_file.write_text(json.dumps(truth))
    found_file.write_text(json.dumps(detections))
    result = evaluate_protocol(name, str(truth_file), found_file)
    assert result.metrics == pytest.approx(evaluate_protocol(name, truth, detections).metrics, abs=0, nan_ok=True)
    content = json.loads(result.to_json())
    assert content["metrics"]["AP"] == result.metrics["AP"]
    assert content["by_class"]["class90"] == dict.fromkeys(result.metrics)  # no objects: null throughout
    assert (content["settings"]["split"], content["settings"]["options"]) == ("test-dev", {"mode": "drop"})
    assert content["num_objects"] == sum(
        not item["ignore" if name == "sodad" else "iscrowd"] for item in truth["annotations"]
    )
    truth_file.write_text("[1, 2")
    with pytest.raises(InputError, match=r"truth\.json is not JSON"):
        evaluate_protocol(name, truth_file, found_file)
    truth_file.write_text("[" * 100_000)  # deeper than the parser goes
    with pytest.raises(InputError, match=r"truth\.json is not JSON"):
        evaluate_protocol(name, truth_file, found_file)


def test_unusual_numbers_are_read_like_usual_ones():
    truth, detections = random_scenes(31)
    usual = evaluate_protocol("aitod", truth, detections)
    truth["annotations"][5]["iscrowd"] = np.bool_(truth["annotations"][5]["iscrowd"])
    truth["annotations"][6]["area"] = np.float64(truth["annotations"][6]["area"])
    detections[3]["score"] = np.float64(detections[3]["score"])
    detections[4]["image_id"] = np.int64(detections[4]["image_id"])
    assert evaluate_protocol("aitod", truth, detections).to_dict() == usual.to_dict()


@pytest.mark.parametrize(
    ("truth", "found", "pieces"),
    [
        (scene({"bbox": BOX}), [hit(BOX), hit(BOX) | {"image_id": True}], ["number 1", "image_id True"]),
        (scene({"bbox": BOX}), [hit(BOX) | {"score": "0.5"}], ["number 0", "score '0.5'", "finite number"]),
        (scene({"bbox": BOX}), [hit(BOX), {"image_id": 1}], ["number 1", "bbox None"]),
        (scene({"bbox": BOX}), [hit(BOX) | {"bbox": [0, 0, True, 1]}], ["number 0", "bbox"]),
        (scene({"bbox": BOX}), [hit(BOX), hit(BOX[:3]), hit([*BOX, 1.0])], ["number 1", "bbox", "4 finite numbers"]),
        (scene({"bbox": BOX}), [hit(BOX) | {"score": 10**400}], ["number 0", "score"]),
        (scene({"bbox": BOX, "iscrowd": "0"}), [], ["annotation number 0", "iscrowd '0'", "give 0 or 1"]),
        (scene({"bbox": BOX, "area": math.inf}), [], ["annotation number 0", "area inf"]),
        (scene({"bbox": BOX}, {"bbox": BOX, "image_id": 8}), [], ["annotation number 1", "image_id 8"]),
    ],
)
def test_broken_entries_are_named(truth, found, pieces):
    with pytest.raises(InputError) as error:
        evaluate_protocol("coco", truth, found)
    assert "\n" not in str(error.value)
    for piece in pieces:
        assert piece in str(error.value)


def test_tables_for_the_terminal():
    boxes = [[0.0, 0.0, 10.0, 10.0], [50.0, 0.0, 20.0, 20.0]]
    one = evaluate_protocol("aitod", scene({"bbox": boxes[0]}), [hit(boxes[0])])
    assert one.summary == "1 image, 1 object, 1 detection"
    assert one.class_table() is None
    truth = scene(
        *({"bbox": box, "category_id": 1} for box in boxes), {"bbox": boxes[0], "category_id": 2}, num_classes=3
    )
    two = evaluate_protocol("aitod", truth, [hit(boxes[0]), hit(boxes[0], category_id=2)])
    assert two.summary == "1 image, 3 objects, 2 detections"
    assert "1 class without objects, left out of the means: class3" in two.notes
    table = two.class_table()
    assert table is not None
    headers = ["class", "AP", "AP50", "AP75", "AP_vt", "AP_t", "AP_s", "AP_m"]
    assert [column.header for column in table.columns] == headers
    assert [list(column.cells) for column in table.columns][5:7] == [["100.0", "100.0"], ["0.0", "-"]]
    # What the terminal has no room for is in the JSON: one of two objects is found, without a false one.
    assert two.by_class["class1"]["AR@1500"] == pytest.approx(0.5)
    assert two.by_class["class1"]["oLRP"] == pytest.approx(0.5)
    assert math.isnan(two.by_class["class3"]["oLRP"])


def test_a_long_name_keeps_its_line():
    from rich.console import Console

    numbers = {"AP": 0.5}
    table = ProtocolResult("visdrone-official", numbers, {}, 1, 1, 1, {}).table()
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    assert "visdrone-official" in capture.get()


def test_measuring_files_needs_no_torch():
    code = (
        "import sys; from crossdino.evaluation import evaluate_protocol;"
        f"evaluate_protocol('sodad', {scene({'bbox': BOX})!r}, {[hit(BOX)]!r});"
        "assert 'torch' not in sys.modules, 'torch was loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
