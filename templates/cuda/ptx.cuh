// Small wrappers of the PTX that the kernels use: sm_80 and later, except where a wrapper says otherwise.
// mma.m16n8k16 fragments, lane = 4 * g + t: accumulator {d0, d1} = row g, columns 2t, 2t + 1; {d2, d3} = row g + 8.
#pragma once
#include <stdint.h>

struct Bf16 { uint16_t bits; };
struct F16 { uint16_t bits; };

__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
__device__ __forceinline__ float to_float(F16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Two floats rounded to nearest even and packed, lo in the low half.
template <typename Element> __device__ __forceinline__ uint32_t pack2(float lo, float hi);
template <> __device__ __forceinline__ uint32_t pack2<Bf16>(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
template <> __device__ __forceinline__ uint32_t pack2<F16>(float lo, float hi) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
}
template <typename Element> __device__ __forceinline__ float2 unpack2(uint32_t x) {
  return make_float2(to_float(Element{(uint16_t)x}), to_float(Element{(uint16_t)(x >> 16)}));
}

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- shared memory --------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t smem_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// Tiles in shared memory are rows of CHUNKS 16-byte chunks without padding (CHUNKS = head_dim / 8, even). Chunk c of row r
// lies at swizzle<CHUNKS>(r, c): eight rows of one column of chunks fall into eight different bank groups.
template <int CHUNKS> __device__ __forceinline__ constexpr int swizzle_bits(int row) {
  static_assert(CHUNKS % 2 == 0, "head_dim is a multiple of 16");
  return CHUNKS % 8 == 0 ? row & 7 : CHUNKS % 4 == 0 ? (row >> 1) & 3 : (row >> 2) & 1;
}
template <int CHUNKS> __device__ __forceinline__ constexpr int swizzle(int row, int chunk) {
  return (row * CHUNKS + (chunk ^ swizzle_bits<CHUNKS>(row))) * 16;
}
// The address of chunk c + 2 * k of the same row, from that of chunk c < 2, for a row that starts 128-byte aligned or at any
// multiple of the swizzled span: the constant part of 2 * k below the span is XORed in, the rest is added.
template <int CHUNKS> __device__ __forceinline__ constexpr uint32_t swizzle_step(uint32_t address, int k) {
  constexpr int span = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;
  return (address ^ (uint32_t)((2 * k % span) * 16)) + (uint32_t)(2 * k / span * span * 16);
}

// 16 bytes from global to shared memory, asynchronously; with bytes = 0 nothing is read and zeros are written.
__device__ __forceinline__ void cp_async_16(uint32_t smem, const void* global, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem), "l"(global), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's newest groups are in flight.
template <int N> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem) : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(smem) : "memory");
}

// ---- tensor cores ---------------------------------------------------------------------------------------------------

// d += a * b, m16n8k16, float32 sums.
template <typename Element>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma_m16n8k16<Bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<F16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- barriers -------------------------------------------------------------------------------------------------------

// Barrier `id` (1 ... 15; 0 is __syncthreads') of so many threads, whole warps: those that wait and those that only arrive.
__device__ __forceinline__ void barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void barrier_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Waits, and says whether x is true for any of them.
__device__ __forceinline__ bool barrier_or(int id, int threads, bool x) {
  int any;
  asm volatile("{\n.reg .pred mine, all;\nsetp.ne.s32 mine, %1, 0;\nbar.red.or.pred all, %2, %3, mine;\nselp.s32 %0, 1, 0, all;\n}"
               : "=r"(any) : "r"((int)x), "r"(id), "r"(threads) : "memory");
  return any;
}

// ---- order between blocks -------------------------------------------------------------------------------------------

// Adds and returns what was there; releases what this thread has written or seen through a barrier, and acquires.
__device__ __forceinline__ int32_t atomic_add_acq_rel(int32_t* address, int32_t value) {
  int32_t before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
  return before;
}

// ---- programmatic dependent launch (no-ops before sm_90) --------------------------------------------------------------

// Waits for the kernels before this one in the stream; reads nothing of theirs earlier.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel in the stream start its prologue.
__device__ __forceinline__ void grid_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
