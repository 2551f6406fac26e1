"""How long the network takes, and how much memory, beside the plain yardstick and the machine's own limits.

    python -m benchmarks.network [forward] [step] [parts] [backbones] [memory]   # without: all but memory
        [--recipes dino_r50 ...] [--sizes 640x640 800x1333] [--cases TEXT ...] [--objects 20 300]
        [--repetitions 5] [--csv FILE] [--quick]

`forward` and `memory` take whole recipes, `step` trains at 512x512 with two images, `parts` says where the time goes,
`backbones` compares CLAP-Strip-T with its plain form and with ResNet-50. All cases of a table run by turns (see
`interleaved`); the yardstick is `plain_dino` with the default malloc. `--quick` tries everything on a tiny network: its
numbers mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.interleaved import Case, Measurement, Report, interleave
from benchmarks.machine import Limits, describe, limits_case, limits_rows
from benchmarks.network_cases import configuration, make_targets
from benchmarks.plain_dino import PlainDINO
from benchmarks.plain_training import draw_noise
from crossdino.complexity import measure
from crossdino.config import Config, with_changes
from crossdino.models.backbones import build_backbone

COMMANDS = ("forward", "step", "parts", "backbones", "memory")
RECIPES = ("dino_r50", "cross_dino_r50", "cross_dino_clap_strip_t")
SIZES = ("640x640", "800x1333")
OBJECTS = (20, 300)


@dataclass(frozen=True)
class Variant:
    """One way to run the network.

    Attributes:
        network: `ours` or `plain`.
        dtype: `fp32` or `bf16`.
        tuned: tuned malloc.
        environment: variables of the worker.
        compiled: by torch.compile.
        yardstick_target: what the issue allows as a share of the yardstick's time in a forward pass.
        same_malloc_target: the same of the plain network with the same malloc.
    """

    network: str
    dtype: str = "fp32"
    tuned: bool = True
    environment: dict[str, str] = field(default_factory=dict)
    compiled: bool = False
    yardstick_target: float | None = None
    same_malloc_target: float | None = None


YARDSTICK, TUNED_PLAIN = "plain, default malloc", "plain"
VARIANTS = {
    YARDSTICK: Variant("plain", tuned=False),
    TUNED_PLAIN: Variant("plain"),
    "ours, default malloc": Variant("ours", tuned=False, same_malloc_target=0.62),
    "ours, no compiled operator": Variant("ours", environment={"CROSSDINO_CPU_KERNEL": "0"}, same_malloc_target=0.75),
    "ours": Variant("ours", yardstick_target=0.40, same_malloc_target=0.62),
    "ours, bf16": Variant("ours", "bf16", yardstick_target=0.18, same_malloc_target=0.30),
    "ours, compiled": Variant("ours", compiled=True),
}
# On an accelerator malloc plays no part, and bf16 is compared with bf16.
DEVICE_VARIANTS = {
    YARDSTICK: Variant("plain"),
    "plain, bf16": Variant("plain", "bf16"),
    "ours": Variant("ours"),
    "ours, bf16": Variant("ours", "bf16"),
    "ours, compiled": Variant("ours", compiled=True),
}
STEP_TIME_TARGET, STEP_MEMORY_TARGET, LOSS_TARGET = 0.40, 0.60, 0.10


class Benchmark:
    """The command's options, and what all tables share."""

    def __init__(self, options: argparse.Namespace, report: Report) -> None:
        self.options = options
        self.report = report
        self.quick: bool = options.quick

    def variants(self, *, training: bool = False) -> dict[str, Variant]:
        """What was asked for; the yardstick always."""
        every = VARIANTS if self.options.device == "cpu" else DEVICE_VARIANTS
        chosen = {}
        for name, variant in every.items():
            wanted = not self.options.cases or any(
                text == name if text in every else text in name for text in self.options.cases
            )
            if variant.compiled and (not self.options.compile or training):
                continue
            if wanted or name == YARDSTICK:
                chosen[name] = variant
        return chosen

    def run(
        self, variants: dict[str, Variant], target: str, repetitions: int | None = None, **arguments: Any
    ) -> dict[str, Measurement]:
        """Measure the variants by turns, and the machine's limits with them."""
        cases = [
            Case(
                name,
                f"benchmarks.network_cases:{target}",
                {
                    **arguments,
                    "network": variant.network,
                    "dtype": variant.dtype,
                    "device": self.options.device,
                    **({"compiled": True} if variant.compiled else {}),
                },
                environment=variant.environment,
                tuned_malloc=variant.tuned,
                threads=self.options.threads,
            )
            for name, variant in variants.items()
        ]
        if repetitions is None:
            cases.append(limits_case(self.quick, self.options.device, self.options.threads))
        count = repetitions or self.options.repetitions
        return interleave(cases, count, warmup=0 if self.quick else 1, on_progress=self.progress)

    def progress(self, line: str) -> None:
        """Say where the run is."""
        print(line, file=sys.stderr, flush=True)

    # ---- commands ----

    def forward(self) -> None:
        """Detection: time, memory, share of the machine's limit, against the yardstick."""
        for name, image_hw in self._recipes_and_sizes():
            variants = self.variants()
            work = self.options.batch * multiply_adds(name, image_hw, self.quick) / 1e9
            arguments = {"recipe": name, "image_hw": image_hw, "num_images": self.options.batch, "tiny": self.quick}
            measured = self.run(variants, "forward", **arguments)
            limits = Limits.of(measured.pop("limits", None))
            counts = image_hw == (800, 1333) and "_r50" in name and self.options.batch == 1 and not self.quick
            rows = []
            for case, one in measured.items():
                variant = variants[case]
                malloc_twin = next(n for n, v in VARIANTS.items() if v.network == "plain" and v.tuned == variant.tuned)
                row = _basics(case, one, work, limits, variant.dtype)
                if self.options.batch > 1 or self.options.device != "cpu":
                    row["images/s"] = self.options.batch / one.median
                row |= _against("/ yardstick", one, measured.get(YARDSTICK), variant.yardstick_target, counts)
                if self.options.device == "cpu":
                    twin = measured.get(malloc_twin)
                    row |= _against("/ same malloc", one, twin, variant.same_malloc_target, counts)
                rows.append(row)
            self.report.table(
                f"forward, {name}, {_size(image_hw)}, batch {self.options.batch}", rows, _note(limits, work)
            )

    def step(self) -> None:
        """Training: time, memory and the share of matcher and losses."""
        for name in self._recipes(2):
            for num_objects in self._objects():
                image_hw, num_images = self._training()
                variants = self.variants(training=True)
                measured = self.run(
                    variants,
                    "step",
                    recipe=name,
                    image_hw=image_hw,
                    num_images=num_images,
                    num_objects=num_objects,
                    tiny=self.quick,
                )
                limits = Limits.of(measured.pop("limits", None))
                work = step_multiply_adds(name, image_hw, num_images, num_objects, self.quick) / 1e9
                yardstick = measured.get(YARDSTICK)
                rows = []
                for case, one in measured.items():
                    is_default = case == "ours" and not self.quick
                    row = _basics(case, one, work, limits, variants[case].dtype)
                    row |= _against("/ yardstick", one, yardstick, STEP_TIME_TARGET, is_default)
                    row |= _memory_against(one, yardstick, is_default)
                    share = one.extra["matcher and losses"] / one.median
                    row["losses %"] = 100 * share
                    counts = is_default and num_objects == 300
                    row["losses target"] = 100 * LOSS_TARGET if counts else None
                    row["losses reached"] = share <= LOSS_TARGET if counts else None
                    rows.append(row)
                title = f"training step, {name}, {_size(image_hw)}, batch {num_images}, {num_objects} objects an image"
                self.report.table(title, rows, _note(limits, work))

    def parts(self) -> None:
        """Where the time of a forward pass and of a training step goes."""
        names = (TUNED_PLAIN, "ours", "ours, bf16")
        variants = {name: variant for name, variant in self.variants().items() if name in names}
        for name, image_hw in self._recipes_and_sizes():
            measured = self.run(variants, "forward", recipe=name, image_hw=image_hw, parts=True, tiny=self.quick)
            measured.pop("limits", None)
            self.report.table(f"parts of forward, {name}, {_size(image_hw)}", _part_rows(measured))
        for name in self._recipes(2):
            for num_objects in self._objects():
                image_hw, num_images = self._training()
                measured = self.run(
                    variants,
                    "step",
                    recipe=name,
                    image_hw=image_hw,
                    num_images=num_images,
                    num_objects=num_objects,
                    parts=True,
                    tiny=self.quick,
                )
                measured.pop("limits", None)
                self.report.table(f"parts of a training step, {name}, {num_objects} objects", _part_rows(measured))

    def backbones(self) -> None:
        """CLAP-Strip-T against its plain form and ResNet-50."""
        strip, resnet = ("strip_mlp_t_light", "resnet18") if self.quick else ("strip_mlp_t", "resnet50")
        for image_hw in self._sizes():
            variants = {
                f"{network} {name}, {dtype}": (Variant(network, dtype), name)
                for name in (strip, resnet)
                for network in ("plain", "ours")
                for dtype in ("fp32", "bf16")
                if not (network == "plain" and dtype == "bf16")
            }
            cases = [
                Case(
                    case,
                    "benchmarks.network_cases:backbone",
                    {
                        "network": variant.network,
                        "name": name,
                        "image_hw": image_hw,
                        "dtype": variant.dtype,
                        "device": self.options.device,
                    },
                    threads=self.options.threads,
                )
                for case, (variant, name) in variants.items()
            ]
            cases.append(limits_case(self.quick, self.options.device, self.options.threads))
            repetitions = self.options.repetitions
            measured = interleave(cases, repetitions, warmup=0 if self.quick else 1, on_progress=self.progress)
            limits = Limits.of(measured.pop("limits", None))
            rows = []
            for case, one in measured.items():
                variant, name = variants[case]
                counts = variant.network == "ours" and name == strip and not self.quick
                target = 0.80 if variant.dtype == "fp32" else 0.40
                row = _basics(case, one, backbone_multiply_adds(name, image_hw) / 1e9, limits, variant.dtype)
                row |= _against("/ plain", one, measured.get(f"plain {name}, fp32"), target, counts)
                row |= _against("/ ResNet", one, measured.get(f"ours {resnet}, {variant.dtype}"), 1.0, counts)
                rows.append(row)
            self.report.table(f"backbones, {_size(image_hw)}, batch 1", rows, _note(limits, None))

    def memory(self) -> None:
        """Peak memory of forward passes and training steps, one repetition each."""
        for name, image_hw in self._recipes_and_sizes():
            arguments = {"recipe": name, "image_hw": image_hw, "num_images": self.options.batch, "tiny": self.quick}
            measured = self.run(self.variants(), "forward", 1, **arguments)
            rows = [_memory_row(case, one, measured.get(YARDSTICK), False) for case, one in measured.items()]
            self.report.table(f"memory of forward, {name}, {_size(image_hw)}, batch {self.options.batch}", rows)
        for name in self._recipes(2):
            image_hw, num_images = self._training()
            arguments = {"recipe": name, "image_hw": image_hw, "num_images": num_images, "tiny": self.quick}
            variants = self.variants(training=True)
            measured = self.run(variants, "step", 1, num_objects=self._objects()[0], **arguments)
            yardstick = measured.get(YARDSTICK)
            rows = [_memory_row(case, one, yardstick, case == "ours") for case, one in measured.items()]
            self.report.table(f"memory of a training step, {name}, {_size(image_hw)}, batch {num_images}", rows)

    # ---- what was asked for ----

    def _recipes(self, default: int = len(RECIPES)) -> Sequence[str]:
        return self.options.recipes or (RECIPES[1:2] if self.quick else RECIPES[:default])

    def _sizes(self) -> list[tuple[int, int]]:
        return (
            self.options.sizes or [(96, 128)] if self.quick else self.options.sizes or [_parse_size(s) for s in SIZES]
        )

    def _recipes_and_sizes(self) -> list[tuple[str, tuple[int, int]]]:
        return [(name, image_hw) for name in self._recipes() for image_hw in self._sizes()]

    def _objects(self) -> Sequence[int]:
        return self.options.objects or ((5,) if self.quick else OBJECTS)

    def _training(self) -> tuple[tuple[int, int], int]:
        return ((96, 96), 2) if self.quick else ((512, 512), 2)


