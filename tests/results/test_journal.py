"""The journal: what it says after kills, changes of files, failures, and with several processes."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from crossdino.errors import InputError
from crossdino.results import (
    FileStamp,
    Journal,
    JournalHeader,
    JournalIndex,
    PictureResult,
    file_stamp,
    journal_path,
)

OLD, NEW = FileStamp(100, 1), FileStamp(100, 2)
MakeResult = Callable[..., PictureResult]


def numbers(result: PictureResult) -> list[object]:
    return [result.key, result.boxes_xyxy.tolist(), result.scores.tolist(), result.labels.tolist()]


def test_what_was_added_is_read_in_any_order(tmp_path: Path, header: JournalHeader, make_result: MakeResult) -> None:
    path = journal_path(tmp_path / "out")
    added = [make_result("b.png"), make_result("a.png", 0), *(make_result("v.mp4", 2, frame) for frame in (0, 5, 10))]
    with Journal(path, header) as journal:
        for result in added:
            journal.add(result, OLD)
        # Everything is there before the journal is closed.
        assert JournalIndex([path]).count() == (5, 9)
    index = JournalIndex([path], header)
    assert index.header == header
    assert [numbers(result) for result in index.read()] == [numbers(result) for result in added]
    assert [result.key for result in index.read(["v.mp4", "unknown", "a.png"])] == [
        *("v.mp4#0", "v.mp4#5", "v.mp4#10", "a.png")
    ]
    assert list(index.keys(["v.mp4", "a.png"])) == ["v.mp4#0", "v.mp4#5", "v.mp4#10", "a.png"]
    assert index.count(["v.mp4", "unknown"]) == (3, 6)


def test_what_is_done(tmp_path: Path, header: JournalHeader, make_result: MakeResult) -> None:
    path = journal_path(tmp_path)
    with Journal(path, header) as journal:
        journal.add(make_result("a.png"), OLD)
        journal.add(make_result("v.mp4", frame=0), OLD)
        journal.add(make_result("v.mp4", frame=5), OLD)
        journal.add(make_result("camera-0", frame=0), None)
    index = JournalIndex([path])
    assert index.is_done("a.png", OLD)
    assert not index.is_done("a.png", NEW), "the file has changed"
    assert not index.is_done("b.png", OLD)
    assert not index.is_done("camera-0", None), "a camera is never done"
    assert not index.is_done("v.mp4", OLD), "its end was not reached"
    assert (index.frames_done("v.mp4", OLD), index.last_frame("v.mp4", OLD)) == (2, 5)
    assert (index.frames_done("v.mp4", NEW), index.last_frame("v.mp4", NEW)) == (0, None)
    with Journal(path, header) as journal:
        journal.add_end("v.mp4", OLD)
    assert JournalIndex([path]).is_done("v.mp4", OLD)


def test_the_last_entry_of_a_file_counts(tmp_path: Path, header: JournalHeader, make_result: MakeResult) -> None:
    path = journal_path(tmp_path)
    with Journal(path, header) as journal:
        journal.add(make_result("a.png", 3), OLD)
        for frame in range(4):
            journal.add(make_result("v.mp4", 1, frame), OLD)
        journal.add_end("v.mp4", OLD)
        journal.add(make_result("a.png", 5), NEW)
        journal.add(make_result("v.mp4", 2, 0), NEW)  # the new video is shorter: nothing of the old one may stay
    index = JournalIndex([path])
    assert [(result.key, len(result)) for result in index.read()] == [("a.png", 5), ("v.mp4#0", 2)]
    assert not index.is_done("v.mp4", NEW) and not index.is_done("v.mp4", OLD)


def test_failures_are_tried_again(tmp_path: Path, header: JournalHeader, make_result: MakeResult) -> None:
    path = journal_path(tmp_path)
    with Journal(path, header) as journal:
        journal.add_failure("a.png", "a.png is broken", OLD)
        journal.add_failure("b.png", "b.png is missing", None)
        journal.add(make_result("v.mp4", frame=0), OLD)
        journal.add_failure("v.mp4", "v.mp4 is cut off", OLD, frame=1)
    index = JournalIndex([path])
    assert index.failures == {"a.png": "a.png is broken", "b.png": "b.png is missing", "v.mp4": "v.mp4 is cut off"}
    assert not index.is_done("a.png", OLD) and not index.is_done("v.mp4", OLD)
    assert list(index.keys()) == ["v.mp4#0"], "what was found before the damage stays"
    with Journal(path, header) as journal:
        journal.add(make_result("a.png"), OLD)
        journal.add(make_result("b.png"), NEW)
        journal.add_end("v.mp4", OLD)
    index = JournalIndex([path])
    assert index.failures == {} and all(index.is_done(*done) for done in (("a.png", OLD), ("b.png", NEW)))


def test_other_settings_are_refused(tmp_path: Path, header: JournalHeader, make_result: MakeResult) -> None:
    path = journal_path(tmp_path)
    with Journal(path, header) as journal:
        journal.add(make_result("a.png"), OLD)
    before = path.read_bytes()
    other = JournalHeader({"threshold": 0.5, "tiles": {"size": 800, "overlap": 32}}, header.class_names, [3, 7, 10])
    for attempt in (lambda: Journal(path, other), lambda: JournalIndex([path], other)):
        with pytest.raises(InputError) as error:
            attempt()
        for words in ("threshold 0.3 -> 0.5", "tiles.overlap 64 -> 32", "[3, 7, 9] -> [3, 7, 10]", "--overwrite"):
            assert words in str(error.value)
        assert "size" not in str(error.value) and "class_names" not in str(error.value)
    assert path.read_bytes() == before
    with pytest.raises(InputError, match=r"new_one \(none\) -> 1"):
        Journal(path, JournalHeader({**header.settings, "new_one": 1}, header.class_names, header.category_ids))
    Journal(path, other, overwrite=True).close()
    assert JournalIndex([path], other).count() == (0, 0)


def test_tuples_and_versions_make_no_difference(tmp_path: Path) -> None:
    path = journal_path(tmp_path)
    Journal(path, JournalHeader({"bands": (1, 2, 3), "range": None}, ["a"], [1], "0.0.1")).close()
    Journal(path, JournalHeader({"range": None, "bands": (1, 2, 3)}, ["a"], [1])).close()


def test_a_line_torn_at_any_byte_is_dropped(
    tmp_path: Path, header: JournalHeader, make_result: MakeResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of them take long
    path = journal_path(tmp_path)
    with Journal(path, header) as journal:
        journal.add(make_result("a.png", 2), OLD)
    kept = path.read_bytes()
    last = make_result("b.png", 1)
    with Journal(path, header) as journal:
        journal.add(last, OLD)
    whole = path.read_bytes()
    for length in range(len(kept), len(whole)):
        path.write_bytes(whole[:length])
        index = JournalIndex([path], header)
        assert list(index.keys()) == ["a.png"], length
        assert path.stat().st_size == length, "reading changes nothing"
        with Journal(path, header) as journal:
            assert path.read_bytes() == kept, length
            journal.add(last, OLD)
        assert [numbers(result) for result in JournalIndex([path]).read(["b.png"])] == [numbers(last)]


def test_a_torn_header_and_zeros(
    tmp_path: Path, header: JournalHeader, make_result: MakeResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    path = journal_path(tmp_path)
    line = header.to_line()
    for length in range(len(line)):
        path.write_bytes(line[:length])
        assert JournalIndex([path], header).count() == (0, 0)
        Journal(path, header).close()
        assert path.read_bytes() == line
    with Journal(path, header) as journal:
        journal.add(make_result("a.png"), OLD)
    good = path.read_bytes()
    path.write_bytes(good + b"\0" * 5000)  # as some file systems leave it after a loss of power
    assert list(JournalIndex([path]).keys()) == ["a.png"]
    Journal(path, header).close()
    assert path.read_bytes() == good


def test_other_files_are_left_alone(tmp_path: Path, header: JournalHeader) -> None:
    path = journal_path(tmp_path)
    newer = json.dumps({"format": "crossdino-predictions", "format_version": 2, "crossdino_version": "9.9"})
    for content, words in (
        ("my notes", "no journal"),
        ("[]\n", "no journal"),
        ('{"format": "else"}\n', "no journal"),
        (newer + "\n", r"newer crossdino \(9.9\)"),
    ):
        path.write_text(content)
        for attempt in (lambda: Journal(path, header), lambda: JournalIndex([path])):
            with pytest.raises(InputError, match=words):
                attempt()
        assert path.read_text() == content
    with pytest.raises(InputError, match="cannot read"):
        JournalIndex([tmp_path / "nothing.jsonl"])
    with pytest.raises(InputError, match="cannot write"):
        Journal(path / "predictions.jsonl", header)


def test_damage_in_the_middle_is_told(tmp_path: Path, header: JournalHeader, make_result: MakeResult) -> None:
    path = journal_path(tmp_path)
    with Journal(path, header) as journal:
        journal.add(make_result("a.png"), OLD)
        journal.add(make_result("b.png"), OLD)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:40] + b"\n" + lines[2])
    with pytest.raises(InputError, match=f"damaged at byte {len(lines[0])}.*--overwrite"):
        JournalIndex([path])


def test_one_writer_at_a_time(tmp_path: Path, header: JournalHeader) -> None:
    path = journal_path(tmp_path)
    for overwrite in (False, True):
        with Journal(path, header), pytest.raises(InputError, match="another process"):
            Journal(path, header, overwrite=overwrite)
    Journal(path, header).close()


def test_a_full_disk_leaves_whole_lines(
    tmp_path: Path, header: JournalHeader, make_result: MakeResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = journal_path(tmp_path)
    with Journal(path, header) as journal:
        journal.add(make_result("a.png"), OLD)
        real = journal._file

        class Full:
            def __getattr__(self, name: str) -> object:
                return getattr(real, name)

            def write(self, data: bytes) -> int:
                real.write(bytes(data)[:10])
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(journal, "_file", Full())
            with pytest.raises(InputError, match="No space left"):
                journal.add(make_result("b.png"), OLD)
        journal.add(make_result("c.png"), OLD)
    assert list(JournalIndex([path]).keys()) == ["a.png", "c.png"]


def test_several_journals_are_read_as_one(
    tmp_path: Path, header: JournalHeader, make_result: MakeResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number}.png" for number in range(12)]
    clock = 1000.0
    monkeypatch.setattr(time, "time", lambda: clock)
    paths = [tmp_path / name / "predictions.jsonl" for name in ("one", "two")]
    for number, path in enumerate(paths):
        with Journal(path, header) as journal:
            for name in names[number::3]:
                journal.add(make_result(name), OLD)
    clock = 2000.0
    # A later run, divided otherwise: one picture again because its file had changed, by a process whose journal is
    # read before the one that has the old entry.
    with Journal(paths[0], header) as journal:
        journal.add(make_result("1.png", 7), NEW)
    index = JournalIndex(paths, header)
    found = list(index.read(names))
    assert [result.file_name for result in found] == [name for name in names if int(name[:-4]) % 3 != 2]
    assert len(found[1]) == 7 and index.is_done("1.png", NEW) and not index.is_done("1.png", OLD)
    other = tmp_path / "other.jsonl"
    Journal(other, JournalHeader({}, header.class_names, header.category_ids)).close()
    with pytest.raises(InputError, match="other settings"):
        JournalIndex([*paths, other])


def test_reading_keeps_one_picture_in_memory(tmp_path: Path, header: JournalHeader, make_result: MakeResult) -> None:
    path = journal_path(tmp_path)

    def peak(count: int) -> int:
        with Journal(path, header, overwrite=True) as journal:
            for number in range(count):
                journal.add(make_result(f"{number}.png", 1000), OLD)
        tracemalloc.start()
        assert sum(len(result) for result in JournalIndex([path]).read()) == 1000 * count
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    # Ten times the pictures; what may grow is a list of offsets.
    assert peak(20) < 1.3 * peak(2)


def test_stamps(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    assert file_stamp(path) is None and file_stamp("0\0") is None
    path.write_bytes(b"abc")
    before = file_stamp(path)
    assert before is not None and before.size == 3
    os.utime(path, ns=(before.mtime_ns, before.mtime_ns + 1))
    assert file_stamp(path) != before
