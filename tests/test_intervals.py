"""Interval analysis of masks: sound for random masks over random tiles, as tight as brute force on the library's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attngen import variants
from attngen.expr import Node, discrete_inputs, load, param, symbol
from attngen.interp import evaluate
from attngen.intervals import Tile, classify, tiles
from attngen.ops import BOOL, I32, I32_MAX, I32_MIN
from attngen.variants import example_params
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import masks

q, kv = symbol("q"), symbol("kv")


def brute_force(
    mask: Node, q_len: int, kv_len: int, offset: int, block_q: int, block_kv: int, symbols: dict[str, int], params: dict[str, Any]
) -> torch.Tensor:
    """The class of each tile, from each of its pairs."""
    rows, columns = torch.arange(q_len, dtype=torch.int32) + offset, torch.arange(kv_len, dtype=torch.int32)
    values = {
        "q": rows[:, None], "kv": columns[None], "q_token": rows[:, None] - offset, "kv_token": columns[None],
        **{name: torch.tensor(x, dtype=torch.int32) for name, x in symbols.items()},
    }  # fmt: skip
    kept = evaluate(mask, values, params, discrete_inputs([mask])).expand(q_len, kv_len)
    found = [
        [Tile.FULL if x.all() else Tile.PARTIAL if x.any() else Tile.EMPTY for x in rows.split(block_kv, 1)] for rows in kept.split(block_q, 0)
    ]
    return torch.tensor(found)


def by_intervals(mask, q_len, kv_len, offset, block_q, block_kv, symbols, params) -> torch.Tensor:
    rows, columns = tiles(q_len, kv_len, offset, block_q, block_kv)
    known = {name: (torch.tensor(x), torch.tensor(x)) for name, x in symbols.items()}
    known |= {"q_token": (rows[0] - offset, rows[1] - offset), "kv_token": columns}
    return classify(mask, rows, columns, known, params)


def both(mask: Node, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    found, real = by_intervals(mask, *args), brute_force(mask, *args)
    assert found.shape == real.shape
    wrong = (found != Tile.PARTIAL) & (found != real)
    assert not wrong.any(), f"{mask}\n{found}\n{real}"
    return found, real


TABLES = {"ids": torch.tensor([[3, 0, -2, 7, 7, 1, 0, 64, -9, 2]] * 2, dtype=torch.int32), "flags": torch.rand(4, 5) < 0.5,
          "table": torch.tensor([0.5, -3.0, 0.0, 2.0])}  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(
    masks(), st.integers(1, 60), st.integers(1, 60), st.integers(-20, 40), st.integers(1, 17), st.integers(1, 17), st.integers(0, 3),
    st.sampled_from([0, 1, -3, 17, 64, I32_MAX, I32_MIN]), st.booleans(),
)  # fmt: skip
def test_sound_for_random_masks(mask, q_len, kv_len, offset, block_q, block_kv, head, n, known) -> None:
    symbols = {"head": head, "request": head % 2, "q_len": q_len, "kv_len": kv_len}
    params = {"a": 1.5, "n": n, **TABLES}
    args = (q_len, kv_len, offset, block_q, block_kv)
    if known:
        both(mask, *args, symbols, params)
    else:  # what is not known may be anything
        found, real = by_intervals(mask, *args, {}, {}), brute_force(mask, *args, symbols, params)
        assert not ((found != Tile.PARTIAL) & (found != real)).any()


ids = load("documents", I32, ("kv_tokens",), (symbol("kv_token"),))
MASKS = {  # as tight as brute force, where it says so
    "causal": kv <= q, "window": (kv <= q) & (q - kv < 19), "sinks or window": (kv <= q) & ((kv < 4) | (q - kv < 19)),
    "chunked": (kv <= q) & (q // 16 == kv // 16), "chunked by shifts": (kv <= q) & (q >> 4 == kv >> 4), "prefix": (kv < 23) | (kv <= q),
    "both sides": abs(q - kv) <= 10, "blocks of bits": (q & 15) + (kv & 15) < 8, "2-D window": (abs(q // 16 - kv // 16) <= 1) & (abs(q % 16 - kv % 16) <= 5),
    "parameter": q - kv < param("n", I32), "documents": (load("documents", I32, ("q_tokens",), (symbol("q_token"),)) == ids) & (kv <= q),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("block_q,block_kv", [(16, 16), (16, 8), (1, 32), (64, 128)])
def test_tight_where_masks_are_monotone_within_a_tile(name: str, block_q: int, block_kv: int) -> None:
    documents = torch.tensor([5, 40, 1, 60, 30, 24]).cumsum(0)
    params = {"n": 30, "documents": torch.bucketize(torch.arange(160), documents, right=True).int()}
    found, real = both(MASKS[name], 160, 160, 0, block_q, block_kv, {}, params)
    if name == "2-D window" and block_q > 16 or name == "blocks of bits" and 64 in (block_q, block_kv) or name == "documents":
        # Rows and keys of a tile wrap around together; a document that ends in a tile. Some are then PARTIAL.
        assert ((found == Tile.EMPTY) & (real == Tile.EMPTY)).sum() >= 0.5 * (real == Tile.EMPTY).sum()
    else:
        assert torch.equal(found, real)


LOOSE = ("TreeMask", "CustomMask", "Images")  # reads along two axes; text is 0 between the images' rising numbers


def test_tightness_on_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints, of the tiles that brute force finds EMPTY or FULL, how many intervals do."""
    sizes = dict(requests=1, q_len=300, kv_len=300, num_heads=2, num_kv_heads=2)
    symbols = {"head": 1, "kv_head": 1, "request": 0, "q_len": 300, "kv_len": 300, "q_offset": 0, "num_heads": 2, "num_kv_heads": 2}
    shares = {}
    for name, cls in variants.library().items():
        if cls().trace.mask is None:
            continue
        params = {n: x for n, x in cls().values.items()} | example_params(cls, **sizes)
        found, real = both(cls().trace.mask, 300, 300, 0, 32, 16, symbols, params)
        shares[name] = float((found == real).sum() / real.numel())
    with capsys.disabled():
        print("\ntiles of 32 x 16 that intervals class as brute force does:", ", ".join(f"{n} {x:.0%}" for n, x in shares.items()))
    assert len(shares) > 5 and all(x == 1.0 for n, x in shares.items() if n in ("Causal", "SlidingWindow", "Chunked", "PrefixLM", "GptOss", "DilatedWindow"))
    assert all(x >= 0.9 for n, x in shares.items() if n not in LOOSE), shares


def test_reads_have_the_extremes_of_their_entries() -> None:
    flags = load("flags", BOOL, ("kv_tokens",), (kv,))
    values = torch.zeros(40, dtype=torch.bool)
    values[10:20] = True
    found, real = both(flags, 8, 56, 0, 8, 4, {}, {"flags": values})  # past the 40th it reads 0
    assert torch.equal(found, real) and real[0].tolist() == [0, 0, 1, 2, 2] + [0] * 9
    assert set(classify(flags, *tiles(8, 40, 0, 8, 4)).flatten().tolist()) == {Tile.PARTIAL}  # the tensor is not known
    assert classify(flags, *tiles(8, 8, 0, 8, 4), params={"flags": values[:0]}).tolist() == [[0, 0]]


def test_no_mask_and_no_keys() -> None:
    assert classify(None, *tiles(5, 9, 0, 2, 4)).tolist() == [[2, 2, 2]] * 3
    assert tiles(5, 9, 7, 2, 4)[0][1].flatten().tolist() == [8, 10, 11]
