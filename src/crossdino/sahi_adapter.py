"""A Cross-DINO model for SAHI (https://github.com/obss/sahi): its slicing, its merging, our detector.

The boxes reach SAHI as floats and in float they come out, unlike those of some of its own models. Here, unlike there,
`category_remapping` may leave classes out: they keep their numbers. SAHI's way of choosing a device hides all GPUs from
the process where it is told `cpu`; that does not happen here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import supervision as sv
import torch

try:
    from sahi.models.base import DetectionModel
    from sahi.prediction import ObjectPrediction
except ImportError as error:
    raise ImportError(f"the adapter for SAHI needs SAHI ({error}): pip install 'crossdino[sahi]'") from None

from crossdino.checkpoints import load_model
from crossdino.errors import InputError
from crossdino.predictor import Predictor


class CrossDINODetectionModel(DetectionModel):
    """What `sahi.predict.get_prediction` and `get_sliced_prediction` want as `detection_model`.

    Slices are looked at whole, whatever tiles the model was trained on: SAHI is the one that cuts. With its argument
    `batch_size` slices go through the network together.
    """

    def __init__(
        self,
        model_path: str | None = None,
        model: Any | None = None,
        device: str | None = None,
        confidence_threshold: float = 0.3,
        category_mapping: Mapping[str, str] | None = None,
        category_remapping: Mapping[str, int] | None = None,
        load_at_init: bool = True,
        image_size: int | None = None,
        **others: Any,
    ) -> None:
        """Load the model, or take one over.

        Args:
            model_path: a model folder, or the id of one on the Hugging Face hub.
            model: instead of `model_path`, a `CrossDINO` or a `Predictor` (of which only the model, `num_select` and
                `dtype` are used).
            device: `cpu`, `cuda`, ...; None: a GPU where there is one.
            confidence_threshold: lowest score. SAHI merges boxes itself only where this is at least 0.1.
            category_mapping: class index as a string -> name; None: the model's own names.
            category_remapping: class index as a string -> number in SAHI's results.
            load_at_init: False waits for `load_model()`.
            image_size: short side in pixels that a slice is resized to; None: the model's own setting.
            others: the arguments of SAHI's base class that concern masks or configuration files.

        Raises:
            InputError: neither a path nor a model, or one that cannot be used.
        """
        super().__init__(
            model_path=model_path,
            model=model,
            device=device,
            confidence_threshold=confidence_threshold,
            category_mapping=None if category_mapping is None else dict(category_mapping),
            category_remapping=None if category_remapping is None else dict(category_remapping),
            load_at_init=load_at_init,
            image_size=image_size,
            **others,
        )

    def set_device(self, device: str | None = None) -> None:
        """Choose where to compute, without hiding GPUs from the rest of the program."""
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def load_model(self) -> None:
        """Load `model_path`."""
        if self.model_path is None:
            raise InputError("the SAHI adapter has no model: give model_path (a model folder) or model")
        self.set_model(load_model(self.model_path))

    def set_model(self, model: Any, **_: Any) -> None:
        """Take over a `CrossDINO` or a `Predictor`."""
        given = {"num_select": model.num_select, "dtype": model.dtype} if isinstance(model, Predictor) else {}
        self.model = Predictor(
            model.model if isinstance(model, Predictor) else model,
            # SAHI lets the threshold change from call to call, so it is applied later.
            threshold=0.0,
            short_side=self.image_size,
            tile_size=0,
            device=self.device,
            **given,
        )
        if self.category_mapping is None:
            self.category_mapping = {str(index): str(name) for index, name in enumerate(self.model.class_names)}
        missing = [str(label) for label in range(self.num_categories) if str(label) not in self.category_mapping]
        if missing:
            raise InputError(
                f"category_mapping has no name for class {', '.join(missing)}: give one for each of "
                f"0 to {self.num_categories - 1}, as strings"
            )

    @property
    def num_categories(self) -> int:
        """The number of classes."""
        return len(self.model.class_names)

    @property
    def category_names(self) -> list[str]:
        """The names of the classes, by their numbers."""
        assert self.category_mapping is not None
        return [self.category_mapping[str(label)] for label in range(self.num_categories)]

    @property
    def has_mask(self) -> bool:
        """There are none."""
        return False

    def perform_inference(self, image: np.ndarray) -> None:
        """Detect in one image.

        Args:
            image: (H, W, 3) uint8 in RGB order.
        """
        self.perform_batch_inference([image])

    def perform_batch_inference(self, images: Sequence[np.ndarray]) -> None:
        """Detect in several images, which go through the network together.

        Args:
            images: (H, W, 3) uint8 each, in RGB order.
        """
        if self.model is None:
            raise InputError("the SAHI adapter has no model yet: call load_model()")
        self.model.batch_size = max(1, len(images))
        self._original_predictions = self.model(list(images))

    def _create_object_prediction_list_from_original_predictions(
        self,
        shift_amount_list: Sequence[Any] | None = None,
        full_shape_list: Sequence[Any] | None = None,
    ) -> None:
        """Hand over what was found in SAHI's form.

        Args:
            shift_amount_list: (x, y) of each slice in the image in pixels, or of the only one.
            full_shape_list: height and width of the image, for each slice or for the only one.
        """
        found: list[sv.Detections] = self._original_predictions
        shifts = _for_each(shift_amount_list, len(found)) or [[0, 0]] * len(found)
        shapes = _for_each(full_shape_list, len(found)) or [None] * len(found)
        self._object_prediction_list_per_image = [
            self._object_predictions(*each) for each in zip(found, shifts, shapes, strict=True)
        ]

    def _object_predictions(
        self, detections: sv.Detections, shift: Sequence[float], shape: Sequence[float] | None
    ) -> list[ObjectPrediction]:
        assert detections.confidence is not None and detections.class_id is not None, "a Predictor sets both"
        boxes = detections.xyxy.astype(np.float64)
        # SAHI wants boxes that have an area, and refuses others loudly.
        wanted = (detections.confidence >= self.confidence_threshold) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        names = self.category_names
        return [
            ObjectPrediction(
                bbox=box,
                category_id=label,
                category_name=names[label],
                score=score,
                shift_amount=[int(value) for value in shift],
                full_shape=None if shape is None else [int(value) for value in shape],
            )
            for box, label, score in zip(
                boxes[wanted].tolist(),
                detections.class_id[wanted].tolist(),
                detections.confidence[wanted].astype(np.float64).tolist(),
                strict=True,
            )
        ]

    def _apply_category_remapping(self) -> None:
        """Renumber the classes that `category_remapping` names; the others keep their numbers."""
        mapping = self.category_remapping or {}
        for predictions in self._object_prediction_list_per_image or []:
            for prediction in predictions:
                category = prediction.category
                prediction.category = type(category)(mapping.get(str(category.id), category.id), category.name)


def _for_each(given: Sequence[Any] | None, count: int) -> list[Any] | None:
    """What SAHI says of one image, or of each of several."""
    if given is None or len(given) == 0:
        return None
    return list(given) if isinstance(given[0], (list, tuple, np.ndarray)) else [given] * count
