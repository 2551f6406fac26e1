"""Where the time of a training step goes, and how much memory it takes.

On a GPU the clock is that of its own queue: an event is put between the kernels and read later, so that measuring
never makes the host wait. `data` is then the time for which the GPU had nothing to do because the batch was not there;
loading that hides behind the computation costs nothing and counts nothing. Elsewhere it is the host's clock.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch


class StepTimer:
    """Averages the parts of training steps: `start`, a `lap` at the end of every part, `finish_step`.

    A step that is started and never finished (the data ended, an exception) does not count.

    Args:
        device: where the model computes.

    Attributes:
        device: as given.
        num_steps: finished steps since the last `reset`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Forget all steps."""
        # The marks of a step: name of the part that ends there and time; the first one begins it, the last one ends it.
        self._marks: list[tuple[str, Any]] = []
        self._unread: list[list[tuple[str, Any]]] = []
        self._parts: list[dict[str, float]] = []
        self._milliseconds = 0.0
        self._num_images = 0
        self.num_steps = 0

    def start(self) -> None:
        """Begin a step."""
        self._marks = [("", self._now())]

    def lap(self, name: str) -> None:
        """End a part: the time since the last lap (or the start) is its; laps of one name in a step add up."""
        assert self._marks, "lap before start"
        self._marks.append((name, self._now()))

    def finish_step(self, num_images: int) -> None:
        """End the step.

        Args:
            num_images: images of the step, those of all processes together.
        """
        assert self._marks, "finish_step before start"
        self._unread.append([*self._marks, ("", self._now())])
        self._marks = []
        self._num_images += num_images
        self.num_steps += 1

    def averages(self, skip: int = 0) -> dict[str, float]:
        """Milliseconds per step of each part.

        Args:
            skip: leave out so many of the first steps since the last `reset`.
        """
        self._read()
        parts = self._parts[skip:]
        names = dict.fromkeys(name for step in parts for name in step)
        return {name: sum(step.get(name, 0.0) for step in parts) / len(parts) for name in names}

    def share(self, name: str, skip: int = 0) -> float:
        """The share of the steps' time that a part takes, from 0 to 1; `data`: waiting for the loader.

        Args:
            name: of the part.
            skip: leave out so many of the first steps since the last `reset`.
        """
        parts = self.averages(skip)
        return parts.get(name, 0.0) / (sum(parts.values()) or 1.0)

    def seconds(self) -> float:
        """The steps' time since the last `reset`, from start to finish, in seconds."""
        self._read()
        return self._milliseconds / 1000.0

    def images_per_second(self) -> float:
        """Images per second of the steps' time, from start to finish; 0 before the first step."""
        self._read()
        return 1000.0 * self._num_images / self._milliseconds if self._milliseconds else 0.0

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _elapsed(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) if self.device.type == "cuda" else 1000.0 * (end - begin)

    def _read(self) -> None:
        if self._unread and self.device.type == "cuda":
            self._unread[-1][-1][1].synchronize()
        for marks in self._unread:
            parts: dict[str, float] = {}
            for (_, begin), (name, end) in zip(marks[:-2], marks[1:-1], strict=True):
                parts[name] = parts.get(name, 0.0) + self._elapsed(begin, end)
            self._parts.append(parts)
            self._milliseconds += self._elapsed(marks[0][1], marks[-1][1])
        self._unread = []


def peak_memory_mb(device: torch.device) -> dict[str, float]:
    """The most memory that was in use so far, in units of 10^6 bytes.

    Args:
        device: where the model computes.

    Returns:
        `process`: resident memory of this process without the loader's (not on Windows); `device`: what torch's
        tensors took on the GPU (only there).
    """
    peaks: dict[str, float] = {}
    if sys.platform != "win32":
        import resource  # does not exist on Windows

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peaks["process"] = peak * (1 if sys.platform == "darwin" else 1024) / 1e6
    if device.type == "cuda":
        peaks["device"] = torch.cuda.max_memory_allocated(device) / 1e6
    return peaks
