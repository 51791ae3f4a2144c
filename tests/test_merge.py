"""merge_states against one pass of the oracle over all keys, and at the edges of LSE.

Each test runs on the CPU, with the CUDA kernel's text compiled for this host ("text"), and, marked gpu, on a GPU.
"""

from __future__ import annotations

import math
from itertools import count

import pytest
import torch
from compare import compare
from on_host import kernel

import attngen as ag
from attngen import cuda, merge
from attngen.variants import Sigmoid, Sinks, SoftCap

INF, NAN = math.inf, math.nan
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DEVICES = ["cpu", "text", pytest.param("cuda", marks=pytest.mark.gpu)]
seeds = count()


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where tensors go; "text" has the CPU's tensors served by the kernel's text."""
    if request.param != "text":
        return torch.device(request.param)

    def load(index, dtype, out_dtype, dv):
        special = merge.specialise(merge.config_of("90a", dtype, out_dtype, dv))
        return special, kernel(special)

    monkeypatch.setattr(merge, "_merge_cpu", merge._merge_cuda)
    monkeypatch.setattr(merge, "_load", load)
    monkeypatch.setattr(cuda, "current_stream", lambda index: 0)
    return torch.device("cpu")


def states(n, device, tokens=7, heads=3, dv=40, dtype=F32):
    random = torch.Generator().manual_seed(next(seeds))
    outs = torch.randn(n, tokens, heads, dv, generator=random).to(dtype)
    lses = 3 * torch.randn(n, tokens, heads, generator=random)
    lses[torch.rand(n, tokens, heads, generator=random) < 0.2] = -INF
    outs[lses == -INF] = NAN
    return outs.to(device), lses.to(device)


def expected(outs, lses, base):
    """In float64, by the definition."""
    outs, lses = outs.double().cpu(), lses.double().cpu() * (math.log(2) if base == 2 else 1)
    lse = lses.logsumexp(0)
    weights = torch.where(lses == -INF, 0.0, (lses - torch.where(lse == -INF, 0.0, lse)).exp())
    out = (torch.where(weights[..., None] == 0, 0.0, outs) * weights[..., None]).sum(0)
    return out, lse / (math.log(2) if base == 2 else 1)


@pytest.mark.parametrize("base", ["e", 2])
@pytest.mark.parametrize(("dtype", "out_dtype"), [(F32, None), (BF16, None), (F16, None), (F32, BF16), (BF16, F32)])
@pytest.mark.parametrize("n", [1, 2, 5, 8, 9, 21])
def test_merges(n, dtype, out_dtype, base, device):
    outs, lses = states(n, device, dtype=dtype)
    ref, ref_lse = expected(outs, lses, base)
    results = [
        ag.merge_states(outs, lses, base=base, out_dtype=out_dtype),
        ag.merge_states(list(outs), list(lses), base=base, out_dtype=out_dtype),
        # FlashInfer's order, [tokens, n, heads, head_dim], seen from ours; and states of unequal strides
        ag.merge_states(outs.transpose(0, 1).contiguous().transpose(0, 1), lses.transpose(1, 2).contiguous().transpose(1, 2),
                        base=base, out_dtype=out_dtype),
        ag.merge_states([torch.nn.functional.pad(t, (0, 8 * i))[..., :40] for i, t in enumerate(outs)], list(lses), base=base,
                        out_dtype=out_dtype),
    ]  # fmt: skip
    for out, lse in results:
        assert out.dtype == (out_dtype or dtype) and lse.dtype == F32 and out.is_contiguous()
        compare(out.cpu(), ref)
        compare(lse.cpu(), ref_lse)
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


EXTREMES = {
    "all empty": ([-INF, -INF], [0, 0], -INF, 0.0), "huge": ([1e30, 1e30], [0.5, 0.5], 1e30, 2.0),
    "huge and small": ([1e30, -1e30], [1, 0], 1e30, 1.0), "small": ([-1e30, -1e30, -INF], [0.5, 0.5, 0], -1e30, 2.0),
    "opposite ends of float32": ([3.4e38, -3.4e38], [1, 0], 3.4e38, 1.0), "infinite": ([INF, 3.0, INF], [0.5, 0, 0.5], INF, 2.0),
    "far below": ([0.0, -200.0], [1, 0], 0.0, 1.0), "one alone": ([-INF, 7.25, -INF], [0, 1, 0], 7.25, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("base", ["e", 2])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_lses(name, base, device):
    lse, weights, merged, total = EXTREMES[name]
    n = len(lse)
    outs = torch.randn(n, 2, 3, 16)
    lses = torch.tensor(lse)[:, None, None].repeat(1, 2, 3)
    ref = sum(w * o for w, o in zip(weights, outs.double()))
    outs[torch.tensor(lse) == -INF] = NAN  # an empty state may hold anything
    if name in ("huge and small", "far below", "opposite ends of float32"):
        outs[1] = INF  # 0 times infinity is no NaN either
    out, found = ag.merge_states(outs.to(device), lses.to(device), base=base)
    compare(out.cpu(), ref)
    wanted = merged + (math.log(total) if base == "e" else math.log2(total)) if abs(merged) < 1e9 else merged
    torch.testing.assert_close(found.cpu(), torch.full((2, 3), wanted), rtol=1e-6, atol=0)


def test_a_nan_is_not_hidden(device):
    outs, lses = torch.randn(2, 1, 3, 8), torch.zeros(2, 1, 3)
    lses[1, 0, 0], outs[0, 0, 1, 3] = NAN, NAN
    out, lse = (x.cpu() for x in ag.merge_states(outs.to(device), lses.to(device)))
    assert out[0, 0].isnan().all() and lse[0, 0].isnan() and out[0, 1].isnan().sum() == 1 and out[0, 2].isfinite().all()


def test_no_tokens(device):
    out, lse = ag.merge_states(torch.empty(2, 0, 3, 8, device=device), torch.empty(2, 0, 3, device=device))
    assert out.shape == (0, 3, 8) and lse.shape == (0, 3)


class Gate(ag.Variant):
    """Reads the request, positions and the element on the way out."""

    gate: ag.Tensor("requests", "heads")
    power: ag.Scalar = 0.5

    def output(self, o, at):
        near = ag.where(at.q % 3 == 0, 1.0, self.power)
        return o * ag.sigmoid(self.gate[at.request, at.head]) * near + ag.where(at.dim < 2, ag.cast(at.kv_len, float) * 0.01, 0.0)


class TokenSink(ag.Variant):
    bias: ag.Tensor("q_tokens", "kv_heads")

    def sink(self, at):
        return ag.where(at.q_len > 3, self.bias[at.q_token, at.kv_head], -1.0)


class Causal(ag.Variant):
    def mask(self, at):
        return at.kv <= at.q


FINISHED = {
    "plain": (Causal(), lambda n: {}),
    "sinks": (ag.compose(Causal(), Sinks()), lambda n: {"sinks": torch.randn(4) * 3}),
    "gate": (ag.compose(Causal(), Gate()), lambda n: {"gate": torch.randn(2, 4), "power": 0.25}),
    "sink of a token, gate": (ag.compose(TokenSink(), Gate(), SoftCap(5.0)),
                              lambda n: {"gate": torch.randn(2, 4).half(), "bias": torch.randn(n, 2).bfloat16()}),
    "sigmoid": (ag.compose(Sigmoid(-1.0), Causal()), lambda n: {}),
    "sigmoid, gate": (ag.compose(Sigmoid(-1.0), Gate()), lambda n: {"gate": torch.randn(2, 4)}),
}  # fmt: skip


class WithoutEnds:
    """The oracle's raw state of one part of the keys: no sink, no output hook."""

    def __init__(self, variant):
        self.trace = variant.trace
        self.variant = variant

    def __call__(self, q, k, v, offset, params):
        from dataclasses import replace

        from attngen.interp import reference_attention

        trace = replace(self.trace, sink=None, output=None)
        used = {name: params.get(name, self.variant.values.get(name)) for name in trace.used()}
        return reference_attention(trace, q, k, v, q_lens=[q.shape[1]], kv_lens=[k.shape[1]], q_offsets=[offset],
                                   scale=q.shape[3] ** -0.5, params=used)  # fmt: skip


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("name", FINISHED)
def test_finishes_raw_states_as_one_pass_would(name, parts, device):
    variant, make = FINISHED[name]
    q_lens, kv_lens, heads, kv_heads, d, dv = [3, 9], [40, 23], 4, 2, 32, 24
    params = make(sum(q_lens))
    random = torch.Generator().manual_seed(next(seeds))
    outs, lses = [[] for _ in range(parts)], [[] for _ in range(parts)]
    wanted, wanted_lse, start = [], [], 0
    state = WithoutEnds(variant)
    softmax = variant.trace.weight is None
    for r, (n, m) in enumerate(zip(q_lens, kv_lens)):
        q, k, v = (torch.randn(1, s, h, e, generator=random) for s, h, e in ((n, heads, d), (m, kv_heads, d), (m, kv_heads, dv)))
        cuts = [0, *torch.randperm(m, generator=random)[: parts - 1].sort().values.tolist(), m]
        for i, (a, b) in enumerate(zip(cuts, cuts[1:])):
            out, lse = state(q, k[:, a:b], v[:, a:b], m - n - a, params)
            outs[i].append(out[0])
            lses[i].append(lse[0].T / math.log(2) if softmax else None)
        # The oracle of one request: its rows of what is indexed by request or token.
        own = {x: t[r : r + 1] if x == "gate" else t[start : start + n] if x == "bias" else t for x, t in params.items()}
        result = ag.reference(q, k, v, variant, return_lse=softmax, **own)
        wanted.append(result[0][0] if softmax else result[0])
        wanted_lse += [result[1][0].T] if softmax else []
        start += n
    given = {x: t.to(device) if isinstance(t, torch.Tensor) else t for x, t in params.items()}
    batch = dict(q_indptr=torch.tensor([0, 3, 12], dtype=torch.int32), kv_lens=torch.tensor(kv_lens, dtype=torch.int32))
    batch = {x: t.to(device) for x, t in batch.items()} | {"num_kv_heads": kv_heads}
    packed = [torch.cat(o).float().to(device) for o in outs]
    sums = [torch.cat(x).float().to(device) for x in lses] if softmax else None
    out, lse = ag.merge_states(packed, sums, variant=variant, **batch, **given)
    compare(out.cpu(), torch.cat(wanted), like=torch.cat(wanted) + 1e-5)
    assert lse is None if not softmax else compare(lse.cpu(), torch.cat(wanted_lse)) is None
    if softmax:  # states in natural logarithms, positions given, another result dtype
        batch["q_positions"] = torch.tensor([m - n for n, m in zip(q_lens, kv_lens)], device=device)
        natural = [x * math.log(2) for x in sums]
        out, lse = ag.merge_states(packed, natural, base="e", variant=variant, out_dtype=F16, **batch, **given)
        compare(out.cpu(), torch.cat(wanted)), compare(lse.cpu(), torch.cat(wanted_lse))


