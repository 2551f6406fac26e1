"""Deformable attention: every engine against plain Python loops, gradients, counting, fallbacks, and the module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from crossdino.models import deformable_attention as room
from crossdino.models import deformable_cpu, deformable_engines
from crossdino.models.deformable_attention import (
    MultiScaleDeformableAttention,
    deformable_attention,
    embedding_bag_attention,
    grid_sample_attention,
)

SHAPES = [(5, 7), (3, 4), (1, 1)]
FUNCTIONS = [deformable_attention, embedding_bag_attention, grid_sample_attention]
Inputs = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(params=["compiled", "pytorch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test with the C++ kernel (where a compiler is) and without it."""
    monkeypatch.setenv("CROSSDINO_CPU_KERNEL", "0" if request.param == "pytorch" else "1")
    deformable_cpu.cpu_kernel.cache_clear()
    yield request.param
    deformable_cpu.cpu_kernel.cache_clear()


def make_inputs(
    batch: int = 2,
    heads: int = 3,
    head_dim: int = 5,
    queries: int = 6,
    points: int = 4,
    shapes: list[tuple[int, int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Random value, locations (a third of them outside the map), weights."""
    generator = torch.Generator().manual_seed(7)
    tokens = sum(height * width for height, width in shapes)
    place = (batch, queries, heads, len(shapes), points)
    value = torch.randn((batch, tokens, heads, head_dim), generator=generator, dtype=dtype)
    locations = torch.rand((*place, 2), generator=generator, dtype=dtype) * 1.6 - 0.3
    weights = torch.rand(place, generator=generator, dtype=dtype).flatten(-2).softmax(-1).view(place)
    return value, locations, weights


def loop_attention(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The definition in plain Python floats: triangle weights over the pixels around the point, zeros outside."""
    batch, _, heads, head_dim = value.shape
    _, queries, _, _, points, _ = locations.shape
    values, places, factors = value.double().tolist(), locations.double().tolist(), weights.double().tolist()
    output = [[[0.0] * (heads * head_dim) for _ in range(queries)] for _ in range(batch)]
    for n in range(batch):
        for q in range(queries):
            for h in range(heads):
                start = 0
                for level, (height, width) in enumerate(shapes):
                    for p in range(points):
                        # Pixel i has its centre at i + 0.5 pixels from the border.
                        x = places[n][q][h][level][p][0] * width - 0.5
                        y = places[n][q][h][level][p][1] * height - 0.5
                        for row in range(height):
                            for column in range(width):
                                share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                                if share == 0:
                                    continue
                                pixel = values[n][start + row * width + column][h]
                                for c in range(head_dim):
                                    output[n][q][h * head_dim + c] += factors[n][q][h][level][p] * share * pixel[c]
                    start += height * width
    return torch.tensor(output)


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], shapes: list[tuple[int, int]], grad: Tensor
) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(leaves[0], shapes, leaves[1], leaves[2]), leaves, grad)


# --- the sum ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [5, 16, 32, 40])
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_plain_loops(engine: str, head_dim: int, batch: int) -> None:
    value, locations, weights = make_inputs(batch=batch, head_dim=head_dim)
    expected = loop_attention(value, SHAPES, locations, weights)
    for function in FUNCTIONS:
        output = function(value, SHAPES, locations, weights)
        assert output.shape == (batch, 6, 3 * head_dim)
        # The bound for float32.
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shapes", "points"), [([(4, 6)], 1), ([(1, 5), (4, 1)], 3), ([(6, 6)] * 5, 7)])
def test_any_number_of_levels_and_points(engine: str, shapes: list[tuple[int, int]], points: int) -> None:
    value, locations, weights = make_inputs(shapes=shapes, points=points, head_dim=32)
    expected = loop_attention(value, shapes, locations, weights)
    for function in FUNCTIONS:
        torch.testing.assert_close(function(value, shapes, locations, weights), expected, rtol=0, atol=1e-5)


def test_borders_and_centres(engine: str) -> None:
    """Hand-made: a border reads half of the border pixel, a corner a quarter, a centre all, a pixel beyond nothing."""
    value = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 4, 1, 1)
    cases = {
        (0.25, 0.25): 1.0,
        (0.75, 0.75): 8.0,
        (0.5, 0.5): 15 / 4,
        (0.0, 0.25): 0.5,
        (0.0, 0.0): 0.25,
        (1.0, 1.0): 2.0,
        (1.0, 0.75): 4.0,
        (-0.25, 0.25): 0.0,
        (1.25, 0.25): 0.0,
        (0.25, 1e30): 0.0,
        (-math.inf, 0.25): 0.0,
        (0.25, math.inf): 0.0,
    }
    locations = torch.tensor(list(cases)).view(1, -1, 1, 1, 1, 2)
    for function in FUNCTIONS:
        output = function(value, [(2, 2)], locations, torch.ones(1, len(cases), 1, 1, 1))
        # All values are sums of powers of two: exact.
        assert output.flatten().tolist() == list(cases.values())


