"""The Hopper kernel on its GPU, where it gathers rows of small pages and where it rotates keys, against the float64 oracle: every slot
that must not be read, and every output before a run, holds NaN."""

from __future__ import annotations

import pytest
import torch
from batches import PHASES, Batch, judge, planned, split_params
from grid import VARIANTS

import attngen as ag
from attngen import variants
from attngen.variants import example_params

pytestmark = pytest.mark.gpu
BF16, F16 = torch.bfloat16, torch.float16
LONG = ([300, 1, 0, 63, 129, 1000], [300, 4096, 5, 64, 127, 1000])


def turned(**more) -> ag.Variant:
    """Causal over keys that the kernel rotates."""
    return ag.compose(variants.Causal(), type("Turned", (ag.Variant,), {"rope": ag.RoPE(10_000.0, keys="rotate", **more)})())


def check(variant: ag.Variant, q_lens, kv_lens, ragged: bool = False, **more) -> None:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    batch = Batch(q_lens, kv_lens, **more)
    params = example_params(variant, **batch.sizes())
    plan, run = split_params(variant, params, "cuda", batch)
    softmax = variant.trace.weight is None
    attn, k, v = planned(variant, batch, plan, ragged)
    outs = []
    for _ in range(3):
        out = torch.full((len(batch.q), batch.dense_q.shape[2], batch.dense_v.shape[3]), torch.nan, dtype=batch.q.dtype, device="cuda")
        found = attn.run(batch.q, (k, v), out=out, return_lse=softmax, **run)
        attn.check()
        outs.append(found if softmax else (found, None))
    judge(*outs[0], batch, variant, **params)
    assert all(torch.equal(out, outs[0][0]) for out, _ in outs)


@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("page_size, layout", [(1, "NHD"), (5, "HND"), (12, "NHD")])
def test_gather(page_size, layout, d):
    check(variants.Causal(), *LONG, page_size=page_size, layout=layout, d=d)


@pytest.mark.parametrize("name", ["Document", "Gemma2", "ALiBi", "Sigmoid", "SlidingWindow", "GptOss"])
@pytest.mark.parametrize("phase", ["append", "prefill", "longer queries"])
def test_gather_beside_hooks(name, phase):
    check(VARIANTS[name], *PHASES[phase], page_size=4)


@pytest.mark.parametrize("more", [
    {}, {"interleaved": True}, {"rotary_dim": 32}, {"rotary_dim": 64, "interleaved": True}, {"scaling": ag.YaRN(4.0, 64)},
    {"q_position": lambda at: at.q + 99_000, "kv_position": lambda at: at.kv + 99_000}, {"scaling": ag.DynamicNTK(2.0, 64)},
], ids=lambda more: "-".join(more) or "plain")  # fmt: skip
@pytest.mark.parametrize("d, page_size", [(64, None), (96, 16), (128, 16), (128, 5)])
def test_keys_that_the_kernel_rotates(more, d, page_size):
    check(turned(**more), *LONG, ragged=page_size is None, page_size=page_size or 16, d=d, dtype=F16)


@pytest.mark.parametrize("other", [variants.SoftCap(), variants.Document(), variants.SlidingWindow(100)], ids=lambda v: v.name)
def test_rotated_keys_beside_hooks(other):
    check(ag.compose(other, turned()), *LONG)
    check(VARIANTS["Llama3RoPE"], *PHASES["mixed"])
