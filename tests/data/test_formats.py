"""Which format a data set is in, where its splits lie, and that all formats say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import supervision
from PIL import Image

from crossdino.data import DatasetIndex, find_splits, load_coco, load_dataset
from crossdino.data.coco import CocoSplit
from crossdino.errors import InputError

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 11, "name": "dog"}]


def write_coco(path: Path, images: Path, name: str = "a.png") -> Path:
    """A COCO file with one image of 40 x 30 pixels and one box."""
    for folder in (path.parent, images):
        folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(images / name)
    document = {
        "images": [{"id": 1, "file_name": name, "width": 40, "height": 30}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 5, 5]}],
        "categories": CATEGORIES,
    }
    path.write_text(json.dumps(document))
    return path


def write_all(folder: Path, seed: int = 0) -> dict[str, Path]:
    """The same six images with the same integer boxes as COCO, YOLO and VOC (the last image has no box)."""
    rng = np.random.default_rng(seed)
    names = [f"im {number} ü.png" for number in range(6)]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    places = {
        "coco": folder / "coco" / "train",
        "yolo": folder / "yolo" / "images" / "train",
        "voc": folder / "voc" / "JPEGImages",
    }
    for place in (*places.values(), folder / "yolo" / "labels" / "train", folder / "voc" / "Annotations"):
        place.mkdir(parents=True)
    for number, name in enumerate(names, start=1):
        width, height = rng.integers(50, 90, 2).tolist()
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for place in places.values():
            Image.new("RGB", (width, height)).save(place / name)
        lines, objects = [], []
        for _ in range(0 if number == 6 else int(rng.integers(1, 5))):
            # From 1 on: a VOC data set with a box at 0 would be read as counted from 0.
            x, y = int(rng.integers(1, width - 9)), int(rng.integers(1, height - 9))
            w, h, label = *rng.integers(2, 9, 2).tolist(), int(rng.integers(0, 2))
            box = {"image_id": number, "category_id": CATEGORIES[label]["id"], "bbox": [x, y, w, h]}
            annotations.append({"id": len(annotations) + 1, **box})
            shares = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            lines.append(f"{label} {' '.join(f'{share:.12f}' for share in shares)}")
            corners = zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h), strict=True)
            inner = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners)
            objects.append(f"<object><name>{CATEGORIES[label]['name']}</name><bndbox>{inner}</bndbox></object>")
        (folder / "yolo" / "labels" / "train" / name).with_suffix(".txt").write_text("\n".join(lines))
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        text = f"<annotation><filename>{name}</filename>{size}{''.join(objects)}</annotation>"
        (folder / "voc" / "Annotations" / name).with_suffix(".xml").write_text(text, encoding="utf-8")
    (folder / "yolo" / "data.yaml").write_text("names: {0: cat, 1: dog}\ntrain: images/train\n")
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (folder / "coco" / "train.json").write_text(json.dumps(document))
    return {name: folder / name for name in places}


@pytest.mark.parametrize("check", ["headers", "full"])
def test_all_formats_give_the_same(tmp_path: Path, check: Any) -> None:
    indices = {name: load_dataset(folder, check=check) for name, folder in write_all(tmp_path).items()}
    coco = indices["coco"]
    assert coco.num_objects > 6 and [len(record.labels) for record in coco.records][-1] == 0
    assert {name: index.category_ids for name, index in indices.items()} == {
        "coco": (3, 11),
        "yolo": (0, 1),
        "voc": (1, 2),
    }
    for index in indices.values():
        assert index.class_names == ("cat", "dog") and not index.problems
        for ours, theirs in zip(index.records, coco.records, strict=True):
            assert (ours.image_id, ours.path.name) == (theirs.image_id, theirs.path.name)
            assert (ours.width, ours.height, ours.apply_exif) == (theirs.width, theirs.height, True)
            np.testing.assert_allclose(ours.boxes_xywh, theirs.boxes_xywh, rtol=0, atol=1e-9)  # 12 decimals
            np.testing.assert_array_equal(ours.labels, theirs.labels)
            np.testing.assert_allclose(ours.areas, theirs.areas, rtol=1e-9)
            np.testing.assert_array_equal(ours.iscrowd, theirs.iscrowd)


def test_supervision_reads_the_same_coco_file(tmp_path: Path) -> None:
    folder = write_all(tmp_path, seed=1)["coco"]
    index = load_dataset(folder)
    theirs = supervision.DetectionDataset.from_coco(str(folder / "train"), str(folder / "train.json"))
    assert theirs.classes == list(index.class_names)
    for record in index.records:
        found = theirs.annotations[str(record.path)]
        corners = record.boxes_xywh + np.pad(record.boxes_xywh[:, :2], ((0, 0), (2, 0)))
        np.testing.assert_array_equal(corners, found.xyxy)
        np.testing.assert_array_equal(record.labels, found.class_id)


def only(index: DatasetIndex) -> Path:
    (record,) = index.records
    assert record.labels.tolist() == [0]
    return record.path


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("{}.json", "{}"),
        ("{}.json", "."),
        ("{}.json", "images"),
        ("{}.json", "images/{}"),
        ("annotations/instances_{}2017.json", "{}2017"),
        ("annotations/instances_{}2017.json", "images/{}2017"),
        ("annotations/instances_{}.json", "images/{}"),
        ("annotations/instances_{}.json", "images"),
        ("annotations/{}.json", "{}"),
        ("annotations/aitod_{}_v1.json", "{}"),
        ("{}/_annotations.coco.json", "{}"),
        ("{}/annotations.json", "{}/images"),
        ("{}/labels.json", "{}/data"),
    ],
)
@pytest.mark.parametrize("val", ["val", "valid"])
def test_coco_layouts(tmp_path: Path, file: str, images: str, val: str) -> None:
    for split in ("train", val):
        write_coco(tmp_path / file.format(split), tmp_path / images.format(split), f"{split}.png")
    assert list(find_splits(tmp_path)) == ["train", "val"]
    assert only(load_dataset(tmp_path)) == tmp_path / images.format("train") / "train.png"
    assert only(load_dataset(tmp_path, "val")) == tmp_path / images.format(val) / f"{val}.png"


@pytest.mark.parametrize(
    ("file", "images"),
    [
        ("_annotations.coco.json", "."),  # Roboflow
        ("labels.json", "data"),  # FiftyOne
        ("result.json", "images"),  # Label Studio
        ("annotations/instances_default.json", "images/default"),  # CVAT
        ("annotations/instances_default.json", "images"),
    ],
)
def test_coco_without_splits(tmp_path: Path, file: str, images: str) -> None:
    path = write_coco(tmp_path / file, tmp_path / images)
    assert list(find_splits(tmp_path)) == ["train"]
    assert only(load_dataset(tmp_path)) == only(load_dataset(path)) == tmp_path / images / "a.png"
    write_coco(tmp_path / "val.json", tmp_path / "val")  # with a file of a split, only such ones count
    assert list(find_splits(tmp_path)) == ["val"]


@pytest.mark.parametrize("images", ["val2017", "images/val2017", "images"])
def test_one_file_of_coco_alone(tmp_path: Path, images: str) -> None:
    path = write_coco(tmp_path / "annotations" / "instances_val2017.json", tmp_path / images)
    assert only(load_dataset(path)) == tmp_path / images / "a.png"


def test_other_files_among_annotations(tmp_path: Path) -> None:
    """COCO's own folder: captions, key points, and lists of images without annotations."""
    folder = tmp_path / "annotations"
    write_coco(folder / "instances_train2017.json", tmp_path / "train2017")
    write_coco(folder / "instances_val2017.json", tmp_path / "val2017")
    for name in ("captions_train2017", "person_keypoints_val2017", "image_info_test2017", "image_info_test-dev2017"):
        (folder / f"{name}.json").write_text("{}")
    assert find_splits(tmp_path) == {
        "train": CocoSplit(folder / "instances_train2017.json", tmp_path / "train2017"),
        "val": CocoSplit(folder / "instances_val2017.json", tmp_path / "val2017"),
    }
    (folder / "instances_train2014.json").write_text("{}")
    with pytest.raises(InputError, match="several files for train .*instances_train2014.json.*choose by --data.train"):
        find_splits(tmp_path)
    (tmp_path / "train.json").write_text("{}")  # goes before what lies deeper
    assert find_splits(tmp_path)["train"] == CocoSplit(tmp_path / "train.json")


