"""YOLO's layout: hand-made files, good and bad, held to supervision's reader where it reads them too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import supervision
from PIL import Image

from crossdino.data import DataError, DatasetIndex, find_splits, load_dataset
from crossdino.errors import InputError


def write(
    folder: Path, labels: Mapping[str, str | None], yaml: str = "names: [cat, dog]\ntrain: images/train\n"
) -> Path:
    """Images of 200 x 100 pixels with these label lines (None: no file), and data.yaml."""
    for name, text in labels.items():
        image = folder / "images" / "train" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100)).save(image, format="PNG")
        if text is not None:
            label = (folder / "labels" / "train" / name).with_suffix(".txt")
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(text, encoding="utf-8")
    (folder / "data.yaml").write_text(yaml, encoding="utf-8")
    return folder / "data.yaml"


def load_lines(folder: Path, *lines: str, yaml: str = "names: [cat, dog]\ntrain: images/train\n") -> DatasetIndex:
    """One image with these lines, besides one that has a good box of each class."""
    good = "0 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1\n"
    return load_dataset(write(folder, {"a.png": "\n".join(lines), "good.png": good}, yaml))


def boxes(index: DatasetIndex) -> list[list[float]]:
    return index.records[0].boxes_xywh.round(9).tolist()


def test_lines_become_boxes(tmp_path: Path) -> None:
    labels = {"b c.PNG": "1 0.5 0.5 0.25 0.5\n\n0 0.1 0.2 0.1 0.2\n", "ä.png": "", "z.png": None}
    index = load_dataset(write(tmp_path, labels))
    assert index.class_names == ("cat", "dog") and index.category_ids == (0, 1)
    first, empty, without = index.records
    assert first.path == tmp_path / "images" / "train" / "b c.PNG" and (first.width, first.height) == (200, 100)
    # cx * 200 - w * 200 / 2 and so on, by hand
    np.testing.assert_allclose(first.boxes_xywh, [[75, 25, 50, 50], [10, 10, 20, 20]], rtol=0, atol=1e-12)
    assert first.labels.tolist() == [1, 0] and first.areas.tolist() == pytest.approx([2500, 400])
    assert not first.iscrowd.any()
    assert {empty.path.name, without.path.name} == {"ä.png", "z.png"} and index.num_objects == 2
    assert [record.image_id for record in index.records] == [1, 2, 3]
    (problem,) = index.problems
    assert problem.what.startswith("image without a label file") and problem.file.endswith("z.png")


def test_supervision_reads_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = {}
    for name in ("a.png", "b.png", "c.png"):
        centers, sizes = rng.uniform(0.3, 0.7, (4, 2)), rng.uniform(0.01, 0.5, (4, 2))
        rows = np.column_stack([rng.integers(0, 2, 4), centers, sizes])
        labels[name] = "".join(f"{int(row[0])} {' '.join(f'{x:.6f}' for x in row[1:])}\n" for row in rows)
    yaml = write(tmp_path, labels)
    index = load_dataset(yaml)
    folders = str(tmp_path / "images" / "train"), str(tmp_path / "labels" / "train")
    theirs = supervision.DetectionDataset.from_yolo(*folders, data_yaml_path=str(yaml))
    assert theirs.classes == list(index.class_names)
    for record in index.records:
        found = theirs.annotations[str(record.path)]
        corners = record.boxes_xywh + np.pad(record.boxes_xywh[:, :2], ((0, 0), (2, 0)))
        np.testing.assert_allclose(corners, found.xyxy, rtol=0, atol=1e-4)  # theirs are float32
        np.testing.assert_array_equal(record.labels, found.class_id)


@pytest.mark.parametrize(
    ("line", "box"),
    [
        ("1 0.1 0.2 0.3 0.2 0.2 0.6", [20, 20, 40, 40]),  # a triangle
        ("1 0.5 0.1 0.9 0.5 0.5 0.9 0.1 0.5", [20, 10, 160, 80]),  # an oriented box
        ("1.0 5e-1 .5 0.25 0.5", [75, 25, 50, 50]),
        ("1\t0.5  0.5 0.25 0.5 ", [75, 25, 50, 50]),
        ("1 0.5 0.5 1.004 0.5", [0, 25, 200, 50]),  # 0.4 px too far on each side: rounding
    ],
)
def test_other_forms_of_a_line(tmp_path: Path, line: str, box: list[float]) -> None:
    index = load_lines(tmp_path, line)
    assert boxes(index) == [box] and index.records[0].labels.tolist() == [1] and not index.problems


def test_pose_lines_keep_their_box(tmp_path: Path) -> None:
    yaml = "names: {0: cat, 1: dog}\ntrain: images/train\nkpt_shape: [2, 2]\n"
    pose = "1 0.5 0.5 0.25 0.5 0.1 0.1 0.2 0.2"  # without kpt_shape: an oriented box
    index = load_lines(tmp_path, pose, "0 0.5 0.5 0.1 0.1", "1 0.1 0.2 0.3 0.2 0.2 0.6", yaml=yaml)
    assert boxes(index) == [[75, 25, 50, 50], [90, 45, 20, 10]]
    assert [problem.detail[:8] for problem in index.problems] == ["7 values"]


@pytest.mark.parametrize(
    ("line", "what", "done", "box"),
    [
        ("2 0.5 0.5 0.1 0.1", "class without a name", "dropped", None),
        ("-1 0.5 0.5 0.1 0.1", "class without a name", "dropped", None),
        ("0.5 0.5 0.5 0.1 0.1", "class without a name", "dropped", None),
        ("cat 0.5 0.5 0.1 0.1", "box without its four numbers", "dropped", None),
        ("0,0.5,0.5,0.1,0.1", "box without its four numbers", "dropped", None),
        ("0 0.5 0.5 0.1", "box without its four numbers", "dropped", None),
        ("0", "box without its four numbers", "dropped", None),
        ("0 0.5 0.5 0.1 0.1 0.1 0.1 0.1", "box without its four numbers", "dropped", None),
        ("0 nan 0.5 0.1 0.1", "box without its four numbers", "dropped", None),
        ("0 0.5 0.5 inf 0.1", "box without its four numbers", "dropped", None),
        ("0 0.5 0.5 0 0.1", "box of no size", "dropped", None),
        ("0 0.5 0.5 -0.1 0.1", "box of no size", "dropped", None),
        ("0 1.5 0.5 0.1 0.1", "box outside its image", "dropped", None),
        ("0 1.0 0.5 0.1 0.1", "box beyond its image's border", "clipped", [190, 45, 10, 10]),
        ("0 0.5 0.5 0.1 0.1 0.93", "sixth value, taken for a confidence", "noted", [90, 45, 20, 10]),
    ],
)
def test_every_problem_is_listed_once(tmp_path: Path, line: str, what: str, done: str, box: list[float] | None) -> None:
    index = load_lines(tmp_path, "1 0.5 0.5 0.25 0.5", line)
    assert boxes(index) == [[75, 25, 50, 50]] + ([box] if box else [])
    (problem,) = index.problems
    label = tmp_path / "labels" / "train" / "a.txt"
    assert (problem.file, problem.annotation) == (str(label), "line 2")
    assert (problem.what, problem.done) == (what, done) and problem.detail
    if done == "noted":
        index.refuse_bad_boxes()
    else:
        with pytest.raises(DataError, match="a.txt.*line 2.*--data.bad_boxes mend") as caught:
            index.refuse_bad_boxes()
        assert caught.value.problems == index.problems


def test_repeated_lines(tmp_path: Path) -> None:
    line = "1 0.5 0.5 0.25 0.5"
    index = load_lines(tmp_path, line, line, "0 0.5 0.5 0.25 0.5", line)
    assert boxes(index) == [[75, 25, 50, 50]] * 2 and index.records[0].labels.tolist() == [1, 0]
    assert [(problem.annotation, problem.what) for problem in index.problems] == [
        ("line 2", "box given twice"),
        ("line 4", "box given twice"),
    ]


def test_pixels_instead_of_shares(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="YOLO boxes are shares of the image's size"):
        load_dataset(write(tmp_path, {"a.png": "0 100 50 20 10\n1 30 30 5 5\n", "b.png": "0 70 50 20 10\n"}))


def test_files_that_belong_to_nothing(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.png": "0 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1", "._a.png": None})
    (tmp_path / "images" / "train" / "._a.png").write_bytes(b"left by an operating system")
    for name in ("classes.txt", "other.txt"):
        (tmp_path / "labels" / "train" / name).write_text("0 0.5 0.5 0.1 0.1")
    index = load_dataset(source)
    assert len(index.records) == 1
    assert [(Path(problem.file).name, problem.what) for problem in index.problems] == [
        ("other.txt", "label file without an image")
    ]


def test_folders_in_folders(tmp_path: Path) -> None:
    """One folder a class: labels in folders of the same names, and those without an image are found there."""
    line = "0 0.5 0.5 0.1 0.1"
    source = write(tmp_path, {"cat/a b.1.png": line, "dog/a b.1.png": "1 0.5 0.5 0.1 0.1", "dog/c.png": ""})
    (tmp_path / "labels" / "train" / "cat" / "lost.txt").write_text(line)
    (tmp_path / "labels" / "train" / "gone").mkdir()
    (tmp_path / "labels" / "train" / "gone" / "lost too.TXT").write_text(line)
    index = load_dataset(source)
    assert [record.labels.tolist() for record in index.records] == [[0], [1], []]
    assert [Path(problem.file).name for problem in index.problems] == ["lost.txt", "lost too.TXT"]


def test_label_files_in_upper_case(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.png": "0 0.5 0.5 0.1 0.1", "b.png": "1 0.5 0.5 0.1 0.1"})
    (tmp_path / "labels" / "train" / "a.txt").rename(tmp_path / "labels" / "train" / "a.TXT")
    index = load_dataset(source)
    assert index.num_objects == 2 and not index.problems


def test_links_that_lead_back(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.png": "0 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1", "b/c.png": ""})
    (tmp_path / "images" / "train" / "b" / "up").symlink_to(tmp_path / "images" / "train")
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.new("RGB", (20, 20)).save(outside / "d.png")
    (tmp_path / "images" / "train" / "e").symlink_to(outside)
    assert [record.path.name for record in load_dataset(source).records] == ["a.png", "c.png", "d.png"]


def test_no_label_file_at_all(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.png": None, "b.png": None})
    with pytest.raises(InputError, match=r"none of the 2 images in .*labels/train/a\.txt.*put the labels there"):
        load_dataset(source)


def test_unreadable_files_are_collected(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.png": "0 0.5 0.5 0.1 0.1", "b.png": "0 0.5 0.5 0.1 2", "c.png": "", "d.png": ""})
    (tmp_path / "labels" / "train" / "a.txt").write_bytes(b"0 \xff\xfe")
    (tmp_path / "images" / "train" / "c.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="label file cannot be read: 1 in .*a.txt") as caught:
        load_dataset(source)
    assert "not an image: 1 in" in str(caught.value) and "\n" not in str(caught.value)
    assert [problem.done for problem in caught.value.problems].count("fatal") == 2
    assert any(problem.done == "clipped" for problem in caught.value.problems)  # the others are found all the same


def test_names_of_all_kinds(tmp_path: Path) -> None:
    yaml = "names:\n  0: no\n  5: 1\n  9: ignored regions\ntrain: images/train\n"
    labels = {"a.png": "5 0.5 0.5 0.1 0.1\n0 0.2 0.2 0.1 0.1\n9 0.5 0.5 1 1\n3 0.5 0.5 0.1 0.1"}
    index = load_dataset(write(tmp_path, labels, yaml), ignore_categories=["ignored regions"])
    assert index.class_names == ("no", "1") and index.category_ids == (0, 5)  # no YAML guesses: neither False nor 1
    assert index.records[0].labels.tolist() == [1, 0, -1] and index.records[0].iscrowd.tolist() == [False, False, True]
    assert index.num_objects == 2
    assert [problem.detail for problem in index.problems] == ["class 3, known are 0, 5, 9"]
    crowds = [entry for entry in index.to_coco()["annotations"] if entry["iscrowd"]]
    assert [(entry["category_id"], entry["bbox"]) for entry in crowds] == [(0, [0, 0, 200, 100]), (5, [0, 0, 200, 100])]
    with pytest.raises(InputError, match="no category 'ignored region' to ignore.*did you mean 'ignored regions'"):
        load_dataset(tmp_path, ignore_categories=["ignored region"])


def test_wanted_names(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.png": "0 0.5 0.5 0.1 0.1\n1 0.2 0.2 0.1 0.1"})
    index = load_dataset(source, class_names=("dog", "horse"))
    assert index.class_names == ("dog", "horse") and index.category_ids == (1, 2)
    assert index.records[0].labels.tolist() == [0]
    assert index.problems.counts == {"object of an unwanted class": 1, "class without any box": 1}
    with pytest.raises(InputError, match="no category 'tram'"):
        load_dataset(source, class_names=("tram", "bus"))


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("names: [cat]\nnc: 2\ntrain: images/train\n", "nc is 2, but 'names' has 1"),
        ("names: []\ntrain: images/train\n", "has no 'names'"),
        ("names: {a: cat}\ntrain: images/train\n", "class index to name"),
        ("names: [cat, '']\ntrain: images/train\n", "is empty"),
        ("names: [cat]\ntrain: images/trian\n", "images/trian for train, which does not exist"),
        ("names: [cat]\ntrain: images/train\nval: nowhere\n", "nowhere for val, which does not exist"),
        ("names: [cat]\ntrain: [images/train, more]\n", "more for train, which does not exist"),
        ("names: [cat]\nkpt_shape: [a, 3]\ntrain: images/train\n", "'kpt_shape' is ['a', '3']"),
        ("train: images/train\n", "does not describe data"),
        ("names: [cat\n", "not a YAML file"),
    ],
)
def test_bad_data_files(tmp_path: Path, yaml: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_dataset(write(tmp_path, {"a.png": ""}, yaml))
    assert words in str(caught.value) and "data.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_splits_of_a_data_file(tmp_path: Path) -> None:
    """`path` of another machine, Roboflow's ../train/images, a list, two folders, a test split left out."""
    label = "0 0.5 0.5 0.1 0.1\n"
    for place in ("train/images", "more/images", "valid/images"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place.replace("images", "labels")).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / place / "a.JPG", format="JPEG")
        (tmp_path / place.replace("images", "labels") / "a.txt").write_text(label)
    (tmp_path / "val.txt").write_text("./valid/images/a.JPG\n\nvalid\\images\\a.JPG\n")
    (tmp_path / "dataset.yml").write_text(
        "path: C:\\data\nnames: [cat]\nnc: 1\nroboflow: {url: x}\ndownload: |\n  code\n"
        "train: [../train/images, more/images]\nval: val.txt\ntest: ../test/images\n"
    )
    assert list(find_splits(tmp_path)) == ["train", "val"]
    assert [record.path.parts[-3:] for record in load_dataset(tmp_path).records] == [
        ("train", "images", "a.JPG"),
        ("more", "images", "a.JPG"),
    ]
    val = load_dataset(tmp_path, "validation")
    assert val.num_objects == 1 and val.problems.counts == {"image listed twice": 1}
    with pytest.raises(InputError, match="no split 'test', only 'train', 'val'"):
        load_dataset(tmp_path, "test")
    with pytest.raises(InputError, match="unknown split 'training'"):
        load_dataset(tmp_path, "training")


