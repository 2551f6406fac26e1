"""Evaluation on tiles, from training to the command line: merged AP, every cap visible, settings that travel."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn

from crossdino import checkpoints
from crossdino.checkpoints import load_model
from crossdino.cli.evaluate import add_evaluate_options, how_to_look, run_evaluate
from crossdino.config import Config, DataConfig, InferenceConfig, ModelConfig, from_dict, read_yaml, with_changes
from crossdino.data import DetectionDataset, load_coco
from crossdino.errors import InputError
from crossdino.evaluation.caps import Look, cap_warnings
from crossdino.predictor import Predictor
from crossdino.structures import DetectorOutput
from crossdino.training import detect_dataset, train
from crossdino.training.setup import decide_tiles

COLUMNS, ROWS, STEP, SIDE = 50, 40, 10, 6


class Oracle(nn.Module):
    """Finds every bright rectangle in what it is shown, whole or cut off; nothing else."""

    def __init__(self, num_queries: int = 400, **inference: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.num_queries = num_queries
        self.config = ModelConfig(class_names=("a",))
        self.inference = InferenceConfig(
            **{"short_side": 100, "long_side": 100, "num_select": num_queries, **inference}
        )
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor, padding_mask: Tensor) -> DetectorOutput:
        logits = torch.full((len(images), self.num_queries, 1), -12.0)
        boxes = torch.full((len(images), self.num_queries, 4), 0.5)
        for number, (image, mask) in enumerate(zip(images, padding_mask, strict=True)):
            height, width = int((~mask[:, 0]).sum()), int((~mask[0]).sum())
            self.shapes.append((height, width))
            found = ndimage.find_objects(ndimage.label(image[0].numpy() > 0.5)[0])[: self.num_queries]
            for place, (rows, columns) in enumerate(found):
                centre = [(columns.start + columns.stop) / 2 / width, (rows.start + rows.stop) / 2 / height]
                sides = [(columns.stop - columns.start) / width, (rows.stop - rows.start) / height]
                boxes[number, place] = torch.tensor(centre + sides)
                logits[number, place] = 3.0
        return DetectorOutput(logits, boxes)


@pytest.fixture
def crowd(tmp_path: Path) -> Path:
    """One image of 505 x 405 with 2,000 squares."""
    pixels = np.zeros((405, 505, 3), np.uint8)
    boxes = [[STEP * x + 1, STEP * y + 1, SIDE, SIDE] for y in range(ROWS) for x in range(COLUMNS)]
    for x, y, width, height in boxes:
        pixels[y : y + height, x : x + width] = 255
    Image.fromarray(pixels).save(tmp_path / "crowd.png")
    document = {
        "images": [{"id": 7, "file_name": "crowd.png", "width": 505, "height": 405}],
        "annotations": [{"id": n, "image_id": 7, "category_id": 5, "bbox": box} for n, box in enumerate(boxes, 1)],
        "categories": [{"id": 5, "name": "a"}],
    }
    (tmp_path / "val.json").write_text(json.dumps(document))
    return tmp_path / "val.json"


def options(*words: str | Path) -> argparse.Namespace:
    """What the parser of `crossdino evaluate` makes of a command line."""
    parser = argparse.ArgumentParser()
    add_evaluate_options(parser, "")
    return parser.parse_args([str(word) for word in words])


def test_two_thousand_objects_of_one_image_come_out(
    crowd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Oracle(tile_size=100, tile_overlap=20)
    monkeypatch.setattr(checkpoints, "load_model", lambda *_, **__: model)
    words: list[str | Path] = ["--ground-truth", crowd, "--weights", "oracle", "--json", tmp_path / "numbers.json"]
    words += ["--predictions-out", tmp_path / "found.json", "--batch-size", "4", "--device", "cpu"]
    assert run_evaluate(options(*words, "--max-detections", "3000")) == 0
    found = [one for one in json.loads((tmp_path / "found.json").read_text()) if one["score"] > 0.5]
    truth = {tuple(one["bbox"]) for one in json.loads(crowd.read_text())["annotations"]}
    assert len(found) == 2000 and {tuple(round(value) for value in one["bbox"]) for one in found} == truth
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["ap"] == 1.0 and numbers["ar"] == 1.0 and numbers["warnings"] == []
    settings = {name: numbers["settings"][name] for name in ("tile_size", "tile_overlap", "merge", "num_select")}
    assert settings == {"tile_size": 100, "tile_overlap": 20, "merge": "seam", "num_select": 400}
    assert numbers["settings"]["max_detections"] == 3000 and numbers["settings"]["full_image"] is False
    text = " ".join(capsys.readouterr().out.split())
    for words_shown in (
        "tiles of 100 px overlapping by 20 px",
        "400 detections kept per tile",
        "the best 3000 per image",
    ):
        assert words_shown in text
    assert "warning" not in text
    # Each cap is told of where it leaves something out.
    assert run_evaluate(options(*words)) == 0
    assert "1 of 1 images a class has more than 100 objects or detections (--max-detections)" in " ".join(
        capsys.readouterr().out.split()
    )
    assert run_evaluate(options(*words, "--max-detections", "3000", "--num-select", "60")) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "in 1 of 1 images a tile has more objects or detections than the 60 that are kept (--num-select" in text
    assert json.loads((tmp_path / "numbers.json").read_text())["ap"] < 0.9
    # Whole, the model's 400 queries are the cap.
    monkeypatch.setattr(checkpoints, "load_model", lambda *_, **__: Oracle(short_side=405, long_side=505))
    assert run_evaluate(options(*words, "--max-detections", "3000", "--tile-size", "0")) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "the image has more objects" in text and "whole images, 400 detections kept per image" in text
    assert json.loads((tmp_path / "numbers.json").read_text())["settings"]["merge"] is None


def test_two_thousand_objects_come_out_of_a_prediction(crowd: Path) -> None:
    model = Oracle(tile_size=100, tile_overlap=20)
    (found,) = Predictor(model, threshold=0.5).stream([crowd.with_name("crowd.png")])  # type: ignore[arg-type]
    truth = np.array([one["bbox"] for one in json.loads(crowd.read_text())["annotations"]])
    corners = found.detections.xyxy[np.lexsort(found.detections.xyxy[:, :2].T)]
    np.testing.assert_allclose(corners[:, :2], truth[:, :2], atol=1e-3)  # float32 of numbers up to 500
    assert not found.capped
    (found,) = Predictor(model, threshold=0.5, num_select=60).stream([crowd.with_name("crowd.png")])  # type: ignore[arg-type]
    assert found.capped and len(found.detections) < 2000


def test_a_file_of_detections_is_told_of_its_cap_too(
    crowd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "found.json").write_text("[]")
    assert run_evaluate(options("--ground-truth", crowd, "--predictions", tmp_path / "found.json")) == 0
    assert "1 of 1 images a class has more than 100" in " ".join(capsys.readouterr().out.split())


def test_the_whole_image_is_looked_at_for_what_no_tile_holds(tmp_path: Path) -> None:
    """An object larger than a tile, and a small one: the first is found in the whole image only."""
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[20:180, 30:200], pixels[100:110, 250:260] = 255, 255
    Image.fromarray(pixels).save(tmp_path / "large.png")
    boxes = [[30, 20, 170, 160], [250, 100, 10, 10]]
    document = {
        "images": [{"id": 1, "file_name": "large.png", "width": 300, "height": 200}],
        "annotations": [{"id": n, "image_id": 1, "category_id": 5, "bbox": box} for n, box in enumerate(boxes, 1)],
        "categories": [{"id": 5, "name": "a"}],
    }
    (tmp_path / "x.json").write_text(json.dumps(document))
    data = DataConfig(tile_size=100, tile_overlap=20, test_short_side=100, test_long_side=150, num_workers=0)
    model = Oracle(num_queries=20)
    dataset = DetectionDataset(load_coco(tmp_path / "x.json"), data, model.mean, model.std)
    found = {}
    for full in (False, True):
        model.shapes.clear()
        # Not by seams, which would put the parts in the tiles together by themselves.
        results = detect_dataset(model, dataset, num_select=20, merge="nms", full_image=full, batch_size=3)  # type: ignore[arg-type]
        assert model.shapes.count((100, 150)) == int(full) and len(model.shapes) == len(dataset) + full
        found[full] = [one["bbox"] for one in results if one["score"] > 0.5]
    close = [any(np.abs(np.array(box) - boxes[0]).max() < 3 for box in found[full]) for full in (False, True)]
    assert close == [False, True]
    assert all(any(np.abs(np.array(box) - boxes[1]).max() < 1 for box in found[full]) for full in (False, True))


def test_merge_settings_reach_the_merging(crowd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def merge(parts: Any, tiles: Any, hw: Any, iou: float, mode: str, full: Any) -> Any:
        calls.append((len(parts), len(tiles), hw, iou, mode, full is not None))
        return parts[0]

    monkeypatch.setattr("crossdino.training.evaluation.merge_detections", merge)
    model = Oracle()
    data = DataConfig(tile_size=300, tile_overlap=20, test_short_side=300, test_long_side=300, num_workers=0)
    dataset = DetectionDataset(load_coco(crowd), data, model.mean, model.std)
    detect_dataset(model, dataset, num_select=5, merge="soft", merge_iou=0.3, full_image=True)  # type: ignore[arg-type]
    assert calls == [(4, 4, (405, 505), 0.3, "soft", True)]


def test_options_go_before_the_models_own_settings() -> None:
    inference = InferenceConfig(
        tile_size=512, tile_overlap=99, merge="nms", merge_iou=0.4, auto_tile_size=333, auto_tile_overlap=44
    )

    def look(*words: str) -> Look:
        return how_to_look(options("--ground-truth", "t", "--weights", "w", *words), inference, 100)

    assert look() == Look(512, 99, "nms", 0.4, False, 300, 100)
    assert look("--merge", "soft", "--merge-iou", "0.7", "--full-image", "--num-select", "5") == Look(
        512, 99, "soft", 0.7, True, 5, 100
    )
    auto = look("--tile-size", "auto")
    assert (auto.tile_size, auto.tile_overlap) == (333, 44)
    auto = look("--tile-size", "auto", "--tile-overlap", "0", "--no-full-image")
    assert (auto.tile_size, auto.tile_overlap) == (333, 0)
    assert look("--tile-size", "0").tile_size == 0
    smaller = look("--tile-size", "88")  # cannot overlap by 99 px
    assert (smaller.tile_size, smaller.tile_overlap) == (88, 22)
    with pytest.raises(InputError, match="cannot overlap by 99 px"):
        look("--tile-size", "90", "--tile-overlap", "99")
    with pytest.raises(InputError, match="tile_size is auto, but the model does not know.*give the tiles' side"):
        how_to_look(options("--ground-truth", "t", "--weights", "old", "--tile-size", "auto"), InferenceConfig(), 100)
    for words in (["--tile-size", "big"], ["--merge", "best"], ["--merge-iou", "0"], ["--tile-overlap", "-1"]):
        with pytest.raises(SystemExit):
            look(*words)


def test_warnings_count_images_not_detections() -> None:
    truth = {
        "images": [{"id": 1}, {"id": 2}, {"id": 3}],
        "annotations": [{"image_id": 3, "category_id": 1}] * 3 + [{"image_id": 1, "category_id": 1, "iscrowd": 1}] * 9,
    }
    found = [{"image_id": 2, "category_id": 1 + n % 2, "score": 0.9} for n in range(4)]
    found += [{"image_id": 1, "category_id": 1, "score": 0.05}] * 50  # noise
    assert cap_warnings(3, None, [], truth, found) == []
    found.append({"image_id": 2, "category_id": 1, "score": 0.9})
    (line,) = cap_warnings(2, None, [], truth, found)
    assert "in 2 of 3 images a class has more than 2" in line


# --- training ---


def tiled(config: Config, **changes: Any) -> Config:
    names = {"data.train_short_sides": [40], "data.test_short_side": 40, "training.epochs": 1, **changes}
    return with_changes(config, names)


def test_auto_is_decided_once_and_kept_by_a_resumed_training(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def choose(config: Config, _: Any) -> tuple[Config, str]:
        if config.data.tile_size != "auto":
            return config, ""
        return with_changes(config, {"data.tile_size": 40, "data.tile_overlap": 13}), "data.tile_size auto: 40 px"

    monkeypatch.setattr("crossdino.training.setup.with_tiles", choose)
    config = tiled(tiny_config, **{"data.tile_size": "auto", "evaluation.full_image": True, "evaluation.merge": "nms"})
    result = train(config)
    text = capsys.readouterr().out
    assert text.count("data.tile_size auto: 40 px") == 1 and "tiles an epoch" in text
    assert "tiles of 40 px overlapping by 13 px or more, and the whole images" in " ".join(text.split())
    for folder in (result.output, result.weights, result.output / "last"):
        data = from_dict(read_yaml(folder / "config.yaml")).data
        assert (data.tile_size, data.tile_overlap) == (40, 13)
    inference = load_model(result.weights).inference
    assert (inference.tile_size, inference.tile_overlap, inference.merge, inference.full_image) == (40, 13, "nms", True)
    assert (inference.auto_tile_size, inference.auto_tile_overlap) == (40, 13)
    # Resumed with `auto` again, the numbers stay, whatever would be chosen now.
    monkeypatch.setattr("crossdino.training.setup.with_tiles", lambda *_: pytest.fail("chosen again"))
    train(with_changes(config, {"training.epochs": 2}), resume=True)
    assert "data.tile_size auto: tiles of 40 px, as before" in capsys.readouterr().out
    assert from_dict(read_yaml(result.output / "config.yaml")).data.tile_size == 40


def test_whole_image_training_tells_which_tiles_would_suit_it(tiny_config: Config, capsys: Any) -> None:
    config = with_changes(tiny_config, {"training.epochs": 1, "data.tile_size": "auto", "data.balance": 1.0})
    result = train(config)
    # Images of 64 x 64 are shown at 64 px; objects are 8 to 19 px long, so a third of the tile is enough.
    inference = load_model(result.weights).inference
    assert (inference.tile_size, inference.auto_tile_size, inference.auto_tile_overlap) == (0, 64, 21)
    text = capsys.readouterr().out
    assert "data.tile_size auto: whole images: " in text and "data.balance 1: " in text


def test_objects_that_no_tile_can_show_are_told_of(tiny_config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    train(tiled(tiny_config, **{"data.tile_size": 8, "data.tile_overlap": 2, "data.val_annotations": None}))
    assert "objects are too large for tiles of 8 px" in " ".join(capsys.readouterr().out.split())


def test_impossible_merging_is_refused(tiny_config: Config) -> None:
    evaluation = dataclasses.replace(tiny_config.evaluation, merge="best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"evaluation.merge is 'best'"):
        train(dataclasses.replace(tiny_config, evaluation=evaluation))
    assert decide_tiles(tiny_config, load_coco(str(tiny_config.data.train_annotations))) == (tiny_config, "")


# --- against plain loops ---


class Doubtful(Oracle):
    """Finds bright rectangles too, but with a score and a shift that depend on where and how large they are."""

    def forward(self, images: Tensor, padding_mask: Tensor) -> DetectorOutput:
        output = super().forward(images, padding_mask)
        found = output.pred_logits > 0
        x, y, width, height = output.pred_boxes.unbind(-1)
        logits = 2 * torch.sin(40 * x + 17 * y) + 3 * torch.cos(90 * width * height)
        output.pred_boxes[..., 0] += 0.15 * width * torch.sin(31 * x)
        output.pred_boxes[..., 3] = height * (1 + 0.15 * torch.cos(23 * y))
        return DetectorOutput(torch.where(found, logits[..., None], output.pred_logits), output.pred_boxes)


def plain_nms(boxes: list[list[float]], scores: list[float], iou: float) -> list[int]:
    kept: list[int] = []
    for place in sorted(range(len(boxes)), key=lambda place: -scores[place]):
        x1, y1, x2, y2 = boxes[place]
        for other in kept:
            a1, b1, a2, b2 = boxes[other]
            shared = max(0.0, min(x2, a2) - max(x1, a1)) * max(0.0, min(y2, b2) - max(y1, b1))
            if shared > iou * ((x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - shared):
                break
        else:
            kept.append(place)
    return kept


def test_merged_average_precision_is_that_of_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut by Pillow, one tile at a time through the model, NMS in loops, pycocotools: the AP of `evaluate`."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(5)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (height, width) in enumerate(((170, 230), (60, 150), (40, 30)), start=1):
        pixels = np.zeros((height, width, 3), np.uint8)
        for top in range(2, height - 22, 26):
            for left in range(2, width - 22, 26):
                w, h = rng.integers(6, 23, 2).tolist()
                pixels[top : top + h, left : left + w] = 255
                entry = {"id": len(annotations) + 1, "image_id": number, "category_id": 5, "bbox": [left, top, w, h]}
                annotations.append({**entry, "area": w * h, "iscrowd": 0})
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
    truth = {"images": images, "annotations": annotations, "categories": [{"id": 5, "name": "a"}]}
    (tmp_path / "val.json").write_text(json.dumps(truth))

    model = Doubtful(60, tile_size=64, tile_overlap=20, short_side=64, long_side=64)
    monkeypatch.setattr(checkpoints, "load_model", lambda *_, **__: model)
    words: list[str | Path] = ["--ground-truth", tmp_path / "val.json", "--weights", "w", "--device", "cpu"]
    words += ["--merge", "nms", "--merge-iou", "0.437", "--json", tmp_path / "numbers.json", "--num-select", "45"]
    assert run_evaluate(options(*words)) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())

    results: list[dict[str, Any]] = []
    for entry in images:
        picture = Image.open(tmp_path / entry["file_name"]).convert("RGB")
        places = {}
        for axis, length in (("x", picture.width), ("y", picture.height)):
            count = 1 if length <= 64 else -(-(length - 20) // 44)
            places[axis] = [n * (length - 64) // (count - 1) if count > 1 else 0 for n in range(count)]
        looks = [(picture.crop((x, y, x + 64, y + 64)), x, y) for y in places["y"] for x in places["x"]]
        boxes: list[list[float]] = []
        scores: list[float] = []
        for look, x, y in looks:
            array = torch.from_numpy(np.array(look)).permute(2, 0, 1)[None].float() / 255
            output = model(array, torch.zeros(1, 64, 64, dtype=torch.bool))
            order = output.pred_logits[0, :, 0].argsort(descending=True, stable=True)[:45].tolist()
            for query in order:
                cx, cy, w, h = output.pred_boxes[0, query].tolist()
                box = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
                box = [64 * min(max(value, 0), 1) + shift for value, shift in zip(box, (x, y) * 2, strict=True)]
                limits = (*picture.size, *picture.size)
                boxes.append([min(value, limit) for value, limit in zip(box, limits, strict=True)])
                scores.append(float(output.pred_logits[0, query, 0].sigmoid()))
        for place in plain_nms(boxes, scores, 0.437):
            x1, y1, x2, y2 = boxes[place]
            found = {"image_id": entry["id"], "category_id": 5, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            results.append({**found, "score": scores[place]})
    coco = COCO()
    coco.dataset = truth  # type: ignore[assignment]
    coco.createIndex()
    judge = COCOeval(coco, coco.loadRes(results), "bbox")  # type: ignore[arg-type]
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    assert 0.1 < judge.stats[0] < 0.9, "nothing to compare"
    # Scores are written with 8 digits, so that two of them could change places; none does here.
    assert numbers["ap"] == pytest.approx(judge.stats[0], abs=1e-6)
    assert numbers["ap50"] == pytest.approx(judge.stats[1], abs=1e-6)


# --- mistakes ---


@pytest.mark.parametrize(
    "words",
    [["--tile-size", "0"], ["--merge", "nms"], ["--no-full-image"], ["--num-select", "5"], ["--predictions-out", "x"]],
)
def test_detections_of_a_file_are_not_cut_again(crowd: Path, tmp_path: Path, words: list[str]) -> None:
    """Taken without a word, these options would seem to have had an effect."""
    (tmp_path / "found.json").write_text("[]")
    given = options("--ground-truth", crowd, "--predictions", tmp_path / "found.json", *words)
    with pytest.raises(InputError, match=r"--[a-z-]+ goes with --weights only"):
        run_evaluate(given)


def test_a_destination_that_is_a_folder_is_refused_before_the_work(crowd: Path, tmp_path: Path) -> None:
    for name in ("--json", "--predictions-out"):
        with pytest.raises(InputError, match="cannot write .* it is a folder; name a file"):
            run_evaluate(options("--ground-truth", crowd, "--weights", "no model is looked for", name, tmp_path))


def test_files_of_windows_programs_begin_with_a_mark(crowd: Path, tmp_path: Path) -> None:
    """As training reads them."""
    marked = tmp_path / "marked.json"
    marked.write_text(crowd.read_text(), encoding="utf-8-sig")
    (tmp_path / "found.json").write_text("[]", encoding="utf-8-sig")
    assert run_evaluate(options("--ground-truth", marked, "--predictions", tmp_path / "found.json")) == 0
