"""The model card: README.md of a model folder, for people and for the Hugging Face hub.

Markdown under a YAML head that the hub reads. It says what was measured and on what, and "not stated" where nothing is
known; the same facts give the same text, to the byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from crossdino.config import InferenceConfig
from crossdino.data.index import DatasetIndex
from crossdino.data.transforms import resize_hw

if TYPE_CHECKING:
    from crossdino.models.detector import CrossDINO

SIZE_EDGES_PX = (0, 4, 8, 16, 32, 64, 96, 128, 256, 512)
"""Lower bounds of the histogram's bins, in pixels of sqrt(area); the last bin is open."""

NOT_STATED = "not stated"

# Identifiers that the hub knows, of those that models and pictures come with; any other is `other` with a name.
# fmt: off
_HUB_LICENSES = {
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-2.0", "gpl-3.0", "lgpl-3.0",
    "agpl-3.0", "mpl-2.0", "isc", "unlicense", "openrail", "odbl", "unknown",
    "cc0-1.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "cc-by-nd-4.0",
}
# fmt: on

_CITATION = """@article{cao2025crossdino,
  title   = {Cross-DINO: Cross the Deep MLP and Transformer for Small Object Detection},
  author  = {Cao, Guiping and Huang, Wenjian and Lan, Xiangyuan and Zhang, Jianguo and Jiang, Dongmei and
             Wang, Yaowei},
  journal = {arXiv preprint arXiv:2505.21868},
  year    = {2025}
}"""


@dataclass(frozen=True)
class SizeHistogram:
    """How many objects have which size, sqrt(area), in the bins that begin at `SIZE_EDGES_PX`.

    Attributes:
        counts: objects a bin, in pixels of the original images.
        input_counts: the same in pixels of the network's input; None where its size is not known.
    """

    counts: tuple[int, ...]
    input_counts: tuple[int, ...] | None = None


def size_histogram(index: DatasetIndex, inference: InferenceConfig | None = None) -> SizeHistogram:
    """The sizes of a data set's objects; regions that are ignored (crowds) do not count.

    Args:
        index: the data set.
        inference: how its images are resized for the network; None leaves the sizes at the network's input out.
    """
    sizes: list[np.ndarray] = [np.empty(0)]
    input_sizes: list[np.ndarray] = [np.empty(0)]
    for record in index.records:
        found = np.sqrt(record.areas[~record.iscrowd])
        sizes.append(found)
        if inference is not None:
            height, width = resize_hw((record.height, record.width), inference.short_side, inference.long_side)
            input_sizes.append(found * (height * width / (record.height * record.width)) ** 0.5)
    counts = _counts(np.concatenate(sizes))
    return SizeHistogram(counts, _counts(np.concatenate(input_sizes)) if inference is not None else None)


