"""Strip-MLP and CLAP in plain loops, straight from the published layout of names and shapes: slow, only for tests.

Nothing here comes from `crossdino`: windows are found by counting, blended one after the other into a canvas; strips
are sums over three neighbours.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

State = dict[str, Tensor]


def windows_by_counting(size: int, window: int) -> list[int]:
    """Starts of the fewest windows that cover `size`, with the largest common overlap that still reaches the end."""
    size = max(size, window)
    num_windows = 1
    while num_windows * window < size:
        num_windows += 1
    if num_windows == 1:
        return [0]
    overlap = 0
    while num_windows * window - (num_windows - 1) * (overlap + 1) >= size:
        overlap += 1
    starts = []
    for i in range(num_windows):
        start = i * (window - overlap)
        starts.append(start if start + window <= size else size - window)
    return starts


def clap_by_steps(mixer: Callable[[Tensor], Tensor], x: Tensor, window: int) -> Tensor:
    """CLAP as the appendix tells it: window by window, each overlap averaged with what is already there."""
    height, width = x.shape[2:]
    x = functional.pad(x, (0, max(0, window - width), 0, max(0, window - height)))
    rows = []
    for top in windows_by_counting(height, window):
        row: Tensor | None = None
        for left in windows_by_counting(width, window):
            mixed = mixer(x[:, :, top : top + window, left : left + window])
            row = mixed if row is None else _append(row, mixed, left, 3)
        assert row is not None
        rows.append((top, row))
    canvas = rows[0][1]
    for top, row in rows[1:]:
        canvas = _append(canvas, row, top, 2)
    return canvas[:, :, :height, :width]


def _append(canvas: Tensor, piece: Tensor, start: int, dim: int) -> Tensor:
    shared = canvas.shape[dim] - start
    kept = canvas.narrow(dim, 0, start)
    blended = canvas.narrow(dim, start, shared) * 0.5 + piece.narrow(dim, 0, shared) * 0.5
    return torch.cat([kept, blended, piece.narrow(dim, shared, piece.shape[dim] - shared)], dim)


def batch_norm(x: Tensor, state: State, name: str) -> Tensor:
    """Batch normalisation with stored statistics."""
    out = torch.empty_like(x)
    for channel in range(x.shape[1]):
        deviation = (state[f"{name}.running_var"][channel] + 1e-5).sqrt()
        out[:, channel] = (x[:, channel] - state[f"{name}.running_mean"][channel]) / deviation
        out[:, channel] = out[:, channel] * state[f"{name}.weight"][channel] + state[f"{name}.bias"][channel]
    return out


def gelu(x: Tensor) -> Tensor:
    """The exact GELU."""
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1x1 convolution."""
    out = torch.einsum("nchw,dc->ndhw", x, weight.flatten(1))
    return out if bias is None else out + bias[None, :, None, None]


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of stride 1 that keeps the size, one kernel position after the other."""
    _, _, rows, columns = weight.shape
    height, width = x.shape[2:]
    padded = functional.pad(x, (columns // 2, columns // 2, rows // 2, rows // 2))
    out = torch.zeros_like(x)
    for i in range(rows):
        for j in range(columns):
            out += padded[:, :, i : i + height, j : j + width] * weight[:, 0, i, j][None, :, None, None]
    return out


def position_table(table: Tensor, window: int) -> Tensor:
    """(channels, window, window) of table entries for the distance column - row."""
    out = torch.empty(table.shape[1], window, window, dtype=table.dtype)
    for row in range(window):
        for column in range(window):
            out[:, row, column] = table[column - row + window]
    return out


def strips(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int) -> Tensor:
    """Mix each row of `x` (N, parts * groups, rows, columns) with its two neighbours, all columns with all columns."""
    num_maps, channels, num_rows, num_columns = x.shape
    x = x.reshape(num_maps, channels // num_groups, num_groups, num_rows, num_columns)
    weight = weight.reshape(num_groups, num_columns, num_columns, 3)
    out = bias.reshape(num_groups, 1, num_columns).expand_as(x).clone()
    for row in range(num_rows):
        for k in range(3):
            neighbour = row + k - 1
            if 0 <= neighbour < num_rows:
                out[:, :, :, row] += torch.einsum("npgj,gij->npgi", x[:, :, :, neighbour], weight[..., k])
    return out.reshape(num_maps, channels, num_rows, num_columns)


def group_strip_mixing(x: Tensor, state: State, name: str, num_groups: int, window: int) -> Tensor:
    """CGSMM of one window."""
    rows = x + position_table(state[f"{name}.relate_pos_h.embeddings_table"], window)
    rows = strips(rows, state[f"{name}.proj_h.weight"], state[f"{name}.proj_h.bias"], num_groups)
    fused = pointwise(torch.cat([rows, x], 1), state[f"{name}.fuse_h.weight"])
    fused = gelu(batch_norm(fused, state, f"{name}.BN"))
    columns = fused + position_table(state[f"{name}.relate_pos_w.embeddings_table"], window)
    # Columns are the rows of the transposed map.
    columns = strips(columns.transpose(2, 3), state[f"{name}.proj_w.weight"], state[f"{name}.proj_w.bias"], num_groups)
    return columns.transpose(2, 3)


def token_mixing(x: Tensor, state: State, name: str, window: int) -> Tensor:
    """Token mixing of one block."""
    x = gelu(batch_norm(x, state, f"{name}.dwsc.conv_merge.BN"))
    x = depthwise(x, state[f"{name}.dwsc.conv_merge.Conv.weight"])
    name = f"{name}.smlp_block"
    x = pointwise(x, state[f"{name}.mlp.0.weight"], state[f"{name}.mlp.0.bias"])
    x = gelu(batch_norm(x, state, f"{name}.mlp.1"))
    half = x.shape[1] // 2
    far, near = x[:, :half], x[:, half:]

    num_groups = state[f"{name}.proj_h.weight"].shape[0] // window
    mixed = clap_by_steps(lambda piece: group_strip_mixing(piece, state, name, num_groups, window), far, window)
    far = pointwise(torch.cat([far, mixed], 1), state[f"{name}.fuse_w.weight"])

    lying = depthwise(near, state[f"{name}.fc_h.weight"])
    standing = depthwise(near, state[f"{name}.fc_w.weight"])
    pooled = (lying + standing + near).flatten(2).mean(2)[:, :, None, None]
    hidden = gelu(pointwise(pooled, state[f"{name}.reweight.fc1.weight"], state[f"{name}.reweight.fc1.bias"]))
    scores = pointwise(hidden, state[f"{name}.reweight.fc2.weight"], state[f"{name}.reweight.fc2.bias"])
    weighted = torch.empty_like(near)
    for channel in range(half):
        a, b, c = (scores[:, 3 * channel + i].exp() for i in range(3))
        branches = a * standing[:, channel] + b * lying[:, channel] + c * near[:, channel]
        weighted[:, channel] = branches / (a + b + c)
    return pointwise(torch.cat([far, weighted], 1), state[f"{name}.fuse.weight"])


def channel_mixing(x: Tensor, state: State, name: str) -> Tensor:
    """Channel mixing of one block."""
    x = depthwise(x, state[f"{name}.conv_77.weight"])
    mean = x.mean(1, keepdim=True)
    x = (x - mean) / ((x - mean).square().mean(1, keepdim=True) + 1e-5).sqrt()
    x = x * state[f"{name}.layer_norm.weight"][:, None, None] + state[f"{name}.layer_norm.bias"][:, None, None]
    x = gelu(pointwise(x, state[f"{name}.fc1.weight"], state[f"{name}.fc1.bias"]))
    energy = x.square().sum((2, 3), keepdim=True).sqrt()
    share = energy / (energy.mean(1, keepdim=True) + 1e-6)
    gamma, beta = (state[f"{name}.grn.{key}"].flatten()[:, None, None] for key in ("gamma", "beta"))
    x = gamma * (x * share) + beta + x
    return pointwise(x, state[f"{name}.fc2.weight"], state[f"{name}.fc2.bias"])


def strip_mlp_maps(images: Tensor, state: State) -> list[Tensor]:
    """Maps of strides 8, 16, 32 of a network with official names, in evaluation mode."""

    def stage(x: Tensor, number: int, window: int) -> Tensor:
        block = 0
        while f"blocks{number}.{block}.channel_mixing.fc1.weight" in state:
            name = f"blocks{number}.{block}"
            x = x + token_mixing(x, state, f"{name}.token_mixing", window)
            x = x + channel_mixing(x, state, f"{name}.channel_mixing")
            block += 1
        return x

    def halve(x: Tensor, name: str, groups: int = 1) -> Tensor:
        return functional.conv2d(x, state[f"{name}.weight"], stride=2, groups=groups)

    x = stage(functional.conv2d(images, state["patch_embed.weight"], stride=4), 1, 56)
    x = halve(x, "merging1")
    to_third = halve(x, "conv_s1_28", x.shape[1])
    to_fourth = halve(to_third, "conv_s1_14", to_third.shape[1])
    stride_8 = stage(x, 2, 28)
    x = halve(stride_8, "merging2")
    to_fourth_too = halve(x, "conv_s2_14", x.shape[1])
    stride_16 = stage(x + to_third, 3, 14)
    x = halve(stride_16, "merging3")
    stride_32 = batch_norm(stage(x + to_fourth + to_fourth_too, 4, 7), state, "norm")
    return [stride_8, stride_16, stride_32]


def official_state(embed_dim: int, depths: tuple[int, ...], num_classes: int, seed: int) -> State:
    """Random float64 weights under the official names, with statistics and GRN that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def weight(name: str, *shape: int) -> None:
        fan_in = max(1, torch.Size(shape[1:]).numel())
        state[name] = torch.randn(shape, generator=generator, dtype=torch.float64) / fan_in**0.5

    def bias(name: str, *shape: int) -> None:
        state[name] = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3

    def norm(name: str, channels: int, statistics: bool = True) -> None:
        state[f"{name}.weight"] = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
        bias(f"{name}.bias", channels)
        if statistics:
            bias(f"{name}.running_mean", channels)
            state[f"{name}.running_var"] = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.5
            state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    weight("patch_embed.weight", embed_dim, 3, 4, 4)
    for number, (depth, window) in enumerate(zip(depths, (56, 28, 14, 7), strict=True), start=1):
        width = embed_dim * 2 ** (number - 1)
        half = width // 2
        num_groups = width // 4 if width % 80 == 0 else width // 8
        for block in range(depth):
            name = f"blocks{number}.{block}.token_mixing.smlp_block"
            norm(f"{name}.BN", half)
            for axis in "hw":
                weight(f"{name}.proj_{axis}.weight", num_groups * window, window, 1, 3)
                bias(f"{name}.proj_{axis}.bias", num_groups * window)
                weight(f"{name}.fuse_{axis}.weight", half, width, 1, 1)
                bias(f"{name}.relate_pos_{axis}.embeddings_table", 2 * window + 1, half)
            weight(f"{name}.mlp.0.weight", width, width, 1, 1)
            bias(f"{name}.mlp.0.bias", width)
            norm(f"{name}.mlp.1", width)
            weight(f"{name}.fc_h.weight", half, 1, 3, 7)
            weight(f"{name}.fc_w.weight", half, 1, 7, 3)
            weight(f"{name}.reweight.fc1.weight", half // 2, half, 1, 1)
            bias(f"{name}.reweight.fc1.bias", half // 2)
            weight(f"{name}.reweight.fc2.weight", half * 3, half // 2, 1, 1)
            bias(f"{name}.reweight.fc2.bias", half * 3)
            weight(f"{name}.fuse.weight", width, width, 1, 1)
            norm(f"blocks{number}.{block}.token_mixing.dwsc.conv_merge.BN", width)
            weight(f"blocks{number}.{block}.token_mixing.dwsc.conv_merge.Conv.weight", width, 1, 3, 3)
            name = f"blocks{number}.{block}.channel_mixing"
            weight(f"{name}.conv_77.weight", width, 1, 7, 7)
            norm(f"{name}.layer_norm", width, statistics=False)
            weight(f"{name}.fc1.weight", 3 * width, width)
            bias(f"{name}.fc1.bias", 3 * width)
            weight(f"{name}.fc2.weight", width, 3 * width)
            bias(f"{name}.fc2.bias", width)
            bias(f"{name}.grn.gamma", 1, 1, 1, 3 * width)
            bias(f"{name}.grn.beta", 1, 1, 1, 3 * width)
    for number in (1, 2, 3):
        width = embed_dim * 2**number
        weight(f"merging{number}.weight", width, width // 2, 2, 2)
    weight("conv_s1_28.weight", embed_dim * 4, 1, 2, 2)
    weight("conv_s1_14.weight", embed_dim * 8, 1, 2, 2)
    weight("conv_s2_14.weight", embed_dim * 8, 1, 2, 2)
    weight("head.weight", num_classes, embed_dim * 8)
    bias("head.bias", num_classes)
    norm("norm", embed_dim * 8)
    return state
