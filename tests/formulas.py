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
    requests: int
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

    mask: Callable[[Request], Matrix] | None = None  # bool [q_len, kv_len] or [heads, q_len, kv_len]
    logits: Callable[[Matrix, Request], Matrix] = lambda s, r: s
    sink: Callable[[Request], Matrix] | None = None  # [heads]
    weight: Callable[[Matrix, Request], Matrix] | None = None
    scores: Callable[[Matrix, Matrix, Request], Matrix] = lambda q, k, r: q @ k.transpose(-1, -2)
    scale: float | None = None
    output: Callable[[Matrix, Request], Matrix] = lambda o, r: o  # [heads, q_len, head_dim_v]


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
        r = Request(b, batch, n_q, n_kv, heads, n_kv - n_q, params)
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
        out[b, :n_q] = formula.output(p.to(dtype) @ vb, r).to(dtype).transpose(0, 1)
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


def drawn(r: Request, keeps: Callable[[int, int], bool]) -> Matrix:
    """A mask asked for pair by pair, of positions q and kv."""
    return torch.tensor([[keeps(q, kv) for kv in range(r.kv_len)] for q in r.positions.tolist()], dtype=torch.bool).view(r.q_len, r.kv_len)


def both_sides(r: Request) -> Matrix:
    mask = torch.ones(r.q_len, r.kv_len, dtype=torch.bool)
    return mask.tril(r.offset + r.right).triu(r.offset - r.left)


def images(r: Request) -> Matrix:
    from transformers.masking_utils import blockwise_overlay

    ids = torch.where(r.images == 0, -1, r.images)  # -1 is its text
    same = blockwise_overlay(ids)
    return drawn(r, lambda q, kv: q >= 0 and bool(same(r.index, 0, q, kv)))


def duo(r: Request) -> Matrix:
    return torch.stack([causal(r) if full else streaming(r) for full in r.retrieval.tolist()])


def prefix_window(r: Request) -> Matrix:
    mask = window(r)
    mask[:, : int(r.prefix_len[r.index])] = True
    return mask & causal(r)


def multi_item(r: Request) -> Matrix:
    mask, ids = causal(r), r.item[r.index].tolist()
    for i, position in enumerate(r.positions.tolist()):
        for kv in range(int(r.prefix_len[r.index]), r.kv_len):
            mask[i, kv] &= (ids[position] if position >= 0 else 0) == ids[kv]
    return mask


def left_padding(r: Request) -> Matrix:
    mask = torch.ones(r.q_len, r.kv_len, dtype=torch.bool)
    mask[:, : int(r.start[r.index])] = False
    return mask


def block_causal(r: Request) -> Matrix:
    ends = [(math.floor(p / r.block) + 1) * r.block for p in r.positions.tolist()]  # of each query's block
    return torch.arange(r.kv_len) < torch.tensor(ends, dtype=torch.int64)[:, None]


