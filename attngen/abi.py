"""The launch ABI: one parameter struct a kernel, written once as a field list.

From the list come the C struct with its static_asserts (the template renders ``Layout.fields``) and the packer
(``Layout.pack_into``). Head counts, lengths, strides and pointers are run-time values.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

from .ops import I32
from .fields import Field

LAUNCH_ABI = "attngen-cpu-2"

# C type -> (struct code, size, alignment)
_CODES = {"float": ("f", 4, 4), "int32_t": ("i", 4, 4), "int64_t": ("q", 8, 8), "TensorMap": ("128s", 128, 64)}
_POINTER = ("Q", 8, 8)

# Stored dtype -> element type in C.
STORAGE_CTYPE = {
    "float32": "float", "bfloat16": "uint16_t", "float16": "uint16_t", "int32": "int32_t", "int64": "int64_t",
    "uint8": "uint8_t", "bool": "uint8_t",
}  # fmt: skip

# Strides count elements. Row q_start + i of q, out and lse is that of token i of a request, plus request * stride_b (0 in
# a batch; in dense calls less the rows that q_start counts). Paged caches: *_stride_b is a page, *_stride_s a slot in it;
# contiguous ones: *_stride_b is a request (0 when ragged), *_stride_s a key.
BASE_FIELDS: tuple[tuple[str, str], ...] = (
    ("const void*", "q"), ("const void*", "k"), ("const void*", "v"), ("void*", "out"), ("float*", "lse"),
    *((("int64_t"), f"{t}_stride_{d}") for t in ("q", "k", "v", "out") for d in ("b", "s", "h")),
    ("int64_t", "lse_stride_b"), ("int64_t", "lse_stride_h"), ("int64_t", "lse_stride_s"),
    ("const Request*", "requests"), ("const int32_t*", "page_table"), ("int32_t*", "status"),
    ("const float*", "rope_inv_freq"), ("const int32_t*", "rope_table"),
    ("int32_t", "batch"), ("int32_t", "num_heads"), ("int32_t", "num_kv_heads"), ("int32_t", "q_len"),
    ("int32_t", "kv_len"), ("int32_t", "page_size"), ("int32_t", "num_pages"), ("int32_t", "batch_invariant"),
    ("int32_t", "partial"),
    ("int32_t", "head_offset"), ("int32_t", "total_heads"), ("int32_t", "threads"),
    ("float", "scale"), ("float", "rope_mscale"),
)  # fmt: skip


class StructField(NamedTuple):
    """One field: C type, name, byte offset."""

    ctype: str
    name: str
    offset: int


class Layout:
    """Offsets under natural alignment, and the packer for them."""

    def __init__(self, fields: tuple[tuple[str, str], ...]) -> None:
        placed, code, offset, widest = [], "=", 0, 8
        for ctype, name in fields:
            letter, size, alignment = _CODES.get(ctype, _POINTER)
            pad, widest = -offset % alignment, max(widest, alignment)
            code += "x" * pad + letter
            offset += pad
            placed.append(StructField(ctype, name, offset))
            offset += size
        code += "x" * (-offset % widest)
        self.fields = tuple(placed)
        self.size = offset + -offset % widest
        self._struct = struct.Struct(code)
        assert self._struct.size == self.size
        self.pack_into = self._struct.pack_into
        self.index = {f.name: i for i, f in enumerate(placed)}


def parameter_fields(
    fields: Mapping[str, Field], storage: Mapping[str, str], device_scalars: bool = False
) -> tuple[tuple[str, str], ...]:
    """The user's parameters as struct fields: 8-byte fields first, so that nothing is padded; by name within each, since
    variants that differ only in the order of their fields share a key.

    ``device_scalars`` gives each scalar ``x`` a pointer ``at_x`` too: where it is set, the kernel reads x there.
    """
    wide: list[tuple[str, str]] = []
    narrow: list[tuple[str, str]] = []
    for name, f in sorted(fields.items()):
        if f.kind == "tensor":
            wide.append((f"const {STORAGE_CTYPE[storage[name]]}*", f"param_{name}"))
            wide += [("int64_t", f"stride{i}_{name}") for i in range(len(f.axes))]
            narrow += [("int32_t", f"size{i}_{name}") for i in range(len(f.axes))]
        else:
            ctype = "int32_t" if f.dtype == I32 else "float"
            narrow.append((ctype, f"param_{name}"))
            if device_scalars:
                wide.append((f"const {ctype}*", f"at_{name}"))
    return (*wide, *narrow)


def layout(fields: Mapping[str, Field], storage: Mapping[str, str]) -> Layout:
    """The whole struct of a kernel."""
    return Layout(BASE_FIELDS + parameter_fields(fields, storage))
