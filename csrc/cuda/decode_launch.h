// SPDX-License-Identifier: Apache-2.0
//
// The way from the upper storey to the decode kernel, without headers of CUDA.
#pragma once

#include "decode.h"

namespace pemt_fast::cuda {

// Launches a call on a stream (a cudaStream_t); waits for nothing. Returns what went wrong, or
// null.
const char* launch_decode(const Decode& call, const DecodePlan& plan, Dtype dtype, void* stream);

}  // namespace pemt_fast::cuda
