"""attngen as an attention implementation of transformers (5.x).

    from attngen.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="attngen")

transformers describes a layer's attention twice: by arguments (`scaling, softcap, sliding_window, s_aux`) and by a mask
function that it evaluates into a [queries, keys] tensor. Both are read here as declarations and composed into one
variant of the library, so that no such tensor is made: causal order and windows reach the kernel as expressions,
left padding as one bool a key, right padding and the unused end of a static cache as lengths. What cannot be declared
so is evaluated as transformers itself does and read by the kernel; what cannot be honoured at all is refused by name.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

import attngen as ag
from attngen import variants
from attngen.errors import ParameterError, UnsupportedError
from attngen.expr import conjuncts

__all__ = ["register"]

log = logging.getLogger("attngen")

# Keyword arguments that models pass on without meaning the attention function: they change neither mask nor logits.
_NOT_FOR_ATTENTION = frozenset(
    "position_ids cache_position use_cache return_dict output_hidden_states output_router_logits "
    "num_items_in_batch logits_to_keep".split()
)
_REMEDIES = {
    "output_attentions": 'the probabilities are never stored; use attn_implementation="eager" to see them',
    "position_bias": "declare it as a variant's logits hook (attngen.variants.T5Bias) and register(variant=...)",
    "head_mask": "declare it as a variant's output hook and register(variant=...)",
    "cache": "continuous batching brings its own paged cache; use model.generate",
    **dict.fromkeys(
        ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
        "packed sequences are understood from position_ids, without lengths: drop these arguments",
    ),
}


def register(
    variant: ag.Variant | type[ag.Variant] | None = None,
    name: str = "attngen",
    *,
    replace_mask: bool = False,
    **params: Any,
) -> None:
    """Make `attn_implementation=name` run attngen, at `from_pretrained` and at `model.set_attn_implementation(name)`.

    Without `variant` the model gets what it declares. With one, it gets that on top: logits are chained (the model's
    soft cap last), masks anded. `replace_mask=True` lets the variant's mask stand in for the model's causal order,
    window and chunks (a prefix LM on a causal model); padding and packed sequences always hold. `params` are values of
    the variant's fields, for every call; register again under the same name to change them.

    Positions: a variant sees each sequence without its padding, position 0 being its first real token. (Left-padded
    keys are gathered for that, a copy a call; without a variant, and with right padding, nothing is copied.)

    A variant that already has a field of the model's argument (`cap` for softcap, `window` for sliding_window) says the
    same thing twice: where the values are equal it is applied once, where they differ the call raises ParameterError.

    Raises:
        ParameterError: a parameter that the variant does not have, or a name that transformers would misread.
        UnsupportedError: a variant with its own `rope` (models rotate q and k before attention), or a transformers
            too old. A call raises it for any argument that cannot be honoured: dropout, output_attentions,
            position_bias, head_mask, a paged cache and all that this release of attngen does not know.
    """
    if not name.isidentifier() or any(word in name for word in ("flash", "sdpa", "flex", "eager", "paged")):
        raise ParameterError(
            "register: a plain name without flash, sdpa, flex, eager or paged in it required, for transformers treats "
            f"those specially; found {name!r}; choose another"
        )
    if "q_length" not in inspect.signature(masking_utils.sdpa_mask).parameters:
        raise UnsupportedError(
            "register: a transformers whose mask functions take q_length required; "
            f"found transformers {transformers.__version__}; upgrade to 5.0 or later"
        )
    if isinstance(variant, type):
        variant = variant()
    if replace_mask and variant is None:
        raise ParameterError("register: a variant required with replace_mask=True; found none; there is no other mask")
    known = variant.trace.fields if variant is not None else {}
    for param in params:
        if param not in known:
            raise ParameterError(
                f"register: a field of the variant ({', '.join(known) or 'it has none'}) required; found {param!r}; "
                "remove or rename it"
            )
    if variant is not None and variant.trace.rope is not None:
        raise UnsupportedError(
            f"register: a variant without rope required, since models rotate q and k themselves; found {variant.name}; "
            "declare it without `rope`"
        )
    AttentionInterface.register(name, _Attention(variant, params, replace_mask))
    AttentionMaskInterface.register(name, _make_mask)


# ---------------------------------------------------------------- what a model's mask says


class Padding(ag.Variant):
    """Keys that are there: what is left of a 2-D attention mask, for left padding and for holes."""

    keep: ag.Tensor("requests", "positions", dtype=bool)

    def mask(self, at):
        return self.keep[at.request, at.kv]


class Band(ag.Variant):
    """A window to both sides: at most `reach` tokens away."""

    reach: ag.Scalar[int]

    def mask(self, at):
        return (at.q - at.kv <= self.reach) & (at.kv - at.q <= self.reach)


class Chunk(ag.Variant):
    """Llama 4's local attention in padded sequences: chunks are counted from each one's first real token."""

    chunk: ag.Scalar[int]
    chunk_start: ag.Tensor("requests", dtype=int)

    def mask(self, at):
        start = self.chunk_start[at.request]
        return (at.kv - start) // self.chunk == (at.q - start) // self.chunk


class Dense(ag.Variant):
    """A mask that came as a tensor, its rows from position `first` on. Every element of it is read."""

    first: ag.Scalar[int]
    allowed: ag.Tensor("requests", "rows", "positions", dtype=bool)

    def mask(self, at):
        return self.allowed[at.request, at.q - self.first, at.kv]


@dataclass(frozen=True)
class _Pattern:
    """The part of a mask that depends on positions; conjunction of what is set."""

    causal: bool = False
    window: int | None = None  # keys, the query's own included
    reach: int | None = None  # tokens to either side
    chunk: int | None = None
    chunk_start: torch.Tensor | None = None  # [batch], position of the first real token; None: 0 for all
    document: torch.Tensor | None = None  # [batch, positions], which packed sequence a token belongs to

    def __and__(self, other: _Pattern) -> _Pattern | None:
        """Both; None where both set one thing differently."""
        merged = {}
        for name, default in _NO_PATTERN.items():
            a, b = getattr(self, name), getattr(other, name)
            if a is default or b is default:
                merged[name] = b if a is default else a
            elif a is b or not isinstance(a, torch.Tensor) and a == b:
                merged[name] = a
            else:
                return None
        return _Pattern(**merged)


_NO_PATTERN = vars(_Pattern())


def _read(function: Callable[..., Any]) -> _Pattern | None:
    """The pattern of one of transformers' mask functions; None for one that is not known.

    They are closures over a few named values, so that they can be recognised by the factory they come from.
    """
    if function is masking_utils.causal_mask_function:
        return _Pattern(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return _Pattern()
    if getattr(function, "__module__", None) != masking_utils.__name__ or not function.__closure__:
        return None
    held = dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__)))
    factory = function.__qualname__.partition(".")[0]
    if factory == "and_masks":
        pattern: _Pattern | None = _Pattern()
        for part in held["mask_functions"]:
            found = _read(part)
            pattern = None if pattern is None or found is None else pattern & found
        return pattern
    if factory == "sliding_window_overlay":
        return _Pattern(window=int(held["sliding_window"]))
    if factory == "sliding_window_bidirectional_overlay":
        return _Pattern(reach=int(held["sliding_window"]))
    if factory == "chunked_overlay":
        return _Pattern(chunk=int(held["chunk_size"]), chunk_start=held["left_padding"])
    if factory == "packed_sequence_mask_function":
        return _Pattern(document=held["packed_sequence_mask"])
    if factory == "remap_positions_for_packed_sequence":
        inner = _read(held["mask_function"])
        # Distances within a sequence stay what they were; chunks would have to be counted anew in each.
        return inner if inner is not None and inner.chunk is None else None
    return None


@dataclass(eq=False)
class _Facts:
    """All that a mask says, for one forward pass of the model."""

    batch_size: int
    q_length: int
    kv_length: int
    start: int  # the first query's position, counted from the first key that the cache still holds
    dropped: int  # keys that a sliding cache has dropped before it
    pattern: _Pattern = _Pattern()
    keep: torch.Tensor | None = None  # bool [batch, used], False at padding; None where there is none
    lens: list[int] | None = None  # [batch], where padding is all on the right: it then replaces `keep`
    dense: torch.Tensor | None = None  # bool [batch, q_length, kv_length], padding included
    plans: dict[Any, _Plan] = field(default_factory=dict)  # by what a layer's arguments say

    @property
    def used(self) -> int:
        """Keys that can be seen at all: the rest of a static cache is not written yet."""
        return min(self.kv_length, self.start + self.q_length) if self.pattern.causal else self.kv_length

    @property
    def is_plain(self) -> bool:
        """Whether positions count real tokens already."""
        return self.keep is None and self.dropped == 0

    @property
    def aligned(self) -> bool:
        """Whether the last query meets the last key, as attngen supposes where q_offset is not given."""
        return self.lens is None and self.start == self.used - self.q_length


class Mask(torch.Tensor):
    """What the mask function hands to the model, and the model to the attention function: `facts`, in the shape of the
    [batch, 1, queries, keys] tensor that models expect to pass around (one byte of storage)."""

    facts: _Facts | None = None

    @staticmethod
    def of(facts: _Facts, device: torch.device | str) -> Mask:
        shape = (facts.batch_size, 1, facts.q_length, facts.kv_length)
        mask = torch.ones((), dtype=torch.bool, device=device).expand(shape).as_subclass(Mask)
        mask.facts = facts
        return mask

    def contiguous(self, *args: Any, **kwargs: Any) -> Mask:
        return self  # generate() asks for it; there is nothing to lay out


def _make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **_: Any,  # what lets other implementations skip the mask, and their dtype
) -> Mask:
    """transformers' mask interface: called once a forward pass for each kind of layer."""
    first, kv_offset = int(q_offset), int(kv_offset)  # a static cache counts in a tensor that it updates in place
    facts = _Facts(batch_size, q_length, kv_length, first - kv_offset, kv_offset)
    pattern = _read(mask_function)
    if pattern is None or (pattern.window or pattern.chunk) and not pattern.causal:
        _warn_dense(getattr(mask_function, "__qualname__", repr(mask_function)))
        facts.dense = masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, first, kv_offset, mask_function, attention_mask,
            allow_is_causal_skip=False, use_vmap=use_vmap, device=device,
        )[:, 0]  # fmt: skip
    else:
        if pattern.chunk_start is not None:
            start = pattern.chunk_start.to(device=device, dtype=torch.int32).expand(batch_size) - kv_offset
            pattern = replace(pattern, chunk_start=start if bool(start.any()) else None)
        facts.pattern = pattern
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        keep = padding[:, kv_offset : kv_offset + facts.used].to(torch.bool)
        lens = keep.sum(1, dtype=torch.int32)
        if not bool((lens == facts.used).all()):
            on_the_right = bool((keep == (torch.arange(facts.used, device=keep.device) < lens[:, None])).all())
            facts.lens, facts.keep = (lens.tolist(), None) if on_the_right else (None, keep)
    return Mask.of(facts, device)


