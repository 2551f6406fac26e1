"""The network as a predictor runs it: in which number format, compiled or not, and how many images at once.

Whatever is chosen here changes boxes and scores by rounding only; what does not work on a machine (no compiler, too
little memory for a batch) is told in one line of the log `crossdino`, and the work goes on without it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from crossdino.errors import InputError
from crossdino.structures import DetectorOutput

if TYPE_CHECKING:
    from crossdino.models.detector import CrossDINO

DtypeName = Literal["float32", "bfloat16", "float16"]

_logger = logging.getLogger(__name__)

_DTYPES: dict[str, DtypeName] = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
SHORT_NAMES: dict[DtypeName, Literal["fp32", "bf16", "fp16"]] = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
}
# Images at once that `auto` chooses at most. On 2 cores 4 tiles of 448 px at once took 16 % less time than one by one;
# large images keep the cores busy by themselves, and a batch of them needs much memory.
_MOST_ON_GPU, _MOST_ON_CPU, _MOST_PX_ON_CPU = 16, 4, 1_700_000
# Of the free memory of a GPU this share is planned with: other shapes fragment it.
_SHARE = 0.7


def choose_dtype(name: str, device: torch.device | str) -> DtypeName:
    """The number format to compute in.

    Args:
        name: `float32`, `bfloat16`, `float16`, or as `fp32`, `bf16`, `fp16`; `auto`: what suits the device, which is
            float32: nothing else gives the boxes that the weights were evaluated with.
        device: where to compute.

    Raises:
        InputError: there is no such format, or not on this device.
    """
    if name == "auto":
        return "float32"
    if not isinstance(name, str) or name not in _DTYPES:
        raise InputError(f"dtype is {name!r}: give auto, float32, bfloat16 (bf16) or float16 (fp16)")
    chosen, kind = _DTYPES[name], torch.device(device).type
    if chosen == "float16" and kind == "cpu":
        raise InputError("dtype is float16, which the CPU does not compute fast in: give bfloat16 or float32")
    return chosen


def autocast(dtype: DtypeName, device: torch.device | str) -> Any:
    """The context in which a model computes in that format; its parameters stay float32."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(device).type, getattr(torch, dtype))


