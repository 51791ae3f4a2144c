"""How the copy engine (TMA) of Hopper GPUs sees q, k and v: boxes of tensors, encoded as the tensor maps of attention_sm90.cu."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import ParameterError
from .load import host
from .spec import Problem

if TYPE_CHECKING:
    from .choose_hopper import HopperConfig

_NO_MAP = bytes(128)
_MOST = 4096  # cached maps of a call site: a layer has a cache of its own


class Boxes:
    """The maps of a call site, whose shapes and strides are the struct's ``values``; ``batch``: requests of a dense call, else 1.

    Raises ParameterError for k or v that the copy engine cannot read.
    """

    def __init__(self, config: HopperConfig, problem: Problem, values: Mapping[str, Any], batch: int = 1) -> None:
        self._bf16 = problem.q_dtype == "bfloat16"
        self._cache: dict[tuple[int, int, int], dict[str, bytes]] = {}
        page_size, rows = values["page_size"], values["num_pages"]
        box_rows = math.gcd(page_size, config.block_n) if config.paged else config.block_n
        self.fields = {"box_rows": box_rows, "q_boxes": 0}
        self._tensors: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]] = {}
        for x, dim in () if config.gather else (("k", problem.head_dim), ("v", problem.head_dim_v)):
            slots, blocks = (page_size, rows) if config.paged else (rows, batch)
            sizes = [slots, values["num_kv_heads"], blocks]
            strides = [values.get(f"{x}_stride_{d}", 0) for d in "shb"]
            if strides[0] == 0 and slots > 1 or config.paged and strides[2] == 0 and blocks > 1:
                raise ParameterError(f"{x} repeats its tokens by a stride of 0, which the copy engine cannot read: call {x}.contiguous()")
            # The kernel asks for item 0 of a dimension whose stride is 0.
            sizes = [n if stride else 1 for n, stride in zip(sizes, strides)]
            self._tensors[f"{x}_map"] = self._tensor(dim, sizes, strides, (box_rows, 1, 1), x == "k")
        group = values["num_heads"] // values["num_kv_heads"] if values["num_kv_heads"] else 0
        strides = [values.get(f"q_stride_{d}", 0) for d in "htb"]
        if group and 64 % group == 0 and min(strides) >= 0 and (strides[0] or group == values["num_heads"] == 1) and strides[1]:
            sizes = [values["num_heads"], values["q_rows"], batch if strides[2] else 1]
            self.fields["q_boxes"] = 1
            self._tensors["q_map"] = self._tensor(problem.head_dim, sizes, strides, (group, 64 // group, 1), False)

    @staticmethod
    def _tensor(
        dim: int, sizes: list[int], strides: list[int], box: tuple[int, int, int], nan_fill: bool
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]:
        panel = 32 if dim % 64 else 64
        in_bytes = [2 * s if s else 2 * dim for s in strides]
        return (dim, *(max(n, 1) for n in sizes)), tuple(in_bytes), (panel, *box), nan_fill

    def maps(self, q_at: int, k_at: int, v_at: int) -> dict[str, bytes]:
        """The maps' struct fields for tensors at these addresses."""
        found = self._cache.get((q_at, k_at, v_at))
        if found is None:
            encode, at = host().tensor_map, {"q_map": q_at, "k_map": k_at, "v_map": v_at}
            found = {
                name: encode(at[name], self._bf16, *self._tensors[name]) if name in self._tensors and at[name] else _NO_MAP
                for name in at
            }
            if len(self._cache) >= _MOST:
                self._cache.clear()
            self._cache[q_at, k_at, v_at] = found
        return found

    def packed(self, q_at: int, k_at: int, v_at: int) -> bytes:
        """The same as they stand in the struct."""
        maps = self.maps(q_at, k_at, v_at)
        return b"".join(maps[name] for name in ("q_map", "k_map", "v_map"))
