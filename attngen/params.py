"""Parameters of a call: what a variant's fields are given, checked, and how they are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .errors import ParameterError, UnsupportedError
from .fields import AXES, STORAGE, plain_number
from .ops import I32, I32_MAX, I32_MIN
from .spec import Variant

MAX_LENGTH = 2**30  # positions and lengths stay below it, so that q - kv never wraps
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16",
                torch.int32: "int32", torch.int64: "int64", torch.uint8: "uint8", torch.bool: "bool"}  # fmt: skip
F32_MAX = torch.finfo(torch.float32).max


def check_dtype(dtype: Any) -> None:
    """Raises ParameterError for what is no torch.dtype, such as its name."""
    if not isinstance(dtype, torch.dtype):
        known = getattr(torch, dtype, None) if isinstance(dtype, str) else None
        hint = known if isinstance(known, torch.dtype) else "such as torch.bfloat16"
        raise ParameterError(f"dtype is {dtype!r}: required a torch.dtype, {hint}")


def stored_in(variant: Variant, params: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Stored dtypes of the tensor parameters in use; also refuses unknown and missing parameters."""
    if params:
        check_unknown(variant, params)
    found = []
    for name, f in variant.trace.used().items():
        if f.kind == "tensor":
            value = value_of(variant, name, params)
            if isinstance(value, torch.Tensor):
                if value.dtype not in STORAGE[f.dtype]:
                    raise ParameterError(storage_message(variant, name, f.dtype, value.dtype))
                found.append((name, DTYPE_NAMES[value.dtype]))
            else:
                raise ParameterError(
                    f"{variant.name}.{name} is {type(value).__name__}: required a torch.Tensor {list(f.axes)}"
                )
    return tuple(found)


def value_of(variant: Variant, name: str, params: Mapping[str, Any]) -> Any:
    """What the call gives for a field, else what the variant has; ParameterError where neither does."""
    value = params.get(name)
    if value is None:
        value = variant.__dict__.get(name)
    if value is None:
        f = variant.trace.fields[name]
        what = f"a tensor {list(f.axes)}" if f.kind == "tensor" else f"a {f.dtype} number"
        raise ParameterError(
            f"{variant.name} needs `{name}`, {what}, and neither the call nor the variant gives it: pass {name}=..."
        )
    return value


def check_unknown(variant: Variant, params: Mapping[str, Any]) -> None:
    """Raises ParameterError for a parameter that is no field."""
    unknown = [name for name in params if name not in variant.trace.fields]
    if unknown:
        known = ", ".join(variant.trace.fields) or "none"
        raise ParameterError(f"{variant.name} has no parameter {', '.join(unknown)}: it has {known}")


def check_scalar(variant: Variant, name: str, value: Any) -> int | float:
    """The number of a Scalar, of its type and range; a 0-dim tensor is read."""
    dtype = variant.trace.fields[name].dtype
    if isinstance(value, torch.Tensor) and value.dim() == 0:
        if value.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(f"{variant.name}.{name} requires grad: no backward yet; detach it")
        value = value.item()
    value = plain_number(value)
    if dtype == I32:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ParameterError(f"{variant.name}.{name} is {value!r}: required an int")
        if not I32_MIN <= value <= I32_MAX:
            raise ParameterError(f"{variant.name}.{name} is {value}: required an int of 32 bits")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ParameterError(f"{variant.name}.{name} is {value!r}: required a number")
    if F32_MAX < abs(value) < math.inf:
        raise ParameterError(f"{variant.name}.{name} is {value}: required a number that fits f32, at most {F32_MAX:.6g}")
    return float(value)


def int_list(name: str, given: Any, batch: int) -> list[int]:
    """``batch`` ints of a list or a tensor."""
    if isinstance(given, torch.Tensor):
        if given.dtype not in (torch.int32, torch.int64) or given.dim() != 1:
            raise ParameterError(f"{name} is {given.dtype} {tuple(given.shape)}: required int32 or int64 [{batch}]")
        if given.is_meta:
            raise ParameterError(f"{name} is on meta, without values: required {batch} ints")
        given = given.tolist()
    values = list(given) if isinstance(given, (list, tuple)) else None
    if values is None or not all(isinstance(x, int) and not isinstance(x, bool) for x in values):
        raise ParameterError(f"{name} is {given!r}: required {batch} ints, as a list or an int32 or int64 tensor")
    if len(values) != batch:
        raise ParameterError(f"{name} has {len(values)} entries: required one a request, {batch}")
    return values


def scale_of(variant: Variant, given: float | None, head_dim: int) -> float:
    """The scale of the logits: given, the variant's, or head_dim ** -0.5."""
    scale = given if given is not None else variant.trace.scale
    if scale is None:
        return head_dim**-0.5
    scale = plain_number(scale)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) <= F32_MAX / 2:
        raise ParameterError(f"scale is {scale!r}: required a finite number of magnitude below {F32_MAX / 2:.3g}")
    return float(scale)


def storage_message(variant: Variant, name: str, dtype: str, found: torch.dtype) -> str:
    """What is wrong with a tensor parameter's dtype."""
    allowed = ", ".join(str(t) for t in STORAGE[dtype])
    return f"{variant.name}.{name} has dtype {found}: the field is {dtype}, stored as {allowed}; cast it"


def check_free_axes(fields: Mapping[str, Any], values: Mapping[str, Any], free: set[str]) -> None:
    """Raises ParameterError where the tensors among ``values`` give an axis of a free name two sizes."""
    named: dict[str, tuple[str, int]] = {}
    for name, value in values.items():
        f = fields[name]
        for axis, size in zip(f.axes, value.shape if f.kind == "tensor" else ()):
            if axis in free and named.setdefault(axis, (name, size))[1] != size:
                raise ParameterError(
                    f"axis {axis!r} has {named[axis][1]} entries in {named[axis][0]} and {size} in {name}: required equal"
                )


def free_axes(variant: Variant) -> set[str]:
    """Names of axes that tensors share among themselves alone."""
    return {a for f in variant.trace.used().values() for a in f.axes if isinstance(a, str) and a not in AXES}
