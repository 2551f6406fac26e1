"""CLAP: run a token mixer that is tied to one map size on maps of any size (the paper's appendix, Eq. 6-9).

The map is cropped into windows of the mixer's size, with an overlap that adapts to the map; every window is mixed with
the same weights; the overlaps are averaged half and half. Nothing here knows what the mixer does.

As printed, Eq. 6-9 do not cover every map (one or two windows divide by a negative or double the overlap, and a
remainder under one half leaves a gap). Our reading, along each axis: `n = ceil(size / window)` windows, overlapping by
`floor((n * window - size) / (n - 1))`, the last one flush with the end of the map. A side shorter than the window is
padded with zeros at its end, and the padding is cut off again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class AxisWindows(NamedTuple):
    """The windows along one axis.

    Attributes:
        starts: first position of each window, ascending.
        overlaps: positions that each window shares with the one before it; 0 for the first.
    """

    starts: tuple[int, ...]
    overlaps: tuple[int, ...]


def clap_windows(size: int, window: int) -> AxisWindows:
    """Lay windows along one axis (Eq. 6-8, in the consistent reading).

    No position lies in more than two windows. Let `d = n * window - size` be the positions to spare, d < window: for a
    window to reach the one after the next, the last one included, `2 * (d // (n - 1)) + d % (n - 1)` would have to
    exceed `window`, but for n >= 3 it is at most d.

    Args:
        size: length of the axis, >= 1; an axis shorter than the window gets one window.
        window: length of a window, >= 1.

    Returns:
        Starts and overlaps.
    """
    num_windows = math.ceil(size / window)
    if num_windows <= 1:
        return AxisWindows((0,), (0,))
    overlap = (num_windows * window - size) // (num_windows - 1)
    starts = [i * (window - overlap) for i in range(num_windows - 1)] + [size - window]
    overlaps = [0] + [starts[i - 1] + window - starts[i] for i in range(1, num_windows)]
    return AxisWindows(tuple(starts), tuple(overlaps))


class _Axis:
    """Where each position of one axis comes from, as index tensors (None: nothing to gather)."""

    def __init__(self, size: int, window: int, device: torch.device) -> None:
        starts, overlaps = clap_windows(size, window)
        self.size = size
        self.window = window
        self.starts, self.overlaps = starts, overlaps
        self.num_windows = len(starts)
        self.padding = max(window - size, 0)
        self.crop_index: Tensor | None = None
        self.first_index: Tensor | None = None
        self.last_index: Tensor | None = None
        if any(overlaps):
            # Positions are counted through all windows, one behind the other. The first and the last window that
            # cover a position are the same one where nothing overlaps.
            first, last = [0] * size, [0] * size
            for i, start in reversed(list(enumerate(starts))):
                first[start : start + window] = range(i * window, (i + 1) * window)
            for i, start in enumerate(starts):
                last[start : start + window] = range(i * window, (i + 1) * window)
            crop = [start + offset for start in starts for offset in range(window)]
            self.crop_index, self.first_index, self.last_index = torch.tensor(crop + first + last, device=device).split(
                [len(crop), size, size]
            )

    def crop(self, x: Tensor, dim: int) -> Tensor:
        return x if self.crop_index is None else x.index_select(dim, self.crop_index)

    def merge(self, x: Tensor, dim: int) -> Tensor:
        if self.first_index is None or self.last_index is None:
            return x
        # Where one window covers a position this is (v + v) / 2 = v, exactly.
        return (x.index_select(dim, self.first_index) + x.index_select(dim, self.last_index)) * 0.5

    def runs(self) -> list[tuple[int, int, int]]:
        """The windows as runs of equal steps: index of a run's first window, how many there are, and their step."""
        step = self.starts[1] - self.starts[0] if self.num_windows > 1 else self.window
        last = self.num_windows - 1
        if self.starts[last] == last * step:
            return [(0, self.num_windows, step)]
        return [(0, last, step), (last, 1, step)]

    def view(self, x: Tensor, dim: int, run: tuple[int, int, int]) -> Tensor:
        """The windows of a run as a view: `dim` counts the windows, and a new last dimension their positions."""
        first, count, step = run
        return x.narrow(dim, self.starts[first], (count - 1) * step + self.window).unfold(dim, self.window, step)

    def blend(self, windows: Tensor, dim: int) -> Tensor:
        """Windows (..., num_windows, window, ...), counted by `dim`, as one axis; overlaps are averaged."""
        if not any(self.overlaps):
            return windows.flatten(dim, dim + 1)
        shape = list(windows.shape)
        shape[dim : dim + 2] = [self.size + self.padding]
        out = windows.new_empty(shape)
        for window, start, overlap in zip(windows.unbind(dim), self.starts, self.overlaps, strict=True):
            if overlap:
                shared = out.narrow(dim, start, overlap)
                torch.add(shared, window.narrow(dim, 0, overlap), out=shared).mul_(0.5)
            own = self.window - overlap
            out.narrow(dim, start + overlap, own).copy_(window.narrow(dim, overlap, own))
        return out


