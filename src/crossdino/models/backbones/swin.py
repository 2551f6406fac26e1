"""Swin Transformer as detectors use it: windows over maps of any size.

timm shifts a map and then fills it up to whole windows, so that on a map that is no multiple of the window the parts
that the shift carried around the edge land in windows whose attention mask is made for another place. The published
detection code (Liu et al. 2021, and DINO's backbone) fills up first and shifts then. The two agree only on multiples
of the window; checkpoints trained by the one lose accuracy in the other.
"""

from __future__ import annotations

from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F


class _FillThenShiftBlock(SwinTransformerBlock):
    """timm's block with the zeros added before the shift."""

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        window_height, window_width = self.window_size
        # What is a multiple of the window already, timm leaves alone.
        x = F.pad(x, (0, 0, 0, -width % window_width, 0, -height % window_height))
        return super()._attn(x)[:, :height, :width]


def fill_before_shift(body: nn.Module) -> None:
    """Make every block of a timm Swin Transformer fill its map up to whole windows before the shift, in place."""
    for module in body.modules():
        if isinstance(module, SwinTransformerBlock):
            module.__class__ = _FillThenShiftBlock
