// The device layer on a GPU of compute capability 8.0 or newer. See layer.cuh for the contract of each function.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../status.h"
#include "element.h"

#define PERFUSION_DEVICE __device__ __forceinline__
#define PERFUSION_BOTH __host__ __device__
// `blocks`: resident blocks that a multiprocessor must hold at least. 1 lets ptxas use the registers that it needs; without a minimum it
// spills a few to raise occupancy.
#define PERFUSION_KERNEL(threads) PERFUSION_LAUNCH_BOUNDS(threads, 1)
#define PERFUSION_LAUNCH_BOUNDS(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// At most so many registers a thread, for blocks of so many threads. nvcc takes either this or launch bounds.
#if CUDART_VERSION >= 12040
#define PERFUSION_KERNEL_WITHIN(threads, registers) __global__ void __maxnreg__(registers)
#else
#define PERFUSION_KERNEL_WITHIN(threads, registers) PERFUSION_KERNEL(threads)
#endif
#define PERFUSION_CONSTANT const __grid_constant__
#define PERFUSION_UNROLL _Pragma("unroll")

namespace perfusion {

PERFUSION_DEVICE int thread() { return threadIdx.x; }
PERFUSION_DEVICE int threads() { return blockDim.x; }
PERFUSION_DEVICE int warp() { return threadIdx.x / 32; }
PERFUSION_DEVICE int lane() { return threadIdx.x % 32; }
PERFUSION_DEVICE int64_t block() { return blockIdx.x; }

PERFUSION_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// Programmatic dependent launch, from compute capability 9.0 on. The wait comes before the trigger, so the next kernel, which may begin
// before this one ends, sees the writes of all kernels before this one.
PERFUSION_DEVICE void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

PERFUSION_DEVICE void barrier() { __syncthreads(); }
PERFUSION_DEVICE void warp_barrier() { __syncwarp(); }
PERFUSION_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

PERFUSION_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

PERFUSION_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes) : "memory");
}

PERFUSION_DEVICE void copy_async(void* shared, const void* global, bool valid) { copy_async(shared, global, valid ? 16 : 0); }

PERFUSION_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int n>
PERFUSION_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

PERFUSION_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

PERFUSION_DEVICE void load_matrices(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

PERFUSION_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

PERFUSION_DEVICE void load_matrices_transposed(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

template <class Element>
PERFUSION_DEVICE void multiply_accumulate(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
PERFUSION_DEVICE void multiply_accumulate<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
PERFUSION_DEVICE void multiply_accumulate<BFloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class Element>
PERFUSION_DEVICE void multiply_accumulate(float (&c)[4], const uint32_t (&a)[2], uint32_t b);

template <>
PERFUSION_DEVICE void multiply_accumulate<Half>(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

template <>
PERFUSION_DEVICE void multiply_accumulate<BFloat16>(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b));
}

template <class T>
PERFUSION_DEVICE T load(const T* pointer) {
  return *pointer;
}

template <>
PERFUSION_DEVICE Words load(const Words* pointer) {
  const uint4 x = *reinterpret_cast<const uint4*>(pointer);
  return {{x.x, x.y, x.z, x.w}};
}

template <class T>
PERFUSION_DEVICE void store(T* pointer, const T& x) {
  *pointer = x;
}

template <>
PERFUSION_DEVICE void store(Words* pointer, const Words& x) {
  // in PTX, because the compiler splits a plain assignment into four stores where loops are unrolled
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(pointer)), "r"(x.word[0]), "r"(x.word[1]),
               "r"(x.word[2]), "r"(x.word[3])
               : "memory");
}

PERFUSION_DEVICE float word_as_float(uint32_t word) { return __uint_as_float(word); }
PERFUSION_DEVICE uint32_t float_as_word(float x) { return __float_as_uint(x); }
PERFUSION_DEVICE float to_float(float x) { return x; }
PERFUSION_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
PERFUSION_DEVICE float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

template <class Element>
PERFUSION_DEVICE uint32_t pack(float low, float high);

template <>
PERFUSION_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
PERFUSION_DEVICE uint32_t pack<BFloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

PERFUSION_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

PERFUSION_DEVICE float exp(float x) { return ::expf(x); }
PERFUSION_DEVICE float maximum(float x, float y) { return ::fmaxf(x, y); }
PERFUSION_DEVICE float infinity() { return __int_as_float(0x7f800000); }

}  // namespace perfusion

#include "launch.h"
