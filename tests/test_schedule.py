"""The planner's Python twin against a model that counts every cell of the line of cost."""

from __future__ import annotations

import dataclasses
import random
import re
from typing import Any

import pytest
import torch

import attngen as ag
from attngen.bounds import analyse
from attngen.choose_cuda import PlanConfig, TileClass
from attngen.errors import ParameterError
from attngen.lengths import Lengths, Reach, all_good, read_requests
from attngen.paths import templates_dir
from attngen.schedule import ClassPlan, plan
from attngen.space import workspace
from attngen.status import Status, Wrong


class Full(ag.Variant):
    pass


class Windowed(ag.Variant):
    window: ag.Scalar[int] = 50

    def mask(self, at):
        return (at.kv <= at.q) & (at.q - at.kv < self.window)


class SinksOrWindow(ag.Variant):
    window: ag.Scalar[int] = 50

    def mask(self, at):
        return (at.kv <= at.q) & ((at.q - at.kv < self.window) | (at.kv < 20))


class Chunked(ag.Variant):
    window: ag.Scalar[int] = 50

    def mask(self, at):
        return (at.kv <= at.q) & (at.kv // self.window == at.q // self.window)


class PerHead(ag.Variant):
    """KV heads see windows of 10, 20, 30 ..."""

    def mask(self, at):
        return (at.kv <= at.q) & (at.q - at.kv < 10 * (at.kv_head + 1))


KEEPS = {
    Full: lambda q, kv, window: True,
    Windowed: lambda q, kv, window: kv <= q and q - kv < window,
    SinksOrWindow: lambda q, kv, window: kv <= q and (q - kv < window or kv < 20),
    Chunked: lambda q, kv, window: kv <= q and kv // window == q // window,
}


def indptr(lens):
    total = [0]
    for n in lens:
        total.append(total[-1] + n)
    return total


def in_style(style: int, q_lens: list[int], kv_lens: list[int], page: int) -> dict[str, Any]:
    """The fields of Lengths that tell of these lengths: pages as FlashInfer or vLLM count them, ragged, or dense."""
    pages, batch = [-(-x // page) for x in kv_lens], {"num_requests": len(q_lens), "q_indptr": indptr(q_lens)}
    if style == 0:
        last = [x - (p - 1) * page if p else 0 for x, p in zip(kv_lens, pages)]
        return batch | {"kv_indptr": indptr(pages), "kv_last_page_len": last, "page_size": page}
    if style == 1:
        return batch | {"kv_lens": kv_lens, "block_table_stride": max(pages) + 1, "page_size": page}
    return batch | ({"kv_indptr": indptr(kv_lens)} if style == 2 else {"kv_lens": kv_lens, "kv_len": max(kv_lens)})


def random_batch(rng: random.Random) -> tuple[Lengths, list[int], list[int]]:
    """A batch in a random index style; its query and key lengths."""
    n = rng.randint(1, 7)
    q_lens = [rng.choice((0, 1, 1, 1, 2, 5, rng.randint(0, 70))) for _ in range(n)]
    kv_lens = [rng.choice((0, 1, 16, 63, 64, 65, rng.randint(0, 400))) for _ in range(n)]
    style, page = rng.randrange(4), rng.choice((1, 5, 16))
    return Lengths(**in_style(style, q_lens, kv_lens, page)), q_lens, kv_lens


def check_line(p: ClassPlan) -> None:
    """Every block of every unit is computed once; pieces, slots and merges fit together; shares are equal."""
    heads = p.num_kv_heads
    cost = p.shape.unit_cost if len(p.tiles) * heads > p.num_workers else 0
    assert cost == p.unit_cost
    units = [(i, h) for i in range(len(p.tiles)) for h in range(heads)]
    units.sort(key=lambda unit: unit[::-1] if p.shape.head_major else unit)
    cells = [(i, h, b) for i, h in units for b in range(-cost, max(p.tiles[i].blocks, 1))]
    assert p.total == len(cells)
    workers = p.active_workers
    owner = [w for w in range(workers) for _ in range(*p.share(w))]
    assert len(owner) == len(cells)
    loads = [owner.count(w) for w in range(workers)]
    assert not loads or max(loads) - min(loads) <= 1

    wanted: dict[tuple[int, int], dict[int, list[int]]] = {}  # unit -> worker -> blocks, from the cells alone
    for (i, h, b), w in zip(cells, owner):
        tile = p.tiles[i]
        unit = wanted.setdefault((i, h), {})
        if b == -cost and (p.shape.split or tile.blocks == 0):
            unit[w] = list(range(tile.blocks))
        elif not p.shape.split and 0 <= b < tile.blocks:
            unit.setdefault(w, []).append(b)

    slots: set[int] = set()
    counters: dict[int, tuple[int, int]] = {}
    found: dict[tuple[int, int], dict[int, list[int]]] = {}
    for w in range(p.num_workers):
        for unit in p.walk(w):
            key = (p.tiles.index(unit.tile), unit.kv_head)
            assert w not in found.setdefault(key, {})
            found[key][w] = list(range(unit.begin, unit.end))
            if unit.pieces > 1:
                assert unit.slot in unit.merge and len(unit.merge) == unit.pieces
                assert unit.slot not in slots
                slots.add(unit.slot)
                whole = (key[0] - unit.tile.piece, unit.kv_head) if p.shape.split else key
                assert counters.setdefault(unit.counter, whole) == whole
                order = unit.tile.piece if p.shape.split else sorted(wanted[key]).index(w)
                assert unit.merge[order] == unit.slot
    assert found == wanted
    for unit, by_worker in found.items():
        if not p.shape.split:
            assert len({u.pieces for w in by_worker for u in p.walk(w) if (p.tiles.index(u.tile), u.kv_head) == unit}) == 1
            pieces = next(u.pieces for w in by_worker for u in p.walk(w) if (p.tiles.index(u.tile), u.kv_head) == unit)
            assert pieces == len(by_worker)


@pytest.mark.parametrize("split", [0, 128])
@pytest.mark.parametrize("variant", KEEPS)
def test_random_batches(variant, split):
    rng = random.Random(7 + split)
    for _ in range(600):
        batch, q_lens, kv_lens = random_batch(rng)
        heads, group, window = rng.choice((1, 2, 3)), rng.choice((1, 3, 4)), rng.choice((1, 17, 50, 1000))
        v = variant(window=window) if variant is not Full else variant()
        shapes = ((16, rng.choice((32, 64))), (64, 64), (128, 64))[: rng.randint(1, 3)]
        config = PlanConfig("90a", tuple(TileClass(bm, bn, rng.choice((1, 2, 3)), split, head_major=rng.random() < 0.5) for bm, bn in shapes))
        workers = [rng.choice((1, 2, 7, 33)) for _ in shapes]
        if len(workers) > 1 and rng.random() < 0.3:
            workers[rng.randrange(len(workers))] = 0
        reach = Reach(analyse(v.trace.mask), v.values, heads * group, heads)
        plans, status = plan(config, batch, reach, workers)
        assert not status
        for i, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens)):
            mine = [(k, p, t) for k, p in enumerate(plans) for t in p.tiles if t.index == i]
            rows = q_len * group
            assert len({k for k, _, _ in mine}) == (1 if rows else 0)
            for k, p, _ in mine:
                launched = [j for j, n in enumerate(workers) if n]
                holds = [j for j in launched if rows <= config.classes[j].bm]
                assert k == (holds[0] if holds else launched[-1])
            covered = {row: set() for row in range(rows)}
            for _, p, t in mine:
                keys = [t.block(i) * p.shape.bn + j for i in range(t.blocks) for j in range(p.shape.bn)]
                for row in range(t.row0, t.row0 + t.rows):
                    assert not covered[row] & set(keys)  # pieces do not overlap
                    covered[row] |= set(keys)
            for row, keys in covered.items():
                q = kv_len - q_len + row // group
                kept = {kv for kv in range(kv_len) if KEEPS[variant](q, kv, window)}
                assert kept <= keys, "a key that the mask keeps is not reached"
        for p in plans:
            check_line(p)
            assert len(p.pack_tiles()) == 80 * len(p.tiles) and len(p.pack_workers()) == 128 * p.num_workers


def test_reach_is_tight():
    v = Windowed(window=64)
    batch = Lengths(1, q_indptr=[0, 1], kv_indptr=[0, 10_000])
    (p,), _ = plan(PlanConfig("90a", (TileClass(16, 64, 2),)), batch, Reach(analyse(v.trace.mask), v.values, 4, 1), [8])
    (tile,) = p.tiles
    assert (tile.block0, tile.blocks) == (9936 // 64, 2)  # keys 9936 ... 9999


def test_reach_joins_kv_heads():
    v = PerHead()
    batch = Lengths(1, q_indptr=[0, 1], kv_indptr=[0, 1000])
    (p,), _ = plan(PlanConfig("90a", (TileClass(16, 16, 2),)), batch, Reach(analyse(v.trace.mask), v.values, 4, 4), [3])
    assert p.tiles[0].block0 == (1000 - 40) // 16


def test_dropped_keys_count_from_their_position():
    v = Windowed(window=100)
    batch = Lengths(1, kv_lens=[300], block_table_stride=64, page_size=16, kv_starts=[5000])
    (p,), status = plan(PlanConfig("90a", (TileClass(16, 64, 2),)), batch, Reach(analyse(v.trace.mask), v.values, 4, 1), [4])
    request = p.tiles[0].request
    assert not status and (request.kv_len, request.q_offset, request.num_keys) == (5300, 5299, 300)
    assert (p.tiles[0].block0, p.tiles[0].blocks) == (200 // 64, 2)  # slots 200 ... 299


GOOD = {
    "num_requests": 3, "q_indptr": [0, 1, 2, 9], "kv_indptr": [0, 3, 5, 9], "kv_last_page_len": [1, 16, 8],
    "page_size": 16, "kv_capacity": 20, "max_q_tokens": 16,
}  # fmt: skip
TABLE = {"kv_indptr": None, "kv_last_page_len": None, "kv_lens": [33, 32, 64], "block_table_stride": 4, "kv_capacity": 64}
BAD_LENGTHS = [
    ({"q_indptr": [-1, 1, 2, 9]}, Status(Wrong.NEGATIVE_Q, 0, -1)),
    ({"q_indptr": [0, 4, 2, 9]}, Status(Wrong.DECREASING_Q, 1, 2)),
    ({"q_indptr": [0, 1, 2, 90]}, Status(Wrong.LONG_BATCH, 2, 90)),
    ({"max_q_len": 3}, Status(Wrong.LONG_QUERY, 2, 7)),
    ({"kv_indptr": [-2, 3, 5, 9]}, Status(Wrong.NEGATIVE_KV, 0, -2)),
    ({"kv_indptr": [0, 5, 3, 9]}, Status(Wrong.DECREASING_KV, 1, 3)),
    ({"kv_last_page_len": [1, 17, 1]}, Status(Wrong.LAST_PAGE_LEN, 1, 17)),
    ({"kv_last_page_len": [0, 17, 1]}, Status(Wrong.LAST_PAGE_LEN, 0, 0)),
    ({"kv_indptr": [0, 3, 5, 99]}, Status(Wrong.PAST_TABLE, 2, 99)),
    ({"kv_starts": [0, -4, 0]}, Status(Wrong.KV_START, 1, -4)),
    ({"kv_starts": [0, 0, 2**31 - 3]}, Status(Wrong.KV_START, 2, 2**31 - 3)),
    ({"max_kv_len": 40}, Status(Wrong.LONG_KEYS, 2, 56)),
    (TABLE | {"kv_lens": [33, -1, 65]}, Status(Wrong.NEGATIVE_KV_LEN, 1, -1)),
    (TABLE | {"kv_lens": [33, 32, 65]}, Status(Wrong.PAST_TABLE, 2, 65)),
]


@pytest.mark.parametrize(("change", "status"), BAD_LENGTHS)
def test_bad_input_is_reported_and_stays_inside(change, status):
    config = PlanConfig("90a", (TileClass(16, 64, 2),))
    for good in (GOOD, GOOD | TABLE):
        assert not plan(config, Lengths(**good), Reach(analyse(None)), [4])[1]
    (p,), found = plan(config, Lengths(**{**GOOD, **change}), Reach(analyse(None)), [4])
    assert found == status and Status.of(found.words) == found
    with pytest.raises(ParameterError, match=rf"request {status.index}: .*{status.found}.*required"):
        found.raise_for_batch(max_q_tokens=16, max_q_len=3, page_size=16, max_kv_len=40, room="a table", end="pages end")
    for tile in p.tiles:
        assert 0 <= tile.request.q_start and tile.request.q_start + tile.request.q_len <= 16
        if tile.index < 0:
            assert tile.blocks == 0


def test_lengths_checked_all_at_once():
    """As good as one by one."""
    rng = random.Random(8)
    seen = {True: 0, False: 0}
    for _ in range(3000):
        lengths = {**vars(random_batch(rng)[0])}
        if rng.random() < 0.8:
            limits = [n for n in ("max_q_tokens", "max_q_len", "max_kv_len", "kv_capacity") if rng.random() < 0.3]
            lengths |= {n: rng.randint(1, 300) for n in limits}
            name = rng.choice([n for n, x in lengths.items() if isinstance(x, list)])
            lengths[name] = [x + rng.choice((0, 0, -1, 40, -x)) for x in lengths[name]]
        tensors = {n: torch.tensor(x) if isinstance(x, list) else x for n, x in lengths.items()}
        found = all_good(Lengths(**tensors))
        assert found == (not read_requests(Lengths(**lengths))[1]), lengths
        seen[found] += 1
    assert min(seen.values()) > 300, seen


def test_words_are_those_of_the_kernels():
    enum = (templates_dir() / "cuda" / "work.cuh").read_text().split("enum Wrong : int32_t {")[1].split("}")[0]
    assert {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", enum)} == {w.name: w.value for w in Wrong}


def test_full_tile_list_reports():
    config = PlanConfig("90a", (TileClass(16, 64, 2),))
    batch = Lengths(5, kv_indptr=[0, 9, 18, 27, 36, 45])
    (p,), status = plan(config, batch, Reach(analyse(None)), [4], max_tiles=[3])
    assert status.what == Wrong.OVERLAPPING_Q and len(p.tiles) == 3
    check_line(p)


def test_workspace_holds_every_plan():
    rng = random.Random(3)
    for _ in range(200):
        batch, q_lens, kv_lens = random_batch(rng)
        split, heads, group = rng.choice((0, 64, 128)), 2, rng.choice((1, 4))
        config = PlanConfig("90a", (TileClass(16, 64, 2, split), TileClass(64, 64, 2, split)))
        v = Windowed(window=30)
        plans, _ = plan(config, batch, Reach(analyse(v.trace.mask), v.values, heads * group, heads), [9, 4])
        space = workspace(
            config, [9, 4], max_requests=len(q_lens), max_q_tokens=sum(q_lens), max_kv_len=max(kv_lens),
            num_heads=heads * group, num_kv_heads=heads, head_dim_v=64,
        )  # fmt: skip
        ends = [space.num_bytes]
        for p, s in zip(plans, space.classes):
            assert len(p.tiles) <= s.max_tiles
            used = [u.slot for w in range(p.num_workers) for u in p.walk(w) if u.pieces > 1]
            assert all((slot + 1) * p.shape.bm * 64 * 4 <= space.partial_state - space.partial_out for slot in used)
            ends += s.lists.values()
        assert all(offset % 256 == 0 for offset in ends) and max(ends) == space.num_bytes


def test_records_match_the_header():
    tile = plan(PlanConfig("90a", (TileClass(16, 64, 2),)), Lengths(1, kv_len=100), Reach(analyse(None)), [1])[0][0].tiles[0]
    other = dataclasses.replace(tile, prefix=7)
    assert tile.pack()[:72] == other.pack()[:72] and other.pack()[72:] == (7).to_bytes(8, "little")
