"""Kernels against two referees that know nothing of attngen: torch SDPA and FlexAttention, both in float64.

SDPA gets a dense mask or bias; FlexAttention gets the variant written as a user of FlexAttention writes it, and runs
uncompiled. Its positions count from 0: q_offset=0 says the same to attngen, and is shifted where a cache is longer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import attngen as ag
import pytest
import torch
import torch.nn.functional as F
from attngen import variants
from compare import compare
from grid import KernelCase
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import create_block_mask

BATCH, HEADS, KV_HEADS, DIM = 2, 6, 2, 64
SIZES = [(1, 150), (65, 129)]

Score = Callable[..., torch.Tensor]


def inputs(q_len: int, kv_len: int, name: str = "") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v in the order [batch, heads, seq, head_dim]."""
    random = torch.Generator().manual_seed(q_len)
    sizes = ((HEADS, q_len), (KV_HEADS, kv_len), (KV_HEADS, kv_len))
    q, k, v = (torch.randn(BATCH, h, n, DIM, generator=random) for h, n in sizes)
    return q / 8 if name == "T5Bias" else q, k, v  # T5 does not scale its logits: its weights are smaller instead


def indices(q_len: int, kv_len: int) -> list[torch.Tensor]:
    """b, h, q and kv of a whole score matrix, to be broadcast."""
    sizes = (BATCH, HEADS, q_len, kv_len)
    return [torch.arange(n).view([-1 if i == axis else 1 for i in range(4)]) for axis, n in enumerate(sizes)]


def f32(names: list[str]) -> list[KernelCase]:
    return [KernelCase(name, torch.float32) for name in names]


# ---------------------------------------------------------------- SDPA


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True, **keywords)


