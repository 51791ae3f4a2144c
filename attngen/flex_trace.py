"""FlexAttention's hooks as nodes: torch functions on symbols, and the tensors that a hook captures.

A hook is called once. Its arguments are ``Symbol``s; a ``TorchFunctionMode`` sees every torch call that it makes, also those
on tensors alone, so that a read ``doc[b, q_idx]`` of a captured tensor becomes a load from a tensor parameter, and what the
kernel could not repeat (a write, ``.item()``, arithmetic on whole tensors) is an error at the user's line.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import operator
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from . import expr
from .errors import AttngenError, VariantError
from .expr import Node, Where, as_node, cast, const, fail, recording, symbol, text, to_f32
from .ops import BOOL, F32, I32, TORCH_DTYPE
from .fields import AXES, Field
from .spec import RESERVED

SCORE_MOD = ("score", "b", "h", "q_idx", "kv_idx")
MASK_MOD = SCORE_MOD[1:]
_SYMBOLS = {"score": "s", "b": "request", "h": "head", "q_idx": "q", "kv_idx": "kv"}
_NAMES = {ours: name for name, ours in _SYMBOLS.items()}
# What a tensor holds is what a hook sees of it.
_SEEN = {torch.float32: F32, torch.bfloat16: F32, torch.float16: F32, torch.int32: I32, torch.int64: I32, torch.uint8: I32,
         torch.bool: BOOL}  # fmt: skip
_TARGETS = {torch.float32: F32, torch.bfloat16: F32, torch.float16: F32, torch.int32: I32, torch.int64: I32, torch.bool: BOOL}

_tracer: ContextVar[Tracer | None] = ContextVar("attngen_flex_tracer", default=None)


@dataclass(frozen=True)
class Parameter:
    """A field that stands for a captured tensor: a call passes ``read(base)``."""

    field: Field
    base: torch.Tensor
    read: Callable[[torch.Tensor], Any]


def same(tensor: torch.Tensor) -> torch.Tensor:
    """What most parameters read of the tensor they stand for: itself."""
    return tensor


# ---------------------------------------------------------------- symbols


class Symbol:
    """A 0-dim tensor while a hook is traced."""

    __slots__ = ("node", "__weakref__")

    def __init__(self, node: Node) -> None:
        self.node = node

    dtype = property(lambda self: TORCH_DTYPE[self.node.dtype])
    device = property(lambda self: torch.device("cpu"))
    shape = property(lambda self: torch.Size(()))
    ndim = property(lambda self: 0)
    requires_grad = property(lambda self: False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("size", "dim", "numel", "is_floating_point"):
            return functools.partial(getattr(torch.Tensor, name), torch.empty((), dtype=self.dtype, device="meta"))
        return functools.partial(_call, name, None, self)

    def __repr__(self) -> str:
        return flex_text(self.node)

    def __bool__(self) -> bool:
        raise fail(
            f"`{self!r}` has no truth value while a hook is traced: the hook branches on data (if, and, or, not, Python's "
            "min/max, or a chained comparison)",
            "Write torch.where(condition, a, b) for a choice, & | ~ for logic, torch.minimum/maximum, and split a < b < c into "
            "(a < b) & (b < c)",
        )

    def _no_number(self, *_: Any) -> Any:
        raise fail(
            f"`{self!r}` has no value while a hook is traced (int(), float(), range(), math.*, len(), or a list indexed with it)",
            "Use torch's functions; make a tensor of the list outside of the hook and index that",
        )

    __int__ = __float__ = __index__ = __complex__ = __len__ = __iter__ = __round__ = __trunc__ = __floor__ = __ceil__ = _no_number
    __array__ = __contains__ = _no_number

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **keywords: Any) -> Any:
        """``np.float64(2) * score``, as a tensor takes it; other numpy functions want numbers."""
        if len(inputs) != 2 or keywords:
            raise self._no_number()
        return _call({"power": "pow"}.get(ufunc.__name__, ufunc.__name__), None, *inputs)


    def __getitem__(self, index: Any) -> Any:
        raise fail(f"`{self!r}` is indexed, and is one element", "Index captured tensors: table[h], table[b, q_idx]")

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _writes("an assignment to an element")

    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func.__name__, func, *args, **(kwargs or {}))


def _operator(name: str) -> Callable[..., Any]:
    def method(self: Symbol, *others: Any) -> Any:
        return _call(name, None, self, *others)

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(Symbol, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(Symbol, f"__r{_name}__", _operator(f"__r{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "pos", "abs", "invert"):
    setattr(Symbol, f"__{_name}__", _operator(f"__{_name}__"))


class Rows:
    """A captured tensor of which some axes are indexed: ``doc[b]``, ``table[:, h]``. None marks an axis that is not yet."""

    __slots__ = ("name", "tensor", "index", "__weakref__")

    def __init__(self, name: str, tensor: torch.Tensor, index: Sequence[Node | None]) -> None:
        self.name, self.tensor, self.index = name, tensor, tuple(index)

    shape = property(lambda self: torch.Size([n for n, i in zip(self.tensor.shape, self.index) if i is None]))
    ndim = property(lambda self: len(self.shape))
    dtype = property(lambda self: self.tensor.dtype)
    device = property(lambda self: self.tensor.device)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def __getitem__(self, index: Any) -> Symbol | Rows:
        return _current().index(self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _writes("an assignment to an element")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise _whole(self)

    def __repr__(self) -> str:
        return f"{self.name}[{', '.join(':' if i is None else flex_text(i) for i in self.index)}]"

    def _fail(self, *_: Any) -> Any:
        raise _whole(self)

    __bool__ = __iter__ = __len__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _fail
    __lt__ = __le__ = __gt__ = __ge__ = __and__ = __or__ = __invert__ = __neg__ = __floordiv__ = __mod__ = _fail

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func.__name__, func, *args, **(kwargs or {}))


def flex_text(node: Node) -> str:
    """The expression with the names that Flex's hooks have for their arguments."""
    found = re.sub(r"(?<!\w)s(?!\w)", "score", text(node).replace("self.", ""))
    return re.sub(r"at\.(\w+)", lambda m: _NAMES.get(m[1], m[0]), found)


