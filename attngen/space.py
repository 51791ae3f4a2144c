"""Where plan and run write beside the outputs: the records that planners make, the status word, the layout of the workspace."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .choose_cuda import PlanConfig, TileClass

INT32_MAX = 2**31 - 1
REQUEST = struct.Struct("=6iq")
TILE = struct.Struct("=32s10iq")
WORKER = struct.Struct("=3q6i80s")
QUEUED_REQUEST = struct.Struct("=32s12i")
QUEUE = struct.Struct("=4i")
NODE = struct.Struct("=32s4i")
assert (REQUEST.size, TILE.size, WORKER.size) == (32, 80, 128)  # as work.cuh asserts
assert (QUEUED_REQUEST.size, QUEUE.size, NODE.size) == (80, 16, 48)  # as queue.cuh and work.cuh assert

# Partial results of a worker that a queue without a fixed split has room for: it cuts tiles into fewer pieces rather than
# need more.
SLOTS_PER_WORKER = 4


ROUNDS = 3  # shared prefixes of a request, at most
MOST_SHARED_ROWS = 32  # packed rows of a request that takes part: those of the decode kernels, which join what nodes give


class ClassSpace(NamedTuple):
    """Byte offsets in the workspace of one class's lists, by the names of struct fields, and how much they hold.

    ``max_slots``: partial results that a class of kind "queue" has room for; of kind "slices", the most that it uses.
    """

    lists: Mapping[str, int]
    num_workers: int
    max_tiles: int
    max_slots: int


class SharedSpace(NamedTuple):
    """Byte offsets of what is there for shared prefixes: the lists that share.cu and the planner make, by the names of struct fields,
    and results, which another kernel reads: first ``node_rows`` packed rows of nodes in one piece, then those of pieces."""

    lists: Mapping[str, int]
    out: int
    state: int
    node_rows: int


class Workspace(NamedTuple):
    """Byte offsets of everything that plan and run write, beside the outputs. Partial results are shared by the classes,
    whose kernels run one after another."""

    classes: tuple[ClassSpace, ...]
    status: int
    partial_out: int
    partial_state: int
    num_bytes: int
    zones: tuple[tuple[int, int], ...] = ()  # offset and size of each zone map
    shared: SharedSpace | None = None


def max_tiles(shape: TileClass, max_requests: int, max_q_tokens: int, group: int, max_kv_len: int) -> int:
    """How many tiles a class can have: every request may end in a tile that is not full, and with a fixed split every
    tile is cut into ceil(max_kv_len / split) pieces."""
    tiles = max_requests + max_q_tokens * group // shape.bm
    return tiles * max(1, -(-max_kv_len // shape.split)) if shape.split else tiles


def workspace(
    config: PlanConfig,
    num_workers: Sequence[int],
    *,
    max_requests: int,
    max_q_tokens: int,
    max_kv_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim_v: int,
    zone_bytes: Sequence[int] = (),
    max_q_len: int = INT32_MAX,
) -> Workspace:
    """The layout of the workspace: a function of capacities alone. ``max_kv_len`` matters only with a fixed split; ``zone_bytes``: of
    each zone map; ``max_q_len`` matters only to shared prefixes."""
    offset = 256  # the status words have the first line to themselves

    def take(size: int) -> int:
        nonlocal offset
        start, offset = offset, offset + -(-size // 256) * 256
        return start

    def queue_lists(requests: int, slots: int, groups: int) -> dict[str, int]:
        sizes = {"requests": QUEUED_REQUEST.size * requests, "unit_starts": 4 * (requests + 1), "queue": QUEUE.size,
                 "counters": 4 * (slots // 2 * groups)}  # fmt: skip
        return {name: take(size) for name, size in sizes.items()}

    classes, rows, shared = [], 0, None
    for shape, workers in zip(config.classes, num_workers):
        if shape.mixed:
            of_request = min(max_q_len, max(1, MOST_SHARED_ROWS // (num_heads // num_kv_heads)))
            of_round = min(max_q_tokens, max_requests * of_request)
            nodes, node_rows, slots = ROUNDS * max_requests // 2, ROUNDS * of_round, SLOTS_PER_WORKER * workers
            classes.append(ClassSpace(queue_lists(nodes, slots, shape.groups), workers, nodes, slots))
            sizes = {"nodes": NODE.size * nodes, "num_nodes": 4, "shared_tokens": 4 * max_requests, "shared_rows": 16 * ROUNDS * max_requests,
                     "members": 8 * node_rows, "node_parts": 8 * nodes}  # fmt: skip
            lists, node_rows = {name: take(size) for name, size in sizes.items()}, node_rows * num_heads
            rows_of_all = node_rows + slots * shape.bm
            shared = SharedSpace(lists, take(4 * rows_of_all * head_dim_v), take(8 * rows_of_all), node_rows)
            continue
        tiles = max_tiles(shape, max_requests, max_q_tokens, num_heads // num_kv_heads, max_kv_len) if workers else 0
        if shape.kind == "queue":
            slots = tiles * num_kv_heads if shape.split else SLOTS_PER_WORKER * workers
            lists = queue_lists(max_requests if workers else 0, slots, shape.groups)
        else:
            slots = tiles * num_kv_heads if shape.split else 2 * workers
            counters = tiles * num_kv_heads if shape.split else workers
            sizes = {"workers": WORKER.size * workers, "tiles": TILE.size * tiles, "counters": 4 * counters}
            lists = {name: take(size) for name, size in sizes.items()}
        rows = max(rows, slots * shape.bm)
        classes.append(ClassSpace(lists, workers, tiles, slots))
    partial_out, partial_state = take(4 * rows * head_dim_v), take(8 * rows)
    zones = tuple((take(size), size) for size in zone_bytes)
    return Workspace(tuple(classes), 0, partial_out, partial_state, offset, zones, shared)
