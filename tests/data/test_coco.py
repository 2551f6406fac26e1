"""COCO files, good and bad, made by hand."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from crossdino.data.coco import load_coco
from crossdino.data.index import DatasetIndex
from crossdino.errors import InputError

GOOD: dict[str, Any] = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 3, "file_name": "sub/b.png", "width": 20, "height": 50},
        {"id": 5, "file_name": "empty.png", "width": 8, "height": 8},
    ],
    "categories": [{"id": 90, "name": "bus"}, {"id": 0, "name": "car"}, {"id": 17, "name": "van"}],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 90, "bbox": [1, 2, 3.5, 4.25], "area": 9.0, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 0, "bbox": [10, 10, 5, 5]},
        {"id": 3, "image_id": 3, "category_id": 17, "bbox": [0, 0, 20, 50], "area": 1000, "iscrowd": 1},
    ],
}


def write(folder: Path, document: object, sizes: dict[str, tuple[int, int]] | None = None) -> Path:
    """The document as `data.json`, with black images beside it."""
    for name, size in (sizes or {"a.png": (40, 30), "sub/b.png": (20, 50), "empty.png": (8, 8)}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name)
    path = folder / "data.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(GOOD), **changes}


def load_boxes(folder: Path, *annotations: dict[str, Any]) -> DatasetIndex:
    """Annotations of image 7 (40 x 30 pixels) and category 0, unless they say otherwise."""
    entries = [
        {"id": number, "image_id": 7, "category_id": 0, **entry} for number, entry in enumerate(annotations, start=1)
    ]
    return load_coco(write(folder, changed(annotations=entries)))


def test_good_file(tmp_path: Path) -> None:
    index = load_coco(write(tmp_path, GOOD))
    assert index.class_names == ("car", "van", "bus")  # by id: 0, 17, 90
    assert index.category_ids == (0, 17, 90)
    assert index.label_of == {0: 0, 17: 1, 90: 2}
    assert [record.image_id for record in index.records] == [7, 3, 5]  # the file's order
    a, b, empty = index.records
    assert b.path == tmp_path / "sub" / "b.png"
    np.testing.assert_array_equal(b.boxes_xywh, [[1, 2, 3.5, 4.25], [0, 0, 20, 50]])
    np.testing.assert_array_equal(b.labels, [2, 1])
    np.testing.assert_array_equal(b.areas, [9, 1000])
    np.testing.assert_array_equal(b.iscrowd, [False, True])
    np.testing.assert_array_equal(a.areas, [25])  # no area in the file: width x height
    assert empty.boxes_xywh.shape == (0, 4) and empty.labels.shape == (0,) and empty.labels.dtype == np.int64
    assert index.num_objects == 2
    assert not index.problems and index.problems.lines() == []


def test_sample_agrees_with_pycocotools(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).resolve().parents[2] / "sample" / "val_strip.json"
    index, oracle = load_coco(path), COCO(str(path))
    for record in index.records:
        entries = oracle.loadAnns(oracle.getAnnIds(imgIds=[record.image_id]))
        np.testing.assert_array_equal(record.boxes_xywh, [entry["bbox"] for entry in entries])
        np.testing.assert_array_equal(record.areas, [entry["area"] for entry in entries])
    assert index.num_objects == len(oracle.anns)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "as predictions are"),
        ("3", "not a COCO detection file"),
        ({"images": [], "annotations": []}, "no list 'categories'"),
        ({"a": 1}, "no list 'images'"),
        (changed(images={"id": 1}), "no list 'images'"),
        (changed(images=[]), "'images' is empty"),
        (changed(categories=[]), "'categories' is empty"),
        (changed(images=[3]), "entry 0 of 'images'"),
        (changed(annotations=[None]), "entry 0 of 'annotations'"),
        (changed(images=[{"id": 1, "width": 4, "height": 4}]), "image without a 'file_name'"),
        (changed(images=[{"id": "x", "file_name": "a.png"}]), "image without an integer id"),
        (changed(images=[GOOD["images"][0], {**GOOD["images"][1], "id": 7}]), "id of several images"),
        (changed(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), "two categories have the id 1"),
        (changed(categories=[{"name": "a"}]), "entry 0 of 'categories'"),
        (changed(categories=[{"id": 1}]), "entry 0 of 'categories'"),
        (changed(categories=[{"id": 55, "name": "other"}]), "different datasets"),
        (
            changed(annotations=[{"id": 1, "image_id": 99, "category_id": 0, "bbox": [1, 1, 2, 2]}]),
            "different datasets",
        ),
        (
            changed(annotations=[{"id": 1, "image_id": 7, "category_id": 0, "bbox": [0.25, 0.5, 0.5, 0.25]}]),
            "COCO boxes are pixels",
        ),
    ],
)
def test_fatal_mistakes(tmp_path: Path, content: object, words: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError) as caught:
        load_coco(path)
    message = str(caught.value)
    assert words in message and str(path) in message and "\n" not in message


def test_missing_annotation_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_coco(tmp_path / "none.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        load_coco(tmp_path / "folder.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00\x01\xd8")
    with pytest.raises(InputError, match="cannot be read"):
        load_coco(tmp_path / "binary.json")


def test_byte_order_mark(tmp_path: Path) -> None:
    assert len(load_coco(write(tmp_path, "\ufeff" + json.dumps(GOOD))).records) == 3


def test_spoilt_boxes_are_counted(tmp_path: Path) -> None:
    index = load_boxes(
        tmp_path,
        {"bbox": [1, 1, 4, 4]},  # the one good box
        {"bbox": [1, 1, float("nan"), 4]},
        {"bbox": [1, 1, float("inf"), 4]},
        {"bbox": [1, 1, 10**400, 4]},
        {"bbox": [1, 1, 4]},
        {"bbox": None},
        {"bbox": ["1", "1", "2", "2"]},
        {},
        {"bbox": [1, 1, 0, 4]},
        {"bbox": [5, 5, -3, 4]},
        {"bbox": [50, 5, 3, 4]},  # right of the image
        {"bbox": [-9, 5, 9, 4]},  # touches the left border from outside
        {"image_id": 99, "bbox": [1, 1, 4, 4]},
        {"image_id": None, "bbox": [1, 1, 4, 4]},
        {"category_id": 4, "bbox": [1, 1, 4, 4]},
        {"id": 1, "category_id": 17, "bbox": [2, 2, 4, 4]},
        {"category_id": 90, "bbox": [2, 2, 4, 4]},
    )
    assert index.problems.counts == {
        "annotation of an unknown image": 2,
        "annotation of an unknown or unwanted category": 1,
        "box without its four numbers": 7,
        "annotation id used again": 1,
        "box of no size": 2,
        "box outside its image": 2,
    }
    assert len(index.problems) == 15 == len(set(index.problems))  # each of them once, none cut off
    assert {problem.done for problem in index.problems} == {"dropped", "noted"}
    np.testing.assert_array_equal(index.records[0].boxes_xywh, [[1, 1, 4, 4], [2, 2, 4, 4], [2, 2, 4, 4]])
    line = next(line for line in index.problems.lines() if "no size" in line)
    assert line == (
        f"box of no size: 2 dropped in {index.annotations} (annotation 9 of image 7: x y width height = 1 1 0 4; "
        "annotation 10 of image 7: x y width height = 5 5 -3 4)"
    )
    line = next(line for line in index.problems.lines() if "four numbers" in line)
    assert ": 7 dropped in" in line and line.endswith("; ...)") and line.count("annotation ") == 3


def test_boxes_are_clipped(tmp_path: Path) -> None:
    index = load_boxes(
        tmp_path,
        {"bbox": [-5, -6, 10, 10], "area": 70},
        {"bbox": [35, 25, 100, 100]},
        {"bbox": [10, 10, 30.2, 5]},  # 0.2 px too far: rounding, clipped but not told
        *[{"bbox": [1, 1, 2, 2]}] * 5,
    )
    np.testing.assert_allclose(
        index.records[0].boxes_xywh[:3], [[0, 0, 5, 4], [35, 25, 5, 5], [10, 10, 30, 5]], rtol=0, atol=1e-12
    )
    assert index.records[0].areas[:2].tolist() == [70, 25]  # the file's area stays
    assert index.problems.counts["box beyond its image's border"] == 2


def test_corner_boxes_are_suspected(tmp_path: Path) -> None:
    """Boxes given as x1 y1 x2 y2 leave the image when read as COCO's."""
    index = load_boxes(tmp_path, {"bbox": [20, 15, 38, 28]}, {"bbox": [25, 5, 30, 12]}, {"bbox": [1, 1, 5, 5]})
    assert any("x1 y1 x2 y2" in line for line in index.problems.lines())


