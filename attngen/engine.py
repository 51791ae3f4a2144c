"""The CUDA engine of batches: kernels, workspace, parameter structs, launches.

`BatchAttention` checks what is given and hands it to an engine, which knows how its device computes. An engine has

    engine = Engine(Facts, workspace)              kernels built and loaded, memory allocated
    plan = engine.plan(lengths, page_table, params)
    engine.launch(plan, site, q_at, k_at, v_at, out, lse, params, partial)
    engine.calls                                   host().Calls, which repeats plans and runs; None: nothing does
    engine.remember_plan(...), engine.remember_run(...)
    engine.status()                                what the device found wrong, a status.Status
    engine.workspace_bytes, engine.problem
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from . import cuda, pins, tuned
from .abi_cuda import SHARE_FIELDS
from .boxes import Boxes
from .cache import Entry
from .choose_cuda import MOST_REQUESTS, PlanConfig, ShareConfig, ZoneMap, arch, arch_named, choose_attention, choose_decode, most_blocks, tile_class
from .errors import ParameterError, UnsupportedError
from .load import host
from .ops import F32, I32_MAX
from .params import DTYPE_NAMES, check_dtype
from .records import record
from .run import stored_dtypes
from .space import Workspace
from .space import workspace as workspace_layout
from .spec import Problem, Trace, Variant, as_variant
from .status import STATUS_WORDS, Status

if TYPE_CHECKING:
    from .choose import Preference
    from .emit import Hooks

_FIXED_SPLIT = 2048  # keys of a piece under batch_invariant: long enough to hide a merge, short enough to fill a GPU
PHASES = ("16 rows", "32 rows", "64 rows", "prefill")  # names of the row-tile classes, for what was measured of them
_LEAST_GAIN = 120 << 20  # bytes of keys and values that shared prefixes must save to be worth a second kernel: 30-40 us of HBM
_MOST_ZONES = 64 << 20  # bytes of a zone map: of 8 million 32s
POINTERS = struct.Struct("=5Q")  # q, k, v, out, lse: the first fields


@record
class Facts:
    """What an engine is made for: BatchAttention's arguments, checked and with their defaults."""

    variant: Variant
    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    page_size: int | None
    max_requests: int
    max_q_tokens: int
    max_q_len: int
    capacity: int  # entries of a page table, or rows of ragged keys
    max_kv_len: int
    head_offset: int
    total_heads: int
    batch_invariant: bool
    storage: tuple[tuple[str, str], ...]
    scale: float
    shared_prefix: bool = False

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, eq=False)
class Site:
    """The checked shapes and strides of q, k, v and the output, under the names of struct fields."""

    out_shape: tuple[int, ...]
    strides: Mapping[str, int]
    second: int  # bytes from k to v, where one tensor holds both
    extents: tuple[int, ...]  # bytes of q, k and v


# ---------------------------------------------------------------- kernels


@record
class Kernels:
    """The kernels that serve a variant, before they are built: one a row-tile class, smallest tile first, and their planner."""

    classes: tuple[cuda.Specialised, ...]
    plan: cuda.Specialised
    share: cuda.Specialised | None = None  # finds shared prefixes,
    nodes: cuda.Specialised | None = None  # and attends to them

    @property
    def all(self) -> tuple[cuda.Specialised, ...]:
        """Each of them."""
        return tuple(x for x in (*self.classes, self.plan, self.share, self.nodes) if x is not None)

    def holding(self, rows: int) -> int:
        """The class of a request of so many packed rows: the smallest that holds them in a tile, else the last."""
        return next((i for i, special in enumerate(self.classes) if rows <= special.config.block_m), len(self.classes) - 1)

    def instead(self, i: int) -> int | None:
        """The class that serves rows of class ``i`` better where units are many: Hopper's tiles of 64 in place of decode's of 32, whose
        arithmetic does not keep up with memory. Where units are few decode has the even shares."""
        if i > 0 and i + 1 < len(self.classes) and self.classes[i].name == "decode" and self.classes[i + 1].config.kind == "queue":
            return i + 1 if self.classes[i + 1].key else None  # a set may lack it
        return None

    def needed(self, most_rows: int) -> tuple[int, ...]:
        """The classes that requests of up to ``most_rows`` packed rows are planned into."""
        last = self.holding(most_rows)
        return tuple(range(last + 1 if self.instead(last) is None else last + 2))

    def launched(self, most_rows: int, spread: bool = False) -> tuple[int, ...]:
        """Those that a batch of such requests launches: decode with more rows is worth a launch only where it serves the longest, and
        units are not ``spread`` over all of the GPU."""
        last = self.holding(most_rows)
        if spread:
            last = self.instead(last) or last
        return tuple(i for i in range(last + 1) if i in (0, last) or self.classes[i].name != "decode")


