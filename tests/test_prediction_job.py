"""A run over many sources: what is written, that it goes on where it was stopped, and that nothing is done twice."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from crossdino import prediction_work
from crossdino.errors import InputError
from crossdino.prediction_job import RunSummary, predict_sources
from crossdino.prediction_work import UNFINISHED, Ended, Event, Failed, Found, WorkSettings
from crossdino.predictor import Predictor
from crossdino.results import JournalIndex, TileStore
from crossdino.results.journal import JOURNAL_FILE
from crossdino.sources import ReadOptions, find_sources
from tests.stand_in import Quarters, StandInSettings, save_image, save_video, settings_of


class StopAfter:
    """A wish to stop that comes after so many events."""

    def __init__(self, num_events: int) -> None:
        self.left = num_events

    def is_set(self) -> bool:
        return self.left <= 0

    def count(self, _: Event) -> None:
        self.left -= 1


class Killed(BaseException):
    """Stands for the death of the process: nothing of ours handles it."""


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[Quarters]:
    """The models of the runs, which count what they see."""
    made: list[Quarters] = []

    def make_predictor(self: WorkSettings, device: str) -> Predictor:
        made.append(Quarters())
        return Predictor(made[-1], **self.predictor)  # type: ignore[arg-type]

    monkeypatch.setattr(StandInSettings, "make_predictor", make_predictor)
    return made


def run(settings: WorkSettings, *words: Path | str, **options: Any) -> RunSummary:
    sources, _ = find_sources([str(word) for word in words])
    return predict_sources(sources, settings, **options)


def kill_after(num_events: int) -> Callable[[Event], None]:
    left = [num_events]

    def count(_: Event) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    return count


def contents(folder: Path, *suffixes: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in suffixes}


def num_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(tmp_path: Path, models: list[Quarters]) -> None:
    for number in range(9):
        save_image(tmp_path / "in" / f"{number}.png", number)
    save_video(tmp_path / "in" / "v.mp4", 7)
    formats = ("coco", "coco-results", "csv", "geojson", "yolo")
    whole = run(settings_of(tmp_path, output=tmp_path / "whole"), tmp_path / "in", formats=formats)
    assert (whole.num_pictures, whole.num_before, whole.stopped, whole.failures) == (16, 0, False, [])
    assert {path.name for path in whole.files} == {
        *("predictions.json", "predictions_coco_results.json", "predictions.csv", "predictions_images.csv")
    }
    settings = settings_of(tmp_path)
    seen = []
    for num_events in (1, 3, 2, 6, 99):
        before = len(contents(tmp_path / "out", ".jsonl").get(JOURNAL_FILE, b"").splitlines()) if seen else 1
        with pytest.raises(Killed) if num_events < 99 else threading.Lock():
            summary = run(settings, tmp_path / "in", formats=formats, on_event=kill_after(num_events))
        journal = tmp_path / "out" / JOURNAL_FILE
        lines = journal.read_bytes().splitlines()
        assert len(lines) >= before + min(num_events, 1)
        seen.append(models[-1].num_seen)
        journal.write_bytes(journal.read_bytes() + b'{"file_name": "torn')
    assert summary.num_pictures == 16 and summary.num_objects == whole.num_objects
    assert 0 < summary.num_before < 9 + 1
    index = JournalIndex([tmp_path / "out" / JOURNAL_FILE])
    assert len(list(index.keys())) == len(set(index.keys())) == 16
    # Nothing that was in the journal is computed again; up to four pictures are drawn behind the network.
    assert sum(seen) <= 16 + 4 * 6
    suffixes = (".json", ".csv", ".geojson", ".txt", ".jpg")
    assert contents(tmp_path / "out", *suffixes) == contents(tmp_path / "whole", *suffixes)
    assert num_frames(tmp_path / "out" / "v.mp4") == num_frames(tmp_path / "whole" / "v.mp4") == 7
    once_more = run(settings, tmp_path / "in", formats=formats)
    assert models[-1].num_seen == 0 and once_more.num_before == 10 and once_more.num_pictures == 16
    assert contents(tmp_path / "out", *suffixes) == contents(tmp_path / "whole", *suffixes)
    assert not [
        path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".") or path.name == UNFINISHED
    ]


def test_a_stopped_run_writes_what_it_has_and_goes_on(tmp_path: Path, models: list[Quarters]) -> None:
    for number in range(8):
        save_image(tmp_path / "in" / f"{number}.png", number)
    stop, begun = StopAfter(3), []
    summary = run(settings_of(tmp_path), tmp_path / "in", stop=stop, on_event=stop.count, on_begin=begun.append)
    assert summary.stopped and 3 <= summary.num_pictures < 8
    found = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert len(found["images"]) == summary.num_pictures
    assert all((tmp_path / "out" / image["picture"]).is_file() for image in found["images"])
    rest = run(settings_of(tmp_path), tmp_path / "in", on_begin=begun.append)
    assert not rest.stopped and rest.num_pictures == 8 and begun == [0, summary.num_pictures]
    assert models[1].num_seen == 8 - summary.num_pictures
    stop = StopAfter(0)  # before anything was begun
    assert run(settings_of(tmp_path, output=tmp_path / "none"), tmp_path / "in", stop=stop).stopped
    assert models[-1].num_seen == 0 and not (tmp_path / "none").exists()


def test_it_goes_on_within_a_large_picture(tmp_path: Path, models: list[Quarters]) -> None:
    large, small = save_image(tmp_path / "large.png", 0, (256, 256)), save_image(tmp_path / "a.png", 1)
    options = {"threshold": 0.2, "tile_size": 32, "tile_overlap": 0, "full_image": True}
    settings = settings_of(tmp_path, predictor=options)
    whole = run(settings_of(tmp_path, predictor=options, output=tmp_path / "whole"), small, large)
    per_small, per_large = 2 * 2 + 1, 64 + 1
    assert models[0].num_seen == per_small + per_large
    told: list[tuple[str, int, int]] = []

    class Stop:
        def is_set(self) -> bool:
            return len(told) >= 20

    # The small one, too, is in the journal by the time that the large one is stopped.
    stopped = run(settings, large, small, stop=Stop(), on_progress=lambda *each: told.append(each))
    assert stopped.stopped and stopped.num_pictures == 0 and models[-1].num_seen == 20
    assert told[-1] == (large.as_posix(), 20, 64)
    assert (tmp_path / "out" / JOURNAL_FILE).is_file()  # without it nobody would know what the tiles were made with
    with pytest.raises(InputError, match=r"threshold 0\.2 -> 0\.9"):
        run(settings_of(tmp_path, predictor={**options, "threshold": 0.9}), large, small)
    (kept,) = (tmp_path / "out" / UNFINISHED).iterdir()
    kept.write_bytes(kept.read_bytes()[:-5])  # its last record is torn
    told.clear()
    resumed = run(settings, small, large, on_progress=lambda *each: told.append(each))
    assert models[-1].num_seen == per_small + per_large - 19 and told[0][1] == 20
    assert resumed.num_objects == whole.num_objects
    assert contents(tmp_path / "out", ".json") == contents(tmp_path / "whole", ".json")
    assert not (tmp_path / "out" / UNFINISHED).exists()


def test_tiles_of_nobody_knows_what_are_not_used(tmp_path: Path, models: list[Quarters]) -> None:
    large = save_image(tmp_path / "large.png", 0, (256, 256))
    options = {"threshold": 0.2, "tile_size": 32, "tile_overlap": 0}

    class Stop:
        def is_set(self) -> bool:
            return models[-1].num_seen >= 20

    for undo in ("journal", "overwrite", "file"):
        run(settings_of(tmp_path, predictor=options), large, stop=Stop())
        assert (tmp_path / "out" / UNFINISHED).is_dir()
        if undo == "journal":
            (tmp_path / "out" / JOURNAL_FILE).unlink()
        elif undo == "file":
            os.utime(large, ns=(1, 1))
        run(settings_of(tmp_path, predictor=options), large, overwrite=undo == "overwrite")
        assert models[-1].num_seen == 64, undo
        (tmp_path / "out" / JOURNAL_FILE).unlink()


def test_finished_pictures_are_told_before_a_large_one_is_done(
    tmp_path: Path, models: list[Quarters], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after hours within a large picture, the ones before it are in the journal."""
    small, large = save_image(tmp_path / "a.png", 1), save_image(tmp_path / "b.png", 0, (256, 256))
    settings = settings_of(tmp_path, predictor={"tile_size": 32, "tile_overlap": 0})
    found: list[str] = []
    finish = prediction_work.Drawer.finish

    def slow_finish(*arguments: Any) -> Any:  # the small one is drawn while the large one is in the network
        while models[-1].num_seen < 4 + 10:
            threading.Event().wait(0.002)
        return finish(*arguments)

    def see(name: str, done: int, total: int) -> None:
        if done > 30:
            for _ in range(1000):  # until it is drawn
                if (tmp_path / "out" / "a.jpg").is_file():
                    break
                threading.Event().wait(0.01)
        if done > 50:
            assert found == [small.as_posix()]

    monkeypatch.setattr(prediction_work.Drawer, "finish", slow_finish)
    run(settings, small, large, on_progress=see, on_event=lambda event: found.append(event.result.file_name))  # type: ignore[union-attr]
    assert found == [small.as_posix(), large.as_posix()]


