// SPDX-License-Identifier: Apache-2.0
//
// The library of CUDA kernels (`cuda/library.h`): loaded by name, since it is compiled by itself.
#pragma once

#include <string>

#include "cuda/library.h"

namespace pemt_fast {

// Loads it from a file in the place of what was loaded before. What went wrong, or nothing.
std::string load_cuda_library(const std::string& path);

// Null if none was loaded.
const cuda::Library* cuda_library();

// What the library found out about a device; null if it cannot run there.
const cuda::DecodeDevice* cuda_device(int index);

// Why it cannot, or nothing.
std::string cuda_device_obstacle(int index);

}  // namespace pemt_fast
