"""What `evaluate` and `compare` measure: the files behind their options, and the protocol that belongs to them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdino.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console


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
    def as_listed(self) -> Measured:
        """The patches themselves as the truth, where they are those of the annotations given."""
        if self.patches is None:
            return self
        return replace(self, path=self.annotations, truth=self.patches, patches=None)

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


def refuse_replacing(outputs: Iterable[str | Path | None], inputs: Iterable[str | Path | None]) -> None:
    """Keep a result from being written over what it was made of, or over another result.

    Args:
        outputs: files that will be written; None: not asked for.
        inputs: what is read; None: not given.

    Raises:
        InputError: one file is to be both.
    """
    written = [Path(one) for one in outputs if one is not None]
    read = [Path(one) for one in inputs if one is not None]
    for place, output in enumerate(written):
        if any(output.absolute() == other.absolute() for other in written[:place]):
            raise InputError(f"two results would be written to {output}: name another place for one of them")
        clash = next((one for one in read if output.exists() and one.exists() and output.samefile(one)), None)
        if clash is not None:
            raise InputError(f"{output} would replace {clash}, which is read: name another place")


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
    from crossdino.documents import load_document

    given = Path(options.ground_truth)
    if is_one_file(options.ground_truth):
        annotations, images = given, options.images and Path(options.images)
    else:
        if options.images is not None:
            raise InputError(f"--images goes with a COCO file only; {given} says itself where its images are")
        found = prepared_split(given, options.split) or _split_of_data_set(given, options.split)
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


def chosen_protocol(options: argparse.Namespace, measured: Measured) -> str | None:
    """The protocol: the one asked for, or that of the data; None: COCO's AP with bands and a cap as wanted."""
    if options.protocol is not None:
        return options.protocol
    if options.max_detections is not None or options.size_bands is not None:
        return None
    if measured.patches is not None:
        return "sodad"
    from crossdino.benchmarks import BENCHMARKS

    return BENCHMARKS[measured.benchmark].protocol if measured.benchmark in BENCHMARKS else None


def read_detections(place: str, measured: Measured, console: Console) -> Any:
    """The detections as COCO results, with the file's name where it is one of these."""
    if Path(place).suffix.lower() == ".json" or not Path(place).exists():
        from crossdino.documents import Document, load_document

        return Document(load_document(place, "the predictions"), place)
    from crossdino.exchange import read_results

    def tell(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    # Of SODA-D the detections are those of patches.
    truth, path = (
        (measured.truth, measured.path) if measured.patches is None else (measured.patches, measured.annotations)
    )
    return read_results(place, None, truth, on_note=tell, truth_name=None if path is None else str(path))


def _has_patches(document: Any) -> bool:
    images = document.get("images") if isinstance(document, dict) else None
    return isinstance(images, list) and any(isinstance(image, dict) and "ori_id" in image for image in images[:1])


def prepared_split(folder: Path, split: str) -> tuple[Path, Path | None] | None:
    """Annotations and images of a split of what `crossdino prepare` made; None for any other data set.

    The images are None where they were left out (`--without-images`).

    Args:
        folder: of the data set.
        split: by its role (train, val, test) or by its official name.

    Raises:
        InputError: the folder has no such split, or does not say which it has.
    """
    note = folder / "benchmark.json"
    if not note.is_file():
        return None
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        splits, roles = content["splits"], content["roles"]
        place = splits.get(roles.get(split, split))
        images = None if place is None else place.get("images")
        found = None if place is None else (folder / place["annotations"], folder / images if images else None)
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

    _refuse_raw(source, "visdrone", "annotations/*.txt", "*/annotations/*.txt")
    try:
        splits = find_splits(source)
    except InputError:
        _refuse_raw(source, "widerperson", "Annotations/*.jpg.txt")
        _refuse_raw(source, "sodad", "Annotations/train.json", "Annotations/val.json", "Annotations/test.json")
        raise
    found = splits.get("val" if split in ("valid", "validation") else split)
    if isinstance(found, CocoSplit):
        return found.annotations, found.images
    return Measured(None, load_dataset(source, split, require_images=False).to_coco(), source, split)


def _refuse_raw(source: Path, benchmark: str, *patterns: str) -> None:
    """Say what to do with a benchmark's folder that is as it was downloaded."""
    from crossdino.benchmarks import BENCHMARKS

    if source.is_dir() and any(any(source.glob(pattern)) for pattern in patterns):
        raise InputError(
            f"{source} is {BENCHMARKS[benchmark].title} as it is downloaded: run `crossdino prepare {benchmark} "
            f"{source} --output DIR`, and give DIR"
        )
