"""The Hopper kernel, compiled for this host: its threads are the fibers of on_host_block.py; mbarriers, the copy engine and
wgmma are what PTX says they are, with swizzles and descriptors decoded. Warps take their turns in random order and are held up
now and then; copies land late and in any order, and until then their place holds NaN. A deadlock is seen, and so is an
arrival that a barrier does not expect; what depends on fences or on the hardware's own order is not."""

from __future__ import annotations

import ctypes
import re
import struct
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import on_host
import on_host_block
import test_ops
from attngen.build import Recipe, compile_kernel
from attngen.cuda import Specialised
from attngen.render_cuda import render_cuda

MAP = struct.Struct("=8Q4I2I40x")  # address, sizes, strides in bytes; box; bf16, nan_fill


def tensor_map(address: int, bf16: bool, sizes: tuple, strides: tuple, box: tuple, nan_fill: bool) -> bytes:
    """What the host extension's tensor_map is to its caller, and its checks."""
    assert address % 16 == 0 and all(0 < n <= 1 << 32 for n in sizes) and all(0 < s < 1 << 40 and s % 16 == 0 for s in strides)
    assert box[0] in (32, 64) and all(1 <= n <= 256 for n in box)
    return MAP.pack(address, *sizes, *strides, *box, bf16, nan_fill)


