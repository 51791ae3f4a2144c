"""BatchAttention on a GPU against the float64 oracle: layouts, phases, graphs, determinism, parameters, errors.

Every cache slot that must not be read, and every output before a run, holds NaN.
"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor

import attngen as ag
import pytest
import torch
from attngen import variants
from attngen.variants import example_params
from batches import PHASES, Batch, judge, make, split_params

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def built():
    """Compiles every kernel of the grid on all cores. Workers of xdist are parallel already, and what each of them loads here counts in
    the time of its first test."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return
    batch = Batch([1], [1])
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: make(variants.library()[name](), batch), variants.library()))


@pytest.mark.parametrize("name", [n for n in variants.library() if n not in ("TreeMask",)])
@pytest.mark.parametrize("phase", PHASES)
def test_every_variant_in_every_phase(name, phase):
    batch = Batch(*PHASES[phase], page_size=random.Random(f"{name}{phase}").choice((1, 5, 16, 64)))
    cls = variants.library()[name]
    bound = example_params(cls, **batch.sizes())
    variant = cls()
    attn = make(variant, batch)
    to_plan, to_run = split_params(variant, bound, "cuda", batch)
    attn.plan(*batch.pages(), **to_plan)
    out = torch.full((len(batch.q), 8, 128), torch.nan, dtype=torch.bfloat16, device="cuda")
    lse = None
    if variant.trace.weight is None:
        _, lse = attn.run(batch.q, (batch.k, batch.v), out=out, return_lse=True, **to_run)
    else:
        attn.run(batch.q, (batch.k, batch.v), out=out, **to_run)
    attn.check()
    judge(out, lse, batch, variant, **bound)


