// SPDX-License-Identifier: Apache-2.0
//
// The operator on CPU tensors: flattens, converts what is small, chooses between packed and plain
// weights, allocates results, and hands raw pointers to cpu/adapter_mixture.h.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "adapter_mixture.h"
#include "cpu/isa.h"
#include "packed_weights.h"

namespace pemt_fast {
namespace {

using at::Tensor;

// From this many tokens on a weight that may not be kept is packed for a single call.
constexpr int64_t kPackForOneCall = 192;

cpu::Dtype cpu_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return cpu::Dtype::f32;
    case at::kBFloat16: return cpu::Dtype::bf16;
    case at::kHalf: return cpu::Dtype::f16;
    default:
      TORCH_CHECK(false, "impl=\"cpu\" computes in float32, bfloat16 or float16, got ", type);
  }
}

cpu::Activation cpu_activation(std::string_view name) {
  if (name == "identity") return cpu::Activation::identity;
  if (name == "relu") return cpu::Activation::relu;
  if (name == "gelu") return cpu::Activation::gelu;
  if (name == "gelu_tanh") return cpu::Activation::gelu_tanh;
  TORCH_CHECK(name == "silu", "unknown activation ", name);
  return cpu::Activation::silu;
}

int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// [rows, width] whose rows are dense; a view wherever the strides allow.
Tensor as_rows(const Tensor& tensor, int64_t rows, int64_t width) {
  if (tensor.dim() == 2 && tensor.size(0) == rows && (tensor.stride(1) == 1 || width <= 1)) {
    return tensor;
  }
  const Tensor flat = tensor.reshape({rows, width});
  return width <= 1 || flat.stride(1) == 1 ? flat : flat.contiguous();
}

// Sizes of a call and its small arguments as the kernels want them.
struct Call {
  int64_t tokens, d, h, n, adapters, groups;
  at::ScalarType type;
  bool bf16;
  Tensor gate;  // [G, E + 1] float32, the last column 0
  Tensor adapter_of_unit;  // [N padded] int32; padding names the last column
  bool has_zero_gate = false;

  Call(at::ScalarType type_, int64_t tokens_, const Tensor& gate_in, const Tensor& w_down,
       const Tensor& w_up, at::IntArrayRef ranks)
      : tokens(tokens_),
        d(w_down.size(-1)),
        h(w_up.size(-1)),
        n(0),
        adapters((int64_t)ranks.size()),
        groups(gate_in.numel() / (int64_t)ranks.size()),
        type(type_),
        bf16(type_ == at::kBFloat16 && cpu::kernels().bf16) {
    for (const int64_t rank : ranks) n += rank;
    const int64_t padded = (n + cpu::kBlockColumns - 1) / cpu::kBlockColumns * cpu::kBlockColumns;
    adapter_of_unit = at::empty({padded}, at::kInt);
    int32_t* of = adapter_of_unit.mutable_data_ptr<int32_t>();
    for (int64_t e = 0; e < adapters; e++) of = std::fill_n(of, ranks[(size_t)e], (int32_t)e);
    std::fill_n(of, padded - n, (int32_t)adapters);
    copy_gate(gate_in);
  }

  int64_t tokens_per_row() const { return groups > 0 ? tokens / groups : 1; }
  float* gate_data() const { return gate.mutable_data_ptr<float>(); }

  void find_zeros() {
    has_zero_gate = false;
    const float* row = gate_data();
    for (int64_t g = 0; g < groups && !has_zero_gate; g++, row += adapters + 1) {
      for (int64_t e = 0; e < adapters; e++) has_zero_gate |= row[e] == 0.f;
    }
  }

 private:
  void copy_gate(const Tensor& gate_in) {
    const Tensor source = gate_in.to(at::kFloat).contiguous();
    const float* from = source.const_data_ptr<float>();
    gate = at::empty({groups, adapters + 1}, at::kFloat);
    float* to = gate_data();
    for (int64_t g = 0; g < groups; g++, from += adapters, to += adapters + 1) {
      std::memcpy(to, from, (size_t)adapters * sizeof(float));
      to[adapters] = 0.f;
    }
    find_zeros();
  }
};

// The parameters of a call; replaced by sanitised copies where needed (see `quarantine`).
struct Parameters {
  Tensor w_down, w_up;  // contiguous
  OptionalTensor b_down, b_up;
  bool down_is_frozen, up_is_frozen;
};

