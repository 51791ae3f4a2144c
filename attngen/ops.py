"""The table of operations: one row says everything attngen knows about an op.

A row holds the type rule, the meaning (on torch tensors: the oracle), the C text of each dialect and a cost in
ALU operations, used to decide whether a hoisted value is stored or recomputed. To add an op, add a row, its helper
to ``templates/cpu/math.h`` and ``templates/cuda/math.cuh`` if the text calls one, and a name to ``expr.py`` if users
should write it; ``tests/test_ops.py`` then checks the row in every backend.

Meaning, everywhere: i32 wraps; ``//`` and ``%`` floor and yield 0 for a zero divisor; a shift by an amount outside
0..31 shifts everything out; casting f32 to i32 truncates, saturates and takes NaN to 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from .records import record

F32, I32, BOOL = "f32", "i32", "bool"
DTYPES = (F32, I32, BOOL)
TORCH_DTYPE = {F32: torch.float32, I32: torch.int32, BOOL: torch.bool}
I32_MIN, I32_MAX = -(2**31), 2**31 - 1

Signature = dict[tuple[str, ...], str]

# Type rules: argument types -> result type. A call that matches no key is a type error.
_FLOAT1: Signature = {(F32,): F32}
_FLOAT2: Signature = {(F32, F32): F32}
_INT2: Signature = {(I32, I32): I32}
_ARITH2: Signature = {(F32, F32): F32, (I32, I32): I32}
_ARITH1: Signature = {(F32,): F32, (I32,): I32}
_BITS2: Signature = {(I32, I32): I32, (BOOL, BOOL): BOOL}
_ORDER: Signature = {(F32, F32): BOOL, (I32, I32): BOOL}
_EQUAL: Signature = _ORDER | {(BOOL, BOOL): BOOL}
_WHERE: Signature = {(BOOL, t, t): t for t in DTYPES}


@record
class Op:
    """One operation. ``cpp`` and ``cuda`` map a result type (or "arg:type" of the first argument) to C text;
    ``cuda["exact"]`` is the text that forbids contraction, for f32 values that feed a comparison, floor or cast."""

    name: str
    signature: Signature
    torch: Callable[..., torch.Tensor]
    cpp: dict[str, str]
    cuda: dict[str, str]
    cost: int = 1
    discrete: bool = False  # a small change of an f32 argument can change the result by a lot
    commutative: bool = False


def _wrap(f: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """i32 arithmetic that wraps: exact in int64, then truncated."""

    def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype == torch.int32:
            return f(a.long(), b.long()).to(torch.int32)
        return f(a, b)

    return run


def _nonzero(f: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        zero = b == 0
        return torch.where(zero, 0, f(a.long(), torch.where(zero, 1, b).long())).to(torch.int32)

    return run


def _shl(a: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    inside = (n >= 0) & (n < 32)
    return torch.where(inside, a.long() << torch.where(inside, n, 0).long(), 0).to(torch.int32)


def _shr(a: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    inside = (n >= 0) & (n < 32)
    return (a.long() >> torch.where(inside, n, 31).long()).to(torch.int32)


def _neg(a: torch.Tensor) -> torch.Tensor:
    return (-a.long()).to(torch.int32) if a.dtype == torch.int32 else -a


def _abs(a: torch.Tensor) -> torch.Tensor:
    return a.long().abs().to(torch.int32) if a.dtype == torch.int32 else a.abs()


def _to_i32(a: torch.Tensor) -> torch.Tensor:
    if a.dtype == torch.int64:  # a stored i64 tensor: i32 wraps
        return a.to(torch.int32)
    if not a.is_floating_point():
        return a.to(torch.int32)
    return a.double().nan_to_num(0.0).clamp(I32_MIN, I32_MAX).trunc().to(torch.int32)


def _to_f32(a: torch.Tensor) -> torch.Tensor:
    return a.to(torch.float32)  # an i32 above 2^24 rounds here, in the oracle as in the kernels


def _sqrt(a: torch.Tensor) -> torch.Tensor:
    return a.double().sqrt().to(a.dtype)  # torch's own float32 square root is not always the IEEE one


def _not(a: torch.Tensor) -> torch.Tensor:
    return ~a


_ROWS = [
    # arithmetic. The CPU builds with -ffp-contract=off; CUDA has texts that forbid contraction where it matters.
    Op("add", _ARITH2, _wrap(lambda a, b: a + b), {F32: "{0} + {1}", I32: "ag_add({0}, {1})"},
       {F32: "{0} + {1}", "exact": "__fadd_rn({0}, {1})", I32: "ag_add({0}, {1})"}, commutative=True),
    Op("sub", _ARITH2, _wrap(lambda a, b: a - b), {F32: "{0} - {1}", I32: "ag_sub({0}, {1})"},
       {F32: "{0} - {1}", "exact": "__fsub_rn({0}, {1})", I32: "ag_sub({0}, {1})"}),
    Op("mul", _ARITH2, _wrap(lambda a, b: a * b), {F32: "{0} * {1}", I32: "ag_mul({0}, {1})"},
       {F32: "{0} * {1}", "exact": "__fmul_rn({0}, {1})", I32: "ag_mul({0}, {1})"}, commutative=True),
    Op("div", _FLOAT2, lambda a, b: a / b, {F32: "{0} / {1}"}, {F32: "{0} / {1}", "exact": "__fdiv_rn({0}, {1})"}, cost=6),
    Op("floordiv", _INT2, _nonzero(lambda a, b: a.div(b, rounding_mode="floor")),
       {I32: "ag_floordiv({0}, {1})"}, {I32: "ag_floordiv({0}, {1})"}, cost=12),
    Op("mod", _INT2, _nonzero(lambda a, b: a - b * a.div(b, rounding_mode="floor")),
       {I32: "ag_mod({0}, {1})"}, {I32: "ag_mod({0}, {1})"}, cost=12),
    Op("neg", _ARITH1, _neg, {F32: "-{0}", I32: "ag_neg({0})"}, {F32: "-{0}", I32: "ag_neg({0})"}),
    Op("abs", _ARITH1, _abs, {F32: "ag_abs({0})", I32: "ag_abs({0})"}, {F32: "ag_abs({0})", I32: "ag_abs({0})"}),
    Op("min", _ARITH2, torch.minimum, {F32: "ag_min({0}, {1})", I32: "ag_min({0}, {1})"},
       {F32: "ag_min({0}, {1})", I32: "ag_min({0}, {1})"}, commutative=True),
    Op("max", _ARITH2, torch.maximum, {F32: "ag_max({0}, {1})", I32: "ag_max({0}, {1})"},
       {F32: "ag_max({0}, {1})", I32: "ag_max({0}, {1})"}, commutative=True),
    # functions
    Op("exp", _FLOAT1, torch.exp, {F32: "ag_exp({0})"}, {F32: "ag_exp({0})"}, cost=10),
    Op("exp2", _FLOAT1, torch.exp2, {F32: "ag_exp2({0})"}, {F32: "ag_exp2({0})"}, cost=9),
    Op("log", _FLOAT1, torch.log, {F32: "ag_log({0})"}, {F32: "ag_log({0})"}, cost=12),
    Op("log2", _FLOAT1, torch.log2, {F32: "ag_log2({0})"}, {F32: "ag_log2({0})"}, cost=12),
    Op("tanh", _FLOAT1, torch.tanh, {F32: "ag_tanh({0})"}, {F32: "ag_tanh({0})"}, cost=14),
    Op("sigmoid", _FLOAT1, torch.sigmoid, {F32: "ag_sigmoid({0})"}, {F32: "ag_sigmoid({0})"}, cost=14),
    Op("sqrt", _FLOAT1, _sqrt, {F32: "ag_sqrt({0})"}, {F32: "sqrtf({0})", "exact": "__fsqrt_rn({0})"}, cost=6),
    Op("rsqrt", _FLOAT1, torch.rsqrt, {F32: "ag_rsqrt({0})"}, {F32: "ag_rsqrt({0})"}, cost=8),
    Op("floor", _FLOAT1, torch.floor, {F32: "ag_floor({0})"}, {F32: "floorf({0})"}, discrete=True),
    # casts: named by their result
    Op("to_f32", {(I32,): F32, (BOOL,): F32}, _to_f32, {F32: "(float)({0})"}, {F32: "(float)({0})"}),
    Op("to_i32", {(F32,): I32, (BOOL,): I32}, _to_i32,
       {"arg:f32": "ag_cast_i32({0})", "arg:bool": "(int32_t)({0})"},
       {"arg:f32": "ag_cast_i32({0})", "arg:bool": "(int32_t)({0})"}, discrete=True),
    Op("to_bool", {(F32,): BOOL, (I32,): BOOL}, lambda a: a != 0,
       {BOOL: "({0} != 0)"}, {BOOL: "({0} != 0)"}, discrete=True),
    # bits and logic
    Op("and", _BITS2, torch.bitwise_and, {I32: "{0} & {1}", BOOL: "{0} & {1}"}, {I32: "{0} & {1}", BOOL: "{0} & {1}"},
       commutative=True),
    Op("or", _BITS2, torch.bitwise_or, {I32: "{0} | {1}", BOOL: "{0} | {1}"}, {I32: "{0} | {1}", BOOL: "{0} | {1}"},
       commutative=True),
    Op("xor", _BITS2, torch.bitwise_xor, {I32: "{0} ^ {1}", BOOL: "{0} ^ {1}"}, {I32: "{0} ^ {1}", BOOL: "{0} ^ {1}"},
       commutative=True),
    Op("not", {(BOOL,): BOOL, (I32,): I32}, _not, {I32: "~{0}", BOOL: "!{0}"}, {I32: "~{0}", BOOL: "!{0}"}),
    Op("shl", _INT2, _shl, {I32: "ag_shl({0}, {1})"}, {I32: "ag_shl({0}, {1})"}, cost=2),
    Op("shr", _INT2, _shr, {I32: "ag_shr({0}, {1})"}, {I32: "ag_shr({0}, {1})"}, cost=2),
    # comparisons. > and >= swap their arguments, != is not(==).
    Op("lt", _ORDER, torch.lt, {BOOL: "{0} < {1}"}, {BOOL: "{0} < {1}"}, discrete=True),
    Op("le", _ORDER, torch.le, {BOOL: "{0} <= {1}"}, {BOOL: "{0} <= {1}"}, discrete=True),
    Op("eq", _EQUAL, torch.eq, {BOOL: "{0} == {1}"}, {BOOL: "{0} == {1}"}, discrete=True, commutative=True),
    Op("where", _WHERE, torch.where, {t: "{0} ? {1} : {2}" for t in DTYPES}, {t: "{0} ? {1} : {2}" for t in DTYPES}),
]

OPS: dict[str, Op] = {row.name: row for row in _ROWS}


def c_text(op: Op, dialect: str, dtype: str, arg_dtype: str, exact: bool = False) -> str:
    """The C text of ``op`` in ``dialect`` ("cpp" or "cuda") for a result and a first-argument type."""
    texts = op.cpp if dialect == "cpp" else op.cuda
    if exact and dtype == F32 and "exact" in texts:
        return texts["exact"]
    return texts[dtype] if dtype in texts else texts[f"arg:{arg_dtype}"]


def is_operand(text: str) -> bool:
    """Whether C text binds tighter than any operator: a name, a literal, a call or one pair of parentheses."""
    if re.fullmatch(r"[\w.]+", text):
        return True
    start = re.match(r"[\w.]*\(", text)
    if not start or not text.endswith(")"):
        return False
    depth = 0
    for i, ch in enumerate(text):
        depth += (ch == "(") - (ch == ")")
        if depth == 0 and ch == ")" and i < len(text) - 1:
            return False
    return True


def operand(text: str) -> str:
    """C text, in parentheses where an operator beside it would need them."""
    return text if is_operand(text) else f"({text})"


def scaled(factor: int, text: str) -> str:
    """A C operand times a constant; '' for 0."""
    if factor == 0:
        return ""
    return text if factor == 1 else f"{factor} * {text}" if factor != -1 else f"-{text}"


def sum_text(*parts: str) -> str:
    """The sum of C texts, of which empty ones are 0."""
    return " + ".join(p for p in parts if p).replace("+ -", "- ") or "0"
