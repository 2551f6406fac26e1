"""From what the user named to pictures, and by which way an image is read.

An ordinary image is read whole by `data.images.read_image`, as in training. By windows (rasterio) go images of more
than `windowed_px` pixels, rasters that say where on the earth they lie, what Pillow cannot read, and every image for
which bands or a range of values are chosen.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import TiffImagePlugin

from crossdino.data.images import (
    BROKEN,
    MISSING,
    NO_IMAGE,
    TOO_LARGE,
    UNKNOWN_RANGE,
    ImageError,
    allow_large_images,
    fits_whole,
    read_sizes,
    too_large,
)
from crossdino.errors import InputError
from crossdino.sources.contract import Picture, ReadOptions, Source, VideoInfo
from crossdino.sources.images import WholeImage

TIFF_SUFFIXES = (".tif", ".tiff", ".gtiff")
JPEG2000_SUFFIXES = (".jp2", ".j2k", ".jpx")
# How such files begin. TIFF tells that it has coordinates by a tag; JPEG 2000 in a place that Pillow does not read.
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
JPEG2000_HEADS = (b"\0\0\0\x0cjP  ",)
GEO_KEYS_TAG = 34735
INSTALL_RASTER = 'install rasterio: pip install "crossdino[raster]"'


def open_pictures(source: Source, options: ReadOptions = ReadOptions(), first_frame: int = 0) -> Iterator[Picture]:
    """The pictures of a source: one for an image, one a frame for a video or a camera.

    Args:
        source: what to open.
        options: how to read it.
        first_frame: frames of a video before this one are left out (to go on with a stopped run).

    Yields:
        The pictures in order. Whoever takes one closes it.

    Raises:
        ImageError: the source cannot be read (any further); the message names the file.
        InputError: rasterio is needed and not installed, or a camera cannot be read.
    """
    if source.kind == "image":
        yield open_image(source, options)
        return
    from crossdino.sources.video import read_camera, read_frames

    yield from (read_camera if source.kind == "camera" else read_frames)(source, options, first_frame)


def require_readable(options: ReadOptions) -> None:
    """Refuse options for which a package is missing, once instead of for every image.

    Raises:
        InputError: bands or a range of values are chosen, and rasterio is not installed.
    """
    chosen = options.bands is not None or options.value_range is not None
    if chosen and importlib.util.find_spec("rasterio") is None:
        raise InputError(f"bands and ranges of values are read with rasterio; {INSTALL_RASTER}")


def read_video_info(source: Source) -> VideoInfo:
    """What a video says of itself; its first frame is decoded for it.

    Raises:
        ImageError: the file is no video, or its first frame is damaged.
        InputError: the source is not a video file.
    """
    from crossdino.sources import video

    return video.read_video_info(source)


def open_image(source: Source, options: ReadOptions = ReadOptions()) -> Picture:
    """The picture of an image file; see `open_pictures`."""
    require_readable(options)
    hw, problem = _look(source.path)
    chosen = options.bands is not None or options.value_range is not None
    needed = chosen or problem is not None or hw[0] * hw[1] > options.windowed_px or not fits_whole(hw)
    if not needed and not _may_have_coordinates(source.path):
        return WholeImage(source, hw)
    if importlib.util.find_spec("rasterio") is None:
        if problem is None and not fits_whole(hw):
            problem = too_large(Path(source.path))
        if problem is not None:
            raise _with_remedy(problem, source.path)
        return WholeImage(source, hw)
    from crossdino.sources.raster import RasterPicture

    try:
        picture = RasterPicture(source, options)
    except ImageError as error:
        if chosen or (problem is not None and error.what != NO_IMAGE):
            raise
        if problem is not None:
            raise problem from None
        return WholeImage(source, hw)  # which Pillow can read
    if needed or picture.georeference is not None:
        return picture
    picture.close()
    return WholeImage(source, hw)


def _look(path: str) -> tuple[tuple[int, int], ImageError | None]:
    """The upright size of an image as its header says, or why Pillow cannot tell and GDAL might."""
    allow_large_images()
    try:
        width, height = read_sizes(Path(path))[0]
    except ImageError as error:
        if error.what == MISSING or (error.what == BROKEN and not path.lower().endswith(TIFF_SUFFIXES)):
            raise
        return (0, 0), error
    return (height, width), None


def _may_have_coordinates(path: str) -> bool:
    """Whether a file, or GDAL's file beside it, may say where on the earth the image lies."""
    with open(path, "rb") as file:
        head = file.read(8)
    if head[:4] in TIFF_HEADS:
        with TiffImagePlugin.TiffImageFile(path) as image:
            if GEO_KEYS_TAG in image.tag_v2:
                return True
    return head in JPEG2000_HEADS or os.path.exists(f"{path}.aux.xml")


def _with_remedy(problem: ImageError, path: str) -> ImageError:
    """The problem of an image that rasterio might be able to read."""
    if problem.what == TOO_LARGE:
        message = f"image {path} has too many pixels to be read whole; to read it by windows, {INSTALL_RASTER}"
        return ImageError(message, TOO_LARGE)
    if problem.what == UNKNOWN_RANGE or path.lower().endswith((*TIFF_SUFFIXES, *JPEG2000_SUFFIXES)):
        return ImageError(f"{problem}; or {INSTALL_RASTER}", problem.what, problem.detail)
    return problem
