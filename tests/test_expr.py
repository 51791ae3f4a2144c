"""Nodes: interning, keys, simplification, dependence, substitution, verification and tile bounds."""

from __future__ import annotations

import copy
import ctypes
import itertools
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import attngen as ag
import pytest
import torch
from attngen.abi import layout
from attngen.bounds import Inequality, TileBounds, analyse
from attngen.build import Recipe, compile_kernel
from attngen.choose import cpu_flags
from attngen.emit import emit
from attngen.errors import VariantError
from attngen.expr import (
    CALL,
    COL,
    CONST,
    ELEM,
    ROW,
    TILE,
    Node,
    apply,
    cast,
    conjuncts,
    const,
    discrete_inputs,
    load,
    param,
    substitute,
    symbol,
    text,
    verify,
    walk,
    where,
)
from attngen.interp import evaluate
from attngen.ops import BOOL, F32, I32, I32_MAX, I32_MIN
from attngen.paths import PACKAGE, templates_dir
from attngen.fields import Field
from attngen.spec import Trace
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trees import EXACT_ROWS, Tree, build, leaves, trees

q, kv, head, request, s = (symbol(name) for name in ("q", "kv", "head", "request", "s"))
n, a = param("n", I32), param("a", F32)


# ---------------------------------------------------------------- interning and keys


def test_equal_content_is_one_node():
    assert (q + 1) * 2 is (q + 1) * 2
    assert symbol("q") is q and const(1.0) is const(1.0) and param("n", I32) is n
    distinct = [const(0.0), const(-0.0), const(0), const(False), param("n", F32), n, load("n", I32, ("x",), (q,))]
    assert len({id(x) for x in distinct}) == len({x.key for x in distinct}) == len(distinct)


def test_nodes_survive_copy_and_pickle_as_themselves():
    node = where(kv <= q, a * s, cast(n, float))
    assert copy.copy(node) is node and copy.deepcopy(node) is node and pickle.loads(pickle.dumps(node)) is node


def test_no_node_is_kept_alive():
    before = len(ag.expr._interned)
    node = (q + 123456) * 654321
    assert len(ag.expr._interned) > before
    del node
    assert len(ag.expr._interned) == before


KEYED = """
import attngen as ag
class V(ag.Variant):
    cap: ag.Scalar = 30.0
    window: ag.Scalar[int] = 4
    slopes: ag.Tensor("heads")
    def logits(self, s, at): return self.cap * ag.tanh(s / self.cap) + self.slopes[at.head] * (at.kv - at.q)
    def mask(self, at): return (at.kv <= at.q) & (at.q - at.kv < self.window)
v = V()
print(v.structure_hash, *(node.key for node in v.trace.roots().values()))
"""


def test_keys_are_the_same_in_every_process():
    def run(seed: str) -> str:
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(PACKAGE.parent)}
        return subprocess.run([sys.executable, "-c", KEYED], env=env, capture_output=True, text=True, check=True).stdout

    first = run("1")
    assert first == run("2") and len(first.split()) == 3


def test_keys_tell_content_apart():
    forms = [
        q + kv,
        q - kv,
        kv - q,
        q * kv,
        q < kv,
        q <= kv,
        kv < q,
        cast(q, float) + s,
        s + 1.0,
        s + 2.0,
        s * 1.5,
        where(q < kv, s, 0.0),
        where(q <= kv, s, 0.0),
        load("t", F32, ("heads",), (head,)),
        load("t", F32, ("rows",), (head,)),
        load("u", F32, ("heads",), (head,)),
        load("t", I32, ("heads",), (head,)),
    ]
    assert len({node.key for node in forms}) == len(forms)


# ---------------------------------------------------------------- simplification


