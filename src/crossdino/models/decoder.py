"""DINO's decoder: self-attention among queries, deformable attention to the tokens, iterative refinement of anchors.

Look forward twice: the box that a layer reports is its correction of the *not detached* box of the layer before; the
anchor handed on to the next layer is detached and uses the output before the decoder's final LayerNorm.

Where we differ from the official code, all in the way and not in the result:

- Denoising queries see themselves and the matched queries, which see none of them. The official decoder joins both and
  hides what must not be seen behind a mask of (D + Q)^2 pairs; here the matched queries attend among themselves without
  a mask, and the denoising queries come in blocks that look at their own D_b + Q. Blocks after the first, which only
  images with more objects than the budget have, keep their layers' inputs for the backward pass and nothing else.
- The key bias of the self-attention is left out: it adds the same number to all scores of a query, which the softmax
  takes away again. Its gradient is exactly zero, where rounding would otherwise make noise that Adam turns into steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from crossdino.models.deformable_attention import MultiScaleDeformableAttention
from crossdino.models.dense import float32_where, in_float32
from crossdino.models.position import anchor_sine_embedding, inverse_sigmoid
from crossdino.structures import LayerOutput


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


@dataclass
class QueryBlock:
    """Denoising queries that are computed together.

    Attributes:
        contents: (n, D, C), of the images that have something in this block.
        anchors: (n, D, 4) normalised cxcywh of the unpadded image.
        visible: (n, 1, D, D + Q) bool, true where a query may look at one of the block or of the matched queries.
        images: (n,) int64, which images of the batch these are; None: all of them.
    """

    contents: Tensor
    anchors: Tensor
    visible: Tensor
    images: Tensor | None = None


def block_visibility(islands: Tensor, num_queries: int, void: Tensor | None = None) -> Tensor:
    """Who may look at whom in a block: slots of one island at each other, and at all matched queries that are not void.

    Args:
        islands: (n, D) int64, the island of each slot; -1 for an empty one, seen by nobody but itself.
        num_queries: Q.
        void: (n, Q) bool, true for matched queries that stand for nothing, or None.

    Returns:
        (n, 1, D, D + Q) bool.
    """
    num_images, size = islands.shape
    # An empty slot sees itself, because a row without any visible column would become NaN.
    itself = torch.eye(size, dtype=torch.bool, device=islands.device)
    own = ((islands[:, :, None] == islands[:, None]) & (islands >= 0)[:, None]) | itself
    matched = islands.new_ones((), dtype=torch.bool) if void is None else ~void[:, None]
    return torch.cat((own, matched.expand(num_images, size, num_queries)), dim=-1)[:, None]


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

    def _heads(self, queries: Tensor, query_positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of the self-attention, (n, heads, Q, C / heads) each."""
        attention = self.self_attn
        dim = queries.shape[-1]
        weight_qk, weight_v = attention.in_proj_weight.split((2 * dim, dim))
        bias_q, bias_k, bias_v = attention.in_proj_bias.chunk(3)
        # Without the bias of the keys, see the top of this file.
        q, k = F.linear(queries + query_positions, weight_qk, torch.cat((bias_q, torch.zeros_like(bias_k)))).chunk(
            2, -1
        )
        v = F.linear(queries, weight_v, bias_v)
        q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return q, k, v

    def forward(
        self,
        queries: Tensor,
        query_positions: Tensor,
        reference_points: Tensor,
        values: Tensor,
        spatial_shapes: list[tuple[int, int]],
        visible: Tensor | None,
        matched: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One layer.

        Args:
            queries: (n, Q, C).
            query_positions: (n, Q, C).
            reference_points: (n, Q, levels, 4), anchors relative to each level's padded map.
            values: (n, L, heads, C / heads), from `MultiScaleDeformableAttention.project`.
            spatial_shapes: (H_l, W_l) of each level.
            visible: bool, broadcastable to (n, heads, Q, columns), true where a query (row) may look at another
                (column: these queries, then the matched ones if given), or None.
            matched: keys and values of further queries that these see, or None.

        Returns:
            (n, Q, C), and these queries' keys and values for others to see.
        """
        q, k, v = self._heads(queries, query_positions)
        seen_k, seen_v = (
            (k, v) if matched is None else (torch.cat(pair, dim=2) for pair in zip((k, v), matched, strict=True))
        )
        attended = F.scaled_dot_product_attention(q, seen_k, seen_v, attn_mask=visible)
        queries = self.norm2(queries + self.self_attn.out_proj(attended.transpose(1, 2).flatten(2)))
        attended = self.cross_attn.attend(queries + query_positions, reference_points, values, spatial_shapes)
        queries = self.norm1(queries + attended)
        return self.norm3(queries + self.linear2(F.relu(self.linear1(queries)))), (k, v)


class _State(NamedTuple):
    """Where a set of queries stands between two layers; boxes are (n, Q, 4)."""

    queries: Tensor
    anchors: Tensor
    # The same boxes as the anchors, but not detached.
    reported: Tensor


class _Surroundings(NamedTuple):
    """What all layers share."""

    spatial_shapes: list[tuple[int, int]]
    ratios: Tensor  # (N, 1, levels, 4)
    box_head: Callable[[Tensor], Tensor]
    class_head: Callable[[Tensor], Tensor]
    scale_anchor_embedding: bool


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

    def _advance(
        self,
        layer: DecoderLayer,
        around: _Surroundings,
        state: _State,
        values: Tensor,
        visible: Tensor | None,
        matched: tuple[Tensor, Tensor] | None,
        images: Tensor | None,
    ) -> tuple[_State, LayerOutput, tuple[Tensor, Tensor]]:
        """Take one set of queries through one layer and its heads."""
        queries, anchors, reported = state
        ratios = around.ratios
        if images is not None:
            ratios, values = ratios[images], values[images]
            matched = None if matched is None else (matched[0][images], matched[1][images])
        reference_points = anchors[:, :, None] * ratios
        embedded = reference_points[:, :, 0] if around.scale_anchor_embedding else anchors
        query_positions = self.ref_point_head(
            anchor_sine_embedding(embedded, queries.shape[-1]).to(self.norm.weight.dtype)
        )
        queries, own = layer(
            queries, query_positions, reference_points, values, around.spatial_shapes, visible, matched
        )
        output = self.norm(queries)
        boxes = (around.box_head(output).float() + inverse_sigmoid(reported)).sigmoid()
        if layer is not self.layers[-1]:
            reported = (around.box_head(queries).float() + inverse_sigmoid(anchors)).sigmoid()
        return _State(queries, reported.detach(), reported), LayerOutput(around.class_head(output), boxes), own

    def _layer(
        self,
        layer: DecoderLayer,
        around: _Surroundings,
        states: Sequence[_State],
        memory: Tensor,
        memory_mask: Tensor | None,
        visible: Tensor | None,
        blocks: Sequence[QueryBlock],
    ) -> tuple[list[_State], list[LayerOutput]]:
        """Take the matched queries (first) and all blocks through one layer."""
        # Under autocast the values stay in its dtype, for they are many, and the queries in float32.
        precise = in_float32(memory)
        values = layer.cross_attn.project(memory, memory_mask)
        with float32_where(precise, memory):
            return self._advance_all(layer, around, states, values, visible, blocks)

    def _advance_all(
        self,
        layer: DecoderLayer,
        around: _Surroundings,
        states: Sequence[_State],
        values: Tensor,
        visible: Tensor | None,
        blocks: Sequence[QueryBlock],
    ) -> tuple[list[_State], list[LayerOutput]]:
        """`_layer`, when the memory's values are there."""
        state, output, matched = self._advance(layer, around, states[0], values, visible, None, None)
        new_states, outputs = [state], [output]
        for number, (block, before) in enumerate(zip(blocks, states[1:], strict=True)):
            arguments = (layer, around, before, values, block.visible, matched, block.images)
            if number > 0 and torch.is_grad_enabled():
                # Nothing in a layer is random.
                state, output, _ = checkpoint(self._advance, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                state, output, _ = self._advance(*arguments)
            new_states.append(state)
            outputs.append(output)
        return new_states, outputs

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
        class_head: Callable[[Tensor], Tensor],
        scale_anchor_embedding: bool,
        blocks: Sequence[QueryBlock] = (),
        checkpoint_activations: bool = False,
    ) -> tuple[list[LayerOutput], list[list[LayerOutput]]]:
        """Decode.

        Args:
            queries: (N, Q, C) contents.
            anchors: (N, Q, 4) normalised cxcywh of the unpadded image.
            memory: (N, L, C).
            spatial_shapes: (H_l, W_l) of each level.
            valid_ratios: (N, levels, 2), width and height.
            memory_mask: (N, L) bool, true on padding, or None.
            visible: (N or 1, 1, Q, Q) bool, true where a query (row) may look at another (column), or None.
            box_head: (N, Q, C) -> (N, Q, 4), correction of the anchor before the sigmoid.
            class_head: (N, Q, C) -> (N, Q, K), class logits.
            scale_anchor_embedding: multiply the anchors by level 0's valid ratio before their sine embedding, as the
                official DINO does; the query position then depends on the padding of the batch.
            blocks: denoising queries; they see the matched queries, which do not see them.
            checkpoint_activations: keep only the inputs of each layer for the backward pass.

        Returns:
            For every layer the output of the matched queries, and for every layer those of the blocks.
        """
        ratios = torch.cat((valid_ratios, valid_ratios), dim=-1)[:, None]
        around = _Surroundings(spatial_shapes, ratios, box_head, class_head, scale_anchor_embedding)
        states = [_State(queries, anchors, anchors)]
        states += [_State(block.contents, block.anchors, block.anchors) for block in blocks]
        outputs: list[list[LayerOutput]] = []
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            arguments = (layer, around, states, memory, memory_mask, visible, blocks)
            if checkpoint_activations:
                states, output = checkpoint(self._layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                states, output = self._layer(*arguments)
            outputs.append(output)
        return [output[0] for output in outputs], [output[1:] for output in outputs]