def _flex_words(message: str) -> str:
    """A node's error in the words of Flex's hooks."""
    place = expr.user_location()
    prefix = f"{place[0]}:{place[1]}: " if place else ""
    found = message.removeprefix(prefix).replace("ag.cast(x, float|int|bool)", ".to(torch.float32), .to(torch.int32) or .to(torch.bool)")
    found = re.sub(r"(?<![\w'])s(?![\w'])", "score", found.replace("self.", ""))
    found = re.sub(r"\bat\.(\w+)", lambda m: _NAMES.get(m[1], m[0]), found)
    return (prefix if message.startswith(prefix) else "") + re.sub(r"\bag\.(\w+)", r"torch.\1", found)


def _current() -> Tracer:
    tracer = _tracer.get()
    if tracer is None:
        raise fail("a symbol is used after its hook has returned", "Keep nothing of a hook's arguments outside of it")
    return tracer


def _writes(what: str) -> Exception:
    return fail(
        f"the hook writes: {what}", "Hooks only read, in any order and as often as the kernel likes; compute what changes before the call"
    )


def _whole(x: torch.Tensor | Rows) -> Exception:
    shape = tuple(x.shape)
    if isinstance(x, Rows):
        name = repr(x)
    else:
        name = "a tensor that the hook makes," if _current().made(x) else f"{_current().name_of(x)}, a captured tensor"
    index = ", ".join(("b", "h", "q_idx", "kv_idx")[: len(shape)]) or "..."
    return fail(
        f"{name} of shape {shape} is used whole",
        f"A hook computes one element: index every axis, e.g. t[{index}]; compute with whole tensors outside of the hook and "
        "capture the result",
    )


# ---------------------------------------------------------------- torch's functions, by name


def _lift(x: Any) -> Node:
    """A node from whatever a torch function takes for an element."""
    if isinstance(x, Symbol):
        return x.node
    if isinstance(x, torch.Tensor):
        return _current().scalar(x)
    if isinstance(x, Rows):
        raise _whole(x)
    if isinstance(x, numbers.Number) and not isinstance(x, (bool, int, float, complex)):
        x = x.item() if hasattr(x, "item") else x  # numpy's
    return as_node(x)


def _common(*xs: Any, least: str = BOOL) -> list[Node]:
    """Type promotion as torch's: bool, int, float; at least ``least``."""
    nodes = [_lift(x) for x in xs]
    order = (BOOL, I32, F32)
    target = order[max(order.index(t) for t in (least, *(n.dtype for n in nodes)))]
    return [cast(n, target) for n in nodes]


def _arithmetic(name: str) -> Callable[..., Node]:
    bools = {"add": "or", "mul": "and"}.get(name)

    def run(input: Any, other: Any, *, alpha: Any = 1) -> Node:
        if not (isinstance(alpha, int) and alpha == 1):
            other = Symbol(_arithmetic("mul")(other, alpha))
        a, b = _common(input, other)
        if a.dtype == BOOL:
            if bools is None:
                raise fail("`-` of two bools", "Write ^, or convert with .to(torch.int32)")
            return expr.apply(bools, a, b)
        return expr.apply(name, a, b)

    return run


