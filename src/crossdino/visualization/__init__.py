"""Everything that is drawn."""

from __future__ import annotations

from crossdino.visualization.batch import draw_batch
from crossdino.visualization.curves import loss_curves, metric_curves, training_curves
from crossdino.visualization.detections import draw_comparison, draw_detections

__all__ = ["draw_batch", "draw_comparison", "draw_detections", "loss_curves", "metric_curves", "training_curves"]
