"""Batches whose keys are given in levels, from what many requests share to what each has for itself.

    tables = join_levels([qo_indptr_0, qo_indptr_1], [kv_indptr_0, kv_indptr_1], [kv_indices_0, kv_indices_1], [last_0, last_1],
                         page_size=16, max_pages=65536)        # FlashInfer's multi-level cascade, as one batch
    attn.plan(**tables)

    attn = ComposedAttention([shared, own])                     # BatchAttentions of other page sizes, or without pages
    attn.plan(q_indptr, [dict(block_table=..., kv_lens=...), dict(kv_indptr=...)])
    out = attn.run(q, [(k_shared, v_shared), (k_own, v_own)])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .errors import ParameterError, UnsupportedError

if TYPE_CHECKING:
    from .batch import BatchAttention


def join_levels(
    qo_indptr_arr: Sequence[torch.Tensor],
    paged_kv_indptr_arr: Sequence[torch.Tensor],
    paged_kv_indices_arr: Sequence[torch.Tensor],
    paged_kv_last_page_len_arr: Sequence[torch.Tensor],
    *,
    page_size: int,
    max_pages: int,
) -> dict[str, torch.Tensor]:
    """Arguments of ``BatchAttention.plan`` for a batch in levels, as FlashInfer's MultiLevelCascadeAttentionWrapper.plan takes it.

    The keys of a request are those of its entry in the first level, then the second, ...; an entry of a level serves the query rows
    from its ``qo_indptr`` to the next. The object is made with ``shared_prefix=True``: the entries of the first level become its
    groups, and what deeper levels share is found. All work is on the tensors' device, of fixed size and without a sync, so that
    it may be captured in a CUDA graph.

    Args:
        qo_indptr_arr: of each level int32 ``[entries + 1]``; the last level's are the requests.
        paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len_arr: of each level its pages, int32. Pages of all levels
            but the last must be full.
        page_size: keys of a page.
        max_pages: room for the joined page table, entries: BatchAttention's ``max_pages``.

    Returns:
        q_indptr, kv_indptr, kv_indices, kv_last_page_len and shared_prefix. A request with a page before its last level that is not
        full, or with more pages than there is room for, is bad: ``check`` tells of it, and its rows are NaN.

    Raises:
        ParameterError: lists of different lengths, tensors that are not int32 vectors of one device.
    """
    lists = {"qo_indptr_arr": qo_indptr_arr, "paged_kv_indptr_arr": paged_kv_indptr_arr, "paged_kv_indices_arr": paged_kv_indices_arr,
             "paged_kv_last_page_len_arr": paged_kv_last_page_len_arr}  # fmt: skip
    count = len(qo_indptr_arr)
    if count == 0 or any(len(x) != count for x in lists.values()):
        raise ParameterError(f"levels: {', '.join(f'{n} has {len(x)}' for n, x in lists.items())}: required one each of every level, and one level at least")
    device = qo_indptr_arr[0].device if isinstance(qo_indptr_arr[0], torch.Tensor) else None
    for name, tensors in lists.items():
        for i, x in enumerate(tensors):
            if not isinstance(x, torch.Tensor) or x.dtype != torch.int32 or x.dim() != 1 or x.device != device:
                found = f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, torch.Tensor) else type(x).__name__
                raise ParameterError(f"{name}[{i}] is {found}: required an int32 vector on one device with all others")
    for i in range(count):
        entries = qo_indptr_arr[i].shape[0] - 1
        if entries < 0 or paged_kv_indptr_arr[i].shape[0] != entries + 1 or paged_kv_last_page_len_arr[i].shape[0] != entries:
            raise ParameterError(
                f"level {i}: qo_indptr has {entries + 1} entries, kv_indptr {paged_kv_indptr_arr[i].shape[0]}, kv_last_page_len "
                f"{paged_kv_last_page_len_arr[i].shape[0]}: required n + 1, n + 1 and n"
            )
    q_indptr = qo_indptr_arr[-1]
    requests = q_indptr.shape[0] - 1
    last = paged_kv_last_page_len_arr[-1]
    place = torch.arange(max_pages, dtype=torch.int32, device=device)
    entry_of, counts = [], []
    full = torch.ones(requests, dtype=torch.bool, device=device)
    for i in range(count):
        entry = torch.arange(requests, dtype=torch.int32, device=device)
        if i < count - 1:
            inside = torch.searchsorted(qo_indptr_arr[i], q_indptr[:-1].contiguous(), right=True, out_int32=True) - 1
            entry = inside.clamp(0, max(qo_indptr_arr[i].shape[0] - 2, 0))
        entry_of.append(entry)
        counts.append(paged_kv_indptr_arr[i].diff()[entry] if qo_indptr_arr[i].shape[0] > 1 else torch.zeros_like(entry))
        if i < count - 1 and qo_indptr_arr[i].shape[0] > 1:
            full &= (counts[i] == 0) | (paged_kv_last_page_len_arr[i][entry] == page_size)
    before = torch.stack(counts).cumsum(0, dtype=torch.int32)  # [levels, requests], this level included
    kv_indptr = torch.zeros(requests + 1, dtype=torch.int32, device=device)
    torch.cumsum(before[-1], 0, dtype=torch.int32, out=kv_indptr[1:])
    kv_indices = torch.zeros(max_pages, dtype=torch.int32, device=device)
    if requests:
        request = (torch.searchsorted(kv_indptr, place, right=True, out_int32=True) - 1).clamp(0, requests - 1)
        within = place - kv_indptr[request]
        for i in range(count):
            first = before[i][request] - counts[i][request]
            at = paged_kv_indptr_arr[i][entry_of[i][request]] + within - first
            if (room := paged_kv_indices_arr[i].shape[0]) > 0:
                pages = paged_kv_indices_arr[i][at.clamp(0, room - 1)]
                kv_indices = torch.where((within >= first) & (within < before[i][request]), pages, kv_indices)
    # Where the last level has no pages, the keys end with the level before.
    last = torch.where((counts[-1] == 0) & (before[-1] > 0), page_size, last)
    groups = entry_of[0] if count > 1 else torch.full_like(entry_of[0], -1)
    return {"q_indptr": q_indptr, "kv_indptr": kv_indptr, "kv_indices": kv_indices, "kv_last_page_len": torch.where(full, last, page_size + 1),
            "shared_prefix": groups}  # fmt: skip


class ComposedAttention:
    """Attention over keys in several caches: a request's keys are its keys of the first, then of the second, ...

    Each level is a BatchAttention of the same variant and heads, with a page size, a layout or none of its own (FlashInfer's composable
    formats); one made with ``shared_prefix=True`` reads what requests share in it once. Every level is attended to by itself, and
    ``merge_states`` joins them.

    Args:
        levels: in the order of their keys.

    Raises:
        ParameterError, UnsupportedError: levels that do not fit together; a variant whose RoPE depends on a request's length.
    """

    def __init__(self, levels: Sequence[BatchAttention]) -> None:
        if not levels:
            raise ParameterError("ComposedAttention of no levels: required one BatchAttention or more")
        self.levels = tuple(levels)
        self.variant = levels[0].variant
        same = ("num_heads", "num_kv_heads", "head_dim", "head_dim_v", "dtype", "device", "head_offset", "total_heads", "scale")
        for i, level in enumerate(levels[1:], 1):
            if level.variant is not self.variant:
                raise ParameterError(f"level {i} is of {level.variant.name}, level 0 of {self.variant.name}: required one variant, the same object")
            if other := [n for n in same if getattr(level, n) != getattr(levels[0], n)]:
                found = ", ".join(f"{n} {getattr(level, n)} and {getattr(levels[0], n)}" for n in other)
                raise ParameterError(f"levels {i} and 0 have {found}: required the same")
        lengths = {"kv_len", "kv_token"}
        for name, node in self.variant.trace.roots().items():
            if read := sorted(node.symbols & lengths):
                raise UnsupportedError(f"ComposedAttention with {self.variant.name}: {name} reads {', '.join(read)}, which no level knows")
        if self.variant.trace.rope and self.variant.trace.rope.rope.needs_kv_lens:
            raise UnsupportedError(f"ComposedAttention with {self.variant.name}: its RoPE depends on a request's length, which no level knows")
        self._batch: dict[str, Any] = {}
        self._params: Mapping[str, Any] = {}  # of the last plan

    def plan(self, q_indptr: Any, levels: Sequence[Mapping[str, Any]], *, q_positions: Any = None, max_q_len: int | None = None, **params: Any) -> None:
        """Lay out a batch.

        Args:
            q_indptr: int32 ``[requests + 1]``.
            levels: of each level its keys, as ``BatchAttention.plan`` takes them: kv_indptr, kv_indices, kv_last_page_len; or block_table,
                kv_lens; or kv_indptr; and shared_prefix.
            q_positions: ``[requests]``, position of the first query token; default all keys of the request less its query tokens.
            max_q_len, **params: as ``BatchAttention.plan``.
        """
        self._batch = {}
        if len(levels) != len(self.levels):
            raise ParameterError(f"keys of {len(levels)} levels: required those of {len(self.levels)}")
        device = self.levels[0].device

        def ints(x: Any) -> torch.Tensor:
            return torch.as_tensor(x).to(device=device, dtype=torch.int32)

        indptr = ints(q_indptr)
        keys = []
        for i, (level, given) in enumerate(zip(self.levels, levels)):
            if "kv_lens" in given:
                keys.append(ints(given["kv_lens"]))
            elif "kv_indptr" in given:
                counts = ints(given["kv_indptr"]).diff()
                if level.page_size is not None:
                    if "kv_last_page_len" not in given:
                        raise ParameterError(f"level {i}: kv_indptr of pages without kv_last_page_len")
                    counts = torch.where(counts > 0, (counts - 1) * level.page_size + ints(given["kv_last_page_len"]), 0)
                keys.append(counts)
            else:
                raise ParameterError(f"level {i} has {', '.join(given) or 'nothing'}: required kv_indptr, or block_table and kv_lens")
            if keys[i].shape[0] != indptr.shape[0] - 1:
                raise ParameterError(f"level {i} has keys of {keys[i].shape[0]} requests: required {indptr.shape[0] - 1}, as q_indptr has")
        ends = torch.stack(keys).cumsum(0, dtype=torch.int32)
        first = ends[-1] - indptr.diff() if q_positions is None else ints(q_positions)
        for level, given, end, count in zip(self.levels, levels, ends, keys):
            level.plan(indptr, **given, kv_start=(end - count).contiguous(), q_positions=first, max_q_len=max_q_len, **params)
        self._batch, self._params = {"q_indptr": indptr, "q_positions": first}, params

    def run(
        self, q: torch.Tensor, kvs: Sequence[Any], *, return_lse: bool = False, **params: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of the planned batch; ``kvs``: of each level what ``BatchAttention.run`` takes; others as there."""
        from .merge import merge_states

        if not self._batch:
            raise ParameterError("run before plan: call plan(...) first")
        if len(kvs) != len(self.levels):
            raise ParameterError(f"kvs has {len(kvs)} caches: required {len(self.levels)}, one of each level")
        output = {n for n in ("output", "sink") if getattr(self.variant.trace, n) is not None}
        of_output = frozenset().union(*(getattr(self.variant.trace, n).params for n in output)) if output else frozenset()
        states = [level.run(q, kv, partial=True, **params) for level, kv in zip(self.levels, kvs)]
        first = self.levels[0]
        finish = dict(num_kv_heads=first.num_kv_heads, head_offset=first.head_offset, total_heads=first.total_heads) if output else {}
        out, lse = merge_states(
            [out for out, _ in states], None if states[0][1] is None else [lse for _, lse in states], variant=self.variant, out_dtype=first.dtype,
            **(self._batch if output else {}), **finish, **{n: x for n, x in {**self._params, **params}.items() if n in of_output},
        )  # fmt: skip
        return (out, lse) if return_lse else out

    def check(self) -> None:
        """As ``BatchAttention.check``, of every level."""
        for level in self.levels:
            level.check()
