"""Keys in levels: joined page tables, and attention over several caches, against one batch of the same keys."""

from __future__ import annotations

import random
from typing import Any

import attngen as ag
import pytest
import torch
from attngen.variants import Causal, Gemma2, HeadGate, PrefixLM, ScalableSoftmax, Sigmoid, Sinks, SlidingWindow

HEADS, KV_HEADS, DIM = 4, 2, 32


def ints(x: Any) -> torch.Tensor:
    return torch.tensor(list(x), dtype=torch.int32)


def ends(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


# ---------------------------------------------------------------- joined page tables


@pytest.mark.parametrize("seed", range(20))
def test_joined_tables_are_those_of_each_level_in_turn(seed):
    rng = random.Random(seed)
    q_lens = [rng.randint(0, 4) for _ in range(rng.randint(1, 12))]
    q_indptr = ends(q_lens)
    cuts = sorted(rng.sample(range(len(q_lens) + 1), min(3, len(q_lens) + 1)))
    levels, wanted = [], [[] for _ in q_lens]
    for level in range(rng.randint(1, 3)):
        last_level = level == 0  # made first, given last
        bounds = list(range(len(q_lens) + 1)) if last_level else sorted({0, *cuts[level - 1 :], len(q_lens)})
        counts = [rng.randint(0, 5) for _ in bounds[1:]]
        pages = [rng.randrange(1000) for _ in range(sum(counts))]
        full = [rng.randint(1, 16) if last_level else 16 for _ in counts]
        levels.insert(0, (ints(q_indptr[b] for b in bounds), ints(ends(counts)), ints(pages), ints(full)))
        for (first, end), at, count in zip(zip(bounds, bounds[1:]), ends(counts), counts):
            for r in range(first, end):
                wanted[r] = [*pages[at : at + count], *wanted[r]] if last_level is False else [*wanted[r], *pages[at : at + count]]
    if any(n == 0 for n in q_lens) and len(levels) > 1:  # which entry a request without rows belongs to is not told by rows
        wanted = [w if n else None for w, n in zip(wanted, q_lens)]
    found = ag.join_levels(*zip(*levels), page_size=16, max_pages=300)
    indptr = found["kv_indptr"].tolist()
    for r, pages in enumerate(wanted):
        if pages is not None:
            assert found["kv_indices"][indptr[r] : indptr[r + 1]].tolist() == pages
    assert (found["shared_prefix"] >= 0).all() == (len(levels) > 1)


def test_joined_tables_are_planned():
    """Two levels of prefixes, as FlashInfer's cascade takes them, against the same keys one after another."""
    torch.manual_seed(0)
    k, v = torch.randn(2, 40, 16, KV_HEADS, DIM)
    q = torch.randn(5, HEADS, DIM)
    levels = (
        [ints([0, 3, 5]), ints([0, 1, 2, 3, 4, 5])], [ints([0, 2, 3]), ints([0, 1, 2, 3, 4, 6])],
        [ints([7, 9, 30]), ints([1, 2, 3, 4, 5, 6])], [ints([16, 16]), ints([3, 16, 1, 9, 2])],
    )  # fmt: skip
    attn = ag.BatchAttention(Causal(), num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, page_size=16, max_requests=5, max_q_tokens=5,
                             max_pages=40, device="cpu", dtype=torch.float32, shared_prefix=True)  # fmt: skip
    attn.plan(**ag.join_levels(*levels, page_size=16, max_pages=40))
    out = attn.run(q, (k, v))
    attn.check()
    for r, (pages, n) in enumerate([([7, 9, 1], 35), ([7, 9, 2], 48), ([7, 9, 3], 33), ([30, 4], 25), ([30, 5, 6], 34)]):
        keys, values = (x[pages].reshape(-1, KV_HEADS, DIM)[:n] for x in (k, v))
        wanted = ag.reference(q[None, r : r + 1], keys[None], values[None], Causal())
        torch.testing.assert_close(out[r].double(), wanted[0, 0], rtol=1e-4, atol=1e-5)


def test_a_page_in_between_that_is_not_full_is_bad():
    levels = [ints([0, 1]), ints([0, 1])], [ints([0, 1]), ints([0, 1])], [ints([0]), ints([1])], [ints([7]), ints([16])]
    attn = ag.BatchAttention(Causal(), num_heads=1, num_kv_heads=1, head_dim=DIM, page_size=16, max_requests=1, max_q_tokens=1, max_pages=4,
                             device="cpu", dtype=torch.float32, shared_prefix=True)  # fmt: skip
    with pytest.raises(ag.ParameterError, match=r"kv_last_page_len\[0\] is 17: required 1 to page_size=16"):
        attn.plan(**ag.join_levels(*levels, page_size=16, max_pages=4))
        attn.check()


def test_levels_of_other_shapes_are_refused():
    good = [ints([0, 1])], [ints([0, 1])], [ints([0])], [ints([7])]
    with pytest.raises(ag.ParameterError, match="required one each of every level"):
        ag.join_levels(good[0] * 2, *good[1:], page_size=16, max_pages=4)
    with pytest.raises(ag.ParameterError, match=r"paged_kv_indices_arr\[0\] is list"):
        ag.join_levels(*good[:2], [[0]], good[3], page_size=16, max_pages=4)
    with pytest.raises(ag.ParameterError, match="level 0: qo_indptr has 2 entries, kv_indptr 3"):
        ag.join_levels(good[0], [ints([0, 1, 2])], *good[2:], page_size=16, max_pages=4)


# ---------------------------------------------------------------- several caches


def composed(variant: Any) -> tuple[ag.ComposedAttention, Any]:
    """Pages of 16, pages of 5 and keys without pages."""
    facts = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, max_requests=8, max_q_tokens=64, device="cpu", dtype=torch.float32)
    return ag.ComposedAttention([
        ag.BatchAttention(variant, page_size=16, max_pages=64, shared_prefix=True, **facts),
        ag.BatchAttention(variant, page_size=5, max_pages=64, kv_layout="HND", **facts),
        ag.BatchAttention(variant, max_kv_tokens=512, **facts),
    ])  # fmt: skip