def test_lists_are_relative_to_the_path(tmp_path: Path) -> None:
    """The YAML file, the lists and the images may lie in three places."""
    write(tmp_path / "birds", {"a.png": "0 0.5 0.5 0.1 0.1", "b.png": "1 0.5 0.5 0.1 0.1"})
    (tmp_path / "birds" / "lists").mkdir()
    (tmp_path / "birds" / "lists" / "train.txt").write_text("images/train/a.png\r\n../images/train/b.png\r\n")
    (tmp_path / "birds.yaml").write_text("path: birds\ntrain: lists/train.txt\nnames: {0: cat, 1: dog}\n")
    index = load_dataset(tmp_path / "birds.yaml")
    assert [record.labels.tolist() for record in index.records] == [[0], [1]]


def test_missing_image_of_a_list(tmp_path: Path) -> None:
    source = write(tmp_path, {"a.png": ""}, "names: [cat]\ntrain: list.txt\n")
    (tmp_path / "list.txt").write_text("images/train/a.png\nimages/train/b.png\n")
    with pytest.raises(DataError, match=r"\(2 images\).*image is missing: 1 in .*images/train/b\.png"):
        load_dataset(source)
    (tmp_path / "list.txt").write_text("/another/machine/a.png\n")
    with pytest.raises(DataError, match="image is missing: 1 in /another/machine/a.png"):
        load_dataset(source)


