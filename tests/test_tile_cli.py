"""`crossdino tile`: what a user types first, second and by mistake."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crossdino.cli.tile import add_options, run_tile
from crossdino.data import load_dataset
from crossdino.errors import InputError


def tile(*words: str | Path) -> int:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return run_tile(parser.parse_args([str(word) for word in (*words, "--workers", "1")]))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with train and val in COCO's layout: images of 100 x 120, of which a corner holds small objects."""
    folder = tmp_path / "data"
    for split, numbers in (("train", (1, 2)), ("val", (3,))):
        (folder / split).mkdir(parents=True)
        for number in numbers:
            Image.fromarray(np.full((100, 120, 3), number, np.uint8)).save(folder / split / f"{number}.png")
        boxes = [[5 * place, 3, 4, 4] for place in range(5)]
        document = {
            "images": [{"id": n, "file_name": f"{split}/{n}.png", "width": 120, "height": 100} for n in numbers],
            "annotations": [
                {"id": number * 10 + place, "image_id": number, "category_id": 4, "bbox": box, "area": 16, "iscrowd": 0}
                for number in numbers
                for place, box in enumerate(boxes)
            ],
            "categories": [{"id": 4, "name": "a"}],
        }
        (folder / f"{split}.json").write_text(json.dumps(document))
    return folder


def test_a_data_set_is_cut_split_by_split(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert tile(data, "--output", out, "--tile-size", "64", "--tile-overlap", "16") == 0
    # 2 x 3 tiles an image. Of the training images two tiles hold objects, and a quarter of that is no tile;
    # those to measure on keep all.
    train, val = load_dataset(out, "train"), load_dataset(out, "val")
    assert (len(train.records), len(val.records)) == (2, 6)
    assert (train.num_objects, val.num_objects) == (10, 5)
    text = capsys.readouterr().out
    assert "2 images in 2 tiles of 64 px overlapping by 16 px or more, 10 without objects left out" in text
    assert "1 images in 6 tiles" in text
    # Again: nothing to do.
    assert tile(data, "--output", out, "--tile-size", "64", "--tile-overlap", "16") == 0
    assert "2 images (2 of them before)" in capsys.readouterr().out
    with pytest.raises(InputError, match="cut with tile_size 64, not 56"):
        tile(data, "--output", out, "--tile-size", "56")
    # Single splits and all empty tiles.
    other = tmp_path / "other"
    assert (
        tile(data, "--output", other, "--tile-size", "64", "--tile-overlap", "16", "--split", "train", "--empty", "all")
        == 0
    )
    assert len(load_dataset(other, "train").records) == 12 and not (other / "val.json").exists()


def test_a_single_file_keeps_its_name(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, number in (("train", 2), ("val", 6)):
        path = data / f"{name}.json"
        assert tile(path, "--output", out, "--tile-size", "64", "--tile-overlap", "16", "--images", data) == 0
        assert len(load_dataset(out, name).records) == number
    assert tile(data / "val.json", "--output", tmp_path / "few", "--tile-size", "64", "--empty", "0") == 0
    assert len(load_dataset(tmp_path / "few" / "val.json").records) == 1


def test_auto_is_chosen_by_the_training_data(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Path) -> None:
    with pytest.raises(InputError, match="well enough, there is nothing to cut"):
        tile(data, "--output", tmp_path / "out", "--tile-size", "auto")
    assert not (tmp_path / "out").exists()
    big = tmp_path / "big"
    (big / "train").mkdir(parents=True)
    Image.new("L", (4000, 3000)).save(big / "train" / "1.png")
    boxes = [[20 * place, 30, 12, 12] for place in range(100)]
    document = {
        "images": [{"id": 1, "file_name": "train/1.png", "width": 4000, "height": 3000}],
        "annotations": [{"id": n, "image_id": 1, "category_id": 4, "bbox": box} for n, box in enumerate(boxes)],
        "categories": [{"id": 4, "name": "a"}],
    }
    (big / "train.json").write_text(json.dumps(document))
    capsys.readouterr()
    assert tile(big, "--output", tmp_path / "out", "--tile-size", "auto", "--empty", "0") == 0
    text = capsys.readouterr().out
    # 12 px objects shall have 16 px: 800 / (16 / 12) = 600, in steps of 32.
    assert "--tile-size auto: 576 px, overlapping by 32 px" in text and "of 576 px overlapping by 32 px" in text
    assert {record.width for record in load_dataset(tmp_path / "out", "train").records} == {576}


def test_the_source_is_never_written_to(data: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(data)
    places = [(data, data), (data, data / "tiles"), (data, link / "tiles"), (data / "val.json", data)]
    places.append((data / "val.json", data / "val" / "tiles"))
    (data / "train.json").rename(data / "train" / "annotations.json")
    (data / "train" / "annotations.json").write_text(
        (data / "train" / "annotations.json").read_text().replace("train/", "")
    )
    before = sorted(data.rglob("*"))
    for source, out in places:
        with pytest.raises(InputError, match="--output .* would (put tiles among the images of|replace) "):
            tile(source, "--output", out, "--tile-size", "64")
    # The source is where the tiles of its only split would go.
    with pytest.raises(InputError, match="--output .* would put tiles among"):
        tile(data / "train", "--output", data, "--tile-size", "64")
    assert sorted(data.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tile-size", "0"], "--tile-size is 0"),
        (["--tile-size", "64", "--tile-overlap", "64"], "cannot overlap by 64 px"),
        (["--tile-size", "64", "--split", "test"], "has no split 'test', only train, val"),
        (["--tile-size", "64", "--images", "x"], "--images goes with a COCO JSON file only"),
        (["--tile-size", "64", "--keep", "2"], "--keep is 2.0"),
        (["--tile-size", "128", "--quality", "101"], "--quality is 101"),
    ],
)
def test_mistakes_write_nothing(data: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tile(data, "--output", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_a_broken_image_ends_with_status_1(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "train" / "1.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert tile(data, "--output", tmp_path / "out", "--tile-size", "64") == 1
    assert f"warning: left out: image {path} is broken" in capsys.readouterr().out.replace("\n", " ")
    assert len(load_dataset(tmp_path / "out", "train").records) == 1
