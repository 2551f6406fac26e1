"""Deformable attention in PyTorch alone: the definition with `grid_sample`, and weighted bags of rows for the CPU.

Source: Deformable DETR (Zhu et al. 2021), Eq. 3. `grid_sample_attention` is the plain definition that other engines are
compared with. On a CPU it spends its time on samples that are written to memory only to be summed, so there an
`embedding_bag` reads the four pixels around each point instead and sums them in registers, one call a corner; the
gradient of the value is such a sum too, over the points that touched a pixel.

The functions of `deformable_attention.py` decide who computes; arguments are explained there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Points (of all heads) that are worked on together: a dozen buffers of 1 MB, which stay in the last-level cache.
_CHUNK_POINTS = 1 << 18

Shapes = Sequence[tuple[int, int]]
# The locations (q, heads, levels, points, 2) and weights (q, heads, levels, points) of some queries of an image.
_Sampling = Callable[[int, slice], tuple[Tensor, Tensor]]


# --- what the projections mean ----------------------------------------------------------------------------------------


def split_projections(projections: Tensor, heads: int, levels: int) -> tuple[Tensor, Tensor]:
    """Offsets (..., heads, levels, points, 2) and logits (..., heads, levels, points), as views."""
    count = projections.shape[-1] // 3
    points = count // (heads * levels)
    offsets, logits = projections.split((2 * count, count), dim=-1)
    return offsets.unflatten(-1, (heads, levels, points, 2)), logits.unflatten(-1, (heads, levels, points))


def sampling_points(
    reference_points: Tensor, projections: Tensor, spatial_shapes: Shapes, heads: int
) -> tuple[Tensor, Tensor]:
    """The sampling locations and attention weights that the projections stand for, in float32 (or float64).

    Args:
        reference_points: (..., levels, 2 | 4).
        projections: (..., heads * levels * points * 3), see `projected_attention`.
        spatial_shapes: (H_l, W_l) of every level.
        heads: number of heads.

    Returns:
        (..., heads, levels, points, 2) and (..., heads, levels, points).
    """
    dtype = torch.promote_types(torch.promote_types(reference_points.dtype, projections.dtype), torch.float32)
    offsets, logits = split_projections(projections, heads, len(spatial_shapes))
    references = reference_points.to(dtype)[..., None, :, None, :]
    weights = logits.to(dtype).flatten(-2).softmax(dim=-1).unflatten(-1, logits.shape[-2:])
    scale = _offset_scale(references, spatial_shapes, logits.shape[-1])
    return references[..., :2] + offsets.to(dtype) * scale, weights


def projection_gradients(
    grad_locations: Tensor,
    grad_weights: Tensor,
    reference_points: Tensor,
    projections: Tensor,
    spatial_shapes: Shapes,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """From the gradients of `sampling_points`' results to those of `reference_points` and `projections`."""
    dtype = grad_locations.dtype
    offsets, logits = split_projections(projections, heads, len(spatial_shapes))
    references = reference_points.to(dtype)[..., None, :, None, :]
    weights = logits.to(dtype).flatten(-2).softmax(dim=-1)
    grad_weights = grad_weights.flatten(-2)
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    grad_offsets = grad_locations * _offset_scale(references, spatial_shapes, logits.shape[-1])
    grad_projections = torch.cat((grad_offsets.flatten(-4), grad_logits.flatten(-2)), dim=-1)
    grad_references = grad_locations.sum(dim=(-4, -2))
    if reference_points.shape[-1] == 4:
        grad_sizes = (grad_locations * offsets.to(dtype)).sum(dim=(-4, -2)) * (0.5 / logits.shape[-1])
        grad_references = torch.cat((grad_references, grad_sizes), dim=-1)
    return grad_references.to(reference_points.dtype), grad_projections.to(projections.dtype)