def choices_of(
    trace: Trace, problem: Problem, hooks: Hooks, *, page_size: int | None, batch_invariant: bool = False, most_rows: int = 0,
    joins: int = 0,
) -> dict[str, Any]:
    """A choice a row-tile class, smallest tile first, by the class's name: a configuration, and the candidates it was chosen from.
    Arguments as ``kernels_of``. What was measured (tuned.py) counts, but not under batch_invariant."""
    from .choose_hopper import choose_hopper

    paged, name, split = page_size is not None, problem.isa, _FIXED_SPLIT if batch_invariant else 0
    if split:  # one kernel for all lengths: two would round differently, and a prompt may be cut anywhere
        if most_rows <= 16:
            return {PHASES[0]: choose_decode(problem, name, hooks, paged=paged, split=split)}
        return {PHASES[2]: choose_attention(problem, name, hooks, 64, paged=paged, split=split)}

    structure, layout, sources = trace.key(problem.head_dim), "pages" if paged else "contiguous", cuda.compiler_digest()

    def prefer(phase: str) -> Preference | None:
        return tuned.preference(structure, problem, phase, layout, sources)

    few, some, more, many = PHASES
    choices: dict[str, Any] = {few: choose_decode(problem, name, hooks, paged=paged, prefer=prefer(few), joins=joins)}
    with contextlib.suppress(UnsupportedError):
        choices[some] = choose_decode(problem, name, hooks, 32, paged=paged, prefer=prefer(some), joins=joins)
    try:
        choices[more] = choose_hopper(problem, name, hooks, page_size, prefer=prefer(more), most_rows=64)
    except UnsupportedError:
        choices[more] = choose_attention(problem, name, hooks, 64, paged=paged, prefer=prefer(more))
    try:
        choices[many] = choose_hopper(problem, name, hooks, page_size, prefer=prefer(many))
    except UnsupportedError:
        with contextlib.suppress(UnsupportedError):  # wide heads where shared memory is small do without
            choices[many] = choose_attention(problem, name, hooks, 128, paged=paged, prefer=prefer(many))
    return choices


def kernels_of(
    variant: Variant, problem: Problem, *, page_size: int | None, batch_invariant: bool = False, most_rows: int = 0,
    shared: int = 0,
) -> Kernels:
    """The kernels of ``variant`` for ``problem``, in their chosen configurations. All callers share them: of ``page_size`` it
    counts whether there are pages, and on Hopper whether they are multiples of 8; ``most_rows``, of a request, decides only
    under batch_invariant; ``shared``: with those of shared prefixes, in batches of so many
    requests at most."""
    trace, name = variant.trace, problem.isa
    pinned = pins.pinned_cuda(trace.key(problem.head_dim), problem, page_size, batch_invariant, most_rows <= 16, shared > 0)
    if pinned:
        *classes, plan = (cuda.from_entry(entry, problem) for entry in pinned)
        return Kernels(tuple(classes[:-1]), plan, share_kernel(name, shared), classes[-1]) if shared else Kernels(tuple(classes), plan)
    from .emit import emit

    hooks = emit(trace, dict(problem.storage), problem.head_dim, dialect="cuda", device_scalars=True)
    nodes: list[Any] = []
    if shared:
        from .choose_hopper import choose_hopper

        if why := unshared(trace, problem, hooks, page_size, batch_invariant):
            raise UnsupportedError(f"shared prefixes: {why}.\n  do: leave out shared_prefix=True, each request then reads all of its keys")
        nodes = [choose_hopper(problem, name, hooks, page_size, mixed=True).config]
    choices = choices_of(
        trace, problem, hooks, page_size=page_size, batch_invariant=batch_invariant, most_rows=most_rows,
        joins=nodes[0].block_m if nodes else 0,
    )  # fmt: skip
    configs = [*(choice.config for choice in choices.values()), *nodes]
    planned = PlanConfig(name, tuple(tile_class(c, problem) for c in configs), hooks.zones)
    named = [*((c.template, c) for c in configs), ("plan", planned)]
    *specials, plan = (cuda.specialise(n, variant.name, trace, problem, c, name) for n, c in named)
    if not shared:
        return Kernels(tuple(specials), plan)
    return Kernels(tuple(specials[:-1]), plan, share_kernel(name, shared), specials[-1])


SHARE_SIZES = 256, 512, MOST_REQUESTS  # requests of a batch, of which there is a kernel


def share_kernel(arch_name: str, requests: int) -> cuda.Specialised:
    """The kernel that finds what so many requests share."""
    size = next(n for n in SHARE_SIZES if requests <= n)
    return cuda.specialise_plain("share", "shared prefixes", ShareConfig(arch_name, size), SHARE_FIELDS)


def unshared(trace: Trace, problem: Problem, hooks: Hooks, page_size: int | None, batch_invariant: bool) -> str:
    """Why requests cannot share the work on a prefix; empty where they can."""
    from .choose_hopper import unserved

    if page_size is None:
        return "k and v have no pages"
    if batch_invariant:
        return "under batch_invariant a request's bits may not depend on others"
    if why := unserved(problem, problem.isa, hooks):
        return f"they are served by the Hopper kernel: {why}"
    own = {"request", "q_len", "kv_len", "q_offset", "kv_token"}
    for name, node in trace.roots().items():
        if read := sorted(node.symbols & own):
            return f"{name} reads {', '.join(read)}, which differs among the requests of a prefix"
    if trace.rope and trace.rope.rope.needs_kv_lens:
        return "its RoPE depends on a request's length"
    return ""


def build(specials: Sequence[cuda.Specialised]) -> list[Entry]:
    """Builds what is not in the cache yet, all at once: each is a process of nvcc."""
    if all(special.entry for special in specials):  # pinned
        return [cuda.build(special)[0] for special in specials]
    with ThreadPoolExecutor(len(specials)) as pool:
        return [entry for entry, _, _ in pool.map(cuda.build, specials)]


