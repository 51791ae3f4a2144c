"""The queue of a batch: one record a request, whose units workers draw from a counter.

This is ``queue.cuh`` and ``plan_queue.cuh.jinja`` in plain Python, record for record. Only requests whose tiles are longer than the
workers' average load are cut into pieces."""

from __future__ import annotations

import bisect
import struct
from collections.abc import Iterator, Sequence

from .choose_cuda import PlanConfig, TileClass
from .lengths import Reach, Request
from .records import record
from .space import INT32_MAX, QUEUE, QUEUED_REQUEST
from .status import Status, Wrong

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
    q_last: int = 0  # of a node: the largest position of its rows

    def pack(self) -> bytes:
        """As in queue.cuh."""
        return QUEUED_REQUEST.pack(
            self.request.pack(), self.index, self.rows, self.tiles, self.pieces, self.piece0, self.piece_slots,
            self.section_heads, self.slot0, self.counter0, self.unit0, self.q_last, 0,
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


def plan_queue(
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
