"""Tracing: a hook is called once with symbols and returns a node.

Nothing here evaluates a hook per element, and nothing knows what a variant is: the caller passes the bound function,
the symbols and what it must return.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from typing import Any

from .errors import AttngenError
from .expr import SYMBOLS, Node, Where, as_node, fail, load, recording, symbol, text, to_f32, where
from .ops import BOOL, F32, I32
from .records import record

FUNCTIONS = "ag.where/min/max/abs/exp/exp2/log/log2/tanh/sigmoid/sqrt/rsqrt/floor/cast"
_ROWWISE = frozenset(SYMBOLS) - {"kv", "kv_token", "dim", "s", "o"}
_ELEMENT = frozenset(SYMBOLS) - {"dim", "s", "o"}


@record
class Hook:
    """What a hook is given, what it may read of ``at`` and what it returns."""

    inputs: tuple[str, ...]  # symbols passed before `at`
    reads: frozenset[str]
    returns: str


HOOKS = {
    "query_scale": Hook((), _ROWWISE, F32),
    "logits": Hook(("s",), _ELEMENT, F32),
    "mask": Hook((), _ELEMENT, BOOL),
    "sink": Hook((), _ROWWISE, F32),
    "weight": Hook(("s",), _ELEMENT, F32),
    "output": Hook(("o",), _ROWWISE | {"dim"}, F32),
}
POSITION = Hook((), _ELEMENT, I32)  # RoPE's q_position and kv_position


class Point:
    """``at``: where in the attention matrix a hook is evaluated. Its attributes are symbols."""

    def __init__(self, hook: str, reads: frozenset[str]) -> None:
        self.__dict__["_hook"] = hook
        self.__dict__["_reads"] = reads

    def __getattr__(self, name: str) -> Node:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._reads:
            return symbol(name)
        remedy = f"`{self._hook}` may read at." + ", at.".join(sorted(self._reads))
        raise fail(f"`at.{name}` in hook `{self._hook}`", remedy)

    def __setattr__(self, name: str, value: Any) -> None:
        raise fail(f"`at.{name}` is assigned in hook `{self._hook}`", "Hooks only read; use a local variable")


class TensorSymbol:
    """A tensor field while a hook is traced: it can only be indexed."""

    def __init__(self, name: str, dtype: str, axes: tuple[str | int, ...]) -> None:
        self.name, self.dtype, self.axes = name, dtype, axes

    def __getitem__(self, index: Any) -> Node:
        items = index if isinstance(index, tuple) else (index,)
        if len(items) != len(self.axes):
            raise fail(
                f"`self.{self.name}` is indexed with {len(items)} indices, and was declared with "
                f"{len(self.axes)} axes {self.axes}",
                "Give one integer expression per axis",
            )
        nodes = []
        for axis, item in zip(self.axes, items):
            if isinstance(item, slice) or item is None or item is Ellipsis:
                raise fail(f"`self.{self.name}` is sliced", "Give one integer expression per axis")
            node = as_node(item)
            if node.dtype != I32:
                raise fail(
                    f"index `{text(node)}` of `self.{self.name}` on axis {axis!r} is {node.dtype}",
                    "Indices are integers: ag.cast(x, int)",
                )
            nodes.append(node)
        return load(self.name, self.dtype, self.axes, tuple(nodes))

    def __iter__(self) -> Any:  # without it Python would try self.table[0], self.table[1], ... without end
        raise fail(f"`self.{self.name}` is iterated over while a hook is traced", "Index it: self.table[at.head]")

    def __repr__(self) -> str:
        return f"the tensor field self.{self.name} itself (index it: self.{self.name}[...])"

    def __bool__(self) -> bool:
        raise fail(f"`self.{self.name}` has no truth value while a hook is traced", "Index it and use ag.where")

    __array_priority__ = 1000  # numpy operators defer to us, and fail with our message

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise fail(
            f"torch's `{getattr(func, '__name__', func)}` was called on a tensor field",
            f"Index it, self.table[at.head], and use {FUNCTIONS}",
        )


def trace_hook(name: str, function: Callable[..., Any], hook: Hook, locations: dict[Node, Where]) -> Node:
    """Call ``function(*symbols, at)`` once and return its node, typed as ``hook`` requires.

    Raises:
        VariantError: with the user's file and line, what was found and what to write instead.
    """
    inputs = [symbol(s) for s in hook.inputs]
    with recording(locations):
        result = call_user(name, function, *inputs, Point(name, hook.reads))
        return _typed(name, function, result, hook)


def call_user(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call user code; a foreign exception becomes a VariantError at the user's line."""
    _check_arity(name, function, args)
    try:
        return function(*args)
    except AttngenError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == _file(function)]
        where = (frames[-1].filename, frames[-1].lineno or 0) if frames else definition(function)
        found = f"hook `{name}` raised {type(error).__name__}: {error}"
        raise fail(found, f"Hooks compute with at.*, the variant's fields, numbers and {FUNCTIONS}", where) from error


def _check_arity(name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        inspect.signature(function).bind(*args)
    except TypeError:
        names = ["self", *(str(a) for a in args[:-1]), "at"] if args else ["self"]
        found = f"hook `{name}` is declared as {name}{inspect.signature(function)} (without self)"
        raise fail(found, f"Declare it as def {name}({', '.join(names)})", definition(function)) from None


def definition(function: Callable[..., Any]) -> Where | None:
    """File and line of a function's definition."""
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    return (code.co_filename, code.co_firstlineno) if code else None


def _file(function: Callable[..., Any]) -> str | None:
    place = definition(function)
    return place[0] if place else None


def _typed(name: str, function: Callable[..., Any], result: Any, hook: Hook) -> Node:
    wanted = {F32: "a float expression", BOOL: "a bool expression (True = attend)", I32: "an integer expression"}
    if not isinstance(result, (Node, bool, int, float)):
        what = "None (is a `return` missing?)" if result is None else f"{type(result).__name__} {result!r}"
        raise fail(f"hook `{name}` returned {what}", f"Return {wanted[hook.returns]}", definition(function))
    node = as_node(result)
    if node.dtype == I32 and hook.returns == F32:
        return to_f32(node)
    if node.dtype != hook.returns:
        remedy = {
            BOOL: "Return a comparison, e.g. at.kv <= at.q; ag.cast(x, bool) tests x != 0",
            F32: "Return a float: ag.where(condition, a, b) chooses, ag.cast(x, float) converts",
            I32: "Return an integer: ag.cast(x, int) converts",
        }[hook.returns]
        raise fail(f"hook `{name}` returned {node.dtype}: {text(node)}", remedy, definition(function))
    return node


def kinds(node: Node) -> tuple[list[Node], Node | None]:
    """Split a position that depends on the key only through ``ag.where(condition on kv, ...)``.

    Returns the row-wise positions and the i32 node that says which of them a key uses (None: the only one).
    """
    if "kv" not in node.symbols and "kv_token" not in node.symbols:
        return [node], None
    if node.op != "where" or node.args[0].symbols & {"q", "q_token", "head"}:
        raise fail(
            f"q_position `{text(node)}` mixes the query and the key",
            "It may depend on the key only by kind: ag.where(at.kv < self.sinks, position_a, position_b)",
        )
    condition, yes, no = node.args
    first, first_kind = kinds(yes)
    second, second_kind = kinds(no)
    zero = as_node(0)
    from_no = (second_kind if second_kind is not None else zero) + len(first)
    from_yes = first_kind if first_kind is not None else zero
    return first + second, where(condition, from_yes, from_no)