@pytest.mark.parametrize(
    "layout", ["images/train:labels/train", "train/images:train/labels", "images:labels", "train:train"]
)
def test_folders_without_a_data_file(tmp_path: Path, layout: str) -> None:
    images, labels = (tmp_path / part for part in layout.split(":"))
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20)).save(images / "a.png")
    (labels / "a.txt").write_text("1 0.5 0.5 0.1 0.1\n")
    with pytest.raises(InputError, match="tells no class names; write data.yaml with 'names', or classes.txt"):
        load_dataset(tmp_path)
    (labels / "classes.txt").write_text("cat\nsmall dog\n")
    index = load_dataset(tmp_path)
    assert index.class_names == ("cat", "small dog") and index.records[0].labels.tolist() == [1]
    (labels / "classes.txt").unlink()
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\n")  # names alone
    assert load_dataset(tmp_path).class_names == ("cat", "dog")


def test_images_in_a_folder_of_that_name(tmp_path: Path) -> None:
    """The last `images` of a path is the one that becomes `labels`; labels beside the image are found too."""
    for name, text in (("a", "0 0.5 0.5 0.1 0.1"), ("b", "1 0.5 0.5 0.1 0.1")):
        write(tmp_path / "images", {f"{name}.png": text})
    root = tmp_path / "images"
    (root / "labels" / "train" / "b.txt").rename(root / "images" / "train" / "b.txt")
    assert [record.labels.tolist() for record in load_dataset(root).records] == [[0], [1]]


def test_records_are_as_of_coco(tmp_path: Path) -> None:
    record = load_lines(tmp_path, "0 0.5 0.5 0.1 0.1").records[0]
    kinds = {field.name: type(getattr(record, field.name)).__name__ for field in dataclasses.fields(record)}
    assert kinds["boxes_xywh"] == "ndarray" and record.boxes_xywh.dtype == np.float64
    assert record.labels.dtype == np.int64 and record.iscrowd.dtype == np.bool_ and record.areas.dtype == np.float64
