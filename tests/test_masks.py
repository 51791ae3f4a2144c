"""Packed masks: packing against numpy, rows against their definition, BatchAttention with any bits against the oracle.

What has a kernel runs on the CPU, with the CUDA kernel's text compiled for this host ("text"), and, marked gpu, on a GPU.
"""

from __future__ import annotations

import random

import attngen as ag
import numpy as np
import on_host_block
import pytest
import torch
from attngen import cuda, masks
from attngen.variants import Causal, CustomMask, SoftCap
from batches import PHASES, Batch, judge, make, split_params

DEVICES = ["cpu", "text", pytest.param("cuda", marks=pytest.mark.gpu)]
_text: list = []


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where tensors go; "text" has the CPU's tensors served by the kernel's text."""
    if request.param != "text":
        return torch.device(request.param)
    if not _text:
        special = masks._specialise("90a")
        _text.append((special, on_host_block.Kernel(special)))
    monkeypatch.setattr(masks, "_KERNELS", ("cuda", "cpu"))
    monkeypatch.setattr(masks, "_load", lambda index: _text[0])
    monkeypatch.setattr(masks, "_status", {None: torch.zeros(2, dtype=torch.int32)})
    monkeypatch.setattr(cuda, "current_stream", lambda index: 0)
    return torch.device("cpu")


def indptr(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("bitorder", ["little", "big"])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1000])
def test_packbits_is_numpys(n, bitorder):
    x = torch.rand(n) < 0.5
    assert ag.packbits(x, bitorder).tolist() == np.packbits(x.numpy(), bitorder=bitorder).tolist()


@pytest.mark.parametrize("on_device", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_segments_are_packed_by_themselves(on_device):
    rng = random.Random(3)
    for _ in range(30):
        lengths = [rng.choice((0, 1, 7, 8, 9, 40)) for _ in range(rng.randint(0, 6))]
        starts, x = indptr(lengths), torch.rand(sum(lengths)) < 0.5
        where = "cuda" if on_device else "cpu"
        packed, ends = ag.segment_packbits(x.to(where), starts.to(where))
        wanted = [np.packbits(x[a:b].numpy(), bitorder="little") for a, b in zip(starts.tolist(), starts.tolist()[1:])]
        assert ends.tolist() == indptr([len(w) for w in wanted]).tolist() and ends.dtype == torch.int32
        found = packed.cpu().tolist()
        assert found[: ends[-1]] == [byte for w in wanted for byte in w.tolist()] and not any(found[ends[-1] :])


def rows_of(matrix):
    """begin, run and end of each row, one by one."""
    found = []
    for row in matrix.tolist():
        kept = [i for i, x in enumerate(row) if x]
        begin, end = (kept[0], kept[-1] + 1) if kept else (0, 0)
        run = begin
        while run < len(row) and row[run]:
            run += 1
        found.append([begin, run if kept else 0, end])
    return found


def random_matrix(rng, q_len, kv_len):
    kind = rng.randrange(5)
    if kind == 0:
        return torch.rand(q_len, kv_len) < rng.choice((0.0, 0.02, 0.5, 0.98, 1.0))
    distance = torch.arange(q_len)[:, None] + kv_len - q_len - torch.arange(kv_len)
    if kind == 1:
        return distance >= 0
    if kind == 2:
        return (distance >= 0) & (distance < rng.randint(1, 60))
    if kind == 3:
        return (distance >= 0) & ((distance < 20) | (torch.arange(kv_len) < 5))
    return torch.cat([torch.ones(q_len, max(kv_len - q_len, 0), dtype=torch.bool), torch.rand(q_len, min(q_len, kv_len)) < 0.5], 1)


def test_rows_are_what_they_say(device):
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(20):
        q_lens = [rng.choice((0, 1, 3, 17)) for _ in range(rng.randint(1, 4))]
        kv_lens = [rng.choice((0, 1, 31, 32, 33, 64, 100, 1023, 1024, 1025, 3000)) for _ in q_lens]
        given = [random_matrix(rng, m, n) for m, n in zip(q_lens, kv_lens)]
        flat = torch.cat([x.flatten() for x in given])
        starts, packed = indptr(q_lens), rng.random() < 0.5
        more = {}
        if packed:
            flat, more["mask_indptr"] = ag.segment_packbits(flat, indptr([x.numel() for x in given]))
        padding = rng.choice((0, 3))
        found = ag.custom_mask(
            flat.to(device), q_indptr=starts.to(device), kv_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
            num_tokens=sum(q_lens) + padding, **{n: x.to(device) for n, x in more.items()},
        )  # fmt: skip
        three = torch.stack([found[f"mask_{n}"] for n in ("begin", "run", "end")], 1).cpu().tolist()
        wanted = [row for x in given for row in rows_of(x)]
        assert three == wanted + [[0, 0, 0]] * padding
    ag.check_masks(device if device.type == "cuda" else torch.device("cpu", 0))


def test_a_token_each(device):
    matrix = torch.rand(6, 40) < 0.5
    found = ag.custom_mask(matrix.flatten().to(device), kv_lens=[40] * 6)
    three = torch.stack([found[f"mask_{n}"] for n in ("begin", "run", "end")], 1).cpu().tolist()
    assert three == rows_of(matrix)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("layout", ["pages", "ragged"])
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches(phase, layout, where):
    check_batch(PHASES[phase], CustomMask(), layout, where, seed=7)


def check_batch(lengths, variant, layout, where, seed, **more):
    q_lens, kv_lens = lengths
    dtype = torch.float32 if where == "cpu" else torch.bfloat16
    batch = Batch(q_lens, kv_lens, d=64, heads=4, kv_heads=2, dtype=dtype, device=where)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    flat = torch.cat([random_matrix(rng, m, n).flatten() for m, n in zip(q_lens, kv_lens)])
    params = ag.custom_mask(flat.to(where), q_indptr=batch.q_indptr, kv_lens=batch.ints(kv_lens), num_tokens=sum(q_lens))
    attn = make(variant, batch, page_size=None, max_kv_tokens=16384) if layout == "ragged" else make(variant, batch)
    plan_params, run_params = split_params(variant, params | more, where)
    if layout == "ragged":
        ends, k, v = batch.ragged()
        attn.plan(batch.q_indptr, ends, **plan_params)
        out, lse = attn.run(batch.q, (k, v), return_lse=True, **run_params)
    else:
        attn.plan(*batch.pages(), **plan_params)
        out, lse = attn.run(batch.q, (batch.k, batch.v), return_lse=True, **run_params)
    attn.check()
    by_token = ("mask_begin", "mask_run", "mask_end")
    judge(out, lse, batch, variant, **{n: batch.padded(x) if n in by_token else x.cpu() for n, x in params.items()}, **more)


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_combined_with_declared_masks(where):
    check_batch(([40, 1, 3], [90, 64, 3]), ag.compose(SoftCap(2.0), Causal() & CustomMask()), "pages", where, seed=1)


def test_positions_do_not_move_the_mask():
    """Rows count from a request's first query, wherever it stands."""
    batch = Batch([5, 9], [40, 33], d=64, heads=2, kv_heads=1, dtype=torch.float32, device="cpu")
    flat = torch.rand(5 * 40 + 9 * 33) < 0.5
    attn = make(CustomMask(), batch)
    params = ag.custom_mask(flat, q_indptr=batch.q_indptr, kv_lens=[40, 33])
    attn.plan(*batch.pages(), **params)
    out = attn.run(batch.q, (batch.k, batch.v))
    attn.plan(*batch.pages(), q_positions=[3, 100], **params)
    assert torch.equal(out, attn.run(batch.q, (batch.k, batch.v)))


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_dense(where):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 50, 4, 32).to(where, torch.float32 if where == "cpu" else torch.float16)
    keep = (torch.rand(2, 50, 50) < 0.3).to(where)
    out = ag.attention(q, k, v, CustomMask(), **ag.custom_mask(keep))
    s = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 32**0.5
    p = s.masked_fill(~keep[:, None], -torch.inf).softmax(-1).nan_to_num()
    wanted = torch.einsum("bhqk,bkhd->bqhd", p, v.double())
    torch.testing.assert_close(out.double(), wanted, atol=1e-5 if where == "cpu" else 3e-3, rtol=1e-4 if where == "cpu" else 1e-2)


