"""Weights in and out: the package's own model folder.

A model folder holds `model.safetensors` (the weights), `config.json` (all that is needed to build the network and to
prepare its images), `README.md` (the model card, for people) and, after `crossdino calibrate`, `calibration.json`.
Nothing in it is ever unpickled or run. A Hugging Face repository of a Cross-DINO model holds the same files, so that a
folder and a hub id are loaded alike.

`calibration.json` belongs to certain weights and names them by a digest. One that belongs to others, or cannot be read,
is left out with a warning: the model is as good as it was without.

`config.json` has a `format_version`. A setting that is added to `ModelConfig` or `InferenceConfig` must have the value
that older models were made with as its default: a file that lacks it gets that. What older versions of the package
would read wrongly raises `FORMAT_VERSION`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from crossdino.config import InferenceConfig, ModelConfig, from_dict, to_dict
from crossdino.errors import InputError
from crossdino.model_card import model_card
from crossdino.writing import written_whole

if TYPE_CHECKING:
    from crossdino.evaluation.calibration import Calibration
    from crossdino.models.detector import CrossDINO

FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
CALIBRATION_FILE = "calibration.json"

# Everything that a config.json of this format may hold.
_CONFIG_KEYS = ("format_version", "crossdino_version", "model", "inference", "class_names", "category_ids", "metrics")
_PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")

T = TypeVar("T")


class CalibrationWarning(UserWarning):
    """A calibration was left out because it is not one of these weights."""


def save_model(
    model: CrossDINO,
    folder: str | Path,
    *,
    half: bool = False,
    metrics: Mapping[str, Any] | None = None,
    category_ids: Sequence[int] | None = None,
    card: str | None = None,
) -> None:
    """Write a model folder; each file appears whole or not at all.

    Args:
        model: the detector; its `config` and `inference` are written beside the weights, and its `calibration` where it
            has one (with a warning instead where that belongs to other weights, e.g. because training went on).
        folder: made where it does not exist.
        half: store floating-point weights in half precision (half the size; loaded as float32 again).
        metrics: what the model reached, kept for the reader; as `AveragePrecisionResult.to_dict()` gives it.
        category_ids: the data set's own ids of the classes, in the order of the labels.
        card: the text of README.md, as `crossdino.model_card.model_card` makes it; None makes one of what is known.

    Raises:
        InputError: if `folder` is a file or cannot be made.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the model folder {folder}: {error.strerror}; name another") from None
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        stored = tensor.detach().to("cpu", torch.float16 if half and tensor.is_floating_point() else tensor.dtype)
        tensors[name] = stored.contiguous().clone()  # safetensors takes neither channels-last nor shared memory
    network = to_dict(model.config)
    if network["backbone_weights"] is not None:
        # A file's name tells where the backbone came from; its folder is nobody's business.
        network["backbone_weights"] = Path(network["backbone_weights"]).name
    config = {
        "format_version": FORMAT_VERSION,
        "crossdino_version": package_version(),
        "model": network,
        "inference": to_dict(model.inference),
        "class_names": list(model.config.class_names),
        "category_ids": list(category_ids) if category_ids is not None else None,
        "metrics": dict(metrics) if metrics else None,
    }
    with written_whole(folder / WEIGHTS_FILE) as partial:
        # Not `save_file`, whose files only their owner can read, whatever the umask.
        partial.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    with written_whole(folder / CONFIG_FILE) as partial:
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with written_whole(folder / CARD_FILE) as partial:
        text = card if card is not None else model_card(model, name=folder.resolve().name, metrics=metrics)
        partial.write_text(text, encoding="utf-8")
    calibration = model.calibration
    if calibration is not None:
        digest = weights_digest(model)
        if calibration.weights in (None, digest):
            write_calibration(folder, dataclasses.replace(calibration, weights=digest))
            return
        warnings.warn(
            f"the calibration of the model is of other weights and is not written to {folder}: run `crossdino "
            "calibrate` again",
            CalibrationWarning,
            stacklevel=2,
        )
    (folder / CALIBRATION_FILE).unlink(missing_ok=True)