def test_broken_and_changed_files(tmp_path: Path, models: list[Quarters]) -> None:
    good = [save_image(tmp_path / "in" / f"{number}.png", number) for number in range(3)]
    repaired = good[1].read_bytes()
    good[1].write_bytes(repaired[:-300])  # the header is whole: only reading the pixels shows it
    good[2].write_bytes(b"junk")
    events: list[Event] = []
    first = run(settings_of(tmp_path), tmp_path / "in", on_event=events.append)
    assert [type(event) for event in events] == [Found, Failed, Failed]
    assert first.num_pictures == 1 and len(first.failures) == 2
    assert "1.png" in first.failures[0] and "2.png" in first.failures[1]
    good[1].write_bytes(repaired)
    second = run(settings_of(tmp_path), tmp_path / "in")
    assert (second.num_before, second.num_pictures, models[-1].num_seen) == (1, 2, 1)
    assert len(second.failures) == 1 and "2.png" in second.failures[0]
    save_image(good[0], 77)
    good[2].unlink()
    third = run(settings_of(tmp_path), tmp_path / "in")
    assert (third.num_before, third.num_pictures, models[-1].num_seen, third.failures) == (1, 2, 1, [])
    fresh = run(settings_of(tmp_path, output=tmp_path / "fresh"), tmp_path / "in")
    assert fresh.num_objects == third.num_objects
    assert contents(tmp_path / "out", ".json") == contents(tmp_path / "fresh", ".json")
    nothing = tmp_path / "nothing"
    (tmp_path / "broken.png").write_bytes(b"junk")
    assert run(settings_of(tmp_path, output=nothing), tmp_path / "broken.png", formats=("csv",)).failures
    assert not nothing.exists()


