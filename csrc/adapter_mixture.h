// SPDX-License-Identifier: Apache-2.0
//
// The operators of `pemt_fast._C`, as C++ functions. What they compute: pemt_fast/ops/
// adapter_mixture.py, and with `weight` linear_mixture.py. Letters as there. `adapter_mixture.cpp`
// registers them and owns what is kept for backward; `adapter_mixture_cpu.cpp` computes.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace pemt_fast {

using OptionalTensor = std::optional<at::Tensor>;

// Inference. -> out, hidden (empty unless asked for)
std::tuple<at::Tensor, at::Tensor> adapter_mixture_cpu(
    const at::Tensor& x, const at::Tensor& gate, const at::Tensor& w_down, const at::Tensor& w_up,
    const OptionalTensor& b_down, const OptionalTensor& b_up, const OptionalTensor& base,
    at::IntArrayRef ranks, std::string_view activation, bool recompute, bool with_hidden,
    const OptionalTensor& weight, const OptionalTensor& bias);

// Training. -> out, hidden (empty unless asked for), saved (empty unless `save`)
std::tuple<at::Tensor, at::Tensor, at::Tensor> adapter_mixture_forward_cpu(
    const at::Tensor& x, const at::Tensor& gate, const at::Tensor& w_down, const at::Tensor& w_up,
    const OptionalTensor& b_down, const OptionalTensor& b_up, const OptionalTensor& base,
    at::IntArrayRef ranks, std::string_view activation, bool recompute, bool with_hidden, bool save,
    const OptionalTensor& weight, const OptionalTensor& bias);

// -> d_x, d_gate, d_w_down, d_w_up, d_b_down, d_b_up; empty where `needs` says no. With `weight`
// d_x is also that of the linear.
using Gradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
Gradients adapter_mixture_backward_cpu(const OptionalTensor& grad_out,
                                       const OptionalTensor& grad_hidden, const OptionalTensor& x,
                                       const at::Tensor& gate, const at::Tensor& w_down,
                                       const at::Tensor& w_up, const OptionalTensor& b_down,
                                       const OptionalTensor& b_up, const OptionalTensor& saved,
                                       at::IntArrayRef ranks, std::string_view activation,
                                       std::array<bool, 6> needs, const OptionalTensor& weight);

// The differentiable operator, through the dispatcher. -> out, hidden
std::tuple<at::Tensor, at::Tensor> adapter_mixture(
    const at::Tensor& x, const at::Tensor& gate, const at::Tensor& w_down, const at::Tensor& w_up,
    const OptionalTensor& b_down, const OptionalTensor& b_up, const OptionalTensor& base,
    at::IntArrayRef ranks, std::string_view activation, bool recompute, bool with_hidden,
    const OptionalTensor& weight, const OptionalTensor& bias);

bool keeps_pre_activation(std::string_view activation);

}  // namespace pemt_fast