def _offset_scale(references: Tensor, spatial_shapes: Shapes, points: int) -> Tensor:
    """How far an offset of 1 leads, in parts of the map: a pixel, or half the box divided by the number of points."""
    if references.shape[-1] == 4:
        return references[..., 2:] * (0.5 / points)
    # Built of numbers, not of a tensor: no copy to the device, and symbolic sizes stay symbolic.
    sizes = [(1.0 / width, 1.0 / height) for height, width in spatial_shapes]
    scale = [references.new_full((1,), side) for size in sizes for side in size]
    return torch.cat(scale).view(len(sizes), 1, 2)


# --- the definition ---------------------------------------------------------------------------------------------------


def grid_sample_attention(
    value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The plain definition with `grid_sample`: any device, differentiable, exportable.

    Arguments and result as `deformable_attention`.
    """
    batch, _, heads, head_dim = value.shape
    queries = sampling_locations.shape[1]
    output = None
    for maps, grid, weights in _level_inputs(value, spatial_shapes, sampling_locations, attention_weights):
        samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        level_output = (samples * weights).sum(-1)
        output = level_output if output is None else output + level_output
    assert output is not None, "no feature level"
    return output.view(batch, heads * head_dim, queries).transpose(1, 2).to(value.dtype)


def grid_sample_gradients(
    grad_output: Tensor, value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `grid_sample_attention`, spelt out because autograd is off inside an operator."""
    batch, _, heads, head_dim = value.shape
    queries, _, _, points = sampling_locations.shape[1:5]
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    grad_output = grad_output.to(dtype).transpose(1, 2).reshape(batch * heads, head_dim, queries, 1)
    grad_value, grad_locations, grad_weights = [], [], []
    for maps, grid, weights in _level_inputs(value, spatial_shapes, sampling_locations, attention_weights):
        samples = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        grad_weights.append((samples * grad_output).sum(1).view(batch, heads, queries, points))
        # 0, 0: bilinear and zeros; the grid runs over [-1, 1], so locations have twice its slope.
        grad_maps, grad_grid = torch.ops.aten.grid_sampler_2d_backward(
            grad_output * weights, maps, grid, 0, 0, False, [True, True]
        )
        grad_value.append(grad_maps.view(batch, heads, head_dim, -1).permute(0, 3, 1, 2))
        grad_locations.append(grad_grid.view(batch, heads, queries, points, 2) * 2)
    return (
        torch.cat(grad_value, dim=1).to(value.dtype).contiguous(),
        torch.stack(grad_locations, dim=3).transpose(1, 2).to(sampling_locations.dtype).contiguous(),
        torch.stack(grad_weights, dim=3).transpose(1, 2).to(attention_weights.dtype).contiguous(),
    )


def _level_inputs(
    value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per level the maps (N * heads, C_head, H, W), the grid (N * heads, Q, points, 2), the weights broadcastable."""
    batch, _, heads, head_dim = value.shape
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    # One map beyond the border everything is zero already; this keeps infinities out of the arithmetic.
    grids = sampling_locations.to(dtype).clamp(-1, 2) * 2 - 1
    levels = value.split([height * width for height, width in spatial_shapes], dim=1)
    for level, (height, width) in enumerate(spatial_shapes):
        maps = levels[level].to(dtype).permute(0, 2, 3, 1).reshape(batch * heads, head_dim, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        weights = attention_weights[:, :, :, level].to(dtype).transpose(1, 2).flatten(0, 1)
        yield maps, grid, weights.unsqueeze(1)


# --- weighted bags of rows --------------------------------------------------------------------------------------------


def embedding_bag_attention(
    value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same sum as weighted bags of value rows, without gradients, for CPUs.

    Every query and head is one bag of `levels * points` rows a corner, weighted by attention times bilinear weight.
    Arguments and result as `deformable_attention`.
    """

    def sampling(image: int, part: slice) -> tuple[Tensor, Tensor]:
        return sampling_locations[image, part], attention_weights[image, part]

    queries, _, _, points = sampling_locations.shape[1:5]
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    return _bag_attention(value, spatial_shapes, queries, points, sampling, dtype)


def projected_bag_attention(
    value: Tensor, spatial_shapes: Shapes, reference_points: Tensor, projections: Tensor
) -> Tensor:
    """`embedding_bag_attention` from the projections; locations and weights exist for a chunk of queries at a time."""
    heads, levels = value.shape[2], len(spatial_shapes)

    def sampling(image: int, part: slice) -> tuple[Tensor, Tensor]:
        return sampling_points(reference_points[image, part], projections[image, part], spatial_shapes, heads)

    dtype = torch.promote_types(torch.promote_types(value.dtype, reference_points.dtype), torch.float32)
    dtype = torch.promote_types(dtype, projections.dtype)
    points = projections.shape[-1] // (3 * heads * levels)
    return _bag_attention(value, spatial_shapes, projections.shape[1], points, sampling, dtype)


def _bag_attention(
    value: Tensor, spatial_shapes: Shapes, queries: int, points: int, sampling: _Sampling, dtype: torch.dtype
) -> Tensor:
    batch, num_tokens, heads, head_dim = value.shape
    levels = len(spatial_shapes)
    rows = value.to(dtype).reshape(batch, num_tokens * heads, head_dim)
    output = value.new_empty((batch, queries, heads * head_dim))
    chunk = max(1, _CHUNK_POINTS // (heads * levels * points))
    # For every point of a query: its map, and how tokens and heads make rows of the value.
    maps = torch.tensor([(*shape, shape[0] * shape[1]) for shape in spatial_shapes]).repeat_interleave(points, dim=0)
    level_starts = maps[::points, 2].cumsum(0).sub_(maps[::points, 2]).repeat_interleave(points)
    heights, widths = maps[:, 0].repeat(heads), maps[:, 1].repeat(heads)
    strides = (widths * heads).to(torch.int32)
    starts = (level_starts * heads + torch.arange(heads).unsqueeze(1)).flatten().to(torch.int32)
    for image in range(batch):
        for first in range(0, queries, chunk):
            part = slice(first, min(first + chunk, queries))
            locations, weights = sampling(image, part)
            number = part.stop - part.start
            xy = locations.to(dtype).reshape(number, -1, 2)
            x_pixels, x_weights, _ = _axis(xy[..., 0], widths, dtype)
            y_pixels, y_weights, _ = _axis(xy[..., 1], heights, dtype)
            factors = weights.to(dtype).reshape(number, -1)
            total = None
            for y_pixel, y_weight in zip(y_pixels, y_weights, strict=True):
                # A row of the value is a token and a head.
                line = y_pixel.mul_(strides).add_(starts)
                y_weight.mul_(factors)
                for x_pixel, x_weight in zip(x_pixels, x_weights, strict=True):
                    bag_rows = torch.add(line, x_pixel, alpha=heads).view(number * heads, -1)
                    bag_weights = (y_weight * x_weight).view(number * heads, -1)
                    bags = F.embedding_bag(bag_rows, rows[image], mode="sum", per_sample_weights=bag_weights)
                    total = bags if total is None else total.add_(bags)
            assert total is not None
            output[image, part] = total.view(number, heads * head_dim)
    return output


def _axis(locations: Tensor, sizes: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The two pixels of one axis that each location may lie between.

    They are i and i + 1 with i clamped into the map, and pixel j weighs max(0, 1 - |x - j|): zero for one that is no
    neighbour, so that borders need no mask, and NaN where the location is NaN.

    Args:
        locations: in [0, 1] of the map, any shape.
        sizes: pixels of the map, int64, broadcastable to `locations`.
        dtype: what weights are computed in.

    Returns:
        Both pixels (int32), both weights, and x - i in pixels.
    """
    distance = (locations * sizes.to(dtype)).sub_(0.5)
    low = distance.nan_to_num(0.0).clamp_(min=0)
    low = torch.minimum(low, (sizes - 2).clamp(min=0).to(dtype), out=low).floor_()
    distance.sub_(low)
    weights = [distance.abs().neg_().add_(1).clamp_(min=0), (distance - 1).abs_().neg_().add_(1).clamp_(min=0)]
    # A map one pixel wide has no second one.
    weights[1].mul_(sizes > 1)
    pixel = low.to(torch.int32)
    return [pixel, pixel + (sizes > 1).to(torch.int32)], weights, distance


def embedding_bag_gradients(
    grad_output: Tensor, value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `embedding_bag_attention`, one image, head and level at a time."""
    batch, _, heads, head_dim = value.shape
    queries, _, _, points = sampling_locations.shape[1:5]
    dtype = torch.promote_types(value.dtype, sampling_locations.dtype)
    grad_output = grad_output.reshape(batch, queries, heads, head_dim)
    grad_value = torch.empty(value.shape, dtype=value.dtype)
    grad_locations = torch.empty(sampling_locations.shape, dtype=sampling_locations.dtype)
    grad_weights = torch.empty(attention_weights.shape, dtype=attention_weights.dtype)
    point_queries = torch.arange(queries).repeat_interleave(points).repeat(4)
    for image in range(batch):
        for head in range(heads):
            grads = grad_output[image, :, head].to(dtype).contiguous()
            start = 0
            for level, shape in enumerate(spatial_shapes):
                tokens = slice(start, start + shape[0] * shape[1])
                start = tokens.stop
                rows = value[image, tokens, head].to(dtype).contiguous()
                locations = sampling_locations[image, :, head, level].to(dtype)
                weights = attention_weights[image, :, head, level].to(dtype)
                results = _level_gradients(grads, rows, shape, locations, weights, point_queries)
                grad_value[image, tokens, head] = results[0]
                grad_locations[image, :, head, level] = results[1]
                grad_weights[image, :, head, level] = results[2]
    return grad_value, grad_locations, grad_weights


def _level_gradients(
    grads: Tensor, rows: Tensor, shape: tuple[int, int], locations: Tensor, weights: Tensor, point_queries: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One image, head and level: gradients of `rows` (H * W, C_head), `locations` (Q, points, 2), `weights`.

    `grads` is (Q, C_head), and `point_queries` (4 * Q * points,) the query of each point, once a corner.
    """
    height, width = shape
    sizes = torch.tensor(shape)
    y_pixels, y_weights, y = _axis(locations[..., 1].flatten(), sizes[0], grads.dtype)
    x_pixels, x_weights, x = _axis(locations[..., 0].flatten(), sizes[1], grads.dtype)
    # (2, 1, Q * points) and (1, 2, Q * points): corners are lower or not, right or not.
    along_y, along_x = torch.stack(y_weights).unsqueeze(1), torch.stack(x_weights).unsqueeze(0)
    tokens = ((torch.stack(y_pixels) * width).unsqueeze(1) + torch.stack(x_pixels).unsqueeze(0)).flatten()
    # What each corner's pixel has in common with the gradient of its query's output.
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grads, rows, tokens.to(torch.int64), point_queries[:1], point_queries, 0
    ).view(2, 2, -1)
    over_y = (dots * along_y).sum(0)
    attention = weights.flatten()
    slope_x = (over_y * _slopes(x, width)).sum(0) * attention * width
    slope_y = ((dots * along_x).sum(1) * _slopes(y, height)).sum(0) * attention * height
    grad_weights = (over_y * along_x[0]).sum(0)
    # Sorted by pixel, the points that touched a pixel are a bag of output gradients.
    counts = torch.bincount(tokens, minlength=height * width)
    order = tokens.sort(stable=True).indices
    grad_rows = F.embedding_bag(
        point_queries.index_select(0, order),
        grads,
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=(along_y * along_x * attention).flatten().index_select(0, order),
    )
    return grad_rows, torch.stack((slope_x, slope_y), dim=-1).view_as(locations), grad_weights.view_as(weights)


def _slopes(distance: Tensor, size: int) -> Tensor:
    """(2, n) derivatives of the two weights of `_axis` by the location in pixels; at a centre, those to its right."""
    both = torch.stack((distance, distance - 1)).floor_()
    slopes = (both == -1).to(distance.dtype) - (both == 0).to(distance.dtype)
    if size == 1:
        slopes[1] = 0
    return slopes
