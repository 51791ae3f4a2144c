"""The library's variants once more, straight from their formulas: dense matrices of plain torch, request by request.

Nothing here goes through attngen. In float64 a formula judges the oracle; in a kernel's own dtype it shows what error
torch makes there, which is the yardstick for the kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Matrix = torch.Tensor


@dataclass
class Request:
    """One request: its sizes and the variant's parameters."""

    index: int
    q_len: int
    kv_len: int
    heads: int
    offset: int  # position of the first query
    params: dict[str, Any]

    @property
    def distance(self) -> Matrix:
        """q - kv, ``[q_len, kv_len]``."""
        return self.positions[:, None] - torch.arange(self.kv_len)[None, :]

    @property
    def positions(self) -> Matrix:
        return torch.arange(self.q_len) + self.offset

    def __getattr__(self, name: str) -> Any:
        try:
            return self.params[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class Formula:
    """What a variant changes in softmax(q k^T * scale) v."""

    mask: Callable[[Request], Matrix] | None = None  # bool [q_len, kv_len]
    logits: Callable[[Matrix, Request], Matrix] = lambda s, r: s
    sink: Callable[[Request], Matrix] | None = None  # [heads]
    weight: Callable[[Matrix, Request], Matrix] | None = None
    scores: Callable[[Matrix, Matrix, Request], Matrix] = lambda q, k, r: q @ k.transpose(-1, -2)
    scale: float | None = None


def evaluate(
    name: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: dict[str, Any],
    *,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Formula ``name`` over q ``[batch, q_len, heads, head_dim]``, computed in ``dtype``: out and LSE (natural log)."""
    formula = FORMULAS[name]
    batch, rows, heads, head_dim = q.shape
    out = torch.zeros(batch, rows, heads, v.shape[3], dtype=dtype)
    lse = torch.full((batch, heads, rows), -torch.inf, dtype=dtype)
    scale = formula.scale if formula.scale is not None else head_dim**-0.5
    # a Scalar is float32, in the formula as in the kernel
    params = {n: torch.tensor(x).item() if isinstance(x, float) else x for n, x in params.items()}
    for b, (n_q, n_kv) in enumerate(zip(q_lens, kv_lens)):
        r = Request(b, n_q, n_kv, heads, n_kv - n_q, params)
        qb, kb, vb = (x[b, :n].to(dtype).transpose(0, 1) for x, n in ((q, n_q), (k, n_kv), (v, n_kv)))
        kb, vb = (x.repeat_interleave(heads // k.shape[2], 0) for x in (kb, vb))
        s = formula.logits(formula.scores(qb, kb, r) * scale, r).to(dtype)
        mask = torch.ones(n_q, n_kv, dtype=torch.bool) if formula.mask is None else formula.mask(r)
        if formula.weight is not None:
            p = formula.weight(s, r).masked_fill(~mask, 0)
        else:
            s = s.masked_fill(~mask, -torch.inf)
            if formula.sink is not None:  # one more key, whose value is dropped
                s = torch.cat([s, formula.sink(r).to(dtype).view(-1, 1, 1).expand(heads, n_q, 1)], -1)
            lse[b, :, :n_q] = torch.logsumexp(s, -1) if s.shape[-1] else -torch.inf
            p = torch.softmax(s.to(torch.promote_types(dtype, torch.float32)), -1)[..., :n_kv].nan_to_num(0)
        out[b, :n_q] = (p.to(dtype) @ vb).transpose(0, 1)
    return out, lse


# ---------------------------------------------------------------- masks, drawn


def causal(r: Request) -> Matrix:
    return torch.ones(r.q_len, r.kv_len, dtype=torch.bool).tril(r.offset)


def window(r: Request) -> Matrix:
    return causal(r).triu(r.offset - (r.window - 1))


def prefix(r: Request) -> Matrix:
    mask = causal(r)
    mask[:, : int(r.prefix_len[r.index])] = True
    return mask


def document(r: Request) -> Matrix:
    ids = r.doc[r.index]
    rows = torch.tensor([int(ids[p]) if p >= 0 else 0 for p in r.positions.tolist()], dtype=torch.int64)
    return rows[:, None] == ids[None, : r.kv_len]


def chunked(r: Request) -> Matrix:
    mask = torch.zeros(r.q_len, r.kv_len, dtype=torch.bool)
    for start in range(0, r.kv_len, r.chunk):
        inside = ((r.positions >= start) & (r.positions < start + r.chunk)).nonzero().flatten()
        mask[inside, start : start + r.chunk] = True
    return mask & causal(r)


def streaming(r: Request) -> Matrix:
    mask = window(r)
    mask[:, : r.sinks] = True
    return mask & causal(r)


def dilated(r: Request) -> Matrix:
    mask = torch.zeros(r.q_len, r.kv_len, dtype=torch.bool)
    for i, position in enumerate(r.positions.tolist()):
        for j in range(r.window):
            if 0 <= position - j * r.dilation:
                mask[i, position - j * r.dilation] = True
    return mask


def tree(r: Request) -> Matrix:
    table = r.ancestors[r.index][: r.q_len].bool()
    if r.offset < 0:  # the tree begins before the cache
        return table[:, -r.offset : -r.offset + r.kv_len]
    return torch.cat([torch.ones(r.q_len, r.offset, dtype=torch.bool), table[:, : r.q_len]], 1)


# ---------------------------------------------------------------- logits


def soft_cap(s: Matrix, r: Request) -> Matrix:
    return torch.tanh(s / r.cap) * r.cap


def paper_slopes(n: int) -> list[float]:
    """``get_slopes`` of the ALiBi paper's code."""
    if math.log2(n).is_integer():
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]
    closest = 2 ** math.floor(math.log2(n))
    return paper_slopes(closest) + paper_slopes(2 * closest)[0::2][: n - closest]


def alibi(s: Matrix, r: Request) -> Matrix:
    slopes = torch.tensor(paper_slopes(r.heads), dtype=torch.float64)
    return s - (slopes.view(-1, 1, 1) * r.distance.abs()).to(s.dtype)


def alibi_slopes(s: Matrix, r: Request) -> Matrix:
    return s - (r.slopes.double().view(-1, 1, 1) * r.distance.abs()).to(s.dtype)


def t5_bias(s: Matrix, r: Request) -> Matrix:
    from transformers.models.t5.modeling_t5 import T5Attention

    buckets = T5Attention._relative_position_bucket(-r.distance, bidirectional=True, num_buckets=32, max_distance=128)
    return s + r.table[:, buckets].to(s.dtype)


def llama4(s: Matrix, r: Request) -> Matrix:
    positions = r.positions.clamp(min=-1).double()
    scales = torch.log1p(torch.floor((positions + 1.0) / r.floor_scale)) * r.attn_scale + 1.0
    return s * scales[:, None].to(s.dtype)


def grok(s: Matrix, r: Request) -> Matrix:
    positions, longest = r.positions.tolist(), r.temperature_len
    factors = [math.log2(p) / math.log2(longest) if p > longest else 1.0 for p in positions]
    return soft_cap(s, r) * torch.tensor(factors, dtype=torch.float64)[:, None].to(s.dtype)


def custom_mask(r: Request) -> Matrix:
    first, requests = int(r.mask_indptr[r.index]), len(r.mask_indptr) - 1
    bits = np.unpackbits(r.packed_custom_mask.numpy()[first:], bitorder="little")[: r.q_len * r.kv_len]
    mask = torch.from_numpy(bits.reshape(r.q_len, r.kv_len)).bool()
    token = r.index * (len(r.mask_begin) // requests)
    for i, row in enumerate(mask):
        begin, run, end = (int(x[token + i]) for x in (r.mask_begin, r.mask_run, r.mask_end))
        row[:run] = True
        row[:begin] = False
        row[end:] = False
    return mask


# ---------------------------------------------------------------- rotary


def rotate(x: torch.Tensor, positions: torch.Tensor, frequencies: Sequence[float]) -> torch.Tensor:
    """Turn the complex numbers (x[i] + 1j * x[i + d/2]) by position * frequency, an angle in float32."""
    half = x.shape[-1] // 2
    angle = (positions.float()[:, None] * torch.tensor(frequencies, dtype=torch.float64).float()).double()
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1).to(x.dtype)


def llama3_frequencies(head_dim: int) -> list[float]:
    """``apply_scaling`` of Meta's llama-models, for Llama 3.1."""
    found = []
    for i in range(0, head_dim, 2):
        frequency = 500000.0 ** (-i / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength > 8192 / 1.0:
            frequency /= 8
        elif wavelength >= 8192 / 4.0:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            frequency = (1 - smooth) * frequency / 8 + smooth * frequency
        found.append(frequency)
    return found


def llama3_scores(q: torch.Tensor, k: torch.Tensor, r: Request) -> Matrix:
    frequencies = llama3_frequencies(q.shape[-1])
    return rotate(q, r.positions, frequencies) @ rotate(k, torch.arange(r.kv_len), frequencies).transpose(-1, -2)


def streaming_llm_scores(q: torch.Tensor, k: torch.Tensor, r: Request) -> Matrix:
    """Query by query, the cache that the paper's server would hold: sinks and recent tokens, numbered from 0."""
    frequencies = [10000.0 ** (-i / q.shape[-1]) for i in range(0, q.shape[-1], 2)]
    scores = q.new_zeros(q.shape[0], r.q_len, r.kv_len)
    for i, position in enumerate(r.positions.tolist()):
        cache = [t for t in range(position + 1) if t < r.sinks or t > position - r.window]
        if cache:
            keys = rotate(k[:, cache], torch.arange(len(cache)), frequencies)
            query = rotate(q[:, i : i + 1], torch.tensor([len(cache) - 1]), frequencies)
            scores[:, i, cache] = (query @ keys.transpose(-1, -2))[:, 0]
    return scores


FORMULAS: dict[str, Formula] = {
    "Full": Formula(),
    "Causal": Formula(causal),
    "SlidingWindow": Formula(window),
    "SoftCap": Formula(logits=soft_cap),
    "Gemma2": Formula(window, soft_cap),
    "ALiBi": Formula(logits=alibi),
    "ALiBiSlopes": Formula(logits=alibi_slopes),
    "T5Bias": Formula(logits=t5_bias, scale=1.0),
    "PrefixLM": Formula(prefix),
    "Document": Formula(document),
    "Chunked": Formula(chunked),
    "Sinks": Formula(sink=lambda r: r.params["sinks"]),
    "GptOss": Formula(window, sink=lambda r: r.params["sinks"]),
    "Streaming": Formula(streaming),
    "DilatedWindow": Formula(dilated),
    "Sigmoid": Formula(weight=lambda s, r: 1 / (1 + torch.exp(-(s + r.bias)))),
    "TreeMask": Formula(tree),
    "CustomMask": Formula(custom_mask),
    "Llama3RoPE": Formula(causal, scores=llama3_scores),
    "Llama4Temperature": Formula(logits=llama4),
    "Grok": Formula(causal, grok),
    "StreamingLLM": Formula(streaming, scores=streaming_llm_scores),
}
