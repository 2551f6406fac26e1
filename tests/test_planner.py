"""The planner: what its proposals lead to, and that the memory search ends well whatever the memory does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossdino import memory_plan, trial
from crossdino.config import Config, flattened, read_yaml, to_dict, with_changes
from crossdino.data.index import DatasetIndex, ImageRecord, Problems
from crossdino.data.inspection import Inspection, inspect_dataset, network_sizes
from crossdino.data.tile_choice import with_tiles
from crossdino.memory_plan import fit_batch, worst_sizes
from crossdino.planner import Proposal, propose
from crossdino.recipes import recipe
from crossdino.trial import Trial, WorstBatch, activation_bytes, estimate_bytes, fixed_bytes, run_trial

GB = 1e9


def make_data(
    hw: tuple[int, int] = (1080, 1920),
    size_px: tuple[float, float] = (10.0, 30.0),
    per_image: int = 20,
    num_images: int = 30,
    num_classes: int = 2,
    seed: int = 0,
) -> DatasetIndex:
    """Squares of random sizes, log-uniform between the two, at random places."""
    rng = np.random.default_rng(seed)
    height, width = hw
    records = []
    for number in range(num_images):
        sizes = np.exp(rng.uniform(*np.log(size_px), per_image))
        corners = rng.uniform(0, 1, (per_image, 2)) * (np.array([width, height]) - sizes[:, None]).clip(0)
        boxes = np.concatenate([corners, sizes[:, None], sizes[:, None]], axis=1)
        labels = rng.integers(0, num_classes, per_image)
        crowd = np.zeros(per_image, bool)
        records.append(ImageRecord(number, Path(f"{number}.jpg"), width, height, boxes, labels, sizes**2, crowd))
    names = tuple(f"class {number}" for number in range(num_classes))
    return DatasetIndex(Path("x.json"), names, tuple(range(num_classes)), tuple(records), Problems())


def inspected(*indices: DatasetIndex) -> Inspection:
    return inspect_dataset(dict(zip(("train", "val"), indices, strict=False)), duplicates=False)


@pytest.fixture
def known_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte for the process and for every image, instead of the estimate from the graph."""
    monkeypatch.setattr(memory_plan, "fixed_bytes", lambda _: 1 * GB)
    monkeypatch.setattr(memory_plan, "activation_bytes", lambda *_: 1 * GB)


def plan(inspection: Inspection, config: Config, **options: Any) -> Proposal:
    return propose(inspection, config, base=config, trial=False, **{"memory_bytes": 500 * GB, **options})


def changed(proposal: Proposal) -> dict[str, Any]:
    return {setting.name: setting.value for setting in proposal.settings if setting.changed}


# --- the size of the input ---


@pytest.mark.usefixtures("known_memory")
@pytest.mark.parametrize("name", ["compact", "cross_dino_r50"])
def test_small_objects_in_large_images_get_tiles(name: str) -> None:
    inspection = inspected(make_data((2160, 3840), (7, 35)))
    proposal = plan(inspection, recipe(name))
    data = proposal.config.data
    sizes = network_sizes(inspection.main, data)
    tenth, median = np.percentile(sizes, (10, 50))
    # One token and two tokens of the finest level, which covers 8 pixels.
    assert tenth >= 8 and median >= 16
    assert data.test_short_side == recipe(name).data.test_short_side
    assert data.tile_size > 0 == data.tile_size % 32
    assert np.percentile(inspection.main.sizes_px, 95) <= data.tile_overlap < data.tile_size
    assert "tile" in next(s.reason for s in proposal.settings if s.name == "data.tile_size")
    assert proposal.epoch_items > inspection.main.num_images


@pytest.mark.usefixtures("known_memory")
@pytest.mark.parametrize("size_px", [(7, 35), (200, 700)])
def test_auto_asks_for_the_choice_that_a_training_makes(size_px: tuple[float, float]) -> None:
    index = make_data((2160, 3840), size_px)
    auto = with_changes(recipe("compact"), {"data.tile_size": "auto"})
    planned = plan(inspected(index), auto, given=["data.tile_size"]).config.data
    assert planned == plan(inspected(index), recipe("compact")).config.data
    trained = with_tiles(auto, index)[0].data
    assert (trained.tile_size, trained.tile_overlap) == (planned.tile_size, planned.tile_overlap)
    # An input that was given stays, tiles are chosen for it.
    given = with_changes(auto, {"data.test_short_side": 320})
    planned = plan(inspected(index), given, given=["data.tile_size", "data.test_short_side"]).config.data
    assert planned.test_short_side == 320 and planned.tile_size == with_tiles(given, index)[0].data.tile_size


