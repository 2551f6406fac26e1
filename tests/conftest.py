"""What several tests need: a tiny data set that is drawn here, and a model that computes in milliseconds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crossdino.checkpoints import save_model
from crossdino.config import Config, with_changes
from crossdino.models.detector import CrossDINO

# Tests run side by side with other work on small machines; the tiny models gain nothing from threads.
torch.set_num_threads(1)


def draw_data(folder: Path, part: str, num_images: int, objects_per_image: list[int], seed: int) -> Path:
    """Grey noise with red and blue rectangles, as `part.json` and the images in `part/`."""
    rng = np.random.default_rng(seed)
    (folder / part).mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        pixels = rng.integers(60, 90, (64, 64, 3)).astype(np.uint8)
        for _ in range(objects_per_image[image_id % len(objects_per_image)]):
            width, height = rng.integers(8, 20, 2).tolist()
            x, y = int(rng.integers(0, 64 - width)), int(rng.integers(0, 64 - height))
            kind = int(rng.integers(2))
            pixels[y : y + height, x : x + width] = ((220, 40, 40), (40, 60, 230))[kind]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": (3, 7)[kind],
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(folder / part / f"{image_id}.png")
        images.append({"id": image_id, "file_name": f"{image_id}.png", "width": 64, "height": 64})
    categories = [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}]
    path = folder / f"{part}.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Images that were checked are remembered in a folder of the tests, not in that of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROSSDINO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.json (4 images of two objects) and val.json (2 images, one of them empty)."""
    folder = tmp_path_factory.mktemp("tiny_data")
    draw_data(folder, "train", 4, [2], seed=0)
    draw_data(folder, "val", 2, [0, 3], seed=1)
    return folder


@pytest.fixture
def tiny_config(tiny_data: Path, tmp_path: Path) -> Config:
    """Two epochs of two updates each, on the tiny data, into a fresh folder."""
    return with_changes(
        Config(),
        {
            "name": "tiny",
            "model.backbone": "test_efficientnet",  # timm's model for tests, 0.1M parameters
            "model.num_feature_levels": 3,  # a fourth map of 64 pixels would be a single token
            "model.hidden_dim": 32,
            "model.num_heads": 2,
            "model.num_points": 2,
            "model.num_encoder_layers": 1,
            "model.num_decoder_layers": 1,
            "model.feedforward_dim": 32,
            "model.num_queries": 20,
            "model.fusion_hidden_dim": 32,
            "model.num_denoising": 4,
            "data.train_annotations": str(tiny_data / "train.json"),
            "data.val_annotations": str(tiny_data / "val.json"),
            "data.train_short_sides": [64],
            "data.crop_short_sides": [],
            "data.test_short_side": 64,
            "data.num_workers": 0,
            "training.output": str(tmp_path / "run"),
            "training.epochs": 2,
            "training.batch_size": 2,
        },
    )


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights, for the classes of the tiny data; nobody changes it."""
    torch.manual_seed(0)
    small = dict(
        backbone="test_efficientnet",
        num_feature_levels=3,
        hidden_dim=32,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        feedforward_dim=32,
        num_queries=20,
    )
    model = CrossDINO(dataclasses.replace(Config().model, **small, class_names=("red", "blue")))  # type: ignore[arg-type]
    model.inference = dataclasses.replace(model.inference, short_side=64, long_side=128, num_select=5)
    folder = tmp_path_factory.mktemp("model") / "weights"
    save_model(model, folder, category_ids=(3, 7))
    return folder
