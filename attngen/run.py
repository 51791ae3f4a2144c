"""The conductor: a call travels variant -> nodes -> config -> source -> artifact -> kernel -> launch."""

from __future__ import annotations

import gc
import hashlib
import os
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import cache, pins, tuned
from .abi import BASE_FIELDS, LAUNCH_ABI, Layout, layout
from .devices import as_device, cuda_index
from .errors import CacheError, ParameterError, UnsupportedError
from .fields import STORAGE
from .isa import host_isa
from .library import NO_GRAD, NOT_IN_GRAPHS, PARAMETERS, define, operands, parameters, traced_variant, variant_of
from .load import LoadedKernel, host, load_kept
from .ops import F32
from .params import (
    DTYPE_NAMES,
    check_dtype,
    check_free_axes,
    check_scalar,
    check_unknown,
    free_axes,
    int_list,
    scale_of,
    storage_message,
    stored_in,
    value_of,
)
from .paths import PACKAGE, templates_dir
from .shape import Shape, check_made_for, memory
from .spec import Bare, Problem, Variant, as_variant

if TYPE_CHECKING:
    from .choose import Choice

FORMAT = 1  # of the key; a change voids every cached kernel
DEBUG = os.environ.get("ATTNGEN_DEBUG", "0") not in ("", "0")  # the ladder of debug.py
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The rooms whose text decides what a kernel's source says.
_COMPILER_ROOMS = ("ops", "expr", "bounds", "classes", "columns", "trace", "rope", "fields", "spec", "abi", "choose", "emit", "render", "build")


# ---------------------------------------------------------------- compiling


class BuildRecord(NamedTuple):
    """One kernel that this process asked for: whether it was in the cache, and what it cost."""

    key: str
    variant: str
    problem: Problem
    hit: bool
    build_seconds: float  # rendering, compiling and publishing; 0 for a hit
    load_seconds: float


class Kernel:
    """A compiled, loaded kernel.

    Attributes:
        variant: the variant it was compiled for (its structure; values are run-time arguments).
        problem, config: the compile-time facts and the chosen configuration, printable.
        spec_hash: the cache key: nodes, problem, config, flags, CPU features, templates and compiler sources.
        path: the artifact in the cache.
    """

    def __init__(
        self, variant: Variant, problem: Problem, choice: Choice, key: str, struct_layout: Layout, loaded: LoadedKernel
    ) -> None:
        self.variant, self.problem, self.choice, self.spec_hash = variant, problem, choice, key
        self.layout, self.loaded = struct_layout, loaded
        self.launch: Callable[[Any], None] = loaded.launch

    @property
    def config(self) -> Any:
        return self.choice.config

    @property
    def path(self) -> Any:
        return self.loaded.entry.artifact

    @property
    def source(self) -> str:
        """The rendered main file, as it was compiled. It is yours to use under any terms."""
        return next(text for name, text in self.loaded.entry.sources().items() if name.endswith((".cpp", ".cu")))

    def __repr__(self) -> str:
        p = self.problem
        return f"Kernel({self.variant.name}, {p.q_dtype}, head_dim={p.head_dim}/{p.head_dim_v}, {p.isa}, {self.spec_hash[:12]})"


_kernels: dict[tuple[Any, ...], Kernel] = {}
_records: list[BuildRecord] = []  # appending and copying are atomic


def record_build(record: BuildRecord) -> None:
    """Add to the log."""
    _records.append(record)


def build_log() -> list[BuildRecord]:
    """What this process compiled or found in the cache, in order."""
    return list(_records)


