"""The shapes of a dense call: q, k, v, lengths and outputs, checked."""

from __future__ import annotations

from typing import Any

import torch

from .errors import ParameterError, UnsupportedError
from .fields import STORAGE
from .ops import I32_MAX
from .params import MAX_LENGTH, int_list, storage_message
from .spec import Variant


def memory(t: torch.Tensor) -> int:
    """The address of a tensor's storage."""
    return t.untyped_storage().data_ptr()


def check_made_for(variant: Variant, *found: int) -> None:
    """Raises ParameterError where a call has other sizes than the block mask that the variant came from."""
    wanted = variant._made_for
    if any(w is not None and w != f for w, f in zip(wanted, found)):
        names = ("batch", "heads", "q_len", "kv_len")
        required, is_ = (", ".join(f"{n} {x}" for n, x, w in zip(names, xs, wanted) if w is not None) for xs in (wanted, found))
        raise ParameterError(
            f"{variant.name} has a block mask made for {required}, and the call has {is_}: create a block mask of the call's sizes, "
            "or give from_flex its mask_mod, which fits any"
        )


class Shape:
    """The checked shapes of a call."""

    device_types: tuple[str, ...] = ("cpu",)
    out_shape: tuple[int, ...]

    def __init__(self, variant: Variant, q: Any, k: Any, v: Any, layout: str) -> None:
        if layout not in ("bshd", "bhsd"):
            raise ParameterError(
                f'layout {layout!r}: required "bshd" ([batch, seq, heads, head_dim]) or "bhsd" ([batch, heads, seq, head_dim])'
            )
        for name, t in (("q", q), ("k", k), ("v", v)):
            if not isinstance(t, torch.Tensor):
                raise ParameterError(f"{name} is {type(t).__name__}: required a torch.Tensor")
            if t.dim() != 4:
                raise ParameterError(f'{name} has shape {tuple(t.shape)}: required 4 dimensions in the order "{layout}"')
            if t.stride(3) != 1 and t.shape[3] > 1:
                raise ParameterError(
                    f"{name} has strides {t.stride()}: the last dimension must be contiguous; call {name}.contiguous()"
                )
        if not q.device == k.device == v.device:
            raise ParameterError(f"q, k, v are on {q.device}, {k.device}, {v.device}: move them to one device")
        if q.device.type not in self.device_types:
            raise UnsupportedError(f"q, k, v are on {q.device}: required {' or '.join(self.device_types)}; move them there")
        self.device, self.dtype = q.device, q.dtype
        if not q.dtype == k.dtype == v.dtype:
            raise ParameterError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}: cast them to one dtype")
        self.variant, self.layout = variant, layout
        seq, head = (1, 2) if layout == "bshd" else (2, 1)
        self.seq, self.head = seq, head
        self.batch, self.q_len, self.num_heads, self.head_dim = q.shape[0], q.shape[seq], q.shape[head], q.shape[3]
        self.kv_len, self.num_kv_heads, self.head_dim_v = k.shape[seq], k.shape[head], v.shape[3]
        if k.shape[0] != self.batch or v.shape[0] != self.batch:
            raise ParameterError(f"batch sizes of q, k, v are {self.batch}, {k.shape[0]}, {v.shape[0]}: required equal")
        if v.shape[seq] != self.kv_len or v.shape[head] != self.num_kv_heads:
            raise ParameterError(
                f"k has shape {tuple(k.shape)} and v {tuple(v.shape)} in {layout}: required the same kv_len and heads"
            )
        if k.shape[3] != self.head_dim:
            raise ParameterError(f"head_dim of q is {self.head_dim} and of k {k.shape[3]}: required equal")
        if self.num_heads and (self.num_kv_heads == 0 or self.num_heads % self.num_kv_heads):
            raise ParameterError(
                f"num_heads {self.num_heads} and num_kv_heads {self.num_kv_heads}: num_kv_heads must divide num_heads; "
                f'is the layout really "{layout}"?'
            )
        if max(self.q_len, self.kv_len) >= MAX_LENGTH:
            raise UnsupportedError(f"q_len {self.q_len}, kv_len {self.kv_len}: lengths must stay below 2**30")
        if variant._made_for is not None:
            check_made_for(variant, self.batch, self.num_heads, self.q_len, self.kv_len)
        if self.batch * self.q_len > I32_MAX:
            raise UnsupportedError(f"q has {self.batch} x {self.q_len} rows: the batch must stay below 2**31")

    def sizes(self) -> dict[str, int]:
        """What the known axis names stand for."""
        return {
            "heads": self.num_heads, "kv_heads": self.num_kv_heads, "requests": self.batch, "requests + 1": self.batch + 1,
            "q_tokens": self.batch * self.q_len, "kv_tokens": self.batch * self.kv_len,
        }  # fmt: skip

    def lengths(self, q_lens: Any, kv_lens: Any, q_offset: Any) -> tuple[list[int], list[int], list[int]]:
        """Checked q_lens, kv_lens and q offsets, one int a request."""
        lens_q = self._ints("q_lens", q_lens, self.q_len, "the rows of q")
        lens_kv = self._ints("kv_lens", kv_lens, self.kv_len, "the slots of k and v")
        if q_offset is None:
            return lens_q, lens_kv, [kv - q for q, kv in zip(lens_q, lens_kv)]
        if isinstance(q_offset, int) and not isinstance(q_offset, bool):
            q_offset = [q_offset] * self.batch
        offsets = int_list("q_offset", q_offset, self.batch)
        for r, x in enumerate(offsets):
            if abs(x) >= MAX_LENGTH:
                raise ParameterError(f"q_offset[{r}] is {x}: required above -2**30 and below 2**30")
        return lens_q, lens_kv, offsets

    def _ints(self, name: str, given: Any, limit: int, what: str) -> list[int]:
        if given is None:
            return [limit] * self.batch
        values = int_list(name, given, self.batch)
        for r, x in enumerate(values):
            if not 0 <= x <= limit:
                raise ParameterError(f"{name}[{r}] is {x}: required 0 to {limit}, {what}")
        return values

    def check_tensor(self, name: str, value: Any, longest: int) -> torch.Tensor:
        """A tensor parameter of the declared type and axes; ``longest`` kv_len of the call."""
        variant = self.variant
        f = variant.trace.fields[name]
        if not isinstance(value, torch.Tensor):
            raise ParameterError(f"{variant.name}.{name} is {type(value).__name__}: required a torch.Tensor {list(f.axes)}")
        if value.dtype not in STORAGE[f.dtype]:
            raise ParameterError(storage_message(variant, name, f.dtype, value.dtype))
        if value.device != self.device:
            raise ParameterError(f"{variant.name}.{name} is on {value.device} and q on {self.device}: move it to q's device")
        if value.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(f"{variant.name}.{name} requires grad: no backward yet; detach it")
        if value.is_neg():
            value = value.resolve_neg()
        if value.data_ptr() % value.element_size():
            raise ParameterError(
                f"{variant.name}.{name} starts at an address that is no multiple of its element size: clone it"
            )
        if value.dim() != len(f.axes):
            raise ParameterError(
                f"{variant.name}.{name} has shape {tuple(value.shape)}: required {len(f.axes)} axes {list(f.axes)}"
            )
        sizes = self.sizes()
        for axis, size in zip(f.axes, value.shape):
            if axis == "positions":
                if size < longest:
                    raise ParameterError(
                        f'{variant.name}.{name} has {size} entries on axis "positions": required the longest kv_len, '
                        f"{longest}, or more"
                    )
            elif isinstance(axis, int) or axis in sizes:
                wanted = axis if isinstance(axis, int) else sizes[axis]
                if size != wanted:
                    raise ParameterError(
                        f"{variant.name}.{name} has shape {tuple(value.shape)}: axis {axis!r} must have {wanted} entries"
                    )
            if size > I32_MAX:
                raise ParameterError(f"{variant.name}.{name} has {size} entries on axis {axis!r}: required below 2**31")
        return value

    def check_out(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """A caller's output tensor: contiguous, of the right shape and dtype, apart from the inputs."""
        if not isinstance(out, torch.Tensor) or tuple(out.shape) != tuple(self.out_shape) or out.dtype != self.dtype:
            found = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, torch.Tensor) else type(out).__name__
            raise ParameterError(f"out is {found}: required {tuple(self.out_shape)} {self.dtype}")
        if out.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError("out requires grad, and attngen has no backward yet: detach it")
        if out.device != self.device or not out.is_contiguous():
            raise ParameterError(
                f"out is on {out.device} with strides {out.stride()}: required a contiguous tensor on {self.device}"
            )
        if memory(out) and memory(out) in {memory(t) for t in (q, k, v)}:
            raise ParameterError("out shares memory with q, k or v: give another tensor")
        return out