@lru_cache(maxsize=None)  # once for each
def _warn_dense(function: str) -> None:
    log.warning("mask function %s is evaluated into a [queries, keys] tensor, as transformers does it", function)


# ---------------------------------------------------------------- the attention function


@dataclass(frozen=True)
class _Plan:
    """One layer's call, but for the tensors and numbers that the model passes each time."""

    variant: ag.Variant
    params: Mapping[str, Any]
    cap: str | None  # the parameter that the model's softcap goes to
    sink: str | None  # and its s_aux
    used: int
    kv_lens: list[int] | None = None
    q_offset: int | None = None
    gather: _Gather | None = None


class _Attention:
    """transformers' attention interface for one registered variant."""

    def __init__(self, variant: ag.Variant | None, params: Mapping[str, Any], replace_mask: bool) -> None:
        self.variant, self.params, self.replace_mask = variant, params, replace_mask
        self.composed: dict[Any, ag.Variant] = {}
        mask = None if variant is None else variant.trace.mask
        causal = variants.Causal().trace.mask  # nodes are interned, so equal terms are one object
        self.is_causal = mask is not None and any(term is causal for term in conjuncts(mask))

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        s_aux: torch.Tensor | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """query [batch, heads, queries, head_dim], key and value [batch, kv_heads, keys, dim] -> [batch, queries,
        heads, dim]."""
        if dropout:
            raise _unsupported("dropout", dropout, "call model.eval(), or set attention_dropout to 0")
        for name, given in kwargs.items():
            if given is not None and given is not False and name not in _NOT_FOR_ATTENTION:
                remedy = 'it may change the result, so it is not ignored; use attn_implementation="sdpa"'
                raise _unsupported(name, given, _REMEDIES.get(name, remedy))
        own = None if self.variant is None else self.variant.trace.scale
        if own is not None and scaling is not None and own != scaling:
            raise ParameterError(f"scaling: the variant's own scale {own} required; found {scaling}; drop one of them")
        facts = _facts_of(attention_mask, module, query, key, is_causal)
        layer = (softcap, sliding_window, s_aux is not None)
        plan = facts.plans.get((self, layer))
        if plan is None:
            plan = facts.plans[self, layer] = self._plan(facts, *layer)

        params = dict(plan.params)
        if plan.cap is not None:
            params[plan.cap] = softcap
        if plan.sink is not None:
            params[plan.sink] = s_aux
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if plan.used < key.shape[2]:
            k, v = k[:, : plan.used], v[:, : plan.used]
        if plan.gather is not None:
            return plan.gather.attention(q, k, v, variant=plan.variant, scale=scaling, **params), None
        out = ag.attention(
            q, k, v, variant=plan.variant, layout="bshd", scale=scaling,
            kv_lens=plan.kv_lens, q_offset=plan.q_offset, **params,
        )  # fmt: skip
        return out, None

    def _plan(self, facts: _Facts, softcap: float | None, sliding_window: int | None, has_sink: bool) -> _Plan:
        # A mask that came as a tensor has the layer's window in it.
        pattern = facts.pattern if facts.dense is not None else _with_window(facts.pattern, sliding_window)
        if self.replace_mask:
            pattern = _Pattern(document=pattern.document)
        said = self._said(softcap, pattern.window, has_sink)
        gather = None
        if self.variant is not None and not facts.is_plain:
            gather = self._gather(facts)
            pattern = replace(pattern, chunk_start=None)

        parts, params = {}, dict(self.params)
        if pattern.window is not None and "window" not in said:  # it is causal too
            parts["window"], params[_field(variants.SlidingWindow)] = variants.SlidingWindow, pattern.window
        elif pattern.causal and not self.is_causal:
            parts["causal"] = variants.Causal
        if pattern.reach is not None:
            parts["reach"], params["reach"] = Band, pattern.reach
        if pattern.chunk is not None:
            parts["chunk"], params["chunk"] = variants.Chunked if pattern.chunk_start is None else Chunk, pattern.chunk
            if pattern.chunk_start is not None:
                params["chunk_start"] = pattern.chunk_start
        if pattern.document is not None:
            parts["document"], params["doc"] = variants.Document, pattern.document
        if facts.dense is not None:
            parts["dense"], params["first"], params["allowed"] = Dense, facts.start, facts.dense
        elif facts.keep is not None and gather is None:
            parts["keep"], params["keep"] = Padding, facts.keep
        if softcap is not None and "cap" not in said:
            parts["cap"] = variants.SoftCap
        if has_sink:
            parts["sink"] = variants.Sinks

        return _Plan(
            self._compose(parts), params, _field(variants.SoftCap) if "cap" in parts else None,
            _field(variants.Sinks) if has_sink else None, facts.used, facts.lens,
            None if facts.aligned else facts.start, gather,
        )  # fmt: skip

    def _compose(self, parts: Mapping[str, type[ag.Variant]]) -> ag.Variant:
        """The variant of these parts, made once."""
        key = tuple(parts.values())
        variant = self.composed.get(key)
        if variant is None:
            own = [] if self.variant is None else [self.variant]
            made = [*own, *(part() for part in key)]
            variant = self.composed[key] = ag.compose(*made) if made else variants.Full()
        return variant

    def _said(self, softcap: float | None, window: int | None, has_sink: bool) -> set[str]:
        """What the model passes and the registered variant says already, in the same words."""
        said: set[str] = set()
        if self.variant is None:
            return said
        if has_sink and self.variant.trace.sink is not None:
            raise ParameterError(
                f"s_aux: one attention sink required; found the model's and {self.variant.name}'s; drop the variant's"
            )
        for argument, given, part in (
            ("softcap", softcap, variants.SoftCap),
            ("sliding_window", window, variants.SlidingWindow),
        ):
            name = _field(part)
            if given is None or name not in self.variant.trace.fields:
                continue
            own = self.params.get(name, self.variant.values[name])
            if own is None or float(own) != float(given):
                raise ParameterError(
                    f"{argument}: one value required; found the model's {given} and {name}={own} of "
                    f"{self.variant.name}; register with {name}={given}, or without that part"
                )
            said.add(name)
        return said

    def _gather(self, facts: _Facts) -> _Gather:
        if facts.dropped:
            raise _unsupported(
                "past_key_values", "a sliding-window cache that has dropped keys",
                "a registered variant counts positions from the first token; pass past_key_values=DynamicCache()",
            )  # fmt: skip
        if not facts.pattern.causal or facts.dense is not None:
            raise _unsupported(
                "attention_mask", "padding that is not all on the right, in a layer that is not plainly causal",
                "pad on the right, or register without a variant",
            )  # fmt: skip
        return _Gather(facts.keep, facts.start, facts.q_length)