# ---- rows ----


def _basics(case: str, one: Measurement, multiply_adds_g: float, limits: Limits | None, dtype: str) -> dict[str, Any]:
    rate = multiply_adds_g / one.median
    lower, upper = one.spread
    return {
        "case": case,
        "s": one.median,
        "quartiles": f"{lower:.3g} - {upper:.3g}",
        "GMAC/s": rate,
        "of limit %": None if limits is None else 100 * rate / limits.rate(dtype),
        "peak MB": _megabytes(one),
        "process MB": _process_megabytes(one),
    }


def _megabytes(one: Measurement) -> float | None:
    peak = one.extra.get("device_peak_bytes", one.peak_bytes)
    return None if peak is None else peak / 1e6


def _process_megabytes(one: Measurement) -> float | None:
    """What the system saw of the process at most, with its libraries and weights; on an accelerator nothing."""
    if one.peak_bytes is None or one.idle_bytes is None or "device_peak_bytes" in one.extra:
        return None
    return (one.idle_bytes + one.peak_bytes) / 1e6


def _against(
    name: str, one: Measurement, other: Measurement | None, target: float | None, counts: bool
) -> dict[str, Any]:
    """A ratio of medians, and whether it reaches its target where there is one."""
    ratio = None if other is None else one.median / other.median
    limit = target if counts else None
    reached = None if limit is None or ratio is None else ratio <= limit
    return {name: ratio, f"{name} target": limit, f"{name} reached": reached}


