"""Result files of the benchmarks' toolkits, in and out.

Everything goes through COCO results with the ground truth's ids: `[{image_id, category_id, bbox, score}, ...]`.
"""

from crossdino.exchange.results import FORMATS, detect_format, read_results, write_results

__all__ = ["FORMATS", "detect_format", "read_results", "write_results"]
