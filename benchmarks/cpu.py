"""CPU benchmarks: attngen beside torch SDPA and compiled FlexAttention, in one process; start-up costs in fresh ones.

    python benchmarks/cpu.py [sdpa] [decode] [flex] [masks] [startup] [call]      (default: all)

One line a case: what | attngen's median | rate | ratio to the peer (median of the pairwise ratios) | bar. The two sides
run in turn, so that a drift of the machine's speed falls on both.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import attngen as ag
from attngen.variants import (
    ALiBi,
    Causal,
    Chunked,
    DilatedWindow,
    Document,
    Neighborhood2D,
    PrefixLM,
    SlidingWindow,
    SoftCap,
    Streaming,
)

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 15


def paired(ours: Callable[[], object], peer: Callable[[], object], rounds: int = ROUNDS) -> tuple[float, float]:
    """Our median seconds, and the median of the pairwise ratios ours / peer."""
    for _ in range(2):
        ours()
        peer()
    times, ratios = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        peer()
        end = time.perf_counter()
        times.append(middle - start)
        ratios.append((middle - start) / (end - middle))
    return statistics.median(times), statistics.median(ratios)


def line(what: str, seconds: float, rate: str, ratio: float | None, peer: str, bar: float | None) -> None:
    verdict = "" if bar is None or ratio is None else f" | bar {bar:.2f} {'met' if ratio <= bar else 'MISSED'}"
    versus = "" if ratio is None else f" | {ratio:.3f}x {peer}"
    print(f"{what:<64} | {seconds * 1e3:9.3f} ms | {rate:>14}{versus}{verdict}", flush=True)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sdpa() -> None:
    """Causal prefill beside torch SDPA."""
    causal = Causal()
    bars = {(torch.float32, 64): 0.80, (torch.float32, 128): 0.85, (torch.bfloat16, 64): 0.55}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for d in (64, 128):
            q, k, v = (torch.randn(1, 8, 2048, d, dtype=dtype) for _ in range(3))
            ours, ratio = paired(
                lambda: ag.attention(q, k, v, causal, layout="bhsd"),
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            )
            flops = 2 * 8 * 2048 * 2048 * d
            line(f"causal b=1 h=8/8 q=2048 kv=2048 d={d} {name(dtype)}", ours, f"{flops / ours / 1e9:.0f} GFLOP/s",
                 ratio, "sdpa", bars.get((dtype, d)))  # fmt: skip


def decode() -> None:
    """One query against 8k keys, batch 8."""
    causal = Causal()
    for dtype in (torch.float32, torch.bfloat16):
        for heads, kv_heads, d in ((8, 8, 64), (8, 8, 128), (32, 8, 128)):
            q = torch.randn(8, heads, 1, d, dtype=dtype)
            k, v = (torch.randn(8, kv_heads, 8192, d, dtype=dtype) for _ in range(2))
            ours, ratio = paired(
                lambda: ag.attention(q, k, v, causal, layout="bhsd"),
                lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv_heads),
            )
            size = 2 * k.numel() * k.element_size()
            line(f"decode b=8 h={heads}/{kv_heads} q=1 kv=8192 d={d} {name(dtype)}", ours,
                 f"{size / ours / 1e9:.1f} GB/s", ratio, "sdpa", 0.90)  # fmt: skip


def flex() -> None:
    """Variants beside compiled FlexAttention (its block mask is built outside the timed region)."""
    s, h, d = 2048, 8, 64
    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(h)])
    lengths = torch.distributions.LogNormal(5.0, 0.8).sample((s,)).int().clamp(16, 1024)
    ids = torch.repeat_interleave(torch.arange(s), lengths)[:s].int()

    def causal(b, h, q, kv):
        return q >= kv

    def window(b, h, q, kv):
        return (q >= kv) & (q - kv < 256)

    def document(b, h, q, kv):
        return (q >= kv) & (ids[q] == ids[kv])

    def cap(score, b, h, q, kv):
        return 30.0 * torch.tanh(score / 30.0)

    def alibi(score, b, h, q, kv):
        return score + slopes[h] * (kv - q)

    cases = [
        ("soft cap", ag.compose(SoftCap(30.0), Causal()), {}, cap, causal),
        ("alibi", ag.compose(ALiBi(), Causal()), {}, alibi, causal),
        ("window 256", SlidingWindow(256), {}, None, window),
        ("document", ag.compose(Document(), Causal()), document_params(ids), None, document),
    ]
    for dtype, bar in ((torch.float32, 0.6), (torch.bfloat16, 0.3)):
        beside_flex(cases, s, h, d, dtype, bar)


def masks() -> None:
    """Masks alone beside compiled FlexAttention: every kind of skipping."""
    s, h, d, side = 4096, 4, 64, 64
    lengths = torch.distributions.LogNormal(6.0, 1.0).sample((s,)).int().clamp(16, 2048)
    ids = torch.repeat_interleave(torch.arange(s), lengths)[:s].int()
    prefix = torch.tensor([1024], dtype=torch.int32)
    grid = {"height": side, "width": side, "kernel": 13}

    def neighborhood(b, h, q, kv):
        y, x = ((i - 6).clamp(0, side - 13) for i in (q // side, q % side))
        return (kv // side >= y) & (kv // side < y + 13) & (kv % side >= x) & (kv % side < x + 13)

    cases = [
        ("causal", Causal(), {}, None, lambda b, h, q, kv: q >= kv),
        ("window 256", SlidingWindow(256), {}, None, lambda b, h, q, kv: (q >= kv) & (q - kv < 256)),
        ("window 1024", SlidingWindow(1024), {}, None, lambda b, h, q, kv: (q >= kv) & (q - kv < 1024)),
        ("prefix 1024", PrefixLM(), {"prefix_len": prefix}, None, lambda b, h, q, kv: (q >= kv) | (kv < 1024)),
        ("documents", Document() & Causal(), document_params(ids), None, lambda b, h, q, kv: (q >= kv) & (ids[q] == ids[kv])),
        ("chunked 2048", Chunked(2048), {}, None, lambda b, h, q, kv: (q >= kv) & (q // 2048 == kv // 2048)),
        ("streaming 64+1024", Streaming(64, 1024), {}, None, lambda b, h, q, kv: (q >= kv) & ((q - kv < 1024) | (kv < 64))),
        ("dilated 256x4", DilatedWindow(256, 4), {}, None, lambda b, h, q, kv: (q >= kv) & (q - kv < 1024) & ((q - kv) % 4 == 0)),
        ("2-D window 13", Neighborhood2D(), grid, None, neighborhood),
    ]  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        beside_flex(cases, s, h, d, dtype, 0.6, worst=0.8)


def beside_flex(cases: Sequence[Any], s: int, h: int, d: int, dtype: torch.dtype, bar: float, worst: float | None = None) -> None:
    """(title, variant, parameters, score_mod, mask_mod) each: a line a case, and the geometric mean."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    ratios = []
    q, k, v = (torch.randn(1, h, s, d, dtype=dtype) for _ in range(3))
    for what, variant, params, score_mod, mask_mod in cases:
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention)
        mask = create_block_mask(mask_mod, None, None, s, s, device="cpu")
        peer = compiled(q, k, v, score_mod=score_mod, block_mask=mask)
        out = ag.attention(q, k, v, variant, layout="bhsd", **params)
        error = (out.float() - peer.float()).abs().max().item()
        assert error < (1e-4 if dtype == torch.float32 else 5e-2), f"{what}: differs from FlexAttention by {error}"
        ours, ratio = paired(
            lambda: ag.attention(q, k, v, variant, layout="bhsd", **params),
            lambda: compiled(q, k, v, score_mod=score_mod, block_mask=mask),
        )
        ratios.append(ratio)
        line(f"{what} b=1 h={h}/{h} q={s} kv={s} d={d} {name(dtype)}", ours, "", ratio, "flex", worst)
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    print(f"geometric mean {name(dtype)}: {mean:.3f}x flex | bar {bar} {'met' if mean <= bar else 'MISSED'}", flush=True)


