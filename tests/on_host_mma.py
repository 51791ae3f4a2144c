"""The decode kernel and attention_sm80, compiled for this host: fibers for threads (on_host_block.py), mma.sync and ldmatrix as PTX
defines them. What cp.async brings lands when its group is waited for, and is NaN until then. Warps take their turns in random
order, and some are held up for as long as others need for whole products."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import on_host
import on_host_block
import stand_in
import test_ops
from attngen import engine_cpu
from attngen.build import Recipe, compile_kernel
from attngen.cuda import Specialised
from attngen.paths import templates_dir
from attngen.render_cuda import render_cuda

SHIM = """
#include <functional>
inline unsigned __reduce_or_sync(unsigned, unsigned x) { return joined((int)x, [](int all, int other, int) { return all | other; }); }
static Meeting of_named[16];
inline void barrier_sync(int id, int threads) { meet(of_named[id], threads); }
inline bool barrier_or(int id, int threads, bool x) {
  static int any[16][3], calls[1024];  // a slot is cleared one call ahead, when all have read what it held
  const int now = calls[threadIdx.x]++ % 3;
  any[id][now] |= x, any[id][(now + 1) % 3] = 0;
  meet(of_named[id], threads);
  return any[id][now];
}

// ---- cp.async: of each thread, groups of copies on their way, oldest first
static std::vector<std::vector<std::function<void()>>> groups[1024];
inline void copy_later(uint32_t smem, const void* global, int bytes, int size) {
  auto& mine = groups[threadIdx.x];
  if (mine.empty()) mine.emplace_back();
  memset(shared_memory + smem, 0xff, size);
  mine.back().push_back([=] { memset(shared_memory + smem, 0, size), memcpy(shared_memory + smem, global, bytes); });
}
inline void cp_async_16(uint32_t smem, const void* global, int bytes = 16) { copy_later(smem, global, bytes, 16); }
inline void cp_async_4_on_host(uint32_t smem, const void* global) { copy_later(smem, global, 4, 4); }
inline void cp_async_commit() {
  auto& mine = groups[threadIdx.x];
  if (mine.empty()) mine.emplace_back();
  mine.emplace_back();  // the last group is open
}
template <int N> inline void cp_async_wait() {
  auto& mine = groups[threadIdx.x];
  while (mine.size() > N + 1) {
    for (auto& land : mine.front()) land();
    mine.erase(mine.begin());
  }
}

// ---- fragments
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  for (int m = 0; m < 4; ++m) {
    const uint32_t row = exchange(smem, 8 * m + threadIdx.x % 32 / 4);
    memcpy(&r[m], shared_memory + row + threadIdx.x % 4 * 4, 4);
  }
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem) {
  for (int m = 0; m < 4; ++m) {
    uint16_t halves[2];
    for (int b = 0; b < 2; ++b) {
      const uint32_t row = exchange(smem, 8 * m + threadIdx.x % 4 * 2 + b);
      memcpy(&halves[b], shared_memory + row + threadIdx.x % 32 / 4 * 2, 2);
    }
    memcpy(&r[m], halves, 4);
  }
}
static uint32_t fragments[1024][6];
template <typename T> inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  memcpy(fragments[threadIdx.x], mine, sizeof mine);
  meet(warp(), 32);
  const int first = threadIdx.x / 32 * 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto half = [&](int lane, int word, int part) { return to_float(T{(uint16_t)(fragments[first + lane][word] >> part * 16)}); };
  for (int e = 0; e < 4; ++e) {
    const int n = 2 * t + e % 2;
    for (int k = 0; k < 16; ++k) d[e] += half(4 * g + k % 8 / 2, e / 2 + k / 8 * 2, k % 2) * half(4 * n + k % 8 / 2, 4 + k / 8, k % 2);
  }
  meet(warp(), 32);
}
"""
_kernels: dict[str, Any] = {}


class Kernel:
    """What the host extension's CudaKernel is to its caller."""

    def __init__(self, special: Specialised) -> None:
        files = render_cuda(special.name, special.hooks, special.config, special.layout, special.problem, "on the host")
        main = files.pop(f"{special.name}.cu")
        main = re.sub(r'asm volatile\("cp\.async\.ca[^;]*;[^;]*;', "cp_async_4_on_host(smem, global);", main)
        main = re.sub(r'asm( volatile)?\("" :[^;]*;', "", main)
        main = main.replace("extern __shared__ __align__(128) char memory[];", "char* const memory = shared_memory;")
        assert "asm" not in re.sub(r"//.*", "", main)
        ptx = (templates_dir() / "cuda" / "ptx.cuh").read_text()
        swizzles = ptx[ptx.index("template <int CHUNKS>") : ptx.index("// 16 bytes from global to shared memory")]
        shim = on_host.SHIM.replace("thread_local ", "").replace("inline void __syncthreads() {}\n", "")
        shim = shim.replace("#define AG_DEVICE static inline\n", "")
        math = test_ops.SHIM.split("#define __forceinline__")[1].partition("\n")[2]
        fake_ptx = re.sub(r"template <int CHUNKS> constexpr int swizzle.*\n", "", on_host.PTX)
        call = on_host_block.RUN.format(kernel=f"attngen_{special.phase}(*launched)", threads=special.config.threads)
        call = call.replace("memset(&of_block, 0, sizeof of_block)", "memset(of_named, 0, sizeof of_named), memset(shared_memory, 0xff, sizeof shared_memory), "
                            "memset(held, 0, sizeof held), memset(&of_block, 0, sizeof of_block)")  # fmt: skip
        call = call.replace("for (Fiber& fiber : fibers) {", "for (auto& x : groups) x.clear();\n    for (Fiber& fiber : fibers) {")
        files |= {
            "kernel.cpp": f'#include "shim.h"\n#include "ptx.cuh"\n#include "mma.h"\n{swizzles}{main}{call}', "ptx.cuh": fake_ptx,
            "shim.h": shim + on_host_block.FIBERS + math, "mma.h": on_host_block.SHARED + "#define HOLD 600\n" + on_host_block.TURNS + SHIM,
        }  # fmt: skip
        with TemporaryDirectory() as folder:
            recipe = Recipe("cpu", ("kernel.cpp",), ("-O2", "-std=c++17", "-march=native", *on_host_block.FLAGS))
            self.library = ctypes.CDLL(str(compile_kernel(files, recipe, Path(folder)).artifact))
        self.size = special.layout.size

    def blocks_per_sm(self) -> int:
        return 1

    def launch(self, params: Any, grid_x: int, grid_y: int = 1, stream: int = 0) -> None:
        assert len(params) == self.size and grid_y == 1 and grid_x > 0
        assert self.library.run((ctypes.c_char * self.size).from_buffer(bytearray(params)), grid_x) == 0, "all threads wait for others"


def load(special: Specialised, *_: Any) -> Any:
    """Compiled once a process."""
    if special.key not in _kernels:
        _kernels[special.key] = (on_host_block.Kernel if special.name == "plan" else Kernel)(special)
    return _kernels[special.key]


def install(monkeypatch: Any) -> None:
    """From here on CPU tensors are what CUDA tensors are, on a GPU of sm_80 with 3 multiprocessors."""
    stand_in.install(monkeypatch, "80", load)
    monkeypatch.setattr(engine_cpu, "CpuEngine", stand_in.Engine)
