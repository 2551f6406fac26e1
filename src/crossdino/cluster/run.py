"""A prediction run on Ray, from the process that starts it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from crossdino.checkpoints import find_model, package_version
from crossdino.cluster.connection import RayOptions, ray_of
from crossdino.cluster.stations import End, Part, PartsMemory, Plan, Worker, read_blocks
from crossdino.errors import InputError
from crossdino.prediction_job import RunSummary, predict_sources
from crossdino.prediction_work import Ended, Event, Failed, Found, OnProgress, StopEvent, Stopped, Task, WorkSettings
from crossdino.predictor import Predictor
from crossdino.sources import Ahead, ReadOptions, Source, find_sources

# Tasks that read; each does its share of the groups one after the other.
_MOST_READERS = 2000
# How often is looked whether the run shall end.
_POLL_SECONDS = 0.02


def predict_on_ray(
    sources: Sequence[str | Path | Source],
    weights: str | Path,
    *,
    output: str | Path,
    address: str = "local",
    num_workers: int = 0,
    num_gpus_per_worker: float | None = None,
    cpus_per_worker: int = 1,
    tiles_per_block: int = 16,
    predictor_options: Mapping[str, Any] | None = None,
    read_options: ReadOptions = ReadOptions(),
    formats: Sequence[str] = ("parquet",),
    overwrite: bool = False,
    stop: StopEvent | None = None,
    on_event: Callable[[Event], None] | None = None,
    on_progress: OnProgress | None = None,
) -> RunSummary:
    """Detect on a Ray cluster and write what is found into a folder here; a run that was stopped is continued.

    Args:
        sources: files, folders, glob patterns or videos, or what `find_sources` makes of them.
        weights: a model folder on this machine, or the id of one on the Hugging Face hub.
        output: folder on this machine for the journal and the files made of it.
        address: of the cluster; this and what follows: see `RayOptions`.
        num_workers: actors with a model each; 0: as many as there is room for.
        num_gpus_per_worker: GPUs for each; None: 1 where the cluster has GPUs.
        cpus_per_worker: CPU cores for each.
        tiles_per_block: tiles of an image that a worker gets at once.
        predictor_options: arguments of `Predictor` besides `device`.
        read_options: how the sources are read.
        formats: of `crossdino.results.FORMATS`, besides the journal.
        overwrite: begin anew where there is a run already.
        stop: ends the run early; it can be continued.
        on_event: is called with everything that happens, once it is in the journal.
        on_progress: is called after every part of large pictures with the name, the tiles that are done, and all.

    Returns:
        What was done, with a message for each source that could not be read.

    Raises:
        InputError: nothing to look at, Ray is not reached, the folder holds a run with other settings, or a setting
            cannot be used.
    """
    options = RayOptions(address, num_workers, num_gpus_per_worker, cpus_per_worker, tiles_per_block)
    chosen = dict(predictor_options or {})
    if "device" in chosen:
        raise InputError("the device of Ray workers follows from num_gpus_per_worker: leave device out")
    words = [str(source) for source in sources if not isinstance(source, Source)]
    found, missing = find_sources(words) if words else ([], [])
    settings = WorkSettings(str(find_model(weights)), chosen, read_options, Path(output), draw=False)
    summary = predict_sources(
        [*(source for source in sources if isinstance(source, Source)), *found],
        settings,
        formats=formats,
        overwrite=overwrite,
        work=partial(work_on_ray, options=options),
        stop=stop,
        on_event=on_event,
        on_progress=on_progress,
    )
    summary.failures[:0] = missing
    return summary


def work_on_ray(
    tasks: Iterable[Task],
    settings: WorkSettings,
    stop: StopEvent,
    on_progress: OnProgress | None = None,
    *,
    options: RayOptions,
) -> Iterator[Event]:
    """Do tasks on a cluster, as `work_in_processes` does them on one machine.

    Args:
        tasks: what to do. The nodes must find the files at the same (absolute) paths.
        settings: the rest. The model is read here and sent to the workers; nothing is drawn; `devices` and
            `num_threads` do not count, see `options`.
        stop: ends the run early.
        on_progress: is called after every part of large pictures.
        options: where and how wide.

    Yields:
        What happened. Sources come in the order in which they are finished, the frames of a video in theirs.

    Raises:
        Stopped: `stop` was set; everything that was done has been yielded.
        InputError: Ray is not installed or not reached, the cluster is too small, the settings cannot be used.
    """
    tasks = list(tasks)
    for task in tasks:
        if task.source.kind == "camera":
            raise InputError(
                f"{task.source.name} cannot be looked at by Ray workers, which have no camera: leave it out"
            )
    if not tasks:
        return
    predictor = settings.make_planner()
    with ray_of(options) as (num_workers, num_gpus), ExitStack() as stack:
        joined = _Joined(tasks, predictor, on_progress)
        blocks = _blocks(tasks, predictor, settings, options, num_workers, num_gpus)
        # Another thread waits for Ray, so that this one can stop.
        coming = stack.enter_context(Ahead(itertools.chain(blocks, [[]]), depth=8))
        while block := _next(coming, stop):
            for item in block:
                yield from joined.take(item)
    assert joined.finished, "Ray Data gives back all that it was given"


def _next(coming: Ahead[list[Part | End]], stop: StopEvent) -> list[Part | End]:
    """The next block; an empty one at the end."""
    while (block := coming.take(wait=False)) is None:
        if stop.is_set():
            raise Stopped
        time.sleep(_POLL_SECONDS)
    return block


def _blocks(
    tasks: Sequence[Task],
    predictor: Predictor,
    settings: WorkSettings,
    options: RayOptions,
    num_workers: int,
    num_gpus: float,
) -> Iterator[list[Part | End]]:
    """All blocks of all sources, as they are done."""
    import ray
    import ray.data

    batch_size = predictor.batch_size
    plan = Plan(
        tile_size=predictor.tile_size,
        tile_overlap=predictor.tile_overlap,
        full_image=predictor.full_image,
        block=-(-options.tiles_per_block // batch_size) * batch_size,
        reading=settings.reading,
        most_frames=settings.most_frames,
    )
    with warnings.catch_warnings():
        # Ray makes its context with settings that it has deprecated itself.
        warnings.simplefilter("ignore", DeprecationWarning)
        context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    # Every row is a block of Ray's, so that it can go to any worker.
    context.target_max_block_size = context.target_min_block_size = 1
    arguments = (
        *([ray.put(predictor.model)], dict(settings.predictor), plan, options.cpus_per_worker),
        *("cuda" if num_gpus else "cpu", package_version()),
    )
    groups = [{"group": pickle.dumps(group)} for group in _groups(tasks, batch_size)]
    with ray.data.DataContext.current(context):
        data = ray.data.from_items(groups, override_num_blocks=min(len(groups), _MOST_READERS))
        data = data.map_batches(partial(read_blocks, plan=plan), batch_size=1, batch_format="pyarrow", num_cpus=1)
        # Without this Ray would make one station of both, and all of a large image would stay with one worker.
        data = data.repartition(target_num_rows_per_block=1)
        data = data.map_batches(
            Worker,
            fn_constructor_args=arguments,
            compute=ray.data.ActorPoolStrategy(size=num_workers),
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=options.cpus_per_worker,
            num_gpus=num_gpus,
        )
        batches: Iterator[Any] = iter(data.iter_batches(batch_size=None, batch_format="pyarrow"))
        for batch in batches:
            yield from map(pickle.loads, batch["block"].to_pylist())


def _groups(tasks: Sequence[Task], batch_size: int) -> Iterator[list[tuple[int, Task]]]:
    """The tasks by their numbers: images that fill a batch together, videos one by one."""
    group: list[tuple[int, Task]] = []
    for number, task in enumerate(tasks):
        source = dataclasses.replace(task.source, path=os.path.abspath(task.source.path))  # workers live elsewhere
        if group and (len(group) == batch_size or source.kind == "video" or group[-1][1].source.kind == "video"):
            yield group
            group = []
        group.append((number, dataclasses.replace(task, source=source)))
    yield group


@dataclass
class _State:
    """What has come of a source: events by the pictures' places, and the parts of pictures that are not complete."""

    events: dict[int, Event] = field(default_factory=dict)
    parts: dict[int, dict[int, Part]] = field(default_factory=dict)
    num_told: int = 0
    end: End | None = None


