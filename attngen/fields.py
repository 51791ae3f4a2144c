"""Typed fields of a variant: what is annotated, read from a class, and what values they take."""

from __future__ import annotations

import builtins
import difflib
import inspect
import numbers
import sys
from dataclasses import field
from typing import Any, ClassVar

import torch

from .errors import VariantError
from .expr import fail
from .ops import BOOL, F32, I32
from .records import record

AXES = ("heads", "kv_heads", "requests", "requests + 1", "positions", "q_tokens", "kv_tokens")
_DTYPES = {float: F32, int: I32, bool: BOOL, torch.float32: F32, torch.bfloat16: F32, torch.float16: F32,
           torch.int32: I32, torch.int64: I32, torch.uint8: I32, torch.bool: BOOL}  # fmt: skip
# The storage dtypes a Tensor field of each value type accepts at the call.
STORAGE = {
    F32: (torch.float32, torch.bfloat16, torch.float16),
    I32: (torch.int32, torch.int64, torch.uint8),
    BOOL: (torch.bool, torch.uint8),
}


@record
class Field:
    """A declared parameter: ``kind`` is "scalar", "const" or "tensor"; ``axes`` only for tensors."""

    kind: str
    dtype: str | None
    axes: tuple[str | int, ...] = ()
    stored: torch.dtype | None = field(default=None, repr=False)  # a tensor's, where a BatchAttention is told no other


class Scalar:
    """A run-time number: f32, or i32 as ``Scalar[int]``. A new value never recompiles."""

    def __new__(cls, *values: Any) -> Any:
        raise _called(cls, values)

    def __class_getitem__(cls, dtype: type) -> Field:
        if dtype not in (int, float):
            raise VariantError(f"Scalar[{dtype!r}]: a Scalar is Scalar (f32), Scalar[float] or Scalar[int] (i32)")
        return Field("scalar", _DTYPES[dtype])


class Const:
    """A compile-time number or bool: its value is part of the kernel."""

    def __new__(cls, *values: Any) -> Any:
        raise _called(cls, values)

    def __class_getitem__(cls, dtype: type) -> Field:
        if dtype not in (int, float, bool):
            raise VariantError(f"Const[{dtype!r}]: a Const is an int, a float or a bool")
        return Field("const", _DTYPES[dtype])


def _called(cls: type, values: tuple[Any, ...]) -> VariantError:
    given = ", ".join(map(repr, values))
    return fail(
        f"{cls.__name__}({given}) is called", f"Annotate the field and assign its value: x: ag.{cls.__name__} = {given or '...'}"
    )


class Tensor(Field):
    """A run-time tensor with named or fixed axes: ``slopes: ag.Tensor("heads")``, ``doc: ag.Tensor("requests",
    "positions", dtype=int)``.

    ``dtype`` is what hooks see: float (default; stored as float32, bfloat16 or float16), int (int32, int64 or uint8;
    int64 wraps to i32) or bool (bool or uint8); a torch dtype or its name ("uint8") is also what BatchAttention expects. The axis names
    heads, kv_heads, requests, requests + 1, positions, q_tokens and kv_tokens are checked against the call's sizes; other
    names are free and must agree; an int is a fixed size.
    A read out of range yields 0 or False.
    """

    def __init__(self, *axes: str | int, dtype: Any = float) -> None:
        if not axes:
            raise VariantError('Tensor() has no axes: name each one, e.g. Tensor("heads"); for one number use Scalar')
        for axis in axes:
            if not isinstance(axis, (str, int)) or (isinstance(axis, int) and axis < 1):
                raise VariantError(f"axis {axis!r} of a Tensor field: an axis is a name or a size of at least 1")
            close = difflib.get_close_matches(str(axis), AXES, n=1, cutoff=0.88)
            if close and axis not in AXES:
                raise VariantError(f"axis {axis!r} of a Tensor field: did you mean {close[0]!r}? A free axis needs another name")
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, dtype)
        if dtype not in _DTYPES:
            raise VariantError(f"Tensor dtype {dtype!r}: hooks see float, int or bool")
        super().__init__("tensor", _DTYPES[dtype], axes, dtype if isinstance(dtype, torch.dtype) else None)


