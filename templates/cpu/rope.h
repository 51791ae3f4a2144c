// Rotary position embedding of one head vector, in float32.
#pragma once
#include "functions.h"

// Sine and cosine of x, reduced in double so that angles of many turns keep float32 accuracy.
AG_INLINE void sine_cosine(float x, float& sine, float& cosine) {
  constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52
  double turns = (double)x * 0.63661977236758134308;
  double shifted = turns + MAGIC;
  double quarter = shifted - MAGIC;
  float r = (float)((double)x - quarter * 1.57079632679489661923);
  uint64_t low_bits;
  memcpy(&low_bits, &shifted, 8);
  uint32_t quadrant = (uint32_t)low_bits;
  float square = r * r;
  float s = ag_fma(ag_fma(-1.95152709e-4f, square, 8.33216067e-3f), square, -1.66666546e-1f);
  s = ag_fma(s * square, r, r);
  float c = ag_fma(ag_fma(2.44331474e-5f, square, -1.38873162e-3f), square, 4.16666457e-2f);
  c = ag_fma(c * square, square, ag_fma(-0.5f, square, 1.0f));
  uint32_t swap = quadrant & 1u;
  uint32_t sine_bits = float_to_bits(swap ? c : s) ^ (quadrant & 2u) << 30;
  uint32_t cosine_bits = float_to_bits(swap ? s : c) ^ ((quadrant + 1u) & 2u) << 30;
  sine = bits_to_float(sine_bits);
  cosine = bits_to_float(cosine_bits);
}

// x[ROTARY_DIM] is rotated in place; pairs are (2i, 2i + 1) or (i, i + ROTARY_DIM / 2).
template <int ROTARY_DIM, bool INTERLEAVED>
AG_INLINE void rotate(float* __restrict x, int32_t position, const float* __restrict inv_freq, float mscale) {
  constexpr int HALF = ROTARY_DIM / 2;
  float sine[HALF], cosine[HALF];
#pragma omp simd
  for (int i = 0; i < HALF; ++i) {
    float s, c;
    sine_cosine((float)position * inv_freq[i], s, c);
    sine[i] = s * mscale;
    cosine[i] = c * mscale;
  }
#pragma omp simd
  for (int i = 0; i < HALF; ++i) {
    const int first = INTERLEAVED ? 2 * i : i, second = INTERLEAVED ? 2 * i + 1 : i + HALF;
    float a = x[first], b = x[second];
    x[first] = a * cosine[i] - b * sine[i];
    x[second] = b * cosine[i] + a * sine[i];
  }
}
