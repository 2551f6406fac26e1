"""Image files and annotation files in, padded batches out."""

from __future__ import annotations

from crossdino.data.dataset import IMAGENET_MEAN, IMAGENET_STD, DetectionDataset, build_loader, collate
from crossdino.data.formats import DatasetIndex, ImageRecord, Problems, load_coco
from crossdino.data.images import ImageError, read_image
from crossdino.data.transforms import normalize, resize_hw, resize_image, to_tensor

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "DatasetIndex",
    "DetectionDataset",
    "ImageError",
    "ImageRecord",
    "Problems",
    "build_loader",
    "collate",
    "load_coco",
    "normalize",
    "read_image",
    "resize_hw",
    "resize_image",
    "to_tensor",
]
