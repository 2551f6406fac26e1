"""The harness of the benchmarks: takes turns, measures what it says, and survives workers that do not."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from benchmarks.interleaved import Case, Report, interleave

TARGETS = "tests.benchmarks.worker_targets:"


def test_cases_take_turns_in_changing_order(tmp_path: Path) -> None:
    file = tmp_path / "names"
    names = ["a", "b", "c"]
    cases = [Case(name, TARGETS + "write_name", {"name": name, "file": str(file)}) for name in names]
    lines: list[str] = []
    measured = interleave(cases, 6, warmup=2, on_progress=lines.append)
    written = file.read_text().split()
    rounds = [written[i : i + 3] for i in range(0, len(written), 3)]
    assert len(rounds) == 8 and all(sorted(one) == names for one in rounds)
    assert len({tuple(one) for one in rounds}) > 2
    assert list(measured) == names and all(len(one.seconds) == 6 for one in measured.values())
    assert [line for line in lines if "warm-up" in line] == [
        line for line in lines if line[0] in "123456" and "(" in line
    ]


def test_seconds_are_the_repetitions() -> None:
    one = interleave([Case("sleep", TARGETS + "sleep", {"seconds": 0.05})], 3, on_progress=lambda _: None)["sleep"]
    assert min(one.seconds) >= 0.05
    lower, upper = one.spread
    assert min(one.seconds) <= lower <= one.median <= upper <= max(one.seconds)


def test_returned_numbers_become_medians() -> None:
    one = interleave([Case("numbers", TARGETS + "numbers")], 4, on_progress=lambda _: None)["numbers"]
    # 1, 9, 2, 100: the warm-up does not count.
    assert one.extra == {"count": 5.5, "word": "at 100"}
    assert one.seconds == [0.5, 4.5, 1.0, 50.0] and one.median == 2.75


def test_failing_workers_are_left_out_and_say_why(tmp_path: Path) -> None:
    cases = [Case(way, TARGETS + "fail", {"way": way}) for way in ("raise", "kill", "exit", "hang")]
    cases += [
        Case("fine", TARGETS + "sleep", {"seconds": 0.0}),
        Case("no module", "no_such_module:function"),
        Case("no python", TARGETS + "sleep", {"seconds": 0.0}, python=str(tmp_path / "python")),
    ]
    lines: list[str] = []
    measured = interleave(cases, 4, timeout_s=5.0, on_progress=lines.append)
    assert list(measured) == ["fine"] and len(measured["fine"].seconds) == 4
    reasons = dict(line.split(": left out, ") for line in lines if "left out" in line)
    assert reasons.pop("no python").startswith(str(tmp_path / "python"))
    assert reasons == {
        "raise": "ValueError: the reason",
        "kill": "its process was killed by SIGKILL (out of memory?)",
        "exit": "its process ended with status 3: last words",
        "hang": "no answer within 5 s",
        "no module": "ModuleNotFoundError: No module named 'no_such_module'",
    }


def test_what_the_code_prints_stays_out_of_the_conversation() -> None:
    one = interleave([Case("chatter", TARGETS + "chatter")], 2, on_progress=lambda _: None)["chatter"]
    assert max(one.seconds) < 1e6
    assert one.extra == {"read": ""}


def test_memory_is_what_the_repetition_adds() -> None:
    size = 200_000_000
    cases = [
        Case("holds", TARGETS + "hold", {"num_bytes": size}),
        Case("sleeps", TARGETS + "sleep", {"seconds": 0.0}),
        Case("tuned", TARGETS + "kept", {"num_bytes": size}),
        Case("default", TARGETS + "kept", {"num_bytes": size}, tuned_malloc=False),
    ]
    measured = interleave(cases, 1, warmup=0, on_progress=lambda _: None)
    peaks = {name: one.peak_bytes for name, one in measured.items()}
    # A worker that computes nothing grows by less than 5 MB.
    assert peaks["holds"] == pytest.approx(size, abs=5e6)
    assert peaks["sleeps"] == pytest.approx(0, abs=5e6)
    # Tuned, the allocator keeps what was freed.
    assert measured["tuned"].extra["kept"] == pytest.approx(size, abs=5e6)
    assert measured["default"].extra["kept"] == pytest.approx(0, abs=5e6)


def test_surroundings_of_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    # Another Python, without any package.
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')
    bare.chmod(0o755)
    cases = [
        Case("own", TARGETS + "surroundings", environment={"OWN_VARIABLE": "1"}, threads=3),
        Case("other", TARGETS + "surroundings", python=str(bare)),
    ]
    measured = interleave(cases, 1, warmup=0, on_progress=lambda _: None)
    assert measured["own"].extra == {"malloc": [], "threads": "3", "own": "1", "torch": True}
    assert measured["other"].extra["torch"] is False and measured["other"].extra["malloc"] == []


def test_names_and_counts_are_checked() -> None:
    with pytest.raises(ValueError, match="names of their own: a, a"):
        interleave([Case("a", "x:y"), Case("a", "x:y")], 1)
    with pytest.raises(ValueError, match="at least 1"):
        interleave([], 0)


def test_report_writes_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results" / "speed.csv"
    report = Report({"processor": "a [fast] one"}, path)
    report.table(
        "first", [{"case": "x [y]", "s": 1.23456789, "ok": True}, {"case": "z", "s": None, "ok": None}], "a note"
    )
    report.table("second", [{"case": "x", "MB": 123456.7}])
    shown = capsys.readouterr().out
    for text in ("a [fast] one", "x [y]", "1.23", "yes", "a note", "123457"):
        assert text in shown
    machine, *lines = path.read_text().splitlines()
    assert machine == "# processor: a [fast] one"
    assert list(csv.DictReader(lines)) == [
        {"table": "first", "case": "x [y]", "s": "1.23457", "ok": "yes", "note": "a note", "MB": ""},
        {"table": "first", "case": "z", "s": "", "ok": "", "note": "a note", "MB": ""},
        {"table": "second", "case": "x", "s": "", "ok": "", "note": "", "MB": "123457"},
    ]
