"""What the files of a run are called, and that none of them is one of the images."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from crossdino.errors import InputError

# File systems end a name at 255 bytes; room is left for a number, a suffix, and the name of the unfinished file.
_MOST_BYTES = 200


def output_stems(file_names: Iterable[str], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """What the own files of each source are called, without a suffix: `ship` for `harbour/ship.png`.

    Sources of the same name get a number (`ship_2`), so that none is lost. Made once for all sources of a run, before
    they are divided among processes.

    Args:
        file_names: the sources' names, in their order.
        known: the names of an earlier part of the run (`JournalIndex.stems`), which are kept although the sources
            that are named now may be others or in another order.

    Returns:
        File name -> stem.
    """
    stems = dict(known or {})
    taken = {_folded(stem) for stem in stems.values()}
    next_number: dict[str, int] = {}
    for file_name in file_names:
        if file_name in stems:
            continue
        base = _shortened(PurePosixPath(file_name).stem or "image")
        folded = _folded(base)
        number = next_number.get(folded, 1)
        stem = base if number == 1 else f"{base}_{number}"
        while _folded(stem) in taken:
            number += 1
            stem = f"{base}_{number}"
        next_number[folded] = number + 1
        taken.add(_folded(stem))
        stems[file_name] = stem
    return stems


def refuse_overwriting(outputs: Iterable[Path], inputs: Iterable[str | Path]) -> None:
    """Refuse a run that would write onto one of its own images.

    Args:
        outputs: the files that will be written.
        inputs: the files that are read.

    Raises:
        InputError: naming the file.
    """
    sources = {Path(path).resolve() for path in inputs}
    for path in outputs:
        if path.resolve() in sources:
            raise InputError(f"{path} is one of the images and would be overwritten; choose another --output")


def _folded(stem: str) -> str:
    # Some file systems do not tell A from a, or a letter with an accent from a letter and an accent.
    return unicodedata.normalize("NFC", stem).casefold()


def _shortened(stem: str) -> str:
    encoded = stem.encode("utf-8", "surrogateescape")
    return stem if len(encoded) <= _MOST_BYTES else encoded[:_MOST_BYTES].decode("utf-8", "ignore")
