"""Trainings and evaluations beside the paper's numbers: what `crossdino report` prints.

A run is a training folder or a JSON file of `crossdino evaluate --json`. A difference to the paper is only formed where
data set, split, protocol and input size are those of the paper's row; otherwise a footnote says what differs. The
validation of a training is not the protocol's measure (other bands, other caps, chosen on the same images), and is
marked as such.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crossdino.benchmarks import BENCHMARKS
from crossdino.config import Config, from_dict, read_yaml, to_dict
from crossdino.errors import InputError
from crossdino.paper import PaperRow, paper_rows
from crossdino.provenance import training_provenance
from crossdino.recipes import RECIPES

VALIDATION = "own validation"
"""What stands for the protocol of numbers that a training measured itself."""

# Settings that say where things are and how fast they go, not what is trained.
_NO_MATTER = (
    *("name", "data.source", "data.train_annotations", "data.train_images", "data.val_annotations", "data.val_images"),
    *("data.check", "data.num_workers", "model.class_names", "model.backbone_weights"),
    *("training.output", "training.epochs", "training.evaluate_every", "training.best_metric", "training.save_minutes"),
    *("training.activation_checkpointing", "training.compile", "training.deterministic", "training.trackers"),
    *("training.max_minutes", "training.seed", "training.precision", "training.patience"),
    *("evaluation.size_bands",),
)
_BACKBONES = {"resnet50": "ResNet50", "swin_t": "Swin-T", "strip_mlp_t": "CLAP-Strip-T"}


@dataclass(frozen=True)
class Run:
    """One row of numbers and what they were measured under; what is not known is None.

    Attributes:
        source: the file or folder that was named.
        name: of the model, as its training or its file is called.
        metrics: name -> fraction of 1; those that are not defined are left out.
        recipe: that the model was trained after, whatever the training is called.
        protocol: name of the protocol, `VALIDATION`, or None for bands and caps of one's own.
        benchmark: name of the data set.
        split: its official name.
        backbone: as the paper calls it.
        epochs: of the training.
        input_px: short side and limit of the long side of the input.
        tile_size: in pixels, 0 for whole images.
        num_select: detections kept per image or tile.
        max_detections: detections per image and class that count; several where the protocol has several.
        revision: of the code that measured, short, with `+` where it was changed.
        training_revision: of the code that trained.
        paper: the paper's row of the recipe.
        notes: footnotes, one line each.
        comparable: whether a difference to the paper's row means something.
        config: the settings of the training or of the recipe.
    """

    source: Path
    name: str
    metrics: dict[str, float]
    recipe: str | None = None
    protocol: str | None = None
    benchmark: str | None = None
    split: str | None = None
    backbone: str | None = None
    epochs: float | None = None
    input_px: tuple[int, int] | None = None
    tile_size: int | None = None
    num_select: int | None = None
    max_detections: tuple[int, ...] = ()
    revision: str | None = None
    training_revision: str | None = None
    paper: PaperRow | None = None
    notes: tuple[str, ...] = ()
    comparable: bool = False
    config: Config | None = field(default=None, repr=False)

    def difference(self, metric: str) -> float | None:
        """Percentage points more than the paper; None where that means nothing."""
        if not self.comparable or self.paper is None or metric not in self.metrics or metric not in self.paper.metrics:
            return None
        return 100 * self.metrics[metric] - self.paper.metrics[metric]


def read_run(path: str | Path) -> list[Run]:
    """The numbers of a training folder or of an evaluation's JSON file.

    Args:
        path: a training folder, of which the evaluations lying in it are taken and else its own validation of the best
            epoch; or a file that `crossdino evaluate --json` wrote.

    Returns:
        One run for each evaluation.

    Raises:
        InputError: there is nothing of the kind.
    """
    path = Path(path)
    if path.is_file():
        return [_of_evaluation(path, _read_evaluation(path), _settings(path.parent))]
    if not path.is_dir():
        raise InputError(f"{path} is not there: give a training folder, or a JSON file of `crossdino evaluate --json`")
    config = _settings(path)
    found = [file for file in sorted(path.glob("*.json")) if _is_evaluation(_loaded(file))]
    if found:
        return [_of_evaluation(file, _read_evaluation(file), config) for file in found]
    if (path / "log.jsonl").is_file() and config is not None:
        return [_of_training(path, config)]
    if (path / "model.safetensors").is_file():
        raise InputError(
            f"{path} is a model folder without evaluations: give the training folder that it lies in, or the JSON file "
            f"of `crossdino evaluate --weights {path} --json FILE`"
        )
    raise InputError(f"{path} holds neither an evaluation (`crossdino evaluate --json`) nor a training (log.jsonl)")


def _settings(folder: Path) -> Config | None:
    """The configuration of the training in a folder; None where there is none."""
    return from_dict(read_yaml(folder / "config.yaml")) if (folder / "config.yaml").is_file() else None


def _loaded(path: Path) -> Any:
    """The content of a JSON file; a text where it cannot be read, which is why."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        return str(error)


