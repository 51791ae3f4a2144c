"""Declaring a variant: typed fields, hooks, composition.

A ``Variant`` subclass lists its parameters as annotated fields and its behaviour as hooks; an instance is traced when it
is made, so a bad hook fails there, at the user's line. The traced structure, not the text, is what gets compiled:
values of ``Scalar`` and ``Tensor`` fields are run-time arguments and never enter a key.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import math
import weakref
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.compiler import is_dynamo_compiling

from . import expr
from .errors import VariantError
from .expr import COL, LEVEL_NAMES, Node, Where, fail, symbol, text, verify, walk
from .fields import Field, check_value, declared_fields, plain_number
from .records import record
from .trace import HOOKS, POSITION, Point, TensorSymbol, call_user, definition, kinds, trace_hook

if TYPE_CHECKING:
    from .rope import RoPE


# A call passes parameters by name beside its own arguments.
_CALL_ARGUMENTS = frozenset("q k v out variant layout q_lens kv_lens q_offset return_lse lse".split())


# ---------------------------------------------------------------- the traced form


@record
class RopeTrace:
    """A traced RoPE: row-wise query positions (one per kind of key), the key's position, which kind a key is."""

    rope: RoPE
    q_positions: tuple[Node, ...]
    kv_position: Node
    kind: Node | None


@record
class Trace:
    """A variant as nodes: what every later stage works on. None marks a hook that was not given."""

    query_scale: Node | None = None
    logits: Node | None = None
    mask: Node | None = None
    sink: Node | None = None
    weight: Node | None = None
    output: Node | None = None
    rope: RopeTrace | None = None
    scale: float | None = None
    fields: Mapping[str, Field] = field(default_factory=dict)  # scalars and tensors, in order of declaration
    where: Mapping[Node, Where] = field(default_factory=dict)

    def hooks(self) -> dict[str, Node]:
        """The hooks that are given, by name."""
        return {name: node for name in HOOKS if (node := getattr(self, name)) is not None}

    def roots(self) -> dict[str, Node]:
        """Hooks and RoPE positions, by name."""
        found = self.hooks()
        if self.rope:
            found |= {f"rope.q_position{i}": node for i, node in enumerate(self.rope.q_positions)}
            found["rope.kv_position"] = self.rope.kv_position
            if self.rope.kind is not None:
                found["rope.kind"] = self.rope.kind
        return found

    def used(self) -> dict[str, Field]:
        """The fields that some hook reads."""
        names = frozenset().union(*(node.params for node in self.roots().values()), ())
        return {name: f for name, f in self.fields.items() if name in names}

    def key(self, head_dim: int | None = None) -> str:
        """Hash of the structure: the same in every process, whatever the values of scalars and tensors."""
        parts = [(name, node.key) for name, node in sorted(self.roots().items())]
        used = [(name, f.kind, f.dtype, f.axes) for name, f in sorted(self.used().items())]
        rope = sorted(self.rope.rope.structure(head_dim).items()) if self.rope and head_dim else bool(self.rope)
        return hashlib.sha256(repr((parts, used, rope)).encode()).hexdigest()[:32]


# ---------------------------------------------------------------- variants


