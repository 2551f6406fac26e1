"""The embedded sample keeps what its README promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crossdino.data.coco import load_coco

SAMPLE = Path(__file__).resolve().parents[2] / "sample"
LARGE = "2019_YELL_2_528000_4978000_image_crop2.png"
SECOND = "2019_YELL_2_541000_4977000_image_crop.png"
COUNTS = {"train": (34, 1032), "val_strip": (5, 113), "val_sites": (2, 98)}


def read(name: str) -> dict[str, Any]:
    return json.loads((SAMPLE / f"{name}.json").read_text(encoding="utf-8"))


def crowns(document: dict[str, Any]) -> dict[tuple[str, int], list[list[float]]]:
    """(source image, crown there) -> its boxes as xyxy in the source's pixels."""
    images = {image["id"]: image for image in document["images"]}
    found: dict[tuple[str, int], list[list[float]]] = {}
    for entry in document["annotations"]:
        image = images[entry["image_id"]]
        left, top = image["source_offset_xy"]
        x, y, width, height = entry["bbox"]
        box = [left + x, top + y, left + x + width, top + y + height]
        found.setdefault((image["source"], entry["source_index"]), []).append(box)
    return found


def coverage(document: dict[str, Any], source: str) -> np.ndarray:
    """How many images show each pixel of the source (large enough for all of them)."""
    count = np.zeros((2472, 2299), dtype=np.int64)
    for image in document["images"]:
        if image["source"] == source:
            left, top = image["source_offset_xy"]
            count[top : top + image["height"], left : left + image["width"]] += 1
    return count


@pytest.mark.parametrize("name", list(COUNTS))
def test_counts_and_boxes(name: str) -> None:
    index, document = load_coco(SAMPLE / f"{name}.json"), read(name)
    assert (len(index.records), index.num_objects) == COUNTS[name]
    assert index.class_names == ("Tree",) and index.category_ids == (1,)
    assert not index.problems  # in particular: every box within its image
    for key in ("images", "annotations"):
        assert [entry["id"] for entry in document[key]] == list(range(1, len(document[key]) + 1))
    assert all(entry["area"] == entry["bbox"][2] * entry["bbox"][3] for entry in document["annotations"])
    assert "MIT" in document["info"]["license"] and "deepforest 2.1.0" in document["info"]["source"]


def test_no_pixel_shared() -> None:
    train, strip = read("train"), read("val_strip")
    seen, held_out = coverage(train, LARGE), coverage(strip, LARGE)
    assert not (seen.astype(bool) & held_out.astype(bool)).any()
    assert ((seen > 0) | (held_out > 0)).all()  # and nothing is forgotten
    assert held_out.max() == 1  # the strip's pieces do not overlap
    second = coverage(train, SECOND)
    assert (second[:1035, :1249] > 0).all() and second.sum() == second[:1035, :1249].sum()
    sources = {image["source"] for image in read("val_sites")["images"]}
    assert sources == {"OSBS_029.png", "SOAP_061.png"}
    assert all(image["source"] == LARGE for image in strip["images"])


def test_tile_sizes() -> None:
    for image in read("train")["images"]:
        assert image["width"] in (448, 480, 512) and image["height"] in (448, 480, 512)
    for image in read("val_strip")["images"]:
        assert 440 <= image["width"] <= 512 and 448 <= image["height"] <= 512


def test_every_crown_is_somewhere_once_or_more() -> None:
    """574 crowns of the large image and 279 of the second; the strip's pieces hold each of theirs once."""
    train, strip = crowns(read("train")), crowns(read("val_strip"))
    assert all(len(boxes) == 1 for boxes in strip.values())
    large = {key for key in (*train, *strip) if key[0] == LARGE}
    assert large == {(LARGE, crown) for crown in range(574)}
    assert {key for key in train if key[0] == SECOND} == {(SECOND, crown) for crown in range(279)}
    assert not train.keys() & strip.keys()  # none is half here and half there


def test_boxes_in_overlaps_agree() -> None:
    """A crown that is whole in several tiles has one place in the source image; clipped copies lie within it."""
    for boxes in crowns(read("train")).values():
        table = np.array(boxes)
        union = np.concatenate([table[:, :2].min(0), table[:, 2:].max(0)])
        areas = (table[:, 2:] - table[:, :2]).prod(1)
        assert areas.min() >= 0.49 * (union[2:] - union[:2]).prod()


def test_overlapping_tiles_show_the_same_pixels() -> None:
    """The offsets are right: overlapping parts differ by JPEG noise only."""
    images = [image for image in read("train")["images"] if image["source"] == SECOND]
    first, second = images[0], images[1]
    shift = second["source_offset_xy"][0] - first["source_offset_xy"][0]
    a = np.asarray(Image.open(SAMPLE / first["file_name"]), dtype=np.float64)[:, shift:]
    b = np.asarray(Image.open(SAMPLE / second["file_name"]), dtype=np.float64)[:, : a.shape[1]]
    assert np.abs(a - b).mean() < 6.0  # measured 3.5; 1 px of shift gives 16
    assert np.abs(a[:, 1:] - b[:, :-1]).mean() > 10.0


def test_size_and_licence() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) <= 8_000_000
    assert "Copyright (c) 2019, Ben Weinstein" in (SAMPLE / "LICENSE").read_text()
    listed = {image["file_name"] for name in COUNTS for image in read(name)["images"]}
    assert listed == {str(path.relative_to(SAMPLE)) for path in SAMPLE.rglob("*.jpg")}