def _memory_against(one: Measurement, other: Measurement | None, counts: bool) -> dict[str, Any]:
    """Ratios of what the work took, and of whole processes, whose libraries weigh on both sides."""
    row: dict[str, Any] = {}
    for name, peak in (("memory", _megabytes), ("process", _process_megabytes)):
        own, theirs = peak(one), None if other is None else peak(other)
        ratio = None if own is None or not theirs else own / theirs
        target = STEP_MEMORY_TARGET if counts and ratio is not None else None
        reached = None if target is None or ratio is None else ratio <= target
        row |= {f"{name} ratio": ratio, f"{name} target": target, f"{name} reached": reached}
    return row


def _memory_row(case: str, one: Measurement, other: Measurement | None, counts: bool) -> dict[str, Any]:
    own = {"case": case, "peak MB": _megabytes(one), "process MB": _process_megabytes(one)}
    return own | _memory_against(one, other, counts)


def _part_rows(measured: dict[str, Measurement]) -> list[dict[str, Any]]:
    """A row a part, two columns a case: milliseconds and percent."""
    names = list(dict.fromkeys(name for one in measured.values() for name in one.extra if "bytes" not in name))
    # Parts of a part below it, whatever was called first.
    order = {name: number for number, name in enumerate(names)}
    names.sort(key=lambda name: (order.get(name.split(": ")[0], len(names)), ": " in name, order[name]))
    rows = []
    for name in ["total", *names]:
        row: dict[str, Any] = {
            "part": f"  of it {name.split(': ')[1]}" if ": " in name else name,
            "in": name.split(": ")[0],
        }
        for case, one in measured.items():
            seconds = one.median if name == "total" else one.extra.get(name)
            row[f"{case} ms"] = None if seconds is None else 1000 * seconds
            row[f"{case} %"] = None if seconds is None else 100 * seconds / one.median
        rows.append(row)
    return rows


