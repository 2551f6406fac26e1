"""Trackers get what the training tells, are resumed, and cannot end a training."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crossdino.errors import InputError
from crossdino.tracking import Trackers, check_trackers, start_trackers

SETTINGS = {"name": "toy", "training": {"epochs": 2, "trackers": ["wandb"]}, "data": {"source": None}}


class Calls(list):
    """What was called on a stand-in module: (name, arguments, options)."""

    def function(self, name: str, result: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.append((name, arguments, options))
            return result(*arguments, **options) if result is not None else None

        return call

    def named(self, name: str) -> list[tuple[tuple, dict]]:
        return [(arguments, options) for called, arguments, options in self if called == name]


@pytest.fixture
def module(monkeypatch) -> Callable[..., types.ModuleType]:
    """Puts a module of that name with these contents where `import` finds it first."""

    def make(name: str, **contents: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__spec__ = ModuleSpec(name, None, origin="stand-in")
        for key, value in contents.items():
            setattr(made, key, value)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    return make


@pytest.fixture
def wandb(module, monkeypatch) -> Calls:
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    calls = Calls()
    run = types.SimpleNamespace(id="w-1", log=calls.function("log"), finish=calls.function("finish"))
    config = types.SimpleNamespace(update=calls.function("config"))
    module("wandb", init=calls.function("init", lambda **_: run), config=config)
    return calls


@pytest.fixture
def trackio(module) -> Calls:
    calls = Calls()
    run = types.SimpleNamespace(log=calls.function("log"), finish=calls.function("finish"))
    config = types.SimpleNamespace(update=calls.function("config"))
    module("trackio", init=calls.function("init", lambda **_: run), config=config)
    return calls


@pytest.fixture
def mlflow(module, monkeypatch) -> Calls:
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TAGS", "MLFLOW_NESTED_RUN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"):
        monkeypatch.setenv(name, "1")  # so that what the code sets is taken back after the test
    calls = Calls()
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="m-1"))
    validation = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=2)
    module(
        "mlflow",
        search_experiments=calls.function("search", lambda **_: []),
        create_experiment=calls.function("create", lambda **_: "7"),
        start_run=calls.function("start", lambda **_: run),
        log_params=calls.function("params"),
        log_metrics=calls.function("log"),
        end_run=calls.function("finish"),
        utils=types.SimpleNamespace(validation=validation),
    )
    return calls


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_the_numbers(tmp_path):
    trackers = start_trackers(["tensorboard", "tensorboard"], tmp_path, "toy", SETTINGS)
    trackers.log({"train/loss": 3.5, "val/ap": None, "val/ap_very tiny (<8)": 0.25}, 10)
    trackers.log({"train/loss": 2.5}, 20)
    # What was logged is there at once, for who looks while it trains.
    assert scalars(tmp_path / "tensorboard")["train/loss"] == [(10, 3.5), (20, 2.5)]
    trackers.finish()
    trackers.finish()
    shown = scalars(tmp_path / "tensorboard")
    assert shown == {"train/loss": [(10, 3.5), (20, 2.5)], "val/ap_very_tiny___8_": [(10, 0.25)]}
    # One run, with the settings as a text.
    assert len(list((tmp_path / "tensorboard").rglob("*tfevents*"))) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    training:\n      epochs: 2\n" in text


def test_resumed_tensorboard_forgets_the_steps_that_are_repeated(tmp_path):
    first = start_trackers(["tensorboard"], tmp_path, "toy", SETTINGS)
    for step in (10, 20, 30, 40):
        first.log({"loss": float(step)}, step)
    first.finish()
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which tell the second that they begin in
    # The last checkpoint was made at step 20.
    second = start_trackers(["tensorboard"], tmp_path, "toy", SETTINGS, 20)
    second.log({"loss": 31.0}, 30)
    second.finish()
    assert scalars(tmp_path / "tensorboard") == {"loss": [(10, 10.0), (20, 20.0), (30, 31.0)]}
    time.sleep(1.1)
    # From the beginning again in the same folder.
    start_trackers(["tensorboard"], tmp_path, "toy", SETTINGS, 0).finish()
    assert scalars(tmp_path / "tensorboard").get("loss", []) == []


def test_wandb_is_called_and_its_run_continued(tmp_path, wandb, monkeypatch):
    trackers = start_trackers(["wandb"], tmp_path, "toy", SETTINGS)
    trackers.log({"train/loss": 1.5}, 10)
    trackers.finish()
    assert wandb.named("init") == [((), {"project": "crossdino", "name": "toy", "dir": str(tmp_path)})]
    flat = {"name": "toy", "training.epochs": 2, "training.trackers": "['wandb']", "data.source": "None"}
    assert wandb.named("config") == [((flat,), {"allow_val_change": True})]
    assert wandb.named("log") == [(({"train/loss": 1.5},), {"step": 10})]
    assert len(wandb.named("finish")) == 1
    wandb.clear()
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    start_trackers(["wandb"], tmp_path, "toy", SETTINGS, 10).finish()
    options = wandb.named("init")[0][1]
    assert (options["id"], options["resume"], options["project"]) == ("w-1", "allow", "mine")
    assert not wandb.named("config")
    # From the beginning: another run, whatever the folder remembers.
    start_trackers(["wandb"], tmp_path, "toy", SETTINGS, 0).finish()
    assert "id" not in wandb.named("init")[1][1]


def test_trackio_is_called_and_its_run_continued(tmp_path, trackio):
    trackers = start_trackers(["trackio"], tmp_path, "toy", SETTINGS)
    trackers.log({"train/loss": 1.5}, 10)
    trackers.finish()
    options = trackio.named("init")[0][1]
    # trackio takes runs of one name for the same: two trainings of one recipe must not be mixed up.
    assert options["project"] == "crossdino" and options["name"].startswith("toy 2")
    assert trackio.named("log") == [(({"train/loss": 1.5},), {"step": 10})]
    start_trackers(["trackio"], tmp_path, "toy", SETTINGS, 10).finish()
    assert trackio.named("init")[1][1] == {**options, "resume": "allow"}


def test_mlflow_is_called_and_its_run_continued(tmp_path, mlflow):
    trackers = start_trackers(["mlflow"], tmp_path, "toy", SETTINGS)
    trackers.log({"train/loss": 1.5, "val/ap": None}, 10)
    trackers.finish()
    assert mlflow.named("create")[0][1]["name"] == "crossdino"
    assert mlflow.named("start")[0][1]["run_name"] == "toy" and mlflow.named("start")[0][1]["run_id"] is None
    stored: dict[str, Any] = {}
    for (parameters,), _ in mlflow.named("params"):
        stored |= parameters
    assert stored["training.epochs"] == 2 and len(stored) == 4
    assert mlflow.named("log") == [(({"train/loss": 1.5},), {"step": 10})]
    assert len(mlflow.named("finish")) == 1
    mlflow.clear()
    # Its parameters cannot be changed, so they are not sent again.
    start_trackers(["mlflow"], tmp_path, "toy", {"training": {"epochs": 3}}, 10).finish()
    assert mlflow.named("start")[0][1]["run_id"] == "m-1" and not mlflow.named("params")


def test_a_tracker_that_fails_is_left_out_and_says_why_once(tmp_path, wandb, trackio):
    trackers = start_trackers(["wandb", "trackio", "tensorboard"], tmp_path, "toy", SETTINGS)

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nand a long trace")

    sys.modules["wandb"].init().log = broken
    with pytest.warns(RuntimeWarning, match=r"wandb failed \(no route to host\); the training goes on") as told:
        trackers.log({"loss": 1.0}, 1)
    assert len(told) == 1
    trackers.log({"loss": 2.0}, 2)  # a second warning would be an error here
    sys.modules["trackio"].init().finish = broken
    with pytest.warns(RuntimeWarning, match="trackio failed"):
        trackers.finish()
    assert scalars(tmp_path / "tensorboard") == {"loss": [(1, 1.0), (2, 2.0)]}
    assert len(trackio.named("log")) == 2


def test_a_tracker_that_cannot_start(tmp_path, wandb, monkeypatch):
    def broken(**_: Any) -> None:
        raise RuntimeError("no API key configured")

    monkeypatch.setattr(sys.modules["wandb"], "init", broken)
    with pytest.raises(InputError, match=r"wandb cannot start \(no API key configured\)"):
        start_trackers(["tensorboard", "wandb"], tmp_path, "toy", SETTINGS)
    # A training that is under way goes on.
    with pytest.warns(RuntimeWarning, match="resuming without it"):
        trackers = start_trackers(["wandb", "tensorboard"], tmp_path, "toy", SETTINGS, 5)
    trackers.log({"loss": 1.0}, 6)
    trackers.finish()
    assert scalars(tmp_path / "tensorboard") == {"loss": [(6, 1.0)]}


def test_unknown_and_missing_trackers(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="'tensorbord' is unknown; did you mean tensorboard.*wandb, mlflow, trackio"):
        start_trackers(["tensorbord"], tmp_path, "toy", SETTINGS)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("wandb", "mlflow", "trackio"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / name).mkdir()  # W&B leaves a folder of its name where it ran: that is no package
        with pytest.raises(InputError, match=rf"{name} is not installed: pip install 'crossdino\[{name}\]'"):
            check_trackers([name])
    check_trackers([])
    Trackers([]).log({"loss": 1.0}, 1)
