"""Other detectors beside ours: the same shapes, random weights, one image, and seconds per multiply-add.

    python -m benchmarks.peers [--python PYTHON] [--make-environment FOLDER] [--only NAME ...] [--sizes 640x640 ...]
        [--repetitions 3] [--step] [--quick] [--csv FILE]

The peers come from PyPI and live in an environment of their own, which `--make-environment` builds from
`peers-requirements.txt`; `--python` names its interpreter, and without it those run that this Python has.
transformers' Deformable-DETR (two stages, box refinement) is made as wide as DINO-4scale; RT-DETRv2, D-FINE and RF-DETR
take only sizes that are multiples of 32 or 56 pixels and get the nearest. Multiply-adds are counted by torch's counter
for all alike. What is compared is the time for 100 of 10^9 of them: the networks differ in what they find, so the bare
time compares nothing. `--step` adds a training step at 512x512 with two images of 20 objects.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.interleaved import Case, Measurement, Report, interleave
from benchmarks.machine import Limits, describe, limits_case
from benchmarks.peer_models import PEERS, nearest_hw

OURS = ("dino_r50", "cross_dino_r50", "cross_dino_clap_strip_t")
SIZES = ((640, 640), (800, 1333))
PRECISIONS = ("fp32", "bf16")
STEP_PEER = "deformable_detr"
REQUIREMENTS = Path(__file__).with_name("peers-requirements.txt")
# Enough tokens for 900 queries.
_QUICK_SIZE = (256, 256)


def make_environment(folder: Path) -> Path:
    """Build the peers' environment, with uv where there is one, else with venv and pip.

    Args:
        folder: of the environment.

    Returns:
        Its interpreter.
    """
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is not None:
        commands = [
            [uv, "venv", "--allow-existing", "--python", sys.executable, str(folder)],
            [uv, "pip", "install", "--python", str(python), "--requirements", str(REQUIREMENTS)],
        ]
    else:
        commands = [
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), "-m", "pip", "install", "--requirement", str(REQUIREMENTS)],
        ]
    for command in commands:
        subprocess.run(command, check=True)
    return python


def make_cases(
    names: Sequence[str], image_hw: tuple[int, int], precision: str, tuned_malloc: bool, python: str
) -> list[Case]:
    """One image through every network."""
    cases = []
    for name in names:
        if name in PEERS:
            height, width = nearest_hw(name, image_hw)
            target = "benchmarks.peer_models:forward"
            arguments: dict[str, Any] = {"model": name, "height": height, "width": width, "precision": precision}
        else:
            target = "benchmarks.network_cases:forward"
            arguments = {"network": "ours", "recipe": name, "image_hw": image_hw, "dtype": precision}
        worker = python if name in PEERS else sys.executable
        cases.append(Case(name, target, arguments, python=worker, tuned_malloc=tuned_malloc))
    return cases


def make_step_cases(names: Sequence[str], tuned_malloc: bool, python: str, side: int) -> list[Case]:
    """A training step of those that have one here."""
    cases = []
    for name in names:
        if name == STEP_PEER:
            arguments: dict[str, Any] = {"model": name, "side": side}
            cases.append(
                Case(name, "benchmarks.peer_models:training_step", arguments, python=python, tuned_malloc=tuned_malloc)
            )
        elif name in OURS:
            arguments = {"network": "ours", "recipe": name, "image_hw": (side, side)}
            cases.append(Case(name, "benchmarks.network_cases:step", arguments, tuned_malloc=tuned_malloc))
    return cases


def our_gmac(name: str, image_hw: tuple[int, int]) -> float:
    """Billions of multiply-adds of a recipe, from the same counter; nothing is computed."""
    from crossdino.complexity import measure
    from crossdino.recipes import recipe

    return measure(recipe(name).model, image_hw).num_multiply_adds / 1e9


def forward_rows(
    measured: dict[str, Measurement], image_hw: tuple[int, int], precision: str, limits: Limits | None
) -> list[dict[str, Any]]:
    """A row a network, the cheapest multiply-adds first."""
    rows = []
    for name, one in measured.items():
        peer = name in PEERS
        gmac = one.extra["gmac"] if peer else our_gmac(name, image_hw)
        lower, upper = one.spread
        height, width = nearest_hw(name, image_hw) if peer else image_hw
        rows.append(
            {
                "network": PEERS[name][0] if peer else f"ours: {name}",
                "input": f"{height}x{width}",
                "s": one.median,
                "quartiles": f"{lower:.3g} - {upper:.3g}",
                "GMAC": gmac,
                "s / 100 GMAC": 100 * one.median / gmac,
                "of limit %": None if limits is None else 100 * gmac / one.median / limits.rate(precision),
                "peak MB": None if one.peak_bytes is None else one.peak_bytes / 1e6,
            }
        )
    return sorted(rows, key=lambda row: row["s / 100 GMAC"])


def step_rows(measured: dict[str, Measurement]) -> list[dict[str, Any]]:
    """A row a network."""
    return [
        {
            "network": PEERS[name][0] if name in PEERS else f"ours: {name}",
            "s": one.median,
            "quartiles": "{:.3g} - {:.3g}".format(*one.spread),
            "peak MB": None if one.peak_bytes is None else one.peak_bytes / 1e6,
        }
        for name, one in measured.items()
    ]


def peer_versions(python: str) -> str:
    """What is installed there of the peers, as a line; empty where that Python cannot be started."""
    program = (
        "import importlib.metadata as m, sys\n"
        "for n in sys.argv[1:]:\n"
        "    try: print(n, m.version(n), end=', ')\n"
        "    except m.PackageNotFoundError: pass\n"
    )
    names = ("torch", "torchvision", "timm", "transformers", "rfdetr")
    try:
        result = subprocess.run([python, "-c", program, *names], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip(", \n")


def parse_size(text: str) -> tuple[int, int]:
    """Height and width from `800x1333`."""
    try:
        height, width = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give height x width, such as 800x1333") from None
    return height, width


def main(arguments: Sequence[str] | None = None) -> None:
    every = (*OURS, *PEERS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Other detectors beside ours.")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the peers' environment")
    parser.add_argument("--make-environment", type=Path, metavar="FOLDER", help="build that environment there first")
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="NAME", help=", ".join(every))
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=SIZES, metavar="HxW", help="of the image")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--step", action="store_true", help="a training step, too")
    parser.add_argument("--quick", action="store_true", help="a small image, float32, once: the numbers mean nothing")
    parser.add_argument("--csv", type=Path, help="write the tables there, too")
    options = parser.parse_args(arguments)
    python = options.python if options.make_environment is None else str(make_environment(options.make_environment))
    report = Report({**describe(), "peers": peer_versions(python)}, options.csv)
    sizes, precisions, mallocs, side = options.sizes, PRECISIONS, (True, False), 512
    repetitions, warmup = options.repetitions, 1
    if options.quick:
        sizes, precisions, mallocs, side = (_QUICK_SIZE,), PRECISIONS[:1], (True,), _QUICK_SIZE[0]
        repetitions, warmup = 1, 0

    def run(cases: list[Case]) -> tuple[dict[str, Measurement], Limits | None]:
        # One malloc setting at a time: workers that keep their memory would not all fit beside each other.
        measured = interleave([*cases, *([] if options.quick else [limits_case()])], repetitions, warmup=warmup)
        return measured, Limits.of(measured.pop("limits", None))

    for image_hw in sizes:
        for precision in precisions:
            for tuned in mallocs:
                measured, limits = run(make_cases(options.only, image_hw, precision, tuned, python))
                malloc = "tuned" if tuned else "default"
                report.table(
                    f"forward, {image_hw[0]}x{image_hw[1]}, batch 1, {precision}, {malloc} malloc",
                    forward_rows(measured, image_hw, precision, limits),
                    "" if limits is None else f"limit: {limits.rate(precision):.0f} GMAC/s of a matrix product",
                )
    for tuned in mallocs if options.step else ():
        measured, _ = run(make_step_cases(options.only, tuned, python, side))
        malloc = "tuned" if tuned else "default"
        report.table(f"training step, {side}x{side}, batch 2, fp32, {malloc} malloc", step_rows(measured))


if __name__ == "__main__":
    main()
