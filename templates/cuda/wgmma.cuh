// Matrix products of a warpgroup (wgmma, sm_90a). Operands in shared memory are panels: PANEL elements wide (64, or 32 where
// the head size is no multiple of 64), all rows of the tile below each other, 16-byte chunks swizzled as TMA writes them.
#pragma once
#include <stdint.h>

// The offset of 16-byte chunk `chunk` of row `row` in a panel.
template <int PANEL> __device__ __forceinline__ int panel_offset(int row, int chunk) {
  static_assert(PANEL == 64 || PANEL == 32, "128-byte or 64-byte swizzle");
  return row * 2 * PANEL + ((chunk ^ (PANEL == 64 ? row & 7 : row >> 1 & 3)) << 4);
}

// Descriptor of an operand that starts at `smem`, the swizzle's origin at a multiple of 1024 bytes. Eight rows of a panel are
// a core matrix; `next_panel` is the distance of panels in bytes, which counts where the panels lie along N (V).
template <int PANEL> __device__ __forceinline__ uint64_t matrix_descriptor(uint32_t smem, uint32_t next_panel) {
  constexpr uint64_t EIGHT_ROWS = 16 * PANEL, SWIZZLE = PANEL == 64 ? 1 : 2;
  return (uint64_t)((smem & 0x3ffff) >> 4) | (uint64_t)(next_panel >> 4) << 16 | (EIGHT_ROWS >> 4) << 32 | SWIZZLE << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N of the newest groups are in flight.
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// Holds registers in place: the compiler moves no use of them across products in flight.
template <int N> __device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> __device__ __forceinline__ void pin(uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// Registers of this warpgroup's threads from here on.
template <int COUNT> __device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
