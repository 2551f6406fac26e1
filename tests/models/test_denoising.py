"""Contrastive denoising queries: where the noise ends, who sees whom, crowds, and what the batch must not do."""

import pytest
import torch

from crossdino.models.decoder import block_visibility
from crossdino.models.denoising import make_denoising_queries
from crossdino.structures import Target


def random_targets(num_objects, num_classes=7, seed=0, seeds=None):
    torch.manual_seed(seed)
    return [
        Target(
            torch.cat((torch.rand(n, 2) * 0.4 + 0.3, torch.rand(n, 2) * 0.2 + 0.05), dim=1),
            torch.randint(num_classes, (n,)),
            noise_seed=None if seeds is None else seeds[i],
        )
        for i, n in enumerate(num_objects)
    ]


def make(num_objects, num_denoising=100, label_noise=0.5, box_noise=1.0, num_classes=7):
    targets = random_targets(num_objects, num_classes)
    return targets, make_denoising_queries(targets, num_classes, num_denoising, label_noise, box_noise)


def corners(boxes):
    return torch.cat((boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2), -1)


def test_every_image_has_the_copies_that_its_own_number_of_objects_asks_for():
    _, queries = make((3, 10, 0, 100, 250))
    assert queries.num_copies.tolist() == [33, 10, 1, 1, 1]
    # 250 objects in rounds of 84, 83 and 83, two slots an object.
    assert queries.block_sizes == [200, 166, 166]
    assert queries.block_images == [[0, 1, 2, 3, 4], [4], [4]]
    assert queries.labels.shape == (5, 532) and queries.anchors.shape == (5, 532, 4)
    assert (queries.objects >= 0).sum(1).tolist() == [198, 200, 0, 200, 500]
    assert ((queries.objects >= 0) == (queries.islands >= 0)).all()
    assert ((queries.objects >= 0) == (queries.labels >= 0)).all()
    for image, count in enumerate((3, 10, 0, 100, 250)):
        for positive in (True, False):
            chosen = queries.objects[image][(queries.objects[image] >= 0) & (queries.positive[image] == positive)]
            assert chosen.bincount(minlength=count).tolist() == [int(queries.num_copies[image])] * count


@pytest.mark.parametrize("count", [1, 7, 99, 101, 199, 201, 1234])
def test_islands_hold_each_object_once_as_a_positive_and_once_as_a_negative(count):
    _, queries = make((count, 5))
    assert max(queries.block_sizes) <= 200 and len(queries.block_sizes) == -(-count // 100)
    start, seen = 0, []
    for size in queries.block_sizes:
        islands, objects, positive = (
            x[0, start : start + size] for x in (queries.islands, queries.objects, queries.positive)
        )
        start += size
        for island in range(int(islands.max()) + 1):
            inside = islands == island
            assert sorted(objects[inside & positive].tolist()) == sorted(objects[inside & ~positive].tolist())
            assert len(set(objects[inside].tolist())) * 2 == int(inside.sum())
            # Positives first, as in DINO.
            assert positive[inside].tolist() == sorted(positive[inside].tolist(), reverse=True)
            seen += objects[inside & positive].tolist()
    assert sorted(seen) == sorted(list(range(count)) * int(queries.num_copies[0]))


def test_noise_stays_within_its_bounds():
    """A corner moves by less than half the box (positive), by half to a whole box (negative); scale 1."""
    targets, queries = make((20, 500), num_denoising=400)
    for image, target in enumerate(targets):
        filled = queries.objects[image] >= 0
        anchors, positive = queries.anchors[image][filled], queries.positive[image][filled]
        boxes = target.boxes_cxcywh[queries.objects[image][filled]]
        half = boxes[:, 2:].repeat(1, 2) / 2
        moved = (corners(anchors) - corners(boxes)).abs() / half
        # 2 %: anchors pass through the clamped logit of the decoder (1e-3 at both ends of [0, 1]).
        sane = (anchors[:, 2:] > 2e-3).all(-1)
        near, far = moved[positive & sane], moved[~positive & sane]
        assert near.max() <= 1.02 and near.max() > 0.95 and near.min() < 0.05
        assert far.max() <= 2.02 and far.max() > 1.9
        assert far.min() >= 0.98


def test_label_noise_ratio():
    targets, queries = make((50, 50), num_denoising=5000, num_classes=1000)
    truth = torch.stack([target.labels[objects] for target, objects in zip(targets, queries.objects, strict=True)])
    changed = (queries.labels != truth).float().mean()
    # Half of the ratio of 20,000 labels is drawn anew: 0.25 +- 0.012 is four standard deviations.
    assert abs(float(changed) - 0.25) < 0.012
    targets, clean = make((5, 3), num_denoising=10, label_noise=0.0, box_noise=0.0)
    for image, target in enumerate(targets):
        filled = clean.objects[image] >= 0
        objects = clean.objects[image][filled]
        assert (clean.labels[image][filled] == target.labels[objects]).all()
        torch.testing.assert_close(clean.anchors[image][filled], target.boxes_cxcywh[objects])


def test_an_image_is_drawn_the_same_whatever_it_is_batched_with():
    targets = random_targets((4, 0, 31, 9), seeds=(5, 6, 7, 5))
    together = make_denoising_queries(targets, 7, 10, 0.5, 1.0)
    for image, target in enumerate(targets):
        torch.manual_seed(image)  # torch's global generator must play no part
        alone = make_denoising_queries([target], 7, 10, 0.5, 1.0)
        if alone is None:
            assert (together.objects[image] == -1).all()
            continue
        assert alone.num_copies[0] == together.num_copies[image]
        filled = together.objects[image] >= 0
        own = alone.objects[0] >= 0
        for name in ("labels", "anchors", "objects", "positive", "islands"):
            assert torch.equal(getattr(alone, name)[0][own], getattr(together, name)[image][filled]), name
    # Another seed is another draw, also for an image with as many objects.
    other = make_denoising_queries(random_targets((4,), seeds=(8,)), 7, 10, 0.5, 1.0)
    assert not torch.equal(other.anchors[0, :16], together.anchors[0, :16])


def test_without_a_seed_the_global_generator_decides():
    targets = random_targets((4, 4))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(make_denoising_queries(targets, 7, 10, 0.5, 1.0).anchors)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_no_objects_or_no_budget():
    assert make((0, 0))[1] is None
    assert make((3,), num_denoising=0)[1] is None


def test_visibility():
    islands = torch.tensor([[0, 0, 1, 1, -1], [0, 0, 0, -1, -1]])
    void = torch.tensor([[False, False, False], [False, True, True]])
    for hidden in (None, void):
        visible = block_visibility(islands, 3, hidden)
        assert visible.shape == (2, 1, 5, 8)
        for image in range(2):
            for row in range(5):
                for column in range(8):
                    if column >= 5:  # everybody sees the matched queries that stand for something
                        expected = hidden is None or not hidden[image, column - 5]
                    else:
                        number = islands[image, column]
                        expected = row == column or bool(number >= 0 and number == islands[image, row])
                    assert bool(visible[image, 0, row, column]) == expected, (image, row, column)
