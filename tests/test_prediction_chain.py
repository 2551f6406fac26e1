"""Prediction from the user's side, with a model that sees every rectangle: seams, maps, output folders, image ids."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from pycocotools.coco import COCO
from rasterio.transform import Affine
from scipy import ndimage
from torch import Tensor, nn

from crossdino.config import InferenceConfig, ModelConfig
from crossdino.errors import InputError
from crossdino.prediction_job import RunSummary, predict_sources
from crossdino.prediction_work import WorkSettings
from crossdino.predictor import Predictor
from crossdino.results.journal import JOURNAL_FILE
from crossdino.sources import ReadOptions, find_sources, open_pictures
from crossdino.structures import DetectorOutput
from crossdino.tiling import tile_starts
from tests.stand_in import Quarters, StandInSettings, save_image, save_video, settings_of

TILE, OVERLAP = 128, 32


def components(bright: np.ndarray) -> np.ndarray:
    """Each connected part with a number of its own."""
    numbers = np.zeros(bright.shape, dtype=np.int32)
    ndimage.label(bright, output=numbers)
    return numbers


class Oracle(nn.Module):
    """Finds every red or blue rectangle on black; to be used on tiles that are not resized."""

    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)

    def __init__(self, num_queries: int = 100) -> None:
        super().__init__()
        self.config = ModelConfig(class_names=("red", "blue"), num_queries=num_queries)
        self.inference = InferenceConfig(
            short_side=TILE, long_side=TILE, num_select=num_queries, tile_size=TILE, tile_overlap=OVERLAP
        )
        self.calibration = None

    def forward(self, images: Tensor, padding_mask: Tensor) -> DetectorOutput:
        del padding_mask
        shape = (len(images), self.config.num_queries)
        logits, boxes = torch.full((*shape, 2), -20.0), torch.full((*shape, 4), 0.5)
        for number, image in enumerate(images):
            found = [
                (part, label)
                for label in (0, 1)
                for part in ndimage.find_objects(components(image[2 * label].numpy() > 0.5))
            ]
            for place, ((rows, columns), label) in enumerate(found[: shape[1]]):
                centre = (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2
                size = columns.stop - columns.start, rows.stop - rows.start
                boxes[number, place] = torch.tensor([*centre, *size]) / TILE
                logits[number, place, label] = 4.0
        return DetectorOutput(logits, boxes)


def objects_on_seams(hw: tuple[int, int], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (H, W, 3), and boxes with labels (n, 5): an object on every corner of tiles and in the middle of seams."""
    pixels = np.zeros((*hw, 3), dtype=np.uint8)
    edges = [
        sorted({edge for start in tile_starts(length, TILE, OVERLAP) for edge in (start, start + TILE)} - {0, length})
        for length in hw
    ]
    between = [(first + second) // 2 for first, second in zip(edges[1], edges[1][1:], strict=False)]
    found: list[tuple[int, ...]] = []
    for y in edges[0]:
        for x in (*edges[1], *between):
            left, top = x - side // 2, y - side // 2
            if any(abs(left - box[0]) <= side and abs(top - box[1]) <= side for box in found):
                continue
            label = len(found) % 2
            pixels[top : top + side, left : left + side, 2 * label] = 255
            found.append((left, top, left + side, top + side, label))
    return pixels, np.array(found)


def by_place(boxes: np.ndarray) -> np.ndarray:
    return boxes[np.lexsort(boxes.T[::-1])]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_objects_on_every_seam_come_out_once(batch_size: int) -> None:
    pixels, expected = objects_on_seams((300, 400), 24)
    assert len(expected) >= 15
    found = Predictor(Oracle(), threshold=0.5, batch_size=batch_size)(pixels)  # type: ignore[arg-type]
    assert found.class_id is not None
    rows = np.concatenate([found.xyxy, found.class_id[:, None]], axis=1)
    np.testing.assert_allclose(by_place(rows.round(2)), by_place(expected), atol=0.01)  # float32 shares of 128 px


def test_thousands_of_objects_in_one_image_and_a_word_where_places_are_filled() -> None:
    pixels = np.zeros((640, 640, 3), dtype=np.uint8)
    for y in range(2, 630, 12):
        for x in range(2, 630, 12):
            pixels[y : y + 6, x : x + 6, 2 * ((x // 12 + y // 12) % 2)] = 255
    all_found = next(Predictor(Oracle(200), threshold=0.5).stream(pixels))  # type: ignore[arg-type]
    assert len(all_found.detections) == 53 * 53 and not all_found.capped
    assert next(Predictor(Oracle(200), threshold=0.5, num_select=50).stream(pixels)).capped  # type: ignore[arg-type]


@pytest.mark.parametrize("degrees", [0.0, 30.0])
def test_polygons_lie_where_the_objects_are_on_the_map(
    tmp_path: Path, degrees: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, expected = objects_on_seams((300, 400), 24)
    cosine, sine = 0.5 * math.cos(math.radians(degrees)), 0.5 * math.sin(math.radians(degrees))  # half a metre a pixel
    place = Affine(cosine, sine, 400_000, sine, -cosine, 5_600_000)
    profile: dict[str, Any] = {"driver": "GTiff", "height": 300, "width": 400, "count": 3, "dtype": "uint8"}
    with rasterio.open(tmp_path / "map.tif", "w", crs="EPSG:32633", transform=place, **profile) as file:
        file.write(pixels.transpose(2, 0, 1))
    oracle: Any = Oracle()
    monkeypatch.setattr(StandInSettings, "make_predictor", lambda self, _: Predictor(oracle, **self.predictor))
    predict(settings_of(tmp_path), tmp_path / "map.tif", formats=["geojson"])
    features = json.loads((tmp_path / "out" / "map.geojson").read_text())["features"]
    centres = np.array([np.mean(feature["geometry"]["coordinates"][0][:4], axis=0) for feature in features])
    columns, rows = (expected[:, 0] + expected[:, 2]) / 2, (expected[:, 1] + expected[:, 3]) / 2
    easts, norths = cosine * columns + sine * rows, sine * columns - cosine * rows
    wanted = np.stack([400_000 + easts, 5_600_000 + norths], axis=1)
    assert len(centres) == len(wanted)
    # A hundredth of a pixel.
    assert np.linalg.norm(centres[:, None] - wanted[None], axis=2).min(axis=0).max() < 0.005


def predict(settings: WorkSettings, *words: Path, recursive: bool = False, **options: Any) -> RunSummary:
    sources, _ = find_sources([str(word) for word in words], recursive=recursive)
    return predict_sources(sources, settings, **options)


def test_what_a_run_has_drawn_is_no_input_of_the_next(tmp_path: Path) -> None:
    images = tmp_path / "images"
    save_image(images / "a.png", 0)
    save_image(images / "b.png", 1)
    save_video(images / "clip.mkv", 2)
    Image.new("RGB", (20, 20)).save(images / "own.jpg")
    for output in (images / "results", images / "results", images / "day" / "results", images / "day" / "results"):
        assert predict(settings_of(tmp_path, output=output), images, recursive=True).num_pictures == 5
    assert sorted(path.name for path in (images / "results").glob("*.[jm]p*")) == [
        "a.jpg",
        "b.jpg",
        "clip.mp4",
        "own.jpg",
    ]

    # Also where the results lie beside the images, and where a killed run did not come to note what it had drawn.
    same = settings_of(tmp_path, output=images)
    (images / "own.jpg").unlink()
    predict(same, images)
    journal = images / JOURNAL_FILE
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:2]))
    assert predict(same, images).num_pictures == 4

    with pytest.raises(InputError, match="holds only pictures that an earlier run has drawn"):
        find_sources([str(images / "results")])
    assert [source.name for source in find_sources([str(images / "*.*")])[0]] == [
        str(images / name) for name in ("a.png", "b.png", "clip.mkv")
    ]
    assert len(find_sources([str(images / "a.jpg")])[0]) == 1  # named, it is meant


def test_a_run_that_found_nothing_binds_nobody(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 0)

    def fails(*_: object) -> Any:
        raise InputError("no cluster")

    with pytest.raises(InputError, match="no cluster"):
        predict(settings_of(tmp_path, draw=False), tmp_path / "a.png", work=fails)
    other = settings_of(tmp_path, predictor={"threshold": 0.6})
    assert predict(other, tmp_path / "a.png").num_pictures == 1


def test_a_foreign_file_is_never_overwritten(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / JOURNAL_FILE).write_text('{"mine": 1}\n')
    with pytest.raises(InputError, match="no journal"):
        predict(settings_of(tmp_path), tmp_path / "a.png")
    assert (tmp_path / "out" / JOURNAL_FILE).read_text() == '{"mine": 1}\n'


def test_image_ids_of_annotations(tmp_path: Path) -> None:
    names = {"a.png": 42, "sub/a.png": 17, "b.png": 99}
    truth = {
        "images": [
            {"id": number, "file_name": name, "width": 60, "height": 40}
            for name, number in [*names.items(), ("c.png", 1)]
        ],
        "annotations": [],
        "categories": [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}],
    }
    annotations = tmp_path / "truth.json"
    annotations.write_text(json.dumps(truth))
    for seed, name in enumerate(names):
        save_image(tmp_path / "images" / name, seed)
    settings = settings_of(tmp_path)
    options: dict[str, Any] = {"formats": ["coco", "coco-results"], "recursive": True}
    predict(settings, tmp_path / "images", **options)  # without: ids are counted
    assert {image["id"] for image in json.loads((tmp_path / "out/predictions.json").read_text())["images"]} == {1, 2, 3}

    summary = predict(settings, tmp_path / "images", annotations=annotations, **options)
    assert summary.num_before == 3  # nothing is computed again
    for image in json.loads((tmp_path / "out/predictions.json").read_text())["images"]:
        assert names[image["file_name"].partition("images/")[2]] == image["id"]
    loaded = COCO(str(annotations)).loadRes(str(tmp_path / "out/predictions_coco_results.json"))
    assert sorted({found["image_id"] for found in loaded.dataset["annotations"]}) == [17, 42, 99]

    twice = save_image(tmp_path / "b.png", 6)
    stranger = save_image(tmp_path / "d.png", 5)
    film = save_video(tmp_path / "film.mp4", 1)
    for words, message in (
        ([stranger], "does not know image .*d.png"),
        ([tmp_path / "images", twice], "are one image"),
        ([film], "film.mp4 is no image"),
    ):
        with pytest.raises(InputError, match=message):
            predict(settings, *words, annotations=annotations)
    for content, message in (("[]", "lists no images"), ("{", "lists no images"), (None, "cannot be read")):
        annotations.unlink() if content is None else annotations.write_text(content)
        with pytest.raises(InputError, match=message):
            predict(settings, twice, annotations=annotations)


def test_without_rasterio_bands_are_refused_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    save_image(tmp_path / "a.png", 0)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "rasterio" else find(name, *a))
    with pytest.raises(InputError, match="bands and ranges of values are read with rasterio"):
        predict(settings_of(tmp_path, reading=ReadOptions(bands=(1,))), tmp_path / "a.png")
    assert not (tmp_path / "out").exists()


