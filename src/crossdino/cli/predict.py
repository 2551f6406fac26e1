"""`crossdino predict`: images, folders, rasters, videos and cameras in; pictures and tables of detections out."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdino.cli.output import choose_device, log_lines, make_console, num_cores, report_mistake
from crossdino.cli.values import DTYPES, batch_size, positive
from crossdino.errors import InputError
from crossdino.interrupts import stop_requests

if TYPE_CHECKING:
    from rich.console import Console

    from crossdino.prediction_job import RunSummary, Work
    from crossdino.prediction_work import Event, WorkSettings
    from crossdino.sources import ReadOptions, Source

# Names of pictures that are told one by one; of more only the number.
_MOST_NAMES = 3
# Between two lines about a large picture where there is no terminal.
_LINE_SECONDS = 10.0


def add_predict_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command, but those that others share."""
    parser.add_argument(
        "images", nargs="+", metavar="INPUT", help="images, folders, glob patterns, videos, or the number of a camera"
    )
    parser.add_argument("--weights", metavar="MODEL", required=True, help="model folder or hub id")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the results")
    parser.add_argument(
        "--threshold",
        default="0.3",
        help="lowest score (0.3); auto: scores are calibrated and held against thresholds by class and size",
    )
    parser.add_argument(
        "--format",
        metavar="NAME,...",
        default="coco",
        help="coco, coco-results, csv, geojson, parquet, yolo (coco); predictions.jsonl is written in any case",
    )
    parser.add_argument("--json", metavar="NAME", default="predictions.json", help="COCO file name (predictions.json)")
    parser.add_argument(
        "--image-ids", metavar="JSON", help="COCO annotations whose image ids the COCO files take, for `evaluate`"
    )
    parser.add_argument("--no-pictures", action="store_true", help="draw no annotated images and videos")
    parser.add_argument("--overwrite", action="store_true", help="begin anew instead of continuing the run in --output")
    parser.add_argument("--recursive", action="store_true", help="also look into the folders of folders")
    parser.add_argument("--bands", metavar="R,G,B", help="bands of a raster to look at, counted from 1")
    parser.add_argument(
        "--value-range", metavar="LOW,HIGH", help="a raster's values of black and white, or auto (2 to 98 percentile)"
    )
    parser.add_argument("--every-frame", metavar="N", type=positive, default=1, help="of a video, every N-th frame (1)")
    parser.add_argument(
        "--max-frames", metavar="N", type=positive, help="of a video or camera, only the first N frames"
    )
    parser.add_argument(
        *("--batch-size", "--batch"),
        metavar="N",
        type=batch_size,
        default="auto",
        help="tiles or images per forward pass; auto: what fits, at most 16 on a GPU and 4 elsewhere (auto)",
    )
    parser.add_argument(
        *("--dtype", "--precision"),
        choices=DTYPES,
        default="auto",
        metavar="NAME",
        help="in what the network computes: float32, bfloat16 (bf16), float16 (fp16); auto is float32 (auto)",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the network first, which pays for many images (torch.compile)"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU where there is one)")
    parser.add_argument("--devices", metavar="A,B,...", help="a process on each of these, e.g. cuda:0,cuda:1")
    parser.add_argument("--processes", metavar="N", type=positive, help="so many processes on --device")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: local, auto, or host:port")
    parser.add_argument("--workers", metavar="N", type=positive, help="with --ray: how many models are at work")


