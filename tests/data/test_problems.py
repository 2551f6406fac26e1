"""The list of problems: its summary, its table, and the errors that carry it."""

from __future__ import annotations

import csv
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from crossdino.data import DataError, DatasetIndex, Problem, Problems, load_coco
from crossdino.errors import InputError


def coco(folder: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]], **options: Any) -> DatasetIndex:
    """Images of 40 x 30 pixels, categories 5 `car`, 90 `bus` and 1000 `crowd`."""
    for image in images:
        path = folder / str(image["file_name"]).replace("\\", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(path, format="PNG")
        image.setdefault("width", 40)
        image.setdefault("height", 30)
    categories = [{"id": number, "name": name} for number, name in ((1000, "crowd"), (90, "bus"), (5, "car"))]
    source = folder / "data.json"
    source.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return load_coco(source, **options)


def box(number: int, image_id: int, bbox: list[float], category_id: int = 5, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


FIRST = {"id": 7000, "file_name": "ä b.PNG"}
SECOND = {"id": 3, "file_name": "x\\y.png"}


def test_repeated_images_are_joined(tmp_path: Path) -> None:
    """One file under two ids, and one entry twice: one image with the objects of all."""
    images = [dict(FIRST), {"id": 12, "file_name": "./ä b.PNG"}, dict(SECOND), dict(SECOND)]
    annotations = [
        box(1, 12, [1, 1, 5, 5]),
        box(2, 7000, [2, 2, 5, 5], 90),
        box(3, 7000, [1, 1, 5, 5]),  # the same object under the other id
        box(4, 3, [3, 3, 5, 5], 1000),
    ]
    index = coco(tmp_path, images, annotations)
    assert [record.image_id for record in index.records] == [7000, 3]
    assert index.records[0].boxes_xywh.tolist() == [[1, 1, 5, 5], [2, 2, 5, 5]]
    assert index.records[0].labels.tolist() == [0, 1] and index.category_ids == (5, 90, 1000)
    assert [(problem.annotation, problem.what, problem.done) for problem in index.problems] == [
        ("image 12", "image listed twice", "joined"),
        ("image 3", "image listed twice", "joined"),
        ("annotation 3 of image 7000", "box given twice", "dropped"),
    ]


def test_boxes_are_repeated_only_if_all_of_them_agrees(tmp_path: Path) -> None:
    same = [1, 1, 5, 5]
    annotations = [
        box(1, 3, same),
        box(2, 3, same, 90),
        box(3, 3, same, iscrowd=1),
        box(4, 3, [1, 1, 5, 5.01]),
        box(5, 3, same, area=3),
        box(6, 3, same, 1000),
    ]
    index = coco(tmp_path, [dict(SECOND)], annotations)
    assert [problem.annotation for problem in index.problems] == ["annotation 5 of image 3"]
    assert len(index.records[0].labels) == 5


def test_ignored_categories(tmp_path: Path) -> None:
    annotations = [box(1, 3, [1, 1, 5, 5], 90), box(2, 3, [2, 2, 50, 5], 1000), box(3, 3, [3, 3, 4, 4], iscrowd=1)]
    index = coco(tmp_path, [dict(SECOND)], annotations, ignore_categories=["crowd"])
    assert index.class_names == ("car", "bus") and index.category_ids == (5, 90)
    (record,) = index.records
    assert record.labels.tolist() == [1, -1, 0] and record.iscrowd.tolist() == [False, True, True]
    assert record.boxes_xywh[1].tolist() == [2, 2, 38, 5]  # clipped as all others
    assert index.num_objects == 1
    truth = index.to_coco()
    crowds = [(entry["category_id"], entry["bbox"]) for entry in truth["annotations"] if entry["iscrowd"]]
    assert crowds == [(5, [2, 2, 38, 5]), (90, [2, 2, 38, 5]), (5, [3, 3, 4, 4])]
    assert [entry["id"] for entry in truth["annotations"]] == [1, 2, 3, 4]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    again = COCO(str(tmp_path / "truth.json"))  # as another program reads it
    assert len(again.getAnnIds(imgIds=[3], iscrowd=True)) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ignore_categories": ["crowds"]}, "no category 'crowds' to ignore.*did you mean 'crowd'"),
        ({"ignore_categories": ["car", "bus", "crowd"]}, "leaves no class"),
        ({"ignore_categories": ["car"], "class_names": ["car"]}, "cannot be a class and be ignored"),
    ],
)
def test_ignored_categories_that_make_no_sense(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        coco(tmp_path, [dict(SECOND)], [], **options)


def test_all_fatal_problems_are_told_together(tmp_path: Path) -> None:
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(9)]
    coco(tmp_path, images, [])
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(b"x")
    for number in (3, 4, 5, 6):
        Image.new("RGB", (41, 30)).save(tmp_path / f"{number}.png")
    source = tmp_path / "data.json"
    document = json.loads(source.read_text())
    document["images"][8]["file_name"] = None
    document["annotations"] = [box(1, 3, [0, 0, 5, 5]), box(2, 0, [0, 0, 0, 5]), box(3, 0, [-9, 0, 12, 5])]
    source.write_text(json.dumps(document))
    with pytest.raises(DataError) as caught:
        load_coco(source)
    problems = caught.value.problems
    assert len(problems) == len(set(problems)) == 11  # 2 boxes and 2 unused classes besides the fatal ones
    assert [Path(problem.file).name for problem in problems.fatal] == [
        "data.json",
        *(f"{number}.png" for number in range(1, 7)),
    ]
    message = str(caught.value)
    assert "(9 images) cannot be used" in message and "\n" not in message
    assert "another size than declared: 4 (" in message and "6.png" not in message  # the first three are named
    problems.write_csv(tmp_path / "problems.csv")
    assert len((tmp_path / "problems.csv").read_text(encoding="utf-8").splitlines()) == 12
    # The error crosses the border of a process as a whole.
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


