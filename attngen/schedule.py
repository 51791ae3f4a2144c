"""The schedule of a batch: row tiles, units of work, equal shares for the workers.

This is the planner of ``templates/cuda/plan.cu.jinja`` in plain Python, record for record, with the walk of
``work.cuh`` over its result. It serves the CPU backend and the tests; ``pack`` writes what the device would have written.

A row-tile class has ``bm`` packed rows (token * group + head in group) a tile. A unit is one tile and one KV head; its
cost is its KV blocks, at least 1, plus ``unit_cost`` where there are more units than workers. The units of a class lie on
a line, tile by tile or KV head by KV head, and worker w of n owns the cost interval [w * total / n, (w + 1) * total / n):
only its first and its last unit can be partial, so that partial results have fixed slots, 2w and 2w + 1. With a fixed
split, tiles are cut beforehand into pieces that are units of their own.

A class of kind "queue" (``queue.cuh``) has one record a request; workers draw its units from a counter. Only requests whose
tiles are longer than the workers' average load are cut.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any

import torch

from .bounds import Inequality, TileBounds
from .choose_cuda import PlanConfig, TileClass
from .errors import ParameterError
from .expr import Node
from .interp import evaluate
from .records import record
from .space import (
    INT32_MAX,
    QUEUE,
    QUEUED_REQUEST,
    REQUEST,
    SLOTS_PER_WORKER,
    TILE,
    WORKER,
)
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
    q_offset = b.q_positions[i] if b.q_positions is not None else kv_len - q_len
    return Request(q0, q_len, kv_len, kv_start, q_offset, token - kv_start, base), wrong


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


# ---------------------------------------------------------------- tiles and workers


@record
class WorkTile:
    """A row tile, or with a fixed split a piece of one. ``index`` is negative (~index) for a bad request."""

    request: Request
    index: int
    row0: int
    rows: int
    block0: int
    blocks: int
    piece: int
    pieces: int
    prefix: int
    gap: int = 0  # blocks from the gap-th on lie gap_blocks further
    gap_blocks: int = 0

    def block(self, i: int) -> int:
        """The i-th of its blocks, in blocks of cache slots."""
        return self.block0 + i + (self.gap_blocks if i >= self.gap else 0)

    def pack(self) -> bytes:
        """As in work.cuh."""
        return TILE.pack(
            self.request.pack(), self.index, self.row0, self.rows, self.block0, self.blocks, self.piece, self.pieces,
            self.gap, self.gap_blocks, 0, self.prefix,
        )  # fmt: skip


def _length(tile: WorkTile) -> int:
    return max(tile.blocks, 1)


@record
class Unit:
    """A worker's part of a unit: blocks [begin, end) counted from the tile's block0.

    ``pieces`` > 1: the result is partial, goes to slot ``slot``, and the last of the pieces to arrive at ``counter``
    merges the slots ``merge`` in this order.
    """

    tile: WorkTile
    kv_head: int
    begin: int
    end: int
    pieces: int
    slot: int
    counter: int
    merge: tuple[int, ...]


@record
class ClassPlan:
    """The work list of one row-tile class."""

    shape: TileClass
    num_kv_heads: int
    num_workers: int
    tiles: tuple[WorkTile, ...]

    @property
    def active_workers(self) -> int:
        """Workers with a share: all, unless there is less work than that."""
        return min(self.num_workers, self.total)

    @property
    def unit_cost(self) -> int:
        """Of a unit beside its blocks: none where there are no more units than workers, since each has a piece or two then."""
        return self.shape.unit_cost if len(self.tiles) * self.num_kv_heads > self.num_workers else 0

    @property
    def of_head(self) -> int:
        """The cost of all units of a KV head."""
        return sum(map(_length, self.tiles)) + self.unit_cost * len(self.tiles)

    @property
    def total(self) -> int:
        """The length of the line."""
        return self.of_head * self.num_kv_heads

    def share(self, worker: int) -> tuple[int, int]:
        """The cost interval of a worker."""
        return self.total * worker // self.active_workers, self.total * (worker + 1) // self.active_workers

    def owner(self, place: int) -> int:
        """The worker whose share holds a place on the line."""
        return ((place + 1) * self.active_workers - 1) // self.total

    def first_unit(self, worker: int) -> tuple[int, int]:
        """Tile and KV head at which a worker's share begins."""
        begin, head, times = self.share(worker)[0], 0, self.num_kv_heads
        if self.shape.head_major:
            (head, begin), times = divmod(begin, self.of_head), 1
        starts = [(t.prefix + self.unit_cost * i) * times for i, t in enumerate(self.tiles)]
        tile = bisect.bisect_right(starts, begin) - 1
        if not self.shape.head_major:
            head = (begin - starts[tile]) // (_length(self.tiles[tile]) + self.unit_cost)
        return tile, head

    def start(self, index: int, head: int) -> int:
        """Where a unit begins on the line."""
        tile, earlier = self.tiles[index], self.tiles[index].prefix + self.unit_cost * index
        if self.shape.head_major:
            return self.of_head * head + earlier
        return earlier * self.num_kv_heads + head * (_length(tile) + self.unit_cost)

    def walk(self, worker: int) -> Iterator[Unit]:
        """The units that a worker computes, in order."""
        if worker >= self.active_workers:
            return
        lo, hi = self.share(worker)
        index, head = self.first_unit(worker)
        cost = self.unit_cost
        while (start := self.start(index, head)) < hi:
            tile = self.tiles[index]
            if self.shape.split:
                begin, end = 0, tile.blocks if start >= lo else 0
            else:
                begin, end = max(lo - start - cost, 0), min(max(hi - start - cost, 0), tile.blocks)
            if begin < end or (tile.blocks == 0 and start >= lo):
                yield self._unit(worker, index, head, start, begin, end)
            if self.shape.head_major:
                index, head = (index + 1, head) if index + 1 < len(self.tiles) else (0, head + 1)
            else:
                index, head = (index, head + 1) if head + 1 < self.num_kv_heads else (index + 1, 0)
            if index == len(self.tiles) or head == self.num_kv_heads:
                return

    def _unit(self, worker: int, index: int, head: int, start: int, begin: int, end: int) -> Unit:
        tile, heads = self.tiles[index], self.num_kv_heads
        if self.shape.split:
            first = (index - tile.piece) * heads + head
            merge = tuple(first + i * heads for i in range(tile.pieces))
            return Unit(tile, head, begin, end, tile.pieces, index * heads + head, first, merge)
        if (begin, end) == (0, tile.blocks):
            return Unit(tile, head, begin, end, 1, 0, 0, ())
        w0, w1 = self.owner(start + self.unit_cost), self.owner(start + self.unit_cost + tile.blocks - 1)
        merge = (2 * w0 + 1, *(2 * w for w in range(w0 + 1, w1 + 1)))
        return Unit(tile, head, begin, end, len(merge), 2 * worker + (begin == 0), w0, merge)

    def pack(self) -> dict[str, bytes]:
        """The lists as the device writes them, by the names of struct fields."""
        return {"tiles": self.pack_tiles(), "workers": self.pack_workers()}

    def pack_tiles(self) -> bytes:
        """The tile records as the device writes them."""
        return b"".join(tile.pack() for tile in self.tiles)

    def pack_workers(self) -> bytes:
        """The worker records as the device writes them."""
        records = []
        for w in range(self.num_workers):
            if w >= self.active_workers:
                records.append(WORKER.pack(0, 0, 0, 0, 0, -1, 0, 0, 0, bytes(TILE.size)))
                continue
            index, head = self.first_unit(w)
            records.append(WORKER.pack(
                *self.share(w), self.total, self.unit_cost, self.active_workers, index, head, len(self.tiles),
                self.share(w)[0] - self.start(index, head), self.tiles[index].pack(),
            ))  # fmt: skip
        return b"".join(records)


