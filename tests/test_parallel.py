"""Several processes, and Ctrl-C just as they are started."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from crossdino.parallel import in_processes


def test_ctrl_c_waits_until_the_processes_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were half started were forgotten: they went on alone and wrote a traceback to the terminal."""
    submit = ProcessPoolExecutor.submit
    started: list[Future[Any]] = []

    def interrupted(self: ProcessPoolExecutor, *task: Any) -> Future[Any]:
        os.kill(os.getpid(), signal.SIGINT)
        started.append(submit(self, *task))
        return started[-1]

    monkeypatch.setattr(ProcessPoolExecutor, "submit", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        list(in_processes(math.sqrt, [4.0, 9.0, 16.0, 25.0], 2))
    assert len(started) == 2 and all(future.done() for future in started)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert sorted(in_processes(math.sqrt, [4.0, 9.0, 16.0], 2)) == [(0, 2.0), (1, 3.0), (2, 4.0)]


def test_a_script_without_a_guard_is_told(tmp_path: Path) -> None:
    """Every process runs the script again until the pool breaks, which is no want of memory."""
    script = tmp_path / "script.py"
    imports = "import math\nfrom crossdino.parallel import in_processes\n"
    script.write_text(imports + "list(in_processes(math.sqrt, [4.0, 9.0], 2))\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 1
    # Not always the last line: Python may add a word on semaphores that the processes it broke off have left.
    told = [line for line in done.stderr.splitlines() if "outside of `if __name__ == '__main__':`" in line]
    assert told and told[-1].startswith("crossdino.errors.InputError: ")
