"""`crossdino calibrate`: what is stored with the weights, what is printed, and that a mistake costs one line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crossdino.checkpoints import CalibrationWarning, load_model, weights_digest
from crossdino.cli import _show_warning
from crossdino.cli.calibrate import _as_options, add_calibrate_options, run_calibrate
from crossdino.cli.parser import build_parser
from crossdino.config import Config, InferenceConfig, with_changes
from crossdino.errors import InputError
from crossdino.tiling import choose_tiles
from crossdino.training import train


def run(*words: Any) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_calibrate_options(parser)
    return run_calibrate(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def weights(weights: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return Path(shutil.copytree(weights, tmp_path / "weights"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Annotations of 6 images of 2 classes, and detections whose scores are a third of what they should be."""
    rng = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number in range(240):
        size = (16.0, 50.0)[number % 2]
        place, image = number // 6, 1 + number % 6
        box = [60.0 * (place % 8), 60.0 * (place // 8), size, size]
        entry = {"image_id": image, "category_id": (3, 7)[int(rng.integers(2))], "bbox": box}
        p = float(rng.random())
        found.append({**entry, "score": p / 3})
        if rng.random() < p:
            annotations.append({**entry, "id": len(annotations) + 1, "area": size**2, "iscrowd": 0})
    folder = tmp_path_factory.mktemp("data")
    images = [{"id": image, "file_name": f"{image}.png", "width": 480, "height": 480} for image in range(1, 7)]
    categories = [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}]
    truth = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps(found))
    return folder / "truth.json", folder / "found.json"