# ---------------------------------------------------------------- the queue

# Requests that are put in order together; more are ordered among each this many. As plan_queue.cuh, a thread each.
ORDERED = PlanConfig.threads
_FEW_ROUNDS = 4  # of the longest unit, in which a worker has its share: more even out by themselves
_CANDIDATES = PlanConfig.threads // 32  # lengths of pieces that are compared, one a warp


@record
class QueuedRequest:
    """The units of a request in a queue. ``index`` is negative (~index) for a bad one."""

    request: Request
    index: int
    rows: int
    tiles: int
    pieces: int
    piece0: int
    piece_slots: int
    section_heads: int
    slot0: int
    counter0: int
    unit0: int

    def pack(self) -> bytes:
        """As in queue.cuh."""
        return QUEUED_REQUEST.pack(
            self.request.pack(), self.index, self.rows, self.tiles, self.pieces, self.piece0, self.piece_slots,
            self.section_heads, self.slot0, self.counter0, self.unit0, 0, 0,
        )  # fmt: skip

    def unit(self, number: int, num_kv_heads: int) -> tuple[int, int, int]:
        """Tile, piece and KV head of unit ``number`` of the queue, one of this request's: ``unit_of`` in queue.cuh."""
        section, i = divmod(number - self.unit0, self.section_heads * self.pieces * self.tiles)
        head0 = section * self.section_heads
        row, head = divmod(i, min(self.section_heads, num_kv_heads - head0))
        piece, tile = divmod(row, self.tiles)
        return self.tiles - 1 - tile, self.piece0 + self.pieces - 1 - piece, head0 + head

    def pieces_met(self, begin: int, end: int) -> tuple[int, int]:
        """The first of the planned pieces that cache slots [begin, end) meet, and their number: ``pieces_met`` in queue.cuh."""
        if begin >= end:
            return self.piece0, 0
        most = self.piece0 + self.pieces - 1
        first, last = (min(max(slot // self.piece_slots, self.piece0), most) for slot in (begin, end - 1))
        return first, last + 1 - first


@record
class QueuedUnit:
    """A unit that is not void: rows [row0, row0 + rows) of a request and cache slots [begin, end).

    ``pieces`` > 1: the result is partial, goes to slot ``slot``, and the last of the pieces to arrive at ``counter``, the first
    of one counter a warpgroup, merges the slots ``merge`` in this order.
    """

    record: QueuedRequest
    kv_head: int
    row0: int
    rows: int
    begin: int
    end: int
    pieces: int
    slot: int
    counter: int
    merge: tuple[int, ...]


@record
class QueuePlan:
    """The work list of a class of kind "queue"."""

    shape: TileClass
    num_kv_heads: int
    num_workers: int
    records: tuple[QueuedRequest, ...]
    units: int
    reach: Reach

    def unit(self, number: int) -> QueuedUnit | None:
        """What the block computes that draws unit ``number``; None if it is void."""
        record = self.records[bisect.bisect_right(self.records, number, key=lambda r: r.unit0) - 1]
        heads, shape = self.num_kv_heads, self.shape
        tile, piece, head = record.unit(number, heads)
        row0, rows = tile * shape.bm, min(record.rows - tile * shape.bm, shape.bm)
        begin, end = self.reach.row_slots(record.index if record.index >= 0 else ~record.index, record.request, row0, row0 + rows)
        first, count = record.pieces_met(begin, end)
        if not first <= piece < first + max(count, 1):
            return None
        begin, end = max(begin, piece * record.piece_slots), min(end, (piece + 1) * record.piece_slots)
        if count <= 1:
            return QueuedUnit(record, head, row0, rows, begin, max(begin, end), 1, 0, 0, ())
        merge = tuple(
            record.slot0 + (tile * record.pieces + i - record.piece0) * heads + head for i in range(first, first + count)
        )
        counter = record.counter0 + (tile * heads + head) * shape.groups
        return QueuedUnit(record, head, row0, rows, begin, end, count, merge[piece - first], counter, merge)

    def walk(self) -> Iterator[QueuedUnit]:
        """All units that are not void, in the order in which they are drawn."""
        yield from filter(None, map(self.unit, range(self.units)))

    def pack(self) -> dict[str, bytes]:
        """The lists as the device writes them, by the names of struct fields."""
        starts = struct.pack(f"={len(self.records) + 1}i", *(r.unit0 for r in self.records), self.units)
        header = QUEUE.pack(self.units, len(self.records), 0, 0)
        return {"requests": b"".join(r.pack() for r in self.records), "unit_starts": starts, "queue": header}


@record
class _Measured:
    """A request of a queue before it has a place: blocks of its first and last tile, and all slots that it reaches."""

    request: Request
    index: int
    rows: int
    tiles: int
    first: int
    last: int
    begin: int
    end: int
    gap: bool  # tiles leave blocks out between: pieces of equal length would not be of equal work

    @property
    def longest(self) -> int:
        """Blocks of its longest tile, as a rule."""
        return max(self.first, self.last)


def _measure(shape: TileClass, index: int, r: Request, reach: Reach) -> _Measured:
    rows = r.q_len * reach.group
    tiles = -(-rows // shape.bm)
    ends = [reach.row_span(index, r, *x).blocks(shape.bn) for x in ((0, min(rows, shape.bm)), ((tiles - 1) * shape.bm, rows))]
    gap = any(gap_blocks for *_, gap_blocks in ends)
    return _Measured(r, index, rows, tiles, ends[0][1], ends[1][1], *reach.row_slots(index, r, 0, rows), gap)


def _pieces(shape: TileClass, m: _Measured, blocks: int) -> tuple[int, int, int]:
    """Pieces of a request, the first one, and a piece's slots, where pieces are to have up to ``blocks`` blocks (0: uncut)."""
    uncut = 1, 0, INT32_MAX // shape.bn * shape.bn
    if m.begin >= m.end or not (shape.split or not m.gap and 0 < blocks < m.longest):
        return uncut
    slots = shape.split or -(-m.longest // -(-m.longest // blocks)) * shape.bn  # pieces of equal length
    first = m.begin // slots
    pieces = (m.end - 1) // slots + 1 - first
    return (pieces, first, slots) if pieces > 1 else uncut


def _piece_blocks(shape: TileClass, heads: int, workers: int, requests: Sequence[_Measured], max_slots: int) -> int:
    """Blocks of a piece of the requests that have longer tiles; 0: none is cut, as where there are many units or short ones."""
    total = sum(_cost(shape, heads, m) for m in requests)
    longest = max((m.longest for m in requests), default=0)
    average = total // (2 * workers)  # blocks of a worker
    if longest <= shape.min_piece or longest * _FEW_ROUNDS <= average:
        return 0
    work = sum((m.first + m.last) * m.tiles * heads for m in requests if m.longest > min(average, longest // 2))

    def piece(i: int) -> int:
        """Candidate: uncut; the fewest pieces no longer than the average; as many as fill half a round of workers, one, ..."""
        count = 1 if i == 0 else -(-longest // max(average, 1)) if i == 1 else max(longest * workers * (i - 1) // work, 1)
        return max(-(-longest // count), shape.min_piece)

    def time(blocks: int) -> int:
        """Half blocks until all is done; INT64_MAX if there is no room for the partial results."""
        units = spent = slots = added = 0  # twice the units that are not void, their half blocks, those that cutting adds
        for m in requests:
            pieces, _, size = _pieces(shape, m, blocks)
            mine, least = m.tiles * heads, max(min(m.first, m.last), blocks // 2)
            if pieces > 1:
                size //= shape.bn
                real = (max(-(-m.first // size), 1) + max(-(-m.last // size), 1)) * mine
                added, slots = added + real - 2 * mine, slots + pieces * mine
                units, spent = units + real, spent + (m.first + m.last) * mine + shape.unit_cost * real
            elif m.longest > blocks // 2:  # shorter ones fit beside others. Tiles grow evenly from the shortest to the longest
                long = (m.longest - least) * mine // (m.longest - min(m.first, m.last)) if m.first != m.last else mine
                units, spent = units + 2 * long, spent + (m.longest + least + 2 * shape.unit_cost) * long
        shares, last = -(-(total + shape.unit_cost * added) // workers), 2 * (blocks + shape.unit_cost)
        rounds = -(-units // (2 * workers)) * (2 * spent // max(units, 1))
        half_blocks = max(shares, last, min(rounds, shares + last))
        if not slots:
            return half_blocks - half_blocks // 4  # this is a model: cuts are for a clear gain
        merge = -(-longest // blocks)  # half a block a piece
        return half_blocks + merge if slots <= max_slots else 2**63 - 1

    blocks = piece(min(range(_CANDIDATES), key=lambda i: time(piece(i))))
    return blocks if blocks < longest else 0


def _cost(shape: TileClass, heads: int, m: _Measured) -> int:
    """Twice the blocks of a request's units, by the mean of its first and last tile, with their fixed costs."""
    return (m.first + m.last + 2 * shape.unit_cost) * m.tiles * heads


def _plan_queue(
    shape: TileClass, requests: Sequence[tuple[int, Request]], reach: Reach, workers: int, max_slots: int
) -> tuple[QueuePlan, Status]:
    """A queue of the requests, which are given with their numbers, and what is wrong with them."""
    heads, status = reach.num_kv_heads, Status()
    measured = [_measure(shape, index, r, reach) for index, r in requests]
    blocks = 0 if shape.split or not workers else _piece_blocks(shape, heads, workers, measured, max_slots)
    # Unique in each chunk; blocks are capped as they share a word with the number.
    ordered = sorted(measured, key=lambda m: (m.index // ORDERED, -min(m.longest, 2**22 - 1), m.index))
    records, units, slots = [], 0, 0
    for m in ordered:
        r, bad = m.request, m.request.kv_base < 0
        pieces, piece0, piece_slots = _pieces(shape, m, blocks)
        if pieces > 1 and slots + pieces * m.tiles * heads > max_slots:  # only where query rows overlap
            r, bad = Request(**{**vars(r), "kv_start": 0, "kv_len": 0, "kv_base": -1}), True
            status = status or Status(Wrong.OVERLAPPING_Q, m.index, r.q_len)
        section = max(1, min(heads, shape.l2_bytes // shape.row_bytes // max(m.end - m.begin, 1)))
        slot0 = slots if pieces > 1 else 0
        records.append(QueuedRequest(
            r, ~m.index if bad else m.index, m.rows, m.tiles, pieces, piece0, piece_slots, section, slot0,
            slot0 // 2 * shape.groups, min(units, INT32_MAX),
        ))  # fmt: skip
        units += pieces * m.tiles * heads
        slots = min(slots + (pieces * m.tiles * heads if pieces > 1 else 0), max_slots)
    return QueuePlan(shape, heads, workers, tuple(records), min(units, INT32_MAX), reach), status


# ---------------------------------------------------------------- the plan


def class_of(classes: Sequence[TileClass], launched: Sequence[bool], rows: int) -> int:
    """The class of a request with ``rows`` packed rows: the smallest launched one that holds them in one tile, else the
    largest launched one."""
    found = -1
    for i, on in enumerate(launched):
        if on and (found < 0 or rows > classes[found].bm):
            found = i
    return found


def plan(
    config: PlanConfig,
    batch: Lengths,
    reach: Reach,
    num_workers: Sequence[int],
    max_tiles: Sequence[int] | None = None,
    max_slots: Sequence[int] | None = None,
) -> tuple[list[ClassPlan | QueuePlan], Status]:
    """The work lists of all classes, and what is wrong with the batch.

    Args:
        num_workers: workers of each class (its kernel's grid); 0: the class is not launched.
        max_tiles: capacity of each class's tile list; None: unlimited.
        max_slots: partial results that a class of kind "queue" has room for; None: as many as ``workspace`` gives to one
            without a fixed split, else unlimited.
    """
    if len(num_workers) != len(config.classes) or not any(num_workers):
        raise ParameterError(
            f"num_workers {list(num_workers)} for {len(config.classes)} row-tile classes.\n"
            f"  required: one count a class, at least one of them above 0"
        )
    requests, status = read_requests(batch)
    launched = [n > 0 for n in num_workers]
    plans: list[ClassPlan | QueuePlan] = []
    for i, shape in enumerate(config.classes):
        mine = [
            (index, r) for index, r in enumerate(requests)
            if launched[i] and r.q_len and class_of(config.classes, launched, r.q_len * reach.group) == i
        ]  # fmt: skip
        if shape.kind == "queue":
            slots = max_slots[i] if max_slots is not None else INT32_MAX if shape.split else SLOTS_PER_WORKER * num_workers[i]
            made, over = _plan_queue(shape, mine, reach, num_workers[i], slots)
            status = status or over
            plans.append(made)
            continue
        tiles: list[WorkTile] = []
        line, limit = 0, max_tiles[i] if max_tiles is not None else INT32_MAX
        for index, r in mine:
            for tile in _tiles(shape, index, r, reach):
                if len(tiles) == limit:
                    status = status or Status(Wrong.OVERLAPPING_Q, index // 1024 * 1024)
                    break
                tiles.append(WorkTile(**{**vars(tile), "prefix": line}))
                line += _length(tiles[-1])
        plans.append(ClassPlan(shape, reach.num_kv_heads, num_workers[i], tuple(tiles)))
    return plans, status


def _tiles(shape: TileClass, index: int, r: Request, reach: Reach) -> Iterator[WorkTile]:
    rows, first, pieces = r.q_len * reach.group, 0, 1
    if shape.split:
        begin, end = reach.row_slots(index, r, 0, rows)
        first = begin // shape.split
        pieces = (end - 1) // shape.split + 1 - first if begin < end else 1
    for row0 in range(0, rows, shape.bm):
        count = min(rows - row0, shape.bm)
        reached = reach.row_span(index, r, row0, row0 + count)
        for piece in range(pieces):
            found = reached.within((first + piece) * shape.split, (first + piece + 1) * shape.split) if shape.split else reached
            block0, blocks, gap, gap_blocks = found.blocks(shape.bn)
            yield WorkTile(r, ~index if r.kv_base < 0 else index, row0, count, block0, blocks, piece, pieces, 0, gap, gap_blocks)
