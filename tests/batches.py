"""Random batches for BatchAttention, in pages and in dense form for the oracle; every slot that must not be read is NaN."""

from __future__ import annotations

from typing import Any

import attngen as ag
import torch
from compare import compare

PHASES = {  # query tokens and keys of each request
    "decode": ([1, 1, 1, 1], [700, 1, 64, 5000]),
    "append": ([4, 1, 7, 3], [300, 65, 7, 129]),
    "prefill": ([200, 130], [200, 513]),
    "mixed": ([1, 64, 0, 200, 3, 1], [900, 64, 40, 200, 0, 17]),
    "longer queries": ([70, 20], [17, 0]),
}


class Batch:
    """A random batch. Tensors named dense_* are on the CPU, all others on ``device``."""

    def __init__(
        self, q_lens, kv_lens, page_size=16, layout="NHD", d=128, dv=None, heads=8, kv_heads=2, dtype=torch.bfloat16, seed=0,
        device="cuda",
    ):  # fmt: skip
        self.q_lens, self.kv_lens, self.page_size, self.layout, self.device = q_lens, kv_lens, page_size, layout, device
        random_ = torch.Generator().manual_seed(seed)
        requests, dv = len(q_lens), dv or d
        self.dense_q = torch.randn(requests, max(*q_lens, 1), heads, d, generator=random_).to(dtype)
        self.dense_k = torch.randn(requests, max(*kv_lens, 1), kv_heads, d, generator=random_).to(dtype)
        self.dense_v = torch.randn(requests, max(*kv_lens, 1), kv_heads, dv, generator=random_).to(dtype)
        counts = [-(-n // page_size) for n in kv_lens]
        pages = torch.randperm(sum(counts) + 5, generator=random_)
        shape = (len(pages), page_size, kv_heads) if layout == "NHD" else (len(pages), kv_heads, page_size)
        k, v = torch.full((*shape, d), torch.nan, dtype=dtype), torch.full((*shape, dv), torch.nan, dtype=dtype)
        self.indices, self.table = [], torch.full((requests, max(*counts, 1)), -1, dtype=torch.int32)
        for r, (n, count) in enumerate(zip(kv_lens, counts)):
            own = pages[len(self.indices) : len(self.indices) + count].tolist()
            self.table[r, :count] = torch.tensor(own, dtype=torch.int32)
            self.indices += own
            for j in range(n):
                place = (own[j // page_size], j % page_size) if layout == "NHD" else (own[j // page_size], slice(None), j % page_size)
                k[place], v[place] = self.dense_k[r, j], self.dense_v[r, j]
        self.q = torch.cat([self.dense_q[r, :n] for r, n in enumerate(q_lens)]).to(device)
        self.k, self.v = k.to(device), v.to(device)
        self.table = self.table.to(device)
        self.q_indptr = self.ints([0, *torch.tensor(q_lens).cumsum(0).tolist()])
        self.kv_indptr = self.ints([0, *torch.tensor(counts).cumsum(0).tolist()])
        self.kv_indices = self.ints(self.indices or [0])
        self.last = self.ints([n - (c - 1) * page_size if c else 0 for n, c in zip(kv_lens, counts)])

    def ints(self, x: Any) -> torch.Tensor:
        """An int32 vector on the batch's device."""
        return torch.tensor(x, dtype=torch.int32, device=self.device)

    def pages(self) -> tuple[torch.Tensor, ...]:
        """Arguments of plan."""
        return self.q_indptr, self.kv_indptr, self.kv_indices, self.last

    def ragged(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """kv_indptr, k and v without pages."""
        k, v = (
            torch.cat([dense[r, :n] for r, n in enumerate(self.kv_lens)]).to(self.device) for dense in (self.dense_k, self.dense_v)
        )
        return self.ints([0, *torch.tensor(self.kv_lens).cumsum(0).tolist()]), k, v

    def expected(self, variant: ag.Variant, **params: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Packed output and LSE of the oracle."""
        lse = variant.trace.weight is None
        result = ag.reference(self.dense_q, self.dense_k, self.dense_v, variant, q_lens=self.q_lens, kv_lens=self.kv_lens,
                              return_lse=lse, **params)  # fmt: skip
        out, sums = result if lse else (result, None)
        out = torch.cat([out[r, :n] for r, n in enumerate(self.q_lens)])
        return out, None if sums is None else torch.cat([sums[r, :, :n].T for r, n in enumerate(self.q_lens)])

    def _tokens(self) -> torch.Tensor:
        """Of each packed row of q its row among those of padded requests, which are the oracle's."""
        return torch.cat([torch.arange(n) + r * self.dense_q.shape[1] for r, n in enumerate(self.q_lens)])

    def packed(self, x: torch.Tensor) -> torch.Tensor:
        """A parameter by the rows of padded requests as one by packed rows of q."""
        return x[self._tokens()]

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """The other way."""
        rows = self.dense_q.shape[1] * len(self.q_lens)
        return torch.zeros(rows, *x.shape[1:], dtype=x.dtype).index_copy_(0, self._tokens(), x.cpu())

    def sizes(self) -> dict[str, int]:
        """Arguments of variants.example_params."""
        return dict(requests=len(self.q_lens), q_len=self.dense_q.shape[1], kv_len=self.dense_k.shape[1],
                    num_heads=self.dense_q.shape[2], num_kv_heads=self.dense_k.shape[2])  # fmt: skip


def make(variant: ag.Variant, batch: Batch, **more: Any) -> ag.BatchAttention:
    """A BatchAttention that fits the batch."""
    given = dict(
        num_heads=batch.dense_q.shape[2], num_kv_heads=batch.dense_k.shape[2], head_dim=batch.dense_k.shape[-1],
        head_dim_v=batch.dense_v.shape[-1], page_size=batch.page_size, dtype=batch.q.dtype, max_requests=64,
        max_q_tokens=4096, max_pages=8192, kv_layout=batch.layout, device=batch.device,
    )  # fmt: skip
    return ag.BatchAttention(variant, **{**given, **more})


def planned(
    variant: ag.Variant, batch: Batch, plan: dict[str, Any], ragged: bool = False
) -> tuple[ag.BatchAttention, torch.Tensor, torch.Tensor]:
    """An object that has planned the batch, and its k and v: in pages, or ragged."""
    if ragged:
        attn = make(variant, batch, page_size=None, max_kv_tokens=8192, max_pages=None)
        kv_indptr, k, v = batch.ragged()
        attn.plan(batch.q_indptr, kv_indptr, **plan)
        return attn, k, v
    attn = make(variant, batch)
    attn.plan(*batch.pages(), **plan)
    return attn, batch.k, batch.v


def split_params(
    variant: ag.Variant, params: dict[str, Any], device: str = "cuda", batch: Batch | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What belongs to plan and what to run, on the device. With ``batch``, rows of padded queries, which the oracle takes, become packed
    ones."""
    reads = variant.trace.mask.params if variant.trace.mask is not None else ()
    if batch is not None:
        fields = variant.trace.fields
        params = {n: batch.packed(x) if fields[n].axes[:1] == ("q_tokens",) else x for n, x in params.items()}
    there = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in params.items()}
    return {n: x for n, x in there.items() if n in reads}, {n: x for n, x in there.items() if n not in reads}


def judge(out: torch.Tensor, lse: torch.Tensor | None, batch: Batch, variant: ag.Variant, **params: Any) -> None:
    """Compare with the oracle."""
    ref, ref_lse = batch.expected(variant, **params)
    like = ref.to(out.dtype) + (2e-3 if out.dtype != torch.float32 else 0)
    compare(out.cpu(), ref, like=like)
    if lse is not None:
        rounded = torch.float16 if out.dtype != torch.float32 else torch.float32
        compare(lse.cpu(), ref_lse, dtype=out.dtype if variant.trace.rope else rounded)  # rotated q is rounded again
