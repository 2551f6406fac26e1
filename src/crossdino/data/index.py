"""What a data set is to the rest of the package: images with labelled boxes, and the problems met while reading them.

Only the readers (`coco`, `yolo`, `voc`) know a data set's own category ids: inside the package labels are contiguous
0..K-1, and -1 marks a region that is ignored for every class.
"""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crossdino.errors import InputError

Done = Literal["dropped", "clipped", "joined", "noted", "fatal"]

# Of an image its id, and of its objects the boxes (n, 4) as xywh, labels, areas, and which are regions to ignore.
ObjectsOfImage = tuple[int, NDArray[np.float64], NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]

# The label of regions that are ignored for every class.
IGNORED_LABEL = -1

# Problems of single boxes, which `bad_boxes: error` refuses and `mend` mends.
NO_BOX = "box without its four numbers"
SIZELESS = "box of no size"
OUTSIDE = "box outside its image"
CLIPPED = "box beyond its image's border"
CORNERS = "boxes may be x1 y1 x2 y2 instead of COCO's x y width height"
BAD_CLASS = "class without a name"
BAD_BOXES = (NO_BOX, SIZELESS, OUTSIDE, CLIPPED, CORNERS, BAD_CLASS)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong or worth knowing in a data set.

    Attributes:
        file: the file in which it can be mended: the annotation file, or the image itself.
        annotation: the place in that file, e.g. `annotation 9 of image 7`, `line 3`, `object 2`; empty: the whole file.
        what: the kind of problem, the same words wherever it occurs.
        done: `dropped` (left out), `clipped` (cut at the image's border), `joined` (made one with another entry),
            `noted` (nothing was changed) or `fatal` (the data set is refused).
        detail: the offending value.
    """

    file: str
    annotation: str
    what: str
    done: Done
    detail: str = ""

    def place(self, with_file: bool = True) -> str:
        """Where it is, and the value: `labels/a.txt line 3: class 7`."""
        where = " ".join(part for part in (self.file if with_file else "", self.annotation) if part)
        return ": ".join(part for part in (where, self.detail) if part)


class Problems(list[Problem]):
    """Every problem of a data set, once, in the order in which they were found."""

    def add(self, file: str | Path, annotation: str, what: str, done: Done, detail: str = "") -> None:
        """Append one problem (see `Problem`)."""
        self.append(Problem(str(file), annotation, what, done, detail))

    @property
    def counts(self) -> dict[str, int]:
        """Kind of problem -> how often."""
        counts: dict[str, int] = {}
        for problem in self:
            counts[problem.what] = counts.get(problem.what, 0) + 1
        return counts

    @property
    def fatal(self) -> Problems:
        """Those for which the data set is refused."""
        return Problems(problem for problem in self if problem.done == "fatal")

    def lines(self) -> list[str]:
        """A summary: one line for each kind of problem, with its count and its first three places."""
        groups: dict[tuple[str, Done], list[Problem]] = {}
        for problem in self:
            groups.setdefault((problem.what, problem.done), []).append(problem)
        lines = []
        for (what, done), group in groups.items():
            files = {problem.file for problem in group}
            where = f" in {group[0].file}" if len(files) == 1 else ""
            places = [problem.place(with_file=not where) for problem in group[:3]] + ["..."] * (len(group) > 3)
            places = [place for place in places if place]
            lines.append(f"{what}: {len(group)} {done}{where}" + (f" ({'; '.join(places)})" if places else ""))
        return lines

    def write_csv(self, path: str | Path) -> None:
        """Write all of them as a table with the columns file, annotation, what, done, detail.

        The file appears whole or not at all.

        Args:
            path: the CSV file, UTF-8; its folder is made where it is missing.

        Raises:
            InputError: the file cannot be written.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                # File names may hold bytes that are no UTF-8; they are kept as Python writes them.
                with open(handle, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
                    table = csv.writer(file)
                    table.writerow(("file", "annotation", "what", "done", "detail"))
                    table.writerows((item.file, item.annotation, item.what, item.done, item.detail) for item in self)
                os.chmod(name, 0o644)  # mkstemp's files are for their owner alone
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            raise InputError(f"cannot write the list of problems {path}: {error.strerror or error}") from None


class DataError(InputError):
    """A data set that cannot be used as it is.

    Attributes:
        problems: everything that was found in it, the fatal problems and the others.
    """

    def __init__(self, message: str, problems: Iterable[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = Problems(problems)


def refuse_fatal(source: str | Path, problems: Problems, num_images: int) -> None:
    """End here if a problem is fatal.

    Args:
        source: the data set, for the message.
        problems: everything that was found in it.
        num_images: how many it has, for the message.

    Raises:
        DataError: tells how many there are, names the first of each kind, and holds all of them.
    """
    fatal = problems.fatal
    if fatal:
        lines = "; ".join(line.replace(" fatal", "", 1) for line in fatal.lines())
        raise DataError(
            f"{source} ({num_images} images) cannot be used: {lines}. Restore or correct these, or take them out",
            problems,
        )


@dataclass(frozen=True)
class ImageRecord:
    """One image and its n annotated objects.

    Attributes:
        image_id: the dataset's own id.
        path: the image file.
        width: of the image in pixels, the way the boxes see it.
        height: likewise.
        boxes_xywh: (n, 4) float64, pixels, within the image, of positive width and height.
        labels: (n,) int64 in [0, K), or -1: a region that is ignored for every class (its `iscrowd` is true).
        areas: (n,) float64, the file's `area` (of the object, for size bands), or width x height where it has none.
        iscrowd: (n,) bool, true for regions that are ignored (no training targets).
        apply_exif: whether the file's EXIF orientation belongs to these boxes (see `load_coco`).
    """

    image_id: int
    path: Path
    width: int
    height: int
    boxes_xywh: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    iscrowd: NDArray[np.bool_]
    apply_exif: bool = True


def empty_record(image_id: int, path: Path, size_wh: tuple[int, int] = (0, 0)) -> ImageRecord:
    """A record without objects; (0, 0) stands for a size that is not known yet."""
    blank = np.zeros((0, 4))
    labels = np.zeros(0, np.int64)
    return ImageRecord(image_id, path, *size_wh, blank, labels, np.zeros(0), np.zeros(0, np.bool_))


@dataclass(frozen=True)
class DatasetIndex:
    """A dataset's images and objects, without the pixels.

    Attributes:
        annotations: the file or folder it was read from.
        class_names: the K names, in the order of the labels.
        category_ids: the K category ids of the file, in the order of the labels (for output).
        records: the images in the file's order, those without objects included.
        problems: what was mended, left out, or is worth knowing.
    """

    annotations: Path
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    records: tuple[ImageRecord, ...]
    problems: Problems

    @property
    def num_objects(self) -> int:
        """Number of boxes that are training targets (ignored regions not counted)."""
        return sum(int((~record.iscrowd).sum()) for record in self.records)

    def refuse_bad_boxes(self) -> None:
        """Insist on boxes that need no mending.

        Raises:
            DataError: naming the first boxes that lie outside their image, have no size, no four numbers or no class;
                it holds all problems.
        """
        lines = Problems(problem for problem in self.problems if problem.what in BAD_BOXES).lines()
        if lines:
            raise DataError(
                f"{self.annotations} has boxes that had to be mended: {'; '.join(lines)}. Correct them, or accept this "
                "with --data.bad_boxes mend",
                self.problems,
            )

    @property
    def label_of(self) -> dict[int, int]:
        """Category id of the file -> label; the other way is `category_ids[label]`."""
        return {category_id: label for label, category_id in enumerate(self.category_ids)}

    def to_coco(self) -> dict[str, Any]:
        """The dataset as it was understood (mended boxes, joined categories) in COCO's layout: the ground truth.

        COCO knows crowds of one class only: a region that is ignored for every class becomes one crowd a class.
        """
        images = [
            {"id": record.image_id, "file_name": str(record.path), "width": record.width, "height": record.height}
            for record in self.records
        ]
        objects = ((one.image_id, one.boxes_xywh, one.labels, one.areas, one.iscrowd) for one in self.records)
        return self.in_coco_layout(images, objects)

    def in_coco_layout(self, images: list[dict[str, Any]], objects: Iterable[ObjectsOfImage]) -> dict[str, Any]:
        """Images and objects with this data set's categories, in COCO's layout.

        Args:
            images: the records of the images, as they shall be written.
            objects: of each image, see `ObjectsOfImage`.
        """
        annotations: list[dict[str, Any]] = []
        for image_id, boxes_xywh, labels, areas, iscrowd in objects:
            for place, label in enumerate(labels):
                for category_id in self.category_ids if label == IGNORED_LABEL else (self.category_ids[label],):
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": image_id,
                            "category_id": category_id,
                            "bbox": boxes_xywh[place].tolist(),
                            "area": float(areas[place]),
                            "iscrowd": int(iscrowd[place]),
                        }
                    )
        pairs = zip(self.category_ids, self.class_names, strict=True)
        categories = [{"id": category_id, "name": name} for category_id, name in pairs]
        return {"images": images, "annotations": annotations, "categories": categories}