def _note(limits: Limits | None, work: float | None) -> str:
    parts = [] if work is None else [f"{work:.3g} GMAC"]
    if limits is not None:
        parts.append(f"limits: fp32 {limits.fp32:.0f}, bf16 {limits.bf16:.0f} GMAC/s, {limits.gigabytes:.0f} GB/s")
    return "; ".join(parts)


def _size(image_hw: tuple[int, int]) -> str:
    return f"{image_hw[0]}x{image_hw[1]}"


@cache
def multiply_adds(name: str, image_hw: tuple[int, int], tiny: bool) -> int:
    """Multiply-adds of one image in our network; the yardstick's results need no more."""
    return measure(configuration(name, tiny).model, image_hw).num_multiply_adds


@cache
def step_multiply_adds(name: str, image_hw: tuple[int, int], num_images: int, num_objects: int, tiny: bool) -> int:
    """Multiply-adds of the yardstick forward and backward, denoising queries included; nothing is computed."""
    config = configuration(name, tiny).model
    noise = draw_noise(make_targets(num_images, num_objects, config.num_classes, "cpu"), config)
    with torch.device("meta"):
        model = PlainDINO(config).train()
        images = torch.empty(num_images, 3, *image_hw)
    moved = {key: getattr(noise, key).to("meta") for key in ("labels", "boxes", "hidden")}
    with FlopCounterMode(display=False) as counter:
        output = model(images, None, dataclasses.replace(noise, **moved))
        every = [*output.layers, *output.noisy_layers, output.proposals]
        torch.stack([one.pred_logits.sum() + one.pred_boxes.sum() for one in every]).sum().backward()
    return counter.get_total_flops() // 2


