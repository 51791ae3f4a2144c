"""Attention states over disjoint sets of keys become one: a kernel on a GPU, torch operations on the CPU.

    out, lse = merge_states([out_a, out_b], [lse_a, lse_b])                # as FlashInfer's, natural logarithms
    out, lse = merge_states(outs, lses, variant=attn.variant)              # what run(partial=True) returned
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.compiler import is_compiling

from . import cuda
from .abi_cuda import MERGE_FIELDS, MERGE_POINTERS
from .cache import Entry
from .choose_cuda import MergeConfig, arch_named
from .devices import cuda_index
from .errors import ParameterError, UnsupportedError
from .expr import Node
from .fields import STORAGE
from .interp import evaluate
from .library import NO_GRAD, define
from .ops import F32, TORCH_DTYPE
from .params import DTYPE_NAMES, check_dtype, check_scalar
from .spec import Variant, as_variant

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LN2 = math.log(2.0)
_LOG2 = {"e": 1 / _LN2, 2: 1.0}  # of the base
# What a hook reads, and the arguments that say it.
_SOURCES = {
    "request": ("q_indptr",), "q_len": ("q_indptr",), "kv_len": ("q_indptr", "kv_lens"),
    "kv_head": ("num_kv_heads",), "num_kv_heads": ("num_kv_heads",),
}  # fmt: skip

_loaded: dict[tuple[int, str, str, int], Any] = {}


def merge_states(
    outs: torch.Tensor | Sequence[torch.Tensor],
    lses: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    base: str | int | None = None,
    variant: Variant | type[Variant] | None = None,
    out_dtype: torch.dtype | None = None,
    q_indptr: torch.Tensor | Sequence[int] | None = None,
    kv_lens: torch.Tensor | Sequence[int] | None = None,
    q_positions: torch.Tensor | Sequence[int] | None = None,
    num_kv_heads: int | None = None,
    head_offset: int = 0,
    total_heads: int | None = None,
    **params: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Merge attention states of the same queries over disjoint sets of keys, in the order given.

    A state without keys (LSE -inf) weighs nothing, whatever its out holds; where all are, out is 0 and the LSE -inf.

    Args:
        outs: n tensors ``[tokens, heads, head_dim_v]``, or one ``[n, tokens, heads, head_dim_v]``; float32, bfloat16 or
            float16. head_dim_v and strides are multiples of 8, the last dimension is contiguous.
        lses: n tensors ``[tokens, heads]``, or one ``[n, tokens, heads]``, float32: logarithms of the sums of exponentials.
        base: of the logarithms, "e" or 2; given and returned alike. Default "e"; with a variant 2.
        variant: finishes the raw states that ``BatchAttention.run(partial=True)`` returns: adds its sink and applies its
            output hook, once. Under a weight hook states add up and lses is None.
        out_dtype: of the result; default that of outs.
        q_indptr, kv_lens, q_positions: int ``[requests + 1]``, ``[requests]``, ``[requests]``, the batch as plan got it, where
            those hooks read at.request, at.q_len, at.kv_len or at.q (q_positions: default kv_len - q_len).
        num_kv_heads, head_offset, total_heads: as BatchAttention's, where those hooks read heads.
        **params: values of the fields that those hooks read.

    Returns:
        ``(out [tokens, heads, head_dim_v], lse float32 [tokens, heads])``. With a variant the LSE is the public one: natural,
        the sink included; None under a weight hook.

    The kernel is built and loaded at the first call (``compile`` in this module does it ahead); then a call may be captured
    in a CUDA graph. A list of more than 8 states, or of unequal strides, is copied into one tensor first.

    Raises:
        ParameterError, UnsupportedError: what is required, what was found, what to do.
    """
    batch = {"q_indptr": q_indptr, "kv_lens": kv_lens, "q_positions": q_positions, "num_kv_heads": num_kv_heads,
             "head_offset": head_offset or None, "total_heads": total_heads}  # fmt: skip
    if variant is not None:
        return _finish(outs, lses, base, as_variant(variant), out_dtype, batch, params)
    stray = [name for name, value in (batch | params).items() if value is not None]
    if stray:
        raise ParameterError(f"merge_states got {', '.join(stray)} without a variant, whose hooks read them: add variant=")
    base = "e" if base is None else base
    if not is_compiling():
        states = _States(outs, lses, True, None)
        return _merge(states, base, states.dtype if out_dtype is None else out_dtype)
    outs, lses = _unstack("outs", outs, 4), _unstack("lses", lses, 3)
    if torch.is_grad_enabled() and any([t.requires_grad for t in (*outs, *lses)]):
        raise UnsupportedError(NO_GRAD)
    return _operator(outs, lses, str(base), out_dtype)


