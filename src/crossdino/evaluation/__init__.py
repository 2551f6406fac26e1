"""Measures of detection quality: what a set of detections is worth against a ground truth file."""

from crossdino.evaluation.average_precision import (
    COCO_SIZE_BANDS,
    AveragePrecisionResult,
    BandResult,
    ClassResult,
    evaluate_detections,
    parse_size_bands,
)

__all__ = [
    "COCO_SIZE_BANDS",
    "AveragePrecisionResult",
    "BandResult",
    "ClassResult",
    "evaluate_detections",
    "parse_size_bands",
]
