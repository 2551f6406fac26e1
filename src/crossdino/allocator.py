"""glibc's memory allocator, told to keep the memory that a network needs again at its next step.

By default glibc takes every block above a threshold (128 KB, at most 32 MB) from the kernel and gives it back as soon
as it is free. A detector's maps are that large: the kernel then clears the same pages at every layer, which has cost a
third of a forward pass and nearly half of a training step. Two calls of `mallopt` (mallopt(3), M_MMAP_THRESHOLD and
M_TRIM_THRESHOLD) end that. The price is memory: what was needed once stays with the process, up to 0.6 GB in our
measurements.

Our commands ask for it, and the processes that they start; the library never does so by itself.
"""

from __future__ import annotations

import ctypes
import os
import sys

# mallopt's numbers, from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
# Blocks up to this size stay with the process.
_LARGEST = 1 << 30
# Who sets one of these has chosen a behaviour of their own.
_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_OFF = ("0", "off", "no", "false")


def tune_allocator() -> bool:
    """Let this process keep freed memory for its next step instead of giving it back to the kernel at once.

    Works at any time and in any thread, best before the first large tensor; processes that are forked inherit it. Does
    nothing, and says nothing, where the allocator is another one (macOS, Windows, musl; a preloaded jemalloc, tcmalloc,
    mimalloc), where the user has set glibc's own thresholds (`MALLOC_MMAP_THRESHOLD_`, `MALLOC_MMAP_MAX_`,
    `MALLOC_TRIM_THRESHOLD_`, `MALLOC_TOP_PAD_`, or `glibc.malloc.` in `GLIBC_TUNABLES`), and with `CROSSDINO_MALLOC=0`.

    Returns:
        Whether it was done.
    """
    environment = os.environ
    if environment.get("CROSSDINO_MALLOC", "").strip().lower() in _OFF:
        return False
    if any(environment.get(name) for name in _VARIABLES) or "glibc.malloc." in environment.get("GLIBC_TUNABLES", ""):
        return False
    library = _glibc()
    if library is None:
        return False
    # glibc before 2.35 refuses thresholds above 32 MB; there no block at all is taken from the kernel by itself.
    done = bool(library.mallopt(_MMAP_THRESHOLD, _LARGEST) or library.mallopt(_MMAP_MAX, 0))
    return bool(library.mallopt(_TRIM_THRESHOLD, _LARGEST)) and done


class _Origin(ctypes.Structure):
    """What `dladdr` tells of a symbol."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc and its `malloc` is the one that this process calls."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(None)
        # Whatever is preloaded, or linked into the interpreter, stands before the C library when names are looked up.
        ours, theirs = _origin(library, "malloc"), _origin(library, "gnu_get_libc_version")
        library.mallopt.argtypes, library.mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    except (AttributeError, OSError):  # another C library, or one that an interpreter is linked with statically
        return None
    return library if ours is not None and ours == theirs else None


def _origin(library: ctypes.CDLL, name: str) -> int | None:
    """Where the library begins in memory that a function comes from."""
    library.dladdr.argtypes, library.dladdr.restype = [ctypes.c_void_p, ctypes.POINTER(_Origin)], ctypes.c_int
    origin = _Origin()
    found = library.dladdr(ctypes.cast(getattr(library, name), ctypes.c_void_p), ctypes.byref(origin))
    return origin.base if found else None