def _is_evaluation(content: Any) -> bool:
    """Whether it is what `crossdino evaluate --json` writes."""
    if not isinstance(content, dict) or not isinstance(content.get("settings"), dict) or "names" in content:
        return False
    of_protocol = isinstance(content.get("protocol"), str) and isinstance(content.get("metrics"), dict)
    return of_protocol or all(key in content for key in ("ap", "ap50", "ap75", "by_size"))


def _read_evaluation(path: Path) -> dict[str, Any]:
    """What `crossdino evaluate --json` wrote; anything else is refused."""
    content = _loaded(path)
    if _is_evaluation(content):
        return content
    what = "is no file of `crossdino evaluate --json`"
    if isinstance(content, str):
        what = f"cannot be read ({content})"
    elif isinstance(content, list):
        what = "is a list, such as detections are"
    elif isinstance(content, dict) and "names" in content and "metrics" in content:
        what = "was written by `crossdino compare`"
    elif isinstance(content, dict) and "annotations" in content:
        what = "is a COCO data set"
    raise InputError(f"{path} {what}: give what `crossdino evaluate --json FILE` wrote, or a training folder")


def _of_evaluation(path: Path, content: Mapping[str, Any], config: Config | None) -> Run:
    origin = content.get("provenance")
    origin = origin if isinstance(origin, dict) else {}
    settings = content["settings"]
    if "protocol" in content:
        numbers = dict(content["metrics"])
    else:
        numbers = {"AP": content["ap"], "AP50": content["ap50"], "AP75": content["ap75"]}
        numbers |= {f"AP_{name}": band["ap"] for name, band in content["by_size"].items()}
        numbers[f"AR@{settings.get('max_detections')}"] = content.get("ar")
    recipe = origin.get("recipe")
    name = origin.get("name") or recipe
    if not name and config is not None:
        name, recipe = config.name, (training_provenance(path.parent) or {}).get("recipe") or config.name
    if config is None or config.name != name:  # a file about another model may lie in a training's folder
        config = RECIPES[recipe]() if recipe in RECIPES else None
    cap = settings.get("max_detections")
    short, long = origin.get("short_side"), origin.get("long_side")
    split = origin.get("split")
    return _beside_the_paper(
        Run(
            source=path,
            name=name or path.stem,
            metrics=_defined(numbers),
            recipe=recipe,
            protocol=content.get("protocol"),
            benchmark=origin.get("benchmark"),
            split=split,
            backbone=_backbone(config),
            epochs=origin.get("epochs") or (config.training.epochs if config is not None else None),
            input_px=(int(short), int(long)) if short is not None and long is not None else None,
            tile_size=origin.get("tile_size"),
            num_select=origin.get("num_select"),
            max_detections=tuple(cap) if isinstance(cap, list) else () if cap is None else (cap,),
            revision=_revision(origin),
            training_revision=(origin.get("training_git") or "")[:7] or None,
            notes=()
            if origin
            else ("the file does not say where its numbers come from (it is older than this version)",),
            config=config,
        )
    )


def _of_training(folder: Path, config: Config) -> Run:
    """The validation of the epoch that the best checkpoint is of."""
    records: list[dict[str, Any]] = []
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the machine died while writing it
            continue
        if record.get("kind") == "eval":
            records.append(record)
    if not records:
        raise InputError(
            f"{folder} holds no evaluation: its training has not measured anything yet; run `crossdino evaluate "
            f"--weights {folder / 'best'} --json {folder / 'evaluation.json'}`"
        )
    best = next((record for record in reversed(records) if record.get("best")), records[-1])
    numbers = {"AP": best.get("ap"), "AP50": best.get("ap50"), "AP75": best.get("ap75")}
    numbers |= {f"AP_{name}": value for name, value in (best.get("by_size") or {}).items()}
    trained = training_provenance(folder) or {}
    where = Path(config.data.val_annotations or config.data.source or "its validation data").name
    return _beside_the_paper(
        Run(
            source=folder,
            name=config.name,
            metrics=_defined(numbers),
            recipe=trained.get("recipe") or config.name,
            protocol=VALIDATION,
            backbone=_backbone(config),
            epochs=best["epoch"],
            input_px=(config.data.test_short_side, config.data.test_long_side),
            tile_size=config.data.tile_px,
            num_select=config.evaluation.num_select,
            max_detections=(config.evaluation.max_detections,),
            revision=_revision(trained),
            training_revision=(trained.get("git") or "")[:7] or None,
            notes=(
                f"measured by the training itself on {where}, on which the epoch ({best['epoch']:g}) was chosen too: "
                "not a protocol's measure",
            ),
            config=config,
        )
    )


