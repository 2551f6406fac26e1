"""`crossdino inspect`: look at a data set and propose settings for it."""

from __future__ import annotations

import argparse
from pathlib import Path

from crossdino.cli.output import make_console
from crossdino.cli.train import with_file
from crossdino.config import Config, flattened, read_yaml, to_dict, with_changes
from crossdino.errors import InputError


def run_inspect(options: argparse.Namespace, settings: dict[str, str]) -> int:
    """Print the report, and write what is asked for."""
    output = Path(options.output) if options.output is not None else None
    if output is not None and output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; name a folder")
    numbers = Path(options.json) if options.json is not None else None
    if numbers is not None and not numbers.absolute().parent.is_dir():
        raise InputError(f"cannot write {numbers}: no folder {numbers.absolute().parent}")
    name = options.recipe or ("compact" if options.config is None else None)
    base = Config()
    if name is not None:
        from crossdino.recipes import recipe

        base = recipe(name)
    file_settings = flattened(read_yaml(options.config)) if options.config is not None else {}
    source = {"data.source": options.data} if options.data is not None else {}
    config = with_file(base, options.config) if options.config is not None else base
    config = with_changes(config, {**source, **settings})
    # A whole configuration as a run writes it repeats most of the recipe: only what differs is the user's choice.
    before, after = (flattened(to_dict(one)) for one in (base, config))
    given = [name for name in after if name in settings or (name in file_settings and before[name] != after[name])]
    from crossdino.inspect_report import PROPOSAL_FILE, inspect_and_propose

    words = ["crossdino train", f"--recipe {name}" if name is not None else ""]
    words += [f"--config {output / PROPOSAL_FILE}" if output is not None else ""]
    words += [f"--data {options.data}" if options.data is not None else ""]
    inspect_and_propose(
        config,
        base,
        given,
        make_console(),
        splits=options.split.split(",") if options.split else (),
        memory_bytes=None if options.memory is None else options.memory * 1e9,
        trial=not options.no_trial,
        duplicates=not options.no_duplicates,
        output=output,
        numbers=numbers,
        how_to=" ".join(filter(None, words)),
    )
    return 0
