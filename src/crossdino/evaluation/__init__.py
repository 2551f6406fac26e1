"""Measures of detection quality: what a set of detections is worth against a ground truth file.

The names are looked up when they are first used: only calibration needs torch, and a file of detections is measured
before that is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossdino.evaluation.average_precision import (
        COCO_SIZE_BANDS,
        AveragePrecisionResult,
        BandResult,
        ClassResult,
        evaluate_detections,
        parse_size_bands,
    )
    from crossdino.evaluation.calibration import Calibration
    from crossdino.evaluation.calibration_report import CalibrationReport, calibrate_detections
    from crossdino.evaluation.protocol_result import ProtocolResult
    from crossdino.evaluation.protocols import PROTOCOLS, evaluate_protocol
    from crossdino.evaluation.sodad import merge_patches

_PLACES = {
    "COCO_SIZE_BANDS": "average_precision",
    "PROTOCOLS": "protocols",
    "AveragePrecisionResult": "average_precision",
    "BandResult": "average_precision",
    "Calibration": "calibration",
    "CalibrationReport": "calibration_report",
    "ClassResult": "average_precision",
    "ProtocolResult": "protocol_result",
    "calibrate_detections": "calibration_report",
    "evaluate_detections": "average_precision",
    "evaluate_protocol": "protocols",
    "merge_patches": "sodad",
    "parse_size_bands": "average_precision",
}

__all__ = [
    "COCO_SIZE_BANDS",
    "PROTOCOLS",
    "AveragePrecisionResult",
    "BandResult",
    "Calibration",
    "CalibrationReport",
    "ClassResult",
    "ProtocolResult",
    "calibrate_detections",
    "evaluate_detections",
    "evaluate_protocol",
    "merge_patches",
    "parse_size_bands",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'crossdino.evaluation' has no attribute '{name}'")
    return getattr(import_module(f"crossdino.evaluation.{_PLACES[name]}"), name)