@torch._disable_dynamo  # a graph ends here: the hooks are walked as they are evaluated
def _finish(
    outs: Any, lses: Any, base: Any, variant: Variant, out_dtype: torch.dtype | None, batch: Mapping[str, Any],
    params: Mapping[str, Any],
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """merge_states with a variant."""
    states = _States(outs, lses, variant.trace.weight is None, variant)
    hooks = [node for node in (variant.trace.sink, variant.trace.output) if node is not None]
    values = _bind(variant, hooks, params, states, batch["head_offset"] or 0, batch["total_heads"])
    symbols = _symbols(variant, hooks, states, **batch)
    result = states.dtype if out_dtype is None else out_dtype
    base = 2 if base is None else base
    out, lse = _merge(states, base, torch.float32 if hooks and result in _DTYPES else result)
    if lse is not None:
        lse = lse if base == "e" else lse * _LN2
    with torch.device(states.device):  # constants too: copied from the host they would break a capture
        if variant.trace.sink is not None:
            sink = evaluate(variant.trace.sink, symbols, values, (), torch.float32).float().expand(*lse.shape, 1)[..., 0]
            top = torch.maximum(lse, sink)
            mine, others = _weight(lse, top, _LOG2["e"]), _weight(sink, top, _LOG2["e"])
            total = mine + others
            factor = torch.where(total == 0, 0.0, mine / total)[..., None]
            out = torch.where(factor == 0, 0.0, out * factor)
            lse = torch.where(total == 0, -torch.inf, top + total.log())
        if variant.trace.output is not None:
            symbols["o"] = out
            symbols["dim"] = torch.arange(out.shape[2], dtype=torch.int32).view(1, 1, -1)
            out = evaluate(variant.trace.output, symbols, values, (), torch.float32).float().expand(out.shape)
    return out.to(result).contiguous(), lse


def compile(  # noqa: A001
    *,
    dtype: torch.dtype,
    head_dim_v: int,
    out_dtype: torch.dtype | None = None,
    arch: str | None = None,
    device: torch.device | str | int | None = None,
) -> Entry:
    """Build merge_states' kernel ahead: for a named architecture ("9.0a"), without a GPU, or for a CUDA device (by default
    the current one), where it is loaded too, so that the first call may be captured. Returns its cache entry.

    With a variant that has a sink or an output hook the kernel's own out_dtype is float32."""
    if arch is None:
        index = cuda_index(device, 'give arch=, such as "9.0a"')
        _load(index, dtype, out_dtype or dtype, head_dim_v)
        arch = cuda.device_arch(index).name
    return cuda.build(specialise(config_of(arch, dtype, out_dtype or dtype, head_dim_v)))[0]


# ---------------------------------------------------------------- merging


class _States:
    """The checked states: lists of n tensors, and the tensors that they are views of, where they came so."""

    def __init__(self, outs: Any, lses: Any, weighed: bool, variant: Variant | None) -> None:
        self.stacked_out = outs if isinstance(outs, torch.Tensor) else None
        self.outs = _unstack("outs", outs, 4)
        first = self.outs[0]
        self.device, self.dtype, self.shape = first.device, first.dtype, tuple(first.shape)
        if self.dtype not in _DTYPES:
            raise UnsupportedError(f"merge_states of {self.dtype}: it takes {', '.join(map(str, _DTYPES))}")
        if self.device.type not in ("cpu", "cuda"):
            raise UnsupportedError(f"merge_states on {self.device}: it runs on CUDA devices and on the CPU")
        if len(self.shape) != 3 or self.shape[2] % 8 or not self.shape[2]:
            raise ParameterError(f"outs are {self.shape}: required [tokens, heads, head_dim_v], head_dim_v a multiple of 8")
        for i, t in enumerate(self.outs):
            _check(f"outs[{i}]", t, self.shape, self.dtype, self.device)
            if t.stride(2) != 1 or any(s % 8 for s, n in zip(t.stride()[:2], t.shape) if n > 1) or t.data_ptr() % 16:
                raise ParameterError(
                    f"outs[{i}] has strides {t.stride()}: required a contiguous last dimension, the others multiples of 8, and "
                    f"an address that is a multiple of 16 bytes"
                )
        if isinstance(lses, (list, tuple)) and not weighed and all(t is None for t in lses):
            lses = None
        if (lses is not None) != weighed:
            if weighed:
                raise ParameterError("lses is None: required one [tokens, heads] a state (only states of a weight hook add up)")
            raise ParameterError(f"lses with {variant.name}, whose weight hook replaces softmax: its states have none, pass None")
        self.stacked_lse = lses if isinstance(lses, torch.Tensor) else None
        self.lses = None if lses is None else _unstack("lses", lses, 3)
        if self.lses is not None:
            if len(self.lses) != len(self.outs):
                raise ParameterError(f"{len(self.outs)} outs and {len(self.lses)} lses: required as many")
            for i, t in enumerate(self.lses):
                _check(f"lses[{i}]", t, self.shape[:2], torch.float32, self.device)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*self.outs, *(self.lses or ()))):
            raise UnsupportedError(NO_GRAD)


