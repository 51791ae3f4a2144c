"""The Hopper kernel without a GPU: its text runs on the CPU (on_host_hopper.py), planned by the device's planner, against the
float64 oracle; ptxas reports what its configurations promise."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import zip_longest
from pathlib import Path
from typing import Any

import hopper_on_host
import pytest
import test_sparse
import torch
from batches import Batch, judge, make, planned, split_params
from compare import compare
from grid import VARIANTS
from test_attention_gpu import Sunk
from toolchain import NVCC, needs_nvcc

import attngen as ag
from attngen import engine, variants
from attngen.boxes import Boxes
from attngen.choose_cuda import ARCHS, cuda_flags
from attngen.choose_hopper import choose_hopper
from attngen.emit import emit
from attngen.errors import ParameterError, UnsupportedError
from attngen.spec import Problem
from attngen.variants import example_params

BF16, F16 = torch.bfloat16, torch.float16
STORED = {"f32": "float32", "i32": "int32", "bool": "bool"}


@pytest.fixture(autouse=True)
def on_host(monkeypatch, request):
    if "ptxas" not in request.node.name:
        hopper_on_host.install(monkeypatch)


def check(variant: ag.Variant, q_lens, kv_lens, ragged: bool = False, **more) -> None:
    """A batch against the oracle, with surplus rows of q, which stay as they are, and NaN in every slot that is not read."""
    batch = Batch(q_lens, kv_lens, device="cpu", **more)
    params = example_params(variant, **batch.sizes())
    plan, run = split_params(variant, params, "cpu", batch)
    softmax = variant.trace.weight is None
    q = torch.cat([batch.q, torch.full((3, *batch.q.shape[1:]), torch.nan, dtype=batch.q.dtype)])
    out = torch.full((len(q), batch.dense_q.shape[2], batch.dense_v.shape[3]), torch.nan, dtype=q.dtype)
    attn, k, v = planned(variant, batch, plan, ragged)
    found = attn.run(q, (k, v), out=out, return_lse=softmax, **run)
    attn.check()
    n = len(batch.q)
    assert torch.isnan(out[n:]).all()
    judge(out[:n], found[1][:n] if softmax else None, batch, variant, **params)


SERVED = [name for name in VARIANTS if name != "StreamingLLM"]  # whose keys ask for one of two rotations: attention_sm80


@pytest.mark.parametrize("name", SERVED)
def test_variants(name):
    check(VARIANTS[name], [1, 64, 0, 130, 3, 1], [300, 64, 40, 200, 0, 17], d=64)


@pytest.mark.parametrize("d, dv, dtype", [(32, 32, F16), (64, 128, BF16), (96, 96, BF16), (128, 128, F16), (192, 128, BF16), (256, 256, BF16)])
def test_head_dims(d, dv, dtype):
    check(variants.Causal(), [70, 3, 129], [200, 90, 129], d=d, dv=dv, dtype=dtype)


@pytest.mark.parametrize("name", ["Causal", "SlidingWindow", "Document", "ALiBi", "Gemma2", "Sigmoid"])
@pytest.mark.parametrize("d", [64, 96, 128])
def test_tiles_of_64_rows(name, d, monkeypatch):
    """The class below the largest: one group a block, two blocks an SM."""
    monkeypatch.setattr(hopper_on_host, "CLASS", -2)
    check(VARIANTS[name], [1, 64, 0, 130, 3, 1], [300, 64, 40, 200, 0, 17], d=d)


class HeadChunks(ag.Variant):
    """Chunks as long as a head decides, and an abs that wraps: C's operators in the texts of a row's values."""

    least: ag.Scalar[int] = -(2**31)

    def mask(self, at):
        return (at.kv // (at.head | 16) <= at.q // (at.head | 16)) & (ag.abs(self.least) <= at.kv)


def test_operators_in_what_a_row_knows():
    check(HeadChunks(), [70, 3], [200, 90], d=64)


class Distances(ag.Variant):
    """Distances in every form that scores read them in; nothing is masked."""

    slope: ag.Scalar[float] = 0.125

    def logits(self, s, at):
        return s - self.slope * ag.abs(at.q - at.kv) + 0.01 * ag.cast(at.kv - at.q, float) - 0.02 * ag.abs(at.kv - at.q)


@pytest.mark.parametrize("variant", [ag.compose(variants.ALiBi(), variants.Causal()), Distances(), ag.compose(variants.Retention(), variants.Causal())], ids=lambda v: v.name)
@pytest.mark.parametrize("first", [0, 2**29 + 1])
def test_distances(variant, first):
    """They are exact however far out both positions are: floats there are 32 apart."""
    q_lens, kv_lens = [70, 3], [200, 129]
    batch = Batch(q_lens, kv_lens, device="cpu", d=64)
    params = example_params(variant, **batch.sizes())
    attn = make(variant, batch)
    lens = batch.ints(kv_lens)
    attn.plan(batch.q_indptr, block_table=batch.table, kv_lens=lens, kv_start=batch.ints([first] * 2), q_positions=first + lens - batch.ints(q_lens))
    out = torch.full_like(batch.q, torch.nan)
    attn.run(batch.q, (batch.k, batch.v), out=out, **params)
    attn.check()
    judge(out, None, batch, variant, **params)


class ChunkDistances(ag.Variant):
    """Causal by chunks: later keys of a chunk are seen, and their distance is none."""

    place: ag.Tensor("kv_tokens")

    def mask(self, at):
        return at.kv // 64 <= at.q // 64

    def logits(self, s, at):
        return s - 0.05 * ag.max(at.q - at.kv, 0) - 0.02 * ag.abs(at.kv - at.q) + ag.min(1.0 / ag.cast(at.kv - at.q, float), 4.0) + self.place[at.kv_token]


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_distances_under_masks_that_keep_later_keys(device, monkeypatch):
    """On both backends: the distance stays none where it is clamped, positive where it is absolute, and 1 / 0 keeps its sign."""
    if device == "cpu":
        monkeypatch.undo()
    check(ChunkDistances(), [70, 128], [200, 128], d=64)


class Times(ag.Variant):
    """Scores of either sign, or none, by a factor of the call; the largest lie anywhere."""

    factor: ag.Scalar[float]

    def logits(self, s, at):
        return self.factor * ag.tanh(0.3 * s + 0.1 * ag.cast(at.kv % 7, float))

    def mask(self, at):
        return at.kv <= at.q


@pytest.mark.parametrize("factor", [40.0, -40.0, 0.0, 1e-30, 1e9, -1e9])
def test_factors_of_logits(factor):
    """They are part of what weights are two to the power of."""
    batch = Batch([70, 3, 1], [200, 90, 300], device="cpu", d=64)
    attn = make(Times(), batch)
    attn.plan(*batch.pages())
    out, lse = attn.run(batch.q, (batch.k, batch.v), factor=factor, return_lse=True)
    attn.check()
    if abs(factor) < 1e6:
        judge(out, lse, batch, Times(), factor=factor)
    else:  # nothing but the likeliest counts, which a tanh of the hardware's may confuse with others
        _, expected = batch.expected(Times(), factor=factor)
        compare(lse / abs(factor), expected / abs(factor), like=expected.float() / abs(factor) + 2e-3)


@pytest.mark.parametrize("d, dv", [(96, 64), (128, 96)])
def test_panels_of_two_widths(d, dv):
    """A warp's output then lies where other warps' queries are: several units, so that warps are apart."""
    check(variants.Causal(), [2, 0, 1, 70, 0, 63, 65, 64, 130], [900, 128, 7, 0, 900, 0, 129, 127, 16], heads=6, ragged=True, d=d, dv=dv)


@pytest.mark.parametrize("page_size, layout", [(8, "NHD"), (24, "HND"), (64, "NHD"), (256, "HND")])
def test_pages(page_size, layout):
    check(variants.Causal(), [70, 3], [200, 90], page_size=page_size, layout=layout, d=64)


@pytest.mark.parametrize("page_size, layout, d", [(1, "NHD", 64), (5, "HND", 128), (12, "NHD", 96), (3, "NHD", 256)])
def test_gather(page_size, layout, d):
    """Pages that no box of the copy engine fits: rows come by cp.async."""
    check(variants.Causal(), [70, 3, 0], [200, 90, 7], page_size=page_size, layout=layout, d=d)


@pytest.mark.parametrize("name", ["Document", "Gemma2", "ALiBi"])
def test_gather_beside_hooks(name):
    check(VARIANTS[name], [1, 64, 0, 130, 3, 1], [300, 64, 40, 200, 0, 17], page_size=4, d=64)


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2), (10, 2), (64, 1), (71, 1)])
def test_groups(heads, kv_heads):
    """64 rows in boxes of the copy engine, or by cp.async where the group does not divide them."""
    check(variants.Causal(), [70, 3], [200, 90], heads=heads, kv_heads=kv_heads, d=64)


@pytest.mark.parametrize("q_lens, kv_lens", [
    ([3, 2], [3000, 2100]), ([70, 20], [17, 0]), ([1, 63, 64, 65], [1, 63, 64, 65]), ([127, 128, 129], [129, 128, 127]), ([0, 0, 5], [5, 0, 1000]),
    ([70] * 6, [7, 100, 30, 129, 5, 1]),
])  # fmt: skip
def test_lengths(q_lens, kv_lens):
    """The first are cut into pieces, which the last of a tile merges."""
    check(variants.Causal(), q_lens, kv_lens, d=64, ragged=len(q_lens) == 3)


def test_pieces_of_every_kind():
    for variant in (Sunk(), variants.Sigmoid()):
        check(variant, [3, 2], [2000, 1100], d=64)


@pytest.mark.parametrize("layout, per_head, masked", [("NHD", False, False), ("HND", False, True), ("NHD", True, False), ("HND", True, False)])
def test_blocks(layout, per_head, masked):
    """Rows of blocks as requests, and pages that overlap where heads differ."""
    test_sparse.check_on_hopper(layout, per_head, masked)


def test_negative_scale():
    q, k, v = (torch.randn(2, n, 4, 64).bfloat16() for n in (70, 90, 90))
    out = ag.attention(q, k, v, variants.Causal(), scale=-0.2)
    ref = ag.reference(q, k, v, variants.Causal(), scale=-0.2)
    compare(out, ref, like=ref.bfloat16() + 2e-3)


def test_rope_on_queries():
    variant = ag.compose(variants.Causal(), RotatedQueries())
    check(variant, [70, 3], [200, 90], d=64)


class RotatedQueries(ag.Variant):
    """Keys come rotated from the cache."""

    rope = ag.RoPE(10_000.0)


def turned(**more) -> ag.Variant:
    """Causal over keys that the kernel rotates."""
    return ag.compose(variants.Causal(), type("Turned", (ag.Variant,), {"rope": ag.RoPE(10_000.0, keys="rotate", **more)})())


FAR = dict(q_position=lambda at: at.q + 99_000, kv_position=lambda at: at.kv + 99_000)


@pytest.mark.parametrize("more, d, page_size", [
    ({}, 128, 16), ({"interleaved": True}, 64, None), ({"rotary_dim": 32}, 64, 5), ({"rotary_dim": 64, "interleaved": True}, 96, 16), ({}, 96, 1),
    ({"scaling": ag.YaRN(4.0, 64)}, 64, None), (FAR, 64, 16), ({"scaling": ag.DynamicNTK(2.0, 64)}, 64, 16),
])  # fmt: skip
def test_keys_that_the_kernel_rotates(more, d, page_size):
    """Halves and neighbours, all elements and some, a factor, far positions, a table a request; with either kind of copies."""
    check(turned(**more), [70, 3, 0, 1], [200, 90, 5, 300], ragged=page_size is None, page_size=page_size or 16, d=d, dtype=F16)


def test_rotated_keys_beside_hooks():
    check(ag.compose(variants.SoftCap(), variants.SlidingWindow(50), turned()), [70, 3], [200, 90], d=64, dtype=F16)
    check(ag.compose(variants.Document(), turned()), [70, 3], [200, 90], d=64, dtype=F16, heads=4)
    q, k, v = (torch.randn(2, n, 4, 64).bfloat16() for n in (70, 90, 90))
    ref = ag.reference(q, k, v, turned(), scale=-0.2)
    compare(ag.attention(q, k, v, turned(), scale=-0.2), ref, like=ref.bfloat16() + 2e-3)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (5, 1)])
def test_dense_calls(layout, heads, kv_heads):
    def tensor(n, h):
        x = torch.full((3, n + 3, h + 2, 72), torch.nan, dtype=BF16)[:, 2 : 2 + n, 1 : 1 + h, :64]
        x.copy_(torch.randn(x.shape))
        return x if layout == "bshd" else x.transpose(1, 2)

    q, k, v = tensor(70, heads), tensor(150, kv_heads), tensor(150, kv_heads)
    given = dict(layout=layout, q_lens=[70, 0, 20], kv_lens=[150, 9, 77], return_lse=True)
    out, lse = ag.attention(q, k, v, variants.Causal(), **given)
    ref, ref_lse = ag.reference(q, k, v, variants.Causal(), **given)
    compare(out, ref, like=ref.to(BF16) + 2e-3)
    compare(lse, ref_lse, dtype=F16)
    one = k[:1].expand(3, *k.shape[1:])  # a stride of 0
    out = ag.attention(q, one, one, variants.Causal(), layout=layout)
    ref = ag.reference(q, one, one, variants.Causal(), layout=layout)
    compare(out, ref, like=ref.to(BF16) + 2e-3)


def test_raw_states():
    batch = Batch([70, 3], [200, 900], d=64, device="cpu")
    attn = make(Sunk(), batch)
    attn.plan(*batch.pages())
    sinks = torch.randn(8)
    out, lse = attn.run(batch.q, (batch.k, batch.v), partial=True, sinks=sinks)
    assert out.dtype == torch.float32
    ref, ref_lse = batch.expected(variants.Causal())
    compare(out, ref, dtype=BF16)
    compare(lse * 0.6931471805599453, ref_lse, dtype=F16)


@pytest.mark.parametrize("page_size", [16, 4])
def test_pages_that_are_not_there(page_size):
    """Rows that attend to a negative page are NaN, others are not; a page past the cache is reported too."""
    batch = Batch([70, 70], [200, 200], page_size=page_size, d=64, device="cpu")
    window = variants.SlidingWindow(64)
    for page, bad in ((-1, False), (len(batch.k), True)):
        indices = batch.kv_indices.clone()
        first = -(-200 // page_size) + 16 // page_size
        indices[first : first + 16 // page_size] = page  # slots 16 ... 31 of the second request
        attn = make(window, batch)
        attn.plan(batch.q_indptr, batch.kv_indptr, indices, batch.last, window=64)
        out = attn.run(batch.q, (batch.k, batch.v))
        ref, _ = batch.expected(window, window=64)
        compare(out[:70], ref[:70], like=ref[:70].to(BF16) + 2e-3)
        compare(out[70:], ref[70:], like=ref[70:].to(BF16) + 2e-3)  # positions 130 ... see 67 ... alone
        attn.plan(batch.q_indptr, batch.kv_indptr, indices, batch.last, window=150)
        out = attn.run(batch.q, (batch.k, batch.v))
        seen = torch.arange(130, 200) - 150 < 31  # rows whose window reaches the page
        assert torch.isnan(out[70:][seen]).all() and not torch.isnan(out[70:][~seen]).any() and not torch.isnan(out[:70]).any()
        if bad:
            with pytest.raises(ag.AttngenError, match="request 1"):
                attn.check()
        else:
            attn.check()


def test_fewer_rows_than_planned_spoil_their_request_alone():
    batch = Batch([70, 70], [200, 200], d=64, device="cpu")
    attn = make(variants.Causal(), batch)
    attn.plan(*batch.pages())
    whole = attn.run(batch.q, (batch.k, batch.v))
    attn._planned = (attn._planned[0], attn._planned[1], 0)  # as where the lengths are on the device alone
    out = torch.full((100, 8, 64), torch.nan, dtype=BF16)
    attn.run(batch.q[:100], (batch.k, batch.v), out=out)
    assert torch.equal(out[:70], whole[:70]) and torch.isnan(out[70:]).all()
    with pytest.raises(ag.AttngenError, match="request 1"):
        attn.check()


def test_a_mask_that_has_grown_since_the_plan():
    """A window on the device: more pieces than were planned are nobody's, so the last planned takes them."""
    variant = variants.Causal() & variants.SlidingWindow(1)
    batch = Batch([3], [3000], d=64, heads=2, kv_heads=1, device="cpu")
    window = torch.tensor(1500, dtype=torch.int32)
    attn = make(variant, batch)
    attn.plan(*batch.pages(), window=window)
    for now in (1500, 2900, 700, 1500):
        window.fill_(now)
        out = attn.run(batch.q, (batch.k, batch.v))
        ref, _ = batch.expected(variant, window=now)
        compare(out, ref, like=ref.to(BF16) + 2e-3)


