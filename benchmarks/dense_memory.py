"""Peak memory of a training step (forward, loss, backward) against the number of objects in the image.

    python benchmarks/dense_memory.py [--objects 60 600 2000] [--side 512] [--recipe cross_dino_r50] [--checkpoint]

Each number is the peak resident memory of a process of its own (CPU, float32, one thread, one image), the interpreter
and the weights with their gradients included; the step is the difference to the peak before it. On glibc memory that
is freed goes back at once (MALLOC_MMAP_THRESHOLD_, unless it is set), so that what is measured is what is in use.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time

import torch

from crossdino import recipe
from crossdino.losses import Criterion
from crossdino.models.detector import CrossDINO
from crossdino.structures import Target


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def step(recipe_name: str, num_objects: int, side: int, checkpoint: bool) -> None:
    """One step in this process; prints peak before it, peak after it (MB), and its seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = recipe(recipe_name)
    model = CrossDINO(config.model).train()
    model.checkpoint_activations = checkpoint
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    centres, sizes = torch.rand(num_objects, 2) * 0.9 + 0.05, torch.rand(num_objects, 2) * 0.03 + 0.01
    target = Target(torch.cat((centres, sizes), dim=1), torch.randint(config.model.num_classes, (num_objects,)))
    image = torch.randn(1, 3, side, side)
    before, started = peak_mb(), time.perf_counter()
    output = model(image, None, [target])
    Criterion(config.loss)(output, [target])["loss"].backward()
    print(before, peak_mb(), time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a training step against the number of objects.")
    parser.add_argument("--objects", type=int, nargs="+", default=[60, 600, 2000])
    parser.add_argument("--side", type=int, default=512, help="height and width of the image in pixels")
    parser.add_argument("--recipe", default="cross_dino_r50")
    parser.add_argument("--checkpoint", action="store_true", help="with training.activation_checkpointing")
    parser.add_argument("--in-this-process", action="store_true", help="one step here, for the first of --objects")
    options = parser.parse_args()
    if options.in_this_process:
        step(options.recipe, options.objects[0], options.side, options.checkpoint)
        return
    print("| objects | peak MB | of it the step | against the first | seconds |\n|---|---|---|---|---|")
    first = None
    for num_objects in options.objects:
        command = [sys.executable, __file__, "--in-this-process", "--objects", str(num_objects)]
        command += ["--side", str(options.side), "--recipe", options.recipe, *["--checkpoint"] * options.checkpoint]
        environment = {"MALLOC_MMAP_THRESHOLD_": "65536", **os.environ}
        result = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        before, peak, seconds = map(float, result.stdout.split())
        first = first or peak - before
        ratio = (peak - before) / first
        print(f"| {num_objects} | {peak:.0f} | {peak - before:.0f} | {ratio:.2f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
