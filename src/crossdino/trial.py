"""How much memory a training step takes: estimated from the network's graph, then measured by a step that is made.

The estimate runs the forward pass on torch's meta device, where nothing is computed, and adds up what autograd would
keep for the backward pass. The measurement makes two updates in a process of its own (`python -m crossdino.trial`), on
noise images of the size and with the number of objects that the training will meet at worst. So running out of memory
ends that process and nothing else, and its peak is not blurred by what was loaded before.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crossdino.config import Config, from_dict, to_dict
from crossdino.models.detector import CrossDINO
from crossdino.structures import Batch, Target

# Python, torch and the rest of the process without the tensors counted here (measured on Linux, CPU build of torch).
_PROCESS_BYTES = 950e6
# Autocast keeps 16-bit copies of most of what is saved, but not of all of it.
_HALF_PRECISION_SHARE = 0.8
# With activation checkpointing the largest part of the network, computed again, decides.
_CHECKPOINTED_SHARE = 0.5
# What lives only within an operation, and what the allocator loses.
_WORKING_SHARE = 1.25
# A second update is timed only if the first one (which also warms up) took less than this.
_SLOW_SECONDS = 45.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class WorstBatch:
    """What a step meets at worst.

    Attributes:
        sizes_hw: network input sizes that are put into one batch in turns, the largest first; a landscape and a
            portrait image in one batch pad each other.
        num_objects: objects of the fullest image or tile.
    """

    sizes_hw: tuple[tuple[int, int], ...]
    num_objects: int


@dataclass(frozen=True)
class Trial:
    """What a trial step has shown.

    Attributes:
        batch_size: images of the step.
        activation_checkpointing: whether activations were computed again.
        peak_bytes: most memory at any time: of the process on a CPU, of torch's allocator on a GPU. Where the step
            did not fit, what it had reached when it was ended.
        seconds: of one update without loading images; None where it did not get that far.
        fits: whether it stayed within the limit.
    """

    batch_size: int
    activation_checkpointing: bool
    peak_bytes: int
    seconds: float | None
    fits: bool


def available_bytes() -> tuple[int, str]:
    """The memory that a training could use now, and of what: the free memory of the GPU, else of the machine.

    On a machine a limit of the process's control group (containers) counts as well.
    """
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    free: list[int] = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    if not free:  # macOS and others tell only how much there is; half of it is taken by the rest as a rule
        free.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    for limit, used, statistics in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        free += _cgroup_free(Path("/sys/fs/cgroup"), limit, used, statistics)
    return min(free), "this machine's memory"


def _cgroup_free(root: Path, limit: str, used: str, statistics: str) -> list[int]:
    """The free memory of a control group, or nothing where it has no limit."""
    try:
        allowed = (root / limit).read_text().strip()
        taken = int((root / used).read_text())
        numbers = dict(line.split() for line in (root / statistics).read_text().splitlines())
    except (OSError, ValueError):
        return []  # no control groups here, or others than we know: then nothing is limited by them
    if allowed == "max" or int(allowed) > 2**60:
        return []
    cached = int(numbers.get("inactive_file", numbers.get("total_inactive_file", 0)))  # given back when it is needed
    return [max(int(allowed) - taken + cached, 0)]


def estimate_bytes(config: Config, worst: WorstBatch, batch_size: int) -> int:
    """The memory of a training step, from what autograd keeps for the backward pass (on the meta device).

    Args:
        config: model and training settings; the number of classes must be that of the data.
        worst: sizes and objects.
        batch_size: images.
    """
    return round(fixed_bytes(config) + batch_size * activation_bytes(config, worst))


def fixed_bytes(config: Config) -> float:
    """What does not grow with the batch: the process, weights, gradients, AdamW's two moments, the moving average."""
    with torch.device("meta"):
        parameters = list(CrossDINO(dataclasses.replace(config.model, backbone_weights=None)).parameters())
    stored = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    process = 0.0 if torch.cuda.is_available() else _PROCESS_BYTES
    return process + 4.0 * (stored * (1 + (config.training.ema_decay > 0)) + 3 * trained)


def activation_bytes(config: Config, worst: WorstBatch) -> float:
    """What autograd keeps for one image of the largest size, with allowance for what operations need meanwhile."""
    # Denoising queries are decoded beside the others, two for each pair: here they are just more queries.
    queries = config.model.num_queries + (2 * config.model.num_denoising if worst.num_objects else 0)
    model_config = dataclasses.replace(
        config.model, backbone_weights=None, num_queries=queries, num_denoising=0, padding="shared"
    )
    height, width = (max(side) for side in zip(*worst.sizes_hw, strict=True))
    with torch.device("meta"):
        model = CrossDINO(model_config).train()
        image = torch.empty(1, 3, height, width)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # kept alive, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(image)
    total = float(sum(storage.nbytes() for storage in saved.values()))
    del output
    share = 1.0 if config.training.precision == "fp32" else _HALF_PRECISION_SHARE
    if config.training.activation_checkpointing:
        share *= _CHECKPOINTED_SHARE
    return total * share * _WORKING_SHARE


