"""The command line: what is printed, what is written, and that a mistake costs one line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from crossdino import training
from crossdino.cli import main, split_settings
from crossdino.config import Config, from_dict, read_yaml, to_dict, with_changes, write_yaml
from crossdino.errors import InputError
from crossdino.models.detector import CrossDINO
from crossdino.recipes import RECIPES, recipe


def run(*words: Any) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, dict[str, Any]]]:
    """What `training.train` was called with, instead of a training."""
    calls: list[tuple[Config, dict[str, Any]]] = []
    monkeypatch.setattr(training, "train", lambda config, **keywords: calls.append((config, keywords)))
    return calls


# --- mistakes ---


def mistakes(data: Path, weights: Path) -> list[tuple[list[Any], str]]:
    train = ["train", "--recipe", "compact", "--data", data, "--output", "OUT"]
    evaluate = ["evaluate", "--ground-truth", data / "val.json"]
    predict = ["predict", "--weights", weights, "--output", "OUT"]
    return [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        ([], "required: command"),
        (["train", "--recipe", "compcat"], "unknown recipe 'compcat'; did you mean 'compact'?"),
        (["train", "--data", data], "name a recipe"),
        ([*train, "--training.epoks", "3"], "unknown setting 'training.epoks'; did you mean 'training.epochs'"),
        ([*train, "--trianing.epochs=3"], "unknown setting 'trianing.epochs'; did you mean 'training.epochs'"),
        ([*train, "--training.epochs", "x"], "setting 'training.epochs': expected int, got x"),
        ([*train, "--training.epochs", "1.5"], "setting 'training.epochs': expected int, got 1.5"),
        ([*train, "--training.precision", "fp8"], "setting 'training.precision'"),
        ([*train, "--training.epochs"], "--training.epochs needs a value"),
        ([*train, "--training.epochs", "--resume"], "--training.epochs needs a value"),
        ([*train, "--training.output="], "--training.output needs a value"),
        ([*train, "--output", ""], "--output is empty"),
        (["train", "--resume"], "--resume needs the folder (--output)"),
        (["train", "--resume", "--output", "OUT"], "no training to resume in OUT"),
        ([*train, "--overwrit"], "unknown argument '--overwrit'; did you mean '--overwrite'"),
        ([*train, "--epochs", "3"], "unknown argument '--epochs'; did you mean '--training.epochs'"),
        ([*train, "--config", "no.yaml"], "cannot read the configuration file no.yaml"),
        ([*train, "--data", data / "train"], "holds no data set that is known"),
        ([*train, "--data", "nowhere"], "nowhere does not exist"),
        ([*train, "--show-batch", "0"], "0 must be at least 1"),
        ([*train, "--show-batch", "two"], "two must be a whole number"),
        (["train", "--recipe", "compact"], "no training data: give data.source (--data)"),
        ([*train, "--training.epochs", "0"], "training.epochs is 0"),
        ([*train, "--weights", "nowhere"], "no model folder nowhere"),
        ([*evaluate], "give either --predictions"),
        ([*evaluate, "--predictions", "no.json"], "no.json cannot be read"),
        ([*evaluate, "--predictions", data / "val.json"], "is a whole COCO data set, not a list of detections"),
        ([*evaluate, "--predictions", "no.json", "--json", "no/folder.json"], "cannot write no/folder.json"),
        ([*evaluate, "--predictions", "no.json", "--max-detections", "0"], "0 must be at least 1"),
        ([*evaluate, "--predictions", "no.json", "--size-bands", "tiny"], "tiny"),
        (["evaluate", "--predictions", "no.json"], "--ground-truth"),
        (["evaluate", "--ground-truth", data, "--predictions", "no.json", "--split", "test"], "no split 'test'"),
        (["evaluate", "--ground-truth", data, "--predictions", "no.json", "--images", "."], "--images goes with"),
        (["evaluate", "--ground-truth", "nowhere.yaml", "--predictions", "no.json"], "nowhere.yaml does not exist"),
        (["inspect"], "no data: give a folder"),
        (["inspect", "nowhere"], "nowhere does not exist"),
        (["inspect", data / "train"], "holds no data set that is known"),
        (["inspect", data / "train" / "1.png"], "1.png is no data set"),
        (["inspect", data, "--split", "tset"], "has no split 'tset', only train, val"),
        (["inspect", data, "--recipe", "compcat"], "unknown recipe 'compcat'; did you mean 'compact'?"),
        (["inspect", data, "--memory", "0"], "0 must be a number above 0"),
        (["inspect", data, "--memory", "much"], "much must be a number above 0"),
        (["inspect", data, "--outptu", "OUT"], "unknown argument '--outptu'; did you mean '--output'"),
        (["inspect", data, "--training.epoks", "3"], "unknown setting 'training.epoks'"),
        (["inspect", data, "--output", data / "train.json"], "train.json is a file; name a folder"),
        (["inspect", data, "--output", data / "train.json" / "x"], "cannot use "),
        (["inspect", data, "--json", "no/folder.json"], "cannot write no/folder.json"),
        (["inspect", data, "--no-trial", "--model.hidden_dim", "30"], "model.hidden_dim 30 must be a multiple"),
        ([*evaluate, "--weights", data], "is not a model folder"),
        ([*predict, "no.jpg"], "no image no.jpg"),
        ([*predict, data], "holds no image"),
        ([*predict, data / "val" / "1.png", "--threshold", "2"], "threshold is 2"),
        ([*predict, data / "val" / "1.png", "--json", "../x.json"], "must be a plain file name"),
        ([*predict, data / "val" / "1.png", "--device", "warp"], "cannot use --device warp"),
        ([*predict, data / "val" / "1.png", "--devices", "cpu,warp"], "cannot use --device warp"),
        ([*predict, data / "val" / "1.png", "--devices", "cpu,"], "--devices cpu,: leave no name empty"),
        ([*predict, data / "val" / "1.png", "--devices", "cpu", "--processes", "2"], "leave out --device and"),
        ([*predict, data / "val" / "1.png", "--processes", "0"], "--processes: 0 must be at least 1"),
        ([*predict, data / "val" / "1.png", "--workers", "2"], "--workers goes with --ray"),
        ([*predict, data / "val" / "1.png", "--threshold", "high"], "--threshold high is no number"),
        ([*predict, data / "val" / "1.png", "--threshold", "auto"], "the model has no calibration"),
        ([*predict, data / "val" / "1.png", "--format", "xml"], "unknown format 'xml'"),
        ([*predict, data / "val" / "1.png", "--bands", "1,x"], "--bands 1,x: give numbers"),
        ([*predict, data / "val" / "1.png", "--bands", "1,2"], "give one band (grey) or three"),
        ([*predict, data / "val" / "1.png", "--value-range", "5,2"], "give the value of black and a larger one"),
        ([*predict, data / "val" / "1.png", "--every-frame", "0"], "--every-frame: 0 must be at least 1"),
        ([*predict, data / "val" / "1.png", "--max-frames", "0"], "--max-frames: 0 must be at least 1"),
        ([*predict, data / "val" / "1.png", "--tile-overlap", "9"], "not cut into tiles: give a tile_size"),
        ([*predict, data / "val" / "1.png", "--tile-size", "auto"], "does not know how large its objects were"),
        ([*predict, data / "val" / "1.png", "--output", data / "val.json"], "val.json is a file; name a folder"),
        ([*predict, "https://example.com/a.jpg"], "is a URL"),
        ([*predict[:2], "nowhere", *predict[3:], data / "val" / "1.png"], "no model folder nowhere"),
        (["convert-weights", "dino.pth", "--output", "OUT", "--fusion", "cctn"], "--fusion: invalid choice: 'cctn'"),
        (["info", "compcat"], "unknown recipe 'compcat'"),
        (["recipes", "--show", "compcat"], "unknown recipe 'compcat'; did you mean 'compact'?"),
        (["info", "--size", "8", "8"], "both must be at least 32"),
    ]


def test_mistakes_are_one_line_and_write_nothing(
    tiny_data: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words, message in mistakes(tiny_data, weights):
        status = run(*words)
        output = capsys.readouterr()
        assert status == 2, words
        assert output.err.startswith("crossdino: error: ") and output.err.count("\n") == 1, output.err
        assert message in output.err, words
        assert list(tmp_path.iterdir()) == [], words


def test_the_console_command() -> None:
    """In a process of its own: status, stderr, and that nothing heavy is imported for it."""
    code = (
        "import sys; from crossdino.cli import main; s = main(sys.argv[1:]); print('torch' in sys.modules); sys.exit(s)"
    )
    for start, stdout in ((["-c", code], "False\n"), (["-m", "crossdino.cli"], "")):
        found = subprocess.run([sys.executable, *start, "train", "--recip", "x"], capture_output=True, text=True)
        assert found.returncode == 2
        assert found.stdout == stdout
        assert found.stderr == "crossdino: error: unknown argument '--recip'; did you mean '--recipe' or '--help'?\n"


def test_a_file_of_detections_is_measured_and_written_without_torch(tiny_data: Path, tmp_path: Path) -> None:
    truth = tiny_data / "val.json"
    found = [
        {key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.5}
        for entry in json.loads(truth.read_text())["annotations"]
    ]
    (tmp_path / "found.json").write_text(json.dumps(found))
    files = ("--ground-truth", str(truth), "--predictions", str(tmp_path / "found.json"))
    code = "import sys; from crossdino.cli import main; s = main(sys.argv[1:]); sys.exit(s or 'torch' in sys.modules)"
    for words in ((), ("--protocol", "coco")):
        words = ("evaluate", *files, *words, "--json", str(tmp_path / "out.json"))
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["metrics"]["AP"] == pytest.approx(1)


def test_interrupts_and_our_own_bugs(
    trained: list[Any], tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(error: BaseException) -> Any:
        def train(*_: Any, **__: Any) -> None:
            raise error

        return train

    words = ("train", "--recipe", "compact", "--data", tiny_data)
    monkeypatch.setattr(training, "train", raises(KeyboardInterrupt()))
    assert run(*words) == 130
    assert capsys.readouterr().err == "crossdino: interrupted\n"
    monkeypatch.setattr(training, "train", raises(PermissionError(13, "Permission denied", "/root/x")))
    assert run(*words) == 2
    assert capsys.readouterr().err == "crossdino: error: cannot use /root/x: Permission denied\n"
    monkeypatch.setattr(training, "train", raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):  # a bug of ours keeps its traceback
        run(*words)


def test_an_interrupted_training_says_where_it_goes_on(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C within the first step of four; after the next one it is saved, and `--resume` makes the other two."""
    write_yaml(tiny_config, tmp_path / "config.yaml")
    words = ["train", "--config", tmp_path / "config.yaml", "--training.trackers", "[]"]
    with monkeypatch.context() as patch:
        forward, calls = CrossDINO.forward, []

        def interrupted(*arguments: Any, **keywords: Any) -> Any:
            calls.append(keywords)
            if len(calls) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return forward(*arguments, **keywords)

        patch.setattr(CrossDINO, "forward", interrupted)
        assert run(*words) == 130
    assert capsys.readouterr().err == "crossdino: interrupted: saved after step 2; --resume continues\n"
    assert run(*words, "--resume") == 0
    assert "2 epochs, 4 updates" in capsys.readouterr().out


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--version"], ["--help"], ["train", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0
    output = capsys.readouterr().out
    assert output.startswith("crossdino ")
    assert "--training.gradient_accumulation" in output.replace("\n", "").replace(" ", "")


