"""Multi-scale deformable attention: the operator, its engines, and the module of the DINO layers.

Source: Deformable DETR (Zhu et al. 2021), Eq. 3, as DINO uses it (method of the base detector). A query looks at a
few points of each feature level instead of at every token: the values are read bilinearly at the points and summed
with softmaxed weights.

Where we differ: the operator needs no compiled extension. One custom operator, `crossdino::deformable_attention`,
stands in the graph whatever computes it, so multiply-add counts, `torch.compile` and memory do not depend on the
engine. The engines compute the same sum:

- a C++ kernel for the CPU, built on first use where a compiler is found (`deformable_attention_cpu.cpp`);
- one `embedding_bag` over the rows of the value (CPU forward, pure PyTorch);
- `grid_sample` (any device; the plain definition that the others are tested against, and what is exported).

The backward pass keeps only the operator's inputs: without the kernel the samples are taken again, which costs one
more forward but not the (N, heads, C_head, Q, points) samples of every level and layer.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

_logger = logging.getLogger(__name__)

_KERNEL_SOURCE = Path(__file__).with_name("deformable_attention_cpu.cpp")
# No -ffast-math: NaN locations must stay NaN. The two -fno flags are what floor() needs to be vectorised.
_COMPILER_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# Entries (row, weight) that one embedding_bag call handles: 8 MB of indices and weights, which stay in the cache.
_BAG_CHUNK_ENTRIES = 1 << 20


def deformable_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of bilinear samples over all levels (Deformable DETR, Eq. 3, without its projections).

    Points outside a map read zeros (also the outer half of a border pixel fades to zero). Infinite locations count as
    outside; a NaN location makes its query and head NaN, so that a diverged training is seen.

    Args:
        value: (N, L, heads, C_head), the levels' tokens one after the other, each row by row.
        spatial_shapes: (H_l, W_l) of every level in tokens, padding included; the products add up to L.
        sampling_locations: (N, Q, heads, levels, points, 2), x and y in [0, 1] of the padded map; (0, 0) is the
            top-left corner of the top-left pixel, (1, 1) the bottom-right corner of the bottom-right one. Keep them in
            float32 even where the value is bfloat16: 8 bits do not resolve the pixels of a large map.
        attention_weights: (N, Q, heads, levels, points), normally softmaxed over levels and points together.

    Returns:
        (N, Q, heads * C_head) in the dtype of `value`.
    """
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        # An exported graph must run where this package is not installed.
        return grid_sample_attention(value, spatial_shapes, sampling_locations, attention_weights)
    flat_shapes = [side for shape in spatial_shapes for side in shape]
    return _attention_op(value, flat_shapes, sampling_locations, attention_weights)


def grid_sample_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The plain definition with `grid_sample`: any device, differentiable, exportable; arguments as above."""
    batch, _, heads, head_dim = value.shape
    queries = sampling_locations.shape[1]
    output = None
    for maps, grid, weights in _level_inputs(value, spatial_shapes, sampling_locations, attention_weights):
        samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        level_output = (samples * weights).sum(-1)
        output = level_output if output is None else output + level_output
    assert output is not None, "no feature level"
    return output.view(batch, heads * head_dim, queries).transpose(1, 2).to(value.dtype)


def _grid_sample_gradients(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `grid_sample_attention`, spelt out because autograd is off inside an operator."""
    batch, _, heads, head_dim = value.shape
    queries, _, _, points = sampling_locations.shape[1:5]
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    grad_output = grad_output.to(dtype).transpose(1, 2).reshape(batch * heads, head_dim, queries, 1)
    grad_value, grad_locations, grad_weights = [], [], []
    for maps, grid, weights in _level_inputs(value, spatial_shapes, sampling_locations, attention_weights):
        samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        grad_weights.append((samples * grad_output).sum(1).view(batch, heads, queries, points))
        # 0, 0: bilinear and zeros; the grid runs over [-1, 1], so locations have twice its slope.
        grad_maps, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            grad_output * weights, maps, grid, 0, 0, False, [True, True]
        )
        grad_value.append(grad_maps.view(batch, heads, head_dim, -1).permute(0, 3, 1, 2))
        grad_locations.append(grad_grid.view(batch, heads, queries, points, 2) * 2)
    return (
        torch.cat(grad_value, dim=1).to(value.dtype).contiguous(),
        torch.stack(grad_locations, dim=3).transpose(1, 2).to(sampling_locations.dtype).contiguous(),
        torch.stack(grad_weights, dim=3).transpose(1, 2).to(attention_weights.dtype).contiguous(),
    )


