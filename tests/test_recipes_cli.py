"""`crossdino recipes`, and what `crossdino train --recipe` says about data and backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from crossdino import training
from crossdino.cli import main, models
from crossdino.config import Config
from crossdino.paper import PAPER, recipe_benchmark
from crossdino.recipes import RECIPES

ROOT = Path(__file__).parent.parent


def run(*words: Any) -> int:
    return main([str(word) for word in words])


def test_the_list_shows_the_numbers_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "--benchmark", "sodad") == 0
    output = capsys.readouterr().out
    assert "SODA-D, measured on test" in output and "AP_eS" in output
    (line,) = [line for line in output.splitlines() if "sodad_cross_dino_clap_strip_t" in line]
    assert line.split() == [
        *("sodad_cross_dino_clap_strip_t", "strip_mlp_t", "cctm", "boost", "0.1", "12"),
        *("1200", "x", "1200", "V", "32.0", "15.0"),
    ]
    assert "visdrone" not in output and "compact" not in output


def test_what_tables_contradict_stands_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "--benchmark", "coco") == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.split()[:1] == ["cross_dino_r50"]]
    assert line.split()[-4:] == ["50.1", "(50.0)", "33.1", "(32.6)"]
    assert sum("(" in line for line in lines) == 1


@pytest.mark.parametrize(("width", "left_out"), [(80, 5), (100, 2), (120, 1), (140, 0)])
def test_names_and_numbers_are_whole_on_a_narrow_terminal(
    width: int, left_out: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "make_console", lambda: Console(width=width, highlight=False))
    assert run("recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width and not any("…" in line for line in lines)
    for name in RECIPES:
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        for row in (row for row in PAPER if row.recipe == name):
            assert f"{row.metrics['AP']:.{2 if 'mMR' in row.metrics else 1}f}" in line
    told = [line.partition(":")[2].split(",") for line in lines if line.startswith("not shown in ")]
    assert max(map(len, told), default=0) == left_out


def test_every_recipe_is_listed_under_its_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    listed: list[str] = []
    for benchmark in ("coco", "widerperson", "visdrone", "aitod", "sodad"):
        assert run("recipes", "--benchmark", benchmark, "--json") == 0
        described = json.loads(capsys.readouterr().out)
        assert {entry["benchmark"] for entry in described} == {benchmark}
        listed += [entry["recipe"] for entry in described]
    assert sorted([*listed, "compact"]) == sorted(RECIPES)


def test_json_holds_every_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "--json", tmp_path / "recipes.json") == 0
    assert capsys.readouterr().out == ""
    described = {entry["recipe"]: entry for entry in json.loads((tmp_path / "recipes.json").read_text())}
    assert list(described) == list(RECIPES)
    assert sum(len(entry["paper"]) for entry in described.values()) == len(PAPER)
    rows = described["widerperson_cross_dino_swin_t"]["paper"]
    assert [row["metrics"] for row in rows] == [{"AP": 93.93, "Recall": 99.65, "mMR": 37.88}]
    entry = described["aitod_cross_dino_clap_strip_t_1200"]
    assert (entry["beta"], entry["batch_size"], entry["num_select"], entry["test_short_side"]) == (0.05, 2, 900, 1200)
    assert described["compact"]["paper"] == [] and described["dino_r50"]["beta"] is None


def test_docs_hold_the_table_as_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", "--markdown") == 0
    printed = capsys.readouterr().out.strip()
    assert printed.count("| `") == len(RECIPES)
    # Made by `crossdino recipes --markdown`.
    assert printed in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--benchmark", "aitd"], "unknown benchmark 'aitd'; did you mean 'aitod'?"),
        (["--benchmark", "kitti"], "choose one of coco, visdrone, aitod, sodad, widerperson"),
        (["--json", "no/folder.json"], "cannot write no/folder.json"),
        (["--json", "--markdown"], "give either --json or --markdown"),
        (["--show", "compact", "--benchmark", "coco"], "--show prints one recipe"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes", *words) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and output.out == ""


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """What `train` was called with, instead of a training."""
    configs: list[Config] = []
    monkeypatch.setattr(training, "train", lambda config, **_: configs.append(config))
    return configs


def prepared_as(folder: Path, benchmark: str) -> Path:
    (folder / "benchmark.json").write_text(json.dumps({"benchmark": benchmark, "format": 1}))
    return folder


@pytest.mark.parametrize("name", ["sodad_dino_r50", "dino_r50", "visdrone_dino_r50", "widerperson_dino_r50"])
def test_a_recipe_of_another_benchmark_is_refused(
    name: str, tmp_path: Path, trained: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    data = prepared_as(tmp_path, "aitod")
    for source in (data, data / "data.yaml"):
        assert run("train", "--recipe", name, "--data", source, "--output", tmp_path / "run") == 2
        message = capsys.readouterr().err
        assert f"recipe {name} is for " in message and "was prepared as AI-TOD" in message
        assert "crossdino recipes --benchmark aitod" in message and f"--show {name}" in message
    assert trained == []
    # What the message proposes.
    assert run("recipes", "--show", name) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert run("train", "--config", tmp_path / "mine.yaml", "--data", data, "--output", tmp_path / "run") == 0
    assert trained[0].data.source == str(data) and trained[0].name == name


@pytest.mark.parametrize("content", [None, "no JSON", "[]", '{"benchmark": "mine"}', '{"benchmark": ["coco"]}', "{}"])
def test_peoples_own_data_take_any_recipe(content: str | None, tmp_path: Path, trained: list[Config]) -> None:
    if content is not None:
        (tmp_path / "benchmark.json").write_text(content)
    assert run("train", "--recipe", "sodad_dino_r50", "--data", tmp_path) == 0
    assert len(trained) == 1


def test_the_right_recipe_and_ours_go_with_prepared_data(tmp_path: Path, trained: list[Config]) -> None:
    for name in ("aitod_dino_r50", "compact"):
        assert run("train", "--recipe", name, "--data", prepared_as(tmp_path, "aitod")) == 0
    assert [config.name for config in trained] == ["aitod_dino_r50", "compact"]
    assert recipe_benchmark("compact") is None


def test_a_backbone_without_weights_is_told(
    tmp_path: Path, trained: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = {
        "aitod_dino_r50": "give --model.backbone_weights timm",
        "aitod_cross_dino_clap_strip_t": "give --model.backbone_weights FILE, an official Strip-MLP checkpoint",
    }
    for name, remedy in expected.items():
        assert run("train", "--recipe", name, "--data", tmp_path) == 0
        error = capsys.readouterr().err
        assert error.startswith("crossdino: warning: the backbone starts from random weights") and remedy in error
    for words in (["--model.backbone_weights", "timm"], ["--weights", "model"], ["--resume", "--output", tmp_path]):
        assert run("train", "--recipe", "aitod_dino_r50", "--data", tmp_path, *words) == 0
    assert run("train", "--recipe", "compact", "--data", tmp_path) == 0
    assert capsys.readouterr().err == "" and len(trained) == 6