def _divide(input: Any, other: Any, *, rounding_mode: str | None = None) -> Node:
    if rounding_mode is None:
        a, b = _common(input, other, least=I32)
        return a / b
    if rounding_mode == "floor":
        return _floordiv(input, other)
    a, b = _common(input, other, least=I32)
    if a.dtype == F32:
        return _trunc(Symbol(a / b))
    quotient = abs(a) // abs(b)
    return expr.where((a < 0) ^ (b < 0), -quotient, quotient)


def _floordiv(input: Any, other: Any) -> Node:
    a, b = _common(input, other, least=I32)
    return a // b


def _modulo(input: Any, other: Any) -> Node:
    a, b = _common(input, other, least=I32)
    return a % b


def _fmod(input: Any, other: Any) -> Node:
    a, b = _common(input, other, least=I32)
    return a - _divide(Symbol(a), Symbol(b), rounding_mode="trunc") * b


def _power(input: Any, exponent: Any) -> Node:
    a, b = _common(input, least=I32)[0], _lift(exponent)
    b = cast(b, I32) if b.dtype == BOOL else b
    if b.op == "const" and b.attr == 0:
        return const(1 if a.dtype == b.dtype == I32 else 1.0)
    if a.op == "const" and a.dtype == b.dtype == I32 and b.op != "const":
        return _int_power(a.attr, b)
    return a**b


def _float_power(input: Any, exponent: Any) -> Node:
    return _power(Symbol(to_f32(_lift(input))), exponent)


def _int_power(base: int, exponent: Node) -> Node:
    """``base ** exponent`` as an int, as in torch: 0 for a negative exponent, and wrapped to 32 bits."""
    if base > 1 and base & (base - 1) == 0:
        power = expr.apply("shl", const(1), exponent * (base.bit_length() - 1))
    else:  # a factor for each bit of the exponent
        power = const(1)
        for bit in range(5):
            factor = pow(base, 1 << bit, 1 << 32)
            factor -= (factor >= 1 << 31) << 32
            power = power * expr.where((exponent >> bit) & 1 == 1, const(factor), const(1))
    if abs(base) < 2 or _never_negative(exponent):
        return power
    return expr.where(exponent < 0, const(0), power)


def _trunc(input: Any) -> Node:
    (x,) = _common(input, least=I32)
    return x if x.dtype == I32 else expr.where(x < 0.0, -expr.floor(-x), expr.floor(x))


def _floor(input: Any) -> Node:
    (x,) = _common(input, least=I32)
    return x if x.dtype == I32 else expr.floor(x)


def _ceil(input: Any) -> Node:
    (x,) = _common(input, least=I32)
    return x if x.dtype == I32 else -expr.floor(-x)


def _compare(name: str) -> Callable[..., Node]:
    compare = getattr(operator, name)

    def run(input: Any, other: Any) -> Node:
        return compare(*_common(input, other, least=BOOL if name in ("eq", "ne") else I32))

    return run


def _bits(name: str) -> Callable[..., Node]:
    def run(input: Any, other: Any) -> Node:
        return expr.apply(name, *_common(input, other))

    return run


def _logic(name: str) -> Callable[..., Node]:
    def run(input: Any, other: Any) -> Node:
        return expr.apply(name, cast(_lift(input), BOOL), cast(_lift(other), BOOL))

    return run


def _shift(name: str) -> Callable[..., Node]:
    def run(input: Any, other: Any) -> Node:
        return expr.apply(name, *_common(input, other, least=I32))

    return run


def _extremum(name: str) -> Callable[..., Node]:
    def run(input: Any, other: Any = None, *more: Any, **keywords: Any) -> Node:
        if other is None or more or keywords:
            raise fail(f"torch.{name} over one tensor", f"Write torch.{name}imum(a, b) of two values")
        a, b = _common(input, other)
        return expr.apply({"min": "and", "max": "or"}[name] if a.dtype == BOOL else name, a, b)

    return run


def _clamp(input: Any, min: Any = None, max: Any = None) -> Node:  # noqa: A002
    x = _lift(input)
    if min is not None:
        x = _extremum("max")(Symbol(x), min)
    return x if max is None else _extremum("min")(Symbol(x), max)


def _where(condition: Any, input: Any = None, other: Any = None, **keywords: Any) -> Node:
    input = keywords.pop("self", input)
    if input is None or other is None or keywords:
        raise fail("torch.where of a condition alone", "Write torch.where(condition, a, b)")
    chosen = _lift(condition)
    if chosen.dtype != BOOL:
        raise fail(f"torch.where's condition `{flex_text(chosen)}` is {chosen.dtype}", "Give a bool: a comparison, or x != 0")
    return expr.where(chosen, *_common(input, other))


def _float_function(name: str) -> Callable[..., Node]:
    function = getattr(expr, name)
    return lambda input: function(to_f32(_lift(input)))


