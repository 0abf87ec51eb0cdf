// SPDX-License-Identifier: Apache-2.0
//
// Skills mixed into the factors of each task, and the gradients of that. The products with the
// tokens are walks (adapter_mixture.h). What it is for: pemt_fast/ops/skill_mixture.py.
//
// Letters: P splits, K skills, R rank; rows of weights, one for each factor that is mixed.
#pragma once

#include "kernels.h"

namespace pemt_fast::cpu {

struct SkillSizes {
  int64_t splits, skills, rank, rows;
  // The rows of the sequences, for gradients; null where each sequence has its own, in order.
  int64_t sequences;
  const int64_t* row_of;
};

// One of the two factors: mixed[row, r, p, i] = sum over k of weights[row, p, k] skills[p, k, r,
// i].
struct SkillFactor {
  const void* skills;  // [P, K, R, width]
  Dtype dtype;
  int64_t width;         // of a split
  const float* weights;  // [rows, P, K]
  void* mixed;           // [rows, R, P * width], see `mix`

  const void* d_mixed;  // [sequences, R, P * width]
  Dtype d_mixed_dtype;
  void* d_skills;    // like skills, or null
  float* d_weights;  // [rows, P, K], or null
};

// Rounded once to `storage`; kept as bfloat16 where products are of bfloat16, else as float32.
void mix(const Kernels& kernels, const SkillSizes& sizes, const SkillFactor* factors, int count,
         Dtype storage, bool bf16, int threads);

// Gradients of the skills and of the weights. Each thread has the same part in every call, and the
// sums of the threads are added in their order.
void unmix(const Kernels& kernels, const SkillSizes& sizes, const SkillFactor* factors, int count,
           int threads);

}  // namespace pemt_fast::cpu
