"""Masks beside compiled FlexAttention with its block mask in the same process, one line a case.

    python benchmarks/masks.py [--no-flex] [PATTERN ...]

A row runs if one of the regular expressions is found in its title, such as `chunked`, `s=4096` or `^decode`; all by default. A row that
fails is printed, and the next one runs. Times are medians of triton.testing.do_bench for attention, of CUDA graph replays for decode and
for what prepares a mask: ours is `plan` (work list and zone maps; what it costs more than plan for a causal mask stands beside it), Flex's
is `create_block_mask`, compiled. TFLOP/s count the pairs that the mask keeps.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from typing import Any

import gpu
import torch
from prefill import us
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attngen as ag
from attngen.variants import Causal, Chunked, DilatedWindow, PrefixLM, SlidingWindow, Streaming

BF16, HEADS, HEAD_DIM = torch.bfloat16, 16, 128


class PackedDocuments(ag.Variant):
    """Causal within a document; ids of each packed row."""

    q_doc: ag.Tensor("q_tokens", dtype=int)
    kv_doc: ag.Tensor("kv_tokens", dtype=int)

    def mask(self, at):
        return (at.kv <= at.q) & (self.q_doc[at.q_token] == self.kv_doc[at.kv_token])


class Window2D(ag.Variant):
    """Keys of an image, ``width`` wide, up to ``reach`` rows and columns away."""

    width: ag.Scalar[int]
    reach: ag.Scalar[int] = 6

    def mask(self, at):
        near = abs(at.q // self.width - at.kv // self.width) <= self.reach
        return near & (abs(at.q % self.width - at.kv % self.width) <= self.reach)


def lognormal(total: int) -> list[int]:
    """Lengths of documents that fill ``total`` tokens."""
    random, found = torch.Generator().manual_seed(3), []
    while sum(found) < total:
        found.append(max(16, int(torch.exp(torch.randn((), generator=random) * 1.0 + 6.0))))
    found[-1] -= sum(found) - total
    return found


def masks(b: int, s: int) -> dict[str, tuple[ag.Variant, dict[str, Any], Callable[..., Any]]]:
    """Our variant, its parameters of plan, and Flex's mask_mod."""
    lengths = lognormal(s)
    doc = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int().cuda()
    side, packed = int(s**0.5), doc.repeat(b)
    prefix = torch.full((b,), 1024, dtype=torch.int32, device="cuda")
    return {
        "causal": (Causal(), {}, lambda b, h, i, j: i >= j),
        "window 256": (SlidingWindow(), {"window": 256}, lambda b, h, i, j: (i >= j) & (i - j < 256)),
        "window 1024": (SlidingWindow(), {"window": 1024}, lambda b, h, i, j: (i >= j) & (i - j < 1024)),
        "prefix 1024": (PrefixLM(), {"prefix_len": prefix}, lambda b, h, i, j: (j < 1024) | (i >= j)),
        "documents": (PackedDocuments(), {"q_doc": packed, "kv_doc": packed}, lambda b, h, i, j: (doc[i] == doc[j]) & (i >= j)),
        "chunked 2048": (Chunked(), {"chunk": 2048}, lambda b, h, i, j: (i // 2048 == j // 2048) & (i >= j)),
        "streaming 64+1024": (Streaming(), {"sinks": 64, "window": 1024}, lambda b, h, i, j: (i >= j) & ((j < 64) | (i - j < 1024))),
        "dilated 256x4": (DilatedWindow(), {"window": 256, "dilation": 4}, lambda b, h, i, j: (i >= j) & (i - j < 1024) & (i % 4 == j % 4)),
        "2-D window 13": (Window2D(), {"width": side, "reach": 6}, lambda b, h, i, j: ((i // side - j // side).abs() <= 6) & ((i % side - j % side).abs() <= 6)),
    }  # fmt: skip


def kept_pairs(mask: Callable[..., Any], s: int) -> int:
    kv, rows = torch.arange(s, device="cuda"), torch.arange(s, device="cuda").split(1024)
    return sum(int(mask(0, 0, q[:, None], kv[None]).sum()) for q in rows)


def prefill(name: str, b: int, s: int, with_flex: bool) -> tuple[str, float | None]:
    """A row, and our time over Flex's."""
    variant, params, mask = masks(b, s)[name]
    q, k, v = (torch.randn(b * s, HEADS, HEAD_DIM, device="cuda", dtype=BF16) for _ in "qkv")
    starts, out = gpu.ints(range(0, b * s + 1, s)), torch.empty_like(q)
    facts = dict(num_heads=HEADS, num_kv_heads=HEADS, head_dim=HEAD_DIM, max_requests=b, max_q_tokens=b * s, max_kv_tokens=b * s)
    attn, causal = ag.BatchAttention(variant, **facts), ag.BatchAttention(Causal(), **facts)
    plan = gpu.graph_us([lambda: attn.plan(starts, starts, **params)] * 4)
    plain = gpu.graph_us([lambda: causal.plan(starts, starts)] * 4)
    attn.plan(starts, starts, **params)
    mine = us(lambda: attn.run(q, (k, v), out=out))
    attn.check()
    flops = 4 * b * HEADS * kept_pairs(mask, s) * HEAD_DIM
    text = f"{mine:8.1f} us | {flops / mine / 1e6:4.0f} TFLOP/s | plan {plan:5.1f} us, {plan - plain:+.1f}"
    if not with_flex:
        return text, None
    torch.compiler.reset()
    flex, make = torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask)
    heads_first = [x.view(b, s, HEADS, HEAD_DIM).transpose(1, 2).contiguous() for x in (q, k, v)]
    begun = time.perf_counter()
    blocks = make(mask, None, None, s, s, device="cuda")
    theirs = flex(*heads_first, block_mask=blocks)
    torch.cuda.synchronize()
    begun = time.perf_counter() - begun
    error = float((out.view(b, s, HEADS, HEAD_DIM).transpose(1, 2).float() - theirs.float()).abs().max())
    peer = us(lambda: flex(*heads_first, block_mask=blocks))
    prepared = us(lambda: make(mask, None, None, s, s, device="cuda"))
    assert error < 0.05, f"differs from FlexAttention by {error}"
    return f"{text} | flex {peer:8.1f} us {flops / peer / 1e6:4.0f}, mask {prepared:6.1f} us, {begun:.0f} s compile | ratio {mine / peer:.2f}", mine / peer


def decode(variant: ag.Variant, params: dict[str, Any], context: int, requests: int = 16, heads: int = 32, kv_heads: int = 8, page: int = 16) -> float:
    """Microseconds of a step, keys out of cold memory: four page tables into one cache."""
    pages = requests * 131072 // page
    cache = torch.randn(pages, 2, page, kv_heads, HEAD_DIM, device="cuda", dtype=BF16)
    q = torch.randn(requests, heads, HEAD_DIM, device="cuda", dtype=BF16)
    each, steps = context // page, []
    for _ in range(4):
        attn = ag.BatchAttention(variant, num_heads=heads, num_kv_heads=kv_heads, head_dim=HEAD_DIM, page_size=page, max_requests=requests,
                                 max_q_tokens=requests, max_pages=pages, max_q_len=1)  # fmt: skip
        table = torch.randperm(pages, device="cuda")[: requests * each].int()
        attn.plan(gpu.ints(range(requests + 1)), gpu.ints(range(0, requests * each + 1, each)), table, gpu.ints([page] * requests), **params)
        steps.append(lambda attn=attn: attn.run(q, cache))
        attn.check()
    return gpu.graph_us(steps)


DECODE = {
    "decode bs16 window 1024": lambda: (SlidingWindow(), {"window": 1024}),
    "decode bs16 streaming 64+1024": lambda: (Streaming(), {"sinks": 64, "window": 1024}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-flex", action="store_true", help="ours alone")
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    ratios = []

    def row(title: str, run: Callable[[], tuple[str, float | None]]) -> None:
        if given.patterns and not any(re.search(pattern, title) for pattern in given.patterns):
            return
        try:
            text, ratio = run()
        except Exception as error:  # the rows after it are worth their time
            text, ratio = f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:300]}", None
        print(f"{title} | {text}", flush=True)
        ratios.extend([ratio] if ratio else [])

    for b, s in ((4, 4096), (1, 16384)):
        for name in ("causal", "window 256", "window 1024", "prefix 1024", "documents", "chunked 2048", "streaming 64+1024", "dilated 256x4", "2-D window 13"):
            row(f"{name:17} b={b} h={HEADS} s={s} d={HEAD_DIM}", lambda name=name, b=b, s=s: prefill(name, b, s, not given.no_flex))
    if ratios:
        print(f"{len(ratios)} rows: geometric mean {gpu.geometric_mean(ratios):.2f} of FlexAttention's time, worst {max(ratios):.2f}", flush=True)
    for title, make in DECODE.items():
        def step(make: Callable[[], tuple[ag.Variant, dict[str, Any]]] = make) -> tuple[str, None]:
            variant, params = make()
            long, short = decode(variant, params, 131072), decode(Causal(), {}, 1024)
            return f"ctx 128k {long:.1f} us, causal at ctx 1024 {short:.1f} us, ratio {long / short:.2f}", None

        row(title, step)


if __name__ == "__main__":
    main()
