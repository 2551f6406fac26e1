"""The summed classification loss and its written-out gradient against the definition, left to autograd."""

import pytest
import torch

from crossdino.losses import boost_loss, classification, focal_loss
from crossdino.losses.classification import classification_loss

NUM, NUM_CLASSES = 37, 5


def draw(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(NUM, NUM_CLASSES, generator=generator)
    labels = torch.randint(-1, NUM_CLASSES, (NUM,), generator=generator)
    sizes = torch.rand(2, NUM, generator=generator)
    ignored = torch.rand(NUM, NUM_CLASSES, generator=generator) < 0.3
    factors = torch.rand(NUM, generator=generator)  # so that no two predictions have the same weight
    return logits, labels, *sizes, ignored, factors


def definition(logits, labels, pred_size, target_size, ignored, **exponents):
    whole = boost_loss(logits, labels, pred_size, target_size, **exponents)
    if ignored is not None:
        is_label = labels[:, None] == torch.arange(NUM_CLASSES)
        whole = torch.where(ignored & ~is_label, 0.0, whole)
    return whole.sum(1)


@pytest.mark.parametrize("with_regions", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 2.5])
@pytest.mark.parametrize("at_once", [1 << 20, 30])  # the latter: six predictions at a time and one over
def test_value_and_gradient_are_the_definitions(monkeypatch, with_regions, gamma, at_once):
    monkeypatch.setattr(classification, "_LOGITS_AT_ONCE", at_once)
    logits, labels, pred_size, target_size, ignored, factors = draw()
    ignored = ignored if with_regions else None
    results = []
    for function in (definition, classification_loss):
        x = logits.clone().requires_grad_()
        losses = function(x, labels, pred_size, target_size, ignored, alpha=0.3, gamma=gamma, beta=0.1)
        (losses * factors).sum().backward()
        results.append((losses.detach(), x.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)  # float32, a few operations


def test_with_sizes_of_one_it_is_the_focal_loss():
    logits, labels, _, _, _, _ = draw(1)
    ones = torch.ones(NUM)
    torch.testing.assert_close(classification_loss(logits, labels, ones, ones), focal_loss(logits, labels).sum(1))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradient_by_finite_differences(gamma):
    logits, labels, _, _, ignored, _ = draw(2)
    x = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: classification._Background.apply(x, labels, ignored, 0.25, gamma), (x,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_lose_nothing_on_the_way(dtype):
    logits, labels, pred_size, target_size, ignored, factors = draw(3)
    half, full = logits.to(dtype).requires_grad_(), logits.to(dtype).float().requires_grad_()
    for x in (half, full):
        # In fp16 the slope of a sure negative would be 0 before the loss is scaled, and is not afterwards.
        (65536.0 * classification_loss(x, labels, pred_size, target_size, ignored) * factors).sum().backward()
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad, full.grad.to(dtype), rtol=0, atol=0)


def test_extreme_logits_and_what_is_not_finite():
    x = torch.tensor([[-200.0, 200.0], [300.0, -300.0], [0.0, float("nan")]], requires_grad=True)
    sizes = torch.full((3,), 0.1)
    losses = classification_loss(x, torch.tensor([0, -1, -1]), sizes, sizes, beta=0.05, gamma=0.5)
    assert torch.isfinite(losses[:2]).all() and losses[2].isnan()
    losses[:2].sum().backward()
    assert torch.isfinite(x.grad[:2]).all()
    hidden = torch.tensor([[False, False], [False, False], [False, True]])
    assert torch.isfinite(classification_loss(x.detach(), torch.tensor([0, -1, -1]), sizes, sizes, hidden)).all()


def test_one_tensor_is_kept_for_the_backward_pass():
    kept = []
    logits, labels, pred_size, target_size, ignored, _ = draw(4)
    x = (2 * logits).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        classification_loss(x, labels, pred_size, target_size, ignored).sum()
    assert sum(number >= x.numel() for number in kept) == 1
