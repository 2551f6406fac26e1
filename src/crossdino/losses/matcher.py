"""Hungarian matching of predictions and objects (DINO), all supervised layers with one copy from the device.

Cost: focal-style class cost, L1 and GIoU. Images are matched in blocks of their own, so memory grows with the sum of
the objects and not with images times the fullest one; the costs are all that is kept, their ingredients are computed
for some predictions at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from crossdino.config import LossConfig
from crossdino.losses.giou import generalized_iou
from crossdino.structures import LayerOutput, Target

# Pairs whose cost is computed at once: about 20 MB of intermediate results.
_PAIRS_AT_ONCE = 1 << 18


@dataclass
class Match:
    """The pairs of one layer, over the whole batch.

    Attributes:
        image: (M,) int64, index of the image.
        query: (M,) int64, index of the prediction.
        target: (M,) int64, index of the object among all objects of the batch, image after image.
    """

    image: Tensor
    query: Tensor
    target: Tensor


def matching_cost(pred_logits: Tensor, pred_boxes: Tensor, target: Target, loss: LossConfig) -> Tensor:
    """Cost of giving each object of one image to each of its predictions, (Q, K) and (Q, 4): (Q, n) float32."""
    logits = pred_logits.float()
    # DINO's class cost, alpha (1-p)^gamma (-log p) - (1-alpha) p^gamma (-log(1-p)). Its alpha 0.25 and gamma 2 stay
    # whatever the classification loss uses.
    p = logits.sigmoid()
    class_cost = 0.25 * (1 - p) ** 2 * F.softplus(-logits) - 0.75 * p**2 * F.softplus(logits)
    boxes = pred_boxes.float()
    l1_cost = torch.cdist(boxes, target.boxes_cxcywh, p=1)
    giou_cost = -generalized_iou(boxes[:, None], target.boxes_cxcywh[None])
    return loss.class_cost * class_cost[:, target.labels] + loss.l1_cost * l1_cost + loss.giou_cost * giou_cost


@torch.no_grad()
def match_layers(layers: list[LayerOutput], targets: list[Target], loss: LossConfig) -> list[Match]:
    """Match every layer's predictions with the objects, one to one, at the least total cost in each image.

    An image with more objects than predictions leaves the objects unmatched that cost most.

    Args:
        layers: outputs of shapes (N, Q, K) and (N, Q, 4).
        targets: N targets.
        loss: the matching costs.

    Returns:
        A Match a layer, on the device of the outputs.
    """
    device = layers[0].pred_logits.device
    counts = [len(target.labels) for target in targets]
    flat = torch.empty(sum(layer.pred_logits.shape[1] for layer in layers) * sum(counts), device=device)
    start = 0
    for layer in layers:
        for image, target in enumerate(targets):
            step = max(1, _PAIRS_AT_ONCE // max(1, counts[image]))
            for logits, boxes in zip(
                layer.pred_logits[image].split(step), layer.pred_boxes[image].split(step), strict=True
            ):
                cost = matching_cost(logits, boxes, target, loss).flatten()
                flat[start : start + len(cost)] = cost
                start += len(cost)
    # Predictions that are not finite must not stop the matching: the loss is not finite then, and the trainer says so.
    flat = flat.nan_to_num_(nan=1e6, posinf=1e6, neginf=-1e6).cpu().numpy()
    offsets = np.cumsum([0, *counts])
    start = 0
    matches = []
    for layer in layers:
        images, queries, objects = [], [], []
        for image, count in enumerate(counts):
            size = layer.pred_logits.shape[1] * count
            rows, columns = linear_sum_assignment(flat[start : start + size].reshape(-1, max(1, count))[:, :count])
            start += size
            images.append(np.full(len(rows), image))
            queries.append(rows)
            objects.append(columns + offsets[image])
        # One small copy to the device for all three.
        pairs = torch.from_numpy(np.stack([np.concatenate(x) for x in (images, queries, objects)]).astype(np.int64))
        matches.append(Match(*pairs.to(device, non_blocking=True)))
    return matches
