"""Nodes: immutable, interned expressions over f32, i32 and bool, and the functions users write them with.

A node's ``key`` is the hash of its content, so equal expressions hash equal in every process. Building a node checks
its types and simplifies it: constants fold (in float64, rounded to f32: the IEEE result for + - * / sqrt), neutral
elements go, integer constants collect on the right, ``x // 2**k`` becomes a shift. Floats are never reassociated.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Union

import torch

from .errors import VariantError
from .ops import BOOL, DTYPES, F32, I32, I32_MAX, I32_MIN, OPS

_PACKAGE = str(Path(__file__).parent) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep

# Symbols: what a hook's `at` offers, and the values handed to hooks. Name -> type.
SYMBOLS = {
    "q": I32, "kv": I32, "q_token": I32, "kv_token": I32, "head": I32, "kv_head": I32, "num_heads": I32,
    "num_kv_heads": I32, "request": I32, "q_len": I32, "kv_len": I32, "q_offset": I32, "dim": I32, "s": F32, "o": F32,
}  # fmt: skip

# Dependence classes, in the order in which a kernel can compute them.
CONST, CALL, TILE, ROW, COL, ELEM = range(6)
LEVEL_NAMES = ("constant", "per call", "per request", "per row", "per column", "per element")
_SYMBOL_LEVEL = {
    "num_heads": CALL, "num_kv_heads": CALL, "request": TILE, "q_len": TILE, "kv_len": TILE, "q_offset": TILE, "kv_head": TILE,
    "q": ROW, "q_token": ROW, "head": ROW, "kv": COL, "kv_token": COL, "s": ELEM, "o": ELEM, "dim": ELEM,
}  # fmt: skip

Scalarish = Union["Node", bool, int, float]
Where = tuple[str, int]  # file, line

_locations: ContextVar[dict["Node", Where] | None] = ContextVar("attngen_locations", default=None)


@contextmanager
def recording(locations: dict[Node, Where]) -> Iterator[None]:
    """Record in ``locations`` the user's line that first made each node."""
    token = _locations.set(locations)
    try:
        yield
    finally:
        _locations.reset(token)


def user_location() -> Where | None:
    """File and line of the innermost frame outside attngen and torch: the user's hook."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((_PACKAGE, _TORCH)) or file.startswith(_PACKAGE + "variants" + os.sep):
            return file, frame.f_lineno
        frame = frame.f_back
    return None


def fail(found: str, remedy: str, where: Where | None = None) -> VariantError:
    """A VariantError at the user's line: what was found, what to write instead."""
    place = where or user_location()
    prefix = f"{place[0]}:{place[1]}: " if place else ""
    return VariantError(f"{prefix}{found}. {remedy}")


