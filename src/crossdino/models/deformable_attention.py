"""Multi-scale deformable attention: the operator, its engines, and the module of the DINO layers.

Source: Deformable DETR (Zhu et al. 2021), Eq. 3, as DINO uses it (method of the base detector). A query looks at a
few points of each feature level instead of at every token: the values are read bilinearly at the points and summed
with softmaxed weights.

Where we differ: the operators need no compiled extension. `crossdino::deformable_attention` takes locations and
weights, `crossdino::projected_attention` what the layer's projections say, so that locations and weights need not
exist as tensors. One of them stands in the graph whatever computes it, so multiply-add counts, `torch.compile` and
memory do not depend on the engine. The engines compute the same sum:

- a C++ kernel for the CPU, built on first use where a compiler is found (`deformable_cpu.py`);
- `embedding_bag` over the rows of the value (CPU, pure PyTorch; `deformable_engines.py`);
- Triton kernels on CUDA (`deformable_triton.py`);
- `grid_sample` (any device; the plain definition that the others are tested against, and what is exported).

The operators are in `deformable_operators.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from crossdino.models import dense
from crossdino.models.deformable_engines import embedding_bag_attention, grid_sample_attention, sampling_points
from crossdino.models.deformable_operators import attention_op, projected_op

__all__ = [
    "MultiScaleDeformableAttention",
    "deformable_attention",
    "embedding_bag_attention",
    "grid_sample_attention",
    "projected_attention",
]


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

    Raises:
        ValueError: the sizes do not fit each other.
    """
    if _is_exporting():
        return grid_sample_attention(value, spatial_shapes, sampling_locations, attention_weights)
    return attention_op(value, _flat(spatial_shapes), sampling_locations, attention_weights)


def projected_attention(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    reference_points: Tensor,
    projections: Tensor,
) -> Tensor:
    """`deformable_attention` from a layer's projections: locations and softmax are computed where they are used.

    They are computed in float32 whatever the dtype of `projections` (in float64 if any of the two is float64).

    Args:
        value: (N, L, heads, C_head), as above.
        spatial_shapes: (H_l, W_l) of every level, as above.
        reference_points: (N, Q, levels, 2) x, y, or (N, Q, levels, 4) cx, cy, w, h, in [0, 1] of the padded maps.
        projections: (N, Q, heads * levels * points * 3): first the offsets of all points (heads, levels, points, x
            and y), in pixels of their level for 2 coordinates and in halves of the box, divided by `points`, for 4;
            then the logits (heads, levels, points), softmaxed over levels and points.

    Returns:
        (N, Q, heads * C_head) in the dtype of `value`.

    Raises:
        ValueError: the sizes do not fit each other.
    """
    if _is_exporting():
        return grid_sample_attention(
            value, spatial_shapes, *sampling_points(reference_points, projections, spatial_shapes, value.shape[2])
        )
    return projected_op(value, _flat(spatial_shapes), reference_points, projections)


def _is_exporting() -> bool:
    """An exported graph must run where this package is not installed: it gets the plain definition."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def _flat(spatial_shapes: Sequence[tuple[int, int]]) -> list[int]:
    return [side for shape in spatial_shapes for side in shape]


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
        projected = dense.apply_linear(self.value_proj, value)
        if padding_mask is not None:
            # In place: a product does not need its result for its gradient.
            projected = projected.masked_fill_(padding_mask.unsqueeze(-1), 0.0)
        return projected.unflatten(-1, (self.num_heads, -1))

    def attend(
        self, query: Tensor, reference_points: Tensor, projected: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """The attention to tokens that are projected already; see `forward`."""
        # bfloat16's 8 bits would move a point that lies 4 pixels off by up to 0.016.
        with dense.float32_where(dense.in_float32(query), query):
            projections = self._projections(query)
        attended = projected_attention(projected, spatial_shapes, reference_points, projections)
        return dense.apply_linear(self.output_proj, attended)

    def _projections(self, query: Tensor) -> Tensor:
        layers = (self.sampling_offsets, self.attention_weights)
        if not all(dense.is_plain(layer) for layer in layers):
            return torch.cat([dense.apply_linear(layer, query) for layer in layers], dim=-1)
        # One product for both; their parameters are separate for the checkpoints.
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        return dense.linear(query, weight, bias)