# --- configuration ---


def test_settings_come_from_recipe_then_file_then_command_line(
    trained: list[tuple[Config, dict[str, Any]]], tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "file.yaml").write_text(
        "name: mine\ntraining: {epochs: 7, learning_rate: 1e-3}\nmodel: {num_queries: 9}\n"
    )
    words = ["train", "--recipe", "compact", "--config", tmp_path / "file.yaml", "--data", tiny_data]
    words += ["--training.epochs", "3", "--training.drop-epochs=[1, 2]", "--data.quarter_turns", "false"]
    words += ["--evaluation.size_bands", "{tiny: [0, 8]}", "--training.learning_rate=2e-3", "--model.backbone_weights"]
    assert run(*words, "null", "--output", tmp_path / "out", "--weights", "w", "--overwrite") == 0
    ((config, keywords),) = trained
    expected = with_changes(
        recipe("compact"),
        {
            "name": "mine",
            "training.epochs": 3,
            "training.learning_rate": 0.002,
            "training.drop_epochs": (1, 2),
            "training.output": str(tmp_path / "out"),
            "model.num_queries": 9,
            "model.backbone_weights": None,
            "data.quarter_turns": False,
            "data.source": str(tiny_data),
            "evaluation.size_bands": {"tiny": (0.0, 8.0)},
        },
    )
    assert config == expected
    assert keywords == {"resume": False, "overwrite": True, "init_weights": "w", "recipe": "compact"}
    assert isinstance(config.training.epochs, int) and isinstance(config.evaluation.size_bands["tiny"], tuple)


