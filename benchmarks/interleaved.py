"""Run several programs by turns and compare their times and memory: the harness of the benchmarks.

Every case is built once in a process of its own, which then waits. The cases take one repetition each, in an order
drawn anew for every round, so that whatever disturbs the machine disturbs all of them alike; compare medians of one
run only. A worker gets its orders as JSON lines on its standard input and answers on a copy of its standard output;
what the measured code prints goes to standard error, whose last line is shown when the worker dies.

A worker may run under another Python: nothing but the standard library is needed there, and `rich` here, for the table.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import dataclasses
import gc
import importlib
import json
import os
import random
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What would change the allocator behind our back.
_ALLOCATOR_VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Case:
    """One program of the comparison.

    Attributes:
        name: unique in a run.
        target: `module:function`; called in the worker with `arguments`, it returns a callable without arguments, which
            is one repetition. A repetition may return a dict: its numbers are reported as medians in
            `Measurement.extra`, and a key `seconds` replaces the time that was measured around the call.
        arguments: keyword arguments of the function, anything that JSON can hold.
        python: the interpreter of the worker.
        environment: variables for the worker on top of ours.
        tuned_malloc: whether glibc keeps freed memory (thresholds of 1 GiB) or has its own defaults.
        threads: how many threads OpenMP and MKL may use; None: as many as they like.
    """

    name: str
    target: str
    arguments: dict[str, Any] = field(default_factory=dict)
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)
    tuned_malloc: bool = True
    threads: int | None = None


@dataclass(frozen=True)
class Measurement:
    """What the repetitions of a case took.

    Attributes:
        seconds: of every repetition, without the warm-up.
        peak_bytes: how far the worker's resident memory rose at most, warm-up included, above what it held when it was
            built; None where the system does not say.
        idle_bytes: what it held when it was built; None where the system does not say.
        extra: medians of the numbers that repetitions returned, and the last of anything else.
    """

    seconds: list[float]
    peak_bytes: int | None
    idle_bytes: int | None
    extra: dict[str, Any]

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Lower and upper quartile of the seconds."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        lower, _, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return lower, upper


class WorkerError(RuntimeError):
    """A worker has died, refused or taken too long; the message is one line that says why."""


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def interleave(
    cases: Sequence[Case],
    repetitions: int,
    *,
    warmup: int = 1,
    seed: int = 0,
    timeout_s: float = 900.0,
    on_progress: Callable[[str], None] = _to_stderr,
) -> dict[str, Measurement]:
    """Measure the cases by turns.

    Args:
        cases: what to run; names must differ.
        repetitions: rounds that count, at least 1.
        warmup: rounds before them that do not.
        seed: of the order within the rounds.
        timeout_s: longest time for building a case or for one repetition.
        on_progress: gets a line of text after every step, and one for every worker that fails.

    Returns:
        A measurement a case, in the order of `cases`; a case whose worker failed is left out.
    """
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"cases need names of their own: {', '.join(sorted(n for n in names if names.count(n) > 1))}")
    if repetitions < 1:
        raise ValueError(f"repetitions is {repetitions}: at least 1")
    workers: dict[str, _Worker] = {}
    order = random.Random(seed)
    total = len(cases) * (warmup + repetitions)
    done = 0

    def drop(name: str, error: WorkerError) -> None:
        on_progress(f"{name}: left out, {error}")
        workers.pop(name).close()

    try:
        for case in cases:
            workers[case.name] = _Worker(case)
            try:
                workers[case.name].start(timeout_s)
                on_progress(f"{case.name}: built")
            except WorkerError as error:
                drop(case.name, error)
        for number in range(-warmup, repetitions):
            for name in order.sample(names, len(names)):
                done += 1
                if name not in workers:
                    continue
                try:
                    seconds = workers[name].repeat(timeout_s, counts=number >= 0)
                    on_progress(f"{done}/{total} {name}: {seconds:.4g} s{'' if number >= 0 else ' (warm-up)'}")
                except WorkerError as error:
                    drop(name, error)
        return {name: worker.measurement() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()


class _Worker:
    """The process of one case, seen from the outside."""

    def __init__(self, case: Case) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_ALLOCATOR_VARIABLES)}
        if case.threads is not None:
            environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(case.threads))
        self._case = case
        self._buffer = b""
        self._seconds: list[float] = []
        self._extra: dict[str, list[Any]] = {}
        self._memory: tuple[int | None, int | None] = (None, None)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        try:
            self._process = subprocess.Popen(
                [case.python, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=environment | case.environment,
                start_new_session=True,
            )
        except OSError as error:
            self._process = None
            self._refusal = f"{case.python} cannot be started ({error.strerror})"

    def start(self, timeout_s: float) -> None:
        case = self._case
        # Another Python has libraries of its own, and finds nothing of ours but what lies in the repository's root.
        paths = sys.path if case.python == sys.executable else [str(ROOT)]
        self._ask({**dataclasses.asdict(case), "paths": [str(ROOT), *filter(None, paths)]}, timeout_s)

    def repeat(self, timeout_s: float, counts: bool) -> float:
        answer = self._ask({}, timeout_s)
        self._memory = (answer["peak_bytes"], answer["idle_bytes"])
        if counts:
            self._seconds.append(answer["seconds"])
            for key, value in answer["extra"].items():
                self._extra.setdefault(key, []).append(value)
        return answer["seconds"]

    def measurement(self) -> Measurement:
        extra = {
            key: statistics.median(values) if all(type(v) in (int, float) for v in values) else values[-1]
            for key, values in self._extra.items()
        }
        return Measurement(self._seconds, *self._memory, extra)

    def close(self) -> None:
        """End the worker and whatever it started."""
        self._stderr.close()
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()

    def _ask(self, order: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        if self._process is None:
            raise WorkerError(self._refusal)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._epitaph()) from None
        answer = json.loads(self._line(time.monotonic() + timeout_s, timeout_s))
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _line(self, deadline: float, timeout_s: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise WorkerError(f"no answer within {timeout_s:g} s")
            part = os.read(descriptor, 1 << 16)
            if not part:
                raise WorkerError(self._epitaph())
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _epitaph(self) -> str:
        """How the process ended, and the last that it said."""
        assert self._process is not None
        code = self._process.wait()
        reason = f"its process ended with status {code}"
        if code < 0:
            reason = f"its process was killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
                reason += " (out of memory?)"
        self._stderr.seek(0)
        said = self._stderr.read().decode(errors="replace").strip().splitlines()
        return f"{reason}: {said[-1]}" if said else reason


# ---- inside the worker ----


def _serve() -> None:
    """Build the case that the first line names, then run one repetition for every further line."""
    orders = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Whatever the measured code reads or prints, from C too, stays out of the conversation.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        case = json.loads(orders.readline())
        sys.path[:] = list(dict.fromkeys([*case["paths"], *sys.path[1:]]))
        if case["tuned_malloc"]:
            tune_malloc()
        module, _, function = case["target"].partition(":")
        repetition = getattr(importlib.import_module(module), function)(**case["arguments"])
        idle = _idle_memory()
        answer({})
        for _ in orders:
            start = time.perf_counter()
            returned = repetition()
            seconds = time.perf_counter() - start
            extra = dict(returned) if isinstance(returned, Mapping) else {}
            seconds = float(extra.pop("seconds", seconds))
            peak = None if idle is None else max(0, _memory("VmHWM") - idle)
            answer({"seconds": seconds, "extra": extra, "peak_bytes": peak, "idle_bytes": idle})
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        answer({"error": f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")})
        raise SystemExit(1) from None


def tune_malloc() -> None:
    """Let glibc keep freed memory: two calls of `mallopt`, before anything large is allocated; else an error."""
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(_M_MMAP_THRESHOLD, 1 << 30) and mallopt(_M_TRIM_THRESHOLD, 1 << 30)):
        raise OSError("mallopt refuses thresholds of 1 GiB: this C library cannot be tuned")


def _memory(key: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _idle_memory() -> int | None:
    """Resident memory now, and the peak begins anew here; None where there is no /proc."""
    gc.collect()
    gc.freeze()  # what was built is not searched again and again in what is timed
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed while building is not there for the first repetition
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _memory("VmRSS")
    except OSError:
        return None


# ---- tables ----


class Report:
    """Tables on the screen, and all of them in one CSV.

    The CSV begins with the machine as lines `# key: value`; its first column names the table, the others are those of
    all tables, and `note` is the line below the table. It is written anew after every table: a run that is stopped
    leaves what it has. `tables` makes Markdown of it.

    Args:
        machine: what the numbers were measured on, see `machine.describe`.
        csv_path: where the CSV goes, or None.
    """

    def __init__(self, machine: Mapping[str, object], csv_path: Path | None = None) -> None:
        self._machine = machine
        self._csv_path = csv_path
        self._rows: list[dict[str, object]] = []
        from rich.console import Console

        self._console = Console()
        if not self._console.is_terminal:
            self._console = Console(width=200)  # a file has no width that tables would have to fit
        self._console.print("\n".join(f"{key}: {value}" for key, value in machine.items()), markup=False)

    def table(self, title: str, rows: Sequence[Mapping[str, object]], note: str = "") -> None:
        """Print rows of the same columns, and add them to the CSV.

        Args:
            title: of the table.
            rows: values by column; floats are shown with three digits, booleans as yes and no, None as nothing.
            note: a line below the table.
        """
        from rich.markup import escape
        from rich.table import Table

        columns = list(dict.fromkeys(column for row in rows for column in row))
        shown = Table(title=escape(title), title_justify="left", caption=escape(note), caption_justify="left")
        for column in columns:
            numeric = any(isinstance(row.get(column), int | float) for row in rows)
            shown.add_column(escape(column), justify="right" if numeric else "left")
        for row in rows:
            shown.add_row(*(escape(_text(row.get(column), digits=3)) for column in columns))
        self._console.print(shown)
        self._rows += [{"table": title, **row, **({"note": note} if note else {})} for row in rows]
        if self._csv_path is not None:
            self._write(self._csv_path)

    def _write(self, path: Path) -> None:
        columns = list(dict.fromkeys(column for row in self._rows for column in row))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            file.writelines(f"# {key}: {value}\n" for key, value in self._machine.items())
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: _text(value, digits=6) for key, value in row.items()} for row in self._rows)


def _text(value: object, digits: int) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
    return str(value)


if __name__ == "__main__":
    _serve()
