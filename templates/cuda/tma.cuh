// Copies of boxes of tensors by the copy engine (TMA, sm_90).
#pragma once
#include <stdint.h>

// A CUtensorMap, encoded by the host extension.
struct alignas(64) TensorMap { uint64_t words[16]; };

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// The box at (x, row, head, page) to shared memory; its bytes, those outside the tensor too, count at `barrier`.
__device__ __forceinline__ void copy_box(uint32_t smem, const TensorMap* map, uint32_t barrier, int32_t x, int32_t row,
                                         int32_t head, int32_t page) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(smem), "l"(map), "r"(barrier), "r"(x), "r"(row), "r"(head), "r"(page) : "memory");
}
// Makes this thread's ordinary writes to shared memory visible to wgmma and the copy engine, before a barrier.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
