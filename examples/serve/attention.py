"""The attention of a step, one small class: attngen, and the peers it is measured beside.

    backend = make("attngen", layers, cache, sizes)
    backend.prepare(batch)                     # once a step, on the host
    backend.plan(batch)                        # once a step, on the device: captured with the forward pass
    out = backend.attend(layer, q, k, v)       # once a layer: append k and v to the pages, then attend

The cache is [layers, 2, pages, page_size, kv_heads, head_dim], keys at 0 and values at 1 of its second dimension.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


class BackendError(RuntimeError):
    """A backend that cannot serve this model or machine: what is required, what was found, what to do."""


@dataclass(frozen=True)
class Layer:
    """What one layer asks of attention, as the model itself passes it. All layers are causal."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None = None
    window: int | None = None  # keys that a query sees, its own included


@dataclass(frozen=True)
class Sizes:
    """Capacities, fixed when the engine is made."""

    max_requests: int  # of a step, rows of padding included
    max_tokens: int  # of a step
    max_pages: int  # of a request
    page_size: int


@dataclass
class Batch:
    """The requests of a step: first those of one token (decode), then the chunks of prompts.

    Host arrays are int32. On the device all are int32 but slots, int64.
    """

    num_decodes: int
    kv_lens: np.ndarray  # [requests] on the host, the new tokens included
    q_lens: np.ndarray | None  # [requests] on the host; None: all 1
    tables_of: Callable[[], np.ndarray]  # gives [requests, max_pages] on the host
    # What the device computes or is given, before `plan`:
    device_kv_lens: torch.Tensor = field(init=False)  # [requests]
    device_tables: torch.Tensor = field(init=False)  # [requests, max_pages]
    positions: torch.Tensor = field(init=False)  # [tokens]
    slots: torch.Tensor = field(init=False)  # [tokens], page * page_size + place in the page
    q_indptr: torch.Tensor | None = field(default=None, init=False)  # [requests + 1]; None: one token each
    request_of: torch.Tensor | None = field(default=None, init=False)  # [tokens]; None: one token each

    @cached_property
    def tables(self) -> np.ndarray:
        """[requests, max_pages] on the host, for those who need it there."""
        return self.tables_of()


