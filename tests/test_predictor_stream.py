"""The stream of a predictor: order, errors, batches, what is open at the same time, and what is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from crossdino.config import InferenceConfig
from crossdino.data.images import ImageError
from crossdino.errors import InputError
from crossdino.evaluation.calibration import Calibration
from crossdino.predictor import Prediction, Predictor
from crossdino.sources import Picture, Source
from crossdino.tiling import Tile, choose_tiles
from tests.stand_in import Quarters, save_image, save_video


class Noted(Picture):
    """A picture of one shade that notes what happens to it."""

    def __init__(self, number: int, hw: tuple[int, int] = (32, 32), broken: bool = False) -> None:
        self.source = Source(f"{number}", "", "memory")
        self.hw = hw
        self.number = number
        self.broken = broken
        self.num_read = 0
        self.closed = False

    def read(self, tile: Tile) -> NDArray[np.uint8]:
        self.num_read += 1
        if self.broken:
            raise ImageError(f"image {self.number} is broken")
        pixels = np.zeros((tile.height, tile.width, 3), np.uint8)
        pixels[: self.hw[0] - tile.top, : self.hw[1] - tile.left] = 20 + 5 * self.number
        return pixels

    def read_reduced(self, hw: tuple[int, int]) -> NDArray[np.uint8]:
        raise AssertionError("small pictures are read whole")

    def close(self) -> None:
        self.closed = True


def shade(prediction: Prediction) -> int:
    """The number of a `Noted` by what was found in it."""
    assert prediction.detections.confidence is not None
    return round((float(prediction.detections.confidence[0]) * 255 - 20) / 5)


def num_threads() -> int:
    return sum(thread.is_alive() for thread in threading.enumerate())


def test_results_come_in_order_with_errors_in_their_turn() -> None:
    pictures: list[Any] = [Noted(number, broken=number in (2, 5, 6)) for number in range(9)]
    pictures.insert(4, "no/such/file.png")
    for batch_size in (1, 4):
        predictor = Predictor(Quarters(), batch_size=batch_size)
        found = list(predictor.stream(pictures, on_error="yield"))
        names = [prediction.picture.source.name for prediction in found]
        assert names == ["0", "1", "2", "3", "no/such/file.png", "4", "5", "6", "7", "8"]
        errors = [str(prediction.error) if prediction.error else None for prediction in found]
        assert [index for index, error in enumerate(errors) if error] == [2, 4, 6, 7]
        assert "image 2 is broken" in str(errors[2]) and "no/such/file.png" in str(errors[4])
        assert [len(prediction.detections) for prediction in found] == [0 if error else 4 for error in errors]
        assert [shade(prediction) for prediction in found if not prediction.error] == [0, 1, 3, 4, 7, 8]
        seen = []
        with pytest.raises(ImageError, match="image 2 is broken"):
            for prediction in predictor.stream(pictures):
                seen.append(shade(prediction))
        assert seen == [0, 1]


def test_an_error_of_the_iterable_comes_after_what_was_before_it() -> None:
    def three() -> Iterator[Picture]:
        yield from map(Noted, range(3))
        raise RuntimeError("the database is gone")

    for batch_size in (1, 8):
        seen = []
        with pytest.raises(RuntimeError, match="database"):
            for prediction in Predictor(Quarters(), batch_size=batch_size).stream(three()):
                seen.append(shade(prediction))
        assert seen == [0, 1, 2]
    assert list(Predictor(Quarters()).stream([])) == []
    assert list(Predictor(Quarters(), batch_size=4).predict_many(iter(()))) == []


def test_closing_early_leaves_nothing_behind(tmp_path: Path) -> None:
    import rasterio

    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(1, 0, 9, 0, -1, 0)}
    for number in range(6):
        with rasterio.open(
            tmp_path / f"{number}.tif", "w", driver="GTiff", width=64, height=64, count=3, dtype="uint8", **place
        ) as file:
            file.write(np.full((3, 64, 64), 90, np.uint8))
    save_video(tmp_path / "z.mp4", 20)
    predictor = Predictor(Quarters(), tile_size=32, tile_overlap=0, batch_size=2)
    next(iter(predictor.stream(tmp_path))).picture.close()  # whatever is opened once for all
    threads, files = num_threads(), len(os.listdir("/proc/self/fd"))
    for num_taken in (0, 1, 3, 9):
        stream = predictor.stream(tmp_path)
        for _ in range(num_taken):
            next(stream).picture.close()
        stream.close()
        del stream
        assert num_threads() == threads
        assert len(os.listdir("/proc/self/fd")) == files
    pictures = [Noted(number) for number in range(50)]
    stream = predictor.stream(pictures)
    first = next(stream)
    stream.close()
    assert not first.picture.closed  # type: ignore[attr-defined]  # it was given to us
    assert sum(picture.num_read > 0 for picture in pictures) < 20


def test_batches_are_filled_across_pictures_always_in_the_same_way() -> None:
    sizes = [(32, 32), (70, 40), (20, 90), (33, 33), (1, 1), (64, 64), (32, 500), (7, 32)]
    pictures = [Noted(number, hw, broken=number == 3) for number, hw in enumerate(sizes)]

    def slowly(seed: int) -> Iterator[Picture]:
        rng = np.random.default_rng(seed)
        for picture in pictures:
            threading.Event().wait(rng.choice([0.0, 0.01]))
            yield picture

    tiles = dict(tile_size=32, tile_overlap=8)
    one = Predictor(Quarters(), **tiles)  # type: ignore[arg-type]
    alone = list(one.stream(pictures, on_error="yield"))
    composed = set()
    for seed in range(3):
        predictor = Predictor(Quarters(), batch_size=3, full_image=True, **tiles)  # type: ignore[arg-type]
        list(predictor.stream(slowly(seed), on_error="yield"))
        composed.add(tuple(predictor.model.batch_sizes))  # type: ignore[arg-type]
    assert len(composed) == 1
    three = Predictor(Quarters(), batch_size=3, **tiles)  # type: ignore[arg-type]
    for one_by_one, together in zip(alone, three.stream(pictures, on_error="yield"), strict=True):
        assert (one_by_one.error is None) == (together.error is None)
        # the same numbers summed in another order: some float32 steps
        np.testing.assert_allclose(one_by_one.detections.xyxy, together.detections.xyxy, atol=1e-4)
        np.testing.assert_allclose(one_by_one.detections.confidence, together.detections.confidence, atol=1e-6)
    batches = three.model.batch_sizes
    num_tiles = sum(len(three.tiles_of(hw)) for number, hw in enumerate(sizes) if number != 3)
    assert (
        sum(batches) == num_tiles and batches[:-1].count(3) >= len(batches) - 3
    )  # all but those beside the broken one


def test_the_other_tiles_of_a_broken_picture_are_not_computed() -> None:
    """Not even those that have been read by the time that the broken one is met: that would depend on the threads."""

    class Torn(Noted):
        others_read = threading.Event()

        def read(self, tile: Tile) -> NDArray[np.uint8]:
            if tile.left == 0:
                assert self.others_read.wait(10)
                raise ImageError("image is broken")
            pixels = super().read(tile)
            if self.num_read == 2:
                self.others_read.set()
            return pixels

    predictor = Predictor(Quarters(), tile_size=32, tile_overlap=0)
    torn, good = predictor.stream([Torn(1, (32, 96)), Noted(2)], on_error="yield")
    assert torn.error is not None and len(torn.detections) == 0 and shade(good) == 2
    assert predictor.model.num_seen == 1


def test_a_slow_camera_gets_its_result_before_the_next_frame() -> None:
    answered: list[int] = []
    go = threading.Event()

    def camera() -> Iterator[Picture]:
        for number in range(4):
            assert number == 0 or go.wait(10), "the result of the last frame did not come"
            go.clear()
            yield Noted(number)

    for prediction in Predictor(Quarters()).stream(camera()):
        answered.append(shade(prediction))
        go.set()
    assert answered == [0, 1, 2, 3]


def test_pictures_are_read_while_the_network_works_and_few_at_a_time() -> None:
    opened: list[int] = []
    second_read = threading.Event()

    class Waiting(Noted):
        def read(self, tile: Tile) -> NDArray[np.uint8]:
            if self.number == 1:
                second_read.set()
            return super().read(tile)

    class Slow(Quarters):
        def forward(self, images: torch.Tensor, padding_mask: torch.Tensor) -> Any:
            # The first picture is in the network until the second one is read.
            assert self.num_seen or second_read.wait(10)
            return super().forward(images, padding_mask)

    def pictures() -> Iterator[Picture]:
        for number in range(200):
            opened.append(number)
            yield Waiting(number % 40)

    most = 0
    for number, prediction in enumerate(Predictor(Slow(), batch_size=2, num_threads=2).stream(pictures())):
        assert shade(prediction) == number % 40
        most = max(most, len(opened) - number)
    # In the queue of the reading thread, in its hand, and on their way: 2 x (2 x 2 + 2) + 2.
    assert most <= 14 and second_read.is_set()


def test_memory_does_not_grow_with_the_picture(tmp_path: Path) -> None:
    """8000 x 8000 pixels would be 192 MB decoded; a stand-in looks at all of its tiles in a process of its own."""
    code = """
