"""The benchmarks' raw data, as they are downloaded, into COCO files that this package and others read."""

from __future__ import annotations

from crossdino.preparation.prepare import MODULES, Prepared, options_of, prepare_benchmark

__all__ = ["MODULES", "Prepared", "options_of", "prepare_benchmark"]