@pytest.mark.usefixtures("known_memory")
def test_tiles_hold_the_usual_object_as_a_whole() -> None:
    """Objects of all sizes: tiles that suit the smallest would cut most of the others."""
    inspection = inspected(make_data((3000, 4000), (6, 600)))
    data = plan(inspection, recipe("compact")).config.data
    assert data.tile_size >= 2 * np.percentile(inspection.main.boxes_xywh[:, 2:].max(1), 95)
    assert data.tile_overlap <= data.tile_size // 3


@pytest.mark.usefixtures("known_memory")
def test_a_little_more_size_needs_no_tiles() -> None:
    inspection = inspected(make_data((480, 640), (9, 30)))
    before = with_changes(recipe("compact"), {"data.test_short_side": 384, "data.train_short_sides": [320, 384]})
    proposal = plan(inspection, before)
    data = proposal.config.data
    assert data.tile_size == 0 and data.test_short_side > 384
    assert np.percentile(network_sizes(inspection.main, data), 10) >= 7.5  # sides are multiples of 32
    # Training's sizes grow alike.
    growth = data.test_short_side / 384
    np.testing.assert_allclose(data.train_short_sides, np.array([320, 384]) * growth, atol=16)
    assert data.crop_range[0] <= data.crop_range[1]


@pytest.mark.usefixtures("known_memory")
def test_sizes_that_suit_stay() -> None:
    proposal = plan(inspected(make_data((640, 640), (30, 90))), recipe("compact"))
    assert not [name for name in changed(proposal) if name.startswith("data.")]
    kept = next(setting for setting in proposal.settings if setting.name == "data.tile_size")
    assert not kept.changed and "8 px" in kept.reason


@pytest.mark.usefixtures("known_memory")
def test_images_are_not_enlarged_for_nothing() -> None:
    data = plan(inspected(make_data((100, 130), (20, 40))), recipe("cross_dino_r50")).config.data
    assert data.test_short_side == pytest.approx(200, abs=16)  # twice the file
    # And where even the largest useful enlargement leaves objects too small, that is said.
    proposal = plan(inspected(make_data((600, 600), (2, 5))), recipe("cross_dino_r50"))
    assert any("less than 8 px even so" in note and "first_stride 4" in note for note in proposal.notes)
    assert (network_sizes(inspected(make_data((600, 600), (2, 5))).main, proposal.config.data) < 11).all()


# --- counts ---


@pytest.mark.usefixtures("known_memory")
def test_queries_and_detections_follow_the_fullest_image_of_all_splits() -> None:
    inspection = inspected(
        make_data((640, 640), (30, 90), per_image=50),
        make_data((640, 640), (30, 90), per_image=333, num_classes=1, num_images=3),
    )
    proposal = plan(inspection, recipe("compact"))
    config = proposal.config
    assert config.model.num_queries == 500  # half as many again: 499.5
    assert config.evaluation.num_select == config.evaluation.max_detections == 500
    assert config.model.num_denoising == 100  # train has 50 an image
    assert "333" in next(s.reason for s in proposal.settings if s.name == "model.num_queries")
    # Enough already: DINO's 900 stay.
    assert plan(inspection, recipe("cross_dino_r50")).config.model.num_queries == 900


