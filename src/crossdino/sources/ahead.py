"""Many sources one after the other, read ahead of their use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from crossdino.errors import InputError
from crossdino.sources.contract import Picture, ReadOptions, Source
from crossdino.sources.opening import open_pictures
from crossdino.tiling import Tile

T = TypeVar("T")


class Ahead(Generic[T]):
    """The items of an iterable, made in a thread while the last ones are used.

    A context manager: leaving it stops the thread after the item that it is at. What the iterable raises is raised by
    `take`, in its turn.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        """Nothing is read before the context is entered.

        Args:
            items: are run through once.
            depth: at most so many items wait to be taken.
        """
        self._items = items
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._finished = False
        # A daemon: a camera that gives no picture any more must not keep the program alive.
        self._thread = threading.Thread(target=self._run, daemon=True, name="reading ahead")

    def __enter__(self) -> Ahead[T]:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join(timeout=1.0)

    def take(self, wait: bool = True) -> T | None:
        """The next item.

        Args:
            wait: until there is one; False: not if it is not ready yet.

        Returns:
            The item; None at the end, or where it is not ready and `wait` is False.
        """
        if self._finished:
            return None
        try:
            item, error = self._ready.get(block=wait)
        except queue.Empty:
            return None
        self._finished = item is None
        if error is not None:
            raise error
        return item

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for item in self._items:
                self._put(item, None)
                if self._stopped.is_set():
                    return
        except BaseException as raised:  # raised again where the items are used
            error = raised
        self._put(None, error)

    def _put(self, item: T | None, error: BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                return self._ready.put((item, error), timeout=0.1)
            except queue.Full:
                continue


class FailedPicture(Picture):
    """What stands in a stream for a source that cannot be opened, so that its error comes out in its turn."""

    def __init__(self, source: Source, error: InputError, frame: int | None = None) -> None:
        """Every use raises `error`."""
        self.source = source
        self.error = error
        self.frame = frame

    @property
    def hw(self) -> tuple[int, int]:  # type: ignore[override]
        """Is not known."""
        raise self.error

    def read(self, tile: Tile) -> NDArray[np.uint8]:
        """Raise the error."""
        raise self.error

    def read_reduced(self, hw: tuple[int, int]) -> NDArray[np.uint8]:
        """Raise the error."""
        raise self.error


def open_all(
    sources: Iterable[tuple[Source, int] | Source],
    options: ReadOptions = ReadOptions(),
    most_frames: int | None = None,
) -> Iterator[Picture]:
    """The pictures of several sources; one that cannot be read (any further) is a `FailedPicture` in its place.

    Args:
        sources: what to open, or with each the number of its first frame.
        options: how to read it.
        most_frames: of each video and camera, only the frames whose number is lower are given; None: all.

    Yields:
        The pictures in order. Whoever takes one closes it.
    """
    for item in sources:
        source, frame = item if isinstance(item, tuple) else (item, 0)
        try:
            for picture in open_pictures(source, options, frame):
                if most_frames is not None and picture.frame is not None and picture.frame >= most_frames:
                    break
                yield picture
                frame = (picture.frame or 0) + 1
        except InputError as error:
            yield FailedPicture(source, error, None if source.kind == "image" else frame)
