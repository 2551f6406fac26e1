"""Deformable attention on CUDA by Triton: float32, bfloat16 and float16 values with float32 locations.

Triton comes with torch's CUDA builds; where it is missing, or a kernel cannot be compiled (Triton needs a C compiler
for its launcher), the functions return None, PyTorch computes, and one line of the log says so. Locations and softmax
stay in PyTorch on CUDA. The gradient of the value is added up in float32 by atomic additions: its last bits depend on
the order in which the GPU runs, as those of `grid_sample` do.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

_DEVICES = ("cuda",)
# Numbers of one block of queries and channels: eight a thread, with four warps.
_BLOCK_NUMBERS = 1024


def triton_forward(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor | None:
    """`deformable_attention` on CUDA; None where Triton cannot do it."""
    if not _suits(value, sampling_locations, attention_weights):
        return None
    with _Fallback() as outcome:
        outcome.result = launch_forward(value, spatial_shapes, sampling_locations, attention_weights)
    return outcome.result


def triton_gradients(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The gradients of `triton_forward`; None where Triton cannot do it."""
    if not _suits(value, sampling_locations, attention_weights):
        return None
    with _Fallback() as outcome:
        outcome.result = launch_backward(grad_output, value, spatial_shapes, sampling_locations, attention_weights)
    return outcome.result


class _Fallback:
    """Turns a failure to compile or to launch into the result None, for good; anything else goes on."""

    failed = False

    def __init__(self) -> None:
        self.result: Any = None

    def __enter__(self) -> _Fallback:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _traceback: object) -> bool:
        # No memory, or a GPU in disorder, is nothing that PyTorch would do better.
        if not isinstance(error, Exception) or isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
            return False
        _Fallback.failed = True
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _logger.warning("deformable attention runs in PyTorch, its Triton kernel failed: %s", reason)
        return True


def _suits(value: Tensor, *float32_tensors: Tensor) -> bool:
    if value.device.type not in _DEVICES or value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if any(tensor.dtype == torch.float64 for tensor in float32_tensors):
        return False
    return _has_triton() and not _Fallback.failed


@functools.cache
def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        _logger.info("deformable attention runs in PyTorch, Triton is not installed")
    return found


def _kernels() -> Any:
    """Imported on first use: Triton is slow to import, and not everywhere."""
    from crossdino.models import deformable_triton_kernels

    return deformable_triton_kernels


def launch_forward(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Run the forward kernel; on CPU tensors only under Triton's interpreter."""
    value = value.contiguous()
    locations, weights = sampling_locations.float().contiguous(), attention_weights.float().contiguous()
    batch, tokens, heads, head_dim = value.shape
    queries = locations.shape[1]
    output = value.new_empty((batch, queries, heads * head_dim))
    grid, constants = _launch(value, locations)
    with torch.cuda.device_of(value):
        _kernels().forward_kernel[grid](
            value, _shape_table(tuple(spatial_shapes), value.device), locations, weights, output, tokens, queries,
            **constants,
        )  # fmt: skip
    return output


def launch_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernel; on CPU tensors only under Triton's interpreter."""
    value, grad_output = value.contiguous(), grad_output.contiguous()
    locations, weights = sampling_locations.float().contiguous(), attention_weights.float().contiguous()
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    grid, constants = _launch(value, locations)
    with torch.cuda.device_of(value):
        _kernels().backward_kernel[grid](
            grad_output, value, _shape_table(tuple(spatial_shapes), value.device), locations, weights,
            grad_value, grad_locations, grad_weights, value.shape[1], locations.shape[1], **constants,
        )  # fmt: skip
    return (
        grad_value.to(value.dtype),
        grad_locations.to(sampling_locations.dtype),
        grad_weights.to(attention_weights.dtype),
    )


def _launch(value: Tensor, locations: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """The number of programs, and what the kernels are compiled for."""
    batch, queries, heads, levels, points, _ = locations.shape
    head_dim = value.shape[-1]
    block_channels = 1 << (head_dim - 1).bit_length()
    block_queries = max(1, _BLOCK_NUMBERS // block_channels)
    constants = {
        "HEADS": heads,
        "CHANNELS": head_dim,
        "LEVELS": levels,
        "POINTS": points,
        "BLOCK_QUERIES": block_queries,
        "BLOCK_CHANNELS": block_channels,
    }
    return (batch * heads * -(-queries // block_queries),), constants


@functools.lru_cache(maxsize=256)
def _shape_table(spatial_shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(levels, 2) int32; kept, because a copy to the device waits for it."""
    return torch.tensor(spatial_shapes, dtype=torch.int32, device=device)
