"""Cutting a data set into tiles on disk, for programs that want files.

Training, evaluation and prediction here need none of this: they cut as they read. The tiles are those of
`DetectionDataset` in an evaluation, pixel by pixel and box by box, in COCO's layout. An object of which too little lies
in a tile is kept with `iscrowd: 1`: for our reader and for pycocotools that is a region in which nothing is asked for
and nothing is wrong. Polygons are not cut; only boxes are written.

Every tile is written whole or not at all, and the annotations last; so what is there when the work is stopped is
finished, and the next run goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crossdino.data.images import ImageError
from crossdino.data.index import DatasetIndex, ImageRecord
from crossdino.data.reading import ImageReader
from crossdino.errors import InputError
from crossdino.parallel import in_processes
from crossdino.tiling import Tile, tile_grid
from crossdino.writing import cannot_write, partial_path, write_whole

# The longest stem of a tile's file name in bytes; file systems take 255 with all that is added.
_LONGEST_STEM = 180


@dataclass(frozen=True)
class CutSettings:
    """How a data set is cut.

    Attributes:
        tile_size: side of the square tiles in pixels of the file.
        tile_overlap: least overlap of neighbours in pixels.
        keep: an object of which less than this share lies in a tile is a region to ignore there.
        empty: tiles without objects that are kept, as a share of those with objects; None: all of them.
        image_format: `png` (the very pixels) or `jpg`.
        quality: of JPEG files, 1 to 100.
    """

    tile_size: int
    tile_overlap: int
    keep: float = 0.4
    empty: float | None = None
    image_format: Literal["png", "jpg"] = "png"
    quality: int = 95


@dataclass(frozen=True)
class CutResult:
    """What was cut.

    Attributes:
        annotations: the COCO file.
        num_images: images of the source that were cut, now or before.
        num_cut_before: how many of them had tiles, and all of them, when this run began.
        num_tiles: tiles written, of all images.
        num_empty, num_left_out: tiles without objects among them, and those that were left out.
        num_objects, num_ignored: annotations, and regions to ignore among them.
        broken: one line for each image that cannot be read; its tiles are missing.
    """

    annotations: Path
    num_images: int
    num_cut_before: int
    num_tiles: int
    num_empty: int
    num_left_out: int
    num_objects: int
    num_ignored: int
    broken: tuple[str, ...]


# An image, the folder, and the names and places of the tiles to write.
_Task = tuple[ImageRecord, Path, list[tuple[str, Tile]], CutSettings]


@dataclass(frozen=True)
class _TileFile:
    """A tile to be written, with the objects in it."""

    name: str
    tile: Tile
    boxes_xywh: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    ignored: NDArray[np.bool_]

    @property
    def num_targets(self) -> int:
        return int((~self.ignored).sum())


def cut_dataset(
    index: DatasetIndex,
    output: Path,
    name: str,
    settings: CutSettings,
    *,
    num_processes: int = 1,
    on_image: Callable[[int, int], None] | None = None,
) -> CutResult:
    """Cut a split into `OUTPUT/NAME.json` and the tiles in `OUTPUT/NAME`.

    Args:
        index: the split.
        output: a folder, made where it is missing.
        name: of the split.
        settings: how to cut.
        num_processes: images that are cut at the same time.
        on_image: called as `on_image(done, total)` after each image.

    Returns:
        What was written.

    Raises:
        InputError: there are other tiles or files in that place, it cannot be written to, the disk is full, or the
            settings make no sense.
    """
    _check(settings)
    folder, annotations = output / name, output / f"{name}.json"
    names = source_names(index)
    plan = _plan(index, names, settings)
    _claim(folder, annotations, settings, _digest(index, names))
    tasks: list[_Task] = []
    for record, files in zip(index.records, plan, strict=True):
        missing = [(file.name, file.tile) for file in files if not _is_finished(folder / file.name, record.path)]
        if missing:
            tasks.append((record, folder, missing, settings))
    total, done = len(index.records), len(index.records) - len(tasks)
    broken: dict[int, str] = {}
    if on_image is not None:
        on_image(done, total)
    for _, (image_id, problem) in in_processes(_cut_image, tasks, num_processes):
        done += 1
        if problem is not None:
            broken[image_id] = problem
        if on_image is not None:
            on_image(done, total)
    document = _to_coco(
        index, names, name, [[] if r.image_id in broken else f for r, f in zip(index.records, plan, strict=True)]
    )
    with_objects = {annotation["image_id"] for annotation in document["annotations"] if not annotation["iscrowd"]}
    write_whole(annotations, (json.dumps(document) + "\n").encode())
    num_all = sum(
        len(tile_grid((record.height, record.width), settings.tile_size, settings.tile_overlap))
        for record in index.records
        if record.image_id not in broken
    )
    return CutResult(
        annotations,
        total - len(broken),
        sum(map(bool, plan)) - len(tasks),  # images of which no tile is wanted are not cut at all
        len(document["images"]),
        len(document["images"]) - len(with_objects),
        num_all - len(document["images"]),
        len(document["annotations"]),
        sum(annotation["iscrowd"] for annotation in document["annotations"]),
        tuple(broken[record.image_id] for record in index.records if record.image_id in broken),
    )


def source_names(index: DatasetIndex) -> list[str]:
    """What the source calls its images: `file_name` of a COCO file, else the path below the images' common folder."""
    paths = [str(record.path) for record in index.records]
    if index.annotations.suffix.lower() == ".json" and index.annotations.is_file():
        images = json.loads(index.annotations.read_text(encoding="utf-8-sig"))["images"]
        names = {int(image["id"]): image["file_name"] for image in images}
        return [names[record.image_id] for record in index.records]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [Path(os.path.relpath(path, common)).as_posix() for path in paths]


