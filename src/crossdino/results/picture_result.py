"""The detections of one picture - an image, or a frame of a video - and the one line of JSON that they are kept as.

The line begins with what says which picture it is and ends with the numbers, so that a reader that only looks for a
picture need not parse 100,000 boxes. Numbers are written with as many digits as a float32 needs to come back bit for
bit, not as many as Python would print for the same number as a double.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import supervision as sv
from numpy.typing import NDArray

from crossdino.sources import Georeference, Picture

# Where the numbers of a line begin. Inside a JSON string a quotation mark is always behind a backslash, so no file name
# can look like this.
_NUMBERS_BEGIN = b',"labels":'


@dataclass(frozen=True, eq=False)
class PictureResult:
    """The detections of one picture.

    Attributes:
        file_name: the source, as the user named it.
        width, height: of the picture in pixels.
        boxes_xyxy: (n, 4) float32, absolute pixels of the picture.
        scores: (n,) float32.
        labels: (n,) int64, class indices.
        frame: index of the frame in its video; None for an image.
        seconds: the frame's time in the video; None for an image.
        georeference: where the picture lies on the earth, or None.
        capped: the model's `num_select` limit was reached: there may be more objects.
        picture: file name of the annotated picture, or None without one.
        stem: what the picture's own files (annotated picture, GeoJSON, labels) are called, without a suffix; see
            `output_stems`. Empty: the stem of `file_name`.
    """

    file_name: str
    width: int
    height: int
    boxes_xyxy: NDArray[np.float32] = field(repr=False)
    scores: NDArray[np.float32] = field(repr=False)
    labels: NDArray[np.int64] = field(repr=False)
    frame: int | None = None
    seconds: float | None = None
    georeference: Georeference | None = None
    capped: bool = False
    picture: str | None = None
    stem: str = ""

    def __post_init__(self) -> None:
        count = len(self.boxes_xyxy)
        assert self.boxes_xyxy.shape == (count, 4) and self.scores.shape == self.labels.shape == (count,)

    @property
    def key(self) -> str:
        """What tells the picture from all others of a run: the file's name, for a frame `name#frame`."""
        return self.file_name if self.frame is None else f"{self.file_name}#{self.frame}"

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def from_detections(
        cls,
        picture: Picture,
        detections: sv.Detections,
        *,
        drawn_as: str | None = None,
        stem: str = "",
        capped: bool = False,
    ) -> PictureResult:
        """What a `Predictor` found in a picture.

        Args:
            picture: what was looked at.
            detections: what was found, in pixels of the picture.
            drawn_as: file name of the annotated picture.
            stem: see the class.
            capped: likewise.
        """
        count = len(detections)
        height, width = picture.hw
        scores = detections.confidence if detections.confidence is not None else np.ones(count)
        labels = detections.class_id if detections.class_id is not None else np.zeros(count)
        return cls(
            file_name=picture.source.name,
            width=int(width),
            height=int(height),
            boxes_xyxy=np.asarray(detections.xyxy, dtype=np.float32).reshape(count, 4),
            scores=np.asarray(scores, dtype=np.float32),
            labels=np.asarray(labels, dtype=np.int64),
            frame=picture.frame,
            seconds=picture.seconds,
            georeference=picture.georeference,
            capped=capped,
            picture=drawn_as,
            stem=stem,
        )

    def to_detections(self, class_names: Sequence[str]) -> sv.Detections:
        """The same as `supervision.Detections`, with `class_name` in their data."""
        return sv.Detections(
            xyxy=self.boxes_xyxy,
            confidence=self.scores,
            class_id=self.labels,
            data={"class_name": np.array(class_names)[self.labels]},
        )

    def to_line(self, more: Mapping[str, Any] | None = None) -> bytes:
        """One line of JSON, with its line break; `more` is put into its head."""
        head: dict[str, Any] = {"file_name": self.file_name, "width": self.width, "height": self.height}
        if self.frame is not None:
            head |= {"frame": self.frame, "seconds": self.seconds}
        if self.georeference is not None:
            head["georeference"] = {"crs": self.georeference.crs, "transform": list(self.georeference.transform)}
        if self.picture is not None:
            head["picture"] = self.picture
        if self.stem:
            head["stem"] = self.stem
        head |= {"capped": self.capped, **(more or {}), "num_objects": len(self)}
        numbers = {
            "labels": self.labels.tolist(),
            "scores": shortest_decimals(self.scores).tolist(),
            "boxes_xyxy": shortest_decimals(self.boxes_xyxy).tolist(),
        }
        # ASCII only: names that are no valid Unicode (Linux allows them) come back as they were.
        text = json.dumps(head, separators=(",", ":"))[:-1] + "," + json.dumps(numbers, separators=(",", ":"))[1:]
        return text.encode("ascii") + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> PictureResult:
        """The opposite of `to_line`.

        Raises:
            ValueError, KeyError, TypeError: the line is no such line.
        """
        stored = json.loads(line)
        georeference = stored.get("georeference")
        if georeference is not None:
            georeference = Georeference(georeference["crs"], tuple(georeference["transform"]))
        return cls(
            file_name=stored["file_name"],
            width=stored["width"],
            height=stored["height"],
            boxes_xyxy=np.array(stored["boxes_xyxy"], dtype=np.float64).astype(np.float32).reshape(-1, 4),
            scores=np.array(stored["scores"], dtype=np.float64).astype(np.float32),
            labels=np.array(stored["labels"], dtype=np.int64),
            frame=stored.get("frame"),
            seconds=stored.get("seconds"),
            georeference=georeference,
            capped=stored["capped"],
            picture=stored.get("picture"),
            stem=stored.get("stem", ""),
        )


def read_head(line: bytes) -> dict[str, Any]:
    """What a line begins with, without its numbers (lines that have none: all of it).

    Raises:
        ValueError: it is no JSON object.
    """
    end = line.find(_NUMBERS_BEGIN)
    head = json.loads(line if end < 0 else line[:end] + b"}")
    if not isinstance(head, dict) or not line.endswith(b"}\n"):
        raise ValueError("not an object on a line of its own")
    return head


def shortest_decimals(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """The doubles whose shortest decimal form is that of the float32 values.

    Args:
        values: float32 numbers of any shape.

    Returns:
        Doubles that round to `values`; Python prints 0.1 for the float32 that is nearest to 0.1.
    """
    exact = np.asarray(values, dtype=np.float64)
    magnitude = np.abs(exact)
    # The rest (0, huge, tiny, not finite) stays as it is: longer, but equal.
    ordinary = (magnitude > 1e-7) & (magnitude < 1e8)
    result = exact.copy()
    exponents = np.floor(np.log10(np.where(ordinary, magnitude, 1.0))).astype(np.int64)
    open_places = ordinary
    for digits in range(1, 10):  # nine digits tell all float32 apart
        # Both are whole numbers or powers of ten that a double holds exactly, so that the quotient is the double
        # nearest to the decimal number.
        scale = 10.0 ** np.maximum(digits - 1 - exponents, 0)
        rounded = np.rint(exact * scale) / scale
        fits = open_places & (rounded.astype(np.float32) == values)
        result = np.where(fits, rounded, result)
        open_places = open_places & ~fits
        if not open_places.any():
            break
    return result
