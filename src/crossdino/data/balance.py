"""Repeat-factor sampling: images (or tiles) of rare classes come more than once in an epoch.

Source: Section 5 of "LVIS: A Dataset for Large Vocabulary Instance Segmentation". A class c that the share f(c) of the
items shows has the factor r(c) = max(1, sqrt(t / f(c))), an item the largest factor of its classes. Where we differ: an
epoch has the same length every time (a training that is resumed counts on it). So the factors are changed by the little
that makes their sum a whole number, and fractions are drawn by systematic sampling, whose sum is fixed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RepeatFactors:
    """How often the N items of an epoch are taken.

    Attributes:
        factors: (N,) how often each is taken on average, at least 1; their sum is a whole number.
        classes: (K,) factor of each class; 1 for those that no item shows.
        length: items of an epoch.
    """

    factors: Floats
    classes: Floats
    length: int

    def draw(self, generator: np.random.Generator) -> Ints:
        """(length,) the items of an epoch, ascending; each is there as often as its factor, rounded up or down."""
        order = generator.permutation(len(self.factors))  # so that neighbours do not exclude each other
        above = self.length - len(self.factors)
        extra = np.zeros(len(self.factors), np.int64)
        if above:
            ends = np.cumsum(self.factors[order] - 1)
            points = (generator.random() + np.arange(above)) * (ends[-1] / above)
            extra[order] = np.diff(np.searchsorted(points, ends), prepend=0)
        return np.repeat(np.arange(len(self.factors)), 1 + extra)


def repeat_factors(item_of: Ints, labels: Ints, num_items: int, num_classes: int, threshold: float) -> RepeatFactors:
    """The factors of N items.

    Args:
        item_of: (n,) the item that shows an object; an object that several items show comes once for each.
        labels: (n,) its class in [0, K).
        num_items: N.
        num_classes: K.
        threshold: t, in [0, 1]; a class that at least this share of the items shows is not repeated.

    Returns:
        The factors.
    """
    pairs = np.unique(np.stack([item_of, labels], 1), axis=0) if len(labels) else np.zeros((0, 2), np.int64)
    shown = np.bincount(pairs[:, 1], minlength=num_classes)
    classes = np.maximum(1.0, np.sqrt(threshold * num_items / np.maximum(shown, 1)))
    classes[shown == 0] = 1.0
    factors = np.ones(num_items)
    np.maximum.at(factors, pairs[:, 0], classes[pairs[:, 1]])
    above = float((factors - 1).sum())
    length = num_items + math.ceil(above - 1e-9 * max(num_items, 1))
    if above > 0:
        factors = 1 + (factors - 1) * ((length - num_items) / above)
    return RepeatFactors(factors, classes, length)