def compile(  # noqa: A001
    variant: Variant | type[Variant],
    *,
    dtype: torch.dtype | None = None,
    head_dim: int = 64,
    head_dim_v: int | None = None,
    storage: Mapping[str, torch.dtype] | None = None,
    isa: str | None = None,
    device: torch.device | str | None = None,
    arch: str | None = None,
    paged: bool | None = None,
    batch_invariant: bool = False,
    shared_prefix: bool = False,
) -> Any:
    """Compile ``variant`` for the CPU, or find it in the cache, and load it: a ``Kernel``.

    With device="cuda" or arch=: build what the variant needs on a GPU, where it is not in the cache, and load nothing; no GPU
    is needed. Returns a list of kernels, each with ``name, config, spec_hash, path, source``: those of every row-tile class
    and the planner, which ``BatchAttention`` and ``attention`` find there.

    Args:
        dtype: of q, k, v and the output: float32 (the default on the CPU), bfloat16 (the default on CUDA) or float16.
        head_dim, head_dim_v: multiples of 8 up to 256, on CUDA of 16 from 32; head_dim_v defaults to head_dim.
        device: "cpu", the default, or a CUDA device.
        arch: a GPU architecture such as "sm_90a" or "9.0a"; default that of ``device``, or of the current CUDA device.
        paged: CUDA: caches of pages alone, or contiguous keys alone; default both.
        batch_invariant: CUDA: the kernels of ``BatchAttention(batch_invariant=True)`` instead.
        shared_prefix: CUDA: the kernels of ``BatchAttention(shared_prefix=True)`` instead.
        storage: stored dtype of tensor parameters, by name; defaults to that of a bound tensor, else float32, int32 or
            bool by the field's type.
        isa: CPU features to compile for; defaults to this host's best.

    Raises:
        UnsupportedError, VariantError, BuildError, CacheError, LoadError.
    """
    variant = as_variant(variant)
    stored = stored_dtypes(variant, storage)
    named = as_device(device or ("cuda" if arch else "cpu"))
    on = named.type
    if on == "cpu" and not (arch or paged is not None or batch_invariant or shared_prefix):
        return kernel_for(variant, problem_for(dtype or torch.float32, head_dim, head_dim_v or head_dim, stored, isa))
    if on not in device_compilers or isa:
        raise ParameterError(
            f"compile for {on!r}: isa belongs to the CPU; arch, paged, batch_invariant and shared_prefix belong to CUDA (device=\"cuda\" or arch=)"
        )
    with nullcontext() if arch else torch.cuda.device(cuda_index(named, "give arch=, such as '9.0a'")):
        return device_compilers[on](
            variant, arch=arch, dtype=dtype or torch.bfloat16, head_dim=head_dim, head_dim_v=head_dim_v or head_dim, storage=stored,
            paged=paged, batch_invariant=batch_invariant, shared_prefix=shared_prefix,
        )  # fmt: skip


def stored_dtypes(variant: Variant, storage: Mapping[str, torch.dtype] | None) -> dict[str, str]:
    """The stored dtype of each tensor parameter in use: as given, else of a bound tensor, else the field's own."""
    stored = {}
    tensors = [name for name, f in variant.trace.fields.items() if f.kind == "tensor"]
    for name in storage or ():
        if name not in tensors:
            raise ParameterError(f"storage of `{name}`: {variant.name} has the tensor fields {', '.join(tensors) or 'none'}")
    for name, f in variant.trace.used().items():
        if f.kind == "tensor":
            bound = variant.values.get(name)
            chosen = (storage or {}).get(name) or (bound.dtype if bound is not None else f.stored or STORAGE[f.dtype][0])
            if chosen not in STORAGE[f.dtype]:
                raise ParameterError(storage_message(variant, name, f.dtype, chosen))
            stored[name] = DTYPE_NAMES[chosen]
    return stored


def problem_for(
    dtype: torch.dtype, head_dim: int, head_dim_v: int, storage: Mapping[str, str], isa: str | None = None
) -> Problem:
    """The Problem of a call, or UnsupportedError."""
    check_dtype(dtype)
    if dtype not in _FLOATS:
        raise UnsupportedError(f"dtype {dtype}: q, k and v are torch.float32, torch.bfloat16 or torch.float16; cast them")
    for name, size in (("head_dim", head_dim), ("head_dim_v", head_dim_v)):
        if size % 8 or not 8 <= size <= 256:
            raise UnsupportedError(
                f"{name} {size}: the CPU kernels take multiples of 8 from 8 to 256; pad q and k (and v) with zeros, and "
                f"pass scale= for the unpadded size"
            )
    name = DTYPE_NAMES[dtype]
    return Problem("cpu", isa or host_isa(), name, name, name, head_dim, head_dim_v, tuple(sorted(storage.items())))


