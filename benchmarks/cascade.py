"""Decode of requests that share a prefix, with and without sharing the work on it, one line a case.

    python benchmarks/cascade.py [SECTION ...]

Sections: decode plan grid (all by default). CUDA graphs over rotating copies of the KV cache, medians; FlashInfer's flat and two-level
decode beside it where it is installed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

import attngen as ag
from attngen.variants import Causal
from gpu import HEAD_DIM, PAGE, copy_bandwidth, flashinfer, geometric_mean, graph_us, ints, starts


class Tree:
    """Requests in groups: those of a group begin with the same ``prefix`` keys, all of different groups with the same ``root`` keys."""

    def __init__(self, groups: int, members: int, prefix: int, suffix: int, root: int = 0, heads: int = 32, kv_heads: int = 8, q_len: int = 1) -> None:
        self.heads, self.kv_heads, self.n, self.q_len = heads, kv_heads, groups * members, q_len
        self.shape = groups, members, prefix, suffix, root
        r, p, s = (-(-x // PAGE) for x in (root, prefix, suffix))
        self.pages = r + groups * (p + members * s)
        names = torch.randperm(self.pages, device="cuda").int()
        first, tables = names[:r], []
        for g in range(groups):
            at = r + g * (p + members * s)
            common = torch.cat((first, names[at : at + p]))
            tables += [torch.cat((common, names[at + p + m * s : at + p + (m + 1) * s])) for m in range(members)]
        self.indices, self.indptr = torch.cat(tables), ints(starts([len(t) for t in tables]))
        self.last = ints([(suffix - 1) % PAGE + 1] * self.n)
        self.read = 4 * self.pages * PAGE * kv_heads * HEAD_DIM
        copies = max(1, -(-(256 << 20) // self.read))
        self.caches = [torch.empty(self.pages, 2, PAGE, kv_heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(copies)]
        self.q = torch.randn(self.n * q_len, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.q)
        self.attn = ag.BatchAttention(
            Causal(), num_heads=heads, num_kv_heads=kv_heads, head_dim=HEAD_DIM, page_size=PAGE, max_requests=self.n, max_q_tokens=self.n * q_len,
            max_pages=len(self.indices), max_q_len=q_len, shared_prefix=True,
        )  # fmt: skip
        self.groups = ints(g for g in range(groups) for _ in range(members))

    def plan(self, mode: str) -> None:
        shared = self.groups if mode == "explicit" else mode
        q = None if self.q_len == 1 else ints(range(0, self.n * self.q_len + 1, self.q_len))
        self.attn.plan(q, self.indptr, self.indices, self.last, shared_prefix=shared)

    def time(self, mode: str) -> float:
        self.plan(mode)
        us = graph_us([lambda cache=cache: self.attn.run(self.q, cache, out=self.out) for cache in self.caches] * max(1, 8 // len(self.caches)))
        self.attn.check()
        return us

    def check(self) -> float:
        """The largest difference between sharing and not."""
        results = []
        for mode in ("off", "auto"):
            self.plan(mode)
            results.append(self.attn.run(self.q, self.caches[0]).float())
        return float((results[0] - results[1]).abs().max())

    def flat(self) -> float:
        space = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD", use_tensor_cores=True)
        wrapper.plan(self.indptr.cpu(), self.indices, self.last.cpu(), self.heads, self.kv_heads, HEAD_DIM, PAGE, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16)  # fmt: skip
        return graph_us([lambda cache=cache: wrapper.run(self.q, cache, out=self.out) for cache in self.caches] * max(1, 8 // len(self.caches)))

    def two_level(self) -> float:
        groups, members, prefix, suffix, _ = self.shape
        p, s = -(-prefix // PAGE), -(-suffix // PAGE)
        table = self.indices.view(self.n, p + s)
        space = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, space, "NHD")
        wrapper.plan(
            [ints(range(0, self.n + 1, members)), ints(range(self.n + 1))], [ints(range(0, groups * p + 1, p)), ints(range(0, self.n * s + 1, s))],
            [table[::members, :p].reshape(-1).contiguous(), table[:, p:].reshape(-1).contiguous()], [ints([PAGE] * groups), self.last],
            self.heads, self.kv_heads, HEAD_DIM, PAGE, q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
        )  # fmt: skip
        return graph_us([lambda cache=cache: wrapper.run(self.q, cache) for cache in self.caches] * max(1, 8 // len(self.caches)))


def decode() -> None:
    for groups, members, prefix, suffix in ((1, 256, 32768, 128), (1, 256, 8192, 128), (1, 64, 8192, 256), (1, 16, 8192, 256), (16, 8, 2048, 256)):
        tree = Tree(groups, members, prefix, suffix)
        off, auto, explicit, worst = tree.time("off"), tree.time("auto"), tree.time("explicit"), tree.check()
        peer = ""
        if flashinfer:
            flat, cascade = tree.flat(), tree.two_level() if groups == 1 else float("inf")
            peer = f" | {auto / min(flat, cascade):.2f}x flashinfer (flat {flat:.1f}, two levels {cascade:.1f} us)"
        print(f"decode bs={groups}x{members} prefix={prefix} suffix={suffix} | off {off:8.1f} us | auto {auto:8.1f} us | groups {explicit:8.1f} us | "
              f"differ by {worst:.4f}{peer}", flush=True)  # fmt: skip
        del tree
        torch.cuda.empty_cache()


def plan() -> None:
    for groups, members, prefix, suffix, root in ((1, 64, 8192, 256, 0), (1, 512, 2048, 128, 0), (64, 8, 1024, 128, 512), (512, 1, 2048, 128, 0)):
        tree = Tree(groups, members, prefix, suffix, root)
        times = [graph_us([lambda: tree.plan(mode)] * 8) for mode in ("off", "auto")]
        print(f"plan {groups}x{members} requests, prefix={prefix} root={root} | off {times[0]:.2f} us | auto {times[1]:.2f} us on the device", flush=True)
        del tree


def grid() -> None:
    """What "auto" costs where another choice would have been better."""
    ratios = []
    for members, groups in ((1, 64), (4, 4), (8, 1), (8, 16), (16, 1), (16, 8), (64, 1), (128, 2)):
        for prefix, suffix in ((128, 512), (512, 128), (1024, 1024), (4096, 256), (16384, 512)):
            if groups * members * (prefix + suffix) > 3 << 20:
                continue
            tree = Tree(groups, members, prefix, suffix)
            off, auto, explicit = tree.time("off"), tree.time("auto"), tree.time("explicit")
            ratios.append(auto / min(off, explicit))
            print(f"grid bs={groups}x{members} prefix={prefix} suffix={suffix} | off {off:8.1f} | groups {explicit:8.1f} | auto {auto:8.1f} us | "
                  f"{ratios[-1]:.3f}x the better", flush=True)  # fmt: skip
            del tree
            torch.cuda.empty_cache()
    print(f"grid: {len(ratios)} batches, geometric mean {geometric_mean(ratios):.3f}, worst {max(ratios):.3f}", flush=True)


def main(wanted: Sequence[str]) -> None:
    sections = {f.__name__: f for f in (decode, plan, grid)}
    if not set(wanted) <= set(sections):
        sys.exit(f"sections: {' '.join(sections)}; found {' '.join(wanted)}")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, flashinfer {getattr(flashinfer, '__version__', None)}; copy {copy_bandwidth():.0f} GB/s")
    for name in wanted or list(sections):
        sections[name]()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    main(sys.argv[1:])