def document_params(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"doc": ids.view(1, -1)}


def call() -> None:
    """Overhead of a call beyond the kernel: 8 tokens, against launching the same packed struct."""
    causal = Causal()
    q, k, v = (torch.randn(1, 8, 8, 64) for _ in range(3))
    ag.attention(q, k, v, causal, layout="bhsd")
    site = next(iter(causal._sites.values()))
    out = torch.empty_like(q)
    buffer = bytearray(site.template)
    from attngen.run import _POINTERS, _THREADS, _THREADS_OFFSET

    _POINTERS.pack_into(buffer, 0, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0)
    _THREADS.pack_into(buffer, _THREADS_OFFSET, torch.get_num_threads(), site.scale)

    def per_call(f: Callable[[], object], n: int = 2000) -> float:
        start = time.perf_counter()
        for _ in range(n):
            f()
        return (time.perf_counter() - start) / n * 1e6

    full, bare = [], []
    for _ in range(7):
        full.append(per_call(lambda: ag.attention(q, k, v, causal, layout="bhsd")))
        bare.append(per_call(lambda: site.kernel.launch(buffer)))
    whole, kernel = statistics.median(full), statistics.median(bare)
    met = "met" if whole - kernel <= 15 else "MISSED"
    print(f"call of 8 tokens: {whole:.1f} us, launch alone {kernel:.1f} us, overhead {whole - kernel:.1f} us | bar 15 {met}")


