from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossdino.errors import InputError
from crossdino.sources import ReadOptions, Source, find_sources


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    (folder / "inner" / ".cache").mkdir(parents=True)
    for name in ("b.jpg", "a 1.PNG", "ü.tif", "inner/c.jpg", "[1].jpg", ".hidden.jpg", "._b.jpg", "inner/.cache/d.jpg"):
        Image.new("RGB", (4, 3)).save(folder / name)
    (folder / "clip.MP4").write_bytes(b"")
    (folder / "notes.txt").write_text("no image")
    (folder / "labels.json").write_text("{}")
    (folder / "x.jpg").mkdir()
    return folder


def names(words: list[str], **how: bool) -> list[str]:
    sources, messages = find_sources(words, **how)
    assert messages == []
    return [source.name for source in sources]


def test_a_folder_gives_its_images_and_videos_sorted_without_hidden_ones(photos: Path) -> None:
    own = ["photos/[1].jpg", "photos/a 1.PNG", "photos/b.jpg", "photos/clip.MP4", "photos/ü.tif"]
    assert names(["photos"]) == names(["./photos/"]) == own
    assert names(["photos"], recursive=True) == sorted([*own, "photos/inner/c.jpg"])
    sources, _ = find_sources([str(photos)])
    assert [source.kind for source in sources] == ["image", "image", "image", "video", "image"]
    assert sources[0].name == (photos / "[1].jpg").as_posix()


def test_patterns(photos: Path) -> None:
    assert names(["photos/*.jpg"]) == ["photos/[1].jpg", "photos/b.jpg"]
    assert names(["photos/**/*.jpg"]) == ["photos/[1].jpg", "photos/b.jpg", "photos/inner/c.jpg"]
    assert names(["photos/*"]) == names(["photos"])  # neither the text nor the folder
    assert names(["photos/inn*"]) == ["photos/inner/c.jpg"]  # a pattern that only folders match
    assert names(["photos/[ab]*"]) == ["photos/a 1.PNG", "photos/b.jpg"]
    assert names(["photos/[1].jpg"]) == ["photos/[1].jpg"]  # a file of that very name
    assert find_sources(["photos/b.jpg", "photos/q*.jpg"])[1] == ["no image photos/q*.jpg; check the name"]


def test_the_order_is_that_of_the_words_and_nothing_comes_twice(photos: Path) -> None:
    os.symlink(photos / "b.jpg", photos.parent / "link.jpg")
    os.symlink(photos, photos.parent / "again")
    words = ["photos/ü.tif", "photos/b.jpg", "link.jpg", str(photos / "b.jpg"), "again/b.jpg", "photos/inner/../b.jpg"]
    assert names(words) == ["photos/ü.tif", "photos/b.jpg"]
    assert names(["again", "photos"])[2] == "again/b.jpg"
    assert len(names(["again", "photos"])) == len(names(["photos"]))
    os.symlink(photos, photos / "inner" / "loop")
    assert len(names(["photos"], recursive=True)) == 6


def test_a_file_is_known_by_its_content_where_its_suffix_says_nothing(photos: Path) -> None:
    (photos / "b.jpg").rename(photos / "scan")
    (photos / "film").write_bytes(b"\0\0\0\x20ftypisom" + bytes(20))
    sources, messages = find_sources(["photos/scan", "photos/film", "photos/notes.txt"])
    assert [source.kind for source in sources] == ["image", "video"]
    assert len(messages) == 1 and "photos/notes.txt is neither an image nor a video" in messages[0]


def test_numbers_are_cameras_unless_a_file_is_called_so(photos: Path) -> None:
    assert find_sources(["0", "01", "1", "0"])[0] == [
        Source("camera-0", "0", "camera"),
        Source("camera-1", "1", "camera"),
    ]
    Image.new("RGB", (4, 3)).save("0", format="PNG")
    assert find_sources(["0", "1"])[0] == [Source("0", "0", "image"), Source("camera-1", "1", "camera")]
    with pytest.raises(InputError, match="no image 2024"):  # rather a folder that is misspelt
        find_sources(["2024"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("https://example.org/a.jpg", "download it first"),
        ("s3://bucket/a.tif", "download it first"),
        ("GS://bucket/*.tif", "download it first"),
        ("ftp://host/a.tif", "download it first"),
        ("file:///photos/a.jpg", "give the path of the file"),
        ("rtsp://camera/stream", "record it to a file"),
        ("-", "standard input"),
        ("", "an empty name"),
        ("  ", "an empty name"),
        ("no.jpg", "no image no.jpg; check the name"),
        ("a\0b", "check the name"),
        ("x" * 5000, "check the name"),
        ("empty", "folder empty holds no image"),
        ("broken.jpg", "a link to nothing"),
        ("pipe.jpg", "not a regular file"),
        ("photos/labels.json", "neither an image nor a video"),
    ],
)
def test_what_stands_for_nothing_is_told(photos: Path, word: str, message: str) -> None:
    Path("empty").mkdir()
    os.symlink("nowhere", "broken.jpg")
    os.mkfifo("pipe.jpg")
    sources, messages = find_sources(["photos/b.jpg", word])
    assert [source.name for source in sources] == ["photos/b.jpg"]
    assert len(messages) == 1 and message in messages[0] and "\n" not in messages[0]
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        find_sources([word])


def test_no_word_at_all() -> None:
    with pytest.raises(InputError, match="nothing to look at"):
        find_sources([])


def test_thousands_of_files_are_not_asked_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(1000):
        (tmp_path / f"{number:05}.jpg").touch()
    asked = []
    for name in ("stat", "lstat"):
        ask = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path, *a, _ask=ask, **k: (asked.append(path), _ask(path, *a, **k))[1])
    assert len(find_sources([str(tmp_path)])[0]) == 1000
    assert len(asked) < 100


def test_sources_and_options_travel_to_other_processes() -> None:
    for one in (Source("a", "/a", "image"), ReadOptions(bands=(1, 2, 3), value_range="auto")):
        assert pickle.loads(pickle.dumps(one)) == one


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bands": (1, 2)}, "one band .grey. or three"),
        ({"bands": (0, 1, 2)}, "counted from 1"),
        ({"value_range": "full"}, "or auto"),
        ({"value_range": (5, 5)}, "a larger one"),
        ({"value_range": (0, float("nan"))}, "a larger one"),
        ({"every_frame": 0}, "at least 1"),
        ({"windowed_px": -1}, "windowed_px"),
    ],
)
def test_impossible_options(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ReadOptions(**settings)
    assert ReadOptions(bands=[np.int64(2)]).bands == (2,)  # type: ignore[arg-type]