SHIM = """
#include <functional>
#include <map>
struct Dim { unsigned x, y; };
static Dim gridDim;
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline uint32_t __float_as_uint(float x) { uint32_t y; memcpy(&y, &x, 4); return y; }
inline void yield() { end_turn(fibers[threadIdx.x]); }

// ---- copies on their way
struct Copy { uint32_t rounds; std::function<void()> land; };
static std::vector<Copy> copies;
inline void begin_round() {
  draw_turns();
  for (size_t i = 0; i < copies.size();)
    if (copies[i].rounds-- == 0) {
      const auto land = copies[i].land;
      copies.erase(copies.begin() + i);
      land();
    } else {
      ++i;
    }
}
#define IN_FLIGHT !copies.empty()
static bool broken;
#define BROKEN broken

// ---- mbarrier.cuh
struct Barrier { int arrivals, pending; long bytes; unsigned phase; };
static std::map<uint32_t, Barrier> barriers;
inline void settle(Barrier& b) {
  if (b.pending == 0 && b.bytes == 0) b.pending = b.arrivals, ++b.phase, moved = true;
}
inline void mbarrier_init(uint32_t at, uint32_t arrivals) { barriers[at] = {(int)arrivals, (int)arrivals, 0, 0}; }
inline void mbarrier_init_fence() {}
inline Barrier& barrier_at(uint32_t at) {
  if (!barriers.count(at)) abort();
  return barriers[at];
}
inline void mbarrier_arrive(uint32_t at) {
  Barrier& b = barrier_at(at);
  if (b.pending <= 0) broken = true;  // more arrivals than the phase expects
  --b.pending, moved = true;
  settle(b);
}
inline void mbarrier_arrive_expect(uint32_t at, uint32_t bytes) {
  barrier_at(at).bytes += bytes;
  mbarrier_arrive(at);
}
// Copies of a thread land together, and then it arrives.
static std::vector<std::function<void()>> begun[1024];
inline void cp_async_arrive(uint32_t at) {
  copies.push_back({draw(4) ? draw(6) : draw(40), [at, lands = std::move(begun[threadIdx.x])] {
    for (const auto& land : lands) land();
    mbarrier_arrive(at);
  }});
  begun[threadIdx.x].clear(), moved = true;
}
inline void mbarrier_wait(uint32_t at, uint32_t parity) {
  while ((barrier_at(at).phase & 1) == parity) yield();
}
template <int SLOTS> struct Ring {
  uint32_t slot = 0, parity = 0;
  void advance() { if (++slot == SLOTS) slot = 0, parity ^= 1; }
};
static Meeting of_named[16];
inline void barrier_arrive(int id, int threads) {
  Meeting& m = of_named[id];
  if (++m.arrived == threads) m.arrived = 0, ++m.round, moved = true;
}
inline void barrier_sync(int id, int threads) { meet(of_named[id], threads); }

// ---- tma.cuh
struct alignas(64) TensorMap { uint64_t address, sizes[4], strides[3]; uint32_t box[4], bf16, nan_fill; uint64_t rest[5]; };
static_assert(sizeof(TensorMap) == 128, "a CUtensorMap");
inline void prefetch_map(const TensorMap*) {}
inline uint32_t swizzled(uint32_t at, int panel) { return at ^ ((at >> 7 & (panel == 64 ? 7 : 3)) << 4); }
inline void land_box(uint32_t smem, const TensorMap* map, uint32_t barrier, int32_t x, int32_t row, int32_t head, int32_t page) {
  const int64_t at[4] = {x, row, head, page};
  const int panel = map->box[0];
  if (smem % 128) abort();
  uint32_t r = 0;
  for (uint32_t i3 = 0; i3 < map->box[3]; ++i3)
    for (uint32_t i2 = 0; i2 < map->box[2]; ++i2)
      for (uint32_t i1 = 0; i1 < map->box[1]; ++i1, ++r)
        for (int c = 0; c < panel; ++c) {
          const int64_t where[4] = {at[0] + c, at[1] + i1, at[2] + i2, at[3] + i3};
          bool inside = true;
          for (int d = 0; d < 4; ++d) inside &= where[d] >= 0 && where[d] < (int64_t)map->sizes[d];
          uint16_t value = map->nan_fill ? 0x7fff : 0;
          if (inside) memcpy(&value, (const char*)map->address + 2 * where[0] + where[1] * map->strides[0] + where[2] * map->strides[1] + where[3] * map->strides[2], 2);
          memcpy(shared_memory + swizzled(smem + r * 2 * panel + 2 * c / 16 * 16, panel) + 2 * c % 16, &value, 2);
        }
  Barrier& b = barrier_at(barrier);
  b.bytes -= (long)r * 2 * panel, moved = true;
  settle(b);
}
inline void copy_box(uint32_t smem, const TensorMap* map, uint32_t barrier, int32_t x, int32_t row, int32_t head, int32_t page) {
  memset(shared_memory + smem, 0xff, 2l * map->box[0] * map->box[1] * map->box[2] * map->box[3]);
  copies.push_back({draw(4) ? draw(6) : draw(40), [=] { land_box(smem, map, barrier, x, row, head, page); }});
  moved = true;
}
inline void fence_async_proxy() {}
inline void cp_async_16(uint32_t smem, const void* global, int bytes = 16) {
  memset(shared_memory + smem, 0xff, 16);
  begun[threadIdx.x].push_back([=] { memset(shared_memory + smem, 0, 16), memcpy(shared_memory + smem, global, bytes); });
}

// ---- wgmma.cuh
template <int PANEL> inline int panel_offset(int row, int chunk) {
  return row * 2 * PANEL + ((chunk ^ (PANEL == 64 ? row & 7 : row >> 1 & 3)) << 4);
}
inline uint32_t operand(uint32_t smem, uint32_t next_panel) { return (smem & 0x3ffff) >> 4 | next_panel >> 4 << 16; }
template <int PANEL> inline uint64_t descriptor(uint32_t operand) {
  return (uint64_t)operand | (uint64_t)(16 * PANEL >> 4 | (PANEL == 64 ? 1u : 2u) << 30) << 32;
}
struct Matrix {  // an operand in shared memory, as its descriptor says
  uint32_t start, next_panel, eight_rows;
  int panel;
  explicit Matrix(uint64_t d) : start((d & 0x3fff) << 4), next_panel((d >> 16 & 0x3fff) << 4), eight_rows((d >> 32 & 0x3fff) << 4),
                                panel(d >> 62 == 1 ? 64 : 32) {}
  template <typename T> float read(uint32_t at) const {
    T x;
    memcpy(&x, shared_memory + swizzled(at & ~15u, panel) + (at & 15), 2);
    return to_float(x);
  }
  template <typename T> float row_major(int row, int k) const { return read<T>(start + row / 8 * eight_rows + row % 8 * 2 * panel + 2 * k); }
  template <typename T> float column_major(int k, int n) const {
    return read<T>(start + n / panel * next_panel + k / 8 * eight_rows + k % 8 * 2 * panel + n % panel * 2);
  }
};
template <typename T, int N> inline void multiply(float (&d)[N / 2], const float (&a)[2][16], const Matrix& b, bool rows, bool accumulate) {
  for (int e = 0; e < N / 2; ++e) {
    const int h = e / 2 % 2, n = e / 4 * 8 + threadIdx.x % 4 * 2 + e % 2;
    float sum = accumulate ? d[e] : 0.0f;
    for (int k = 0; k < 16; ++k) sum += a[h][k] * (rows ? b.row_major<T>(n, k) : b.column_major<T>(k, n));
    d[e] = sum;
  }
}
template <typename T, int N> inline void scores_on_host(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  const Matrix q(a);
  float rows[2][16];
  for (int h = 0; h < 2; ++h)
    for (int k = 0; k < 16; ++k) rows[h][k] = q.row_major<T>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h, k);
  multiply<T, N>(d, rows, Matrix(b), true, accumulate);
}
static uint32_t fragments[1024][4];
template <typename T, int N> inline void values_on_host(float (&d)[N / 2], const uint32_t* a, uint64_t b, bool accumulate) {
  memcpy(fragments[threadIdx.x], a, 16);
  meet(warp(), 32);
  float rows[2][16];
  for (int h = 0; h < 2; ++h)
    for (int k = 0; k < 16; ++k) {
      const uint32_t word = fragments[threadIdx.x / 4 * 4 + k % 8 / 2][h + k / 8 * 2];
      rows[h][k] = to_float(T{(uint16_t)(word >> k % 2 * 16)});
    }
  meet(warp(), 32);
  multiply<T, N>(d, rows, Matrix(b), false, accumulate);
}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int N> inline void wgmma_wait() {}
template <int N> inline void pin(float (&)[N]) {}
template <int N> inline void pin(uint32_t (&)[N]) {}
inline void stmatrix_x4(uint32_t smem, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  const uint32_t words[4] = {r0, r1, r2, r3};
  for (int i = 0; i < 4; ++i) {
    const uint32_t row = exchange(smem, 8 * i + threadIdx.x % 32 / 4);
    memcpy(shared_memory + row + threadIdx.x % 4 * 4, words + i, 4);
  }
}
template <int COUNT> inline void give_registers() {}
template <int COUNT> inline void take_registers() {}
"""
WGMMA = re.compile(r"DEVICE void wgmma_(\w+)\(float \(&d\)\[(\d+)\](.*?)\{\n.*?\n\}\n", re.S)


