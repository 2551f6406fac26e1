"""The connection to Ray: started here, or found, quickly or not at all, and without its chatter."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from crossdino.checkpoints import package_version
from crossdino.errors import InputError

# Seconds until an address counts as dead. Ray itself tries for two minutes and then ends the program.
_CONNECT_SECONDS = 10.0
# What Ray reads when it starts; what the user has set stays.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it would call home
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # warnings about Ray Data's own actors would go to the terminal
    "RAY_worker_niceness": "0",  # with Ray's 15 a machine that does anything else leaves the workers nothing
}


@dataclass(frozen=True)
class RayOptions:
    """Where and how wide to run.

    Attributes:
        address: `local` starts Ray on this machine for the time of the run; `auto` finds the cluster that this machine
            belongs to, `HOST:PORT` names it.
        num_workers: actors with a model each; 0: as many as the cluster has room for.
        num_gpus_per_worker: GPUs for each, e.g. 0.5 for two workers on one; None: 1 where the cluster has GPUs.
        cpus_per_worker: CPU cores, and threads of torch, for each.
        tiles_per_block: tiles of an image that a worker gets at once.
    """

    address: str = "local"
    num_workers: int = 0
    num_gpus_per_worker: float | None = None
    cpus_per_worker: int = 1
    tiles_per_block: int = 16

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name, least in (("num_workers", 0), ("cpus_per_worker", 1), ("tiles_per_block", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}: give at least {least}")
        gpus = self.num_gpus_per_worker
        if gpus is not None and (gpus < 0 or gpus > 1 and gpus != int(gpus)):
            raise InputError(f"num_gpus_per_worker is {gpus}: give a share up to 1, or a whole number")


@contextlib.contextmanager
def ray_of(options: RayOptions) -> Iterator[tuple[int, float]]:
    """A connection to Ray: the number of workers and their GPUs. One that the caller has made is used, and kept."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import ray.data  # is it installed?
        import ray.exceptions
    except ImportError as error:
        raise InputError(f"--ray needs Ray Data ({error}): pip install 'crossdino[ray]'") from None
    theirs = ray.is_initialized()
    with _quiet():
        try:
            if not theirs:
                _connect(options)
            yield _room(options)
        except ray.exceptions.RayError as error:
            raise _mistake(error) or error from None
        finally:
            if not theirs:
                ray.shutdown()


def _connect(options: RayOptions) -> None:
    import ray

    arguments: dict[str, Any] = {"address": options.address}
    if options.address == "local":
        # What Ray calls CPUs are places. There is one more, so that somebody reads while all workers compute.
        num_places = (options.num_workers or max(1, _num_cores() // options.cpus_per_worker)) * options.cpus_per_worker
        arguments |= {"num_cpus": num_places + 1, "include_dashboard": False}
    else:
        _require_reachable(options.address)
    # Ray would put a handler of its own in the place of that of the run.
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if main else None
    try:
        with _no_stderr():
            ray.init(**arguments, log_to_driver=False, logging_level=logging.ERROR)
    except (Exception, SystemExit) as error:  # Ray raises about everything here, by its version and the cluster's state
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"cannot use Ray at {options.address}: {reason[0]}") from None
    finally:
        if main:
            signal.signal(signal.SIGTERM, handler)


def _require_reachable(address: str) -> None:
    """Find out soon whether anybody answers."""
    if address == "auto":
        return
    if address.startswith("ray://"):
        raise InputError(
            f"--ray {address}: Ray Data does not work through a Ray Client; run this on a machine of the cluster, with "
            "--ray auto or HOST:PORT"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"--ray {address} is no address: give local, auto or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"no Ray cluster at {address} ({reason}): start one by `ray start --head`, or check it"
        ) from None
    # Something answers. What is not Ray would hold `ray.init` up for minutes, so a process that can be ended asks.
    asking = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--skip-version-check", "--address", address]
    try:
        asked = subprocess.run(asking, capture_output=True, timeout=2 * _CONNECT_SECONDS)
    except subprocess.TimeoutExpired:
        asked = None
    if asked is None or asked.returncode:
        if asked is not None and b"AuthToken" in asked.stderr:
            raise InputError(f"the Ray cluster at {address} wants a token: set RAY_AUTH_MODE=token, see Ray's manual")
        raise InputError(
            f"what answers at {address} is no Ray cluster: give the address that `ray start --head` printed"
        )


def _room(options: RayOptions) -> tuple[int, float]:
    """The number of workers, and of GPUs for each, that the cluster has room for."""
    import ray

    there = ray.cluster_resources()
    cpus, gpus = there.get("CPU", 0.0), there.get("GPU", 0.0)
    num_gpus = float(gpus > 0) if options.num_gpus_per_worker is None else options.num_gpus_per_worker
    most = int((cpus - 1) // options.cpus_per_worker)  # one for reading
    if num_gpus:
        most = min(most, int(gpus // num_gpus))
    wanted = options.num_workers or most
    if most < max(wanted, 1):
        raise InputError(
            f"the Ray cluster at {options.address} has {cpus:g} CPUs and {gpus:g} GPUs: room for {most} workers with "
            f"{options.cpus_per_worker} CPUs and {num_gpus:g} GPUs each (and one CPU for reading), not for "
            f"{max(wanted, 1)}; give fewer or smaller ones, or start more nodes"
        )
    return wanted, num_gpus


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No messages of Ray's own but errors."""
    loggers = [logging.getLogger(name) for name in ("ray", "ray.data")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Hide what Ray's C++ part says while it starts, such as that it has been told to be quiet."""
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def _mistake(error: BaseException) -> InputError | None:
    """What the user can mend, where that is what ended a worker."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, InputError):
            return InputError(str(seen))
        if isinstance(seen, ModuleNotFoundError):
            return InputError(
                f"a Ray node lacks a package ({seen}): install crossdino {package_version()} on every node"
            )
        seen = getattr(seen, "cause", None) or seen.__cause__
    return None


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
