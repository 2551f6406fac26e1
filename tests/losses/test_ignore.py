"""Regions to ignore: geometry against a grid of points, losses and gradients against plain loops."""

import dataclasses

import pytest
import torch

from crossdino.config import LossConfig
from crossdino.losses import Criterion
from crossdino.losses.ignore import covered_area, ignored_classes
from crossdino.losses.matcher import match_layers
from crossdino.structures import DenoisingOutput, DetectorOutput, LayerOutput, Target

NUM_CLASSES = 3


def covered_by_points(box, regions, steps=200):
    """Share of a cxcywh box's own area that lies in any of the regions, by a grid of points."""
    inside = 0
    for i in range(steps):
        for j in range(steps):
            x = box[0] + box[2] * ((i + 0.5) / steps - 0.5)
            y = box[1] + box[3] * ((j + 0.5) / steps - 0.5)
            inside += any(abs(x - r[0]) <= r[2] / 2 and abs(y - r[1]) <= r[3] / 2 for r in regions)
    return inside / steps**2


def corners(boxes):
    return torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), dim=1)


def test_covered_area_by_hand_and_by_points():
    # Two regions that touch, one that overlaps both, one far away, one twice.
    regions = torch.tensor(
        [[0.2, 0.5, 0.2, 1.0], [0.4, 0.5, 0.2, 1.0], [0.3, 0.3, 0.2, 0.2], [0.9, 0.9, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]]
    )
    boxes = torch.tensor(
        [
            [0.3, 0.5, 0.2, 0.2],  # half in the first, half in the second
            [0.3, 0.3, 0.2, 0.2],  # covered twice over
            [0.5, 0.5, 0.2, 0.2],  # half
            [0.7, 0.5, 0.1, 0.1],  # not at all
            [0.95, 0.95, 0.1, 0.1],  # a quarter, by two equal regions
            [0.5, 0.5, 4.0, 4.0],  # far larger than the image
        ]
    )
    area = boxes[:, 2] * boxes[:, 3]
    share = covered_area(corners(boxes), corners(regions)) / area
    torch.testing.assert_close(share, torch.tensor([1.0, 1.0, 0.5, 0.0, 0.25, 0.41 / 16]), atol=1e-5, rtol=1e-5)
    generator = torch.Generator().manual_seed(0)
    regions = torch.rand(6, 4, generator=generator) * 0.4 + torch.tensor([0.3, 0.3, 0.05, 0.05])
    boxes = torch.rand(8, 4, generator=generator) * 0.5 + torch.tensor([0.2, 0.2, 0.05, 0.05])
    share = covered_area(corners(boxes), corners(regions)) / (boxes[:, 2] * boxes[:, 3])
    for box, found in zip(boxes.tolist(), share.tolist(), strict=True):
        # 200 x 200 points: an edge is off by half a point at most, and a box meets at most a dozen edges.
        assert found == pytest.approx(covered_by_points(box, regions.tolist()), abs=0.02)
    assert 0.05 < share.min() < 0.5 < share.max()


def regions_of(*rows):
    """Regions (label, cx, cy, w, h)."""
    return {
        "ignored_boxes_cxcywh": torch.tensor([row[1:] for row in rows]),
        "ignored_labels": torch.tensor([row[0] for row in rows]),
    }


def random_target(num_objects, seed, **regions):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(num_objects, 4, generator=generator) * 0.3 + 0.2
    return Target(boxes, torch.randint(NUM_CLASSES, (num_objects,), generator=generator), **regions)


# Two images with different numbers of regions and one without: half the picture at all classes; a strip at class 1.
TARGETS = [
    random_target(3, 1, **regions_of((-1, 0.2, 0.5, 0.5, 1.0), (1, 0.6, 0.3, 0.4, 0.5), (1, 0.75, 0.7, 0.3, 0.4))),
    random_target(2, 2),
    random_target(0, 3, **regions_of((2, 0.5, 0.5, 0.3, 0.3))),
]


def without_regions(targets):
    return [Target(target.boxes_cxcywh, target.labels) for target in targets]


def random_output(seed=0, num_queries=25):
    generator = torch.Generator().manual_seed(seed)

    def layer(size):
        logits = torch.randn(3, size, NUM_CLASSES, generator=generator, requires_grad=True)
        return LayerOutput(logits, torch.rand(3, size, 4, generator=generator) * 0.5 + 0.1)

    output = DetectorOutput(*vars(layer(num_queries)).values(), [layer(num_queries)], layer(num_queries))
    objects = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, -1, -1], [-1] * 6])
    positive = torch.tensor([[True] * 3 + [False] * 3, [True, True] + [False] * 4, [False] * 6])
    output.denoising = DenoisingOutput([layer(6), layer(6)], objects, positive, torch.tensor([1, 1, 1]))
    return output


