"""Checking a variant: its kernels against the float64 oracle over a grid of calls. Behind ``attngen check``.

The yardstick is what plain torch makes of the same inputs in the same dtype, with scores and logits in float32, as the kernels
have them: a kernel passes if it is wrong by no more than twice that, plus rounding. (Logits rounded to bfloat16 would make an
error of 1 out of a position's bias of 300, and forgive a kernel as much.) Slots that a call must not read hold NaN.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import counters, run
from .devices import as_device
from .expr import Node, discrete_inputs
from .fields import Field
from .interp import evaluate
from .ops import BOOL, F32, I32
from .rope import rotate
from .spec import Variant

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Allowed beside twice torch's own error, relative to 1 + |reference|: rounding, and another order of summation.
_FLOOR = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
_WARM_CALLS = 7


@dataclass(frozen=True)
class Case:
    """The sizes of one call; ``kv_lens`` of None fills the tensors."""

    name: str
    batch: int
    q_len: int
    kv_len: int
    num_heads: int
    num_kv_heads: int
    kv_lens: tuple[int, ...] | None = None

    def __str__(self) -> str:
        lens = f" kv_lens={','.join(map(str, self.kv_lens))}" if self.kv_lens else ""
        heads = f"h={self.num_heads}/{self.num_kv_heads}"
        return f"{self.name} b={self.batch} {heads} q={self.q_len} kv={self.kv_len}{lens}"


CASES = (
    Case("decode", 2, 1, 300, 4, 2),
    Case("prefill", 1, 128, 128, 4, 4),
    Case("append", 2, 20, 133, 6, 2, (133, 64)),
    Case("ragged", 3, 33, 90, 2, 1, (90, 1, 0)),
    Case("longer-queries", 1, 70, 17, 2, 2),
)


@dataclass(frozen=True)
class Result:
    """One kernel in one case. Errors are the largest absolute ones against the float64 oracle."""

    case: Case
    dtype: str
    head_dim: int
    error: float
    torch_error: float
    compile_seconds: float  # what compiling took, now or when the cache got it
    cached: bool
    warm_ms: float  # the fastest of a few calls
    reason: str  # empty: passed

    @property
    def ok(self) -> bool:
        return not self.reason


def check(
    variant: Variant,
    dtypes: Sequence[str] = tuple(DTYPES),
    head_dims: Sequence[int] = (64,),
    cases: Sequence[Case] = CASES,
    progress: Callable[[str], None] = lambda text: None,
    device: Any = "cpu",
) -> Iterator[Result]:
    """Compile ``variant`` for each dtype and head_dim and compare it with the oracle in each case, on the CPU or a CUDA device.

    ``progress`` is told what is about to be done. Raises what compiling raises.
    """
    for name in dtypes:
        for head_dim in head_dims:
            progress(f"compiling {name}, head_dim {head_dim}")
            compiled = compile_for(variant, name, head_dim, device)
            for case in cases:
                progress(f"checking {name}, head_dim {head_dim}: {case}")
                q, k, v = inputs(case, DTYPES[name], head_dim)
                params, _ = invent(variant, case)
                outcome = _compare(variant, q, k, v, case.kv_lens, params, device)
                yield Result(case, name, head_dim, *outcome[:2], compiled.seconds, compiled.cached, *outcome[2:])


@dataclass(frozen=True)
class Compiled:
    """The kernels of a call, on the CPU one: the CPU features or GPU they are for, their keys, and what compiling took, now or when
    the cache got them."""

    isa: str
    keys: tuple[str, ...]
    seconds: float
    cached: bool


def compile_for(variant: Variant, dtype: str, head_dim: int, device: Any = "cpu") -> Compiled:
    """What ``attention`` needs for ``variant`` with tensors stored as ``invent`` makes them."""
    params, _ = invent(variant, CASES[0])
    storage = {name: value.dtype for name, value in params.items() if isinstance(value, torch.Tensor)}
    given: dict[str, Any] = dict(dtype=DTYPES[dtype], head_dim=head_dim, storage=storage)
    before = counters.stats()["builds"]
    if as_device(device).type == "cpu":
        kernel = run.compile(variant, **given)
        found, entries = [kernel], [kernel.loaded.entry]
    else:
        found = run.compile(variant, device=device, paged=False, **given)
        entries = [kernel.entry for kernel in found]
    seconds = max(entry.manifest["seconds"] for entry in entries)  # all at once
    return Compiled(found[0].problem.isa, tuple(k.spec_hash for k in found), seconds, counters.stats()["builds"] == before)


def inputs(case: Case, dtype: torch.dtype, head_dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q, k, v; unused slots of k and v are NaN. Equal arguments give equal values."""
    random = torch.Generator().manual_seed(zlib.crc32(f"{case} {head_dim}".encode()))

    def tensor(rows: int, heads: int) -> torch.Tensor:
        return torch.randn(case.batch, rows, heads, head_dim, generator=random).to(dtype)

    q, k, v = tensor(case.q_len, case.num_heads), *(tensor(case.kv_len, case.num_kv_heads) for _ in "kv")
    for request, n in enumerate(case.kv_lens or ()):
        k[request, n:] = v[request, n:] = torch.nan
    return q, k, v


