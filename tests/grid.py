"""The calls that every variant is tried on: shapes, and inputs with NaN in every slot that must not be read."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import attngen as ag
import torch
from attngen.variants import example_params, library

VARIANTS = {name: cls() for name, cls in library().items()}


@dataclass(frozen=True)
class Shape:
    """Sizes of one call; lens of None fill the tensors."""

    name: str
    batch: int
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int
    q_lens: tuple[int, ...] | None = None
    kv_lens: tuple[int, ...] | None = None
    layout: str = "bshd"
    strided: bool = False

    def __str__(self) -> str:
        return self.name


SHAPES = [
    Shape("one", 1, 1, 1, 1, 1),
    Shape("decode", 2, 1, 777, 8, 4),
    Shape("decode-ragged", 4, 1, 300, 4, 2, (1, 1, 0, 1), (300, 1, 7, 256)),
    Shape("ragged", 4, 33, 130, 6, 2, (33, 1, 0, 17), (130, 64, 5, 0)),
    Shape("longer-queries", 2, 70, 20, 2, 2, None, (20, 3)),
    Shape("no-keys", 2, 3, 0, 2, 1),
    Shape("empty-batch", 0, 5, 7, 2, 1),
    Shape("edge-63-65", 1, 63, 65, 2, 1),
    Shape("edge-64-64", 1, 64, 64, 3, 3),
    Shape("edge-65-129", 1, 65, 129, 2, 1),
    Shape("edge-127-128", 1, 127, 128, 1, 1),
    Shape("edge-129-127", 1, 129, 127, 1, 1),
    Shape("group-8", 2, 5, 129, 16, 2, (5, 3), (129, 100)),
    Shape("bhsd", 2, 37, 66, 6, 3, (37, 20), (66, 66), "bhsd"),
    Shape("strided", 2, 20, 100, 4, 2, None, (100, 31), strided=True),
]


@dataclass(frozen=True)
class KernelCase:
    """A variant of the library compiled for a dtype and head dims."""

    name: str
    dtype: torch.dtype
    head_dim: int = 64
    head_dim_v: int = 64

    def __str__(self) -> str:
        dims = "" if self.head_dim == self.head_dim_v == 64 else f"-d{self.head_dim}-{self.head_dim_v}"
        return f"{self.name}-{str(self.dtype).removeprefix('torch.')}{dims}"

    @property
    def variant(self) -> ag.Variant:
        return VARIANTS[self.name]

    def compile(self) -> ag.Kernel:
        return ag.compile(self.variant, dtype=self.dtype, head_dim=self.head_dim, head_dim_v=self.head_dim_v)


@dataclass(frozen=True)
class Call:
    """Inputs of one call. Slots of q, k and v that the call must not read are NaN."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    params: dict[str, Any]
    keywords: dict[str, Any]  # for ag.attention and ag.reference

    def seen(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v in the order [batch, seq, heads, head_dim]."""
        if self.keywords["layout"] == "bhsd":
            return self.q.transpose(1, 2), self.k.transpose(1, 2), self.v.transpose(1, 2)
        return self.q, self.k, self.v


def make_call(
    shape: Shape, variant: ag.Variant, dtype: torch.dtype, head_dim: int = 64, head_dim_v: int | None = None
) -> Call:
    """Random inputs for ``variant`` in ``shape``: the same for equal arguments."""
    seed = zlib.crc32(f"{shape.name} {head_dim} {head_dim_v}".encode())
    random = torch.Generator().manual_seed(seed)

    def tensor(rows: int, heads: int, dim: int, lens: tuple[int, ...]) -> torch.Tensor:
        x = torch.randn(shape.batch, rows, heads, dim, generator=random)
        for request, n in zip(x, lens):
            request[n:] = torch.nan
        x = x.to(dtype)
        if shape.strided:  # inside a larger tensor: every stride but the last is odd
            larger = torch.full((shape.batch + 1, rows + 3, heads + 1, dim + 5), torch.nan, dtype=dtype)
            inner = larger[1:, 1 : rows + 1, :heads, 3 : dim + 3]
            inner.copy_(x)
            return inner
        return x.transpose(1, 2).contiguous() if shape.layout == "bhsd" else x

    q_lens = shape.q_lens or (shape.q_len,) * shape.batch
    kv_lens = shape.kv_lens or (shape.kv_len,) * shape.batch
    keywords: dict[str, Any] = {"layout": shape.layout}
    if shape.q_lens:
        keywords["q_lens"] = torch.tensor(shape.q_lens)
    if shape.kv_lens:
        keywords["kv_lens"] = list(shape.kv_lens)
    params = example_params(
        variant, requests=shape.batch, q_len=shape.q_len, kv_len=shape.kv_len, num_heads=shape.heads,
        num_kv_heads=shape.kv_heads, seed=seed,
    )  # fmt: skip
    return Call(
        tensor(shape.q_len, shape.heads, head_dim, q_lens),
        tensor(shape.kv_len, shape.kv_heads, head_dim, kv_lens),
        tensor(shape.kv_len, shape.kv_heads, head_dim_v or head_dim, kv_lens),
        q_lens, kv_lens, params, keywords,
    )  # fmt: skip