@pytest.mark.parametrize("dtype, size", [(F16, 1e4), (BF16, 3e4), (F16, 3e4)])
@pytest.mark.parametrize("constant", [True, False])
def test_large_scores(dtype, size, constant):
    """Base-2 scores whose rounding is larger than a weight can be."""
    q, k = (torch.full((1, n, 2, 64), size) if constant else size * torch.randn(1, n, 2, 64) for n in (70, 200))
    q, k = q.clamp(-6e4, 6e4).to(dtype), k.clamp(-6e4, 6e4).to(dtype)
    v = torch.randn(1, 200, 2, 64).to(dtype)
    out = ag.attention(q, k, v, variants.Causal())
    assert out.isfinite().all()
    if constant:
        compare(out, ag.reference(q, k, v, variants.Causal()), like=ag.reference(q, k, v, variants.Causal()).to(dtype) + 2e-3)


@pytest.mark.parametrize("page_size", [16, 5])
def test_a_cache_without_pages(page_size):
    batch = Batch([70], [200], page_size=page_size, d=64, device="cpu")
    attn = make(variants.Causal(), batch)
    attn.plan(*batch.pages())
    assert torch.isnan(attn.run(batch.q, (batch.k[:0].clone(), batch.v[:0].clone()))).all()
    with pytest.raises(ag.AttngenError, match="request 0"):
        attn.check()