def model_card(
    model: CrossDINO,
    *,
    name: str,
    metrics: Mapping[str, Any] | None = None,
    sizes: SizeHistogram | None = None,
    data: str | None = None,
    license: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> str:
    """The text of a model card.

    Args:
        model: the detector that the card is of.
        name: the model's name, or its id `owner/name` on the hub.
        metrics: what was measured, as `AveragePrecisionResult.to_dict()` gives it (fractions of 1); parts may be
            missing, and `by_size` may hold plain numbers.
        sizes: of the objects in the training data, see `size_histogram`.
        data: what the model was trained and measured on, as Markdown.
        license: of the weights, e.g. `apache-2.0` or a name of its own.
        training: how it was trained, name -> value.

    Returns:
        Markdown with a YAML head.
    """
    name = " ".join(name.split())  # a line of dashes within it would end the head
    paragraphs = [
        "---\n" + _head(name, metrics, data, license) + "---",
        f"# {_escaped(name)}",
        "A detector of small objects, made with crossdino.",
        "## What it detects",
        f"{_counted(len(model.config.class_names), 'class', 'classes')}: "
        + ", ".join(_escaped(class_name) for class_name in model.config.class_names)
        + ".",
        "## How to use it",
        _usage(name),
        "## Evaluation",
        *_evaluation(model.inference, metrics),
        "## Data",
        data.strip() if data else f"Training and evaluation data: {NOT_STATED}.",
        *_size_table(sizes, model.inference),
        "## Architecture",
        _architecture(model),
        "## Training",
        _table(("setting", "value"), [(_escaped(key), _escaped(value)) for key, value in training.items()])
        if training
        else f"Settings: {NOT_STATED}.",
        "## Intended use and limits",
        _limits(metrics, sizes),
        "## Licence",
        f"Of these weights: {_escaped(license) if license else NOT_STATED}. The code of crossdino is under Apache-2.0; "
        "the pictures it was trained on have licences of their own.",
        "## Citation",
        f"```bibtex\n{_CITATION}\n```",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _head(name: str, metrics: Mapping[str, Any] | None, data: str | None, license: str | None) -> str:
    head: dict[str, Any] = {"library_name": "crossdino", "pipeline_tag": "object-detection"}
    identifier = (license or "unknown").strip().lower()
    if identifier in _HUB_LICENSES:
        head["license"] = identifier
    else:
        head |= {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", identifier).strip("-") or "other"}
    head["tags"] = ["object-detection", "small-object-detection", "cross-dino", "detr"]
    measured = [
        {"type": key, "name": label, "value": float(metrics[key])}
        for key, label in (("ap", "AP"), ("ap50", "AP50"), ("ap75", "AP75"))
        if metrics and metrics.get(key) is not None
    ]
    for band, values in (metrics.get("by_size") or {}).items() if metrics else ():
        value, _ = _band(values)
        if value is not None:
            measured.append({"type": "ap", "name": f"AP {band}", "value": float(value)})
    if measured:
        dataset = {"type": "custom", "name": " ".join(data.split()) if data else NOT_STATED}
        result = {"task": {"type": "object-detection"}, "dataset": dataset, "metrics": measured}
        head["model-index"] = [{"name": name, "results": [result]}]
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1000)


def _usage(name: str) -> str:
    where = name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else "MODEL"
    lines = [
        "```python",
        "from crossdino import CrossDINO, Predictor",
        f'model = CrossDINO.from_pretrained("{where}")',
        'detections = Predictor(model, threshold=0.3)("image.jpg")  # supervision.Detections',
        "```",
        "",
        "```",
        f"crossdino predict image.jpg --weights {where} --output results",
        "```",
    ]
    if where == "MODEL":
        lines += ["", "MODEL is the folder with this card, or the id of its repository on the Hugging Face hub."]
    return "\n".join(lines)


def _evaluation(inference: InferenceConfig, metrics: Mapping[str, Any] | None) -> list[str]:
    if not metrics or metrics.get("ap") is None:
        return ["Nothing was measured, or it is not stated."]
    settings = metrics.get("settings") or {}
    bands = settings.get("size_bands") or {}
    rows = [
        ("AP", _percent(metrics["ap"]), _known(metrics.get("num_objects"))),
        ("AP50", _percent(metrics.get("ap50")), _known(metrics.get("num_objects"))),
        ("AP75", _percent(metrics.get("ap75")), _known(metrics.get("num_objects"))),
    ]
    for band, values in (metrics.get("by_size") or {}).items():
        value, num_objects = _band(values)
        bounds = f" ({bands[band][0]:g} to {bands[band][1]:g} px)" if band in bands else ""
        rows.append((f"AP {_escaped(band)}{bounds}", _percent(value), _known(num_objects)))
    thresholds = settings.get("iou_thresholds")
    return [
        _table(("measure", "%", "objects"), rows, "lrr"),
        "COCO's average precision"
        + (f", the mean over IoU {min(thresholds):g} to {max(thresholds):g}" if thresholds else "")
        + "; a size is sqrt(area) in pixels of the original image."
        + f" Images: {_known(metrics.get('num_images'))}."
        + f" Detections that count per image and class: at most {_known(settings.get('max_detections'))}."
        + f" Kept per image: {inference.num_select}."
        + f" Input: short side {inference.short_side} px, long side at most {inference.long_side} px.",
    ]


def _size_table(sizes: SizeHistogram | None, inference: InferenceConfig) -> list[str]:
    if sizes is None:
        return [f"Sizes of the training objects: {NOT_STATED}."]
    at_input = sizes.input_counts is not None
    rows = []
    for i, count in enumerate(sizes.counts):
        bin_name = (
            f"{SIZE_EDGES_PX[i]}-{SIZE_EDGES_PX[i + 1]}" if i + 1 < len(SIZE_EDGES_PX) else f"{SIZE_EDGES_PX[i]}-"
        )
        row = [bin_name, *_share(count, sizes.counts)]
        if sizes.input_counts is not None:
            row += _share(sizes.input_counts[i], sizes.input_counts)
        rows.append(row)
    headers = ["sqrt(area), px", "objects", "share"] + (["at the network's input", "share"] if at_input else [])
    text = f"Sizes of the {sum(sizes.counts)} training objects, in pixels of the original images"
    if at_input:
        text += (
            f" and of the network's input (short side {inference.short_side}, long side at most {inference.long_side})"
        )
    return [text + ":", _table(headers, rows, "lrrrr"[: len(headers)])]


def _architecture(model: CrossDINO) -> str:
    config = model.config
    weights = config.backbone_weights
    if weights is not None and weights not in ("timm", "efficientnet-lite0"):
        weights = Path(weights).name  # the rest of a path is nobody's business
    rows = [
        ("backbone", config.backbone + (f", started from {weights}" if weights else "")),
        ("fusion of backbone and encoder", config.fusion),
        ("encoder / decoder layers", f"{config.num_encoder_layers} / {config.num_decoder_layers}"),
        ("feature levels", f"{config.num_feature_levels}, the finest of stride {config.first_stride}"),
        ("width", str(config.hidden_dim)),
        ("queries", str(config.num_queries)),
        ("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"),
        ("padding", config.padding),
    ]
    return _table(("part", "value"), [(part, _escaped(value)) for part, value in rows])


def _limits(metrics: Mapping[str, Any] | None, sizes: SizeHistogram | None) -> str:
    measured = bool(metrics) and metrics.get("ap") is not None  # type: ignore[union-attr]
    lines = [
        "Made to find objects of the classes above in pictures like those it was trained on."
        if measured
        else "Nothing is known here about how good it is: measure it on your pictures before you rely on it.",
        "Only what is named under Evaluation was measured. Other cameras, heights, seasons, places and object sizes "
        "were not, and may be much worse.",
        "Scores order the detections; they are not calibrated probabilities. Choose the threshold on your own data.",
        "Objects that are missing in the results are not proof of their absence: do not let it decide alone where "
        "people can come to harm.",
    ]
    if sizes is not None and sum(sizes.counts):
        lines.append("It has learnt from objects of the sizes in the table above; a size that is rare there is risky.")
    return "\n".join(f"- {line}" for line in lines)


def _counts(sizes: np.ndarray) -> tuple[int, ...]:
    """Objects a bin; a size on a bound belongs to the bin that begins there."""
    bins = np.searchsorted(SIZE_EDGES_PX, sizes, side="right") - 1
    return tuple(int(count) for count in np.bincount(bins, minlength=len(SIZE_EDGES_PX)))


def _share(count: int, counts: Sequence[int]) -> list[str]:
    return [str(count), f"{100 * count / max(sum(counts), 1):.1f} %"]


def _band(values: Any) -> tuple[float | None, int | None]:
    """AP and the number of objects of a size band, of which a summary keeps the AP only."""
    return (values.get("ap"), values.get("num_objects")) if isinstance(values, Mapping) else (values, None)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _known(value: Any) -> str:
    return NOT_STATED if value is None else str(value)


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], alignment: str = "") -> str:
    """A Markdown table of cells that are escaped already."""
    marks = ["---:" if mark == "r" else "---" for mark in alignment.ljust(len(headers), "l")]
    return "\n".join("| " + " | ".join(row) + " |" for row in (headers, marks, *rows))


def _escaped(value: Any) -> str:
    """One line of plain text that Markdown shows as it is, in a table too."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", " ".join(str(value).split()))
