"""Prefill beside FlashAttention-3, cuDNN and FlashInfer in the same process, one line a case.

    python benchmarks/prefill.py [dense] [varlen] [paged] [rotated] [variants]      (all by default)

Peers that are not installed are left out: FlashAttention-3 as `fa3_fwd_interface`, `flashinfer` (its first prefill compiles for
minutes), cuDNN through torch. Medians of triton.testing.do_bench; plans are made beforehand, on both sides. TFLOP/s count what the
mask keeps: half under a causal one. Sections paged and rotated compare our own calls, replayed as graphs in turns: one after the other
they differ by 5% and more.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable
from typing import Any

import gpu
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

import attngen as ag
from attngen.variants import Causal

try:
    import fa3_fwd_interface as fa3
except ImportError:
    fa3 = None
BF16 = torch.bfloat16
TOKENS = 16384


def us(step: Callable[[], Any]) -> float:
    return do_bench(step, warmup=15, rep=60, return_mode="median") * 1e3


def in_turns(steps: dict[str, Callable[[], Any]], rounds: int = 9, inner: int = 3) -> dict[str, float]:
    """Median microseconds of each."""
    graphs = {}
    for name, step in steps.items():
        step()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(inner):
                step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        order = list(steps)
        random.Random(number).shuffle(order)
        for name in order:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            times[name] += [start.elapsed_time(end) * 1e3 / inner] if number else []
    return {name: statistics.median(found) for name, found in times.items()}


def tensors(tokens: int, heads: int, kv_heads: int, d: int) -> list[torch.Tensor]:
    return [torch.randn(tokens, h, d, device="cuda", dtype=BF16) for h in (heads, kv_heads, kv_heads)]


def best(peers: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Microseconds of each peer that runs this case."""
    found = {}
    for name, step in peers.items():
        try:
            found[name] = us(step)
        except Exception as error:  # a peer's limits are its own affair
            print(f"  {name}: {str(error).splitlines()[0][:150]}", flush=True)
    return found


def line(title: str, mine: float, flops: float, peers: dict[str, float]) -> float | None:
    """Prints a case; returns the best peer's time over ours."""
    ratio = min(peers.values()) / mine if peers else None
    beside = "".join(f" | {name} {flops / t / 1e6:.0f} {t / mine:.2f}x" for name, t in peers.items())
    print(f"{title} bf16 | {mine:8.1f} us | {flops / mine / 1e6:4.0f} TFLOP/s{beside}", flush=True)
    return ratio


def planned(variant: ag.Variant, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, plan: dict, run: dict) -> Callable[[], Any]:
    """The call over ragged keys."""
    n = len(starts) - 1
    attn = ag.BatchAttention(variant, num_heads=q.shape[1], num_kv_heads=k.shape[1], head_dim=q.shape[2], max_requests=n,
                             max_q_tokens=len(q), max_kv_tokens=len(k))  # fmt: skip
    attn.plan(starts, starts, **plan)
    out = torch.empty_like(q)
    attn.run(q, (k, v), out=out, **run)
    attn.check()
    return lambda: attn.run(q, (k, v), out=out, **run)


def ragged(variant: ag.Variant, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, plan: dict, run: dict) -> float:
    return us(planned(variant, q, k, v, starts, plan, run))


def rotating(keys: str) -> ag.Variant:
    """Causal with RoPE, over keys that are rotated already ("cached") or not."""
    return ag.compose(Causal(), type("Rotated", (ag.Variant,), {"rope": ag.RoPE(10_000.0, keys=keys)})())


def flashinfer_ragged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, causal: bool) -> Callable[[], Any]:
    wrapper = gpu.flashinfer.BatchPrefillWithRaggedKVCacheWrapper(torch.empty(512 << 20, dtype=torch.uint8, device="cuda"), "NHD", backend="fa3")
    wrapper.plan(starts, starts, q.shape[1], k.shape[1], q.shape[2], causal=causal, q_data_type=BF16, kv_data_type=BF16)
    return lambda: wrapper.run(q, k, v)


def summary(name: str, ratios: list[float | None]) -> None:
    known = [r for r in ratios if r]
    if known:
        print(f"{name}: geometric mean {gpu.geometric_mean(known):.3f}x the best peer's speed, worst row {min(known):.2f}x", flush=True)


def dense() -> None:
    ratios = []
    for d, h in ((128, 16), (64, 32), (256, 8)):
        for causal in (True, False):
            for s in (512, 1024, 2048, 4096, 8192, 16384) if d == 128 else (512, 1024, 4096, 16384):
                b = TOKENS // s
                q, k, v = tensors(TOKENS, h, h, d)
                batched = [x.view(b, s, h, d) for x in (q, k, v)]
                heads_first = [x.transpose(1, 2) for x in batched]
                starts = gpu.ints(range(0, TOKENS + 1, s))

                def cudnn(tensors: list[torch.Tensor] = heads_first, causal: bool = causal) -> torch.Tensor:
                    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                        return F.scaled_dot_product_attention(*tensors, is_causal=causal)

                peers: dict[str, Callable[[], Any]] = {"cudnn": cudnn}
                if fa3:
                    peers["fa3"] = lambda tensors=batched, causal=causal: fa3.flash_attn_func(*tensors, causal=causal)
                if gpu.flashinfer:
                    peers["flashinfer"] = flashinfer_ragged(q, k, v, starts, causal)
                mine = ragged(Causal() if causal else ag.Variant(), q, k, v, starts, {}, {})
                flops = 4 * b * h * s * s * d / (2 if causal else 1)
                ratios.append(line(f"dense {'causal' if causal else 'full':6} b={b} h={h} s={s} d={d}", mine, flops, best(peers)))
    summary("dense", ratios)


