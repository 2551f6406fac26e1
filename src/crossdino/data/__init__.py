"""Image files and annotation files in, padded batches out.

What makes batches needs torch, and is looked up when it is first used: reading and checking annotations starts quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from crossdino.data.check import ImageFacts, check_images, hash_file
from crossdino.data.coco import load_coco
from crossdino.data.formats import find_splits, load_dataset
from crossdino.data.images import ImageError, read_image
from crossdino.data.index import DataError, DatasetIndex, ImageRecord, Problem, Problems

if TYPE_CHECKING:
    from crossdino.data.dataset import IMAGENET_MEAN, IMAGENET_STD, DetectionDataset, build_loader, collate
    from crossdino.data.transforms import normalize, resize_hw, resize_image, to_tensor

_WITH_TORCH = {
    "IMAGENET_MEAN": "dataset",
    "IMAGENET_STD": "dataset",
    "DetectionDataset": "dataset",
    "build_loader": "dataset",
    "collate": "dataset",
    "normalize": "transforms",
    "resize_hw": "transforms",
    "resize_image": "transforms",
    "to_tensor": "transforms",
}

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "DataError",
    "DatasetIndex",
    "DetectionDataset",
    "ImageError",
    "ImageFacts",
    "ImageRecord",
    "Problem",
    "Problems",
    "build_loader",
    "check_images",
    "collate",
    "find_splits",
    "hash_file",
    "load_coco",
    "load_dataset",
    "normalize",
    "read_image",
    "resize_hw",
    "resize_image",
    "to_tensor",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module 'crossdino.data' has no attribute '{name}'")
    return getattr(import_module(f"crossdino.data.{_WITH_TORCH[name]}"), name)