// In inference every weight counts as frozen. In training one that asks for gradients will have
// changed before it is seen again; a copy is never seen again.
Parameters parameters(const Tensor& w_down, const Tensor& w_up, const OptionalTensor& b_down,
                      const OptionalTensor& b_up, bool training) {
  const auto dense = [](const Tensor& t) { return t.is_contiguous() ? t : t.contiguous(); };
  const auto readable = [&](const Tensor& t) {
    return dense(t.scalar_type() == at::kDouble ? t.to(at::kFloat) : t);
  };
  Parameters p{readable(w_down), readable(w_up), b_down, b_up, false, false};
  if (b_up) p.b_up = dense(*b_up);
  const auto frozen = [&](const Tensor& given, const Tensor& used) {
    return given.is_same(used) && !(training && given.requires_grad());
  };
  p.down_is_frozen = frozen(w_down, p.w_down);
  p.up_is_frozen = frozen(w_up, p.w_up) && (!b_up || frozen(*b_up, *p.b_up));
  return p;
}

// Adapters that some tokens use and others do not, or that share a panel with one in use: their
// values may meet a zero. True if one of them holds a value that is not finite.
bool poisons(const Call& call, const Parameters& p, bool skips_unused, Tensor& bad) {
  const int64_t e_count = call.adapters;
  std::vector<char> any((size_t)e_count), all((size_t)e_count, 1);
  const float* row = call.gate_data();
  for (int64_t g = 0; g < call.groups; g++, row += e_count + 1) {
    for (int64_t e = 0; e < e_count; e++) {
      any[(size_t)e] |= row[e] != 0.f;
      all[(size_t)e] &= row[e] != 0.f;
    }
  }
  bad = at::zeros({e_count}, at::kBool);
  bool* found = bad.mutable_data_ptr<bool>();
  const int32_t* of = call.adapter_of_unit.const_data_ptr<int32_t>();
  const auto not_finite = [](const Tensor& t) { return !at::isfinite(t).all().item<bool>(); };
  bool any_bad = false;
  int64_t unit = 0;
  for (int32_t e = 0; e < e_count; e++) {
    const int64_t first = unit;
    while (unit < call.n && of[unit] == e) unit++;
    if (all[(size_t)e]) continue;
    if (skips_unused && !any[(size_t)e] && first % cpu::kPanel == 0 && unit % cpu::kPanel == 0 &&
        cpu::kernels().panel_bf16 == cpu::kPanel && !p.b_up) {
      continue;  // never touched
    }
    bool finite = true;
    for (const Tensor* w : {&p.w_down, &p.w_up}) {
      const int64_t width = w->size(-1);
      const char* data = (const char*)w->const_data_ptr() + first * width * w->element_size();
      const std::vector<int32_t> zeros((size_t)(unit - first), 0);
      cpu::clear_if_not_finite(data, cpu_dtype(w->scalar_type()), width, width, zeros.data(),
                               unit - first, &finite);
    }
    if (p.b_down) finite &= !not_finite(p.b_down->reshape(-1).slice(0, first, unit));
    if (p.b_up) finite &= !not_finite((*p.b_up)[e]);
    found[e] = !finite;
    any_bad |= !finite;
  }
  return any_bad;
}

