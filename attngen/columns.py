"""Emission of masks by columns: a mask as C text over words, in which a bit stands for a key (templates/cuda/columns.cuh).

A thread of a tensor core kernel holds 32 scores of a row of 128 keys. What a mask keeps of them is a word, and ``and``, ``or``, ``not`` act on
words. A comparison that is linear in ``kv`` is a range of keys, in the row's own terms: two shifts for 32 keys. So is one of ``kv // unit``
(chunks, rows of an image); a bit of a packed mask comes with its neighbours. Other terms are evaluated key by key into a word.
Words say what the mask says unless i32 arithmetic wraps: ``holds`` is true of a row for which it cannot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence

from .expr import ROW, Node, const, symbol
from .ops import BOOL, I32, operand, scaled, sum_text
from .records import record

_KV, _KV_LEN = symbol("kv"), symbol("kv_len")
_LOGIC = {"and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "~{0}", "eq": "~({0} ^ {1})", "where": "({0} & {1}) | (~{0} & {2})"}
_LONG_TEXT = 160
_POSITION = 2**30 - 1  # what positions and lengths are at most (docs/writing-variants.md)
_BOUNDED = frozenset(("q", "kv", "q_len", "kv_len", "q_offset"))
_ANY = 2**31  # magnitude of an i32 of which nothing is known

_Sum = list[tuple[int, Node]]  # coefficients and terms


@record
class ColumnTexts:
    """The word of a row: ``lines`` (name and expression) and ``result``, C texts of row values and of ``first``, the position of the first
    column's key. ``terms``: names of words, and what they hold, evaluated key by key. ``holds``: what must be true; '' for nothing."""

    lines: tuple[tuple[str, str], ...]
    result: str
    terms: tuple[tuple[str, Node], ...]
    holds: str


def column_texts(mask: Node, value: Callable[[Node], str], name: Callable[[str], str], bytes_: Container[str] = ()) -> ColumnTexts:
    """``mask`` by columns. ``value``: the text of what a row knows; ``name``: a fresh name; ``bytes_``: tensors that are stored as uint8."""
    return _Columns(value, name, bytes_).texts(mask)


def _is_logic(node: Node) -> bool:
    return node.op in _LOGIC and node.level > ROW and all(a.dtype == BOOL for a in node.args)


