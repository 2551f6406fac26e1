"""Images that a data set holds twice, within a split and across splits.

Exact duplicates are files of the same bytes. Near duplicates (another compression or size, neighbouring frames of a
video or a webcam) are found by a difference hash: the image is shrunk to 17 x 16 grey pixels, and each of the 16 x 16
horizontal neighbours gives one bit, which of the two is brighter. Two images whose hashes differ in at most
`NEAR_DISTANCE` of the 256 bits count as near duplicates. Saving an image anew at half its size changes 2 to 10 bits,
an unrelated image about 128. Where nearly all bits are 0 (black or white frames) the distance says nothing, so it must
also be clearly below a quarter of the number of bits of the rarer kind in either image.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NEAR_DISTANCE = 10
_SIDE = 16
# JPEG files are decoded at a fraction of their size, but not smaller than this: the hash then hardly changes.
_DRAFT_PX = 128
_CHUNK = 256


@dataclass(frozen=True)
class Duplicates:
    """How many images of each split have a twin, and where.

    Attributes:
        num_images: split -> images that were compared.
        exact_within: split -> images with a file of the same bytes in their own split.
        exact_across: split -> images with a file of the same bytes in another split.
        near_within: split -> images with a near duplicate (and no exact one) in their own split.
        near_across: the same, in another split.
        examples: (kind, path, path), the closest pairs, those across splits first; kind is `exact` or `near`.
        unreadable: files that could not be read or decoded.
    """

    num_images: dict[str, int]
    exact_within: dict[str, int]
    exact_across: dict[str, int]
    near_within: dict[str, int]
    near_across: dict[str, int]
    examples: tuple[tuple[str, Path, Path], ...]
    unreadable: tuple[Path, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "near_distance_bits": NEAR_DISTANCE,
            "hash_bits": _SIDE * _SIDE,
            "num_images": self.num_images,
            "exact_within": self.exact_within,
            "exact_across": self.exact_across,
            "near_within": self.near_within,
            "near_across": self.near_across,
            "examples": [[kind, str(first), str(second)] for kind, first, second in self.examples],
            "unreadable": [str(path) for path in self.unreadable],
        }


def find_duplicates(
    splits: Mapping[str, Sequence[Path]], *, num_examples: int = 6, on_image: Callable[[], None] | None = None
) -> Duplicates:
    """Compare all images of all splits with each other.

    Files are read in threads; about 3 ms for a JPEG file of two megapixels on one core. The comparison itself takes
    seconds for a hundred thousand images.

    Args:
        splits: name -> image files.
        num_examples: how many pairs to name.
        on_image: called after each image, for a progress bar.

    Returns:
        The counts. Images that cannot be decoded are named, and compared by their bytes only.
    """
    names = list(splits)
    paths = [path for name in names for path in splits[name]]
    split_of = np.repeat(np.arange(len(names)), [len(splits[name]) for name in names])

    def prints(path: Path) -> tuple[bytes | None, NDArray[np.bool_] | None]:
        found = _prints(path)
        if on_image is not None:
            on_image()
        return found

    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        found = list(pool.map(prints, paths))
    unreadable = tuple(path for path, (_, bits) in zip(paths, found, strict=True) if bits is None)

    # Files of the same bytes are one image for the near duplicates.
    first_of: dict[bytes, int] = {}
    group = np.arange(len(paths))
    for place, (digest, _) in enumerate(found):
        if digest is not None:
            group[place] = first_of.setdefault(digest, place)
    twins = np.zeros((4, len(paths)), dtype=bool)  # exact within, exact across, near within, near across
    examples: list[tuple[int, bool, str, int, int]] = []
    order = np.argsort(group, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
        if len(members) > 1:
            counts = np.bincount(split_of[members], minlength=len(names))[split_of[members]]
            twins[0, members] = counts > 1
            twins[1, members] = counts < len(members)
            other = next((m for m in members if split_of[m] != split_of[members[0]]), members[1])
            examples.append((-1, bool(counts[0] == len(members)), "exact", int(members[0]), int(other)))

    # One image of each group that has a hash, and the splits that the group is in.
    hashed = np.array([i for i in np.flatnonzero(group == np.arange(len(paths))) if found[i][1] is not None], dtype=int)
    in_split = np.zeros((len(paths), len(names)), dtype=bool)
    in_split[group, split_of] = True
    near_in, pairs = _near(np.array([found[i][1] for i in hashed]), in_split[hashed], num_examples)
    near_splits = np.zeros_like(in_split)
    near_splits[hashed] = near_in
    near_splits = near_splits[group]  # what is near the first copy is near all copies
    mine = np.eye(len(names), dtype=bool)[split_of]
    twins[2] = (near_splits & mine).any(1)
    twins[3] = (near_splits & ~mine).any(1)
    examples += [
        (distance, bool(split_of[hashed[i]] == split_of[hashed[j]]), "near", int(hashed[i]), int(hashed[j]))
        for i, j, distance in pairs
    ]
    twins[2:] &= ~twins[:2].any(0)

    def per_split(flags: NDArray[np.bool_]) -> dict[str, int]:
        return {name: int(flags[split_of == number].sum()) for number, name in enumerate(names)}

    examples.sort(key=lambda pair: (pair[1], pair[0]))
    return Duplicates(
        {name: len(splits[name]) for name in names},
        *(per_split(flags) for flags in twins),
        examples=tuple((kind, paths[i], paths[j]) for _, _, kind, i, j in examples[:num_examples]),
        unreadable=unreadable,
    )


def _prints(path: Path) -> tuple[bytes | None, NDArray[np.bool_] | None]:
    """Digest of the file's bytes and difference hash of its pixels; None for what cannot be had."""
    try:
        content = path.read_bytes()
    except OSError:
        return None, None
    try:
        bits = difference_hash(content)
    except Exception:  # decoders raise nearly anything on damaged files; the caller names the file
        bits = None
    return hashlib.blake2b(content, digest_size=16).digest(), bits


