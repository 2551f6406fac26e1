"""The yardstick's training step: denoising queries, matcher and losses as the official DINO spends its time on them.

One matcher call a layer over one cost matrix of the whole batch (all predictions of all images against all objects of
all images), losses layer by layer, one-hot targets anew for each. Uses nothing of the package, see `plain_dino`.
"""

from __future__ import annotations

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou

from benchmarks.plain_dino import Noise, Output, Prediction


def hidden_pairs(num_groups: int, group_size: int, num_queries: int) -> Tensor:
    """(D + Q, D + Q), true where a query (row) may not look at another: groups are apart, and matched ones see none."""
    num_noisy = num_groups * group_size
    hidden = torch.zeros(num_noisy + num_queries, num_noisy + num_queries, dtype=torch.bool)
    hidden[num_noisy:, :num_noisy] = True
    for start in range(0, num_noisy, group_size):
        hidden[start : start + group_size, :start] = True
        hidden[start : start + group_size, start + group_size : num_noisy] = True
    return hidden


def draw_noise(targets: list[Any], config: Any) -> Noise:
    """Noisy copies of the objects: groups as the fullest image of the batch allows, at least one."""
    most = max(len(target.labels) for target in targets)
    num_groups = max(1, config.num_denoising // most)
    labels = torch.zeros(len(targets), num_groups, 2, most, dtype=torch.int64)
    boxes = torch.full((len(targets), num_groups, 2, most, 4), 0.5)
    for image, target in enumerate(targets):
        count = len(target.labels)
        changed = torch.rand(num_groups, 2, count) < config.label_noise_ratio * 0.5
        other = torch.randint(config.num_classes, changed.shape)
        labels[image, ..., :count] = torch.where(changed, other, target.labels.expand(changed.shape))
        half = target.boxes_cxcywh[:, [2, 3, 2, 3]] / 2
        size = torch.rand(num_groups, 2, count, 4)
        size[:, 1] += 1
        sign = torch.randint(0, 2, size.shape) * 2.0 - 1.0
        corners = box_convert(target.boxes_cxcywh, "cxcywh", "xyxy")
        corners = (corners + sign * size * half * config.box_noise_scale).clamp(0.0, 1.0)
        boxes[image, :, :, :count] = box_convert(corners, "xyxy", "cxcywh")
    hidden = hidden_pairs(num_groups, 2 * most, config.num_queries)
    device = targets[0].labels.device
    return Noise(labels.flatten(1).to(device), boxes.flatten(1, 3).to(device), hidden.to(device), num_groups)


class PlainCriterion(nn.Module):
    """Sum of all losses.

    Args:
        loss: a `crossdino.config.LossConfig` (only read).
    """

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Output, targets: list[Any], noise: Noise | None) -> Tensor:
        """The weighted loss; `targets` have `labels` and `boxes_cxcywh`."""
        num_boxes = max(1, sum(len(target.labels) for target in targets))
        total = torch.zeros(())
        for layer in [*output.layers, output.proposals]:
            total = total + self.losses(layer, targets, self.match(layer, targets), num_boxes)
        if noise is not None:
            size = noise.labels.shape[1] // noise.num_groups
            pairs = []
            for target in targets:
                objects = torch.arange(len(target.labels)).repeat(noise.num_groups)
                starts = torch.arange(noise.num_groups).repeat_interleave(len(target.labels)) * size
                pairs.append((starts + objects, objects))
            for layer in output.noisy_layers:
                total = total + self.losses(layer, targets, pairs, num_boxes * noise.num_groups)
        return total

    @torch.no_grad()
    def match(self, layer: Prediction, targets: list[Any]) -> list[tuple[Tensor, Tensor]]:
        """For every image the predictions and the objects that belong together."""
        num_images, num_queries = layer.pred_logits.shape[:2]
        p = layer.pred_logits.flatten(0, 1).sigmoid()
        boxes = layer.pred_boxes.flatten(0, 1)
        labels = torch.cat([target.labels for target in targets])
        object_boxes = torch.cat([target.boxes_cxcywh for target in targets])
        negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
        positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
        class_cost = positive[:, labels] - negative[:, labels]
        l1_cost = torch.cdist(boxes, object_boxes, p=1)
        giou = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(object_boxes, "cxcywh", "xyxy"))
        cost = self.loss.l1_cost * l1_cost + self.loss.class_cost * class_cost - self.loss.giou_cost * giou
        cost = cost.view(num_images, num_queries, -1).cpu()
        counts = [len(target.labels) for target in targets]
        pairs = [linear_sum_assignment(part[image]) for image, part in enumerate(cost.split(counts, -1))]
        return [(torch.as_tensor(rows), torch.as_tensor(columns)) for rows, columns in pairs]

    def losses(
        self, layer: Prediction, targets: list[Any], pairs: list[tuple[Tensor, Tensor]], num_boxes: float
    ) -> Tensor:
        """Classification, L1 and GIoU of one layer."""
        logits = layer.pred_logits
        images = torch.cat([torch.full_like(rows, image) for image, (rows, _) in enumerate(pairs)])
        rows = torch.cat([rows for rows, _ in pairs])
        labels = torch.cat([target.labels[columns] for target, (_, columns) in zip(targets, pairs, strict=True)])
        objects = torch.cat([target.boxes_cxcywh[columns] for target, (_, columns) in zip(targets, pairs, strict=True)])
        classes = torch.full(logits.shape[:2], logits.shape[2], dtype=torch.int64, device=logits.device)
        classes[images, rows] = labels
        one_hot = logits.new_zeros(*logits.shape[:2], logits.shape[2] + 1)
        one_hot = one_hot.scatter_(2, classes[..., None], 1.0)[..., :-1]
        p = logits.sigmoid()
        entropy = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
        p_true = p * one_hot + (1 - p) * (1 - one_hot)
        focus = (1 - p_true) ** self.loss.gamma
        if self.loss.classification == "boost":
            size = layer.pred_boxes.detach()[..., 2:].prod(-1, keepdim=True).sqrt()
            label = torch.ones_like(p)
            label[images, rows] = objects[:, 2:].prod(-1, keepdim=True).sqrt() ** self.loss.beta
            boosted = label * (1 - (size * p) ** self.loss.beta) ** self.loss.gamma
            focus = torch.where(one_hot > 0, boosted, focus)
        alpha = self.loss.alpha * one_hot + (1 - self.loss.alpha) * (1 - one_hot)
        total = self.loss.class_weight * (alpha * focus * entropy).sum() / num_boxes
        boxes = layer.pred_boxes[images, rows]
        total = total + self.loss.l1_weight * F.l1_loss(boxes, objects, reduction="none").sum() / num_boxes
        giou = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(objects, "cxcywh", "xyxy")).diag()
        return total + self.loss.giou_weight * (1 - giou).sum() / num_boxes