def _log10(input: Any) -> Node:
    return expr.log(to_f32(_lift(input))) * 0.4342944819032518


def _absolute(input: Any) -> Node:
    (x,) = _common(input, least=I32)
    return abs(x)


def _negative(input: Any) -> Node:
    x = _lift(input)
    if x.dtype == BOOL:
        raise fail("`-` of a bool", "Write ~, or convert with .to(torch.int32)")
    return -x


def _sign(input: Any) -> Node:
    (x,) = _common(input, least=I32)
    one, zero = (const(1.0), const(0.0)) if x.dtype == F32 else (const(1), const(0))
    return expr.where(x > zero, one, expr.where(x < zero, -one, zero))


def _relu(input: Any, inplace: bool = False) -> Node:
    if inplace:
        raise _writes("relu with inplace=True")
    return _extremum("max")(input, 0)


def _to(input: Any, *args: Any, **keywords: Any) -> Node:
    """``.to(dtype)``, ``.to(device)``, ``.to(other)``, ``.type(dtype)``."""
    x = _lift(input)
    for given in (*args, *keywords.values()):
        if isinstance(given, (Symbol, torch.Tensor, Rows)):
            given = given.dtype
        if isinstance(given, torch.dtype):
            if given not in _TARGETS:
                raise fail(f"`{flex_text(x)}` is cast to {given}", "Kernels compute in float32, int32 and bool: cast to one of these")
            x = cast(x, _TARGETS[given])
    return x


def _type(input: Any, dtype: Any = None, **keywords: Any) -> Node:
    if not isinstance(dtype, torch.dtype):
        raise fail(f"`.type({'' if dtype is None else repr(dtype)})`", "Write .to(torch.int32) or another dtype")
    return _to(input, dtype)


def _to_dtype(dtype: torch.dtype) -> Callable[..., Node]:
    return lambda input, *args, **keywords: _to(input, dtype)


def _same_value(input: Any, *args: Any, **keywords: Any) -> Node:
    return _lift(input)


def _filled(value: Any) -> Callable[..., Node]:
    def run(input: Any, size: Any = (), *more: Any, dtype: Any = None, **keywords: Any) -> Node:
        if (tuple(size) if isinstance(size, (tuple, list, torch.Size)) else (size,)) + more:
            raise fail("a hook makes a tensor that is no element", "Make it outside of the hook, capture it and index it")
        return _to(value, dtype or (input if isinstance(input, (Symbol, Rows)) else TORCH_DTYPE[_lift(input).dtype]))

    return run


def _new_full(input: Any, size: Any, fill_value: Any, **keywords: Any) -> Node:
    return _filled(fill_value)(input, size, **keywords)


def _full_like(input: Any, fill_value: Any, **keywords: Any) -> Node:
    return _filled(fill_value)(input, **keywords)


def _new_tensor(input: Any, data: Any, **keywords: Any) -> Node:
    return _to(data, keywords.get("dtype") or TORCH_DTYPE[_lift(data).dtype])


def _masked_fill(input: Any, mask: Any, value: Any) -> Node:
    return _where(mask, value, input)