def test_short_masks():
    keep = torch.ones(2 * 40, dtype=torch.bool)
    with pytest.raises(ag.ParameterError, match="80 bools: required the sum of q_len . kv_len, 120"):
        ag.custom_mask(keep, q_indptr=[0, 2, 3], kv_lens=[40, 40])
    with pytest.raises(ag.ParameterError, match=r"request 1: its mask has fewer bits than q_len \* kv_len"):
        ag.custom_mask(ag.packbits(keep), q_indptr=[0, 2, 3], kv_lens=[40, 40])
    with pytest.raises(ag.ParameterError, match="request 0: its mask has fewer bits"):
        ag.custom_mask(ag.packbits(keep), q_indptr=[0, 1, 2], kv_lens=[40, 40], mask_indptr=torch.tensor([0, 4, 10]))


@pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
def test_short_masks_on_the_device(device):
    bits = torch.full((14,), 255, dtype=torch.uint8, device=device)
    found = torch.empty(3, 3, dtype=torch.int32, device=device)
    ends = [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 10, 15], [0, 2, 3], [40, 40])]
    masks._rows_cuda(bits, ends[0], *ends[1:], found)
    assert found.T.tolist() == [[0, 40, 40], [0, 40, 40], [0, 0, 0]]
    at = device if device.type == "cuda" else None
    if at is None:
        assert int(masks._status[None][0]) == 128 | 1 << 8
        return
    with pytest.raises(ag.ParameterError, match="request 1: its mask has fewer bits"):
        ag.check_masks(at)
    ag.check_masks(at)


