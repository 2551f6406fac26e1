"""glibc's allocator: what the kernel is asked for before and after, and when it is left alone."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from crossdino import allocator, cli
from crossdino.allocator import tune_allocator

_GLIBC = platform.libc_ver()[0] == "glibc"
# Blocks of 40 MB are freed and taken again; the kernel has to clear each page (4 KB) anew where it got them back.
_PROGRAM = """
import ctypes, resource, sys
from crossdino.allocator import tune_allocator
tuned = len(sys.argv) > 1 and tune_allocator()
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
def turn():
    block = library.malloc(40 << 20)
    ctypes.memset(block, 1, 40 << 20)
    library.free(block)
turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    turn()
print(int(tuned), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, "torch" in sys.modules)
"""


def turns(*words: str, **variables: str) -> tuple[bool, int]:
    """Whether the allocator was tuned, and how many pages the kernel cleared."""
    ours = ("MALLOC_", "GLIBC_TUNABLES", "CROSSDINO_MALLOC", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)} | variables
    command = [sys.executable, "-c", _PROGRAM, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == ""
    tuned, faults, torch_loaded = done.stdout.split()
    assert torch_loaded == "False", "the allocator is set before the first large tensor, so before torch is there"
    return tuned == "1", int(faults)


def test_freed_memory_is_used_again() -> None:
    plain, tuned = turns(), turns("tune")
    assert plain[0] is False and tuned[0] is _GLIBC
    if _GLIBC:  # 4 turns of 10,240 pages; huge pages, where the kernel gives such, are 512 of them at once
        assert plain[1] >= 4 * 10_240 // 512
        assert tuned[1] < plain[1] / 10


@pytest.mark.parametrize(
    "variables",
    [
        {"CROSSDINO_MALLOC": "0"},
        {"CROSSDINO_MALLOC": "off"},
        {"MALLOC_MMAP_THRESHOLD_": "65536"},
        {"MALLOC_TRIM_THRESHOLD_": "131072"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"},
    ],
)
def test_what_the_user_has_chosen_stays(variables: dict[str, str]) -> None:
    assert turns("tune", **variables)[0] is False


def test_other_variables_do_not_concern_it() -> None:
    variables = {
        "CROSSDINO_MALLOC": "1",
        "MALLOC_ARENA_MAX": "2",
        "GLIBC_TUNABLES": "glibc.rtld.optional_static_tls=512",
    }
    assert turns("tune", **variables)[0] is _GLIBC


def test_other_systems_and_allocators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "CROSSDINO_MALLOC"))]:
        monkeypatch.delenv(name)
    calls: list[tuple[int, int]] = []

    class Library:
        """A C library whose `mallopt` is noted."""

        def __init__(self, malloc: int, refused: int = 0) -> None:
            self.places = {"malloc": malloc, "gnu_get_libc_version": 1}

            def mallopt(what: int, value: int) -> int:
                calls.append((what, value))
                return int(what != refused)

            self.mallopt = mallopt  # a function, which takes the types that ctypes wants to be told

    monkeypatch.setattr(allocator, "_origin", lambda library, name: library.places[name])
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    for malloc, refused, expected, made in (
        (1, 0, True, [-3, -1]),
        (2, 0, False, []),  # malloc comes from somewhere else
        (1, -3, True, [-3, -4, -1]),  # glibc before 2.35 takes no threshold of 1 GB
        (1, -1, False, [-3, -1]),
    ):
        monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _, m=malloc, r=refused: Library(m, r))
        calls.clear()
        assert tune_allocator() is expected
        assert [what for what, _ in calls] == made
    for system in ("darwin", "win32"):
        monkeypatch.setattr(allocator.sys, "platform", system)
        calls.clear()
        assert tune_allocator() is False and calls == []

    def musl(library: object, name: str) -> int:
        raise AttributeError(name)

    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator, "_origin", musl)
    assert tune_allocator() is False


def test_commands_ask_for_it_and_the_library_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(cli, "tune_allocator", lambda: asked.append("") or True)
    image = tmp_path / "none.png"
    for words in (["predict", str(image), "--weights", "nowhere", "--output", str(tmp_path / "out")], ["evaluate"]):
        assert cli.main(words) == 2
    assert len(asked) == 1, "`predict` computes; a command line that is not understood does nothing"
    assert cli.main(["recipes"]) == 0
    assert len(asked) == 1
    code = "import crossdino.predictor, crossdino.allocator as a; print(a.__dict__.get('called', 0))"
    program = f"import crossdino.allocator as a; a._glibc = lambda: setattr(a, 'called', 1)\n{code}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