class Node:
    """An expression. Made by operators and by the functions below, never by hand."""

    __slots__ = ("op", "args", "attr", "dtype", "symbols", "params", "_key", "__weakref__")

    op: str
    args: tuple[Node, ...]
    attr: Any
    dtype: str
    symbols: frozenset[str]
    params: frozenset[str]

    @property
    def key(self) -> str:
        """Hash of the node's recursive content; equal in every process."""
        for node in walk(self):
            if node._key is None:
                text = repr((node.op, node.dtype, _attr_text(node.attr), [a._key for a in node.args]))
                node._key = hashlib.sha256(text.encode()).hexdigest()[:32]
        return self._key

    @property
    def level(self) -> int:
        """Dependence class: CONST, CALL, TILE (request, KV head), ROW, COL or ELEM."""
        levels = {_SYMBOL_LEVEL[s] for s in self.symbols}
        if ELEM in levels or {ROW, COL} <= levels:
            return ELEM
        return max(levels, default=CALL if self.params else CONST)

    def __repr__(self) -> str:
        return text(self)

    # A copy, and what comes out of a pickle, is the interned node itself.
    def __copy__(self) -> Node:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Node:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _intern, (self.op, self.args, self.attr, self.dtype)

    # ---- operators
    def __add__(self, other: Scalarish) -> Node: return _binary("add", self, other)
    def __radd__(self, other: Scalarish) -> Node: return _binary("add", other, self)
    def __sub__(self, other: Scalarish) -> Node: return _binary("sub", self, other)
    def __rsub__(self, other: Scalarish) -> Node: return _binary("sub", other, self)
    def __mul__(self, other: Scalarish) -> Node: return _binary("mul", self, other)
    def __rmul__(self, other: Scalarish) -> Node: return _binary("mul", other, self)
    def __truediv__(self, other: Scalarish) -> Node: return _divide(self, other)
    def __rtruediv__(self, other: Scalarish) -> Node: return _divide(other, self)
    def __floordiv__(self, other: Scalarish) -> Node: return _floordiv(self, other)
    def __rfloordiv__(self, other: Scalarish) -> Node: return _floordiv(other, self)
    def __mod__(self, other: Scalarish) -> Node: return _mod(self, other)
    def __rmod__(self, other: Scalarish) -> Node: return _mod(other, self)
    def __pow__(self, other: Scalarish) -> Node: return _pow(self, other)
    def __rpow__(self, other: Scalarish) -> Node: return _pow(other, self)
    def __and__(self, other: Scalarish) -> Node: return _binary("and", self, other)
    def __rand__(self, other: Scalarish) -> Node: return _binary("and", other, self)
    def __or__(self, other: Scalarish) -> Node: return _binary("or", self, other)
    def __ror__(self, other: Scalarish) -> Node: return _binary("or", other, self)
    def __xor__(self, other: Scalarish) -> Node: return _binary("xor", self, other)
    def __rxor__(self, other: Scalarish) -> Node: return _binary("xor", other, self)
    def __lshift__(self, other: Scalarish) -> Node: return _binary("shl", self, other)
    def __rlshift__(self, other: Scalarish) -> Node: return _binary("shl", other, self)
    def __rshift__(self, other: Scalarish) -> Node: return _binary("shr", self, other)
    def __rrshift__(self, other: Scalarish) -> Node: return _binary("shr", other, self)
    def __lt__(self, other: Scalarish) -> Node: return _binary("lt", self, other)
    def __le__(self, other: Scalarish) -> Node: return _binary("le", self, other)
    def __gt__(self, other: Scalarish) -> Node: return _binary("lt", other, self)
    def __ge__(self, other: Scalarish) -> Node: return _binary("le", other, self)
    def __neg__(self) -> Node: return apply("neg", self)
    def __pos__(self) -> Node: return self
    def __abs__(self) -> Node: return apply("abs", self)
    def __invert__(self) -> Node: return apply("not", self)

    def __eq__(self, other: object) -> Any:
        return _binary("eq", self, other)

    def __ne__(self, other: object) -> Any:
        return apply("not", _binary("eq", self, other))

    __hash__ = object.__hash__  # interned: identity is equality

    # ---- what a symbol cannot do
    def __bool__(self) -> bool:
        raise fail(
            f"`{self}` has no truth value while a hook is traced: the hook branches on a symbol "
            "(if, and, or, not, Python's min/max/any/all, or a chained comparison)",
            "Write ag.where(condition, a, b) for a choice, & | ~ for logic, ag.min/ag.max, and split a < b < c into "
            "(a < b) & (b < c); & binds tighter than <, so each comparison needs its parentheses",
        )

    def _no_number(self, what: str) -> VariantError:
        return fail(
            f"`{self}` is a symbol and has no {what} while a hook is traced (range(), int(), float(), math.*, "
            "round() or indexing a list or a torch tensor with it)",
            "Use attngen's functions (ag.exp, ag.floor, ag.cast, ...), and declare data as a field: "
            'table: ag.Tensor("heads"), then self.table[at.head]',
        )

    def __index__(self) -> int: raise self._no_number("integer value")
    def __int__(self) -> int: raise self._no_number("integer value")
    def __float__(self) -> float: raise self._no_number("float value")
    def __iter__(self) -> Iterator[Any]: raise self._no_number("elements")
    def __len__(self) -> int: raise self._no_number("length")

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        raise fail(
            f"torch's `{name}` was called on a symbol, or a global torch tensor is used in a hook",
            "Use attngen's functions (ag.where, ag.exp, ag.tanh, ...), and declare tensors as fields so that they "
            'are checked and passed at each call: table: ag.Tensor("heads"), then self.table[at.head]',
        )


