"""``attention`` on CUDA tensors and raw states on a GPU against the float64 oracle; the device's plan against its Python twin.

What must not be read holds NaN, and so does every output before a call.
"""

from __future__ import annotations

import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compare import compare

import attngen as ag
from attngen import variants
from attngen.bounds import analyse
from attngen.lengths import Lengths, Reach
from attngen.schedule import plan
from attngen.space import TILE, WORKER
from attngen.variants import example_params

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
BF16, F16 = torch.bfloat16, torch.float16
seeds = itertools.count()


class Gated(ag.Variant):
    """A bias a packed key and a gate a packed query: rows are counted as in the CPU call."""

    bias: ag.Tensor("kv_tokens")
    gate: ag.Tensor("q_tokens", "heads")

    def logits(self, s, at):
        return s + self.bias[at.kv_token]

    def output(self, o, at):
        return o * self.gate[at.q_token, at.head]


class Sunk(ag.Variant):
    """What partial states leave to the end: a sink and an output hook."""

    sinks: ag.Tensor("heads")

    def mask(self, at):
        return at.kv <= at.q

    def sink(self, at):
        return self.sinks[at.head]

    def output(self, o, at):
        return 2.0 * o + ag.cast(at.dim, float) * 0.01


class Summed(ag.Variant):
    def mask(self, at):
        return at.kv <= at.q

    def weight(self, s, at):
        return ag.sigmoid(s)


class Biased(ag.Variant):
    bias: ag.Tensor("positions")

    def logits(self, s, at):
        return s + self.bias[at.kv]


VARIANTS = {
    "full": (ag.Variant(), BF16),
    "window": (variants.SlidingWindow(50), F16),
    "gemma2": (variants.Gemma2(), BF16),
    "alibi": (variants.ALiBi(), F16),
    "gpt_oss": (variants.GptOss(), BF16),
    "sigmoid": (variants.Sigmoid(), F16),
    "rope": (ag.compose(variants.Llama3RoPE(), variants.Causal()), BF16),
    "document": (ag.compose(variants.Document(), variants.Causal()), F16),
    "gated": (Gated(), BF16),
}
HEAD_DIMS = [(64, 64), (128, 128), (256, 256), (192, 128)]


