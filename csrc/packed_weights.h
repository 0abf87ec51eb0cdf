// SPDX-License-Identifier: Apache-2.0
//
// Frozen weights, packed for the CPU kernels once and kept while they do not change.
//
// An entry belongs to a storage, a place in it, and the version counter that torch raises at every
// change in place. It goes when the tensor goes. Packed at first sight: which kernel runs, and so
// the last bits of a result, must not depend on what was called before. Changes that torch does not
// count (through `.data` or a NumPy view) are noticed by a few sampled elements.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "cpu/adapter_mixture.h"

namespace pemt_fast {

// A weight [units, width], contiguous, and how a product reads it.
struct WeightUse {
  const at::Tensor& weight;
  const at::Tensor* more_rows;  // b_up [adapters, width] below the weight, or null
  int64_t units, width;         // of `weight`
  bool sums_over_width;
  bool bf16;  // compute dtype; float32 otherwise
};

// A buffer of panels. The tensor owns the memory.
using Panels = std::shared_ptr<const at::Tensor>;

// The packed form of a frozen weight; null where torch counts no changes (inference tensors).
Panels packed_weight(const cpu::Kernels& kernels, const WeightUse& use);

// Packs without keeping.
Panels pack_weight(const cpu::Kernels& kernels, const WeightUse& use);

// Number and bytes of the packed weights, after dropping those of tensors that are gone.
std::pair<int64_t, int64_t> packed_weights_size();
void clear_packed_weights();

}  // namespace pemt_fast
