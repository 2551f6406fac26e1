"""From images in any of the usual forms to `supervision.Detections` in pixels of the original image.

A picture is looked at as a whole, or tile by tile, or both. All looks of all pictures form one stream: threads read and
resize what comes next while the network works, and a batch may hold tiles of several pictures.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np
import supervision as sv
import torch
from PIL import Image
from torch import Tensor, nn

from crossdino.checkpoints import CalibrationWarning, weights_digest
from crossdino.config import InferenceConfig
from crossdino.data.transforms import resize_hw, resize_image
from crossdino.errors import InputError
from crossdino.looks import NOTHING, WHOLE, Job, Look, TileMemory
from crossdino.merging import merge_detections
from crossdino.postprocessing import Found, select_detections
from crossdino.prediction_network import SHORT_NAMES, DtypeName, Network, choose_dtype
from crossdino.sources import Ahead, FailedPicture, ImageInput, Picture, Source, as_picture, find_sources, open_all
from crossdino.tiling import Tile, choose_tiles, tile_grid

if TYPE_CHECKING:
    from crossdino.models.detector import CrossDINO

T = TypeVar("T")


@dataclass(frozen=True)
class Prediction:
    """What was found in one picture.

    Attributes:
        picture: what was looked at.
        detections: `xyxy` float32 in pixels of the original image, inside the image; `confidence` in descending order;
            `class_id`; `data["class_name"]`. Empty where the picture could not be read.
        capped: the image, or one of its tiles, filled all `num_select` places, so that there may be more objects.
        error: why the picture could not be read.
    """

    picture: Picture
    detections: sv.Detections
    capped: bool = False
    error: InputError | None = None


class Predictor:
    """A trained model, ready to be called on images.

    Images of a batch may have different sizes; every image is resized as the model's `inference` settings say (or as
    given here), padded to the batch's largest, and its boxes come back in its own pixels. A model that was trained on
    tiles sees tiles of the same size, whose detections are merged.

    It is also what `supervision.InferenceSlicer` wants as a callback.
    """

    def __init__(
        self,
        model: CrossDINO,
        *,
        threshold: float | Literal["auto"] = 0.0,
        num_select: int | None = None,
        short_side: int | None = None,
        long_side: int | None = None,
        tile_size: int | Literal["auto"] | None = None,
        tile_overlap: int | None = None,
        merge: Literal["seam", "nms", "soft"] | None = None,
        merge_iou: float | None = None,
        full_image: bool | None = None,
        device: str | torch.device | None = None,
        batch_size: int | Literal["auto"] = 1,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None,
        compile: bool = False,
        precision: Literal["fp32", "bf16"] | None = None,
        num_threads: int = 2,
        channel_order: Literal["rgb", "bgr"] = "rgb",
    ) -> None:
        """Take over a model and put it into evaluation mode.

        Args:
            model: the trained detector.
            threshold: detections with a lower score are left out; in [0, 1]. 0 keeps all `num_select`. `auto`: scores
                are calibrated and held against thresholds by class and size, as `crossdino calibrate` has fitted them.
            num_select: detections kept per image or tile, the best (query, class) pairs; None: the model's own setting.
            short_side: the short side's length in pixels that an image or tile is resized to; None: the model's own.
            long_side: limit of the long side in pixels; None: the model's own setting.
            tile_size: side in pixels of the square tiles that an image is cut into; 0: whole images; `auto`: tiles in
                which objects are as large as in training; None: the model's own setting.
            tile_overlap: by how many pixels neighbouring tiles overlap at least; None: the model's own setting.
            merge: how the detections of tiles become those of the image; None: the model's own setting.
            merge_iou: overlap from which two detections of a class are one, in (0, 1]; None: the model's own setting.
            full_image: besides its tiles look at the whole image; None: the model's own setting.
            device: where to run, e.g. `cuda`; None: where the model is.
            batch_size: images, or tiles, that go through the model together; `auto`: what fits into the memory of a GPU
                (at most 16); elsewhere up to 4, as long as they are small. It changes results by rounding only. Where
                the memory is too small for it, half as many go on.
            dtype: `float32` (also None), or `bfloat16` or `float16` for autocast, where the model itself keeps in
                float32 what boxes depend on; `auto`: what suits the device. Results are float32 in any case.
            compile: use `torch.compile`, which takes a minute or more before the first image; without a C++ compiler
                a line of the log tells so, and the model runs as it is.
            precision: `fp32` or `bf16`, the older name of `dtype`.
            num_threads: threads that read and resize ahead of the network.
            channel_order: of arrays (not of files or PIL images); `bgr` for those of OpenCV.

        Raises:
            InputError: a setting is out of range.
        """
        inference: InferenceConfig = model.inference

        def chosen(given: T | None, own: T) -> T:
            return own if given is None else given

        self.threshold = threshold
        self.num_select = chosen(num_select, inference.num_select)
        self.short_side = chosen(short_side, inference.short_side)
        self.long_side = chosen(long_side, inference.long_side)
        if tile_overlap is not None and not isinstance(tile_overlap, Integral):
            raise InputError(f"tile_overlap is {tile_overlap!r}: give a whole number of pixels")
        self.tile_size, self.tile_overlap = choose_tiles(inference, tile_size, tile_overlap)
        self.merge: Literal["seam", "nms", "soft"] = chosen(merge, inference.merge)
        self.merge_iou = chosen(merge_iou, inference.merge_iou)
        self.full_image = bool(chosen(full_image, inference.full_image) and self.tile_size)
        self.num_threads = num_threads
        self.channel_order: Literal["rgb", "bgr"] = channel_order
        for name in ("num_select", "short_side", "long_side", "num_threads"):
            # (numpy's numbers would not go into a journal.)
            setattr(self, name, _count(name, getattr(self, name)))
        if threshold != "auto" and not (isinstance(threshold, (int, float)) and 0 <= threshold <= 1):
            raise InputError(f"threshold is {threshold}: give a score from 0 to 1, or auto")
        if not isinstance(self.merge_iou, (int, float)) or not 0 < self.merge_iou <= 1:
            raise InputError(f"merge_iou is {self.merge_iou!r}: give an overlap above 0 and at most 1")
        names = {"merge": ("seam", "nms", "soft"), "channel_order": ("rgb", "bgr")}
        for name, known in names.items():
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}: give {' or '.join(known)}")
        self._lowest_score = 0.0 if isinstance(threshold, str) else float(threshold)
        self._most_detections = min(self.num_select, model.config.num_queries * model.config.num_classes)
        self.calibration = model.calibration if threshold == "auto" else None
        if threshold == "auto" and self.calibration is None:
            raise InputError(
                "threshold is auto, but the model has no calibration: fit one on validation data by `crossdino "
                "calibrate`, or give a score from 0 to 1"
            )
        if self.calibration is not None and (differences := self.calibration.differences(vars(self))):
            warnings.warn(
                f"the calibration was made with other settings ({', '.join(differences)}), so that scores and "
                "thresholds may be off: give those, or run `crossdino calibrate` with yours",
                CalibrationWarning,
                stacklevel=2,
            )
        self.model = (model if device is None else model.to(device)).eval()
        self.device = _device_of(model)
        self.class_names = np.array(model.config.class_names)
        if dtype is not None and precision is not None:
            raise InputError(f"precision ({precision}) is the older name of dtype ({dtype}): give one of both")
        if precision not in (None, "fp32", "bf16"):
            raise InputError(f"precision is {precision!r}: give fp32 or bf16, or dtype")
        tile = self.tile_size
        largest_hw = resize_hw((tile, tile), self.short_side, self.long_side) if tile else ()
        self._network = Network(
            model,
            self.device,
            choose_dtype(dtype or precision or "float32", self.device),
            compiled=compile,
            batch_size="auto" if batch_size == "auto" else _count("batch_size", batch_size),
            largest_px=self.short_side * self.long_side if self.full_image or not tile else math.prod(largest_hw),
        )

    @property
    def batch_size(self) -> int:
        """Images, or tiles, that go through the model together."""
        return self._network.batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._network.batch_size = self._network.most = _count("batch_size", value)

    @property
    def dtype(self) -> DtypeName:
        """The number format of the network."""
        return self._network.dtype

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        """The number format by its short name."""
        return SHORT_NAMES[self.dtype]

    @overload
    def __call__(self, image: ImageInput) -> sv.Detections: ...

    @overload
    def __call__(self, image: list[Any] | tuple[ImageInput, ...]) -> list[sv.Detections]: ...

    def __call__(self, image: ImageInput | list[Any] | tuple[ImageInput, ...]) -> sv.Detections | list[sv.Detections]:
        """Detect the objects of one image or of a list of images.

        Args:
            image: the path of an image file, a PIL image (in its own pixels: only files are turned as their EXIF data
                say), a uint8 array (H, W, 3) in RGB order (also grey (H, W), or RGBA, whose alpha is dropped), a uint8
                tensor (3, H, W); or a list of such.

        Returns:
            One `supervision.Detections`, or a list of them in the order of the images; see `Prediction`.

        Raises:
            InputError: an image cannot be read or is not of one of these forms.
        """
        if isinstance(image, (list, tuple)):
            return list(self.predict_many(image))
        return next(self.predict_many([image]))

    def predict_many(self, images: ImageInput | Picture | Iterable[Picture | ImageInput]) -> Iterator[sv.Detections]:
        """The detections of one image after the other; `stream` without what belongs to them.

        Args:
            images: as for `stream`.

        Yields:
            The detections of each image, or of each frame of a video.
        """
        for prediction in self.stream(images):
            prediction.picture.close()
            yield prediction.detections

    def stream(
        self,
        images: ImageInput | Picture | Iterable[Picture | ImageInput],
        *,
        on_error: Literal["raise", "yield"] = "raise",
        memory: TileMemory | None = None,
    ) -> Generator[Prediction, None, None]:
        """Detect in a stream of images, in their order; memory does not grow with its length.

        Args:
            images: a folder, a glob pattern, a video or a single image; or any iterable of what a call takes and of
                what `crossdino.sources.open_pictures` yields, or a stack of images (N, H, W, 3) or (N, 3, H, W). It is
                read a little ahead, in a thread.
            on_error: `raise` stops at the first picture that cannot be read; `yield` gives it with its `error`.
            memory: keeps what is found in the tiles of a picture that is not finished, so that a stopped run can go on
                within it.

        Yields:
            A `Prediction` for each picture, which is still open (`prediction.picture.close()` frees its pixels).

        Raises:
            InputError: a picture cannot be read; nothing is found at all; `on_error` is neither.
        """
        if on_error not in ("raise", "yield"):
            raise InputError(f"on_error is {on_error!r}: give raise or yield")
        if isinstance(images, (str, Path)):
            sources, _ = find_sources([str(images)])
            images = open_all(sources)
        elif isinstance(images, (Image.Image, Picture)) or (
            isinstance(images, (np.ndarray, Tensor)) and images.ndim < 4
        ):
            images = [images]  # not its rows
        # Enough to keep the network busy while a slow file is decoded; more would only fill the memory.
        depth = 2 * self._network.most + self.num_threads
        jobs: deque[Job] = deque()
        looks: deque[Look] = deque()
        reading: deque[tuple[Look, Future[Tensor]]] = deque()
        with Ahead(self._start_all(images), depth) as coming, ThreadPoolExecutor(self.num_threads) as readers:
            try:
                while True:
                    # (It changes when the memory turns out to have room for more, or for less.)
                    depth = 2 * self.batch_size + self.num_threads
                    while len(looks) + len(reading) < depth and len(jobs) < depth:
                        # Wait until a batch is full: what an image is batched with shall not depend on the time
                        # that files take. (Of a live camera take one at a time.)
                        job = coming.take(wait=len(looks) + len(reading) < self.batch_size)
                        if job is None:
                            break
                        jobs.append(job)
                        looks += self._looks(job, memory)
                    while looks and len(reading) < depth:
                        look = looks.popleft()
                        reading.append((look, readers.submit(self._prepare, look)))
                    if not jobs:
                        return
                    self._take(reading, memory)
                    while jobs and jobs[0].missing == 0:
                        job = jobs.popleft()
                        if job.broken_off is not None:
                            raise job.broken_off
                        if job.error is not None and on_error == "raise":
                            raise job.error
                        yield self._finish(job)
            finally:
                for _, image in reading:
                    image.cancel()
                for job in jobs:
                    job.picture.close()

    def settings(self) -> dict[str, Any]:
        """Everything that the detections depend on besides the image, as plain values, with a digest of the weights."""
        names = (
            *("threshold", "num_select", "short_side", "long_side", "tile_size", "tile_overlap"),
            *("merge", "merge_iou", "full_image", "precision"),
        )
        made_by: dict[str, Any] = {"weights": weights_digest(self.model)}
        if self.calibration is not None:
            made_by["calibration"] = hashlib.sha256(repr(self.calibration.to_dict()).encode()).hexdigest()[:16]
        return {**{name: getattr(self, name) for name in names}, **made_by}

    def tiles_of(self, hw: tuple[int, int]) -> list[Tile]:
        """The tiles that an image of this height and width is cut into; none where it is looked at as a whole."""
        return tile_grid(hw, self.tile_size, self.tile_overlap) if self.tile_size else []

    def _start_all(self, images: Iterable[Picture | ImageInput]) -> Iterator[Job]:
        """The pictures' jobs; runs in the reading thread, so that headers are read ahead as well."""
        try:
            for image in images:
                yield self._start(image)
        except Exception as error:  # of the caller's iterable: raised in its turn, after the pictures before it
            end = FailedPicture(Source("", "", "memory"), InputError(str(error)))
            yield Job(end, error=end.error, broken_off=error)

    def _start(self, image: Picture | ImageInput) -> Job:
        try:
            picture = image if isinstance(image, Picture) else as_picture(image, self.channel_order)
        except InputError as error:
            of_file = isinstance(image, (str, Path))
            source = Source(str(image), str(image), "image") if of_file else Source("image in memory", "", "memory")
            picture = FailedPicture(source, error)
        job = Job(picture)
        try:
            job.hw = job.picture.hw
            job.tiles = self.tiles_of(job.hw)
        except InputError as error:
            job.error = error
        return job

    def _looks(self, job: Job, memory: TileMemory | None) -> list[Look]:
        """The passages that a picture still needs."""
        if job.error is not None:
            return []
        numbers: list[int] = [*range(len(job.tiles)), *([WHOLE] if self.full_image or not job.tiles else [])]
        job.parts = [NOTHING] * len(job.tiles)
        if memory is not None and job.tiles:
            for number, found in memory.load(job.picture, len(job.tiles)).items():
                job.keep(number, found, self._is_capped(found))
                numbers.remove(number)
        job.missing = len(numbers)
        return [Look(job, number) for number in numbers]

    def _prepare(self, look: Look) -> Tensor:
        """The pixels of a look, resized: uint8; runs in a reading thread."""
        tile, picture = look.tile, look.job.picture
        hw = resize_hw((tile.height, tile.width), self.short_side, self.long_side)
        if look.job.error is not None:  # another tile could not be read: this one is not needed
            raise look.job.error
        # So large that it is never in memory as a whole: then it is reduced while it is read.
        reduced = look.number == WHOLE and picture.windowed
        pixels = picture.read_reduced(hw) if reduced else picture.read(tile)
        return resize_image(torch.from_numpy(pixels).permute(2, 0, 1), hw)

    def _take(self, reading: deque[tuple[Look, Future[Tensor]]], memory: TileMemory | None) -> None:
        """Send the next looks through the network."""
        batch: list[tuple[Look, Tensor]] = []
        while reading and len(batch) < self.batch_size:
            look, image = reading.popleft()
            if look.job.error is None:
                try:
                    batch.append((look, image.result()))
                    continue
                except InputError as error:
                    look.job.error = error
            # Not needed, be it read by now or not: what a batch is made of must not depend on that.
            image.cancel()
            look.job.missing -= 1
        if not batch:
            return
        sizes = [(look.tile.height, look.tile.width) for look, _ in batch]
        for (look, _), found in zip(batch, self._detect([image for _, image in batch], sizes), strict=True):
            job = look.job
            job.missing -= 1
            job.keep(look.number, found, self._is_capped(found))
            if memory is not None and job.tiles:
                memory.save(job.picture, len(job.tiles), look.number, found)

    def _detect(self, images: Sequence[Tensor], original_hw: Sequence[tuple[int, int]]) -> list[Found]:
        """Boxes, scores and labels of resized images, in pixels of the originals."""
        found: list[Found] = []
        for output in self._network(images):
            sizes = original_hw[len(found) : len(found) + len(output.pred_logits)]
            # With thresholds by class and size nothing is left out before the tiles are merged: the thresholds are for
            # merged boxes.
            found += select_detections(output, sizes, self.num_select, self._lowest_score)
        return found

    def _is_capped(self, found: Found) -> bool:
        """Whether everything that a passage can give is above its threshold, so that there may be more objects."""
        boxes, scores, labels = found
        if len(scores) < self._most_detections:
            return False
        if self.calibration is None:
            return True
        counts = self.calibration.calibrate(boxes, scores, labels) >= self.calibration.thresholds(boxes, labels)
        return bool(counts.all())

    def _finish(self, job: Job) -> Prediction:
        """The detections of a picture from those of its looks."""
        if job.error is not None:
            return Prediction(job.picture, self._as_detections(*NOTHING), error=job.error)
        if job.tiles:
            found = merge_detections(job.parts, job.tiles, job.hw, self.merge_iou, self.merge, job.full)
        else:
            assert job.full is not None
            found = job.full
        boxes, scores, labels = found
        if self.calibration is None:
            kept = scores >= self._lowest_score
        else:
            scores = self.calibration.calibrate(boxes, scores, labels)
            kept = scores >= self.calibration.thresholds(boxes, labels)
        order = scores[kept].argsort(descending=True, stable=True)
        detections = self._as_detections(boxes[kept][order], scores[kept][order], labels[kept][order])
        return Prediction(job.picture, detections, job.capped)

    def _as_detections(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> sv.Detections:
        names: dict[str, Any] = {"class_name": self.class_names[labels.numpy()]}
        return sv.Detections(boxes.numpy(), confidence=scores.numpy(), class_id=labels.numpy(), data=names)


def _count(name: str, value: Any) -> int:
    if not isinstance(value, Integral) or value < 1:
        raise InputError(f"{name} is {value!r}: give a whole number, at least 1")
    return int(value)


def _device_of(model: nn.Module) -> torch.device:
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")
