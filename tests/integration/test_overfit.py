"""A detector that cannot learn two images by heart is broken somewhere between the pixels and the metric."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from crossdino import recipe
from crossdino.training import train

SIDE = 128


def two_images(folder: Path) -> Path:
    """Discs (class 0) and squares (class 1) of 9 to 22 pixels on noise; ids of categories far apart."""
    generator = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    images, annotations = [], []
    for image_id in (7, 12):
        picture = Image.fromarray(generator.integers(60, 120, (SIDE, SIDE, 3), dtype=np.uint8))
        draw = ImageDraw.Draw(picture)
        for cell in generator.permutation(16)[:6]:
            side = int(generator.integers(9, 23))
            x = int(cell % 4) * 32 + int(generator.integers(0, 32 - side))
            y = int(cell // 4) * 32 + int(generator.integers(0, 32 - side))
            square = bool(generator.integers(2))
            corners = (x, y, x + side - 1, y + side - 1)
            if square:
                draw.rectangle(corners, fill=(230, 220, 40))
            else:
                draw.ellipse(corners, fill=(40, 60, 230))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 90 if square else 3,
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
        name = f"train/{image_id}.png"
        picture.save(folder / name)
        images.append({"id": image_id, "file_name": name, "width": SIDE, "height": SIDE})
    categories = [{"id": 3, "name": "disc"}, {"id": 90, "name": "square"}]
    path = folder / "train.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("classification", ["boost", "focal"])
def test_two_images_are_learnt_by_heart(tmp_path, classification):
    annotations = str(two_images(tmp_path / "data"))
    base = recipe("compact")
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, num_queries=30, num_encoder_layers=1, num_decoder_layers=2),
        loss=dataclasses.replace(base.loss, classification=classification),
        data=dataclasses.replace(
            base.data,
            train_annotations=annotations,
            val_annotations=annotations,
            train_short_sides=(SIDE,),
            crop_short_sides=(),
            test_short_side=SIDE,
            horizontal_flip=0.0,
            vertical_flip=0.0,
            quarter_turns=False,
            color_jitter=0.0,
            num_workers=0,
        ),
        training=dataclasses.replace(
            base.training,
            output=str(tmp_path / "run"),
            epochs=150,
            drop_epochs=(120,),
            warmup_steps=10,
            learning_rate=1e-3,
            precision="fp32",
            ema_decay=0.0,
            evaluate_every=150,
        ),
    )
    result = train(config)
    assert result.best_ap is not None and result.best_ap > 0.9
