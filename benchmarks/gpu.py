"""GPU benchmarks of attngen beside its peers in the same process, one line a case.

    python benchmarks/gpu.py [SECTION ...]

Sections: decode skew append append_kv merge_states variants prefill mma plan host (all by default). FlashInfer is timed where it is installed,
FlashAttention-2 through torch. Both sides are replayed as CUDA graphs over rotating copies of the KV cache, 256 MB or more
in all, so that L2 is cold; medians. Planning is timed by itself.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import attngen as ag
from attngen.variants import ALiBi, Causal, Sigmoid, Sinks, SlidingWindow, SoftCap

try:
    import flashinfer
except ImportError:
    flashinfer = None

PAGE, HEAD_DIM = 16, 128
CONTEXTS = ((1, 1024), (1, 16384), (1, 131072), (16, 1024), (16, 8192), (64, 1024), (64, 4096), (128, 2048), (256, 1024))
VARIANTS = {
    "causal": (Causal(), {}, {}),
    "soft cap": (ag.compose(SoftCap(30.0), Causal()), {}, {}),
    "alibi": (ag.compose(ALiBi(), Causal()), {}, {}),
    "window 1024": (SlidingWindow(1024), {}, {}),
    "sinks": (ag.compose(Sinks(), Causal()), {}, {"sinks": True}),
    "sigmoid": (ag.compose(Sigmoid(-8.0), Causal()), {}, {}),
}


def ints(x: Sequence[int]) -> torch.Tensor:
    return torch.tensor(list(x), dtype=torch.int32, device="cuda")


def starts(lengths: Sequence[int]) -> list[int]:
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def graph_us(steps: Sequence[Callable[[], object]], rounds: int = 11) -> float:
    """Median microseconds of a step; all steps replayed as one graph."""
    for step in steps:
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    times = []
    for _ in range(rounds + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(steps))
    return statistics.median(times[2:])


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(statistics.mean(map(math.log, ratios)))


def copy_bandwidth() -> float:
    """GB/s, reads and writes, of a kernel: in a graph ``copy_`` is left to the slower copy engines."""
    a = torch.ones(1 << 28, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / graph_us([lambda: torch.neg(a, out=b)] * 3) / 1e3


class Paged:
    """Caches that hold the same batch: random pages, [pages, 2, PAGE, kv_heads, HEAD_DIM] bf16."""

    def __init__(self, lengths: Sequence[int], heads: int, kv_heads: int, q_len: int = 1) -> None:
        self.lengths, self.heads, self.kv_heads, self.q_len = lengths, heads, kv_heads, q_len
        counts = [-(-n // PAGE) for n in lengths]
        self.pages = sum(counts)
        self.indptr, self.indices = ints(starts(counts)), torch.randperm(self.pages, device="cuda").int()
        self.last = ints((n - 1) % PAGE + 1 for n in lengths)
        self.read = 4 * sum(lengths) * kv_heads * HEAD_DIM  # bytes of K and V
        copies = max(1, -(-(256 << 20) // self.read))
        shape = (self.pages, 2, PAGE, kv_heads, HEAD_DIM)
        self.caches = [torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(copies)]
        self.q = torch.randn(len(lengths) * q_len, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q)

    def time(self, step: Callable[[torch.Tensor], object]) -> float:
        repeat = max(1, 8 // len(self.caches))
        return graph_us([lambda cache=cache: step(cache) for cache in self.caches] * repeat)

    def attngen(self, variant: ag.Variant, plan: dict, run: dict) -> float:
        n = len(self.lengths)
        attn = ag.BatchAttention(variant, num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=HEAD_DIM, page_size=PAGE,
                                 max_requests=n, max_q_tokens=n * self.q_len, max_pages=self.pages, max_q_len=self.q_len)  # fmt: skip
        q_indptr = None if self.q_len == 1 else ints(range(0, n * self.q_len + 1, self.q_len))
        attn.plan(q_indptr, self.indptr, self.indices, self.last, **plan)
        params = {name: torch.randn(self.heads, device="cuda") for name in run}
        us = self.time(lambda cache: attn.run(self.q, cache, out=self.out, **params))
        attn.check()
        return us

    def flashinfer(self, tensor_cores: bool) -> float:
        space = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=tensor_cores)
        wrapper.plan(self.indptr.cpu(), self.indices, self.last.cpu(), self.heads, self.kv_heads, HEAD_DIM, PAGE,
                     q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)  # fmt: skip
        return self.time(lambda cache: wrapper.run(self.q, cache, out=self.out))

    def best_peer(self) -> float | None:
        return min(self.flashinfer(False), self.flashinfer(True)) if flashinfer else None


def peer_text(us: float, peer: float | None) -> str:
    return f" | {us / peer:.2f}x flashinfer ({peer:.1f} us)" if peer else ""


def decode(bandwidth: float) -> None:
    ratios = []
    for heads, kv_heads in ((32, 8), (64, 8), (32, 32)):
        for bs, ctx in CONTEXTS:
            batch = Paged([ctx] * bs, heads, kv_heads)
            us, peer = batch.attngen(Causal(), {}, {}), batch.best_peer()
            ratios += [us / peer] if peer else []
            rate = batch.read / us / 1e3
            print(f"decode bs={bs} ctx={ctx} h={heads}/{kv_heads} d={HEAD_DIM} page {PAGE} bf16, {batch.read >> 20} MB | {us:8.1f} us | "
                  f"{rate:5.0f} GB/s, {rate / bandwidth:.0%} of copy{peer_text(us, peer)}", flush=True)  # fmt: skip
    if ratios:
        print(f"decode: geometric mean {geometric_mean(ratios):.3f}x flashinfer, worst row {max(ratios):.2f}x", flush=True)


def skew(bandwidth: float) -> None:
    random = torch.Generator().manual_seed(1)
    lists = {
        "constant": [1024] * 64,
        "uniform": torch.randint(512, 1025, (64,), generator=random).tolist(),
        "zipf": [max(64, 16384 // i) for i in range(1, 65)],
        "one long": [65536] + [128] * 63,
    }
    for name, lengths in lists.items():
        batch = Paged(lengths, 32, 8)
        us, peer = batch.attngen(Causal(), {}, {}), batch.best_peer()
        rate = batch.read / us / 1e3
        print(f"skew {name:9} 64 requests, h=32/8, {batch.read >> 20} MB | {us:8.1f} us | {rate:5.0f} GB/s, {rate / bandwidth:.0%} "
              f"of copy{peer_text(us, peer)}", flush=True)  # fmt: skip


def append(bandwidth: float) -> None:
    plain = None
    for q_len in (1, 4, 8):
        us = Paged([4096] * 64, 32, 8, q_len).attngen(Causal(), {}, {})
        plain = plain or us
        print(f"append q_len={q_len} bs=64 ctx=4096 h=32/8 d={HEAD_DIM} | {us:8.1f} us | {us / plain:.3f}x decode", flush=True)


def append_kv(bandwidth: float) -> None:
    kv_heads, n = 8, 16
    for megabytes in (64, 256):
        tokens = (megabytes << 20) // (4 * kv_heads * HEAD_DIM)
        copies = max(2, 512 // megabytes)
        k, v = (torch.randn(copies, tokens, kv_heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        caches = torch.empty(copies, tokens // PAGE, 2, PAGE, kv_heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        request_of, positions = ag.append_positions(ints(range(0, tokens + 1, tokens // n)), ints([tokens // n] * n), tokens)
        table = torch.randperm(tokens // PAGE, device="cuda").int().view(n, -1)
        slots = table[request_of.long(), (positions // PAGE).long()] * PAGE + positions % PAGE
        tables = {"positions": positions, "request_of": request_of, "block_table": table}
        for name, given in (("plain", tables), ("plain, slots", {"slot_mapping": slots.long()}), ("rope", tables | {"rope": ag.RoPE()})):
            us = graph_us([lambda i=i: ag.append_kv(k[i], v[i], caches[i], **given) for i in range(copies)])
            rate = 2 * (megabytes << 20) / us / 1e3
            print(f"append_kv {name:12} {megabytes} MB written, page {PAGE}, h={kv_heads} d={HEAD_DIM} bf16 | {us:8.1f} us | "
                  f"{rate:5.0f} GB/s read and written, {rate / bandwidth:.0%} of copy", flush=True)  # fmt: skip
        ag.check_append()


def merge_states(bandwidth: float) -> None:
    tokens, heads = 16384, 32
    for n, dtype in ((2, torch.bfloat16), (2, torch.float32), (4, torch.float32)):
        outs = [torch.randn(tokens, heads, HEAD_DIM, device="cuda").to(dtype) for _ in range(n)]
        lses = [torch.randn(tokens, heads, device="cuda") for _ in range(n)]
        us = graph_us([lambda: ag.merge_states(outs, lses)] * 3)
        moved = (n + 1) * (outs[0].nbytes + lses[0].nbytes)
        print(f"merge_states n={n} {tokens} tokens h={heads} d={HEAD_DIM} {str(dtype)[6:]} | {us:8.1f} us | {moved / us / 1e3:5.0f} GB/s, "
              f"{moved / us / 1e3 / bandwidth:.0%} of copy", flush=True)  # fmt: skip


def variants(bandwidth: float) -> None:
    for bs, ctx in ((64, 4096), (16, 131072)):
        plain = None
        for name, (variant, plan, run) in VARIANTS.items():
            if ctx == 131072 and name not in ("causal", "window 1024"):
                continue
            us = Paged([ctx] * bs, 32, 8).attngen(variant, plan, run)
            plain = plain or us
            print(f"decode {name:11} bs={bs} ctx={ctx} h=32/8 | {us:8.1f} us | {us / plain:.3f}x plain", flush=True)


class Prompts:
    """Prompts of one length, 16k tokens in all: ragged, and in pages in random order."""

    def __init__(self, d: int, h: int, s: int) -> None:
        self.d, self.h, self.s, self.b = d, h, s, 16384 // s
        b, tokens = self.b, 16384
        self.q, self.k, self.v = (torch.randn(tokens, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        self.dense = [t.view(b, s, h, d).transpose(1, 2) for t in (self.q, self.k, self.v)]
        self.out, self.indptr = torch.empty_like(self.q), ints(range(0, tokens + 1, s))
        self.pages = tokens // PAGE
        self.table = torch.randperm(self.pages, device="cuda").int()
        self.cache = tuple(torch.empty(self.pages, PAGE, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for to, t in zip(self.cache, (self.k, self.v)):
            to[self.table.long()] = t.view(self.pages, PAGE, h, d)
        self.given = dict(num_heads=h, num_kv_heads=h, head_dim=d, max_requests=b, max_q_tokens=tokens)

    def ragged(self, variant: ag.Variant, plan: dict, run: dict) -> float:
        attn = ag.BatchAttention(variant, max_kv_tokens=16384, **self.given)
        attn.plan(self.indptr, self.indptr, **plan)
        params = {n: torch.randn(self.h, device="cuda") for n in run}
        us = graph_us([lambda: attn.run(self.q, (self.k, self.v), out=self.out, **params)] * 3)
        attn.check()
        return us

    def paged(self, variant: ag.Variant) -> float:
        attn = ag.BatchAttention(variant, max_pages=self.pages, page_size=PAGE, **self.given)
        attn.plan(self.indptr, ints(range(0, self.pages + 1, self.s // PAGE)), self.table, ints([PAGE] * self.b))
        return graph_us([lambda: attn.run(self.q, self.cache, out=self.out)] * 3)

    def fa2(self, causal: bool) -> float:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return graph_us([lambda: F.scaled_dot_product_attention(*self.dense, is_causal=causal)] * 3)

    def text(self, name: str, us: float, causal: bool) -> str:
        flops = 4 * self.b * self.h * self.s * self.s * self.d / (2 if causal else 1)
        return (f"{name:11} b={self.b} h={self.h}/{self.h} s={self.s} d={self.d} bf16 | {us:8.1f} us | {flops / us / 1e6:5.0f} TFLOP/s"
                f"{' of the causal half' if causal else ''}")  # fmt: skip


def prefill(bandwidth: float) -> None:
    for d, h in ((128, 16), (64, 32), (256, 8)):
        for s in (1024, 4096, 8192):
            batch = Prompts(d, h, s)
            for causal in (False, True):
                chosen = {n: x for n, x in VARIANTS.items() if n == "causal"} if causal else {"full": (ag.Variant(), {}, {})}
                if causal and (d, s) == (128, 4096):
                    chosen = VARIANTS
                plain, peer = None, batch.fa2(causal)
                for name, (variant, plan, run) in chosen.items():
                    us = batch.ragged(variant, plan, run)
                    paged = f" | pages of {PAGE}: {batch.paged(variant) / us:.3f}x" if name in ("full", "causal") else ""
                    plain = plain or us
                    print(f"prefill {batch.text(name, us, causal)} | {us / plain:.2f}x plain | {us / peer:.2f}x fa2{paged}", flush=True)


@contextlib.contextmanager
def without_hopper() -> Iterator[None]:
    """Objects made meanwhile get the kernels of other GPUs: mma.sync instead of wgmma."""
    from attngen import choose_hopper
    from attngen.errors import UnsupportedError

    def refuse(*_: object, **__: object) -> None:
        raise UnsupportedError("left out")

    kept, choose_hopper.choose_hopper = choose_hopper.choose_hopper, refuse
    try:
        yield
    finally:
        choose_hopper.choose_hopper = kept


def mma(bandwidth: float) -> None:
    with without_hopper():
        for d, h in ((128, 16), (64, 32), (256, 8)):
            for s in (1024, 4096, 8192):
                batch = Prompts(d, h, s)
                for name, variant in (("full", ag.Variant()), ("causal", Causal())):
                    causal = name == "causal"
                    us = batch.ragged(variant, {}, {})
                    print(f"mma.sync {batch.text(name, us, causal)} | {us / batch.fa2(causal):.2f}x fa2 | pages of {PAGE}: "
                          f"{batch.paged(variant) / us:.3f}x", flush=True)  # fmt: skip


def plan(bandwidth: float) -> None:
    for n in (1, 64, 512):
        batch = Paged([128] * n, 32, 8)
        attn = ag.BatchAttention(Causal(), num_heads=32, num_kv_heads=8, head_dim=HEAD_DIM, page_size=PAGE, max_requests=n,
                                 max_q_tokens=n, max_pages=batch.pages, max_q_len=1)  # fmt: skip
        us = graph_us([lambda: attn.plan(None, batch.indptr, batch.indices, batch.last)] * 16)
        print(f"plan requests={n} | {us:.2f} us on the device", flush=True)


def host_us(step: Callable[[], object], rounds: int = 20, count: int = 50) -> float:
    """Median microseconds of host time of a call."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            step()
        times.append((time.perf_counter() - start) / count * 1e6)
    return statistics.median(times)


