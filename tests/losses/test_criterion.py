"""The criterion against a plain sum over hand-matched predictions, and the laws of batches."""

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from crossdino.config import LossConfig
from crossdino.losses import Criterion
from crossdino.structures import DenoisingOutput, DetectorOutput, LayerOutput, Target

PARTS = ("class", "l1", "giou", "encoder", "denoising")


def random_output(num_images, num_queries, num_classes, num_aux, seed):
    generator = torch.Generator().manual_seed(seed)
    layers = [
        LayerOutput(
            torch.randn(num_images, num_queries, num_classes, generator=generator, requires_grad=True),
            torch.rand(num_images, num_queries, 4, generator=generator) * 0.3 + 0.2,
        )
        for _ in range(num_aux + 2)
    ]
    return DetectorOutput(layers[0].pred_logits, layers[0].pred_boxes, layers[1:-1], layers[-1])


def image_of(output, i):
    """The part of an output that belongs to image i."""

    def cut(layer):
        return LayerOutput(layer.pred_logits[i : i + 1], layer.pred_boxes[i : i + 1])

    return DetectorOutput(
        output.pred_logits[i : i + 1],
        output.pred_boxes[i : i + 1],
        [cut(layer) for layer in output.aux_outputs],
        cut(output.encoder_output),
    )


def random_target(num_objects, seed):
    generator = torch.Generator().manual_seed(seed)
    return Target(
        torch.rand(num_objects, 4, generator=generator) * 0.3 + 0.2,
        torch.randint(3, (num_objects,), generator=generator),
    )


def test_one_layer_by_hand():
    """Two queries sit exactly on two objects: the matching is clear and each part can be written down."""
    target = Target(torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.7, 0.7, 0.2, 0.1]]), torch.tensor([1, 0]))
    boxes = torch.tensor([[[0.7, 0.7, 0.2, 0.12], [0.5, 0.5, 0.9, 0.9], [0.21, 0.2, 0.1, 0.1]]])
    logits = torch.tensor([[[2.0, -2.0], [-3.0, -3.0], [-1.0, 1.0]]])
    losses = Criterion(LossConfig(classification="focal"))(DetectorOutput(logits, boxes), [target])
    one_hot = torch.tensor([[[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])
    expected_class = sigmoid_focal_loss(logits, one_hot, 0.25, 2.0).sum() / 2
    pairs = box_convert(boxes[0, [2, 0]], "cxcywh", "xyxy"), box_convert(target.boxes_cxcywh, "cxcywh", "xyxy")
    expected_giou = 2.0 * (1 - generalized_box_iou(*pairs).diag()).sum() / 2
    torch.testing.assert_close(losses["class"], expected_class)
    torch.testing.assert_close(losses["l1"], torch.tensor(5.0 * (0.01 + 0.02) / 2), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(losses["giou"], expected_giou, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(losses["loss"], losses["class"] + losses["l1"] + losses["giou"])


@pytest.mark.parametrize("classification", ["focal", "boost"])
def test_a_batch_is_the_weighted_mean_of_its_images(classification):
    criterion = Criterion(LossConfig(classification=classification, beta=0.1))
    output, targets = random_output(3, 12, 3, 2, 0), [random_target(n, n) for n in (4, 0, 7)]
    together = criterion(output, targets)
    # Every image alone, divided by the batch's number of objects, must add up to the batch.
    alone = [criterion(image_of(output, i), [target], num_boxes=11) for i, target in enumerate(targets)]
    for part in ("loss", *PARTS):
        torch.testing.assert_close(together[part], sum(losses[part] for losses in alone))


def test_parts_add_up_and_gradients_flow():
    output = random_output(2, 10, 3, 1, 1)
    losses = Criterion(LossConfig())(output, [random_target(3, 1), random_target(2, 2)])
    torch.testing.assert_close(losses["loss"], sum(losses[part] for part in PARTS))
    losses["loss"].backward()
    for layer in (output, *output.aux_outputs, output.encoder_output):
        assert torch.isfinite(layer.pred_logits.grad).all() and layer.pred_logits.grad.abs().sum() > 0


def test_batch_without_objects_trains_the_background():
    output = random_output(2, 10, 3, 1, 2)
    losses = Criterion(LossConfig())(output, [random_target(0, 1), random_target(0, 2)])
    assert losses["l1"].item() == losses["giou"].item() == 0.0
    assert losses["class"].item() > 0
    losses["loss"].backward()
    assert (output.pred_logits.grad > 0).all()  # every score is pushed down


def test_what_the_loss_is_divided_by():
    """Objects of all processes over their number, so possibly less than 1; counted here, it is at least 1."""
    output, targets, criterion = random_output(1, 5, 3, 0, 3), [random_target(2, 3)], Criterion(LossConfig())
    once = criterion(output, targets, 1.0)["loss"]
    torch.testing.assert_close(criterion(output, targets)["loss"], once / 2)
    torch.testing.assert_close(criterion(output, targets, 0.25)["loss"], 4 * once)
    nothing = [random_target(0, 3)]
    torch.testing.assert_close(criterion(output, nothing)["loss"], criterion(output, nothing, 1.0)["loss"])


def test_denoising_is_divided_image_by_image_and_empty_slots_do_not_count():
    """Image 0 has two objects in two copies, image 1 one object in one copy and six empty slots."""
    generator = torch.Generator().manual_seed(4)
    targets = [random_target(2, 5), random_target(1, 6)]
    logits = torch.randn(2, 8, 3, generator=generator)
    boxes = torch.rand(2, 8, 4, generator=generator) * 0.3 + 0.2
    objects = torch.tensor([[0, 1, 0, 1, 1, 0, 1, 0], [-1, 0, -1, 0, -1, -1, -1, -1]])
    positive = torch.tensor([[True, True, False, False] * 2, [False, True, False, False] * 2])
    copies = torch.tensor([2, 1])

    def loss_of(noisy_logits, noisy_boxes):
        output = random_output(2, 6, 3, 0, 7)
        layers = [LayerOutput(noisy_logits, noisy_boxes)] * 2
        output.denoising = DenoisingOutput(layers, objects, positive, copies)
        return Criterion(LossConfig(classification="focal"))(output, targets)["denoising"]

    changed_logits, changed_boxes = logits.clone(), boxes.clone()
    changed_logits[objects < 0] = 9.0
    changed_boxes[objects < 0] = 0.9
    torch.testing.assert_close(loss_of(logits, boxes), loss_of(changed_logits, changed_boxes))

    expected = 0.0
    for image, slot in (objects >= 0).nonzero().tolist():
        target, obj = targets[image], objects[image, slot]
        label = torch.zeros(3)
        one = 0.0
        if positive[image, slot]:
            label[target.labels[obj]] = 1.0
            box, goal = boxes[image, slot], target.boxes_cxcywh[obj]
            pair = box_convert(box[None], "cxcywh", "xyxy"), box_convert(goal[None], "cxcywh", "xyxy")
            one = 5 * (box - goal).abs().sum() + 2 * (1 - generalized_box_iou(*pair)[0, 0])
        one += sigmoid_focal_loss(logits[image, slot], label, 0.25, 2.0).sum()
        expected += one / copies[image]
    # Two layers, three objects.
    torch.testing.assert_close(loss_of(logits, boxes), 2 * expected / 3, atol=1e-5, rtol=1e-5)
