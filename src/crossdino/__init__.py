"""Cross-DINO: an open detector for small objects.

The public names are looked up when they are first used, so that importing the package is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossdino.config import Config, with_changes
    from crossdino.data import load_dataset
    from crossdino.data.inspection import inspect_dataset
    from crossdino.errors import InputError
    from crossdino.evaluation.average_precision import evaluate_detections
    from crossdino.evaluation.comparison import compare_detections
    from crossdino.evaluation.protocols import evaluate_protocol
    from crossdino.models.backbones import StripMLPBackbone, StripMLPClassifier
    from crossdino.models.detector import CrossDINO
    from crossdino.planner import propose
    from crossdino.predictor import Predictor
    from crossdino.preparation import prepare_benchmark
    from crossdino.recipes import recipe
    from crossdino.training import train

_ROOMS = {
    "Config": "config",
    "CrossDINO": "models.detector",
    "InputError": "errors",
    "Predictor": "predictor",
    "StripMLPBackbone": "models.backbones",
    "StripMLPClassifier": "models.backbones",
    "compare_detections": "evaluation.comparison",
    "evaluate_detections": "evaluation.average_precision",
    "evaluate_protocol": "evaluation.protocols",
    "inspect_dataset": "data.inspection",
    "load_dataset": "data",
    "prepare_benchmark": "preparation",
    "propose": "planner",
    "recipe": "recipes",
    "train": "training",
    "with_changes": "config",
}

__all__ = [
    "Config",
    "CrossDINO",
    "InputError",
    "Predictor",
    "StripMLPBackbone",
    "StripMLPClassifier",
    "compare_detections",
    "evaluate_detections",
    "evaluate_protocol",
    "inspect_dataset",
    "load_dataset",
    "prepare_benchmark",
    "propose",
    "recipe",
    "train",
    "with_changes",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'crossdino' has no attribute '{name}'")
    return getattr(import_module(f"crossdino.{_ROOMS[name]}"), name)
