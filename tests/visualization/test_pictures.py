"""The pictures: the right pixels change, and nothing else; the curves say what the log says."""

from __future__ import annotations

import numpy as np
import pytest
import supervision as sv
from PIL import Image

from crossdino.errors import InputError
from crossdino.visualization import detections as drawing
from crossdino.visualization import draw_comparison, draw_detections

GREY = 100


def background(width: int = 400, height: int = 300) -> np.ndarray:
    return np.full((height, width, 3), GREY, dtype=np.uint8)


def detections(*boxes: list[float], classes: list[int] | None = None, scores: list[float] | None = None):
    class_id = np.array(classes if classes is not None else [0] * len(boxes), dtype=int)
    return sv.Detections(
        xyxy=np.array(boxes, dtype=np.float32).reshape(-1, 4),
        confidence=np.array(scores if scores is not None else [0.9] * len(boxes), dtype=np.float32),
        class_id=class_id,
        data={"class_name": np.array(["car", "ship"])[class_id]},
    )


def changed(picture: Image.Image, image: np.ndarray) -> np.ndarray:
    return (np.asarray(picture)[: image.shape[0]] != image).any(axis=2)


def colours_along(picture: Image.Image, box: list[int]) -> np.ndarray:
    """The colours of the pixels of a box's outline."""
    pixels, (left, top, right, bottom) = np.asarray(picture), box
    return np.concatenate(
        [
            pixels[top, left : right + 1],
            pixels[bottom, left : right + 1],
            pixels[top : bottom + 1, left],
            pixels[top : bottom + 1, right],
        ]
    )


def rgb(colour: str) -> list[int]:
    return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]


def share_of(colours: np.ndarray, colour: str) -> float:
    return float((colours == rgb(colour)).all(axis=1).mean())


def test_many_small_boxes_change_only_their_outlines():
    image = background()
    boxes = [[10 + 25 * (i % 15), 10 + 25 * (i // 15), 20 + 25 * (i % 15), 19 + 25 * (i // 15)] for i in range(60)]
    before = image.copy()
    picture = draw_detections(image, detections(*boxes, classes=[i % 2 for i in range(60)]))
    assert (image == before).all(), "the caller's image was drawn on"
    expected = np.zeros(image.shape[:2], dtype=bool)
    for index, (left, top, right, bottom) in enumerate(boxes):
        expected[[top, bottom], left : right + 1] = True
        expected[top : bottom + 1, [left, right]] = True
        own = drawing._CLASS_COLOURS[index % 2]
        assert share_of(colours_along(picture, boxes[index]), own) == 1
    # too many and too small for labels: outlines of one pixel and nothing else
    np.testing.assert_array_equal(changed(picture, image), expected)
    assert picture.width == 400
    assert 300 < picture.height < 360


def test_few_detections_get_labels_and_large_boxes_among_many():
    image = background()
    few = draw_detections(image, detections([100, 100, 110, 110]))
    assert changed(few, image)[85:99, 100:120].any()
    boxes = [[10 + 25 * (i % 15), 100 + 25 * (i // 15), 20 + 25 * (i % 15), 109 + 25 * (i // 15)] for i in range(60)]
    many = draw_detections(image, detections(*boxes, [200, 40, 380, 80]))
    assert changed(many, image)[25:39, 200:225].any()
    assert not changed(many, image)[88:99].any()


def test_legend_counts_and_nothing_detected(monkeypatch):
    strips = []
    original = drawing._with_strip
    monkeypatch.setattr(drawing, "_with_strip", lambda picture, *rest: strips.append(rest) or original(picture, *rest))
    image = Image.fromarray(background())
    draw_detections(image, detections([1, 1, 9, 9], [20, 20, 40, 40], [50, 50, 70, 70], classes=[1, 0, 1]))
    draw_detections(image, detections([1, 1, 9, 9], classes=[1]), class_names=["a", "b"])
    draw_detections(image, sv.Detections(xyxy=np.array([[1.0, 1, 9, 9]])))
    picture = draw_detections(image, sv.Detections.empty())
    first, second, third, fourth = strips
    assert [words for _, words in first[1]] == ["car 1", "ship 2"]
    assert [words for _, words in second[1]] == ["b 1"]
    assert [words for _, words in third[1]] == ["class 0 1"]
    assert fourth == ("nothing detected", [])
    assert (np.asarray(picture)[:300] == GREY).all()
    assert (np.asarray(picture)[300:] > 150).any(), "no text in the strip"


def test_tiny_and_odd_images():
    for size in ((1, 1), (7, 300), (300, 7)):
        picture = draw_detections(Image.new("L", size), detections([0, 0, size[0], size[1]]))
        assert picture.mode == "RGB"
        assert picture.width == size[0]
    with pytest.raises(InputError, match="float64"):
        draw_detections(np.zeros((4, 4, 3)), sv.Detections.empty())


def test_comparison_tells_found_missed_and_false(monkeypatch):
    strips = []
    original = drawing._with_strip
    monkeypatch.setattr(drawing, "_with_strip", lambda picture, *rest: strips.append(rest) or original(picture, *rest))
    image = background()
    found, missed, false, weak = [50, 50, 90, 90], [200, 100, 230, 140], [300, 200, 340, 250], [20, 200, 60, 240]
    given = detections([52, 50, 92, 90], found, false, weak, scores=[0.6, 0.9, 0.8, 0.2])
    picture = draw_comparison(image, given, np.array([found, missed]), threshold=0.3)
    assert share_of(colours_along(picture, found), drawing._FOUND_COLOUR) > 0.9
    assert share_of(colours_along(picture, false), drawing._FALSE_COLOUR) == 1
    assert 0.4 < share_of(colours_along(picture, missed), drawing._TRUTH_COLOUR) < 0.9, "not dashed"
    # the second detection of the same object is false
    assert share_of(colours_along(picture, [52, 50, 92, 90])[-40:], drawing._FALSE_COLOUR) > 0.9
    # triangle over the missed object only
    marker = np.asarray(picture)[missed[1] - 7 : missed[1] - 3, 210:220].reshape(-1, 3)
    assert share_of(marker, drawing._TRUTH_COLOUR) > 0.15
    assert not changed(picture, image)[found[1] - 8 : found[1] - 2].any()
    assert not changed(picture, image)[weak[1] : weak[3], : weak[2]].any(), "below the threshold"
    text, legend = strips[0]
    assert text == "recall 0.50, precision 0.33 at score 0.30 and IoU 0.50"
    assert [words for _, words in legend] == ["objects 2, missed 1 (triangle)", "found 1", "false 2"]


def test_comparison_minds_classes_when_given():
    image, box = background(), [50, 50, 90, 90]
    given = detections(box, classes=[1])
    same = draw_comparison(image, given, np.array([box]), np.array([1]))
    other = draw_comparison(image, given, np.array([box]), np.array([0]))
    assert share_of(colours_along(same, box), drawing._FOUND_COLOUR) == 1
    assert share_of(colours_along(other, box), drawing._FOUND_COLOUR) == 0


def test_comparison_of_nothing():
    image = background()
    for given, truth in ((sv.Detections.empty(), np.zeros((0, 4))), (detections([5, 5, 9, 9]), np.zeros((0, 4)))):
        assert draw_comparison(image, given, truth).width == 400
    assert changed(draw_comparison(image, sv.Detections.empty(), np.array([[5, 1, 30, 30]])), image).any()
