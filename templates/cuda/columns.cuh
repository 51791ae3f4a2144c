// What a mask keeps of a thread's columns of 128 keys: bit 2 * j + b of a word stands for key first + 8 * j + b, where scores lie in the
// accumulators of mma and wgmma. attngen/columns.py makes the texts that use it.
#pragma once
#include <stdint.h>

AG_DEVICE uint32_t ag_columns_all(bool kept) { return kept ? ~0u : 0u; }

// Keys below `limit`; first is not negative.
AG_DEVICE uint32_t ag_columns_below(int32_t first, int32_t limit) {
  const uint32_t n = (uint32_t)(ag_max(limit, first) - first), rest = n & 7, count = (n >> 3) * 2 + (rest < 2 ? rest : 2);
  return count < 32 ? (1u << count) - 1 : ~0u;
}

// The nearest int32.
AG_DEVICE int32_t ag_limit(int64_t x) { return (int32_t)ag_max64(INT32_MIN, ag_min64(x, INT32_MAX)); }

// ---- packed bits: bit b of a mask is bit b % 8 of its byte b / 8 --------------------------------------------------------------------

// Whether the words that hold a thread's columns from `bit` on are all of the mask's own bytes.
AG_DEVICE bool ag_bits_within(int64_t bit, int32_t bytes, int64_t stride) {
  return bit >= 32 && bit / 8 + 24 <= bytes && stride == 1;
}

AG_DEVICE uint32_t ag_columns_of_bits(const void* mask, int64_t bit) {
  const uint8_t* const byte = (const uint8_t*)mask + bit / 8;
  const int32_t skipped = (int32_t)((uintptr_t)byte & 3);  // words are read where they are aligned
  const uint32_t* const words = (const uint32_t*)(byte - skipped);
  const int32_t shift = 8 * skipped + (int32_t)(bit & 7);
  uint32_t kept = 0, word = __ldg(words);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t next = __ldg(words + i + 1);
    uint32_t pairs = (shift ? word >> shift | next << (32 - shift) : word) & 0x03030303;  // of keys 32 * i + 8 * j: bits 8 * j and 8 * j + 1
    pairs |= pairs >> 6;
    kept |= ((pairs & 0xf) | (pairs >> 12 & 0xf0)) << 8 * i;
    word = next;
  }
  return kept;
}
