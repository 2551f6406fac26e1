"""Is one detector better than another, or was it the choice of test images? A paired bootstrap over images.

The images are drawn with replacement, the same ones for both files of detections; the spread of the numbers over the
resamples tells how much they would change with other test images of the same kind. It does not tell how much they would
change with another training (seed, order of the data): for that, train several times.

Intervals are percentile intervals. The p-value is that of the bootstrap, two-sided: twice the share of the resamples in
which the difference has the rarer sign or is zero, counting the observed data as one more resample (A. C. Davison and
D. V. Hinkley, Bootstrap Methods and their Application, 1997, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crossdino.errors import InputError
from crossdino.evaluation.accumulation import COCO_IOU_THRESHOLDS
from crossdino.evaluation.average_precision import COCO_SIZE_BANDS
from crossdino.evaluation.bootstrap import ClassInBand, resample_classes
from crossdino.evaluation.coco_input import Found, Truth, read_truth
from crossdino.evaluation.match_table import match_table, outside_band
from crossdino.evaluation.measures import (
    COMPARABLE,
    LOWER_IS_BETTER,
    PERSON_PROTOCOL,
    Plan,
    plan_of_bands,
    plan_of_protocol,
)
from crossdino.evaluation.person_bootstrap import resample_persons
from crossdino.evaluation.person_judgement import MATCH_IOU, JudgedPersons
from crossdino.evaluation.protocol_truth import truth_of_protocol
from crossdino.evaluation.sodad import read_detections

GroundTruth = Mapping[str, Any] | Path | str
Predictions = Sequence[Mapping[str, Any]] | Path | str
Floats = NDArray[np.float64]

_FEW_IMAGES = 20
_WORTH_PROCESSES = 1e10


@dataclass(frozen=True)
class Estimate:
    """A number and how far it may be trusted; a fraction of 1, NaN where it is not defined.

    Attributes:
        value: on the data as it is.
        low, high: of the interval.
        num_defined: resamples in which the number is defined (a band may have no object in some).
    """

    value: float
    low: float
    high: float
    num_defined: int


@dataclass(frozen=True)
class Difference(Estimate):
    """The second file's number less the first one's.

    Attributes:
        p_value: two-sided; how easily other test images of the same kind could have given a difference of this size if
            there was none.
        share_better: share of the resamples in which the second file is the better one.
    """

    p_value: float
    share_better: float


@dataclass(frozen=True)
class Comparison:
    """What a bootstrap over images says about one or two files of detections.

    Attributes:
        names: of the files.
        protocol: the protocol's name, None for bands and a cap of one's own.
        estimates: metric -> one estimate for each file.
        differences: metric -> second less first; empty with one file.
        num_images, num_objects: of the truth; crowds and ignored objects do not count.
        num_predictions: of each file.
        settings: what the numbers were measured under, with the number of resamples, the confidence and the seed.
        notes: one line each: what a reader must know.
        samples: metric -> (files, resamples) the numbers of all resamples.
    """

    names: tuple[str, ...]
    protocol: str | None
    estimates: dict[str, tuple[Estimate, ...]]
    differences: dict[str, Difference]
    num_images: int
    num_objects: int
    num_predictions: tuple[int, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()
    samples: dict[str, Floats] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the samples as plain JSON values: full precision, None where a number is not defined."""
        return {
            "names": list(self.names),
            "protocol": self.protocol,
            "metrics": {
                name: {
                    "lower_is_better": name in LOWER_IS_BETTER,
                    "files": [_plain(estimate) for estimate in estimates],
                    "difference": _plain(self.differences[name]) if name in self.differences else None,
                }
                for name, estimates in self.estimates.items()
            },
            "num_images": self.num_images,
            "num_objects": self.num_objects,
            "num_predictions": list(self.num_predictions),
            "settings": self.settings,
            "notes": list(self.notes),
        }


def clear_side(metric: str, difference: Difference) -> int:
    """1 if the interval says that the second file is better, -1 if it says that it is worse, 0 if it holds zero."""
    if math.isnan(difference.low) or difference.low <= 0 <= difference.high:
        return 0
    return 1 if (difference.low > 0) != (metric in LOWER_IS_BETTER) else -1


def p_text(p_value: float) -> str:
    """A p-value with three digits; it is never 0."""
    return f"{p_value:.3f}" if p_value >= 0.0005 else "<0.001"


