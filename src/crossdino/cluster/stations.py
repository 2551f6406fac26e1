"""What the nodes of the cluster do: readers open sources and cut them into blocks of tiles, workers look at blocks.

Everything here runs, or is pickled, far from the process that started the run.
"""

from __future__ import annotations

import itertools
import pickle
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from crossdino.allocator import tune_allocator
from crossdino.checkpoints import package_version
from crossdino.errors import InputError
from crossdino.predictor import Prediction, Predictor
from crossdino.results import FileStamp, PictureResult, file_stamp
from crossdino.sources import FailedPicture, Picture, ReadOptions, Source, open_all, open_pictures
from crossdino.tiling import Tile, tile_grid

if TYPE_CHECKING:
    from torch import Tensor

Found = tuple["Tensor", "Tensor", "Tensor"]

# The number of the look at the whole picture, as `Predictor` counts.
_WHOLE = -1


class Part(Picture):
    """A picture of which some tiles are to be looked at, then what was found in them.

    Attributes:
        task: number of its source in the run.
        place: number of the picture among those of its source.
        looks: numbers of its tiles; -1: the whole picture.
        num_looks: of all parts of the picture.
        stamp: of the source's file before it was read.
        stem: what its files are called.
        pixels: of the tiles, unless the worker reads them.
        found: number of the look -> boxes, scores, labels.
        result: of the whole picture, once it is known.
        error: why it cannot be read.
    """

    def __init__(self, picture: Picture, task: int, place: int, stamp: FileStamp | None, stem: str) -> None:
        self.source = picture.source
        self.frame = picture.frame
        self.seconds = picture.seconds
        self.hw = picture.hw
        self.georeference = picture.georeference
        self.windowed = picture.windowed
        self.task = task
        self.place = place
        self.stamp = stamp
        self.stem = stem
        self.looks: list[int] = []
        self.num_looks = 0
        self.pixels: dict[Tile, NDArray[np.uint8]] = {}
        self.found: dict[int, Found] = {}
        self.result: PictureResult | None = None
        self.error: str | None = None
        self.opened: Picture | None = None

    @property
    def whole(self) -> bool:
        """All looks at the picture are in this part."""
        return len(self.looks) == self.num_looks

    def read(self, tile: Tile) -> NDArray[np.uint8]:
        """See `Picture.read`."""
        return self.pixels[tile] if self.opened is None else self.opened.read(tile)

    def read_reduced(self, hw: tuple[int, int]) -> NDArray[np.uint8]:
        """See `Picture.read_reduced`."""
        assert self.opened is not None, "asked of windowed pictures only"
        return self.opened.read_reduced(hw)

    def make_result(self, prediction: Prediction) -> None:
        """Take over what was found in the whole picture."""
        result = PictureResult.from_detections(self, prediction.detections, stem=self.stem)
        self.result = replace(result, capped=prediction.capped)
        self.found = {}


@dataclass(frozen=True)
class End:
    """A source has no more pictures.

    Attributes:
        task: number of the source in the run.
        place: how many pictures it had.
        stamp: of its file before it was read.
        error: why it cannot be read (any further).
        frame: that it broke off at.
    """

    task: int
    place: int
    stamp: FileStamp | None
    error: str | None = None
    frame: int | None = None


@dataclass(frozen=True)
class Plan:
    """How sources are opened and cut.

    Attributes:
        tile_size, tile_overlap, full_image: of the predictor.
        block: looks that go to a worker at once.
        reading: how sources are read.
        most_frames: of a video.
    """

    tile_size: int
    tile_overlap: int
    full_image: bool
    block: int
    reading: ReadOptions
    most_frames: int | None

    def looks(self, hw: tuple[int, int]) -> dict[int, Tile]:
        """The looks at a picture of that size: number -> what is seen."""
        tiles = tile_grid(hw, self.tile_size, self.tile_overlap) if self.tile_size else []
        whole = {_WHOLE: Tile(0, 0, *hw)} if self.full_image or not tiles else {}
        return {**dict(enumerate(tiles)), **whole}


def as_row(block: Sequence[Part | End]) -> Any:
    """A block as a table of one row."""
    import pyarrow

    return pyarrow.table({"block": pyarrow.array([pickle.dumps(list(block), protocol=5)], pyarrow.large_binary())})