def test_trainval_is_for_training(tmp_path: Path) -> None:
    write_coco(tmp_path / "annotations" / "aitod_trainval_v1.json", tmp_path / "images")
    write_coco(tmp_path / "annotations" / "aitod_test_v1.json", tmp_path / "images")
    assert list(find_splits(tmp_path)) == ["train", "test"]
    write_coco(tmp_path / "annotations" / "aitod_train_v1.json", tmp_path / "images")
    assert find_splits(tmp_path)["train"].place.endswith("aitod_train_v1.json")


def test_yaml_file_for_coco(tmp_path: Path) -> None:
    write_coco(tmp_path / "deep" / "labels" / "first.json", tmp_path / "deep" / "pictures")
    write_coco(tmp_path / "deep" / "second.json", tmp_path / "deep")
    yaml = tmp_path / "mine.yaml"
    yaml.write_text(
        "path: deep\ntrain: {annotations: labels/first.json, images: pictures}\nvalid: {annotations: second.json}\n"
        "test: second.json\n"
    )
    for source in (yaml, tmp_path):  # the only data file of a folder is found there
        assert list(find_splits(source)) == ["train", "val", "test"]
        assert only(load_dataset(source)) == tmp_path / "deep" / "pictures" / "a.png"
        assert only(load_dataset(source, "val")) == only(load_dataset(source, "test")) == tmp_path / "deep" / "a.png"
    yaml.rename(tmp_path / "deep" / "mine.yaml")
    moved = tmp_path / "deep" / "mine.yaml"  # its `path` does not exist any more: what lies beside it is meant
    assert only(load_dataset(moved)) == tmp_path / "deep" / "pictures" / "a.png"
    yaml.write_text("train: {annotation: labels/first.json}\n")
    with pytest.raises(InputError, match=r"mine\.yaml: 'train' must hold 'annotations: FILE\.json'"):
        find_splits(yaml)


