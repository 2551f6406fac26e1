"""Tiles on disk against the tiles that an evaluation cuts as it reads, and runs that are stopped or go wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from crossdino.config import DataConfig
from crossdino.data import DetectionDataset, cutting, load_coco, load_dataset
from crossdino.data.cutting import CutSettings, cut_dataset
from crossdino.data.index import DatasetIndex
from crossdino.errors import InputError

SETTINGS = CutSettings(40, 8, keep=0.5)
SHOWN = DataConfig(test_short_side=40, test_long_side=40, num_workers=0, tile_keep=0.5)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Images of odd sizes in two folders, two of one name, one turned by EXIF; boxes of all kinds; ids with gaps."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "source"
    images, annotations = [], []
    sizes = {"a/one.png": (90, 130), "b/one.PNG": (30, 90), "a/two.jpg": (41, 39), "b/empty.png": (50, 60)}
    for number, (name, (height, width)) in enumerate(sizes.items(), start=1):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3)).astype(np.uint8))
        if name == "a/two.jpg":
            exif = Image.Exif()
            exif[0x0112] = 6
            image.save(folder / name, exif=exif)  # stored 39 wide; shown as 41 wide and 39 high
            height, width = width, height
        else:
            image.save(folder / name)
        images.append({"id": 10 * number, "file_name": name, "width": width, "height": height})
        for _ in range(0 if "empty" in name else 12):
            x, y = rng.uniform(0, width - 2), rng.uniform(0, height - 2)
            box = [x, y, *np.minimum(rng.uniform(1, 60, 2), [width - x, height - y]).tolist()]
            annotations.append(
                {
                    "id": 100 + len(annotations),
                    "image_id": 10 * number,
                    "category_id": int(rng.choice([3, 9])),
                    "bbox": box,
                    "area": 0.5 * box[2] * box[3],
                    "iscrowd": int(rng.random() < 0.2),
                }
            )
    categories = [{"id": 9, "name": "b"}, {"id": 3, "name": "a"}, {"id": 5, "name": "never"}]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "val.json").write_text(json.dumps(document))
    return folder / "val.json"


def count_cuts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that are cut from now on."""
    done: list[str] = []
    original = cutting._cut_image

    def counted(task: Any) -> Any:
        done.append(task[0].path.name)
        return original(task)

    monkeypatch.setattr(cutting, "_cut_image", counted)
    return done


def assert_same_items(index: DatasetIndex, folder: Path, settings: CutSettings) -> None:
    """Every tile in the folder against the one that is cut while reading."""
    data = dataclasses.replace(SHOWN, tile_size=settings.tile_size, tile_overlap=settings.tile_overlap)
    expected = DetectionDataset(index, data, train=False)
    found = DetectionDataset(load_dataset(folder, "val"), SHOWN, train=False)
    assert len(found) == len(expected)
    document = json.loads((folder / "val.json").read_text())
    for item, ((pixels, target), (wanted, truth)) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(pixels, wanted)
        for name in ("boxes_cxcywh", "labels", "ignored_boxes_cxcywh", "ignored_labels"):
            assert torch.equal(getattr(target, name), getattr(truth, name)), name
        image = document["images"][item]
        assert (image["source_id"], tuple(image["origin_xy"])) == (truth.image_id, truth.origin_xy)


def test_tiles_on_disk_are_those_of_an_evaluation(source: Path, tmp_path: Path) -> None:
    index = load_coco(source)
    result = cut_dataset(index, tmp_path / "out", "val", SETTINGS)
    assert_same_items(index, tmp_path / "out", SETTINGS)
    again = load_dataset(tmp_path / "out", "val")
    assert again.problems.counts == {"class without any box": 1}, "nothing had to be mended"
    assert (again.class_names, again.category_ids) == (index.class_names, index.category_ids)
    document = json.loads((tmp_path / "out" / "val.json").read_text())
    assert {image["source_file_name"] for image in document["images"]} == {
        image["file_name"] for image in json.loads(source.read_text())["images"]
    }
    assert [annotation["id"] for annotation in document["annotations"]] == list(range(1, result.num_objects + 1))
    assert result.num_tiles == len(document["images"]) == len(list((tmp_path / "out" / "val").iterdir()))
    assert result.num_ignored == sum(annotation["iscrowd"] for annotation in document["annotations"])
    # The area of the whole object was half its box, and so is that of each part.
    for one in document["annotations"]:
        assert one["area"] == pytest.approx(0.5 * one["bbox"][2] * one["bbox"][3])
    assert len(COCO(str(tmp_path / "out" / "val.json")).getImgIds()) == result.num_tiles


