"""The command line: `crossdino inspect | tile | train | evaluate | calibrate | predict | ...`.

`parser` holds the options of all verbs; what they do is in a file for each group of verbs. The rooms that import torch
are opened inside the commands, so that `--help` and mistakes answer at once. A mistake of the user is one line on
stderr and exit status 2.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from crossdino.allocator import tune_allocator
from crossdino.cli.output import report_mistake
from crossdino.cli.parser import WITH_SETTINGS, build_parser, split_settings
from crossdino.cli.train import resolve_config
from crossdino.config import close_matches, option_names
from crossdino.errors import InputError

# What runs a network, in this process or in forked ones.
_COMPUTING = ("inspect", "train", "evaluate", "calibrate", "predict")

__all__ = ["entry_point", "main", "resolve_config", "split_settings"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after `crossdino`; None takes those of the process.

    Returns:
        The exit status: 0, 2 after a mistake of the user, 130 after Ctrl-C (or SIGTERM while training or predicting).
    """
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        settings: dict[str, str] = {}
        if words[:1] and words[0] in WITH_SETTINGS:
            words, settings = split_settings(words)
        parser = build_parser()
        options, unknown = parser.parse_known_args(words)
        if unknown:
            known = [
                *options.known_options,
                *(f"--{name}" for name in option_names() if options.command in WITH_SETTINGS),
            ]
            word = next((word for word in unknown if word.startswith("-")), unknown[0])
            raise InputError(f"unknown argument '{word}'{close_matches(word.partition('=')[0], known)}")
        # As from `--output "$OUT"` where OUT is not set; taken for a folder it would be the present one.
        empty = next((name for name, value in vars(options).items() if value == ""), None)
        if empty is not None:
            raise InputError(f"--{empty.replace('_', '-')} is empty")
        if options.command in _COMPUTING:
            tune_allocator()
        return options.run(options, settings) if options.command in WITH_SETTINGS else options.run(options)
    except InputError as error:
        return report_mistake(str(error))
    except OSError as error:
        if error.filename is None:
            raise
        return report_mistake(f"cannot use {error.filename}: {error.strerror}")
    except KeyboardInterrupt as interrupt:
        # A training that saved its state first (`TrainingInterrupted`) says where it can go on.
        print(": ".join(filter(None, ("crossdino: interrupted", str(interrupt)))), file=sys.stderr)
        return 130


def entry_point() -> None:
    """The console script `crossdino`."""
    # supervision tells at its import that it works without OpenCV, which is no news for the user of a command line.
    warnings.filterwarnings("ignore", message="OpenCV .*is not installed")
    warnings.showwarning = _show_warning
    sys.exit(main())


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings as one line, like our errors; those of others as Python shows them."""
    if category.__module__.partition(".")[0] == __name__.partition(".")[0]:
        text = f"crossdino: warning: {' '.join(str(message).split())}\n"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)
