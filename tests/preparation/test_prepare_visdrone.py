"""VisDrone's raw lines into COCO: every rule by hand, and random data against a plain second reading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from crossdino.benchmarks import VISDRONE_CLASSES
from crossdino.data import load_dataset
from crossdino.errors import InputError
from crossdino.evaluation.visdrone_official import evaluate_visdrone_official
from crossdino.preparation import prepare_benchmark
from tests.raw_datasets import make_visdrone
from tests.reference.visdrone_official_plain import evaluate_plain

CATEGORIES = [{"id": number, "name": name} for number, name in enumerate(VISDRONE_CLASSES, start=1)]


def write_raw(folder: Path, split: str, texts: dict[str, str], size: tuple[int, int] = (100, 80)) -> Path:
    root = folder / f"VisDrone2019-DET-{split}"
    for name in ("annotations", "images"):
        (root / name).mkdir(parents=True)
    for stem, text in texts.items():
        (root / "annotations" / f"{stem}.txt").write_bytes(text.encode())
        Image.new("RGB", size).save(root / "images" / f"{stem}.jpg")
    return folder


def read(output: Path, split: str) -> dict[str, Any]:
    return json.loads((output / "annotations" / f"{split}.json").read_text())


HAND_MADE = {
    # A byte order mark, Windows' line ends, blank lines, trailing commas, an object, the three kinds that are ignored.
    "b": "\ufeff10,20,5,6,1,4,0,1\r\n\r\n0,0,30,30,0,0,0,0,\r\n40,41,8,9,1,11,1,2,\r\n50,51,3,4,0,1,0,2\r\n",
    # No width; one pixel wide; beyond the right border by 10; outside the image altogether; a ninth and tenth value.
    "a": "1,2,0,4,1,10,0,0\n3,4,1,4,1,1,0,0\n95,70,15,5,1,9,1,0\n100,10,5,5,1,2,0,0\n7,8,9,10,1,3,0,2,5,6\n",
    "c": "",
}


def test_rules_by_hand(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "raw", "val", HAND_MADE)
    prepared = prepare_benchmark("visdrone", source, tmp_path / "out")
    found = read(tmp_path / "out", "val")
    assert found["images"] == [
        {"id": 1, "file_name": "a.jpg", "width": 100, "height": 80},
        {"id": 2, "file_name": "b.jpg", "width": 100, "height": 80},
        {"id": 3, "file_name": "c.jpg", "width": 100, "height": 80},
    ]

    def annotation(number: int, image: int, category: int, box: list[int], area: int, marks: tuple[int, int]) -> Any:
        values = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": 0}
        return values | {"score": 1, "truncation": marks[0], "occlusion": marks[1]}

    assert found["annotations"] == [
        annotation(1, 1, 1, [3, 4, 1, 4], 4, (0, 0)),
        annotation(2, 1, 9, [95, 70, 15, 5], 75, (1, 0)),
        annotation(3, 1, 2, [100, 10, 5, 5], 25, (0, 0)),
        annotation(4, 1, 3, [7, 8, 9, 10], 90, (0, 2)),
        annotation(5, 2, 4, [10, 20, 5, 6], 30, (0, 1)),
    ]
    assert found["categories"] == CATEGORIES
    assert found["visdrone_ignored"] == [
        # An object that is dropped for its box: the challenge counts it.
        {"image_id": 1, "bbox": [1, 2, 0, 4], "score": 1, "category": 10, "truncation": 0, "occlusion": 0},
        {"image_id": 2, "bbox": [0, 0, 30, 30], "score": 0, "category": 0, "truncation": 0, "occlusion": 0},
        {"image_id": 2, "bbox": [40, 41, 8, 9], "score": 1, "category": 11, "truncation": 1, "occlusion": 2},
        {"image_id": 2, "bbox": [50, 51, 3, 4], "score": 0, "category": 1, "truncation": 0, "occlusion": 2},
    ]
    options = {"ignored": "drop", "min_side": 1, "outside": "keep"}
    info = found["info"]
    assert (info["benchmark"], info["split"], info["options"]) == ("visdrone", "val", options)
    entry = prepared.description["splits"]["val"]
    assert (entry["num_images"], entry["num_objects"], entry["num_ignored"]) == (3, 5, 0)
    assert entry["dropped"] == {"category 0": 1, "category 11": 1, "score 0": 1, "side below 1 px": 1}
    # What is published counts lines of categories 1 to 10 with score 1, whatever their sides.
    checks = {check["what"]: (check["found"], check["published"]) for check in entry["checks"]}
    assert checks == {"images": (3, 548), "objects": (6, 38_759)}


def test_crowd_makes_each_ignored_line_a_crowd_of_every_class(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "raw", "test-dev", HAND_MADE)
    prepared = prepare_benchmark("visdrone", source, tmp_path / "out", options={"ignored": "crowd"})
    found = read(tmp_path / "out", "test-dev")
    crowds = [annotation for annotation in found["annotations"] if annotation["iscrowd"]]
    assert [(crowd["bbox"], crowd["category_id"]) for crowd in crowds] == [
        (box, category) for box in ([0, 0, 30, 30], [40, 41, 8, 9], [50, 51, 3, 4]) for category in range(1, 11)
    ]
    assert [annotation["id"] for annotation in found["annotations"]] == list(range(1, 36))
    assert len(found["visdrone_ignored"]) == 4
    entry = prepared.description["splits"]["test-dev"]
    assert (entry["num_objects"], entry["num_ignored"]) == (5, 3), "regions are counted, not their ten crowds"
    assert entry["dropped"] == {"side below 1 px": 1}
    assert prepared.description["roles"] == {"test": "test-dev"}


@pytest.mark.parametrize(
    ("options", "expected", "dropped"),
    [
        ({"outside": "clip"}, [[3, 4, 1, 4], [95, 70, 5, 5], [7, 8, 9, 10]], {"outside the image": 1}),
        ({"outside": "drop"}, [[3, 4, 1, 4], [95, 70, 15, 5], [7, 8, 9, 10]], {"outside the image": 1}),
        ({"min_side": 5}, [[95, 70, 15, 5], [100, 10, 5, 5], [7, 8, 9, 10]], {"side below 5 px": 2}),
        ({"min_side": 0}, [[1, 2, 0, 4], [3, 4, 1, 4], [95, 70, 15, 5], [100, 10, 5, 5], [7, 8, 9, 10]], {}),
    ],
)
def test_boxes_beyond_the_image_and_without_sides(
    tmp_path: Path, options: dict[str, Any], expected: list[list[int]], dropped: dict[str, int]
) -> None:
    source = write_raw(tmp_path / "raw", "val", {"a": HAND_MADE["a"]})
    prepared = prepare_benchmark("visdrone", source, tmp_path / "out", options={"min_side": 1, **options})
    found = read(tmp_path / "out", "val")["annotations"]
    assert [annotation["bbox"] for annotation in found] == expected
    assert [annotation["area"] for annotation in found] == [w * h for _, _, w, h in expected]
    sides = {} if "min_side" in options else {"side below 1 px": 1}
    assert prepared.description["splits"]["val"]["dropped"] == dropped | sides


def test_random_data_against_a_plain_second_reading(tmp_path: Path) -> None:
    source = make_visdrone(tmp_path / "raw", seed=3, images={"train": 7, "val": 3, "test-dev": 2})
    prepare_benchmark("visdrone", source, tmp_path / "out", num_processes=1)
    for split in ("train", "val", "test-dev"):
        found = read(tmp_path / "out", split)
        texts = sorted((source / f"VisDrone2019-DET-{split}" / "annotations").iterdir())
        kept: list[tuple[int, list[int], int]] = []
        left_out = 0
        for number, path in enumerate(texts, start=1):
            for line in path.read_text().split("\n"):
                values = [int(value) for value in line.strip().rstrip(",").split(",") if value]
                if values and values[4] == 1 and 1 <= values[5] <= 10:
                    kept.append((number, values[:4], values[5]))
                else:
                    left_out += bool(values)
        assert [(a["image_id"], a["bbox"], a["category_id"]) for a in found["annotations"]] == kept
        assert len(found["visdrone_ignored"]) == left_out > 0
        assert [image["file_name"] for image in found["images"]] == [f"{path.stem}.jpg" for path in texts]
        for image in found["images"]:
            with Image.open(tmp_path / "out" / "images" / split / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"])
    # What was prepared is read as it stands: nothing has to be mended.
    index = load_dataset(tmp_path / "out", "test")
    assert index.class_names == VISDRONE_CLASSES
    assert set(index.problems.counts) <= {"class without any box"}
    assert index.num_objects == len(read(tmp_path / "out", "test-dev")["annotations"])


@pytest.mark.parametrize("ignored", ["drop", "crowd"])
@pytest.mark.parametrize("rules", [{}, {"min_side": 6}, {"min_side": 0}, {"outside": "drop"}], ids=str)
def test_official_metric_of_what_was_prepared_is_that_of_the_raw_lines(
    tmp_path: Path, ignored: str, rules: dict[str, Any]
) -> None:
    """Objects that are dropped (no width, too small, outside) are no objects to train on, but some to the challenge."""
    rng = np.random.default_rng(5)
    texts: dict[str, str] = {}
    images: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number in range(1, 5):
        # Two objects without a width or a height, two outside of the image, of 100 x 80 pixels.
        rows = [[5, 6, 0, 9, 1, 4], [40, 41, 7, 0, 1, 4], [101, 3, 5, 5, 1, 4], [-9, 3, 8, 8, 1, 1]]
        rows += [
            [*rng.integers(0, 70, 2).tolist(), *rng.integers(2, 25, 2).tolist(), int(rng.random() > 0.2), category]
            for category in rng.choice([1, 4, 4, 4, 11], 14).tolist()
        ]
        rows.insert(3, [20, 20, 30, 25, 0, 0])
        found = [
            [*(np.array(row[:4]) + rng.normal(0, 0.7, 4)).clip(-20).tolist(), float(rng.random()), min(row[5], 10)]
            for row in [*rows, *rows]
            if row[5]
        ]
        found = [[*row[:2], max(row[2], 0.0), max(row[3], 0.0), *row[4:]] for row in found]
        found.sort(key=lambda row: -row[4])
        texts[f"{number:04d}"] = "".join(",".join(map(str, [*row, 0, 0])) + "\n" for row in rows)
        images.append({"width": 100, "height": 80, "gt": rows, "det": found})
        results += [{"image_id": number, "category_id": row[5], "bbox": row[:4], "score": row[4]} for row in found]
    source = write_raw(tmp_path / "raw", "val", texts)
    prepare_benchmark("visdrone", source, tmp_path / "out", options={"ignored": ignored, **rules})
    measured = evaluate_visdrone_official(tmp_path / "out" / "annotations" / "val.json", results)
    expected = evaluate_plain(images)
    assert 0.2 < expected["AP50"] < 0.9
    assert measured.metrics == pytest.approx(expected, abs=1e-12)  # the same sums in another order


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "1,2,3,4,1,4,0",
            r"a\.txt, line 3: '1,2,3,4,1,4,0' has 7 of the 8 values bbox_left,.*; correct it, or download",
        ),
        ("1,x,3,4,1,4,0,0", r"a\.txt, line 3: bbox_top is 'x', not a number; correct it"),
        ("1,,3,4,1,4,0,0", r"line 3: bbox_top is '', not a number"),
        ("1,2,inf,4,1,4,0,0", r"line 3: bbox_width is 'inf', not a number"),
        ("1,2,nan,4,1,4,0,0", r"line 3: bbox_width is 'nan', not a number"),
        ("1,2,3,4,1,12,0,0", r"line 3: object_category is '12', not 0 to 11"),
        ("1,2,3,4,1,1.5,0,0", r"line 3: object_category is '1.5', not 0 to 11"),
        ("1,2,3,4,0.87,4,-1,-1", r"line 3: score is '0.87', not 0 to 1; this looks like a file of detections"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    source = write_raw(tmp_path / "raw", "val", {"a": f"1,2,3,4,1,4,0,0\n\n{line}\n"})
    with pytest.raises(InputError, match=message):
        prepare_benchmark("visdrone", source, tmp_path / "out")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "raw", "val", {"a": ""})
    path = source / "VisDrone2019-DET-val" / "annotations" / "a.txt"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match=r"cannot read .*a\.txt .*download it again"):
        prepare_benchmark("visdrone", source, tmp_path / "out")


def test_where_the_splits_are_found(tmp_path: Path) -> None:
    val = write_raw(tmp_path / "all" / "raw", "val", HAND_MADE) / "VisDrone2019-DET-val"

    def splits(source: Path, name: str, **options: Any) -> list[str]:
        return list(prepare_benchmark("visdrone", source, tmp_path / name, **options).description["splits"])

    assert splits(val, "one split's folder") == ["val"]
    # As unzippers make it: a folder of the archive's name around that of the archive.
    deeper = tmp_path / "all" / "deeper" / "VisDrone2019-DET-val"
    deeper.mkdir(parents=True)
    val.rename(deeper / "VisDrone2019-DET-val")
    write_raw(tmp_path / "all" / "deeper", "train", {"x": "1,2,3,4,1,4,0,0"})
    assert splits(tmp_path / "all" / "deeper", "deeper out") == ["train", "val"]
    assert splits(tmp_path / "all", "all below") == ["train", "val"]
    # A renamed folder does not tell its split.
    renamed = (deeper / "VisDrone2019-DET-val").rename(tmp_path / "validation pictures")
    with pytest.raises(InputError, match="its name does not tell of which split; name it, e.g. --splits val"):
        splits(renamed, "renamed")
    assert splits(renamed, "renamed", splits=["val"]) == ["val"]
    # A link tells it by its own name; so does a split's bare name, where annotations lie in that folder itself.
    links = tmp_path / "links"
    links.mkdir()
    (links / "VisDrone2019-DET-val").symlink_to(renamed)
    write_raw(links, "train", {"x": "1,2,3,4,1,4,0,0"})
    (links / "VisDrone2019-DET-train").rename(links / "test_dev")
    assert splits(links, "by link and bare name") == ["val", "test-dev"]
    misleading = links.rename(tmp_path / "train")
    assert splits(misleading, "in a folder called train") == ["val", "test-dev"]


def test_objects_that_are_there_twice(tmp_path: Path) -> None:
    """They stay; the published numbers of val and test-dev count them once, that of train twice."""
    text = "1,2,9,9,1,4,0,0\n1,2,9,9,1,4,1,2\n1,2,9,9,1,5,0,0\n1,2,9,9,0,4,0,0\n1,2,9,9,0,4,0,0\n"
    source = write_raw(tmp_path / "raw", "val", {"a": text, "b": "1,2,9,9,1,4,0,0\n"})
    write_raw(source, "train", {"a": text})
    found = prepare_benchmark("visdrone", source, tmp_path / "out").description["splits"]
    counts = {split: (entry["num_objects"], entry["checks"][1]["found"]) for split, entry in found.items()}
    assert counts == {"train": (3, 3), "val": (4, 3)}
    assert found["val"]["notes"] == ["objects that are there twice, with the same class and box: 1 (kept)"]


def test_test_challenge_is_left_out_with_a_word(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "raw", "val", HAND_MADE)
    (source / "VisDrone2019-DET-test-challenge" / "images").mkdir(parents=True)
    prepared = prepare_benchmark("visdrone", source, tmp_path / "out")
    assert list(prepared.description["splits"]) == ["val"]
    assert any("test-challenge" in note and "not public" in note for note in prepared.notes)
    alone = tmp_path / "alone"
    (alone / "VisDrone2019-DET-test-challenge" / "images").mkdir(parents=True)
    with pytest.raises(InputError, match="annotations of test-challenge are not public"):
        prepare_benchmark("visdrone", alone, tmp_path / "none")
    assert any(note.startswith("train is not in the source and was left out") for note in prepared.notes)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "raw", "val", HAND_MADE)
    root = source / "VisDrone2019-DET-val"
    with pytest.raises(
        InputError, match=r"lacks train: VisDrone2019-DET-train/annotations\. It holds VisDrone2019-DET-v"
    ):
        prepare_benchmark("visdrone", source, tmp_path / "out", splits=["train", "val"])
    with pytest.raises(InputError, match=r"no split 'vla' \(--splits\); it has train, val, test-dev"):
        prepare_benchmark("visdrone", source, tmp_path / "out", splits=["vla"])
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "VisDrone2019-DET-val.zip").write_bytes(b"")
    with pytest.raises(InputError, match=r"lacks train: .*unpack VisDrone2019-DET-val\.zip first"):
        prepare_benchmark("visdrone", empty, tmp_path / "out")
    with pytest.raises(InputError, match=r"is an archive: unpack it and give the folder"):
        prepare_benchmark("visdrone", empty / "VisDrone2019-DET-val.zip", tmp_path / "out")
    (root / "images" / "a.jpg").unlink()
    (root / "images" / "b.jpg").unlink()
    with pytest.raises(
        InputError, match=r"a\.txt has no image, and 1 more have none; restore it in .*--without-images"
    ):
        prepare_benchmark("visdrone", source, tmp_path / "out")
    (root / "annotations" / "a.txt").unlink()
    (root / "annotations" / "b.txt").rename(root / "annotations" / "c.txt")
    Image.new("RGB", (9, 9)).save(root / "images" / "d.jpg")
    with pytest.raises(InputError, match=r"d\.jpg has no annotation file; restore it in"):
        prepare_benchmark("visdrone", source, tmp_path / "out")
    (root / "images" / "d.jpg").unlink()
    (root / "images" / "c.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"c\.jpg is not an image"):
        prepare_benchmark("visdrone", source, tmp_path / "out")


def test_without_images(tmp_path: Path) -> None:
    source = write_raw(tmp_path / "raw", "val", HAND_MADE)
    for path in (source / "VisDrone2019-DET-val" / "images").iterdir():
        path.unlink()
    (source / "VisDrone2019-DET-val" / "images").rmdir()
    prepare_benchmark("visdrone", source, tmp_path / "out", images="none")
    found = read(tmp_path / "out", "val")
    # Sizes are not known: large enough for all that is annotated.
    assert [(image["width"], image["height"]) for image in found["images"]] == [(110, 75), (53, 55), (1, 1)]
    assert len(found["annotations"]) == 5
    assert not (tmp_path / "out" / "images").exists()
    assert load_dataset(tmp_path / "out", "val", require_images=False).num_objects == 5
    with pytest.raises(InputError, match="--outside clip needs the sizes of the images"):
        prepare_benchmark("visdrone", source, tmp_path / "b", images="none", options={"outside": "clip"})
