"""Weights in and out: the package's own model folder.

A model folder holds `model.safetensors` (the weights) and `config.json` (all that is needed to build the network and
to prepare its images). Nothing in it is ever unpickled. The same two files are what a Hugging Face repository of a
Cross-DINO model holds, so that a folder and a hub id are loaded alike.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from crossdino.config import InferenceConfig, ModelConfig, from_dict, to_dict
from crossdino.errors import InputError

if TYPE_CHECKING:
    from crossdino.models.detector import CrossDINO

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def save_model(
    model: CrossDINO,
    folder: str | Path,
    *,
    half: bool = False,
    metrics: Mapping[str, Any] | None = None,
    category_ids: Sequence[int] | None = None,
) -> None:
    """Write a model folder; each file appears whole or not at all.

    Args:
        model: the detector; its `config` and `inference` are written beside the weights.
        folder: made where it does not exist.
        half: store floating-point weights in half precision (half the size; loaded as float32 again).
        metrics: what the model reached, kept for the reader.
        category_ids: the data set's own ids of the classes, in the order of the labels.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        stored = tensor.detach().to("cpu", torch.float16 if half and tensor.is_floating_point() else tensor.dtype)
        tensors[name] = stored.contiguous().clone()  # safetensors takes neither channels-last nor shared memory
    config = {
        "format_version": FORMAT_VERSION,
        "crossdino_version": package_version(),
        "model": to_dict(model.config),
        "inference": to_dict(model.inference),
        "class_names": list(model.config.class_names),
        "category_ids": list(category_ids) if category_ids is not None else None,
        "metrics": dict(metrics) if metrics else None,
    }
    with written_whole(folder / WEIGHTS_FILE) as partial:
        safetensors.torch.save_file(tensors, partial, metadata={"format": "pt"})
    with written_whole(folder / CONFIG_FILE) as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_model(folder_or_hub_id: str | Path, *, device: str | torch.device = "cpu") -> CrossDINO:
    """Build the detector that a model folder describes and load its weights; ready for prediction.

    Args:
        folder_or_hub_id: a local model folder, or the id `owner/name` of a Hugging Face repository (of which only the
            safetensors and JSON files are fetched).
        device: where to put the model.

    Returns:
        The model in eval mode, float32 whatever the stored precision.

    Raises:
        InputError: if there is no such model, a file is broken, or the weights do not fit the configuration.
    """
    from crossdino.models.detector import CrossDINO

    folder = find_model(folder_or_hub_id)
    stored = read_model_config(folder)
    # The weights in the folder replace whatever the backbone was started from, so nothing of that is fetched.
    config = dataclasses.replace(from_dict(stored["model"], ModelConfig), backbone_weights=None)
    model = CrossDINO(config)
    load_weights(model, read_weights(folder), folder)
    # The name is kept, so that saving the model again tells where it came from.
    model.config = from_dict(stored["model"], ModelConfig)
    model.inference = from_dict(stored["inference"], InferenceConfig)
    return model.to(device).eval()


def find_model(folder_or_hub_id: str | Path) -> Path:
    """The local folder of a model; a Hugging Face repository is fetched (only its safetensors and JSON file).

    Raises:
        InputError: if there is neither such a folder nor such a repository.
    """
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        return folder
    name = str(folder_or_hub_id)
    if folder.exists() or len(name.split("/")) != 2 or name.startswith((".", "/", "~")):
        raise InputError(f"no model folder {name}; name a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE]))
    except Exception as error:  # the hub's client raises network, authentication and validation errors of many kinds
        reason = str(error).strip().splitlines()
        raise InputError(
            f"no model folder {name}, and the Hugging Face hub has no such model in reach "
            f"({type(error).__name__}: {reason[0] if reason else ''})"
        ) from None


def read_model_config(folder: str | Path) -> dict[str, Any]:
    """The `config.json` of a model folder, with its format checked.

    Raises:
        InputError: if it is missing, is no such file, or was written by a newer format.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder} is not a model folder: cannot read {CONFIG_FILE}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); train or download the model again") from None
    if not isinstance(stored, dict) or not {"format_version", "model", "inference"} <= stored.keys():
        raise InputError(f"{path} does not describe a crossdino model (it lacks format_version, model or inference)")
    if stored["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{path} has format_version {stored['format_version']!r}, this crossdino reads {FORMAT_VERSION}; "
            "update crossdino or convert the model"
        )
    return stored


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a model folder on the CPU, halves as float32.

    Raises:
        InputError: if the file is missing or broken.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise InputError(f"{folder} is not a model folder: {WEIGHTS_FILE} is missing")
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error}); train or download it again") from None
    return {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()}


def load_weights(model: CrossDINO, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Load tensors into a model that they must fit exactly.

    Raises:
        InputError: with the first keys that do not fit.
    """
    misfits = unfitting_keys(model.state_dict(), tensors)
    if misfits:
        raise InputError(_describe(misfits, source))
    model.load_state_dict(dict(tensors))


def start_from(model: CrossDINO, folder_or_hub_id: str | Path) -> str | None:
    """Start a training from stored weights; where only the number of classes differs, the heads stay as initialised.

    Args:
        model: the detector to fill.
        folder_or_hub_id: a model folder, or the id of a Hugging Face repository.

    Returns:
        One line saying which tensors start anew, or None where everything was taken over.

    Raises:
        InputError: if anything but the number of classes differs.
    """
    folder = find_model(folder_or_hub_id)
    stored_classes = from_dict(read_model_config(folder)["model"], ModelConfig).num_classes
    classes = model.config.num_classes
    tensors, own = read_weights(folder), model.state_dict()
    # A tensor of the class heads has one row a class; the table of the denoising labels may have one more.
    per_class = [
        name
        for name, tensor in tensors.items()
        if name in own
        and tensor.shape != own[name].shape
        and tensor.shape[1:] == own[name].shape[1:]
        and (tensor.shape[0], own[name].shape[0]) in ((stored_classes, classes), (stored_classes + 1, classes + 1))
    ]
    fitting = {name: tensor for name, tensor in tensors.items() if name not in per_class}
    misfits = unfitting_keys(own, {**fitting, **{name: own[name] for name in per_class}})
    if misfits:
        raise InputError(_describe(misfits, folder))
    model.load_state_dict(fitting, strict=False)
    if not per_class:
        return None
    return f"{folder} has {stored_classes} classes, the data {classes}: {', '.join(per_class)} start anew"


def unfitting_keys(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """What differs between two sets of tensors, in words, one entry a key."""
    misfits = [f"{name} is missing" for name in wanted if name not in given]
    misfits += [f"{name} is unknown" for name in given if name not in wanted]
    misfits += [
        f"{name} is {tuple(given[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    return misfits


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends well and vanishes when it does not."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well; otherwise the old one stays.

    A folder cannot be replaced in one step: the old one steps aside as `.<name>.old` first. `recover_folder` puts it
    back after a machine died in between.
    """
    recover_folder(folder)
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Bring a folder back that `replaced_folder` had moved aside when the machine died, or drop its leftover."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists():
        if folder.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, folder)


def package_version() -> str:
    """The version of crossdino, `unknown` where the package is used without having been installed."""
    try:
        return version("crossdino")
    except PackageNotFoundError:
        return "unknown"


def _describe(misfits: list[str], source: str | Path) -> str:
    more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
    return f"the weights of {source} do not fit this model: {', '.join(misfits[:3])}{more}; use the recipe they are of"