def compare_detections(
    ground_truth: GroundTruth,
    predictions: Sequence[Predictions],
    *,
    names: Sequence[str] | None = None,
    protocol: str | None = None,
    patches: GroundTruth | None = None,
    max_detections: int = 100,
    size_bands: Mapping[str, tuple[float, float]] | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    num_processes: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Confidence intervals of the numbers of one or two files of detections, and of their difference.

    Args:
        ground_truth: COCO JSON, as a file or as the dictionary.
        predictions: one or two files of COCO results (or lists) for the same images.
        names: what to call them; None: the names of the files.
        protocol: `coco`, `aitod`, `visdrone`, `sodad` or `widerperson`; None: COCO's numbers with the cap and the
            bands below.
        patches: COCO JSON of the patches, if the detections are of SODA-D's patches and not of whole images.
        max_detections: best detections per image and class that count, without a protocol.
        size_bands: name -> bounds of sqrt(area) in pixels, without a protocol; None: COCO's three.
        num_resamples: at least 100.
        confidence: of the intervals, in (0, 1).
        seed: of the resamples; the same seed gives the same resamples, on however many processes.
        num_processes: computing at the same time. With more than one, a script must keep its calls below
            `if __name__ == "__main__":`, as always with processes.
        on_progress: called with the finished and all pieces of work.

    Returns:
        The numbers, as fractions of 1.

    Raises:
        InputError: a file cannot be read, is not of the format or refers to images that the truth lacks, or a setting
            makes no sense.
    """
    if not 1 <= len(predictions) <= 2:
        raise InputError(f"{len(predictions)} files of detections are given: give one, or two to compare")
    names = _names(predictions, names)
    if isinstance(num_resamples, bool) or not isinstance(num_resamples, int) or num_resamples < 100:
        raise InputError(f"num_resamples is {num_resamples!r}: give a whole number of at least 100, better 1000")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence!r}: give a number between 0 and 1, such as 0.95")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}: give a whole number of 0 or more")
    if protocol is not None and protocol not in COMPARABLE:
        raise InputError(f"protocol {protocol!r} cannot be resampled by images: choose one of {', '.join(COMPARABLE)}")
    if patches is not None and protocol != "sodad":
        raise InputError("patches are merged by the protocol sodad only: give protocol sodad, or leave patches out")
    drawing = {"resamples": num_resamples, "confidence": confidence, "seed": seed}
    if protocol == PERSON_PROTOCOL:
        samples, judged, left_out = resample_persons(ground_truth, predictions, num_resamples, seed, on_progress)
        return _conclude(
            samples,
            names=names,
            protocol=protocol,
            num_images=judged[0].num_images,
            num_objects=len(judged[0].object_images),
            num_predictions=tuple(persons.num_predictions for persons in judged),
            settings={"iou_threshold": MATCH_IOU, **drawing},
            identical=len(judged) == 2 and _same(*judged),
            notes=[f"{left_out} images without any annotation are left out, as IterDet does"] if left_out else [],
        )
    truth = read_truth(ground_truth)
    plan = plan_of_protocol(protocol) if protocol else plan_of_bands(size_bands or COCO_SIZE_BANDS, max_detections)
    truth, notes = truth_of_protocol(protocol or "coco", truth)
    found = [read_detections(source, truth, patches)[0] for source in predictions]
    samples = _resample(truth, found, plan, num_resamples, seed, num_processes, on_progress)
    settings = {
        "max_detections": plan.most if protocol is None else sorted({measure.cap for measure in plan.measures}),
        "size_bands_px2": {name: list(bounds) for name, bounds in plan.bands.items() if name},
        "iou_thresholds": COCO_IOU_THRESHOLDS.tolist(),
    }
    return _conclude(
        samples,
        names=names,
        protocol=protocol,
        num_images=len(truth.image_ids),
        num_objects=int(np.count_nonzero(~(truth.is_crowd | truth.is_ignored))),
        num_predictions=tuple(map(len, found)),
        settings=settings | drawing,
        identical=len(found) == 2 and _same(*found),
        notes=notes,
    )


def _names(predictions: Sequence[Predictions], names: Sequence[str] | None) -> tuple[str, ...]:
    """The given names, or those of the files, as short as they can be told apart."""
    if names is not None:
        if len(names) != len(predictions):
            raise InputError(f"{len(names)} names for {len(predictions)} files of detections: give one for each")
        if len(set(names)) < len(names):
            raise InputError(f"both files are called {names[0]!r}: give them different names")
        return tuple(names)
    paths = [Path(source) for source in predictions if isinstance(source, (str, Path))]
    if len(paths) == len(predictions):
        return names_of_files(paths)
    return ("detections",) if len(predictions) == 1 else ("A", "B")


def names_of_files(paths: Sequence[Path]) -> tuple[str, ...]:
    """What to call one or two files: as short as they can be told apart; A and B where they cannot."""
    for shown in ([path.stem for path in paths], [f"{path.parent.name}/{path.stem}" for path in paths]):
        if len(set(shown)) == len(paths):
            return tuple(shown)
    return ("A", "B")


def _same(first: Found | JudgedPersons, second: Found | JudgedPersons) -> bool:
    """Whether two files hold the same detections, as far as they are known here."""
    return all(np.array_equal(value, vars(second)[name]) for name, value in vars(first).items())


def _resample(
    truth: Truth,
    found: Sequence[Found],
    plan: Plan,
    num_resamples: int,
    seed: int,
    num_processes: int,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, Floats]:
    """Metric -> (files, 1 + B), the data set itself first."""
    bands = list(plan.bands)
    ranges = np.array([plan.bands[name] for name in bands])
    asked = ~outside_band(truth, ranges)
    items: list[ClassInBand] = []
    keys: list[tuple[int, int]] = []
    for file, detections in enumerate(found):
        table = match_table(detections, truth, COCO_IOU_THRESHOLDS, ranges, plan.most)
        for label in range(len(truth.category_ids)):
            members = table.of_class(label)
            for band, name in enumerate(bands):
                objects = truth.images[asked[:, band] & (truth.labels == label)]
                if not len(objects):
                    continue  # no resample has any either
                mine = [measure for measure in plan.measures if measure.band == name]
                item = ClassInBand(
                    images=table.images[members],
                    scores=table.scores[members],
                    ranks=table.ranks[members],
                    outcomes=table.outcomes_of(members, band),
                    object_images=objects,
                    cap=next(measure.cap for measure in mine if measure.kind == "precision"),
                    recall_caps=tuple(measure.cap for measure in mine if measure.kind == "recall"),
                )
                items.append(item)
                keys.append((file, band))
    total = len(items)
    # Starting processes takes seconds.
    work = sum(len(item.images) for item in items) * len(COCO_IOU_THRESHOLDS) * num_resamples
    results = resample_classes(
        items,
        len(truth.image_ids),
        num_resamples,
        seed,
        num_processes=num_processes if work > _WORTH_PROCESSES else 1,
        on_progress=lambda done: on_progress(done, total) if on_progress is not None else None,
    )
    samples: dict[str, Floats] = {}
    for measure in plan.measures:
        chosen = slice(None) if measure.iou is None else np.isclose(COCO_IOU_THRESHOLDS, measure.iou)
        band = bands.index(measure.band)
        samples[measure.name] = np.stack(
            [
                _mean_over_classes(
                    [
                        precision[chosen]
                        if measure.kind == "precision"
                        else recall[items[place].recall_caps.index(measure.cap)][chosen]
                        for place, (precision, recall) in enumerate(results)
                        if keys[place] == (file, band)
                    ],
                    1 + num_resamples,
                )
                for file in range(len(found))
            ]
        )
    return samples


def _mean_over_classes(values: Sequence[Floats], num_samples: int) -> Floats:
    """(B,) mean over the thresholds and over the classes that have objects in a resample; NaN where none has."""
    if not values:
        return np.full(num_samples, math.nan)
    stacked = np.stack(values)
    defined = ~np.isnan(stacked)
    count = defined.sum(axis=(0, 1))
    total = np.where(defined, stacked, 0.0).sum(axis=(0, 1))
    return np.divide(total, count, out=np.full(num_samples, math.nan), where=count > 0)


def _conclude(
    samples: Mapping[str, Floats],
    *,
    names: tuple[str, ...],
    protocol: str | None,
    num_images: int,
    num_objects: int,
    num_predictions: tuple[int, ...],
    settings: dict[str, Any],
    identical: bool,
    notes: Sequence[str] = (),
) -> Comparison:
    """Intervals and p-values of (files, 1 + B) numbers."""
    confidence, num_resamples = settings["confidence"], settings["resamples"]
    estimates = {
        name: tuple(Estimate(*_interval(row, confidence)) for row in values) for name, values in samples.items()
    }
    differences = {}
    for name, values in samples.items():
        if len(values) == 2:
            difference = values[1] - values[0]
            drawn = difference[1:][~np.isnan(difference[1:])]
            better = drawn < 0 if name in LOWER_IS_BETTER else drawn > 0
            rarer = min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
            differences[name] = Difference(
                *_interval(difference, confidence),
                p_value=min(1.0, float(2 * (1 + rarer) / (1 + len(drawn)))) if len(drawn) else math.nan,
                share_better=float(better.mean()) if len(drawn) else math.nan,
            )
    lines = list(notes)
    if identical:
        lines.append("the two files hold the same detections: there is nothing to compare; is one the wrong file?")
    if num_images == 1:
        lines.append("one image only: every resample is that image, the intervals say nothing")
    elif num_images < _FEW_IMAGES:
        lines.append(
            f"{num_images} images are few for a bootstrap: the intervals are rough and too narrow; give 100 or more"
        )
    for name, of_files in estimates.items():
        missing = max(num_resamples - estimate.num_defined for estimate in of_files)
        if 0 < missing < num_resamples:
            lines.append(
                f"{name} is not defined in {missing} of {num_resamples} resamples, which have no such object; they are "
                "left out"
            )
    return Comparison(
        names=names,
        protocol=protocol,
        estimates=estimates,
        differences=differences,
        num_images=num_images,
        num_objects=num_objects,
        num_predictions=num_predictions,
        settings=settings,
        notes=tuple(lines),
        samples={name: values[:, 1:] for name, values in samples.items()},
    )


def _interval(values: Floats, confidence: float) -> tuple[float, float, float, int]:
    """Value, bounds of the percentile interval and number of resamples in which it is defined."""
    drawn = values[1:][~np.isnan(values[1:])]
    if not len(drawn):
        return float(values[0]), math.nan, math.nan, 0
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(values[0]), float(low), float(high), len(drawn)


def _plain(estimate: Estimate) -> dict[str, float | int | None]:
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in vars(estimate).items()
    }
