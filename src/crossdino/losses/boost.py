"""Boost loss (Section III-D, Eq. 4-5) and the focal loss that it generalises.

Implemented as printed: `cs = sqrt(h/H * w/W)` of the matched object, `cs_hat = sqrt(h_hat/H * w_hat/W) * p` of the
prediction. The predicted size is a constant (no gradient into the box heads), `p` is not. Powers are taken in the
logarithm, because `x^beta` with beta < 1 has an infinite slope at 0; everything is computed in float32.

Measured on the formula: at beta = 1 a small object has a *smaller* loss than a large one until p is high; the ordering
that the paper's prose describes holds for small beta.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Sizes are shares of the image's side; a millionth of it is far below one pixel and keeps the logarithm finite.
_SMALLEST_SIZE = 1e-6


def boost_weight(size: Tensor, log_p: Tensor, beta: float, gamma: float) -> Tensor:
    """The focusing weight `(1 - cs_hat^beta)^gamma` of Eq. 5 (Table IX).

    Args:
        size: sqrt(h_hat/H * w_hat/W), in [0, 1].
        log_p: logarithm of the predicted class probability, <= 0, same shape.
        beta: exponent of the category-size label, > 0.
        gamma: focusing exponent, >= 0.

    Returns:
        The weight in [0, 1], same shape, float32.
    """
    log_cs = size.float().clamp(_SMALLEST_SIZE, 1.0).log() + log_p.float()
    # expm1 keeps the digits of 1 - x near x = 1; the clamp keeps the slope finite there when gamma < 1.
    return (-torch.expm1(beta * log_cs)).clamp(min=1e-6) ** gamma


def positive_loss(
    log_p: Tensor, pred_size: Tensor, target_size: Tensor, *, alpha: float, gamma: float, beta: float
) -> Tensor:
    """What a prediction's class of the matched object adds to the Boost loss (Eq. 5).

    Args:
        log_p: logarithm of the predicted probability of that class, <= 0.
        pred_size: as in `boost_loss`, same shape.
        target_size: as in `boost_loss`, same shape.
        alpha: as in `boost_loss`.
        gamma: as in `boost_loss`.
        beta: as in `boost_loss`.

    Returns:
        Not negative, same shape.
    """
    weight = boost_weight(pred_size.detach(), log_p, beta, gamma)
    return alpha * weight * target_size.float().clamp(_SMALLEST_SIZE, 1.0) ** beta * -log_p


def boost_loss(
    pred_logits: Tensor,
    labels: Tensor,
    pred_size: Tensor,
    target_size: Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    beta: float = 1.0,
) -> Tensor:
    """Boost loss of every prediction and class (Eq. 5 before the sum and the division by the number of objects).

    Args:
        pred_logits: (..., K) class logits.
        labels: (...) int64, class of the matched object, or -1 for background.
        pred_size: (...) sqrt(w * h) of the normalised predicted box, in [0, 1]; read only where matched.
        target_size: (...) the same of the matched object's box.
        alpha: weight of positives against negatives.
        gamma: focusing exponent.
        beta: exponent of the category-size label.

    Returns:
        (..., K) float32, not negative.
    """
    logits = pred_logits.float()
    # p^gamma in the logarithm for the same reason as above.
    negative = (1 - alpha) * torch.exp(-gamma * F.softplus(-logits)) * F.softplus(logits)
    matched = labels >= 0
    column = labels.clamp(min=0)[..., None]
    log_p = -F.softplus(-logits.gather(-1, column)[..., 0])
    positive = positive_loss(log_p, pred_size, target_size, alpha=alpha, gamma=gamma, beta=beta)
    at_label = torch.where(matched, positive, negative.gather(-1, column)[..., 0])
    return negative.scatter(-1, column, at_label[..., None])


def focal_loss(pred_logits: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss of every prediction and class: Boost loss at beta 1 with every object as large as the image.

    Args:
        pred_logits: (..., K) class logits.
        labels: (...) int64, class of the matched object, or -1 for background.
        alpha: weight of positives against negatives.
        gamma: focusing exponent.

    Returns:
        (..., K) float32.
    """
    ones = torch.ones(labels.shape, device=pred_logits.device)
    return boost_loss(pred_logits, labels, ones, ones, alpha=alpha, gamma=gamma, beta=1.0)