def host(bandwidth: float) -> None:
    batch = Paged([128] * 8, 32, 8)
    attn = ag.BatchAttention(Causal(), num_heads=32, num_kv_heads=8, head_dim=HEAD_DIM, page_size=PAGE, max_requests=8, max_q_tokens=8,
                             max_pages=batch.pages, max_q_len=1)  # fmt: skip
    pages = batch.indptr, batch.indices, batch.last
    attn.plan(None, *pages)
    figures = {
        "run(out=)": host_us(lambda: attn.run(batch.q, batch.caches[0], out=batch.out)),
        "run": host_us(lambda: attn.run(batch.q, batch.caches[0])),
        "plan": host_us(lambda: attn.plan(None, *pages)),
    }
    k, slots = batch.caches[0][0, 0, :8].clone(), torch.arange(8, device="cuda")
    figures["append_kv"] = host_us(lambda: ag.append_kv(k, k, batch.caches[0], slot_mapping=slots))
    print("host " + ", ".join(f"{name} {us:.1f} us" for name, us in figures.items()), flush=True)


SECTIONS = (decode, skew, append, append_kv, merge_states, variants, prefill, mma, plan, host)

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    names = [s.__name__ for s in SECTIONS]
    wanted = sys.argv[1:] or names
    if not set(wanted) <= set(names):
        sys.exit(f"sections: {' '.join(names)}; found {' '.join(wanted)}")
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, flashinfer {getattr(flashinfer, '__version__', None)}; copy {copy:.0f} GB/s")
    for section in SECTIONS:
        if section.__name__ in wanted:
            section(copy)
