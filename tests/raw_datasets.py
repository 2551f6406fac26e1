"""Small made-up data sets in the benchmarks' own raw formats, with real JPEG and PNG files.

Every maker draws the same for the same seed: noise with a coloured rectangle where an object is. The objects cover the
rules of the formats (ignored regions, other labels, crowds, trailing commas, ...), in training and evaluation splits.
Boxes lie within their images and have sides of 4 px and more, so that all that is prepared of them by the default rules
can be trained on as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

from crossdino.benchmarks import BENCHMARKS

Drawn = tuple[int, list[int]]  # category, x y width height


def draw(path: Path, size_wh: tuple[int, int], objects: list[Drawn], rng: Generator) -> None:
    """An image with a rectangle for each object, coloured by its category."""
    width, height = size_wh
    pixels = rng.integers(60, 90, (height, width, 3)).astype(np.uint8)
    for category, (x, y, w, h) in objects:
        pixels[y : y + h, x : x + w] = ((category * 53) % 200 + 55, (category * 97) % 256, (category * 151) % 256)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def place_objects(
    rng: Generator, size_wh: tuple[int, int], categories: list[int], sides: tuple[int, int]
) -> list[Drawn]:
    """A box within the image for each category, with whole numbers."""
    found: list[Drawn] = []
    for category in categories:
        w, h = (int(side) for side in rng.integers(*sides, 2))
        x, y = int(rng.integers(0, size_wh[0] - w + 1)), int(rng.integers(0, size_wh[1] - h + 1))
        found.append((category, [x, y, w, h]))
    return found


def make_visdrone(folder: Path, seed: int = 0, images: Mapping[str, int] | None = None) -> Path:
    """VisDrone2019-DET-train, -val and -test-dev, with categories 0 to 11 and scores 0 and 1.

    Args:
        folder: that is made and returned, the SOURCE of `crossdino prepare visdrone`.
        seed: of the numbers and pixels.
        images: split -> number of images; None: train 4, val 2, test-dev 2.
    """
    rng = np.random.default_rng(seed)
    for split, number in (images or {"train": 4, "val": 2, "test-dev": 2}).items():
        root = folder / f"VisDrone2019-DET-{split}"
        (root / "annotations").mkdir(parents=True)
        for position in range(number):
            name = f"{9999900 + position:07d}_{int(rng.integers(1000)):05d}_d_{position:07d}"
            size = (int(rng.integers(100, 161)), int(rng.integers(96, 130)))
            # Every class, and now and then an ignored region, one of "others", and an object that is not considered.
            categories = [int(c) for c in rng.permutation(np.arange(1, 11))] + [0] * (position % 2 == 0) + [11]
            objects = place_objects(rng, size, categories, (4, 28))
            lines = []
            for place, (category, box) in enumerate(objects):
                score = 0 if category == 0 or (category == 4 and position % 2) else 1
                occlusion, truncation = int(rng.integers(3)), int(rng.integers(2))
                comma = "," if place % 3 == 2 else ""
                lines.append(",".join(map(str, [*box, score, category, truncation, occlusion])) + comma)
            ending = "\r\n" if position % 2 else "\n"
            text = ending.join(lines) + ending
            (root / "annotations" / f"{name}.txt").write_text(text, newline="", encoding="utf-8")
            draw(root / "images" / f"{name}.jpg", size, objects, rng)
    return folder


def make_aitod(folder: Path, seed: int = 0, images: Mapping[str, int] | None = None, naming: str = "aitod") -> Path:
    """AI-TOD's trainval and test, ids from 0 as its tool writes them.

    Args:
        folder: that is made and returned.
        seed: of the numbers and pixels.
        images: split -> number of images; None: trainval 4, test 2.
        naming: `aitod` (annotations/aitod_SPLIT_v1.json, images/SPLIT) or `small` (annotations/small_SPLIT_v1_1.0.json,
            SPLIT/images).
    """
    rng = np.random.default_rng(seed)
    categories = [{"id": key, "name": name} for key, name in BENCHMARKS["aitod"].categories.items()]
    for split, number in (images or {"trainval": 4, "test": 2}).items():
        place = folder / "images" / split if naming == "aitod" else folder / split / "images"
        document: dict[str, Any] = {"info": {}, "images": [], "annotations": [], "categories": categories}
        for image_id in range(number):
            objects = place_objects(rng, (128, 128), [int(c) for c in rng.permutation(np.arange(1, 9))], (4, 20))
            objects = [] if number > 3 and image_id == number - 1 else objects
            file_name = f"{split}_{image_id}__{int(rng.integers(1000))}_0.png"
            document["images"].append({"id": image_id, "file_name": file_name, "width": 128, "height": 128})
            document["annotations"] += [
                {
                    "id": len(document["annotations"]) + place_in_image,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [float(value) for value in box],
                    "area": float(box[2] * box[3]),
                    "segmentation": [[0.0] * 8],
                    "iscrowd": 0,
                }
                for place_in_image, (category, box) in enumerate(objects)
            ]
            draw(place / file_name, (128, 128), objects, rng)
        name = f"aitod_{split}_v1.json" if naming == "aitod" else f"small_{split}_v1_1.0.json"
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        (folder / "annotations" / name).write_text(json.dumps(document))
    return folder


def make_widerperson(folder: Path, seed: int = 0, images: Mapping[str, int] | None = None) -> Path:
    """WiderPerson with all five labels; the last training image has no pedestrian, the last one of val no line.

    Args:
        folder: that is made and returned.
        seed: of the numbers and pixels.
        images: split -> number of images; None: train 5, val 3, test 1 (without annotations).
    """
    rng = np.random.default_rng(seed)
    (folder / "Annotations").mkdir(parents=True)
    numbers = images or {"train": 5, "val": 3, "test": 1}
    stems = iter(rng.permutation(np.arange(1, sum(numbers.values()) + 1)))
    for split, number in numbers.items():
        names = [f"{int(next(stems)):06d}" for _ in range(number)]
        (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for position, name in enumerate(names):
            size = (int(rng.integers(110, 150)), int(rng.integers(96, 120)))
            labels = [1, 1, 1, 2, 3, 4, 5] if position < number - 1 else [2, 3] if split == "train" else []
            objects = place_objects(rng, size, labels, (5, 40))
            draw(folder / "Images" / f"{name}.jpg", size, objects, rng)
            if split == "test":
                continue
            lines = [str(len(objects))]
            lines += [f"{label} {x} {y} {x + w - 1} {y + h - 1}" for label, (x, y, w, h) in objects]
            (folder / "Annotations" / f"{name}.jpg.txt").write_text("\n".join(lines) + "\n")
    return folder


def make_coco(folder: Path, seed: int = 0, images: Mapping[str, int] | None = None) -> Path:
    """COCO's train2017 and val2017 with its 80 categories, crowds, polygons, and an image without annotations.

    Args:
        folder: that is made and returned.
        seed: of the numbers and pixels.
        images: split -> number of images; None: train2017 4, val2017 3.
    """
    rng = np.random.default_rng(seed)
    categories = [
        {"supercategory": "thing", "id": key, "name": name} for key, name in BENCHMARKS["coco"].categories.items()
    ]
    (folder / "annotations").mkdir(parents=True)
    for split, number in (images or {"train2017": 4, "val2017": 3}).items():
        document: dict[str, Any] = {"info": {"year": 2017}, "licenses": [], "images": [], "annotations": []}
        for position in range(number):
            image_id = 1000 * (position + 1) + int(rng.integers(1000))
            size = (int(rng.integers(100, 150)), int(rng.integers(96, 130)))
            chosen = [int(c) for c in rng.choice(list(BENCHMARKS["coco"].categories), 6, replace=False)]
            objects = [] if position == number - 1 else place_objects(rng, size, chosen, (6, 60))
            file_name = f"{image_id:012d}.jpg"
            document["images"].append(
                {"license": 1, "file_name": file_name, "height": size[1], "width": size[0], "id": image_id}
            )
            for place, (category, (x, y, w, h)) in enumerate(objects):
                document["annotations"].append(
                    {
                        "segmentation": [[x, y, x + w, y, x + w, y + h]],
                        "area": w * h / 2,
                        "iscrowd": int(place == 5),
                        "image_id": image_id,
                        "bbox": [float(x), float(y), float(w), float(h)],
                        "category_id": category,
                        "id": 100 * image_id + place,
                    }
                )
            draw(folder / split / file_name, size, objects, rng)
        document["categories"] = categories
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    return folder
