"""The work list of classes of kind "queue": its Python twin against a model that goes through every row and key, the device's
planner and queue.cuh against the twin (on the host as fibers, and on a GPU), and calls through a class of that kind."""

from __future__ import annotations

import bisect
import heapq
import math
import random
import struct
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

import attngen as ag
import emulated
import on_host_block
from attngen import cuda, engine
from attngen import queued as queued_room
from attngen.bounds import analyse
from attngen.choose_cuda import PlanConfig, TileClass
from attngen.lengths import Lengths, Reach
from attngen.paths import templates_dir
from attngen.queued import ORDERED, QueuedUnit, QueuePlan
from attngen.schedule import plan
from attngen.space import workspace
from attngen.spec import Problem
from attngen.variants import Causal, Chunked, SlidingWindow, Streaming
from compare import compare
from test_schedule import KEEPS, Full, PerHead, Windowed, in_style, indptr

KEEPS = {**KEEPS, Causal: lambda q, kv, window: kv <= q}
QUEUE = TileClass(32, 16, 2, kind="queue", groups=2, row_bytes=512)


def queued(variant, q_lens, kv_lens, heads=2, group=1, workers=4, shape=QUEUE, room=None, **more) -> QueuePlan:
    """The plan of a ragged batch in one class; ``room``: for partial results."""
    batch = Lengths(len(q_lens), q_indptr=indptr(q_lens), kv_indptr=indptr(kv_lens), **more)
    reach = Reach(analyse(variant.trace.mask), variant.values, heads * group, heads)
    (made,), status = plan(PlanConfig("90a", (shape,)), batch, reach, [workers], max_slots=room and [room])
    assert not status
    return made


# ---------------------------------------------------------------- the twin against a model


