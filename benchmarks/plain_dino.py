"""The yardstick: DINO-4scale, and Cross-DINO, written plainly, at the cost of the official code.

Deformable attention is `grid_sample` level by level with the samples stacked and kept for the backward pass; maps are
NCHW, everything is float32; BatchNorm is an operation of its own; nothing is fused, cached or left out: positions are
computed in every forward pass, padding is masked whether there is any or not, the box head runs over all tokens,
self-attention is `nn.MultiheadAttention` with the denoising queries behind a mask of all pairs.

It takes the weights of a `crossdino.CrossDINO` by the same names and gives the same results (`padding="shared"`), but
uses nothing of the package: making the package faster must not make the yardstick faster. Keep it as it is.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from benchmarks.plain_strip_mlp import PlainStripMLP

Shapes = list[tuple[int, int]]


@dataclass
class Prediction:
    """Class logits (N, Q, K) and boxes (N, Q, 4), normalised cxcywh, of one supervised place."""

    pred_logits: Tensor
    pred_boxes: Tensor


@dataclass
class Noise:
    """Denoising queries: labels (N, D), boxes (N, D, 4) cxcywh, `hidden` (D + Q, D + Q) true where none may look.

    `num_groups` groups follow each other, each of `D / num_groups` queries: first the positives, then the negatives.
    """

    labels: Tensor
    boxes: Tensor
    hidden: Tensor
    num_groups: int


@dataclass
class Output:
    """Decoder layers, first to last; the chosen proposals; the decoder layers of the denoising queries."""

    layers: list[Prediction]
    proposals: Prediction
    noisy_layers: list[Prediction]


class PlainResNet(nn.Module):
    """torchvision's ResNet with frozen BatchNorm; stem and first stage are not trained."""

    def __init__(self, name: str) -> None:
        super().__init__()
        network = getattr(torchvision.models, name)(norm_layer=FrozenBatchNorm2d)
        self.channels = [network.fc.in_features // 4, network.fc.in_features // 2, network.fc.in_features]
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
        self.body = nn.ModuleDict({name: getattr(network, name) for name in names})
        for name in names[:5]:
            self.body[name].requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps of strides 8, 16 and 32 of images (N, 3, H, W)."""
        maps = []
        x = images
        for name, layer in self.body.items():
            x = layer(x)
            if name in ("layer2", "layer3", "layer4"):
                maps.append(x)
        return maps


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: Tensor) -> Tensor:
        """(..., widths[0]) to (..., widths[-1])."""
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number < len(self.layers) - 1:
                x = F.relu(x)
        return x


def sample(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Deformable DETR's Eq. 3 with one `grid_sample` a level; all samples exist at once.

    Args:
        value: (N, L, heads, C / heads).
        shapes: of the levels.
        locations: (N, Q, heads, levels, points, 2) in [0, 1].
        weights: (N, Q, heads, levels, points).
    """
    num_images, _, heads, width = value.shape
    num_queries, _, levels, points = locations.shape[1:5]
    grids = 2 * locations - 1
    samples = []
    for level, tokens in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        maps = tokens.flatten(2).transpose(1, 2).reshape(num_images * heads, width, *shapes[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(num_images * heads, 1, num_queries, levels * points)
    output = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)
    return output.view(num_images, heads * width, num_queries).transpose(1, 2).contiguous()


class DeformableAttention(nn.Module):
    """Deformable attention with its four projections."""

    def __init__(self, dim: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, references: Tensor, tokens: Tensor, shapes: Shapes, padding: Tensor) -> Tensor:
        """Attend around `references` (N, Q, levels, 2 or 4); `padding` (N, L) is true on padding."""
        num_images, num_queries, _ = queries.shape
        value = self.value_proj(tokens).masked_fill(padding[..., None], 0.0)
        value = value.view(num_images, -1, self.heads, value.shape[-1] // self.heads)
        sizes = (num_images, num_queries, self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(queries).view(*sizes, 2)
        weights = self.attention_weights(queries).view(*sizes[:3], -1).softmax(-1).view(sizes)
        if references.shape[-1] == 2:
            widths_heights = torch.tensor([(w, h) for h, w in shapes], dtype=queries.dtype, device=queries.device)
            locations = references[:, :, None, :, None] + offsets / widths_heights[None, None, None, :, None]
        else:
            centre, size = references[:, :, None, :, None, :2], references[:, :, None, :, None, 2:]
            locations = centre + offsets / self.points * size * 0.5
        return self.output_proj(sample(value, shapes, locations, weights))


class EncoderLayer(nn.Module):
    """Post-norm, ReLU."""

    def __init__(self, dim: int, hidden: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(dim, levels, heads, points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, positions: Tensor, references: Tensor, shapes: Shapes, padding: Tensor) -> Tensor:
        """Tokens (N, L, C) to tokens."""
        x = self.norm1(x + self.self_attn(x + positions, references, x, shapes, padding))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class DecoderLayer(nn.Module):
    """Post-norm, ReLU; self-attention weighs all pairs."""

    def __init__(self, dim: int, hidden: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.cross_attn = DeformableAttention(dim, levels, heads, points)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        references: Tensor,
        memory: Tensor,
        shapes: Shapes,
        padding: Tensor,
        hidden: Tensor | None,
    ) -> Tensor:
        """Queries (N, Q, C) to queries; `hidden` is true where a query may not look."""
        q = x + positions
        x = self.norm2(x + self.self_attn(q, q, x, attn_mask=hidden)[0])
        x = self.norm1(x + self.cross_attn(x + positions, references, memory, shapes, padding))
        return self.norm3(x + self.linear2(F.relu(self.linear1(x))))


class Stack(nn.Module):
    """Encoder or decoder: its layers, and for the decoder the last norm and the anchors' embedding."""

    def __init__(self, layer: type[nn.Module], count: int, decoder_dim: int | None, *arguments: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(*arguments) for _ in range(count))
        if decoder_dim is not None:
            self.norm = nn.LayerNorm(decoder_dim)
            self.ref_point_head = MLP([2 * decoder_dim, decoder_dim, decoder_dim])


class CrossCoding(nn.Module):
    """CCTM (Eq. 1-3 of Cross-DINO), gate by gate."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        for name in ("encoder", "backbone"):
            gate = nn.ModuleDict({"linear": nn.Linear(dim, dim), "norm": nn.LayerNorm(dim)})
            grn = nn.ParameterDict({"gamma": torch.zeros(hidden), "beta": torch.zeros(hidden)})
            reweight = {"linear1": nn.Linear(dim, hidden), "grn": grn, "linear2": nn.Linear(hidden, dim)}
            self.add_module(f"gate_{name}", gate)
            self.add_module(f"reweight_{name}", nn.ModuleDict(reweight))

    @staticmethod
    def _gate(part: Any, x: Tensor) -> Tensor:
        return torch.sigmoid(F.gelu(part["norm"](part["linear"](x))))

    @staticmethod
    def _reweight(part: Any, x: Tensor, padding: Tensor) -> Tensor:
        x = F.gelu(part["linear1"](x))
        norm = x.masked_fill(padding[..., None], 0.0).norm(p=2, dim=1, keepdim=True)
        share = norm / (norm.mean(-1, keepdim=True) + 1e-6)
        x = part["grn"]["gamma"] * (x * share) + part["grn"]["beta"] + x
        return torch.sigmoid(part["linear2"](x))

    def forward(self, tokens: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        """Fuse tokens before and after the encoder, both (N, L, C)."""
        parts = dict(self.named_children())
        memory_coded = memory + tokens * (1 - self._gate(parts["gate_encoder"], memory))
        tokens_coded = tokens + memory * (1 - self._gate(parts["gate_backbone"], tokens))
        gate_encoder = self._reweight(parts["reweight_encoder"], memory_coded, padding)
        gate = self._reweight(parts["reweight_backbone"], tokens_coded, padding) * gate_encoder
        return 2 * memory * gate + tokens * (1 - gate)


class PlainDINO(nn.Module):
    """The detector.

    Args:
        config: a `crossdino.config.ModelConfig` (only read) with a ResNet or Strip-MLP, `fusion` cctm or none.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        dim, levels = config.hidden_dim, config.num_feature_levels
        is_strip = config.backbone.startswith("strip_mlp_")
        self.backbone = PlainStripMLP(config.backbone) if is_strip else PlainResNet(config.backbone)
        channels = [*self.backbone.channels, self.backbone.channels[-1]]
        self.input_proj = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, dim, 1) if level < 3 else nn.Conv2d(width, dim, 3, stride=2, padding=1),
                nn.GroupNorm(32, dim),
            )
            for level, width in enumerate(channels[:levels])
        )
        self.level_embed = nn.Parameter(torch.empty(levels, dim))
        arguments = (dim, config.feedforward_dim, levels, config.num_heads, config.num_points)
        self.encoder = Stack(EncoderLayer, config.num_encoder_layers, None, *arguments)
        self.fusion = CrossCoding(dim, config.fusion_hidden_dim) if config.fusion == "cctm" else None
        self.enc_output = nn.Linear(dim, dim)
        self.enc_output_norm = nn.LayerNorm(dim)
        self.tgt_embed = nn.Embedding(config.num_queries, dim)
        self.label_enc = nn.Embedding(config.num_classes + 1, dim)
        self.decoder = Stack(DecoderLayer, config.num_decoder_layers, dim, *arguments)
        self.class_embed = nn.Linear(dim, config.num_classes)
        self.bbox_embed = MLP([dim, dim, dim, 4])
        self.enc_class_embed = copy.deepcopy(self.class_embed)
        self.enc_bbox_embed = copy.deepcopy(self.bbox_embed)

    def forward(self, images: Tensor, padding: Tensor | None = None, noise: Noise | None = None) -> Output:
        """Detect in normalised images (N, 3, H, W); `padding` (N, H, W) is true on padding."""
        if padding is None:
            padding = torch.zeros((len(images), *images.shape[-2:]), dtype=torch.bool, device=images.device)
        maps = self.backbone(images)
        projected = [
            projection(maps[level] if level < len(maps) else maps[-1])
            for level, projection in enumerate(self.input_proj)
        ]
        shapes = [(one.shape[-2], one.shape[-1]) for one in projected]
        masks = [F.interpolate(padding[None].float(), size=shape)[0].to(torch.bool) for shape in shapes]
        positions = [_sine(mask, self.config.hidden_dim).flatten(2).transpose(1, 2) for mask in masks]
        positions = torch.cat([one + self.level_embed[level] for level, one in enumerate(positions)], dim=1)
        tokens = torch.cat([one.flatten(2).transpose(1, 2) for one in projected], dim=1)
        mask = torch.cat([one.flatten(1) for one in masks], dim=1)
        ratios = torch.stack(
            [
                torch.stack(((~one[:, 0]).sum(1) / one.shape[2], (~one[:, :, 0]).sum(1) / one.shape[1]), -1)
                for one in masks
            ],
            dim=1,
        )
        memory = tokens
        references = _references(shapes, ratios)
        for layer in self.encoder.layers:
            memory = layer(memory, positions, references, shapes, mask)
        if self.fusion is not None:
            memory = self.fusion(tokens, memory, mask)
        proposals, anchors = self.select(memory, mask, masks)

        queries = self.tgt_embed.weight[None].expand(len(images), -1, -1)
        hidden = None
        if noise is not None:
            anchors = torch.cat((_inverse_sigmoid(noise.boxes).sigmoid(), anchors), dim=1)
            queries = torch.cat((self.label_enc(noise.labels), queries), dim=1)
            hidden = noise.hidden
        outputs, references = self.decode(queries, anchors, memory, shapes, mask, ratios, hidden)
        layers, noisy_layers = [], []
        num_noisy = 0 if noise is None else noise.labels.shape[1]
        for output, reference in zip(outputs, references, strict=True):
            boxes = (self.bbox_embed(output) + _inverse_sigmoid(reference)).sigmoid()
            logits = self.class_embed(output)
            layers.append(Prediction(logits[:, num_noisy:], boxes[:, num_noisy:]))
            noisy_layers.append(Prediction(logits[:, :num_noisy], boxes[:, :num_noisy]))
        return Output(layers, proposals, noisy_layers if noise is not None else [])

    def select(self, memory: Tensor, mask: Tensor, masks: list[Tensor]) -> tuple[Prediction, Tensor]:
        """The proposals with the best scores, and their boxes as the decoder's anchors."""
        proposals = []
        for level, padding in enumerate(masks):
            height, width = padding.shape[1:]
            y, x = torch.meshgrid(
                torch.arange(height, device=mask.device), torch.arange(width, device=mask.device), indexing="ij"
            )
            valid = torch.stack(((~padding[:, 0]).sum(1), (~padding[:, :, 0]).sum(1)), -1)
            centres = (torch.stack((x, y), -1)[None] + 0.5) / valid[:, None, None]
            sides = torch.ones_like(centres) * 0.05 * 2.0**level
            proposals.append(torch.cat((centres, sides), -1).flatten(1, 2))
        proposals = torch.cat(proposals, dim=1)
        valid = ((proposals > 0.01) & (proposals < 0.99)).all(-1, keepdim=True)
        logits = torch.log(proposals / (1 - proposals))
        logits = logits.masked_fill(mask[..., None], math.inf).masked_fill(~valid, math.inf)
        memory = memory.masked_fill(mask[..., None], 0.0).masked_fill(~valid, 0.0)
        memory = self.enc_output_norm(self.enc_output(memory))
        scores = self.enc_class_embed(memory)
        boxes = self.enc_bbox_embed(memory) + logits
        best = scores.max(-1).values.topk(self.config.num_queries, dim=1).indices[..., None]
        boxes = boxes.gather(1, best.expand(-1, -1, 4)).sigmoid()
        return Prediction(scores.gather(1, best.expand(-1, -1, scores.shape[-1])), boxes), boxes.detach()

    def decode(
        self,
        queries: Tensor,
        anchors: Tensor,
        memory: Tensor,
        shapes: Shapes,
        mask: Tensor,
        ratios: Tensor,
        hidden: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The normed outputs of all layers, and the boxes that each corrects (look forward twice)."""
        outputs, references = [], [anchors]
        for layer in self.decoder.layers:
            scaled = anchors[:, :, None] * torch.cat((ratios, ratios), -1)[:, None]
            positions = self.decoder.ref_point_head(_anchor_sine(scaled[:, :, 0], queries.shape[-1]))
            queries = layer(queries, positions, scaled, memory, shapes, mask, hidden)
            new = (self.bbox_embed(queries) + _inverse_sigmoid(anchors)).sigmoid()
            anchors = new.detach()
            references.append(new)
            outputs.append(self.decoder.norm(queries))
        return outputs, references[:-1]


def _inverse_sigmoid(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=1e-3) / (1 - x).clamp(min=1e-3))


def _sine_cosine(x: Tensor, num_features: int, temperature: float) -> Tensor:
    power = 2 * torch.div(torch.arange(num_features, device=x.device), 2, rounding_mode="floor") / num_features
    phase = x[..., None] / temperature**power
    return torch.stack((phase[..., 0::2].sin(), phase[..., 1::2].cos()), -1).flatten(-2)


def _sine(padding: Tensor, dim: int) -> Tensor:
    """(N, dim, H, W): y, then x, counted over what is no padding."""
    y, x = (~padding).cumsum(1, dtype=torch.float32), (~padding).cumsum(2, dtype=torch.float32)
    y = y / (y[:, -1:] + 1e-6) * 2 * math.pi
    x = x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
    return torch.cat([_sine_cosine(one, dim // 2, 20.0) for one in (y, x)], -1).permute(0, 3, 1, 2)


def _anchor_sine(anchors: Tensor, dim: int) -> Tensor:
    x, y, w, h = (anchors * 2 * math.pi).unbind(-1)
    return torch.cat([_sine_cosine(one, dim // 2, 10000.0) for one in (y, x, w, h)], -1)


def _references(shapes: Shapes, ratios: Tensor) -> Tensor:
    """(N, L, levels, 2): every token's centre on every level."""
    centres = []
    for level, (height, width) in enumerate(shapes):
        y, x = torch.meshgrid(
            torch.linspace(0.5, height - 0.5, height, device=ratios.device),
            torch.linspace(0.5, width - 0.5, width, device=ratios.device),
            indexing="ij",
        )
        x = x.reshape(-1)[None] / (ratios[:, None, level, 0] * width)
        y = y.reshape(-1)[None] / (ratios[:, None, level, 1] * height)
        centres.append(torch.stack((x, y), -1))
    return torch.cat(centres, dim=1)[:, :, None] * ratios[:, None]