_interned: weakref.WeakValueDictionary[tuple[Any, ...], Node] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _fresh_lock() -> None:
    """A thread that held the lock in the parent does not exist in a forked child."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_fresh_lock)


def _attr_text(attr: Any) -> str:
    if isinstance(attr, float):  # bits, so that -0.0 and 0.0 differ and the text never depends on repr
        return struct.pack("<d", attr).hex()
    return repr(attr)


def _intern(op: str, args: tuple[Node, ...], attr: Any, dtype: str) -> Node:
    ident = (op, tuple(map(id, args)), _attr_text(attr), dtype)
    with _lock:
        node = _interned.get(ident)
        if node is None:
            node = object.__new__(Node)
            node.op, node.args, node.attr, node.dtype, node._key = op, args, attr, dtype, None
            node.symbols = frozenset({attr}) if op == "sym" else frozenset().union(*(a.symbols for a in args))
            params = frozenset().union(*(a.params for a in args))
            node.params = params | {attr[0]} if op in ("param", "load") else params
            _interned[ident] = node
    locations = _locations.get()
    if locations is not None and node not in locations:
        place = user_location()
        if place:
            locations[node] = place
    return node


# ---------------------------------------------------------------- leaves


def const(value: bool | int | float, dtype: str | None = None) -> Node:
    """A constant. Python floats round to f32; ints must fit i32."""
    if dtype is None:
        dtype = BOOL if isinstance(value, bool) else I32 if isinstance(value, int) else F32
    if dtype == BOOL:
        return _intern("const", (), bool(value), BOOL)
    if dtype == I32:
        if not I32_MIN <= value <= I32_MAX:
            raise fail(f"the integer {value} does not fit i32", f"Use a value in [{I32_MIN}, {I32_MAX}] or a float")
        return _intern("const", (), int(value), I32)
    return _intern("const", (), _round_f32(float(value)), F32)


def _round_f32(x: float) -> float:
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def symbol(name: str) -> Node:
    """A symbol of the hook's point ``at``, or ``s`` / ``o``."""
    return _intern("sym", (), name, SYMBOLS[name])


def param(name: str, dtype: str) -> Node:
    """A runtime scalar parameter."""
    return _intern("param", (), (name,), dtype)


def load(name: str, dtype: str, axes: tuple[str, ...], index: tuple[Node, ...]) -> Node:
    """Element ``index`` of tensor parameter ``name``; 0 or False where any index is out of range."""
    return _intern("load", index, (name, axes), dtype)


def as_node(x: Any) -> Node:
    """A Node from a Node or a Python number; anything else is the user's error."""
    if isinstance(x, Node):
        return x
    if isinstance(x, (bool, int, float)):
        return const(x)
    if isinstance(x, torch.Tensor):
        raise fail(
            f"a torch tensor of shape {tuple(x.shape)} is used in a hook",
            "Hooks see no global tensors: declare it as a field, table: ag.Tensor(\"heads\"), read self.table[at.head] "
            "and pass table=... at the call",
        )
    raise fail(
        f"`{x!r}` of type {type(x).__name__} is used in a hook",
        "Hooks compute with symbols, the variant's fields, and Python bool, int and float",
    )


# ---------------------------------------------------------------- building and simplifying


def apply(name: str, *args: Any) -> Node:
    """Check types, simplify, intern."""
    nodes = _promote(name, tuple(as_node(a) for a in args))
    op = OPS[name]
    types = tuple(n.dtype for n in nodes)
    if types not in op.signature:
        allowed = ", ".join("(" + ", ".join(k) + ")" for k in op.signature)
        raise fail(
            f"`{name}` got ({', '.join(types)}): {', '.join(map(str, nodes))}",
            f"It takes {allowed}. Convert with ag.cast(x, float|int|bool)",
        )
    dtype = op.signature[types]
    if all(n.op == "const" for n in nodes):
        return _fold(name, nodes, dtype)
    return _simplify(name, nodes, dtype)


