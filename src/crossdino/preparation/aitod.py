"""AI-TOD (v1): its COCO files and images, under the names that its tool, RFLA and SR-TOD give them.

Its annotations are COCO already; they are checked and written anew with annotation ids from 1, because the tool that
merges xView's share into it numbers them from 0, and an id of 0 counts as never matched in COCO's evaluation. Image ids
stay, so that result files made elsewhere fit; boxes and areas stay too.

AI-TOD-v2 has the same images and other annotations; its numbers are not those of the literature on AI-TOD. Its files
are told by their names and taken only when asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossdino.data.check import hash_file
from crossdino.errors import InputError
from crossdino.preparation.coco_files import Document, check_categories, find_images, read_coco, renew
from crossdino.preparation.contract import Option, SplitResult
from crossdino.preparation.folders import entries
from crossdino.preparation.work import Work

OPTIONS = (
    Option(
        "version",
        "v1",
        "which annotations: v1, on which the paper, RFLA and SR-TOD report, or v2 (AI-TOD-v2), which has other boxes",
        ("v1", "v2"),
    ),
)

SPLITS = ("train", "val", "trainval", "test")
# aitod_trainval_v1, small_trainval_v1_1.0, aitodv2_trainval, trainval
_NAME = re.compile(
    r"(?:(?:ai[-_]?tod|small|instances)[-_]?)?(?:v(?P<early>\d)[-_])?"
    r"(?P<split>train(?:val|ing)?|val(?:idation)?|test(?:ing)?)(?:[-_]v(?P<late>\d)(?:[-_.]\d+)*)?",
    re.IGNORECASE,
)
_OFFICIAL = {"training": "train", "validation": "val", "testing": "test"}


def prepare(source: Path, work: Work, options: Mapping[str, Any]) -> list[SplitResult]:
    """Prepare the splits that are found in the source."""
    version = options["version"]
    files = find_files(source)
    found = {split: _only(paths, split, source) for (split, of), paths in files.items() if of == version}
    if "trainval" not in found and {"train", "val"} <= found.keys():
        found["trainval"] = found["train"] + found["val"]
    others = sorted(
        str(path.relative_to(source)) for (_, of), paths in files.items() if of != version for path in paths
    )
    hint = ""
    if others:
        hint = f"{others[0]} is AI-TOD-v2, whose numbers are not AI-TOD's: --version v2 takes it"
        hint = hint if version == "v1" else f"{others[0]} is v1: leave out --version v2"
        hint = f"{hint}. {entries(source)}"
    looked_for = {
        split: f"annotations/aitod_{split}_v1.json or annotations/small_{split}_v1_1.0.json"
        if version == "v1"
        else f"annotations/aitodv2_{split}.json"
        for split in SPLITS
    }
    results: list[SplitResult] = []
    for split, paths in work.choose(found, looked_for, hint):
        fingerprint = work.fingerprint(paths)
        result = work.finished_before(split, fingerprint)
        if result is None:
            work.progress(f"reading {split}", 0, 1)
            documents = [read_coco(path) for path in paths]
            for path, document in zip(paths, documents, strict=True):
                check_categories(path, document, work.benchmark.categories, work.benchmark.title)
            document, result = renew(paths[0], _join(documents), split, renumber=True)
            names = [image["file_name"] for image in document["images"]]
            if not work.without_images:
                work.place_images(split, find_images(names, _image_folders(source, split), source), names)
            work.write_annotations(split, document)
            work.mark_done(fingerprint, result)
            work.progress(f"reading {split}", 1, 1)
        results.append(result)
    return results


def find_files(source: Path) -> dict[tuple[str, str], list[Path]]:
    """The annotation files in the source and up to two levels deeper, by split and version."""
    files: dict[tuple[str, str], list[Path]] = {}
    for pattern in ("*.json", "*/*.json", "*/*/*.json"):
        for path in sorted(source.glob(pattern)):
            match = _NAME.fullmatch(path.stem)
            if match is None:
                continue
            word = match["split"].lower()
            version = match["early"] or match["late"] or ("2" if "v2" in path.parent.name.lower() else "1")
            files.setdefault((_OFFICIAL.get(word, word), f"v{version}"), []).append(path)
    return files


def _only(paths: Sequence[Path], split: str, source: Path) -> list[Path]:
    """The one file of a split; several must be the same."""
    if len({hash_file(path) for path in paths}) > 1:
        names = " and ".join(str(path.relative_to(source)) for path in paths)
        raise InputError(f"{source} has several annotation files of {split} that differ ({names}); keep one of them")
    return [paths[0]]


def _join(documents: Sequence[Document]) -> Document:
    """Train and val as trainval: with their image ids where these differ, else numbered anew."""
    if len(documents) == 1:
        return documents[0]
    images = [image for document in documents for image in document["images"]]
    if len({image.get("id") for image in images}) == len(images):
        annotations = [annotation for document in documents for annotation in document["annotations"]]
        return {**documents[0], "images": images, "annotations": annotations}
    renumbered: list[Document] = []
    annotations = []
    for document in documents:
        new_ids = {image.get("id"): len(renumbered) + n for n, image in enumerate(document["images"], start=1)}
        renumbered += [{**image, "id": new_ids[image.get("id")]} for image in document["images"]]
        annotations += [{**a, "image_id": new_ids.get(a.get("image_id"))} for a in document["annotations"]]
    return {**documents[0], "images": renumbered, "annotations": annotations}


def _image_folders(source: Path, split: str) -> list[Path]:
    """Where the images of a split may lie; the tool makes images/SPLIT, RFLA's and SR-TOD's users have SPLIT/images."""
    splits = (split, "train", "val") if split == "trainval" else (split,)
    layouts = ("images/{}", "Images/{}", "{}/images", "{}/Images", "{}")
    found = [source / layout.format(name) for name in splits for layout in layouts]
    return [*found, source / "images", source / "Images", source]