def block_diffusion(r: Request) -> Matrix:
    """``block_diff_mask`` of the paper's code."""
    n, q, kv = r.kv_len // 2, r.positions[:, None], torch.arange(r.kv_len)[None]
    x0_q, x0_kv = q >= n, kv >= n
    block_q = torch.where(x0_q, (q - n) // r.block, q // r.block)
    block_kv = torch.where(x0_kv, (kv - n) // r.block, kv // r.block)
    block_diagonal = (block_q == block_kv) & (x0_q == x0_kv)
    offset_block_causal = (block_q > block_kv) & x0_kv & ~x0_q
    return block_diagonal | offset_block_causal | ((block_q >= block_kv) & x0_kv & x0_q)


def longformer(r: Request) -> Matrix:
    seen = r.global_token[r.index].tolist()
    return drawn(r, lambda q, kv: abs(q - kv) <= r.window or seen[kv] or (q >= 0 and seen[q]))


def neighborhood(r: Request) -> Matrix:
    """NATTEN's window of each pixel, along one axis after the other."""

    def starts(size: int) -> list[int]:
        return [min(max(i - r.kernel // 2, 0), size - r.kernel) for i in range(size)]

    ys, xs = starts(r.height), starts(r.width)

    def keeps(q: int, kv: int) -> bool:
        if q < 0:  # before the image: rows and columns floor, as Python's, and the window is the first
            y, x = 0, xs[q % r.width]
        else:
            y, x = ys[q // r.width], xs[q % r.width]
        return y <= kv // r.width < y + r.kernel and x <= kv % r.width < x + r.kernel

    return drawn(r, keeps)


def sliding_tile(r: Request) -> Matrix:
    """FastVideo's: tiles' coordinates, the window's centre clamped."""
    grid, windows = (r.tiles_t, r.tiles_y, r.tiles_x), (r.window_t, r.window_y, r.window_x)

    def place(position: int) -> tuple[int, int, int]:
        tile = position // r.tile_size
        return tile // (r.tiles_y * r.tiles_x), tile % (r.tiles_y * r.tiles_x) // r.tiles_x, tile % r.tiles_x

    def keeps(q: int, kv: int) -> bool:
        centre = [min(max(a, w // 2), n - 1 - w // 2) for a, n, w in zip(place(q), grid, windows)]
        return all(abs(c - b) <= w // 2 for c, b, w in zip(centre, place(kv), windows))

    return drawn(r, keeps)


def selected(r: Request) -> Matrix:
    rows = r.selected[r.index * (r.selected.shape[0] // r.requests) :][: r.q_len]  # [q_len, kv_heads, blocks]
    keys = rows.repeat_interleave(r.block, 2)[..., : r.kv_len].permute(1, 0, 2)
    return keys.repeat_interleave(r.heads // keys.shape[0], 0) & causal(r)


def vertical_slash(r: Request) -> Matrix:
    mask = r.vertical[:, None, : r.kv_len].repeat(1, r.q_len, 1)
    for head, distances in enumerate(r.slash):
        for distance in distances.nonzero().flatten().tolist():
            mask[head] |= r.distance == distance
    return mask & causal(r)


def custom_mask(r: Request) -> Matrix:
    first = int(r.mask_indptr[r.index])
    bits = np.unpackbits(r.packed_custom_mask.numpy()[first:], bitorder="little")[: r.q_len * r.kv_len]
    mask = torch.from_numpy(bits.reshape(r.q_len, r.kv_len)).bool()
    token = r.index * (len(r.mask_begin) // r.requests)
    for i, row in enumerate(mask):
        begin, run, end = (int(x[token + i]) for x in (r.mask_begin, r.mask_run, r.mask_end))
        row[:run] = True
        row[:begin] = False
        row[end:] = False
    return mask


def ministral3(s: Matrix, r: Request) -> Matrix:
    from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

    scales = get_llama_4_attn_scale(r.positions.clamp(min=0)[None].double(), r.beta, r.original)  # [1, 1, q_len, 1]
    return s * scales[0].to(s.dtype)


def scalable_softmax(s: Matrix, r: Request) -> Matrix:
    keys = (r.positions + 1).clamp(min=1).double()
    return s * (r.slope.double()[:, None, None] * keys.log()[:, None]).to(s.dtype)


def attention_bias(s: Matrix, r: Request) -> Matrix:
    return s + r.bias[r.index, :, : r.q_len, : r.kv_len].to(s.dtype)


def relative_bias(s: Matrix, r: Request) -> Matrix:
    """As Swin makes its index, of coordinates of all pairs; rows beyond the window have none."""
    points = torch.stack(torch.meshgrid(torch.arange(r.height), torch.arange(r.width), indexing="ij")).flatten(1)
    relative = (points[:, :, None] - points[:, None, :]).permute(1, 2, 0) + torch.tensor([r.height - 1, r.width - 1])
    index = relative[..., 0] * (2 * r.width - 1) + relative[..., 1]
    s = s.clone()
    for i, position in enumerate(r.positions.tolist()):
        if position >= 0:
            s[:, i] += r.table[:, index[position, : r.kv_len]].to(s.dtype)
        else:  # before the image: what the formula's floors say, nothing where it leaves the table
            for kv in range(r.kv_len):
                rows, columns = position // r.width - kv // r.width + r.height - 1, position % r.width - kv % r.width + r.width - 1
                at = rows * (2 * r.width - 1) + columns
                s[:, i, kv] += r.table[:, at].to(s.dtype) if 0 <= at < r.table.shape[1] else 0
    return s


def forgetting(s: Matrix, r: Request) -> Matrix:
    c = r.decay[r.index].double()
    rows = torch.nn.functional.pad(c, (1, 0))[:, (r.positions + 1).clamp(min=0)]
    return s + (rows[:, :, None] - c[:, None, : r.kv_len]).to(s.dtype)


def retention(s: Matrix, r: Request) -> Matrix:
    return s * (r.gamma.double()[:, None, None] ** r.distance.clamp(min=0)).to(s.dtype)


def hstu(s: Matrix, r: Request) -> Matrix:
    x = s + r.bias[r.longest - 1 - r.distance].to(s.dtype)
    return torch.nn.functional.silu(x) / r.longest


def output_gate(o: Matrix, r: Request) -> Matrix:
    rows = r.gate[r.index * (r.gate.shape[0] // r.requests) :][: r.q_len].transpose(0, 1)  # [heads, q_len] or [heads, q_len, dims]
    gate = rows[..., : o.shape[-1]] if rows.dim() == 3 else rows[..., None]
    return o * torch.sigmoid(gate.double()).to(o.dtype)


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
    "BidirectionalWindow": Formula(both_sides),
    "PrefixWindow": Formula(prefix_window),
    "Images": Formula(images),
    "MultiItem": Formula(multi_item),
    "LeftPadding": Formula(left_padding),
    "BlockCausal": Formula(block_causal),
    "BlockDiffusion": Formula(block_diffusion),
    "DuoAttention": Formula(duo),
    "Longformer": Formula(longformer),
    "Neighborhood2D": Formula(neighborhood),
    "SlidingTile": Formula(sliding_tile),
    "SelectedBlocks": Formula(selected),
    "VerticalSlash": Formula(vertical_slash),
    "RelativeBias2D": Formula(logits=relative_bias),
    "AttentionBias": Formula(logits=attention_bias),
    "Forgetting": Formula(causal, forgetting),
    "Ministral3Temperature": Formula(logits=ministral3),
    "ScalableSoftmax": Formula(logits=scalable_softmax),
    "Retention": Formula(causal, weight=retention),
    "HSTU": Formula(causal, weight=hstu, scale=1.0),
    "OutputGate": Formula(output=output_gate),
    "HeadGate": Formula(output=output_gate),
    "Llama3RoPE": Formula(causal, scores=llama3_scores),
    "Llama4Temperature": Formula(logits=llama4),
    "Grok": Formula(causal, grok),
    "StreamingLLM": Formula(streaming, scores=streaming_llm_scores),
}