class _VariantMeta(type):
    """Traces an instance as soon as its ``__init__`` is done."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        instance = super().__call__(*args, **kwargs)
        instance.__dict__["trace"] = instance._trace()
        _check_q_offset(instance.name, instance.q_offset)
        instance.__dict__["_bare"] = _bare(instance.name, instance.trace)
        return instance

    def __and__(cls, other: Any) -> Any:
        raise _class_combined(cls, "&")

    __rand__ = __and__

    def __or__(cls, other: Any) -> Any:  # of classes and None: a type, as in annotations
        if isinstance(other, Variant):
            raise _class_combined(cls, "|")
        return super().__or__(other)

    def __ror__(cls, other: Any) -> Any:
        if isinstance(other, Variant):
            raise _class_combined(cls, "|")
        return super().__ror__(other)

    def __invert__(cls) -> Any:
        raise _class_combined(cls, "~")


def _class_combined(cls: type, sign: str) -> VariantError:
    return fail(f"`{sign}` combines instances, and {cls.__name__} is a class", f"Write {cls.__name__}(...)")


class Variant(metaclass=_VariantMeta):
    """An attention variant. Subclass it, annotate fields with Scalar, Const or Tensor, and give any of the hooks
    ``scale, query_scale, rope, logits, mask, sink, weight, output``.

    Instances are immutable; ``SlidingWindow(window=1024)`` binds a value in place of the default, and every call may
    pass its own. ``a & b``, ``a | b`` and ``~a`` combine variants that only mask; ``ag.compose`` combines any.

    Raises:
        VariantError: at the user's file and line, for a field or hook that is not as declared above.
    """

    fields: ClassVar[dict[str, Field]] = {}
    trace: Trace
    q_offset: ClassVar[Any] = None  # where a call gives none: an int, an int tensor [batch]; None: kv_len - q_len
    _made_for: ClassVar[tuple[int | None, int | None, int, int] | None] = None  # batch, heads, q_len, kv_len that a call must have

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        declared = declared_fields(cls)
        cls.fields = {**cls.fields, **declared}
        for name in {**vars(cls), **declared}:
            _check_name(cls, name, declared)

    def __init__(self, *args: Any, **values: Any) -> None:
        outside_dynamo(type(self).__name__)
        names = list(self.fields)
        if len(args) > len(names):
            raise fail(f"{self.name}() got {len(args)} values for its fields ({', '.join(names)})", "Give one each")
        for name, value in zip(names, args):
            if name in values:
                raise fail(f"{self.name}() got two values for field `{name}`", "Give one")
            values[name] = value
        for name in values:
            if name not in self.fields:
                raise fail(
                    f"{self.name}() got an unknown field `{name}`", f"It has ({', '.join(names) or 'no fields'})"
                )
        for name, declared in self.fields.items():
            value = values.get(name, getattr(type(self), name, None))
            if value is None and declared.kind == "const":
                raise fail(f"{self.name}() got no value for Const `{name}`", f"Pass it: {self.name}({name}=...)")
            self.__dict__[name] = check_value(self.name, name, declared, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if "trace" in self.__dict__:
            raise fail(
                f"`{self.name}.{name}` is assigned: variants are immutable",
                f"Make another ({type(self).__name__}({name}=...)) or pass {name}=... at the call",
            )
        self.__dict__[name] = value

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_sites"}  # these hold loaded kernels

    @property
    def name(self) -> str:
        """The variant's name, for people; it never enters a key."""
        return type(self).__name__

    @property
    def structure_hash(self) -> str:
        """Hash of the traced structure, the same in every process; a kernel's spec hash adds problem and config."""
        return self.trace.key()

    @property
    def values(self) -> dict[str, Any]:
        """The bound or default values of scalar and tensor fields; None where the call must pass one."""
        return {name: self.__dict__.get(name) for name in self.trace.fields}

    def _trace(self) -> Trace:
        locations: dict[Node, Where] = {}
        proxy = object.__new__(type(self))  # a true instance, so that super() and helper methods work
        proxy.__dict__.update(self.__dict__)
        runtime = {n: f for n, f in self.fields.items() if f.kind != "const"}
        for name, f in runtime.items():
            proxy.__dict__[name] = expr.param(name, f.dtype) if f.kind == "scalar" else TensorSymbol(name, f.dtype, f.axes)
        proxy.__dict__["trace"] = Trace()  # makes assignment inside a hook an error
        found: dict[str, Any] = {}
        for name, hook in HOOKS.items():
            function = getattr(proxy, name, None)
            if function is not None:
                if not callable(function):
                    raise fail(f"hook `{name}` of {self.name} is {function!r}", f"Declare it as a method: def {name}(...)")
                found[name] = trace_hook(name, function, hook, locations)
        rope = getattr(proxy, "rope", None)
        if callable(rope):
            rope = call_user("rope", rope, *([Point("rope", POSITION.reads)] if _takes_argument(rope) else []))
        trace = Trace(
            scale=_scale(self.name, proxy), rope=_trace_rope(rope, locations), fields=runtime, where=locations, **found
        )
        check_trace(self.name, trace)
        return trace

    # ---- mask algebra
    def __and__(self, other: Variant) -> Variant:
        return Composed("&", (self, other)) if isinstance(other, Variant) else NotImplemented

    def __or__(self, other: Variant) -> Variant:
        return Composed("|", (self, other)) if isinstance(other, Variant) else NotImplemented

    def __invert__(self) -> Variant:
        return Composed("~", (self,))

    def __repr__(self) -> str:
        bound = (f"{n}={v if not isinstance(v, torch.Tensor) else '<tensor>'}" for n, v in self.__dict__.items()
                 if n in self.fields and v is not None)  # fmt: skip
        return f"{self.name}({', '.join(bound)})"

    def explain(self) -> str:
        """What attngen understood: each hook as an expression, what is computed at which level, the mask's bounds."""
        trace = self.trace
        lines = [f"{self!r}", f"structure {self.structure_hash}"]
        if self.q_offset is not None:
            given = f"the tensor q_offset {list(self.q_offset.shape)}" if isinstance(self.q_offset, torch.Tensor) else self.q_offset
            lines.append(f"queries count from {given}")
        for name, f in trace.fields.items():
            axes = f"[{', '.join(map(str, f.axes))}]" if f.kind == "tensor" else ""
            unused = "" if name in trace.used() else ", read by no hook"
            lines.append(f"  {name}: {f.kind} {f.dtype}{axes}, runtime{unused}")
        for name, node in trace.roots().items():
            lines.append(f"{name} = {text(node)}")
            lines.extend(f"  {label}: {text(n)}" for label, n in _hoisted(node))
        if trace.rope:
            lines.append(f"rope = {trace.rope.rope}")
        if trace.mask is not None:
            from .classes import findings

            lines += [f"{what}    from {term}" for what, term in findings(trace.mask)]
        return "\n".join(lines)


