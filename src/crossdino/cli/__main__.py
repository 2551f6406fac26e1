"""`python -m crossdino.cli`, and `torchrun -m crossdino.cli` for several processes."""

from __future__ import annotations

from crossdino.cli import entry_point

if __name__ == "__main__":
    entry_point()
