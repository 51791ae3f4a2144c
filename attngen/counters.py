"""Counters of this process: what the cache was asked for, what was built and loaded, and what it took."""

from __future__ import annotations

import os
import threading
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


def stats() -> dict[str, Any]:
    """What this process did so far.

    Returns a dict: ``hits`` (kernels found, and ``layers``, which layer of the cache had them), ``misses``, ``builds``,
    ``build_ms``, ``waits`` and ``wait_ms`` (for other processes that built), ``loads``, ``load_ms``, ``refused`` (misses
    under ATTNGEN_JIT=off) and ``damaged`` entries.
    """
    names = ("hits", "misses", "builds", "build_ms", "waits", "wait_ms", "loads", "load_ms", "refused", "damaged")
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
