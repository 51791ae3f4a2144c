"""CUDA kernels with barriers, compiled for this host: the threads of a block are fibers that take turns, and change over where
they meet. As on_host.py, for kernels whose threads exchange values; blocks run one after another."""

from __future__ import annotations

import ctypes
from pathlib import Path
from tempfile import TemporaryDirectory

import on_host
import test_ops
from attngen.build import Recipe, compile_kernel
from attngen.cuda import Specialised
from attngen.render_cuda import render_cuda

FLAGS = ("-U_FORTIFY_SOURCE",)  # whose longjmp refuses to enter another stack
FIBERS = """#pragma once
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>
#include <vector>
#define __shared__ static
struct Fiber { ucontext_t context; jmp_buf at; std::vector<char> stack; bool begun, done; };
struct Meeting { int arrived, round; };
static std::vector<Fiber> fibers;
static jmp_buf turns;
// Contexts only begin fibers: swapcontext would be two system calls a turn.
__attribute__((noinline)) inline void go_on(Fiber& fiber) {
  if (_setjmp(turns)) return;
  if (fiber.begun) _longjmp(fiber.at, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}
__attribute__((noinline)) inline void end_turn(Fiber& fiber) {
  if (!_setjmp(fiber.at)) _longjmp(turns, 1);
  asm volatile("" ::: "memory");  // others have had their turns
}
static Meeting of_block, of_warp[32];
static bool moved;  // somebody went on since the last turn began
static int64_t given[1024];
inline void meet(Meeting& m, int count) {
  const int round = m.round, self = threadIdx.x;
  if (++m.arrived == count) m.arrived = 0, ++m.round, moved = true;
  while (m.round == round) end_turn(fibers[self]);
}
inline void __syncthreads() { meet(of_block, fibers.size()); }
inline int __syncthreads_count(int x) {
  given[threadIdx.x] = x != 0;
  __syncthreads();
  int count = 0;
  for (size_t i = 0; i < fibers.size(); ++i) count += given[i];
  __syncthreads();
  return count;
}
inline int __syncthreads_and(int x) { return __syncthreads_count(x) == (int)fibers.size(); }
inline Meeting& warp() { return of_warp[threadIdx.x / 32]; }
inline void __syncwarp() { meet(warp(), 32); }
template <typename T> inline T exchange(T x, int lane) {
  memcpy(&given[threadIdx.x], &x, sizeof(T));
  meet(warp(), 32);
  memcpy(&x, &given[threadIdx.x / 32 * 32 + lane], sizeof(T));
  meet(warp(), 32);
  return x;
}
template <typename T> inline T __shfl_sync(unsigned, T x, int lane) { return exchange(x, lane); }
template <typename T> inline T __shfl_xor_sync(unsigned, T x, int mask) { return exchange(x, threadIdx.x % 32 ^ mask); }
template <typename T> inline T __shfl_up_sync(unsigned, T x, int by) {
  const int lane = threadIdx.x % 32;
  return exchange(x, lane < by ? lane : lane - by);
}
template <typename Join> inline int joined(int x, Join join) {  // of the warp's values, with their lanes
  given[threadIdx.x] = x;
  meet(warp(), 32);
  const int64_t* values = given + threadIdx.x / 32 * 32;
  int result = join(0, (int)values[0], 0);
  for (int lane = 1; lane < 32; ++lane) result = join(result, (int)values[lane], lane);
  meet(warp(), 32);
  return result;
}
inline int __reduce_max_sync(unsigned, int x) {
  return joined(x, [](int most, int other, int lane) { return lane && most > other ? most : other; });
}
inline int __reduce_min_sync(unsigned, int x) {
  return joined(x, [](int least, int other, int lane) { return lane && least < other ? least : other; });
}
inline unsigned __ballot_sync(unsigned, int x) {
  return joined(x, [](int bits, int other, int lane) { return bits | (int)((unsigned)(other != 0) << lane); });
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
"""
# Warps take their turns in random order and are held up now and then; HOLD is the longest, in rounds.
TURNS = """
#ifndef HOLD
#define HOLD 30
#endif
static uint32_t chance = 1;
inline uint32_t draw(uint32_t below) { return (chance = chance * 1664525u + 1013904223u) >> 8, (chance >> 8) % below; }
static unsigned turn_of[64], held[64];
inline void draw_turns() {
  for (unsigned w = 0; w < fibers.size() / 32; ++w) {
    const unsigned other = draw(w + 1);
    turn_of[w] = turn_of[other], turn_of[other] = w;
    held[w] = held[w] ? held[w] - 1 : draw(20) ? 0 : draw(draw(25) ? 30 : HOLD);
    if (held[w]) moved = true;
  }
}
#define FIBER(turn) (turn_of[turn / 32] * 32 + turn % 32)
#define HELD_UP(fiber) held[fiber / 32]
#ifndef BEGIN_ROUND
#define BEGIN_ROUND draw_turns()
#define IN_FLIGHT false
#define BROKEN false
#endif
"""
# Launches `kernel`; 1 if all its threads wait for others. A shim may say what happens between rounds, in which order threads take
# their turns and which of them miss one, whether something is on its way that will wake them, and that all is lost (2).
SHARED = """#pragma once  // of kernels that use shared memory by address
static char shared_memory[1 << 18] __attribute__((aligned(1024)));
inline uint32_t smem_address(const void* p) { return (uint32_t)((const char*)p - shared_memory); }
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline float __fmul_rz(float a, float b) {
  const double exact = (double)a * b;
  const float near = (float)exact;
  return fabs((double)near) <= fabs(exact) ? near : nextafterf(near, 0.0f);
}
template <typename T> inline T __ldcg(const T* p) { return *p; }
template <typename T> inline void __stcg(T* p, T x) { *p = x; }
inline float ex2(float x) { return exp2f(x); }
inline float lg2(float x) { return log2f(x); }
"""
RUN = """
#ifndef BEGIN_ROUND
#define BEGIN_ROUND
#define FIBER(turn) turn
#define HELD_UP(fiber) false
#define IN_FLIGHT false
#define BROKEN false
#endif
static const Params* launched;
static void thread_main() {{
  const int self = threadIdx.x;
  {kernel};
  fibers[self].done = true, moved = true;
  end_turn(fibers[self]);
}}
extern "C" __attribute__((visibility("default"))) int run(const void* params, unsigned blocks) {{
  launched = (const Params*)params;
  fibers.resize({threads});
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {{
    memset(&of_block, 0, sizeof of_block), memset(of_warp, 0, sizeof of_warp);
    for (Fiber& fiber : fibers) {{
      fiber.stack.resize(1 << 16), fiber.begun = fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
      makecontext(&fiber.context, thread_main, 0);
    }}
    for (size_t left = fibers.size(); left;) {{
      left = 0, moved = false;
      BEGIN_ROUND;
      for (unsigned turn = 0; turn < fibers.size(); ++turn) {{
        const unsigned self = threadIdx.x = FIBER(turn);
        if (fibers[self].done) continue;
        if (HELD_UP(self)) {{
          ++left;
          continue;
        }}
        go_on(fibers[self]);
        left += !fibers[self].done;
      }}
      if (BROKEN) return 2;
      if (left && !moved && !IN_FLIGHT) return 1;
    }}
  }}
  return 0;
}}
"""


