#pragma once
#include <stdint.h>

// Division of 0 ... 2^31 - 1 by a number that is known at run time.
struct Divisor {
  int32_t value, shift;
  uint32_t magic;

  __device__ __forceinline__ void set(int32_t d) {
    value = d, shift = d > 1 ? 63 - __clz(d - 1) : 31;
    magic = (uint32_t)(((1ull << shift) + d - 1) / d);
  }
  __device__ __forceinline__ int32_t quotient(int32_t n) const { return (int32_t)((uint64_t)(uint32_t)n * magic >> shift); }
};
