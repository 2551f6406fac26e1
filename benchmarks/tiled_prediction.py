"""Detecting in a large image tile by tile: `Predictor` against SAHI, around the same weights.

    python -m benchmarks.tiled_prediction [--weights weights/trees] [--size 4000 3000] [--quick] [--csv FILE]

The image is put together from the sample images, turned and mirrored, and written as one JPEG file. Both sides get its
path, cut it into as many tiles of the same size, take the same network with the same weights and the same threshold,
and merge what it finds; neither looks at the image as a whole. The rows go from SAHI as it comes (one tile after the
other, float32, glibc's own allocator) to the defaults of `crossdino predict`, one change at a time, and SAHI gets all
that it can take over as well: so one sees what each change is worth, and what is left between the two. Nearly all of
the time is the network's, which both share.

Beside the time stands whether they find the same objects. They do not quite, for two reasons. The tiles do not lie at
the same places: SAHI keeps its step and pushes the last row and column back into the image, we spread the tiles evenly.
And they merge by other rules: SAHI unites boxes of a class of which one covers half of the other (GREEDYNMM, by the
smaller area), neighbours within one tile too; `Predictor` puts together what a seam has cut, and within a tile drops
only what overlaps by an IoU above 0.7 (docs/merging.md).
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from benchmarks.interleaved import ROOT, Case, Measurement, Report, interleave
from benchmarks.machine import describe

IMAGE_WH = (4000, 3000)
TILE_PX = 480
OVERLAP_PX = 112
THRESHOLD = 0.3
# Two boxes of a class with this overlap are the same object.
SAME_IOU = 0.5
FIRST = "SAHI as it comes"
_PATCH_PX = 400
_HERE = "benchmarks.tiled_prediction"


def write_image(path: Path, size_wh: tuple[int, int], patch_px: int = _PATCH_PX) -> None:
    """A large JPEG file of patches of the sample images, the same in every run.

    Args:
        path: of the file.
        size_wh: width and height in pixels.
        patch_px: side of the patches in pixels, at most that of the smallest sample image.
    """
    samples = sorted((ROOT / "sample").glob("*/*.jpg"))
    draw = random.Random(0)
    large = Image.new("RGB", size_wh)
    for top in range(0, size_wh[1], patch_px):
        for left in range(0, size_wh[0], patch_px):
            with Image.open(draw.choice(samples)) as sample:
                x, y = (draw.randint(0, side - patch_px) for side in sample.size)
                patch = sample.convert("RGB").crop((x, y, x + patch_px, y + patch_px))
            turn = draw.choice([None, *Image.Transpose])
            large.paste(patch if turn is None else patch.transpose(turn), (left, top))
    large.save(path, quality=92)


# ---- in the workers ----


def with_predictor(weights: str, image: str, **settings: Any) -> Callable[[], dict[str, Any]]:
    """Our own way.

    Args:
        weights: a model folder.
        image: path of the image.
        settings: further arguments of `Predictor`.
    """
    from crossdino import Predictor
    from crossdino.checkpoints import load_model

    model = load_model(weights)
    predictor = Predictor(
        model, threshold=THRESHOLD, tile_size=TILE_PX, tile_overlap=OVERLAP_PX, full_image=False, **settings
    )
    clock = _NetworkClock(model)

    def detect() -> dict[str, Any]:
        found = predictor(image)
        assert found.confidence is not None and found.class_id is not None, "a Predictor sets both"
        return {"boxes": found.xyxy.tolist(), "labels": found.class_id.tolist()}

    return lambda: clock.time(detect)


def with_sahi(weights: str, image: str, batch_size: int = 1, **settings: Any) -> Callable[[], dict[str, Any]]:
    """SAHI's slices and merging around our detector.

    Args:
        weights: a model folder.
        image: path of the image.
        batch_size: slices that go through the network together.
        settings: arguments of the `Predictor` that the adapter takes over.
    """
    from sahi.predict import get_sliced_prediction

    from crossdino import Predictor
    from crossdino.checkpoints import load_model
    from crossdino.sahi_adapter import CrossDINODetectionModel

    model = load_model(weights)
    detector = CrossDINODetectionModel(model=Predictor(model, **settings), device="cpu", confidence_threshold=THRESHOLD)
    clock = _NetworkClock(model)
    ratio = OVERLAP_PX / TILE_PX

    def detect() -> dict[str, Any]:
        found = get_sliced_prediction(
            image,
            detector,
            slice_height=TILE_PX,
            slice_width=TILE_PX,
            overlap_height_ratio=ratio,
            overlap_width_ratio=ratio,
            perform_standard_pred=False,
            batch_size=batch_size,
            verbose=0,
        ).object_prediction_list
        return {"boxes": [one.bbox.to_xyxy() for one in found], "labels": [one.category.id for one in found]}

    return lambda: clock.time(detect)


class _NetworkClock:
    """How long a call takes, how much of that is the network's, and how many tiles went through it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._spent = self._started = 0.0
        self._tiles = 0
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def time(self, detect: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        self._spent, self._tiles = 0.0, 0
        started = time.perf_counter()
        found = detect()
        seconds = time.perf_counter() - started
        return {**found, "seconds": seconds, "network": self._spent, "tiles": self._tiles}

    def _begin(self, _: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self._tiles += len(inputs[0])
        self._started = time.perf_counter()

    def _end(self, *_: Any) -> None:
        self._spent += time.perf_counter() - self._started


# ---- the comparison ----


def make_cases(weights: str, image: str, batch_size: int, quick: bool) -> list[Case]:
    """The rows of the table; the first is what the others are compared with."""

    def case(name: str, function: str, tuned_malloc: bool, **settings: Any) -> Case:
        arguments = {"weights": weights, "image": image, **settings}
        return Case(name, f"{_HERE}:{function}", arguments, tuned_malloc=tuned_malloc)

    batches, bf16 = {"batch_size": batch_size}, {"dtype": "bfloat16"}
    cases = [
        case(FIRST, "with_sahi", False),
        case("SAHI, malloc", "with_sahi", True),
        case("SAHI, malloc, batches", "with_sahi", True, **batches),
        case("SAHI, malloc, batches, bf16", "with_sahi", True, **batches, **bf16),
        case("Predictor, tile by tile", "with_predictor", False, batch_size=1),
        case("Predictor, malloc", "with_predictor", True, batch_size=1),
        case("Predictor, malloc, batches", "with_predictor", True, **batches),
        case("Predictor, malloc, batches, bf16", "with_predictor", True, **batches, **bf16),
        case("Predictor, malloc, all automatic", "with_predictor", True, batch_size="auto", dtype="auto"),
    ]
    return [cases[0], cases[-1]] if quick else cases


def agreement(found: dict[str, Any], others: dict[str, Any]) -> float:
    """Share of the objects that were found by others, too.

    Args:
        found: `boxes`, a list of xyxy in pixels, and `labels`.
        others: likewise.
    """
    if not found["boxes"]:
        return 1.0
    same = _same(*(torch.tensor(each[key]) for each in (found, others) for key in ("boxes", "labels")))
    return float(same.any(dim=1).float().mean())


def _same(boxes: Tensor, labels: Tensor, other_boxes: Tensor, other_labels: Tensor) -> Tensor:
    overlaps = box_iou(boxes.reshape(-1, 4), other_boxes.reshape(-1, 4))
    return (overlaps >= SAME_IOU) & (labels[:, None] == other_labels[None])


def time_rows(measurements: dict[str, Measurement], megapixels: float) -> list[dict[str, Any]]:
    """Where the time goes, a row a way."""
    first = measurements.get(FIRST)
    return [
        {
            "way": name,
            "s": one.median,
            "quartiles": "{:.3g} to {:.3g}".format(*one.spread),
            "network (s)": one.extra["network"],
            "tiles/s": one.extra["tiles"] / one.median,
            "Mpx/s": megapixels / one.median,
            "peak (MB)": None if one.peak_bytes is None else one.peak_bytes / 1e6,
            "times SAHI": None if first is None else first.median / one.median,
        }
        for name, one in measurements.items()
    ]


def object_rows(measurements: dict[str, Measurement]) -> list[dict[str, Any]]:
    """What was found, a row a way."""
    first = measurements.get(FIRST)
    rows = []
    for name, one in measurements.items():
        row: dict[str, Any] = {"way": name, "tiles": int(one.extra["tiles"]), "objects": len(one.extra["boxes"])}
        if first is not None:
            row["share that SAHI has found"] = agreement(one.extra, first.extra)
            row["share of SAHI's"] = agreement(first.extra, one.extra)
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tiled prediction of a large image, against SAHI.")
    parser.add_argument("--weights", default=str(ROOT / "weights" / "trees"), help="a model folder")
    parser.add_argument("--batch-size", type=int, default=4, help="tiles that go through the network together")
    parser.add_argument(
        "--size", type=int, nargs=2, default=IMAGE_WH, metavar=("W", "H"), help="of the image in pixels"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small image, the first and the last row, once")
    parser.add_argument("--csv", type=Path, help="write the table there, too")
    options = parser.parse_args(arguments)
    size_wh = (900, 700) if options.quick else tuple(options.size)
    report = Report(describe(), options.csv)
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "large.jpg"
        write_image(image, size_wh)
        cases = make_cases(options.weights, str(image), options.batch_size, options.quick)
        measurements = interleave(cases, 1 if options.quick else options.repetitions)
    title = f"{size_wh[0]} x {size_wh[1]} px in tiles of {TILE_PX} px, {OVERLAP_PX} px overlap"
    report.table(
        f"Tiled prediction: {title}",
        time_rows(measurements, size_wh[0] * size_wh[1] / 1e6),
        "network: seconds inside the model; the rest is reading, cutting, selecting, merging",
    )
    report.table(
        f"Objects: {title}",
        object_rows(measurements),
        f"shares: of the objects, those with a box of the same class and an IoU of {SAME_IOU:g} on the other side",
    )


if __name__ == "__main__":
    main()
