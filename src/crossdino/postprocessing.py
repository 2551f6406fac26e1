"""From the network's output to boxes in pixels.

The path of the boxes is DINO's (Section 3.1 of the DINO paper; the Cross-DINO paper keeps it): sigmoid, the best
`num_select` (query, class) pairs, one conversion from normalised cxcywh to absolute xyxy. There is no non-maximum
suppression. Boxes stay float32 from the model to the caller: rounding a perfect 8 px box to whole pixels costs a fifth
of its IoU.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import supervision as sv
from torch import Tensor, cat, int64, tensor
from torchvision.ops import box_convert

from crossdino.structures import DetectorOutput

Found = tuple[Tensor, Tensor, Tensor]
"""Boxes (n, 4) absolute xyxy, scores (n,) and labels (n,) of an image or of a tile."""


def select_detections(
    output: DetectorOutput, original_hw: Sequence[tuple[int, int]], num_select: int, threshold: float = 0.0
) -> list[Found]:
    """The best (query, class) pairs of every image, in absolute pixels.

    Args:
        output: the detector's output, boxes as normalised cxcywh of the unpadded image.
        original_hw: height and width in pixels of each of the N original images.
        num_select: pairs kept per image; more than Q x K keeps all.
        threshold: pairs with a lower score are left out; in [0, 1].

    Returns:
        For every image, on the CPU and by descending score: boxes (n, 4) float32 absolute xyxy, clipped to the image;
        scores (n,) float32; labels (n,) int64.
    """
    scores = output.pred_logits.detach().float().sigmoid()
    num_queries, num_classes = scores.shape[1:]
    scores, places = scores.flatten(1).topk(min(num_select, num_queries * num_classes), dim=1)
    labels = places % num_classes
    queries = (places // num_classes).unsqueeze(-1).expand(-1, -1, 4)
    boxes = box_convert(output.pred_boxes.detach().float().gather(1, queries), "cxcywh", "xyxy")
    sizes = tensor([[width, height, width, height] for height, width in original_hw], device=boxes.device)
    boxes = boxes.clamp(0, 1) * sizes[:, None]
    # One transfer from the device for all; float32 holds labels up to 2^24 as they are.
    rows = cat((boxes, scores[..., None], labels[..., None].float()), dim=2).cpu()
    found = [some[some[:, 4] >= threshold] for some in rows]
    return [(some[:, :4].contiguous(), some[:, 4].contiguous(), some[:, 5].to(int64)) for some in found]


def detections_to_coco(
    detections: sv.Detections, image_id: int, category_ids: Sequence[int]
) -> list[dict[str, int | float | list[float]]]:
    """Write detections as COCO results.

    Args:
        detections: what a `Predictor` returned for the image.
        image_id: the image's id in the ground truth.
        category_ids: the ground truth's category id of every class index.

    Returns:
        A dictionary a detection: `image_id`, `category_id`, `bbox` (x, y, width, height in pixels, to 0.0001 px) and
        `score` (to 1e-8).
    """
    if len(detections) == 0:
        return []
    assert detections.confidence is not None and detections.class_id is not None, "a Predictor sets both"
    boxes = detections.xyxy.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {
            "image_id": int(image_id),
            "category_id": int(category_ids[label]),
            "bbox": [round(value, 4) for value in box],
            "score": round(score, 8),
        }
        for box, score, label in zip(
            boxes.tolist(),
            detections.confidence.astype(np.float64).tolist(),
            detections.class_id.tolist(),
            strict=True,
        )
    ]
