"""The CUDA engine of batches: kernels, workspace, parameter structs, launches.

`BatchAttention` checks what is given and hands it to an engine, which knows how its device computes. An engine has

    engine = Engine(Facts, workspace)              kernels built and loaded, memory allocated
    plan = engine.plan(lengths, page_table, params)
    engine.launch(plan, site, q, k, v, out, lse, params)
    engine.status()                                0, or what the device found, as in schedule.STATUS_TEXT
    engine.workspace_bytes, engine.problem
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from . import cuda
from .choose_cuda import Arch, PlanConfig, TileClass, choose_attention, choose_decode
from .emit import emit
from .errors import ParameterError, UnsupportedError
from .run import DTYPE_NAMES
from .schedule import workspace as workspace_layout
from .spec import Problem, Variant

_FIXED_SPLIT = 2048  # keys of a piece under batch_invariant: long enough to hide a merge, short enough to fill a GPU
_POINTERS = struct.Struct("=5Q")  # q, k, v, out, lse: the first fields


@dataclass(frozen=True)
class Facts:
    """What an engine is made for: BatchAttention's arguments, checked and with their defaults."""

    variant: Variant
    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int
    page_size: int | None
    max_requests: int
    max_q_tokens: int
    max_q_len: int
    capacity: int  # entries of a page table, or rows of ragged keys
    max_kv_len: int
    head_offset: int
    total_heads: int
    batch_invariant: bool
    storage: tuple[tuple[str, str], ...]
    scale: float

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, eq=False)
class Site:
    """The checked shapes and strides of q, k, v and the output, under the names of struct fields."""

    out_shape: tuple[int, ...]
    strides: Mapping[str, int]


# ---------------------------------------------------------------- kernels


@dataclass(frozen=True)
class _Class:
    """A row-tile class: the kernel that serves it, and how it is launched."""

    bm: int
    kernel: Any  # host extension's CudaKernel
    special: cuda.Specialised
    workers: int
    slots: Mapping[str, tuple[struct.Struct, int]]  # of each field: how and where it is packed


@dataclass
class Plan:
    """What plan leaves for launch."""

    active: tuple[int, ...]  # classes to launch
    bound: dict[str, Any]  # struct fields that plan decides
    held: tuple[Any, ...]  # alive as long as the plan
    templates: dict[tuple[Site, int], bytes] = field(default_factory=dict)  # by call site and class


