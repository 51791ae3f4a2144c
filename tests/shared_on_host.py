"""Everything that shared prefixes launch on a Hopper GPU, run on the CPU: what finds them (on_host_share.py), the planner
(on_host_block.py), the Hopper kernel of nodes (on_host_hopper.py) and decode, which joins (on_host_mma.py). From here on CPU tensors are
what CUDA tensors are. Kernels run one after another: what depends on their order is not tested."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import hopper_on_host
import on_host_block
import on_host_hopper
import on_host_mma
import on_host_share
import stand_in
from attngen import boxes, cuda, engine, engine_cpu
from attngen.abi_cuda import SHARE_FIELDS
from attngen.choose_cuda import ShareConfig

_kernels: dict[str, Any] = {}


class Seldom:
    """The Hopper kernel of a class that most batches plan no request into: compiled when one does."""

    def __init__(self, special: cuda.Specialised) -> None:
        self.special, self.kernel = special, None
        self.queue_at = next(f.offset for f in special.layout.fields if f.name == "queue")

    def blocks_per_sm(self) -> int:
        return 1

    def launch(self, params: Any, *more: Any) -> None:
        if ctypes.c_int.from_address(int.from_bytes(params[self.queue_at : self.queue_at + 8], "little")).value:
            self.kernel = self.kernel or on_host_hopper.Kernel(self.special)
            self.kernel.launch(params, *more)


def load(special: cuda.Specialised, *_: Any) -> Any:
    """Compiled once a process."""
    if special.name == "attention_sm80":
        return hopper_on_host.Absent()
    if special.key not in _kernels:
        made = {"attention_sm90": on_host_hopper.Kernel, "plan": on_host_block.Kernel, "decode": on_host_mma.Kernel, "share": on_host_share.Kernel}[special.name]
        _kernels[special.key] = (Seldom if special.phase == "attention" and not special.config.mixed else made)(special)
    return _kernels[special.key]


def install(monkeypatch: Any) -> None:
    stand_in.install(monkeypatch, "90a", load)
    monkeypatch.setattr(boxes, "host", lambda: SimpleNamespace(tensor_map=on_host_hopper.tensor_map))
    monkeypatch.setattr(engine, "share_kernel", lambda arch, requests: share_kernel())
    monkeypatch.setattr(engine_cpu, "CpuEngine", stand_in.Engine)


def share_kernel() -> cuda.Specialised:
    """For batches of up to 64 requests, of a small cluster."""
    return cuda.specialise_plain("share", "on the host", ShareConfig("90a", requests=64, blocks=3), SHARE_FIELDS)