def kernel_for(variant: Variant, problem: Problem) -> Kernel:
    """The CPU kernel of ``variant`` for ``problem``: of this process, from the cache, or compiled now."""
    trace = variant.trace
    memo = (trace.key(problem.head_dim), problem, *tuned.state())
    kernel = _kernels.get(memo)
    if kernel is None:
        with collector_paused():
            kernel = _kernels[memo] = _compile_uncached(variant, problem)
    return kernel


@contextmanager
def collector_paused() -> Iterator[None]:
    """Without cyclic garbage collection: rendering allocates enough to set off a full one, 90 ms over torch's heap."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def specialise(variant: Variant, problem: Problem) -> tuple[Any, Choice, Layout, tuple[str, ...], str]:
    """Everything before rendering: holes, config, parameter struct, compiler flags and the key."""
    from .choose import choose_cpu, cpu_flags
    from .emit import emit

    trace = variant.trace
    storage = dict(problem.storage)
    hooks = emit(trace, storage, problem.head_dim)
    structure, sources = trace.key(problem.head_dim), compiler_digest()
    prefer = tuned.preference(structure, problem, "attention", "any", sources)
    choice = choose_cpu(problem, problem.isa, hooks, prefer)
    struct_layout = layout(trace.used(), storage)
    flags = tuple(cpu_flags(problem.isa))
    facts = (FORMAT, LAUNCH_ABI, structure, problem, repr(choice.config), flags, sources)
    return hooks, choice, struct_layout, flags, hashlib.sha256(repr(facts).encode()).hexdigest()


@lru_cache(maxsize=1)
def compiler_digest() -> str:
    """Digest of the templates and of the compiler rooms' sources."""
    rooms = [PACKAGE / f"{room}.py" for room in _COMPILER_ROOMS]
    return cache.sources_digest(templates_dir() / "cpu", templates_dir() / "shared", *rooms)


def build_artifact(
    key: str, recipe: Callable[[], Any], render: Callable[[], dict[str, str]], described: Callable[[], Mapping[str, Any]], title: str
) -> tuple[cache.Entry, bool]:  # fmt: skip
    """The artifact of ``key``: from the cache, or rendered and compiled now; and whether it was there.

    ``render`` makes the source files; ``described`` the manifest's own fields, ``inputs`` among them: what went into the key.
    """
    store = cache.default()

    def build(folder: Path) -> dict[str, Any]:
        from .build import compile_kernel
        from .render import locate

        files = render()
        result = compile_kernel(
            files, recipe(), folder, locate=lambda file, line: locate(files, file, line), keep_failed=store.failed(key)
        )
        return {
            **described(), "artifact": result.artifact.name, "sources": list(files), "compiler": result.compiler,
            "seconds": result.seconds, "cpu_seconds": result.cpu_seconds, "spec_hash": key,
        }  # fmt: skip

    return store.get_or_build(key, build, title=title, inputs=lambda: described()["inputs"])


def describe(struct_layout: Layout) -> list[list[Any]]:
    """A parameter struct for a manifest."""
    return [[f.ctype, f.name, f.offset] for f in struct_layout.fields]


def _compile_uncached(variant: Variant, problem: Problem) -> Kernel:
    pinned = pins.pinned_cpu(variant.trace.key(problem.head_dim), problem)
    if pinned is not None:
        from .choose import Choice

        choice = Choice(pins.restore_config(pinned.manifest.get("choice"), pinned.folder), ())
        key, struct_layout, entry, hit, seconds = pinned.key, _pinned_layout(variant, problem, pinned), pinned, True, 0.0
    else:
        choice, key, struct_layout, entry, hit, seconds = build_cpu(variant, problem)
    host()  # once a process; not the kernel's own time
    loading = time.perf_counter()
    loaded = load_kept(entry, lambda: pinned or build_cpu(variant, problem)[3])
    record_build(BuildRecord(key, variant.name, problem, hit, seconds, time.perf_counter() - loading))
    if DEBUG:
        from . import debug

        debug.show(entry, hit, seconds, None, choice)
    return Kernel(variant, problem, choice, key, struct_layout, loaded)


