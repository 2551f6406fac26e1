"""Reading ahead: order, bounds, errors in their turn, and that nothing is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from crossdino.data.images import ImageError
from crossdino.errors import InputError
from crossdino.sources import Ahead, FailedPicture, Source, open_all
from crossdino.tiling import Tile
from tests.stand_in import save_image, save_video


def test_items_come_in_order_and_only_so_many_are_made_ahead() -> None:
    made: list[int] = []
    third = threading.Event()

    def numbers() -> Iterator[int]:
        for number in range(9):
            made.append(number)
            if number == 3:
                third.set()
            yield number

    with Ahead(numbers(), depth=2) as coming:
        assert coming.take() == 0
        assert third.wait(10)  # 1 and 2 wait in the queue, 3 is in the thread's hand
        assert len(made) <= 5
        assert [coming.take() for _ in range(9)] == [1, 2, 3, 4, 5, 6, 7, 8, None]
        assert coming.take() is None and coming.take(wait=False) is None


def test_what_is_not_ready_is_not_waited_for_and_errors_come_in_their_turn() -> None:
    go = threading.Event()

    def slow() -> Iterator[int]:
        yield 1
        go.wait(10)
        yield 2
        raise RuntimeError("camera unplugged")

    with Ahead(slow(), depth=4) as coming:
        assert coming.take() == 1
        assert coming.take(wait=False) is None
        go.set()
        assert coming.take() == 2
        with pytest.raises(RuntimeError, match="unplugged"):
            coming.take()
        assert coming.take() is None


def test_leaving_ends_the_thread_although_the_queue_is_full() -> None:
    with Ahead(iter(int, 1), depth=1) as coming:  # without an end
        assert coming.take() == 0
        thread = coming._thread
    assert not thread.is_alive()


def test_open_all_goes_on_after_broken_sources(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 0)
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    video = save_video(tmp_path / "c.mp4", 6).read_bytes()
    (tmp_path / "d.avi").write_bytes(save_video(tmp_path / "d.avi", 30).read_bytes()[:-2000])
    (tmp_path / "e.mp4").write_bytes(video[: len(video) // 8])  # its table of contents is gone
    sources = [
        Source(name, str(tmp_path / name), "image" if name.endswith("png") else "video")
        for name in ("absent.png", "a.png", "b.png", "c.mp4", "d.avi", "e.mp4", "a.png")
    ]
    tasks = [(source, 4) if source.name == "c.mp4" else source for source in sources]
    found: dict[str, list[int | None]] = {}
    failed = {}
    for picture in open_all(tasks):
        if isinstance(picture, FailedPicture):
            failed[picture.source.name] = picture.frame
            with pytest.raises(ImageError, match=picture.source.name):
                _ = picture.hw
            with pytest.raises(InputError):
                picture.read(Tile(0, 0, 1, 1))
            with pytest.raises(InputError):
                picture.read_reduced((1, 1))
        else:
            assert picture.hw in ((40, 60), (48, 64))
            found.setdefault(picture.source.name, []).append(picture.frame)
    assert found.pop("d.avi") == list(range(failed["d.avi"]))  # up to the damage
    assert found == {"a.png": [None, None], "c.mp4": [4, 5]}
    assert list(failed) == ["absent.png", "b.png", "d.avi", "e.mp4"]
    assert failed["absent.png"] is None and failed["b.png"] is None and 0 < failed["d.avi"] < 30


def test_open_all_takes_only_the_first_frames(tmp_path: Path) -> None:
    from crossdino.sources import ReadOptions

    source = Source("c.mp4", str(save_video(tmp_path / "c.mp4", 9)), "video")
    for first, most, expected in ((0, 5, [0, 2, 4]), (3, 7, [4, 6]), (7, 7, [])):
        pictures = open_all([(source, first)], ReadOptions(every_frame=2), most)
        assert [picture.frame for picture in pictures] == expected
