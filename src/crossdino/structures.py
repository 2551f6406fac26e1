"""The data structures that travel between the rooms; every shape is stated here and nowhere else.

Symbols: `N` images in the batch, `H`, `W` the padded height and width of the batch in pixels, `Q` object queries, `K`
classes, `n` objects of one image. Inside the models boxes are normalised `cxcywh` of the *unpadded* image; outside they
are absolute `xyxy` pixels of the original image. Labels are contiguous `0..K-1`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Target:
    """The ground truth of one image, as the losses want it.

    Attributes:
        boxes_cxcywh: (n, 4) float32, normalised by the unpadded image's width and height, in [0, 1].
        labels: (n,) int64, contiguous class indices in [0, K).
        image_id: the dataset's own id of the image.
        original_hw: height and width of the original image file in pixels, before any transform.
    """

    boxes_cxcywh: Tensor
    labels: Tensor
    image_id: int = 0
    original_hw: tuple[int, int] = (0, 0)

    def to(self, device: torch.device | str) -> Target:
        """The same target with its tensors on `device`."""
        return Target(
            self.boxes_cxcywh.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.image_id,
            self.original_hw,
        )


@dataclass
class Batch:
    """Images padded at the bottom and the right to a common size, with their targets.

    Attributes:
        images: (N, 3, H, W) float32, normalised with the backbone's mean and std, zero on padding.
        padding_mask: (N, H, W) bool, true on padding.
        targets: N targets.
    """

    images: Tensor
    padding_mask: Tensor
    targets: list[Target]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with all tensors on `device`."""
        return Batch(
            self.images.to(device, non_blocking=True),
            self.padding_mask.to(device, non_blocking=True),
            [target.to(device) for target in self.targets],
        )


@dataclass
class LayerOutput:
    """Class logits and boxes of one place that is supervised: a decoder layer or the encoder's proposals.

    Attributes:
        pred_logits: (N, Q, K) class logits (sigmoid, no background class).
        pred_boxes: (N, Q, 4) normalised cxcywh in [0, 1].
    """

    pred_logits: Tensor
    pred_boxes: Tensor


@dataclass
class DenoisingOutput:
    """What the contrastive denoising queries became (training only).

    The queries are laid out as `num_groups` groups of `2 * group_size` slots: first the positives, then the negatives.
    Slot j of the positives of a group belongs to object j of its image; images with fewer than `group_size` objects
    leave slots empty (`valid` is false there, and such a slot enters neither attention nor losses).

    Attributes:
        layers: one LayerOutput a decoder layer, of shapes (N, D, K) and (N, D, 4), D = num_groups * 2 * group_size.
        num_groups: number of groups G.
        group_size: P, the largest number of objects of an image of the batch.
        valid: (N, P) bool, true where object slot j exists in the image.
    """

    layers: list[LayerOutput]
    num_groups: int
    group_size: int
    valid: Tensor


@dataclass
class DetectorOutput:
    """The detector's output; `pred_logits` and `pred_boxes` are those of the last decoder layer.

    Attributes:
        pred_logits: (N, Q, K).
        pred_boxes: (N, Q, 4), normalised cxcywh of the unpadded image.
        aux_outputs: the earlier decoder layers, first to last but one.
        encoder_output: the selected proposals of the encoder (two-stage), as (N, Q, ...).
        denoising: the denoising queries' outputs, or None outside training.
    """

    pred_logits: Tensor
    pred_boxes: Tensor
    aux_outputs: list[LayerOutput] = field(default_factory=list)
    encoder_output: LayerOutput | None = None
    denoising: DenoisingOutput | None = None
