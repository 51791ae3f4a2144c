"""Block-sparse attention: random blocks of any sizes, per head or shared, under declared and packed masks, against the oracle."""

from __future__ import annotations

import random

import attngen as ag
import pytest
import torch
from attngen.sparse import over_blocks, over_pages
from attngen.variants import ALiBi, Causal, Document, Gemma2, Llama3RoPE, Sigmoid, Sinks, example_params
from batches import Batch, judge, make, split_params
from compare import compare

WHERE = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HEADS, KV_HEADS = 4, 2


class Kept(ag.Variant):
    """The blocks as a dense mask, for the oracle."""

    kept: ag.Tensor("heads", "q_tokens", "positions", dtype=bool)

    def mask(self, at):
        return self.kept[at.head, at.q_token, at.kv]


class Everything(ag.Variant):
    """Hooks that read all that there is to read."""

    bias: ag.Tensor("heads", "positions")
    gate: ag.Tensor("q_tokens", "heads")
    cost: ag.Tensor("requests", "kv_heads")
    late: ag.Tensor("kv_tokens", dtype=int)
    slope: ag.Scalar = 0.01

    def query_scale(self, at):
        return 1.0 + self.gate[at.q_token, at.head] * 0.1

    def logits(self, s, at):
        far = ag.abs(at.q - at.kv) * self.slope
        return s + self.bias[at.head, at.kv] - far * self.cost[at.request, at.kv_head] + 0.001 * at.kv_len - 0.001 * at.q_len

    def mask(self, at):
        return (at.q - at.q_offset + self.late[at.kv_token] >= at.kv // 2) | (at.kv_token == at.q_token)

    def sink(self, at):
        return 0.1 * at.head + 0.01 * at.num_heads + 0.01 * at.num_kv_heads

    def output(self, o, at):
        return o * (1.0 + self.gate[at.q_token, at.head]) + 0.001 * at.dim


def everything(m, n):
    torch.manual_seed(5)
    return {
        "bias": torch.randn(HEADS, n), "gate": torch.rand(m, HEADS), "cost": torch.rand(1, KV_HEADS),
        "late": torch.randint(0, 40, (n,), dtype=torch.int32),
    }  # fmt: skip


def csr(blocks):
    """indptr and indices of bool [row blocks, column blocks] or [heads, row blocks, column blocks]."""
    counts = blocks.sum(-1)
    ends = counts.flatten().cumsum(0)
    if blocks.dim() == 2:
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    else:
        indptr = torch.zeros(counts.shape[0], counts.shape[1] + 1, dtype=torch.int64)
        indptr[:, 1:] = ends.view(counts.shape)
        indptr[1:, 0] = indptr[:-1, -1]
    return indptr.int(), blocks.nonzero()[:, -1].int()


class Call:
    """Inputs in float32 on the CPU in the oracle's layout, and on a device in an object's."""

    def __init__(self, m, n, where, layout, d=32, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.where, self.layout, self.dtype = where, layout, torch.float32 if where == "cpu" else torch.bfloat16
        self.q = torch.randn(m, HEADS, d, generator=g).to(self.dtype)
        self.k, self.v = (torch.randn(n, KV_HEADS, d, generator=g).to(self.dtype) for _ in "kv")
        self.facts = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=d, dtype=self.dtype, device=where, kv_layout=layout)

    def given(self):
        turn = (lambda t: t.transpose(0, 1).contiguous()) if self.layout == "HND" else lambda t: t
        return [turn(t).to(self.where) for t in (self.q, self.k, self.v)]

    def there(self, params):
        return {name: x.to(self.where) if isinstance(x, torch.Tensor) else x for name, x in params.items()}

    def check(self, attn, variant, kept, run_params, all_params, **call):
        """``kept``: bool [heads, M, N]."""
        has_lse = variant is None or variant.trace.weight is None
        found = attn.run(*self.given(), return_lse=has_lse, **self.there(run_params))
        attn.check()
        dense = ag.compose(variant, Kept()) if variant is not None else Kept()
        ref = ag.reference(self.q[None], self.k[None], self.v[None], dense, kept=kept, return_lse=has_lse, **all_params, **call)
        (out, lse), (ref, ref_lse) = (found, ref) if has_lse else ((found, None), (ref, None))
        if self.layout == "HND":
            out, lse = out.transpose(0, 1), None if lse is None else lse.T
        like = ref[0].to(self.dtype) + (2e-3 if self.dtype != torch.float32 else 0)
        compare(out.cpu(), ref[0], like=like)
        if has_lse:
            compare(lse.cpu(), ref_lse[0].T, dtype=torch.float32 if self.dtype == torch.float32 else torch.bfloat16)


def spread(blocks, R, C, m, n):
    """Blocks as [heads, M, N]."""
    kept = blocks.repeat_interleave(R, -2)[..., :m, :].repeat_interleave(C, -1)[..., :n]
    kept = kept[None] if kept.dim() == 2 else kept
    return kept.repeat_interleave(HEADS // kept.shape[0], 0)


def split(variant, params):
    reads = variant.trace.mask.params if variant is not None and variant.trace.mask is not None else ()
    return {n: x for n, x in params.items() if n in reads}, {n: x for n, x in params.items() if n not in reads}


VARIANTS = {
    "none": (None, lambda m, n: {}),
    "causal, ALiBi": (ag.compose(ALiBi(), Causal()), lambda m, n: {}),
    "Gemma 2": (Gemma2(), lambda m, n: {"cap": 2.0, "window": 40}),
    "documents": (Document() & Causal(), lambda m, n: {"doc": torch.arange(n, dtype=torch.int32)[None] // 30}),
    "sinks": (Sinks(), lambda m, n: {"sinks": torch.randn(HEADS, generator=torch.Generator().manual_seed(2))}),
    "RoPE": (Llama3RoPE(), lambda m, n: {}),
    "sigmoid": (Sigmoid(), lambda m, n: {"bias": -3.0}),
    "everything": (Everything(), everything),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("heads", [None, KV_HEADS, HEADS])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, heads, layout, where):
    m, n, R, C = 100, 128, 16, 32
    variant, params = VARIANTS[name][0], VARIANTS[name][1](m, n)
    call = Call(m, n, where, layout)
    attn = ag.BlockSparseAttention(variant, R=R, C=C, max_q_tokens=m, max_kv_tokens=n, per_head=heads is not None, **call.facts)
    torch.manual_seed(1)
    shape = (-(-m // R), n // C)
    blocks = torch.rand(shape if heads is None else (heads, *shape)) < 0.5
    planned, ran = split(variant, params)
    indptr, indices = csr(blocks)
    attn.plan(indptr.to(where), indices.to(where), **call.there(planned))
    call.check(attn, variant, spread(blocks, R, C, m, n), ran, params)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("seed", range(12))
def test_random_blocks(seed, where):
    """Sizes, densities (none and all too), layouts and positions."""
    rng = random.Random(seed)
    R, C = rng.choice((1, 4, 16, 33, 64)), rng.choice((1, 3, 16, 64))
    m, n = rng.randint(1, 200), C * rng.randint(1, 200 // C)
    heads, layout = rng.choice((None, KV_HEADS, HEADS)), rng.choice(("NHD", "HND"))
    call = Call(m, n, where, layout, seed=seed)
    attn = ag.BlockSparseAttention(Causal(), R=R, C=C, max_q_tokens=m + 7, max_kv_tokens=n + C, per_head=heads is not None, **call.facts)
    for density in (0.0, 0.1, 0.6, 1.0):
        shape = (-(-m // R), n // C)
        blocks = torch.rand(shape if heads is None else (heads, *shape), generator=torch.Generator().manual_seed(seed)) < density
        offset = rng.choice((None, 0, 11))
        attn.plan(*(t.to(where) for t in csr(blocks)), M=m, N=n, q_offset=offset)
        call.check(attn, Causal(), spread(blocks, R, C, m, n), {}, {}, q_offset=n - m if offset is None else offset)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_masks_within_blocks(layout, packed, where):
    for seed, (m, n, R, C) in enumerate(((64, 96, 16, 32), (61, 90, 7, 5), (20, 9, 20, 3))):
        call = Call(m, n, where, layout, seed=seed)
        torch.manual_seed(seed)
        blocks = torch.rand(-(-m // R), n // C) < 0.6
        indptr, indices = csr(blocks)
        mask = torch.rand(len(indices), R, C) < 0.5
        attn = ag.BlockSparseAttention(Causal(), R=R, C=C, max_q_tokens=m, max_kv_tokens=n, masked=True, **call.facts)
        if packed:  # as FlashInfer converts and packs it, row by row
            rows = [mask[a:b].transpose(0, 1).reshape(-1) for a, b in zip(indptr.tolist(), indptr.tolist()[1:])]
            bits, _ = ag.segment_packbits(torch.cat(rows), indptr * R * C)
            attn.plan(indptr.to(where), indices.to(where), packed_mask=bits.to(where))
        else:
            attn.plan(indptr.to(where), indices.to(where), mask=mask.to(where))
        kept = torch.zeros(len(blocks) * R, n, dtype=torch.bool)
        for (row, column), matrix in zip(blocks.nonzero().tolist(), mask):
            kept[row * R : (row + 1) * R, column * C : (column + 1) * C] = matrix
        call.check(attn, Causal(), kept[None, :m].expand(HEADS, -1, -1), {}, {})


def check_on_hopper(layout, per_head, masked):
    """Behind the emulation of a Hopper GPU, which test_hopper.py installs."""
    m, n, R, C = 200, 256, 72, 64
    call = Call(m, n, "cpu", layout, d=64)
    call.dtype = call.facts["dtype"] = torch.bfloat16
    call.q, call.k, call.v = (t.bfloat16() for t in (call.q, call.k, call.v))
    variant, params = VARIANTS["causal, ALiBi" if masked else "everything"][0], {} if masked else everything(m, n)
    attn = ag.BlockSparseAttention(variant, R=R, C=C, max_q_tokens=m, max_kv_tokens=n, per_head=per_head, masked=masked, **call.facts)
    torch.manual_seed(3)
    blocks = torch.rand(*([KV_HEADS] if per_head else []), -(-m // R), n // C) < 0.6
    kept, more = spread(blocks, R, C, m, n), {}
    if masked:
        more["mask"] = torch.rand(int(blocks.sum()), R, C) < 0.5
        for (row, column), matrix in zip(blocks.nonzero().tolist(), more["mask"]):
            kept[:, row * R : (row + 1) * R, column * C : (column + 1) * C] &= matrix[: m - row * R]
    planned, ran = split(variant, params)
    attn.plan(*csr(blocks), **planned, **more)
    call.check(attn, variant, kept, ran, params)


def sizes(rng, total, count, multiple=1):
    """``count`` sizes, some of 0, that add up to ``total``."""
    cuts = sorted(rng.randint(0, total // multiple) for _ in range(count - 1))
    return [multiple * (b - a) for a, b in zip([0, *cuts], [*cuts, total // multiple])]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("seed", range(10))
def test_variable_blocks(seed, where):
    rng = random.Random(100 + seed)
    heads, multiple, layout = rng.choice((KV_HEADS, HEADS)), rng.choice((1, 1, 8)), rng.choice(("NHD", "HND"))
    m, n = rng.randint(1, 150), multiple * rng.randint(1, 200 // multiple)
    rows, columns = rng.randint(1, 6), rng.randint(1, 6)
    call = Call(m, n, where, layout, seed=seed)
    name = rng.choice(("none", "causal, ALiBi", "everything"))
    variant, params = VARIANTS[name][0], VARIANTS[name][1](m, n)
    attn = ag.VariableBlockSparseAttention(
        variant, max_q_tokens=m, max_kv_tokens=n + multiple, max_row_blocks=6, multiple=multiple, **call.facts
    )
    row_sz = torch.tensor([sizes(rng, m, rows) for _ in range(heads)])
    col_sz = torch.tensor([sizes(rng, n, columns, multiple) for _ in range(heads)])
    torch.manual_seed(seed)
    blocks = torch.rand(heads, rows, columns) < 0.5
    kept = torch.stack([b.repeat_interleave(r, 0).repeat_interleave(c, 1) for b, r, c in zip(blocks, row_sz, col_sz)])
    planned, ran = split(variant, params)
    attn.plan(blocks.to(where), row_sz.int().to(where), col_sz.int().to(where), N=n, **call.there(planned))
    call.check(attn, variant, kept.repeat_interleave(HEADS // heads, 0), ran, params)


class ByPosition(Everything):
    """Without the rows of keys, which a selection does not have; tensors as several requests have them."""

    cost: ag.Tensor("requests", "kv_heads")
    late: ag.Tensor("requests", "positions", dtype=int)

    def mask(self, at):
        return at.q - at.q_offset + self.late[at.request, at.kv] + at.kv_len // 4 >= at.kv // 2


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("form", ["indices", "table"])
@pytest.mark.parametrize("name", ["causal, ALiBi", "Gemma 2", "RoPE", "by position"])
def test_selected_pages_of_a_cache(name, form, where):
    """Top-k pages of each request, the newest among them, at their true positions."""
    page, q_lens, kv_lens = 16, [1, 3, 40, 1], [300, 64, 133, 5]
    variant = ByPosition() if name == "by position" else VARIANTS[name][0]
    dtype = torch.float32 if where == "cpu" else torch.bfloat16
    batch = Batch(q_lens, kv_lens, page_size=page, d=32, heads=HEADS, kv_heads=KV_HEADS, dtype=dtype, device=where)
    params = example_params(variant, **batch.sizes())
    rng = random.Random(1)
    chosen = [sorted(rng.sample(range(-(-n // page) - 1), (-(-n // page) - 1) // 2)) + [-(-n // page) - 1] for n in kv_lens]
    lens = [page * (len(c) - 1) + (n - 1) % page + 1 for c, n in zip(chosen, kv_lens)]
    width = max(map(len, chosen)) if form == "table" else None
    table = torch.full((4, width or 0), -1, dtype=torch.int32)
    starts, indices, first = [], [], [0]
    for r, c in enumerate(chosen):
        rows = batch.table[r].cpu()[torch.tensor(c)].tolist()
        if width:
            table[r, : len(c)] = torch.tensor(rows, dtype=torch.int32)
        padding = (width or len(c)) - len(c)
        starts += [page * i for i in c] + [0] * padding
        indices += rows
        first.append(len(starts))
    over = over_pages(variant, page)
    attn = make(over, batch)
    given = params | {"page_starts": batch.ints(starts), "page_indptr": batch.ints(first), "seq_lens": batch.ints(kv_lens)}
    given = {n: x for n, x in given.items() if n in over.trace.used()}
    to_plan, to_run = split_params(over, given, where, batch)
    if form == "table":
        attn.plan(batch.q_indptr, block_table=table.to(where), kv_lens=batch.ints(lens), **to_plan)
    else:
        last = batch.ints([(n - 1) % page + 1 for n in kv_lens])
        attn.plan(batch.q_indptr, batch.ints(first), batch.ints(indices), last, **to_plan)
    out, lse = attn.run(batch.q, (batch.k, batch.v), return_lse=True, **to_run)
    attn.check()
    kept = torch.zeros(4, max(kv_lens), dtype=torch.bool)
    for r, c in enumerate(chosen):
        for i in c:
            kept[r, page * i : page * (i + 1)] = True
    judge(out, lse, batch, ag.compose(variant, Selected()), **params, selected=kept)


class Selected(ag.Variant):
    """The selection as a dense mask, for the oracle."""

    selected: ag.Tensor("requests", "positions", dtype=bool)

    def mask(self, at):
        return self.selected[at.request, at.kv]


def test_a_selection_has_no_rows_of_keys():
    with pytest.raises(ag.UnsupportedError, match="it reads at.kv_token"):
        over_pages(Everything, 16)


def test_out_is_written():
    for layout in ("NHD", "HND"):
        for per_head in (False, True):
            call = Call(40, 64, "cpu", layout)
            attn = ag.BlockSparseAttention(R=8, C=16, max_q_tokens=40, max_kv_tokens=64, per_head=per_head, **call.facts)
            blocks = torch.ones(*([KV_HEADS] if per_head else []), 5, 4, dtype=torch.bool)
            attn.plan(*csr(blocks))
            out = torch.full_like(call.given()[0], torch.nan)
            assert attn.run(*call.given(), out=out) is out
            assert torch.equal(out, attn.run(*call.given()))


@pytest.mark.parametrize("per_head, masked", [(False, False), (True, False), (False, True)])
def test_what_a_set_builds_ahead_is_what_is_looked_up(per_head, masked):
    attn = ag.BlockSparseAttention(Everything(), R=8, C=16, max_q_tokens=40, max_kv_tokens=64, per_head=per_head, masked=masked,
                                   num_heads=4, num_kv_heads=2, head_dim=32, dtype=torch.float32, device="cpu")  # fmt: skip
    ahead = over_blocks(Everything, 16, per_head=per_head, masked=masked)
    assert ahead.structure_hash == attn._attn.variant.structure_hash


# ---------------------------------------------------------------- bad input


def attn_of(**more):
    given = dict(num_heads=4, num_kv_heads=2, head_dim=32, R=16, C=16, max_q_tokens=64, max_kv_tokens=64, dtype=torch.float32, device="cpu")
    return ag.BlockSparseAttention(**given | more)


def plan_of(indptr=(0, 1, 2, 3, 4), indices=(0, 1, 2, 3), made=None, **more):
    attn_of(**made or {}).plan(torch.tensor(indptr, dtype=torch.int32), torch.tensor(indices, dtype=torch.int32), **more)


def variable(row_sz=((32, 32),) * 2, col_sz=((32, 32),) * 2, blocks=None, multiple=1, **more):
    attn = ag.VariableBlockSparseAttention(
        num_heads=4, num_kv_heads=2, head_dim=32, max_q_tokens=64, max_kv_tokens=64, max_row_blocks=4, multiple=multiple, dtype=torch.float32,
        device="cpu", **more,
    )  # fmt: skip
    blocks = torch.ones(2, len(row_sz[0]), len(col_sz[0]), dtype=torch.bool) if blocks is None else blocks
    attn.plan(blocks, torch.tensor(row_sz), torch.tensor(col_sz))


WRONG = {
    "out of range": (lambda: plan_of(indices=(0, 1, 2, 4)), r"indices\[3\] is 4: required a column block, 0 to 3"),
    "negative": (lambda: plan_of(indices=(0, -1, 2, 3)), r"indices\[1\] is -1: required a column block"),
    "unsorted": (lambda: plan_of((0, 2, 2, 3, 4), (2, 1, 0, 0)), r"indices\[1\] is 1 after 2 in one row: required ascending"),
    "twice": (lambda: plan_of((0, 2, 2, 3, 4), (2, 2, 0, 0)), r"indices\[1\] is 2 after 2 in one row"),
    "indptr decreases": (lambda: plan_of((0, 2, 1, 3, 4)), "indptr: required to begin with 0 and not to decrease"),
    "indptr too long": (lambda: plan_of((0, 2, 3, 4, 5)), "indptr ends with 5 and indices has 4 entries"),
    "rows": (lambda: plan_of((0, 2, 4)), r"indptr has shape \(3,\): required \[5\]"),
    "heads": (lambda: plan_of(made={"per_head": True}), "indptr is torch.int32 .5,.: required int32, .heads, blocks."),
    "dtype": (lambda: attn_of().plan(torch.tensor([0.0, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 3])), "indptr is torch.float32"),
    "M": (lambda: plan_of(M=65), "M is 65: required an int from 1 to the capacity 64"),
    "N": (lambda: plan_of(N=50), "N is 50: required a multiple of C=16"),
    "capacity": (lambda: attn_of(max_kv_tokens=50), "max_kv_tokens 50: required a multiple of C=16"),
    "R": (lambda: attn_of(R=0), "R is 0: required an int of at least 1"),
    "layout": (lambda: attn_of(kv_layout="DHN"), "kv_layout 'DHN'"),
    "no mask": (lambda: plan_of(made={"masked": True}), "plan got no mask"),
    "a mask": (lambda: plan_of(packed_mask=torch.zeros(128, dtype=torch.uint8)), "plan got a mask"),
    "mask's dtype": (lambda: plan_of(made={"masked": True}, mask=torch.zeros(4, 16, 16)), "mask is torch.float32 .4, 16, 16."),
    "mask's shape": (lambda: plan_of(made={"masked": True}, mask=torch.zeros(3, 16, 16).bool()), r"required torch.bool \(4, 16, 16\)"),
    "short bits": (lambda: plan_of(made={"masked": True}, packed_mask=torch.zeros(127, dtype=torch.uint8)), "127 bytes: required 128 or more"),
    "packed dtype": (lambda: plan_of(made={"masked": True}, packed_mask=torch.zeros(128)), "packed_mask is torch.float32"),
    "parameter": (lambda: plan_of(window=3), "Full has no parameter `window`: it has none"),
    "run first": (lambda: attn_of().run(*torch.zeros(3, 64, 4, 32)), "run before plan"),
    "sums": (lambda: variable(((32, 31),) * 2), "block_row_sz of head 0 adds up to 63: required M, 64"),
    "columns": (lambda: variable(col_sz=((32, 32), (10, 50))), "block_col_sz of head 1 adds up to 60: required N, 64"),
    "multiple": (lambda: variable(col_sz=((30, 34),) * 2, multiple=8), "block_col_sz has 30: required multiples of multiple=8"),
    "negative size": (lambda: variable(((-1, 65),) * 2), "block_row_sz has -1"),
    "long row": (lambda: variable(max_row_size=16), "block_row_sz has 32: required at most max_row_size=16"),
    "map": (lambda: variable(blocks=torch.ones(2, 2, 2)), "block_mask_map is torch.float32"),
    "map's heads": (lambda: variable(blocks=torch.ones(3, 2, 2).bool()), "of 3 heads, 2 row blocks and 2 column blocks: required 4 or 2"),
    "map's columns": (lambda: variable(blocks=torch.ones(2, 2, 3).bool()), r"block_col_sz has shape \(2, 2\): required \(2, 3\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(name):
    call, message = WRONG[name]
    with pytest.raises(ag.ParameterError, match=message):
        call()


def test_unsupported():
    with pytest.raises(ag.UnsupportedError, match="masks within blocks are shared by all heads"):
        attn_of(masked=True, per_head=True)
    with pytest.raises(ag.UnsupportedError, match="head_offset="):
        attn_of(head_offset=4)

    class Ntk(Causal):
        rope = ag.RoPE(10000.0, scaling=ag.DynamicNTK(2.0, 64))

    with pytest.raises(ag.UnsupportedError, match="RoPE's table depends on kv_len"):
        attn_of(variant=Ntk())


def test_wrong_tensors_at_run():
    attn = attn_of(per_head=True)
    attn.plan(*csr(torch.ones(2, 4, 4, dtype=torch.bool)))
    q, k = torch.zeros(64, 4, 32), torch.zeros(64, 2, 32)
    with pytest.raises(ag.ParameterError, match=r"k is \(63, 2, 32\): required \[64, 2, head_dim\], NHD, as planned"):
        attn.run(q, k[1:], k)
    with pytest.raises(ag.ParameterError, match="k has strides .* required contiguous, NHD"):
        attn.run(q, torch.zeros(64, 3, 32)[:, :2], k)
    with pytest.raises(ag.ParameterError, match="bias has 3 entries on axis 'heads': required 4"):
        planned, ran = split(Everything(), everything(64, 64))
        attn = attn_of(variant=Everything())
        attn.plan(*csr(torch.ones(4, 4, dtype=torch.bool)), **planned)
        attn.run(q, k, k, **ran | {"bias": torch.randn(3, 64)})


BAD_ON_DEVICE = {
    "out of range": ((0, 1, 2, 3, 4), (0, 1, 2, 4), "row block 3: an index in indices is out of range", [3]),
    "negative": ((0, 1, 2, 3, 4), (0, -1, 2, 3), "row block 1: an index in indices is out of range", [1]),
    "unsorted": ((0, 2, 2, 3, 4), (2, 1, 0, 0), "row block 0: an index in indices .* not above", [0]),
    "decreasing": ((0, 2, 1, 3, 4), (0, 1, 2, 3), "row block 1: indptr is negative or decreases", [1]),
    "too many": ((0, 1, 2, 3, 5), (0, 1, 2, 3), "row block 3: indptr ends past", [3]),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("name", BAD_ON_DEVICE)
def test_what_only_the_device_sees(name, per_head):
    indptr, indices, message, rows = BAD_ON_DEVICE[name]
    call = Call(64, 64, "cuda", "NHD")
    attn = ag.BlockSparseAttention(R=16, C=16, max_q_tokens=64, max_kv_tokens=64, per_head=per_head, **call.facts)
    indptr, indices = torch.tensor(indptr, dtype=torch.int32), torch.tensor(indices, dtype=torch.int32)
    if per_head:
        indptr = torch.stack([torch.arange(5, dtype=torch.int32), indptr + 4])  # head 1 is bad
        indices = torch.cat([torch.arange(4, dtype=torch.int32), indices])
        message = message.replace(":", " of head [23]:")  # a request each, and the first to be seen wins
    attn.plan(indptr.cuda(), indices.cuda())
    out = attn.run(*call.given())
    with pytest.raises(ag.ParameterError, match=message):
        attn.check()
    attn.check()
    heads = slice(2, 4) if per_head else slice(0, 4)
    for row in rows:
        assert out[16 * row : 16 * row + 16, heads].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["shared", "per head", "variable"])
def test_a_graph_sees_new_blocks(form):
    m = n = 256
    call = Call(m, n, "cuda", "HND")
    facts = dict(max_q_tokens=m, max_kv_tokens=n, **call.facts)
    if form == "variable":
        attn = ag.VariableBlockSparseAttention(Causal(), max_row_blocks=8, **facts)
        kept, rows = torch.zeros(KV_HEADS, 8, 8, dtype=torch.bool, device="cuda"), torch.full((KV_HEADS, 8), 32, device="cuda", dtype=torch.int32)
        given = (kept, rows, rows.clone())
    else:
        attn = ag.BlockSparseAttention(Causal(), R=32, C=32, per_head=form == "per head", **facts)
        heads = KV_HEADS if form == "per head" else 1
        indptr = torch.zeros(heads, 9, dtype=torch.int32, device="cuda")
        given = (indptr if heads > 1 else indptr[0], torch.zeros(heads * 64, dtype=torch.int32, device="cuda"))
    inputs, out = call.given(), torch.empty_like(call.given()[0])

    def step():
        attn.plan(*given)
        attn.run(*inputs, out=out)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(3):
        blocks = torch.rand(KV_HEADS, 8, 8, generator=torch.Generator().manual_seed(seed)) < 0.4
        if form == "variable":
            given[0].copy_(blocks)
        else:
            indptr, indices = csr(blocks if form == "per head" else blocks[0])
            given[0].copy_(indptr)
            given[1][: len(indices)].copy_(indices)
        graph.replay()
        attn.check()
        dense = spread(blocks if form != "shared" else blocks[0], 32, 32, m, n)
        ref = ag.reference(call.q[None], call.k[None], call.v[None], Causal() & Kept(), kept=dense)
        compare(out.transpose(0, 1).cpu(), ref[0], like=ref[0].bfloat16() + 2e-3)
