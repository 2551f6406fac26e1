"""Detections of a whole data set, and the evaluations of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import supervision as sv
import torch
from accelerate.utils import gather_object
from torch import Tensor

from crossdino.config import Config
from crossdino.data.dataset import DetectionDataset, WholeImage, build_loader
from crossdino.data.index import DatasetIndex
from crossdino.evaluation.average_precision import AveragePrecisionResult, evaluate_detections
from crossdino.evaluation.caps import CAPPED_SCORE, Look, cap_warnings
from crossdino.merging import merge_detections
from crossdino.models.detector import CrossDINO
from crossdino.postprocessing import detections_to_coco, select_detections
from crossdino.tiling import Tile
from crossdino.training.run import Run

Found = tuple[Tensor, Tensor, Tensor]


def detect_dataset(
    model: CrossDINO,
    dataset: DetectionDataset,
    *,
    num_select: int,
    merge: Literal["seam", "nms", "soft"] = "seam",
    merge_iou: float = 0.5,
    full_image: bool = False,
    batch_size: int = 1,
    num_workers: int = 0,
    images: Iterable[int] | None = None,
    on_image: Callable[[int], None] | None = None,
    on_capped: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Detections of a data set as COCO results, with the data set's own image and category ids.

    Always in float32, as `Predictor` computes: bfloat16 cost the compact model 1.5 AP. Where the data set has tiles,
    those of an image are merged (`crossdino.merging.merge_detections`).

    Args:
        model: the detector, on the device to compute on; it is put into eval mode.
        dataset: made with `train=False`.
        num_select: detections kept per image or tile.
        merge: how the detections of tiles become those of the image.
        merge_iou: overlap from which two detections of different tiles are one.
        full_image: besides its tiles each image is looked at as a whole.
        batch_size: images or tiles per forward pass.
        num_workers: loader processes.
        images: positions of the images in the data set's index; None means all.
        on_image: called after each image with the number of finished images.
        on_capped: called with the id of each image of which `num_select` (or the model's number of queries) left
            something out: an image or tile that has more objects, or whose last detection still has `CAPPED_SCORE`.

    Returns:
        One dict per detection: image_id, category_id, bbox (xywh in pixels of the original image), score.
    """
    model.eval()
    device = next(model.parameters()).device
    records, tiled = dataset.index.records, bool(dataset.data.tile_px)
    order: list[tuple[int, int | WholeImage]] = []
    for image in range(len(records)) if images is None else images:
        order += [(image, item) for item in dataset.items_of(image)]
        if tiled and full_image:
            order.append((image, WholeImage(image)))
    loader = build_loader(dataset, batch_size, order=[item for _, item in order], num_workers=num_workers)
    results: list[dict[str, Any]] = []
    parts: list[Found] = []
    tiles: list[Tile] = []
    whole: Found | None = None
    position = finished = 0
    capped = False
    for batch in loader:
        batch = batch.to(device)
        with torch.no_grad():
            output = model(batch.images, batch.padding_mask)
        num_queries, num_classes = output.pred_logits.shape[1:]
        most = min(num_select, num_queries * num_classes)
        sizes = [target.original_hw for target in batch.targets]
        for target, found in zip(batch.targets, select_detections(output, sizes, num_select), strict=True):
            image, item = order[position]
            if isinstance(item, WholeImage):
                whole = found
            else:
                x, y = target.origin_xy
                parts.append(found)
                tiles.append(Tile(y, x, *target.original_hw))
                left_out = most < num_queries * num_classes and bool(found[1].min() >= CAPPED_SCORE)
                capped |= left_out or dataset.objects_of(item) > min(num_select, num_queries)
            position += 1
            if position < len(order) and order[position][0] == image:
                continue
            boxes, scores, labels = parts[0]
            if tiled:
                hw = (records[image].height, records[image].width)
                boxes, scores, labels = merge_detections(parts, tiles, hw, merge_iou, merge, whole)
            detections = sv.Detections(boxes.numpy(), confidence=scores.numpy(), class_id=labels.numpy())
            results += detections_to_coco(detections, target.image_id, dataset.index.category_ids)
            if capped and on_capped is not None:
                on_capped(target.image_id)
            parts, tiles, whole, capped = [], [], None, False
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
    capped: list[int] = []
    with run.console.status(f"evaluating {total} images") as status:
        detections = detect_dataset(
            state.evaluated,
            val_set,
            num_select=config.evaluation.num_select,
            merge=config.evaluation.merge,
            merge_iou=config.evaluation.merge_iou,
            full_image=config.evaluation.full_image,
            batch_size=config.training.batch_size,
            num_workers=config.data.num_workers,
            images=range(rank, total, world),  # every image on exactly one process
            on_capped=capped.append,
            on_image=lambda count: status.update(f"evaluating image {min(count * world, total)} of {total}"),
        )
    if world > 1:
        detections, capped = gather_object(detections), gather_object(capped)
    if not accelerator.is_main_process:
        return None
    result = average_precision(config, val_set.index, detections)
    table, look = result.table(), look_of(config)
    if look.tile_size:
        table.caption = f"{table.caption}\n{look}"
    run.console.print(table)
    names = ("evaluation.num_select", "evaluation.max_detections")
    for line in cap_warnings(look.max_detections, look, capped, val_set.index.to_coco(), detections, names):
        run.console.print(line, soft_wrap=True)
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


def look_of(config: Config) -> Look:
    """How the images are looked at while training."""
    data, settings = config.data, config.evaluation
    return Look(
        data.tile_px,
        data.tile_overlap,
        settings.merge,
        settings.merge_iou,
        settings.full_image,
        settings.num_select,
        settings.max_detections,
    )


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
