"""The matcher against brute force over all assignments, with costs written out one pair at a time."""

import itertools
import math

import pytest
import torch

from crossdino.config import LossConfig
from crossdino.losses import matcher
from crossdino.losses.matcher import match_layers, matching_cost
from crossdino.structures import LayerOutput, Target


def random_layer(num_images, num_queries, num_classes, generator):
    return LayerOutput(
        torch.randn(num_images, num_queries, num_classes, generator=generator),
        torch.rand(num_images, num_queries, 4, generator=generator) * 0.4 + 0.1,
    )


def random_target(num_objects, num_classes, generator):
    return Target(
        torch.rand(num_objects, 4, generator=generator) * 0.4 + 0.1,
        torch.randint(num_classes, (num_objects,), generator=generator),
    )


def plain_cost(logit, box, label, target):
    """DINO's cost of one pair."""
    p = 1 / (1 + math.exp(-logit[label]))
    class_cost = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
    l1 = sum(abs(a - b) for a, b in zip(box, target, strict=True))
    corners = [(c[0] - c[2] / 2, c[1] - c[3] / 2, c[0] + c[2] / 2, c[1] + c[3] / 2) for c in (box, target)]
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = corners
    overlap = max(0, min(ax1, bx1) - max(ax0, bx0)) * max(0, min(ay1, by1) - max(ay0, by0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - overlap
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    giou = overlap / union - (hull - union) / hull
    return 2.0 * class_cost + 5.0 * l1 - 2.0 * giou


def test_cost_of_every_pair():
    generator = torch.Generator().manual_seed(0)
    layer, target = random_layer(2, 6, 3, generator), random_target(4, 3, generator)
    cost = matching_cost(layer.pred_logits[1], layer.pred_boxes[1], target, LossConfig())
    for q in range(6):
        for j in range(4):
            expected = plain_cost(
                layer.pred_logits[1, q].tolist(),
                layer.pred_boxes[1, q].tolist(),
                int(target.labels[j]),
                target.boxes_cxcywh[j].tolist(),
            )
            assert float(cost[q, j]) == pytest.approx(expected, abs=1e-5)


def test_least_total_cost_in_every_image_and_layer():
    generator = torch.Generator().manual_seed(1)
    layers = [random_layer(3, 5, 2, generator) for _ in range(2)]
    targets = [random_target(n, 2, generator) for n in (3, 0, 4)]
    offsets = [0, 3, 3]
    for layer, match in zip(layers, match_layers(layers, targets, LossConfig()), strict=True):
        assert sorted(match.target.tolist()) == list(range(7))
        for image, target in enumerate(targets):
            mine = match.image == image
            queries, objects = match.query[mine].tolist(), (match.target[mine] - offsets[image]).tolist()
            assert len(set(queries)) == len(queries) == len(target.labels)
            if not objects:
                continue
            cost = matching_cost(layer.pred_logits[image], layer.pred_boxes[image], target, LossConfig())
            best = min(
                sum(float(cost[q, j]) for j, q in enumerate(chosen))
                for chosen in itertools.permutations(range(5), len(target.labels))
            )
            found = sum(float(cost[q, j]) for q, j in zip(queries, objects, strict=True))
            assert found == pytest.approx(best, abs=1e-5)


def test_more_objects_than_queries_and_no_objects_at_all():
    generator = torch.Generator().manual_seed(2)
    layer = random_layer(1, 3, 2, generator)
    (match,) = match_layers([layer], [random_target(8, 2, generator)], LossConfig())
    assert sorted(match.query.tolist()) == [0, 1, 2] and len(set(match.target.tolist())) == 3
    (match,) = match_layers([layer], [random_target(0, 2, generator)], LossConfig())
    assert len(match.query) == len(match.image) == len(match.target) == 0


def test_predictions_that_are_not_finite_do_not_stop_the_matching():
    generator = torch.Generator().manual_seed(3)
    layer = random_layer(1, 4, 2, generator)
    layer.pred_logits[0, 1] = float("nan")
    (match,) = match_layers([layer], [random_target(3, 2, generator)], LossConfig())
    assert 1 not in match.query.tolist()


def test_a_crowded_image_is_matched_in_pieces_with_the_same_result(monkeypatch):
    """Costs are computed for some predictions at a time; the pieces must come together in the right order."""
    generator = torch.Generator().manual_seed(4)
    layers = [random_layer(2, 13, 3, generator) for _ in range(2)]
    targets = [random_target(n, 3, generator) for n in (40, 5)]
    whole = match_layers(layers, targets, LossConfig())
    monkeypatch.setattr(matcher, "_PAIRS_AT_ONCE", 90)  # two predictions of the first image at a time
    for one, other in zip(whole, match_layers(layers, targets, LossConfig()), strict=True):
        for name in ("image", "query", "target"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    assert (whole[0].image == 0).sum() == 13 and (whole[0].image == 1).sum() == 5


def test_layers_of_different_sizes_in_one_call_are_matched_as_if_alone():
    generator = torch.Generator().manual_seed(5)
    layers = [random_layer(3, size, 4, generator) for size in (9, 4, 12)]
    targets = [random_target(n, 4, generator) for n in (2, 0, 7)]  # fewer and more objects than classes
    for layer, match in zip(layers, match_layers(layers, targets, LossConfig()), strict=True):
        (alone,) = match_layers([layer], targets, LossConfig())
        for name in ("image", "query", "target"):
            assert torch.equal(getattr(match, name), getattr(alone, name))


def test_threads_find_the_same_pairs(monkeypatch):
    generator = torch.Generator().manual_seed(6)
    layers = [random_layer(2, 60, 3, generator) for _ in range(4)]
    targets = [random_target(n, 3, generator) for n in (45, 30)]
    pools = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    original = matcher.ThreadPoolExecutor
    monkeypatch.setattr(matcher, "ThreadPoolExecutor", lambda number: pools.append(number) or original(number))
    alone = match_layers(layers, targets, LossConfig())
    assert not pools
    monkeypatch.setattr(matcher, "_OBJECTS_FOR_THREADS", 40)
    for one, other in zip(alone, match_layers(layers, targets, LossConfig()), strict=True):
        assert torch.equal(one.query, other.query) and torch.equal(one.target, other.target)
    assert pools == [3]