def test_nan_location_makes_its_query_and_head_nan_and_nothing_else(engine: str) -> None:
    value, locations, weights = make_inputs(head_dim=16)
    clean = loop_attention(value, SHAPES, locations, weights).view(2, 6, 3, 16)
    locations[0, 1, 2, 0, 3, 0] = math.nan
    locations[1, 4, 0, 2, 0, 1] = math.nan
    wanted = torch.zeros(2, 6, 3, dtype=torch.bool)
    wanted[0, 1, 2] = wanted[1, 4, 0] = True
    for function in FUNCTIONS:
        output = function(value, SHAPES, locations, weights).view(2, 6, 3, 16)
        assert torch.equal(output.isnan(), wanted.unsqueeze(-1).expand_as(output))
        torch.testing.assert_close(output[~wanted], clean[~wanted], rtol=0, atol=1e-5)
    # The backward pass survives it, and the other queries' gradients are untouched.
    grads = gradients(deformable_attention, (value, locations, weights), SHAPES, torch.ones(2, 6, 48))
    assert grads[1][~wanted].isfinite().all() and grads[2][~wanted].isfinite().all()


def test_chunks_of_queries_join(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(queries=600, heads=2, head_dim=16)
    expected = grid_sample_attention(inputs[0].double(), SHAPES, inputs[1].double(), inputs[2].double()).float()
    monkeypatch.setattr(deformable_engines, "_CHUNK_POINTS", 1000)
    for function in (deformable_attention, embedding_bag_attention):
        torch.testing.assert_close(function(inputs[0], SHAPES, *inputs[1:]), expected, rtol=0, atol=1e-5)


def test_not_contiguous_inputs(engine: str) -> None:
    inputs = make_inputs(head_dim=32)
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs]
    expected = loop_attention(inputs[0], SHAPES, inputs[1], inputs[2])
    output = deformable_attention(strided[0], SHAPES, strided[1], strided[2])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head_dim", [5, 32])
