"""How one recipe is made from another."""

from __future__ import annotations

import dataclasses
from typing import Any

from crossdino.config import Config


def vary(config: Config, name: str, **sections: dict[str, Any]) -> Config:
    """A copy of `config` under another name, with fields of its sections replaced.

    Args:
        config: the recipe to start from; it stays as it is.
        name: name of the new one.
        sections: section -> field -> value, e.g. `training={"epochs": 24}`.
    """
    changed = {section: dataclasses.replace(getattr(config, section), **fields) for section, fields in sections.items()}
    return dataclasses.replace(config, name=name, **changed)
