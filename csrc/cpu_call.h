// SPDX-License-Identifier: Apache-2.0
//
// One call of the operator on CPU tensors, prepared for cpu/adapter_mixture.h: sizes, gates and
// parameters in the layouts and dtypes that the kernels read.
#pragma once

#include <ATen/ATen.h>

#include "adapter_mixture.h"
#include "cpu/isa.h"
#include "packed_weights.h"

namespace pemt_fast {

cpu::Dtype cpu_dtype(at::ScalarType type);
cpu::Activation cpu_activation(std::string_view name);

// Of a call from here: one within a parallel region.
int threads();

// The sizes of a tensor with another width.
at::DimVector with_last(at::IntArrayRef sizes, int64_t last);

// [rows, width] whose rows are dense; a view wherever the strides allow.
at::Tensor as_rows(const at::Tensor& tensor, int64_t rows, int64_t width);

// rows [T, width] * weight^T + bias in the dtype of the rows, dense, as `sizes` with the width of
// the result. Nobody else's: what is beside the linear is added to it in place.
at::Tensor linear(const at::Tensor& rows, const at::Tensor& weight, const OptionalTensor& bias,
                  at::IntArrayRef sizes);

// Sizes of a call and its small arguments as the kernels want them.
struct Call {
  int64_t tokens, d, h, n, adapters, groups;
  at::ScalarType type;
  bool bf16;
  at::Tensor gate;             // [G, E + 1] float32, the last column 0
  at::Tensor adapter_of_unit;  // [N padded] int32; padding names the last column
  bool has_zero_gate = false;

  Call(at::ScalarType type, int64_t tokens, const at::Tensor& gate, const at::Tensor& w_down,
       const at::Tensor& w_up, at::IntArrayRef ranks);

  int64_t tokens_per_row() const { return groups > 0 ? tokens / groups : 1; }
  float* gate_data() const { return gate.mutable_data_ptr<float>(); }
};

// The parameters of a call; replaced by sanitised copies where needed (see `quarantine`).
struct Parameters {
  at::Tensor w_down, w_up;  // contiguous
  OptionalTensor b_down, b_up;
  bool down_is_frozen, up_is_frozen;
};

// In inference every weight counts as frozen. In training one that asks for gradients will have
// changed before it is seen again; a copy is never seen again.
Parameters parameters(const at::Tensor& w_down, const at::Tensor& w_up,
                      const OptionalTensor& b_down, const OptionalTensor& b_up, bool training);

// Where a gate is 0 nothing of an adapter may reach the result, but 0 times infinity is NaN. The
// values of an adapter that are not finite move into its gates: zeros in the weights, NaN in the
// gates that are not 0. True if there were any. Rare: only here are weights copied.
bool quarantine(Call& call, Parameters& parameters, bool skips_unused);

// Tensors that must outlive a call of the kernels.
struct Kept {
  std::vector<Panels> panels;
  std::vector<at::Tensor> tensors;
};

// A weight as the right side of a product, with the rows of b_up below it where `bias` is given.
cpu::Operand operand(const Call& call, const at::Tensor& weight, const OptionalTensor& bias,
                     bool sums_over_width, bool frozen, Kept& kept);

// b_up as the right side of grad_out * b_up^T.
cpu::Operand bias_operand(const Call& call, const Parameters& parameters, Kept& kept);

// b_down as float32 [N padded].
const float* unit_bias(const Call& call, const OptionalTensor& b_down, Kept& kept);

// Everything of a walk but its products, its pass and its output.
cpu::Walk new_walk(const Call& call);
void set_input(cpu::Walk& walk, const at::Tensor& x, int64_t width);

}  // namespace pemt_fast
