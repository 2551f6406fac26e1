"""What the workers of `network` run: one forward pass or one training step, ours or the yardstick's.

Parts are timed by wrapping methods of the objects that are measured; a part whose method does not exist (any more) is
part of `everything else`. In a training step the losses are cut from the network: they are differentiated up to its
outputs first, so that their share counts their own backward pass.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import plain_dino
from benchmarks.plain_dino import PlainDINO, PlainResNet
from benchmarks.plain_strip_mlp import PlainStripMLP
from benchmarks.plain_training import PlainCriterion, draw_noise
from crossdino.config import Config, with_changes
from crossdino.models import deformable_attention as our_attention
from crossdino.models.backbones import build_backbone
from crossdino.models.detector import CrossDINO
from crossdino.recipes import recipe
from crossdino.structures import Target

Repetition = Callable[[], dict[str, float]]

# A network that computes in milliseconds, to try the commands.
TINY: dict[str, Any] = {
    "model.backbone": "resnet18",
    "model.hidden_dim": 32,
    "model.num_heads": 4,
    "model.num_encoder_layers": 1,
    "model.num_decoder_layers": 2,
    "model.feedforward_dim": 64,
    "model.num_queries": 30,
    "model.fusion_hidden_dim": 32,
    "model.num_denoising": 10,
}


def configuration(name: str, tiny: bool) -> Config:
    """A recipe, or the same much smaller."""
    config = recipe(name)
    if not tiny:
        return config
    strip = config.model.backbone.startswith("strip_mlp")
    return with_changes(config, TINY | ({"model.backbone": "strip_mlp_t_light"} if strip else {}))


class Clock:
    """Seconds by part; parts may lie in each other, and a part in itself counts once."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._paused = False

    def start(self) -> None:
        """Begin a repetition."""
        self._seconds.clear()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time what is inside; a part within another carries the outermost one's name in front."""
        full = f"{self._open[0]}: {name}" if self._open else name
        if self._paused or full in self._open:
            yield
            return
        self._open.append(full)
        start = self._now()
        try:
            yield
        finally:
            self._seconds[full] += self._now() - start
            self._open.pop()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count nothing inside: activations that are computed again belong to the backward pass."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def watch(self, owner: Any, methods: tuple[str, ...], name: str) -> None:
        """Time every call of these methods of one object (or functions of a module), as far as it has them."""
        for method in methods:
            original = getattr(owner, method, None)
            if original is not None:
                setattr(owner, method, self._timed(original, name))

    def parts(self, total: float) -> dict[str, float]:
        """Seconds by part in the order of their first call, and what no part has of the total."""
        outer = sum(seconds for name, seconds in self._seconds.items() if ": " not in name)
        return {**self._seconds, "everything else": total - outer}

    def _timed(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            with self.part(name):
                return original(*arguments, **keywords)

        return timed

    def _now(self) -> float:
        synchronise(self._device)
        return time.perf_counter()


def synchronise(device: str) -> None:
    """Wait for the accelerator."""
    if device != "cpu":
        torch.cuda.synchronize()


def watch_network(clock: Clock, model: nn.Module) -> None:
    """Time the parts of our network or of the yardstick."""
    named: Any = model
    clock.watch(named.backbone, ("forward",), "backbone")
    if hasattr(model, "_project"):
        clock.watch(model, ("_project",), "input projections")
    else:
        for projection in named.input_proj:
            clock.watch(projection, ("forward",), "input projections")
    if isinstance(model, PlainDINO):
        for layer in model.encoder.layers:
            clock.watch(layer, ("forward",), "encoder")
        clock.watch(model, ("select",), "selection")
        clock.watch(model, ("decode",), "decoder")
    else:
        clock.watch(named.encoder, ("forward",), "encoder")
        clock.watch(model, ("_select",), "selection")
        clock.watch(named.decoder, ("forward",), "decoder")
    if named.fusion is not None:
        clock.watch(named.fusion, ("forward",), "CCTM")
    for stack in (named.encoder, named.decoder):
        for name, module in stack.named_modules():
            if name.endswith(("self_attn", "cross_attn")) and not isinstance(module, nn.MultiheadAttention):
                clock.watch(module, ("forward", "attend", "project"), "deformable attention")
    # Ours takes the softmax and the points' places with it.
    sampling = (plain_dino, ("sample",)) if isinstance(model, PlainDINO) else (our_attention, ("projected_attention",))
    clock.watch(*sampling, "sampling")


def _network(network: str, config: Config, device: str) -> nn.Module:
    """Ours or the yardstick, with the same random weights."""
    torch.manual_seed(0)
    ours = CrossDINO(config.model)
    if network == "ours":
        return ours.to(device)
    plain = PlainDINO(config.model)
    plain.load_state_dict(ours.state_dict())
    return plain.to(device)


def _autocast(dtype: str, device: str) -> Any:
    return torch.autocast(device, torch.bfloat16, enabled=True) if dtype == "bf16" else nullcontext()


def _start_counting(device: str) -> int:
    if device == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _device_peak(device: str, idle: int) -> dict[str, float]:
    return {} if device == "cpu" else {"device_peak_bytes": torch.cuda.max_memory_allocated() - idle}


def forward(
    network: str,
    recipe: str,
    image_hw: tuple[int, int],
    num_images: int = 1,
    dtype: str = "fp32",
    device: str = "cpu",
    compiled: bool = False,
    parts: bool = False,
    tiny: bool = False,
) -> Repetition:
    """Detection in a batch of images of one size, `network` is `ours` or `plain`."""
    model = _network(network, configuration(recipe, tiny), device).eval()
    images = torch.randn(num_images, 3, *image_hw, device=device)
    clock = Clock(device)
    if parts:
        watch_network(clock, model)
    if compiled:
        model.compile(dynamic=True)
    idle = _start_counting(device)

    def repetition() -> dict[str, float]:
        clock.start()
        start = time.perf_counter()
        with torch.inference_mode(), _autocast(dtype, device):
            model(images)
        synchronise(device)
        seconds = time.perf_counter() - start
        measured = clock.parts(seconds) if parts else {}
        return {"seconds": seconds, **measured, **_device_peak(device, idle)}

    return repetition


def make_targets(num_images: int, num_objects: int, num_classes: int, device: str) -> list[Target]:
    """Small objects at random places."""
    generator = torch.Generator().manual_seed(0)
    targets = []
    for image in range(num_images):
        centres = torch.rand(num_objects, 2, generator=generator) * 0.9 + 0.05
        sizes = torch.rand(num_objects, 2, generator=generator) * 0.08 + 0.01
        labels = torch.randint(num_classes, (num_objects,), generator=generator)
        targets.append(Target(torch.cat((centres, sizes), 1), labels, noise_seed=image).to(device))
    return targets


def step(
    network: str,
    recipe: str,
    image_hw: tuple[int, int],
    num_images: int = 2,
    num_objects: int = 20,
    dtype: str = "fp32",
    device: str = "cpu",
    parts: bool = False,
    tiny: bool = False,
) -> Repetition:
    """A training step: forward pass, losses, backward pass, clipping and AdamW."""
    config = with_changes(configuration(recipe, tiny), {"training.precision": dtype, "training.ema_decay": 0.0})
    model = _network(network, config, device).train()
    images = torch.randn(num_images, 3, *image_hw, device=device)
    padding = torch.zeros(num_images, *image_hw, dtype=torch.bool, device=device)
    targets = make_targets(num_images, num_objects, config.model.num_classes, device)
    clock = Clock(device)
    if network == "ours":
        predict, losses, update = _our_step(model, config, clock, device)
    else:
        predict, losses, update = _plain_step(model, config, clock)
    if parts:
        watch_network(clock, model)
    idle = _start_counting(device)

    def repetition() -> dict[str, float]:
        clock.start()
        start = time.perf_counter()
        with nullcontext() if parts else clock.part("forward"):
            output, noise = predict(images, padding, targets)
        with clock.part("matcher and losses"):
            twins: dict[int, tuple[Tensor, Tensor]] = {}
            losses(_cut(output, twins), targets, noise).backward()
        with clock.part("backward"), clock.pause():
            reached = [(own, leaf.grad) for own, leaf in twins.values() if leaf.grad is not None]
            torch.autograd.backward([own for own, _ in reached], [gradient for _, gradient in reached])
        with clock.part("optimiser"):
            update()
        synchronise(device)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, **clock.parts(seconds), **_device_peak(device, idle)}

    return repetition


