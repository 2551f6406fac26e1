"""SODA-D: raw images and JSON files -> patches with COCO files, and the truth of the original images.

Source: `Images` and `Annotations/{train,val,test}.json` as downloaded (also below `rawData`). The rules are those of
the splitter and of `generate_wo_ignore.py` of CFINet and SODA-mmdetection (`sodad_patches` has them in numbers; both
are the same in the two repositories). Where we differ: annotation ids begin at 1; the polygons that the original writes
beside each box are left out; pieces that it flags `ignore` stand in a list of their own (see `pieces` below); images of
one name do not overwrite each other's patches.
"""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossdino.errors import InputError
from crossdino.preparation.contract import Option, SplitResult
from crossdino.preparation.sodad_cutting import ImagePatches, write_patches
from crossdino.preparation.sodad_patches import PatchRules, plan_patches
from crossdino.preparation.sodad_raw import REGION, RawImage, RawSplit, find_annotations, read_split
from crossdino.preparation.work import Work
from crossdino.tiling import LARGEST_TILE_PX

WHOLE = "whole"


def _margin(text: str) -> int | str:
    try:
        return text if text == WHOLE else int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is neither a number of pixels nor {WHOLE}") from None


OPTIONS = (
    Option("patch", 800, "side of the square patches in pixels", parse=int, metavar="PX"),
    Option(
        "overlap",
        150,
        "of neighbouring patches in pixels; the stride is what remains",
        parse=int,
        metavar="PX",
    ),
    Option(
        "ignore_ratio",
        0.4,
        "pieces of at most this share of their object's area are flagged",
        parse=float,
        metavar="SHARE",
    ),
    Option(
        "pieces",
        "background",
        "flagged pieces: background, as CFINet trains; ignore: regions to ignore (iscrowd)",
        choices=("background", "ignore"),
    ),
    Option(
        "regions",
        "black",
        "ignore regions (category 10): black, painted over as CFINet does; crowd: regions to ignore for every class",
        choices=("black", "crowd"),
    ),
    Option(
        "extent_margin",
        5,
        "training images are cut into patches up to their last annotation and so many pixels, or whole",
        parse=_margin,
        metavar="PX|whole",
    ),
    Option(
        "empty",
        "drop",
        "training patches without an object: drop, as CFINet does, or keep",
        choices=("drop", "keep"),
    ),
    Option(
        "unannotated",
        "skip",
        "images without any annotation: skip, as CFINet does in every split, or keep",
        choices=("skip", "keep"),
    ),
    Option("image_format", "jpg", "of the patches: jpg, as CFINet, or png, the very pixels", choices=("jpg", "png")),
    Option("quality", 95, "of jpg, 1 to 100; OpenCV's default", parse=int, metavar="N"),
)  # fmt: skip


def prepare(source: Path, work: Work, options: Mapping[str, Any]) -> list[SplitResult]:
    """Prepare the splits; see `crossdino.preparation.contract`.

    Args:
        source: the raw data.
        work: the output folder.
        options: a value for each of `OPTIONS`.

    Returns:
        The splits in numbers.

    Raises:
        InputError: a file is missing or malformed, an image has another size than its JSON file says, an option makes
            no sense, or the folder cannot be written to.
    """
    rules = _rules(options)
    looked_for = {split: f"Annotations/{split}.json" for split in work.benchmark.splits}
    results = []
    for split, path in work.choose(find_annotations(source, list(work.benchmark.splits)), looked_for):
        require = "none" if work.without_images else "all" if options["unannotated"] == "keep" else "annotated"
        raw = read_split(path, split, require_images=require)
        shown = [image for image in raw.images if len(image.annotations) or options["unannotated"] == "keep"]
        fingerprint = work.fingerprint([path], () if work.without_images else [image.path for image in shown])
        result = work.finished_before(split, fingerprint)
        if result is None or (
            not work.without_images and len(os.listdir(work.images_folder(split))) < result.num_images
        ):
            result = _prepare_split(work, split, raw, shown, rules, options, fingerprint)
            work.mark_done(fingerprint, result)
        results.append(result)
    return results


