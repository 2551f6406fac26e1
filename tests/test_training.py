"""The training loop: resume, accumulation, schedules, safety of what is on disk."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from crossdino import training
from crossdino.checkpoints import load_model, save_model
from crossdino.config import Config, TrainingConfig, from_dict, read_yaml, with_changes, write_yaml
from crossdino.errors import InputError
from crossdino.losses.criterion import Criterion
from crossdino.models.detector import CrossDINO
from crossdino.training import epoch_order, learning_rate_factor, parameter_groups, train


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines if line["kind"] == kind]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def test_a_resumed_training_is_the_uninterrupted_one(tiny_config: Config, tmp_path: Path) -> None:
    config = with_changes(
        tiny_config,
        {
            "training.epochs": 3,
            "training.ema_decay": 0.9,
            "training.warmup_steps": 3,
            "training.drop_epochs": [2],
            "data.color_jitter": 0.3,
        },
    )
    train(config)
    whole = Path(config.training.output)
    parts = with_changes(config, {"training.output": str(tmp_path / "parts"), "training.epochs": 1})
    train(parts)
    # An interrupted second epoch has already left a record and half a line in the log.
    with (tmp_path / "parts" / "log.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "train", "step": 3, "epoch": 1, "loss": 99.0}) + '\n{"kind": "tr')
    result = train(with_changes(parts, {"training.epochs": 3}), resume=True)

    # Bit for bit: the same operations in the same order on the same numbers.
    assert records(tmp_path / "parts", "train") == records(whole, "train")
    for folder in ("best", "last"):
        expected, found = weights(whole / folder), weights(tmp_path / "parts" / folder)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert result.steps == 6 and result.epochs == 3
    assert result.evaluations == records(whole, "eval") == records(tmp_path / "parts", "eval")


def test_accumulated_gradients_are_those_of_the_large_batch(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients: list[list[torch.Tensor]] = []

    def record(optimizer: torch.optim.Optimizer, closure: None = None) -> None:
        groups = optimizer.param_groups
        gradients.append([p.grad.clone() for group in groups for p in group["params"] if p.grad is not None])

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    # The random denoising queries are drawn batch by batch, so they are left out.
    common = {"model.num_denoising": 0, "training.epochs": 1, "training.clip_norm": 0.0}
    for number, sizes in enumerate(((4, 1), (2, 2), (1, 4))):
        train(
            with_changes(
                tiny_config,
                {
                    **common,
                    "training.batch_size": sizes[0],
                    "training.gradient_accumulation": sizes[1],
                    "training.output": str(tmp_path / str(number)),
                },
            )
        )
    assert len(gradients) == 3
    for accumulated in gradients[1:]:
        for expected, found in zip(gradients[0], accumulated, strict=True):
            # float32 sums in another order; gradients here are of the size 0.01 to 10
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert records(tmp_path / "1", "train")[0]["loss"] == pytest.approx(
        records(tmp_path / "0", "train")[0]["loss"], rel=1e-4
    )


def test_training_learns_and_keeps_the_best(tiny_config: Config) -> None:
    config = with_changes(tiny_config, {"training.epochs": 4, "training.learning_rate": 3e-3})
    result = train(config)
    losses = [record["loss"] for record in records(result.output, "train")]
    assert losses[-1] < 0.97 * losses[0]
    evaluations = records(result.output, "eval")
    assert [record["epoch"] for record in evaluations] == [1, 2, 3, 4]
    best = json.loads((result.weights / "config.json").read_text())
    assert best["metrics"]["ap"] == result.best_ap == max(record["ap"] for record in evaluations)
    assert best["class_names"] == ["red", "blue"] and best["category_ids"] == [3, 7]
    assert best["inference"] == {"short_side": 64, "long_side": 1333, "num_select": 300}
    card = (result.weights / "README.md").read_text()
    assert f"| AP | {100 * result.best_ap:.1f} | 3 |" in card and "of the 8 training objects" in card
    assert str(tiny_config.data.train_annotations) not in card  # names, not the folders of this machine
    parts = records(result.output, "train")[0]
    assert parts["loss"] == pytest.approx(
        sum(parts[name] for name in ("class", "l1", "giou", "encoder", "denoising")), abs=1e-4
    )
    stored = from_dict(read_yaml(result.output / "config.yaml"))
    assert stored == dataclasses.replace(config, model=dataclasses.replace(config.model, class_names=("red", "blue")))
    assert {path.name for path in result.output.iterdir()} == {
        "best",
        "last",
        "config.yaml",
        "log.jsonl",
        "curves_loss.png",
        "curves_ap.png",
    }


def test_without_validation_data_the_last_epoch_is_the_best(tiny_config: Config) -> None:
    result = train(with_changes(tiny_config, {"data.val_annotations": None, "training.precision": "bf16"}))
    assert result.best_ap is None and result.evaluations == []
    assert all(torch.equal(weights(result.weights)[k], v) for k, v in weights(result.output / "last").items())
    assert json.loads((result.weights / "config.json").read_text())["metrics"] == {"epoch": 2}


def test_the_average_of_the_weights_is_evaluated_and_saved(tiny_config: Config) -> None:
    decay = 0.5
    history: list[torch.Tensor] = []
    original = torch.optim.AdamW.step

    def step(optimizer: Any, closure: None = None) -> None:
        original(optimizer)
        history.append(optimizer.param_groups[0]["params"][0].detach().clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        result = train(with_changes(tiny_config, {"training.ema_decay": decay, "training.learning_rate": 0.01}))
    # The first update starts the average; the n-th later one has the decay min(0.5, (1 + n) / (10 + n)).
    mean = history[0]
    for n, value in enumerate(history[1:], start=1):
        rate = min(decay, (1 + n) / (10 + n))
        mean = rate * mean + (1 - rate) * value
    model = load_model(result.output / "last")
    found = parameter_groups(model, tiny_config.training)[0]["params"][0]
    torch.testing.assert_close(found.detach(), mean, rtol=1e-6, atol=1e-7)  # float32 rounding of three averages
    assert (found.detach() - history[-1]).abs().max() > 1e-3


def test_stops_in_time_and_can_go_on(tiny_config: Config) -> None:
    config = with_changes(tiny_config, {"training.max_minutes": 1e-6, "training.epochs": 9})
    result = train(config)
    assert (result.epochs, result.steps) == (1, 1)
    assert (result.weights / "model.safetensors").is_file()
    assert train(config, resume=True).epochs == 2


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_names_the_images_and_breaks_nothing(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    result = train(with_changes(tiny_config, {"training.epochs": 1}))
    before = {path: path.read_bytes() for path in result.output.rglob("*.*") if path.is_file()}
    original = Criterion.forward

    def broken(self: Criterion, *arguments: Any) -> dict[str, torch.Tensor]:
        losses = original(self, *arguments)
        factor = torch.tensor(math.nan)
        if what == "gradient":  # finite, but its derivative is not
            factor = (0.0 * losses["loss"]).sqrt() + 1
        return {**losses, "loss": losses["loss"] * factor}

    monkeypatch.setattr(Criterion, "forward", broken)
    config = with_changes(tiny_config, {"training.epochs": 2})
    ids = [i + 1 for i in epoch_order(4, 0, 1)[:2]]
    with pytest.raises(InputError, match=rf"{what} is nan at step 3 .*ids {ids[0]}, {ids[1]};"):
        train(config, resume=True)
    after = {path: path.read_bytes() for path in before}
    changed = [path.name for path in before if before[path] != after[path]]
    assert changed == ["config.yaml"]  # the resumed training's: it differs in `epochs`


def test_a_failure_while_saving_leaves_the_old_checkpoint(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = torch.save, []

    def save(content: Any, path: Path) -> None:
        calls.append(path)
        original(content, path)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space"):
        train(tiny_config)
    output = Path(tiny_config.training.output)
    assert torch.load(output / "last" / "trainer.pt", weights_only=True)["epoch"] == 1
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    assert train(tiny_config, resume=True).steps == 4


def test_output_folder_rules(tiny_config: Config, tmp_path: Path) -> None:
    config = with_changes(tiny_config, {"training.epochs": 1})
    output = Path(config.training.output)
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no training to resume"):
        train(config, resume=True)
    train(config)  # a folder with other files is no obstacle
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(InputError, match="already holds a training.*--resume.*--overwrite"):
        train(config)
    with pytest.raises(InputError, match="exclude each other"):
        train(config, resume=True, overwrite=True)
    with pytest.raises(InputError, match=r"its model.num_queries is 20, not 21"):
        train(with_changes(config, {"model.num_queries": 21}), resume=True)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    train(with_changes(config, {"model.num_queries": 21}), overwrite=True)
    assert (output / "notes.txt").read_text() == "mine"
    assert load_model(output / "best").config.num_queries == 21
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        train(with_changes(config, {"training.output": str(tmp_path / "file")}))


def test_resuming_before_the_first_epoch_ended_starts_from_the_given_weights(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    donor = CrossDINO(dataclasses.replace(tiny_config.model, class_names=("red", "blue")))
    save_model(donor, tmp_path / "donor")
    config = with_changes(tiny_config, {"training.epochs": 1, "model.class_names": ["red", "blue"]})
    Path(config.training.output).mkdir()
    write_yaml(config, Path(config.training.output) / "config.yaml")  # all that an interrupted start leaves
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    result = train(config, resume=True, init_weights=tmp_path / "donor")
    assert all(torch.equal(weights(result.weights)[name], given) for name, given in donor.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training.epochs": 0}, "training.epochs is 0"),
        ({"training.batch_size": 0}, "training.batch_size is 0"),
        ({"training.ema_decay": 1.0}, "training.ema_decay is 1.0"),
        ({"training.learning_rate": -1.0}, "training.learning_rate is -1.0"),
        ({"data.train_annotations": None}, "no training data"),
        ({"data.train_annotations": "missing.json"}, "missing.json"),
        ({"model.backbone": "resnet19"}, "resnet19"),
        ({"data.horizontal_flip": 2.0}, "horizontal_flip"),
        ({"evaluation.size_bands": {"tiny": [8, 0]}}, "tiny"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(
    tiny_config: Config, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(with_changes(tiny_config, change))
    assert not Path(tiny_config.training.output).exists()


def test_starts_from_weights_with_other_classes(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(5)
    donor = CrossDINO(dataclasses.replace(tiny_config.model, class_names=tuple("abcde")))
    save_model(donor, tmp_path / "donor")
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    result = train(with_changes(tiny_config, {"training.epochs": 1}), init_weights=tmp_path / "donor")
    assert f"{tmp_path / 'donor'}: classes re-initialised, 2 of 2: red, blue" in capsys.readouterr().out
    found, given = load_model(result.weights).state_dict(), donor.state_dict()
    anew = [name for name in given if found[name].shape != given[name].shape]
    assert set(anew) == {"class_embed.weight", "class_embed.bias", "enc_class_embed.weight", "enc_class_embed.bias"} | {
        "label_enc.weight"
    }
    assert all(torch.equal(found[name], given[name]) for name in given if name not in anew)

    with pytest.raises(InputError, match=r"do not fit this model: .*linear1.weight is \(32, 32\)"):
        train(
            with_changes(tiny_config, {"model.feedforward_dim": 48, "training.output": str(tmp_path / "other")}),
            init_weights=tmp_path / "donor",
        )
    assert not (tmp_path / "other").exists()


def test_order_is_a_permutation_dealt_out_to_the_processes() -> None:
    whole = epoch_order(10, seed=3, epoch=0)
    assert sorted(whole) == list(range(10))
    assert whole == epoch_order(10, 3, 0)
    assert whole != epoch_order(10, 3, 1) and whole != epoch_order(10, 4, 0)
    parts = [epoch_order(10, 3, 0, rank, 4) for rank in range(4)]
    assert [len(part) for part in parts] == [3, 3, 3, 3]
    assert sorted(sum(parts, [])[:]) == sorted(whole + whole[:2])
    assert [part[0] for part in parts] == whole[:4]
    assert len(epoch_order(2, 0, 0, 4, 5)) == 1  # fewer images than processes


def test_learning_rate() -> None:
    settings = TrainingConfig(warmup_steps=4, drop_epochs=(2, 3), drop_factor=0.1)
    assert [learning_rate_factor(settings, 0, step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    after = [learning_rate_factor(settings, epoch, 100) for epoch in range(5)]
    np.testing.assert_allclose(after, [1, 1, 0.1, 0.01, 0.01])
    assert learning_rate_factor(TrainingConfig(drop_epochs=()), 50, 0) == 1.0


def test_parameter_groups(tiny_config: Config) -> None:
    model = CrossDINO(tiny_config.model)
    rest, backbone = parameter_groups(model, dataclasses.replace(tiny_config.training, backbone_learning_rate=3e-5))
    assert (rest["lr"], backbone["lr"]) == (1e-4, 3e-5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(parameter)].startswith("backbone.") for parameter in backbone["params"])
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    grouped = [names[id(parameter)] for parameter in rest["params"] + backbone["params"]]
    assert sorted(grouped) == sorted(trainable)


def test_the_normaliser_is_the_mean_number_of_objects_per_process() -> None:
    class TwoProcesses:
        """Stands for the first of two processes; the other one has 5 objects."""

        num_processes = 2
        device = torch.device("cpu")

        def reduce(self, count: torch.Tensor, reduction: str) -> torch.Tensor:
            assert reduction == "sum"
            return count + 5

    class Labels:
        def __init__(self, count: int) -> None:
            self.labels = torch.zeros(count)

    assert training._normaliser([Labels(2), Labels(1)], TwoProcesses()) == 4.0  # type: ignore[arg-type]
    TwoProcesses.reduce = lambda self, count, reduction: count  # type: ignore[method-assign]
    assert training._normaliser([Labels(0)], TwoProcesses()) == 1.0  # type: ignore[arg-type]
