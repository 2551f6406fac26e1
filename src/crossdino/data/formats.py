"""Data sets in any usual form: which format a folder or a file is in, where its splits lie, and reading one of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossdino.data.check import Check, Progress
from crossdino.data.coco import CocoSplit, find_coco, find_coco_alone, load_coco
from crossdino.data.index import DatasetIndex
from crossdino.data.voc import VocSplit, find_voc, load_voc
from crossdino.data.yolo import YoloSplit, find_root, find_yolo, load_yolo, read_names, read_yolo_file
from crossdino.errors import InputError

Split = CocoSplit | YoloSplit | VocSplit

# The splits, and the names that others give them.
ALIASES: dict[str, tuple[str, ...]] = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}

KNOWN = (
    "train.json, annotations/instances_train*.json or train/_annotations.coco.json (COCO); data.yaml, or images/train "
    "and labels/train, or train/images and train/labels (YOLO); Annotations/*.xml, or train/*.xml beside the images "
    "(Pascal VOC)"
)


def load_dataset(
    source: str | Path,
    split: str = "train",
    *,
    class_names: Sequence[str] | None = None,
    ignore_categories: Sequence[str] = (),
    require_images: bool = True,
    check: Check = "headers",
    on_progress: Progress | None = None,
) -> DatasetIndex:
    """Read one split of a data set in COCO, YOLO or Pascal VOC form (docs/data.md shows the layouts).

    Args:
        source: a folder, a YAML data file, or a COCO JSON file (which has no splits: it is read whatever `split` says).
        split: `train`, `val` (or `valid`, `validation`) or `test`.
        class_names: names in the wanted order of the labels: read validation data with those of the training data.
            None: the data set's own order (COCO: by category id; YOLO: by class index; VOC: alphabetical).
        ignore_categories: names of categories whose boxes are regions to ignore for every class; they are no classes.
        require_images: False takes COCO and VOC files without looking for the images. YOLO's boxes need them.
        check: `headers` reads the images' sizes, `full` decodes every image that is not remembered from before.
        on_progress: called as `on_progress(done, total)` while images are checked.

    Returns:
        The index. What was mended or left out is in its `problems`; `refuse_bad_boxes` insists on boxes without any.

    Raises:
        InputError: nothing, or more than one thing, is found, or it cannot be used. Where single files are at fault it
            is a `DataError`, after the whole split was looked at, with every problem as `problems`.
    """
    path = Path(source)
    name = _canonical(split)
    splits = find_splits(path)
    found = splits["train"] if path.suffix.lower() == ".json" else splits.get(name)
    if found is None:
        raise InputError(f"{path} has no split {split!r}, only {', '.join(map(repr, splits))}; add it or name another")
    if isinstance(found, YoloSplit):
        return load_yolo(found, class_names, ignore_categories=ignore_categories, check=check, on_progress=on_progress)
    if isinstance(found, VocSplit):
        parts = {key: part for key, part in splits.items() if isinstance(part, VocSplit)}
        return load_voc(
            path,
            parts,
            name,
            class_names,
            require_images,
            ignore_categories=ignore_categories,
            check=check,
            on_progress=on_progress,
        )
    return load_coco(
        found.annotations,
        found.images,
        class_names,
        require_images,
        ignore_categories=ignore_categories,
        check=check,
        on_progress=on_progress,
    )


def find_splits(source: str | Path) -> dict[str, Split]:
    """The splits of a data set, by `train`, `val` and `test`; nothing is read but YAML files and names.

    Args:
        source: as for `load_dataset`. A COCO JSON file alone is `train`.

    Raises:
        InputError: nothing is found there, or several things that could be meant.
    """
    path = Path(source)
    if path.is_dir():
        return _search_folder(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a folder, a YAML file or a COCO JSON file with the data")
    if path.suffix.lower() == ".json":
        return {"train": CocoSplit(path)}
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise InputError(f"{path} is no data set; give a folder, a YAML file or a COCO JSON file")
    values = _read_yaml(path)
    if not _describes_data(values):
        raise InputError(
            f"{path} does not describe data: it needs 'train' and 'names' (YOLO), or 'train' with 'annotations' and "
            "'images' (COCO)"
        )
    return _read_data_file(path, values)


def _canonical(split: str) -> str:
    """The split's name here."""
    for name, aliases in ALIASES.items():
        if split in aliases:
            return name
    raise InputError(f"unknown split {split!r}; it is one of {', '.join(map(repr, ALIASES))}")


