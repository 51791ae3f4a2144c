// Rotary position embedding of rows in shared memory, computed in float32.
#pragma once
#include "ptx.cuh"

// Sine and cosine of x, |x| < 2^23, to about 1e-7: reduced by quarter turns with pi/2 in three parts.
__device__ __forceinline__ void sine_cosine(float x, float& sine, float& cosine) {
  const float quarter = rintf(x * 0.636619772f);
  float r = fmaf(quarter, -1.57079637f, x);
  r = fmaf(quarter, 4.37113883e-8f, r);
  r = fmaf(quarter, 1.71512489e-15f, r);
  const int quadrant = (int)quarter;
  const float square = r * r;
  const float s = fmaf(fmaf(fmaf(-1.95152709e-4f, square, 8.33216067e-3f), square, -1.66666546e-1f) * square, r, r);
  const float c = fmaf(fmaf(fmaf(2.44331474e-5f, square, -1.38873162e-3f), square, 4.16666457e-2f) * square, square,
                       fmaf(-0.5f, square, 1.0f));
  const float a = quadrant & 1 ? c : s, b = quadrant & 1 ? s : c;
  sine = quadrant & 2 ? -a : a;
  cosine = (quadrant + 1) & 2 ? -b : b;
}

// (a, b) turned by position * inv_freq, and scaled.
__device__ __forceinline__ void rotate_pair(float& a, float& b, float position, float inv_freq, float mscale) {
  float sine, cosine;
  sine_cosine(position * inv_freq, sine, cosine);
  sine *= mscale, cosine *= mscale;
  const float x = a;
  a = x * cosine - b * sine;
  b = b * cosine + x * sine;
}

// (a, b) turned by an angle |x| < 2^23, to about 1e-6, in a third of the instructions: reduced by whole turns with 2 pi in two parts,
// then by the special function unit.
__device__ __forceinline__ void turn_pair(float& a, float& b, float x, float scale) {
  const float turns = fmaf(x, 0.159154943f, 12582912.0f) - 12582912.0f;  // to the nearest integer
  const float r = fmaf(turns, 1.74845553e-7f, fmaf(turns, -6.28318548f, x));
  const float sine = __sinf(r) * scale, cosine = __cosf(r) * scale, before = a;
  a = before * cosine - b * sine;
  b = b * cosine + before * sine;
}

// Rotates two neighbouring pairs of a row of HEAD_DIM elements, in place: word i of ROTARY_DIM / 4. `row` points to the
// row's swizzled tile; pairs are (2i, 2i + 1) or (i, i + ROTARY_DIM / 2).
template <typename Element, int HEAD_DIM, int ROTARY_DIM, bool INTERLEAVED>
__device__ __forceinline__ void rotate_word(char* tile, int row, int i, int position, const float* inv_freq, float mscale) {
  static_assert(ROTARY_DIM % 4 == 0, "two pairs at a time");
  const auto word = [&](int element) {
    return (uint32_t*)(tile + swizzle<HEAD_DIM / 8>(row, element / 8) + element % 8 * 2);
  };
  uint32_t* const first = word(INTERLEAVED ? 4 * i : 2 * i);
  uint32_t* const second = word(INTERLEAVED ? 4 * i + 2 : 2 * i + ROTARY_DIM / 2);
  float2 x = unpack2<Element>(*first), y = unpack2<Element>(*second);
  const float f0 = inv_freq[2 * i], f1 = inv_freq[2 * i + 1];
  if (INTERLEAVED) {
    rotate_pair(x.x, x.y, (float)position, f0, mscale);
    rotate_pair(y.x, y.y, (float)position, f1, mscale);
  } else {
    rotate_pair(x.x, y.x, (float)position, f0, mscale);
    rotate_pair(x.y, y.y, (float)position, f1, mscale);
  }
  *first = pack2<Element>(x.x, x.y);
  *second = pack2<Element>(y.x, y.y);
}