@pytest.mark.usefixtures("known_memory")
def test_never_more_queries_than_tokens() -> None:
    proposal = plan(inspected(make_data((64, 64), (6, 20), per_image=150)), recipe("cross_dino_r50"))
    data = proposal.config.data
    sides = [-(-data.test_short_side // stride) for stride in (8, 16, 32, 64)]
    tokens = sum(side * side for side in sides)
    assert tokens - 10 < proposal.config.model.num_queries <= tokens < 900


@pytest.mark.usefixtures("known_memory")
def test_denoising_pairs_grow_with_the_usual_image() -> None:
    assert (
        plan(inspected(make_data(per_image=180)), recipe("visdrone_cross_dino_r50")).config.model.num_denoising == 200
    )
    few = with_changes(recipe("compact"), {"model.num_denoising": 0})
    assert "model.num_denoising" not in {s.name for s in plan(inspected(make_data()), few).settings}


# --- bands and beta ---


@pytest.mark.usefixtures("known_memory")
@pytest.mark.parametrize(
    ("size_px", "bands"),
    [
        ((4, 60), ["very tiny", "tiny", "small", "medium"]),  # AI-TOD's
        ((15, 300), ["small", "medium", "large"]),  # COCO's
        ((20, 80), ["small", "medium"]),  # COCO's without the empty one
    ],
)
def test_size_bands_hold_enough_objects(size_px: tuple[float, float], bands: list[str]) -> None:
    inspection = inspected(make_data((1000, 1000), size_px))
    config = plan(inspection, recipe("compact")).config
    assert list(config.evaluation.size_bands) == bands
    sizes = np.sqrt(inspection.main.areas)
    for low, high in config.evaluation.size_bands.values():
        assert ((sizes >= low) & (sizes <= high)).mean() >= 0.05


@pytest.mark.usefixtures("known_memory")
def test_own_size_bands_where_the_known_ones_say_nothing() -> None:
    inspection = inspected(make_data((1000, 1000), (130, 190)))
    bands = plan(inspection, recipe("compact")).config.evaluation.size_bands
    sizes = np.sqrt(inspection.main.areas)
    shares = [((sizes >= low) & (sizes <= high)).mean() for low, high in bands.values()]
    assert len(bands) == 3 and min(shares) > 0.3
    # Too few objects for any band: the recipe's stay.
    few = plan(inspected(make_data(num_images=1, per_image=9)), recipe("compact"))
    assert "evaluation.size_bands" not in {setting.name for setting in few.settings}


@pytest.mark.usefixtures("known_memory")
@pytest.mark.parametrize(
    ("hw", "size_px", "beta"),
    [
        ((480, 640), (40, 80), 1.0),  # like COCO: 55 px of 554
        ((765, 1360), (25, 45), 0.1),  # like VisDrone: 33 px of 1020
        ((800, 800), (9, 18), 0.05),  # like AI-TOD: 12.8 px of 800
    ],
)
def test_beta_as_in_the_paper(hw: tuple[int, int], size_px: tuple[float, float], beta: float) -> None:
    whole = {"data.tile_size": 0}
    inspection = inspected(make_data(hw, size_px))
    start = with_changes(recipe("cross_dino_r50"), whole)
    assert plan(inspection, start, given=list(whole)).config.loss.beta == beta
    # A recipe that begins lower stays there.
    low = with_changes(start, {"loss.beta": 0.07})
    assert plan(inspection, low, given=list(whole)).config.loss.beta == min(beta, 0.07)
    focal = plan(inspection, with_changes(start, {"loss.classification": "focal"}), given=list(whole))
    assert "loss.beta" not in {setting.name for setting in focal.settings}


# --- what the user chose, and the file ---


@pytest.mark.usefixtures("known_memory")
def test_given_settings_stay() -> None:
    chosen = {"data.tile_size": 512, "model.num_queries": 40, "evaluation.max_detections": 7, "training.batch_size": 3}
    config = with_changes(recipe("compact"), chosen)
    proposal = propose(
        inspected(make_data(per_image=400)), config, base=recipe("compact"), given=list(chosen), trial=False
    )
    after = flattened(to_dict(proposal.config))
    assert {name: after[name] for name in chosen} == chosen
    assert not set(chosen) & set(changed(proposal))
    assert any("model.num_queries stays at the given 40" in note for note in proposal.notes)
    assert any("the rest cannot be found" in note for note in proposal.notes)
    assert "# as given" in proposal.to_yaml()


@pytest.mark.usefixtures("known_memory")
@pytest.mark.parametrize("name", ["compact", "cross_dino_r50", "visdrone_cross_dino_clap_strip_t"])
def test_the_file_is_the_proposal(name: str, tmp_path: Path) -> None:
    """What `train --recipe NAME --config proposal.yaml` makes of it."""
    base = recipe(name)
    config = with_changes(base, {"data.source": "somewhere", "training.epochs": 5})
    proposal = propose(
        inspected(make_data((2160, 3840), (5, 35), per_image=700, num_images=4)),
        config,
        base=base,
        given=["training.epochs"],
        memory_bytes=6 * GB,
        trial=False,
    )
    proposal.write_yaml(tmp_path / "proposal.yaml", "a title\nof two lines")
    text = (tmp_path / "proposal.yaml").read_text()
    assert text.startswith("# a title\n# of two lines\n")
    assert max(map(len, text.splitlines())) <= 120
    trained = with_changes(base, {**flattened(read_yaml(tmp_path / "proposal.yaml")), "data.source": "somewhere"})
    names = proposal.config.model.class_names
    trained = dataclasses.replace(trained, model=dataclasses.replace(trained.model, class_names=names))
    assert trained == proposal.config
    for setting in proposal.settings:
        if setting.changed:
            assert setting.reason.split(";")[0][:30] in " ".join(text.replace("#", " ").split())
    assert [path.name for path in tmp_path.iterdir()] == ["proposal.yaml"]


@pytest.mark.usefixtures("known_memory")
def test_a_file_without_changes(tmp_path: Path) -> None:
    base = recipe("compact")
    proposal = plan(inspected(make_data((448, 448), (15, 80))), base)
    empty = dataclasses.replace(proposal, config=base)
    empty.write_yaml(tmp_path / "proposal.yaml")
    assert with_changes(base, flattened(read_yaml(tmp_path / "proposal.yaml"))) == base


@pytest.mark.usefixtures("known_memory")
@pytest.mark.parametrize(
    "index", [make_data(num_images=0), make_data(per_image=0), make_data(num_images=1, per_image=1)]
)
def test_little_or_nothing_to_go_by(index: DatasetIndex) -> None:
    proposal = plan(inspected(index), recipe("compact"))
    assert proposal.epoch_items >= len(index.records)
    assert proposal.config.training.batch_size == 2
    assert proposal.to_dict()["memory"]["fits"]


# --- memory ---


def fake_trials(monkeypatch: pytest.MonkeyPatch, peak: Callable[[int, bool], float]) -> list[tuple[int, bool]]:
    """Trials whose memory is a formula of the batch size and of activation checkpointing."""
    made: list[tuple[int, bool]] = []

    def run(config: Config, worst: WorstBatch, batch: int, limit: float) -> Trial:
        checkpointing = config.training.activation_checkpointing
        assert config.training.batch_size == batch
        made.append((batch, checkpointing))
        needed = peak(batch, checkpointing)
        fits = needed <= limit
        return Trial(batch, checkpointing, round(min(needed, limit)), 1.0 if fits else None, fits)

    monkeypatch.setattr(memory_plan, "run_trial", run)
    return made


@pytest.mark.usefixtures("known_memory")
@pytest.mark.parametrize("per_image", [0.02, 0.5, 1.7, 3.0, 7.0, 40.0])
@pytest.mark.parametrize("limit", [2.0, 5.0, 20.0, 200.0])
@pytest.mark.parametrize("wanted", [1, 2, 3, 8, 16])
def test_the_batch_fits_whatever_the_estimate_said(
    monkeypatch: pytest.MonkeyPatch, per_image: float, limit: float, wanted: int
) -> None:
    def peak(batch: int, checkpointing: bool) -> float:
        return (1.0 + batch * per_image * (0.25 if checkpointing else 1.0)) * GB

    made = fake_trials(monkeypatch, peak)
    config = with_changes(recipe("compact"), {"training.batch_size": wanted})
    found = fit_batch(config, WorstBatch(((448, 448),), 5), limit * GB, "given")
    possible = [
        (batch, checkpointing)
        for checkpointing in (False, True)
        for batch in range(1, wanted + 1)
        if peak(batch, checkpointing) <= limit * GB
    ]
    assert len(made) == len(found.trials) <= 7
    assert found.fits == bool(possible)
    if found.fits:
        assert (found.batch_size, found.activation_checkpointing) in made
        assert peak(found.batch_size, found.activation_checkpointing) <= limit * GB
        # Not far below what would be possible.
        best = max(batch for batch, checkpointing in possible if checkpointing == found.activation_checkpointing)
        assert found.batch_size >= min(best, wanted) / 2
        assert found.batch_size <= found.largest_batch


@pytest.mark.usefixtures("known_memory")
def test_a_smaller_batch_keeps_the_images_per_update(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_trials(monkeypatch, lambda batch, _: (1 + 3 * batch) * GB)
    start = with_changes(recipe("cross_dino_r50"), {"training.gradient_accumulation": 2})
    texts: list[str] = []
    proposal = propose(inspected(make_data((640, 640), (30, 90))), start, memory_bytes=10 * GB, on_trial=texts.append)
    training = proposal.config.training
    assert training.batch_size == 2  # 8.5 GB are left: 1 + 3 * 2
    assert training.gradient_accumulation == 8
    assert texts and all("trial step" in text for text in texts)
    assert proposal.epoch_seconds == 15 * 1.0


@pytest.mark.usefixtures("known_memory")
def test_no_batch_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_trials(monkeypatch, lambda *_: 50 * GB)
    proposal = propose(inspected(make_data()), recipe("compact"), memory_bytes=1 * GB)
    assert made[-1] == (1, True) and not proposal.memory.fits
    assert any("does not fit" in note for note in proposal.notes)
    assert proposal.epoch_seconds is None


def test_the_estimate_grows_with_what_costs_memory(tiny_config: Config) -> None:
    base = activation_bytes(tiny_config, WorstBatch(((128, 128),), 3))
    assert activation_bytes(tiny_config, WorstBatch(((256, 256),), 3)) == pytest.approx(4 * base, rel=0.3)
    saved = with_changes(tiny_config, {"training.activation_checkpointing": True})
    assert activation_bytes(saved, WorstBatch(((128, 128),), 3)) < 0.9 * base
    assert activation_bytes(with_changes(tiny_config, {"model.num_queries": 200}), WorstBatch(((128, 128),), 3)) > base
    assert activation_bytes(with_changes(tiny_config, {"model.num_denoising": 90}), WorstBatch(((128, 128),), 3)) > base
    worst = WorstBatch(((64, 128), (128, 64)), 3)  # which pad each other
    assert activation_bytes(tiny_config, worst) == base
    assert estimate_bytes(tiny_config, worst, 3) == pytest.approx(fixed_bytes(tiny_config) + 3 * base)
    # Weights, gradients, two moments, and the average.
    with_average = with_changes(tiny_config, {"training.ema_decay": 0.99})
    from crossdino.models.detector import CrossDINO

    stored = sum(parameter.numel() for parameter in CrossDINO(tiny_config.model).parameters())
    assert fixed_bytes(with_average) - fixed_bytes(tiny_config) == 4 * stored


def test_a_real_trial_step(tiny_config: Config) -> None:
    """In its own process: measured where it fits, ended where it does not."""
    worst = WorstBatch(((64, 96), (96, 64)), 12)
    found = run_trial(tiny_config, worst, 3, 8 * GB)
    assert found.fits and found.seconds is not None and found.seconds > 0
    assert 0.1 * GB < found.peak_bytes < 8 * GB  # torch alone takes more than the lower bound
    ended = run_trial(tiny_config, worst, 3, 0.05 * GB)  # less than torch alone
    assert not ended.fits and ended.seconds is None and ended.peak_bytes >= 0.05 * GB


def test_a_trial_that_fails_for_another_reason(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the trial step failed with status 1"):
        run_trial(tiny_config, WorstBatch(((64, 64),), 1), 1, GB)


def test_the_limits_of_containers_count(tmp_path: Path) -> None:
    names = ("memory.max", "memory.current", "memory.stat")
    assert trial._cgroup_free(tmp_path, *names) == []
    (tmp_path / "memory.max").write_text("8000000000\n")
    (tmp_path / "memory.current").write_text("3000000000\n")
    (tmp_path / "memory.stat").write_text("anon 2000000000\ninactive_file 500000000\n")
    assert trial._cgroup_free(tmp_path, *names) == [5_500_000_000]
    (tmp_path / "memory.max").write_text("max\n")
    assert trial._cgroup_free(tmp_path, *names) == []
    free, source = trial.available_bytes()
    assert free > 0 and source


def test_worst_sizes() -> None:
    def sizes(changes: dict[str, Any], *shapes: tuple[int, int]) -> set[tuple[int, int]]:
        inspection = inspected(*(make_data(shape, num_images=2) for shape in shapes[:1]))
        split = dataclasses.replace(inspection.main, image_hw=np.array(shapes))
        start = {"data.train_short_sides": [100, 200], "data.train_long_side": 300, "data.crop_short_sides": []}
        return set(worst_sizes(split, with_changes(Config(), {**start, **changes}).data))

    assert sizes({}, (400, 800), (100, 100)) == {(150, 300)}
    assert sizes({}, (400, 600)) == {(200, 300)}
    assert sizes({}, (400, 600), (600, 400)) == {(200, 300), (300, 200)}
    assert sizes({"data.quarter_turns": True}, (400, 600)) == {(200, 300), (300, 200)}
    assert sizes({"data.tile_size": 333}, (400, 600)) == {(200, 200)}
    crop = {"data.crop_short_sides": [100], "data.crop_range": [80, 120]}
    assert sizes(crop, (400, 400)) == {(200, 300), (300, 200)}
