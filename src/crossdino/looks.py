"""What a picture is divided into on its way through the network: its tiles, itself, and what was found in each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from crossdino.errors import InputError
from crossdino.postprocessing import Found
from crossdino.sources import Picture
from crossdino.tiling import Tile

# In place of the number of a tile.
WHOLE = -1
NOTHING: Found = (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


@dataclass
class Job:
    """A picture on its way: its looks, and what they have found so far; or why there are no more pictures."""

    picture: Picture
    hw: tuple[int, int] = (0, 0)
    tiles: list[Tile] = field(default_factory=list)
    parts: list[Found] = field(default_factory=list)
    full: Found | None = None
    missing: int = 0
    capped: bool = False
    error: InputError | None = None
    broken_off: Exception | None = None

    def keep(self, number: int, found: Found, capped: bool) -> None:
        """Take over what was found in a tile, or in the whole; `capped` where there may be more."""
        self.capped |= capped
        if number == WHOLE:
            self.full = found
        else:
            self.parts[number] = found


@dataclass
class Look:
    """One passage through the network: of the tile of that number, or of the whole picture."""

    job: Job
    number: int

    @property
    def tile(self) -> Tile:
        """What is looked at."""
        return Tile(0, 0, *self.job.hw) if self.number == WHOLE else self.job.tiles[self.number]


class TileMemory(Protocol):
    """What keeps the detections of tiles until their picture is finished, see `crossdino.results.TileStore`."""

    def load(self, picture: Picture, num_tiles: int) -> dict[int, Found]:
        """Number of the tile (-1: the whole picture) -> what an earlier run has found there."""
        ...

    def save(self, picture: Picture, num_tiles: int, number: int, found: Found) -> None:
        """Keep what was found in a tile."""
        ...
