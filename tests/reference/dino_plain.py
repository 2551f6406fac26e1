"""The official DINO's inference written out plainly, for tests: float64, loops instead of vectorised code.

Works on a dict of tensors with the official names (`backbone.0.body.*`, `input_proj.*`, `transformer.*`, ...), knows
nothing of `src`, and treats padded batches as the official model does: one padded tensor through the backbone,
masks resized by the nearest pixel, GroupNorm over the padding, padding tokens that may be selected.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional as F

NUM_HEADS = 8


def double(state):
    """The tensors in float64."""
    return {key: value.double() for key, value in state.items()}


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w, name, x):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def count(w, pattern):
    """How many of `pattern.format(0)`, `pattern.format(1)`, ... begin a name."""
    number = 0
    while any(key.startswith(pattern.format(number)) for key in w):
        number += 1
    return number


# ---- backbones ----


def frozen_batch_norm(w, name, x):
    scale = w[f"{name}.weight"] / torch.sqrt(w[f"{name}.running_var"] + 1e-5)
    shift = w[f"{name}.bias"] - w[f"{name}.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def resnet(w, x):
    """The four stages' maps of a bottleneck ResNet, strides 4 to 32."""
    body = "backbone.0.body"
    x = F.conv2d(x, w[f"{body}.conv1.weight"], stride=2, padding=3)
    x = frozen_batch_norm(w, f"{body}.bn1", x).clamp(min=0)
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    maps = []
    for stage in (1, 2, 3, 4):
        for block in range(count(w, f"{body}.layer{stage}.{{}}.")):
            name = f"{body}.layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = frozen_batch_norm(w, f"{name}.bn1", F.conv2d(x, w[f"{name}.conv1.weight"])).clamp(min=0)
            y = F.conv2d(y, w[f"{name}.conv2.weight"], stride=stride, padding=1)
            y = frozen_batch_norm(w, f"{name}.bn2", y).clamp(min=0)
            y = frozen_batch_norm(w, f"{name}.bn3", F.conv2d(y, w[f"{name}.conv3.weight"]))
            if block == 0:
                x = F.conv2d(x, w[f"{name}.downsample.0.weight"], stride=stride)
                x = frozen_batch_norm(w, f"{name}.downsample.1", x)
            x = (x + y).clamp(min=0)
        maps.append(x)
    return maps


