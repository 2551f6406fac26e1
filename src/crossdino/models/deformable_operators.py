"""The custom operators of deformable attention: which engine computes, gradients, shapes, and counts.

`crossdino::deformable_attention` and `crossdino::projected_attention` stand in the graph whatever computes them. The
backward pass keeps only the operator's inputs; nothing of the size of the samples is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from crossdino.models import deformable_cpu, deformable_triton
from crossdino.models.deformable_engines import (
    embedding_bag_attention,
    embedding_bag_gradients,
    grid_sample_attention,
    grid_sample_gradients,
    projected_bag_attention,
    projection_gradients,
    sampling_points,
)


def _pairs(flat_shapes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(flat_shapes[0::2], flat_shapes[1::2], strict=True))


# --- the operator of locations and weights ----------------------------------------------------------------------------


def _check_tokens(value: Tensor, flat_shapes: Sequence[int]) -> None:
    """The kernels trust their sizes, so a disagreement must stop here."""
    tokens = sum(height * width for height, width in _pairs(flat_shapes))
    if tokens != value.shape[1]:
        raise ValueError(
            f"spatial_shapes {_pairs(flat_shapes)} hold {tokens} tokens, but the value has {value.shape[1]}"
        )


def _check_points(value: Tensor, flat_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> None:
    _check_tokens(value, flat_shapes)
    levels = len(flat_shapes) // 2
    expected = (value.shape[0], *locations.shape[1:2], value.shape[2], levels, *locations.shape[4:5], 2)
    if tuple(locations.shape) != expected or tuple(weights.shape) != expected[:-1]:
        raise ValueError(
            f"sampling_locations {tuple(locations.shape)} and attention_weights {tuple(weights.shape)} do not fit "
            f"value {tuple(value.shape)} with {levels} levels"
        )


@torch.library.custom_op("crossdino::deformable_attention", mutates_args=())
def attention_op(
    value: Tensor, flat_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """`deformable_attention`, with heights and widths of the levels in one list."""
    _check_points(value, flat_shapes, sampling_locations, attention_weights)
    batch, _, heads, head_dim = value.shape
    if sampling_locations.numel() == 0 or value.numel() == 0:
        return value.new_zeros((batch, sampling_locations.shape[1], heads * head_dim))
    kernel = deformable_cpu.kernel_for(value, sampling_locations, attention_weights)
    if kernel is not None:
        return deformable_cpu.kernel_forward(kernel, value, flat_shapes, sampling_locations, attention_weights)
    shapes = _pairs(flat_shapes)
    if value.device.type == "cpu":
        return embedding_bag_attention(value, shapes, sampling_locations, attention_weights)
    output = deformable_triton.triton_forward(value, shapes, sampling_locations, attention_weights)
    if output is not None:
        return output
    return grid_sample_attention(value, shapes, sampling_locations, attention_weights).contiguous()


@attention_op.register_fake
def _(value: Tensor, flat_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
    return value.new_empty((value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3]))


@torch.library.custom_op("crossdino::deformable_attention_backward", mutates_args=())
def _attention_backward_op(
    grad_output: Tensor,
    value: Tensor,
    flat_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if sampling_locations.numel() == 0 or value.numel() == 0:
        return _zeros(value), _zeros(sampling_locations), _zeros(attention_weights)
    kernel = deformable_cpu.kernel_for(value, sampling_locations, attention_weights)
    if kernel is not None:
        return deformable_cpu.kernel_backward(
            kernel, grad_output, value, flat_shapes, sampling_locations, attention_weights
        )
    return _pytorch_gradients(grad_output, value, _pairs(flat_shapes), sampling_locations, attention_weights)


def _pytorch_gradients(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Without the C++ kernel."""
    arguments = (grad_output, value, shapes, sampling_locations, attention_weights)
    if value.device.type == "cpu":
        return embedding_bag_gradients(*arguments)
    gradients = deformable_triton.triton_gradients(*arguments)
    return grid_sample_gradients(*arguments) if gradients is None else gradients


