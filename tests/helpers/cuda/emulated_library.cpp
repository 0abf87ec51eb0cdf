// SPDX-License-Identifier: Apache-2.0
//
// The library of csrc/cuda/library.h on the host: its kernels on emulated threads, for CPU tensors.
// PEMT_FAST_EMULATED_DEVICE says what plans are made for: processors, shared bytes, blocks of a
// cluster; PEMT_FAST_EMULATED_TICKETS how many counters there are; PEMT_FAST_EMULATED_ERROR what a
// launch answers. pemt_fast_emulated_launches() counts them.
#include "emulated_device.h"
// clang-format off
#include "../../../csrc/cuda/decode_kernel.h"
#include "../../../csrc/cuda/library.h"
// clang-format on

#include <array>
#include <mutex>
#include <numeric>

namespace pemt_fast::cuda {
namespace {

const char* describe(int device, DecodeDevice* found) {
  *found = {132, 232448, 8};
  const char* wanted = std::getenv("PEMT_FAST_EMULATED_DEVICE");
  if (wanted != nullptr && std::sscanf(wanted, "%d %d %d", &found->processors, &found->shared_bytes,
                                       &found->max_cluster) != 3) {
    return "PEMT_FAST_EMULATED_DEVICE must be three numbers";
  }
  return device == 0 ? nullptr : "there is one emulated device";
}

unsigned* ticket(int, void*) {
  static unsigned counter = 0;
  const char* wanted = std::getenv("PEMT_FAST_EMULATED_TICKETS");
  return wanted != nullptr && std::atoi(wanted) == 0 ? nullptr : &counter;
}

template <class T>
void run(const Decode& call, const DecodePlans& plans) {
  std::vector<int> order(size_t(plans.mixture.slices));
  std::iota(order.begin(), order.end(), 0);
  with_instance<T>(call, plans, [&](auto tokens, auto aligned) {
    run_grid(order, plans.mixture.cluster, plans.shared_bytes(), [&] {
      decode_block<T, decltype(tokens)::value, decltype(aligned)::value>(call, plans,
                                                                         shared_memory());
    });
  });
}

long launches = 0;

const char* decode(int, const Decode& call, const DecodePlans& plans, void*) {
  if (const char* error = std::getenv("PEMT_FAST_EMULATED_ERROR")) return error;
  static std::mutex mutex;  // one grid at a time
  const std::lock_guard<std::mutex> lock(mutex);
  launches++;
  if (call.dtype == Dtype::f32) {
    run<float>(call, plans);
  } else if (call.dtype == Dtype::bf16) {
    run<Bf16>(call, plans);
  } else {
    run<F16>(call, plans);
  }
  return nullptr;
}

const Library library{kLayout, "0.0", "emulated", true, describe, ticket, decode};

}  // namespace
}  // namespace pemt_fast::cuda

extern "C" const pemt_fast::cuda::Library* pemt_fast_cuda_library() {
  return &pemt_fast::cuda::library;
}

extern "C" long pemt_fast_emulated_launches() { return pemt_fast::cuda::launches; }
