"""Where a result comes from: revisions of real repositories made here, models in folders, trainings."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from crossdino import provenance as module
from crossdino.config import write_yaml
from crossdino.provenance import PROVENANCE_FILE, git_revision, provenance, record_training, training_provenance
from crossdino.recipes import RECIPES
from crossdino.training import train


@pytest.fixture
def package(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder that stands for the installed package."""
    folder = tmp_path / "checkout" / "src" / "crossdino"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    monkeypatch.setattr(module, "_PACKAGE", folder)
    git_revision.cache_clear()
    yield folder
    git_revision.cache_clear()


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "user.name=Test", "-c", "user.email=test@example.org", "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_revision_of_a_checkout(package):
    checkout = package.parents[1]
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "first")
    head = git(checkout, "rev-parse", "HEAD")
    assert git_revision() == (head, False)
    git_revision.cache_clear()
    (checkout / "notes.txt").write_text("not of the package")
    assert git_revision() == (head, False)
    git_revision.cache_clear()
    (package / "__init__.py").write_text("changed = True\n")
    assert git_revision() == (head, True)


def test_a_package_installed_into_a_foreign_repository_has_no_revision(package):
    project = package.parents[1]
    git(project, "init", "-q")
    (project / "own.py").write_text("")
    git(project, "add", "own.py")
    git(project, "commit", "-q", "-m", "the user's project")
    assert git_revision() == (None, None)


def test_without_a_repository_and_without_git(package, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(package.parents[2]))
    assert git_revision() == (None, None)
    git_revision.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert git_revision() == (None, None)
    assert provenance()["git"] is None


def test_of_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/crossdino", "evaluate", "--json", "x.json"])
    best = tmp_path / "run" / "best"
    best.mkdir(parents=True)
    write_yaml(RECIPES["visdrone_dino_r50"](), best / "config.yaml")
    (tmp_path / "run" / PROVENANCE_FILE).write_text(json.dumps({"git": "a" * 40}))
    look = dataclasses.make_dataclass("Look", ["num_select", "tile_size"])(900, 0)
    inference = dataclasses.make_dataclass("Inference", ["short_side", "long_side"])(1280, 1280)
    model = dataclasses.make_dataclass("Model", ["inference"])(inference)
    made = provenance(ground_truth=tmp_path / "val.json", split="val", benchmark="visdrone", weights=best, model=model,
                      look=look)  # fmt: skip
    assert json.loads(json.dumps(made)) == made
    expected = {
        "command": ["crossdino", "evaluate", "--json", "x.json"],
        "ground_truth": str(tmp_path / "val.json"),
        "split": "val",
        "benchmark": "visdrone",
        "predictions": None,
        "weights": str(best),
        "name": "visdrone_dino_r50",
        "recipe": "visdrone_dino_r50",
        "epochs": 12,
        "training_git": "a" * 40,
        "short_side": 1280,
        "long_side": 1280,
        "num_select": 900,
        "tile_size": 0,
    }
    assert {key: made[key] for key in expected} == expected
    assert set(made) == {*expected, "crossdino", "git", "git_dirty", "date"}


def test_weights_that_are_no_folder_have_no_training():
    made = provenance(weights="somebody/some-model")
    assert (made["name"], made["recipe"], made["epochs"], made["training_git"]) == (None, None, None, None)
    assert made["weights"] == "somebody/some-model"


def test_a_renamed_training_keeps_its_recipe(tmp_path):
    best = tmp_path / "run" / "best"
    best.mkdir(parents=True)
    write_yaml(dataclasses.replace(RECIPES["aitod_dino_r50"](), name="second try"), best / "config.yaml")
    record_training(tmp_path / "run", resumed=False, recipe="aitod_dino_r50")
    record_training(tmp_path / "run", resumed=True)
    made = provenance(weights=best)
    assert (made["name"], made["recipe"]) == ("second try", "aitod_dino_r50")


def test_a_training_keeps_its_first_revision(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "git_revision", lambda: ("1" * 40, False))
    record_training(tmp_path, resumed=False)
    monkeypatch.setattr(module, "git_revision", lambda: ("2" * 40, True))
    record_training(tmp_path, resumed=True)
    content = training_provenance(tmp_path)
    assert content is not None
    assert (content["git"], content["git_dirty"]) == ("1" * 40, False)
    assert [(one["git"], one["git_dirty"]) for one in content["resumed"]] == [("2" * 40, True)]
    record_training(tmp_path, resumed=False)
    begun_anew = training_provenance(tmp_path)
    assert begun_anew is not None
    assert (begun_anew["git"], begun_anew["resumed"]) == ("2" * 40, [])
    # A training of before this file was written is continued.
    (tmp_path / PROVENANCE_FILE).unlink()
    record_training(tmp_path, resumed=True)
    assert training_provenance(tmp_path) == begun_anew | {"date": training_provenance(tmp_path)["date"]}  # type: ignore[index]


def test_train_writes_it(tiny_config):
    config = dataclasses.replace(tiny_config, training=dataclasses.replace(tiny_config.training, epochs=1))
    output = Path(config.training.output)
    train(config, recipe="compact")
    first = training_provenance(output)
    assert first is not None
    assert (first["git"], first["git_dirty"]) == git_revision()
    assert (first["recipe"], first["resumed"]) == ("compact", [])
    longer = dataclasses.replace(config, training=dataclasses.replace(config.training, epochs=2))
    train(longer, resume=True)
    again = training_provenance(output)
    assert again is not None
    assert len(again["resumed"]) == 1
    assert {**again, "resumed": []} == first