def test_other_settings_are_refused_by_name(tmp_path: Path, models: list[Quarters]) -> None:
    image = save_image(tmp_path / "a.png", 0)
    run(settings_of(tmp_path), image)
    before = contents(tmp_path / "out", ".json", ".jsonl", ".jpg")
    for changes, message in (
        ({"predictor": {"threshold": 0.5}}, r"threshold 0\.2 -> 0\.5"),
        ({"reading": ReadOptions(every_frame=2)}, "every_frame 1 -> 2"),
        ({"draw": False}, "pictures True -> False"),
        ({"most_frames": 3}, "most_frames None -> 3"),
    ):
        with pytest.raises(InputError, match=f"other settings .{message}.*--overwrite"):
            run(settings_of(tmp_path, **changes), image)
    assert contents(tmp_path / "out", ".json", ".jsonl", ".jpg") == before
    # What changes no detection may change.
    assert run(settings_of(tmp_path, predictor={"threshold": 0.2, "batch_size": 3}), image).num_before == 1
    anew = run(settings_of(tmp_path, predictor={"threshold": 0.5}), image, overwrite=True)
    assert anew.num_before == 0 and models[-1].num_seen == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="name a folder"):
        run(settings_of(tmp_path, output=tmp_path / "file"), image)
    with pytest.raises(InputError, match="would be overwritten"):
        run(settings_of(tmp_path, output=tmp_path), save_image(tmp_path / "b.jpg", 0))