class _Columns:
    def __init__(self, value: Callable[[Node], str], name: Callable[[str], str], bytes_: Container[str]) -> None:
        self.value, self.name, self.bytes = value, name, bytes_
        self.terms: dict[Node, str] = {}
        self.holds: dict[str, None] = {}

    def texts(self, mask: Node) -> ColumnTexts:
        nodes, uses = _skeleton(mask)
        words: dict[Node, str | None] = {}  # None: evaluated key by key, with what it is part of if that is too
        lines: list[tuple[str, str]] = []
        for node in nodes:
            if not _is_logic(node):
                words[node] = self.leaf(node)
                continue
            if all(words[a] is None for a in node.args if a.level > ROW):
                words[node] = None
                continue
            text = _LOGIC[node.op].format(*(operand(self.word(a, words)) for a in node.args))
            if node is not mask and (uses[node] > 1 or len(text) > _LONG_TEXT):
                lines.append((f"e{len(lines)}", text))
                text = lines[-1][0]
            words[node] = text
        return ColumnTexts(tuple(lines), self.word(mask, words), tuple((x, node) for node, x in self.terms.items()), " && ".join(self.holds))

    def word(self, node: Node, words: dict[Node, str | None]) -> str:
        text = words[node]
        if text is None:
            text = self.terms[node] = self.terms.get(node) or self.name("term")
        return text

    def leaf(self, node: Node) -> str | None:
        """The word of a term; None where only its keys' own values say it."""
        if node.level <= ROW:
            return f"ag_columns_all({self.value(node)})"
        if node.op not in ("lt", "le", "eq") or node.args[0].dtype != I32:
            return None
        if node.op == "eq" and (packed := _packed_bit(node)) is not None and packed.load.attr[0] in self.bytes:
            return self.packed_bits(packed)
        a, b = node.args
        moving = [x.op == "abs" and x.level > ROW and node.op != "eq" for x in (a, b)]  # a row's own |x| is what i32 makes of it
        inverted = moving == [False, True]  # a < |x|: not |x| <= a
        strict = (node.op == "lt") != inverted
        if inverted:
            a, b = b, a
        around = any(moving)  # |x| <= b: x <= b and -b <= x
        sides = left, right = _linear(a.args[0] if around else a), _linear(b)
        if left is None or right is None:
            return None
        if around:
            found = [self.ordered(left, right, strict), self.ordered(_negative(right), left, strict)]
        elif node.op == "eq":
            found = [self.ordered(left, right, False), self.ordered(right, left, False)]
        else:
            found = [self.ordered(left, right, strict)]
        if any(x is None for x in found):
            return None
        self.never_wraps(sides)
        text = " & ".join(x for x in found if x)
        return f"~({text})" if inverted else text

    # ---- ranges of keys
    def ordered(self, less: _Sum, more: _Sum, strict: bool) -> str | None:
        """Where ``less`` < ``more`` (``strict``) or <=, as of integers; None unless kv, or kv // unit, is in it just once."""
        total = _negative(less) + more
        keys = [(factor, node) for factor, node in total if node.level > ROW]
        if len(keys) != 1 or abs(keys[0][0]) != 1:
            return None
        ((sign, key),) = keys
        rest, unit = [x for x in total if x[1].level <= ROW], _unit(key)
        if sign < 0:  # key < rest + 1, or rest
            return f"ag_columns_below(first, {self.limit(rest, 0 if strict else 1, unit)})"
        return f"~ag_columns_below(first, {self.limit(_negative(rest), int(strict), unit)})"

    def never_wraps(self, sides: Sequence[_Sum]) -> None:
        """Of the sums, as i32 arithmetic makes them; and that units are positive."""
        for side in sides:
            for _, node in side:
                if node.level > ROW and (unit := _unit(node)) is not None and unit.op != "const":
                    self.holds[f"{operand(self.value(unit))} > 0"] = None
            if len(side) == 1 and side[0][0] == 1 or _weight(side) < 2**31:
                continue
            weights = [scaled(abs(factor), f"ag_abs64({self.value(node)})") for factor, node in side if node.level <= ROW]
            weights += [f"{abs(factor)}LL * {self.value(_KV_LEN)}" for factor, node in side if node.level > ROW]  # keys past the last are never kept
            self.holds[f"{' + '.join(weights)} < 2147483648LL"] = None

    def limit(self, terms: _Sum, plus: int, unit: Node | None) -> str:
        """``(sum of terms + plus) * unit`` as an int32; as the nearest one where it is none."""
        # A first query at 2**31 - 1, which sees every key, is more than the call promises to serve, and costs nothing here.
        large = _weight(terms) + plus >= 2**31 or any("q" in node.symbols for _, node in terms)
        wide = len(terms) + (plus != 0) > 1 and large or any(factor != 1 and _magnitude(node) >= _ANY for factor, node in terms)
        cast = "(int64_t)" if wide else ""
        text = sum_text(*(scaled(factor, cast + operand(self.value(node))) for factor, node in terms), str(plus) if plus else "")
        text = f"ag_limit({text})" if wide else text
        return text if unit is None else f"ag_limit((int64_t){operand(text)} * {operand(self.value(unit))})"

    # ---- packed bits
    def packed_bits(self, bit: _PackedBit) -> str:
        """Of a row of bits, read as words."""
        tensor = bit.load.attr[0]
        start = " + ".join(["8LL * (" + " + ".join(f"(int64_t){operand(self.value(x))}" for x in bit.bytes) + ")"] * bool(bit.bytes)
                           + [f"(int64_t){operand(self.value(x))}" for x in bit.bits]) or "0"  # fmt: skip
        self.holds[f"ag_bits_within({start} + first, p.size0_{tensor}, p.stride0_{tensor})"] = None
        self.never_wraps([[(1, _KV), *((1, x) for x in bit.bits)]])
        return f"ag_columns_of_bits(p.param_{tensor}, {start} + first)"


