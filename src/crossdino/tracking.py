"""Sends losses and metrics to experiment trackers: TensorBoard, Weights & Biases, MLflow, trackio.

The services are spoken to through accelerate's tracker classes. What is ours: names that all services accept, a
resumed training that goes on in the same run, and a service that fails while training is dropped, not the training.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from crossdino.errors import InputError
from crossdino.writing import written_whole

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
# Which runs a training writes to, so that a resumed one finds them again.
RUNS_FILE = "trackers.json"
_PROJECT = "crossdino"


class Trackers:
    """The trackers of one training; without any it does nothing.

    Args:
        trackers: started ones.
    """

    def __init__(self, trackers: Sequence[GeneralTracker]) -> None:
        self._trackers = list(trackers)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send numbers to all trackers.

        Args:
            values: name -> number; None is left out. In names everything but letters, digits and `_-./` becomes `_`.
            step: updates made; must not fall.
        """
        numbers = {re.sub(r"[^\w./-]", "_", name): float(v) for name, v in values.items() if v is not None}
        self._each("log", numbers, step=step)

    def finish(self) -> None:
        """Send what is left and close; nothing can be logged afterwards."""
        self._each("finish")
        self._trackers = []

    def _each(self, method: str, *arguments: Any, **options: Any) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, method)(*arguments, **options)
            except Exception as error:  # whatever a service or the network comes up with: training goes on
                self._trackers.remove(tracker)
                name = tracker.name  # type: ignore[attr-defined]  # every kind has one
                warnings.warn(
                    f"{name} failed ({_reason(error)}); the training goes on without it, log.jsonl has everything",
                    RuntimeWarning,
                    stacklevel=3,
                )


def check_trackers(names: Sequence[str]) -> None:
    """Refuse names of trackers that are unknown or not installed, without starting one.

    Raises:
        InputError: if so.
    """
    for name in names:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"training.trackers: {name!r} is unknown; {hint}known are {', '.join(TRACKERS)}")
        if not _installed(name):
            package = name if name == "tensorboard" else f"crossdino[{name}]"
            raise InputError(
                f"training.trackers: {name} is not installed: pip install '{package}', or leave it out of "
                "training.trackers"
            )


def start_trackers(
    names: Sequence[str], folder: Path, run_name: str, settings: Mapping[str, Any], step: int = 0
) -> Trackers:
    """Start trackers by name, in the main process only.

    TensorBoard writes to `folder/tensorboard`; the others go where their own environment variables or log-in say
    (WANDB_PROJECT, MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID ...), to the project `crossdino` where nothing is said.

    Args:
        names: of `TRACKERS`; a name that comes twice counts once.
        folder: the training's folder.
        run_name: what the run is called.
        settings: the configuration, nested; stored with a new run.
        step: updates made before. Above 0 the runs that `folder` remembers are continued, and TensorBoard forgets what
            it was told of later steps.

    Raises:
        InputError: for an unknown name, a package that is missing, and a tracker that cannot start a new run.
    """
    check_trackers(names)
    PartialState()  # accelerate's trackers ask it which process they are in
    runs = _remembered(folder) if step > 0 else {}
    started: list[GeneralTracker] = []
    for name in dict.fromkeys(names):
        try:
            tracker = _tracker(name, folder, run_name, runs, step)
            tracker.start()
            if step == 0:
                _store_settings(tracker, settings)
        except Exception as error:
            if step == 0:
                Trackers(started).finish()
                raise InputError(
                    f"training.trackers: {name} cannot start ({_reason(error)}); mend that or leave {name} out"
                ) from error
            # The training is under way, and may be resumed by a machine while nobody looks.
            warnings.warn(f"{name} cannot start ({_reason(error)}); resuming without it", RuntimeWarning, stacklevel=2)
            continue
        started.append(tracker)
        if (run := _run_id(tracker)) is not None:
            runs[name] = run
    if runs:
        with written_whole(folder / RUNS_FILE) as partial:
            partial.write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
    return Trackers(started)


def _installed(name: str) -> bool:
    # A mere folder of that name, like the one that W&B leaves where it ran, is found as well; it has no origin.
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


def _tracker(name: str, folder: Path, run_name: str, runs: Mapping[str, str], step: int) -> GeneralTracker:
    known = runs.get(name)
    if name == "tensorboard":
        # What is resumed repeats steps that an interrupted training may have told already.
        return TensorBoardTracker("tensorboard", folder, purge_step=step + 1)
    if name == "wandb":
        again = {"id": known, "resume": "allow"} if known else {}
        return WandBTracker(os.environ.get("WANDB_PROJECT", _PROJECT), name=run_name, dir=str(folder), **again)
    if name == "mlflow":
        # It sends while the training waits: by default for many minutes where a server does not answer.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        return MLflowTracker(_PROJECT, run_id=known, run_name=run_name)
    # trackio finds a run by its name only, so the name must be this training's own.
    run_name = known or f"{run_name} {time.strftime('%Y-%m-%d %H-%M-%S')}"
    return TrackioTracker(_PROJECT, name=run_name, resume="allow", embed=False)


def _store_settings(tracker: GeneralTracker, settings: Mapping[str, Any]) -> None:
    if isinstance(tracker, TensorBoardTracker):  # its own way would add a run to the list of runs
        text = yaml.safe_dump(dict(settings), sort_keys=False)
        tracker.writer.add_text("settings", "\n".join(f"    {line}" for line in text.splitlines()))
    else:
        tracker.store_init_configuration(_flat(settings))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; what is no plain value as text."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def _run_id(tracker: GeneralTracker) -> str | None:
    if isinstance(tracker, WandBTracker):
        return tracker.run.id
    if isinstance(tracker, MLflowTracker):
        return tracker.active_run.info.run_id
    return tracker.init_kwargs["name"] if isinstance(tracker, TrackioTracker) else None


def _remembered(folder: Path) -> dict[str, str]:
    try:
        runs = json.loads((folder / RUNS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no other tracker so far, or a file that somebody has spoilt: new runs
        return {}
    return {str(name): str(run) for name, run in runs.items()} if isinstance(runs, dict) else {}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
