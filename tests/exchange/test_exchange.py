"""Result files in and out: exact round trips, what other programs leave in such files, and every kind of mistake."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from crossdino.benchmarks import VISDRONE_CLASSES
from crossdino.errors import InputError
from crossdino.exchange import FORMATS, detect_format, read_results, write_results

CATEGORIES = [{"id": number, "name": name} for number, name in enumerate(VISDRONE_CLASSES, start=1)]
TRUTH = {
    "images": [{"id": 7, "file_name": "a.jpg"}, {"id": 3, "file_name": "val/b.1.jpg"}, {"id": 5, "file_name": "c.jpg"}],
    "categories": CATEGORIES,
    "annotations": [],
}
ONE_CLASS = {**TRUTH, "categories": [{"id": 1, "name": "pedestrian"}]}


def result(image_id: int, score: float, *box: float, category_id: int = 4) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": list(box), "score": score}


def random_results(seed: int, num_categories: int = 10) -> list[dict]:
    """Two of the three images; numbers with all their digits; by image, then by score."""
    rng = np.random.default_rng(seed)
    results = [
        result(image_id, score, *rng.uniform(0, 500, 4).tolist(), category_id=int(rng.integers(1, num_categories + 1)))
        for image_id in (7, 5)
        for score in np.sort(rng.random(20))[::-1].tolist()
    ]
    return [*results[:20], result(7, results[19]["score"], 1, 2, 3, 4), *results[20:]]  # whole numbers, equal scores


def read(path: Path, format: str | None = None, truth: dict | Path = TRUTH) -> tuple[list[dict], list[str]]:
    notes: list[str] = []
    return read_results(path, format, truth, on_note=notes.append), notes


def write_folder(folder: Path, **texts: str | bytes) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.mark.parametrize("name", ["out.json", "out", "out.zip"])
def test_round_trip_is_exact(tmp_path: Path, name: str) -> None:
    format = "coco" if name.endswith(".json") else "visdrone"
    results = random_results(0)
    write_results(results, tmp_path / name, format, TRUTH)
    assert detect_format(tmp_path / name) == format
    assert read(tmp_path / name) == (results, [])
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing is left beside it


def test_visdrone_as_the_toolkit_wants_it(tmp_path: Path) -> None:
    rows = [
        result(7, 0.25, 1.5, 2, 3, 4.125),
        result(7, 0.75, 10, 20, 30, 40, category_id=10),
        result(3, 1, 0, 0, 1, 1),
    ]
    write_results(rows, tmp_path / "out", "visdrone", TRUTH)
    texts = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert texts == {
        "a.txt": "10,20,30,40,0.75,10,-1,-1\n1.5,2,3,4.125,0.25,4,-1,-1\n",  # by score
        "b.1.txt": "0,0,1,1,1,4,-1,-1\n",
        "c.txt": "",  # nothing was found there
    }
    write_results(rows, tmp_path / "out.zip", "visdrone", TRUTH)
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert {name: archive.read(name).decode() for name in archive.namelist()} == texts  # in the root
    first = (tmp_path / "out.zip").read_bytes()
    write_results(rows, tmp_path / "out.zip", "visdrone", TRUTH)
    assert (tmp_path / "out.zip").read_bytes() == first


def test_visdrone_as_others_write_it(tmp_path: Path) -> None:
    expected = [result(7, 0.5, 1, 2, 3, 4), result(7, 0.25, 5.5, 6, 7, 8)]
    forms = [
        "1,2,3,4,0.5,4,-1,-1\n5.5,6,7,8,0.25,4,-1,-1\n",
        "1,2,3,4,0.5,4,-1,-1,\r\n5.5,6,7,8,0.25,4,-1,-1,,\r\n\r\n",
        "\ufeff1, 2, 3, 4, .5, 4.0, -1, -1\n 5.5,6,7,8,2.5e-1,4,-1,-1",
        "1 2 3 4 0.5 4 -1 -1\n\n5.5\t6\t7\t8\t0.25\t4\t-1\t-1\n",
        "1,2,3,4,0.5,4\n5.5,6,7,8,0.25,4,0,0\n",
    ]
    for place, text in enumerate(forms):
        folder = write_folder(tmp_path / str(place), a=text, c="", **{"b.1": "\n"})
        assert read(folder) == (expected, [])


def test_archives_as_others_pack_them(tmp_path: Path) -> None:
    path = tmp_path / "results.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("results/", "")
        archive.writestr("results/a.txt", "1,2,3,4,0.5,4,-1,-1\n")
        archive.writestr("__MACOSX/results/._a.txt", b"\x00\x05\x16")
        archive.writestr("results/.DS_Store", b"\x00")
    results, notes = read(path)
    assert results == [result(7, 0.5, 1, 2, 3, 4)]
    assert notes == [
        f"{path}: images without a file: 2 of 3, the first b.1.jpg; they count as images without detections"
    ]
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/a.txt", "")
    with pytest.raises(InputError, match=r"several files a\.txt"):
        read(path)


def test_a_missing_file_is_a_warning_by_default(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "out", a="1,2,3,4,0.5,4,-1,-1")
    with pytest.warns(UserWarning, match="images without a file: 2 of 3"):
        assert len(read_results(folder, "visdrone", TRUTH)) == 1


def test_the_order_within_a_file_is_kept(tmp_path: Path) -> None:
    # The official metric takes the first N of the file.
    folder = write_folder(tmp_path / "out", a="1,2,3,4,0.1,4,-1,-1\n1,2,3,4,0.9,4,-1,-1", c="", **{"b.1": ""})
    assert [row["score"] for row in read(folder)[0]] == [0.1, 0.9]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,2,3", r"a\.txt, line 2 has 3 fields \('1,2,3'\): give x, y, width"),
        ("1,2,3,4,0.5,4,-1,-1,7,8", r"a\.txt, line 2 has 10 fields.*videos"),
        ("1,2,three,4,0.5,4,-1,-1", r"a\.txt, line 2 has 'three' where a number"),
        ("1,2,,4,0.5,4,-1,-1", r"a\.txt, line 2 has '' where a number"),
        ("1,2,3,4,nan,4,-1,-1", r"a\.txt, line 2 has 'nan' where a number"),
        ("1,2,3,inf,0.5,4,-1,-1", r"a\.txt, line 2 has 'inf'"),
        ("1,2,-3,4,0.5,4,-1,-1", r"a\.txt, line 2 has width -3"),
        ("1,2,3,4,0.5,4.5,-1,-1", r"a\.txt, line 2 has 4\.5 where a whole number"),
        ("1,2,3,4,0.5,11,-1,-1", r"a\.txt, line 2 has class 11, .*1, 2, 3.*annotations only"),
        ("1,2,3,4,0.5,12,-1,-1", r"a\.txt, line 2 has class 12, .*only$"),
        ("1,2,3,4,0,0,0,0", r"a\.txt, line 2 has class 0"),
    ],
)
def test_broken_lines(tmp_path: Path, line: str, message: str) -> None:
    folder = write_folder(tmp_path / "out", a=f"1,2,3,4,0.5,4,-1,-1\n{line}\n")
    with pytest.raises(InputError, match=message):
        read(folder)


def test_files_that_belong_to_no_image(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "out", a="", notes="bring milk")
    with pytest.raises(InputError, match=r"notes\.txt is of no image .* ground truth of the split"):
        read(folder, "visdrone")
    folder = write_folder(tmp_path / "twice", a="", **{"a.jpg": ""})
    with pytest.raises(InputError, match="is the second file of image 7"):
        read(folder, "visdrone")


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["Motor", "awning tricycle", "car"], [10, 8, 4]),  # names decide, however they are written
        (["eins", "zwei", "drei"], [1, 2, 3]),  # unknown names: the ids
    ],
)
def test_other_ids_are_mapped_by_name(tmp_path: Path, names: list[str], numbers: list[int]) -> None:
    truth = {**TRUTH, "categories": [{"id": place, "name": name} for place, name in enumerate(names, start=1)]}
    rows = [result(7, 0.9 - place / 10, 1, 2, 3, 4, category_id=place) for place in (1, 2, 3)]
    write_results(rows, tmp_path / "out", "visdrone", truth)
    lines = (tmp_path / "out" / "a.txt").read_text().splitlines()
    assert [int(line.split(",")[5]) for line in lines] == numbers
    assert read(tmp_path / "out", truth=truth) == (rows, [])


@pytest.mark.parametrize("names", [["car", "ship"], ["car", "Car"], ["a", "b", *map(str, range(9))]])
def test_categories_that_visdrone_has_not(tmp_path: Path, names: list[str]) -> None:
    truth = {**TRUTH, "categories": [{"id": place, "name": name} for place, name in enumerate(names, start=1)]}
    with pytest.raises(InputError, match="category .*name the categories pedestrian, people"):
        write_results([], tmp_path / "out", "visdrone", truth)
    assert not (tmp_path / "out").exists()


def test_more_than_the_toolkit_measures_is_told(tmp_path: Path) -> None:
    notes: list[str] = []
    rows = [result(7, 1 - place / 1000, 1, 2, 3, 4) for place in range(501)]
    write_results(rows, tmp_path / "out", "visdrone", TRUTH, on_note=notes.append)
    assert len(notes) == 1 and "images with more than 500 detections: 1;" in notes[0]
    assert len((tmp_path / "out" / "a.txt").read_text().splitlines()) == 501


def test_scores_in_per_cent_are_told(tmp_path: Path) -> None:
    notes: list[str] = []
    rows = [result(7, 90, 1, 2, 3, 4), result(7, 1, 1, 2, 3, 4), result(7, 0, 1, 2, 3, 4), result(7, -0.5, 1, 2, 3, 4)]
    write_results(rows, tmp_path / "out", "visdrone", TRUTH, on_note=notes.append)
    write_results(rows, tmp_path / "out.json", "coco", TRUTH, on_note=notes.append)
    assert len(notes) == 2 and all("outside of 0 to 1: 2, such as 90;" in note for note in notes)
    assert read(tmp_path / "out")[0] == rows  # as they are


def test_numbers_with_an_exponent_and_names_with_blanks_and_dots(tmp_path: Path) -> None:
    truth = {**TRUTH, "images": [{"id": 7, "file_name": "val/sub dir/a b.v1.jpg"}]}
    folder = write_folder(tmp_path / "in", **{"a b.v1": "1.5e2,2E+1,3.0e0,4e-1,1e-3,4,-1,-1\n"})
    rows = [result(7, 0.001, 150, 20, 3, 0.4)]
    assert read(folder, truth=truth) == (rows, [])
    write_results(rows, tmp_path / "out", "visdrone", truth)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a b.v1.txt"]
    assert read(tmp_path / "out", truth=truth) == (rows, [])


def test_widerperson(tmp_path: Path) -> None:
    rows = [result(7, 0.75, 10, 20, 30, 40, category_id=1), result(7, 0.5, 1.5, 2, 3, 4, category_id=1)]
    write_results(rows, tmp_path / "out", "widerperson", ONE_CLASS)
    texts = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    # Corners belong to the box, as in the annotations: x2 = x1 + width - 1.
    assert texts == {
        "a.jpg.txt": "2\n1 10 20 39 59 0.75\n1 1.5 2 3.5 5 0.5\n",
        "b.1.jpg.txt": "0\n",
        "c.jpg.txt": "0\n",
    }
    assert detect_format(tmp_path / "out") == "widerperson"
    assert read(tmp_path / "out", truth=ONE_CLASS) == (rows, [])
    # Without the count, and called by the stem.
    folder = write_folder(tmp_path / "other", a="1 10 20 39 59 0.75\n1 1.5 2 3.5 5 0.5\n")
    assert read(folder, "widerperson", ONE_CLASS)[0] == rows


def test_widerperson_keeps_boxes_to_the_last_digits(tmp_path: Path) -> None:
    rows = random_results(1, num_categories=1)[:20]
    write_results(rows, tmp_path / "out", "widerperson", ONE_CLASS)
    back = read(tmp_path / "out", truth=ONE_CLASS)[0]
    assert [row["score"] for row in back] == [row["score"] for row in rows]
    # A corner is a sum, which is rounded: 1000 px has 13 digits after the point.
    np.testing.assert_allclose([row["bbox"] for row in back], [row["bbox"] for row in rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2\n1 1 2 3 4 0.5\n", "line 1 says 2 detections, but there are 1"),
        ("1\n1 1 2 3 4\n", r"line 2 has 5 fields \(5 are an annotation\)"),
        ("1\n1 9 2 3 4 0.5\n", "line 2 ends before it begins"),
        ("1\n2 1 2 3 4 0.5\n", "line 2 has class 2"),
    ],
)
def test_broken_widerperson(tmp_path: Path, text: str, message: str) -> None:
    folder = write_folder(tmp_path / "out", **{"a.jpg": text})
    with pytest.raises(InputError, match=rf"a\.jpg\.txt.*{message}"):
        read(folder, truth=ONE_CLASS)


def test_widerperson_is_one_class(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 10 categories, and results as widerperson have one"):
        write_results([], tmp_path / "out", "widerperson", TRUTH)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (7, "detection number 1 .* is not an object"),
        (result(8, 0.5, 1, 2, 3, 4), "detection number 1 .* has image_id 8, which is not in"),
        (result(7, 0.5, 1, 2, 3, 4, category_id=12), "has category_id 12"),
        ({**result(7, 0.5, 1, 2, 3, 4), "image_id": [7]}, r"has image_id \[7\]"),
        (result(7, 0.5, 1, 2, 3), r"has bbox \[1, 2, 3\]"),
        (result(7, 0.5, 1, 2, -3, 4), "has bbox"),
        (result(7, float("nan"), 1, 2, 3, 4), "has score nan"),
        ({"image_id": 7, "category_id": 4, "bbox": [1, 2, 3, 4]}, "has score None"),
    ],
)
def test_broken_coco_results(tmp_path: Path, entry: object, message: str) -> None:
    path = tmp_path / "found.json"
    path.write_text(json.dumps([result(7, 0.5, 1, 2, 3, 4), entry]))
    with pytest.raises(InputError, match=rf"found\.json: .*{message}"):
        read(path)
    with pytest.raises(InputError, match=f"the results: .*{message}"):
        write_results([result(7, 0.5, 1, 2, 3, 4), entry], tmp_path / "out", "visdrone", TRUTH)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "out").exists()


def test_numbers_of_numpy_are_written_as_numbers(tmp_path: Path) -> None:
    row = {
        "image_id": np.int64(7),
        "category_id": np.int64(4),
        "bbox": tuple(np.arange(1.0, 5.0)),
        "score": np.float32(0.5),
    }
    write_results([row], tmp_path / "out", "visdrone", TRUTH)
    assert (tmp_path / "out" / "a.txt").read_text() == "1.0,2.0,3.0,4.0,0.5,4,-1,-1\n"
    write_results([row], tmp_path / "out.json", "coco", TRUTH)
    assert read(tmp_path / "out.json")[0] == [result(7, 0.5, 1, 2, 3, 4)]


def test_aliases_of_coco(tmp_path: Path) -> None:
    rows = random_results(2)
    for format in ("aitod", "sodad"):
        assert "COCO results" in FORMATS[format]
        write_results(rows, tmp_path / f"{format}.json", format, TRUTH)
        assert read(tmp_path / f"{format}.json", format) == (rows, [])


def test_nothing_that_is_there_is_lost(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "annotations", a="1,2,3,4,1,4,0,0\n")
    with pytest.raises(InputError, match="is not empty; name a new folder"):
        write_results([], folder, "visdrone", TRUTH)
    assert (folder / "a.txt").read_text() == "1,2,3,4,1,4,0,0\n"
    (tmp_path / "empty").mkdir()
    write_results([], tmp_path / "empty", "visdrone", TRUTH)
    assert len(list((tmp_path / "empty").iterdir())) == 3
    for name, format, message in [
        ("file", "visdrone", "it is a file"),
        ("out.json", "visdrone", "are text files"),
        ("out.txt", "coco", "ends with .json"),
        ("no/out.json", "coco", "no folder"),
        ("folder.zip", "visdrone", "it is a folder"),
        ("out", "yolo", "unknown format 'yolo' of results: choose one of coco"),
    ]:
        (tmp_path / "file").touch()
        (tmp_path / "folder.zip").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=message):
            write_results([], tmp_path / name, format, TRUTH)


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_results([result(7, 0.5, 1, 2, 3, 4)], tmp_path / "out.zip", "visdrone", TRUTH)
    before = (tmp_path / "out.zip").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_results([], tmp_path / "out.zip", "visdrone", TRUTH)
    assert (tmp_path / "out.zip").read_bytes() == before
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_results([], tmp_path / "out", "visdrone", TRUTH)
    assert [path.name for path in tmp_path.iterdir()] == ["out.zip"]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.txt").write_text("1,2,3,4,0.5,4,-1,-1")
    (tmp_path / "bad.zip").write_text("no archive")
    (tmp_path / "bad.json").write_text("[1")
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    for name, format, message in [
        ("none", None, "does not exist"),
        ("none.json", "coco", r"none\.json cannot be read"),
        ("none", "visdrone", "cannot be read"),
        ("empty", None, r"holds no \.txt files"),
        ("one.txt", None, "is one text file"),
        ("one.txt", "visdrone", "is one file"),
        ("bad.zip", None, "cannot be unpacked"),
        ("bad.json", None, "is not JSON"),
        ("truth.json", None, "is not a list of detections"),
        ("empty", "coco", "is no COCO results file"),
    ]:
        with pytest.raises(InputError, match=message):
            read(tmp_path / name, format)
    folder = write_folder(tmp_path / "latin", a="ü".encode("latin-1"))
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8"):
        read(folder, "visdrone")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, "no list 'images'"),
        ({"categories": []}, "no list 'categories'"),
        ({"images": [{"id": "7"}]}, "entry 0 of 'images' has id '7'"),
        ({"images": [{"id": 7}]}, "image 7 has no 'file_name'"),
        ({"images": [{"id": 7, "file_name": "x/a.jpg"}, {"id": 8, "file_name": "y/a.png"}]}, "are both called a"),
    ],
)
def test_truth_that_will_not_do(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({**TRUTH, **change}))
    with pytest.raises(InputError, match=rf"truth\.json.*{message}"):
        read(write_folder(tmp_path / "out", a=""), "visdrone", path)


def test_all_empty_is_visdrone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "out", a="", c="", **{"b.1": ""})
    assert detect_format(folder) == "visdrone"
    assert read(folder) == ([], [])


def test_the_import_is_light() -> None:
    # `evaluate --predictions` shall start at once.
    code = "import sys, crossdino.exchange; print(sorted({'torch', 'numpy', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