@pytest.mark.parametrize("d,dv", [(32, 32), (64, 64), (80, 48), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_dims(d, dv, dtype):
    batch = Batch(*PHASES["mixed"], d=d, dv=dv, dtype=dtype, heads=6, kv_heads=2)
    variant = ag.compose(variants.SoftCap(20.0), variants.Causal())
    attn = make(variant, batch)
    attn.plan(*batch.pages())
    out, lse = attn.run(batch.q, (batch.k, batch.v), return_lse=True)
    judge(out, lse, batch, variant)


SHORT = ([8, 1, 5, 0, 7, 8], [700, 3, 64, 30, 9000, 5])  # up to 32 packed rows: decode in pairs of warps


@pytest.mark.parametrize("name", ["Causal", "Sigmoid", "GptOss", "StreamingLLM", "Llama3RoPE", "ALiBi"])
def test_short_appends(name):
    batch = Batch(*SHORT, page_size=random.Random(name).choice((1, 5, 16)))
    variant = variants.library()[name]()
    bound = example_params(type(variant), **batch.sizes())
    attn = make(variant, batch, max_q_len=8, max_pages=16384)
    to_plan, to_run = split_params(variant, bound, "cuda", batch)
    attn.plan(*batch.pages(), **to_plan)
    out = torch.full((len(batch.q), 8, 128), torch.nan, dtype=torch.bfloat16, device="cuda")
    if variant.trace.weight is None:
        _, lse = attn.run(batch.q, (batch.k, batch.v), out=out, return_lse=True, **to_run)
    else:
        lse = None
        attn.run(batch.q, (batch.k, batch.v), out=out, **to_run)
    attn.check()
    judge(out, lse, batch, variant, **bound)


@pytest.mark.parametrize("d,dv", [(32, 48), (64, 64), (192, 128), (256, 256)])
def test_short_appends_of_other_heads(d, dv):
    batch = Batch(*SHORT, d=d, dv=dv, dtype=torch.float16, heads=9, kv_heads=3, layout="HND")
    attn = make(variants.Causal(), batch, max_q_len=8)
    attn.plan(*batch.pages())
    outs = [attn.run(batch.q, (batch.k, batch.v), return_lse=True) for _ in range(10)]
    judge(*outs[0], batch, variants.Causal())
    assert all(torch.equal(o, outs[0][0]) for o, _ in outs)


def test_short_appends_of_many_requests():
    """More units than half the blocks of the GPU: tiles of 64 rows, on Hopper, in place of decode's of 32."""
    rng = random.Random(9)
    batch = Batch([rng.choice((8, 8, 5, 1)) for _ in range(150)], [rng.randint(0, 300) for _ in range(150)])
    attn = make(variants.Causal(), batch, max_q_len=8, max_requests=150)
    attn.plan(*batch.pages())
    out, lse = attn.run(batch.q, (batch.k, batch.v), return_lse=True)
    attn.check()
    judge(out, lse, batch, variants.Causal())
    loaded = attn.engine._loaded
    assert ({loaded.kernels.classes[i].config.block_m for i in attn._planned[0].active} == {16, 64}) == (loaded.kernels.instead(1) is not None)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("style", ["block_table", "one tensor"])
def test_index_styles_and_layouts(layout, style):
    batch = Batch(*PHASES["mixed"], layout=layout, page_size=8)
    variant = variants.SlidingWindow(100)
    attn = make(variant, batch)
    cache = (batch.k, batch.v)
    if style == "block_table":
        attn.plan(batch.q_indptr, block_table=batch.table, kv_lens=batch.ints(batch.kv_lens))
    else:
        attn.plan(*batch.pages())
        cache = torch.stack(cache, 1)
    out, lse = attn.run(batch.q, cache, return_lse=True)
    judge(out, lse, batch, variant)


def test_ragged():
    batch = Batch(*PHASES["mixed"])
    kv_indptr, k, v = batch.ragged()
    attn = make(variants.Causal(), batch, page_size=None, max_pages=None, max_kv_tokens=8192)
    attn.plan(batch.q_indptr, kv_indptr)
    out, lse = attn.run(batch.q, (k, v), return_lse=True)
    judge(out, lse, batch, variants.Causal())


def test_a_graph_sees_new_lengths_pages_and_values():
    variant = ag.compose(variants.SoftCap(), variants.SlidingWindow())
    first = Batch([1] * 8, [100, 3, 77, 512, 9, 1, 64, 65], seed=1)
    second = Batch([1] * 8, [400, 30, 7, 12, 90, 0, 640, 5], seed=2)
    attn = make(variant, first, max_q_len=1)
    pages = max(len(first.k), len(second.k))
    k, v = (torch.full((pages, *first.k.shape[1:]), torch.nan, dtype=torch.bfloat16, device="cuda") for _ in "kv")
    q = torch.empty_like(first.q)
    indptr, last = torch.empty_like(first.kv_indptr), torch.empty_like(first.last)
    indices = torch.zeros(4096, dtype=torch.int32, device="cuda")
    cap, window = torch.zeros((), device="cuda"), torch.zeros((), dtype=torch.int32, device="cuda")
    out = torch.empty_like(q)

    def load(batch, cap_value, window_value):
        q.copy_(batch.q), k[: len(batch.k)].copy_(batch.k), v[: len(batch.v)].copy_(batch.v)
        indptr.copy_(batch.kv_indptr), last.copy_(batch.last), indices[: len(batch.kv_indices)].copy_(batch.kv_indices)
        cap.fill_(cap_value), window.fill_(window_value)

    def step():
        attn.plan(None, indptr, indices, last, window=window)
        attn.run(q, (k, v), out=out, cap=cap)

    load(first, 5.0, 50)
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for batch, values in ((first, (5.0, 50)), (second, (9.0, 200)), (first, (30.0, 4))):
        load(batch, *values)
        out.fill_(torch.nan)
        graph.replay()
        judge(out, None, batch, variant, cap=values[0], window=values[1])
    attn.check()


def test_same_input_same_bits():
    batch = Batch([1] * 5 + [150], [3000, 1, 64, 700, 5, 400])
    attn = make(variants.Causal(), batch)
    attn.plan(*batch.pages())
    outs = [attn.run(batch.q, (batch.k, batch.v)) for _ in range(20)]
    assert all(torch.equal(outs[0], o) for o in outs)


def test_batch_invariance():
    """A request's bits do not depend on the batch, nor on how its prompt was cut."""
    batch = Batch([1, 200, 5, 1], [5000, 700, 64, 3000])
    attn = make(variants.Causal(), batch, batch_invariant=True, max_kv_len=8192)
    attn.plan(*batch.pages())
    whole = attn.run(batch.q, (batch.k, batch.v))
    start = 0
    for r, n in enumerate(batch.q_lens):
        for first, count in ((0, n), (0, n // 3), (n // 3, 1), (n - 1, 1)):
            if count == 0:
                continue
            kv_len = batch.kv_lens[r] - n + first + count
            pages = -(-kv_len // 16)
            attn.plan(batch.ints([0, count]), batch.ints([0, pages]), batch.table[r, :pages].contiguous(),
                      batch.ints([kv_len - (pages - 1) * 16]))  # fmt: skip
            rows = slice(start + first, start + first + count)
            assert torch.equal(attn.run(batch.q[rows].contiguous(), (batch.k, batch.v)), whole[rows]), (r, first, count)
        start += n


def test_batch_invariance_of_many_pieces():
    """More pieces than a merge takes at once: the same bits whether they are the worker's last unit or not."""
    batch = Batch([1, 1, 1], [40000, 150000, 33])
    attn = make(variants.Causal(), batch, batch_invariant=True, max_pages=16384, max_q_len=1)
    attn.plan(*batch.pages())
    whole = attn.run(batch.q, (batch.k, batch.v))
    judge(whole, None, batch, variants.Causal())
    for r in range(3):
        pages = -(-batch.kv_lens[r] // 16)
        attn.plan(None, batch.ints([0, pages]), batch.table[r, :pages].contiguous(), batch.last[r : r + 1])
        assert torch.equal(attn.run(batch.q[r : r + 1].contiguous(), (batch.k, batch.v)), whole[r : r + 1]), r


def test_two_objects_on_two_streams():
    first, second = Batch([1] * 6, [900, 40, 3, 500, 64, 7], seed=1), Batch([150, 3], [150, 900], seed=2)
    jobs = []
    for batch in (first, second):
        stream = torch.cuda.Stream()
        attn = make(variants.Causal(), batch)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(50):
                attn.plan(*batch.pages())
                out = attn.run(batch.q, (batch.k, batch.v))
        jobs.append((batch, out))
    torch.cuda.synchronize()
    for batch, out in jobs:
        judge(out, None, batch, variants.Causal())


def test_padding_rows_are_left_alone():
    batch = Batch([1, 1], [30, 40])
    attn = make(variants.Causal(), batch)
    attn.plan(*batch.pages())
    q = torch.cat([batch.q, torch.full_like(batch.q, torch.nan)])
    out = torch.full(q.shape, 7.0, dtype=q.dtype, device="cuda")
    attn.run(q, (batch.k, batch.v), out=out)
    assert (out[2:] == 7.0).all() and out[:2].isfinite().all()


def test_errors_that_only_the_device_sees():
    batch = Batch([1, 1, 1], [30, 40, 50])
    attn = make(variants.Causal(), batch)
    bad = batch.kv_indices.clone()
    bad[2] = 10**6  # request 1 begins at entry 2
    attn.plan(batch.q_indptr, batch.kv_indptr, bad, batch.last)
    out = attn.run(batch.q, (batch.k, batch.v))
    with pytest.raises(ag.ParameterError, match="request 1: page 1000000"):
        attn.check()
    assert out[1].isnan().all() and out[0].isfinite().all() and out[2].isfinite().all()
    decreasing = batch.kv_indptr.clone()
    decreasing[2] = 0
    attn.plan(batch.q_indptr, decreasing, batch.kv_indices, batch.last)
    attn.run(batch.q, (batch.k, batch.v))
    with pytest.raises(ag.ParameterError, match=r"request 1: kv_indptr\[2\] is 0, less than the entry before"):
        attn.check()
    attn.plan(*batch.pages())
    attn.run(batch.q, (batch.k, batch.v))
    attn.check()


@pytest.mark.parametrize("q_len", [1, 3, 8, 40, 200])
def test_fewer_rows_of_q_than_the_device_counts(q_len):
    """Rows that exist of the request that lacks some are NaN, those of others as ever; nothing past q's end is touched."""
    batch = Batch([q_len, q_len, q_len], [300, 4000, 500])
    attn = make(variants.Causal(), batch, max_q_len=q_len)
    attn.plan(*batch.pages())
    wanted = attn.run(batch.q, (batch.k, batch.v))
    for rows in (3 * q_len - 1, 2 * q_len, q_len + q_len // 2, 0):
        space = torch.full_like(batch.q, 7.0)
        attn.plan(*batch.pages())
        attn.run(batch.q[:rows], (batch.k, batch.v), out=space[:rows])
        whole = rows // q_len
        with pytest.raises(ag.ParameterError, match=f"request [12]: q has {rows} rows" if rows else "request [012]: q has 0 rows"):
            attn.check()
        assert torch.equal(space[: whole * q_len], wanted[: whole * q_len])
        assert space[whole * q_len : rows].isnan().all() and (space[rows:] == 7.0).all()
    attn.run(batch.q, (batch.k, batch.v))
    attn.check()


@pytest.mark.parametrize("q_len", [1, 40, 200])
def test_fewer_ragged_keys_than_the_device_counts(q_len):
    batch = Batch([q_len] * 3, [300, 900, 2000])
    kv_indptr, k, v = batch.ragged()
    attn = make(variants.Causal(), batch, page_size=None, max_pages=None, max_kv_tokens=8192)
    attn.plan(batch.q_indptr, kv_indptr)
    wanted = attn.run(batch.q, (k, v))
    for rows in (3199, 1200, 500):
        attn.plan(batch.q_indptr, kv_indptr)
        out, lse = attn.run(batch.q, (k[:rows].clone(), v[:rows].clone()), return_lse=True)
        with pytest.raises(ag.ParameterError, match=f"request [12]: k and v have {rows} rows"):
            attn.check()
        whole = (rows >= 300) + (rows >= 1200)
        assert torch.equal(out[: whole * q_len], wanted[: whole * q_len])
        assert out[whole * q_len :].isnan().all() and lse[whole * q_len :].isnan().all()


def test_q_indptr_that_begins_later():
    batch = Batch(*PHASES["mixed"])
    attn = make(variants.Causal(), batch)
    attn.plan(*batch.pages())
    wanted = attn.run(batch.q, (batch.k, batch.v))
    attn.plan(batch.q_indptr + 3, *batch.pages()[1:])
    q = torch.cat([torch.full_like(batch.q[:3], torch.nan), batch.q])
    out = torch.full(q.shape, 7.0, dtype=q.dtype, device="cuda")
    attn.run(q, (batch.k, batch.v), out=out)
    attn.check()
    assert (out[:3] == 7.0).all() and torch.equal(out[3:], wanted)


def test_errors_on_the_host():
    batch = Batch([1, 1], [30, 40])
    attn = make(ag.compose(variants.SoftCap(), variants.SlidingWindow()), batch)
    with pytest.raises(ag.ParameterError, match="run before plan"):
        attn.run(batch.q, (batch.k, batch.v))
    with pytest.raises(ag.ParameterError, match="`cap`, which belongs to run"):
        attn.plan(*batch.pages(), cap=3.0)
    with pytest.raises(ag.ParameterError, match="no parameter `windows`"):
        attn.plan(*batch.pages(), windows=3)
    attn.plan(*batch.pages(), window=64)
    with pytest.raises(ag.ParameterError, match="`window`, which belongs to plan"):
        attn.run(batch.q, (batch.k, batch.v), window=64)
    with pytest.raises(ag.ParameterError, match="required the 2 of the 2 planned"):
        attn.plan(None, *batch.pages()[1:]), attn.run(batch.q[:1], (batch.k, batch.v))
    with pytest.raises(ag.ParameterError, match="float32"):
        attn.run(batch.q.float(), (batch.k, batch.v))
