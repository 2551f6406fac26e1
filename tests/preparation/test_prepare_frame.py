"""What all preparations share: the folder, going on after a stop, what is refused, and the command."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from crossdino.benchmarks import BENCHMARKS, Published
from crossdino.cli import main
from crossdino.config import DataConfig
from crossdino.data import DetectionDataset, find_splits, load_dataset
from crossdino.data.coco import CocoSplit
from crossdino.errors import InputError
from crossdino.preparation import MODULES, options_of, prepare_benchmark
from crossdino.preparation import work as work_module
from tests.raw_datasets import make_aitod, make_coco, make_visdrone, make_widerperson

MAKERS: dict[str, Callable[[Path], Path]] = {
    "visdrone": make_visdrone,
    "aitod": make_aitod,
    "widerperson": make_widerperson,
    "coco": make_coco,
}
SPLITS = {"visdrone": 3, "aitod": 2, "widerperson": 2, "coco": 2}


def tree(folder: Path) -> dict[str, str]:
    """Every file and link of a folder: its content, or where it points."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root) / name
            if path.is_symlink():
                found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
            elif path.is_file():
                found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_prepared_can_be_trained_on(tmp_path: Path, name: str) -> None:
    source = MAKERS[name](tmp_path / "raw dätä")
    before = tree(source)
    output = tmp_path / "prepared dätä" / "deep"
    prepared = prepare_benchmark(name, source, output)
    assert tree(source) == before, "the raw data stay as they are"
    assert not prepared.was_there
    description = json.loads((output / "benchmark.json").read_text())
    assert description == prepared.description
    assert (description["benchmark"], description["format"]) == (name, 1)
    assert description["options"] == json.loads(json.dumps({rule.name: rule.default for rule in options_of(name)}))
    assert len(description["splits"]) == SPLITS[name]
    splits = find_splits(output)
    assert splits == {
        role: CocoSplit(output / f"annotations/{split}.json", output / f"images/{split}")
        for role, split in description["roles"].items()
    }
    for role, split in description["roles"].items():
        index = load_dataset(output, role)
        document = json.loads((output / f"annotations/{split}.json").read_text())
        assert index.num_objects == description["splits"][split]["num_objects"] > 0
        assert index.category_ids == tuple(BENCHMARKS[name].categories)
        ids = [annotation["id"] for annotation in document["annotations"]]
        assert len(set(ids)) == len(ids) and min(ids) > 0
        index.refuse_bad_boxes()
        data = DetectionDataset(index, DataConfig(test_short_side=64, test_long_side=128, num_workers=0))
        _, target = data[0]
        assert len(target.labels) == len(target.boxes_cxcywh) > 0
    # The same command again does nothing.
    seen = {path: path.stat().st_mtime_ns for path in output.rglob("*") if not path.is_symlink()}
    again = prepare_benchmark(name, source, output)
    assert again.was_there and again.description == description
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if not path.is_symlink()} == seen


class Killed(BaseException):
    pass


def kill_at(patch: pytest.MonkeyPatch, moment: int) -> None:
    """End the work at the n-th file that gets its name, just before (even n) or just after (odd n) it does.

    As after a kill, nothing is tidied up either.
    """
    replace, unlink, count = os.replace, Path.unlink, [0]

    def ending(source: Any, target: Any) -> None:
        if count[0] == moment and moment % 2 == 0:
            count[0] = -1000
            raise Killed
        replace(source, target)
        if count[0] == moment:
            count[0] = -1000
            raise Killed
        count[0] += 1

    def keeping(self: Path, missing_ok: bool = False) -> None:
        if count[0] >= 0:
            unlink(self, missing_ok)

    patch.setattr(os, "replace", ending)
    patch.setattr(Path, "unlink", keeping)


