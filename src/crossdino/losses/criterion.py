"""The training loss: every decoder layer, the encoder's proposals and the denoising queries (DINO, Section III-D).

Where we differ: predictions in regions to ignore are no negatives (see `crossdino.losses.ignore`), in every place that
is supervised. They are judged by the boxes that they predict now, so a rough box of early training may escape
punishment for a while, which costs little; matching knows nothing of regions, because real objects lie in them too.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn

from crossdino.config import LossConfig
from crossdino.losses.classification import classification_loss
from crossdino.losses.giou import generalized_iou
from crossdino.losses.ignore import ignored_classes
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
            num_boxes: what sums over objects are divided by, above 0: the objects of all processes (at least 1)
                divided by the number of processes. None counts the objects in `targets`, at least 1.

        Returns:
            `loss`, the weighted total, and its parts: `class`, `l1`, `giou` (matched queries, all decoder layers),
            `encoder`, `denoising`. The parts add up to the total; scalars, float32.
        """
        if num_boxes is None:
            num_boxes = max(1, sum(len(target.labels) for target in targets))
        normaliser = torch.as_tensor(num_boxes, dtype=torch.float32, device=output.pred_logits.device)
        decoder = [*output.aux_outputs, LayerOutput(output.pred_logits, output.pred_boxes)]
        encoder = [] if output.encoder_output is None else [output.encoder_output]
        noisy = [] if output.denoising is None else _without_empty_slots(output.denoising)
        # All places side by side, so that what follows is done once: P predictions an image.
        places = [*decoder, *encoder, *noisy]
        pred_logits = torch.cat([place.pred_logits for place in places], dim=1)
        pred_boxes = torch.cat([place.pred_boxes for place in places], dim=1).float()
        matches = match_layers([*decoder, *encoder], targets, self.loss)
        objects, weights = _assigned(places, matches, output.denoising, targets)
        losses = self._losses(pred_logits, pred_boxes, objects, targets)

        sizes = [sum(place.pred_logits.shape[1] for place in group) for group in (decoder, encoder, noisy)]
        sums = [[part.sum() for part in (loss * weights).sum(0).split(sizes)] for loss in losses]
        factors = (self.loss.class_weight, self.loss.l1_weight, self.loss.giou_weight)
        table = [[factor * part / normaliser for part in row] for factor, row in zip(factors, sums, strict=True)]
        parts = {name: row[0] for name, row in zip(("class", "l1", "giou"), table, strict=True)}
        parts |= {name: torch.stack([row[i] for row in table]).sum() for i, name in ((1, "encoder"), (2, "denoising"))}
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def _losses(
        self, pred_logits: Tensor, pred_boxes: Tensor, objects: Tensor, targets: list[Target]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Classification, L1 and GIoU loss of every prediction, each (N, P) float32.

        Args:
            pred_logits: (N, P, K).
            pred_boxes: (N, P, 4) float32.
            objects: (N, P) int64, the prediction's object among all objects of the batch, -1 for a negative.
            targets: N targets.
        """
        # One more object at the end, which is where -1 points to: the background.
        nothing = Target(pred_boxes.new_full((1, 4), 0.5), objects.new_full((1,), -1))
        labels = torch.cat([target.labels for target in (*targets, nothing)])[objects]
        boxes = torch.cat([target.boxes_cxcywh for target in (*targets, nothing)])[objects]
        matched = objects >= 0
        ignored = ignored_classes(pred_boxes.detach(), targets, pred_logits.shape[-1], self.loss.ignore_overlap)
        # Background is given the box it ought to have, so that no gradient of it can become NaN.
        pred_boxes = torch.where(matched[..., None], pred_boxes, boxes)
        l1 = (pred_boxes - boxes).abs().sum(-1)
        giou = torch.where(matched, 1 - generalized_iou(pred_boxes, boxes), 0.0)
        boost = self.loss.classification == "boost"
        pred_size, target_size = (
            (some[..., 2] * some[..., 3]).sqrt() if boost else torch.ones_like(l1)
            for some in (pred_boxes.detach(), boxes)
        )
        classification = classification_loss(
            pred_logits.flatten(0, 1),
            labels.flatten(),
            pred_size.flatten(),
            target_size.flatten(),
            None if ignored is None else ignored.flatten(0, 1),
            alpha=self.loss.alpha,
            gamma=self.loss.gamma,
            beta=self.loss.beta if boost else 1.0,
        )
        return classification.view_as(l1).float(), l1, giou


def _without_empty_slots(denoising: DenoisingOutput) -> list[LayerOutput]:
    """The denoising layers with logits of 0 in empty slots: a weight of 0 would leave a NaN there what it is."""
    filled = (denoising.objects >= 0)[..., None]
    return [LayerOutput(layer.pred_logits.where(filled, 0.0), layer.pred_boxes) for layer in denoising.layers]


def _assigned(
    places: list[LayerOutput], matches: list[Match], denoising: DenoisingOutput | None, targets: list[Target]
) -> tuple[Tensor, Tensor]:
    """The object of every prediction, as `Criterion._losses` wants it, and the weight of its loss, both (N, P)."""
    device = places[0].pred_logits.device
    starts = list(accumulate((place.pred_logits.shape[1] for place in places[: len(matches)]), initial=0))
    image = torch.cat([match.image for match in matches])
    column = torch.cat([start + match.query for start, match in zip(starts, matches, strict=False)])
    objects = torch.full((len(targets), starts[-1]), -1, dtype=torch.int64, device=device)
    objects[image, column] = torch.cat([match.target for match in matches])
    weights = torch.ones(objects.shape, device=device)
    if denoising is None:
        return objects, weights
    # The denoising queries need no matching, they know their objects; empty slots count nothing.
    filled = denoising.objects >= 0
    first = torch.tensor(list(accumulate((len(target.labels) for target in targets[:-1]), initial=0)), device=device)
    known = torch.where(filled & denoising.positive, denoising.objects + first[:, None], -1)
    shares = torch.where(filled, 1 / denoising.num_copies[:, None], 0.0)
    copies = len(denoising.layers)
    return torch.cat((objects, known.repeat(1, copies)), dim=1), torch.cat((weights, shares.repeat(1, copies)), dim=1)