class Kernel:
    """What the host extension's CudaKernel is to its caller."""

    def __init__(self, special: Specialised) -> None:
        files = render_cuda(special.name, special.hooks, special.config, special.layout, special.problem, "on the host")
        main = files.pop(f"{special.name}.cu")
        main = WGMMA.sub(
            lambda m: f"DEVICE void wgmma_{m[1]}(float (&d)[{m[2]}]{m[3]}{{ {m[1]}_on_host<Element, {2 * int(m[2])}>(d, a, b, accumulate); }}\n", main
        )
        assert main.count("_on_host<Element") == 2
        main = re.sub(r'asm volatile\("" :[^;]*;', "", main)
        main = main.replace("extern __shared__ __align__(1024) char memory[];", "char* const memory = shared_memory;")
        main = main.replace("const __grid_constant__ Params", "const Params&")  # copies on their way outlive the thread that asked for them
        assert "attngen_attention(const Params& p)" in main
        assert "asm" not in re.sub(r"//.*", "", main)
        shim = on_host.SHIM.replace("thread_local ", "").replace("inline void __syncthreads() {}\n", "")
        shim = shim.replace("#define AG_DEVICE static inline\n", "")
        math = test_ops.SHIM.split("#define __forceinline__")[1].partition("\n")[2]
        run = on_host_block.RUN.format(kernel=f"attngen_{special.phase}(*launched)", threads=special.config.threads)
        run = run.replace("memset(&of_block, 0, sizeof of_block)", "gridDim.x = blocks, broken = false, copies.clear(), barriers.clear(), memset(held, 0, sizeof held), memset(of_named, 0, sizeof of_named), "
                          "memset(shared_memory, 0xff, sizeof shared_memory), memset(&of_block, 0, sizeof of_block)")  # fmt: skip
        for name in ("mbarrier.cuh", "tma.cuh", "wgmma.cuh"):
            files[name] = "#pragma once\n"
        files |= {
            "kernel.cpp": f'#include "shim.h"\n#include "ptx.cuh"\n#include "hopper.h"\n{main}{run}', "ptx.cuh": on_host.PTX,
            "shim.h": shim + on_host_block.FIBERS + math, "hopper.h": on_host_block.SHARED + "#define BEGIN_ROUND begin_round()\n" + on_host_block.TURNS + SHIM,
        }  # fmt: skip
        recipe = Recipe("cpu", ("kernel.cpp",), ("-O1", "-std=c++17", "-march=native", *on_host_block.FLAGS))
        with TemporaryDirectory() as folder:
            self.library = ctypes.CDLL(str(compile_kernel(files, recipe, Path(folder)).artifact))
        self.size = special.layout.size

    def blocks_per_sm(self) -> int:
        return 1

    def launch(self, params: Any, grid_x: int, grid_y: int = 1, stream: int = 0) -> None:
        assert len(params) == self.size and grid_y == 1 and grid_x > 0
        raw = (ctypes.c_char * (self.size + 64)).from_buffer(bytearray(self.size + 64))
        at = ctypes.addressof(raw)
        aligned = at + -at % 64
        ctypes.memmove(aligned, bytes(params), self.size)
        status = self.library.run(ctypes.c_void_p(aligned), grid_x)
        assert status == 0, {1: "all threads wait for others", 2: "a barrier has more arrivals than it expects"}[status]
