"""Position encodings of DINO (method of DINO-4scale): of the feature maps, and of the decoder's anchors.

Both put the y axis before the x axis and interleave sine and cosine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _interleaved_sine(angle: Tensor, num_features: int, temperature: float) -> Tensor:
    """Sine and cosine of `angle` (...,) at `num_features / 2` frequencies each, interleaved: (..., num_features)."""
    index = torch.arange(num_features // 2, dtype=torch.float32, device=angle.device)
    frequency = temperature ** (2 * index / num_features)
    phase = angle[..., None] / frequency
    return torch.stack((phase.sin(), phase.cos()), dim=-1).flatten(-2)


def sine_position(padding_mask: Tensor, dim: int = 256, temperature: float = 20.0) -> Tensor:
    """Sine position encoding of a feature map, normalised over the part of it that is not padding.

    As `PositionEmbeddingSineHW` of the official DINO: the coordinate is the running count of valid positions (1, 2, ...
    without a half-pixel shift), divided by the last count + 1e-6, times 2 pi.

    Args:
        padding_mask: (N, H, W) bool, true on padding.
        dim: channels of the encoding; the first half encodes y, the second x.
        temperature: base of the frequencies.

    Returns:
        (N, H, W, dim) float32.
    """
    valid = (~padding_mask).to(torch.float32)
    y = valid.cumsum(1)
    x = valid.cumsum(2)
    y = y / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = x / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    return torch.cat((_interleaved_sine(y, dim // 2, temperature), _interleaved_sine(x, dim // 2, temperature)), dim=-1)


def sine_position_grid(height: int, width: int, dim: int, device: torch.device, temperature: float = 20.0) -> Tensor:
    """`sine_position` of a map without padding, to the bit, from one row and one column.

    Args:
        height: of the map.
        width: of the map.
        dim: channels of the encoding.
        device: where to make it.
        temperature: base of the frequencies.

    Returns:
        (height, width, dim) float32.
    """
    column, row = (
        _interleaved_sine(count / (count[-1] + 1e-6) * (2 * math.pi), dim // 2, temperature)
        for count in (torch.arange(1, side + 1, dtype=torch.float32, device=device) for side in (height, width))
    )
    return torch.cat((column[:, None].expand(-1, width, -1), row[None].expand(height, -1, -1)), dim=-1)


def anchor_sine_embedding(anchors: Tensor, dim: int = 256) -> Tensor:
    """Sine embedding of 4-D anchors, in the order y, x, w, h, temperature 10000, scale 2 pi.

    Args:
        anchors: (..., 4) normalised cxcywh.
        dim: width of the transformer; each coordinate gets dim / 2 features.

    Returns:
        (..., 2 * dim) float32.
    """
    order = anchors.float()[..., [1, 0, 2, 3]] * (2 * math.pi)
    return _interleaved_sine(order, dim // 2, 10000.0).flatten(-2)


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Logit of a probability, with both x and 1 - x clamped from below at `eps` (DINO's value)."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
