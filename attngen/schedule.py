"""The schedule of a batch: row tiles, units of work, equal shares for the workers.

This is the planner of ``templates/cuda/plan.cu.jinja`` in plain Python, record for record, with the walk of
``work.cuh`` over its result. It serves the CPU backend and the tests; ``pack`` writes what the device would have written.

A row-tile class has ``bm`` packed rows (token * group + head in group) a tile. A unit is one tile and one KV head; its
cost is its KV blocks, at least 1, plus ``unit_cost`` where there are more units than workers. The units of a class lie on
a line, tile by tile or KV head by KV head, and worker w of n owns the cost interval [w * total / n, (w + 1) * total / n):
only its first and its last unit can be partial, so that partial results have fixed slots, 2w and 2w + 1. With a fixed
split, tiles are cut beforehand into pieces that are units of their own.

Classes of kind "queue" are planned by queued.py.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

from .choose_cuda import PlanConfig, TileClass
from .errors import ParameterError
from .lengths import Lengths, Reach, Request, read_requests
from .queued import QueuePlan, plan_queue
from .records import record
from .shared import Node, plan_nodes
from .space import INT32_MAX, SLOTS_PER_WORKER, TILE, WORKER
from .status import Status, Wrong

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


# ---------------------------------------------------------------- the plan


def class_of(classes: Sequence[TileClass], launched: Sequence[bool], rows: int) -> int:
    """The class of a request with ``rows`` packed rows: the smallest launched one that holds them in one tile, else the
    largest launched one."""
    found = -1
    for i, on in enumerate(launched):
        if on and not classes[i].mixed and (found < 0 or rows > classes[found].bm):
            found = i
    return found


def plan(
    config: PlanConfig,
    batch: Lengths,
    reach: Reach,
    num_workers: Sequence[int],
    max_tiles: Sequence[int] | None = None,
    max_slots: Sequence[int] | None = None,
    nodes: Sequence[Node] = (),
) -> tuple[list[ClassPlan | QueuePlan], Status]:
    """The work lists of all classes, and what is wrong with the batch.

    Args:
        num_workers: workers of each class (its kernel's grid); 0: the class is not launched.
        max_tiles: capacity of each class's tile list; None: unlimited.
        max_slots: partial results that a class of kind "queue" has room for; None: as many as ``workspace`` gives to one
            without a fixed split, else unlimited.
        nodes: what requests share, the work of a class that is mixed.
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
            if launched[i] and not shape.mixed and r.q_len and class_of(config.classes, launched, r.q_len * reach.group) == i
        ]  # fmt: skip
        if shape.kind == "queue":
            slots = max_slots[i] if max_slots is not None else INT32_MAX if shape.split else SLOTS_PER_WORKER * num_workers[i]
            if shape.mixed:
                plans.append(plan_nodes(shape, nodes if launched[i] else (), reach, num_workers[i], slots))
                continue
            made, over = plan_queue(shape, mine, reach, num_workers[i], slots)
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