def test_wanted_class_names(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    index = load_coco(path, class_names=("bus", "car"))
    assert index.class_names == ("bus", "car") and index.category_ids == (90, 0)
    assert index.records[0].labels.tolist() == [1] and index.records[1].labels.tolist() == [0]
    assert index.problems.counts == {"annotation of an unknown or unwanted category": 1}
    with pytest.raises(InputError, match="no category 'tram'"):
        load_coco(path, class_names=("car", "tram"))


def test_categories_of_one_name(tmp_path: Path) -> None:
    categories = [{"id": 0, "name": "car"}, {"id": 17, "name": "car"}, {"id": 90, "name": "bus"}]
    index = load_coco(write(tmp_path, changed(categories=categories)))
    assert index.class_names == ("car", "bus") and index.category_ids == (0, 90)
    assert index.records[1].labels.tolist() == [1, 0]
    assert index.problems.counts == {"categories of one name": 1}


def test_the_used_category_of_one_name_is_kept(tmp_path: Path) -> None:
    """Roboflow lists the project as category 0, and often a class of the same name, which has all the boxes."""
    categories = [{"id": 0, "name": "car"}, {"id": 17, "name": "car"}]
    annotations = [{"id": 1, "image_id": 7, "category_id": 17, "bbox": [1, 1, 5, 5]}]
    index = load_coco(write(tmp_path, changed(categories=categories, annotations=annotations)))
    assert index.category_ids == (17,) and index.to_coco()["annotations"][0]["category_id"] == 17


def test_ids_written_as_text(tmp_path: Path) -> None:
    document = copy.deepcopy(GOOD)
    for entry in (*document["images"], *document["categories"]):
        entry["id"] = f"{entry['id']:04d}"
    for entry in document["annotations"][:2]:  # one stays a number
        entry["image_id"], entry["category_id"] = f"{entry['image_id']:04d}", str(entry["category_id"])
    index = load_coco(write(tmp_path, document))
    assert [record.image_id for record in index.records] == [7, 3, 5] and index.category_ids == (0, 17, 90)
    assert [record.labels.tolist() for record in index.records] == [[0], [2, 1], []] and not index.problems
    for bad in ("a7", "7.0", 10**30, 1e30, True):
        document["images"][0]["id"] = bad
        with pytest.raises(InputError, match="without an integer id: 1 "):
            load_coco(write(tmp_path, document))


@pytest.mark.parametrize(
    ("marks", "ignored"),
    [
        ({"iscrowd": 1}, True),
        ({"iscrowd": True}, True),
        ({"iscrowd": "1"}, True),
        ({"iscrowd": "0"}, False),
        ({"iscrowd": None}, False),
        ({"iscrowd": "false", "ignore": 0.0}, False),
        ({"iscrowd": 0, "ignore": 1}, True),
        ({"ignore": 0}, False),
        ({"ignore": False}, False),
    ],
)
def test_what_marks_a_region_to_ignore(tmp_path: Path, marks: dict[str, Any], ignored: bool) -> None:
    index = load_boxes(tmp_path, {"bbox": [1, 1, 5, 5], **marks})
    assert index.records[0].iscrowd.tolist() == [ignored]


def test_polygons_without_a_box(tmp_path: Path) -> None:
    polygons = [[4, 5, 10, 5, 10.5, 9], [2, 6, 3, 6, 3, 7, 2, 7]]
    index = load_boxes(
        tmp_path,
        {"segmentation": polygons},
        {"bbox": [], "segmentation": polygons[:1]},
        {"bbox": [1, 1, 4], "segmentation": polygons},  # a spoilt box stays one
        {"segmentation": {"counts": "abc", "size": [30, 40]}},
        {"segmentation": [[4, 5, float("nan"), 5, 10, 9]]},
        {"segmentation": []},
    )
    assert index.records[0].boxes_xywh.tolist() == [[2, 5, 8.5, 4], [4, 5, 6.5, 4]]
    counts = index.problems.counts
    assert counts["annotation without 'bbox': the box of its polygons is taken"] == 2
    assert counts["box without its four numbers"] == 4


def test_unused_class_is_told(tmp_path: Path) -> None:
    index = load_coco(write(tmp_path, changed(annotations=GOOD["annotations"][:2])))
    assert index.problems.lines() == [f"class without any box: 1 noted in {index.annotations} ('van')"]


@pytest.mark.parametrize("folder", [".", "data", "images"])
def test_image_folder_is_found(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder, GOOD)
    path = tmp_path / "data.json"
    path.write_text(json.dumps(GOOD))
    index = load_coco(path)
    assert index.records[0].path == tmp_path / folder / "a.png"
    assert load_coco(path, tmp_path / folder).records[1].path == tmp_path / folder / "sub" / "b.png"


def test_missing_images(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    (tmp_path / "sub" / "b.png").unlink()
    with pytest.raises(InputError) as caught:
        load_coco(path)
    assert "(3 images)" in str(caught.value) and "missing: 1" in str(caught.value) and "sub/b.png" in str(caught.value)
    assert f"folder {tmp_path})" in str(caught.value)
    with pytest.raises(InputError, match="image folder .*nowhere does not exist"):
        load_coco(path, tmp_path / "nowhere")
    index = load_coco(path, require_images=False)
    assert index.records[1].path.name == "b.png" and index.num_objects == 2


def test_windows_separators(tmp_path: Path) -> None:
    document = copy.deepcopy(GOOD)
    document["images"][1]["file_name"] = "sub\\b.png"
    assert load_coco(write(tmp_path, document)).records[1].path == tmp_path / "sub" / "b.png"


def test_size_differs(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, {"a.png": (80, 60), "sub/b.png": (20, 50), "empty.png": (8, 8)})
    with pytest.raises(InputError) as caught:
        load_coco(path)
    assert "80 x 60" in str(caught.value) and "40 x 30" in str(caught.value) and "a.png" in str(caught.value)


def test_size_absent(tmp_path: Path) -> None:
    document = copy.deepcopy(GOOD)
    del document["images"][0]["width"]
    path = write(tmp_path, document)
    assert (load_coco(path).records[0].width, load_coco(path).records[0].height) == (40, 30)
    with pytest.raises(InputError, match="without 'width' and 'height'"):
        load_coco(path, require_images=False)


@pytest.mark.parametrize(("size", "apply_exif"), [((30, 40), True), ((40, 30), False)])
def test_declared_size_decides_about_exif(tmp_path: Path, size: tuple[int, int], apply_exif: bool) -> None:
    """A file stored as 40 x 30 that EXIF shows as 30 x 40: either may be what the boxes refer to."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    path = tmp_path / "x.json"
    image = {"id": 1, "file_name": "a.jpg", "width": size[0], "height": size[1]}
    path.write_text(json.dumps({"images": [image], "annotations": [], "categories": [{"id": 1, "name": "c"}]}))
    record = load_coco(path).records[0]
    assert (record.width, record.height) == size and record.apply_exif is apply_exif


def test_broken_image_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    (tmp_path / "empty.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"not an image: 1 in .*empty\.png"):
        load_coco(path)


def test_ground_truth_round_trip(tmp_path: Path) -> None:
    index = load_coco(write(tmp_path, GOOD))
    again = tmp_path / "again.json"
    again.write_text(json.dumps(index.to_coco()))
    copied = load_coco(again)
    assert copied.class_names == index.class_names and copied.category_ids == index.category_ids
    for ours, theirs in zip(index.records, copied.records, strict=True):
        assert ours.image_id == theirs.image_id
        np.testing.assert_array_equal(ours.boxes_xywh, theirs.boxes_xywh)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        np.testing.assert_array_equal(ours.areas, theirs.areas)
        np.testing.assert_array_equal(ours.iscrowd, theirs.iscrowd)
    bboxes = [entry["bbox"] for entry in index.to_coco()["annotations"]]
    assert bboxes == [[10, 10, 5, 5], [1, 2, 3.5, 4.25], [0, 0, 20, 50]]


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ([30, 5, 20, 5], "border"),
        ([100, 100, 5, 5], "outside"),
        ([3, 3, 0, 4], "no size"),
        ([3, 3, None, 4], "four numbers"),
    ],
)
def test_bad_boxes_are_refused_where_nobody_asked_to_mend_them(tmp_path: Path, box: list[Any], words: str) -> None:
    good = {"bbox": [1, 1, 5, 5]}
    index = load_boxes(tmp_path, good, {"bbox": box, "id": 77}, good, good)
    with pytest.raises(InputError, match=rf"{re.escape(str(index.annotations))}.*{words}.*77.*data\.bad_boxes mend"):
        index.refuse_bad_boxes()
    load_boxes(tmp_path, good).refuse_bad_boxes()  # nothing to mend: nothing to refuse
