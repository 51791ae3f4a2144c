"""Building a set: all of it, on all cores that memory allows, with what is happening on show.

    plan = Plan.of(variant_set)            what is there, what is missing, what it will cost
    result = build(plan, jobs, progress)   builds what is missing; a kernel that fails does not stop the others
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from . import build as building
from . import cache, counters
from .entry import Entry
from .errors import AttngenError, CacheError
from .sets import VariantSet
from .units import Job, Unit, make_lock, units_of

# CPU seconds and bytes of a compiler at work, where the cache remembers none of its kind (measured: docs/deploy.md).
_SECONDS = {"attention": 1.6, "decode": 1.1, "attention_sm80": 1.4, "attention_sm90": 1.6, "plan": 1.9, "append": 0.9, "mask_rows": 0.8, "merge": 0.8, "share": 1.0}
_BYTES = 256 << 20
_KEPT_FREE = 512 << 20  # of the machine's memory, for all else
_SAMPLE_S = 0.2


@dataclass(frozen=True)
class Plan:
    """What building a set means: its units, one job a key, and which keys are there already."""

    variant_set: VariantSet
    units: tuple[Unit, ...]
    jobs: tuple[Job, ...]
    there: Mapping[str, Entry]
    seconds: Mapping[str, float]  # expected of each missing key

    @classmethod
    def of(cls, variant_set: VariantSet) -> Plan:
        """Trace the set and look its keys up."""
        units = tuple(units_of(variant_set))
        jobs = tuple({job.key: job for unit in units for job in unit.jobs}.values())
        store, there = cache.default(), {}
        for job in jobs:
            try:
                found = store.find(job.key)
            except CacheError:
                continue  # damaged: it is built again
            if found is not None:
                there[job.key] = found.light()
        past: dict[str, list[float]] = {}
        for entry in store.entries():
            if seconds := float(entry.manifest.get("cpu_seconds", 0.0)):  # not the clock's, which other programs lengthen
                past.setdefault(str(entry.manifest.get("name")), []).append(seconds)
        expected = {
            job.key: median(past[job.name]) if past.get(job.name) else _SECONDS.get(job.name, 3.0)
            for job in jobs if job.key not in there
        }  # fmt: skip
        return cls(variant_set, units, jobs, there, expected)

    @property
    def missing(self) -> list[Job]:
        """What is to be built, the longest first: no core waits for a last long one."""
        return sorted((job for job in self.jobs if job.key in self.seconds), key=lambda j: -self.seconds[j.key])

    def estimate(self, workers: int) -> float:
        """Seconds that building will take, if nothing else runs."""
        if not self.seconds:
            return 0.0
        return max(sum(self.seconds.values()) / min(workers, cores()), max(self.seconds.values()))


@dataclass
class State:
    """A job while the set is built, for the display."""

    job: Job
    state: str = "waits"  # waits, builds, built, there, failed
    seconds: float = 0.0
    cores: float = 0.0
    peak_bytes: int = 0
    error: str = ""
    thread: int = 0
    started: float = 0.0
    cpu_seconds: float = 0.0


@dataclass
class Result:
    """What became of a set."""

    plan: Plan
    states: list[State]
    entries: dict[str, Entry]
    seconds: float = 0.0
    workers: int = 1
    peak_bytes: int = 0  # of all compilers at once
    interrupted: bool = False

    @property
    def failed(self) -> list[State]:
        return [s for s in self.states if s.state == "failed"]

    @property
    def complete(self) -> bool:
        return len(self.entries) == len(self.plan.jobs)

    def lock(self) -> dict[str, Any]:
        """The set's lock file."""
        return make_lock(self.plan.variant_set, self.plan.units, self.entries)


