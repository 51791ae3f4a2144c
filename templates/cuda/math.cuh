// What traced hooks may call (ag_*) on a GPU: total and branch-free. Float functions are within 4 ulp, without
// approximate instructions of the -use_fast_math kind; integers wrap, and divide as Python does. The same names and
// meanings as ../cpu/functions.h; attngen/ops.py says what each one means.
#pragma once
#include <stdint.h>

#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#endif

#define AG_DEVICE __device__ __forceinline__

// ---- int32: wrapping, floor division ----------------------------------------------------------------------------

AG_DEVICE int32_t ag_add(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }
AG_DEVICE int32_t ag_sub(int32_t a, int32_t b) { return (int32_t)((uint32_t)a - (uint32_t)b); }
AG_DEVICE int32_t ag_mul(int32_t a, int32_t b) { return (int32_t)((uint32_t)a * (uint32_t)b); }
AG_DEVICE int32_t ag_neg(int32_t a) { return (int32_t)(0u - (uint32_t)a); }
AG_DEVICE int32_t ag_abs(int32_t a) { return a < 0 ? ag_neg(a) : a; }
AG_DEVICE int32_t ag_min(int32_t a, int32_t b) { return a < b ? a : b; }
AG_DEVICE int32_t ag_max(int32_t a, int32_t b) { return a > b ? a : b; }

// A count outside 0..31 shifts everything out.
AG_DEVICE int32_t ag_shl(int32_t a, int32_t n) {
  uint32_t shifted = (uint32_t)a << (n & 31);
  return (uint32_t)n > 31u ? 0 : (int32_t)shifted;
}
AG_DEVICE int32_t ag_shr(int32_t a, int32_t n) { return a >> ((uint32_t)n > 31u ? 31 : n); }

// 0 for a zero divisor; -1 apart, since INT_MIN / -1 overflows.
AG_DEVICE int32_t ag_floordiv(int32_t a, int32_t b) {
  int32_t divisor = (b == 0) | (b == -1) ? 1 : b;
  int32_t quotient = a / divisor, rest = a - quotient * divisor;
  quotient -= (int32_t)((rest != 0) & ((rest ^ divisor) < 0));
  quotient = b == -1 ? ag_neg(a) : quotient;
  return b == 0 ? 0 : quotient;
}
AG_DEVICE int32_t ag_mod(int32_t a, int32_t b) {
  int32_t rest = ag_sub(a, ag_mul(ag_floordiv(a, b), b));
  return b == 0 ? 0 : rest;
}

// ---- int64, for tile bounds -----------------------------------------------------------------------------------------

AG_DEVICE int64_t ag_min64(int64_t a, int64_t b) { return a < b ? a : b; }
AG_DEVICE int64_t ag_max64(int64_t a, int64_t b) { return a > b ? a : b; }
AG_DEVICE int64_t ag_abs64(int64_t a) { return a < 0 ? -a : a; }
AG_DEVICE int64_t ag_floordiv64(int64_t a, int64_t b) { return a / b - ((a % b != 0) & ((a ^ b) < 0)); }
AG_DEVICE int64_t ag_ceildiv64(int64_t a, int64_t b) { return -ag_floordiv64(-a, b); }
// Of a position by a positive number; one that is no int32 is none of a key or a query that exists.
AG_DEVICE int64_t ag_quotient(int64_t a, int32_t b) { return ag_floordiv((int32_t)ag_max64(INT32_MIN, ag_min64(a, INT32_MAX)), b); }

// ---- float32 ------------------------------------------------------------------------------------------------------

AG_DEVICE float ag_abs(float a) { return fabsf(a); }
AG_DEVICE float ag_rsqrt(float a) { return rsqrtf(a); }
AG_DEVICE float ag_exp(float a) { return expf(a); }
AG_DEVICE float ag_exp2(float a) { return exp2f(a); }
AG_DEVICE float ag_log(float a) { return logf(a); }
AG_DEVICE float ag_log2(float a) { return log2f(a); }
// The fast reciprocal and exponential cost a third of the IEEE ones; the sum 1 + e^x keeps their relative error, a few ulp
// for |a| < 10 and 1e-5 where the result is below 1e-30.
AG_DEVICE float ag_sigmoid(float a) {
#ifdef __CUDACC__
  float e, y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(a * -1.44269504f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + e));
  return y;
#else
  return 1.0f / (1.0f + expf(-a));
#endif
}
// Finite for finite factors: 0 times an overflow would be NaN.
AG_DEVICE float ag_finite_product(float a, float b) {
  float x = a * b;
  return fabsf(x) == INFINITY && fabsf(a) < INFINITY && fabsf(b) < INFINITY ? copysignf(3.4028234e38f, x) : x;
}
// NaN if either is NaN, as in torch; fminf and fmaxf would drop it.
AG_DEVICE float ag_min(float a, float b) { return (a < b) | (a != a) ? a : b; }
AG_DEVICE float ag_max(float a, float b) { return (a > b) | (a != a) ? a : b; }

// 1 - 2 / (1 + e^2a) loses its digits near 0, where an odd polynomial takes over: 2 ulp in either range. tanhf is as
// accurate, but branches.
AG_DEVICE float ag_tanh(float x) {
  float a = fabsf(x), square = x * x;
  float large = 1.0f - __fdividef(2.0f, 1.0f + __expf(2.0f * a));
  float y = fmaf(1.56125175e-2f, square, -5.2211735e-2f);
  y = fmaf(y, square, 1.3313115e-1f);
  y = fmaf(y, square, -3.3332598e-1f);
  float small = fmaf(y * square, a, a);
  return copysignf(a < 0.6f ? small : large, x);
}

// In logits of the Hopper kernel, which have two special functions a score to spare, not three: within 2^-11 of the result, a
// quarter of what rounding the score to bf16 costs.
AG_DEVICE float ag_tanh_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ag_tanh(x);
#endif
}

// Toward zero, saturating; NaN to 0.
AG_DEVICE int32_t ag_cast_i32(float a) { return a == a ? __float2int_rz(a) : 0; }

// ---- tensor parameters: out of range yields 0 and reads nothing ----------------------------------------------------

AG_DEVICE float ag_half_to_float(uint16_t x) {
#ifdef __CUDACC__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
#else  // a host compiler, in tests
  _Float16 half;
  __builtin_memcpy(&half, &x, sizeof half);
  return half;
#endif
}

AG_DEVICE float ag_load_f32(const void* x, bool in_range, int64_t offset) {
  return in_range ? __ldg((const float*)x + offset) : 0.0f;
}
AG_DEVICE float ag_load_bf16(const void* x, bool in_range, int64_t offset) {
  uint32_t bits = in_range ? __ldg((const uint16_t*)x + offset) : 0;
  return __int_as_float((int)(bits << 16));
}
AG_DEVICE float ag_load_f16(const void* x, bool in_range, int64_t offset) {
  return in_range ? ag_half_to_float(__ldg((const uint16_t*)x + offset)) : 0.0f;
}
AG_DEVICE int32_t ag_load_i32(const void* x, bool in_range, int64_t offset) {
  return in_range ? __ldg((const int32_t*)x + offset) : 0;
}
AG_DEVICE int32_t ag_load_i64(const void* x, bool in_range, int64_t offset) {
  return in_range ? (int32_t)__ldg((const long long*)x + offset) : 0;
}
AG_DEVICE int32_t ag_load_u8(const void* x, bool in_range, int64_t offset) {
  return in_range ? __ldg((const uint8_t*)x + offset) : 0;
}
