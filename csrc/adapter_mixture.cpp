// SPDX-License-Identifier: Apache-2.0
//
// Registration and gradients of `pemt_fast::adapter_mixture_native`, the operator of the kernels in
// this folder. The twin of pemt_fast/ops/autograd.py: the same things are kept for backward, and
// only the gradients that are needed are asked for.
#include "adapter_mixture.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

namespace pemt_fast {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

constexpr int kInputs = 12;  // of the operator, tensors and others

template <class Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

auto forward(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& w_down,
             const at::Tensor& w_up, const OptionalTensor& b_down, const OptionalTensor& b_up,
             const OptionalTensor& base, at::IntArrayRef ranks, std::string_view activation,
             bool recompute, bool with_hidden, bool save) {
  static const auto op = find_operator<decltype(adapter_mixture_forward_cpu)>(
      "pemt_fast::adapter_mixture_native_forward");
  return op.call(x, gate, w_down, w_up, b_down, b_up, base, ranks, activation, recompute,
                 with_hidden, save);
}

at::Tensor or_empty(const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); }

OptionalTensor if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

struct AdapterMixtureFunction : torch::autograd::Function<AdapterMixtureFunction> {
  static variable_list forward(AutogradContext* ctx, const Variable& x, const Variable& gate,
                               const Variable& w_down, const Variable& w_up,
                               const OptionalTensor& b_down, const OptionalTensor& b_up,
                               const OptionalTensor& base, at::IntArrayRef ranks,
                               std::string_view activation, bool recompute, bool with_hidden) {
    const auto needs = [](const OptionalTensor& t) { return t && t->requires_grad(); };
    const bool needs_w_down = w_down.requires_grad();
    const bool needs_hidden = x.requires_grad() || gate.requires_grad() || needs_w_down ||
                              w_up.requires_grad() || needs(b_down);
    // The identity and relu differentiate from act(z), which is the hidden output itself.
    const bool shared = with_hidden && !keeps_pre_activation(activation);
    const bool save = needs_hidden && !recompute && !shared;
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [out, hidden, saved] = pemt_fast::forward(x, gate, w_down, w_up, b_down, b_up, base, ranks,
                                                   activation, recompute, with_hidden, save);
    const bool keeps_hidden = shared && !recompute && needs_hidden;
    const bool keeps_x = needs_w_down || (needs_hidden && recompute);
    ctx->save_for_backward({keeps_x ? x : at::Tensor(), gate, w_down, w_up, or_empty(b_down),
                            or_empty(b_up),
                            keeps_hidden ? hidden
                            : save       ? saved
                                         : at::Tensor()});
    ctx->saved_data["ranks"] = ranks.vec();
    ctx->saved_data["activation"] = std::string(activation);
    if (base) ctx->saved_data["base_dtype"] = base->scalar_type();
    ctx->set_materialize_grads(false);
    if (!with_hidden) ctx->mark_non_differentiable({hidden});
    return {out, hidden};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(kInputs - 1);
    const at::Tensor &grad_out = grads[0], &grad_hidden = grads[1];
    if (!grad_out.defined() && !grad_hidden.defined()) return result;
    // Captured before the guard: with create_graph the results must say that they end here.
    const bool twice = at::GradMode::is_enabled();
    std::array<bool, 6> needs;
    // Undefined optional inputs take no place among the edges of the graph.
    const auto saved = ctx->get_saved_variables();
    size_t edge = 0;
    for (size_t i = 0; i < needs.size(); i++) {
      const bool given = (i != 4 || saved[4].defined()) && (i != 5 || saved[5].defined());
      needs[i] = given && ctx->needs_input_grad(edge);
      edge += given;
    }
    const auto base_dtype = ctx->saved_data.find("base_dtype");
    if (base_dtype != ctx->saved_data.end() && ctx->needs_input_grad(edge) && grad_out.defined()) {
      result[6] = grad_out.to(base_dtype->second.toScalarType());
    }
    if (std::any_of(needs.begin(), needs.end(), [](bool need) { return need; })) {
      static const auto op = find_operator<decltype(adapter_mixture_backward_cpu)>(
          "pemt_fast::adapter_mixture_native_backward");
      at::AutoDispatchBelowADInplaceOrView guard;
      auto found = op.call(if_defined(grad_out), if_defined(grad_hidden), if_defined(saved[0]),
                           saved[1], saved[2], saved[3], if_defined(saved[4]), if_defined(saved[5]),
                           if_defined(saved[6]), ctx->saved_data["ranks"].toIntVector(),
                           ctx->saved_data["activation"].toStringView(), needs);
      std::apply(
          [&](auto&... grad) {
            size_t i = 0;
            ((needs[i] ? (void)(result[i] = grad) : void(), i++), ...);
          },
          found);
    }
    if (twice) forbid_second_derivative(grads, result);
    return result;
  }