def _our_step(model: nn.Module, config: Config, clock: Clock, device: str) -> tuple[Any, Any, Any]:
    """As `crossdino train` does it."""
    from accelerate import Accelerator

    from crossdino.losses import criterion as losses
    from crossdino.training.setup import autocast, prepare_state
    from crossdino.training.step import apply_gradients, clip_gradients

    assert isinstance(model, CrossDINO)
    state = prepare_state(model, config.training, Accelerator(cpu=device == "cpu"))
    criterion = losses.Criterion(config.loss)
    clock.watch(losses, ("match_layers",), "matcher")

    def predict(images: Tensor, padding: Tensor, targets: list[Target]) -> tuple[Any, None]:
        with autocast(config.training, torch.device(device)):
            return state.model(images, padding, targets), None

    def loss(output: Any, targets: list[Target], noise: None) -> Tensor:
        with autocast(config.training, torch.device(device)):
            return criterion(output, targets)["loss"]

    def update() -> None:
        clip_gradients(state, config.training)
        apply_gradients(state)

    return predict, loss, update


def _plain_step(model: nn.Module, config: Config, clock: Clock) -> tuple[Any, Any, Any]:
    settings = config.training
    criterion = PlainCriterion(config.loss)
    clock.watch(criterion, ("match",), "matcher")
    groups: list[list[nn.Parameter]] = [[], []]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith("backbone.")].append(parameter)
    rates = (settings.learning_rate, settings.backbone_learning_rate)
    optimizer = torch.optim.AdamW(
        [{"params": group, "lr": rate} for group, rate in zip(groups, rates, strict=True)],
        weight_decay=settings.weight_decay,
    )

    def predict(images: Tensor, padding: Tensor, targets: list[Target]) -> tuple[Any, Any]:
        noise = draw_noise(targets, config.model)
        return model(images, padding, noise), noise

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(groups[0] + groups[1], settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return predict, criterion, update


def _cut(value: Any, twins: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """The same structure with leaves in place of tensors that have a gradient; `twins` gets both."""
    if isinstance(value, Tensor):
        if not value.requires_grad:
            return value
        if id(value) not in twins:
            twins[id(value)] = (value, value.detach().requires_grad_())
        return twins[id(value)][1]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _cut(getattr(value, field.name), twins) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, list):
        return [_cut(one, twins) for one in value]
    return value


def backbone(
    network: str, name: str, image_hw: tuple[int, int], dtype: str = "fp32", device: str = "cpu"
) -> Repetition:
    """The backbone alone on one image."""
    torch.manual_seed(0)
    config = with_changes(Config(), {"model.backbone": name}).model
    model: nn.Module = build_backbone(config)
    if network == "plain":
        plain = PlainStripMLP(name) if name.startswith("strip_mlp") else PlainResNet(name)
        plain.load_state_dict(model.state_dict())
        model = plain
    model = model.eval().to(device)
    # Whole multiples of 32, as the detector fills the image up for Strip-MLP.
    height, width = (-(-side // 32) * 32 for side in image_hw)
    image = torch.randn(1, 3, height, width, device=device)

    def repetition() -> dict[str, float]:
        start = time.perf_counter()
        with torch.inference_mode(), _autocast(dtype, device):
            model(image)
        synchronise(device)
        return {"seconds": time.perf_counter() - start}

    return repetition