def weights_digest(model: CrossDINO) -> str:
    """What names the weights of a model: a digest of all its tensors, the same in float32 as stored in half precision.

    Args:
        model: on any device.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().to("cpu", torch.float16 if tensor.is_floating_point() else tensor.dtype)
        digest.update(f"{name} {tuple(values.shape)} ".encode())
        digest.update(values.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_calibration(folder: str | Path, calibration: Calibration) -> None:
    """Write `calibration.json` into a model folder, whole or not at all; its weights stay as they are."""
    with written_whole(Path(folder) / CALIBRATION_FILE) as partial:
        partial.write_text(json.dumps(calibration.to_dict(), indent=2) + "\n", encoding="utf-8")


def load_model(source: str | Path, *, device: str | torch.device = "cpu") -> CrossDINO:
    """Build the detector that a model folder describes and load its weights; ready for prediction.

    Args:
        source: a local model folder, the safetensors file or config.json in it, or the id `owner/name` of a Hugging
            Face repository (of which only the safetensors and JSON files are fetched).
        device: where to put the model.

    Returns:
        The model in eval mode, float32 whatever the stored precision. Its `calibration` is that of the folder, None
        where there is none, or (with a `CalibrationWarning`) where it belongs to other weights or cannot be read.

    Raises:
        InputError: if there is no such model, a file is broken or a pickle, it was made by a newer crossdino, or the
            weights do not fit the configuration.
    """
    from crossdino.models.detector import CrossDINO

    place = find_model(source)
    stored = read_model_config(place)
    config = _section(stored, "model", ModelConfig, place)
    inference = _section(stored, "inference", InferenceConfig, place)
    # The weights in the folder replace whatever the backbone was started from, so nothing of that is fetched.
    model = CrossDINO(dataclasses.replace(config, backbone_weights=None))
    load_weights(model, read_weights(place), place)
    # The name is kept, so that saving the model again tells where it came from.
    model.config = config
    model.inference = inference
    model.calibration = _read_calibration(place, model)
    return model.to(device).eval()


def find_model(source: str | Path) -> Path:
    """Where a model is on this machine; a Hugging Face repository is fetched (only its safetensors and JSON files).

    Args:
        source: as for `load_model`.

    Returns:
        The model folder, or a safetensors file that has its config.json beside it.

    Raises:
        InputError: if there is neither such a folder or file nor such a repository, or the file is a pickle.
    """
    place, name = Path(source), str(source)
    if place.is_dir():
        if not (place / CONFIG_FILE).exists() and (place / "best" / CONFIG_FILE).exists():
            raise InputError(f"{name} is the folder of a training: name {place / 'best'}, its best model")
        return place
    if place.suffix.lower() in _PICKLE_SUFFIXES:
        raise InputError(
            f"{name} is not loaded: a file of this kind is a pickle, which can run code; convert an official DINO "
            f"checkpoint once by `crossdino convert-weights {name} --output DIR` and name DIR"
        )
    if place.is_file() and place.name == CONFIG_FILE:
        return place.parent
    if place.is_file() and place.suffix == ".safetensors":
        return place
    if (
        place.exists()
        or len(name.split("/")) != 2
        or name.startswith((".", "/", "~"))
        or place.suffix == ".safetensors"
    ):
        raise InputError(f"no model folder {name}; name a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(name, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE, CALIBRATION_FILE])
        )
    except Exception as error:  # the hub's client raises network, authentication and validation errors of many kinds
        raise InputError(
            f"no model folder {name}, and the Hugging Face hub has no such model in reach ({_reason(error)})"
        ) from None


def push_folder(
    folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None, message: str | None = None
) -> str:
    """Upload a model folder to the Hugging Face hub: weights, configuration, card, calibration, and nothing else in it.

    Args:
        folder: a model folder, e.g. the `best/` of a training.
        repo_id: `owner/name`; the repository is made where it does not exist.
        private: whether only you shall see it; one that exists keeps its visibility.
        token: an access token that may write; None takes that of `hf auth login` or of the variable HF_TOKEN.
        message: of the commit.

    Returns:
        The repository's address.

    Raises:
        InputError: if the folder is no model, the hub refuses, or `private` is asked for and the repository is public.
    """
    import huggingface_hub

    if not Path(folder).is_dir():
        raise InputError(f"no model folder {folder}; name a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    read_model_config(folder)
    if not (Path(folder) / WEIGHTS_FILE).is_file():
        raise InputError(f"{folder} is not a model folder: {WEIGHTS_FILE} is missing")
    try:
        api = huggingface_hub.HfApi(token=token)
        address = str(api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True))
        # The hub leaves a repository that exists as it is: nothing private may be put where everybody sees it.
        is_public = private and not api.repo_info(repo_id, repo_type="model").private
        if not is_public:
            api.upload_folder(
                repo_id=repo_id,
                repo_type="model",
                folder_path=str(folder),
                allow_patterns=[WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, CALIBRATION_FILE],
                commit_message=message or f"Upload a model of crossdino {package_version()}",
            )
    except Exception as error:  # as in `find_model`
        raise InputError(
            f"cannot push to {repo_id} on the Hugging Face hub ({_reason(error)}); the name must be owner/name, and "
            "you must be logged in with a token that may write there (`hf auth login`, or token=...)"
        ) from None
    if is_public:
        raise InputError(
            f"{repo_id} exists already and is public, nothing was uploaded; make it private on the hub or take "
            "another name"
        )
    return address


def push_model(
    model: CrossDINO,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    message: str | None = None,
    half: bool = False,
    metrics: Mapping[str, Any] | None = None,
    category_ids: Sequence[int] | None = None,
    card: str | None = None,
) -> str:
    """Write a model folder and upload it; the arguments are those of `save_model` and of `push_folder`."""
    with tempfile.TemporaryDirectory() as folder:
        card = card if card is not None else model_card(model, name=repo_id, metrics=metrics)
        save_model(model, folder, half=half, metrics=metrics, category_ids=category_ids, card=card)
        return push_folder(folder, repo_id, private=private, token=token, message=message)


def read_model_config(place: str | Path) -> dict[str, Any]:
    """The `config.json` of a model folder, with its format checked.

    Args:
        place: the folder, or the safetensors file in it.

    Raises:
        InputError: if it is missing, is no such file, or was written by a newer format.
    """
    folder = _folder(place)
    path = folder / CONFIG_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder} is not a model folder: cannot read {CONFIG_FILE}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); train or download the model again") from None
    if not isinstance(stored, dict) or not {"format_version", "model"} <= stored.keys():
        raise InputError(f"{path} does not describe a crossdino model (it lacks format_version or model)")
    found = stored["format_version"]
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise InputError(f"{path} has format_version {found!r}, which is none; train or download the model again")
    if found > FORMAT_VERSION:
        raise InputError(
            f"{path} was made by a newer crossdino ({stored.get('crossdino_version', 'of unknown version')}; "
            f"format_version {found}, this one reads up to {FORMAT_VERSION}): upgrade crossdino"
        )
    unknown = next((key for key in stored if key not in _CONFIG_KEYS), None)
    if unknown is not None:
        raise InputError(f"{path} holds an unknown '{unknown}': if a newer crossdino made it, upgrade crossdino")
    return stored


def read_weights(place: str | Path) -> dict[str, Tensor]:
    """The tensors of a model folder on the CPU, halves as float32.

    Args:
        place: the folder, or the safetensors file in it.

    Raises:
        InputError: if the file is missing or broken.
    """
    path = Path(place) / WEIGHTS_FILE if Path(place).is_dir() else Path(place)
    if not path.is_file():
        raise InputError(f"{path.parent} is not a model folder: {path.name} is missing")
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a readable safetensors file ({error}); train or download it again") from None
    return {name: tensor.float() if tensor.dtype == torch.float16 else tensor for name, tensor in tensors.items()}


def load_weights(
    model: CrossDINO, tensors: Mapping[str, Tensor], source: str | Path, known_misfits: Sequence[str] = ()
) -> None:
    """Load tensors into a model that they must fit exactly.

    Args:
        model: the detector to fill.
        tensors: name -> tensor.
        source: where they come from, for the message.
        known_misfits: what else is known not to fit, in words.

    Raises:
        InputError: with the first things that do not fit.
    """
    misfits = [*known_misfits, *unfitting_keys(model.state_dict(), tensors)]
    if misfits:
        raise InputError(_describe(misfits, source))
    model.load_state_dict(dict(tensors))


def start_from(model: CrossDINO, source: str | Path) -> list[str]:
    """Start a training from stored weights, whatever their classes and their number of queries.

    The stored model is changed to the classes and the number of queries of `model` as `crossdino.adaptation` does it:
    what a class of the same name has learnt is kept. Then everything must fit.

    Args:
        model: the detector to fill.
        source: as for `load_model`.

    Returns:
        What was kept and what begins anew, one line each; none where everything was taken over as it is.

    Raises:
        InputError: if there is no such model, or its architecture differs in anything else.
    """
    from crossdino.adaptation import change_classes, change_num_queries

    stored = load_model(source)
    lines: list[str] = []
    if stored.config.class_names != model.config.class_names:
        lines += change_classes(stored, model.config.class_names)
    lines += change_num_queries(stored, model.config.num_queries)
    # Two settings that the tensors' shapes do not tell, or tell in many words.
    misfits = [
        f"{name} is {getattr(stored.config, name)} instead of {getattr(model.config, name)}"
        for name in ("num_heads", "fusion")
        if getattr(stored.config, name) != getattr(model.config, name)
    ]
    load_weights(model, stored.state_dict(), source, misfits)
    return lines


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


def _folder(place: str | Path) -> Path:
    """The model folder of what `find_model` gives."""
    return Path(place).parent if Path(place).is_file() else Path(place)


def _read_calibration(place: Path, model: CrossDINO) -> Calibration | None:
    """The calibration beside the weights, if it belongs to them."""
    path = _folder(place) / CALIBRATION_FILE
    if not path.is_file():
        return None
    from crossdino.evaluation.calibration import Calibration

    remedy = "run `crossdino calibrate` again, or delete the file"
    try:
        found = Calibration.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # an InputError of `from_dict` is a ValueError, as that of JSON is
        warnings.warn(f"{path} is left out, {error}; {remedy}", CalibrationWarning, stacklevel=3)
        return None
    if found.weights != weights_digest(model) or len(found.class_names) != model.config.num_classes:
        what = f"it belongs to other weights ({found.weights}) than {place}"
        warnings.warn(f"{path} is left out, {what}: {remedy}", CalibrationWarning, stacklevel=3)
        return None
    return found


def _section(stored: Mapping[str, Any], name: str, kind: type[T], place: Path) -> T:
    """One part of a stored configuration; what it lacks has its default."""
    path = _folder(place) / CONFIG_FILE
    values = stored.get(name, {})
    if not isinstance(values, dict):
        raise InputError(f"{path}: '{name}' must hold settings, not {values!r}")
    try:
        return from_dict(values, kind)
    except InputError as error:
        raise InputError(f"{path}: {error}; if a newer crossdino made it, upgrade crossdino") from None


def _reason(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _describe(misfits: list[str], source: str | Path) -> str:
    more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
    return f"the weights of {source} do not fit this model: {', '.join(misfits[:3])}{more}; use the recipe they are of"
