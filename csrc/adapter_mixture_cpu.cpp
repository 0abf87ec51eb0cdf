// SPDX-License-Identifier: Apache-2.0
//
// The operator on CPU tensors: allocates results and hands raw pointers to cpu/adapter_mixture.h.
// How a call is prepared: cpu_call.h.
#include <ATen/ATen.h>

#include <algorithm>

#include "adapter_mixture.h"
#include "cpu_call.h"

namespace pemt_fast {
namespace {

using at::Tensor;

int64_t rows_of(at::IntArrayRef sizes) {
  return c10::multiply_integers(sizes.begin(), sizes.end() - 1);
}

// d_b_up = gate^T * d_out, the gates as `split_gate` gives them.
void add_up_bias_gradient(const Call& call, const Tensor& d_out, Tensor& d_b_up) {
  const int64_t terms = call.adapters * cpu::gate_parts(call.bf16);
  const Tensor gates = at::empty({call.tokens, terms},
                                 d_out.options().dtype(call.bf16 ? at::kBFloat16 : at::kFloat));
  char* to = (char*)gates.mutable_data_ptr();
  for (int64_t t = 0; t < call.tokens; t++, to += terms * gates.element_size()) {
    const float* gate = call.gate_data() + t / call.tokens_per_row() * (call.adapters + 1);
    cpu::split_gate(gate, call.adapters, call.bf16, to);
  }
  const Tensor sums = at::empty({terms, call.h}, at::kFloat);
  const cpu::WeightGradient work{gates.const_data_ptr(),
                                 call.bf16 ? cpu::Dtype::bf16 : cpu::Dtype::f32,
                                 d_out.const_data_ptr(),
                                 call.tokens > 1 ? d_out.stride(0) : call.h,
                                 call.h,
                                 sums.mutable_data_ptr(),
                                 cpu::Dtype::f32};
  cpu::run(cpu::kernels(), &work, 1, call.tokens, terms, cpu_dtype(call.type), call.bf16,
           threads());
  d_b_up.copy_(sums.reshape({-1, call.adapters, call.h}).sum(0));
}

// Hidden units of all tokens, z or act(z) as backward wants them: what forward would have saved.
Tensor recomputed(const Call& call, const Parameters& p, const Tensor& x,
                  std::string_view activation) {
  Kept kept;
  Tensor units = at::empty({call.tokens, call.n}, x.options());
  const Tensor x_rows = as_rows(x, call.tokens, call.d);
  cpu::Walk walk = new_walk(call);
  set_input(walk, x_rows, call.d);
  walk.first = operand(call, p.w_down, {}, true, p.down_is_frozen, kept);
  walk.pass = cpu::kernels().forward[(int)walk.storage][call.bf16][(int)cpu_activation(activation)];
  walk.block.bias = unit_bias(call, p.b_down, kept);
  walk.block.saved = units.mutable_data_ptr();
  cpu::run(cpu::kernels(), walk, threads());
  return units;
}

// Rows [T, width] to start the output from; the result must outlive the walk.
Tensor set_base(cpu::Walk& walk, const Tensor& base, at::ScalarType type, int64_t width) {
  const bool direct = base.scalar_type() == type || base.scalar_type() == at::kFloat;
  const Tensor rows = as_rows(direct ? base : base.to(at::kFloat), walk.tokens, width);
  walk.base = rows.const_data_ptr();
  walk.base_row = walk.tokens > 1 ? rows.stride(0) : width;
  walk.base_dtype = cpu_dtype(rows.scalar_type());
  return rows;
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& gate,
                                           const Tensor& w_down, const Tensor& w_up,
                                           const OptionalTensor& b_down, const OptionalTensor& b_up,
                                           const OptionalTensor& base, at::IntArrayRef ranks,
                                           std::string_view activation, bool with_hidden, bool save,
                                           bool training, const OptionalTensor& weight,
                                           const OptionalTensor& bias) {
  Call call(x.scalar_type(), rows_of(x.sizes()), gate, w_down, w_up, ranks);
  Parameters p = parameters(w_down, w_up, b_down, b_up, training);
  const bool skips_unused = call.has_zero_gate && !save && !with_hidden;
  quarantine(call, p, skips_unused);

  const Tensor x_rows = as_rows(x, call.tokens, call.d);
  Tensor out = weight ? linear(x_rows, *weight, bias, x.sizes())
                      : at::empty(with_last(x.sizes(), call.h), x.options());
  Tensor hidden =
      at::empty(with_hidden ? with_last(x.sizes(), call.n) : at::DimVector{0}, x.options());
  Tensor saved =
      at::empty(save ? at::DimVector{call.tokens, call.n} : at::DimVector{0}, x.options());
  if (call.tokens == 0) return {out, hidden, saved};

  Kept kept;
  cpu::Walk walk = new_walk(call);
  set_input(walk, x_rows, call.d);
  walk.first = operand(call, p.w_down, {}, true, p.down_is_frozen, kept);
  walk.second = operand(call, p.w_up, p.b_up, false, p.up_is_frozen, kept);
  walk.pass = cpu::kernels().forward[(int)walk.storage][call.bf16][(int)cpu_activation(activation)];
  walk.block.bias = unit_bias(call, p.b_down, kept);
  walk.block.saved = save ? saved.mutable_data_ptr() : nullptr;
  walk.block.hidden = with_hidden ? hidden.mutable_data_ptr() : nullptr;
  walk.skips_unused = skips_unused;
  walk.out = out.mutable_data_ptr();
  walk.width_out = call.h;
  walk.has_up_bias = p.b_up.has_value();
  if (weight) {
    set_base(walk, out, call.type, call.h);
  } else if (base) {
    kept.tensors.push_back(set_base(walk, *base, call.type, call.h));
  }
  cpu::run(cpu::kernels(), walk, threads());
  return {out, hidden, saved};
}

// The order of the gradients, and of what `needs` asks for.
enum Input { kX, kGate, kWDown, kWUp, kBDown, kBUp };

// What the walk of backward leaves for the gradients of the parameters.
struct UnitGradients {
  Tensor d_z;    // [T, N]
  Tensor gated;  // act * gate [T, N]
};

// d_x, d_gate [G, E] and, where parameters train, what their gradients are made of.
UnitGradients walk_back(const Call& call, const Parameters& p, const Tensor& d_out,
                        const OptionalTensor& grad_hidden, const OptionalTensor& x,
                        const OptionalTensor& saved, std::string_view activation,
                        const std::array<bool, 6>& needs, bool adds, Tensor& d_x, Tensor& d_gate) {
  const bool keeps_d_z = needs[kWDown] || needs[kBDown];
  const auto units_if = [&](bool needed) {
    return at::empty(needed ? at::DimVector{call.tokens, call.n} : at::DimVector{0},
                     at::TensorOptions().dtype(call.type));
  };
  UnitGradients result{units_if(keeps_d_z), units_if(needs[kWUp])};
  if (call.tokens == 0) return result;
  Kept kept;
  const Tensor units = saved && saved->numel() > 0 ? as_rows(*saved, call.tokens, call.n)
                                                   : recomputed(call, p, *x, activation);
  kept.tensors.push_back(units.contiguous());
  cpu::Walk walk = new_walk(call);
  walk.pass =
      cpu::kernels().backward[(int)walk.storage][call.bf16][(int)cpu_activation(activation)];
  walk.block.saved = kept.tensors.back().mutable_data_ptr();
  // With only w_up to train, or no gradient of the output, the first product has no terms.
  if (d_out.defined() && (needs[kX] || needs[kGate] || keeps_d_z)) {
    set_input(walk, d_out, call.h);
    walk.first = operand(call, p.w_up, {}, true, p.up_is_frozen, kept);
  }
  if (grad_hidden) {
    kept.tensors.push_back(grad_hidden->to(call.type).reshape({call.tokens, call.n}).contiguous());
    walk.block.d_hidden = kept.tensors.back().const_data_ptr();
  }
  if (keeps_d_z) walk.block.d_z = result.d_z.mutable_data_ptr();
  if (needs[kWUp]) walk.block.kept_gated = result.gated.mutable_data_ptr();
  if (needs[kGate]) {
    walk.d_gate = d_gate.mutable_data_ptr<float>();
    walk.has_gate_bias = p.b_up && d_out.defined();
    if (walk.has_gate_bias) walk.gate_bias = bias_operand(call, p, kept);
  }
  if (needs[kX]) {
    walk.second = operand(call, p.w_down, {}, false, p.down_is_frozen, kept);
    walk.out = d_x.mutable_data_ptr();
    walk.width_out = call.d;
    if (adds) set_base(walk, d_x, call.type, call.d);
  }
  cpu::run(cpu::kernels(), walk, threads());
  return result;
}

// d_w_up = gated^T * d_out and d_w_down = d_z^T * x, together.
void weight_gradients(const Call& call, const UnitGradients& units, const Tensor& d_out,
                      const OptionalTensor& x, Tensor& d_w_down, Tensor& d_w_up) {
  cpu::WeightGradient work[2];
  int count = 0;
  const auto add = [&](const Tensor& values, const Tensor& rows, int64_t width, Tensor& d_weight) {
    work[count++] = {values.const_data_ptr(),
                     cpu_dtype(call.type),
                     rows.const_data_ptr(),
                     call.tokens > 1 ? rows.stride(0) : width,
                     width,
                     d_weight.mutable_data_ptr(),
                     cpu_dtype(d_weight.scalar_type())};
  };
  if (d_w_up.defined()) add(units.gated, d_out, call.h, d_w_up);
  Tensor x_rows;
  if (d_w_down.defined()) {
    x_rows = as_rows(*x, call.tokens, call.d);
    add(units.d_z, x_rows, call.d, d_w_down);
  }
  if (count == 0) return;
  cpu::run(cpu::kernels(), work, count, call.tokens, call.n, cpu_dtype(call.type), call.bf16,
           threads());
}

}  // namespace

std::tuple<Tensor, Tensor> adapter_mixture_cpu(
    const Tensor& x, const Tensor& gate, const Tensor& w_down, const Tensor& w_up,
    const OptionalTensor& b_down, const OptionalTensor& b_up, const OptionalTensor& base,
    at::IntArrayRef ranks, std::string_view activation, bool /*recompute*/, bool with_hidden,
    const OptionalTensor& weight, const OptionalTensor& bias) {
  auto [out, hidden, saved] = forward(x, gate, w_down, w_up, b_down, b_up, base, ranks, activation,
                                      with_hidden, false, false, weight, bias);
  return {out, hidden};
}

std::tuple<Tensor, Tensor, Tensor> adapter_mixture_forward_cpu(
    const Tensor& x, const Tensor& gate, const Tensor& w_down, const Tensor& w_up,
    const OptionalTensor& b_down, const OptionalTensor& b_up, const OptionalTensor& base,
    at::IntArrayRef ranks, std::string_view activation, bool /*recompute*/, bool with_hidden,
    bool save, const OptionalTensor& weight, const OptionalTensor& bias) {
  return forward(x, gate, w_down, w_up, b_down, b_up, base, ranks, activation, with_hidden, save,
                 true, weight, bias);
}

Gradients adapter_mixture_backward_cpu(const OptionalTensor& grad_out,
                                       const OptionalTensor& grad_hidden, const OptionalTensor& x,
                                       const Tensor& gate, const Tensor& w_down, const Tensor& w_up,
                                       const OptionalTensor& b_down, const OptionalTensor& b_up,
                                       const OptionalTensor& saved, at::IntArrayRef ranks,
                                       std::string_view activation, std::array<bool, 6> needs,
                                       const OptionalTensor& weight) {
  const Tensor& first = grad_out ? *grad_out : *grad_hidden;
  Call call(first.scalar_type(), rows_of(first.sizes()), gate, w_down, w_up, ranks);
  Parameters p = parameters(w_down, w_up, b_down, b_up, true);
  const bool quarantined = quarantine(call, p, false);
  // A new one each time: results of an operator must not share memory.
  const auto none = [&] { return at::empty({0}, first.options()); };
  Tensor d_out;  // [T, H]
  if (grad_out) d_out = as_rows(*grad_out, call.tokens, call.h);

  const bool adds = weight && grad_out;
  Tensor d_x = !needs[kX] ? none()
               : adds     ? linear(d_out, weight->t(), {}, first.sizes())
                          : at::empty(with_last(first.sizes(), call.d), first.options());
  Tensor d_gate = needs[kGate] ? at::zeros({call.groups, call.adapters}, at::kFloat) : none();
  UnitGradients units;
  if (std::any_of(needs.begin(), needs.begin() + kBUp, [](bool need) { return need; })) {
    units = walk_back(call, p, d_out, grad_hidden, x, saved, activation, needs, adds, d_x, d_gate);
  }
  if (needs[kGate]) {
    if (quarantined) {
      const Tensor used = call.gate.slice(1, 0, call.adapters);
      d_gate = at::where(used.isnan(), used, d_gate);
    }
    d_gate = d_gate.reshape(gate.sizes()).to(gate.scalar_type());
  }

  // Undefined where there is nothing to sum; float64 parameters get their gradients in float32.
  const auto new_gradient = [&](bool summed, const Tensor& weight) {
    const auto type = weight.scalar_type() == at::kDouble ? at::kFloat : weight.scalar_type();
    return summed && call.tokens > 0 ? at::empty(weight.sizes(), weight.options().dtype(type))
                                     : Tensor();
  };
  Tensor d_w_down = new_gradient(needs[kWDown], w_down);
  Tensor d_w_up = new_gradient(needs[kWUp] && grad_out, w_up);
  weight_gradients(call, units, d_out, x, d_w_down, d_w_up);
  const auto finished = [&](const Tensor& grad, int input, const Tensor& weight) {
    if (!needs[input]) return none();
    return grad.defined() ? grad.to(weight.scalar_type())
                          : at::zeros(weight.sizes(), weight.options());
  };

  Tensor d_b_down = none(), d_b_up = none();
  if (needs[kBDown]) {
    d_b_down =
        units.d_z.sum(0, false, at::kFloat).reshape(b_down->sizes()).to(b_down->scalar_type());
  }
  if (needs[kBUp]) {
    d_b_up = at::zeros(b_up->sizes(), b_up->options());
    if (grad_out && call.tokens > 0) add_up_bias_gradient(call, d_out, d_b_up);
  }
  return {d_x,      d_gate, finished(d_w_down, kWDown, w_down), finished(d_w_up, kWUp, w_up),
          d_b_down, d_b_up};
}

}  // namespace pemt_fast
