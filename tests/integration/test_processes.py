"""Trainings in processes of their own: several at once, and some that are killed.

They are started as users start them, by `torchrun`, on the CPU with gloo.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from crossdino.config import Config, with_changes, write_yaml
from crossdino.training import train
from crossdino.training.schedule import epoch_order
from tests.conftest import draw_data

WORKER = Path(__file__).with_name("training_worker.py")
pytestmark = pytest.mark.slow


def start(config: Config, *words: str, processes: int = 1) -> subprocess.Popen[str]:
    Path(config.training.output).mkdir(exist_ok=True)
    path = Path(config.training.output) / "wanted.yaml"
    write_yaml(config, path)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*launcher, str(WORKER), str(path), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output[-3000:]
    return output


def losses(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = ("step", "loss", "class", "l1", "giou", "encoder", "denoising")
    return [{name: line[name] for name in names} for line in lines if line["kind"] == "train"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "last" / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    expected, found = weights(first), weights(second)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    for _ in range(2400):
        if condition():
            return
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.05)
    raise AssertionError("it did not happen within two minutes")


def test_two_processes_train_as_one(tiny_config: Config, tmp_path: Path) -> None:
    # Images 2 and 4 have no object, 1 and 3 have many: some steps leave a process without any.
    draw_data(tmp_path, "train", 4, [0, 9], seed=4)
    draw_data(tmp_path, "val", 3, [2, 0, 1], seed=5)
    common = with_changes(
        tiny_config,
        {
            "data.source": str(tmp_path),
            "data.train_annotations": None,
            "data.val_annotations": None,
            "data.horizontal_flip": 0.5,
            "data.color_jitter": 0.3,
            "model.hidden_dim": 64,  # with 32, GroupNorm has a channel a group, and biases before it no gradient
            "training.epochs": 5,
            "training.evaluate_every": 5,
        },
    )
    empty = {1, 3}
    orders = [[epoch_order(4, 0, epoch, rank, 2) for rank in (0, 1)] for epoch in range(5)]
    assert any(set(part) == empty for parts in orders for part in parts), "choose another seed"
    one = with_changes(common, {"training.batch_size": 4, "training.output": str(tmp_path / "one")})
    two = with_changes(common, {"training.batch_size": 2, "training.output": str(tmp_path / "two")})
    found = [tmp_path / "one.json", tmp_path / "two.json"]
    finish(start(one, "--keep-detections", str(found[0])))
    finish(start(two, "--keep-detections", str(found[1]), processes=2))

    expected, measured = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert [record["step"] for record in expected] == [1, 2, 3, 4, 5]
    for first, second in zip(expected, measured, strict=True):
        assert second == pytest.approx(first, rel=1e-5, abs=1e-5)
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=0, atol=1e-5, msg=name)

    detections = [json.loads(path.read_text()) for path in found]
    counts = [Counter(one["image_id"] for one in part) for part in detections]
    assert counts[0] == counts[1] and set(counts[1]) == {1, 2, 3}, "every image exactly once"
    scores = [sorted(one["score"] for one in part) for part in detections]
    assert scores[1] == pytest.approx(scores[0], abs=1e-5)


def test_a_killed_process_ends_the_training_with_a_line_and_resume_continues(
    tiny_config: Config, tmp_path: Path
) -> None:
    config = with_changes(
        tiny_config, {"training.epochs": 100000, "training.batch_size": 1, "training.evaluate_every": 100000}
    )
    output = Path(config.training.output)
    process = start(config, processes=2)
    wait_for(lambda: (output / "last" / "trainer.pt").is_file(), process)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    os.kill(max(map(int, children.stdout.split())), signal.SIGKILL)
    text, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "another process of this training has ended" in text and f"--resume and --output {output}" in text
    done = torch.load(output / "last" / "trainer.pt", weights_only=True)["epoch"]
    result = train(with_changes(config, {"training.epochs": done + 1}), resume=True)
    assert result.epochs == done + 1


@pytest.mark.parametrize("moment", ["saving", "renaming"])
def test_kill_9_while_a_checkpoint_is_written(tiny_config: Config, tmp_path: Path, moment: str) -> None:
    config = with_changes(
        tiny_config,
        {
            "training.epochs": 3,
            "training.batch_size": 1,
            "training.save_minutes": 0.0,  # after every step
            "training.ema_decay": 0.9,
            "training.schedule": "cosine",
            "data.color_jitter": 0.3,
            "data.copy_paste": 0.5,
        },
    )
    finish(start(config, f"--die-while-{moment}", "6"), -signal.SIGKILL)
    output = Path(config.training.output)
    train(config, resume=True)
    through = with_changes(config, {"training.output": str(tmp_path / "through")})
    result = train(through)
    assert result.steps == 12
    assert_same_weights(Path(through.training.output), output)
    kept = torch.load(output / "last" / "trainer.pt", weights_only=True)
    expected = torch.load(tmp_path / "through" / "last" / "trainer.pt", weights_only=True)
    for name in ("model", "ema"):
        assert all(torch.equal(value, kept[name][key]) for key, value in expected[name].items())
    for key, moments in expected["optimizer"]["state"].items():
        assert all(torch.equal(value, kept["optimizer"]["state"][key][name]) for name, value in moments.items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_saves_the_step(tiny_config: Config, tmp_path: Path, number: signal.Signals) -> None:
    config = with_changes(
        tiny_config, {"training.epochs": 400, "training.batch_size": 1, "training.evaluate_every": 1000}
    )
    output = Path(config.training.output)
    process = start(config)
    wait_for(lambda: (output / "last").is_dir(), process)
    process.send_signal(number)
    text = finish(process, 130)
    trainer = torch.load(output / "last" / "trainer.pt", weights_only=True)
    assert f"interrupted: saved after step {trainer['step']}" in text
    epochs = trainer["epoch"] + 2
    train(with_changes(config, {"training.epochs": epochs}), resume=True)
    through = with_changes(config, {"training.epochs": epochs, "training.output": str(tmp_path / "through")})
    train(through)
    assert_same_weights(tmp_path / "through", output)
