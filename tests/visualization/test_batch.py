"""The batch as the network sees it: pixels, boxes, padding and captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from crossdino.errors import InputError
from crossdino.structures import Target
from crossdino.visualization import batch
from crossdino.visualization.batch import draw_batch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ORANGE, BLUE = (255, 145, 0), (0, 184, 255)  # the house's first two class colours
GAP = 6


def normalized(pixels: np.ndarray) -> torch.Tensor:
    """(H, W, 3) uint8 as the data set hands it on, written out per channel."""
    planes = [(pixels[..., c] / 255 - MEAN[c]) / STD[c] for c in range(3)]
    return torch.tensor(np.stack(planes), dtype=torch.float32)


def target(boxes_xyxy: list[list[float]], labels: list[int], hw: tuple[int, int], image_id: int = 1) -> Target:
    boxes = torch.tensor(boxes_xyxy, dtype=torch.float64).view(-1, 4) / torch.tensor([hw[1], hw[0], hw[1], hw[0]])
    centred = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)
    return Target(centred.float(), torch.tensor(labels, dtype=torch.int64), image_id=image_id)


def draw(images, targets, masks=None, names=("tree", "car"), **options) -> np.ndarray:
    if masks is None:
        masks = [torch.zeros(image.shape[1:], dtype=torch.bool) for image in images]
    return np.asarray(draw_batch(images, masks, targets, names, MEAN, STD, **options))


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that is written."""
    written: list[str] = []
    plain = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, xy: tuple[float, float], words: str, *rest, **options) -> None:
        written.append(words)
        plain(self, xy, words, *rest, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return written


def test_pixels_are_those_of_the_image() -> None:
    """480 pixels are doubled, each one a block of its own; colours come back to the last digit."""
    pixels = np.random.default_rng(0).integers(0, 256, (320, 480, 3), dtype=np.uint8)
    picture = draw([normalized(pixels)], [target([], [], (320, 480))])
    shown = picture[GAP : GAP + 640, GAP : GAP + 960]
    assert (shown == pixels.repeat(2, axis=0).repeat(2, axis=1)).all()


@pytest.mark.parametrize(("side", "factor"), [(961, 1), (480, 2), (200, 4), (20, 12)])
def test_small_images_are_enlarged(side: int, factor: int) -> None:
    pixels = np.full((side, side, 3), (9, 99, 199), dtype=np.uint8)
    picture = draw([normalized(pixels)], [target([], [], (side, side))])
    found = (picture == (9, 99, 199)).all(-1)
    assert found.sum() == (side * factor) ** 2


def test_lines_lie_around_their_objects() -> None:
    """An object of 3 x 2 pixels keeps all its pixels; its line touches it on all sides, in its class's colour."""
    pixels = np.zeros((480, 480, 3), dtype=np.uint8)
    pixels[100:102, 50:53] = 255
    picture = draw([normalized(pixels)], [target([[50, 100, 53, 102]], [1], (480, 480))])
    shown = picture[GAP : GAP + 960, GAP : GAP + 960]
    assert (shown[200:204, 100:106] == 255).all()
    for line in (shown[199, 99:107], shown[204, 99:107], shown[199:205, 99], shown[199:205, 106]):
        assert (line == BLUE).all()
    assert (shown != 0).any(-1).sum() == 6 * 8  # line and object, and nothing else


def test_boxes_at_the_border_stay_in_the_picture() -> None:
    pixels = np.zeros((480, 480, 3), dtype=np.uint8)
    boxes = [[0.0, 0, 480, 480], [0, 0, 1, 1], [479, 479, 480, 480], [200, 200, 200.01, 200.01]]
    shown = draw([normalized(pixels)], [target(boxes, [0, 1, 1, 1], (480, 480))])[GAP : GAP + 960, GAP : GAP + 960]
    assert (shown[0, 10:950] == ORANGE).all() and (shown[10:950, 959] == ORANGE).all()
    assert (shown[2, :2] == BLUE).all() and (shown[957, 958:] == BLUE).all()
    assert (shown[395:405, 395:405] == BLUE).all(-1).any()


def test_boxes_are_those_of_the_unpadded_image(texts: list[str]) -> None:
    """Half of the image is padding: the box in normalised coordinates belongs to the other half."""
    pixels = np.full((480, 480, 3), 50, dtype=np.uint8)
    mask = torch.ones(480, 480, dtype=torch.bool)
    mask[:400, :240] = False
    image = normalized(pixels) * ~mask
    picture = draw([image], [target([[60, 200, 120, 300]], [0], (400, 240), image_id=77)], [mask])
    shown = picture[GAP : GAP + 960, GAP : GAP + 960]
    rows, columns = np.nonzero((shown == ORANGE).all(-1))
    assert (rows.min(), rows.max()) == (400 - 2, 599 + 2) and (columns.min(), columns.max()) == (120 - 2, 239 + 2)
    padding = shown[:, 480:]
    assert padding.max() < 100 and 0.02 < (padding != padding[1, 1]).any(-1).mean() < 0.2  # dark, and hatched
    assert (shown[:390, :100] == 50).all()
    assert "image 77, 240 x 400 px" in texts and "1 objects, smallest 77.5 px" in texts  # sqrt(60 * 100)
    assert "padding" in texts and "tree 1" in texts


def test_regions_to_ignore_are_hatched(texts: list[str]) -> None:
    hw = (480, 480)
    ignored = target([[100, 100, 200, 200], [300, 300, 400, 400]], [-1, 1], hw)
    shown_target = Target(
        torch.zeros(0, 4),
        torch.zeros(0, dtype=torch.int64),
        image_id=4,
        ignored_boxes_cxcywh=ignored.boxes_cxcywh,
        ignored_labels=ignored.labels,
        origin_xy=(64, 128),
    )
    picture = draw([normalized(np.zeros((*hw, 3), dtype=np.uint8))], [shown_target])
    shown = picture[GAP : GAP + 960, GAP : GAP + 960]
    drawn = shown.any(-1)
    for start, colour in ((200, (230, 230, 230)), (600, BLUE)):
        inside = drawn[start + 5 : start + 195, start + 5 : start + 195]
        assert 0.1 < inside.mean() < 0.3  # each sixth pixel
        edge = (shown[start, start : start + 200] == colour).all(-1)
        assert 0.3 < edge.mean() < 0.7  # dashed
    assert drawn[200:400, 200:400].sum() + drawn[600:800, 600:800].sum() == drawn.sum()
    assert "image 4 at (64, 128), 480 x 480 px" in texts and "no objects, 2 ignored" in texts
    assert any(words.startswith("ignored 2") for words in texts)


def test_many_images_of_different_sizes(texts: list[str]) -> None:
    """A list instead of a padded tensor; at most `max_images`; 600 objects, none, and one colour an image."""
    generator = np.random.default_rng(0)
    sizes = [(300, 200), (64, 480), (5, 5), (200, 320), (100, 100)]
    images = [normalized(np.full((*hw, 3), 40 * i + 20, dtype=np.uint8)) for i, hw in enumerate(sizes)]
    corners = generator.uniform(0, 180, (600, 2))
    boxes = np.concatenate([corners, corners + generator.uniform(2, 15, (600, 2))], axis=1)
    targets = [target(boxes.tolist(), [0, 1] * 300, sizes[0])] + [target([], [], hw) for hw in sizes[1:]]
    picture = draw(images, targets, max_images=4)
    for index, (height, width) in enumerate(sizes[1:4], start=1):
        count = (picture == 40 * index + 20).all(-1).sum() - 4 * height * width  # the longest has 480: factor 2
        assert 0 <= count < 100  # the edges of letters are of any grey
    assert (picture == 180).all(-1).sum() < 100
    assert "4 of 5 images, enlarged 2 times" in texts and "tree 300" in texts and "car 300" in texts
    assert sum(words.startswith("600 objects, smallest ") for words in texts) == 1
    assert texts.count("no objects") == 3


def test_a_padded_batch_and_what_is_left_out(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors as in a `Batch`, on any kind of float; huge images leave others out rather than being made smaller."""
    images, masks = torch.zeros(3, 3, 40, 60, dtype=torch.bfloat16), torch.zeros(3, 40, 60, dtype=torch.bool)
    picture = draw_batch(images, masks, [target([], [], (40, 60))] * 3, ["tree"], MEAN, STD)
    assert isinstance(picture, Image.Image) and picture.mode == "RGB"
    mean = np.round(np.array(MEAN) * 255)
    assert (np.abs(np.asarray(picture) - mean) < 2).all(-1).sum() == 3 * 40 * 60 * 12**2  # zero is the mean colour
    monkeypatch.setattr(batch, "_PICTURE_PX", 2.5e6)
    huge = torch.zeros(1, 1, 1).expand(3, 1000, 1000)
    assert draw([huge] * 3, [target([], [], (1000, 1000))] * 3).shape[1] == 2000 + 3 * GAP
    assert "2 of 3 images" in texts
    huge = torch.zeros(1, 1, 1).expand(3, 2000, 2000)
    assert draw([huge] * 3, [target([], [], (2000, 2000))] * 3).shape[1] == 2000 + 2 * GAP
    assert "1 of 3 images" in texts


def test_numbers_that_are_none_are_black() -> None:
    image = normalized(np.full((480, 480, 3), 90, dtype=np.uint8))
    image[:, :10] = torch.nan
    image[:, 10:20] = torch.inf
    shown = draw([image], [target([], [], (480, 480))])[GAP : GAP + 960, GAP : GAP + 960]
    assert (shown[:20] == 0).all() and (shown[20:40] == 255).all() and (shown[40:] == 90).all()


def test_nothing_to_draw() -> None:
    with pytest.raises(InputError, match="nothing to draw: 0 images"):
        draw([], [])
    with pytest.raises(InputError, match="at most 0"):
        draw([torch.zeros(3, 4, 4)], [target([], [], (4, 4))], max_images=0)
