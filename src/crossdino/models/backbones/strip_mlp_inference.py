"""A block of Strip-MLP without gradients on a CPU: what `StripMLPBlock` defines, in fewer passes over memory.

About half of the plain form's time goes into reading and writing maps. Here, with the channels last throughout:

* batch normalisation behind a 1x1 convolution is folded into it, GELU is applied by the matrix product itself;
* two 1x1 convolutions with nothing between them are one, and one sees a map before it is cropped to windows;
* the strips of local strip mixing and its identity are all linear, so their weighted sum is one 7x7 depthwise
  convolution; the mean that the weights depend on follows from sums over the map and its borders;
* cropping to windows, adding positions, and laying out channels for the strips are one copy;
* global response normalisation is a factor for each channel of an image: it goes into the weights behind it.

All of it is exact up to rounding. Weights are combined anew on every call: nothing can be out of date.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from crossdino.models.backbones.clap import WindowGrid
from crossdino.models.backbones.folding import fold_norm
from crossdino.models.dense import is_eager, is_plain

if TYPE_CHECKING:
    from crossdino.models.backbones.strip_mlp import ChannelMixing, GroupStripMixing, LocalStripMixing, StripMLPBlock

# Where the classes of a block's layers are from; adapters and quantisation put others in their place.
_OWN_MODULES = (
    "crossdino.models.backbones.strip_mlp",
    "timm.layers.drop",
    *(f"torch.nn.modules.{name}" for name in ("batchnorm", "conv", "linear", "normalization")),
)
# Rows whose squares are summed together: their sums stay in the cache.
_ENERGY_ROWS = 1024

# oneDNN's convolution with a fused activation. Builds of torch without oneDNN have none.
_ONEDNN: Any = (
    getattr(torch.ops.mkldnn, "_convolution_pointwise", None) if torch.backends.mkldnn.is_available() else None
)


def suits(block: StripMLPBlock, x: Tensor) -> bool:
    """Whether `process` may be used: no gradients, nothing that watches or records, all as built, fixed statistics."""
    if torch.is_grad_enabled() or block.training or x.device.type != "cpu" or not is_eager(x):
        return False
    if torch._C._len_torch_dispatch_stack() or _dtype(x) not in (torch.float64, torch.float32, torch.bfloat16):
        return False
    mixing = block.token_mixing
    if mixing.norm.training or mixing.project_norm.training or mixing.group_mixing.norm.training:
        return False
    layers = (module for module in block.modules() if module is not block)
    return all(is_plain(layer, type(layer)) and type(layer).__module__ in _OWN_MODULES for layer in layers)


def process(block: StripMLPBlock, x: Tensor, grid: WindowGrid) -> Tensor:
    """What `block(x, grid)` returns.

    Args:
        block: see `suits`.
        x: (N, channels, H, W).
        grid: this stage's windows on (H, W).

    Returns:
        (N, channels, H, W), the channels last in memory; under autocast in its dtype.
    """
    x = x.to(_dtype(x), memory_format=torch.channels_last)
    with torch.autocast("cpu", enabled=False):
        x = _mix_tokens(block, x, grid)
        return _mix_channels(block.channel_mixing, x)


def _dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: bool = False, added: Tensor | None = None
) -> Tensor:
    """`x @ weight.T + bias` for contiguous x (..., in), then GELU or plus `added` (..., out)."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if _ONEDNN is None or x.dtype == torch.float64:
        y = functional.linear(x, weight, bias)
        if gelu:
            torch.ops.aten.gelu_(y)
    else:
        # As a 1x1 convolution of one map with the channels last: 5 to 20 % faster than oneDNN's own linear layer.
        maps = x.flatten(0, -2)[None, :, None].permute(0, 3, 1, 2)
        activation = ("gelu", [], "none") if gelu else ("none", [], None)
        y = _ONEDNN(maps, weight[..., None, None], bias, [0, 0], [1, 1], [1, 1], 1, *activation)
        y = y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], -1)
    return y if added is None else y.add_(added)


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    """Depthwise convolution of (N, C, H, W) that keeps the size."""
    rows, columns = weight.shape[2:]
    return functional.conv2d(x, weight.to(x.dtype), padding=(rows // 2, columns // 2), groups=x.shape[1])


def _mix_tokens(block: StripMLPBlock, x: Tensor, grid: WindowGrid) -> Tensor:
    """The block's first residual, of (N, C, H, W) with the channels last in memory."""
    mixing = block.token_mixing
    half = x.shape[1] // 2
    norm = mixing.norm
    y = functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    y = _tokens(_depthwise(torch.ops.aten.gelu_(y), mixing.depthwise.weight))
    weight, bias = fold_norm(mixing.project.weight.flatten(1), mixing.project.bias, mixing.project_norm)
    far = _linear(y, weight[:half], bias[:half], gelu=True)
    near = _linear(y, weight[half:], bias[half:], gelu=True)

    mixed = _mix_groups(mixing.group_mixing, far, grid)
    near = _mix_locally(mixing.local_mixing, near)
    for_far, for_near = mixing.fuse.weight.flatten(1).split(half, dim=1)
    # `group_fuse` and `fuse` are both linear: one product for both.
    weight = torch.cat([for_far @ mixing.group_fuse.weight.flatten(1), for_near], dim=1)
    return _linear(torch.cat([far, mixed, near], dim=3), weight, added=_tokens(x)).permute(0, 3, 1, 2)


def _tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _mix_groups(mixing: GroupStripMixing, x: Tensor, grid: WindowGrid) -> Tensor:
    """`grid.apply(mixing, ...)` of maps (N, H, W, half)."""
    groups, window, half = mixing.num_groups, grid.window, x.shape[3]
    parts = half // groups
    num_maps = x.shape[0] * grid.num_windows
    windows_shape = (x.shape[0], *grid.layout, window, window, half)
    weight, bias = fold_norm(mixing.fuse.weight.flatten(1), None, mixing.norm)
    for_rows, for_identity = weight.split(half, dim=1)

    # The strips are convolutions along one side of a window; channels last, their memory is (windows, parts, that
    # side, groups, the other side). `lying` and `standing` are views of it as (windows, row, column, parts, groups).
    strips = x.new_empty(num_maps, parts, window, groups, window)
    lying = strips.permute(0, 2, 4, 1, 3)
    grid.crop_into(
        lying.unflatten(0, windows_shape[:3]),
        x.unflatten(3, (parts, groups)),
        mixing.position(mixing.row_position).permute(1, 2, 0).unflatten(2, (parts, groups)).to(x.dtype),
    )
    rows = _strips(strips, mixing.row_mixing).permute(0, 2, 4, 1, 3).reshape(num_maps, window, window, half)
    # 1x1 convolutions see the map before it is cropped: windows overlap.
    identity = grid.crop_into(x.new_empty(windows_shape), _linear(x, for_identity)).flatten(0, 2)
    fused = torch.ops.aten.gelu_(_linear(rows, for_rows, bias, added=identity))

    standing = strips.permute(0, 4, 2, 1, 3)
    position = mixing.position(mixing.column_position).permute(1, 2, 0).unflatten(2, (parts, groups)).to(x.dtype)
    torch.add(fused.unflatten(3, (parts, groups)), position, out=standing)
    columns = _strips(strips, mixing.column_mixing).permute(0, 4, 2, 1, 3)
    return grid.blend(columns.unflatten(0, windows_shape[:3])).flatten(3).contiguous()


def _strips(x: Tensor, conv: torch.nn.Conv2d) -> Tensor:
    """Mix (windows, parts, side, groups, other side) over three neighbours of `side` and the whole other side."""
    maps = x.flatten(3).permute(0, 3, 1, 2)
    bias = None if conv.bias is None else conv.bias.to(x.dtype)
    mixed = functional.conv2d(maps, conv.weight.to(x.dtype), bias, padding=conv.padding, groups=conv.groups)
    return mixed.permute(0, 2, 3, 1).contiguous().view(x.shape)


def _mix_locally(mixing: LocalStripMixing, x: Tensor) -> Tensor:
    """Local strip mixing of maps (N, H, W, C) as one depthwise convolution for each image."""
    precise = torch.float64 if x.dtype == torch.float64 else torch.float32
    # 7x7 kernels of the three: (C, 7, 7).
    standing = functional.pad(mixing.standing.weight[:, 0], (2, 2, 0, 0))
    lying = functional.pad(mixing.lying.weight[:, 0], (0, 0, 2, 2))
    identity = torch.zeros_like(standing)
    identity[:, 3, 3] = 1
    kernels = torch.stack([standing, lying, identity]).to(precise)

    # A zero-padded convolution summed over the map: each weight meets the sum of what it reaches.
    reached = torch.stack(_shifted_sums(torch.stack(_shifted_sums(x, 2, precise)), 2, precise))  # (7, 7, N, C)
    pooled = torch.einsum("ijnc,cij->nc", reached, kernels.sum(0)) / (x.shape[1] * x.shape[2])
    hidden = functional.gelu(
        functional.linear(pooled, mixing.squeeze.weight.to(precise), mixing.squeeze.bias.to(precise))
    )
    scores = functional.linear(hidden, mixing.excite.weight.to(precise), mixing.excite.bias.to(precise))
    shares = scores.unflatten(1, (-1, 3)).softmax(dim=2)
    weights = torch.einsum("nck,kcij->ncij", shares, kernels).unsqueeze(2)
    maps = x.permute(0, 3, 1, 2)
    mixed = [_depthwise(maps[i : i + 1], weights[i]) for i in range(x.shape[0])]
    return _tokens(mixed[0] if len(mixed) == 1 else torch.cat(mixed))


def _shifted_sums(x: Tensor, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """For each shift of -3 ... 3, the sum over the positions of `dim` that are a position plus the shift."""
    size = x.shape[dim]
    total = x.sum(dim, dtype=dtype)
    sums = [total]
    for shift in range(1, min(3, size) + 1):
        beyond = size - shift
        sums.append(total - x.narrow(dim, 0, shift).sum(dim, dtype=dtype))
        sums.insert(0, total - x.narrow(dim, beyond, shift).sum(dim, dtype=dtype))
    nothing = [torch.zeros_like(total)] * (3 - min(3, size))
    return [*nothing, *sums, *nothing]


def _mix_channels(mixing: ChannelMixing, x: Tensor) -> Tensor:
    """The block's second residual, of (N, C, H, W) with the channels last in memory."""
    residual = _tokens(x)
    y = _tokens(_depthwise(x, mixing.depthwise.weight))
    scale, shift = mixing.norm.weight.to(y.dtype), mixing.norm.bias.to(y.dtype)
    y = functional.layer_norm(y, mixing.norm.normalized_shape, scale, shift, mixing.norm.eps)
    norm = mixing.response_norm
    bias = torch.addmv(mixing.reduce.bias, mixing.reduce.weight, norm.beta)
    hidden = _linear(y, mixing.expand.weight, mixing.expand.bias, gelu=True)
    images = [
        _linear(tokens, mixing.reduce.weight * norm.gate(_energy(tokens).sqrt()), bias, added=before)
        for tokens, before in zip(hidden.flatten(1, 2), residual.flatten(1, 2), strict=True)
    ]
    out = images[0] if len(images) == 1 else torch.cat(images)
    return out.view(residual.shape).permute(0, 3, 1, 2)


def _energy(x: Tensor) -> Tensor:
    """Sum of squares of each column of (rows, columns), in at least float32, without a temporary of the same size."""
    if x.dtype == torch.bfloat16:
        # The squares of some thousand rows are summed in float32 and rounded once. Sums that return float32 would
        # copy every square.
        return torch.stack([part.square().sum(0) for part in x.split(2 * _ENERGY_ROWS)]).sum(0, dtype=torch.float32)
    sums = x.new_zeros(min(_ENERGY_ROWS, x.shape[0]), x.shape[1])
    for part in x.split(_ENERGY_ROWS):
        sums[: part.shape[0]].addcmul_(part, part)
    return sums.sum(0)
