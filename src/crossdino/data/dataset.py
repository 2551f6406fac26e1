"""The dataset and its loader: records in, padded batches out.

All randomness of training item `i` in epoch `e` comes from `(seed, e, i)` alone, so that what the network sees depends
neither on the number of worker processes nor on what was loaded before.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from crossdino.config import DataConfig
from crossdino.data.augmentation import augment
from crossdino.data.balance import RepeatFactors, repeat_factors
from crossdino.data.images import fits_whole, too_large
from crossdino.data.index import DatasetIndex, ImageRecord
from crossdino.data.reading import ImageReader
from crossdino.data.transforms import Sample, crop, normalize, resize, resize_hw, to_tensor
from crossdino.errors import InputError
from crossdino.structures import Batch, Target
from crossdino.tiling import Tile, tile_grid

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class WholeImage:
    """An item of an evaluation on tiles that is none of them: the image of that position in the index as a whole."""

    image: int


class DetectionDataset(Dataset[tuple[Tensor, Target]]):
    """Images, or the tiles of images, and targets of a `DatasetIndex`, prepared for training or for evaluation.

    An item is an image, or, where `data.tile_size` is set, a tile. For evaluation the items are all tiles of the first
    image, then those of the second, and so on; a whole image is there as `dataset[WholeImage(position)]`. An epoch of
    training takes every tile that holds an object, moved by up to a quarter of its size so that seams fall elsewhere in
    each epoch, and a share of the tiles without any; with `data.balance` it takes items of rare classes several times.

    Attributes:
        repeats: how often items are taken where `data.balance` is set; None: each once.
    """

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
            data: sizes, tiles and augmentation.
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
        self._reader = ImageReader(index.records)
        self._tiles: list[tuple[int, Tile]] = []
        self._tiles_of: list[range] = []
        shown: list[NDArray[np.int64]] = []
        for number, record in enumerate(index.records):
            start = len(self._tiles)
            if not data.tile_px and not fits_whole((record.height, record.width)):
                raise too_large(record.path)
            if data.tile_px:
                grid = tile_grid((record.height, record.width), data.tile_px, data.tile_overlap)
                self._tiles += [(number, tile) for tile in grid]
                shown.append(_centres_in_tiles(record, grid) + np.array([start, 0]))
            else:
                objects = np.flatnonzero(~record.iscrowd)
                shown.append(np.stack([np.full_like(objects, number), record.labels[objects]], 1))
            self._tiles_of.append(range(start, len(self._tiles)))
        items, labels = np.concatenate([np.zeros((0, 2), np.int64), *shown]).T
        self._num_objects = np.bincount(items, minlength=len(self._tiles) if data.tile_px else len(index.records))
        # What an epoch of training takes: every image, or every tile with an object.
        self._full = np.flatnonzero(self._num_objects) if data.tile_px else np.arange(len(index.records))
        self._empty = np.flatnonzero(self._num_objects == 0) if data.tile_px else np.zeros(0, np.int64)
        self.repeats: RepeatFactors | None = None
        if train and data.balance:
            place = np.searchsorted(self._full, items)
            self.repeats = repeat_factors(place, labels, len(self._full), len(index.class_names), data.balance)
        self._num_full = self.repeats.length if self.repeats is not None else len(self._full)
        # Without any object all tiles are taken, as all images would be; an epoch of nothing is none.
        wanted = round(data.empty_tiles * self._num_full) if self._num_full else len(self._empty)
        self._num_empty = min(len(self._empty), wanted)
        self._chosen: tuple[int, NDArray[np.int64]] | None = None

    @property
    def epoch(self) -> int:
        """The current epoch."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation and the order of this epoch from now on; call it before iterating."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Number of items of an epoch: images, or tiles; the same in every epoch."""
        if self.train:
            return self._num_full + self._num_empty
        return len(self._tiles) if self.data.tile_px else len(self.index.records)

    def items_of(self, image: int) -> range:
        """The items of the image of that position in the index (of an evaluation)."""
        return self._tiles_of[image] if self.data.tile_px else range(image, image + 1)

    def objects_of(self, item: int | WholeImage) -> int:
        """Number of objects of an item of an evaluation (of a tile: objects whose centre lies in it)."""
        if isinstance(item, WholeImage):
            return int((~self.index.records[item.image].iscrowd).sum())
        return int(self._num_objects[item])

    def most_objects(self) -> int:
        """The largest number of objects of one item (of a tile: objects whose centre lies in it)."""
        return int(self._num_objects.max(initial=0))

    def __getitem__(self, position: int | WholeImage) -> tuple[Tensor, Target]:
        """The image or tile as (3, H, W) float32, normalised, and its target.

        Raises:
            ImageError: the file cannot be read, or is not the one that was indexed.
        """
        place = position.image if isinstance(position, WholeImage) else position
        generator = np.random.default_rng((self.seed, self.epoch, place))
        number, tile, sample = self._read(position, generator if self.train and self.data.tile_px else None)
        record = self.index.records[number]
        original_hw = (record.height, record.width) if tile is None else (tile.height, tile.width)
        if self.train:
            sample = augment(sample, self.data, generator, self._draw_other)
        else:
            hw = resize_hw(sample.hw, self.data.test_short_side, self.data.test_long_side)
            sample = resize(sample, hw)
        boxes = _normalized_cxcywh(sample)
        target = Target(
            boxes_cxcywh=boxes[~sample.ignored],
            labels=sample.labels[~sample.ignored],
            image_id=record.image_id,
            original_hw=original_hw,
            ignored_boxes_cxcywh=boxes[sample.ignored],
            ignored_labels=sample.labels[sample.ignored],
            noise_seed=int(np.random.SeedSequence((self.seed, self.epoch, place, 1)).generate_state(1)[0]),
            origin_xy=(0, 0) if tile is None else (tile.left, tile.top),
        )
        return normalize(sample.image, self.mean, self.std), target

    def _draw_other(self, generator: np.random.Generator) -> Sample:
        """Another item, as it is in the file: what mosaic and copy-paste take from."""
        return self._read(int(generator.integers(len(self))), generator if self.data.tile_px else None)[2]

    def _read(self, position: int | WholeImage, jitter: np.random.Generator | None) -> tuple[int, Tile | None, Sample]:
        """The number of the record, its tile and the pixels and boxes of an item."""
        if isinstance(position, WholeImage):
            return position.image, None, self._read_image(position.image)
        item = int(self._chosen_items()[position]) if self.train else position
        if not self.data.tile_px:
            return item, None, self._read_image(item)
        number, tile = self._tiles[item]
        record = self.index.records[number]
        if jitter is not None:
            places = []
            for start, size, length in ((tile.top, tile.height, record.height), (tile.left, tile.width, record.width)):
                moved = start + int(jitter.integers(-(size // 4), size // 4 + 1))
                places.append(min(max(moved, 0), max(length - size, 0)))
            tile = Tile(places[0], places[1], tile.height, tile.width)
        hw = (min(tile.height, record.height - tile.top), min(tile.width, record.width - tile.left))
        # The boxes are cut with an image that takes no memory; of the file only the window is read. An image that is
        # smaller than a tile is not enlarged: objects keep their size.
        nothing = torch.zeros((), dtype=torch.uint8).expand(3, record.height, record.width)
        sample = crop(_with_boxes(nothing, record), tile.top, tile.left, hw, keep=self.data.tile_keep)
        pixels = self._reader.window(number, tile, neighbours=not self.train)
        return number, tile, dataclasses.replace(sample, image=to_tensor(pixels))

    def _chosen_items(self) -> NDArray[np.int64]:
        """The items of the current epoch of training."""
        if self._chosen is None or self._chosen[0] != self.epoch:
            generator = np.random.default_rng((self.seed, self.epoch))
            empty = generator.choice(self._empty, self._num_empty, replace=False)
            full = self._full if self.repeats is None else self._full[self.repeats.draw(generator)]
            self._chosen = (self.epoch, np.concatenate([full, empty]))
        return self._chosen[1]

    def _read_image(self, number: int) -> Sample:
        """A whole image with its boxes; in training a large JPEG comes smaller, see `_shrink`."""
        record = self.index.records[number]
        shrink = self._shrink(record)
        image = to_tensor(self._reader.whole(number, shrink))
        sample = _with_boxes(image, record)
        boxes = sample.boxes_xyxy * (image.shape[1] / record.height)  # an exact power of two
        return dataclasses.replace(sample, boxes_xyxy=boxes)

    def _shrink(self, record: ImageRecord) -> int:
        """At which fraction of its size an image may be decoded: 1, 2, 4 or 8.

        Only where training makes it smaller by at least twice that factor. Then the filter of the resize still averages
        four pixels or more, and the input differs by less than a grey level on average (by 1.3 to 3 where the decoder
        did all of it, which small objects show). Evaluations are left alone: they must see what a prediction sees.
        """
        data = self.data
        if not self.train or data.mosaic > 0 or data.copy_paste > 0:  # which take windows at other scales
            return 1
        largest = max((*data.train_short_sides, *data.crop_short_sides))
        factor = min(record.height, record.width) / (2 * largest)
        return max(shrink for shrink in (1, 2, 4, 8) if shrink == 1 or shrink <= factor)


def _with_boxes(image: Tensor, record: ImageRecord) -> Sample:
    """An image with its boxes."""
    corners = record.boxes_xywh.copy()
    corners[:, 2:] += corners[:, :2]
    return Sample(image, torch.from_numpy(corners), torch.from_numpy(record.labels), torch.from_numpy(record.iscrowd))


def _centres_in_tiles(record: ImageRecord, tiles: Sequence[Tile]) -> NDArray[np.int64]:
    """(n, 2): a tile, and the class of an object whose centre lies in it; an object may be in several tiles."""
    boxes, labels = record.boxes_xywh[~record.iscrowd], record.labels[~record.iscrowd]
    x, y = boxes[:, 0] + boxes[:, 2] / 2, boxes[:, 1] + boxes[:, 3] / 2
    top, left, height, width = np.array([dataclasses.astuple(tile) for tile in tiles]).T[:, :, None]
    number, place = np.nonzero((x >= left) & (x < left + width) & (y >= top) & (y < top + height))
    return np.stack([number, labels[place]], 1)


def _normalized_cxcywh(sample: Sample) -> Tensor:
    """The boxes as float32 cxcywh in [0, 1]."""
    height, width = sample.hw
    x1, y1, x2, y2 = (sample.boxes_xyxy / torch.tensor([width, height, width, height])).clamp(0, 1).unbind(1)
    return torch.stack([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], dim=1).to(torch.float32)


def _check_settings(data: DataConfig) -> None:
    """Raise InputError for settings with which no image can be prepared."""
    if data.tile_size == "auto":
        raise InputError(
            "setting data.tile_size = auto must be decided by the objects of the training data first: use what "
            "crossdino.data.tile_choice.with_tiles makes of it, or give the tiles' side in pixels"
        )
    sides = (*data.train_short_sides, *data.crop_short_sides, *data.crop_range, data.train_long_side)
    low, high = data.crop_range
    rules = [
        ("train_short_sides", data.train_short_sides, len(data.train_short_sides) > 0, "needs at least one side"),
        ("crop_range", data.crop_range, low <= high, "needs the smaller side first"),
        ("horizontal_flip", data.horizontal_flip, 0 <= data.horizontal_flip <= 1, "must lie between 0 and 1"),
        ("vertical_flip", data.vertical_flip, 0 <= data.vertical_flip <= 1, "must lie between 0 and 1"),
        ("color_jitter", data.color_jitter, 0 <= data.color_jitter <= 1, "must lie between 0 and 1"),
        ("mosaic", data.mosaic, 0 <= data.mosaic <= 1, "must lie between 0 and 1"),
        ("copy_paste", data.copy_paste, 0 <= data.copy_paste <= 1, "must lie between 0 and 1"),
        ("copy_paste_max_px", data.copy_paste_max_px, data.copy_paste_max_px > 0, "must be above 0"),
        ("copy_paste_count", data.copy_paste_count, data.copy_paste_count >= 1, "must be 1 or more"),
        ("tile_size", data.tile_size, data.tile_px >= 0, "must be 0 (whole images) or the tiles' side in pixels"),
        ("tile_keep", data.tile_keep, 0 <= data.tile_keep <= 1, "must lie between 0 and 1"),
        ("empty_tiles", data.empty_tiles, data.empty_tiles >= 0, "must not be negative"),
        ("balance", data.balance, 0 <= data.balance <= 1, "must lie between 0 (each image once) and 1"),
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
    dataset: DetectionDataset,
    batch_size: int,
    *,
    order: Sequence[int | WholeImage] | None = None,
    num_workers: int | None = None,
) -> DataLoader[Any]:
    """A loader of padded batches. The last batch may be smaller.

    Args:
        dataset: the images.
        batch_size: images per batch.
        order: the items to load; None: all, as they are.
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
        worker_init_fn=_leave_signals_to_the_trainer,
        pin_memory=torch.cuda.is_available(),
    )


def _leave_signals_to_the_trainer(_: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the trainer wants to finish its step and save first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
