"""Workers of the benchmarks cost seconds each: run what they would run in this process."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest

from benchmarks.interleaved import Case, Measurement
from crossdino.losses import criterion


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], list[Case]]:
    """Called with a command's module, it returns the list of cases that the command is going to run."""
    # Timing wraps this function in the module, which is for a worker to forget.
    monkeypatch.setattr(criterion, "match_layers", criterion.match_layers)

    def put_into(command: ModuleType) -> list[Case]:
        seen: list[Case] = []
        returned: dict[str, dict[str, Any]] = {}

        def interleave(cases: Sequence[Case], repetitions: int, **_: Any) -> dict[str, Measurement]:
            measured = {}
            for case in cases:
                seen.append(case)
                # Cases that differ in their surroundings only compute the same here.
                key = json.dumps([case.target, case.arguments])
                if key not in returned:
                    module, function = case.target.split(":")
                    returned[key] = getattr(importlib.import_module(module), function)(**case.arguments)()
                extra = dict(returned[key])
                seconds = [extra.pop("seconds", 1.0)] * repetitions
                measured[case.name] = Measurement(seconds, 3_000_000, 1_000_000, extra)
            return measured

        monkeypatch.setattr(command, "interleave", interleave)
        return seen

    return put_into
