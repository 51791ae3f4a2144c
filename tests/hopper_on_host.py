"""Everything that a Hopper GPU would launch, run on the CPU: from here on CPU tensors are what CUDA tensors are. Requests of any
length go to the Hopper kernel (on_host_hopper.py), planned by the device's planner (on_host_block.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import on_host_block
import on_host_hopper
import stand_in
from attngen import boxes, cuda, engine, engine_cpu

_kernels: dict[str, Any] = {}
CLASS = -1  # of those that a variant has: the one that all requests are planned into, -2 is the one with tiles of 64 rows


class Absent:
    """A kernel of a class that no request is planned into."""

    def blocks_per_sm(self) -> int:
        return 1

    def launch(self, *_: Any) -> None:
        raise AssertionError("only the Hopper kernel is to be launched")


def load(special: cuda.Specialised, *_: Any) -> Any:
    """Compiled once a process."""
    made = {"attention_sm90": on_host_hopper.Kernel, "plan": on_host_block.Kernel}.get(special.name)
    if made is None:
        return Absent()
    if special.key not in _kernels:
        _kernels[special.key] = made(special)
    return _kernels[special.key]


def install(monkeypatch: Any) -> None:
    def last(self: engine.Kernels, *_: int) -> tuple[int, ...]:
        assert self.classes[CLASS].name == "attention_sm90"
        return (len(self.classes) + CLASS,)

    stand_in.install(monkeypatch, "90a", load)
    monkeypatch.setattr(boxes, "host", lambda: SimpleNamespace(tensor_map=on_host_hopper.tensor_map))
    monkeypatch.setattr(engine.Kernels, "needed", last)
    monkeypatch.setattr(engine.Kernels, "launched", last)
    monkeypatch.setattr(engine_cpu, "CpuEngine", stand_in.Engine)