def test_a_file_of_detections_is_enough(
    weights: Path, data: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth, found = data
    before = {path.name: path.read_bytes() for path in weights.iterdir()}
    out, numbers = tmp_path / "out", tmp_path / "numbers.json"
    words = ["--ground-truth", truth, "--predictions", found, "--size-bands", "small=0-32,large=32-inf"]
    assert run(*words, "--weights", weights, "--output", out, "--json", numbers) == 0
    printed = capsys.readouterr().out
    assert "ECE before" in printed and "red" in printed and "--threshold auto" in printed

    after = {path.name: path.read_bytes() for path in weights.iterdir()}
    assert {name: after[name] for name in before} == before and set(after) - set(before) == {"calibration.json"}
    assert sorted(os.listdir(out)) == ["calibration.json", "calibration.png"]
    assert (out / "calibration.json").read_bytes() == after["calibration.json"]
    model = load_model(weights)
    made = model.calibration
    assert made is not None and made.weights == weights_digest(model) and made.class_names == ("red", "blue")
    assert made.settings["num_select"] == 5 and made.settings["tile_size"] == 0
    results = json.loads(numbers.read_text())
    assert results["everything"]["ece_after"] < 0.15 < results["everything"]["ece_before"]
    assert set(results["by_size"]) == {"small", "large"} and set(results["by_class"]) == {"red", "blue"}
    assert results["calibration"] == json.loads(after["calibration.json"])
    # Scores of a third: the threshold on raw scores that calibration undoes is far below 0.3.
    scores = made.calibrate(torch.tensor([[0.0, 0, 16, 16]]), torch.tensor([0.25]), torch.tensor([0]))
    assert 0.55 < float(scores) < 0.95

    # Other settings than the model's own are stored, and the user is told to predict with them.
    assert run(*words, "--weights", weights, "--tile-size", 320, "--num-select", 50, "--objective", "recall=0.8") == 0
    printed = capsys.readouterr().out
    assert "by itself the model's num_select is 5 instead of 50" in printed
    assert "by itself the model's tile_size is 0 instead of 320" in printed
    again = load_model(weights).calibration
    assert again is not None and again.objective == "recall=0.8" and again.settings["tile_size"] == 320

    assert run(*words) == 0
    assert "nothing is stored: name the model with --weights" in capsys.readouterr().out


@pytest.mark.parametrize("tiles", [(), ("--tile-size", "48", "--tile-overlap", "16", "--full-image")])
def test_the_model_is_run_as_in_an_evaluation(
    weights: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiles: tuple[str, ...]
) -> None:
    """What reaches the fit is what the model finds: its own detections taken for the truth are all right."""
    raw = tmp_path / "raw.json"
    words = ["--weights", weights, "--images", tiny_data / "train", *tiles]
    truth = json.loads((tiny_data / "train.json").read_text())
    with pytest.raises(InputError, match="none of the"):  # random weights find nothing
        run(*words, "--ground-truth", tiny_data / "train.json", "--predictions-out", raw, "--iou", "0.99")
    found = json.loads(raw.read_text())
    assert found and {item["image_id"] for item in found} == {1, 2, 3, 4}
    truth["annotations"] = [
        {**item, "id": number, "area": item["bbox"][2] * item["bbox"][3], "iscrowd": 0}
        for number, item in enumerate(found, start=1)
        if min(item["bbox"][2:]) > 1
    ]
    path = tmp_path / "own.json"
    path.write_text(json.dumps(truth))
    numbers = tmp_path / "numbers.json"
    assert run(*words, "--ground-truth", path, "--json", numbers, "--iou", "0.99", "--min-score", "0") == 0
    everything = json.loads(numbers.read_text())["everything"]
    assert everything["num_objects"] == len(truth["annotations"])
    assert everything["auto"]["recall"] == 1 and everything["auto"]["precision"] > 0.9
    made = load_model(weights).calibration
    assert made is not None and made.settings["full_image"] is bool(tiles)


def test_a_stale_calibration_is_replaced_without_a_word(weights: Path, data: tuple[Path, Path]) -> None:
    (weights / "calibration.json").write_text("{")
    assert run("--ground-truth", data[0], "--predictions", data[1], "--weights", weights) == 0
    assert load_model(weights).calibration is not None


def test_a_model_that_cannot_be_written_to_is_copied(
    weights: Path, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the answer of the system is made up."""
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != weights and allowed(path, mode))
    words = ["--ground-truth", data[0], "--predictions", data[1], "--weights", weights]
    with pytest.raises(InputError, match="cannot be written to: name a folder with --output"):
        run(*words)
    assert run(*words, "--output", tmp_path / "copy") == 0
    assert sorted(os.listdir(tmp_path / "copy")) == [
        "README.md", "calibration.json", "calibration.png", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert load_model(tmp_path / "copy").calibration is not None and not (weights / "calibration.json").exists()
    with pytest.raises(InputError, match="holds a model already"):
        run(*words, "--output", tmp_path / "copy")


def test_mistakes(weights: Path, data: tuple[Path, Path], tmp_path: Path) -> None:
    truth, found = data
    known = ["--ground-truth", truth, "--predictions", found]
    for words, message in (
        (["--ground-truth", truth], "give --weights"),
        ([*known, "--predictions-out", "x.json"], "--predictions-out goes without --predictions"),
        ([*known, "--json", tmp_path / "no" / "x.json"], "no folder"),
        ([*known, "--output", truth], "is a file; name a folder"),
        ([*known, "--iou", "0"], "--iou 0"),
        ([*known, "--min-score", "1"], "--min-score 1"),
        ([*known, "--objective", "f2"], "objective 'f2' is not understood"),
        ([*known, "--size-bands", "tiny"], "tiny"),
        ([*known, "--weights", "owner/model"], "is no folder of this machine: name a folder with --output"),
        ([*known, "--weights", weights, "--tile-overlap", "8"], "not cut into tiles"),
        ([*known, "--weights", weights, "--tile-size", "auto"], "auto"),
        (["--ground-truth", truth.parent, "--predictions", found, "--images", "."], "--images goes with"),
        (["--ground-truth", truth, "--predictions", truth], "is a whole COCO data set, not a list of detections"),
    ):
        with pytest.raises(InputError, match=message):
            run(*words)
    assert not (weights / "calibration.json").exists()
    with pytest.raises(SystemExit):
        run(*known, "--iou", "much")


def test_what_says_how_to_look_needs_a_model(data: tuple[Path, Path]) -> None:
    truth, found = data
    for words in (["--tile-size", "64"], ["--num-select", "5"], ["--full-image"]):
        with pytest.raises(InputError, match=rf"{words[0]} says how a model looks at images: give --weights too"):
            run("--ground-truth", truth, "--predictions", found, *words)


def test_our_warnings_are_one_line_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    _show_warning(CalibrationWarning("left out,\nmake it again"), CalibrationWarning, "file.py", 7)
    assert capsys.readouterr().err == "crossdino: warning: left out, make it again\n"
    _show_warning(DeprecationWarning("old"), DeprecationWarning, "file.py", 7)
    assert "file.py:7: DeprecationWarning: old" in capsys.readouterr().err


def test_a_training_that_goes_on_leaves_no_calibration_of_older_weights(
    tiny_config: Config, data: tuple[Path, Path]
) -> None:
    """`best/` is replaced as a whole; what was fitted to the weights before is gone with them."""
    config = with_changes(tiny_config, {"training.epochs": 1, "training.patience": 0})
    best = train(config).weights
    truth, found = data
    assert run("--ground-truth", truth, "--predictions", found, "--weights", best) == 0
    before = load_model(best)
    assert before.calibration is not None
    log = best.parent / "log.jsonl"
    train(with_changes(config, {"training.epochs": 2}), resume=True)
    evaluations = [line for line in map(json.loads, log.read_text().splitlines()) if line["kind"] == "eval"]
    after = load_model(best)  # a stale file would warn, and warnings are errors here
    replaced = any(line["best"] for line in evaluations[1:])
    assert replaced == (weights_digest(after) != weights_digest(before))
    assert (after.calibration is None) == replaced == (not (best / "calibration.json").exists())


def test_the_command_that_is_told_looks_at_images_as_the_fit_did() -> None:
    own = InferenceConfig(tile_overlap=64, full_image=True)
    assert _as_options(own, own) == []
    other = dataclasses.replace(own, short_side=320, tile_size=128, full_image=False)
    words = [word for part in _as_options(other, own) for word in part.split()]
    assert words == ["--short-side", "320", "--tile-size", "128", "--tile-overlap", "64", "--no-full-image"]
    given = build_parser().parse_args(["predict", "image.png", "--output", "out", "--weights", "w", *words])
    # Without its overlap, tiles of 128 px would overlap by 32.
    assert choose_tiles(own, given.tile_size, given.tile_overlap) == (128, 64)