def check_queue(p: QueuePlan, max_slots: int, keeps) -> None:
    """Every tile and KV head reaches each slot that its rows can attend to once; slots and counters are its own; the order is
    as queue.cuh says. ``keeps(index, q, kv)``: the mask."""
    heads, shape = p.num_kv_heads, p.shape
    assert p.units == sum(r.tiles * r.pieces * heads for r in p.records)
    parts: dict[tuple[int, int, int], list[QueuedUnit]] = defaultdict(list)
    for unit in p.walk():
        parts[unit.record.index, unit.row0, unit.kv_head].append(unit)
    assert sorted(parts) == sorted(
        (r.index, row0, head) for r in p.records for row0 in range(0, r.rows, shape.bm) for head in range(heads)
    )
    slots, counters = [], []
    for (index, row0, _), units in parts.items():
        units.sort(key=lambda u: u.begin)
        r, group = units[0].record.request, p.reach.group
        rows = range(row0, min(row0 + shape.bm, units[0].record.rows))
        assert all((u.rows, u.pieces) == (len(rows), len(units)) for u in units)
        covered = [slot for u in units for slot in range(u.begin, u.end)]
        queries = {r.q_offset + row // group for row in rows}
        kept = [kv - r.kv_start for kv in range(r.kv_start, r.kv_len) if any(keeps(index, q, kv) for q in queries)]
        assert covered == (list(range(kept[0], kept[-1] + 1)) if kept else [])
        assert len(units) == 1 or all(u.begin < u.end for u in units)
        assert all(u.begin % u.record.piece_slots == 0 for u in units[1:])
        if len(units) > 1:
            assert all(u.merge == tuple(v.slot for v in units) and u.counter == units[0].counter for u in units)
            slots += units[0].merge
            counters += range(units[0].counter, units[0].counter + shape.groups)
    assert len(set(slots)) == len(slots) and all(0 <= slot < max_slots for slot in slots)
    assert len(set(counters)) == len(counters) and all(0 <= x < max_slots // 2 * shape.groups for x in counters)

    lengths = [p.reach.row_slots(abs(r.index), r.request, row0, min(row0 + shape.bm, r.rows))  # of the first and last tile
               for r in p.records for row0 in (0, (r.tiles - 1) * shape.bm)]  # fmt: skip
    blocks = [(e - 1) // shape.bn - b // shape.bn + 1 if b < e else 0 for b, e in lengths]
    order = [(r.index // ORDERED, -max(two), r.index) for r, two in zip(p.records, zip(blocks[::2], blocks[1::2]))]
    assert order == sorted(order)
    for r in p.records:
        places = []
        for number in range(r.unit0, r.unit0 + r.tiles * r.pieces * heads):
            tile, piece, head = r.unit(number, heads)
            places.append((head // r.section_heads, -piece, -tile, head))
        assert places == sorted(set(places))
    for r in p.records:
        b, e = p.reach.row_slots(abs(r.index), r.request, 0, r.rows)
        taken = max(e - b, 1) * shape.row_bytes
        assert 1 <= r.section_heads <= heads
        assert r.section_heads == 1 or r.section_heads * taken <= shape.l2_bytes
        assert r.section_heads == heads or (r.section_heads + 1) * taken > shape.l2_bytes


@pytest.mark.parametrize("split", [0, 64])
@pytest.mark.parametrize("variant", [Full, Causal, Windowed, PerHead])
def test_random_batches(variant, split):
    rng = random.Random(f"{variant.__name__}{split}")
    cut = 0
    for _ in range(400):
        n = rng.randint(1, 5)
        q_lens = [rng.choice((1, 1, 5, rng.randint(0, 90))) for _ in range(n)]
        kv_lens = [rng.choice((0, 1, 16, 33, rng.randint(0, 150), rng.randint(0, 600))) for _ in range(n)]
        v = Windowed(window=rng.choice((1, 20, 100, 1000))) if variant is Windowed else variant()
        more = {}
        if rng.random() < 0.5:
            more["kv_starts"] = [rng.randint(0, 100) for _ in range(n)]
        if rng.random() < 0.5:
            more["q_positions"] = [rng.randint(-30, 700) for _ in range(n)]
        heads, workers, groups = rng.choice((1, 2, 3)), rng.choice((1, 3, 10, 40)), rng.choice((1, 2, 3))
        shape = TileClass(rng.choice((16, 32)), rng.choice((8, 16, 32)), rng.choice((1, 3)), split, "queue", groups,
                          rng.choice((128, 512)), rng.choice((2**12, 2**16, 2**25)), rng.choice((1, 2, 4)))  # fmt: skip
        group = rng.choice((1, 3))
        p = queued(v, q_lens, kv_lens, heads, group, workers, shape, **more)
        space = workspace(
            PlanConfig("90a", (shape,)), [workers], max_requests=n, max_q_tokens=max(sum(q_lens), 1), max_kv_len=max(*kv_lens, 1),
            num_heads=heads * group, num_kv_heads=heads, head_dim_v=64,
        )  # fmt: skip
        (part,) = space.classes
        room = {name: end - at for (name, at), end in zip(part.lists.items(), [*list(part.lists.values())[1:], space.partial_out])}
        assert all(len(data) <= room[name] for name, data in p.pack().items()) and room["counters"] >= part.max_slots // 2 * groups * 4
        if variant is PerHead:  # of all KV heads together
            keeps = lambda index, q, kv: kv <= q and q - kv < 10 * heads  # noqa: E731
        else:
            keeps = lambda index, q, kv: KEEPS[variant](q, kv, v.values.get("window"))  # noqa: E731
        check_queue(p, part.max_slots, keeps)
        cut += any(r.pieces > 1 for r in p.records)
    assert cut > 10 or (variant is PerHead and not split)  # whose windows are too short to be cut


def test_longest_first():
    p = queued(Causal(), [40, 1, 90, 3, 1], [40, 500, 300, 500, 0], workers=1)
    assert [r.index for r in p.records] == [1, 3, 2, 0, 4]
    assert [(u.row0, u.kv_head) for u in p.walk()][4:10] == [(64, 0), (64, 1), (32, 0), (32, 1), (0, 0), (0, 1)]


def test_sections_fill_the_l2_cache():
    shape = replace(QUEUE, row_bytes=512, l2_bytes=32 << 20)
    for keys, heads in ((1000, 8), (8192, 8), (8193, 7), (20_000, 3), (65_536, 1), (200_000, 1)):
        assert queued(Full(), [64], [keys], heads=8, workers=1, shape=shape).records[0].section_heads == heads
    p = queued(Full(), [64], [20_000], heads=8, workers=1, shape=shape)
    assert [u.kv_head for u in p.walk()] == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 6, 7]


def test_one_long_request_fills_the_workers_once():
    shape = TileClass(128, 128, 2, kind="queue", groups=2, row_bytes=512)
    p = queued(Causal(), [64], [65_536], heads=8, group=4, workers=132, shape=shape)
    assert (p.records[0].pieces, p.records[0].piece_slots, p.units) == (8, 64 * 128, 128)
    assert queued(Causal(), [16_384], [16_384], heads=8, group=4, workers=132, shape=shape).records[0].pieces == 1
    assert queued(Causal(), [512] * 32, [512] * 32, heads=16, workers=132, shape=shape).records[0].pieces == 1


def test_pieces_that_have_no_room_are_not_made():
    reach, batch = Reach(analyse(None), {}, 2, 2), Lengths(1, q_indptr=[0, 1], kv_len=10_000)
    def pieces(max_slots):
        (p,), _ = plan(PlanConfig("90a", (QUEUE,)), batch, reach, [100], max_slots=[max_slots])
        return p.records[0].pieces
    assert pieces(400) == pieces(50) == 25 and pieces(49) == 1


def test_a_fixed_split_leaves_the_batch_and_the_prompt_out():
    """A row's pieces depend on its own keys alone."""
    shape, rng = replace(QUEUE, split=64), random.Random(5)
    for _ in range(100):
        q_lens, kv_lens = ([rng.randint(1, most) for _ in range(4)] for most in (80, 500))
        q_lens = [min(q, kv) for q, kv in zip(q_lens, kv_lens)]
        v = Windowed(window=rng.choice((50, 300)))
        def cuts(p, index):
            return {(u.row0, u.kv_head, u.begin, u.end, u.pieces) for u in p.walk() if u.record.index == index}
        together = queued(v, q_lens, kv_lens, shape=shape)
        for i, (q, kv) in enumerate(zip(q_lens, kv_lens)):
            assert cuts(together, i) == cuts(queued(v, [q], [kv], workers=99, shape=shape), 0)
        assert all(u.begin // 64 == (u.end - 1) // 64 for u in together.walk())


def test_query_rows_that_overlap_do_not_write_outside():
    shape = replace(QUEUE, split=64)
    batch = Lengths(5, q_indptr=[0, 90, 0, 90, 0, 90], kv_lens=[600] * 5, kv_len=600, max_q_tokens=90)
    space = workspace(PlanConfig("90a", (shape,)), [4], max_requests=5, max_q_tokens=90, max_kv_len=600, num_heads=2,
                               num_kv_heads=2, head_dim_v=64)  # fmt: skip
    slots = space.classes[0].max_slots // 2
    (p,), status = plan(PlanConfig("90a", (shape,)), batch, Reach(analyse(None), {}, 2, 2), [4], max_slots=[slots])
    assert status and {r.index for r in p.records} == {0, ~2, ~4}
    assert all(u.slot < slots and (u.record.index >= 0 or u.begin == u.end) for u in p.walk())


# ---------------------------------------------------------------- whether the cuts pay


def makespan(p: QueuePlan) -> float:
    """Blocks until the last worker is done: a unit takes its blocks and its fixed cost, a merge half a block a piece."""
    workers, left, end = [0.0] * p.num_workers, defaultdict(int), 0.0
    for unit in p.walk():
        blocks = (unit.end - 1) // p.shape.bn - unit.begin // p.shape.bn + 1 if unit.begin < unit.end else 0
        done = heapq.heappop(workers) + blocks + p.shape.unit_cost
        if unit.pieces > 1:
            left[unit.counter] += 1
            done += unit.pieces / 2 if left[unit.counter] == unit.pieces else 0
        heapq.heappush(workers, done)
        end = max(end, done)
    return end


def test_cuts_pay(monkeypatch):
    """The chosen length of pieces against none and many others, on batches of few requests: near the best, and never far."""
    shape, rng, losses = TileClass(128, 128, 2, kind="queue", groups=2, row_bytes=512), random.Random(1), []
    for _ in range(40):
        n = rng.choice((1, 1, 2, 3, 6))
        q_lens = [rng.choice((20, 64, 200, 600)) for _ in range(n)]
        kv_lens = [max(q, int(2 ** rng.uniform(8, 17))) for q in q_lens]
        args = (Causal(), q_lens, kv_lens, rng.choice((1, 2, 4, 8)), rng.choice((1, 4, 8)), 132, shape)
        chosen = makespan(queued(*args))
        others = []
        with monkeypatch.context() as patched:
            for pieces in (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64, 128):
                blocks = 0 if pieces == 1 else max(max(kv_lens) // 128 // pieces, 4)
                patched.setattr(queued_room, "_piece_blocks", lambda *_: blocks)  # noqa: B023
                p = queued(*args, room=2**31 - 1)
                if sum(r.tiles * r.pieces * p.num_kv_heads for r in p.records if r.pieces > 1) <= 4 * 132:
                    others.append(makespan(p))
        assert chosen <= 1.05 * others[0], (q_lens, kv_lens)  # others[0]: uncut
        losses.append(math.log(chosen / min(others)))
    assert math.exp(sum(losses) / len(losses)) < 1.04 and max(losses) < math.log(1.35)


# ---------------------------------------------------------------- the device's planner against the twin

WORKERS = [7, 60, 132]
CONFIGS = {
    "queues": (TileClass(16, 64, 2), TileClass(64, 32, 3, kind="queue", groups=1, row_bytes=256, l2_bytes=1 << 18),
               TileClass(128, 64, 2, kind="queue", groups=2, row_bytes=512)),
    "split": (TileClass(64, 32, 3, 256, "queue", 2, 512, 1 << 19),),
    "slices": (TileClass(16, 64, 2), TileClass(64, 64, 4), TileClass(128, 64, 4)),
    "slices split": (TileClass(16, 64, 2, 256),),
}  # fmt: skip
PLANNED = {"window": SlidingWindow(), "per head": PerHead(), "sinks or window": Streaming(sinks=70), "chunked": Chunked(chunk=700)}


@lru_cache
def planner(name: str, variant: str) -> cuda.Specialised:
    problem = Problem("cuda", "90a", "bfloat16", "bfloat16", "bfloat16", 128, 128, ())
    v = PLANNED[variant]
    return cuda.specialise("plan", v.name, v.trace, problem, PlanConfig("90a", CONFIGS[name]), "90a")


@lru_cache
def on_host(name: str, variant: str) -> on_host_block.Kernel:
    return on_host_block.Kernel(planner(name, variant))


def random_lengths(rng: random.Random, trial: int) -> Lengths:
    """A batch in a random index style; every sixth has a request that is bad."""
    n = rng.choice((1, 2, 7, 33, 33, 350))
    most = rng.choice((1, 4, 60, 300))
    q_lens = [rng.choice((0, 1, 1, most, rng.randint(1, most))) for _ in range(n)]
    while sum(q_lens) > 4000:
        q_lens[q_lens.index(max(q_lens))] = 1
    longest = rng.choice((0, 300, 3000, 60_000 if n < 50 else 300))
    kv_lens = [rng.choice((0, 1, 64, 65, rng.randint(0, 300), rng.randint(0, longest))) for _ in range(n)]
    page, style = rng.choice((1, 16)), rng.randrange(4)
    batch = in_style(style, q_lens, kv_lens, page) | {"max_q_tokens": 4000, "max_q_len": most}
    if style == 3:
        batch |= {"q_len": most, "q_lens": q_lens, "q_indptr": None, "max_q_tokens": n * most}
    if rng.random() < 0.4:
        batch["kv_starts"] = [16 * rng.randint(0, 99) for _ in range(n)]
    if rng.random() < 0.4:
        batch["q_positions"] = [rng.randint(-50, 3000) for _ in range(n)]
    if trial % 6 == 5 and style != 3:
        bad = rng.randrange(n)
        if batch.get("kv_lens"):
            batch["kv_lens"][bad] = -1
        else:
            batch["q_indptr"] = [*batch["q_indptr"][: bad + 1], *(rng.choice((0, 4000)) for _ in batch["q_indptr"][bad + 1 :])]
    return Lengths(**batch)


def compare_plans(special: cuda.Specialised, launch, variant: ag.Variant, trials: int, device: str) -> None:
    """Record for record: ``launch(buffer, blocks)`` against the twin, over random batches."""
    rng, config = random.Random(3), special.config
    planned = cut = 0
    for trial in range(trials):
        batch = random_lengths(rng, trial)
        heads, group, window = rng.choice((1, 2, 5)), rng.choice((1, 4)), rng.choice((1, 500, 10**6))
        workers = [rng.choice((0, n, n, n)) for n in WORKERS[-len(config.classes) :]]
        workers[rng.randrange(len(workers))] = WORKERS[-1]
        space = workspace(
            config, workers, max_requests=batch.num_requests, max_q_tokens=batch.max_q_tokens, max_kv_len=60_000,
            num_heads=heads * group, num_kv_heads=heads, head_dim_v=16,
        )  # fmt: skip
        memory = torch.full((space.partial_out,), 0x55, dtype=torch.uint8, device=device)
        base = memory.data_ptr()
        memory[:4] = 0
        held = {n: torch.tensor(x, dtype=torch.int32, device=device) for n, x in vars(batch).items() if isinstance(x, list)}
        values = {n: x for n, x in vars(batch).items() if x is not None} | {n: x.data_ptr() for n, x in held.items()}
        params = {n: window if n == "window" else x for n, x in variant.values.items() if n in variant.trace.used()}
        values |= engine.struct_values(params) | {"num_heads": heads * group, "num_kv_heads": heads, "total_heads": heads * group}
        max_slots = []
        for i, part in enumerate(space.classes):
            max_slots.append(part.max_slots if rng.random() < 0.8 else rng.randint(0, 8))  # hardly any room
            values |= {f"{name}{i}": base + at for name, at in part.lists.items()}
            values |= {f"num_workers{i}": workers[i], f"max_tiles{i}": part.max_tiles, f"max_slots{i}": max_slots[i]}
        values["status"] = base
        buffer = bytearray(special.layout.size)
        special.layout.pack_into(buffer, 0, *(values.get(f.name, 0) for f in special.layout.fields))
        launch(buffer, len(workers))

        found_all = memory.cpu().numpy().tobytes()
        reach = Reach(analyse(variant.trace.mask), params, heads * group, heads)
        plans, status = plan(config, batch, reach, workers, [part.max_tiles for part in space.classes], max_slots)
        assert (struct.unpack("=i", found_all[:4])[0] == 0) == (not status), (trial, found_all[:4], status)
        for i, (made, part) in enumerate(zip(plans, space.classes)):
            if not workers[i]:
                continue
            for name, wanted in made.pack().items():
                found, size = found_all[part.lists[name] :][: len(wanted)], 4 if name == "unit_starts" else 16
                wrong = [j // size for j in range(0, len(wanted), size) if found[j : j + size] != wanted[j : j + size]]
                assert not wrong, (trial, i, name, len(wrong), wrong[0])
            if isinstance(made, QueuePlan):
                used = [u.counter + g for u in made.walk() if u.pieces > 1 for g in range(made.shape.groups)] if made.units < 10_000 else []
                at = part.lists["counters"]
                assert not any(any(found_all[at + 4 * c : at + 4 * c + 4]) for c in used)
                planned, cut = planned + bool(made.records), cut + any(r.pieces > 1 for r in made.records)
    assert "queue" not in {k.kind for k in config.classes} or planned > trials // 4
    assert cut > trials // 20 or not planned or variant.name != "SlidingWindow"  # whose ranges are short


@pytest.mark.parametrize("variant", PLANNED)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_planner_on_the_host_against_its_twin(name, variant):
    kernel = on_host(name, variant)
    compare_plans(planner(name, variant), kernel.launch, PLANNED[variant], 8 if "split" in name else 40, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("variant", PLANNED)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_planner_on_the_device_against_its_twin(name, variant):
    launcher = engine.Launcher(planner(name, variant), torch.cuda.current_device())

    def launch(buffer: bytearray, blocks: int) -> None:
        launcher.launch(buffer, {}, blocks, cuda.current_stream(torch.cuda.current_device()))

    compare_plans(planner(name, variant), launch, PLANNED[variant], 30 if "split" in name else 150, "cuda")  # pieces fill 0.1 GB a trial


WALK = """
#include "queue.cuh"
struct Params { const QueuedRequest* requests; const int32_t* unit_starts; int32_t* out; int32_t num_requests, units, step, num_kv_heads, begin, end; };
__global__ void walk(const Params& p) {
  for (int unit = 0; unit < p.units; unit += p.step) {
    const int32_t i = find_request(p.unit_starts, p.num_requests, unit);
    const QueuedRequest r = load_record(p.requests + i);
    const QueuedUnit u = unit_of(r, unit, p.num_kv_heads);
    const PieceSpan met = pieces_met(r, p.begin, p.end);
    const int32_t found[] = {i, u.tile, u.piece, u.kv_head, met.first, met.count, partial_slot(r, u, p.num_kv_heads),
                             arrival_counter<2>(r, u, p.num_kv_heads)};
    if (threadIdx.x == 31) for (int j = 0; j < 8; ++j) p.out[8 * (unit / p.step) + j] = found[j];
  }
}
"""


def test_the_header_walks_as_the_twin():
    cuh = {name: (templates_dir() / "cuda" / name).read_text() for name in ("queue.cuh", "work.cuh")}
    library = on_host_block.compiled({**cuh, "walk.cu": WALK}, "walk.cu", "walk(*launched)", 32)
    rng = random.Random(9)
    for n in (1, 2, 3, 31, 32, 33, 64, 200, 1025):
        q_lens = [rng.randint(1, 80) for _ in range(n)]
        kv_lens = [rng.randint(0, 2000) for _ in range(n)]
        heads, shape = rng.choice((1, 3, 4)), replace(QUEUE, l2_bytes=1 << 20, split=rng.choice((0, 256)))
        p = queued(Full(), q_lens, kv_lens, heads, workers=100 if n < 4 else 8, shape=shape)
        data = {name: torch.frombuffer(bytearray(x), dtype=torch.uint8) for name, x in p.pack().items()}
        step, (begin, end) = 1 + p.units // 300, sorted(rng.randint(0, 2000) for _ in "be")
        out = torch.zeros(-(-p.units // step), 8, dtype=torch.int32)
        addresses = (data["requests"].data_ptr(), data["unit_starts"].data_ptr(), out.data_ptr())
        assert library.run(struct.pack("=3Q6i", *addresses, n, p.units, step, heads, begin, end), 1) == 0
        for number, found in zip(range(0, p.units, step), out.tolist()):
            i = bisect.bisect_right(p.records, number, key=lambda r: r.unit0) - 1
            r = p.records[i]
            tile, piece, head = r.unit(number, heads)
            slot = r.slot0 + (tile * r.pieces + piece - r.piece0) * heads + head
            assert found == [i, tile, piece, head, *r.pieces_met(begin, end), slot, r.counter0 + (tile * heads + head) * 2]


# ---------------------------------------------------------------- through the engine


@pytest.mark.parametrize(("q_len", "kv_len"), [(70, 90), (300, 40), (65, 3000)])
def test_a_dense_call_finds_its_queue(monkeypatch, q_len, kv_len):
    variant = SlidingWindow(700)
    q, k, v = (torch.randn(3, n, h, 32).bfloat16() for n, h in ((q_len, 4), (kv_len, 2), (kv_len, 2)))
    lens = {"q_lens": [q_len, 0, 65], "kv_lens": [kv_len, 3, kv_len - 7]}
    ref, ref_lse = ag.reference(q, k, v, variant, return_lse=True, **lens)
    launches = emulated.install(monkeypatch, variant)
    out, lse = ag.attention(q, k, v, variant, return_lse=True, **lens)
    compare(out, ref)
    compare(lse, ref_lse, dtype=torch.float32)
    assert [name for name, _, _ in launches] == ["plan", "attention_sm90"]
    assert launches[1][2] == 3  # a block on each multiprocessor: what fits its shared memory


def test_the_struct_and_the_workspace_follow_the_kind():
    problem = engine.cuda_problem("90a", torch.bfloat16, 128, 64, ())
    kernels = engine.kernels_of(Causal(), problem, page_size=16)
    names = [[f.name for f in s.layout.fields] for s in kernels.classes]
    assert names[3][:5] == names[1][:5] == ["q", "k", "v", "out", "lse"]
    assert {"requests", "unit_starts", "queue", "counters"} < set(names[3]) and not {"tiles", "workers"} & set(names[3])
    assert [s.name for s in kernels.classes] == ["decode", "decode", "attention_sm90", "attention_sm90"]
    assert kernels.plan.config.classes[3] == TileClass(128, 128, 2, kind="queue", groups=2, row_bytes=384)
    more = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 128, "head_dim_v": 64, "page_size": 16, "max_pages": 100, "arch": "sm_90a"}
    sizes = [ag.workspace_bytes(Causal(), **more, max_requests=n, max_q_tokens=8192, multiprocessors=132) for n in (8, 80)]
    assert 4 * 132 * 128 * 65 * 4 < sizes[0] < sizes[1] < sizes[0] + (1 << 20)
