"""How a predictor runs its network: number formats, batches of a size that fits, and torch.compile or not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from crossdino import CrossDINO
from crossdino.data.dataset import collate
from crossdino.data.transforms import normalize
from crossdino.errors import InputError
from crossdino.prediction_network import Network, choose_dtype, fitting_batch
from crossdino.predictor import Predictor
from crossdino.structures import DetectorOutput, Target
from tests.stand_in import Quarters

CPU = torch.device("cpu")
NOTHING = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


class Shaded(Quarters):
    """Has a mean and a deviation that show rounding, and keeps what it was given."""

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def forward(self, images: Tensor, padding_mask: Tensor) -> DetectorOutput:
        self.given = images.clone(), padding_mask.clone()
        return super().forward(images, padding_mask)


class Full(Quarters):
    """Has memory for so many images at once."""

    def __init__(self, most: int, message: str = "DefaultCPUAllocator: can't allocate memory: 12 bytes") -> None:
        super().__init__()
        self.most, self.message = most, message

    def forward(self, images: Tensor, padding_mask: Tensor) -> DetectorOutput:
        if len(images) > self.most:
            raise RuntimeError(self.message)
        return super().forward(images, padding_mask)


def network(model: Any, **settings: Any) -> Network:
    given: dict[str, Any] = {"compiled": False, "batch_size": 4, "largest_px": 64 * 64, **settings}
    return Network(model.eval(), CPU, given.pop("dtype", "float32"), **given)


def noise(*sizes: tuple[int, int]) -> list[Tensor]:
    rng = np.random.default_rng(0)
    # As they come from a picture: rows of pixels of three bytes.
    return [torch.from_numpy(rng.integers(0, 256, (*hw, 3), dtype=np.uint8)).permute(2, 0, 1) for hw in sizes]


@pytest.mark.parametrize("sizes", [[(31, 47)], [(32, 32), (32, 32)], [(20, 33), (41, 7), (1, 1)]])
def test_pixels_are_normalised_bit_for_bit_as_for_training(sizes: list[tuple[int, int]]) -> None:
    model = Shaded()
    images = noise(*sizes)
    list(network(model)(images))
    expected = collate([(normalize(image, model.mean, model.std), NOTHING) for image in images])
    assert torch.equal(model.given[0], expected.images) and torch.equal(model.given[1], expected.padding_mask)


def test_names_of_number_formats() -> None:
    for name, expected in {
        **{"auto": "float32", "float32": "float32", "fp32": "float32"},
        **{"bf16": "bfloat16", "bfloat16": "bfloat16"},
    }.items():
        assert choose_dtype(name, "cpu") == expected
    assert choose_dtype("fp16", "cuda:0") == choose_dtype("float16", "cuda") == "float16"
    with pytest.raises(InputError, match="float16, which the CPU"):
        choose_dtype("float16", CPU)
    with pytest.raises(InputError, match="dtype is 'fp8': give auto, float32, bfloat16"):
        choose_dtype("fp8", CPU)


def test_dtype_of_a_predictor() -> None:
    seen: list[torch.dtype] = []

    class Multiplies(Quarters):
        def forward(self, images: Tensor, padding_mask: Tensor) -> DetectorOutput:
            seen.append((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
            return super().forward(images, padding_mask)

    image = np.full((20, 20, 3), 99, dtype=np.uint8)
    for settings, dtype in (
        ({}, torch.float32),
        ({"dtype": "auto"}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "bf16"}, torch.bfloat16),
        ({"precision": "bf16"}, torch.bfloat16),
    ):
        predictor = Predictor(Multiplies(), **settings)  # type: ignore[arg-type]
        found = predictor(image)
        assert seen.pop() == dtype and found.xyxy.dtype == np.float32
        assert predictor.dtype == str(dtype).removeprefix("torch.")
        assert predictor.settings()["precision"] == {"float32": "fp32", "bfloat16": "bf16"}[predictor.dtype]
    for settings, message in (
        ({"dtype": "float16"}, "float16, which the CPU"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"dtype": torch.bfloat16}, r"dtype is torch.bfloat16: give auto, float32, bfloat16 \(bf16\)"),
        ({"dtype": ["bf16"]}, "dtype is \\['bf16'\\]: give auto"),
        ({"dtype": "bf16", "precision": "bf16"}, "give one of both"),
        ({"batch_size": "many"}, "batch_size is 'many': give a whole number"),
    ):
        with pytest.raises(InputError, match=message):
            Predictor(Quarters(), **settings)  # type: ignore[arg-type]


def test_half_as_many_where_the_memory_is_full(caplog: pytest.LogCaptureFixture) -> None:
    images = [np.full((32, 32, 3), shade, dtype=np.uint8) for shade in range(10, 230, 20)]
    expected = [found.confidence for found in Predictor(Quarters())(images)]
    predictor = Predictor(Full(3), batch_size=8)
    found = [found.confidence for found in predictor(images)]
    np.testing.assert_array_equal(found, expected)
    assert predictor.batch_size == 2 and predictor.model.batch_sizes == [2, 2, 2, 2, 2, 1]  # type: ignore[attr-defined]
    assert [record.getMessage() for record in caplog.records] == [
        "the memory of cpu is full: going on with 4 at once",
        "the memory of cpu is full: going on with 2 at once",
    ]
    with pytest.raises(InputError, match=r"memory of cpu is too small for an image of 32 x 32 px: look at smaller"):
        Predictor(Full(0), batch_size=2)(images)
    with pytest.raises(RuntimeError, match="of another kind"):
        Predictor(Full(0, "an error of another kind"))(images[0])


def test_batches_chosen_by_device() -> None:
    assert network(Quarters(), batch_size="auto", largest_px=640 * 640).batch_size == 4
    assert network(Quarters(), batch_size="auto", largest_px=800 * 1333).batch_size == 1
    assert Predictor(Quarters(), batch_size="auto", tile_size=640).batch_size == 4  # resized to 32 x 32
    predictor = Predictor(Quarters(), batch_size="auto", short_side=800, long_side=1333)
    assert predictor.batch_size == 1
    predictor.batch_size = 3
    assert predictor.batch_size == 3
    # 100 bytes a pixel: of 1,000,000 bytes 70 % are planned with.
    assert fitting_batch(needed=10_000, seen_px=100, largest_px=1000, free=1_000_000) == 7
    assert fitting_batch(needed=10_000, seen_px=100, largest_px=10, free=80_000) == 5
    assert fitting_batch(needed=10_000, seen_px=100, largest_px=100, free=1) == 1
    assert fitting_batch(needed=0, seen_px=100, largest_px=100, free=10**12) == 16


def test_on_a_gpu_the_first_image_tells_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated, peak = iter([1000, 1000]), 1000 + 64 * 64 * 10
    for name, value in {
        "memory_allocated": lambda _: next(allocated),
        "reset_peak_memory_stats": lambda _: None,
        "max_memory_allocated": lambda _: peak,
        "memory_reserved": lambda _: 1000,
        "mem_get_info": lambda _: (64 * 64 * 10 * 10, 10**9),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    tried = network(Quarters(), batch_size=1)
    tried._on_trial = True
    outputs = list(tried(noise(*[(64, 64)] * 9)))
    assert [len(output.pred_logits) for output in outputs] == [1, 7, 1]


def compiler(failing: bool) -> Callable[..., Any]:
    """In the place of `torch.compile`."""

    def compile_(model: Any, dynamic: bool) -> Any:
        assert dynamic

        def run(images: Tensor, padding_mask: Tensor) -> DetectorOutput:
            if failing:
                raise LookupError("no C++ compiler\nis to be found")
            return model(images, padding_mask)

        return run

    return compile_


def test_compiled_or_not(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    images = [np.full((32, 32, 3), shade, dtype=np.uint8) for shade in (50, 100, 150)]
    for failing, line in (
        (False, "compiled, with the first batch, in 0 s"),
        (True, "the model runs without being compiled (no C++ compiler)"),
    ):
        monkeypatch.setattr(torch, "compile", compiler(failing))
        caplog.clear()
        model = Quarters()
        found = Predictor(model, compile=True)(images)
        assert [len(one) for one in found] == [4, 4, 4] and model.num_seen == 3
        assert [record.getMessage() for record in caplog.records] == [line], "told once, not for every image"


def test_a_mistake_of_the_model_is_not_taken_for_one_of_the_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", compiler(False))
    with pytest.raises(RuntimeError, match="of another kind"):
        Predictor(Full(0, "an error of another kind"), compile=True)(np.zeros((9, 9, 3), np.uint8))
    assert not caplog.records


def test_a_batch_changes_a_real_model_by_rounding_only(weights: Path) -> None:
    model = CrossDINO.from_pretrained(weights)
    images = [
        Image.fromarray(image.permute(1, 2, 0).numpy()) for image in noise((64, 64), (64, 80), (70, 64), (64, 64))
    ]
    alone, together = (Predictor(model, batch_size=size)(images) for size in (1, 4))
    for one, other in zip(alone, together, strict=True):
        # random weights; boxes of up to 80 px in float32 after some dozens of layers
        np.testing.assert_allclose(one.xyxy, other.xyxy, atol=1e-3)
        np.testing.assert_allclose(one.confidence, other.confidence, atol=1e-5)