class Backend(ABC):
    """Attention over pages. The constructor compiles and allocates what any batch can need, as far as the backend can."""

    name: str
    on_host = False  # whether `prepare` has work at each step

    def __init__(self, layers: Sequence[Layer], cache: torch.Tensor, sizes: Sizes) -> None:
        self.layers, self.cache, self.sizes = layers, cache, sizes

    def prepare(self, batch: Batch) -> None:
        """Work of the host at each step. May allocate and copy; is not captured."""

    @abstractmethod
    def plan(self, batch: Batch) -> None:
        """Work on the device once a step. For a step of decodes alone it may be captured: no sync, no copy."""

    @abstractmethod
    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] -> [tokens, heads, head_dim]."""

    def graph_key(self, kv_lens: np.ndarray) -> Hashable:
        """What a captured decode step depends on, besides the number of requests."""
        return None

    def graph_keys(self) -> list[Hashable]:
        """All that graph_key can give."""
        return [None]

    def longest_of(self, key: Hashable) -> int:
        """Tokens of the longest request that a graph of this key serves; 1 where it serves any."""
        return 1

    def _kinds(self) -> list[Layer]:
        return list(dict.fromkeys(self.layers))

    def _refuse(self, softcap: bool = False, window: bool = False) -> None:
        for kind in self._kinds():
            for name, bad, found in (("soft cap", softcap, kind.softcap), ("sliding window", window, kind.window)):
                if bad and found is not None:
                    raise BackendError(f"backend {self.name} has no {name}, and the model asks for one of {found}: use attngen")


# ---------------------------------------------------------------- attngen


class Attngen(Backend):
    """One BatchAttention for each kind of layer; the whole plan is one kernel, on the device.

    shared_prefix: "auto" lets the plan find prefixes that decodes share, where this GPU has kernels for it; or "off".
    """

    name = "attngen"

    def __init__(self, layers: Sequence[Layer], cache: torch.Tensor, sizes: Sizes, *, shared_prefix: str = "auto") -> None:
        super().__init__(layers, cache, sizes)
        import attngen as ag
        from attngen import variants

        self._append, self.shared_prefix, self._objects = ag.append_kv, shared_prefix, {}
        for kind in self._kinds():
            parts = [variants.Causal() if kind.window is None else variants.SlidingWindow(window=kind.window)]
            parts += [] if kind.softcap is None else [variants.SoftCap(cap=kind.softcap)]
            given = dict(
                num_heads=kind.num_heads, num_kv_heads=kind.num_kv_heads, head_dim=kind.head_dim, scale=kind.scale, dtype=cache.dtype,
                device=cache.device, page_size=sizes.page_size, max_requests=sizes.max_requests, max_q_tokens=sizes.max_tokens,
                max_pages=sizes.max_requests * sizes.max_pages,
            )  # fmt: skip
            variant = ag.compose(*parts) if len(parts) > 1 else parts[0]
            wanted = shared_prefix == "auto" and cache.device.type == "cuda"
            try:
                self._objects[kind] = ag.BatchAttention(variant, shared_prefix=wanted, **given)
            except ag.UnsupportedError:
                if not wanted:
                    raise
                self._objects[kind] = ag.BatchAttention(variant, **given)

    def plan(self, batch: Batch) -> None:
        self._slots = batch.slots
        longest = None if batch.q_lens is None else int(batch.q_lens.max())  # saves launches of kernels for more rows
        for attn in self._objects.values():
            attn.plan(
                batch.q_indptr, block_table=batch.device_tables, kv_lens=batch.device_kv_lens, max_q_len=longest,
                shared_prefix=self.shared_prefix,
            )  # fmt: skip

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        pages = self.cache[layer, 0], self.cache[layer, 1]
        self._append(k, v, pages, slot_mapping=self._slots)
        return self._objects[self.layers[layer]].run(q, pages)


# ---------------------------------------------------------------- FlashInfer


class FlashInfer(Backend):
    """FlashInfer's wrappers: batch decode for steps of decodes alone, one for each number of requests, since a graph fixes
    it; batch prefill for steps with chunks. Its plan runs on the host at every step.

    prefill: FlashInfer's backend for steps with chunks. "fa2" builds in seconds what "fa3" takes minutes for.
    """

    name = "flashinfer"
    on_host = True

    def __init__(self, layers: Sequence[Layer], cache: torch.Tensor, sizes: Sizes, *, prefill: str = "fa2") -> None:
        super().__init__(layers, cache, sizes)
        try:
            import flashinfer
        except ImportError as error:
            raise BackendError(
                f"backend flashinfer: the package flashinfer required, found none ({error}): pip install flashinfer-python, "
                "or use another backend"
            ) from error
        if cache.device.type != "cuda":
            raise BackendError(f"backend flashinfer: a CUDA device required, found {cache.device}: use attngen or sdpa there")
        self._fi = flashinfer
        self._workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=cache.device)  # partial results: no run needs another's
        self._prefill = {
            kind: flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend=prefill) for kind in self._kinds()
        }
        self._decode: dict[tuple[int, Layer], Any] = {}

    def _decoder(self, requests: int, kind: Layer) -> Any:
        made = self._decode.get((requests, kind))
        if made is None:
            empty = lambda n: torch.zeros(n, dtype=torch.int32, device=self.cache.device)
            made = self._decode[requests, kind] = self._fi.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace, "NHD", use_cuda_graph=True, use_tensor_cores=kind.num_heads // kind.num_kv_heads >= 4,
                paged_kv_indptr_buffer=empty(requests + 1), paged_kv_indices_buffer=empty(requests * self.sizes.max_pages),
                paged_kv_last_page_len_buffer=empty(requests),
            )  # fmt: skip
        return made

    def prepare(self, batch: Batch) -> None:
        size = self.sizes.page_size
        pages = -(-batch.kv_lens // size)
        indptr = torch.from_numpy(np.concatenate(([0], pages.cumsum())).astype(np.int32))
        used = np.arange(batch.tables.shape[1]) < pages[:, None]
        indices = torch.from_numpy(batch.tables[used]).pin_memory().to(self.cache.device, non_blocking=True)
        last = torch.from_numpy(((batch.kv_lens - 1) % size + 1).astype(np.int32))
        self._wrappers = {}
        for kind in self._kinds():
            shared = dict(
                sm_scale=kind.scale, logits_soft_cap=kind.softcap, window_left=-1 if kind.window is None else kind.window - 1,
                q_data_type=self.cache.dtype, kv_data_type=self.cache.dtype,
            )  # fmt: skip
            heads = kind.num_heads, kind.num_kv_heads, kind.head_dim, size
            if batch.q_lens is None:
                wrapper = self._decoder(len(pages), kind)
                wrapper.plan(indptr, indices, last, *heads, **shared)
            else:
                wrapper = self._prefill[kind]
                q_indptr = torch.from_numpy(np.concatenate(([0], batch.q_lens.cumsum())).astype(np.int32))
                wrapper.plan(q_indptr, indptr, indices, last, *heads, causal=True, **shared)
            self._wrappers[kind] = wrapper
        self._paged = wrapper._paged_kv_indices_buf, wrapper._paged_kv_indptr_buf, wrapper._paged_kv_last_page_len_buf

    def plan(self, batch: Batch) -> None:
        self._positions = batch.positions
        self._request_of = batch.request_of
        if self._request_of is None:
            self._request_of = torch.arange(len(batch.positions), dtype=torch.int32, device=self.cache.device)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        pages = self.cache[layer, 0], self.cache[layer, 1]
        self._fi.append_paged_kv_cache(k.contiguous(), v.contiguous(), self._request_of, self._positions, pages, *self._paged)
        return self._wrappers[self.layers[layer]].run(q.contiguous(), pages)


# ---------------------------------------------------------------- torch SDPA


class _Gathering(Backend):
    """What SDPA and FlexAttention share: one call for all decodes of a step, one for each chunk."""

    def _append_rows(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        flat = self.cache[layer].flatten(1, 2)  # [2, slots, kv_heads, head_dim]
        flat[0].index_copy_(0, self._slots, k)
        flat[1].index_copy_(0, self._slots, v)

    def plan(self, batch: Batch) -> None:
        self._slots, self._decodes = batch.slots, batch.num_decodes
        self._plan_decodes(batch)
        self._chunks = []
        if batch.q_lens is not None:
            ends = batch.q_lens.cumsum()
            for i in range(batch.num_decodes, len(ends)):
                rows = slice(int(ends[i] - batch.q_lens[i]), int(ends[i]))
                self._chunks.append((rows, self._plan_chunk(batch, i, rows)))

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self._append_rows(layer, k, v)
        outs = [self._attend_decodes(layer, q[: self._decodes])] if self._decodes else []
        outs += [self._attend_chunk(layer, q[rows], chunk) for rows, chunk in self._chunks]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    @abstractmethod
    def _plan_decodes(self, batch: Batch) -> None: ...

    @abstractmethod
    def _plan_chunk(self, batch: Batch, request: int, rows: slice) -> Any: ...

    @abstractmethod
    def _attend_decodes(self, layer: int, q: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _attend_chunk(self, layer: int, q: torch.Tensor, chunk: Any) -> torch.Tensor: ...


class Sdpa(_Gathering):
    """torch's scaled_dot_product_attention over keys and values gathered from the pages, padded to the longest request.

    The heads of a group are rows of one head, which every SDPA kernel takes: none of those that take a mask has grouped
    heads. A captured decode is of one padded length, a power of two pages.
    """

    name = "sdpa"
    _LEAST = 16  # pages

    def __init__(self, layers: Sequence[Layer], cache: torch.Tensor, sizes: Sizes) -> None:
        super().__init__(layers, cache, sizes)
        self._refuse(softcap=True)

    def _width(self, kv_lens: np.ndarray) -> int:
        """Pages that the longest request is padded to: one of few, since each is a graph of its own."""
        pages = -(-int(kv_lens.max()) // self.sizes.page_size)
        return min(max(_power_of_two(pages), self._LEAST), self.sizes.max_pages)

    def graph_key(self, kv_lens: np.ndarray) -> int:
        return self._width(kv_lens)

    def graph_keys(self) -> list[int]:
        powers = [1 << i for i in range(self.sizes.max_pages.bit_length() + 1)]
        return sorted({min(width, self.sizes.max_pages) for width in powers if width >= self._LEAST})

    def longest_of(self, key: Hashable) -> int:
        assert isinstance(key, int)
        return key * self.sizes.page_size

    def _masks(self, positions: torch.Tensor, length: int) -> dict[Layer, torch.Tensor]:
        """bool [rows, length] for each kind of layer, of queries at positions [rows]."""
        keys = torch.arange(length, dtype=torch.int32, device=positions.device)
        causal = keys <= positions[:, None]
        return {kind: causal if kind.window is None else causal & (keys > positions[:, None] - kind.window) for kind in self._kinds()}

    def _plan_decodes(self, batch: Batch) -> None:
        n = batch.num_decodes
        if n:
            width = self._width(batch.kv_lens[:n])
            self._tables = batch.device_tables[:n, :width].long()
            masks = self._masks(batch.positions[:n], width * self.sizes.page_size)
            self._decode_masks = {kind: mask[:, None, None] for kind, mask in masks.items()}

    def _plan_chunk(self, batch: Batch, request: int, rows: slice) -> Any:
        pages = -(-int(batch.kv_lens[request]) // self.sizes.page_size)
        masks = self._masks(batch.positions[rows], pages * self.sizes.page_size)
        groups = {kind: kind.num_heads // kind.num_kv_heads for kind in masks}
        return batch.device_tables[request, :pages].long(), {kind: mask.repeat(groups[kind], 1) for kind, mask in masks.items()}

    def _gather(self, layer: int, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [requests, kv_heads, length, head_dim] of tables [requests, pages]."""
        k, v = (self.cache[layer, i][tables].flatten(1, 2).transpose(1, 2) for i in (0, 1))
        return k, v

    def _attend_decodes(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        kind = self.layers[layer]
        k, v = self._gather(layer, self._tables)
        rows = q.reshape(len(q), kind.num_kv_heads, -1, kind.head_dim)  # a group's heads are rows
        out = F.scaled_dot_product_attention(rows, k, v, self._decode_masks[kind], scale=kind.scale)
        return out.reshape(q.shape)

    def _attend_chunk(self, layer: int, q: torch.Tensor, chunk: Any) -> torch.Tensor:
        kind, (table, masks) = self.layers[layer], chunk
        k, v = self._gather(layer, table[None])
        n, group = len(q), kind.num_heads // kind.num_kv_heads
        rows = q.reshape(n, kind.num_kv_heads, group, -1).permute(1, 2, 0, 3).reshape(1, kind.num_kv_heads, group * n, -1)
        out = F.scaled_dot_product_attention(rows, k, v, masks[kind][None, None], scale=kind.scale)
        return out.view(kind.num_kv_heads, group, n, -1).permute(2, 0, 1, 3).reshape(q.shape)


# ---------------------------------------------------------------- FlexAttention


@dataclass
class _Blocks:
    """A block mask whose buffers stay where they are, since compiled code and graphs read them there."""

    mask: Any  # torch's BlockMask
    kv_lens: torch.Tensor  # int32 [requests]
    first: torch.Tensor  # int32 [requests], position of the first query
    logical: torch.Tensor  # int32 [requests, pages of the cache], a page's place in the request

    def fill(self, tables: torch.Tensor, kv_lens: torch.Tensor, first: torch.Tensor, page_size: int) -> None:
        """Say which pages, int32 [requests, max_pages], how many keys, and where the first queries are."""
        self.kv_lens.copy_(kv_lens)
        self.first.copy_(first)
        places = torch.arange(tables.shape[1], dtype=torch.int32, device=tables.device)
        # Entries past a request's end are page 0, which no request has: its place may be anything.
        self.logical.scatter_(1, tables.long(), places.expand_as(tables))
        whole = (first + 1) // page_size  # pages that every query sees all of: no mask is evaluated there
        others = (kv_lens + page_size - 1) // page_size - whole
        after = (whole[:, None] + places).clamp_max(tables.shape[1] - 1)
        mask = self.mask
        mask.full_kv_num_blocks.copy_(whole[:, None, None].expand_as(mask.full_kv_num_blocks))
        mask.full_kv_indices[..., : tables.shape[1]] = tables[:, None, None]
        mask.kv_num_blocks.copy_(others[:, None, None].expand_as(mask.kv_num_blocks))
        mask.kv_indices[..., : tables.shape[1]] = tables.gather(1, after.long())[:, None, None]


class Flex(_Gathering):
    """Compiled FlexAttention, the Triton peer: the cache is one long key sequence, and block masks say which of its pages
    belong to a request, as torch's own PagedAttention has it. Pages are its blocks, so they must be of 128 tokens."""

    name = "flex"

    def __init__(self, layers: Sequence[Layer], cache: torch.Tensor, sizes: Sizes) -> None:
        super().__init__(layers, cache, sizes)
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        self._refuse(window=True)
        if sizes.page_size % 128:
            raise BackendError(f"backend flex: a page size that is a multiple of 128 required, its block; found {sizes.page_size}: use page_size 128")
        torch._dynamo.config.recompile_limit = 64  # a shape for each number of requests
        self._block_mask, self._flex = BlockMask, torch.compile(flex_attention, dynamic=False)
        caps = {kind.softcap for kind in layers}
        self._score_mods = {cap: None if cap is None else _softcap(cap) for cap in caps}
        self._made: dict[tuple[int, int, int], _Blocks] = {}

    def _blocks(self, requests: int, rows: int, which: int = 0) -> _Blocks:
        """The block mask number ``which`` of these sizes: ``requests`` of ``rows`` queries each."""
        if (made := self._made.get((requests, rows, which))) is None:
            device, pages, size = self.cache.device, self.cache.shape[2], self.sizes.page_size

            def ints(*shape: int) -> torch.Tensor:
                return torch.zeros(shape, dtype=torch.int32, device=device)

            kv_lens, first, logical = ints(requests), ints(requests), ints(requests, pages)

            def mask(b: Any, h: Any, q: Any, kv: Any) -> Any:
                position = logical[b, kv // size] * size + kv % size
                return (position <= first[b] + q) & (position < kv_lens[b])

            q_blocks = -(-rows // 128)
            counts, lists = (requests, 1, q_blocks), (requests, 1, q_blocks, pages)
            block_mask = self._block_mask(
                seq_lengths=(rows, pages * size), kv_num_blocks=ints(*counts), kv_indices=ints(*lists),
                full_kv_num_blocks=ints(*counts), full_kv_indices=ints(*lists), q_num_blocks=None, q_indices=None, full_q_num_blocks=None,
                full_q_indices=None, BLOCK_SIZE=(128, size), mask_mod=mask,
            )  # fmt: skip
            made = self._made[requests, rows, which] = _Blocks(block_mask, kv_lens, first, logical)
        return made

    def _call(self, layer: int, q: torch.Tensor, blocks: _Blocks) -> torch.Tensor:
        """q [requests, heads, rows, head_dim] -> the same shape."""
        kind = self.layers[layer]
        k, v = (self.cache[layer, i].flatten(0, 1).transpose(0, 1)[None] for i in (0, 1))
        return self._flex(q, k, v, score_mod=self._score_mods[kind.softcap], block_mask=blocks.mask, scale=kind.scale,
                          enable_gqa=kind.num_heads != kind.num_kv_heads)  # fmt: skip

    def _plan_decodes(self, batch: Batch) -> None:
        n = batch.num_decodes
        if n:
            more = _power_of_two(n) - n  # rows of padding, of one key of page 0: few shapes, each compiled once
            self._decode_blocks = self._blocks(n + more, 1)
            tables, kv_lens, positions = batch.device_tables[:n], batch.device_kv_lens[:n], batch.positions[:n]
            if more:
                tables, kv_lens, positions = F.pad(tables, (0, 0, 0, more)), F.pad(kv_lens, (0, more), value=1), F.pad(positions, (0, more))
            self._decode_blocks.fill(tables, kv_lens, positions, self.sizes.page_size)

    def _plan_chunk(self, batch: Batch, request: int, rows: slice) -> _Blocks:
        padded = max(128, _power_of_two(rows.stop - rows.start))
        blocks, one = self._blocks(1, padded, request - batch.num_decodes), slice(request, request + 1)
        blocks.fill(batch.device_tables[one], batch.device_kv_lens[one], batch.positions[rows][:1], self.sizes.page_size)
        return blocks

    def _attend_decodes(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        padded = F.pad(q, (0, 0, 0, 0, 0, len(self._decode_blocks.kv_lens) - len(q)))
        return self._call(layer, padded[:, :, None], self._decode_blocks)[: len(q), :, 0]

    def _attend_chunk(self, layer: int, q: torch.Tensor, chunk: _Blocks) -> torch.Tensor:
        rows = chunk.mask.seq_lengths[0]
        padded = F.pad(q.transpose(0, 1)[None], (0, 0, 0, rows - len(q)))
        return self._call(layer, padded, chunk)[0, :, : len(q)].transpose(0, 1)


def _power_of_two(n: int) -> int:
    """The next one that is at least n."""
    return 1 << (n - 1).bit_length()


def _softcap(cap: float) -> Callable[..., torch.Tensor]:
    def score(s: torch.Tensor, b: Any, h: Any, q: Any, kv: Any) -> torch.Tensor:
        return cap * torch.tanh(s / cap)

    return score


BACKENDS: dict[str, type[Backend]] = {backend.name: backend for backend in (Attngen, FlashInfer, Sdpa, Flex)}


def make(name: str, layers: Sequence[Layer], cache: torch.Tensor, sizes: Sizes, **options: Any) -> Backend:
    """The backend of this name. Raises BackendError where it cannot serve these layers here."""
    if name not in BACKENDS:
        raise BackendError(f"backend {name!r}: one of {', '.join(BACKENDS)} required")
    return BACKENDS[name](layers, cache, sizes, **options)
