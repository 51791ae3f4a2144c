"""Tile bounds: which KV tiles a mask can reach, in closed form.

``analyse(mask)`` splits a mask into conjuncts and turns each one that is linear in ``at.q`` and ``at.kv`` (causal, windows, prefixes), or
in both divided by one number (chunks, rows of an image), into an inequality ``cq*q + ck*kv + terms >= 0``. From these follow the first
and last key of a row tile and the test that a tile is FULL. Of one conjunct that is a disjunction (sinks or a window) the alternatives
have inequalities of their own: keys lie in one range or the other, with a gap between. Other conjuncts are listed: of them closed bounds
say nothing, which is always sound. A kernel evaluates the inequalities in int64 and drops one for which i32 arithmetic could have wrapped.
"""

from __future__ import annotations


from .expr import TILE, Node, conjuncts, const, symbol, text
from .ops import BOOL, I32
from .records import record


@record
class Inequality:
    """``cq * q + ck * kv + sum(sign * term) >= 0``; terms are uniform in a tile (per call or per request). With a ``unit``, which is
    uniform too, it is of q // unit and kv // unit, and says nothing where the unit is not positive.

    ``wq`` and ``wk`` sum the coefficients' magnitudes: wq*|q| + wk*|kv| + sum(|sign * term|) < 2**31 proves that the
    mask's own i32 arithmetic did not wrap.
    """

    cq: int
    ck: int
    wq: int
    wk: int
    terms: tuple[tuple[int, Node], ...]
    source: Node
    unit: Node | None = None

    def __str__(self) -> str:
        q, kv = ("q", "kv") if self.unit is None else (f"({x} // {text(self.unit)})" for x in ("q", "kv"))
        terms = [(self.cq, q), (self.ck, kv), *((sign, text(term)) for sign, term in self.terms)]
        found = ""
        for factor, name in terms:
            if factor:
                size = name if abs(factor) == 1 else f"{abs(factor)}*{name}"
                found += f" {'-' if factor < 0 else '+'} {size}"
        return f"{found.removeprefix(' + ').replace(' - ', '-', 1) if found.startswith(' - ') else found.removeprefix(' + ')} >= 0"


@record
class TileBounds:
    """What is known of a mask in closed form."""

    closed: tuple[Inequality, ...]
    opaque: tuple[Node, ...]  # conjuncts that the inequalities do not express
    either: tuple[tuple[Inequality, ...], ...] = ()  # alternatives of one of these: keys satisfy the inequalities of one at least

    @property
    def exact(self) -> bool:
        """Whether the inequalities are the whole mask."""
        return not self.opaque


def analyse(mask: Node | None) -> TileBounds:
    """The closed bounds of ``mask`` (None attends everywhere)."""
    closed: list[Inequality] = []
    opaque: list[Node] = []
    either: tuple[tuple[Inequality, ...], ...] = ()
    for term in conjuncts(mask) if mask is not None else []:
        found = _inequalities(term)
        if found is None:
            opaque.append(term)
            either = either or alternatives(term)
        else:
            closed.extend(found)
    return TileBounds(tuple(closed), tuple(opaque), either)


_MAX_ALTERNATIVES = 4


def disjuncts(term: Node) -> list[Node]:
    """The terms of a disjunction, in order."""
    found, stack = [], [term]
    while stack:
        node = stack.pop()
        if node.op == "or" and node.dtype == BOOL:
            stack.extend(reversed(node.args))
        else:
            found.append(node)
    return found


def alternatives(term: Node) -> tuple[tuple[Inequality, ...], ...]:
    """The inequalities of each alternative of a disjunction; () where one of them may hold for any key."""
    found = [tuple(x for part in conjuncts(node) for x in _inequalities(part) or ()) for node in disjuncts(term)]
    bounded = all(any(x.ck for x in alternative) for alternative in found)
    return tuple(found) if bounded and 1 < len(found) <= _MAX_ALTERNATIVES else ()


def _inequalities(term: Node) -> list[Inequality] | None:
    if term.op == "const" and term.dtype == BOOL and term.attr:
        return []
    if term.op not in ("lt", "le", "eq") or term.args[0].dtype != I32:
        return None
    a, b = term.args
    strict = [(-1, const(1))] if term.op == "lt" else []
    right = _linear(b, 1)
    if right is None:
        return None
    if a.op == "abs" and term.op != "eq":  # |x| <= b: x <= b and -x <= b
        sides = [_linear(a.args[0], sign) for sign in (-1, 1)]
        found = [None if side is None else _collect(right + side + strict, term) for side in sides]
    else:
        left = _linear(a, -1)
        if left is None:
            return None
        forward = right + left
        found = [_collect(forward + strict, term)]
        if term.op == "eq":
            found.append(_collect([(-sign, node) for sign, node in forward], term))
    whole = [x for x in found if x is not None]
    return whole if len(whole) == len(found) else None


_MAX_TERMS = 64  # of an inequality; a longer sum is not worth its closed form
_MAX_COEFFICIENT = 1024  # far from where int64 arithmetic on positions could overflow


def _linear(node: Node, sign: int, depth: int = 0) -> list[tuple[int, Node]] | None:
    """``sign * node`` as (coefficient, atom) pairs; None where it is not linear in q and kv."""
    if depth > _MAX_TERMS:
        return None
    if node.op in ("add", "sub"):
        left = _linear(node.args[0], sign, depth + 1)
        right = None if left is None else _linear(node.args[1], sign if node.op == "add" else -sign, depth + 1)
        return None if right is None or len(left + right) > _MAX_TERMS else left + right
    if node.op == "neg":
        return _linear(node.args[0], -sign, depth + 1)
    if node.op == "mul" and node.args[1].op == "const" and 0 < abs(sign * node.args[1].attr) <= _MAX_COEFFICIENT:
        return _linear(node.args[0], sign * node.args[1].attr, depth + 1)
    return [(sign, node)] if node is _Q or node is _KV or node.level <= TILE or _unit(node) is not None else None


_Q, _KV = symbol("q"), symbol("kv")


def _unit(node: Node) -> Node | None:
    """What q or kv is divided by."""
    if node.op not in ("floordiv", "shr") or node.args[0] is not _Q and node.args[0] is not _KV:
        return None
    unit = node.args[1]
    if node.op == "shr":
        return const(1 << unit.attr) if unit.op == "const" and 0 <= unit.attr < 31 else None
    return unit if unit.level <= TILE and (unit.op != "const" or unit.attr > 0) else None


def _collect(pairs: list[tuple[int, Node]], source: Node) -> Inequality | None:
    """The inequality; None where it mixes positions and quotients."""
    units = {_unit(node) for _, node in pairs if node.level > TILE}
    if len(units) > 1:
        return None
    unit = next(iter(units), None)
    moving = [(sign, node if unit is None else node.args[0]) for sign, node in pairs if node.level > TILE]
    q = [sign for sign, node in moving if node is _Q]
    kv = [sign for sign, node in moving if node is _KV]
    return Inequality(sum(q), sum(kv), sum(map(abs, q)), sum(map(abs, kv)), tuple(x for x in pairs if x[1].level <= TILE), source, unit)
