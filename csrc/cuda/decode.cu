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

constexpr int kMostPortable = 8;  // blocks of a cluster on every device that has clusters

extern __shared__ __align__(16) char shared_memory[];

template <class T, int kTokens, bool kAligned>
__global__ void __launch_bounds__(kThreads, 1)
    decode(const __grid_constant__ Decode call, const __grid_constant__ DecodePlans plans) {
  decode_block<T, kTokens, kAligned>(call, plans, shared_memory);
}

template <class T, int kTokens, bool kAligned>
cudaError_t prepare(int shared_bytes, int* max_cluster) {
  const auto kernel = decode<T, kTokens, kAligned>;
  cudaFuncAttributes found{};
  cudaError_t error = cudaFuncGetAttributes(&found, kernel);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess || *max_cluster == 1) return error;
  // Machine code made from that of older devices has no clusters.
  if (found.ptxVersion < 90) {
    *max_cluster = 1;
    return cudaSuccess;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kMostPortable);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(shared_bytes);
  int size = 1;
  error = cudaOccupancyMaxPotentialClusterSize(&size, kernel, &config);
  while (*max_cluster > size) *max_cluster /= 2;
  return error;
}

template <class T>
cudaError_t prepare_tokens(int shared_bytes, int* max_cluster) {
  cudaError_t error = cudaSuccess;
  const auto also = [&](cudaError_t (*next)(int, int*)) {
    if (error == cudaSuccess) error = next(shared_bytes, max_cluster);
  };
  also(prepare<T, 8, true>), also(prepare<T, 16, true>);
  also(prepare<T, 32, true>), also(prepare<T, 64, true>);
  if constexpr (sizeof(T) == 2) {
    also(prepare<T, 8, false>), also(prepare<T, 16, false>);
    also(prepare<T, 32, false>), also(prepare<T, 64, false>);
  }
  return error;
}

template <class T, int kTokens, bool kAligned>
cudaError_t launch(const Decode& call, const DecodePlans& plans, cudaStream_t stream) {
  const DecodePlan& plan = plans.mixture;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(plan.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(plan.cluster * plan.slices));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = plans.shared_bytes();
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = plan.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, decode<T, kTokens, kAligned>, call, plans);
}

template <class T>
cudaError_t launch(const Decode& call, const DecodePlans& plans, cudaStream_t stream) {
  return with_instance<T>(call, plans, [&](auto tokens, auto aligned) {
    return launch<T, decltype(tokens)::value, decltype(aligned)::value>(call, plans, stream);
  });
}

}  // namespace

cudaError_t prepare_decode(int shared_bytes, int* max_cluster) {
  *max_cluster = min(*max_cluster, kMostPortable);
  cudaError_t error = prepare_tokens<float>(shared_bytes, max_cluster);
  if (error == cudaSuccess) error = prepare_tokens<BFloat16>(shared_bytes, max_cluster);
  if (error == cudaSuccess) error = prepare_tokens<Float16>(shared_bytes, max_cluster);
  return error;
}

cudaError_t launch_decode(const Decode& call, const DecodePlans& plans, cudaStream_t stream) {
  switch (call.dtype) {
    case Dtype::bf16:
      return launch<BFloat16>(call, plans, stream);
    case Dtype::f16:
      return launch<Float16>(call, plans, stream);
    default:
      return launch<float>(call, plans, stream);
  }
}

}  // namespace pemt_fast::cuda
