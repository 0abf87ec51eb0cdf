// SPDX-License-Identifier: Apache-2.0
//
// What the library `pemt_fast/_cuda.so` gives to the extension, which loads it by name: it is
// compiled by nvcc and brings its own CUDA runtime, so that neither needs headers of the other and
// a torch for another CUDA, or for none, does not matter. No header of torch or CUDA here.
#pragma once

#include "decode.h"

namespace pemt_fast::cuda {

// Counts up with every change of what is said here and in decode.h.
constexpr int kLayout = 2;

struct Library {
  int layout;
  const char* toolkit;        // that compiled it
  const char* architectures;  // it was compiled for
  bool emulated;              // on the host, for tests

  // Functions that return text say what went wrong, or null.

  // Finds out about a device, and loads the kernels there, which no capture may have to do.
  const char* (*describe)(int device, DecodeDevice* found);

  // A counter for the calls on a stream of a device, 0 between them; null when there are no more.
  // Calls in a captured graph have one of their own.
  unsigned* (*ticket)(int device, void* stream);

  // Launches a call on a stream (a cudaStream_t) of a device, which is then the current one of the
  // thread; waits for nothing.
  const char* (*decode)(int device, const Decode& call, const DecodePlans& plans, void* stream);
};

}  // namespace pemt_fast::cuda

extern "C" const pemt_fast::cuda::Library* pemt_fast_cuda_library();