def _promote(name: str, nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """i32 meets f32: the i32 is cast, as in torch. bool meets a number only through ag.cast."""
    first = 1 if name == "where" else 0
    rest = nodes[first:]
    if len(rest) < 2 or {n.dtype for n in rest} != {F32, I32}:
        return nodes
    return nodes[:first] + tuple(to_f32(n) for n in rest)


def to_f32(node: Node) -> Node:
    """Cast to f32."""
    if node.dtype == F32:
        return node
    return const(float(node.attr), F32) if node.op == "const" else _intern("to_f32", (node,), None, F32)


def _fold(name: str, nodes: tuple[Node, ...], dtype: str) -> Node:
    wide = {F32: torch.float64, I32: torch.int32, BOOL: torch.bool}
    tensors = [torch.tensor(n.attr, dtype=wide[n.dtype]) for n in nodes]
    return const(OPS[name].torch(*tensors).item(), dtype)


def _is(node: Node, value: bool | int | float) -> bool:
    return node.op == "const" and node.dtype != BOOL and node.attr == value and not isinstance(node.attr, bool)


def _simplify(name: str, nodes: tuple[Node, ...], dtype: str) -> Node:
    a = nodes[0]
    b = nodes[1] if len(nodes) > 1 else None
    if OPS[name].commutative and a.op == "const":
        a, b = b, a
        nodes = (a, b)
    if name == "where":
        cond, yes, no = nodes
        if cond.op == "const":
            return yes if cond.attr else no
        if yes is no:
            return yes
        if dtype == BOOL and yes.op == no.op == "const":
            return cond if yes.attr else apply("not", cond)
    elif name == "not":
        if a.op == "not":
            return a.args[0]
        if a.dtype == BOOL and a.op in ("lt", "le") and a.args[0].dtype == I32:  # floats keep NaN's meaning
            return apply("le" if a.op == "lt" else "lt", a.args[1], a.args[0])
    elif name in ("and", "or") and dtype == BOOL:
        if a is b:
            return a
        if b.op == "const":
            return (a if b.attr else b) if name == "and" else (b if b.attr else a)
    elif name == "neg" and a.op == "neg":
        return a.args[0]
    elif name in ("min", "max") and a is b:
        return a
    elif dtype == I32 and b is not None:
        simpler = _simplify_i32(name, a, b)
        if simpler is not None:
            return simpler
    elif dtype == F32 and b is not None:
        # x + 0 is not x for x = -0.0, but no consumer can tell: kept out all the same.
        if name in ("mul", "div") and _is(b, 1.0):
            return a
        if name == "sub" and _is(b, 0.0) and math.copysign(1.0, b.attr) > 0:
            return a
    elif name in ("lt", "le", "eq") and a.dtype == I32 and a is b:
        return const(name != "lt")
    return _intern(name, nodes, None, dtype)


def _simplify_i32(name: str, a: Node, b: Node) -> Node | None:
    if name == "sub":
        if a is b:
            return const(0)
        if b.op == "const" and b.attr != I32_MIN:
            return apply("add", a, -b.attr)
    if b.op != "const":
        return None
    value = b.attr
    power = value > 0 and value & (value - 1) == 0
    if name == "add":
        if value == 0:
            return a
        if a.op == "add" and a.args[1].op == "const":  # wrapping addition is associative
            return apply("add", a.args[0], _fold("add", (a.args[1], b), I32))
    elif name == "mul":
        if value == 0:
            return b
        if value == 1:
            return a
    elif name == "floordiv":
        if value == 1:
            return a
        if power:
            return _intern("shr", (a, const(value.bit_length() - 1)), None, I32)
    elif name == "mod":
        if value == 1:
            return const(0)
        if power:
            return _intern("and", (a, const(value - 1)), None, I32)
    elif name in ("shl", "shr", "or", "xor") and value == 0:
        return a
    elif name == "and" and value == -1:
        return a
    return None


def _binary(name: str, a: Any, b: Any) -> Node:
    return apply(name, a, b)


def _divide(a: Any, b: Any) -> Node:
    return apply("div", to_f32(as_node(a)), to_f32(as_node(b)))


def _floordiv(a: Any, b: Any) -> Node:
    a, b = as_node(a), as_node(b)
    return apply("floordiv", a, b) if a.dtype == b.dtype == I32 else floor(_divide(a, b))


def _mod(a: Any, b: Any) -> Node:
    a, b = as_node(a), as_node(b)
    return apply("mod", a, b) if a.dtype == b.dtype == I32 else a - floor(_divide(a, b)) * b


def _pow(a: Any, b: Any) -> Node:
    a, b = as_node(a), as_node(b)
    if b.op == "const":
        if b.attr == 0.5:
            return sqrt(a)
        if b.attr == -0.5:
            return rsqrt(a)
        if float(b.attr).is_integer() and 1 <= abs(b.attr) <= 16:
            result = a = to_f32(a) if b.dtype == F32 else a
            for _ in range(int(abs(b.attr)) - 1):
                result = result * a
            return result if b.attr > 0 else _divide(1.0, result)
    if a.op == "const" and a.attr > 0:
        return exp2(to_f32(b) * math.log2(a.attr)) if a.attr != 2 else exp2(b)
    raise fail(
        f"`{a} ** {b}` is neither a constant integer power (to 16), a square root nor a power of a positive constant",
        "Write ag.exp2(y * ag.log2(x)) where x > 0",
    )


# ---------------------------------------------------------------- the functions users write


def where(condition: Scalarish, a: Scalarish, b: Scalarish) -> Node:
    """``a`` where ``condition`` (bool) holds, else ``b``."""
    return apply("where", condition, a, b)


def _fold_left(name: str, first: Scalarish, rest: Iterable[Scalarish]) -> Node:
    result = as_node(first)
    for x in rest:
        result = apply(name, result, x)
    return result


def minimum(a: Scalarish, b: Scalarish, *more: Scalarish) -> Node:
    """The smallest argument."""
    return _fold_left("min", a, (b, *more))


def maximum(a: Scalarish, b: Scalarish, *more: Scalarish) -> Node:
    """The largest argument."""
    return _fold_left("max", a, (b, *more))


def absolute(x: Scalarish) -> Node:
    """Absolute value."""
    return apply("abs", x)


def _function(name: str, doc: str) -> Callable[[Scalarish], Node]:
    def call(x: Scalarish) -> Node:
        return apply(name, to_f32(as_node(x)))

    call.__name__ = call.__qualname__ = name
    call.__doc__ = doc
    return call


exp = _function("exp", "e to the x (f32).")
exp2 = _function("exp2", "2 to the x (f32).")
log = _function("log", "Natural logarithm (f32); -inf at 0, NaN below.")
log2 = _function("log2", "Logarithm to base 2 (f32); -inf at 0, NaN below.")
tanh = _function("tanh", "Hyperbolic tangent (f32).")
sigmoid = _function("sigmoid", "1 / (1 + exp(-x)) (f32).")
sqrt = _function("sqrt", "Square root (f32).")
rsqrt = _function("rsqrt", "1 / sqrt(x) (f32).")
floor = _function("floor", "The largest integer not above x, as f32. For an int write ag.cast(x // 1, int).")

_CASTS = {float: F32, int: I32, bool: BOOL, torch.float32: F32, torch.int32: I32, torch.bool: BOOL,
          **{t: t for t in DTYPES}}  # fmt: skip


def cast(x: Scalarish, dtype: Any) -> Node:
    """Cast to ``float`` (f32), ``int`` (i32: truncates, saturates, NaN gives 0) or ``bool`` (x != 0)."""
    node = as_node(x)
    try:
        target = _CASTS[dtype]
    except (KeyError, TypeError):
        raise fail(f"ag.cast to {dtype!r}", "Cast to float, int or bool") from None
    if target == node.dtype:
        return node
    return to_f32(node) if target == F32 else apply("to_i32" if target == I32 else "to_bool", node)


# ---------------------------------------------------------------- walking


def walk(*roots: Node) -> Iterator[Node]:
    """Every node below ``roots``, once, arguments first."""
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(node.args))