def test_json_file(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "x.json", tmp_path)
    assert find_splits(path) == {"train": CocoSplit(path)}  # so that training knows that there is no validation data
    assert only(load_dataset(path)) == only(load_dataset(str(path), "val")) == only(load_coco(path))
    (tmp_path / "a.png").unlink()
    assert only(load_dataset(path, require_images=False)).name == "a.png"


def test_options_reach_every_format(tmp_path: Path) -> None:
    for folder in write_all(tmp_path).values():
        seen: list[int] = []
        index = load_dataset(
            folder,
            class_names=("dog",),
            ignore_categories=("cat",),
            check="full",
            on_progress=lambda done, total, seen=seen: seen.append(total),
        )
        assert index.class_names == ("dog",) and seen == [6] * 6
        assert {label for record in index.records for label in record.labels.tolist()} == {0, -1}


@pytest.mark.parametrize(
    ("name", "words"),
    [("nothing.yaml", "does not exist"), ("notes.txt", "is no data set"), ("config.yaml", "does not describe data")],
)
def test_files_that_are_no_data(tmp_path: Path, name: str, words: str) -> None:
    if name != "nothing.yaml":
        (tmp_path / name).write_text("training: {epochs: 3}\n")
    with pytest.raises(InputError, match=words):
        find_splits(tmp_path / name)


def test_nothing_found(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("training: {epochs: 3}\n")
    with pytest.raises(InputError) as caught:
        find_splits(tmp_path)
    message = str(caught.value)
    for word in (str(tmp_path), "train.json", "data.yaml", "Annotations/*.xml"):
        assert word in message
    assert "\n" not in message


def test_several_things_found(tmp_path: Path) -> None:
    folders = write_all(tmp_path)
    write_coco(folders["yolo"] / "train.json", folders["yolo"])
    with pytest.raises(
        InputError, match=r"holds a data file \(data\.yaml\) and COCO files; give the one that is meant"
    ):
        find_splits(folders["yolo"])
    (folders["yolo"] / "data.yaml").unlink()  # labels without names are no choice
    assert list(find_splits(folders["yolo"])) == ["train"] and only(load_dataset(folders["yolo"])).name == "a.png"
    for name in ("one.yaml", "two.yml"):
        (folders["voc"] / name).write_text("names: [a]\ntrain: JPEGImages\n")
    with pytest.raises(InputError, match=r"several data files \(one\.yaml, two\.yml\); name one of them"):
        find_splits(folders["voc"])


def test_a_data_file_wins_over_the_coco_files_beside_it(tmp_path: Path) -> None:
    # As a prepared benchmark lies there: which of the files is for what, only the data file tells.
    for name in ("train", "trainval", "test", "test-dev", "test-dev_originals"):
        write_coco(tmp_path / "annotations" / f"{name}.json", tmp_path / "images" / name, f"{name}.png")
    with pytest.raises(
        InputError, match=r"several files for test \(annotations/test-dev\.json, annotations/test-dev_orig"
    ):
        find_splits(tmp_path)
    (tmp_path / "data.yaml").write_text(
        'train: {"annotations": "annotations/trainval.json", "images": "images/trainval"}\n'
        'test: {"annotations": "annotations/test-dev.json", "images": "images/test-dev"}\n'
    )
    assert find_splits(tmp_path) == {
        "train": CocoSplit(tmp_path / "annotations/trainval.json", tmp_path / "images/trainval"),
        "test": CocoSplit(tmp_path / "annotations/test-dev.json", tmp_path / "images/test-dev"),
    }
    assert only(load_dataset(tmp_path, "test")).name == "test-dev.png"
    with pytest.raises(InputError, match="has no split 'val'"):
        load_dataset(tmp_path, "val")
