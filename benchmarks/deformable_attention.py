"""Deformable attention alone: its engines against `grid_sample`, at the shapes of the encoder and of the decoder.

    python -m benchmarks.deformable_attention [--size 800x1333] [--device cuda] [--quick] [--csv FILE]

The yardstick is `plain_dino.sample`, in float32 and with the same malloc setting as everything else. Every engine is
measured twice: from locations and weights that are given, which is the operator of the literature, and from what the
layer's projections say (`projected_attention`), where locations and softmax are part of the work, on both sides. Points
lie within a few pixels of their query, as they do in a trained network: scattered over the map they would miss the
cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.interleaved import Case, Measurement, Report, interleave
from benchmarks.machine import Limits, describe, limits_case
from benchmarks.plain_dino import sample
from crossdino.models.deformable_attention import deformable_attention, projected_attention

HEADS, POINTS, HEAD_DIM = 8, 4, 32
STRIDES = (8, 16, 32, 64)
DECODER_QUERIES = 900
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Of the yardstick's time, at the encoder's shape for 800x1333 on the CPU, from given locations.
TARGETS = {
    ("forward", "embedding_bag, fp32"): 0.35,
    ("forward", "C++ kernel, fp32"): 0.06,
    ("forward and backward", "C++ kernel, fp32"): 0.07,
}


@dataclass(frozen=True)
class Inputs:
    """What one call works on.

    Attributes:
        value: (1, L, heads, C_head).
        shapes: height and width of the levels.
        references: (1, Q, levels, 2), x and y.
        projections: (1, Q, heads * levels * points * 3), see `projected_attention`.
    """

    value: Tensor
    shapes: list[tuple[int, int]]
    references: Tensor
    projections: Tensor

    def points(self) -> tuple[Tensor, Tensor]:
        """Locations and weights from references and projections, written plainly."""
        sizes = (1, self.projections.shape[1], HEADS, len(self.shapes), POINTS)
        offsets, logits = self.projections.split([HEADS * len(self.shapes) * POINTS * n for n in (2, 1)], dim=-1)
        widths_heights = self.references.new_tensor([(width, height) for height, width in self.shapes])
        locations = self.references[:, :, None, :, None] + offsets.view(*sizes, 2) / widths_heights[:, None]
        return locations, logits.view(*sizes[:3], -1).softmax(-1).view(sizes)


def make_inputs(image_hw: tuple[int, int], queries: int | None, dtype: str = "fp32", device: str = "cpu") -> Inputs:
    """Values of every level and points around every query, the same in every process.

    Args:
        image_hw: height and width of the image in pixels.
        queries: so many at random places (the decoder's); None: one a token (the encoder's).
        dtype: of the values.
        device: where they are.
    """
    draw = torch.Generator().manual_seed(0)
    shapes = [(-(-image_hw[0] // stride), -(-image_hw[1] // stride)) for stride in STRIDES]
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(1, tokens, HEADS, HEAD_DIM, generator=draw)
    if queries is None:
        centres = [
            torch.stack(
                torch.meshgrid(
                    (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height, indexing="xy"
                ),
                dim=-1,
            ).flatten(0, 1)
            for height, width in shapes
        ]
        references = torch.cat(centres)[None]
    else:
        references = torch.rand(1, queries, 2, generator=draw)
    num_points = references.shape[1] * HEADS * len(shapes) * POINTS
    offsets = 2.5 * torch.randn(num_points * 2, generator=draw)
    logits = torch.randn(num_points, generator=draw)
    projections = torch.cat([part.view(1, references.shape[1], -1) for part in (offsets, logits)], dim=-1)
    references = references[:, :, None].expand(-1, -1, len(shapes), -1).contiguous()
    return Inputs(value.to(device, DTYPES[dtype]), shapes, references.to(device), projections.to(device))


def attention(
    engine: str,
    projected: bool,
    image_hw: tuple[int, int],
    queries: int | None = None,
    dtype: str = "fp32",
    device: str = "cpu",
    backward: bool = False,
    calls: int = 1,
) -> Callable[[], dict[str, float]]:
    """Some calls, of which the average counts.

    Args:
        engine: `plain`, the yardstick; `ours`, whatever the package chooses here.
        projected: from projections; False: from given locations and weights.
        image_hw: height and width of the image in pixels.
        queries: see `make_inputs`.
        dtype: of the values.
        device: `cpu` or `cuda`.
        backward: with the gradients of values and of locations and weights, or of projections.
        calls: so many in a repetition.
    """
    call, leaves = build(engine, projected, make_inputs(tuple(image_hw), queries, dtype, device))  # type: ignore[arg-type]
    with torch.no_grad():
        upstream = torch.randn_like(call()) if backward else None
    for leaf in leaves:
        leaf.requires_grad_(backward)

    def repetition() -> dict[str, float]:
        start = time.perf_counter()
        for _ in range(calls):
            with torch.set_grad_enabled(backward):
                output = call()
            if backward:
                output.backward(upstream)
                for leaf in leaves:
                    leaf.grad = None
        if device != "cpu":
            torch.cuda.synchronize()
        return {"seconds": (time.perf_counter() - start) / calls}

    return repetition


def build(engine: str, projected: bool, inputs: Inputs) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """A call without arguments, and the tensors that it has gradients for."""
    if projected:
        leaves = [inputs.value, inputs.projections]
        if engine == "plain":
            return lambda: sample(inputs.value, inputs.shapes, *inputs.points()), leaves
        return lambda: projected_attention(inputs.value, inputs.shapes, inputs.references, inputs.projections), leaves
    locations, weights = inputs.points()
    function = sample if engine == "plain" else deformable_attention
    return lambda: function(inputs.value, inputs.shapes, locations, weights), [inputs.value, locations, weights]


# ---- the comparison ----


def engines(device: str) -> dict[str, tuple[str, str, dict[str, str]]]:
    """Name -> engine, dtype of the values, variables; the first is the yardstick."""
    found = {"grid_sample, fp32": ("plain", "fp32", {})}
    if device == "cpu":
        for dtype in ("fp32", "bf16"):
            found[f"embedding_bag, {dtype}"] = ("ours", dtype, {"CROSSDINO_CPU_KERNEL": "0"})
        for dtype in ("fp32", "bf16"):
            found[f"C++ kernel, {dtype}"] = ("ours", dtype, {})
    else:
        found |= {f"Triton, {dtype}": ("ours", dtype, {}) for dtype in DTYPES}
    return found


def make_cases(
    queries: int | None, backward: bool, image_hw: tuple[int, int], device: str, quick: bool
) -> dict[str, tuple[str, bool, Case]]:
    """Name of the case -> name of the engine, whether from projections, the case."""
    cases = {}
    # Calls of milliseconds are too short for a clock.
    calls = 1 if quick else (3 if backward else 5) if queries is None else 20
    for projected in (False,) if quick else (False, True):
        for name, (engine, dtype, variables) in engines(device).items():
            if quick and dtype != "fp32":
                continue
            arguments = {"engine": engine, "dtype": dtype, "device": device, "projected": projected, "calls": calls}
            arguments |= {"image_hw": image_hw, "queries": queries, "backward": backward}
            full = f"{name}, from projections" if projected else name
            case = Case(full, "benchmarks.deformable_attention:attention", arguments, environment=variables)
            cases[full] = (name, projected, case)
    return cases


def rows(
    cases: dict[str, tuple[str, bool, Case]],
    measured: dict[str, Measurement],
    num_queries: int,
    targets: dict[str, float],
) -> list[dict[str, Any]]:
    """A row a case."""
    shown = []
    for full, (name, projected, case) in cases.items():
        one = measured.get(full)
        if one is None:
            continue
        yardstick = next(name for name, (_, other, _) in cases.items() if other == projected)
        ratio = one.median / measured[yardstick].median if yardstick in measured else None
        target = None if projected else targets.get(name)
        gathered = num_queries * HEADS * len(STRIDES) * POINTS * 4 * HEAD_DIM * DTYPES[case.arguments["dtype"]].itemsize
        lower, upper = one.spread
        row: dict[str, Any] = {
            "engine": name,
            "from": "projections" if projected else "locations",
            "ms": 1e3 * one.median,
            "quartiles": f"{1e3 * lower:.3g} - {1e3 * upper:.3g}",
            "gathered GB/s": None if case.arguments["backward"] else gathered / one.median / 1e9,
            "peak MB": None if one.peak_bytes is None else one.peak_bytes / 1e6,
            "/ grid_sample": ratio,
            "target": target,
            "reached": None if target is None or ratio is None else ratio <= target,
        }
        shown.append(row)
    return shown


def parse_size(text: str) -> tuple[int, int]:
    """Height and width from `800x1333`."""
    try:
        height, width = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give height x width, such as 800x1333") from None
    return height, width


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.deformable_attention", description="Engines compared.")
    parser.add_argument("--size", type=parse_size, default=(800, 1333), metavar="HxW", help="of the image in pixels")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--forward-only", action="store_true", help="leave out the backward pass")
    parser.add_argument("--quick", action="store_true", help="a small map and few engines: the numbers mean nothing")
    parser.add_argument("--csv", type=Path, help="write the tables there, too")
    options = parser.parse_args(arguments)
    image_hw = (128, 160) if options.quick else options.size
    repetitions, warmup = (1, 0) if options.quick else (options.repetitions, 1)
    report = Report(describe(options.device), options.csv)
    tokens = sum(-(-image_hw[0] // stride) * -(-image_hw[1] // stride) for stride in STRIDES)
    parts = [("encoder", None), ("decoder", DECODER_QUERIES)]
    passes = (False,) if options.forward_only else (False, True)
    for place, queries, backward in ((place, queries, backward) for place, queries in parts for backward in passes):
        if options.quick and (queries is not None or backward != passes[-1]):
            continue
        cases = make_cases(queries, backward, image_hw, options.device, options.quick)
        every = [case for _, _, case in cases.values()]
        if not options.quick:
            every.append(limits_case(device=options.device))
        measured = interleave(every, repetitions, warmup=warmup)
        limits = Limits.of(measured.pop("limits", None))
        what = "forward and backward" if backward else "forward"
        counts = options.device == "cpu" and place == "encoder" and image_hw == (800, 1333)
        note = f"{tokens} tokens, {queries or tokens} queries; gathered: rows of the value, mostly from the cache"
        report.table(
            f"deformable attention, {place} of {image_hw[0]}x{image_hw[1]}, {what}",
            rows(
                cases,
                measured,
                queries or tokens,
                {name: target for (passed, name), target in TARGETS.items() if counts and passed == what},
            ),
            note if limits is None else f"{note}; memory: {limits.gigabytes:.0f} GB/s",
        )


if __name__ == "__main__":
    main()
