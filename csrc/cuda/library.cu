// SPDX-License-Identifier: Apache-2.0
//
// The library's table of functions; what it knows of devices and streams.
#include <map>
#include <mutex>
#include <tuple>

#include "decode_launch.h"
#include "library.h"

#define TEXT_OF(value) #value
#define TEXT(value) TEXT_OF(value)

namespace pemt_fast::cuda {
namespace {

constexpr int kTickets = 4096;
constexpr int kDevices = 64;

// On each device. Not from torch's allocator: memory of a captured graph's own pool may be used
// again when the graph is gone, and a counter that is set to 0 at every call costs a launch.
__device__ unsigned tickets[kTickets];

const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  (void)cudaGetLastError();  // it is told here, not at the next call of somebody else
  return cudaGetErrorString(error);
}

cudaError_t describe_current(int device, DecodeDevice* found) {
  const auto ask = [&](cudaDeviceAttr what, int* answer) {
    return cudaDeviceGetAttribute(answer, what, device);
  };
  int has_clusters = 0;
  cudaError_t error = ask(cudaDevAttrMultiProcessorCount, &found->processors);
  if (error != cudaSuccess) return error;
  error = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin, &found->shared_bytes);
  if (error != cudaSuccess) return error;
  error = ask(cudaDevAttrClusterLaunch, &has_clusters);
  if (error != cudaSuccess) return error;
  found->max_cluster = has_clusters ? kThreads : 1;
  return prepare_decode(found->shared_bytes, &found->max_cluster);
}

const char* describe(int device, DecodeDevice* found) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return text_of(error);
  error = describe_current(device, found);
  const cudaError_t back = cudaSetDevice(before);
  return text_of(error == cudaSuccess ? back : error);
}

unsigned* ticket(int device, void* stream) {
  cudaStreamCaptureStatus status{};
  unsigned long long capture = 0;
  if (device >= kDevices || text_of(cudaSetDevice(device)) != nullptr) return nullptr;
  if (text_of(cudaStreamGetCaptureInfo((cudaStream_t)stream, &status, &capture))) return nullptr;
  if (status != cudaStreamCaptureStatusActive) capture = 0;
  static std::mutex mutex;
  static std::map<std::tuple<int, void*, unsigned long long>, int> numbers;
  static int used[kDevices];
  static unsigned* first[kDevices];
  const std::lock_guard<std::mutex> lock(mutex);
  if (first[device] == nullptr) {
    if (text_of(cudaGetSymbolAddress((void**)&first[device], tickets))) return nullptr;
  }
  const auto key = std::make_tuple(device, stream, capture);
  const auto found = numbers.find(key);
  if (found != numbers.end()) return first[device] + found->second;
  // A graph may be replayed for as long as the process lives: its number is never given again.
  if (used[device] == kTickets) return nullptr;
  numbers[key] = used[device];
  return first[device] + used[device]++;
}

const char* decode(int device, const Decode& call, const DecodePlans& plans, void* stream) {
  const cudaError_t error = cudaSetDevice(device);
  return text_of(error != cudaSuccess ? error : launch_decode(call, plans, (cudaStream_t)stream));
}

const Library library{kLayout,
                      TEXT(__CUDACC_VER_MAJOR__) "." TEXT(__CUDACC_VER_MINOR__),
                      TEXT(PEMT_FAST_CUDA_ARCHITECTURES),
                      false,
                      describe,
                      ticket,
                      decode};

}  // namespace
}  // namespace pemt_fast::cuda

extern "C" __attribute__((visibility("default"))) const pemt_fast::cuda::Library*
pemt_fast_cuda_library() {
  return &pemt_fast::cuda::library;
}
