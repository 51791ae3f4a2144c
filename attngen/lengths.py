"""The lengths of a batch: its requests, what is wrong with them, and which keys a row tile reaches.

As plan.cu.jinja reads them, in plain Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

import torch

from .bounds import Inequality, TileBounds
from .expr import Node
from .records import record
from .space import INT32_MAX, REQUEST
from .status import Status, Wrong

# ---------------------------------------------------------------- the batch


@record
class Request:
    """One request. ``kv_base``: its first index in the page table, or the row of its first key; negative: bad."""

    q_start: int
    q_len: int
    kv_len: int  # of the sequence; keys are at positions kv_start ... kv_len - 1
    kv_start: int
    q_offset: int
    kv_token: int  # packed row of the key at position 0
    kv_base: int

    @property
    def num_keys(self) -> int:
        """Cached keys."""
        return self.kv_len - self.kv_start

    def pack(self) -> bytes:
        """As in work.cuh."""
        return REQUEST.pack(
            self.q_start, self.q_len, self.kv_len, self.kv_start, self.q_offset, self.kv_token, self.kv_base
        )


@record
class Lengths:
    """A batch's lengths as the planner takes them; sequences of ints on the host. See PLAN_FIELDS in abi_cuda.py."""

    num_requests: int
    q_indptr: Sequence[int] | None = None
    q_lens: Sequence[int] | None = None
    q_len: int = 1
    q_positions: Sequence[int] | None = None
    kv_indptr: Sequence[int] | None = None
    kv_last_page_len: Sequence[int] | None = None
    kv_lens: Sequence[int] | None = None
    kv_len: int = 0
    kv_starts: Sequence[int] | None = None
    page_size: int = 1
    block_table_stride: int = 0
    kv_capacity: int = INT32_MAX
    max_q_tokens: int = INT32_MAX
    max_q_len: int = INT32_MAX
    max_kv_len: int = INT32_MAX
    shared_tokens: Sequence[int] | None = None  # keys of each request that are left to nodes (shared.py)


def read_requests(batch: Lengths) -> tuple[list[Request], Status]:
    """The requests of a batch, and what is wrong with the first bad one."""
    requests, status, kv_tokens = [], Status(), 0
    paged = batch.kv_last_page_len is not None or batch.block_table_stride > 0
    for i in range(batch.num_requests):
        request, wrong = _read_request(batch, i)
        if paged:
            request = Request(**{**vars(request), "kv_token": kv_tokens - request.kv_start})
        kv_tokens += request.num_keys
        requests.append(request)
        status = status or wrong
    return requests, status


def all_good(b: Lengths) -> bool:
    """Whether ``read_requests`` finds nothing wrong, a hundred times as fast; vectors are tensors on the host."""
    if not b.num_requests:
        return True
    if b.q_indptr is not None:
        q_ends, q_lens = b.q_indptr.long(), b.q_indptr.long().diff()
        if q_ends.min() < 0 or q_lens.min() < 0 or q_ends.max() > b.max_q_tokens or q_lens.max() > b.max_q_len:
            return False
    elif b.num_requests * b.q_len > b.max_q_tokens or b.q_len > b.max_q_len:
        return False
    keys = ends = b.kv_lens.long() if b.kv_indptr is None else b.kv_indptr.long()
    if b.kv_indptr is not None:
        keys = ends.diff()
    if ends.min() < 0 or keys.min() < 0 or ends.max() > b.kv_capacity:
        return False
    if b.kv_last_page_len is not None:
        last = b.kv_last_page_len.long().where(keys > 0, b.page_size)
        if last.min() < 1 or last.max() > b.page_size:
            return False
        keys = (keys - 1) * b.page_size + last
    starts = torch.zeros(1, dtype=torch.int64) if b.kv_starts is None else b.kv_starts.long()
    return bool(keys.max() <= b.max_kv_len and starts.min() >= 0 and (starts + keys).max() <= INT32_MAX)


