// SPDX-License-Identifier: Apache-2.0
//
// The Task Sparsity Loss between its matrix products: one pass over the rows of all tokens, on raw
// pointers. The arithmetic of a token is in loss_pass.h, the algebra in docs/derivation.md.
#pragma once

#include "kernels.h"

namespace pemt_fast::cpu {

struct SparsityLoss {
  int64_t tokens = 0;
  Dtype storage = Dtype::f32;
  const float* share = nullptr;   // [E]: the mean of each adapter's gates
  float scale = 1.f;              // of everything but `disagreement`
  float* disagreement = nullptr;  // [E]: 1 - mean cosine, 0 where no token counts
  LossRows rows{};                // without what belongs to a block of tokens, which `run` fills in
};

// Computes on at most `threads` threads. The bits of the result do not depend on how many.
void run(const Kernels& kernels, const SparsityLoss& loss, int threads);

}  // namespace pemt_fast::cpu
