"""All places in one pass against the same loss written place by place, image by image, prediction by prediction."""

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

from crossdino.config import LossConfig
from crossdino.losses import Criterion, boost_loss, focal_loss, match_layers
from crossdino.losses.ignore import ignored_classes
from crossdino.structures import DenoisingOutput, DetectorOutput, LayerOutput, Target

NUM_CLASSES = 3


def draw(counts, seed):
    """Outputs whose places have different numbers of queries, and targets; the second image has regions."""
    generator = torch.Generator().manual_seed(seed)

    def boxes(*shape):
        return torch.rand(*shape, 4, generator=generator) * 0.3 + 0.1

    def layer(size):
        logits = torch.randn(len(counts), size, NUM_CLASSES, generator=generator)
        return LayerOutput(logits.requires_grad_(), boxes(len(counts), size).requires_grad_())

    targets = [Target(boxes(n), torch.randint(NUM_CLASSES, (n,), generator=generator)) for n in counts]
    targets[1].ignored_boxes_cxcywh = torch.tensor([[0.2, 0.2, 0.4, 0.4], [0.5, 0.2, 0.3, 0.4]])
    targets[1].ignored_labels = torch.tensor([-1, 2])
    last = layer(14)
    output = DetectorOutput(last.pred_logits, last.pred_boxes, [layer(14), layer(14)], layer(11))
    slots = 4 * max(counts)
    objects = torch.full((len(counts), slots), -1)
    for image, count in enumerate(counts):
        for copy in range(2 if image == 0 else 1):
            for half in range(2):
                start = (2 * copy + half) * count
                objects[image, start : start + count] = torch.arange(count)
    positive = torch.rand(objects.shape, generator=generator) < 0.5
    copies = torch.tensor([2] + [1] * (len(counts) - 1))
    if slots:
        output.denoising = DenoisingOutput([layer(slots), layer(slots)], objects, positive, copies)
    return output, targets


def one_place(layer, image, pairs, targets, loss, weight=1.0, rows=None):
    """Classification, L1 and GIoU of one image at one place; `pairs`: {query: object}."""
    logits, boxes, target = layer.pred_logits[image], layer.pred_boxes[image], targets[image]
    ignored = ignored_classes(layer.pred_boxes.detach(), targets, NUM_CLASSES, loss.ignore_overlap)
    sums = [torch.zeros(()), torch.zeros(()), torch.zeros(())]
    for query in range(len(logits)) if rows is None else rows:
        label = int(target.labels[pairs[query]]) if query in pairs else -1
        if loss.classification == "focal":
            one = focal_loss(logits[query], torch.tensor(label), alpha=loss.alpha, gamma=loss.gamma)
        else:
            goal = target.boxes_cxcywh[pairs[query]] if query in pairs else torch.ones(4)
            sizes = [(box[2] * box[3]).sqrt() for box in (boxes[query], goal)]
            exponents = {"alpha": loss.alpha, "gamma": loss.gamma, "beta": loss.beta}
            one = boost_loss(logits[query], torch.tensor(label), *sizes, **exponents)
        for k in range(NUM_CLASSES):
            if k == label or ignored is None or not ignored[image, query, k]:
                sums[0] = sums[0] + weight * one[k]
        if query in pairs:
            box, goal = boxes[query][None], target.boxes_cxcywh[pairs[query]][None]
            sums[1] = sums[1] + weight * (box - goal).abs().sum()
            giou = generalized_box_iou(box_convert(box, "cxcywh", "xyxy"), box_convert(goal, "cxcywh", "xyxy"))
            sums[2] = sums[2] + weight * (1 - giou[0, 0])
    return torch.stack(sums)


def plainly(output, targets, loss, num_boxes):
    decoder = [*output.aux_outputs, LayerOutput(output.pred_logits, output.pred_boxes)]
    factors = torch.tensor([loss.class_weight, loss.l1_weight, loss.giou_weight]) / num_boxes
    sums = {"decoder": torch.zeros(3), "encoder": torch.zeros(3), "denoising": torch.zeros(3)}
    for number, layer in enumerate([*decoder, output.encoder_output]):
        (match,) = match_layers([layer], targets, loss)
        before = 0
        for image, target in enumerate(targets):
            mine = match.image == image
            pairs = dict(zip(match.query[mine].tolist(), (match.target[mine] - before).tolist(), strict=True))
            before += len(target.labels)
            name = "decoder" if number < len(decoder) else "encoder"
            sums[name] = sums[name] + one_place(layer, image, pairs, targets, loss)
    if output.denoising is not None:
        for layer in output.denoising.layers:
            for image in range(len(targets)):
                objects, positive = output.denoising.objects[image], output.denoising.positive[image]
                rows = [slot for slot in range(len(objects)) if objects[slot] >= 0]
                pairs = {slot: int(objects[slot]) for slot in rows if positive[slot]}
                weight = 1 / float(output.denoising.num_copies[image])
                place = one_place(layer, image, pairs, targets, loss, weight, rows)
                sums["denoising"] = sums["denoising"] + place
    parts = dict(zip(("class", "l1", "giou"), sums["decoder"] * factors, strict=True))
    parts |= {name: (sums[name] * factors).sum() for name in ("encoder", "denoising")}
    return {"loss": sum(parts.values()), **parts}


@pytest.mark.parametrize("counts", [(3, 2, 0), (0, 0), (1, 6)])
@pytest.mark.parametrize("classification", ["boost", "focal"])
def test_values_and_gradients(counts, classification):
    loss = LossConfig(classification=classification, beta=0.1, ignore_overlap=0.4, l1_weight=3.0, class_weight=1.5)
    results = []
    for function in (lambda *given: plainly(*given, loss, 4.0), lambda *given: Criterion(loss)(*given, 4.0)):
        output, targets = draw(counts, 0)
        losses = function(output, targets)
        losses["loss"].backward()
        places = [output, *output.aux_outputs, output.encoder_output]
        places += output.denoising.layers if output.denoising else []
        grads = [part.grad for place in places for part in (place.pred_logits, place.pred_boxes)]
        results.append((losses, [None if grad is None or not grad.any() else grad for grad in grads]))
    (expected, expected_grads), (found, found_grads) = results
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)  # float32 sums in another order
    for one, other in zip(expected_grads, found_grads, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)  # GIoU's differences of close numbers


def test_nothing_of_an_empty_slot_counts_not_even_what_is_no_number():
    output, targets = draw((1, 6), 0)
    assert output.denoising is not None
    empty = output.denoising.objects < 0
    assert empty.any()
    plain = Criterion(LossConfig())(output, targets)
    layers = output.denoising.layers
    for layer in layers:
        for part in (layer.pred_logits, layer.pred_boxes):
            part.data[empty] = float("nan")
    found = Criterion(LossConfig())(output, targets)
    assert all(torch.equal(found[name], value) for name, value in plain.items())
    found["loss"].backward()
    for layer in layers:
        for part in (layer.pred_logits, layer.pred_boxes):
            assert torch.isfinite(part.grad).all() and not part.grad[empty].any()


def test_losses_of_double_precision_are_single_as_all_are():
    output, targets = draw((3, 2, 0), 1)
    wide = DetectorOutput(output.pred_logits.double(), output.pred_boxes.double())
    narrow = DetectorOutput(output.pred_logits, output.pred_boxes)
    losses = [Criterion(LossConfig())(one, targets) for one in (narrow, wide)]
    for name, value in losses[0].items():
        torch.testing.assert_close(losses[1][name], value)  # which compares the types as well
