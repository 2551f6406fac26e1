"""The training loss: every decoder layer, the encoder's proposals and the denoising queries (DINO, Section III-D).

Where we differ: predictions in regions to ignore are no negatives (see `crossdino.losses.ignore`), in every place that
is supervised. They are judged by the boxes that they predict now, so a rough box of early training may escape
punishment for a while, which costs little; matching knows nothing of regions, because real objects lie in them too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossdino.config import LossConfig
from crossdino.losses.boost import boost_loss, focal_loss
from crossdino.losses.giou import generalized_iou
from crossdino.losses.ignore import ignored_classes
from crossdino.losses.matcher import match_layers
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
            num_boxes: what sums over objects are divided by, above 0: the objects of all processes (at least 1)
                divided by the number of processes. None counts the objects in `targets`, at least 1.

        Returns:
            `loss`, the weighted total, and its parts: `class`, `l1`, `giou` (matched queries, all decoder layers),
            `encoder`, `denoising`. The parts add up to the total; scalars, float32.
        """
        if num_boxes is None:
            num_boxes = max(1, sum(len(target.labels) for target in targets))
        normaliser = torch.as_tensor(num_boxes, dtype=torch.float32, device=output.pred_logits.device)
        layers = [*output.aux_outputs, LayerOutput(output.pred_logits, output.pred_boxes)]
        supervised = layers if output.encoder_output is None else [*layers, output.encoder_output]
        noisy = [] if output.denoising is None else output.denoising.layers
        matches = match_layers(supervised, targets, self.loss)
        ignored = self._ignored([*supervised, *noisy], targets)
        labels = torch.cat([target.labels for target in targets])
        boxes = torch.cat([target.boxes_cxcywh for target in targets])

        zero = output.pred_logits.new_zeros((), dtype=torch.float32)
        parts = {"class": zero, "l1": zero, "giou": zero, "encoder": zero, "denoising": zero}
        for place, (layer, match) in enumerate(zip(supervised, matches, strict=True)):
            flat = LayerOutput(layer.pred_logits.flatten(0, 1), layer.pred_boxes.flatten(0, 1))
            rows = match.image * layer.pred_logits.shape[1] + match.query
            hidden = None if ignored is None else ignored[place].flatten(0, 1)
            losses = self._losses(flat, rows, labels[match.target], boxes[match.target], normaliser, hidden)
            if place < len(layers):
                for name, value in losses.items():
                    parts[name] = parts[name] + value
            else:
                parts["encoder"] = zero + sum(losses.values())
        if output.denoising is not None:
            hidden = None if ignored is None else ignored[len(supervised) :]
            counts = [len(target.labels) for target in targets]
            parts["denoising"] = self._denoising_loss(output.denoising, counts, labels, boxes, normaliser, hidden)
        return {"loss": zero + sum(parts.values()), **parts}

    def _ignored(self, layers: list[LayerOutput], targets: list[Target]) -> list[Tensor] | None:
        """For every layer at which classes its predictions are no negatives, (N, Q, K) bool."""
        boxes = [layer.pred_boxes.detach() for layer in layers]
        num_classes = layers[0].pred_logits.shape[-1]
        ignored = ignored_classes(torch.cat(boxes, dim=1), targets, num_classes, self.loss.ignore_overlap)
        return None if ignored is None else list(ignored.split([one.shape[1] for one in boxes], dim=1))

    def _losses(
        self,
        predictions: LayerOutput,
        rows: Tensor,
        labels: Tensor,
        boxes: Tensor,
        normaliser: Tensor,
        ignored: Tensor | None,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses of one place.

        Args:
            predictions: (M, K) and (M, 4), all images together.
            rows: (P,) int64, the predictions that have an object; the others are negatives.
            labels: (P,) of these objects.
            boxes: (P, 4) of these objects.
            normaliser: what the sums are divided by.
            ignored: (M, K) bool, where a prediction is no negative, or None.
            weights: (M,) of the predictions, or None for 1.
        """
        matched_boxes = predictions.pred_boxes[rows].float()
        target_labels = torch.full((len(predictions.pred_logits),), -1, dtype=torch.int64, device=boxes.device)
        target_labels[rows] = labels
        if self.loss.classification == "focal":
            classification = focal_loss(
                predictions.pred_logits, target_labels, alpha=self.loss.alpha, gamma=self.loss.gamma
            )
        else:
            pred_size = predictions.pred_boxes.detach().float()[..., 2:].prod(-1).sqrt()
            target_size = torch.ones_like(pred_size)
            target_size[rows] = boxes[:, 2:].prod(-1).sqrt()
            classification = boost_loss(
                predictions.pred_logits,
                target_labels,
                pred_size,
                target_size,
                alpha=self.loss.alpha,
                gamma=self.loss.gamma,
                beta=self.loss.beta,
            )
        if ignored is not None:
            # What was matched stays a positive of its class.
            ignored = ignored.index_put((rows, labels), torch.zeros((), dtype=torch.bool, device=ignored.device))
            classification = classification.masked_fill(ignored, 0.0)
        l1 = (matched_boxes - boxes).abs()
        giou = 1 - generalized_iou(matched_boxes, boxes)
        if weights is not None:
            classification = classification * weights[:, None]
            l1 = l1 * weights[rows, None]
            giou = giou * weights[rows]
        return {
            "class": self.loss.class_weight * classification.sum() / normaliser,
            "l1": self.loss.l1_weight * l1.sum() / normaliser,
            "giou": self.loss.giou_weight * giou.sum() / normaliser,
        }

    def _denoising_loss(
        self,
        denoising: DenoisingOutput,
        counts: list[int],
        labels: Tensor,
        boxes: Tensor,
        normaliser: Tensor,
        ignored: list[Tensor] | None,
    ) -> Tensor:
        """The denoising queries need no matching, they know their objects; `counts` are the images' objects."""
        image, slot = (denoising.objects >= 0).nonzero(as_tuple=True)
        first = torch.tensor([sum(counts[:i]) for i in range(len(counts))], device=boxes.device)
        rows = denoising.positive[image, slot].nonzero()[:, 0]
        target = (denoising.objects[image, slot] + first[image])[rows]
        weights = 1 / denoising.num_copies[image]
        total = boxes.new_zeros(())
        for number, layer in enumerate(denoising.layers):
            filled = LayerOutput(layer.pred_logits[image, slot], layer.pred_boxes[image, slot])
            hidden = None if ignored is None else ignored[number][image, slot]
            arguments = (filled, rows, labels[target], boxes[target], normaliser, hidden, weights)
            # Crowded images have many denoising queries, and the loss has a dozen intermediate results of that size.
            losses = checkpoint(self._losses, *arguments, use_reentrant=False, preserve_rng_state=False)
            total = total + sum(losses.values())
        return total