def test_full_check_finds_what_headers_do_not_tell(tmp_path: Path) -> None:
    coco(tmp_path, [dict(SECOND), dict(FIRST)], [])
    path = tmp_path / "x" / "y.png"
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    assert len(load_coco(tmp_path / "data.json").records) == 2
    with pytest.raises(DataError, match=r"broken image: 1 in .*y\.png \("):
        load_coco(tmp_path / "data.json", check="full")


def test_summary() -> None:
    problems = Problems()
    assert not problems and problems.lines() == [] and problems.counts == {}
    for number in range(5):
        problems.add(f"{number}.txt", "line 1", "no good", "dropped", "7")
    problems.add("a.json", "", "odd", "noted")
    problems.add("a.json", "annotation 3", "no good", "fatal")
    assert problems.lines() == [
        "no good: 5 dropped (0.txt line 1: 7; 1.txt line 1: 7; 2.txt line 1: 7; ...)",
        "odd: 1 noted in a.json",
        "no good: 1 fatal in a.json (annotation 3)",
    ]
    assert problems.counts == {"no good": 6, "odd": 1}
    assert problems.fatal == [Problem("a.json", "annotation 3", "no good", "fatal")]


def test_csv(tmp_path: Path) -> None:
    problems = Problems()
    problems.add('ü, "x".txt', "line 1", "no\ngood", "dropped", "a;b")
    problems.add(os.fsdecode(b"\xff.txt"), "", "odd", "noted")
    path = tmp_path / "new" / "problems.csv"
    for _ in range(2):  # the second replaces the first
        problems.write_csv(path)
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["file", "annotation", "what", "done", "detail"],
        ['ü, "x".txt', "line 1", "no\ngood", "dropped", "a;b"],
        ["\\udcff.txt", "", "odd", "noted", ""],
    ]
    assert [child.name for child in path.parent.iterdir()] == ["problems.csv"]  # nothing left over
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the list of problems"):
        problems.write_csv(tmp_path / "file" / "problems.csv")
