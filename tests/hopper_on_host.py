"""Everything that a Hopper GPU would launch, run on the CPU: from here on CPU tensors are what CUDA tensors are. Requests of any
length go to the Hopper kernel (on_host_hopper.py), planned by the device's planner (on_host_block.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import on_host_block
import on_host_hopper
import torch
from attngen import boxes, cuda, dense, engine, engine_cpu, run
from attngen.choose_cuda import ARCHS

MULTIPROCESSORS = 3
_kernels: dict[str, Any] = {}


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


class Engine(engine.CudaEngine):
    """With a workspace that is aligned as the GPU's allocator aligns."""

    def __init__(self, facts: engine.Facts, workspace: torch.Tensor | None = None) -> None:
        if workspace is None:
            raw = torch.empty(1 << 27, dtype=torch.uint8)
            workspace = raw[-raw.data_ptr() % 256 :]
        super().__init__(facts, workspace)


def install(monkeypatch: Any) -> None:
    def last(self: engine.Kernels, most_rows: int) -> tuple[int, ...]:
        assert self.classes[-1].name == "attention_sm90"
        return (len(self.classes) - 1,)

    monkeypatch.setattr(cuda, "build", lambda special: (None, True, 0.0))
    monkeypatch.setattr(cuda, "load", load)
    monkeypatch.setattr(boxes, "host", lambda: SimpleNamespace(tensor_map=on_host_hopper.tensor_map))
    monkeypatch.setattr(cuda, "device_arch", lambda index: ARCHS["90a"])
    monkeypatch.setattr(cuda, "current_stream", lambda index: 0)
    monkeypatch.setattr(cuda, "refuse_capture", lambda *_: None)
    monkeypatch.setattr(engine.Kernels, "needed", last)
    monkeypatch.setattr(engine.Kernels, "launched", last)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=MULTIPROCESSORS))
    monkeypatch.setattr(dense.DenseSite, "device_types", ("cpu",))
    monkeypatch.setattr(dense, "_loaded", {})
    monkeypatch.setitem(run.device_sites, "cpu", dense.DenseSite)
    monkeypatch.setattr(engine_cpu, "CpuEngine", Engine)
