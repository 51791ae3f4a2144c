"""FlexAttention's interface: its hooks as a variant, and its call.

    variant = from_flex(score_mod=alibi, mask_mod=causal)              # q_idx counts from 0, as Flex's does
    out = flex_attention(query, key, value, score_mod=alibi, block_mask=causal)

Captured tensors are parameters of the variant, bound to the tensors: a tensor that is changed in place is seen by the next call.
``flex_attention`` keeps variants by what their hooks are and capture, so that it traces a hook once, whatever tensors it holds.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_compiling

from .captures import Captures, captures
from .errors import ParameterError, UnsupportedError, VariantError
from .expr import Node, const, discrete_inputs, load, symbol
from .flex_trace import MASK_MOD, SCORE_MOD, Parameter, Tracer, captured_name, same
from .interp import evaluate
from .ops import BOOL, F32, I32
from .run import attention
from .fields import Field
from .spec import Trace, Variant, check_trace, outside_dynamo

_LARGE = 1 << 30  # Flex's block size of a mask that has no blocks


class FlexVariant(Variant):
    """A variant made of FlexAttention's hooks by ``from_flex``. Its fields stand for the captured tensors, by their names in the
    hooks; a call may pass others: ``slopes=...``."""

    def __init__(
        self, score_mod: Callable[..., Any] | None, mask_mod: Callable[..., Any] | None, blocks: _Blocks | None, q_offset: Any,
        found: Captures, made_for: Any = None, bound: bool = True,
    ) -> None:  # fmt: skip
        outside_dynamo("from_flex")
        tracer = Tracer({id(t): name for name, t in reversed(found.tensors)})
        names = [_label(f) for f in (score_mod, mask_mod) if f is not None] + ["blocks"] * (blocks is not None)
        self._label = f"flex({', '.join(names)})"
        logits = tracer.trace("score_mod", score_mod, SCORE_MOD, F32) if score_mod is not None else None
        mask = tracer.trace("mask_mod", mask_mod, MASK_MOD, BOOL) if mask_mod is not None else None
        if blocks is not None:
            mask = blocks.mask(tracer, mask)
        logits, hidden = _masked_scores(logits)
        for condition in hidden:
            mask = condition if mask is None else mask & condition
        self._parameters = dict(tracer.parameters)
        self._found = Trace(
            logits=None if logits is symbol("s") else logits, mask=mask, where=tracer.where,
            fields={name: p.field for name, p in tracer.parameters.items()},
        )  # fmt: skip
        if q_offset is not None:
            self.q_offset = q_offset
        if made_for is not None:
            self._made_for = made_for
        for name, p in tracer.parameters.items():
            self.__dict__[name] = p.read(p.base) if bound else None

    @property
    def name(self) -> str:
        return self._label

    def _trace(self) -> Trace:
        trace = self.__dict__.pop("_found")
        check_trace(self.name, trace)
        return trace

    def __repr__(self) -> str:
        return self._label

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_parameters"}  # these hold functions


def _label(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__name__", None) or type(function).__name__
    return "lambda" if name == "<lambda>" else name


def _masked_scores(logits: Node | None) -> tuple[Node | None, list[Node]]:
    """A score of -inf is a key that is masked, and a mask has bounds: ``where(c, x, -inf)`` as x and c."""
    found = []
    while logits is not None and logits.op == "where" and "s" not in logits.args[0].symbols:
        condition, yes, no = logits.args
        if _is_minus_inf(no):
            logits = yes
        elif _is_minus_inf(yes):
            logits, condition = no, ~condition
        else:
            break
        found.append(condition)
    return logits, found


def _is_minus_inf(node: Node) -> bool:
    return node.op == "const" and node.dtype == F32 and node.attr == float("-inf")


# ---------------------------------------------------------------- block masks


@dataclass(frozen=True)
class _Blocks:
    """What a BlockMask's blocks say: ``state``, uint8 ``[batch | 1, heads | 1, q_blocks, kv_blocks]``, is 0 where no key of a block is
    attended to, 1 where the mask_mod decides and 2 where all are; ``full``: whether there may be a 2."""

    state: torch.Tensor
    size: tuple[int, int]
    full: bool

    @property
    def kind(self) -> Hashable:
        """What a trace depends on."""
        return self.size, self.full, self.state.shape[0] > 1, self.state.shape[1] > 1

    def mask(self, tracer: Tracer, mask_mod: Node | None) -> Node:
        name = captured_name("blocks", tracer.parameters)
        axes = tuple(f"{name}.{n}" for n in range(4))
        tracer.parameters[name] = Parameter(Field("tensor", I32, axes), self.state, same)
        zero = const(0)
        batch, heads = (symbol(s) if n > 1 else zero for s, n in zip(("request", "head"), self.state.shape))
        state = load(name, I32, axes, (batch, heads, symbol("q") // self.size[0], symbol("kv") // self.size[1]))
        if mask_mod is None:
            return state != 0
        return (state == 2) | ((state == 1) & mask_mod) if self.full else (state != 0) & mask_mod


def _is_block_mask(x: Any) -> bool:
    return hasattr(x, "kv_num_blocks") and hasattr(x, "mask_mod") and hasattr(x, "BLOCK_SIZE")


def _unblocked(block_mask: Any) -> bool:
    return tuple(block_mask.BLOCK_SIZE) == (_LARGE, _LARGE)


def _sizes(block_mask: Any) -> tuple[int | None, int | None, int, int] | None:
    """batch, heads (None: any), q_len and kv_len that a block mask is made for."""
    if _unblocked(block_mask):
        return None
    lead = tuple(block_mask.kv_num_blocks.shape[:-1])
    if len(lead) != 2:
        raise ParameterError(
            f"block_mask.kv_num_blocks has shape {tuple(block_mask.kv_num_blocks.shape)}: required [batch | 1, heads | 1, q_blocks]"
        )
    return (*(n if n > 1 else None for n in lead), *block_mask.seq_lengths)


def _mask_of(block_mask: Any) -> tuple[Callable[..., Any] | None, _Blocks | None]:
    """A BlockMask's meaning, as compiled FlexAttention's: its mask_mod, and its blocks where they say something else."""
    from torch.nn.attention import flex_attention as torch_flex

    mask_mod = block_mask.mask_mod
    if mask_mod is getattr(torch_flex, "_sliced_mask_mod_error", None) and mask_mod is not None:
        raise ParameterError(
            "block_mask is a slice of a BlockMask, which has no mask_mod: give the mask_mod of the whole, with positions of the slice "
            "(q_idx + offset), or set the slice's mask_mod to that"
        )
    mask_mod = None if mask_mod is torch_flex.noop_mask else mask_mod
    if _unblocked(block_mask):
        return mask_mod, None
    state = _state_of(block_mask)
    if mask_mod is not None and state.implied is None:
        state.implied = _implied(state.blocks, mask_mod, block_mask.seq_lengths)
    return mask_mod, None if state.implied else state.blocks


@dataclass
class _State:
    """What was found out about a BlockMask, as long as its tensors and its mask_mod are what they were."""

    seen: list[Any]
    blocks: _Blocks
    implied: bool | None = None  # whether the mask_mod says what the blocks do


_states: weakref.WeakKeyDictionary[Any, _State] = weakref.WeakKeyDictionary()


def _state_of(block_mask: Any) -> _State:
    tensors = [getattr(block_mask, n) for n in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")]
    # Inference tensors have no version: a copy tells whether one has changed.
    seen = [block_mask.mask_mod, *((t, None if t is None else t.clone() if t.is_inference() else t._version) for t in tensors)]
    kept = _states.get(block_mask)
    if kept is None or kept.seen[0] is not seen[0] or not all(map(_unchanged, kept.seen[1:], seen[1:])):
        full = tensors[2] is not None
        state = (block_mask.to_dense() != 0).to(torch.uint8)
        if full:
            whole = type(block_mask).from_kv_blocks(tensors[2], tensors[3], BLOCK_SIZE=block_mask.BLOCK_SIZE).to_dense()
            state = torch.where(whole != 0, 2, state).to(torch.uint8)
        kept = _states[block_mask] = _State(seen, _Blocks(state, tuple(block_mask.BLOCK_SIZE), full))
    return kept


def _unchanged(before: Any, now: Any) -> bool:
    (a, then), (b, version) = before, now
    return a is b and (torch.equal(then, version) if isinstance(then, torch.Tensor) else then == version)


_CHUNK = 1 << 24  # elements of a mask that are evaluated at once


def _implied(blocks: _Blocks, mask_mod: Callable[..., Any], lengths: tuple[int, int]) -> bool:
    """Whether ``mask_mod`` alone means the same: it attends nowhere in a block that is left out, and everywhere in a full one. Blocks
    of ``create_block_mask`` are such; what ``from_kv_blocks`` was given need not be. As dear as making the block mask, once for each."""
    variant, values = _variant_of(None, mask_mod, None)
    mask = variant.trace.mask
    if mask is None:
        return bool((blocks.state == 2).all())
    if any(isinstance(x, torch.Tensor) and x.dim() and x.device != blocks.state.device for x in values.values()):
        return False  # the call says which
    (q_len, kv_len), (batch, heads, q_blocks, kv_blocks) = lengths, blocks.state.shape
    # one block may be far larger than what it covers
    q_block, kv_block = (size if n > 1 else max(1, length) for size, n, length in zip(blocks.size, (q_blocks, kv_blocks), lengths))
    exact = discrete_inputs([mask])
    step = max(1, _CHUNK // (q_block * kv_blocks * kv_block * heads))
    with torch.device(blocks.state.device), torch.no_grad():
        kv = torch.arange(kv_len, dtype=torch.int32)
        head = torch.arange(heads, dtype=torch.int32).view(-1, 1, 1)
        for request in range(batch):
            for start in range(0, min(q_blocks, -(-q_len // q_block)), step):
                state = blocks.state[request, :, start : start + step]
                first, last = start * q_block, min(q_len, (start + step) * q_block)
                at = {"q": torch.arange(first, last, dtype=torch.int32).view(-1, 1), "kv": kv, "head": head,
                      "request": torch.tensor(request, dtype=torch.int32)}  # fmt: skip
                attended = evaluate(mask, at, values, exact).expand(heads, last - first, kv_len)
                padding = (0, kv_blocks * kv_block - kv_len, 0, state.shape[1] * q_block - (last - first))
                some, not_all = (
                    torch.nn.functional.pad(x, padding).view(heads, state.shape[1], q_block, kv_blocks, kv_block).any(4).any(2)
                    for x in (attended, ~attended)
                )
                if ((some & (state == 0)) | (not_all & (state == 2))).any():
                    return False
    return True


# ---------------------------------------------------------------- from_flex


def from_flex(
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    *,
    q_offset: int | str | torch.Tensor = 0,
) -> Variant:
    """A variant from hooks written for FlexAttention, unchanged.

    Args:
        score_mod: ``(score, b, h, q_idx, kv_idx) -> score``.
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, True attends.
        block_mask: a ``BlockMask``, in place of mask_mod: its mask_mod, and its blocks where they leave out, or attend to, more
            (as compiled FlexAttention reads them). Calls must have its q_len and kv_len.
        q_offset: the position of the first query, what ``q_idx`` counts from: 0 as in FlexAttention; "end", so that the last query
            stands at the last key (decoding against a cache); another int, or an int32 or int64 tensor [batch], read at each call.
            ``attention(q_offset=)`` and ``BatchAttention.plan(q_positions=)`` override it.

    Captured tensors (closure cells, globals, defaults, attributes, ``functools.partial``) become parameters that are bound to
    them: what they hold is read at each call. Python values are read now and are constants of the kernel.

    Raises:
        VariantError: at the hook's file and line, for what a kernel cannot repeat: branches on data, ``.item()``, writes, torch
            functions that are not known, whole-tensor arithmetic, float64, tensors that require grad.
        ParameterError: a block mask that is none, or a slice.
    """
    outside_dynamo("from_flex")
    if q_offset is None or (isinstance(q_offset, str) and q_offset != "end"):
        raise VariantError(f'q_offset is {q_offset!r}: required 0 (as in FlexAttention), "end", an int or an int tensor [batch]')
    blocks, made_for = None, None
    if block_mask is not None:
        if mask_mod is not None:
            raise ParameterError("from_flex got mask_mod and block_mask: give one; torch's and_masks(a, b) combines mask_mods")
        if not _is_block_mask(block_mask):
            raise ParameterError(f"block_mask is {block_mask!r:.80}: required a BlockMask; a function belongs to mask_mod=")
        mask_mod, blocks = _mask_of(block_mask)
        made_for = _sizes(block_mask)
    for what, function in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if _is_block_mask(function):
            raise ParameterError(f"{what} is a BlockMask: pass it as block_mask=")
        if function is not None and not callable(function):
            raise ParameterError(f"{what} is {function!r:.80}: required a function")
    found = captures(score_mod, mask_mod)
    variant = FlexVariant(score_mod, mask_mod, blocks, None if isinstance(q_offset, str) else q_offset, found, made_for)
    _check_unwritten(found, score_mod, mask_mod)
    return variant


def _check_unwritten(before: Captures, *hooks: Any) -> None:
    """A hook that changed what it captures would do so once, and not for each element."""
    if before.key is None:
        return
    now = captures(*hooks)
    if now.key != before.key or any(a is not b for (_, a), (_, b) in zip(now.tensors, before.tensors)):
        raise VariantError(
            f"{' or '.join(_label(h) for h in hooks if h is not None)} writes to what it captures (a global, a nonlocal variable, a list or "
            "an attribute) while it is traced. Hooks only read: they are called once, not for each element"
        )


# ---------------------------------------------------------------- flex_attention


@dataclass(frozen=True)
class _Kept:
    """A traced pair of hooks: the variant without values, and where each parameter's value is found among the captured tensors."""

    variant: FlexVariant
    values: tuple[tuple[str, int, Callable[[torch.Tensor], Any]], ...]
    keep: list[Any]


