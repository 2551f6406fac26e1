"""What the ground truth says that result files need: the ids and names of its images and categories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from crossdino.documents import load_document
from crossdino.errors import InputError


@dataclass(frozen=True)
class Frame:
    """The images and categories that results are about.

    Attributes:
        name: what messages call the ground truth.
        file_names: image id -> name of its file without folders, in the order of the ground truth; None if unnamed.
        categories: COCO's list of categories.
    """

    name: str
    file_names: dict[int, str | None]
    categories: Sequence[Mapping[str, Any]]

    @property
    def category_ids(self) -> set[int]:
        """The ids of the categories."""
        return {entry["id"] for entry in self.categories}

    def by_stem(self) -> dict[str, int]:
        """Stem of the file name -> image id.

        Raises:
            InputError: an image has no name, or two have the same stem.
        """
        ids: dict[str, int] = {}
        for identity, file_name in self.file_names.items():
            if file_name is None:
                raise InputError(f"{self.name}: image {identity} has no 'file_name', which text files are named by")
            stem = PurePosixPath(file_name).stem
            if stem in ids:
                raise InputError(
                    f"{self.name}: images {ids[stem]} and {identity} are both called {stem}, and there is one text "
                    "file for a name: exchange these results as --to coco"
                )
            ids[stem] = identity
        return ids


def read_frame(ground_truth: Mapping[str, Any] | Path | str, name: str | None = None) -> Frame:
    """Read the images and categories of a COCO ground truth.

    Args:
        ground_truth: a file, or the dictionary.
        name: what messages call it; None: the path, or "the ground truth".

    Raises:
        InputError: it cannot be read or is not of the format.
    """
    name = name or (str(ground_truth) if isinstance(ground_truth, (str, Path)) else "the ground truth")
    document = load_document(ground_truth, "the ground truth")
    for key in ("images", "categories"):
        entries = document.get(key) if isinstance(document, Mapping) else None
        if not isinstance(entries, list) or not entries:
            raise InputError(f"{name} has no list {key!r}: give a COCO ground truth (instances) file")
        seen: set[int] = set()
        for place, entry in enumerate(entries):
            identity = entry.get("id") if isinstance(entry, Mapping) else None
            if type(identity) is not int or identity in seen:
                raise InputError(
                    f"{name}: entry {place} of {key!r} has id {identity!r}: give each an integer of its own"
                )
            seen.add(identity)
    file_names = {}
    for entry in document["images"]:
        file_name = entry.get("file_name")
        known = isinstance(file_name, str) and file_name
        file_names[entry["id"]] = PurePosixPath(file_name.replace("\\", "/")).name if known else None
    return Frame(name, file_names, document["categories"])
