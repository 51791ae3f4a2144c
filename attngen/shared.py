"""Shared prefixes: requests whose page tables begin with the same pages, and what attends to those pages once for all of them.

This is ``share.cu.jinja`` in plain Python, record for record. A *node* is a range of pages that the tables of several requests have in
common: their rows become the rows of one piece of work against its keys (a cascade, after Hydragen, Juravsky et al. 2024, and
FlashInfer's cascade attention), and each request goes on with the keys behind its last node. Nodes are found in rounds: in each,
requests that agree so far and in their next page are compared with the first of them, page by page, and the range that saves most
becomes a node. So a tree of prefixes, as a radix cache makes it, becomes nodes of nodes, up to one a round for each request. Page
numbers alone decide: pages that are shared further back, or listed twice, are of no consequence.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import field

from .choose_cuda import MERGE_KEYS, MOST_REQUESTS, NODE_KEYS, TileClass
from .lengths import Reach, Request, Slots
from .queued import QueuedRequest, QueuePlan, plan_queue
from .records import record
from .space import INT32_MAX, NODE, ROUNDS

MOST_PAGES = 2**22 - 1  # of a request that are looked at


@record
class Node:
    """Keys that several requests share. Its rows: those of its members' query tokens, one request after another.

    ``request``: these keys, and as query tokens the node's rows of ``Shared.members``; q_offset is their least position, q_last the
    largest. ``leader``: the request whose page table is read.
    """

    request: Request
    q_last: int
    leader: int

    def pack(self) -> bytes:
        """As in work.cuh."""
        return NODE.pack(self.request.pack(), self.q_last, self.leader, 0, 0)


@record
class Shared:
    """What the requests of a batch share.

    Attributes:
        nodes: of all rounds.
        tokens: keys of each request, from its first, that are in nodes.
        parts: of each request and round its node, the node's first row, and among its rows that of the request's first query
            token; (-1, 0, 0) where there is none.
        members: query token and position of each node row.
    """

    nodes: tuple[Node, ...] = ()
    tokens: tuple[int, ...] = ()
    parts: tuple[tuple[tuple[int, int, int], ...], ...] = ()
    members: tuple[tuple[int, int], ...] = ()

    def pack(self) -> dict[str, bytes]:
        """The lists as the device writes them, by the names of struct fields."""
        return {
            "nodes": b"".join(node.pack() for node in self.nodes),
            "num_nodes": struct.pack("=i", len(self.nodes)),
            "shared_tokens": struct.pack(f"={len(self.tokens)}i", *self.tokens),
            "shared_rows": b"".join(struct.pack("=4i", *part, 0) for parts in self.parts for part in parts),
            "members": b"".join(struct.pack("=2i", *member) for member in self.members),
        }


def find_shared(
    requests: Sequence[Request],
    pages: Sequence[int],
    page_size: int,
    group: int,
    most_rows: int,
    groups: Sequence[int] | None = None,
    least_gain: int = 0,
    max_q_tokens: int = INT32_MAX,
    window: int = INT32_MAX,
) -> Shared:
    """What requests share.

    Args:
        pages: the page table, which a request enters at kv_base.
        most_rows: packed rows of a request that may take part; one with more fills tiles by itself, and gains nothing.
        groups: the number of each request's group, negative for none: then only requests of one group share, whatever it saves.
        least_gain: keys of one KV head that all nodes together must save; fewer are not worth a second pass.
        window: keys that a row reaches at most, up to its own: those before save nothing.
        max_q_tokens: what there is room for; where requests that may take part have more (a q_indptr that decreases), none does.
    """
    n = len(requests)
    start, full, home = [0] * n, [0] * n, [0] * n  # pages that are in nodes, whole pages, which requests agree so far
    for i, r in enumerate(requests):
        if r.kv_base >= 0 and 0 < r.q_len * group <= most_rows and n <= MOST_REQUESTS and (groups is None or groups[i] >= 0):
            full[i] = min(r.num_keys // page_size, MOST_PAGES)
    rows = sum(r.q_len for r, count in zip(requests, full) if count)
    found: list[tuple[int, int, int, list[int]]] = []  # of each node: round, pages from and to, members; the first leads
    total = 0
    for number in range(ROUNDS):
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, r in enumerate(requests):
            if start[i] < full[i]:
                given = number == 0 and groups is not None
                alike[(-1, groups[i]) if given else (home[i], pages[r.kv_base + start[i]])].append(i)
        for leader, *others in sorted(alike.values()):
            begin = start[leader]
            common = {i: _in_common(requests, pages, leader, i, begin, min(full[i], full[leader])) for i in others}
            reached = min(_first_page(requests[i], window, page_size) for i in (leader, *others))
            counted = begin if groups is not None else max(begin, reached)
            gain, end = max(((_gain(common, x, counted, page_size, groups is not None), x) for x in common.values() if x > begin), default=(0, 0))
            if gain <= 0:
                for i in (leader, *others):
                    full[i] = start[i]
                continue
            members = [leader, *(i for i, x in common.items() if x >= end)]
            found.append((number, begin, end, members))
            total += gain
            for i in members:
                start[i], home[i] = end, 1 + number * MOST_REQUESTS + leader
    if rows > max_q_tokens or groups is None and total < least_gain:
        found, start = [], [0] * n

    nodes: list[Node] = []
    tokens: list[tuple[int, int]] = []
    parts = [[(-1, 0, 0)] * ROUNDS for _ in range(n)]
    for number, begin, end, members in found:
        first, r = len(tokens), requests[members[0]]
        for i in members:
            parts[i][number] = len(nodes), first, len(tokens) - first
            tokens += [(requests[i].q_start + t, min(requests[i].q_offset + t, INT32_MAX)) for t in range(requests[i].q_len)]
        positions = [position for _, position in tokens[first:]]
        keys = Request(
            first, len(tokens) - first, r.kv_start + end * page_size, r.kv_start + begin * page_size, min(positions), 0, r.kv_base + begin
        )
        nodes.append(Node(keys, max(positions), members[0]))
    return Shared(tuple(nodes), tuple(x * page_size for x in start), tuple(map(tuple, parts)), tuple(tokens))


def _first_page(r: Request, window: int, page_size: int) -> int:
    """The first page that a request's first row reaches."""
    return min(max(r.q_offset + 1 - window - r.kv_start, 0) // page_size, MOST_PAGES)


def _in_common(requests: Sequence[Request], pages: Sequence[int], leader: int, other: int, begin: int, end: int) -> int:
    """The pages from the first that two requests have in common, who agree in those before ``begin``; at most ``end``."""
    a, b = requests[leader], requests[other]
    if a.kv_start != b.kv_start:  # equal pages stand for other positions
        return begin
    return next((j for j in range(begin, end) if pages[a.kv_base + j] != pages[b.kv_base + j]), end)


def _gain(common: dict[int, int], end: int, begin: int, page_size: int, forced: bool) -> int:
    """Keys of one KV head that a node of the pages [begin, end) saves, less what it costs."""
    members = 1 + sum(x >= end for x in common.values())
    saved = (members - 1) * (end - begin) * page_size
    return saved if forced else saved - members * MERGE_KEYS - NODE_KEYS


@record
class NodeReach(Reach):
    """The keys that rows of nodes reach: any of a node's rows stands for all. Made by ``node_reach``."""

    last: dict[int, int] = field(default_factory=dict)  # a node's largest position, by its first row

    def row_span(self, index: int, r: Request, row0: int, row1: int) -> Slots:
        last = self.last[r.q_start]
        return self.span(index, Request(**{**vars(r), "q_len": min(last - r.q_offset + 1, INT32_MAX)}), r.q_offset, last)  # spans positions


def node_reach(reach: Reach, nodes: Sequence[Node]) -> NodeReach:
    """The reach of a variant for the rows of nodes."""
    return NodeReach(**vars(reach), last={node.request.q_start: node.q_last for node in nodes})


def plan_nodes(shape: TileClass, nodes: Sequence[Node], reach: Reach, workers: int, max_slots: int) -> QueuePlan:
    """The queue of a class that is mixed: its requests are nodes."""
    within = node_reach(reach, nodes)
    made, _ = plan_queue(shape, [(i, node.request) for i, node in enumerate(nodes)], within, workers, max_slots)
    records = (QueuedRequest(**{**vars(r), "index": nodes[r.index].leader, "q_last": nodes[r.index].q_last}) for r in made.records)
    return QueuePlan(made.shape, made.num_kv_heads, made.num_workers, tuple(records), made.units, within)
