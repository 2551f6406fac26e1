"""How long `evaluate_protocol` takes from files, and against pycocotools.

    python -m benchmarks.evaluation [--images 5000] [--objects 100] [--detections 300] [--share 0.1] [--repeats 3]
        [--quick] [--csv FILE]
    python -m benchmarks.evaluation --compare 1000    # only `crossdino compare`, with so many resamples

Made-up images full of small objects, and detections that are jittered objects or noise. First everything, end to end:
reading both JSON files, checking them, matching, accumulating (and oLRP). Then a share of the images, ours and
pycocotools (with the protocol's ranges and caps; it has no oLRP) by turns; the ratio is that of the medians. Times are
those of the processor, so that others on the machine disturb little. Every step has a process of its own, for its peak
of memory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.interleaved import Report
from crossdino.benchmarks import BENCHMARKS
from crossdino.evaluation import evaluate_protocol
from crossdino.evaluation.comparison import compare_detections

T = TypeVar("T")
PROTOCOLS = (("coco", 80), ("aitod", 8), ("aitod", 1))
# Times pycocotools' speed.
TARGET = 10.0


def write_data(folder: Path, num_images: int, num_objects: int, num_detections: int, num_classes: int) -> None:
    """`truth.json` and `found.json` with seeded numbers."""
    rng = np.random.default_rng(0)
    annotations, found = [], []
    for image_id in range(1, num_images + 1):
        sides = np.exp(rng.normal(np.log(14), 0.6, (num_objects, 2)))
        boxes = np.hstack((rng.uniform(0, 780, (num_objects, 2)), sides)).round(2)
        labels = rng.integers(1, num_classes + 1, num_objects)
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
        seen = rng.integers(0, num_objects, num_detections)
        noise = rng.random(num_detections) < 0.3
        guesses = boxes[seen] + rng.normal(0, 0.1, (num_detections, 4)) * np.tile(boxes[seen, 2:], 2)
        guesses[noise, :2] = rng.uniform(0, 780, (np.count_nonzero(noise), 2))
        guesses[:, 2:] = abs(guesses[:, 2:])
        scores = rng.random(num_detections)
        for box, label, score in zip(guesses.round(3).tolist(), labels[seen].tolist(), scores.tolist(), strict=True):
            found.append({"image_id": image_id, "category_id": label, "bbox": box, "score": score})
    truth = {
        "images": [{"id": number, "width": 800, "height": 800} for number in range(1, num_images + 1)],
        "annotations": annotations,
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, num_classes + 1)],
    }
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "found.json").write_text(json.dumps(found))


def ours(folder: Path, name: str) -> float:
    return evaluate_protocol(name, folder / "truth.json", folder / "found.json").metrics["AP"]


def theirs(folder: Path, name: str) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "truth.json"))
        evaluator = COCOeval(truth, truth.loadRes(str(folder / "found.json")), "bbox")
        bands = BENCHMARKS[name].size_bands
        evaluator.params.areaRng = [[0, 1e10], *map(list, bands.values())]
        evaluator.params.areaRngLbl = ["all", *bands]
        evaluator.params.maxDets = list(BENCHMARKS[name].max_detections)
        evaluator.evaluate()
        evaluator.accumulate()
    precision = evaluator.eval["precision"][..., 0, -1]
    return float(precision[precision > -1].mean())


def compared(folder: Path, num_resamples: int) -> tuple[float, float]:
    """Time on the clock with two processes, and the peak of memory of the main one in GB."""
    found = json.loads((folder / "found.json").read_text())
    rng = np.random.default_rng(1)
    for one in found:
        one["bbox"][0] += float(rng.normal(0, 0.3))
    (folder / "other.json").write_text(json.dumps(found))
    del found
    clock = time.perf_counter()
    files = [folder / "found.json", folder / "other.json"]
    compare_detections(folder / "truth.json", files, protocol="aitod", num_resamples=num_resamples, num_processes=2)
    return time.perf_counter() - clock, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def in_a_process(work: Callable[..., T], *arguments: object) -> T:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def whole(folder: Path, name: str) -> tuple[float, float, float]:
    """Processor time, time on the clock, and the peak of memory in GB (Linux counts in kilobytes)."""
    spent, clock, _ = seconds(ours, folder, name)
    return spent, clock, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def seconds(measure: Callable[[Path, str], float], folder: Path, name: str) -> tuple[float, float, float]:
    """Processor time, time on the clock, and the AP."""
    start, clock = time.process_time(), time.perf_counter()
    ap = measure(folder, name)
    return time.process_time() - start, time.perf_counter() - clock, ap


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Speed of `evaluate_protocol` against pycocotools.")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--objects", type=int, default=100, help="per image")
    parser.add_argument("--detections", type=int, default=300, help="per image")
    parser.add_argument("--share", type=float, default=0.1, help="of the images, for the comparison with pycocotools")
    parser.add_argument("--repeats", type=int, default=3, help="of the comparison")
    parser.add_argument("--compare", type=int, metavar="RESAMPLES", help="time the comparison of two files instead")
    parser.add_argument("--quick", action="store_true", help="few images, once: the numbers mean nothing")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table there, too")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.share, options.repeats = 10, 1.0, 1
    from benchmarks.machine import describe  # here: torch must not be in the memory of the measured processes

    report = Report(describe(), options.csv)
    size = f"{options.images} images x {options.objects} objects x {options.detections} detections"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if options.compare:
            in_a_process(write_data, folder, options.images, options.objects, options.detections, 8)
            clock, peak = in_a_process(compared, folder, options.compare)
            row = {"resamples": options.compare, "classes": 8, "processes": 2, "clock (s)": clock, "peak (GB)": peak}
            report.table(f"comparison of two files, {size}", [row])
            return
        rows = [protocol_row(folder, name, num_classes, options) for name, num_classes in PROTOCOLS]
    note = f"clock and peak: all images, from files; s: processor time for {options.share:g} of them, by turns"
    report.table(f"AP evaluation, {size}", rows, note)


def protocol_row(folder: Path, name: str, num_classes: int, options: argparse.Namespace) -> dict[str, object]:
    """All images with ours, then a share of them with both."""
    in_a_process(write_data, folder, options.images, options.objects, options.detections, num_classes)
    spent, clock, peak = in_a_process(whole, folder, name)
    share = max(1, round(options.share * options.images))
    write_data(folder, share, options.objects, options.detections, num_classes)
    runs = [(seconds(ours, folder, name), seconds(theirs, folder, name)) for _ in range(options.repeats)]
    own, other = (statistics.median(run[side][0] for run in runs) for side in (0, 1))
    return {
        "protocol": name,
        "classes": num_classes,
        "all images, processor (s)": spent,
        "clock (s)": clock,
        "peak (GB)": peak,
        "ours (s)": own,
        "pycocotools (s)": other,
        "times faster": other / own,
        "target": TARGET,
        "reached": None if options.quick else other / own >= TARGET,
        "difference of AP": abs(runs[0][0][2] - runs[0][1][2]),
    }


if __name__ == "__main__":
    main()