def world(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Symbols and parameters for evaluate(): 3 heads, 7 queries at odd positions, 9 keys."""
    random = torch.Generator().manual_seed(seed)
    symbols = {
        "q": torch.arange(-3, 4, dtype=torch.int32).view(1, -1, 1),
        "kv": torch.arange(9, dtype=torch.int32).view(1, 1, -1),
        "head": torch.arange(3, dtype=torch.int32).view(-1, 1, 1),
        "request": torch.tensor(1, dtype=torch.int32),
        "kv_len": torch.tensor(9, dtype=torch.int32),
        "q_len": torch.tensor(7, dtype=torch.int32),
    }
    fields = {
        "a": 0.75 + seed,
        "n": [5, -3, 0, I32_MAX, I32_MIN][seed % 5],
        "table": torch.randn(3, generator=random),
        "ids": torch.randint(-3, 4, (2, 9), generator=random, dtype=torch.int32),
        "flags": torch.rand(3, 5, generator=random) < 0.5,
    }
    return symbols, fields


@st.composite
def any_tree(draw: st.DrawFn) -> Tree:
    return draw(
        trees(draw(st.sampled_from([F32, I32, BOOL])), leaves(("q", "kv", "head", "request", "kv_len")), EXACT_ROWS, 4)
    )


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(tree=any_tree(), seed=st.integers(0, 4))
def test_simplification_keeps_the_meaning(tree, seed):
    simple, plain = build(tree), build(tree, simplify=False)
    verify([simple, plain])
    symbols, fields = world(seed)
    found, expected = (evaluate(x, symbols, fields, set(walk(x))) for x in (simple, plain))
    found, expected = torch.broadcast_tensors(found, expected)
    same = found == expected
    if found.is_floating_point():
        same = same | (found.isnan() & expected.isnan())
    assert same.all(), f"{text(plain)}\nbecame {text(simple)}"
    assert substitute(simple, {symbol("q_token"): const(1)}) is simple


def test_simplifications():
    f = cast(q, float)
    cases = {
        "x + 0": (q + 0, q),
        "0 + x": (0 + q, q),
        "x * 1": (q * 1, q),
        "x * 0": (q * 0, const(0)),
        "x - x": (q - q, const(0)),
        "x // 8": (q // 8, q >> 3),
        "x % 8": (q % 8, q & 7),
        "x // 1": (q // 1, q),
        "x % 1": (q % 1, const(0)),
        "(x + 1) + 2": ((q + 1) + 2, q + 3),
        "(x - 1) + 1": ((q - 1) + 1, q),
        "~~b": (~~(q < kv), q < kv),
        "~(x < y)": (~(q < kv), kv <= q),
        "~(f < g)": ((~(f < a)).op, "not"),
        "x == x": (q == q, const(True)),
        "x < x": (q < q, const(False)),
        "f == f keeps NaN": ((f == f).op, "eq"),
        "b & True": ((q < kv) & True, q < kv),
        "b & False": ((q < kv) & False, const(False)),
        "b | True": ((q < kv) | True, const(True)),
        "where(True)": (where(True, q, kv), q),
        "where(b, x, x)": (where(q < kv, s, s), s),
        "where(b, False, True)": (where(q < kv, False, True), kv <= q),
        "f * 1": (f * 1.0, f),
        "f + 0 stays": ((f + 0.0).op, "add"),
        "--x": (-(-q), q),
        "constants": (const(7) // -2, const(-4)),
        "wrap": (const(I32_MAX) + 1, const(I32_MIN)),
        "0 divisor": (const(5) // 0, const(0)),
        "f32 rounds": (const(0.1) + const(0.2), const(0.30000001192092896)),
        "x ** 2": (s**2, s * s),
        "i32 ** 2.0 is f32": (kv**2.0, cast(kv, float) * cast(kv, float)),
        "x ** 0.5": ((s**0.5).op, "sqrt"),
        "2 ** x": ((2**s).op, "exp2"),
        "slope stays unfactored": ((a * kv - a * q).op, "sub"),
    }
    wrong = [
        name
        for name, (found, wanted) in cases.items()
        if found is not wanted and not (isinstance(wanted, str) and found == wanted)
    ]
    assert not wrong


# ---------------------------------------------------------------- dependence, walking, verifying


def test_dependence_classes():
    doc = load("doc", I32, ("requests", "positions"), (request, kv))
    levels = {
        const(1): CONST,
        n: CALL,
        n + 1: CALL,
        symbol("num_heads"): CALL,
        request: TILE,
        symbol("kv_len") + n: TILE,
        head: ROW,
        q - n: ROW,
        load("t", F32, ("heads",), (head,)): ROW,
        load("t", F32, ("x",), (const(0),)): CALL,
        kv: COL,
        doc: COL,
        symbol("kv_token") + request: COL,
        q - kv: ELEM,
        doc + q: ELEM,
        s: ELEM,
        s * a: ELEM,
        symbol("dim"): ELEM,
    }
    assert {text(node): node.level for node in levels} == {text(node): level for node, level in levels.items()}


def test_walk_visits_shared_nodes_once_and_arguments_first():
    node = s
    for _ in range(60):  # 2**60 paths
        node = node + node
    order = list(walk(node))
    place = {x: i for i, x in enumerate(order)}
    assert len(order) == 61 and all(place[y] < place[x] for x in order for y in x.args)
    assert node.key and substitute(node, {s: s * 2.0}).op == "add" and len(discrete_inputs([node])) == 0


def test_substitute_simplifies_on_the_way_up():
    assert substitute((q - n) + kv, {n: const(0)}) is q + kv
    assert substitute(where(q < n, s, a), {n: q}) is a
    t = load("t", F32, ("heads",), (head + 0,))
    assert substitute(t * s, {head: const(2)}) is load("t", F32, ("heads",), (const(2),)) * s


def test_conjuncts():
    x, y, z = q < kv, kv < n, q < n
    assert list(map(text, conjuncts((x & y) & (z & x)))) == list(map(text, (x, y, z)))
    assert list(map(text, conjuncts(x | y))) == [text(x | y)]


def test_discrete_inputs_are_what_decides():
    f = cast(kv, float) * a
    decided = discrete_inputs([where(f + 1.0 < 0.5, s * 2.0, s)])
    assert {f + 1.0, f, a} <= decided and s not in decided and s * 2.0 not in decided
    assert f in discrete_inputs([ag.floor(f) + s]) and f in discrete_inputs([cast(f, int)])
    both = discrete_inputs([s * f, f < 1.0])  # shared by a logit and a mask: the mask's rule holds
    assert f in both


@pytest.mark.parametrize(
    "bad",
    [
        lambda: ag.expr._intern("add", (q, s), None, F32),
        lambda: ag.expr._intern("lt", (q, kv), None, I32),
        lambda: ag.expr._intern("sym", (), "q", F32),
        lambda: ag.expr._intern("load", (s,), ("t", ("x",)), F32),
        lambda: ag.expr._intern("frobnicate", (q,), None, I32),
        lambda: ag.expr._intern("param", (q,), ("n",), I32),
    ],
)
def test_verify_refuses_what_no_stage_may_make(bad):
    with pytest.raises(AssertionError):
        verify([bad()])


@pytest.mark.parametrize(
    "op, args",
    [
        ("add", (q < kv, q)),
        ("and", (q, q < kv)),
        ("not", (s,)),
        ("where", (q, s, s)),
        ("exp", (q,)),
        ("mod", (s, s)),
        ("shl", (s, q)),
        ("lt", (q < kv, q < kv)),
    ],
)
def test_ill_typed_operations_are_the_users_error(op, args):
    with pytest.raises(VariantError, match=rf"test_expr.py:\d+: `{op}` got .*It takes"):
        apply(op, *args)


# ---------------------------------------------------------------- tile bounds


def closed_range(
    bounds: TileBounds, q_lo: int, q_hi: int, q_abs: int, kv_len: int, value: Callable[[Node], int]
) -> tuple[int, int]:
    """Keys [begin, end) that rows q_lo ... q_hi may attend to, as an inequality is defined to mean; of alternatives, of any of them."""

    def narrowed(inequalities: tuple[Inequality, ...], begin: int, end: int) -> tuple[int, int]:
        for x in inequalities:
            rest, safe = terms(x, q_abs, kv_len, value)
            unit = 1 if x.unit is None else value(x.unit)
            if not safe or unit <= 0:
                continue
            best = max(x.cq * (q_lo // unit), x.cq * (q_hi // unit)) + rest
            if x.ck > 0:
                begin = max(begin, -(best // x.ck) * unit)
            elif x.ck < 0:
                end = min(end, (best // -x.ck + 1) * unit)
            elif best < 0:
                end = 0
        return begin, end

    begin, end = narrowed(bounds.closed, 0, kv_len)
    parts = [narrowed(alternative, begin, end) for alternative in bounds.either] or [(begin, end)]
    parts = [(b, e) for b, e in parts if b < e] or [(0, 0)]
    return min(b for b, _ in parts), max(e for _, e in parts)


def tile_is_full(
    bounds: TileBounds, rows: tuple[int, int], keys: tuple[int, int], q_abs: int, kv_len: int, value: Any
) -> bool:
    def worst(x: Inequality) -> bool:
        rest, safe = terms(x, q_abs, kv_len, value)
        unit = 1 if x.unit is None else value(x.unit)
        return safe and unit > 0 and min(x.cq * (i // unit) for i in rows) + min(x.ck * (i // unit) for i in keys) + rest >= 0

    return bounds.exact and all(worst(x) for x in bounds.closed)


def terms(x: Inequality, q_abs: int, kv_len: int, value: Callable[[Node], int]) -> tuple[int, bool]:
    amounts = [sign * value(node) for sign, node in x.terms]
    return sum(amounts), sum(map(abs, amounts)) + x.wq * q_abs + x.wk * kv_len < 2**31


@st.composite
def masks(draw: st.DrawFn) -> Node:
    """Conjunctions of linear comparisons and terms that no inequality expresses."""

    def side() -> Node:
        node = const(draw(st.integers(-12, 12)))
        for _ in range(draw(st.integers(0, 3))):
            atom = draw(
                st.sampled_from(
                    [q, kv, n, symbol("kv_len"), request * 3, q * 2, kv * -3, 4 * (q - kv), -kv, n * 5, n * n]
                )
            )
            node = node + atom if draw(st.booleans()) else node - atom
        return node

    def term() -> Node:
        kind = draw(st.integers(0, 12))
        if kind < 4:
            return side() < side()
        if kind < 7:
            return side() <= side()
        if kind == 7:
            return side() == side()
        if kind == 8:
            return draw(st.sampled_from([kv <= q, q - kv < n, kv < n, ~(q < kv)]))
        return draw(
            st.sampled_from(
                [
                    load("ids", I32, ("requests", "positions"), (request, kv)) <= 1,
                    (q - kv) % 3 == 0,
                    (kv <= q) | (kv < 2),
                    (q - kv < n) | (kv < 3) | (kv == 9),
                    ((kv < 2) & (q < 6)) | ((q - kv < 2) & (kv < q)),
                    kv // 4 == q // 4,
                    kv // n == q // n,
                    abs(q - kv) <= 3,
                    abs(kv // 4 - q // 4) < 2,
                    q // n - kv // n <= 1,
                    kv // 4 < n,
                    kv // 3 <= q // 4,
                    ~(kv == q),
                    head < 2,
                ]
            )
        )

    mask = term()
    for _ in range(draw(st.integers(0, 2))):
        mask = mask & term()
    return mask


Q_LEN, KV_LEN, TILE_ROWS, TILE_KEYS = 11, 13, 4, 5
SCALARS = [5, 0, -4, 12, 2**20, 2**29, I32_MAX, I32_MAX - 9, I32_MIN, I32_MIN + 7, 2**30, 50000]


def grid(offset: int, scalar: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    symbols, fields = world()
    i32 = torch.int32
    return symbols | {
        "q": (torch.arange(Q_LEN, dtype=i32) + offset).view(1, -1, 1),
        "kv": torch.arange(KV_LEN, dtype=i32).view(1, 1, -1),
        "kv_len": torch.tensor(KV_LEN, dtype=i32),
        "q_len": torch.tensor(Q_LEN, dtype=i32),
    }, fields | {
        "n": scalar,
        "ids": torch.randint(-2, 4, (2, KV_LEN), generator=torch.Generator().manual_seed(3), dtype=i32),
    }


def kept(mask: Node, offset: int, scalar: int) -> torch.Tensor:
    """The mask itself, [heads, q, kv], by brute force."""
    symbols, fields = grid(offset, scalar)
    return evaluate(mask, symbols, fields, ()).expand(3, Q_LEN, KV_LEN)


def check_bounds(mask: Node, offset: int, scalar: int, key_range: Any, full: Any) -> None:
    keep = kept(mask, offset, scalar).any(0)
    every = kept(mask, offset, scalar).all(0)
    for first in range(0, Q_LEN, TILE_ROWS):
        last = min(first + TILE_ROWS, Q_LEN) - 1
        begin, end = key_range(offset + first, offset + last)
        outside = [k for k in range(KV_LEN) if not begin <= k < end]
        lost = keep[first : last + 1][:, outside]
        assert not lost.any(), (
            f"{text(mask)} n={scalar} rows {offset + first}..{offset + last}: [{begin}, {end}) loses keys"
        )
        for k0 in range(0, KV_LEN, TILE_KEYS):
            k1 = min(k0 + TILE_KEYS, KV_LEN) - 1
            if full(offset + first, offset + last, k0, k1):
                assert every[first : last + 1, k0 : k1 + 1].all(), (
                    f"{text(mask)} n={scalar}: tile {first},{k0} is not full"
                )


@settings(max_examples=800, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(mask=masks(), offset=st.sampled_from([0, 2, -6, 100, 2**29, 5]), scalar=st.sampled_from(SCALARS))
def test_bounds_never_lose_a_kept_element(mask, offset, scalar):
    bounds = analyse(mask)
    symbols, fields = grid(offset, scalar)

    def value(node: Node) -> int:
        return int(evaluate(node, symbols, fields, ()))

    q_abs = abs(offset) + Q_LEN
    check_bounds(
        mask,
        offset,
        scalar,
        lambda lo, hi: closed_range(bounds, lo, hi, q_abs, KV_LEN, value),
        lambda q0, q1, k0, k1: tile_is_full(bounds, (q0, q1), (k0, k1), q_abs, KV_LEN, value),
    )


def test_bounds_are_tight_where_the_mask_is_linear():
    window = analyse((kv <= q) & (q - kv < n))
    assert window.exact and len(window.closed) == 2
    assert closed_range(window, 100, 107, 200, 1000, lambda node: 8 if node is n else node.attr) == (93, 108)
    assert tile_is_full(window, (100, 107), (100, 100), 200, 1000, lambda node: 8 if node is n else node.attr)
    assert closed_range(analyse(kv == q), 5, 7, 20, 30, lambda node: node.attr) == (5, 8)
    assert not analyse((kv <= q) | (kv < 4)).closed and analyse(None).exact
    plain = lambda node: node.attr  # noqa: E731
    assert closed_range(analyse((kv <= q) | (kv < 4)), 100, 107, 200, 1000, plain) == (0, 108)
    chunked = analyse((kv // 48 == q // 48) & (kv <= q))
    assert chunked.exact and closed_range(chunked, 100, 107, 200, 1000, plain) == (96, 108)
    assert tile_is_full(chunked, (140, 143), (96, 140), 200, 1000, plain) and not tile_is_full(chunked, (140, 144), (96, 140), 200, 1000, plain)
    assert closed_range(analyse(abs(q - kv) < 7), 100, 107, 200, 1000, plain) == (94, 114)
    assert closed_range(analyse(abs(q // 32 - kv // 32) <= 1), 100, 107, 200, 1000, plain) == (64, 160)
    assert not analyse(kv // 32 == q).exact and not analyse(kv // 32 == q // 16).exact


def test_coefficients_stay_far_from_int64():
    steep = q
    for _ in range(9):
        steep = steep * 1024
    bounds = analyse(steep <= kv)
    assert all(max(x.wq, x.wk) < 2**31 for x in bounds.closed)


def test_bounds_of_a_shared_sum_take_no_exponential_time():
    node = kv
    for _ in range(40):
        node = node + node
    analyse(node <= q)


# The emitted C text of the same bounds, for a batch of masks in one library.
HARNESS = """
static {type} {name}_tile(const Params& p, const Call& c, int request, int kv_head, int q_len, int kv_len,
                          int q_offset) {{
  {type} t;
  t.request = request, t.kv_head = kv_head, t.q_len = q_len, t.kv_len = kv_len, t.q_offset = q_offset;
{tile}  return t;
}}
static Call{name} {name}_call(const Params& p) {{ Call{name} c; {call} return c; }}
EXPORT void {name}(const Params* params, int q_len, int kv_len, int q_offset, int64_t q_lo, int64_t q_hi, int64_t k_lo,
                   int64_t k_hi, int64_t* out) {{
  const Params& p = *params;
  const Call{name} c = {name}_call(p);
  const {type} t = {name}_tile(p, c, 1, 0, q_len, kv_len, q_offset);
  out[0] = {begin}, out[1] = {end}, out[2] = {full};
}}
"""


def test_the_emitted_bounds_never_lose_a_kept_element(tmp_path):
    drawn: list[Node] = []

    @settings(max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(mask=masks())
    def draw(mask: Node) -> None:
        drawn.append(mask)

    draw()
    fields = {"n": Field("scalar", I32), "ids": Field("tensor", I32, ("requests", "positions"))}
    storage = {"ids": "int32"}
    struct_layout = layout(fields, storage)
    parts = [
        '#include "functions.h"\n#define EXPORT extern "C" __attribute__((visibility("default")))\nstruct Request;\nstruct Params {',
        *(f"  {f.ctype} {f.name};" for f in struct_layout.fields),
        "};",
    ]
    for i, mask in enumerate(drawn):
        hooks = emit(Trace(mask=mask, fields=fields), storage, 64)
        members = "".join(f" {v.ctype} {v.name};" for v in hooks.tile)
        parts.append(f"struct Tile{i} {{ int request, kv_head, q_len, kv_len, q_offset;{members} }};")
        parts.append(f"struct Callm{i} {{ {''.join(f'{v.ctype} {v.name}; ' for v in hooks.call)}}};")
        harness = HARNESS.format(
            type=f"Tile{i}",
            name=f"m{i}",
            tile="".join(f"  t.{v.name} = {v.expr};\n" for v in hooks.tile),
            call="".join(f"c.{v.name} = {v.expr}; " for v in hooks.call),
            begin=hooks.bounds.kv_begin,
            end=hooks.bounds.kv_end,
            full=hooks.bounds.full,
        )
        parts.append(harness.replace("const Call& c", f"const Callm{i}& c"))
    files = {"bounds.cpp": "\n".join(parts), **{x.name: x.read_text() for x in (templates_dir() / "cpu").glob("*.h")}}
    flags = (*(f for f in cpu_flags("generic") if f != "-O3"), "-O0")
    library = ctypes.CDLL(str(compile_kernel(files, Recipe("cpu", ("bounds.cpp",), flags), tmp_path).artifact))
    params, out = bytearray(struct_layout.size), (ctypes.c_int64 * 3)()
    offset_of_n = next(f.offset for f in struct_layout.fields if f.name == "param_n")
    for (i, mask), offset, scalar in itertools.product(
        enumerate(drawn), [0, -6, 2**29], [5, 0, I32_MAX, I32_MIN + 7, 50000]
    ):
        params[offset_of_n : offset_of_n + 4] = scalar.to_bytes(4, "little", signed=True)
        buffer = (ctypes.c_char * len(params)).from_buffer(params)

        def call(q_lo: int, q_hi: int, k_lo: int = 0, k_hi: int = 0) -> list[int]:
            arguments = (Q_LEN, KV_LEN, offset, *map(ctypes.c_int64, (q_lo, q_hi, k_lo, k_hi)))
            library[f"m{i}"](buffer, *arguments, out)
            return list(out)

        check_bounds(mask, offset, scalar, lambda lo, hi: call(lo, hi)[:2], lambda *tile: bool(call(*tile)[2]))


def test_long_and_shared_expressions_print_in_reasonable_size():
    node = s
    for _ in range(40):
        node = node * 0.5 + node
    assert len(text(node)) < 20_000
    deep = s
    for i in range(3000):
        deep = deep + float(i % 7 + 1)
    assert text(deep) and math.isfinite(len(repr(deep)))


def test_distances_lose_their_sign_only_under_masks_that_cannot_wrap() -> None:
    """Under ``kv + c <= q + c`` with a large c int32 arithmetic lets the first queries see later keys."""
    class Distance(ag.Variant):
        shift: ag.Const[int] = 0

        def logits(self, s, at):
            return s - 0.1 * abs(at.q - at.kv)

        def mask(self, at):
            return at.kv + self.shift <= at.q + self.shift

    for shift, signed in ((0, True), (5, True), (2**31 - 1, False)):
        text = emit(Distance(shift=shift).trace, {}, 64, "cuda").logits.result
        assert ("ag_abs" not in text) == signed, (shift, text)
