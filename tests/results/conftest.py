"""Made-up pictures with objects."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from crossdino.results import JournalHeader, PictureResult
from crossdino.sources import Georeference

MakeResult = Callable[..., PictureResult]


@pytest.fixture
def make_result() -> MakeResult:
    """Pictures of 200 x 100 px with objects of random places, classes and scores."""
    rng = np.random.default_rng(5)

    def make(
        name: str,
        count: int = 3,
        frame: int | None = None,
        place: Georeference | None = None,
        stem: str = "",
        picture: str | None = None,
    ) -> PictureResult:
        corners = rng.uniform(0, 60, (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(2, 40, (count, 2))], axis=1).astype(np.float32)
        scores = np.sort(rng.uniform(0, 1, count).astype(np.float32))[::-1].copy()
        labels = rng.integers(0, 3, count)
        seconds = None if frame is None else frame / 25
        return PictureResult(
            *(name, 200, 100, boxes, scores, labels, frame, seconds, place), picture=picture, stem=stem
        )

    return make


@pytest.fixture
def header() -> JournalHeader:
    """Of a run with three classes, one with a difficult name."""
    return JournalHeader(
        {"threshold": 0.3, "tiles": {"size": 800, "overlap": 64}}, ["car", 'a "b", ö', "船"], [3, 7, 9]
    )
