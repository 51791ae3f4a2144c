"""The oracle: reference attention in float64, the judge of every kernel.

Evaluates a trace with torch on the whole attention matrix. Float values are computed in float64, except those that
feed a comparison, a floor or a cast: these are computed in float32 as every kernel does, so that float64 never flips
a mask (a value that depends on the logit itself stays float64).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from .expr import Node, discrete_inputs, walk
from .ops import F32, I32, OPS, TORCH_DTYPE
from .rope import rotate
from .spec import Trace

_CHUNK_ELEMENTS = 1 << 23  # scores held at once: 64 MB of float64


def evaluate(
    root: Node, symbols: Mapping[str, torch.Tensor], params: Mapping[str, Any], exact: Collection[Node],
    wide: torch.dtype = torch.float64,
) -> torch.Tensor:  # fmt: skip
    """The value of ``root``, broadcast over the symbols' shapes; f32 nodes in ``wide`` unless in ``exact``."""
    values: dict[Node, torch.Tensor] = {}
    for node in walk(root):
        args = [values[a] for a in node.args]
        if node.op == "const":
            value = torch.full((), node.attr, dtype=TORCH_DTYPE[node.dtype])
        elif node.op == "sym":
            value = symbols[node.attr]
        elif node.op == "param":
            value = torch.as_tensor(params[node.attr[0]]).to(TORCH_DTYPE[node.dtype])
        elif node.op == "load":
            value = _load(params[node.attr[0]], args, node.dtype)
        else:
            narrow = not node.symbols & {"s", "o"} and (node in exact or OPS[node.op].discrete)
            args = [a.to(torch.float32 if narrow else wide) if a.is_floating_point() else a for a in args]
            value = OPS[node.op].torch(*args)
        values[node] = value
    return values[root]


def _load(tensor: torch.Tensor, index: Sequence[torch.Tensor], dtype: str) -> torch.Tensor:
    if dtype == F32:
        tensor = tensor.to(torch.float32)
    elif dtype == I32:
        tensor = tensor.to(torch.int32)  # an int64 wraps
    else:
        tensor = tensor != 0
    inside = torch.ones((), dtype=torch.bool)
    for i, size in zip(index, tensor.shape):
        inside = inside & (i >= 0) & (i < size)
    if tensor.numel() == 0:
        return torch.zeros(inside.shape, dtype=tensor.dtype)
    safe = [torch.where(inside, i, 0).long() for i in index]
    return torch.where(inside, tensor[tuple(safe)], torch.zeros((), dtype=tensor.dtype))


