"""COCO and AI-TOD, which come as COCO files: what is kept, what is numbered anew, and where things are found."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO

from crossdino.data import load_dataset
from crossdino.errors import InputError
from crossdino.preparation import prepare_benchmark
from tests.raw_datasets import make_aitod, make_coco


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**read(path), **values}))


KEPT = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")


def test_coco_stays_as_it_is(tmp_path: Path) -> None:
    source = make_coco(tmp_path / "raw", seed=1)
    prepared = prepare_benchmark("coco", source, tmp_path / "out")
    for split in ("train2017", "val2017"):
        raw, found = (
            read(f)
            for f in (source / f"annotations/instances_{split}.json", tmp_path / f"out/annotations/{split}.json")
        )
        assert found["annotations"] == [{key: entry[key] for key in KEPT} for entry in raw["annotations"]]
        assert found["categories"] == raw["categories"]
        keys = ("id", "file_name", "width", "height")
        assert found["images"] == [{key: entry[key] for key in keys} for entry in raw["images"]]
        assert (tmp_path / "out/images" / split).resolve() == source / split
        with_objects = {entry["image_id"] for entry in found["annotations"]}
        assert len(with_objects) == len(found["images"]) - 1, "an image without annotations is kept"
    assert prepared.description["roles"] == {"train": "train2017", "val": "val2017"}
    entry = prepared.description["splits"]["val2017"]
    assert (entry["num_objects"], entry["num_ignored"]) == (10, 2)
    assert [(c["found"], c["published"]) for c in entry["checks"]] == [(3, 5000), (12, 36781)], (
        "crowds are published too"
    )
    COCO(str(tmp_path / "out/annotations/val2017.json"))  # pycocotools reads it
    assert load_dataset(tmp_path / "out", "val").num_objects == 10


def test_coco_annotation_id_0_is_replaced(tmp_path: Path) -> None:
    source = make_coco(tmp_path / "raw")
    path = source / "annotations" / "instances_val2017.json"
    annotations = read(path)["annotations"]
    annotations[2]["id"] = 0
    change(path, annotations=annotations)
    prepared = prepare_benchmark("coco", source, tmp_path / "out", splits=["val"])
    before = [entry["id"] for entry in annotations]
    after = [entry["id"] for entry in read(tmp_path / "out/annotations/val2017.json")["annotations"]]
    assert after[2] == max(before) + 1
    assert after[:2] + after[3:] == before[:2] + before[3:]
    note = f"the annotation with the id 0 has the id {after[2]} now: 0 counts as never matched"
    assert prepared.description["splits"]["val2017"]["notes"] == [note]


def test_coco_missing_images_and_wrong_files(tmp_path: Path) -> None:
    source = make_coco(tmp_path / "raw")
    names = sorted(path.name for path in (source / "val2017").iterdir())
    (source / "val2017" / names[1]).unlink()
    (source / "val2017" / names[2]).unlink()
    with pytest.raises(InputError, match=rf"image {names[1]} is missing, as are 1 more of 3; looked in val2017 of"):
        prepare_benchmark("coco", source, tmp_path / "out")
    prepare_benchmark("coco", source, tmp_path / "no images", images="none")
    assert load_dataset(tmp_path / "no images", "val", require_images=False).num_objects == 10
    path = source / "annotations" / "instances_train2017.json"
    good = read(path)
    bad: list[tuple[Any, str]] = [
        ({**good, "categories": good["categories"][1:]}, r"category 1 is None, but 'person' in COCO 2017"),
        ([1, 2], r"has no list 'images' of objects"),
        ({**good, "images": good["images"] * 2}, "an image id is used twice"),
        (
            {**good, "images": [*good["images"], {**good["images"][0], "id": 7}]},
            rf"lists the image {good['images'][0]['file_name']} twice",
        ),
        ({**good, "images": [{"id": 1, "file_name": "a.jpg"}]}, "lacks an id, a file_name, a width or a height"),
    ]
    for key, value, message in (
        ("bbox", [1, 2, 3], r"annotation \d+ has the bbox \[1, 2, 3\]"),
        ("bbox", [1, 2, 3, None], r"annotation \d+ has the bbox"),
        ("category_id", 12, r"annotation \d+ has the category 12"),
        ("id", "7", r"annotation 7 has no whole number as its id"),
    ):
        entries = copy.deepcopy(good["annotations"])
        entries[3][key] = value
        bad.append(({**good, "annotations": entries}, message))
    for number, (document, message) in enumerate(bad):
        path.write_text(json.dumps(document))
        with pytest.raises(InputError, match=message):
            prepare_benchmark("coco", source, tmp_path / f"out{number}", splits=["train"])
    path.write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*instances_train2017\.json"):
        prepare_benchmark("coco", source, tmp_path / "cut off", splits=["train"])


def test_coco_annotations_of_images_that_were_taken_out(tmp_path: Path) -> None:
    source = make_coco(tmp_path / "raw")
    path = source / "annotations" / "instances_val2017.json"
    change(path, images=read(path)["images"][1:])
    prepared = prepare_benchmark("coco", source, tmp_path / "out", splits=["val2017"])
    entry = prepared.description["splits"]["val2017"]
    assert entry["dropped"] == {"image not listed": 6}
    assert entry["num_objects"] == 5


@pytest.mark.parametrize("naming", ["aitod", "small"])
def test_aitod_ids_from_1(tmp_path: Path, naming: str) -> None:
    source = make_aitod(tmp_path / "raw", naming=naming)
    prepared = prepare_benchmark("aitod", source, tmp_path / "out")
    for split in ("trainval", "test"):
        name = f"aitod_{split}_v1.json" if naming == "aitod" else f"small_{split}_v1_1.0.json"
        raw, found = read(source / "annotations" / name), read(tmp_path / f"out/annotations/{split}.json")
        expected = [{key: entry[key] for key in KEPT} for entry in raw["annotations"]]
        assert [entry["id"] for entry in expected] == list(range(len(expected))), "as the tool writes them"
        assert found["annotations"] == [{**entry, "id": entry["id"] + 1} for entry in expected]
        assert [image["id"] for image in found["images"]] == [image["id"] for image in raw["images"]]
        for image in found["images"]:
            assert (tmp_path / "out/images" / split / image["file_name"]).is_file()
    assert prepared.description["roles"] == {"train": "trainval", "val": "test", "test": "test"}
    assert [(c["what"], c["found"], c["published"]) for c in prepared.description["total_checks"]] == [
        ("images", 6, 28_036),
        ("objects", 40, 700_621),
    ]
    assert load_dataset(tmp_path / "out", "val").num_objects == load_dataset(tmp_path / "out", "test").num_objects == 16
    assert load_dataset(tmp_path / "out", "train").num_objects == 24


def test_aitod_areas(tmp_path: Path) -> None:
    source = make_aitod(tmp_path / "raw")
    path = source / "annotations" / "aitod_test_v1.json"
    annotations = read(path)["annotations"]
    annotations[0]["area"] = 3.25
    del annotations[1]["area"]
    del annotations[1]["iscrowd"]
    annotations[1]["ignore"] = 1  # COCO's evaluation and its relatives go by iscrowd alone
    change(path, annotations=annotations)
    prepare_benchmark("aitod", source, tmp_path / "out")
    found = read(tmp_path / "out/annotations/test.json")["annotations"]
    assert found[0]["area"] == 3.25
    box, category = annotations[1]["bbox"], annotations[1]["category_id"]
    ids = {"id": 2, "image_id": 0, "category_id": category}
    assert found[1] == {**ids, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}


@pytest.mark.parametrize("layout", ["images/{}", "Images/{}", "{}/images", "{}/Images", "{}", "images", "."])
def test_aitod_image_folders(tmp_path: Path, layout: str) -> None:
    source = make_aitod(tmp_path / "raw")
    drawn = (source / "images").rename(tmp_path / "drawn")
    for split in ("trainval", "test"):
        folder = source / layout.format(split)
        folder.mkdir(parents=True, exist_ok=True)
        for path in (drawn / split).iterdir():
            path.rename(folder / path.name)
    prepare_benchmark("aitod", source, tmp_path / "out")
    assert len(load_dataset(tmp_path / "out", "train").records) == 4


@pytest.mark.parametrize("with_files", [True, False])
def test_aitod_trainval_from_train_and_val(tmp_path: Path, with_files: bool) -> None:
    source = make_aitod(tmp_path / "raw", images={"train": 3, "val": 2, "test": 1})
    raw = [read(source / f"annotations/aitod_{split}_v1.json") for split in ("train", "val")]
    if not with_files:
        # Ids that do not collide stay.
        for image in raw[1]["images"]:
            image["id"] += 10
        for annotation in raw[1]["annotations"]:
            annotation["image_id"] += 10
        change(source / "annotations/aitod_val_v1.json", **raw[1])
    total = prepare_benchmark("aitod", source, tmp_path / "out").description["total_checks"]
    assert (total[0]["what"], total[0]["found"]) == ("images", 6), "nothing is counted in two splits"
    found = read(tmp_path / "out/annotations/trainval.json")
    names = [image["file_name"] for part in raw for image in part["images"]]
    assert [image["file_name"] for image in found["images"]] == names
    assert [image["id"] for image in found["images"]] == ([1, 2, 3, 4, 5] if with_files else [0, 1, 2, 10, 11])
    name_of = {image["id"]: image["file_name"] for image in found["images"]}
    expected = []
    for part in raw:
        of = {image["id"]: image["file_name"] for image in part["images"]}
        expected += [(of[entry["image_id"]], entry["bbox"]) for entry in part["annotations"]]
    assert [(name_of[entry["image_id"]], entry["bbox"]) for entry in found["annotations"]] == expected
    assert [entry["id"] for entry in found["annotations"]] == list(range(1, len(expected) + 1))
    # Images of two folders: a link to each.
    folder = tmp_path / "out/images/trainval"
    assert not folder.is_symlink() and sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert all(path.is_symlink() for path in folder.iterdir())
    assert len(load_dataset(tmp_path / "out", "train").records) == 5
    # Without trainval nothing is chosen on the test images.
    apart = prepare_benchmark("aitod", source, tmp_path / "apart", splits=["train", "val", "test"])
    assert apart.description["roles"] == {"train": "train", "val": "val", "test": "test"}


def test_aitod_v2_is_told_apart(tmp_path: Path) -> None:
    source = make_aitod(tmp_path / "raw")
    for split in ("trainval", "test"):
        (source / f"annotations/aitod_{split}_v1.json").rename(source / f"annotations/aitodv2_{split}.json")
    with pytest.raises(
        InputError, match=r"aitodv2_test\.json is AI-TOD-v2, whose numbers are not AI-TOD's: --version v2"
    ):
        prepare_benchmark("aitod", source, tmp_path / "out")
    prepared = prepare_benchmark("aitod", source, tmp_path / "out", options={"version": "v2"})
    assert list(prepared.description["splits"]) == ["trainval", "test"]
    assert read(tmp_path / "out/annotations/test.json")["info"]["options"] == {"version": "v2"}
    # Files without a version in their names, in a folder that tells it.
    for split in ("trainval", "test"):
        (source / f"annotations/aitodv2_{split}.json").rename(source / f"annotations/{split}.json")
    (source / "annotations").rename(source / "annotations_v2")
    with pytest.raises(InputError, match=r"annotations_v2/test\.json is AI-TOD-v2"):
        prepare_benchmark("aitod", source, tmp_path / "other")


def test_aitod_in_other_places_and_several_files(tmp_path: Path) -> None:
    source = make_aitod(tmp_path / "raw")
    path = source / "annotations" / "aitod_test_v1.json"
    shutil.copy(path, source / "annotations" / "small_test_v1_1.0.json")
    prepare_benchmark("aitod", source, tmp_path / "the same file twice")
    change(source / "annotations" / "small_test_v1_1.0.json", annotations=[])
    with pytest.raises(
        InputError, match=r"several annotation files of test that differ \(annotations/aitod_test_v1\.json"
    ):
        prepare_benchmark("aitod", source, tmp_path / "out")
    (source / "annotations" / "small_test_v1_1.0.json").unlink()
    path.rename(source / "test_v1.json")
    assert "test" in prepare_benchmark("aitod", source, tmp_path / "at the top").description["splits"]
    change(source / "test_v1.json", categories=[{"id": 1, "name": "plane"}])
    with pytest.raises(InputError, match=r"category 1 is 'plane', but 'airplane' in AI-TOD"):
        prepare_benchmark("aitod", source, tmp_path / "out")
    shutil.rmtree(source / "images" / "trainval")
    with pytest.raises(InputError, match=r"image trainval_0__\d+_0\.png is missing, as are 3 more of 4; looked in "):
        prepare_benchmark("aitod", source, tmp_path / "no images", splits=["trainval"])
