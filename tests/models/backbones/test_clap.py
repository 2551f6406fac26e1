"""CLAP against a window-by-window reference, and its laws."""

from __future__ import annotations

import math

import pytest
import torch

from crossdino.models.backbones.clap import WindowGrid, clap_windows
from tests.reference.strip_mlp_plain import clap_by_steps, windows_by_counting

WINDOW = 7
SIZES = range(1, 4 * WINDOW + 2)


@pytest.mark.parametrize("window", [1, 2, 7, 14, 56])
def test_windows_cover_every_axis(window):
    for size in range(1, 5 * window + 2):
        starts, overlaps = clap_windows(size, window)
        assert list(starts) == windows_by_counting(size, window)
        assert starts[0] == 0 and overlaps[0] == 0
        assert len(starts) == math.ceil(size / window)
        assert starts[-1] + window == max(size, window)
        for i in range(1, len(starts)):
            assert overlaps[i] == starts[i - 1] + window - starts[i] >= 0
        for i in range(2, len(starts)):
            assert starts[i] >= starts[i - 2] + window  # never more than two windows on one position


def test_windows_by_hand():
    # 18 = 3 * 7 - 3: two overlaps of 1, the last window is moved back by one more.
    assert clap_windows(18, 7) == ((0, 6, 11), (0, 1, 2))
    assert clap_windows(21, 7) == ((0, 7, 14), (0, 0, 0))
    assert clap_windows(8, 7) == ((0, 1), (0, 6))
    assert clap_windows(3, 7) == ((0,), (0,))


def test_merge_undoes_crop_exactly():
    generator = torch.Generator().manual_seed(0)
    for height in SIZES:
        for width in (1, 5, 7, 8, 20, 28, 29):
            x = torch.randn(2, 3, height, width, generator=generator)
            grid = WindowGrid(height, width, WINDOW)
            windows = grid.crop(x)
            assert windows.shape == (2 * grid.num_windows, 3, WINDOW, WINDOW)
            assert torch.equal(grid.merge(windows), x)


def test_mixing_equals_the_window_by_window_reference():
    generator = torch.Generator().manual_seed(1)
    # Depends on the place inside the window in every entry, and changes the number of channels.
    weight = torch.randn(2 * WINDOW**2, 3 * WINDOW**2, generator=generator, dtype=torch.float64)

    def mixer(windows):
        return (windows.flatten(1) @ weight.T).unflatten(1, (2, WINDOW, WINDOW))

    for height in SIZES:
        for width in (1, 6, 7, 9, 16, 22, 27):
            x = torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)
            mixed = WindowGrid(height, width, WINDOW).apply(mixer, x)
            # float64: only the order of sums of some 150 terms differs.
            torch.testing.assert_close(mixed, clap_by_steps(mixer, x, WINDOW), rtol=1e-10, atol=1e-10)


def test_short_sides_are_padded_at_their_end_with_zeros():
    seen = []
    x = torch.ones(1, 1, 2, 3)
    out = WindowGrid(2, 3, 4).apply(lambda windows: seen.append(windows) or windows + 1, x)
    expected = torch.zeros(1, 1, 4, 4)
    expected[:, :, :2, :3] = 1
    assert torch.equal(seen[0], expected)
    assert torch.equal(out, torch.full((1, 1, 2, 3), 2.0))


def test_crop_orders_windows_row_by_row_within_an_image():
    x = torch.arange(2 * 4 * 6.0).reshape(2, 1, 4, 6)
    windows = WindowGrid(4, 6, 2).crop(x)
    assert [int(window[0, 0, 0]) for window in windows] == [0, 2, 4, 12, 14, 16, 24, 26, 28, 36, 38, 40]


def test_gradients_flow_through_overlaps_half_and_half():
    x = torch.zeros(1, 1, 2, 3, requires_grad=True)
    scale = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)  # second window counts three times
    WindowGrid(2, 3, 2).apply(lambda windows: windows * scale, x).sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0].tolist() == [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