def reference_attention(
    trace: Trace,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    q_offsets: Sequence[int],
    scale: float,
    params: Mapping[str, Any],
    head_offset: int = 0,
    total_heads: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention as the trace defines it.

    Args:
        q: ``[batch, q_len, num_heads, head_dim]``; k, v: ``[batch, kv_len, num_kv_heads, head_dim | head_dim_v]``.

    Returns:
        ``out [batch, q_len, num_heads, head_dim_v]`` and ``lse [batch, num_heads, q_len]`` (natural log, sink
        included; None where the variant has no softmax), both float64. Rows past a request's q_len are 0 and -inf.
    """
    batch, rows, heads, head_dim = q.shape
    kv_rows, kv_heads, dim_v = k.shape[1], k.shape[2], v.shape[3]
    group = heads // kv_heads if kv_heads else 0
    out = torch.zeros(batch, rows, heads, dim_v, dtype=torch.float64)
    lse = torch.full((batch, heads, rows), -torch.inf, dtype=torch.float64)
    if not heads:
        return out, lse if trace.weight is None else None
    exact = discrete_inputs(trace.roots().values())
    inv_freq, table = (None, None)
    if trace.rope:
        inv_freq, table = trace.rope.rope.tables(head_dim, torch.tensor(list(kv_lens), dtype=torch.int64))

    def i32(x: Any) -> torch.Tensor:
        return torch.as_tensor(x, dtype=torch.int64).to(torch.int32)

    head = i32(torch.arange(heads) + head_offset).view(-1, 1, 1)
    for b in range(batch):
        n_q, n_kv = q_lens[b], kv_lens[b]
        freq = None if inv_freq is None else inv_freq[0 if table is None else int(table[b])]
        kv = i32(torch.arange(n_kv)).view(1, 1, -1)
        base = {
            "head": head, "kv_head": head // group, "num_heads": i32(total_heads or heads),
            "num_kv_heads": i32((total_heads or heads) // group), "request": i32(b), "q_len": i32(n_q),
            "kv_len": i32(n_kv), "q_offset": i32(q_offsets[b]), "kv": kv, "kv_token": kv + b * kv_rows,
        }  # fmt: skip
        kf = k[b, :n_kv].double().transpose(0, 1)  # [kv_heads, n_kv, head_dim]
        vf = v[b, :n_kv].double().transpose(0, 1).repeat_interleave(group, 0)
        if trace.rope and trace.rope.rope.keys == "rotate":
            position = evaluate(trace.rope.kv_position, base, params, exact)
            kf = _rotate(kf, position.expand(1, 1, n_kv).transpose(1, 2), freq, trace)
        kf = kf.repeat_interleave(group, 0)
        step = max(1, _CHUNK_ELEMENTS // max(1, heads * n_kv))
        for start in range(0, n_q, step):
            i = torch.arange(start, min(start + step, n_q))
            at = base | {"q": i32(i + q_offsets[b]).view(1, -1, 1), "q_token": i32(i + b * rows).view(1, -1, 1)}

            def value(node: Node, **extra: torch.Tensor) -> torch.Tensor:
                return evaluate(node, at | extra, params, exact)

            qf = q[b, i].double().transpose(0, 1)
            s = _scores(trace, qf, kf, freq, value) * scale
            if trace.query_scale is not None:
                s = s * value(trace.query_scale)
            if trace.logits is not None:
                s = value(trace.logits, s=s).double().expand(s.shape)
            keep = torch.ones(s.shape, dtype=torch.bool)
            if trace.mask is not None:
                keep = value(trace.mask).expand(s.shape)
            if trace.weight is not None:
                w = torch.where(keep, value(trace.weight, s=s).double(), 0.0)
                o = w @ vf
            else:
                s = torch.where(keep, s, -torch.inf)
                top = s.amax(-1) if n_kv else torch.full(s.shape[:2], -torch.inf, dtype=s.dtype)
                sink = None
                if trace.sink is not None:
                    sink = value(trace.sink).double().expand(heads, len(i), 1)[..., 0]
                    top = torch.maximum(top, sink)
                # Beside the largest logit, not the LSE: at 1e38 an LSE cannot hold the sum.
                top = torch.where(top.isfinite(), top, 0.0)
                p = torch.exp(s - top[..., None])
                sum_ = p.sum(-1) if sink is None else p.sum(-1) + torch.exp(sink - top)
                o = (p @ vf) / torch.where(sum_ == 0, 1.0, sum_)[..., None]
                lse[b, :, i] = top + torch.log(sum_)
            if trace.output is not None:
                dim = i32(torch.arange(dim_v)).view(1, 1, -1)
                o = value(trace.output, o=o, dim=dim).double().expand(o.shape)
            out[b, i] = o.transpose(0, 1)
    return out, lse if trace.weight is None else None


def _scores(trace: Trace, qf: torch.Tensor, kf: torch.Tensor, freq: torch.Tensor | None, value: Any) -> torch.Tensor:
    """q.k, with the query rotated once per kind of key."""
    if trace.rope is None:
        return qf @ kf.transpose(1, 2)
    shape = (qf.shape[0], qf.shape[1], 1)
    scores = [
        _rotate(qf, value(node).expand(shape), freq, trace) @ kf.transpose(1, 2) for node in trace.rope.q_positions
    ]
    result = scores[0]
    if trace.rope.kind is not None:
        kind = value(trace.rope.kind)
        for n, s in enumerate(scores):
            result = torch.where(kind == n, s, result)
    return result


def _rotate(x: torch.Tensor, positions: torch.Tensor, freq: torch.Tensor, trace: Trace) -> torch.Tensor:
    """Rotate ``x [heads, rows, head_dim]`` by ``positions [heads | 1, rows, 1]``."""
    rope = trace.rope.rope
    return rotate(x, positions[..., 0], freq, rope.mscale, rope.interleaved)


