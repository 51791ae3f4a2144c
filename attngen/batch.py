"""Serving: attention over batches of requests, planned where they run: on a CUDA device or on the CPU.

    attn = BatchAttention(variant, num_heads=32, num_kv_heads=8, head_dim=128, page_size=16,
                          max_requests=256, max_q_tokens=8192, max_pages=65536)
    attn.plan(q_indptr, kv_indptr, kv_indices, kv_last_page_len)      # one small kernel: no sync, no copy
    out = attn.run(q, (k_cache, v_cache))                             # may be captured together with plan

Everything that a legal batch can need is compiled, loaded and allocated when the object is made.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from .choose_cuda import MOST_REQUESTS
from .devices import as_device, cuda_index
from .engine import CudaEngine, Facts, Plan, Site
from .errors import ParameterError, UnsupportedError
from .lengths import Lengths, all_good, read_requests
from .library import NO_GRAD, NOT_IN_GRAPHS, PARAMETERS, define, operands, parameters
from .ops import F32
from .params import DTYPE_NAMES, check_dtype, check_free_axes, check_scalar, free_axes, scale_of
from .run import stored_dtypes
from .spec import Variant, as_variant

if TYPE_CHECKING:
    from .engine_cpu import Plan as CpuPlan

_DTYPES = (torch.bfloat16, torch.float16)
_INT32_MAX = 2**31 - 1
_objects: weakref.WeakValueDictionary[int, BatchAttention] = weakref.WeakValueDictionary()  # by the handle that graphs hold
_handles = itertools.count(2)  # Dynamo makes a graph for each of 0 and 1


def _engine_for(device: torch.device) -> Any:
    if device.type == "cuda":
        return CudaEngine
    from .engine_cpu import CpuEngine

    return CpuEngine


class BatchAttention:
    """Attention of ``variant`` for batches of requests: decode, append, prefill and mixed.

    Args:
        num_heads, num_kv_heads: of this rank; any ratio.
        head_dim, head_dim_v: multiples of 16 from 32 to 256, on the CPU of 8 from 8; head_dim_v defaults to head_dim.
        page_size: keys of a page, at least 1; None: k and v are ragged, without pages.
        dtype: of q, k, v and the output: bfloat16 or float16; on the CPU float32 too.
        max_requests, max_q_tokens: capacities; they fix memory, kernels and graphs.
        max_pages: the most entries of a page table (``kv_indices``); for ragged keys ``max_kv_tokens``.
        max_q_len: the most query tokens of one request; default max_q_tokens. 1 makes a decode-only object.
        kv_layout: of a page: "NHD" [page_size, num_kv_heads, head_dim] or "HND" [num_kv_heads, page_size, head_dim].
        device: a CUDA device or "cpu"; default the current CUDA device, or the CPU where there is none.
        workspace: a uint8 tensor on the device, of ``workspace_bytes`` to use, which several objects may share that are used one
            after another on one stream; default one of its own.
        head_offset, total_heads: of a tensor-parallel rank: ``at.head`` counts from head_offset of total_heads.
        batch_invariant: a request's output bits depend neither on the rest of the batch nor on how its prompt was cut.
            On the CPU it costs decode the splitting of long requests among threads.
        max_kv_len: the longest request under batch_invariant, which sizes its workspace; default all of the capacity.
        storage: stored dtype of tensor parameters, by name; default that of a bound tensor, else float32, int32 or bool.
        scale: of the logits; default the variant's, else head_dim ** -0.5.
        shared_prefix: requests whose page tables begin with the same pages can share the work on them (plan's shared_prefix): two
            more kernels, and workspace. On CUDA it needs the Hopper kernel and a variant that reads no lengths; the CPU reads
            such pages once a request.

    Raises:
        UnsupportedError, ParameterError: what is required, what was found, what to do.
    """

    def __init__(
        self,
        variant: Variant | type[Variant],
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_requests: int,
        max_q_tokens: int,
        head_dim_v: int | None = None,
        page_size: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        max_pages: int | None = None,
        max_kv_tokens: int | None = None,
        max_q_len: int | None = None,
        kv_layout: str = "NHD",
        device: torch.device | str | int | None = None,
        workspace: torch.Tensor | None = None,
        head_offset: int = 0,
        total_heads: int | None = None,
        batch_invariant: bool = False,
        max_kv_len: int | None = None,
        storage: Mapping[str, torch.dtype] | None = None,
        scale: float | None = None,
        shared_prefix: bool = False,
    ) -> None:
        self.variant = as_variant(variant)
        self.device = _device(device)
        on_cuda = self.device.type == "cuda"
        trace = self.variant.trace
        if self.variant._made_for is not None:
            raise UnsupportedError(
                f"{self.variant.name} has a block mask, which is of one q_len and kv_len, and a batch has many: give from_flex its "
                "mask_mod alone"
            )
        check_dtype(dtype)
        if on_cuda and dtype not in _DTYPES:
            raise UnsupportedError(f"dtype {dtype}: the CUDA kernels take torch.bfloat16 or torch.float16")
        if kv_layout not in ("NHD", "HND"):
            raise ParameterError(f'kv_layout {kv_layout!r}: required "NHD" or "HND"')
        if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
            raise ParameterError(f"num_heads {num_heads}, num_kv_heads {num_kv_heads}: num_kv_heads must divide num_heads")
        if page_size is not None and (not isinstance(page_size, int) or page_size < 1):
            raise ParameterError(f"page_size {page_size!r}: required an int of at least 1, or None for ragged k and v")
        for name, value in (("max_requests", max_requests), ("max_q_tokens", max_q_tokens), ("max_q_len", max_q_len),
                            ("max_kv_len", max_kv_len), ("head_dim_v", head_dim_v)):  # fmt: skip
            if value is not None and value < 1:
                raise ParameterError(f"{name} {value}: required at least 1")
        group, all_heads = num_heads // num_kv_heads, num_heads if total_heads is None else total_heads
        if not 0 <= head_offset <= all_heads - num_heads or head_offset % group or all_heads % group:
            raise ParameterError(
                f"head_offset {head_offset}, total_heads {all_heads} with {num_heads} heads of its own: required head_offset from 0 "
                f"to total_heads - num_heads, and both multiples of the {group} heads of a group"
            )
        capacity = max_pages if page_size is not None else max_kv_tokens
        if capacity is None or capacity < 1:
            raise ParameterError(
                f"{'max_pages' if page_size is not None else 'max_kv_tokens'} is {capacity}: required the capacity of the cache"
            )
        self.num_heads, self.num_kv_heads, self.group = num_heads, num_kv_heads, group
        self.head_dim, self.head_dim_v = head_dim, head_dim_v or head_dim
        self.dtype, self.page_size, self.kv_layout = dtype, page_size, kv_layout
        self.max_requests, self.max_q_tokens, self.capacity = max_requests, max_q_tokens, capacity
        self.max_q_len = min(max_q_len or max_q_tokens, max_q_tokens)
        self.max_kv_len = min(max_kv_len or capacity * (page_size or 1), _INT32_MAX)
        self.head_offset, self.total_heads = head_offset, all_heads
        self.scale = scale_of(self.variant, scale, head_dim)
        if shared_prefix and page_size is None:
            raise ParameterError("shared_prefix=True without page_size: prefixes are shared by pages")
        if shared_prefix and max_requests > MOST_REQUESTS:
            raise ParameterError(f"shared_prefix=True with max_requests {max_requests}: required at most {MOST_REQUESTS}")
        self.shared_prefix = shared_prefix
        self._fields, self._free = dict(trace.used()), free_axes(self.variant)
        reads = trace.mask.params if trace.mask is not None else frozenset()
        self.plan_fields = {n: f for n, f in self._fields.items() if n in reads}
        self.run_fields = {n: f for n, f in self._fields.items() if n not in reads}
        self.engine = _engine_for(self.device)(
            Facts(
                variant=self.variant, device=self.device, dtype=dtype, num_heads=num_heads, num_kv_heads=num_kv_heads,
                head_dim=head_dim, head_dim_v=self.head_dim_v, page_size=page_size, max_requests=max_requests,
                max_q_tokens=max_q_tokens, max_q_len=self.max_q_len, capacity=capacity,
                max_kv_len=max_kv_len or capacity * (page_size or 1), head_offset=head_offset,
                total_heads=self.total_heads, batch_invariant=batch_invariant,
                storage=tuple(sorted(stored_dtypes(self.variant, storage).items())), scale=self.scale, shared_prefix=shared_prefix,
            ),
            workspace,
        )  # fmt: skip
        self.problem = self.engine.problem
        self._calls = self.engine.calls
        self._stored = dict(self.problem.storage)
        first = self.variant.q_offset
        if isinstance(first, int):
            first = torch.full((max_requests,), first, dtype=torch.int32, device=self.device)
        self._first_position: torch.Tensor | None = first
        self._limits: dict[str, Any] = {}  # of the last plan, for messages
        self._top_page = -1, 0  # the largest page number that the host has seen in the plan, and its request
        self._planned: tuple[Plan | CpuPlan, int, int] | None = None  # the plan, its requests, the rows that q must have
        self._plan_params: Mapping[str, Any] = {}
        self._sites: dict[Any, Site] = {}
        self._run_names, self._has_lse = tuple(self.run_fields), trace.weight is None
        self._handle = next(_handles)
        _objects[self._handle] = self

    @property
    def workspace_bytes(self) -> int:
        """Bytes of workspace that this object uses."""
        return self.engine.workspace_bytes

    # ---- plan
    def plan(
        self,
        q_indptr: Any = None,
        kv_indptr: Any = None,
        kv_indices: Any = None,
        kv_last_page_len: Any = None,
        *,
        block_table: Any = None,
        kv_lens: Any = None,
        q_positions: Any = None,
        kv_start: Any = None,
        max_q_len: int | None = None,
        shared_prefix: Any = "auto",
        **params: Any,
    ) -> None:
        """Lay out a batch: one kernel on the current stream, without a sync.

        All arguments are int32 tensors on this object's device (a list or a CPU tensor is copied there). Where all lengths come
        as lists, or from the CPU to a CUDA object, bad ones raise here; pages that are not in the cache raise in run. Else
        ``check`` tells of them.

        Args:
            q_indptr: ``[requests + 1]``, where each request's query tokens begin; None: one token each (decode).
            kv_indptr, kv_indices, kv_last_page_len: pages as FlashInfer gives them; or
            block_table, kv_lens: ``[requests, pages]`` and ``[requests]``, as vLLM does; or
            kv_indptr alone: ragged k and v.
            q_positions: ``[requests]``, position of the first query token; default the variant's q_offset, else kv_len - q_len.
            kv_start: ``[requests]``, position of the first cached key, where older pages were dropped; default 0.
            max_q_len: the most query tokens of a request in this batch, a host-side bound that is verified on the device
                and saves launches; default the object's.
            shared_prefix: of an object made with shared_prefix=True: "auto" finds the prefixes that requests of few query tokens
                share, on the device, and uses those that save time; "off" does not; int32 ``[requests]``: the number of
                each one's group, negative for none, whose members share what their page tables have in common, whatever it saves.
            **params: values of the fields that the variant's mask reads.
        """
        if is_dynamo_compiling():
            raise UnsupportedError("plan inside a function that torch.compile traces: call it before; run belongs inside")
        self._planned = None  # nor will there be one if this fails
        mode, groups = (shared_prefix, None) if isinstance(shared_prefix, str) else (None, shared_prefix)
        options = max_q_len, mode
        given = (q_indptr, kv_indptr, kv_indices, kv_last_page_len, block_table, kv_lens, q_positions, kv_start, groups)
        if self._calls is not None and (repeated := self._calls.plan(given, options, params)) is not None:
            self._planned, self._limits = repeated
            self._top_page = -1, 0
            return
        values: dict[str, Any] = {}
        seen: dict[str, Any] | None = {}  # the lengths, if the host sees all of them

        def give(name: str, given: Any, length: int | None, field: str | None = None) -> int:
            nonlocal seen
            tensor = values[field or name] = self._ints(name, given, length)
            if seen is not None and name != "q_positions":  # any will do
                seen = {**seen, field or name: torch.as_tensor(given)} if self._on_host(given) else None
            return tensor.shape[0]

        requests, rows = None, 0  # rows: that q must have, as far as the host knows
        if q_indptr is not None:
            requests = give("q_indptr", q_indptr, None) - 1
            rows = int(torch.as_tensor(q_indptr).max()) if self._on_host(q_indptr) and requests >= 0 else 0
        page_table, table, room = None, None, f"max_kv_tokens={self.capacity}"
        if self.page_size is None:
            if kv_indptr is None or not (kv_indices is kv_last_page_len is block_table is kv_lens is None):
                raise ParameterError("plan of ragged k and v: required kv_indptr alone; for pages, make the object with page_size=")
            requests = _same(requests, give("kv_indptr", kv_indptr, None) - 1)
            values["kv_capacity"], values["page_size"] = self.capacity, 1
        elif block_table is not None:
            if kv_lens is None or not (kv_indptr is kv_indices is kv_last_page_len is None):
                raise ParameterError("plan with block_table: required kv_lens beside it, and none of kv_indptr, kv_indices, ...")
            page_table, table = self._table(block_table), block_table
            requests = _same(requests, page_table.shape[0])
            give("kv_lens", kv_lens, requests)
            values["block_table_stride"] = page_table.stride(0)
            values["kv_capacity"], values["page_size"] = page_table.shape[1] * self.page_size, self.page_size
            room = f"the {page_table.shape[1]} pages of {self.page_size} keys that block_table has for it"
        else:
            if kv_indptr is None or kv_indices is None or kv_last_page_len is None or kv_lens is not None:
                raise ParameterError(
                    "plan of a paged batch: required kv_indptr, kv_indices and kv_last_page_len, or block_table and kv_lens"
                )
            requests = _same(requests, give("kv_indptr", kv_indptr, None) - 1)
            page_table, table = self._ints("kv_indices", kv_indices, None), kv_indices
            give("kv_last_page_len", kv_last_page_len, requests)
            values["kv_capacity"], values["page_size"] = page_table.shape[0], self.page_size
            room = f"the {page_table.shape[0]} entries of kv_indices"
        if requests < 0 or requests > self.max_requests:
            raise ParameterError(f"{requests} requests: required 0 to max_requests={self.max_requests}")
        if q_positions is None and self._first_position is not None:
            q_positions = self._first_position.to(torch.int32)
            if isinstance(self.variant.q_offset, int):  # held once for each request
                q_positions = q_positions[:requests]
        if q_positions is not None:
            give("q_positions", q_positions, requests)
        if kv_start is not None:
            give("kv_start", kv_start, requests, "kv_starts")
        longest = self.max_q_len if q_indptr is not None else 1
        if max_q_len is not None:
            if not 1 <= max_q_len <= self.max_q_len:
                raise ParameterError(f"max_q_len {max_q_len}: required 1 to the object's {self.max_q_len}")
            longest = max_q_len
        values |= {"num_requests": requests, "q_len": 1, "max_q_len": longest}
        self._limits = {
            "max_q_tokens": self.max_q_tokens, "max_q_len": longest, "page_size": self.page_size, "max_kv_len": self.max_kv_len,
            "room": room, "end": "pages end" if self.page_size is not None and kv_indptr is not None else "keys end",
        }  # fmt: skip
        self._top_page = -1, 0
        if seen:
            self._check_lengths(values | seen)
            if table is not None and self._on_host(table):
                self._top_page = self._largest_page(torch.as_tensor(table), seen)
        bound = self._bind("plan", self.plan_fields, params, requests)
        shared = self._shared(shared_prefix, requests)
        self._plan_params = bound
        rows = requests if q_indptr is None else rows
        plan = self.engine.plan(values, page_table, bound, shared)
        if self._calls is not None:
            there = (
                all(x is None or isinstance(x, torch.Tensor) and x.device == self.device for x in given) and page_table is table
                and (given[6] is q_positions or self._first_position is not None and self._first_position.dtype == torch.int32)
                and self._as_given(self.plan_fields, params, bound)
            )  # fmt: skip
            self.engine.remember_plan(given if there else (), options, values, bound, plan, shared, rows, self._top_page[0],
                                      ((Plan(plan.active, None, ()), requests, rows), self._limits))  # fmt: skip
        self._planned = plan, requests, rows

    def _shared(self, given: Any, requests: int) -> Any:
        """A checked ``shared_prefix``: "auto", "off" or a tensor."""
        if isinstance(given, str):
            if given not in ("auto", "off"):
                raise ParameterError(f'shared_prefix {given!r}: required "auto", "off", or the number of each request\'s group')
            return given if self.shared_prefix else "off"
        if not self.shared_prefix:
            raise ParameterError("plan of shared_prefix groups: make the object with shared_prefix=True, which has kernels and room for them")
        return self._ints("shared_prefix", given, requests)

    # ---- run
    def run(
        self,
        q: torch.Tensor,
        kv: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        *,
        out: torch.Tensor | None = None,
        return_lse: bool = False,
        partial: bool = False,
        **params: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of the planned batch.

        Args:
            q: ``[tokens, num_heads, head_dim]``; rows of no request of the plan are neither read nor written.
            kv: (k, v), each ``[pages, page_size, num_kv_heads, head_dim]`` (NHD) or ``[pages, num_kv_heads, page_size,
                head_dim]`` (HND), or both in one tensor with a dimension of 2 after pages; ragged:
                ``[tokens, num_kv_heads, head_dim]``.
            out: ``[tokens, num_heads, head_dim_v]``, written and returned.
            return_lse: also return the natural-log LSE, float32 ``[tokens, num_heads]``.
            partial: return the state of these keys alone, for ``merge_states(variant=...)``: (out, lse), out in float32 before
                the output hook, lse base 2 before the sink; under a weight hook out is the plain sum and lse None.
            **params: values of the fields that the mask does not read.
        """
        if is_dynamo_compiling():
            return _traced_run(self, q, kv, out, return_lse, partial, params)
        if self._calls is not None and (repeated := self._calls.run(q, kv, out, return_lse, partial, params)) is not None:
            return repeated
        if self._planned is None:
            raise ParameterError("run before plan: call plan(...) first")
        planned, requests, rows = self._planned
        one = isinstance(kv, torch.Tensor)
        k, v = (kv, kv) if one else kv
        site = self._site(q, k, v, one)
        if q.is_neg() or k.is_neg() or v.is_neg():
            raise ParameterError("q, k or v is a view that torch negates when it is read: give its resolve_neg()")
        k_at = k.data_ptr()
        v_at = k_at + site.second if one else v.data_ptr()
        if (q.data_ptr() | k_at | v_at) % self.engine.alignment:
            raise ParameterError("q, k or v starts at an address that is no multiple of 16 bytes: give an aligned tensor")
        if return_lse and self.variant.trace.weight is not None:
            raise UnsupportedError(f"return_lse with {self.variant.name}: its weight hook replaces softmax: there is no LSE")
        if self._top_page[0] >= site.strides["num_pages"]:
            page, request = self._top_page
            raise ParameterError(f"request {request}: page {page} of the plan: required below the {k.shape[0]} pages of the cache")
        if q.shape[0] < rows:
            raise ParameterError(f"q has {q.shape[0]} rows: required the {rows} of the {requests} planned requests, or more")
        dtype, given_out = torch.float32 if partial else self.dtype, out
        if out is None:
            out = torch.empty(site.out_shape, dtype=dtype, device=self.device)
        elif out.shape != site.out_shape or out.dtype != dtype or out.device != self.device or not out.is_contiguous():
            raise ParameterError(
                f"out is {tuple(out.shape)} {out.dtype} on {out.device}: required contiguous {tuple(site.out_shape)} "
                f"{dtype} on {self.device}"
            )
        elif out.data_ptr() % self.engine.alignment:
            raise ParameterError("out starts at an address that is no multiple of 16 bytes: give an aligned tensor")
        elif out.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError("out requires grad, and attngen has no backward yet: detach it")
        elif any(at < out.data_ptr() + out.nbytes and out.data_ptr() < at + n for at, n in zip((q.data_ptr(), k_at, v_at), site.extents)):
            raise ParameterError("out shares memory with q, k or v: give another tensor")
        lse = None
        if return_lse or partial and self.variant.trace.weight is None:
            lse = torch.empty(site.out_shape[:2], dtype=torch.float32, device=self.device)
        bound = self._bind("run", self.run_fields, params, requests) if params or self.run_fields else {}
        self.engine.launch(planned, site, q.data_ptr(), k_at, v_at, out, lse, bound, partial)
        if self._calls is not None and self._as_given(self.run_fields, params, bound):
            by_request = any(axis in ("requests", "requests + 1") for f in self.run_fields.values() for axis in f.axes)
            self.engine.remember_run(site, q, kv, given_out, out, lse, return_lse, partial, bound, requests if by_request else -1)
        return (out, lse) if return_lse or partial else out

    def check(self) -> None:
        """Wait for the device and raise ParameterError for what only the device could see: an indptr that decreases, a
        batch over capacity, a page that does not exist, fewer rows of q or of ragged k and v than were planned. The rows
        concerned are NaN."""
        if status := self.engine.status():
            status.raise_for_batch(**self._limits)

    # ---- checks
    def _on_host(self, given: Any) -> bool:
        """Whether an argument of plan comes from the host to another device, or as a list."""
        return not isinstance(given, torch.Tensor) or given.device != self.device

    def _check_lengths(self, values: Mapping[str, Any]) -> None:
        """Raises for lengths, on the host, that the planner would refuse."""
        lengths = Lengths(**values, max_q_tokens=self.max_q_tokens, max_kv_len=self.max_kv_len)
        if not all_good(lengths):
            lists = {name: x.tolist() if isinstance(x, torch.Tensor) else x for name, x in vars(lengths).items()}
            read_requests(Lengths(**lists))[1].raise_for_batch(**self._limits)

    def _largest_page(self, table: torch.Tensor, values: Mapping[str, Any]) -> tuple[int, int]:
        """The largest page of good lengths and a request that has it; all on the host."""
        if table.dim() == 2:
            used = -(-values["kv_lens"] // self.page_size)
            pages = torch.where(torch.arange(table.shape[1]) < used[:, None], table, -1).flatten()
            starts = torch.arange(table.shape[0] + 1) * table.shape[1]
        else:
            pages, starts = table[: values["kv_indptr"][-1]].clone(), values["kv_indptr"].long()
            pages[: starts[0]] = -1
        if not pages.numel():
            return -1, 0
        at = int(pages.argmax())
        return int(pages[at]), int(torch.searchsorted(starts, at, right=True)) - 1

    def _ints(self, name: str, given: Any, length: int | None) -> torch.Tensor:
        """A contiguous int32 vector on the device."""
        tensor = self._on_device(name, given)
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ParameterError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}: required a contiguous int32 vector "
                f"on {self.device}, one entry a request; .to(torch.int32) makes int32 of int64"
            )
        if length is not None and tensor.shape[0] != length:
            raise ParameterError(f"{name} has {tensor.shape[0]} entries: required {length}, one a request")
        return tensor

    def _table(self, given: Any) -> torch.Tensor:
        tensor = self._on_device("block_table", given)
        if tensor.dtype != torch.int32 or tensor.dim() != 2 or (tensor.shape[1] > 1 and tensor.stride(1) != 1):
            raise ParameterError(
                f"block_table is {tensor.dtype} {tuple(tensor.shape)}: required int32 [requests, pages] with contiguous rows"
            )
        return tensor if tensor.stride(0) else tensor.contiguous()  # stride 0 would mean no pages

    def _on_device(self, name: str, given: Any) -> torch.Tensor:
        """What is not there yet is copied: ints that fit int32."""
        if isinstance(given, torch.Tensor) and given.device == self.device:
            return given
        if isinstance(given, torch.Tensor) and given.device.type not in ("cpu", "cuda"):
            others = "" if self.device.type == "cpu" else ", or on the CPU"
            raise ParameterError(f"{name} is on {given.device}: required ints on {self.device}{others}")
        tensor = torch.as_tensor(given)
        if tensor.numel() and (tensor.dtype not in (torch.int32, torch.int64) or int(tensor.abs().max()) > _INT32_MAX):
            raise ParameterError(f"{name} is {given!r:.200}: required ints of 32 bits")
        return tensor.to(torch.int32).to(self.device, non_blocking=True)

    def _site(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, one: bool) -> Site:
        """``one``: k and v are one tensor, which holds both."""
        ident: tuple[Any, ...] = (q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device)
        if not one:
            ident += (v.shape, v.stride(), v.dtype, v.device)
        site = self._sites.get(ident)
        if site is None:
            if len(self._sites) >= 256:
                self._sites.clear()
            if one and (k.dim() < 2 or k.shape[1] != 2):
                raise ParameterError(f"kv has shape {tuple(k.shape)}: required (k, v), or one tensor with a dimension of 2 after the first; [2, pages, ...] is (kv[0], kv[1])")
            pair, second = ((k[:, 0], k[:, 1]), k.stride(1) * k.element_size()) if one else ((k, v), 0)
            site = self._sites[ident] = self._check_site(q, *pair, second)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            raise UnsupportedError("an input requires grad, and attngen has no backward yet: call under torch.no_grad()")
        return site

    def _check_site(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, second: int) -> Site:
        for name, t in (("q", q), ("k", k), ("v", v)):
            if t.dtype != self.dtype or t.device != self.device:
                raise ParameterError(f"{name} is {t.dtype} on {t.device}: required {self.dtype} on {self.device}")
            multiple = self.engine.stride_multiple
            if t.stride(-1) != 1 or any(s % multiple for s, n in zip(t.stride()[:-1], t.shape) if n > 1):
                others = f" and the others multiples of {multiple}" if multiple > 1 else ""
                raise ParameterError(f"{name} has strides {t.stride()}: required a contiguous last dimension{others}")
        if q.dim() != 3 or q.shape[1:] != (self.num_heads, self.head_dim):
            raise ParameterError(f"q has shape {tuple(q.shape)}: required [tokens, {self.num_heads}, {self.head_dim}]")
        values = {"q_stride_t": _stride(q, 0), "q_stride_h": _stride(q, 1)}
        for name, t, d in (("k", k, self.head_dim), ("v", v, self.head_dim_v)):
            if self.page_size is None:
                wanted: tuple[Any, ...] = (t.shape[0] if t.dim() else 0, self.num_kv_heads, d)
                order = (None, 0, 1)
            elif self.kv_layout == "NHD":
                wanted, order = (t.shape[0] if t.dim() else 0, self.page_size, self.num_kv_heads, d), (0, 1, 2)
            else:
                wanted, order = (t.shape[0] if t.dim() else 0, self.num_kv_heads, self.page_size, d), (0, 2, 1)
            if tuple(t.shape) != wanted:
                raise ParameterError(f"{name} has shape {tuple(t.shape)}: required [N, {', '.join(map(str, wanted[1:]))}], {self.kv_layout}")
            for letter, i in zip("bsh", order):
                values[f"{name}_stride_{letter}"] = 0 if i is None else _stride(t, i)
        if k.shape[0] != v.shape[0]:
            raise ParameterError(f"k has {k.shape[0]} pages and v {v.shape[0]}: required as many")
        values |= {"q_rows": q.shape[0], "num_pages": k.shape[0]}
        values |= {"out_stride_t": self.num_heads * self.head_dim_v, "out_stride_h": self.head_dim_v,
                   "lse_stride_t": self.num_heads, "lse_stride_h": 1}  # fmt: skip
        return Site((q.shape[0], self.num_heads, self.head_dim_v), values, second, tuple(map(_extent, (q, k, v))))

    def _bind(self, where: str, fields: Mapping[str, Any], given: Mapping[str, Any], requests: int) -> dict[str, Any]:
        """Checked values of the parameters that belong to ``where`` ("plan" or "run"): numbers and device tensors."""
        for name in given:
            if name not in fields:
                other = "run" if where == "plan" else "plan"
                if name in self._fields:
                    raise ParameterError(
                        f"{where} got `{name}`, which belongs to {other}: what the mask reads goes to plan, the rest to run"
                    )
                hint = "; scale is given to BatchAttention" if name in ("scale", "sm_scale", "softmax_scale") else ""
                raise ParameterError(
                    f"{self.variant.name} has no parameter `{name}`: it has {', '.join(self._fields) or 'none'}{hint}"
                )
        values: dict[str, Any] = {}
        for name, f in fields.items():
            value = given.get(name)
            if value is None:
                value = self.variant.__dict__.get(name)
            if value is None:
                raise ParameterError(f"{self.variant.name} needs `{name}`: pass {name}=... to {where}")
            if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
                raise UnsupportedError(f"{self.variant.name}.{name} requires grad: no backward yet; detach it")
            if f.kind == "tensor":
                self._check_tensor(name, f, value, requests)
                value = value.resolve_neg()
            elif isinstance(value, torch.Tensor) and value.device == self.device and not self._is_host_number(f, value):
                wanted = torch.float32 if f.dtype == F32 else torch.int32
                if value.dim() or value.dtype != wanted:
                    raise ParameterError(f"{name} is {value.dtype} {tuple(value.shape)}: required a number or a 0-dim {wanted}")
            else:
                value = check_scalar(self.variant, name, value)
            values[name] = value
        if self._free:
            check_free_axes(self._fields, values if where == "plan" else {**self._plan_params, **values}, self._free)
        return values

    def _as_given(self, fields: Mapping[str, Any], given: Mapping[str, Any], bound: Mapping[str, Any]) -> bool:
        """Whether parameters were bound as they were given, so that their like need no check."""

        def same(name: str) -> bool:
            value = given.get(name)
            if value is None:
                value = self.variant.__dict__.get(name)
            return bound[name] is value or type(value) in (int, float)

        return not (self._free and fields) and all(map(same, fields))

    def _is_host_number(self, f: Any, value: torch.Tensor) -> bool:
        """Whether a 0-dim tensor on the CPU is read there, since its dtype is not the kernel's."""
        return self.device.type == "cpu" and not value.dim() and value.dtype != (torch.float32 if f.dtype == F32 else torch.int32)

    def _check_tensor(self, name: str, f: Any, value: Any, requests: int) -> None:
        stored = self._stored[name]
        if not isinstance(value, torch.Tensor) or value.dim() != len(f.axes):
            found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise ParameterError(f"{self.variant.name}.{name} is {found}: required a tensor {list(f.axes)}")
        if value.device != self.device or DTYPE_NAMES.get(value.dtype) != stored:
            raise ParameterError(
                f"{self.variant.name}.{name} is {value.dtype} on {value.device}: required {stored} on {self.device} "
                f"(another dtype: BatchAttention(storage={{{name!r}: ...}}))"
            )
        heads = {"heads": (self.num_heads, self.total_heads), "kv_heads": (self.num_kv_heads, self.total_heads // self.group)}
        others = {"requests": (requests,), "requests + 1": (requests + 1,)}
        for axis, size in zip(f.axes, value.shape):
            wanted = (axis,) if isinstance(axis, int) else heads.get(axis) or others.get(axis)
            if (wanted is not None and size not in wanted) or size > _INT32_MAX:
                required = " or ".join(map(str, sorted(set(wanted or (_INT32_MAX,)))))
                raise ParameterError(f"{self.variant.name}.{name} has {size} entries on axis {axis!r}: required {required}")
        local = self.head_offset and any(
            axis in heads and size == heads[axis][0] != heads[axis][1] for axis, size in zip(f.axes, value.shape)
        )
        if local:
            raise UnsupportedError(
                f"{self.variant.name}.{name} holds this rank's heads alone: give all {self.total_heads}, or head_offset=0"
            )


def _stride(t: torch.Tensor, i: int) -> int:
    """A stride that may be used: that of a dimension of 1 can be anything."""
    return t.stride(i) if t.shape[i] > 1 else 0


def _extent(t: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    return (sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1) * t.element_size() if t.numel() else 0


def _device(device: Any) -> torch.device:
    found = as_device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if found.type == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", cuda_index(found, 'leave out device=, or give device="cpu"'))


def _same(known: int | None, found: int) -> int:
    if known is not None and known != found:
        raise ParameterError(f"q_indptr is of {known} requests and the key lengths of {found}: required as many")
    return found


# ---------------------------------------------------------------- under torch.compile


def _traced_run(
    attn: BatchAttention, q: torch.Tensor, kv: Any, out: torch.Tensor | None, return_lse: bool, partial: bool, params: Any
) -> Any:
    """What Dynamo traces of ``run``. What was planned is no part of the graph."""
    k, v = kv if isinstance(kv, tuple) else (kv[:, 0], kv[:, 1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, out)):
        raise UnsupportedError(NO_GRAD)
    with_lse = return_lse or partial and attn._has_lse
    inputs = (attn._handle, q, k, v, *operands(attn.variant, attn._run_names, params), with_lse, partial)
    if out is None:
        out, lse = _run_op(*inputs)
    else:
        lse = _run_out_op(*inputs, out)
    return (out, lse if with_lse else None) if return_lse or partial else out


def _run(
    handle: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Any, ints: Any, names: Any, return_lse: bool,
    partial: bool, out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    attn = _objects.get(handle)
    if attn is None:
        raise ParameterError(
            f"a graph runs BatchAttention {handle}, which this process no longer has (or never had): keep the object as long as "
            "the graph, and compile again with a new one"
        )
    if not NOT_IN_GRAPHS and q.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            f"torch {torch.__version__} captures a compiled BatchAttention.run in a CUDA graph, whose replays would not see the "
            'next plan: compile without mode="reduce-overhead", or use torch 2.8 or newer'
        )
    result = attn.run(q, (k, v), out=out, return_lse=return_lse, partial=partial, **parameters(tensors, ints, names))
    result, lse = result if return_lse or partial else (result, None)
    return result, q.new_empty(0, dtype=torch.float32) if lse is None else lse


def _fake_run(
    handle: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Any, ints: Any, names: Any, return_lse: bool,
    partial: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    if q.dim() != 3:
        raise ParameterError(f"q has shape {tuple(q.shape)}: required [tokens, num_heads, head_dim]")
    out = q.new_empty((*q.shape[:2], v.shape[-1]), dtype=torch.float32 if partial else q.dtype)
    lse = q.shape[:2] if return_lse else 0
    return out, q.new_empty(lse, dtype=torch.float32)


def _run_out(*arguments: Any) -> torch.Tensor:
    *inputs, out = arguments
    return _run(*inputs, out=out)[1]


def _fake_run_out(*arguments: Any) -> torch.Tensor:
    return _fake_run(*arguments[:-1])[1]


_INPUTS = f"SymInt handle, Tensor q, Tensor k, Tensor v, {PARAMETERS}, bool return_lse, bool partial"
_run_op = define("batch_run", f"({_INPUTS}) -> (Tensor out, Tensor lse)", _run, _fake_run, *NOT_IN_GRAPHS)
_run_out_op = define("batch_run_out", f"({_INPUTS}, Tensor(a!) out) -> Tensor lse", _run_out, _fake_run_out, *NOT_IN_GRAPHS)
