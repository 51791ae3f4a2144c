"""The table of operations: what a row means to torch, to Python and to the C++ and CUDA texts is one thing.

Every row is compiled once a dialect, through the header that kernels include, and tried on edge and random values. The
CUDA text runs here too: its header is plain C++ but for a few intrinsics, which a shim provides.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from attngen.build import Recipe, compile_kernel
from attngen.choose import cpu_flags
from attngen.emit import CTYPE
from attngen.isa import CPU_ISAS, host_isa
from attngen.ops import BOOL, F32, I32, I32_MAX, I32_MIN, OPS, TORCH_DTYPE, c_text
from attngen.paths import templates_dir
from toolchain import needs_nvcc
from trees import ALL_ROWS, FUNCTIONS, Row

INTS = [
    int(x)
    for x in "0 1 -1 2 -2 3 -3 5 -7 16 30 31 32 33 -31 -32 64 1000 -1000 65536 46341 -46341 16777217 1073741824 "
    "-1073741824 2147483647 2147483646 -2147483648 -2147483647".split()
]
FLOATS = [
    float(x)
    for x in "0 -0 1 -1 .5 -.5 1.5 2.5 -2.5 1e-3 .1 .3 .59 .61 9 9.3 -9.3 20 87 -87 88.7 89.5 104 -103 -104.5 127.9 "
    "128 -126.5 -149 -150.5 1e-40 -1e-40 1.17549435e-38 3.4028235e38 -3.4028235e38 1e20 16777217 2147483520 2147483648 "
    "-2147483648 -2147483904 4e9 inf -inf nan".split()
]
ULP = {"exp": 3, "exp2": 3, "log": 4, "log2": 4, "tanh": 4, "sigmoid": 4, "rsqrt": 2}


def values(dtype: str) -> list[float]:
    random = np.random.default_rng(0)
    if dtype == BOOL:
        return [False, True]
    if dtype == I32:
        return [*INTS, *map(int, random.integers(I32_MIN, I32_MAX, 30)), *map(int, random.integers(-50, 50, 20))]
    spread = random.standard_normal(30) * np.exp2(random.integers(-20, 20, 30))
    return [*FLOATS, *map(float, spread.astype(np.float32)), *map(float, np.float32(random.uniform(-12, 12, 40)))]


def arguments(types: tuple[str, ...]) -> list[torch.Tensor]:
    """Every combination of values, one tensor an argument."""
    rows = list(product(*(values(t) for t in types)))
    return [torch.tensor(column, dtype=TORCH_DTYPE[t]) for column, t in zip(zip(*rows), types)]


def row_id(row: Row) -> str:
    return f"{row[0]}-{'-'.join(row[1])}"


# ---------------------------------------------------------------- torch against Python


def wrap(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31


def f32(x: float) -> float:
    try:
        return struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def to_i32(x: float) -> int:
    if isinstance(x, bool):
        return int(x)
    return 0 if math.isnan(x) else I32_MIN if x < I32_MIN else I32_MAX if x > I32_MAX else math.trunc(x)


PYTHON: dict[tuple[str, str], Callable[..., float]] = {
    ("add", I32): lambda a, b: wrap(a + b),
    ("sub", I32): lambda a, b: wrap(a - b),
    ("mul", I32): lambda a, b: wrap(a * b),
    ("floordiv", I32): lambda a, b: wrap(a // b) if b else 0,
    ("mod", I32): lambda a, b: a % b if b else 0,
    ("neg", I32): lambda a: wrap(-a),
    ("abs", I32): lambda a: wrap(abs(a)),
    ("min", I32): min,
    ("max", I32): max,
    ("shl", I32): lambda a, n: wrap(a << n) if 0 <= n < 32 else 0,
    ("shr", I32): lambda a, n: a >> n if 0 <= n < 32 else (-1 if a < 0 else 0),
    ("and", I32): lambda a, b: a & b,
    ("or", I32): lambda a, b: a | b,
    ("xor", I32): lambda a, b: a ^ b,
    ("and", BOOL): lambda a, b: a and b,
    ("or", BOOL): lambda a, b: a or b,
    ("xor", BOOL): lambda a, b: a != b,
    ("not", I32): lambda a: ~a,
    ("not", BOOL): lambda a: not a,
    ("lt", BOOL): lambda a, b: a < b,
    ("le", BOOL): lambda a, b: a <= b,
    ("eq", BOOL): lambda a, b: a == b,
    ("to_i32", I32): to_i32,
    ("to_bool", BOOL): lambda a: a != 0,
    ("to_f32", F32): lambda a: f32(float(a)),
    ("add", F32): lambda a, b: f32(a + b),
    ("sub", F32): lambda a, b: f32(a - b),
    ("mul", F32): lambda a, b: f32(a * b),
    ("neg", F32): lambda a: -a,
    ("abs", F32): abs,
    ("floor", F32): lambda a: float(math.floor(a)) if math.isfinite(a) else a,
    ("min", F32): lambda a, b: math.nan if a != a or b != b else min(a, b),
    ("max", F32): lambda a, b: math.nan if a != a or b != b else max(a, b),
    **{("where", t): lambda c, a, b: a if c else b for t in (F32, I32, BOOL)},
}


@pytest.mark.parametrize("row", [r for r in ALL_ROWS if (r[0], OPS[r[0]].signature[r[1]]) in PYTHON], ids=row_id)
def test_torch_means_what_python_means(row):
    name, types = row
    args = arguments(types)
    found = OPS[name].torch(*args)
    dtype = OPS[name].signature[types]
    assert found.dtype == TORCH_DTYPE[dtype]
    python = PYTHON[name, dtype]
    expected = torch.tensor([python(*xs) for xs in zip(*(a.tolist() for a in args))], dtype=TORCH_DTYPE[dtype])
    assert_same(found, expected, args)


def test_rows_without_a_python_twin_are_the_inexact_ones():
    without = {name for name, types in ALL_ROWS if (name, OPS[name].signature[types]) not in PYTHON}
    assert without == FUNCTIONS | {"div", "sqrt"}  # and these two are IEEE in torch


def assert_same(found: torch.Tensor, expected: torch.Tensor, args: list[torch.Tensor], ulp: float = 0) -> None:
    """Equal, NaN to NaN; floats within ``ulp`` units in the last place of the expected."""
    if not expected.is_floating_point():
        wrong = found != expected
    else:
        largest = expected.abs().nan_to_num(0.0).clamp(max=torch.finfo(torch.float32).max / 2)
        spacing = torch.from_numpy(np.spacing(largest.float().numpy()).astype(np.float64))
        close = (found.double() - expected.double()).abs() <= ulp * spacing
        wrong = ~((found == expected) | (found.isnan() & expected.isnan()) | (close & expected.isfinite()))
    where = wrong.nonzero().flatten()[:5].tolist()
    shown = [([a[i].item() for a in args], found[i].item(), expected[i].item()) for i in where]
    assert not where, f"(arguments, found, required): {shown}, {int(wrong.sum())} in all"


# ---------------------------------------------------------------- the C texts against torch

# What math.cuh needs of CUDA, for a host compiler.
SHIM = """#pragma once
#include <math.h>
#include <stdint.h>
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
template <typename T> inline T __ldg(const T* x) { return *x; }
inline float __int_as_float(int x) { float y; __builtin_memcpy(&y, &x, 4); return y; }
inline int __float2int_rz(float x) { return x >= 2147483648.0f ? INT32_MAX : x < -2147483648.0f ? INT32_MIN : (int)x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __expf(float a) { return expf(a); }
inline float __fdividef(float a, float b) { return a / b; }
"""
EXPORT = 'extern "C" __attribute__((visibility("default")))'


def loops(dialect: str, exact: bool) -> str:
    """C functions, one a row, that apply its text to arrays."""

    def loop(name: str, types: tuple[str, ...]) -> str:
        result = OPS[name].signature[types]
        params = ", ".join(f"const {CTYPE[t]}* x{i}" for i, t in enumerate(types))
        text = c_text(OPS[name], dialect, result, types[0], exact).format(*(f"x{i}[i]" for i in range(len(types))))
        signature = f"{EXPORT} void {name}_{'_'.join(types)}({params}, {CTYPE[result]}* out, long n)"
        return f"{signature} {{\n  for (long i = 0; i < n; i++) out[i] = {text};\n}}"

    return "\n".join(loop(*row) for row in ALL_ROWS)


def headers(dialect: str) -> dict[str, str]:
    if dialect == "cpp":
        return {path.name: path.read_text() for path in (templates_dir() / "cpu").glob("*.h")}
    return {"shim.h": SHIM, "math.cuh": (templates_dir() / "cuda" / "math.cuh").read_text()}


RUNNABLE_ISAS = CPU_ISAS[CPU_ISAS.index(host_isa()) :]
BUILDS = [*(f"cpp-{isa}" for isa in RUNNABLE_ISAS), "cuda-fast", "cuda-exact"]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """The compiled texts: C++ for each instruction set, CUDA with and without contraction forbidden."""
    loaded: dict[str, ctypes.CDLL] = {}

    def get(build: str) -> ctypes.CDLL:
        if build not in loaded:
            dialect, option = build.split("-")
            include = '#include "functions.h"\n' if dialect == "cpp" else '#include "shim.h"\n#include "math.cuh"\n'
            flags = cpu_flags(option) if dialect == "cpp" else ["-O2", "-std=c++17", "-ffp-contract=off"]
            files = {"ops.cpp": include + loops(dialect, option == "exact"), **headers(dialect)}
            folder = tmp_path_factory.mktemp(build)
            result = compile_kernel(files, Recipe("cpu", ("ops.cpp",), tuple(flags)), folder)
            loaded[build] = ctypes.CDLL(str(result.artifact))
        return loaded[build]

    return get


@pytest.mark.parametrize("row", ALL_ROWS, ids=row_id)
@pytest.mark.parametrize("build", BUILDS)
def test_c_text_means_what_torch_means(build, row, libraries):
    name, types = row
    dtype = OPS[name].signature[types]
    args = arguments(types)
    found = torch.empty(len(args[0]), dtype=TORCH_DTYPE[dtype])
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*args, found)]
    libraries(build)[f"{name}_{'_'.join(types)}"](*pointers, ctypes.c_long(len(found)))
    if name not in FUNCTIONS:
        return assert_same(found, OPS[name].torch(*args), args)
    expected = OPS[name].torch(*(a.double() for a in args)).float()
    assert_same(found, expected, args, ULP[name])


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
def test_nvcc_compiles_every_row(arch, exact, tmp_path: Path):
    text = loops("cuda", exact).replace(EXPORT, 'extern "C" __global__')
    files = {"ops.cu": '#include "math.cuh"\n' + text, "math.cuh": headers("cuda")["math.cuh"]}
    recipe = Recipe("cubin", ("ops.cu",), (f"-arch={arch}", "-std=c++17", "-Werror=all-warnings"), artifact="ops.cubin")
    assert compile_kernel(files, recipe, tmp_path).artifact.stat().st_size > 0


# ---------------------------------------------------------------- guarded reads

STORED = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
}


@pytest.mark.parametrize("dialect", ["cpp", "cuda"])
def test_guarded_reads(dialect, tmp_path):
    include = '#include "functions.h"\n' if dialect == "cpp" else '#include "shim.h"\n#include "math.cuh"\n'
    reads = "\n".join(
        f"{EXPORT} double read_{name}(const void* x, int in_range, long at) {{\n"
        f"  return ag_load_{name}(x, in_range != 0, at);\n}}"
        for name in STORED
    )
    flags = cpu_flags("generic") if dialect == "cpp" else ["-O2", "-std=c++17"]
    result = compile_kernel(
        {"reads.cpp": include + reads, **headers(dialect)}, Recipe("cpu", ("reads.cpp",), tuple(flags)), tmp_path
    )
    library = ctypes.CDLL(str(result.artifact))
    for name, dtype in STORED.items():
        stored = torch.tensor([1.5, 0.0, 65504.0, 6e-8]) if dtype.is_floating_point else torch.tensor([7, 0, 200, 3])
        stored = stored.to(dtype)
        read = library[f"read_{name}"]
        read.restype = ctypes.c_double
        for i, x in enumerate(stored.double().tolist()):
            assert read(ctypes.c_void_p(stored.data_ptr()), 1, ctypes.c_long(i)) == x, (name, i)
        assert read(ctypes.c_void_p(stored.data_ptr()), 0, ctypes.c_long(2**40)) == 0.0
    wide = torch.tensor([2**32 + 5, -(2**40) + 1], dtype=torch.int64)
    library.read_i64.restype = ctypes.c_double
    assert [library.read_i64(ctypes.c_void_p(wide.data_ptr()), 1, ctypes.c_long(i)) for i in (0, 1)] == [5.0, 1.0]
