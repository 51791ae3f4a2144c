"""The CPU engine of batches: what engine.py says of an engine, over the CPU kernel.

plan reads the lengths on the host into the records that the device planner writes; the kernel takes them, and the page
table, as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .engine import Facts, Site, struct_values
from .errors import ParameterError
from .lengths import Lengths, Request, read_requests
from .params import MAX_LENGTH, check_scalar
from .records import record
from .run import kernel_for, problem_for
from .status import STATUS_WORDS, Status

_ZERO = torch.zeros(8, dtype=torch.int64, device="cpu")  # what an empty tensor points to: element 0 must be readable


@record
class Plan:
    """What plan leaves for launch."""

    requests: list[Request]
    params: Mapping[str, Any]  # of the mask
    bound: Mapping[str, Any]  # struct fields that plan decides
    held: tuple[Any, ...]  # alive as long as the plan

    @property
    def q_rows(self) -> int:
        """Rows that q must have."""
        return max((r.q_start + r.q_len for r in self.requests), default=0)

    @property
    def kv_rows(self) -> int:
        """Rows that k and v must have, where they are ragged."""
        return max((r.kv_base + r.num_keys for r in self.requests), default=0)


class CpuEngine:
    """Plans and runs batches on the CPU. See BatchAttention for ``workspace``, of which it uses nothing."""

    workspace_bytes = 0
    stride_multiple = alignment = 1  # the kernel takes any
    calls = None  # a call's launch is little beside its kernel's time

    def __init__(self, facts: Facts, workspace: torch.Tensor | None = None) -> None:
        if workspace is not None and workspace.device != facts.device:
            raise ParameterError(f"workspace on {workspace.device}: required on {facts.device}, or none: no byte of it is used")
        self.facts = facts
        self.problem = problem_for(facts.dtype, facts.head_dim, facts.head_dim_v, dict(facts.storage))
        self._kernel = kernel_for(facts.variant, self.problem)
        self._status = torch.zeros(STATUS_WORDS, dtype=torch.int32, device="cpu")
        rope = facts.variant.trace.rope
        self._rope = rope.rope if rope else None

    # ---- plan
    def plan(
        self, lengths: Mapping[str, Any], page_table: torch.Tensor | None, params: Mapping[str, Any], shared: Any = "off"
    ) -> Plan:
        """Read the lengths. Arguments as for CudaEngine, on the host; what is ``shared`` changes no result."""
        facts = self.facts
        given = {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in lengths.items()}
        requests, status = read_requests(Lengths(**given, max_q_tokens=facts.max_q_tokens, max_kv_len=facts.max_kv_len))
        self._report(status)
        for i, r in enumerate(requests):
            if r.kv_len >= MAX_LENGTH or abs(r.q_offset) >= MAX_LENGTH:
                raise ParameterError(
                    f"request {i} has kv_len {r.kv_len} and its first query at position {r.q_offset}: required below 2**30"
                )
        records = torch.frombuffer(bytearray(b"".join(r.pack() for r in requests) or 1), dtype=torch.uint8)
        bound: dict[str, Any] = {"batch": len(requests), "requests": records.data_ptr()}
        if page_table is not None:
            bound["page_table"] = (page_table if page_table.numel() else _ZERO).data_ptr()
        tables: tuple[torch.Tensor | None, ...] = ()
        if self._rope is not None:
            with torch.device("cpu"):
                inv_freq, table = tables = self._rope.tables(facts.head_dim, torch.tensor([r.kv_len for r in requests]))
            bound["rope_inv_freq"] = inv_freq.data_ptr()
            if table is not None:
                bound["rope_table"] = table.data_ptr()
        plan = Plan(requests, params, bound, (records, page_table, tables))
        self._check_axes(plan, params)
        return plan

    def _report(self, status: Status) -> None:
        """The first error wins."""
        if status and not self._status[0]:
            self._status.copy_(torch.tensor(status.words, dtype=torch.int32))

    def _check_axes(self, plan: Plan, params: Mapping[str, Any]) -> None:
        """A read indexed by a token or a position of the batch is in range."""
        requests = plan.requests
        needed = {
            "q_tokens": (plan.q_rows, "the tokens of the batch"),
            "kv_tokens": (max((r.kv_token + r.kv_len for r in requests), default=0), "the keys of the batch"),
            "positions": (max((r.kv_len for r in requests), default=0), "the longest kv_len"),
        }
        for name, value in params.items():
            f = self.facts.variant.trace.fields[name]
            for axis, size in zip(f.axes, value.shape if f.kind == "tensor" else ()):
                if axis in needed and size < needed[axis][0]:
                    raise ParameterError(
                        f'{self.facts.variant.name}.{name} has {size} entries on axis "{axis}": required {needed[axis][1]}, '
                        f"{needed[axis][0]}, or more"
                    )

    # ---- run
    def launch(
        self, plan: Plan, site: Site, q_at: int, k_at: int, v_at: int, out: torch.Tensor, lse: torch.Tensor | None,
        params: Mapping[str, Any], partial: bool = False,
    ) -> None:  # fmt: skip
        """The planned batch, now. Arguments as for CudaEngine."""
        facts, layout = self.facts, self._kernel.layout
        if site.out_shape[0] < plan.q_rows:
            raise ParameterError(f"q has {site.out_shape[0]} rows: required the {plan.q_rows} of the plan, or more")
        if facts.page_size is None and (rows := site.strides["num_pages"]) < plan.kv_rows:
            raise ParameterError(f"k and v have {rows} rows: required the {plan.kv_rows} of the plan, or more")
        self._check_axes(plan, params)
        values = {
            **{name.replace("_stride_t", "_stride_s"): x for name, x in site.strides.items()}, **plan.bound,
            **struct_values(self._numbers({**plan.params, **params})), "q": q_at, "k": k_at, "v": v_at,
            "out": out.data_ptr(), "lse": 0 if lse is None else lse.data_ptr(),
            "status": self._status.data_ptr(), "num_heads": facts.num_heads, "num_kv_heads": facts.num_kv_heads,
            "page_size": facts.page_size or 1, "batch_invariant": facts.batch_invariant, "partial": partial, "head_offset": facts.head_offset,
            "total_heads": facts.total_heads, "threads": torch.get_num_threads(), "scale": facts.scale,
            "rope_mscale": 1.0 if self._rope is None else self._rope.mscale,
        }  # fmt: skip
        buffer = bytearray(layout.size)
        layout.pack_into(buffer, 0, *(values.get(f.name, 0) for f in layout.fields))
        self._kernel.launch(buffer)

    def _numbers(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Scalars in tensors as numbers, read now; empty tensors as some that can be read."""
        found = {}
        for name, value in params.items():
            if isinstance(value, torch.Tensor) and value.dim() == 0:
                value = check_scalar(self.facts.variant, name, value)
            elif isinstance(value, torch.Tensor) and value.numel() == 0:
                value = torch.as_strided(_ZERO, value.shape, value.stride())
            found[name] = value
        return found

    def status(self) -> Status:
        """What was found wrong since the last call."""
        status = Status.of(self._status.tolist())
        self._status.zero_()
        return status
