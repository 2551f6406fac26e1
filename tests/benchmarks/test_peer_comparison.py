"""The comparison with other detectors: sizes, multiply-adds, the environment, and the command itself."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from benchmarks import peers
from benchmarks.interleaved import Case
from benchmarks.peer_models import count_gmac, nearest_hw


@pytest.mark.parametrize(
    ("model", "hw", "expected"),
    [
        ("deformable_detr", (800, 1333), (800, 1333)),
        ("rt_detr_v2", (800, 1333), (800, 1344)),
        ("d_fine", (640, 640), (640, 640)),
        ("rf_detr", (640, 640), (616, 616)),
        ("rf_detr", (800, 1333), (784, 1344)),
        ("rf_detr", (20, 20), (56, 56)),
    ],
)
def test_the_nearest_size_that_a_peer_takes(model: str, hw: tuple[int, int], expected: tuple[int, int]) -> None:
    assert nearest_hw(model, hw) == expected


def test_multiply_adds_are_those_of_a_hand_count() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(2), nn.Linear(100, 7)).requires_grad_(False)
    # Each of 8 x 100 outputs sums 27 products, each of 8 x 7 outputs 100.
    expected = (8 * 100 * 27 + 8 * 7 * 100) / 1e9
    with torch.no_grad():
        assert count_gmac(lambda: network(torch.zeros(1, 3, 10, 10))) == pytest.approx(expected)


@pytest.mark.parametrize("with_uv", [True, False])
def test_the_environment_is_built_from_the_requirements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_uv: bool
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "uv" if with_uv else None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    python = peers.make_environment(tmp_path / "peers")
    assert python.is_relative_to(tmp_path / "peers")
    assert [command[0] == "uv" for command in commands] == [with_uv] * 2
    assert str(tmp_path / "peers") in commands[0] and str(peers.REQUIREMENTS) in commands[1]
    lines = [line for line in peers.REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z-]+==[\d.]+", line) for line in lines)
    assert {"torch", "torchvision", "transformers", "rfdetr"} <= {line.split("==")[0] for line in lines}


def test_the_command_compares_time_for_the_same_multiply_adds(
    in_this_process: Callable[[ModuleType], list[Case]], tmp_path: Path
) -> None:
    in_this_process(peers)
    path = tmp_path / "peers.csv"
    peers.main(["--quick", "--only", "dino_r50", "faster_rcnn", "--csv", str(path)])
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    rows = {row["network"]: row for row in csv.DictReader(lines)}
    assert set(rows) == {"ours: dino_r50", "torchvision Faster R-CNN R50-FPN"}
    for row in rows.values():
        assert float(row["s / 100 GMAC"]) == pytest.approx(100 * float(row["s"]) / float(row["GMAC"]), rel=1e-3)
    # Counted with another tool's formula: 1.56 GMAC of ResNet-50 without its last layers at 256x256 is 5.3.
    assert float(rows["ours: dino_r50"]["GMAC"]) > 5.3
    assert "# peers: torch " in path.read_text()
