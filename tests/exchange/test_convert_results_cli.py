"""`crossdino convert-results`: what a user types first, second and by mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from crossdino.cli import main
from crossdino.evaluation.visdrone_official import evaluate_visdrone_official

TRUTH = {
    "images": [{"id": 1, "file_name": "a.jpg", "width": 50, "height": 50}, {"id": 2, "file_name": "b.jpg"}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 4, "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}],
    "categories": [{"id": 4, "name": "car"}],
    "visdrone_ignored": [],
}
RESULTS = [
    {"image_id": 1, "category_id": 4, "bbox": [0.0, 0.5, 9.0, 9.0], "score": 0.9},
    {"image_id": 1, "category_id": 4, "bbox": [20.0, 0.0, 9.0, 9.0], "score": 0.1},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    (tmp_path / "found.json").write_text(json.dumps(RESULTS))
    return tmp_path


def convert(data: Path, source: str, to: str, output: str, *more: str) -> int:
    paths = [str(data / source), "--ground-truth", str(data / "truth.json"), "--output", str(data / output)]
    return main(["convert-results", *paths, "--to", to, *more])


def test_there_and_back(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert(data, "found.json", "visdrone", "out.zip") == 0
    assert "2 detections of 1 image, as visdrone" in capsys.readouterr().out
    assert convert(data, "out.zip", "coco", "back.json") == 0
    assert json.loads((data / "back.json").read_text()) == RESULTS
    assert convert(data, "out.zip", "visdrone", "out", "--from", "visdrone") == 0
    (data / "out" / "b.txt").unlink()
    assert convert(data, "out", "coco", "back.json") == 0
    assert "note: " in capsys.readouterr().out
    official = evaluate_visdrone_official(data / "truth.json", data / "back.json")
    assert official.metrics["AR@1"] == pytest.approx(0.8)  # 8.5 of 9.5 rows: an IoU of 0.89


def test_mistakes(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(source: str, to: str, output: str, *more: str) -> str:
        assert convert(data, source, to, output, *more) == 2
        return capsys.readouterr().err

    before = (data / "truth.json").read_text()
    assert "would replace" in complaint("found.json", "coco", "truth.json")
    assert "would replace" in complaint("found.json", "coco", "found.json")
    assert (data / "truth.json").read_text() == before
    assert "one JSON file" in complaint("found.json", "coco", "out")
    assert "is one file" in complaint("found.json", "visdrone", "out", "--from", "visdrone")
    assert "--split goes with" in complaint("found.json", "visdrone", "out", "--split", "val")
    assert "does not exist" in complaint("none.json", "visdrone", "out")
    words = [str(data / "found.json"), "--ground-truth", str(data / "no"), "--output", str(data / "out")]
    assert main(["convert-results", *words, "--to", "visdrone", "--split", "test"]) == 2
    assert "no does not exist: check the path of --ground-truth" in capsys.readouterr().err
    assert "invalid choice" in complaint("found.json", "yolo", "out")


def test_a_prepared_folder_by_role_and_by_official_name(data: Path) -> None:
    folder = data / "prepared"
    (folder / "annotations").mkdir(parents=True)
    splits = {"test-dev": {"annotations": "annotations/test-dev.json", "images": "images/test-dev"}}
    (folder / "benchmark.json").write_text(json.dumps({"splits": splits, "roles": {"test": "test-dev"}}))
    (folder / "annotations" / "test-dev.json").write_text(json.dumps(TRUTH))
    for place, split in enumerate(("test", "test-dev")):
        words = [str(data / "found.json"), "--ground-truth", str(folder), "--split", split, "--to", "visdrone"]
        assert main(["convert-results", *words, "--output", str(data / f"out{place}")]) == 0
        assert (data / f"out{place}" / "b.txt").read_text() == ""
    words = [str(data / "found.json"), "--ground-truth", str(folder), "--to", "coco"]
    assert main(["convert-results", *words, "--output", str(data / "out.json")]) == 2  # there is no val
    truth = folder / "annotations" / "test-dev.json"
    assert main(["convert-results", *words, "--split", "test", "--output", str(truth)]) == 2
    assert json.loads(truth.read_text()) == TRUTH


def test_a_data_set_as_ground_truth(data: Path) -> None:
    (data / "set").mkdir()
    images = [{**image, "width": 50, "height": 50} for image in TRUTH["images"]]
    (data / "set" / "val.json").write_text(json.dumps({**TRUTH, "images": images}))
    words = [str(data / "found.json"), "--ground-truth", str(data / "set"), "--output", str(data / "out")]
    assert main(["convert-results", *words, "--to", "visdrone"]) == 0
    assert sorted(path.name for path in (data / "out").iterdir()) == ["a.txt", "b.txt"]