def build(plan: Plan, workers: int, watch: Callable[[Result], None] = lambda result: None) -> Result:
    """Build what is missing on ``workers`` threads. ``watch`` is called a few times a second and at the end.

    An interrupt (Ctrl-C) ends the compilers and returns what there is, ``interrupted``; the next call goes on from there.
    """
    states = [State(job, "there" if job.key in plan.there else "waits") for job in plan.jobs]
    result = Result(plan, states, dict(plan.there), workers=workers)
    by_key, start = {s.job.key: s for s in states}, time.perf_counter()
    gate, stop = _Gate(), threading.Event()

    def work(job: Job) -> None:
        state = by_key[job.key]
        with gate.admit(state, stop):
            if stop.is_set():
                return
            state.thread, state.started, state.state = threading.get_ident(), time.perf_counter(), "builds"
            try:
                with counters.jit("on"):  # whatever ATTNGEN_JIT says: to build is what was asked for
                    entry, hit, _ = job.build()
                result.entries[job.key] = entry
                state.state = "there" if hit else "built"
            except AttngenError as error:
                state.state, state.error = ("waits", "") if stop.is_set() else ("failed", str(error))
            state.seconds, state.thread = time.perf_counter() - state.started, 0

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        futures = [pool.submit(work, job) for job in plan.missing]
        sampler = _Sampler(result)
        try:
            while not all(f.done() for f in futures):
                sampler.sample()
                watch(result)
                time.sleep(_SAMPLE_S)
        except KeyboardInterrupt:
            stop.set()
            result.interrupted = True
            for future in futures:
                future.cancel()
            _end_compilers()
    for future in futures:
        if not future.cancelled():
            future.result()
    result.seconds = time.perf_counter() - start
    watch(result)
    return result


def workers_for(wanted: int | None) -> int:
    """How many compilers at once: as many as cores that this process may use and memory for them, or ``wanted``."""
    return wanted or max(1, min(cores(), (free_bytes() - _KEPT_FREE) // _BYTES))


def cores() -> int:
    """How many this process may use."""
    found, quota = len(os.sched_getaffinity(0)), _cgroup_cores()
    return max(1, min(found, int(quota + 0.5))) if quota else found


def free_bytes() -> int:
    """Memory that is free for compilers: of the machine, and of the container."""
    found = [1 << 62]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) << 10)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdigit():
            found.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError, IndexError):
        pass
    return min(found)


def _cgroup_cores() -> float:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return 0.0 if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return 0.0


class _Gate:
    """Admits a job when memory is free for it, and one in any case: a machine that is short builds one at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: list[State] = []

    @contextmanager
    def admit(self, state: State, stop: threading.Event) -> Iterator[None]:
        with self._changed:
            while self._running and not stop.is_set() and not self._room():
                self._changed.wait(1.0)  # others finish, or other programs do
            self._running.append(state)
        try:
            yield
        finally:
            with self._changed:
                self._running.remove(state)
                self._changed.notify_all()

    def _room(self) -> bool:
        """Whether one more fits beside what runs: what was admitted will yet take what it has not taken so far."""
        to_come = sum(max(0, _BYTES - state.peak_bytes) for state in self._running)
        return free_bytes() - to_come >= _BYTES + _KEPT_FREE


class _Sampler:
    """Reads from /proc what the compilers of each job use. A build is a session of processes; its leader's id is known."""

    def __init__(self, result: Result) -> None:
        self.result, self.last = result, time.perf_counter()
        self.tick = os.sysconf("SC_CLK_TCK")
        self.page = os.sysconf("SC_PAGE_SIZE")

    def sample(self) -> None:
        now, sessions = time.perf_counter(), self._sessions()
        elapsed, self.last = max(now - self.last, 1e-3), now
        total = 0
        for state in self.result.states:
            if not state.thread:
                state.cores = 0.0
                continue
            state.seconds = now - state.started
            used, held = sessions.get(building.running.get(state.thread, -1), (0.0, 0))
            state.cores = max(0.0, used - state.cpu_seconds) / elapsed if used else 0.0
            state.cpu_seconds = used
            state.peak_bytes = max(state.peak_bytes, held)
            total += held
        self.result.peak_bytes = max(self.result.peak_bytes, total)

    def _sessions(self) -> dict[int, tuple[float, int]]:
        """(CPU seconds, resident bytes) of each session."""
        found: dict[int, tuple[float, int]] = {}
        wanted = set(building.running.values())
        for path in Path("/proc").glob("[0-9]*/stat") if wanted else ():
            try:
                fields = path.read_bytes().rpartition(b")")[2].split()
                session = int(fields[3])
                if session in wanted:
                    used, held = found.get(session, (0.0, 0))
                    # utime, stime and those of children that were waited for
                    ticks = sum(int(x) for x in fields[11:15])
                    found[session] = used + ticks / self.tick, held + int(fields[21]) * self.page
            except (OSError, ValueError, IndexError):  # it ended
                continue
        return found


def _end_compilers() -> None:
    for pid in list(building.running.values()):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGTERM)  # ninja passes it on
