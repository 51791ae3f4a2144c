"""The kernel that finds shared prefixes, compiled for this host: a cluster of blocks, all of whose threads are fibers of one
(on_host_block.py)."""

from __future__ import annotations

import ctypes

import on_host_block
from attngen import cuda
from attngen.abi_cuda import SHARE_FIELDS
from attngen.choose_cuda import ShareConfig
from attngen.render_cuda import render_cuda

THREADS = 64  # of a block; fewer than on a GPU: fibers take time
SHIM = f"""
#define __cluster_dims__(...)
static Meeting of_cluster, of_blocks[16];
static char memories[16][1 << 16] __attribute__((aligned(16)));
inline void cluster_sync() {{ meet(of_cluster, fibers.size()); }}
inline void sync_block() {{ meet(of_blocks[threadIdx.x / {THREADS}], {THREADS}); }}
inline int sync_block_or(int x) {{
  given[threadIdx.x] = x != 0;
  sync_block();
  int any = 0;
  for (int i = 0; i < {THREADS}; ++i) any |= (int)given[threadIdx.x / {THREADS} * {THREADS} + i];
  sync_block();
  return any;
}}
#define __syncthreads sync_block
#define __syncthreads_or sync_block_or
inline uint32_t smem_address(const void* p) {{ return (uint32_t)((const char*)p - memories[threadIdx.x / {THREADS}]); }}

inline void cluster_min(uint32_t address, uint32_t rank, int32_t value) {{
  int32_t& there = *(int32_t*)(memories[rank] + address);
  there = value < there ? value : there;
}}
""" + """
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
        self.special = special or cuda.specialise_plain("share", "on the host", ShareConfig("90a", requests=64, blocks=3), SHARE_FIELDS)
        config = self.special.config
        files = render_cuda("share", None, config, self.special.layout, None, "on the host")
        main = files["share.cu"].replace("extern __shared__ __align__(16) char memory[];", f"char* const memory = memories[threadIdx.x / {THREADS}];")
        main = main.replace(f"THREADS = {config.threads}", f"THREADS = {THREADS}").replace('#include "cluster.cuh"', "")
        main = main.replace("blockIdx.x", "(threadIdx.x / THREADS)").replace("= threadIdx.x, warp", "= threadIdx.x % THREADS, warp")
        assert f"THREADS = {THREADS}" in main and "memories" in main and "threadIdx.x % THREADS" in main
        main = main.replace("const int warp = threadIdx.x / 32,", "const int warp = threadIdx.x % THREADS / 32,")
        files["share.cu"] = SHIM + on_host_block.TURNS + REDUCE + main
        self.library = on_host_block.compiled(files, "share.cu", "attngen_share(*launched)", THREADS * config.blocks)

    def blocks_per_sm(self) -> int:
        return 1

    def launch(self, params: bytearray, grid_x: int = 1, grid_y: int = 1, stream: int = 0) -> None:
        assert len(params) == self.special.layout.size and grid_x in (1, self.special.config.blocks) and grid_y == 1
        assert self.library.run((ctypes.c_char * len(params)).from_buffer(params), 1) == 0, "all threads wait for others"
