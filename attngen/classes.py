"""Emission of tile classes: a mask as C text over intervals (templates/intervals.h), the rules of intervals.py for one tile.

The text reads as the mask does, `(kv <= q) & ((kv < 4) | (q - kv < t.window))`, where q and kv are ranges. What is the same for a
whole tile is a plain value; what rows alone decide is computed once for a range of rows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .bounds import alternatives, analyse, disjuncts
from .expr import COL, ELEM, ROW, TILE, Node, text, walk
from .ops import BOOL, F32, operand

Read = Callable[[Node, Sequence[str]], str]  # of a read and the texts of its indices' ranges
ROW_SYMBOLS, COL_SYMBOLS = ("q", "q_token", "head"), ("kv", "kv_token")
_TEXT = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "neg": "-{0}", "floordiv": "ag_floordiv({0}, {1})", "mod": "ag_mod({0}, {1})",
    "abs": "ag_abs({0})", "min": "ag_min({0}, {1})", "max": "ag_max({0}, {1})", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}",
    "not": "~{0}", "shl": "ag_shl({0}, {1})", "shr": "ag_shr({0}, {1})", "lt": "{0} < {1}", "le": "{0} <= {1}", "eq": "{0} == {1}",
    "where": "ag_where({0}, {1}, {2})", "to_bool": "ag_nonzero({0})", "to_i32": "ag_number({0})",
}  # fmt: skip
_LONG_TEXT = 160


@dataclass(frozen=True)
class RangeValue:
    """``ctype name = expr;``: an Interval or a Truth."""

    ctype: str
    name: str
    expr: str


@dataclass(frozen=True)
class Side:
    """What is computed once for a range of rows, or of keys: ``lines``, and then ``values``, which with the symbols ``met`` are all that
    tiles need of it. ``symbols``: of which any of it needs ranges."""

    lines: tuple[RangeValue, ...]
    values: tuple[RangeValue, ...]
    symbols: tuple[str, ...]
    met: tuple[str, ...]

    @property
    def size(self) -> int:
        """Ranges that are kept."""
        return len(self.values) + len(self.met)


@dataclass(frozen=True)
class ClassHoles:
    """The class of a tile: of its rows' and its keys' ranges, ``lines`` and ``kept``. ``beyond``: even of a single query it may know more
    than closed bounds and their alternatives."""

    rows: Side
    cols: Side
    lines: tuple[RangeValue, ...]
    kept: str
    beyond: bool


def along_one_axis(node: Node) -> bool:
    """Whether a read has a range that can be known of a tile: of ints or bools, one index of at most two varies in it."""
    return node.level in (ROW, COL) and node.dtype != F32 and sum(a.level > TILE for a in node.args) == 1 and len(node.args) <= 2


def opaque_part(mask: Node | None, readable: Callable[[Node], bool] = along_one_axis) -> Node | None:
    """The part of a mask for which every tile is PARTIAL: a float's comparison, or a read of which no range is known
    (``readable`` says of which one is). None where some tiles may be EMPTY or FULL for more than closed bounds."""
    stops = [stop_of(term, readable) for term in analyse(mask).opaque]
    return None if not stops or any(s is None for s in stops) else stops[0]


def findings(mask: Node) -> list[tuple[str, str]]:
    """What is known of tiles, for people: (what, term of the mask), closed bounds first."""
    found = analyse(mask)
    lines = [(f"bounds: {b}", text(b.source)) for b in found.closed]
    for term in found.opaque:
        stop = stop_of(term)
        if found.either and found.either == alternatives(term):
            ranges = (" and ".join(map(str, x)) for x in found.either)
            lines.append((f"bounds: {' or '.join(ranges)}", text(term)))
        if stop is None:
            lines.append(("tiles: classed by intervals", text(term)))
        else:
            lines.append((f"tiles: all are evaluated, nothing is known of {text(stop)}", text(term)))
    return lines


def stop_of(root: Node, readable: Callable[[Node], bool] = along_one_axis) -> Node | None:
    """The node because of which nothing is known of ``root`` in any tile; None where something is of some."""
    stops: dict[Node, Node | None] = {}
    for node in walk(root):
        args = [stops[a] for a in node.args]
        first = next((s for s in args if s is not None), None)
        if node.level <= TILE:
            stops[node] = None
        elif node.op == "load":
            stops[node] = None if readable(node) and first is None else node
        elif node.op == "sym":
            stops[node] = node if node.dtype == F32 else None
        elif node.op not in _TEXT or node.args[0].dtype == F32:
            stops[node] = node  # of floats
        elif node.op in ("and", "or", "min", "max") or node.op == "where" and args[0] is None:  # either side may decide
            stops[node] = None if any(s is None for s in args[-2:]) else first
        elif node.op == "mod" and args[1] is None:  # between 0 and the divisor
            stops[node] = None
        else:
            stops[node] = first
    return stops[root]


def tile_class(mask: Node | None, uniform: Callable[[Node], str], readable: Callable[[Node], bool], read: Read, name: Callable[[str], str]) -> ClassHoles | None:
    """The class of a tile for ``mask``; None where closed bounds say all that can be known.

    Args:
        uniform: the text of a value that is the same for a whole tile.
        readable, read: whether the range of a read is known, and its text.
        name: a fresh name.
    """
    if mask is None or analyse(mask).exact or opaque_part(mask, readable) is not None:
        return None
    nodes = list(walk(mask))
    uses = Counter(a for n in nodes for a in n.args)
    met = {a for n in nodes if n.level == ELEM for a in n.args} | {mask}
    tile = _Lines(uniform, readable, read, uses)
    sides = []
    for level, prefix in ((ROW, "r"), (COL, "k")):
        side = _Lines(uniform, readable, read, uses)
        values = []
        for node in nodes:
            if node in met and node.level == level and node.op != "sym" and node.dtype != F32:
                hint = node.attr[0] if node.op == "load" else "of_rows" if level == ROW else "of_keys"
                values.append(RangeValue(_ctype(node), name(hint), side.text(node)))
                tile.texts[node] = f"{prefix}.{values[-1].name}"
        sides.append((side, values))
    kept, found = tile.text(mask), analyse(mask)
    beyond = any(
        not found.either or alternatives(term) != found.either or not all(analyse(x).exact for x in disjuncts(term)) for term in found.opaque
    )
    words = _words(kept, tile.lines)

    def finished(side: _Lines, values: list[RangeValue], prefix: str, symbols: tuple[str, ...]) -> Side:
        values = [value for value in values if f"{prefix}.{value.name}" in words]
        needed = words | _words("", [*side.lines, *values])
        return Side(tuple(side.lines), tuple(values), *(tuple(s for s in symbols if s in of) for of in (needed, words)))

    return ClassHoles(finished(*sides[0], "r", ROW_SYMBOLS), finished(*sides[1], "k", COL_SYMBOLS), tuple(tile.lines), kept, beyond)


def _words(kept: str, lines: Sequence[RangeValue]) -> set[str]:
    return set(re.findall(r"[A-Za-z_][\w.]*", " ".join([kept, *(line.expr for line in lines)])))


def _ctype(node: Node) -> str:
    return "Truth" if node.dtype == BOOL else "Interval"


class _Lines:
    """Texts of nodes' ranges; what is used twice, or is long, becomes a line."""

    def __init__(self, uniform: Callable[[Node], str], readable: Callable[[Node], bool], read: Read, uses: Counter[Node]) -> None:
        self.uniform, self.readable, self.read, self.uses = uniform, readable, read, uses
        self.texts: dict[Node, str] = {}
        self.lines: list[RangeValue] = []

    def text(self, root: Node) -> str:
        stack = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if node in self.texts:
                continue
            if ready or (leaf := self._leaf(node)) is None and not node.args:
                found = self._operation(node)
                if node is not root and (self.uses[node] > 1 and not _is_name(found) or len(found) > _LONG_TEXT):
                    self.lines.append(RangeValue(_ctype(node), f"e{len(self.lines)}", found))
                    found = self.lines[-1].name
                self.texts[node] = found
            elif leaf is not None:
                self.texts[node] = leaf
            else:
                stack.append((node, True))
                stack.extend((a, False) for a in reversed(node.args))
        return self.texts[root]

    def _leaf(self, node: Node) -> str | None:
        if node.level <= TILE and node.dtype != F32:
            return self.uniform(node)
        if node.dtype == F32:
            return "float"  # never part of a text: see below
        if node.op == "sym":
            return node.attr
        if node.op == "load" and not self.readable(node) or node.op != "load" and (node.op not in _TEXT or node.args[0].dtype == F32):
            return "ag_any_bool()" if node.dtype == BOOL else "ag_any_int()"
        return None

    def _operation(self, node: Node) -> str:
        args = [self.texts[a] for a in node.args]
        if node.op == "load":
            return self.read(node, args)
        if node.op == "to_i32" and node.args[0].dtype != BOOL:
            return args[0]
        if node.op == "where":  # both sides of one type
            args[1:] = [f"{_ctype(node)}({x})" if a.level <= TILE else x for a, x in zip(node.args[1:], args[1:])]
        pattern = "!{0}" if node.op == "not" and node.dtype == BOOL else _TEXT[node.op]
        return pattern.format(*(args if pattern.startswith("ag_") else map(operand, args)))


def _is_name(expr: str) -> bool:
    return all(ch.isalnum() or ch in "_." for ch in expr)
