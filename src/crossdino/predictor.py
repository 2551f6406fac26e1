"""From images in any of the usual forms to `supervision.Detections` in pixels of the original image.

The path of the boxes is DINO's post-processing (Section 3.1 of the DINO paper; the Cross-DINO paper keeps it): sigmoid,
the best `num_select` (query, class) pairs, one conversion from normalised cxcywh to absolute xyxy. There is no
non-maximum suppression. Boxes stay float32 from the model to the caller: rounding a perfect 8 px box to whole
pixels costs a fifth of its IoU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import supervision as sv
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_convert

from crossdino.data.dataset import collate
from crossdino.data.images import read_image
from crossdino.data.transforms import normalize, resize_hw, resize_image, to_tensor
from crossdino.errors import InputError
from crossdino.merging import merge_detections
from crossdino.structures import DetectorOutput, Target
from crossdino.tiling import tile_grid, tile_starts

if TYPE_CHECKING:
    from crossdino.models.detector import CrossDINO

ImageInput = str | Path | Image.Image | np.ndarray | Tensor


class Predictor:
    """A trained model, ready to be called on images.

    Images of a batch may have different sizes; every image is resized as the model's `inference` settings say (or as
    given here), padded to the batch's largest, and its boxes come back in its own pixels. A model that was trained on
    tiles sees tiles of the same size, whose detections are merged.
    """

    def __init__(
        self,
        model: CrossDINO,
        *,
        threshold: float = 0.0,
        num_select: int | None = None,
        short_side: int | None = None,
        long_side: int | None = None,
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        device: str | torch.device | None = None,
        batch_size: int = 1,
        precision: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        """Take over a model and put it into evaluation mode.

        Args:
            model: the trained detector.
            threshold: detections with a lower score are left out; in [0, 1]. 0 keeps all `num_select`.
            num_select: detections kept per image or tile, the best (query, class) pairs; None: the model's own setting.
            short_side: the short side's length in pixels that an image or tile is resized to; None: the model's own.
            long_side: limit of the long side in pixels; None: the model's own setting.
            tile_size: side in pixels of the square tiles that an image is cut into; 0: whole images; None: the model's
                own setting.
            tile_overlap: by how many pixels neighbouring tiles overlap at least; None: the model's own setting.
            device: where to run, e.g. `cuda`; None: where the model is.
            batch_size: images, or tiles of an image, that go through the model together.
            precision: `fp32`, or `bf16` for autocast.

        Raises:
            InputError: a setting is out of range.
        """
        self.threshold = threshold
        self.num_select = model.inference.num_select if num_select is None else num_select
        self.short_side = model.inference.short_side if short_side is None else short_side
        self.long_side = model.inference.long_side if long_side is None else long_side
        self.tile_size = model.inference.tile_size if tile_size is None else tile_size
        self.tile_overlap = model.inference.tile_overlap if tile_overlap is None else tile_overlap
        self.merge_iou = model.inference.merge_iou
        self.batch_size = batch_size
        self.precision = precision
        for name in ("num_select", "short_side", "long_side", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}: give at least 1")
        if self.tile_size:
            tile_starts(1, self.tile_size, self.tile_overlap)  # refuses an impossible overlap
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold is {threshold}: give a score from 0 to 1")
        if precision not in ("fp32", "bf16"):
            raise InputError(f"precision is {precision!r}: give fp32 or bf16")
        self.model = (model if device is None else model.to(device)).eval()
        self.device = _device_of(model)
        self.class_names = np.array(model.config.class_names)

    @overload
    def __call__(self, image: ImageInput) -> sv.Detections: ...

    @overload
    def __call__(self, image: list[Any] | tuple[ImageInput, ...]) -> list[sv.Detections]: ...

    def __call__(self, image: ImageInput | list[Any] | tuple[ImageInput, ...]) -> sv.Detections | list[sv.Detections]:
        """Detect the objects of one image or of a list of images.

        Args:
            image: the path of an image file, a PIL image, a uint8 array (H, W, 3) in RGB order (also grey (H, W), or
                RGBA, whose alpha is dropped), a uint8 tensor (3, H, W); or a list of such.

        Returns:
            One `supervision.Detections`, or a list of them in the order of the images: `xyxy` float32 in pixels of the
            original image, inside the image; `confidence` in descending order; `class_id`; `data["class_name"]`.

        Raises:
            InputError: an image cannot be read or is not of one of these forms.
        """
        if isinstance(image, (list, tuple)):
            return list(self.predict_many(image))
        return self._predict_batch([image])[0]

    def predict_many(self, images: Iterable[ImageInput]) -> Iterator[sv.Detections]:
        """Detect in a stream of images, `batch_size` at a time; yields in the order of the images.

        Args:
            images: any iterable of what a call takes; it is read no further than one batch ahead.

        Yields:
            The detections of one image after the other.
        """
        iterator = iter(images)
        while batch := list(itertools.islice(iterator, self.batch_size)):
            yield from self._predict_batch(batch)

    def _predict_batch(self, images: Sequence[ImageInput]) -> list[sv.Detections]:
        pictures = [to_pil_image(image) for image in images]
        found = [self._detect_tiles(one) for one in pictures] if self.tile_size else self._detect(pictures)
        return [
            sv.Detections(
                xyxy=boxes.numpy(),
                confidence=scores.numpy(),
                class_id=labels.numpy(),
                data={"class_name": self.class_names[labels.numpy()]},
            )
            for boxes, scores, labels in found
        ]

    def _detect(self, pictures: Sequence[Image.Image]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boxes, scores and labels of each picture."""
        batch = collate([self._prepare(picture) for picture in pictures]).to(self.device)
        with (
            torch.no_grad(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
        ):
            output: DetectorOutput = self.model(batch.images, batch.padding_mask)
        original_hw = [target.original_hw for target in batch.targets]
        return select_detections(output, original_hw, self.num_select, self.threshold)

    def _detect_tiles(self, picture: Image.Image) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, scores and labels of a picture, by its tiles."""
        image_hw = (picture.height, picture.width)
        tiles = tile_grid(image_hw, self.tile_size, self.tile_overlap)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, len(tiles), self.batch_size):
            # What lies beyond a small picture is black, as in training.
            chosen = tiles[start : start + self.batch_size]
            corners = [(tile.left, tile.top, tile.left + tile.width, tile.top + tile.height) for tile in chosen]
            parts += self._detect([picture.crop(corner) for corner in corners])
        return merge_detections(parts, tiles, image_hw, self.merge_iou)

    def _prepare(self, image: Image.Image) -> tuple[Tensor, Target]:
        original_hw = (image.height, image.width)
        resized = resize_image(to_tensor(image), resize_hw(original_hw, self.short_side, self.long_side))
        target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), original_hw=original_hw)
        return normalize(resized, self.model.mean, self.model.std), target


def select_detections(
    output: DetectorOutput, original_hw: Sequence[tuple[int, int]], num_select: int, threshold: float = 0.0
) -> list[tuple[Tensor, Tensor, Tensor]]:
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
    sizes = torch.tensor([[width, height, width, height] for height, width in original_hw], device=boxes.device)
    boxes = boxes.clamp(0, 1) * sizes[:, None]
    boxes, scores, labels = boxes.cpu(), scores.cpu(), labels.cpu()
    kept = scores >= threshold
    return [
        (boxes[image][kept[image]], scores[image][kept[image]], labels[image][kept[image]])
        for image in range(len(kept))
    ]


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


def to_pil_image(image: ImageInput) -> Image.Image:
    """The image as PIL RGB, whatever form it came in.

    Args:
        image: a path, a PIL image of any mode, a uint8 array (H, W, 3 or 4) or (H, W), a uint8 tensor (3, H, W).

    Returns:
        The image in RGB, 8 bits a channel.

    Raises:
        InputError: a file cannot be read, or an array has another type or shape.
    """
    if isinstance(image, (str, Path)):
        return read_image(image)
    if isinstance(image, Image.Image):
        if image.mode == "F" or image.mode.startswith("I"):
            raise InputError(f"a PIL image of mode {image.mode} has no known range of values: convert it to 8 bits")
        return image.convert("RGB")
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise InputError(
                f"an image tensor of type {image.dtype} and shape {tuple(image.shape)} is not understood: give uint8 "
                "(3, H, W) in RGB; for values from 0 to 1 use (image * 255).round().to(torch.uint8)"
            )
        return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    if isinstance(image, np.ndarray):
        grey = image.ndim == 2
        colour = image.ndim == 3 and image.shape[2] in (3, 4)
        if image.dtype != np.uint8 or not (grey or colour) or image.size == 0:
            raise InputError(
                f"an image array of type {image.dtype} and shape {image.shape} is not understood: give uint8 (H, W, 3) "
                "in RGB; for values from 0 to 1 use (image * 255).round().astype(numpy.uint8)"
            )
        return Image.fromarray(np.ascontiguousarray(image[..., :3] if colour else image)).convert("RGB")
    raise InputError(
        f"an image of type {type(image).__name__} is not understood: give a path, a PIL image, a uint8 array or tensor"
    )


def _device_of(model: nn.Module) -> torch.device:
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")
