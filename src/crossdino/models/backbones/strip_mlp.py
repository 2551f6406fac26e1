"""Strip-MLP (reference 5 of the paper) with CLAP: an MLP backbone for images of any size.

Token mixing exchanges information along rows and columns within strips three positions wide. Its widest part, the
cascaded group strip mixing, is tied to maps of 56, 28, 14 or 7 positions a side; CLAP (`clap.py`) runs it on windows of
that size, so at 224 x 224 pixels the network is the published one. As in the authors' earlier detector, the windows
hold everything from the first position table to the second strip; the 1x1 convolutions before and after see the whole
map. Official ImageNet checkpoints load (`from_official`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional

from crossdino.errors import InputError
from crossdino.models.backbones import strip_mlp_inference
from crossdino.models.backbones.clap import WindowGrid

# embed_dim and depths of the published variants.
VARIANTS: dict[str, tuple[int, tuple[int, ...]]] = {
    "t_light": (80, (2, 2, 6, 2)),
    "t": (80, (2, 2, 12, 2)),
    "s": (96, (2, 2, 18, 2)),
    "b": (112, (2, 2, 18, 2)),
}

# Map sides of the four stages at 224 pixels: what the weights are tied to.
WINDOWS = (56, 28, 14, 7)
EXPANSION = 3
DROP_PATH = 0.1


class GroupStripMixing(nn.Module):
    """The part of the cascaded group strip mixing (CGSMM) that knows only maps of one size.

    The channels are seen as (parts, groups): channel `c` is part `c // num_groups` of group `c % num_groups`. First,
    all positions of a row are mixed with those of the rows above and below, then all positions of a column with those
    of the columns beside it; each group has weights of its own, which its parts share.
    """

    def __init__(self, channels: int, num_groups: int, window: int) -> None:
        """Make the weights.

        Args:
            channels: of the map, a multiple of `num_groups`.
            num_groups: groups that have weights of their own.
            window: side of the map.
        """
        super().__init__()
        self.num_groups = num_groups
        width = num_groups * window
        self.row_position = nn.Parameter(torch.empty(2 * window + 1, channels))
        self.row_mixing = nn.Conv2d(width, width, (1, 3), padding=(0, 1), groups=num_groups)
        self.fuse = nn.Conv2d(2 * channels, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.column_position = nn.Parameter(torch.empty(2 * window + 1, channels))
        self.column_mixing = nn.Conv2d(width, width, (1, 3), padding=(0, 1), groups=num_groups)
        for table in (self.row_position, self.column_position):
            nn.init.trunc_normal_(table, std=0.02)
        place = torch.arange(window)
        self.register_buffer("distance", place[None, :] - place[:, None] + window, persistent=False)
        self.distance: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Mix maps.

        Args:
            x: (B, channels, window, window).

        Returns:
            (B, channels, window, window).
        """
        num_maps, channels, window, _ = x.shape
        parts = (-1, self.num_groups)

        # As channels of the grouped convolution: (group, column); its rows are the parts, its columns the map's rows.
        rows = (x + self.position(self.row_position)).unflatten(1, parts).permute(0, 2, 4, 1, 3).flatten(1, 2)
        rows = self.row_mixing(rows).unflatten(1, (self.num_groups, window)).permute(0, 3, 1, 4, 2).flatten(1, 2)

        x = functional.gelu(self.norm(self.fuse(torch.cat([rows, x], dim=1))))

        # The same with (group, row) as channels.
        columns = (x + self.position(self.column_position)).unflatten(1, parts).permute(0, 2, 3, 1, 4).flatten(1, 2)
        columns = self.column_mixing(columns).unflatten(1, (self.num_groups, window)).permute(0, 3, 1, 2, 4)
        return columns.reshape(num_maps, channels, window, window)

    def position(self, table: Tensor) -> Tensor:
        """(channels, window, window): at row i, column j the table's entry for the distance j - i."""
        return table[self.distance].permute(2, 0, 1)