def _beside_the_paper(run: Run) -> Run:
    """The run with the paper's row of its recipe, and with what stands in the way of comparing them."""
    rows = paper_rows(run.recipe or run.name)
    notes = list(run.notes)
    if not rows:
        return _replaced(run, notes=tuple(notes))
    recipe = RECIPES[rows[0].recipe]()
    if run.config is not None:
        notes += _changes(run.config, recipe)
    paper = rows[0]
    benchmark = BENCHMARKS[paper.benchmark]
    hindrances: list[str] = []
    if run.protocol == VALIDATION:
        hindrances.append("it is no measurement by the protocol")
    elif run.protocol != benchmark.protocol:
        hindrances.append(
            f"measured without --protocol {benchmark.protocol}"
            if run.protocol is None
            else f"measured by protocol {run.protocol}, the paper's is {benchmark.protocol}"
        )
    if run.protocol != VALIDATION:
        if run.benchmark is None or run.split is None:
            hindrances.append(
                "the file does not say which data set and split it is of (annotations made by `crossdino prepare` do)"
            )
        elif run.benchmark != paper.benchmark:
            hindrances.append(f"measured on {run.benchmark}, the paper's row is of {paper.benchmark}")
        elif run.split != benchmark.paper_split:
            hindrances.append(f"measured on split {run.split}, the paper says {benchmark.paper_split}")
    if run.config is not None and run.input_px is not None:
        wanted = recipe.data
        if run.input_px != (wanted.test_short_side, wanted.test_long_side):
            hindrances.append(
                f"input {run.input_px[0]} x {run.input_px[1]} px, the recipe's is {wanted.test_short_side} x "
                f"{wanted.test_long_side}"
            )
    if hindrances:
        notes.append(f"no difference to the paper: {'; '.join(hindrances)}")
    if run.epochs is not None and run.epochs != paper.epochs:
        notes.append(f"trained {run.epochs:g} epochs, the paper {paper.epochs}")
    notes += [
        f"the paper's Table {row.table} prints other numbers for this model: "
        + ", ".join(f"{name} {value:g}" for name, value in row.metrics.items() if value != paper.metrics.get(name))
        for row in rows[1:]
        if any(value != paper.metrics.get(name) for name, value in row.metrics.items())
    ]
    notes += [f"the paper's Table {paper.table}: {paper.note}"] if paper.note else []
    return _replaced(run, paper=paper, comparable=not hindrances, notes=tuple(notes))


def _replaced(run: Run, **changes: Any) -> Run:
    return Run(**{**vars(run), **changes})


def _changes(config: Config, wanted: Config) -> list[str]:
    """One line on the settings that are not the recipe's."""
    own, theirs = _flat(to_dict(config)), _flat(to_dict(wanted))
    changed = [name for name, value in theirs.items() if name not in _NO_MATTER and own.get(name) != value]
    if not changed:
        return []
    some = ", ".join(f"{name} {own.get(name)} ({theirs[name]})" for name in changed[:4])
    more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
    return [f"settings that are not the recipe's (in brackets): {some}{more}"]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value; `evaluation.size_bands` stays a whole."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _defined(numbers: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in numbers.items() if value is not None and not math.isnan(value)}


def _backbone(config: Config | None) -> str | None:
    return None if config is None else _BACKBONES.get(config.model.backbone, config.model.backbone)


def _revision(origin: Mapping[str, Any]) -> str | None:
    revision = origin.get("git")
    return f"{revision[:7]}{'+' if origin.get('git_dirty') else ''}" if isinstance(revision, str) else None


def chosen_metrics(runs: Sequence[Run], wanted: Sequence[str] | None) -> list[str]:
    """The columns: those asked for, or else average precisions and what the paper prints for one of the runs.

    Raises:
        InputError: a metric is asked for that no run has.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if wanted is not None:
        missing = next((name for name in wanted if name not in known), None)
        if missing is not None:
            raise InputError(f"no run has the metric {missing!r}: choose of {', '.join(known)}")
        return list(wanted)
    printed = {name for run in runs if run.paper is not None for name in run.paper.metrics}
    return [name for name in known if name in printed or name.startswith("AP") or name in ("Recall", "mMR")]


def costs(run: Run) -> tuple[float, float] | None:
    """Parameters in millions and multiply-adds in billions (the paper's GFLOPs); None where the model is unknown."""
    if run.config is None:
        return None
    from crossdino.complexity import measure

    data = run.config.data
    cost = measure(run.config.model, run.input_px or (data.test_short_side, data.test_long_side))
    return cost.num_parameters / 1e6, cost.num_multiply_adds / 1e9
