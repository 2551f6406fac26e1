"""The dataset and its loader: records in, padded batches out.

All randomness of training item `i` in epoch `e` comes from `(seed, e, i)` alone, so that what the network sees depends
neither on the number of worker processes nor on what was loaded before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from crossdino.config import DataConfig
from crossdino.data.formats import DatasetIndex
from crossdino.data.images import ImageError, read_image
from crossdino.data.transforms import Sample, augment, normalize, resize, resize_hw, to_tensor
from crossdino.errors import InputError
from crossdino.structures import Batch, Target

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Images and targets of a `DatasetIndex`, prepared for training or for evaluation."""

    def __init__(
        self,
        index: DatasetIndex,
        data: DataConfig,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        train: bool = False,
        seed: int = 0,
    ) -> None:
        """Prepare; no image is read yet.

        Args:
            index: the records.
            data: sizes and augmentation.
            mean: per channel, of values in 0..1.
            std: likewise.
            train: augment (True), or resize to the test size only.
            seed: of the augmentation and of the order.

        Raises:
            InputError: a setting makes no sense.
        """
        _check_settings(data)
        self.index = index
        self.data = data
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.train = train
        self.seed = seed
        # In shared memory, so that worker processes which live longer than an epoch see the new one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation and the order of this epoch from now on; call it before iterating."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.index.records)

    def __getitem__(self, position: int) -> tuple[Tensor, Target]:
        """The image as (3, H, W) float32, normalised, and its target (crowds left out).

        Raises:
            ImageError: the file cannot be read, or is not the one that was indexed.
        """
        record = self.index.records[position]
        image = read_image(record.path, record.apply_exif)
        if image.size != (record.width, record.height):
            raise ImageError(
                f"image {record.path} has {image.width} x {image.height} pixels instead of {record.width} x "
                f"{record.height}; it was changed after the start: restore it"
            )
        real = ~record.iscrowd
        corners = record.boxes_xywh[real].copy()
        corners[:, 2:] += corners[:, :2]
        sample = Sample(to_tensor(image), torch.from_numpy(corners), torch.from_numpy(record.labels[real]))
        if self.train:
            sample = augment(sample, self.data, np.random.default_rng((self.seed, self.epoch, position)))
        else:
            hw = resize_hw(sample.hw, self.data.test_short_side, self.data.test_long_side)
            sample = resize(sample, hw)
        target = Target(
            boxes_cxcywh=_normalized_cxcywh(sample),
            labels=sample.labels,
            image_id=record.image_id,
            original_hw=(record.height, record.width),
        )
        return normalize(sample.image, self.mean, self.std), target


def _normalized_cxcywh(sample: Sample) -> Tensor:
    """The boxes as float32 cxcywh in [0, 1]."""
    height, width = sample.hw
    x1, y1, x2, y2 = (sample.boxes_xyxy / torch.tensor([width, height, width, height])).clamp(0, 1).unbind(1)
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=1).to(torch.float32)


def _check_settings(data: DataConfig) -> None:
    """Raise InputError for settings with which no image can be prepared."""
    sides = (*data.train_short_sides, *data.crop_short_sides, *data.crop_range, data.train_long_side)
    low, high = data.crop_range
    rules = [
        ("train_short_sides", data.train_short_sides, len(data.train_short_sides) > 0, "needs at least one side"),
        ("crop_range", data.crop_range, low <= high, "needs the smaller side first"),
        ("horizontal_flip", data.horizontal_flip, 0 <= data.horizontal_flip <= 1, "must lie between 0 and 1"),
        ("vertical_flip", data.vertical_flip, 0 <= data.vertical_flip <= 1, "must lie between 0 and 1"),
        ("color_jitter", data.color_jitter, 0 <= data.color_jitter <= 1, "must lie between 0 and 1"),
        ("num_workers", data.num_workers, data.num_workers >= 0, "must not be negative"),
        ("*_sides, crop_range", sides, min(sides) >= 1, "must all be 1 pixel or more"),
        ("test_short_side", data.test_short_side, data.test_short_side >= 1, "must be 1 pixel or more"),
        ("test_long_side", data.test_long_side, data.test_long_side >= 1, "must be 1 pixel or more"),
    ]
    for name, value, holds, remedy in rules:
        if not holds:
            raise InputError(f"setting data.{name} = {value} {remedy}")


def collate(items: Sequence[tuple[Tensor, Target]]) -> Batch:
    """Pad images at the bottom and the right to the largest height and the largest width among them.

    Args:
        items: (image (3, H_i, W_i), target) of N images.

    Returns:
        The batch, (N, 3, max H_i, max W_i).
    """
    height = max(image.shape[1] for image, _ in items)
    width = max(image.shape[2] for image, _ in items)
    images = torch.zeros(len(items), 3, height, width)
    padding_mask = torch.ones(len(items), height, width, dtype=torch.bool)
    for place, (image, _) in enumerate(items):
        images[place, :, : image.shape[1], : image.shape[2]] = image
        padding_mask[place, : image.shape[1], : image.shape[2]] = False
    return Batch(images, padding_mask, [target for _, target in items])


def build_loader(
    dataset: DetectionDataset, batch_size: int, *, order: Sequence[int] | None = None, num_workers: int | None = None
) -> DataLoader[Any]:
    """A loader of padded batches. The last batch may be smaller.

    Args:
        dataset: the images.
        batch_size: images per batch.
        order: positions of the images to load; None: all, as they are.
        num_workers: processes that load; None: the dataset's `data.num_workers`.

    Returns:
        The loader, which yields `Batch`.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=range(len(dataset)) if order is None else order,
        num_workers=dataset.data.num_workers if num_workers is None else num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )
