"""How an evaluation looked at its images, and what the caps on the number of detections left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from crossdino.config import InferenceConfig

# A detection that a cap leaves out is told of if it has at least this score: what lies below is mostly noise.
CAPPED_SCORE = 0.1


@dataclass(frozen=True)
class Look:
    """How the images of an evaluation are looked at, and how much may come out: what its result depends on.

    Attributes:
        tile_size, tile_overlap: in pixels of the file; a size of 0 means whole images.
        merge, merge_iou, full_image: see `InferenceConfig`.
        num_select: detections kept per image or tile.
        max_detections: detections per image and class that count.
    """

    tile_size: int
    tile_overlap: int
    merge: Literal["seam", "nms", "soft"]
    merge_iou: float
    full_image: bool
    num_select: int
    max_detections: int

    @classmethod
    def of(cls, inference: InferenceConfig, max_detections: int) -> Look:
        """What a model's settings say."""
        names = [item.name for item in fields(cls) if item.name != "max_detections"]
        return cls(**{name: getattr(inference, name) for name in names}, max_detections=max_detections)

    def __str__(self) -> str:
        """One line for people."""
        if not self.tile_size:
            return f"whole images, {self.num_select} detections kept per image"
        return (
            f"tiles of {self.tile_size} px overlapping by {self.tile_overlap} px or more, "
            + ("and the whole images, " if self.full_image else "")
            + f"{self.num_select} detections kept per tile, merged by {self.merge} (IoU {self.merge_iou:g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the settings of tiles are None for whole images."""
        of_tiles = ("tile_overlap", "merge", "merge_iou", "full_image")
        return {key: None if key in of_tiles and not self.tile_size else value for key, value in vars(self).items()}


def cap_warnings(
    max_detections: int,
    look: Look | None,
    capped_images: Collection[int],
    truth: Mapping[str, Any],
    detections: Iterable[Mapping[str, Any]],
    options: tuple[str, str] = ("--num-select", "--max-detections"),
) -> list[str]:
    """One line for each cap that left something out in some images.

    Args:
        max_detections: detections per image and class that count.
        look: how the images were looked at; None: by somebody else.
        capped_images: ids of the images of which `num_select` left something out (see `detect_dataset`).
        truth: the ground truth in COCO's layout.
        detections: COCO results.
        options: how the user sets the two caps.

    Returns:
        At most two lines: on `num_select`, and on `max_detections`, which left something out where an image has more
        objects of a class, or more detections of `CAPPED_SCORE`.
    """
    total, lines = len(truth["images"]), []
    if look is not None and capped_images:
        lines.append(
            f"warning: in {len(capped_images)} of {total} images {'a tile' if look.tile_size else 'the image'} has "
            f"more objects or detections than the {look.num_select} that are kept ({options[0]}; the model's number of "
            "queries is a limit too): some were left out"
        )
    found = Counter((item["image_id"], item["category_id"]) for item in detections if item["score"] >= CAPPED_SCORE)
    real = (item for item in truth["annotations"] if not item.get("iscrowd"))
    objects = Counter((item["image_id"], item["category_id"]) for item in real)
    beyond = {image for many in (found, objects) for (image, _), count in many.items() if count > max_detections}
    if beyond:
        lines.append(
            f"warning: in {len(beyond)} of {total} images a class has more than {max_detections} objects or detections "
            f"({options[1]}): the rest does not count in AP"
        )
    return lines
