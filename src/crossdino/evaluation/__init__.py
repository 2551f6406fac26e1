"""Measures of detection quality: what a set of detections is worth against a ground truth file."""

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

__all__ = [
    "COCO_SIZE_BANDS",
    "AveragePrecisionResult",
    "BandResult",
    "Calibration",
    "CalibrationReport",
    "ClassResult",
    "calibrate_detections",
    "evaluate_detections",
    "parse_size_bands",
]