def test_sinks_of_rows_without_keys(device):
    """A fully masked row: out 0, LSE the sink; without a sink -inf. And a rank of a tensor-parallel group."""
    outs = torch.full((2, 3, 4, 8), NAN, device=device)
    lses = torch.full((2, 3, 4), -INF, device=device)
    sinks = torch.tensor([1.0, -INF, 1e30, -1e30, 5.0, 6.0, 7.0, 8.0], device=device)
    out, lse = ag.merge_states(outs, lses, variant=Sinks(), sinks=sinks[:4])
    assert (out == 0).all() and torch.equal(lse, sinks[:4].expand(3, 4))
    out, lse = ag.merge_states(outs, lses, variant=Sinks(), sinks=sinks, head_offset=4, total_heads=8)
    assert (out == 0).all() and torch.equal(lse, sinks[4:].expand(3, 4))
    # Beside a logit of 1e30 an LSE cannot hold the sum, the weights do.
    out, lse = ag.merge_states(torch.ones(1, 1, 1, 8, device=device), torch.full((1, 1, 1), 1e30, device=device), base="e",
                               variant=Sinks(), sinks=sinks[2:3])  # fmt: skip
    assert torch.equal(out.cpu(), torch.full((1, 1, 8), 0.5)) and lse.item() == pytest.approx(1e30)


