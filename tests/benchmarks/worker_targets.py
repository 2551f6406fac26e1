"""What the workers run in the tests of the harness; needs nothing but Python's own library."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_name(name: str, file: str) -> Callable[[], None]:
    def repetition() -> None:
        with Path(file).open("a") as lines:
            lines.write(name + "\n")

    return repetition


def sleep(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def chatter() -> Callable[[], dict[str, Any]]:
    """Disturb both ends of the conversation, from Python and from a child."""

    def repetition() -> dict[str, Any]:
        print('{"seconds": 1e9}', flush=True)
        os.system('echo \'{"error": "not from the worker"}\'')
        return {"read": sys.stdin.read()}

    return repetition


def fail(way: str) -> Callable[[], None]:
    """Fail in the third repetition."""
    count = 0

    def repetition() -> None:
        nonlocal count
        count += 1
        if count < 3:
            return
        if way == "raise":
            raise ValueError("the reason\nand its details")
        if way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "exit":
            print("last words", file=sys.stderr, flush=True)
            os._exit(3)
        time.sleep(60)

    return repetition


def hold(num_bytes: int) -> Callable[[], None]:
    """Touch memory and give it back."""

    def repetition() -> None:
        block = bytearray(num_bytes)
        block[::4096] = b"x" * len(block[::4096])

    return repetition


def kept(num_bytes: int) -> Callable[[], dict[str, int]]:
    """How much of freed memory the allocator keeps."""

    def repetition() -> dict[str, int]:
        before = _resident()
        hold(num_bytes)()
        return {"kept": _resident() - before}

    return repetition


def surroundings() -> Callable[[], dict[str, Any]]:
    def repetition() -> dict[str, Any]:
        return {
            "malloc": sorted(key for key in os.environ if key.startswith("MALLOC_")),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "own": os.environ.get("OWN_VARIABLE"),
            "torch": any((Path(path) / "torch").exists() for path in sys.path),
        }

    return repetition


def numbers() -> Callable[[], dict[str, Any]]:
    values = iter([100, 1, 9, 2, 100])  # the first is the warm-up

    def repetition() -> dict[str, Any]:
        value = next(values)
        return {"seconds": value / 2, "count": value, "word": f"at {value}"}

    return repetition


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