class CudaEngine:
    """Plans and runs batches on one CUDA device. See BatchAttention for ``workspace``."""

    def __init__(self, facts: Facts, workspace: torch.Tensor | None = None) -> None:
        self.facts = facts
        trace, device = facts.variant.trace, facts.device
        arch = cuda.device_arch(device.index)
        name = DTYPE_NAMES[facts.dtype]
        self.problem = Problem("cuda", arch.name, name, name, name, facts.head_dim, facts.head_dim_v, facts.storage)
        self._load(arch, _FIXED_SPLIT if facts.batch_invariant else 0)
        self._space = workspace_layout(
            self._plan_config, [c.workers for c in self._classes], max_requests=facts.max_requests,
            max_q_tokens=facts.max_q_tokens, max_kv_len=facts.max_kv_len, num_heads=facts.num_heads,
            num_kv_heads=facts.num_kv_heads, head_dim_v=facts.head_dim_v,
        )  # fmt: skip
        if workspace is None:
            workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
        elif workspace.device != device or workspace.numel() * workspace.element_size() < self.workspace_bytes:
            raise ParameterError(
                f"workspace of {workspace.numel() * workspace.element_size()} bytes on {workspace.device}: required "
                f"{self.workspace_bytes} bytes on {device}"
            )
        self._workspace = workspace
        self._base = workspace.data_ptr()
        if self._base % 256:
            raise ParameterError("workspace starts at an address that is no multiple of 256: give a tensor of its own")
        self._status = workspace.view(torch.uint8).flatten()[:4].view(torch.int32)
        self._status.zero_()
        self._rope = trace.rope.rope if trace.rope else None
        self._inv_freq = None if self._rope is None else self._rope.inv_freq(facts.head_dim, device)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of workspace in use."""
        return self._space.num_bytes

    def _load(self, arch: Arch, split: int) -> None:
        facts, trace, problem, device = self.facts, self.facts.variant.trace, self.problem, self.facts.device
        hooks = emit(trace, dict(problem.storage), problem.head_dim, dialect="cuda", device_scalars=True)
        paged = facts.page_size is not None
        most_rows = facts.max_q_len * facts.group

        def attention(bm: int) -> tuple[str, Any]:
            return "attention_sm80", choose_attention(problem, arch.name, hooks, bm, paged=paged, split=split).config

        choices: list[tuple[str, Any]] = []
        if not split or most_rows <= 16:
            choices.append(("decode", choose_decode(problem, arch.name, hooks, paged=paged, split=split).config))
        if split:  # one kernel for all lengths: two would round differently, and a prompt may be cut anywhere
            choices = choices or [attention(64)]
        else:
            choices += [attention(bm) for bm, below in ((64, 16), (128, 64)) if most_rows > below]
        shapes = tuple(TileClass(c.block_m, c.block_n, c.unit_cost, c.split) for _, c in choices)
        self._plan_config = PlanConfig(arch.name, shapes)
        wanted = [*choices, ("plan", self._plan_config)]
        specials = [cuda.specialise(n, facts.variant.name, trace, problem, config, arch.name) for n, config in wanted]
        with ThreadPoolExecutor(len(specials)) as pool:  # each is a process of nvcc
            list(pool.map(cuda.build, specials))
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._classes = []
        for special, (_, config) in zip(specials, choices):
            kernel = cuda.load(special, device.index, config.threads, config.smem_bytes, arch.dependent_launch)
            blocks = kernel.blocks_per_sm()
            if blocks == 0:
                raise UnsupportedError(f"{special.name} of {facts.variant.name} does not fit {device}: {config}")
            self._classes.append(_Class(config.block_m, kernel, special, blocks * multiprocessors, _slots(special)))
        self._plan_special = specials[-1]
        self._plan_kernel = cuda.load(self._plan_special, device.index, self._plan_config.threads, 0, arch.dependent_launch)

    # ---- plan
    def plan(
        self, lengths: Mapping[str, Any], page_table: torch.Tensor | None, params: Mapping[str, Any]
    ) -> Plan:
        """One kernel on the current stream.

        Args:
            lengths: arguments of ``schedule.Lengths``; vectors are int32 tensors on the device.
            page_table: page numbers, int32 on the device.
            params: checked values of the fields that the mask reads: numbers and device tensors.
        """
        facts, space, base = self.facts, self._space, self._base
        requests, longest = lengths["num_requests"], lengths["max_q_len"] * facts.group
        launched = [i == 0 or longest > self._classes[i - 1].bm for i in range(len(self._classes))]
        bound = struct_values(params)
        values = {n: x.data_ptr() if isinstance(x, torch.Tensor) else x for n, x in lengths.items()} | bound
        for i, (part, on) in enumerate(zip(space.classes, launched)):
            values |= {f"tiles{i}": base + part.tiles, f"workers{i}": base + part.workers,
                       f"counters{i}": base + part.counters, f"num_workers{i}": part.num_workers if on else 0,
                       f"max_tiles{i}": part.max_tiles}  # fmt: skip
        values |= {
            "status": base + space.status, "num_heads": facts.num_heads, "num_kv_heads": facts.num_kv_heads,
            "head_offset": facts.head_offset, "total_heads": facts.total_heads, "max_q_tokens": facts.max_q_tokens,
        }  # fmt: skip
        layout = self._plan_special.layout
        buffer = bytearray(layout.size)
        layout.pack_into(buffer, 0, *(values.get(f.name, 0) for f in layout.fields))
        if requests:
            self._plan_kernel.launch(buffer, len(self._classes), 1, _stream(facts.device.index))
        if page_table is not None:
            bound["page_table"] = page_table.data_ptr()
        tables: tuple[Any, ...] = ()
        if self._rope is not None:
            inv_freq = self._inv_freq
            if self._rope.needs_kv_lens:
                inv_freq, table = tables = rope_tables(self._rope, facts.head_dim, lengths)
                bound["rope_table"] = table.data_ptr()
            bound["rope_inv_freq"] = inv_freq.data_ptr()
        active = tuple(i for i, on in enumerate(launched) if on) if requests else ()
        return Plan(active, bound, (lengths, page_table, params, tables))

    # ---- run
    def launch(
        self, plan: Plan, site: Site, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor,
        lse: torch.Tensor | None, params: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """The planned batch, on the current stream. ``params``: checked values of the fields that the mask does not read."""
        bound = struct_values(params) if params else {}
        pointers = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr())
        stream = _stream(self.facts.device.index)
        for i in plan.active:
            template = plan.templates.get((site, i))
            if template is None:
                if len(plan.templates) >= 1024:
                    plan.templates.clear()
                template = plan.templates[site, i] = self._template(i, site, plan)
            buffer = bytearray(template)
            _POINTERS.pack_into(buffer, 0, *pointers)
            found = self._classes[i]
            for name, value in bound.items():
                code, offset = found.slots[name]
                code.pack_into(buffer, offset, value)
            found.kernel.launch(buffer, found.workers, 1, stream)

    def _template(self, i: int, site: Site, plan: Plan) -> bytes:
        """A class's parameter struct, but for pointers and the parameters of run."""
        facts, part, base, space = self.facts, self._space.classes[i], self._base, self._space
        values = {
            **site.strides, **plan.bound, "tiles": base + part.tiles, "workers": base + part.workers,
            "counters": base + part.counters, "partial_out": base + space.partial_out,
            "partial_lse": base + space.partial_lse, "status": base + space.status, "num_heads": facts.num_heads,
            "num_kv_heads": facts.num_kv_heads, "head_offset": facts.head_offset, "total_heads": facts.total_heads,
            "page_size": facts.page_size or 1, "scale": facts.scale,
            "rope_mscale": 1.0 if self._rope is None else self._rope.mscale,
        }  # fmt: skip
        layout = self._classes[i].special.layout
        buffer = bytearray(layout.size)
        layout.pack_into(buffer, 0, *(values.get(f.name, 0) for f in layout.fields))
        return bytes(buffer)

    def status(self) -> int:
        """Waits for the device; the status word since the last call, 0 if all went well."""
        status = int(self._status.item())
        if status:
            self._status.zero_()
        return status


