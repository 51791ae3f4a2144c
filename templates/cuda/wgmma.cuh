// Matrix products of a warpgroup (wgmma, sm_90a). Operands in shared memory are panels: PANEL elements wide (64, or 32 where
// the head size is no multiple of 64), all rows of the tile below each other, 16-byte chunks swizzled as TMA writes them.
#pragma once
#include <stdint.h>

// The offset of 16-byte chunk `chunk` of row `row` in a panel.
template <int PANEL> __device__ __forceinline__ int panel_offset(int row, int chunk) {
  static_assert(PANEL == 64 || PANEL == 32, "128-byte or 64-byte swizzle");
  return row * 2 * PANEL + ((chunk ^ (PANEL == 64 ? row & 7 : row >> 1 & 3)) << 4);
}

// An operand is named by a descriptor. Its low word says where the operand starts, in units of 16 bytes, and how far apart its
// panels are, which counts where they lie along N (V); steps inside the operand are added to it. The tile's panels start at a
// multiple of 1024 bytes, the swizzle's origin. The word is the same in all lanes, and the compiler is told so: otherwise it
// would do the additions in vector registers, for each product anew.
__device__ __forceinline__ uint32_t operand(uint32_t smem, uint32_t next_panel) {
  return __shfl_sync(~0u, (smem & 0x3ffff) >> 4 | next_panel >> 4 << 16, 0);
}
// The high word: eight rows of a panel are a core matrix; the swizzle.
template <int PANEL> __device__ __forceinline__ uint64_t descriptor(uint32_t operand) {
  constexpr uint32_t EIGHT_ROWS = 16 * PANEL, SWIZZLE = PANEL == 64 ? 1 : 2;
  uint64_t d;
  asm("mov.b64 %0, {%1, %2};" : "=l"(d) : "r"(operand), "n"(EIGHT_ROWS >> 4 | SWIZZLE << 30));
  return d;
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

// Four 8 x 8 matrices of 16-bit elements to shared memory: lanes 8 i ... 8 i + 7 say where the rows of matrix i go.
__device__ __forceinline__ void stmatrix_x4(uint32_t smem, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(r0), "r"(r1), "r"(r2), "r"(r3) : "memory");
}

// Registers of this warpgroup's threads from here on.
template <int COUNT> __device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)); }
template <int COUNT> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)); }
