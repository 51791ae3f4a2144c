"""CUDA kernels that have neither shared memory nor barriers, compiled for this host and run thread by thread.

The kernel's text, its parameter struct and its grid are those of a launch; only PTX and the clock are missing.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from tempfile import TemporaryDirectory

from attngen.build import Recipe, compile_kernel
from attngen.cuda import Specialised
from attngen.render_cuda import render_cuda

SHIM = """#pragma once
#include <math.h>
#include <stdint.h>
#define __device__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define AG_DEVICE static inline
struct Index { unsigned x, y; };
static thread_local Index blockIdx, threadIdx;
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct float2 { float x, y; };
struct int2 { int x, y; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int atomicCAS(int* at, int expected, int value) { int old = *at; if (old == expected) *at = value; return old; }
inline int atomicAdd(int* at, int value) { int old = *at; *at += value; return old; }
inline int atomic_add_acq_rel(int* at, int value) { return atomicAdd(at, value); }
inline void __threadfence() {}
inline void __syncthreads() {}
"""
PTX = """#pragma once
#include "shim.h"
struct Bf16 { uint16_t bits; };
struct F16 { uint16_t bits; };
template <typename To, typename From> inline To bits(From x) { To y; __builtin_memcpy(&y, &x, sizeof y); return y; }
inline float to_float(Bf16 x) { return bits<float>((uint32_t)x.bits << 16); }
inline float to_float(F16 x) { return (float)bits<_Float16>(x.bits); }
template <typename Element> inline uint32_t pack2(float lo, float hi);
inline uint32_t round_bf16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  return x != x ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
template <> inline uint32_t pack2<Bf16>(float lo, float hi) { return round_bf16(lo) | round_bf16(hi) << 16; }
template <> inline uint32_t pack2<F16>(float lo, float hi) {
  return bits<uint16_t>((_Float16)lo) | (uint32_t)bits<uint16_t>((_Float16)hi) << 16;
}
template <typename Element> inline float2 unpack2(uint32_t x) {
  return make_float2(to_float(Element{(uint16_t)x}), to_float(Element{(uint16_t)(x >> 16)}));
}
template <int CHUNKS> constexpr int swizzle(int row, int chunk) { return (row * CHUNKS + chunk) * 16; }
inline void grid_dependency_wait() {}
inline void grid_launch_dependents() {}
"""


class Kernel:
    """What the host extension's CudaKernel is to its caller."""

    def __init__(self, special: Specialised) -> None:
        config = special.config
        files = render_cuda(special.name, None, config, special.layout, None, "on the host")
        run = f"""
extern "C" __attribute__((visibility("default"))) void run(const void* params, unsigned blocks) {{
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < {config.threads}; ++threadIdx.x) attngen_{special.phase}(*(const Params*)params);
}}
"""
        math = "#pragma once\n#include \"shim.h\"\n"  # of math.cuh the plain kernels take INFINITY alone
        files |= {f"{special.name}.cpp": files.pop(f"{special.name}.cu") + run, "ptx.cuh": PTX, "shim.h": SHIM, "math.cuh": math}
        recipe = Recipe("cpu", (f"{special.name}.cpp",), ("-O0", "-std=c++17"))
        with TemporaryDirectory() as folder:
            self.library = ctypes.CDLL(str(compile_kernel(files, recipe, Path(folder)).artifact))
        self.size = special.layout.size

    def launch(self, params: bytearray, grid_x: int, grid_y: int, stream: int) -> None:
        assert len(params) == self.size and grid_y == 1 and grid_x > 0
        self.library.run((ctypes.c_char * self.size).from_buffer(params), grid_x)


_kernels: dict[str, Kernel] = {}


def kernel(special: Specialised) -> Kernel:
    """Compiled once a process."""
    if special.key not in _kernels:
        _kernels[special.key] = Kernel(special)
    return _kernels[special.key]