@pytest.mark.parametrize(("name", "images"), [("visdrone", "link"), ("widerperson", "copy"), ("aitod", "link")])
def test_killed_at_any_moment_it_goes_on(tmp_path: Path, name: str, images: Any) -> None:
    if name == "aitod":  # train and val are joined: a link to each image
        source = make_aitod(tmp_path / "raw", images={"train": 2, "val": 1, "test": 1})
    else:
        source = MAKERS[name](tmp_path / "raw")
    whole = prepare_benchmark(name, source, tmp_path / "whole", images=images)
    expected = tree(tmp_path / "whole")
    ended = 0
    for moment in range(100):
        output = tmp_path / f"out{moment}"
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, moment)
            try:
                prepare_benchmark(name, source, output, images=images)
                break
            except Killed:
                ended += 1
        # What is not finished does not say that it is.
        assert (output / "benchmark.json").exists() <= (tree(output).items() >= expected.items())
        assert prepare_benchmark(name, source, output, images=images).description == whole.description
        assert tree(output) == expected, moment
    assert ended > 2 * len(whole.description["splits"])


def test_a_killed_process(tmp_path: Path) -> None:
    source = make_visdrone(tmp_path / "raw", images={"train": 9, "val": 9})
    prepare_benchmark("visdrone", source, tmp_path / "whole", images="copy")
    output = tmp_path / "out"
    code = (
        "import os, time; from crossdino.preparation import prepare_benchmark; replace = os.replace\n"
        "os.replace = lambda *names: (replace(*names), time.sleep(0.1))\n"
        f"prepare_benchmark('visdrone', {str(source)!r}, {str(output)!r}, images='copy')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    until = time.monotonic() + 60
    while not (output / "images" / "val").exists():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "benchmark.json").exists()
    prepare_benchmark("visdrone", source, output, images="copy")
    assert tree(output) == tree(tmp_path / "whole")


def test_several_processes_read_the_same(tmp_path: Path) -> None:
    source = make_visdrone(tmp_path / "raw", images={"val": 150})
    calls: list[tuple[str, int, int]] = []
    for number in (1, 2):
        prepare_benchmark(
            "visdrone",
            source,
            tmp_path / f"out{number}",
            num_processes=number,
            on_progress=lambda *call: calls.append(call),
        )
    assert tree(tmp_path / "out1") == tree(tmp_path / "out2")
    assert calls[0] == ("reading val", 0, 150) and calls[150] == calls[-1] == ("reading val", 150, 150)
    (source / "VisDrone2019-DET-val/annotations/9999907_00000_d_0000007.txt").write_text("1,2\n")
    (source / "VisDrone2019-DET-val/images/9999907_00000_d_0000007.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"9999907_00000_d_0000007\.txt, line 1"):  # from another process
        prepare_benchmark("visdrone", source, tmp_path / "out3", num_processes=2)


def test_what_the_output_may_not_be(tmp_path: Path) -> None:
    source = make_visdrone(tmp_path / "raw")
    output = tmp_path / "out"
    prepare_benchmark("visdrone", source, output)
    before = tree(output)
    with pytest.raises(
        InputError, match=r"was prepared with --ignored drop, not crowd: name another --output, or delete"
    ):
        prepare_benchmark("visdrone", source, output, options={"ignored": "crowd"})
    with pytest.raises(InputError, match=r"was prepared with --images link, not --images copy"):
        prepare_benchmark("visdrone", source, output, images="copy")
    with pytest.raises(InputError, match=r"was prepared with --images link, not --without-images"):
        prepare_benchmark("visdrone", source, output, images="none")
    with pytest.raises(InputError, match=r"was prepared with source .*raw, not .*other raw"):
        prepare_benchmark("visdrone", make_visdrone(tmp_path / "other raw"), output)
    with pytest.raises(InputError, match=r"was prepared with benchmark visdrone, not coco"):
        prepare_benchmark("coco", make_coco(tmp_path / "coco"), output)
    assert tree(output) == before
    with pytest.raises(InputError, match=r"lies in the raw data .*, which stay as they are: name a folder elsewhere"):
        prepare_benchmark("visdrone", source, source / "out")
    with pytest.raises(InputError, match=r"lies in the raw data"):
        prepare_benchmark("visdrone", source, source)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"is a file; name a folder"):
        prepare_benchmark("visdrone", source, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"holds other files \(thesis\.tex\): name a new or an empty folder"):
        prepare_benchmark("visdrone", source, tmp_path / "full")
    (output / "benchmark.json").write_text('{"format": 99}')
    with pytest.raises(InputError, match=r"cannot read .*benchmark\.json \(format 99, this version writes 1\): delete"):
        prepare_benchmark("visdrone", source, output)
    with pytest.raises(InputError, match=r"nowhere does not exist; give the folder with the downloaded data"):
        prepare_benchmark("visdrone", tmp_path / "nowhere", tmp_path / "new")
    assert not (tmp_path / "new").exists(), "a mistake leaves nothing behind"