def _check(settings: CutSettings) -> None:
    rules = [
        ("keep", settings.keep, 0 <= settings.keep <= 1, "a share from 0 to 1"),
        ("empty", settings.empty, settings.empty is None or settings.empty >= 0, "a share of 0 or more, or all"),
        ("format", settings.image_format, settings.image_format in ("png", "jpg"), "png or jpg"),
        ("quality", settings.quality, 1 <= settings.quality <= 100, "1 to 100"),
    ]
    for name, value, holds, remedy in rules:
        if not holds:
            raise InputError(f"--{name} is {value}: give {remedy}")


# --- what to cut ---


def _plan(index: DatasetIndex, names: Sequence[str], settings: CutSettings) -> list[list[_TileFile]]:
    """The tiles of every image that will be written: those with objects, and so many of the others as asked for."""
    used: set[str] = set()
    files: list[list[_TileFile]] = []
    for record, name in zip(index.records, names, strict=True):
        stem = os.fsencode(posixpath.splitext(posixpath.basename(name.replace("\\", "/")))[0])
        stem = stem[:_LONGEST_STEM].decode("utf-8", "ignore") or "image"
        while stem.lower() in used:  # also on file systems to which `a` and `A` are one
            stem += f"_{record.image_id}"
        used.add(stem.lower())
        grid = tile_grid((record.height, record.width), settings.tile_size, settings.tile_overlap)
        files.append([_cut_objects(record, tile, stem, settings) for tile in grid])
    if settings.empty is not None:
        empty = [(i, k) for i, one in enumerate(files) for k, file in enumerate(one) if not file.num_targets]
        num_full = sum(len(one) for one in files) - len(empty)
        wanted = min(len(empty), round(settings.empty * max(num_full, 1)))
        chosen = np.random.default_rng(0).choice(len(empty), wanted, replace=False) if empty else []
        kept = {empty[place] for place in chosen}
        files = [
            [file for k, file in enumerate(one) if file.num_targets or (i, k) in kept] for i, one in enumerate(files)
        ]
    return files