class Network:
    """A model that takes resized pixels, in batches of a size that fits.

    Attributes:
        batch_size: images that go through the model together at present.
        most: the most that it may become.
        dtype: the number format.
    """

    def __init__(
        self,
        model: CrossDINO,
        device: torch.device,
        dtype: DtypeName,
        *,
        compiled: bool,
        batch_size: int | Literal["auto"],
        largest_px: int,
    ) -> None:
        """Nothing is computed yet.

        Args:
            model: in evaluation mode, on the device.
            device: where to compute.
            dtype: the number format.
            compiled: use `torch.compile`; where that fails the model is run as it is.
            batch_size: images at once; `auto`: what fits into the memory of the device.
            largest_px: number of pixels of the largest image that is to be expected, after resizing.
        """
        self.dtype: DtypeName = dtype
        self._model = model
        self._device = device
        self._largest_px = largest_px
        self._shift = (torch.tensor(model.mean, dtype=torch.float32).view(3, 1, 1) * 255.0).to(device)
        self._scale = (torch.tensor(model.std, dtype=torch.float32).view(3, 1, 1) * 255.0).to(device)
        self._compiled: Callable[..., DetectorOutput] | None = None
        self._compile_told = False
        if compiled:
            try:
                self._compiled = torch.compile(model, dynamic=True)
            except RuntimeError as error:  # there is no compiler for this version of Python
                _tell_not_compiled(error)
        # On a GPU the first image goes alone, to see what it takes.
        self._on_trial = batch_size == "auto" and device.type == "cuda"
        first = 1 if self._on_trial else max(1, min(_MOST_ON_CPU, _MOST_PX_ON_CPU // largest_px))
        self.batch_size: int = first if isinstance(batch_size, str) else batch_size
        self.most = _MOST_ON_GPU if self._on_trial else self.batch_size

    def __call__(self, images: Sequence[Tensor]) -> Iterator[DetectorOutput]:
        """Look at images; where they do not fit together, at some at a time.

        Args:
            images: N of (3, H_i, W_i) uint8 RGB.

        Yields:
            The outputs, of one or several images each, in their order.

        Raises:
            InputError: a single image does not fit into memory.
        """
        start = 0
        while start < len(images):
            some = images[start : start + self.batch_size]
            try:
                output = self._on_trial_run(some) if self._on_trial else self._run(some)
            except RuntimeError as error:
                if not _is_memory_full(error):
                    raise
                output = None
            if output is None:  # out of the handler, whose error keeps what was in memory alive
                self._take_less(some)
                continue
            yield output
            start += len(some)

    def _run(self, images: Sequence[Tensor]) -> DetectorOutput:
        pixels, padding_mask = self._batch(images)
        with torch.no_grad(), autocast(self.dtype, self._device):
            return self._forward(pixels, padding_mask)

    def _batch(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Normalised pixels (N, 3, H, W) float32 on the device, and the padding mask (N, H, W) on the CPU.

        The bytes travel, and are made floats there: that is a quarter of the traffic, and in a reading thread torch's
        own threads would stand in the way of those of the network.
        """
        height, width = (max(image.shape[side] for image in images) for side in (1, 2))
        batch = torch.zeros(len(images), 3, height, width, device=self._device)
        padding_mask = torch.ones(len(images), height, width, dtype=torch.bool)
        for place, image in enumerate(images):
            if self._device.type == "cuda":
                image = image.contiguous().pin_memory().to(self._device, non_blocking=True)
            slot = batch[place, :, : image.shape[1], : image.shape[2]]
            slot.copy_(image).sub_(self._shift).div_(self._scale)
            padding_mask[place, : image.shape[1], : image.shape[2]] = False
        return batch, padding_mask

    def _forward(self, pixels: Tensor, padding_mask: Tensor) -> DetectorOutput:
        if self._compiled is None:
            return self._model(pixels, padding_mask)
        begun = time.perf_counter()
        try:
            output = self._compiled(pixels, padding_mask)
        except Exception as error:  # of torch's compiler or of any other that it has called
            if _is_memory_full(error):
                raise
            output = self._model(pixels, padding_mask)  # if the fault is the model's, this tells
            self._compiled = None
            _tell_not_compiled(error)
            return output
        if not self._compile_told:
            self._compile_told = True
            _logger.info("compiled, with the first batch, in %.0f s", time.perf_counter() - begun)
        return output

    def _on_trial_run(self, images: Sequence[Tensor]) -> DetectorOutput:
        """Look at the first image, and see how many would fit."""
        cuda, device = torch.cuda, self._device
        before = cuda.memory_allocated(device)
        cuda.reset_peak_memory_stats(device)
        output = self._run(images)
        needed = cuda.max_memory_allocated(device) - before
        free = cuda.mem_get_info(device)[0] + cuda.memory_reserved(device) - cuda.memory_allocated(device)
        seen_px = sum(image.shape[1] * image.shape[2] for image in images)
        self.batch_size = fitting_batch(needed, seen_px, self._largest_px, free)
        self._on_trial = False
        _logger.info("%d at once fit into the memory of %s", self.batch_size, device)
        return output

    def _take_less(self, images: Sequence[Tensor]) -> None:
        """After the memory was full: half as many from now on."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        height, width = images[0].shape[1:]
        if len(images) == 1:
            raise InputError(
                f"the memory of {self._device} is too small for an image of {height} x {width} px: look at smaller "
                "tiles (tile_size), resize to a smaller short_side, or use bfloat16"
            )
        self.batch_size = self.most = len(images) // 2
        self._on_trial = False
        _logger.warning("the memory of %s is full: going on with %d at once", self._device, self.batch_size)


def fitting_batch(needed: int, seen_px: int, largest_px: int, free: int) -> int:
    """How many images of `largest_px` pixels fit into `free` bytes, if `seen_px` pixels took `needed`; at least 1."""
    of_each = max(needed, 1) / seen_px * max(largest_px, seen_px)
    return max(1, min(_MOST_ON_GPU, int(_SHARE * free / of_each)))


def _tell_not_compiled(error: Exception) -> None:
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    _logger.warning("the model runs without being compiled (%s)", reason[:200])


def _is_memory_full(error: BaseException) -> bool:
    """Of a GPU, or of the host, whose allocator has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
