"""``attention`` on CUDA tensors: a dense batch, planned and computed by the kernels that serve batches.

The keys of a request are one stretch of memory, as without pages; strides say where it and the request's rows begin. A call
launches the planner and one kernel, that of the row-tile class of its q_len. Its workspace is its own, from torch's
allocator: calls on several streams, or captured in graphs, share nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch

from . import cuda
from .engine import POINTERS, Loaded, cuda_problem, kernels_of, rope_tables, struct_values, zone_values
from .errors import ParameterError, UnsupportedError
from .ops import F32, I32_MAX, I32_MIN
from .params import check_free_axes, check_scalar, free_axes, scale_of, value_of
from .shape import Shape, memory
from .spec import Problem, Variant

_loaded: dict[Any, Loaded] = {}
_lock = threading.Lock()


class DenseSite(Shape):
    """A call site on CUDA: everything about a call that depends only on dtypes, shapes, strides and the variant."""

    device_types = ("cuda",)

    def __init__(self, variant: Variant, q: Any, k: Any, v: Any, layout: str, storage: Mapping[str, str]) -> None:
        super().__init__(variant, q, k, v, layout)
        arch = cuda.device_arch(q.device.index)
        problem = cuda_problem(arch.name, q.dtype, self.head_dim, self.head_dim_v, tuple(sorted(storage.items())))
        for name, t in (("q", q), ("k", k), ("v", v)):
            if any(s % 8 for s, n in zip(t.stride()[:3], t.shape) if n > 1):
                raise ParameterError(
                    f"{name} has strides {t.stride()}: required multiples of 8 on CUDA, the last dimension contiguous; call "
                    f"{name}.contiguous()"
                )
        group = self.num_heads // self.num_kv_heads if self.num_kv_heads else 1
        if max(self.batch * self.q_len, self.q_len * group) > I32_MAX:
            raise UnsupportedError(f"q has {self.batch} x {self.q_len} rows: the batch must stay below 2**31")
        trace = variant.trace
        self.scale = scale_of(variant, None, self.head_dim)
        self.rope = trace.rope.rope if trace.rope else None
        self.params = dict(trace.used())
        self.free_axes = free_axes(variant)
        self.mask_params = trace.mask.params if trace.mask is not None else frozenset()
        self.out_shape = (*q.shape[:3], self.head_dim_v)
        self.loaded = _load(variant, problem, q.device, self.q_len * group)
        (self.tile,) = self.loaded.which
        self.space = self.loaded.space(
            max_requests=self.batch, max_q_tokens=self.batch * self.q_len, max_kv_len=self.kv_len,
            num_heads=max(self.num_heads, 1), num_kv_heads=max(self.num_kv_heads, 1), head_dim_v=self.head_dim_v,
        )  # fmt: skip
        self.inv_freq = None if self.rope is None else self.rope.inv_freq(self.head_dim, q.device)

        values = {
            "num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "total_heads": self.num_heads, "page_size": 1,
            "num_requests": self.batch, "q_len": self.q_len, "kv_len": self.kv_len, "kv_capacity": self.kv_len,
            "max_kv_len": self.kv_len,
            "max_q_tokens": self.batch * self.q_len, "max_q_len": self.q_len,
        }  # fmt: skip
        self.plan_template = self.loaded.plan.template(values)
        out = torch.empty(self.out_shape, dtype=q.dtype, device="meta")
        for n, t, token in (("q", q, "t"), ("k", k, "s"), ("v", v, "s"), ("out", out, "t")):
            values |= {  # of a dimension of 1 it may be anything
                f"{n}_stride_{d}": t.stride(i) if t.shape[i] > 1 else 0 for d, i in (("b", 0), (token, self.seq), ("h", self.head))
            }
        values |= {"lse_stride_b": self.num_heads * self.q_len, "lse_stride_t": 1, "lse_stride_h": self.q_len}
        for n in ("q", "out", "lse"):  # a request's first token is number request * q_len
            values[f"{n}_stride_b"] -= self.q_len * values[f"{n}_stride_t"]
        values |= {"q_rows": self.batch * self.q_len, "num_pages": self.kv_len}
        values["rope_mscale"] = 1.0 if self.rope is None else self.rope.mscale
        launcher = self.loaded.classes[self.tile]
        self.boxes = launcher.boxes(values, self.batch)
        self.template = launcher.template(values if self.boxes is None else values | self.boxes.fields)

    def call(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_lens: Any, kv_lens: Any, q_offset: Any, scale: float | None,
        return_lse: bool, out: torch.Tensor | None, params: Mapping[str, Any],
    ) -> Any:  # fmt: skip
        """The call, on the current stream of q's device; arguments as ``attention``."""
        device = self.device
        if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
            raise ParameterError("q, k or v starts at an address that is no multiple of 16 bytes: give an aligned tensor")
        if out is not None and self.check_out(q, k, v, out).data_ptr() % 16:
            raise ParameterError("out starts at an address that is no multiple of 16 bytes: give an aligned tensor")
        given_q, _ = self._lengths("q_lens", q_lens, self.q_len)
        given_kv, longest = self._lengths("kv_lens", kv_lens, self.kv_len)
        lengths = {"q_lens": given_q, "kv_lens": given_kv, "q_positions": self._offsets(q_offset)}
        lengths = {name: x for name, x in lengths.items() if x is not None}
        bound = self._bind(params, longest, out)
        if out is None:
            out = torch.empty(self.out_shape, dtype=self.dtype, device=device)
        lse = None
        if return_lse:
            lse = torch.empty((self.batch, self.num_heads, self.q_len), dtype=torch.float32, device=device)
        result = out if lse is None else (out, lse)
        if not out.numel():
            return result
        if q_lens is not None:  # rows past them are nobody's
            out.zero_()
            if lse is not None:
                lse.fill_(-torch.inf)

        loaded, places, num_bytes = self.loaded, [], self.space.num_bytes
        for zone in loaded.zones:
            places.append((num_bytes, zone.num_bytes(bound[zone.name].shape)))
            num_bytes += -(-places[-1][1] // 256) * 256
        workspace = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        base, stream = workspace.data_ptr(), cuda.current_stream(device.index)
        zones, zone_blocks = zone_values(loaded.zones, [(base + at, room) for at, room in places], bound)
        mask_params = {name: x for name, x in bound.items() if name in self.mask_params}
        values = {name: x.data_ptr() for name, x in lengths.items()} | struct_values(mask_params)
        values |= loaded.plan_lists(self.space, base, loaded.which) | zones
        loaded.plan.launch(bytearray(self.plan_template), values, loaded.blocks + zone_blocks, stream)

        values = struct_values(bound) | loaded.lists(self.tile, self.space, base) | zones
        values["scale"] = self.scale if scale is None else scale_of(self.variant, scale, self.head_dim)
        if self.rope is not None:
            inv_freq = self.inv_freq
            if self.rope.needs_kv_lens:
                if "kv_lens" not in lengths:
                    lengths["kv_lens"] = torch.full((self.batch,), self.kv_len, dtype=torch.int32, device=device)
                inv_freq, table = rope_tables(self.rope, self.head_dim, lengths)
                values["rope_table"] = table.data_ptr()
            values["rope_inv_freq"] = inv_freq.data_ptr()
        buffer = bytearray(self.template)
        POINTERS.pack_into(
            buffer, 0, q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), 0 if lse is None else lse.data_ptr()
        )
        if self.boxes is not None:
            values |= self.boxes.maps(q.data_ptr(), k.data_ptr(), v.data_ptr())
        loaded.classes[self.tile].launch(buffer, values, loaded.workers[self.tile], stream)
        return result

    # ---- arguments
    def _lengths(self, name: str, given: Any, limit: int) -> tuple[torch.Tensor | None, int]:
        """Lengths on the device, and the longest that there may be. What the host knows is checked here, what only the device
        knows by the planner."""
        if given is None:
            return None, limit
        if isinstance(given, torch.Tensor) and given.device == self.device:
            return self._device_ints(name, given), limit
        values = self._ints(name, given, limit, "the rows of q" if name == "q_lens" else "the slots of k and v")
        return self._to_device(name, values), max(values, default=0)

    def _offsets(self, given: Any) -> torch.Tensor | None:
        if given is None:
            return None
        if isinstance(given, torch.Tensor) and given.device == self.device:
            return self._device_ints("q_offset", given)
        if isinstance(given, int) and not isinstance(given, bool):
            offsets = self.lengths(None, None, given)[2]
            return torch.full((self.batch,), offsets[0] if offsets else 0, dtype=torch.int32, device=self.device)
        return self._to_device("q_offset", self.lengths(None, None, given)[2])

    def _device_ints(self, name: str, given: torch.Tensor) -> torch.Tensor:
        if given.dtype not in (torch.int32, torch.int64) or given.shape != (self.batch,):
            raise ParameterError(f"{name} is {given.dtype} {tuple(given.shape)}: required int32 or int64 [{self.batch}]")
        if given.dtype == torch.int64:
            given = given.clamp(I32_MIN, I32_MAX).int()  # out of range stays out of range
        return given.contiguous()

    def _to_device(self, name: str, values: list[int]) -> torch.Tensor:
        cuda.refuse_capture(self.device.index, f"{name}, which the host holds,", f"give it as an int32 tensor on {self.device}")
        return torch.tensor(values, dtype=torch.int32, device="cpu").to(self.device, non_blocking=True)

    def _bind(self, params: Mapping[str, Any], longest: int, out: torch.Tensor | None) -> dict[str, Any]:
        """Checked values, numbers and tensors on the device; ``longest`` kv_len."""
        values: dict[str, Any] = {}
        for name, f in self.params.items():
            value = value_of(self.variant, name, params)
            if f.kind == "tensor":
                value = self.check_tensor(name, value, longest)
                if out is not None and value.numel() and memory(value) == memory(out):
                    raise ParameterError("out shares memory with a parameter: give another tensor")
            elif isinstance(value, torch.Tensor) and value.device == self.device:
                wanted = torch.float32 if f.dtype == F32 else torch.int32
                if value.dim() or value.dtype != wanted:
                    raise ParameterError(
                        f"{self.variant.name}.{name} is {value.dtype} {tuple(value.shape)}: required a number or a 0-dim {wanted}"
                    )
                if value.requires_grad and torch.is_grad_enabled():
                    raise UnsupportedError(f"{self.variant.name}.{name} requires grad: no backward yet; detach it")
            else:
                value = check_scalar(self.variant, name, value)
            values[name] = value
        check_free_axes(self.params, values, self.free_axes)
        return values


def _load(variant: Variant, problem: Problem, device: torch.device, rows: int) -> Loaded:
    """The planner and the kernel of the row-tile class for ``rows`` packed rows: loaded once for all calls."""
    tile = sum(rows > most for most in (16, 32, 64))
    ident = (variant.trace.key(problem.head_dim), problem, device, tile)
    found = _loaded.get(ident)
    if found is None:
        cuda.refuse_capture(
            device.index, f"the kernel of {variant.name} for {problem.q_dtype}, head_dim {problem.head_dim}/{problem.head_dim_v}, "
            f"up to {(16, 32, 64, 'more than 64')[tile]} rows", "call attention once with these shapes before the capture",
        )  # fmt: skip
        with _lock:
            kernels = kernels_of(variant, problem, page_size=None)
            found = _loaded[ident] = Loaded(kernels, (kernels.holding(rows),), device)
    return found
