"""The compiled CPU kernel of deformable attention: built on first use, cached, and called.

The source is `deformable_attention_cpu.cpp`. Where there is no compiler, the build fails or `CROSSDINO_CPU_KERNEL=0`,
there is no kernel, PyTorch computes, and one line of the log says so: a compiler is never required.

Builds are kept in `$XDG_CACHE_HOME/crossdino` (or `~/.cache/crossdino`) under the source, the compiler, its flags, the
processor and the file's own checksum; a file that is not what its name says is not loaded but built again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

_KERNEL_SOURCE = Path(__file__).with_name("deformable_attention_cpu.cpp")
_KERNEL_HEADERS = tuple(Path(__file__).with_name(f"deformable_{name}.h") for name in ("points", "vectors"))
# No -ffast-math: NaN locations must stay NaN. The two -fno flags are what floor() needs to be vectorised.
_COMPILER_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


# --- building ---------------------------------------------------------------------------------------------------------


@functools.cache
def cpu_kernel() -> ctypes.CDLL | None:
    """The C++ kernel, built if need be; None where it is switched off or cannot be built (never an error)."""
    if os.environ.get("CROSSDINO_CPU_KERNEL") == "0":
        return None
    try:
        library = _load_cpu_kernel()
        for function in (library.crossdino_forward, library.crossdino_backward):
            function.argtypes, function.restype = [ctypes.POINTER(_Problem)], None
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        _logger.info("deformable attention runs in PyTorch, its CPU kernel could not be built: %s", error)
        return None
    return library


def _load_cpu_kernel() -> ctypes.CDLL:
    """The kernel from the cache, or built into it; without a place to write to, built for this process alone."""
    compiler = _compiler()
    flags = (*_COMPILER_FLAGS, *_openmp_flags())
    name = f"deformable_attention_{_build_key(compiler, flags)}"
    cache = _cache_folder()
    if cache is not None:
        return ctypes.CDLL(str(_cached_build(cache, name) or _build(compiler, flags, cache, name)))
    with tempfile.TemporaryDirectory() as folder:
        # Loaded, it needs its file no longer.
        return ctypes.CDLL(str(_build(compiler, flags, Path(folder), name)))


def _compiler() -> str:
    candidates = (os.environ.get("CXX"), "g++", "clang++", "c++")
    compiler = next((path for name in candidates if name and (path := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found")
    return compiler


def _build_key(compiler: str, flags: Sequence[str]) -> str:
    """What a build depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60, check=True).stdout
    key = hashlib.sha256(_KERNEL_SOURCE.read_bytes())
    headers = [path.read_bytes() for path in _KERNEL_HEADERS]
    for part in (*headers, compiler.encode(), version, " ".join(flags).encode(), _processor().encode()):
        key.update(b"\0" + part)
    return key.hexdigest()[:20]


def _cache_folder() -> Path | None:
    """Where builds are kept; None if nothing can be written there."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crossdino"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return None
    return cache if os.access(cache, os.R_OK | os.W_OK | os.X_OK) else None


def _cached_build(cache: Path, name: str) -> Path | None:
    """An intact build of this name; loading a damaged one could end the process, so its checksum decides."""
    for path in sorted(cache.glob(f"{name}_*.so")):
        if path.stem == f"{name}_{_checksum(path)}":
            return path
    return None


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:20]


def _build(compiler: str, flags: Sequence[str], cache: Path, name: str) -> Path:
    """Compile the kernel into `cache`."""
    # Processes of one training may build at the same time: each under its own name, then an atomic rename.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / f"{name}.so"
        command = [compiler, str(_KERNEL_SOURCE), *flags, "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, check=False)
        if result.returncode != 0:
            raise OSError(f"{compiler}: {result.stderr.strip().splitlines()[:1]}")
        library = cache / f"{name}_{_checksum(built)}.so"
        os.replace(built, library)
    return library


def _openmp_flags() -> tuple[str, ...]:
    """Link the OpenMP library that torch has loaded: a second one would bring its own threads, fighting torch's."""
    try:
        loaded = re.findall(r"/\S*/lib(?:gomp|iomp5|omp)\b\S*", Path("/proc/self/maps").read_text())
    except OSError:
        loaded = []
    if not loaded:
        return ("-fopenmp",)
    # Compiled for OpenMP but not linked by -fopenmp, which would add the compiler's own library.
    return ("-fopenmp", "-Wl,--as-needed", loaded[0])


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))


# --- calling ----------------------------------------------------------------------------------------------------------


