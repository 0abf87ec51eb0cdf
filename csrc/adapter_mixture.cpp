// SPDX-License-Identifier: Apache-2.0
//
// Registration and gradients of `pemt_fast::adapter_mixture_native`, the operator of the kernels in
// this folder. With `weight` and `bias` it is linear_mixture: the products of the linear are
// torch's, and what the mixture makes is added to them in place: forward to the output,
// backward to d_x. The twin of
// pemt_fast/ops/autograd.py: the same things are kept for backward, and only the gradients that are
// needed are asked for.
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

constexpr int kInputs = 13;  // of the operator, tensors and others
constexpr int kBase = 6, kWeight = 11, kBias = 12;

template <class Signature>
auto find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

auto forward(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& w_down,
             const at::Tensor& w_up, const OptionalTensor& b_down, const OptionalTensor& b_up,
             const OptionalTensor& base, at::IntArrayRef ranks, std::string_view activation,
             bool recompute, bool with_hidden, bool save, const OptionalTensor& weight,
             const OptionalTensor& bias) {
  static const auto op = find_operator<decltype(adapter_mixture_forward_cpu)>(
      "pemt_fast::adapter_mixture_native_forward");
  return op.call(x, gate, w_down, w_up, b_down, b_up, base, ranks, activation, recompute,
                 with_hidden, save, weight, bias);
}

at::Tensor or_empty(const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); }

OptionalTensor if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

bool needs_grad(const OptionalTensor& t) { return t && t->requires_grad(); }

// The caller has cast what goes in.
c10::impl::ExcludeDispatchKeyGuard without_autocast() {
  return c10::impl::ExcludeDispatchKeyGuard(c10::autocast_dispatch_keyset);
}

// Below autograd no operator may return its input, as `to` does.
at::Tensor cast(const at::Tensor& t, at::ScalarType type) {
  return t.scalar_type() == type ? t : t.to(type);
}

OptionalTensor cast(const OptionalTensor& t, at::ScalarType type) {
  return t ? OptionalTensor(cast(*t, type)) : std::nullopt;
}

at::Tensor as_matrix(const at::Tensor& t) {
  return t.dim() == 2 ? t : t.reshape_symint({-1, t.sym_size(-1)});
}