def declared_fields(cls: type) -> dict[str, Field]:
    """The fields that a class body declares, checked; VariantError at the user's line."""
    found = {}
    for name, annotation in _annotations(cls).items():
        if name in ("fields", "trace") or annotation is ClassVar or str(annotation).startswith("typing.ClassVar"):
            continue
        default = cls.__dict__.get(name)
        if annotation is Scalar:
            declared = Field("scalar", F32)
        elif annotation is Const:
            kind = type(default) if isinstance(default, (bool, int, float)) else None
            declared = Field("const", _DTYPES.get(kind))
        elif isinstance(annotation, Field):
            declared = annotation
        elif annotation is Tensor:
            raise fail(f"field `{name}` of {cls.__name__} is a Tensor without axes", 'Write ag.Tensor("heads")')
        else:
            raise fail(
                f"field `{name}` of {cls.__name__} is annotated {annotation!r}",
                "Annotate it ag.Scalar, ag.Scalar[int], ag.Const or ag.Tensor(axes...); leave a plain attribute unannotated",
            )
        check_value(cls.__name__, name, declared, default)
        found[name] = declared
    for name, value in vars(cls).items():
        if name not in found and (isinstance(value, Field) or any(value is t for t in (Scalar, Const, Tensor))):
            raise fail(f"`{name}` of {cls.__name__} is assigned a field's type", f"Annotate it: {name}: ag.{_spelled(value)}")
    return found


def _spelled(field_type: Any) -> str:
    """A field's type as it is written."""
    if not isinstance(field_type, Field):
        return 'Tensor("heads")' if field_type is Tensor else field_type.__name__
    if field_type.kind == "tensor":
        return f"Tensor({', '.join(map(repr, field_type.axes))})"
    return f"{field_type.kind.capitalize()}[{ {F32: 'float', I32: 'int', BOOL: 'bool'}[field_type.dtype] }]"


def _annotations(cls: type) -> dict[str, Any]:
    """The class's own annotations; strings (from __future__ import annotations) are evaluated where it is defined."""
    raw = inspect.get_annotations(cls)
    if not any(isinstance(a, str) for a in raw.values()):
        return raw
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != cls.__module__:
        frame = frame.f_back
    scope = {**vars(builtins), **vars(sys.modules[cls.__module__]), **(frame.f_locals if frame else {})}
    found = {}
    for name, annotation in raw.items():
        try:
            found[name] = eval(annotation, scope) if isinstance(annotation, str) else annotation
        except Exception as error:
            raise fail(f"the annotation `{name}: {annotation}` of {cls.__name__} does not evaluate ({error})",
                       "Annotate with ag.Scalar, ag.Const or ag.Tensor(...)") from error  # fmt: skip
    return found


def plain_number(value: Any) -> Any:
    """Numbers of other libraries (numpy's) as Python's int and float; anything else as it is."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else value


def check_value(owner: str, name: str, declared: Field, value: Any) -> Any:
    """A value for a field at declaration or construction; None leaves it to the call, except for a Const."""
    if value is None:
        return None
    if declared.kind == "tensor":
        if not isinstance(value, torch.Tensor):
            raise fail(f"{owner}.{name} is a Tensor field and got {type(value).__name__}", "Give a torch.Tensor")
        return value
    if isinstance(value, torch.Tensor) and declared.kind == "scalar" and value.dim() == 0:
        return value
    value = plain_number(value)
    wanted = {F32: (int, float), I32: (int,), BOOL: (bool,), None: (bool, int, float)}[declared.dtype]
    if not isinstance(value, wanted) or (isinstance(value, bool) and declared.dtype in (F32, I32)):
        raise fail(f"{owner}.{name} is {declared.kind} {declared.dtype} and got {value!r}", "Give a number of that type")
    return value