_kept: dict[Any, _Kept] = {}
_MAX_KEPT = 256


def _variant_of(score_mod: Any, mask_mod: Any, blocks: _Blocks | None) -> tuple[FlexVariant, dict[str, Any]]:
    """The variant of two hooks and blocks, traced unless their like has been, and its parameters."""
    found = captures(score_mod, mask_mod)
    tensors = [t for _, t in found.tensors] + ([] if blocks is None else [blocks.state])
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    key = None if found.key is None else (found.key, grad, blocks and blocks.kind)
    kept = None if key is None else _kept.get(key)
    if kept is None:
        variant = FlexVariant(score_mod, mask_mod, blocks, 0, found, bound=False)
        _check_unwritten(found, score_mod, mask_mod)
        parameters = variant.__dict__.pop("_parameters")
        at = {id(t): i for i, t in enumerate(tensors)}
        if key is None or any(id(p.base) not in at for p in parameters.values()):  # captured in a way that the walk does not see
            return variant, {name: p.read(p.base) for name, p in parameters.items()}
        if len(_kept) >= _MAX_KEPT:
            _kept.clear()
        values = tuple((name, at[id(p.base)], p.read) for name, p in parameters.items())
        kept = _kept[key] = _Kept(variant, values, found.keep)
    return kept.variant, {name: read(tensors[i]) for name, i, read in kept.values}


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., Any] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: Any = None,
) -> Any:
    """``torch.nn.attention.flex_attention.flex_attention``, through attngen's kernels. No torch.compile is needed.

    Args:
        query: ``[batch, heads, q_len, head_dim]``.
        key, value: ``[batch, kv_heads, kv_len, head_dim | head_dim_v]``, of one dtype with query. kv_heads other than heads needs
            enable_gqa; a batch of 1 is shared by all queries where there is a block mask.
        score_mod: ``(score, b, h, q_idx, kv_idx) -> score``; ``score`` is float32 whatever query is.
        block_mask: a ``BlockMask`` of these lengths, whose blocks are compared with its mask_mod once, at its first call; or a
            mask_mod itself, for which nothing need be built.
        scale: of the scores; default head_dim ** -0.5.
        return_lse, return_aux: also return the natural-log LSE, float32 ``[batch, heads, q_len]``: ``(out, lse)``, or with
            ``AuxRequest(lse=True)`` ``(out, AuxOutput(lse))``.
        kernel_options: options of torch's kernels, of no meaning to ours.

    Positions count from 0, whatever kv_len is. Hooks are traced once, not at each call: again only if their code, or a Python value
    that they capture, or a captured tensor's shape or dtype is another. Captured tensors are read at each call.

    Raises:
        ParameterError (a ValueError), UnsupportedError, VariantError: what is required, what was found, what to do.
    """
    if is_compiling():
        raise UnsupportedError(
            "flex_attention inside a function that torch.compile traces: make the variant outside, variant = ag.from_flex(score_mod, "
            'mask_mod), and call ag.attention(q, k, v, variant, layout="bhsd") inside'
        )
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, torch.Tensor):
            raise ParameterError(f"{name} is {type(t).__name__}: required a torch.Tensor")
        if t.is_nested or t.dim() != 4:
            what = "a nested tensor" if t.is_nested else f"of shape {tuple(t.shape)}"
            raise ParameterError(f"{name} is {what}: required [batch, heads, seq, head_dim]")
    heads, kv_heads, batch = query.shape[1], key.shape[1], query.shape[0]
    if heads != kv_heads and not enable_gqa:
        raise ParameterError(f"query has {heads} heads and key {kv_heads}: required equal, or enable_gqa=True")
    if return_lse and return_aux is not None:
        raise ParameterError("return_lse and return_aux are both given: required one; AuxRequest(lse=True) is torch's newer form")
    if getattr(return_aux, "max_scores", False):
        raise UnsupportedError("return_aux with max_scores: attngen returns no row maxima; ask for lse alone")
    _check_options(kernel_options)
    mask_mod, blocks = block_mask, None
    if block_mask is not None:
        if _is_block_mask(block_mask):
            _check_block_mask(block_mask, query, key)
            mask_mod, blocks = _mask_of(block_mask)
        elif not callable(block_mask):
            raise ParameterError(f"block_mask is {block_mask!r:.80}: required a BlockMask or a mask_mod")
    if key.shape[0] != batch:
        if block_mask is None or key.shape[0] != 1:
            raise ParameterError(f"query has batch {batch} and key {key.shape[0]}: required equal, or 1 and a block_mask")
        if value.shape[0] != 1:
            raise ParameterError(f"key has batch 1 and value {value.shape[0]}: required equal")
        key, value = (t.expand(batch, *t.shape[1:]) if t.device.type == "cpu" else t.repeat(batch, 1, 1, 1) for t in (key, value))
    if score_mod is None and mask_mod is None and blocks is None:
        variant, params = None, {}
    else:
        variant, params = _variant_of(score_mod, mask_mod, blocks)
    want_lse = return_lse or bool(getattr(return_aux, "lse", False))
    found = attention(query, key, value, variant, layout="bhsd", scale=scale, return_lse=want_lse, **params)
    if return_aux is None:
        return found
    from torch.nn.attention.flex_attention import AuxOutput

    out, lse = found if want_lse else (found, None)
    return out, AuxOutput(lse=lse)


