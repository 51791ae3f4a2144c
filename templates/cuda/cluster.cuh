// Clusters: blocks that write into each other's shared memory (sm_90).
#pragma once
#include <stdint.h>

// All threads of all blocks of the cluster. What was written before is visible after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The least of a word at an address of this block's shared memory in block `rank` and a value, there.
__device__ __forceinline__ void cluster_min(uint32_t address, uint32_t rank, int32_t value) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nred.relaxed.cluster.shared::cluster.min.s32 [there], %2;\n}"
               ::"r"(address), "r"(rank), "r"(value) : "memory");
}
