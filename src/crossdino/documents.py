"""JSON files that may be large, ground truths and detections: read once, with the name that messages call them."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossdino.errors import InputError


@dataclass(frozen=True)
class Document:
    """A JSON file that was read before; every evaluation takes it in the place of its path.

    Attributes:
        content: what the file holds; nothing about it is checked.
        name: what messages call it.
    """

    content: Any
    name: str


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For code that makes millions of entries and no cycles: looking through them again and again costs a third."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def load_document(source: object, role: str) -> Any:
    """The content of a JSON file, or the object itself.

    Args:
        source: a path, a `Document`, or anything else, which is handed back.
        role: what it is, e.g. `the ground truth`, for messages.

    Returns:
        What the file holds; nothing about it is checked.

    Raises:
        InputError: the file cannot be read or is not JSON.
    """
    if isinstance(source, Document):
        return source.content
    if not isinstance(source, (str, Path)):
        return source
    try:
        with open(source, encoding="utf-8-sig") as file, no_garbage_collection():
            return json.load(file)
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror}): check the path of {role}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not JSON ({error}): write {role} again as COCO JSON") from error


def name_of(source: object, role: str) -> str:
    """What messages call it: the path, the name of a `Document`, or its role."""
    if isinstance(source, Document):
        return source.name
    return str(source) if isinstance(source, (str, Path)) else role
