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

template <class T>
cudaError_t launch(const Decode& call, const DecodePlan& plan, cudaStream_t stream) {
  return with_instance<T>(call, plan, [&](auto tokens, auto aligned) {
    return launch<T, decltype(tokens)::value, decltype(aligned)::value>(call, plan, stream);
  });
}

}  // namespace

const char* launch_decode(const Decode& call, const DecodePlan& plan, Dtype dtype, void* stream_) {
  const auto stream = (cudaStream_t)stream_;
  const cudaError_t error = dtype == Dtype::f32    ? launch<float>(call, plan, stream)
                            : dtype == Dtype::bf16 ? launch<__nv_bfloat16>(call, plan, stream)
                                                   : launch<__half>(call, plan, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pemt_fast::cuda
