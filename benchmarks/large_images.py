"""How much memory and time very large images take: `python -m benchmarks.large_images [--predict]`.

For every format a synthetic image is written into a temporary folder, read tile by tile (row by row, as prediction
does) in a fresh process, and shrunk as a whole. With `--predict` it is instead given to a whole prediction run - tiles,
a small model with random weights, merging, journal, COCO, GeoJSON and a picture - and to a second run on an image of a
quarter of its side, whose memory shows what does not depend on the size. Peak memory is the process's largest resident
set.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SIDE_PX = 20_000
TILE_PX = 640
OVERLAP_PX = 128
REDUCED_PX = 1333


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=SIDE_PX, help="height and width of the image in pixels")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS), help="what is measured")
    parser.add_argument("--predict", action="store_true", help="run a whole prediction instead of reading only")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps((predict_all if options.predict else read_all)(options.child)))
        return
    if options.predict:
        measure_prediction(options.formats, options.side)
        return

    from rich.console import Console
    from rich.table import Table

    title = f"RGB of {options.side} x {options.side} px: all {TILE_PX} px tiles, then the whole in {REDUCED_PX} px"
    table = Table(title=title)
    table.add_column("format", no_wrap=True)
    for column in ("file, MB", "tiles", "start, MB", "peak, MB", "shrunk, MB", "tiles, s", "shrunk, s"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.formats:
            path = FORMATS[name](Path(folder), options.side)
            command = [sys.executable, "-m", "benchmarks.large_images", "--child", str(path)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
            print(name, found, file=sys.stderr, flush=True)
            table.add_row(
                *(name, f"{path.stat().st_size / 2**20:.0f}", f"{found['tiles']}", f"{found['start']:.0f}"),
                *(f"{found['peak']:.0f}", f"{found['peak_reduced']:.0f}"),
                *(f"{found['seconds']:.1f}", f"{found['seconds_reduced']:.1f}"),
            )
            path.unlink()
    Console().print(table)


def read_all(path: str) -> dict[str, float]:
    """Read every tile and the reduced picture; megabytes and seconds."""
    from crossdino.sources import Source, open_pictures
    from crossdino.tiling import tile_grid

    found = {"start": peak_mb()}
    with next(open_pictures(Source(path, path, "image"))) as picture:
        start = time.perf_counter()
        tiles = tile_grid(picture.hw, TILE_PX, OVERLAP_PX)
        for tile in tiles:
            picture.read(tile)
        found |= {"tiles": len(tiles), "seconds": time.perf_counter() - start, "peak": peak_mb()}
        start = time.perf_counter()
        picture.read_reduced((REDUCED_PX, REDUCED_PX))
        found |= {"seconds_reduced": time.perf_counter() - start, "peak_reduced": peak_mb()}
    return found


def measure_prediction(formats: list[str], side: int) -> None:
    """Run predictions on a large and on a smaller image of each format and print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"prediction in tiles of {TILE_PX} px")
    table.add_column("format", no_wrap=True)
    for column in ("side, px", "tiles", "objects", "start, MB", "peak, MB", "s"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for name in formats:
            for length in (side // 4, side):
                path = FORMATS[name](Path(folder), length)
                command = [sys.executable, "-m", "benchmarks.large_images", "--predict", "--child", str(path)]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
                print(name, length, found, file=sys.stderr, flush=True)
                table.add_row(
                    *(name, f"{length}", f"{found['tiles']}", f"{found['objects']}"),
                    *(f"{found['start']:.0f}", f"{found['peak']:.0f}", f"{found['seconds']:.0f}"),
                )
                path.unlink()
    Console().print(table)


def predict_all(path: str) -> dict[str, float]:
    """A whole run on one image with a small random model, to which a tile is shown in 64 px; megabytes and seconds."""
    import torch

    from crossdino import CrossDINO
    from crossdino.config import InferenceConfig, ModelConfig
    from crossdino.prediction_job import predict_sources
    from crossdino.prediction_work import WorkSettings
    from crossdino.sources import ReadOptions, find_sources

    torch.manual_seed(0)
    sizes = {"hidden_dim": 32, "num_heads": 2, "feedforward_dim": 32, "num_encoder_layers": 1, "num_decoder_layers": 1}
    model = CrossDINO(
        ModelConfig(backbone="tf_efficientnet_lite0", num_queries=20, fusion="none", num_feature_levels=3, **sizes)
    )
    model.inference = InferenceConfig(64, 64, num_select=20, tile_size=TILE_PX, tile_overlap=OVERLAP_PX)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/model")
        settings = WorkSettings(f"{folder}/model", {"batch_size": 8}, ReadOptions(), Path(folder, "out"))
        found = {"start": peak_mb()}
        start = time.perf_counter()
        tiles = []
        summary = predict_sources(
            find_sources([path])[0],
            settings,
            formats=("coco", "geojson"),
            on_progress=lambda name, done, total: tiles.append(total),
        )
    found |= {"seconds": time.perf_counter() - start, "peak": peak_mb()}
    return found | {"tiles": max(tiles, default=0), "objects": summary.num_objects}


def peak_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # the other way counts, on Linux, what the parent process had as well
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def write_geotiff(folder: Path, side: int, dtype: str = "uint8", **layout: Any) -> Path:
    """A GeoTIFF with some texture, written in rows so that this takes no memory either."""
    import rasterio
    from rasterio.transform import Affine
    from rasterio.windows import Window

    path = folder / "image.tif"
    texture = np.random.default_rng(0).integers(0, 256, (3, 512, side), dtype=np.uint8).astype(dtype)
    texture[:, :, ::2] = texture[:, :, 1::2][:, :, : texture[:, :, ::2].shape[2]]
    if dtype == "uint16":
        texture *= 15  # as of a 12-bit camera
    profile = {"driver": "GTiff", "height": side, "width": side, "count": 3, "dtype": dtype, "photometric": "rgb"}
    place = {"crs": "EPSG:32633", "transform": Affine(0.1, 0, 500_000, 0, -0.1, 5_000_000)}
    with rasterio.open(path, "w", **profile, **place, **layout) as raster:
        for top in range(0, side, 512):
            rows = min(512, side - top)
            raster.write(texture[:, :rows], window=Window(0, top, side, rows))  # pyright: ignore[reportCallIssue]
    return path


def converted(driver: str, suffix: str, **options: Any) -> Callable[[Path, int], Path]:
    """A writer of another format."""

    def write(folder: Path, side: int) -> Path:
        from rasterio.shutil import copy

        tif = write_geotiff(folder, side, tiled=True, blockxsize=512, blockysize=512)
        path = folder / f"image{suffix}"
        copy(tif, path, driver=driver, **options)
        tif.unlink()
        (folder / f"image{suffix}.aux.xml").unlink(missing_ok=True)
        return path

    return write


def write_turned_jpeg(folder: Path, side: int) -> Path:
    """A JPEG that its EXIF data say to be turned by a quarter."""
    path = converted("JPEG", ".jpg", quality=85)(folder, side)
    exif = bytes.fromhex("ffe1 0022 457869660000 4d4d002a00000008 0001 0112 0003 00000001 0006 0000 00000000")
    data = path.read_bytes()
    path.write_bytes(data[:2] + exif + data[2:])
    return path


FORMATS: dict[str, Callable[[Path, int], Path]] = {
    "tiff-tiled": lambda folder, side: write_geotiff(
        folder, side, tiled=True, blockxsize=512, blockysize=512, compress="deflate", zlevel=1, interleave="pixel"
    ),
    "tiff-striped": lambda folder, side: write_geotiff(
        folder, side, tiled=False, blockysize=16, compress="lzw", interleave="pixel"
    ),
    "tiff-bands": lambda folder, side: write_geotiff(folder, side, tiled=False, blockysize=16, interleave="band"),
    "tiff-12bit": lambda folder, side: write_geotiff(
        folder, side, "uint16", tiled=True, blockxsize=512, blockysize=512, interleave="pixel"
    ),
    "cog-jpeg": converted("COG", ".cog.tif", compress="jpeg", overviews="auto"),
    "png": converted("PNG", ".png", zlevel=1),
    "jpeg": converted("JPEG", ".jpg", quality=85),
    "jpeg-turned": write_turned_jpeg,
}


if __name__ == "__main__":
    main()
