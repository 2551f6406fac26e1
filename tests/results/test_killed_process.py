"""A process of its own: without OpenCV, which is no part of our installation, and killed in the middle of writing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from crossdino.results import Journal, JournalHeader, JournalIndex, journal_path

PROCESS = """
import sys
import warnings
from pathlib import Path

import numpy as np

sys.modules["cv2"] = None
warnings.filterwarnings("ignore", "OpenCV .*is not installed")
from crossdino.results import *
from crossdino.visualization import draw_detections

out = Path(sys.argv[1])
header = JournalHeader({"a": 1}, ["x"], [1])
found = PictureResult("a.png", 64, 64, np.array([[5, 6, 30, 40]], np.float32), np.ones(1, np.float32), np.zeros(1, int))
frame = np.zeros((64, 64, 3), np.uint8)
write_picture(out / "a.jpg", draw_detections(frame, found.to_detections(header.class_names)))
with annotated_video(out / "a.mp4", 25, header.class_names) as add:
    add(frame, found)
with open_outputs(out, FORMATS, header) as add:
    add(found)

rng = np.random.default_rng(0)
with Journal(journal_path(out), header) as journal, growing_outputs(out, ["csv"], header) as add:
    print("ready", flush=True)
    for number in range(1_000_000):
        boxes, scores = rng.random((2000, 4), dtype=np.float32), rng.random(2000, dtype=np.float32)
        result = PictureResult(f"{number}.png", 1, 1, boxes, scores, np.zeros(2000, np.int64))
        journal.add(result, FileStamp(1, 1))
        add(result)
"""


def test_without_opencv_until_killed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", PROCESS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    path = journal_path(tmp_path)
    with process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while path.stat().st_size < 1_000_000 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()

    assert {"a.jpg", "a.mp4", "a.geojson", "predictions.json", "predictions.csv", "predictions.parquet"} <= {
        item.name for item in tmp_path.iterdir()
    }
    header = JournalHeader({"a": 1}, ["x"], [1])
    Journal(path, header).close()  # the lock died with the process
    index = JournalIndex([path], header)
    names = list(index.keys())
    assert len(names) > 3 and names == [f"{number}.png" for number in range(len(names))]
    assert [len(result) for result in index.read()] == [2000] * len(names)
