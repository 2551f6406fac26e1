"""Contrastive denoising queries of DINO (training only).

Each object is shown to the decoder as noisy copies: a positive (noise up to the box's half size) that must be mended,
and a negative (noise beyond it) that must be rejected. The copies come in groups that cannot see each other, and the
matched queries see none of them.

We differ from the official code in one point: images with fewer objects than the fullest one leave slots empty, and
such a slot is neither seen by other queries nor punished by the loss, so that what a batch is made of does not change
an image's training signal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crossdino.models.position import inverse_sigmoid
from crossdino.structures import Target


@dataclass
class DenoisingQueries:
    """What goes into the decoder before the matched queries.

    Attributes:
        labels: (N, D) int64, noisy labels; -1 in empty slots.
        anchors: (N, D, 4), noisy boxes, cxcywh; (0.5, 0.5, 0.5, 0.5) in empty slots.
        num_groups: G.
        group_size: P objects; D = G * 2 * P, each group positives first.
        valid: (N, P) bool, true where the image has that object.
    """

    labels: Tensor
    anchors: Tensor
    num_groups: int
    group_size: int
    valid: Tensor


def make_denoising_queries(
    targets: list[Target],
    num_classes: int,
    num_denoising: int,
    label_noise_ratio: float,
    box_noise_scale: float,
) -> DenoisingQueries | None:
    """Draw the denoising queries of a batch; None when no image has an object or the budget is 0.

    The number of groups is `num_denoising // P`, at least 1, where P is the largest number of objects of an image. Half
    of `label_noise_ratio` of the labels are drawn anew; a corner coordinate moves by up to `box_noise_scale` times half
    the box (positives), or by 1 to 2 times as much (negatives), and stays inside the image.

    Args:
        targets: one per image.
        num_classes: K.
        num_denoising: budget of positive-negative pairs.
        label_noise_ratio: see above.
        box_noise_scale: see above.
    """
    group_size = max(len(target.labels) for target in targets)
    if group_size == 0 or num_denoising == 0:
        return None
    num_groups = max(1, num_denoising // group_size)
    device = targets[0].labels.device
    num_images = len(targets)
    labels = torch.full((num_images, group_size), -1, dtype=torch.int64, device=device)
    boxes = torch.full((num_images, group_size, 4), 0.5, device=device)
    for i, target in enumerate(targets):
        labels[i, : len(target.labels)] = target.labels
        boxes[i, : len(target.labels)] = target.boxes_cxcywh
    valid = labels >= 0

    # (N, G, positive or negative, P)
    shape = (num_images, num_groups, 2, group_size)
    noisy_labels = labels[:, None, None].expand(shape)
    redraw = torch.rand(shape, device=device) < label_noise_ratio * 0.5
    noisy_labels = torch.where(redraw, torch.randint(num_classes, shape, device=device), noisy_labels)
    noisy_labels = torch.where(valid[:, None, None], noisy_labels, -1)

    half = boxes[..., 2:] / 2
    corners = torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), dim=-1)[:, None, None]
    amount = torch.rand((*shape, 4), device=device)
    amount[:, :, 1] += 1.0
    sign = torch.randint(2, (*shape, 4), device=device) * 2.0 - 1.0
    corners = corners + amount * sign * box_noise_scale * torch.cat((half, half), dim=-1)[:, None, None]
    corners = corners.clamp(0.0, 1.0)
    anchors = torch.cat(((corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]), dim=-1)
    anchors = torch.where(valid[:, None, None, :, None], anchors, 0.5)
    # The decoder's anchors live behind a sigmoid; noise can turn a box inside out, which the clamped logit mends.
    anchors = inverse_sigmoid(anchors).sigmoid()
    return DenoisingQueries(noisy_labels.flatten(1), anchors.flatten(1, 3), num_groups, group_size, valid)


def denoising_visibility(queries: DenoisingQueries, num_queries: int) -> Tensor:
    """Who may look at whom, of the denoising queries followed by `num_queries` matched queries.

    Returns:
        (N, 1, D + Q, D + Q) bool, true where the row's query may look at the column's.
    """
    per_group = 2 * queries.group_size
    num_denoising = queries.num_groups * per_group
    device = queries.valid.device
    group = torch.arange(num_denoising, device=device) // per_group
    # Matched queries are group -1: denoising queries see their own group and all matched queries.
    group = torch.cat((group, torch.full((num_queries,), -1, device=device)))
    visible = (group[None, :] == group[:, None]) | (group[None, :] == -1)
    filled = queries.valid.repeat(1, 2 * queries.num_groups)
    filled = torch.nn.functional.pad(filled, (0, num_queries), value=True)
    # An empty slot is seen by nobody but itself: a row without any visible column would become NaN.
    itself = torch.eye(len(group), dtype=torch.bool, device=device)
    return ((visible & filled[:, None, :]) | itself)[:, None]
