"""Measurements of speed, memory and accuracy, each a command; README.md says what there is."""

import sys
from pathlib import Path

# The package of this checkout, installed or not.
_SOURCES = str(Path(__file__).resolve().parents[1] / "src")
if _SOURCES not in sys.path:
    sys.path.insert(0, _SOURCES)
