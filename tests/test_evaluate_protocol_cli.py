"""`crossdino evaluate` by a benchmark's protocol: prepared folders, their files, models, patches, and mistakes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from crossdino.benchmarks import BENCHMARKS
from crossdino.checkpoints import save_model
from crossdino.cli import main
from crossdino.config import Config
from crossdino.evaluation.protocols import evaluate_protocol
from crossdino.evaluation.sodad import merge_patches
from crossdino.exchange import write_results
from crossdino.models.detector import CrossDINO
from crossdino.preparation.prepare import prepare_benchmark
from tests.raw_datasets import make_visdrone, make_widerperson
from tests.raw_sodad import make_sodad


@pytest.fixture(scope="module")
def visdrone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("visdrone")
    return prepare_benchmark("visdrone", make_visdrone(folder / "raw"), folder / "prepared").output


@pytest.fixture(scope="module")
def sodad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sodad")
    return prepare_benchmark("sodad", make_sodad(folder / "raw"), folder / "prepared").output


def make_weights(folder: Path, benchmark: str, num_classes: int | None = None) -> Path:
    """A model folder with random weights for the classes of a benchmark, or the first ones of these."""
    torch.manual_seed(0)
    small: dict[str, Any] = {
        "backbone": "test_efficientnet",
        "num_feature_levels": 3,
        "hidden_dim": 32,
        "num_heads": 2,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "feedforward_dim": 32,
        "num_queries": 20,
    }
    names = tuple(BENCHMARKS[benchmark].categories.values())[:num_classes]
    model = CrossDINO(dataclasses.replace(Config().model, **small, class_names=names))
    model.inference = dataclasses.replace(model.inference, short_side=64, long_side=128, num_select=30)
    save_model(model, folder, category_ids=tuple(BENCHMARKS[benchmark].categories)[:num_classes])
    return folder


def run(*words: object) -> int:
    return main(["evaluate", *map(str, words)])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def shifted(annotations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Detections near the objects, nine of ten, each with its own score."""
    return [
        {
            "image_id": one["image_id"],
            "category_id": one["category_id"],
            "bbox": [one["bbox"][0] + place % 3, *one["bbox"][1:]],
            "score": 0.9 - place / 1000,
        }
        for place, one in enumerate(annotations)
        if place % 10
    ]