import resource, sys
import rasterio.transform
import rasterio, numpy as np
from rasterio.windows import Window
from crossdino.predictor import Predictor
from crossdino.sources import ReadOptions, Source, open_pictures
from tests.stand_in import Quarters
path, side = sys.argv[1], 8000
form = dict(driver="GTiff", width=side, height=side, count=3, dtype="uint8", tiled=True, compress="lzw")
with rasterio.open(path, "w", **form, crs="EPSG:32633", transform=rasterio.transform.from_origin(0, 0, 1, 1)) as file:
    for row in range(0, side, 500):
        file.write(np.full((3, 500, side), row // 50, np.uint8), window=Window(0, row, side, 500))
predictor = Predictor(Quarters(), tile_size=640, tile_overlap=64, batch_size=2, full_image=True)
next(predictor.stream(sys.argv[2])).picture.close()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(prediction,) = predictor.stream(open_pictures(Source(path, path, "image"), ReadOptions(windowed_px=10_000_000)))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, predictor.model.num_seen, len(prediction.detections))
"""
    small = save_image(tmp_path / "small.png", 0, (700, 700))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "large.tif"), str(small)],
        capture_output=True,
        text=True,
        env={**os.environ, "GDAL_CACHEMAX": "16", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    growth_kib, num_looks, num_found = map(int, done.stdout.split())
    assert num_looks == 4 + 1 + 14 * 14 + 1 and num_found > 100
    assert growth_kib < 120_000  # tiles, threads, GDAL's cache; the picture alone would be 187,500 KiB


def test_capped_means_that_all_places_were_taken() -> None:
    bright, dark = np.full((32, 32, 3), 200, np.uint8), np.zeros((32, 32, 3), np.uint8)
    half = np.concatenate([bright, dark], axis=1)

    def capped(image: NDArray[np.uint8], **options: Any) -> bool:
        (prediction,) = Predictor(Quarters(), **options).stream([image])
        return prediction.capped

    assert capped(bright, threshold=0.5) and not capped(dark, threshold=0.5) and not capped(half, threshold=0.5)
    assert capped(half, threshold=0.5, num_select=2) and capped(dark)
    assert capped(half, threshold=0.5, tile_size=32, tile_overlap=0)  # one of its tiles is full
    assert not capped(half, threshold=0.5, num_select=5)


def test_full_image_joins_a_look_at_the_whole() -> None:
    image = np.full((64, 96, 3), 200, np.uint8)
    tiled = Predictor(Quarters(), threshold=0.5, tile_size=32, tile_overlap=0)
    both = Predictor(Quarters(), threshold=0.5, tile_size=32, tile_overlap=0, full_image=True)
    assert len(tiled(image)) == 6 * 4
    assert (tiled.model.num_seen, both.model.num_seen) == (6, 0)
    widths = both(image).xyxy
    assert both.model.num_seen == 7
    assert 0.2 * 96 in np.round(widths[:, 2] - widths[:, 0], 3)  # a box of the whole image, wider than any of a tile
    assert not Predictor(Quarters(), full_image=True).full_image  # without tiles it is all that there is


def test_the_threshold_holds_for_scores_that_merging_has_lowered() -> None:
    """Of the boxes that both tiles see in the same place, soft merging lowers one of each pair by exp(-2)."""
    image = np.full((40, 60, 3), 200, np.uint8)
    tiles = {"tile_size": 40, "tile_overlap": 20, "merge": "soft"}
    found = {at: Predictor(Quarters(), threshold=at, **tiles)(image).confidence for at in (0.05, 0.5)}
    score = 200 / 255
    # the float32 sigmoid of a float32 logit
    np.testing.assert_allclose(found[0.05], [score] * 6 + [score * np.exp(-2)] * 2, atol=1e-5)
    np.testing.assert_allclose(found[0.5], [score] * 6, atol=1e-5)


def test_threshold_auto_uses_the_calibration() -> None:
    model = Quarters()
    with pytest.raises(InputError, match="no calibration.*crossdino calibrate"):
        Predictor(model, threshold="auto")
    # Temperature 2 and bias 1; red counts from 0.5, blue from 0.9.
    model.calibration = Calibration(model.config.class_names, (8.0,), (2.0,), (1.0,), (0.0, 0.0), ((0.5, 0.9),))
    image = np.zeros((32, 32, 3), np.uint8)
    image[:16], image[16:] = (60, 60, 60), (90, 90, 100)  # blue below
    found = Predictor(model, threshold="auto")(image)

    def calibrated(score: float) -> float:
        return 1 / (1 + np.exp(-(np.log(score / (1 - score)) / 2 + 1)))

    # the float32 sigmoid of a float32 logit
    np.testing.assert_allclose(found.confidence, [calibrated(60 / 255)] * 2, atol=1e-5)
    assert calibrated(60 / 255) > 0.5 and calibrated(93.3 / 255) < 0.9
    assert found.class_id.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("changes", "arguments", "expected"),
    [
        ({}, (None, None), (0, 64)),
        ({"tile_size": 640}, (None, None), (640, 64)),
        ({"tile_size": 640}, (0, None), (0, 0)),
        ({}, (100, None), (100, 25)),
        ({}, (1000, None), (1000, 64)),
        ({}, (100, 30), (100, 30)),
        ({"auto_tile_size": 300, "auto_tile_overlap": 77}, ("auto", None), (300, 77)),
        ({"auto_tile_size": 300, "auto_tile_overlap": 77}, ("auto", 12), (300, 12)),
        ({}, ("auto", None), "does not know how large its objects were"),
        ({}, (None, 32), "not cut into tiles"),
        ({"tile_size": 640}, (0, 32), "not cut into tiles"),
        ({}, (100, 100), "cannot overlap by 100"),
        ({}, (-1, None), "tile_size is -1"),
        ({}, ("large", None), "tile_size is 'large'"),
    ],
)
def test_choose_tiles(changes: dict[str, int], arguments: tuple[Any, Any], expected: tuple[int, int] | str) -> None:
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            choose_tiles(InferenceConfig(**changes), *arguments)
    else:
        size, overlap = choose_tiles(InferenceConfig(**changes), *arguments)
        assert size == expected[0] and (overlap == expected[1] or not size)


def test_folders_patterns_and_videos_by_their_names(tmp_path: Path) -> None:
    save_image(tmp_path / "b.png", 1, (1, 1))
    save_image(tmp_path / "a.png", 0)
    save_video(tmp_path / "c.mp4", 5)
    predictor = Predictor(Quarters())
    assert len(list(predictor.predict_many(str(tmp_path)))) == 2 + 5
    assert len(list(predictor.predict_many(tmp_path / "*.png"))) == 2
    frames = [
        (prediction.picture.frame, prediction.picture.seconds) for prediction in predictor.stream(tmp_path / "c.mp4")
    ]
    assert frames == [(number, pytest.approx(number / 10)) for number in range(5)]
    with pytest.raises(InputError, match=r"nothing\.png"):
        list(predictor.stream("nothing.png"))


def test_tiles_that_are_kept_are_not_computed_again() -> None:
    kept: dict[int, Any] = {}

    class Memory:
        def load(self, picture: Picture, num_tiles: int) -> dict[int, Any]:
            assert num_tiles == 6
            return dict(kept)

        def save(self, picture: Picture, num_tiles: int, number: int, found: Any) -> None:
            kept[number] = found
            if len(kept) == 4:
                raise KeyboardInterrupt

    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    options: dict[str, Any] = dict(tile_size=32, tile_overlap=0, full_image=True)
    first = Predictor(Quarters(), **options)
    with pytest.raises(KeyboardInterrupt):
        list(first.stream([image], memory=Memory()))
    second = Predictor(Quarters(), **options)
    (resumed,) = second.stream([image], memory=Memory())
    assert (first.model.num_seen, second.model.num_seen) == (4, 3)
    (third,) = second.stream([image], memory=Memory())  # nothing is left to do
    assert second.model.num_seen == 3
    expected = Predictor(Quarters(), **options)(image)
    for found in (resumed, third):
        np.testing.assert_array_equal(found.detections.xyxy, expected.xyxy)
        np.testing.assert_array_equal(found.detections.confidence, expected.confidence)