def run_predict(options: argparse.Namespace) -> int:
    """Detect, draw and write; a source that cannot be read is told and left out."""
    from crossdino.prediction_job import predict_sources
    from crossdino.prediction_work import WorkSettings
    from crossdino.sources import find_sources

    console = make_console()
    sources, missing = find_sources(options.images, recursive=options.recursive)
    formats = [name for name in options.format.split(",") if name and name != "none"]
    devices = _devices(options)
    if options.ray is not None and not options.no_pictures:
        console.print("no pictures are drawn on a cluster", soft_wrap=True)
    settings = WorkSettings(
        weights=_local_model(options.weights),
        predictor={
            "threshold": _threshold(options.threshold),
            "num_select": options.num_select,
            "short_side": options.short_side,
            "long_side": options.long_side,
            "tile_size": options.tile_size,
            "tile_overlap": options.tile_overlap,
            "merge": options.merge,
            "merge_iou": options.merge_iou,
            "full_image": options.full_image,
            "batch_size": options.batch_size,
            "dtype": options.dtype,
            "compile": options.compile,
        },
        reading=_reading(options),
        output=Path(options.output),
        draw=not options.no_pictures and options.ray is None,
        most_frames=options.max_frames,
        devices=devices,
        num_threads=_threads_each(devices),
    )
    notice = "crossdino: stopping after what is at work; once more to end at once"
    with (
        stop_requests(notice) as stop,
        _Progress(console, sources, settings) as progress,
        log_lines(console),
    ):
        summary = predict_sources(
            sources,
            settings,
            formats=formats,
            coco_name=options.json,
            annotations=None if options.image_ids is None else Path(options.image_ids),
            overwrite=options.overwrite,
            work=_work_on_ray(options),
            stop=stop,
            on_begin=progress.begin,
            on_event=progress.take,
            on_progress=progress.show_tiles,
        )
    _report(console, summary, settings)
    for failure in (*missing, *summary.failures):
        report_mistake(failure)
    if summary.stopped:
        console.print("stopped; the same command goes on where it was", soft_wrap=True)
        return 130
    return 2 if missing or summary.failures else 0


def _local_model(name: str) -> str:
    """The model's folder; what other processes shall load is fetched once."""
    from crossdino.checkpoints import find_model

    return str(find_model(name))


