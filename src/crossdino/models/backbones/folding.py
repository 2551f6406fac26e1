"""Batch normalisation with fixed statistics, folded into the convolution before it on every forward pass.

A convolution followed by a normalisation whose statistics do not change is one convolution, of scaled weights:
`scale * (w * x) + shift = (scale * w) * x + shift`. Two passes over the feature map vanish, and under autocast the
map stays in half precision. Detection code usually folds once, for inference; here the weights are scaled whenever
they are used, which costs a few million products against some ten billion. So nothing can be out of date after a
training step or after loading weights, the names in a checkpoint stay, and training gains as much as inference:
gradients of the convolution's weights and of the normalisation's scales and biases flow through the product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.layers.conv2d_same import Conv2dSame, conv2d_same
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d


def norm_as_affine(norm: Any) -> tuple[Tensor, Tensor]:
    """What a batch normalisation with stored statistics does to a channel: `x * scale + shift`.

    Args:
        norm: a batch normalisation (`torch.nn.BatchNorm2d` or timm's variants, frozen or not).

    Returns:
        scale and shift, (channels,) each; differentiable in the normalisation's own scale and bias.
    """
    # In half precision a variance of 1e-5 would lose half of its digits, and its root a third.
    variance = norm.running_var.to(torch.promote_types(norm.running_var.dtype, torch.float32))
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = norm.weight * scale
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else norm.bias + shift


def fold_norm(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weights of a layer that does what the layer and the normalisation behind it do together.

    Args:
        weight: (out, ...) of a linear layer or a convolution.
        bias: (out,) or None.
        norm: see `norm_as_affine`.

    Returns:
        The weight and bias, in the dtype of `weight`.
    """
    scale, shift = norm_as_affine(norm)
    folded = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    if bias is not None:
        shift = bias * scale + shift
    return folded.to(weight.dtype), shift.to(weight.dtype)


# A folded pair keeps its modules, parameters and names; only the classes change. Both halves ask the same question, so
# that they agree: a normalisation in training normalises by its batch, and where one half has been replaced (by a
# convolution of other channels, SyncBatchNorm, an adapter, a sharded wrapper) the other does what its class always did.


class _Pair(NamedTuple):
    """Where a convolution and the normalisation behind it stand in the network."""

    conv_parent: nn.Module
    conv_name: str
    norm_parent: nn.Module
    norm_name: str


def _folded_norm(asking: Any) -> nn.Module | None:
    """The normalisation that the convolution computes too; None where each of the two does its own part."""
    pair: _Pair = asking.pair
    conv: Any = getattr(pair.conv_parent, pair.conv_name, None)
    norm: Any = getattr(pair.norm_parent, pair.norm_name, None)
    if type(conv) not in _FOLDED_CONVS.values() or type(norm) not in _FOLDED_NORMS.values():
        return None
    if asking is not conv and asking is not norm:  # a copy that shares what it refers to (data parallelism)
        return None
    return None if norm.training and isinstance(norm, nn.BatchNorm2d) else norm


class _FoldedConv2d(nn.Conv2d):
    pair: _Pair

    def forward(self, input: Tensor) -> Tensor:
        norm = _folded_norm(self)
        if norm is None:
            return super().forward(input)
        weight, bias = fold_norm(self.weight, self.bias, norm)
        return self._conv_forward(input, weight, bias)


class _FoldedConv2dSame(Conv2dSame):
    pair: _Pair

    def forward(self, x: Tensor) -> Tensor:
        norm = _folded_norm(self)
        if norm is None:
            return super().forward(x)
        own: Any = self  # timm's class hides the types of its attributes
        weight, bias = fold_norm(own.weight, own.bias, norm)
        return conv2d_same(x, weight, bias, own.stride, own.padding, own.dilation, own.groups)


class _FoldedBatchNorm2d(nn.BatchNorm2d):
    pair: _Pair

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if _folded_norm(self) is None else input


class _FoldedBatchNormAct2d(BatchNormAct2d):
    pair: _Pair
    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if _folded_norm(self) is None else self.act(self.drop(x))


class _FoldedFrozenBatchNorm2d(FrozenBatchNorm2d):
    pair: _Pair

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if _folded_norm(self) is None else x


class _FoldedFrozenBatchNormAct2d(FrozenBatchNormAct2d):
    pair: _Pair
    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if _folded_norm(self) is None else self.act(self.drop(x))


_FOLDED_CONVS: dict[type, type] = {nn.Conv2d: _FoldedConv2d, Conv2dSame: _FoldedConv2dSame}
_FOLDED_NORMS: dict[type, type] = {
    nn.BatchNorm2d: _FoldedBatchNorm2d,
    BatchNormAct2d: _FoldedBatchNormAct2d,
    FrozenBatchNorm2d: _FoldedFrozenBatchNorm2d,
    FrozenBatchNormAct2d: _FoldedFrozenBatchNormAct2d,
}


def fold_batch_norms(body: nn.Module, image_hw: tuple[int, int] = (96, 160)) -> int:
    """Make every batch normalisation that follows a convolution part of that convolution, in place.

    The pairs are found by watching the network run, without arithmetic: a normalisation that gets what a convolution
    returned, where nothing else reads it. Others, such as those in front of their convolution, stay as they are.
    Parameters, buffers, their names and the results up to rounding do not change.

    Args:
        body: a network that takes images (N, 3, H, W) and returns a list of maps.
        image_hw: an image size that it takes.

    Returns:
        How many pairs were found.
    """
    pairs = _pairs(body, image_hw)
    places = {child: (parent, name) for parent in body.modules() for name, child in parent.named_children()}
    for conv, norm in pairs:
        # In a tuple, so that the modules are not registered a second time.
        conv.pair = norm.pair = _Pair(*places[conv], *places[norm])  # type: ignore[assignment]
        conv.__class__ = _FOLDED_CONVS[type(conv)]
        norm.__class__ = _FOLDED_NORMS[type(norm)]
    return len(pairs)


class _Readers(TorchDispatchMode):
    """Counts the operations that read each of the watched tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.made_by: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensor is kept so that its id stays its own
        self.counts: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts.update({id(leaf) for leaf in tree_leaves((args, kwargs))} & self.made_by.keys())
        return func(*args, **(kwargs or {}))


def _pairs(body: nn.Module, image_hw: tuple[int, int]) -> list[tuple[nn.Module, nn.Module]]:
    modules = list(body.modules())
    if not any(type(module) in _FOLDED_NORMS for module in modules):
        return []
    readers = _Readers()
    calls: Counter[nn.Module] = Counter()
    candidates: list[tuple[nn.Module, nn.Module, Tensor]] = []

    def after_conv(conv: nn.Module, _: Any, output: Tensor) -> None:
        calls[conv] += 1
        readers.made_by[id(output)] = (conv, output)

    def before_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[norm] += 1
        if id(inputs[0]) in readers.made_by:
            candidates.append((readers.made_by[id(inputs[0])][0], norm, inputs[0]))

    hooks: list[Any] = []
    watch: Callable[[Any], None] = hooks.append
    for module in modules:
        if type(module) in _FOLDED_CONVS:
            watch(module.register_forward_hook(after_conv))
        elif type(module) in _FOLDED_NORMS:
            watch(module.register_forward_pre_hook(before_norm))
    was_training = {module: module.training for module in modules}
    tensors = {**dict(body.named_parameters()), **dict(body.named_buffers())}
    shapes_only = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
    try:
        with torch.no_grad(), readers:
            maps = functional_call(body.eval(), shapes_only, torch.zeros(1, 3, *image_hw, device="meta"))
    finally:
        for module, training in was_training.items():
            module.training = training
        for hook in hooks:
            hook.remove()
    returned = {id(one) for one in tree_leaves(maps)}
    return [
        (conv, norm)
        for conv, norm, between in candidates
        if calls[conv] == calls[norm] == 1 and readers.counts[id(between)] == 1 and id(between) not in returned
    ]
