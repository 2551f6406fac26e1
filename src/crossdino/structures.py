"""The data structures that travel between the rooms; every shape is stated here and nowhere else.

Symbols: `N` images in the batch, `H`, `W` the padded height and width of the batch in pixels, `Q` object queries, `K`
classes, `n` objects of one image. Inside the models boxes are normalised `cxcywh` of the *unpadded* image; outside they
are absolute `xyxy` pixels of the original image. Labels are contiguous `0..K-1`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass
class Target:
    """The ground truth of one image, as the losses want it.

    Attributes:
        boxes_cxcywh: (n, 4) float32, normalised by the unpadded image's width and height, in [0, 1].
        labels: (n,) int64, contiguous class indices in [0, K).
        image_id: the dataset's own id of the image.
        original_hw: height and width of the image, or of the tile cut out of it, in pixels of the file.
        ignored_boxes_cxcywh: (m, 4) float32, regions in which nothing is known: predictions there are not negatives.
        ignored_labels: (m,) int64, the class that a region is ignored for; -1 for all of them.
        noise_seed: what the image's denoising queries are drawn from; None draws from torch's global generator.
        origin_xy: where the tile's upper left corner lies in the image, in pixels of the file.
    """

    boxes_cxcywh: Tensor
    labels: Tensor
    image_id: int = 0
    original_hw: tuple[int, int] = (0, 0)
    ignored_boxes_cxcywh: Tensor = field(default_factory=lambda: torch.zeros(0, 4))
    ignored_labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    noise_seed: int | None = None
    origin_xy: tuple[int, int] = (0, 0)

    def to(self, device: torch.device | str) -> Target:
        """The same target with its tensors on `device`."""
        moved = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


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
        """The same batch on `device`, but for the mask, which the model reads on the CPU."""
        return Batch(
            self.images.to(device, non_blocking=True),
            self.padding_mask,
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

    Every object has `2 * num_copies` queries, half of them positives (to be mended) and half negatives (to be
    rejected). Which query belongs to what is decided image by image; slots that an image does not need are empty, and
    enter neither attention nor losses.

    Attributes:
        layers: one LayerOutput a decoder layer, of shapes (N, D, K) and (N, D, 4).
        objects: (N, D) int64, the object of the image that the query is a noisy copy of; -1 in empty slots.
        positive: (N, D) bool, true for positives.
        num_copies: (N,) int64, the number of positives of each object of the image, at least 1; an image's loss is
            divided by it.
    """

    layers: list[LayerOutput]
    objects: Tensor
    positive: Tensor
    num_copies: Tensor


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
