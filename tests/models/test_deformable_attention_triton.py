"""The Triton kernels of deformable attention, run by Triton's interpreter on the CPU, and what happens without them."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys

import pytest
import torch

from crossdino.models import deformable_triton

# In a process of its own: Triton reads the variable when it is imported, which another test may have caused already.
INTERPRETED = """
import math
import torch
from crossdino.models import deformable_triton
from crossdino.models.deformable_triton import launch_backward, launch_forward
from crossdino.models.deformable_engines import grid_sample_attention, grid_sample_gradients

generator = torch.Generator().manual_seed(4)
# Blocks of 64 numbers: the interpreter is slow, and most cases should have more than one block.
deformable_triton._BLOCK_NUMBERS = 64
CASES = [
    # batch, queries, heads, channels, points, levels, dtype
    (2, 9, 2, 5, 2, [(4, 6), (1, 1)], torch.float32),
    (1, 3, 1, 32, 1, [(5, 7)], torch.bfloat16),
    (1, 3, 1, 8, 1, [(2, 3)], torch.float16),
]
for batch, queries, heads, channels, points, shapes, dtype in CASES:
    tokens = sum(height * width for height, width in shapes)
    place = (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, heads, tokens, channels, generator=generator).to(dtype).transpose(1, 2)
    locations = torch.rand(*place, 2, generator=generator) * 1.6 - 0.3
    locations[0, 0, 0, 0, 0] = torch.tensor([math.inf, 0.4])
    locations[0, 1, 0, 0, 0] = torch.tensor([0.4, -1e30])
    weights = torch.rand(place, generator=generator)
    exact = grid_sample_attention(value.double(), shapes, locations.double(), weights.double())
    output = launch_forward(value, shapes, locations, weights)
    assert output.dtype == dtype
    # Only the result is rounded to the dtype of the value (the interpreter cuts bfloat16 off instead).
    rounding = {torch.float32: 0, torch.bfloat16: 2**-7, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(output.double(), exact, rtol=rounding, atol=1e-5)
    grad = torch.randn(output.shape, generator=generator).to(dtype)
    wanted = grid_sample_gradients(grad.double(), value.double(), shapes, locations.double(), weights.double())
    got = launch_backward(grad, value, shapes, locations, weights)
    assert [tensor.dtype for tensor in got] == [dtype, torch.float32, torch.float32]
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=rounding, atol=1e-5)
    # Differences of pixels times the map's width: a few times larger than the output.
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(got[2].double(), wanted[2], rtol=1e-5, atol=5e-5)
    locations[0, 1, 0, 0, 0, 0] = math.nan
    bad = launch_forward(value, shapes, locations, weights).view(batch, queries, heads, channels).isnan()
    expected = torch.zeros_like(bad)
    expected[0, 1, 0] = True
    assert torch.equal(bad, expected)
"""


def test_kernels_equal_the_definition_under_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        # Torch's builds for CPUs come without it.
        assert not deformable_triton._has_triton()
        return
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_kernel_that_does_not_compile_is_given_up_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def launch(*_args: object) -> torch.Tensor:
        calls.append(1)
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(deformable_triton._Fallback, "failed", False)
    monkeypatch.setattr(deformable_triton, "launch_forward", launch)
    monkeypatch.setattr(deformable_triton, "_has_triton", lambda: True)
    # Stands for a tensor on a GPU: only its place and dtype are looked at.
    value = torch.empty(1, device="meta")
    monkeypatch.setattr(deformable_triton, "_DEVICES", ("meta",))
    with caplog.at_level(logging.INFO, logger="crossdino"):
        assert deformable_triton.triton_forward(value, [(1, 1)], value, value) is None
        assert deformable_triton.triton_forward(value, [(1, 1)], value, value) is None
        assert deformable_triton.triton_gradients(value, value, [(1, 1)], value, value) is None
    assert calls == [1]
    (record,) = caplog.records
    assert record.getMessage().endswith("its Triton kernel failed: Failed to find C compiler.")


def test_a_full_memory_is_not_taken_for_a_broken_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_args: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(deformable_triton._Fallback, "failed", False)
    monkeypatch.setattr(deformable_triton, "launch_forward", launch)
    monkeypatch.setattr(deformable_triton, "_has_triton", lambda: True)
    monkeypatch.setattr(deformable_triton, "_DEVICES", ("meta",))
    value = torch.empty(1, device="meta")
    with pytest.raises(torch.OutOfMemoryError):
        deformable_triton.triton_forward(value, [(1, 1)], value, value)
    assert not deformable_triton._Fallback.failed


def test_double_and_other_devices_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformable_triton, "_has_triton", lambda: True)
    value = torch.empty(1)
    assert deformable_triton.triton_forward(value, [(1, 1)], value, value) is None
    monkeypatch.setattr(deformable_triton, "_DEVICES", ("cpu",))
    for tensors in ((value.double(), value), (value, value.double())):
        assert deformable_triton.triton_forward(tensors[0], [(1, 1)], tensors[1], value) is None
