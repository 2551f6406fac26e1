"""`prepare sodad`: what is written, against the plain version of the rules; runs that are stopped or go wrong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from crossdino.data import load_dataset
from crossdino.errors import InputError
from crossdino.evaluation.sodad import merge_patches
from crossdino.preparation import prepare_benchmark, sodad_cutting
from tests.raw_sodad import NAMES, REGION, make_sodad
from tests.reference.sodad_split_plain import split_plain

SPLITS = ("train", "val", "test")
SMALL = {"patch": 40, "overlap": 8, "image_format": "png"}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sodad(tmp_path_factory.mktemp("raw") / "sodad")


@pytest.fixture(scope="module")
def prepared(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set by the literature's rules."""
    return prepare_benchmark("sodad", raw, tmp_path_factory.mktemp("out") / "sodad").output


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_small(tmp_path / "small")


def make_small(folder: Path) -> Path:
    """Images of a few patches of 40 px, with boxes of all kinds; files that keep every pixel."""
    rng = np.random.default_rng(7)
    (folder / "Images").mkdir(parents=True)
    (folder / "Annotations").mkdir()
    number = 0
    for split in SPLITS:
        images, annotations = [], []
        for width, height in ((40, 40), (41, 72), (73, 39), (20, 15), (120, 90), (97, 30), (50, 50)):
            number += 1
            images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
            pixels = rng.integers(1, 255, (height, width, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "Images" / f"{number}.png")
            for _ in range(0 if (width, height) == (50, 50) else int(rng.integers(1, 14))):
                box = [*rng.uniform(-8, (width, height)).tolist(), *rng.uniform(1, 30, 2).tolist()]
                box = box if rng.random() < 0.3 else [int(value) for value in box]
                category = int(rng.choice([1, 4, 9, REGION]))
                annotations.append({"id": 100 + len(annotations), "image_id": number, "category_id": category})
                annotations[-1] |= {"bbox": box, "area": box[2] * box[3]}
        rng.shuffle(annotations)  # so the images do not come in the order of their numbers
        document = {"images": images, "annotations": annotations}
        (folder / "Annotations" / f"{split}.json").write_text(json.dumps(document))
    return folder


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def pixels_of(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(path).convert("RGB"))


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder by their names, without the place of the source."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def count_cuts(monkeypatch: pytest.MonkeyPatch, fail_after: int = 10**9) -> list[str]:
    """The patches that are cut from now on; after so many of them the run is killed."""
    done: list[str] = []
    original = sodad_cutting.cut_patch

    def counted(image: Any, patch: Any, rules: Any) -> Any:
        if len(done) == fail_after:
            raise KeyboardInterrupt
        done.append(f"{patch.left} {patch.top}")
        return original(image, patch, rules)

    monkeypatch.setattr(sodad_cutting, "cut_patch", counted)
    return done


def assert_equals_plain(raw: Path, output: Path, split: str, sizes: dict[str, Any], suffix: str) -> int:
    """Names, places, boxes and flags of all patches of a split; returns the number of pieces."""
    document = read(output / "annotations" / f"{split}.json")
    plain = split_plain(read(raw / "Annotations" / f"{split}.json"), None, split == "train", **sizes)
    side = sizes.get("size", 800)
    assert document["images"] == [
        {
            "id": number,
            "file_name": f"{one['name']}.{suffix}",
            "width": side,
            "height": side,
            "ori_id": one["ori_id"],
            "start_coord": one["start"],
        }
        for number, one in enumerate(plain, start=1)
    ]
    numbers = [one["id"] for one in [*document["annotations"], *document["pieces"]]]
    assert numbers == list(range(1, len(numbers) + 1))
    expected = [
        (number, category, box, box[2] * box[3], flagged)
        for number, one in enumerate(plain, start=1)
        for box, category, flagged in one["pieces"]
    ]
    for key, wanted in (("annotations", False), ("pieces", True)):
        found = [(one["image_id"], one["category_id"], one["bbox"], one["area"]) for one in document[key]]
        assert found == [row[:4] for row in expected if row[4] == wanted]
        assert all(one["iscrowd"] == 0 and one.get("ignore", False) == wanted for one in document[key])
    assert sorted(path.name for path in (output / "images" / split).iterdir()) == sorted(
        image["file_name"] for image in document["images"]
    )
    return len(expected)


def test_every_patch_and_pixel_equals_the_plain_version(small: Path, tmp_path: Path) -> None:
    output = prepare_benchmark("sodad", small, tmp_path / "out", options=SMALL).output
    sources = {int(path.stem): pixels_of(path) for path in (small / "Images").iterdir()}
    sizes: dict[str, Any] = {"size": 40, "overlap": 8}
    pieces = blackened = 0
    for split in SPLITS:
        pieces += assert_equals_plain(small, output, split, sizes, "png")
        document = read(small / "Annotations" / f"{split}.json")
        plain = split_plain(
            document, lambda image, y, x: tuple(sources[image][y, x].tolist()), split == "train", **sizes
        )
        for one in plain:
            found = pixels_of(output / "images" / split / f"{one['name']}.png")
            assert np.array_equal(found, np.array(one["pixels"], np.uint8))
            blackened += int((found == 0).all(axis=2).sum())
    assert pieces > 150 and blackened > 10_000


def test_the_literatures_patches(raw: Path, prepared: Path) -> None:
    pieces = [assert_equals_plain(raw, prepared, split, {}, "jpg") for split in SPLITS]
    assert min(pieces) > 10
    # By hand: 1000 x 820 is 2 x 2 patches, 1300 x 900 ends within one, the padded one; nothing of the other two.
    names = [image["file_name"] for image in read(prepared / "annotations" / "train.json")["images"]]
    assert names == [*(f"00001_{number}.jpg" for number in range(4)), "00002_0.jpg", "00003_0.jpg"]
    starts = [image["start_coord"] for image in read(prepared / "annotations" / "test.json")["images"]]
    assert starts == [[x, y] for x in (0, 650, 651) for y in (0, 200)] + [[0, 0], [0, 0]]
    train = read(prepared / "annotations" / "train.json")
    # The piece of 0.4 of a box at 194 in the patch that begins at 200.
    assert [4 * 10, True] in [[one["area"], one["ignore"]] for one in train["pieces"] if one["category_id"] == 5]
    assert train["info"]["benchmark"] == "sodad" and train["info"]["options"]["overlap"] == 150


def test_the_jpegs_are_those_of_opencv(raw: Path, prepared: Path) -> None:
    """The settings of `cv2.imwrite`: quality 95, colours at half the resolution."""
    for path in (prepared / "images" / "test").iterdir():
        with Image.open(path) as image:
            assert image.size == (800, 800)
            assert [layer[1:3] for layer in image.layer] == [(2, 2), (1, 1), (1, 1)]  # type: ignore[attr-defined]
            # The standard's 16 11 10 16 24 40 51 61, a tenth of each, rounded.
            assert image.quantization[0][:8] == [2, 1, 1, 2, 2, 4, 5, 6]  # type: ignore[attr-defined]
    whole, patch = pixels_of(raw / "Images" / "00009.jpg"), pixels_of(prepared / "images" / "test" / "00009_3.jpg")
    # A part without ignore regions; encoding it a second time costs a level or so.
    assert np.abs(whole[700:900, 900:1100].astype(int) - patch[500:700, 250:450]).mean() < 2


def test_originals_lack_only_the_ignore_regions(raw: Path, prepared: Path) -> None:
    for split in SPLITS:
        before, after = (
            read(raw / "Annotations" / f"{split}.json"),
            read(prepared / "annotations" / f"{split}_originals.json"),
        )
        kept = [one for one in before["annotations"] if one["category_id"] != REGION]
        if split == "test":  # whose numbers begin with 0
            kept = [{**one, "id": number} for number, one in enumerate(kept, start=1)]
        assert after["annotations"] == kept and after["images"] == before["images"]
        assert after["categories"] == [{"id": number, "name": name} for number, name in enumerate(NAMES[:9], start=1)]
        assert len(COCO(str(prepared / "annotations" / f"{split}_originals.json")).getAnnIds()) == len(kept)


def test_other_values_of_the_raw_file_stay(small: Path, tmp_path: Path) -> None:
    path = small / "Annotations" / "val.json"
    document = read(path)
    document["annotations"][0] |= {"category_id": 3, "ignore": 1, "iscrowd": 1, "truncated": True}
    document |= {"licenses": ["x"], "info": "theirs"}
    path.write_text(json.dumps(document))
    output = prepare_benchmark("sodad", small, tmp_path / "out", options=SMALL, splits=["val"]).output
    after = read(output / "annotations" / "val_originals.json")
    assert after["annotations"][0] == document["annotations"][0] and after["licenses"] == ["x"]
    assert [one["id"] for one in after["annotations"]] == [
        one["id"] for one in document["annotations"] if one["category_id"] != REGION
    ]


def test_other_names_of_categories_are_told(small: Path, tmp_path: Path, prepared: Path) -> None:
    path = small / "Annotations" / "val.json"
    names = ["People", "rider", "bicycle", "motor", "vehicle", "traffic sign", "trafficLight", "dog", "warning_cone"]
    document = read(path) | {"categories": [{"id": number, "name": name} for number, name in enumerate(names, start=1)]}
    path.write_text(json.dumps(document))
    output = prepare_benchmark("sodad", small, tmp_path / "out", options=SMALL, splits=["val"]).output
    notes = [note for note in read(output / "benchmark.json")["splits"]["val"]["notes"] if "calls" in note]
    assert len(notes) == 1 and "calls category 8 'dog' instead of 'traffic-camera': check" in notes[0]
    assert not any("calls" in note for note in read(prepared / "benchmark.json")["splits"]["val"]["notes"])


def test_what_is_found_in_the_patches_becomes_the_originals(prepared: Path) -> None:
    """Every object that its image shows whole is whole in some patch, and comes back from there to its place."""
    for split in ("val", "test"):
        document = read(prepared / "annotations" / f"{split}.json")
        originals = read(prepared / "annotations" / f"{split}_originals.json")
        sizes = {image["id"]: (image["width"], image["height"]) for image in originals["images"]}
        wanted = {
            (one["image_id"], one["category_id"], *one["bbox"])
            for one in originals["annotations"]
            if min(one["bbox"]) >= 0
            and all(one["bbox"][i] + one["bbox"][i + 2] <= sizes[one["image_id"]][i] for i in (0, 1))
        }
        merged = merge_patches([{**one, "score": 0.5} for one in document["annotations"]], document, iou=1.0)
        found = {(one["image_id"], one["category_id"], *(round(side, 1) for side in one["bbox"])) for one in merged}
        assert len(wanted) > 8 and wanted <= found


def test_the_data_set_can_be_trained_on(prepared: Path) -> None:
    for split in SPLITS:
        document = read(prepared / "annotations" / f"{split}.json")
        index = load_dataset(prepared, split)
        assert index.class_names == NAMES[:9] and len(index.records) == len(document["images"])
        assert sum(len(record.labels) for record in index.records) == len(document["annotations"])
        assert not any(record.iscrowd.any() for record in index.records)
        assert set(index.problems.counts) <= {"class without any box", "image without any object"}


def test_benchmark_json_counts(raw: Path, prepared: Path) -> None:
    entry = read(prepared / "benchmark.json")["splits"]["test"]
    document = read(raw / "Annotations" / "test.json")
    regions = sum(one["category_id"] == REGION for one in document["annotations"])
    assert entry["originals"] == "annotations/test_originals.json" and entry["dropped"] == {"category 10": regions}
    assert {check["what"]: (check["found"], check["published"]) for check in entry["checks"]} == {
        "images": (4, None),
        "objects": (len(document["annotations"]) - regions, None),
        "patches": (8, 161_579),
    }
    assert (entry["num_images"], entry["num_ignored"]) == (8, 0)
    assert any("images without any annotation: 1;" in note for note in entry["notes"])
    assert any("numbered from 1" in note for note in entry["notes"])


@pytest.mark.parametrize(("value", "num_crowds"), [("background", 0), ("ignore", 1)])
def test_flagged_pieces_as_regions_to_ignore(small: Path, tmp_path: Path, value: str, num_crowds: int) -> None:
    output = prepare_benchmark("sodad", small, tmp_path / "out", options={**SMALL, "pieces": value}).output
    default = split_plain(read(small / "Annotations" / "test.json"), None, False, size=40, overlap=8)
    flagged = sum(piece[2] for one in default for piece in one["pieces"])
    document = read(output / "annotations" / "test.json")
    crowds = [one for one in document["annotations"] if one["iscrowd"]]
    assert flagged > 5 and len(crowds) == flagged * num_crowds and all(one["ignore"] for one in crowds)
    assert len(document["pieces"]) == flagged * (1 - num_crowds)
    index = load_dataset(output, "test")
    assert sum(int(record.iscrowd.sum()) for record in index.records) == len(crowds)
    assert read(output / "benchmark.json")["splits"]["test"]["num_ignored"] == len(crowds)


def test_regions_can_stay_visible_and_be_ignored(small: Path, tmp_path: Path) -> None:
    output = prepare_benchmark("sodad", small, tmp_path / "out", options={**SMALL, "regions": "crowd"}).output
    document = read(output / "annotations" / "test.json")
    raw_document = read(small / "Annotations" / "test.json")
    sources = {image["id"]: pixels_of(small / "Images" / image["file_name"]) for image in raw_document["images"]}
    crowds = 0
    for image in document["images"]:
        left, top = image["start_coord"]
        shown = sources[image["ori_id"]][top : top + 40, left : left + 40]
        found = pixels_of(output / "images" / "test" / image["file_name"])
        assert np.array_equal(found[: shown.shape[0], : shown.shape[1]], shown)
        for one in raw_document["annotations"]:
            x, y, width, height = one["bbox"]
            if one["image_id"] != image["ori_id"] or one["category_id"] != REGION:
                continue
            box = [max(x, left), max(y, top), min(x + width, left + 40), min(y + height, top + 40)]
            if box[0] < box[2] and box[1] < box[3]:
                clipped = [box[0] - left, box[1] - top, box[2] - box[0], box[3] - box[1]]
                mine = [a for a in document["annotations"] if a["image_id"] == image["id"] and a["iscrowd"]]
                assert {a["category_id"] for a in mine if a["bbox"] == clipped} == set(range(1, 10))
                crowds += 9
    assert crowds == sum(one["iscrowd"] for one in document["annotations"]) > 0


def test_training_images_whole_and_patches_without_objects(small: Path, tmp_path: Path) -> None:
    options = {**SMALL, "extent_margin": "whole", "empty": "keep", "unannotated": "keep"}
    output = prepare_benchmark("sodad", small, tmp_path / "out", options=options, splits=["train"]).output
    document = read(output / "annotations" / "train.json")
    raw_document = read(small / "Annotations" / "train.json")
    per_image = {image["id"]: 0 for image in raw_document["images"]}
    for image in document["images"]:
        per_image[image["ori_id"]] += 1
    # 40x40, 41x72, 73x39, 20x15, 120x90, 97x30, 50x50 with patches of 40 px every 32
    assert list(per_image.values()) == [1, 4, 3, 1, 12, 3, 4]
    assert document["images"][-1]["ori_id"] == 7, "images without annotations come last"


def test_a_larger_share_and_margin(small: Path, tmp_path: Path) -> None:
    options = {**SMALL, "ignore_ratio": 0.75, "extent_margin": 17}
    output = prepare_benchmark("sodad", small, tmp_path / "out", options=options, splits=["train"]).output
    sizes = {"size": 40, "overlap": 8, "share": Fraction(3, 4), "margin": 17}
    assert_equals_plain(small, output, "train", sizes, "png")


def test_a_stopped_run_goes_on_and_ends_the_same(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare_benchmark("sodad", small, tmp_path / "whole", options=SMALL).output
    total = sum(len(read(whole / "annotations" / f"{split}.json")["images"]) for split in SPLITS)
    output, made = tmp_path / "out", 0
    for fail_after in (0, 5, 30):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            done = count_cuts(patch, fail_after)
            prepare_benchmark("sodad", small, output, options=SMALL)
        made += len(done)
        assert not (output / "benchmark.json").exists()
    done = count_cuts(monkeypatch)
    prepare_benchmark("sodad", small, output, options=SMALL)
    assert len(done) == total - made, "no patch is made twice"
    assert content(output) == content(whole)
    prepare_benchmark("sodad", small, output, options=SMALL)
    assert len(done) == total - made and content(output) == content(whole)
    lost = [output / "images" / "val" / "12_1.png", output / "images" / "test" / "15_0.png"]
    for path in lost:
        path.unlink()
    prepare_benchmark("sodad", small, output, options=SMALL)
    assert len(done) == total - made + 2 and content(output) == content(whole), "patches that got lost are made again"


def test_several_processes_write_the_same(small: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    one = prepare_benchmark("sodad", small, tmp_path / "one", options=SMALL, splits=["val"]).output
    two = prepare_benchmark(
        "sodad", small, tmp_path / "two", options=SMALL, splits=["val"], num_processes=2,
        on_progress=lambda *values: seen.append(values),
    ).output  # fmt: skip
    assert content(one) == content(two)
    assert [done for what, done, total in seen if what == "cutting val" and total == 6] == list(range(7))


def test_patches_of_data_that_changed_are_made_anew(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at_the_annotations(self: Any, split: str, document: Any, originals: bool = False) -> None:
        if not originals:
            raise KeyboardInterrupt
        original(self, split, document, originals)

    original = sodad_cutting.Work.write_annotations
    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sodad_cutting.Work, "write_annotations", stop_at_the_annotations)
        prepare_benchmark("sodad", small, output, options=SMALL, splits=["val"])
    # One image is replaced by another of the same size of file: only its patches are made again.
    victim = small / "Images" / "12.png"
    shutil.copy(victim, victim.with_suffix(".new"))
    os.replace(victim.with_suffix(".new"), victim)
    with monkeypatch.context() as patch:
        done = count_cuts(patch)
        with pytest.raises(KeyboardInterrupt):
            patch.setattr(sodad_cutting.Work, "write_annotations", stop_at_the_annotations)
            prepare_benchmark("sodad", small, output, options=SMALL, splits=["val"])
        assert len(done) == 12
    # Other annotations: everything is made again, and nothing of before is left.
    document = read(small / "Annotations" / "val.json")
    document["annotations"] = [{**one, "category_id": REGION} for one in document["annotations"][:9]]
    document["images"] = [{**one, "id": one["id"]} for one in document["images"]]
    (small / "Annotations" / "val.json").write_text(json.dumps(document))
    prepare_benchmark("sodad", small, output, options=SMALL, splits=["val"])
    fresh = prepare_benchmark("sodad", small, tmp_path / "fresh", options=SMALL, splits=["val"]).output
    assert content(output) == content(fresh)


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        document = read(folder / "Annotations" / "val.json")
        change(document)
        (folder / "Annotations" / "val.json").write_text(json.dumps(document))

    return apply


def resize(folder: Path) -> None:
    Image.new("RGB", (41, 71)).save(folder / "Images" / "9.png")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "Annotations" / "val.json").write_text('{"images": ['),
            r"val\.json is not valid JSON",
        ),
        (lambda folder: (folder / "Annotations" / "val.json").write_text("[]"), r"val\.json has no list 'images'"),
        (edit(lambda document: document.pop("annotations")), r"val\.json has no list 'annotations'"),
        (edit(lambda document: document.update(categories=["people"])), r"val\.json: 'categories' must be"),
        (edit(lambda document: document["images"].clear()), r"val\.json lists no images"),
        (edit(lambda document: document["images"][2].pop("width")), r"val\.json: entry 2 of 'images'"),
        (edit(lambda document: document["images"][2].update(id=8)), r"val\.json: two images have the id 8"),
        (edit(lambda document: document["images"][2].update(start_coord=[0, 0])), r"lists patches"),
        (edit(lambda document: document["annotations"][3].update(bbox=[1, 2, 3])), r"entry 3 of 'annotations'.*'bbox'"),
        (edit(lambda document: document["annotations"][3].update(bbox=[1, 2, float("nan"), 3])), r"entry 3 of 'ann"),
        (edit(lambda document: document["annotations"][3].update(category_id=11)), r"entry 3 .*must be 1 to 10"),
        (edit(lambda document: document["annotations"][3].update(image_id=99)), r"entry 3 .*no image has"),
        (lambda folder: (folder / "Images" / "9.png").unlink(), r"1 of 7 images of .*val\.json are missing, .* 9\.png"),
        (lambda folder: shutil.rmtree(folder / "Images"), r"no folder Images beside Annotations"),
        (resize, r"9\.png has 41 x 71 pixels, its JSON file says 41 x 72"),
        (lambda folder: (folder / "Images" / "9.png").write_bytes(b"no image"), r"image .*9\.png cannot be read"),
    ],
)
def test_what_is_wrong_is_named(small: Path, tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    spoil(small)
    with pytest.raises(InputError, match=message) as caught:
        prepare_benchmark("sodad", small, tmp_path / "out", options=SMALL, splits=["val"])
    assert "\n" not in str(caught.value)


def test_a_truncated_image_is_told_after_all_others_are_cut(small: Path, tmp_path: Path) -> None:
    victim = small / "Images" / "12.png"
    intact = victim.read_bytes()
    victim.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(InputError, match=r"image .*12\.png is broken .* run the same command again"):
        prepare_benchmark("sodad", small, tmp_path / "out", options=SMALL, splits=["val"])
    assert len(list((tmp_path / "out" / "images" / "val").glob("13_*.png"))) == 3, "the one after it is there"
    victim.write_bytes(intact)
    output = prepare_benchmark("sodad", small, tmp_path / "out", options=SMALL, splits=["val"]).output
    assert_equals_plain(small, output, "val", {"size": 40, "overlap": 8}, "png")


def test_images_that_nobody_reads_may_be_missing(small: Path, tmp_path: Path) -> None:
    (small / "Images" / "14.png").unlink()  # without annotations
    output = prepare_benchmark("sodad", small, tmp_path / "out", options=SMALL, splits=["val"]).output
    assert_equals_plain(small, output, "val", {"size": 40, "overlap": 8}, "png")
    with pytest.raises(InputError, match=r"14\.png"):
        prepare_benchmark("sodad", small, tmp_path / "b", options={**SMALL, "unannotated": "keep"}, splits=["val"])


def test_annotations_without_images(small: Path, tmp_path: Path) -> None:
    shutil.rmtree(small / "Images")
    output = prepare_benchmark("sodad", small, tmp_path / "out", options=SMALL, images="none").output
    assert len(read(output / "annotations" / "test.json")["images"]) > 10 and not (output / "images").exists()


@pytest.mark.parametrize("layout", ["rawData", "folders", "lower"])
def test_other_layouts(small: Path, tmp_path: Path, layout: str) -> None:
    expected = prepare_benchmark("sodad", small, tmp_path / "expected", options=SMALL, splits=["val"]).output
    source = small
    if layout == "rawData":
        (tmp_path / "SODA-D").mkdir()
        source = tmp_path / "SODA-D"
        shutil.move(small, source / "rawData")
    elif layout == "folders":
        for split, numbers in (("train", range(1, 8)), ("val", range(8, 15)), ("test", range(15, 22))):
            (small / "Images" / split).mkdir()
            for number in numbers:
                shutil.move(small / "Images" / f"{number}.png", small / "Images" / split / f"{number}.png")
    else:
        (small / "Images").rename(small / "images")
        (small / "Annotations").rename(small / "annotations")
    output = prepare_benchmark("sodad", source, tmp_path / "out", options=SMALL, splits=["val"]).output
    assert content(output / "annotations") == content(expected / "annotations")
    assert content(output / "images" / "val") == content(expected / "images" / "val")


def test_images_of_one_name_keep_their_own_patches(small: Path, tmp_path: Path) -> None:
    document = read(small / "Annotations" / "val.json")
    for image in document["images"][:2]:
        place = f"{image['id']}/frame.{image['id']}.png"
        (small / "Images" / str(image["id"])).mkdir()
        shutil.move(small / "Images" / image["file_name"], small / "Images" / place)
        image["file_name"] = place
    (small / "Annotations" / "val.json").write_text(json.dumps(document))
    output = prepare_benchmark("sodad", small, tmp_path / "out", options=SMALL, splits=["val"]).output
    names = [image["file_name"] for image in read(output / "annotations" / "val.json")["images"]]
    assert len(set(names)) == len(names) == len(list((output / "images" / "val").iterdir()))
    frames = {name.rsplit("_", 1)[0] for name in names if name.startswith("frame")}
    assert len(frames) == 2 and "frame" in frames


@pytest.mark.parametrize("stored", [False, True])
def test_orientation_follows_the_declared_size(small: Path, tmp_path: Path, stored: bool) -> None:
    pixels = pixels_of(small / "Images" / "9.png")  # 41 x 72
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    shown = pixels if stored else np.rot90(pixels)
    Image.fromarray(shown).save(small / "Images" / "9.png", exif=exif)
    output = prepare_benchmark("sodad", small, tmp_path / "out", options={**SMALL, "regions": "crowd"}).output
    found = pixels_of(output / "images" / "val" / "9_0.png")
    assert np.array_equal(found, pixels[:40, :40])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 10}, "--patch is 10"),
        ({"overlap": 800}, "--overlap is 800"),
        ({"overlap": -1}, "--overlap is -1"),
        ({"ignore_ratio": 1.0}, "--ignore-ratio is 1.0"),
        ({"extent_margin": -2}, "--extent-margin is -2"),
        ({"extent_margin": "all"}, "--extent-margin is all"),
        ({"quality": 0}, "--quality is 0"),
        ({"pieces": "drop"}, "--pieces is 'drop'"),
        ({"image_format": "bmp"}, "--image-format is 'bmp'"),
    ],
)
def test_senseless_options(small: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare_benchmark("sodad", small, tmp_path / "out", options=options)


def test_a_source_without_annotations(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "Images.zip").touch()
    with pytest.raises(InputError, match=r"Annotations/train\.json.*unpack Images\.zip"):
        prepare_benchmark("sodad", tmp_path / "raw", tmp_path / "out")
