"""Contrastive denoising queries: where the noise ends, who sees whom, and what images without objects do."""

import torch

from crossdino.models.denoising import denoising_visibility, make_denoising_queries
from crossdino.structures import Target


def make(num_objects, seed=0, num_denoising=100, label_noise=0.5, box_noise=1.0, num_classes=7):
    torch.manual_seed(seed)
    targets = [
        Target(
            torch.cat((torch.rand(n, 2) * 0.4 + 0.3, torch.rand(n, 2) * 0.2 + 0.05), dim=1),
            torch.randint(num_classes, (n,)),
        )
        for n in num_objects
    ]
    return targets, make_denoising_queries(targets, num_classes, num_denoising, label_noise, box_noise)


def corners(boxes):
    return torch.cat((boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2), -1)


def test_layout_and_group_count():
    targets, queries = make((3, 10, 0))
    assert (queries.num_groups, queries.group_size) == (10, 10)
    assert queries.labels.shape == (3, 200) and queries.anchors.shape == (3, 200, 4)
    assert queries.valid.sum(1).tolist() == [3, 10, 0]
    by_slot = queries.labels.view(3, 10, 2, 10)
    assert ((by_slot >= 0) == queries.valid[:, None, None]).all()
    # More objects than the budget: one group, and none is dropped.
    _, crowded = make((250,))
    assert (crowded.num_groups, crowded.group_size) == (1, 250) and crowded.valid.all()


def test_noise_stays_within_its_bounds():
    """A corner moves by less than half the box (positive), by half to a whole box (negative); scale 1."""
    targets, queries = make((20, 20), num_denoising=400)
    anchors = queries.anchors.view(2, queries.num_groups, 2, 20, 4)
    for image, target in enumerate(targets):
        boxes = target.boxes_cxcywh
        half = boxes[:, 2:].repeat(1, 2) / 2
        moved = (corners(anchors[image]) - corners(boxes)).abs() / half
        # 2 %: anchors pass through the clamped logit of the decoder (1e-3 at both ends of [0, 1]).
        sane = (anchors[image][..., 2:] > 2e-3).all(-1, keepdim=True).expand_as(moved)
        positive, negative = moved[:, 0][sane[:, 0]], moved[:, 1][sane[:, 1]]
        assert positive.max() <= 1.02 and positive.max() > 0.95 and positive.min() < 0.05
        assert negative.max() <= 2.02 and negative.max() > 1.9
        assert negative.min() >= 0.98


def test_label_noise_ratio():
    targets, queries = make((50, 50), num_denoising=5000, num_classes=1000)
    truth = torch.stack([target.labels for target in targets])[:, None, None]
    changed = (queries.labels.view(2, -1, 2, 50) != truth).float().mean()
    # Half of the ratio of 20,000 labels is drawn anew: 0.25 +- 0.012 is four standard deviations.
    assert abs(float(changed) - 0.25) < 0.012
    targets, clean = make((5,), label_noise=0.0, box_noise=0.0)
    assert (clean.labels.view(-1, 5) == targets[0].labels).all()
    torch.testing.assert_close(clean.anchors.view(-1, 5, 4), targets[0].boxes_cxcywh.expand(40, 5, 4))


def test_no_objects_or_no_budget():
    assert make((0, 0))[1] is None
    assert make((3,), num_denoising=0)[1] is None


def test_visibility():
    _, queries = make((1, 2), num_denoising=4)  # two groups of 2 x 2 slots
    visible = denoising_visibility(queries, 3)
    assert visible.shape == (2, 1, 11, 11)
    for image, count in ((0, 1), (1, 2)):
        for row in range(11):
            for column in range(11):
                expected = row == column
                if column >= 8:
                    expected = True  # everybody sees the matched queries
                elif row < 8 and row // 4 == column // 4 and column % 2 < count:
                    expected = True  # the own group's filled slots
                assert bool(visible[image, 0, row, column]) == expected, (image, row, column)