def test_options_are_checked(tmp_path: Path) -> None:
    source = make_visdrone(tmp_path / "raw")
    with pytest.raises(InputError, match=r"visdrone has no option 'ignore'; it has ignored, min_side, outside"):
        prepare_benchmark("visdrone", source, tmp_path / "out", options={"ignore": "drop"})
    with pytest.raises(InputError, match=r"--ignored is 'keep'; it is one of drop, crowd"):
        prepare_benchmark("visdrone", source, tmp_path / "out", options={"ignored": "keep"})
    with pytest.raises(InputError, match=r"unknown benchmark 'visdron'; it is one of visdrone, aitod"):
        prepare_benchmark("visdron", source, tmp_path / "out")
    with pytest.raises(InputError, match=r"images is 'hard'; it is link, copy or none"):
        prepare_benchmark("visdrone", source, tmp_path / "out", images="hard")  # type: ignore[arg-type]


def test_a_split_that_comes_later_is_added(tmp_path: Path) -> None:
    source = make_visdrone(tmp_path / "raw")
    later = (source / "VisDrone2019-DET-train").rename(tmp_path / "later")
    output = tmp_path / "out"
    first = prepare_benchmark("visdrone", source, output)
    assert first.description["roles"] == {"val": "val", "test": "test-dev"}
    assert "train" not in (output / "data.yaml").read_text()
    seen = (output / "annotations/val.json").stat().st_mtime_ns
    later.rename(source / "VisDrone2019-DET-train")
    with pytest.MonkeyPatch.context() as patch:
        kill_at(patch, 1)  # just after the first file of the new split
        with pytest.raises(Killed):
            prepare_benchmark("visdrone", source, output)
    assert not (output / "benchmark.json").exists(), "it is no longer finished"
    second = prepare_benchmark("visdrone", source, output)
    assert not second.was_there and second.notes == ()
    assert list(second.description["splits"]) == ["train", "val", "test-dev"]
    assert load_dataset(output, "train").num_objects == 38
    assert (output / "annotations/val.json").stat().st_mtime_ns == seen, "what was finished is not done again"
    prepare_benchmark("visdrone", source, tmp_path / "at once")
    assert tree(output) == tree(tmp_path / "at once")


def test_raw_data_that_were_corrected_are_read_again(tmp_path: Path) -> None:
    source = make_visdrone(tmp_path / "raw")
    prepare_benchmark("visdrone", source, tmp_path / "out")
    path = next((source / "VisDrone2019-DET-val" / "annotations").iterdir())
    path.write_text("1,2,13,14,1,4,0,0\n")
    again = prepare_benchmark("visdrone", source, tmp_path / "out")
    assert not again.was_there
    prepare_benchmark("visdrone", source, tmp_path / "anew")
    assert tree(tmp_path / "out") == tree(tmp_path / "anew")
    # As are parts of the result that were deleted.
    (tmp_path / "out" / "images" / "val").unlink()
    (tmp_path / "out" / "annotations" / "train.json").unlink()
    assert not prepare_benchmark("visdrone", source, tmp_path / "out").was_there
    assert tree(tmp_path / "out") == tree(tmp_path / "anew")


