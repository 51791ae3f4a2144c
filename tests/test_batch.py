"""BatchAttention on the CPU against the float64 oracle: layouts, phases, positions, parameters, bad input, invariance.

Every cache slot that must not be read, and every output before a run, holds NaN.
"""

from __future__ import annotations

import random

import attngen as ag
import pytest
import torch
from attngen import variants
from attngen.variants import example_params
from batches import PHASES, Batch, judge, make, split_params
from grid import VARIANTS, KernelCase

GRID = [KernelCase(name, torch.float32) for name in VARIANTS]


def batch_of(phase="mixed", **more):
    return Batch(*PHASES[phase], **{"d": 64, "dtype": torch.float32, "device": "cpu", **more})


def run(attn, batch, cache=None, lse=True, **params):
    """Output and LSE; rows that the plan does not own are NaN before and after."""
    q = torch.cat([batch.q, torch.full_like(batch.q[:1], torch.nan).expand(3, -1, -1)])
    out = torch.full((len(q), *batch.q.shape[1:2], batch.dense_v.shape[-1]), torch.nan, dtype=q.dtype)
    found = attn.run(q, cache or (batch.k, batch.v), out=out, return_lse=lse, **params)
    assert out[-3:].isnan().all(), "rows past the batch were written"
    return out[:-3], found[1][:-3] if lse else None


@pytest.mark.parametrize("kernel", GRID, ids=str)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.usefixtures("kernels")
def test_every_variant_in_every_phase(kernel, phase):
    draw = random.Random(f"{kernel.name}{phase}")
    batch = batch_of(phase, page_size=draw.choice((1, 5, 16, 64)), layout=draw.choice(("NHD", "HND")), seed=draw.randrange(99))
    variant = kernel.variant
    bound = example_params(variant, **batch.sizes())
    to_plan, to_run = split_params(variant, bound, "cpu", batch)
    style = draw.choice(("indices", "table", "one tensor", "ragged"))
    if style == "ragged":
        attn = make(variant, batch, page_size=None, max_kv_tokens=8192)
        kv_indptr, *cache = batch.ragged()
        attn.plan(batch.q_indptr, kv_indptr, **to_plan)
    else:
        attn, cache = make(variant, batch), (batch.k, batch.v)
        if style == "table":
            attn.plan(batch.q_indptr, block_table=batch.table, kv_lens=batch.kv_lens, **to_plan)
        else:
            attn.plan(*batch.pages(), **to_plan)
        if style == "one tensor":
            cache = torch.stack(cache, 1)
    cache = cache if isinstance(cache, torch.Tensor) else tuple(cache)
    q = torch.cat([batch.q, torch.full_like(batch.q[:1], torch.nan).expand(3, -1, -1)])
    out = torch.full((len(q), 8, 64), torch.nan)
    found = attn.run(q, cache, out=out, return_lse=variant.trace.weight is None, **to_run)
    attn.check()
    assert out[-3:].isnan().all(), "rows past the batch were written"
    judge(out[:-3], None if variant.trace.weight is not None else found[1][:-3], batch, variant, **bound)


@pytest.mark.parametrize("d,dv,dtype", [(128, 128, torch.bfloat16), (64, 24, torch.float16), (40, 64, torch.float32)])
@pytest.mark.parametrize("phase", ["decode", "mixed"])
def test_head_dims_and_dtypes(d, dv, dtype, phase):
    batch = batch_of(phase, d=d, dv=dv, dtype=dtype, heads=6, page_size=7)
    attn = make(variants.Causal(), batch)
    attn.plan(*batch.pages())
    judge(*run(attn, batch), batch, variants.Causal())


class Rows(ag.Variant):
    """Reads every position and every packed row; keys before ``start`` are not there."""

    start: ag.Tensor("requests", dtype=int)
    by_q: ag.Tensor("q_tokens")
    by_kv: ag.Tensor("kv_tokens")

    def rope(self):
        return ag.RoPE(10000.0, keys="rotate")

    def logits(self, s, at):
        return s + self.by_q[at.q_token] - self.by_kv[at.kv_token]

    def mask(self, at):
        return (at.kv <= at.q) & (at.kv >= self.start[at.request])


