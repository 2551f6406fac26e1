"""What the planner proposes: settings with their reasons, as values, as JSON and as a file for `crossdino train`."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossdino.config import Config, option_names, to_dict
from crossdino.memory_plan import MemoryPlan
from crossdino.writing import written_whole


@dataclass(frozen=True)
class Setting:
    """One line of a proposal.

    Attributes:
        name: dotted, e.g. `model.num_queries`.
        value: what is proposed.
        reason: why, with the numbers that it follows from.
        changed: false where the recipe's own value is right.
    """

    name: str
    value: Any
    reason: str
    changed: bool = True


@dataclass(frozen=True)
class Proposal:
    """Settings for a data set.

    Attributes:
        base: the recipe without any change.
        config: the complete configuration with what was given and what is proposed.
        settings: every setting that was considered, with its reason.
        notes: what no setting can mend, one line each.
        memory: of a step; None where nothing was estimated.
        epoch_items: images or tiles of an epoch.
    """

    base: Config
    config: Config
    settings: tuple[Setting, ...]
    notes: tuple[str, ...]
    memory: MemoryPlan
    epoch_items: int

    @property
    def epoch_seconds(self) -> float | None:
        """Time of an epoch by the last trial, without loading and evaluation; None without a trial."""
        done = [trial for trial in self.memory.trials if trial.fits and trial.seconds is not None]
        if not done or done[-1].seconds is None:
            return None
        return math.ceil(self.epoch_items / done[-1].batch_size) * done[-1].seconds

    def changes(self) -> dict[str, Any]:
        """Dotted name -> value of everything that differs from the recipe, but where the data is."""
        before, after = to_dict(self.base), to_dict(self.config)
        found: dict[str, Any] = {}
        for name in option_names():
            section, _, inner = name.partition(".")
            pair = (before[section][inner], after[section][inner]) if inner else (before[section], after[section])
            if pair[0] != pair[1] and name not in ("data.source", "model.class_names", "name"):
                found[name] = pair[1]
        return found

    def to_yaml(self, title: str = "") -> str:
        """The changes as a file for `crossdino train --config`, with the reasons as comments.

        Args:
            title: comment lines for the top.
        """
        import yaml

        reasons = {setting.name: setting.reason for setting in self.settings if setting.changed}
        lines = [f"# {line}" for line in title.splitlines()]
        changes = self.changes()
        section = ""
        for name, value in changes.items():
            part, _, inner = name.rpartition(".")
            if part != section:
                lines.append(f"{part}:")
                section = part
            indent = "  " if part else ""
            lines += textwrap.wrap(
                reasons.get(name, "as given"), 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
            )
            shown = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
            lines.append(f"{indent}{inner}: {shown.removesuffix('...' + chr(10)).strip()}")
        return "\n".join(lines if changes else [*lines, "# The recipe fits as it is.", "{}"]) + "\n"

    def write_yaml(self, path: str | Path, title: str = "") -> None:
        """Write `to_yaml` to a file, whole or not at all."""
        with written_whole(Path(path)) as partial:
            partial.write_text(self.to_yaml(title), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        memory = dataclasses.asdict(self.memory)
        return {
            "recipe": self.base.name,
            "settings": [vars(setting) for setting in self.settings],
            "changes": self.changes(),
            "notes": list(self.notes),
            "memory": memory,
            "epoch_items": self.epoch_items,
            "epoch_seconds": self.epoch_seconds,
        }
