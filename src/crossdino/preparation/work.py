"""The output folder of a preparation: what is written there, how far it got, and what it may not be mixed with.

    DIR/benchmark.json           what was prepared and from where; written last, so its presence means finished
    DIR/.prepare.json            the same while it is at work: the splits that are finished
    DIR/data.yaml                train, val and test as `crossdino train --data DIR` reads them
    DIR/annotations/SPLIT.json   COCO
    DIR/images/SPLIT             the images: a link to the source's folder, or files

Every file is written whole or not at all, and a split is noted as finished after its last one; so a run that was
stopped goes on at the split where it was, and what it writes is the same byte by byte. The source stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar

from crossdino.benchmarks import Benchmark
from crossdino.data.check import hash_file
from crossdino.errors import InputError
from crossdino.parallel import in_processes
from crossdino.preparation.contract import SplitResult
from crossdino.preparation.folders import (
    FINISHED,
    FORMAT,
    UNFINISHED,
    check_output,
    check_source,
    entries,
    finished_splits,
    make_folder,
)
from crossdino.writing import cannot_write, is_full, partial_path, write_whole

Images = Literal["link", "copy", "none"]
# Called as `(what is done, done, total)`.
Progress = Callable[[str, int, int], None]

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
_Found = TypeVar("_Found")


class Work:
    """What the preparation of a benchmark works with.

    Attributes:
        benchmark: its published facts.
        source: the folder with the raw data.
        output: the folder that is written.
        options: every option with its value.
        wanted: the splits asked for; empty: all that are found.
        images: `link`, `copy`, or `none` (annotations only).
        num_processes: that read or cut images at the same time.
        notes: lines for the user about the whole data set.
        splits: what `benchmark.json` says of each finished split.
        was_there: whether everything asked for was finished before.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        source: Path,
        output: Path,
        options: Mapping[str, Any],
        *,
        wanted: Sequence[str] = (),
        images: Images = "link",
        num_processes: int = 1,
        on_progress: Progress | None = None,
    ) -> None:
        self.benchmark = benchmark
        self.source = source
        self.output = output
        self.options: dict[str, Any] = json.loads(json.dumps(options))  # as they are read back: lists, no tuples
        self.images: Images = images
        self.num_processes = num_processes
        self.notes: list[str] = []
        self.wanted = [self._official(name) for name in wanted]
        self._on_progress = on_progress
        check_source(source)
        check_output(output, source)
        rules = {f"--{key.replace('_', '-')}": value for key, value in self.options.items()}
        mine = {"benchmark": benchmark.name, "source": str(source.resolve()), "--images": images, **rules}
        self.splits: dict[str, dict[str, Any]] = finished_splits(output, mine)
        self.was_there = (output / FINISHED).is_file()

    @property
    def without_images(self) -> bool:
        """Whether only annotations are asked for, so that images are neither looked for nor written."""
        return self.images == "none"

    # --- what there is to do ---

    def choose(
        self, found: Mapping[str, _Found], looked_for: Mapping[str, str], hint: str = ""
    ) -> list[tuple[str, _Found]]:
        """The splits to prepare, in the benchmark's order.

        Args:
            found: official name of a split -> what the preparation wants to remember of it.
            looked_for: official name of every split that can be prepared -> what is looked for, in words.
            hint: what else was found, for the message.

        Returns:
            Those asked for, or all that were found; what is missing then is noted.

        Raises:
            InputError: a split that was asked for is missing, or there is none at all.
        """
        missing = [name for name in self.wanted or looked_for if name not in found]
        if missing and (self.wanted or not found):
            parts = "; ".join(f"{name}: {looked_for.get(name, 'its annotations are not public')}" for name in missing)
            raise InputError(f"{self.source} lacks {parts}. {hint or entries(self.source)}")
        for name in missing:
            if name in self.benchmark.roles.values():
                self.notes.append(f"{name} is not in the source and was left out (looked for {looked_for[name]})")
        names = [name for name in self.benchmark.splits if name in (self.wanted or found)]
        return [(name, found[name]) for name in names]

    def fingerprint(self, annotations: Iterable[Path], images: Iterable[Path] = ()) -> str:
        """What a split was made of: the content of its raw annotations, and names and sizes of its images.

        Raises:
            InputError: a file is missing or cannot be read.
        """
        found = hashlib.sha256()
        for path in annotations:
            try:
                found.update(f"{path.name} {hash_file(path)}\n".encode())
            except OSError as error:
                raise InputError(f"cannot read {path}: {error.strerror or error}; restore it") from None
        for path in images:
            try:
                found.update(f"{path.name} {path.stat().st_size}\n".encode(errors="surrogateescape"))
            except OSError as error:
                raise InputError(f"cannot read image {path}: {error.strerror or error}; restore it") from None
        return found.hexdigest()[:20]

    def finished_before(self, split: str, fingerprint: str) -> SplitResult | None:
        """The result of a split that an earlier run finished, of the same raw data; None: it is to do."""
        entry = self.splits.get(split)
        if entry is None or entry["fingerprint"] != fingerprint or not self._is_whole(entry):
            return None
        return SplitResult(
            split,
            entry["num_images"],
            entry["num_objects"],
            entry["num_ignored"],
            entry["dropped"],
            {check["what"]: check["found"] for check in entry["checks"]},
            tuple(entry["notes"]),
            "originals" in entry,
        )

    def map_images(
        self, function: Callable[[_Task], _Result], tasks: Sequence[_Task], what: str, *, chunk: int = 1
    ) -> list[_Result]:
        """Do something with every image, in several processes where there are many.

        Args:
            function: of a module; it names the file in what it raises (`InputError`).
            tasks: its arguments.
            what: for the progress bar, e.g. `reading val`.
            chunk: images that a process gets at once; many for work of less than a millisecond.

        Returns:
            The results in the order of the tasks.
        """
        results: dict[int, _Result] = {}
        self.progress(what, 0, len(tasks))
        for position, result in in_processes(function, tasks, self.num_processes, chunk=chunk, option="--processes"):
            results[position] = result
            self.progress(what, len(results), len(tasks))
        return [results[position] for position in range(len(tasks))]

    def progress(self, what: str, done: int, total: int) -> None:
        """Tell how far a work is."""
        if self._on_progress is not None:
            self._on_progress(what, done, total)

    # --- what is written ---

    def annotations_path(self, split: str, originals: bool = False) -> Path:
        """The COCO file of a split, or that of its original images."""
        return self.output / "annotations" / f"{split}{'_originals' if originals else ''}.json"

    def images_folder(self, split: str) -> Path:
        """The folder of a split's images, made where it is missing, for those that are written one by one."""
        folder = self.output / "images" / split
        if folder.is_symlink():
            folder.unlink()
        make_folder(folder)
        return folder

    def write_annotations(self, split: str, document: Mapping[str, Any], originals: bool = False) -> None:
        """Write a COCO file, with `info` before what the document holds: where it comes from and by which rules."""
        self._open()
        info = {
            "benchmark": self.benchmark.name,
            "split": split,
            "options": self.options,
            "crossdino": own_version(),
        }
        path = self.annotations_path(split, originals)
        make_folder(path.parent)
        write_whole(path, (json.dumps({"info": info, **document}) + "\n").encode())

    def place_images(self, split: str, images: Path | Mapping[str, Path], names: Sequence[str]) -> None:
        """Put the images of a split into its folder: a link to theirs, or a link to or a copy of each file.

        Args:
            split: its official name.
            images: the folder that holds them; or name -> file where they are spread over several folders.
            names: of the files, relative to the folder.
        """
        self._open()
        if self.without_images:
            return
        place = self.output / "images" / split
        if self.images == "link" and isinstance(images, Path):
            make_folder(place.parent)
            if (place.is_symlink() or not place.exists()) and self._link(place, images):
                return
        files = {name: images / name for name in names} if isinstance(images, Path) else images
        folder = self.images_folder(split)
        links = self.images == "link" and not isinstance(images, Path)
        for done, (name, file) in enumerate(files.items(), start=1):
            links = links and self._link(folder / name, file)
            if not links:
                _copy(file, folder / name)
            self.progress(f"{'linking' if links else 'copying'} {split}", done, len(files))

    def _link(self, place: Path, target: Path) -> bool:
        """A link to a file or folder; False, and a note, where none can be made."""
        target = target.resolve()
        if place.is_symlink() and Path(os.readlink(place)) == target:
            return True
        partial = partial_path(place)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
            partial.symlink_to(target, target_is_directory=target.is_dir())
            os.replace(partial, place)
        except OSError as error:
            line = f"no links can be made in {self.output} ({error.strerror or error}): images are copied"
            if line not in self.notes:
                self.notes.append(line)
            return False
        return True

    def mark_done(self, fingerprint: str, result: SplitResult) -> None:
        """Note that a split is finished, with its counts beside the published ones."""
        self._open()
        split, published = result.split, self.benchmark.splits[result.split]
        found = {"images": result.num_images, "objects": result.num_objects, **result.counted}
        entry: dict[str, Any] = {"annotations": f"annotations/{split}.json"}
        if not self.without_images:
            entry["images"] = f"images/{split}"
        if result.originals:
            entry["originals"] = f"annotations/{split}_originals.json"
        self.splits[split] = entry | {
            "num_images": result.num_images,
            "num_objects": result.num_objects,
            "num_ignored": result.num_ignored,
            "dropped": dict(result.dropped),
            "checks": [
                {"what": what, "found": number, "published": getattr(published, what), "source": published.source}
                for what, number in found.items()
            ],
            "notes": list(result.notes),
            "fingerprint": fingerprint,
        }
        write_whole(self.output / UNFINISHED, self._note())

    def finish(self) -> dict[str, Any]:
        """Write `data.yaml` and, last of all, `benchmark.json`; returns what that says."""
        if not self.was_there:
            write_whole(self.output / "data.yaml", self._data_file().encode())
            write_whole(self.output / FINISHED, self._note())
        (self.output / UNFINISHED).unlink(missing_ok=True)
        return json.loads(self._note())

    # --- the place ---

    def _official(self, name: str) -> str:
        """A split by its official name or by its role (`test` of VisDrone is test-dev)."""
        official = name if name in self.benchmark.splits else self.benchmark.roles.get(name)
        if official is None:
            known = ", ".join(self.benchmark.splits)
            raise InputError(f"{self.benchmark.title} has no split {name!r} (--splits); it has {known}")
        return official

    def _open(self) -> None:
        """From here on the folder is at work: no longer finished, and known to be ours."""
        finished, unfinished = self.output / FINISHED, self.output / UNFINISHED
        if not unfinished.is_file():
            make_folder(self.output)
            write_whole(unfinished, self._note())
        if self.was_there:
            try:
                finished.unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(finished, error) from None
            self.was_there = False

    def _is_whole(self, entry: Mapping[str, Any]) -> bool:
        """Whether the files of a finished split are still there (a link may point to where nothing is any more)."""
        return all(
            (self.output / entry[key]).exists() for key in ("annotations", "images", "originals") if key in entry
        )

    def _note(self) -> bytes:
        """`benchmark.json`; the splits in the benchmark's order, in whichever runs they were made."""
        content = {
            "benchmark": self.benchmark.name,
            "format": FORMAT,
            "crossdino": own_version(),
            "source": str(self.source.resolve()),
            "images": self.images,
            "options": self.options,
            "roles": self._roles(),
            "splits": {name: self.splits[name] for name in self.benchmark.splits if name in self.splits},
            "total_checks": self._total_checks(),
        }
        return (json.dumps(content, indent=2) + "\n").encode()

    def _roles(self) -> dict[str, str]:
        """Train, val and test -> the split that plays it: the literature's, or else the one of that name.

        Where training is not on the literature's split (AI-TOD's train instead of trainval) val is what is called so.
        """
        roles: dict[str, str] = {}
        for role in ("train", "val", "test"):
            names = [self.benchmark.roles.get(role, role), role]
            if self.benchmark.roles["train"] not in self.splits:
                names.reverse()
            there = [name for name in names if name in self.splits]
            roles |= {role: there[0]} if there else {}
        return roles

    def _total_checks(self) -> list[dict[str, Any]]:
        """What all splits hold together beside what is published about that, once all of them are there."""
        total = self.benchmark.total
        parts = [name for name in self.splits if "trainval" not in self.splits or name not in ("train", "val")]
        covered = {*parts, *(("train", "val") if "trainval" in parts else ())}
        if total is None or covered != set(self.benchmark.splits):
            return []
        checks = [check for name in parts for check in self.splits[name]["checks"]]
        return [
            {
                "what": what,
                "found": sum(check["found"] for check in checks if check["what"] == what),
                "published": getattr(total, what),
                "source": total.source,
            }
            for what in ("images", "objects")
        ]

    def _data_file(self) -> str:
        """`data.yaml`; JSON strings are YAML strings."""
        lines = [f"# {self.benchmark.title}, by `crossdino prepare {self.benchmark.name}`; see {FINISHED}\n"]
        for role, split in self._roles().items():
            entry = {key: self.splits[split][key] for key in ("annotations", "images") if key in self.splits[split]}
            lines.append(f"{role}: {json.dumps(entry)}\n")
        return "".join(lines)


def _copy(file: Path, place: Path) -> None:
    """A copy of a file, unless it is there already."""
    partial = partial_path(place)
    try:
        if place.is_symlink() or not place.is_file() or place.stat().st_size != file.stat().st_size:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, partial)
            os.replace(partial, place)
    except OSError as error:
        partial.unlink(missing_ok=True)
        # That the disk is full is told with the name of the file that is read.
        if error.filename is not None and Path(error.filename) == file and not is_full(error):
            raise InputError(f"cannot read image {file}: {error.strerror}; restore it") from None
        raise cannot_write(place, error) from None


def own_version() -> str:
    """This package's version."""
    try:
        return version("crossdino")
    except PackageNotFoundError:
        return "not installed"
