"""Deformable attention from projections: every engine against plain loops, gradients, and what may compile it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from crossdino.models import deformable_cpu, deformable_engines
from crossdino.models.deformable_attention import (
    MultiScaleDeformableAttention,
    deformable_attention,
    embedding_bag_attention,
    grid_sample_attention,
    projected_attention,
)

SHAPES = [(5, 7), (3, 4), (1, 1)]
Shapes = list[tuple[int, int]]


@pytest.fixture(params=["compiled", "pytorch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test with the C++ kernel (where a compiler is) and without it."""
    monkeypatch.setenv("CROSSDINO_CPU_KERNEL", "0" if request.param == "pytorch" else "1")
    deformable_cpu.cpu_kernel.cache_clear()
    yield request.param
    deformable_cpu.cpu_kernel.cache_clear()


def make_inputs(
    coordinates: int = 2,
    batch: int = 2,
    queries: int = 6,
    heads: int = 3,
    head_dim: int = 8,
    points: int = 4,
    shapes: Shapes = SHAPES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, references and projections; offsets of some pixels, so that many points lie outside the small maps."""
    generator = torch.Generator().manual_seed(11)
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(batch, tokens, heads, head_dim, generator=generator)
    references = torch.rand(batch, queries, len(shapes), coordinates, generator=generator)
    projections = torch.randn(batch, queries, heads * len(shapes) * points * 3, generator=generator) * 2
    return value, references, projections


def loop_points(references: Tensor, projections: Tensor, shapes: Shapes, heads: int) -> tuple[Tensor, Tensor]:
    """Locations and weights of the definition, number by number, in Python's floats."""
    batch, queries, width = projections.shape
    levels = len(shapes)
    points = width // (3 * heads * levels)
    locations = torch.zeros(batch, queries, heads, levels, points, 2, dtype=torch.double)
    weights = torch.zeros(batch, queries, heads, levels, points, dtype=torch.double)
    for n in range(batch):
        for q in range(queries):
            row = projections[n, q].double().tolist()
            logits = row[2 * width // 3 :]
            for h in range(heads):
                own = logits[h * levels * points : (h + 1) * levels * points]
                total = sum(math.exp(logit - max(own)) for logit in own)
                for level in range(levels):
                    reference = references[n, q, level].double().tolist()
                    for p in range(points):
                        index = (h * levels + level) * points + p
                        for axis in range(2):
                            if len(reference) == 2:
                                step = 1 / shapes[level][1 - axis]
                            else:
                                step = reference[2 + axis] / 2 / points
                            locations[n, q, h, level, p, axis] = reference[axis] + row[2 * index + axis] * step
                        weights[n, q, h, level, p] = math.exp(own[level * points + p] - max(own)) / total
    return locations, weights


def definition(value: Tensor, references: Tensor, projections: Tensor, shapes: Shapes) -> Tensor:
    points = loop_points(references, projections, shapes, value.shape[2])
    return grid_sample_attention(value.double(), shapes, *points)


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], shapes: Shapes) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(leaves[0], shapes, leaves[1], leaves[2])
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.double).to(output.dtype)
    return torch.autograd.grad(output, leaves, grad)


