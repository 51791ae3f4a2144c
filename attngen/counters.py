"""Counters of this process: what the cache was asked for, what was built and loaded, and what it took."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import ParameterError

_lock = threading.Lock()
_counts: defaultdict[str, float] = defaultdict(int)
_layers: Counter[str] = Counter()  # first hits, by the layer that had the kernel
_here = threading.local()
JIT_MODES = ("on", "off", "warn")


def _forget_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_lock)


def count(name: str, amount: float = 1, layer: str = "") -> None:
    """Add to a counter."""
    with _lock:
        _counts[name] += amount
        if layer:
            _layers[layer] += 1


@contextmanager
def timed(name: str, milliseconds: str) -> Iterator[None]:
    """Add 1 to ``name`` and what it took to ``milliseconds``, where nothing is raised."""
    start = time.perf_counter()
    yield
    count(name)
    count(milliseconds, 1e3 * (time.perf_counter() - start))


def stats() -> dict[str, Any]:
    """What this process did so far.

    Returns a dict: ``hits`` (kernels found, each once, and ``layers``, which layer of the cache had them; also those that another
    process built meanwhile), ``misses`` (kernels that this process had to build: ``builds``, ``build_ms``, and ``failed`` builds),
    ``waits`` and ``wait_ms`` (for other processes that built), ``loads``, ``load_ms``, ``refused`` (kernels that were missing
    under ATTNGEN_JIT=off) and ``damaged`` entries that were set aside.
    """
    names = ("hits", "misses", "builds", "build_ms", "failed", "waits", "wait_ms", "loads", "load_ms", "refused", "damaged")
    with _lock:
        found: dict[str, Any] = {name: _counts[name] for name in names}
        return {**found, "layers": dict(_layers)}


def reset() -> None:
    """Set every counter to 0."""
    with _lock:
        _counts.clear()
        _layers.clear()


@contextmanager
def jit(mode: str) -> Iterator[None]:
    """In this thread, as under ATTNGEN_JIT=mode."""
    before, _here.mode = getattr(_here, "mode", ""), mode
    try:
        yield
    finally:
        _here.mode = before


def jit_mode() -> str:
    """$ATTNGEN_JIT: "on" (the default), "off" (a kernel that is not there is an error) or "warn"."""
    if forced := getattr(_here, "mode", ""):
        return str(forced)
    mode = os.environ.get("ATTNGEN_JIT", "").strip().lower() or "on"
    if mode not in JIT_MODES:
        raise ParameterError(f"ATTNGEN_JIT={mode}: required one of {', '.join(JIT_MODES)}; unset it or mend it")
    return mode