def _cut_objects(record: ImageRecord, tile: Tile, stem: str, settings: CutSettings) -> _TileFile:
    """A tile's file and objects, by the rule of `crossdino.data.transforms.crop`."""
    corners = record.boxes_xywh.copy()
    corners[:, 2:] += corners[:, :2]
    height, width = min(tile.height, record.height - tile.top), min(tile.width, record.width - tile.left)
    clipped = (corners - np.array([tile.left, tile.top] * 2)).clip(0).clip(max=np.array([width, height] * 2))
    sides, whole = clipped[:, 2:] - clipped[:, :2], corners[:, 2:] - corners[:, :2]
    shares = sides.prod(1) / whole.prod(1)
    # A share of exactly `keep` is enough, also where the product is rounded.
    ignored = record.iscrowd | (shares < settings.keep * (1 - 1e-6))
    shown = (sides > 0).all(1)
    boxes = np.concatenate([clipped[:, :2], sides], axis=1)
    name = f"{stem}_y{tile.top:05d}_x{tile.left:05d}.{settings.image_format}"
    areas = record.areas * np.minimum(shares, 1)
    return _TileFile(name, tile, boxes[shown], record.labels[shown], areas[shown], ignored[shown])


def _to_coco(
    index: DatasetIndex, names: Sequence[str], name: str, plan: Sequence[Sequence[_TileFile]]
) -> dict[str, Any]:
    """The tiles and their objects in COCO's layout."""
    tiles = [
        (record, source, file)
        for record, source, files in zip(index.records, names, plan, strict=True)
        for file in files
    ]
    images = [
        {
            "id": number,
            "file_name": f"{name}/{file.name}",
            "width": file.tile.width,
            "height": file.tile.height,
            "source_file_name": source,
            "source_id": record.image_id,
            "origin_xy": [file.tile.left, file.tile.top],
        }
        for number, (record, source, file) in enumerate(tiles, start=1)
    ]
    objects = (
        (number, file.boxes_xywh, file.labels, file.areas, file.ignored)
        for number, (_, _, file) in enumerate(tiles, start=1)
    )
    return index.in_coco_layout(images, objects)


# --- the place ---


def _digest(index: DatasetIndex, names: Sequence[str]) -> str:
    """A fingerprint of the annotations."""
    found = hashlib.sha256(repr((index.class_names, index.category_ids)).encode())
    for record, name in zip(index.records, names, strict=True):
        found.update(repr((record.image_id, name, record.width, record.height, record.apply_exif)).encode())
        for values in (record.boxes_xywh, record.labels, record.areas, record.iscrowd):
            found.update(np.ascontiguousarray(values).tobytes())
    return found.hexdigest()[:20]


def _is_finished(path: Path, source: Path) -> bool:
    """Whether a tile was written after its image was last changed or put there."""
    try:
        state = source.stat()
        return path.stat().st_mtime_ns >= max(state.st_mtime_ns, state.st_ctime_ns)
    except OSError:
        return False


def _claim(folder: Path, annotations: Path, settings: CutSettings, digest: str) -> None:
    """Make the folder and note what is cut into it; refuse a place in which something else lies."""
    note = folder.with_name(f".{folder.name}.cutting.json")
    mine = {**vars(settings), "source": digest}
    remedy = f"choose another --output, or delete {annotations} and {folder}"
    try:
        filled = annotations.exists() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir())))
        before: dict[str, Any] = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {note} ({error}): {remedy}, and {note}") from None
    if filled and not before:
        raise InputError(f"{annotations if annotations.exists() else folder} is there already: {remedy}")
    for key, value in mine.items() if filled else ():
        if before.get(key) != value:
            what = "of other annotations" if key == "source" else f"cut with {key} {before.get(key)}, not {value}"
            raise InputError(f"{folder} holds tiles {what}: {remedy}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; name another --output") from None
    write_whole(note, (json.dumps(mine) + "\n").encode())


# --- the work ---


def _cut_image(task: _Task) -> tuple[int, str | None]:
    """Write the missing tiles of one image."""
    record, folder, files, settings = task
    reader = ImageReader([record])
    wanted = sum(tile.height * tile.width for _, tile in files)
    for name, tile in files:
        try:
            pixels = reader.window(0, tile, neighbours=2 * wanted > record.height * record.width)
        except ImageError as error:
            return record.image_id, str(error)
        cut = Image.fromarray(pixels)
        partial = partial_path(folder / name)
        try:
            if settings.image_format == "png":
                cut.save(partial, format="PNG")
            else:
                # Colours in full: an object of a few pixels has no detail to lose.
                cut.save(partial, format="JPEG", quality=settings.quality, subsampling=0)
            os.replace(partial, folder / name)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise cannot_write(folder / name, error) from None
    return record.image_id, None
