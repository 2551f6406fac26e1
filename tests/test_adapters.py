"""The predictor inside supervision's InferenceSlicer and inside SAHI, around a stand-in that finds bright pixels."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import supervision as sv
import torch
from sahi.predict import get_prediction, get_sliced_prediction
from torch import Tensor, nn

from crossdino.config import InferenceConfig, ModelConfig
from crossdino.errors import InputError
from crossdino.predictor import Predictor
from crossdino.sahi_adapter import CrossDINODetectionModel
from crossdino.structures import DetectorOutput

# (left, top, right, bottom, colour): at half pixels nothing is drawn, so edges are whole, but centres are not.
OBJECTS = [(20, 30, 29, 35, 0), (150, 40, 158, 51, 1), (61, 140, 70, 149, 0), (180, 170, 193, 180, 1)]


class Finder(nn.Module):
    """Finds at most one red rectangle (class 0) and one blue one (class 1) in a black image."""

    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.config = ModelConfig(class_names=("red", "blue"), num_queries=2)
        self.inference = InferenceConfig(short_side=96, long_side=96, num_select=4, tile_size=32, tile_overlap=8)
        self.calibration = None
        self.batches: list[int] = []

    def forward(self, images: Tensor, padding_mask: Tensor) -> DetectorOutput:
        self.batches.append(len(images))
        logits = torch.full((len(images), 2, 2), -30.0)
        boxes = torch.full((len(images), 2, 4), 0.5)
        for image in range(len(images)):
            height, width = int((~padding_mask[image, :, 0]).sum()), int((~padding_mask[image, 0]).sum())
            for query, channel in enumerate((0, 2)):
                rows, columns = (images[image, channel, :height, :width] > 0.5).nonzero().unbind(1)
                if len(rows):
                    left, right = columns.min() / width, (columns.max() + 1) / width
                    top, bottom = rows.min() / height, (rows.max() + 1) / height
                    boxes[image, query] = torch.stack(
                        [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
                    )
                    logits[image, query, query] = 1.0
        return DetectorOutput(logits, boxes)


@pytest.fixture
def image() -> np.ndarray:
    """(H, W, 3) in RGB."""
    pixels = np.zeros((200, 210, 3), dtype=np.uint8)
    for left, top, right, bottom, kind in OBJECTS:
        pixels[top:bottom, left:right, 2 * kind] = 255
    return pixels


def found(detections: sv.Detections) -> list[tuple[float, ...]]:
    assert detections.class_id is not None
    rows = [(*map(float, box), int(label)) for box, label in zip(detections.xyxy, detections.class_id, strict=True)]
    return sorted(rows)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_inference_slicer(image: np.ndarray, threads: int, order: str) -> None:
    predictor = Predictor(Finder(), threshold=0.5, tile_size=0, channel_order=order)  # type: ignore[arg-type]
    slicer = sv.InferenceSlicer(predictor, slice_wh=96, overlap_wh=24, thread_workers=threads)
    detections = slicer(image if order == "rgb" else image[..., ::-1].copy())
    # slices of 96 px at 96 px: the stand-in is exact, most slices are empty
    np.testing.assert_allclose(found(detections), sorted(OBJECTS), atol=1e-3)
    assert sorted(detections.data["class_name"].tolist()) == ["blue", "blue", "red", "red"]
    own = Predictor(Finder(), threshold=0.5, tile_size=96, tile_overlap=24)(image)
    np.testing.assert_allclose(found(detections), found(own), atol=1e-3)


def test_inference_slicer_with_batches_and_with_nothing_to_find(image: np.ndarray) -> None:
    model = Finder()
    predictor = Predictor(model, threshold=0.5, tile_size=0, batch_size=4)
    detections = sv.InferenceSlicer(predictor, slice_wh=96, overlap_wh=24, batch_size=4)(image)
    np.testing.assert_allclose(found(detections), sorted(OBJECTS), atol=1e-3)
    assert max(model.batches) == 4
    nothing = sv.InferenceSlicer(predictor, slice_wh=96, overlap_wh=24, batch_size=4)(np.zeros_like(image))
    assert len(nothing) == 0


def test_wrong_colours_are_another_class(image: np.ndarray) -> None:
    swapped = Predictor(Finder(), threshold=0.5, tile_size=96, tile_overlap=24, channel_order="bgr")(image)
    assert found(swapped) != found(Predictor(Finder(), threshold=0.5, tile_size=96, tile_overlap=24)(image))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_sahi_slices(image: np.ndarray, batch_size: int) -> None:
    model = Finder()
    adapter = CrossDINODetectionModel(model=model, device="cpu", confidence_threshold=0.5)
    result = get_sliced_prediction(
        image,
        adapter,
        slice_height=96,
        slice_width=96,
        overlap_height_ratio=0.25,
        overlap_width_ratio=0.25,
        perform_standard_pred=False,
        batch_size=batch_size,
        verbose=0,
    )
    predictions = result.object_prediction_list
    boxes = sorted((*each.bbox.to_xyxy(), each.category.id) for each in predictions)
    np.testing.assert_allclose(boxes, sorted(OBJECTS), atol=1e-3)
    assert {(each.category.id, each.category.name) for each in predictions} == {(0, "red"), (1, "blue")}
    assert max(model.batches) == batch_size
    assert all(isinstance(each.score.value, float) for each in predictions)


def test_sahi_keeps_fractions_of_pixels(image: np.ndarray) -> None:
    # 200 px at 96 px: edges lie where the resized image has them
    adapter = CrossDINODetectionModel(model=Finder(), device="cpu", confidence_threshold=0.5)
    ours = Predictor(Finder(), threshold=0.5, tile_size=0)(image)
    predictions = get_prediction(image, adapter).object_prediction_list
    boxes = sorted((*each.bbox.to_xyxy(), each.category.id) for each in predictions)
    assert boxes == found(ours)
    assert any(value != round(value) for box in boxes for value in box)


def test_sahi_settings(image: np.ndarray) -> None:
    adapter = CrossDINODetectionModel(
        model=Predictor(Finder(), threshold=0.9, num_select=3, tile_size=32),
        device="cpu",
        confidence_threshold=0.8,  # the stand-in's score is sigmoid(1) = 0.731
        category_mapping={"0": "rouge", "1": "bleu"},
        category_remapping={"1": 7},
        image_size=64,
    )
    assert get_prediction(image, adapter).object_prediction_list == []
    lower = get_prediction(image, adapter, confidence_threshold=0.7).object_prediction_list
    assert {(each.category.id, each.category.name) for each in lower} == {(0, "rouge"), (7, "bleu")}
    assert adapter.confidence_threshold == 0.8
    assert (adapter.model.short_side, adapter.model.num_select, adapter.num_categories) == (64, 3, 2)
    assert adapter.category_names == ["rouge", "bleu"]
    assert not adapter.has_mask


def test_sahi_mistakes() -> None:
    with pytest.raises(InputError, match="model_path"):
        CrossDINODetectionModel(device="cpu")
    with pytest.raises(InputError, match="class 1"):
        CrossDINODetectionModel(model=Finder(), device="cpu", category_mapping={"0": "red"})
    with pytest.raises(InputError, match="no model folder"):
        CrossDINODetectionModel("nowhere/", device="cpu")
    waiting = CrossDINODetectionModel("nowhere/", device="cpu", load_at_init=False)
    with pytest.raises(InputError, match="load_model"):
        waiting.perform_inference(np.zeros((8, 8, 3), dtype=np.uint8))


def test_a_cpu_adapter_hides_no_gpu() -> None:
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    CrossDINODetectionModel(model=Finder(), device="cpu")
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_crossdino_needs_neither_sahi_nor_ray() -> None:
    code = "import sys, crossdino, crossdino.predictor; sys.exit(bool({'sahi', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