def varlen() -> None:
    random = torch.Generator().manual_seed(2)
    weights = 1.0 / torch.arange(1, 17).float() ** 1.2
    zipf = (weights / weights.sum() * TOKENS).round().long().clamp(min=16).tolist()
    lists = {
        "constant": [1024] * 16, "uniform": torch.randint(512, 1025, (16,), generator=random).tolist(), "zipf": zipf,
        "zipf x 8": [8 * n for n in zipf],
    }  # fmt: skip
    ratios = []
    for h, kv_heads in ((32, 8), (32, 32)):
        for name, lengths in lists.items():
            q, k, v = tensors(sum(lengths), h, kv_heads, 128)
            starts, most = gpu.ints(gpu.starts(lengths)), max(lengths)
            peers: dict[str, Callable[[], Any]] = {}
            if fa3:
                peers["fa3"] = lambda t=(q, k, v), s=starts, n=most: fa3.flash_attn_varlen_func(*t, s, s, n, n, causal=True)
            if gpu.flashinfer:
                peers["flashinfer"] = flashinfer_ragged(q, k, v, starts, True)
            flops = sum(2 * n * n * h * 128 for n in lengths)
            ratios.append(line(f"varlen causal {name:8} h={h}/{kv_heads} d=128", ragged(Causal(), q, k, v, starts, {}, {}), flops, best(peers)))
    summary("varlen", ratios)


def paged() -> None:
    for d, h, kv_heads in ((128, 32, 8), (256, 16, 4)):
        for s in (1024, 4096, 16384):
            b = TOKENS // s
            q, k, v = tensors(TOKENS, h, kv_heads, d)
            starts = gpu.ints(range(0, TOKENS + 1, s))
            steps, peers = {"ragged": planned(Causal(), q, k, v, starts, {}, {})}, {}
            for page in (4, 16, 64, 256):
                pages = TOKENS // page
                table = torch.randperm(pages, device="cuda").int()
                cache = torch.randn(pages, 2, page, kv_heads, d, device="cuda", dtype=BF16)
                lists = gpu.ints(range(0, pages + 1, s // page)), table, gpu.ints([page] * b)
                attn = ag.BatchAttention(Causal(), num_heads=h, num_kv_heads=kv_heads, head_dim=d, page_size=page, max_requests=b,
                                         max_q_tokens=TOKENS, max_pages=pages)  # fmt: skip
                attn.plan(starts, *lists)
                out = torch.empty_like(q)
                steps[f"page {page}"] = lambda attn=attn, q=q, cache=cache, out=out: attn.run(q, cache, out=out)
                if gpu.flashinfer:
                    wrapper = gpu.flashinfer.BatchPrefillWithPagedKVCacheWrapper(torch.empty(512 << 20, dtype=torch.uint8, device="cuda"), "NHD", backend="fa3")
                    wrapper.plan(starts, *lists, h, kv_heads, d, page, causal=True, q_data_type=BF16, kv_data_type=BF16)
                    peers[f"page {page}"] = lambda wrapper=wrapper, q=q, cache=cache: wrapper.run(q, cache)
            times, flops = in_turns(steps), 2 * b * h * s * s * d
            for name, mine in times.items():
                beside = {"flashinfer": us(peers[name])} if name in peers else {}
                line(f"paged causal b={b} h={h}/{kv_heads} s={s} d={d} {name}, {mine / times['ragged']:.3f}x ragged,", mine, flops, beside)


def rotated() -> None:
    for d, h, kv_heads, s in ((128, 16, 16, 4096), (128, 32, 8, 1024), (128, 32, 8, TOKENS), (64, 32, 32, 4096), (64, 32, 8, 1024)):
        q, k, v = tensors(TOKENS, h, kv_heads, d)
        starts = gpu.ints(range(0, TOKENS + 1, s))
        kinds = {"without RoPE": Causal(), "rotated keys": rotating("cached"), "keys that the kernel rotates": rotating("rotate")}
        times = in_turns({name: planned(variant, q, k, v, starts, {}, {}) for name, variant in kinds.items()})
        for name, mine in times.items():
            ratio = mine / times["without RoPE"]
            line(f"causal b={TOKENS // s} h={h}/{kv_heads} s={s} d={d} {name}, {ratio:.3f}x,", mine, 2 * h * s * TOKENS * d, {})


def variants() -> None:
    b, h, s, d = 4, 16, 4096, 128
    q, k, v = tensors(b * s, h, h, d)
    starts, batched = gpu.ints(range(0, b * s + 1, s)), [x.view(b, s, h, d) for x in (q, k, v)]
    flops = 2 * b * h * s * s * d
    peers = best({"fa3 causal": lambda: fa3.flash_attn_func(*batched, causal=True), "fa3 soft cap": lambda: fa3.flash_attn_func(*batched, causal=True, softcap=30.0)} if fa3 else {})
    for name, (variant, plan, run) in gpu.VARIANTS.items():
        params = {n: torch.randn(h, device="cuda") for n in run}
        line(f"variant {name:11} b={b} h={h} s={s} d={d}", ragged(variant, q, k, v, starts, plan, params), flops, peers)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    sections = {f.__name__: f for f in (dense, varlen, paged, rotated, variants)}
    wanted = sys.argv[1:] or list(sections)
    if not set(wanted) <= set(sections):
        sys.exit(f"sections: {' '.join(sections)}; found {' '.join(wanted)}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {gpu.copy_bandwidth():.0f} GB/s")
    for section in wanted:
        sections[section]()
