"""Measured choices: which listed candidate of a kernel's configuration was fastest on this machine.

``attngen tune`` (tune.py) measures and keeps them in the cache, one small record for what a kernel serves: structure, problem,
compiler sources, phase, layout, and the GPU's or CPU's name. The choose rooms rebuild the configuration from the candidate that
a record names, so a record can select but not invent one, and one of another release selects nothing. The configuration is part
of a kernel's key. Sets are built by rule alone (``ignored``), and the kernels that load_set pins go before both.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import threading
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import cache
from .choose_cuda import arch_of
from .errors import CacheError, ParameterError
from .spec import Problem

if TYPE_CHECKING:
    from .choose import Preference

_here = threading.local()


# ---- what applies now ------------------------------------------------------------------------------------------------


def in_use() -> bool:
    """Whether records apply: not under ATTNGEN_TUNED=off, nor inside ``ignored``."""
    mode = os.environ.get("ATTNGEN_TUNED", "").strip().lower() or "on"
    if mode not in ("on", "off"):
        raise ParameterError(f"ATTNGEN_TUNED={mode}: required on or off; unset it or mend it")
    return mode == "on" and not getattr(_here, "ignored", 0)


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """In this thread, choices are made by rule alone."""
    _here.ignored = getattr(_here, "ignored", 0) + 1
    try:
        yield
    finally:
        _here.ignored -= 1


@contextlib.contextmanager
def trying(phase: str, shape: Mapping[str, Any]) -> Iterator[None]:
    """In this thread, kernels of ``phase`` have this candidate and all others that of the rule."""
    before, _here.tried = getattr(_here, "tried", None), (phase, tuple(sorted(shape.items())))
    try:
        yield
    finally:
        _here.tried = before


def state() -> tuple[Any, ...]:
    """What in this process decides a choice beside its arguments: for those who remember kernels."""
    return getattr(_here, "tried", None), in_use()


def preference(structure: str, problem: Problem, phase: str, layout: str, sources: str) -> Preference | None:
    """The candidate to take, if one was measured. Arguments as ``identity``."""
    from .choose import Preference

    tried = getattr(_here, "tried", None)
    if tried is not None:
        return Preference(dict(tried[1]), "being measured") if tried[0] == phase else None
    if not in_use() or not (folder := _folder()) or not folder.is_dir():
        return None
    record = read(folder / f"{identity(structure, problem, phase, layout, sources)}.json")
    return None if record is None else Preference(record["shape"], record["why"])


# ---- records ---------------------------------------------------------------------------------------------------------


def identity(structure: str, problem: Problem, phase: str, layout: str, sources: str) -> str:
    """The name of a record.

    Args:
        structure, sources: ``Trace.key`` and the digest of the compiler's rooms, as in a kernel's key.
        phase: the row-tile class, such as "16 rows" or "prefill"; on the CPU "attention".
        layout: "pages" or "contiguous".
    """
    return hashlib.sha256(repr((structure, problem, machine(problem), phase, layout, sources)).encode()).hexdigest()


def keep(name: str, record: Mapping[str, Any]) -> None:
    """Write a record: ``shape``, the candidate's fields; ``why``, a line for people; and whatever was measured."""
    cache.default().write_record("tuned", name, record)


def read(path: Path) -> dict[str, Any] | None:
    """A record, or None where there is none that can be read: it only saves time."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    good = isinstance(record, dict) and isinstance(record.get("shape"), dict) and isinstance(record.get("why"), str)
    return record if good else None


def _folder() -> Path | None:
    try:
        return cache.default().base / "tuned"
    except CacheError:
        return None


@lru_cache(maxsize=None)
def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine(problem: Problem) -> str:
    """The CPU's name, or that of the current GPU if it runs kernels for ``problem.isa``; '' without one."""
    if problem.backend == "cpu":
        return _cpu_name()
    if not torch.cuda.is_available() or arch_of(*torch.cuda.get_device_capability()).name != problem.isa:
        return ""
    return torch.cuda.get_device_name()