class _Problem(ctypes.Structure):
    """`Problem` of the C++ source, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "tokens", "heads", "channels", "queries", "levels", "points")),
        *((name, ctypes.c_int64) for name in ("threads", "coordinates", "value_is_bfloat16")),
        *((name, ctypes.c_int64) for name in ("projections_are_bfloat16", "location_stride", "weight_stride")),
        ("shapes", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_void_p) for name in ("value", "references", "locations", "weights", "workspace", "output")),
        *((name, ctypes.c_void_p) for name in ("grad_value", "grad_locations", "grad_weights", "grad_references")),
    ]


def kernel_for(value: Tensor, *others: Tensor) -> ctypes.CDLL | None:
    """The kernel, where it can take these tensors."""
    if value.device.type != "cpu" or value.dtype not in (torch.float32, torch.bfloat16):
        return None
    # Elsewhere than on the CPU, the kernel would read the addresses of another memory: PyTorch has the clear error.
    if any(other.dtype == torch.float64 or other.device.type != "cpu" for other in others):
        return None
    return cpu_kernel()


def _problem(value: Tensor, flat_shapes: Sequence[int], queries: int, points: int) -> _Problem:
    batch, tokens, heads, channels = value.shape
    problem = _Problem(batch, tokens, heads, channels, queries, len(flat_shapes) // 2, points, torch.get_num_threads())
    problem.value_is_bfloat16 = value.dtype == torch.bfloat16
    problem.shapes = (ctypes.c_int64 * len(flat_shapes))(*flat_shapes)
    problem.value = value.data_ptr()
    return problem


def kernel_forward(
    kernel: ctypes.CDLL, value: Tensor, flat_shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> Tensor:
    """`deformable_attention` by the kernel."""
    value, locations, weights = value.contiguous(), locations.float().contiguous(), weights.float().contiguous()
    problem = _problem(value, flat_shapes, locations.shape[1], locations.shape[4])
    _given_points(problem, locations, weights)
    return _run_forward(kernel, problem, value)


def projected_kernel_forward(
    kernel: ctypes.CDLL, value: Tensor, flat_shapes: Sequence[int], reference_points: Tensor, projections: Tensor
) -> Tensor:
    """`projected_attention` by the kernel."""
    value, references = value.contiguous(), reference_points.float().contiguous()
    projections = _readable(projections)
    problem = _problem(value, flat_shapes, projections.shape[1], _num_points(value, flat_shapes, projections))
    _projected_points(problem, references, projections)
    return _run_forward(kernel, problem, value)


def _run_forward(kernel: ctypes.CDLL, problem: _Problem, value: Tensor) -> Tensor:
    batch, _, heads, head_dim = value.shape
    output = value.new_empty((batch, problem.queries, heads * head_dim))
    workspace = torch.empty_like(value)
    problem.output, problem.workspace = output.data_ptr(), workspace.data_ptr()
    kernel.crossdino_forward(ctypes.byref(problem))
    return output


def kernel_backward(
    kernel: ctypes.CDLL,
    grad_output: Tensor,
    value: Tensor,
    flat_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, locations and weights."""
    location_dtype, weight_dtype = locations.dtype, weights.dtype
    value, locations, weights = value.contiguous(), locations.float().contiguous(), weights.float().contiguous()
    problem = _problem(value, flat_shapes, locations.shape[1], locations.shape[4])
    _given_points(problem, locations, weights)
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    problem.grad_locations, problem.grad_weights = grad_locations.data_ptr(), grad_weights.data_ptr()
    grad_value = _run_backward(kernel, problem, grad_output, value)
    return grad_value, grad_locations.to(location_dtype), grad_weights.to(weight_dtype)


def projected_kernel_backward(
    kernel: ctypes.CDLL,
    grad_output: Tensor,
    value: Tensor,
    flat_shapes: Sequence[int],
    reference_points: Tensor,
    projections: Tensor,
    needs_references: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, reference points (zeros unless needed) and projections."""
    dtype = projections.dtype
    value, references = value.contiguous(), reference_points.float().contiguous()
    projections = _readable(projections)
    points = _num_points(value, flat_shapes, projections)
    problem = _problem(value, flat_shapes, projections.shape[1], points)
    _projected_points(problem, references, projections)
    grad_projections = torch.empty(projections.shape, dtype=torch.float32)
    problem.grad_locations = grad_projections.data_ptr()
    problem.grad_weights = (
        grad_projections.data_ptr() + projections.shape[-1] // 3 * 2 * grad_projections.element_size()
    )
    grad_references = torch.zeros_like(references)
    if needs_references:
        problem.grad_references = grad_references.data_ptr()
    grad_value = _run_backward(kernel, problem, grad_output, value)
    return grad_value, grad_references.to(reference_points.dtype), grad_projections.to(dtype)


def _run_backward(kernel: ctypes.CDLL, problem: _Problem, grad_output: Tensor, value: Tensor) -> Tensor:
    grad_output = grad_output.to(value.dtype).contiguous()
    grad_value = torch.empty_like(value)
    workspace = torch.empty(value.numel() * (value.element_size() + 4), dtype=torch.uint8)
    problem.output, problem.grad_value = grad_output.data_ptr(), grad_value.data_ptr()
    problem.workspace = workspace.data_ptr()
    kernel.crossdino_backward(ctypes.byref(problem))
    return grad_value


def _given_points(problem: _Problem, locations: Tensor, weights: Tensor) -> None:
    problem.locations, problem.location_stride = locations.data_ptr(), locations[0, 0].numel()
    problem.weights, problem.weight_stride = weights.data_ptr(), weights[0, 0].numel()


def _projected_points(problem: _Problem, references: Tensor, projections: Tensor) -> None:
    problem.coordinates, problem.references = references.shape[-1], references.data_ptr()
    problem.projections_are_bfloat16 = projections.dtype == torch.bfloat16
    width = projections.shape[-1]
    problem.location_stride = problem.weight_stride = width
    problem.locations = projections.data_ptr()
    problem.weights = projections.data_ptr() + width // 3 * 2 * projections.element_size()


def _readable(projections: Tensor) -> Tensor:
    if projections.dtype not in (torch.float32, torch.bfloat16):
        projections = projections.float()
    return projections.contiguous()


def _num_points(value: Tensor, flat_shapes: Sequence[int], projections: Tensor) -> int:
    return projections.shape[-1] // (3 * value.shape[2] * (len(flat_shapes) // 2))