def _unstack(name: str, given: Any, rank: int) -> list[torch.Tensor]:
    if isinstance(given, torch.Tensor):
        if given.dim() != rank:
            raise ParameterError(f"{name} is {tuple(given.shape)}: required a list of tensors, or one of {rank} dimensions")
        given = given.unbind(0)
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(t, torch.Tensor) for t in given):
        raise ParameterError(f"{name}: required one tensor or more, in a list or stacked; found {type(given).__name__}")
    return list(given)


def _check(name: str, t: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tuple(t.shape) != shape or t.dtype != dtype or t.device != device:
        raise ParameterError(f"{name} is {t.dtype} {tuple(t.shape)} on {t.device}: required {dtype} {shape} on {device}")


def _weight(lse: torch.Tensor, top: torch.Tensor, log2_base: float) -> torch.Tensor:
    """base^(lse - top), for top >= lse: 1 at the top, infinite ones too, and 0 for a state without keys."""
    weight = torch.where(lse == top, 1.0, torch.exp2((lse - top) * log2_base))
    return torch.where(lse == -torch.inf, 0.0, weight)


def _merge(states: _States, base: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    if dtype not in _DTYPES:
        raise UnsupportedError(f"out_dtype {dtype}: required {', '.join(map(str, _DTYPES))}")
    if isinstance(base, bool) or base not in _LOG2:
        raise ParameterError(f'base {base!r}: required "e" or 2')
    return (_merge_cpu if states.device.type == "cpu" else _merge_cuda)(states, _LOG2[base], dtype)


def _run_operator(
    outs: list[torch.Tensor], lses: list[torch.Tensor], base: str, out_dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    states = _States(outs, lses, True, None)
    return _merge(states, int(base) if base.isdigit() else base, states.dtype if out_dtype is None else out_dtype)


def _fake_operator(
    outs: list[torch.Tensor], lses: list[torch.Tensor], base: str, out_dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = outs[0].shape
    return outs[0].new_empty(shape, dtype=out_dtype or outs[0].dtype), outs[0].new_empty(shape[:2], dtype=torch.float32)


_operator = define(
    "merge_states", "(Tensor[] outs, Tensor[] lses, str base, ScalarType? out_dtype) -> (Tensor, Tensor)", _run_operator,
    _fake_operator,
)  # fmt: skip


def _merge_cpu(states: _States, log2_base: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    merged = torch.zeros(states.shape, dtype=torch.float32, device="cpu")
    if states.lses is None:
        for out in states.outs:
            merged += out
        return merged.to(dtype), None
    lses = torch.stack(states.lses).contiguous()  # torch rounds exp2 by where a vector starts
    top = lses[0]
    for lse in lses[1:]:
        top = torch.fmax(top, lse)
    weights = _weight(lses, top, log2_base)
    total = sum(weights[1:], weights[0])
    scale = torch.where(total == 0, 0.0, 1 / total)
    for out, weight in zip(states.outs, weights):
        share = (weight * scale)[..., None]
        merged = torch.where(share == 0, merged, merged + share * out)
    return merged.to(dtype).contiguous(), torch.where(total == 0, -torch.inf, top + total.log2() / log2_base)


def _merge_cuda(states: _States, log2_base: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    tokens, heads, dv = states.shape
    index = states.device.index
    loaded = _load(index, states.dtype, dtype, dv)
    out = torch.empty(states.shape, dtype=dtype, device=states.device)
    lse = None if states.lses is None else torch.empty(states.shape[:2], dtype=torch.float32, device=states.device)
    if out.numel():
        values, held = _values(states, log2_base)
        values |= {"merged_out": out.data_ptr(), "merged_lse": 0 if lse is None else lse.data_ptr()}
        special, kernel = loaded
        buffer = bytearray(special.layout.size)
        special.layout.pack_into(buffer, 0, *(values.get(f.name, 0) for f in special.layout.fields))
        kernel.launch(buffer, special.config.blocks(tokens * heads), 1, cuda.current_stream(index))
        del held  # alive through the launch
    return out, lse


def _values(states: _States, log2_base: float) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The kernel's arguments, but for where its results go, and tensors to keep alive."""
    tokens, heads, _ = states.shape
    values = {"num_rows": tokens * heads, "num_states": len(states.outs), "num_heads": heads, "log2_base": log2_base,
              "log_2": 1 / log2_base}  # fmt: skip
    held = []
    for name, parts, stacked in (("out", states.outs, states.stacked_out), ("lse", states.lses, states.stacked_lse)):
        if parts is None:
            continue
        if stacked is None and (len(parts) > MERGE_POINTERS or len({t.stride() for t in parts}) > 1):
            stacked = torch.stack(parts)
            held.append(stacked)
            parts = stacked.unbind(0)
        values |= {f"{name}{i}": t.data_ptr() for i, t in enumerate(parts[:MERGE_POINTERS])}
        values |= {f"{name}_stride_t": parts[0].stride(0), f"{name}_stride_h": parts[0].stride(1)}
        values[f"{name}_stride_states"] = 0 if stacked is None else MERGE_POINTERS * stacked.stride(0)
    return values, held


def config_of(arch_name: str, dtype: torch.dtype, out_dtype: torch.dtype, dv: int) -> MergeConfig:
    """What a kernel of ``merge_states`` is specialised to, or UnsupportedError."""
    check_dtype(dtype)
    check_dtype(out_dtype)
    if dtype not in _DTYPES or out_dtype not in _DTYPES or dv % 8 or dv < 8:
        raise UnsupportedError(
            f"merge_states of {dtype} to {out_dtype}, head_dim_v {dv}: required {', '.join(map(str, _DTYPES))} and a multiple of 8"
        )
    return MergeConfig(arch_named(arch_name).name, DTYPE_NAMES[dtype], DTYPE_NAMES[out_dtype], dv)


def specialise(config: MergeConfig) -> cuda.Specialised:
    """The kernel before it is rendered, with its key."""
    return cuda.specialise_plain("merge", "merge_states", config, MERGE_FIELDS)


def _load(index: int, dtype: torch.dtype, out_dtype: torch.dtype, dv: int) -> tuple[cuda.Specialised, Any]:
    ident = (index, str(dtype), str(out_dtype), dv)
    found = _loaded.get(ident)
    if found is None:
        gpu = cuda.device_arch(index)
        config = config_of(gpu.name, dtype, out_dtype, dv)
        cuda.refuse_capture(index, f"merge_states' kernel for {config}",
                            "call merge_states, or attngen.merge.compile, with the same dtypes and head_dim_v before the capture")
        special = specialise(config)
        kernel = cuda.load(special, index, config.threads, 0, gpu.dependent_launch)
        found = _loaded.setdefault(ident, (special, kernel))
    return found


# ---------------------------------------------------------------- finishing


def _bind(
    variant: Variant, hooks: Sequence[Node], params: Mapping[str, Any], states: _States, head_offset: int, total_heads: int | None
) -> dict[str, Any]:
    """Values of the fields that the hooks read, on the states' device."""
    needed = frozenset().union(*(node.params for node in hooks), ())
    for name in params:
        if name not in variant.trace.fields:
            raise ParameterError(f"{variant.name} has no parameter `{name}`: it has {', '.join(variant.trace.fields) or 'none'}")
        if name not in needed:
            raise ParameterError(
                f"merge_states got `{name}`, which {variant.name} reads in neither sink nor output: pass it to plan or run"
            )
    values: dict[str, Any] = {}
    for name in sorted(needed):
        f = variant.trace.fields[name]
        value = params.get(name)
        if value is None:
            value = variant.__dict__.get(name)
        if value is None:
            raise ParameterError(f"{variant.name} needs `{name}` in its sink or output: pass {name}=... to merge_states")
        if f.kind == "tensor":
            heads = {states.shape[1], total_heads or states.shape[1]} if not head_offset else {total_heads or states.shape[1]}
            if not isinstance(value, torch.Tensor) or value.dim() != len(f.axes):
                found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise ParameterError(f"{variant.name}.{name} is {found}: required a tensor {list(f.axes)}")
            if value.device != states.device or value.dtype not in STORAGE[f.dtype]:
                allowed = ", ".join(str(t) for t in STORAGE[f.dtype])
                raise ParameterError(
                    f"{variant.name}.{name} is {value.dtype} on {value.device}: required {allowed} on {states.device}"
                )
            for axis, size in zip(f.axes, value.shape):
                if (axis == "heads" and size not in heads) or (isinstance(axis, int) and size != axis):
                    wanted = " or ".join(map(str, sorted(heads))) if axis == "heads" else axis
                    raise ParameterError(f"{variant.name}.{name} has {size} entries on axis {axis!r}: required {wanted}")
        elif isinstance(value, torch.Tensor) and value.device == states.device:
            wanted = torch.float32 if f.dtype == F32 else torch.int32
            if value.dim() or value.dtype != wanted:
                raise ParameterError(f"{name} is {value.dtype} {tuple(value.shape)}: required a number or a 0-dim {wanted}")
        else:
            value = torch.full((), check_scalar(variant, name, value), dtype=TORCH_DTYPE[f.dtype], device=states.device)
        values[name] = value
    return values


def _symbols(
    variant: Variant, hooks: Sequence[Node], states: _States, *, q_indptr: Any, kv_lens: Any, q_positions: Any,
    num_kv_heads: int | None, head_offset: int | None, total_heads: int | None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Values of what the hooks read of ``at``, int32, to be broadcast over [tokens, heads, head_dim_v]."""
    read = frozenset().union(*(node.symbols for node in hooks), ())
    given = {"q_indptr": q_indptr, "kv_lens": kv_lens, "num_kv_heads": num_kv_heads}
    offset = ("q_indptr",) if q_positions is not None else ("q_indptr", "kv_lens")
    sources = {**_SOURCES, "q": offset, "q_offset": offset}
    missing = {name: f"at.{symbol}" for symbol in sorted(read & sources.keys()) for name in sources[symbol] if given[name] is None}
    if missing:
        wants = ", ".join(f"{name}= (for {symbol})" for name, symbol in missing.items())
        raise ParameterError(f"merge_states with {variant.name}: its sink or output hook needs {wants}")
    tokens, heads, _ = states.shape
    device, i32 = states.device, torch.int32
    head_offset = head_offset or 0

    def full(value: int) -> torch.Tensor:
        return torch.full((), value, dtype=i32, device=device)

    def vector(name: str, value: Any, length: int | None = None) -> torch.Tensor:
        t = torch.as_tensor(value, device=device)
        if t.dim() != 1 or t.dtype not in (torch.int32, torch.int64) or (length is not None and t.shape[0] != length):
            wanted = "requests + 1" if length is None else length
            raise ParameterError(f"{name} is {t.dtype} {tuple(t.shape)}: required ints [{wanted}]")
        return t

    token = torch.arange(tokens, dtype=i32, device=device).view(-1, 1, 1)
    head = torch.arange(head_offset, head_offset + heads, dtype=i32, device=device).view(1, -1, 1)
    total = total_heads or heads
    if head_offset < 0 or head_offset + heads > total:
        raise ParameterError(f"head_offset {head_offset} and {heads} heads of total_heads {total}: required to lie within")
    found = {"q_token": token, "head": head, "num_heads": full(total)}
    if num_kv_heads is not None:
        if num_kv_heads < 1 or heads % num_kv_heads:
            raise ParameterError(f"num_kv_heads {num_kv_heads} of {heads} heads: required to divide them")
        group = heads // num_kv_heads
        found |= {"kv_head": head // group, "num_kv_heads": full(total // group)}
    if q_indptr is not None and read & {"request", "q_len", "kv_len", "q", "q_offset"}:
        indptr = vector("q_indptr", q_indptr)
        requests = indptr.shape[0] - 1
        if requests < 1 and tokens:
            raise ParameterError(f"q_indptr has {requests + 1} entries for {tokens} tokens: required requests + 1")
        # Tokens past the last request's are padding: any request serves.
        request = (torch.searchsorted(indptr, token.view(-1).to(indptr.dtype), right=True) - 1).clamp(0, max(requests - 1, 0))
        first, end = indptr[request], indptr[request + 1]
        found |= {"request": request.view(-1, 1, 1).to(i32), "q_len": (end - first).view(-1, 1, 1).to(i32)}
        start = None
        if kv_lens is not None:
            lens = vector("kv_lens", kv_lens, requests)[request]
            found["kv_len"] = lens.view(-1, 1, 1).to(i32)
            start = lens - (end - first)
        if q_positions is not None:
            start = vector("q_positions", q_positions, requests)[request]
        if start is not None:
            found["q_offset"] = start.view(-1, 1, 1).to(i32)
            found["q"] = (start - first).view(-1, 1, 1).to(i32) + token
    return found