def swin_window_attention(w, name, tokens, regions, window):
    """Attention among the window*window tokens (T, C) of one window; tokens of other regions are out of reach."""
    size, channels = tokens.shape
    table = w[f"{name}.relative_position_bias_table"]
    heads = table.shape[1]
    width = channels // heads
    q, k, v = linear(w, f"{name}.qkv", tokens).split(channels, dim=1)
    places = [(i // window, i % window) for i in range(size)]
    index = torch.tensor(
        [[(a - c + window - 1) * (2 * window - 1) + (b - d + window - 1) for c, d in places] for a, b in places]
    )
    wall = torch.tensor([[0.0 if a == b else -100.0 for b in regions] for a in regions], dtype=torch.float64)
    out = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width) + table[:, head][index] + wall
        out.append(scores.softmax(-1) @ v[:, part])
    return linear(w, f"{name}.proj", torch.cat(out, dim=1))


def swin_block(w, name, x, window, shift):
    """One block on the map x (H, W, C) of one image: zeros up to whole windows first, then the shift."""
    height, width, channels = x.shape
    rows, columns = -(-height // window) * window, -(-width // window) * window
    filled = torch.zeros(rows, columns, channels, dtype=x.dtype)
    filled[:height, :width] = layer_norm(w, f"{name}.norm1", x)

    def region(i, length):
        if shift == 0:
            return 0
        return 0 if i < length - window else 1 if i < length - shift else 2

    mixed = torch.zeros_like(filled)
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            places = [(top + i, left + j) for i in range(window) for j in range(window)]
            origins = [((a + shift) % rows, (b + shift) % columns) for a, b in places]
            tokens = torch.stack([filled[a, b] for a, b in origins])
            regions = [(region(a, rows), region(b, columns)) for a, b in places]
            for (a, b), token in zip(
                origins, swin_window_attention(w, f"{name}.attn", tokens, regions, window), strict=True
            ):
                mixed[a, b] = token
    x = x + mixed[:height, :width]
    hidden = linear(w, f"{name}.mlp.fc1", layer_norm(w, f"{name}.norm2", x))
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    return x + linear(w, f"{name}.mlp.fc2", hidden)


def swin(w, images):
    """The four stages' normalised maps of the detection Swin Transformer; None where the file has no norm for it."""
    base = "backbone.0"
    rows = w[f"{base}.layers.0.blocks.0.attn.relative_position_bias_table"].shape[0]
    window = (round(math.sqrt(rows)) + 1) // 2
    per_image = []
    for image in images:
        height, width = image.shape[1:]
        filled = torch.zeros(3, -(-height // 4) * 4, -(-width // 4) * 4, dtype=image.dtype)
        filled[:, :height, :width] = image
        x = F.conv2d(filled[None], w[f"{base}.patch_embed.proj.weight"], w[f"{base}.patch_embed.proj.bias"], stride=4)
        x = layer_norm(w, f"{base}.patch_embed.norm", x[0].permute(1, 2, 0))
        maps = []
        for stage in range(4):
            name = f"{base}.layers.{stage}"
            for block in range(count(w, f"{name}.blocks.{{}}.")):
                x = swin_block(w, f"{name}.blocks.{block}", x, window, (block % 2) * (window // 2))
            has_norm = f"{base}.norm{stage}.weight" in w
            maps.append(layer_norm(w, f"{base}.norm{stage}", x).permute(2, 0, 1) if has_norm else None)
            if stage < 3:
                height, width, channels = x.shape
                merged = torch.zeros((height + 1) // 2, (width + 1) // 2, 4 * channels, dtype=x.dtype)
                for i in range(height):
                    for j in range(width):
                        place = (j % 2) * 2 + i % 2
                        merged[i // 2, j // 2, place * channels : (place + 1) * channels] = x[i, j]
                x = layer_norm(w, f"{name}.downsample.norm", merged) @ w[f"{name}.downsample.reduction.weight"].T
        per_image.append(maps)
    return [None if maps[0] is None else torch.stack(maps) for maps in zip(*per_image, strict=True)]


# ---- positions ----


def nearest(mask, height, width):
    """A mask (H, W) resized by the nearest pixel, with the index rounded down from a float32 product."""
    scale_y, scale_x = np.float32(mask.shape[0] / height), np.float32(mask.shape[1] / width)
    small = torch.zeros(height, width, dtype=torch.bool)
    for i in range(height):
        for j in range(width):
            small[i, j] = mask[
                min(int(np.float32(i) * scale_y), mask.shape[0] - 1),
                min(int(np.float32(j) * scale_x), mask.shape[1] - 1),
            ]
    return small


def sine(value, features, temperature):
    """Sine and cosine in turns: `features` numbers of one angle."""
    out = []
    for i in range(features):
        angle = value / temperature ** (2 * (i // 2) / features)
        out.append(math.cos(angle) if i % 2 else math.sin(angle))
    return out


def sine_position(mask, dim):
    """(H, W, dim): y in the first half; the n-th valid row of a column of m has the coordinate 2 pi n / m."""
    height, width = mask.shape
    out = torch.zeros(height, width, dim, dtype=torch.float64)
    for i in range(height):
        for j in range(width):
            y = sum(1 for a in range(i + 1) if not mask[a, j])
            x = sum(1 for b in range(j + 1) if not mask[i, b])
            all_y = sum(1 for a in range(height) if not mask[a, j])
            all_x = sum(1 for b in range(width) if not mask[i, b])
            angles = (y / (all_y + 1e-6) * 2 * math.pi, x / (all_x + 1e-6) * 2 * math.pi)
            features = sine(angles[0], dim // 2, 20) + sine(angles[1], dim // 2, 20)
            out[i, j] = torch.tensor(features, dtype=torch.float64)
    return out


def anchor_embedding(anchor, dim):
    """(2 * dim,): y, x, w, h of one anchor."""
    x, y, width, height = (float(value) * 2 * math.pi for value in anchor)
    features = [feature for value in (y, x, width, height) for feature in sine(value, dim // 2, 10000)]
    return torch.tensor(features, dtype=torch.float64)


def valid_size(mask):
    """Width and height of what is not padding, in tokens of this map."""
    return int((~mask[0, :]).sum()), int((~mask[:, 0]).sum())


def logit(p):
    return math.log(p / (1 - p)) if 0 < p < 1 else math.copysign(math.inf, p - 0.5)


def inverse_sigmoid(x):
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=1e-3) / (1 - x).clamp(min=1e-3))


def token_centres(masks):
    """x and y of every token of one image, relative to the valid part of its level: a list."""
    centres = []
    for mask in masks:
        valid_width, valid_height = valid_size(mask)
        for i in range(mask.shape[0]):
            for j in range(mask.shape[1]):
                centres.append(((j + 0.5) / valid_width, (i + 0.5) / valid_height))
    return centres


def proposals(masks):
    """Of one image: the logits (L, 4) of all tokens' proposals, +inf where invalid, and the flag (L,)."""
    logits, invalid = [], []
    padded = [bool(value) for mask in masks for value in mask.flatten()]
    levels = [level for level, mask in enumerate(masks) for _ in range(mask.numel())]
    for (x, y), level, is_padding in zip(token_centres(masks), levels, padded, strict=True):
        side = 0.05 * 2**level
        bad = is_padding or not all(0.01 < value < 0.99 for value in (x, y, side, side))
        logits.append([math.inf] * 4 if bad else [logit(value) for value in (x, y, side, side)])
        invalid.append(bad)
    return torch.tensor(logits, dtype=torch.float64), torch.tensor(invalid)


# ---- attention and layers; everything of one image ----


def deformable_attention(w, name, query, references, value, shapes, padding):
    """Point by point; query (Q, C), references (Q, levels, 2 or 4), value (L, C), padding (L,) -> (Q, C)."""
    num_queries, channels = query.shape
    levels, width = len(shapes), channels // NUM_HEADS
    offsets = linear(w, f"{name}.sampling_offsets", query)
    points = offsets.shape[1] // (2 * NUM_HEADS * levels)
    offsets = offsets.reshape(num_queries, NUM_HEADS, levels, points, 2).numpy()
    weights = linear(w, f"{name}.attention_weights", query).reshape(num_queries, NUM_HEADS, levels * points)
    weights = weights.softmax(-1).reshape(num_queries, NUM_HEADS, levels, points).numpy()
    value = linear(w, f"{name}.value_proj", value)
    value[padding] = 0.0
    value = value.reshape(-1, NUM_HEADS, width).numpy()
    references = references.numpy()
    out = np.zeros((num_queries, NUM_HEADS, width))
    start = 0
    for level, (rows, columns) in enumerate(shapes):
        for q in range(num_queries):
            reference = references[q, level]
            for head in range(NUM_HEADS):
                for p in range(points):
                    dx, dy = offsets[q, head, level, p]
                    if len(reference) == 2:
                        x, y = reference[0] + dx / columns, reference[1] + dy / rows
                    else:
                        x = reference[0] + dx / points * reference[2] / 2
                        y = reference[1] + dy / points * reference[3] / 2
                    x, y = x * columns - 0.5, y * rows - 0.5
                    left, top = math.floor(x), math.floor(y)
                    for i, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
                        for j, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
                            if 0 <= i < rows and 0 <= j < columns:
                                sample = value[start + i * columns + j, head]
                                out[q, head] += weights[q, head, level, p] * weight_y * weight_x * sample
        start += rows * columns
    return linear(w, f"{name}.output_proj", torch.from_numpy(out.reshape(num_queries, channels)))


def feed_forward(w, name, x):
    return linear(w, f"{name}.linear2", linear(w, f"{name}.linear1", x).clamp(min=0))


def encoder_references(masks):
    """(L, levels, 2): centres relative to the padded map of each level."""
    ratios = [(valid_size(mask)[0] / mask.shape[1], valid_size(mask)[1] / mask.shape[0]) for mask in masks]
    return torch.tensor(
        [[(x * ratio_x, y * ratio_y) for ratio_x, ratio_y in ratios] for x, y in token_centres(masks)],
        dtype=torch.float64,
    )


def encoder_layer(w, name, tokens, positions, masks):
    shapes = [tuple(mask.shape) for mask in masks]
    padding = torch.cat([mask.flatten() for mask in masks])
    references = encoder_references(masks)
    attended = deformable_attention(w, f"{name}.self_attn", tokens + positions, references, tokens, shapes, padding)
    tokens = layer_norm(w, f"{name}.norm1", tokens + attended)
    return layer_norm(w, f"{name}.norm2", tokens + feed_forward(w, name, tokens))


def self_attention(w, name, queries, positions, visible=None):
    """`visible` (Q, Q) bool: the row's query may look at the column's; the official code masks what is not."""
    channels = queries.shape[1]
    width = channels // NUM_HEADS
    weight, bias = w[f"{name}.in_proj_weight"], w[f"{name}.in_proj_bias"]
    q = (queries + positions) @ weight[:channels].T + bias[:channels]
    k = (queries + positions) @ weight[channels : 2 * channels].T + bias[channels : 2 * channels]
    v = queries @ weight[2 * channels :].T + bias[2 * channels :]
    out = []
    for head in range(NUM_HEADS):
        part = slice(head * width, (head + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        if visible is not None:
            scores[~visible] = -math.inf
        out.append(scores.softmax(-1) @ v[:, part])
    return linear(w, f"{name}.out_proj", torch.cat(out, dim=1))


def decoder_layer(w, name, queries, query_positions, references, memory, masks, visible=None):
    """references (Q, levels, 4), relative to the padded maps."""
    shapes = [tuple(mask.shape) for mask in masks]
    padding = torch.cat([mask.flatten() for mask in masks])
    attended = self_attention(w, f"{name}.self_attn", queries, query_positions, visible)
    queries = layer_norm(w, f"{name}.norm2", queries + attended)
    attended = deformable_attention(
        w, f"{name}.cross_attn", queries + query_positions, references, memory, shapes, padding
    )
    queries = layer_norm(w, f"{name}.norm1", queries + attended)
    return layer_norm(w, f"{name}.norm3", queries + feed_forward(w, name, queries))


def box_head(w, name, x):
    x = linear(w, f"{name}.layers.0", x).clamp(min=0)
    x = linear(w, f"{name}.layers.1", x).clamp(min=0)
    return linear(w, f"{name}.layers.2", x)


def decoder(w, contents, anchors, memory, masks, visible=None):
    """All layers' logits (Q, K) and boxes (Q, 4), by look-forward-twice."""
    name = "transformer.decoder"
    dim = contents.shape[1]
    ratios = [(valid_size(mask)[0] / mask.shape[1], valid_size(mask)[1] / mask.shape[0]) for mask in masks]
    output, reference, not_detached = contents, anchors, anchors
    logits, boxes = [], []
    for layer in range(count(w, name + ".layers.{}.")):
        per_level = torch.stack([reference * torch.tensor([x, y, x, y], dtype=torch.float64) for x, y in ratios], dim=1)
        embedded = torch.stack([anchor_embedding(anchor, dim) for anchor in per_level[:, 0]])
        positions = linear(w, f"{name}.ref_point_head.layers.0", embedded).clamp(min=0)
        positions = linear(w, f"{name}.ref_point_head.layers.1", positions)
        output = decoder_layer(w, f"{name}.layers.{layer}", output, positions, per_level, memory, masks, visible)
        normed = layer_norm(w, f"{name}.norm", output)
        logits.append(linear(w, f"class_embed.{layer}", normed))
        boxes.append((box_head(w, f"bbox_embed.{layer}", normed) + inverse_sigmoid(not_detached)).sigmoid())
        reference = (box_head(w, f"bbox_embed.{layer}", output) + inverse_sigmoid(reference)).sigmoid()
        not_detached = reference  # the same numbers; only the gradient tells them apart
    return logits, boxes


def group_norm(w, name, x):
    num_images, channels, height, width = x.shape
    groups = x.reshape(num_images, 32, -1)
    mean = groups.mean(-1, keepdim=True)
    variance = ((groups - mean) ** 2).mean(-1, keepdim=True)
    x = ((groups - mean) / torch.sqrt(variance + 1e-5)).reshape(num_images, channels, height, width)
    return x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def features(w, images):
    """The projected maps of all levels, each (N, C, H, W)."""
    maps = resnet(w, images) if "backbone.0.body.conv1.weight" in w else swin(w, images)
    num_levels = count(w, "input_proj.{}.")
    num_backbone = sum(w[f"input_proj.{level}.0.weight"].shape[-1] == 1 for level in range(num_levels))
    maps = maps[4 - num_backbone :]
    projected = []
    for level in range(num_levels):
        weight, bias = w[f"input_proj.{level}.0.weight"], w[f"input_proj.{level}.0.bias"]
        if level < num_backbone:
            x = F.conv2d(maps[level], weight, bias)
        else:
            source = maps[-1] if level == num_backbone else projected[-1]
            x = F.conv2d(source, weight, bias, stride=2, padding=1)
        projected.append(group_norm(w, f"input_proj.{level}.1", x))
    return projected


def select(w, memory, masks):
    """Mixed query selection: the encoder's scores (L,) of all tokens, and the anchors (Q, 4) of the best."""
    logits, invalid = proposals(masks)
    memory = memory.clone()
    memory[invalid] = 0.0
    memory = layer_norm(w, "transformer.enc_output_norm", linear(w, "transformer.enc_output", memory))
    scores = linear(w, "transformer.enc_out_class_embed", memory).max(-1).values
    order = sorted(range(len(scores)), key=lambda i: -float(scores[i]))
    best = order[: w["transformer.tgt_embed.weight"].shape[0]]
    anchors = box_head(w, "transformer.enc_out_bbox_embed", memory) + logits
    return scores, anchors[best].sigmoid()


@torch.no_grad()
def dino(state, images, padding_mask):
    """Logits (N, Q, K) and boxes (N, Q, 4) of the last layer, and the encoder's scores (N, L) for the tests' eyes."""
    w = double(state)
    maps = features(w, images.double())
    all_logits, all_boxes, all_scores = [], [], []
    for i in range(len(images)):
        masks = [nearest(padding_mask[i], *x.shape[-2:]) for x in maps]
        tokens = torch.cat([x[i].flatten(1).T for x in maps])
        dim = tokens.shape[1]
        embeds = w["transformer.level_embed"]
        positions = torch.cat(
            [(sine_position(mask, dim) + embeds[level]).flatten(0, 1) for level, mask in enumerate(masks)]
        )
        for layer in range(count(w, "transformer.encoder.layers.{}.")):
            tokens = encoder_layer(w, f"transformer.encoder.layers.{layer}", tokens, positions, masks)
        scores, anchors = select(w, tokens, masks)
        logits, boxes = decoder(w, w["transformer.tgt_embed.weight"], anchors, tokens, masks)
        all_logits.append(logits[-1])
        all_boxes.append(boxes[-1])
        all_scores.append(scores)
    return torch.stack(all_logits), torch.stack(all_boxes), torch.stack(all_scores)


# ---- checkpoints in the official layout ----


def resnet_layout(blocks=(3, 4, 6, 3)):
    """Names and shapes of a frozen bottleneck ResNet."""
    shapes = {"conv1.weight": (64, 3, 7, 7)}
    norms = [("bn1", 64)]
    channels = 64
    for stage, number in enumerate(blocks, start=1):
        width = 32 * 2**stage
        for block in range(number):
            name = f"layer{stage}.{block}"
            shapes[f"{name}.conv1.weight"] = (width, channels, 1, 1)
            shapes[f"{name}.conv2.weight"] = (width, width, 3, 3)
            shapes[f"{name}.conv3.weight"] = (4 * width, width, 1, 1)
            norms += [(f"{name}.bn1", width), (f"{name}.bn2", width), (f"{name}.bn3", 4 * width)]
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * width, channels, 1, 1)
                norms.append((f"{name}.downsample.1", 4 * width))
            channels = 4 * width
    for name, width in norms:
        shapes |= {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    return {f"backbone.0.body.{name}": shape for name, shape in shapes.items()}


def swin_layout(width=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), window=7, outputs=(1, 2, 3)):
    """Names and shapes of a detection Swin Transformer."""
    shapes = {"patch_embed.proj.weight": (width, 3, 4, 4), "patch_embed.proj.bias": (width,)}
    norms = [("patch_embed.norm", width)]
    for stage, depth in enumerate(depths):
        channels = width * 2**stage
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
            for part, (rows, columns) in linears.items():
                shapes[f"{name}.{part}.weight"] = (rows * channels, columns * channels)
                shapes[f"{name}.{part}.bias"] = (rows * channels,)
            shapes[f"{name}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads[stage])
            norms += [(f"{name}.norm1", channels), (f"{name}.norm2", channels)]
        if stage < 3:
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * channels, 4 * channels)
            norms.append((f"layers.{stage}.downsample.norm", 4 * channels))
    norms += [(f"norm{stage}", width * 2**stage) for stage in outputs]
    for name, channels in norms:
        shapes |= {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}
    return {f"backbone.0.{name}": shape for name, shape in shapes.items()}


def transformer_layout(map_channels, levels, dim, points, layers, hidden_dim, classes, queries, labels):
    """Names and shapes of everything but the backbone; `layers` of the encoder and of the decoder."""
    linears, norms = {}, []
    shapes = {
        "transformer.level_embed": (levels, dim),
        "transformer.tgt_embed.weight": (queries, dim),
        "label_enc.weight": (labels, dim),
    }
    source = 0
    for level in range(levels):
        if level < len(map_channels):
            source = map_channels[level]
            linears[f"input_proj.{level}.0"] = (dim, source, 1, 1)
        else:
            linears[f"input_proj.{level}.0"] = (dim, source, 3, 3)
            source = dim
        norms.append(f"input_proj.{level}.1")

    def deformable(name):
        samples = NUM_HEADS * levels * points
        linears[f"{name}.sampling_offsets"] = (2 * samples, dim)
        linears[f"{name}.attention_weights"] = (samples, dim)
        linears[f"{name}.value_proj"] = linears[f"{name}.output_proj"] = (dim, dim)

    for kind, number in zip(("encoder", "decoder"), layers, strict=True):
        for layer in range(number):
            name = f"transformer.{kind}.layers.{layer}"
            linears[f"{name}.linear1"], linears[f"{name}.linear2"] = (hidden_dim, dim), (dim, hidden_dim)
            norms += [f"{name}.norm1", f"{name}.norm2"]
            if kind == "encoder":
                deformable(f"{name}.self_attn")
            else:
                norms.append(f"{name}.norm3")
                deformable(f"{name}.cross_attn")
                shapes[f"{name}.self_attn.in_proj_weight"] = (3 * dim, dim)
                shapes[f"{name}.self_attn.in_proj_bias"] = (3 * dim,)
                linears[f"{name}.self_attn.out_proj"] = (dim, dim)
    norms += ["transformer.decoder.norm", "transformer.enc_output_norm"]
    linears["transformer.enc_output"] = (dim, dim)
    linears["transformer.decoder.ref_point_head.layers.0"] = (dim, 2 * dim)
    linears["transformer.decoder.ref_point_head.layers.1"] = (dim, dim)
    for name in ("transformer.enc_out_class_embed", "class_embed.0"):
        linears[name] = (classes, dim)
    for name in ("transformer.enc_out_bbox_embed", "bbox_embed.0"):
        for layer, rows in enumerate((dim, dim, 4)):
            linears[f"{name}.layers.{layer}"] = (rows, dim)
    for name, shape in linears.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
    return shapes


def random_dino(
    backbone="resnet50",
    scales=4,
    dim=32,
    points=2,
    layers=(1, 2),
    hidden_dim=48,
    classes=91,
    queries=20,
    labels=None,
    seed=0,
):
    """A checkpoint's `model` dict with the official names and random weights of sensible size.

    `backbone` is resnet50, resnet101 or swin_t; the channels are the real ones. The decoder's heads stand there once
    for each layer and once more inside the decoder, as one and the same tensor.
    """
    if backbone == "swin_t":
        shapes = swin_layout(outputs=(0, 1, 2, 3)[5 - scales :])
        channels = (96, 192, 384, 768)
    else:
        shapes = resnet_layout((3, 4, 23, 3) if backbone == "resnet101" else (3, 4, 6, 3))
        channels = (256, 512, 1024, 2048)
    shapes |= transformer_layout(
        channels[5 - scales :], scales, dim, points, layers, hidden_dim, classes, queries, labels or classes + 1
    )
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.randn(shape, generator=generator)
        is_norm = len(shape) == 1 and name.endswith(".weight")
        if name.endswith("running_var"):
            state[name] = 1 + 0.2 * noise.abs()
        elif is_norm:
            # The last norm of a residual branch is small, or 16 blocks would blow the map up.
            state[name] = (0.3 if ".bn3." in name else 1.0) + 0.1 * noise
        elif name.endswith(".sampling_offsets.weight"):
            state[name] = noise * 0.2 / math.sqrt(shape[1])  # random maps are rough: what moves far is ill-conditioned
        elif name.endswith(".sampling_offsets.bias"):
            state[name] = 2 * noise
        elif len(shape) == 1:
            state[name] = 0.1 * noise
        elif "embed" in name and len(shape) == 2 and shape[0] in (queries, scales):
            state[name] = noise
        else:
            state[name] = noise * math.sqrt(1.5 / math.prod(shape[1:]))
    for name in list(state):
        if name.startswith(("class_embed.0.", "bbox_embed.0.")):
            head, rest = name.split(".0.", 1)
            for layer in range(layers[1]):
                state[f"{head}.{layer}.{rest}"] = state[name]
                state[f"transformer.decoder.{head}.{layer}.{rest}"] = state[name]
    return state
