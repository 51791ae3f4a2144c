"""Explicit sparsity: random blocks beside dense attention, a packed mask beside the declared one. On a GPU if there is one, else on the CPU.

    python benchmarks/sparse.py [blocks] [variable] [custom]      (default: all)

One line a case: what | median | times as fast as dense, or ratio to declared | bar. A GPU's calls are replayed as CUDA graphs; on the CPU
both sides run in turn. Results are compared with the oracle, on a part of the queries, before anything is timed.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch

import attngen as ag
from attngen.variants import Causal, CustomMask, Full

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
HEADS, DIM = (16, 128) if GPU else (8, 64)
LENGTH = 8192 if GPU else 4096
DENSITY = 0.1


def compared(ours: Callable[[], object], peer: Callable[[], object]) -> tuple[float, float, float]:
    """Microseconds of ours and of the peer, and the ratio ours / peer."""
    if not GPU:
        from cpu import paired

        seconds, ratio = paired(ours, peer, 9)
        return seconds * 1e6, seconds * 1e6 / ratio, ratio
    from gpu import graph_us

    for _ in range(2):  # clocks settle
        us, other = graph_us([ours] * 5), graph_us([peer] * 5)
    return us, other, us / other


def host_us(step: Callable[[], object]) -> float:
    """Median microseconds of a step and all that it launches."""
    import time

    times = []
    for _ in range(20):
        start = time.perf_counter()
        step()
        if GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:]) * 1e6


def tensors(layout: str = "NHD") -> list[torch.Tensor]:
    shape = (LENGTH, HEADS, DIM) if layout == "NHD" else (HEADS, LENGTH, DIM)
    return [torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(3)]


def verify(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, what: str) -> None:
    """The last queries of two heads, NHD, against float64; ``kept``: bool [heads | 1, rows, N] of those queries."""
    rows = kept.shape[1]
    for head in (0, HEADS - 1):
        s = q[-rows:, head].double() @ k[:, head].double().T / DIM**0.5
        s = s.masked_fill(~kept[head % kept.shape[0]].to(s.device), -torch.inf)
        error = (s.softmax(-1).nan_to_num() @ v[:, head].double() - out[-rows:, head]).abs().max().item()
        assert error < (2e-2 if DTYPE == torch.bfloat16 else 1e-4), f"{what}: off by {error}"


def line(what: str, us: float, text: str, good: bool | None, bar: str, more: str = "") -> None:
    verdict = "" if good is None else f" | bar {bar} {'met' if good else 'MISSED'}"
    print(f"{what:<58} | {us:9.1f} us | {text}{verdict}{more}", flush=True)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> Callable[[], object]:
    turned = [t[None] for t in (q, k, v)]
    out = torch.empty_like(turned[0])
    return lambda: ag.attention(*turned, Full(), layout=layout, out=out)


def blocks() -> None:
    """Random blocks, 10% of them, MHA."""
    for block, bar in ((64, 4.0), (128, 7.0)):
        count = LENGTH // block
        for per_head in (False, True):
            layout = "HND" if per_head else "NHD"
            q, k, v = tensors(layout)
            kept = torch.rand(HEADS if per_head else 1, count, count) < DENSITY
            ends = kept.sum(2).flatten().cumsum(0).int()
            indptr = torch.cat([torch.zeros(1, dtype=torch.int32), ends])
            if per_head:
                indptr = torch.stack([indptr[h * count : (h + 1) * count + 1] for h in range(HEADS)])
            indices = kept.nonzero()[:, 2].int().to(DEVICE)
            indptr = indptr.to(DEVICE)
            attn = ag.BlockSparseAttention(num_heads=HEADS, num_kv_heads=HEADS, head_dim=DIM, R=block, C=block, max_q_tokens=LENGTH,
                                           max_kv_tokens=LENGTH, per_head=per_head, kv_layout=layout, dtype=DTYPE, device=DEVICE)  # fmt: skip
            attn.plan(indptr, indices)
            out = torch.empty_like(q)
            attn.run(q, k, v, out=out)
            attn.check()
            turned = [t.transpose(0, 1) if per_head else t for t in (out, q, k, v)]
            verify(*turned, kept[:, -1:].repeat_interleave(block, 1).repeat_interleave(block, 2), "blocks")
            planning = host_us(lambda: attn.plan(indptr, indices))
            us, _, ratio = compared(lambda: attn.run(q, k, v, out=out), dense(q, k, v, "bhsd" if per_head else "bshd"))
            share = kept.float().mean().item()
            line(f"blocks of {block}, {'per head' if per_head else 'shared'}, {share:.1%} of {LENGTH} x {LENGTH} h={HEADS} d={DIM}", us,
                 f"{1 / ratio:5.2f}x as fast as dense", 1 / ratio >= bar, f"{bar:.0f}x", f" | plan {planning:.0f} us")  # fmt: skip


def variable() -> None:
    """Blocks of random sizes per head, multiples of 1 and of 8."""
    count = LENGTH // 128
    for multiple in (1, 8):
        q, k, v = tensors("HND")
        cuts = torch.stack([(torch.randperm(LENGTH // multiple - 1)[: count - 1] + 1).sort()[0] * multiple for _ in range(HEADS)])
        edges = torch.cat([torch.zeros(HEADS, 1, dtype=cuts.dtype), cuts, torch.full((HEADS, 1), LENGTH)], 1)
        col_sz, row_sz = edges.diff(dim=1).int(), torch.full((HEADS, count), 128, dtype=torch.int32)
        kept = torch.rand(HEADS, count, count) < DENSITY
        share = (kept.float().mean(1) * col_sz).sum().item() / LENGTH / HEADS
        attn = ag.VariableBlockSparseAttention(
            num_heads=HEADS, num_kv_heads=HEADS, head_dim=DIM, max_q_tokens=LENGTH, max_kv_tokens=LENGTH, max_row_blocks=count, max_row_size=128,
            multiple=multiple, max_blocks=int(HEADS * count * LENGTH / multiple * 0.2), dtype=DTYPE, device=DEVICE)  # fmt: skip
        given = [t.to(DEVICE) for t in (kept, row_sz, col_sz)]
        attn.plan(*given)
        out = attn.run(q, k, v)
        attn.check()
        columns = torch.stack([kept[h, -1:].repeat_interleave(col_sz[h], 1) for h in range(HEADS)]).expand(-1, 128, -1)
        verify(*(t.transpose(0, 1) for t in (out, q, k, v)), columns, "variable")
        planning = host_us(lambda: attn.plan(*given))
        us, _, ratio = compared(lambda: attn.run(q, k, v, out=out), dense(q, k, v, "bhsd"))
        line(f"variable blocks, multiples of {multiple}, {share:.1%} of {LENGTH} x {LENGTH} h={HEADS}", us,
             f"{1 / ratio:5.2f}x as fast as dense", None, "", f" | plan {planning:.0f} us")  # fmt: skip


def custom() -> None:
    """A packed mask that says causal, beside Causal(), ragged."""
    for batch, length in ((4, 4096), (1, 16384)) if GPU else ((1, 2048), (1, 4096)):
        q, k, v = (torch.randn(batch * length, HEADS, DIM, device=DEVICE, dtype=DTYPE) for _ in range(3))
        keep = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
        bits = ag.packbits(keep).repeat(batch)
        indptr = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * length
        lens, outs, steps = torch.full((batch,), length, dtype=torch.int32, device=DEVICE), [], []
        facts = dict(num_heads=HEADS, num_kv_heads=HEADS, head_dim=DIM, page_size=None, max_requests=batch, max_q_tokens=batch * length,
                     max_kv_tokens=batch * length, dtype=DTYPE, device=DEVICE)  # fmt: skip

        def prepare() -> dict[str, torch.Tensor]:
            return ag.custom_mask(bits, q_indptr=indptr, kv_lens=lens, num_tokens=batch * length)

        for variant, params in ((CustomMask(), prepare()), (Causal(), {})):
            attn, out = ag.BatchAttention(variant, **facts), torch.empty_like(q)
            attn.plan(indptr, indptr, **params)
            steps.append(lambda attn=attn, out=out: attn.run(q, (k, v), out=out))
            steps[-1]()
            attn.check()
            outs.append(out)
        error = (outs[0].float() - outs[1].float()).abs().max().item()
        assert error < 2e-2, f"custom: off by {error}"
        us, _, ratio = compared(*steps)
        line(f"packed mask equal to causal, b={batch} s={length} h={HEADS} d={DIM}", us, f"{ratio:.3f}x declared causal", ratio <= 1.15, "1.15",
             f" | custom_mask {host_us(prepare):.0f} us")  # fmt: skip


SECTIONS = {"blocks": blocks, "variable": variable, "custom": custom}

if __name__ == "__main__":
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, {str(DTYPE).removeprefix('torch.')}")
    for section in sys.argv[1:] or SECTIONS:
        SECTIONS[section]()
