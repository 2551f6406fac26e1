"""No recipe is dead: each makes its first two steps on small made-up data in the data set's raw format.

Everything on the way is the real thing: the raw files, `prepare`, the loader, the recipe's own model (45 million
parameters) and loss, and `train`. Only sizes are overridden. One recipe of each data set goes the whole way that a user
goes, `crossdino train --recipe NAME --data DIR`, with its evaluation and the weights it leaves; the others stop after
their second step and write no weights, which would be 0.9 GB each. All together take about four minutes on one core.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from crossdino import training
from crossdino.benchmarks import BENCHMARKS
from crossdino.cli import main
from crossdino.config import from_dict, read_yaml, to_dict, with_changes
from crossdino.models.detector import CrossDINO
from crossdino.paper import recipe_benchmark
from crossdino.preparation import prepare_benchmark
from crossdino.progress import LOSS_PARTS
from crossdino.recipes import RECIPES, recipe
from crossdino.training import loop
from crossdino.training.run import Run
from tests import raw_datasets
from tests.raw_sodad import make_sodad

MAKERS: dict[str, Callable[[Path], Path]] = {
    "coco": lambda folder: raw_datasets.make_coco(folder, images={"train2017": 3, "val2017": 2}),
    "widerperson": lambda folder: raw_datasets.make_widerperson(folder, images={"train": 4, "val": 2}),
    "visdrone": lambda folder: raw_datasets.make_visdrone(folder, images={"train": 3, "val": 1, "test-dev": 1}),
    "aitod": lambda folder: raw_datasets.make_aitod(folder, images={"trainval": 3, "test": 1}),
    "sodad": make_sodad,
}
# The recipe that goes the whole way.
WHOLE = {
    "coco": "cross_dino_clap_strip_t",
    "widerperson": "widerperson_cross_dino_swin_t",
    "visdrone": "visdrone_cross_dino_clap_strip_t",
    "aitod": "aitod_cross_dino_r50",
    "sodad": "sodad_cross_dino_clap_strip_t",
}
# Only what makes it small. An input of 64 px has one token at the coarsest of the four levels.
SMALL: dict[str, Any] = {
    "data.train_short_sides": [64],
    "data.train_long_side": 96,
    "data.test_short_side": 64,
    "data.test_long_side": 96,
    "data.num_workers": 0,
    "training.epochs": 1,
    "training.drop_epochs": [],
    "training.trackers": [],
}
# The crop between the two resizes of DINO's recipe, for images of a hundred pixels.
SMALL_CROP: dict[str, Any] = {"data.crop_short_sides": [80, 96], "data.crop_range": [64, 80]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """A data set's folder as `crossdino prepare` leaves it, made once, with at most three training images.

    In it lies `two.yaml`, a data set of two training images alone.
    """
    root = tmp_path_factory.mktemp("benchmarks")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = root / name
            prepare_benchmark(name, MAKERS[name](root / f"{name}_raw"), folder)
            roles = json.loads((folder / "benchmark.json").read_text())["roles"]
            for split in set(roles.values()):
                path = folder / "annotations" / f"{split}.json"
                keep_images(path, path, 3 if split == roles["train"] else 2)
            keep_images(folder / "annotations" / f"{roles['train']}.json", folder / "two.json", 2)
            only_training = {"train": {"annotations": "two.json", "images": f"images/{roles['train']}"}}
            (folder / "two.yaml").write_text(yaml.safe_dump(only_training))
            made[name] = folder
        return made[name]

    yield get
    shutil.rmtree(root)


def keep_images(source: Path, target: Path, number: int) -> None:
    """The first images of a COCO file, and what is in them."""
    document = json.loads(source.read_text())
    document["images"] = document["images"][:number]
    ids = {image["id"] for image in document["images"]}
    document["annotations"] = [item for item in document["annotations"] if item["image_id"] in ids]
    target.write_text(json.dumps(document))


def changes_of(name: str) -> dict[str, Any]:
    return SMALL | (SMALL_CROP if recipe(name).data.crop_short_sides else {})


def check_run(output: Path, name: str, changes: dict[str, Any]) -> None:
    """The run is the recipe's with the changes, its classes are the benchmark's, and its losses are numbers."""
    stored = from_dict(read_yaml(output / "config.yaml"))
    assert stored.name == name
    classes = tuple(BENCHMARKS[recipe_benchmark(name) or "coco"].categories.values())
    wanted = with_changes(recipe(name), {**changes, "model.class_names": list(classes)})
    assert to_dict(stored) == to_dict(wanted)
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    (steps,) = [record for record in records if record["kind"] == "train"]  # the mean of both
    assert steps["step"] == 2 and {"loss", *LOSS_PARTS} <= set(steps)
    assert all(math.isfinite(steps[part]) and steps[part] > 0 for part in ("loss", *LOSS_PARTS))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in WHOLE.values()])
def test_two_steps(name: str, prepared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, what in ((Run, "save"), (loop, "save_best"), (loop, "training_curves")):
        monkeypatch.setattr(place, what, lambda *_: None)
    changes = changes_of(name) | {
        "data.source": str(prepared(recipe_benchmark(name) or "coco") / "two.yaml"),
        "training.output": str(tmp_path / "run"),
        "training.batch_size": 1,
    }
    if name == "compact":
        changes["model.backbone_weights"] = None  # a package may not be installed
    result = training.train(with_changes(recipe(name), changes))
    assert result.steps == 2
    check_run(tmp_path / "run", name, changes)


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", WHOLE)
def test_the_whole_way(
    benchmark: str, prepared: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, output = WHOLE[benchmark], tmp_path / "run"
    changes = changes_of(name) | {"training.batch_size": 2}
    words = ["train", "--recipe", name, "--data", str(prepared(benchmark)), "--output", str(output)]
    status = main([*words, *(word for key, value in changes.items() for word in (f"--{key}", json.dumps(value)))])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert "the backbone starts from random weights" in printed.err
    check_run(output, name, {**changes, "data.source": str(prepared(benchmark)), "training.output": str(output)})
    assert all(f"AP {band}" in printed.out for band in recipe(name).evaluation.size_bands)  # it was evaluated

    model = CrossDINO.from_pretrained(output / "best")
    shutil.rmtree(output)  # 0.9 GB
    benchmark_classes = tuple(BENCHMARKS[benchmark].categories.values())
    assert model.config.class_names == benchmark_classes
    assert model.inference.num_select == recipe(name).evaluation.num_select
    with torch.no_grad():
        logits = model.eval()(torch.zeros(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)).pred_logits
    assert logits.shape == (1, 900, len(benchmark_classes)) and bool(torch.isfinite(logits).all())
