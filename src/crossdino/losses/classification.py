"""Boost and focal loss of many predictions in one pass: sums over the classes, with the gradient written out.

`crossdino.losses.boost` is the definition; the numbers are the same. Nearly everything in it is background, whose loss
(1 - alpha) p^gamma softplus(x) has a gradient that costs little more when it is computed along with the value. So one
tensor of the logits' size is kept for the backward pass, where the definition, left to autograd, keeps a dozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from crossdino.losses.boost import positive_loss

# Logits computed at once: 4 MB for each of the few tensors in between, however many predictions and classes there are.
_LOGITS_AT_ONCE = 1 << 20


def classification_loss(
    pred_logits: Tensor,
    labels: Tensor,
    pred_size: Tensor,
    target_size: Tensor,
    ignored: Tensor | None = None,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    beta: float = 1.0,
) -> Tensor:
    """Boost loss of every prediction, summed over the classes (Eq. 5); focal loss where sizes and beta are 1.

    Args:
        pred_logits: (M, K) class logits.
        labels: (M,) int64, class of the matched object, or -1 for background.
        pred_size: (M,) sqrt(w * h) of the normalised predicted box, in [0, 1]; read only where matched.
        target_size: (M,) the same of the matched object's box.
        ignored: (M, K) bool, where a prediction is no negative, or None. At its label it remains a positive.
        alpha: weight of positives against negatives.
        gamma: focusing exponent.
        beta: exponent of the category-size label.

    Returns:
        (M,) not negative; float32 (float64 for logits in float64).
    """
    background, at_label = _Background.apply(pred_logits, labels, ignored, alpha, gamma)
    positive = positive_loss(F.logsigmoid(at_label), pred_size, target_size, alpha=alpha, gamma=gamma, beta=beta)
    return background + torch.where(labels >= 0, positive, 0.0)


class _Background(torch.autograd.Function):
    """The loss of all negatives of each prediction, and its logit at its label (at class 0 without one)."""

    @staticmethod
    def forward(
        ctx: Any, pred_logits: Tensor, labels: Tensor, ignored: Tensor | None, alpha: float, gamma: float
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(pred_logits.dtype, torch.float32)
        sums = torch.empty(len(pred_logits), dtype=dtype, device=pred_logits.device)
        slopes = torch.empty_like(pred_logits, dtype=dtype) if ctx.needs_input_grad[0] else None
        column = labels.clamp(min=0)[:, None]
        matched = (labels >= 0)[:, None]
        step = max(1, _LOGITS_AT_ONCE // pred_logits.shape[1])
        for start in range(0, len(pred_logits), step):
            some = slice(start, start + step)
            left_out = (column[some], matched[some], None if ignored is None else ignored[some])
            x = pred_logits[some].to(dtype)
            p, minus_log = x.sigmoid(), F.softplus(x)  # of 1 - p
            weight = p.pow(gamma).mul_(1 - alpha)
            if slopes is not None:
                # The derivative of weight * minus_log.
                slope = torch.rsub(p, 1).mul_(minus_log).mul_(gamma).add_(p).mul_(weight)
                slopes[some] = _of_negatives(slope, *left_out)
            sums[some] = _of_negatives(weight.mul_(minus_log), *left_out).sum(1)
        if slopes is not None:
            ctx.save_for_backward(slopes, column)
            ctx.logits_dtype = pred_logits.dtype
        return sums, pred_logits.gather(1, column)[:, 0].to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_sums, grad_at_label = grad_outputs
        slopes, column = ctx.saved_tensors
        gradient = slopes * grad_sums[:, None]
        # Zero is there where a label is, and zero is added where none is.
        gradient.scatter_(1, column, gradient.gather(1, column).add_(grad_at_label[:, None]))
        return gradient.to(ctx.logits_dtype), None, None, None, None


def _of_negatives(values: Tensor, column: Tensor, matched: Tensor, ignored: Tensor | None) -> Tensor:
    """Put 0 where a logit is no negative."""
    if ignored is not None:
        values.masked_fill_(ignored, 0.0)
    return values.scatter_(1, column, values.gather(1, column).masked_fill_(matched, 0.0))
