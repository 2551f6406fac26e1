"""DINO's encoder: layers of multi-scale deformable self-attention over the tokens of all levels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossdino.models.deformable_attention import MultiScaleDeformableAttention
from crossdino.models.dense import apply_linear, in_chunks


def encoder_reference_points(spatial_shapes: list[tuple[int, int]], valid_ratios: Tensor) -> Tensor:
    """Centres of all tokens, as every level sees them.

    Args:
        spatial_shapes: (H_l, W_l) of each level.
        valid_ratios: (N, levels, 2), share of width and height of each level's map that the image covers.

    Returns:
        (N, L, levels, 2), x and y relative to the (padded) map of each level.
    """
    centres = token_centres(spatial_shapes, valid_ratios)
    return centres[:, :, None] * valid_ratios[:, None]


def token_centres(spatial_shapes: list[tuple[int, int]], valid_ratios: Tensor) -> Tensor:
    """Centres of all tokens relative to the unpadded image: (N, L, 2), x and y; padding lies beyond 1."""
    centres = []
    for level, (height, width) in enumerate(spatial_shapes):
        y = (torch.arange(height, dtype=torch.float32, device=valid_ratios.device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=valid_ratios.device) + 0.5) / width
        grid = torch.stack((x[None, :].expand(height, width), y[:, None].expand(height, width)), -1)
        centres.append(grid.reshape(1, -1, 2) / valid_ratios[:, level, None, :])
    return torch.cat(centres, dim=1)


class EncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each followed by its LayerNorm (post-norm, ReLU).

    Args:
        hidden_dim: token width C.
        feedforward_dim: hidden width of the feed-forward network.
        num_levels, num_heads, num_points: of the deformable attention.
    """

    def __init__(self, hidden_dim: int, feedforward_dim: int, num_levels: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        self.self_attn = MultiScaleDeformableAttention(hidden_dim, num_levels, num_heads, num_points)
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.linear1 = nn.Linear(hidden_dim, feedforward_dim)
        self.linear2 = nn.Linear(feedforward_dim, hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        reference_points: Tensor,
        spatial_shapes: list[tuple[int, int]],
        padding_mask: Tensor | None,
    ) -> Tensor:
        """Tokens (N, L, C) in, tokens (N, L, C) out; the other arguments are those of `Encoder.forward`."""
        attended = self.self_attn(tokens + positions, reference_points, tokens, spatial_shapes, padding_mask)
        return in_chunks(self._finish, tokens, attended)

    def _finish(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention, which treats every token alone."""
        tokens = self.norm1(tokens + attended)
        hidden = apply_linear(self.linear1, tokens, "relu")
        return self.norm2(tokens + apply_linear(self.linear2, hidden))


class Encoder(nn.Module):
    """A stack of `EncoderLayer`; arguments as there, and `num_layers`."""

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
            EncoderLayer(hidden_dim, feedforward_dim, num_levels, num_heads, num_points) for _ in range(num_layers)
        )

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        spatial_shapes: list[tuple[int, int]],
        valid_ratios: Tensor,
        padding_mask: Tensor | None,
        checkpoint_activations: bool = False,
    ) -> Tensor:
        """Encode the tokens of all levels.

        Args:
            tokens: (N, L, C), the levels one after the other.
            positions: (N, L, C), position plus level embedding.
            spatial_shapes: (H_l, W_l) of each level.
            valid_ratios: (N, levels, 2), see `encoder_reference_points`.
            padding_mask: (N, L) bool, true on padding, or None.
            checkpoint_activations: keep only the inputs of each layer for the backward pass.

        Returns:
            (N, L, C).
        """
        reference_points = encoder_reference_points(spatial_shapes, valid_ratios)
        for layer in self.layers:
            arguments = (tokens, positions, reference_points, spatial_shapes, padding_mask)
            if checkpoint_activations:
                # Nothing in a layer is random.
                tokens = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = layer(*arguments)
        return tokens