@pytest.mark.parametrize("kernel", f32(["Full"]), ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_sdpa_full(kernel: KernelCase, size: tuple[int, int]) -> None:
    q, k, v = inputs(*size)
    compare(ag.attention(q, k, v, kernel.variant, layout="bhsd"), sdpa(q, k, v))
    compare(ag.attention(q, k, v, kernel.variant, layout="bhsd", scale=0.3), sdpa(q, k, v, scale=0.3))
    compare(ag.attention(q, k, v, layout="bhsd"), sdpa(q, k, v))


@pytest.mark.parametrize("kernel", f32(["Causal"]), ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_sdpa_causal(kernel: KernelCase, size: tuple[int, int]) -> None:
    """SDPA's is_causal lines up the first query with the first key: that is q_offset=0."""
    q, k, v = inputs(*size)
    compare(ag.attention(q, k, v, kernel.variant, layout="bhsd", q_offset=0), sdpa(q, k, v, is_causal=True))
    ends_together = torch.ones(size, dtype=torch.bool).tril(size[1] - size[0])
    compare(ag.attention(q, k, v, kernel.variant, layout="bhsd"), sdpa(q, k, v, attn_mask=ends_together))


@pytest.mark.parametrize("kernel", f32(["SlidingWindow", "PrefixLM", "Document", "TreeMask"]), ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_sdpa_bool_mask(kernel: KernelCase, size: tuple[int, int]) -> None:
    q, k, v = inputs(*size)
    params, mask_mod, _ = flex_form(kernel.name, *size)
    mask = mask_mod(*indices(*size)).expand(BATCH, HEADS, *size)
    compare(ag.attention(q, k, v, kernel.variant, layout="bhsd", **params), sdpa(q, k, v, attn_mask=mask))


@pytest.mark.parametrize("kernel", f32(["ALiBiSlopes", "T5Bias"]), ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_sdpa_bias(kernel: KernelCase, size: tuple[int, int]) -> None:
    q, k, v = inputs(*size, kernel.name)
    params, _, score_mod = flex_form(kernel.name, *size)
    bias = score_mod(torch.zeros(BATCH, HEADS, *size, dtype=torch.float64), *indices(*size))
    out = ag.attention(q, k, v, kernel.variant, layout="bhsd", **params)
    compare(out, sdpa(q, k, v, attn_mask=bias, scale=1.0 if kernel.name == "T5Bias" else None))


# ---------------------------------------------------------------- FlexAttention


def flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    score_mod: Score | None,
    block_mask: Any,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of uncompiled FlexAttention."""
    request = getattr(flex_module, "AuxRequest", None)  # newer torch; return_lse is on its way out
    keywords: dict[str, Any] = {"return_aux": request(lse=True)} if request else {"return_lse": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*without torch.compile.*")
        out, more = flex_module.flex_attention(
            q.double(), k.double(), v.double(), score_mod, block_mask, scale, enable_gqa=True, **keywords
        )
    return out, getattr(more, "lse", more)


def flex_form(name: str, q_len: int, kv_len: int) -> tuple[dict[str, Any], Score | None, Score | None]:
    return flex_forms(q_len, kv_len)[name]


def flex_forms(q_len: int, kv_len: int) -> dict[str, tuple[dict[str, Any], Score | None, Score | None]]:
    """Variants in FlexAttention's terms: our parameters, and a mask_mod and a score_mod of the same meaning."""
    offset = kv_len - q_len
    random = torch.Generator().manual_seed(kv_len)
    window, sinks, dilation, chunk, cap, length = 23, 5, 3, 31, 2.0, 40
    prefix = torch.tensor([13, 60])
    doc = torch.randint(0, 4, (BATCH, kv_len), generator=random)
    table = torch.randn(HEADS, 32, generator=random)
    slopes = torch.rand(HEADS, generator=random)
    levels = torch.randn(HEADS, generator=random)
    tree = torch.rand(BATCH, q_len, q_len, generator=random) < 0.5
    paper = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])  # 6 heads: those of 4, then every second of 8

    def causal(b, h, q, kv):
        return kv <= q + offset

    def window_mask(b, h, q, kv):
        return causal(b, h, q, kv) & (q + offset - kv < window)

    def prefix_mask(b, h, q, kv):
        return causal(b, h, q, kv) | (kv < prefix[b])

    def document(b, h, q, kv):
        return doc[b, q + offset] == doc[b, kv]

    def chunked(b, h, q, kv):
        return causal(b, h, q, kv) & ((q + offset) // chunk == kv // chunk)

    def streaming(b, h, q, kv):
        return window_mask(b, h, q, kv) | (causal(b, h, q, kv) & (kv < sinks))

    def dilated(b, h, q, kv):
        distance = q + offset - kv
        return (distance >= 0) & (distance < window * dilation) & (distance % dilation == 0)

    def tree_mask(b, h, q, kv):
        return (kv < offset) | tree[b, q, torch.clamp(kv - offset, min=0)]

    def soft_cap(score, b, h, q, kv):
        return cap * torch.tanh(score / cap)

    def alibi(score, b, h, q, kv):
        return score - slopes[h] * (q + offset - kv).abs()

    def paper_alibi(score, b, h, q, kv):
        return score - paper[h] * (q + offset - kv).abs()

    def t5(score, b, h, q, kv):
        relative = kv - q - offset
        distance = relative.abs()
        large = 8 + (torch.log(distance.clamp(min=1) / 8) / math.log(128 / 8) * 8).to(torch.int64)
        bucket = torch.where(distance < 8, distance, large.clamp(max=15))
        return score + table[h, bucket + 16 * (relative > 0)]

    def llama4(score, b, h, q, kv):
        return score * (1 + 0.25 * torch.log(torch.floor((q + offset + 1.0) / 16) + 1).double())

    def grok(score, b, h, q, kv):
        position = (q + offset).double()
        temperature = torch.where(position > length, torch.log2(position) / math.log2(length), 1.0)
        return soft_cap(score, b, h, q, kv) * temperature

    return {
        "Full": ({}, None, None),
        "Causal": ({}, causal, None),
        "SlidingWindow": ({"window": window}, window_mask, None),
        "SoftCap": ({"cap": cap}, None, soft_cap),
        "Gemma2": ({"cap": cap, "window": window}, window_mask, soft_cap),
        "ALiBi": ({}, None, paper_alibi),
        "ALiBiSlopes": ({"slopes": slopes}, None, alibi),
        "T5Bias": ({"table": table}, None, t5),
        "PrefixLM": ({"prefix_len": prefix}, prefix_mask, None),
        "Document": ({"doc": doc}, document, None),
        "Chunked": ({"chunk": chunk}, chunked, None),
        "Sinks": ({"sinks": levels}, None, None),
        "GptOss": ({"sinks": levels, "window": window}, window_mask, None),
        "Streaming": ({"sinks": sinks, "window": window}, streaming, None),
        "DilatedWindow": ({"window": window, "dilation": dilation}, dilated, None),
        "TreeMask": ({"ancestors": tree}, tree_mask, None),
        "Llama4Temperature": ({"floor_scale": 16, "attn_scale": 0.25}, None, llama4),
        "Grok": ({"cap": cap, "temperature_len": length}, causal, grok),
    }


IN_FLEX = tuple(flex_forms(1, 150))


@pytest.mark.parametrize("kernel", f32(IN_FLEX), ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.usefixtures("kernels")
def test_flex_attention(kernel: KernelCase, size: tuple[int, int]) -> None:
    q, k, v = inputs(*size, kernel.name)
    params, mask_mod, score_mod = flex_form(kernel.name, *size)
    block_mask = mask_mod and create_block_mask(mask_mod, BATCH, HEADS, *size, device="cpu")
    scale = 1.0 if kernel.name == "T5Bias" else None
    ref, ref_lse = flex(q, k, v, score_mod, block_mask, scale)
    if "sinks" in params and kernel.name != "Streaming":  # Flex has no sinks: they follow from its LSE
        sinks = params["sinks"].double()[None, :, None]
        ref = ref * torch.sigmoid(ref_lse - sinks)[..., None]
        ref_lse = torch.logaddexp(ref_lse, sinks.expand_as(ref_lse))
    # doc and prefix_len are int64 in Flex; int32 is the kernel the other tests have
    params = {n: p.int() if isinstance(p, torch.Tensor) and p.dtype == torch.int64 else p for n, p in params.items()}
    out, lse = ag.attention(q, k, v, kernel.variant, layout="bhsd", return_lse=True, **params)
    compare(out, ref)
    compare(lse, ref_lse)


def test_flex_positions_are_q_offset_0() -> None:
    """FlexAttention counts queries from 0 whatever the cache holds."""
    q, k, v = inputs(20, 50)
    mask = create_block_mask(lambda b, h, q, kv: kv <= q, None, None, 20, 50, device="cpu")
    compare(ag.attention(q, k, v, variants.Causal, layout="bhsd", q_offset=0), flex(q, k, v, None, mask)[0])