class WindowGrid:
    """The windows of a map of one size; make it once and use it for every mixer that sees that size.

    Attributes:
        window: side of the windows.
        num_windows: how many lie on one map.
    """

    def __init__(self, height: int, width: int, window: int, device: torch.device | str = "cpu") -> None:
        """Lay the grid.

        Args:
            height: of the maps, >= 1.
            width: of the maps, >= 1.
            window: side of the windows: the mixer's map size, >= 1.
            device: where the maps are.
        """
        self.window = window
        self._vertical = _Axis(height, window, torch.device(device))
        self._horizontal = _Axis(width, window, torch.device(device))
        self.num_windows = self._vertical.num_windows * self._horizontal.num_windows

    def crop(self, x: Tensor) -> Tensor:
        """Cut maps into windows.

        Args:
            x: (N, C, height, width).

        Returns:
            (N * num_windows, C, window, window): the windows of the first map row by row, then those of the second...
        """
        vertical, horizontal, window = self._vertical, self._horizontal, self.window
        if vertical.padding or horizontal.padding:
            x = functional.pad(x, (0, horizontal.padding, 0, vertical.padding))
        x = horizontal.crop(vertical.crop(x, 2), 3)
        x = x.unflatten(3, (horizontal.num_windows, window)).unflatten(2, (vertical.num_windows, window))
        return x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)

    def merge(self, windows: Tensor) -> Tensor:
        """Blend windows back into maps (Eq. 9): overlaps are averaged, first along the width, then along the height.

        `merge(crop(x))` is exactly `x`.

        Args:
            windows: (N * num_windows, C, window, window), in the order of `crop`.

        Returns:
            (N, C, height, width).
        """
        vertical, horizontal = self._vertical, self._horizontal
        x = windows.unflatten(0, (-1, vertical.num_windows, horizontal.num_windows))
        x = x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        x = vertical.merge(horizontal.merge(x, 3), 2)
        return x[:, :, : vertical.size, : horizontal.size]

    def crop_into(self, out: Tensor, x: Tensor, added: Tensor | None = None) -> Tensor:
        """`crop` for maps with any number of channel dimensions at the end, without gradients, in one copy.

        Args:
            out: (N, rows of windows, columns of windows, window, window, ...), in any memory layout: it is overwritten.
            x: (N, height, width, ...).
            added: (window, window, ...): added to every window.

        Returns:
            `out`.
        """
        vertical, horizontal = self._vertical, self._horizontal
        if vertical.padding or horizontal.padding:
            trailing = (0, 0) * (x.dim() - 3)
            x = functional.pad(x, (*trailing, 0, horizontal.padding, 0, vertical.padding))
        for down in vertical.runs():
            for across in horizontal.runs():
                piece = horizontal.view(vertical.view(x, 1, down), 2, across).movedim((-2, -1), (3, 4))
                target = out[:, down[0] : down[0] + down[1], across[0] : across[0] + across[1]]
                if added is None:
                    target.copy_(piece)
                else:
                    torch.add(piece, added, out=target)
        return out

    def blend(self, windows: Tensor) -> Tensor:
        """`merge` for the layout of `crop_into`, without gradients.

        Args:
            windows: (N, rows of windows, columns of windows, window, window, ...), in any memory layout.

        Returns:
            (N, height, width, ...).
        """
        vertical, horizontal = self._vertical, self._horizontal
        x = vertical.blend(horizontal.blend(windows.transpose(2, 3), 3), 1)
        return x[:, : vertical.size, : horizontal.size]

    @property
    def layout(self) -> tuple[int, int]:
        """How many rows and columns of windows lie on a map."""
        return self._vertical.num_windows, self._horizontal.num_windows

    def apply(self, mixer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Mix maps of any size with a mixer of the window's size.

        Args:
            mixer: maps (B, C, window, window) to (B, C', window, window).
            x: (N, C, height, width).

        Returns:
            (N, C', height, width).
        """
        return self.merge(mixer(self.crop(x)))
