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

from crossdino import checkpoints
from crossdino.checkpoints import load_model, recover_folder, replaced_folder, save_model, start_from, written_whole
from crossdino.config import Config, InferenceConfig
from crossdino.errors import InputError
from crossdino.models.detector import CrossDINO


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
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "model.safetensors"]


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


def test_a_hub_id_fetches_nothing_but_the_two_files(
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
    assert calls == [("owner/model", {"allow_patterns": ["model.safetensors", "config.json"]})]
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
    broken("config.json", json.dumps({**config, "format_version": 2}).encode(), "format_version 2, this .* reads 1")
    changed = {**config, "model": {**config["model"], "num_querys": 3}}
    broken("config.json", json.dumps(changed).encode(), "unknown setting 'num_querys'; did you mean 'num_queries'")
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


def test_start_from_weights_with_the_same_classes(model: CrossDINO, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m")
    torch.manual_seed(1)
    other = CrossDINO(dataclasses.replace(model.config, class_names=("a", "b")))
    assert start_from(other, tmp_path / "m") is None
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_failed_write_leaves_the_old_file(model: CrossDINO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(model, tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()

    def fail(tensors: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        save_model(model, tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "model.safetensors"]


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