def outside_dynamo(what: str) -> None:
    """Raises VariantError where torch.compile is tracing."""
    if is_dynamo_compiling():  # it makes objects without their metaclass
        raise VariantError(
            f"{what} is made inside a function that torch.compile traces: required outside, since hooks are not traced there; "
            "make the variant before, use it inside, and pass what changes as parameters of the call"
        )


def _hoisted(root: Node) -> list[tuple[str, Node]]:
    """The largest subexpressions that are computed once per call, request, row or column."""
    found: dict[Node, str] = {}
    for node in walk(root):
        for a in node.args:
            if a.args and a.level < node.level and a.level <= COL:
                found[a] = LEVEL_NAMES[a.level]
    return [(label, node) for node, label in found.items()]


def _takes_argument(function: Callable[..., Any]) -> bool:
    return bool(inspect.signature(function).parameters)


def _scale(owner: str, proxy: Variant) -> float | None:
    scale = getattr(proxy, "scale", None)
    if callable(scale):
        scale = call_user("scale", scale)
    if scale is None:
        return None
    if isinstance(scale, Node):
        raise fail(
            f"`scale` of {owner} is the symbol {text(scale)}", "scale is a number; use query_scale(at) for an expression"
        )
    scale = plain_number(scale)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise fail(f"`scale` of {owner} is {scale!r}", "scale is a finite number; the default is head_dim ** -0.5")
    return float(scale)


def _trace_rope(rope: Any, locations: dict[Node, Where]) -> RopeTrace | None:
    if rope is None:
        return None
    from .rope import RoPE

    if not isinstance(rope, RoPE):
        raise fail(f"`rope` is {rope!r}", "Give ag.RoPE(theta, ...) as an attribute or return it from def rope(self, at)")
    positions = []
    for name, given in (("q_position", rope.q_position), ("kv_position", rope.kv_position)):
        default = symbol("q" if name == "q_position" else "kv")
        function = given if callable(given) else (lambda at, value=given: value)
        positions.append(default if given is None else trace_hook(f"rope {name}", function, POSITION, locations))
    q_position, kv_position = positions
    if kv_position.symbols & {"q", "q_token", "head", "kv_head"}:
        raise fail(
            f"kv_position `{text(kv_position)}` reads the query or the head", "It may depend on at.kv and the request only: keys are rotated once"
        )
    if rope.keys == "cached" and rope.kv_position is not None:
        raise fail('kv_position is given with keys="cached"', 'Cached keys are rotated already; use keys="rotate"')
    rows, kind = kinds(q_position)
    return RopeTrace(rope, tuple(rows), kv_position, kind)


def check_trace(owner: str, trace: Trace) -> None:
    """Raises VariantError for hooks that exclude each other or have another type than theirs."""
    verify(trace.roots().values())
    if trace.weight is not None and trace.sink is not None:
        raise fail(f"{owner} has both `weight` and `sink`", "weight replaces softmax, so there is no denominator to add to")


def _check_q_offset(owner: str, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        good = value.dim() == 1 and value.dtype in (torch.int32, torch.int64)
        found = f"{value.dtype} {tuple(value.shape)}"
    else:
        good = value is None or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**30)
        found = repr(value)
    if not good:
        raise fail(
            f"`q_offset` of {owner} is {found}",
            "Give the position of the first query: an int below 2**30, an int32 or int64 tensor [batch], or None for kv_len - q_len",
        )