def substitute(root: Node, replace: Mapping[Node, Node]) -> Node:
    """``root`` with nodes exchanged, simplified again on the way up."""
    done: dict[Node, Node] = {}
    for node in walk(root):
        if node in replace:
            done[node] = replace[node]
        elif not node.args:
            done[node] = node
        else:
            args = tuple(done[a] for a in node.args)
            if all(new is old for new, old in zip(args, node.args)):
                done[node] = node
            elif node.op == "load":
                done[node] = _intern("load", args, node.attr, node.dtype)
            else:
                done[node] = apply(node.op, *args)
    return done[root]


def conjuncts(node: Node) -> list[Node]:
    """The different terms of a conjunction, in order."""
    found: dict[Node, None] = {}
    seen, stack = set(), [node]
    while stack:
        term = stack.pop()
        if term in seen:
            continue
        seen.add(term)
        if term.op == "and" and term.dtype == BOOL:
            stack.extend(reversed(term.args))
        else:
            found[term] = None
    return list(found)


def discrete_inputs(roots: Iterable[Node]) -> set[Node]:
    """The f32 nodes that feed a comparison, floor or cast: computed in plain, uncontracted IEEE f32 everywhere."""
    marked: set[Node] = set()
    for node in reversed(list(walk(*roots))):  # users before arguments
        if node in marked or (node.op in OPS and OPS[node.op].discrete):
            marked.update(a for a in node.args if a.dtype == F32)
    return marked


