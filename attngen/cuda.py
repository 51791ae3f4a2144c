"""The CUDA side of the conductor: a trace and a configuration become a cubin in the cache, and a kernel on a device.

Cubins are built by nvcc, with or without a GPU, for a named architecture; the host extension loads and launches them
through the driver API.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import cache, pins
from .abi import Layout, parameter_fields
from .abi_cuda import ATTENTION_FIELDS, CUDA_ABI, JOIN_FIELDS, MIXED_FIELDS, MIXED_PLAN_FIELDS, PLAN_FIELDS, QUEUE_ATTENTION_FIELDS, zone_fields
from .choose_cuda import Arch, arch_of, cuda_flags
from .errors import CacheError, MissingKernelError, UnsupportedError
from .load import host, load_cubin
from .paths import PACKAGE, templates_dir
from .records import record
from .run import DEBUG, FORMAT, BuildRecord, build_artifact, describe, key_inputs, record_build
from .spec import Problem, Trace

if TYPE_CHECKING:
    from .emit import Hooks

# The rooms whose text decides what a CUDA kernel's source says.
_ROOMS = ("ops", "expr", "bounds", "classes", "columns", "trace", "rope", "fields", "spec", "abi", "abi_cuda", "choose_cuda", "choose_hopper", "emit", "render", "render_cuda",
          "build")  # fmt: skip


@record
class Specialised:
    """A kernel before rendering; ``name`` is the template's."""

    name: str
    title: str
    hooks: Hooks | None
    config: Any
    layout: Layout
    problem: Problem | None
    flags: tuple[str, ...]
    key: str
    trace: Trace | None = None
    entry: cache.Entry | None = None  # of a pinned kernel, which is not looked up

    @property
    def symbol(self) -> str:
        """The entry point of a build of it, which profilers show: variant, phase and head of the key. A cached one has the name
        that its first variant gave it; its manifest says."""
        words = re.sub(r"[^A-Za-z0-9]+", "_", self.title).strip("_")[:48]
        return f"attngen_{words or 'variant'}_{self.phase}_{self.key[:8]}"

    @property
    def phase(self) -> str:
        """decode, attention, plan, append, mask or merge: the entry point that the template renders is attngen_<phase>."""
        return self.name.partition("_")[0]


def specialise(name: str, title: str, trace: Trace, problem: Problem, config: Any, arch_name: str) -> Specialised:
    """Holes, parameter struct and key of kernel ``name`` for a trace ("plan" reads the mask alone)."""
    from .emit import emit

    storage = dict(problem.storage)
    if name == "plan":
        trace = Trace(mask=trace.mask, fields=trace.fields, where=trace.where)
    used = trace.used()
    base = PLAN_FIELDS if name == "plan" else QUEUE_ATTENTION_FIELDS if config.kind == "queue" else ATTENTION_FIELDS
    if name == "plan" and config.classes[-1].mixed:
        base += MIXED_PLAN_FIELDS
    base += (MIXED_FIELDS if getattr(config, "mixed", False) else ()) + (JOIN_FIELDS if getattr(config, "joins", False) else ())
    hooks = emit(trace, storage, problem.head_dim, dialect="cuda", device_scalars=True, classes=name != "plan")
    zones = tuple(zone.name for zone in (config.zones if name == "plan" else hooks.zones))
    layout = Layout(base + parameter_fields(used, storage, device_scalars=True) + zone_fields(zones, name == "plan"))
    flags = tuple(cuda_flags(arch_name))
    # A planner depends on the problem only through what its mask reads.
    facts = {n: storage[n] for n in used if n in storage} if name == "plan" else problem
    parts = (FORMAT, CUDA_ABI, name, trace.key(problem.head_dim), facts, repr(config), flags, compiler_digest())
    key = hashlib.sha256(repr(parts).encode()).hexdigest()
    return Specialised(name, title, hooks, config, layout, problem, flags, key, trace)


def specialise_plain(name: str, title: str, config: Any, fields: tuple[tuple[str, str], ...]) -> Specialised:
    """A kernel without hooks, which its configuration decides alone: append, mask_rows, merge."""
    pinned = pins.pinned_plain(name, config)
    if pinned is not None:
        return from_entry(pinned, None)
    flags = tuple(cuda_flags(config.arch))
    key = hashlib.sha256(repr((FORMAT, CUDA_ABI, name, repr(config), flags, compiler_digest())).encode()).hexdigest()
    return Specialised(name, title, None, config, Layout(fields), None, flags, key)


