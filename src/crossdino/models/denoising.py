"""Contrastive denoising queries of DINO (training only).

Each object is shown to the decoder as noisy copies: a positive (noise up to the box's half size) that must be mended,
and a negative (noise beyond it) that must be rejected. The copies come in islands that cannot see each other, and the
matched queries see none of them.

Where we differ from the official code: every image is treated as if it were alone. Official DINO takes the number of
copies from the fullest image of the batch, so that an image's training signal depends on its company, and puts all
objects of a crowded image into one island, whose attention grows with their square. Here an image within the budget
has as many copies as the budget allows it (a batch of equally full images is exactly DINO's), and one beyond it is
dealt into several rounds, which the decoder computes one after the other; no object is ever left out. The noise comes
from a generator of the image's own, on the CPU, so that it does not depend on the device or on the process either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crossdino.structures import Target

# What `inverse_sigmoid` clamps at.
_SMALLEST = 1e-3


@dataclass
class DenoisingQueries:
    """The denoising queries of a batch: D slots an image, in blocks that the decoder computes one after the other.

    Attributes:
        labels: (N, D) int64, noisy labels; -1 in empty slots.
        anchors: (N, D, 4), noisy boxes, cxcywh; (0.5, 0.5, 0.5, 0.5) in empty slots.
        objects: (N, D) int64, the object of the image that the slot stands for; -1 in empty slots.
        positive: (N, D) bool, true for positives.
        islands: (N, D) int64, which slots of a block see each other: those of the same number; -1 in empty slots.
        num_copies: (N,) int64, positives of each object of the image, at least 1.
        block_sizes: slots of each block, at most twice the budget; they add up to D.
        block_images: for each block the images that have something in it; the first block has all images.
    """

    labels: Tensor
    anchors: Tensor
    objects: Tensor
    positive: Tensor
    islands: Tensor
    num_copies: Tensor
    block_sizes: list[int]
    block_images: list[list[int]]


@torch.compiler.disable()  # pyright: ignore[reportPrivateImportUsage]
def make_denoising_queries(
    targets: list[Target],
    num_classes: int,
    num_denoising: int,
    label_noise_ratio: float,
    box_noise_scale: float,
) -> DenoisingQueries | None:
    """Draw the denoising queries of a batch; None when no image has an object or the budget is 0.

    An image with n objects, at most the budget, has `num_denoising // n` copies of all of them, each copy an island of
    n positives and n negatives, all in the first block. With more objects each has one copy; they are dealt at random
    into `ceil(n / num_denoising)` rounds of nearly equal size, each an island in a block of its own.

    Half of `label_noise_ratio` of the labels are drawn anew; a corner coordinate moves by up to `box_noise_scale` times
    half the box (positives), or by 1 to 2 times as much (negatives), and stays inside the image. What is drawn for an
    image depends on its number of objects and its `noise_seed`, and on nothing else.

    Args:
        targets: one per image.
        num_classes: K.
        num_denoising: budget of positive-negative pairs of an image in a block.
        label_noise_ratio: see above.
        box_noise_scale: see above.
    """
    counts = [len(target.labels) for target in targets]
    if max(counts) == 0 or num_denoising == 0:
        return None
    drawn = [
        _draw(target, sum(counts[:i]), num_classes, num_denoising, label_noise_ratio)
        for i, target in enumerate(targets)
    ]
    num_blocks = max(len(rounds) for rounds in drawn)
    block_images = [[i for i, rounds in enumerate(drawn) if len(rounds) > block] for block in range(num_blocks)]
    block_sizes = [
        max(len(drawn[i][block]) for i in images) for block, images in zip(range(num_blocks), block_images, strict=True)
    ]
    block_images[0] = list(range(len(targets)))
    packed = torch.full((len(targets), sum(block_sizes), _COLUMNS), -1.0)
    packed[..., _COPIES] = 1.0
    for image, rounds in enumerate(drawn):
        start = 0
        for size, one in zip(block_sizes, rounds, strict=False):
            packed[image, start : start + len(one)] = one
            start += size

    # One transfer for all.
    packed = packed.to(targets[0].labels.device)
    whole = packed[..., :_NOISE].long()
    objects, islands = whole[..., _OBJECT], whole[..., _ISLAND]
    filled = objects >= 0
    index = whole[..., _OBJECT_IN_BATCH].clamp(min=0)
    labels = torch.cat([target.labels for target in targets])[index]
    labels = torch.where(whole[..., _NEW_LABEL] >= 0, whole[..., _NEW_LABEL], labels)
    boxes = torch.cat([target.boxes_cxcywh for target in targets])[index]
    half = boxes[..., 2:] / 2
    corners = torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), dim=-1)
    corners = corners + packed[..., _NOISE:] * box_noise_scale * torch.cat((half, half), dim=-1)
    corners = corners.clamp(0.0, 1.0)
    anchors = torch.cat(((corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]), dim=-1)
    # The decoder's anchors live behind a sigmoid whose logit is clamped (`inverse_sigmoid`), which also mends boxes
    # that noise has turned inside out. Spelt without logarithms, whose last digit depends on the place in the tensor.
    share, rest = anchors.clamp(min=_SMALLEST), (1 - anchors).clamp(min=_SMALLEST)
    anchors = torch.where(filled[..., None], share / (share + rest), 0.5)
    return DenoisingQueries(
        labels=torch.where(filled, labels, -1),
        anchors=anchors,
        objects=objects,
        positive=whole[..., _POSITIVE] > 0,
        islands=islands,
        num_copies=whole[:, 0, _COPIES],
        block_sizes=block_sizes,
        block_images=block_images,
    )


# Columns of the packed draw. They are float32, which holds whole numbers exactly up to 16 million.
_OBJECT, _OBJECT_IN_BATCH, _ISLAND, _POSITIVE, _NEW_LABEL, _COPIES, _NOISE, _COLUMNS = 0, 1, 2, 3, 4, 5, 6, 10


def _draw(
    target: Target, objects_before: int, num_classes: int, num_denoising: int, label_noise_ratio: float
) -> list[Tensor]:
    """The rounds of one image, each (slots, _COLUMNS) float32 on the CPU; none for an image without objects."""
    count = len(target.labels)
    if count == 0:
        return []
    seed = target.noise_seed
    if seed is None:
        seed = int(torch.randint(2**32, ()))
    generator = torch.Generator().manual_seed(seed)
    if count <= num_denoising:
        rounds = [torch.arange(count).expand(num_denoising // count, count)]
    else:
        shuffled = torch.randperm(count, generator=generator)
        rounds = [part[None] for part in shuffled.tensor_split(-(-count // num_denoising))]
    return [
        _draw_round(objects, objects_before, num_denoising // count, num_classes, label_noise_ratio, generator)
        for objects in rounds
    ]


def _draw_round(
    objects: Tensor,
    objects_before: int,
    num_copies: int,
    num_classes: int,
    label_noise_ratio: float,
    generator: torch.Generator,
) -> Tensor:
    """One round: `objects` (islands, m) become (islands * 2 * m, _COLUMNS), positives before negatives."""
    num_islands, size = objects.shape
    shape = (num_islands, 2, size)
    redrawn = torch.rand(shape, generator=generator) < label_noise_ratio * 0.5
    new_labels = torch.where(redrawn, torch.randint(num_classes, shape, generator=generator), -1)
    amount = torch.rand((*shape, 4), generator=generator)
    amount[:, 1] += 1.0
    sign = torch.randint(2, (*shape, 4), generator=generator) * 2.0 - 1.0
    packed = torch.empty(*shape, _COLUMNS)
    packed[..., _OBJECT] = objects[:, None]
    packed[..., _OBJECT_IN_BATCH] = objects[:, None] + objects_before
    packed[..., _ISLAND] = torch.arange(num_islands)[:, None, None]
    packed[..., _POSITIVE] = torch.tensor([1.0, 0.0])[:, None]
    packed[..., _NEW_LABEL] = new_labels
    packed[..., _COPIES] = max(1, num_copies)
    packed[..., _NOISE:] = amount * sign
    return packed.flatten(0, 2)