def exact_attention(value: Tensor, shapes: Shapes, references: Tensor, projections: Tensor) -> Tensor:
    """The definition spelt in differentiable operations, for gradients in double."""
    offsets, logits = projections.split((projections.shape[-1] // 3 * 2, projections.shape[-1] // 3), dim=-1)
    heads, levels = value.shape[2], len(shapes)
    offsets = offsets.unflatten(-1, (heads, levels, -1, 2))
    logits = logits.unflatten(-1, (heads, levels, -1))
    weights = logits.exp() / logits.exp().sum((-2, -1), keepdim=True)
    pieces = []
    for level, (height, width) in enumerate(shapes):
        centre = references[:, :, level, :2][:, :, None, None]
        if references.shape[-1] == 2:
            step = torch.tensor([1 / width, 1 / height], dtype=value.dtype)
        else:
            step = references[:, :, level, 2:][:, :, None, None] / 2 / logits.shape[-1]
        pieces.append(centre + offsets[:, :, :, level] * step)
    return grid_sample_attention(value, shapes, torch.stack(pieces, dim=3), weights)


# --- the sum ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize(
    ("shapes", "points", "head_dim"),
    [(SHAPES, 4, 32), ([(4, 6)], 1, 5), ([(1, 5), (4, 1)], 3, 16), ([(6, 6)] * 4, 4, 40), ([(2, 3)] * 5, 7, 8)],
)
def test_equals_plain_loops(engine: str, coordinates: int, shapes: Shapes, points: int, head_dim: int) -> None:
    inputs = make_inputs(coordinates, shapes=shapes, points=points, head_dim=head_dim)
    output = projected_attention(inputs[0], shapes, *inputs[1:])
    # The bound for float32.
    torch.testing.assert_close(output.double(), definition(*inputs, shapes), rtol=0, atol=1e-5)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_chunks_of_queries_join(engine: str, coordinates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 queries are more than a chunk of the kernel (128), and here of PyTorch's engine."""
    monkeypatch.setattr(deformable_engines, "_CHUNK_POINTS", 1000)
    inputs = make_inputs(coordinates, queries=300, batch=1)
    output = projected_attention(inputs[0], SHAPES, *inputs[1:])
    torch.testing.assert_close(output.double(), definition(*inputs, SHAPES), rtol=0, atol=1e-5)


@pytest.mark.parametrize("projection_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_locations_and_softmax_in_float32(engine: str, projection_dtype: torch.dtype) -> None:
    value, references, projections = make_inputs()
    value, projections = value.bfloat16(), projections.to(projection_dtype)
    output = projected_attention(value, SHAPES, references, projections)
    assert output.dtype == torch.bfloat16
    # Only the result is rounded, to 8 bits.
    expected = definition(value, references, projections, SHAPES)
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=1e-5)
    grads = gradients(projected_attention, (value, references, projections), SHAPES)
    assert [tensor.dtype for tensor in grads] == [torch.bfloat16, torch.float32, projection_dtype]


@pytest.mark.parametrize("logit", [80.0, -200.0, 1e4])
def test_large_logits(engine: str, logit: float) -> None:
    """The largest logit is taken away first, and what is far below it weighs nothing."""
    value, references, projections = make_inputs()
    projections[..., -1] += logit
    projections[:, :3, 72:] += 500.0
    output = projected_attention(value, SHAPES, references, projections)
    torch.testing.assert_close(output.double(), definition(value, references, projections, SHAPES), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("index", "bad"), [(0, math.nan), (1, math.nan), (72, math.nan), (72, math.inf)])
def test_nan_is_seen_in_its_query_and_head_only(engine: str, index: int, bad: float) -> None:
    value, references, projections = make_inputs()
    clean = definition(value, references, projections, SHAPES).view(2, 6, 3, 8)
    projections[1, 2, index] = bad
    output = projected_attention(value, SHAPES, references, projections).view(2, 6, 3, 8).double()
    wanted = torch.zeros(2, 6, 3, dtype=torch.bool)
    wanted[1, 2, 0] = True
    assert torch.equal(output.isnan(), wanted.unsqueeze(-1).expand_as(output))
    torch.testing.assert_close(output[~wanted], clean[~wanted], rtol=0, atol=1e-5)
    grads = gradients(projected_attention, (value, references, projections), SHAPES)
    # All other queries' projections keep their gradients.
    others = torch.ones(2, 6, dtype=torch.bool)
    others[1, 2] = False
    assert grads[2][others].isfinite().all()


def test_points_far_outside_read_nothing(engine: str) -> None:
    value, references, projections = make_inputs()
    for far in (math.inf, -math.inf, 1e30, -1e9):
        projections[..., :72] = far
        assert not projected_attention(value, SHAPES, references, projections).any()
        assert not any(
            grad.any() for grad in gradients(projected_attention, (value, references, projections), SHAPES)[:2]
        )


def test_strided_inputs(engine: str) -> None:
    inputs = make_inputs()
    strided = tuple(tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs)
    output = projected_attention(strided[0], SHAPES, *strided[1:])
    assert torch.equal(output, projected_attention(inputs[0], SHAPES, *inputs[1:]))
    pairs = zip(
        gradients(projected_attention, strided, SHAPES), gradients(projected_attention, inputs, SHAPES), strict=True
    )
    assert all(torch.equal(got, wanted) for got, wanted in pairs)


@pytest.mark.parametrize(("batch", "queries"), [(0, 4), (2, 0)])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_empty(engine: str, batch: int, queries: int, coordinates: int) -> None:
    inputs = make_inputs(coordinates, batch=batch, queries=queries)
    assert projected_attention(inputs[0], SHAPES, *inputs[1:]).shape == (batch, queries, 24)
    grads = gradients(projected_attention, inputs, SHAPES)
    assert all(grad.shape == tensor.shape and not grad.any() for grad, tensor in zip(grads, inputs, strict=True))


def test_sizes_that_disagree_are_refused() -> None:
    value, references, projections = make_inputs()
    with pytest.raises(ValueError, match="hold 13 tokens, but the value has 48"):
        projected_attention(value, SHAPES[1:], references[:, :, 1:], projections)
    for bad in (
        (references[:, :, :2], projections),
        (references[..., :1], projections),
        (references[:, :5], projections),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            projected_attention(value, SHAPES, *bad)
    with pytest.raises(ValueError, match="do not fit"):
        projected_attention(value, SHAPES, references, projections[..., :-1])


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinates", [2, 4])
def test_gradcheck_in_double(coordinates: int) -> None:
    value, references, projections = make_inputs(coordinates, batch=1, queries=2, heads=2, head_dim=3, points=2)
    inputs = [tensor.double().requires_grad_() for tensor in (value, references, projections)]
    assert torch.autograd.gradcheck(lambda v, r, p: projected_attention(v, SHAPES, r, p), inputs)


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize(("batch", "heads", "head_dim"), [(2, 3, 32), (1, 1, 5)])
def test_gradients_equal_the_definitions(engine: str, coordinates: int, batch: int, heads: int, head_dim: int) -> None:
    inputs = make_inputs(coordinates, batch=batch, heads=heads, head_dim=head_dim, queries=150)
    got = gradients(projected_attention, inputs, SHAPES)
    wanted = gradients(exact_attention, tuple(tensor.double() for tensor in inputs), SHAPES)
    for one, exact in zip(got, wanted, strict=True):
        # A reference's gradient is a sum over heads and points of differences of pixels times the map's width.
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=2e-4)


def test_gradients_do_not_depend_on_threads() -> None:
    """One image and head: with two threads, levels are the tasks."""
    inputs = make_inputs(4, batch=1, heads=1, queries=40)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(gradients(projected_attention, inputs, SHAPES))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_gradients_of_the_plain_form_on_every_engine(engine: str) -> None:
    """Also levels one pixel high or wide, and points exactly on centres and borders."""
    shapes = [(1, 4), (4, 1), (1, 1), (2, 2)]
    generator = torch.Generator().manual_seed(6)
    value = torch.randn(1, 13, 2, 4, generator=generator)
    locations = torch.rand(1, 30, 2, 4, 3, 2, generator=generator) * 1.6 - 0.3
    weights = torch.rand(1, 30, 2, 4, 3, generator=generator)
    inputs = (value, locations, weights)
    got = gradients(deformable_attention, inputs, shapes)
    wanted = gradients(grid_sample_attention, tuple(tensor.double() for tensor in inputs), shapes)
    for one, exact in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=5e-5)
    # On centres the slope has a corner: all engines take the one to the right, as `grid_sample` does.
    centres = torch.tensor([0.125, 0.375, 0.625, 0.875, 0.0, 1.0])
    grid = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=-1).view(1, 36, 1, 1, 1, 2)
    value = torch.randn(1, 16, 1, 4, generator=generator)
    inputs = (value, grid, torch.ones(1, 36, 1, 1, 1))
    got = gradients(deformable_attention, inputs, [(4, 4)])
    for one, exact in zip(got, gradients(grid_sample_attention, inputs, [(4, 4)]), strict=True):
        torch.testing.assert_close(one, exact, rtol=1e-5, atol=5e-5)