def load(special: cuda.Specialised, device: int) -> Any:
    """The kernel on CUDA device ``device``, loaded once a process; built before, where it was not in the cache."""
    config = special.config
    return cuda.load(special, device, config.threads, getattr(config, "smem_bytes", 0), arch(config.arch).dependent_launch)


class Launcher:
    """A loaded kernel and its parameter struct."""

    def __init__(self, special: cuda.Specialised, device: int) -> None:
        codes = {"float": "=f", "int32_t": "=i", "int64_t": "=q", "TensorMap": "=128s"}
        self.special, self.layout = special, special.layout
        self.slots = {f.name: (struct.Struct(codes.get(f.ctype, "=Q")), f.offset) for f in self.layout.fields}
        self.kernel = load(special, device)

    def template(self, values: Mapping[str, Any]) -> bytes:
        """The struct with ``values``, 0 elsewhere."""
        buffer = bytearray(self.layout.size)
        empty = {"TensorMap": b""}
        self.layout.pack_into(buffer, 0, *(values.get(f.name, empty.get(f.ctype, 0)) for f in self.layout.fields))
        return bytes(buffer)

    def boxes(self, values: Mapping[str, Any], batch: int = 1) -> Boxes | None:
        """How the copy engine sees tensors of these shapes and strides, if the kernel uses it."""
        config = self.special.config
        if getattr(config, "kind", "") != "queue" or self.special.problem is None:
            return None
        return Boxes(config, self.special.problem, values, batch)

    def launch(self, buffer: bytearray, values: Mapping[str, Any], blocks: int, stream: int) -> None:
        """Fills in ``values`` and launches."""
        self.fill(buffer, values)
        self.kernel.launch(buffer, blocks, 1, stream)

    def fill(self, buffer: bytearray, values: Mapping[str, Any]) -> None:
        """Those of ``values`` that the struct has."""
        for name, value in values.items():
            if name in self.slots:
                code, offset = self.slots[name]
                code.pack_into(buffer, offset, value)


class Loaded:
    """Kernels on a device: those of some row-tile classes, and the planner."""

    def __init__(self, kernels: Kernels, which: Sequence[int], device: torch.device) -> None:
        build([s for s in kernels.all if s not in kernels.classes or kernels.classes.index(s) in which])
        self.kernels, self.which = kernels, tuple(which)
        self.zones: tuple[ZoneMap, ...] = kernels.plan.config.zones
        count = len(kernels.plan.config.classes)
        self.blocks = count if self.zones or kernels.nodes else max(which) + 1  # of the planner, beside those that build zone maps
        self.plan = Launcher(kernels.plan, device.index)
        self.share = Launcher(kernels.share, device.index) if kernels.share else None
        self.classes: dict[int, Launcher] = {}
        self.workers = [0] * count
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        for i in (*which, *range(len(kernels.classes), count)):
            special = kernels.classes[i] if i < len(kernels.classes) else kernels.nodes
            assert special is not None
            found = self.classes[i] = Launcher(special, device.index)
            blocks = found.kernel.blocks_per_sm()
            if blocks == 0:
                raise UnsupportedError(f"{special.name} of {special.title} does not fit {device}: {special.config}")
            self.workers[i] = min(blocks, most_blocks(special.config)) * multiprocessors
            if special.config.head_major:
                self.workers[i] = even_shares(self.workers[i])
        self.multiprocessors = multiprocessors

    def space(self, **capacities: Any) -> Workspace:
        """The workspace of these kernels; arguments as ``space.workspace``."""
        return space_of(self.kernels, self.which, self.multiprocessors, **capacities)

    def lists(self, i: int, space: Workspace, base: int) -> dict[str, int]:
        """Where class ``i`` finds its work, and writes what is not final, in a workspace at ``base``."""
        part = space.classes[i]
        return {name: base + at for name, at in part.lists.items()} | {
            "partial_out": base + space.partial_out, "partial_state": base + space.partial_state, "status": base + space.status,
        }  # fmt: skip

    def shared_lists(self, space: Workspace, base: int) -> dict[str, int]:
        """Where shared prefixes are, and what they gave; the lists of their class."""
        assert space.shared is not None
        lists = {name: base + at for name, at in space.shared.lists.items()}
        results = {"node_out": base + space.shared.out, "node_state": base + space.shared.state, "node_rows": space.shared.node_rows}
        return lists | results

    def plan_lists(self, space: Workspace, base: int, active: Sequence[int], shared: bool = False) -> dict[str, int]:
        """The same for the planner, which plans for the classes ``active``, and for shared prefixes."""
        values = {"status": base + space.status}
        if shared:
            part = space.classes[-1]
            values |= {f"{name}_nodes": base + at for name, at in part.lists.items()} | self.shared_lists(space, base)
            values |= {"num_workers_nodes": self.workers[-1], "max_slots_nodes": part.max_slots}
        for i in active:
            part = space.classes[i]
            values |= {f"{name}{i}": base + at for name, at in part.lists.items()}
            values |= {f"num_workers{i}": self.workers[i], f"max_tiles{i}": part.max_tiles, f"max_slots{i}": part.max_slots}
        return values


