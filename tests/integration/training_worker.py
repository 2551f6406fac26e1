"""Run by the tests in processes of their own: a training, with one thing made to go wrong or watched.

python training_worker.py CONFIG.yaml [--resume] [--WHAT ARGUMENT]
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from crossdino.config import from_dict, read_yaml
from crossdino.errors import InputError
from crossdino.training import TrainingInterrupted, evaluation, train

torch.set_num_threads(1)


def die_while_saving(number: int) -> None:
    """kill -9 in the middle of writing checkpoint `number`."""
    original = torch.save

    def save(content: Any, path: Path) -> None:
        nonlocal number
        number -= 1
        original(content, path)
        if number == 0:
            path.write_bytes(path.read_bytes()[:1000])
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


def die_while_renaming(number: int) -> None:
    """kill -9 when the old `last/` is moved away and the new one is not yet there, at checkpoint `number`."""
    original = os.rename

    def rename(source: Path, target: Path) -> None:
        nonlocal number
        original(source, target)
        if source.name == "last":
            number -= 1
            if number == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    os.rename = rename


def keep_detections(path: str) -> None:
    """Write the detections that the main process measures."""
    original = evaluation.average_precision

    def average_precision(config: Any, index: Any, detections: list[dict[str, Any]]) -> Any:
        Path(path).write_text(json.dumps(detections))
        return original(config, index, detections)

    evaluation.average_precision = average_precision


def main() -> int:
    words = sys.argv[2:]
    for name, prepare in (
        ("--die-while-saving", lambda text: die_while_saving(int(text))),
        ("--die-while-renaming", lambda text: die_while_renaming(int(text))),
        ("--keep-detections", keep_detections),
    ):
        if name in words:
            prepare(words[words.index(name) + 1])
    try:
        train(from_dict(read_yaml(sys.argv[1])), resume="--resume" in words)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingInterrupted as interruption:
        print(f"interrupted: {interruption}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
