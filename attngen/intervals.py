"""Interval analysis: what a mask says of whole tiles, for any expression.

``classify(mask, ...)`` evaluates a mask once over ranges of queries and keys, all tiles at a time, and says of each tile whether the
mask keeps none, all or some of its pairs. It is sound for every mask: a tile that it calls EMPTY or FULL is. It is as tight as
brute force where a mask compares functions that are monotone within a tile (causal, windows, sinks | window, chunks, prefixes);
where it cannot tell it says PARTIAL. The method is Moore's interval arithmetic (1966) on int32 that may wrap, with three-valued logic. A
read along one axis has the minimum and maximum of exactly the entries that a tile reads (a zone map).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Any

import torch

from .expr import Node, walk
from .ops import BOOL, F32, I32_MAX, I32_MIN


class Tile(IntEnum):
    """What a mask keeps of a tile."""

    EMPTY, PARTIAL, FULL = 0, 1, 2


Range = tuple[torch.Tensor, torch.Tensor]  # least and largest value, int64; of a bool 0 or 1


def classify(
    mask: Node | None, q: Range, kv: Range, symbols: Mapping[str, Range] | None = None, params: Mapping[str, Any] | None = None,
) -> torch.Tensor:  # fmt: skip
    """The class of every tile.

    Args:
        mask: a trace's mask; None keeps everything.
        q, kv: first and last position of each tile, int64 tensors that broadcast, such as ``[tiles, 1]`` and ``[1, tiles]``.
        symbols: ranges of other symbols (``head``, ``q_token``, ``kv_token``, ``kv_len``, ...); what is missing may be anything.
        params: values of parameters: numbers, bools and tensors. A tensor that is missing may hold anything.

    Returns:
        int64, the broadcast shape of q and kv: values of ``Tile``.
    """
    shape = torch.broadcast_shapes(q[0].shape, kv[0].shape)
    if mask is None:
        return torch.full(shape, int(Tile.FULL))
    known = {"q": q, "kv": kv, **(symbols or {})}
    ranges: dict[Node, Range | None] = {}  # None: a float, of which nothing is known
    for node in walk(mask):
        ranges[node] = None if node.dtype == F32 else _range(node, [ranges[a] for a in node.args], known, params or {})
    must, may = ranges[mask]
    return (must + may).expand(shape).clone()


def tiles(q_len: int, kv_len: int, q_offset: int, block_q: int, block_kv: int) -> tuple[Range, Range]:
    """Ranges of the tiles of a matrix: ``[q tiles, 1]`` and ``[1, kv tiles]``; the last ones end at q_len and kv_len."""

    def cut(length: int, block: int, offset: int) -> Range:
        first = torch.arange(0, max(length, 1), block)
        return first + offset, (first + block).clamp(max=max(length, 1)) - 1 + offset

    rows, columns = cut(q_len, block_q, q_offset), cut(kv_len, block_kv, 0)
    return (rows[0][:, None], rows[1][:, None]), (columns[0][None], columns[1][None])


def _exactly(value: int) -> Range:
    x = torch.tensor(int(value))
    return x, x


def _anything(dtype: str) -> Range:
    return (torch.tensor(0), torch.tensor(1)) if dtype == BOOL else (torch.tensor(I32_MIN), torch.tensor(I32_MAX))


def _range(node: Node, args: list[Range | None], known: Mapping[str, Range], params: Mapping[str, Any]) -> Range:
    if node.op == "const":
        return _exactly(node.attr)
    if node.op == "sym":
        return known.get(node.attr) or _anything(node.dtype)
    if node.op == "param":
        value = params.get(node.attr[0])
        return _anything(node.dtype) if value is None else _exactly(int(value))
    if node.op == "load":
        return _load(params.get(node.attr[0]), args, node.dtype)
    if any(a is None for a in args):  # a comparison or a cast of floats
        return _anything(node.dtype)
    of_bools = node.args[0].dtype == BOOL
    rule = (_BOOL_RULES if of_bools and node.op in _BOOL_RULES else _RULES).get(node.op)
    if rule is None:
        return _anything(node.dtype)
    lo, hi = rule(*args)
    if node.dtype == BOOL:
        return lo.long(), hi.long()
    wraps = (lo < I32_MIN) | (hi > I32_MAX)
    return torch.where(wraps, I32_MIN, lo), torch.where(wraps, I32_MAX, hi)


# ---- int32: bounds before wrapping, which _range looks at


def _corners(f: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], a: Range, b: Range) -> Range:
    """Of a function that is monotone in each argument."""
    found = [f(x, y) for x in a for y in b]
    lo = hi = found[0]
    for x in found[1:]:
        lo, hi = torch.minimum(lo, x), torch.maximum(hi, x)
    return lo, hi


def _abs(a: Range) -> Range:
    lo, hi = a
    inside = (lo <= 0) & (hi >= 0)
    return torch.where(inside, 0, torch.minimum(lo.abs(), hi.abs())), torch.maximum(lo.abs(), hi.abs())


def _floordiv(a: Range, b: Range) -> Range:
    """By divisors of one sign the corners decide; by 0 it is 0; else no quotient is larger than its dividend."""
    signed = (b[0] > 0) | (b[1] < 0)
    safe = tuple(torch.where(signed, x, 1) for x in b)
    lo, hi = _corners(lambda x, y: x.div(y, rounding_mode="floor"), a, safe)
    most = torch.maximum(a[0].abs(), a[1].abs())
    return torch.where(signed, lo, -most), torch.where(signed, hi, most)


def _mod(a: Range, b: Range) -> Range:
    """Within one period of a known divisor it is a difference; else it is between 0 and the divisor."""
    one = (b[0] == b[1]) & (b[0] != 0)
    divisor = torch.where(one, b[0], 1)
    first, last = (x.div(divisor, rounding_mode="floor") for x in a)
    within = one & (first == last)
    rest = [x - first * divisor for x in a]
    lo, hi = torch.where(b[0] < 0, b[0] + 1, 0), torch.where(b[1] > 0, b[1] - 1, 0)
    return torch.where(within, rest[0], lo), torch.where(within, rest[1], hi)


def _ones(x: torch.Tensor) -> torch.Tensor:
    """The least 2^k - 1 that is not below x >= 0."""
    for shift in (1, 2, 4, 8, 16, 32):
        x = x | x >> shift
    return x


def _known(f: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], a: Range, b: Range, lo: torch.Tensor, hi: torch.Tensor) -> Range:
    """f(a, b) where both are one value, else ``lo`` to ``hi``."""
    one, value = (a[0] == a[1]) & (b[0] == b[1]), f(a[0], b[0])
    return torch.where(one, value, lo), torch.where(one, value, hi)


def _and(a: Range, b: Range) -> Range:
    low = _bits_below(a, b)
    if low is not None:
        return low
    lo, hi = torch.tensor(I32_MIN), torch.tensor(I32_MAX)
    for x in (a, b):  # a factor that is not negative bounds the result
        positive = x[0] >= 0
        lo, hi = torch.where(positive, 0, lo), torch.where(positive, torch.minimum(x[1], hi), hi)
    return _known(torch.bitwise_and, a, b, lo, hi)


def _bits_below(a: Range, b: Range) -> Range | None:
    """x & (2^k - 1) is x % 2^k."""
    for x, y in ((a, b), (b, a)):
        if y[0].numel() == 1 and int(y[0]) == int(y[1]) >= 0 and int(y[0]) & (int(y[0]) + 1) == 0:
            return _mod(x, (y[0] + 1, y[1] + 1))
    return None


def _or(a: Range, b: Range) -> Range:
    return _bits(torch.bitwise_or, a, b, torch.maximum(a[0], b[0]))


def _xor(a: Range, b: Range) -> Range:
    return _bits(torch.bitwise_xor, a, b, torch.tensor(0))


def _bits(f: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], a: Range, b: Range, least: torch.Tensor) -> Range:
    """Of numbers that are not negative no bit is set above theirs."""
    positive = (a[0] >= 0) & (b[0] >= 0)
    most = _ones((a[1] | b[1]).clamp(min=0))
    return _known(f, a, b, torch.where(positive, least, I32_MIN), torch.where(positive, most, I32_MAX))


def _shl(a: Range, n: Range) -> Range:
    known, inside = n[0] == n[1], (n[0] >= 0) & (n[0] < 32)
    by = torch.where(known & inside, n[0], 0)
    lo, hi = (torch.where(inside, x << by, 0) for x in a)
    return torch.where(known, lo, I32_MIN), torch.where(known, hi, I32_MAX)


def _shr(a: Range, n: Range) -> Range:
    known = n[0] == n[1]
    by = torch.where((n[0] >= 0) & (n[0] < 32), n[0], 31)
    lo, hi = torch.where(a[0] < 0, a[0], 0), torch.where(a[1] < 0, -1, a[1])
    return torch.where(known, a[0] >> by, lo), torch.where(known, a[1] >> by, hi)


def _where(c: Range, a: Range, b: Range) -> Range:
    lo = torch.where(c[0] == 1, a[0], torch.where(c[1] == 0, b[0], torch.minimum(a[0], b[0])))
    return lo, torch.where(c[0] == 1, a[1], torch.where(c[1] == 0, b[1], torch.maximum(a[1], b[1])))


_RULES: dict[str, Callable[..., Range]] = {
    "add": lambda a, b: (a[0] + b[0], a[1] + b[1]), "sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "mul": lambda a, b: _corners(torch.mul, a, b), "neg": lambda a: (-a[1], -a[0]), "abs": _abs,
    "min": lambda a, b: (torch.minimum(a[0], b[0]), torch.minimum(a[1], b[1])),
    "max": lambda a, b: (torch.maximum(a[0], b[0]), torch.maximum(a[1], b[1])),
    "floordiv": _floordiv, "mod": _mod, "and": _and, "or": _or, "xor": _xor, "not": lambda a: (~a[1], ~a[0]), "shl": _shl, "shr": _shr,
    "lt": lambda a, b: (a[1] < b[0], a[0] < b[1]), "le": lambda a, b: (a[1] <= b[0], a[0] <= b[1]),
    "eq": lambda a, b: ((a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0]), (a[0] <= b[1]) & (b[0] <= a[1])),
    "where": _where, "to_bool": lambda a: ((a[0] > 0) | (a[1] < 0), (a[0] != 0) | (a[1] != 0)), "to_i32": lambda a: a,
}  # fmt: skip
_BOOL_RULES: dict[str, Callable[..., Range]] = {
    "and": _RULES["min"], "or": _RULES["max"], "not": lambda a: (1 - a[1], 1 - a[0]),
    "xor": lambda a, b: _known(torch.bitwise_xor, a, b, torch.tensor(0), torch.tensor(1)),
}  # fmt: skip


# ---- reads


def _load(tensor: torch.Tensor | None, index: list[Range | None], dtype: str) -> Range:
    """A read beyond the tensor yields 0."""
    if tensor is None or any(i is None for i in index):
        return _anything(dtype)
    values = (tensor != 0).long() if dtype == BOOL else tensor.to(torch.int32).long()
    fixed = [lo.numel() == 1 and bool(lo == hi) for lo, hi in index]
    for axis in reversed(range(values.dim())):  # axes of which a tile reads one place
        if fixed[axis]:
            place = int(index[axis][0])
            if not 0 <= place < values.shape[axis]:
                return _exactly(0)
            values = values.select(axis, place)
    index = [i for i, known in zip(index, fixed) if not known]
    if values.numel() == 0 or values.dim() == 0:
        return _exactly(int(values) if values.dim() == 0 else 0)
    beyond = torch.tensor(False)
    for (lo, hi), size in zip(index, values.shape):
        beyond = beyond | (lo < 0) | (hi >= size)
    if values.dim() == 1:
        (lo, hi), size = index[0], len(values)
        none = (hi < 0) | (lo >= size)
        low, high = _extremes(values, lo.clamp(0, size - 1), hi.clamp(0, size - 1))
        low, high = torch.where(none, 0, low), torch.where(none, 0, high)
    else:
        low, high = values.min(), values.max()
    return torch.where(beyond, low.clamp(max=0), low), torch.where(beyond, high.clamp(min=0), high)


def _extremes(values: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor) -> Range:
    """Least and largest of values[lo ... hi], of all tiles, by tables of spans of 1, 2, 4, ... entries."""
    least, most = [values], [values]
    while 2 ** len(least) <= len(values):
        half = 2 ** (len(least) - 1)
        least.append(torch.minimum(least[-1][:-half], least[-1][half:]))
        most.append(torch.maximum(most[-1][:-half], most[-1][half:]))
    level = torch.zeros_like(lo)
    for k in range(1, len(least)):
        level = torch.where(hi - lo + 1 >= 2**k, k, level)
    found_lo, found_hi = torch.zeros_like(lo), torch.zeros_like(lo)
    for k, (a, b) in enumerate(zip(least, most)):
        first, last = lo.clamp(max=len(a) - 1), (hi - 2**k + 1).clamp(0, len(a) - 1)
        found_lo = torch.where(level == k, torch.minimum(a[first], a[last]), found_lo)
        found_hi = torch.where(level == k, torch.maximum(b[first], b[last]), found_hi)
    return found_lo, found_hi
