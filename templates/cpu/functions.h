// What traced hooks may call (ag_*): total, branch-free and inlined, so that loops over them vectorise at full width.
// Float functions are within 4 ulp or so; integers wrap, and divide as Python does.
#pragma once
#include "simd.h"

constexpr float LOG2E = 1.44269504088896341f;
constexpr float FLOAT_MAX = 3.402823466e38f;
constexpr float LN2 = 0.693147180559945309f;
constexpr float INF = __builtin_inff();
#ifndef INFINITY
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#endif

#if defined(__FMA__)
AG_INLINE float ag_fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
AG_INLINE float ag_fma(float a, float b, float c) { return a * b + c; }
#endif

// ---- int32: wrapping, floor division ----------------------------------------------------------------------------

AG_INLINE int32_t ag_add(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }
AG_INLINE int32_t ag_sub(int32_t a, int32_t b) { return (int32_t)((uint32_t)a - (uint32_t)b); }
AG_INLINE int32_t ag_mul(int32_t a, int32_t b) { return (int32_t)((uint32_t)a * (uint32_t)b); }
AG_INLINE int32_t ag_neg(int32_t a) { return (int32_t)(0u - (uint32_t)a); }
AG_INLINE int32_t ag_abs(int32_t a) { return a < 0 ? ag_neg(a) : a; }
AG_INLINE int32_t ag_min(int32_t a, int32_t b) { return a < b ? a : b; }
AG_INLINE int32_t ag_max(int32_t a, int32_t b) { return a > b ? a : b; }

// A count outside 0..31 shifts everything out.
AG_INLINE int32_t ag_shl(int32_t a, int32_t n) {
  uint32_t shifted = (uint32_t)a << (n & 31);
  return (uint32_t)n > 31u ? 0 : (int32_t)shifted;
}
AG_INLINE int32_t ag_shr(int32_t a, int32_t n) { return a >> ((uint32_t)n > 31u ? 31 : n); }

// Quotients of int32 truncate exactly in double; that vectorises where integer division does not.
AG_INLINE int32_t ag_floordiv(int32_t a, int32_t b) {
  int32_t divisor = (b == 0) | (b == -1) ? 1 : b;
  int32_t quotient = (int32_t)((double)a / (double)divisor);
  int32_t rest = a - quotient * divisor;
  quotient -= (int32_t)((rest != 0) & ((rest ^ divisor) < 0));
  quotient = b == -1 ? ag_neg(a) : quotient;
  return b == 0 ? 0 : quotient;
}
AG_INLINE int32_t ag_mod(int32_t a, int32_t b) {
  int32_t rest = ag_sub(a, ag_mul(ag_floordiv(a, b), b));
  return b == 0 ? 0 : rest;
}

// ---- int64, for tile bounds -----------------------------------------------------------------------------------------

// A score in base-2 units. A finite one stays finite: masks of -3.4e38 are common, and rows may hold nothing else.
AG_INLINE float base2(float score) {
  float x = score * LOG2E;
  float bounded = x < -FLOAT_MAX ? -FLOAT_MAX : x > FLOAT_MAX ? FLOAT_MAX : x;
  return score - score == 0.0f ? bounded : x;
}
AG_INLINE int64_t ag_min64(int64_t a, int64_t b) { return a < b ? a : b; }
AG_INLINE int64_t ag_max64(int64_t a, int64_t b) { return a > b ? a : b; }
AG_INLINE int64_t ag_abs64(int64_t a) { return a < 0 ? -a : a; }
AG_INLINE int64_t ag_floordiv64(int64_t a, int64_t b) { return a / b - ((a % b != 0) & ((a ^ b) < 0)); }
AG_INLINE int64_t ag_ceildiv64(int64_t a, int64_t b) { return -ag_floordiv64(-a, b); }
// Of a position by a positive number; one that is no int32 is none of a key or a query that exists.
AG_INLINE int64_t ag_quotient(int64_t a, int32_t b) { return ag_floordiv((int32_t)ag_max64(INT32_MIN, ag_min64(a, INT32_MAX)), b); }

// ---- float32 ------------------------------------------------------------------------------------------------------