def _read_request(b: Lengths, i: int) -> tuple[Request, Status]:
    wrong = Status()

    def require(good: bool, what: Wrong, found: int) -> None:
        nonlocal wrong
        if not good and not wrong:
            wrong = Status(what, i, min(found, INT32_MAX))

    q0 = i * b.q_len
    q1 = q0 + (b.q_lens[i] if b.q_lens is not None else b.q_len)
    if b.q_indptr is not None:
        q0, q1 = b.q_indptr[i], b.q_indptr[i + 1]
    require(q0 >= 0, Wrong.NEGATIVE_Q, q0)
    require(q1 >= q0, Wrong.DECREASING_Q, q1)
    if wrong:
        q0 = q1 = 0
    require(q1 <= b.max_q_tokens, Wrong.LONG_BATCH, q1)
    require(q1 - q0 <= b.max_q_len, Wrong.LONG_QUERY, q1 - q0)
    if b.q_indptr is None:
        q1 = min(q1, q0 + b.q_len)  # the rows after them are another request's
    q0, q1 = min(q0, b.max_q_tokens), min(q1, b.max_q_tokens)

    token = 0
    if b.kv_indptr is not None:
        base, end = b.kv_indptr[i], b.kv_indptr[i + 1]
        keys = end - base
        require(base >= 0, Wrong.NEGATIVE_KV, base)
        require(keys >= 0, Wrong.DECREASING_KV, end)
        if b.kv_last_page_len is None:
            token = base
        elif keys > 0:
            last = b.kv_last_page_len[i]
            require(1 <= last <= b.page_size, Wrong.LAST_PAGE_LEN, last)
            keys = (keys - 1) * b.page_size + last
    else:
        base, keys = i * b.block_table_stride, b.kv_lens[i] if b.kv_lens is not None else b.kv_len
        end = keys
        require(keys >= 0, Wrong.NEGATIVE_KV_LEN, keys)
        if not b.block_table_stride:
            base, token = 0, i * b.kv_len
    kv_start = b.kv_starts[i] if b.kv_starts is not None else 0
    require(kv_start >= 0 and kv_start + keys <= INT32_MAX, Wrong.KV_START, kv_start)
    require(end <= b.kv_capacity, Wrong.PAST_TABLE, end)
    require(keys <= b.max_kv_len, Wrong.LONG_KEYS, keys)
    if wrong:
        keys, base, kv_start = 0, -1, 0
    kv_len, q_len = kv_start + keys, q1 - q0
    token -= kv_start
    if b.shared_tokens is not None and not wrong:
        kv_start, base = kv_start + b.shared_tokens[i], base + b.shared_tokens[i] // b.page_size
    q_offset = b.q_positions[i] if b.q_positions is not None else kv_len - q_len
    return Request(q0, q_len, kv_len, kv_start, q_offset, token, base), wrong


# ---------------------------------------------------------------- which keys a row tile reaches