def difference_hash(content: bytes) -> NDArray[np.bool_]:
    """The 256 bits of an image file, see the top of this file."""
    with Image.open(io.BytesIO(content)) as image:
        image.draft("L", (_DRAFT_PX, _DRAFT_PX))
        if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey at 255
            image = Image.fromarray((np.asarray(image).astype(np.float32) / 257.0).astype(np.uint8))
        small = image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)
    grey = np.asarray(small)
    return (grey[:, 1:] > grey[:, :-1]).ravel()


def _near(
    bits: NDArray[np.bool_], in_split: NDArray[np.bool_], num_examples: int
) -> tuple[NDArray[np.bool_], list[tuple[int, int, int]]]:
    """In which splits each image has near duplicates, and the closest pairs.

    Args:
        bits: (n, 256) hashes.
        in_split: (n, splits), where each image is.
        num_examples: pairs wanted within splits, and across them.

    Returns:
        (n, splits) bool, and pairs (i, j, distance).
    """
    near_in = np.zeros_like(in_split)
    if len(bits) < 2:
        return near_in, []
    # Hashes that are close have nearly equally many ones: in the order of that number only neighbours are compared.
    ones = bits.sum(1)
    order = np.argsort(ones, kind="stable")
    bits, ones, splits = bits[order], ones[order], in_split[order].astype(np.float32)
    rarer = np.minimum(ones, bits.shape[1] - ones)
    signs = bits.astype(np.float32) * 2 - 1
    first = np.searchsorted(ones, ones - NEAR_DISTANCE, side="left")
    last = np.searchsorted(ones, ones + NEAR_DISTANCE, side="right")
    pairs: list[tuple[bool, int, int, int]] = []
    for start in range(0, len(bits), _CHUNK):
        stop = min(start + _CHUNK, len(bits))
        low, high = first[start], last[stop - 1]
        distance = (bits.shape[1] - signs[start:stop] @ signs[low:high].T) / 2
        limit = np.minimum(NEAR_DISTANCE, np.minimum(rarer[start:stop, None], rarer[None, low:high]) // 4 - 2)
        near = distance <= limit
        near[np.arange(stop - start), np.arange(start, stop) - low] = False
        near_in[order[start:stop]] = near.astype(np.float32) @ splits[low:high] > 0
        shared = splits[start:stop] @ splits[low:high].T > 0
        later = np.arange(low, high)[None] > np.arange(start, stop)[:, None]
        for same in (False, True):
            rows, columns = np.nonzero(near & later & (shared == same))
            closest = np.argsort(distance[rows, columns], kind="stable")[:num_examples]
            for row, column in zip(rows[closest].tolist(), columns[closest].tolist(), strict=True):
                pair = int(order[start + row]), int(order[low + column])
                pairs.append((same, round(float(distance[row, column])), *pair))
        pairs = (
            sorted(pair for pair in pairs if not pair[0])[:num_examples]
            + sorted(pair for pair in pairs if pair[0])[:num_examples]
        )
    return near_in, [(i, j, distance) for _, distance, i, j in pairs]
