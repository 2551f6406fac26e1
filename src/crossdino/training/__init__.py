"""The one training loop and what belongs to it."""

from __future__ import annotations

from crossdino.training.evaluation import detect_dataset
from crossdino.training.failures import TrainingInterrupted, replay_failure
from crossdino.training.loop import TrainingResult, train
from crossdino.training.setup import show_batch

__all__ = ["TrainingInterrupted", "TrainingResult", "detect_dataset", "replay_failure", "show_batch", "train"]