def _pinned_layout(variant: Variant, problem: Problem, entry: cache.Entry) -> Layout:
    struct_layout = layout(variant.trace.used(), dict(problem.storage))
    if describe(struct_layout) != [list(field) for field in entry.manifest.get("params", ())]:
        raise CacheError(
            f"a kernel of another release, which this one cannot launch: {entry.folder}\n  required: the parameter struct of "
            f"{LAUNCH_ABI}\n  found: other fields\n  do: build the set again with `attngen precompile`"
        )
    return struct_layout


def build_cpu(variant: Variant, problem: Problem) -> tuple[Choice, str, Layout, cache.Entry, bool, float]:
    """The CPU kernel of ``variant`` for ``problem``, in the cache and not loaded: its choice, key, parameter struct and entry,
    whether it was there, and the seconds of its build. Any ``problem.isa``, whatever this machine has."""
    hooks, choice, struct_layout, flags, key = specialise(variant, problem)
    start = time.perf_counter()

    def recipe() -> Any:
        from .build import Recipe
        from .render import MAIN

        return Recipe("cpu", (MAIN,), flags, ("-fopenmp",))

    def render() -> dict[str, str]:
        from .render import render_cpu

        return render_cpu(hooks, choice.config, struct_layout, problem, variant.name)

    def described() -> dict[str, Any]:
        rooms = [PACKAGE / f"{room}.py" for room in _COMPILER_ROOMS]
        return {
            "kind": "cpu", "name": "attention", "abi": LAUNCH_ABI, "flags": list(flags), "variant": variant.name,
            "isa": problem.isa, "problem": problem.__dict__, "config": repr(choice.config), "params": describe(struct_layout),
            "choice": pins.config_record(choice.config),
            "inputs": key_inputs("cpu", "attention", LAUNCH_ABI, variant.trace, problem, str(choice.config), flags,
                                 templates_dir() / "cpu", templates_dir() / "shared", *rooms),
        }  # fmt: skip

    entry, hit = build_artifact(key, recipe, render, described, f"{variant.name} {problem.q_dtype} head_dim {problem.head_dim}")
    return choice, key, struct_layout, entry, hit, 0.0 if hit else time.perf_counter() - start


def key_inputs(
    backend: str, name: str, abi: str, trace: Any, problem: Problem | None, config: str, flags: Sequence[str], *sources: Path
) -> dict[str, Any]:
    """What went into a key, by name, for people who ask why it changed (explain.py)."""
    from .entry import short_digests

    facts = {} if problem is None else {name: value for name, value in problem.__dict__.items() if name != "storage"}
    return {
        "backend": backend, "kernel": name, "format": FORMAT, "abi": abi,
        "structure": trace.key(problem.head_dim if problem else None) if trace else "",
        "hooks": {n: str(node) for n, node in trace.roots().items()} if trace else {}, "problem": facts,
        "storage": dict(problem.storage) if problem else {}, "config": config, "flags": " ".join(flags),
        "sources": short_digests(*sources),
    }  # fmt: skip