def good(**change):
    outs, lses = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3)
    given = {"outs": outs, "lses": lses} | change
    return {name: value(outs, lses) if callable(value) else value for name, value in given.items()}


GATE = {"variant": Gate(), "gate": torch.randn(1, 3), "q_indptr": [0, 4], "kv_lens": [9]}
ERRORS = {
    "rank": (dict(outs=lambda o, s: o[0]), "4 dimensions"),
    "no states": (dict(outs=[], lses=[]), "one tensor or more"),
    "dtype": (dict(outs=lambda o, s: o.double()), "float64"),
    "dtypes differ": (dict(outs=lambda o, s: [o[0], o[1].half()]), "outs\\[1\\] is torch.float16"),
    "shapes differ": (dict(outs=lambda o, s: [o[0], o[1, :3]]), "outs\\[1\\]"),
    "head_dim_v": (dict(outs=lambda o, s: o[..., :4]), "multiple of 8"),
    "last stride": (dict(outs=lambda o, s: torch.randn(2, 4, 8, 3).transpose(2, 3)), "contiguous last dimension"),
    "lses of half": (dict(lses=lambda o, s: s.half()), "torch.float16"),
    "an lse short": (dict(lses=lambda o, s: s[:1]), "2 outs and 1 lses"),
    "no lses": (dict(lses=None), "lses is None"),
    "base": (dict(base=10), "base 10"),
    "out_dtype": (dict(out_dtype=torch.int32), "out_dtype"),
    "params without a variant": (dict(sinks=torch.zeros(3)), "sinks without a variant"),
    "lses under a weight hook": (dict(variant=Sigmoid(0.0)), "has.* none|have none"),
    "missing parameter": (dict(variant=Sinks()), "needs `sinks`"),
    "unknown parameter": (dict(variant=Sinks(), sinks=torch.zeros(3), cap=3.0), "no parameter `cap`"),
    "misplaced parameter": (dict(variant=ag.compose(SoftCap(3.0), Sinks()), sinks=torch.zeros(3), cap=3.0), "neither sink nor"),
    "heads of a parameter": (dict(variant=Sinks(), sinks=torch.zeros(4)), "4 entries on axis 'heads'"),
    "a rank's slice with head_offset": (dict(variant=Sinks(), sinks=torch.zeros(3), head_offset=3, total_heads=6), "required 6"),
    "dtype of a parameter": (dict(variant=Sinks(), sinks=torch.zeros(3).double()), "float64"),
    "no q_indptr": (GATE | dict(q_indptr=None), "q_indptr= .for at.request."),
    "no kv_lens": (GATE | dict(kv_lens=None), "kv_lens= .for at"),
    "no num_kv_heads": (dict(variant=TokenSink(), bias=torch.zeros(4, 1), q_indptr=[0, 4]), "num_kv_heads= .for at.kv_head."),
    "kv_lens of other requests": (GATE | dict(kv_lens=[9, 9]), "kv_lens is"),
    "heads past the total": (dict(variant=Sinks(), sinks=torch.zeros(4), head_offset=2, total_heads=4), "to lie within"),
    "grad": (dict(outs=lambda o, s: o.requires_grad_()), "requires grad"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    change, match = ERRORS[name]
    given = good(**change)
    with pytest.raises(ag.AttngenError, match=match):
        ag.merge_states(given.pop("outs"), given.pop("lses"), **given)
    ag.merge_states(**good())


def test_kernels_that_do_not_exist():
    with pytest.raises(ag.UnsupportedError, match="multiple of 8"):
        merge.compile(dtype=F32, head_dim_v=20, arch="90a")
    with pytest.raises(ag.UnsupportedError, match="sm_75"):
        merge.compile(dtype=F32, head_dim_v=64, arch="75")


@pytest.mark.parametrize("device", [DEVICES[0], DEVICES[2]], indirect=True)
def test_one_graph_under_torch_compile(device):
    torch._dynamo.reset()
    with torch.no_grad():
        call = torch.compile(lambda o, s: ag.merge_states(o, s, base=2, out_dtype=BF16), backend="aot_eager", fullgraph=True)
        outs, lses = states(3, device)
        wanted = ag.merge_states(outs, lses, base=2, out_dtype=BF16)
        for found in (call(outs, lses), call(list(outs), list(lses))):
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted))
        result = torch.library.opcheck(merge._operator, (list(outs.nan_to_num()), list(lses), "2", None))
        assert set(result.values()) == {"SUCCESS"}
        broken = torch.compile(lambda o, s, x: ag.merge_states(o * 1, s, variant=Sinks(), sinks=x)[1] * 2, backend="aot_eager")
        sinks = torch.randn(3, device=device)
        assert torch.equal(broken(outs, lses, sinks), ag.merge_states(outs, lses, variant=Sinks(), sinks=sinks)[1] * 2)


