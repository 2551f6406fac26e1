"""Pascal VOC's layout: hand-made files, good and bad, held to supervision's reader where it reads them too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import supervision
from PIL import Image

from crossdino.data import DataError, DatasetIndex, find_splits, load_dataset
from crossdino.errors import InputError


def item(name: str = "cat", box: Sequence[object] = (1, 1, 10, 10), more: str = "") -> str:
    corners = "".join(
        f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


def sheet(*objects: str, filename: str = "", size: tuple[int, int] | None = (40, 30)) -> str:
    declared = (
        "" if size is None else f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    )
    return f"<annotation><filename>{filename}</filename>{declared}{''.join(objects)}</annotation>"


def write(
    folder: Path, sheets: dict[str, str | None], images: str = "JPEGImages", sheets_in: str = "Annotations"
) -> Path:
    """Images of 40 x 30 pixels and their XML files (None: no XML file)."""
    (folder / images).mkdir(parents=True, exist_ok=True)
    (folder / sheets_in).mkdir(parents=True, exist_ok=True)
    for name, text in sheets.items():
        Image.new("RGB", (40, 30)).save(folder / images / name, format="PNG")
        if text is not None:
            (folder / sheets_in / name).with_suffix(".xml").write_text(text, encoding="utf-8")
    return folder


def load_objects(folder: Path, *objects: str) -> DatasetIndex:
    return load_dataset(write(folder, {"a.png": sheet(*objects), "b.png": sheet(item())}))


def boxes(index: DatasetIndex, position: int = 0) -> list[list[float]]:
    return index.records[position].boxes_xywh.tolist()


def test_corners_are_counted_from_1(tmp_path: Path) -> None:
    """The pixel of the second corner belongs to the object: 1..40 is the whole image."""
    index = load_objects(tmp_path, item("dog", (1, 1, 40, 30)), item("cat", (5, 6, 5, 8)), item("cat", (2.5, 3, 4, 5)))
    assert boxes(index) == [[0, 0, 40, 30], [4, 5, 1, 3], [1.5, 2, 2.5, 3]]
    assert index.class_names == ("cat", "dog") and index.category_ids == (1, 2)
    assert index.records[0].labels.tolist() == [1, 0, 0] and index.records[0].areas.tolist() == [1200, 3, 7.5]
    assert [record.image_id for record in index.records] == [1, 2] and not index.problems


def test_a_corner_at_0_means_counting_from_0(tmp_path: Path) -> None:
    """In whichever split it lies: both are read the same way, and it is told."""
    write(tmp_path, {"a.png": sheet(item("cat", (3, 4, 9, 9))), "b.png": sheet(item("cat", (0, 2, 9, 9)))})
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("b\n")
    train, val = load_dataset(tmp_path), load_dataset(tmp_path, "val", class_names=("cat",))
    assert boxes(train) == [[3, 4, 6, 5]] and boxes(val) == [[0, 2, 9, 7]]
    for index in (train, val):
        (problem,) = index.problems
        assert problem.done == "noted" and "counted from 0" in problem.what and problem.annotation == "object 1"
        assert problem.file == str(tmp_path / "Annotations" / "b.xml")


def test_an_empty_box_at_0_proves_nothing(tmp_path: Path) -> None:
    index = load_objects(tmp_path, item("cat", (3, 4, 9, 9)), item("cat", (0, 0, 0, 0)))
    assert boxes(index)[0] == [2, 3, 7, 6]


@pytest.mark.parametrize("start", [1, 0])
def test_supervision_reads_the_same(tmp_path: Path, start: int) -> None:
    """Where corners are counted from 1; it does not know the other way."""
    rng = np.random.default_rng(0)
    sheets = {}
    for name in ("a.png", "b.png"):
        first, extent = rng.integers(1, 15, (3, 2)), rng.integers(1, 15, (3, 2))
        first[0, 0] = start
        rows = np.hstack([first, first + extent])
        sheets[name] = sheet(*[item("cat", row.tolist()) for row in rows], filename=name)
    index = load_dataset(write(tmp_path, sheets))
    theirs = supervision.DetectionDataset.from_pascal_voc(str(tmp_path / "JPEGImages"), str(tmp_path / "Annotations"))
    for record in index.records:
        found = theirs.annotations[str(record.path)]
        corners = record.boxes_xywh + np.pad(record.boxes_xywh[:, :2], ((0, 0), (2, 0)))
        np.testing.assert_array_equal(corners - [1 - start, 1 - start, 0, 0], found.xyxy)


def test_difficult_objects_are_ignored(tmp_path: Path) -> None:
    index = load_objects(
        tmp_path,
        item("cat", (1, 1, 5, 5), "<difficult>1</difficult>"),
        item("cat", (6, 6, 9, 9), "<difficult>0</difficult>"),
        item("dog", (2, 2, 4, 4), "<pose>Left</pose><truncated>1</truncated>"),
    )
    assert index.records[0].iscrowd.tolist() == [True, False, False] and index.records[0].labels.tolist() == [0, 0, 1]
    assert index.num_objects == 3


def test_parts_of_an_object_are_no_objects(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
    index = load_objects(tmp_path, item("cat", (1, 1, 9, 9), part))
    assert index.class_names == ("cat",) and boxes(index) == [[0, 0, 9, 9]]


@pytest.mark.parametrize(
    ("bad", "what", "done", "box"),
    [
        ("<object><name>cat</name></object>", "box without its four numbers", "dropped", None),
        (item("cat", (1, "", 3, 4)), "box without its four numbers", "dropped", None),
        (item("cat", (1, "x", 3, 4)), "box without its four numbers", "dropped", None),
        (item("cat", (1, "nan", 3, 4)), "box without its four numbers", "dropped", None),
        (item("", (1, 1, 3, 4)), "class without a name", "dropped", None),
        (item("cat", (9, 2, 5, 8)), "box of no size", "dropped", None),
        (item("cat", (5, 9, 8, 8)), "box of no size", "dropped", None),
        (item("cat", (50, 5, 60, 9)), "box outside its image", "dropped", None),
        (item("cat", (35, 5, 60, 9)), "box beyond its image's border", "clipped", [34, 4, 6, 5]),
        (item("cat", (1, 1, 10, 10)), "box given twice", "dropped", None),
    ],
)
def test_every_problem_is_listed_once(tmp_path: Path, bad: str, what: str, done: str, box: list[float] | None) -> None:
    index = load_objects(tmp_path, item(), bad)
    assert boxes(index) == [[0, 0, 10, 10]] + ([box] if box else [])
    (problem,) = index.problems
    assert (problem.file, problem.annotation) == (str(tmp_path / "Annotations" / "a.xml"), "object 2")
    assert (problem.what, problem.done) == (what, done) and problem.detail


def test_classes_come_from_the_training_split(tmp_path: Path) -> None:
    for split, names in (("train", ("dog", "cat")), ("valid", ("cow", "cat")), ("test", ())):
        folder = tmp_path / split
        write(folder, {f"{split}.png": sheet(*[item(name) for name in names])}, ".", ".")
    assert list(find_splits(tmp_path)) == ["train", "val", "test"]
    train, val = load_dataset(tmp_path), load_dataset(tmp_path, "val")
    assert train.class_names == val.class_names == ("cat", "dog") and not train.problems
    assert val.records[0].labels.tolist() == [0]  # fine without a dog
    assert val.problems.counts == {"object of an unknown or unwanted class": 1, "class without any box": 1}
    assert [problem.detail for problem in val.problems] == ["cow", "'dog'"]
    again = load_dataset(tmp_path, "valid", class_names=("cow", "zebra"))
    assert again.class_names == ("cow", "zebra") and again.category_ids == (1, 2)
    with pytest.raises(InputError, match="none of the wanted classes"):
        load_dataset(tmp_path, class_names=("zebra",))


def test_ignored_names(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": sheet(item("cat"), item("crowd of cats", (5, 5, 40, 30))), "b.png": sheet(item("dog"))})
    index = load_dataset(tmp_path, ignore_categories=("crowd of cats",))
    assert index.class_names == ("cat", "dog") and index.category_ids == (1, 2) and index.num_objects == 2
    assert index.records[0].labels.tolist() == [0, -1] and index.records[0].iscrowd.tolist() == [False, True]
    with pytest.raises(InputError, match="'crowd of cat' to ignore.*did you mean 'crowd of cats'"):
        load_dataset(tmp_path, ignore_categories=("crowd of cat",))
    # A validation split need not have any.
    (tmp_path / "Annotations" / "a.xml").write_text(sheet(item("cat")))
    assert load_dataset(tmp_path, class_names=("cat", "dog"), ignore_categories=("crowd of cats",)).num_objects == 2


def test_lists_of_images(tmp_path: Path) -> None:
    write(tmp_path, {name: sheet(item()) for name in ("a b.png", "c.JPG", "ü.jpeg", "d.png")})
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "trainval.txt").write_text("ü\nc 1\n\na b -1\nc\n", encoding="utf-8")
    (lists / "test.txt").write_text("d\r\n")
    (lists / "cat_train.txt").write_text("d 1\n")
    assert list(find_splits(tmp_path)) == ["train", "test"]
    assert [record.path.name for record in load_dataset(tmp_path).records] == ["ü.jpeg", "c.JPG", "a b.png"]
    assert len(load_dataset(tmp_path, "test").records) == 1
    (lists / "train.txt").write_text("c\nmissing\n")
    with pytest.raises(
        DataError, match=r"XML file is missing: 1 in .*missing\.xml .*image is missing: 1 in .*missing\.jpg"
    ):
        load_dataset(tmp_path)


def test_lists_that_name_files(tmp_path: Path) -> None:
    """Names with their suffix, or of another machine; and a list without any file is told as such."""
    write(tmp_path, {name: sheet(item()) for name in ("a.1.png", "b.png", "c.png")})
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a.1.png\nb.xml\n/home/x/JPEGImages/c.png\n")
    assert [record.path.name for record in load_dataset(tmp_path).records] == ["a.1.png", "b.png", "c.png"]
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("d\n")
    with pytest.raises(DataError, match=r"XML file is missing: 1 in .*d\.xml"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("listed", [False, True])
def test_folders_in_folders(tmp_path: Path, listed: bool) -> None:
    for name in ("s", "t"):
        write(tmp_path, {"a.png": sheet(item(name))}, f"JPEGImages/{name}", f"Annotations/{name}")
    write(tmp_path, {"b.png": sheet(item("s"), filename="other.png")}, "JPEGImages/s", "Annotations/s")
    (tmp_path / "JPEGImages" / "s" / "b.png").rename(tmp_path / "JPEGImages" / "s" / "other.png")
    if listed:
        (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
        (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("s/a\ns\\b\nt/a\n")
    index = load_dataset(tmp_path)
    names = [record.path.relative_to(tmp_path / "JPEGImages").as_posix() for record in index.records]
    assert names == ["s/a.png", "s/other.png", "t/a.png"] and not index.problems
    assert [record.labels.tolist() for record in index.records] == [[0], [0], [1]]


def test_other_folders_beside_the_files_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": sheet(item())}, ".", ".")
    write(tmp_path, {"batch.png": sheet(item("dog"))}, "runs/mine", "runs/mine")
    index = load_dataset(tmp_path)
    assert len(index.records) == 1 and index.class_names == ("cat",)


def test_xml_files_in_upper_case(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": sheet(item()), "b.png": sheet(item())})
    (tmp_path / "Annotations" / "a.xml").rename(tmp_path / "Annotations" / "a.XML")
    index = load_dataset(tmp_path)
    assert index.num_objects == 2 and not index.problems


def test_images_without_an_xml_file(tmp_path: Path) -> None:
    index = load_dataset(write(tmp_path, {"a.png": sheet(item()), "b.png": None, "c.png": sheet()}, "images"))
    assert [len(record.labels) for record in index.records] == [1, 0, 0]
    assert [(Path(problem.file).name, problem.done) for problem in index.problems] == [("b.png", "noted")]


def test_the_xml_file_names_its_image(tmp_path: Path) -> None:
    """Only where no image has the XML file's own name, and no other XML file that of the image."""
    write(tmp_path, {"a.png": sheet(item(), filename="other.png"), "b.png": None})
    (tmp_path / "Annotations" / "x.xml").write_text(sheet(item(box=(2, 2, 4, 4)), filename="C:\\data\\b.png"))
    index = load_dataset(tmp_path)
    assert [(record.path.name, len(record.labels)) for record in index.records] == [("a.png", 1), ("b.png", 1)]
    (tmp_path / "Annotations" / "copy.xml").write_text(sheet(item(), filename="a.png"))  # a stale name
    with pytest.raises(DataError, match="image is missing"):
        load_dataset(tmp_path)


