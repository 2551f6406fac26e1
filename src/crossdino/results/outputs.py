"""The files that a run writes of its pictures, in all formats at once.

While a run goes, `growing_outputs` keeps CSV, GeoJSON and labels up to date. At its end, or when it is stopped,
`write_outputs` makes all files anew from the journals, in the order of the sources: however often a run was stopped and
by however many processes it was done, the same pictures give the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from crossdino.errors import InputError
from crossdino.results.coco_files import coco_file, coco_results_file
from crossdino.results.csv_files import csv_files, growing_csv_files
from crossdino.results.geojson_files import write_geojson, write_labels
from crossdino.results.journal import JOURNAL_FILE, JournalHeader
from crossdino.results.journal_index import JournalIndex
from crossdino.results.parquet_files import parquet_files, require_pyarrow
from crossdino.results.picture_result import PictureResult

FORMATS = ("coco", "coco-results", "csv", "geojson", "parquet", "yolo")
_STEM = "predictions"
COCO_FILE = f"{_STEM}.json"

AddResult = Callable[[PictureResult], object]


def check_formats(formats: Sequence[str], coco_name: str = COCO_FILE) -> list[str]:
    """Refuse formats that cannot be written; to be called before a run begins.

    Args:
        formats: of `FORMATS`.
        coco_name: file name of the COCO file.

    Returns:
        The names of the files that stand for the whole run.

    Raises:
        InputError: an unknown format, a missing package, or a file name that another file has.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown:
        raise InputError(f"unknown format {unknown[0]!r}; choose among {', '.join(FORMATS)}")
    if "parquet" in formats:
        require_pyarrow()
    if "coco" in formats and (Path(coco_name).name != coco_name or coco_name in ("", ".", "..")):
        raise InputError(f"--json {coco_name} must be a plain file name: it is written into --output")
    names = {
        "coco": [coco_name],
        "coco-results": [f"{_STEM}_coco_results.json"],
        "csv": [f"{_STEM}.csv", f"{_STEM}_images.csv"],
        "parquet": [f"{_STEM}.parquet", f"{_STEM}_images.parquet"],
    }
    files = [file for name in dict.fromkeys(formats) for file in names.get(name, ())]
    others = {JOURNAL_FILE, *(file for file in files if file != coco_name)}
    if "coco" in formats and (coco_name in others or files.count(coco_name) > 1):
        raise InputError(f"--json {coco_name} is the name of another file of the run; choose another")
    return files


@contextmanager
def open_outputs(
    folder: str | Path,
    formats: Sequence[str],
    header: JournalHeader,
    *,
    coco_name: str = COCO_FILE,
    image_ids: Mapping[str, int] | None = None,
) -> Iterator[AddResult]:
    """Write pictures in several formats; memory does not grow with their number.

    The files take their names when the block ends well; when it does not, older ones stay as they are.

    Args:
        folder: made where it does not exist.
        formats: of `FORMATS`.
        header: of the run.
        coco_name: file name of the COCO file.
        image_ids: in the COCO files, see `read_image_ids`; None: pictures are counted.

    Yields:
        What takes the pictures, one after the other.

    Raises:
        InputError: as `check_formats`; or a file cannot be written.
    """
    check_formats(formats, coco_name)
    folder = Path(folder)
    with _written_in(folder), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        adds: list[AddResult] = []
        for name in dict.fromkeys(formats):
            if name == "coco":
                adds.append(stack.enter_context(coco_file(folder / coco_name, header, image_ids)))
            elif name == "coco-results":
                path = folder / f"{_STEM}_coco_results.json"
                adds.append(stack.enter_context(coco_results_file(path, header, image_ids)))
            elif name == "csv":
                adds.append(stack.enter_context(csv_files(folder, header, _STEM)))
            elif name == "parquet":
                adds.append(stack.enter_context(parquet_files(folder, header, _STEM)))
        adds += _files_of_pictures(folder, formats, header)
        with _kept_apart():
            yield _all_of(folder, adds)


def write_outputs(
    folder: str | Path,
    formats: Sequence[str],
    index: JournalIndex,
    file_names: Sequence[str] | None = None,
    *,
    coco_name: str = COCO_FILE,
    image_ids: Mapping[str, int] | None = None,
) -> None:
    """Make all files of a run from its journals.

    Args:
        folder: where.
        formats: of `FORMATS`.
        index: the journals.
        file_names: the sources in their order; None: all that the journals know.
        coco_name: file name of the COCO file.
        image_ids: see `open_outputs`.

    Raises:
        InputError: as `open_outputs`; or a journal is damaged.
    """
    with open_outputs(folder, formats, index.header, coco_name=coco_name, image_ids=image_ids) as add:
        for result in index.read(file_names):
            add(result)


@contextmanager
def growing_outputs(
    folder: str | Path, formats: Sequence[str], header: JournalHeader, done: Iterable[PictureResult] = ()
) -> Iterator[AddResult]:
    """Those of the formats that can be read while the run goes: CSV, GeoJSON, labels.

    Args:
        folder: made where it does not exist.
        formats: of `FORMATS`; what can only be written as a whole is passed over.
        header: of the run.
        done: the pictures of an earlier part of the run.

    Yields:
        What takes the pictures; their rows and files are there when it returns.

    Raises:
        InputError: as `open_outputs`.
    """
    check_formats(formats)
    folder = Path(folder)
    with _written_in(folder), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        adds = _files_of_pictures(folder, formats, header)
        if "csv" in formats:
            adds.append(stack.enter_context(growing_csv_files(folder, header, _STEM, done)))
        with _kept_apart():
            yield _all_of(folder, adds)


def _files_of_pictures(folder: Path, formats: Sequence[str], header: JournalHeader) -> list[AddResult]:
    adds: list[AddResult] = []
    if "geojson" in formats:
        adds.append(lambda result: write_geojson(folder, result, header))
    if "yolo" in formats:
        adds.append(lambda result: write_labels(folder, result))
    return adds


def _all_of(folder: Path, adds: Sequence[AddResult]) -> AddResult:
    def add(result: PictureResult) -> None:
        with _written_in(folder):
            for one in adds:
                one(result)

    return add


class _OthersError(Exception):
    """An error of the caller's block, on its way out."""


@contextmanager
def _kept_apart() -> Iterator[None]:
    """Lets errors of the caller's block pass by `_written_in`, which is for our own files."""
    try:
        yield
    except OSError as error:
        raise _OthersError from error


@contextmanager
def _written_in(folder: Path) -> Iterator[None]:
    """Tells the user when a file cannot be written."""
    try:
        yield
    except _OthersError as error:
        assert error.__cause__ is not None
        raise error.__cause__ from None
    except OSError as error:
        raise InputError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; the journal has all that was found: "
            "make room and run the same command again"
        ) from None
