"""The benchmarks' own metrics by name: one door, for everyone who has a file of detections.

`evaluate_detections` measures what the user chooses; here everything is fixed, to the digits of the original toolkits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from crossdino.errors import InputError
from crossdino.evaluation.coco_protocols import COCO_PROTOCOLS, evaluate_coco_protocol
from crossdino.evaluation.protocol_result import ProtocolResult

PROTOCOLS = (*COCO_PROTOCOLS, "widerperson", "visdrone-official")
"""Their names: the five benchmarks, and the metric of the VisDrone challenge."""


def evaluate_protocol(
    name: str,
    ground_truth: Mapping[str, Any] | Path | str,
    predictions: Sequence[Mapping[str, Any]] | Path | str,
    *,
    patches: Mapping[str, Any] | Path | str | None = None,
) -> ProtocolResult:
    """Measure detections by the protocol of a benchmark (Section IV-A of the paper; the rules: docs/protocols.md).

    Args:
        name: one of `PROTOCOLS`.
        ground_truth: COCO JSON, as a file or as the dictionary, such as `crossdino prepare` makes it. For `sodad` that
            of the original images.
        predictions: COCO results, as a file or as the list: `image_id`, `category_id`, `bbox` (x, y, width, height in
            pixels), `score`. An empty list is an AP of 0.
        patches: only for `sodad`: the annotation file of the patches or its content, if the detections are of patches;
            they are merged first.

    Returns:
        The toolkit's numbers under its names, as fractions of 1; NaN where one is not defined.

    Raises:
        InputError: there is no such protocol, a file cannot be read or is not of the format, or an entry is broken or
            refers to something unknown.
    """
    if name not in PROTOCOLS:
        raise InputError(f"there is no protocol {name!r}: choose one of {', '.join(PROTOCOLS)}")
    if patches is not None and name != "sodad":
        raise InputError(f"patches belong to the protocol sodad, not to {name}: leave them out")
    if name in COCO_PROTOCOLS:
        return evaluate_coco_protocol(name, ground_truth, predictions, patches)
    if name == "widerperson":
        from crossdino.evaluation.miss_rate import evaluate_widerperson

        return evaluate_widerperson(ground_truth, predictions)
    from crossdino.evaluation.visdrone_official import evaluate_visdrone_official

    return evaluate_visdrone_official(ground_truth, predictions)
