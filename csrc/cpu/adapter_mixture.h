// SPDX-License-Identifier: Apache-2.0
//
// The mixture on raw pointers: two products with a vector pass between them, for blocks of tokens
// that are small enough for the second cache. Forward is x -> hidden units -> out with w_down,
// w_up; the gradient of x is grad_out -> hidden units -> d_x with w_up, w_down: the same walk,
// another pass. The arithmetic of a block is in kernels.h.
#pragma once

#include "kernels.h"

namespace pemt_fast::cpu {

// A weight [units, width] as the right side of a product: packed panels, or its rows in memory.
struct Operand {
  const void* data = nullptr;
  bool panels = false;
  Dtype dtype = Dtype::f32;    // of `data`
  int64_t row = 0;             // stride of the rows, in elements
  const void* bias = nullptr;  // rows of b_up [adapters, width], where these are not in the panels
};

struct Walk {
  int64_t tokens = 0;
  int64_t width_in = 0, units = 0, width_out = 0;
  int64_t adapters = 0;
  Dtype storage = Dtype::f32;  // of x, out and the arrays of the pass
  bool bf16 = false;           // products of bfloat16 pairs

  const void* x = nullptr;  // [tokens, width_in]
  int64_t x_row = 0;
  Operand first;   // sums over width_in
  Operand second;  // sums over units, and over the adapters if `has_up_bias`

  // The pass between the products. Fields of `block` that describe a block are filled in by `run`.
  UnitPass pass = nullptr;
  UnitBlock block{};
  float* d_gate = nullptr;  // [G, adapters]: the sums over tokens of what the pass adds up, or null
  // b_up [adapters, width_in], if there is one: x * b_up^T is its part of d_gate.
  bool has_gate_bias = false;
  Operand gate_bias;
  bool skips_unused = false;  // adapters whose gates are 0 for a block of tokens are left out

  // The output; null to stop after the pass.
  void* out = nullptr;
  const void* base = nullptr;
  int64_t base_row = 0;
  Dtype base_dtype = Dtype::f32;  // `storage` or float32
  // b_up is one more unit for each adapter, whose activation is 1: its gate joins the hidden units
  // and its row of b_up joins w_up. So that the gate is not rounded to bfloat16 it then comes in
  // `gate_parts` parts, and b_up as often: rows units ... units + gate_parts * adapters of
  // `second`.
  bool has_up_bias = false;
};

// 1 for float32 products, 2 for products of bfloat16.
inline int64_t gate_parts(bool bf16) { return bf16 ? 2 : 1; }

// Computes on at most `threads` threads. The result does not depend on which thread did what.
void run(const Kernels& kernels, const Walk& walk, int threads);

// The gates of one token as left side of a product with rows of b_up, see `has_up_bias`.
void split_gate(const float* gate, int64_t adapters, bool bf16, void* out);

// d_weight[units, width] = sum over tokens of units_t * x_t, for one or two weights at once. Sums
// over tokens run in a fixed order, in blocks, in float32.
struct WeightGradient {
  const void* unit_values = nullptr;  // [tokens, units]
  Dtype units_dtype = Dtype::f32;     // bf16 for products of bfloat16
  const void* x = nullptr;            // [tokens, width]
  int64_t x_row = 0;
  int64_t width = 0;
  void* d_weight = nullptr;  // [units, width] in `dtype`
  Dtype dtype = Dtype::f32;
};
void run(const Kernels& kernels, const WeightGradient* gradients, int count, int64_t tokens,
         int64_t units, Dtype storage, bool bf16, int threads);

// Bytes of a packed weight [units, width]: `sums_over_width` for the first product of a walk.
int64_t packed_bytes(const Kernels& kernels, int64_t units, int64_t width, bool sums_over_width,
                     bool bf16);
// Source and panels in the compute dtype; `row` is the stride of the weight's rows.
void pack(const Kernels& kernels, const void* weight, int64_t row, int64_t units, int64_t width,
          bool sums_over_width, bool bf16, void* panels, int threads);

// Whether each adapter's rows of a weight are all finite. `finite` is only ever cleared.
void clear_if_not_finite(const void* weight, Dtype dtype, int64_t row, int64_t width,
                         const int32_t* adapter_of_unit, int64_t units, bool* finite);

}  // namespace pemt_fast::cpu
