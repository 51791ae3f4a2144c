"""Masks by columns (columns.py): the emitted text, compiled for this host, says of every key what the mask says."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from attngen.build import Recipe, compile_kernel
from attngen.columns import ColumnTexts, column_texts
from attngen.emit import literal
from attngen.expr import Node, discrete_inputs, load, param, symbol, walk, where
from attngen.interp import evaluate
from attngen.ops import I32, I32_MAX, I32_MIN, OPS, c_text, operand
from attngen.paths import templates_dir
from test_classes import random_mask
from test_ops import SHIM

q, kv, n = symbol("q"), symbol("kv"), param("n", I32)
PLACES = torch.tensor([8 * (i // 2) + i % 2 for i in range(32)])
POWERS = 2 ** torch.arange(32)


def value(node: Node) -> str:
    """Row values in C, spelled out."""
    if node.op == "const":
        return literal(node)
    if node.op in ("sym", "param"):
        return node.attr if node.op == "sym" else node.attr[0]
    return c_text(OPS[node.op], "cuda", node.dtype, node.args[0].dtype, True).format(*(operand(value(a)) for a in node.args))


class Texts:
    """The words of some masks. Rows of int32: first, q, head, request, kv_len, q_len, n, and then the terms' words."""

    NAMES = ("first", "q", "head", "request", "kv_len", "q_len", "n")

    def __init__(self, masks: list[Node], bytes_: str = "") -> None:
        self.texts: list[ColumnTexts] = []
        parts = ['#include "shim.h"\n#include "math.cuh"\n#include "columns.cuh"\nstruct Params { const uint8_t* param_bits; int32_t size0_bits; int64_t stride0_bits; };\n']
        for i, mask in enumerate(masks):
            count = iter(range(1000))
            found = column_texts(mask, value, lambda hint, count=count: f"{hint}{next(count)}", bytes_.split())
            self.texts.append(found)
            given = [f"const int32_t {name} = at[{j}];" for j, name in enumerate(self.NAMES)] + ["const float a = 1.5f;"]
            given += [f"const uint32_t {name} = at[{len(self.NAMES) + j}];" for j, (name, _) in enumerate(found.terms)]
            given += [f"const uint32_t {name} = {text};" for name, text in found.lines]
            parts.append(
                f'extern "C" __attribute__((visibility("default"))) void run{i}(const int32_t* at, const uint8_t* bits, int32_t size, long stride, int64_t* out, long rows) {{\n'
                f"  const Params p{{bits, size, stride}};\n"
                f"  for (long r = 0; r < rows; ++r, at += {len(self.NAMES) + len(found.terms)}) {{\n    {' '.join(given)}\n"
                f"    out[2 * r] = {found.holds or 'true'};\n    out[2 * r + 1] = out[2 * r] ? {found.result} : 0u;\n  }}\n}}\n"
            )
        cuda = templates_dir() / "cuda"
        files = {"columns.cpp": "".join(parts), "shim.h": SHIM, "math.cuh": (cuda / "math.cuh").read_text(), "columns.cuh": (cuda / "columns.cuh").read_text()}
        with TemporaryDirectory() as folder:
            recipe = Recipe("cpu", ("columns.cpp",), ("-O1", "-std=c++17", "-march=native", "-fwrapv", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"))
            self.library = ctypes.CDLL(str(compile_kernel(files, recipe, Path(folder)).artifact))

    def __call__(self, i: int, rows: list[list[int]], bits: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        at, out = torch.tensor(rows, dtype=torch.int64).to(torch.int32).contiguous(), torch.empty(len(rows), 2, dtype=torch.int64)
        pointer, size, stride = (0, 0, 1) if bits is None else (bits.data_ptr(), len(bits), bits.stride(0))
        self.library[f"run{i}"](
            ctypes.c_void_p(at.data_ptr()), ctypes.c_void_p(pointer), ctypes.c_int(size), ctypes.c_long(stride), ctypes.c_void_p(out.data_ptr()),
            ctypes.c_long(len(rows)),
        )  # fmt: skip
        return out[:, 0] != 0, out[:, 1]


def words(node: Node, row: dict[str, int], first: int, params: dict) -> int:
    """What the oracle says of 32 columns."""
    symbols = {name: torch.tensor(x, dtype=torch.int32) for name, x in row.items()} | {"kv": (first + PLACES).to(torch.int32)}
    kept = evaluate(node, symbols, params, discrete_inputs([node])).expand(32)
    return int((kept * POWERS).sum())


def compare(masks: list[Node], rows: list[dict[str, int]], firsts: list[int], bits: torch.Tensor | None = None) -> list[float]:
    """Of each mask the share of rows for which its words hold; those are compared."""
    text, shares = Texts(masks, "bits" if bits is not None else ""), []
    for i, mask in enumerate(masks):
        given, expected = [], []
        for row in rows:
            params = {"a": 1.5, "n": row["n"], "bits": bits}
            for first in firsts:
                terms = [words(node, row, first, params) for _, node in text.texts[i].terms]
                given.append([first, *(row[name] for name in Texts.NAMES[1:]), *terms])
                expected.append(words(mask, row, first, params))
        holds, found = text(i, given, bits)
        cached = [int(((first + PLACES < row["kv_len"]) * POWERS).sum()) for row in rows for first in firsts]
        wrong = holds & ((found ^ torch.tensor(expected)) & torch.tensor(cached) != 0)
        at = int(wrong.nonzero()[0]) if wrong.any() else 0
        assert not wrong.any(), f"{mask}\n{text.texts[i]}\n{given[at]}: {found[at]:032b}, not {expected[at]:032b}"
        shares.append(holds.double().mean().item())
    return shares


def some_rows(rng: random.Random, ns: list[int]) -> list[dict[str, int]]:
    return [
        {"q": rng.choice([rng.randrange(-40, 300), 2**30 - 1, -(2**30) + 1, 127, 128]), "head": rng.randrange(2), "request": 0, "kv_len": rng.choice([300, 1, 2**30 - 1]),
         "q_len": rng.choice([1, 64]), "n": rng.choice(ns)}
        for _ in range(12)
    ]  # fmt: skip


FIRSTS = [0, 2, 4, 6, 128, 130, 262, 2**30 - 200]
NS = [0, 1, -1, 3, 7, 64, 127, 128, 129, -300, 2**30, I32_MAX, I32_MIN]


@pytest.mark.parametrize("seed", range(6))
def test_random_masks(seed: int) -> None:
    rng = random.Random(seed)
    masks = [m for m in dict.fromkeys(random_mask(rng, 2 + seed % 3) for _ in range(60)) if m.op != "const"]
    compare(masks, some_rows(rng, NS), FIRSTS)


RANGES = [  # of which no key is to be evaluated by itself
    kv <= q, kv < q, q < kv, q <= kv, kv == q, ~(kv == q), kv < 5, kv > n, kv >= n, n != kv, q - kv < n, q - kv <= n, kv - q > n, kv + n > q, kv - n <= q - 3,
    (kv <= q) & (q - kv < n), (kv <= q) & ((q - kv < n) | (kv < 4)), abs(q - kv) <= n, abs(q - kv) < 7, abs(kv - q) > n, n <= abs(q - kv), kv // 64 <= q // 64,
    kv // n == q // n, kv // n < q // n, kv >> 6 == q >> 6, abs(kv // n - q // n) <= 3, kv // 7 > q // 7 - n, where(q < n, kv < 9, kv > q), (kv < 9) ^ (kv < q),
    (kv < 9) == (q < n), (symbol("head") == 1) | (kv <= q), -kv < q, q + 5 - kv < n, kv < q * n, kv < q % 17, kv < symbol("kv_len") - symbol("q_len"), kv - 2**30 < n,
    kv < n + 1, abs(kv) <= n, kv == n - 1, n - kv < -3,
]  # fmt: skip
UNITS = [
    kv // (n & 12) == q // (n & 12), kv // (n | 1) < q, kv // (n ^ 6) <= q, kv // where(q < n, 3, 5) < q // 4, kv // (symbol("head") | 16) <= q // (symbol("head") | 16),
    kv // -n < q, kv // (q & 63) <= n,
]  # fmt: skip
OF_ROWS = [abs(n) <= kv, kv < abs(n), abs(n) < kv, abs(n) <= q - kv, abs(q - kv) <= abs(n), abs(n) < abs(q - kv), abs(n) == kv]
WRAPPING = [kv + I32_MAX < q, kv - n < I32_MIN + q, kv + n + n < q]


def test_ranges() -> None:
    rng = random.Random(7)
    shares = compare(RANGES, some_rows(rng, NS) + some_rows(rng, [3, 17, 64, 128]), FIRSTS)
    for mask, share in zip(RANGES, shares):
        assert column_texts(mask, value, str).terms == (), mask
        assert share > 0.2, f"{mask}: words hold of {share:.0%} of the rows"
    compare([*WRAPPING, *UNITS, *OF_ROWS], some_rows(rng, NS) + some_rows(rng, [3, 17, 64, I32_MIN]), FIRSTS)
    seeing_all = [row | {"q": I32_MAX} for row in some_rows(rng, [3, 2**30, I32_MAX])]
    compare([kv <= q, kv < q, (kv <= q) & (q - kv < n), kv >= q, kv == q], seeing_all, FIRSTS)
    always = {mask for mask in RANGES if not column_texts(mask, value, str).holds}
    assert {kv <= q, q - kv < n, (kv <= q) & ((q - kv < n) | (kv < 4)), abs(q - kv) <= n, kv // 64 <= q // 64} <= always


KEY_BY_KEY = [kv % 4 == q % 4, kv + kv < q, kv * 3 < q, (kv <= q) & (kv % 7 < 3), kv // 3 // 2 == q, kv // (kv - 5) < q, (kv & 8) == (q & 8), q // kv < 3]


def test_terms() -> None:
    """What is no range is evaluated key by key; ranges beside it stay ranges."""
    compare(KEY_BY_KEY, some_rows(random.Random(3), NS), FIRSTS)
    assert all(column_texts(mask, value, str).terms for mask in KEY_BY_KEY)
    found = column_texts((kv <= q) & (kv % 7 < 3), value, str)
    assert "ag_columns_below" in found.result and [node for _, node in found.terms] == [kv % 7 < 3]
    both = column_texts((kv % 7 < 3) & (kv % 5 < 3) | (kv <= q), value, str)  # one term, not two
    assert [node for _, node in both.terms] == [(kv % 7 < 3) & (kv % 5 < 3)]


def bit_mask() -> Node:
    """As CustomMask reads its bits."""
    bit = q * (symbol("kv_len") & 7) + kv
    byte = load("bits", I32, ("mask_bytes",), (q * (symbol("kv_len") >> 3) + (bit >> 3),))
    return ((byte >> (bit & 7)) & 1) == 1


@pytest.mark.parametrize("skipped", range(4))
def test_packed_bits(skipped: int) -> None:
    """A row of bits at any place; where its words are not all there, ``holds`` says so."""
    mask = bit_mask()
    assert column_texts(mask, value, str, ["bits"]).terms == () and column_texts(mask, value, str).terms != ()
    random_bits = torch.randint(0, 256, (3000,), dtype=torch.uint8)[skipped:]
    rows = [{"q": i, "head": 0, "request": 0, "kv_len": kv_len, "q_len": 64, "n": 0} for kv_len in (300, 301, 255, 128) for i in (0, 1, 2, 7, 40, 63)]
    (share,) = compare([mask, (kv <= q) | mask], rows, [0, 2, 4, 6, 128, 134], random_bits)[:1]
    assert 0.7 < share < 1.0  # the first bytes and the last are not read as words
    (share,) = compare([mask], rows, [0, 6], torch.randint(0, 256, (3000, 2), dtype=torch.uint8)[:, 0])
    assert share == 0.0  # bytes that do not lie side by side


def test_shared_parts_stay_short() -> None:
    """A condition that is used again and again is computed once."""
    condition = kv <= q
    for i in range(40):
        condition = (condition ^ (kv < n + i)) & (condition | (kv < i))
    found = column_texts(condition, value, str)
    assert sum(len(text) for _, text in found.lines) + len(found.result) < 200 * len(list(walk(condition)))


def test_library_masks_are_ranges() -> None:
    """Windows, chunks, prefixes and sinks are never evaluated key by key."""
    import attngen.variants as library

    for name in ("Causal", "SlidingWindow", "BidirectionalWindow", "Chunked", "BlockCausal", "PrefixLM", "PrefixWindow", "Streaming", "LeftPadding", "DuoAttention"):
        mask = getattr(library, name)().trace.mask
        assert column_texts(mask, lambda node: "x", str).terms == (), name
