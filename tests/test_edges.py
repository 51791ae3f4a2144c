"""What a hostile reviewer found, and its neighbours: each was wrong once, or nearly."""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
from compare import compare
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import attngen as ag
from attngen.variants import Causal, Llama3RoPE, Sinks, SoftCap

torch.manual_seed(0)
Q = torch.randn(1, 40, 2, 16)


def judge(variant, q=Q, k=Q, v=Q, **params):
    out = ag.attention(q, k, v, variant, **params)
    compare(out, ag.reference(q, k, v, variant, **params))
    return out


def test_a_field_cannot_change_how_a_composition_works():
    class How(ag.Variant):
        how: ag.Scalar[int] = 3
        parts: ag.Scalar[int] = 0

        def mask(self, at):
            return at.kv <= at.q + self.how + self.parts

    class Near(ag.Variant):
        def mask(self, at):
            return at.q - at.kv < 4

    i = torch.arange(40)
    keep = (i[None] <= i[:, None] + 3) & (i[:, None] - i[None] < 4)
    q = Q.double().transpose(1, 2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=keep).transpose(1, 2)
    compare(ag.attention(Q, Q, Q, How() & Near()), expected)


def test_the_default_device_does_not_matter():
    expected = ag.attention(Q, Q, Q, Llama3RoPE(), kv_lens=[33], return_lse=True)
    with torch.device("meta"):
        out, lse = ag.attention(Q, Q, Q, Llama3RoPE(), kv_lens=[33], return_lse=True)
        assert ag.reference(Q, Q, Q, Llama3RoPE()).device.type == "cpu"
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_fake_tensors_are_refused():
    with FakeTensorMode():
        fake = torch.randn(1, 40, 2, 16)
        with pytest.raises(ag.UnsupportedError, match="no memory"):
            ag.attention(fake, fake, fake)


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2), (2, 5, 0)])
def test_nothing_to_compute(shape):
    x = torch.randn(*shape, 16)
    out, lse = ag.attention(x, x, x, Causal, return_lse=True)
    assert out.shape == x.shape and lse.shape == (shape[0], shape[2], shape[1])
    assert ag.reference(x, x, x, Causal).shape == x.shape


def test_bounds_know_that_constants_wrap():
    class Wrap(ag.Variant):
        def mask(self, at):
            return (at.kv + 2147483647) <= (at.q + 2147483647)

    judge(Wrap())


def test_splits_do_not_lose_the_sum_beside_a_large_logit():
    class Bias(ag.Variant):
        bias: ag.Scalar = 0.0

        def logits(self, s, at):
            return s + self.bias

    q, k, v = torch.randn(1, 1, 2, 16), torch.randn(1, 576, 1, 16), torch.zeros(1, 576, 1, 16)
    v[:, :192] = 1.0
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 16):
            torch.set_num_threads(n)
            results.append(ag.attention(q, k, v, Bias(), bias=-1e9))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert (results[0] - other).abs().max() < 1e-5


@pytest.mark.parametrize("value", [-3.4028e38, -2.3e38, 1e30])
def test_a_row_of_one_huge_logit_is_an_average(value):
    class Huge(ag.Variant):
        def logits(self, s, at):
            return ag.where(at.q < 5, value, s)

    out = judge(Huge())
    assert torch.allclose(out[0, :5], Q[0].mean(0).expand(5, -1, -1), atol=1e-6)


@pytest.mark.parametrize("value", [math.inf, 3e38, -3.4e38, -math.inf, 0.5])
@pytest.mark.parametrize("kv_len", [0, 40])
def test_extreme_sinks(value, kv_len):
    sinks = torch.full((2,), value)
    out, lse = ag.attention(Q, Q, Q, Sinks(), sinks=sinks, kv_lens=[kv_len], return_lse=True)
    ref, ref_lse = ag.reference(Q, Q, Q, Sinks(), sinks=sinks, kv_lens=[kv_len], return_lse=True)
    compare(out, ref)
    compare(lse, ref_lse)


def test_a_tiny_divisor_makes_no_nan():
    zero = torch.zeros(1, 5, 2, 16)
    assert ag.attention(zero, zero, torch.randn(1, 5, 2, 16), SoftCap(1e-39)).isfinite().all()


@pytest.mark.parametrize("scale", [3e38, 1e39, 10**400, math.nan, math.inf])
def test_a_scale_that_float32_cannot_hold(scale):
    with pytest.raises(ag.ParameterError, match="scale"):
        ag.attention(Q, Q, Q, scale=scale)


def test_out_may_not_be_a_parameter():
    class Gate(ag.Variant):
        gate: ag.Tensor("q_tokens", "heads", "dims")

        def output(self, o, at):
            return o + self.gate[at.q_token, at.head, 15 - at.dim]

    gate = torch.randn(1, 40, 2, 16)
    with pytest.raises(ag.ParameterError, match="shares memory"):
        ag.attention(Q, Q, Q, Gate(), gate=gate.view(40, 2, 16), out=gate)
    judge(Gate(), gate=gate.view(40, 2, 16))


def test_an_unaligned_parameter_is_refused():
    class Bias(ag.Variant):
        bias: ag.Tensor("positions")

        def logits(self, s, at):
            return s + self.bias[at.kv]

    memory = bytearray(41 * 2)
    with pytest.raises(ag.ParameterError, match="multiple of its element size"):
        ag.attention(Q, Q, Q, Bias(), bias=torch.frombuffer(memory, dtype=torch.bfloat16, offset=1, count=40))


def test_nothing_detaches_silently():
    with pytest.raises(ag.UnsupportedError, match="requires grad"):
        ag.attention(Q, Q, Q, SoftCap(), cap=torch.tensor(3.0, requires_grad=True))
    with forward_ad.dual_level(), pytest.raises(ag.UnsupportedError, match="forward-mode"):
        ag.attention(forward_ad.make_dual(Q, torch.ones_like(Q)), Q, Q)


def test_lazy_negation_is_carried_out():
    compare(ag.attention(torch._neg_view(Q), Q, Q), ag.reference(-Q, Q, Q))


def test_field_names_that_c_gives_a_meaning():
    names = "constexpr export compl alignas decltype typeid q_position0 x x_stride0 x_size0 sum".split()
    body = {"__annotations__": {n: ag.Scalar for n in names} | {"x": ag.Tensor("heads")}, **{n: 0.5 for n in names if n != "x"}}

    def logits(self, s, at):
        for name in names:
            s = s + (self.x[at.head] if name == "x" else getattr(self, name))
        return s

    judge(type("Named\nvariant", (ag.Variant,), {**body, "logits": logits})(), x=torch.randn(2))


def test_a_key_position_may_not_read_the_head():
    class Bad(ag.Variant):
        def rope(self):
            return ag.RoPE(keys="rotate", kv_position=lambda at: at.kv + at.kv_head)

    with pytest.raises(ag.VariantError, match="kv_position"):
        Bad()


def test_a_variant_pickles_after_a_call():
    variant = SoftCap(7.0)
    expected = ag.attention(Q, Q, Q, variant)
    assert torch.equal(ag.attention(Q, Q, Q, pickle.loads(pickle.dumps(variant))), expected)


_FORK = """
import os, threading, sys
import attngen as ag
from attngen.variants import Gemma2
stop = False
def make():
    while not stop:
        Gemma2()
threads = [threading.Thread(target=make) for _ in range(3)]
[t.start() for t in threads]
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        Gemma2()
        os._exit(0)
    os.waitpid(pid, 0)
stop = True
"""


def test_a_child_of_a_busy_parent_makes_variants():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-W", "ignore", "-c", _FORK], env=env, check=True, timeout=120)
