"""Shared prefixes: what the Python twin finds against the page tables, the device's search against the twin (on this host and on a
GPU), what BatchAttention takes, and attention with and without sharing."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

import attngen as ag
import on_host_share
import pytest
import shared_on_host
import torch
from attngen.bounds import analyse
from attngen.choose_cuda import PlanConfig, TileClass
from attngen.lengths import Lengths, Reach, read_requests
from attngen.queued import QueuePlan
from attngen.schedule import plan
from attngen.shared import Shared, find_shared
from attngen.space import INT32_MAX, ROUNDS
from attngen.variants import (
    ALiBi, Causal, Document, Gemma2, Llama3RoPE, PrefixLM, Sigmoid, Sinks, SlidingWindow, SoftCap, Streaming, StreamingLLM,
)  # fmt: skip
from compare import compare

GROUP, MOST_ROWS = 4, 32


class Tables:
    """Page tables of random trees of prefixes, their lengths, and queries."""

    def __init__(self, rng: random.Random, requests: int, page_size: int = 16, decode: bool = False, starts: bool = False) -> None:
        self.page_size, self.pages = page_size, 0
        roots = [self.fresh(rng.choice((0, 3, 40, 90))) for _ in range(2)]
        branches = [r + self.fresh(rng.choice((0, 5, 60))) for r in roots for _ in range(3)]
        leaves = [b + self.fresh(rng.choice((0, 7, 30))) for b in branches for _ in range(2)]
        self.tables = []
        for _ in range(requests):
            begin = rng.choice([*roots, *branches, *leaves, []])
            begin = begin[: rng.randint(0, len(begin))] if rng.random() < 0.2 else begin
            own = self.fresh(rng.randint(0 if begin else 1, 6))
            table = begin + own
            if rng.random() < 0.1 and len(table) > 2:  # a page twice, one of others in the middle, one of others at the end
                table[rng.randrange(len(table))] = rng.randrange(max(self.pages, 1))
            self.tables.append(table)
        names = list(range(self.pages))
        rng.shuffle(names)
        self.tables = [[names[x] for x in t] for t in self.tables]
        self.flat = [x for t in self.tables for x in t]
        self.last = [rng.choice((page_size, rng.randint(1, page_size))) for _ in self.tables]
        self.q_lens = [1 if decode else rng.choice((1, 1, 1, 2, 4, 8, 9, 0)) for _ in self.tables]
        self.q_indptr, self.kv_indptr = ends(self.q_lens), ends([len(t) for t in self.tables])
        self.starts = [rng.choice((0, 0, 0, 2 * page_size)) for _ in self.tables] if starts else None

    def fresh(self, count: int) -> list[int]:
        self.pages += count
        return list(range(self.pages - count, self.pages))

    @property
    def lengths(self) -> dict[str, Any]:
        return dict(
            num_requests=len(self.tables), q_indptr=self.q_indptr, kv_indptr=self.kv_indptr, kv_last_page_len=self.last,
            kv_starts=self.starts, page_size=self.page_size,
        )  # fmt: skip

    def find(self, most_rows: int = MOST_ROWS, **more: Any) -> Shared:
        return find_shared(read_requests(Lengths(**self.lengths))[0], self.flat, self.page_size, GROUP, most_rows, **more)


def ends(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def groups_of(rng: random.Random, tables: Tables) -> list[int]:
    return [rng.randint(-1, 3) for _ in tables.tables]


# ---------------------------------------------------------------- the twin against the page tables


@pytest.mark.parametrize("seed", range(60))
def test_nodes_are_pages_that_their_members_have_in_common(seed):
    rng = random.Random(seed)
    tables = Tables(rng, rng.randint(1, 50), rng.choice((1, 16)), starts=seed % 4 == 0)
    groups = groups_of(rng, tables) if seed % 3 == 0 else None
    found = tables.find(groups=groups)
    requests, _ = read_requests(Lengths(**tables.lengths))
    covered: list[list[int]] = [[] for _ in requests]
    seen: list[int] = []
    for number, node in enumerate(found.nodes):
        keys = node.request
        rows = range(keys.q_start, keys.q_start + keys.q_len)
        seen += rows
        members = [i for i, parts in enumerate(found.parts) if number in [part[0] for part in parts]]
        assert len(members) > 1 and node.leader == members[0]
        assert len(rows) == sum(requests[i].q_len for i in members)
        positions = []
        for i in members:
            r = requests[i]
            (_, row0, token) = next(part for part in found.parts[i] if part[0] == number)
            assert row0 == keys.q_start and r.kv_start == requests[node.leader].kv_start
            mine = [(r.q_start + t, r.q_offset + t) for t in range(r.q_len)]
            assert list(found.members[row0 + token : row0 + token + r.q_len]) == mine
            positions += [position for _, position in mine]
            pages = range((keys.kv_start - r.kv_start) // tables.page_size, (keys.kv_len - r.kv_start) // tables.page_size)
            assert [tables.tables[i][x] for x in pages] == tables.flat[keys.kv_base : keys.kv_base + len(pages)]
            assert keys.kv_len <= r.kv_len and r.q_len * GROUP <= MOST_ROWS and (groups is None or groups[i] >= 0)
            covered[i] += range(keys.kv_start, keys.kv_len)
        assert (min(positions), max(positions)) == (keys.q_offset, node.q_last)
    assert seen == list(range(len(found.members)))
    for r, keys, tokens in zip(requests, covered, found.tokens):
        assert sorted(keys) == list(range(r.kv_start, r.kv_start + tokens))  # each once, from the first on
    if groups is not None:
        for node in (n for n in found.nodes if n.request.kv_start == requests[n.leader].kv_start):
            number = found.nodes.index(node)
            assert len({groups[i] for i, parts in enumerate(found.parts) if parts[0][0] == number}) <= 1


def test_a_tree_is_found_as_it_was_made():
    system, prompts = list(range(100)), [list(range(1000 + 100 * i, 1050 + 100 * i)) for i in range(4)]
    tables = Tables(random.Random(0), 0)
    tables.tables = [system + prompts[i % 4] + [5000 + i] for i in range(32)]
    tables.flat, tables.last, tables.q_lens = [x for t in tables.tables for x in t], [3] * 32, [1] * 32
    tables.q_indptr, tables.kv_indptr = ends(tables.q_lens), ends([151] * 32)
    found = tables.find()
    assert [(n.request.kv_start, n.request.kv_len, n.request.q_len) for n in found.nodes] == [(0, 1600, 32)] + [(1600, 2400, 8)] * 4
    assert found.tokens == (2400,) * 32
    assert not tables.find(least_gain=10**9).nodes  # too little to be worth it


def test_what_saves_nothing_is_left_alone():
    tables = Tables(random.Random(0), 0)
    tables.tables = [[7, 100 + i] for i in range(16)]  # a page in common
    tables.flat, tables.last, tables.q_lens = [x for t in tables.tables for x in t], [16] * 16, [1] * 16
    tables.q_indptr, tables.kv_indptr = ends(tables.q_lens), ends([2] * 16)
    assert not tables.find().nodes
    assert [n.request.kv_len for n in tables.find(groups=[0] * 16).nodes] == [16]  # asked for


# ---------------------------------------------------------------- the device's search against the twin


@lru_cache(maxsize=1)
def on_host() -> on_host_share.Kernel:
    return on_host_share.Kernel()


def check_kernel(tables: Tables, groups: list[int] | None = None, least_gain: int = 0, max_q_tokens: int = 4096,
                 window: int = INT32_MAX) -> tuple[Shared, torch.Tensor]:  # fmt: skip
    """That the kernel writes what the twin finds, and nothing else: returns that, and the status words."""
    kernel = on_host()
    wanted = tables.find(groups=groups, least_gain=least_gain, max_q_tokens=max_q_tokens, window=window)
    held = {name: torch.tensor(x, dtype=torch.int32) for name, x in tables.lengths.items() if isinstance(x, list)}
    held |= {"page_table": torch.tensor(tables.flat or [0], dtype=torch.int32)}
    if groups is not None:
        held["groups"] = torch.tensor(groups, dtype=torch.int32)
    lists = {name: torch.full((len(data) + 4096,), 0xAB, dtype=torch.uint8) for name, data in wanted.pack().items()}
    status = torch.zeros(2, dtype=torch.int32)
    values = {name: x.data_ptr() for name, x in {**held, **lists, "status": status}.items()}
    values |= {"page_size": tables.page_size, "num_requests": len(tables.tables), "q_len": 1, "group": GROUP, "most_rows": MOST_ROWS}
    values |= {"kv_capacity": len(tables.flat), "max_q_tokens": max_q_tokens, "max_q_len": 64, "max_kv_len": 1 << 30, "least_gain": least_gain, "window": window}
    layout = kernel.special.layout
    buffer = bytearray(layout.size)
    layout.pack_into(buffer, 0, *(values.get(f.name, 0) for f in layout.fields))
    kernel.launch(buffer)
    for name, data in wanted.pack().items():
        assert bytes(lists[name].tolist()) == data + b"\xab" * 4096, name
    return wanted, status


@pytest.mark.parametrize("seed", range(12))
def test_the_kernel_finds_what_its_twin_finds(seed):
    rng = random.Random(seed)
    tables = Tables(rng, rng.choice((1, 2, 20, 50, 64)), decode=seed % 2 == 0, starts=seed % 4 == 0)
    groups = groups_of(rng, tables) if seed % 3 == 0 else None
    _, status = check_kernel(tables, groups, 4000 if seed % 5 == 4 else 0, window=rng.choice((1, 100, 700, INT32_MAX)))
    assert not status.any()


def equal_tables(requests: int, shared: int, own: int = 2, last: int = 3) -> Tables:
    """Requests of one length that have their first pages in common."""
    tables = Tables(random.Random(0), 0)
    root = tables.fresh(shared)
    tables.tables = [root + tables.fresh(own) for _ in range(requests)]
    tables.flat, tables.last, tables.q_lens = [x for t in tables.tables for x in t], [last] * requests, [1] * requests
    tables.q_indptr, tables.kv_indptr = ends(tables.q_lens), ends([shared + own] * requests)
    return tables


def test_keys_behind_a_window_save_nothing():
    tables = equal_tables(16, 200, own=10)  # 3344 keys before a request's own
    assert [n.request.kv_len for n in tables.find(window=1 << 20).nodes] == [3200]
    assert not tables.find(window=100).nodes
    assert tables.find(window=2000).nodes and tables.find(window=100, groups=[0] * 16).nodes


@pytest.mark.parametrize("variant, params, reached", [
    (Causal(), {}, None), (SlidingWindow(), {"window": 300}, 300), (Streaming(), {"sinks": 4, "window": 500}, 500),
], ids=str)  # fmt: skip
def test_the_engine_knows_about_how_far_a_mask_reaches(variant, params, reached):
    from types import SimpleNamespace

    from attngen.engine import CudaEngine

    engine = object.__new__(CudaEngine)
    engine.facts, engine._windows = SimpleNamespace(variant=variant, num_heads=8, num_kv_heads=2, head_offset=0, total_heads=8), {}
    found = engine._window(params)
    assert found == INT32_MAX if reached is None else reached <= found <= reached + 1
    if params:
        assert engine._window({**params, "window": torch.tensor(3)}) == INT32_MAX  # which the device alone knows


def test_requests_whose_rows_overlap_share_nothing():
    """A q_indptr that decreases gives every second request the same rows: all of them together have more than there is room for."""
    tables = equal_tables(40, 60)
    tables.q_indptr = [0, 8] * 20 + [0]
    assert sum(read_requests(Lengths(**tables.lengths))[0][i].q_len for i in range(40)) == 160
    assert len(tables.find(max_q_tokens=160).members) == 160
    for groups in (None, [0] * 40):
        found, status = check_kernel(tables, groups, max_q_tokens=16)
        assert not found.nodes and status[0] & 0x1FF == 0x102  # of an odd request, whichever was first


# ---------------------------------------------------------------- the plan of nodes


@pytest.mark.parametrize("variant", [Causal(), SlidingWindow(300)], ids=str)
def test_nodes_and_the_rest_are_planned_once(variant):
    """Of each request, nodes and what is left cover the keys that its rows reach, without overlap."""
    rng = random.Random(3)
    for _ in range(10):
        tables = Tables(rng, 30, decode=True)
        found = tables.find()
        config = PlanConfig("90a", (TileClass(16, 64, 2), TileClass(32, 16, 2, kind="queue", groups=2, row_bytes=512, mixed=True)))
        reach = Reach(analyse(variant.trace.mask), variant.values, 8, 2)
        lengths = Lengths(**tables.lengths, shared_tokens=found.tokens)
        (own, shared), status = plan(config, lengths, reach, [40, 40], nodes=found.nodes)
        assert not status and isinstance(shared, QueuePlan)
        reached: list[set[int]] = [set() for _ in tables.tables]
        for unit in shared.walk():
            if unit.kv_head == 0:
                node = next(n for n in found.nodes if n.request.q_start == unit.record.request.q_start)
                number = found.nodes.index(node)
                for i in (i for i, parts in enumerate(found.parts) if number in [part[0] for part in parts]):
                    slots = {node.request.kv_start + s for s in range(unit.begin, min(unit.end, node.request.num_keys))}
                    row = next(part[2] for part in found.parts[i] if part[0] == number) * GROUP
                    if unit.row0 <= row < unit.row0 + unit.rows:
                        assert not reached[i] & slots
                        reached[i] |= slots
        for tile in own.tiles:
            r = tile.request
            slots = {r.kv_start + s for b in range(tile.blocks) for s in range(tile.block(b) * 64, tile.block(b) * 64 + 64) if s < r.num_keys}
            assert not reached[tile.index] & slots
            reached[tile.index] |= slots
        requests, _ = read_requests(Lengths(**tables.lengths))
        for r, slots in zip(requests, reached):
            keys = torch.arange(r.kv_len)
            kept = keys > r.q_offset - (300 if variant.trace.fields else r.kv_len + 1)
            assert set(keys[kept].tolist()) <= slots


# ---------------------------------------------------------------- what is taken


def attention(variant: Any = None, **more: Any) -> ag.BatchAttention:
    given = dict(num_heads=8, num_kv_heads=2, head_dim=32, page_size=16, max_requests=64, max_q_tokens=512, max_pages=4096, device="cpu",
                 dtype=torch.float32, shared_prefix=True)  # fmt: skip
    return ag.BatchAttention(variant or Causal(), **{**given, **more})


def test_the_cpu_takes_the_same_calls():
    tables = Tables(random.Random(1), 20)
    k, v = torch.randn(2, tables.pages, 16, 2, 32)
    q = torch.randn(tables.q_indptr[-1], 8, 32)
    results = []
    for shared in ("off", "auto", [0] * 20):
        attn = attention()
        attn.plan(tables.q_indptr, tables.kv_indptr, tables.flat, tables.last, shared_prefix=shared)
        results.append(attn.run(q, (k, v)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_bad_calls_say_what_is_required():
    with pytest.raises(ag.ParameterError, match="prefixes are shared by pages"):
        attention(page_size=None, max_kv_tokens=100)
    with pytest.raises(ag.ParameterError, match="required at most 1024"):
        attention(max_requests=2000)
    pages = [0, 1], [0, 1], [0], [5]
    with pytest.raises(ag.ParameterError, match='required "auto", "off"'):
        attention().plan(*pages, shared_prefix="on")
    with pytest.raises(ag.ParameterError, match="make the object with shared_prefix=True"):
        attention(shared_prefix=False).plan(*pages, shared_prefix=[0])
    with pytest.raises(ag.ParameterError, match="has 2 entries: required 1"):
        attention().plan(*pages, shared_prefix=[0, 0])


def test_variants_that_know_their_request_do_not_share():
    from attngen.engine import cuda_problem, kernels_of
    from attngen.run import stored_dtypes

    for variant, found in ((PrefixLM(), "mask reads request"), (Document(), "mask reads request"), (StreamingLLM(), "queries are rotated in several ways")):
        problem = cuda_problem("90a", torch.bfloat16, 128, 128, tuple(sorted(stored_dtypes(variant, None).items())))
        with pytest.raises(ag.UnsupportedError, match=found):
            kernels_of(variant, problem, page_size=16, shared=64)
    problem = cuda_problem("80", torch.bfloat16, 128, 128, ())
    with pytest.raises(ag.UnsupportedError, match="sm_80 has no wgmma"):
        kernels_of(Causal(), problem, page_size=16, shared=64)


# ---------------------------------------------------------------- all kernels, on this host


def check_on_host(
    monkeypatch: pytest.MonkeyPatch, variant: ag.Variant, tables: Tables, groups: list[int], run: Any = (), q_positions: list[int] | None = None,
    partial: bool = False, dv: int = 32, **more: Any,
) -> None:  # fmt: skip
    """Batches with and without sharing: equal results, of memory that somebody wrote."""
    from attngen import engine

    shared_on_host.install(monkeypatch)
    monkeypatch.setattr(engine, "_LEAST_GAIN", 0)
    torch.manual_seed(0)
    attn = attention(variant, head_dim_v=dv, max_q_len=max(tables.q_lens), page_size=tables.page_size, dtype=torch.bfloat16)
    k, v = (torch.randn(tables.pages, tables.page_size, 2, d).bfloat16() for d in (32, dv))
    q = torch.randn(tables.q_indptr[-1] + 1, 8, 32).bfloat16()  # a row of no request
    results, softmax = [], variant.trace.weight is None
    for shared in ("off", "auto", groups):
        attn.engine._workspace[256:].fill_(255)  # NaN
        lists = [ints(x) for x in (tables.q_indptr, tables.kv_indptr, tables.flat, tables.last)]
        attn.plan(*lists, kv_start=ints(tables.starts), q_positions=ints(q_positions), shared_prefix=shared if isinstance(shared, str) else ints(shared), **more)
        out = torch.full((len(q), 8, dv), torch.nan, dtype=torch.float32 if partial else torch.bfloat16)
        found = attn.run(q, (k, v), out=out, return_lse=softmax, partial=partial, **dict(run))
        attn.check()
        assert out[-1].isnan().all()
        results.append((out[:-1], found[1][:-1] if softmax else torch.zeros(0)))
        if shared != "off":
            at = attn.engine._space.shared.lists["num_nodes"]
            assert attn.engine._workspace[at : at + 4].view(torch.int32).item() > 0
    (out, lse), *others = results
    for other, other_lse in others:
        compare(other, out.double(), like=out.double() * (1 + 2**-8) + 2e-3)  # either may round to another side
        assert torch.equal(other_lse.isinf(), lse.isinf())
        compare(other_lse.nan_to_num(neginf=0.0), lse.nan_to_num(neginf=0.0).double(), dtype=torch.float16)


def ints(x: list[int] | None) -> torch.Tensor | None:
    return None if x is None else torch.tensor(x, dtype=torch.int32)


ON_HOST = {"streaming": (Streaming(), {}), "sigmoid": (ag.compose(Sigmoid(-3.0), Causal()), {}), "sinks": (ag.compose(Sinks(), Causal()), {"sinks": torch.randn(8)})}


@pytest.mark.parametrize("name", ON_HOST)
def test_sharing_on_this_host(name, monkeypatch):
    """Queries at the end of their keys, within a prefix, and before it; caches that have dropped pages."""
    (variant, run), rng = ON_HOST[name], random.Random(0)
    tables = Tables(rng, 20, 16 if name != "sinks" else 12, starts=name == "streaming")
    if name != "sinks":  # where some have more rows than decode serves
        tables.q_lens = [min(x, 8) for x in tables.q_lens]
        tables.q_indptr = ends(tables.q_lens)
    keys = [r.kv_len for r in read_requests(Lengths(**tables.lengths))[0]]
    positions = [rng.choice((n - q, n // 2, 0, -1)) for n, q in zip(keys, tables.q_lens)]
    check_on_host(monkeypatch, variant, tables, groups_of(rng, tables), run, positions, name == "sinks", 64 if name == "sigmoid" else 32)


class Oldest(ag.Variant):
    """Keys from a position on that each query token has."""

    oldest: ag.Tensor("q_tokens", dtype=int)

    def mask(self, at):
        return (at.kv <= at.q) & (at.kv >= self.oldest[at.q_token])


def test_classes_know_that_tokens_of_a_node_are_any(monkeypatch):
    """Rows of a node at one position are tokens that do not follow one another."""
    oldest = torch.zeros(12, dtype=torch.int32)
    oldest[0] = 10**6
    check_on_host(monkeypatch, Oldest(), equal_tables(12, 40), [0] * 12, oldest=oldest)


class Further(ag.Variant):
    """Keys up to ``more`` behind the query."""

    more: ag.Scalar[int]

    def mask(self, at):
        return at.kv <= at.q + self.more


def test_bounds_of_a_node_hold_where_a_row_of_it_wraps(monkeypatch):
    """q + more is beyond int32 for every second row: i32 arithmetic, which closed bounds do without, lets it see nothing."""
    check_on_host(monkeypatch, Further(), equal_tables(12, 40), [0] * 12, q_positions=[2000, 200] * 6, more=2**31 - 1500)


def test_queries_at_the_last_position_see_every_key(monkeypatch):
    tables = equal_tables(8, 40)
    tables.q_lens, tables.q_indptr = [2] * 8, ends([2] * 8)
    check_on_host(monkeypatch, Causal(), tables, [0] * 8, q_positions=[2**31 - 1, 600] * 4)


def test_compile_names_all_kernels_of_an_object_that_shares(monkeypatch):
    from attngen import engine

    monkeypatch.setattr(engine, "build", lambda specials: [None] * len(specials))  # other tests build them
    found = ag.compile(Causal(), arch="9.0a", head_dim=64, paged=True, shared_prefix=True)
    names = [k.name for k in found]
    assert names.count("share") == 3 and {"decode", "plan", "attention_sm90"} <= set(names)
    assert any(k.name == "attention_sm90" and k.config.mixed for k in found)
    with pytest.raises(ag.ParameterError, match="prefixes are shared by pages"):
        ag.compile(Causal(), arch="9.0a", head_dim=64, paged=False, shared_prefix=True)


# ---------------------------------------------------------------- on a GPU

SHARING = {
    "causal": (Causal(), ()), "window": (SlidingWindow(700), ()), "streaming": (Streaming(), ()), "sinks": (ag.compose(Sinks(), Causal()), ("sinks",)),
    "soft cap": (ag.compose(SoftCap(30.0), Causal()), ()), "sigmoid": (ag.compose(Sigmoid(-8.0), Causal()), ()),
    "alibi": (ag.compose(ALiBi(), Causal()), ()), "gemma 2": (Gemma2(), ()), "rotated keys": (Llama3RoPE(), ()),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("requests", [3, 40, 300])
def test_sharing_changes_no_result(name, requests, monkeypatch):
    """Lists as the twin's; results as without sharing, which other tests compare with the oracle; nothing is read that nobody wrote."""
    from attngen import engine

    monkeypatch.setattr(engine, "_LEAST_GAIN", 0)  # whatever it saves
    (variant, params), rng = SHARING[name], random.Random(f"{name}{requests}")
    torch.manual_seed(requests)
    attn = ag.BatchAttention(variant, num_heads=8, num_kv_heads=2, head_dim=128, page_size=16, max_requests=300, max_q_tokens=2700,
                             max_pages=60000, max_q_len=9, shared_prefix=True)  # fmt: skip
    for trial in range(4):
        tables = Tables(rng, requests, decode=trial == 1, starts=trial == 2)
        groups = groups_of(rng, tables)
        shape = (tables.pages + 1, 2, 16, 2, 128)
        kv = torch.randn(shape, device="cuda").bfloat16()
        q = torch.randn(max(tables.q_indptr[-1], 1), 8, 128, device="cuda").bfloat16()
        run = {n: torch.randn(8, device="cuda") for n in params}
        results = []
        for shared in ("off", "auto", torch.tensor(groups, dtype=torch.int32, device="cuda")):
            attn.engine._workspace[256:].fill_(255)  # NaN
            lists = (torch.tensor(x or [0], dtype=torch.int32, device="cuda") for x in (tables.q_indptr, tables.kv_indptr, tables.flat, tables.last))
            starts = None if tables.starts is None else torch.tensor(tables.starts, dtype=torch.int32, device="cuda")
            attn.plan(*lists, shared_prefix=shared, kv_start=starts)
            out = torch.full((q.shape[0], 8, 128), torch.nan, device="cuda", dtype=torch.bfloat16)
            attn.run(q, kv, out=out, **run)
            attn.check()
            results.append(out.cpu())
            if isinstance(shared, str) and shared == "off":
                continue
            wanted = tables.find(16, groups=None if isinstance(shared, str) else groups, window=attn.engine._window(attn._plan_params)).pack()  # longer ones go to tiles of 64 rows
            for part, data in wanted.items():
                at = attn.engine._space.shared.lists[part]
                assert bytes(attn.engine._workspace[at : at + len(data)].tolist()) == data, (trial, part)
        rows = slice(0, tables.q_indptr[-1])
        for other in results[1:]:
            compare(other[rows], results[0][rows].double(), like=results[0][rows])


