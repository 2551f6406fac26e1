"""A picture's line: nothing is lost, and numbers are as short as numpy prints them."""

from __future__ import annotations

import numpy as np
import supervision as sv

from crossdino.results import PictureResult
from crossdino.results.picture_result import read_head, shortest_decimals
from crossdino.sources import Georeference, Picture, Source


def bits(values: np.ndarray) -> list[int]:
    return values.view(np.uint32).ravel().tolist()


def test_every_float_comes_back_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 1 << 32, 40_000, dtype=np.uint32)
    values = patterns[((patterns >> 23) & 0xFF) != 0xFF].view(np.float32)  # all but infinities and NaN
    values = np.concatenate([values, np.array([0.0, -0.0, 1.0, 0.1, 4096.5, 16777216.0, 1e-45], np.float32)])
    values = values[: len(values) // 4 * 4]
    count = len(values) // 4
    result = PictureResult("x", 1, 1, values.reshape(-1, 4), values[:count], np.arange(count))
    back = PictureResult.from_line(result.to_line())
    assert bits(back.boxes_xyxy) == bits(values)
    assert bits(back.scores) == bits(values[:count])
    assert back.boxes_xyxy.dtype == back.scores.dtype == np.float32


def test_numbers_are_as_short_as_they_can_be() -> None:
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.uniform(0, 20_000, 2000), rng.uniform(0, 1, 2000), [0.1, 0.25, 640, 33.3]])
    values = values.astype(np.float32)
    # numpy prints the shortest decimal number that is nearest to the float32; Python that of the double.
    assert [float(str(value)) for value in values] == shortest_decimals(values).tolist()


def test_all_fields_come_back() -> None:
    place = Georeference("EPSG:32633", (0.1, 0.01, 500000.123456789, -0.01, -0.1, 1 / 3))
    for name in ('a/ä 船 "x",\\.png', 'evil","labels":[1].png', "line\nbreak.png", "no\udcffunicode.png"):
        result = PictureResult(
            *(name, 7, 9, np.array([[1, 2, 3, 4.5]], np.float32), np.array([0.3], np.float32), np.array([2])),
            frame=12,
            seconds=0.1 + 0.2,
            georeference=place,
            capped=True,
            picture="ä.jpg",
            stem="ä",
        )
        line = result.to_line()
        assert line.count(b"\n") == 1 and line.endswith(b"\n")
        back = PictureResult.from_line(line)
        for field in ("file_name", "width", "height", "frame", "seconds", "georeference", "capped", "picture", "stem"):
            assert getattr(back, field) == getattr(result, field), field
        assert back.labels.tolist() == [2] and back.key == f"{name}#12" and len(back) == 1
        head = read_head(line)
        assert (head["file_name"], head["num_objects"]) == (name, 1)
        assert "labels" not in head


def test_an_empty_picture_keeps_its_shapes() -> None:
    empty = PictureResult("a.png", 5, 6, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    back = PictureResult.from_line(empty.to_line())
    assert back.boxes_xyxy.shape == (0, 4) and back.scores.shape == back.labels.shape == (0,)
    assert back.key == "a.png" and back.frame is None and back.georeference is None


class Blank(Picture):
    def __init__(self) -> None:
        self.source = Source("v.mp4", "/v.mp4", "video")
        self.frame, self.seconds, self.hw = 3, 0.12, (20, 30)

    def read(self, tile):
        raise AssertionError

    def read_reduced(self, hw):
        raise AssertionError


def test_from_detections_and_back() -> None:
    found = sv.Detections(
        xyxy=np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32),
        confidence=np.array([0.5, 0.25], np.float32),
        class_id=np.array([1, 0]),
    )
    result = PictureResult.from_detections(Blank(), found, stem="v", capped=True)
    assert (result.file_name, result.width, result.height, result.frame, result.seconds) == ("v.mp4", 30, 20, 3, 0.12)
    assert result.capped and result.stem == "v"
    again = result.to_detections(["car", "ship"])
    assert again.xyxy.tolist() == found.xyxy.tolist() and again.data["class_name"].tolist() == ["ship", "car"]
    assert not PictureResult.from_detections(Blank(), sv.Detections.empty()).capped
