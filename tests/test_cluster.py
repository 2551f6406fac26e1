"""Prediction on a local Ray of two workers, against the same run in one process."""

from __future__ import annotations

import dataclasses
import pickle
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet
import pytest
import ray
import torch
from PIL import Image

from crossdino.checkpoints import load_model, package_version, save_model
from crossdino.cluster import RayOptions, connection, predict_on_ray, work_on_ray
from crossdino.cluster.run import _groups, _Joined
from crossdino.cluster.stations import End, Part, Plan, Worker, read_blocks
from crossdino.config import Config, InferenceConfig
from crossdino.errors import InputError
from crossdino.models.detector import CrossDINO
from crossdino.prediction_job import RunSummary, predict_sources
from crossdino.prediction_work import Ended, Event, Failed, Found, Task, WorkSettings
from crossdino.predictor import Predictor
from crossdino.sources import ReadOptions, Source, find_sources, open_all

TILES: dict[str, Any] = {"tile_size": 64, "tile_overlap": 16, "threshold": 0.0}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine with two workers and a reader, for all tests; leaves no process behind."""
    with connection.ray_of(RayOptions("local", num_workers=2)):
        yield
    assert not ray.is_initialized()
    assert not [each for each in psutil.Process().children(recursive=True) if "ray" in each.name()]


@pytest.fixture
def weights(tiny_config: Config, tmp_path: Path) -> Path:
    """A model folder with random weights."""
    torch.manual_seed(0)
    model = CrossDINO(dataclasses.replace(tiny_config.model, class_names=("red", "blue"))).eval()
    model.inference = InferenceConfig(short_side=64, long_side=96, num_select=10)
    save_model(model, tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with small images, one of 36 tiles, and a broken file."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, hw in {"a": (64, 64), "b": (50, 90), "c": (300, 260), "e": (40, 40), "f": (64, 200)}.items():
        Image.fromarray(rng.integers(0, 255, (*hw, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "d.png").write_bytes(b"no image")
    return folder


def tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    found = {path.name: pyarrow.parquet.read_table(path).to_pylist() for path in folder.glob("*.parquet")}
    assert sum(map(len, found.values())) > 100
    return found


def in_one_process(images: Path, weights: Path, output: Path) -> RunSummary:
    settings = WorkSettings(str(weights), TILES, ReadOptions(), output, draw=False)
    return predict_sources(find_sources([str(images)])[0], settings, formats=["parquet"])


def worker_processes() -> list[psutil.Process]:
    """The actors that have a model."""
    children = psutil.Process().children(recursive=True)
    return [each for each in children if (each.cmdline() or [""])[0].startswith("ray::MapWorker(MapBatches(Worker))")]


def test_the_same_as_in_one_process_though_a_worker_is_killed_and_the_run_is_stopped(
    cluster: None, images: Path, weights: Path, tmp_path: Path
) -> None:
    alone = in_one_process(images, weights, tmp_path / "alone")
    output = tmp_path / "ray"
    victims: list[psutil.Process] = []
    stop = threading.Event()

    def stop_soon(event: Event) -> None:
        if isinstance(event, Found):
            stop.set()

    arguments: dict[str, Any] = {"output": output, "num_workers": 2, "tiles_per_block": 2, "predictor_options": TILES}
    stopped = predict_on_ray([str(images)], weights, stop=stop, on_event=stop_soon, **arguments)
    assert stopped.stopped and 0 < stopped.num_pictures < 5

    def kill(name: str, done: int, total: int) -> None:
        """Freeze a worker in the middle of the large image, so that it surely has something to lose; then kill it."""
        if not victims:
            victims.append(worker_processes()[0])
            victims[0].send_signal(signal.SIGSTOP)
            threading.Timer(2.0, victims[0].kill).start()

    summary = predict_on_ray([str(images)], weights, on_progress=kill, **arguments)
    assert victims and not victims[0].is_running()
    assert summary.num_before == stopped.num_pictures
    assert (
        (summary.num_pictures, summary.num_objects) == (alone.num_pictures, alone.num_objects) == (5, alone.num_objects)
    )
    assert summary.failures == alone.failures and len(summary.failures) == 1
    assert tables(output) == tables(tmp_path / "alone")

    with pytest.raises(InputError, match="threshold"):
        predict_on_ray([str(images)], weights, **{**arguments, "predictor_options": {**TILES, "threshold": 0.5}})


def test_no_room(cluster: None, images: Path, weights: Path, tmp_path: Path) -> None:
    for options in ({"num_workers": 9}, {"num_gpus_per_worker": 1}, {"num_workers": 1, "cpus_per_worker": 3}):
        with pytest.raises(InputError, match="room for"):
            predict_on_ray([str(images)], weights, output=tmp_path / "no", **options)


def stations(
    tasks: list[Task], weights: Path, settings: dict[str, Any], block: int, model: Any, frames: int | None = None
) -> list[Part | End]:
    """What readers and workers make of tasks, one after the other in this process."""
    predictor = Predictor(load_model(weights), **settings)
    plan = Plan(predictor.tile_size, predictor.tile_overlap, predictor.full_image, block, ReadOptions(), frames)
    worker = Worker([model], settings, plan, torch.get_num_threads(), "cpu", package_version())
    groups = [[pickle.dumps(group)] for group in _groups(tasks, predictor.batch_size)]
    items: list[Part | End] = []
    for group in groups:
        for row in read_blocks(pyarrow.table({"group": group}), plan):
            items += pickle.loads(worker(row)["block"][0].as_py())
    return items


@pytest.mark.parametrize("settings", [TILES, {**TILES, "full_image": True, "threshold": 0.2}, {"batch_size": 2}])
def test_parts_in_any_order_and_twice(
    cluster: None, images: Path, weights: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images.parent)  # workers live elsewhere: relative names must do
    sources, _ = find_sources(["images"])
    tasks = [Task(source, source.name) for source in sources]
    items = stations(tasks, weights, settings, 4, ray.put(load_model(weights)))
    predictor = Predictor(load_model(weights), **settings)
    expected = {each.picture.source.name: each for each in predictor.stream(open_all(sources), on_error="yield")}
    order = np.random.default_rng(0).permutation([*range(len(items)), *range(len(items))])
    joined = _Joined(tasks, predictor, None)
    events = [event for index in order for event in joined.take(pickle.loads(pickle.dumps(items[index])))]
    assert joined.finished
    assert sorted(name_of(event) for event in events) == sorted(expected)
    for event in events:
        there = expected[name_of(event)]
        if isinstance(event, Failed):
            assert there.error is not None and event.message == str(there.error)
            continue
        assert isinstance(event, Found)
        # The order of batches is another only where several images share them.
        np.testing.assert_array_equal(event.result.labels, there.detections.class_id)
        np.testing.assert_allclose(
            event.result.boxes_xyxy, there.detections.xyxy, atol=0 if predictor.batch_size == 1 else 1e-3
        )
        assert event.result.capped == there.capped


def name_of(event: Event) -> str:
    return event.result.file_name if isinstance(event, Found) else event.source.name


def test_frames_come_in_order_though_workers_do_not(cluster: None, weights: Path, tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for shade in range(0, 250, 25):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), shade, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    sources, _ = find_sources([str(tmp_path / "film.mp4")])
    tasks = [Task(sources[0], "film", first_frame=2)]
    items = stations(tasks, weights, {"tile_size": 0}, 3, ray.put(load_model(weights)), frames=9)
    joined = _Joined(tasks, Predictor(load_model(weights)), None)
    events = [event for item in reversed(items) for event in joined.take(item)]
    assert isinstance(events.pop(), Ended) and joined.finished
    assert [event.result.frame for event in events if isinstance(event, Found)] == list(range(2, 9))


def test_a_node_without_the_files_says_so(cluster: None, images: Path, weights: Path) -> None:
    gone = Source("images/z.png", str(images / "z.png"), "image")
    items = stations([Task(gone, "z")], weights, TILES, 4, ray.put(load_model(weights)))
    assert isinstance(items[-1], End) and "z.png" in str(items[-1].error) and "same path" in str(items[-1].error)


def test_another_version_on_a_node(cluster: None) -> None:
    with pytest.raises(InputError, match="install the same"):
        Worker([None], {}, Plan(0, 0, False, 4, ReadOptions(), None), 1, "cpu", "0.0.0")


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_CONNECT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        cases = {"nonsense": "no address", "host": "no address", "ray://127.0.0.1:1": "on a machine of the cluster"}
        cases |= {f"127.0.0.1:{port}": "no Ray cluster: give", "127.0.0.1:1": "127.0.0.1:1"}
        for address, message in cases.items():
            with pytest.raises(InputError, match=message):
                connection._require_reachable(address)


def test_mistakes(weights: Path, tmp_path: Path) -> None:
    for name, value in {
        "num_workers": -1,
        "cpus_per_worker": 0,
        "tiles_per_block": 0,
        "num_gpus_per_worker": 1.5,
    }.items():
        with pytest.raises(InputError, match=name):
            RayOptions(**{name: value})
    with pytest.raises(InputError, match="num_gpus_per_worker"):
        predict_on_ray(["x.png"], weights, output=tmp_path, predictor_options={"device": "cuda"})
    camera = [Task(Source("camera-0", "0", "camera"), "camera-0")]
    settings = WorkSettings(str(weights), {}, ReadOptions(), tmp_path)
    with pytest.raises(InputError, match="camera-0"):
        next(work_on_ray(camera, settings, threading.Event(), options=RayOptions()))
