"""What `evaluate` measures against: the files behind `--ground-truth`, `--split` and `--patches`."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossdino.errors import InputError


@dataclass(frozen=True)
class Measured:
    """The ground truth of an evaluation.

    Attributes:
        path: the file it was read from; None: a data set in another format than COCO's.
        truth: the truth in COCO's layout, with everything that its file says.
        annotations: the file or data set whose images a model is run on.
        split: which split of it; of no meaning for a file.
        images: the folder of these images; None: looked for beside the file.
        patches: where those images are patches of the truth's images (SODA-D): the content of their file.
    """

    path: Path | None
    truth: dict[str, Any]
    annotations: Path
    split: str
    images: Path | None = None
    patches: dict[str, Any] | None = None

    @property
    def benchmark(self) -> str | None:
        """Which data set `crossdino prepare` made this of."""
        return self._info("benchmark")

    @property
    def official_split(self) -> str | None:
        """The split by its official name, where `crossdino prepare` made this."""
        return self._info("split")

    def _info(self, key: str) -> str | None:
        documents = (self.truth, self.patches or {})
        found = (info.get(key) for document in documents if isinstance(info := document.get("info"), dict))
        return next((value for value in found if isinstance(value, str)), None)


def is_one_file(ground_truth: str) -> bool:
    """Whether the ground truth is a COCO file; a folder or a YAML file is a data set with splits."""
    path = Path(ground_truth)
    return not path.is_dir() and path.suffix.lower() not in (".yaml", ".yml")


def find_measured(options: argparse.Namespace) -> Measured:
    """Read the ground truth.

    Args:
        options: `ground_truth`, `split`, `images`, `patches`.

    Raises:
        InputError: nothing can be read there, or patches are given without the images they were cut from.
    """
    from crossdino.evaluation.coco_input import load_document

    given = Path(options.ground_truth)
    if is_one_file(options.ground_truth):
        annotations, images = given, options.images and Path(options.images)
    else:
        if options.images is not None:
            raise InputError(f"--images goes with a COCO file only; {given} says itself where its images are")
        found = _prepared_split(given, options.split) or _split_of_data_set(given, options.split)
        if isinstance(found, Measured):
            return found
        annotations, images = found
    document = load_document(annotations, "the ground truth")
    measured = Measured(annotations, document, annotations, options.split, images)
    if options.patches is not None:
        return Measured(
            annotations,
            document,
            Path(options.patches),
            options.split,
            images,
            load_document(options.patches, "the patches"),
        )
    if not _has_patches(document):
        return measured
    originals = annotations.with_name(f"{annotations.stem}_originals.json")
    if not originals.is_file():
        raise InputError(
            f"{annotations} lists patches of larger images (ori_id), and {originals} is not there: give the truth of "
            f"the large images as --ground-truth, and this file as --patches"
        )
    truth = load_document(originals, "the ground truth")
    return Measured(originals, truth, annotations, options.split, images, document)


def _has_patches(document: Any) -> bool:
    images = document.get("images") if isinstance(document, dict) else None
    return isinstance(images, list) and any(isinstance(image, dict) and "ori_id" in image for image in images[:1])


def _prepared_split(folder: Path, split: str) -> tuple[Path, Path] | None:
    """Annotations and images of a split of what `crossdino prepare` made; None for any other data set."""
    note = folder / "benchmark.json"
    if not note.is_file():
        return None
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        splits, roles = content["splits"], content["roles"]
        place = splits.get(roles.get(split, split))
        found = None if place is None else (folder / place["annotations"], folder / place["images"])
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{note} cannot be read ({error}): make {folder} again with `crossdino prepare`") from None
    if found is None:
        known = dict.fromkeys([*roles, *splits])
        raise InputError(f"{folder} has no split {split!r}, only {', '.join(map(repr, known))}")
    return found


def _split_of_data_set(source: Path, split: str) -> Measured | tuple[Path, Path | None]:
    """The COCO file of a split, or the truth of one in another format."""
    from crossdino.data.coco import CocoSplit
    from crossdino.data.formats import find_splits, load_dataset

    if source.is_dir() and (any(source.glob("annotations/*.txt")) or any(source.glob("*/annotations/*.txt"))):
        raise InputError(
            f"{source} is VisDrone as it is downloaded: run `crossdino prepare visdrone {source} --output DIR`, "
            "and give DIR"
        )
    found = find_splits(source).get("val" if split in ("valid", "validation") else split)
    if isinstance(found, CocoSplit):
        return found.annotations, found.images
    return Measured(None, load_dataset(source, split, require_images=False).to_coco(), source, split)
