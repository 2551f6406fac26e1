"""Cross Coding Twice Module (Section III-C, Eq. 1-3) and its ablations (Table VIII).

The module joins the tokens B that enter the encoder and the tokens E that leave it. The paper does not state the
re-weighting MLPs' structure in full; width 512 with GRN on the hidden width is what the authors' own measurement
(CLAP-Strip-T, 44M -> 45M parameters, 263 -> 277 GFLOPs in Table I) asks for. GRN sums over the valid tokens only, all
levels together, so that padding cannot change the result.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crossdino.config import Fusion
from crossdino.errors import InputError
from crossdino.models.dense import apply_linear, in_chunks, is_eager, is_plain, linear

# Where gates begin that shall let the encoder's output through: sigmoid(8) = 0.9997. Much more would leave them without
# a gradient, much less would let too much of the backbone features in.
_SATURATION = 8.0


class GlobalResponseNorm(nn.Module):
    """Global response normalisation over tokens (ConvNeXt V2), of valid tokens only.

    Args:
        dim: channels.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Normalise x (N, L, dim); `padding_mask` (N, L) is true on padding, None means no padding."""
        # Sums of squares over thousands of tokens need more digits than bf16 has.
        square = x.float().square()
        if padding_mask is not None:
            square = square.masked_fill(padding_mask[..., None], 0.0)
        return x * self.gain(square.sum(1, keepdim=True)).to(x.dtype) + self.beta.to(x.dtype)

    def gain(self, energy: Tensor) -> Tensor:
        """What each channel is multiplied by, from its sum of squares over all valid tokens; both (..., dim)."""
        # A channel that is zero on every token would have an infinite slope at the root.
        norm = torch.where(energy > 0, energy, 1.0).sqrt() * (energy > 0)
        return 1 + self.gamma * (norm / (norm.mean(-1, keepdim=True) + 1e-6))


class _Gate(nn.Module):
    """Eq. 1: sigmoid(GELU(LN(FC(x))))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(apply_linear(self.linear, x))).sigmoid()


class _Reweight(nn.Module):
    """The channel re-weighting between the two steps: sigmoid(FC(GRN(GELU(FC(x)))))."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.grn = GlobalResponseNorm(hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        as_built = is_plain(self.linear2) and is_plain(self.grn, GlobalResponseNorm)
        if torch.is_grad_enabled() or not (as_built and is_eager(x)) or len(x) == 0:
            return self.linear2(self.grn(F.gelu(self.linear1(x)), padding_mask)).sigmoid()
        masks = [None] * len(x) if padding_mask is None else padding_mask
        return torch.stack([self._reweigh_image(image, mask) for image, mask in zip(x, masks, strict=True)])

    def _reweigh_image(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        """One image, (L, C): the hidden map is read and written once, because GRN goes into the second layer."""
        energy = 0.0

        def hide(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
            nonlocal energy
            hidden = F.gelu(apply_linear(self.linear1, tokens))
            square = hidden.float().square()
            energy = energy + (square if mask is None else square.masked_fill(mask, 0.0)).sum(0)
            return hidden

        hidden = in_chunks(hide, x) if padding_mask is None else in_chunks(hide, x, padding_mask[:, None])
        assert isinstance(energy, Tensor)
        weight = self.linear2.weight * self.grn.gain(energy).to(self.linear2.weight.dtype)
        bias = self.linear2.bias + self.linear2.weight @ self.grn.beta
        return in_chunks(lambda tokens: linear(tokens, weight, bias).sigmoid_(), hidden)


class CrossCodingTwice(nn.Module):
    """CCTM with twice gating, or its form `once` that stops after the first step (Table VIII).

    Args:
        dim: token width C.
        hidden_dim: hidden width of the re-weighting MLPs.
        twice: false keeps only step one, `E_cf = E + B * (1 - gate_E)`.
    """

    def __init__(self, dim: int, hidden_dim: int, twice: bool = True) -> None:
        super().__init__()
        self.gate_encoder = _Gate(dim)
        self.twice = twice
        if twice:
            self.gate_backbone = _Gate(dim)
            self.reweight_encoder = _Reweight(dim, hidden_dim)
            self.reweight_backbone = _Reweight(dim, hidden_dim)

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        """Saturate the gates, so that E_cf begins near `2 E` (twice gating) or near `E` (`once`).

        Eq. 3 weighs with `2 E g + B (1 - g)`, g in (0, 1), so the encoder's output can only come through doubled; who
        wants the same detections must halve the layers that read E_cf. Only biases are set, to `_SATURATION`: g begins
        at about 0.999 and every parameter has a gradient from the first step.
        """
        if self.twice:
            nn.init.constant_(self.reweight_encoder.linear2.bias, _SATURATION)
            nn.init.constant_(self.reweight_backbone.linear2.bias, _SATURATION)
        else:
            nn.init.constant_(self.gate_encoder.norm.bias, _SATURATION)

    def cross_gate(self, backbone_tokens: Tensor, encoder_tokens: Tensor, padding_mask: Tensor | None) -> Tensor:
        """The cross gating map `B' E'` of Eq. 3 and Fig. 6, (N, L, C) in (0, 1); only with `twice`."""
        encoder_coded = in_chunks(self._code_encoder, encoder_tokens, backbone_tokens)
        backbone_coded = in_chunks(self._code_backbone, backbone_tokens, encoder_tokens)
        return self.reweight_backbone(backbone_coded, padding_mask) * self.reweight_encoder(encoder_coded, padding_mask)

    def forward(self, backbone_tokens: Tensor, encoder_tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Fuse B and E.

        Args:
            backbone_tokens: B, (N, L, C), projected backbone features before positions.
            encoder_tokens: E, (N, L, C).
            padding_mask: (N, L) bool, true on padding, or None.

        Returns:
            E_cf, (N, L, C).
        """
        if not self.twice:
            return in_chunks(self._code_encoder, encoder_tokens, backbone_tokens)
        gate = self.cross_gate(backbone_tokens, encoder_tokens, padding_mask)
        return in_chunks(_mix, encoder_tokens, backbone_tokens, gate)

    def _code_encoder(self, encoder_tokens: Tensor, backbone_tokens: Tensor) -> Tensor:
        """Step one, Eq. 2: E_cf' = E + B (1 - gate of E)."""
        return encoder_tokens + backbone_tokens * (1 - self.gate_encoder(encoder_tokens))

    def _code_backbone(self, backbone_tokens: Tensor, encoder_tokens: Tensor) -> Tensor:
        """Step one, Eq. 2: B_cf' = B + E (1 - gate of B)."""
        return backbone_tokens + encoder_tokens * (1 - self.gate_backbone(backbone_tokens))