@cache
def backbone_multiply_adds(name: str, image_hw: tuple[int, int]) -> int:
    """The same of a backbone alone, on the image filled up to multiples of 32 pixels."""
    height, width = (-(-side // 32) * 32 for side in image_hw)
    with torch.device("meta"):
        model = build_backbone(with_changes(Config(), {"model.backbone": name}).model).eval()
        image = torch.empty(1, 3, height, width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2


def _parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    try:
        size = int(height), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give height x width, such as 800x1333") from None
    if min(size) < 32:
        raise argparse.ArgumentTypeError(f"{text!r} is too small: at least 32 pixels")
    return size


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("commands", nargs="*", metavar="command", help=f"{', '.join(COMMANDS)}; all but memory")
    parser.add_argument("--recipes", nargs="+", metavar="NAME", help=f"default: {' '.join(RECIPES)}")
    parser.add_argument("--sizes", nargs="+", type=_parse_size, metavar="HxW", help=f"default: {' '.join(SIZES)}")
    parser.add_argument("--batch", type=int, default=1, help="images of a forward pass")
    parser.add_argument("--cases", nargs="+", metavar="TEXT", help="only cases of these names, or with this in them")
    parser.add_argument("--objects", nargs="+", type=int, metavar="N", help="in a training image; default: 20 300")
    parser.add_argument("--repetitions", type=int, help="default: 5, with --quick 1")
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="torch.compile as one more case of forward")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all tables there")
    parser.add_argument("--quick", action="store_true", help="a tiny network, only to try the command")
    options = parser.parse_args(arguments)
    unknown = [command for command in options.commands if command not in COMMANDS]
    if unknown:
        parser.error(f"unknown command {unknown[0]!r}: choose from {', '.join(COMMANDS)}")
    if options.repetitions is None:
        options.repetitions = 1 if options.quick else 5
    if options.repetitions < 1 or options.batch < 1:
        parser.error("--repetitions and --batch must be at least 1")
    commands: dict[str, Callable[[Benchmark], None]] = {name: getattr(Benchmark, name) for name in COMMANDS}
    benchmark = Benchmark(options, Report(describe(options.device), options.csv))
    limits = interleave(
        [limits_case(options.quick, options.device, options.threads)], 1, on_progress=benchmark.progress
    )
    benchmark.report.table("limits of this machine", limits_rows(limits.get("limits")))
    for name in options.commands or COMMANDS[:-1]:
        commands[name](benchmark)


if __name__ == "__main__":
    main()