# ---------------------------------------------------------------- parameters


def invent(variant: Variant, case: Case) -> tuple[dict[str, Any], list[str]]:
    """Parameters for a call of ``case``, and a line for each that was invented.

    The library's variants bring example values. Of any other, what is bound or has a default is kept where it fits the
    case; tensors get random values of their type (ints: small and not negative) and Scalars without a default a
    plausible one.
    """
    from .variants import example_params

    params = example_params(
        variant, requests=case.batch, q_len=case.q_len, kv_len=case.kv_len, num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
    )  # fmt: skip
    random = torch.Generator().manual_seed(1)
    sizes = _axis_sizes(variant, case, params)
    notes = []
    for name, field in variant.trace.used().items():
        bound = variant.values.get(name)
        if field.kind == "tensor":
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in field.axes]
            fits = bound is not None and list(bound.shape) == shape
            if bound is not None and not fits:
                params[name] = _random(field, shape, random).to(bound.dtype)
            if not fits:
                axes = ", ".join(str(axis) for axis in field.axes)
                instead = ": the bound one does not fit the grid" if bound is not None else ""
                notes.append(f"{name}[{axes}]: random {_KINDS[field.dtype]}{instead}")
        elif bound is None and name not in params:
            params[name] = 1.0 if field.dtype == F32 else max(1, case.kv_len // 3)
            notes.append(f"{name}: {'1.0' if field.dtype == F32 else 'a third of kv_len'}")
        elif name in params:
            notes.append(f"{name}: chosen for small inputs")
    return params, notes


def on_device(variant: Variant, params: dict[str, Any], device: Any) -> dict[str, Any]:
    """The parameters, and the tensors that the variant has bound, on a device."""
    bound = {name: variant.values.get(name) for name in variant.trace.used()}
    tensors = {name: x for name, x in (bound | params).items() if isinstance(x, torch.Tensor)}
    return params | {name: x.to(device) for name, x in tensors.items()}


_KINDS = {F32: "floats", I32: "ints 0 to 3", BOOL: "bools"}


def _axis_sizes(variant: Variant, case: Case, params: dict[str, Any]) -> dict[str, int]:
    """What each named axis stands for: known names by the case, others by a tensor that has the axis."""
    sizes: dict[str, int] = {}
    for name, field in variant.trace.used().items():
        tensor = params.get(name, variant.values.get(name))
        if field.kind == "tensor":
            sizes.update((axis, size) for axis, size in zip(field.axes, tensor.shape) if isinstance(axis, str))
    return sizes | {
        "heads": case.num_heads, "kv_heads": case.num_kv_heads, "requests": case.batch, "requests + 1": case.batch + 1, "positions": case.kv_len,
        "q_tokens": case.batch * case.q_len, "kv_tokens": case.batch * case.kv_len,
    }  # fmt: skip


def _random(field: Field, shape: list[int], random: torch.Generator) -> torch.Tensor:
    if field.dtype == F32:
        return torch.randn(shape, generator=random)
    if field.dtype == I32:
        return torch.randint(0, 4, shape, generator=random, dtype=torch.int32)
    return torch.rand(shape, generator=random) < 0.5


# ---------------------------------------------------------------- judging


def _compare(
    variant: Variant,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_lens: Sequence[int] | None,
    params: dict[str, Any],
    device: Any = "cpu",
) -> tuple[float, float, float, str]:
    """(error, torch's error on the CPU, milliseconds of the fastest call, reason to fail or '')."""
    wants_lse = variant.trace.weight is None
    lens = dict(kv_lens=kv_lens, return_lse=wants_lse)
    expected = run.reference(q, k, v, variant, **lens, **params)
    there = [x.to(device) for x in (q, k, v)]
    moved = on_device(variant, params, device)
    with torch.no_grad():
        found = run.attention(*there, variant, **lens, **moved)
        times = [timed(lambda: run.attention(*there, variant, **lens, **moved), device) for _ in range(_WARM_CALLS)]
    found = tuple(x.cpu() for x in found) if wants_lse else found.cpu()
    plain = plain_torch(variant, q, k, v, kv_lens, params)
    (out, lse), (ref, ref_lse) = (found, expected) if wants_lse else ((found, None), (expected, None))
    torch_error = _largest(plain, ref)
    error = _largest(out, ref)
    floor = _FLOOR[q.dtype]
    reason = _fault("output", out, ref, floor * (1 + ref.nan_to_num().abs()) + 2 * torch_error)
    if wants_lse and not reason:
        reason = _fault("LSE", lse, ref_lse, 8 * floor * (1 + ref_lse.nan_to_num(neginf=0.0).abs()))
    return error, torch_error, 1e3 * min(times), reason


def timed(call: Callable[[], Any], device: Any = "cpu") -> float:
    """Seconds of a call, on a CUDA device up to its end."""
    on_cuda = as_device(device).type == "cuda"
    if on_cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if on_cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _largest(x: torch.Tensor, ref: torch.Tensor) -> float:
    """The largest error where the reference is finite; NaN if x is NaN there."""
    return float((x.double() - ref)[ref.isfinite()].abs().amax()) if ref.isfinite().any() else 0.0


def _fault(what: str, x: torch.Tensor, ref: torch.Tensor, allowed: torch.Tensor) -> str:
    """Why ``x`` is not ``ref``, naming the worst element; '' if it is."""
    x = x.double()
    wrong = torch.where(ref.isfinite(), ~((x - ref).abs() < allowed), ~((x == ref) | (x.isnan() & ref.isnan())))
    if not wrong.any():
        return ""
    excess = torch.where(wrong, ((x - ref).abs() / allowed).nan_to_num(torch.inf, torch.inf), -1.0)
    at = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    count = f"{int(wrong.sum())} of {wrong.numel()} elements differ"
    return f"{what}{list(at)} is {x[at]:.6g}, required {ref[at]:.6g}; {count}"


def plain_torch(
    variant: Variant,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_lens: Sequence[int] | None,
    params: dict[str, Any],
) -> torch.Tensor:
    """The variant as one would write it in eager torch, the whole matrix at once: scores, logits and softmax in float32, what is
    multiplied and the output rounded to q's dtype."""
    trace, dtype = variant.trace, q.dtype
    (batch, rows, heads, head_dim), (slots, kv_heads), dim_v = q.shape, k.shape[1:3], v.shape[3]
    values = {name: params.get(name, variant.values.get(name)) for name in trace.used()}
    exact = discrete_inputs(trace.roots().values())
    lens = torch.tensor([slots] * batch if kv_lens is None else list(kv_lens))

    def i32(x: Any, axis: int) -> torch.Tensor:
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        return torch.as_tensor(x).to(torch.int32).view(shape)

    head, request, kv, row = (i32(torch.arange(n), axis) for axis, n in ((1, heads), (0, batch), (3, slots), (2, rows)))
    kv_len = i32(lens, 0)
    at = {
        "head": head, "kv_head": head // (heads // kv_heads), "num_heads": i32(heads, 0),
        "num_kv_heads": i32(kv_heads, 0), "request": request, "q_len": i32(rows, 0), "kv_len": kv_len, "kv": kv,
        "kv_token": kv + request * slots,
        "q": row + kv_len - rows, "q_offset": kv_len - rows, "q_token": row + request * rows,
    }  # fmt: skip

    def value(node: Node, **extra: torch.Tensor) -> torch.Tensor:
        return evaluate(node, at | extra, values, exact)

    inside = (kv < kv_len).transpose(1, 3)
    q, k, v = q.transpose(1, 2), *(torch.where(inside, x, 0).transpose(1, 2) for x in (k, v))
    freq = None
    if trace.rope:
        freq, table = trace.rope.rope.tables(head_dim, lens)
        freq = freq[torch.zeros(batch, dtype=torch.long) if table is None else table.long()][:, None, None]

    def turned(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        rope = trace.rope.rope
        return rotate(x, position.expand(batch, -1, x.shape[2], 1)[..., 0], freq, rope.mscale, rope.interleaved)

    if trace.rope and trace.rope.rope.keys == "rotate":
        k = turned(k, value(trace.rope.kv_position).transpose(2, 3))
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    queries = [turned(q, value(node)) for node in trace.rope.q_positions] if trace.rope else [q]
    scores = [x.float() @ k.float().transpose(2, 3) for x in queries]
    s = scores[0]
    if trace.rope and trace.rope.kind is not None:
        for n, other in enumerate(scores):
            s = torch.where(value(trace.rope.kind) == n, other, s)
    scale = head_dim**-0.5 if trace.scale is None else trace.scale
    s = s * scale
    if trace.query_scale is not None:
        s = (s * value(trace.query_scale)).float()
    if trace.logits is not None:
        s = value(trace.logits, s=s).float().expand(batch, heads, rows, slots)
    keep = (kv < kv_len).expand(s.shape)
    if trace.mask is not None:
        keep = keep & value(trace.mask)
    if trace.weight is not None:
        p = torch.where(keep, value(trace.weight, s=s).to(dtype), 0)
    else:
        s = torch.where(keep, s, -torch.inf)
        if trace.sink is not None:
            s = torch.cat((s, value(trace.sink).float().expand(batch, heads, rows, 1)), -1)
        p = torch.softmax(s, -1).nan_to_num()[..., :slots].to(dtype)
    o = p @ v
    if trace.output is not None:
        o = value(trace.output, o=o, dim=i32(torch.arange(dim_v), 3)).to(dtype).expand(batch, heads, rows, dim_v)
    return o.transpose(1, 2)
