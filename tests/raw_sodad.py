"""A small SODA-D in the raw layout: `Images/*.jpg`, and `Annotations/train.json`, `val.json` and `test.json`.

Each rule of the preparation meets a case: images of several patches, narrower than a patch, of exactly one patch and
of one pixel more; training images with nothing annotated in their right and lower parts; images with ignore regions
only and without any annotation; ignore regions with objects in and across them; boxes on the borders of patches, beyond
those of the image, with fractions, and cut to 0.4 of themselves by a patch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

NAMES = (
    "people", "rider", "bicycle", "motor", "vehicle", "traffic-sign", "traffic-light", "traffic-camera", "warning-cone",
    "ignore",
)  # fmt: skip
REGION = 10

Box = list[float]
# Size of an image, and (category, x, y, width, height) of boxes that are not random.
_Plan = tuple[tuple[int, int], int, list[tuple[int, Box]]]


def _on_borders(start: int) -> list[tuple[int, Box]]:
    """Objects on the border at which the second patch begins, and on the one at which the first ends (800)."""
    return [
        (5, [start - 6, 100, 10, 10]),  # 4 of 10 px lie in the second patch: exactly 0.4
        (6, [start - 15, 120, 25, 8]),  # 10 of 25, also 0.4
        (7, [start - 5, 140, 10, 10]),
        (1, [start - 10, 210, 10, 12]),  # ends where the patch begins
        (2, [start, 220, 10, 12]),
        (3, [790, 240, 10, 10]),
        (4, [800, 260, 10, 10]),
    ]


_IN_REGIONS: list[tuple[int, Box]] = [
    (REGION, [300, 300, 120, 90]),
    (5, [320, 320, 30, 20]),
    (1, [405, 330, 40, 25]),  # half of it outside
    (REGION, [380, 350, 60, 80]),  # two regions that overlap
    (REGION, [700.5, 30.7, 55.6, 40.9]),
    (8, [710.4, 40.6, 20.3, 12.2]),
]

_SPLITS: dict[str, list[_Plan]] = {
    "train": [
        ((1000, 820), 8, [*_on_borders(200), *_IN_REGIONS, (9, [970, 790, 25, 25])]),
        ((1300, 900), 5, [(9, [500, 400, 22, 30]), (2, [10, 20, 16, 16])]),  # nothing beyond 700 x 500
        ((500, 400), 6, [(3, [480, 380, 60, 60])]),  # leaves the image
        ((820, 600), 0, [(REGION, [100, 100, 50, 60])]),
        ((300, 300), 0, []),
    ],
    "val": [((801, 800), 6, _IN_REGIONS[:3]), ((640, 700), 4, []), ((320, 240), 0, [])],
    "test": [
        ((1451, 1000), 10, [*_on_borders(650), *_IN_REGIONS, (6, [1440, 990, 40, 40]), (6, [-10, -5, 30, 30])]),
        ((800, 800), 6, [(REGION, [0, 0, 800, 120])]),
        ((400, 300), 0, [(REGION, [100, 100, 50, 60])]),
        ((240, 320), 0, []),
    ],
}


def make_sodad(folder: Path, seed: int = 0) -> Path:
    """Write the data set; the same files for the same seed.

    Args:
        folder: is made; `Images` and `Annotations` are written into it.
        seed: of colours and random boxes.

    Returns:
        The folder, the SOURCE of `crossdino prepare sodad SOURCE`.
    """
    rng = np.random.default_rng(seed)
    for name in ("Images", "Annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    number = 0
    for split, plans in _SPLITS.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for (width, height), num_random, boxes in plans:
            number += 1
            name = f"{number:05d}.jpg"
            far = (0.5, 0.5) if (width, height) == (1300, 900) else (1.0, 1.0)
            drawn = [*boxes, *(_random_box(rng, width * far[0], height * far[1]) for _ in range(num_random))]
            images.append({"id": number, "file_name": name, "width": width, "height": height})
            for category, box in drawn:
                annotations.append(
                    {
                        "id": len(annotations) + (split != "test"),  # from 0 in one of the files
                        "image_id": number,
                        "category_id": category,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                        "ignore": int(category == REGION),
                    }
                )
            _draw(rng, width, height, drawn).save(folder / "Images" / name, quality=90)
        document = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in enumerate(NAMES, start=1)],
        }
        (folder / "Annotations" / f"{split}.json").write_text(json.dumps(document))
    return folder


def _random_box(rng: np.random.Generator, width: float, height: float) -> tuple[int, Box]:
    sides = rng.integers(8, 40, 2)
    corner = rng.integers(0, [int(width) - 40, int(height) - 40])
    return int(rng.integers(1, REGION)), [*corner.tolist(), *sides.tolist()]


def _draw(rng: np.random.Generator, width: int, height: int, boxes: list[tuple[int, Box]]) -> Image.Image:
    """Soft noise without black, and each object in the colour of its category."""
    coarse = rng.integers(60, 200, (height // 16 + 2, width // 16 + 2, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for category, (x, y, box_width, box_height) in boxes:
        if category != REGION:
            colour = (25 * category, 255 - 20 * category, (97 * category) % 256)
            draw.rectangle((x, y, x + box_width - 1, y + box_height - 1), fill=colour)
    return image
