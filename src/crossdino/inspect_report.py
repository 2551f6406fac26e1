"""What `crossdino inspect` prints and writes: tables, the picture, the proposal and all numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from crossdino.config import Config, DataConfig
from crossdino.data.coco import load_coco
from crossdino.data.duplicates import NEAR_DISTANCE, Duplicates
from crossdino.data.formats import ALIASES, find_splits, load_dataset
from crossdino.data.index import BAD_BOXES, DatasetIndex
from crossdino.data.inspection import Inspection, inspect_dataset, split_summary
from crossdino.errors import InputError
from crossdino.planner import propose
from crossdino.progress import duration
from crossdino.proposal import Proposal
from crossdino.visualization.inspection import draw_inspection
from crossdino.writing import written_whole

PICTURE_FILE = "inspect.png"
PROPOSAL_FILE = "proposal.yaml"
NUMBERS_FILE = "inspect.json"
_MOST_CLASSES = 15


def load_splits(data: DataConfig, wanted: Sequence[str] = ()) -> dict[str, DatasetIndex]:
    """The splits of a data set, each with its own class names.

    Args:
        data: `source`, and single files that go before it.
        wanted: names of splits; empty: `train` and `val`, as far as there are any, or else what there is.

    Returns:
        Name (`train`, `val`, `test`) -> index, in that order.

    Raises:
        InputError: there is no such split, or its files cannot be used.
    """
    files = {
        "train": (data.train_annotations, data.train_images),
        "val": (data.val_annotations, data.val_images),
        "test": (None, None),
    }
    present = set(find_splits(data.source)) if data.source is not None else set()
    present |= {name for name, (file, _) in files.items() if file is not None}
    if not present:
        raise InputError("no data: give a folder, a YAML file or a COCO JSON file")
    canonical = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
    unknown = [name for name in wanted if canonical.get(name) not in present]
    if unknown:
        raise InputError(f"{data.source} has no split {unknown[0]!r}, only {', '.join(sorted(present))} (--split)")
    chosen = {canonical[name] for name in wanted} or present & {"train", "val"} or present
    splits: dict[str, DatasetIndex] = {}
    for name, (file, images) in files.items():
        if name not in chosen:
            continue
        # The headers are enough: the search for duplicates decodes every image anyway.
        if file is not None:
            splits[name] = load_coco(file, images, ignore_categories=data.ignore_categories, check="headers")
        elif data.source is not None:
            splits[name] = load_dataset(data.source, name, ignore_categories=data.ignore_categories, check="headers")
    return splits


def inspect_and_propose(
    config: Config,
    base: Config,
    given: Sequence[str],
    console: Console,
    *,
    splits: Sequence[str] = (),
    memory_bytes: float | None = None,
    trial: bool = True,
    duplicates: bool = True,
    output: Path | None = None,
    numbers: Path | None = None,
    how_to: str = "",
) -> tuple[Inspection, Proposal]:
    """Inspect the data of a configuration, propose settings, print both and write what is asked for.

    Args:
        config: with `data.source` or single files.
        base: the recipe without changes.
        given: dotted names of settings that shall stay.
        console: where to print.
        splits: names of splits to look at.
        memory_bytes: what a step may take; None: what is free.
        trial: check the memory by a step.
        duplicates: compare the images' files.
        output: folder for the picture, the proposal and the numbers.
        numbers: another file for the numbers.
        how_to: how to train with the proposal, for its first lines.
    """
    indices = load_splits(config.data, splits)
    for index in indices.values():
        for line in index.problems.lines():
            console.print(f"{index.annotations}: {line}", soft_wrap=True, markup=False)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    total = sum(len(index.records) for index in indices.values())
    with Progress(console=console, transient=True, disable=not console.is_terminal or not duplicates) as progress:
        task = progress.add_task("comparing images", total=total)
        inspection = inspect_dataset(indices, duplicates=duplicates, on_image=lambda: progress.advance(task))
    _print_inspection(console, inspection, config)
    if config.data.bad_boxes == "error" and any(
        problem.what in BAD_BOXES for index in indices.values() for problem in index.problems
    ):
        console.print("a training refuses these boxes unless they are mended: --data.bad_boxes mend", soft_wrap=True)

    proposal = propose(
        inspection,
        config,
        base=base,
        given=given,
        memory_bytes=memory_bytes,
        trial=trial,
        on_trial=lambda text: console.print(f"{text} ...", soft_wrap=True, markup=False),
    )
    _print_proposal(console, proposal)
    report = {"data": inspection.to_dict(proposal.config.data), "proposal": proposal.to_dict()}
    text = json.dumps(report, indent=2) + "\n"
    if output is not None:
        with written_whole(output / PICTURE_FILE) as partial:
            draw_inspection(inspection, proposal.config, partial)
        proposal.write_yaml(output / PROPOSAL_FILE, f"Proposed by `crossdino inspect`. To train with it:\n  {how_to}")
        with written_whole(output / NUMBERS_FILE) as partial:
            partial.write_text(text, encoding="utf-8")
        names = ", ".join(str(output / name) for name in (PICTURE_FILE, NUMBERS_FILE, PROPOSAL_FILE))
        console.print(
            f"written: {names}; to train: {how_to}",
            soft_wrap=True,
            markup=False,
        )
    else:
        console.print("--output DIR writes the picture, all numbers and the proposal as a file for train --config")
    if numbers is not None:
        with written_whole(numbers) as partial:
            partial.write_text(text, encoding="utf-8")
    return inspection, proposal


def _print_inspection(console: Console, inspection: Inspection, config: Config) -> None:
    summaries = {key: split_summary(split, config.data) for key, split in inspection.splits.items()}
    table = Table(title=f"data, with sizes as sqrt(width x height); network pixels by the settings of {config.name}")
    table.add_column("")
    for key in summaries:
        table.add_column(key, justify="right")
    for label, values in _rows(summaries):
        table.add_row(label, *values)
    console.print(table)

    table = Table(title="classes")
    table.add_column("class")
    for key in summaries:
        table.add_column(f"objects {key}", justify="right")
        table.add_column(f"images {key}", justify="right")
    ranked = sorted(inspection.classes, key=lambda item: -sum(item.objects.values()))
    for item in ranked[:_MOST_CLASSES]:
        cells = [f"{counts.get(key, 0):,}" for key in summaries for counts in (item.objects, item.images)]
        table.add_row(item.name, *cells)
    if len(ranked) > _MOST_CLASSES:
        table.add_row(f"... and {len(ranked) - _MOST_CLASSES} more")
    console.print(table)
    if inspection.duplicates is not None:
        _print_duplicates(console, inspection.duplicates)
    for line in inspection.warnings():
        console.print(f"warning: {line}", soft_wrap=True, markup=False)


def _print_duplicates(console: Console, twins: Duplicates) -> None:
    """How many images have a twin, what counts as one, and the closest pairs."""
    parts = []
    for key, count in twins.num_images.items():
        exact = twins.exact_within[key] + twins.exact_across[key]
        near = twins.near_within[key] + twins.near_across[key]
        parts.append(f"{key} {exact} exact and {near} near of {count}")
    console.print(
        f"images with a duplicate: {'; '.join(parts)} (near: {NEAR_DISTANCE} or fewer of 256 bits of a difference hash "
        "differ, as between neighbouring frames of a fixed camera)",
        soft_wrap=True,
    )
    for kind, first, second in twins.examples:
        pair = " and ".join(f"{path.parent.name}/{path.name}" for path in (first, second))
        console.print(f"   {kind}: {pair}", soft_wrap=True, markup=False)


def _rows(summaries: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The lines of the table: a label, and a cell for each split."""

    def over(make: Any) -> list[str]:
        return [make(summary) for summary in summaries.values()]

    def three(name: str) -> list[str]:
        return over(lambda s: " / ".join(f"{s[name][q]:.1f}" for q in ("10", "50", "90")) if s[name] else "-")

    def shares(name: str) -> list[str]:
        return over(lambda s: " / ".join(f"{s[name][q]:.0%}" for q in ("8", "16", "32")) if s[name] else "-")

    def spread(name: str) -> list[str]:
        return over(lambda s: f"{s[name]['mean']:.1f} / {s[name]['95']:.0f} / {s[name]['most']}")

    def image_sizes(summary: Mapping[str, Any]) -> str:
        sizes = summary["image_sizes"]
        shown = ", ".join(f"{width} x {height}: {count}" for height, width, count in sizes["common_hw"][:2])
        return shown + (f", {sizes['distinct'] - 2} more sizes" if sizes["distinct"] > 2 else "")

    rows = [
        ("images (without objects)", over(lambda s: f"{s['images']:,} ({s['images_without_objects']:,})")),
        ("objects (regions to ignore)", over(lambda s: f"{s['objects']:,} ({s['ignored_regions']:,})")),
        ("image sizes, width x height", over(image_sizes)),
        ("objects per image: mean / 95 % / most", spread("objects_per_image")),
        ("size in the file, px: 10 / 50 / 90 %", three("size_px")),
        ("   below 8 / 16 / 32 px", shares("size_px_share_below")),
        ("size at the network's input, px", three("network_size_px")),
        ("   below 8 / 16 / 32 px", shares("network_size_px_share_below")),
        ("   while training, smallest", three("smallest_training_size_px")),
        ("   while training, largest", three("largest_training_size_px")),
        ("width / height: 10 / 50 / 90 %", three("aspect_ratio")),
        ("overlapping another by IoU > 0.5", over(lambda s: f"{s['overlapping_objects']:,}")),
    ]
    if all("tiles" in summary for summary in summaries.values()):
        rows.insert(4, ("tiles (without objects)", over(lambda s: f"{s['tiles']:,} ({s['tiles_without_objects']:,})")))
        rows.insert(5, ("objects per tile: mean / 95 % / most", spread("objects_per_tile")))
    return rows


