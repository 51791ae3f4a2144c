"""Example parameters: values at which a variant shows its effect on inputs of the given sizes.

Tests, `attngen check` and benchmarks call ``ag.attention(q, k, v, Variant(), **example_params(Variant, ...))``. Any
variant works, a user's too: tensor fields get random values of their type, and Scalars keep their defaults, except
where `_SPECIAL` knows better for one of the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import attngen as ag
import torch
from attngen.spec import Composed


@dataclass(frozen=True)
class Sizes:
    """The sizes of a call; lengths are the padded ones."""

    requests: int
    q_len: int
    kv_len: int
    num_heads: int
    num_kv_heads: int


def example_params(
    variant: ag.Variant | type[ag.Variant],
    *,
    requests: int,
    q_len: int,
    kv_len: int,
    num_heads: int,
    num_kv_heads: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Parameters for a call of ``variant``: every tensor, and Scalars fit for the sizes, except what an instance binds.

    Equal arguments give equal values. A Scalar without a default, of a variant that is not the library's, is left out.
    """
    return _example(variant, Sizes(requests, q_len, kv_len, num_heads, num_kv_heads), seed)


def _example(variant: ag.Variant | type[ag.Variant], sizes: Sizes, seed: int) -> dict[str, Any]:
    if isinstance(variant, Composed):
        return {name: value for part in variant._parts for name, value in _example(part, sizes, seed).items()}
    random = torch.Generator().manual_seed(seed)
    cls = variant if isinstance(variant, type) else type(variant)
    ours = cls.__module__.split(".")[:2] == ["attngen", "variants"]
    params = dict(_SPECIAL[cls.__name__](sizes, random)) if ours and cls.__name__ in _SPECIAL else {}
    for name, field in cls.fields.items():
        if field.kind == "tensor" and name not in params:
            params[name] = _tensor(field, sizes, random)
    if isinstance(variant, cls):
        bound = {name for name, value in variant.values.items() if value is not getattr(cls, name, None)}
        params = {name: value for name, value in params.items() if name not in bound}
    return params


def _tensor(field: Any, sizes: Sizes, random: torch.Generator) -> torch.Tensor:
    known = {
        "heads": sizes.num_heads, "kv_heads": sizes.num_kv_heads, "requests": sizes.requests, "requests + 1": sizes.requests + 1, "positions": sizes.kv_len,
        "q_tokens": sizes.requests * sizes.q_len, "kv_tokens": sizes.requests * sizes.kv_len,
    }  # fmt: skip
    shape = [axis if isinstance(axis, int) else known.get(axis, max(sizes.q_len, sizes.kv_len)) for axis in field.axes]
    if field.dtype == "f32":
        return torch.randn(shape, generator=random)
    if field.dtype == "i32":
        return torch.randint(0, 4, shape, generator=random, dtype=torch.int32)
    return torch.rand(shape, generator=random) < 0.5


def _documents(sizes: Sizes, random: torch.Generator) -> dict[str, Any]:
    """Documents of about 8 tokens, numbered downwards: nothing may rest on ids that rise from 0."""
    starts = torch.rand(sizes.requests, sizes.kv_len, generator=random) < 1 / 8
    return {"doc": 1000 - starts.cumsum(1).to(torch.int32)}


def _tree(sizes: Sizes, random: torch.Generator) -> dict[str, Any]:
    """A random tree a request: each node's parent is an earlier node, or the context."""
    nodes = max(sizes.q_len, 1)
    ancestors = torch.eye(nodes, dtype=torch.bool).repeat(sizes.requests, 1, 1)
    for tree in ancestors:
        for node in range(nodes):
            parent = int(torch.randint(-1, node, (), generator=random)) if node else -1
            if parent >= 0:
                tree[node] |= tree[parent]
    return {"ancestors": ancestors}


