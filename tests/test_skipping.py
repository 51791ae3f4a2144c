"""Kernels skip tiles of which the mask keeps nothing: values there are NaN, and no result is; all against the float64 oracle. The Hopper
kernel runs on the CPU (hopper_on_host.py); the GPU tests do the same on a GPU, with every kernel."""

from __future__ import annotations

import random
from typing import Any

import hopper_on_host
import on_host_hopper
import on_host_mma
import pytest
import torch
from batches import Batch, judge, make
from compare import compare
from test_classes import random_mask
from test_properties import make as random_variant

import attngen as ag
from attngen import engine, variants
from attngen.bounds import analyse
from attngen.choose_cuda import PlanConfig, TileClass
from attngen.lengths import Lengths, Reach
from attngen.schedule import plan

BF16 = torch.bfloat16


class PackedDocuments(ag.Variant):
    """Causal within a document; ids of each packed row."""

    q_doc: ag.Tensor("q_tokens", dtype=int)
    kv_doc: ag.Tensor("kv_tokens", dtype=int)

    def mask(self, at):
        return (at.kv <= at.q) & (self.q_doc[at.q_token] == self.kv_doc[at.kv_token])


class Window2D(ag.Variant):
    """Keys of an image, ``width`` wide, up to ``reach`` rows and columns away."""

    width: ag.Scalar[int]
    reach: ag.Scalar[int] = 2

    def mask(self, at):
        return (abs(at.q // self.width - at.kv // self.width) <= self.reach) & (abs(at.q % self.width - at.kv % self.width) <= self.reach)


class HeadWindows(ag.Variant):
    """A window for each head, and tokens that all see."""

    windows: ag.Tensor("heads", dtype=int)
    pinned: ag.Tensor("kv_tokens", dtype=bool)

    def mask(self, at):
        return (at.kv <= at.q) & ((at.q - at.kv < self.windows[at.head]) | self.pinned[at.kv_token])


def documents(*lengths: int) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()


def cases(q_len: int, kv_len: int, scale: int) -> dict[str, tuple[ag.Variant, dict[str, Any]]]:
    """The masks of the issue, for one request; lengths times ``scale``."""
    ids = documents(50 * scale, 400 * scale, 20 * scale, kv_len - 470 * scale)
    pinned = torch.zeros(kv_len, dtype=torch.bool)
    pinned[3] = True
    return {
        "causal": (variants.Causal(), {}), "window": (variants.SlidingWindow(), {"window": 90 * scale}),
        "prefix": (variants.PrefixLM(), {"prefix_len": torch.tensor([30 * scale], dtype=torch.int32)}),
        "packed documents": (PackedDocuments(), {"q_doc": ids[kv_len - q_len :].clone(), "kv_doc": ids}),
        "documents": (ag.compose(variants.Document(), variants.Causal()), {"doc": ids[None]}),
        "chunked": (variants.Chunked(), {"chunk": 200 * scale}), "streaming": (variants.Streaming(), {"sinks": 5, "window": 60 * scale}),
        "dilated": (variants.DilatedWindow(), {"window": 40 * scale, "dilation": 3}), "2-D window": (Window2D(), {"width": 32 * scale}),
        "head windows": (HeadWindows(), {"windows": torch.tensor([20 * scale, 70 * scale], dtype=torch.int32), "pinned": pinned}),
    }  # fmt: skip


SKIPS = {"window", "packed documents", "documents", "chunked", "streaming", "dilated", "2-D window", "head windows"}


def poisoned(variant: ag.Variant, params: dict[str, Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int) -> tuple[torch.Tensor, int]:
    """Values that are NaN wherever no query keeps a key of the block and its neighbours; how many keys these are."""
    pairs = ag.reference(q.float(), k.float(), torch.eye(k.shape[1])[None, :, None].expand(1, -1, k.shape[2], -1), variant, **params)
    kept = pairs.ne(0).any(2).any(1)[0]  # [kv]: a weight that is not 0
    blocks = torch.nn.functional.pad(kept, (0, -len(kept) % block)).view(-1, block).any(1)
    near = blocks | torch.cat([blocks[1:], torch.tensor([False])]) | torch.cat([torch.tensor([False]), blocks[:-1]])
    unread = ~near.repeat_interleave(block)[: len(kept)]
    v = v.clone()
    v[:, unread] = torch.nan
    return v, int(unread.sum())


def check(variant: ag.Variant, params: dict[str, Any], q_len: int, kv_len: int, block: int, device: str, skips: bool, heads: int = 2, kv_heads: int = 1) -> None:
    q = torch.randn(1, q_len, heads, 64).to(BF16)
    k, v = (torch.randn(1, kv_len, kv_heads, 64).to(BF16) for _ in "kv")
    bad, unread = poisoned(variant, params, q, k, v, block)
    assert not skips or unread, "nothing to skip: the case tests nothing"
    ref = ag.reference(q, k, v, variant, **params)
    given = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in params.items()}
    out = ag.attention(q.to(device), k.to(device), bad.to(device), variant, **given).cpu()
    assert not torch.isnan(out).any(), "a block that the mask empties was read"
    compare(out, ref, like=ref.to(BF16) + 2e-3)


@pytest.mark.parametrize("q_len", [1, 12, 100])  # few rows, and tiles
@pytest.mark.parametrize("name", cases(100, 1000, 1))
def test_the_cpu_backend_skips(name, q_len):
    torch.manual_seed(1)
    variant, params = cases(q_len, 1000, 1)[name]
    check(variant, params, q_len, 1000, 64, "cpu", name in SKIPS and q_len > 1)


# ---------------------------------------------------------------- the Hopper kernel, on the CPU


@pytest.fixture
def on_host(monkeypatch):
    hopper_on_host.install(monkeypatch)


@pytest.mark.parametrize("name", cases(100, 1000, 1))
def test_hopper_skips(name, on_host):
    torch.manual_seed(1)
    variant, params = cases(100, 1000, 1)[name]
    check(variant, params, 100, 1000, 128, "cpu", name in SKIPS)


def random_masks(seed: int) -> None:
    rng = random.Random(100 + seed)
    torch.manual_seed(seed)
    mask = random_mask(rng, 4)
    while not {"q", "kv"} <= mask.symbols:
        mask = random_mask(rng, 4)
    variant = random_variant({"mask": mask})
    params = {"a": 1.5, "n": rng.choice([0, 3, -2, 64, 100])}
    used = variant.trace.used()
    q = torch.randn(2, 70, 4, 64).to(BF16)
    k, v = (torch.randn(2, 300, 2, 64).to(BF16) for _ in "kv")
    given = {name: x for name, x in params.items() if name in used}
    out, ref = (f(q, k, v, variant, kv_lens=[300, 170], **given) for f in (ag.attention, ag.reference))
    compare(out, ref, like=ref.to(BF16) + 2e-3)


@pytest.mark.parametrize("seed", range(6))
def test_hopper_random_masks(seed, on_host):
    random_masks(seed)


def test_a_list_of_blocks_that_is_full(on_host, monkeypatch):
    """More spans than a unit has room for: the rest is walked block by block."""
    text = on_host_hopper.render_cuda

    def short(*args, **more):
        files = text(*args, **more)
        assert "SPANS = 32;" in files["attention_sm90.cu"]
        return {name: x.replace("SPANS = 32;", "SPANS = 2;") for name, x in files.items()}

    monkeypatch.setattr(on_host_hopper, "render_cuda", short)
    monkeypatch.setattr(hopper_on_host, "_kernels", {})
    torch.manual_seed(2)
    # kv // 4200 even, and sinks: spans of 32 blocks that are empty lie between others.
    kv, q = ag.expr.symbol("kv"), ag.expr.symbol("q")
    variant = random_variant({"mask": (kv <= q) & ((kv // 4200) % 2 == 0)})
    q_, k, v = torch.randn(1, 70, 1, 32).to(BF16), *(torch.randn(1, 21000, 1, 32).to(BF16) for _ in "kv")
    out, ref = ag.attention(q_, k, v, variant), ag.reference(q_, k, v, variant)
    compare(out, ref, like=ref.to(BF16) + 2e-3)


def long_context(q_len: int) -> None:
    """More than 32 x 32 blocks between sinks and window, of which no mask knows a range: values there are NaN."""
    torch.manual_seed(3)
    n = 140_000
    kv, q = ag.expr.symbol("kv"), ag.expr.symbol("q")
    variant = random_variant({"mask": (kv <= q) & ((q - kv < 100) | (kv % 100_000 < 5) & (kv < 50_000))})
    q_, k, v = torch.randn(1, q_len, 1, 32).to(BF16), *(torch.randn(1, n, 1, 32).to(BF16) for _ in "kv")
    ref = ag.reference(q_, k, v, variant)
    bad = v.clone()
    bad[:, 200 : n - 700] = torch.nan
    compare(ag.attention(q_, k, bad, variant), ref, like=ref.to(BF16) + 2e-3)


def test_hopper_in_a_long_context(on_host):
    long_context(70)


@pytest.mark.parametrize("kind", ["paged", "ragged", "rows of a matrix", "too long for its zones"])
def test_zone_maps_of_batches(kind, on_host):
    """Documents of several requests, and others at the next plan."""
    q_lens, kv_lens = [70, 3, 0, 129], [200, 900, 40, 700]
    batch = Batch(q_lens, kv_lens, d=64, device="cpu")
    reference = ag.compose(variants.Document(), variants.Causal())
    variant = reference if kind == "rows of a matrix" else PackedDocuments()
    ragged = dict(page_size=None, max_kv_tokens=4096, max_pages=None) if kind == "ragged" else {}
    attn = make(variant, batch, max_kv_len=1000, **ragged)
    kv_indptr, k, v = batch.ragged()
    for seed in (0, 1):
        doc = torch.randint(0, 5, (4, 900), generator=torch.Generator().manual_seed(seed)).sort(1)[0].int()
        packed = {
            "q_doc": torch.cat([doc[i, n - m : n] for i, (m, n) in enumerate(zip(q_lens, kv_lens))]),
            "kv_doc": torch.cat([doc[i, :n] for i, n in enumerate(kv_lens)]),
        }  # fmt: skip
        if kind == "too long for its zones":
            packed["kv_doc"] = torch.cat([packed["kv_doc"], torch.zeros(200_000, dtype=torch.int32)])
        given = {"doc": doc} if kind == "rows of a matrix" else packed
        if kind == "ragged":
            attn.plan(batch.q_indptr, kv_indptr, **given)
        else:
            attn.plan(*batch.pages(), **given)
        out, lse = attn.run(batch.q, (k, v) if kind == "ragged" else (batch.k, batch.v), return_lse=True)
        attn.check()
        judge(out, lse, batch, reference, doc=doc)


def test_hooks_of_flex_read_zones(on_host):
    doc = documents(50, 400, 20, 530)

    def mask(b, h, q_idx, kv_idx):
        return (q_idx >= kv_idx) & (doc[q_idx] == doc[kv_idx])

    q, k, v = (torch.randn(1, 2, 1000, 64).to(BF16) for _ in "qkv")
    kernels = engine.kernels_of(ag.from_flex(mask_mod=mask), engine.cuda_problem("90a", BF16, 64, 64, (("doc", "int32"),)), page_size=None)
    assert [zone.name for zone in kernels.plan.config.zones] == ["doc"]
    ref = ag.reference(q, k, v, ag.from_flex(mask_mod=mask), layout="bhsd")
    compare(ag.flex_attention(q, k, v, block_mask=mask), ref, like=ref.to(BF16) + 2e-3)


# ---------------------------------------------------------------- decode and attention_sm80, on the CPU

@pytest.mark.parametrize("q_len", [1, 12, 30, 100])  # tiles of 16, 32, 64 and 128 rows
@pytest.mark.parametrize("name", cases(100, 1000, 1))
def test_mma_skips(name, q_len, monkeypatch):
    on_host_mma.install(monkeypatch)
    torch.manual_seed(1)
    variant, params = cases(q_len, 1000, 1)[name]
    check(variant, params, q_len, 1000, 128, "cpu", name in SKIPS and q_len > 1)


@pytest.mark.parametrize("q_len", [1, 70])
def test_mma_in_a_long_context(q_len, monkeypatch):
    on_host_mma.install(monkeypatch)
    long_context(q_len)


@pytest.mark.parametrize("seed", range(4))
def test_mma_random_masks(seed, monkeypatch):
    on_host_mma.install(monkeypatch)
    random_masks(seed)


def test_decode_leaves_the_gap_out_of_the_plan():
    """Sinks and a window of a long context are planned, and cost, as what they are."""
    reach = Reach(analyse(variants.Streaming().trace.mask), {"window": 1024, "sinks": 64}, 8, 2)
    (p,), _ = plan(PlanConfig("90a", (TileClass(16, 64, 2, head_major=True),)), Lengths(1, [0, 1], kv_lens=[131072]), reach, [264])
    (tile,) = p.tiles
    assert tile.blocks == 17 and [tile.block(i) for i in (0, 1, 16)] == [0, 2032, 2047]


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("q_len", [1, 3, 12, 50, 300])  # decode of 16 and 32 rows, tiles of 64 and of 128
@pytest.mark.parametrize("name", cases(300, 4000, 4))
def test_gpu_skips(name, q_len):
    torch.manual_seed(1)
    variant, params = cases(q_len, 4000, 4)[name]
    check(variant, params, q_len, 4000, 128, "cuda", name in SKIPS and q_len > 1)
