"""What a data set is made of, in numbers that matter to a detector of small objects.

Sizes are sqrt(width x height). A size in *network pixels* is what is left of an object after the resize that the data
configuration asks for at prediction: an object of 16 pixels in a 4000 pixel wide image has 5 of them when the image is
shrunk to 1333 pixels. No image is decoded here but for the comparison of duplicates; everything else is computed from
the boxes, with arrays throughout, so that a hundred thousand objects take a second.

Regions that are to be ignored (crowds) are counted and enter nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdino.config import DataConfig
from crossdino.data.duplicates import Duplicates, find_duplicates
from crossdino.data.index import DatasetIndex
from crossdino.data.transforms import resize_hw
from crossdino.tiling import tile_starts

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

QUANTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
SIZE_STEPS_PX = (4, 8, 16, 32, 64, 96)
# Below this many objects a class can hardly be learnt.
RARE_OBJECTS = 10
# Two objects of an image that overlap by more than this (IoU) are hard to tell apart for a detector ...
OVERLAP_IOU = 0.5
# ... and two of one class that overlap by more than this are most often one object that was annotated twice.
TWICE_IOU = 0.9
_HEAT_CELLS = (8, 48)
# Rows of an intermediate array that are computed at once.
_ROWS = 4_000_000


@dataclass(frozen=True)
class SplitObjects:
    """The n objects and N images of a split as arrays.

    Attributes:
        class_names: the K names, in the order of the labels.
        image_hw: (N, 2) height and width in pixels of the file.
        image_of: (n,) the image that an object is in.
        boxes_xywh: (n, 4) in pixels of the file.
        labels: (n,) in [0, K).
        areas: (n,) what size bands go by (the file's own `area`, where it has one).
        num_ignored: regions to ignore, which are not among the objects.
    """

    class_names: tuple[str, ...]
    image_hw: Ints
    image_of: Ints
    boxes_xywh: Floats
    labels: Ints
    areas: Floats
    num_ignored: int

    @classmethod
    def of(cls, index: DatasetIndex) -> SplitObjects:
        """Gather the records of a data set."""
        records = index.records
        lengths = [len(record.labels) for record in records]
        boxes = np.concatenate([np.zeros((0, 4)), *(record.boxes_xywh for record in records)])
        labels = np.concatenate([np.zeros(0, np.int64), *(record.labels for record in records)])
        areas = np.concatenate([np.zeros(0), *(record.areas for record in records)])
        real = ~np.concatenate([np.zeros(0, bool), *(record.iscrowd for record in records)])
        hw = np.array([(record.height, record.width) for record in records], dtype=np.int64).reshape(-1, 2)
        image_of = np.repeat(np.arange(len(records)), lengths)
        return cls(index.class_names, hw, image_of[real], boxes[real], labels[real], areas[real], int((~real).sum()))

    @property
    def num_images(self) -> int:
        """Number of images, those without objects included."""
        return len(self.image_hw)

    def __len__(self) -> int:
        """Number of objects."""
        return len(self.labels)

    @cached_property
    def sizes_px(self) -> Floats:
        """(n,) sqrt(width x height) in pixels of the file."""
        return np.sqrt(self.boxes_xywh[:, 2] * self.boxes_xywh[:, 3])

    @cached_property
    def per_image(self) -> Ints:
        """(N,) objects of each image."""
        return np.bincount(self.image_of, minlength=self.num_images)

    @property
    def most_of_a_class(self) -> int:
        """The largest number of objects of one class in one image."""
        cells = self.image_of * len(self.class_names) + self.labels
        return int(np.unique(cells, return_counts=True)[1].max()) if len(self) else 0

    @cached_property
    def overlaps(self) -> tuple[int, int]:
        """Objects that overlap another one too much.

        Returns:
            How many overlap any other one of their image by more than `OVERLAP_IOU`, and how many overlap one of their
            own class by more than `TWICE_IOU`.
        """
        return _count_overlaps(self)


@dataclass(frozen=True)
class ClassCount:
    """How often a class occurs.

    Attributes:
        name: of the class.
        objects, images: split -> objects of the class, and images that show it.
    """

    name: str
    objects: dict[str, int]
    images: dict[str, int]


@dataclass(frozen=True)
class Inspection:
    """The statistics of a data set.

    Attributes:
        splits: name -> its objects; what is proposed follows the first one, which is `train` where there is one.
        duplicates: twins among the images; None where they were not looked for.
    """

    splits: dict[str, SplitObjects]
    duplicates: Duplicates | None = None

    @property
    def main(self) -> SplitObjects:
        """The split that is trained on."""
        return next(iter(self.splits.values()))

    @cached_property
    def classes(self) -> list[ClassCount]:
        """Every class of any split, in the order in which the splits name them."""
        names = dict.fromkeys(name for split in self.splits.values() for name in split.class_names)
        counts = {name: ClassCount(name, {}, {}) for name in names}
        for key, split in self.splits.items():
            shown = np.unique(self._image_and_label(split), axis=0)[:, 1]
            objects = np.bincount(split.labels, minlength=len(split.class_names))
            images = np.bincount(shown, minlength=len(split.class_names))
            for label, name in enumerate(split.class_names):
                counts[name].objects[key] = int(objects[label])
                counts[name].images[key] = int(images[label])
        return list(counts.values())

    @staticmethod
    def _image_and_label(split: SplitObjects) -> Ints:
        return np.stack([split.image_of, split.labels], axis=1)

    def warnings(self) -> list[str]:
        """What is unusual in the data, one line each."""
        first = next(iter(self.splits))
        lines = []
        for key, split in self.splits.items():
            if not len(split):
                lines.append(f"{key} holds no object")
            near, twice = split.overlaps
            if twice:
                lines.append(
                    f"{key}: {twice} objects overlap one of their class by more than {TWICE_IOU:g} IoU: most often "
                    "the same object annotated twice"
                )
            if near > twice + 0.02 * len(split):
                share = near / len(split)
                lines.append(f"{key}: {share:.0%} of the objects overlap another one by more than {OVERLAP_IOU:g} IoU")
        rare = [item for item in self.classes if 0 < item.objects.get(first, 0) < RARE_OBJECTS]
        if rare:
            listed = ", ".join(f"{item.name} ({item.objects[first]})" for item in rare[:8])
            lines.append(
                f"classes with fewer than {RARE_OBJECTS} objects in {first}: {listed}"
                + (f" and {len(rare) - 8} more" if len(rare) > 8 else "")
            )
        absent = [item.name for item in self.classes if not item.objects.get(first)]
        unseen = [
            name
            for name, item in zip([c.name for c in self.classes], self.classes, strict=True)
            if not item.objects.get(first) and any(item.objects.values())
        ]
        if unseen:
            lines.append(f"classes with objects elsewhere but none in {first}: {', '.join(unseen[:8])}")
        elif absent and len(self.main):
            lines.append(
                f"{len(absent)} classes without any object: {', '.join(absent[:8])}"
                + (", ..." if len(absent) > 8 else "")
            )
        return lines + self._duplicate_warnings()

    def _duplicate_warnings(self) -> list[str]:
        twins, lines = self.duplicates, []
        if twins is None:
            return []
        for key in twins.num_images:
            exact, near = twins.exact_across[key], twins.near_across[key]
            if key != next(iter(twins.num_images)) and exact + near:
                lines.append(
                    f"{exact + near} of {twins.num_images[key]} images of {key} have a twin in another split "
                    f"({exact} the same file, {near} nearly the same picture): what is measured on them is "
                    "partly memory"
                )
            if twins.exact_within[key]:
                lines.append(f"{key}: {twins.exact_within[key]} images are copies of each other (the same file)")
        if twins.unreadable:
            lines.append(f"{len(twins.unreadable)} images cannot be read, e.g. {twins.unreadable[0]}")
        return lines

    def to_dict(self, data: DataConfig) -> dict[str, Any]:
        """All numbers as plain values, for JSON; network pixels are those of `data`."""
        return {
            "splits": {key: split_summary(split, data) for key, split in self.splits.items()},
            "classes": [vars(item) for item in self.classes],
            "duplicates": self.duplicates.to_dict() if self.duplicates is not None else None,
            "warnings": self.warnings(),
        }


def inspect_dataset(
    splits: Mapping[str, DatasetIndex], *, duplicates: bool = True, on_image: Callable[[], None] | None = None
) -> Inspection:
    """The statistics of a data set.

    Args:
        splits: name -> index, the one to train on first (see `crossdino.data.load_dataset`).
        duplicates: compare the images' files, which reads all of them.
        on_image: called after each image that was read.

    Returns:
        The numbers; `Inspection.to_dict` has them for JSON, `crossdino.planner.propose` makes settings of them.
    """
    twins = None
    if duplicates:
        paths = {key: [record.path for record in index.records] for key, index in splits.items()}
        twins = find_duplicates(paths, on_image=on_image)
    return Inspection({key: SplitObjects.of(index) for key, index in splits.items()}, twins)


# --- sizes ---


def network_scales(image_hw: Ints, data: DataConfig) -> Floats:
    """By how much each image is enlarged (above 1) or shrunk at prediction, (N,)."""
    return _scales(image_hw, data, data.test_short_side, data.test_long_side)


def training_scales(image_hw: Ints, data: DataConfig) -> tuple[Floats, Floats]:
    """The smallest and the largest scale of each image while training, (N,) each; the random crop included."""
    low = _scales(image_hw, data, min(data.train_short_sides), data.train_long_side)
    high = _scales(image_hw, data, max(data.train_short_sides), data.train_long_side)
    if data.crop_short_sides:
        # Resize, crop and resize again: the smaller the crop, the more it is enlarged.
        smallest, largest = data.crop_range
        sides = np.minimum(np.full_like(image_hw, data.tile_px), image_hw) if data.tile_px else image_hw
        short = np.maximum(sides.min(1), 1)
        first = (min(data.crop_short_sides) / short, max(data.crop_short_sides) / short)
        second = [
            min(data.train_short_sides) / np.minimum(largest, first[0] * short),
            max(data.train_short_sides) / np.minimum(smallest, first[1] * short),
        ]
        low, high = np.minimum(low, first[0] * second[0]), np.maximum(high, first[1] * second[1])
    return low, high


def _scales(image_hw: Ints, data: DataConfig, short_side: int, long_side: int) -> Floats:
    if data.tile_px:  # tiles are squares of this side even where the image is smaller
        return np.full(len(image_hw), resize_hw((data.tile_px, data.tile_px), short_side, long_side)[0] / data.tile_px)
    sizes, places = np.unique(image_hw, axis=0, return_inverse=True)
    resized = np.array([resize_hw((int(h), int(w)), short_side, long_side) for h, w in sizes]).reshape(-1, 2)
    return np.sqrt(resized.prod(1) / sizes.prod(1))[places.reshape(-1)]


def network_sizes(split: SplitObjects, data: DataConfig) -> Floats:
    """(n,) sqrt(width x height) of the objects in network pixels."""
    return split.sizes_px * network_scales(split.image_hw, data)[split.image_of]


# --- tiles ---


def objects_per_tile(split: SplitObjects, size: int, overlap: int, keep: float) -> Ints:
    """How many objects each tile of each image shows.

    Args:
        split: the objects.
        size: the tiles' side in pixels of the file.
        overlap: least overlap of neighbours in pixels.
        keep: an object counts in a tile that shows at least this share of its area.

    Returns:
        One number a tile, of all images.
    """
    counts: list[Ints] = []
    sizes, places = np.unique(split.image_hw, axis=0, return_inverse=True)
    places = places.reshape(-1)
    group_of = places[split.image_of]
    for number, (height, width) in enumerate(sizes.tolist()):
        top, left = (np.array(tile_starts(length, size, overlap)) for length in (height, width))
        num_tiles = len(top) * len(left)
        images = np.flatnonzero(places == number)
        rank = np.zeros(split.num_images, dtype=np.int64)
        rank[images] = np.arange(len(images))
        mine = np.flatnonzero(group_of == number)
        found = np.zeros(len(images) * num_tiles, dtype=np.int64)
        step = max(1, _ROWS // num_tiles)
        for chunk in (mine[start : start + step] for start in range(0, len(mine), step)):
            x, y, w, h = split.boxes_xywh[chunk].T[:, :, None]
            share_x = (np.minimum(x + w, left + size) - np.maximum(x, left)).clip(0) / w
            share_y = (np.minimum(y + h, top + size) - np.maximum(y, top)).clip(0) / h
            seen = share_y[:, :, None] * share_x[:, None, :] >= max(keep, 1e-9)
            objects, tiles = np.nonzero(seen.reshape(len(chunk), -1))
            found += np.bincount(rank[split.image_of[chunk[objects]]] * num_tiles + tiles, minlength=len(found))
        counts.append(found)
    return np.concatenate([np.zeros(0, np.int64), *counts])


# --- crowding ---


def _count_overlaps(split: SplitObjects) -> tuple[int, int]:
    """See `SplitObjects.overlaps`.

    Two boxes of an IoU above 1/2 overlap along x by more than half of their union, so the second one (by its left side)
    begins within the first half of the first one. Sorted by image and left side, the candidates of a box are a few
    neighbours.
    """
    count = len(split)
    if count < 2:
        return 0, 0
    x, y, w, h = split.boxes_xywh.T
    span = float((x + w).max()) + 1.0
    key = split.image_of * span + x
    order = np.argsort(key, kind="stable")
    key, x, y, w, h = key[order], x[order], y[order], w[order], h[order]
    labels, images = split.labels[order], split.image_of[order]
    ends = np.searchsorted(key, key + w * OVERLAP_IOU, side="right")
    candidates = ends - np.arange(count) - 1
    near, twice = np.zeros(count, bool), np.zeros(count, bool)
    # Not more than _ROWS pairs at once, whatever the crowd.
    blocks = np.searchsorted(np.cumsum(candidates), np.arange(0, candidates.sum() + 1, _ROWS), side="left")
    blocks = np.unique(np.concatenate([blocks, [0, count]]))
    for start, stop in zip(blocks[:-1], blocks[1:], strict=True):
        mine = candidates[start:stop]
        first = np.repeat(np.arange(start, stop), mine)
        second = first + 1 + np.arange(mine.sum()) - np.repeat(np.cumsum(mine) - mine, mine)
        width = np.minimum(x[first] + w[first], x[second] + w[second]) - np.maximum(x[first], x[second])
        height = np.minimum(y[first] + h[first], y[second] + h[second]) - np.maximum(y[first], y[second])
        common = width.clip(0) * height.clip(0)
        iou = common / (w[first] * h[first] + w[second] * h[second] - common)
        iou[images[first] != images[second]] = 0
        over = iou > OVERLAP_IOU
        near[first[over]] = near[second[over]] = True
        over = (iou > TWICE_IOU) & (labels[first] == labels[second])
        twice[first[over]] = twice[second[over]] = True
    return int(near.sum()), int(twice.sum())


# --- summaries ---


def split_summary(split: SplitObjects, data: DataConfig) -> dict[str, Any]:
    """The numbers of one split as plain values; what needs an object is None where there is none."""
    low, high = training_scales(split.image_hw, data)
    sizes = {
        "size_px": split.sizes_px,
        "network_size_px": network_sizes(split, data),
        "smallest_training_size_px": split.sizes_px * low[split.image_of],
        "largest_training_size_px": split.sizes_px * high[split.image_of],
    }
    hw, counts = np.unique(split.image_hw, axis=0, return_counts=True)
    common = np.argsort(-counts, kind="stable")[:10]
    summary: dict[str, Any] = {
        "images": split.num_images,
        "images_without_objects": int((split.per_image == 0).sum()),
        "objects": len(split),
        "ignored_regions": split.num_ignored,
        "classes": len(split.class_names),
        "image_sizes": {
            "distinct": len(hw),
            "common_hw": [[*hw[place].tolist(), int(counts[place])] for place in common],
        },
        "objects_per_image": _spread(split.per_image),
        "most_objects_of_a_class_in_an_image": split.most_of_a_class,
        "overlapping_objects": split.overlaps[0],
        "probably_annotated_twice": split.overlaps[1],
        "aspect_ratio": quantiles(split.boxes_xywh[:, 2] / split.boxes_xywh[:, 3]),
    }
    for name, values in sizes.items():
        summary[name] = quantiles(values)
    for name in ("size_px", "network_size_px"):
        summary[f"{name}_share_below"] = shares_below(sizes[name]) if len(split) else None
    if data.tile_px:
        per_tile = objects_per_tile(split, data.tile_px, data.tile_overlap, data.tile_keep)
        summary["tiles"] = len(per_tile)
        summary["tiles_without_objects"] = int((per_tile == 0).sum())
        summary["objects_per_tile"] = _spread(per_tile)
    return summary


def quantiles(values: NDArray[Any]) -> dict[str, float] | None:
    """The quantiles of `QUANTILES` in percent; None of nothing."""
    if not len(values):
        return None
    return {str(q): float(value) for q, value in zip(QUANTILES, np.percentile(values, QUANTILES), strict=True)}


def shares_below(sizes_px: Floats) -> dict[str, float]:
    """The share of the sizes below each of `SIZE_STEPS_PX`."""
    return {str(step): float((sizes_px < step).mean()) for step in SIZE_STEPS_PX}


def _spread(counts: Ints) -> dict[str, float]:
    """Mean, median, 95 % quantile and largest of some counts."""
    if not len(counts):
        return {"mean": 0.0, "median": 0.0, "95": 0.0, "most": 0}
    median, high = np.percentile(counts, (50, 95))
    return {"mean": float(counts.mean()), "median": float(median), "95": float(high), "most": int(counts.max())}


def heat_map(split: SplitObjects) -> Floats:
    """Where the objects' centres lie in their images: a (cells, cells) grid of counts, rows from the top.

    The more objects, the finer the grid, of 8 to 48 cells a side.
    """
    cells = int(np.clip(np.sqrt(len(split) / 2), *_HEAT_CELLS))
    hw = split.image_hw[split.image_of]
    centres = split.boxes_xywh[:, :2] + split.boxes_xywh[:, 2:] / 2
    return np.histogram2d(centres[:, 1] / hw[:, 0], centres[:, 0] / hw[:, 1], bins=cells, range=((0, 1), (0, 1)))[0]
