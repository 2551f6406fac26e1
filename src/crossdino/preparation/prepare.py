"""Preparing a benchmark: the frame that is the same for every one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from crossdino.benchmarks import BENCHMARKS
from crossdino.errors import InputError
from crossdino.preparation.contract import Option
from crossdino.preparation.work import Images, Progress, Work

# Each has `OPTIONS` and `prepare` (see `contract`).
MODULES: dict[str, str] = {
    name: f"crossdino.preparation.{name}" for name in ("visdrone", "aitod", "sodad", "widerperson", "coco")
}


@dataclass(frozen=True)
class Prepared:
    """A prepared data set.

    Attributes:
        output: its folder; `load_dataset(output, "train")` reads it.
        description: what `benchmark.json` says.
        notes: lines about the whole data set that the user should read.
        was_there: whether all of it was there before, and nothing was done.
    """

    output: Path
    description: dict[str, Any]
    notes: tuple[str, ...]
    was_there: bool


def options_of(name: str) -> tuple[Option, ...]:
    """The rules of a benchmark that can be chosen."""
    return import_module(MODULES[_known(name)]).OPTIONS


def prepare_benchmark(
    name: str,
    source: str | Path,
    output: str | Path,
    *,
    options: Mapping[str, Any] | None = None,
    splits: Sequence[str] = (),
    images: Images = "link",
    num_processes: int = 1,
    on_progress: Progress | None = None,
) -> Prepared:
    """Turn a benchmark's raw data into COCO files, by the rules of the literature unless told otherwise.

    A run that was stopped goes on where it was; one that finished finds everything done.

    Args:
        name: `visdrone`, `aitod`, `sodad`, `widerperson` or `coco`.
        source: folder with the raw data as they are downloaded and unpacked; nothing in it is changed.
        output: folder to write, outside the source.
        options: name -> value of those rules that shall not be as in the literature (see `options_of`).
        splits: official names (or `train`, `val`, `test`) of the splits to prepare; empty: all that are found.
        images: `link` to the source's folders, `copy` the files, or `none`: annotations only, to evaluate predictions.
        num_processes: that read or cut images at the same time.
        on_progress: called as `on_progress(what, done, total)`.

    Returns:
        What was prepared.

    Raises:
        InputError: something is missing or malformed (file and line are named), the output folder holds other things
            or was made with other options, or it cannot be written.
    """
    module = import_module(MODULES[_known(name)])
    rules: tuple[Option, ...] = module.OPTIONS
    chosen = {rule.name: rule.default for rule in rules} | dict(options or {})
    for key, value in chosen.items():
        rule = next((rule for rule in rules if rule.name == key), None)
        if rule is None:
            known = ", ".join(rule.name for rule in rules) or "none"
            raise InputError(f"{name} has no option {key!r}; it has {known}")
        if rule.choices and value not in rule.choices:
            raise InputError(f"{rule.flag} is {value!r}; it is one of {', '.join(rule.choices)}")
    if images not in ("link", "copy", "none"):
        raise InputError(f"images is {images!r}; it is link, copy or none")
    work = Work(
        BENCHMARKS[name],
        Path(source),
        Path(output),
        chosen,
        wanted=splits,
        images=images,
        num_processes=num_processes,
        on_progress=on_progress,
    )
    module.prepare(Path(source), work, chosen)
    was_there = work.was_there
    return Prepared(Path(output), work.finish(), tuple(work.notes), was_there)


def _known(name: str) -> str:
    if name not in MODULES:
        raise InputError(f"unknown benchmark {name!r}; it is one of {', '.join(MODULES)}")
    return name
