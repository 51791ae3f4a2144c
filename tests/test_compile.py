"""torch.compile and torch.export: calls are operators in one graph, with the bits of the eager call and no needless graphs."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import attngen as ag
from attngen import run
from attngen.paths import PACKAGE
from attngen.variants import ALiBi, Causal, Document, Gemma2, Sigmoid, Sinks, SlidingWindow, SoftCap


class Bias(ag.Variant):
    """A parameter that every call must give."""

    bias: ag.Tensor("heads")

    def logits(self, s, at):
        return s + self.bias[at.head]


GEMMA, CAUSAL, BIAS = Gemma2(), Causal(), Bias()


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def inputs(batch=2, q_len=3, kv_len=40, heads=4, kv_heads=2, d=32, dtype=torch.float32):
    shapes = ((q_len, heads, d), (kv_len, kv_heads, d), (kv_len, kv_heads, d))
    return tuple(torch.randn(batch, *shape).to(dtype) for shape in shapes)


def compiled(function, backend="aot_eager", **options):
    """The function in one graph, and the count of graphs made."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def same(found, expected):
    found, expected = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    return len(found) == len(expected) and all(
        torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype for a, b in zip(found, expected)
    )


CALLS = {
    "plain": dict(),
    "class": dict(variant=Causal),
    "class-lse": dict(variant=Gemma2, return_lse=True),
    "values": dict(variant=Gemma2(window=5), cap=3.5, return_lse=True),
    "int-for-float": dict(variant=GEMMA, cap=3),
    "0-dim": dict(variant=GEMMA, cap=torch.tensor(3.5), window=torch.tensor(7)),
    "lens": dict(variant=CAUSAL, q_lens=[3, 1], kv_lens=torch.tensor([40, 11]), return_lse=True),
    "offset": dict(variant=CAUSAL, q_offset=9, scale=0.3),
    "offsets": dict(variant=CAUSAL, q_offset=torch.tensor([9, -1], dtype=torch.int32)),
    "tensor": dict(variant=BIAS, bias=torch.randn(4)),
    "tensor-bf16": dict(variant=BIAS, bias=torch.randn(4).bfloat16()),
    "bound-tensor": dict(variant=Bias(bias=torch.randn(4))),
    "documents": dict(variant=Document() & CAUSAL, doc=torch.arange(40).div(9, rounding_mode="floor").expand(2, 40)),
    "sinks": dict(variant=ag.compose(SoftCap(5.0), Sinks()), sinks=torch.randn(4), return_lse=True),
    "weight": dict(variant=Sigmoid(), bias=-2.0),
    "bf16": dict(variant=CAUSAL, dtype=torch.bfloat16, return_lse=True),
    "bhsd": dict(variant=CAUSAL, layout="bhsd", return_lse=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_bits_of_the_eager_call(name):
    options = dict(CALLS[name])
    q, k, v = inputs(dtype=options.pop("dtype", torch.float32))
    if options.get("layout") == "bhsd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    call, counter = compiled(lambda q, k, v: ag.attention(q * 2, k, v + 1, **options))
    assert same(call(q, k, v), ag.attention(q * 2, k, v + 1, **options))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["class-lse", "0-dim", "lens", "sinks", "bhsd"])
@pytest.mark.parametrize("given_out", [False, True])
def test_operators_pass_opcheck(name, given_out, monkeypatch):
    called = []
    for operator in ("_attention_op", "_attention_out_op"):
        real = getattr(run, operator)
        monkeypatch.setattr(run, operator, lambda *a, real=real: (called.append((real, a)), real(*a))[1])
    monkeypatch.setattr(run, "is_compiling", lambda: True)
    q, k, v = inputs()
    if name == "bhsd":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    ag.attention(q, k, v, **CALLS[name], **({"out": torch.empty(q.shape)} if given_out else {}))
    monkeypatch.undo()
    ((operator, arguments),) = called
    assert ("attention_out" in str(operator)) == given_out
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_new_values_make_no_new_graph():
    call, counter = compiled(lambda q, k, v, cap, window: ag.attention(q, k, v, GEMMA, cap=cap, window=window))
    q, k, v = inputs()
    outs = set()
    for i, (cap, window) in enumerate([(30.0, 9), (2.5, 12), (0.25, 30), (1e-3, 5), (1e30, 33)]):
        out = call(q, k, v, cap, window)
        assert same(out, ag.attention(q, k, v, GEMMA, cap=cap, window=window))
        assert counter.frame_count == (1 if i == 0 else 2)  # the second value makes Dynamo see that it varies
        outs.add(out.sum().item())
    assert len(outs) == 5


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_new_kv_len_makes_no_new_graph(backend):
    call, counter = compiled(
        lambda q, k, v, kv_lens: ag.attention(q, k, v, CAUSAL, kv_lens=kv_lens, return_lse=True), backend
    )
    for kv_len in (40, 41, 7, 300):
        q, k, v = inputs(kv_len=kv_len)
        for t in (k, v):
            torch._dynamo.mark_dynamic(t, 1)
        kv_lens = torch.tensor([kv_len, kv_len // 2])
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert same(call(q, k, v, kv_lens), ag.attention(q, k, v, CAUSAL, kv_lens=kv_lens, return_lse=True))
    assert counter.frame_count == 1


def test_equal_variants_share_a_graph_and_others_do_not():
    call, counter = compiled(lambda q, k, v, variant: ag.attention(q, k, v, variant))
    q, k, v = inputs()
    first = Gemma2(window=5)
    for variant, graphs in ((first, 1), (Gemma2(window=9), 2), (Gemma2(window=11), 2), (first, 2), (CAUSAL, 3), (Causal(), 3)):
        assert same(call(q, k, v, variant), ag.attention(q, k, v, variant))
        assert counter.frame_count == graphs
    del first, variant  # a graph outlives the variant it was made with
    assert same(call(q, k, v, Gemma2(window=6)), ag.attention(q, k, v, Gemma2(window=6)))
    assert counter.frame_count == 3


class Scaled(ag.Variant):
    scale = 0.1


class ScaledOtherwise(ag.Variant):
    scale = 0.2


class Rotated(ag.Variant):
    theta: ag.Const = 1e4

    def rope(self):
        return ag.RoPE(self.theta)


@pytest.mark.parametrize("one, other", [(Scaled(), ScaledOtherwise()), (Rotated(), Rotated(theta=5e5))])
def test_what_the_kernels_key_leaves_out_is_in_the_graphs(one, other):
    call, _ = compiled(lambda q, k, v, variant: ag.attention(q, k, v, variant))
    q, k, v = inputs()
    for variant in (one, other):
        assert same(call(q, k, v, variant), ag.attention(q, k, v, variant))
    assert not same(call(q, k, v, one), call(q, k, v, other))


class Layer(torch.nn.Module):
    def __init__(self, variant, d=64, heads=4):
        super().__init__()
        self.variant, self.heads = variant, heads
        self.qkv, self.out = torch.nn.Linear(d, 3 * d), torch.nn.Linear(d, d)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return x + self.out(ag.attention(q, k, v, self.variant).flatten(2))


def test_a_model_of_two_layers():
    model = torch.nn.Sequential(Layer(Gemma2(window=5)), Layer(ag.compose(SoftCap(3.0), ALiBi())))
    call, counter = compiled(model, "inductor")
    for length in (20, 33, 50):
        x = torch.randn(2, length, 64)
        torch.testing.assert_close(call(x), model(x), rtol=1e-4, atol=1e-4)  # inductor's own code around it
    assert counter.frame_count == 2


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_out_and_a_cache_that_the_graph_writes(backend):
    """Written tensors are seen by what follows, in order."""

    def step(x, cache, position, out):
        cache.index_copy_(1, position, x)
        ag.attention(x, cache, cache, CAUSAL, kv_lens=position.repeat(2) + 1, out=out)
        return out * 2

    call, _ = compiled(step, backend)
    caches = [torch.full((2, 8, 2, 32), torch.nan) for _ in range(2)]
    outs = [torch.full((2, 1, 2, 32), torch.nan) for _ in range(2)]
    for i in range(8):
        x, position = torch.randn(2, 1, 2, 32), torch.tensor([i])
        results = [f(x, cache, position, out) for f, cache, out in zip((call, step), caches, outs)]
        assert same(*results) and same(*outs) and torch.equal(*(c[:, : i + 1] for c in caches))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Serving:
    """A cache of 20 pages and a BatchAttention over it, planned for batches of decoding requests."""

    def __init__(self, variant, device):
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.device = device
        shape = (20, 16, 2, 64)
        self.k, self.v = (torch.randn(shape, device=device).to(self.dtype) for _ in range(2))
        self.attn = ag.BatchAttention(
            variant, num_heads=4, num_kv_heads=2, head_dim=64, page_size=16, dtype=self.dtype, device=device, max_requests=4,
            max_q_tokens=8, max_pages=20,
        )  # fmt: skip

    def plan(self, kv_lens, **params):
        self.table = torch.randperm(20, device=self.device)[: len(kv_lens) * 4].view(-1, 4).int()
        self.kv_lens = torch.tensor(kv_lens, dtype=torch.int32, device=self.device)
        self.attn.plan(block_table=self.table, kv_lens=self.kv_lens, **params)

    def new(self, *shape):
        return torch.randn(4, *shape, 64, device=self.device).to(self.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("out", [False, True])
def test_batch_runs_follow_the_plan_in_one_graph(device, out):
    serving = Serving(Gemma2(), device)
    outs = [torch.full((4, 4, 64), torch.nan, device=device, dtype=serving.dtype) for _ in range(2)] if out else [None] * 2

    def step(q, k, v, cap, out):
        return serving.attn.run(q * 2, (k, v), cap=cap, return_lse=True, out=out)

    call, counter = compiled(step)
    found = []
    for kv_lens, cap, window in (([40, 3, 64, 17], 30.0, 9), ([1, 33, 2, 50], 2.5, 20), ([5, 5, 64, 60], 0.5, 64)):
        serving.plan(kv_lens, window=window)
        q = serving.new(4)
        results = [f(q, serving.k, serving.v, cap, o) for f, o in zip((call, step), outs)]
        assert same(*results) and not results[0][0].isnan().any()
        found.append(results[0][0].clone())
    assert counter.frame_count == 2  # the second by the cap
    if out:
        assert torch.equal(*outs)


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_appends_and_attends(device):
    """Rotated keys are written into pages and read by the run that follows, in one graph."""
    serving, rope = Serving(Causal(), device), ag.RoPE(1e4)

    def step(q, k, v, k_cache, v_cache, table, kv_lens):
        request = torch.arange(4, dtype=torch.int32, device=q.device)
        ag.append_kv(k, v, (k_cache, v_cache), positions=kv_lens - 1, request_of=request, block_table=table, rope=rope)
        return serving.attn.run(q, (k_cache, v_cache), return_lse=True)

    call, counter = compiled(step)
    caches = [[serving.k.clone(), serving.v.clone()] for _ in range(2)]
    for kv_lens in ([40, 3, 64, 17], [41, 4, 1, 18]):
        serving.plan(kv_lens)
        new = serving.new(4), serving.new(2), serving.new(2)
        results = [f(*new, *cache, serving.table, serving.kv_lens) for f, cache in zip((call, step), caches)]
        assert same(*results) and same(*map(tuple, caches))
        assert not torch.equal(caches[0][0], serving.k)
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_partial_states_of_a_graph(device="cuda"):
    for variant, with_lse in ((ag.compose(SoftCap(5.0), Sinks(sinks=torch.randn(4, device=device))), True), (Sigmoid(bias=-2.0), False)):
        serving = Serving(variant, device)
        serving.plan([40, 3, 64, 17])
        q = serving.new(4)
        call, _ = compiled(lambda q: serving.attn.run(q, (serving.k, serving.v), partial=True))
        (out, lse), (expected, expected_lse) = call(q), serving.attn.run(q, (serving.k, serving.v), partial=True)
        assert out.dtype == torch.float32 and same(out, expected)
        assert same(lse, expected_lse) if with_lse else lse is expected_lse is None


@pytest.mark.parametrize("device", DEVICES)
def test_batch_operators_pass_opcheck(device):
    from attngen import append, batch

    serving = Serving(Gemma2(), device)
    serving.plan([40, 3, 64, 17], window=9)
    q, k, v = serving.new(4), serving.new(2), serving.new(2)
    inputs = (serving.attn._handle, q, serving.k, serving.v, [torch.tensor(5.0, dtype=torch.float64)], [], ["cap"], True, False)
    slots = torch.tensor([3, 70, -1, 301], device=device)
    for operator, arguments in (
        (batch._run_op, inputs),
        (batch._run_out_op, (*inputs, torch.empty_like(q))),
        (append._operator, (k, v, serving.k, serving.v, slots, *[None] * 6, "NHD", None)),
    ):
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("device", DEVICES)
def test_batch_errors(device):
    serving = Serving(Gemma2(), device)
    q = serving.new(4)
    call, _ = compiled(lambda attn, q, k, v: attn.run(q, (k, v)))
    with pytest.raises(ag.ParameterError, match="run before plan"):
        call(serving.attn, q, serving.k, serving.v)
    serving.plan([1, 2, 3, 4])
    with pytest.raises(Exception, match="plan inside"):
        compiled(lambda lens: serving.attn.plan(None, lens))[0](torch.ones(3, dtype=torch.int32, device=device))
    with pytest.raises(ag.ParameterError, match=r"required \[tokens, 4, 64\]"):
        call(serving.attn, q[:, :2], serving.k, serving.v)
    with pytest.raises(ag.ParameterError, match="BatchAttention 1, which this process no longer has"):
        torch.ops.attngen.batch_run(1, q, serving.k, serving.v, [], [], [], False, False)
    with torch.enable_grad(), pytest.raises(Exception, match="requires grad"):
        call(serving.attn, q.clone().requires_grad_(), serving.k, serving.v)


@pytest.mark.gpu
def test_inductors_cuda_graphs_leave_batches_and_dense_calls_right():
    """mode="reduce-overhead" replays launches: those of BatchAttention must not be among them."""
    serving = Serving(Gemma2(), "cuda")
    call = torch.compile(
        lambda q, k, v, cap: serving.attn.run(q * 2, (k, v), cap=cap) + 1, mode="reduce-overhead", fullgraph=True
    )
    dense = torch.compile(lambda q, k: ag.attention(q * 2, k, k, GEMMA, return_lse=True)[0] + 1, mode="reduce-overhead", fullgraph=True)
    for i, kv_lens in enumerate(([40, 3, 64, 17], [1, 33, 2, 50], [5, 5, 64, 60], [9, 1, 1, 64], [64, 2, 30, 8])):
        serving.plan(kv_lens, window=9 + i)
        q, cap = serving.new(4), torch.tensor(30.0 - 5 * i, device="cuda")
        expected = serving.attn.run(q * 2, (serving.k, serving.v), cap=cap) + 1
        torch.testing.assert_close(call(q, serving.k, serving.v, cap), expected, rtol=0, atol=0)
        q, k = (torch.randn(2, n, 2, 64, device="cuda", dtype=torch.bfloat16) for n in (3, 50))
        expected = ag.attention(q * 2, k, k, GEMMA) + 1
        torch.testing.assert_close(dense(q, k).clone(), expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_dense_calls_on_cuda():
    q, k, v = (t.cuda().bfloat16() for t in inputs(d=64))
    kv_lens = torch.tensor([40, 11], dtype=torch.int32, device="cuda")
    bias = torch.randn(4, device="cuda")

    def function(q, k, v, cap, bias):
        first, lse = ag.attention(q, k, v, GEMMA, cap=cap, window=9, kv_lens=kv_lens, return_lse=True)
        return ag.attention(first, k, v, BIAS, bias=bias, q_offset=2), lse

    call, counter = compiled(function, "inductor")
    for cap in (30.0, 2.5, 0.5, torch.tensor(4.0, device="cuda")):
        assert same(call(q, k, v, cap, bias), function(q, k, v, cap, bias))
    assert counter.frame_count == 3  # 30, other floats, tensors


def bad_shape(q, k, v):
    return ag.attention(q, k[:, 1:], v, CAUSAL)


def unknown(q, k, v):
    return ag.attention(q, k, v, GEMMA, slope=1.0)


def missing(q, k, v):
    return ag.attention(q, k, v, BIAS)


def no_number(q, k, v):
    return ag.attention(q, k, v, GEMMA, cap="30")


def made_inside(q, k, v):
    return ag.attention(q, k, v, SlidingWindow(4))


def composed_inside(q, k, v):
    return ag.attention(q, k, v, CAUSAL & GEMMA)


def wrong_out(q, k, v):
    return ag.attention(q, k, v, CAUSAL, out=torch.empty(1))


@pytest.mark.parametrize(
    "function, says",
    [
        (bad_shape, "required the same kv_len and heads"), (unknown, "Gemma2 has no parameter slope"),
        (missing, "Bias needs `bias`"), (no_number, "Gemma2.cap is '30': required a number"),
        (made_inside, "SlidingWindow is made inside"), (composed_inside, "made inside"), (wrong_out, "out is"),
    ],
)  # fmt: skip
def test_a_bad_call_says_so_when_it_is_traced(function, says):
    with pytest.raises(Exception, match=says):
        compiled(function)[0](*inputs())


def test_what_only_values_show_raises_as_in_eager():
    call, _ = compiled(lambda q, k, v, lens: ag.attention(q, k, v, CAUSAL, kv_lens=lens))
    with pytest.raises(ag.ParameterError, match=r"kv_lens\[1\] is 41: required 0 to 40"):
        call(*inputs(), torch.tensor([3, 41]))


@pytest.mark.parametrize("which", ["q", "parameter", "out"])
def test_tensors_that_require_grad_are_refused(which):
    q, k, v = inputs()
    bias, out = torch.randn(4), torch.empty_like(q)
    {"q": q, "parameter": bias, "out": out}[which].requires_grad_()

    def function(q, k, v, bias, out):
        return ag.attention(q, k, v, BIAS, bias=bias, out=out)

    with torch.enable_grad():
        with pytest.raises(Exception, match="requires? grad"):
            compiled(function)[0](q, k, v, bias, out)
        with pytest.raises(ag.UnsupportedError, match="requires? grad"):  # Dynamo leaves the function to eager
            torch.compile(function, backend="aot_eager")(q, k, v, bias, out)
    torch._dynamo.reset()
    assert same(compiled(function)[0](q, k, v, bias, torch.empty_like(q)), ag.attention(q, k, v, BIAS, bias=bias))


def test_an_exported_model_runs_in_another_process(tmp_path):
    model, x = Layer(Gemma2(window=5)), torch.randn(2, 20, 64)
    length = torch.export.Dim("length", min=2, max=1000)
    for strict in (False, True):
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {1: length}}, strict=strict)
        torch.export.save(program, tmp_path / f"{strict}.pt2")
    x = torch.randn(2, 33, 64)
    torch.save((x, model(x)), tmp_path / "io.pt")
    other = """
        import sys, torch, attngen as ag
        models = [torch.export.load(f"{sys.argv[1]}/{strict}.pt2").module() for strict in (False, True)]
        x, expected = torch.load(sys.argv[1] + "/io.pt")
        with torch.no_grad():
            try:
                models[0](x)
            except ag.ParameterError as error:
                print("Gemma2" in str(error))
            from attngen.variants import Gemma2
            variant = Gemma2()
            print(*(torch.equal(model(x), expected) for model in models))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(other), str(tmp_path)], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.stdout.split() == ["True"] * 3, done.stderr
