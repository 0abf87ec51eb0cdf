// SPDX-License-Identifier: Apache-2.0
//
// How a walk is cut into blocks of tokens and columns, from the sizes and the caches.
#pragma once

#include "adapter_mixture.h"

namespace pemt_fast::cpu {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// How the tokens and columns of a walk are cut.
//
// fused: a thread takes a block of tokens through both products; the hidden units stay in its
// cache. Otherwise all threads share the columns of one product, wait, and share those of the
// other.
struct Plan {
  bool parallel = false;
  bool fused = true;
  int64_t rows = 0;  // tokens of a block
  int64_t blocks = 0;
  int64_t unit_columns = 0, out_columns = 0;  // of a task, if not fused
  int64_t k_step = 0;                         // terms of a sum that stays in registers
  int64_t units_row = 0;  // of the buffer of hidden units, a multiple of kBlockColumns
  int64_t runs = 0;       // of equal gate rows in a block, at most
};

Plan make_plan(const Kernels& kernels, const Walk& walk, int threads);

// Terms of the second sum: hidden units, and the gates that b_up is multiplied with.
inline int64_t terms_of(const Walk& w) {
  return w.units + (w.has_up_bias ? gate_parts(w.bf16) * w.adapters : 0);
}

}  // namespace pemt_fast::cpu