def test_one_image_in_memory_is_one_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    predictor = Predictor(Quarters())  # type: ignore[arg-type]
    expected = predictor(pixels).xyxy
    for one in (pixels, Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)):
        (found,) = predictor.predict_many(one)
        np.testing.assert_array_equal(found.xyxy, expected)
    assert len(list(predictor.predict_many(np.stack([pixels, pixels])))) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 1.5}, "batch_size is 1.5: give a whole number"),
        ({"num_select": "x"}, "num_select is 'x': give a whole number"),
        ({"merge_iou": "a"}, "merge_iou is 'a'"),
        ({"tile_size": 64, "tile_overlap": 1.5}, "tile_overlap is 1.5"),
    ],
)
def test_settings_of_a_wrong_type(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Predictor(Quarters(), **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="on_error is 'ignore'"):
        next(Predictor(Quarters()).stream([], on_error="ignore"))  # type: ignore[arg-type]


def test_predictions_travel_to_other_processes(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 0)
    prediction = next(Predictor(Quarters()).stream(tmp_path / "a.png"))  # type: ignore[arg-type]
    there = pickle.loads(pickle.dumps(prediction))
    np.testing.assert_array_equal(there.detections.xyxy, prediction.detections.xyxy)
    tile = Predictor(Quarters(), tile_size=32).tiles_of((40, 60))[1]  # type: ignore[arg-type]
    np.testing.assert_array_equal(there.picture.read(tile), prediction.picture.read(tile))
    by_windows = next(open_pictures(find_sources([str(tmp_path / "a.png")])[0][0], ReadOptions(windowed_px=0)))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(by_windows)).read(tile), prediction.picture.read(tile))