def read_blocks(batch: Any, plan: Plan) -> Iterator[Any]:
    """The reading station: groups of sources in, blocks out.

    Args:
        batch: a table with a column `group`, each a pickled list of a number and its `Task`.
        plan: how to cut.

    Yields:
        A table of one row a block. Which looks share a block depends on nothing but the group and the plan.
    """
    block: list[Part | End] = []
    room = plan.block
    for number, task in itertools.chain.from_iterable(map(pickle.loads, batch["group"].to_pylist())):
        stamp = file_stamp(task.source.path)
        place, error, frame = 0, None, None
        for picture in open_all([(task.source, task.first_frame)], plan.reading, plan.most_frames):
            if isinstance(picture, FailedPicture):
                error, frame = _told(picture.error, task.source), picture.frame
                break
            with picture:
                looks = plan.looks(picture.hw)
                left = list(looks)
                while left:
                    part = Part(picture, number, place, stamp, task.stem)
                    part.looks, part.num_looks = left[:room], len(looks)
                    try:
                        # What is too large for one node is read by those who look at it.
                        if not picture.windowed:
                            part.pixels = {looks[look]: picture.read(looks[look]) for look in part.looks}
                    except InputError as problem:
                        part.looks, part.error = left, _told(problem, task.source)
                    block.append(part)
                    left, room = left[len(part.looks) :], room - len(part.looks)
                    if room <= 0:
                        yield as_row(block)
                        block, room = [], plan.block
            place += 1
        block.append(End(number, place, stamp, error, frame))
    yield as_row(block)


def _told(error: InputError, source: Source) -> str:
    """The error, or the reason for it that only a cluster has."""
    if Path(source.path).exists():
        return str(error).replace(source.path, source.name)  # as the user wrote it
    return (
        f"{source.name}: the Ray node {socket.gethostname()} has no file {source.path}; all nodes must find the "
        "files at the same path as the machine that starts the run, e.g. on a shared disk"
    )


class Worker:
    """The looking station: an actor with a model."""

    def __init__(
        self, model: list[Any], settings: Mapping[str, Any], plan: Plan, num_cpus: int, device: str, version: str
    ) -> None:
        """Get the model and make a predictor of it.

        Args:
            model: a reference to it (in a list, so that Ray does not fetch it before).
            settings: arguments of `Predictor`.
            plan: how pictures were cut.
            num_cpus: threads of torch.
            device: where to compute.
            version: of crossdino, where the run was started.

        Raises:
            InputError: the node has another version.
        """
        import ray

        if package_version() != version:
            raise InputError(
                f"the Ray node {socket.gethostname()} has crossdino {package_version()}, the machine that starts the "
                f"run {version}: install the same everywhere"
            )
        tune_allocator()
        torch.set_num_threads(num_cpus)
        self._predictor = Predictor(ray.get(model[0]), device=device, **settings)
        self._plan = plan
        self._opened: tuple[str, Picture] | None = None

    def __call__(self, batch: Any) -> Any:
        """Look at a block.

        Args:
            batch: a table of one row, as `read_blocks` makes it.

        Returns:
            The same without pixels, and with what was found.
        """
        block: list[Part | End] = pickle.loads(batch["block"][0].as_py())
        parts = [item for item in block if isinstance(item, Part)]
        for part in parts:
            if part.windowed and part.error is None:
                self._open(part)
        readable = [part for part in parts if part.error is None]
        memory = _BlockMemory(self._plan)
        for part, prediction in zip(
            readable, self._predictor.stream(readable, on_error="yield", memory=memory), strict=True
        ):
            if prediction.error is not None:
                part.error = _told(prediction.error, part.source)
            elif part.whole:
                part.make_result(prediction)
        for part in parts:
            part.pixels, part.opened = {}, None
        return as_row(block)

    def _open(self, part: Part) -> None:
        """Open the file of a picture that is read window by window; it stays open for the next block of it."""
        try:
            if self._opened is None or self._opened[0] != part.source.path:
                if self._opened is not None:
                    self._opened[1].close()
                    self._opened = None
                self._opened = part.source.path, next(open_pictures(part.source, self._plan.reading))
            part.opened = self._opened[1]
        except InputError as error:
            part.error = _told(error, part.source)


class _BlockMemory:
    """Lets a predictor look at those tiles only that belong to a part, and keeps what it finds there."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def load(self, picture: Picture, num_tiles: int) -> dict[int, Found]:
        """Nothing, for the tiles of other parts."""
        assert isinstance(picture, Part)
        nothing = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        return {number: nothing for number in self._plan.looks(picture.hw) if number not in picture.looks}

    def save(self, picture: Picture, num_tiles: int, number: int, found: Found) -> None:
        """Keep it with the part."""
        assert isinstance(picture, Part)
        picture.found[number] = found


class PartsMemory:
    """Puts the parts of a picture together: a predictor that has it finds everything done."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Take all parts of one picture."""
        self._found = {number: found for part in parts for number, found in part.found.items()}

    def load(self, picture: Picture, num_tiles: int) -> dict[int, Found]:
        """What was found in all tiles."""
        return self._found

    def save(self, picture: Picture, num_tiles: int, number: int, found: Found) -> None:
        """Is not needed."""
        raise AssertionError("nothing is left to look at")
