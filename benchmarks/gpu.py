"""GPU benchmark of BatchAttention: prefill, decode and the variants beside their plain form, one line a case.

    python benchmarks/gpu.py

Prefill is ragged, b=4 h=16 s=4096 d=128, beside torch's FlashAttention-2; decode is paged (16), replayed as a CUDA graph
over rotating caches of 256 MB or more. Plan is timed by itself.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import attngen as ag
from attngen.variants import ALiBi, Causal, Sigmoid, Sinks, SlidingWindow, SoftCap

VARIANTS = {
    "causal": (Causal(), {}, {}),
    "soft cap": (ag.compose(SoftCap(30.0), Causal()), {}, {}),
    "alibi": (ag.compose(ALiBi(), Causal()), {}, {}),
    "window 1024": (SlidingWindow(1024), {}, {}),
    "sinks": (ag.compose(Sinks(), Causal()), {}, {"sinks": True}),
    "sigmoid": (ag.compose(Sigmoid(-8.0), Causal()), {}, {}),
}


def ints(x: list[int]) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.int32, device="cuda")


def graph_us(steps: list[Callable[[], object]], rounds: int = 15) -> float:
    """Median microseconds of a step, replayed as one graph."""
    for step in steps:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    times = []
    for _ in range(rounds + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(steps))
    return statistics.median(times[3:])


def run_params(names: dict[str, bool], heads: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(heads, device="cuda") for name in names}


def prefill() -> None:
    b, h, s, d = 4, 16, 4096, 128
    q, k, v = (torch.randn(b * s, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    indptr = ints([s * i for i in range(b + 1)])
    out = torch.empty_like(q)
    dense = [t.view(b, s, h, d).transpose(1, 2) for t in (q, k, v)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        peer = graph_us([lambda: F.scaled_dot_product_attention(*dense, is_causal=True)] * 3)
    plain = None
    for name, (variant, plan, run) in VARIANTS.items():
        attn = ag.BatchAttention(variant, num_heads=h, num_kv_heads=h, head_dim=d, max_requests=b, max_q_tokens=b * s,
                                 max_kv_tokens=b * s)  # fmt: skip
        attn.plan(indptr, indptr, **plan)
        params = run_params(run, h)
        us = graph_us([lambda: attn.run(q, (k, v), out=out, **params)] * 3)
        attn.check()
        plain = plain or us
        rate = 2 * b * h * s * s * d / us / 1e6
        print(f"prefill {name:12} b={b} h={h}/{h} s={s} d={d} bf16 | {us:8.1f} us | {rate:5.0f} TFLOP/s of the causal half "
              f"| {us / plain:.2f}x causal | {us / peer:.2f}x fa2 causal", flush=True)  # fmt: skip


def decode() -> None:
    h, kv_heads, d, page = 32, 8, 128, 16
    for bs, ctx in ((1, 1024), (1, 16384), (16, 1024), (64, 1024), (64, 4096), (256, 1024), (16, 131072)):
        pages = bs * ctx // page
        size = 2 * pages * page * kv_heads * d * 2
        copies = max(1, -(-(256 << 20) // size))
        cache = torch.empty(copies * pages, 2, page, kv_heads, d, device="cuda", dtype=torch.bfloat16).normal_()
        tables = [torch.randperm(pages, device="cuda").int() + i * pages for i in range(copies)]
        indptr, last = ints([ctx // page * i for i in range(bs + 1)]), ints([page] * bs)
        q = torch.randn(bs, h, d, device="cuda", dtype=torch.bfloat16)
        out = torch.empty_like(q)
        names = VARIANTS if (bs, ctx) == (64, 4096) else ("causal", "window 1024") if ctx == 131072 else ("causal",)
        for name in names:
            variant, plan, run = VARIANTS[name]
            make = lambda: ag.BatchAttention(variant, num_heads=h, num_kv_heads=kv_heads, head_dim=d, page_size=page,  # noqa: E731
                                             max_requests=bs, max_q_tokens=bs, max_pages=pages, max_q_len=1)  # fmt: skip
            attns, params = [make() for _ in tables], run_params(run, h)
            for attn, table in zip(attns, tables):
                attn.plan(None, indptr, table, last, **plan)
            steps = [lambda a=a: a.run(q, cache, out=out, **params) for a in attns]
            us = graph_us(steps * max(1, 8 // len(steps)))
            plan_us = graph_us([lambda: attns[0].plan(None, indptr, tables[0], last, **plan)] * 16)
            read = size * min(1.0, 1024 / ctx) if name == "window 1024" else size
            print(f"decode {name:12} bs={bs} ctx={ctx} h={h}/{kv_heads} d={d} page {page} bf16 | {us:8.1f} us | "
                  f"{read / us / 1e3:5.0f} GB/s | plan {plan_us:.1f} us", flush=True)  # fmt: skip
        del cache


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    a = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    c = torch.empty_like(a)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; copy {2 * a.numel() * 4 / graph_us([lambda: c.copy_(a)] * 3) / 1e3:.0f} GB/s")
    del a, c
    prefill()
    decode()
