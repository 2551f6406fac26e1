"""Where a result comes from: the code's revision, the command, the data and the settings, as plain JSON values.

Two numbers can be compared when these agree; `crossdino report` reads them beside the numbers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from crossdino.config import InferenceConfig, read_yaml
from crossdino.errors import InputError
from crossdino.writing import write_whole

PROVENANCE_FILE = "provenance.json"

_PACKAGE = Path(__file__).resolve().parent
_GIT_SECONDS = 10.0


class _Model(Protocol):
    @property
    def inference(self) -> InferenceConfig: ...


class _Look(Protocol):
    @property
    def num_select(self) -> int: ...

    @property
    def tile_size(self) -> int: ...


def provenance(
    *,
    ground_truth: str | Path | None = None,
    split: str | None = None,
    benchmark: str | None = None,
    predictions: str | Path | None = None,
    weights: str | Path | None = None,
    model: _Model | None = None,
    look: _Look | None = None,
) -> dict[str, Any]:
    """Where the numbers of an evaluation come from; what is not known is None.

    Args:
        ground_truth: what the detections were measured against.
        split: its official name, such as `test-dev`.
        benchmark: of `crossdino.benchmarks`.
        predictions: the file of detections.
        weights: the model that made them: a folder or a hub id. Its name, its recipe, its epochs and the code that
            trained it are read from the folder, or from the training that it lies in.
        model: the same, loaded, for the size of its input.
        look: how it looked at the images.
    """
    trained = _of_training(weights)
    return {
        **code(),
        "ground_truth": _text(ground_truth),
        "split": split,
        "benchmark": benchmark,
        "predictions": _text(predictions),
        "weights": _text(weights),
        **trained,
        "short_side": None if model is None else model.inference.short_side,
        "long_side": None if model is None else model.inference.long_side,
        "num_select": None if look is None else look.num_select,
        "tile_size": None if look is None else look.tile_size,
    }


def code() -> dict[str, Any]:
    """The version and the git revision of this code, the date (UTC), and the command."""
    try:
        installed = version("crossdino")
    except PackageNotFoundError:  # run from a checkout that is not installed
        installed = None
    revision, dirty = git_revision()
    return {
        "crossdino": installed,
        "git": revision,
        "git_dirty": dirty,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


@lru_cache(maxsize=1)
def git_revision() -> tuple[str | None, bool | None]:
    """The commit of the checkout that this package runs from, and whether the package's files differ from it.

    Both are None where the package was installed without its repository, or where there is no git.
    """
    # A package that was installed into somebody else's repository is no part of it: git does not track its files.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    revision, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", ".")
    return revision, None if changes is None else changes != ""


def record_training(folder: Path, *, resumed: bool, recipe: str | None = None) -> None:
    """Write into a training's folder which code trains it, and after which recipe, whatever the training is called.

    The file keeps what the training began with; every continuation is noted in its list `resumed`.
    """
    path = folder / PROVENANCE_FILE
    before = _read(path) if resumed else None
    begun = {**code(), "recipe": recipe, "resumed": []}
    content = begun if before is None else {**before, "resumed": [*before["resumed"], code()]}
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())


def training_provenance(folder: Path) -> dict[str, Any] | None:
    """What `record_training` wrote into a training's folder; None where there is nothing, or nothing readable."""
    return _read(folder / PROVENANCE_FILE)


def _of_training(weights: str | Path | None) -> dict[str, Any]:
    """Name, recipe, epochs and revision of the training of a model folder."""
    unknown: dict[str, Any] = {"name": None, "recipe": None, "epochs": None, "training_git": None}
    if weights is None or not Path(weights).is_dir():
        return unknown
    folder = Path(weights)
    own = _read(folder / PROVENANCE_FILE) or _read(folder.resolve().parent / PROVENANCE_FILE) or {}
    try:
        settings = read_yaml(folder / "config.yaml")
    except InputError:  # a converted model has no training
        return unknown
    training = settings.get("training")
    epochs = training.get("epochs") if isinstance(training, Mapping) else None
    name = settings.get("name")
    return {"name": name, "recipe": own.get("recipe") or name, "epochs": epochs, "training_git": own.get("git")}


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {"resumed": [], **content} if isinstance(content, dict) and "git" in content else None


def _git(*words: str) -> str | None:
    """What git says in the package's folder; None if it says nothing, or is not there."""
    # A hook of another repository runs us with these set.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(_PACKAGE), *words],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
