"""What a benchmark ran on: a description of the machine, and the limits that its numbers are measured against.

The limits are measured in the same run as everything else (`limits_case` is a case like any other): multiply-adds a
second of matrix products, the better of torch's own call (MKL) and oneDNN, at the shape of the encoder's feed-forward
network and at a large square; and bytes a second of a copy that fits in no cache.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.interleaved import Case, Measurement

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile", "asimd", "bf16", "sve")
_LIBRARIES = ("torch", "torchvision", "timm", "numpy", "scipy", "transformers", "rfdetr", "sahi")
# The encoder at 800x1333: tokens, width, hidden width.
_FEEDFORWARD = (22223, 256, 2048)
_SQUARE = (2048, 2048, 2048)
# An accelerator needs more to be busy, and calls in a row: each by itself would be the time of its launch.
_DEVICE_SQUARE = (8192, 8192, 8192)
_DEVICE_CALLS = 20


def describe(device: str = "cpu") -> dict[str, str]:
    """The machine in words, by key: processor, memory, system, versions, threads, who else is busy."""
    found = {
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores ({_flags()})",
        "memory": f"{_gibibytes('MemTotal')} GiB, {_gibibytes('MemAvailable')} GiB free",
        "system": f"{platform.system()} {platform.release()}, {' '.join(platform.libc_ver())}",
        "versions": ", ".join([f"Python {platform.python_version()}", *_versions()]),
        "threads": str(torch.get_num_threads()),
        "load before": f"{os.getloadavg()[0]:.1f} processes",
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
    return found


def _lines(path: str, key: str) -> list[str]:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return []
    return [line.split(":", 1)[1].strip() for line in lines if line.split(":", 1)[0].strip() == key]


def _processor() -> str:
    return next(iter(_lines("/proc/cpuinfo", "model name")), platform.processor() or platform.machine())


def _flags() -> str:
    flags = next(iter(_lines("/proc/cpuinfo", "flags") or _lines("/proc/cpuinfo", "Features")), "").split()
    return " ".join(flag for flag in _FLAGS if flag in flags) or "no vector extensions known"


def _gibibytes(key: str) -> str:
    kilobytes = next((int(line.split()[0]) for line in _lines("/proc/meminfo", key)), None)
    return "?" if kilobytes is None else f"{kilobytes / 2**20:.0f}"


def _versions() -> list[str]:
    versions = []
    for name in _LIBRARIES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most.

    Attributes:
        fp32, bf16: GMAC/s of the best matrix product.
        gigabytes: GB/s of memory, read and written.
    """

    fp32: float
    bf16: float
    gigabytes: float

    @classmethod
    def of(cls, measurement: Measurement | None) -> Limits | None:
        """The limits from the measurement of `limits_case`; None where that failed."""
        if measurement is None:
            return None
        extra = measurement.extra
        best = {
            dtype: max(value for key, value in extra.items() if key.startswith(dtype)) for dtype in ("fp32", "bf16")
        }
        return cls(best["fp32"], best["bf16"], max(value for key, value in extra.items() if key.startswith("memory")))

    def rate(self, dtype: str) -> float:
        """GMAC/s of `fp32` or `bf16`."""
        return self.bf16 if dtype == "bf16" else self.fp32


def limits_case(quick: bool = False, device: str = "cpu", threads: int | None = None) -> Case:
    """The case that measures the limits; its name is `limits`. `threads` as the other cases have."""
    return Case("limits", "benchmarks.machine:measure_limits", {"quick": quick, "device": device}, threads=threads)


def limits_rows(measurement: Measurement | None) -> list[dict[str, Any]]:
    """A table of everything that was measured."""
    extra: Mapping[str, Any] = {} if measurement is None else measurement.extra
    return [
        {"limit": key, "rate": value, "unit": "GB/s" if "memory" in key else "GMAC/s"} for key, value in extra.items()
    ]


def measure_limits(quick: bool, device: str) -> Callable[[], dict[str, float]]:
    """A repetition returns rates by name."""
    products: dict[str, tuple[Callable[[], object], float]] = {}
    generator = torch.Generator().manual_seed(0)
    for label, shape in (("feed-forward", _FEEDFORWARD), ("square", _SQUARE if device == "cpu" else _DEVICE_SQUARE)):
        rows, inner, columns = (side // 16 for side in shape) if quick else shape
        for dtype_name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            x = torch.randn(rows, inner, generator=generator).to(device, dtype)
            weight = torch.randn(columns, inner, generator=generator).to(device, dtype)
            bias = torch.zeros(columns, device=device, dtype=dtype)
            for library, product in (("torch", torch.nn.functional.linear), ("oneDNN", _onednn)):
                if library == "torch" or (device == "cpu" and _has_onednn(x, weight, bias)):
                    work = rows * inner * columns / 1e9
                    products[f"{dtype_name} {label} {library}"] = (_call(product, x, weight, bias), work)
    size = (1 << 20) if quick else (1 << 26)
    source, other, target = (torch.ones(size, device=device) for _ in range(3))
    products["memory copy"] = (lambda: target.copy_(source), 8e-9 * size)
    products["memory add"] = (lambda: torch.add(source, other, out=target), 12e-9 * size)

    def repetition() -> dict[str, float]:
        with torch.inference_mode():
            return {name: work / _seconds(run, device) for name, (run, work) in products.items()}

    return repetition


def _call(product: Callable[..., Tensor], *arguments: Tensor) -> Callable[[], Tensor]:
    return lambda: product(*arguments)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _has_onednn(*arguments: Tensor) -> bool:
    try:
        _onednn(*arguments)
    except (AttributeError, RuntimeError):
        return False
    return True


def _seconds(run: Callable[[], object], device: str) -> float:
    """The better of two: a limit is what is possible."""
    best = float("inf")
    calls = 1 if device == "cpu" else _DEVICE_CALLS
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / calls)
    return best
