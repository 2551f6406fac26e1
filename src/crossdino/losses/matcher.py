"""Hungarian matching of predictions and objects (DINO), all supervised layers with one copy from the device and back.

Cost: focal-style class cost, L1 and GIoU. Images are matched in blocks of their own, so memory grows with the sum of
the objects and not with images times the fullest one; the costs are all that is kept, their ingredients are computed
for some predictions at a time, whatever layer they are of.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from crossdino.config import LossConfig
from crossdino.losses.giou import generalized_iou
from crossdino.structures import LayerOutput, Target

# Pairs whose cost is computed at once: about 10 MB of intermediate results.
_PAIRS_AT_ONCE = 1 << 18
# From so many objects in an image on, an assignment takes so long (4 ms against 900 queries) that threads pay.
_OBJECTS_FOR_THREADS = 400


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
    logits, boxes = pred_logits.float(), pred_boxes.float()
    if len(target.labels) < logits.shape[1]:
        class_cost = _class_cost(logits.index_select(1, target.labels))
    else:  # more objects than classes: every class once
        class_cost = _class_cost(logits).index_select(1, target.labels)
    l1_cost = torch.cdist(boxes, target.boxes_cxcywh, p=1)
    giou = generalized_iou(boxes[:, None], target.boxes_cxcywh[None])
    return class_cost.mul_(loss.class_cost).add_(l1_cost, alpha=loss.l1_cost).sub_(giou, alpha=loss.giou_cost)


def _class_cost(logits: Tensor) -> Tensor:
    """DINO's class cost, alpha (1-p)^gamma (-log p) - (1-alpha) p^gamma (-log(1-p)), of each logit.

    Its alpha 0.25 and gamma 2 stay whatever the classification loss uses.
    """
    p = logits.sigmoid()
    return 0.25 * (1 - p) ** 2 * F.softplus(-logits) - 0.75 * p**2 * F.softplus(logits)


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
    sizes = [layer.pred_logits.shape[1] for layer in layers]
    counts = [len(target.labels) for target in targets]
    costs = torch.empty(sum(sizes) * sum(counts), device=device)
    for image, block in enumerate(costs.split([sum(sizes) * count for count in counts])):
        if not counts[image]:
            continue
        logits = torch.cat([layer.pred_logits[image] for layer in layers])
        boxes = torch.cat([layer.pred_boxes[image] for layer in layers])
        step = max(1, _PAIRS_AT_ONCE // counts[image])
        for rows, some_logits, some_boxes in zip(
            block.view(-1, counts[image]).split(step), logits.split(step), boxes.split(step), strict=True
        ):
            rows.copy_(matching_cost(some_logits, some_boxes, targets[image], loss))
    # Predictions that are not finite must not stop the matching: the loss is not finite then, and the trainer says so.
    on_host = costs.nan_to_num_(nan=1e6, posinf=1e6, neginf=-1e6).cpu()
    problems: list[np.ndarray] = []  # image after image, within it layer after layer
    for count, block in zip(counts, on_host.split([sum(sizes) * count for count in counts]), strict=True):
        problems += [one.numpy() for one in block.view(sum(sizes), count).split(sizes)]
    pairs = _solve(problems)

    offsets = np.cumsum([0, *counts])
    found: list[np.ndarray] = []
    for number in range(len(layers)):
        for image, (queries, objects) in enumerate(pairs[number :: len(layers)]):
            found.append(np.stack((np.full(len(queries), image), queries, objects + offsets[image])))
    # One small copy to the device for all layers.
    together = torch.from_numpy(np.concatenate(found, axis=1)).to(device, non_blocking=True)
    lengths = [sum(len(queries) for queries, _ in pairs[number :: len(layers)]) for number in range(len(layers))]
    return [Match(*part) for part in together.split(lengths, dim=1)]


def _solve(problems: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The assignments of least cost, each alone: the same ones with and without threads."""
    if max(problem.shape[1] for problem in problems) < _OBJECTS_FOR_THREADS or torch.get_num_threads() == 1:
        return [linear_sum_assignment(problem) for problem in problems]
    # SciPy computes without Python's lock.
    with ThreadPoolExecutor(min(torch.get_num_threads(), len(problems))) as pool:
        return list(pool.map(linear_sum_assignment, problems))
