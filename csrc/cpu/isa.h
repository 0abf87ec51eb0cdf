// SPDX-License-Identifier: Apache-2.0
//
// Which instruction sets this machine has, and the kernels of the one in use.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace pemt_fast::cpu {

// A value as a type, to pass template arguments to a generic lambda.
template <auto V>
struct Constant {
  static constexpr auto value = V;
};

namespace plain {
Kernels make_kernels();
}
namespace avx2 {
Kernels make_kernels();
}
namespace avx512 {
Kernels make_kernels();
}
namespace avx512_bf16 {
Kernels make_kernels();
}

// Names of what this machine can run, from the least to the best; the best is used.
std::vector<std::string> available_isas();

// The kernels in use.
const Kernels& kernels();

// Use another instruction set from now on. False if this machine does not have it.
bool use_isa(const std::string& name);

// Adds kernels that are made elsewhere (AMX: in the upper storey, on torch's own products). They
// are preferred over the built-in ones if `best`.
void add_isa(const Kernels& kernels, bool best);

struct Caches {
  int64_t l1, l2;  // bytes of data cache per core
};
const Caches& caches();

}  // namespace pemt_fast::cpu