def from_entry(entry: pins.Role, problem: Problem | None) -> Specialised:
    """A pinned kernel as it stands in the cache, perhaps of another release. Raises CacheError where this one cannot launch it.
    Of one that its set left out, the configuration alone: it cannot be built."""
    if not isinstance(entry, cache.Entry):
        config = pins.restore_config(entry["choice"], entry["variant"])
        return Specialised(entry["name"], entry["variant"], None, config, Layout(()), problem, (), "")
    m = entry.manifest
    if not {"name", "variant", "choice", "flags", "symbol"} <= m.keys():
        raise CacheError(f"{entry.folder}: its manifest does not say how to launch it.\n  do: build it again with attngen precompile")
    config = pins.restore_config(m["choice"], entry.folder)
    layout = pins.restore_layout(m, entry.folder)
    return Specialised(m["name"], m["variant"], None, config, layout, problem, tuple(m["flags"]), entry.key, None, entry)


def _sources() -> tuple[Path, ...]:
    return templates_dir() / "cuda", templates_dir() / "shared", *(PACKAGE / f"{room}.py" for room in _ROOMS)


@lru_cache(maxsize=1)
def compiler_digest() -> str:
    """Digest of the templates and of the compiler rooms' sources."""
    return cache.sources_digest(*_sources())


def build(kernel: Specialised) -> tuple[cache.Entry, bool, float]:
    """The kernel's cubin: from the cache, or compiled now. Returns the entry, whether it was there, and the seconds."""
    if kernel.entry is not None:
        return kernel.entry, True, 0.0
    if not kernel.key:
        raise MissingKernelError(
            f"the set that serves {kernel.title} has no {kernel.name} ({kernel.config}).\n  required: its kernels of all lengths\n"
            f"  found: a set of the phase decode alone\n  do: add \"prefill\" to its phases and run attngen precompile again"
        )
    start = time.perf_counter()

    def recipe() -> Any:
        from .build import Recipe

        return Recipe("cubin", (f"{kernel.name}.cu",), kernel.flags, (), "kernel.cubin")

    def render() -> dict[str, str]:
        from .render_cuda import render_cuda

        files = render_cuda(kernel.name, kernel.hooks, kernel.config, kernel.layout, kernel.problem, kernel.title)
        main = f"{kernel.name}.cu"
        files[main], count = re.subn(rf"\battngen_{kernel.phase}\(", f"{kernel.symbol}(", files[main])
        assert count == 1, f"{main} defines attngen_{kernel.phase} {count} times"
        return files

    def described() -> dict[str, Any]:
        return {
            "kind": "cubin", "name": kernel.name, "abi": CUDA_ABI, "flags": list(kernel.flags), "variant": kernel.title,
            "isa": kernel.config.arch, "problem": kernel.problem.__dict__ if kernel.problem else None,
            "config": str(kernel.config), "choice": pins.config_record(kernel.config), "symbol": kernel.symbol,
            "params": describe(kernel.layout), "params_size": kernel.layout.size,
            "inputs": key_inputs("cuda", kernel.name, CUDA_ABI, kernel.trace, kernel.problem, str(kernel.config), kernel.flags,
                                 *_sources()),
        }  # fmt: skip

    entry, hit = build_artifact(kernel.key, recipe, render, described, f"{kernel.title} {kernel.name}")
    return entry, hit, 0.0 if hit else time.perf_counter() - start


_loaded: dict[tuple[str, int], Any] = {}


def load(kernel: Specialised, device: int, threads: int, shared_bytes: int, dependent: bool) -> Any:
    """The kernel on CUDA device ``device``: built if need be, loaded once a process."""
    found = _loaded.get((kernel.key, device))
    if found is None:
        entry, hit, seconds = build(kernel)
        host()
        start = time.perf_counter()
        found = load_cubin(entry, entry.manifest["symbol"], device, threads, shared_bytes, dependent)
        record_build(BuildRecord(
            kernel.key, f"{kernel.title} {kernel.name}", kernel.problem, hit, seconds, time.perf_counter() - start
        ))  # fmt: skip
        if DEBUG:
            from . import debug

            debug.show(entry, hit, seconds, kernel)
        found = _loaded.setdefault((kernel.key, device), found)
    return found


def refuse_capture(device: int, what: str, do: str) -> None:
    """Raises UnsupportedError where the current stream of CUDA device ``device`` is being captured: nothing may be loaded."""
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(f"{what} is not loaded on cuda:{device}, whose stream is being captured.\n  do: {do}")


# The current stream of a CUDA device, given by its index, as ``CudaKernel.launch`` takes it. Builds of torch without CUDA have none.
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


@lru_cache(maxsize=None)
def device_arch(index: int) -> Arch:
    """The architecture whose cubins a CUDA device runs.

    Raises UnsupportedError for a device that has no kernels, and for a torch built for another vendor's GPUs.
    """
    if torch.version.hip is not None:
        raise UnsupportedError("this torch is built for ROCm: attngen's kernels run on NVIDIA GPUs from sm_80, and on CPUs")
    return arch_of(*torch.cuda.get_device_capability(index))