WRONG = {
    "list": (lambda: ag.custom_mask([True]), "mask is list"),
    "floats": (lambda: ag.custom_mask(torch.ones(4), kv_lens=[4]), "mask is torch.float32 .4,.: required bool"),
    "packed floats": (lambda: ag.packbits(torch.ones(4)), "x is torch.float32: required a tensor of bools"),
    "bitorder": (lambda: ag.packbits(torch.ones(4).bool(), "middle"), "bitorder 'middle'"),
    "no lengths": (lambda: ag.custom_mask(torch.ones(4).bool()), "without kv_lens"),
    "both": (lambda: ag.custom_mask(torch.ones(4).bool(), kv_lens=[4], mask_indptr=torch.tensor([0, 1])), "mask_indptr with a mask of bools"),
    "dense and lengths": (lambda: ag.custom_mask(torch.ones(1, 2, 2).bool(), kv_lens=[2]), "required no lengths beside it"),
    "indptr": (lambda: ag.custom_mask(torch.ones(4).bool(), kv_lens=[4], q_indptr=[0, 1, 2]), "q_indptr has 3 entries and kv_lens 1"),
    "mask_indptr": (lambda: ag.custom_mask(torch.zeros(4, dtype=torch.uint8), kv_lens=[4], mask_indptr=torch.tensor([0])), "mask_indptr has 1 entries"),
    "float lengths": (lambda: ag.custom_mask(torch.ones(4).bool(), kv_lens=[4.0]), "kv_lens is torch.float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(name):
    call, message = WRONG[name]
    with pytest.raises(ag.ParameterError, match=message):
        call()


def test_a_packed_mask_of_another_dtype():
    batch = Batch([5], [40], d=64, heads=2, kv_heads=1, dtype=torch.float32, device="cpu")
    params = ag.custom_mask(torch.rand(200) < 0.5, q_indptr=batch.q_indptr, kv_lens=[40])
    params["packed_custom_mask"] = params["packed_custom_mask"].int()
    with pytest.raises(ag.ParameterError, match="packed_custom_mask is torch.int32 on cpu: required uint8"):
        make(CustomMask(), batch).plan(*batch.pages(), **params)


@pytest.mark.gpu
def test_a_graph_sees_new_bits():
    batch = Batch([40, 3], [200, 64], d=64, heads=4, kv_heads=2)
    bits = torch.zeros(40 * 200 // 8 + 3 * 64 // 8, dtype=torch.uint8, device="cuda")
    attn, out = make(CustomMask(), batch), torch.empty_like(batch.q)
    pages, kv_lens = batch.pages(), batch.ints([200, 64])  # a capture copies nothing from the host
    masks.compile()

    def step():
        attn.plan(*pages, **ag.custom_mask(bits, q_indptr=batch.q_indptr, kv_lens=kv_lens, num_tokens=43))
        attn.run(batch.q, (batch.k, batch.v), out=out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(3):
        bits.copy_(torch.randint(0, 256, bits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8))
        graph.replay()
        replayed = out.clone()
        step()
        assert torch.equal(replayed, out)