# What other systems call our hooks.
_OTHER_NAMES = {"score_mod": ["logits"], "mask_mod": ["mask"], "logits_transform": ["logits"], "logits_mask": ["mask"],
                "bias": ["logits"], "output_transform": ["output"], "score": ["logits"], "mask_fn": ["mask"],
                "sink_logit": ["sink"]}  # fmt: skip


def _check_name(cls: type, name: str, declared: Mapping[str, Field]) -> None:
    """A public method whose name nearly is a hook's is a typo, not a helper: it would be dropped silently."""
    known = [*HOOKS, "scale", "rope"]
    if name in declared and (name in RESERVED or not name.isascii() or name.startswith("_")):
        raise fail(
            f"field `{name}` of {cls.__name__} is no ASCII name, begins with an underscore or is that of a hook, of an attribute of Variant or of an "
            "argument of ag.attention", "Rename it"
        )
    if name.startswith("_") or name in known or name in declared or name in dir(Variant):
        return
    value = vars(cls).get(name)
    close = _OTHER_NAMES.get(name) or difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.75)
    if callable(value) and close:
        remedy = f"Did you mean `{close[0]}`? Prefix helpers with an underscore"
        raise fail(f"{cls.__name__}.{name} is no hook and would be ignored", remedy, definition(value))


class Bare(Variant):
    """A variant without its values, one for all that say the same: what ``handle`` stands for in a compiled graph."""

    @property
    def name(self) -> str:
        return self.__dict__["_name"]

    @property
    def handle(self) -> str:
        return self.__dict__["_handle"]

    @property
    def reads(self) -> tuple[str, ...]:
        """The parameters that some hook reads."""
        return self.__dict__["_reads"]

    def __reduce__(self) -> Any:
        return _bare, (self.name, self.trace)


bare_variants: weakref.WeakValueDictionary[str, Bare] = weakref.WeakValueDictionary()  # by handle


def _bare(name: str, trace: Trace) -> Bare:
    rope = trace.rope and replace(trace.rope.rope, q_position=None, kv_position=None)  # the trace's key has positions
    said = (name, trace.key(), [*trace.fields.items()], trace.scale, rope)
    handle = f"{name}-{hashlib.sha256(repr(said).encode()).hexdigest()[:32]}"
    found = bare_variants.get(handle)
    if found is None:
        found = object.__new__(Bare)
        found.__dict__.update(_name=name, trace=trace, _handle=handle, _reads=tuple(trace.used()))
        bare_variants[handle] = found
    return found


# Names that no field can have.
RESERVED = frozenset(("trace", *HOOKS, "scale", "rope", *dir(Variant), *_CALL_ARGUMENTS))


# ---------------------------------------------------------------- composition


