"""WiderPerson's raw lines into COCO: every rule by hand, and random data against a plain second reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from crossdino.data import load_dataset
from crossdino.errors import InputError
from crossdino.preparation import prepare_benchmark
from tests.raw_datasets import make_widerperson


def write_raw(folder: Path, lists: dict[str, str], texts: dict[str, str], size: tuple[int, int] = (100, 80)) -> Path:
    for name in ("Annotations", "Images"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, text in lists.items():
        (folder / f"{name}.txt").write_bytes(text.encode())
    for name, text in texts.items():
        (folder / "Annotations" / f"{name}.txt").write_bytes(text.encode())
        Image.new("RGB", size).save(folder / "Images" / name)
    return folder


def read(output: Path, split: str) -> dict[str, Any]:
    return json.loads((output / "annotations" / f"{split}.json").read_text())


# All labels; only others; no line at all; an empty file; another suffix, and a count that is wrong.
TEXTS = {
    "000002.jpg": "5\n1 10 20 19 39\n2 0 0 0 0\n3 5 6 7 8\n4 50 50 99 79\n5 60 1 70 2\n",
    "000003.jpg": "1\n2 1 1 4 4\n",
    "000004.jpg": "0\n",
    "000005.jpg": "",
    "000001.png": "3\r\n1 1 2 3 4\r\n\r\n1 90 10 104 60\r\n",
}
ALL = "000002\n000003\n000004.jpg\n\n000005\r\nImages/000001.png\n000003\n"


def annotation(number: int, image: int, box: list[int], crowd: int) -> dict[str, Any]:
    area = box[2] * box[3]
    return {"id": number, "image_id": image, "category_id": 1, "bbox": box, "area": area, "iscrowd": crowd}


def image(number: int, name: str) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": 100, "height": 80}


def test_rules_by_hand(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "raw", {"train": ALL, "val": ALL, "test": "000009\n"}, TEXTS)
    prepared = prepare_benchmark("widerperson", source, tmp_path / "out")
    train, val = read(tmp_path / "out", "train"), read(tmp_path / "out", "val")
    # The list's order; training images without label 1 are left out.
    assert train["images"] == [image(1, "000002.jpg"), image(2, "000001.png")]
    assert train["annotations"] == [
        annotation(1, 1, [10, 20, 10, 20], 0),
        annotation(2, 1, [0, 0, 1, 1], 1),
        annotation(3, 1, [5, 6, 3, 3], 1),
        annotation(4, 1, [50, 50, 50, 30], 1),
        annotation(5, 1, [60, 1, 11, 2], 1),
        annotation(6, 2, [1, 2, 3, 3], 0),
        annotation(7, 2, [90, 10, 15, 51], 0),
    ]
    assert train["categories"] == val["categories"] == [{"id": 1, "name": "pedestrian"}]
    assert train["unannotated"] == []
    names = ["000002.jpg", "000003.jpg", "000004.jpg", "000005.jpg", "000001.png"]
    assert val["images"] == [image(number, name) for number, name in enumerate(names, start=1)]
    assert [(a["image_id"], a["iscrowd"]) for a in val["annotations"]] == [(1, 0)] + [(1, 1)] * 4 + [(2, 1)] + [
        (5, 0)
    ] * 2
    assert val["unannotated"] == [3, 4], "IterDet's evaluation does not know them"
    splits = prepared.description["splits"]
    assert list(splits) == ["train", "val"]
    assert splits["train"]["dropped"] == {"image without an object": 3}
    assert (splits["train"]["num_objects"], splits["train"]["num_ignored"]) == (3, 4)
    assert (splits["val"]["num_images"], splits["val"]["num_objects"], splits["val"]["num_ignored"]) == (5, 3, 5)
    checks = [(check["what"], check["found"], check["published"]) for check in splits["train"]["checks"]]
    assert checks == [("images", 5, 8000), ("objects", 3, None)], "the list is published, not what is left of it"
    assert splits["val"]["notes"] == [
        "names that are in val.txt more than once count once: 1",
        "the count in the first line is wrong, all lines were taken: 000005.jpg.txt is empty; "
        "000001.png.txt says 3 and has 2",
    ]
    index = load_dataset(tmp_path / "out", "val")
    assert [len(record.labels) for record in index.records] == [5, 1, 0, 0, 2]
    assert index.num_objects == 3


@pytest.mark.parametrize(
    ("options", "boxes", "crowds", "dropped"),
    [
        ({"min_height": 20}, None, [0, 1, 1, 1, 1], {}),
        ({"min_height": 21}, None, [1, 1, 1, 1, 1], {}),
        ({"objects": (1, 3), "ignored": (4, 5)}, [0, 2, 3, 4], [0, 0, 1, 1], {"label 2": 1}),
        ({"ignored": ()}, [0], [0], {"label 2": 1, "label 3": 1, "label 4": 1, "label 5": 1}),
    ],
)
def test_labels_and_heights(
    tmp_path: Path, options: dict[str, Any], boxes: list[int] | None, crowds: list[int], dropped: dict[str, int]
) -> None:
    source = write_raw(tmp_path / "raw", {"val": "000002"}, TEXTS)
    prepared = prepare_benchmark("widerperson", source, tmp_path / "out", options=options)
    found = read(tmp_path / "out", "val")["annotations"]
    every = [[10, 20, 10, 20], [0, 0, 1, 1], [5, 6, 3, 3], [50, 50, 50, 30], [60, 1, 11, 2]]
    assert [a["bbox"] for a in found] == (every if boxes is None else [every[place] for place in boxes])
    assert [a["iscrowd"] for a in found] == crowds
    assert prepared.description["splits"]["val"]["dropped"] == dropped


def test_corners_that_do_not_belong_to_the_box(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "raw", {"val": "000002"}, TEXTS)
    prepared = prepare_benchmark("widerperson", source, tmp_path / "out", options={"corners": "exclusive"})
    found = read(tmp_path / "out", "val")["annotations"]
    assert [a["bbox"] for a in found] == [[10, 20, 9, 19], [5, 6, 2, 2], [50, 50, 49, 29], [60, 1, 10, 1]]
    assert prepared.description["splits"]["val"]["dropped"] == {"side below 1 px": 1}


def test_training_images_without_objects_can_be_kept(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "raw", {"train": ALL}, TEXTS)
    prepare_benchmark("widerperson", source, tmp_path / "out", options={"empty_train": "keep", "outside": "clip"})
    train = read(tmp_path / "out", "train")
    assert len(train["images"]) == 5
    assert train["unannotated"] == [3, 4]
    assert train["annotations"][-1]["bbox"] == [90, 10, 10, 51]


def test_random_data_against_a_plain_second_reading(tmp_path: Path) -> None:
    source = make_widerperson(tmp_path / "raw", seed=5, images={"train": 6, "val": 4, "test": 2})
    prepare_benchmark("widerperson", source, tmp_path / "out")
    for split in ("train", "val"):
        expected = []
        names = []
        for stem in (source / f"{split}.txt").read_text().split():
            lines = (source / "Annotations" / f"{stem}.jpg.txt").read_text().split("\n")[1:]
            rows = [[int(value) for value in line.split()] for line in lines if line]
            if split == "train" and not [row for row in rows if row[0] == 1]:
                continue
            names.append(f"{stem}.jpg")
            for label, x1, y1, x2, y2 in rows:
                expected.append((len(names), [x1, y1, x2 - x1 + 1, y2 - y1 + 1], int(label != 1)))
        found = read(tmp_path / "out", split)
        assert [image["file_name"] for image in found["images"]] == names
        assert [(a["image_id"], a["bbox"], a["iscrowd"]) for a in found["annotations"]] == expected
        assert {"class without any box"} >= set(load_dataset(tmp_path / "out", split).problems.counts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 10 20 19 39\n", r"000002\.jpg\.txt, line 1: '1 10 20 19 39' is not the count of the boxes"),
        ("1\n1 10 20 19\n", r"000002\.jpg\.txt, line 2: '1 10 20 19' is not 'label x1 y1 x2 y2'"),
        ("2\n1 1 2 3 4\n6 1 2 3 4\n", r"line 3: '6 1 2 3 4' is not .* with a label from 1 to 5; correct it"),
        ("1\n1 1 two 3 4\n", r"line 2: '1 1 two 3 4' is not"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    source = write_raw(tmp_path / "raw", {"val": "000002"}, {"000002.jpg": text})
    with pytest.raises(InputError, match=message):
        prepare_benchmark("widerperson", source, tmp_path / "out")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "raw", {"val": "000002\n000009\n"}, {"000002.jpg": TEXTS["000002.jpg"]})
    with pytest.raises(InputError, match=r"Annotations.000009\.jpg\.txt does not exist, but .*val\.txt lists it"):
        prepare_benchmark("widerperson", source, tmp_path / "out")
    (source / "Annotations" / "000009.jpg.txt").write_text("0\n")
    with pytest.raises(InputError, match=r"image .*000009\.jpg does not exist, but .*val\.txt lists it"):
        prepare_benchmark("widerperson", source, tmp_path / "out")
    with pytest.raises(InputError, match=r"lacks train: train\.txt, Annotations/ and Images/"):
        prepare_benchmark("widerperson", source, tmp_path / "out", splits=["train"])
    with pytest.raises(InputError, match=r"lacks test: its annotations are not public"):
        prepare_benchmark("widerperson", source, tmp_path / "out", splits=["test"])
    with pytest.raises(InputError, match=r"label 2 is in --objects and in --ignored"):
        prepare_benchmark("widerperson", source, tmp_path / "out", options={"objects": (1, 2)})
    with pytest.raises(InputError, match="--objects names no label"):
        prepare_benchmark("widerperson", source, tmp_path / "out", options={"objects": ()})
    (source / "val.txt").write_text("\n")
    with pytest.raises(InputError, match="lists no images"):
        prepare_benchmark("widerperson", source, tmp_path / "out")
    (source / "Annotations").rename(source / "annots")
    with pytest.raises(
        InputError, match=r"is not WiderPerson: it lacks the folder Annotations\. It holds Images/, ann"
    ):
        prepare_benchmark("widerperson", source, tmp_path / "out")


def test_one_folder_deeper_and_without_images(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw" / "WiderPerson", {"val": "000002\n000004\n"}, TEXTS)
    for path in (tmp_path / "raw" / "WiderPerson" / "Images").iterdir():
        path.unlink()
    (tmp_path / "raw" / "WiderPerson" / "Images").rmdir()
    with pytest.raises(InputError, match=r"Images does not exist; put the images there, or add --without-images"):
        prepare_benchmark("widerperson", tmp_path / "raw", tmp_path / "out")
    prepare_benchmark("widerperson", tmp_path / "raw", tmp_path / "out", images="none")
    found = read(tmp_path / "out", "val")
    assert [(i["file_name"], i["width"], i["height"]) for i in found["images"]] == [
        ("000002.jpg", 100, 80),
        ("000004.jpg", 1, 1),
    ]
