"""`crossdino compare` from the command line: table, JSON, picture, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossdino.cli import main
from crossdino.evaluation.protocols import evaluate_protocol
from crossdino.exchange import write_results


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """truth.json of 25 images, and a.json and b.json, of which b has the better boxes."""
    rng = np.random.default_rng(0)
    annotations: list[dict] = []
    found: dict[str, list[dict]] = {"a": [], "b": []}
    for image in range(1, 26):
        for place in range(5):
            box = np.array([40.0 * place, 10.0, 12.0, 12.0])
            entry = {"image_id": image, "category_id": 1, "bbox": box.tolist()}
            annotations.append({"id": len(annotations) + 1, **entry, "area": 144.0, "iscrowd": 0})
            for (_, detections), shift in zip(found.items(), (2.5, 1.0), strict=True):
                moved = box + np.append(rng.normal(0, shift, 2), (0, 0))
                detections.append({**entry, "bbox": moved.tolist(), "score": float(rng.random())})
    truth = {
        "images": [{"id": image} for image in range(1, 26)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "thing"}],
    }
    for name, content in {"truth": truth, **found}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def run(folder: Path, *words: str, files: tuple[str, ...] = ("a.json", "b.json")) -> int:
    predictions = [str(folder / name) for name in files]
    fixed = ("--ground-truth", str(folder / "truth.json"), "--resamples", "100", "--workers", "1")
    return main(["compare", *fixed, "--predictions", *predictions, *words])


def test_table_json_and_picture(files, capsys):
    out, picture = files / "out.json", files / "forest.png"
    assert run(files, "--protocol", "aitod", "--json", str(out), "--figure", str(picture), "--seed", "3") == 0
    printed = capsys.readouterr().out
    numbers = json.loads(out.read_text())
    assert numbers["names"] == ["a", "b"]
    assert numbers["settings"]["seed"] == 3
    assert numbers["provenance"]["predictions"] == [str(files / "a.json"), str(files / "b.json")]
    for place, name in enumerate("ab"):
        metrics = evaluate_protocol("aitod", files / "truth.json", files / f"{name}.json").metrics
        # full precision, other order of sums
        assert numbers["metrics"]["AP"]["files"][place]["value"] == pytest.approx(metrics["AP"], abs=1e-12)
        assert f"{100 * metrics['AP']:.2f}" in printed
    difference = numbers["metrics"]["AP"]["difference"]
    assert difference["value"] > 0
    assert difference["low"] > 0
    assert numbers["metrics"]["AP_vt"]["difference"]["value"] is None  # no object is so small
    assert f"{100 * difference['low']:+.2f} to {100 * difference['high']:+.2f}" in printed
    assert f"{difference['p_value']:.3f}" in printed
    assert "not what another training would" in printed
    with Image.open(picture) as image:
        assert image.size[0] > 800
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    # the green of a difference that is clear of zero
    assert (pixels == (0x2E, 0x7D, 0x4F)).all(axis=1).sum() > 100


def test_one_file_gives_intervals(files, capsys):
    out, picture = files / "out.json", files / "forest.png"
    words = ("--size-bands", "tiny=0-16,rest=16-inf", "--max-detections", "3", "--names", "mine[1]")
    assert run(files, "--json", str(out), "--figure", str(picture), *words, files=("a.json",)) == 0
    numbers = json.loads(out.read_text())
    assert numbers["metrics"]["AP_tiny"]["difference"] is None
    assert list(numbers["metrics"]) == ["AP", "AP50", "AP75", "AP_tiny", "AP_rest", "AR@3", "AR_tiny", "AR_rest"]
    estimate = numbers["metrics"]["AP_tiny"]["files"][0]
    assert estimate["low"] < estimate["high"]
    assert "mine[1]" in capsys.readouterr().out
    assert picture.is_file()


def test_the_protocol_of_prepared_data_is_taken(files):
    truth = json.loads((files / "truth.json").read_text())
    (files / "truth.json").write_text(json.dumps({**truth, "info": {"benchmark": "visdrone", "split": "val"}}))
    assert run(files, "--json", str(files / "out.json")) == 0
    numbers = json.loads((files / "out.json").read_text())
    assert numbers["protocol"] == "visdrone"
    assert numbers["provenance"]["split"] == "val"
    assert run(files, "--json", str(files / "out.json"), "--max-detections", "7") == 0
    assert json.loads((files / "out.json").read_text())["protocol"] is None


def test_names_of_files_that_are_called_alike(files):
    for part in ("old", "new"):
        (files / part).mkdir()
        (files / part / "dets.json").write_text((files / "a.json").read_text())
    out = files / "out.json"
    assert run(files, "--json", str(out), files=("old/dets.json", "new/dets.json")) == 0
    numbers = json.loads(out.read_text())
    assert numbers["names"] == ["old/dets", "new/dets"]
    assert any("the same detections" in note for note in numbers["notes"])


@pytest.mark.parametrize(
    ("words", "predictions", "message"),
    [
        ((), ("a.json", "a.json"), "twice"),
        ((), ("a.json", "b.json", "a.json"), "3 files"),
        ((), ("a.json", "missing.json"), "missing.json is not there"),
        ((), ("a.json", "truth.json"), "is a whole COCO data set"),
        (("--names", "b", "a"), ("a.json", "b.json"), "in the other order"),
        (("--names", "b"), ("a.json", "b.json"), "1 names for 2 files"),
        (("--resamples", "50"), ("a.json",), "at least 100"),
        (("--confidence", "95"), ("a.json",), "at most 1"),
        (("--confidence", "1"), ("a.json",), "below 1"),
        (("--protocol", "coco", "--max-detections", "5"), ("a.json",), "fixed by --protocol"),
        (("--protocol", "visdrone-official"), ("a.json",), "cannot be resampled by images; did you mean 'visdrone'?"),
        (("--protocol", "kitti"), ("a.json",), "choose one of coco, aitod, visdrone, sodad, widerperson"),
        (("--json", "nowhere/out.json"), ("a.json",), "no folder"),
    ],
)
def test_mistakes_are_one_line(files, capsys, words, predictions, message):
    assert run(files, *words, files=predictions) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_text_files_of_visdrone(files, capsys):
    truth = json.loads((files / "truth.json").read_text())
    truth["images"] = [{"id": image["id"], "file_name": f"{image['id']:07d}.jpg"} for image in truth["images"]]
    truth["categories"] = [{"id": 1, "name": "pedestrian"}]
    (files / "truth.json").write_text(json.dumps(truth))
    for name, place in (("a", "old"), ("b", "new.zip")):
        write_results(json.loads((files / f"{name}.json").read_text()), files / place, "visdrone", truth)
    words = ("--protocol", "visdrone", "--json", str(files / "out.json"))
    assert run(files, *words) == 0
    of_json = json.loads((files / "out.json").read_text())
    assert run(files, *words, files=("old", "new.zip")) == 0
    of_text = json.loads((files / "out.json").read_text())
    assert of_text["names"] == ["old", "new"]
    assert of_text["num_predictions"] == of_json["num_predictions"] == [125, 125]
    assert of_text["metrics"] == of_json["metrics"]
    capsys.readouterr()
    assert run(files, files=("old", "old")) == 2
    assert "twice" in capsys.readouterr().err


def test_what_is_read_is_not_overwritten(files, capsys):
    assert run(files, "--json", str(files / "a.json")) == 2
    assert "one of the files that are read" in capsys.readouterr().err


def test_an_image_that_the_truth_lacks_is_named(files, capsys):
    detections = json.loads((files / "b.json").read_text())
    (files / "b.json").write_text(json.dumps([*detections, {**detections[0], "image_id": 99}]))
    assert run(files) == 2
    error = capsys.readouterr().err
    assert "b.json: detection number 125" in error
    assert "image_id 99" in error