def test_copies(tmp_path: Path) -> None:
    source = make_widerperson(tmp_path / "raw")
    prepare_benchmark("widerperson", source, tmp_path / "out", images="copy")
    for split in ("train", "val"):
        document = json.loads((tmp_path / f"out/annotations/{split}.json").read_text())
        folder = tmp_path / "out/images" / split
        # Only the split's own, although the source has all in one folder.
        assert sorted(path.name for path in folder.iterdir()) == sorted(i["file_name"] for i in document["images"])
        for path in folder.iterdir():
            assert not path.is_symlink() and path.read_bytes() == (source / "Images" / path.name).read_bytes()


def test_where_links_are_impossible_images_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path, target_is_directory: bool = False) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    prepared = prepare_benchmark("visdrone", make_visdrone(tmp_path / "raw"), tmp_path / "out")
    assert [note for note in prepared.notes if "no links can be made" in note and "images are copied" in note]
    assert len(prepared.notes) == 1
    assert not (tmp_path / "out/images/val").is_symlink()
    assert len(load_dataset(tmp_path / "out", "val").records) == 2


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, real = make_visdrone(tmp_path / "raw"), Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "val.json" in self.name:
            raise OSError(28, "No space left on device")
        return real(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(
            InputError, match=r"cannot write .*val\.json: No space left on device; free some space and run"
        ):
            prepare_benchmark("visdrone", source, tmp_path / "out")
    prepare_benchmark("visdrone", source, tmp_path / "out")
    prepare_benchmark("visdrone", source, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_counts_beside_the_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"train": Published(4, 38, "us"), "val": Published(3, 18, "us"), "test-dev": Published(2, None, "us")}
    small = dataclasses.replace(BENCHMARKS["visdrone"], splits=counts, total=Published(8, 77, "all"))
    monkeypatch.setitem(BENCHMARKS, "visdrone", small)
    source = make_visdrone(tmp_path / "raw")
    assert main(["prepare", "visdrone", str(source), "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "4 images ✓" in text and "38 objects ✓" in text and "2 images ✓" in text
    assert "3 images, found 2 (-1)" in text and "18 objects, found 19 (+1)" in text
    assert "objects: no number known (19 found)" in text
    assert "not the published numbers: val has 2 instead of 3 images, 19 instead of 18 objects (us)" in text
    assert "not the published numbers: together has 76 instead of 77 objects (all)" in text and "8 images ✓" in text
    assert "train has" not in text and "test-dev has" not in text
    assert text.count("is not comparable with the literature") == 1
    assert "2 category 0" in text and "4 category 11" in text and "2 score 0" in text
    entry = json.loads((tmp_path / "out/benchmark.json").read_text())["splits"]["val"]
    assert entry["checks"] == [
        {"what": "images", "found": 2, "published": 3, "source": "us"},
        {"what": "objects", "found": 19, "published": 18, "source": "us"},
    ]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_widerperson(tmp_path / "raw")
    words = ["prepare", "widerperson", str(source), "--output", str(tmp_path / "out"), "--min-height", "25"]
    words += ["--ignored", "2,3", "--splits", "val", "--processes", "1"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "rules: objects 1, ignored 2,3, min_height 25, corners inclusive" in text
    assert f"{tmp_path / 'out'} is finished" in text.replace("\n", "")
    assert "recipes --benchmark widerperson; input in the literature: between 1000 x 600" in text.replace("\n", "")
    options = json.loads((tmp_path / "out/benchmark.json").read_text())["options"]
    assert (options["ignored"], options["min_height"]) == ([2, 3], 25)
    assert main(words) == 0
    assert "is there already: nothing was done" in capsys.readouterr().out
    assert main([*words[:4], str(tmp_path / "out")]) == 2
    assert "was prepared with --ignored 2,3, not 2,3,4,5" in capsys.readouterr().err
    for wrong, message in (
        (["--ignored", "2,6"], "--ignored: 2,6 must be labels from 1 to 5"),
        (["--min-height", "-3"], "--min-height: -3 must be a whole number of 0 or more"),
        (["--ingored", "2"], "unknown argument '--ingored'; did you mean '--ignored'?"),
        (["--images", "copy", "--without-images"], "not allowed with argument --images"),
    ):
        assert main([*words[:3], "--output", str(tmp_path / "new"), *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["prepare", "widerpersons", str(source)]) == 2
    assert "invalid choice: 'widerpersons'" in capsys.readouterr().err


def test_it_starts_without_torch() -> None:
    code = "import sys; from crossdino.preparation import MODULES, options_of; list(map(options_of, MODULES)); "
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    words = [sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"]
    assert subprocess.run(words, env=environment).returncode == 0


@pytest.mark.parametrize("name", MODULES)
def test_help_explains_every_rule(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prepare", name, "--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for rule in options_of(name):
        assert rule.flag in text
        assert " ".join(rule.help.split()) in text.replace("- ", "-") or rule.help[:30] in text
    assert "--output" in text and "--splits" in text and "--without-images" in text


def test_roles_of_what_there_is(tmp_path: Path) -> None:
    source = make_aitod(tmp_path / "raw", images={"train": 2, "val": 2, "test": 1})
    prepared = prepare_benchmark("aitod", source, tmp_path / "out", splits=["train", "val"])
    # The literature trains on trainval; without it train and val play their own parts.
    assert prepared.description["roles"] == {"train": "train", "val": "val"}
    assert prepared.description["total_checks"] == []
    assert len(find_splits(tmp_path / "out")) == 2


def test_images_of_a_source_that_moved_are_asked_for(tmp_path: Path) -> None:
    source = make_visdrone(tmp_path / "raw")
    prepare_benchmark("visdrone", source, tmp_path / "out")
    moved = source.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"was prepared with source .*raw, not .*moved"):
        prepare_benchmark("visdrone", moved, tmp_path / "out")


def test_a_full_disk_is_not_taken_for_a_damaged_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(file: Path, place: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))  # as shutil tells it

    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(InputError, match=r"cannot write .*out.*: No space left on device; free some space and run"):
        prepare_benchmark("visdrone", make_visdrone(tmp_path / "raw"), tmp_path / "out", images="copy")


def test_a_second_run_at_the_same_time_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copyfile

    def copy_and_lose(file: Path, place: Path) -> None:
        copy(file, place)
        place.unlink()  # the other run gave it its name

    monkeypatch.setattr(shutil, "copyfile", copy_and_lose)
    with pytest.raises(InputError, match=r"No such file or directory; if another run writes there, let it end and run"):
        prepare_benchmark("visdrone", make_visdrone(tmp_path / "raw"), tmp_path / "out", images="copy")


def test_the_version_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(work_module, "version", lambda name: "9.8.7")
    prepare_benchmark("visdrone", make_visdrone(tmp_path / "raw"), tmp_path / "out")
    assert json.loads((tmp_path / "out/benchmark.json").read_text())["crossdino"] == "9.8.7"
    assert json.loads((tmp_path / "out/annotations/val.json").read_text())["info"]["crossdino"] == "9.8.7"


def test_an_image_of_which_the_exif_data_turn_it(tmp_path: Path) -> None:
    source = make_visdrone(tmp_path / "raw", images={"val": 1})
    path = next((source / "VisDrone2019-DET-val" / "images").iterdir())
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 50)).save(path, exif=exif)
    prepare_benchmark("visdrone", source, tmp_path / "out")
    image = json.loads((tmp_path / "out/annotations/val.json").read_text())["images"][0]
    assert (image["width"], image["height"]) == (50, 90), "as OpenCV, with which the toolkits read, shows it"