def zone_bytes(
    variant: Variant, zones: Sequence[ZoneMap], *, max_requests: int, max_q_tokens: int, max_kv_tokens: int, max_kv_len: int
) -> tuple[int, ...]:
    """Room for the zone maps of tensors of at most these sizes; a tensor that is bound has its own. None where the map would be
    huge, or an axis may have any length: what tiles read of such a tensor is not known."""
    sizes = {"requests": max_requests, "q_tokens": max_q_tokens, "kv_tokens": max_kv_tokens, "positions": max_kv_len}

    def shape(zone: ZoneMap) -> tuple[int, ...]:
        bound = variant.values.get(zone.name)
        if isinstance(bound, torch.Tensor):
            return tuple(bound.shape)
        return tuple(axis if isinstance(axis, int) else sizes.get(axis, 0) for axis in zone.axes)

    return tuple(size if (size := zone.num_bytes(shape(zone))) <= _MOST_ZONES else 0 for zone in zones)


def zone_values(zones: Sequence[ZoneMap], places: Sequence[tuple[int, int]], params: Mapping[str, Any]) -> tuple[dict[str, int], int]:
    """The struct fields of zone maps that lie at ``places`` (address, room), and the blocks that build them."""
    values, blocks = {}, 0
    for zone, (address, room) in zip(zones, places):
        shape = params[zone.name].shape
        rows, count = zone.counts(shape)
        if zone.num_bytes(shape) > room:
            count = 0
        values |= {f"zones_{zone.name}": address, f"zone_count_{zone.name}": count}
        blocks += rows * -(-count // 32)
    return values, blocks


def even_shares(workers: int) -> int:
    """Up to 1/32 fewer workers, with as many factors of 2 as can be had: 256 for an H100's 264. Heads, and requests of one length,
    mostly come in powers of 2: their shares then end where units do, and fewer pieces have to be merged."""
    found = step = 1
    while (fewer := workers // step * step) >= workers - workers // 32 and fewer:
        found, step = fewer, 2 * step
    return found


def space_of(kernels: Kernels, which: Sequence[int], multiprocessors: int, **capacities: Any) -> Workspace:
    """The workspace of the classes ``which`` on a GPU with so many multiprocessors; known before anything is built."""
    workers = [most_blocks(s.config) * multiprocessors if i in which else 0 for i, s in enumerate(kernels.classes)]
    if kernels.nodes is not None:
        workers.append(most_blocks(kernels.nodes.config) * multiprocessors)
    return workspace_layout(kernels.plan.config, workers, **capacities)


# ---------------------------------------------------------------- ahead of time


@record
class BuiltKernel:
    """A CUDA kernel in the cache, not loaded.

    Attributes:
        name: the template's: "decode", "attention_sm80" or "plan".
        problem, config: the compile-time facts and the chosen configuration, printable.
        spec_hash: the cache key.
        path: the cubin.
    """

    variant: Variant
    name: str
    problem: Problem
    config: Any
    spec_hash: str
    entry: Entry = field(repr=False)

    @property
    def path(self) -> Any:
        return self.entry.artifact

    @property
    def source(self) -> str:
        """The rendered main file, as it was compiled. It is yours to use under any terms."""
        return next(text for name, text in self.entry.sources().items() if name.endswith(".cu"))


def compile_cuda(
    variant: Variant, *, arch: str | None, dtype: torch.dtype, head_dim: int, head_dim_v: int, storage: Mapping[str, str],
    paged: bool | None, batch_invariant: bool, shared_prefix: bool = False,
) -> list[BuiltKernel]:  # fmt: skip
    """``compile`` for a GPU: everything that BatchAttention and attention look up for these facts."""
    gpu = arch_named(arch) if arch else cuda.device_arch(torch.cuda.current_device())
    problem = cuda_problem(gpu.name, dtype, head_dim, head_dim_v, tuple(sorted(storage.items())))
    specials: dict[str, cuda.Specialised] = {}
    layouts: dict[bool | None, tuple[int | None, ...]] = {None: (16, 1, None), True: (16, 1), False: (None,)}
    if shared_prefix:
        if paged is False:
            raise ParameterError("compile with shared_prefix of contiguous keys: prefixes are shared by pages")
        for page_size in layouts[True]:
            for size in SHARE_SIZES:
                specials |= {s.key: s for s in kernels_of(variant, problem, page_size=page_size, shared=size).all}
    for page_size in () if shared_prefix else layouts[paged]:
        for most_rows in (16, 64) if batch_invariant else (0,):
            kernels = kernels_of(variant, problem, page_size=page_size, batch_invariant=batch_invariant, most_rows=most_rows)
            specials |= {s.key: s for s in kernels.all}
    entries = build(list(specials.values()))
    return [BuiltKernel(variant, s.name, problem, s.config, s.key, e) for s, e in zip(specials.values(), entries)]


def cuda_problem(
    arch_name: str, dtype: torch.dtype, head_dim: int, head_dim_v: int, storage: tuple[tuple[str, str], ...]
) -> Problem:
    """The Problem of a call or batch on CUDA, or UnsupportedError."""
    check_dtype(dtype)
    if dtype not in (torch.bfloat16, torch.float16):
        raise UnsupportedError(
            f"dtype {dtype} on CUDA: the kernels take torch.bfloat16 and torch.float16; cast q, k and v, or use the CPU"
        )
    name = DTYPE_NAMES[dtype]
    return Problem("cuda", arch_name, name, name, name, head_dim, head_dim_v, storage)


def workspace_bytes(
    variant: Variant | type[Variant],
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_requests: int,
    max_q_tokens: int,
    head_dim_v: int | None = None,
    page_size: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_pages: int | None = None,
    max_kv_tokens: int | None = None,
    max_q_len: int | None = None,
    batch_invariant: bool = False,
    max_kv_len: int | None = None,
    storage: Mapping[str, torch.dtype] | None = None,
    shared_prefix: bool = False,
    arch: str | None = None,
    multiprocessors: int | None = None,
) -> int:
    """Bytes of workspace that a BatchAttention of these arguments uses, without a GPU and without building anything.

    Args:
        arch, multiprocessors: of the GPU, such as "9.0a" and 132; default those of the current CUDA device.
        others: as BatchAttention's.
    """
    variant = as_variant(variant)
    if arch is None or multiprocessors is None:
        if not torch.cuda.is_available():
            raise ParameterError("workspace_bytes without a CUDA device: required arch= and multiprocessors=, such as '9.0a' and 132")
        device = torch.cuda.current_device()
        arch = arch or cuda.device_arch(device).name
        multiprocessors = multiprocessors or torch.cuda.get_device_properties(device).multi_processor_count
    capacity = max_pages if page_size is not None else max_kv_tokens
    if capacity is None:
        raise ParameterError(f"workspace_bytes: required {'max_kv_tokens' if page_size is None else 'max_pages'}")
    most_keys = capacity * (page_size or 1)
    stored = tuple(sorted(stored_dtypes(variant, storage).items()))
    problem = cuda_problem(arch_named(arch).name, dtype, head_dim, head_dim_v or head_dim, stored)
    rows = min(max_q_len or max_q_tokens, max_q_tokens) * (num_heads // num_kv_heads)
    kernels = kernels_of(
        variant, problem, page_size=page_size, batch_invariant=batch_invariant, most_rows=rows, shared=max_requests if shared_prefix else 0
    )
    return space_of(
        kernels, kernels.needed(rows), multiprocessors, max_requests=max_requests, max_q_tokens=max_q_tokens,
        max_kv_len=max_kv_len or most_keys, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim_v=head_dim_v or head_dim,
        max_q_len=min(max_q_len or max_q_tokens, max_q_tokens), zone_bytes=zone_bytes(
            variant, kernels.plan.config.zones, max_requests=max_requests, max_q_tokens=max_q_tokens, max_kv_tokens=most_keys,
            max_kv_len=max_kv_len or most_keys,
        ),
    ).num_bytes  # fmt: skip


# ---------------------------------------------------------------- batches


@dataclass
class Plan:
    """What plan leaves for launch."""

    active: tuple[int, ...]  # classes to launch, that of shared prefixes first
    bound: dict[str, Any] | None  # struct fields that plan decides; None: a repeated plan, which ``calls`` holds
    held: tuple[Any, ...]  # alive as long as the plan


# plan's tensors in the order of its arguments, by the names of the planner's struct fields; None: attention kernels read them.
PLANNED = ("q_indptr", "kv_indptr", None, "kv_last_page_len", None, "kv_lens", "q_positions", "kv_starts", "groups")
TABLES = 2, 4  # of these, kv_indices and block_table


class CudaEngine:
    """Plans and runs batches on one CUDA device. See BatchAttention for ``workspace``."""

    stride_multiple, alignment = 8, 16  # what copies of 16 bytes need: strides in elements, addresses in bytes

    def __init__(self, facts: Facts, workspace: torch.Tensor | None = None) -> None:
        self.facts = facts
        trace, device = facts.variant.trace, facts.device
        self.problem = cuda_problem(
            cuda.device_arch(device.index).name, facts.dtype, facts.head_dim, facts.head_dim_v, facts.storage
        )
        most_rows = facts.max_q_len * facts.group
        kernels = kernels_of(
            facts.variant, self.problem, page_size=facts.page_size, batch_invariant=facts.batch_invariant,
            most_rows=most_rows, shared=facts.max_requests if facts.shared_prefix else 0,
        )  # fmt: skip
        self._loaded = Loaded(kernels, kernels.needed(most_rows), device)
        self._space = self._loaded.space(
            max_requests=facts.max_requests, max_q_tokens=facts.max_q_tokens, max_kv_len=facts.max_kv_len,
            num_heads=facts.num_heads, num_kv_heads=facts.num_kv_heads, head_dim_v=facts.head_dim_v, max_q_len=facts.max_q_len,
            zone_bytes=zone_bytes(
                facts.variant, self._loaded.zones, max_requests=facts.max_requests, max_q_tokens=facts.max_q_tokens,
                max_kv_tokens=facts.capacity * (facts.page_size or 1), max_kv_len=facts.max_kv_len,
            ),
        )  # fmt: skip
        if workspace is None:
            workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
        elif workspace.device != device or workspace.numel() * workspace.element_size() < self.workspace_bytes:
            raise ParameterError(
                f"workspace of {workspace.numel() * workspace.element_size()} bytes on {workspace.device}: required "
                f"{self.workspace_bytes} bytes on {device}"
            )
        self._workspace = workspace
        self._base = workspace.data_ptr()
        if self._base % 256:
            raise ParameterError("workspace starts at an address that is no multiple of 256: give a tensor of its own")
        self._status = workspace.view(torch.uint8).flatten()[: 4 * STATUS_WORDS].view(torch.int32)
        self._status.zero_()
        self._rope = trace.rope.rope if trace.rope else None
        self._inv_freq = None if self._rope is None else self._rope.inv_freq(facts.head_dim, device)
        reads = trace.mask.params if trace.mask is not None else frozenset()
        self._fields = trace.used()
        self._plan_names = tuple(n for n in self._fields if n in reads)
        self._run_names = tuple(n for n in self._fields if n not in reads)
        self._decided = {i: self._decided_by_plan(launcher) for i, launcher in self._loaded.classes.items()}
        self._images: dict[tuple[Site, int], tuple[bytes, Boxes | None]] = {}
        self._windows: dict[tuple[tuple[str, Any], ...], int] = {}  # by the mask's parameters
        self._nodes = len(kernels.classes)  # the class of shared prefixes, if there is one. Others join the states that it leaves
        self.calls = host().Calls(self._base, device.index or 0, device, cuda.current_stream, self._plan_names, self._run_names,
                                  facts.variant.__dict__, self.alignment)  # fmt: skip

    @property
    def workspace_bytes(self) -> int:
        """Bytes of workspace in use."""
        return self._space.num_bytes

    # ---- plan
    def plan(
        self, lengths: Mapping[str, Any], page_table: torch.Tensor | None, params: Mapping[str, Any],
        shared: str | torch.Tensor = "off",
    ) -> Plan:  # fmt: skip
        """One kernel on the current stream, and one before it where prefixes are shared.

        Args:
            lengths: arguments of ``lengths.Lengths``; vectors are int32 tensors on the device.
            page_table: page numbers, int32 on the device.
            params: checked values of the fields that the mask reads: numbers and device tensors.
            shared: "auto", "off", or the number of each request's group, int32 on the device.
        """
        facts, loaded = self.facts, self._loaded
        rows, requests = lengths["max_q_len"] * facts.group, lengths["num_requests"]
        other = None if facts.shared_prefix else loaded.kernels.instead(loaded.kernels.holding(rows))
        spread = other is not None and 2 * requests * facts.num_kv_heads >= loaded.workers[other]
        active = loaded.kernels.launched(rows, spread) if requests else ()
        if active and self._shares(shared, lengths, page_table):
            active = (self._nodes, *active)
        self.calls.claim()
        if active:
            stream = cuda.current_stream(facts.device.index)
            for launcher, image, blocks in self._planners(lengths, page_table, params, active, shared):
                launcher.kernel.launch(bytearray(image), blocks, 1, stream)
        tables: tuple[Any, ...] = ()
        if self._rope is not None and self._rope.needs_kv_lens:
            tables = rope_tables(self._rope, facts.head_dim, lengths)
        return Plan(active, self._bound(page_table, params, active, tables), (lengths, page_table, params, tables, shared))

    def _planners(
        self, lengths: Mapping[str, Any], page_table: torch.Tensor | None, params: Mapping[str, Any], active: Sequence[int],
        shared: str | torch.Tensor,
    ) -> list[tuple[Launcher, bytes, int]]:  # fmt: skip
        """The kernels that plan, their structs and blocks: what finds shared prefixes comes first."""
        facts, loaded = self.facts, self._loaded
        zones, zone_blocks = self._zones(params)
        shares, classes = self._nodes in active, [i for i in active if i != self._nodes]
        values = {n: x.data_ptr() if isinstance(x, torch.Tensor) else x for n, x in lengths.items()} | struct_values(params) | zones
        values |= loaded.plan_lists(self._space, self._base, classes, shares)
        values |= {
            "num_heads": facts.num_heads, "num_kv_heads": facts.num_kv_heads, "head_offset": facts.head_offset,
            "total_heads": facts.total_heads, "max_q_tokens": facts.max_q_tokens,
            "max_kv_len": min(facts.max_kv_len, I32_MAX),
        }  # fmt: skip
        planners = [(loaded.plan, loaded.plan.template(values), loaded.blocks + zone_blocks)]
        if shares:
            assert loaded.share is not None and page_table is not None
            found = {**values, **loaded.shared_lists(self._space, self._base), "page_table": page_table.data_ptr(), "group": facts.group}
            found["groups"] = shared.data_ptr() if isinstance(shared, torch.Tensor) else 0
            found["least_gain"] = _LEAST_GAIN // (2 * (facts.head_dim + facts.head_dim_v) * facts.num_kv_heads)
            found["most_rows"] = max(k.config.block_m for k in (loaded.kernels.classes[i] for i in classes) if k.name == "decode")
            found["window"] = self._window(params)
            planners.insert(0, (loaded.share, loaded.share.template(found), loaded.share.special.config.blocks))
        return planners

    def _window(self, params: Mapping[str, Any]) -> int:
        """About how many keys a row reaches, up to its own: what prefixes save is counted in them. All, where only the device knows."""
        mask, values = self.facts.variant.trace.mask, tuple(params.items())
        if mask is None or any(isinstance(x, torch.Tensor) for x in params.values()):
            return I32_MAX
        if values not in self._windows:
            from .bounds import analyse
            from .lengths import Reach, Request

            facts, far = self.facts, 1 << 28
            reach = Reach(analyse(mask), params, facts.num_heads, facts.num_kv_heads, facts.head_offset, facts.total_heads)
            reached = []
            for q in (far - 1, far, far + 4097, far + 100_003):  # chunks begin anywhere
                slots = reach.span(0, Request(0, 1, q + 1, 0, q, 0, 0), q, q)
                reached.append(q + 1 - (slots.gap_end if slots.gap_begin < slots.gap_end else slots.begin))
            self._windows[values] = max(reached) if max(reached) < far // 2 else I32_MAX
        return self._windows[values]

    def _zones(self, params: Mapping[str, Any]) -> tuple[dict[str, int], int]:
        return zone_values(self._loaded.zones, [(self._base + at, room) for at, room in self._space.zones], params)

    def _bound(
        self, page_table: torch.Tensor | None, params: Mapping[str, Any], active: Sequence[int], tables: tuple[Any, ...] = ()
    ) -> dict[str, Any]:
        """What a plan decides of the classes' structs."""
        bound = struct_values(params) | self._zones(params)[0]
        if self._nodes in active:
            bound |= self._loaded.shared_lists(self._space, self._base)
        if page_table is not None:
            bound["page_table"] = page_table.data_ptr()
        if tables:
            bound["rope_table"] = tables[1].data_ptr()
        if self._rope is not None:
            bound["rope_inv_freq"] = (tables[0] if tables else self._inv_freq).data_ptr()
        return bound

    def _decided_by_plan(self, launcher: Launcher) -> list[tuple[str, struct.Struct, int]]:
        """Name, code and offset of the fields of a class's struct that a plan decides."""
        names = {"page_table", "rope_table", "rope_inv_freq"}
        names |= {f"{x}_{zone.name}" for zone in self._loaded.zones for x in ("zones", "zone_count")}
        names |= set(self._loaded.shared_lists(self._space, self._base)) if self._space.shared else set()
        for n in self._plan_names:
            axes = range(len(self._fields[n].axes)) if self._fields[n].kind == "tensor" else ()
            names |= {f"param_{n}", f"at_{n}", *(f"{x}{i}_{n}" for i in axes for x in ("stride", "size"))}
        return [(n, *slot) for n, slot in launcher.slots.items() if n in names]

    def _shares(self, shared: str | torch.Tensor, lengths: Mapping[str, Any], page_table: torch.Tensor | None) -> bool:
        """Whether prefixes are looked for: not where the whole page table is of fewer bytes than they must save."""
        if isinstance(shared, torch.Tensor):
            return 1 < lengths["num_requests"]
        facts = self.facts
        if shared == "off" or page_table is None or lengths["num_requests"] < 2:
            return False
        keys = page_table.numel() * lengths["page_size"] * facts.num_kv_heads * 2 * (facts.head_dim + facts.head_dim_v)
        return keys > _LEAST_GAIN

    # ---- run
    def launch(
        self, plan: Plan, site: Site, q_at: int, k_at: int, v_at: int, out: torch.Tensor, lse: torch.Tensor | None,
        params: Mapping[str, Any], partial: bool = False,
    ) -> None:  # fmt: skip
        """The planned batch, on the current stream; q_at, k_at, v_at: addresses. ``params``: checked values of the fields that the mask does not read;
        ``partial`` as BatchAttention.run."""
        if not self.calls.owns():
            raise ParameterError(
                "another object has planned since in the workspace that both use: plan again before run, or give each its own"
            )
        bound = plan.bound
        if bound is None:
            given, planned = self.calls.held
            table = next((given[i] for i in TABLES if given[i] is not None), None)
            bound = self._bound(table, dict(zip(self._plan_names, planned)), plan.active)
        bound = bound | struct_values(params) | {"partial": partial, "ran": self.calls.ran}
        pointers = (q_at, k_at, v_at, out.data_ptr(), 0 if lse is None else lse.data_ptr())
        stream = cuda.current_stream(self.facts.device.index)
        for i in plan.active:
            image, boxes = self._image(i, site)
            buffer = bytearray(image)
            values = bound if boxes is None else bound | boxes.maps(q_at, k_at, v_at)
            POINTERS.pack_into(buffer, 0, *pointers)
            self._loaded.classes[i].launch(buffer, values, self._loaded.workers[i], stream)
        self.calls.set_ran()

    def _image(self, i: int, site: Site) -> tuple[bytes, Boxes | None]:
        """A class's parameter struct, but for pointers and what plan and the parameters of run decide; how the copy engine sees the
        site."""
        found = self._images.get((site, i))
        if found is None:
            if len(self._images) >= 1024:
                self._images.clear()
            facts, launcher = self.facts, self._loaded.classes[i]
            values = {
                **site.strides, **self._loaded.lists(i, self._space, self._base), "num_heads": facts.num_heads,
                "num_kv_heads": facts.num_kv_heads, "head_offset": facts.head_offset, "total_heads": facts.total_heads,
                "page_size": facts.page_size or 1, "scale": facts.scale,
                "rope_mscale": 1.0 if self._rope is None else self._rope.mscale,
            }  # fmt: skip
            boxes = launcher.boxes(values)
            if boxes is not None:
                values |= boxes.fields
            if i == self._nodes:
                lists = self._loaded.shared_lists(self._space, self._base)
                values |= {"partial_out": lists["node_out"], "partial_state": lists["node_state"], "q_boxes": 0}
            found = self._images[site, i] = launcher.template(values), boxes
        return found

    # ---- calls that repeat
    def remember_plan(
        self, given: Sequence[torch.Tensor | None], options: tuple[Any, ...], lengths: Mapping[str, Any], params: Mapping[str, Any],
        plan: Plan, shared: str | torch.Tensor, rows: int, top_page: int, result: Any,
    ) -> None:  # fmt: skip
        """That ``plan`` was made. ``given``: plan's tensors, if all are where the kernels read them: then ``calls.plan`` makes others like
        it, with equal ``options`` and with ``result``."""
        assert plan.bound is not None
        place, write = host().Place, host().Write
        writes = [write(i, offset, code.pack(plan.bound.get(n, 0))) for i in plan.active for n, code, offset in self._decided[i]]
        self.calls.planned(writes, plan.active, rows, lengths["num_requests"], top_page, plan.held)
        if not given or not plan.active or self._rope is not None and self._rope.needs_kv_lens:
            return
        if self._nodes in plan.active and not all(isinstance(x, torch.Tensor) for x in params.values()):
            return  # another number may be another window
        page_table = next((given[i] for i in TABLES if given[i] is not None), None)
        planners = self._planners(lengths, page_table, params, plan.active, shared)
        structs = {i: self._loaded.classes[i].slots for i in plan.active}
        structs |= {-1 - i: launcher.slots for i, (launcher, *_) in enumerate(planners)}
        names = [*("page_table" if n is None else n for n in PLANNED), *map(param_field, params, params.values())]
        places = [[place(i, slots[n][1]) for i, slots in structs.items() if n in slots] for n in names]
        launches = [(launcher.kernel, image, blocks) for launcher, image, blocks in planners]
        self.calls.add_plan(tuple(given), options, tuple(params.values()), places, self._floats(len(given), params), launches, writes,
                            plan.active, rows, lengths["num_requests"], result)  # fmt: skip

    def remember_run(
        self, site: Site, q: torch.Tensor, kv: Any, given_out: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor | None,
        return_lse: bool, partial: bool, params: Mapping[str, Any], requests: int,
    ) -> None:  # fmt: skip
        """That a run was good: ``calls.run`` makes others like it. ``requests``: that a plan must have, or -1."""
        classes, fixed = [], struct_values(params) | {"partial": partial}
        for i, launcher in self._loaded.classes.items():
            try:
                image, boxes = self._image(i, site)
            except ParameterError:  # the copy engine does not read such tensors, and no plan has asked for it yet
                continue
            buffer, slots = bytearray(image), launcher.slots
            launcher.fill(buffer, fixed)
            maps_at = -1 if boxes is None else slots["q_map"][1]
            classes.append((i, launcher.kernel, bytes(buffer), self._loaded.workers[i], slots["ran"][1], maps_at,
                            None if boxes is None else boxes.packed))  # fmt: skip
        names = [*map(param_field, params, params.values())]
        places = [[host().Place(i, x.slots[n][1]) for i, x in self._loaded.classes.items() if n in x.slots] for n in names]
        self.calls.add_run(q, kv, given_out, return_lse, partial, tuple(params.values()), places, self._floats(0, params), tuple(out.shape),
                           None if lse is None else tuple(lse.shape), out.dtype, site.second, (*site.extents, out.nbytes),
                           site.strides["num_pages"], requests, classes)  # fmt: skip

    def _floats(self, before: int, params: Mapping[str, Any]) -> list[bool]:
        return [False] * before + [self._fields[n].dtype == F32 for n in params]

    def status(self) -> Status:
        """Waits for the device; what it found wrong since the last call."""
        status = Status.of(self._status.tolist())
        if status:
            self._status.zero_()
        return status


# ---------------------------------------------------------------- struct fields


def param_field(name: str, value: Any) -> str:
    """The struct field that takes a parameter's value or address."""
    return f"at_{name}" if isinstance(value, torch.Tensor) and value.dim() == 0 else f"param_{name}"


def struct_values(params: Mapping[str, Any]) -> dict[str, Any]:
    """The struct fields of checked parameter values."""
    values: dict[str, Any] = {}
    for name, value in params.items():
        values[param_field(name, value)] = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(value, torch.Tensor):
            for i, (stride, size) in enumerate(zip(value.stride(), value.shape)):
                values[f"stride{i}_{name}"], values[f"size{i}_{name}"] = stride, size
    return values


def rope_tables(rope: Any, head_dim: int, lengths: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE's tables and each request's row of them, by its length; on the lengths' device."""
    if (lens := lengths.get("kv_lens")) is None:
        lens = lengths["kv_indptr"].diff()
        if (last := lengths.get("kv_last_page_len")) is not None:
            lens = ((lens - 1) * lengths["page_size"] + last).clamp(min=0)
    if (dropped := lengths.get("kv_starts")) is not None:
        lens = lens + dropped
    inv_freq, table = rope.tables(head_dim, lens)
    return inv_freq.contiguous(), table.int().contiguous()