def test_sizes_are_checked(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"a.png": sheet(item(), size=(41, 30)), "b.png": sheet(item(), size=(0, 0)), "c.png": sheet(size=None)},
    )
    with pytest.raises(
        DataError, match=r"another size.*a\.png \(40 x 30 pixels, but .*a\.xml declares 41 x 30"
    ) as caught:
        load_dataset(tmp_path)
    assert len(caught.value.problems.fatal) == 1
    (tmp_path / "Annotations" / "a.xml").write_text(sheet(item()))
    assert {(record.width, record.height) for record in load_dataset(tmp_path).records} == {(40, 30)}
    with pytest.raises(DataError, match="without the image's size: 2"):
        load_dataset(tmp_path, require_images=False)


def test_unreadable_xml_files_are_collected(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"a.png": "", "b.png": "<annotation>", "c.png": sheet(item()), "d.png": sheet(item("cat", (1, 1, 99, 9)))},
    )
    with pytest.raises(DataError, match=r"XML file cannot be read: 2 \(.*a\.xml: no element found.*b\.xml: ") as caught:
        load_dataset(tmp_path)
    assert [problem.done for problem in caught.value.problems] == ["fatal", "fatal", "clipped"]
    for name in ("c", "d"):  # where none can be read, that is told, and not that there is no object
        (tmp_path / "Annotations" / f"{name}.xml").write_text("")
    with pytest.raises(DataError, match="XML file cannot be read: 4"):
        load_dataset(tmp_path)


def test_no_object_anywhere(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="have no object; label some"):
        load_dataset(write(tmp_path, {"a.png": sheet()}))


@pytest.mark.parametrize(
    ("images", "sheets_in"),
    [
        (".", "."),
        ("images", "annotations"),
        ("train", "train"),
        ("train/images", "train/annotations"),
        ("images/train", "annotations/train"),
        ("train/JPEGImages", "train/Annotations"),
    ],
)
def test_layouts(tmp_path: Path, images: str, sheets_in: str) -> None:
    write(tmp_path, {"a.png": sheet(item()), "b.png": sheet(item())}, images, sheets_in)
    assert list(find_splits(tmp_path)) == ["train"]
    assert [record.path.parent for record in load_dataset(tmp_path).records] == [tmp_path / images] * 2