@pytest.fixture(scope="module", autouse=True)
def built():
    """Builds the kernels of the grids on all cores; workers of xdist are parallel already."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        return
    jobs = [(variant, dtype, 64, 64) for variant, dtype in VARIANTS.values()]
    jobs += [(variants.Causal(), BF16, d, dv) for d, dv in HEAD_DIMS] + [(Biased(), BF16, 64, 64)]
    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(lambda j: ag.compile(j[0], device=DEVICE, dtype=j[1], head_dim=j[2], head_dim_v=j[3], paged=False), jobs))


def tensors(layout, q_len, kv_len, batch=3, heads=6, kv_heads=2, d=64, dv=64, dtype=BF16, sliced=False):
    """Random q, k, v; sliced: windows of larger tensors that hold NaN elsewhere."""
    random_ = torch.Generator().manual_seed(next(seeds))

    def one(length, heads, dim):
        values = torch.randn(batch, length, heads, dim, generator=random_).to(dtype)
        values = values if layout == "bshd" else values.transpose(1, 2).contiguous()
        if not sliced:
            return values.to(DEVICE)
        whole = torch.full([batch, *(n + 3 for n in values.shape[1:3]), dim + 8], torch.nan, dtype=dtype, device=DEVICE)
        view = whole[:, 2 : 2 + values.shape[1], 1 : 1 + values.shape[2], :dim]
        return view.copy_(values)

    return one(q_len, heads, d), one(kv_len, kv_heads, d), one(kv_len, kv_heads, dv)


def host(x):
    return x.cpu() if isinstance(x, torch.Tensor) else x


def device(x):
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def ints(x):
    return torch.tensor(x, dtype=torch.int32, device=DEVICE)


def check(variant, q, k, v, layout="bshd", **given):
    """A call, with its LSE where there is one, into an output of NaN, against the oracle."""
    softmax = variant.trace.weight is None
    out = torch.full((*q.shape[:3], v.shape[3]), torch.nan, dtype=q.dtype, device=DEVICE)
    found = ag.attention(q, k, v, variant, layout=layout, out=out, return_lse=softmax, **{n: device(x) for n, x in given.items()})
    assert (found[0] if softmax else found) is out
    ref = ag.reference(q.cpu(), k.cpu(), v.cpu(), variant, layout=layout, return_lse=softmax, **{n: host(x) for n, x in given.items()})
    ref, ref_lse = ref if softmax else (ref, None)
    compare(out.cpu(), ref, like=ref.to(out.dtype) + 2e-3)
    if softmax:
        compare(found[1].cpu(), ref_lse, dtype=out.dtype if variant.trace.rope else F16)  # rotated q is rounded again


@pytest.mark.parametrize("q_len", [1, 8, 17, 200])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("name", VARIANTS)
def test_dense(name, layout, q_len):
    variant, dtype = VARIANTS[name]
    rng = random.Random(f"{name}{layout}{q_len}")
    kv_len, sliced = rng.randint(200, 400), rng.random() < 0.5
    q, k, v = tensors(layout, q_len, kv_len, dtype=dtype, sliced=sliced)
    params = example_params(variant, requests=3, q_len=q_len, kv_len=kv_len, num_heads=6, num_kv_heads=2)
    check(variant, q, k, v, layout, **params)
    lens = {"q_lens": [rng.randint(0, q_len), 0, q_len], "kv_lens": [rng.randint(1, kv_len), kv_len, 0]}
    slots = 1 if layout == "bshd" else 2
    for r, n in enumerate(lens["kv_lens"]):
        for x in (k, v):
            x[r].narrow(slots - 1, n, kv_len - n).fill_(torch.nan)
    for r, n in enumerate(lens["q_lens"]):
        q[r].narrow(slots - 1, n, q_len - n).fill_(torch.nan)
    if rng.random() < 0.5:
        lens = {n: torch.tensor(x, dtype=rng.choice((torch.int32, torch.int64))) for n, x in lens.items()}
    check(variant, q, k, v, layout, **lens, **params)
    if variant.trace.rope is None:
        offsets = rng.choice((7, [0, 5, -3], torch.tensor([3, -20, 300])))
        check(variant, q, k, v, layout, q_offset=offsets, scale=rng.choice((0.2, -0.1)), **lens, **params)


@pytest.mark.parametrize("d,dv", HEAD_DIMS)
@pytest.mark.parametrize("q_len", [1, 9, 100])
def test_head_dims(d, dv, q_len):
    check(variants.Causal(), *tensors("bhsd", q_len, 150, d=d, dv=dv), layout="bhsd")


@pytest.mark.parametrize("heads,kv_heads", [(1, 1), (8, 8), (40, 1), (5, 5)])
def test_groups(heads, kv_heads):
    for q_len in (1, 30):
        check(variants.Causal(), *tensors("bshd", q_len, 70, heads=heads, kv_heads=kv_heads))


def test_long_keys_are_split():
    for q_len in (1, 3, 65):
        check(variants.Causal(), *tensors("bshd", q_len, 9000, batch=1, heads=2, kv_heads=1))


def test_same_input_same_bits():
    q, k, v = tensors("bshd", 40, 3000)
    outs = [ag.attention(q, k, v, variants.Causal()) for _ in range(10)]
    assert all(torch.equal(outs[0], o) for o in outs)


@pytest.mark.parametrize("q_len", [1, 40])
def test_a_graph_sees_new_lengths_and_values(q_len):
    variant = variants.SlidingWindow()
    q, k, v = tensors("bhsd", q_len, 300, dtype=F16)
    lens, window = ints([300, 20, 0]), torch.tensor(50, dtype=torch.int32, device=DEVICE)
    static = ag.attention(q, k, v, variant, layout="bhsd", kv_lens=lens, window=window)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static, lse = ag.attention(q, k, v, variant, layout="bhsd", kv_lens=lens, window=window, return_lse=True)
        uniform = ag.attention(q, k, v, variant, layout="bhsd", window=9)
    for values, wide in (([300, 20, 0], 50), ([1, 299, 64], 7), ([0, 0, 65], 400)):
        lens.copy_(torch.tensor(values)), window.fill_(wide), q.normal_()
        static.fill_(torch.nan), uniform.fill_(torch.nan)
        graph.replay()
        arguments = dict(layout="bhsd", return_lse=True)
        ref, ref_lse = ag.reference(q.cpu(), k.cpu(), v.cpu(), variant, kv_lens=values, window=wide, **arguments)
        compare(static.cpu(), ref, like=ref.to(F16) + 2e-3), compare(lse.cpu(), ref_lse, dtype=F16)
        ref, _ = ag.reference(q.cpu(), k.cpu(), v.cpu(), variant, window=9, **arguments)
        compare(uniform.cpu(), ref, like=ref.to(F16) + 2e-3)


def test_a_capture_that_would_load_is_refused():
    class Fresh(ag.Variant):
        def logits(self, s, at):
            return s * 1.5 + 0.25

    q, k, v = tensors("bshd", 1, 30)
    ag.attention(q, k, v, variants.Causal())
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(ag.UnsupportedError, match="is being captured.\n  do: call attention once"):
            ag.attention(q, k, v, Fresh())
        with pytest.raises(ag.UnsupportedError, match="kv_lens, which the host holds"):
            ag.attention(q, k, v, variants.Causal(), kv_lens=[1, 2, 3])
        q.mul(1.0)  # a graph is not empty


def test_two_streams_share_nothing():
    jobs = []
    for q_len, kv_len in ((1, 5000), (130, 900)):
        q, k, v = tensors("bshd", q_len, kv_len)
        jobs.append((torch.cuda.Stream(), q, k, v, ag.attention(q, k, v, variants.Causal()), []))
    torch.cuda.synchronize()
    for _ in range(40):
        for stream, q, k, v, _, outs in jobs:
            with torch.cuda.stream(stream):
                outs.append(ag.attention(q, k, v, variants.Causal()))
    torch.cuda.synchronize()
    assert all(torch.equal(out, wanted) for *_, wanted, outs in jobs for out in outs)


def test_lengths_out_of_range_on_the_device_spoil_their_request_alone():
    q, k, v = tensors("bhsd", 5, 40)
    for lens in ({"q_lens": ints([5, 6, 2])}, {"kv_lens": ints([40, 41, 2])}, {"kv_lens": ints([40, -1, 2])}):
        out, lse = ag.attention(q, k, v, variants.Causal(), layout="bhsd", return_lse=True, **lens)
        assert out[1].isnan().all() and lse[1].isnan().all()
        assert out[::2].isfinite().all() and not lse[::2].isnan().any()


@pytest.mark.parametrize("q_len", [1, 20, 40])
def test_huge_logits_weigh_as_the_oracle_says(q_len):
    """Finite logits near the end of f32's range, beyond it in base-2 units, weigh as the oracle says."""
    q, k, v = tensors("bshd", q_len, 150)
    huge = torch.finfo(torch.float32).max
    for bias in (
        torch.full((150,), -huge), torch.full((150,), huge), torch.where(torch.arange(150) % 3 == 0, huge, -huge),
        torch.where(torch.arange(150) > 100, 0.0, -huge), torch.where(torch.arange(150) == 70, -torch.inf, -huge),
        torch.where(torch.arange(150) < 100, -torch.inf, 0.9 * huge), torch.full((150,), -torch.inf),
    ):  # fmt: skip
        out = ag.attention(q, k, v, Biased(), bias=bias.to(DEVICE))
        ref = ag.reference(q.cpu(), k.cpu(), v.cpu(), Biased(), bias=bias)
        compare(out.cpu(), ref, like=ref.to(out.dtype) + 2e-3)