class Kernel:
    """What the host extension's CudaKernel is to its caller."""

    def __init__(self, special: Specialised) -> None:
        config, name = special.config, special.name
        files = render_cuda(name, special.hooks, config, special.layout, special.problem, "on the host")
        self.library = compiled(files, f"{name}.cu", f"attngen_{special.phase}(*launched)", config.threads)
        self.size = special.layout.size

    def launch(self, params: bytearray, grid_x: int, grid_y: int = 1, stream: int = 0) -> None:
        assert len(params) == self.size and grid_y == 1 and grid_x > 0
        assert self.library.run((ctypes.c_char * self.size).from_buffer(params), grid_x) == 0, "all threads wait for others"


def compiled(files: dict[str, str], main: str, call: str, threads: int) -> ctypes.CDLL:
    """A library with ``run(params, blocks)``, which calls a kernel of ``main`` with ``const Params* launched``."""
    shim = on_host.SHIM.replace("thread_local ", "").replace("inline void __syncthreads() {}\n", "")
    shim = shim.replace("#define AG_DEVICE static inline\n", "") + FIBERS
    math = test_ops.SHIM.split("#define __forceinline__")[1].partition("\n")[2]  # what math.cuh needs beside
    run = RUN.format(kernel=call, threads=threads)
    files = {**files, "kernel.cpp": f'#include "shim.h"\n{files[main]}{run}', "ptx.cuh": on_host.PTX, "shim.h": shim + math}
    with TemporaryDirectory() as folder:
        recipe = Recipe("cpu", ("kernel.cpp",), ("-O1", "-std=c++17", *FLAGS))
        return ctypes.CDLL(str(compile_kernel(files, recipe, Path(folder)).artifact))
