"""Tile bounds: which KV tiles a mask can reach, in closed form.

``analyse(mask)`` splits a mask into conjuncts and turns each one that is linear in ``at.q`` and ``at.kv`` (causal,
windows, prefixes) into an inequality ``cq*q + ck*kv + terms >= 0``. From these follow the first and last key of a
row tile and the test that a tile is FULL. Conjuncts that are not linear are listed: their tiles stay PARTIAL, which is
always sound. A kernel evaluates the inequalities in int64 and drops one for which i32 arithmetic could have wrapped.
"""

from __future__ import annotations


from .expr import TILE, Node, conjuncts, const, symbol, text
from .ops import BOOL, I32
from .records import record


@record
class Inequality:
    """``cq * q + ck * kv + sum(sign * term) >= 0``; terms are uniform in a tile (per call or per request).

    ``wq`` and ``wk`` sum the coefficients' magnitudes: wq*|q| + wk*|kv| + sum(|sign * term|) < 2**31 proves that the
    mask's own i32 arithmetic did not wrap.
    """

    cq: int
    ck: int
    wq: int
    wk: int
    terms: tuple[tuple[int, Node], ...]
    source: Node

    def __str__(self) -> str:
        terms = [(self.cq, "q"), (self.ck, "kv"), *((sign, text(term)) for sign, term in self.terms)]
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
    opaque: tuple[Node, ...]  # conjuncts that stay PARTIAL

    @property
    def exact(self) -> bool:
        """Whether the inequalities are the whole mask."""
        return not self.opaque


def analyse(mask: Node | None) -> TileBounds:
    """The closed bounds of ``mask`` (None attends everywhere)."""
    closed: list[Inequality] = []
    opaque: list[Node] = []
    for term in conjuncts(mask) if mask is not None else []:
        found = _inequalities(term)
        if found is None:
            opaque.append(term)
        else:
            closed.extend(found)
    return TileBounds(tuple(closed), tuple(opaque))


def _inequalities(term: Node) -> list[Inequality] | None:
    if term.op == "const" and term.dtype == BOOL and term.attr:
        return []
    if term.op not in ("lt", "le", "eq") or term.args[0].dtype != I32:
        return None
    a, b = term.args
    right = _linear(b, 1)
    left = None if right is None else _linear(a, -1)
    if left is None:
        return None
    forward = right + left
    strict = [(-1, const(1))] if term.op == "lt" else []
    found = [_collect(forward + strict, term)]
    if term.op == "eq":
        found.append(_collect([(-sign, node) for sign, node in forward], term))
    return found


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
    return [(sign, node)] if node is _Q or node is _KV or node.level <= TILE else None


_Q, _KV = symbol("q"), symbol("kv")


def _collect(pairs: list[tuple[int, Node]], source: Node) -> Inequality:
    q = [sign for sign, node in pairs if node is _Q]
    kv = [sign for sign, node in pairs if node is _KV]
    terms = tuple((sign, node) for sign, node in pairs if node is not _Q and node is not _KV)
    return Inequality(sum(q), sum(kv), sum(map(abs, q)), sum(map(abs, kv)), terms, source)