def _level_inputs(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per level the maps (N * heads, C_head, H, W), the grid (N * heads, Q, points, 2), the weights broadcastable."""
    batch, _, heads, head_dim = value.shape
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    # One map beyond the border everything is zero already; this keeps infinities out of the arithmetic.
    grids = sampling_locations.to(dtype).clamp(-1, 2) * 2 - 1
    levels = value.split([height * width for height, width in spatial_shapes], dim=1)
    for level, (height, width) in enumerate(spatial_shapes):
        maps = levels[level].to(dtype).permute(0, 2, 3, 1).reshape(batch * heads, head_dim, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        weights = attention_weights[:, :, :, level].to(dtype).transpose(1, 2).flatten(0, 1)
        yield maps, grid, weights.unsqueeze(1)


def embedding_bag_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The same sum as weighted bags of value rows, without gradients; about three times faster than `grid_sample`.

    Every query and head is one bag of `levels * points * 4` rows, weighted by attention times bilinear weight.
    Arguments and result as `deformable_attention`.
    """
    batch, num_tokens, heads, head_dim = value.shape
    queries = sampling_locations.shape[1]
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    device = value.device
    rows = value.to(dtype).reshape(-1, head_dim)
    sizes_wh = torch.tensor([(width, height) for height, width in spatial_shapes], dtype=dtype, device=device)
    sizes_wh = sizes_wh.unsqueeze(1)
    widths = sizes_wh[..., 0].to(torch.int64)
    starts = torch.tensor([height * width for height, width in spatial_shapes], device=device)
    starts = (starts.cumsum(0) - starts).unsqueeze(1)
    head_index = torch.arange(heads, device=device).view(heads, 1, 1)
    entries_per_query = heads * len(spatial_shapes) * sampling_locations.shape[4] * 4
    chunk = max(1, _BAG_CHUNK_ENTRIES // entries_per_query)
    output = value.new_empty((batch, queries, heads * head_dim))
    for image in range(batch):
        for first in range(0, queries, chunk):
            part = slice(first, first + chunk)
            xy = sampling_locations[image, part].to(dtype).clamp(-1, 2) * sizes_wh - 0.5
            low = xy.floor()
            fraction = xy - low
            corners = torch.stack((low, low + 1))
            # Multiplied rather than selected: NaN must survive.
            axis_weights = torch.stack((1 - fraction, fraction)) * ((corners >= 0) & (corners < sizes_wh))
            index = torch.minimum(corners.nan_to_num(0.0).clamp(min=0), sizes_wh - 1).to(torch.int64)
            tokens = starts + index[None, ..., 0] + index[:, None, ..., 1] * widths
            bag_rows = ((image * num_tokens + tokens) * heads + head_index).permute(2, 3, 0, 1, 4, 5)
            bag_weights = axis_weights[None, ..., 0] * axis_weights[:, None, ..., 1] * attention_weights[image, part]
            bag_weights = bag_weights.to(dtype).permute(2, 3, 0, 1, 4, 5)
            bags = bag_rows.shape[0] * heads
            output[image, part] = F.embedding_bag(
                bag_rows.reshape(bags, -1), rows, mode="sum", per_sample_weights=bag_weights.reshape(bags, -1)
            ).view(-1, heads * head_dim)
    return output


# --- the compiled kernel ------------------------------------------------------------------------------------------


@functools.cache
def _cpu_kernel() -> ctypes.CDLL | None:
    """The C++ kernel, built if need be; None where it is switched off or cannot be built (never an error)."""
    if os.environ.get("CROSSDINO_CPU_KERNEL") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_build_cpu_kernel()))
        sizes = [ctypes.c_int64] * 7 + [ctypes.c_int]
        library.crossdino_forward.argtypes = [ctypes.c_int] + [ctypes.c_void_p] * 6 + sizes
        library.crossdino_backward.argtypes = [ctypes.c_int] + [ctypes.c_void_p] * 9 + sizes
        library.crossdino_forward.restype = library.crossdino_backward.restype = None
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        _logger.info("deformable attention runs in PyTorch, its CPU kernel could not be built: %s", error)
        return None
    return library