@pytest.mark.gpu
def test_a_graph_sees_new_states():
    """With a sink and an output hook whose parameters change too; a capture does not load."""
    variant = ag.compose(Sinks(), Gate())
    outs, lses = states(3, "cuda", dv=72)
    sinks, gate = torch.randn(3, device="cuda"), torch.randn(2, 3, device="cuda")
    power = torch.tensor(0.5, device="cuda")
    indptr, lens = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 3, 7], [10, 20]))

    def step():
        return ag.merge_states(outs, lses, variant=variant, q_indptr=indptr, kv_lens=lens, sinks=sinks, gate=gate, power=power)

    with pytest.raises(ag.UnsupportedError, match="being captured"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            step()
    torch.cuda.synchronize()
    merge.compile(dtype=F32, head_dim_v=72)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    for _ in range(2):
        for t in (outs, lses, sinks, gate):
            t.copy_(torch.randn_like(t))
        power.mul_(0.5), lens.add_(3)
        graph.replay()
        found = out.clone(), lse.clone()
        assert all(torch.equal(a, b) for a, b in zip(found, step()))
        host = ag.merge_states(outs.cpu(), lses.cpu(), variant=variant, q_indptr=indptr.cpu(), kv_lens=lens.cpu(),
                               sinks=sinks.cpu(), gate=gate.cpu(), power=power.item())  # fmt: skip
        for a, b in zip(found, host):
            compare(a.cpu(), b.double())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sinks", "sigmoid, gate"])
def test_finishes_partial_runs(name):
    """BatchAttention.run(partial=True) over the first three pages of each request, then over the others."""
    variant, make = FINISHED[name]
    variant = ag.compose(variant, SoftCap(20.0))
    q_lens, kv_lens, cut, heads, kv_heads, d = [30, 1], [100, 300], 48, 4, 2, 128
    params = make(sum(q_lens))
    q, k, v = (torch.randn(2, n, h, d).to(BF16) for n, h in ((30, heads), (304, kv_heads), (304, kv_heads)))
    caches = tuple(t.cuda().view(-1, 16, kv_heads, d) for t in (k, v))
    table = torch.arange(38, dtype=torch.int32, device="cuda").view(2, 19)
    attn = ag.BatchAttention(variant, num_heads=heads, num_kv_heads=kv_heads, head_dim=d, page_size=16, max_requests=2,
                             max_q_tokens=64, max_pages=64)  # fmt: skip
    packed = torch.cat([q[0], q[1, :1]]).cuda()
    given = {x: t.cuda() if isinstance(t, torch.Tensor) else t for x, t in params.items()}
    q_indptr, q_positions = ([0, 30, 31], [70, 299])
    states = []
    for pages, lens, start in ((table, [cut, cut], [0, 0]), (table[:, 3:], [n - cut for n in kv_lens], [cut, cut])):
        attn.plan(q_indptr, block_table=pages, kv_lens=lens, q_positions=q_positions, kv_start=start)
        states.append(attn.run(packed, caches, partial=True, **given))
    attn.check()
    softmax = variant.trace.weight is None
    read = frozenset().union(*(node.params for node in (variant.trace.sink, variant.trace.output) if node is not None))
    out, lse = ag.merge_states(
        [o for o, _ in states], [x for _, x in states] if softmax else None, variant=variant, q_indptr=q_indptr, kv_lens=kv_lens,
        **{x: t for x, t in given.items() if x in read},
    )  # fmt: skip
    result = ag.reference(q, k, v, variant, q_lens=q_lens, kv_lens=kv_lens, return_lse=softmax, **params)
    ref = result[0] if softmax else result
    ref = torch.cat([ref[0], ref[1, :1]])
    compare(out.cpu(), ref, dtype=BF16, like=ref.to(BF16) + 2e-3)
    if softmax:
        compare(lse.cpu(), torch.cat([result[1][0].T, result[1][1, :, :1].T]), dtype=F16)
