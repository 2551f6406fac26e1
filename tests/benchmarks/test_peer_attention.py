"""The measurement of deformable attention: that all engines do the same work, and the command itself."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import deformable_attention
from benchmarks.interleaved import Case


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("queries", [None, 30])
def test_yardstick_and_engine_compute_the_same(projected: bool, queries: int | None) -> None:
    results = []
    for engine in ("plain", "ours"):
        inputs = deformable_attention.make_inputs((70, 90), queries)
        call, leaves = deformable_attention.build(engine, projected, inputs)
        for leaf in leaves:
            leaf.requires_grad_()
        if projected:  # the points of the first call do not know that gradients are wanted
            call, _ = deformable_attention.build(engine, projected, inputs)
        output = call()
        output.backward(torch.ones_like(output))
        results.append([output, *(leaf.grad for leaf in leaves)])
    for plain, ours in zip(*results, strict=True):
        # Float32 sums of 64 products in another order; gradients by location are steep: up to 16 px a unit.
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_the_encoder_has_a_query_in_the_middle_of_every_token() -> None:
    inputs = deformable_attention.make_inputs((16, 24), None)
    assert inputs.shapes == [(2, 3), (1, 2), (1, 1), (1, 1)]
    references = inputs.references[0, :, 0]
    expected = [(1 / 6, 0.25), (0.5, 0.25), (5 / 6, 0.25), (1 / 6, 0.75), (0.5, 0.75), (5 / 6, 0.75)]
    torch.testing.assert_close(references[:6], torch.tensor(expected))
    torch.testing.assert_close(references[6:8], torch.tensor([(0.25, 0.5), (0.75, 0.5)]))
    torch.testing.assert_close(references[8:], torch.full((2, 2), 0.5))


def test_the_command_compares_with_grid_sample(
    in_this_process: Callable[[ModuleType], list[Case]], tmp_path: Path
) -> None:
    seen = in_this_process(deformable_attention)
    path = tmp_path / "attention.csv"
    deformable_attention.main(["--quick", "--csv", str(path)])
    rows = list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))
    assert [row["engine"] for row in rows] == ["grid_sample, fp32", "embedding_bag, fp32", "C++ kernel, fp32"]
    assert [case.environment for case in seen] == [{}, {"CROSSDINO_CPU_KERNEL": "0"}, {}]
    assert all(case.arguments["backward"] for case in seen)
    first = float(rows[0]["ms"])
    for row in rows:
        assert float(row["/ grid_sample"]) == pytest.approx(float(row["ms"]) / first, rel=1e-3)
        assert row["target"] == ""  # targets are for the full size