AG_INLINE float ag_abs(float a) { return __builtin_fabsf(a); }
AG_INLINE float ag_sqrt(float a) { return __builtin_sqrtf(a); }
AG_INLINE float ag_rsqrt(float a) { return 1.0f / __builtin_sqrtf(a); }
AG_INLINE float ag_floor(float a) { return __builtin_floorf(a); }
// NaN if either is NaN, as in torch.
AG_INLINE float ag_min(float a, float b) { return (a < b) | (a != a) ? a : b; }
AG_INLINE float ag_max(float a, float b) { return (a > b) | (a != a) ? a : b; }

// Toward zero, saturating, NaN to 0.
AG_INLINE int32_t ag_cast_i32(float a) {
  float finite = a == a ? a : 0.0f;
  float low = finite < -2147483648.0f ? -2147483648.0f : finite;
  int32_t cast = (int32_t)(low > 2147483520.0f ? 2147483520.0f : low);
  return finite >= 2147483648.0f ? INT32_MAX : cast;
}

// y * 2^i, i in [-252, 254], in two factors so that results may be subnormal or infinite. `shifted` holds i in its low
// bits.
constexpr float ROUND_MAGIC = 12582912.0f;  // adding 1.5 * 2^23 leaves the nearest integer in the low mantissa bits
AG_INLINE float ag_scale_by_exponent(float y, float shifted) {
  int32_t i = (int32_t)(float_to_bits(shifted) - 0x4b400000u), half = i >> 1;
  return y * bits_to_float((uint32_t)(half + 127) << 23) * bits_to_float((uint32_t)(i - half + 127) << 23);
}

AG_INLINE float ag_exp2(float x) {
  float t = x < -152.0f ? -152.0f : x;
  t = t > 129.0f ? 129.0f : t;
  float shifted = t + ROUND_MAGIC, r = t - (shifted - ROUND_MAGIC);
  float y = ag_fma(1.53533619e-4f, r, 1.33988744e-3f);
  y = ag_fma(y, r, 9.61843736e-3f);
  y = ag_fma(y, r, 5.55033247e-2f);
  y = ag_fma(y, r, 2.40226479e-1f);
  y = ag_fma(y, r, 6.93147203e-1f);
  return ag_scale_by_exponent(ag_fma(y, r, 1.0f), shifted);
}

AG_INLINE float ag_exp(float x) {
  float t = x < -105.0f ? -105.0f : x;
  t = t > 89.0f ? 89.0f : t;
  float shifted = ag_fma(t, LOG2E, ROUND_MAGIC), n = shifted - ROUND_MAGIC;
  float r = ag_fma(n, -1.42860677e-6f, ag_fma(n, -6.93145752e-1f, t));  // ln 2 in two parts, the first of 16 bits
  float y = ag_fma(1.38146131e-3f, r, 8.36870983e-3f);
  y = ag_fma(y, r, 4.16683874e-2f);
  y = ag_fma(y, r, 1.66665207e-1f);
  y = ag_fma(y, r, 4.99999935e-1f);
  return ag_scale_by_exponent(1.0f + ag_fma(y * r, r, r), shifted);
}

// m in [sqrt(1/2), sqrt(2)) and e with x = m * 2^e, for positive finite x; returns log(m) and e.
AG_INLINE float ag_log_parts(float x, float& e) {
  bool tiny = x < 0x1p-126f;
  uint32_t u = float_to_bits(tiny ? x * 0x1p23f : x);
  int32_t exponent = (int32_t)(u - 0x3f3504f3u) >> 23;
  float f = bits_to_float(u - ((uint32_t)exponent << 23)) - 1.0f;
  e = (float)exponent - (tiny ? 23.0f : 0.0f);
  float y = ag_fma(7.0376836292e-2f, f, -1.1514610310e-1f);
  y = ag_fma(y, f, 1.1676998740e-1f);
  y = ag_fma(y, f, -1.2420140846e-1f);
  y = ag_fma(y, f, 1.4249322787e-1f);
  y = ag_fma(y, f, -1.6668057665e-1f);
  y = ag_fma(y, f, 2.0000714765e-1f);
  y = ag_fma(y, f, -2.4999993993e-1f);
  y = ag_fma(y, f, 3.3333331174e-1f);
  float square = f * f;
  return f + ag_fma(y * f, square, -0.5f * square);
}
AG_INLINE float ag_log_edges(float x, float y) {
  float edge = x == 0.0f ? -INF : __builtin_nanf("");
  y = x > 0.0f ? y : edge;
  return x == INF ? INF : y;
}
AG_INLINE float ag_log(float x) {
  float e, log_m = ag_log_parts(x, e);
  return ag_log_edges(x, ag_fma(e, 6.93145752e-1f, ag_fma(e, 1.42860677e-6f, log_m)));
}
AG_INLINE float ag_log2(float x) {
  float e, log_m = ag_log_parts(x, e);
  return ag_log_edges(x, ag_fma(log_m, LOG2E, e));
}

