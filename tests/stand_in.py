"""A model whose answer is a plain function of the pixels, and a run with it: for tests of everything around models."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from crossdino.config import InferenceConfig, ModelConfig
from crossdino.prediction_work import WorkSettings
from crossdino.predictor import Predictor
from crossdino.sources import ReadOptions
from crossdino.structures import DetectorOutput

# A picture of this colour ends the process that looks at it.
DEADLY = (255, 0, 255)


class Quarters(nn.Module):
    """Finds a box in every quarter of an image or tile; its score is the quarter's mean brightness, from 0 to 1."""

    mean = (0.0, 0.0, 0.0)
    std = (1.0, 1.0, 1.0)

    def __init__(self, deadly: bool = False) -> None:
        super().__init__()
        self.config = ModelConfig(class_names=("red", "blue"))
        self.inference = InferenceConfig(short_side=32, long_side=64, num_select=4)
        self.calibration = None
        self.deadly = deadly
        self.batch_sizes: list[int] = []

    @property
    def num_seen(self) -> int:
        return sum(self.batch_sizes)

    def forward(self, images: Tensor, padding_mask: Tensor) -> DetectorOutput:
        self.batch_sizes.append(len(images))
        centres = torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]])
        boxes = torch.cat([centres, torch.tensor([[0.2, 0.3]]).expand(4, 2)], dim=1)
        logits = torch.full((len(images), 4, 2), -20.0)
        for number, (image, mask) in enumerate(zip(images, padding_mask, strict=True)):
            image = image[:, : int((~mask[:, 0]).sum()), : int((~mask[0]).sum())]
            if self.deadly and torch.equal(image.mean((1, 2)), torch.tensor(DEADLY) / 255):
                os.kill(os.getpid(), signal.SIGKILL)
            for quarter, half in enumerate(part for rows in image.chunk(2, 1) for part in rows.chunk(2, 2)):
                logits[number, quarter, int(half[2].mean() > half[0].mean())] = torch.logit(
                    half.mean().clamp(0.01, 0.99)
                )
        return DetectorOutput(logits, boxes.expand(len(images), 4, 4))


@dataclass(frozen=True)
class StandInSettings(WorkSettings):
    """A run with the stand-in, which in one of several processes can be killed by a picture."""

    def make_predictor(self, device: str) -> Predictor:
        torch.set_num_threads(1)
        return Predictor(Quarters(deadly=len(self.devices) > 1), **self.predictor)


def settings_of(folder: Path, **changes: object) -> StandInSettings:
    """Settings of a run with the stand-in into `folder / "out"`."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({"format_version": 1, "model": {}, "category_ids": [3, 7]}))
    values = {"predictor": {"threshold": 0.2}, "reading": ReadOptions(), "output": folder / "out", **changes}
    return StandInSettings(str(model), **values)  # type: ignore[arg-type]


def save_image(path: Path, seed: int, hw: tuple[int, int] = (40, 60)) -> Path:
    """Write noise as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*hw, 3), dtype=np.uint8)).save(path)
    return path


def save_video(path: Path, num_frames: int, hw: tuple[int, int] = (48, 64), seed: int = 0) -> Path:
    """Write a video of grey frames that become brighter, 10 frames a second."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = hw[1], hw[0], "yuv420p"
        for number in range(num_frames):
            shade = (40 + 13 * number + 7 * seed) % 256
            frame = av.VideoFrame.from_ndarray(np.full((*hw, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
