"""Hungarian matching of predictions and objects (DINO), all supervised layers with one copy from the device.

Cost: focal-style class cost, L1 and GIoU. Images are matched in blocks of their own, so memory grows with the sum of
the objects and not with images times the fullest one.
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


def matching_cost(output: LayerOutput, target: Target, loss: LossConfig, image: int) -> Tensor:
    """Cost of giving each object of one image to each prediction: (Q, n) float32."""
    logits = output.pred_logits[image].float()
    # DINO's class cost, alpha (1-p)^gamma (-log p) - (1-alpha) p^gamma (-log(1-p)). Its alpha 0.25 and gamma 2 stay
    # whatever the classification loss uses.
    p = logits.sigmoid()
    class_cost = 0.25 * (1 - p) ** 2 * F.softplus(-logits) - 0.75 * p**2 * F.softplus(logits)
    boxes = output.pred_boxes[image].float()
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
    costs = [matching_cost(layer, target, loss, image) for layer in layers for image, target in enumerate(targets)]
    flat = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
    # Predictions that are not finite must not stop the matching: the loss is not finite then, and the trainer says so.
    flat = np.nan_to_num(flat, nan=1e6, posinf=1e6, neginf=-1e6)
    offsets = np.cumsum([0] + [len(target.labels) for target in targets])
    start = 0
    blocks = iter(costs)
    matches = []
    for _ in layers:
        images, queries, objects = [], [], []
        for image in range(len(targets)):
            shape = next(blocks).shape
            cost = flat[start : start + shape[0] * shape[1]].reshape(shape)
            start += shape[0] * shape[1]
            rows, columns = linear_sum_assignment(cost)
            images.append(np.full(len(rows), image))
            queries.append(rows)
            objects.append(columns + offsets[image])
        # One small copy to the device for all three.
        pairs = torch.from_numpy(np.stack([np.concatenate(x) for x in (images, queries, objects)]).astype(np.int64))
        matches.append(Match(*pairs.to(device, non_blocking=True)))
    return matches
