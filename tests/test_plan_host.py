"""The planner of slices, compiled for this host with its threads as fibers, against its Python twin: tiles and workers, record
for record."""

from __future__ import annotations

import random

import on_host_block
import pytest
import torch
from attngen import cuda
from attngen.bounds import analyse
from attngen.choose_cuda import PlanConfig, TileClass
from attngen.lengths import Lengths, Reach, read_requests
from attngen.schedule import plan
from attngen.space import TILE, WORKER
from attngen.spec import Problem
from attngen.status import Status
from test_schedule import BAD_LENGTHS, GOOD, SinksOrWindow, indptr, random_batch

HEADS, KV_HEADS = 8, 2
CLASSES = {
    "slices": (TileClass(16, 64, 2, head_major=True), TileClass(64, 64, 4), TileClass(128, 32, 4)),
    "fixed split": (TileClass(16, 64, 2, 128, head_major=True),),
}


@pytest.fixture(scope="module", params=CLASSES)
def planner(request):
    config = PlanConfig("90a", CLASSES[request.param])
    problem = Problem("cuda", "90a", "bfloat16", "bfloat16", "bfloat16", 64, 64, ())
    special = cuda.specialise("plan", "plan", SinksOrWindow().trace, problem, config, "90a")
    return special, on_host_block.Kernel(special)


def check(planner, lengths: Lengths, window: int, workers: list[int], max_tiles: list[int], wanted_status: Status | None = None) -> None:
    special, kernel = planner
    reach = Reach(analyse(SinksOrWindow().trace.mask), {"window": window}, HEADS, KV_HEADS)
    plans, status = plan(special.config, lengths, reach, workers, max_tiles)
    held, values = [], {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "total_heads": HEADS, "param_window": window}
    for name, x in vars(lengths).items():
        if isinstance(x, list):
            held.append(torch.tensor(x, dtype=torch.int32))
            x = held[-1].data_ptr()
        values[name] = x or 0
    words = torch.zeros(2, dtype=torch.int32)
    values["status"] = words.data_ptr()
    room = []
    for i, (n, most) in enumerate(zip(workers, max_tiles)):
        counters = most * KV_HEADS if special.config.classes[i].split else n
        lists = {"tiles": TILE.size * most, "workers": WORKER.size * n, "counters": 4 * counters}
        room.append({name: torch.full((max(size, 1),), 0xAB, dtype=torch.uint8) for name, size in lists.items()})
        values |= {f"{name}{i}": memory.data_ptr() for name, memory in room[-1].items()}
        values |= {f"num_workers{i}": n, f"max_tiles{i}": most}
    buffer = bytearray(special.layout.size)
    special.layout.pack_into(buffer, 0, *(values.get(f.name, 0) for f in special.layout.fields))
    kernel.launch(buffer, len(workers))
    found = Status.of(words.tolist())
    assert bool(found) == bool(status), (found, status)
    assert wanted_status in (None, found)
    for i, n in enumerate(workers):
        if n:
            for name, wanted in plans[i].pack().items():
                found = bytes(room[i][name].tolist())[: len(wanted)]
                size = TILE.size if name == "tiles" else WORKER.size
                wrong = [j // size for j in range(0, len(wanted), size) if found[j : j + size] != wanted[j : j + size]]
                assert not wrong, (i, name, wrong)
            assert not room[i]["counters"].any()


def test_random_batches(planner):
    rng = random.Random(5)
    for _ in range(25):
        lengths, q_lens, kv_lens = random_batch(rng)
        n = len(planner[0].config.classes)
        check(planner, lengths, rng.choice((1, 50, 1000)), [rng.choice((1, 7, 40)) for _ in range(n)], [4000] * n)


@pytest.mark.parametrize("requests", [64, 350, 900])
def test_decode_and_prompts_of_many_requests(planner, requests):
    """More requests, tiles and workers than the block has threads."""
    rng = random.Random(requests)
    split = planner[0].config.classes[0].split
    for longest in (1,) if requests > 500 or split else (1, 40):  # the twin takes its time
        q_lens = [rng.randint(1, longest) for _ in range(requests)]
        lengths = Lengths(requests, indptr(q_lens), kv_lens=[rng.choice((0, 1, 64, 1000, 3000)) for _ in q_lens],
                                   block_table_stride=4000, max_q_len=40)  # fmt: skip
        n = len(planner[0].config.classes)
        check(planner, lengths, 10**6, [528] * n, [20000] * n)


def test_no_room(planner):
    n = len(planner[0].config.classes)
    lengths = Lengths(3, [0, 1, 2, 3], kv_lens=[100, 100, 100], block_table_stride=100)
    check(planner, lengths, 10**6, [7] * n, [2] * n)


@pytest.mark.parametrize(("change", "status"), BAD_LENGTHS)
def test_what_is_wrong_is_said(planner, change, status):
    """In the twin's words; a request of several tiles or classes is read by many threads, which find the same."""
    n = len(planner[0].config.classes)
    lengths = Lengths(**{**GOOD, **change})
    bad = [r for r in read_requests(lengths)[0] if r.kv_base < 0]
    if len(bad) == 1:
        check(planner, lengths, 10**6, [7] * n, [40] * n, status)
