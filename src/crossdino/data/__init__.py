"""Image files and annotation files in, padded batches out."""

from __future__ import annotations

from crossdino.data.check import ImageFacts, check_images, hash_file
from crossdino.data.coco import load_coco
from crossdino.data.dataset import IMAGENET_MEAN, IMAGENET_STD, DetectionDataset, build_loader, collate
from crossdino.data.formats import find_splits, load_dataset
from crossdino.data.images import ImageError, read_image
from crossdino.data.index import DataError, DatasetIndex, ImageRecord, Problem, Problems
from crossdino.data.transforms import normalize, resize_hw, resize_image, to_tensor

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
