"""The check of image files and its memory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossdino.data import check
from crossdino.data.check import check_images, hash_file


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were decoded (list.append is safe among threads)."""
    names: list[str] = []
    original = check.read_sizes

    def counted(path: Path, decode: bool = False) -> tuple[tuple[int, int], tuple[int, int]]:
        if decode:
            names.append(path.name)
        return original(path, decode)

    monkeypatch.setattr(check, "read_sizes", counted)
    return names


def draw(folder: Path, count: int = 6, first: int = 0) -> list[Path]:
    """Images of different content and size, the first of them turned by its EXIF data."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(first)
    paths = [folder / f"{first + number}.png" for number in range(count)]
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, path in enumerate(paths):
        pixels = rng.integers(0, 255, (30, 40 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, **({"exif": exif} if number == 0 else {}))
    return paths


def test_second_run_decodes_nothing(tmp_path: Path, decoded: list[str]) -> None:
    paths = draw(tmp_path / "a")
    first = check_images(paths, "full")
    assert sorted(decoded) == [path.name for path in paths]
    assert first[0].shown_wh == (30, 40) and first[0].stored_wh == (40, 30)
    assert [fact.shown_wh for fact in first[1:]] == [(40 + number, 30) for number in range(1, 6)]
    assert [fact.digest for fact in first] == [hash_file(path) for path in paths]
    decoded.clear()
    assert check_images(paths, "full") == first and decoded == []
    moved = tmp_path / "elsewhere"  # it is the content that counts
    shutil.move(tmp_path / "a", moved)
    assert check_images([moved / path.name for path in paths], "full") == first and decoded == []


def test_headers_decode_and_remember_nothing(tmp_path: Path, decoded: list[str], own_cache: Path) -> None:
    paths = draw(tmp_path)
    assert [fact.shown_wh[0] for fact in check_images(paths)] == [30, 41, 42, 43, 44, 45]
    assert decoded == [] and not list(own_cache.iterdir())


def test_a_changed_byte_is_noticed(tmp_path: Path, decoded: list[str]) -> None:
    paths = draw(tmp_path)
    check_images(paths, "full")
    decoded.clear()
    times = paths[3].stat().st_mtime_ns
    data = bytearray(paths[3].read_bytes())
    data[len(data) // 2] ^= 1
    paths[3].write_bytes(data)
    os.utime(paths[3], ns=(times, times))  # neither the time nor the length tells
    facts = check_images(paths, "full")
    assert decoded == ["3.png"] and facts[3].what == "broken image"
    assert [fact.what for fact in facts].count("") == 5
    check_images(paths, "full")
    assert decoded == ["3.png"] * 2  # what could not be decoded is tried again


def cut(text: bytes) -> bytes:
    return text[: len(text) // 2]


def change_a_size(text: bytes) -> bytes:
    return text.replace(b" 41 30 41 30 ", b" 77 30 77 30 ")


@pytest.mark.parametrize(
    ("damage", "num_decoded"),
    [
        (lambda text: b"", 6),
        (lambda text: b"\xff\x00 nonsense\n" * 9, 6),
        (lambda text: b"crossdino images 0, pillow 1\n" + text.partition(b"\n")[2], 6),  # another version
        (lambda text: text + b"\n  \n 00000000\n1 2 3\n", 0),
        (cut, 4),  # two whole lines are left
        (change_a_size, 1),
    ],
)
def test_a_damaged_memory_is_harmless(
    tmp_path: Path, decoded: list[str], own_cache: Path, damage: Callable[[bytes], bytes], num_decoded: int
) -> None:
    paths = draw(tmp_path)
    first = check_images(paths, "full")
    (file,) = (own_cache / "images").iterdir()
    # In the order of the images, so that it is known which lines are cut off.
    file.write_bytes(damage(file.read_bytes()))
    decoded.clear()
    assert check_images(paths, "full") == first
    assert len(decoded) == num_decoded
    decoded.clear()
    assert check_images(paths, "full") == first and decoded == []


def test_without_a_folder_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[str]) -> None:
    paths = draw(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CROSSDINO_CACHE", str(tmp_path / "file"))  # a file where a folder should be
    for _ in range(2):
        assert not any(fact.what for fact in check_images(paths, "full"))
    assert len(decoded) == 12


def test_folder_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = draw(tmp_path / "data", 1)
    for variables, place in [
        ({"CROSSDINO_CACHE": "own", "XDG_CACHE_HOME": "xdg", "HOME": "home"}, "own/images"),
        ({"XDG_CACHE_HOME": "xdg", "HOME": "home"}, "xdg/crossdino/images"),
        ({"HOME": "home"}, "home/.cache/crossdino/images"),
    ]:
        for name in ("CROSSDINO_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, folder in variables.items():
            monkeypatch.setenv(name, str(tmp_path / folder))
        check_images(paths, "full")
        assert len(list((tmp_path / place).glob("*.txt"))) == 1


def test_several_processes_at_once(tmp_path: Path) -> None:
    """Nothing of what any of them wrote is lost, even if two of them put the same files together."""
    digests = iter(f"{number:032x}" for number in range(1000))

    def facts() -> list[check.ImageFacts]:
        return [check.ImageFacts((3, 4), (4, 3), digest=next(digests)) for _ in range(2)]

    for _ in range(check.MAX_FILES):
        check._Memory(tmp_path).add(facts())
    at_once = [check._Memory(tmp_path) for _ in range(3)]  # all of them have read before one of them writes
    for memory in at_once:
        memory.add(facts())
    later = check._Memory(tmp_path)
    assert len(later.sizes_of) == 2 * check.MAX_FILES + 6 and set(later.sizes_of.values()) == {(3, 4, 4, 3)}
    assert len(list(tmp_path.iterdir())) == 3
    at_once[0].folder = tmp_path  # whose files are gone by now
    at_once[0].add(facts())
    assert len(check._Memory(tmp_path).sizes_of) == 2 * check.MAX_FILES + 8


def test_many_files_are_put_together(
    tmp_path: Path, decoded: list[str], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = draw(tmp_path, 2 * check.MAX_FILES)
    for path in paths:
        check_images([path], "full")
    files = list((own_cache / "images").iterdir())
    assert len(files) <= check.MAX_FILES and all(file.suffix == ".txt" for file in files)
    decoded.clear()
    check_images(paths, "full")
    assert decoded == []
    # Beyond the limit the oldest are forgotten.
    monkeypatch.setattr(check, "MAX_ENTRIES", 8)
    check_images(draw(tmp_path / "more", 3, first=100), "full")
    decoded.clear()
    facts = check._Memory(own_cache / "images").sizes_of
    assert len(facts) == 8
    check_images(list((tmp_path / "more").iterdir()), "full")
    assert decoded == []


def test_what_cannot_be_used_is_told(tmp_path: Path) -> None:
    good, cut_off, text, folder, absent, deep = (tmp_path / f"{name}.png" for name in "abcdef")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(good)
    cut_off.write_bytes(good.read_bytes()[:5000])
    text.write_text("no image")
    folder.mkdir()
    Image.fromarray(np.ones((4, 4), np.float32)).save(deep, format="TIFF")
    paths = [good, cut_off, text, folder, absent, deep]
    expected = ["", "broken image", "not an image", "broken image", "image is missing", "pixels without a known range"]
    assert [fact.what for fact in check_images(paths, "full")] == expected
    assert [fact.what for fact in check_images(paths)] == ["", "", *expected[2:]]  # a header tells no damage


def test_progress_is_told(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    check_images(draw(tmp_path), "full", lambda done, total: seen.append((done, total)))
    assert seen == [(number, 6) for number in range(1, 7)]


def test_a_stopped_check_goes_on_from_there(tmp_path: Path, decoded: list[str]) -> None:
    paths = draw(tmp_path)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_images(paths, "full", stop)
    decoded.clear()
    check_images(paths, "full")
    assert set(decoded) <= {"3.png", "4.png", "5.png"}
