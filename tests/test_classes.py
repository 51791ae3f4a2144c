"""Tile classes as kernels compute them: the emitted text says what intervals.classify says, and no skipped tile held a kept pair."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from attngen.build import Recipe, compile_kernel
from attngen.classes import tile_class
from attngen.expr import Node, const, discrete_inputs, param, symbol, walk
from attngen.interp import evaluate
from attngen.intervals import Tile, classify, tiles
from attngen.ops import BOOL, F32, I32, I32_MAX, I32_MIN, OPS
from attngen.paths import templates_dir
from attngen.render import environment
from test_intervals import brute_force
from trees import EXACT_ROWS, build

q, kv = symbol("q"), symbol("kv")
HEADERS = {  # of a dialect: what the text calls, and files
    "cpu": ('#include "functions.h"\n', lambda: {p.name: p.read_text() for p in (templates_dir() / "cpu").glob("*.h")}),
    "cuda": ('#include "shim.h"\n#include "math.cuh"\n', lambda: _cuda_headers()),
}


def _cuda_headers() -> dict[str, str]:
    from test_ops import SHIM

    return {"shim.h": SHIM, "math.cuh": (templates_dir() / "cuda" / "math.cuh").read_text()}


class Text:
    """The class functions of some masks, compiled for this host. Values of parameters and symbols are the given ones."""

    def __init__(self, found: list[Node], values: dict[str, int], dialect: str) -> None:
        macro = environment().get_template("shared/classes.jinja").module.class_functions
        include, headers = HEADERS[dialect]
        parts, self.emitted = [include + '#include "intervals.h"\n'], []
        for i, mask in enumerate(found):
            count = [0]

            def name(hint: str, count: list[int] = count) -> str:
                count[0] += 1
                return f"{hint}{count[0]}"

            holes = tile_class(mask, lambda n: _uniform(n, values), lambda n: False, lambda n, index: "", name)
            self.emitted.append(holes is not None)
            if holes is None:
                continue
            parts.append(
                f"namespace mask{i} {{\nstruct Params {{}}; struct Call {{}}; struct Tile {{ int q_start, q_offset, kv_head, kv_token0; }};\n"
                f"{macro(holes, 'static', '', '', '2')}\n}}\n"
                f'extern "C" __attribute__((visibility("default"))) void run{i}(const int* at, int* out, int n) {{\n'
                f"  using namespace mask{i};\n  Params p; Call c; Tile t{{0, {values['q_offset']}, 0, 0}};\n"
                "  for (int i = 0; i < n; ++i, at += 4) out[i] = tile_class(p, c, t, row_range(p, c, t, at[0], at[1]), key_span(p, c, t, at[2], at[3]));\n}\n"
            )
        files = {"classes.cpp": "".join(parts), "intervals.h": (templates_dir() / "shared" / "intervals.h").read_text(), **headers()}
        with TemporaryDirectory() as folder:
            recipe = Recipe("cpu", ("classes.cpp",), ("-O1", "-std=c++17", "-march=native", "-fwrapv"))
            self.library = ctypes.CDLL(str(compile_kernel(files, recipe, Path(folder)).artifact))

    def __call__(self, i: int, rows: tuple[torch.Tensor, torch.Tensor], columns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        shape = torch.broadcast_shapes(rows[0].shape, columns[0].shape)
        at = torch.stack([x.expand(shape) for x in (*rows, *columns)], -1).int().contiguous()
        out = torch.empty(shape, dtype=torch.int32)
        self.library[f"run{i}"](ctypes.c_void_p(at.data_ptr()), ctypes.c_void_p(out.data_ptr()), ctypes.c_int(out.numel()))
        return out.long()


def _uniform(node: Node, values: dict[str, int]) -> str:
    tensors = {name: torch.tensor(x, dtype=torch.int32) for name, x in values.items()}
    if any(n.op == "load" for n in walk(node)):
        return "ag_any_bool()" if node.dtype == "bool" else "ag_any_int()"
    found = evaluate(node, tensors, {"a": 1.5, "n": values["n"]}, discrete_inputs([node])).item()
    return str(found).lower() if isinstance(found, bool) else f"int32_t({found}ll)"


def compare(found: list[Node], q_len: int, kv_len: int, offset: int, block_q: int, block_kv: int, n: int, dialect: str) -> None:
    values = {"request": 0, "kv_len": kv_len, "q_len": q_len, "n": n, "q_offset": offset, "kv_head": 0, "num_heads": 2, "num_kv_heads": 1}
    text = Text(found, values, dialect)
    rows, columns = tiles(q_len, kv_len, offset, block_q, block_kv)
    known = {name: (torch.tensor(x), torch.tensor(x)) for name, x in values.items()} | {"head": (torch.tensor(0), torch.tensor(1))}
    for i, mask in enumerate(found):
        if not text.emitted[i]:
            continue
        said, expected = text(i, rows, columns), classify(mask, rows, columns, known, {"n": n})
        same = said == expected
        assert ((expected == Tile.PARTIAL) | same).all(), f"{mask}\n{said}\n{expected}"
        for head in (0, 1):  # what is the same for a whole tile the text knows exactly
            real = brute_force(mask, q_len, kv_len, offset, block_q, block_kv, values | {"head": head}, {"a": 1.5, "n": n})
            assert ((said == Tile.PARTIAL) | (said == real)).all(), f"{mask}\n{said}\n{real}"


def random_mask(rng: random.Random, depth: int = 3) -> Node:
    """As trees.masks, without what shrinks it."""
    leaves = {
        I32: [*(symbol(s) for s in ("q", "kv", "q", "kv", "head", "request", "kv_len", "q_len")), param("n", I32), const(rng.choice([0, 1, 2, 3, 7, 8, -5, 64, 2**20, I32_MAX, I32_MIN]))],
        F32: [param("a", F32), const(0.5)], BOOL: [const(True), const(False)],
    }  # fmt: skip

    def tree(kind: str, left: int) -> Any:
        options = [(name, types) for name, types in EXACT_ROWS if OPS[name].signature[types] == kind] if left else []
        if not options or left < depth and rng.random() < 0.3:
            return rng.choice(leaves[kind])
        name, types = rng.choice(options)
        return name, kind, tuple(tree(t, left - 1) for t in types)

    return build(tree(BOOL, depth))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("dialect", HEADERS)
def test_random_masks(dialect: str, seed: int) -> None:
    """Sound, and as tight as intervals.py."""
    rng = random.Random(seed)
    found = list(dict.fromkeys(random_mask(rng, 3 + seed % 2) for _ in range(150)))
    n = [0, 1, -3, 17, 64, I32_MAX, I32_MIN, 5][seed]
    compare(found, 1 + rng.randrange(60), 1 + rng.randrange(60), rng.randrange(-20, 40), 1 + rng.randrange(17), 1 + rng.randrange(17), n, dialect)


OPERATIONS = [
    (q + kv * 3) * (q - 7) < 40, q // (kv - 5) == 2, kv % (q + 1) < 3, (q & 12) == (kv & 12), (q | kv) < 20, (q ^ kv) < 17, (kv << 3) < (q << 2),
    (q >> (kv & 3)) == 1, abs(q - kv) % 9 < 4, (kv & -8) <= (q & -8), ~q < kv - 60, -kv < q - 20, kv % param("n", I32) <= q % param("n", I32),
    kv // param("n", I32) == q // param("n", I32), (q // -4) == (kv // -4), (q * 2**30) < kv, (q & kv) == 0, kv % 5 == q % 5, (q << (kv & 31)) > 0,
    (kv % -7) > -3, (q * kv) % 11 < 5, kv // const(I32_MIN) < q,
]  # fmt: skip


@pytest.mark.parametrize("n", [0, 1, 5, -6, I32_MAX, I32_MIN])
def test_every_operation(n: int) -> None:
    compare(OPERATIONS, 50, 70, -9, 7, 6, n, "cuda")


def test_explain_says_what_stops_the_analysis() -> None:
    import attngen as ag
    from attngen.variants import Chunked, Streaming

    class Dense(ag.Variant):
        keep: ag.Tensor("requests", "queries", "positions", dtype=bool)
        cost: ag.Tensor("heads")

        def mask(self, at):
            return self.keep[at.request, at.q, at.kv] & (self.cost[at.head] * (at.q - at.kv) < 1.0) & (at.kv < 100)

    said = Dense().explain()
    assert "nothing is known of self.keep[at.request, at.q, at.kv]    from self.keep" in said
    assert "nothing is known of ((self.cost[at.head] * to_f32((at.q - at.kv))) < 1)    from" in said
    assert "bounds: -kv + 100 - 1 >= 0" in said and "classed" not in said
    assert "bounds: -q + kv + self.window - 1 >= 0 or -kv + self.sinks - 1 >= 0" in Streaming().explain()
    assert "tiles: classed by intervals    from (((at.q - at.kv) < self.window)" in Streaming().explain()
    assert "bounds: (q // self.chunk) - (kv // self.chunk) >= 0" in Chunked().explain() and "tiles:" not in Chunked().explain()