def test_bfloat16_values(engine: str, head_dim: int) -> None:
    value, locations, weights = make_inputs(head_dim=head_dim)
    value = value.bfloat16()
    expected = loop_attention(value, SHAPES, locations, weights)
    for function in FUNCTIONS:
        output = function(value, SHAPES, locations, weights)
        assert output.dtype == torch.bfloat16
        # Half a unit in the last of 8 bits: only the result is rounded, the sum is float32.
        torch.testing.assert_close(output.float(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(("batch", "queries"), [(0, 4), (2, 0)])
def test_empty(engine: str, batch: int, queries: int) -> None:
    inputs = make_inputs(batch=batch, queries=queries)
    grads = gradients(deformable_attention, inputs, SHAPES, torch.zeros(batch, queries, 15))
    assert all(grad.shape == tensor.shape and not grad.any() for grad, tensor in zip(grads, inputs, strict=True))


def test_sizes_that_disagree_are_refused(engine: str) -> None:
    value, locations, weights = make_inputs()
    with pytest.raises(ValueError, match="hold 28 tokens, but the value has 48"):
        deformable_attention(value, [(4, 4), (3, 4), (0, 0)], locations, weights)
    with pytest.raises(ValueError, match="do not fit"):
        deformable_attention(value, SHAPES, locations[:, :, :2], weights)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [grid_sample_attention, deformable_attention])
def test_gradcheck_in_double(function: Callable[..., Tensor]) -> None:
    inputs = [
        tensor.requires_grad_() for tensor in make_inputs(batch=1, heads=2, queries=2, points=2, dtype=torch.double)
    ]
    assert torch.autograd.gradcheck(lambda value, places, weights: function(value, SHAPES, places, weights), inputs)


@pytest.mark.parametrize("head_dim", [5, 16, 32, 64])
@pytest.mark.parametrize(("batch", "heads"), [(2, 3), (1, 1)])
def test_gradients_equal_the_definitions(engine: str, head_dim: int, batch: int, heads: int) -> None:
    """One image with one head is fewer tasks than threads: the kernel then splits the levels."""
    inputs = make_inputs(batch=batch, heads=heads, head_dim=head_dim, queries=20)
    grad = torch.randn(batch, 20, heads * head_dim, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        grads = gradients(deformable_attention, inputs, SHAPES, grad)
    finally:
        torch.set_num_threads(threads)
    exact = gradients(grid_sample_attention, [tensor.double() for tensor in inputs], SHAPES, grad.double())
    for got, wanted in zip(grads, exact, strict=True):
        # Gradients of locations are differences of pixels times the map's width: a few times larger than the output.
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=5e-5)


def test_bfloat16_gradients(engine: str) -> None:
    value, locations, weights = make_inputs(head_dim=32)
    value, grad = value.bfloat16(), torch.randn(2, 6, 96).bfloat16()
    grads = gradients(deformable_attention, (value, locations, weights), SHAPES, grad)
    exact = gradients(
        grid_sample_attention, (value.double(), locations.double(), weights.double()), SHAPES, grad.double()
    )
    assert [tensor.dtype for tensor in grads] == [torch.bfloat16, torch.float32, torch.float32]
    # Only the value's gradient is rounded to 8 bits, at the end.
    torch.testing.assert_close(grads[0].double(), exact[0], rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(grads[1].double(), exact[1], rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(grads[2].double(), exact[2], rtol=1e-5, atol=5e-5)


# --- the operator -----------------------------------------------------------------------------------------------------


# The warning comes from opcheck itself, which looks at the .grad of copies that it made.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_operator_is_registered_soundly(engine: str) -> None:
    value, locations, weights = (tensor.requires_grad_() for tensor in make_inputs(head_dim=16))
    flat_shapes = [side for shape in SHAPES for side in shape]
    torch.library.opcheck(torch.ops.crossdino.deformable_attention, (value, flat_shapes, locations, weights))
    grad = torch.randn(2, 6, 48)
    arguments = (grad, value.detach(), flat_shapes, locations.detach(), weights.detach())
    torch.library.opcheck(torch.ops.crossdino.deformable_attention_backward, arguments)


def test_exported_graph_needs_only_torch() -> None:
    module = MultiScaleDeformableAttention(hidden_dim=32, num_levels=3, num_heads=2)
    inputs = (torch.randn(1, 4, 32), torch.rand(1, 4, 3, 4), torch.randn(1, 48, 32))
    program = torch.export.export(module, (*inputs, SHAPES))
    assert not [node for node in program.graph.nodes if "crossdino" in str(node.target)]
    torch.testing.assert_close(program.module()(*inputs, SHAPES), module(*inputs, SHAPES), rtol=0, atol=1e-5)


def test_flops_do_not_depend_on_the_engine(engine: str) -> None:
    module = MultiScaleDeformableAttention(hidden_dim=32, num_levels=3, num_heads=2)
    counts = []
    for device in ("cpu", "meta"):
        query, references, value = torch.randn(2, 6, 32), torch.rand(2, 6, 3, 2), torch.randn(2, 48, 32)
        with FlopCounterMode(display=False) as counter:
            module.to(device)(query.to(device), references.to(device), value.to(device), SHAPES).sum().backward()
        assert torch.ops.crossdino.projected_attention in counter.get_flop_counts()["Global"]
        counts.append(counter.get_total_flops())
    # Two flops a multiply-add; forward, and backward for inputs (not for query and value) and weights.
    linear_macs = 2 * (6 * 32 * (48 + 24 + 32) + 48 * 32 * 32)
    assert counts == [2 * (2 * linear_macs + 2 * 6 * 32 * 32)] * 2


def test_flops_of_the_official_encoder() -> None:
    """170.4 GMACs measured on the official DINO-4scale at 800x1333 (method, section 6), 6 layers of 22223 tokens."""
    shapes = [(100, 167), (50, 84), (25, 42), (13, 21)]
    with torch.device("meta"):
        attention = MultiScaleDeformableAttention()
        feedforward = nn.Sequential(nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 256))
        tokens, references = torch.empty(1, 22223, 256), torch.empty(1, 22223, 4, 2)
        with FlopCounterMode(display=False) as counter:
            feedforward(attention(tokens, references, tokens, shapes))
    assert round(6 * counter.get_total_flops() / 2 / 1e9, 1) == 170.4


# --- the module -------------------------------------------------------------------------------------------------------


def test_initial_values_form_a_ring() -> None:
    module = MultiScaleDeformableAttention()
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == {
        "sampling_offsets.weight": (256, 256),
        "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256),
        "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }
    offsets = module.sampling_offsets.bias.detach().view(8, 4, 4, 2)
    ring = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, direction in enumerate(ring):
        for point in range(4):
            expected = torch.tensor(direction).float() * (point + 1)
            # cos and sin of multiples of 45 degrees are rounded in float32.
            torch.testing.assert_close(offsets[head, :, point], expected.expand(4, 2), rtol=0, atol=4e-6)
    for zero in (module.sampling_offsets.weight, module.attention_weights.weight, module.attention_weights.bias):
        assert not zero.any()
    for projection in (module.value_proj, module.output_proj):
        bound = math.sqrt(6 / 512)
        assert not projection.bias.any()
        assert 0.98 * bound < projection.weight.abs().max() <= bound


@pytest.mark.parametrize("coordinates", [2, 4])
def test_module_follows_its_definition(engine: str, coordinates: int) -> None:
    torch.manual_seed(3)
    heads, points, width = 2, 4, 8
    module = MultiScaleDeformableAttention(hidden_dim=width, num_levels=3, num_heads=heads, num_points=points)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    query, references, value = torch.randn(2, 5, width), torch.rand(2, 5, 3, coordinates), torch.randn(2, 48, width)
    padding = torch.rand(2, 48) < 0.3

    def linear(layer: nn.Linear, tensor: Tensor) -> Tensor:
        return torch.einsum("oc,nqc->nqo", layer.weight, tensor) + layer.bias

    with torch.no_grad():
        projected = linear(module.value_proj, value)
        projected[padding] = 0
        offsets = linear(module.sampling_offsets, query).view(2, 5, heads, 3, points, 2)
        logits = linear(module.attention_weights, query).view(2, 5, heads, 3 * points).exp()
        weights = (logits / logits.sum(-1, keepdim=True)).view(2, 5, heads, 3, points)
        locations = torch.empty_like(offsets)
        for level, (rows, columns) in enumerate(SHAPES):
            centre = references[:, :, level, :2]
            for head in range(heads):
                for point in range(points):
                    offset = offsets[:, :, head, level, point]
                    if coordinates == 2:
                        step = offset / torch.tensor([columns, rows])
                    else:
                        step = offset / points * references[:, :, level, 2:] * 0.5
                    locations[:, :, head, level, point] = centre + step
        sampled = loop_attention(projected.view(2, 48, heads, -1), SHAPES, locations, weights)
        expected = linear(module.output_proj, sampled)
        output = module(query, references, value, SHAPES, padding)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_padded_tokens_do_not_count(engine: str) -> None:
    torch.manual_seed(4)
    module = MultiScaleDeformableAttention(hidden_dim=16, num_levels=3, num_heads=2)
    nn.init.ones_(module.value_proj.bias)
    query, references, value = torch.randn(1, 5, 16), torch.rand(1, 5, 3, 2), torch.randn(1, 48, 16)
    padding = torch.zeros(1, 48, dtype=torch.bool)
    unpadded = module(query, references, value, SHAPES)
    assert torch.equal(module(query, references, value, SHAPES, padding), unpadded)
    padding[:, 20:] = True
    masked = module(query, references, value, SHAPES, padding)
    assert not torch.allclose(masked, unpadded, atol=1e-3)
    value[:, 20:] = 1e3
    assert torch.equal(module(query, references, value, SHAPES, padding), masked)


def test_autocast_keeps_locations_in_float32(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, ...]] = []

    def spy(value: Tensor, shapes: list[tuple[int, int]], references: Tensor, projections: Tensor) -> Tensor:
        places = deformable_engines.sampling_points(references, projections, shapes, value.shape[2])
        seen.append((value.dtype, *(tensor.dtype for tensor in places)))
        return room_projected(value, shapes, references, projections)

    room_projected = room.projected_attention
    monkeypatch.setattr(room, "projected_attention", spy)
    torch.manual_seed(5)
    module = MultiScaleDeformableAttention(hidden_dim=64, num_levels=1, num_heads=2)
    shapes = [(100, 160)]
    query, references = torch.randn(1, 9, 64), torch.rand(1, 9, 1, 2)
    value = torch.linspace(0, 1, 160).repeat(100).view(1, -1, 1).expand(1, -1, 64).contiguous()
    expected = module(query, references, value, shapes)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(query, references, value, shapes)
        output.sum().backward()
    assert seen == [(torch.float32, torch.float32, torch.float32), (torch.bfloat16, torch.float32, torch.float32)]
    # A ramp of height 1 over 160 pixels: values and projections carry 8 bits, so about 2 % of the largest output.
    assert (output - expected).abs().max() < 0.02 * expected.abs().max()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())