@pytest.mark.parametrize("phase", ["append", "mixed"])
def test_dropped_pages_and_given_positions(phase):
    """A cache whose first pages are gone is the whole one under a mask, whatever the positions."""
    batch = batch_of(phase, page_size=16, seed=3)
    dropped = [min(2, n // 16) for n in batch.kv_lens]  # pages
    start = batch.ints(dropped) * 16
    positions = [n + 40 - m for m, n in zip(batch.q_lens, batch.kv_lens)]
    table = torch.full_like(batch.table, -1)
    for r, first in enumerate(dropped):
        table[r, : table.shape[1] - first] = batch.table[r, first:]
        batch.k[batch.table[r, :first].long()] = torch.nan
        batch.v[batch.table[r, :first].long()] = torch.nan
    kept = batch.ints(batch.kv_lens) - start
    by_q = torch.randn(batch.dense_q.shape[:2])
    by_kv = torch.randn(batch.dense_k.shape[:2])
    attn = make(Rows(), batch)
    attn.plan(batch.q_indptr, block_table=table, kv_lens=kept, kv_start=start, q_positions=positions, start=start)
    out, lse = run(
        attn, batch, by_q=torch.cat([by_q[r, :n] for r, n in enumerate(batch.q_lens)]),
        by_kv=torch.cat([by_kv[r, first:n] for r, (first, n) in enumerate(zip(start.tolist(), batch.kv_lens))]),
    )  # fmt: skip
    attn.check()
    judge(out, lse, batch, Rows(), q_offset=positions, start=start, by_q=by_q.flatten(), by_kv=by_kv.flatten())


def test_a_page_of_negative_id_is_not_read():
    """Masked it does not matter; a row that attends to it is NaN."""
    batch = batch_of("mixed", page_size=16)
    batch.table[0, :40] = -1  # keys 0 ... 639 of 900
    batch.table[3, 2] = -7
    attn = make(variants.SlidingWindow(100), batch)
    attn.plan(batch.q_indptr, block_table=batch.table, kv_lens=batch.kv_lens)
    out, lse = run(attn, batch)
    attn.check()
    ref, ref_lse = batch.expected(variants.SlidingWindow(100))
    rows = slice(int(batch.q_indptr[3]), int(batch.q_indptr[4]))
    touched = torch.zeros(len(ref), dtype=torch.bool)
    touched[rows] = (torch.arange(200) >= 32) & (torch.arange(200) < 48 + 99)
    assert torch.equal(out.isnan().all(-1).all(-1), touched) and torch.equal(lse.isnan().all(-1), touched)
    torch.testing.assert_close(out[~touched].double(), ref[~touched], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[~touched].double(), ref_lse[~touched], rtol=1e-5, atol=1e-5)


def bad_page(batch):
    batch.kv_indices[batch.kv_indptr[1]] = 10**6


def decreasing_pages(batch):
    batch.kv_indptr[2] = batch.kv_indptr[1] - 1


def long_last_page(batch):
    batch.last[1] = batch.page_size + 1


def past_the_table(batch):
    batch.kv_indptr[2:] = len(batch.kv_indices) + 1


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize(
    "spoil,message",
    [(bad_page, "page 1000000: required below"), (decreasing_pages, r"kv_indptr\[2\] is .* less than"), (long_last_page, r"kv_last_page_len\[1\] is 17"),
     (past_the_table, "pages end at .* within the .* entries")],
)  # fmt: skip
def test_bad_keys_spoil_their_rows(spoil, message, phase):
    batch = batch_of(phase)
    good = batch.expected(variants.Causal())[0]
    spoil(batch)
    attn = make(variants.Causal(), batch)
    attn.plan(*batch.pages())
    out, lse = run(attn, batch)
    first, end = batch.q_indptr[1:3].tolist()
    assert out[first:end].isnan().all() and lse[first:end].isnan().all()
    torch.testing.assert_close(out[:first].double(), good[:first], rtol=1e-5, atol=1e-5)
    with pytest.raises(ag.ParameterError, match=f"request 1: .*{message}"):
        attn.check()
    attn.check()


def test_bad_queries_are_reported_and_nothing_past_the_capacity_is_written():
    batch = batch_of("append")
    attn = make(variants.Causal(), batch, max_q_tokens=12)
    for q_indptr, message in (([0, 4, 3, 9, 12], r"q_indptr\[2\] is 3, less"), ([0, 4, 5, 12, 15], r"q_indptr\[4\] is 15: required at most max_q_tokens=12")):
        attn.plan(q_indptr, *batch.pages()[1:])
        out = torch.full_like(batch.q, torch.nan)
        attn.run(batch.q, (batch.k, batch.v), out=out)
        assert out[:3].isfinite().all() and out[12:].isnan().all()
        with pytest.raises(ag.ParameterError, match=message):
            attn.check()


def test_empty_batches():
    batch = batch_of("mixed")
    attn = make(variants.Causal(), batch)
    attn.plan([0], [0], batch.kv_indices, [])
    out = torch.full_like(batch.q, torch.nan)
    attn.run(batch.q, (batch.k, batch.v), out=out)
    assert out.isnan().all()
    attn.plan([0, 0, 2], [0, 0, 0], torch.empty(0, dtype=torch.int32), [0, 0])  # two requests without keys
    out, lse = attn.run(batch.q[:2], (batch.k[:0], batch.v[:0]), return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()
    attn.check()


@pytest.mark.parametrize(
    "variant,dtype",
    [(variants.Causal(), torch.float32), (variants.StreamingLLM(), torch.float32),
     (ag.compose(variants.Sinks(), variants.Causal()), torch.bfloat16)],
    ids=["Causal", "StreamingLLM", "Sinks-bfloat16"],
)  # fmt: skip
def test_batch_invariance(variant, dtype):
    """A request's bits depend neither on the batch, nor on threads, nor on how its prompt was cut."""
    batch = Batch([1, 200, 5, 1], [3000, 700, 64, 1500], d=64, dtype=dtype, device="cpu")
    attn = make(variant, batch, batch_invariant=True)
    params = split_params(variant, example_params(variant, **batch.sizes()), "cpu")
    attn.plan(*batch.pages(), **params[0])
    whole = attn.run(batch.q, (batch.k, batch.v), **params[1])
    threads, start = torch.get_num_threads(), 0
    for r, n in enumerate(batch.q_lens):
        for first, count in ((0, n), (0, n // 3), (n // 3, 1), (n - 1, 1)):
            if count == 0:
                continue
            kv_len = batch.kv_lens[r] - n + first + count
            torch.set_num_threads(random.choice((1, 4)))
            attn.plan([0, count], block_table=batch.table[r : r + 1], kv_lens=[kv_len], **params[0])
            rows = slice(start + first, start + first + count)
            found = attn.run(batch.q[rows], (batch.k, batch.v), **params[1])
            torch.set_num_threads(threads)
            assert torch.equal(found, whole[rows]), (r, first, count)
        start += n


@pytest.mark.parametrize("variant", [ag.compose(variants.Sinks(), variants.Causal()), variants.Sigmoid()], ids=lambda v: v.name)
def test_partial_states_over_disjoint_pages_merge(variant):
    batch = batch_of("append", dtype=torch.bfloat16)
    params = example_params(variant, **batch.sizes())
    attn = make(variant, batch)
    lens, positions = batch.ints(batch.kv_lens), batch.ints(batch.kv_lens) - batch.q_indptr.diff()
    states = []
    for pages, first, end in ((batch.table, lens * 0, lens.clamp(max=48)), (batch.table[:, 3:], lens.clamp(max=48), lens)):
        attn.plan(batch.q_indptr, block_table=pages, kv_lens=end - first, kv_start=first, q_positions=positions)
        states.append(attn.run(batch.q, (batch.k, batch.v), partial=True, **params))
    attn.check()
    softmax = variant.trace.weight is None
    assert all(out.dtype == torch.float32 and (lse is None) != softmax for out, lse in states)
    found = ag.merge_states(
        [out for out, _ in states], [lse for _, lse in states] if softmax else None, variant=variant, q_indptr=batch.q_indptr,
        kv_lens=lens, **({"sinks": params["sinks"]} if softmax else {}),
    )  # fmt: skip
    out, lse = found if isinstance(found, tuple) else (found, None)
    judge(out.bfloat16(), lse, batch, variant, **params)
    attn.plan(batch.q_indptr, [0, 5, 4, 5, 6], [0] * 9, [1] * 4)
    assert attn.run(batch.q, (batch.k, batch.v), partial=True, **params)[0][4].isnan().all()


def test_scalars_in_tensors_are_read_at_each_run():
    batch = batch_of("mixed")
    variant = ag.compose(variants.SoftCap(), variants.SlidingWindow())
    attn = make(variant, batch)
    cap, window = torch.tensor(5.0), torch.tensor(50, dtype=torch.int32)
    attn.plan(*batch.pages(), window=window)
    for cap_value, window_value in ((5.0, 50), (9.0, 200)):
        cap.fill_(cap_value), window.fill_(window_value)
        judge(*run(attn, batch, cap=cap), batch, variant, cap=cap_value, window=window_value)


class Scaled(ag.Variant):
    def rope(self):
        return ag.RoPE(10000.0, scaling=ag.DynamicNTK(2.0, 256), keys="rotate")


def test_rope_tables_by_length():
    batch = batch_of("mixed")
    attn = make(Scaled(), batch)
    attn.plan(*batch.pages())
    judge(*run(attn, batch), batch, Scaled())


class Slopes(ag.Variant):
    slope: ag.Tensor("heads")

    def logits(self, s, at):
        return s + self.slope[at.head] * at.kv / at.kv_len + at.kv_head / at.num_kv_heads


def test_tensor_parallel_ranks():
    batch = batch_of("mixed", heads=6, kv_heads=3)
    slope = torch.randn(6)
    out = []
    for rank in range(3):
        attn = make(Slopes(), batch, num_heads=2, num_kv_heads=1, head_offset=2 * rank, total_heads=6)
        attn.plan(*batch.pages())
        heads = slice(2 * rank, 2 * rank + 2)
        out.append(attn.run(batch.q[:, heads], (batch.k[:, :, rank : rank + 1], batch.v[:, :, rank : rank + 1]), slope=slope))
    judge(torch.cat(out, 1), None, batch, Slopes(), slope=slope)


def test_errors_on_the_host():
    batch = batch_of("decode")
    attn = make(ag.compose(variants.SoftCap(), variants.SlidingWindow()), batch)
    cache = (batch.k, batch.v)
    with pytest.raises(ag.ParameterError, match="run before plan"):
        attn.run(batch.q, cache)
    with pytest.raises(ag.ParameterError, match="`cap`, which belongs to run"):
        attn.plan(*batch.pages(), cap=3.0)
    with pytest.raises(ag.ParameterError, match="no parameter `windows`"):
        attn.plan(*batch.pages(), windows=3)
    with pytest.raises(ag.ParameterError, match="request 1 .* position 1073741824: required below"):
        attn.plan(*batch.pages(), q_positions=[0, 2**30, 0, 0])
    attn.plan(*batch.pages(), window=64)
    with pytest.raises(ag.ParameterError, match="`window`, which belongs to plan"):
        attn.run(batch.q, cache, window=64)
    with pytest.raises(ag.ParameterError, match="q has 3 rows: required the 4 of the plan"):
        attn.run(batch.q[:3], cache)
    with pytest.raises(ag.ParameterError, match="q is torch.float64"):
        attn.run(batch.q.double(), cache)
    with pytest.raises(ag.ParameterError, match="contiguous last dimension"):
        attn.run(batch.q.transpose(1, 2).contiguous().transpose(1, 2), cache)
    ragged = make(variants.Causal(), batch, page_size=None, max_kv_tokens=8192)
    kv_indptr, k, v = batch.ragged()
    ragged.plan(batch.q_indptr, kv_indptr)
    with pytest.raises(ag.ParameterError, match="k and v have 5764 rows: required the 5765 of the plan"):
        ragged.run(batch.q, (k[:-1], v[:-1]))
    tokens = make(Rows(), batch)
    with pytest.raises(ag.ParameterError, match='by_q has 3 entries on axis "q_tokens": required the tokens of the batch, 4'):
        tokens.plan(*batch.pages(), start=batch.ints([0] * 4))
        tokens.run(batch.q, cache, by_q=torch.zeros(3), by_kv=torch.zeros(5765))
    with pytest.raises(ag.UnsupportedError, match="head_dim 60: the CPU kernels take multiples of 8"):
        make(variants.Causal(), batch, head_dim=60)
    with pytest.raises(ag.ParameterError, match="dtype is 'float32': required a torch.dtype, torch.float32"):
        make(variants.Causal(), batch, dtype="float32")
    with pytest.raises(ag.UnsupportedError, match="device meta"):
        make(variants.Causal(), batch, device="meta")


class Paired(ag.Variant):
    """Two tensors that share a free axis, one read by the mask."""

    a: ag.Tensor("n")
    b: ag.Tensor("n", dtype=bool)

    def logits(self, s, at):
        return s + self.a[at.kv % 4]

    def mask(self, at):
        return self.b[at.kv % 4]


def test_what_is_refused():
    batch = batch_of("decode")
    for given in (dict(head_offset=1, total_heads=16), dict(head_offset=12, total_heads=16), dict(head_offset=-4), dict(total_heads=4)):
        with pytest.raises(ag.ParameterError, match="required head_offset from 0"):
            make(variants.Causal(), batch, **given)
    for name in ("max_q_len", "head_dim_v", "max_kv_len"):
        with pytest.raises(ag.ParameterError, match=f"{name} 0: required at least 1"):
            make(variants.Causal(), batch, **{name: 0})
    with pytest.raises(ag.ParameterError, match="scale is nan"):
        make(variants.Causal(), batch, scale=float("nan"))
    attn, cache = make(variants.Causal(), batch), (batch.k, batch.v)
    with pytest.raises(ag.ParameterError, match="kv_lens is .*required ints of 32 bits"):
        attn.plan(None, block_table=batch.table, kv_lens=[700, 1, 64.5, 5000])
    attn.plan(*batch.pages())
    with pytest.raises(ag.ParameterError, match="one tensor with a dimension of 2 after the first"):
        attn.run(batch.q, torch.stack(cache))  # [2, pages, ...], as vLLM keeps it
    with pytest.raises(ag.ParameterError, match="resolve_neg"):
        attn.run(torch._neg_view(batch.q), cache)
    with pytest.raises(ag.ParameterError, match="out shares memory"):
        attn.run(batch.q, cache, out=batch.q)
    with pytest.raises(ag.ParameterError, match="kv_lens beside it"):
        attn.plan(None, block_table=batch.table)
    with pytest.raises(ag.ParameterError, match="run before plan"):  # a plan that failed leaves none
        attn.run(batch.q, cache)
    paired = make(Paired(), batch)
    paired.plan(*batch.pages(), b=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ag.ParameterError, match="'n' has"):
        paired.run(batch.q, cache, a=torch.zeros(3))
    with pytest.raises(ag.UnsupportedError, match="a requires grad"):
        paired.run(batch.q, cache, a=torch.zeros(4, requires_grad=True))
    a = torch._neg_view(torch.arange(4.0))
    assert torch.equal(paired.run(batch.q, cache, a=a), paired.run(batch.q, cache, a=-torch.arange(4.0)))


def test_q_indptr_that_begins_later():
    """Rows before the first request are nobody's, as those after the last."""
    batch = batch_of("decode")
    attn = make(variants.Causal(), batch)
    attn.plan(*batch.pages())
    wanted = attn.run(batch.q, (batch.k, batch.v))
    attn.plan(batch.q_indptr + 3, *batch.pages()[1:])
    q = torch.cat([torch.full_like(batch.q[:3], torch.nan), batch.q])
    out = torch.full(q.shape, 7.0, dtype=q.dtype)
    attn.run(q, (batch.k, batch.v), out=out)
    assert (out[:3] == 7.0).all() and torch.equal(out[3:], wanted)


def test_requests_past_max_kv_len():
    batch = batch_of("decode")
    attn = make(variants.Causal(), batch, max_kv_len=700)
    attn.plan(*batch.pages())
    out = attn.run(batch.q, (batch.k, batch.v))
    with pytest.raises(ag.ParameterError, match="request 3: 5000 keys: required at most max_kv_len=700"):
        attn.check()
    assert out[3].isnan().all() and out[:3].isfinite().all()


def test_bad_lists_raise_at_once():
    """Lengths as lists raise in plan, pages as lists in run; as tensors both are the device's to find, and check's to tell."""
    batch = batch_of("decode")
    attn, cache = make(variants.Causal(), batch, max_kv_len=6000), (batch.k, batch.v)
    names = ("q_indptr", "kv_indptr", "kv_indices", "kv_last_page_len")
    good = {name: x.tolist() for name, x in zip(names, batch.pages())}
    attn.plan(**good)
    wanted = attn.run(batch.q, cache)
    for name, at, value, match in (
        ("q_indptr", 2, 0, r"request 1: q_indptr\[2\] is 0, less"), ("kv_indptr", 2, 0, r"request 1: kv_indptr\[2\] is 0, less"),
        ("kv_last_page_len", 2, 17, r"request 2: kv_last_page_len\[2\] is 17: required 1 to page_size=16"),
        ("kv_indptr", 4, 500, "request 3: its pages end at 500: required within the 362 entries of kv_indices"),
        ("q_indptr", 4, 9999, r"request 3: q_indptr\[4\] is 9999: required at most max_q_tokens=4096"),
    ):  # fmt: skip
        bad = {**good, name: [*good[name][:at], value, *good[name][at + 1 :]]}
        with pytest.raises(ag.ParameterError, match=match):
            attn.plan(**bad)
        attn.plan(**{n: batch.ints(x) for n, x in bad.items()})
        with pytest.raises(ag.ParameterError, match=match):
            attn.check()
    for at, page, request in ((44, 9000, 1), (361, len(batch.k), 3)):
        bad = {**good, "kv_indices": [*good["kv_indices"][:at], page, *good["kv_indices"][at + 1 :]]}
        attn.plan(**bad)
        with pytest.raises(ag.ParameterError, match=f"request {request}: page {page} .*required below the {len(batch.k)} pages"):
            attn.run(batch.q, cache)
        attn.plan(**{n: batch.ints(x) for n, x in bad.items()})
        attn.run(batch.q, cache)
        with pytest.raises(ag.ParameterError, match=f"request {request}: page {page}: required below"):
            attn.check()
    table = batch.table.clone()
    table[1, 1] = 9000  # past its one key: never read
    table[3, 5] = -3  # nobody's, or NaN
    attn.plan(None, block_table=table.tolist(), kv_lens=batch.kv_lens)
    out = attn.run(batch.q, cache)
    assert torch.equal(out[:3], wanted[:3]) and out[3].isnan().all()
    table[2, 3] = 9000
    attn.plan(None, block_table=table.tolist(), kv_lens=batch.kv_lens)
    with pytest.raises(ag.ParameterError, match="request 2: page 9000"):
        attn.run(batch.q, cache)
    with pytest.raises(ag.ParameterError, match=r"request 1: kv_lens\[1\] is -1: required 0 or more"):
        attn.plan(None, block_table=table, kv_lens=[700, -1, 64, 5000])
    with pytest.raises(ag.ParameterError, match="request 0: its keys end at 5009: required within the 313 pages of 16 keys"):
        attn.plan(None, block_table=table, kv_lens=[5009, 1, 64, 5000])


def test_one_row_of_pages_for_all_requests():
    """An expanded page table is a table; kv_token counts each request's keys."""
    batch = batch_of("decode")
    attn = make(Rows(), batch)
    row = batch.table[3:]
    params = dict(by_q=torch.randn(4), by_kv=torch.randn(4 * 90))
    outs = []
    for table in (row.expand(4, -1), row.repeat(4, 1)):
        attn.plan(None, block_table=table, kv_lens=[90, 17, 60, 90], start=batch.ints([0] * 4))
        outs.append(attn.run(batch.q, (batch.k, batch.v), **params))
    assert torch.equal(*outs)


def test_the_default_device_is_the_cpu_where_no_gpu_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    batch = batch_of("decode")
    attn = make(variants.Causal(), batch, device=None)
    assert attn.device == torch.device("cpu") and attn.workspace_bytes == 0
    with pytest.raises(ag.UnsupportedError, match='no CUDA device here: leave out device=, or give device="cpu"'):
        make(variants.Causal(), batch, device="cuda")
