"""The files of a run, read by those who will read them: pycocotools, pandas, pyarrow, shapely, GDAL."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
import rasterio.features
import rasterio.transform
import shapely
from affine import Affine
from pyarrow import parquet
from pycocotools.coco import COCO
from rasterio.crs import CRS

from crossdino.errors import InputError
from crossdino.results import (
    FORMATS,
    FileStamp,
    Journal,
    JournalHeader,
    JournalIndex,
    PictureResult,
    check_formats,
    growing_outputs,
    journal_path,
    open_outputs,
    output_stems,
    refuse_overwriting,
    write_outputs,
)
from crossdino.sources import Georeference

MakeResult = Callable[..., PictureResult]
NORTH_UP = Georeference("EPSG:32633", (0.5, 0.0, 500000.25, 0.0, -0.5, 5000000.75))
# A raster of which no axis points north, with pixels that are not square.
TURNED = Georeference("EPSG:25832", (0.3, 0.1, 400000.0, 0.2, -0.4, 5500000.0))
MIRRORED = Georeference("EPSG:4326", (1e-5, 0.0, 11.5, 0.0, 1e-5, 48.1))


@pytest.fixture
def results(make_result: MakeResult) -> list[PictureResult]:
    return [
        make_result('a,b "c".png', 4, picture="a.jpg"),
        make_result("empty ö.png", 0),
        make_result("v.mp4", 2, 0),
        make_result("v.mp4", 0, 5),
        make_result("v.mp4", 3, 10),
        make_result("map.tif", 5, place=TURNED),
    ]


def written(folder: Path, formats: list[str], header: JournalHeader, results: list[PictureResult]) -> Path:
    with open_outputs(folder, formats, header) as add:
        for result in results:
            add(result)
    assert not [path for path in folder.rglob("*") if "partial" in path.name]
    return folder


def load_coco(path: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def test_coco(tmp_path: Path, header: JournalHeader, results: list[PictureResult]) -> None:
    folder = written(tmp_path, ["coco", "coco-results"], header, results)
    coco = load_coco(folder / "predictions.json")
    assert coco.dataset["categories"] == [
        {"id": category_id, "name": name} for category_id, name in zip([3, 7, 9], header.class_names, strict=True)
    ]
    assert list(coco.dataset) == ["images", "categories", "annotations"]
    assert coco.getImgIds() == [1, 2, 3, 4, 5, 6]
    assert coco.imgs[1] == {"id": 1, "file_name": 'a,b "c".png', "width": 200, "height": 100, "picture": "a.jpg"}
    assert coco.imgs[4] == {"id": 4, "file_name": "v.mp4", "width": 200, "height": 100, "frame": 5, "seconds": 0.2}
    assert sorted(coco.anns) == list(range(1, 15))
    for image_id, result in enumerate(results, 1):
        found = coco.loadAnns(coco.getAnnIds(imgIds=[image_id]))
        assert [one["category_id"] for one in found] == [[3, 7, 9][label] for label in result.labels]
        boxes = np.array([one["bbox"] for one in found]).reshape(-1, 4)
        # Rounded to 0.0001 px.
        np.testing.assert_allclose(boxes[:, :2], result.boxes_xyxy[:, :2], atol=6e-5)
        np.testing.assert_allclose(boxes[:, :2] + boxes[:, 2:], result.boxes_xyxy[:, 2:], atol=2e-4)
        np.testing.assert_allclose([one["score"] for one in found], result.scores, atol=1e-8)
        assert all(one["area"] == one["bbox"][2] * one["bbox"][3] and one["iscrowd"] == 0 for one in found)
    plain = json.loads((folder / "predictions_coco_results.json").read_text())
    keys = ("image_id", "category_id", "bbox", "score")
    assert plain == [{key: one[key] for key in keys} for one in coco.dataset["annotations"]]
    with contextlib.redirect_stdout(io.StringIO()):
        assert len(coco.loadRes(plain).anns) == 14


def test_coco_without_anything(tmp_path: Path, header: JournalHeader, make_result: MakeResult) -> None:
    written(tmp_path, ["coco", "coco-results"], header, [])
    assert load_coco(tmp_path / "predictions.json").imgs == {}
    written(tmp_path, ["coco", "coco-results"], header, [make_result("a", 0), make_result("b", 0)])
    assert sorted(load_coco(tmp_path / "predictions.json").imgs) == [1, 2]
    assert json.loads((tmp_path / "predictions_coco_results.json").read_text()) == []


def check_objects(table: pandas.DataFrame, results: list[PictureResult], header: JournalHeader) -> None:
    assert table.columns.tolist() == [
        *("file_name", "frame", "seconds", "x1", "y1", "x2", "y2", "width", "height", "class_id", "class_name"),
        *("score", "world_x", "world_y", "polygon_wkt", "crs"),
    ]
    assert len(table) == sum(map(len, results))
    boxes = np.concatenate([result.boxes_xyxy for result in results])
    assert (table[["x1", "y1", "x2", "y2"]].to_numpy().astype(np.float32) == boxes).all()
    np.testing.assert_allclose(table["width"], boxes[:, 2] - boxes[:, 0], rtol=1e-6)  # float32
    np.testing.assert_allclose(table["height"], boxes[:, 3] - boxes[:, 1], rtol=1e-6)
    labels = np.concatenate([result.labels for result in results])
    assert table["class_id"].tolist() == [header.category_ids[label] for label in labels]
    assert table["class_name"].tolist() == [header.class_names[label] for label in labels]
    scores = np.concatenate([result.scores for result in results])
    assert (table["score"].to_numpy().astype(np.float32) == scores).all()
    for result in results:
        rows = table[table["file_name"] == result.file_name]
        rows = rows[rows["frame"].isna()] if result.frame is None else rows[rows["frame"] == result.frame]
        assert len(rows) == len(result)
        assert result.frame is None or (rows["seconds"] == result.seconds).all()
        if result.georeference is None:
            assert rows[["world_x", "world_y", "polygon_wkt", "crs"]].isna().to_numpy().all()
            continue
        assert set(rows["crs"]) == {result.georeference.crs}
        transform = Affine(*result.georeference.transform)
        for row, (left, top, right, bottom) in zip(rows.itertuples(), result.boxes_xyxy.tolist(), strict=True):
            # To a thousandth of a pixel of 0.36 m.
            rows_px = [(top + bottom) / 2, top, top, bottom, bottom]
            columns_px = [(left + right) / 2, left, right, right, left]
            x, y = rasterio.transform.xy(transform, rows_px, columns_px, offset="ul")
            np.testing.assert_allclose((row.world_x, row.world_y), (x[0], y[0]), atol=4e-4)
            corners = shapely.Polygon(zip(x[1:], y[1:], strict=True))
            assert shapely.from_wkt(row.polygon_wkt).hausdorff_distance(corners) < 4e-4


def check_pictures(table: pandas.DataFrame, results: list[PictureResult]) -> None:
    assert table.columns.tolist() == [
        *("file_name", "frame", "seconds", "width", "height", "num_objects", "capped", "picture", "crs")
    ]
    assert table["file_name"].tolist() == [result.file_name for result in results]
    assert table["num_objects"].tolist() == [len(result) for result in results]
    assert [None if np.isnan(frame) else frame for frame in table["frame"]] == [result.frame for result in results]
    assert table["width"].tolist() == [200] * len(results) and table["picture"][0] == "a.jpg"
    assert table["crs"].tolist()[-1] == "EPSG:25832" and not table["capped"].any()


def test_csv(tmp_path: Path, header: JournalHeader, results: list[PictureResult]) -> None:
    written(tmp_path, ["csv"], header, results)
    check_objects(pandas.read_csv(tmp_path / "predictions.csv"), results, header)
    check_pictures(pandas.read_csv(tmp_path / "predictions_images.csv"), results)
    with open(tmp_path / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["file_name"] == 'a,b "c".png' and None not in rows[0]


def test_parquet(tmp_path: Path, header: JournalHeader, results: list[PictureResult]) -> None:
    written(tmp_path, ["parquet"], header, results)
    table = parquet.read_table(tmp_path / "predictions.parquet")
    assert str(table.schema.field("class_name").type).startswith("dictionary<values=string")
    assert all(str(table.schema.field(name).type) == "float" for name in ("x1", "y2", "score", "width"))
    check_objects(table.to_pandas(), results, header)
    check_pictures(parquet.read_table(tmp_path / "predictions_images.parquet").to_pandas(), results)
    stored = json.loads(parquet.read_schema(tmp_path / "predictions.parquet").metadata[b"crossdino"])
    assert stored["settings"] == header.settings and stored["class_names"] == list(header.class_names)


def test_parquet_groups_end_with_pictures(
    tmp_path: Path, header: JournalHeader, make_result: MakeResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crossdino.results.parquet_files._GROUP_ROWS", 10)
    counts = [4, 4, 4, 25, 0, 3]
    written(tmp_path, ["parquet"], header, [make_result(f"{n}", count) for n, count in enumerate(counts)])
    groups = parquet.ParquetFile(tmp_path / "predictions.parquet").metadata
    assert [groups.row_group(index).num_rows for index in range(groups.num_row_groups)] == [12, 25, 3]
    assert parquet.read_table(tmp_path / "predictions.parquet")["file_name"].to_pylist() == [
        f"{n}" for n, count in enumerate(counts) for _ in range(count)
    ]


def test_parquet_without_objects_or_pictures(tmp_path: Path, header: JournalHeader, make_result: MakeResult) -> None:
    for results in ([], [make_result("a", 0)]):
        written(tmp_path, ["parquet"], header, results)
        assert parquet.read_table(tmp_path / "predictions.parquet").num_rows == 0
        assert parquet.read_table(tmp_path / "predictions_images.parquet").num_rows == len(results)


def test_parquet_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"pip install 'crossdino\[parquet\]'"):
        check_formats(["csv", "parquet"])


@pytest.mark.parametrize("place", [NORTH_UP, TURNED, MIRRORED, None])
def test_geojson(tmp_path: Path, header: JournalHeader, place: Georeference | None, make_result: MakeResult) -> None:
    result = make_result("maps/a b.tif", 6, place=place)
    # Whole pixels, for GDAL to fill.
    result.boxes_xyxy[:] = np.floor(result.boxes_xyxy)
    written(tmp_path, ["geojson"], header, [result, make_result("v.mp4", 2, 0)])
    assert [path.name for path in tmp_path.iterdir()] == ["a b.geojson"], "a video's frames have none"
    stored = json.loads((tmp_path / "a b.geojson").read_text(encoding="utf-8"))
    assert stored["type"] == "FeatureCollection" and len(stored["features"]) == 6
    if place is None:
        assert "crs" not in stored
    else:
        assert CRS.from_user_input(stored["crs"]["properties"]["name"]) == (
            CRS.from_string("OGC:CRS84") if place is MIRRORED else CRS.from_string(place.crs)
        )
    transform = Affine.identity() if place is None else Affine(*place.transform)
    for feature, box, label, score in zip(
        stored["features"], result.boxes_xyxy.astype(int).tolist(), result.labels, result.scores, strict=True
    ):
        ring = feature["geometry"]["coordinates"][0]
        assert ring[0] == ring[-1] and len(ring) == 5
        assert shapely.LinearRing(ring).is_ccw and shapely.Polygon(ring).is_valid
        left, top, right, bottom = box
        expected = np.zeros((100, 200), np.uint8)
        expected[top:bottom, left:right] = 1
        # GDAL fills the pixels of which the polygon holds the centre.
        filled = rasterio.features.rasterize([feature["geometry"]], (100, 200), transform=transform)
        assert (filled == expected).all()
        properties = feature["properties"]
        assert (properties["class_id"], properties["class_name"]) == ([3, 7, 9][label], header.class_names[label])
        assert np.float32(properties["score"]) == score
        assert [properties[name] for name in ("x1", "y1", "x2", "y2")] == box
        if place is None:
            assert properties["classification"] == {"name": header.class_names[label]}


def test_geojson_of_a_system_without_a_number(tmp_path: Path, header: JournalHeader, make_result: MakeResult) -> None:
    wkt = CRS.from_proj4("+proj=aea +lat_1=40 +lat_2=50 +lat_0=45 +lon_0=10 +datum=WGS84 +units=m").to_wkt()
    written(tmp_path, ["geojson"], header, [make_result("a.tif", place=Georeference(wkt, NORTH_UP.transform))])
    stored = json.loads((tmp_path / "a.geojson").read_text())
    assert CRS.from_user_input(stored["crs"]["properties"]["name"]) == CRS.from_wkt(wkt)


def test_yolo(tmp_path: Path, header: JournalHeader, results: list[PictureResult]) -> None:
    written(tmp_path, ["yolo"], header, results)
    labels = tmp_path / "labels"
    assert sorted(path.name for path in labels.iterdir()) == [
        *('a,b "c".txt', "empty ö.txt", "map.txt", "v_000000.txt", "v_000005.txt", "v_000010.txt")
    ]
    assert (labels / "empty ö.txt").read_text() == ""
    rows = np.loadtxt(labels / "v_000010.txt", ndmin=2)
    result = results[4]
    assert rows[:, 0].tolist() == result.labels.tolist()
    corners = np.concatenate([rows[:, 1:3] - rows[:, 3:5] / 2, rows[:, 1:3] + rows[:, 3:5] / 2], axis=1)
    np.testing.assert_allclose(corners * [200, 100, 200, 100], result.boxes_xyxy, atol=1e-5)  # eight decimals
    assert (rows[:, 5].astype(np.float32) == result.scores).all()


def test_files_appear_whole_or_not_at_all(tmp_path: Path, header: JournalHeader, make_result: MakeResult) -> None:
    formats = ["coco", "coco-results", "csv", "parquet"]
    written(tmp_path, formats, header, [make_result("a")])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 6
    with pytest.raises(FileNotFoundError), open_outputs(tmp_path, formats, header) as add:
        add(make_result("b"))
        (tmp_path / "somebody else's mistake").read_text()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_outputs_of_the_journal_are_the_same_in_any_order_of_work(
    tmp_path: Path, header: JournalHeader, results: list[PictureResult]
) -> None:
    names = list(dict.fromkeys(result.file_name for result in results))
    contents = []
    for folder, order in ((tmp_path / "a", results), (tmp_path / "b", results[::-1])):
        with Journal(journal_path(folder), header) as journal:
            for result in order:
                journal.add(result, FileStamp(1, 1))
        index = JournalIndex([journal_path(folder)])
        write_outputs(folder, FORMATS, index, names, coco_name="found.json")
        contents.append(
            {path.name: path.read_bytes() for path in folder.rglob("*.*") if path.suffix not in (".jsonl", "")}
        )
    assert contents[0] == contents[1] and "found.json" in contents[0]


def test_growing_files(tmp_path: Path, header: JournalHeader, results: list[PictureResult]) -> None:
    (tmp_path / "predictions.csv").write_text("torn by a ki")
    formats = ["coco", "csv", "geojson", "parquet"]
    with growing_outputs(tmp_path, formats, header, done=results[:2]) as add:
        for count in range(2, len(results)):
            assert len(pandas.read_csv(tmp_path / "predictions.csv")) == sum(map(len, results[:count]))
            assert len(pandas.read_csv(tmp_path / "predictions_images.csv")) == count
            add(results[count])
        assert (tmp_path / "map.geojson").is_file()
    grown = [(tmp_path / name).read_bytes() for name in ("predictions.csv", "predictions_images.csv")]
    written(tmp_path, ["csv"], header, results)
    assert grown == [(tmp_path / name).read_bytes() for name in ("predictions.csv", "predictions_images.csv")]
    assert not (tmp_path / "predictions.json").exists()


def test_mistakes(tmp_path: Path, header: JournalHeader) -> None:
    with pytest.raises(InputError, match="unknown format 'xml'; choose among coco"):
        check_formats(["csv", "xml"])
    for name in ("../x.json", "a/b.json", ""):
        with pytest.raises(InputError, match="plain file name"):
            check_formats(["coco"], name)
    for name in ("predictions.jsonl", "predictions.csv"):
        with pytest.raises(InputError, match="another file of the run"):
            check_formats(["coco", "csv"], name)
    assert check_formats(["csv", "coco", "yolo"], "x.json") == ["predictions.csv", "predictions_images.csv", "x.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"), open_outputs(tmp_path / "file", ["coco"], header):
        pass


def test_stems() -> None:
    names = ["a/x.png", "b/X.jpg", "x_2.png", "c/x.tif", "v.mp4", "é.png", "e\u0301.png", "no.dots.png", ".png"]
    stems = output_stems(names)
    assert list(stems.values()) == ["x", "X_2", "x_2_2", "x_3", "v", "é", "e\u0301_2", "no.dots", ".png"]
    # A continued run with an image more, in front, keeps the names that are taken.
    later = output_stems(["0/x.png", *names], known=stems)
    assert {name: later[name] for name in names} == stems and later["0/x.png"] == "x_4"
    long = output_stems(["ö" * 300 + ".png", "ö" * 300 + ".jpg"])
    assert len(set(long.values())) == 2 and all(len(stem.encode()) < 210 for stem in long.values())
    many = output_stems(f"{number}/image.png" for number in range(20_000))
    assert len(set(many.values())) == 20_000


def test_inputs_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    image = tmp_path / "real" / "x.jpg"
    image.write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    refuse_overwriting([tmp_path / "link" / "y.jpg"], [image])
    with pytest.raises(InputError, match="would be overwritten"):
        refuse_overwriting([tmp_path / "link" / "x.jpg"], [image])