def _check_block_mask(block_mask: Any, query: torch.Tensor, key: torch.Tensor) -> None:
    sizes, found = _sizes(block_mask), (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if sizes is not None and any(want is not None and want != have for want, have in zip(sizes, found)):
        wanted = ", ".join("any" if n is None else str(n) for n in sizes)
        raise ParameterError(
            f"block_mask is made for (batch, heads, q_len, kv_len) = ({wanted}), and the call has {found}: create one of the call's sizes, "
            "or pass its mask_mod itself as block_mask, which fits any"
        )
    if block_mask.kv_num_blocks.device != query.device:
        raise ParameterError(
            f"block_mask is on {block_mask.kv_num_blocks.device} and query on {query.device}: block_mask.to(device) moves it"
        )


@functools.lru_cache(maxsize=1)
def _known_options() -> frozenset[str] | None:
    from torch.nn.attention import flex_attention as torch_flex

    options = getattr(torch_flex, "FlexKernelOptions", None)
    return frozenset(options.__annotations__) if options else None


def _check_options(options: Any) -> None:
    if not options:
        return
    if not isinstance(options, dict):
        raise ParameterError(f"kernel_options is {type(options).__name__}: required a dict or None")
    known = _known_options()
    # forward and backward kernels have options of their own, with a prefix
    unknown = [n for n in options if known is not None and n.removeprefix("fwd_").removeprefix("bwd_") not in known]
    if unknown:
        raise ParameterError(f"kernel_options has {', '.join(map(str, unknown))}: FlexAttention has {', '.join(sorted(known))}")