// tanh(a) = m / (m + 2), m = expm1(2 a): accurate near 0 too.
AG_INLINE float ag_tanh(float x) {
  float a = ag_abs(x);
  float z = 2.0f * (a > 9.2f ? 9.2f : a);
  float shifted = ag_fma(z, LOG2E, ROUND_MAGIC), n = shifted - ROUND_MAGIC;
  float r = ag_fma(n, -1.42860677e-6f, ag_fma(n, -6.93145752e-1f, z));
  float y = ag_fma(1.38825227e-3f, r, 8.36651394e-3f);
  y = ag_fma(y, r, 4.16671996e-2f);
  y = ag_fma(y, r, 1.66665437e-1f);
  y = ag_fma(y, r, 4.99999982e-1f);
  y = ag_fma(y * r, r, r);
  float power = bits_to_float((float_to_bits(shifted) - 0x4b400000u + 127u) << 23);
  float m = ag_fma(power, y, power - 1.0f);
  return __builtin_copysignf(m / (m + 2.0f), x);
}

AG_INLINE float ag_sigmoid(float x) { return 1.0f / (1.0f + ag_exp(-x)); }

// ---- tensor parameters: out of range yields 0; element 0 always exists --------------------------------------------
// Written with masks, not branches, so that reads in a vector loop become gathers. Elements of 8 and 16 bits are cut
// out of the aligned word around them: gathers have no narrower width, and such a word never crosses into another page.

typedef uint32_t __attribute__((may_alias)) any_uint32;
typedef int64_t __attribute__((may_alias)) any_int64;

AG_INLINE uint32_t ag_load_word(const void* x, bool in_range, int64_t offset) {
  return ((const any_uint32*)x)[offset & -(int64_t)in_range] & -(uint32_t)in_range;
}
template <int BYTES>
AG_INLINE uint32_t ag_load_narrow(const void* x, bool in_range, int64_t offset) {
  const any_uint32* words = (const any_uint32*)((uintptr_t)x & ~(uintptr_t)3);
  int64_t at = (offset & -(int64_t)in_range) * BYTES + (int64_t)((uintptr_t)x & 3);
  uint32_t element = words[at >> 2] >> (uint32_t)(at & 3) * 8u;
  return element & (BYTES == 1 ? 0xffu : 0xffffu) & -(uint32_t)in_range;
}

AG_INLINE float ag_load_f32(const void* x, bool in_range, int64_t offset) {
  return bits_to_float(ag_load_word(x, in_range, offset));
}
AG_INLINE int32_t ag_load_i32(const void* x, bool in_range, int64_t offset) {
  return (int32_t)ag_load_word(x, in_range, offset);
}
AG_INLINE int32_t ag_load_i64(const void* x, bool in_range, int64_t offset) {
  return (int32_t)((const any_int64*)x)[offset & -(int64_t)in_range] & -(int32_t)in_range;
}
AG_INLINE float ag_load_bf16(const void* x, bool in_range, int64_t offset) {
  return bits_to_float(ag_load_narrow<2>(x, in_range, offset) << 16);
}
AG_INLINE float ag_load_f16(const void* x, bool in_range, int64_t offset) {
  return to_float(f16{(uint16_t)ag_load_narrow<2>(x, in_range, offset)});
}
AG_INLINE int32_t ag_load_u8(const void* x, bool in_range, int64_t offset) {
  return (int32_t)ag_load_narrow<1>(x, in_range, offset);
}
