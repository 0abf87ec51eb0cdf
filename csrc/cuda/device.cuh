// SPDX-License-Identifier: Apache-2.0
//
// What the kernels need of the device and C++ has not. tests/helpers/cuda/emulated_device.h has the
// same functions for the host.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__
// Where an array must be in registers.
#define UNROLL _Pragma("unroll")

namespace pemt_fast::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

// 8 values of 16 bits, two in a word.
struct Eight {
  uint32_t word[4];
};

DEVICE int thread() { return int(threadIdx.x); }
DEVICE int lane() { return int(threadIdx.x) % 32; }
DEVICE int warp() { return int(threadIdx.x) / 32; }
DEVICE int block_index() { return int(blockIdx.x); }
DEVICE void sync_block() { __syncthreads(); }

DEVICE int min_of(int a, int b) { return min(a, b); }
DEVICE float not_a_number() { return __int_as_float(0x7fffffff); }
DEVICE bool is_finite(float value) { return isfinite(value); }
DEVICE float complementary_error(float value) { return erfcf(value); }
DEVICE float exponential(float value) { return expf(value); }
DEVICE float hyperbolic_tangent(float value) { return tanhf(value); }

template <class T>
DEVICE T from_float(float value);
template <>
DEVICE float from_float<float>(float value) {
  return value;
}
template <>
DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
DEVICE __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
DEVICE float to_float(float value) { return value; }
DEVICE float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
DEVICE float to_float(__half value) { return __half2float(value); }

// The bits that are all ones in what is not finite.
template <class T>
DEVICE uint32_t exponent_bits();
template <>
DEVICE uint32_t exponent_bits<__nv_bfloat16>() {
  return 0x7f80u;
}
template <>
DEVICE uint32_t exponent_bits<__half>() {
  return 0x7c00u;
}

// The order of the terms is fixed.
DEVICE float sum_of_lanes(float value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

DEVICE Eight load_eight(const uint16_t* from) {
  const uint4 v = *(const uint4*)from;
  return Eight{{v.x, v.y, v.z, v.w}};
}

template <class T>
DEVICE uint32_t two(const T* from) {
  return *(const uint32_t*)from;
}

// acc += first [16, 16] * second [16, 8] of a warp.
template <class T>
DEVICE void multiply(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                     uint32_t b0, uint32_t b1);
#define PEMT_FAST_MULTIPLY(type, name)                                                            \
  template <>                                                                                     \
  DEVICE void multiply<type>(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, \
                             uint32_t b0, uint32_t b1) {                                          \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                           \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
                 : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                         \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                         \
  }
PEMT_FAST_MULTIPLY(__nv_bfloat16, "bf16")
PEMT_FAST_MULTIPLY(__half, "f16")
#undef PEMT_FAST_MULTIPLY

// Of clusters, which there are from sm_90 on; a plan for other devices has none.
DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#else
  __trap();
#endif
}

// The same place in the shared memory of another block of the cluster.
template <class T>
DEVICE T* peer(T* own, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t result;
  asm("mapa.u64 %0, %1, %2;" : "=l"(result) : "l"((uint64_t)own), "r"(rank));
  return (T*)result;
#else
  return own;
#endif
}

// What this thread has written is seen by whoever hears of it afterwards.
DEVICE void make_visible() { __threadfence(); }
// What it was before.
DEVICE unsigned count_up(unsigned* counter) { return atomicAdd(counter, 1u); }
// Past the cache of the processor, which may hold what was there before.
DEVICE float load_written(const float* from) { return __ldcg(from); }

}  // namespace pemt_fast::cuda
