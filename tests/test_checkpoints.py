"""Model folders: what is written is what is read, and what does not fit is said in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch

from crossdino.checkpoints import (
    CalibrationWarning,
    load_model,
    push_folder,
    recover_folder,
    replaced_folder,
    save_model,
    start_from,
    weights_digest,
    write_calibration,
)
from crossdino.config import Config, InferenceConfig
from crossdino.errors import InputError
from crossdino.evaluation.calibration import Calibration
from crossdino.models.detector import CrossDINO
from crossdino.writing import written_whole


@pytest.fixture
def model(tiny_config: Config) -> CrossDINO:
    torch.manual_seed(0)
    config = dataclasses.replace(tiny_config.model, class_names=("red", "blue"))
    return CrossDINO(config, InferenceConfig(short_side=64, long_side=100, num_select=7)).eval()


@pytest.mark.parametrize("half", [False, True])
def test_round_trip(model: CrossDINO, tmp_path: Path, half: bool) -> None:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.save_pretrained(tmp_path / "m", half=half, metrics={"ap": 0.5}, category_ids=(3, 7))
    loaded = CrossDINO.from_pretrained(tmp_path / "m")
    assert (loaded.config, loaded.inference, loaded.training) == (model.config, model.inference, False)
    for name, tensor in model.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor.half().to(tensor.dtype) if half and tensor.is_floating_point() else tensor)
    if not half:
        image = torch.randn(1, 3, 64, 64)
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        with torch.no_grad():
            assert torch.equal(loaded(image).pred_boxes, model(image).pred_boxes)
    stored = json.loads((tmp_path / "m" / "config.json").read_text())
    assert stored["format_version"] == 1
    assert stored["class_names"] == ["red", "blue"] and stored["category_ids"] == [3, 7]
    assert stored["metrics"] == {"ap": 0.5}
    assert sorted(os.listdir(tmp_path / "m")) == ["README.md", "config.json", "model.safetensors"]
    card = (tmp_path / "m" / "README.md").read_text()
    assert "\n# m\n" in card and "| AP | 50.0 |" in card
    # Who may read a new file is for the umask to say, for all three alike.
    assert len({path.stat().st_mode for path in (tmp_path / "m").iterdir()}) == 1
    model.save_pretrained(tmp_path / "m", card="mine\n")
    assert (tmp_path / "m" / "README.md").read_text() == "mine\n"
    with pytest.raises(InputError, match=r"cannot make the model folder .*README.md: File exists"):
        model.save_pretrained(tmp_path / "m" / "README.md")


def test_half_precision_halves_the_file(model: CrossDINO, tmp_path: Path) -> None:
    save_model(model, tmp_path / "full")
    save_model(model, tmp_path / "half", half=True)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < 0.6 * sizes[1]  # the header with the names stays as it is


def test_loading_does_not_ask_for_the_backbones_own_weights(
    model: CrossDINO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    stored = json.loads(path.read_text())
    stored["model"]["backbone_weights"] = "timm"
    path.write_text(json.dumps(stored))
    asked: list[str | None] = []
    original = CrossDINO.__init__

    def build(self: CrossDINO, config: Any, *arguments: Any) -> None:
        asked.append(config.backbone_weights)
        original(self, config, *arguments)

    monkeypatch.setattr(CrossDINO, "__init__", build)
    assert load_model(tmp_path / "m").config.backbone_weights == "timm"
    assert asked == [None]


def test_a_hub_id_fetches_nothing_but_what_is_loaded(
    model: CrossDINO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model, tmp_path / "m")
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(name: str, **keywords: Any) -> str:
        calls.append((name, keywords))
        if name == "owner/absent":
            raise ConnectionError("no route\nto the hub")
        return str(tmp_path / "m")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_model("owner/model").config == model.config
    wanted = ["model.safetensors", "config.json", "calibration.json"]
    assert calls == [("owner/model", {"allow_patterns": wanted})]
    with pytest.raises(InputError, match=r"no model folder owner/absent, .*ConnectionError: no route\)$"):
        load_model("owner/absent")
    for name in ("absent", "./absent/m", "a/b/c", "/absent/m"):
        with pytest.raises(InputError, match=f"no model folder {name}; name a folder"):
            load_model(name)
    assert len(calls) == 2


def test_broken_folders_are_named(model: CrossDINO, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    with pytest.raises(InputError, match=r"m is not a model folder: cannot read config.json"):
        load_model(folder)
    save_model(model, folder)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}

    def broken(name: str, content: bytes, message: str) -> None:
        (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)
        (folder / name).write_bytes(good[name])

    config = json.loads(good["config.json"])
    broken("config.json", b"{", "config.json is not JSON")
    broken("config.json", b"[]", "does not describe a crossdino model")
    for changes, message in (
        ({"format_version": 2}, r"made by a newer crossdino \(.*; format_version 2, .* up to 1\): upgrade crossdino"),
        ({"format_version": "1"}, "format_version '1', which is none"),
        ({"format_version": 0}, "format_version 0, which is none"),
        ({"tiling": {}}, "config.json holds an unknown 'tiling': if a newer crossdino made it, upgrade"),
        (
            {"model": {**config["model"], "num_querys": 3}},
            "config.json: unknown setting 'num_querys'; did you mean 'num_queries'.*newer crossdino made it, upgrade",
        ),
        ({"inference": {"flip_test": 3}}, "config.json: unknown setting 'flip_test'; if a newer crossdino made it"),
        ({"inference": 3}, "config.json: 'inference' must hold settings, not 3"),
        ({"model": {**config["model"], "hidden_dim": "wide"}}, "config.json: setting 'hidden_dim': expected"),
    ):
        broken("config.json", json.dumps({**config, **changes}).encode(), message)
    changed = {**config, "model": {**config["model"], "num_queries": 21}}
    broken(
        "config.json",
        json.dumps(changed).encode(),
        r"m do not fit this model: tgt_embed.weight is \(20, 32\) instead of \(21, 32\); use the recipe",
    )
    broken("model.safetensors", good["model.safetensors"][:-9], "not a readable safetensors file")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors is missing"):
        load_model(folder)


def test_what_an_old_file_lacks_has_its_default(model: CrossDINO, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    for name in ("first_stride", "fusion_init", "backbone_frozen_stride"):
        del stored["model"][name]
    path.write_text(json.dumps({"format_version": 1, "model": stored["model"]}))
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and loaded.inference == InferenceConfig()


def test_a_file_written_in_format_1_still_gives_the_same_numbers() -> None:
    """The folder was written once, at 0.1.0, with perturbed random weights; it must never be written again."""
    folder = Path(__file__).parent / "fixtures" / "format_v1"
    expected = json.loads((folder / "expected.json").read_text())
    loaded = CrossDINO.from_pretrained(folder)
    assert (loaded.config.class_names, loaded.config.fusion) == (("red", "blue car"), "cctm")
    assert loaded.inference == InferenceConfig(short_side=64, long_side=100, num_select=5)
    y, x = torch.arange(64)[:, None], torch.arange(96)
    image = torch.stack([torch.sin(0.11 * (k + 1) * x + 0.07 * (k + 2) * y) for k in range(3)])
    with torch.no_grad():
        output = loaded(image[None])
    # The stored numbers were computed in float64 and rounded to 6 digits; float32 came within 2e-6, and other
    # machines may sum in another order. The queries' order is safe: the encoder's scores differ by 0.03 and more.
    torch.testing.assert_close(output.pred_logits[0], torch.tensor(expected["pred_logits"]), atol=1e-4, rtol=0)
    torch.testing.assert_close(output.pred_boxes[0], torch.tensor(expected["pred_boxes"]), atol=1e-5, rtol=0)


def test_loads_from_a_folder_or_any_file_in_it(model: CrossDINO, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "renamed.safetensors")
    found = load_model(tmp_path / "m" / "renamed.safetensors")
    assert torch.equal(found.tgt_embed.weight, model.tgt_embed.weight)
    with pytest.raises(InputError, match=r"m is not a model folder: model.safetensors is missing"):
        load_model(tmp_path / "m")
    (tmp_path / "m" / "renamed.safetensors").rename(tmp_path / "m" / "model.safetensors")
    for name in ("", "model.safetensors", "config.json"):
        assert load_model(tmp_path / "m" / name).config == model.config
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(InputError, match=r"m is not a model folder: cannot read config.json"):
        load_model(str(tmp_path / "m" / "model.safetensors"))
    with pytest.raises(InputError, match=r"no model folder weights/model.safetensors; name a folder"):
        load_model("weights/model.safetensors")
    with pytest.raises(InputError, match=r"no model folder .*README.md; name a folder"):
        load_model(tmp_path / "m" / "README.md")


@pytest.mark.parametrize("name", ["dino.pth", "dino.PT", "pytorch_model.bin"])
def test_a_pickle_is_refused_by_its_name_and_the_remedy_is_given(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(InputError, match=rf"{name} is not loaded: .* pickle.* `crossdino convert-weights .*{name}"):
        load_model(tmp_path / name)


def test_nothing_is_unpickled(model: CrossDINO, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    save_model(model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load_model(tmp_path / "m")
    assert not (tmp_path / "sprung").exists()


def test_only_the_first_misfits_are_listed(model: CrossDINO, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m")
    safetensors.torch.save_file({"stray": torch.zeros(1)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(InputError, match=r"is missing, .* is missing, .* is missing and \d+ more; use") as caught:
        load_model(tmp_path / "m")
    assert len(str(caught.value)) < 400


def test_the_stored_file_is_plain_safetensors(model: CrossDINO, tmp_path: Path) -> None:
    """Read by hand as the format says: 8 bytes of length, a JSON header, the data."""
    save_model(model, tmp_path / "m", half=True)
    raw = (tmp_path / "m" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    entry = header["class_embed.bias"]
    assert (entry["dtype"], entry["shape"]) == ("F16", [2])
    start, stop = entry["data_offsets"]
    values = struct.unpack("<2e", raw[8 + length + start : 8 + length + stop])
    assert values == tuple(model.class_embed.bias.half().tolist())


def other_model(model: CrossDINO, **changes: Any) -> CrossDINO:
    torch.manual_seed(1)
    return CrossDINO(dataclasses.replace(model.config, **changes))


def test_start_from_weights_of_the_same_model(model: CrossDINO, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m")
    # What is no part of the architecture may differ.
    other = other_model(model, num_denoising=7, padding="shared", backbone_frozen_stride=4)
    config = other.config
    assert start_from(other, tmp_path / "m") == []
    assert other.config == config
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_start_from_keeps_classes_by_name_and_changes_the_queries(model: CrossDINO, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m")
    other = other_model(model, class_names=("green", "Blue"), num_queries=25)
    before = other.config
    assert start_from(other, tmp_path / "m") == [
        "classes kept, 1 of 2: Blue (from blue)",
        "classes re-initialised, 1 of 2: green",
        "queries raised from 20 to 25: the new ones begin as copies of the last",
    ]
    assert other.config == before
    found, given = other.state_dict(), model.state_dict()
    for head in ("class_embed", "enc_class_embed"):
        assert torch.equal(found[f"{head}.weight"][1], given[f"{head}.weight"][1])
        assert not torch.equal(found[f"{head}.weight"][0], given[f"{head}.weight"][0])
    assert torch.equal(found["label_enc.weight"][1:], given["label_enc.weight"][1:])
    assert torch.equal(
        found["tgt_embed.weight"], torch.cat((given["tgt_embed.weight"], given["tgt_embed.weight"][15:]))
    )
    changed = ("class_embed.", "enc_class_embed.", "label_enc.", "tgt_embed.")
    assert all(torch.equal(found[name], given[name]) for name in given if not name.startswith(changed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feedforward_dim": 48}, r"linear1.weight is \(32, 32\) instead of \(48, 32\)"),
        ({"fusion": "none"}, r"fit this model: fusion is cctm instead of none, fusion\..* is unknown"),
        # As many rows and columns as before, which mean something else.
        ({"num_heads": 1, "num_points": 4}, r"fit this model: num_heads is 2 instead of 1; use the recipe"),
    ],
)
def test_start_from_refuses_another_architecture(
    model: CrossDINO, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    save_model(model, tmp_path / "m")
    with pytest.raises(InputError, match=message):
        start_from(other_model(model, **changes), tmp_path / "m")


class StandInHub:
    """What `push_folder` calls of huggingface_hub.HfApi, without the network."""

    calls: list[tuple[str, dict[str, Any]]]
    public = False
    failure: Exception | None = None

    def __init__(self, token: str | None = None) -> None:
        type(self).calls = [("token", {"token": token})]

    def create_repo(self, repo_id: str, **keywords: Any) -> str:
        if self.failure is not None:
            raise self.failure
        self.calls.append(("create_repo", {"repo_id": repo_id, **keywords}))
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id: str, **_: Any) -> Any:
        return type("Info", (), {"private": not self.public})

    def upload_folder(self, folder_path: str, **keywords: Any) -> None:
        allowed = huggingface_hub.utils.filter_repo_objects(
            sorted(os.listdir(folder_path)), allow_patterns=keywords["allow_patterns"]
        )
        files = {name: (Path(folder_path) / name).read_bytes() for name in allowed}
        self.calls.append(("upload_folder", {**keywords, "files": files}))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[StandInHub]:
    fresh = type("Hub", (StandInHub,), {"calls": []})
    monkeypatch.setattr(huggingface_hub, "HfApi", fresh)
    return fresh


def test_push_to_hub_uploads_what_loads_again(model: CrossDINO, tmp_path: Path, hub: type[StandInHub]) -> None:
    address = model.push_to_hub("me/red-blue", private=True, token="secret", half=True, metrics={"ap": 0.5})
    assert address == "https://huggingface.co/me/red-blue"
    (_, api), (_, created), (_, uploaded) = hub.calls
    assert api == {"token": "secret"}
    assert created == {"repo_id": "me/red-blue", "repo_type": "model", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/red-blue" and uploaded["repo_type"] == "model"
    for name, content in uploaded["files"].items():
        (tmp_path / name).write_bytes(content)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and loaded.inference == model.inference
    assert torch.equal(loaded.tgt_embed.weight, model.tgt_embed.weight.half().float())
    assert 'CrossDINO.from_pretrained("me/red-blue")' in (tmp_path / "README.md").read_text()
    assert all(b"secret" not in content for content in uploaded["files"].values())


def test_push_folder_leaves_everything_else_at_home(model: CrossDINO, tmp_path: Path, hub: type[StandInHub]) -> None:
    save_model(model, tmp_path / "m", card="the card")
    for name in ("trainer.pt", "config.yaml", "other.json", ".env"):
        (tmp_path / "m" / name).write_text("private")
    push_folder(tmp_path / "m", "me/model", message="first")
    assert hub.calls[1][1]["private"] is False and hub.calls[-1][1]["commit_message"] == "first"
    assert sorted(hub.calls[-1][1]["files"]) == ["README.md", "config.json", "model.safetensors"]
    assert hub.calls[-1][1]["files"]["README.md"] == b"the card"


def test_a_push_that_cannot_be_says_why(model: CrossDINO, tmp_path: Path, hub: type[StandInHub]) -> None:
    hub.public = True
    with pytest.raises(InputError, match="me/model exists already and is public, nothing was uploaded"):
        model.push_to_hub("me/model", private=True)
    assert [name for name, _ in hub.calls] == ["token", "create_repo"]
    hub.failure = PermissionError("401 Unauthorized\nlong story")
    with pytest.raises(InputError, match=r"cannot push to me/model .*401 Unauthorized\); .*`hf auth login`") as caught:
        model.push_to_hub("me/model")
    assert "\n" not in str(caught.value)
    for folder, message in ((tmp_path / "absent", "no model folder"), (tmp_path, "is not a model folder")):
        with pytest.raises(InputError, match=message):
            push_folder(folder, "me/model")


def made_calibration(**changes: Any) -> Calibration:
    made = Calibration(("red", "blue"), (16.0,), (0.5,), (1.0,), (0.0, 0.1), ((0.3, 0.4),), settings={"tile_size": 0})
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("half", [False, True])
def test_a_calibration_travels_with_its_weights(
    model: CrossDINO, tmp_path: Path, hub: type[StandInHub], half: bool
) -> None:
    assert model.calibration is None
    model.calibration = made_calibration()
    save_model(model, tmp_path / "m", half=half)
    loaded = load_model(tmp_path / "m")
    # In half precision the weights are rounded, and still the same ones.
    assert loaded.calibration == made_calibration(weights=weights_digest(model))
    assert load_model(tmp_path / "m" / "model.safetensors").calibration == loaded.calibration
    save_model(loaded, tmp_path / "again")
    assert load_model(tmp_path / "again").calibration == loaded.calibration
    push_folder(tmp_path / "m", "me/model")
    files = hub.calls[-1][1]["files"]
    assert sorted(files) == ["README.md", "calibration.json", "config.json", "model.safetensors"]
    # A model without one leaves none behind in a folder that had one.
    loaded.calibration = None
    save_model(loaded, tmp_path / "again")
    assert not (tmp_path / "again" / "calibration.json").exists()


def test_a_calibration_of_other_weights_is_left_out(model: CrossDINO, tmp_path: Path) -> None:
    model.calibration = made_calibration()
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    with torch.no_grad():
        loaded.class_embed.bias += 0.01  # as a training would
    with pytest.warns(CalibrationWarning, match="calibration of the model is of other weights and is not written to"):
        save_model(loaded, tmp_path / "trained")
    assert not (tmp_path / "trained" / "calibration.json").exists()

    path = tmp_path / "m" / "calibration.json"
    loaded.calibration = None
    save_model(loaded, tmp_path / "other")
    (tmp_path / "other" / "calibration.json").write_bytes(path.read_bytes())
    with pytest.warns(CalibrationWarning, match=r"other/calibration.json is left out, it belongs to other weights"):
        assert load_model(tmp_path / "other").calibration is None
    good = json.loads(path.read_text())
    for content, message in (
        ("{", "is left out, .*run `crossdino calibrate` again, or delete the file"),
        (json.dumps({**good, "format_version": 9}), "newer crossdino"),
        (json.dumps({**good, "temperatures": [-1]}), "do not fit together"),
    ):
        path.write_text(content)
        with pytest.warns(CalibrationWarning, match=message):
            assert load_model(tmp_path / "m").calibration is None
    write_calibration(
        tmp_path / "m",
        made_calibration(
            class_names=("red",), class_biases=(0.0,), class_thresholds=((0.3,),), weights=weights_digest(model)
        ),
    )
    with pytest.warns(CalibrationWarning, match="other weights"):
        assert load_model(tmp_path / "m").calibration is None


def test_a_failed_write_leaves_the_old_file(model: CrossDINO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(model, tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()

    def fail(path: Path, content: bytes) -> None:
        path.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space"):
        save_model(model, tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path / "m")) == ["README.md", "config.json", "model.safetensors"]


def test_written_whole_and_replaced_folder(tmp_path: Path) -> None:
    path, folder = tmp_path / "file", tmp_path / "folder"
    with written_whole(path) as partial:
        partial.write_text("one")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), written_whole(path) as partial:
        partial.write_text("two")
        raise KeyboardInterrupt
    assert path.read_text() == "one"

    for content in ("one", "two"):
        with replaced_folder(folder) as partial:
            (partial / content).write_text(content)
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder) as partial:
        (partial / "three").write_text("three")
        raise KeyboardInterrupt
    assert [item.name for item in folder.iterdir()] == ["two"]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_is_recovered_after_a_crash_between_the_two_renames(tmp_path: Path) -> None:
    folder, old = tmp_path / "last", tmp_path / ".last.old"
    old.mkdir()
    (old / "weights").write_text("old")
    recover_folder(folder)
    assert (folder / "weights").read_text() == "old" and not old.exists()
    old.mkdir()  # now the crash came after the second rename: the leftover goes
    recover_folder(folder)
    assert (folder / "weights").read_text() == "old" and not old.exists()