def _zeros(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(tensor.shape)


def _empty(tensor: Tensor) -> Tensor:
    """Contiguous, as the engines return their gradients."""
    return tensor.new_empty(tensor.shape)


@_attention_backward_op.register_fake
def _(
    grad_output: Tensor,
    value: Tensor,
    flat_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(value), _empty(sampling_locations), _empty(attention_weights)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.flat_shapes, second, third = inputs
    ctx.save_for_backward(value, second, third)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, sampling_locations, attention_weights = ctx.saved_tensors
    grads = _attention_backward_op(grad_output, value, ctx.flat_shapes, sampling_locations, attention_weights)
    return grads[0], None, grads[1], grads[2]


attention_op.register_autograd(_backward, setup_context=_save_inputs)


# --- the operator of projections --------------------------------------------------------------------------------------


def _check_projections(
    value: Tensor, flat_shapes: Sequence[int], reference_points: Tensor, projections: Tensor
) -> None:
    _check_tokens(value, flat_shapes)
    batch, _, heads, _ = value.shape
    levels = len(flat_shapes) // 2
    places = (batch, *projections.shape[1:2])
    if (
        tuple(reference_points.shape[:-1]) != (*places, levels)
        or reference_points.shape[-1] not in (2, 4)
        or tuple(projections.shape[:-1]) != places
        or projections.shape[-1] % (3 * heads * levels) != 0
    ):
        raise ValueError(
            f"reference_points {tuple(reference_points.shape)} and projections {tuple(projections.shape)} do not fit "
            f"value {tuple(value.shape)} with {levels} levels"
        )


@torch.library.custom_op("crossdino::projected_attention", mutates_args=())
def projected_op(value: Tensor, flat_shapes: Sequence[int], reference_points: Tensor, projections: Tensor) -> Tensor:
    """`projected_attention`, with heights and widths of the levels in one list."""
    _check_projections(value, flat_shapes, reference_points, projections)
    batch, _, heads, head_dim = value.shape
    if projections.numel() == 0 or value.numel() == 0:
        return value.new_zeros((batch, projections.shape[1], heads * head_dim))
    kernel = deformable_cpu.kernel_for(value, reference_points, projections)
    if kernel is not None:
        return deformable_cpu.projected_kernel_forward(kernel, value, flat_shapes, reference_points, projections)
    shapes = _pairs(flat_shapes)
    if value.device.type == "cpu":
        return projected_bag_attention(value, shapes, reference_points, projections)
    return attention_op(value, flat_shapes, *sampling_points(reference_points, projections, shapes, heads))


@projected_op.register_fake
def _(value: Tensor, flat_shapes: Sequence[int], reference_points: Tensor, projections: Tensor) -> Tensor:
    return value.new_empty((value.shape[0], projections.shape[1], value.shape[2] * value.shape[3]))


@torch.library.custom_op("crossdino::projected_attention_backward", mutates_args=())
def _projected_backward_op(
    grad_output: Tensor,
    value: Tensor,
    flat_shapes: Sequence[int],
    reference_points: Tensor,
    projections: Tensor,
    needs_references: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if projections.numel() == 0 or value.numel() == 0:
        return _zeros(value), _zeros(reference_points), _zeros(projections)
    kernel = deformable_cpu.kernel_for(value, reference_points, projections)
    if kernel is not None:
        return deformable_cpu.projected_kernel_backward(
            kernel, grad_output, value, flat_shapes, reference_points, projections, needs_references
        )
    shapes, heads = _pairs(flat_shapes), value.shape[2]
    locations, weights = sampling_points(reference_points, projections, shapes, heads)
    grad_value, grad_locations, grad_weights = _pytorch_gradients(grad_output, value, shapes, locations, weights)
    return (
        grad_value,
        *projection_gradients(grad_locations, grad_weights, reference_points, projections, shapes, heads),
    )


@_projected_backward_op.register_fake
def _(
    grad_output: Tensor,
    value: Tensor,
    flat_shapes: Sequence[int],
    reference_points: Tensor,
    projections: Tensor,
    needs_references: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(value), _empty(reference_points), _empty(projections)


def _projected_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor | None, Tensor]:
    value, reference_points, projections = ctx.saved_tensors
    needs_references = ctx.needs_input_grad[2]
    grads = _projected_backward_op(grad_output, value, ctx.flat_shapes, reference_points, projections, needs_references)
    return grads[0], None, grads[1] if needs_references else None, grads[2]


projected_op.register_autograd(_projected_backward, setup_context=_save_inputs)


@register_flop_formula(
    [
        torch.ops.crossdino.deformable_attention,
        torch.ops.crossdino.deformable_attention_backward,
        torch.ops.crossdino.projected_attention,
        torch.ops.crossdino.projected_attention_backward,
    ]
)
def _attention_flops(*_args: Any, **_kwargs: Any) -> int:
    """Zero: sampling is interpolation, which the field's counts leave out, as this counter does for `grid_sample`.

    The official DINO-4scale ResNet-50 at 800x1333 (22223 tokens) is measured with 170.4 GMACs in the encoder, and its
    linear layers alone have 6 * 22223 * 1277952 = 170.40. The weighted sum of the samples would add 0.55 (0.3 %),
    the four bilinear corners of each sample 2.2 more.
    """
    return 0
