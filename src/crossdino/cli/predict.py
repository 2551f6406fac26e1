"""`crossdino predict`: the images that are meant, their detections, and the pictures of them."""

from __future__ import annotations

import argparse
import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdino.cli.output import choose_device, make_console, report_mistake, write_json
from crossdino.errors import InputError

if TYPE_CHECKING:
    from PIL import Image


def run_predict(options: argparse.Namespace) -> int:
    """Detect, draw and write; an image that cannot be read is told and left out."""
    paths, missing = expand_images(options.images)
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; name a folder")
    if Path(options.json).name != options.json:
        raise InputError(f"--json {options.json} must be a plain file name: it is written into --output")
    names = picture_names(paths)
    sources = {path.resolve() for path in paths}
    for name in (*names, options.json):
        if (output / name).resolve() in sources:
            raise InputError(f"{output / name} is one of the images and would be overwritten; choose another --output")

    from crossdino.checkpoints import find_model, load_model, read_model_config
    from crossdino.predictor import Predictor, detections_to_coco, to_pil_image
    from crossdino.visualization import draw_detections

    folder = find_model(options.weights)
    model = load_model(folder, device=choose_device(options.device))
    class_names = model.config.class_names
    category_ids = read_model_config(folder).get("category_ids") or list(range(1, len(class_names) + 1))
    predictor = Predictor(
        model,
        threshold=options.threshold,
        num_select=options.num_select,
        short_side=options.short_side,
        long_side=options.long_side,
        tile_size=options.tile_size,
        tile_overlap=options.tile_overlap,
    )
    console = make_console()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    failures = list(missing)
    for path, name in zip(paths, names, strict=True):
        try:
            image = to_pil_image(path)
        except InputError as error:
            failures.append(str(error))
            continue
        detections = predictor(image)
        image_id = len(images) + 1
        images.append(
            {"id": image_id, "file_name": str(path), "width": image.width, "height": image.height, "picture": name}
        )
        for found in detections_to_coco(detections, image_id, category_ids):
            area = found["bbox"][2] * found["bbox"][3]  # type: ignore[index]
            annotations.append({"id": len(annotations) + 1, **found, "area": area, "iscrowd": 0})
        output.mkdir(parents=True, exist_ok=True)
        _write_picture(output / name, draw_detections(image, detections))
        console.print(f"{path}: {len(detections)} objects", soft_wrap=True, markup=False)
    if images:
        categories = [
            {"id": category_id, "name": name} for category_id, name in zip(category_ids, class_names, strict=True)
        ]
        write_json(output / options.json, {"images": images, "categories": categories, "annotations": annotations})
        console.print(
            f"{len(annotations)} objects with a score of at least {options.threshold:g} in {len(images)} images: "
            f"{output / options.json}, pictures beside it",
            soft_wrap=True,
            markup=False,
        )
    for failure in failures:
        report_mistake(failure)
    return 2 if failures else 0


def expand_images(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The image files that files, folders and glob patterns stand for, each once, in their order.

    Returns:
        The files, and one message for each word that stands for nothing.

    Raises:
        InputError: if nothing is found at all.
    """
    from crossdino.data.images import IMAGE_SUFFIXES

    paths: dict[Path, None] = {}
    missing: list[str] = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            found = sorted(item for item in path.iterdir() if item.suffix.lower() in IMAGE_SUFFIXES and item.is_file())
            problem = f"folder {word} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})"
        elif path.is_file():
            found, problem = [path], ""
        else:
            found = [Path(name) for name in sorted(glob.glob(word, recursive=True)) if Path(name).is_file()]
            problem = f"no image {word}; check the name"
        if not found:
            missing.append(problem)
        paths |= dict.fromkeys(found)
    if not paths:
        raise InputError("; ".join(missing))
    return list(paths), missing


def picture_names(paths: Sequence[Path]) -> list[str]:
    """A file name for the picture of each image; images of the same name get a number, so that none is lost."""
    taken: set[str] = set()
    names = []
    for path in paths:
        name, number = f"{path.stem}.jpg", 1
        while name.lower() in taken:  # some file systems do not tell A.jpg from a.jpg
            number += 1
            name = f"{path.stem}_{number}.jpg"
        taken.add(name.lower())
        names.append(name)
    return names


def _write_picture(path: Path, picture: Image.Image) -> None:
    from crossdino.checkpoints import written_whole

    with written_whole(path) as partial:
        picture.save(partial, format="JPEG", quality=92)
