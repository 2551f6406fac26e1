"""Several processes find what one finds, whatever becomes of them. (A process starts for seconds: few tests, large.)"""

from __future__ import annotations

import multiprocessing
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossdino.prediction_job import predict_sources
from crossdino.prediction_processes import _share
from crossdino.prediction_work import Event, Failed, Found, Task
from crossdino.results import JournalIndex
from crossdino.results.journal import JOURNAL_FILE
from crossdino.sources import Source, find_sources
from tests.stand_in import DEADLY, save_image, save_video, settings_of


def test_two_processes_of_which_several_die(tmp_path: Path) -> None:
    """One picture kills every process that looks at it: it is left out, and nothing else is lost or done twice."""
    folder = tmp_path / "in"
    for number in range(13):
        save_image(folder / f"{number:02}.png", number)
    save_image(folder / "05_large.png", 99, (200, 200))
    save_video(folder / "11.avi", 9)
    sources, _ = find_sources([str(folder)])
    predictor = {"threshold": 0.2, "tile_size": 32, "tile_overlap": 0}
    one = settings_of(tmp_path, predictor=predictor, output=tmp_path / "one")
    expected = predict_sources(sources, one, formats=("coco", "csv"))

    deadly = folder / "02_deadly.png"
    Image.fromarray(np.full((32, 32, 3), DEADLY, np.uint8)).save(deadly)
    sources, _ = find_sources([str(folder)])
    events: list[Event] = []
    two = settings_of(tmp_path, predictor=predictor, devices=("cpu", "cpu"), num_threads=1)
    summary = predict_sources(sources, two, formats=("coco", "csv"), on_event=events.append)
    (failure,) = (event for event in events if isinstance(event, Failed))
    assert failure.source.path == str(deadly)
    assert "2 processes that looked at it died, the last one was killed by signal 9" in failure.message
    assert summary.failures == [failure.message] and not summary.stopped
    keys = [event.result.key for event in events if isinstance(event, Found)]
    assert len(keys) == len(set(keys)) == expected.num_pictures == 13 + 1 + 9
    assert (summary.num_pictures, summary.num_objects) == (expected.num_pictures, expected.num_objects)
    for name in ("predictions.json", "predictions.csv", "predictions_images.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    pictures = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == pictures
    for name in pictures:
        if name.endswith(".jpg"):
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert not multiprocessing.active_children()
    index = JournalIndex([tmp_path / "out" / JOURNAL_FILE])
    assert len(list(index.keys())) == 23 and list(index.failures) == [failure.source.name]
    # Done but for the deadly one, in one process, for which it is harmless.
    again = predict_sources(sources, settings_of(tmp_path, predictor=predictor), formats=("coco", "csv"))
    assert (again.num_before, again.num_pictures, again.failures) == (15, 24, [])


@pytest.mark.parametrize(("num_tasks", "num_workers", "most"), [(4, 2, 16), (1000, 3, 16), (7, 4, 1), (1, 2, 16)])
def test_shares_become_small_so_that_all_processes_end_together(num_tasks: int, num_workers: int, most: int) -> None:
    tasks = [Task(Source(f"{number}.png", "", "image"), "") for number in range(num_tasks)]
    pending, shares = deque(tasks), []
    while share := _share(pending, set(), most, num_workers):
        shares.append(len(share))
    assert sum(shares) == num_tasks and max(shares) <= most
    assert max(shares) <= max(1, num_tasks // (2 * num_workers))
    assert all(size == 1 for size in shares[-min(num_tasks, 2 * num_workers) :])
    assert shares == sorted(shares, reverse=True)


def test_a_suspect_gets_a_process_of_its_own() -> None:
    pending = deque(Task(Source(name, "", "image"), "") for name in "abcdefghijkl")
    shares = []
    while share := _share(pending, {"b", "c", "e"}, 16, 1):
        shares.append("".join(task.source.name for task in share))
    assert "".join(shares) == "abcdefghijkl"
    assert shares[:5] == ["a", "b", "c", "d", "e"]
