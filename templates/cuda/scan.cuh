// Sums over the threads of a block, for planners.
#pragma once
#include <stdint.h>

// Sums of x and y over the threads before this one, and over all of them. One barrier: a scan's `sums` are not those of the scan before.
struct Scan { int64_t x, y, all_x, all_y; };
struct Sums { int64_t x, y; };
template <int LANES> __device__ __forceinline__ Sums warp_scan(Sums s) {  // inclusive
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int o = 1; o < LANES; o <<= 1) {
    const int64_t below_x = __shfl_up_sync(~0u, s.x, o), below_y = __shfl_up_sync(~0u, s.y, o);
    if (lane >= o) s.x += below_x, s.y += below_y;
  }
  return s;
}
template <int WARPS> __device__ __forceinline__ Scan block_scan(int64_t x, int64_t y, Sums* sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  static_assert(WARPS <= 32, "a warp sums up the warps");
  const Sums mine = warp_scan<32>({x, y});
  if (lane == 31) sums[warp] = mine;
  __syncthreads();
  const Sums own = lane < WARPS ? sums[lane] : Sums{0, 0}, up_to = warp_scan<WARPS>(own);
  return {mine.x - x + __shfl_sync(~0u, up_to.x - own.x, warp), mine.y - y + __shfl_sync(~0u, up_to.y - own.y, warp),
          __shfl_sync(~0u, up_to.x, WARPS - 1), __shfl_sync(~0u, up_to.y, WARPS - 1)};
}