def _threshold(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--threshold {text} is no number; give a score from 0 to 1, or auto") from None


def _reading(options: argparse.Namespace) -> ReadOptions:
    from crossdino.sources import ReadOptions

    def numbers(text: str, what: str, kind: type[int] | type[float]) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise InputError(f"{what} {text}: give numbers with commas between them") from None

    given: dict[str, Any] = {"every_frame": options.every_frame}
    if options.bands is not None:
        given["bands"] = numbers(options.bands, "--bands", int)
    if options.value_range is not None:
        auto = options.value_range == "auto"
        given["value_range"] = "auto" if auto else numbers(options.value_range, "--value-range", float)
    return ReadOptions(**given)


def _devices(options: argparse.Namespace) -> list[str]:
    """One device for each process."""
    if options.devices is not None and (options.device is not None or options.processes is not None):
        raise InputError("--devices says how many processes there are and where: leave out --device and --processes")
    if options.devices is not None:
        names = options.devices.split(",")
        if not all(names):
            raise InputError(f"--devices {options.devices}: leave no name empty")
        return [choose_device(name) for name in names]
    return [choose_device(options.device)] * (options.processes or 1)


def _work_on_ray(options: argparse.Namespace) -> Work | None:
    """What does the work on a cluster; None without one."""
    if options.ray is None:
        if options.workers is not None:
            raise InputError("--workers goes with --ray; processes on this machine are --processes")
        return None
    if options.device is not None or options.devices is not None or options.processes is not None:
        raise InputError("--ray decides where models run: leave out --device, --devices and --processes")
    from functools import partial

    from crossdino.cluster import RayOptions, work_on_ray

    return partial(work_on_ray, options=RayOptions(options.ray, options.workers or 0))


def _threads_each(devices: list[str]) -> int:
    """Threads for each of several processes, so that they do not fight for the cores; 0: as it is."""
    return max(1, num_cores() // len(devices)) if len(devices) > 1 else 0


class _Progress:
    """A bar of the sources, and bars of large pictures and videos, on a terminal; lines from time to time elsewhere."""

    def __init__(self, console: Console, sources: list[Source], settings: WorkSettings) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        terminal = console.is_terminal
        self._console = console
        self._bars = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not terminal)
        self._sources = {source.name: source for source in sources}
        self._settings = settings
        self._all = self._bars.add_task("detecting", total=None, start=False)
        self._parts: dict[str, Any] = {}  # name of the source -> its bar
        self._counts: dict[str, tuple[int, int]] = {}  # name of the video -> frames and objects
        self._last_line = time.monotonic()

    def __enter__(self) -> _Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def begin(self, num_before: int) -> None:
        """The run begins, or goes on."""
        if num_before:
            self._print(f"{num_before} of {len(self._sources)} done before (--overwrite begins anew)")
        self._bars.update(self._all, total=len(self._sources) - num_before)
        self._bars.start_task(self._all)

    def take(self, event: Event) -> None:
        """Something is done."""
        from crossdino.prediction_work import Failed, Found

        name = event.result.file_name if isinstance(event, Found) else event.source.name
        if isinstance(event, Found) and event.result.frame is not None:
            frames, objects = self._counts.get(name, (0, 0))
            self._counts[name] = frames + 1, objects + len(event.result)
            if name not in self._parts:
                self._parts[name] = self._bars.add_task(name, total=self._num_frames(name))
            done = event.result.frame // self._settings.reading.every_frame + 1
            self._show(name, done, f"{event.result.key}: {_counted(len(event.result), 'object')}")
            return
        if name in self._parts:
            self._bars.remove_task(self._parts.pop(name))
        self._bars.advance(self._all)
        frames, objects = self._counts.pop(name, (0, 0))
        if isinstance(event, Found):
            self._print(f"{name}: {_counted(len(event.result), 'object')}")
        elif frames:
            self._print(f"{name}: {_counted(objects, 'object')} in {_counted(frames, 'frame')}")
        if isinstance(event, Failed):
            self._print(f"{event.message} (left out)" if not frames else event.message)

    def show_tiles(self, name: str, done: int, total: int) -> None:
        """So many tiles of a large picture are done."""
        if name not in self._parts:
            self._parts[name] = self._bars.add_task(name, total=total)
        self._show(name, done, f"{name}: tile {done} of {total}")

    def _num_frames(self, name: str) -> int | None:
        """About how many frames of a video will be looked at."""
        from crossdino.sources import read_video_info

        source, most = self._sources[name], self._settings.most_frames
        num_frames = None if source.kind == "camera" or self._bars.disable else read_video_info(source).num_frames
        counts = [count for count in (num_frames, most) if count is not None]
        return -(-min(counts) // self._settings.reading.every_frame) if counts else None

    def _show(self, name: str, done: int, line: str) -> None:
        self._bars.update(self._parts[name], completed=done)
        if self._bars.disable and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(" ".join(line.split()), soft_wrap=True, markup=False)  # a file's name may have line breaks


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _report(console: Console, summary: RunSummary, settings: WorkSettings) -> None:
    """The end of a run: what was found, and where it is."""
    from rich.table import Column, Table
    from rich.text import Text

    from crossdino.results import journal_path

    if summary.capped and settings.predictor["threshold"] != 0:
        names = ", ".join(summary.capped[:_MOST_NAMES])
        more = f" and {len(summary.capped) - _MOST_NAMES} more" if len(summary.capped) > _MOST_NAMES else ""
        console.print(
            f"warning: all places for detections are filled in {names}{more}: there may be more objects; raise "
            "--num-select, cut smaller tiles (--tile-size), or train with more queries",
            soft_wrap=True,
            markup=False,
        )
    if not summary.num_pictures:
        return
    if len(summary.objects_by_class) > 1:
        table = Table("class", Column("objects", justify="right"))
        for name, count in sorted(summary.objects_by_class.items(), key=lambda item: -item[1]):
            table.add_row(Text(name), str(count))
        console.print(table)
    threshold = settings.predictor["threshold"]
    bound = "above their thresholds" if threshold == "auto" else f"with a score of at least {threshold:g}"
    files = ", ".join(str(path) for path in summary.files) or str(journal_path(settings.output))
    beside = ", pictures beside it" if settings.draw else ""
    objects, pictures = _counted(summary.num_objects, "object"), _counted(summary.num_pictures, "picture")
    console.print(f"{objects} {bound} in {pictures}: {files}{beside}", soft_wrap=True, markup=False)