  static void forbid_second_derivative(const variable_list& grads, variable_list& result) {
    const auto requires_grad = [](const at::Tensor& t) { return t.defined() && t.requires_grad(); };
    if (std::none_of(grads.begin(), grads.end(), requires_grad)) return;
    for (size_t i = 0; i < 6; i++) {
      if (!result[i].defined()) continue;
      const auto error = std::make_shared<torch::autograd::DelayedError>(
          "trying to differentiate twice a function that was marked with @once_differentiable: "
          "adapter_mixture has second derivatives only with impl=\"reference\"",
          1);
      variable_list inputs{result[i].detach().requires_grad_()};
      result[i] = (*error)(std::move(inputs))[0];
    }
  }
};

std::tuple<at::Tensor, at::Tensor> differentiable(
    const at::Tensor& x, const at::Tensor& gate, const at::Tensor& w_down, const at::Tensor& w_up,
    const OptionalTensor& b_down, const OptionalTensor& b_up, const OptionalTensor& base,
    at::IntArrayRef ranks, std::string_view activation, bool recompute, bool with_hidden) {
  const auto needs = [](const OptionalTensor& t) { return t && t->requires_grad(); };
  if (at::GradMode::is_enabled() &&
      (x.requires_grad() || gate.requires_grad() || w_down.requires_grad() ||
       w_up.requires_grad() || needs(b_down) || needs(b_up) || needs(base))) {
    auto results = AdapterMixtureFunction::apply(x, gate, w_down, w_up, b_down, b_up, base, ranks,
                                                 activation, recompute, with_hidden);
    return {results[0], results[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return adapter_mixture(x, gate, w_down, w_up, b_down, b_up, base, ranks, activation, recompute,
                         with_hidden);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> adapter_mixture(
    const at::Tensor& x, const at::Tensor& gate, const at::Tensor& w_down, const at::Tensor& w_up,
    const OptionalTensor& b_down, const OptionalTensor& b_up, const OptionalTensor& base,
    at::IntArrayRef ranks, std::string_view activation, bool recompute, bool with_hidden) {
  static const auto op =
      find_operator<decltype(adapter_mixture)>("pemt_fast::adapter_mixture_native");
  return op.call(x, gate, w_down, w_up, b_down, b_up, base, ranks, activation, recompute,
                 with_hidden);
}

bool keeps_pre_activation(std::string_view activation) {
  return activation != "identity" && activation != "relu";
}

TORCH_LIBRARY_FRAGMENT(pemt_fast, m) {
#define PEMT_FAST_INPUTS                                                              \
  "Tensor x, Tensor gate, Tensor w_down, Tensor w_up, Tensor? b_down, Tensor? b_up, " \
  "Tensor? base, int[] ranks, str activation, bool recompute, bool with_hidden"
  m.def("adapter_mixture_native(" PEMT_FAST_INPUTS ") -> (Tensor out, Tensor hidden)");
  m.def("adapter_mixture_native_forward(" PEMT_FAST_INPUTS
        ", bool save) -> (Tensor, Tensor, Tensor)");
#undef PEMT_FAST_INPUTS
  m.def(
      "adapter_mixture_native_backward(Tensor? grad_out, Tensor? grad_hidden, Tensor? x, "
      "Tensor gate, Tensor w_down, Tensor w_up, Tensor? b_down, Tensor? b_up, Tensor? saved, "
      "int[] ranks, str activation, bool[6] needs) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(pemt_fast, Autograd, m) { m.impl("adapter_mixture_native", &differentiable); }

TORCH_LIBRARY_IMPL(pemt_fast, CPU, m) {
  m.impl("adapter_mixture_native", &adapter_mixture_cpu);
  m.impl("adapter_mixture_native_forward", &adapter_mixture_forward_cpu);
  m.impl("adapter_mixture_native_backward", &adapter_mixture_backward_cpu);
}

}  // namespace pemt_fast
