// Clusters: blocks that write into each other's shared memory (sm_90).
#pragma once
#include <stdint.h>

// All threads of all blocks of the cluster. What was written before is visible after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Writes a word at an address of this block's shared memory into that of block `rank`.
__device__ __forceinline__ void cluster_store(uint32_t address, uint32_t rank, int32_t value) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nst.shared::cluster.b32 [there], %2;\n}"
               ::"r"(address), "r"(rank), "r"(value) : "memory");
}
