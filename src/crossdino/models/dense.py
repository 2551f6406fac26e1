"""Linear layers over many tokens, as fast as this machine's libraries allow.

On a CPU, torch sends float32 products to MKL; oneDNN, which torch carries too, is 15 to 30 % faster at the shapes of a
detector's tokens on AMD processors and about equal on Intel's, needs no weight laid out in advance, and applies the
ReLU while the result is still in its registers. `linear` is `torch.nn.functional.linear` by whichever is faster, with
its gradients; `in_chunks` keeps wide hidden layers in the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.flop_counter import register_flop_formula

Activation = Literal["none", "relu"]

# torch's own name for oneDNN's product with a fused activation; inductor uses it. Builds without oneDNN have none.
_ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
# Below this many rows the call itself costs as much as it saves.
_FEWEST_ROWS = 256
# Rows that go through a hidden layer together: 4096 x 2048 float32 are 32 MB, the size of a last-level cache.
_CHUNK_ROWS = 4096


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = "none") -> Tensor:
    """`activation(x @ weight.T + bias)`, differentiable, under autocast in its dtype.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        activation: `none` or `relu`.

    A half-precision x goes through weights of full precision in theirs.

    Returns:
        (..., out); equal to `torch.nn.functional.linear` up to the order of summation.
    """
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        if x.dtype in (torch.float32, torch.bfloat16, torch.float16):
            # What autocast does to F.linear; it does not know the operator below.
            x, weight = x.to(dtype), weight.to(dtype)
            bias = None if bias is None else bias.to(dtype)
    elif x.dtype in (torch.bfloat16, torch.float16):
        x = x.to(weight.dtype)  # values that stayed in autocast's dtype, read where it is off
    if not _suits_onednn(x, weight, bias):
        result = F.linear(x, weight, bias)
        return F.relu(result) if activation == "relu" else result
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        # Made flat, and shaped again out here: a view that such a function returns could not be changed in place.
        rows = x.reshape(-1, x.shape[-1])
        flat: Tensor = _OneDNNLinear.apply(rows, weight, bias, activation)  # type: ignore[assignment]
        return flat.view(*x.shape[:-1], -1)
    return _product(x, weight, bias, activation)


def apply_linear(layer: nn.Linear, x: Tensor, activation: Activation = "none") -> Tensor:
    """`linear` with the weights of a layer; what was put in a layer's place, or hooked to it, is called itself."""
    if is_plain(layer):
        return linear(x, layer.weight, layer.bias, activation)
    if x.dtype in (torch.bfloat16, torch.float16) and not torch.is_autocast_enabled(x.device.type):
        x = x.to(getattr(layer.weight, "dtype", torch.float32))  # as in `linear`; quantised layers take float32
    result = layer(x)
    return F.relu(result) if activation == "relu" else result


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether a module is of that very class and nothing watches its calls, so that its weights say all it does.

    Adapters and quantisation put classes of their own in a layer's place; hooks want to see the call.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks) and not _has_any_global_hook()


def is_eager(x: Tensor) -> bool:
    """Whether x is an ordinary tensor, and nothing traces, compiles or transforms what is done with it."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    return type(x) in (Tensor, nn.Parameter)


def in_float32(tokens: Tensor) -> bool:
    """Whether what decides on boxes is computed in float32 although autocast is on: when detecting, not when training.

    With bfloat16's 8 bits everywhere, boxes of the sample model move by 0.12 px more than with the sums of the encoder,
    the choice of the queries and the decoder in float32, which is a few per cent of the work (docs/performance.md).
    """
    if torch.is_grad_enabled() or tokens.is_meta:  # there is no autocast on the meta device
        return False
    return torch.is_autocast_enabled(tokens.device.type)


def float32_where(condition: bool, tokens: Tensor) -> AbstractContextManager[Any]:
    """No autocast on the device of `tokens`, if the condition holds."""
    return torch.autocast(tokens.device.type, enabled=False) if condition else nullcontext()


def in_chunks(function: Callable[..., Tensor], *tokens: Tensor) -> Tensor:
    """`function(*tokens)` for a function that treats every token alone, some thousands of tokens at a time.

    Without gradients on a CPU, what the function makes in between then stays in the cache, and takes no memory; in any
    other case the function is called once.

    Args:
        function: (..., n, C) tensors in, one (..., n, C') out.
        tokens: (..., L, C) tensors of the same leading dimensions.
    """
    first = tokens[0]
    if first.device.type != "cpu" or torch.is_grad_enabled() or not is_eager(first):
        return function(*tokens)
    rows = first.shape[:-1].numel()
    if rows <= _CHUNK_ROWS:
        return function(*tokens)
    flat = [part.reshape(rows, part.shape[-1]) for part in tokens]
    output = None
    for start in range(0, rows, _CHUNK_ROWS):
        part = function(*(one[start : start + _CHUNK_ROWS] for one in flat))
        if output is None:
            output = part.new_empty((rows, part.shape[-1]))
        output[start : start + _CHUNK_ROWS] = part
    assert output is not None, "no token"
    return output.view(*first.shape[:-1], -1)


def _suits_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the product can and should go to oneDNN; what does not fit is left to torch to refuse."""
    if _ONEDNN is None or x.device.type != "cpu" or not is_eager(x) or type(weight) not in (Tensor, nn.Parameter):
        return False
    if x.dtype not in (torch.float32, torch.bfloat16) or x.shape[-1] == 0 or not torch.backends.mkldnn.enabled:
        return False
    if any(other is not None and (other.dtype, other.device) != (x.dtype, x.device) for other in (weight, bias)):
        return False
    if x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    return x.numel() // x.shape[-1] >= _FEWEST_ROWS


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    """The product by oneDNN, which would read a bias with gaps as if it had none, and whose ReLU makes NaN zero."""
    bias = None if bias is None else bias.contiguous()
    # A sum of finite numbers that is finite has no NaN; reading them costs a hundredth of the product.
    if activation == "relu" and not all(t is None or t.sum().isfinite() for t in (x, weight, bias)):
        return torch.relu_(_ONEDNN(x, weight, bias, "none", [], ""))
    return _ONEDNN(x, weight, bias, activation, [], "")


class _OneDNNLinear(torch.autograd.Function):
    """The product with its gradients; what autograd has for `F.linear`, by oneDNN where that is faster."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
        output = _product(x, weight, bias, activation)
        ctx.save_for_backward(x, weight, output if activation == "relu" else None)
        return output

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, output = ctx.saved_tensors
        if output is not None:
            grad = torch.ops.aten.threshold_backward(grad, output, 0)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = None
        if needs_x:
            # With gradients on, this pass is to be differentiated itself.
            product = _OneDNNLinear.apply if torch.is_grad_enabled() else _product
            grad_x: Any = product(grad, weight.t().contiguous(), None, "none")
        # MKL is the faster one here: the long dimension is the one that is summed over.
        grad_weight = grad.t() @ x if needs_weight else None
        return grad_x, grad_weight, grad.sum(0) if needs_bias else None, None


if _ONEDNN is not None:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _linear_flops(x_shape: Any, weight_shape: Any, *_args: Any, **_kwargs: Any) -> int:
        """Two for each multiply-add, as the counter has it for every other product."""
        rows = 1
        for side in x_shape[:-1]:
            rows *= side
        return 2 * rows * weight_shape[0] * weight_shape[1]