@record
class Slots:
    """Cache slots, or positions, [begin, end) but for [gap_begin, gap_end); empty: begin and end are 0."""

    begin: int
    end: int
    gap_begin: int = 0
    gap_end: int = 0

    def moved(self, by: int) -> Slots:
        return Slots(*(x + by for x in (self.begin, self.end, self.gap_begin, self.gap_end)))

    def within(self, begin: int, end: int) -> Slots:
        """Those in [begin, end)."""
        begin, end = max(self.begin, begin), min(self.end, end)
        gap_begin, gap_end = self.gap_begin, self.gap_end
        if gap_begin < gap_end:
            if gap_begin <= begin:
                begin = max(begin, gap_end)
            if gap_end >= end:
                end = min(end, gap_begin)
        if begin >= end:
            return Slots(0, 0)
        inside = begin < gap_begin < gap_end < end
        return Slots(begin, end, gap_begin, gap_end) if inside else Slots(begin, end)

    def joined(self, other: Slots) -> Slots:
        """Both: with the gap between them, if neither has one already."""
        if self.begin >= self.end or other.begin >= other.end:
            return other if self.begin >= self.end else self
        begin, end = min(self.begin, other.begin), max(self.end, other.end)
        gap = min(self.end, other.end), max(self.begin, other.begin)
        known = self.gap_begin < self.gap_end or other.gap_begin < other.gap_end
        return Slots(begin, end) if known or gap[0] >= gap[1] else Slots(begin, end, *gap)

    def blocks(self, bn: int) -> tuple[int, int, int, int]:
        """In blocks of ``bn``: the first, how many, how many before the gap, how many the gap leaves out."""
        if self.begin >= self.end:
            return 0, 0, 0, 0
        first, last = self.begin // bn, (self.end - 1) // bn
        gap, after = -(-self.gap_begin // bn), self.gap_end // bn
        if gap >= after:
            return first, last + 1 - first, 0, 0
        return first, last + 1 - first - (after - gap), gap - first, after - gap


@record
class Reach:
    """A variant's closed bounds with the parameters that they read: what keys a row tile can attend to."""

    bounds: TileBounds
    params: Mapping[str, Any] = field(default_factory=dict)
    num_heads: int = 1
    num_kv_heads: int = 1
    head_offset: int = 0
    total_heads: int | None = None

    def span(self, index: int, r: Request, q_lo: int, q_hi: int) -> Slots:
        """Cache slots that queries at positions q_lo ... q_hi can reach, over all KV heads."""
        ranges = [self._range(index, r, head, q_lo, q_hi) for head in range(self.num_kv_heads if self._per_head else 1)]
        if len(ranges) > 1:  # all heads together, without a gap
            ranges = [x for x in ranges if x.begin < x.end]
            ranges = [Slots(min(x.begin for x in ranges), max(x.end for x in ranges))] if ranges else [Slots(0, 0)]
        return ranges[0].moved(-r.kv_start).within(0, r.num_keys)

    def row_span(self, index: int, r: Request, row0: int, row1: int) -> Slots:
        """The same for packed rows [row0, row1)."""
        return self.span(index, r, r.q_offset + row0 // self.group, r.q_offset + (row1 - 1) // self.group)

    def row_slots(self, index: int, r: Request, row0: int, row1: int) -> tuple[int, int]:
        """The first and the one after the last of these."""
        found = self.row_span(index, r, row0, row1)
        return found.begin, found.end

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def _per_head(self) -> bool:
        every = (*self.bounds.closed, *(x for alternative in self.bounds.either for x in alternative))
        return any("kv_head" in node.symbols for x in every for node in (*(n for _, n in x.terms), *([] if x.unit is None else [x.unit])))

    def _range(self, index: int, r: Request, head: int, q_lo: int, q_hi: int) -> Slots:
        """Positions instead of slots, of one KV head."""
        from .interp import evaluate  # not for a GPU's server, which plans on the device

        group, total = self.num_heads // self.num_kv_heads, self.total_heads or self.num_heads
        symbols = {
            "request": index, "kv_head": self.head_offset // group + head, "q_len": r.q_len, "kv_len": r.kv_len, "q_offset": r.q_offset,
            "num_heads": total, "num_kv_heads": total // group,
        }  # fmt: skip
        tensors = {name: torch.tensor(value, dtype=torch.int32) for name, value in symbols.items()}
        def value(node: Node) -> int:
            return int(evaluate(node, tensors, self.params, frozenset()))

        def narrow(bounds: Sequence[Inequality], begin: int, end: int) -> Slots:
            for found in bounds:
                terms, unit = [sign * value(node) for sign, node in found.terms], 1 if found.unit is None else value(found.unit)
                weight = sum(map(abs, terms)) + found.wq * (abs(r.q_offset) + r.q_len) + found.wk * r.kv_len
                if unit <= 0 or weight >= 2**31 and not _harmless(found.terms, found.wq, found.wk):
                    continue  # the mask's own i32 arithmetic may wrap
                best = found.cq * ((q_hi if found.cq > 0 else q_lo) // unit) + sum(terms)
                if found.ck > 0:
                    begin = max(begin, -(best // found.ck) * unit)
                elif found.ck < 0:
                    end = min(end, (best // -found.ck + 1) * unit)
                elif best < 0:
                    end = min(end, 0)
            return Slots(begin, end)

        common = narrow(self.bounds.closed, 0, r.kv_len)
        parts = [narrow(x, common.begin, common.end) for x in self.bounds.either] or [common]
        found = parts[0].within(0, r.kv_len)
        for part in parts[1:]:
            found = found.joined(part.within(0, r.kv_len))
        return found


def _harmless(terms: Sequence[tuple[int, Node]], wq: int, wk: int) -> bool:
    """Whether emission drops the guard too: positions stay below 2**30 and the constants are small."""
    return all(n.op == "const" for _, n in terms) and wq <= 1 and wk <= 1 and sum(abs(s * n.attr) for s, n in terms) < 2**20