# ---------------------------------------------------------------- calling


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    variant: Variant | type[Variant] | None = None,
    *,
    layout: str = "bshd",
    q_lens: torch.Tensor | Sequence[int] | None = None,
    kv_lens: torch.Tensor | Sequence[int] | None = None,
    q_offset: torch.Tensor | Sequence[int] | int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    **params: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of ``variant`` over dense q, k, v, on the CPU or a CUDA device. The kernel is compiled at the first call and
    kept.

    Args:
        q: ``[batch, q_len, num_heads, head_dim]`` ("bshd") or ``[batch, num_heads, q_len, head_dim]`` ("bhsd").
        k, v: the same with kv_len and num_kv_heads (which divides num_heads); v may have another head_dim. float32,
            bfloat16 or float16, all of one dtype; any strides, the last dimension contiguous. CUDA: bfloat16 or float16,
            strides that are multiples of 8.
        variant: an ``attngen.Variant`` or its class; None attends everywhere.
        q_lens, kv_lens: ``[batch]`` ints: how many leading rows of q, and of k and v, each request uses. Unused k and v
            slots may hold anything; unused rows of the output are 0 (LSE -inf).
        q_offset: position of a request's first query, an int or ``[batch]`` ints; by default the variant's, else
            kv_len - q_len, so that the last query lines up with the last key.
        scale: of the logits; default the variant's, else head_dim ** -0.5.
        return_lse: also return the natural-log sum of exponentials (sink included), float32 ``[batch, num_heads, q_len]``.
        out: written and returned, if given.
        **params: values of the variant's Scalar and Tensor fields, by name.

    On CUDA the call runs on the current stream, copies nothing to the host and never waits. q_lens, kv_lens and q_offset may
    lie on the device, and a Scalar may be a 0-dim tensor there; a length that only the device sees and that is out of range
    leaves NaN in the request's rows. A call may be captured in a CUDA graph once its kernel is loaded: call it before; a
    replay reads lengths and Scalars anew that lie on the device.

    Returns:
        ``out`` in q's dtype, layout and leading shape, or ``(out, lse)``. A fully masked row is 0 with LSE -inf (or the
        sink).

    Raises:
        ParameterError: an argument is missing, unknown, ill-typed or ill-shaped.
        UnsupportedError: no kernel can serve the call.
    """
    if torch.is_grad_enabled() and any(getattr(t, "requires_grad", False) for t in (q, k, v)):
        raise UnsupportedError(NO_GRAD)
    if is_compiling() and type(variant) is not Bare:  # that is the operator's own call
        return _traced_attention(q, k, v, variant, layout, q_lens, kv_lens, q_offset, scale, return_lse, out, params)
    variant = _FULL if variant is None else as_variant(variant)
    if return_lse and variant.trace.weight is not None:
        raise UnsupportedError(f"return_lse with {variant.name}: its weight hook replaces softmax, so there is no LSE")
    q, k, v = _plain(q), _plain(k), _plain(v)
    site = _site(variant, q, k, v, layout, params)
    if q_offset is None and variant.q_offset is not None:
        q_offset = _own_offset(variant, site, q_lens is None and kv_lens is None)
    if site.call is not None:
        return site.call(q, k, v, q_lens, kv_lens, q_offset, scale, return_lse, out, params)
    result = site.output(q) if out is None else site.check_out(q, k, v, out)
    lse = torch.empty(site.lse_shape, dtype=torch.float32, device="cpu") if return_lse else None
    buffer = bytearray(site.template)
    _POINTERS.pack_into(
        buffer, 0, q.data_ptr(), k.data_ptr(), v.data_ptr(), result.data_ptr(), 0 if lse is None else lse.data_ptr()
    )
    factor = site.scale if scale is None else scale_of(variant, scale, site.head_dim)
    _THREADS.pack_into(buffer, _THREADS_OFFSET, torch.get_num_threads(), factor)
    held: list[torch.Tensor] = []  # alive through the launch
    longest = site.kv_len if site.batch else 0
    if q_lens is not None or kv_lens is not None or q_offset is not None or site.rope_needs_lens:
        longest = site.bind_lengths(buffer, q_lens, kv_lens, q_offset, held)
    if site.params:
        site.bind(buffer, params, longest, held)
        if out is not None and any(memory(t) == memory(out) for t in held):
            raise ParameterError("out shares memory with a parameter: give another tensor")
    if result.numel():
        if not (q.data_ptr() and (k.data_ptr() and v.data_ptr() or not k.numel())):
            raise UnsupportedError("q, k or v has no memory (a fake tensor?): attngen.attention runs on real tensors only")
        site.kernel.launch(buffer)
    return result if lse is None else (result, lse)


def _own_offset(variant: Variant, shape: Shape, whole: bool) -> Any:
    """The variant's q_offset; None where that says the same and costs less."""
    given = variant.q_offset
    return None if whole and isinstance(given, int) and given == shape.kv_len - shape.q_len else given


# ---------------------------------------------------------------- under torch.compile


def _traced_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, variant: Any, layout: str, q_lens: Any, kv_lens: Any, q_offset: Any,
    scale: float | None, return_lse: bool, out: torch.Tensor | None, params: Mapping[str, Any],
) -> Any:  # fmt: skip
    """What Dynamo traces of ``attention``."""
    variant = _FULL if variant is None else traced_variant(variant)
    bare = variant._bare
    q_offset = variant.q_offset if q_offset is None else q_offset
    if variant._made_for is not None:
        seq, head = (1, 2) if layout == "bshd" else (2, 1)
        check_made_for(variant, q.shape[0], q.shape[head], q.shape[seq], k.shape[seq])
    lengths = [_traced_ints(name, x, q) for name, x in (("q_lens", q_lens), ("kv_lens", kv_lens), ("q_offset", q_offset))]
    inputs = (q, k, v, *lengths, *operands(variant, bare.reads, params), bare.handle, layout, scale, return_lse)
    if out is None:
        out, lse = _attention_op(*inputs)
    else:
        if out.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError("out requires grad, and attngen has no backward yet: detach it")
        lse = _attention_out_op(*inputs, out)
    return (out, lse) if return_lse else out


