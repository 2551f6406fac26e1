"""What tests of the data room share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each test has a cache of its own, and none touches the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CROSSDINO_CACHE", str(folder))
    return folder