class _Joined:
    """Puts together what the workers give, in any order, and perhaps twice."""

    def __init__(self, tasks: Sequence[Task], predictor: Predictor, on_progress: OnProgress | None) -> None:
        self._tasks = tasks
        self._predictor = predictor
        self._on_progress = on_progress
        self._states = {number: _State() for number in range(len(tasks))}

    @property
    def finished(self) -> bool:
        """Nothing is missing."""
        return not self._states

    def take(self, item: Part | End) -> Iterator[Event]:
        """Take over a part, or the end of a source; yields what can be told now."""
        state = self._states.get(item.task)
        if state is None:
            return
        task = self._tasks[item.task]
        if isinstance(item, End):
            state.end = item
        elif item.place >= state.num_told and item.place not in state.events:
            self._collect(task, state, item)
        while state.num_told in state.events:
            yield state.events.pop(state.num_told)
            state.num_told += 1
        if state.end is not None and state.end.place == state.num_told:
            del self._states[item.task]
            if state.end.error is not None:
                yield Failed(task.source, state.end.error, state.end.stamp, state.end.frame)
            elif task.source.kind == "video":
                yield Ended(task.source, state.end.stamp)

    def _collect(self, task: Task, state: _State, part: Part) -> None:
        parts = state.parts.setdefault(part.place, {})
        parts[part.looks[0]] = part
        num_done = sum(len(each.looks) for each in parts.values())
        if self._on_progress is not None and not part.whole:
            self._on_progress(task.source.name, num_done, part.num_looks)
        if num_done < part.num_looks:
            return
        del state.parts[part.place]
        errors = [parts[look].error for look in sorted(parts) if parts[look].error is not None]
        if errors:
            state.events[part.place] = Failed(task.source, str(errors[0]), part.stamp, part.frame)
            return
        if part.result is None:
            memory = PartsMemory(list(parts.values()))
            part.make_result(next(iter(self._predictor.stream([part], memory=memory))))
        assert part.result is not None
        state.events[part.place] = Found(part.result, part.stamp)
