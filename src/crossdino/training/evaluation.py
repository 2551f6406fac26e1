"""Detections of a whole data set, and the evaluations of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import supervision as sv
import torch
from accelerate.utils import gather_object
from torch import Tensor

from crossdino.config import Config
from crossdino.data.dataset import DetectionDataset, build_loader
from crossdino.data.index import DatasetIndex
from crossdino.evaluation.average_precision import AveragePrecisionResult, evaluate_detections
from crossdino.merging import merge_detections
from crossdino.models.detector import CrossDINO
from crossdino.predictor import detections_to_coco, select_detections
from crossdino.tiling import Tile
from crossdino.training.run import Run


def detect_dataset(
    model: CrossDINO,
    dataset: DetectionDataset,
    *,
    num_select: int,
    merge_iou: float = 0.5,
    batch_size: int = 1,
    num_workers: int = 0,
    images: Iterable[int] | None = None,
    on_image: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Detections of a data set as COCO results, with the data set's own image and category ids.

    Always in float32, as `Predictor` computes: bfloat16 cost the compact model 1.5 AP. Where the data set has tiles,
    those of an image are merged (`crossdino.merging.merge_tiles`).

    Args:
        model: the detector, on the device to compute on; it is put into eval mode.
        dataset: made with `train=False`.
        num_select: detections kept per image or tile.
        merge_iou: overlap from which two detections of different tiles are one.
        batch_size: images or tiles per forward pass.
        num_workers: loader processes.
        images: positions of the images in the data set's index; None means all.
        on_image: called after each image with the number of finished images.

    Returns:
        One dict per detection: image_id, category_id, bbox (xywh in pixels of the original image), score.
    """
    model.eval()
    device = next(model.parameters()).device
    records = dataset.index.records
    chosen = list(range(len(records)) if images is None else images)
    order = [(image, item) for image in chosen for item in dataset.items_of(image)]
    loader = build_loader(dataset, batch_size, order=[item for _, item in order], num_workers=num_workers)
    results: list[dict[str, Any]] = []
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    tiles: list[Tile] = []
    position = finished = 0
    for batch in loader:
        batch = batch.to(device)
        with torch.no_grad():
            output = model(batch.images, batch.padding_mask)
        sizes = [target.original_hw for target in batch.targets]
        for target, found in zip(batch.targets, select_detections(output, sizes, num_select), strict=True):
            x, y = target.origin_xy
            parts.append(found)
            tiles.append(Tile(y, x, *target.original_hw))
            image = order[position][0]
            position += 1
            if position < len(order) and order[position][0] == image:
                continue
            if dataset.data.tile_size:
                found = merge_detections(parts, tiles, (records[image].height, records[image].width), merge_iou)
            parts, tiles = [], []
            boxes, scores, labels = found
            detections = sv.Detections(boxes.numpy(), confidence=scores.numpy(), class_id=labels.numpy())
            results += detections_to_coco(detections, target.image_id, dataset.index.category_ids)
            finished += 1
            if on_image is not None:
                on_image(finished)
    return results


def evaluate(run: Run) -> AveragePrecisionResult | None:
    """AP on the validation set; the result on the main process, where the state notes whether it is the best."""
    config, accelerator, state, val_set = run.config, run.accelerator, run.state, run.val_set
    assert val_set is not None and run.metric is not None
    rank, world = accelerator.process_index, accelerator.num_processes
    total = len(val_set.index.records)
    with run.console.status(f"evaluating {total} images") as status:
        detections = detect_dataset(
            state.evaluated,
            val_set,
            num_select=config.evaluation.num_select,
            merge_iou=config.evaluation.merge_iou,
            batch_size=config.training.batch_size,
            num_workers=config.data.num_workers,
            images=range(rank, total, world),  # every image on exactly one process
            on_image=lambda count: status.update(f"evaluating image {min(count * world, total)} of {total}"),
        )
    if world > 1:
        detections = gather_object(detections)
    if not accelerator.is_main_process:
        return None
    result = average_precision(config, val_set.index, detections)
    run.console.print(result.table())
    numbers = summary(result)
    name = run.metric
    value = numbers["by_size"][name.removeprefix("ap ")] if name.startswith("ap ") else numbers[name]
    value = value or 0.0  # None where the validation set has no such object
    best = state.best_value is None or value > state.best_value
    state.best_value = value if best else state.best_value
    state.evaluations_without_gain = 0 if best else state.evaluations_without_gain + 1
    chosen = {"metric": name, "selected": value, "best": best}
    state.evaluations.append(run.log.write_evaluation(state.step, run.epochs_done, {**numbers, **chosen}))
    return result


def average_precision(config: Config, index: DatasetIndex, detections: list[dict[str, Any]]) -> AveragePrecisionResult:
    """AP of detections (COCO results) with the settings of a configuration."""
    # Not the file itself: what was mended in it at loading shall stay mended.
    return evaluate_detections(
        index.to_coco(),
        detections,
        max_detections=config.evaluation.max_detections,
        size_bands=config.evaluation.size_bands,
    )


def summary(result: AveragePrecisionResult) -> dict[str, Any]:
    """The numbers of an evaluation that the log and a checkpoint keep."""
    values = result.to_dict()
    return {
        **{name: values[name] for name in ("ap", "ap50", "ap75")},
        "by_size": {name: band["ap"] for name, band in values["by_size"].items()},
    }