def _rules(options: Mapping[str, Any]) -> PatchRules:
    patch, overlap, margin, quality = (options[key] for key in ("patch", "overlap", "extent_margin", "quality"))
    checks = [
        ("patch", isinstance(patch, int) and 16 <= patch <= LARGEST_TILE_PX, f"16 to {LARGEST_TILE_PX} pixels"),
        ("overlap", isinstance(overlap, int) and 0 <= overlap < patch, "0 pixels or more, but less than a patch"),
        ("ignore_ratio", 0 <= options["ignore_ratio"] < 1, "a share from 0 to below 1"),
        (
            "extent_margin",
            margin == WHOLE or (isinstance(margin, int) and margin >= 0),
            f"0 pixels or more, or {WHOLE}",
        ),
        ("quality", isinstance(quality, int) and 1 <= quality <= 100, "1 to 100"),
    ]
    for name, holds, remedy in checks:
        if not holds:
            raise InputError(f"--{name.replace('_', '-')} is {options[name]}: give {remedy}")
    return PatchRules(
        patch,
        overlap,
        options["ignore_ratio"],
        None if margin == WHOLE else margin,
        options["empty"] == "drop",
        options["regions"] == "black",
    )


def _prepare_split(
    work: Work,
    split: str,
    raw: RawSplit,
    shown: Sequence[RawImage],
    rules: PatchRules,
    options: Mapping[str, Any],
    fingerprint: str,
) -> SplitResult:
    """Everything of one split but the note that it is finished."""
    originals, renumbered = _originals(raw, work.benchmark.categories)
    work.write_annotations(split, originals, originals=True)
    plans = _plan(work, split, raw, shown, rules, options["image_format"])
    if not work.without_images:
        write_patches(work, split, plans, rules, options["quality"], fingerprint)
    document, num_ignored = _to_coco(plans, raw, rules, options, work.benchmark.categories)
    work.write_annotations(split, document)
    num_regions = int((raw.categories == REGION).sum())
    seen = {
        int(raw_id) for plan in plans for _, patch in plan.patches for raw_id in plan.image.annotations[patch.sources]
    }
    num_objects = len(raw.categories) - num_regions
    notes = []
    if skipped := len(raw.images) - len(shown):
        notes.append(
            f"images without any annotation: {skipped}; they have no patches, so nothing will be found in them"
        )
    if not num_regions:
        notes.append(
            f"{raw.path.name} has no annotation of category {REGION}, so there are no ignore regions to paint over"
        )
    if flagged := sum(int(patch.flagged.sum()) for plan in plans for _, patch in plan.patches):
        place = "regions to ignore" if options["pieces"] == "ignore" else "background, listed under 'pieces'"
        notes.append(f"pieces of at most {rules.ignore_ratio} of their object: {flagged}; they are {place}")
    if other := _other_names(raw, work.benchmark.categories):
        notes.append(f"{raw.path.name} calls {other}: check that it is SODA-D's; categories go by their numbers")
    if renumbered:
        notes.append(f"annotations of {split}_originals.json are numbered from 1: {renumbered}")
    dropped = {f"category {REGION}": num_regions, "no area in any patch": num_objects - len(seen)}
    return SplitResult(
        split,
        len(document["images"]),
        len(document["annotations"]) - num_ignored,
        num_ignored,
        {reason: number for reason, number in dropped.items() if number},
        {"images": len(raw.images), "objects": num_objects, "patches": len(document["images"])},
        tuple(notes),
        originals=True,
    )


# --- what to write ---