def _search_folder(folder: Path) -> dict[str, Split]:
    """The splits in a folder, in the one format that is found there."""
    found: dict[str, dict[str, Split]] = {}
    data_file = _find_data_file(folder)
    values = {} if data_file is None else _read_yaml(data_file)
    names: dict[int, str] = {}
    if data_file is not None and _describes_data(values):
        found[f"a data file ({data_file.name})"] = _read_data_file(data_file, values)
    elif data_file is not None and "names" in values:
        names = read_names(data_file, values)
    # A data file says where its annotations or labels lie; what else looks like them is the same, or was left out.
    described = any(isinstance(part, CocoSplit) for splits in found.values() for part in splits.values())
    coco = {} if described else {name: find_coco(folder, name, aliases) for name, aliases in ALIASES.items()}
    yolo = {} if found else {name: find_yolo(folder, name, aliases, names) for name, aliases in ALIASES.items()}
    found["COCO files"] = {name: part for name, part in coco.items() if part is not None}
    found["YOLO labels"] = {name: part for name, part in yolo.items() if part is not None}
    found["Pascal VOC files"] = dict(find_voc(folder, ALIASES))
    found = {what: splits for what, splits in found.items() if splits}
    if not found and (alone := find_coco_alone(folder)) is not None:
        return {"train": alone}
    if not found:
        raise InputError(f"{folder} holds no data set that is known; looked for {KNOWN}")
    if len(found) > 1:
        # Labels without names, as they lie beside COCO's files for other programs, are no choice.
        named = {what: splits for what, splits in found.items() if what != "YOLO labels" or _has_names(splits)}
        if len(named) != 1:
            raise InputError(
                f"{folder} holds {' and '.join(found)}; give the one that is meant: a JSON file, a YAML file that "
                "names the splits, or a folder with one of them"
            )
        found = named
    return next(iter(found.values()))


def _has_names(splits: dict[str, Split]) -> bool:
    return any(isinstance(split, YoloSplit) and split.names for split in splits.values())


def _find_data_file(folder: Path) -> Path | None:
    """The YAML file in a folder that describes data, by its name or as the only one."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".yaml", ".yml") and path.is_file())
    for path in files:
        if path.stem.lower() in ("data", "dataset"):
            return path
    found = [path for path in files if _describes_data(_read_yaml(path))]
    if len(found) > 1:
        raise InputError(
            f"{folder} has several data files ({', '.join(path.name for path in found)}); name one of them"
        )
    return found[0] if found else None


def _read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file with all scalars as text: so a class called `no` or `1` keeps its name."""
    import yaml

    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not a YAML file that can be read: {' '.join(str(error).split())}") from None
    return values if isinstance(values, dict) else {}


def _is_coco_entry(entry: object) -> bool:
    return isinstance(entry, dict) or (isinstance(entry, str) and entry.lower().endswith(".json"))


def _describes_data(values: dict[str, Any]) -> bool:
    """Whether a YAML file is about data, and not, say, a run's configuration."""
    entries = [values[alias] for aliases in ALIASES.values() for alias in aliases if values.get(alias)]
    return bool(entries) and ("names" in values or any(_is_coco_entry(entry) for entry in entries))


def _read_data_file(path: Path, values: dict[str, Any]) -> dict[str, Split]:
    """The splits of a YAML data file in either layout."""
    entries = {
        name: next((values[alias] for alias in aliases if values.get(alias)), None) for name, aliases in ALIASES.items()
    }
    if not any(_is_coco_entry(entry) for entry in entries.values()):
        found = dict(read_yolo_file(path, values, ALIASES))
        if not found:
            raise InputError(f"{path} names no images; add 'train' and 'val' with their folders")
        return dict(found)
    root = find_root(path, values.get("path"))
    splits: dict[str, Split] = {}
    for name, entry in entries.items():
        if entry is None:
            continue
        parts = entry if isinstance(entry, dict) else {"annotations": entry}
        unknown = [key for key in parts if key not in ("annotations", "images")]
        if unknown or not isinstance(parts.get("annotations"), str) or not isinstance(parts.get("images", ""), str):
            raise InputError(f"{path}: '{name}' must hold 'annotations: FILE.json' and, if need be, 'images: FOLDER'")
        images = parts.get("images")
        splits[name] = CocoSplit(root / parts["annotations"], root / images if images else None)
    return splits
