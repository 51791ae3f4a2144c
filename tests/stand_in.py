"""CPU tensors in the place of CUDA tensors: what every emulation of the kernels needs."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from attngen import cuda, dense, engine, run
from attngen.choose_cuda import ARCHS

MULTIPROCESSORS = 3


class Engine(engine.CudaEngine):
    """With a workspace that is aligned as the GPU's allocator aligns."""

    def __init__(self, facts: engine.Facts, workspace: torch.Tensor | None = None) -> None:
        if workspace is None:
            raw = torch.empty(1 << 27, dtype=torch.uint8)
            workspace = raw[-raw.data_ptr() % 256 :]
        super().__init__(facts, workspace)


def install(monkeypatch: Any, arch: str, load: Callable[..., Any]) -> None:
    """From here on CPU tensors are what CUDA tensors are to ``attention``, on a GPU of ``arch``; ``load`` is in place of ``cuda.load``."""
    monkeypatch.setattr(cuda, "build", lambda special: (None, True, 0.0))
    monkeypatch.setattr(cuda, "load", load)
    monkeypatch.setattr(cuda, "device_arch", lambda index: ARCHS[arch])
    monkeypatch.setattr(cuda, "current_stream", lambda index: 0)
    monkeypatch.setattr(cuda, "refuse_capture", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=MULTIPROCESSORS))
    monkeypatch.setattr(dense.DenseSite, "device_types", ("cpu",))
    monkeypatch.setattr(dense, "_loaded", {})
    monkeypatch.setitem(run.device_sites, "cpu", dense.DenseSite)
