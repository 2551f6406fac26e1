"""What the user names and what is looked at: files, folders, rasters of any size, videos and cameras."""

from crossdino.sources.ahead import Ahead, FailedPicture, open_all
from crossdino.sources.contract import Georeference, Picture, ReadOptions, Source, VideoInfo
from crossdino.sources.memory import ImageInput, as_picture, to_pil_image
from crossdino.sources.names import DRAWN_MARK, RUN_FILE, VIDEO_SUFFIXES, find_sources
from crossdino.sources.opening import open_pictures, read_video_info, require_readable

__all__ = [
    "DRAWN_MARK",
    "RUN_FILE",
    "VIDEO_SUFFIXES",
    "Ahead",
    "FailedPicture",
    "Georeference",
    "ImageInput",
    "Picture",
    "ReadOptions",
    "Source",
    "VideoInfo",
    "as_picture",
    "find_sources",
    "open_all",
    "open_pictures",
    "read_video_info",
    "require_readable",
    "to_pil_image",
]