class Composed(Variant):
    """Several variants as one. Made by ``compose`` and by the mask algebra."""

    def __init__(self, how: str, parts: tuple[Variant, ...]) -> None:
        outside_dynamo("a composition")
        self._how, self._parts = how, parts
        if how != "compose":
            for part in parts:
                extra = [n for n in part.trace.hooks() if n != "mask"] + (["rope"] if part.trace.rope else [])
                if extra or part.trace.scale is not None:
                    raise fail(
                        f"`{how}` on {part.name}, which also has {', '.join(extra) or 'scale'}",
                        "& | ~ combine variants that only mask; use ag.compose(a, b) for the rest",
                    )
        seen: dict[str, str] = {}
        for part in parts:
            for name in part.trace.used():
                if name in seen:
                    raise fail(
                        f"{seen[name]} and {part.name} both have a field `{name}`",
                        f"Rename one: subclass it and annotate another name, so that {name}=... at the call is one value",
                    )
                seen[name] = part.name
        for part in parts:
            for name in part.trace.fields:
                if name in part.trace.used() or name not in seen:
                    self.__dict__[name] = part.__dict__.get(name)
        for name, value in (("q_offset", self._shared_offset()), ("_made_for", self._shared_sizes())):
            if value is not None:
                self.__dict__[name] = value

    def _shared_offset(self) -> Any:
        """The parts' q_offset: one that reads no position goes with any."""
        parts = [p for p in self._parts if p.q_offset is not None or any("q" in n.symbols for n in p.trace.roots().values())]
        first = parts[0] if parts else None
        for part in parts[1:]:
            a, b = first.q_offset, part.q_offset
            if a is not b and (isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor) or a != b):
                words = ["from the end" if x is None else "from a tensor" if isinstance(x, torch.Tensor) else f"from {x}" for x in (a, b)]
                raise fail(
                    f"{first.name} counts queries {words[0]} and {part.name} {words[1]}",
                    'Give both one q_offset: ag.from_flex(..., q_offset="end"), or the attribute q_offset of a class',
                )
        return first.q_offset if first else None

    def _shared_sizes(self) -> Any:
        found = [p._made_for for p in self._parts if p._made_for]
        for sizes in found[1:]:
            if sizes != found[0]:
                raise fail(f"block masks of {found[0]} and {sizes} are combined", "Give block masks of one batch, heads, q_len and kv_len")
        return found[0] if found else None

    @property
    def name(self) -> str:
        names = [p.name for p in self._parts]
        if self._how == "compose":
            return f"compose({', '.join(names)})"
        return f"~{names[0]}" if self._how == "~" else f"({f' {self._how} '.join(names)})"

    def __repr__(self) -> str:
        parts = [repr(p) for p in self._parts]
        if self._how == "compose":
            return f"compose({', '.join(parts)})"
        return f"~{parts[0]}" if self._how == "~" else f"({f' {self._how} '.join(parts)})"

    def _trace(self) -> Trace:
        traces = [p.trace for p in self._parts]
        true = expr.const(True)
        masks = [t.mask if t.mask is not None else true for t in traces]
        if self._how == "&" or self._how == "compose":
            mask = None if all(t.mask is None for t in traces) else expr.const(True)
            for m in masks if mask is not None else ():
                mask = m if mask is true else mask & m
        else:
            mask = ~masks[0] if self._how == "~" else masks[0] | masks[1]
        logits, output, query_scale = None, None, None
        for t in traces:
            logits = _chain(logits, t.logits, "s")
            output = _chain(output, t.output, "o")
            if t.query_scale is not None:
                query_scale = t.query_scale if query_scale is None else query_scale * t.query_scale
        trace = Trace(
            query_scale=query_scale, logits=logits, mask=mask, output=output,
            sink=self._only("sink"), weight=self._only("weight"), rope=self._only("rope"), scale=self._only("scale"),
            fields={n: f for t in traces for n, f in t.fields.items()} | {n: f for t in traces for n, f in t.used().items()},
            where={node: place for t in traces for node, place in t.where.items()},
        )  # fmt: skip
        check_trace(self.name, trace)
        return trace

    def _only(self, hook: str) -> Any:
        """A hook that at most one part may have."""
        owners = [p for p in self._parts if getattr(p.trace, hook) is not None]
        if len(owners) > 1:
            raise fail(f"{' and '.join(p.name for p in owners)} both have `{hook}`", "Only one part of a composition may")
        return getattr(owners[0].trace, hook) if owners else None


def _chain(first: Node | None, then: Node | None, name: str) -> Node | None:
    if first is None or then is None:
        return first if then is None else then
    return expr.substitute(then, {symbol(name): first})


def compose(*variants: Variant) -> Variant:
    """One variant from several: logits in order, masks anded, query scales multiplied, outputs chained.

    Raises:
        VariantError: two parts have a sink, weight, rope or scale, or fields of one name.
    """
    parts = tuple(as_variant(v) for v in variants)
    if not parts:
        raise fail("compose() of nothing", "Give at least one variant")
    return parts[0] if len(parts) == 1 else Composed("compose", parts)


def as_variant(x: Any) -> Variant:
    """A Variant from an instance or a class whose fields need no values."""
    if isinstance(x, Variant):
        return x
    if isinstance(x, type) and issubclass(x, Variant):
        if "_instance" not in vars(x):  # kept by the class, where Dynamo finds it
            x._instance = x()
        return x._instance
    raise fail(f"{x!r} is no variant", "Give an instance of a subclass of ag.Variant, e.g. attngen.variants.Causal()")


# ---------------------------------------------------------------- what a kernel is compiled for


@record
class Problem:
    """The compile-time facts of a call. ``storage`` maps each tensor parameter to its stored dtype."""

    backend: str  # "cpu"
    isa: str
    q_dtype: str
    kv_dtype: str
    out_dtype: str
    head_dim: int
    head_dim_v: int
    storage: tuple[tuple[str, str], ...] = ()
