// One vector type, vf: LANES float32 values in AVX-512, AVX2 or plain GCC/clang vectors, whichever the flags allow.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define AG_INLINE static inline __attribute__((always_inline))

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
typedef uint32_t bf16x2;  // two bfloat16, the first in the low half: what one lane of a bfloat16 dot product multiplies

AG_INLINE float bits_to_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
AG_INLINE uint32_t float_to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
AG_INLINE float select(bool take, float a, float b) { return take ? a : b; }

// ---- scalar conversions, branch-free, so that plain loops over them vectorise -----------------------------------

AG_INLINE float to_float(float x) { return x; }
AG_INLINE float to_float(bf16 x) { return bits_to_float((uint32_t)x.bits << 16); }
AG_INLINE float to_float(f16 x) {
  uint32_t magnitude = (uint32_t)(x.bits & 0x7fff) << 13;
  uint32_t scaled = float_to_bits(bits_to_float(magnitude) * 0x1p112f);  // rebias; exact for subnormals too
  uint32_t special = magnitude | 0x7f800000u;                            // infinity and NaN
  uint32_t bits = magnitude >= 0x0f800000u ? special : scaled;
  return bits_to_float(bits | (uint32_t)(x.bits & 0x8000) << 16);
}

// Round to nearest even; NaN stays NaN.
AG_INLINE void from_float(float x, float& out) { out = x; }
AG_INLINE void from_float(float x, bf16& out) {
  uint32_t u = float_to_bits(x);
  uint32_t rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  out.bits = (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
AG_INLINE void from_float(float x, f16& out) {
  uint32_t u = float_to_bits(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
  uint32_t normal = (a + 0xc8000fffu + (a >> 13 & 1u)) >> 13;
  uint32_t subnormal = float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000u;
  uint32_t huge = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t h = a < 0x38800000u ? subnormal : normal;
  out.bits = (uint16_t)((a >= 0x47800000u ? huge : h) | sign);
}

// ---- vf -------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int LANES = 16;
typedef __m512 vf;
AG_INLINE vf vset(float x) { return _mm512_set1_ps(x); }
AG_INLINE vf vload(const float* x) { return _mm512_loadu_ps(x); }
AG_INLINE vf vload(const bf16* x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}
AG_INLINE vf vload(const f16* x) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x)); }
AG_INLINE void vstore(float* x, vf a) { _mm512_storeu_ps(x, a); }
AG_INLINE vf vfma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
AG_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }  // b where either is NaN
AG_INLINE __m256 vfold(vf a) { return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }
#elif defined(__AVX2__)
constexpr int LANES = 8;
typedef __m256 vf;
AG_INLINE vf vset(float x) { return _mm256_set1_ps(x); }
AG_INLINE vf vload(const float* x) { return _mm256_loadu_ps(x); }
AG_INLINE vf vload(const bf16* x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16));
}
AG_INLINE vf vload(const f16* x) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x)); }
AG_INLINE void vstore(float* x, vf a) { _mm256_storeu_ps(x, a); }
AG_INLINE vf vfma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
AG_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }  // b where either is NaN
AG_INLINE __m256 vfold(vf a) { return a; }
#else
constexpr int LANES = 4;
typedef float vf __attribute__((vector_size(16)));
AG_INLINE vf vset(float x) { return vf{x, x, x, x}; }
AG_INLINE vf vload(const float* x) { vf a; memcpy(&a, x, sizeof a); return a; }
AG_INLINE vf vload(const bf16* x) { return vf{to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])}; }
AG_INLINE vf vload(const f16* x) { return vf{to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])}; }
AG_INLINE void vstore(float* x, vf a) { memcpy(x, &a, sizeof a); }
AG_INLINE vf vfma(vf a, vf b, vf c) { return a * b + c; }
AG_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }  // b where either is NaN
#endif

// Horizontal sums of one and of four vectors, and the horizontal maximum.
#if defined(__AVX2__)
AG_INLINE float vsum(vf a) {
  __m256 half = vfold(a);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
AG_INLINE void vsum4(const vf (&a)[4], float (&out)[4]) {
  __m256 s01 = _mm256_hadd_ps(vfold(a[0]), vfold(a[1])), s23 = _mm256_hadd_ps(vfold(a[2]), vfold(a[3]));
  __m256 s = _mm256_hadd_ps(s01, s23);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
}
#else
AG_INLINE float vsum(vf a) { return (a[0] + a[2]) + (a[1] + a[3]); }
AG_INLINE void vsum4(const vf (&a)[4], float (&out)[4]) {
  for (int i = 0; i < 4; ++i) out[i] = vsum(a[i]);
}
#endif
AG_INLINE float vtop(vf a) {
  float top = a[0];
  for (int i = 1; i < LANES; ++i) top = a[i] > top ? a[i] : top;
  return top;
}

// 2^x for x <= 0 (and NaN, which stays): 1 at 0, exactly 0 at -infinity; below 2^-126 the result may be any subnormal.
AG_INLINE vf vexp2(vf x) {
#if defined(__AVX512DQ__)
  // r = x - floor(x), and 0 at -infinity; scalef multiplies by 2^floor(x). Relative error 1.5e-7.
  vf r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  vf y = vset(1.86713008e-3f);
  y = vfma(y, r, vset(9.0170303e-3f));
  y = vfma(y, r, vset(5.57999131e-2f));
  y = vfma(y, r, vset(2.4016445e-1f));
  y = vfma(y, r, vset(6.93151312e-1f));
  return _mm512_scalef_ps(vfma(y, r, vset(1.0f)), x);
#else
  typedef int32_t vi __attribute__((vector_size(sizeof(vf))));
  const vf magic = vset(12582912.0f);   // adding 1.5 * 2^23 leaves the nearest integer in the low mantissa bits
  x = vmax(vset(-127.0f), x);           // 1.0 times 2^-127 in the exponent field is 0
  vf shifted = x + magic;
  vf r = x - (shifted - magic);
  vf y = vset(1.32647271e-3f);
  y = vfma(y, r, vset(9.67151264e-3f));
  y = vfma(y, r, vset(5.55073374e-2f));
  y = vfma(y, r, vset(2.40222421e-1f));
  y = vfma(y, r, vset(6.93146978e-1f));
  y = vfma(y, r, vset(1.0f));
  return (vf)((vi)y + ((vi)shifted << 23));
#endif
}

// ---- bfloat16 pairs (AVX512-BF16) -------------------------------------------------------------------------------

#if defined(__AVX512BF16__)
typedef __m512bh vpair;
AG_INLINE vpair vload(const bf16x2* x) { return (vpair)_mm512_loadu_si512(x); }
AG_INLINE vpair vset(bf16x2 x) { return (vpair)_mm512_set1_epi32((int32_t)x); }
AG_INLINE vf vfma(vpair a, vpair b, vf c) { return _mm512_dpbf16_ps(c, a, b); }

// Lane i: (first[i], second[i]), rounded.
AG_INLINE void vstore_pair(bf16x2* x, vf first, vf second) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  _mm512_storeu_si512(x, _mm512_permutexvar_epi16(interleave, halves));
}
#endif
AG_INLINE bf16x2 pack_pair(float first, float second) {
  bf16 a, b;
  from_float(first, a);
  from_float(second, b);
  return (uint32_t)a.bits | (uint32_t)b.bits << 16;
}