def _traced_ints(name: str, given: Any, q: torch.Tensor) -> torch.Tensor | None:
    """q_lens, kv_lens or q_offset as a tensor, so that a new value is no new graph."""
    if given is None or isinstance(given, torch.Tensor):
        return given
    if name == "q_offset" and isinstance(given, (int, torch.SymInt)) and not isinstance(given, bool):
        return torch.full((q.shape[0],), given, dtype=torch.int64, device="cpu")
    return torch.tensor(int_list(name, given, q.shape[0]), dtype=torch.int64, device="cpu")


def _run_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_lens: Any, kv_lens: Any, q_offset: Any, tensors: Any, ints: Any,
    names: Any, variant: str, layout: str, scale: float | None, return_lse: bool, out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    result = attention(
        q, k, v, variant_of(variant), layout=layout, q_lens=q_lens, kv_lens=kv_lens, q_offset=q_offset, scale=scale,
        return_lse=return_lse, out=out, **parameters(tensors, ints, names),
    )  # fmt: skip
    return result if return_lse else (result, q.new_empty(0, dtype=torch.float32))


def _fake_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_lens: Any, kv_lens: Any, q_offset: Any, tensors: Any, ints: Any,
    names: Any, variant: str, layout: str, scale: float | None, return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    declared, params = variant_of(variant), dict(zip(names, (*tensors, *ints)))
    check_unknown(declared, params)
    for name in declared.reads:
        value_of(declared, name, params)
    shape = _AnyShape(declared, q, k, v, layout)
    lse = (shape.batch, shape.num_heads, shape.q_len) if return_lse else 0
    return q.new_empty((*q.shape[:3], shape.head_dim_v)), q.new_empty(lse, dtype=torch.float32)


def _run_attention_out(*arguments: Any) -> torch.Tensor:
    *inputs, out = arguments
    return _run_attention(*inputs, out=out)[1]


def _fake_attention_out(*arguments: Any) -> torch.Tensor:
    *inputs, out = arguments
    wanted, lse = _fake_attention(*inputs)
    if out.shape != wanted.shape or out.dtype != wanted.dtype:
        raise ParameterError(f"out is {tuple(out.shape)} {out.dtype}: required {tuple(wanted.shape)} {wanted.dtype}")
    return lse


