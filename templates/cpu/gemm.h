// The two microkernels. A word is what one lane multiplies in one step: a float, or two bfloat16 (bf16x2).
// Both keep an MR x NV block of vectors in registers; A is read as broadcast words, B as vectors.
#pragma once
#include "simd.h"

// acc[r][j] += sum over k of a[r * row + k * step] * b[k * ldb + j * LANES ...]
template <int MR, int NV, class Word>
AG_INLINE void multiply(vf (&acc)[MR][NV], const Word* a, int64_t row, int64_t step, const Word* b, int64_t ldb,
                        int steps) {
  for (int k = 0; k < steps; ++k) {
    decltype(vload(b)) bk[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) bk[j] = vload(b + k * ldb + j * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      auto ak = vset(a[r * row + k * step]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[r][j] = vfma(ak, bk[j], acc[r][j]);
    }
  }
}

// S^T block: s[n][m] = scale[m] * sum over d of k[n][d] * q[d][m], for MR keys n and one strip of rows m.
template <int MR, int NV, class Word>
AG_INLINE void score_block(float* s, const Word* keys, int64_t ldk, const Word* q, int steps, const float* scale) {
  constexpr int NR = NV * LANES;
  vf acc[MR][NV] = {};
  multiply<MR, NV>(acc, keys, ldk, 1, q, NR, steps);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) vstore(s + r * NR + j * LANES, acc[r][j] * vload(scale + j * LANES));
}

// O^T block: o[d][m] = o[d][m] * decay[m] + sum over n of v[n][d] * w[n][m], for MR dims d and one strip of rows m.
template <int MR, int NV, class Word>
AG_INLINE void value_block(float* o, const Word* values, int64_t ldv, const Word* w, int steps, const float* decay) {
  constexpr int NR = NV * LANES;
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[r][j] = vload(o + r * NR + j * LANES) * vload(decay + j * LANES);
  multiply<MR, NV>(acc, values, 1, ldv, w, NR, steps);
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) vstore(o + r * NR + j * LANES, acc[r][j]);
}
