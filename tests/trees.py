"""Random expression trees for property tests.

A tree is a leaf (a Node) or (op name, result type, arguments); ``build`` makes nodes of it, simplified or not.
"""

from __future__ import annotations

from typing import Any

from attngen import expr
from attngen.expr import Node, const, load, param, symbol
from attngen.ops import BOOL, F32, I32, I32_MAX, I32_MIN, OPS
from hypothesis import strategies as st

Tree = Node | tuple[str, str, tuple[Any, ...]]
Row = tuple[str, tuple[str, ...]]  # op, argument types

FUNCTIONS = {"exp", "exp2", "log", "log2", "tanh", "sigmoid", "rsqrt"}  # not exact: a few ulp
ALL_ROWS: list[Row] = [(name, types) for name, op in OPS.items() for types in op.signature]
EXACT_ROWS = [row for row in ALL_ROWS if row[0] not in FUNCTIONS]

# The fields of a random variant and what is read of them.
FIELDS = {"a": F32, "n": I32}
TABLES = {"table": (F32, ("heads",)), "ids": (I32, ("requests", "positions")), "flags": (BOOL, ("heads", 5))}


def leaves(symbols: tuple[str, ...]) -> dict[str, st.SearchStrategy[Tree]]:
    """Leaves over integer symbols, scalar and tensor fields and constants."""
    ints = [symbol(name) for name in symbols]
    loads = [
        load("table", F32, ("heads",), (symbol("head"),)),
        load("ids", I32, ("requests", "positions"), (symbol("request"), symbol("kv"))),
        load("ids", I32, ("requests", "positions"), (symbol("request"), symbol("q"))),
        load("flags", BOOL, ("heads", 5), (symbol("head"), symbol("kv") & 7)),
    ]
    small = st.integers(-40, 40) | st.sampled_from([I32_MIN, I32_MAX, 2**20, 64, 128])
    floats = st.sampled_from([0.0, 1.0, -1.0, 0.5, 3.25, -7.5, 1e-3, 100.0])
    return {
        I32: st.sampled_from([*ints, param("n", I32), *(x for x in loads if x.dtype == I32)]) | small.map(const),
        F32: st.sampled_from([param("a", F32), *(x for x in loads if x.dtype == F32)]) | floats.map(const),
        BOOL: st.sampled_from([x for x in loads if x.dtype == BOOL]) | st.booleans().map(const),
    }


def trees(dtype: str, leaf: dict[str, st.SearchStrategy[Tree]], rows: list[Row], depth: int) -> st.SearchStrategy[Tree]:
    """Trees of ``dtype`` with ops from ``rows``, up to ``depth`` ops deep."""
    memo: dict[tuple[str, int], st.SearchStrategy[Tree]] = {}

    def at(kind: str, left: int) -> st.SearchStrategy[Tree]:
        if (kind, left) not in memo:
            options = [leaf[kind]] if left < depth else []  # a tree has an op at its root
            for name, types in rows if left else ():
                if OPS[name].signature[types] == kind:
                    arguments = st.tuples(*(at(t, left - 1) for t in types))
                    options.append(st.tuples(st.just(name), st.just(kind), arguments))
            memo[kind, left] = st.one_of(options)
        return memo[kind, left]

    return at(dtype, depth)


def build(tree: Tree, simplify: bool = True) -> Node:
    """The tree as a node; without ``simplify`` each op is interned as it stands."""
    if isinstance(tree, Node):
        return tree
    name, dtype, args = tree
    nodes = tuple(build(a, simplify) for a in args)
    return expr.apply(name, *nodes) if simplify else expr._intern(name, nodes, None, dtype)


def masks(depth: int = 3) -> st.SearchStrategy[Node]:
    """Bool trees whose value every backend computes exactly."""
    return trees(BOOL, leaves(("q", "kv", "head", "request", "kv_len", "q_len")), EXACT_ROWS, depth).map(build)


def smooth(depth: int = 3, of: str | None = "s") -> st.SearchStrategy[Node]:
    """f32 trees over ``of`` whose value stays near [-4, 4] and moves little when a leaf moves by an ulp, so that
    float32 can be compared with float64. None leaves the keys and the logit out: a row-wise tree."""
    difference = symbol("q") - (symbol("kv") if of else symbol("kv_len"))
    some = [
        param("a", F32),
        load("table", F32, ("heads",), (symbol("head"),)),
        expr.tanh(difference * 0.1),
        expr.sigmoid(expr.to_f32(symbol("head"))),
    ]
    leaf = st.sampled_from([symbol(of)] * 3 + some if of else some) | st.sampled_from([0.5, -1.25, 2.0]).map(const)
    if depth == 0:
        return leaf
    x = smooth(depth - 1, of)
    conditions = st.sampled_from([difference < param("n", I32), symbol("head") % 2 == 0, param("a", F32) < 1.0])
    one = [
        expr.tanh,
        expr.sigmoid,
        expr.absolute,
        lambda v: -v,
        lambda v: expr.log(1 + abs(v)),
        lambda v: expr.log2(1 + abs(v)),
        lambda v: expr.exp(-abs(v)),
        lambda v: expr.exp2(-abs(v)),
        lambda v: expr.sqrt(abs(v) + 0.01),
        lambda v: expr.rsqrt(abs(v) + 0.5),
        lambda v: v / param("a", F32),
        lambda v: v * v * 0.25,
    ]
    two = [
        lambda v, w: 0.5 * (v + w),
        lambda v, w: (v - w) * 0.5,
        lambda v, w: v * expr.tanh(w),
        expr.minimum,
        expr.maximum,
        lambda v, w: v / (1 + abs(w)),
    ]
    ops = st.one_of(
        st.builds(lambda f, v, w: f(v, w), st.sampled_from(two), x, x),
        st.builds(lambda f, v: f(v), st.sampled_from(one), x),
        st.builds(expr.where, conditions, x, x),
    )
    return ops if depth > 2 else leaf | ops
