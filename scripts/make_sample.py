"""Make the embedded sample (`sample/`) from the PyPI wheel `deepforest` 2.1.0.

The wheel (MIT licence) carries airborne RGB images of the National Ecological Observatory Network with hand-drawn tree
crowns. This script takes it apart and writes COCO JSON files and JPEG images:

- `train.json`: overlapping tiles of the large Yellowstone image above its held-out strip, and of the whole second one;
- `val_strip.json`: the bottom rows of the large image, cut into pieces that do not overlap;
- `val_sites.json`: the two small images, which are other sites.

Two runs give the same bytes (the JPEG files as far as the same libjpeg is installed).

    python scripts/make_sample.py                      # fetches the wheel with pip
    python scripts/make_sample.py --wheel deepforest-2.1.0-py3-none-any.whl
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WHEEL_SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
LICENSE_MEMBER = "deepforest-2.1.0.dist-info/licenses/LICENSE"
LARGE = "2019_YELL_2_528000_4978000_image_crop2.png"
SECOND = "2019_YELL_2_541000_4977000_image_crop.png"
SITES = ("OSBS_029.png", "SOAP_061.png")
SHORT_NAMES = {LARGE: "yell_528000", SECOND: "yell_541000", SITES[0]: "osbs_029", SITES[1]: "soap_061"}

TILE_SIDES_PX = (448, 480, 512)
MIN_OVERLAP_PX = 64
STRIP_HEIGHT_PX = (448, 512)
STRIP_PIECES = 5
MIN_VISIBLE_RATIO = 0.5
JPEG_QUALITY = 90
MAX_SAMPLE_BYTES = 8_000_000


@dataclass(frozen=True)
class Source:
    """One image of the wheel with its crowns, (n, 4) xyxy in pixels."""

    name: str
    image: Image.Image
    boxes_xyxy: np.ndarray


@dataclass(frozen=True)
class Window:
    """A rectangle of a source image, in pixels."""

    x: int
    y: int
    width: int
    height: int


def read_source(wheel: zipfile.ZipFile, name: str) -> Source:
    """Read an image and its VOC file.

    VOC counts pixels from 1 and includes both corners (the crowns on the borders have xmin 1 and xmax equal to the
    width), so the box of pixels xmin..xmax spans xmin - 1 to xmax in continuous coordinates.
    """
    image = Image.open(io.BytesIO(wheel.read(f"deepforest/data/{name}"))).convert("RGB")
    tree = ElementTree.fromstring(wheel.read(f"deepforest/data/{Path(name).stem}.xml"))
    corners = [
        [float(node.findtext(f"bndbox/{key}", "nan")) for key in ("xmin", "ymin", "xmax", "ymax")]
        for node in tree.iter("object")
    ]
    return Source(name, image, np.array(corners) - [1.0, 1.0, 0.0, 0.0])


def tile_axis(length: int) -> tuple[int, list[int]]:
    """The tile side and the starts that cover `length`: fewest tiles first, then the smallest allowed side."""
    counts = {side: math.ceil((length - MIN_OVERLAP_PX) / (side - MIN_OVERLAP_PX)) for side in TILE_SIDES_PX}
    side = min(TILE_SIDES_PX, key=lambda candidate: (counts[candidate], candidate))
    last = counts[side] - 1
    return side, [round(index * (length - side) / last) for index in range(last + 1)]


def tile(width: int, height: int) -> list[Window]:
    """Overlapping windows over the top-left `width` x `height` pixels of an image, row by row."""
    tile_width, lefts = tile_axis(width)
    tile_height, tops = tile_axis(height)
    return [Window(left, top, tile_width, tile_height) for top in tops for left in lefts]


def strip_windows(source: Source) -> list[Window]:
    """The held-out strip at the bottom of the image in `STRIP_PIECES` pieces.

    A cut through a crown spoils it as ground truth, so the strip's first row and the columns of the cuts are those
    that cut the fewest crowns; among equals the one nearest to the even division (the tallest strip) is taken.
    """
    width, height = source.image.size
    boxes = source.boxes_xyxy

    def num_cut(axis: int, position: int) -> int:
        return int(((boxes[:, axis] < position) & (position < boxes[:, axis + 2])).sum())

    low, high = STRIP_HEIGHT_PX
    top = min(range(height - high, height - low + 1), key=lambda y: (num_cut(1, y), y))
    boxes = boxes[boxes[:, 3] > top]
    cuts = [0]
    for index in range(1, STRIP_PIECES):
        even = round(index * width / STRIP_PIECES)
        cuts.append(min(range(even - 26, even + 27), key=lambda x: (num_cut(0, x), abs(x - even), x)))
    cuts.append(width)
    return [Window(left, top, right - left, height - top) for left, right in zip(cuts, cuts[1:], strict=False)]


def crowns_in(source: Source, window: Window) -> list[tuple[int, list[float]]]:
    """(index in the source's VOC file, clipped xywh in the window) of the crowns that are at least half inside."""
    corner = np.array([window.x, window.y, window.x, window.y])
    limit = np.array([window.width, window.height, window.width, window.height])
    boxes = source.boxes_xyxy - corner
    clipped = boxes.clip(0, limit)
    visible = (clipped[:, 2:] - clipped[:, :2]).prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return [
        (int(index), [float(x1), float(y1), float(x2 - x1), float(y2 - y1)])
        for index in np.flatnonzero(visible >= MIN_VISIBLE_RATIO)
        for x1, y1, x2, y2 in [clipped[index]]
    ]


def write_split(
    output: Path, json_name: str, folder: str, description: str, parts: list[tuple[Source, list[Window]]]
) -> None:
    """Write one COCO JSON and the JPEG files of its windows."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (output / folder).mkdir(parents=True, exist_ok=True)
    for source, windows in parts:
        for window in windows:
            stem = SHORT_NAMES[source.name]
            whole = (window.width, window.height) == source.image.size
            name = f"{folder}/{stem}.jpg" if whole else f"{folder}/{stem}_y{window.y:04d}_x{window.x:04d}.jpg"
            piece = source.image.crop((window.x, window.y, window.x + window.width, window.y + window.height))
            piece.save(output / name, "JPEG", quality=JPEG_QUALITY, optimize=True, progressive=True)
            images.append(
                {
                    "id": len(images) + 1,
                    "file_name": name,
                    "width": window.width,
                    "height": window.height,
                    "source": source.name,
                    "source_offset_xy": [window.x, window.y],
                }
            )
            for index, box in crowns_in(source, window):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": len(images),
                        "category_id": 1,
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                        "source_index": index,
                    }
                )
    info = {
        "description": description,
        "source": "PyPI package deepforest 2.1.0 (https://pypi.org/project/deepforest/2.1.0/)",
        "contributor": "Images: Airborne Observation Platform of the National Ecological Observatory Network (NEON). "
        "Annotations: Ben Weinstein and the DeepForest / NeonTreeEvaluation authors.",
        "license": "MIT, Copyright (c) 2019, Ben Weinstein (see LICENSE)",
        "made_by": "scripts/make_sample.py",
        "changes": f"PNG cut into windows and saved as JPEG (quality {JPEG_QUALITY}); all classes became 'Tree'; "
        "crowns cut by a window's border are clipped, and dropped when less than "
        f"{MIN_VISIBLE_RATIO:.0%} of their area is left.",
    }
    document = {
        "info": info,
        "licenses": [{"id": 1, "name": "MIT", "url": "https://opensource.org/license/mit"}],
        "categories": [{"id": 1, "name": "Tree"}],
        "images": images,
        "annotations": annotations,
    }
    # One record a line: readable, and differences stay small.
    lines = ["{"]
    for key, value in document.items():
        if key in ("images", "annotations"):
            rows = ",\n".join(json.dumps(row) for row in value)
            lines.append(f'"{key}": [\n{rows}\n]' + ("," if key != "annotations" else ""))
        else:
            lines.append(f'"{key}": {json.dumps(value, indent=1)},')
    (output / json_name).write_text("\n".join([*lines, "}"]) + "\n", encoding="utf-8")
    print(f"{json_name}: {len(images)} images, {len(annotations)} crowns")


def make_sample(wheel_path: Path, output: Path) -> None:
    """Write the whole sample into `output`, whose earlier images are removed first.

    Raises:
        SystemExit: the file is not the wheel this sample is defined on, or the sample became too large.
    """
    if hashlib.sha256(wheel_path.read_bytes()).hexdigest() != WHEEL_SHA256:
        raise SystemExit(f"{wheel_path} is not the published wheel of deepforest 2.1.0; fetch that one from PyPI")
    for folder in ("train", "val"):
        shutil.rmtree(output / folder, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel_path) as wheel:
        large, second, *sites = (read_source(wheel, name) for name in (LARGE, SECOND, *SITES))
        (output / "LICENSE").write_bytes(wheel.read(LICENSE_MEMBER))
    strip = strip_windows(large)
    train = [(large, tile(large.image.width, strip[0].y)), (second, tile(*second.image.size))]
    whole = [(site, [Window(0, 0, *site.image.size)]) for site in sites]
    write_split(output, "train.json", "train", "Tree crowns, Yellowstone (YELL): training tiles", train)
    write_split(output, "val_strip.json", "val", "Tree crowns, Yellowstone (YELL): held-out strip", [(large, strip)])
    write_split(output, "val_sites.json", "val", "Tree crowns, other sites: Ordway-Swisher, Soaproot Saddle", whole)
    num_bytes = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: {num_bytes / 1e6:.2f} MB")
    if num_bytes > MAX_SAMPLE_BYTES:
        raise SystemExit(f"the sample has {num_bytes} bytes, more than {MAX_SAMPLE_BYTES}: lower JPEG_QUALITY")


def fetch_wheel(folder: Path) -> Path:
    """Download the wheel from PyPI with pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), "deepforest==2.1.0"]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit("pip could not fetch deepforest 2.1.0; give the wheel's path with --wheel")
    return next(folder.glob("deepforest-2.1.0-*.whl"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the embedded sample from the wheel of deepforest 2.1.0.")
    parser.add_argument("--wheel", type=Path, help="path of the wheel; without it pip downloads it")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent / "sample")
    arguments = parser.parse_args()
    if arguments.wheel is not None and not arguments.wheel.is_file():
        raise SystemExit(f"{arguments.wheel} does not exist; give the path of deepforest-2.1.0-py3-none-any.whl")
    with tempfile.TemporaryDirectory() as folder:
        make_sample(arguments.wheel or fetch_wheel(Path(folder)), arguments.output)


if __name__ == "__main__":
    main()
