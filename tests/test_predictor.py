"""The predictor around stand-in models whose answer is known, and the selection against a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import supervision as sv
import torch
from PIL import Image
from torch import Tensor, nn

from crossdino.config import InferenceConfig, ModelConfig
from crossdino.errors import InputError
from crossdino.postprocessing import detections_to_coco, select_detections
from crossdino.predictor import Predictor
from crossdino.sources import to_pil_image
from crossdino.structures import DetectorOutput


class StandIn(nn.Module):
    """What the predictor needs of a model."""

    mean = (0.5, 0.25, 0.125)
    std = (0.5, 0.25, 2.0)

    def __init__(self, short_side: int = 64, long_side: int = 100, num_select: int = 5) -> None:
        super().__init__()
        self.config = ModelConfig(class_names=("car", "ship"))
        self.calibration = None
        self.inference = InferenceConfig(short_side, long_side, num_select)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, images: Tensor, padding_mask: Tensor) -> DetectorOutput:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.seen.append((images, padding_mask))
        answers = [self.answer(image, mask) for image, mask in zip(images, padding_mask, strict=True)]
        return DetectorOutput(
            torch.stack([logits for _, logits in answers]), torch.stack([boxes for boxes, _ in answers])
        )

    def answer(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError


class Fixed(StandIn):
    """Always the same three boxes, the last one over the image's edge."""

    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.1], [0.31, 0.77, 0.011, 0.013], [0.97, 0.02, 0.1, 0.1]])
    logits = torch.tensor([[2.0, -9.0], [-9.0, 1.0], [0.0, -9.0]])

    def answer(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.boxes, self.logits


class Brightest(StandIn):
    """Finds the white rectangle on black; the score tells the shade of the image's first pixel."""

    def answer(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        height, width = int((~mask[:, 0]).sum()), int((~mask[0]).sum())
        red = image[0, :height, :width] * self.std[0] + self.mean[0]
        # Half-bright pixels at the rim, which resizing makes, count by their share.
        columns, rows = red.amax(0), red.amax(1)
        box_width, box_height = columns[columns > 0.02].sum(), rows[rows > 0.02].sum()
        centre_x = (columns * (torch.arange(width) + 0.5)).sum() / columns.sum()
        centre_y = (rows * (torch.arange(height) + 0.5)).sum() / rows.sum()
        box = torch.stack([centre_x / width, centre_y / height, box_width / width, box_height / height])
        return box[None], torch.tensor([[3.0, -3.0]])


class Shade(StandIn):
    """The score of the one box is the image's shade."""

    def answer(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        shade = (image[0, 0, 0] * self.std[0] + self.mean[0]).clamp(0.01, 0.99)
        return torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.stack([torch.logit(shade), torch.tensor(-9.0)])[None]


@pytest.mark.parametrize("hw", [(37, 101), (101, 37), (64, 64), (480, 641), (1, 1)])
def test_boxes_are_floats_in_pixels_of_the_original_image(hw):
    height, width = hw
    detections = Predictor(Fixed(num_select=3))(np.zeros((height, width, 3), dtype=np.uint8))
    expected = [
        [0.4 * width, 0.45 * height, 0.6 * width, 0.55 * height],
        [0.3045 * width, 0.7635 * height, 0.3155 * width, 0.7765 * height],
        [0.92 * width, 0.0, 1.0 * width, 0.07 * height],  # clipped at the top and the right
    ]
    assert detections.xyxy.dtype == np.float32
    # float32 has 2^-24 of 641 px = 4e-5 px
    np.testing.assert_allclose(detections.xyxy, expected, atol=1e-4)
    np.testing.assert_allclose(
        detections.confidence, [1 / (1 + math.exp(-logit)) for logit in (2.0, 1.0, 0.0)], atol=1e-6
    )
    assert detections.class_id.tolist() == [0, 1, 0]
    assert detections.data["class_name"].tolist() == ["car", "ship", "car"]


@pytest.mark.parametrize(("hw", "rectangle"), [((231, 150), (31, 42, 90, 200)), ((77, 311), (200, 5, 290, 31))])
def test_an_object_is_found_where_it_is(hw, rectangle):
    left, top, right, bottom = rectangle
    image = np.zeros((*hw, 3), dtype=np.uint8)
    image[top:bottom, left:right] = 255
    other = Image.new("RGB", (90, 400))  # another shape in the batch, so that there is padding
    other.paste((255, 255, 255), (10, 10, 50, 50))
    for short_side, long_side in ((64, 1000), (300, 320)):
        predictor = Predictor(Brightest(), threshold=0.5, short_side=short_side, long_side=long_side, batch_size=2)
        found, _ = predictor([image, other])
        # the antialiasing filter spreads an edge over about one pixel of the resized image
        np.testing.assert_allclose(found.xyxy, [rectangle], atol=0.75 * max(1.0, max(hw) / 300, min(hw) / short_side))


def test_resizing_padding_and_normalisation():
    model = Fixed(short_side=50, long_side=80)
    wide, square = Image.new("RGB", (200, 100), (255, 51, 0)), Image.new("RGB", (100, 100), (0, 0, 255))
    Predictor(model, batch_size=2)([wide, square])
    (images, mask), *rest = model.seen
    assert not rest
    assert images.shape == (2, 3, 50, 80)  # 200 x 100 -> 80 x 40 by the long side; 100 x 100 -> 50 x 50
    assert mask.sum().item() == 10 * 80 + 50 * 30
    assert not mask[0, :40].any()
    assert not mask[1, :, :50].any()
    expected = torch.tensor([(1 - 0.5) / 0.5, (0.2 - 0.25) / 0.25, (0 - 0.125) / 2])
    torch.testing.assert_close(images[0, :, :40], expected[:, None, None].expand(3, 40, 80))
    assert (images[0, :, 40:] == 0).all()


def test_order_and_laziness_of_many_images():
    model = Shade(short_side=16, long_side=64)
    predictor = Predictor(model, batch_size=3, threshold=0.005)
    generator = np.random.default_rng(0)
    shades = generator.permutation(np.arange(10, 250, 6))
    taken = []

    def images():
        for shade in shades:
            taken.append(shade)
            height, width = generator.integers(5, 60, 2)
            yield np.full((height, width, 3), shade, dtype=np.uint8)

    stream = predictor.predict_many(images())
    first = next(stream)
    assert len(taken) <= 3 + 2 * (2 * 3 + 2) + 2, "it was read further ahead than two batches and the threads need"
    results = [first, *stream]
    assert [len(images) for images, _ in model.seen] == [3] * 13 + [1]
    np.testing.assert_allclose([result.confidence[0] for result in results], shades / 255, atol=1e-6)
    assert list(predictor.predict_many([])) == []
    assert predictor([]) == []


def test_all_forms_of_an_image_are_the_same_image(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (41, 29, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    alpha = np.full((41, 29, 1), 7, dtype=np.uint8)
    forms = [
        path,
        str(path),
        Image.fromarray(pixels),
        pixels,
        np.asfortranarray(pixels),
        pixels[::-1][::-1],
        np.concatenate([pixels, alpha], axis=2),
        torch.from_numpy(pixels).permute(2, 0, 1),
        torch.from_numpy(pixels).permute(2, 0, 1).contiguous(),
    ]
    for form in forms:
        np.testing.assert_array_equal(np.asarray(to_pil_image(form)), pixels)
    model = Fixed()
    Predictor(model)(forms)
    assert len(model.seen) == len(forms)
    for images, _ in model.seen:
        assert torch.equal(images, model.seen[0][0])
    grey = to_pil_image(pixels[..., 0])
    np.testing.assert_array_equal(np.asarray(grey), np.repeat(pixels[..., :1], 3, axis=2))


@pytest.mark.parametrize(
    ("image", "pieces"),
    [
        (np.zeros((4, 4, 3)), ["float64", "uint8", "255"]),
        (np.zeros((3, 8, 8), dtype=np.uint8), ["(3, 8, 8)", "(H, W, 3)"]),
        (np.zeros((0, 8, 3), dtype=np.uint8), ["(0, 8, 3)"]),
        (torch.zeros(3, 4, 4), ["torch.float32", "torch.uint8"]),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), ["(1, 3, 4, 4)"]),
        (Image.new("F", (4, 4)), ["mode F", "8 bits"]),
        (42, ["int", "path"]),
        ("missing.png", ["missing.png"]),
    ],
)
def test_what_is_no_image_is_named(image, pieces):
    with pytest.raises(InputError) as error:
        Predictor(Fixed())(image)
    for piece in pieces:
        assert piece in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"threshold": 1.5},
        {"num_select": 0},
        {"short_side": 0},
        {"long_side": -1},
        {"batch_size": 0},
        {"precision": "x"},
    ],
)
def test_senseless_settings(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        Predictor(Fixed(), **settings)


def test_settings_come_from_the_model_and_can_be_overridden():
    image = np.zeros((50, 50, 3), dtype=np.uint8)
    assert len(Predictor(Fixed(num_select=2))(image)) == 2
    assert len(Predictor(Fixed(num_select=2), num_select=4)(image)) == 4
    assert len(Predictor(Fixed(), num_select=1000)(image)) == 6  # 3 queries x 2 classes
    assert len(Predictor(Fixed(), threshold=0.6)(image)) == 2
    nothing = Predictor(Fixed(), threshold=0.99)(image)
    assert len(nothing) == 0
    assert nothing.xyxy.shape == (0, 4)
    assert nothing.data["class_name"].tolist() == []


def test_bfloat16_runs_under_autocast():
    class Multiplies(Fixed):
        def answer(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            self.dtype = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
            return self.boxes.bfloat16(), self.logits.bfloat16()

    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = Multiplies()
        detections = Predictor(model, precision=precision)(np.zeros((10, 10, 3), dtype=np.uint8))
        assert model.dtype == dtype
        assert detections.xyxy.dtype == detections.confidence.dtype == np.float32


def test_selection_against_a_plain_loop():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 7, 4, generator=generator) * 3
    boxes = torch.rand(2, 7, 4, generator=generator) * 0.8 + 0.1
    sizes = [(123, 457), (801, 333)]
    for num_select, threshold in ((5, 0.0), (28, 0.3), (100, 0.0)):
        selected = select_detections(DetectorOutput(logits, boxes), sizes, num_select, threshold)
        for image, (height, width) in enumerate(sizes):
            pairs = []
            for query in range(7):
                for label in range(4):
                    score = 1 / (1 + math.exp(-logits[image, query, label].item()))
                    cx, cy, w, h = boxes[image, query].tolist()
                    corners = [(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height]
                    limits = [width, height, width, height]
                    box = [min(max(value, 0), limit) for value, limit in zip(corners, limits, strict=True)]
                    pairs.append((score, label, box))
            pairs = [pair for pair in sorted(pairs, key=lambda pair: -pair[0])[:num_select] if pair[0] >= threshold]
            found_boxes, found_scores, found_labels = selected[image]
            assert found_labels.tolist() == [label for _, label, _ in pairs]
            np.testing.assert_allclose(found_scores, [score for score, _, _ in pairs], atol=1e-6)
            # float32: 2^-23 of 801 px is 1e-4 px
            np.testing.assert_allclose(found_boxes, [box for _, _, box in pairs], atol=2e-4)


def test_coco_results():
    detections = sv.Detections(
        xyxy=np.array([[1.25, 2.5, 11.3, 7.0001]], dtype=np.float32),
        confidence=np.array([0.87654321], dtype=np.float32),
        class_id=np.array([1]),
    )
    (result,) = detections_to_coco(detections, image_id=12, category_ids=[4, 90])
    assert (result["image_id"], result["category_id"]) == (12, 90)
    assert result["bbox"] == pytest.approx([1.25, 2.5, 10.05, 4.5001], abs=1e-4)
    assert result["score"] == pytest.approx(0.87654321, abs=1e-7)
    assert all(type(value) is float for value in [*result["bbox"], result["score"]])
    assert detections.xyxy[0, 2] == np.float32(11.3), "the detections were changed"
    assert detections_to_coco(sv.Detections.empty(), 1, [1]) == []
