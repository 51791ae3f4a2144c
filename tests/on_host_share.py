"""The kernel that finds shared prefixes, compiled for this host: one block, its threads as fibers (on_host_block.py)."""

from __future__ import annotations

import ctypes

import on_host_block
from attngen import cuda
from attngen.abi_cuda import SHARE_FIELDS
from attngen.choose_cuda import ShareConfig
from attngen.render_cuda import render_cuda

SHIM = """
template <typename T> inline T atomic(T* at, T value) { T old = *at; *at = value; return old; }
inline int atomicMin(int* at, int x) { return atomic(at, x < *at ? x : *at); }
inline int atomicMax(int* at, int x) { return atomic(at, x > *at ? x : *at); }
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long x) { return atomic(at, *at + x); }
inline unsigned long long atomicMax(unsigned long long* at, unsigned long long x) { return atomic(at, x > *at ? x : *at); }
template <typename T> inline T atomicCAS(T* at, T expected, T value) { T old = *at; if (old == expected) *at = value; return old; }
template <typename T> inline unsigned __match_any_sync(unsigned, T x) {
  memcpy(&given[threadIdx.x], &x, sizeof(T));
  meet(warp(), 32);
  unsigned peers = 0;
  for (int lane = 0; lane < 32; ++lane) peers |= (unsigned)(memcmp(&given[threadIdx.x / 32 * 32 + lane], &x, sizeof(T)) == 0) << lane;
  meet(warp(), 32);
  return peers;
}
template <typename T> inline void __match_all_sync(unsigned mask, T x, int* all) { *all = __match_any_sync(mask, x) == ~0u; }
inline int __all_sync(unsigned, int x) { return __ballot_sync(~0u, !x) == 0; }
inline int __syncthreads_or(int x) { return __syncthreads_count(x) != 0; }
"""
# Whole warps take part; the mask says whose values count.
REDUCE = """
template <typename Better> inline int best_of(unsigned mask, int x, Better better) {
  given[threadIdx.x] = x;
  meet(warp(), 32);
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1 && better((int)given[threadIdx.x / 32 * 32 + lane], x)) x = (int)given[threadIdx.x / 32 * 32 + lane];
  meet(warp(), 32);
  return x;
}
inline int __reduce_add_sync(unsigned, int x) { return joined(x, [](int all, int other, int) { return all + other; }); }
#define __reduce_min_sync(mask, x) best_of(mask, x, [](int a, int b) { return a < b; })
#define __reduce_max_sync(mask, x) best_of(mask, x, [](int a, int b) { return a > b; })
"""


class Kernel:
    """What the host extension's CudaKernel is to its caller, for batches of up to 64 requests."""

    def __init__(self, special: cuda.Specialised | None = None) -> None:
        self.special = special or cuda.specialise_plain("share", "on the host", ShareConfig("90a", requests=64, blocks=1), SHARE_FIELDS)
        config = self.special.config
        threads = 128  # fewer than on a GPU: fibers take time
        files = render_cuda("share", None, config, self.special.layout, None, "on the host")
        main = files["share.cu"].replace("extern __shared__ __align__(16) char memory[];", "static char memory[1 << 18] __attribute__((aligned(16)));")
        files["share.cu"] = SHIM + REDUCE + main.replace(f"THREADS = {config.threads}", f"THREADS = {threads}")
        self.library = on_host_block.compiled(files, "share.cu", "attngen_share(*launched)", threads)

    def blocks_per_sm(self) -> int:
        return 1

    def launch(self, params: bytearray, grid_x: int = 1, grid_y: int = 1, stream: int = 0) -> None:
        assert len(params) == self.special.layout.size and grid_x == grid_y == 1
        assert self.library.run((ctypes.c_char * len(params)).from_buffer(params), 1) == 0, "all threads wait for others"
