"""The benchmark of the network: every command runs, and its numbers are what they are called."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import machine, network
from benchmarks.interleaved import Case, Measurement
from benchmarks.network_cases import Clock, _cut, step
from crossdino.losses import criterion
from crossdino.structures import LayerOutput


def test_every_command_writes_its_tables(in_this_process: Callable[[ModuleType], list[Case]], tmp_path: Path) -> None:
    seen = in_this_process(network)
    path = tmp_path / "speed.csv"
    network.main([*network.COMMANDS, "--quick", "--csv", str(path)])
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    tables: dict[str, list[dict[str, str]]] = {}
    for row in csv.DictReader(lines):
        tables.setdefault(row["table"], []).append(row)
    forward = {row["case"]: row for row in tables["forward, cross_dino_r50, 96x128, batch 1"]}
    assert {"plain, default malloc", "plain", "ours, default malloc", "ours, no compiled operator"} <= set(forward)
    for row in forward.values():
        seconds = float(row["s"])
        yardstick = float(forward["plain, default malloc"]["s"])
        assert float(row["/ yardstick"]) == pytest.approx(seconds / yardstick, rel=1e-4)
        # The limit of this kind of number, in this run.
        share = float(row["GMAC/s"]) / float(row["of limit %"]) * 100
        note = [float(r["rate"]) for r in tables["limits of this machine"] if r["limit"].startswith("fp32")]
        assert share > 0 and note
        assert row["/ yardstick target"] == "" and row["peak MB"] == "3"
    steps = tables["training step, cross_dino_r50, 96x96, batch 2, 5 objects an image"]
    assert {row["case"] for row in steps} >= {"plain, default malloc", "ours"}
    assert all(0 < float(row["losses %"]) < 100 for row in steps)
    parts = {row["part"]: row for row in tables["parts of forward, cross_dino_r50, 96x128"]}
    wanted = {"total", "backbone", "input projections", "encoder", "CCTM", "selection", "decoder", "everything else"}
    assert wanted <= set(parts)
    outer = [float(row["ours %"]) for name, row in parts.items() if name != "total" and not name.startswith(" ")]
    assert sum(outer) == pytest.approx(100, abs=0.1)
    training = {row["part"] for row in tables["parts of a training step, cross_dino_r50, 5 objects"]}
    assert {"matcher and losses", "  of it matcher", "backward", "optimiser"} <= training
    assert any(title.startswith("memory of a training step") for title in tables)
    assert any(title.startswith("backbones") for title in tables)
    environments = [case.environment for case in seen if case.name == "ours, no compiled operator"]
    assert environments and all(one == {"CROSSDINO_CPU_KERNEL": "0"} for one in environments)
    assert all(case.tuned_malloc == ("default malloc" not in case.name) for case in seen)


def test_targets_are_judged_where_they_were_set() -> None:
    fast, slow = Measurement([1.0], 1, 1, {}), Measurement([4.0], 2, 1, {})
    found = network._against("/ yardstick", fast, slow, 0.4, True)
    assert found == {"/ yardstick": 0.25, "/ yardstick target": 0.4, "/ yardstick reached": True}
    assert network._against("/ yardstick", slow, slow, 0.4, True)["/ yardstick reached"] is False
    assert network._against("/ yardstick", fast, slow, 0.4, False)["/ yardstick reached"] is None
    assert network._against("/ yardstick", fast, None, 0.4, True)["/ yardstick"] is None
    lean, big = Measurement([1.0], 50, 100, {}), Measurement([1.0], 100, 100, {})
    found = network._memory_against(lean, big, True)
    # Half of what the work took, but three quarters of the process.
    assert found["memory ratio"] == 0.5 and found["memory reached"] is True
    assert found["process ratio"] == pytest.approx(0.75) and found["process reached"] is False
    assert network._memory_against(lean, big, False)["process reached"] is None


def test_work_of_a_step() -> None:
    one, two = (network.step_multiply_adds("dino_r50", (96, 96), number, 5, True) for number in (1, 2))
    assert two == 2 * one
    # Forward, and as much again for inputs and for weights; not for ResNet's frozen beginning, half of the tiny one at
    # this size, but for denoising queries.
    assert 1.8 < one / network.multiply_adds("dino_r50", (96, 96), True) < 3


def test_limits_have_the_threads_of_the_others(in_this_process: Callable[[ModuleType], list[Case]]) -> None:
    seen = in_this_process(network)
    network.main(["backbones", "--quick", "--threads", "1"])
    assert {case.name for case in seen} > {"limits"} and all(case.threads == 1 for case in seen)


def test_mistakes_in_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["fast"], "unknown command 'fast'"),
        (["--sizes", "800"], "give height x width"),
        (["--repetitions", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            network.main(arguments)
        assert message in capsys.readouterr().err


def test_a_cut_output_has_the_same_gradients() -> None:
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    shared = weight * 5
    twins: dict[int, Any] = {}
    cut = _cut([LayerOutput(shared, shared), LayerOutput(weight**2, torch.ones(2))], twins)
    assert len(twins) == 2 and cut[0].pred_logits is cut[0].pred_boxes
    (cut[0].pred_logits.sum() + cut[0].pred_boxes.sum() * 2 + cut[1].pred_logits.sum()).backward()
    assert weight.grad is None
    torch.autograd.backward([own for own, _ in twins.values()], [leaf.grad for _, leaf in twins.values()])
    torch.testing.assert_close(weight.grad, torch.tensor([15.0 + 4, 15.0 + 6]))


def test_parts_nest_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    clock = Clock("cpu")
    monkeypatch.setattr(clock, "_now", lambda: next(now))
    with clock.part("outer"):
        with clock.part("inner"), clock.part("inner"):
            pass
        with clock.pause(), clock.part("computed again"):
            pass
    assert clock.parts(10.0) == {"outer: inner": 1.0, "outer": 3.0, "everything else": 7.0}


def test_a_step_changes_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criterion, "match_layers", criterion.match_layers)
    norms: list[float] = []
    original = torch.nn.utils.clip_grad_norm_

    def watched(parameters: Any, *arguments: Any, **keywords: Any) -> Any:
        norms.append(float(original(parameters, *arguments, **keywords)))
        return torch.tensor(norms[-1])

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    for network_name in ("plain", "ours"):
        repetition = step(network_name, "cross_dino_r50", (64, 64), num_objects=2, tiny=True)
        repetition(), repetition()
    # The same weights, images and objects: only the denoising noise and the images differ a little.
    assert all(norm > 0 for norm in norms) and len(norms) == 4
    assert norms[0] != norms[1] and norms[2] != norms[3]


def test_limits_and_machine() -> None:
    measured = Measurement([1.0], 1, 1, machine.measure_limits(quick=True, device="cpu")())
    limits = machine.Limits.of(measured)
    assert limits is not None
    fp32 = [value for name, value in measured.extra.items() if name.startswith("fp32")]
    assert limits.fp32 == max(fp32) == limits.rate("fp32") and limits.rate("bf16") == limits.bf16
    assert 0 < limits.gigabytes < 10_000
    assert machine.Limits.of(None) is None
    described = machine.describe()
    assert torch.__version__.split("+")[0] in described["versions"] and "GiB" in described["memory"]