def _build_cpu_kernel() -> Path:
    """Compile `deformable_attention_cpu.cpp`, unless a build of just this source, compiler and processor is cached."""
    candidates = (os.environ.get("CXX"), "g++", "clang++", "c++")
    compiler = next((path for name in candidates if name and (path := shutil.which(name))), None)
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found")
    flags = (*_COMPILER_FLAGS, *_openmp_flags())
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60, check=True).stdout
    key = hashlib.sha256(_KERNEL_SOURCE.read_bytes())
    for part in (compiler.encode(), version, " ".join(flags).encode(), _processor().encode()):
        key.update(b"\0" + part)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crossdino"
    library = cache / f"deformable_attention_{key.hexdigest()[:20]}.so"
    if library.exists():
        return library
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Processes of one training may build at the same time: each under its own name, then an atomic rename.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / library.name
        command = [compiler, str(_KERNEL_SOURCE), *flags, "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if result.returncode != 0:
            raise OSError(f"{compiler}: {result.stderr.strip().splitlines()[:1]}")
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


def _kernel_for(value: Tensor) -> ctypes.CDLL | None:
    """The kernel, where it can take this value."""
    if value.device.type != "cpu" or value.dtype not in (torch.float32, torch.bfloat16):
        return None
    return _cpu_kernel()


def _kernel_sizes(value: Tensor, locations: Tensor) -> tuple[int, ...]:
    queries, _, levels, points = locations.shape[1:5]
    return (*value.shape, queries, levels, points, torch.get_num_threads())


def _kernel_forward(
    kernel: ctypes.CDLL, value: Tensor, flat_shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> Tensor:
    value, locations, weights = value.contiguous(), locations.float().contiguous(), weights.float().contiguous()
    batch, _, heads, head_dim = value.shape
    output = value.new_empty((batch, locations.shape[1], heads * head_dim))
    workspace = torch.empty(value.numel(), dtype=torch.float32)
    kernel.crossdino_forward(
        value.dtype == torch.bfloat16,
        value.data_ptr(),
        (ctypes.c_int64 * len(flat_shapes))(*flat_shapes),
        locations.data_ptr(),
        weights.data_ptr(),
        output.data_ptr(),
        workspace.data_ptr(),
        *_kernel_sizes(value, locations),
    )
    return output


def _kernel_backward(
    kernel: ctypes.CDLL,
    grad_output: Tensor,
    value: Tensor,
    flat_shapes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    location_dtype, weight_dtype = locations.dtype, weights.dtype
    value, locations, weights = value.contiguous(), locations.float().contiguous(), weights.float().contiguous()
    grad_output = grad_output.to(value.dtype).contiguous()
    grad_value = torch.empty_like(value)
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    workspace = torch.empty(2 * value.numel(), dtype=torch.float32)
    kernel.crossdino_backward(
        value.dtype == torch.bfloat16,
        grad_output.data_ptr(),
        value.data_ptr(),
        (ctypes.c_int64 * len(flat_shapes))(*flat_shapes),
        locations.data_ptr(),
        weights.data_ptr(),
        grad_value.data_ptr(),
        grad_locations.data_ptr(),
        grad_weights.data_ptr(),
        workspace.data_ptr(),
        *_kernel_sizes(value, locations),
    )
    return grad_value, grad_locations.to(location_dtype), grad_weights.to(weight_dtype)


# --- the operator -----------------------------------------------------------------------------------------------------


def _pairs(flat_shapes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(flat_shapes[0::2], flat_shapes[1::2], strict=True))


def _check_shapes(value: Tensor, flat_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> None:
    """The kernel trusts its sizes, so a disagreement must stop here."""
    batch, num_tokens, heads, _ = value.shape
    levels = len(flat_shapes) // 2
    tokens = sum(height * width for height, width in _pairs(flat_shapes))
    if tokens != num_tokens:
        raise ValueError(f"spatial_shapes {_pairs(flat_shapes)} hold {tokens} tokens, but the value has {num_tokens}")
    expected = (batch, locations.shape[1], heads, levels, locations.shape[4], 2)
    if tuple(locations.shape) != expected or tuple(weights.shape) != expected[:-1]:
        raise ValueError(
            f"sampling_locations {tuple(locations.shape)} and attention_weights {tuple(weights.shape)} do not fit "
            f"value {tuple(value.shape)} with {levels} levels"
        )


@torch.library.custom_op("crossdino::deformable_attention", mutates_args=())
def _attention_op(
    value: Tensor, flat_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    _check_shapes(value, flat_shapes, sampling_locations, attention_weights)
    batch, _, heads, head_dim = value.shape
    if sampling_locations.numel() == 0 or value.numel() == 0:
        return value.new_zeros((batch, sampling_locations.shape[1], heads * head_dim))
    kernel = _kernel_for(value)
    if kernel is not None:
        return _kernel_forward(kernel, value, flat_shapes, sampling_locations, attention_weights)
    shapes = _pairs(flat_shapes)
    if value.device.type != "cpu":
        return grid_sample_attention(value, shapes, sampling_locations, attention_weights).contiguous()
    return embedding_bag_attention(value, shapes, sampling_locations, attention_weights)


@_attention_op.register_fake
def _(value: Tensor, flat_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    return value.new_empty((value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3]))


@torch.library.custom_op("crossdino::deformable_attention_backward", mutates_args=())
def _attention_backward_op(
    grad_output: Tensor,
    value: Tensor,
    flat_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if sampling_locations.numel() == 0 or value.numel() == 0:
        inputs = (value, sampling_locations, attention_weights)
        grad_value, grad_locations, grad_weights = (tensor.new_zeros(tensor.shape) for tensor in inputs)
        return grad_value, grad_locations, grad_weights
    kernel = _kernel_for(value)
    if kernel is not None:
        return _kernel_backward(kernel, grad_output, value, flat_shapes, sampling_locations, attention_weights)
    return _grid_sample_gradients(grad_output, value, _pairs(flat_shapes), sampling_locations, attention_weights)


@_attention_backward_op.register_fake
def _(
    grad_output: Tensor,
    value: Tensor,
    flat_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        value.new_empty(value.shape),
        sampling_locations.new_empty(sampling_locations.shape),
        attention_weights.new_empty(attention_weights.shape),
    )


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.flat_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, sampling_locations, attention_weights = ctx.saved_tensors
    grads = _attention_backward_op(grad_output, value, ctx.flat_shapes, sampling_locations, attention_weights)
    return grads[0], None, grads[1], grads[2]


_attention_op.register_autograd(_backward, setup_context=_save_inputs)


@register_flop_formula([torch.ops.crossdino.deformable_attention, torch.ops.crossdino.deformable_attention_backward])
def _attention_flops(*_args: Any, **_kwargs: Any) -> int:
    """Zero: sampling is interpolation, which the field's counts leave out, as this counter does for `grid_sample`.

    The official DINO-4scale ResNet-50 at 800x1333 (22223 tokens) is measured with 170.4 GMACs in the encoder, and its
    linear layers alone have 6 * 22223 * 1277952 = 170.40. The weighted sum of the samples would add 0.55 (0.3 %),
    the four bilinear corners of each sample 2.2 more.
    """
    return 0


class MultiScaleDeformableAttention(nn.Module):
    """Multi-scale deformable attention with its projections (Deformable DETR, Eq. 3).

    Submodules are named as in the official DINO checkpoints. Under bfloat16 autocast the projections run in bfloat16
    (an offset of 4 pixels is then off by at most 0.016), but locations and the softmax are computed in float32: a
    location in bfloat16 would be off by up to a pixel of a large map.

    Args:
        hidden_dim: width C; a multiple of `num_heads`.
        num_levels: feature levels.
        num_heads: attention heads.
        num_points: sampling points per head and level.
    """

    def __init__(self, hidden_dim: int = 256, num_levels: int = 4, num_heads: int = 8, num_points: int = 4) -> None:
        """Build the four projections with Deformable DETR's initial values."""
        super().__init__()
        assert hidden_dim % num_heads == 0, f"hidden_dim {hidden_dim} is not a multiple of num_heads {num_heads}"
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.num_points = num_points
        self.sampling_offsets = nn.Linear(hidden_dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(hidden_dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as Deformable DETR: head h looks along the angle 2*pi*h/heads, point p at p + 1 pixels."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)
        steps = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        ring = directions[:, None, None, :] * steps[:, None]
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(ring.expand(-1, self.num_levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend to the points around the reference of each query.

        Args:
            query: (N, Q, C), position already added.
            reference_points: (N, Q, levels, 2) x, y, or (N, Q, levels, 4) cx, cy, w, h, in [0, 1] of the padded maps.
                Offsets are pixels of their level for points, and fractions of the box for boxes.
            value: (N, L, C) tokens of all levels.
            spatial_shapes: (H_l, W_l) per level.
            padding_mask: (N, L) bool, true on padding, whose projected values become zero; None: no padding.

        Returns:
            (N, Q, C).
        """
        return self.attend(query, reference_points, self.project(value, padding_mask), spatial_shapes)

    def project(self, value: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """What `attend` reads: (N, L, heads, C / heads), for queries that come in several parts; see `forward`."""
        projected = self.value_proj(value)
        if padding_mask is not None:
            projected = projected.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        return projected.unflatten(-1, (self.num_heads, -1))

    def attend(
        self, query: Tensor, reference_points: Tensor, projected: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """The attention to tokens that are projected already; see `forward`."""
        batch, queries, _ = query.shape
        dtype = torch.promote_types(reference_points.dtype, torch.float32)
        points = (batch, queries, self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).to(dtype).view(*points, 2)
        weights = self.attention_weights(query).to(dtype).view(batch, queries, self.num_heads, -1)
        weights = weights.softmax(dim=-1).view(points)
        references = reference_points.to(dtype)[:, :, None, :, None]
        if reference_points.shape[-1] == 2:
            sizes_wh = torch.tensor(
                [(width, height) for height, width in spatial_shapes], dtype=dtype, device=query.device
            )
            locations = references + offsets / sizes_wh.unsqueeze(1)
        else:
            locations = references[..., :2] + offsets * (references[..., 2:] * (0.5 / self.num_points))
        return self.output_proj(deformable_attention(projected, spatial_shapes, locations, weights))