def _mix(encoder_tokens: Tensor, backbone_tokens: Tensor, gate: Tensor) -> Tensor:
    """Step two, Eq. 3."""
    return 2 * encoder_tokens * gate + backbone_tokens * (1 - gate)


class MLPFusion(nn.Module):
    """The `MLP only` row of Table VIII: no gates, `E_cf = MLP(E) + MLP(B)`.

    Args:
        dim: token width C.
        hidden_dim: hidden width of both MLPs.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.mlp_encoder = nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))
        self.mlp_backbone = nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        """Begin with exactly `E_cf = E`, by GELU(x) - GELU(-x) = x; MLP(B) begins at zero.

        Raises:
            InputError: if the hidden width is less than twice the token width.
        """
        first, last, last_backbone = self.mlp_encoder[0], self.mlp_encoder[2], self.mlp_backbone[2]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear) and isinstance(last_backbone, nn.Linear)
        dim, hidden_dim = last.weight.shape
        if hidden_dim < 2 * dim:
            raise InputError(
                f"model.fusion_init 'identity' needs model.fusion_hidden_dim of at least {2 * dim}, not {hidden_dim}"
            )
        both = torch.cat((torch.eye(dim), -torch.eye(dim)))
        first.weight[: 2 * dim] = both
        nn.init.zeros_(last.weight)
        last.weight[:, : 2 * dim] = both.T
        for part in (first.bias, last.bias, last_backbone.weight, last_backbone.bias):
            nn.init.zeros_(part)

    def forward(self, backbone_tokens: Tensor, encoder_tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Fuse B and E, both (N, L, C); the mask is not needed because every token is treated alone."""
        return self.mlp_encoder(encoder_tokens) + self.mlp_backbone(backbone_tokens)


def build_fusion(fusion: Fusion, dim: int, hidden_dim: int) -> CrossCodingTwice | MLPFusion | None:
    """The fusion module by its name in the configuration; None for `none` (plain DINO)."""
    if fusion == "none":
        return None
    if fusion == "mlp":
        return MLPFusion(dim, hidden_dim)
    return CrossCodingTwice(dim, hidden_dim, twice=fusion == "cctm")
