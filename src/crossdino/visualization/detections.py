"""Detections on images, and detections against ground truth.

Made for small and many objects: lines of one or two pixels, boxes never hidden under their own labels (a label is drawn
where it is small beside its box, or where there are few detections), and a strip below the image that says what
the colours mean. The image itself is not resized, so a pixel of the picture is a pixel of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import supervision as sv
from PIL import Image, ImageDraw, ImageFont
from supervision.detection.utils.iou_and_nms import box_iou_batch

from crossdino.errors import InputError

# Bright on forest, asphalt and water, still seen on white; neighbours differ for colour-blind eyes.
_CLASS_COLOURS = (
    "#ff9100",
    "#00b8ff",
    "#ff4dd2",
    "#00d68f",
    "#ffd500",
    "#ff3d3d",
    "#a66bff",
    "#7ad100",
    "#00d5c8",
    "#c98b5f",
)
_FOUND_COLOUR = "#00b8ff"
_FALSE_COLOUR = "#ff9100"
_TRUTH_COLOUR = "#ff2ec4"
_STRIP_COLOUR = "#181818"

# With at most so many detections every one gets its label, even if the label is wider than the box.
_FEW_DETECTIONS = 12
# With more, a label is drawn where it covers at most this share of its box's area, and is no wider.
_LABEL_SHARE = 0.2


def draw_detections(
    image: Image.Image | np.ndarray, detections: sv.Detections, class_names: Sequence[str] | None = None
) -> Image.Image:
    """Draw detections on an image, one colour a class, with a legend of counts below it.

    Args:
        image: PIL image, or uint8 array (H, W, 3) in RGB.
        detections: boxes as absolute xyxy in pixels of this image.
        class_names: name of every class index; None: the names that a `Predictor` put into the detections.

    Returns:
        A new RGB picture as wide as the image, higher by the legend's strip.
    """
    picture = _to_picture(image)
    class_ids = detections.class_id if detections.class_id is not None else np.zeros(len(detections), dtype=int)
    detections = sv.Detections(
        xyxy=detections.xyxy, confidence=detections.confidence, class_id=class_ids, data=dict(detections.data)
    )
    names = _names_of(detections, class_names)
    palette = sv.ColorPalette.from_hex(list(_CLASS_COLOURS))
    if len(detections):
        colours = [palette.by_idx(class_id).as_hex() for class_id in class_ids.tolist()]
        _draw_boxes(picture, detections.xyxy, colours, _line_thickness(picture, detections.xyxy))
        _draw_labels(picture, detections, names, palette)
    present = sorted(set(class_ids.tolist()))
    counts = {class_id: int(np.count_nonzero(class_ids == class_id)) for class_id in present}
    legend = [(palette.by_idx(class_id).as_hex(), f"{names[class_id]} {counts[class_id]}") for class_id in present]
    return _with_strip(picture, "" if legend else "nothing detected", legend)


def draw_comparison(
    image: Image.Image | np.ndarray,
    detections: sv.Detections,
    truth_xyxy: np.ndarray,
    truth_labels: np.ndarray | None = None,
    *,
    threshold: float = 0.3,
    iou_threshold: float = 0.5,
) -> Image.Image:
    """Draw detections against the ground truth: what was found, what was missed, what is false.

    Every object is dashed; a missed one is marked with a triangle. Detections are solid, in one colour where they
    found an object and in another where they found none. Best score first, a detection finds the free object that it
    overlaps most, if their IoU is at least `iou_threshold`.

    Args:
        image: PIL image, or uint8 array (H, W, 3) in RGB.
        detections: boxes as absolute xyxy in pixels of this image, with confidence.
        truth_xyxy: (n, 4) boxes of the objects, absolute xyxy.
        truth_labels: (n,) class indices of the objects; None: classes are not compared.
        threshold: detections with a lower score are not drawn and not counted.
        iou_threshold: in (0, 1].

    Returns:
        A new RGB picture as wide as the image, higher by a strip with recall, precision and the legend.
    """
    picture = _to_picture(image)
    truth_xyxy = np.asarray(truth_xyxy, dtype=np.float32).reshape(-1, 4)
    if detections.confidence is not None:
        detections = detections[detections.confidence >= threshold]  # pyright: ignore[reportAssignmentType]
    matches = _match(detections, truth_xyxy, truth_labels, iou_threshold)
    is_found = np.isin(np.arange(len(truth_xyxy)), matches)
    is_hit = matches >= 0

    thickness = _line_thickness(picture, np.concatenate([detections.xyxy.reshape(-1, 4), truth_xyxy]))
    draw = ImageDraw.Draw(picture)
    for box, found in zip(truth_xyxy.tolist(), is_found.tolist(), strict=True):
        _draw_dashed_box(draw, box, _TRUTH_COLOUR, thickness if found else thickness + 1)
    for boxes, colour in ((detections.xyxy[~is_hit], _FALSE_COLOUR), (detections.xyxy[is_hit], _FOUND_COLOUR)):
        _draw_boxes(picture, boxes, [colour] * len(boxes), thickness)
    missed = truth_xyxy[~is_found]
    if len(missed):
        size = max(7, round(min(picture.size) / 60))
        marker = sv.TriangleAnnotator(
            sv.Color.from_hex(_TRUTH_COLOUR),
            base=size,
            height=size,
            color_lookup=sv.ColorLookup.INDEX,
            outline_thickness=1,
            outline_color=sv.Color.BLACK,
        )
        # Above the box; below the picture's edge where there is no room above.
        anchors = missed.copy()
        anchors[:, 1] = np.maximum(anchors[:, 1] - 2, size)
        picture = marker.annotate(picture, sv.Detections(xyxy=anchors))

    num_found, num_missed, num_false = int(is_found.sum()), len(missed), int((~is_hit).sum())
    recall = f"{num_found / len(truth_xyxy):.2f}" if len(truth_xyxy) else "-"
    precision = f"{num_found / len(detections):.2f}" if len(detections) else "-"
    return _with_strip(
        picture,
        f"recall {recall}, precision {precision} at score {threshold:.2f} and IoU {iou_threshold:.2f}",
        [
            (_TRUTH_COLOUR, f"objects {len(truth_xyxy)}, missed {num_missed} (triangle)"),
            (_FOUND_COLOUR, f"found {num_found}"),
            (_FALSE_COLOUR, f"false {num_false}"),
        ],
    )


# --- drawing on images ---


def _to_picture(image: Image.Image | np.ndarray) -> Image.Image:
    """A copy to draw on."""
    if isinstance(image, Image.Image):
        return image.convert("RGB") if image.mode != "RGB" else image.copy()
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(
            f"an image array of type {image.dtype} and shape {image.shape} cannot be drawn on: give uint8 (H, W, 3)"
        )
    return Image.fromarray(np.ascontiguousarray(image))


def _names_of(detections: sv.Detections, class_names: Sequence[str] | None) -> dict[int, str]:
    """Class index -> name, for the classes that occur."""
    assert detections.class_id is not None
    if class_names is not None:
        return {int(class_id): class_names[int(class_id)] for class_id in np.unique(detections.class_id)}
    given = detections.data.get("class_name")
    if given is None:
        return {class_id: f"class {class_id}" for class_id in set(detections.class_id.tolist())}
    return {class_id: str(name) for class_id, name in zip(detections.class_id.tolist(), given, strict=True)}


def _line_thickness(picture: Image.Image, boxes_xyxy: np.ndarray) -> int:
    """Two pixels and more for large pictures, but never more than a twelfth of a typical box."""
    by_picture = max(1, round(min(picture.size) / 500))
    if not len(boxes_xyxy):
        return by_picture
    sides = np.sqrt(np.prod(np.maximum(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 0), axis=1))
    return int(min(by_picture, max(1, np.median(sides) // 12)))


def _font_size(picture: Image.Image, share: float, smallest: int, largest: int) -> int:
    return int(np.clip(round(min(picture.size) * share), smallest, largest))


def _draw_boxes(picture: Image.Image, boxes_xyxy: np.ndarray, colours: Sequence[str], thickness: int) -> None:
    """Outlines, their lines centred on the boxes' edges.

    By Pillow: without OpenCV, which is no part of our installation, supervision paints a mask of the whole picture a
    box, which for 2,000 boxes takes 17 s.
    """
    draw = ImageDraw.Draw(picture)
    outside = thickness // 2
    corners = np.rint(boxes_xyxy).astype(np.int64).reshape(-1, 4) + [-outside, -outside, outside, outside]
    for (left, top, right, bottom), colour in zip(corners.tolist(), colours, strict=True):
        draw.rectangle([left, top, max(left, right), max(top, bottom)], outline=colour, width=thickness)


def _draw_labels(
    picture: Image.Image, detections: sv.Detections, names: Mapping[int, str], palette: sv.ColorPalette
) -> None:
    assert detections.class_id is not None
    scores = detections.confidence
    labels = [
        (names[class_id] + " " if len(names) > 1 else "") + ("" if scores is None else f"{scores[index]:.2f}")
        for index, class_id in enumerate(detections.class_id.tolist())
    ]
    size = _font_size(picture, 1 / 60, 10, 20)
    padding = max(1, size // 8)
    font = ImageFont.load_default(size)
    few = len(detections) <= _FEW_DETECTIONS
    widths = np.array([font.getlength(label) + 2 * padding for label in labels])
    drawn = np.array([bool(label.strip()) for label in labels])
    if not few:
        box_widths, box_heights = (detections.xyxy[:, 2:] - detections.xyxy[:, :2]).T
        drawn &= (widths <= box_widths) & (widths * (size + 2 * padding) <= _LABEL_SHARE * box_widths * box_heights)
    if not drawn.any():
        return
    sv.RichLabelAnnotator(
        color=palette, text_color=sv.Color.BLACK, font_size=size, text_padding=padding, smart_position=few
    ).annotate(
        picture,
        detections[drawn],  # pyright: ignore[reportArgumentType]
        labels=[label.strip() for label, wanted in zip(labels, drawn.tolist(), strict=True) if wanted],
    )


def _draw_dashed_box(draw: ImageDraw.ImageDraw, box: list[float], colour: str, thickness: int) -> None:
    left, top, right, bottom = (round(value) for value in box)
    dash = 2 + 2 * thickness
    for x in range(left, right + 1, 2 * dash):
        end = min(x + dash - 1, right)
        draw.line([(x, top), (end, top)], colour, thickness)
        draw.line([(x, bottom), (end, bottom)], colour, thickness)
    for y in range(top, bottom + 1, 2 * dash):
        end = min(y + dash - 1, bottom)
        draw.line([(left, y), (left, end)], colour, thickness)
        draw.line([(right, y), (right, end)], colour, thickness)


def _with_strip(picture: Image.Image, text: str, legend: Sequence[tuple[str, str]]) -> Image.Image:
    """The picture with a strip below it: a text, then coloured squares with their meaning, in lines as needed."""
    size = _font_size(picture, 1 / 45, 11, 26)
    font = ImageFont.load_default(size)
    gap, line_height = size // 2, round(1.5 * size)
    items: list[tuple[str | None, str]] = [*([(None, text)] if text else []), *legend]
    places: list[tuple[int, int]] = []
    x, line = gap, 0
    for colour, words in items:
        width = round(font.getlength(words)) + (0 if colour is None else size + gap // 2)
        if x > gap and x + width + gap > picture.width:
            x, line = gap, line + 1
        places.append((x, line))
        x += width + 2 * gap
    framed = Image.new("RGB", (picture.width, picture.height + (line + 1) * line_height + gap), _STRIP_COLOUR)
    framed.paste(picture, (0, 0))
    draw = ImageDraw.Draw(framed)
    for (colour, words), (x, line) in zip(items, places, strict=True):
        middle = picture.height + gap // 2 + line * line_height + line_height // 2
        if colour is not None:
            half = round(0.35 * size)
            draw.rectangle([x, middle - half, x + 2 * half, middle + half], colour)
            x += size + gap // 2
        draw.text((x, middle), words, "white", font, anchor="lm")
    return framed


def _match(
    detections: sv.Detections, truth_xyxy: np.ndarray, truth_labels: np.ndarray | None, iou_threshold: float
) -> np.ndarray:
    """For every detection the index of the object that it finds, or -1; an object is found once."""
    matches = np.full(len(detections), -1)
    if not len(detections) or not len(truth_xyxy):
        return matches
    overlaps = box_iou_batch(truth_xyxy, detections.xyxy).T
    if truth_labels is not None:
        assert detections.class_id is not None, "classes can be compared only if the detections have them"
        overlaps = np.where(detections.class_id[:, None] == np.asarray(truth_labels)[None], overlaps, -1.0)
    scores = detections.confidence if detections.confidence is not None else np.zeros(len(detections))
    for index in np.argsort(-scores, kind="stable"):
        best = int(overlaps[index].argmax())
        if overlaps[index, best] >= iou_threshold:
            matches[index] = best
            overlaps[:, best] = -1.0
    return matches
