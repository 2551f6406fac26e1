"""The training loop: resume, accumulation, schedules, what is chosen as the best, safety of what is on disk."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from crossdino.checkpoints import load_model, save_model
from crossdino.config import Config, TrainingConfig, from_dict, read_yaml, with_changes, write_yaml
from crossdino.data import load_coco
from crossdino.data.dataset import DetectionDataset
from crossdino.errors import InputError
from crossdino.losses.criterion import Criterion
from crossdino.models.detector import CrossDINO
from crossdino.postprocessing import detections_to_coco
from crossdino.predictor import Predictor
from crossdino.training import detect_dataset, replay_failure, show_batch, train
from crossdino.training.schedule import epoch_order, learning_rate_factor, parameter_groups
from tests.conftest import draw_data

# What a clock and the memory say differs from run to run.
MEASURED = {"seconds", "ms", "images_per_second", "memory_mb"}


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in MEASURED} for line in lines if line["kind"] == kind]


def numbers(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name != "kind"}


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
    # Images with different numbers of objects: the micro-batches do not weigh the same.
    source = draw_data(tmp_path, "uneven", 4, [1, 5, 0, 2], seed=2)
    common = {"data.train_annotations": str(source), "training.epochs": 1, "training.clip_norm": 0.0}
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
    assert best["inference"] == {"short_side": 64, "long_side": 1333, "num_select": 300} | {
        "tile_size": 0,
        "tile_overlap": 64,
        "merge": "seam",
        "merge_iou": 0.5,
        "full_image": False,
        # The images' own size, at which objects are as large as they were in training; a third of it.
        "auto_tile_size": 64,
        "auto_tile_overlap": 21,
    }
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
        "metrics.csv",
        "curves.png",
        "provenance.json",
        "tensorboard",
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
    assert (result.epochs, result.steps) == (0, 1)
    assert (result.weights / "model.safetensors").is_file()
    assert [record["epoch"] for record in result.evaluations] == [0.5]
    result = train(config, resume=True)
    assert (result.epochs, result.steps) == (1, 2), "it goes on with the next step"
    assert [record["epoch"] for record in result.evaluations] == [0.5, 1]
    train(with_changes(config, {"training.max_minutes": 0.0, "training.epochs": 2}), resume=True)
    through = with_changes(tiny_config, {"training.output": f"{config.training.output}_through"})
    expected, found = weights(train(through).output / "last"), weights(result.output / "last")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    rows = list(csv.DictReader((result.output / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0.5", "1", "2"] and all(row["loss"] for row in rows)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_names_the_images_and_breaks_nothing(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    result = train(with_changes(tiny_config, {"training.epochs": 1}))
    # The trackers' files go on.
    kept = [path for path in result.output.rglob("*.*") if path.is_file() and "tensorboard" not in path.parts]
    before = {path: path.read_bytes() for path in kept}
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
    names = ", ".join(f"{number}.png \\(id {number}\\)" for number in ids)
    with pytest.raises(InputError, match=rf"{what} is nan at step 3 .*its images: {names};.*failure.pt"):
        train(config, resume=True)
    after = {path: path.read_bytes() for path in before}
    # The resumed training's configuration differs in `epochs`, and the code that goes on is noted.
    assert {path.name for path in before if before[path] != after[path]} == {"config.yaml", "provenance.json"}

    # The file computes the same step again, here without what broke it.
    monkeypatch.undo()
    losses = replay_failure(result.output / "failure.pt")
    assert all(math.isfinite(value) for value in losses.values()) and losses["gradient"] > 0
    train(config, resume=True)
    expected = records(result.output, "train")[-1]
    stored = torch.load(result.output / "failure.pt", weights_only=True)
    assert list(stored["images"]) == ids and stored["step"] == 2
    assert expected["step"] == 4  # the record is the mean over steps 3 and 4, the file holds step 3
    with pytest.raises(InputError, match="give a training's failure.pt"):
        replay_failure(result.output / "log.jsonl")


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
        ({"model.num_denoising": -1}, "model.num_denoising is -1"),
        ({"model.feedforward_dim": 0}, "model.feedforward_dim is 0"),
        ({"model.num_feature_levels": 9}, "64 px has no token at the coarsest.*stride is 2048 px"),
        ({"loss.beta": 0.0}, "loss.beta is 0.0"),
        ({"loss.giou_weight": -1.0}, "loss.giou_weight is -1.0"),
        ({"evaluation.num_select": 0}, "evaluation.num_select is 0"),
        ({"data.test_long_side": 63}, "data.test_long_side 63 is below data.test_short_side 64"),
        ({"training.best_metric": "ap tiny"}, "best_metric is 'ap tiny': choose one of auto, ap, .*ap small"),
        ({"training.trackers": ["tensorbord"]}, "tensorbord"),
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

    with pytest.raises(InputError, match=rf"is the folder of a training: name {result.output / 'best'}"):
        train(tiny_config, init_weights=result.output, overwrite=True)
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
    assert [epoch_order(10, 3, 0, rank, 4, num_done=4) for rank in range(4)] == [part[1:] for part in parts]


def test_learning_rate() -> None:
    settings = TrainingConfig(warmup_steps=4, drop_epochs=(2, 3), drop_factor=0.1)
    assert [learning_rate_factor(settings, 0, step, 9) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    after = [learning_rate_factor(settings, epoch, 100, 9) for epoch in range(5)]
    assert after == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    # Halfway down after half of the steps, at the end what was asked for.
    cosine = TrainingConfig(schedule="cosine", epochs=3, final_factor=0.2)
    found = [learning_rate_factor(cosine, step // 7, step, 7) for step in range(21)]
    assert found[0] == 1 and found[10] == pytest.approx(0.6) and found[20] == pytest.approx(0.2)
    assert found == sorted(found, reverse=True)


def test_parameter_groups(tiny_config: Config) -> None:
    model = CrossDINO(tiny_config.model)
    rest, backbone = parameter_groups(model, dataclasses.replace(tiny_config.training, backbone_learning_rate=3e-5))
    assert (rest["lr"], backbone["lr"]) == (1e-4, 3e-5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(parameter)].startswith("backbone.") for parameter in backbone["params"])
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    grouped = [names[id(parameter)] for parameter in rest["params"] + backbone["params"]]
    assert sorted(grouped) == sorted(trainable)


# --- continuing, stopping, choosing ---


def test_a_training_that_was_cut_off_within_an_epoch_continues_with_the_next_step(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_changes(
        tiny_config,
        {
            "training.batch_size": 1,
            "training.save_minutes": 0.0,
            "training.ema_decay": 0.9,
            "training.warmup_steps": 3,
            "data.color_jitter": 0.3,
            "data.mosaic": 0.5,
            "data.copy_paste": 0.5,
        },
    )
    through = with_changes(config, {"training.output": str(tmp_path / "through")})
    train(through)
    original, calls = torch.optim.AdamW.step, []

    def step(optimizer: Any, closure: None = None) -> None:
        calls.append(1)
        if len(calls) == 7:
            raise MemoryError
        original(optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(MemoryError):
            train(config)
    output = Path(config.training.output)
    stored = torch.load(output / "last" / "trainer.pt", weights_only=True)
    assert (stored["epoch"], stored["step"], stored["images_in_epoch"]) == (1, 6, 2)
    result = train(config, resume=True)
    assert (result.epochs, result.steps) == (2, 8)
    for folder in ("best", "last"):
        expected, found = weights(tmp_path / "through" / folder), weights(output / folder)
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert records(output, "eval") == records(tmp_path / "through", "eval")


def test_a_training_that_was_cut_off_in_its_evaluation_repeats_only_that(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossdino.training import evaluation

    def interrupted(*_: Any, **__: Any) -> None:
        raise MemoryError

    config = with_changes(tiny_config, {"training.save_minutes": 0.0})
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "average_precision", interrupted)
        with pytest.raises(MemoryError):
            train(config)
    original, calls = torch.optim.AdamW.step, []

    def step(optimizer: Any, closure: None = None) -> None:
        calls.append(1)
        original(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    result = train(config, resume=True)
    assert len(calls) == 2, "the second epoch's two updates"
    assert [record["epoch"] for record in result.evaluations] == [1, 2]
    through = train(with_changes(config, {"training.output": str(tmp_path / "through")}))
    expected, found = weights(through.output / "last"), weights(result.output / "last")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def make_metrics(values: list[float]) -> Any:
    """A stand-in for the evaluation whose AP of the small band takes these values."""
    left = iter(values)

    def summary(result: Any) -> dict[str, Any]:
        return {"ap": 0.5, "ap50": 0.5, "ap75": 0.5, "by_size": {"small": next(left), "medium": 0.1, "large": None}}

    return summary


def test_patience_and_the_best_by_a_named_metric(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from crossdino.training import evaluation, loop

    values = [0.1, 0.3, 0.2, 0.3, 0.1, 0.9]
    summary = make_metrics([value for value in values for _ in range(1)])
    last: dict[str, Any] = {}

    def remembered(result: Any) -> dict[str, Any]:
        last.clear()
        last.update(summary(result))
        return dict(last)

    monkeypatch.setattr(evaluation, "summary", remembered)
    monkeypatch.setattr(loop, "summary", lambda result: dict(last))
    changes = {"training.epochs": 6, "training.patience": 3, "training.best_metric": "ap small"}
    result = train(with_changes(tiny_config, changes))
    assert result.epochs == 5, "three evaluations without a better one: 0.2, 0.3, 0.1"
    assert (result.best_metric, result.best_value, result.best_ap) == ("ap small", 0.3, 0.5)
    assert [record["best"] for record in result.evaluations] == [True, True, False, False, False]
    assert json.loads((result.weights / "config.json").read_text())["metrics"]["epoch"] == 2


@pytest.mark.parametrize(("num_tiny", "expected"), [(19, "ap large"), (20, "ap tiny")])
def test_the_best_is_chosen_by_the_smallest_band_with_enough_objects(
    tiny_config: Config, tmp_path: Path, num_tiny: int, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(Path(str(tiny_config.data.val_annotations)).read_text())
    boxes = [[index, index, 4, 4] for index in range(num_tiny)]
    boxes += [[1, 1 + index / 10, 50, 50] for index in range(30)]
    document["annotations"] = [
        {"id": number, "image_id": 1, "category_id": 3, "bbox": box} for number, box in enumerate(boxes, start=1)
    ]
    images = Path(str(tiny_config.data.val_annotations)).parent / "val"
    (tmp_path / "v.json").write_text(json.dumps(document))
    changes = {
        "data.val_annotations": str(tmp_path / "v.json"),
        "data.val_images": str(images),
        "evaluation.size_bands": {"large": [16, 1000], "tiny": [0, 8], "middle": [8, 16]},
        "training.epochs": 1,
        "training.trackers": [],
    }
    assert train(with_changes(tiny_config, changes)).best_metric == expected
    assert f"best checkpoint by: {expected.replace('ap', 'AP')}" in capsys.readouterr().out


def test_more_objects_than_queries_is_said(
    tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = draw_data(tmp_path, "many", 2, [3, 25], seed=0)
    config = with_changes(tiny_config, {"data.train_annotations": str(source), "training.epochs": 1})
    train(config)
    text = " ".join(capsys.readouterr().out.split())
    assert "warning: up to 25 objects in an image, but model.num_queries is 20" in text
    assert "--model.num_queries 100" in text
    train(with_changes(config, {"data.train_annotations": tiny_config.data.train_annotations}), overwrite=True)
    assert "warning: up to" not in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_learns_as_float32_does(tiny_config: Config, precision: str) -> None:
    def final_loss(kind: str) -> float:
        changes = {"training.precision": kind, "training.epochs": 4, "training.learning_rate": 1e-3}
        changes |= {"training.evaluate_every": 9, "training.output": f"{tiny_config.training.output}_{kind}"}
        found = [record["loss"] for record in records(train(with_changes(tiny_config, changes)).output, "train")]
        assert found[-1] < found[0]
        return found[-1]

    # Half precision has 8 to 11 bits; the losses of a model that hardly learnt stay within a few per cent.
    assert final_loss(precision) == pytest.approx(final_loss("fp32"), rel=0.05)


def test_fp16_leaves_out_updates_that_overflow_and_gives_up_when_they_stay(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count = Criterion.forward, [0]

    def overflowing(self: Criterion, *arguments: Any) -> dict[str, torch.Tensor]:
        count[0] += 1
        losses = original(self, *arguments)
        factor = (0.0 * losses["loss"]).sqrt() + 1 if count[0] in bad else torch.tensor(1.0)  # its derivative is NaN
        return {**losses, "loss": losses["loss"] * factor}

    monkeypatch.setattr(Criterion, "forward", overflowing)
    config = with_changes(
        tiny_config,
        {"training.precision": "fp16", "training.batch_size": 1, "training.ema_decay": 0.5, "training.epochs": 1},
    )
    bad = {2}
    result = train(config)
    assert result.steps == 4
    trainer = torch.load(result.output / "last" / "trainer.pt", weights_only=True)
    (updates,) = {int(moments["step"]) for moments in trainer["optimizer"]["state"].values()}
    # Besides the second one, the first may overflow by itself: the scale begins high and is halved each time.
    assert 2 <= updates <= 3 and trainer["scaler"]["scale"] == 65536 / 2 ** (4 - updates)
    count[0], bad = 0, set(range(1, 100))
    with pytest.raises(InputError, match="gradient is nan"):
        train(with_changes(config, {"training.epochs": 20}), overwrite=True)


def test_activation_checkpointing_and_determinism_change_nothing_but_memory(
    tiny_config: Config, tmp_path: Path
) -> None:
    found = []
    for number, options in enumerate(({}, {"activation_checkpointing": True}, {"deterministic": True})):
        changes = {f"training.{name}": value for name, value in options.items()}
        config = with_changes(tiny_config, {**changes, "training.output": str(tmp_path / str(number))})
        found.append(records(train(config).output, "train"))
    assert not torch.are_deterministic_algorithms_enabled()
    for other in found[1:]:
        for expected, measured in zip(found[0], other, strict=True):
            # float32 sums in another order, over four updates
            assert numbers(measured) == pytest.approx(numbers(expected), rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which dynamo itself looks at
def test_a_compiled_training_has_the_same_losses(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tracing is what can fail here; generating code takes minutes on a small machine.
    original, compiled = torch.nn.Module.compile, []

    def compile(self: torch.nn.Module, **options: Any) -> None:
        compiled.append(type(self).__name__)
        original(self, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    expected = records(train(with_changes(tiny_config, {"training.epochs": 1})).output, "train")
    config = with_changes(tiny_config, {"training.epochs": 1, "training.compile": True})
    found = records(train(config, overwrite=True).output, "train")
    assert compiled == ["CrossDINO"]
    assert numbers(found[0]) == pytest.approx(numbers(expected[0]), rel=1e-4)  # sums in another order


def test_a_loader_process_that_is_killed_ends_the_training_with_a_line(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossdino.data.dataset import DetectionDataset

    original = DetectionDataset.__getitem__

    def getitem(self: DetectionDataset, position: int) -> Any:
        if self.train:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, position)

    monkeypatch.setattr(DetectionDataset, "__getitem__", getitem)
    with pytest.raises(InputError, match="process that loads images has ended.*data.num_workers.*--resume"):
        train(with_changes(tiny_config, {"data.num_workers": 1}))


# --- tiles ---


def test_tiles_train_and_are_merged_for_the_evaluation(tiny_config: Config, tmp_path: Path) -> None:
    changes = {"data.tile_size": 40, "data.tile_overlap": 16, "data.train_short_sides": [40]}
    changes |= {"data.test_short_side": 40, "data.empty_tiles": 0.0, "training.epochs": 1}
    result = train(with_changes(tiny_config, changes))
    model = load_model(result.weights)
    assert (model.inference.tile_size, model.inference.tile_overlap) == (40, 16)
    # The predictor cuts the same tiles as the evaluation.
    config = from_dict(read_yaml(result.output / "config.yaml"))
    index = load_coco(str(config.data.val_annotations))
    dataset = DetectionDataset(index, config.data, model.mean, model.std)
    found = detect_dataset(model, dataset, num_select=20, batch_size=3)
    predictor = Predictor(model, num_select=20, batch_size=2)
    for record in index.records:
        mine = detections_to_coco(predictor(record.path), record.image_id, index.category_ids)
        theirs = [one for one in found if one["image_id"] == record.image_id]
        assert [one["bbox"] for one in mine] == [pytest.approx(one["bbox"], abs=1e-3) for one in theirs]
        assert len(mine) > 20, "more than one tile gave something"


def test_show_batch_draws_what_the_network_gets(tiny_config: Config) -> None:
    path = show_batch(with_changes(tiny_config, {"data.mosaic": 1.0}), 2)
    assert path == Path(tiny_config.training.output) / "batch.jpg"
    with Image.open(path) as picture:
        assert np.asarray(picture).std() > 10
    with pytest.raises(InputError, match="number of batches to show is 0"):
        show_batch(tiny_config, 0)
    assert not (path.parent / "last").exists()
    train(tiny_config)  # the picture is no obstacle


# --- data ---


def test_every_problem_of_the_data_is_listed_in_a_file(tiny_config: Config, tmp_path: Path) -> None:
    source = draw_data(tmp_path, "spoilt", 6, [1], seed=0)
    for number in (1, 3, 4, 6):
        (tmp_path / "spoilt" / f"{number}.png").unlink()
    (tmp_path / "spoilt" / "5.png").write_bytes(b"no picture")
    config = with_changes(tiny_config, {"data.train_annotations": str(source), "training.epochs": 1})
    listed = Path(config.training.output) / "problems.csv"
    with pytest.raises(InputError, match=f"all of them: {listed}"):
        train(config)
    rows = list(csv.DictReader(listed.read_text().splitlines()))
    assert sorted(Path(row["file"]).name for row in rows if row["done"] == "fatal") == [
        f"{number}.png" for number in (1, 3, 4, 5, 6)
    ]

    document = json.loads(Path(str(tiny_config.data.train_annotations)).read_text())
    document["annotations"][0]["bbox"][2] = 1000
    clipped = Path(str(tiny_config.data.train_annotations)).with_name("clipped.json")
    clipped.write_text(json.dumps(document))
    images = str(clipped.parent / "train")
    changes = {"data.train_annotations": str(clipped), "data.train_images": images}
    with pytest.raises(InputError, match="boxes that had to be mended"):
        train(with_changes(config, changes))
    train(with_changes(config, {**changes, "data.bad_boxes": "mend"}))
    (row,) = csv.DictReader(listed.read_text().splitlines())
    assert (row["file"], row["done"]) == (str(clipped), "clipped")


def test_a_yolo_folder_trains_as_the_coco_files_do(tiny_config: Config, tiny_data: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        document = json.loads((tiny_data / f"{part}.json").read_text())
        (tmp_path / "labels" / part).mkdir(parents=True)
        shutil.copytree(tiny_data / part, tmp_path / "images" / part)
        for image in document["images"]:
            lines = []
            for one in document["annotations"]:
                x, y, width, height = (value / 64 for value in one["bbox"])
                if one["image_id"] == image["id"]:
                    kind = {3: 0, 7: 1}[one["category_id"]]
                    lines.append(f"{kind} {x + width / 2} {y + height / 2} {width} {height}\n")
            (tmp_path / "labels" / part / f"{image['id']}.txt").write_text("".join(lines))
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [red, blue]\n")
    expected = train(tiny_config)
    changes = {"data.train_annotations": None, "data.val_annotations": None, "data.source": str(tmp_path)}
    found = train(with_changes(tiny_config, {**changes, "training.output": str(tmp_path / "yolo")}))
    for first, second in zip(records(expected.output, "train"), records(found.output, "train"), strict=True):
        # The boxes went through decimal fractions of the image.
        assert numbers(second) == pytest.approx(numbers(first), rel=1e-4)
    assert load_model(found.weights).config.class_names == ("red", "blue")


def test_an_ignore_category_is_no_class_and_pushes_nothing_down(tiny_config: Config, tmp_path: Path) -> None:
    document = json.loads(Path(str(tiny_config.data.train_annotations)).read_text())
    document["categories"].append({"id": 50, "name": "ignored regions"})
    document["annotations"] = [
        {"id": number, "image_id": number, "category_id": 50, "bbox": [0, 0, 64, 64]} for number in range(1, 5)
    ]
    images = str(Path(str(tiny_config.data.train_annotations)).parent / "train")
    (tmp_path / "t.json").write_text(json.dumps(document))
    changes = {
        "data.train_annotations": str(tmp_path / "t.json"),
        "data.train_images": images,
        "data.ignore_categories": ["ignored regions"],
        "training.epochs": 1,
    }
    result = train(with_changes(tiny_config, changes))
    assert load_model(result.weights).config.class_names == ("red", "blue")
    # Nothing to find, nothing that is known to be background: there is nothing to learn.
    assert records(result.output, "train")[0]["loss"] == 0.0
    with pytest.raises(InputError, match="ignored region"):
        train(with_changes(tiny_config, {**changes, "data.ignore_categories": ["ignored region"]}), overwrite=True)
