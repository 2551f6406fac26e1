"""Boost loss against the paper's Table IX, torchvision's focal loss, and Eq. 5 written out in plain Python floats."""

import math

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from crossdino.losses.boost import boost_loss, boost_weight, focal_loss

# Table IX (gamma 0.25, p = 1, image 1024): cs_hat -> weights at beta 1, 0.05, 0.1, 0.25. The table's first row comes
# out with its own rounded cs_hat 0.0020 (2/1024 would give 0.7195 at beta 0.05), the others with 8/1024 and 80/1024.
TABLE_IX = {
    0.0020: (0.9995, 0.7189, 0.8248, 0.9423),
    8 / 1024: (0.9980, 0.6813, 0.7874, 0.9156),
    80 / 1024: (0.9799, 0.5882, 0.6888, 0.8286),
}


@pytest.mark.parametrize("cs_hat", TABLE_IX)
def test_table_ix_to_its_printed_digits(cs_hat):
    size = torch.tensor(cs_hat)
    weights = [float(boost_weight(size, torch.tensor(0.0), beta, 0.25)) for beta in (1.0, 0.05, 0.1, 0.25)]
    assert tuple(round(weight, 4) for weight in weights) == TABLE_IX[cs_hat]


def test_relative_distances_of_table_ix():
    def distance(small, large, beta):
        weights = [
            float(boost_weight(torch.tensor(cs_hat), torch.tensor(0.0), beta, 0.25)) for cs_hat in (small, large)
        ]
        rounded = [round(weight, 4) for weight in weights]
        return round(abs(rounded[0] - rounded[1]) / min(rounded), 4)

    assert [distance(0.0020, 8 / 1024, beta) for beta in (1.0, 0.05, 0.1, 0.25)] == [0.0015, 0.0552, 0.0475, 0.0292]
    assert [distance(8 / 1024, 80 / 1024, beta) for beta in (1.0, 0.05, 0.1, 0.25)] == [0.0185, 0.1583, 0.1431, 0.1050]


def one_hot(labels, num_classes):
    return torch.stack([(labels == k).float() for k in range(num_classes)], dim=-1)


@pytest.mark.parametrize("alpha", [0.25, 0.6])
def test_whole_image_box_at_beta_one_is_torchvisions_focal_loss(alpha):
    torch.manual_seed(0)
    logits = torch.randn(2, 30, 5) * 4
    labels = torch.randint(-1, 5, (2, 30))
    expected = sigmoid_focal_loss(logits, one_hot(labels, 5), alpha=alpha, gamma=2.0)
    ones = torch.ones(2, 30)
    ours = boost_loss(logits, labels, ones, ones, alpha=alpha, gamma=2.0, beta=1.0)
    # 1e-6: float32 rounding of two different ways to write the same logarithms.
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(focal_loss(logits, labels, alpha=alpha), expected, atol=1e-6, rtol=1e-5)


def equation_5(logits, label, size_hat, size, alpha, gamma, beta):
    """Eq. 5 for one query, term by term in double precision."""
    losses = []
    for k, x in enumerate(logits):
        p = 1 / (1 + math.exp(-x))
        y = 1.0 if k == label else 0.0
        cs, cs_hat = size * y, size_hat * p
        positive = alpha * (1 - cs_hat**beta) ** gamma * cs**beta * y * math.log(p)
        negative = (1 - alpha) * p**gamma * (1 - y) * math.log(1 - p)
        losses.append(-(positive + negative))
    return losses


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.25, 1.0])
@pytest.mark.parametrize("gamma", [0.25, 2.0])
def test_equation_5(beta, gamma):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, 3, generator=generator) * 3
    labels = torch.randint(-1, 3, (40,), generator=generator)
    size_hat, size = torch.rand(2, 40, generator=generator)
    ours = boost_loss(logits, labels, size_hat, size, alpha=0.25, gamma=gamma, beta=beta)
    expected = [
        equation_5(x.tolist(), int(label), float(a), float(b), 0.25, gamma, beta)
        for x, label, a, b in zip(logits, labels, size_hat, size, strict=True)
    ]
    torch.testing.assert_close(ours, torch.tensor(expected), atol=1e-6, rtol=1e-4)


def test_gradient_is_that_of_equation_5_with_constant_size():
    x = torch.tensor([[0.3, -1.2]], requires_grad=True)
    size_hat = torch.tensor([0.04], requires_grad=True)
    boost_loss(x, torch.tensor([0]), size_hat, torch.tensor([0.05]), beta=0.1).sum().backward()
    step = 1e-4
    for k in range(2):
        moved = [[0.3, -1.2], [0.3, -1.2]]
        moved[0][k] += step
        moved[1][k] -= step
        high, low = (sum(equation_5(m, 0, 0.04, 0.05, 0.25, 2.0, 0.1)) for m in moved)
        assert float(x.grad[0, k]) == pytest.approx((high - low) / (2 * step), rel=1e-3)
    assert size_hat.grad is None  # the predicted size is a constant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0.05, 1.0])
@pytest.mark.parametrize("gamma", [0.25, 2.0])
def test_finite_at_the_ends(dtype, beta, gamma):
    logits = torch.tensor([[-100.0], [-30.0], [0.0], [30.0], [100.0]], dtype=dtype).repeat(3, 1).requires_grad_()
    labels = torch.tensor([0, 0, 0, 0, 0, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0])
    sizes = torch.tensor([0.0] * 10 + [1.0] * 5)
    loss = boost_loss(logits, labels, sizes, sizes, beta=beta, gamma=gamma)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logits.grad).all()
    assert (loss >= 0).all()


def test_small_beta_orders_small_before_large_and_beta_one_does_not():
    """The prose's ordering holds for small beta only; both facts of the formula are fixed here."""
    labels = torch.tensor([0, 0])
    sizes = torch.tensor([8 / 1024, 300 / 1024])
    likely = torch.full((2, 1), 3.0)
    small, large = boost_loss(likely, labels, sizes, sizes, beta=0.05)[:, 0]
    assert small > large
    unlikely = torch.full((2, 1), -2.0)
    small, large = boost_loss(unlikely, labels, sizes, sizes, beta=1.0)[:, 0]
    assert small < large