VARIANTS = {
    "causal": (Causal(), {}, {}), "window": (SlidingWindow(), {"window": 20}, {}), "sinks": (ag.compose(Sinks(), Causal()), {}, {"sinks": torch.randn(HEADS)}),
    "sigmoid": (ag.compose(Sigmoid(-2.0), Causal()), {}, {}), "gate": (ag.compose(HeadGate(), Causal()), {}, None), "gemma 2": (Gemma2(), {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_several_caches_are_one_sequence(name):
    variant, to_plan, to_run = VARIANTS[name]
    torch.manual_seed(1)
    q_lens, parts = [1, 7, 0, 3], ([32, 16, 0, 48], [0, 12, 5, 9], [1, 7, 0, 20])
    rows, requests = sum(q_lens), len(q_lens)
    q = torch.randn(rows, HEADS, DIM)
    if to_run is None:
        to_run = {"gate": torch.randn(rows, HEADS)}
    keys = [[torch.randn(2, n, KV_HEADS, DIM) for n in part] for part in parts]
    attn = composed(variant)
    k0, v0 = torch.full((2, 20, 16, KV_HEADS, DIM), torch.nan)
    k1, v1 = torch.full((2, 20, KV_HEADS, 5, DIM), torch.nan)
    table0, table1, used0, used1 = [], [], 0, 0
    for r in range(requests):
        count0, count1 = -(-parts[0][r] // 16), -(-parts[1][r] // 5)
        table0.append([used0 + i for i in range(count0)] + [0] * (4 - count0))
        table1 += [used1 + i for i in range(count1)]
        for j in range(parts[0][r]):
            k0[used0 + j // 16, j % 16], v0[used0 + j // 16, j % 16] = keys[0][r][:, j]
        for j in range(parts[1][r]):
            k1[used1 + j // 5, :, j % 5], v1[used1 + j // 5, :, j % 5] = keys[1][r][:, j]
        used0, used1 = used0 + count0, used1 + count1
    counts1 = [-(-n // 5) for n in parts[1]]
    k2, v2 = torch.cat([x for x in keys[2]], 1)
    attn.plan(ends(q_lens), [
        dict(block_table=table0, kv_lens=parts[0]),
        dict(kv_indptr=ends(counts1), kv_indices=table1, kv_last_page_len=[n - (c - 1) * 5 if c else 0 for n, c in zip(parts[1], counts1)]),
        dict(kv_indptr=ends(parts[2])),
    ], **to_plan)  # fmt: skip
    out, lse = attn.run(q, [(k0, v0), (k1, v1), (k2, v2)], return_lse=True, **to_run)
    attn.check()
    for r, (first, n) in enumerate(zip(ends(q_lens), q_lens)):
        k, v = torch.cat([keys[i][r] for i in range(3)], 1)
        if n:
            one = {p: x if variant.trace.fields[p].axes[:1] != ("q_tokens",) else x[first : first + n] for p, x in to_run.items()}
            wanted = ag.reference(q[None, first : first + n], k[None], v[None], variant, **to_plan, **one)
            torch.testing.assert_close(out[first : first + n].double(), wanted[0], rtol=2e-4, atol=2e-5)
    assert (lse is None) == (variant.trace.weight is not None)


def test_caches_that_do_not_fit_together_are_refused():
    facts = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, max_requests=8, max_q_tokens=64, device="cpu", dtype=torch.float32)
    causal = Causal()
    level = ag.BatchAttention(causal, page_size=16, max_pages=64, **facts)
    with pytest.raises(ag.ParameterError, match="required one variant"):
        ag.ComposedAttention([level, ag.BatchAttention(SlidingWindow(5), page_size=16, max_pages=64, **facts)])
    with pytest.raises(ag.ParameterError, match="num_kv_heads 4 and 2"):
        ag.ComposedAttention([level, ag.BatchAttention(causal, page_size=16, max_pages=64, **{**facts, "num_kv_heads": 4})])
    for variant, found in ((ScalableSoftmax(), "kv_len"), (PrefixLM(), None)):
        attn = ag.BatchAttention(variant, page_size=16, max_pages=64, **facts)
        if found and any("kv_len" in node.symbols for node in variant.trace.roots().values()):
            with pytest.raises(ag.UnsupportedError, match=found):
                ag.ComposedAttention([attn])
    with pytest.raises(ag.ParameterError, match="required those of 1"):
        ag.ComposedAttention([level]).plan([0, 1], [])
    with pytest.raises(ag.ParameterError, match="run before plan"):
        ag.ComposedAttention([level]).run(torch.zeros(1, HEADS, DIM), [])
    with pytest.raises(ag.ParameterError, match="required kv_indptr, or block_table and kv_lens"):
        ag.ComposedAttention([level]).plan([0, 1], [{}])
