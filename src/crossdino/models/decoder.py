"""DINO's decoder: self-attention among queries, deformable attention to the tokens, iterative refinement of anchors.

Look forward twice: the box that a layer reports is its correction of the *not detached* box of the layer before; the
anchor handed on to the next layer is detached and uses the output before the decoder's final LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossdino.models.deformable_attention import MultiScaleDeformableAttention
from crossdino.models.position import anchor_sine_embedding, inverse_sigmoid


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        input_dim, hidden_dim, output_dim: widths.
        num_layers: number of linear layers.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        """(..., input_dim) -> (..., output_dim)."""
        for layer in list(self.layers)[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention, feed-forward network; post-norm, ReLU.

    Args:
        hidden_dim: query width C.
        feedforward_dim: hidden width of the feed-forward network.
        num_levels, num_heads, num_points: of the attentions.
    """

    def __init__(self, hidden_dim: int, feedforward_dim: int, num_levels: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(hidden_dim, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(hidden_dim)
        self.cross_attn = MultiScaleDeformableAttention(hidden_dim, num_levels, num_heads, num_points)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.linear1 = nn.Linear(hidden_dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, hidden_dim)
        self.norm3 = nn.LayerNorm(hidden_dim)

    def _self_attention(self, queries: Tensor, query_positions: Tensor, visible: Tensor | None) -> Tensor:
        # nn.MultiheadAttention would copy a per-image mask once per head; the operator beneath it broadcasts.
        attention = self.self_attn
        positioned = queries + query_positions
        weight_qk, weight_v = attention.in_proj_weight.split((2 * queries.shape[-1], queries.shape[-1]))
        bias_qk, bias_v = attention.in_proj_bias.split((2 * queries.shape[-1], queries.shape[-1]))
        q, k = F.linear(positioned, weight_qk, bias_qk).chunk(2, dim=-1)
        v = F.linear(queries, weight_v, bias_v)
        q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return attention.out_proj(attended.transpose(1, 2).flatten(2))

    def forward(
        self,
        queries: Tensor,
        query_positions: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        spatial_shapes: list[tuple[int, int]],
        memory_mask: Tensor | None,
        visible: Tensor | None,
    ) -> Tensor:
        """One layer.

        Args:
            queries: (N, Q, C).
            query_positions: (N, Q, C).
            reference_points: (N, Q, levels, 4), anchors relative to each level's padded map.
            memory: (N, L, C).
            spatial_shapes: (H_l, W_l) of each level.
            memory_mask: (N, L) bool, true on padding, or None.
            visible: (N or 1, 1, Q, Q) bool, true where a query (row) may look at another (column), or None.

        Returns:
            (N, Q, C).
        """
        queries = self.norm2(queries + self._self_attention(queries, query_positions, visible))
        attended = self.cross_attn(queries + query_positions, reference_points, memory, spatial_shapes, memory_mask)
        queries = self.norm1(queries + attended)
        return self.norm3(queries + self.linear2(F.relu(self.linear1(queries))))


class Decoder(nn.Module):
    """A stack of `DecoderLayer` with iterative box refinement; arguments as there, and `num_layers`."""

    def __init__(
        self,
        num_layers: int,
        hidden_dim: int,
        feedforward_dim: int,
        num_levels: int,
        num_heads: int,
        num_points: int,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(hidden_dim, feedforward_dim, num_levels, num_heads, num_points) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_dim)
        self.ref_point_head = MLP(2 * hidden_dim, hidden_dim, hidden_dim, 2)

    def forward(
        self,
        queries: Tensor,
        anchors: Tensor,
        memory: Tensor,
        spatial_shapes: list[tuple[int, int]],
        valid_ratios: Tensor,
        memory_mask: Tensor | None,
        visible: Tensor | None,
        box_head: Callable[[Tensor], Tensor],
        scale_anchor_embedding: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Decode.

        Args:
            queries: (N, Q, C) contents.
            anchors: (N, Q, 4) normalised cxcywh of the unpadded image.
            memory: (N, L, C).
            spatial_shapes: (H_l, W_l) of each level.
            valid_ratios: (N, levels, 2), width and height.
            memory_mask: (N, L) bool, true on padding, or None.
            visible: see `DecoderLayer.forward`.
            box_head: (N, Q, C) -> (N, Q, 4), correction of the anchor before the sigmoid.
            scale_anchor_embedding: multiply the anchors by level 0's valid ratio before their sine embedding, as the
                official DINO does; the query position then depends on the padding of the batch.

        Returns:
            For every layer the normalised output (N, Q, C), and its boxes (N, Q, 4).
        """
        ratios = torch.cat((valid_ratios, valid_ratios), dim=-1)[:, None]
        outputs: list[Tensor] = []
        boxes: list[Tensor] = []
        reported = anchors
        for index, layer in enumerate(self.layers):
            reference_points = anchors[:, :, None] * ratios
            embedded = reference_points[:, :, 0] if scale_anchor_embedding else anchors
            query_positions = self.ref_point_head(
                anchor_sine_embedding(embedded, queries.shape[-1]).to(self.ref_point_head.layers[0].weight.dtype)
            )
            queries = layer(queries, query_positions, reference_points, memory, spatial_shapes, memory_mask, visible)
            output = self.norm(queries)
            outputs.append(output)
            boxes.append((box_head(output).float() + inverse_sigmoid(reported)).sigmoid())
            if index + 1 < len(self.layers):
                reported = (box_head(queries).float() + inverse_sigmoid(anchors)).sigmoid()
                anchors = reported.detach()
        return outputs, boxes