class _Gather:
    """Attention over the real tokens of padded sequences, moved together, as variants of absolute positions need it."""

    def __init__(self, keep: torch.Tensor, start: int, q_length: int) -> None:
        """`keep` bool [batch, keys]; queries are the last `q_length` of them, from `start`."""
        self.kv_lens = keep.sum(1).tolist()
        self.kv_index = _kept_first(keep, max(self.kv_lens))
        queries = keep[:, start : start + q_length]
        self.q_lens = queries.sum(1).tolist()
        self.q_index = _kept_first(queries, q_length)
        self.all_queries = min(self.q_lens) == q_length

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> torch.Tensor:
        """As ag.attention in layout bshd; rows of padding are 0."""
        k, v = _rows(k, self.kv_index), _rows(v, self.kv_index)
        if self.all_queries:
            return ag.attention(q, k, v, layout="bshd", kv_lens=self.kv_lens, **rest)
        q = _rows(q, self.q_index)
        out = ag.attention(q, k, v, layout="bshd", q_lens=self.q_lens, kv_lens=self.kv_lens, **rest)
        return torch.empty_like(out).scatter_(1, self.q_index[..., None, None].expand_as(out), out)


def _kept_first(keep: torch.Tensor, count: int) -> torch.Tensor:
    """Indices [batch, count] of the kept columns in order, then of others."""
    return (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def _rows(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return x.gather(1, index[..., None, None].expand(-1, -1, *x.shape[2:]))


def _facts_of(
    mask: torch.Tensor | None, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, is_causal: bool | None
) -> _Facts:
    """What the mask says: ours, a [batch, 1, queries, keys] tensor of the caller's, or none."""
    batch, q_length, kv_length = query.shape[0], query.shape[2], key.shape[2]
    if isinstance(mask, Mask):
        facts = mask.facts
        if facts is None:
            raise _unsupported("attention_mask", "attngen's mask, changed by the model", "use another one")
        made = (facts.batch_size, facts.q_length, facts.kv_length)
        if made != (batch, q_length, kv_length):
            raise _unsupported("attention_mask", f"a mask for batch, queries, keys {made}",
                               f"this layer has {(batch, q_length, kv_length)}")  # fmt: skip
        return facts
    facts = _Facts(batch, q_length, kv_length, kv_length - q_length, 0)
    if mask is not None:
        facts.dense = _dense(mask, batch, q_length, kv_length)
        return facts
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if causal and q_length not in (1, kv_length):
        raise _unsupported(
            "attention_mask", f"None, with is_causal and {q_length} queries of {kv_length} keys",
            "it does not say where the queries lie; pass a mask",
        )  # fmt: skip
    facts.pattern = _Pattern(causal=bool(causal))
    return facts


def _dense(mask: torch.Tensor, batch: int, q_length: int, kv_length: int) -> torch.Tensor:
    """A caller's own mask as bool [batch, queries, keys]."""
    wanted = (batch, 1, q_length, kv_length)
    if mask.dim() != 4 or any(have not in (1, want) for have, want in zip(mask.shape, wanted)):
        raise _unsupported("attention_mask", f"shape {tuple(mask.shape)}", f"pass 2-D [batch, keys], or 4-D {wanted}")
    if mask.dtype != torch.bool:
        lowest = torch.finfo(mask.dtype).min if mask.dtype.is_floating_point else None
        allowed = mask == 0
        if lowest is None or not bool((allowed | (mask <= lowest)).all()):
            raise _unsupported(
                "attention_mask", f"{mask.dtype} with values other than 0 and its lowest",
                "a mask is bool, or 0 and the lowest float; declare a bias as a variant's logits hook",
            )  # fmt: skip
        mask = allowed
    return mask.expand(wanted)[:, 0]


def _with_window(pattern: _Pattern, sliding_window: int | None) -> _Pattern:
    """The pattern, with the window that the layer passes beside its mask."""
    if sliding_window is None:
        return pattern
    if pattern.reach is not None:
        # transformers' flash kernels count the query itself, its two-sided masks do not: models pass either
        agree = sliding_window - pattern.reach in (0, 1)
    elif pattern.causal:
        agree = pattern.window in (None, sliding_window)
        pattern = replace(pattern, window=int(sliding_window))
    else:
        agree = False
    if not agree:
        raise _unsupported(
            "sliding_window", sliding_window,
            f"the mask that came with it says window {pattern.window or pattern.reach}, "
            f"{'causal' if pattern.causal else 'not causal'}; make both say the same",
        )  # fmt: skip
    return pattern


@lru_cache(maxsize=None)
def _field(part: type[ag.Variant]) -> str:
    """The one field of a library variant."""
    (name,) = part.fields
    return name


def _unsupported(argument: str, found: Any, remedy: str) -> UnsupportedError:
    shown = f"a tensor {tuple(found.shape)}" if isinstance(found, torch.Tensor) else f"{found}"
    return UnsupportedError(f"attngen attention cannot honour `{argument}`: found {shown}; {remedy}")
