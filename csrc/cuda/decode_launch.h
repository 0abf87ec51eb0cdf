// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime.h>

#include "decode.h"

namespace pemt_fast::cuda {

// Makes all instances ready on the current device; blocks of a cluster, 1 without clusters.
cudaError_t prepare_decode(int shared_bytes, int* max_cluster);

cudaError_t launch_decode(const Decode& call, const DecodePlans& plans, cudaStream_t stream);

}  // namespace pemt_fast::cuda
