// SPDX-License-Identifier: Apache-2.0
//
// What one instruction set provides: matrix products of small blocks, the vector passes between
// them, and packing. `adapter_mixture.cpp` schedules these functions and knows no instruction set;
// `isa.h` says which table runs on this machine. No torch header is included in this folder.
//
// Letters: T tokens, E adapters, D input width, R bottleneck, H output width, N = sum of R.
#pragma once

#include <cstdint>

namespace pemt_fast::cpu {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };
constexpr int kDtypes = 3;
constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

enum class Activation : int { identity = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };
constexpr int kActivations = 5;

// Widest block of columns that a product or a pass sees; blocks start at multiples of a panel.
constexpr int64_t kBlockColumns = 64;

// Columns of a packed panel. Only products made outside of this folder use wider panels of pairs;
// such products read A along its rows only (a_step 2) and an even number of terms.
constexpr int64_t kPanel = 16;

// Up to this many rows a product reads its weight as it lies in memory faster than from panels.
constexpr int64_t kFewRows = 4;

// C[m, n] (+)= A[m, k] * B[k, n], C in float32. Strides in elements. C has room for
// n rounded up to kBlockColumns.
//
// B is one of
//   panels  B[k][16] per 16 columns, zero beyond n   b_row = 16 (32 for pairs), b_panel = k * 16
//   rows    B[k][n] as the weight lies in memory     b_row = its row stride
//   dots    B[n][k], one reduction per column        b_row = its row stride
// bfloat16 products work on pairs along k: A has a_step elements from pair to pair, panels hold
// [ceil(k / 2)][16][2].
struct Product {
  const void* a;
  int64_t a_row;   // from row to row
  int64_t a_step;  // from k to k + 1 (float32), from pair to pair (bfloat16)
  const void* b;
  int64_t b_row;
  int64_t b_panel;
  float* c;
  int64_t c_row;
  int64_t m, n, k;
  bool accumulate;
};
using Multiply = void (*)(const Product&);

// One block of hidden units, rows `token` ... of the call and columns `unit` ... of the units.
// Forward:  gated = act(c + bias) * gate          saved, hidden: what backward and the caller keep
// Backward: d_z = (c * gate + d_hidden) * act'(saved), d_gate_e += sum over units of c * act
// `c` holds x * w_down^T, or grad_out * w_up^T. Everything in between is float32.
struct UnitBlock {
  const float* c;
  int64_t c_row;
  int64_t rows, columns;
  int64_t token, unit;
  const float* gate;  // [G, gate_row], a row serves tokens_per_row tokens; zero-padded
  int64_t gate_row;
  int64_t tokens_per_row;
  const int32_t* adapter_of_unit;  // [N padded to kBlockColumns]; padding names a zero gate
  const float* bias;               // [N padded] or null; forward
  void* gated;                     // of the first row, compute dtype, zero-filled up to padded
  int64_t gated_row;
  int64_t padded;  // columns to write to `gated`: columns rounded up to a panel
  // Arrays [T, N] in the storage dtype, or null. Pointers are those of the whole array.
  int64_t n;
  void* saved;
  void* hidden;
  const void* d_hidden;  // backward: gradient of the hidden output
  void* d_z;             // backward: kept for the weight gradients
  void* kept_gated;      // backward: act * gate, kept for the gradient of w_up
  double* d_gate;        // backward: [runs of equal gate rows in these rows, E], or null
  int64_t d_gate_row;
};
using UnitPass = void (*)(const UnitBlock&);

// out = c + base, rounded once. Pointers of the first element of the block.
struct OutputBlock {
  const float* c;
  int64_t c_row;
  int64_t rows, columns;
  const void* base;  // or null
  int64_t base_row;
  void* out;
  int64_t out_row;
};
using OutputPass = void (*)(const OutputBlock&);

// The Task Sparsity Loss of the tokens from `begin` on, all but its matrix products:
//   dot_e = sum over its units of products * hidden
//   squared_e = sum over its units of folded * hidden
//   cosine_e = dot_e / (|z| sqrt(squared_e))
//   for_dot_e = d_cosine_e / (|z| sqrt(squared_e))
//   for_norm_e = -d_cosine_e cosine_e / squared_e
//   scaled = hidden * for_dot, by_norm = hidden * for_norm
//   d_hidden = products * for_dot + folded * for_norm
//   d_z = -z * (sum over e of d_cosine_e cosine_e) / |z|^2
// `projected` is added to `folded`, to the sums twice. Pointers are those of the whole arrays, in
// the storage dtype unless they are typed; what is null is not read or not written.
struct LossRows {
  int64_t begin, end;
  int64_t h, n, adapters;
  const int64_t* ends;  // [E]: the unit behind each adapter's last one
  const void* z;        // [T, H]
  int64_t z_row;
  const void* hidden;  // [T, N]
  int64_t hidden_row;
  const void* products;   // [T, N]
  const void* folded;     // [T, N]
  const void* projected;  // [T, N], or one row for all with `projected_row` 0
  int64_t projected_row;
  const float* offset_dot;      // [T, E], added to the sums
  const float* offset_squared;  // [T, E]
  const bool* mask;             // [T]: tokens that count; the others get zeros
  const float* d_cosine;        // [E]
  double* cosines;              // [E], sums over the tokens are added to it
  float* for_dot;               // [T, E]
  float* for_norm;              // [T, E]
  void* scaled;                 // [T, N]
  void* by_norm;                // [T, N]
  void* d_hidden;               // [T, N]
  void* d_z;                    // [T, H]
};
using LossPass = void (*)(const LossRows&);

struct Kernels {
  const char* name;
  int64_t panel_bf16;    // columns of a panel of pairs; panels of float32 have kPanel
  int64_t rows_at_once;  // of a product whose sums are used before they leave the first cache
  bool bf16;             // bfloat16 products exist; otherwise bfloat16 is computed in float32
  // A float32, C float32; B by layout and dtype.
  Multiply panels_f32;
  Multiply rows_f32[kDtypes];
  Multiply dots_f32[kDtypes];
  // A and B bfloat16.
  Multiply panels_bf16;
  Multiply rows_bf16;
  Multiply dots_bf16;
  // [storage dtype][compute dtype is bfloat16][activation]
  UnitPass forward[kDtypes][2][kActivations];
  UnitPass backward[kDtypes][2][kActivations];
  // [dtype of out][dtype of base]: the same dtype or float32
  OutputPass output[kDtypes][kDtypes];
  LossPass sparsity_loss[kDtypes];
  // 16 columns from `first` of B = weight^T (weight [n, k]) or B = weight (weight [k, n]), zero
  // beyond n; `panel_row` elements from one k (pair) to the next. Source and panel in the compute
  // dtype.
  void (*pack_transposed_f32)(const float*, int64_t row, int64_t n, int64_t k, int64_t first,
                              float*, int64_t panel_row);
  void (*pack_f32)(const float*, int64_t row, int64_t n, int64_t k, int64_t first, float*,
                   int64_t panel_row);
  void (*pack_transposed_bf16)(const uint16_t*, int64_t row, int64_t n, int64_t k, int64_t first,
                               uint16_t*, int64_t panel_row);
  void (*pack_bf16)(const uint16_t*, int64_t row, int64_t n, int64_t k, int64_t first, uint16_t*,
                    int64_t panel_row);
  void (*to_f32[kDtypes])(const void*, int64_t count, float*);
  void (*from_f32[kDtypes])(const float*, int64_t count, void*);
  // Called by each thread after its last product; AMX gives its tile state back.
  void (*release)();
};

}  // namespace pemt_fast::cpu