# ---------------------------------------------------------------- struct fields


def struct_values(params: Mapping[str, Any]) -> dict[str, Any]:
    """The struct fields of checked parameter values."""
    values: dict[str, Any] = {}
    for name, value in params.items():
        if not isinstance(value, torch.Tensor):
            values[f"param_{name}"] = value
        elif value.dim() == 0:
            values[f"at_{name}"] = value.data_ptr()
        else:
            values[f"param_{name}"] = value.data_ptr()
            for i, (stride, size) in enumerate(zip(value.stride(), value.shape)):
                values[f"stride{i}_{name}"], values[f"size{i}_{name}"] = stride, size
    return values


def rope_tables(rope: Any, head_dim: int, lengths: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE's tables and each request's row of them, by its length; on the lengths' device."""
    if (lens := lengths.get("kv_lens")) is None:
        lens = lengths["kv_indptr"].diff()
        if (last := lengths.get("kv_last_page_len")) is not None:
            lens = ((lens - 1) * lengths["page_size"] + last).clamp(min=0)
    inv_freq, table = rope.tables(head_dim, lens)
    return inv_freq.contiguous(), table.int().contiguous()


def _slots(special: cuda.Specialised) -> dict[str, tuple[struct.Struct, int]]:
    codes = {"float": "=f", "int32_t": "=i", "int64_t": "=q"}
    return {f.name: (struct.Struct(codes.get(f.ctype, "=Q")), f.offset) for f in special.layout.fields}


def _stream(index: int) -> int:
    return torch._C._cuda_getCurrentRawStream(index)
