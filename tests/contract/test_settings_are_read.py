"""No setting that nothing reads (of the 98 keys of DINO's own configuration nine are such)."""

from __future__ import annotations

import ast
from pathlib import Path

import crossdino
from crossdino.config import option_names

# Where settings are declared and given values, which is no use of them.
DECLARING = {"config.py", "recipes"}


def read_names(folder: Path) -> set[str]:
    """Every attribute that is read, and every string, anywhere in the package."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        if DECLARING.intersection(path.relative_to(folder).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
    return names


def test_every_setting_is_read() -> None:
    names = read_names(Path(crossdino.__file__).parent)
    assert "no_such_setting" not in names
    unread = [name for name in option_names() if name.rpartition(".")[2] not in names]
    assert unread == []
