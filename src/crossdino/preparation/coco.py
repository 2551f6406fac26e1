"""COCO 2017: `annotations/instances_*2017.json` and the folders `train2017` and `val2017`.

Everything stays as it is: ids, areas (of the masks), crowds, images without annotations. Only an annotation id of 0,
which counts as never matched in COCO's evaluation, gets another number; the files themselves have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crossdino.errors import InputError
from crossdino.preparation.coco_files import check_categories, find_images, read_coco, renew
from crossdino.preparation.contract import Option, SplitResult
from crossdino.preparation.work import Work

OPTIONS: tuple[Option, ...] = ()

SPLITS = ("train2017", "val2017")


def prepare(source: Path, work: Work, options: Mapping[str, Any]) -> list[SplitResult]:
    """Prepare the splits that are found in the source."""
    looked_for = {split: f"annotations/instances_{split}.json" for split in SPLITS}
    found = {split: path for split in SPLITS if (path := _find(source, f"instances_{split}.json")) is not None}
    results: list[SplitResult] = []
    for split, path in work.choose(found, looked_for):
        fingerprint = work.fingerprint([path])
        result = work.finished_before(split, fingerprint)
        if result is None:
            work.progress(f"reading {split}", 0, 1)
            document = read_coco(path)
            check_categories(path, document, work.benchmark.categories, work.benchmark.title)
            document, result = renew(path, document, split, renumber=False)
            names = [image["file_name"] for image in document["images"]]
            if not work.without_images:
                folders = [source / split, source / "images" / split, source / split / split]
                work.place_images(split, find_images(names, folders, source), names)
            work.write_annotations(split, document)
            work.mark_done(fingerprint, result)
            work.progress(f"reading {split}", 1, 1)
        results.append(result)
    return results


def _find(source: Path, name: str) -> Path | None:
    """A file of this name in the source or up to two levels deeper, where unzippers put it."""
    found = [path for pattern in ("", "*/", "*/*/") for path in sorted(source.glob(pattern + name)) if path.is_file()]
    if len(found) > 1:
        raise InputError(f"{name} is in {source} twice ({found[0]} and {found[1]}); keep one of them")
    return found[0] if found else None
