"""Random batches against the oracle: a bounded number from a seed that is printed when one fails.

    ATTNGEN_SOAK=500 ATTNGEN_SOAK_SEED=17 python -m pytest -m gpu tests/test_soak.py
"""

from __future__ import annotations

import functools
import os
import random
import time

import pytest
import torch
from batches import Batch, judge, make, split_params

import attngen as ag
from attngen import variants
from attngen.variants import example_params

# (variant, head_dim, head_dim_v, heads, kv_heads): what is compiled; everything else is drawn.
KERNELS = [
    (variants.Causal, 128, 128, 8, 2),
    (variants.Gemma2, 64, 64, 4, 4),
    (variants.GptOss, 64, 64, 10, 2),
    (variants.StreamingLLM, 128, 128, 6, 2),
    (variants.Sigmoid, 192, 128, 3, 1),
    (variants.ALiBi, 80, 48, 14, 2),
]


def draw_length(rng: random.Random, most: int) -> int:
    """Often a boundary, often short, sometimes long."""
    return min(most, rng.choice((0, 1, 1, 15, 16, 17, 63, 64, 65, rng.randint(1, 200), rng.randint(1, most))))


@functools.lru_cache(maxsize=None)
def engine(kernel: int, page_size: int | None, layout: str, invariant: bool, device: str):
    cls, d, dv, heads, kv_heads = KERNELS[kernel]
    like = Batch([1], [1], page_size=page_size or 1, layout=layout, d=d, dv=dv, heads=heads, kv_heads=kv_heads, device=device)
    ragged = {"page_size": None, "max_pages": None, "max_kv_tokens": 1 << 20} if page_size is None else {"max_pages": 1 << 20}
    return make(cls(), like, max_requests=32, max_q_tokens=8192, batch_invariant=invariant, max_kv_len=8192, **ragged)


def run_one(seed: int, device: str, most: int) -> None:
    rng = random.Random(seed)
    kernel = rng.randrange(len(KERNELS))
    cls, d, dv, heads, kv_heads = KERNELS[kernel]
    page_size, layout = rng.choice((None, 1, 3, 16, 64)), rng.choice(("NHD", "HND"))
    requests = rng.choice((1, 2, 5, 17))
    kv_lens = [draw_length(rng, most) for _ in range(requests)]
    decode = rng.random() < 0.4
    q_lens = [1 if decode else min(draw_length(rng, most // 4), n + 3) for n in kv_lens]
    batch = Batch(q_lens, kv_lens, page_size=page_size or 1, layout=layout, d=d, dv=dv, heads=heads, kv_heads=kv_heads, seed=seed,
                  device=device)  # fmt: skip
    params = example_params(cls, **batch.sizes())
    variant = cls()
    attn = engine(kernel, page_size, layout, rng.random() < 0.2, device)
    to_plan, to_run = split_params(variant, params, device, batch)
    q_indptr = None if decode and rng.random() < 0.5 else batch.q_indptr
    if page_size is None:
        kv_indptr, k, v = batch.ragged()
        attn.plan(q_indptr, kv_indptr, **to_plan)
    else:
        k, v = batch.k, batch.v
        if rng.random() < 0.5:
            attn.plan(q_indptr, block_table=batch.table, kv_lens=batch.ints(kv_lens), **to_plan)
        else:
            attn.plan(q_indptr, *batch.pages()[1:], **to_plan)
    out = torch.full((len(batch.q), heads, dv), torch.nan, dtype=batch.q.dtype, device=device)
    lse = variant.trace.weight is None
    result = attn.run(batch.q, (k, v), out=out, return_lse=lse, **to_run)
    attn.check()
    judge(out, result[1] if lse else None, batch, variant, **params)


def soak(device: str, count: int, most: int) -> None:
    first = int(os.environ.get("ATTNGEN_SOAK_SEED", time.time_ns() % 10**9))
    for seed in range(first, first + int(os.environ.get("ATTNGEN_SOAK", count))):
        try:
            run_one(seed, device, most)
        except BaseException:
            print(f"again: ATTNGEN_SOAK=1 ATTNGEN_SOAK_SEED={seed}")
            raise


def test_soak_on_the_cpu():
    soak("cpu", 40, 300)


@pytest.mark.gpu
def test_soak_on_a_gpu():
    soak("cuda", 80, 6000)