class LocalStripMixing(nn.Module):
    """Local strip mixing (LSMM): a lying and a standing strip and the identity, weighted by their content."""

    def __init__(self, channels: int) -> None:
        """Make the weights for maps of `channels` channels."""
        super().__init__()
        self.lying = nn.Conv2d(channels, channels, (3, 7), padding=(1, 3), groups=channels, bias=False)
        self.standing = nn.Conv2d(channels, channels, (7, 3), padding=(3, 1), groups=channels, bias=False)
        self.squeeze = nn.Linear(channels, channels // 2)
        self.excite = nn.Linear(channels // 2, 3 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Mix maps (N, channels, H, W) of any size."""
        lying, standing = self.lying(x), self.standing(x)
        pooled = (standing + lying + x).mean(dim=(2, 3))
        weights = self.excite(functional.gelu(self.squeeze(pooled))).unflatten(1, (-1, 3)).softmax(dim=2)
        for_standing, for_lying, for_identity = weights[..., None, None].unbind(2)
        return standing * for_standing + lying * for_lying + x * for_identity


class TokenMixing(nn.Module):
    """Token mixing of a block: half of the channels through CGSMM in windows, the other half through LSMM."""

    def __init__(self, channels: int, window: int) -> None:
        """Make the weights for maps of `channels` channels and windows of `window` positions a side."""
        super().__init__()
        half = channels // 2
        # The published code groups by this rule.
        num_groups = half // 2 if channels % 80 == 0 else half // 4
        self.norm = nn.BatchNorm2d(channels)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.project = nn.Conv2d(channels, channels, 1)
        self.project_norm = nn.BatchNorm2d(channels)
        self.group_mixing = GroupStripMixing(half, num_groups, window)
        self.group_fuse = nn.Conv2d(channels, half, 1, bias=False)
        self.local_mixing = LocalStripMixing(half)
        self.fuse = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor, grid: WindowGrid) -> Tensor:
        """Mix maps (N, channels, H, W); `grid` lays this stage's windows on (H, W)."""
        x = self.depthwise(functional.gelu(self.norm(x)))
        x = functional.gelu(self.project_norm(self.project(x)))
        far, near = x.chunk(2, dim=1)
        far = self.group_fuse(torch.cat([far, grid.apply(self.group_mixing, far)], dim=1))
        return self.fuse(torch.cat([far, self.local_mixing(near)], dim=1))


class GlobalResponseNorm(nn.Module):
    """Global response normalisation of ConvNeXt V2, over the whole map; starts as the identity."""

    def __init__(self, channels: int) -> None:
        """Make the weights for maps of `channels` channels."""
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise maps (N, H, W, channels)."""
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        # gamma * (x * share) + beta + x with one product over the map.
        return torch.addcmul(self.beta, x, self.gate(norm))

    def gate(self, norm: Tensor) -> Tensor:
        """The factor of each channel, from the norms (..., channels) over an image's map."""
        return 1 + self.gamma * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6))