def test_videos(tmp_path: Path, models: list[Quarters]) -> None:
    clips = [save_video(tmp_path / "in" / name, 9 + index, seed=index) for index, name in enumerate(("a.mp4", "c.avi"))]
    save_image(tmp_path / "in" / "b.png", 0)
    torn = save_video(tmp_path / "in" / "d.avi", 40)
    torn.write_bytes(torn.read_bytes()[:-3000])
    reading = ReadOptions(every_frame=2)
    events: list[Event] = []
    whole = run(
        settings_of(tmp_path, reading=reading, output=tmp_path / "whole"), tmp_path / "in", on_event=events.append
    )
    keys = [event.result.key for event in events if isinstance(event, Found)]
    assert [type(event) for event in events] == [
        *5 * [Found],
        Ended,
        Found,
        *5 * [Found],
        Ended,
        *(len(events) - 14) * [Found],
        Failed,
    ]
    names = [path.as_posix() for path in clips]
    assert [key for key in keys if key.startswith(names[0])] == [f"{names[0]}#{frame}" for frame in range(0, 9, 2)]
    assert [key for key in keys if key.startswith(names[1])] == [f"{names[1]}#{frame}" for frame in range(0, 10, 2)]
    num_torn = sum(key.startswith(torn.as_posix()) for key in keys)
    assert 0 < num_torn < 20 and len(keys) == 5 + 1 + 5 + num_torn
    (failure,) = whole.failures
    assert "d.avi is damaged after frame" in failure
    drawn = {name: num_frames(tmp_path / "whole" / f"{name}.mp4") for name in "acd"}
    assert drawn == {"a": 5, "c": 5, "d": num_torn}
    with av.open(str(tmp_path / "whole" / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 5  # every second of 10 frames a second
    found = json.loads((tmp_path / "whole" / "predictions.json").read_text())
    assert [image["frame"] for image in found["images"][:5]] == [0, 2, 4, 6, 8]
    # Frames become brighter, so do scores: every frame has its own detections.
    best = [
        max((one["score"] for one in found["annotations"] if one["image_id"] == image["id"]), default=0.0)
        for image in found["images"][:5]
    ]
    assert best == sorted(best) and best[0] < best[4] - 0.2

    for num_events in (3, 1, 6, 4, 99):
        with pytest.raises(Killed) if num_events < 99 else threading.Lock():
            run(settings_of(tmp_path, reading=reading), tmp_path / "in", on_event=kill_after(num_events))
    assert contents(tmp_path / "out", ".json") == contents(tmp_path / "whole", ".json")
    assert {name: num_frames(tmp_path / "out" / f"{name}.mp4") for name in "acd"} == drawn
    # The last frame is found, and the process dies before that is the end of the video.
    journal = tmp_path / "out" / JOURNAL_FILE
    lines = [line for line in journal.read_bytes().splitlines(keepends=True) if b'"ended"' not in line]
    journal.write_bytes(b"".join(lines))
    (tmp_path / "out" / "a.mp4").unlink()
    assert run(settings_of(tmp_path, reading=reading), tmp_path / "in").num_before == 1
    assert models[-1].num_seen == 0 and num_frames(tmp_path / "out" / "a.mp4") == 5
    assert run(settings_of(tmp_path, reading=reading), tmp_path / "in").num_before == 3

    few = run(settings_of(tmp_path, output=tmp_path / "few", most_frames=3), *clips)
    assert few.num_pictures == 6 and num_frames(tmp_path / "few" / "a.mp4") == 3


def test_a_stopped_video_can_be_played_and_goes_on(tmp_path: Path, models: list[Quarters]) -> None:
    clip = save_video(tmp_path / "a.mp4", 20)
    stop = StopAfter(4)
    stopped = run(settings_of(tmp_path), clip, stop=stop, on_event=stop.count)
    assert 4 <= stopped.num_pictures < 20
    assert num_frames(tmp_path / "out" / "a.mp4") == stopped.num_pictures
    run(settings_of(tmp_path), clip)
    assert models[-1].num_seen == 20 - stopped.num_pictures
    assert num_frames(tmp_path / "out" / "a.mp4") == 20


def test_a_camera_begins_anew(tmp_path: Path, models: list[Quarters], monkeypatch: pytest.MonkeyPatch) -> None:
    from crossdino.sources import video

    session = [0]

    def open_camera(number: int) -> Any:
        session[0] += 1
        return av.open(str(save_video(tmp_path / f"{session[0]}.mp4", 6 - session[0], seed=session[0])))

    monkeypatch.setattr(video, "open_camera", open_camera)
    first = run(settings_of(tmp_path, most_frames=3), "0")
    assert (first.num_pictures, first.failures) == (3, [])
    unplugged = run(settings_of(tmp_path, output=tmp_path / "u"), "0")  # after its fourth frame
    assert unplugged.num_pictures == 4 and "stopped after frame 3" in unplugged.failures[0]
    again = run(settings_of(tmp_path, output=tmp_path / "u"), "0")
    assert again.num_pictures == 3 and num_frames(tmp_path / "u" / "camera-0.mp4") == 3
    monkeypatch.undo()
    monkeypatch.setattr(StandInSettings, "make_predictor", lambda self, _: Predictor(Quarters(), **self.predictor))  # type: ignore[arg-type]
    missing = run(settings_of(tmp_path, output=tmp_path / "none"), "63")
    assert re.search("camera 63 cannot be read .*connected", missing.failures[0])


def test_drawing_goes_on_beside_the_network(
    tmp_path: Path, models: list[Quarters], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first picture is drawn only after the network has seen the second one; few wait to be drawn."""
    for number in range(30):
        save_image(tmp_path / "in" / f"{number:02}.png", number)
    finish, drawn, ahead = prediction_work.Drawer.finish, [0], []

    def slow_finish(*arguments: Any) -> Any:
        for _ in range(1000):
            if models[-1].num_seen >= min(30, drawn[0] + 2):
                break
            threading.Event().wait(0.01)
        else:
            raise AssertionError("the network waits for the drawing")
        drawn[0] += 1
        ahead.append(models[-1].num_seen - drawn[0])
        return finish(*arguments)

    monkeypatch.setattr(prediction_work.Drawer, "finish", slow_finish)
    assert run(settings_of(tmp_path), tmp_path / "in").num_pictures == 30
    assert max(ahead) <= 6


def test_a_full_disk_ends_the_run_with_one_line(
    tmp_path: Path, models: list[Quarters], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        save_image(tmp_path / "in" / f"{number}.png", number)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    threads = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr("crossdino.prediction_drawing.write_picture", full)
        with pytest.raises(InputError, match="No space left on device.*same command"):
            run(settings_of(tmp_path), tmp_path / "in")
    with monkeypatch.context() as patch:
        patch.setattr(TileStore, "load", full)
        with pytest.raises(OSError, match="No space"):
            run(
                settings_of(tmp_path, predictor={"tile_size": 16, "tile_overlap": 0}, output=tmp_path / "b"),
                tmp_path / "in",
            )
    assert threading.active_count() == threads
    assert run(settings_of(tmp_path), tmp_path / "in").num_pictures == 4


def test_capped_pictures_are_named(tmp_path: Path, models: list[Quarters]) -> None:
    image = save_image(tmp_path / "a.png", 0)
    assert run(settings_of(tmp_path), image).capped == [image.as_posix()]
    settings = settings_of(tmp_path, predictor={"threshold": 0.2, "num_select": 8}, output=tmp_path / "b")
    assert run(settings, image).capped == []
    found = json.loads((tmp_path / "b" / "predictions.json").read_text())
    assert len(found["annotations"]) == 4 and {one["category_id"] for one in found["annotations"]} <= {3, 7}
    np.testing.assert_array_equal([len(found["images"])], [1])
