"""Cross-DINO, the detector (Fig. 4): backbone, encoder, cross coding, query selection, decoder, heads.

With `fusion="none"` and `padding="shared"` this is DINO-4scale to the last detail, padded batches included. Our own
default, `padding="isolated"`, removes what padding does to an image's result in the official model: convolutions,
GroupNorm and global pooling that see the zeros around the image, the anchor embedding that is scaled by the batch's
size, padding tokens that may be selected, and token positions that are off by up to one stride where the image's size
is no multiple of it. There the same image gives the same boxes whatever it is batched with.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from crossdino.config import InferenceConfig, ModelConfig
from crossdino.errors import InputError
from crossdino.models.backbones import build_backbone
from crossdino.models.cctm import build_fusion
from crossdino.models.decoder import MLP, Decoder, QueryBlock, block_visibility
from crossdino.models.denoising import DenoisingQueries, make_denoising_queries
from crossdino.models.dense import apply_linear, float32_where, in_chunks, in_float32
from crossdino.models.encoder import Encoder
from crossdino.models.position import sine_position, sine_position_grid
from crossdino.structures import DenoisingOutput, DetectorOutput, LayerOutput, Target

if TYPE_CHECKING:
    from crossdino.evaluation.calibration import Calibration

# The logit of a query that stands for no token (an image with fewer tokens than queries): score 2e-9.
_VOID_LOGIT = -20.0


@dataclass
class FeatureLevels:
    """Projected feature maps of all levels as one sequence of tokens.

    Attributes:
        tokens: (N, L, C).
        spatial_shapes: (H_l, W_l) of each level, sum of products L.
        masks: a (N, H_l, W_l) bool mask a level, true on padding.
        valid_sizes: (N, levels, 2), width and height of the image in tokens; isolated padding counts fractions too.
        valid_ratios: (N, levels, 2), share of the map's width and height that the image covers.
        valid_counts: number of tokens of each image that are not padding.
    """

    tokens: Tensor
    spatial_shapes: list[tuple[int, int]]
    masks: list[Tensor]
    valid_sizes: Tensor
    valid_ratios: Tensor
    valid_counts: list[int]


class CrossDINO(nn.Module):
    """The Cross-DINO detector.

    Args:
        config: the model's configuration; `config.class_names` fixes K.
        inference: how the weights want their images; kept with them, used by `Predictor`.

    Attributes:
        config, inference: as given.
        mean, std: what the backbone's input is normalised with, three numbers each for RGB in [0, 1].
        checkpoint_activations: while training, keep only the inputs of the backbone, of each layer and of the fusion
            for the backward pass and compute the rest again; the same result with less memory and more time.
        calibration: what makes the scores probabilities and says from which score a detection counts, as `crossdino
            calibrate` fits it; None: there is none. `Predictor(threshold="auto")` uses it.
    """

    checkpoint_activations: bool = False
    calibration: Calibration | None = None

    def __init__(self, config: ModelConfig, inference: InferenceConfig | None = None) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.inference = inference or InferenceConfig()
        dim = config.hidden_dim
        self.backbone = build_backbone(config)
        self.mean = self.backbone.mean
        self.std = self.backbone.std

        projections: list[nn.Module] = []
        channels = 0
        for level in range(config.num_feature_levels):
            if level < len(self.backbone.channels):
                channels = self.backbone.channels[level]
                convolution = nn.Conv2d(channels, dim, 1)
            else:
                convolution = nn.Conv2d(channels, dim, 3, stride=2, padding=1)
                channels = dim
            projections.append(nn.Sequential(convolution, nn.GroupNorm(32, dim)))
        self.input_proj = nn.ModuleList(projections)
        self.level_embed = nn.Parameter(torch.empty(config.num_feature_levels, dim))

        layer_arguments = (dim, config.feedforward_dim, config.num_feature_levels, config.num_heads, config.num_points)
        self.encoder = Encoder(config.num_encoder_layers, *layer_arguments)
        self.fusion = build_fusion(config.fusion, dim, config.fusion_hidden_dim)
        self.enc_output = nn.Linear(dim, dim)
        self.enc_output_norm = nn.LayerNorm(dim)
        self.tgt_embed = nn.Embedding(config.num_queries, dim)
        self.label_enc = nn.Embedding(config.num_classes + 1, dim)
        self.decoder = Decoder(config.num_decoder_layers, *layer_arguments)
        self.class_embed = nn.Linear(dim, config.num_classes)
        self.bbox_embed = MLP(dim, dim, 4, 3)
        self._reset_parameters()
        if self.fusion is not None and config.fusion_init == "identity":
            self.fusion.begin_as_identity()
        # The encoder's heads start as copies of the decoder's and then learn on their own.
        self.enc_class_embed = copy.deepcopy(self.class_embed)
        self.enc_bbox_embed = copy.deepcopy(self.bbox_embed)

    def _reset_parameters(self) -> None:
        own_initialisation = ("sampling_offsets", "attention_weights", "grn")
        for part in (self.encoder, self.fusion, self.decoder, self.enc_output, self.tgt_embed, self.input_proj):
            for name, parameter in part.named_parameters() if part is not None else ():
                if parameter.dim() > 1 and not any(word in name for word in own_initialisation):
                    nn.init.xavier_uniform_(parameter)
        for projection in self.input_proj:
            nn.init.zeros_(projection[0].bias)  # type: ignore[index]
        nn.init.normal_(self.level_embed)
        # Every class starts at probability 0.01, so that the many negatives do not drown the first steps.
        nn.init.constant_(self.class_embed.bias, -math.log((1 - 0.01) / 0.01))
        nn.init.zeros_(self.bbox_embed.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.bbox_embed.layers[-1].bias)  # type: ignore[arg-type]

    def backbone_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of the backbone, which learn at a rate of their own."""
        return [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]

    def features(self, images: Tensor, padding_mask: Tensor | None = None) -> FeatureLevels:
        """Backbone and input projections; see `ModelConfig.padding` for the two ways to treat a padded batch.

        Args:
            images: (N, 3, H, W), normalised.
            padding_mask: (N, H, W) bool, true on padding (bottom and right), or None; see `forward`.
        """
        if self.config.padding == "shared":
            return self._features_shared(images, padding_mask)
        return self._features_isolated(images, padding_mask)

    def _project(self, maps: list[Tensor]) -> list[Tensor]:
        precise = in_float32(maps[-1])
        if precise:
            maps = [feature.float() for feature in maps]
        with float32_where(precise, maps[-1]):
            return self._project_all(maps)

    def _project_all(self, maps: list[Tensor]) -> list[Tensor]:
        last = maps[-1]
        projected: list[Tensor] = []
        for level, projection in enumerate(self.input_proj):
            if level < len(maps):
                projected.append(projection(maps[level]))
            else:
                # Level 4 looks at the last backbone map, further levels at the level before.
                projected.append(projection(last if level == len(maps) else projected[-1]))
        return projected

    @property
    def _checkpointed(self) -> bool:
        return self.checkpoint_activations and self.training and torch.is_grad_enabled()

    def _maps(self, images: Tensor) -> list[Tensor]:
        """The backbone's maps; whatever is random in it (stochastic depth) is drawn the same when computed again."""
        if self._checkpointed:
            return checkpoint(self.backbone, images, use_reentrant=False)
        return self.backbone(images)

    def _features_shared(self, images: Tensor, padding_mask: Tensor | None) -> FeatureLevels:
        num_images, _, height, width = images.shape
        if padding_mask is None:
            padding_mask = torch.zeros((num_images, height, width), dtype=torch.bool, device=images.device)
        padding_mask = padding_mask.to(images.device)
        divisor = self.backbone.size_divisor
        extra = (-width % divisor, -height % divisor)
        maps = self._project(self._maps(F.pad(images, (0, extra[0], 0, extra[1]))))
        masks, valid_sizes = [], []
        for feature in maps:
            mask = F.interpolate(padding_mask[None].float(), size=feature.shape[-2:])[0].to(torch.bool)
            masks.append(mask)
            valid_sizes.append(torch.stack(((~mask[:, 0, :]).sum(1), (~mask[:, :, 0]).sum(1)), -1).float())
        shapes = [(feature.shape[-2], feature.shape[-1]) for feature in maps]
        tokens = torch.cat([feature.flatten(2).transpose(1, 2) for feature in maps], dim=1)
        # The official model may select padding tokens; all tokens count here.
        return _feature_levels(tokens, shapes, masks, torch.stack(valid_sizes, 1), [tokens.shape[1]] * num_images)

    def _features_isolated(self, images: Tensor, padding_mask: Tensor | None) -> FeatureLevels:
        num_images, _, height, width = images.shape
        if padding_mask is None:
            sizes = [(height, width)] * num_images
        else:
            valid_height = (~padding_mask).any(2).sum(1).clamp(min=1)
            valid_width = (~padding_mask).any(1).sum(1).clamp(min=1)
            sizes = [(int(h), int(w)) for h, w in torch.stack((valid_height, valid_width), 1).tolist()]
        members: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, size in enumerate(sizes):
            members[size].append(i)
        divisor = self.backbone.size_divisor
        groups: list[tuple[list[int], list[Tensor]]] = []
        for (h, w), indices in members.items():
            crop = images[:, :, :h, :w] if len(members) == 1 else images[indices, :, :h, :w]
            crop = F.pad(crop, (0, -w % divisor, 0, -h % divisor))
            groups.append((indices, self._project(self._maps(crop))))

        shapes, masks, valid_sizes, maps = [], [], [], []
        valid_counts = [0] * num_images
        strides = [self.config.first_stride * 2**level for level in range(self.config.num_feature_levels)]
        for level, stride in enumerate(strides):
            level_height = max(features[level].shape[-2] for _, features in groups)
            level_width = max(features[level].shape[-1] for _, features in groups)
            shapes.append((level_height, level_width))
            if len(groups) == 1:
                maps.append(groups[0][1][level])
            else:
                padded: list[Tensor] = [images.new_empty(0)] * num_images
                for indices, features in groups:
                    feature = features[level]
                    bottom, right = level_height - feature.shape[-2], level_width - feature.shape[-1]
                    for i, one in zip(indices, F.pad(feature, (0, right, 0, bottom)), strict=True):
                        padded[i] = one
                maps.append(torch.stack(padded))
            valid = [(min(-(-h // stride), level_height), min(-(-w // stride), level_width)) for h, w in sizes]
            valid_counts = [count + h * w for count, (h, w) in zip(valid_counts, valid, strict=True)]
            rows = torch.arange(level_height, device=images.device)
            columns = torch.arange(level_width, device=images.device)
            valid_hw = torch.tensor(valid, device=images.device)
            masks.append(
                (rows[None, :, None] >= valid_hw[:, 0, None, None])
                | (columns[None, None, :] >= valid_hw[:, 1, None, None])
            )
            # The exact size, not one of whole tokens: a token's centre is its centre in the image.
            exact = [(w / stride, h / stride) for h, w in sizes]
            valid_sizes.append(torch.tensor(exact, dtype=torch.float32, device=images.device))
        tokens = torch.cat([feature.flatten(2).transpose(1, 2) for feature in maps], dim=1)
        return _feature_levels(tokens, shapes, masks, torch.stack(valid_sizes, 1), valid_counts)

    def _positions(self, levels: FeatureLevels, is_padded: bool) -> Tensor:
        """Position plus level embedding of all tokens, (N, L, C); (1, L, C) where no image is padded."""
        dim = self.config.hidden_dim
        positions = [
            sine_position(mask, dim) if is_padded else sine_position_grid(height, width, dim, mask.device)[None]
            for mask, (height, width) in zip(levels.masks, levels.spatial_shapes, strict=True)
        ]
        embedded = [(one + embed).flatten(1, 2) for one, embed in zip(positions, self.level_embed, strict=True)]
        return torch.cat(embedded, dim=1)

    def _proposals(self, levels: FeatureLevels, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Anchor logits (N, L, 4) of all tokens, +inf where a token is no valid proposal, and that flag (N, L)."""
        proposals = []
        for level, (height, width) in enumerate(levels.spatial_shapes):
            size = levels.valid_sizes[:, level, None, None]
            rows = torch.arange(height, device=size.device) + 0.5
            columns = torch.arange(width, device=size.device) + 0.5
            # One division, of what the batch's padding has no part in: a centre may lie on the bound itself (column 0
            # of 50 at 0.01), where a rounding more or less decides.
            y = (rows[None, :, None] / size[..., 1]).expand(-1, -1, width)
            x = (columns[None, None, :] / size[..., 0]).expand(-1, height, -1)
            side = torch.full_like(x, 0.05 * 2.0**level)
            proposals.append(torch.stack((x, y, side, side), dim=-1).flatten(1, 2))
        proposals = torch.cat(proposals, dim=1)
        invalid = ~((proposals > 0.01) & (proposals < 0.99)).all(-1)
        if token_mask is not None:
            invalid = invalid | token_mask
        logits = torch.log(proposals / (1 - proposals))
        return logits.masked_fill(invalid[..., None], math.inf), invalid

    def _select(
        self, memory: Tensor, levels: FeatureLevels, token_mask: Tensor | None
    ) -> tuple[LayerOutput, Tensor, Tensor | None]:
        """Mixed query selection: the encoder's output at the best tokens, their anchors, and which are void."""
        proposals, invalid = self._proposals(levels, token_mask)
        memory = in_chunks(self._propose, memory, invalid[..., None])
        logits = in_chunks(partial(apply_linear, self.enc_class_embed), memory)
        scores = logits.float().amax(-1)
        isolated = self.config.padding == "isolated"
        if token_mask is not None and isolated:
            scores = scores.masked_fill(token_mask, -math.inf)
        num_queries = self.config.num_queries
        best = scores.topk(min(num_queries, scores.shape[1]), dim=1).indices
        void = None
        if min(levels.valid_counts) < num_queries:
            # Fewer tokens than queries: the rest are void queries, which neither see nor say anything.
            best = F.pad(best, (0, num_queries - best.shape[1]))
            counts = torch.tensor(levels.valid_counts, device=best.device)
            void = torch.arange(num_queries, device=best.device)[None] >= counts[:, None]
        if memory.is_meta:
            # Where costs are counted (`crossdino.complexity`), to be compared with the literature's: the published
            # model gives every token a box, 1 % of its multiply-adds, of which only the chosen ones are read.
            self.enc_bbox_embed(memory)
        memory, proposals, chosen_logits = (
            of_all.gather(1, best[..., None].expand(-1, -1, of_all.shape[-1])) for of_all in (memory, proposals, logits)
        )
        anchor_logits = self.enc_bbox_embed(memory).float() + proposals
        if void is not None:
            chosen_logits = chosen_logits.masked_fill(void[..., None], _VOID_LOGIT)
            anchor_logits = anchor_logits.masked_fill(void[..., None], 0.0)
        anchors = anchor_logits.sigmoid()
        return LayerOutput(chosen_logits, anchors), anchors.detach(), void

    def _propose(self, memory: Tensor, invalid: Tensor) -> Tensor:
        """What the encoder's heads look at: (..., C) of (..., C) tokens and a flag (..., 1) each."""
        return self.enc_output_norm(apply_linear(self.enc_output, memory.masked_fill(invalid, 0.0)))

    def forward(
        self, images: Tensor, padding_mask: Tensor | None = None, targets: list[Target] | None = None
    ) -> DetectorOutput:
        """Detect.

        Args:
            images: (N, 3, H, W), normalised with `mean` and `std`; padded at the bottom and right.
            padding_mask: (N, H, W) bool, true on padding; None means that no image is padded. It is best left on the
                CPU (`Batch.to` does), for the images' sizes are read off it; nothing else in the pass waits for the
                device.
            targets: N targets; in training mode they become denoising queries, otherwise they are not looked at.

        Returns:
            The output of all places that are supervised; `pred_logits` (N, Q, K) and `pred_boxes` (N, Q, 4) are the
            detections.
        """
        config = self.config
        levels = self.features(images, padding_mask)
        mask = torch.cat([level.flatten(1) for level in levels.masks], dim=1)
        # Without any padding every masking step below would be a copy for nothing.
        is_padded = min(levels.valid_counts) < mask.shape[1]
        token_mask = mask if is_padded or (padding_mask is not None and config.padding == "shared") else None
        tokens = levels.tokens
        if in_float32(tokens):
            tokens = tokens.float()  # what the encoder adds to, layer by layer
        positions = self._positions(levels, is_padded=token_mask is not None).to(tokens.dtype)
        arguments = (tokens, positions, levels.spatial_shapes, levels.valid_ratios, token_mask)
        memory = self.encoder(*arguments, checkpoint_activations=self._checkpointed)
        with float32_where(in_float32(memory), memory):
            if self.fusion is not None:
                if self._checkpointed:
                    memory = checkpoint(self.fusion, tokens, memory, token_mask, use_reentrant=False)
                else:
                    memory = self.fusion(tokens, memory, token_mask)
            encoder_output, anchors, void = self._select(memory, levels, token_mask)

        noisy = None
        if self.training and targets is not None:
            noisy = make_denoising_queries(
                targets,
                config.num_classes,
                config.num_denoising,
                config.label_noise_ratio,
                config.box_noise_scale,
            )
        visible = None
        if void is not None:
            itself = torch.eye(config.num_queries, dtype=torch.bool, device=void.device)
            visible = ~void[:, None, None] | itself
        matched, blocks = self.decoder(
            self.tgt_embed.weight[None].expand(len(images), -1, -1),
            anchors,
            memory,
            levels.spatial_shapes,
            levels.valid_ratios,
            token_mask,
            visible,
            self.bbox_embed,
            self.class_embed,
            scale_anchor_embedding=config.padding == "shared",
            blocks=[] if noisy is None else self._blocks(noisy, void),
            checkpoint_activations=self._checkpointed,
        )
        if void is not None:
            for layer in matched:
                layer.pred_logits = layer.pred_logits.masked_fill(void[..., None], _VOID_LOGIT)
        if self.training and noisy is None:
            # Batches without objects leave the label embedding out of the graph; processes in step must not differ.
            matched[0].pred_logits = matched[0].pred_logits + 0.0 * self.label_enc.weight[0, 0]
        denoising = None
        if noisy is not None:
            layers = [_join_blocks(layer, noisy) for layer in blocks]
            denoising = DenoisingOutput(layers, noisy.objects, noisy.positive, noisy.num_copies)
        return DetectorOutput(matched[-1].pred_logits, matched[-1].pred_boxes, matched[:-1], encoder_output, denoising)

    def _blocks(self, noisy: DenoisingQueries, void: Tensor | None) -> list[QueryBlock]:
        """The denoising queries as the decoder wants them."""
        blocks = []
        start = 0
        for size, images in zip(noisy.block_sizes, noisy.block_images, strict=True):
            slots = slice(start, start + size)
            start += size
            some = None
            parts = [noisy.labels[:, slots], noisy.anchors[:, slots], noisy.islands[:, slots]]
            if len(images) < len(noisy.labels):
                some = torch.tensor(images, device=noisy.labels.device)
                parts = [part[some] for part in parts]
            labels, anchors, islands = parts
            hidden = void if void is None or some is None else void[some]
            # Row K of the label embedding stands for "no label": what an empty slot shows.
            contents = self.label_enc(torch.where(labels >= 0, labels, self.config.num_classes))
            contents = contents.to(self.tgt_embed.weight.dtype)
            blocks.append(
                QueryBlock(contents, anchors, block_visibility(islands, self.config.num_queries, hidden), some)
            )
        return blocks

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        half: bool = False,
        metrics: Mapping[str, Any] | None = None,
        category_ids: Sequence[int] | None = None,
        card: str | None = None,
    ) -> None:
        """Write weights, configuration and model card to a folder; see `crossdino.checkpoints.save_model`."""
        from crossdino.checkpoints import save_model

        save_model(self, folder, half=half, metrics=metrics, category_ids=category_ids, card=card)

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device = "cpu") -> CrossDINO:
        """Read a model from a folder, its safetensors file or a hub id; see `crossdino.checkpoints.load_model`."""
        from crossdino.checkpoints import load_model

        return load_model(source, device=device)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None, **options: Any) -> str:
        """Put the model on the Hugging Face hub; see `crossdino.checkpoints.push_model` for the options."""
        from crossdino.checkpoints import push_model

        return push_model(self, repo_id, private=private, token=token, **options)

    @classmethod
    def from_dino(cls, path: str | Path, **options: Any) -> CrossDINO:
        """Read an official DINO checkpoint; see `crossdino.official_weights.load_dino` for the options."""
        from crossdino.official_weights import load_dino

        return load_dino(path, **options)[0]


def _feature_levels(
    tokens: Tensor, shapes: list[tuple[int, int]], masks: list[Tensor], valid_sizes: Tensor, valid_counts: list[int]
) -> FeatureLevels:
    widths_heights = torch.tensor([(width, height) for height, width in shapes], device=valid_sizes.device)
    return FeatureLevels(tokens, shapes, masks, valid_sizes, valid_sizes / widths_heights, valid_counts)


def _join_blocks(blocks: list[LayerOutput], noisy: DenoisingQueries) -> LayerOutput:
    """The outputs of all blocks side by side, (N, D, ...); zeros for images that have nothing in a block."""
    joined = []
    for parts in ([block.pred_logits for block in blocks], [block.pred_boxes for block in blocks]):
        whole = []
        for part, images in zip(parts, noisy.block_images, strict=True):
            if len(images) < len(noisy.labels):
                empty = part.new_zeros((len(noisy.labels), *part.shape[1:]))
                part = empty.index_copy(0, torch.tensor(images, device=part.device), part)
            whole.append(part)
        joined.append(torch.cat(whole, dim=1))
    return LayerOutput(*joined)


def _check(config: ModelConfig) -> None:
    """Refuse impossible configurations with a line that says what to change."""
    if not config.class_names:
        raise InputError("model.class_names is empty: a detector needs at least one class")
    if config.hidden_dim % config.num_heads or config.hidden_dim % 32:
        raise InputError(
            f"model.hidden_dim {config.hidden_dim} must be a multiple of 32 and of model.num_heads {config.num_heads}"
        )
    counts = ("num_feature_levels", "num_points", "num_encoder_layers", "num_decoder_layers", "num_queries")
    for name in (*counts, "feedforward_dim", "fusion_hidden_dim"):
        if getattr(config, name) < 1:
            raise InputError(f"model.{name} is {getattr(config, name)}: it must be at least 1")
    for name in ("num_denoising", "box_noise_scale", "label_noise_ratio"):
        if getattr(config, name) < 0:
            raise InputError(f"model.{name} is {getattr(config, name)}: it must be 0 or more")
    if config.first_stride not in (4, 8):
        raise InputError(f"model.first_stride is {config.first_stride}: it must be 8, or 4 for one finer level")
    backbone_levels = 3 if config.first_stride == 8 else 4
    if config.num_feature_levels < backbone_levels:
        raise InputError(
            f"model.num_feature_levels is {config.num_feature_levels}: the backbone alone gives {backbone_levels}"
        )
    for name, allowed in (
        ("fusion", ("cctm", "once", "mlp", "none")),
        ("fusion_init", ("default", "identity")),
        ("padding", ("isolated", "shared")),
    ):
        if getattr(config, name) not in allowed:
            raise InputError(f"model.{name} is {getattr(config, name)!r}: choose one of {', '.join(allowed)}")
