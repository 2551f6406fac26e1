"""The training loss: every decoder layer, the encoder's proposals and the denoising queries (DINO, Section III-D)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossdino.config import LossConfig
from crossdino.losses.boost import boost_loss, focal_loss
from crossdino.losses.giou import generalized_iou
from crossdino.losses.matcher import Match, match_layers
from crossdino.structures import DenoisingOutput, DetectorOutput, LayerOutput, Target


class Criterion(nn.Module):
    """Sum of classification, L1 and GIoU losses over all places that are supervised.

    Args:
        loss: weights, costs and the kind of classification loss.
    """

    def __init__(self, loss: LossConfig) -> None:
        super().__init__()
        self.loss = loss

    def forward(
        self, output: DetectorOutput, targets: list[Target], num_boxes: float | Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Args:
            output: the detector's output.
            targets: N targets.
            num_boxes: what sums over objects are divided by: the number of objects of the batch, averaged over all
                processes; None counts the objects in `targets`. Values below 1 count as 1.

        Returns:
            `loss`, the weighted total, and its parts: `class`, `l1`, `giou` (matched queries, all decoder layers),
            `encoder`, `denoising`. The parts add up to the total; scalars, float32.
        """
        if num_boxes is None:
            num_boxes = sum(len(target.labels) for target in targets)
        normaliser = torch.as_tensor(num_boxes, dtype=torch.float32, device=output.pred_logits.device).clamp(min=1.0)
        layers = [*output.aux_outputs, LayerOutput(output.pred_logits, output.pred_boxes)]
        supervised = layers if output.encoder_output is None else [*layers, output.encoder_output]
        matches = match_layers(supervised, targets, self.loss)
        labels = torch.cat([target.labels for target in targets])
        boxes = torch.cat([target.boxes_cxcywh for target in targets])

        zero = output.pred_logits.new_zeros((), dtype=torch.float32)
        parts = {"class": zero, "l1": zero, "giou": zero, "encoder": zero, "denoising": zero}
        for layer, match in zip(layers, matches, strict=False):
            for name, value in self._layer_loss(layer, match, labels, boxes, normaliser).items():
                parts[name] = parts[name] + value
        if output.encoder_output is not None:
            encoder = self._layer_loss(output.encoder_output, matches[-1], labels, boxes, normaliser)
            parts["encoder"] = zero + sum(encoder.values())
        if output.denoising is not None:
            parts["denoising"] = self._denoising_loss(output.denoising, labels, boxes, normaliser)
        return {"loss": zero + sum(parts.values()), **parts}

    def _layer_loss(
        self,
        layer: LayerOutput,
        match: Match,
        labels: Tensor,
        boxes: Tensor,
        normaliser: Tensor,
        counted: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses of one layer; `counted` (N, Q) false leaves a query out of the classification loss."""
        num_images, num_queries = layer.pred_logits.shape[:2]
        index = (match.image, match.query)
        matched_boxes = layer.pred_boxes[index].float()
        target_boxes = boxes[match.target]
        target_labels = torch.full((num_images, num_queries), -1, dtype=torch.int64, device=boxes.device)
        target_labels[index] = labels[match.target]
        if self.loss.classification == "focal":
            classification = focal_loss(layer.pred_logits, target_labels, alpha=self.loss.alpha, gamma=self.loss.gamma)
        else:
            pred_size = layer.pred_boxes.detach().float()[..., 2:].prod(-1).sqrt()
            target_size = torch.ones_like(pred_size)
            target_size[index] = target_boxes[:, 2:].prod(-1).sqrt()
            classification = boost_loss(
                layer.pred_logits,
                target_labels,
                pred_size,
                target_size,
                alpha=self.loss.alpha,
                gamma=self.loss.gamma,
                beta=self.loss.beta,
            )
        if counted is not None:
            classification = classification * counted[..., None]
        return {
            "class": self.loss.class_weight * classification.sum() / normaliser,
            "l1": self.loss.l1_weight * (matched_boxes - target_boxes).abs().sum() / normaliser,
            "giou": self.loss.giou_weight * (1 - generalized_iou(matched_boxes, target_boxes)).sum() / normaliser,
        }

    def _denoising_loss(self, denoising: DenoisingOutput, labels: Tensor, boxes: Tensor, normaliser: Tensor) -> Tensor:
        """The denoising queries need no matching: positive slot j of every group is object j of its image."""
        groups, size = denoising.num_groups, denoising.group_size
        image, slot = denoising.valid.nonzero(as_tuple=True)
        target = torch.arange(len(image), device=boxes.device)
        first = torch.arange(groups, device=boxes.device) * 2 * size
        match = Match(image.repeat(groups), (first[:, None] + slot[None]).flatten(), target.repeat(groups))
        counted = denoising.valid.repeat(1, 2 * groups)
        total = boxes.new_zeros(())
        for layer in denoising.layers:
            losses = self._layer_loss(layer, match, labels, boxes, normaliser * groups, counted)
            total = total + sum(losses.values())
        return total