def _print_proposal(console: Console, proposal: Proposal) -> None:
    table = Table(title=f"proposal, on top of {proposal.base.name}", show_lines=True)
    table.add_column("setting", no_wrap=True)
    table.add_column("value")
    table.add_column("why")
    for setting in proposal.settings:
        value = str(setting.value) if setting.changed else f"{setting.value} (as it is)"
        table.add_row(setting.name, value, setting.reason, style="bold" if setting.changed else "")
    console.print(table)
    for trial in proposal.memory.trials:
        seconds = f", {trial.seconds:.1f} s an update" if trial.seconds is not None else ""
        outcome = "" if trial.fits else ": too much"
        kept = ", activations computed again" if trial.activation_checkpointing else ""
        console.print(
            f"trial step, batch {trial.batch_size}{kept}: {trial.peak_bytes / 1e9:.2f} GB{seconds}{outcome}",
            soft_wrap=True,
        )
    if proposal.epoch_seconds is not None:
        batch = proposal.config.training.batch_size
        console.print(
            f"an epoch has {proposal.epoch_items:,} {'tiles' if proposal.config.data.tile_size else 'images'}, "
            f"{math.ceil(proposal.epoch_items / batch):,} batches: about {duration(proposal.epoch_seconds)} without "
            "loading and evaluation",
            soft_wrap=True,
        )
    for note in proposal.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