@pytest.mark.gpu
def test_a_graph_finds_other_prefixes_when_it_is_replayed(monkeypatch):
    from attngen import engine

    monkeypatch.setattr(engine, "_LEAST_GAIN", 0)
    attn = ag.BatchAttention(Causal(), num_heads=8, num_kv_heads=2, head_dim=128, page_size=16, max_requests=40, max_q_tokens=40, max_pages=20000,
                             max_q_len=1, shared_prefix=True)  # fmt: skip
    rng = random.Random(5)
    batches = [Tables(rng, 40, decode=True) for _ in range(4)]
    most = max(len(b.flat) for b in batches)
    fixed = [torch.zeros(n, dtype=torch.int32, device="cuda") for n in (41, most, 40)]
    q, kv = torch.randn(40, 8, 128, device="cuda").bfloat16(), torch.randn(20000, 2, 16, 2, 128, device="cuda").bfloat16()
    out = torch.empty_like(q)

    def fill(b: Tables) -> None:
        for to, x in zip(fixed, (b.kv_indptr, b.flat, b.last)):
            to[: len(x)] = torch.tensor(x, dtype=torch.int32)

    def step(shared: str) -> None:
        attn.plan(None, *fixed, shared_prefix=shared)
        attn.run(q, kv, out=out)

    fill(batches[0])
    step("auto")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step("auto")
    for batch in batches:
        fill(batch)
        graph.replay()
        shared = out.clone()
        step("off")
        compare(shared.cpu(), out.cpu().double(), like=out.cpu())
        graph.replay()
        assert torch.equal(out, shared)  # the same input, the same bits
    attn.check()
    assert ROUNDS == 3