def test_resume_starts_from_the_stored_configuration(
    trained: list[tuple[Config, dict[str, Any]]], tiny_config: Config, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    write_yaml(tiny_config, tmp_path / "run" / "config.yaml")
    assert run("train", "--output", tmp_path / "run", "--resume", "--training.epochs", 9) == 0
    keywords = {"resume": True, "overwrite": False, "init_weights": None, "recipe": None}
    assert trained == [(with_changes(tiny_config, {"training.epochs": 9}), keywords)]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_the_file(name: str, tmp_path: Path) -> None:
    config = recipe(name)
    write_yaml(config, tmp_path / "config.yaml")
    assert from_dict(read_yaml(tmp_path / "config.yaml")) == config
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: 3", "'training' is a section"),
        ("trainin: {epochs: 3}", "unknown setting 'trainin'"),
        ("training: {epochs: [1]}", "'training.epochs'"),
        ("- 1", "must hold sections"),
        ("a: [", "is not a YAML file"),
    ],
)
def test_bad_configuration_files(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(text)
    for words in (["train"], ["inspect", tmp_path]):
        assert run(*words, "--config", tmp_path / "c.yaml") == 2
        error = capsys.readouterr().err
        assert message in error and f"{tmp_path / 'c.yaml'}" in error and error.count("\n") == 1
    (tmp_path / "config.yaml").write_text(text)
    assert run("train", "--resume", "--output", tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error and f"{tmp_path / 'config.yaml'}" in error and error.count("\n") == 1


def test_values_keep_their_types() -> None:
    base = Config()
    with pytest.raises(InputError, match="expected int, got True"):
        with_changes(base, {"training.epochs": True})
    with pytest.raises(InputError, match="crop_range.*2 elements"):
        with_changes(base, {"data.crop_range": [1, 2, 3]})
    assert with_changes(base, {"training.learning_rate": 1}).training.learning_rate == 1.0
    assert with_changes(base, {"model.class_names": ["1", "no"]}).model.class_names == ("1", "no")
    assert with_changes(base, {"training.output": "3"}).training.output == "3"
    assert base == Config()


def test_split_settings() -> None:
    words = ["train", "--data", "d", "--training.lr-x=a=b", "--a.b", "-1", "--resume", "x.y"]
    assert split_settings(words) == (["train", "--data", "d", "--resume", "x.y"], {"training.lr_x": "a=b", "a.b": "-1"})


# --- the commands ---


def test_evaluate_a_file(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = json.loads((tiny_data / "val.json").read_text())
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in truth["annotations"]
    ]
    (tmp_path / "dets.json").write_text(json.dumps(perfect))
    words = ["evaluate", "--ground-truth", tiny_data / "val.json", "--predictions", tmp_path / "dets.json"]
    assert run(*words, "--json", tmp_path / "out.json", "--size-bands", "tiny=0-8,rest=8-100") == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["ap"] == 1.0 and result["by_size"]["rest"]["ap"] == 1.0
    assert list(result["by_size"]) == ["tiny", "rest"]
    assert "100.0" in capsys.readouterr().out


def measured(path: Path) -> dict[str, Any]:
    """The numbers of an evaluation; of its settings those that do not tell how a model looked at the images."""
    result = json.loads(path.read_text())
    assert result.pop("provenance")["ground_truth"]
    common = {name: result["settings"][name] for name in ("max_detections", "size_bands", "iou_thresholds")}
    return {**result, "settings": common}


def test_evaluate_takes_any_data_set(
    tiny_data: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder or a YAML file gives the numbers of its validation file."""
    (tmp_path / "data.yaml").write_text(
        f"path: {tiny_data}\ntrain: {{annotations: train.json}}\nval: {{annotations: val.json}}\n"
    )
    found = {}
    for name, truth in (("file", tiny_data / "val.json"), ("folder", tiny_data), ("yaml", tmp_path / "data.yaml")):
        words = ["evaluate", "--ground-truth", truth, "--json", tmp_path / "out.json"]
        assert run(*words, "--weights", weights, "--predictions-out", tmp_path / "dets.json") == 0
        found[name] = measured(tmp_path / "out.json")
        assert run(*words, "--predictions", tmp_path / "dets.json") == 0
        assert measured(tmp_path / "out.json") == found[name]
    assert found["file"] == found["folder"] == found["yaml"]
    assert "2 images: whole images, 5 detections kept per image; short side 64 px" in capsys.readouterr().out
    words = ["evaluate", "--ground-truth", tiny_data, "--weights", weights, "--split", "train"]
    assert run(*words, "--tile-size", 32, "--tile-overlap", 8) == 0
    assert "4 images in 36 tiles: tiles of 32 px" in capsys.readouterr().out


def test_show_batch(
    tiny_config: Config, tmp_path: Path, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    write_yaml(tiny_config, tmp_path / "config.yaml")
    words = ["train", "--config", tmp_path / "config.yaml", "--output", tmp_path / "out"]
    assert run(*words, "--show-batch") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'batch.jpg'}\n"
    with Image.open(tmp_path / "out" / "batch.jpg") as one:
        assert min(one.size) > 30
        size = one.size
    assert run(*words, "--show-batch", "2") == 0
    with Image.open(tmp_path / "out" / "batch.jpg") as two:
        assert two.width * two.height > size[0] * size[1]  # four images instead of two
    assert trained == [] and {path.name for path in (tmp_path / "out").iterdir()} == {"batch.jpg"}


def test_inspect_and_train_with_the_proposal(
    tiny_data: Path, tmp_path: Path, trained: list[tuple[Config, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way: what inspect writes is what train takes."""
    out = tmp_path / "plan"
    words = ["inspect", tiny_data, "--recipe", "compact", "--memory", "4", "--no-trial", "--training.epochs", 5]
    assert run(*words, "--output", out, "--json", tmp_path / "numbers.json") == 0
    text = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"inspect.png", "inspect.json", "proposal.yaml"}
    assert "images (without objects)" in text and "red" in text and "fewer than 10 objects in train" in text
    assert f"crossdino train --recipe compact --config {out / 'proposal.yaml'} --data {tiny_data}" in text
    report = json.loads((out / "inspect.json").read_text())
    assert report == json.loads((tmp_path / "numbers.json").read_text())
    train = json.loads((tiny_data / "train.json").read_text())
    splits = report["data"]["splits"]
    assert (splits["train"]["images"], splits["train"]["objects"]) == (4, len(train["annotations"]))
    assert splits["val"]["images_without_objects"] == 1
    # 64 x 64 pixels at the recipe's 448 would be enlarged seven times.
    assert report["proposal"]["changes"]["data.test_short_side"] == 128
    assert report["proposal"]["changes"]["training.epochs"] == 5
    with Image.open(out / "inspect.png") as picture:
        assert picture.width > 1000
    assert run("train", "--recipe", "compact", "--config", out / "proposal.yaml", "--data", tiny_data) == 0
    ((config, _),) = trained
    assert config == with_changes(recipe("compact"), {**report["proposal"]["changes"], "data.source": str(tiny_data)})


def test_inspect_prints_without_writing(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("inspect", tiny_data, "--split", "valid", "--no-trial", "--no-duplicates", "--memory", "9") == 0
    text = capsys.readouterr().out
    assert "--output DIR writes" in text and " val " in text and " train " not in text.split("classes")[0]
    files = ["--data.train_annotations", tiny_data / "train.json", "--data.val_annotations", tiny_data / "val.json"]
    assert run("inspect", *files, "--no-trial", "--memory", "0.5") == 0
    assert "not even this fits" in " ".join(capsys.readouterr().out.split())
    assert list(tmp_path.iterdir()) == []


def test_evaluate_a_model_gives_the_numbers_of_its_file(tiny_data: Path, weights: Path, tmp_path: Path) -> None:
    words = ["evaluate", "--ground-truth", tiny_data / "val.json"]
    outputs = ["--json", tmp_path / "a.json", "--predictions-out", tmp_path / "dets.json"]
    assert run(*words, "--weights", weights, *outputs, "--num-select", 9) == 0
    detections = json.loads((tmp_path / "dets.json").read_text())
    assert len(detections) == 2 * 9
    assert {entry["category_id"] for entry in detections} <= {3, 7}
    assert run(*words, "--predictions", tmp_path / "dets.json", "--json", tmp_path / "b.json") == 0
    assert measured(tmp_path / "a.json") == measured(tmp_path / "b.json")


def test_predict(weights: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    pixels = np.full((48, 96, 3), 80, np.uint8)
    for path in ("a/1.png", "a/1.jpg", "a/other.PNG"):
        Image.fromarray(pixels).save(tmp_path / path)
    (tmp_path / "a" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (tmp_path / "a" / "notes.txt").write_text("")
    out = tmp_path / "out"
    words = ["predict", "--weights", weights, "--output", out, "--threshold", "0", "--json", "found.json"]
    status = run(*words, tmp_path / "a", tiny_data / "val" / "*.png", tmp_path / "absent.png", tmp_path / "a" / "1.png")
    output = capsys.readouterr()
    assert status == 2
    errors = output.err.splitlines()
    assert len(errors) == 2 and "absent.png" in errors[0] and "broken.jpg" in errors[1]
    assert all(line.startswith("crossdino: error: ") for line in errors)

    result = json.loads((out / "found.json").read_text())
    names = [Path(image["file_name"]).name for image in result["images"]]
    assert names == ["1.jpg", "1.png", "other.PNG", "1.png", "2.png"]
    pictures = [image["picture"] for image in result["images"]]
    assert len(set(pictures)) == 5
    assert {path.name for path in out.iterdir()} == {*pictures, "found.json", "predictions.jsonl"}
    assert "broken.jpg" in output.out and "(left out)" in output.out  # told when it is met, and again at the end
    for image in result["images"]:
        with Image.open(out / image["picture"]) as picture:
            assert picture.width == image["width"]
    assert (result["images"][0]["width"], result["images"][0]["height"]) == (96, 48)
    assert result["categories"] == [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}]
    assert len(result["annotations"]) == 5 * 5
    assert [entry["id"] for entry in result["annotations"]] == list(range(1, 26))
    for entry in result["annotations"]:
        x, y, width, height = entry["bbox"]
        assert entry["area"] == pytest.approx(width * height)
        assert 0 <= entry["score"] <= 1 and x >= 0 and y >= 0
    # The file is COCO: taken for the ground truth, the same model finds all of it.
    words = ["evaluate", "--ground-truth", out / "found.json", "--weights", weights, "--images", "/"]
    assert run(*words, "--json", tmp_path / "numbers.json") == 0
    assert json.loads((tmp_path / "numbers.json").read_text())["ap"] == pytest.approx(1.0)


def test_predict_never_overwrites_its_input(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.full((40, 40, 3), 80, np.uint8)).save(tmp_path / "x.jpg")
    before = (tmp_path / "x.jpg").read_bytes()
    assert run("predict", "--weights", weights, "--output", tmp_path, tmp_path / "x.jpg") == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.jpg"]
    assert (tmp_path / "x.jpg").read_bytes() == before


def test_predict_writes_nothing_when_no_image_is_good(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jpg").write_bytes(b"")
    assert run("predict", "--weights", weights, "--output", tmp_path / "out", tmp_path / "x.jpg") == 2
    assert "x.jpg" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_predict_formats_warnings_and_going_on(
    weights: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", "--weights", weights, "--output", tmp_path / "out", tiny_data / "train"]
    words += ["--format", "csv,parquet,yolo", "--no-pictures", "--batch-size", 3]
    assert run(*words, "--threshold", "0.0001", "--tile-size", 40, "--tile-overlap", 8) == 0
    output = capsys.readouterr().out
    assert output.count(" objects\n") == 4 and "with a score of at least 0.0001 in 4 pictures" in output
    assert "warning: all places for detections are filled" in output and " and 1 more: " in output
    expected = {f"predictions{name}" for name in (".jsonl", ".csv", "_images.csv", ".parquet", "_images.parquet")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*expected, "labels"}
    assert run(*words, "--threshold", "0.0001", "--tile-size", 40, "--tile-overlap", 8) == 0
    output = capsys.readouterr().out
    assert "4 of 4 done before (--overwrite begins anew)" in output and "warning: " not in output
    assert run(*words, "--threshold", "0.5") == 2
    error = capsys.readouterr().err
    assert "threshold 0.0001 -> 0.5, tile_size 40 -> 0" in error and error.count("\n") == 1
    assert run(*words, "--threshold", "0.0001", "--no-pictures", "--overwrite", "--format", "none") == 0
    assert "predictions.jsonl" in capsys.readouterr().out.splitlines()[-1]


def predict_in_a_process(words: Sequence[Any]) -> subprocess.Popen[str]:
    """The command in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "crossdino.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_lines(process: subprocess.Popen[str], journal: Path, count: int) -> None:
    while not journal.is_file() or journal.read_bytes().count(b"\n") <= count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def num_alive(group: int) -> int:
    """The processes of a group that still run (ended ones whose parent has not asked for them do not)."""
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            states += [state] if int(its_group) == group else []
    return sum(state not in "ZX" for state in states)


def test_predict_goes_on_after_ctrl_c_and_kill(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ended by Ctrl-C with two processes, killed within a large picture; in the end as if nothing had been."""
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for number in range(40):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "in" / f"{number:02}.png")
    large = tmp_path / "z.png"
    Image.fromarray(rng.integers(0, 255, (1024, 1024, 3), dtype=np.uint8)).save(large)
    words = ["predict", "--weights", weights, tmp_path / "in", large, "--threshold", "0.01", "--tile-size", 64]
    # One by one: what a picture is batched with, and with it the last digit, depends on where the run was ended.
    words += ["--tile-overlap", 0, "--device", "cpu", "--batch-size", 1, "--output"]
    journal = tmp_path / "out" / "predictions.jsonl"

    process = predict_in_a_process([*words, tmp_path / "out", "--processes", 2])
    wait_for_lines(process, journal, 8)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "crossdino: stopping after what is at work; once more to end at once\n"
    assert "the same command goes on where it was" in out
    found = len(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"])
    assert 8 <= found < 41
    # Python's own watcher of shared things ends itself when it sees that we have.
    for _ in range(200):
        if not num_alive(process.pid):
            break
        time.sleep(0.05)
    assert num_alive(process.pid) == 0

    process = predict_in_a_process([*words, tmp_path / "out"])
    while not any(path.stat().st_size > 2000 for path in (tmp_path / "out").glob("unfinished/*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    assert f"{found} of 41 done before" in process.communicate()[0]

    forward, num_seen = CrossDINO.forward, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CrossDINO, "forward", lambda *given: (num_seen.append(1), forward(*given))[1])
        assert run(*words, tmp_path / "out") == 0
    assert "40 of 41 done before" in capsys.readouterr().out
    assert 0 < len(num_seen) < 256
    assert run(*words, tmp_path / "whole") == 0
    for name in ("predictions.json", "z.jpg", "07.jpg"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    from crossdino.interrupts import stop_requests

    before = signal.getsignal(number)
    with stop_requests("a notice") as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.wait(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(1)
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err == "a notice\n"


def test_info_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "compact", "--size", "512", "640") == 0
    output = capsys.readouterr().out
    assert "compact" in output and "64x80 32x40 16x20 8x10" in output
    assert run("recipes") == 0
    output = capsys.readouterr().out
    assert all(name in output for name in RECIPES)
    assert run("recipes", "--show", "compact") == 0
    assert from_dict(yaml.safe_load(capsys.readouterr().out)) == recipe("compact")  # as `> mine.yaml` would get it