_INPUTS = (
    f"Tensor q, Tensor k, Tensor v, Tensor? q_lens, Tensor? kv_lens, Tensor? q_offset, {PARAMETERS}, "
    "str variant, str layout, float? scale, bool return_lse"
)
_attention_op = define(
    "attention", f"({_INPUTS}) -> (Tensor out, Tensor lse)", _run_attention, _fake_attention, *NOT_IN_GRAPHS
)
_attention_out_op = define(
    "attention_out", f"({_INPUTS}, Tensor(a!) out) -> Tensor lse", _run_attention_out, _fake_attention_out, *NOT_IN_GRAPHS
)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    variant: Variant | type[Variant] | None = None,
    *,
    layout: str = "bshd",
    q_lens: torch.Tensor | Sequence[int] | None = None,
    kv_lens: torch.Tensor | Sequence[int] | None = None,
    q_offset: torch.Tensor | Sequence[int] | int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    **params: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The oracle: what ``attention`` means, computed with torch on the whole matrix in float64. Same arguments; returns
    float64."""
    from .interp import reference_attention

    variant = _FULL if variant is None else as_variant(variant)
    shape = Shape(variant, q, k, v, layout)
    lens_q, lens_kv, offsets = shape.lengths(q_lens, kv_lens, variant.q_offset if q_offset is None else q_offset)
    values = {}
    for name, f in variant.trace.used().items():
        value = value_of(variant, name, params)
        values[name] = shape.check_tensor(name, value, max(lens_kv, default=0)) if f.kind == "tensor" else check_scalar(variant, name, value)
    check_unknown(variant, params)
    check_free_axes(variant.trace.fields, values, free_axes(variant))
    order = (0, 2, 1, 3) if layout == "bhsd" else (0, 1, 2, 3)
    with torch.device("cpu"):  # whatever the default device is
        out, lse = reference_attention(
            variant.trace, q.permute(order), k.permute(order), v.permute(order), q_lens=lens_q, kv_lens=lens_kv,
            q_offsets=offsets, scale=scale_of(variant, scale, shape.head_dim), params=values,
        )  # fmt: skip
    out = out.permute(order)
    if not return_lse:
        return out
    if lse is None:
        raise UnsupportedError(f"return_lse with {variant.name}: its weight hook replaces softmax, so there is no LSE")
    return out, lse


def _plain(t: Any) -> Any:
    """A tensor whose memory holds its values: lazy negation is carried out, forward-mode derivatives are refused."""
    if isinstance(t, torch.Tensor):
        if t.is_neg():
            t = t.resolve_neg()
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None:
            raise UnsupportedError("an input carries a forward-mode derivative, and attngen has none yet: pass its primal")
    return t


_FULL = Variant()
_POINTERS = struct.Struct("=5Q")
_BASE = Layout(BASE_FIELDS)
_THREADS = struct.Struct("=if")  # threads and scale are neighbours
_THREADS_OFFSET = _BASE.fields[_BASE.index["threads"]].offset
assert _BASE.fields[_BASE.index["scale"]].offset == _THREADS_OFFSET + 4
_ZERO = torch.zeros(8, dtype=torch.int64, device="cpu")  # what an empty tensor parameter points to: element 0 must be readable


class _AnyShape(Shape):
    device_types = ("cpu", "cuda")


class _Site(Shape):
    """A call site on the CPU: everything about a call that depends only on dtypes, shapes, strides and the variant."""

    call = None  # sites of other devices do the rest of the call themselves

    def __init__(self, variant: Variant, q: Any, k: Any, v: Any, layout: str, storage: Mapping[str, str]) -> None:
        super().__init__(variant, q, k, v, layout)
        trace = variant.trace
        problem = problem_for(q.dtype, self.head_dim, self.head_dim_v, storage)
        self.kernel = kernel_for(variant, problem)
        self.params = dict(trace.used())
        self.scale = scale_of(variant, None, self.head_dim)
        self.lse_shape = (self.batch, self.num_heads, self.q_len)
        self.free_axes = free_axes(variant)
        self.out_shape = (*q.shape[:3], self.head_dim_v)
        fields = self.kernel.layout
        self.offsets = {f.name: f.offset for f in fields.fields}
        rope = trace.rope.rope if trace.rope else None
        self.rope_needs_lens = rope is not None and rope.needs_kv_lens
        self.rope = rope
        inv_freq = None
        if rope is not None and not self.rope_needs_lens:
            with torch.device("cpu"):
                inv_freq = rope.inv_freq(self.head_dim).contiguous()
        self._keep = inv_freq
        out = torch.empty(self.out_shape, dtype=q.dtype, device="meta")
        strides = {
            f"{n}_stride_{d}": t.stride(i)
            for n, t in (("q", q), ("k", k), ("v", v), ("out", out))
            for d, i in (("b", 0), ("s", self.seq), ("h", self.head))
        }
        strides |= {"lse_stride_b": self.num_heads * self.q_len, "lse_stride_h": self.q_len, "lse_stride_s": 1}
        for n in ("q", "out", "lse"):  # a request's first row is number request * q_len
            strides[f"{n}_stride_b"] -= self.q_len * strides[f"{n}_stride_s"]
        values = {
            **strides,
            "rope_inv_freq": 0 if inv_freq is None else inv_freq.data_ptr(),
            "rope_mscale": 1.0 if rope is None else rope.mscale, "batch": self.batch, "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads, "q_len": self.q_len, "kv_len": self.kv_len, "head_offset": 0,
            "total_heads": self.num_heads, "threads": 1, "scale": self.scale,
        }  # fmt: skip
        template = bytearray(fields.size)
        fields.pack_into(template, 0, *(values.get(f.name, 0) for f in fields.fields))
        self.template = bytes(template)

    def output(self, q: torch.Tensor) -> torch.Tensor:
        return torch.empty(self.out_shape, dtype=self.dtype, device="cpu")

    def bind_lengths(
        self, buffer: bytearray, q_lens: Any, kv_lens: Any, q_offset: Any, held: list[torch.Tensor]
    ) -> int:
        """Write the requests' records and RoPE's tables; returns the longest kv_len."""
        from .space import REQUEST

        lens_q, lens_kv, offsets = self.lengths(q_lens, kv_lens, q_offset)
        records = bytearray(REQUEST.size * self.batch)
        for r, (q_len, kv_len, offset) in enumerate(zip(lens_q, lens_kv, offsets)):
            kv_token = (r * self.kv_len + 2**31) % 2**32 - 2**31
            REQUEST.pack_into(records, r * REQUEST.size, r * self.q_len, q_len, kv_len, 0, offset, kv_token, 0)
        if self.batch:
            held.append(torch.frombuffer(records, dtype=torch.uint8))
            struct.pack_into("=Q", buffer, self.offsets["requests"], held[-1].data_ptr())
        if self.rope_needs_lens:
            with torch.device("cpu"):
                inv_freq, table = self.rope.tables(self.head_dim, torch.tensor(lens_kv, dtype=torch.int64, device="cpu"))
            inv_freq = inv_freq.contiguous()
            held.append(inv_freq)
            struct.pack_into("=Q", buffer, self.offsets["rope_inv_freq"], inv_freq.data_ptr())
            if table is not None:
                table = table.to(torch.int32).contiguous()
                held.append(table)
                struct.pack_into("=Q", buffer, self.offsets["rope_table"], table.data_ptr())
        return max(lens_kv, default=0)

    def bind(
        self, buffer: bytearray, params: Mapping[str, Any], longest: int, held: list[torch.Tensor]
    ) -> None:
        """Write the parameters."""
        tensors: dict[str, torch.Tensor] = {}
        for name, f in self.params.items():
            value = value_of(self.variant, name, params)
            at = self.offsets[f"param_{name}"]
            if f.kind != "tensor":
                struct.pack_into("=f" if f.dtype == F32 else "=i", buffer, at, check_scalar(self.variant, name, value))
                continue
            value = self.check_tensor(name, value, longest)
            held.append(value)
            tensors[name] = value
            empty = value.numel() == 0
            struct.pack_into("=Q", buffer, at, (_ZERO if empty else value).data_ptr())
            for i in range(len(f.axes)):
                struct.pack_into("=q", buffer, self.offsets[f"stride{i}_{name}"], value.stride(i))
                struct.pack_into("=i", buffer, self.offsets[f"size{i}_{name}"], value.shape[i])
        if self.free_axes:
            check_free_axes(self.params, tensors, self.free_axes)


def _site(variant: Variant, q: Any, k: Any, v: Any, layout: str, params: Mapping[str, Any]) -> _Site:
    sites = variant.__dict__.get("_sites")
    if sites is None:
        sites = variant.__dict__.setdefault("_sites", {})
    storage: tuple[tuple[str, str], ...] = ()
    if params or variant.trace.fields:
        storage = stored_in(variant, params)
    try:
        ident = (q.dtype, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), k.dtype, v.dtype, q.device,
                 k.device, v.device, layout, storage)  # fmt: skip
        site = sites.get(ident)
    except (AttributeError, TypeError):  # no tensor, or an unhashable layout: _Site says what is wrong
        site, ident = None, None
    if site is None:
        make = device_sites.get(q.device.type, _Site) if ident is not None else _Site
        site = make(variant, q, k, v, layout, dict(storage))
        if len(sites) >= _MAX_SITES:
            sites.clear()
        sites[ident] = site
    return site


# What makes the site of a call on another device, and what compiles for it, by device type: rooms further down the street
# add theirs.
device_sites: dict[str, Callable[..., Any]] = {}
device_compilers: dict[str, Callable[..., Any]] = {}
_MAX_SITES = 1024  # decoding sees a new kv_len each step; a site is about 2 kB
