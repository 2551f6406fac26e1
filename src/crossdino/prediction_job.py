"""A prediction run: many sources, one journal, resumable at any point.

Whatever is found goes into the journal first; all other files are made of it. A run that was stopped - by Ctrl-C, by
`kill -9`, by a full disk - is continued by the same command; settings that would change detections are refused then.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from crossdino.checkpoints import read_model_config
from crossdino.errors import InputError
from crossdino.prediction_drawing import drawn_name
from crossdino.prediction_network import SHORT_NAMES, choose_dtype
from crossdino.prediction_processes import work_in_processes
from crossdino.prediction_work import (
    UNFINISHED,
    Event,
    Failed,
    Found,
    OnProgress,
    StopEvent,
    Stopped,
    Task,
    WorkSettings,
    work_here,
)
from crossdino.results import (
    Journal,
    JournalHeader,
    JournalIndex,
    check_formats,
    file_stamp,
    growing_outputs,
    is_bare,
    journal_path,
    output_stems,
    read_image_ids,
    refuse_overwriting,
    write_outputs,
)
from crossdino.sources import Source, require_readable

Work = Callable[[Sequence[Task], WorkSettings, StopEvent, OnProgress | None], Iterator[Event]]


@dataclass
class RunSummary:
    """What a run has done.

    Attributes:
        num_pictures, num_objects: of the sources that were named, earlier parts of the run included.
        num_before: sources that were done before.
        failures: a message for each source that could not be read (any further).
        capped: names of the pictures of this part of the run that filled all `num_select` places.
        objects_by_class: class name -> number of objects.
        stopped: the run was ended before it had done everything.
        files: of the whole run, that were written.
    """

    num_pictures: int = 0
    num_objects: int = 0
    num_before: int = 0
    failures: list[str] = field(default_factory=list)
    capped: list[str] = field(default_factory=list)
    objects_by_class: dict[str, int] = field(default_factory=dict)
    stopped: bool = False
    files: list[Path] = field(default_factory=list)


def predict_sources(
    sources: Sequence[Source],
    settings: WorkSettings,
    *,
    formats: Sequence[str] = ("coco",),
    coco_name: str = "predictions.json",
    annotations: Path | None = None,
    overwrite: bool = False,
    work: Work | None = None,
    stop: StopEvent | None = None,
    on_begin: Callable[[int], None] | None = None,
    on_event: Callable[[Event], None] | None = None,
    on_progress: OnProgress | None = None,
) -> RunSummary:
    """Detect in all sources and write what is found into the output folder, or continue to do so.

    Args:
        sources: what to look at.
        settings: model, reading, output folder and processes.
        formats: of `crossdino.results.FORMATS`, besides the journal.
        coco_name: file name of the COCO file.
        annotations: COCO file whose image ids are used in the COCO files that are written; None: pictures are counted.
        overwrite: begin anew where there is a run already.
        work: does the tasks elsewhere (`crossdino.cluster.work_on_ray`); None: here, in the processes of `settings`.
        stop: once it is set, what is at work is left and the files are written as far as they go.
        on_begin: is called with the number of sources that were done before.
        on_event: is called with everything that happens, once it is in the journal.
        on_progress: is called within large pictures with the picture's name, the tiles that are done, and all.

    Returns:
        What was done.

    Raises:
        InputError: nothing can be written, the folder holds a run with other settings, or the model cannot be loaded.
    """
    stop = threading.Event() if stop is None else stop
    files = check_formats(formats, coco_name)
    require_readable(settings.reading)
    image_ids = None if annotations is None else read_image_ids(annotations, sources)
    output = settings.output
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; name a folder")
    if settings.predictor.get("batch_size") == "auto" and any(source.kind == "camera" for source in sources):
        # A frame shall not wait for the next ones.
        settings = dataclasses.replace(settings, predictor={**settings.predictor, "batch_size": 1})
    # The model is loaded in any case, for its names and for what tells it from others; but not where others need room.
    here = work is None and len(settings.devices) == 1
    predictor = settings.make_predictor(settings.devices[0]) if here else settings.make_planner()
    class_names = [str(name) for name in predictor.class_names]
    category_ids = read_model_config(settings.weights).get("category_ids") or list(range(1, len(class_names) + 1))
    made_with = {**predictor.settings(), **dataclasses.asdict(settings.reading), "most_frames": settings.most_frames}
    if not here:
        made_with["precision"] = SHORT_NAMES[
            choose_dtype(settings.dtype, settings.devices[0] if work is None else "cuda")
        ]
    header = JournalHeader({**made_with, "pictures": settings.draw}, class_names, category_ids)
    path = journal_path(output)
    summary = RunSummary(files=[output / name for name in files])
    names = [source.name for source in sources]
    inputs = [source.path for source in sources if source.kind != "camera"]
    refuse_overwriting([path, *summary.files], inputs)
    unfinished = (output / UNFINISHED).is_dir()
    # A run that failed before it had found anything binds nobody to its settings.
    overwrite = overwrite or (path.is_file() and is_bare(path) and not unfinished)
    before = JournalIndex([path], header) if path.is_file() and not overwrite else None
    stems = output_stems(names, before.stems if before is not None else None)
    if settings.draw:
        refuse_overwriting((output / drawn_name(source, stems[source.name]) for source in sources), inputs)
    tasks = []
    for source in sources:
        stamp = file_stamp(source.path) if source.kind != "camera" else None
        if before is not None and before.is_done(source.name, stamp):
            summary.num_before += 1
            continue
        last = before.last_frame(source.name, stamp) if before is not None and source.kind == "video" else None
        tasks.append(Task(source, stems[source.name], 0 if last is None else last + 1))

    with ExitStack() as stack:
        journal = stack.enter_context(Journal(path, header, overwrite=overwrite))
        if before is None:  # nobody knows what those were made with
            for file in (output / UNFINISHED).glob("*.tiles"):
                file.unlink()
        done = before.read(names) if before is not None else ()
        grow = stack.enter_context(growing_outputs(output, formats, header, done))

        def take(event: Event) -> None:
            if isinstance(event, Found):
                journal.add(event.result, event.stamp)
                grow(event.result)
                if event.result.capped:
                    summary.capped.append(event.result.key)
            elif isinstance(event, Failed):
                journal.add_failure(event.source.name, event.message, event.stamp, frame=event.frame)
                summary.failures.append(event.message)
            else:
                journal.add_end(event.source.name, event.stamp)
            if on_event is not None:
                on_event(event)

        if on_begin is not None:
            on_begin(summary.num_before)
        try:
            if here or (work is None and len(tasks) <= 1):
                if not here and tasks:
                    predictor = settings.make_predictor(settings.devices[0])
                work_here(tasks, predictor, settings, stop, take, on_progress)
            else:
                del predictor  # the others have models of their own
                for event in (work or work_in_processes)(tasks, settings, stop, on_progress):
                    take(event)
        except Stopped:
            summary.stopped = True
    with suppress(OSError):  # where pictures are not finished
        (output / UNFINISHED).rmdir()
    index = JournalIndex([path], header)
    summary.num_pictures, summary.num_objects = index.count(names)
    if summary.num_pictures:
        write_outputs(output, formats, index, names, coco_name=coco_name, image_ids=image_ids)
        summary.objects_by_class = _count_classes(index, names)
    elif index.count()[0] == 0 and not (output / UNFINISHED).is_dir():  # nothing to continue with: leave no trace
        for file in (path, *(file for file in summary.files if file.suffix == ".csv")):  # which grow with the run
            file.unlink(missing_ok=True)
        if not any(output.iterdir()):
            output.rmdir()
    return summary


def _count_classes(index: JournalIndex, names: Sequence[str]) -> dict[str, int]:
    class_names = index.header.class_names
    counts = np.zeros(len(class_names), dtype=np.int64)
    for result in index.read(names):
        counts += np.bincount(result.labels, minlength=len(class_names))
    return dict(zip(class_names, counts.tolist(), strict=True))