# --- the operator -----------------------------------------------------------------------------------------------------


# The warning comes from opcheck itself, which looks at the .grad of copies that it made.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_operator_is_registered_soundly(engine: str) -> None:
    value, references, projections = (tensor.requires_grad_() for tensor in make_inputs())
    flat_shapes = [side for shape in SHAPES for side in shape]
    arguments = (value, flat_shapes, references, projections)
    torch.library.opcheck(torch.ops.crossdino.projected_attention, arguments)
    detached = (torch.randn(2, 6, 24), value.detach(), flat_shapes, references.detach(), projections.detach(), True)
    torch.library.opcheck(torch.ops.crossdino.projected_attention_backward, detached)


def test_compiled_with_dynamic_shapes() -> None:
    torch.manual_seed(0)
    module = MultiScaleDeformableAttention(hidden_dim=16, num_levels=2, num_heads=2)
    torch.nn.init.normal_(module.sampling_offsets.weight)
    compiled = torch.compile(module, dynamic=True, backend="aot_eager", fullgraph=True)
    for shapes, queries in (([(4, 5), (2, 3)], 5), ([(6, 3), (3, 2)], 9)):
        tokens = sum(height * width for height, width in shapes)
        arguments = (torch.randn(1, queries, 16), torch.rand(1, queries, 2, 4), torch.randn(1, tokens, 16), shapes)
        mask = torch.arange(tokens).unsqueeze(0) > tokens - 4
        got, wanted = compiled(*arguments, mask), module(*arguments, mask)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        got.sum().backward()


def test_checkpointed_gradients_are_the_same(engine: str) -> None:
    inputs = make_inputs(4)

    def checkpointed(value: Tensor, shapes: Shapes, references: Tensor, projections: Tensor) -> Tensor:
        return checkpoint(projected_attention, value, shapes, references, projections, use_reentrant=False)

    pairs = zip(gradients(checkpointed, inputs, SHAPES), gradients(projected_attention, inputs, SHAPES), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_references_without_gradient_get_none(engine: str) -> None:
    value, references, projections = make_inputs(4)
    value.requires_grad_()
    projections.requires_grad_()
    projected_attention(value, SHAPES, references, projections).sum().backward()
    assert references.grad is None
    wanted = gradients(exact_attention, tuple(t.detach().double() for t in (value, references, projections)), SHAPES)
    assert value.grad is not None and projections.grad is not None
    assert value.grad.shape == wanted[0].shape and projections.grad.isfinite().all()


def test_plain_functions_agree_with_the_projected_one(engine: str) -> None:
    value, references, projections = make_inputs(4)
    locations, weights = (tensor.float() for tensor in loop_points(references, projections, SHAPES, 3))
    projected = projected_attention(value, SHAPES, references, projections)
    for function in (deformable_attention, embedding_bag_attention, grid_sample_attention):
        torch.testing.assert_close(function(value, SHAPES, locations, weights), projected, rtol=0, atol=1e-5)
