"""BatchAttention on a GPU against the float64 oracle: layouts, phases, graphs, determinism, parameters, errors.

Every cache slot that must not be read, and every output before a run, holds NaN.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compare import compare

import attngen as ag
from attngen import variants
from attngen.variants import example_params

pytestmark = pytest.mark.gpu


class Batch:
    """A random batch in pages, and the same in dense form for the oracle."""

    def __init__(self, q_lens, kv_lens, page_size=16, layout="NHD", d=128, dv=None, heads=8, kv_heads=2, dtype=torch.bfloat16,
                 seed=0):  # fmt: skip
        self.q_lens, self.kv_lens, self.page_size, self.layout = q_lens, kv_lens, page_size, layout
        random_ = torch.Generator().manual_seed(seed)
        requests, dv = len(q_lens), dv or d
        self.dense_q = torch.randn(requests, max(*q_lens, 1), heads, d, generator=random_).to(dtype)
        self.dense_k = torch.randn(requests, max(*kv_lens, 1), kv_heads, d, generator=random_).to(dtype)
        self.dense_v = torch.randn(requests, max(*kv_lens, 1), kv_heads, dv, generator=random_).to(dtype)
        counts = [-(-n // page_size) for n in kv_lens]
        pages = torch.randperm(sum(counts) + 5, generator=random_)
        shape = (len(pages), page_size, kv_heads) if layout == "NHD" else (len(pages), kv_heads, page_size)
        k, v = torch.full((*shape, d), torch.nan, dtype=dtype), torch.full((*shape, dv), torch.nan, dtype=dtype)
        self.indices, self.table = [], torch.full((requests, max(*counts, 1)), -1, dtype=torch.int32)
        for r, (n, count) in enumerate(zip(kv_lens, counts)):
            own = pages[len(self.indices) : len(self.indices) + count].tolist()
            self.table[r, :count] = torch.tensor(own, dtype=torch.int32)
            self.indices += own
            for j in range(n):
                place = (own[j // page_size], j % page_size) if layout == "NHD" else (own[j // page_size], slice(None), j % page_size)
                k[place], v[place] = self.dense_k[r, j], self.dense_v[r, j]
        self.q = torch.cat([self.dense_q[r, :n] for r, n in enumerate(q_lens)]).cuda()
        self.k, self.v = k.cuda(), v.cuda()
        self.q_indptr = ints([0, *torch.tensor(q_lens).cumsum(0).tolist()])
        self.kv_indptr = ints([0, *torch.tensor(counts).cumsum(0).tolist()])
        self.kv_indices = ints(self.indices or [0])
        self.last = ints([n - (c - 1) * page_size if c else 0 for n, c in zip(kv_lens, counts)])

    def pages(self):
        return self.q_indptr, self.kv_indptr, self.kv_indices, self.last

    def expected(self, variant, **params):
        """Packed output and LSE of the oracle, and torch-like rounding for scale."""
        lse = variant.trace.weight is None
        result = ag.reference(self.dense_q, self.dense_k, self.dense_v, variant, q_lens=self.q_lens, kv_lens=self.kv_lens,
                              return_lse=lse, **params)  # fmt: skip
        out, sums = result if lse else (result, None)
        out = torch.cat([out[r, :n] for r, n in enumerate(self.q_lens)])
        return out, None if sums is None else torch.cat([sums[r, :, :n].T for r, n in enumerate(self.q_lens)])


def ints(x):
    return torch.tensor(x, dtype=torch.int32, device="cuda")


def make(variant, batch, **more):
    d, dv = batch.dense_k.shape[-1], batch.dense_v.shape[-1]
    given = dict(
        num_heads=batch.dense_q.shape[2], num_kv_heads=batch.dense_k.shape[2], head_dim=d, head_dim_v=dv,
        page_size=batch.page_size, dtype=batch.q.dtype, max_requests=64, max_q_tokens=4096, max_pages=4096,
        kv_layout=batch.layout,
    )  # fmt: skip
    return ag.BatchAttention(variant, **{**given, **more})


def split_params(variant, params):
    reads = variant.trace.mask.params if variant.trace.mask is not None else ()
    device = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in params.items()}
    return {n: x for n, x in device.items() if n in reads}, {n: x for n, x in device.items() if n not in reads}


def judge(out, lse, batch, variant, **params):
    ref, ref_lse = batch.expected(variant, **params)
    compare(out.cpu(), ref, like=ref.to(out.dtype) + 2e-3)
    if lse is not None:
        compare(lse.cpu(), ref_lse, dtype=out.dtype if variant.trace.rope else torch.float16)  # rotated q is rounded again


@pytest.fixture(scope="module", autouse=True)
def built():
    """Compiles every kernel of the grid on all cores."""
    batch = Batch([1], [1])
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: make(variants.library()[name](), batch), variants.library()))


BATCHES = {
    "decode": ([1, 1, 1, 1], [700, 1, 64, 5000]),
    "append": ([4, 1, 7, 3], [300, 65, 7, 129]),
    "prefill": ([200, 130], [200, 513]),
    "mixed": ([1, 64, 0, 200, 3, 1], [900, 64, 40, 200, 0, 17]),
    "longer queries": ([70, 20], [17, 0]),
}


@pytest.mark.parametrize("name", [n for n in variants.library() if n not in ("TreeMask",)])
@pytest.mark.parametrize("phase", BATCHES)
def test_every_variant_in_every_phase(name, phase):
    batch = Batch(*BATCHES[phase], page_size=random.Random(f"{name}{phase}").choice((1, 5, 16, 64)))
    cls = variants.library()[name]
    bound = example_params(cls, requests=len(batch.q_lens), q_len=batch.dense_q.shape[1], kv_len=batch.dense_k.shape[1],
                           num_heads=8, num_kv_heads=2)  # fmt: skip
    variant = cls()
    attn = make(variant, batch)
    to_plan, to_run = split_params(variant, bound)
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
    batch = Batch(*BATCHES["mixed"], d=d, dv=dv, dtype=dtype, heads=6, kv_heads=2)
    variant = ag.compose(variants.SoftCap(20.0), variants.Causal())
    attn = make(variant, batch)
    attn.plan(*batch.pages())
    out, lse = attn.run(batch.q, (batch.k, batch.v), return_lse=True)
    judge(out, lse, batch, variant)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("style", ["block_table", "one tensor"])
def test_index_styles_and_layouts(layout, style):
    batch = Batch(*BATCHES["mixed"], layout=layout, page_size=8)
    variant = variants.SlidingWindow(100)
    attn = make(variant, batch)
    cache = (batch.k, batch.v)
    if style == "block_table":
        attn.plan(batch.q_indptr, block_table=batch.table.cuda(), kv_lens=ints(batch.kv_lens))
    else:
        attn.plan(*batch.pages())
        cache = torch.stack(cache, 1)
    out, lse = attn.run(batch.q, cache, return_lse=True)
    judge(out, lse, batch, variant)


def test_ragged():
    batch = Batch(*BATCHES["mixed"])
    k = torch.cat([batch.dense_k[r, :n] for r, n in enumerate(batch.kv_lens)]).cuda()
    v = torch.cat([batch.dense_v[r, :n] for r, n in enumerate(batch.kv_lens)]).cuda()
    attn = make(variants.Causal(), batch, page_size=None, max_pages=None, max_kv_tokens=8192)
    attn.plan(batch.q_indptr, ints([0, *torch.tensor(batch.kv_lens).cumsum(0).tolist()]))
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
            attn.plan(ints([0, count]), ints([0, pages]), batch.table[r, :pages].cuda().contiguous(),
                      ints([kv_len - (pages - 1) * 16]))  # fmt: skip
            rows = slice(start + first, start + first + count)
            assert torch.equal(attn.run(batch.q[rows].contiguous(), (batch.k, batch.v)), whole[rows]), (r, first, count)
        start += n


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
    with pytest.raises(ag.ParameterError, match="request 1: a page number"):
        attn.check()
    assert out[1].isnan().all() and out[0].isfinite().all() and out[2].isfinite().all()
    decreasing = batch.kv_indptr.clone()
    decreasing[2] = 0
    attn.plan(batch.q_indptr, decreasing, batch.kv_indices, batch.last)
    attn.run(batch.q, (batch.k, batch.v))
    with pytest.raises(ag.ParameterError, match="request 1: .*kv_indptr decreases"):
        attn.check()
    attn.plan(*batch.pages())
    attn.run(batch.q, (batch.k, batch.v))
    attn.check()


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
    with pytest.raises(ag.ParameterError, match="required one for each of the 2"):
        attn.plan(None, *batch.pages()[1:]), attn.run(batch.q[:1], (batch.k, batch.v))
    with pytest.raises(ag.ParameterError, match="float32"):
        attn.run(batch.q.float(), (batch.k, batch.v))
