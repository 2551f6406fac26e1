"""Building, caching and leaving out the compiled CPU kernel of deformable attention."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from crossdino.models import deformable_cpu
from crossdino.models.deformable_attention import deformable_attention, grid_sample_attention

SHAPES = [(5, 7), (3, 4)]


@pytest.fixture
def fresh_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty kernel cache, quick builds, and the usual kernel again afterwards."""
    monkeypatch.setenv("CROSSDINO_CPU_KERNEL", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = [flag for flag in deformable_cpu._COMPILER_FLAGS if flag != "-O3"]
    monkeypatch.setattr(deformable_cpu, "_COMPILER_FLAGS", (*flags, "-O0", "-Wno-psabi"))
    deformable_cpu.cpu_kernel.cache_clear()
    yield tmp_path / "crossdino"
    deformable_cpu.cpu_kernel.cache_clear()


def check_result() -> None:
    generator = torch.Generator().manual_seed(2)
    value = torch.randn(1, 47, 2, 8, generator=generator)
    locations = torch.rand(1, 6, 2, 2, 3, 2, generator=generator) * 1.4 - 0.2
    weights = torch.rand(1, 6, 2, 2, 3, generator=generator)
    expected = grid_sample_attention(value.double(), SHAPES, locations.double(), weights.double())
    output = deformable_attention(value, SHAPES, locations, weights)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


def builds(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_built_once_and_again_for_other_flags(fresh_kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert deformable_cpu.cpu_kernel() is not None
    (built,) = builds(fresh_kernel)
    modified = built.stat().st_mtime_ns
    deformable_cpu.cpu_kernel.cache_clear()
    assert deformable_cpu.cpu_kernel() is not None
    assert [path.stat().st_mtime_ns for path in builds(fresh_kernel)] == [modified]
    monkeypatch.setattr(deformable_cpu, "_COMPILER_FLAGS", (*deformable_cpu._COMPILER_FLAGS, "-DOTHER"))
    deformable_cpu.cpu_kernel.cache_clear()
    check_result()
    assert len(builds(fresh_kernel)) == 2


def test_damaged_builds_are_not_loaded(fresh_kernel: Path) -> None:
    """Loading half a library would end the process with a signal, not with an exception."""
    flags = (*deformable_cpu._COMPILER_FLAGS, *deformable_cpu._openmp_flags())
    key = deformable_cpu._build_key(deformable_cpu._compiler(), flags)
    assert deformable_cpu.cpu_kernel() is not None
    (built,) = builds(fresh_kernel)
    assert key in built.name
    content = built.read_bytes()
    built.unlink()
    built.write_bytes(content[: len(content) // 2])
    deformable_cpu.cpu_kernel.cache_clear()
    assert deformable_cpu.cpu_kernel() is not None
    check_result()
    # The new build took the place of the damaged one: same name, whole content.
    assert [path.read_bytes() == content for path in builds(fresh_kernel)] == [True]


@pytest.mark.parametrize("trouble", ["a file in its place", "no home"])
def test_without_a_place_to_keep_it_built_for_this_process(
    trouble: str, fresh_kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: Path("/proc/nowhere"))
    else:
        fresh_kernel.touch()
    assert deformable_cpu.cpu_kernel() is not None
    check_result()


@pytest.mark.parametrize("trouble", ["no compiler", "failing compiler", "broken source", "switched off"])
def test_without_kernel_pytorch_computes_the_same(
    trouble: str,
    fresh_kernel: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if trouble == "no compiler":
        monkeypatch.setattr(shutil, "which", lambda _: None)
    elif trouble == "failing compiler":
        monkeypatch.setenv("CXX", "false")
    elif trouble == "broken source":
        source = tmp_path / "broken.cpp"
        source.write_text("this is not C++")
        monkeypatch.setattr(deformable_cpu, "_KERNEL_SOURCE", source)
    else:
        monkeypatch.setenv("CROSSDINO_CPU_KERNEL", "0")
    with caplog.at_level(logging.INFO, logger="crossdino"):
        assert deformable_cpu.cpu_kernel() is None
        check_result()
        check_result()
    # One line, and none for what the user asked for.
    assert len(caplog.records) == (0 if trouble == "switched off" else 1)


def test_processes_may_build_at_the_same_time(fresh_kernel: Path) -> None:
    program = (
        "from crossdino.models import deformable_cpu as d\n"
        "d._COMPILER_FLAGS = tuple('-O0' if f == '-O3' else f for f in d._COMPILER_FLAGS)\n"
        "assert d.cpu_kernel() is not None\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    processes = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert len({path.stem.rpartition("_")[0] for path in builds(fresh_kernel)}) == 1


def test_tensors_of_several_devices_are_not_for_the_kernel():
    value = torch.zeros(1, 4, 1, 8)
    assert deformable_cpu.kernel_for(value, torch.zeros(1, device="meta")) is None