def _custom_mask(sizes: Sizes, random: torch.Generator) -> dict[str, Any]:
    """Bits enough for requests of any length, and rows of which the same is known: tokens may be packed or padded."""
    count, rows = (sizes.q_len * sizes.kv_len + 7) // 8, sizes.requests * sizes.q_len
    begin, run, end = (torch.full((rows,), sizes.kv_len * part // 16, dtype=torch.int32) for part in (1, 3, 14))
    return {
        "packed_custom_mask": torch.randint(0, 256, (sizes.requests * count,), generator=random, dtype=torch.uint8),
        "mask_indptr": count * torch.arange(sizes.requests + 1, dtype=torch.int32),
        "mask_begin": begin, "mask_run": run, "mask_end": end,
    }  # fmt: skip


def _blocks_of(sizes: Sizes) -> tuple[int, int]:
    """A grid of about the keys: rows and columns of it."""
    width = max(1, round(math.sqrt(sizes.kv_len)))
    return -(-max(sizes.kv_len, 1) // width), width


def _neighborhood(sizes: Sizes, random: torch.Generator) -> dict[str, Any]:
    height, width = _blocks_of(sizes)
    return {"height": height, "width": width, "kernel": _part(min(height, width), 2)}


def _sliding_tile(sizes: Sizes, random: torch.Generator) -> dict[str, Any]:
    return {"tile_size": _part(sizes.kv_len, 27), "tiles_t": 2, "tiles_y": 3, "tiles_x": 5, "window_t": 1, "window_y": 3, "window_x": 3}


def _relative_bias(sizes: Sizes, random: torch.Generator) -> dict[str, Any]:
    height, width = _blocks_of(sizes)
    return {"height": height, "width": width, "table": torch.randn(sizes.num_heads, (2 * height - 1) * (2 * width - 1), generator=random)}


def _rarely(*shape: int, random: torch.Generator, one_in: int = 8) -> torch.Tensor:
    return torch.rand(shape, generator=random) < 1 / one_in


def _images(sizes: Sizes, random: torch.Generator) -> dict[str, Any]:
    """Images of about 24 tokens, with text between them."""
    number = _rarely(sizes.requests, sizes.kv_len, random=random, one_in=24).cumsum(1)
    return {"images": torch.where(number % 2 == 1, number, 0).to(torch.int32)}


def _selected(sizes: Sizes, random: torch.Generator) -> dict[str, Any]:
    block = _part(sizes.kv_len, 9)
    shape = (sizes.requests * sizes.q_len, sizes.num_kv_heads, -(-sizes.kv_len // block))
    return {"selected": torch.rand(shape, generator=random) < 0.4, "block": block}


def _forgetting(sizes: Sizes, random: torch.Generator) -> dict[str, Any]:
    gates = torch.randn(sizes.requests, sizes.num_heads, sizes.kv_len, generator=random) + 2.0
    return {"decay": torch.nn.functional.logsigmoid(gates).cumsum(-1)}


def _part(n: int, of: int) -> int:
    return max(1, n // of)


_SPECIAL: dict[str, Callable[[Sizes, torch.Generator], dict[str, Any]]] = {
    "Ministral3Temperature": lambda n, _: {"original": _part(n.kv_len, 8), "beta": 0.25},
    "Images": _images,
    "DuoAttention": lambda n, random: {
        "retrieval": torch.arange(n.num_heads) % 2 == 1, "sinks": _part(n.kv_len, 10), "window": _part(n.kv_len, 4)
    },
    "PrefixWindow": lambda n, random: {
        "prefix_len": torch.randint(0, n.kv_len // 2 + 1, (n.requests,), generator=random, dtype=torch.int32),
        "window": _part(n.kv_len, 5),
    },
    "OutputGate": lambda n, random: {"gate": torch.randn(n.requests * n.q_len, n.num_heads, 256, generator=random)},
    "SelectedBlocks": _selected,
    "LeftPadding": lambda n, random: {
        "start": torch.randint(0, n.kv_len // 2 + 1, (n.requests,), generator=random, dtype=torch.int32)
    },
    "AttentionBias": lambda n, random: {"bias": torch.randn(n.requests, n.num_heads, n.q_len, n.kv_len, generator=random)},
    "BidirectionalWindow": lambda n, _: {"left": _part(n.kv_len, 6), "right": _part(n.kv_len, 9)},
    "BlockCausal": lambda n, _: {"block": _part(n.kv_len, 7)},
    "BlockDiffusion": lambda n, _: {"block": _part(n.kv_len, 15)},
    "MultiItem": lambda n, random: {
        "prefix_len": torch.randint(0, n.kv_len // 2 + 1, (n.requests,), generator=random, dtype=torch.int32),
        "item": _rarely(n.requests, n.kv_len, random=random).cumsum(1).to(torch.int32),
    },
    "Neighborhood2D": _neighborhood,
    "SlidingTile": _sliding_tile,
    "Forgetting": _forgetting,
    "Retention": lambda n, random: {"gamma": 0.8 + 0.19 * torch.rand(n.num_heads, generator=random)},
    "HSTU": lambda n, random: {
        "longest": n.kv_len + n.q_len, "bias": torch.randn(2 * (n.kv_len + n.q_len) - 1, generator=random)
    },
    "VerticalSlash": lambda n, random: {
        "vertical": _rarely(n.num_heads, n.kv_len, random=random), "slash": _rarely(n.num_heads, _part(n.kv_len, 2), random=random)
    },
    "RelativeBias2D": _relative_bias,
    "ScalableSoftmax": lambda n, random: {"slope": 0.3 + 0.2 * torch.rand(n.num_heads, generator=random)},
    "Longformer": lambda n, random: {
        "global_token": _rarely(n.requests, n.kv_len, random=random, one_in=12), "window": _part(n.kv_len, 10)
    },
    "SlidingWindow": lambda n, _: {"window": _part(n.kv_len, 3)},
    "SoftCap": lambda n, _: {"cap": 2.0},
    "Gemma2": lambda n, _: {"cap": 2.0, "window": _part(n.kv_len, 3)},
    "ALiBiSlopes": lambda n, random: {"slopes": torch.rand(n.num_heads, generator=random)},
    "PrefixLM": lambda n, random: {
        "prefix_len": torch.randint(0, n.kv_len + 1, (n.requests,), generator=random, dtype=torch.int32)
    },
    "Document": _documents,
    "Chunked": lambda n, _: {"chunk": _part(n.kv_len, 3)},
    "GptOss": lambda n, _: {"window": _part(n.kv_len, 3)},
    "Streaming": lambda n, _: {"sinks": _part(n.kv_len, 10), "window": _part(n.kv_len, 4)},
    "DilatedWindow": lambda n, _: {"window": _part(n.kv_len, 6), "dilation": 3},
    "Sigmoid": lambda n, _: {"bias": -math.log(max(n.kv_len, 1))},
    "TreeMask": _tree,
    "CustomMask": _custom_mask,
    "Llama4Temperature": lambda n, _: {"floor_scale": _part(n.kv_len, 8), "attn_scale": 0.25},
    "Grok": lambda n, _: {"cap": 2.0, "temperature_len": max(2, n.kv_len // 2)},
    "StreamingLLM": lambda n, _: {"sinks": _part(n.kv_len, 10), "window": _part(n.kv_len, 4)},
}