def test_a_prepared_folder_brings_its_protocol_and_its_split(
    visdrone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = make_weights(tmp_path / "weights", "visdrone")
    found, numbers = tmp_path / "found.json", tmp_path / "numbers.json"
    words = ["--weights", weights, "--json", numbers, "--device", "cpu"]
    assert run("--ground-truth", visdrone, "--split", "test", *words, "--predictions-out", found) == 0
    printed = capsys.readouterr().out
    assert "AP_vt" in printed and "visdrone, split test-dev" in printed and "awning-tricycle" in printed
    result = read(numbers)
    assert result["protocol"] == "visdrone" and result["settings"]["num_select"] == 30
    origin = result["provenance"]
    assert (origin["benchmark"], origin["split"], origin["short_side"]) == ("visdrone", "test-dev", 64)
    truth = visdrone / "annotations" / "test-dev.json"
    expected = evaluate_protocol("visdrone", truth, found).to_dict()["metrics"]
    assert result["metrics"] == expected
    # The same by the split's own name, and from the files.
    assert run("--ground-truth", visdrone, "--split", "test-dev", "--predictions", found, "--json", numbers) == 0
    assert read(numbers)["metrics"] == expected
    assert run("--ground-truth", truth, "--predictions", found, "--json", numbers) == 0
    assert read(numbers)["metrics"] == expected and read(numbers)["provenance"]["split"] == "test-dev"
    # With bands of one's own too; and the numbers alone on the standard output.
    capsys.readouterr()
    words = ["--ground-truth", visdrone, "--split", "test-dev", "--predictions", found, "--json", "-"]
    assert run(*words, "--max-detections", 200) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["max_detections"] == 200
    assert run(*words) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["metrics"] == expected and "AP_vt" in output.err


def test_own_bands_and_caps_go_before_the_data_s_protocol(visdrone: Path, tmp_path: Path) -> None:
    truth = visdrone / "annotations" / "val.json"
    (tmp_path / "found.json").write_text(json.dumps(shifted(read(truth)["annotations"])))
    words = ["--ground-truth", truth, "--predictions", tmp_path / "found.json", "--json", tmp_path / "numbers.json"]
    assert run(*words, "--size-bands", "tiny=0-16") == 0
    result = read(tmp_path / "numbers.json")
    assert "protocol" not in result and list(result["by_size"]) == ["tiny"] and result["ap"] > 0
    assert run(*words) == 0
    assert read(tmp_path / "numbers.json")["protocol"] == "visdrone"
    assert run(*words, "--protocol", "coco") == 0
    assert list(read(tmp_path / "numbers.json")["metrics"])[:4] == ["AP", "AP50", "AP75", "AP_S"]


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_text_files_of_the_toolkit_are_detections(visdrone: Path, tmp_path: Path, suffix: str) -> None:
    truth = read(visdrone / "annotations" / "val.json")
    found = shifted(truth["annotations"])
    place = tmp_path / f"results{suffix}"
    write_results(found, place, "visdrone", truth)
    words = ["--ground-truth", visdrone, "--predictions", place, "--json", tmp_path / "numbers.json"]
    for protocol in ("visdrone", "visdrone-official"):
        assert run(*words, "--protocol", protocol) == 0
        expected = evaluate_protocol(protocol, truth, sorted(found, key=lambda one: (one["image_id"], -one["score"])))
        assert expected.metrics["AP"] > 0.1
        assert read(tmp_path / "numbers.json")["metrics"] == expected.to_dict()["metrics"]


def test_patches_are_merged_and_measured_on_the_original_images(
    sodad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sodad / "annotations"
    patches, originals = read(folder / "test.json"), read(folder / "test_originals.json")
    found = shifted(patches["annotations"])
    (tmp_path / "found.json").write_text(json.dumps(found))
    expected = evaluate_protocol("sodad", originals, merge_patches(found, patches)).to_dict()["metrics"]
    assert expected["AP"] is not None and expected["AP"] > 0.1
    words = ["--predictions", tmp_path / "found.json", "--json", tmp_path / "numbers.json"]
    by_hand = ["--protocol", "sodad", "--ground-truth", folder / "test_originals.json"]
    for truth in (
        ["--ground-truth", sodad, "--split", "test"],
        ["--ground-truth", folder / "test.json"],
        [*by_hand, "--patches", folder / "test.json"],
    ):
        assert run(*words, *truth) == 0
        result = read(tmp_path / "numbers.json")
        assert result["protocol"] == "sodad" and result["metrics"] == expected
        assert result["num_images"] == len(originals["images"])
    # A model looks at the patches.
    weights = make_weights(tmp_path / "weights", "sodad")
    words = ["--ground-truth", sodad, "--split", "test", "--json", tmp_path / "numbers.json", "--device", "cpu"]
    assert run(*words, "--weights", weights, "--predictions-out", tmp_path / "found.json") == 0
    assert {one["image_id"] for one in read(tmp_path / "found.json")} <= {one["id"] for one in patches["images"]}
    metrics = read(tmp_path / "numbers.json")["metrics"]
    assert run(*words[:-2], "--predictions", tmp_path / "found.json") == 0
    assert read(tmp_path / "numbers.json")["metrics"] == metrics
    assert "sodad, split test" in capsys.readouterr().out


def test_patches_by_another_protocol_are_images(sodad: Path, tmp_path: Path) -> None:
    patches = read(sodad / "annotations" / "test.json")
    found = shifted(patches["annotations"])
    (tmp_path / "found.json").write_text(json.dumps(found))
    words = ["--predictions", tmp_path / "found.json", "--json", tmp_path / "numbers.json"]
    for truth in (
        ["--ground-truth", sodad, "--split", "test"],
        ["--ground-truth", sodad / "annotations" / "test.json"],
    ):
        assert run(*words, *truth, "--protocol", "coco") == 0
        expected = evaluate_protocol("coco", patches, found)
        assert expected.metrics["AP"] > 0.1
        assert read(tmp_path / "numbers.json")["metrics"] == expected.to_dict()["metrics"]
        assert run(*words, *truth, "--size-bands", "small=0-32") == 0
        result = read(tmp_path / "numbers.json")
        assert (result["ap"], result["num_images"]) == (pytest.approx(expected.metrics["AP"]), len(patches["images"]))


def test_classes_that_the_model_does_not_know_are_told(
    visdrone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = make_weights(tmp_path / "weights", "visdrone", num_classes=8)
    words = ["--ground-truth", visdrone, "--weights", weights, "--device", "cpu", "--json", tmp_path / "numbers.json"]
    assert run(*words) == 0
    assert "the model knows 8 of the 10 classes: objects of bus, motor count as missed" in capsys.readouterr().out
    assert read(tmp_path / "numbers.json")["by_class"]["motor"]["AP"] == 0


def test_no_result_is_written_over_what_it_was_made_of(
    sodad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = sodad / "annotations"
    found = tmp_path / "found.json"
    found.write_text(json.dumps(shifted(read(annotations / "test.json")["annotations"])))
    inputs = (found, annotations / "test.json", annotations / "test_originals.json")
    before = [path.read_bytes() for path in inputs]
    words = ["--ground-truth", sodad, "--split", "test"]
    for path in inputs:
        assert run(*words, "--predictions", found, "--json", path) == 2
        assert f"{path} would replace {path}, which is read" in capsys.readouterr().err
    weights = make_weights(tmp_path / "weights", "sodad")
    of_model = [*words, "--weights", weights, "--device", "cpu"]
    assert run(*of_model, "--predictions-out", annotations / "test.json") == 2
    assert run(*of_model, "--predictions-out", tmp_path / "new.json", "--json", tmp_path / "new.json") == 2
    assert "two results would be written to" in capsys.readouterr().err
    assert [path.read_bytes() for path in inputs] == before
    assert not (tmp_path / "new.json").exists()


def test_mistakes_are_told_with_their_remedy(
    visdrone: Path, sodad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = visdrone / "annotations" / "val.json"
    (tmp_path / "found.json").write_text("[]")
    alone = tmp_path / "alone.json"
    alone.write_text((sodad / "annotations" / "test.json").read_text())
    raw = make_visdrone(tmp_path / "raw")
    raw_persons, raw_sodad = make_widerperson(tmp_path / "persons"), make_sodad(tmp_path / "sodad")
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "9_x.txt").touch()
    found = ["--predictions", tmp_path / "found.json"]
    for words, message in [
        (["--ground-truth", truth, "--protocol", "visdron"], "there is no protocol 'visdron'; did you mean 'visdrone'"),
        (
            ["--ground-truth", truth, "--protocol", "aitod", "--max-detections", 9],
            "--max-detections and --protocol aitod",
        ),
        (["--ground-truth", truth, "--protocol", "coco", "--size-bands", "a=0-9"], "--size-bands and --protocol coco"),
        (
            ["--ground-truth", visdrone, "--split", "test-challenge"],
            "has no split 'test-challenge', only 'train', 'val'",
        ),
        (
            ["--ground-truth", truth, "--patches", alone, "--protocol", "visdrone"],
            "patches belong to the protocol sodad",
        ),
        (["--ground-truth", alone], "alone_originals.json is not there: give the truth of the large images"),
        (["--ground-truth", raw], "as it is downloaded: run `crossdino prepare visdrone"),
        (["--ground-truth", truth, "--split", "test"], "--split goes with a data set that has splits"),
        (["--ground-truth", visdrone, "--predictions", texts], "9_x.txt is of no image of"),
        (["--ground-truth", visdrone, "--predictions", texts], "annotations/val.json: give the ground truth of the"),
        (["--ground-truth", raw_persons], "is WiderPerson as it is downloaded: run `crossdino prepare widerperson"),
        (["--ground-truth", raw_sodad], "is SODA-D as it is downloaded: run `crossdino prepare sodad"),
        (["--ground-truth", truth, "--protocol", "widerperson"], "categor"),
    ]:
        assert run(*found, *words) == 2, words
        assert message in capsys.readouterr().err


def test_each_file_is_read_once_and_messages_still_name_it(
    visdrone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, found, broken = visdrone / "annotations" / "val.json", tmp_path / "found.json", tmp_path / "broken.json"
    found.write_text(json.dumps(shifted(read(truth)["annotations"])))
    read_files: list[str] = []
    load = json.load

    def counted(file: Any, **settings: Any) -> Any:
        read_files.append(Path(file.name).name)
        return load(file, **settings)

    monkeypatch.setattr(json, "load", counted)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("read by another way"))
    for words in ([], ["--protocol", "visdrone-official"], ["--max-detections", 50]):
        read_files.clear()
        assert run("--ground-truth", truth, "--predictions", found, *words) == 0
        assert sorted(read_files) == ["found.json", "val.json"]
    monkeypatch.undo()
    for content, message in [
        ("[{", "broken.json is not JSON"),
        ('[{"image_id": 1}]', "broken.json: detection number 0"),
        (json.dumps([shifted(read(truth)["annotations"])[0] | {"image_id": -5}]), f"-5, which is not in {truth}"),
    ]:
        broken.write_text(content)
        assert run("--ground-truth", truth, "--predictions", broken) == 2
        assert message in capsys.readouterr().err
    truth = tmp_path / "truth.json"
    truth.write_text('{"images": [{"id": 1}], "annotations": [{}], "categories": [{"id": 1}]}')
    assert run("--ground-truth", truth, "--predictions", found, "--protocol", "coco") == 2
    assert f"{truth}: annotation number 0" in capsys.readouterr().err


def test_data_without_images_measure_files_of_detections(tmp_path: Path) -> None:
    raw = make_visdrone(tmp_path / "raw")
    folder = prepare_benchmark("visdrone", raw, tmp_path / "prepared", images="none").output
    truth = folder / "annotations" / "val.json"
    (tmp_path / "found.json").write_text(json.dumps(shifted(read(truth)["annotations"])))
    words = ["--ground-truth", folder, "--predictions", tmp_path / "found.json", "--json", tmp_path / "numbers.json"]
    assert run(*words, "--split", "val") == 0
    expected = evaluate_protocol("visdrone", truth, tmp_path / "found.json").to_dict()["metrics"]
    assert read(tmp_path / "numbers.json")["metrics"] == expected


def test_compare_takes_patches_for_images_unless_the_protocol_merges_them(
    sodad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patches = read(sodad / "annotations" / "test.json")
    (tmp_path / "found.json").write_text(json.dumps(shifted(patches["annotations"])))
    words = ["compare", "--ground-truth", sodad, "--split", "test", "--predictions", tmp_path / "found.json"]
    words += ["--resamples", 100, "--workers", 1, "--json", tmp_path / "numbers.json"]
    for own, kind in ([], "originals"), (["--protocol", "coco"], "patches"):
        assert main([*map(str, words), *own]) == 0, capsys.readouterr().err
        of = patches if kind == "patches" else read(sodad / "annotations" / "test_originals.json")
        assert f"{len(of['images'])} images, " in capsys.readouterr().out
    assert main([*map(str, words[:2]), str(sodad / "annotations" / "test.json"), *map(str, words[3:])]) == 2
    assert "--split goes with a data set that has splits" in capsys.readouterr().err
