"""Repeat factors against the paper's formula on a hand-made long tail, and epochs that draw them."""

from __future__ import annotations

import numpy as np
import pytest

from crossdino.data.balance import repeat_factors

# 100 items: all show class 0, 25 show class 1, 4 show class 2 (of which 2 show class 1 too), nothing shows class 3.
ITEMS = np.array([*range(100), *range(25), *range(23, 27), 0, 0])
LABELS = np.array([0] * 100 + [1] * 25 + [2] * 4 + [0, 0])


def test_factors_follow_the_formula() -> None:
    found = repeat_factors(ITEMS, LABELS, 100, 4, threshold=0.36)
    # sqrt(0.36 / 1) < 1; sqrt(0.36 / 0.25) = 1.2; sqrt(0.36 / 0.04) = 3.
    np.testing.assert_allclose(found.classes, [1, 1.2, 3, 1])
    expected = np.ones(100)
    expected[:25], expected[23:27] = 1.2, 3.0
    # 23 x 0.2 + 4 x 2 = 12.6 more than 100: 113 items, and what is above 1 grows by 13 / 12.6.
    assert found.length == 113
    np.testing.assert_allclose(found.factors, 1 + (expected - 1) * 13 / 12.6)
    assert found.factors.sum() == pytest.approx(113)


def test_epochs_take_each_item_as_often_as_its_factor() -> None:
    found = repeat_factors(ITEMS, LABELS, 100, 4, threshold=0.36)
    epochs = 4000
    counts = np.zeros((epochs, 100), np.int64)
    for epoch in range(epochs):
        drawn = found.draw(np.random.default_rng((7, epoch)))
        assert len(drawn) == 113 and (np.diff(drawn) >= 0).all()
        counts[epoch] = np.bincount(drawn, minlength=100)
    assert (counts >= np.floor(found.factors)).all() and (counts <= np.ceil(found.factors)).all()
    # A mean of 4000 draws of 0 or 1 has a standard deviation of at most 0.008.
    np.testing.assert_allclose(counts.mean(0), found.factors, atol=0.04)
    # Neighbours in the data are not tied to each other: of the 23 items of class 1 all pairs come together at times.
    extra = counts[:, :23] - 1
    together = extra.T @ extra
    assert together.min() > 0


@pytest.mark.parametrize("threshold", [0.0, 0.04])
def test_nothing_is_repeated_where_every_class_is_frequent_enough(threshold: float) -> None:
    found = repeat_factors(ITEMS, LABELS, 100, 4, threshold)
    assert found.length == 100 and (found.classes == 1).all()
    assert found.draw(np.random.default_rng(0)).tolist() == list(range(100))


def test_no_items_and_no_objects() -> None:
    none = np.zeros(0, np.int64)
    assert repeat_factors(none, none, 0, 3, 0.5).draw(np.random.default_rng(0)).tolist() == []
    assert repeat_factors(none, none, 4, 3, 0.5).draw(np.random.default_rng(0)).tolist() == [0, 1, 2, 3]


def test_factors_of_whole_numbers_are_exact() -> None:
    """One item in 16 shows the rare class: sqrt(1 / (1 / 16)) = 4 times in every epoch."""
    found = repeat_factors(np.array([*range(16), 5]), np.array([0] * 16 + [1]), 16, 2, threshold=1.0)
    assert found.length == 19
    for epoch in range(20):
        assert np.bincount(found.draw(np.random.default_rng(epoch))).tolist() == [1] * 5 + [4] + [1] * 10
