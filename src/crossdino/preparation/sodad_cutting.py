"""Writing SODA-D's patches: in several processes, each file whole or not at all, and none a second time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from crossdino.data.check import check_images
from crossdino.data.images import MISSING, ImageError, read_image
from crossdino.errors import InputError
from crossdino.preparation.sodad_patches import Patch, PatchRules, cut_patch
from crossdino.preparation.sodad_raw import RawImage
from crossdino.preparation.work import Work
from crossdino.writing import cannot_write, partial_path, write_whole


@dataclass(frozen=True)
class ImagePatches:
    """An image with its patches.

    Attributes:
        image: of the raw data.
        patches: file name and place of each patch; the suffix of the name says the format.
    """

    image: RawImage
    patches: tuple[tuple[str, Patch], ...]


@dataclass(frozen=True)
class _Task:
    """The patches of an image that are to be written."""

    wanted: ImagePatches
    folder: Path
    apply_exif: bool
    rules: PatchRules
    quality: int


def write_patches(
    work: Work, split: str, wanted: Sequence[ImagePatches], rules: PatchRules, quality: int, fingerprint: str
) -> None:
    """Write the patches that are not there yet.

    Args:
        work: the output folder.
        split: its name.
        wanted: all patches of the split.
        rules: how they are cut.
        quality: of JPEG files, 1 to 100.
        fingerprint: of the raw data.

    Raises:
        InputError: an image is missing, damaged or of another size than its JSON file says (all others are cut before
            that is said), or a file cannot be written.
    """
    folder = work.images_folder(split)
    _claim(folder, fingerprint)
    there = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(folder)}
    missing = []
    for one in wanted:
        # Patches from before the image was last changed, or put there, are of another image.
        since = _changed(one.image.path)
        patches = tuple((name, patch) for name, patch in one.patches if there.get(name, -1) < since)
        if patches:
            missing.append(ImagePatches(one.image, patches))
    turned = _check_sizes(work, split, [one.image for one in missing])
    tasks = [_Task(one, folder, apply_exif, rules, quality) for one, apply_exif in zip(missing, turned, strict=True)]
    problems = [problem for problem in work.map_images(_cut, tasks, f"cutting {split}") if problem]
    _refuse(problems, "then run the same command again: it goes on from here")


def _claim(folder: Path, fingerprint: str) -> None:
    """Take what a stopped run left for ours only if it is of the same raw data; else begin anew."""
    note = folder.with_name(f".{folder.name}.patches")
    try:
        if note.is_file() and note.read_text(encoding="utf-8") == fingerprint:
            return
        note.unlink(missing_ok=True)
        if any(folder.iterdir()):
            shutil.rmtree(folder)
            folder.mkdir()
    except OSError as error:
        raise cannot_write(folder, error) from None
    write_whole(note, fingerprint.encode())


def _changed(path: Path) -> int:
    try:
        state = path.stat()
    except OSError as error:
        raise InputError(f"cannot read image {path}: {error.strerror or error}; restore it") from None
    return max(state.st_mtime_ns, state.st_ctime_ns)


def _check_sizes(work: Work, split: str, images: Sequence[RawImage]) -> list[bool]:
    """Whether each image is to be turned by its EXIF orientation.

    OpenCV, with which the original reads, turns images. Where boxes were drawn on the pixels as they are stored, the
    size in the JSON file tells it, and the image is not turned.
    """
    facts = check_images(
        [image.path for image in images],
        on_progress=lambda done, total: work.progress(f"checking {split}", done, total),
    )
    problems, turned = [], []
    for image, fact in zip(images, facts, strict=True):
        size = (image.width, image.height)
        if fact.what:
            why = "does not exist" if fact.what == MISSING else f"cannot be read ({fact.detail or fact.what})"
            problems.append(f"image {image.path} {why}")
        elif size not in (fact.shown_wh, fact.stored_wh):
            found = " x ".join(map(str, fact.shown_wh))
            problems.append(f"image {image.path} has {found} pixels, its JSON file says {size[0]} x {size[1]}")
        turned.append(size == fact.shown_wh)
    _refuse(problems, "put the images there as they were downloaded")
    return turned


def _refuse(problems: Sequence[str], remedy: str) -> None:
    if problems:
        more = f" ({len(problems) - 1} more images have problems)" if len(problems) > 1 else ""
        raise InputError(f"{problems[0]}{more}; {remedy}")


def _cut(task: _Task) -> str | None:
    """Write patches of one image; returns what is wrong with the image."""
    image = task.wanted.image
    try:
        whole = read_image(image.path, task.apply_exif)
    except ImageError as error:
        return str(error)
    if whole.size != (image.width, image.height):
        return f"image {image.path} was changed while it was cut; restore it"
    pixels = np.asarray(whole)
    for name, patch in task.wanted.patches:
        cut, place = Image.fromarray(cut_patch(pixels, patch, task.rules)), task.folder / name
        partial = partial_path(place)
        try:
            if place.suffix == ".png":
                cut.save(partial, format="PNG")
            else:  # colours at half the resolution, as OpenCV has it
                cut.save(partial, format="JPEG", quality=task.quality, subsampling="4:2:0")
            os.replace(partial, place)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise cannot_write(place, error) from None
    return None