def test_bad_input():
    variant = variants.Causal()
    q, k, v = tensors("bshd", 5, 40)
    for error, message, call in (
        (ag.UnsupportedError, "float32 on CUDA", lambda: ag.attention(q.float(), k.float(), v.float(), variant)),
        (ag.ParameterError, "multiples of 8", lambda: ag.attention(torch.empty(3, 5, 6, 68, dtype=BF16, device=DEVICE)[..., :64], k, v)),
        (ag.ParameterError, "multiple of 16", lambda: ag.attention(q.new_zeros(q.numel() + 1)[1:].view(q.shape), k, v, variant)),
        (ag.ParameterError, "move them to one device", lambda: ag.attention(q, k.cpu(), v, variant)),
        (ag.ParameterError, "move them to one device", lambda: ag.attention(q.cpu(), k, v, variant)),
        (ag.ParameterError, "dtypes", lambda: ag.attention(q, k.half(), v, variant)),
        (ag.UnsupportedError, "requires grad", lambda: ag.attention(q.clone().requires_grad_(), k, v, variant)),
        (ag.ParameterError, "out is on cpu", lambda: ag.attention(q, k, v, variant, out=torch.empty(q.shape, dtype=BF16))),
        (ag.ParameterError, "out shares memory", lambda: ag.attention(q, k, v, variant, out=q)),
        (ag.ParameterError, "move it to q's device", lambda: ag.attention(q, k, v, Biased(), bias=torch.zeros(40))),
        (ag.UnsupportedError, "multiple of 16 from 32", lambda: ag.attention(*tensors("bshd", 5, 40, d=24, dv=24), variant)),
        (ag.ParameterError, "kv_lens.1. is 41", lambda: ag.attention(q, k, v, variant, kv_lens=[1, 41, 2])),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


# ---------------------------------------------------------------- batches


def paged(q_lens, kv_lens, page_size=16, heads=8, kv_heads=2, d=64):
    """Packed q, pages in random order, each request's page numbers; and the dense tensors."""
    random_ = torch.Generator().manual_seed(next(seeds))
    q, k, v = (torch.randn(len(q_lens), n, h, d, generator=random_).to(BF16)
               for n, h in ((max(q_lens), heads), (max(kv_lens), kv_heads), (max(kv_lens), kv_heads)))  # fmt: skip
    counts = [-(-n // page_size) for n in kv_lens]
    order = torch.randperm(sum(counts) + 3, generator=random_).tolist()
    cache = torch.full((2, len(order), page_size, kv_heads, d), torch.nan, dtype=BF16)
    own = []
    for r, (n, count) in enumerate(zip(kv_lens, counts)):
        own.append([order.pop() for _ in range(count)])
        for j in range(n):
            cache[0, own[r][j // page_size], j % page_size], cache[1, own[r][j // page_size], j % page_size] = k[r, j], v[r, j]
    packed = torch.cat([q[r, :n] for r, n in enumerate(q_lens)]).to(DEVICE)
    return packed, tuple(x.contiguous() for x in cache.to(DEVICE)), own, (q, k, v)


def indptr(lens):
    return [0, *itertools.accumulate(lens)]


@pytest.mark.parametrize("variant", [variants.Causal(), Sunk(), Summed()], ids=lambda v: v.name)
@pytest.mark.parametrize("q_lens", [[1, 1, 1], [3, 70, 5], [200, 1, 30]])
def test_partial_states_merge_into_the_whole(variant, q_lens):
    kv_lens, cuts = [200, 300, 64], [3, 10, 0]  # pages of the first state
    q, cache, own, (dense_q, k, v) = paged(q_lens, kv_lens)
    sinks = torch.randn(8)
    params = {"sinks": sinks.to(DEVICE)} if variant.name == "Sunk" else {}
    attn = ag.BatchAttention(variant, num_heads=8, num_kv_heads=2, head_dim=64, page_size=16, max_requests=3, max_q_tokens=300,
                             max_pages=64)  # fmt: skip
    states = []
    for first in (True, False):
        pages = [p[:c] if first else p[c:] for p, c in zip(own, cuts)]
        lens = [c * 16 if first else n - c * 16 for n, c in zip(kv_lens, cuts)]
        last = [n - (len(p) - 1) * 16 if p else 0 for n, p in zip(lens, pages)]
        starts = None if first else ints([c * 16 for c in cuts])
        positions = ints([n - m for n, m in zip(kv_lens, q_lens)])
        attn.plan(ints(indptr(q_lens)), ints(indptr([len(p) for p in pages])), ints(sum(pages, [])), ints(last),
                  q_positions=positions, kv_start=starts)  # fmt: skip
        out = torch.full((len(q), 8, 64), torch.nan, device=DEVICE)
        found, lse = attn.run(q, cache, out=out, partial=True, **params)
        assert found is out and (lse is None) == (variant.name == "Summed")
        states.append((out, lse))
    attn.check()

    softmax = variant.name != "Summed"
    ref = ag.reference(dense_q, k, v, variant, q_lens=q_lens, kv_lens=kv_lens, return_lse=softmax,
                       **{n: x.cpu() for n, x in params.items()})  # fmt: skip
    ref, ref_lse = ref if softmax else (ref, None)
    ref = torch.cat([ref[r, :n] for r, n in enumerate(q_lens)])
    outs = torch.stack([o.double().cpu() for o, _ in states])
    if not softmax:
        by_hand = outs.sum(0)
    else:
        ref_lse = torch.cat([ref_lse[r, :, :n].T for r, n in enumerate(q_lens)])
        weights = torch.stack([x.double().cpu() for _, x in states]).exp2()
        total = weights.sum(0)
        sunk = total + (sinks.double().exp() if params else 0.0)
        by_hand = (outs * weights[..., None]).sum(0) / sunk[..., None]
        if params:
            by_hand = 2 * by_hand + torch.arange(64) * 0.01
        compare(sunk.log().float(), ref_lse, dtype=F16)
    compare(by_hand.to(BF16), ref, like=ref.to(BF16) + 2e-3)
    out, lse = ag.merge_states([o for o, _ in states], [x for _, x in states] if softmax else None, variant=variant,
                               out_dtype=BF16, **params)  # fmt: skip
    compare(out.cpu(), ref, like=ref.to(BF16) + 2e-3)
    if softmax:
        compare(lse.cpu(), ref_lse, dtype=F16)


def test_the_device_plans_what_the_python_twin_plans():
    """Tiles, workers and status, record for record, over random batches of every class."""
    rng = random.Random(11)
    variant = variants.SlidingWindow()
    attn = ag.BatchAttention(variant, num_heads=8, num_kv_heads=2, head_dim=64, page_size=16, max_requests=400, max_q_tokens=4000,
                             max_pages=20000)  # fmt: skip
    engine = attn.engine
    loaded, space = engine._loaded, engine._space
    memory = engine._workspace.view(torch.uint8).flatten()
    for trial in range(60):
        n = rng.choice((1, 2, 7, 33, 350))
        most = rng.choice((1, 4, 16, 60, 300))
        q_lens = [rng.choice((0, 1, 1, most, rng.randint(1, most))) for _ in range(n)]
        while sum(q_lens) > 4000:
            q_lens[q_lens.index(max(q_lens))] = 1
        kv_lens = [rng.choice((0, 1, 64, 65, rng.randint(0, 300), rng.randint(0, 3000 if n < 50 else 300))) for _ in range(n)]
        pages = [-(-x // 16) for x in kv_lens]
        lengths = {"num_requests": n, "q_indptr": indptr(q_lens), "page_size": 16, "max_q_tokens": 4000, "max_q_len": most}
        given = {}
        if rng.random() < 0.5:
            last = [x - (p - 1) * 16 if p else 0 for x, p in zip(kv_lens, pages)]
            lengths |= {"kv_indptr": indptr(pages), "kv_last_page_len": last, "kv_capacity": max(sum(pages), 1)}
            tables = (ints(lengths["kv_indptr"]), torch.zeros(lengths["kv_capacity"], dtype=torch.int32, device=DEVICE), ints(last))
        else:
            width = max(*pages, 1)
            lengths |= {"kv_lens": kv_lens, "block_table_stride": width, "kv_capacity": width * 16}
            tables = ()
            given = {"block_table": torch.zeros(n, width, dtype=torch.int32, device=DEVICE), "kv_lens": ints(kv_lens)}
        if rng.random() < 0.5:
            starts = [16 * rng.randint(0, 99) for _ in range(n)]
            lengths["kv_starts"], given["kv_start"] = starts, ints(starts)
        if rng.random() < 0.5:
            positions = [rng.randint(-50, 3000) for _ in range(n)]
            lengths["q_positions"], given["q_positions"] = positions, ints(positions)
        if trial % 10 == 9:  # a request that is bad
            bad = rng.randrange(n)
            if "kv_lens" in lengths:
                lengths["kv_lens"] = [*kv_lens[:bad], -1, *kv_lens[bad + 1 :]]
                given["kv_lens"] = ints(lengths["kv_lens"])
            else:
                lengths["q_indptr"] = [*lengths["q_indptr"][: bad + 1], *(x + 4000 for x in lengths["q_indptr"][bad + 1 :])]
        window = rng.choice((1, 17, 500, 10**6))
        attn.plan(ints(lengths["q_indptr"]), *tables, max_q_len=most, window=window, **given)
        active = attn._planned[0].active
        reach = Reach(analyse(variant.trace.mask), {"window": window}, 8, 2)
        workers = [w if i in active else 0 for i, w in enumerate(loaded.workers)]
        plans, status = plan(loaded.kernels.plan.config, Lengths(**lengths), reach, workers,
                                      [c.max_tiles for c in space.classes])  # fmt: skip
        found_status = engine.status()
        assert bool(found_status) == bool(status), (trial, found_status, status)
        for i in active:
            for kind, wanted in plans[i].pack().items():
                at = space.classes[i].lists[kind]
                found = bytes(memory[at : at + len(wanted)].cpu().tolist())
                size = TILE.size if kind == "tiles" else WORKER.size
                wrong = [j for j in range(0, len(wanted), size) if found[j : j + size] != wanted[j : j + size]]
                assert not wrong, (trial, i, kind, len(wrong), wrong[0] // size)