_COLD = """
import json, sys, time, torch
t0 = time.perf_counter()
import attngen as ag
t1 = time.perf_counter()
class Fresh(ag.Variant):
    cap: ag.Scalar = 50.0
    def logits(self, s, at):
        return self.cap * ag.tanh(s / self.cap) + {constant} * at.kv
    def mask(self, at):
        return (at.kv <= at.q) & (at.q - at.kv < 999)
q, k, v = (torch.randn(1, 16, 4, 64) for _ in range(3))
t2 = time.perf_counter()
ag.attention(q, k, v, Fresh())
t3 = time.perf_counter()
record = ag.build_log()[0]
from attngen import cache
seconds = cache.default().lookup(record.key).manifest["seconds"]
loaded = [m for m in ("ninja", "jinja2", "torch.utils.cpp_extension", "subprocess") if m in sys.modules]
print(json.dumps(dict(import_ms=(t1-t0)*1e3, first_ms=(t3-t2)*1e3, compile_ms=seconds*1e3, hit=record.hit,
                      load_ms=record.load_seconds*1e3, loaded=loaded)))
"""


def _fresh(constant: float, folder: str) -> dict:
    env = {**os.environ, "ATTNGEN_CACHE_DIR": folder, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", _COLD.format(constant=constant)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def startup() -> None:
    """Cold and warm starts in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        first = _fresh(0.5, folder)
        total = time.perf_counter() - start
        print(f"first use on a machine, host extension included: {first['first_ms'] / 1e3:.2f} s ({total:.2f} s with python "
              f"and torch) | bar 15 s {'met' if total <= 15 else 'MISSED'}")  # fmt: skip
        runs = [_fresh(1.0 + i / 64, folder) for i in range(5)]
        assert not any(r["hit"] for r in runs)
        cold = statistics.median(r["first_ms"] for r in runs)
        own = statistics.median(r["first_ms"] - r["compile_ms"] for r in runs)
        print(f"cold, spec to first result: {cold / 1e3:.2f} s | bar 3 s {'met' if cold <= 3000 else 'MISSED'}; "
              f"attngen's own share {own:.0f} ms | bar 50 ms {'met' if own <= 50 else 'MISSED'}")  # fmt: skip
        warm = [_fresh(1.0, folder) for _ in range(5)]
        assert all(r["hit"] for r in warm)
        for what, key, bar in (("import attngen after torch", "import_ms", 100), ("load of a cached kernel", "load_ms", 1),
                               ("warm, spec to first result", "first_ms", None)):  # fmt: skip
            value = statistics.median(r[key] for r in warm)
            verdict = "" if bar is None else f" | bar {bar} ms {'met' if value <= bar else 'MISSED'}"
            print(f"{what}: {value:.2f} ms{verdict}")
        print(f"imported on a warm start: {', '.join(warm[0]['loaded']) or 'no ninja, no Jinja, no cpp_extension'}")


SECTIONS = {"sdpa": sdpa, "decode": decode, "flex": flex, "masks": masks, "startup": startup, "call": call}

if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, isa {ag.compile(Causal()).problem.isa}")
    for section in sys.argv[1:] or SECTIONS:
        SECTIONS[section]()