def verify(roots: Iterable[Node]) -> None:
    """Between stages: each node is well typed by its row. A failure is attngen's bug, not the user's."""
    for node in walk(*roots):
        if node.op in OPS:
            types = tuple(a.dtype for a in node.args)
            assert OPS[node.op].signature.get(types) == node.dtype, f"ill-typed node {node!r}: {types} -> {node.dtype}"
        elif node.op == "sym":
            assert SYMBOLS[node.attr] == node.dtype, f"ill-typed symbol {node!r}"
        elif node.op == "load":
            assert all(a.dtype == I32 for a in node.args), f"ill-typed index in {node!r}"
        else:
            assert node.op in ("const", "param") and not node.args, f"unknown op {node.op}"


_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%", "and": "&", "or": "|",
          "xor": "^", "shl": "<<", "shr": ">>", "lt": "<", "le": "<=", "eq": "=="}  # fmt: skip


_MAX_TEXT = 2000  # characters of one subexpression: written out, a hook that shares values can be exponentially long


def text(node: Node) -> str:
    """The expression as a user would write it, with the middle of very long ones left out."""
    written: dict[Node, str] = {}
    for part in walk(node):
        whole = _written(part, [written[a] for a in part.args])
        half = _MAX_TEXT // 2
        written[part] = whole if len(whole) <= _MAX_TEXT else f"{whole[:half]} ... {whole[-half:]}"
    return written[node]


def _written(node: Node, args: list[str]) -> str:
    if node.op == "const":
        return f"{node.attr:g}" if node.dtype == F32 else str(node.attr)
    if node.op == "sym":
        return node.attr if node.attr in ("s", "o") else f"at.{node.attr}"
    if node.op == "param":
        return f"self.{node.attr[0]}"
    if node.op == "load":
        return f"self.{node.attr[0]}[{', '.join(args)}]"
    if node.op in _INFIX:
        return f"({args[0]} {_INFIX[node.op]} {args[1]})"
    if node.op in ("neg", "not"):
        return f"{'-' if node.op == 'neg' else '~'}{args[0]}"
    return f"{node.op}({', '.join(args)})"
