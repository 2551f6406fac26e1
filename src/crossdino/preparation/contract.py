"""What the preparation of one benchmark is given, and what it hands back.

A benchmark is a module of this folder with

- `OPTIONS`, a tuple of `Option`: the rules that the literature leaves open or that a user may want otherwise, and
- `prepare(source: Path, work: Work, options: Mapping[str, Any]) -> list[SplitResult]`,

and a line in `crossdino.preparation.prepare.MODULES`. `prepare` does one split after the other:

    for split, folder in work.choose({"train": ..., "val": ...}, looked_for):
        fingerprint = work.fingerprint(files)
        result = work.finished_before(split, fingerprint)
        if result is None:
            records = work.map_images(read_one, tasks, "reading train")
            work.write_annotations(split, document)
            work.place_images(split, folder, names)      # or write files into work.images_folder(split)
            result = SplitResult(split, num_images=..., num_objects=..., num_ignored=...)
            work.mark_done(fingerprint, result)
        results.append(result)

What is counted against the published numbers, the notes on what was met, `data.yaml` and `benchmark.json` are the
work of the core (`crossdino.preparation.prepare`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Option:
    """A rule that can be chosen.

    Attributes:
        name: its key in the options; on the command line `min_side` is `--min-side`.
        default: the literature's choice.
        help: one line: what it does, and where the default comes from.
        choices: the words to choose from; none: any value that `parse` takes.
        parse: text -> value; raises `argparse.ArgumentTypeError`.
        metavar: what the help calls the value.
    """

    name: str
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    parse: Callable[[str], Any] = str
    metavar: str | None = None

    @property
    def flag(self) -> str:
        """The word on the command line."""
        return f"--{self.name.replace('_', '-')}"


@dataclass(frozen=True)
class SplitResult:
    """One prepared split in numbers.

    Attributes:
        split: its official name, a key of the benchmark's `splits`.
        num_images: images in the annotation file (patches, where it is cut).
        num_objects: annotations that count: neither crowds nor ignored.
        num_ignored: annotations with `iscrowd` 1.
        dropped: reason -> number of raw entries that are in no annotation.
        counted: what the raw data hold, to be compared with the published `images` and `objects`; what is not named
            is `num_images` and `num_objects`.
        notes: one line each: what was met and what was done about it.
        originals: whether there is also a file of the original images (`SPLIT_originals.json`).
    """

    split: str
    num_images: int
    num_objects: int
    num_ignored: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    counted: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    originals: bool = False