@record
class _PackedBit:
    """``(load[bytes + (bit >> 3)] >> (bit & 7)) & 1 == 1`` with bit = kv + bits: the sums' terms are a row's."""

    load: Node
    bytes: tuple[Node, ...]
    bits: tuple[Node, ...]


def _packed_bit(node: Node) -> _PackedBit | None:
    """What ``node`` reads, if it is such a bit of a tensor of bytes."""
    shifted, one = node.args
    if one is not const(1) or shifted.op != "and" or shifted.args[1] is not const(1) or shifted.args[0].op != "shr":
        return None
    load, place = shifted.args[0].args
    if load.op != "load" or len(load.args) != 1 or place.op != "and" or place.args[1] is not const(7):
        return None
    bit, index = _linear(place.args[0]), _linear(load.args[0], place.args[0] >> 3)
    if bit is None or index is None:
        return None
    keys = [x for x in bit if x[1].level > ROW]
    bytes_ = [x for x in index if x[1].level > ROW]
    if keys != [(1, _KV)] or bytes_ != [(1, place.args[0] >> 3)] or any(factor != 1 for factor, _ in bit + index):
        return None
    return _PackedBit(load, *(tuple(x for _, x in terms if x.level <= ROW) for terms in (index, bit)))


_MAX_TERMS = 16


def _linear(node: Node, atom: Node | None = None, sign: int = 1, depth: int = 0) -> _Sum | None:
    """``sign * node`` as a sum of what a row knows, kv and quotients of it (or ``atom``); None where it is something else."""
    if node.level <= ROW or node is _KV or node is atom or _unit(node) is not None:
        return [(sign, node)]
    if depth > _MAX_TERMS or node.op not in ("add", "sub", "neg"):
        return None
    if node.op == "neg":
        return _linear(node.args[0], atom, -sign, depth + 1)
    left, right = _linear(node.args[0], atom, sign, depth + 1), _linear(node.args[1], atom, sign if node.op == "add" else -sign, depth + 1)
    return None if left is None or right is None or len(left + right) > _MAX_TERMS else left + right


def _unit(node: Node) -> Node | None:
    """What kv is divided by."""
    if node.op not in ("floordiv", "shr") or node.args[0] is not _KV:
        return None
    unit = node.args[1]
    if node.op == "shr":
        return const(1 << unit.attr) if unit.op == "const" and 0 <= unit.attr < 31 else None
    return unit if unit.level <= ROW and (unit.op != "const" or unit.attr > 0) else None


def _negative(terms: _Sum) -> _Sum:
    return [(-factor, node) for factor, node in terms]


def _magnitude(node: Node) -> int:
    """What an i32 is at most, in absolute value."""
    if node.op == "const":
        return abs(node.attr)
    if node.op == "sym" and node.attr in _BOUNDED:
        return _POSITION
    if node.op in ("add", "sub") and node.dtype == I32:
        return min(_ANY, sum(_magnitude(a) if a.op in ("const", "sym") else _ANY for a in node.args))
    return _magnitude(node.args[0]) if _unit(node) is not None else _ANY


def _weight(terms: _Sum) -> int:
    return sum(abs(factor) * _magnitude(node) for factor, node in terms)


def _skeleton(mask: Node) -> tuple[list[Node], Counter[Node]]:
    """The terms of a mask and what joins them, arguments first, and how often each is used."""
    uses: Counter[Node] = Counter()
    found: list[Node] = []
    stack = [(mask, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            found.append(node)
            continue
        uses[node] += 1
        if uses[node] == 1:
            stack.append((node, True))
            if _is_logic(node):
                stack.extend((a, False) for a in reversed(node.args))
    return found, uses
