// SPDX-License-Identifier: Apache-2.0
//
// Calls of few tokens without gradients on a CUDA device, in one launch (`cuda/decode.h`).
#pragma once

#include "adapter_mixture.h"

namespace pemt_fast {

// One mixture, stacked or packed; letters as in pemt_fast/ops/adapter_mixture.py.
struct MixtureTensors {
  const at::Tensor* gate;  // null where all gates are `scale`
  const at::Tensor *w_down, *w_up;
  OptionalTensor b_down, b_up;
  std::vector<int64_t> ranks;
  std::string_view activation;
  double scale = 1;
};

// y = base + mixture(x), and with `target` out = y + target(y). Null where the call is not for this
// kernel: too many tokens, a dtype or a form that it cannot read in place, no shared memory left.
// The arguments follow the rules; x is neither differentiated nor watched. `stream` is a
// cudaStream_t of the device of x.
std::optional<at::Tensor> decode_mixture(const at::Tensor& x, const MixtureTensors& mixture,
                                         const MixtureTensors* target, const OptionalTensor& base,
                                         void* stream);

// For tests and measurements: the grid of all calls from now on, 0 and 0 for what the plans say.
void use_decode_grid(int cluster, int slices);

// Blocks of a cluster and slices that the plan of a call has on a device.
std::array<int, 2> decode_grid(int index, int tokens, int d, int h, int units, int target_units,
                               at::ScalarType type);

}  // namespace pemt_fast