def test_several_processes_write_the_same(source: Path, tmp_path: Path) -> None:
    index = load_coco(source)
    one = cut_dataset(index, tmp_path / "one", "val", SETTINGS)
    seen: list[tuple[int, int]] = []
    two = cut_dataset(
        index, tmp_path / "two", "val", SETTINGS, num_processes=2, on_image=lambda *counts: seen.append(counts)
    )
    assert seen == [(done, 4) for done in range(5)]
    assert dataclasses.replace(one, annotations=two.annotations) == two
    files = [
        sorted(path.relative_to(folder) for path in folder.rglob("*"))
        for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert files[0] == files[1]
    for name in files[0]:
        if (tmp_path / "one" / name).is_file():
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_empty_tiles_are_left_out_by_their_share(source: Path, tmp_path: Path) -> None:
    index = load_coco(source)
    everything = cut_dataset(index, tmp_path / "all", "train", SETTINGS)
    full = everything.num_tiles - everything.num_empty
    assert everything.num_empty >= 4 and everything.num_left_out == 0
    for share, kept in ((0.0, 0), (2 / full, 2), (99.0, everything.num_empty)):
        result = cut_dataset(index, tmp_path / str(kept), "train", dataclasses.replace(SETTINGS, empty=share))
        assert (result.num_tiles, result.num_empty) == (full + kept, kept)
        assert result.num_left_out == everything.num_empty - kept
        assert load_dataset(tmp_path / str(kept), "train").num_objects == load_coco(everything.annotations).num_objects


def test_a_stopped_run_goes_on_and_cuts_nothing_twice(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, out = load_coco(source), tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_dataset(index, out, "val", SETTINGS, on_image=stop)
    assert not (out / "val.json").exists()
    # A tile that was being written, and one that was lost.
    (out / "val" / ".one_y00000_x00000.png.partial").write_bytes(b"half")
    done = count_cuts(monkeypatch)
    result = cut_dataset(index, out, "val", SETTINGS)
    assert done == ["two.jpg", "empty.png"] and result.num_cut_before == 2
    assert_same_items(index, out, SETTINGS)
    done.clear()
    assert cut_dataset(index, out, "val", SETTINGS).num_cut_before == 4 and done == []
    next((out / "val").glob("empty*")).unlink()
    cut_dataset(index, out, "val", SETTINGS)
    assert done == ["empty.png"]
    # An image that was replaced since.
    Image.new("RGB", (130, 90), (1, 2, 3)).save(index.records[0].path)
    cut_dataset(index, out, "val", SETTINGS)
    assert done == ["empty.png", "one.png"]
    assert_same_items(index, out, SETTINGS)


def test_other_settings_and_foreign_files_are_refused(source: Path, tmp_path: Path) -> None:
    index, out = load_coco(source), tmp_path / "out"
    cut_dataset(index, out, "val", SETTINGS)
    before = (out / "val.json").read_bytes()
    for change in ({"tile_size": 50}, {"tile_overlap": 9}, {"keep": 0.4}, {"empty": 0.25}, {"image_format": "jpg"}):
        (name,) = change
        with pytest.raises(InputError, match=rf"holds tiles cut with {name} .*, not .*choose another --output"):
            cut_dataset(index, out, "val", dataclasses.replace(SETTINGS, **change))
    fewer = dataclasses.replace(index, records=index.records[:3])
    with pytest.raises(InputError, match="holds tiles of other annotations"):
        cut_dataset(fewer, out, "val", SETTINGS)
    assert (out / "val.json").read_bytes() == before
    foreign = tmp_path / "foreign"
    (foreign / "val").mkdir(parents=True)
    (foreign / "val" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="is there already"):
        cut_dataset(index, foreign, "val", SETTINGS)
    for change, word in (({"keep": 1.5}, "keep"), ({"empty": -1.0}, "empty"), ({"quality": 0}, "quality")):
        with pytest.raises(InputError, match=f"--{word} is"):
            cut_dataset(index, tmp_path / "new", "val", dataclasses.replace(SETTINGS, **change))
    with pytest.raises(InputError, match="cannot overlap"):
        cut_dataset(index, tmp_path / "new", "val", dataclasses.replace(SETTINGS, tile_overlap=40))
    assert not (tmp_path / "new").exists()


def test_broken_images_are_left_out_and_told(source: Path, tmp_path: Path) -> None:
    index, out = load_coco(source), tmp_path / "out"
    path = index.records[0].path
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    result = cut_dataset(index, out, "val", SETTINGS)
    assert len(result.broken) == 1 and str(path) in result.broken[0] and result.num_images == 3
    assert {image["source_id"] for image in json.loads((out / "val.json").read_text())["images"]} == {20, 30, 40}
    path.write_bytes(good)
    result = cut_dataset(index, out, "val", SETTINGS)
    assert result.broken == () and result.num_cut_before == 3
    assert_same_items(index, out, SETTINGS)


def test_a_full_disk_is_one_line_and_leaves_no_half_tile(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, out = load_coco(source), tmp_path / "out"
    original, written = Image.Image.save, []

    def save(self: Image.Image, path: Path, **options: Any) -> None:
        written.append(path)
        if len(written) == 3:
            path.write_bytes(b"the beginning")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(InputError, match=r"cannot write .*: No space left on device; free some space and run the same"):
        cut_dataset(index, out, "val", SETTINGS)
    assert len(list((out / "val").iterdir())) == 2 and not (out / "val.json").exists()
    cut_dataset(index, out, "val", SETTINGS)
    assert_same_items(index, out, SETTINGS)


def test_jpeg_tiles_are_close_to_the_pixels(tmp_path: Path) -> None:
    y, x = np.mgrid[:60, :70]
    pixels = np.stack([2 * y, 3 * x, y + x], 2).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "smooth.png")
    document = {
        "images": [{"id": 1, "file_name": "smooth.png", "width": 70, "height": 60}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}],
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "x.json").write_text(json.dumps(document))
    settings = dataclasses.replace(SETTINGS, image_format="jpg", quality=98)
    result = cut_dataset(load_coco(tmp_path / "x.json"), tmp_path / "out", "x", settings)
    image = json.loads(result.annotations.read_text())["images"][-1]
    assert image["file_name"] == "x/smooth_y00020_x00030.jpg"
    with Image.open(tmp_path / "out" / image["file_name"]) as file:
        difference = np.abs(np.asarray(file).astype(int) - pixels[20:60, 30:70])
    assert file.size == (40, 40) and difference.mean() < 2  # rounding of JPEG at this quality


def test_long_and_foreign_names_become_files(tmp_path: Path) -> None:
    names = ["ü" * 120 + ".png", "A.png", "a.png", "a_2.png"]
    images = []
    for number, name in enumerate(names, start=1):
        folder = tmp_path / str(number)
        folder.mkdir()
        Image.new("RGB", (10, 10), (number, 0, 0)).save(folder / name)
        images.append({"id": number, "file_name": f"{number}/{name}", "width": 10, "height": 10})
    document = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "x.json").write_text(json.dumps(document))
    index = load_coco(tmp_path / "x.json")
    cut_dataset(index, tmp_path / "out", "x", SETTINGS)
    found = load_coco(tmp_path / "out" / "x.json")
    lower = {record.path.name.lower() for record in found.records}
    assert len(lower) == 4, "one on file systems that do not tell a from A"
    for number, record in enumerate(found.records, start=1):
        with Image.open(record.path) as file:
            assert file.getpixel((0, 0)) == (number, 0, 0) and file.getpixel((39, 39)) == (0, 0, 0)


def test_images_of_which_no_tile_is_wanted_were_not_cut_before(source: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, empty=0.0)
    first, second = (cut_dataset(load_coco(source), tmp_path / "out", "val", settings) for _ in range(2))
    assert (first.num_images, first.num_cut_before) == (4, 0)
    assert (second.num_images, second.num_cut_before) == (4, 3), "one image is empty"