_HANDLERS: dict[str, Callable[..., Node]] = {
    **{name: _arithmetic(name) for name in ("add", "sub", "mul")}, "div": _divide, "floordiv": _floordiv, "mod": _modulo, "fmod": _fmod,
    "pow": _power, "float_power": _float_power, "trunc": _trunc, "floor": _floor, "ceil": _ceil, "neg": _negative, "abs": _absolute, "sign": _sign, "relu": _relu,
    **{name: _compare(name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    **{name: _bits(name) for name in ("and", "or", "xor")}, "invert": lambda input: ~_lift(input),
    "lshift": _shift("shl"), "rshift": _shift("shr"),
    **{f"logical_{name}": _logic(name) for name in ("and", "or", "xor")},
    "logical_not": lambda input: ~cast(_lift(input), BOOL),
    "min": _extremum("min"), "max": _extremum("max"), "clamp": _clamp,
    "clamp_min": lambda input, min: _clamp(input, min), "clamp_max": lambda input, max: _clamp(input, None, max),
    "where": _where, "masked_fill": _masked_fill, "square": lambda input: _arithmetic("mul")(input, input),
    "reciprocal": lambda input: _divide(1.0, input), "log10": _log10,
    **{name: _float_function(name) for name in ("exp", "exp2", "log", "log2", "tanh", "sigmoid", "sqrt", "rsqrt")},
    "to": _to, "type_as": _to, "type": _type, "float": _to_dtype(torch.float32), "half": _to_dtype(torch.float16),
    "bfloat16": _to_dtype(torch.bfloat16), "double": _to_dtype(torch.float64), "int": _to_dtype(torch.int32),
    "long": _to_dtype(torch.int64), "bool": _to_dtype(torch.bool),
    **dict.fromkeys(("clone", "contiguous", "detach", "pos", "cpu", "cuda"), _same_value),
    "new_ones": _filled(1), "new_zeros": _filled(0), "ones_like": _filled(1), "zeros_like": _filled(0), "new_full": _new_full,
    "full_like": _full_like, "new_tensor": _new_tensor,
}  # fmt: skip
_ALIASES = {
    "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "truediv": "div", "floor_divide": "floordiv",
    "remainder": "mod", "absolute": "abs", "negative": "neg", "positive": "pos", "less": "lt", "less_equal": "le", "greater": "gt",
    "greater_equal": "ge", "not_equal": "ne", "minimum": "min", "maximum": "max", "clip": "clamp", "bitwise_and": "and",
    "bitwise_or": "or", "bitwise_xor": "xor", "bitwise_not": "invert", "bitwise_left_shift": "lshift",
    "bitwise_right_shift": "rshift", "fix": "trunc", "expit": "sigmoid", "sgn": "sign",
}  # fmt: skip
_OPERATORS = ("add", "sub", "mul", "truediv", "div", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_SWAPPED = {f"r{name}": name for name in _OPERATORS}
_READS_DATA = frozenset(
    "item tolist numpy __int__ __float__ __bool__ __index__ __iter__ __contains__ __array__ equal allclose nonzero".split()
)
_METADATA = frozenset("size dim numel stride len nelement ndimension is_floating_point storage_offset".split())
# What may be run on a captured tensor: a view of it, or itself. Whatever else there is may compute, or write.
_VIEWS = frozenset(
    "__getitem__ select narrow view view_as reshape reshape_as flatten unflatten ravel transpose swapaxes swapdims t permute movedim "
    "moveaxis squeeze unsqueeze expand expand_as broadcast_to diagonal unfold detach alias contiguous to type type_as float half bfloat16 "
    "double int long bool cpu cuda".split()
)
_RANDOM = ("rand", "bernoulli", "dropout", "multinomial", "normal")
KNOWN = (
    "torch.where/minimum/maximum/clamp/abs/exp/exp2/log/log2/tanh/sigmoid/sqrt/rsqrt/floor/logical_*/bitwise_*, operators and "
    ".to(dtype)"
)


def _changes(name: str, keywords: Mapping[str, Any]) -> bool:
    """Whether a torch function writes: add_, __iadd__, __setitem__, out=."""
    in_place = name.endswith("_") and not name.endswith("__") or name.startswith("__i") and name[3:-2] in _HANDLERS
    return in_place or name in ("__setitem__", "__set__", "__delete__") or keywords.get("out") is not None or keywords.get("inplace") is True


def _call(name: str, func: Callable[..., Any] | None, *args: Any, **keywords: Any) -> Any:
    """A torch function on symbols."""
    tracer = _current()
    plain = name[2:-2] if name.startswith("__") and name.endswith("__") else name
    if name in ("__getitem__", "__setitem__"):
        if name == "__setitem__":
            raise _writes("an assignment to an element")
        return tracer.index(*args)
    if name in _READS_DATA:
        raise fail(
            f"`.{plain}` reads a value while the hook is traced, where `{args[0]!r}` has none",
            "Compute with the tensor itself; a captured 0-dim tensor is read at each call",
        )
    if _changes(name, keywords):
        raise _writes(f"torch's `{name}`" + (" with out=" if "out" in keywords else " changes its argument"))
    if plain in _SWAPPED and (plain != name or plain == "rsub") and len(args) == 2:
        plain, args = _SWAPPED[plain], args[::-1]
    if plain == "where" and (func is None or func is torch.Tensor.where):  # as a method: x.where(condition, other)
        args = (args[1], args[0], *args[2:]) if len(args) > 1 else (keywords.pop("condition", None), *args)
    handler = _HANDLERS.get(_ALIASES.get(plain, plain))
    for x in (*args, *keywords.values()):
        if isinstance(x, Rows) or (isinstance(x, torch.Tensor) and x.dim() and plain not in ("to", "type_as")):
            raise _whole(x)
    if handler is None:
        raise fail(f"torch's `{name}` on `{args[0]!r}`", f"A hook may use {KNOWN}; compute what depends on no index outside of it")
    with torch._C.DisableTorchFunction():
        try:
            return Symbol(handler(*args, **keywords))
        except VariantError as error:  # of a node, in our own names
            raise VariantError(_flex_words(str(error))) from error
        except TypeError as error:
            raise fail(f"torch's `{name}` with these arguments ({error})", f"A hook may use {KNOWN}") from error


# ---------------------------------------------------------------- the trace of a hook


def captured_name(name: str, taken: Mapping[str, Any]) -> str:
    """A field's name from the name that a captured tensor has in the hook."""
    name = "".join(c if c.isascii() and (c.isalnum() or c == "_") else "_" for c in name).strip("_")
    if not name or not name[0].isalpha():
        name = f"tensor{name and '_' + name}"
    if name in RESERVED or name in AXES:
        name += "_"
    name = name.rstrip("_") + "_tensor" if name.endswith("_") else name
    found, n = name, 1
    while found in taken:
        n += 1
        found = f"{name}{n}"
    return found


class Tracer(TorchFunctionMode):
    """Traces the hooks of one variant. ``parameters`` are the fields that stand for captured tensors, by name."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.parameters: dict[str, Parameter] = {}
        self.where: dict[Node, Where] = {}
        self._names = names  # of captured tensors, by identity
        self._fields: dict[tuple[int, int | None], str] = {}  # names, by the tensor's identity and the axis whose size it is
        self._made: dict[int, torch.Tensor] = {}  # by the hook itself: constants
        self._views: dict[int, tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        name = getattr(func, "__name__", str(func))
        flat = [*args, *keywords.values()]
        flat += [y for x in flat if isinstance(x, (tuple, list)) for y in x]
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        captured = [x for x in tensors if id(x) not in self._made]
        if any(isinstance(x, (Symbol, Rows)) for x in flat):
            return _call(name, func, *args, **keywords)
        if name == "__get__" and tensors:  # .shape, .dtype, .device, .T
            result = func(*args, **keywords)
            return self._view(func, args, keywords, captured, result) if isinstance(result, torch.Tensor) else result
        if not captured:
            if any(word in name for word in _RANDOM):
                raise fail(f"torch's `{name}` in a hook", "A hook is traced once: make random tensors outside of it and capture them")
            result = func(*args, **keywords)
            if isinstance(result, torch.Tensor):
                self._made[id(result)] = result
            return result
        if name == "__getitem__" and self._whole_index(args[0], args[1]):
            return self.index(args[0], args[1])
        if name == "unbind" and len(args) + len(keywords) <= 2:  # iteration too
            tensor, axis = args[0], (args[1] if len(args) > 1 else keywords.get("dim", 0))
            with self:
                return tuple(tensor.select(axis, i) if tensor.dim() > 1 else tensor[i] for i in range(tensor.shape[axis]))
        if name in _READS_DATA:
            raise fail(
                f"`.{name}` reads the captured tensor {self.name_of(captured[0])} while the hook is traced: its value would be frozen",
                "Compute with the tensor itself: a 0-dim tensor is read at each call, others are indexed",
            )
        if name.strip("_") in _METADATA:
            return func(*args, **keywords)
        if _changes(name, keywords):
            raise _writes(f"torch's `{name}` changes the captured tensor {self.name_of(captured[0])}")
        if all(x.dim() == 0 for x in tensors):  # numbers that are read at each call
            return _call(name, func, *args, **keywords)
        if name not in _VIEWS:
            raise self._computes(name, captured[0])
        return self._view(func, args, keywords, captured, func(*args, **keywords))

    def _computes(self, name: str, tensor: torch.Tensor) -> Exception:
        return fail(
            f"torch's `{name}` computes with the whole captured tensor {self.name_of(tensor)}",
            "It would run once and be frozen: compute it outside of the hook and capture the result, or index it first",
        )

    @staticmethod
    def _whole_index(tensor: torch.Tensor, index: Any) -> bool:
        """Whether Python ints index every axis, or a number that is read at each call some: one parameter of the whole tensor serves."""
        items = index if isinstance(index, tuple) else (index,)
        if any(isinstance(i, torch.Tensor) and i.dim() == 0 and i.dtype != torch.bool for i in items):
            return True
        return len(items) == tensor.dim() > 0 and all(isinstance(i, int) and not isinstance(i, bool) for i in items)

    def _view(self, func: Callable[..., Any], args: Any, keywords: Any, captured: list[torch.Tensor], result: Any) -> torch.Tensor:
        """A view of a captured tensor is a parameter like it; anything computed would be frozen."""
        if any(result is x for x in captured):
            return result
        base = captured[0] if captured else None
        shares = isinstance(result, torch.Tensor) and base is not None
        shares = shares and result.untyped_storage()._cdata == base.untyped_storage()._cdata
        if not shares or len(captured) > 1 or args[0] is not base or result.dtype != base.dtype:
            raise self._computes(getattr(func, "__name__", str(func)), captured[0])
        root, _, read = self._views.get(id(base), (base, base, same))
        rest = args[1:]  # without the tensor, which a kept variant must not hold
        self._views[id(result)] = root, result, lambda t: func(read(t), *rest, **keywords)
        return result

    # ---- captured tensors
    def made(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._made

    def name_of(self, tensor: torch.Tensor) -> str:
        root = self._views[id(tensor)][0] if id(tensor) in self._views else tensor
        return self._names.get(id(root), "tensor")

    def _parameter(self, tensor: torch.Tensor, kind: str, seen: str, read: Callable[[Any], Any] = same, axis: int | None = None) -> str:
        """The field that stands for ``read`` of a captured tensor or view: for its size where ``axis`` is given."""
        root, _, view = self._views.get(id(tensor), (tensor, tensor, same))
        name = self._fields.get((id(tensor), axis))
        if name is None:
            name = captured_name(self.name_of(tensor) + ("" if axis is None else f"_size{axis}"), self.parameters)
            self._fields[id(tensor), axis] = name
            axes = tuple(f"{name}.{n}" for n in range(tensor.dim())) or (1,) if kind == "tensor" else ()
            whole = view if read is same else read if view is same else lambda t: read(view(t))
            self.parameters[name] = Parameter(Field(kind, seen, axes), root, whole)
        return name

    def _check(self, tensor: torch.Tensor) -> str:
        name, shape = self.name_of(tensor), tuple(tensor.shape)
        if tensor.dtype not in _SEEN:
            remedy = "float32, bfloat16 or float16" if tensor.is_floating_point() else "int32, int64, uint8 or bool"
            raise fail(
                f"the captured tensor {name} of shape {shape} is {tensor.dtype}",
                f"Kernels read {remedy}: convert it before, e.g. {'.float()' if tensor.is_floating_point() else '.to(torch.int32)'}",
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise fail(
                f"the captured tensor {name} of shape {shape} requires grad",
                "There is no backward yet: capture it detached, or call under torch.no_grad()",
            )
        if tensor.layout != torch.strided:
            raise fail(f"the captured tensor {name} is {tensor.layout}", "Capture a dense tensor: .to_dense()")
        return _SEEN[tensor.dtype]

    def scalar(self, tensor: torch.Tensor) -> Node:
        """A 0-dim tensor: a constant where the hook made it, else a parameter that is read at each call."""
        if tensor.dim():
            raise _whole(tensor)
        if id(tensor) in self._made:
            with torch._C.DisableTorchFunction():
                return const(tensor.item())
        seen = self._check(tensor)
        on_host = tensor.device.type == "cpu"
        if seen != BOOL and (on_host or tensor.dtype in (torch.float32, torch.int32)):
            return expr.param(self._parameter(tensor, "scalar", seen), seen)
        name = self._parameter(tensor, "tensor", seen, lambda t: t.view(1))  # what a Scalar cannot be
        return expr.load(name, seen, (1,), (const(0),))

    def index(self, source: torch.Tensor | Rows, index: Any) -> Symbol | Rows:
        """``source[index]`` with symbols among the indices."""
        if isinstance(source, Symbol):
            return source[index]
        if isinstance(source, torch.Tensor):
            if id(source) in self._made:
                found = f"a tensor of shape {tuple(source.shape)} that the hook makes is indexed"
                raise fail(found, "Make it outside of the hook and capture it")
            if source.dim() == 0:
                raise fail(f"the captured tensor {self.name_of(source)} has no axes and is indexed", "Use it as it is: a number")
            self._check(source)
            source = Rows(self.name_of(source), source, (None,) * source.dim())
        items = list(index) if isinstance(index, tuple) else [index]
        free = [axis for axis, i in enumerate(source.index) if i is None]
        if any(i is Ellipsis for i in items):
            at = next(n for n, i in enumerate(items) if i is Ellipsis)
            items[at : at + 1] = [slice(None)] * (len(free) - len(items) + 1)
        if len(items) > len(free):
            raise fail(f"`{source!r}` is indexed with {len(items)} indices", f"It has {len(free)} axes left: give one for each")
        filled = list(source.index)
        for axis, item in zip(free, items):
            if isinstance(item, slice) and item == slice(None):
                continue
            if isinstance(item, slice) or item is None:
                raise fail(f"`{source!r}` is sliced beside a symbol", "Slice it outside of the hook and capture the result")
            filled[axis] = self._position(source, axis, item)
        if any(i is None for i in filled):
            return Rows(source.name, source.tensor, filled)
        seen = _SEEN[source.tensor.dtype]
        name = self._parameter(source.tensor, "tensor", seen)
        with torch._C.DisableTorchFunction():
            return Symbol(expr.load(name, seen, self.parameters[name].field.axes, tuple(filled)))

    def _position(self, source: Rows, axis: int, item: Any) -> Node:
        """An index; one that may be negative counts from the end, as torch's do."""
        with torch._C.DisableTorchFunction():
            node = _lift(item)
            if node.dtype != I32:
                remedy = "convert a bool with .to(torch.int32)" if node.dtype == BOOL else "convert with .to(torch.int32)"
                raise fail(f"index `{flex_text(node)}` of `{source.name}` is {node.dtype}", f"Indices are ints: {remedy}")
            if _never_negative(node):
                return node
            size = self._parameter(source.tensor, "scalar", I32, lambda t: t.shape[axis], axis)
            wrapped = node + expr.param(size, I32)
            return wrapped if node.op == "const" else expr.where(node < 0, wrapped, node)

    # ---- hooks
    def trace(self, what: str, hook: Callable[..., Any], arguments: Sequence[str], returns: str) -> Node:
        """Call ``hook`` once and return its node."""
        place = _definition(hook)
        try:
            inspect.signature(hook).bind(*arguments)
        except (TypeError, ValueError):
            given = _signature(hook)
            other = MASK_MOD if returns == F32 else SCORE_MOD
            hint = f" (is it a {'mask_mod' if returns == F32 else 'score_mod'}?)" if _binds(hook, other) else ""
            raise fail(f"{what} {_label(hook)} takes {given}{hint}", f"{what} takes ({', '.join(arguments)})", place) from None
        token = _tracer.set(self)
        try:
            with recording(self.where):
                symbols = [Symbol(symbol(_SYMBOLS[a])) for a in arguments]
                try:
                    with self:
                        result = hook(*symbols)
                except AttngenError:
                    raise
                except Exception as error:
                    found = f"{what} {_label(hook)} raised {type(error).__name__}: {error}"
                    raise fail(found, f"A hook may use {KNOWN}", _raised(error) or place) from error
                return self._typed(what, result, returns, place)
        finally:
            _tracer.reset(token)

    def _typed(self, what: str, result: Any, returns: str, place: Where | None) -> Node:
        wanted = "a score, e.g. score + bias[h]" if returns == F32 else "a bool, e.g. q_idx >= kv_idx"
        if isinstance(result, torch.Tensor) and result.dim() == 0:
            with torch._C.DisableTorchFunction():
                result = Symbol(self.scalar(result))
        if isinstance(result, (bool, int, float)):
            result = Symbol(const(result))
        if not isinstance(result, Symbol):
            if result is None:
                found = "None (is a `return` missing?)"
            elif isinstance(result, (torch.Tensor, Rows)):
                found = f"a tensor of shape {tuple(result.shape)}"
            else:
                found = f"{type(result).__name__} {result!r:.80}"
            raise fail(f"{what} returned {found}", f"Return {wanted}", place)
        node = result.node
        if returns == F32 and node.dtype == I32:
            return to_f32(node)
        if node.dtype != returns:
            raise fail(f"{what} returned {TORCH_DTYPE[node.dtype]}: {flex_text(node)}", f"Return {wanted}", place)
        return node


def _never_negative(node: Node, depth: int = 0) -> bool:
    """Whether an i32 node cannot be negative, so far as its form says; positions and what they count are not."""
    if depth > 16:
        return False
    if node.op == "const":
        return node.attr >= 0
    if node.op == "sym":
        return True
    below = [_never_negative(a, depth + 1) for a in node.args if a.dtype == I32]
    if node.op in ("add", "mul", "floordiv", "shr", "min", "or", "xor", "where"):
        return all(below)
    if node.op in ("max", "and"):
        return any(below)
    if node.op == "mod":
        return _never_negative(node.args[1], depth + 1)
    return node.op == "abs" or (node.op == "to_i32" and node.args[0].dtype == BOOL)


def _code(hook: Any) -> Any:
    while isinstance(hook, functools.partial):
        hook = hook.func
    hook = inspect.unwrap(getattr(hook, "__func__", hook)) if not hasattr(hook, "__code__") else hook
    code = getattr(hook, "__code__", None)
    if code is None and callable(hook) and not isinstance(hook, type):
        code = getattr(getattr(type(hook), "__call__", None), "__code__", None)
    return code


def _definition(hook: Any) -> Where | None:
    code = _code(hook)
    return (code.co_filename, code.co_firstlineno) if code else None


def _raised(error: BaseException) -> Where | None:
    """The innermost line of the user's that raised."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((expr._PACKAGE, expr._TORCH))]
    return (frames[-1].filename, frames[-1].lineno or 0) if frames else None


def _label(hook: Any) -> str:
    return getattr(hook, "__name__", None) or type(hook).__name__


def _signature(hook: Any) -> str:
    try:
        return str(inspect.signature(hook))
    except (TypeError, ValueError):
        return "arguments that Python cannot tell"


def _binds(hook: Any, arguments: Sequence[str]) -> bool:
    try:
        inspect.signature(hook).bind(*arguments)
    except (TypeError, ValueError):
        return False
    return True