def run_trial(config: Config, worst: WorstBatch, batch_size: int, limit_bytes: float) -> Trial:
    """Make two updates in a process of their own and measure them.

    Args:
        config: the training; its weights are drawn at random and nothing is read or written.
        worst: sizes and objects.
        batch_size: images.
        limit_bytes: the process is ended when it takes more.

    Returns:
        What was measured.

    Raises:
        RuntimeError: the step failed for another reason than memory.
    """
    task = {
        "config": to_dict(config),
        "sizes_hw": worst.sizes_hw,
        "num_objects": worst.num_objects,
        "batch_size": batch_size,
        "limit_bytes": limit_bytes,
    }
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    package = str(Path(__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
    checkpointing = config.training.activation_checkpointing
    with tempfile.TemporaryDirectory(prefix="crossdino-trial-") as folder:
        place = Path(folder)
        (place / "task.json").write_text(json.dumps(task), encoding="utf-8")
        with (place / "errors.txt").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "crossdino.trial", str(place)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            peak, ended = 0, False
            try:
                while process.poll() is None:
                    peak = max(peak, _memory_of(process.pid, "VmHWM"))
                    if not torch.cuda.is_available() and peak > limit_bytes:
                        process.kill()
                        ended = True
                        break
                    time.sleep(_POLL_SECONDS)
            finally:
                process.kill()
                process.wait()
        answer = place / "answer.json"
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {}
        if not ended and not found and process.returncode != -9:  # -9: the system ended it, for want of memory
            text = (place / "errors.txt").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"the trial step failed with status {process.returncode}:\n{text[-4000:]}")
    if ended or not found or found["out_of_memory"]:
        return Trial(batch_size, checkpointing, max(peak, found.get("peak_bytes", 0)), None, False)
    return Trial(batch_size, checkpointing, found["peak_bytes"], found["seconds"], found["peak_bytes"] <= limit_bytes)


def _memory_of(pid: int | str, name: str) -> int:
    """A number of bytes of a process from /proc; 0 where there is none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


# --- in the process of the trial ---


def _main(folder: Path) -> None:
    """Make the updates that `task.json` asks for and write `answer.json`."""
    task = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    score = Path("/proc/self/oom_score_adj")
    if score.exists():  # if the machine runs out of memory, this process shall go first
        score.write_text("1000")
    cuda = torch.cuda.is_available()
    if cuda:
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(task["limit_bytes"] / total, 1.0))
    answer: dict[str, Any] = {"out_of_memory": False, "seconds": None}
    try:
        answer["seconds"] = _updates(task)
    except (torch.OutOfMemoryError, MemoryError):
        answer["out_of_memory"] = True
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        answer["out_of_memory"] = True
    answer["peak_bytes"] = torch.cuda.max_memory_reserved() if cuda else _peak_of_this_process()
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _updates(task: dict[str, Any]) -> float:
    """Two updates as a training makes them; the seconds of the faster one."""
    from accelerate import Accelerator
    from rich.console import Console

    from crossdino.losses.criterion import Criterion
    from crossdino.training.setup import autocast, build_model, prepare_state, seed_everything
    from crossdino.training.step import apply_gradients, clip_gradients

    config = from_dict(task["config"])
    settings = config.training
    accelerator = Accelerator()
    seed_everything(0)
    state = prepare_state(build_model(config, None, True, Console(quiet=True)), settings, accelerator)
    criterion = Criterion(config.loss)
    sizes = [task["sizes_hw"][number % len(task["sizes_hw"])] for number in range(task["batch_size"])]
    batch = noise_batch(sizes, task["num_objects"], config.model.num_classes).to(accelerator.device)
    state.model.train()
    durations: list[float] = []
    while len(durations) < 2 and (not durations or durations[0] < _SLOW_SECONDS):
        started = time.monotonic()
        with autocast(settings, accelerator.device):
            predicted = state.model(batch.images, batch.padding_mask, batch.targets)
        losses = criterion(predicted, batch.targets, float(max(1, len(sizes) * task["num_objects"])))
        state.scaler.scale(losses["loss"]).backward()
        clip_gradients(state, settings)
        apply_gradients(state)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        durations.append(time.monotonic() - started)
    return min(durations)


def noise_batch(sizes_hw: Sequence[Sequence[int]], num_objects: int, num_classes: int) -> Batch:
    """Noise images of these sizes, padded to the largest, each with `num_objects` small objects at random."""
    height, width = (max(side) for side in zip(*sizes_hw, strict=True))
    images = torch.zeros(len(sizes_hw), 3, height, width)
    padding_mask = torch.ones(len(sizes_hw), height, width, dtype=torch.bool)
    targets = []
    for place, (h, w) in enumerate(sizes_hw):
        images[place, :, :h, :w] = torch.randn(3, h, w)
        padding_mask[place, :h, :w] = False
        boxes = torch.cat((torch.rand(num_objects, 2) * 0.9 + 0.05, torch.rand(num_objects, 2) * 0.09 + 0.005), dim=1)
        targets.append(Target(boxes, torch.randint(num_classes, (num_objects,)), place, (h, w)))
    return Batch(images, padding_mask, targets)


def _peak_of_this_process() -> int:
    """The most memory that this process ever took, in bytes."""
    # Not `ru_maxrss` where it can be avoided: on Linux it begins with the memory of the process that started this one.
    peak = _memory_of("self", "VmHWM")
    if peak:
        return peak
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
