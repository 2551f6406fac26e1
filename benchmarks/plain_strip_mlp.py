"""The yardstick of the CLAP-Strip-MLP backbone: the published network and the paper's appendix, written plainly.

NCHW and float32 throughout, windows cut and blended one after the other, GRN spelt as printed; weights by the names of
`crossdino.models.backbones.strip_mlp`, of which nothing is used (see `plain_dino`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

_VARIANTS = {
    "strip_mlp_t_light": (80, (2, 2, 6, 2)),
    "strip_mlp_t": (80, (2, 2, 12, 2)),
    "strip_mlp_s": (96, (2, 2, 18, 2)),
    "strip_mlp_b": (112, (2, 2, 18, 2)),
}
_WINDOWS = (56, 28, 14, 7)


def _starts(size: int, window: int) -> list[int]:
    count = math.ceil(size / window)
    if count <= 1:
        return [0]
    overlap = (count * window - size) // (count - 1)
    return [i * (window - overlap) for i in range(count - 1)] + [size - window]


def _join(pieces: list[Tensor], starts: list[int], dim: int) -> Tensor:
    """Put windows behind each other along one axis; what two of them share is their mean."""
    whole = pieces[0]
    for piece, start in zip(pieces[1:], starts[1:], strict=True):
        shared = whole.shape[dim] - start
        mean = (whole.narrow(dim, start, shared) + piece.narrow(dim, 0, shared)) * 0.5
        rest = piece.narrow(dim, shared, piece.shape[dim] - shared)
        whole = torch.cat((whole.narrow(dim, 0, start), mean, rest), dim)
    return whole


def clap(mixer: Callable[[Tensor], Tensor], x: Tensor, window: int) -> Tensor:
    """Mix a map of any size with a mixer of one size: all windows as one batch, blended one after the other."""
    num_images, _, height, width = x.shape
    x = F.pad(x, (0, max(0, window - width), 0, max(0, window - height)))
    tops, lefts = _starts(height, window), _starts(width, window)
    crops = [x[:, :, top : top + window, left : left + window] for top in tops for left in lefts]
    mixed = list(mixer(torch.cat(crops)).split(num_images))
    rows = [_join(mixed[i * len(lefts) : (i + 1) * len(lefts)], lefts, 3) for i in range(len(tops))]
    return _join(rows, tops, 2)[:, :, :height, :width]


class GroupMixing(nn.Module):
    """Cascaded group strip mixing of maps of one size: rows, then columns."""

    def __init__(self, channels: int, groups: int, window: int) -> None:
        super().__init__()
        self.groups = groups
        width = groups * window
        self.row_position = nn.Parameter(torch.zeros(2 * window + 1, channels))
        self.row_mixing = nn.Conv2d(width, width, (1, 3), padding=(0, 1), groups=groups)
        self.fuse = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.column_position = nn.Parameter(torch.zeros(2 * window + 1, channels))
        self.column_mixing = nn.Conv2d(width, width, (1, 3), padding=(0, 1), groups=groups)

    def _place(self, table: Tensor, window: int) -> Tensor:
        place = torch.arange(window, device=table.device)
        return table[place[None] - place[:, None] + window].permute(2, 0, 1)[None]

    def forward(self, x: Tensor) -> Tensor:
        """Mix maps (B, C, window, window)."""
        num_maps, channels, height, width = x.shape
        parts = (num_maps, channels // self.groups, self.groups, height, width)
        rows = (x + self._place(self.row_position, width)).reshape(parts).permute(0, 2, 4, 1, 3).contiguous()
        rows = self.row_mixing(rows.view(num_maps, self.groups * width, -1, height))
        rows = rows.view(num_maps, self.groups, width, -1, height).permute(0, 3, 1, 4, 2).reshape(x.shape)
        x = F.gelu(self.norm(self.fuse(torch.cat((rows, x), 1))))
        columns = (x + self._place(self.column_position, width)).reshape(parts).permute(0, 2, 3, 1, 4).contiguous()
        columns = self.column_mixing(columns.view(num_maps, self.groups * height, -1, width))
        columns = columns.view(num_maps, self.groups, height, -1, width).permute(0, 3, 1, 2, 4)
        return columns.reshape(x.shape)


class LocalMixing(nn.Module):
    """Local strip mixing: two strips and the identity, weighted by content."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lying = nn.Conv2d(channels, channels, (3, 7), padding=(1, 3), groups=channels, bias=False)
        self.standing = nn.Conv2d(channels, channels, (7, 3), padding=(3, 1), groups=channels, bias=False)
        self.squeeze = nn.Linear(channels, channels // 2)
        self.excite = nn.Linear(channels // 2, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Mix maps (N, C, H, W)."""
        standing, lying = self.standing(x), self.lying(x)
        pooled = F.adaptive_avg_pool2d(standing + lying + x, 1).flatten(1)
        weights = self.excite(F.gelu(self.squeeze(pooled))).reshape(*pooled.shape, 3).softmax(-1)
        weights = weights.permute(2, 0, 1)[..., None, None]
        return standing * weights[0] + lying * weights[1] + x * weights[2]


class TokenMixing(nn.Module):
    """Half of the channels far, in windows; the other half near."""

    def __init__(self, channels: int, window: int) -> None:
        super().__init__()
        half = channels // 2
        self.window = window
        self.norm = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.project = nn.Conv2d(channels, channels, 1)
        self.project_norm = nn.BatchNorm2d(channels)
        self.group_mixing = GroupMixing(half, half // 2 if channels % 80 == 0 else half // 4, window)
        self.group_fuse = nn.Conv2d(channels, half, 1, bias=False)
        self.local_mixing = LocalMixing(half)
        self.fuse = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix maps (N, C, H, W)."""
        x = self.depthwise(F.gelu(self.norm(x)))
        x = F.gelu(self.project_norm(self.project(x)))
        far, near = x.chunk(2, 1)
        far = self.group_fuse(torch.cat((far, clap(self.group_mixing, far, self.window)), 1))
        return self.fuse(torch.cat((far, self.local_mixing(near)), 1))


class ChannelMixing(nn.Module):
    """Depthwise 7x7, then an MLP with GRN over the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 3 * channels)
        self.response_norm = nn.ParameterDict({"gamma": torch.zeros(3 * channels), "beta": torch.zeros(3 * channels)})
        self.reduce = nn.Linear(3 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Mix maps (N, C, H, W)."""
        x = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = F.gelu(self.expand(x))
        norm = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        share = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        x = self.response_norm["gamma"] * (x * share) + self.response_norm["beta"] + x
        return self.reduce(x).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Token mixing and channel mixing as residuals."""

    def __init__(self, channels: int, window: int) -> None:
        super().__init__()
        self.token_mixing = TokenMixing(channels, window)
        self.channel_mixing = ChannelMixing(channels)
        self.drop_path = DropPath(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Process maps (N, C, H, W)."""
        x = x + self.drop_path(self.token_mixing(x))
        return x + self.drop_path(self.channel_mixing(x))


def _shortcut(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, 2 * channels, 2, stride=2, groups=channels, bias=False)


class _Body(nn.Module):
    def __init__(self, width: int, depths: tuple[int, ...]) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(4)]
        self.patch_embed = nn.Conv2d(3, width, 4, stride=4, bias=False)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(channels, window) for _ in range(depth)))
            for channels, window, depth in zip(widths, _WINDOWS, depths, strict=True)
        )
        self.downsamples = nn.ModuleList(nn.Conv2d(one, 2 * one, 2, stride=2, bias=False) for one in widths[:-1])
        self.shortcut_2_to_3 = _shortcut(widths[1])
        self.shortcut_2_to_4 = _shortcut(widths[2])
        self.shortcut_3_to_4 = _shortcut(widths[2])
        self.norm = nn.BatchNorm2d(widths[-1])

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.downsamples[0](self.stages[0](self.patch_embed(images)))
        to_third = self.shortcut_2_to_3(x)
        second = self.stages[1](x)
        x = self.downsamples[1](second)
        to_fourth = self.shortcut_2_to_4(to_third) + self.shortcut_3_to_4(x)
        third = self.stages[2](x + to_third)
        fourth = self.stages[3](self.downsamples[2](third) + to_fourth)
        return [second, third, self.norm(fourth)]


class PlainStripMLP(nn.Module):
    """Strip-MLP with CLAP by its name in the configuration; maps of strides 8, 16 and 32."""

    def __init__(self, name: str) -> None:
        super().__init__()
        width, depths = _VARIANTS[name]
        self.channels = [2 * width, 4 * width, 8 * width]
        self.body = _Body(width, depths)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of normalised images (N, 3, H, W), filled up to multiples of 32 pixels."""
        height, width = images.shape[-2:]
        return self.body(F.pad(images, (0, -width % 32, 0, -height % 32)))

    def train(self, mode: bool = True) -> PlainStripMLP:
        """The statistics of the batch normalisation are never changed, as in the detector."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self