def test_the_same_bits_again():
    batch = Batch([200, 3, 1], [900, 2000, 700], d=64, device="cpu")
    attn = make(variants.Causal(), batch)
    attn.plan(*batch.pages())
    first = attn.run(batch.q, (batch.k, batch.v))
    assert torch.equal(attn.run(batch.q, (batch.k, batch.v)), first)  # counters and queue are left as they were


def test_surplus_rows_have_no_say():
    """What lies past a request's last row in its tile changes no bit of the rows before: neither large scores nor NaN."""
    batch = Batch([70], [400], d=64, device="cpu")
    attn = make(variants.Causal(), batch)
    outs = []
    for surplus in (0.0, 3e4, torch.nan):
        attn.plan(*batch.pages())
        q = torch.cat([batch.q, torch.full((30, *batch.q.shape[1:]), surplus, dtype=batch.q.dtype)])
        outs.append(attn.run(q, (batch.k, batch.v))[:70])
    assert torch.equal(outs[1], outs[0]) and torch.equal(outs[2], outs[0])


@pytest.mark.parametrize("variant", [variants.Causal(), ag.compose(variants.SoftCap(1e8), variants.Causal())])
def test_batch_invariance(variant, monkeypatch):
    """With pieces of a fixed length: same bits alone, beside another request, and in chunks, where some rows' scores are so large
    that they are rounded."""
    pieces = lambda trace, problem, hooks, *, page_size, **_: {"prefill": choose_hopper(problem, problem.isa, hooks, page_size, split=128)}
    monkeypatch.setattr(engine, "choices_of", pieces)
    batch = Batch([70, 40], [200, 90], d=64, device="cpu")
    batch.q[[45, 52]] *= 1e8  # a warp has the rows of four tokens: its other three are others in a chunk
    batch.q[70:] *= 1e8
    attn = make(variant, batch, batch_invariant=True, max_kv_len=1024)

    def run(q, plan):
        attn.plan(*plan)
        return torch.cat([x.flatten(1).float() for x in attn.run(q, (batch.k, batch.v), return_lse=True)], 1)

    whole = run(batch.q, batch.pages())
    pages = -(-200 // 16)
    alone = batch.q_indptr[:2], batch.kv_indptr[:2], batch.kv_indices[:pages], batch.last[:1]
    assert torch.equal(run(batch.q[:70], alone), whole[:70])
    for q, kv_len, rows in ((batch.q[:50], 180, whole[:50]), (batch.q[50:70], 200, whole[50:70]), (batch.q[46:70], 200, whole[46:70])):
        count = -(-kv_len // 16)
        plan = batch.ints([0, len(q)]), batch.ints([0, count]), batch.kv_indices[:count], batch.ints([kv_len - 16 * (count - 1)])
        assert torch.equal(run(q, plan), rows)


# ---------------------------------------------------------------- what is chosen


def problem(d=128, dv=None, arch="90a", dtype="bfloat16", storage=()) -> Problem:
    return Problem("cuda", arch, dtype, dtype, dtype, d, dv or d, storage)


def test_what_it_does_not_serve():
    causal = emit(variants.Causal().trace, {}, 128, "cuda")
    rotating, few = (emit(turned(rotary_dim=n).trace, {}, 128, "cuda") for n in (None, 24))
    for p, hooks, rows, why in (
        (problem(arch="80"), causal, 0, "wgmma"), (problem(80), causal, 0, "multiple of 32"), (problem(256), causal, 64, "above 128"),
        (problem(), emit(variants.StreamingLLM().trace, {}, 128, "cuda"), 0, "several ways"), (problem(128, 192), rotating, 0, "above 128"),
        (problem(), few, 0, "24 elements"), (problem(), rotating, 64, "64 rows"),
    ):  # fmt: skip
        with pytest.raises(UnsupportedError, match=why):
            choose_hopper(p, p.isa, hooks, 16, most_rows=rows)


@pytest.mark.parametrize("d, dv", [(d, dv) for d in (32, 64, 96, 128, 160, 192, 224, 256) for dv in {d, 128}])
def test_configurations_fit(d, dv):
    gpu = ARCHS["90a"]
    for variant in (variants.Causal(), ag.Variant(), variants.Gemma2(), *([turned()] if max(d, dv) <= 128 else ())):
        for rows in (64, 0) if max(d, dv) <= 128 and not variant.trace.rope else (0,):
            choice = choose_hopper(problem(d, dv), "90a", emit(variant.trace, {}, d, "cuda"), most_rows=rows)
            config = choice.config
            assert config.smem_bytes <= gpu.smem_per_block and config.blocks_per_sm * (config.smem_bytes + 1024) <= gpu.smem_per_sm
            registers = config.feeding_registers + config.groups * config.computing_registers + config.rotating_registers
            assert 128 * registers * config.blocks_per_sm <= 65536
            assert sum(not c.lost for c in choice.candidates) == 1 and (config.groups == 1) == (rows == 64)


def test_repeated_tokens_are_refused():
    config = choose_hopper(problem(64), "90a", emit(variants.Causal().trace, {}, 64, "cuda")).config
    values = dict(page_size=1, num_pages=9, num_heads=2, num_kv_heads=2, q_rows=3, k_stride_s=0, k_stride_h=64, v_stride_s=128, v_stride_h=64,
                  q_stride_t=128, q_stride_h=64)  # fmt: skip
    with pytest.raises(ParameterError, match="contiguous"):
        Boxes(config, problem(64), values)


# ---------------------------------------------------------------- what is compiled


COMPILED = {
    "causal-128": (variants.Causal(), 128, 128, 16), "full-128": (ag.Variant(), 128, 128, None), "causal-64": (variants.Causal(), 64, 64, None),
    "causal-256": (variants.Causal(), 256, 256, 16), "full-192": (ag.Variant(), 192, 128, None),
    "soft cap-128": (ag.compose(variants.SoftCap(), variants.Causal()), 128, 128, None), "sigmoid-128": (variants.Sigmoid(), 128, 128, None),
    "gather-128": (variants.Causal(), 128, 128, 5), "gather-256": (variants.Causal(), 256, 256, 5), "rotated-64": (turned(), 64, 64, None),
    "rotated-128": (turned(), 128, 128, 16), "rotated gather-128": (turned(), 128, 128, 5),
}  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("name", ["Causal", "CustomMask", "SoftCap"])
def test_ptxas_fits_two_blocks_of_64_rows(name, tmp_path: Path):
    """The registers that setmaxnreg deals out are those of a launch, twice on an SM."""
    config, files = rendered(VARIANTS[name], 128, 128, None, most_rows=64)
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    command = [*NVCC, *cuda_flags("90a"), "attention_sm90.cu", "-o", "kernel.cubin", "-cubin"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0 and "C75" not in report and "warning" not in report, report
    assert "Used 128 registers" in report and config.blocks_per_sm == 2 and config.threads == 256


CUOBJDUMP = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=Path(NVCC[0]).parent if NVCC else None)


@needs_nvcc
@pytest.mark.parametrize("name", COMPILED)
def test_ptxas_keeps_products_in_flight(name, tmp_path: Path):
    """As many products as the configuration asks for, none serialised, nothing spilled where two groups compute."""
    variant, d, dv, page_size = COMPILED[name]
    config, files = rendered(variant, d, dv, page_size)
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    command = [*NVCC, *cuda_flags("90a"), "attention_sm90.cu", "-o"]
    done = subprocess.run([*command, "kernel.cubin", "-cubin"], cwd=tmp_path, capture_output=True, text=True)
    report = done.stdout + done.stderr
    assert done.returncode == 0 and "C75" not in report and "warning" not in report, report
    plain = not config.gather and not config.rotating_registers
    if config.groups == 2 and plain:
        assert re.search(r"\b0 bytes spill stores, 0 bytes spill loads", report), report
    done = subprocess.run([*command, "kernel.ptx", "-ptx"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ptx = (tmp_path / "kernel.ptx").read_text()
    # Scores: a unit's first block, in a second place too where the unit before has it begin, and the loop. Values: the loop, the last.
    scores, values, firsts = d // 16, config.block_n // 16, config.q_buffers
    assert ptx.count("wgmma.mma_async.sync.aligned") == (firsts + 1) * scores + 2 * values
    assert ptx.count("wgmma.fence") == firsts + 3 and ptx.count("setmaxnreg") == (3 if config.rotating_registers else 2)
    if CUOBJDUMP:
        sass = subprocess.run([CUOBJDUMP, "-sass", "kernel.cubin"], cwd=tmp_path, capture_output=True, text=True).stdout
        computing = sass.split("USETMAXREG.TRY_ALLOC")[1].split("USETMAXREG.DEALLOC")[0]
        assert computing.count("HGMMA") == sass.count("HGMMA") and (config.groups == 3 or not re.search(r"\b(STL|LDL)\b", computing))
        assert writes_in_flight(sass) == []


# Instructions whose first register is read, or that name none they write.
WRITES_NONE = ("ST", "RED", "BAR", "BRA", "BRX", "RET", "CALL", "EXIT", "WARPSYNC", "NANOSLEEP", "ISETP", "FSETP", "FCHK", "R2P", "R2UR", "UTMA")


def target(operation: str, operands: str) -> set[int]:
    """Numbers of the registers that an instruction writes."""
    found = re.match(r"(?:!?U?P(?:\d|T), )*R(\d+)\b", operands)
    if not found or operation.startswith(WRITES_NONE):
        return set()
    wide = 4 if re.search(r"\.128|M88\.4", operation) else 2 if re.search(r"\.64|WIDE|M88\.2|CS2R(?!\.32)", operation) else 1
    return set(range(int(found[1]), int(found[1]) + wide))


def writes_in_flight(sass: str) -> list[str]:
    """Instructions that write registers which a product in flight reads as its left operand, or touch those that it accumulates in:
    ptxas does not always keep others out of them. Follows all branches and calls; a product is in flight until a wait for its group."""
    code = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", sass)]
    assert sum("HGMMA" in text for _, text in code) > 0
    at = {address: i for i, (address, _) in enumerate(code)}
    found: dict[str, None] = {}
    # A group is a set of (register, accumulator's first register; -1 for a left operand).
    before: dict[int, tuple[frozenset, ...]] = {}  # groups, newest first; the first is open
    todo: list[tuple[int, tuple[frozenset, ...]]] = [(0, (frozenset(),))]
    while todo:
        i, groups = todo.pop()
        while i < len(code):
            known = before.get(i, ())
            groups = tuple(a | b for a, b in zip_longest(groups, known, fillvalue=frozenset()))
            if groups == known:
                break
            before[i] = groups
            address, text = code[i]
            bare = re.sub(r"^@!?U?P[\dT]+ ", "", text).replace(".reuse", "")
            operation, _, operands = bare.partition(" ")
            flight = frozenset().union(*groups)
            left = {r for r, first in flight if first < 0}
            if operation.startswith("HGMMA"):
                product = re.match(r"HGMMA\.64x(\d+)x16\S* R(\d+), (?:R(\d+), )?gdesc", bare)
                assert product, text
                first = int(product[2])
                out = set(range(first, first + int(product[1]) // 2))
                rows = set(range(int(product[3]), int(product[3]) + 4)) if product[3] else set()
                others = {r for r, other in flight if other >= 0 and other != first}  # products of one accumulator wait for each other
                clash = out & (left | others) or rows & {r for r, other in flight if other >= 0}
                groups = (groups[0] | {(r, first) for r in out} | {(r, -1) for r in rows}, *groups[1:])
                if "gsb0" in bare:
                    groups = (frozenset(), *groups[:2], frozenset().union(*groups[2:]))
            else:
                named = {int(r) for r in re.findall(r"(?<![U\w])R(\d+)\b", operands)}
                written = target(operation, operands)
                clash = written & left or (written | named) & {r for r, first in flight if first >= 0}
                if wait := re.match(r"WARPGROUP.DEPBAR.LE gsb0, 0x(\d)", bare):
                    groups = groups[: 1 + int(wait[1])]
            if clash:
                found[f"{address:05x} {text}"] = None
            if branch := re.search(r"^(?:BRA|CALL)\S*(?: \S+,)? 0x([0-9a-f]+)", bare):
                todo.append((at[int(branch[1], 16)], groups))
                if bare == text and bare.startswith("BRA") and not bare.startswith("BRA.DIV"):
                    break
            if operation.startswith(("EXIT", "RET")) and bare == text:
                break
            i += 1
    left_out = [text for i, (_, text) in enumerate(code) if i not in before and text != "NOP"]
    assert len(left_out) <= 1, left_out  # the trap at the end
    return list(found)


PRODUCT, WAIT = "HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4].tnspB, R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def listing(*code: str) -> str:
    """As cuobjdump prints it."""
    return "".join(f"        /*{16 * i:04x}*/  {line} ;  /* 0x0 */\n" for i, line in enumerate(code))


def test_writes_in_flight_are_seen():
    code = ["MOV R9, R1", PRODUCT, "MOV R12, R1", "@P0 BRA 0x0060", WAIT, "MOV R9, R1", "@P1 BRA 0x0000", "EXIT"]
    assert writes_in_flight(listing(*code)) == ["00000 MOV R9, R1"]  # by way of the branches past the wait
    assert writes_in_flight(listing(*code).replace("@P0 BRA 0x0060", "NOP")) == []


@pytest.mark.parametrize("line, seen", [
    ("SHFL.BFLY PT, R8, R1, 0x1, 0x1f", True), ("SYNCS.ARRIVE.TRANS64 R9, [R2+URZ], RZ", True), ("SYNCS.ARRIVE.TRANS64 RZ, [R9+URZ], RZ", False),
    ("LDS.128 R7, [R1]", True), ("LDS.64 R7, [R1]", True), ("LDS R7, [R1]", False), ("ISETP.GE.AND P0, PT, R9, R1, PT", False),
    ("FADD R1, R24, R2", True), ("STS [R1], R55", True), ("STS [R1], R56", False), ("FMUL R30, R1, R2", True), ("BAR.SYNC R9, R10", False),
    ("HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4], R24, gsb0", False), ("HGMMA.64x64x16.F32.BF16 R40, R8, gdesc[UR4], R40, gsb0", True),
    ("HGMMA.64x16x16.F32.BF16 R8, gdesc[UR4], R8, gsb0", True), ("HGMMA.64x16x16.F32.BF16 R64, R24, gdesc[UR4], R64, gsb0", True),
])  # fmt: skip
def test_what_touches_a_product_in_flight(line, seen):
    assert writes_in_flight(listing(PRODUCT, line, WAIT, "EXIT")) == ([f"00010 {line}"] if seen else [])
    assert writes_in_flight(listing(PRODUCT, WAIT, line, "EXIT")) == []


def test_calls_are_followed():
    code = [PRODUCT, "CALL.REL.NOINC 0x0040", WAIT, "EXIT", "MOV R9, R1", "RET.REL.NODEC R4 0x0"]
    assert writes_in_flight(listing(*code)) == ["00040 MOV R9, R1"]
    assert writes_in_flight(listing(*code[:4], "MOV R12, R1", code[5])) == []


def rendered(variant: ag.Variant, d: int, dv: int, page_size: int | None, most_rows: int = 0) -> tuple[Any, dict[str, str]]:
    from attngen import cuda
    from attngen.render_cuda import render_cuda

    stored = tuple((n, STORED[f.dtype]) for n, f in sorted(variant.trace.used().items()) if f.kind == "tensor")
    p = problem(d, dv, storage=stored)
    hooks = emit(variant.trace, dict(stored), d, "cuda", device_scalars=True)
    config = choose_hopper(p, "90a", hooks, page_size, most_rows=most_rows).config
    special = cuda.specialise("attention_sm90", variant.name, variant.trace, p, config, "90a")
    return config, render_cuda("attention_sm90", special.hooks, config, special.layout, p, special.title)


def test_the_engine_takes_it_where_it_serves():
    for page_size in (16, None, 4):
        kernels = engine.kernels_of(variants.Causal(), problem(128), page_size=page_size)
        assert kernels.classes[-1].name == "attention_sm90" and kernels.classes[-1].config.gather == (page_size == 4)