// Where a gate is 0 nothing of an adapter may reach the result, but 0 times infinity is NaN. The
// values of an adapter that are not finite move into its gates: zeros in the weights, NaN in the
// gates that are not 0. Rare: only here are weights copied.
bool quarantine(Call& call, Parameters& p, bool skips_unused) {
  Tensor bad;
  if (!call.has_zero_gate || !poisons(call, p, skips_unused, bad)) return false;
  const Tensor unit_bad = bad.index_select(
      0, call.adapter_of_unit.slice(0, 0, call.n).to(at::kLong));
  const auto cleared = [&](const Tensor& w) {
    return w.detach().reshape({call.n, -1}).masked_fill(unit_bad.unsqueeze(1), 0).contiguous();
  };
  p.w_down = cleared(p.w_down);
  p.w_up = cleared(p.w_up);
  p.down_is_frozen = p.up_is_frozen = false;
  if (p.b_down) p.b_down = p.b_down->detach().reshape(-1).masked_fill(unit_bad, 0);
  if (p.b_up) p.b_up = p.b_up->detach().masked_fill(bad.unsqueeze(1), 0);
  const bool* is_bad = bad.const_data_ptr<bool>();
  float* row = call.gate_data();
  for (int64_t g = 0; g < call.groups; g++, row += call.adapters + 1) {
    for (int64_t e = 0; e < call.adapters; e++) {
      if (is_bad[e] && row[e] != 0.f) row[e] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  return true;
}

// Tensors that must outlive a call of the kernels.
struct Kept {
  std::vector<Panels> panels;
  std::vector<Tensor> tensors;
};

cpu::Operand operand(const Call& call, const Tensor& weight, const OptionalTensor& bias,
                     bool sums_over_width, bool frozen, Kept& kept) {
  const int64_t width = weight.size(-1);
  const WeightUse use{weight, bias ? &*bias : nullptr, call.n, width, sums_over_width, call.bf16};
  cpu::Operand result;
  result.dtype = call.bf16 ? cpu::Dtype::bf16 : cpu::Dtype::f32;
  const cpu::Kernels& kernels = cpu::kernels();
  const bool few = call.tokens <= cpu::kFewRows;
  const bool readable = !call.bf16 || weight.scalar_type() == at::kBFloat16;
  Panels panels;
  if (frozen && !(few && readable)) panels = packed_weight(kernels, use);
  if (!panels && (call.tokens >= kPackForOneCall || (call.bf16 && kernels.rows_bf16 == nullptr))) {
    panels = pack_weight(kernels, use);
  }
  if (panels) {
    result.data = panels->const_data_ptr();
    result.panels = true;
    kept.panels.push_back(std::move(panels));
    return result;
  }
  const auto keep = [&](const Tensor& tensor, at::ScalarType type) {
    kept.tensors.push_back(tensor.detach().to(type));
    return kept.tensors.back().const_data_ptr();
  };
  result.dtype = readable ? cpu_dtype(weight.scalar_type()) : cpu::Dtype::bf16;
  const at::ScalarType type = readable ? weight.scalar_type() : at::kBFloat16;
  if (bias) result.bias = keep(*bias, type);
  result.data = readable ? weight.const_data_ptr() : keep(weight, type);
  result.row = width;
  return result;
}

// b_up as the right side of grad_out * b_up^T.
cpu::Operand bias_operand(const Call& call, const Parameters& p, Kept& kept) {
  Call bias_call = call;
  bias_call.n = call.adapters;
  return operand(bias_call, *p.b_up, {}, true, p.up_is_frozen, kept);
}

// d_b_up = gate^T * d_out, the gates as `split_gate` gives them.
void add_up_bias_gradient(const Call& call, const Tensor& d_out, Tensor& d_b_up) {
  const int64_t terms = call.adapters * cpu::gate_parts(call.bf16);
  const Tensor gates =
      at::empty({call.tokens, terms}, d_out.options().dtype(call.bf16 ? at::kBFloat16 : at::kFloat));
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
  cpu::run(cpu::kernels(), &work, 1, call.tokens, terms, cpu_dtype(call.type), call.bf16, threads());
  d_b_up.copy_(sums.reshape({-1, call.adapters, call.h}).sum(0));
}

// b_down as float32 [N padded].
const float* unit_bias(const Call& call, const OptionalTensor& b_down, Kept& kept) {
  if (!b_down) return nullptr;
  const bool wide = b_down->scalar_type() == at::kDouble;
  const Tensor source = (wide ? b_down->to(at::kFloat) : *b_down).contiguous();
  const int64_t padded = call.adapter_of_unit.size(0);
  const Tensor bias = at::empty({padded}, at::kFloat);
  float* to = bias.mutable_data_ptr<float>();
  cpu::kernels().to_f32[(int)cpu_dtype(source.scalar_type())](source.const_data_ptr(), call.n, to);
  std::fill_n(to + call.n, padded - call.n, 0.f);
  kept.tensors.push_back(bias);
  return to;
}

cpu::Walk new_walk(const Call& call) {
  cpu::Walk walk;
  walk.tokens = call.tokens;
  walk.units = call.n;
  walk.adapters = call.adapters;
  walk.storage = cpu_dtype(call.type);
  walk.bf16 = call.bf16;
  walk.block.gate = call.gate_data();
  walk.block.gate_row = call.adapters + 1;
  walk.block.tokens_per_row = call.tokens_per_row();
  walk.block.adapter_of_unit = call.adapter_of_unit.const_data_ptr<int32_t>();
  return walk;
}

void set_input(cpu::Walk& walk, const Tensor& x, int64_t width) {
  walk.x = x.const_data_ptr();
  walk.x_row = x.size(0) > 1 ? x.stride(0) : width;
  walk.width_in = width;
}

at::DimVector with_last(at::IntArrayRef sizes, int64_t last) {
  at::DimVector result(sizes.begin(), sizes.end());
  result.back() = last;
  return result;
}

int64_t rows_of(at::IntArrayRef sizes) {
  return c10::multiply_integers(sizes.begin(), sizes.end() - 1);
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

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& gate,
                                           const Tensor& w_down, const Tensor& w_up,
                                           const OptionalTensor& b_down, const OptionalTensor& b_up,
                                           const OptionalTensor& base, at::IntArrayRef ranks,
                                           std::string_view activation, bool with_hidden, bool save,
                                           bool training) {
  Call call(x.scalar_type(), rows_of(x.sizes()), gate, w_down, w_up, ranks);
  Parameters p = parameters(w_down, w_up, b_down, b_up, training);
  const bool skips_unused = call.has_zero_gate && !save && !with_hidden;
  quarantine(call, p, skips_unused);

  Tensor out = at::empty(with_last(x.sizes(), call.h), x.options());
  Tensor hidden = at::empty(with_hidden ? with_last(x.sizes(), call.n) : at::DimVector{0},
                            x.options());
  Tensor saved = at::empty(save ? at::DimVector{call.tokens, call.n} : at::DimVector{0},
                           x.options());
  if (call.tokens == 0) return {out, hidden, saved};

  Kept kept;
  const Tensor x_rows = as_rows(x, call.tokens, call.d);
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
  Tensor base_rows;
  if (base) {
    const bool direct = base->scalar_type() == call.type || base->scalar_type() == at::kFloat;
    base_rows = as_rows(direct ? *base : base->to(at::kFloat), call.tokens, call.h);
    walk.base = base_rows.const_data_ptr();
    walk.base_row = call.tokens > 1 ? base_rows.stride(0) : call.h;
    walk.base_dtype = cpu_dtype(base_rows.scalar_type());
  }
  cpu::run(cpu::kernels(), walk, threads());
  return {out, hidden, saved};
}

}  // namespace

std::tuple<Tensor, Tensor> adapter_mixture_cpu(const Tensor& x, const Tensor& gate,
                                               const Tensor& w_down, const Tensor& w_up,
                                               const OptionalTensor& b_down,
                                               const OptionalTensor& b_up,
                                               const OptionalTensor& base, at::IntArrayRef ranks,
                                               std::string_view activation, bool /*recompute*/,
                                               bool with_hidden) {
  auto [out, hidden, saved] = forward(x, gate, w_down, w_up, b_down, b_up, base, ranks, activation,
                                      with_hidden, false, false);
  return {out, hidden};
}

std::tuple<Tensor, Tensor, Tensor> adapter_mixture_forward_cpu(
    const Tensor& x, const Tensor& gate, const Tensor& w_down, const Tensor& w_up,
    const OptionalTensor& b_down, const OptionalTensor& b_up, const OptionalTensor& base,
    at::IntArrayRef ranks, std::string_view activation, bool /*recompute*/, bool with_hidden,
    bool save) {
  return forward(x, gate, w_down, w_up, b_down, b_up, base, ranks, activation, with_hidden, save,
                 true);
}

Gradients adapter_mixture_backward_cpu(
    const OptionalTensor& grad_out, const OptionalTensor& grad_hidden, const OptionalTensor& x,
    const Tensor& gate, const Tensor& w_down, const Tensor& w_up, const OptionalTensor& b_down,
    const OptionalTensor& b_up, const OptionalTensor& saved, at::IntArrayRef ranks,
    std::string_view activation, std::array<bool, 6> needs) {
  const auto [needs_x, needs_gate, needs_w_down, needs_w_up, needs_b_down, needs_b_up] = needs;
  const Tensor& first = grad_out ? *grad_out : *grad_hidden;
  const auto options = first.options();
  Call call(first.scalar_type(), rows_of(first.sizes()), gate, w_down, w_up, ranks);
  Parameters p = parameters(w_down, w_up, b_down, b_up, true);
  const bool quarantined = quarantine(call, p, false);

  const auto empty_like = [&](bool needed, const Tensor& like) {
    return needed ? at::empty(like.sizes(), like.options()) : at::empty({0}, options);
  };
  Tensor d_x = needs_x ? at::empty(with_last(first.sizes(), call.d), options)
                       : at::empty({0}, options);
  Tensor d_gate = at::zeros(needs_gate ? at::DimVector{call.groups, call.adapters}
                                       : at::DimVector{0}, at::kFloat);
  const bool any_units = needs_x || needs_gate || needs_w_down || needs_w_up || needs_b_down;
  const bool keeps_d_z = needs_w_down || needs_b_down;
  Tensor d_z = at::empty(keeps_d_z ? at::DimVector{call.tokens, call.n} : at::DimVector{0}, options);
  Tensor gated = at::empty(needs_w_up ? at::DimVector{call.tokens, call.n} : at::DimVector{0},
                           options);
  Tensor d_out;  // [T, H]
  if (grad_out) d_out = as_rows(*grad_out, call.tokens, call.h);

  if (any_units && call.tokens > 0) {
    Kept kept;
    const Tensor units = saved && saved->numel() > 0
                             ? as_rows(*saved, call.tokens, call.n)
                             : recomputed(call, p, *x, activation);
    kept.tensors.push_back(units.is_contiguous() ? units : units.contiguous());
    cpu::Walk walk = new_walk(call);
    walk.pass =
        cpu::kernels().backward[(int)walk.storage][call.bf16][(int)cpu_activation(activation)];
    walk.block.saved = kept.tensors.back().mutable_data_ptr();
    // With only w_up to train, or no gradient of the output, d_hidden is 0: a sum of no terms.
    if (grad_out && (needs_x || needs_gate || keeps_d_z)) {
      set_input(walk, d_out, call.h);
      walk.first = operand(call, p.w_up, {}, true, p.up_is_frozen, kept);
    } else {
      walk.x = d_z.const_data_ptr();
    }
    if (grad_hidden) {
      kept.tensors.push_back(grad_hidden->to(call.type).reshape({call.tokens, call.n}).contiguous());
      walk.block.d_hidden = kept.tensors.back().const_data_ptr();
    }
    if (keeps_d_z) walk.block.d_z = d_z.mutable_data_ptr();
    if (needs_w_up) walk.block.kept_gated = gated.mutable_data_ptr();
    if (needs_gate) walk.d_gate = d_gate.mutable_data_ptr<float>();
    if (needs_gate && p.b_up && grad_out) {
      walk.has_gate_bias = true;
      walk.gate_bias = bias_operand(call, p, kept);
    }
    if (needs_x) {
      walk.second = operand(call, p.w_down, {}, false, p.down_is_frozen, kept);
      walk.out = d_x.mutable_data_ptr();
      walk.width_out = call.d;
    }
    cpu::run(cpu::kernels(), walk, threads());
  }

  // --- weights and biases ---
  const auto gradient_type = [](const Tensor& w) {
    return w.scalar_type() == at::kDouble ? at::kFloat : w.scalar_type();
  };
  Tensor d_w_down = empty_like(needs_w_down, w_down), d_w_up = empty_like(needs_w_up, w_up);
  cpu::WeightGradient work[2];
  int count = 0;
  Tensor x_rows;
  std::vector<std::pair<Tensor*, const Tensor*>> casts;
  const auto add = [&](Tensor& d_weight, const Tensor& weight, const Tensor& values,
                       const Tensor& rows, int64_t width) {
    d_weight = at::zeros(weight.sizes(), weight.options().dtype(gradient_type(weight)));
    work[count++] = {values.const_data_ptr(), cpu_dtype(call.type), rows.const_data_ptr(),
                     call.tokens > 1 ? rows.stride(0) : width, width, d_weight.mutable_data_ptr(),
                     cpu_dtype(d_weight.scalar_type())};
    casts.emplace_back(&d_weight, &weight);
  };
  if (call.tokens == 0 || !grad_out) {
    if (needs_w_up) d_w_up.zero_();
  } else if (needs_w_up) {
    add(d_w_up, w_up, gated, d_out, call.h);
  }
  if (call.tokens == 0) {
    if (needs_w_down) d_w_down.zero_();
  } else if (needs_w_down) {
    x_rows = as_rows(*x, call.tokens, call.d);
    add(d_w_down, w_down, d_z, x_rows, call.d);
  }
  if (count > 0) {
    cpu::run(cpu::kernels(), work, count, call.tokens, call.n, cpu_dtype(call.type), call.bf16,
             threads());
  }
  for (const auto& [grad, weight] : casts) *grad = grad->to(weight->scalar_type());

  Tensor d_b_down = at::empty({0}, options), d_b_up = at::empty({0}, options);
  if (needs_b_down) {
    d_b_down = d_z.sum(0, false, at::kFloat).reshape(b_down->sizes()).to(b_down->scalar_type());
  }
  if (needs_b_up) {
    d_b_up = at::zeros(b_up->sizes(), b_up->options());
    if (grad_out && call.tokens > 0) add_up_bias_gradient(call, d_out, d_b_up);
  }
  if (needs_gate) {
    if (quarantined) {
      const Tensor used = call.gate.slice(1, 0, call.adapters);
      d_gate = at::where(used.isnan(), used, d_gate);
    }
    d_gate = d_gate.reshape(gate.sizes()).to(gate.scalar_type());
  } else {
    d_gate = at::empty({0}, options);
  }
  return {d_x, d_gate, d_w_down, d_w_up, d_b_down, d_b_up};
}

}  // namespace pemt_fast
