// SPDX-License-Identifier: Apache-2.0
//
// The decode kernel's instances and their launch: every dtype, number of tokens and alignment.
#include "decode_launch.h"
// clang-format off
#include "device.cuh"
#include "decode_kernel.h"
// clang-format on

namespace pemt_fast::cuda {
namespace {

extern __shared__ __align__(16) char shared_memory[];

template <class T, int kTokens, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1)
    decode(const __grid_constant__ Decode call, const __grid_constant__ DecodePlan plan) {
  decode_block<T, kTokens, kAligned>(call, plan, shared_memory);
}

template <class T, int kTokens, bool kAligned>
cudaError_t launch(const Decode& call, const DecodePlan& plan, cudaStream_t stream) {
  const auto kernel = decode<T, kTokens, kAligned>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           int(plan.shared_bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(plan.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(plan.cluster * plan.slices));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = plan.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, call, plan);
}

template <class T, bool kAligned>
cudaError_t launch_tokens(const Decode& call, const DecodePlan& plan, cudaStream_t stream) {
  switch (plan.tokens) {
    case 8:
      return launch<T, 8, kAligned>(call, plan, stream);
    case 16:
      return launch<T, 16, kAligned>(call, plan, stream);
    case 32:
      return launch<T, 32, kAligned>(call, plan, stream);
    default:
      return launch<T, 64, kAligned>(call, plan, stream);
  }
}

bool is_aligned(const Decode& c) {
  const auto fits = [](const void* p) { return (uintptr_t)p % 16 == 0; };
  return fits(c.x) && fits(c.w_down) && fits(c.w_up) && c.x_row % 8 == 0 && c.d % 8 == 0 &&
         c.h % 8 == 0;
}

}  // namespace

const char* launch_decode(const Decode& call, const DecodePlan& plan, Dtype dtype, void* stream_) {
  const auto stream = (cudaStream_t)stream_;
  const bool aligned = is_aligned(call);
  cudaError_t error = cudaSuccess;
  if (dtype == Dtype::f32) {
    error = launch_tokens<float, true>(call, plan, stream);
  } else if (dtype == Dtype::bf16) {
    error = aligned ? launch_tokens<__nv_bfloat16, true>(call, plan, stream)
                    : launch_tokens<__nv_bfloat16, false>(call, plan, stream);
  } else {
    error = aligned ? launch_tokens<__half, true>(call, plan, stream)
                    : launch_tokens<__half, false>(call, plan, stream);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pemt_fast::cuda