struct AdapterMixtureFunction : torch::autograd::Function<AdapterMixtureFunction> {
  static variable_list forward(AutogradContext* ctx, const Variable& x, const Variable& gate,
                               const Variable& w_down, const Variable& w_up,
                               const OptionalTensor& b_down, const OptionalTensor& b_up,
                               const OptionalTensor& base, at::IntArrayRef ranks,
                               std::string_view activation, bool recompute, bool with_hidden,
                               const OptionalTensor& weight, const OptionalTensor& bias) {
    const bool needs_w_down = w_down.requires_grad();
    const bool needs_hidden = x.requires_grad() || gate.requires_grad() || needs_w_down ||
                              w_up.requires_grad() || needs_grad(b_down);
    // The identity and relu differentiate from act(z), which is the hidden output itself.
    const bool shared = with_hidden && !keeps_pre_activation(activation);
    const bool save = needs_hidden && !recompute && !shared;
    const bool needs_weight = needs_grad(weight);
    at::AutoDispatchBelowADInplaceOrView guard;
    // Once for both directions.
    const OptionalTensor used_weight = cast(weight, x.scalar_type());
    auto [out, hidden, saved] =
        pemt_fast::forward(x, gate, w_down, w_up, b_down, b_up, base, ranks, activation, recompute,
                           with_hidden, save, used_weight, bias);
    const bool keeps_hidden = shared && !recompute && needs_hidden;
    const bool keeps_x = needs_w_down || needs_weight || (needs_hidden && recompute);
    ctx->save_for_backward({keeps_x ? x : at::Tensor(), gate, w_down, w_up, or_empty(b_down),
                            or_empty(b_up),
                            keeps_hidden ? hidden
                            : save       ? saved
                                         : at::Tensor(),
                            x.requires_grad() ? or_empty(used_weight) : at::Tensor()});
    ctx->saved_data["ranks"] = ranks.vec();
    ctx->saved_data["activation"] = std::string(activation);
    if (base) ctx->saved_data["base_dtype"] = base->scalar_type();
    if (weight) ctx->saved_data["weight_dtype"] = weight->scalar_type();
    if (bias) ctx->saved_data["bias_dtype"] = bias->scalar_type();
    ctx->set_materialize_grads(false);
    if (!with_hidden) ctx->mark_non_differentiable({hidden});
    return {out, hidden};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    variable_list result(kInputs);
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
    // The dtype of the next optional input if its gradient is needed.
    const auto next_needed = [&](const char* name) -> std::optional<at::ScalarType> {
      const auto dtype = ctx->saved_data.find(name);
      if (dtype == ctx->saved_data.end() || !ctx->needs_input_grad(edge++)) return std::nullopt;
      return dtype->second.toScalarType();
    };
    const auto base_dtype = next_needed("base_dtype");
    const auto weight_dtype = next_needed("weight_dtype");
    const auto bias_dtype = next_needed("bias_dtype");
    if (base_dtype && grad_out.defined()) result[kBase] = grad_out.to(*base_dtype);
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto no_autocast = without_autocast();
    if (weight_dtype && grad_out.defined()) {
      result[kWeight] = cast(at::mm(as_matrix(grad_out).t(), as_matrix(saved[0])), *weight_dtype);
    }
    if (bias_dtype && grad_out.defined()) {
      result[kBias] = cast(as_matrix(grad_out).sum(0, false, at::kFloat), *bias_dtype);
    }
    if (std::any_of(needs.begin(), needs.end(), [](bool need) { return need; })) {
      static const auto op = find_operator<decltype(adapter_mixture_backward_cpu)>(
          "pemt_fast::adapter_mixture_native_backward");
      auto found =
          op.call(if_defined(grad_out), if_defined(grad_hidden), if_defined(saved[0]), saved[1],
                  saved[2], saved[3], if_defined(saved[4]), if_defined(saved[5]),
                  if_defined(saved[6]), ctx->saved_data["ranks"].toIntVector(),
                  ctx->saved_data["activation"].toStringView(), needs, if_defined(saved[7]));
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
    for (size_t i = 0; i < result.size(); i++) {
      if (i == kBase || !result[i].defined()) continue;
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
    at::IntArrayRef ranks, std::string_view activation, bool recompute, bool with_hidden,
    const OptionalTensor& weight, const OptionalTensor& bias) {
  if (at::GradMode::is_enabled() &&
      (x.requires_grad() || gate.requires_grad() || w_down.requires_grad() ||
       w_up.requires_grad() || needs_grad(b_down) || needs_grad(b_up) || needs_grad(base) ||
       needs_grad(weight) || needs_grad(bias))) {
    auto results = AdapterMixtureFunction::apply(x, gate, w_down, w_up, b_down, b_up, base, ranks,
                                                 activation, recompute, with_hidden, weight, bias);
    return {results[0], results[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return adapter_mixture(x, gate, w_down, w_up, b_down, b_up, base, ranks, activation, recompute,
                         with_hidden, weight, bias);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> adapter_mixture(
    const at::Tensor& x, const at::Tensor& gate, const at::Tensor& w_down, const at::Tensor& w_up,
    const OptionalTensor& b_down, const OptionalTensor& b_up, const OptionalTensor& base,
    at::IntArrayRef ranks, std::string_view activation, bool recompute, bool with_hidden,
    const OptionalTensor& weight, const OptionalTensor& bias) {
  static const auto op =
      find_operator<decltype(adapter_mixture)>("pemt_fast::adapter_mixture_native");
  return op.call(x, gate, w_down, w_up, b_down, b_up, base, ranks, activation, recompute,
                 with_hidden, weight, bias);
}

bool keeps_pre_activation(std::string_view activation) {
  return activation != "identity" && activation != "relu";
}

TORCH_LIBRARY_FRAGMENT(pemt_fast, m) {
#define PEMT_FAST_INPUTS                                                              \
  "Tensor x, Tensor gate, Tensor w_down, Tensor w_up, Tensor? b_down, Tensor? b_up, " \
  "Tensor? base, int[] ranks, str activation, bool recompute, bool with_hidden"
  m.def("adapter_mixture_native(" PEMT_FAST_INPUTS
        ", Tensor? weight=None, Tensor? bias=None) -> (Tensor out, Tensor hidden)");
  m.def("adapter_mixture_native_forward(" PEMT_FAST_INPUTS
        ", bool save, Tensor? weight=None, Tensor? bias=None) -> (Tensor, Tensor, Tensor)");
#undef PEMT_FAST_INPUTS
  m.def(
      "adapter_mixture_native_backward(Tensor? grad_out, Tensor? grad_hidden, Tensor? x, "
      "Tensor gate, Tensor w_down, Tensor w_up, Tensor? b_down, Tensor? b_up, Tensor? saved, "
      "int[] ranks, str activation, bool[6] needs, Tensor? weight=None) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(pemt_fast, Autograd, m) { m.impl("adapter_mixture_native", &differentiable); }

TORCH_LIBRARY_IMPL(pemt_fast, CPU, m) {
  m.impl("adapter_mixture_native", &adapter_mixture_cpu);
  m.impl("adapter_mixture_native_forward", &adapter_mixture_forward_cpu);
  m.impl("adapter_mixture_native_backward", &adapter_mixture_backward_cpu);
}

}  // namespace pemt_fast