def places(output):
    """All supervised places with the class that each query is matched to, (N, Q), -1: none."""
    layers = [*output.aux_outputs, LayerOutput(output.pred_logits, output.pred_boxes), output.encoder_output]
    offsets = [0, 3, 5]
    for layer, match in zip(layers, match_layers(layers, without_regions(TARGETS), LossConfig()), strict=True):
        labels = torch.full(layer.pred_logits.shape[:2], -1)
        for image, query, obj in zip(match.image.tolist(), match.query.tolist(), match.target.tolist(), strict=True):
            labels[image, query] = TARGETS[image].labels[obj - offsets[image]]
        yield layer, labels
    for layer in output.denoising.layers:
        labels = torch.full((3, 6), -1)
        for image in range(3):
            for slot in range(6):
                if output.denoising.positive[image, slot]:
                    labels[image, slot] = TARGETS[image].labels[output.denoising.objects[image, slot]]
        yield layer, labels


@pytest.mark.parametrize("classification", ["boost", "focal"])
@pytest.mark.parametrize("overlap", [0.3, 0.5, 0.9])
def test_gradients_vanish_in_regions_and_nowhere_else(classification, overlap):
    loss = LossConfig(classification=classification, ignore_overlap=overlap, beta=0.1)
    plain, found = random_output(), random_output()
    Criterion(loss)(plain, without_regions(TARGETS))["loss"].backward()
    Criterion(loss)(found, TARGETS)["loss"].backward()
    vanished = positives = 0
    for (layer, labels), (reference, _) in zip(places(found), places(plain), strict=True):
        for image, target in enumerate(TARGETS):
            regions, region_labels = target.ignored_boxes_cxcywh.tolist(), target.ignored_labels.tolist()
            for query in range(layer.pred_logits.shape[1]):
                box = layer.pred_boxes[image, query].tolist()
                for k in range(NUM_CLASSES):
                    here = [r for r, label in zip(regions, region_labels, strict=True) if label in (k, -1)]
                    # A coarse grid decides clear cases; the geometry has its own test.
                    share = covered_by_points(box, here, steps=40) if here else 0.0
                    if abs(share - overlap) < 0.04:
                        continue
                    gradient = layer.pred_logits.grad[image, query, k]
                    if share > overlap and labels[image, query] != k:
                        assert gradient == 0
                        vanished += 1
                    else:
                        assert gradient == reference.pred_logits.grad[image, query, k]
                        positives += bool(share > overlap)
    # Neither the rule nor its exception was tested in vain.
    assert vanished > 20 and positives > 0


def test_region_of_one_class_leaves_the_others_alone():
    boxes = torch.tensor([[[0.5, 0.5, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1]]])
    one = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), **regions_of((1, 0.5, 0.5, 0.2, 0.2)))
    assert ignored_classes(boxes, [one], 3, 0.5).tolist() == [[[False, True, False], [False] * 3]]
    both = Target(one.boxes_cxcywh, one.labels, **regions_of((1, 0.475, 0.5, 0.05, 0.1), (-1, 0.525, 0.5, 0.05, 0.1)))
    # Half of the box in each: only class 1 has it covered as a whole.
    assert ignored_classes(boxes, [both], 3, 0.9).tolist() == [[[False, True, False], [False] * 3]]
    assert ignored_classes(boxes, [without_regions([one])[0]], 3, 0.5) is None


def test_boxes_of_no_size_are_not_in_a_region():
    boxes = torch.tensor([[[0.5, 0.5, 0.0, 0.1], [0.9, 0.9, 0.0, 0.0]]])
    target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), **regions_of((-1, 0.5, 0.5, 0.2, 0.2)))
    assert not ignored_classes(boxes, [target], 3, 0.5).any()


def test_without_regions_nothing_changes_by_a_bit():
    """Also where another image of the batch has one: a region out of every prediction's reach."""
    outputs = [random_output() for _ in range(2)]
    far = dataclasses.replace(without_regions(TARGETS)[1], **regions_of((-1, 5.0, 5.0, 0.1, 0.1)))
    batches = [without_regions(TARGETS), [without_regions(TARGETS)[0], far, without_regions(TARGETS)[2]]]
    losses = [Criterion(LossConfig())(output, batch) for output, batch in zip(outputs, batches, strict=True)]
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


def test_regions_are_never_matched():
    """An image with regions only has the background's loss outside of them and nothing else."""
    output = random_output()
    targets = [Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), **regions_of((-1, 0.5, 0.5, 4.0, 4.0)))] * 3
    losses = Criterion(LossConfig())(dataclasses.replace(output, denoising=None), targets)
    assert losses["loss"].item() == 0.0


def test_boxes_that_are_regions_lie_in_them_as_a_whole():
    """Also with `ignore_overlap` 1 and among many regions, whose edges cut a box into many parts that are added up."""
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand(1, 300, 4, generator=generator) * 0.5 + 0.01

    def ignored(box, regions):
        target = Target(
            torch.zeros(0, 4),
            torch.zeros(0, dtype=torch.int64),
            ignored_boxes_cxcywh=regions,
            ignored_labels=torch.zeros(len(regions), dtype=torch.int64),
        )
        found = ignored_classes(box, [target], 2, 1.0)
        assert found is not None and not found[..., 1].any()
        return found[0, :, 0]

    assert ignored(boxes, boxes[0]).all()
    shifted = boxes[:, :1] + 0.01 * boxes[:, :1, 2:3] * torch.tensor([1.0, 0, 0, 0])  # 99 % in the region
    assert not ignored(shifted, boxes[0, :1]).any()
