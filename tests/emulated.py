"""CUDA kernels played on the host: they read a launch's parameter struct as the kernels do, addresses and all, for variants
that only mask. This shows that the host packs what the kernels expect; how they compute is for the GPU tests."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import stand_in
import torch
from attngen import boxes, choose_cuda, cuda, lengths, queued, schedule, space
from attngen.bounds import analyse
from attngen.interp import evaluate

ELEMENT = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def memory(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    size = max(count * dtype.itemsize, 1)
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)[:count]


def unpacked(request: bytes) -> lengths.Request:
    return lengths.Request(*space.REQUEST.unpack(request))


class Kernel:
    """What the host extension's CudaKernel is to its caller. ``launches`` holds the structs."""

    def __init__(self, special: cuda.Specialised, launches: list[Any], variant: Any) -> None:
        self.special, self.launches, self.variant = special, launches, variant

    def blocks_per_sm(self) -> int:
        return 2

    def launch(self, buffer: bytearray, grid_x: int, grid_y: int, stream: int) -> None:
        layout = self.special.layout
        assert type(buffer) is bytearray and len(buffer) == layout.size
        p = SimpleNamespace(**dict(zip((f.name for f in layout.fields), layout._struct.unpack(buffer))))
        self.launches.append((self.special.name, p, grid_x))
        (self.plan if self.special.name == "plan" else self.attend)(p, grid_x)

    def params(self, p: Any) -> dict[str, Any]:
        """Values of the scalars, from the struct or from where it points."""
        found = {}
        for name, f in self.variant.trace.used().items():
            dtype = torch.int32 if f.dtype == "i32" else torch.float32
            if hasattr(p, f"at_{name}"):
                at = getattr(p, f"at_{name}")
                found[name] = memory(at, 1, dtype).item() if at else getattr(p, f"param_{name}")
        return found

    def plan(self, p: Any, blocks: int) -> None:
        config, n = self.special.config, p.num_requests
        def read(name, count=n):
            return memory(getattr(p, name), count, torch.int32).tolist() if getattr(p, name) else None
        batch = lengths.Lengths(
            n, read("q_indptr", n + 1), read("q_lens"), p.q_len, read("q_positions"), read("kv_indptr", n + 1),
            read("kv_last_page_len"), read("kv_lens"), p.kv_len, read("kv_starts"), p.page_size, p.block_table_stride,
            p.kv_capacity, p.max_q_tokens, p.max_q_len,
        )  # fmt: skip
        reach = lengths.Reach(analyse(self.variant.trace.mask), self.params(p), p.num_heads, p.num_kv_heads)
        counts = [getattr(p, f"num_workers{i}") for i in range(len(config.classes))]
        assert max(i for i, c in enumerate(counts) if c) < blocks <= len(counts)
        plans, status = schedule.plan(
            config, batch, reach, counts, *([getattr(p, f"{name}{i}") for i in range(len(counts))] for name in ("max_tiles", "max_slots"))
        )
        for i, made in enumerate(plans):
            if counts[i]:
                for name, data in {**made.pack(), "counters": bytes(4 * counts[i])}.items():
                    ctypes.memmove(getattr(p, f"{name}{i}"), data, len(data))
        memory(p.status, 2, torch.int32)[:] = torch.tensor(status.words, dtype=torch.int32)

    def tiles(self, p: Any) -> Iterator[tuple[Any, ...]]:
        """Request, its number, rows, slots and KV heads of what a class of kind "slices" computes."""
        first, bn = space.WORKER.unpack(bytes(memory(p.workers, 128, torch.uint8).tolist())), self.special.config.block_n
        for index in range(first[7] if first[5] >= 0 else 0):
            record = space.TILE.unpack(bytes(memory(p.tiles + 80 * index, 80, torch.uint8).tolist()))
            request, row0, rows, block0, blocks, _, _, gap, gap_blocks = record[1:10]
            listed = [block0 + i + (gap_blocks if i >= gap else 0) for i in range(blocks)]
            yield unpacked(record[0]), request, row0, rows, [b * bn + i for b in listed for i in range(bn)], range(p.num_kv_heads)

    def queued(self, p: Any) -> Iterator[tuple[Any, ...]]:
        """The same of kind "queue": every tile in one go, when its first piece is drawn."""
        units, requests, *drawn = space.QUEUE.unpack(bytes(memory(p.queue, 16, torch.uint8).tolist()))
        starts = memory(p.unit_starts, requests + 1, torch.int32).tolist()
        records = [
            space.QUEUED_REQUEST.unpack(bytes(memory(p.requests + 80 * i, 80, torch.uint8).tolist())) for i in range(requests)
        ]
        records = tuple(queued.QueuedRequest(unpacked(x[0]), *x[1:11]) for x in records)
        assert drawn == [0, 0] and starts == [*(r.unit0 for r in records), units]
        reach = lengths.Reach(analyse(self.variant.trace.mask), self.params(p), p.num_heads, p.num_kv_heads)
        shape = choose_cuda.tile_class(self.special.config, self.special.problem)
        for unit in queued.QueuePlan(shape, p.num_kv_heads, 1, records, units, reach).walk():
            if unit.pieces == 1 or unit.slot == unit.merge[0]:
                slots = reach.row_slots(max(unit.record.index, 0), unit.record.request, unit.row0, unit.row0 + unit.rows)
                yield unit.record.request, unit.record.index, unit.row0, unit.rows, range(*slots), (unit.kv_head,)

    def attend(self, p: Any, blocks: int) -> None:
        problem, config = self.special.problem, self.special.config
        group, element = p.num_heads // p.num_kv_heads, ELEMENT[problem.q_dtype]
        for r, request, row0, rows, reached, heads in (self.queued if config.kind == "queue" else self.tiles)(p):
            q_start, q_len, kv_len, kv_start, q_offset, kv_base = r.q_start, r.q_len, r.kv_len, r.kv_start, r.q_offset, r.kv_base
            bad, request = request < 0, ~request if request < 0 else request
            slots = [s for s in reached if s < kv_len - kv_start]
            for head in heads:
                def rows_of(name, dim):
                    stride = {d: getattr(p, f"{name}_stride_{d}") for d in "bsh"}
                    where = [(request, kv_base + s) for s in slots]
                    if config.paged:
                        where = [(memory(p.page_table + 4 * (kv_base + s // p.page_size), 1, torch.int32).item(), s % p.page_size)
                                 for s in slots]  # fmt: skip
                    at = [getattr(p, name) + 2 * (b * stride["b"] + s * stride["s"] + head * stride["h"]) for b, s in where]
                    return torch.stack([memory(x, dim, element) for x in at]).double() if at else torch.zeros(0, dim, dtype=torch.float64)
                k, v = rows_of("k", problem.head_dim), rows_of("v", problem.head_dim_v)
                for row in range(row0, row0 + rows):
                    i, h = row // group, head * group + row % group
                    place = [(q_start + i) * getattr(p, f"{x}_stride_t") + request * getattr(p, f"{x}_stride_b")
                             + h * getattr(p, f"{x}_stride_h") for x in ("q", "out", "lse")]  # fmt: skip
                    s = k @ memory(p.q + 2 * place[0], problem.head_dim, element).double() * p.scale
                    at = {"q": q_offset + i, "head": h, "request": request, "q_len": q_len, "kv_len": kv_len}
                    at = {n: torch.tensor(x, dtype=torch.int32) for n, x in at.items()}
                    at["kv"] = torch.tensor([kv_start + x for x in slots], dtype=torch.int32)
                    if self.variant.trace.mask is not None and len(slots):
                        s = s.masked_fill(~evaluate(self.variant.trace.mask, at, self.params(p), frozenset()), -math.inf)
                    lse = torch.logsumexp(s, 0) if len(slots) else torch.tensor(-math.inf)
                    o = (s - lse).exp() @ v if lse > -math.inf else torch.zeros(problem.head_dim_v)
                    size, stored = (4, torch.float32) if p.partial else (2, element)
                    memory(p.out + size * place[1], problem.head_dim_v, stored).copy_(o * (math.nan if bad else 1.0))
                    if p.lse:
                        unit = math.log(2) if p.partial else 1.0
                        memory(p.lse + 4 * place[2], 1, torch.float32).fill_(math.nan if bad else lse / unit)


def install(monkeypatch: Any, variant: Any) -> list[Any]:
    """From here on CPU tensors are what CUDA tensors are to ``attention``; returns the list of its launches."""
    launches: list[Any] = []
    stand_in.install(monkeypatch, "90a", lambda special, *_: Kernel(special, launches, variant))
    monkeypatch.setattr(boxes, "host", lambda: SimpleNamespace(tensor_map=lambda *_: b""))
    variant.__dict__.pop("_sites", None)
    return launches