def _plan(
    work: Work, split: str, raw: RawSplit, shown: Sequence[RawImage], rules: PatchRules, suffix: str
) -> list[ImagePatches]:
    """The patches of every image; numbers in their names count those that are kept."""
    used: set[str] = set()
    plans = []
    for done, image in enumerate(shown, start=1):
        stem = image.stem
        while stem.lower() in used:  # also on file systems to which `a` and `A` are one
            stem += f"_{image.image_id}"
        used.add(stem.lower())
        boxes, is_region = raw.boxes_xywh[image.annotations], raw.categories[image.annotations] == REGION
        patches = plan_patches(image.width, image.height, boxes, is_region, rules, training=split == "train")
        names = (f"{stem}_{number}.{suffix}" for number in range(len(patches)))
        plans.append(ImagePatches(image, tuple(zip(names, patches, strict=True))))
        if done % 500 == 0 or done == len(shown):
            work.progress(f"planning {split}", done, len(shown))
    return plans


def _to_coco(
    plans: Sequence[ImagePatches],
    raw: RawSplit,
    rules: PatchRules,
    options: Mapping[str, Any],
    categories: Mapping[int, str],
) -> tuple[dict[str, Any], int]:
    """The COCO file of the patches, and how many of its annotations are regions to ignore."""
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    crowds: list[dict[str, Any]] = []
    pieces: list[dict[str, Any]] = []

    def add(place: list[dict[str, Any]], category: int, box: list[float], **more: Any) -> None:
        x, y, width, height = box
        area = _plain(width * height)
        values = {"image_id": len(images), "category_id": category, "bbox": [_plain(value) for value in box]}
        place.append({"id": 0, **values, "area": area, "iscrowd": int(place is crowds), **more})

    for plan in plans:
        for name, patch in plan.patches:
            images.append(
                {
                    "id": len(images) + 1,
                    "file_name": name,
                    "width": rules.patch_px,
                    "height": rules.patch_px,
                    "ori_id": plan.image.image_id,
                    "start_coord": [patch.left, patch.top],
                }
            )
            of = raw.categories[plan.image.annotations[patch.sources]].tolist()
            for category, box, flagged in zip(of, patch.pieces_xywh.tolist(), patch.flagged.tolist(), strict=True):
                if not flagged:
                    add(objects, category, box)
                else:
                    add(crowds if options["pieces"] == "ignore" else pieces, category, box, ignore=True)
            for box in [] if rules.fill_regions else patch.regions_xywh.tolist():
                for category in categories:
                    add(crowds, category, box)
    # Image by image; within one, what is to be ignored comes last.
    annotations = sorted([*objects, *crowds], key=lambda one: one["image_id"])
    for number, one in enumerate([*annotations, *pieces], start=1):
        one["id"] = number
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
        "pieces": pieces,
    }
    return document, len(crowds)


def _originals(raw: RawSplit, categories: Mapping[int, str]) -> tuple[dict[str, Any], str]:
    """The raw file without ignore regions, and why its annotations were numbered anew, if they were."""
    kept = [one for one in raw.document["annotations"] if one["category_id"] != REGION]
    ids = [one.get("id") for one in kept]
    reason = ""
    if not all(isinstance(number, int) for number in ids):
        reason = "some had none"
    elif 0 in ids:
        reason = "one had the number 0, which evaluators take for 'not matched'"
    elif len(set(ids)) < len(ids):
        reason = "some had the same"
    if reason:
        kept = [{**one, "id": number} for number, one in enumerate(kept, start=1)]
    listed = raw.document.get("categories") or [{"id": number, "name": name} for number, name in categories.items()]
    listed = [one for one in listed if one.get("id") != REGION]
    rest = {key: value for key, value in raw.document.items() if key != "info"}
    return {**rest, "annotations": kept, "categories": listed}, reason


def _other_names(raw: RawSplit, categories: Mapping[int, str]) -> str:
    """Which categories have another name in the raw file, in words; case, hyphens and the like do not count."""

    def simple(name: object) -> str:
        return "".join(letter for letter in str(name).lower() if letter.isalnum())

    names = {one.get("id"): one.get("name") for one in raw.document.get("categories") or []}
    differing = [
        f"category {number} {names[number]!r} instead of {name!r}"
        for number, name in categories.items()
        if number in names and simple(names[number]) != simple(name)
    ]
    return ", ".join(differing)


def _plain(value: float) -> float:
    """A number as JSON shows it shortest: 12 for 12.0."""
    return int(value) if value.is_integer() else value
