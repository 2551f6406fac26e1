"""Fast linear layers against `torch.nn.functional.linear` and against plain products in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from crossdino.models import dense
from crossdino.models.dense import apply_linear, in_chunks, linear


def inputs(rows, width_in, width_out, dtype=torch.float32, requires_grad=True):
    generator = torch.Generator().manual_seed(rows + width_in)
    x, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((2, rows, width_in), (width_out, width_in), (width_out,))
    )
    return [t.to(dtype).requires_grad_(requires_grad) for t in (x, weight, bias)]


def plain(x, weight, bias, activation):
    y = x.double() @ weight.double().T
    y = y if bias is None else y + bias.double()
    return y.clamp(min=0) if activation == "relu" else y


@pytest.fixture
def onednn_calls(monkeypatch):
    """How often the fast path was taken."""
    calls = []
    operator = dense._ONEDNN
    assert operator is not None, "this build of torch has no oneDNN"
    monkeypatch.setattr(dense, "_ONEDNN", lambda *arguments: calls.append(1) or operator(*arguments))
    return calls


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("rows", "width_in", "width_out"), [(200, 96, 33), (513, 31, 7), (129, 1, 5)])
def test_value_and_gradients(onednn_calls, rows, width_in, width_out, has_bias, activation):
    x, weight, bias = inputs(rows, width_in, width_out)
    bias = bias if has_bias else None
    leaves = [t for t in (x, weight, bias) if t is not None]
    result = linear(x, weight, bias, activation)
    assert onednn_calls
    expected = plain(x, weight, bias, activation)
    # The rounding of a float32 sum of about a hundred products.
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(result, leaves, grad)
    wanted = torch.autograd.grad(expected, leaves, grad.double())
    for gradient, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-4 * right.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias, activation), result.detach(), rtol=0, atol=0)


def test_the_result_may_be_changed_in_place():
    x, weight, bias = inputs(300, 16, 8)
    mask = torch.arange(300) % 3 == 0
    result = linear(x, weight, bias).masked_fill_(mask[:, None], 0.0)
    (gradient,) = torch.autograd.grad(result.sum(), [bias])
    torch.testing.assert_close(gradient, torch.full((8,), 400.0))


def test_only_the_gradients_that_are_wanted():
    x, weight, bias = inputs(300, 16, 8)
    (gradient,) = torch.autograd.grad(linear(x.detach(), weight.detach(), bias).sum(), [bias])
    torch.testing.assert_close(gradient, torch.full((8,), 600.0))
    assert not linear(x.detach(), weight.detach(), bias.detach()).requires_grad


def test_few_rows_none_and_other_dtypes_take_the_plain_way(onednn_calls):
    for rows, dtype in ((3, torch.float32), (0, torch.float32), (400, torch.float64)):
        x, weight, bias = inputs(rows, 12, 4, dtype)
        torch.testing.assert_close(linear(x, weight, bias, "relu"), F.linear(x, weight, bias).relu())
    assert not onednn_calls


def test_views_that_are_not_contiguous():
    x, weight, bias = inputs(400, 24, 10, requires_grad=False)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    sliced = torch.cat((x, x), dim=-1)[..., :24]
    for view in (turned, sliced, x[:1].expand(3, -1, -1)):
        torch.testing.assert_close(linear(view, weight, bias), F.linear(view, weight, bias), rtol=1e-5, atol=1e-5)


def test_a_bias_with_gaps_is_read_with_its_gaps(onednn_calls):
    x, weight, bias = inputs(400, 24, 10, requires_grad=False)
    for view in (torch.stack((bias, -bias), dim=1)[:, 0], bias[:1].expand(10)):
        torch.testing.assert_close(linear(x, weight, view), F.linear(x, weight, view), rtol=1e-5, atol=1e-5)
    assert onednn_calls
    torch.testing.assert_close(linear(x, weight, bias[:1]), F.linear(x, weight, bias[:1]))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_nan_is_not_taken_for_a_negative_number(place):
    tensors = inputs(400, 24, 10)
    with torch.no_grad():
        tensors[place].view(-1)[3] = torch.nan
    results, gradients = [], []
    for function in (lambda *t: linear(*t, "relu"), lambda *t: F.linear(*t).relu()):
        results.append(function(*tensors))
        gradients.append(torch.autograd.grad(results[-1].sum(), tensors))
    assert results[1].isnan().any()
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-3, equal_nan=True)  # sums of 800
    with torch.no_grad():
        assert torch.equal(linear(*tensors, "relu").isnan(), results[1].isnan())


# torch deprecates its tracer, which its own function transforms use too.
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_second_derivatives_and_function_transforms():
    x, weight, bias = inputs(300, 6, 4)
    (slope,) = torch.autograd.grad(linear(x, weight, bias, "relu").square().sum(), [x], create_graph=True)
    slope.square().sum().backward()
    found = weight.grad.clone()
    weight.grad = None
    (slope,) = torch.autograd.grad(F.linear(x, weight, bias).relu().square().sum(), [x], create_graph=True)
    slope.square().sum().backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-2)  # sums of 600 numbers of about 100

    x, weight = x.detach(), weight.detach()
    per_image = torch.func.vmap(torch.func.grad(lambda w, one: linear(one, w).sum()), in_dims=(None, 0))(weight, x)
    torch.testing.assert_close(per_image, x.sum(1)[:, None].expand(-1, 4, -1), rtol=1e-4, atol=1e-4)
    _, tangent = torch.func.jvp(lambda w: linear(x, w), (weight,), (torch.ones_like(weight),))
    torch.testing.assert_close(tangent, x.sum(-1, keepdim=True).expand(-1, -1, 4), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        chunked = torch.func.vmap(lambda one: in_chunks(torch.neg, one))(x.repeat(1, 20, 1))
    torch.testing.assert_close(chunked, -x.repeat(1, 20, 1))


def test_layers_that_are_not_plain_are_called():
    layer = nn.Linear(16, 8)
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    plain_result = apply_linear(layer, x)
    layer.register_forward_hook(lambda _module, _inputs, output: output + 1)
    torch.testing.assert_close(apply_linear(layer, x), plain_result + 1, rtol=1e-5, atol=1e-5)

    class Adapter(nn.Module):  # as quantised layers: what they hold under these names is not for others
        weight = bias = staticmethod(lambda: None)

        def forward(self, x):
            assert x.dtype == torch.float32
            return x[..., :8]

    torch.testing.assert_close(apply_linear(Adapter(), x.bfloat16(), "relu"), x.bfloat16().float()[..., :8].relu())


# torch deprecates its tracer, which its own function transforms use too.
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_trace_holds_for_other_numbers_of_rows():
    with torch.no_grad():
        traced = torch.jit.trace(lambda t: in_chunks(torch.neg, t), torch.ones(5000, 2), check_trace=False)
        assert torch.equal(traced(torch.ones(9000, 2)), -torch.ones(9000, 2))


def test_bfloat16_and_autocast_compute_as_torch_does():
    x, weight, bias = inputs(500, 64, 20)
    with torch.autocast("cpu", torch.bfloat16):
        fast, slow = linear(x, weight, bias, "relu"), F.linear(x, weight, bias).relu()
    assert fast.dtype == slow.dtype == torch.bfloat16
    # One step of bfloat16.
    torch.testing.assert_close(fast, slow, rtol=2**-7, atol=2**-7)
    fast.sum().backward()
    assert x.grad is not None and x.grad.dtype == weight.grad.dtype == torch.float32
    low = linear(x.detach().bfloat16(), weight.detach(), bias.detach())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, F.linear(x.detach().bfloat16().float(), weight.detach(), bias.detach()))


def test_multiply_adds_are_counted():
    x, weight, bias = inputs(700, 8, 4, requires_grad=False)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * (2 * 700) * 8 * 4


def test_compiled_and_exported_as_torchs_own_linear():
    layer = nn.Linear(16, 8)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return in_chunks(lambda t: apply_linear(self.layer, t, "relu"), x)

    x = torch.randn(2, 5000, 16, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(Net(), backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), layer(x).relu(), rtol=1e-5, atol=1e-5)
    program = torch.export.export(Net(), (x,))
    assert not any("mkldnn" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), layer(x).relu(), rtol=1e-5, atol=1e-5)
    assert apply_linear(layer.to("meta"), x.to("meta")).shape == (2, 5000, 8)


@pytest.mark.parametrize("rows", [1, 4096, 4097, 10000])
def test_chunks_are_the_whole(rows):
    generator = torch.Generator().manual_seed(rows)
    a, b = torch.randn(2, rows, 3, generator=generator), torch.rand(2, rows, 1, generator=generator) > 0.5
    seen = []

    def function(tokens, flags):
        seen.append(tokens.shape[:-1].numel())
        return torch.cat((tokens.masked_fill(flags, 0.0), tokens), dim=-1)

    with torch.no_grad():
        torch.testing.assert_close(in_chunks(function, a, b), function(a, b), rtol=0, atol=0)
    assert max(seen[:-1]) <= max(4096, rows if 2 * rows <= 4096 else 0)
    assert sum(seen[:-1]) == 2 * rows
    seen.clear()
    in_chunks(function, a, b)
    assert seen == [2 * rows]  # autograd would keep everything anyway