class ChannelMixing(nn.Module):
    """Channel mixing of a block: a depthwise 7x7 convolution and an MLP over the channels with GRN."""

    def __init__(self, channels: int) -> None:
        """Make the weights for maps of `channels` channels."""
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, EXPANSION * channels)
        self.response_norm = GlobalResponseNorm(EXPANSION * channels)
        self.reduce = nn.Linear(EXPANSION * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Mix maps (N, channels, H, W)."""
        x = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = self.response_norm(functional.gelu(self.expand(x)))
        return self.reduce(x).permute(0, 3, 1, 2)


class StripMLPBlock(nn.Module):
    """Token mixing and channel mixing, each as a residual."""

    def __init__(self, channels: int, window: int) -> None:
        """Make the weights for maps of `channels` channels and windows of `window` positions a side."""
        super().__init__()
        self.token_mixing = TokenMixing(channels, window)
        self.channel_mixing = ChannelMixing(channels)
        self.drop_path = DropPath(DROP_PATH)

    def forward(self, x: Tensor, grid: WindowGrid) -> Tensor:
        """Process maps (N, channels, H, W); `grid` lays this stage's windows on (H, W)."""
        if strip_mlp_inference.suits(self, x):
            return strip_mlp_inference.process(self, x, grid)
        x = x + self.drop_path(self.token_mixing(x, grid))
        return x + self.drop_path(self.channel_mixing(x))


class StripMLPBackbone(nn.Module):
    """Strip-MLP without its classification head, for images of any size.

    Attributes:
        embed_dim: channels of the first stage; each further stage has twice as many.
        depths: blocks of the four stages.
        channels: channels of the three output maps.
        strides: (8, 16, 32).
    """

    def __init__(self, embed_dim: int = 80, depths: tuple[int, ...] = (2, 2, 12, 2)) -> None:
        """Make the network with random weights.

        Args:
            embed_dim: channels of the first stage, a multiple of 8.
            depths: blocks of the four stages.
        """
        super().__init__()
        self.embed_dim = embed_dim
        self.depths = tuple(depths)
        widths = [embed_dim * 2**i for i in range(4)]
        self.channels = tuple(widths[1:])
        self.strides = (8, 16, 32)

        self.patch_embed = nn.Conv2d(3, embed_dim, 4, stride=4, bias=False)
        self.stages = nn.ModuleList(
            nn.ModuleList(StripMLPBlock(width, window) for _ in range(depth))
            for width, window, depth in zip(widths, WINDOWS, self.depths, strict=True)
        )
        self.downsamples = nn.ModuleList(nn.Conv2d(width, 2 * width, 2, stride=2, bias=False) for width in widths[:-1])
        self.shortcut_2_to_3 = _shortcut(widths[1])
        self.shortcut_2_to_4 = _shortcut(widths[2])
        self.shortcut_3_to_4 = _shortcut(widths[2])
        self.norm = nn.BatchNorm2d(widths[-1])

    @classmethod
    def from_variant(cls, variant: str) -> StripMLPBackbone:
        """The published variant `t_light`, `t`, `s` or `b`, with random weights.

        Raises:
            InputError: for another name.
        """
        return cls(*_variant(variant))

    @classmethod
    def from_official(cls, path: str | Path) -> StripMLPBackbone:
        """The network of an official checkpoint; its classification head is left out.

        Args:
            path: a `.pth` file whose key `model` holds the weights.

        Raises:
            InputError: if the file cannot be read or holds anything else than a Strip-MLP.
        """
        return StripMLPClassifier.from_official(path).backbone

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute the outputs of stages 2, 3 and 4.

        Args:
            images: (N, 3, H, W), normalised with ImageNet's mean and std; H and W at least 32. As in the published
                network, pixels beyond a multiple of 32 are lost: pad before.

        Returns:
            Three maps (N, channels[i], H // strides[i], W // strides[i]).
        """
        first, second, third, fourth = self.stages
        down_1, down_2, down_3 = self.downsamples

        if images.device.type == "cpu":
            # Half of the layers mix channels; with the channels last in memory the CPU needs 0.6 of the time.
            images = images.contiguous(memory_format=torch.channels_last)
        x = _run(first, WINDOWS[0], self.patch_embed(images))
        x = down_1(x)
        shortcut_3 = self.shortcut_2_to_3(x)
        shortcut_4 = self.shortcut_2_to_4(shortcut_3)
        stride_8 = _run(second, WINDOWS[1], x)
        x = down_2(stride_8)
        shortcut_4 = shortcut_4 + self.shortcut_3_to_4(x)
        stride_16 = _run(third, WINDOWS[2], x + shortcut_3)
        x = down_3(stride_16)
        stride_32 = self.norm(_run(fourth, WINDOWS[3], x + shortcut_4))
        return [stride_8, stride_16, stride_32]


class StripMLPClassifier(nn.Module):
    """Strip-MLP as an image classifier, as published.

    Attributes:
        backbone: the network up to the last normalisation.
        head: the linear classifier on the mean over all positions.
    """

    def __init__(self, embed_dim: int = 80, depths: tuple[int, ...] = (2, 2, 12, 2), num_classes: int = 1000) -> None:
        """Make the network with random weights.

        Args:
            embed_dim: channels of the first stage, a multiple of 8.
            depths: blocks of the four stages.
            num_classes: outputs.
        """
        super().__init__()
        self.backbone = StripMLPBackbone(embed_dim, depths)
        self.head = nn.Linear(self.backbone.channels[-1], num_classes)

    @classmethod
    def from_variant(cls, variant: str, num_classes: int = 1000) -> StripMLPClassifier:
        """The published variant `t_light`, `t`, `s` or `b`, with random weights.

        Raises:
            InputError: for another name.
        """
        return cls(*_variant(variant), num_classes=num_classes)

    @classmethod
    def from_official(cls, path: str | Path) -> StripMLPClassifier:
        """The network of an official checkpoint.

        Args:
            path: a `.pth` file whose key `model` holds the weights.

        Raises:
            InputError: if the file cannot be read or holds anything else than a Strip-MLP.
        """
        state, unknown = _renamed(_read_official(path))
        try:
            embed_dim = state["backbone.patch_embed.weight"].shape[0]
            num_classes = state["head.weight"].shape[0]
        except (KeyError, IndexError) as error:
            raise _not_strip_mlp(path, "the patch embedding or the head is missing") from error
        if embed_dim == 0 or embed_dim % 8:
            raise _not_strip_mlp(path, f"its patch embedding has {embed_dim} channels, not a multiple of 8")
        blocks = {match[0] for key in state if (match := re.match(r"backbone\.stages\.\d\.\d+\.", key))}
        depths = tuple(sum(block.startswith(f"backbone.stages.{stage}.") for block in blocks) for stage in range(4))
        with torch.device("meta"):  # only the names and shapes
            expected = cls(embed_dim, depths, num_classes).state_dict()
        missing = sorted(expected.keys() - state.keys())
        unexpected = unknown + sorted(state.keys() - expected.keys())
        if missing or unexpected:
            raise _not_strip_mlp(path, f"missing: {_few(missing)}; unexpected: {_few(unexpected)}")
        for key, value in expected.items():
            # Official files carry dimensions of one in GRN and in the squeeze-excitation, which they write as 1x1
            # convolutions; other convolutions have them here too.
            official_shape = state[key].shape
            if [n for n in official_shape if n != 1] != [n for n in value.shape if n != 1]:
                raise _not_strip_mlp(path, f"{key} has shape {tuple(official_shape)}, not {tuple(value.shape)}")
            state[key] = state[key].reshape(value.shape)
        model = cls(embed_dim, depths, num_classes)
        model.load_state_dict(state)
        return model

    def forward(self, images: Tensor) -> Tensor:
        """Classify.

        Args:
            images: (N, 3, H, W), normalised with ImageNet's mean and std.

        Returns:
            (N, num_classes) logits.
        """
        return self.head(self.backbone(images)[-1].mean(dim=(2, 3)))


def _shortcut(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, 2 * channels, 2, stride=2, groups=channels, bias=False)


def _run(blocks: nn.Module, window: int, x: Tensor) -> Tensor:
    grid = WindowGrid(x.shape[2], x.shape[3], window, x.device)
    for block in blocks.children():
        x = block(x, grid)
    return x


def _variant(variant: str) -> tuple[int, tuple[int, ...]]:
    if variant not in VARIANTS:
        raise InputError(f"unknown Strip-MLP variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    return VARIANTS[variant]


# ---- official checkpoints ----

# Prefixes of the official names and ours. Inside blocks the later table applies.
_OFFICIAL_PREFIXES = {
    "patch_embed": "backbone.patch_embed",
    "merging1": "backbone.downsamples.0",
    "merging2": "backbone.downsamples.1",
    "merging3": "backbone.downsamples.2",
    "conv_s1_28": "backbone.shortcut_2_to_3",
    "conv_s1_14": "backbone.shortcut_2_to_4",
    "conv_s2_14": "backbone.shortcut_3_to_4",
    "norm": "backbone.norm",
    "head": "head",
}

_OFFICIAL_BLOCK = {
    "token_mixing.dwsc.conv_merge.BN": "token_mixing.norm",
    "token_mixing.dwsc.conv_merge.Conv": "token_mixing.depthwise",
    "token_mixing.smlp_block.mlp.0": "token_mixing.project",
    "token_mixing.smlp_block.mlp.1": "token_mixing.project_norm",
    "token_mixing.smlp_block.relate_pos_h.embeddings_table": "token_mixing.group_mixing.row_position",
    "token_mixing.smlp_block.proj_h": "token_mixing.group_mixing.row_mixing",
    "token_mixing.smlp_block.fuse_h": "token_mixing.group_mixing.fuse",
    "token_mixing.smlp_block.BN": "token_mixing.group_mixing.norm",
    "token_mixing.smlp_block.relate_pos_w.embeddings_table": "token_mixing.group_mixing.column_position",
    "token_mixing.smlp_block.proj_w": "token_mixing.group_mixing.column_mixing",
    "token_mixing.smlp_block.proh_w": "token_mixing.group_mixing.column_mixing",
    "token_mixing.smlp_block.fuse_w": "token_mixing.group_fuse",
    "token_mixing.smlp_block.fc_h": "token_mixing.local_mixing.lying",
    "token_mixing.smlp_block.fc_w": "token_mixing.local_mixing.standing",
    "token_mixing.smlp_block.reweight.fc1": "token_mixing.local_mixing.squeeze",
    "token_mixing.smlp_block.reweight.fc2": "token_mixing.local_mixing.excite",
    "token_mixing.smlp_block.fuse": "token_mixing.fuse",
    "channel_mixing.conv_77": "channel_mixing.depthwise",
    "channel_mixing.layer_norm": "channel_mixing.norm",
    "channel_mixing.fc1": "channel_mixing.expand",
    "channel_mixing.grn": "channel_mixing.response_norm",
    "channel_mixing.fc2": "channel_mixing.reduce",
}


def _renamed(official: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights under our names, and the official names that mean nothing to us or say again what another said."""
    state: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, value in official.items():
        own_key = _own_key(key)
        if own_key is None or own_key in state:
            unknown.append(key)
        else:
            state[own_key] = value
    return state, unknown


def _own_key(key: str) -> str | None:
    """Our name of an official parameter, None if there is no such parameter."""
    if match := re.fullmatch(r"blocks([1-4])\.(\d+)\.(.+)", key):
        stage, block, rest = match.groups()
        for official, own in _OFFICIAL_BLOCK.items():
            if rest == official or rest.startswith(f"{official}."):
                return f"backbone.stages.{int(stage) - 1}.{block}.{own}{rest.removeprefix(official)}"
        return None
    prefix, dot, rest = key.partition(".")
    return f"{_OFFICIAL_PREFIXES[prefix]}{dot}{rest}" if prefix in _OFFICIAL_PREFIXES else None


def _read_official(path: str | Path) -> Mapping[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: give the path of an official Strip-MLP checkpoint") from error
    except Exception as error:  # a damaged pickle can raise almost anything
        raise InputError(
            f"{path} is not a readable file of weights only (it may be incomplete, or contain code, which is not run): "
            "get the official Strip-MLP checkpoint anew"
        ) from error
    state = content.get("model") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise _not_strip_mlp(path, "it has no weights under the key 'model'")
    return state


def _not_strip_mlp(path: str | Path, reason: str) -> InputError:
    return InputError(f"{path} is not an official Strip-MLP checkpoint ({reason}): give one of the published files")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
